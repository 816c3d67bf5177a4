"""Procedural heads: made-up people, posed by expression codes and rendered from all round.

The default data set, and the one on which claims are tested: every frame's camera, code and
geometry are known, and nothing of it is shared with the splatting it trains.
"""

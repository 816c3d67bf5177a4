"""Networks that are used as published and never trained: DINOv2 and SAM 2.1's image encoder.

They are functions of a tree of arrays: `load` reads Hugging Face's weights and folds all that is
constant into them (interpolated positions, layer scales). `networks.py` loads those that a config
asks for.
"""

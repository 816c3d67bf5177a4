"""Rematerialisation: which blocks of a transformer the backward pass computes again.

A block that is not keeps all that its backward pass needs, ten times as much memory.
"""

from __future__ import annotations

import math


def recomputed(share: float, depth: int) -> list[bool]:
    """For each of `depth` blocks, whether it is: the first ones, `share` of all, rounded up."""
    return [i < math.ceil(share * depth) for i in range(depth)]

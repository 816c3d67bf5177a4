"""Weights from a rule, for parity without the published weights.

Published weights can't always be at hand, so parity is held on the same architecture with weights
that anyone can make again from their names: a seeded normal draw a tensor, scaled by what kind of
tensor the name and shape say it is.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np


def rule_tensor(name: str, shape: Sequence[int], salt: str = "public") -> np.ndarray:
    """The rule's value of the tensor called `name`, float32.

    `name` and `shape` are the published ones (PyTorch layout). `salt` chooses one of endlessly many
    models: a port that is right for one salt by luck is wrong for the next.
    """
    if name.endswith("resample_filter"):
        taps = np.array([1, 3, 3, 1], np.float32)
        return np.outer(taps, taps) / 64
    seed = int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:8], "little")
    z = np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape), dtype=np.float32)
    if name.endswith(("_embedding.weight", "head_token_embeddings")):
        return z
    if len(shape) >= 2:
        return z / np.float32(math.sqrt(math.prod(shape[1:])))
    scaled = np.float32(0.1) * z
    if name.endswith(".weight"):
        return 1 + scaled
    if name.endswith("out_layers.scaling.bias"):
        return scaled - 6
    return scaled


def rule_weights(manifest: Mapping[str, Sequence], salt: str = "public") -> dict[str, np.ndarray]:
    """Every tensor of `manifest` (name -> shape, or name -> [shape, dtype]) by the rule."""
    shapes = {n: e[0] if e and isinstance(e[0], Sequence) else e for n, e in manifest.items()}
    return {name: rule_tensor(name, shape, salt) for name, shape in shapes.items()}

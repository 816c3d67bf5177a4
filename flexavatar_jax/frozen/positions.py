"""Learned position maps at another resolution, resampled as PyTorch does it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def resize_bicubic(
    positions: Float[np.ndarray, "h w c"], size: int, *, antialias: bool
) -> Float[np.ndarray, "size size c"]:
    """Bicubic resampling to `size` x `size` with half-pixel centres, float32.

    PyTorch has two: with antialiasing it's Keys' kernel (a = -0.5) widened by the reduction factor,
    taps outside the map dropped and the others renormalised; without, the kernel of a = -0.75,
    taps outside the map repeating its rim.
    """
    rows, columns = (_weights(n, size, antialias) for n in positions.shape[:2])
    return np.einsum("ih,jw,hwc->ijc", rows, columns, positions, optimize=True).astype(np.float32)


def _weights(old: int, new: int, antialias: bool) -> Float[np.ndarray, "new old"]:
    a = -0.5 if antialias else -0.75
    step = old / new
    stretch = max(step, 1.0) if antialias else 1.0
    rim = 2
    centres = (np.arange(new) + 0.5) * step - 0.5
    d = np.abs(centres[:, None] - np.arange(-rim, old + rim)) / stretch
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    taps = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    weights = taps[:, rim : rim + old].copy()
    if not antialias:
        weights[:, 0] += taps[:, :rim].sum(1)
        weights[:, -1] += taps[:, rim + old :].sum(1)
    return weights / weights.sum(1, keepdims=True)

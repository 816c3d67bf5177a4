"""Smooth random functions of space: sums of plane waves, the same at any sampling."""

from __future__ import annotations

import numpy as np


def waves(
    points: np.ndarray, rng: np.random.Generator, wavelength: float, count: int = 9
) -> np.ndarray:
    """Isotropic noise of about unit standard deviation at `points`.

    Args:
      points: [..., D] in the units of `wavelength`, in any number of dimensions.
      rng: decides the function; what it draws doesn't depend on `points`' count.
      wavelength: typical size of the blobs' repeat; waves lie within a factor of 1.6 of it.
      count: of waves.
    """
    dimensions = points.shape[-1]
    direction = rng.standard_normal((count, dimensions))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    length = wavelength * rng.uniform(0.7, 1.6, (count, 1))
    phase = rng.uniform(0, 2 * np.pi, count)
    k = (2 * np.pi * direction / length).astype(np.float32)
    points = np.asarray(points, np.float32)
    total = np.zeros(points.shape[:-1], np.float32)
    for i in range(count):
        total += np.sin(points @ k[i] + np.float32(phase[i]))
    return total * np.float32(np.sqrt(2 / count))

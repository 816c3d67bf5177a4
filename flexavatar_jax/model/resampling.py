"""Bilinear resampling of square maps, one matrix an axis.

A regular grid over a map is separable, so sampling it is two small matrix products. They and their
gradients run well on every accelerator, where gathers of four neighbours (and the scatters of
their gradients) do not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


def interpolation_matrix(samples: int, size: int) -> Float[np.ndarray, "samples size"]:
    """Weights that sample `size` texels at linspace(-1, 1, samples), zeros beyond the rim.

    -1 and 1 are the outer edges of the first and the last texel (PyTorch's grid_sample with
    align_corners=False), so the outermost samples lie half a texel outside the texel centres and
    mix with zero padding by half.
    """
    at = ((np.linspace(-1, 1, samples) + 1) * size - 1) / 2
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(size)))
    return weights.astype(np.float32)


def sample_grid(
    maps: Float[ArrayLike, "*b h w c"], rows: int, columns: int
) -> Float[Array, "*b rows columns c"]:
    """Samples maps at a regular grid over their whole extent; see `interpolation_matrix`."""
    h, w = maps.shape[-3:-1]
    return jnp.einsum(
        "yh,xw,...hwc->...yxc",
        interpolation_matrix(rows, h),
        interpolation_matrix(columns, w),
        maps,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


@jax.custom_vjp
def take_points(
    x: Float[ArrayLike, "*b P c"], index: Int[ArrayLike, "G"], place: Int[ArrayLike, "P"]
) -> Float[Array, "*b G c"]:
    """Some of the rows of `x`, each at most once.

    Args:
      index: the numbers of these rows, ascending.
      place: `places(index, P)`: with it the gradient is taken from rows, too, not added to them.
    """
    return jnp.take(x, index, axis=-2, unique_indices=True, indices_are_sorted=True)


def places(index: Int[np.ndarray, "G"], rows: int) -> Int[np.ndarray, "rows"]:
    """Where in `index` each of so many rows stands; G for those that don't."""
    found = np.full(rows, len(index), np.int32)
    found[index] = np.arange(len(index))
    return found


def _take_backward(place: ArrayLike, dy: ArrayLike) -> tuple[Array, None, None]:
    zero = jnp.zeros((*dy.shape[:-2], 1, dy.shape[-1]), dy.dtype)
    return jnp.take(jnp.concatenate([dy, zero], axis=-2), place, axis=-2, mode="clip"), None, None


take_points.defvjp(lambda x, index, place: (take_points(x, index, place), place), _take_backward)

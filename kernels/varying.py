"""What `jax.shard_map` checks of a kernel: over which axes of the mesh its output varies."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def shape_like(array: Array, *shape: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    """A kernel's output of that shape, which varies over a mesh as `array`, its input, does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(array).manual_axis_type)

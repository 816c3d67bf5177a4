"""Products of float32 on a matrix unit that multiplies in bfloat16 and adds in float32.

A float32 is the sum of three bfloat16s (`split_bfloat16`). Where the other side is exact in
bfloat16, such as a 0-1 matrix, one pass over the three is exact.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def split_bfloat16(x: Array) -> list[Array]:
    """Three bfloat16s whose sum is the float32."""
    high = x.astype(jnp.bfloat16)
    rest = x - high.astype(jnp.float32)
    middle = rest.astype(jnp.bfloat16)
    return [high, middle, (rest - middle.astype(jnp.float32)).astype(jnp.bfloat16)]


def stack_bfloat16(x: Float[Array, "R n"]) -> Array:
    """A few rows split in three bfloat16, one part below the other: [3 R, n]."""
    return stack(split_bfloat16(x))


def stack(parts: list[Array]) -> Array:
    # Stacked as float32, whose registers hold 8 rows; those of bfloat16 hold 16.
    parts = [part.astype(jnp.float32) for part in parts]
    return jnp.concatenate(parts, axis=0).astype(jnp.bfloat16)


def sum_parts(x: Float[Array, "rows n"]) -> Float[Array, "rows//3 n"]:
    """Sum of three stacked results, smallest first."""
    rows = x.shape[0] // 3
    return (x[2 * rows :] + x[rows : 2 * rows]) + x[:rows]


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """One pass of the MXU: bfloat16 times bfloat16, contracting the axes given, in float32."""
    return lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def iota(shape: tuple[int, int], axis: int) -> Array:
    """The numbers 0, 1, ... along `axis`."""
    return lax.broadcasted_iota(jnp.int32, shape, axis)

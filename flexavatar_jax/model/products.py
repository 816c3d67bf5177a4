"""Products of linear layers: on CPUs those of bfloat16, too, as fast as the hardware is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from kernels import backends


def dot_general(
    x: Array, kernel: Array, dimension_numbers: Any, *args: Any, **options: Any
) -> Array:
    """`jax.lax.dot_general` of [*b, i] and [i, o], as `nnx.Linear` calls it."""
    if backends.platform() == "cpu" and x.dtype == kernel.dtype == jnp.bfloat16:
        return bfloat16_product(x, kernel)
    return jax.lax.dot_general(x, kernel, dimension_numbers, *args, **options)


@jax.custom_vjp
def bfloat16_product(
    x: Float[ArrayLike, "*b i"], kernel: Float[ArrayLike, "i o"]
) -> Float[Array, "*b o"]:
    """x @ kernel of bfloat16, summed in float32 and rounded once, forward and backward.

    XLA:CPU has products of bfloat16 with float32 sums (AVX512-BF16: twice float32's rate), and
    takes them only where float32 comes out; one that comes out in bfloat16 is a product of float32
    with conversions all around, though it is rounded no less.
    """
    return _product("...i,io->...o", x, kernel)


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return bfloat16_product(x, kernel), (x, kernel)


def _backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    return _product("...o,io->...i", dy, kernel), _product("...i,...o->io", x, dy)


bfloat16_product.defvjp(_forward, _backward)


def _product(subscripts: str, a: ArrayLike, b: ArrayLike) -> Array:
    out = jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
    return out.astype(jnp.bfloat16)

"""Linear layers of bfloat16 as fast as the hardware is: products on CPUs, sums on TPUs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from kernels import backends

SUBLANES = 8
"""Rows that a TPU's registers have; a product of fewer becomes sums again."""


class Linear(nnx.Linear):
    """`nnx.Linear`, whose bias has its gradient from a product on TPUs."""

    def __call__(self, x: Float[ArrayLike, "*b i"]) -> Float[Array, "*b o"]:
        if not self.use_bias or self.dtype != jnp.bfloat16 or backends.platform() != "tpu":
            return super().__call__(x)
        x, kernel = self.promote_dtype((x, self.kernel[...]), dtype=self.dtype)
        y = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        return add_bias(y, self.bias[...])


@jax.custom_vjp
def add_bias(y: Float[Array, "*b o"], bias: Float[Array, "o"]) -> Float[Array, "*b o"]:
    """y + bias, in the type of `y`.

    The gradient of `bias` is a product with ones: of bfloat16, a TPU's matrix unit sums exactly as
    much as its vector unit (float32) would, at four times the pace.
    """
    return y + bias.astype(y.dtype)


def _add_forward(y: Array, bias: Array) -> tuple[Array, Array]:
    return add_bias(y, bias), bias


def _add_backward(bias: Array, dy: Array) -> tuple[Array, Array]:
    over = tuple(range(dy.ndim - 1))
    ones = jnp.ones((SUBLANES, *dy.shape[:-1]), dy.dtype)
    sums = jax.lax.dot_general(
        ones,
        dy,
        ((tuple(axis + 1 for axis in over), over), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return dy, sums[0].astype(bias.dtype)


add_bias.defvjp(_add_forward, _add_backward)


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

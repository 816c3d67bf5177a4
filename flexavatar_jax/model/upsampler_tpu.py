"""The upsampler's main path on TPUs, where its maps between operations are bfloat16.

TPUs round what convolutions multiply to bfloat16 anyway. Here a map is rounded once, where it is
made, and so passes through memory at half the size; sums, filter and activation are float32. Their
convolutions know strides, so that the transposed one is one convolution, and so are its gradients.
The binomial filter is a Pallas kernel that reads its map once and writes it activated; on the way
back the same kernel is its own transpose.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flexavatar_jax.model.attention_tpu import TENSOR_AXIS, batch_axes

CLAMP = 256.0
LANES = 128
ROWS = 12 << 20
"""Bytes on chip that a program's rows may take: 16 MiB is what each TPU gives without asking."""
TAPS = 4
"""Of the binomial filter [1, 3, 3, 1] / 4."""

VECTOR_OPS = {"binomial": 20}
"""For an element that it makes (its cost estimate has these as transcendentals): four conversions,
eight for the filter, scale, bias, activation (5), rounding."""


def convolve_up(
    x: Float[ArrayLike, "B h w i"],
    kernel: Float[ArrayLike, "3 3 i o"],
    bias: Float[ArrayLike, "o"],
) -> Float[Array, "B 2*h 2*w o"]:
    """`upsampler.convolve_up` and `upsampler.activate` in one, in bfloat16.

    Within `jax.sharding.use_abstract_mesh` each device filters its own examples and channels.
    """
    spread = _spread(jnp.asarray(x, jnp.bfloat16), kernel)
    # So TPUs lay maps out for convolutions: examples and channels fill registers.
    spread = rearrange(spread, "b h w c -> h w b c")
    smooth, mesh = _smooth, jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        splits = spread.shape[-1] % mesh.shape.get(TENSOR_AXIS, 1) == 0
        channels = TENSOR_AXIS if splits and TENSOR_AXIS in mesh.axis_names else None
        maps = PartitionSpec(None, None, batch_axes(mesh), channels)
        smooth = jax.shard_map(
            smooth, in_specs=(maps, PartitionSpec(channels)), out_specs=maps, check_vma=False
        )
    return rearrange(smooth(spread, bias), "h w b c -> b h w c")


@jax.custom_vjp
def activate(x: Float[Array, "*b c"], bias: Float[Array, "c"]) -> Float[Array, "*b c"]:
    """`upsampler.activate`, in bfloat16; its result is all that is kept for the backward pass."""
    return _activated(x, bias).astype(jnp.bfloat16)


def _activate_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    y = activate(x, bias)
    return y, y


def _activate_backward(y: Array, dy: Array) -> tuple[Array, Array]:
    """Cotangents of what is activated, and of the bias, from the rounded result."""
    dx = dy.astype(jnp.float32) * jnp.where(y < 0, 0.2 * math.sqrt(2), math.sqrt(2))
    dx = jnp.where(jnp.abs(y) < CLAMP, dx, 0)
    return dx, jnp.sum(dx, axis=tuple(range(dx.ndim - 1)))


activate.defvjp(_activate_forward, _activate_backward)


def _activated(x: Array, bias: Array) -> Array:
    x = x + bias
    return jnp.clip(jnp.maximum(x, 0.2 * x) * math.sqrt(2), -CLAMP, CLAMP)


def pixel_shuffle(x: Float[Array, "B h w c"]) -> Float[Array, "B 2*h 2*w c//4"]:
    """`upsampler.pixel_shuffle`: a transposed convolution by a kernel of zeros and ones.

    That takes half of the time of moving channels about. TPUs multiply two bfloat16 parts of each
    value, which rounds it by 2^-17 at most.
    """
    kernel = np.eye(x.shape[-1], dtype=np.float32)
    kernel = rearrange(kernel, "i (o dy dx) -> dy dx i o", dy=2, dx=2)
    return jax.lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        (1, 1),
        ((1, 1), (1, 1)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGH,
    )


_convolution = functools.partial(jax.lax.conv_general_dilated, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _spread(
    x: Float[Array, "B h w i"], kernel: Float[ArrayLike, "3 3 i o"]
) -> Float[Array, "B 2*h+1 2*w+1 o"]:
    """The transposed convolution: x[i, j] @ kernel[a, b] is added to texel (2i + a, 2j + b)."""
    return _convolution(
        x,
        kernel[::-1, ::-1].astype(jnp.bfloat16),
        (1, 1),
        ((2, 2), (2, 2)),
        lhs_dilation=(2, 2),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).astype(jnp.bfloat16)


def _spread_forward(x: Array, kernel: ArrayLike) -> tuple[Array, tuple]:
    return _spread(x, kernel), (x, kernel)


def _spread_backward(residuals: tuple, dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dx = _convolution(
        dy,
        kernel.astype(jnp.bfloat16),
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWOI", "NHWC"),
    )
    dkernel = _convolution(
        dy,
        x,
        (1, 1),
        "VALID",
        rhs_dilation=(2, 2),
        dimension_numbers=("CHWN", "IHWO", "HWCN"),
    )
    return dx.astype(x.dtype), dkernel


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _smooth(x: Float[Array, "h w B c"], bias: Float[Array, "c"]) -> Float[Array, "h-1 w-1 B c"]:
    """The binomial filter of gain 4 with one texel of zero padding, then the activation."""
    return _binomial(x, bias, padding=1)


def _smooth_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    y = _smooth(x, bias)
    return y, y


def _smooth_backward(y: Array, dy: Array) -> tuple[Array, Array]:
    dx, dbias = _activate_backward(y, dy)
    return _binomial(dx.astype(jnp.bfloat16), None, padding=2), dbias


_smooth.defvjp(_smooth_forward, _smooth_backward)


def _binomial(
    x: Float[Array, "h w B c"], bias: Float[Array, "c"] | None, *, padding: int
) -> Float[Array, "H W B c"]:
    """[1, 3, 3, 1] / 4 along both axes of a map with zeros around it, and then the activation.

    Both axes grow by 2 * padding - 3. None for a bias: nothing is activated. Programs have some of
    the examples and channels, and go through the rows.
    """
    height, width, batch, channels = x.shape
    grown = 2 * padding - TAPS + 1
    out = jax.ShapeDtypeStruct((height + grown, width + grown, batch, channels), x.dtype)
    lanes = LANES if channels % LANES == 0 else channels
    # Rows on chip: those that the filter sees, and two each that come and go.
    most = max(ROWS // ((TAPS + 4) * (width + 4) * lanes * x.dtype.itemsize) // 8, 1) * 8
    examples = -(-batch // -(-batch // most))
    examples = batch if examples == batch else -(-examples // 8) * 8
    ahead = TAPS - 1 - padding
    # A texel as it lies on chip and in memory: in whole registers.
    texel = examples * pl.cdiv(batch, examples) * LANES * pl.cdiv(channels, LANES)
    made, read = (math.prod(a.shape[:2]) * texel for a in (out, x))
    return pl.pallas_call(
        functools.partial(_kernel, height=height, padding=padding, activated=bias is not None),
        grid=(pl.cdiv(batch, examples), pl.cdiv(channels, lanes), height + padding),
        in_specs=[
            pl.BlockSpec(
                (1, width, examples, lanes), lambda b, c, i: (jnp.minimum(i, height - 1), 0, b, c)
            ),
            pl.BlockSpec((1, lanes), lambda b, c, i: (0, c)),
        ],
        out_specs=pl.BlockSpec(
            (1, out.shape[1], examples, lanes),
            lambda b, c, i: (jnp.maximum(i - ahead, 0), 0, b, c),
        ),
        out_shape=out,
        scratch_shapes=[pltpu.VMEM((TAPS, width + 2 * padding, examples, lanes), x.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=made,
            bytes_accessed=(made + read) * x.dtype.itemsize,
        ),
        name="binomial",
    )(x, (jnp.zeros(channels) if bias is None else bias)[None])


def _kernel(x_ref, bias_ref, out_ref, rows, *, height, padding, activated):
    """Takes row i, and makes row i - 3 + `padding` of it and the three before."""
    width = x_ref.shape[1]
    i = pl.program_id(2)

    @pl.when(i == 0)
    def _():
        rows[...] = jnp.zeros_like(rows)

    @pl.when(i < height)
    def _():
        rows[i % TAPS, padding : padding + width] = x_ref[0]

    @pl.when(i >= height)
    def _():
        rows[i % TAPS] = jnp.zeros(rows.shape[1:], rows.dtype)

    def weigh(first, second, third, fourth):
        return (first + fourth) + 3 * (second + third)

    def column(j):
        return weigh(*[rows[(i + 1 + k) % TAPS, j].astype(jnp.float32) for k in range(TAPS)])

    def step(j, before):
        here = column(j + TAPS - 1)
        value = weigh(*before, here) * (1 / 16)
        if activated:
            value = _activated(value, bias_ref[...])
        out_ref[0, j] = value.astype(out_ref.dtype)
        return *before[1:], here

    jax.lax.fori_loop(0, out_ref.shape[1], step, tuple(map(column, range(TAPS - 1))))

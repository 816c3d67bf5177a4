"""Layer norms on TPUs: one Pallas kernel forward, one backward, each reading its arrays once.

XLA takes mean and variance in a pass each, and for their sake lays tokens out along lanes, so that
products and attention, which have features there, wait for transpositions.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flexavatar_jax.model.attention_tpu import batch_axes

ELEMENTS = 1 << 18
"""Of a program: several such arrays of float32 fit on chip."""

SUBLANES = 16
"""Tokens that fill a register of bfloat16; other numbers of them leave gaps."""

VECTOR_OPS = {"norm_forward": 11, "norm_backward": 25}
"""Of each kernel for an element (its cost estimate has these as transcendentals), two for each
conversion. Forward: two conversions, statistics (4), scaling (2), bias. Backward: four conversions,
statistics (4), what was normed, scaled gradient, its two means (3), what they leave (4), sum with
the other gradient, the gradients of scale and bias (3)."""


class Static(NamedTuple):
    """What a kernel is compiled for."""

    epsilon: float
    dtype: DTypeLike
    """Of what is normed."""
    beside: bool
    """The input is handed on, too, and its gradients are added up."""


def fits(x: Array) -> bool:
    """Whether the kernels take an array of this shape: tokens [B, N, D] without gaps."""
    return x.ndim == 3 and x.shape[1] % SUBLANES == 0


def layer_norm(
    x: Float[Array, "B N D"],
    scale: Float[Array, "D"] | None,
    bias: Float[Array, "D"] | None,
    *,
    epsilon: float,
    dtype: DTypeLike,
    beside: bool = False,
) -> tuple[Float[Array, "B N D"], ...]:
    """Tokens with mean 0 and variance 1, scaled and shifted; statistics in float32.

    Within `jax.sharding.use_abstract_mesh` each device norms its own examples.

    Args:
      scale, bias: None: one and zero.
      dtype: of what is normed.
      beside: `x` comes back as a second result. Whoever goes on with that one, as residuals do, has
        both its gradients added where the norm's is made.
    """
    static = Static(epsilon, jnp.dtype(dtype), beside)
    width = x.shape[-1]
    scale = jnp.ones(width) if scale is None else scale.astype(jnp.float32)
    bias = jnp.zeros(width) if bias is None else bias.astype(jnp.float32)
    norm, mesh = functools.partial(_norm, static), jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec, same = PartitionSpec(batch_axes(mesh)), PartitionSpec()
        norm = jax.shard_map(norm, in_specs=(spec, same, same), out_specs=spec, check_vma=False)
    return norm(x, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm(static, x, scale, bias):
    (y,) = _call(
        static,
        _forward_kernel,
        [x],
        [scale, bias],
        outputs=[jax.ShapeDtypeStruct(x.shape, static.dtype)],
        name="norm_forward",
    )
    return (y, x) if static.beside else (y,)


def _norm_forward(static, x, scale, bias):
    return _norm(static, x, scale, bias), (x, scale)


def _norm_backward(static, saved, cotangents):
    x, scale = saved
    parts = jax.ShapeDtypeStruct((len(x), x.shape[1] // _rows(x), 1, x.shape[2]), jnp.float32)
    dx, d_scale, d_bias = _call(
        static,
        _backward_kernel,
        [x, *cotangents],
        [scale],
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype), parts, parts],
        name="norm_backward",
    )
    return dx, jnp.sum(d_scale, axis=(0, 1, 2)), jnp.sum(d_bias, axis=(0, 1, 2))


_norm.defvjp(_norm_forward, _norm_backward)


def _rows(x):
    """Tokens of a program: as many as divide those of an example."""
    most = max(SUBLANES, min(ELEMENTS // x.shape[2], x.shape[1]) // SUBLANES * SUBLANES)
    return next(n for n in range(most, 0, -SUBLANES) if x.shape[1] % n == 0)


def _call(static, kernel, arrays, rows_alike, *, outputs, name):
    """Runs a kernel for all blocks of tokens; `rows_alike`: [D] for all of them."""
    batch, tokens, width = arrays[0].shape
    rows = _rows(arrays[0])

    def block(x):
        if x.ndim == 4:
            return pl.BlockSpec((1, 1, 1, width), lambda b, i: (b, i, 0, 0))
        return pl.BlockSpec((1, rows, width), lambda b, i: (b, i, 0))

    return pl.pallas_call(
        functools.partial(kernel, static.epsilon),
        grid=(batch, tokens // rows),
        in_specs=[
            *map(block, arrays),
            *[pl.BlockSpec((1, width), lambda b, i: (0, 0))] * len(rows_alike),
        ],
        out_specs=[block(x) for x in outputs],
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=0,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs)),
            transcendentals=arrays[0].size,
        ),
        name=name,
    )(*arrays, *(x[None] for x in rows_alike))


def _forward_kernel(epsilon, x_ref, scale_ref, bias_ref, y_ref):
    centred, inverse = _statistics(epsilon, x_ref)
    y = centred * inverse * scale_ref[...] + bias_ref[...]
    y_ref[0] = y.astype(y_ref.dtype)


def _backward_kernel(epsilon, x_ref, *refs):
    """Refs: x, dy, perhaps the other gradient of x, scale; dx, parts of d_scale and of d_bias."""
    dy_ref, *others, scale_ref, dx_ref, d_scale_ref, d_bias_ref = refs
    centred, inverse = _statistics(epsilon, x_ref)
    normed = centred * inverse
    dy = dy_ref[0].astype(jnp.float32)
    scaled = dy * scale_ref[...]
    mean, product = (jnp.mean(part, axis=1, keepdims=True) for part in (scaled, scaled * normed))
    dx = inverse * (scaled - mean - normed * product)
    for other in others:
        dx += other[0].astype(jnp.float32)
    dx_ref[0] = dx.astype(dx_ref.dtype)
    d_scale_ref[0, 0] = jnp.sum(dy * normed, axis=0, keepdims=True)
    d_bias_ref[0, 0] = jnp.sum(dy, axis=0, keepdims=True)


def _statistics(epsilon, x_ref):
    """Tokens less their mean, and 1 / their standard deviation."""
    x = x_ref[0].astype(jnp.float32)
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=1, keepdims=True)
    return centred, jax.lax.rsqrt(variance + epsilon)

"""Softmax attention on TPUs: one Pallas kernel forward, one backward; no logit leaves the chip.

Sequences are short (1024 tokens for FLEX-1), so that all keys of a head fit on chip beside a block
of queries: a row's softmax is taken at once, and the backward pass, which computes the logits anew,
keeps nothing of the forward pass. Arrays stay [B, N, H * C] as the projections around them have
them, with heads side by side; a program takes as many heads as fill whole registers of 128 lanes
(two of 192). Queries and keys are RMS-normalised within their heads on the way, where asked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from flexavatar_jax.model.attention_kernels import (
    LANES,
    Static,
    backward_kernel,
    forward_kernel,
    split,
)

VMEM = 48 << 20
"""Bytes on chip (v5e, v5p, v6e: 64 MiB and more) that a program may take."""

SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4")
"""With 16 MiB: half of the queries at a time there, and no copying while computing."""

TENSOR_AXIS = "tensor"
"""Mesh axis that splits heads; the other axes split the batch."""

ATTENDED = "attended"
"""Name by which rematerialisation knows what attention returned."""

VECTOR_OPS = {"attention_forward": 9, "attention_backward": 15}
"""Of each kernel for a logit: scale, maximum, difference, exponential (4), sum, rounding; backward
also two products, sum, difference, and scale and rounding of the gradient."""


class Norm(NamedTuple):
    """Scales of queries' and keys' RMS norms: [C] for the queries, one [C] for each set of keys."""

    queries: Float[Array, "C"]
    keys: tuple[Float[Array, "C"], ...]


def attend(
    q: Float[Array, "B N D"],
    k: Sequence[Float[Array, "B _ D"]],
    v: Sequence[Float[Array, "B _ D"]],
    norm: Norm | None,
    *,
    heads: int,
    epsilon: float = 1e-6,
) -> Float[Array, "B N D"]:
    """Softmax attention with scale 1/sqrt(C) over all of several sets of keys and values.

    Within `jax.sharding.use_abstract_mesh` each device attends for its own examples and heads.
    Logits, softmax and norms are computed in float32; products take and weights are rounded to the
    type of the arrays. Differentiable in all arrays.

    Args:
      norm: of queries and keys within each head; None: they are taken as they are.
      heads: D = heads * C.
    """
    mesh = jax.sharding.get_abstract_mesh()
    small = on_small_chip()
    width = q.shape[-1] // heads

    def own(q, k, v, norm):
        here = q.shape[-1] // width
        lengths = tuple(x.shape[1] for x in k)
        static = Static(
            _heads_together(here, width),
            width,
            lengths,
            epsilon if norm else 0.0,
            small,
        )
        scales = [norm.queries, *norm.keys] if norm else [jnp.ones(width)] * (1 + len(k))
        scales = tuple(jnp.tile(x.astype(jnp.float32), static.heads)[None] for x in scales)
        queries = _pad(q, min(static.queries, -(-q.shape[1] // LANES) * LANES))
        keys, values = (tuple(_pad(x, LANES) for x in xs) for xs in (k, v))
        return _attend(static, queries, keys, values, scales)[:, : q.shape[1]]

    arrays = (q, tuple(k), tuple(v))
    if mesh.empty:
        return own(*arrays, norm)
    splits = heads % mesh.shape.get(TENSOR_AXIS, 1) == 0
    spec = PartitionSpec(batch_axes(mesh), None, TENSOR_AXIS if splits else None)
    return jax.shard_map(
        own, in_specs=(spec, spec, spec, PartitionSpec()), out_specs=spec, check_vma=False
    )(*arrays, norm)


def on_small_chip() -> bool:
    """Whether what is traced is for one of `SMALL_CHIPS`."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return device.device_kind.startswith(SMALL_CHIPS)


def batch_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """The axes of a mesh that split examples: all but the one that splits heads and channels."""
    return tuple(axis for axis in mesh.axis_names if axis != TENSOR_AXIS)


@jax.custom_vjp
def kept(attended: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
    """`attended`, which rematerialisation can keep, by name.

    The backward pass has no use for it, so that nothing of attention is computed again then. What
    is kept is its bits: JAX rounds kept floating-point numbers once more, in a pass of its own.
    """
    return _named(attended)


def _named(attended):
    bits = jax.lax.bitcast_convert_type(attended, f"uint{8 * attended.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, ATTENDED), attended.dtype)


# Forward not by `kept` itself: names within a custom_vjp are hidden.
kept.defvjp(lambda attended: (_named(attended), None), lambda _, cotangent: (cotangent,))


def _heads_together(heads: int, width: int) -> int:
    """Heads of one program: the fewest that fill whole registers, or all."""
    fewest = LANES // math.gcd(LANES, width)
    return fewest if heads % fewest == 0 else heads


def _pad(x: Float[Array, "B N D"], multiple: int) -> Float[Array, "B n D"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, scales):
    return _call(static, forward_kernel, [q, *k, *v], scales, like=[q])[0]


def _attend_forward(static, q, k, v, scales):
    return _attend(static, q, k, v, scales), (q, k, v, scales)


def _attend_backward(static, saved, cotangent):
    q, k, v, scales = saved
    sets = len(k)
    arrays = [q, *k, *v]
    results = _call(
        static, backward_kernel, [*arrays, cotangent], scales, like=arrays, backward=True
    )
    dq, dk, dv, d_scales = split(results, 1, sets, sets, len(scales))
    return dq[0], tuple(dk), tuple(dv), tuple(jnp.sum(x, axis=(0, 1)) for x in d_scales)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(static, kernel, arrays, scales, *, like, backward=False):
    """Runs a kernel for every example and group of heads; returns arrays as those of `like`.

    It sees its own lanes of `arrays`, whole sequences of them, and all of `scales`. The backward
    one also returns its share of each scale's gradient, [B, groups, 1, lanes].
    """
    batch, queries, features = arrays[0].shape
    groups, sets = features // static.lanes, len(static.lengths)

    def block(x):
        mode = pl.Buffered(1) if static.small else None
        shape = (1, x.shape[1], static.lanes)
        return pl.BlockSpec(shape, lambda b, g: (b, 0, g), pipeline_mode=mode)

    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like]
    out_specs, scratch = [block(x) for x in like], []
    if backward:
        outputs += [jax.ShapeDtypeStruct((batch, groups, 1, static.lanes), jnp.float32)] * len(
            scales
        )
        out_specs += [pl.BlockSpec((1, 1, 1, static.lanes), lambda b, g: (b, g, 0, 0))] * len(
            scales
        )
        scratch = [pltpu.VMEM((x.shape[1], static.lanes), jnp.float32) for x in like[1:]]
    keys = sum(x.shape[1] for x in arrays[1 : 1 + sets])
    lanes = sum(static.window(h).stop - static.window(h).start for h in range(static.heads))
    return pl.pallas_call(
        functools.partial(kernel, static),
        grid=(batch, groups),
        in_specs=[
            *map(block, arrays),
            *[pl.BlockSpec((1, static.lanes), lambda b, g: (0, 0))] * len(scales),
        ],
        out_specs=out_specs,
        out_shape=outputs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=None if static.small else VMEM,
        ),
        # What the matrix unit does with padded heads and keys; logits are exponentials.
        cost_estimate=pl.CostEstimate(
            flops=2 * (5 if backward else 2) * batch * groups * queries * keys * lanes,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outputs)),
            transcendentals=batch * groups * static.heads * queries * keys,
        ),
        name=f"attention_{'backward' if backward else 'forward'}",
    )(*arrays, *scales)

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
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

LANES = 128
QUERIES = 256
"""Queries at a time: their logits are 256 by some thousand numbers."""

VMEM = 48 << 20
"""Bytes on chip (v5e, v5p, v6e: 64 MiB and more) that a program may take."""

SMALL_CHIPS = ("TPU v2", "TPU v3", "TPU v4")
"""With 16 MiB: half of the queries at a time there, and no copying while computing."""

TENSOR_AXIS = "tensor"
"""Mesh axis that splits heads; the other axes split the batch."""

NOBODY = -1e30
"""Logit of a key that is padding. Not -inf, whose differences are NaN."""

VECTOR_OPS = {"attention_forward": 9, "attention_backward": 15}
"""Of each kernel for a logit: scale, maximum, difference, exponential (4), sum, rounding; backward
also two products, sum, difference, and scale and rounding of the gradient."""


class Norm(NamedTuple):
    """Scales of queries' and keys' RMS norms: [C] for the queries, one [C] for each set of keys."""

    queries: Float[Array, "C"]
    keys: tuple[Float[Array, "C"], ...]


class _Static(NamedTuple):
    """What a kernel is compiled for."""

    heads: int
    """In a program."""
    width: int
    """Of a head, C."""
    lengths: tuple[int, ...]
    """Keys of each set, without padding."""
    epsilon: float
    """Of the norms; 0: none."""
    small: bool
    """Chip."""

    @property
    def lanes(self) -> int:
        return self.heads * self.width

    @property
    def queries(self) -> int:
        return QUERIES // 2 if self.small else QUERIES


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
    kind = (mesh.abstract_device or jax.devices()[0]).device_kind
    width = q.shape[-1] // heads

    def own(q, k, v, norm):
        here = q.shape[-1] // width
        lengths = tuple(x.shape[1] for x in k)
        static = _Static(
            _heads_together(here, width),
            width,
            lengths,
            epsilon if norm else 0.0,
            kind.startswith(SMALL_CHIPS),
        )
        scales = [norm.queries, *norm.keys] if norm else [jnp.ones(width)] * (1 + len(k))
        scales = tuple(jnp.tile(x.astype(jnp.float32), static.heads)[None] for x in scales)
        queries = _pad(q, min(static.queries, -(-q.shape[1] // LANES) * LANES))
        keys, values = (tuple(_pad(x, LANES) for x in xs) for xs in (k, v))
        return _attend(static, queries, keys, values, scales)[:, : q.shape[1]]

    arrays = (q, tuple(k), tuple(v))
    if mesh.empty:
        return own(*arrays, norm)
    split = heads % mesh.shape.get(TENSOR_AXIS, 1) == 0
    batch = tuple(axis for axis in mesh.axis_names if axis != TENSOR_AXIS)
    spec = PartitionSpec(batch, None, TENSOR_AXIS if split else None)
    return jax.shard_map(
        own, in_specs=(spec, spec, spec, PartitionSpec()), out_specs=spec, check_vma=False
    )(*arrays, norm)


def _heads_together(heads: int, width: int) -> int:
    """Heads of one program: the fewest that fill whole registers, or all."""
    fewest = LANES // math.gcd(LANES, width)
    return fewest if heads % fewest == 0 else heads


def _pad(x: Float[Array, "B N D"], multiple: int) -> Float[Array, "B n D"]:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, scales):
    return _call(static, _forward_kernel, [q, *k, *v], scales, like=[q])[0]


def _attend_forward(static, q, k, v, scales):
    return _attend(static, q, k, v, scales), (q, k, v, scales)


def _attend_backward(static, saved, cotangent):
    q, k, v, scales = saved
    sets = len(k)
    arrays = [q, *k, *v]
    results = _call(
        static, _backward_kernel, [*arrays, cotangent], scales, like=arrays, backward=True
    )
    dq, dk, dv, d_scales = _split(results, 1, sets, sets, len(scales))
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
    lanes = sum(_window(static, h).stop - _window(static, h).start for h in range(static.heads))
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


def _forward_kernel(static, *refs):
    sets = len(static.lengths)
    (q_ref,), k_refs, v_refs, scales, (out_ref,) = _split(refs, 1, sets, sets, 1 + sets, 1)
    heads = range(static.heads)
    keys, values = _heads_of(static, k_refs, v_refs, scales[1:])

    def block(rows):
        out = jnp.zeros((rows.size, static.lanes), jnp.float32)
        for h in heads:
            q, _ = _normed(static, h, q_ref[0, rows, :], scales[0])
            weights, total = _softmax(static, [_dot(q, k, 1, 1) for k in keys[h]], axis=1)
            one = sum(
                _dot(w.astype(q.dtype), v, 1, 0) for w, v in zip(weights, values[h], strict=True)
            )
            out += _spread(static, h, one / total)
        out_ref[0, rows, :] = out.astype(out_ref.dtype)

    _for_blocks(q_ref.shape[1], static.queries, block)


def _backward_kernel(static, *refs):
    """Logits are [keys, queries] here: of all products one alone then needs a transposition."""
    sets = len(static.lengths)
    (q_ref,), k_refs, v_refs, (cotangent,), scales, *rest = _split(
        refs, 1, sets, sets, 1, 1 + sets, 1, sets, sets, 1 + sets, sets, sets
    )
    (dq_ref,), dk_refs, dv_refs, d_scales, dk_sums, dv_sums = rest
    heads = range(static.heads)
    keys, values = _heads_of(static, k_refs, v_refs, scales[1:])
    for ref in (*dk_sums, *dv_sums, d_scales[0]):
        ref[...] = jnp.zeros_like(ref)

    def block(rows):
        dq = jnp.zeros((rows.size, static.lanes), jnp.float32)
        for h in heads:
            window = _window(static, h)
            q, inverse = _normed(static, h, q_ref[0, rows, :], scales[0])
            d_out = _own(static, h, cotangent[0, rows, :])
            weights, total = _softmax(static, [_dot(k, q, 1, 1) for k in keys[h]], axis=0)
            weights = [w / total for w in weights]
            d_weights = [_dot(v, d_out, 1, 1) for v in values[h]]
            pairs = zip(weights, d_weights, strict=True)
            mean = sum(jnp.sum(w * d, axis=0, keepdims=True) for w, d in pairs)
            one = 0.0
            for i in range(sets):
                d_logits = weights[i] * (d_weights[i] - mean) * static.width**-0.5
                d_logits = d_logits.astype(q.dtype)
                dv_sums[i][:, window] += _dot(weights[i].astype(q.dtype), d_out, 1, 0)
                dk_sums[i][:, window] += _dot(d_logits, q, 1, 0)
                one += _dot(d_logits, keys[h][i], 0, 0)
            one, d_scale = _norm_gradient(static, h, q_ref[0, rows, :], scales[0], inverse, one)
            dq += _spread(static, h, one)
            d_scales[0][0, 0, :, window] += d_scale
        dq_ref[0, rows, :] = dq.astype(dq_ref.dtype)

    _for_blocks(q_ref.shape[1], static.queries, block)
    for i in range(sets):
        dk = jnp.zeros(dk_sums[i].shape, jnp.float32)
        d_scale = jnp.zeros((1, static.lanes), jnp.float32)
        for h in heads:
            k = k_refs[i][0]
            _, inverse = _normed(static, h, k, scales[1 + i])
            total = _own(static, h, dk_sums[i][...])
            one, d_one = _norm_gradient(static, h, k, scales[1 + i], inverse, total)
            dk += _spread(static, h, one)
            d_scale += _spread(static, h, d_one)
        dk_refs[i][0] = dk.astype(dk_refs[i].dtype)
        dv_refs[i][0] = dv_sums[i][...].astype(dv_refs[i].dtype)
        d_scales[1 + i][0, 0] = d_scale


def _heads_of(static, k_refs, v_refs, scales):
    """Normed keys and values of all sets, for each head."""
    heads, sets = range(static.heads), range(len(k_refs))
    keys = [[_normed(static, h, k_refs[i][0], scales[i])[0] for i in sets] for h in heads]
    return keys, [[_own(static, h, v_refs[i][0]) for i in sets] for h in heads]


def _for_blocks(count, step, body):
    """`body` for the rows of each block of queries."""
    step = min(step, count)

    @pl.loop(0, count // step)
    def _(i):
        body(pl.ds(i * step, step))


def _softmax(static, products, axis):
    """Weights of each set of keys before they are divided by their sum, and the sum."""
    logits = []
    for product, length in zip(products, static.lengths, strict=True):
        x = product * static.width**-0.5
        if length < x.shape[axis]:
            key = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
            x = jnp.where(key < length, x, NOBODY)
        logits.append(x)
    top = functools.reduce(jnp.maximum, (jnp.max(x, axis, keepdims=True) for x in logits))
    weights = [jnp.exp(x - top) for x in logits]
    return weights, sum(jnp.sum(x, axis, keepdims=True) for x in weights)


def _window(static, head):
    """Whole registers that hold a head."""
    start = head * static.width // LANES * LANES
    end = -(-(head + 1) * static.width // LANES) * LANES
    return slice(start, min(end, static.lanes))


def _own(static, head, x):
    """The window of a head, and zeros where it holds lanes of another."""
    window = _window(static, head)
    x = x[:, window]
    lane = window.start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = (lane >= head * static.width) & (lane < (head + 1) * static.width)
    return jnp.where(mine, x, jnp.zeros_like(x))


def _spread(static, head, x):
    """A head's window among zeros for all other lanes."""
    window = _window(static, head)
    sides = (window.start, static.lanes - window.stop)
    before, after = (jnp.zeros((len(x), n), x.dtype) for n in sides)
    return jnp.concatenate([part for part in (before, x, after) if part.shape[1]], axis=1)


def _normed(static, head, x, scale):
    """A head's window of queries or keys after their norm; 1 / the root mean square of each."""
    own = _own(static, head, x)
    if not static.epsilon:
        return own, None
    wide = own.astype(jnp.float32)
    mean = jnp.sum(wide * wide, axis=1, keepdims=True) / static.width
    inverse = jax.lax.rsqrt(mean + static.epsilon)
    return (wide * inverse * scale[:, _window(static, head)]).astype(x.dtype), inverse


def _norm_gradient(static, head, x, scale, inverse, gradient):
    """Gradients in what `_normed` took and in its scale, from that of what it gave."""
    if not static.epsilon:
        return gradient, jnp.zeros((1, gradient.shape[1]), jnp.float32)
    wide = _own(static, head, x).astype(jnp.float32) * inverse
    scaled = gradient * scale[:, _window(static, head)]
    mean = jnp.sum(wide * scaled, axis=1, keepdims=True) / static.width
    return inverse * (scaled - wide * mean), jnp.sum(gradient * wide, axis=0, keepdims=True)


def _dot(a, b, a_axis, b_axis):
    """Products summed over an axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _split(items, *counts):
    """Neighbours in groups of `counts`."""
    items = iter(items)
    return [[next(items) for _ in range(count)] for count in counts]

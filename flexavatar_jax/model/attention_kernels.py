"""The kernels of `attention_tpu`, for one example and the heads of one program.

Refs hold whole sequences [1, N, lanes], heads side by side. A head is worked on in its *window*,
the whole registers that hold it, with zeros in the lanes of its neighbours: no lane ever moves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
QUERIES = 256
"""Queries at a time: their logits are 256 by some thousand numbers."""

NOBODY = -1e30
"""Logit of a key that is padding. Not -inf, whose differences are NaN."""


class Static(NamedTuple):
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

    def window(self, head: int) -> slice:
        """Whole registers that hold a head."""
        start = head * self.width // LANES * LANES
        end = -(-(head + 1) * self.width // LANES) * LANES
        return slice(start, min(end, self.lanes))


def forward_kernel(static: Static, *refs) -> None:
    """Refs: q, each k, each v, each scale [1, lanes], and what is written: attended."""
    sets = len(static.lengths)
    (q_ref,), k_refs, v_refs, scales, (out_ref,) = split(refs, 1, sets, sets, 1 + sets, 1)
    heads = range(static.heads)
    keys, values = _heads_of(static, k_refs, v_refs, scales[1:])

    def block(rows):
        out = jnp.zeros((rows.size, static.lanes), jnp.float32)
        for h in heads:
            q, _ = _normed(static, h, q_ref[0, rows, :], scales[0])
            weights, total = _softmax(static, [dot(q, k, 1, 1) for k in keys[h]], axis=1)
            one = sum(
                dot(w.astype(q.dtype), v, 1, 0) for w, v in zip(weights, values[h], strict=True)
            )
            out += _spread(static, h, one / total)
        out_ref[0, rows, :] = out.astype(out_ref.dtype)

    _for_blocks(q_ref.shape[1], static.queries, block)


def backward_kernel(static: Static, *refs) -> None:
    """Refs: q, each k, each v, cotangent, each scale; written: dq, each dk, each dv, each dscale;
    sums of each dk and dv in float32.

    Logits are [keys, queries] here: of all products one alone then needs a transposition.
    """
    sets = len(static.lengths)
    (q_ref,), k_refs, v_refs, (cotangent,), scales, *rest = split(
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
            window = static.window(h)
            q, inverse = _normed(static, h, q_ref[0, rows, :], scales[0])
            d_out = _own(static, h, cotangent[0, rows, :])
            weights, total = _softmax(static, [dot(k, q, 1, 1) for k in keys[h]], axis=0)
            weights = [w / total for w in weights]
            d_weights = [dot(v, d_out, 1, 1) for v in values[h]]
            pairs = zip(weights, d_weights, strict=True)
            mean = sum(jnp.sum(w * d, axis=0, keepdims=True) for w, d in pairs)
            one = 0.0
            for i in range(sets):
                d_logits = weights[i] * (d_weights[i] - mean) * static.width**-0.5
                d_logits = d_logits.astype(q.dtype)
                dv_sums[i][:, window] += dot(weights[i].astype(q.dtype), d_out, 1, 0)
                dk_sums[i][:, window] += dot(d_logits, q, 1, 0)
                one += dot(d_logits, keys[h][i], 0, 0)
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


def _own(static, head, x):
    """The window of a head, and zeros where it holds lanes of another."""
    window = static.window(head)
    x = x[:, window]
    lane = window.start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    mine = (lane >= head * static.width) & (lane < (head + 1) * static.width)
    return jnp.where(mine, x, jnp.zeros_like(x))


def _spread(static, head, x):
    """A head's window among zeros for all other lanes."""
    window = static.window(head)
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
    return (wide * inverse * scale[:, static.window(head)]).astype(x.dtype), inverse


def _norm_gradient(static, head, x, scale, inverse, gradient):
    """Gradients in what `_normed` took and in its scale, from that of what it gave."""
    if not static.epsilon:
        return gradient, jnp.zeros((1, gradient.shape[1]), jnp.float32)
    wide = _own(static, head, x).astype(jnp.float32) * inverse
    scaled = gradient * scale[:, static.window(head)]
    mean = jnp.sum(wide * scaled, axis=1, keepdims=True) / static.width
    return inverse * (scaled - wide * mean), jnp.sum(gradient * wide, axis=0, keepdims=True)


def dot(a, b, a_axis, b_axis):
    """Products summed over an axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def split(items, *counts):
    """Neighbours in groups of `counts`."""
    items = iter(items)
    return [[next(items) for _ in range(count)] for count in counts]

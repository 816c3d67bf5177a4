"""The kernels of `block_tpu`, for the rows of one program and one layer.

A program has rows of tokens; in a block that pools, four *sets* of them, row by row what pools to
one token. Of several layers, each finds its tokens where the one before has left them. Queries,
keys and values lie in whole registers of 128 lanes (`block_tpu` pads narrower heads), so that no
lane ever moves; where several heads share a register, each is worked on among zeros for its
neighbours.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flexavatar_jax.frozen.block_functions import (
    back,
    gelu,
    gelu_slope,
    linear,
    norm,
    norm_back,
    pool,
    pool_back,
)
from flexavatar_jax.frozen.block_layout import Static, Tokens, for_rows
from flexavatar_jax.model.attention_kernels import LANES, NOBODY, dot

SUBLANES = 8


def forward_kernel(static: Static, tree: Any, *refs) -> None:
    """Refs: x, mask [sets, rows, 1] (if any) and weights as `tree` has them; written: tokens; for
    the backward pass tokens between attention and MLP [rows, D], what was attended [rows, lanes],
    logarithms of the softmax's sums [rows, heads], and, of several layers, what went in; queries,
    keys and values."""
    (x_ref, mask_ref, weights), written = _unpack(tree, refs, 8 if static.layers > 1 else 7)
    out_ref, middle_ref, attended, sums, *inputs, q_ref, k_ref, v_ref = written
    count, dtype = q_ref.shape[0], q_ref.dtype
    x, out = Tokens(x_ref, static.x), Tokens(out_ref, static.out)
    if inputs:
        x = _carried(static, x, out)
        _copy(static, x, Tokens(inputs[0], static.x))
    _project(static, x, mask_ref, weights, q_ref, k_ref, v_ref, middle_ref)

    def attend(queries, keys, register):
        lanes = _lanes(static, register)
        q = q_ref[queries, lanes]
        out = jnp.zeros(q.shape, jnp.float32)
        for h in static.heads_of(register):
            logits = _logits(static, h, q, k_ref, queries, keys, lanes, axis=1)
            parts, top, total = _exponentials(logits)
            one = sum(
                dot(part.astype(q.dtype), v_ref[s, keys, lanes], 1, 0)
                for s, part in enumerate(parts)
            )
            out += _own(static, h, one / total)
            sums[queries, h : h + 1] = top + jnp.log(total)
        attended[queries, lanes] = out.astype(q.dtype)

    for registers in static.groups:
        _for_spans(static, count, functools.partial(_each, attend, registers))

    def finish(rows):
        skip = middle_ref[rows, :].astype(jnp.float32) if weights.skip else x[0, rows]
        middle = skip + linear(attended[rows, :], weights.out)
        middle_ref[rows, :] = middle.astype(dtype)
        normed, _, _ = norm(middle, weights.norm2)
        hidden = gelu(linear(normed.astype(dtype), weights.mlp_in))
        out[0, rows] = middle + linear(hidden.astype(dtype), weights.mlp_out)

    for_rows(count, static.rows, finish)


def backward_kernel(static: Static, tree: Any, *refs) -> None:
    """Refs: x, mask and weights as forward, what it wrote for this, and the cotangent; written: dx
    as x; queries, keys and values, whose place their gradients take, the gradients of
    what was attended and of the tokens in between, and of a span's keys and values.

    Logits are [keys, queries] here: of all products one alone then needs a transposition. As the
    softmax's sums are known, nothing waits for a whole row of them.
    """
    inputs, written = _unpack(tree, refs, 8)
    x_ref, mask_ref, weights, middle_ref, attended, sums, dy_ref = inputs
    dx_ref, q_ref, k_ref, v_ref, d_attended, d_middle, dk_sum, dv_sum = written
    count, dtype = q_ref.shape[0], q_ref.dtype
    x, dx, dy = Tokens(x_ref, static.x), Tokens(dx_ref, static.x), Tokens(dy_ref, static.out)
    if static.layers > 1:
        dy = _carried(static, dy, dx)
    _project(static, x, mask_ref, weights, q_ref, k_ref, v_ref)

    def through_mlp(rows):
        gradient = dy[0, rows]
        normed, standard, inverse = norm(middle_ref[rows, :], weights.norm2)
        z = linear(normed.astype(dtype), weights.mlp_in)
        d_hidden = back(gradient.astype(dtype), weights.mlp_out) * gelu_slope(z)
        d_normed = back(d_hidden.astype(dtype), weights.mlp_in)
        gradient += norm_back(d_normed, weights.norm2, standard, inverse)
        d_middle[rows, :] = gradient
        d_attended[rows, :] = back(gradient.astype(dtype), weights.out).astype(dtype)

    for_rows(count, static.rows, through_mlp)

    def attend(queries, keys, register, first):
        lanes, place = _lanes(static, register), _lanes(static, register - first)
        q, d_out = q_ref[queries, lanes], d_attended[queries, lanes]
        heads = static.heads_of(register)
        logarithms = _as_rows(sums[queries, :], [range(h, h + 1) for h in heads], q.dtype)
        products = attended[queries, lanes].astype(jnp.float32) * d_out.astype(jnp.float32)
        means = _as_rows(products, [_within(static, h) for h in heads], q.dtype)
        dq = jnp.zeros(q.shape, jnp.float32)
        for h, logarithm, mean in zip(heads, logarithms, means, strict=True):
            own_q, own_d = _own(static, h, q), _own(static, h, d_out)
            logits = _logits(static, h, q, k_ref, queries, keys, lanes, axis=0)
            one = 0.0
            for s, x in enumerate(logits):
                part = jnp.exp(x - logarithm)
                d_part = dot(v_ref[s, keys, lanes], own_d, 1, 1)
                d_logits = (part * (d_part - mean)).astype(q.dtype)
                dv_sum[s, :, place] += dot(part.astype(q.dtype), own_d, 1, 0)
                dk_sum[s, :, place] += dot(d_logits, own_q, 1, 0)
                one += dot(d_logits, k_ref[s, keys, lanes], 0, 0)
            dq += _own(static, h, one)
        q_ref[queries, lanes] = (dq * static.scale).astype(q.dtype)

    def begin(_):
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def end(keys, registers):
        for i, register in enumerate(registers):
            lanes, place = _lanes(static, register), _lanes(static, i)
            k_ref[:, keys, lanes] = dk_sum[:, :, place].astype(k_ref.dtype)
            v_ref[:, keys, lanes] = dv_sum[:, :, place].astype(v_ref.dtype)

    for registers in static.groups:
        here = functools.partial(attend, first=registers.start)
        here = functools.partial(_each, here, registers)
        _for_spans(static, count, here, begin, functools.partial(end, registers=registers))

    def finish(rows):
        mask = mask_ref[:, rows, :] if static.masked else None
        norms = [norm(x[s, rows], weights.norm1) for s in range(static.sets)]
        gradient, dq, d_skip = d_middle[rows, :], [q_ref[rows, :]], []
        if weights.skip:
            normed = [n.astype(dtype) for n, _, _ in norms]
            d_skip = pool_back([linear(n, weights.skip) for n in normed], gradient)
            if mask is not None:
                normed = [n * mask[s].astype(dtype) for s, n in enumerate(normed)]
            queries = [linear(n, weights.q) for n in normed]
            dq = pool_back(queries, dq[0].astype(jnp.float32))
        for s, (_, standard, inverse) in enumerate(norms):
            d_normed = back(dq[s].astype(dtype), weights.q)
            d_normed += back(k_ref[s, rows, :], weights.k) + back(v_ref[s, rows, :], weights.v)
            if mask is not None:
                d_normed *= mask[s]
            if weights.skip:
                d_normed += back(d_skip[s].astype(dtype), weights.skip)
            one = norm_back(d_normed, weights.norm1, standard, inverse)
            dx[s, rows] = one if weights.skip else one + gradient

    for_rows(count, static.rows, finish)


def _unpack(tree, refs, written):
    """What comes in, as `tree` has it, and what is written."""
    return jax.tree.unflatten(tree, refs[:-written]), refs[-written:]


def _carried(static, first, tokens):
    """`tokens`, where one layer leaves them for the next, and `first` for the first one."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        _copy(static, first, tokens)

    return tokens


def _copy(static, source, target):
    def copy(rows):
        target[0, rows] = source[0, rows]

    for_rows(static.program, static.rows, copy)


def _project(static, x, mask_ref, weights, q_ref, k_ref, v_ref, skip_ref=None):
    """Queries, scaled and pooled, keys and values of all rows; of a pooled block what is added to
    what was attended, if anybody asks."""
    dtype = q_ref.dtype

    def project(rows):
        queries, skips = [], []
        for s in range(static.sets):
            normed, _, _ = norm(x[s, rows], weights.norm1)
            if weights.skip and skip_ref is not None:
                skips.append(linear(normed.astype(dtype), weights.skip))
            if static.masked:
                normed *= mask_ref[s, rows, :]
            normed = normed.astype(dtype)
            queries.append(linear(normed, weights.q))
            k_ref[s, rows, :] = linear(normed, weights.k).astype(dtype)
            v_ref[s, rows, :] = linear(normed, weights.v).astype(dtype)
        q_ref[rows, :] = (pool(*queries) * static.scale).astype(dtype)
        if skips:
            skip_ref[rows, :] = pool(*skips).astype(dtype)

    for_rows(static.program, static.rows, project)


def _logits(static, head, q, k_ref, queries, keys, lanes, *, axis):
    """Of a head, for each set of keys, which lie along `axis`; what isn't attended to is NOBODY."""
    q = _own(static, head, q)
    logits = []
    for s in range(static.sets):
        k = k_ref[s, keys, lanes]
        x = dot(q, k, 1, 1) if axis else dot(k, q, 1, 1)
        key = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
        heard = None
        if static.apart:
            query = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1 - axis)
            query += queries.start - keys.start
            heard = ((key ^ query) & static.apart) == 0
        if static.length < static.window:
            several = static.window < static.span
            exists = (key & (static.window - 1) if several else key) < static.length
            heard = exists if heard is None else heard & exists
        logits.append(x if heard is None else jnp.where(heard, x, NOBODY))
    return logits


def _exponentials(logits):
    """Weights before they are divided by their sum, the largest logit, and the sum; of each row."""
    top = functools.reduce(jnp.maximum, (jnp.max(x, 1, keepdims=True) for x in logits))
    parts = [jnp.exp(x - top) for x in logits]
    return parts, top, sum(jnp.sum(x, 1, keepdims=True) for x in parts)


def _within(static, head):
    """Lanes of a head in its register."""
    first = head % (static.register // static.width) * static.width
    return range(first, first + static.width)


def _own(static, head, x):
    """Lanes of a head among zeros for the other heads of the register."""
    if static.width >= LANES:
        return x
    mine = _within(static, head)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= mine.start) & (lane < mine.stop), x, jnp.zeros_like(x))


def _as_rows(x, groups, dtype):
    """Sums over each group of lanes as rows [1, len(x)], by a product: columns turn into rows.

    Of `dtype`, as many are multiplied as hold 16 bits of each number.
    """
    shape = (-(-len(groups) // SUBLANES) * SUBLANES, x.shape[1])
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    chosen = functools.reduce(
        jnp.logical_or,
        ((row == i) & (lane >= g.start) & (lane < g.stop) for i, g in enumerate(groups)),
    )
    chosen, upper = chosen.astype(dtype), x.astype(dtype)
    rows = dot(chosen, upper, 1, 1)
    if upper.dtype != x.dtype:
        rows += dot(chosen, (x - upper.astype(x.dtype)).astype(dtype), 1, 1)
    return [rows[i : i + 1] for i in range(len(groups))]


def _each(attend, registers, queries, keys):
    for register in registers:
        attend(queries, keys, register)


def _lanes(static, register):
    return slice(register * static.register, (register + 1) * static.register)


def _for_spans(static, count, body, begin=None, end=None):
    """`body` for some queries and the keys of their span at a time; `begin` and `end` before and
    after each span."""
    step = static.queries

    def one(keys):
        if begin:
            begin(keys)

        @pl.loop(0, static.span // step)
        def _(i):
            body(
                pl.ds(pl.multiple_of(keys.start + i * step, math.gcd(keys.size, step)), step), keys
            )

        if end:
            end(keys)

    for_rows(count, static.span, one)

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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from flexavatar_jax.model.attention_kernels import LANES, NOBODY, dot

SUBLANES = 8

TOGETHER = 1024
"""Keys and registers, one times the other, that are worked on in one go."""

EPSILON = 1e-6
"""Of both norms."""


class View(NamedTuple):
    """How a program's rows lie in an array [*dims, C]."""

    dims: tuple[int, ...]
    roles: str
    """Of each dimension: "s" tells sets apart, "n" counts groups of rows, "." is within a group."""

    @property
    def group(self) -> int:
        """Rows that lie together."""
        return math.prod(n for n, role in zip(self.dims, self.roles, strict=True) if role == ".")

    def place(self, s: int, n: Any) -> tuple[Any, ...]:
        """Where group n of set s is."""
        index = []
        for size, role in zip(self.dims[::-1], self.roles[::-1], strict=True):
            index.append({"n": n, ".": slice(None), "s": s % size}[role])
            s = s // size if role == "s" else s
        return (*index[::-1], slice(None))


class Static(NamedTuple):
    """What a kernel is compiled for."""

    heads: int
    width: int
    """Lanes of a head: of `LANES` a divisor or a multiple."""
    scale: float
    """Of logits."""
    sets: int
    """1, or 4 in a block that pools."""
    x: View
    """Of what goes in."""
    out: View
    span: int
    """Neighbouring rows of a set that are attended to together."""
    apart: int
    """Bits of a row's number in which those that don't attend to one another differ."""
    window: int
    """Rows of a window; a power of two, where there are several in a span."""
    length: int
    """Of those, the ones that hold tokens; the last ones are padding."""
    queries: int
    """Rows whose logits are on the chip at a time."""
    program: int
    """Rows of a program."""
    rows: int
    """Rows that are multiplied by weights at a time: whole groups of both views."""
    masked: bool
    """Some tokens count as zero in attention."""
    layers: int
    """Alike, one after the other; a block that pools comes alone."""

    @property
    def lanes(self) -> int:
        """Of all queries."""
        return -(-self.heads * self.width // LANES) * LANES

    @property
    def register(self) -> int:
        """Lanes that are worked on together: whole heads in whole registers."""
        return max(self.width, LANES)

    @property
    def groups(self) -> list[range]:
        """Registers that are attended to in one go: one has room for many keys, all for few."""
        registers = self.lanes // self.register
        size = max(1, min(registers, TOGETHER // (self.sets * self.span)))
        return [range(i, min(i + size, registers)) for i in range(0, registers, size)]

    def heads_of(self, register: int) -> range:
        """The heads within one."""
        each = self.register // self.width
        return range(register * each, min((register + 1) * each, self.heads))


class Weights(NamedTuple):
    """Of a block: matrices [in, out]; biases and norms [1, C], float32."""

    norm1: Any
    """Scale, bias."""
    q: Any
    """Matrix, bias; and so on."""
    k: Any
    v: Any
    skip: Any
    """Of a pooled block; else None."""
    out: Any
    norm2: Any
    mlp_in: Any
    mlp_out: Any


class Tokens:
    """A ref of tokens, row by row."""

    def __init__(self, ref: Any, view: View):
        self.ref, self.view = ref, view

    def __getitem__(self, which: tuple[int, Any]) -> Array:
        """Some rows of a set, float32."""
        s, rows = which
        parts = [self.ref[place].astype(jnp.float32) for place in self._places(s, rows)]
        return jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in parts])

    def __setitem__(self, which: tuple[int, Any], value: Array) -> None:
        s, rows = which
        group = self.view.group
        for i, place in enumerate(self._places(s, rows)):
            shape = self.ref[place].shape
            part = value[i * group : (i + 1) * group].reshape(shape)
            self.ref[place] = part.astype(self.ref.dtype)

    def _places(self, s: int, rows: Any) -> list[tuple[Any, ...]]:
        first = jax.lax.div(rows.start, self.view.group)
        return [self.view.place(s, first + i) for i in range(rows.size // self.view.group)]


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
        middle = skip + _linear(attended[rows, :], weights.out)
        middle_ref[rows, :] = middle.astype(dtype)
        normed, _, _ = _norm(middle, weights.norm2)
        hidden = _gelu(_linear(normed.astype(dtype), weights.mlp_in))
        out[0, rows] = middle + _linear(hidden.astype(dtype), weights.mlp_out)

    _for_rows(count, static.rows, finish)


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
        normed, standard, inverse = _norm(middle_ref[rows, :], weights.norm2)
        z = _linear(normed.astype(dtype), weights.mlp_in)
        d_hidden = _back(gradient.astype(dtype), weights.mlp_out) * _gelu_slope(z)
        d_normed = _back(d_hidden.astype(dtype), weights.mlp_in)
        gradient += _norm_back(d_normed, weights.norm2, standard, inverse)
        d_middle[rows, :] = gradient
        d_attended[rows, :] = _back(gradient.astype(dtype), weights.out).astype(dtype)

    _for_rows(count, static.rows, through_mlp)

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
        norms = [_norm(x[s, rows], weights.norm1) for s in range(static.sets)]
        gradient, dq, d_skip = d_middle[rows, :], [q_ref[rows, :]], []
        if weights.skip:
            normed = [n.astype(dtype) for n, _, _ in norms]
            d_skip = _pool_back([_linear(n, weights.skip) for n in normed], gradient)
            if mask is not None:
                normed = [n * mask[s].astype(dtype) for s, n in enumerate(normed)]
            queries = [_linear(n, weights.q) for n in normed]
            dq = _pool_back(queries, dq[0].astype(jnp.float32))
        for s, (_, standard, inverse) in enumerate(norms):
            d_normed = _back(dq[s].astype(dtype), weights.q)
            d_normed += _back(k_ref[s, rows, :], weights.k) + _back(v_ref[s, rows, :], weights.v)
            if mask is not None:
                d_normed *= mask[s]
            if weights.skip:
                d_normed += _back(d_skip[s].astype(dtype), weights.skip)
            one = _norm_back(d_normed, weights.norm1, standard, inverse)
            dx[s, rows] = one if weights.skip else one + gradient

    _for_rows(count, static.rows, finish)


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

    _for_rows(static.program, static.rows, copy)


def _project(static, x, mask_ref, weights, q_ref, k_ref, v_ref, skip_ref=None):
    """Queries, scaled and pooled, keys and values of all rows; of a pooled block what is added to
    what was attended, if anybody asks."""
    dtype = q_ref.dtype

    def project(rows):
        queries, skips = [], []
        for s in range(static.sets):
            normed, _, _ = _norm(x[s, rows], weights.norm1)
            if weights.skip and skip_ref is not None:
                skips.append(_linear(normed.astype(dtype), weights.skip))
            if static.masked:
                normed *= mask_ref[s, rows, :]
            normed = normed.astype(dtype)
            queries.append(_linear(normed, weights.q))
            k_ref[s, rows, :] = _linear(normed, weights.k).astype(dtype)
            v_ref[s, rows, :] = _linear(normed, weights.v).astype(dtype)
        q_ref[rows, :] = (_pool(*queries) * static.scale).astype(dtype)
        if skips:
            skip_ref[rows, :] = _pool(*skips).astype(dtype)

    _for_rows(static.program, static.rows, project)


def _pool(first, *others):
    """The larger of the larger ones of two pairs; of one, itself."""
    if not others:
        return first
    return jnp.maximum(jnp.maximum(first, others[0]), jnp.maximum(*others[1:]))


def _pool_back(values, gradient):
    """Gradients in each of the four sets of values that `_pool` took."""
    a, b, c, d = values
    upper, lower = _larger_back(jnp.maximum(a, b), jnp.maximum(c, d), gradient)
    return [*_larger_back(a, b, upper), *_larger_back(c, d, lower)]


def _larger_back(a, b, gradient):
    """Gradients in a and b of the larger one; halves where they are equal."""
    share = jnp.where(a > b, 1.0, jnp.where(a == b, 0.5, 0.0))
    return gradient * share, gradient * (1 - share)


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
            exists = (key & (static.window - 1) if static.apart else key) < static.length
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


def _norm(x, weights):
    """Normed tokens; before scale and bias; 1 / their standard deviation. All float32."""
    scale, bias = weights
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=1, keepdims=True) + EPSILON)
    standard = centred * inverse
    return standard * scale[...] + bias[...], standard, inverse


def _norm_back(gradient, weights, standard, inverse):
    scaled = gradient * weights[0][...]
    mean = jnp.mean(scaled, axis=1, keepdims=True)
    product = jnp.mean(scaled * standard, axis=1, keepdims=True)
    return inverse * (scaled - mean - standard * product)


def _gelu(z):
    """z Phi(z), Phi being the normal distribution."""
    _, tail = _density_and_tail(z)
    return jnp.maximum(z, 0) - jnp.abs(z) * tail


def _gelu_slope(z):
    density, tail = _density_and_tail(z)
    return jnp.where(z < 0, tail, 1 - tail) + z * density


def _density_and_tail(z):
    """The normal distribution's density at z, and what it leaves beyond |z|.

    By formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions (1964), off by
    1e-7 at most. It takes half of what the error function does, and has the density in it.
    """
    root = 0.3275911 * math.sqrt(0.5)
    t = _reciprocal(1 + root * jnp.abs(z))
    series = 0.0
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + 0.5 * coefficient) * t
    bell = jnp.exp(-0.5 * z * z)
    return bell * (1 / math.sqrt(2 * math.pi)), series * bell


def _reciprocal(x):
    """1 / x for x >= 1, by one step of Newton's from the hardware's estimate."""
    guess = pl.reciprocal(x, approx=True)
    return guess * (2 - x * guess)


def _linear(x, weights):
    """x w + b in float32."""
    matrix, bias = weights
    return dot(x, matrix[...], 1, 0) + bias[...]


def _back(gradient, weights):
    """The gradient in what `_linear` took."""
    return dot(gradient, weights[0][...], 1, 1)


def _for_rows(count: int, step: int, body: Callable) -> None:
    """`body` for each `step` rows of `count`."""

    @pl.loop(0, count // step)
    def _(i):
        body(pl.ds(pl.multiple_of(i * step, step), step))


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

    _for_rows(count, static.span, one)

"""How tokens, heads and weights of a block lie on the chip, for `block_kernels`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike
from jaxtyping import Array

from flexavatar_jax.model.attention_kernels import LANES

TOGETHER = 1024
"""Keys and registers, one times the other, that are worked on in one go."""


def whole(lanes: int) -> int:
    """Lanes of whole registers that hold so many."""
    return -(-lanes // LANES) * LANES


class View(NamedTuple):
    """How a program's rows lie in an array [*dims, C]."""

    dims: tuple[int, ...]
    roles: str
    """Of each dimension: "s" tells sets apart, "n" counts groups of rows, "." is within a group."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a group."""
        return tuple(n for n, role in zip(self.dims, self.roles, strict=True) if role == ".")

    @property
    def group(self) -> int:
        """Rows that lie together."""
        return math.prod(self.shape)

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
    """Of so many neighbouring rows, a power of two or the span,"""
    length: int
    """so many hold tokens; the others are padding."""
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
        return whole(self.heads * self.width)

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


def lay_out(static: Static, p: dict[str, dict[str, Array]], dtype: DTypeLike) -> Weights:
    """The kernels' weights: queries, keys and values apart, each head in lanes of its own."""

    def lanes(a, axis):
        """Heads along an axis, each with zeros after it up to its lanes."""
        before, after = a.shape[:axis], a.shape[axis + 1 :]
        head = a.shape[axis] // static.heads
        a = a.reshape(*before, static.heads, head, *after)
        a = _pad(a, axis + 1, static.width - head)
        a = a.reshape(*before, static.heads * static.width, *after)
        return _pad(a, axis, static.lanes - a.shape[axis])

    def linear(w, b):
        return w.astype(dtype), jnp.float32(b)[:, None]

    def norm(q):
        return jnp.float32(q["scale"])[:, None], jnp.float32(q["bias"])[:, None]

    qkv = zip(*(jnp.split(p["qkv"][name], 3, axis=-1) for name in "wb"), strict=True)
    qkv = (linear(lanes(w, 2), lanes(b, 1)) for w, b in qkv)
    skip = linear(**p["skip"]) if "skip" in p else None
    out = linear(lanes(p["out"]["w"], 1), p["out"]["b"])
    mlp = linear(**p["mlp_in"]), linear(**p["mlp_out"])
    return Weights(norm(p["norm1"]), *qkv, skip, out, norm(p["norm2"]), *mlp)


def _pad(a, axis, amount):
    return jnp.pad(a, [(0, amount if i == axis else 0) for i in range(a.ndim)])


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
            part = value[i * group : (i + 1) * group].reshape(*self.view.shape, -1)
            self.ref[place] = part.astype(self.ref.dtype)

    def _places(self, s: int, rows: Any) -> list[tuple[Any, ...]]:
        first = jax.lax.div(rows.start, self.view.group)
        return [self.view.place(s, first + i) for i in range(rows.size // self.view.group)]


def for_rows(count: int, step: int, body: Callable) -> None:
    """`body` for each `step` rows of `count`."""

    @pl.loop(0, count // step)
    def _(i):
        body(pl.ds(pl.multiple_of(i * step, step), step))

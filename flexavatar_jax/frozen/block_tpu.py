"""A frozen transformer block on TPUs: one Pallas kernel forward, one backward.

Perceptual losses send each pair of images through many small blocks, whose arrays XLA carries
through memory some thirty times a block. Weights that aren't trained fit on chip, and windows of
tokens know nothing of one another: a program takes some windows through the whole block, norms,
attention and MLP, and the backward pass, which wants no gradient of a weight, takes them back. Kept
between the two are a block's tokens, those its MLP sees, what was attended, and softmax's sums.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from flexavatar_jax.frozen.block_costs import cost
from flexavatar_jax.frozen.block_kernels import backward_kernel, forward_kernel
from flexavatar_jax.frozen.block_layout import Static, View, Weights, lay_out, whole
from flexavatar_jax.model import attention_tpu
from flexavatar_jax.model.attention_kernels import LANES
from kernels import backends

SUBLANES = 16
"""Rows that fill a register of bfloat16."""

ROWS = 2048
"""Of a program, where windows are smaller."""

HIDDEN = 256 * 1536
"""Elements of a hidden layer that are on chip at a time."""

LOGITS = 128 * 4096
"""Of a head that are on chip at a time."""

QUERIES = 256
"""At a time, at most."""

VMEM = 60 << 20
"""Bytes on chip that a program may take: v5e, v5p and v6e have 64 MiB and more."""


def fits() -> bool:
    """Whether what is traced is for TPUs that have room for a block."""
    return backends.platform() == "tpu" and not attention_tpu.on_small_chip()


def blocks(
    p: dict[str, dict[str, Array]],
    x: Float[Array, "b n t c"],
    which: range,
    *,
    heads: int,
    inside: Float[Array, "1 n t 1"] | None = None,
) -> Float[Array, "b n t2 d"]:
    """Pre-norm transformer blocks with exact GELU, one after the other, over windows of tokens.

        x' = x + attention(norm1(x)),  y = x' + mlp(norm2(x'))

    Products take, and tokens and weights are rounded to, the type of `x`; all else is float32.
    Differentiable in `x` alone.

    Args:
      p: `norm1`, `qkv`, `out`, `norm2`, `mlp_in`, `mlp_out`, each of many blocks [L, ...]; with
        `skip`, a block projects what it adds to, and pools that and its queries by a maximum: of
        four quarters of each window's list of tokens into one. Such a block comes alone.
      which: of those, the blocks to go through, neighbours.
      inside: 1 for tokens, 0 for those that count as zero in attention.
    """
    windows, tokens = x.shape[1:3]
    sets = _sets(p)
    tokens //= sets
    if tokens > LANES:
        steps = max(-(-tokens // QUERIES), -(-tokens * tokens * sets // LOGITS))
        queries = -(-tokens // steps // SUBLANES) * SUBLANES
        window = span = steps * queries
    else:
        window = 1 << (tokens - 1).bit_length()
        span = queries = LANES
    spans = -(-windows // (span // window))
    program = span * _largest(spans, lambda n: n * span * sets <= ROWS)
    step = _rows_at_once(p, program, SUBLANES)
    static = _static(
        p,
        heads=heads,
        x=View((sets, program // step, step), "sn."),
        out=View((program // step, step), "n."),
        rows=step,
        span=span,
        apart=(span - 1) & -window if window < span else 0,
        window=window,
        length=tokens,
        queries=queries,
        masked=inside is not None,
        layers=len(which),
    )
    grow = ((0, spans * span // window - windows), (0, window - tokens))

    def rows(a):
        a = rearrange(a, "... n (s t) c -> ... s n t c", s=sets)
        a = jnp.pad(a, (*[(0, 0)] * (a.ndim - 3), *grow, (0, 0)))
        return rearrange(a, "... n t c -> ... (n t) c")

    mask = None if inside is None else rows(jnp.float32(inside[0]))
    x = rearrange(rows(x), "b s (i n r) c -> b i s n r c", i=spans * span // program, r=step)
    y = _blocks(static, which.start, x, mask, lay_out(static, p, x.dtype))
    y = rearrange(y, "b i n r c -> b (i n r) c")
    y = rearrange(y, "b (n t) c -> b n t c", t=window)
    return y[:, :windows, :tokens]


def arranged(
    p: dict[str, dict[str, Array]],
    x: Float[Array, "b i *x_dims c"],
    which: range = range(1),
    *,
    heads: int,
    roles: str,
    out: View,
    span: int,
    apart: int = 0,
    alive: tuple[int, int] | None = None,
    inside: Float[np.ndarray, "rows"] | None = None,
) -> Float[Array, "b i *out_dims d"]:
    """`blocks` over tokens that lie as they please.

    A program takes x[:, i]. Nothing is padded.

    Args:
      roles: of `x_dims`, as in a `View`.
      out: how the tokens lie that come out; `out_dims` are its dimensions.
      span: neighbouring rows that attend to one another,
      apart: unless their numbers differ in these bits.
      alive: of each so many neighbouring rows of a span so many hold tokens, the others nothing.
      inside: as of `blocks`, for all rows.
    """
    view = View(x.shape[2:-1], roles)
    program, group = math.prod(out.dims), max(view.group, out.group)
    window, length = alive or (span, span)
    static = _static(
        p,
        heads=heads,
        x=view,
        out=out,
        rows=_rows_at_once(p, program, group),
        span=span,
        apart=apart,
        window=window,
        length=length,
        queries=min(span, QUERIES),
        masked=inside is not None,
        layers=len(which),
    )
    mask = None if inside is None else jnp.float32(inside)[None, :, None]
    return _blocks(static, which.start, x, mask, lay_out(static, p, x.dtype))


def _static(p, *, heads, out, **others) -> Static:
    head = p["out"]["w"].shape[1] // heads
    return Static(
        heads=heads,
        width=head if LANES % head == 0 else whole(head),
        scale=head**-0.5,
        sets=_sets(p),
        out=out,
        program=math.prod(out.dims),
        **others,
    )


def _sets(p) -> int:
    return 4 if "skip" in p else 1


def _rows_at_once(p, program: int, group: int) -> int:
    """As many whole groups of a program's rows as there is room for their hidden layers."""
    most = HIDDEN // (_sets(p) * p["mlp_in"]["w"].shape[2])
    return group * _largest(program // group, lambda n: n * group <= most)


def _largest(count: int, good: Callable[[int], bool]) -> int:
    """The largest divisor of `count` that is `good`, or 1."""
    return max((n for n in range(1, count + 1) if count % n == 0 and good(n)), default=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocks(static, first, x, mask, weights):
    return _forward(static, first, x, mask, weights)[0]


def _blocks_forward(static, first, x, mask, weights):
    out, *kept = _forward(static, first, x, mask, weights)
    inputs = kept.pop() if static.layers > 1 else x[None]
    return out, (inputs, mask, weights, *kept)


def _forward(static, first, x, mask, weights):
    """Tokens [b, i, *out.dims, D] of tokens [b, i, *x.dims, C], and what the backward pass has use
    for."""
    width = weights.out[0].shape[2]
    place = _Places(static, first, backward=False)
    shape = (static.layers, len(x), x.shape[1] * static.program)
    kept = [
        jax.ShapeDtypeStruct((*shape, width), x.dtype),
        jax.ShapeDtypeStruct((*shape, static.lanes), x.dtype),
        jax.ShapeDtypeStruct((*shape, static.heads), jnp.float32),
    ]
    specs = list(map(place.each, kept))
    if static.layers > 1:
        kept.append(jax.ShapeDtypeStruct((static.layers, *x.shape), x.dtype))
        specs.append(place.each_input(x))
    tokens = jax.ShapeDtypeStruct((*x.shape[:2], *static.out.dims, width), x.dtype)
    return _call(
        static,
        forward_kernel,
        (x, mask, weights),
        (place.tokens(x), place.mask(mask), place.weights(weights)),
        [tokens, *kept],
        [place.tokens(tokens), *specs],
        _room(static, x.dtype),
    )


def _blocks_backward(static, first, saved, cotangent):
    inputs, mask, weights, *kept = saved
    place = _Places(static, first, backward=True)
    dx = jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype)
    scratch = _room(static, inputs.dtype)
    together = len(static.groups[0]) * static.register
    scratch.append(pltpu.VMEM((static.program, static.lanes), inputs.dtype))
    scratch.append(pltpu.VMEM((static.program, cotangent.shape[-1]), jnp.float32))
    scratch += [pltpu.VMEM((static.sets, static.span, together), jnp.float32)] * 2
    (dx,) = _call(
        static,
        backward_kernel,
        (inputs, mask, weights, *kept, cotangent),
        (
            place.each_input(dx),
            place.mask(mask),
            place.weights(weights),
            *map(place.each, kept),
            place.tokens(cotangent),
        ),
        [dx],
        [place.tokens(dx)],
        scratch,
    )
    return dx, *jax.tree.map(jnp.zeros_like, (mask, weights))


_blocks.defvjp(_blocks_forward, _blocks_backward)


class _Places:
    """What of its arrays a program sees, for example b, rows i and step l."""

    def __init__(self, static: Static, first: int, *, backward: bool):
        self.static, self.first = static, first
        self.layer = (lambda l: static.layers - 1 - l) if backward else (lambda l: l)

    def tokens(self, x: Any) -> pl.BlockSpec:
        """Of [b, i, *dims, c]."""
        dims = x.shape[2:]
        return pl.BlockSpec((None, None, *dims), lambda b, i, l: (b, i, *[0] * len(dims)))

    def each_input(self, x: Any) -> pl.BlockSpec:
        """Of [layers, b, i, *dims, c], where `x` is a layer's."""
        dims = x.shape[2:]
        return pl.BlockSpec(
            (None, None, None, *dims), lambda b, i, l: (self.layer(l), b, i, *[0] * len(dims))
        )

    def each(self, x: Any) -> pl.BlockSpec:
        """Of [layers, b, rows, c]."""
        shape = (None, None, self.static.program, x.shape[-1])
        return pl.BlockSpec(shape, lambda b, i, l: (self.layer(l), b, i, 0))

    def mask(self, mask: Any) -> pl.BlockSpec | None:
        """Of [sets, rows, 1]."""
        shape = (self.static.sets, self.static.program, 1)
        return None if mask is None else pl.BlockSpec(shape, lambda b, i, l: (0, i, 0))

    def weights(self, weights: Weights) -> Any:
        """Of [L, ...], those of a layer."""

        def one(w):
            return pl.BlockSpec(
                (None, *w.shape[1:]), lambda b, i, l: (self.first + self.layer(l), 0, 0)
            )

        return jax.tree.map(one, weights)


def _room(static, dtype) -> list[Any]:
    """For queries, keys and values."""
    rows = (static.program, static.lanes)
    return [pltpu.VMEM(shape, dtype) for shape in (rows, *[(static.sets, *rows)] * 2)]


def _call(static, kernel, inputs, in_specs, outputs, out_specs, scratch):
    flat, tree = jax.tree.flatten(inputs)
    x, _, weights = inputs[:3]
    backward = kernel is backward_kernel
    return pl.pallas_call(
        functools.partial(kernel, static, tree),
        grid=(*x.shape[int(backward) :][:2], static.layers),
        in_specs=jax.tree.leaves(in_specs),
        out_specs=out_specs,
        out_shape=outputs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=cost(static, x, weights, [*flat, *outputs], backward=backward),
        name=f"block_{'backward' if backward else 'forward'}",
    )(*flat)

"""The blocks of Hiera-small: attention in windows of a map or all over it, some of which pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from flexavatar_jax.frozen import block_tpu
from flexavatar_jax.frozen.layers import attend, layer_norm, linear
from flexavatar_jax.model import attention_gpu

Params = dict[str, Any]

GLOBAL_BLOCKS = (7, 10, 13)
GLOBAL_ROWS = 512
"""Queries at a time where a block attends globally."""


class Stage(NamedTuple):
    """Blocks at one resolution; each stage halves that of the one before."""

    blocks: int
    width: int
    heads: int
    window: int


STAGES = (Stage(1, 96, 1, 8), Stage(2, 192, 2, 4), Stage(11, 384, 4, 14), Stage(2, 768, 8, 7))


class Block(NamedTuple):
    """What sets a block apart from the others, besides its weights."""

    width_in: int
    width: int
    heads: int
    window: int
    """Side of the attention windows in tokens, before pooling; 0 attends globally."""
    pool: bool
    """Halves the resolution, by max-pooling the queries 2x2."""


def _all_blocks() -> tuple[Block, ...]:
    """All 16 blocks: a stage's first one pools, within the windows of the stage before."""
    blocks = []
    for stage, before in zip(STAGES, (None, *STAGES[:-1]), strict=True):
        for i in range(stage.blocks):
            entry = before if before and i == 0 else stage
            window = 0 if len(blocks) in GLOBAL_BLOCKS else entry.window
            blocks.append(Block(entry.width, stage.width, stage.heads, window, entry is before))
    return tuple(blocks)


BLOCKS = _all_blocks()


def in_windows(
    kinds: Sequence[Block], stacks: Sequence[tuple[Params, range]], x: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c2"]:
    """A map after consecutive blocks that see the same windows, each as often as it has layers."""
    size, window = x.shape[1], kinds[0].window or x.shape[1]
    pools = sum(kind.pool for kind in kinds)
    inside = None
    if size % window:
        inside = _to_windows(jnp.ones_like(x, shape=(1, size, size, 1)), window, pools)
    x = _to_windows(x, window, pools)
    for kind, (stack, which) in zip(kinds, stacks, strict=True):
        x = _alike(kind, stack, which, x, inside)
        inside = _pool(inside) if kind.pool and inside is not None else inside
    return from_windows(x, size >> pools, window >> pools)


def _to_windows(x: Float[Array, "b h w c"], window: int, pools: int) -> Float[Array, "b n t c"]:
    """Square windows of a map, zeros at its end where they don't divide it, as lists of tokens.

    Order matters to pooling alone, which joins what is a quarter of the list apart: TPUs are good
    at quarters and bad at neighbours (Ryali et al., 2023, do so on GPUs).
    """
    fill = -x.shape[1] % window
    x = jnp.pad(x, ((0, 0), (0, fill), (0, fill), (0, 0)))
    if pools:
        order = "b (i h r) (j w s) c -> b (i j) (r s h w) c"
        return rearrange(x, order, h=window // 2, w=window // 2, r=2, s=2)
    return rearrange(x, "b (i h) (j w) c -> b (i j) (h w) c", h=window, w=window)


def from_windows(x: Float[Array, "b n t c"], size: int, window: int) -> Float[Array, "b h w c"]:
    """The map that windows were of, without what filled it up."""
    tiles = -(-size // window)
    x = rearrange(x, "b (i j) (h w) c -> b (i h) (j w) c", i=tiles, h=window)
    return x[:, :size, :size]


def _alike(
    kind: Block,
    stack: Params,
    which: range,
    x: Float[Array, "b n t c"],
    inside: Float[Array, "1 n t 1"] | None,
) -> Float[Array, "b n t2 c2"]:
    """Alike blocks one after the other: attention within each window, of pooled queries where a
    block halves the resolution.

    What fills up a map (`inside` is 0 there) counts as zero before the projection to q, k and v,
    and is attended to like anything else: so was SAM trained.
    """
    if block_tpu.fits():
        return block_tpu.blocks(stack, x, which, heads=kind.heads, inside=inside)
    for i in which:
        x = plain_block(kind, jax.tree.map(lambda p, i=i: p[i], stack), x, inside)
    return x


def plain_block(
    kind: Block,
    p: Params,
    x: Float[Array, "b n t c"],
    inside: Float[Array, "1 n t 1"] | None = None,
) -> Float[Array, "b n t2 c2"]:
    """A block over windows of tokens as XLA makes it; `p` is its own alone."""
    normed = layer_norm(x, p["norm1"])
    skip = _pool(linear(normed, p["skip"])) if kind.pool else x
    normed = normed if inside is None else normed * inside
    q, k, v = jnp.split(linear(normed, p["qkv"]), 3, axis=-1)
    q = _pool(q) if kind.pool else q
    windows = x.shape[1]
    q, k, v = (rearrange(t, "b n t (h d) -> (b n) t h d", h=kind.heads) for t in (q, k, v))
    way = attend if kind.window or attention_gpu.fits(q) else _attend_globally
    attended = rearrange(way(q, k, v), "(b n) t h d -> b n t (h d)", n=windows)
    x = skip + linear(attended, p["out"])
    hidden = jax.nn.gelu(linear(layer_norm(x, p["norm2"]), p["mlp_in"]), approximate=False)
    return x + linear(hidden, p["mlp_out"])


def _attend_globally(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"]
) -> Float[Array, "b n h d"]:
    """Attention of some queries at a time: their logits stay on the chip, all at once don't fit.

    By the TPU compiler's reckoning that takes a third of the time.
    """
    attend = jax.checkpoint(lambda rows: jax.nn.dot_product_attention(rows, k, v))
    rows = rearrange(q, "b (s n) h d -> s b n h d", n=GLOBAL_ROWS)
    return rearrange(jax.lax.map(attend, rows), "s b n h d -> b (s n) h d")


def _pool(x: Float[Array, "b n t c"]) -> Float[Array, "b n t//4 c"]:
    # A maximum over an axis has a gradient that compares with copies of it, which takes longer.
    a, b, c, d = jnp.split(x, 4, axis=2)
    return jnp.maximum(jnp.maximum(a, b), jnp.maximum(c, d))

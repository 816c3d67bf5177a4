"""SAM 2.1's image encoder, Hiera-small with its feature pyramid: a perceptual loss.

Sources: Ryali et al., Hiera (2023); Bolya et al., Window Attention is Bugged (2023), for its
positions; Ravi et al., SAM 2 (2024).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce, repeat
from jaxtyping import Array, Float

from flexavatar_jax.frozen.layers import layer_norm, linear, normalise
from flexavatar_jax.frozen.positions import resize_bicubic
from flexavatar_jax.frozen.weights import Source, read_weights

SOURCE = Source("facebook/sam2.1-hiera-small", "config.frozen.sam2", "config.loss.sam=0")
IMAGE_SIZE = 1024
STRIDE = 4
KERNEL = 7
GLOBAL_BLOCKS = (7, 10, 13)
EMBEDDING_WIDTH = 256
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


def _blocks() -> tuple[Block, ...]:
    """All 16 blocks: a stage's first one pools, within the windows of the stage before."""
    blocks = []
    for stage, before in zip(STAGES, (None, *STAGES[:-1]), strict=True):
        for i in range(stage.blocks):
            entry = before if before and i == 0 else stage
            window = 0 if len(blocks) in GLOBAL_BLOCKS else entry.window
            blocks.append(Block(entry.width, stage.width, stage.heads, window, entry is before))
    return tuple(blocks)


BLOCKS = _blocks()
ENTRY, PERIOD, REPEATS = 5, 3, 3
"""After the first five blocks, the same three (the third attends globally) come three times."""
EXIT = ENTRY + PERIOD * REPEATS
assert BLOCKS[ENTRY:EXIT] == REPEATS * BLOCKS[ENTRY : ENTRY + PERIOD]

Params = dict


def load(path: str | os.PathLike[str], dtype: jnp.dtype = jnp.float32) -> Params:
    """Parameters in `dtype` from published weights (a whole SAM's); errors as `read_weights`."""
    return fold(read_weights(path, shapes(), SOURCE), dtype)


def image_embedding(params: Params, image: Float[Array, "b h w 3"]) -> Float[Array, "b 64 64 256"]:
    """What SAM's mask decoder gets of an image in [0, 1]: the pyramid's stride-16 level.

    Any size of image goes: it is resized bilinearly to 1024.
    """
    dtype = params["positions"].dtype
    shape = (len(image), IMAGE_SIZE, IMAGE_SIZE, 3)
    image = jax.image.resize(image.astype(jnp.float32), shape, "bilinear", antialias=False)
    x = jax.lax.conv_general_dilated(
        _squares(normalise(image).astype(dtype)),
        params["patch"]["w"],
        (1, 1),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = x + params["patch"]["b"] + params["positions"]

    def through(x: Array, blocks: tuple[Block, ...], params: Sequence[Params]) -> Array:
        for block, p in zip(blocks, params, strict=True):
            x = _block(block, p, x)
        return x

    x = through(x, BLOCKS[:ENTRY], params["entry"])
    period = BLOCKS[ENTRY : ENTRY + PERIOD]
    x, _ = jax.lax.scan(lambda x, p: (through(x, period, p), None), x, params["repeated"])
    stride_16, x = x, through(x, BLOCKS[EXIT:], params["exit"])
    coarse = repeat(linear(x, params["neck_32"]), "b h w c -> b (h 2) (w 2) c")
    return linear(stride_16, params["neck_16"]) + coarse


def shapes() -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor that is read."""
    width = STAGES[0].width
    wanted = {
        "no_memory_embedding": (1, 1, EMBEDDING_WIDTH),
        "backbone.pos_embed": (1, width, 7, 7),
        "backbone.pos_embed_window": (1, width, STAGES[0].window, STAGES[0].window),
        "backbone.patch_embed.projection.weight": (width, 3, KERNEL, KERNEL),
        "backbone.patch_embed.projection.bias": (width,),
    }
    for i, stage in enumerate((STAGES[-1], STAGES[-2])):
        wanted[f"neck.convs.{i}.weight"] = (EMBEDDING_WIDTH, stage.width, 1, 1)
        wanted[f"neck.convs.{i}.bias"] = (EMBEDDING_WIDTH,)
    for i, block in enumerate(BLOCKS):
        d, e = block.width_in, block.width
        linears = {"attn.qkv": (3 * e, d), "attn.proj": (e, e)}
        linears |= {"mlp.proj_in": (4 * e, e), "mlp.proj_out": (e, 4 * e)}
        if block.pool:
            linears["proj"] = (e, d)
        for name, shape in linears.items():
            wanted[f"backbone.blocks.{i}.{name}.weight"] = shape
            wanted[f"backbone.blocks.{i}.{name}.bias"] = shape[:1]
        for name, size in (("layer_norm1", d), ("layer_norm2", e)):
            wanted[f"backbone.blocks.{i}.{name}.weight"] = (size,)
            wanted[f"backbone.blocks.{i}.{name}.bias"] = (size,)
    return wanted


def fold(weights: Mapping[str, np.ndarray], dtype: jnp.dtype = jnp.float32) -> Params:
    """Published weights as this module computes with them: linear layers [in, out], one position
    map (the resampled one plus the tiled window), `no_memory_embedding` in the neck's bias."""
    w = weights

    def dense(name: str) -> dict[str, np.ndarray]:
        kernel = w[f"{name}.weight"]
        return {"w": kernel.reshape(kernel.shape[:2]).T, "b": w[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    def block(i: int) -> dict[str, dict[str, np.ndarray]]:
        name = f"backbone.blocks.{i}"
        p = {
            "norm1": norm(f"{name}.layer_norm1"),
            "qkv": dense(f"{name}.attn.qkv"),
            "out": dense(f"{name}.attn.proj"),
            "norm2": norm(f"{name}.layer_norm2"),
            "mlp_in": dense(f"{name}.mlp.proj_in"),
            "mlp_out": dense(f"{name}.mlp.proj_out"),
        }
        return p | {"skip": dense(f"{name}.proj")} if BLOCKS[i].pool else p

    grid = IMAGE_SIZE // STRIDE
    background = rearrange(w["backbone.pos_embed"], "1 c h w -> h w c")
    window = rearrange(w["backbone.pos_embed_window"], "1 c h w -> h w c")
    tiles = grid // STAGES[0].window
    neck_16 = dense("neck.convs.1")
    neck_16["b"] = neck_16["b"] + w["no_memory_embedding"][0, 0]
    params = {
        "patch": {
            "w": _squares_kernel(w["backbone.patch_embed.projection.weight"]),
            "b": w["backbone.patch_embed.projection.bias"],
        },
        "positions": resize_bicubic(background, grid, antialias=False)
        + np.tile(window, (tiles, tiles, 1)),
        "entry": [block(i) for i in range(ENTRY)],
        "repeated": [
            jax.tree.map(lambda *p: np.stack(p), *(block(i) for i in range(first, EXIT, PERIOD)))
            for first in range(ENTRY, ENTRY + PERIOD)
        ],
        "exit": [block(i) for i in range(EXIT, len(BLOCKS))],
        "neck_32": dense("neck.convs.0"),
        "neck_16": neck_16,
    }
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


def _squares(x: Float[Array, "b h w 3"]) -> Float[Array, "b h//4+1 w//4+1 48"]:
    """Squares of 4x4 pixels as channels, zeros around.

    The 7x7 convolution of stride 4 is a 2x2 convolution of these; few channels and large strides
    are what TPUs are slowest at.
    """
    before, after = KERNEL // 2, STRIDE - KERNEL // 2
    x = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    return rearrange(x, "b (h r) (w s) c -> b h w (r s c)", r=STRIDE, s=STRIDE)


def _squares_kernel(kernel: Float[np.ndarray, "o c 7 7"]) -> Float[np.ndarray, "2 2 48 o"]:
    """The 7x7 kernel, with a zero row and column after it, for `_squares`."""
    kernel = np.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 1)))
    return rearrange(kernel, "o c (h r) (w s) -> h w (r s c) o", r=STRIDE, s=STRIDE)


def _block(
    block: Block, p: dict[str, dict[str, Array]], x: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c2"]:
    normed = layer_norm(x, p["norm1"])
    skip = _pool(linear(normed, p["skip"])) if block.pool else x
    x = skip + _attention(block, p, normed)
    hidden = jax.nn.gelu(linear(layer_norm(x, p["norm2"]), p["mlp_in"]), approximate=False)
    return x + linear(hidden, p["mlp_out"])


def _attention(
    block: Block, p: dict[str, dict[str, Array]], x: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c2"]:
    """Attention within windows, of pooled queries where the block halves the resolution.

    Where windows don't divide the map, zeros fill it up before the projection to q, k and v, and
    are attended to like anything else: so was SAM trained.
    """
    size = x.shape[1]
    window = block.window or size
    fill = -size % window
    x = jnp.pad(x, ((0, 0), (0, fill), (0, fill), (0, 0)))
    x = rearrange(x, "b (i h) (j w) c -> (b i j) h w c", h=window, w=window)
    q, k, v = jnp.split(linear(x, p["qkv"]), 3, axis=-1)
    if block.pool:
        q, size, window = _pool(q), size // 2, window // 2
    q, k, v = (rearrange(t, "b h w (n d) -> b (h w) n d", n=block.heads) for t in (q, k, v))
    attend = jax.nn.dot_product_attention if block.window else _attend_globally
    x = rearrange(attend(q, k, v), "b n h d -> b n (h d)")
    tiles = -(-size // window)
    x = rearrange(
        linear(x, p["out"]), "(b i j) (h w) c -> b (i h) (j w) c", i=tiles, j=tiles, h=window
    )
    return x[:, :size, :size]


def _attend_globally(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], v: Float[Array, "b n h d"]
) -> Float[Array, "b n h d"]:
    """Attention of some queries at a time: their logits stay on the chip, all at once don't fit.

    By the TPU compiler's reckoning that takes a third of the time.
    """
    attend = jax.checkpoint(lambda rows: jax.nn.dot_product_attention(rows, k, v))
    rows = rearrange(q, "b (s n) h d -> s b n h d", n=GLOBAL_ROWS)
    return rearrange(jax.lax.map(attend, rows), "s b n h d -> b (s n) h d")


def _pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h//2 w//2 c"]:
    return reduce(x, "b (h 2) (w 2) c -> b h w c", "max")

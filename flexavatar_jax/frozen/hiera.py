"""SAM 2.1's image encoder, Hiera-small with its feature pyramid: a perceptual loss.

Sources: Ryali et al., Hiera (2023); Bolya et al., Window Attention is Bugged (2023), for its
positions; Ravi et al., SAM 2 (2024).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flexavatar_jax.frozen import block_tpu
from flexavatar_jax.frozen.block_layout import View
from flexavatar_jax.frozen.block_tpu import SUBLANES
from flexavatar_jax.frozen.hiera_blocks import (
    BLOCKS,
    GLOBAL_BLOCKS,
    STAGES,
    Block,
    Params,
    from_windows,
    in_windows,
    plain_block,
)
from flexavatar_jax.frozen.layers import linear, normalise
from flexavatar_jax.frozen.positions import resize_bicubic
from flexavatar_jax.frozen.weights import Source, read_weights

SOURCE = Source("facebook/sam2.1-hiera-small", "config.frozen.sam2", "config.loss.sam=0")
IMAGE_SIZE = 1024
STRIDE = 4
KERNEL = 7
EMBEDDING_WIDTH = 256
STEM = 4
"""Blocks before the map has stride 16, which pool twice, in windows of one place."""
LAST = 14
"""From here on the map has stride 32."""
IN_WINDOWS = tuple(i for i in range(STEM, LAST) if i not in GLOBAL_BLOCKS)
"""Blocks at stride 16 in windows; those between them attend globally."""
ONCE, TWICE = 1, 2
"""Of the blocks in windows, one comes first, then two before each that attends globally."""
assert IN_WINDOWS == (4, 5, 6, 8, 9, 11, 12)


def load(path: str | os.PathLike[str], dtype: DTypeLike = jnp.float32) -> Params:
    """Parameters in `dtype` from published weights (a whole SAM's); errors as `read_weights`."""
    return fold(read_weights(path, shapes(), SOURCE), dtype)


def image_embedding(params: Params, image: Float[Array, "b h w 3"]) -> Float[Array, "b 64 64 256"]:
    """What SAM's mask decoder gets of an image in [0, 1]: the pyramid's stride-16 level.

    Any size of image goes: it is resized bilinearly to 1024.
    """
    x = _patches(normalise(image.astype(jnp.float32)), params["patch"]["w"])
    x = _stem(params["stem"], x + params["patch"]["b"] + params["positions"])
    stride_16 = x = _middle(params["windows"], params["global"], x)
    x = in_windows(BLOCKS[LAST:], [(stack, range(1)) for stack in params["last"]], x)
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


def fold(weights: Mapping[str, np.ndarray], dtype: DTypeLike = jnp.float32) -> Params:
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

    def stack(*indices: int) -> Params:
        return jax.tree.map(lambda *p: np.stack(p), *map(block, indices))

    grid = IMAGE_SIZE // STRIDE
    background = rearrange(w["backbone.pos_embed"], "1 c h w -> h w c")
    window = rearrange(w["backbone.pos_embed_window"], "1 c h w -> h w c")
    tiles = grid // STAGES[0].window
    positions = resize_bicubic(background, grid, antialias=False)
    positions = positions + np.tile(window, (tiles, tiles, 1))
    neck_16 = dense("neck.convs.1")
    neck_16["b"] = neck_16["b"] + w["no_memory_embedding"][0, 0]
    params = {
        "patch": {
            "w": rearrange(w["backbone.patch_embed.projection.weight"], "o c h w -> c h w o"),
            "b": w["backbone.patch_embed.projection.bias"],
        },
        "positions": rearrange(
            positions,
            f"({ROWS}) ({COLUMNS}) c -> ({STEM_ROWS}) ({STEM_COLUMNS}) c",
            **ROW_SIZES,
            **COLUMN_SIZES,
        ),
        "stem": [stack(i) for i in range(STEM)],
        "windows": stack(*IN_WINDOWS),
        "global": stack(*GLOBAL_BLOCKS),
        "last": [stack(i) for i in range(LAST, len(BLOCKS))],
        "neck_32": dense("neck.convs.0"),
        "neck_16": neck_16,
    }
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


ROWS, COLUMNS = "i h k r", "j q w l s"
"""A token's row and column in the first map, taken apart: all but i, j and q say where in its
window of 8x8 it is; pooling joins first r and s, then k and l."""
STEM_ROWS, STEM_COLUMNS = "i r k h", "j s l q w"
"""Their order as the stem has it: eight tokens that lie together, of four windows, stay together
whatever is pooled, as TPUs move rows by the eight."""
ROW_SIZES, COLUMN_SIZES = {"r": 2, "k": 2, "h": 2}, {"s": 2, "l": 2, "w": 2, "q": 4}


def _patches(
    image: Float[Array, "b h w 3"], kernel: Float[Array, "3 7 7 o"]
) -> Float[Array, "b 256 256 o"]:
    """The 7x7 convolution of stride 4 of the image at 1024x1024, its tokens in the stem's order.

    A matrix for rows and one for columns resize the image and take each token's seven lines of it,
    zeros around: pixels need no moving, and few channels and large strides, which are what TPUs are
    slowest at, are gone.
    """
    single = kernel.dtype == jnp.float32
    product = partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST if single else jax.lax.Precision.HIGH
    )

    def matrix(
        size: int, order: str, stem_order: str, sizes: dict[str, int]
    ) -> Float[Array, "7 256 {size}"]:
        eye = jnp.eye(size, dtype=image.dtype)
        lines = jax.image.resize(eye, (IMAGE_SIZE, size), "bilinear", antialias=False)
        lines = jnp.pad(lines, ((KERNEL // 2, KERNEL // 2), (0, 0)))
        taps = jnp.stack([lines[tap : tap + IMAGE_SIZE : STRIDE] for tap in range(KERNEL)])
        return rearrange(taps, f"t ({order}) n -> t ({stem_order}) n", **sizes)

    rows = matrix(image.shape[1], ROWS, STEM_ROWS, ROW_SIZES)
    columns = matrix(image.shape[2], COLUMNS, STEM_COLUMNS, COLUMN_SIZES)
    x = product("tyh,bhwc->bctyw", rows, image)
    x = product("uxw,bctyw->bctuyx", columns, x).astype(kernel.dtype)
    return jnp.einsum("bctuyx,ctuo->byxo", x, kernel)


def _stem(stacks: Sequence[Params], x: Float[Array, "b 256 256 c"]) -> Float[Array, "b 64 64 d"]:
    """The first map, its tokens in the stem's order, after the blocks that pool it twice."""
    if not block_tpu.fits():
        x = rearrange(
            x,
            f"b ({STEM_ROWS}) ({STEM_COLUMNS}) c -> b (i j q) (r s k l h w) c",
            **ROW_SIZES,
            **COLUMN_SIZES,
        )
        for kind, stack in zip(BLOCKS[:STEM], stacks, strict=True):
            x = plain_block(kind, jax.tree.map(lambda p: p[0], stack), x)
        return from_windows(x, IMAGE_SIZE // 16, 2)
    # q is in bits 1 and 2 of a row's number, i a program's, j above a window's other tokens.
    first, second, third, fourth = (
        partial(block_tpu.arranged, stack, heads=kind.heads)
        for kind, stack in zip(BLOCKS[:STEM], stacks, strict=True)
    )
    x = rearrange(x, "b (i y) (j z) c -> b i y j z c", y=8, z=32)
    x = first(x, roles=".n.", out=View((8, 256), "n."), span=256, apart=0b110)
    x = rearrange(x, "b i j (r y s z) c -> b i j r y s z c", r=2, s=2, z=16)
    x = second(x, roles="ns.s.", out=View((8, 64), "n."), span=128, apart=0b1000110)
    x = third(x, roles="n.", out=View((8, 64), "n."), span=128, apart=0b1000110)
    x = rearrange(x, "b i j (k h l z) c -> b i j k h l z c", k=2, h=2, l=2)
    x = fourth(x, roles="ns.s.", out=View((2, 8, 8), ".n."), span=128, apart=0b1110110)
    return rearrange(x, "b i h j z c -> b (i h) (j z) c")


def _middle(
    windows: Params, whole: Params, x: Float[Array, "b 64 64 c"]
) -> Float[Array, "b 64 64 c"]:
    """A map after the blocks of stride 16."""
    alike, globally = BLOCKS[IN_WINDOWS[0]], BLOCKS[GLOBAL_BLOCKS[0]]

    def go(x: Array, kind: Block, stack: Params, which: range) -> Array:
        return in_windows([kind], [(stack, which)], x)

    if block_tpu.fits():  # takes a layer's weights from among all, which a loop would copy
        start = 0
        for i in range(len(GLOBAL_BLOCKS)):
            end = ONCE + TWICE * (i + 1)
            x = _in_wide_windows(alike, windows, range(start, end), x)
            x, start = go(x, globally, whole, range(i, i + 1)), end
        return x

    def period(x: Array, stacks: tuple[Params, Params]) -> tuple[Array, None]:
        x = go(x, alike, stacks[0], range(TWICE))
        return go(x, globally, jax.tree.map(lambda p: p[None], stacks[1]), range(1)), None

    x = go(x, alike, windows, range(ONCE))
    repeated = jax.tree.map(lambda p: p[ONCE:].reshape(-1, TWICE, *p.shape[1:]), windows)
    return jax.lax.scan(period, x, (repeated, whole))[0]


def _in_wide_windows(
    kind: Block, stack: Params, which: range, x: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """`in_windows`, of windows that are as wide as registers.

    Between a map's lines and those of windows, tokens would change registers; a product with ones
    moves them, which takes a fifth of the time.
    """
    size, side = x.shape[1], kind.window
    tiles, wide = -(-size // side), -(-side // SUBLANES) * SUBLANES
    line = np.arange(tiles * side)
    spread = np.zeros((tiles * wide, size), np.float32)
    spread[(line // side * wide + line % side)[:size], line[:size]] = 1
    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    inside = np.zeros((tiles * side, tiles * wide), np.float32)
    inside[:size] = spread.any(axis=1)
    inside = rearrange(inside, "(i h) (j w) -> (i j h w)", h=side, w=wide)

    x = jnp.pad(x, ((0, 0), (0, tiles * side - size), (0, 0), (0, 0)))
    x = exact("vw,bhwc->bhvc", spread.astype(x.dtype), x)
    x = rearrange(x, "b (i h) (j w) c -> b i h j w c", h=side, w=wide)
    x = block_tpu.arranged(
        stack,
        x,
        which,
        heads=kind.heads,
        roles=".n.",
        out=View(x.shape[2:-1], ".n."),
        span=side * wide,
        alive=(wide, side),
        inside=inside,
    )
    x = rearrange(x, "b i h j w c -> b (i h) (j w) c")[:, :size]
    return exact("vw,bhvc->bhwc", spread.astype(x.dtype), x)

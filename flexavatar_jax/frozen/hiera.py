"""SAM 2.1's image encoder, Hiera-small with its feature pyramid: a perceptual loss.

Sources: Ryali et al., Hiera (2023); Bolya et al., Window Attention is Bugged (2023), for its
positions; Ravi et al., SAM 2 (2024).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flexavatar_jax.frozen import block_tpu
from flexavatar_jax.frozen.layers import attend, layer_norm, linear, normalise
from flexavatar_jax.frozen.positions import resize_bicubic
from flexavatar_jax.frozen.weights import Source, read_weights
from flexavatar_jax.model import attention_gpu

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

    @property
    def window_after(self) -> int:
        return self.window // 2 if self.pool else self.window


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
ENTRY, WINDOWS, REPEATS = 5, 2, 3
"""After the first five blocks, two in windows and one that attends globally come three times."""
PERIOD = BLOCKS[ENTRY : ENTRY + WINDOWS + 1]
EXIT = ENTRY + len(PERIOD) * REPEATS
assert BLOCKS[ENTRY:EXIT] == REPEATS * PERIOD

Params = dict
Stacked = tuple[Params, int]
"""A block's parameters: one of several blocks' [L, ...], and which."""


def load(path: str | os.PathLike[str], dtype: DTypeLike = jnp.float32) -> Params:
    """Parameters in `dtype` from published weights (a whole SAM's); errors as `read_weights`."""
    return fold(read_weights(path, shapes(), SOURCE), dtype)


def image_embedding(params: Params, image: Float[Array, "b h w 3"]) -> Float[Array, "b 64 64 256"]:
    """What SAM's mask decoder gets of an image in [0, 1]: the pyramid's stride-16 level.

    Any size of image goes: it is resized bilinearly to 1024.
    """
    x = jax.lax.conv_general_dilated(
        _squares(normalise(image.astype(jnp.float32))).astype(params["positions"].dtype),
        params["patch"]["w"],
        (1, 1),
        "VALID",
        dimension_numbers=("NCHW", "HWIO", "NHWC"),
    )
    x = x + params["patch"]["b"] + params["positions"]

    x = _through(BLOCKS[:ENTRY], [(stack, 0) for stack in params["entry"]], x)
    stride_16 = x = _repeated(params["windows"], params["global"], x)
    x = _through(BLOCKS[EXIT:], [(stack, 0) for stack in params["exit"]], x)
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
    neck_16 = dense("neck.convs.1")
    neck_16["b"] = neck_16["b"] + w["no_memory_embedding"][0, 0]
    params = {
        "patch": {
            "w": _squares_kernel(w["backbone.patch_embed.projection.weight"]),
            "b": w["backbone.patch_embed.projection.bias"],
        },
        "positions": resize_bicubic(background, grid, antialias=False)
        + np.tile(window, (tiles, tiles, 1)),
        "entry": [stack(i) for i in range(ENTRY)],
        "windows": stack(*(i for i in range(ENTRY, EXIT) if i not in GLOBAL_BLOCKS)),
        "global": stack(*GLOBAL_BLOCKS),
        "exit": [stack(i) for i in range(EXIT, len(BLOCKS))],
        "neck_32": dense("neck.convs.0"),
        "neck_16": neck_16,
    }
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


def _squares(image: Float[Array, "b h w 3"]) -> Float[Array, "b 48 257 257"]:
    """The image at 1024x1024 in squares of 4x4 pixels, as channels, zeros around.

    The 7x7 convolution of stride 4 is a 2x2 convolution of these; few channels and large strides
    are what TPUs are slowest at. Resized by matrices that leave its rows and columns in fours,
    pixels need no moving.
    """
    before, after = KERNEL // 2, STRIDE - KERNEL // 2

    def matrix(size: int) -> Float[Array, "257 4 {size}"]:
        eye = jnp.eye(size, dtype=image.dtype)
        lines = jax.image.resize(eye, (IMAGE_SIZE, size), "bilinear", antialias=False)
        return rearrange(jnp.pad(lines, ((before, after), (0, 0))), "(i r) h -> i r h", r=STRIDE)

    exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = exact("irh,bhwc->bcriw", matrix(image.shape[1]), image)
    x = exact("jsw,bcriw->bcrsij", matrix(image.shape[2]), x)
    return rearrange(x, "b c r s i j -> b (c r s) i j")


def _squares_kernel(kernel: Float[np.ndarray, "o c 7 7"]) -> Float[np.ndarray, "2 2 48 o"]:
    """The 7x7 kernel, with a zero row and column after it, for `_squares`."""
    kernel = np.pad(kernel, ((0, 0), (0, 0), (0, 1), (0, 1)))
    return rearrange(kernel, "o c (h r) (w s) -> h w (c r s) o", r=STRIDE, s=STRIDE)


def _repeated(
    windows: Params, whole: Params, x: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """A map after the period of blocks that comes several times."""

    def period(x: Array, windows: Params, whole: Params, i: int = 0) -> Array:
        blocks = [(windows, WINDOWS * i + k) for k in range(WINDOWS)]
        return _through(PERIOD, [*blocks, (whole, i)], x)

    if block_tpu.fits():  # takes its layer's weights from among all, which a loop would copy
        for i in range(REPEATS):
            x = period(x, windows, whole, i)
        return x
    windows = jax.tree.map(lambda p: p.reshape(REPEATS, WINDOWS, *p.shape[1:]), windows)
    whole = jax.tree.map(lambda p: p[:, None], whole)
    return jax.lax.scan(lambda x, p: (period(x, *p), None), x, (windows, whole))[0]


def _through(
    blocks: Sequence[Block], params: Sequence[Stacked], x: Float[Array, "b h w c"]
) -> Float[Array, "b h2 w2 c2"]:
    """A map after consecutive blocks, which is cut into windows only where windows change."""
    runs: list[list[tuple[Block, Stacked]]] = []
    for block, p in zip(blocks, params, strict=True):
        if not runs or block.window != runs[-1][-1][0].window_after:
            runs.append([])
        runs[-1].append((block, p))
    for run in runs:
        size, window = x.shape[1], run[0][0].window or x.shape[1]
        pools = sum(block.pool for block, _ in run)
        inside = None
        if size % window:
            inside = _to_windows(jnp.ones_like(x, shape=(1, size, size, 1)), window, pools)
        x = _to_windows(x, window, pools)
        # Neighbours in one stack, which are alike, go together.
        for _, some in itertools.groupby(run, key=lambda one: id(one[1][0])):
            (block, (stack, first)), *more = some
            x = _blocks(block, stack, range(first, first + 1 + len(more)), x, inside)
            inside = _pool(inside) if block.pool and inside is not None else inside
        x = _from_windows(x, size >> pools, window >> pools)
    return x


WINDOW_ORDERS = (
    "b (i h) (j w) c -> b (i j) (h w) c",
    "b (i h r) (j w s) c -> b (i j) (r s h w) c",
    "b (i h k r) (j w l s) c -> b (i j) (r s k l h w) c",
)
"""A map's tokens as lists of windows that are to be pooled never, once or twice."""


def _to_windows(x: Float[Array, "b h w c"], window: int, pools: int) -> Float[Array, "b n t c"]:
    """Square windows of a map, zeros at its end where they don't divide it, as lists of tokens.

    Order matters to pooling alone: what the first of so many `pools` joins is a quarter of the list
    apart, as TPUs are good at quarters and bad at neighbours (Ryali et al., 2023, do so on GPUs).
    """
    fill = -x.shape[1] % window
    x = jnp.pad(x, ((0, 0), (0, fill), (0, fill), (0, 0)))
    side, halves = window >> pools, dict.fromkeys("rskl"[: 2 * pools], 2)
    return rearrange(x, WINDOW_ORDERS[pools], h=side, w=side, **halves)


def _from_windows(x: Float[Array, "b n t c"], size: int, window: int) -> Float[Array, "b h w c"]:
    """The map that windows were of, without what filled it up."""
    tiles = -(-size // window)
    x = rearrange(x, "b (i j) (h w) c -> b (i h) (j w) c", i=tiles, h=window)
    return x[:, :size, :size]


def _blocks(
    block: Block,
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
        return block_tpu.blocks(stack, x, which, heads=block.heads, inside=inside)
    for i in which:
        x = _block(block, jax.tree.map(lambda p, i=i: p[i], stack), x, inside)
    return x


def _block(
    block: Block, p: Params, x: Float[Array, "b n t c"], inside: Float[Array, "1 n t 1"] | None
) -> Float[Array, "b n t2 c2"]:
    normed = layer_norm(x, p["norm1"])
    skip = _pool(linear(normed, p["skip"])) if block.pool else x
    normed = normed if inside is None else normed * inside
    q, k, v = jnp.split(linear(normed, p["qkv"]), 3, axis=-1)
    q = _pool(q) if block.pool else q
    windows = x.shape[1]
    q, k, v = (rearrange(t, "b n t (h d) -> (b n) t h d", h=block.heads) for t in (q, k, v))
    way = attend if block.window or attention_gpu.fits(q) else _attend_globally
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

"""The `pallas_tpu` backend: lists and blending in Mosaic kernels, an image at a time.

1. the splats are sorted by depth, once an image (XLA);
2. `tile_lists` splits them into blocks of tiles and those into tiles (`lists`);
3. `composite` blends the lists; its backward pass leaves a gradient for every list entry;
4. `lists.merge`, twice, sums these up to a gradient for every splat.

Images follow one another: a TPU core does one at a time anyway, and only one image's lists are in
memory. The backward pass makes the lists again, which is cheaper than to keep them.

The kernels are compiled for the TPU that the computation is lowered for, which also works ahead of
time, without one (`tpu_costs.compile_ahead`). On a CPU they run in Pallas's TPU interpreter, inside
`pltpu.force_tpu_interpret_mode()` and `backends.compiling_for("tpu")`: for tests, thousands of
times slower.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import binning
from kernels.backends import Backend, Blend, Cotangent, Frame, Gradients, platform
from kernels.pallas_tpu.composite import blend_tiles, blend_tiles_backward
from kernels.pallas_tpu.lists import merge, split
from kernels.pallas_tpu.members import (
    WORD,
    Split,
    count_members,
    owners,
    pack_bits,
    plan,
    tile_members,
)
from kernels.pallas_tpu.sizes import BLOCK, CHUNK, GEOMETRY, OPACITY, TILE, TILES
from kernels.projection import Splats

BLOCK_PIXELS = (BLOCK[0] * TILE, BLOCK[1] * TILE)
"""Width and height of a block of tiles."""


class TileLists(NamedTuple):
    """The splats of an image, for every tile front to back."""

    splats: Float[Array, "room R 128"]
    """Chunks as `blend_tiles` reads them."""
    starts: Int[Array, "tiles+1"]
    blocks: Split
    """How the image's splats were split among the blocks."""
    tiles: Split
    """How the blocks' splats were split among their tiles."""


def chunk_rows(
    splats: Splats, features: Float[Array, "N F"], order: Int[Array, "N"]
) -> Float[Array, "chunks R 128"]:
    """The splats of one image in chunks of 128 in the order given.

    Rows: x, y, p, q, r, opacity, two zeros, the features, a one (whose blend is the alpha), zeros.
    """
    num, channels = features.shape
    fields = [splats.means, splats.cholesky, splats.opacities[:, None]]
    width = GEOMETRY + -(-(channels + 1) // 8) * 8
    table = jnp.concatenate(
        [
            *fields,
            jnp.zeros((num, 2)),
            features,
            jnp.ones((num, 1)),
            jnp.zeros((num, width - GEOMETRY - channels - 1)),
        ],
        axis=-1,
    )
    spare = -num % CHUNK
    table = table[jnp.pad(order, (0, spare))]
    rows = rearrange(table, "(chunk lane) row -> chunk row lane", lane=CHUNK)
    # What fills up the last chunk is not drawn.
    return rows.at[-1, OPACITY, CHUNK - spare :].set(0.0) if spare else rows


def unpack_rows(rows: Float[Array, "chunks R 128"]) -> Float[Array, "R columns"]:
    """The chunks one after another."""
    return rearrange(rows, "chunk row lane -> row (chunk lane)")


def _block_members(
    rows: Float[Array, "chunks R 128"], width: int, height: int
) -> Int[Array, "chunks words 128"]:
    """Which blocks the bounding box of each splat touches."""
    table = unpack_rows(rows)
    splats = Splats(table[0:2].T, table[2:5].T, table[5], depths=jnp.zeros_like(table[5]))
    first, counts, _ = binning.tile_boxes(splats, width, height, BLOCK_PIXELS)
    across, down = binning.grid(width, height, BLOCK_PIXELS)
    first, counts = (rearrange(a, "(c lane) xy -> xy c lane", lane=CHUNK) for a in (first, counts))

    def is_inside(block: int) -> Array:
        x, y = block % across - first[0], block // across - first[1]
        return (x >= 0) & (x < counts[0]) & (y >= 0) & (y < counts[1])

    blocks = range(across * down)
    words = [
        pack_bits([is_inside(block) for block in blocks[start : start + WORD]])
        for start in range(0, across * down, WORD)
    ]
    return jnp.stack(words, axis=1)


@functools.partial(jax.jit, static_argnames="frame")
def tile_lists(
    splats: Splats, features: Float[Array, "N F"], order: Int[Array, "N"], *, frame: Frame
) -> TileLists:
    """Lists of the splats of one image, for every tile in order of blocks.

    `order` is theirs by depth; `frame.capacity` is how many entries there is room for.
    """
    width, height, _ = frame
    num_blocks = math.prod(binning.grid(width, height, BLOCK_PIXELS))
    room, tiles_room = rooms(frame)
    rows = chunk_rows(splats, features, order)
    parents = jnp.array([0, rows.shape[0]], jnp.int32)
    members = _block_members(rows, width, height)
    blocks = plan(members, count_members(members), parents, room)
    by_block = split(rows, blocks, room)

    parents = blocks.starts[: num_blocks + 1]
    members, counts = tile_members(
        by_block,
        owners(parents, len(by_block)),
        parents[-1],
        tiles=binning.grid(width, height, (TILE, TILE)),
    )
    tiles = plan(members, counts, parents, tiles_room)
    return TileLists(split(by_block, tiles, tiles_room), tiles.starts, blocks, tiles)


def rooms(frame: Frame) -> tuple[int, int]:
    """How many chunks the lists of all blocks, and those of all tiles, have room for."""
    num_blocks = math.prod(binning.grid(frame.width, frame.height, BLOCK_PIXELS))
    whole = frame.capacity // CHUNK
    return whole + num_blocks, whole + num_blocks * TILES


def _join(tiles: Float[Array, "tiles F 256"], width: int, height: int) -> Float[Array, "F H W"]:
    """Tiles, block by block, to an image, channel by channel: no few channels fill registers."""
    across, _ = binning.grid(width, height, BLOCK_PIXELS)
    image = rearrange(
        tiles,
        "(down across ty tx) f (h w) -> f (down ty h) (across tx w)",
        across=across,
        ty=BLOCK[1],
        tx=BLOCK[0],
        h=TILE,
    )
    return image[:, :height, :width]


def _cut(image: Float[Array, "F H W"], rows: int) -> Float[Array, "tiles rows 256"]:
    """Transpose of `_join`, with zeros for the `rows` that the image doesn't have."""
    features, height, width = image.shape
    across, down = binning.grid(width, height, BLOCK_PIXELS)
    padding = (0, down * BLOCK_PIXELS[1] - height), (0, across * BLOCK_PIXELS[0] - width)
    tiles = rearrange(
        jnp.pad(image, [(0, 0), *padding]),
        "f (down ty h) (across tx w) -> (down across ty tx) f (h w)",
        ty=BLOCK[1],
        tx=BLOCK[0],
        h=TILE,
        w=TILE,
    )
    return jnp.pad(tiles, [(0, 0), (0, rows - features), (0, 0)])


def _forward(splats: Splats, features: Float[Array, "images N F"], *, frame: Frame):
    """Blend a batch of images. Residuals: order by depth, and the state that ended each pixel."""
    width, height, _ = frame
    across, _ = binning.grid(width, height, BLOCK_PIXELS)
    channels = features.shape[-1]

    def one_image(inputs):
        splats, features = inputs
        index = jnp.arange(splats.depths.shape[0], dtype=jnp.int32)
        _, order = lax.sort((splats.depths, index), num_keys=1, is_stable=True)
        lists = tile_lists(splats, features, order, frame=frame)
        blended, state = blend_tiles(lists.starts, lists.splats, blocks_across=across)
        # Whole, or XLA would part the channels while they lie in tiles, whose registers they share.
        image = lax.optimization_barrier(_join(blended[:, : channels + 1], width, height))
        overflow = lists.blocks.dropped + lists.tiles.dropped
        return Blend(image[:channels], image[channels], overflow), (order, state)

    blend, residuals = lax.map(one_image, (splats, features))
    return blend._replace(features=jnp.moveaxis(blend.features, 1, -1)), residuals


def _backward(
    splats: Splats, features: Float[Array, "images N F"], residuals, cotangent: Cotangent, *,
    frame: Frame, absgrad: bool,
) -> Gradients:  # fmt: skip
    width, height, _ = frame
    across, _ = binning.grid(width, height, BLOCK_PIXELS)
    num, channels = features.shape[-2:]
    blocks_room, tiles_room = rooms(frame)

    def one_image(inputs):
        splats, features, (order, state), d_image = inputs
        lists = tile_lists(splats, features, order, frame=frame)
        d_tiles = _cut(d_image, lists.splats.shape[1] - GEOMETRY)
        d_rows = blend_tiles_backward(
            lists.starts, lists.splats, state, d_tiles, blocks_across=across, absgrad=absgrad
        )
        d_rows = merge(merge(d_rows, lists.tiles, tiles_room), lists.blocks, blocks_room)
        table = unpack_rows(d_rows)
        index = jnp.arange(num, dtype=jnp.int32)
        inverse = jnp.zeros(num, jnp.int32).at[order].set(index, unique_indices=True)
        # By a product with ones on the diagonal, which is exact: a transposition would be left to
        # whoever reads the table, which would lie in memory with registers an eighth full.
        ones = jnp.eye(len(table), dtype=table.dtype)
        return lax.dot_general(
            ones, table.T[inverse], (((1,), (1,)), ((), ())), precision=lax.Precision.HIGHEST
        )

    d_images = jnp.moveaxis(cotangent.features, -1, 1), cotangent.alpha[:, None]
    d_images = jnp.concatenate(d_images, axis=1)
    table = lax.map(one_image, (splats, features, residuals, d_images))
    geometry, d_features = table[:, :GEOMETRY], table[:, GEOMETRY : GEOMETRY + channels]
    geometry = jnp.moveaxis(geometry, 1, -1)
    return Gradients(
        means=geometry[..., 0:2],
        cholesky=geometry[..., 2:5],
        opacities=geometry[..., OPACITY],
        features=jnp.moveaxis(d_features, 1, -1),
        absgrad=geometry[..., OPACITY + 1 : GEOMETRY] if absgrad else None,
    )


def _unavailable() -> str | None:
    if platform() == "tpu":
        return None
    return (
        f"it needs a TPU and JAX's default device is {platform()}; "
        "with a TPU, `pip install 'jax[tpu]'`"
    )


BACKEND = Backend("pallas_tpu", _forward, _backward, (TILE, TILE), _unavailable)

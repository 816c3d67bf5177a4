"""Which splats go to which tiles' lists, and where in them: integers, made before anything moves.

A list of splats, a *parent*, is split into those of its *children*: an image into blocks of tiles,
a block into its tiles. A bit for every splat and child (`tile_members`, `pack_bits`) says who goes
where, and `plan` lays the children's lists out; `lists` then moves the splats.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.binning import SLACK
from kernels.pallas_tpu.products import dot, iota
from kernels.pallas_tpu.sizes import BLOCK, CHUNK, GEOMETRY, TILE, TILES
from kernels.projection import MIN_ALPHA
from kernels.varying import shape_like

WORD = 32
"""Children in a word of membership bits; their number is padded to it."""
TOGETHER = 8
"""Chunks whose members are found in one step of the grid."""
SUBLANES = 8
"""Rows of a register, all of which a product fills."""


class Split(NamedTuple):
    """Where the members of every chunk of some lists (parents) go, in lists of their children."""

    members: Int[Array, "chunks words 128"]
    """Bit f of word w: the splat goes to child 32 w + f of the chunk's parent."""
    places: Int[Array, "chunks children"]
    """Place in the children's lists, 128 * chunk + lane, where a chunk's first member goes."""
    counts: Int[Array, "chunks children"]
    """How many members a chunk has for a child."""
    parent: Int[Array, "chunks"]
    """The parent whose chunk it is."""
    used: Int[Array, ""]
    """Chunks of the parents that are in use, the first ones; at least 1: no grid is empty."""
    starts: Int[Array, "parents*children+1"]
    """The lists made: child c of parent p owns the chunks from `starts[p * children + c]`."""
    dropped: Int[Array, ""]
    """Members that did not fit into the room for the children's chunks."""


def owners(starts: Int[Array, "ends"], chunks: int) -> Int[Array, "chunks"]:
    """The list that owns each chunk; list l owns the chunks `starts[l]:starts[l + 1]`."""
    chunk = jnp.arange(chunks, dtype=jnp.int32)
    # Few lists: comparing with all their starts at once is quicker than a search's loop.
    owner = jnp.searchsorted(starts, chunk, side="right", method="compare_all") - 1
    owner = owner.astype(jnp.int32)
    return jnp.clip(owner, 0, len(starts) - 2)


def plan(
    members: Int[Array, "chunks words 128"],
    counts: Int[Array, "chunks children"],
    parents: Int[Array, "ends"],
    room: int,
) -> Split:
    """Lay out the children's lists, in `room` chunks.

    Args:
      members: see `Split`.
      counts: see `Split`; those of chunks that no parent owns don't matter.
      parents: parent p owns the chunks `parents[p]:parents[p + 1]`, p = 0, 1, ...
    """
    chunks, children = counts.shape
    used = parents[-1]
    chunk = jnp.arange(chunks, dtype=jnp.int32)
    counts = jnp.where((chunk < used)[:, None], counts, 0)
    sums = jnp.cumsum(counts, axis=0)
    at_parents = jnp.where((parents > 0)[:, None], sums[parents - 1], 0)
    lengths = (at_parents[1:] - at_parents[:-1]).reshape(-1)
    ends = jnp.cumsum(-(-lengths // CHUNK), dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])

    parent = owners(parents, chunks)
    offset = starts[:-1].reshape(-1, children) * CHUNK - at_parents[:-1]
    fitting = jnp.clip((room - starts[:-1]) * CHUNK, 0, lengths)
    return Split(
        members=members,
        places=offset[parent] + sums - counts,
        counts=counts,
        parent=parent,
        used=jnp.maximum(used, 1),
        starts=jnp.minimum(starts, room),
        dropped=jnp.sum(lengths - fitting),
    )


def count_members(members: Int[Array, "chunks words 128"]) -> Int[Array, "chunks children"]:
    """How many members each chunk has for each child: lanes that have its bit set."""
    # Four bits at a time, a byte apart: bytes hold sums up to 128.
    apart = (members[:, :, None] >> jnp.arange(8, dtype=jnp.int32)[:, None]) & 0x01010101
    sums = jnp.sum(apart, axis=-1)[:, :, None]
    counts = (sums >> jnp.arange(0, WORD, 8, dtype=jnp.int32)[:, None]) & 255
    return counts.reshape(len(members), -1)


def pack_bits(members: Sequence[Array]) -> Array:
    """Up to 32 arrays of booleans as the bits of one of int32."""
    # One after another, not along an axis: no 32 times as large an array is reduced.
    bits = (jnp.left_shift(member.astype(jnp.int32), i) for i, member in enumerate(members))
    return functools.reduce(jnp.bitwise_or, bits)


def _members_kernel(block, splats, out, counts, *, tiles):
    blocks_across = -(-tiles[0] // BLOCK[0])
    tile = iota((TILES, 1), 0)
    for i in range(splats.shape[0]):
        owner = block[pl.program_id(0) * splats.shape[0] + i]
        tile_x = lax.rem(owner, blocks_across) * BLOCK[0] + (tile & (BLOCK[0] - 1))
        tile_y = lax.div(owner, blocks_across) * BLOCK[1] + (tile >> (BLOCK[0].bit_length() - 1))
        x, y, p, q, r, opacity = (splats[i, row : row + 1] for row in range(6))
        # Offsets of the tile's first and last pixel centres from the splat's centre.
        left = (tile_x * TILE).astype(jnp.float32) + 0.5 - x
        top = (tile_y * TILE).astype(jnp.float32) + 0.5 - y
        right, bottom = left + (TILE - 1), top + (TILE - 1)
        # The smallest sigma lies on the sides that face the centre; see `binning.nearest_sigma`.
        near_x, near_y = jnp.clip(0.0, left, right), jnp.clip(0.0, top, bottom)
        y_at_x = jnp.clip(-p * q / (q * q + r * r) * near_x, top, bottom)
        x_at_y = jnp.clip(-q / p * near_y, left, right)
        on_vertical = (p * near_x + q * y_at_x) ** 2 + (r * y_at_x) ** 2
        on_horizontal = (p * x_at_y + q * near_y) ** 2 + (r * near_y) ** 2
        sigma = 0.5 * jnp.minimum(on_vertical, on_horizontal)
        reach = jnp.log(jnp.maximum(opacity, MIN_ALPHA) / MIN_ALPHA) + SLACK
        inside = (opacity >= MIN_ALPHA) & (sigma <= reach)
        inside &= (tile_x < tiles[0]) & (tile_y < tiles[1])
        bits = jnp.where(inside, jnp.left_shift(1, tile), 0)
        out[i] = jnp.sum(bits, axis=0, keepdims=True)
        ones = inside.astype(jnp.float32).astype(jnp.bfloat16)
        summed = dot(jnp.ones((SUBLANES, CHUNK), jnp.bfloat16), ones, (1, 1))
        counts[i : i + 1] = summed[:1].astype(jnp.int32)


def tile_members(
    splats: Float[Array, "chunks R 128"],
    block: Int[Array, "chunks"],
    used: Int[Array, ""],
    *,
    tiles: tuple[int, int],
) -> tuple[Int[Array, "chunks 1 128"], Int[Array, "chunks 32"]]:
    """Which tiles of its block each splat touches, tested with the ellipse, and how many do.

    As `Split.members` and `Split.counts`.

    Args:
      splats: rows x, y, p, q, r, opacity, and others.
      block: the block that a chunk belongs to.
      used: chunks in use, the first ones; what is said of the others is undefined.
      tiles: tiles across and down the image. A block's tiles outside of it are touched by nothing.
    """
    chunks = splats.shape[0]
    return pl.pallas_call(
        functools.partial(_members_kernel, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(lax.div(jnp.maximum(used, 1) + TOGETHER - 1, TOGETHER),),
            in_specs=[pl.BlockSpec((TOGETHER, GEOMETRY, CHUNK), lambda step, _: (step, 0, 0))],
            out_specs=[
                pl.BlockSpec((TOGETHER, 1, CHUNK), lambda step, _: (step, 0, 0)),
                pl.BlockSpec((TOGETHER, TILES), lambda step, _: (step, 0)),
            ],
        ),
        out_shape=[
            shape_like(splats, chunks, 1, CHUNK, dtype=jnp.int32),
            shape_like(splats, chunks, TILES, dtype=jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="tile_members",
    )(jnp.pad(block, (0, -chunks % TOGETHER)), splats)

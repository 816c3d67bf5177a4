"""Lists of splats for every tile, made on a TPU's matrix unit instead of by sorting and gathering.

TPUs have no fast scatter or gather, and sorting every (tile, splat) pair moves far more than it
needs to. Here the splats of an image are sorted by depth once, and then *split*: from a list, in
order, into the lists of its children. The image is split into blocks of tiles, and a block into its
tiles.

Lists are kept in *chunks* of 128 splats, [rows, 128] each. To append the members of a chunk to a
child's list is to multiply the chunk by a 0-1 matrix with a column for every place in the child's
open chunk: [rows, 128] x [128, 128] on the MXU, exact in float32, as the splats are split
in three bfloat16 (see `composite`). Where everybody goes is integer arithmetic in XLA beforehand
(`plan`), from a bit for every splat and child.

`merge` is the transpose of `split`: it adds the children's gradients up in the order of the
parent, by the same 0-1 matrices. There are no atomics: the sums' bits are the same every time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.binning import SLACK
from kernels.pallas_tpu.composite import (
    BLOCK,
    CHUNK,
    GEOMETRY,
    TILE,
    TILES,
    dot,
    stack_bfloat16,
    sum_parts,
)
from kernels.projection import MIN_ALPHA
from kernels.varying import shape_like

GROUP = 4
"""Children whose 0-1 matrices make one product."""
WORD = 32
"""Children in a word of membership bits; their number is padded to it."""
BUFFERS = 8
"""Chunks on their way to HBM."""
TOGETHER = 8
"""Chunks whose members are found in one step of the grid."""


class Split(NamedTuple):
    """Where the members of every chunk of some lists (parents) go, in lists of their children."""

    members: Int[Array, "chunks words 128"]
    """Bit f of word w: the splat goes to child 32 w + f of the chunk's parent."""
    places: Int[Array, "chunks 1 children"]
    """Place in the children's lists, 128 * chunk + lane, where a chunk's first member goes."""
    counts: Int[Array, "chunks 1 children"]
    """How many members a chunk has for a child."""
    parent: Int[Array, "chunks"]
    """The parent whose chunk it is."""
    used: Int[Array, ""]
    """Chunks of the parents that are in use, the first ones; at least 1: no grid is empty."""
    starts: Int[Array, "parents*children+1"]
    """The lists made: child c of parent p owns the chunks from `starts[p * children + c]`."""
    dropped: Int[Array, ""]
    """Members that did not fit into the room for the children's chunks."""


def owners(starts: Int[Array, "lists+1"], chunks: int) -> Int[Array, "chunks"]:
    """The list that owns each chunk; list l owns the chunks `starts[l]:starts[l + 1]`."""
    chunk = jnp.arange(chunks, dtype=jnp.int32)
    owner = jnp.searchsorted(starts, chunk, side="right").astype(jnp.int32) - 1
    return jnp.clip(owner, 0, len(starts) - 2)


def plan(
    members: Int[Array, "chunks words 128"], parents: Int[Array, "parents+1"], room: int
) -> Split:
    """Lay out the children's lists, in `room` chunks.

    Args:
      members: see `Split`.
      parents: parent p owns the chunks `parents[p]:parents[p + 1]`, p = 0, 1, ...
    """
    chunks, words, _ = members.shape
    children = words * WORD
    used = parents[-1]
    chunk = jnp.arange(chunks, dtype=jnp.int32)
    bits = (members[:, :, None] >> jnp.arange(WORD, dtype=jnp.int32)[:, None]) & 1
    counts = jnp.sum(bits, axis=-1).reshape(chunks, children)
    counts = jnp.where((chunk < used)[:, None], counts, 0)
    before = jnp.concatenate([jnp.zeros((1, children), jnp.int32), jnp.cumsum(counts, axis=0)])
    at_parents = before[parents]
    lengths = (at_parents[1:] - at_parents[:-1]).reshape(-1)
    ends = jnp.cumsum(-(-lengths // CHUNK), dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])

    parent = owners(parents, chunks)
    base = starts[:-1].reshape(-1, children)[parent] * CHUNK
    fitting = jnp.clip((room - starts[:-1]) * CHUNK, 0, lengths)
    return Split(
        members=members,
        places=(base + before[:-1] - at_parents[parent])[:, None],
        counts=counts[:, None],
        parent=parent,
        used=jnp.maximum(used, 1),
        starts=jnp.minimum(starts, room),
        dropped=jnp.sum(lengths - fitting),
    )


def _iota(shape: tuple[int, int], axis: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def pack_bits(members: Array) -> Array:
    """Up to 32 booleans along the first axis as the bits of one int32."""
    place = lax.broadcasted_iota(jnp.int32, members.shape, 0)
    return jnp.sum(jnp.where(members, jnp.left_shift(1, place), 0), axis=0, dtype=jnp.int32)


def _members_kernel(block, splats, out, *, tiles):
    blocks_across = -(-tiles[0] // BLOCK[0])
    tile = _iota((TILES, 1), 0)
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


def tile_members(
    splats: Float[Array, "chunks R 128"],
    block: Int[Array, "chunks"],
    used: Int[Array, ""],
    *,
    tiles: tuple[int, int],
) -> Int[Array, "chunks 1 128"]:
    """Which tiles of its block each splat touches, tested with the ellipse, as `Split.members`.

    Args:
      splats: rows x, y, p, q, r, opacity, and others.
      block: the block that a chunk belongs to.
      used: chunks in use, the first ones; members of the others are undefined.
      tiles: tiles across and down the image. A block's tiles outside of it are touched by nothing.
    """
    chunks = splats.shape[0]
    return pl.pallas_call(
        functools.partial(_members_kernel, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(lax.div(jnp.maximum(used, 1) + TOGETHER - 1, TOGETHER),),
            in_specs=[pl.BlockSpec((TOGETHER, GEOMETRY, CHUNK), lambda step, _: (step, 0, 0))],
            out_specs=pl.BlockSpec((TOGETHER, 1, CHUNK), lambda step, _: (step, 0, 0)),
        ),
        out_shape=shape_like(splats, chunks, 1, CHUNK, dtype=jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="tile_members",
    )(jnp.pad(block, (0, -chunks % TOGETHER)), splats)


def _rank_members(members, ranks):
    """Write to `ranks` [children, 128] how many earlier lanes go to the same child, or -256 if the
    lane itself doesn't."""
    earlier = (_iota((CHUNK, CHUNK), 0) < _iota((CHUNK, CHUNK), 1)).astype(jnp.float32)
    for word in range(members.shape[1]):
        member = (members[0, word : word + 1] >> _iota((WORD, CHUNK), 0)) & 1
        ones = member.astype(jnp.float32).astype(jnp.bfloat16)
        rank = dot(ones, earlier.astype(jnp.bfloat16), (1, 0)).astype(jnp.int32)
        ranks[word * WORD : (word + 1) * WORD] = jnp.where(member == 1, rank, -2 * CHUNK)


def _one_hot(places: Int[Array, "1 128"]) -> Array:
    """[128, 128] with a 1 in (row j, lane i) if lane i's place is j."""
    return (_iota((CHUNK, CHUNK), 0) == places).astype(jnp.float32)


def _targets(child, places, ranks) -> Int[Array, "1 128"]:
    """Lanes of the child's open chunk (or, from 128, of the next) that a chunk's splats go to."""
    return ranks[pl.ds(child, 1)] + (places[0, 0, child] & (CHUNK - 1))


def _crosses(child, places, counts) -> Array:
    """Whether a chunk's members reach the end of the child's open chunk."""
    return (places[0, 0, child] & (CHUNK - 1)) + counts[0, 0, child] >= CHUNK


def _split_kernel(
    parent, rows, members, places, counts, out, ranks, growing, leaving, sent, semaphores
):
    chunk = pl.program_id(0)
    children, room = counts.shape[-1], out.shape[0]

    def send(slot, target):
        return pltpu.make_async_copy(leaving.at[slot], out.at[target], semaphores.at[slot])

    def close(child, target):
        """Send a child's full chunk to its place in HBM."""

        @pl.when(target < room)
        def _():
            number = sent[0]
            slot = lax.rem(number, BUFFERS)
            pl.when(number >= BUFFERS)(lambda: send(slot, target).wait())
            leaving[slot] = growing[child]
            send(slot, target).start()
            sent[0] = number + 1

    @pl.when(chunk == 0)
    def _():
        sent[0] = 0

    @pl.when((chunk == 0) | (parent[chunk] != parent[jnp.maximum(chunk - 1, 0)]))
    def _():
        growing[...] = jnp.zeros_like(growing)

    _rank_members(members, ranks)
    splats3 = stack_bfloat16(rows[0])

    def place_group(group, _):
        family = [group * GROUP + i for i in range(GROUP)]

        @pl.when(sum(counts[0, 0, child] for child in family) > 0)
        def _():
            targets = [_targets(child, places, ranks) for child in family]
            matrix = jnp.concatenate([_one_hot(target) for target in targets], axis=0)
            placed = sum_parts(dot(splats3, matrix.astype(jnp.bfloat16), (1, 1)))
            for i, child in enumerate(family):
                growing[child] += placed[:, i * CHUNK : (i + 1) * CHUNK]
            for target, child in zip(targets, family, strict=True):

                @pl.when(_crosses(child, places, counts))
                def _(target=target, child=child):
                    close(child, places[0, 0, child] >> 7)
                    matrix = _one_hot(target - CHUNK).astype(jnp.bfloat16)
                    growing[child] = sum_parts(dot(splats3, matrix, (1, 1)))

        return 0

    lax.fori_loop(0, children // GROUP, place_group, 0)

    end = pl.num_programs(0)
    last = (chunk + 1 == end) | (parent[chunk] != parent[jnp.minimum(chunk + 1, end - 1)])

    @pl.when(last)
    def _():
        def close_rest(child, _):
            place = places[0, 0, child] + counts[0, 0, child]
            pl.when((place & (CHUNK - 1)) > 0)(lambda: close(child, place >> 7))
            return 0

        lax.fori_loop(0, children, close_rest, 0)

    @pl.when(chunk + 1 == end)
    def _():
        for slot in range(BUFFERS):
            pl.when(sent[0] > slot)(lambda slot=slot: send(slot, 0).wait())


def _specs(rows: int, words: int):
    """Blocks of one chunk: its rows, members, places and counts."""

    def one(shape, **kwargs):
        return pl.BlockSpec((1, *shape), lambda chunk, *_: (chunk, 0, 0), **kwargs)

    scalars = one((1, words * WORD), memory_space=pltpu.SMEM)
    return one((rows, CHUNK)), one((words, CHUNK)), scalars, scalars


def split(
    splats: Float[Array, "chunks R 128"], how: Split, room: int
) -> Float[Array, "room R 128"]:
    """The children's lists of splats.

    Lanes past a list's end are 0; chunks that no list owns are undefined.
    """
    _, rows, _ = splats.shape
    words = how.members.shape[1]
    children = words * WORD
    return pl.pallas_call(
        _split_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(how.used,),
            in_specs=_specs(rows, words),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((children, CHUNK), jnp.int32),
                pltpu.VMEM((children, rows, CHUNK), jnp.float32),
                pltpu.VMEM((BUFFERS, rows, CHUNK), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
            ],
        ),
        out_shape=shape_like(splats, room, rows, CHUNK),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="split_lists",
    )(how.parent, splats, how.members, how.places, how.counts)


def _merge_kernel(
    parent, starts, gradients, members, places, counts, out, ranks, current, coming, semaphores
):
    chunk = pl.program_id(0)
    children = counts.shape[-1]
    room = gradients.shape[0]

    def fetch(child, target):
        return pltpu.make_async_copy(gradients.at[target], coming.at[child], semaphores.at[child])

    def end_of(child):
        return starts[parent[chunk] * children + child + 1]

    def enter(child, target):
        """Make a fetched chunk of the child's list the current one, and fetch the next."""

        @pl.when(target < room)
        def _():
            fetch(child, target).wait()
            current[child] = stack_bfloat16(coming[child])
            pl.when(target + 1 < end_of(child))(lambda: fetch(child, target + 1).start())

        @pl.when(target >= room)
        def _():
            current[child] = jnp.zeros_like(current[child])

    @pl.when((chunk == 0) | (parent[chunk] != parent[jnp.maximum(chunk - 1, 0)]))
    def _():
        current[...] = jnp.zeros_like(current)

        def begin(child, _):
            first = starts[parent[chunk] * children + child]
            pl.when(first < end_of(child))(lambda: fetch(child, first).start())
            return 0

        lax.fori_loop(0, children, begin, 0)

    _rank_members(members, ranks)
    out[...] = jnp.zeros_like(out)

    def gather_group(group, _):
        family = [group * GROUP + i for i in range(GROUP)]

        @pl.when(sum(counts[0, 0, child] for child in family) > 0)
        def _():
            for child in family:
                place = places[0, 0, child]
                opens = (counts[0, 0, child] > 0) & ((place & (CHUNK - 1)) == 0)
                pl.when(opens)(lambda child=child, place=place: enter(child, place >> 7))
            targets = [_targets(child, places, ranks) for child in family]
            matrix = jnp.concatenate([_one_hot(target) for target in targets], axis=0)
            rows = jnp.concatenate([current[child] for child in family], axis=1)
            out[0] += sum_parts(dot(rows, matrix.astype(jnp.bfloat16), (1, 0)))
            for target, child in zip(targets, family, strict=True):
                place, count = places[0, 0, child], counts[0, 0, child]

                @pl.when((place & (CHUNK - 1)) + count > CHUNK)
                def _(target=target, child=child, place=place):
                    enter(child, (place >> 7) + 1)
                    matrix = _one_hot(target - CHUNK).astype(jnp.bfloat16)
                    out[0] += sum_parts(dot(current[child], matrix, (1, 0)))

        return 0

    lax.fori_loop(0, children // GROUP, gather_group, 0)


def merge(gradients: Float[Array, "room R 128"], how: Split) -> Float[Array, "chunks R 128"]:
    """Transpose of `split`: each splat of the parents gets the sum over its children's lists.

    Chunks of the parents that aren't in use are undefined.
    """
    _, rows, _ = gradients.shape
    chunks, words, _ = how.members.shape
    children = words * WORD
    chunk_rows, members, places, counts = _specs(rows, words)
    return pl.pallas_call(
        _merge_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(how.used,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY), members, places, counts],
            out_specs=chunk_rows,
            scratch_shapes=[
                pltpu.VMEM((children, CHUNK), jnp.int32),
                pltpu.VMEM((children, 3 * rows, CHUNK), jnp.bfloat16),
                pltpu.VMEM((children, rows, CHUNK), jnp.float32),
                pltpu.SemaphoreType.DMA((children,)),
            ],
        ),
        out_shape=shape_like(gradients, chunks, rows, CHUNK),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="merge_lists",
    )(how.parent, how.starts, gradients, how.members, how.places, how.counts)

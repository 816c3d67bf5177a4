"""Lists of splats for every tile, made on a TPU's matrix unit instead of by sorting and gathering.

TPUs have no fast scatter or gather, and sorting every (tile, splat) pair moves far more than it
needs to. Here the splats of an image are sorted by depth once, and then *split*: from a list, in
order, into the lists of its children. The image is split into blocks of tiles, and a block into its
tiles.

Lists are kept in *chunks* of 128 splats, [rows, 128] each. To append the members of a chunk to a
child's list is to multiply the chunk by a 0-1 matrix with a column for every place in the child's
open chunk: [rows, 128] x [128, 128] on the MXU, exact in float32, as the splats are split
in three bfloat16 (see `products`). Where everybody goes is known beforehand (see `members`).

`merge` is the transpose of `split`: it adds the children's gradients up in the order of the
parent, by the same 0-1 matrices. There are no atomics: the sums' bits are the same every time.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.pallas_tpu.members import WORD, Split
from kernels.pallas_tpu.products import dot, iota, stack_bfloat16, sum_parts
from kernels.pallas_tpu.sizes import CHUNK
from kernels.varying import shape_like

GROUP = 4
"""Children whose 0-1 matrices make one product."""
BUFFERS = 8
"""Chunks on their way to HBM."""
SCALAR_ROWS = 8
"""Chunks whose places and counts are fetched at a time: a row of tiles, as they lie in memory."""


def _rank_members(members, ranks):
    """Write to `ranks` [children, 128] how many earlier lanes go to the same child, or -256 if the
    lane itself doesn't."""
    earlier = (iota((CHUNK, CHUNK), 0) < iota((CHUNK, CHUNK), 1)).astype(jnp.float32)
    for word in range(members.shape[1]):
        member = (members[0, word : word + 1] >> iota((WORD, CHUNK), 0)) & 1
        ones = member.astype(jnp.float32).astype(jnp.bfloat16)
        rank = dot(ones, earlier.astype(jnp.bfloat16), (1, 0)).astype(jnp.int32)
        ranks[word * WORD : (word + 1) * WORD] = jnp.where(member == 1, rank, -2 * CHUNK)


def _one_hot(places: Int[Array, "1 128"]) -> Array:
    """[128, 128] with a 1 in (row j, lane i) if lane i's place is j."""
    return (iota((CHUNK, CHUNK), 0) == places).astype(jnp.float32)


def _targets(child, place, ranks) -> Int[Array, "1 128"]:
    """Lanes of the child's open chunk (or, from 128, of the next) that a chunk's splats go to."""
    return ranks[pl.ds(child, 1)] + (place & (CHUNK - 1))


def _split_kernel(
    parent, rows, members, places, counts, out, ranks, growing, leaving, sent, semaphores, *, room
):
    chunk = pl.program_id(0)
    row = lax.rem(chunk, SCALAR_ROWS)
    children = counts.shape[-1]

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

        @pl.when(sum(counts[row, child] for child in family) > 0)
        def _():
            targets = [_targets(child, places[row, child], ranks) for child in family]
            matrix = jnp.concatenate([_one_hot(target) for target in targets], axis=0)
            placed = sum_parts(dot(splats3, matrix.astype(jnp.bfloat16), (1, 1)))
            for i, child in enumerate(family):
                growing[child] += placed[:, i * CHUNK : (i + 1) * CHUNK]
            for target, child in zip(targets, family, strict=True):
                # The members reach the end of the child's open chunk.
                @pl.when((places[row, child] & (CHUNK - 1)) + counts[row, child] >= CHUNK)
                def _(target=target, child=child):
                    close(child, places[row, child] >> 7)
                    matrix = _one_hot(target - CHUNK).astype(jnp.bfloat16)
                    growing[child] = sum_parts(dot(splats3, matrix, (1, 1)))

        return 0

    lax.fori_loop(0, children // GROUP, place_group, 0)

    end = pl.num_programs(0)
    last = (chunk + 1 == end) | (parent[chunk] != parent[jnp.minimum(chunk + 1, end - 1)])

    @pl.when(last)
    def _():
        def close_rest(child, _):
            place = places[row, child] + counts[row, child]
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

    scalars = pl.BlockSpec(
        (SCALAR_ROWS, words * WORD),
        lambda chunk, *_: (lax.div(chunk, SCALAR_ROWS), 0),
        memory_space=pltpu.SMEM,
    )
    return one((rows, CHUNK)), one((words, CHUNK)), scalars, scalars


def split(
    splats: Float[Array, "chunks R 128"], how: Split, room: int
) -> Float[Array, "lists R 128"]:
    """The children's lists of splats, in the first `room` chunks.

    Lanes past a list's end are 0; chunks that no list owns are undefined. Some follow that none can
    own: XLA sums up whole registers' worth of chunks without copies.
    """
    _, rows, _ = splats.shape
    words = how.members.shape[1]
    children = words * WORD
    return pl.pallas_call(
        functools.partial(_split_kernel, room=room),
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
        out_shape=shape_like(splats, -(-room // CHUNK) * CHUNK, rows, CHUNK),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="split_lists",
    )(how.parent, splats, how.members, how.places, how.counts)


def _merge_kernel(
    parent, starts, gradients, members, places, counts, out, ranks, current, coming, semaphores,
    *, room,
):  # fmt: skip
    chunk = pl.program_id(0)
    row = lax.rem(chunk, SCALAR_ROWS)
    children = counts.shape[-1]

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

        @pl.when(sum(counts[row, child] for child in family) > 0)
        def _():
            for child in family:
                place = places[row, child]
                opens = (counts[row, child] > 0) & ((place & (CHUNK - 1)) == 0)
                pl.when(opens)(lambda child=child, place=place: enter(child, place >> 7))
            targets = [_targets(child, places[row, child], ranks) for child in family]
            matrix = jnp.concatenate([_one_hot(target) for target in targets], axis=0)
            rows = jnp.concatenate([current[child] for child in family], axis=1)
            out[0] += sum_parts(dot(rows, matrix.astype(jnp.bfloat16), (1, 0)))
            for target, child in zip(targets, family, strict=True):
                place, count = places[row, child], counts[row, child]

                @pl.when((place & (CHUNK - 1)) + count > CHUNK)
                def _(target=target, child=child, place=place):
                    enter(child, (place >> 7) + 1)
                    matrix = _one_hot(target - CHUNK).astype(jnp.bfloat16)
                    out[0] += sum_parts(dot(current[child], matrix, (1, 0)))

        return 0

    lax.fori_loop(0, children // GROUP, gather_group, 0)


def merge(
    gradients: Float[Array, "lists R 128"], how: Split, room: int
) -> Float[Array, "chunks R 128"]:
    """Transpose of `split`: each splat of the parents gets the sum over its children's lists.

    Chunks of the parents that aren't in use are undefined.
    """
    _, rows, _ = gradients.shape
    chunks, words, _ = how.members.shape
    children = words * WORD
    chunk_rows, members, places, counts = _specs(rows, words)
    return pl.pallas_call(
        functools.partial(_merge_kernel, room=room),
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

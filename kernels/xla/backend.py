"""The `xla` backend: blending in pure JAX. It runs wherever JAX does, and is made for CPUs.

The image is cut into tiles of 8x8 pixels, which are sorted by the length of their lists and blended
in blocks. A block runs through its lists by chunks, so that all it works on stays in a core's
cache, and a tile waits only for tiles about as long as itself; it stops once all its pixels are
opaque. The backward pass goes through the same chunks from the back, starting from the
transmittance that each pixel ended with and adding up what lies behind each splat: nothing is
subtracted, so a bright splat in front costs those behind it no accuracy.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Int

from kernels import binning
from kernels.backends import Backend, Blend, Cotangent, Frame, Gradients
from kernels.binning import Bins
from kernels.projection import MAX_ALPHA, MIN_TRANSMITTANCE, Splats
from kernels.xla.tiles import (
    CHUNK,
    PIXELS,
    TILE,
    absolute_gradients,
    einsum,
    from_moments,
    load_chunk,
    make_blocks,
    make_rows,
    make_table,
)

MIN_SORT = 8192
"""Slots of an image below which it isn't worth while to sort fewer."""
CPU_BLOCK = 64
"""Tiles blended at a time: 256 KiB an array of a chunk, which a CPU core's cache holds."""
BLOCK = 8192
"""The same for accelerators, which want all the parallelism there is."""


class Residuals(NamedTuple):
    """What the backward pass needs: the sorted intersections, and how each tile's pixels ended."""

    bins: Bins
    transmittance: Float[Array, "images tiles P"]
    """Of each pixel in the end."""
    reached: Int[Array, "images tiles P"]
    """How many of its tile's intersections a pixel went past, those it skipped included."""


def forward(
    splats: Splats, features: Float[Array, "images N F"], *, frame: Frame
) -> tuple[Blend, Residuals]:
    """See `backends.Backend`."""
    binning.check_rows(len(splats.depths), frame.capacity)
    bins = _sort(splats, frame)
    blend = functools.partial(_blend, width=frame.width, height=frame.height)
    blended, alpha, transmittance, reached = lax.platform_dependent(
        make_table(splats, features),
        bins,
        cpu=functools.partial(blend, block=CPU_BLOCK),
        default=functools.partial(blend, block=BLOCK),
    )
    return Blend(blended, alpha, bins.overflow), Residuals(bins, transmittance, reached)


def backward(
    splats: Splats, features: Float[Array, "images N F"], residuals: Residuals,
    cotangent: Cotangent, *, frame: Frame, absgrad: bool,
) -> Gradients:  # fmt: skip
    """See `backends.Backend`."""
    del frame
    num = splats.depths.shape[1]
    # XLA adds duplicate indices in order on a CPU, but in any order on accelerators: there each
    # intersection has its own row, which are summed in a fixed order afterwards.
    differentiate = functools.partial(_differentiate, absgrad=absgrad)
    gradients = lax.platform_dependent(
        make_table(splats, features),
        residuals,
        *cotangent,
        cpu=functools.partial(differentiate, block=CPU_BLOCK, add=True),
        default=functools.partial(differentiate, block=BLOCK, add=False),
    )
    means, cholesky, opacities, d_features, absolute = jnp.split(
        rearrange(gradients, "(b n) d -> b n d", n=num),
        [2, 5, 6, 6 + features.shape[-1]],
        axis=-1,
    )
    return Gradients(means, cholesky, opacities[..., 0], d_features, absolute if absgrad else None)


def _sort(splats: Splats, frame: Frame) -> Bins:
    """Sorted intersections; of the capacity, no more than twice of what is needed costs time."""
    width, height, capacity = frame
    size = {"width": width, "height": height, "tile": TILE}

    def sort(splats, slots):
        bins = binning.sort_images(splats, capacity=slots, **size)
        padding = ((0, 0), (0, capacity - slots))
        return bins._replace(
            splats=jnp.pad(bins.splats, padding), slots=jnp.pad(bins.slots, padding)
        )

    sizes = [capacity]
    while sizes[-1] >= 2 * MIN_SORT:
        sizes.append(-(-sizes[-1] // 2))
    needed = jnp.max(jax.vmap(functools.partial(binning.count_slots, **size))(splats))
    smallest = sum((needed <= slots).astype(jnp.int32) for slots in sizes[1:])
    return lax.switch(
        jnp.asarray(smallest, jnp.int32),
        [functools.partial(sort, slots=slots) for slots in sizes],
        splats,
    )


def _blend(table: Float[Array, "rows columns"], bins: Bins, *, width: int, height: int, block: int):
    """Features [images, H, W, F] and alpha [images, H, W] of all images, and `Residuals`' rest."""
    across, down = binning.grid(width, height, TILE)
    images, features = len(bins.starts), table.shape[1] - 6
    rows = make_rows(bins, len(table) // images)
    blocks = make_blocks(bins, across, down, block)

    def blend_block(block):
        def blend_chunk(state):
            done, transmittance, reached, total = state
            chunk = load_chunk(table, rows, block, done)

            def step(state, alpha):
                before, reached = state
                after = before * (1.0 - alpha)
                blended = after > MIN_TRANSMITTANCE
                # A pixel that has ended keeps its transmittance, as a negative number.
                state = jnp.where(blended, after, -jnp.abs(before)), reached + blended
                return state, jnp.where(blended, alpha * before, 0.0)

            (transmittance, reached), weights = lax.scan(
                step, (transmittance, reached), chunk.alpha
            )
            # A last feature of 1 sums the weights.
            blended = jnp.pad(chunk.splat[..., 6:], [(0, 0), (0, 0), (0, 1)], constant_values=1.0)
            total = total + einsum("kmp,kmf->mfp", weights, blended)
            return done + CHUNK, transmittance, reached, total

        # Made of the input, so that under shard_map they vary over the mesh as the input does.
        none = jnp.zeros((1, PIXELS), jnp.int32) + 0 * block.lengths[:, None]
        zeros = jnp.zeros((1, features + 1, 1), jnp.float32) + none[:, None]
        start = (0, none + 1.0, none, zeros)
        longest = jnp.max(block.lengths)

        def unfinished(state):
            return (state[0] < longest) & (jnp.max(state[1]) > MIN_TRANSMITTANCE)

        return lax.while_loop(unfinished, blend_chunk, start)[1:]

    place = jnp.argsort(blocks.tiles.reshape(-1))[: images * across * down]
    transmittance, reached, total = (
        rearrange(a, "blocks m ... -> (blocks m) ...")[place] for a in lax.map(blend_block, blocks)
    )
    image = rearrange(
        total, "(b d a) f (h w) -> b (d h) (a w) f", b=images, d=down, h=TILE[1], w=TILE[0]
    )[:, :height, :width]
    transmittance, reached = (
        rearrange(a, "(b t) p -> b t p", b=images) for a in (jnp.abs(transmittance), reached)
    )
    return image[..., :-1], image[..., -1], transmittance, reached


def _differentiate(
    table: Float[Array, "rows columns"],
    residuals: Residuals,
    d_features: Float[Array, "images H W F"],
    d_alpha: Float[Array, "images H W"],
    *,
    block: int,
    add: bool,
    absgrad: bool,
) -> Float[Array, "rows gradients"]:
    """Gradients of the table's rows: mean (2), Cholesky factor (3), opacity and features.

    With `absgrad` two columns more (`backends.Gradients`).
    """
    height, width = d_alpha.shape[1:]
    across, down = binning.grid(width, height, TILE)
    bins = residuals.bins
    images, capacity = bins.splats.shape
    rows = make_rows(bins, len(table) // images)
    columns = table.shape[1] + 2 * absgrad
    blocks = make_blocks(bins, across, down, block)

    def cut(image: Float[Array, "images H W F"]) -> Float[Array, "tiles P F"]:
        margins = ((0, 0), (0, down * TILE[1] - height), (0, across * TILE[0] - width), (0, 0))
        tiles = rearrange(
            jnp.pad(image, margins),
            "b (d h) (a w) f -> (b d a) (h w) f",
            h=TILE[1],
            w=TILE[0],
        )
        return tiles

    d_image = cut(jnp.concatenate([d_features, d_alpha[..., None]], -1))
    d_image, transmittances, reached_of_all = (
        jnp.pad(a, [(0, blocks.tiles.size - len(a))] + [(0, 0)] * (a.ndim - 1))
        for a in (
            d_image,
            residuals.transmittance.reshape(-1, PIXELS),
            residuals.reached.reshape(-1, PIXELS),
        )
    )

    def differentiate_block(gradients, block):
        d_blended, d_weight = d_image[block.tiles, :, :-1], d_image[block.tiles, :, -1]
        reached = reached_of_all[block.tiles]

        def differentiate_chunk(state):
            done, transmittance, behind, gradients = state
            done = done - CHUNK
            chunk = load_chunk(table, rows, block, done)
            # A splat's value: the loss's derivative by its weight in the pixel.
            value = einsum("kmf,mpf->kmp", chunk.splat[..., 6:], d_blended) + d_weight

            def step(state, xs):
                (after, behind), (alpha, value, number) = state, xs
                alpha = jnp.where(number < reached, alpha, 0.0)
                before = after / (1.0 - alpha)
                weight = alpha * before
                shaded = weight * value
                # dL/dsigma = -alpha dL/dalpha; alpha / (1 - alpha) is weight / after.
                d_sigma = jnp.where(alpha < MAX_ALPHA, behind * (weight / after) - shaded, 0.0)
                return (before, behind + shaded), (weight, d_sigma)

            (transmittance, behind), (weight, d_sigma) = lax.scan(
                step,
                (transmittance, behind),
                (chunk.alpha, value, done + jnp.arange(CHUNK, dtype=jnp.int32)),
                reverse=True,
            )
            d_splat = jnp.concatenate(
                [
                    from_moments(d_sigma, chunk),
                    einsum("kmp,mpf->kmf", weight, d_blended),
                    *([absolute_gradients(d_sigma, chunk)] if absgrad else []),
                ],
                -1,
            ).reshape(-1, columns)
            if add:
                gradients = gradients.at[chunk.rows.reshape(-1)].add(d_splat)
            else:
                place = bins.slots.reshape(-1)[chunk.places] + chunk.places // capacity * capacity
                place = jnp.where(chunk.live, place, images * capacity).reshape(-1)
                gradients = gradients.at[place].set(d_splat, mode="drop")
            return done, transmittance, behind, gradients

        # Tiles that only pad have no transmittance, and nothing to divide.
        transmittance = jnp.maximum(transmittances[block.tiles], MIN_TRANSMITTANCE)
        end = -(-jnp.max(reached) // CHUNK) * CHUNK
        start = (end, transmittance, 0 * transmittance, gradients)
        return lax.while_loop(lambda state: state[0] > 0, differentiate_chunk, start)[3], None

    size = len(table) if add else images * capacity
    gradients = jnp.zeros((size, columns)) + 0 * blocks.lengths[0, 0]
    gradients, _ = lax.scan(differentiate_block, gradients, blocks)
    if add:
        return gradients
    gradients = rearrange(gradients, "(b c) d -> b c d", b=images)
    return rearrange(jax.vmap(binning.sum_by_splat)(gradients, bins), "b n d -> (b n) d")


BACKEND = Backend("xla", forward, backward, TILE, unavailable=lambda: None)

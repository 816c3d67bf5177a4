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
from jaxtyping import Array, Bool, Float, Int

from kernels import binning
from kernels.binning import Bins
from kernels.projection import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, Splats
from kernels.rasterizer import Backend, Blend

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

TILE = (8, 8)
PIXELS = TILE[0] * TILE[1]
CHUNK = 16
"""Splats of each tile that are blended at a time."""
CPU_BLOCK = 64
"""Tiles blended at a time: 256 KiB an array of a chunk, which a CPU core's cache holds."""
BLOCK = 8192
"""The same for accelerators, which want all the parallelism there is."""


class _Blocks(NamedTuple):
    """The tiles of all images, longest list first, in blocks; padded with empty tiles."""

    tiles: Int[Array, "blocks M"]
    """Tile number, counting through all images."""
    starts: Int[Array, "blocks M"]
    """First of the tile's intersections, counting through all images."""
    lengths: Int[Array, "blocks M"]
    centres: Float[Array, "blocks M 2"]
    """Middle of the tile in pixels."""


class Residuals(NamedTuple):
    """What the backward pass needs: the sorted intersections, and how each tile's pixels ended."""

    bins: Bins
    transmittance: Float[Array, "images tiles P"]
    """Of each pixel in the end."""
    reached: Int[Array, "images tiles P"]
    """How many of its tile's intersections a pixel went past, those it skipped included."""


class _Chunk(NamedTuple):
    """The next K splats of each of a block's M tiles."""

    alpha: Float[Array, "K M P"]
    """0 where the splat is skipped."""
    splat: Float[Array, "K M 6+F"]
    """Rows of the table; past a list's end any, with opacity 0."""
    live: Bool[Array, "K M"]
    """False past a list's end."""
    places: Int[Array, "K M"]
    """Which intersection it is, counting through all images."""
    rows: Int[Array, "K M"]
    """Which row of the table."""
    offset: Float[Array, "K M 2"]
    """Tile's centre less the splat's (dx, dy)."""
    whitened: Float[Array, "K M 2"]
    """The same, whitened (u, v): sigma at the tile's centre is (u^2 + v^2) / 2."""


def forward(splats: Splats, *, width: int, height: int, capacity: int) -> tuple[Blend, Residuals]:
    """See `rasterizer.Backend`."""
    bins = _sort(splats, width=width, height=height, capacity=capacity)
    blend = functools.partial(_blend, width=width, height=height)
    features, alpha, transmittance, reached = lax.platform_dependent(
        splats,
        bins,
        cpu=functools.partial(blend, block=CPU_BLOCK),
        default=functools.partial(blend, block=BLOCK),
    )
    return Blend(features, alpha, bins.overflow), Residuals(bins, transmittance, reached)


def backward(
    splats: Splats,
    blend: Blend,
    residuals: Residuals,
    d_features: Float[Array, "images H W F"],
    d_alpha: Float[Array, "images H W"],
    *,
    width: int,
    height: int,
    capacity: int,
) -> Splats:
    """See `rasterizer.Backend`."""
    del blend, width, height, capacity
    num = splats.depths.shape[1]
    # XLA adds duplicate indices in order on a CPU, but in any order on accelerators: there each
    # intersection has its own row, which are summed in a fixed order afterwards.
    gradients = lax.platform_dependent(
        splats,
        residuals,
        d_features,
        d_alpha,
        cpu=functools.partial(_differentiate, block=CPU_BLOCK, add=True),
        default=functools.partial(_differentiate, block=BLOCK, add=False),
    )
    means, cholesky, opacities, features = jnp.split(
        rearrange(gradients, "(b n) d -> b n d", n=num), [2, 5, 6], axis=-1
    )
    return Splats(means, cholesky, opacities[..., 0], jnp.zeros_like(splats.depths), features)


def _sort(splats: Splats, *, width: int, height: int, capacity: int) -> Bins:
    """Sorted intersections. Of a capacity that was guessed, only what is needed costs time."""
    size = {"width": width, "height": height, "tile": TILE}
    sort = functools.partial(binning.sort_images, **size)
    small = capacity // 8
    if small < 4096 or capacity != binning.default_capacity(splats.depths.shape[1], **size):
        return sort(splats, capacity=capacity)

    def sort_small(splats):
        bins = sort(splats, capacity=small)
        padding = ((0, 0), (0, capacity - small))
        return bins._replace(
            splats=jnp.pad(bins.splats, padding), slots=jnp.pad(bins.slots, padding)
        )

    needed = jax.vmap(functools.partial(binning.count_slots, **size))(splats)
    return lax.cond(
        jnp.max(needed) <= small, sort_small, functools.partial(sort, capacity=capacity), splats
    )


def _blend(splats: Splats, bins: Bins, *, width: int, height: int, block: int):
    """Features [images, H, W, F] and alpha [images, H, W] of all images, and `Residuals`' rest."""
    across, down = binning.grid(width, height, TILE)
    images, num, features = splats.features.shape
    table, rows = _make_table(splats), _make_rows(bins, num)
    blocks = _make_blocks(bins, across, down, block)

    def blend_block(block):
        def blend_chunk(state):
            done, transmittance, reached, total = state
            chunk = _load_chunk(table, rows, block, done)

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
            total = total + _einsum("kmp,kmf->mfp", weights, blended)
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
    splats: Splats, residuals: Residuals, d_features, d_alpha, *, block: int, add: bool
) -> Float[Array, "rows columns"]:
    """Gradients of mean (2), Cholesky factor (3), opacity and features of all images' splats."""
    height, width = d_alpha.shape[1:]
    across, down = binning.grid(width, height, TILE)
    bins = residuals.bins
    images, capacity = bins.splats.shape
    table, rows = _make_table(splats), _make_rows(bins, splats.depths.shape[1])
    blocks = _make_blocks(bins, across, down, block)

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
            chunk = _load_chunk(table, rows, block, done)
            # A splat's value: the loss's derivative by its weight in the pixel.
            value = _einsum("kmf,mpf->kmp", chunk.splat[..., 6:], d_blended) + d_weight

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
                    _from_moments(d_sigma, chunk),
                    _einsum("kmp,mpf->kmf", weight, d_blended),
                ],
                -1,
            ).reshape(-1, table.shape[-1])
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
    gradients = jnp.zeros((size, table.shape[-1])) + 0 * blocks.lengths[0, 0]
    gradients, _ = lax.scan(differentiate_block, gradients, blocks)
    if add:
        return gradients
    gradients = rearrange(gradients, "(b c) d -> b c d", b=images)
    return rearrange(jax.vmap(binning.sum_by_splat)(gradients, bins), "b n d -> (b n) d")


def _make_table(splats: Splats) -> Float[Array, "rows columns"]:
    """All that blending needs of a splat in one row: mean, Cholesky factor, opacity, features."""
    columns = (splats.means, splats.cholesky, splats.opacities[..., None], splats.features)
    return rearrange(jnp.concatenate(columns, -1), "b n d -> (b n) d")


def _make_blocks(bins: Bins, across: int, down: int, block: int) -> _Blocks:
    images, capacity = bins.splats.shape
    first = capacity * jnp.arange(images, dtype=jnp.int32)[:, None]
    starts = (bins.starts[:, :-1] + first).reshape(-1)
    lengths = (bins.starts[:, 1:] - bins.starts[:, :-1]).reshape(-1)
    block = min(block, len(lengths))
    padding = (0, -len(lengths) % block)
    starts, lengths = jnp.pad(starts, padding), jnp.pad(lengths, padding)
    tiles = jnp.argsort(-lengths).astype(jnp.int32)
    cell = jnp.stack([tiles % across, tiles // across % down], -1).astype(jnp.float32)
    centres = (cell + 0.5) * jnp.array(TILE, jnp.float32)
    blocks = _Blocks(tiles, starts[tiles], lengths[tiles], centres)
    return jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), blocks)


def _make_rows(bins: Bins, num: int) -> Int[Array, "intersections"]:
    """The row of the table of each intersection."""
    return (bins.splats + num * jnp.arange(len(bins.splats), dtype=jnp.int32)[:, None]).reshape(-1)


def _load_chunk(table: Array, rows: Array, block: _Blocks, done: Array) -> _Chunk:
    """Intersections `done` to `done + CHUNK` of each tile of a block."""
    number = done + jnp.arange(CHUNK, dtype=jnp.int32)[:, None]
    live = number < block.lengths
    places = jnp.where(live, block.starts + number, 0)
    rows = rows[places]
    splat = table[rows]
    opacity = jnp.where(live, splat[..., 5], 0.0)
    p, q, r = (splat[..., i, None] for i in (2, 3, 4))
    offset = block.centres - splat[..., :2]
    whitened = jnp.concatenate([p * offset[..., :1] + q * offset[..., 1:], r * offset[..., 1:]], -1)
    x, y = _pixel_offsets()
    u, v = whitened[..., :1] + p * x + q * y, whitened[..., 1:] + r * y
    alpha = opacity[..., None] * jnp.exp(-0.5 * (u * u + v * v))
    alpha = jnp.where(alpha >= MIN_ALPHA, jnp.minimum(alpha, MAX_ALPHA), 0.0)
    # Computed once: XLA would repeat the exponential for each of its uses.
    alpha = lax.optimization_barrier(alpha)
    return _Chunk(alpha, splat, live, places, rows, offset, whitened)


def _pixel_offsets() -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """x and y of a tile's pixel centres from the tile's centre."""
    y, x = jnp.mgrid[: TILE[1], : TILE[0]] + 0.5
    return x.reshape(-1) - TILE[0] / 2, y.reshape(-1) - TILE[1] / 2


def _from_moments(d_sigma: Array, chunk: _Chunk) -> Float[Array, "K M 6"]:
    """Gradients of mean, Cholesky factor and opacity from sigma's at the tile's pixels [K, M, P].

    With u = u0 + p x + q y and v = v0 + r y (x, y from the tile's centre), all are linear in the
    moments sum(d_sigma x^i y^j): one matrix product, and no sum over pixels but that.
    """
    x, y = _pixel_offsets()
    powers = jnp.stack([jnp.ones_like(x), x, y, x * x, x * y, y * y], -1)
    moments = _einsum("kmp,pi->kmi", d_sigma, powers)
    s, sx, sy, sxx, sxy, syy = (moments[..., i] for i in range(6))
    _, _, p, q, r, opacity = (chunk.splat[..., i] for i in range(6))
    dx, dy = chunk.offset[..., 0], chunk.offset[..., 1]
    u, v = chunk.whitened[..., 0], chunk.whitened[..., 1]
    su, sv = u * s + p * sx + q * sy, v * s + r * sy
    sux, suy = u * sx + p * sxx + q * sxy, u * sy + p * sxy + q * syy
    svy = v * sy + r * syy
    # alpha dL/dalpha = -dL/dsigma, and alpha is linear in the opacity.
    d_opacity = jnp.where(chunk.live, -s / jnp.where(chunk.live, opacity, 1.0), 0.0)
    return jnp.stack(
        [-p * su, -q * su - r * sv, dx * su + sux, dy * su + suy, dy * sv + svy, d_opacity], -1
    )


BACKEND = Backend("xla", forward, backward, TILE, unavailable=lambda: None)

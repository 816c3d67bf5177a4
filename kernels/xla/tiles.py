"""Tiles in blocks, and the next chunk of splats of each: what both passes of `xla` go through."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from kernels.binning import Bins
from kernels.projection import MAX_ALPHA, MIN_ALPHA, Splats

einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)

TILE = (8, 8)
PIXELS = TILE[0] * TILE[1]
CHUNK = 16
"""Splats of each tile that are blended at a time."""


class Blocks(NamedTuple):
    """The tiles of all images, longest list first, in blocks; padded with empty tiles."""

    tiles: Int[Array, "blocks M"]
    """Tile number, counting through all images."""
    starts: Int[Array, "blocks M"]
    """First of the tile's intersections, counting through all images."""
    lengths: Int[Array, "blocks M"]
    centres: Float[Array, "blocks M 2"]
    """Middle of the tile in pixels."""


class Chunk(NamedTuple):
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


def make_table(
    splats: Splats, features: Float[Array, "images N F"]
) -> Float[Array, "rows columns"]:
    """All that blending needs of a splat in one row: mean, Cholesky factor, opacity, features."""
    columns = (splats.means, splats.cholesky, splats.opacities[..., None], features)
    return rearrange(jnp.concatenate(columns, -1), "b n d -> (b n) d")


def make_blocks(bins: Bins, across: int, down: int, block: int) -> Blocks:
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
    blocks = Blocks(tiles, starts[tiles], lengths[tiles], centres)
    return jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), blocks)


def make_rows(bins: Bins, num: int) -> Int[Array, "intersections"]:
    """The row of the table of each intersection."""
    return (bins.splats + num * jnp.arange(len(bins.splats), dtype=jnp.int32)[:, None]).reshape(-1)


def load_chunk(table: Array, rows: Array, block: Blocks, done: Array) -> Chunk:
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
    return Chunk(alpha, splat, live, places, rows, offset, whitened)


def _pixel_offsets() -> tuple[Float[Array, "P"], Float[Array, "P"]]:
    """x and y of a tile's pixel centres from the tile's centre."""
    y, x = jnp.mgrid[: TILE[1], : TILE[0]] + 0.5
    return x.reshape(-1) - TILE[0] / 2, y.reshape(-1) - TILE[1] / 2


def absolute_gradients(d_sigma: Float[Array, "K M P"], chunk: Chunk) -> Float[Array, "K M 2"]:
    """The sums over a tile's pixels of what each adds to the means' gradients, taken absolutely."""
    p, q, r = (chunk.splat[..., i, None] for i in (2, 3, 4))
    x, y = _pixel_offsets()
    u, v = chunk.whitened[..., :1] + p * x + q * y, chunk.whitened[..., 1:] + r * y
    return jnp.stack(
        [jnp.sum(jnp.abs(d_sigma * a), -1) for a in (p * u, q * u + r * v)],
        -1,
    )


def from_moments(d_sigma: Array, chunk: Chunk) -> Float[Array, "K M 6"]:
    """Gradients of mean, Cholesky factor and opacity from sigma's at the tile's pixels [K, M, P].

    With u = u0 + p x + q y and v = v0 + r y (x, y from the tile's centre), all are linear in the
    moments sum(d_sigma x^i y^j): one matrix product, and no sum over pixels but that.
    """
    x, y = _pixel_offsets()
    powers = jnp.stack([jnp.ones_like(x), x, y, x * x, x * y, y * y], -1)
    moments = einsum("kmp,pi->kmi", d_sigma, powers)
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

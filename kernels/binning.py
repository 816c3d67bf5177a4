"""Which splats touch which tiles of the image, sorted by (tile, depth).

A splat touches a tile if somewhere among its pixel centres the splat's opacity times its falloff
reaches 1/255, tested exactly with the ellipse (Hanson et al., Speedy-Splat, CVPR 2025; Radl et al.,
StopThePop, 2024), so that a long thin splat isn't given to every tile of its bounding box.

Shapes are static: the splats' bounding boxes are laid out, front to back, in `capacity` slots an
image; the tiles of boxes that did not fit are the `overflow` that is returned.
"""

from __future__ import annotations

import functools
import math
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from kernels.projection import MIN_ALPHA, Splats

SLACK = 1e-3
"""Added to extents (pixels) and sigmas: rounding must not drop a pixel that the contract draws."""

MAX_SLOTS = (1 << 30) - 1
"""Most slots an image can have or count."""


class Bins(NamedTuple):
    """The (tile, splat) intersections of an image, grouped by tile and front to back within."""

    splats: Int[Array, "capacity"]
    """Index of the splat of each intersection; past `starts[-1]` any valid index."""
    starts: Int[Array, "tiles+1"]
    """Tile t (row-major) owns intersections `starts[t]:starts[t + 1]`."""
    slots: Int[Array, "capacity"]
    """Which slot an intersection had before sorting; the slots of a splat are contiguous."""
    ends: Int[Array, "N"]
    """Splat i owns slots `ends[i] - counts[i]:ends[i]`, not all of which are intersections."""
    counts: Int[Array, "N"]
    overflow: Int[Array, ""]
    """Slots that did not fit."""


def grid(width: int, height: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Tiles across and down; `tile` is (width, height) in pixels."""
    return -(-width // tile[0]), -(-height // tile[1])


def tile_boxes(
    splats: Splats, width: int, height: int, tile: tuple[int, int]
) -> tuple[Int[Array, "N 2"], Int[Array, "N 2"], Array]:
    """First tile (x, y) and number of tiles (x, y) of each splat's bounding box, and its reach."""
    drawn = splats.opacities >= MIN_ALPHA
    reach = jnp.where(drawn, splats.reach, -1.0)
    half = splats.radii + SLACK + 1e-6 * jnp.abs(splats.means)
    size, limit = jnp.array(tile, jnp.int32), jnp.array([width, height], jnp.int32)
    # Pixel i is inside if |i + 0.5 - mean| <= half.
    lowest = jnp.clip(jnp.ceil(splats.means - half - 0.5), 0, limit).astype(jnp.int32)
    highest = jnp.clip(jnp.floor(splats.means + half - 0.5), -1, limit - 1).astype(jnp.int32)
    drawn &= jnp.all(highest >= lowest, -1)
    first = lowest // size
    counts = jnp.where(drawn[:, None], highest // size - first + 1, 0)
    return first, counts, reach


def count_slots(
    splats: Splats, *, width: int, height: int, tile: tuple[int, int]
) -> Int[Array, ""]:
    """Slots that `sort_intersections` needs for these splats of one image."""
    slots = jnp.prod(tile_boxes(splats, width, height, tile)[1], -1, dtype=jnp.int32)
    return lax.reduce(slots, jnp.int32(0), _add_up_to_limit, (0,))


def _add_up_to_limit(a: Array, b: Array) -> Array:
    """Sum that stays at `MAX_SLOTS` instead of wrapping around int32."""
    return jnp.minimum(a + b, MAX_SLOTS)


GUESSED_PIXELS = 56
"""Width of a splat whose size isn't known: 64 tiles of 8x8 pixels. Ample for scenes of thousands of
Gaussians; whoever knows a scene better passes its capacity."""


def default_capacity(num_splats: int, width: int, height: int, tile: tuple[int, int]) -> int:
    """Slots for an image whose splats aren't known yet (under `jax.jit`).

    As many tiles as a splat GUESSED_PIXELS wide may touch; small scenes get up to 65,536, which
    few huge splats may need.
    """
    across, down = grid(width, height, tile)
    most = num_splats * across * down
    touched = math.prod(math.ceil(GUESSED_PIXELS / side) + 1 for side in tile)
    return max(1, min(most, max(touched * num_splats, 1 << 16)))


SLOT_BYTES = 40
"""Memory that a backend takes for a slot of an image, about."""


def check_memory(slots: int, num: int, images: int) -> None:
    """Refuses more slots an image than there is memory for, with the cause. `num` Gaussians."""
    needed, free = SLOT_BYTES * slots * images, free_memory()
    if slots >= MAX_SLOTS or (free is not None and needed > free):
        raise ValueError(
            f"{images} image(s) of {num} Gaussians have up to {slots} intersections with tiles "
            f"each, {slots / max(num, 1):.0f} a Gaussian, which take about {needed / 1e9:.0f} GB "
            f"and more than there is: the Gaussians are too large for the image; check the units "
            "of the scales (not their logarithms) and that means, cameras and sizes go together, "
            "or render fewer or smaller images at once"
        )


def free_memory() -> int | None:
    """Bytes that JAX's default device can have, or None where it doesn't say."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats.get("bytes_limit")
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_rows(images: int, capacity: int) -> None:
    """Refuses a batch whose slots, counted through all images, an int32 cannot number."""
    if images * capacity >= 2**31:
        raise ValueError(
            f"capacity is {capacity} for {images} images; expected fewer than 2^31 intersections "
            "in all: lower `capacity` or render fewer images at once"
        )


def round_capacity(slots: int) -> int:
    """At most 25% (or 255) slots more, by few values: rarely a new shape to compile for."""
    step = max(256, (1 << max(slots, 1).bit_length()) // 8)
    return -(-max(slots, 1) // step) * step


def nearest_sigma(
    cholesky: Float[Array, "*b 3"], lowest: Float[Array, "*b 2"], highest: Float[Array, "*b 2"]
) -> Float[Array, "*b"]:
    """Smallest sigma in the box of offsets from the splat's centre `lowest` to `highest`.

    Sigma grows away from the centre, so its minimum over the box lies on the sides that face
    the centre (or is 0 inside).
    """
    p, q, r = jnp.moveaxis(cholesky, -1, 0)
    x, y = jnp.moveaxis(jnp.clip(0.0, lowest, highest), -1, 0)
    y_at_x = jnp.clip(-p * q * x / (q * q + r * r), lowest[..., 1], highest[..., 1])
    x_at_y = jnp.clip(-q * y / p, lowest[..., 0], highest[..., 0])
    on_vertical = (p * x + q * y_at_x) ** 2 + (r * y_at_x) ** 2
    on_horizontal = (p * x_at_y + q * y) ** 2 + (r * y) ** 2
    return 0.5 * jnp.minimum(on_vertical, on_horizontal)


def sort_intersections(
    splats: Splats, *, width: int, height: int, tile: tuple[int, int], capacity: int
) -> Bins:
    """Intersections of one image (`jax.vmap` for more), by tile and then by depth.

    Splats of equal depth stay in their given order.
    """
    across, down = grid(width, height, tile)
    tiles, num = across * down, splats.depths.shape[0]
    order = jnp.argsort(splats.depths, stable=True).astype(jnp.int32)
    # All below is in order of depth, as the slots are: they read what is side by side in memory.
    near_to_far = jax.tree.map(lambda a: a[order], splats)
    first, counts, reach = tile_boxes(near_to_far, width, height, tile)
    slots_of = jnp.prod(counts, -1, dtype=jnp.int32)
    ends = lax.associative_scan(_add_up_to_limit, slots_of)
    begins, total = ends - slots_of, ends[-1]

    # The splat of a slot: marked at each splat's first slot by its rank in depth, which only grows.
    slot = jnp.arange(capacity, dtype=jnp.int32)
    marks = jnp.where(slots_of > 0, begins, capacity)
    number = jnp.arange(num, dtype=jnp.int32)
    rank = lax.cummax(jnp.zeros(capacity, jnp.int32).at[marks].set(number, mode="drop"))
    within = slot - begins[rank]
    wide = jnp.maximum(counts[rank, 0], 1)
    cell = first[rank] + jnp.stack([within % wide, within // wide], -1)

    corner = cell.astype(jnp.float32) * jnp.array(tile, jnp.float32) + 0.5
    corner = corner - near_to_far.means[rank]
    sigma = nearest_sigma(
        near_to_far.cholesky[rank], corner, corner + jnp.array(tile, jnp.float32) - 1.0
    )
    touched = (slot < total) & (sigma <= reach[rank] + SLACK)
    cell_index = jnp.where(touched, cell[:, 1] * across + cell[:, 0], tiles).astype(jnp.uint32)

    if (tiles + 1) * capacity < 2**32:
        # A slot's number grows with depth: (tile, slot) in one word sorts exactly, and fast.
        keys = lax.sort(cell_index * jnp.uint32(capacity) + slot.astype(jnp.uint32))
        sorted_tile, slots = keys // jnp.uint32(capacity), keys % jnp.uint32(capacity)
        slots = slots.astype(jnp.int32)
    else:
        sorted_tile, slots = lax.sort((cell_index, slot), num_keys=1, is_stable=True)
    starts = jnp.searchsorted(sorted_tile, jnp.arange(tiles + 1, dtype=jnp.uint32))
    by_splat = jnp.zeros((num, 2), jnp.int32).at[order]
    by_splat = by_splat.set(jnp.stack([ends, slots_of], -1), unique_indices=True)
    return Bins(
        splats=order[rank[slots]],
        starts=starts.astype(jnp.int32),
        slots=slots,
        ends=by_splat[:, 0],
        counts=by_splat[:, 1],
        overflow=jnp.maximum(total - capacity, 0).astype(jnp.int32),
    )


def sort_images(
    splats: Splats, *, width: int, height: int, tile: tuple[int, int], capacity: int
) -> Bins:
    """`sort_intersections` for splats with a leading image axis."""
    sort = functools.partial(
        sort_intersections, width=width, height=height, tile=tile, capacity=capacity
    )
    return jax.vmap(sort)(splats)


def count_intersections(
    splats: Splats, *, width: int, height: int, tile: tuple[int, int]
) -> Int[Array, "tiles"]:
    """How many splats each tile of one image has. Their values must be known: not under `jit`."""
    shape = {"width": width, "height": height, "tile": tile}
    return _count_tiles(splats, capacity=round_capacity(int(count_slots(splats, **shape))), **shape)


@functools.partial(jax.jit, static_argnames=("width", "height", "tile", "capacity"))
def _count_tiles(splats, **settings):
    return jnp.diff(sort_intersections(splats, **settings).starts)


def sum_by_splat(values: Float[Array, "capacity D"], bins: Bins) -> Float[Array, "N D"]:
    """Sum what was written for each slot (0 where it isn't an intersection) by splat.

    The order of the additions is fixed, so the sum has the same bits every time, as a scatter-add
    on an accelerator has not.
    """
    capacity = len(values)
    starts = jnp.minimum(bins.ends - bins.counts, capacity)
    first = jnp.zeros(capacity, bool).at[starts].set(True, mode="drop")

    def add(left, right):
        return left[0] | right[0], jnp.where(right[0][:, None], right[1], left[1] + right[1])

    running = lax.associative_scan(add, (first, values))[1]
    ends = jnp.minimum(bins.ends, capacity)
    return jnp.where((ends > starts)[:, None], running[jnp.maximum(ends - 1, 0)], 0.0)

"""The `pallas_gpu` backend: blending in Pallas, lowered to Triton, for NVIDIA GPUs.

Needs no compiler but the one in JAX. `binning` gives every tile its splats, front to back. A
program blends one tile of 8x8 pixels, `CHUNK` splats at a time: within a chunk everything is an
array [splats, pixels], and transmittance is a running sum of log(1 - alpha) down the splats.

The backward pass walks the tiles back to front, from the transmittance that each pixel ended with,
and adds up what lies behind each splat: nothing is subtracted. It leaves a row of gradients for
every intersection, which a third kernel sums splat by splat: no atomics, so the same bits every
run.

Pallas's Triton lowering needs sizes that are powers of two. It is in JAX 0.10 and, deprecated in
favour of Mosaic GPU, in JAX 0.12. Mosaic GPU is made for the tensor cores' large matrices and wants
128 threads or more to a program; these tiles are not that.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels import binning
from kernels.backends import Backend, Blend, Cotangent, Frame, Gradients, missing_nvidia_gpu
from kernels.projection import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, Splats
from kernels.varying import shape_like

try:
    from jax.experimental.pallas import triton
except ImportError:  # a JAX that has dropped it
    triton = None

TILE = (8, 8)
PIXELS = TILE[0] * TILE[1]
CHUNK = 16
"""Splats that a program blends at once."""
GEOMETRY = 8
"""Numbers of a splat before its features: x, y, p, q, r, opacity and two that pad, whose gradients
are x's and y's absolute ones."""
SUMMED = 16
"""Splats whose gradients a program sums."""
MIN_DOT = 16
"""Smallest side of a matrix product in Triton."""


def _forward(splats: Splats, features: Array, *, frame: Frame, interpret=False):
    width, height, capacity = frame
    bins = binning.sort_images(splats, width=width, height=height, tile=TILE, capacity=capacity)
    images, num = splats.depths.shape[0], features.shape[-1]
    geometry, features = _pack(splats, features)
    across, down = binning.grid(width, height, TILE)
    tiles = images, across * down, PIXELS
    out, transmittance, reached = _call(
        functools.partial(_blend_tile, across=across),
        grid=(across * down, images),
        out_shape=[
            shape_like(geometry, *tiles, features.shape[-1]),
            shape_like(geometry, *tiles),
            shape_like(geometry, *tiles, dtype=jnp.int32),
        ],
        interpret=interpret,
    )(geometry, features, bins.splats, bins.starts)
    out = _join(out, width, height)
    return Blend(out[..., :num], out[..., num], bins.overflow), (bins, transmittance, reached)


def _backward(
    splats: Splats, features: Array, residuals, cotangent: Cotangent, *,
    frame: Frame, absgrad: bool, interpret=False,
) -> Gradients:  # fmt: skip
    width, height, capacity = frame
    images, count, num = features.shape
    geometry, features = _pack(splats, features)
    across, down = binning.grid(width, height, TILE)
    bins, transmittance, reached = residuals
    d_out = jnp.concatenate([cotangent.features, cotangent.alpha[..., None]], -1)
    d_out = _pad_features(d_out)

    # A row for every slot, and one that is never read. Slots that turn out to be no intersection,
    # or that no pixel reaches, keep their zeros.
    sizes = (GEOMETRY, features.shape[-1])
    rows = [shape_like(geometry, images, capacity + 1, size) for size in sizes]
    zeros = [jnp.zeros_like(geometry, shape=row.shape) + 0 * geometry[:, :1, :1] for row in rows]
    d_geometry, d_splat_features = _call(
        functools.partial(_differentiate_tile, across=across, absgrad=absgrad),
        grid=(across * down, images),
        out_shape=rows,
        input_output_aliases={8: 0, 9: 1},
        interpret=interpret,
    )(
        geometry, features, bins.splats, bins.starts, bins.slots,
        _cut(d_out, width, height), transmittance, reached, *zeros,
    )  # fmt: skip
    d_geometry, d_splat_features = _call(
        _sum_slots,
        grid=(pl.cdiv(count, SUMMED), images),
        out_shape=[shape_like(geometry, images, count, row.shape[-1]) for row in rows],
        interpret=interpret,
    )(bins.ends, bins.counts, d_geometry, d_splat_features)
    return Gradients(
        means=d_geometry[..., 0:2],
        cholesky=d_geometry[..., 2:5],
        opacities=d_geometry[..., 5],
        features=d_splat_features[..., :num],
        absgrad=d_geometry[..., 6:8] if absgrad else None,
    )


def _call(kernel, *, interpret: bool, **settings):
    # Four warps: two to eight numbers of a chunk's arrays to a thread. With two, the backward pass
    # needs more registers than a thread of an H100 has.
    parameters = None if interpret else triton.CompilerParams(num_warps=4, num_stages=1)
    return pl.pallas_call(kernel, interpret=interpret, compiler_params=parameters, **settings)


def _pack(splats: Splats, features: Array) -> tuple[Float[Array, "b N 8"], Float[Array, "b N F"]]:
    """Geometry, and features with a last one that is always 1: what blends to alpha."""
    geometry = jnp.concatenate([splats.means, splats.cholesky, splats.opacities[..., None]], -1)
    geometry = jnp.pad(geometry, ((0, 0), (0, 0), (0, GEOMETRY - geometry.shape[-1])))
    ones = jnp.ones_like(features[..., :1])
    return geometry, _pad_features(jnp.concatenate([features, ones], -1))


def _pad_features(a: Float[Array, "*b n"]) -> Float[Array, "*b F"]:
    """Zeros to the next power of two that Triton multiplies."""
    width = max(MIN_DOT, pl.next_power_of_2(a.shape[-1]))
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width - a.shape[-1])])


def _cut(a: Float[Array, "b height width *f"], width, height) -> Float[Array, "b tiles pixels *f"]:
    across, down = binning.grid(width, height, TILE)
    edges = (0, down * TILE[1] - height), (0, across * TILE[0] - width)
    a = jnp.pad(a, [(0, 0), *edges, *[(0, 0)] * (a.ndim - 3)])
    return rearrange(a, "b (d h) (a w) ... -> b (d a) (h w) ...", h=TILE[1], w=TILE[0])


def _join(a: Float[Array, "b tiles pixels *f"], width, height) -> Float[Array, "b height width *f"]:
    across = binning.grid(width, height, TILE)[0]
    a = rearrange(a, "b (d a) (h w) ... -> b (d h) (a w) ...", a=across, h=TILE[1])
    return a[:, :height, :width]


# --- Inside a program: arrays are [CHUNK, PIXELS] where not said otherwise. ---


def _load(ref, *index, mask=None):
    if mask is None:
        return triton.load(ref.at[index])
    return triton.load(ref.at[index], mask=mask, other=0)


def _dot(a, b):
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)  # float32 all through, no TF32


def _later():
    """[CHUNK, CHUNK] with a 1 where the column's splat is behind the row's."""
    place = jnp.arange(CHUNK)
    return (place[None, :] > place[:, None]).astype(jnp.float32)


def _load_chunk(geometry_ref, features_ref, splats_ref, image, position, end, x, y):
    """A chunk's numbers from `position` of a tile's list on, and their alphas at the pixels."""
    places = position + jnp.arange(CHUNK)
    inside = places < end
    ids = _load(splats_ref, image, places, mask=inside)
    mean_x, mean_y, p, q, r, opacity = (
        _load(geometry_ref, image, ids, column, mask=inside)[:, None] for column in range(6)
    )
    columns = jnp.arange(features_ref.shape[-1])
    features = _load(
        features_ref, image, ids[:, None], columns[None, :],
        mask=inside[:, None] & (columns >= 0)[None, :],
    )  # fmt: skip
    dx, dy = x[None] - mean_x, y[None] - mean_y
    u, v = p * dx + q * dy, r * dy
    strength = opacity * jnp.exp(-0.5 * (u * u + v * v))
    drawn = strength >= MIN_ALPHA
    alpha = jnp.where(drawn, jnp.minimum(strength, MAX_ALPHA), 0.0)
    smooth = drawn & (strength < MAX_ALPHA)
    return places, inside, (p, q, r, opacity), (dx, dy, u, v), alpha, smooth, features


def _pixels(tile, across):
    """Centres [PIXELS] of a tile's pixels."""
    pixel = jnp.arange(PIXELS)
    x = (tile % across) * TILE[0] + pixel % TILE[0]
    y = (tile // across) * TILE[1] + pixel // TILE[0]
    return x.astype(jnp.float32) + 0.5, y.astype(jnp.float32) + 0.5


def _blend_tile(
    geometry_ref, features_ref, splats_ref, starts_ref,
    out_ref, transmittance_ref, reached_ref, *, across,
):  # fmt: skip
    tile, image = pl.program_id(0), pl.program_id(1)
    begin, end = _load(starts_ref, image, tile), _load(starts_ref, image, tile + 1)
    x, y = _pixels(tile, across)

    def unfinished(state):
        position, transmittance, *_ = state
        return (position < end) & (jnp.max(transmittance) > MIN_TRANSMITTANCE)

    def body(state):
        position, transmittance, final, reached, total = state
        *_, alpha, _, features = _load_chunk(
            geometry_ref, features_ref, splats_ref, image, position, end, x, y
        )
        # A pixel ends before the splat that would bring its transmittance to MIN_TRANSMITTANCE or
        # less; it runs on past that splat, and so stays too low for all that follow.
        logs = jnp.log(1.0 - alpha)
        sums = jnp.cumsum(logs, axis=0)
        after = transmittance[None] * jnp.exp(sums)
        blended = after > MIN_TRANSMITTANCE
        weights = jnp.where(blended, alpha * transmittance[None] * jnp.exp(sums - logs), 0.0)
        return (
            position + CHUNK,
            transmittance * jnp.exp(jnp.sum(logs, axis=0)),
            jnp.minimum(final, jnp.min(jnp.where(blended, after, 1.0), axis=0)),
            reached + jnp.sum(blended.astype(jnp.int32), axis=0),
            total + _dot(weights.T, features),
        )

    ones = jnp.ones(PIXELS, jnp.float32)
    total = jnp.zeros((PIXELS, features_ref.shape[-1]), jnp.float32)
    start = (begin, ones, ones, jnp.zeros(PIXELS, jnp.int32), total)
    _, _, final, reached, total = lax.while_loop(unfinished, body, start)
    out_ref[image, tile] = total
    transmittance_ref[image, tile] = final
    reached_ref[image, tile] = reached


def _differentiate_tile(
    geometry_ref, features_ref, splats_ref, starts_ref, slots_ref, d_out_ref, transmittance_ref,
    reached_ref, _, __, d_geometry_ref, d_features_ref, *, across, absgrad,
):  # fmt: skip
    tile, image = pl.program_id(0), pl.program_id(1)
    begin, end = _load(starts_ref, image, tile), _load(starts_ref, image, tile + 1)
    x, y = _pixels(tile, across)
    d_out, reached = d_out_ref[image, tile], reached_ref[image, tile]
    columns = jnp.arange(features_ref.shape[-1])
    capacity = d_geometry_ref.shape[1] - 1

    def body(number, state):
        transmittance, behind = state
        position = begin + (chunks - 1 - number) * CHUNK
        places, inside, (p, q, r, opacity), (dx, dy, u, v), alpha, smooth, features = _load_chunk(
            geometry_ref, features_ref, splats_ref, image, position, end, x, y
        )
        alpha = jnp.where((places - begin)[:, None] < reached[None], alpha, 0.0)
        logs = jnp.log(1.0 - alpha)
        taken = jnp.sum(logs, axis=0)
        transmittance *= jnp.exp(-taken)
        weights = alpha * transmittance[None] * jnp.exp(jnp.cumsum(logs, axis=0) - logs)
        light = weights * _dot(features, d_out.T)
        farther = behind[None] + _dot(_later(), light)
        # With strength = opacity exp(-(u^2 + v^2) / 2): gradients by its logarithm, then by u, v.
        d_log = jnp.where(smooth, light - farther * alpha / (1.0 - alpha), 0.0)
        du, dv = d_log * u, d_log * v
        sum_u, sum_v = jnp.sum(du, axis=1), jnp.sum(dv, axis=1)
        by_pixel = (p * du, q * du + r * dv) if absgrad else ()
        p, q, r, opacity = (a.reshape(CHUNK) for a in (p, q, r, opacity))
        gradients = (
            p * sum_u,
            q * sum_u + r * sum_v,
            -jnp.sum(du * dx, axis=1),
            -jnp.sum(du * dy, axis=1),
            -jnp.sum(dv * dy, axis=1),
            jnp.sum(d_log, axis=1) / jnp.where(inside, opacity, 1.0),
            *(jnp.sum(jnp.abs(a), axis=1) for a in by_pixel),
        )
        # A masked lane must not name a row that another writes: the interpreter writes back what
        # was there.
        slots = jnp.where(inside, _load(slots_ref, image, places, mask=inside), capacity)
        for column, gradient in enumerate(gradients):
            triton.store(d_geometry_ref.at[image, slots, column], gradient, mask=inside)
        triton.store(
            d_features_ref.at[image, slots[:, None], columns[None, :]],
            _dot(weights, d_out),
            mask=inside[:, None] & (columns >= 0)[None, :],
        )
        return transmittance, behind + jnp.sum(light, axis=0)

    chunks = pl.cdiv(jnp.max(reached), CHUNK)
    start = (transmittance_ref[image, tile], jnp.zeros(PIXELS, jnp.float32))
    lax.fori_loop(0, chunks, body, start)


def _sum_slots(ends_ref, counts_ref, *refs):
    """Sums rows [capacity, n] by splat: SUMMED splats a program, each over its slots in order."""
    rows_refs, out_refs = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    image = pl.program_id(1)
    splats = pl.program_id(0) * SUMMED + jnp.arange(SUMMED)
    present = splats < ends_ref.shape[-1]
    ends = _load(ends_ref, image, splats, mask=present)
    counts = _load(counts_ref, image, splats, mask=present)
    most = jnp.max(counts)
    for rows_ref, out_ref in zip(rows_refs, out_refs, strict=True):
        capacity, width = rows_ref.shape[1] - 1, rows_ref.shape[2]
        columns = jnp.arange(width)

        def add(k, sums, rows_ref=rows_ref, columns=columns, capacity=capacity):
            slots = ends - counts + k
            mask = (k < counts) & (slots < capacity)
            return sums + _load(
                rows_ref, image, slots[:, None], columns[None, :],
                mask=mask[:, None] & (columns >= 0)[None, :],
            )  # fmt: skip

        sums = lax.fori_loop(0, most, add, jnp.zeros((SUMMED, width), jnp.float32))
        triton.store(
            out_ref.at[image, splats[:, None], columns[None, :]],
            sums,
            mask=present[:, None] & (columns >= 0)[None, :],
        )


def _unavailable() -> str | None:
    if triton is None:
        return "this JAX has no Triton lowering of Pallas; it is in jax 0.10 to 0.12"
    return missing_nvidia_gpu()


BACKEND = Backend("pallas_gpu", _forward, _backward, TILE, _unavailable)

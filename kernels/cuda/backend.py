"""Calls into the CUDA library: sorting and blending of `Splats`, forward and backward."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.ffi import ffi_call
from jaxtyping import Array, Float

from kernels import binning
from kernels.backends import Backend, Blend, Cotangent, Frame, Gradients, missing_nvidia_gpu
from kernels.projection import Splats

TILE = (8, 8)
"""A warp's tile, two pixels a lane."""

FEATURE_WIDTHS = (4, 8, 16, 32)
"""Numbers of features the kernels are compiled for."""

BIN, FORWARD, BACKWARD, ABSOLUTE = TARGETS = (
    "flexavatar_splat_bin",
    "flexavatar_splat_forward",
    "flexavatar_splat_backward",
    "flexavatar_splat_absolute",
)
"""The calls' names in XLA."""


def register(library: Path, platform: str) -> ctypes.CDLL:
    """Load a library made by `kernels.cuda.build` and register its calls for a platform of XLA."""
    loaded = ctypes.CDLL(str(library))
    symbols = (loaded.SplatBin, loaded.SplatForward, loaded.SplatBackward, loaded.SplatAbsolute)
    for target, symbol in zip(TARGETS, symbols, strict=True):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(symbol), platform=platform)
    return loaded


@functools.cache
def unavailable() -> str | None:
    """Why the backend can't run here, or None; loads the library."""
    if reason := missing_nvidia_gpu():
        return reason
    # Not imported above, as `python -m kernels.cuda.build` would find itself imported already.
    from kernels.cuda.build import library_path

    library = library_path()
    if not library.exists():
        return "its CUDA library isn't built; run `python -m kernels.cuda.build` (it needs nvcc)"
    try:
        register(library, "CUDA")
    except OSError as error:
        return f"{library} does not load ({error}); delete it and `python -m kernels.cuda.build`"
    return None


def _forward(splats: Splats, features: Float[Array, "images N F"], *, frame: Frame):
    images, num = splats.depths.shape
    width, height, capacity = frame
    binning.check_rows(images, capacity)
    across, down = binning.grid(width, height, TILE)
    geometry = _pack(splats)
    floats, ints = _shapes(geometry)

    bins = ffi_call(
        BIN,
        [
            ints(images, capacity),
            ints(images, capacity),
            ints(images, down, across, 2),
            ints(images, num, 2),
            ints(images),
        ],
    )
    first, counts, _ = jax.vmap(binning.tile_boxes, (0, None, None, None))(
        splats, width, height, TILE
    )
    *lists, spans, overflow = bins(geometry, jnp.concatenate([first, counts], -1))
    blended = []
    for part in _chunks(features):
        composite = ffi_call(
            FORWARD,
            [
                floats(images, height, width, part.shape[-1]),
                floats(images, height, width),
                floats(images, height, width),
                ints(images, height, width),
            ],
        )
        # Every chunk of features sees the same weights.
        chunk, alpha, transmittance, last = composite(geometry, part, *lists)
        blended.append(chunk)
    blended = jnp.concatenate(blended, -1)[..., : features.shape[-1]]
    return Blend(blended, alpha, overflow), (*lists, spans, transmittance, last)


def _backward(
    splats: Splats, features: Float[Array, "images N F"], residuals, cotangent: Cotangent, *,
    frame: Frame, absgrad: bool,
) -> Gradients:  # fmt: skip
    del frame
    d_features, d_alpha = cotangent
    *lists, spans, transmittance, last = residuals
    geometry = _pack(splats)
    floats, _ = _shapes(geometry)
    absolute = None
    if absgrad:
        whole, d_whole = (_pad(a, -(-a.shape[-1] // 4) * 4) for a in (features, d_features))
        absolute = ffi_call(ABSOLUTE, floats(*splats.means.shape))(
            geometry, whole, *lists, spans, transmittance, last, d_whole, d_alpha
        )
    d_geometry, d_chunks = 0.0, []
    for part, d_chunk in zip(_chunks(features), _chunks(d_features), strict=True):
        composite = ffi_call(BACKWARD, [floats(*geometry.shape), floats(*part.shape)])
        d_part, d_splat_features = composite(
            geometry, part, *lists, spans, transmittance, last, d_chunk, d_alpha
        )
        d_geometry += d_part
        d_chunks.append(d_splat_features)
        # Gradients add up over chunks; what comes through alpha is in the first already.
        d_alpha = jnp.zeros_like(d_alpha)
    return Gradients(
        means=d_geometry[..., 0:2],
        cholesky=d_geometry[..., 2:5],
        opacities=d_geometry[..., 5],
        features=jnp.concatenate(d_chunks, -1)[..., : features.shape[-1]],
        absgrad=absolute,
    )


def _pack(splats: Splats) -> Float[Array, "images N 8"]:
    """What a kernel loads of a splat at once: 32 bytes."""
    opacities, depths = splats.opacities[..., None], splats.depths[..., None]
    fields = [splats.means, splats.cholesky, opacities, depths, jnp.zeros_like(depths)]
    return jnp.concatenate(fields, -1)


def _chunks(features: Float[Array, "*b F"]) -> list[Float[Array, "*b K"]]:
    """`features` cut to widths that the kernels know, padded with zeros at the end."""
    widest = FEATURE_WIDTHS[-1]
    chunks = []
    for start in range(0, features.shape[-1], widest):
        chunk = features[..., start : start + widest]
        chunks.append(_pad(chunk, next(w for w in FEATURE_WIDTHS if w >= chunk.shape[-1])))
    return chunks


def _pad(features: Float[Array, "*b F"], width: int) -> Float[Array, "*b K"]:
    return jnp.pad(features, [(0, 0)] * (features.ndim - 1) + [(0, width - features.shape[-1])])


def _shapes(like: Array):
    """Makers of float32 and int32 result shapes that vary over a mesh as `like` does."""

    aval = jax.typeof(like)
    mesh = aval.sharding.mesh
    sharding = None if mesh.empty else jax.sharding.NamedSharding(mesh, jax.P())

    def maker(dtype):
        return lambda *shape: jax.ShapeDtypeStruct(
            shape, dtype, sharding=sharding, manual_axis_type=aval.manual_axis_type
        )

    return maker(jnp.float32), maker(jnp.int32)


BACKEND = Backend("cuda", _forward, _backward, TILE, unavailable)

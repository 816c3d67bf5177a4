"""`rasterize`: differentiable rendering of 3D Gaussians, on whatever device JAX runs on.

The contract (3D Gaussian Splatting with gsplat's conventions):

- covariance R S S^T R^T, projected with the perspective Jacobian at x/z, y/z clamped to the frustum
  widened by 0.3 tan(fov/2); + 0.3 I; Gaussians with z < near are not drawn;
- alpha = min(0.99, opacity exp(-sigma)) at pixel centres (+0.5), skipped under 1/255;
- blended front to back by camera z (equal z: in the given order); a pixel ends before the Gaussian
  that would bring its transmittance to 1e-4 or less; the background enters with what is left.

`projection.project` turns Gaussians into `Splats`; JAX differentiates it. A backend (`backends`)
sorts and blends them.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from kernels import binning, harmonics, meshes, modes
from kernels.arguments import (
    check_finite,
    check_near,
    check_shapes,
    check_sizes,
    warn_of_rounding,
)
from kernels.backends import Backend, choose_backend, compiles_ahead
from kernels.blending import blend
from kernels.projection import Splats, project

GAUSSIANS = ("means", "quats", "scales", "opacities", "colors")
CAMERAS = ("viewmats", "Ks")

OVERFLOW = ("warn", "error", "count")
"""What may happen, besides counting, where intersections don't fit the capacity."""


class Render(NamedTuple):
    """Images that `rasterize` made."""

    color: Float[Array, "*b H W C"]
    alpha: Float[Array, "*b H W"]
    """How much of each pixel the Gaussians cover, 1 minus the final transmittance."""
    depth: Float[Array, "*b H W"]
    """Expected depth: camera z averaged with the weights of the colours; 0 where nothing is."""
    overflow: Int[Array, "*b"]
    """Intersections with tiles that did not fit the capacity, and so weren't drawn: 0 in order."""


def rasterize(
    means: Float[ArrayLike, "*g N 3"],
    quats: Float[ArrayLike, "*g N 4"],
    scales: Float[ArrayLike, "*g N 3"],
    opacities: Float[ArrayLike, "*g N"],
    colors: Float[ArrayLike, "*p N C"] | None,
    viewmats: Float[ArrayLike, "*b 4 4"],
    Ks: Float[ArrayLike, "*b 3 3"],
    *,
    width: int,
    height: int,
    sh: Float[ArrayLike, "*g N K C"] | None = None,
    background: Float[ArrayLike, "*k C"] | None = None,
    near: float = 0.01,
    antialiased: bool = False,
    backend: str = "auto",
    capacity: int | None = None,
    overflow: str = "warn",
) -> Render:
    """Render images of 3D Gaussians; differentiable in every array, and fine under jit and vmap.

    Args:
      means: centres in world units. The leading shape *g of the five arrays of Gaussians is the
        cameras' *b (each image has its own Gaussians) or none (all images share them).
      quats: rotations (w, x, y, z), normalised here.
      scales: standard deviations along the rotated axes, world units.
      opacities: in [0, 1].
      colors: any number of channels, any range; blended as they are. With the Gaussians' leading
        shape or the cameras': shared Gaussians may have a colour for each camera.
      viewmats: world to camera, OpenCV axes (x right, y down, z forward).
      Ks: intrinsics in pixels; no skew.
      width, height: size of the images in pixels.
      sh: instead of `colors` (then None), coefficients of spherical harmonics of degree 0 to 3
        (K = 1, 4, 9 or 16), evaluated for each camera by `harmonics.shade`.
      background: colours behind everything, per image (*k is *b) or for all; None is 0.
      near: Gaussians nearer than this z are not drawn (those at it are); a number over 0.
      antialiased: dim splats that are smaller than a pixel (Mip-Splatting).
      backend: one of `backends.BACKENDS`, or "auto" for the best that runs on JAX's default device.
      capacity: room for intersections of Gaussians with tiles, in each image. None: outside of
        `jax.jit` they are counted first; inside, where values aren't known, it is what Gaussians
        `binning.GUESSED_PIXELS` wide need, but at least 65,536 (or all tiles, if that is less).
        `count_capacity` says what a scene needs. What did not fit is counted in `Render.overflow`.
      overflow: what else happens where something did not fit: "warn" (a `RuntimeWarning`, once),
        "error" (inside of `jax.jit` it comes out of the runtime as `JaxRuntimeError`) or "count"
        (nothing else). The first two put a host callback into a compiled program, which JAX then
        does not keep in its compilation cache, nor lower for another platform than its own: pass
        "count" there (within `compiling_for`, "warn" is "count").

    All is computed in float32, whatever `jax_enable_x64` says. Arrays sharded over the `Explicit`
    axes of a mesh along the images give images sharded alike; capacity is then guessed as in jit.

    Raises:
      ValueError: shapes that don't go together, sizes that aren't integers of 1 or more, an unknown
        backend, more intersections than there is memory for, or, outside of `jax.jit` (inside,
        values aren't known), NaN or infinite values: the message names the array.
      BackendUnavailableError: the backend asked for cannot run here.
    """
    check_sizes(width=width, height=height, capacity=1 if capacity is None else capacity)
    check_near(near)
    if overflow not in OVERFLOW:
        raise ValueError(f"overflow is {overflow!r}; expected one of {', '.join(OVERFLOW)}")
    if overflow == "warn" and compiles_ahead():
        overflow = "count"  # A callback can be compiled only for the devices of this process.
    warn_of_rounding(means, scales)
    settings = {
        **{"width": int(width), "height": int(height)},
        **{"near": float(near), "antialiased": bool(antialiased)},
    }
    if (colors is None) == (sh is None):
        raise ValueError("expected either colors or sh, and None for the other")
    gaussians = {
        "means": means,
        "quats": quats,
        "scales": scales,
        "opacities": opacities,
        **({"colors": colors} if sh is None else {"sh": sh}),
    }
    cameras = {"viewmats": viewmats, "Ks": Ks}
    if background is None:
        background = np.zeros(jnp.shape(colors if sh is None else sh)[-1:], np.float32)
    with modes.standard():
        inputs = {
            name: jnp.asarray(a, jnp.float32)
            for name, a in {**gaussians, **cameras, "background": background}.items()
        }
        batch = check_shapes(inputs)
        chosen = choose_backend(backend)

        def render(inputs, capacity):
            return _render_batch(inputs, batch, chosen, capacity, overflow, settings)

        if meshes.is_explicit(inputs["viewmats"]):
            return meshes.map_images(render, inputs, batch, capacity)
        check_finite(inputs)
        return render(inputs, capacity)


def _render_batch(inputs, batch, backend, capacity, overflow, settings) -> Render:
    """One flat axis of images; Gaussians have it or not."""
    batch = inputs["viewmats"].shape[: len(batch)]
    if "sh" in inputs:
        inputs = _shade(inputs, batch)
    images, channels = math.prod(batch), inputs["colors"].shape[-1]
    flat, shared = _flatten(inputs, batch)
    background = jnp.broadcast_to(inputs["background"], (*batch, channels))
    flat["background"] = background.reshape(images, channels)
    if flat["means"].shape[-2] == 0 or images == 0:
        capacity = 1
    elif capacity is None:
        capacity, counted = choose_capacity(flat, shared, backend, settings)
        overflow = "count" if counted else overflow
    out = _render(
        flat, shared=shared, backend=backend, capacity=capacity, overflow=overflow, **settings
    )
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), out)


def _flatten(inputs: dict[str, Array], batch: tuple[int, ...]) -> tuple[dict[str, Array], bool]:
    """Cameras with one axis of images, and Gaussians too unless they are shared; and whether."""
    shared = inputs["means"].ndim == 2
    flat, images = dict(inputs), math.prod(batch)
    own = [] if shared else ["means", "quats", "scales", "opacities"]
    own += ["colors"] if inputs["colors"].ndim > 2 else []
    for name in (*own, *CAMERAS):
        flat[name] = inputs[name].reshape(images, *inputs[name].shape[len(batch) :])
    return flat, shared


def _shade(inputs: dict[str, Array], batch: tuple[int, ...]) -> dict[str, Array]:
    """`colors` of each image in place of `sh`."""
    inputs, images = dict(inputs), math.prod(batch)
    sh, means = inputs.pop("sh"), inputs["means"]
    own = None if means.ndim == 2 else 0
    if own == 0:
        sh, means = (a.reshape(images, *a.shape[len(batch) :]) for a in (sh, means))
    viewmats = inputs["viewmats"].reshape(images, 4, 4)
    colors = jax.vmap(harmonics.shade, (own, own, 0))(sh, means, viewmats)
    return inputs | {"colors": colors.reshape(*batch, *colors.shape[1:])}


def count_capacity(
    means: Float[ArrayLike, "*g N 3"],
    quats: Float[ArrayLike, "*g N 4"],
    scales: Float[ArrayLike, "*g N 3"],
    opacities: Float[ArrayLike, "*g N"],
    viewmats: Float[ArrayLike, "*b 4 4"],
    Ks: Float[ArrayLike, "*b 3 3"],
    *,
    width: int,
    height: int,
    near: float = 0.01,
    antialiased: bool = False,
    backend: str = "auto",
) -> int:
    """The `capacity` that `rasterize` needs for a scene, up to a quarter more: not under `jit`.

    Arguments as for `rasterize`. For scenes that change, as in training, leave room for growth.
    """
    check_sizes(width=width, height=height)
    check_near(near)
    with modes.standard():
        arrays = (means, quats, scales, opacities, jnp.zeros((*jnp.shape(means)[:-1], 1)))
        inputs = dict(zip(GAUSSIANS, arrays, strict=True)) | {"viewmats": viewmats, "Ks": Ks}
        inputs = {name: jnp.asarray(a, jnp.float32) for name, a in inputs.items()}
        batch = check_shapes(inputs | {"background": jnp.zeros(1)})
        flat, shared = _flatten(inputs, batch)
        settings = {"width": width, "height": height, "near": near, "antialiased": antialiased}
        return choose_capacity(flat, shared, choose_backend(backend), settings)[0]


def choose_capacity(flat, shared: bool, backend: Backend, settings: dict) -> tuple[int, bool]:
    """Slots an image: counted where values are known, else by number of Gaussians and tiles.

    And whether they were counted.
    """
    shape = {"width": settings["width"], "height": settings["height"], "tile": backend.tile}
    num = flat["means"].shape[-2]
    try:
        slots = int(_count(flat, shared=shared, tile=backend.tile, **settings))
    except jax.errors.ConcretizationTypeError:
        return binning.default_capacity(num, **shape), False
    binning.check_memory(slots, num, len(flat["viewmats"]))
    return binning.round_capacity(slots), True


def _project_images(flat, shared: bool, **settings) -> Splats:
    """`project` for every image: Splats with a leading image axis."""
    own = None if shared else 0
    names = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks")
    one = functools.partial(project, **settings)
    painted = 0 if flat["colors"].ndim == 3 else None
    return jax.vmap(one, in_axes=(own,) * 4 + (painted, 0, 0))(*(flat[name] for name in names))


@functools.partial(
    jax.jit, static_argnames=("shared", "tile", "width", "height", "near", "antialiased")
)
def _count(flat, *, shared, tile, width, height, near, antialiased):
    splats = _project_images(
        flat, shared, width=width, height=height, near=near, antialiased=antialiased
    )
    count = functools.partial(binning.count_slots, width=width, height=height, tile=tile)
    return jnp.max(jax.vmap(count)(splats))


@functools.partial(
    jax.jit,
    static_argnames=(
        *("shared", "backend", "capacity", "overflow"),
        *("width", "height", "near", "antialiased"),
    ),
)
def _render(
    flat, *, shared, backend, capacity, overflow, width, height, near, antialiased
) -> Render:
    background = flat["background"][:, None, None]
    images, channels = flat["background"].shape
    if flat["means"].shape[-2] == 0 or images == 0:
        empty = jnp.zeros((images, height, width), jnp.float32)
        color = jnp.broadcast_to(background, (images, height, width, channels))
        return Render(color, empty, empty, jnp.zeros(images, jnp.int32))
    splats = _project_images(
        flat, shared, width=width, height=height, near=near, antialiased=antialiased
    )
    features, alpha, dropped = blend(
        splats, backend=backend, width=width, height=height, capacity=capacity
    )
    if overflow != "count":
        report = functools.partial(_report_overflow, capacity=capacity, error=overflow == "error")

        def call(dropped):
            if overflow == "error":
                io_callback(report, None, dropped)
            else:
                jax.debug.callback(report, dropped)

        lax.cond(jnp.any(dropped > 0), call, lambda dropped: None, lax.stop_gradient(dropped))
    return Render(
        color=features[..., :-1] + (1.0 - alpha)[..., None] * background,
        alpha=alpha,
        depth=features[..., -1] / jnp.maximum(alpha, 1e-10),
        overflow=dropped,
    )


_reported: set[int] = set()


def _report_overflow(dropped, *, capacity: int, error: bool) -> None:
    """Warns once of a capacity that is too small, or raises."""
    most = int(np.max(dropped))
    message = (
        f"{most} intersections of Gaussians with tiles did not fit an image's capacity of "
        f"{capacity} and were not drawn: pass a larger `capacity` (`count_capacity` says which), "
        "or use smaller Gaussians"
    )
    if error:
        raise ValueError(message)
    if capacity not in _reported:
        _reported.add(capacity)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

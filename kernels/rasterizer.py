"""`rasterize`: differentiable rendering of 3D Gaussians, on whatever device JAX runs on.

The contract (3D Gaussian Splatting with gsplat's conventions):

- covariance R S S^T R^T, projected with the perspective Jacobian at x/z, y/z clamped to the frustum
  widened by 0.3 tan(fov/2); + 0.3 I; Gaussians with z < near are not drawn;
- alpha = min(0.99, opacity exp(-sigma)) at pixel centres (+0.5), skipped under 1/255;
- blended front to back by camera z (equal z: in the given order); a pixel ends before the Gaussian
  that would bring its transmittance to 1e-4 or less; the background enters with what is left.

Rendering is two steps, also to be called on their own: `project` turns Gaussians into `Splats`, and
`blend` has a backend (`backends`) sort and blend those.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from kernels import meshes, modes, rendering
from kernels.arguments import (
    check_camera,
    check_finite,
    check_near,
    check_painted,
    check_shapes,
    check_sizes,
    check_splats,
    fields_of,
    warn_of_rounding,
)
from kernels.backends import Backend, choose_backend, compiles_ahead
from kernels.projection import Splats
from kernels.rendering import Render

OVERFLOW = ("warn", "error", "count")
"""What may happen, besides counting, where intersections don't fit the capacity."""


def rasterize(
    means: Float[ArrayLike, "*g N 3"],
    quats: Float[ArrayLike, "*g N 4"],
    scales: Float[ArrayLike, "*g N 3"],
    opacities: Float[ArrayLike, "*g N"],
    colors: Float[ArrayLike, "*p N C"] | None,
    viewmats: Float[ArrayLike, "*b 4 4"],
    Ks: Float[ArrayLike, "*k 3 3"],
    *,
    width: int,
    height: int,
    sh: Float[ArrayLike, "*g N K C"] | None = None,
    background: Float[ArrayLike, "*s C"] | None = None,
    near: float = 0.01,
    antialiased: bool = False,
    camera_model: str = "pinhole",
    radial_coeffs: Float[ArrayLike, "*r R"] | None = None,
    tangential_coeffs: Float[ArrayLike, "*t T"] | None = None,
    backend: str = "auto",
    capacity: int | None = None,
    overflow: str = "warn",
) -> Render:
    """Render images of 3D Gaussians; differentiable in every array, and fine under jit and vmap.

    To the bit what `blend(project(...), colors, ...)` renders.

    Args:
      means: centres in world units. The leading shape *g of the arrays of Gaussians is the cameras'
        *b (each image has its own Gaussians), none (all images share them), or a beginning of *b:
        [S, N, ...] with cameras [S, V, ...] are S scenes of V views each.
      quats: rotations (w, x, y, z), normalised here.
      scales: standard deviations along the rotated axes, world units.
      opacities: in [0, 1].
      colors: any number of channels, any range; blended as they are. *p is *b, a beginning of it or
        none: shared Gaussians may have a colour for each camera.
      viewmats: world to camera, OpenCV axes (x right, y down, z forward).
      Ks: intrinsics in pixels; no skew. *k is *b, a beginning of it or none (one for all).
      width, height: size of the images in pixels.
      sh: instead of `colors` (then None), coefficients of spherical harmonics of degree 0 to 3
        (K = 1, 4, 9 or 16), evaluated for each camera by `harmonics.shade`.
      background: colours behind everything, with a leading shape as `Ks`; None is 0.
      near: Gaussians nearer than this z are not drawn (those at it are); a number over 0.
      antialiased: dim splats that are smaller than a pixel (Mip-Splatting).
      camera_model: "pinhole"; "ortho", whose K has pixels to a world unit for focal lengths; or
        "fisheye", equidistant, up to 180 degrees.
      radial_coeffs, tangential_coeffs: OpenCV's distortion, with a leading shape as `Ks`: up to 6
        (k1 to k6) and 2 (p1, p2) for a pinhole camera, up to 4 and none for a fisheye.
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
    settings = _projection_settings(width, height, near, antialiased, camera_model)
    if (colors is None) == (sh is None):
        raise ValueError("expected either colors or sh, and None for the other")
    painted = {"colors": colors} if sh is None else {"sh": sh}
    warn_of_rounding(means, scales)
    with modes.standard():
        inputs = _scene(
            means, quats, scales, opacities, viewmats, Ks, radial_coeffs, tangential_coeffs
        )
        inputs |= _as_float32(**painted, background=_or_black(background, *painted.values()))
        batch = _check_scene(inputs, camera_model)
        check_painted(inputs, batch, inputs["means"].shape[-2])
        blending = _blending_settings(width, height, backend, capacity, overflow)

        def render(inputs):
            batch = inputs["viewmats"].shape[:-2]
            splats = rendering.project(_only(inputs, SCENE), batch=batch, **settings)
            if "sh" in inputs:
                shaded = _only(inputs, ("sh", "means", "viewmats"))
                inputs = inputs | {"colors": rendering.shade(shaded, batch=batch)}
            return rendering.blend(splats, _only(inputs, PAINT), **blending)

        return _run(render, inputs, like="viewmats")


def project(
    means: Float[ArrayLike, "*g N 3"],
    quats: Float[ArrayLike, "*g N 4"],
    scales: Float[ArrayLike, "*g N 3"],
    opacities: Float[ArrayLike, "*g N"],
    viewmats: Float[ArrayLike, "*b 4 4"],
    Ks: Float[ArrayLike, "*k 3 3"],
    *,
    width: int,
    height: int,
    near: float = 0.01,
    antialiased: bool = False,
    camera_model: str = "pinhole",
    radial_coeffs: Float[ArrayLike, "*r R"] | None = None,
    tangential_coeffs: Float[ArrayLike, "*t T"] | None = None,
) -> Splats:
    """The first step of `rasterize`: Gaussians as each image sees them. Arguments as there.

    `Splats` are a pytree of arrays [*b, N, ...], so their gradients are had by splitting the chain:

        splats, pull = jax.vjp(lambda g: project(*g, viewmats, Ks, **size), gaussians)
        d_splats = jax.grad(lambda s: loss(blend(s, colors, **size)))(splats)
        (d_gaussians,) = pull(d_splats)

    `d_splats.means` are the gradients of the projected means, in 1/pixels, that densification goes
    by (Kerbl et al., 2023); `blend` says how their absolute sums are had. `splats.radii` and
    `splats.visible(width, height)` say how large a splat is and whether it is in the image. Who
    does not ask pays for none of these.

    Raises: as `rasterize`.
    """
    settings = _projection_settings(width, height, near, antialiased, camera_model)
    warn_of_rounding(means, scales)
    with modes.standard():
        inputs = _scene(
            means, quats, scales, opacities, viewmats, Ks, radial_coeffs, tangential_coeffs
        )
        _check_scene(inputs, camera_model)

        def run(inputs):
            return rendering.project(inputs, batch=inputs["viewmats"].shape[:-2], **settings)

        return _run(run, inputs, like="viewmats")


def blend(
    splats: Splats,
    colors: Float[ArrayLike, "*p N C"],
    *,
    width: int,
    height: int,
    background: Float[ArrayLike, "*s C"] | None = None,
    absgrad: Float[ArrayLike, "*b N 2"] | None = None,
    backend: str = "auto",
    capacity: int | None = None,
    overflow: str = "warn",
) -> Render:
    """The second step of `rasterize`: sort and blend splats. Arguments as there, and:

    Args:
      splats: what `project` made for the same `width` and `height`. Differentiable in all but the
        order that `depths` give; `depths` have the gradients of `Render.depth`.
      absgrad: zeros, whose *gradient* is the sum over the pixels of the absolute values of what
        each pixel adds to the gradient of `splats.means`, in 1/pixels (Ye et al., AbsGS, 2024;
        gsplat's `absgrad`):

            def loss_of(splats, absgrad):
                return loss(blend(splats, colors, absgrad=absgrad, **size))

            zeros = jnp.zeros_like(splats.means)
            d_splats, absolute = jax.grad(loss_of, argnums=(0, 1))(splats, zeros)

        Their values are not read.

    Raises: as `rasterize`.
    """
    check_sizes(width=width, height=height)
    if colors is None:
        raise ValueError("colors is None; expected an array [*b,N,C]")
    with modes.standard():
        fields = _as_float32(**fields_of(splats))
        painted = {} if absgrad is None else {"absgrad": absgrad}
        paint = _as_float32(colors=colors, background=_or_black(background, colors), **painted)
        check_painted(paint, *check_splats(fields))
        settings = _blending_settings(width, height, backend, capacity, overflow)

        def run(inputs):
            splats = Splats(*(inputs[name] for name in Splats._fields))
            return rendering.blend(splats, _only(inputs, PAINT), **settings)

        return _run(run, {**fields, **paint}, like="depths")


def count_capacity(
    means: Float[ArrayLike, "*g N 3"],
    quats: Float[ArrayLike, "*g N 4"],
    scales: Float[ArrayLike, "*g N 3"],
    opacities: Float[ArrayLike, "*g N"],
    viewmats: Float[ArrayLike, "*b 4 4"],
    Ks: Float[ArrayLike, "*k 3 3"],
    *,
    width: int,
    height: int,
    near: float = 0.01,
    antialiased: bool = False,
    camera_model: str = "pinhole",
    radial_coeffs: Float[ArrayLike, "*r R"] | None = None,
    tangential_coeffs: Float[ArrayLike, "*t T"] | None = None,
    backend: str = "auto",
) -> int:
    """The `capacity` that `rasterize` needs for a scene, up to a quarter more: not under `jit`.

    Arguments as for `rasterize`. For scenes that change, as in training, leave room for growth.
    """
    settings = _projection_settings(width, height, near, antialiased, camera_model)
    with modes.standard():
        inputs = _scene(
            means, quats, scales, opacities, viewmats, Ks, radial_coeffs, tangential_coeffs
        )
        batch = _check_scene(inputs, camera_model)
        splats = rendering.project(inputs, batch=batch, **settings)
        chosen = choose_backend(backend)
        return rendering.choose_capacity(splats, chosen, width=width, height=height)[0]


SCENE = (*rendering.GAUSSIANS, *rendering.CAMERAS)
PAINT = ("colors", "background", "absgrad")


def _scene(*arrays: ArrayLike | None) -> dict[str, Array]:
    """Gaussians and cameras by their names; no coefficients are none."""
    none = np.zeros(0, np.float32)
    named = zip(SCENE, arrays, strict=True)
    return _as_float32(**{name: none if array is None else array for name, array in named})


def _check_scene(inputs: dict[str, Array], camera_model: str) -> tuple[int, ...]:
    """The leading shape of the images."""
    batch = check_shapes(inputs)
    counts = (inputs[name].shape[-1] for name in ("radial_coeffs", "tangential_coeffs"))
    check_camera(camera_model, *counts)
    return batch


def _only(inputs: dict[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
    return {name: inputs[name] for name in names if name in inputs}


def _as_float32(**arrays: ArrayLike) -> dict[str, Array]:
    return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


def _or_black(background: ArrayLike | None, colors: ArrayLike) -> ArrayLike:
    return np.zeros(jnp.shape(colors)[-1:], np.float32) if background is None else background


def _projection_settings(width, height, near, antialiased, camera_model) -> dict:
    check_sizes(width=width, height=height)
    check_near(near)
    return {
        **{"width": int(width), "height": int(height)},
        **{"near": float(near), "antialiased": bool(antialiased), "camera_model": camera_model},
    }


def _blending_settings(width, height, backend, capacity, overflow) -> dict:
    check_sizes(capacity=1 if capacity is None else capacity)
    if overflow not in OVERFLOW:
        raise ValueError(f"overflow is {overflow!r}; expected one of {', '.join(OVERFLOW)}")
    if overflow == "warn" and compiles_ahead():
        overflow = "count"  # A callback can be compiled only for the devices of this process.
    chosen: Backend = choose_backend(backend)
    return {
        **{"width": int(width), "height": int(height), "backend": chosen},
        **{"capacity": capacity, "overflow": overflow},
    }


def _run(function, inputs: dict[str, Array], like: str):
    """`function(inputs)`, with each device its own images where the types say who has which."""
    if meshes.is_explicit(inputs[like]):
        return meshes.map_images(function, inputs, like)
    check_finite(inputs)
    return function(inputs)

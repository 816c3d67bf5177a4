"""`rasterize`: differentiable rendering of 3D Gaussians, on whatever device JAX runs on.

The contract (3D Gaussian Splatting with gsplat's conventions):

- covariance R S S^T R^T, projected with the perspective Jacobian at x/z, y/z clamped to the frustum
  widened by 0.3 tan(fov/2); + 0.3 I; Gaussians with z < near are not drawn;
- alpha = min(0.99, opacity exp(-sigma)) at pixel centres (+0.5), skipped under 1/255;
- blended front to back by camera z (equal z: in the given order); a pixel ends before the Gaussian
  that would bring its transmittance to 1e-4 or less; the background enters with what is left.

`projection.project` turns Gaussians into `Splats`; JAX differentiates it. Sorting and blending
are a **backend**'s: a module with a `BACKEND`, an instance of `Backend`, two plain functions
of a flat batch of images:

    forward(splats, *, width, height, capacity) -> (Blend, residuals)
    backward(splats, blend, residuals, d_features, d_alpha, *, width, height, capacity) -> Splats

`backward` returns the gradients as `Splats` (those of `depths`, which only sort, are not read). All
arrays in and out, residuals included, have the images as their first axis. The rest is done here,
once for all backends: custom_vjp, folding axes of `vmap` into the images, the background, expected
depth. `shard_map` checks which arrays vary over the mesh: a loop's initial values and a kernel's
outputs must be made to vary as the inputs do (`jax.typeof(x).manual_axis_type`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import math
import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from kernels import binning
from kernels.projection import Splats, project

BACKENDS = {
    "xla": "kernels.xla",
    "pallas_tpu": "kernels.pallas_tpu",
    "pallas_gpu": "kernels.pallas_gpu",
    "cuda": "kernels.cuda",
}
"""Backend names, and the module whose `BACKEND` it is."""

PREFERENCE = {"cpu": ("xla",), "tpu": ("pallas_tpu", "xla"), "gpu": ("cuda", "pallas_gpu", "xla")}
"""What `auto` tries on each platform, best first."""

log = logging.getLogger(__name__)


class Render(NamedTuple):
    """Images that `rasterize` made."""

    color: Float[Array, "*b H W C"]
    alpha: Float[Array, "*b H W"]
    """How much of each pixel the Gaussians cover, 1 minus the final transmittance."""
    depth: Float[Array, "*b H W"]
    """Expected depth: camera z averaged with the weights of the colours; 0 where nothing is."""
    overflow: Int[Array, "*b"]
    """Intersections with tiles that did not fit the capacity, and so weren't drawn: 0 in order."""


class Blend(NamedTuple):
    """What a backend makes of `Splats`."""

    features: Float[Array, "images H W F"]
    """Sum of weight times feature (no background)."""
    alpha: Float[Array, "images H W"]
    """Sum of the weights."""
    overflow: Int[Array, "images"]


@dataclass(frozen=True)
class Backend:
    """Sorting and blending of splats on one kind of hardware. See the module's docstring."""

    name: str
    forward: Callable[..., tuple[Blend, Any]]
    backward: Callable[..., Splats]
    tile: tuple[int, int]
    """(width, height) in pixels of the tiles whose intersections `capacity` counts."""
    unavailable: Callable[[], str | None]
    """Why the backend cannot run here and what to install, or None if it can."""


def rasterize(
    means: Float[ArrayLike, "*g N 3"],
    quats: Float[ArrayLike, "*g N 4"],
    scales: Float[ArrayLike, "*g N 3"],
    opacities: Float[ArrayLike, "*g N"],
    colors: Float[ArrayLike, "*g N C"],
    viewmats: Float[ArrayLike, "*b 4 4"],
    Ks: Float[ArrayLike, "*b 3 3"],
    *,
    width: int,
    height: int,
    background: Float[ArrayLike, "*k C"] | None = None,
    near: float = 0.01,
    antialiased: bool = False,
    backend: str = "auto",
    capacity: int | None = None,
) -> Render:
    """Render images of 3D Gaussians; differentiable in every array, and fine under jit and vmap.

    Args:
      means: centres in world units. The leading shape *g of the five arrays of Gaussians is the
        cameras' *b (each image has its own Gaussians) or none (all images share them).
      quats: rotations (w, x, y, z), normalised here.
      scales: standard deviations along the rotated axes, world units.
      opacities: in [0, 1].
      colors: any number of channels, any range; blended as they are.
      viewmats: world to camera, OpenCV axes (x right, y down, z forward).
      Ks: intrinsics in pixels; no skew.
      width, height: size of the images in pixels.
      background: colours behind everything, per image (*k is *b) or for all; None is 0.
      near: Gaussians nearer than this z are not drawn.
      antialiased: dim splats that are smaller than a pixel (Mip-Splatting).
      backend: one of `BACKENDS`, or "auto" for the best that runs on JAX's default device.
      capacity: room for intersections of Gaussians with tiles, in each image. None: outside of
        `jax.jit` they are counted first; inside, where values aren't known, it is what Gaussians
        `binning.GUESSED_PIXELS` wide need, but at least 65,536 (or all tiles, if that is less).
        What did not fit is counted in `Render.overflow`, never dropped silently.

    Raises:
      ValueError: shapes that don't go together, sizes that aren't integers of 1 or more, an unknown
        backend, or, outside of `jax.jit` (inside, values aren't known), NaN or infinite values: the
        message names the array.
      BackendUnavailableError: the backend asked for cannot run here.
    """
    _check_sizes(width=width, height=height, capacity=1 if capacity is None else capacity)
    gaussians = {
        "means": means,
        "quats": quats,
        "scales": scales,
        "opacities": opacities,
        "colors": colors,
    }
    cameras = {"viewmats": viewmats, "Ks": Ks}
    if background is None:
        background = jnp.zeros(jnp.shape(colors)[-1:], jnp.float32)
    inputs = {
        name: jnp.asarray(a, jnp.float32)
        for name, a in {**gaussians, **cameras, "background": background}.items()
    }
    batch = _check_shapes(inputs)
    _check_finite(inputs)
    chosen = choose_backend(backend)

    # One flat axis of images; Gaussians have it or not.
    images = math.prod(batch)
    shared = inputs["means"].ndim == 2
    flat = dict(inputs)
    for name in cameras if shared else (*gaussians, *cameras):
        flat[name] = inputs[name].reshape(images, *inputs[name].shape[len(batch) :])
    channels = inputs["colors"].shape[-1]
    flat["background"] = jnp.broadcast_to(inputs["background"], (*batch, channels))
    flat["background"] = flat["background"].reshape(images, channels)
    settings = {"width": width, "height": height, "near": near, "antialiased": antialiased}
    if flat["means"].shape[-2] == 0 or images == 0:
        capacity = 1
    elif capacity is None:
        capacity = choose_capacity(flat, shared, chosen, settings)
    out = _render(flat, shared=shared, backend=chosen, capacity=capacity, **settings)
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), out)


class BackendUnavailableError(ValueError):
    """The backend asked for cannot run here."""


_ahead_for = contextvars.ContextVar("platform that is compiled for ahead", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within, backends are chosen for that platform ("tpu"), of which no device need be here.

    What is traced within can be lowered and compiled for such devices, not run.
    """
    token = _ahead_for.set(platform)
    try:
        yield
    finally:
        _ahead_for.reset(token)


def platform() -> str:
    """That of JAX's default device, "cpu", "tpu" or "gpu", or what `compiling_for` says."""
    name = _ahead_for.get() or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def choose_backend(name: str) -> Backend:
    """The backend of that name; "auto" picks by JAX's default device.

    It logs, once, what it takes (INFO) and what would be better but cannot run (WARNING).
    """
    if name == "auto":
        return _choose_for(platform())
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; expected 'auto' or one of {', '.join(BACKENDS)}")
    found, reason = _load(name)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} cannot run here: {reason}")
    return found


@functools.cache
def _choose_for(platform: str) -> Backend:
    """The best backend that runs on a platform."""
    for candidate in candidates(platform):
        found, reason = _load(candidate)
        if reason is None:
            log.info("rasterize: backend %s on %s", candidate, platform)
            return found
        log.warning("rasterize: backend %s is skipped: %s", candidate, reason)
    raise BackendUnavailableError(f"no backend runs on {platform}")


def candidates(platform: str) -> tuple[str, ...]:
    """The backends made for a platform, best first; perhaps with something to install."""
    return PREFERENCE.get(platform, ("xla",))


def _load(name: str) -> tuple[Backend | None, str | None]:
    """The backend, and why it can't run (or None)."""
    try:
        found = importlib.import_module(BACKENDS[name]).BACKEND
    except ImportError as error:
        return None, str(error)
    return found, found.unavailable()


def missing_nvidia_gpu() -> str | None:
    """Why JAX's default device isn't an NVIDIA GPU of the last generations, or None if it is."""
    if platform() != "gpu":
        return (
            f"it needs an NVIDIA GPU and JAX's default device is {platform()}; "
            "with a GPU, `pip install 'jax[cuda12]'`"
        )
    gpu = jax.devices()[0]
    capability = getattr(gpu, "compute_capability", "none")
    if not capability[0].isdigit() or int(capability.partition(".")[0]) < 8:
        return (
            "it needs an NVIDIA GPU of compute capability 8.0 (A100) or more; "
            f"that of {gpu.device_kind} is {capability}"
        )
    return None


def _check_sizes(**sizes: int) -> None:
    """Raises ValueError naming the sizes that are not whole numbers of 1 or more."""
    wrong = [
        f"{name} is {value!r}"
        for name, value in sizes.items()
        if not isinstance(value, numbers.Integral) or value < 1
    ]
    if wrong:
        raise ValueError(f"{' and '.join(wrong)}; expected integers of 1 or more")


def _check_shapes(inputs: dict[str, Array]) -> tuple[int, ...]:
    """The leading shape of the images. Raises ValueError if the shapes don't go together."""
    means, colors, viewmats = inputs["means"], inputs["colors"], inputs["viewmats"]
    if viewmats.ndim < 2 or means.ndim < 2 or colors.ndim < 2:
        raise ValueError(
            "viewmats must be [*b,4,4], means [*b,N,3] and colors [*b,N,C]; they are "
            f"{viewmats.shape}, {means.shape} and {colors.shape}"
        )
    batch, own = viewmats.shape[:-2], means.shape[:-2]
    num, channels = means.shape[-2], colors.shape[-1]
    if own not in ((), batch):
        raise ValueError(
            f"means have leading shape {own}; expected that of viewmats, {batch}, or none"
        )
    expected = {
        "means": (*own, num, 3),
        "quats": (*own, num, 4),
        "scales": (*own, num, 3),
        "opacities": (*own, num),
        "colors": (*own, num, channels),
        "viewmats": (*batch, 4, 4),
        "Ks": (*batch, 3, 3),
    }
    for name, shape in expected.items():
        if inputs[name].shape != shape:
            raise ValueError(f"{name} has shape {inputs[name].shape}; expected {shape}")
    if inputs["background"].shape not in ((channels,), (*batch, channels)):
        raise ValueError(
            f"background has shape {inputs['background'].shape}; "
            f"expected {(channels,)} or {(*batch, channels)}"
        )
    return batch


def _check_finite(inputs: dict[str, Array]) -> None:
    """Raise ValueError naming the inputs with NaN or infinite values, where values are known."""
    try:
        finite = np.asarray(jax.lax.stop_gradient(_all_finite(inputs)))
    except jax.errors.TracerArrayConversionError:
        return
    bad = [name for name, ok in zip(sorted(inputs), finite, strict=True) if not ok]
    if bad:
        raise ValueError(f"{' and '.join(bad)}: NaN or infinite values; expected finite numbers")


@jax.jit
def _all_finite(inputs):
    return jnp.stack([jnp.isfinite(inputs[name]).all() for name in sorted(inputs)])


def choose_capacity(flat, shared: bool, backend: Backend, settings: dict) -> int:
    """Slots an image: counted where values are known, else by number of Gaussians and tiles."""
    shape = {"width": settings["width"], "height": settings["height"], "tile": backend.tile}
    try:
        slots = int(_count(flat, shared=shared, tile=backend.tile, **settings))
    except jax.errors.ConcretizationTypeError:
        return binning.default_capacity(flat["means"].shape[-2], **shape)
    return binning.round_capacity(slots)


def _project_images(flat, shared: bool, **settings) -> Splats:
    """`project` for every image: Splats with a leading image axis."""
    own = None if shared else 0
    names = ("means", "quats", "scales", "opacities", "colors", "viewmats", "Ks")
    one = functools.partial(project, **settings)
    return jax.vmap(one, in_axes=(own,) * 5 + (0, 0))(*(flat[name] for name in names))


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
    static_argnames=("shared", "backend", "capacity", "width", "height", "near", "antialiased"),
)
def _render(flat, *, shared, backend, capacity, width, height, near, antialiased) -> Render:
    background = flat["background"][:, None, None]
    images, channels = flat["background"].shape
    if flat["means"].shape[-2] == 0 or images == 0:
        empty = jnp.zeros((images, height, width), jnp.float32)
        color = jnp.broadcast_to(background, (images, height, width, channels))
        return Render(color, empty, empty, jnp.zeros(images, jnp.int32))
    splats = _project_images(
        flat, shared, width=width, height=height, near=near, antialiased=antialiased
    )
    features, alpha, overflow = blend(
        splats, backend=backend, width=width, height=height, capacity=capacity
    )
    return Render(
        color=features[..., :-1] + (1.0 - alpha)[..., None] * background,
        alpha=alpha,
        depth=features[..., -1] / jnp.maximum(alpha, 1e-10),
        overflow=overflow,
    )


def blend(splats: Splats, *, backend: Backend, width: int, height: int, capacity: int) -> Blend:
    """A backend's `forward`, differentiable by its `backward`, with vmapped axes folded in."""
    settings = {"width": width, "height": height, "capacity": capacity}
    forward = _fold_vmap(functools.partial(backend.forward, **settings))
    backward = _fold_vmap(functools.partial(backend.backward, **settings))

    @jax.custom_vjp
    def run(splats):
        return forward(splats)[0]

    def run_forward(splats):
        out, residuals = forward(splats)
        return out, (splats, out, residuals)

    def run_backward(saved, cotangent):
        gradient = backward(*saved, cotangent.features, cotangent.alpha)
        return (gradient._replace(depths=jnp.zeros_like(gradient.depths)),)

    run.defvjp(run_forward, run_backward)
    return run(splats)


def _fold_vmap(function: Callable) -> Callable:
    """`function` of a flat batch, such that `vmap` enlarges the batch instead of adding an axis."""
    folded = custom_vmap(function)

    @folded.def_vmap
    def rule(size, batched, *args):
        args = jax.tree.map(
            lambda a, has: a if has else jnp.broadcast_to(a, (size, *a.shape)), args, tuple(batched)
        )
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), args)
        out = folded(*flat)
        out = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return folded

"""What `rasterizer`'s functions do once their arguments are checked: batches, capacity, jit.

Arrays come with any leading axes of images, `batch`; those that several images share lack some of
them at the end (`arguments.RANKS`). What is called `own` is the Gaussians' leading shape.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jaxtyping import Array, Float, Int

from kernels import binning, blending, harmonics
from kernels.arguments import RANKS
from kernels.backends import Backend
from kernels.projection import Splats, project_image

GAUSSIANS = ("means", "quats", "scales", "opacities")
CAMERAS = ("viewmats", "Ks", "radial_coeffs", "tangential_coeffs")


class Render(NamedTuple):
    """Images that `rasterize` and `blend` made."""

    color: Float[Array, "*b H W C"]
    alpha: Float[Array, "*b H W"]
    """How much of each pixel the Gaussians cover, 1 minus the final transmittance."""
    depth: Float[Array, "*b H W"]
    """Expected depth: camera z averaged with the weights of the colours; 0 where nothing is."""
    overflow: Int[Array, "*b"]
    """Intersections with tiles that did not fit the capacity, and so weren't drawn: 0 in order."""


@functools.partial(
    jax.jit, static_argnames=("batch", "width", "height", "near", "antialiased", "camera_model")
)
def project(inputs: dict[str, Array], *, batch: tuple[int, ...], **settings) -> Splats:
    """Splats [*batch, N] of `GAUSSIANS` and `CAMERAS`."""
    own = inputs["means"].shape[:-2]
    gaussians = [inputs[name] for name in GAUSSIANS]
    cameras = [_spread(inputs[name], RANKS[name], batch) for name in CAMERAS]
    one = functools.partial(project_image, **settings)
    return _each_image(one, gaussians, cameras, own, batch)


@functools.partial(jax.jit, static_argnames="batch")
def shade(inputs: dict[str, Array], *, batch: tuple[int, ...]) -> Float[Array, "*b N C"]:
    """Colours that `sh` has for each camera."""
    gaussians, cameras = [inputs["sh"], inputs["means"]], [inputs["viewmats"]]
    return _each_image(harmonics.shade, gaussians, cameras, inputs["means"].shape[:-2], batch)


def _each_image(
    function: Callable,
    gaussians: Sequence[Array],
    cameras: Sequence[Array],
    own: tuple[int, ...],
    batch: tuple[int, ...],
) -> Any:
    """`function(*gaussians, *cameras)` of one image, for a batch: what cameras share is not copied.

    `gaussians` have the leading shape `own`, a beginning of `batch`, which is that of `cameras`.
    """
    scenes = (math.prod(own),) if own else ()
    views = (math.prod(batch[len(own) :]),) if len(own) < len(batch) else ()
    if views:
        function = jax.vmap(function, (None,) * len(gaussians) + (0,) * len(cameras))
    if scenes:
        function = jax.vmap(function)
    out = function(
        *(a.reshape(*scenes, *a.shape[len(own) :]) for a in gaussians),
        *(a.reshape(*scenes, *views, *a.shape[len(batch) :]) for a in cameras),
    )
    flat = len(scenes) + len(views)
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[flat:]), out)


def _spread(array: Array, rank: int, batch: tuple[int, ...]) -> Array:
    """An array with the leading shape `batch` that may lack some of it at the end."""
    lead, row = array.shape[: array.ndim - rank], array.shape[array.ndim - rank :]
    array = array.reshape(*lead, *[1] * (len(batch) - len(lead)), *row)
    return jnp.broadcast_to(array, (*batch, *row))


def blend(
    splats: Splats,
    inputs: dict[str, Array],
    *,
    backend: Backend,
    capacity: int | None,
    overflow: str,
    width: int,
    height: int,
) -> Render:
    """Images of splats with `colors` over a `background`, and an `absgrad` or none."""
    batch, num = splats.depths.shape[:-1], splats.depths.shape[-1]
    size = {"width": width, "height": height}
    if num == 0 or math.prod(batch) == 0:
        capacity = 1
    elif capacity is None:
        capacity, counted = choose_capacity(splats, backend, **size)
        overflow = "count" if counted else overflow
    return _blend(splats, inputs, backend=backend, capacity=capacity, overflow=overflow, **size)


def choose_capacity(
    splats: Splats, backend: Backend, *, width: int, height: int
) -> tuple[int, bool]:
    """Slots an image: counted where values are known, else by number of Gaussians and tiles.

    And whether they were counted.
    """
    size = {"width": width, "height": height, "tile": backend.tile}
    batch, num = splats.depths.shape[:-1], splats.depths.shape[-1]
    try:
        slots = count_slots(splats, **size)
    except jax.errors.ConcretizationTypeError:
        return binning.default_capacity(num, **size), False
    binning.check_memory(slots, num, math.prod(batch))
    return binning.round_capacity(slots), True


def count_slots(splats: Splats, *, width: int, height: int, tile: tuple[int, int]) -> int:
    """Slots that the fullest image needs: not under `jit`."""
    return int(_count(splats, width=width, height=height, tile=tile))


@functools.partial(jax.jit, static_argnames=("width", "height", "tile"))
def _count(splats: Splats, **size) -> Int[Array, ""]:
    count = functools.partial(binning.count_slots, **size)
    return jnp.max(jax.vmap(count)(_flatten(splats)), initial=0)


def _flatten(splats: Splats) -> Splats:
    """With one axis of images."""
    batch = splats.depths.shape[:-1]
    return jax.tree.map(lambda a: a.reshape(math.prod(batch), *a.shape[len(batch) :]), splats)


@functools.partial(jax.jit, static_argnames=("backend", "capacity", "overflow", "width", "height"))
def _blend(splats: Splats, inputs, *, backend, capacity, overflow, width, height) -> Render:
    batch, num = splats.depths.shape[:-1], splats.depths.shape[-1]
    images, channels = math.prod(batch), inputs["colors"].shape[-1]
    background = _spread(inputs["background"], 1, batch).reshape(images, 1, 1, channels)
    if num == 0 or images == 0:
        empty = jnp.zeros((images, height, width), jnp.float32)
        color = jnp.broadcast_to(background, (images, height, width, channels))
        out = Render(color, empty, empty, jnp.zeros(images, jnp.int32))
        return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), out)
    colors = _spread(inputs["colors"], 2, batch)
    features = jnp.concatenate([colors, splats.depths[..., None]], -1)
    features = features.reshape(images, num, channels + 1)
    absgrad = inputs.get("absgrad")
    if absgrad is not None:
        absgrad = absgrad.reshape(images, num, 2)
    blended, alpha, dropped = blending.composite(
        _flatten(splats), features, absgrad,
        backend=backend, width=width, height=height, capacity=capacity,
    )  # fmt: skip
    if overflow != "count":
        _report(dropped, capacity=capacity, error=overflow == "error")
    out = Render(
        color=blended[..., :-1] + (1.0 - alpha)[..., None] * background,
        alpha=alpha,
        depth=blended[..., -1] / jnp.maximum(alpha, 1e-10),
        overflow=dropped,
    )
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), out)


def _report(dropped: Int[Array, "images"], *, capacity: int, error: bool) -> None:
    """Has the host told, from within a compiled program, of what did not fit."""
    report = functools.partial(_report_overflow, capacity=capacity, error=error)

    def call(dropped):
        if error:
            io_callback(report, None, dropped)
        else:
            jax.debug.callback(report, dropped)

    lax.cond(jnp.any(dropped > 0), call, lambda dropped: None, lax.stop_gradient(dropped))


_reported: set[int] = set()


def _report_overflow(dropped, *, capacity: int, error: bool) -> None:
    """Warns once of a capacity that is too small, or raises."""
    most = int(np.max(dropped))
    if not most:  # Under vmap both branches of `_report`'s condition are taken.
        return
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

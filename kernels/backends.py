"""The backends that sort and blend splats: what one is, and which one runs here.

A **backend** is a module with a `BACKEND`, an instance of `Backend`, two plain functions of a flat
batch of images:

    forward(splats, features, *, frame) -> (Blend, residuals)
    backward(splats, features, residuals, cotangent, *, frame, absgrad) -> Gradients

`features` [images, N, F] is what is blended: the colours, and the depth as the last channel. All
arrays in and out, residuals included, have the images as their first axis. The rest is done once
for all backends: custom_vjp and folding axes of `vmap` into the images (`blending`), the background
and expected depth (`rendering`). `shard_map` checks which arrays vary over the mesh: a loop's
initial values and a kernel's outputs must be made to vary as the inputs do
(`jax.typeof(x).manual_axis_type`).
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

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


class Frame(NamedTuple):
    """Size of the images in pixels, and the room each has for intersections with tiles."""

    width: int
    height: int
    capacity: int


class Blend(NamedTuple):
    """What a backend makes of `Splats`."""

    features: Float[Array, "images H W F"]
    """Sum of weight times feature (no background)."""
    alpha: Float[Array, "images H W"]
    """Sum of the weights."""
    overflow: Int[Array, "images"]


class Cotangent(NamedTuple):
    """Gradients of the loss by what a backend made."""

    features: Float[Array, "images H W F"]
    alpha: Float[Array, "images H W"]


class Gradients(NamedTuple):
    """By what a backend blends; depths only sort, and have none."""

    means: Float[Array, "images N 2"]
    cholesky: Float[Array, "images N 3"]
    opacities: Float[Array, "images N"]
    features: Float[Array, "images N F"]
    absgrad: Float[Array, "images N 2"] | None = None
    """Sum over the pixels of the absolute value of what each adds to `means`, if asked for."""


@dataclass(frozen=True)
class Backend:
    """Sorting and blending of splats on one kind of hardware. See the module's docstring."""

    name: str
    forward: Callable[..., tuple[Blend, Any]]
    backward: Callable[..., Gradients]
    tile: tuple[int, int]
    """(width, height) in pixels of the tiles whose intersections `capacity` counts."""
    unavailable: Callable[[], str | None]
    """Why the backend cannot run here and what to install, or None if it can."""


class BackendUnavailableError(ValueError):
    """The backend asked for cannot run here."""


_ahead_for = contextvars.ContextVar("platform that is compiled for ahead", default=None)


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within, backends are chosen for that platform, "tpu" or "gpu", of which none need be here.

    What is traced within can be lowered and compiled for such devices, not run.
    """
    token = _ahead_for.set(platform)
    try:
        yield
    finally:
        _ahead_for.reset(token)


def compiles_ahead() -> bool:
    """Whether this is within `compiling_for`."""
    return _ahead_for.get() is not None


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
    if compute_capability() < 8:
        gpu = jax.devices()[0]
        return (
            "it needs an NVIDIA GPU of compute capability 8.0 (A100) or more; "
            f"that of {gpu.device_kind} is {getattr(gpu, 'compute_capability', 'none')}"
        )
    return None


def compute_capability() -> float:
    """That of the NVIDIA GPU here, an H100's where GPUs are compiled for; 0 for all else."""
    if platform() != "gpu":
        return 0.0
    if compiles_ahead():
        return 9.0
    found = re.fullmatch(r"(\d+)\.(\d)", getattr(jax.devices()[0], "compute_capability", ""))
    return float(found[0]) if found else 0.0

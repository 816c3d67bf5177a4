"""What `rasterize` takes, checked: a wrong argument is named in one sentence."""

from __future__ import annotations

import math
import numbers
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from kernels import binning, cameras, harmonics
from kernels.projection import Splats


def check_sizes(**sizes: int) -> None:
    """Raises ValueError naming the sizes that are not whole numbers of 1 or more."""
    wrong = [
        f"{name} is {value!r}"
        for name, value in sizes.items()
        if not isinstance(value, numbers.Integral) or value < 1
    ]
    if wrong:
        raise ValueError(f"{' and '.join(wrong)}; expected integers of 1 or more")
    large = [f"{name} is {value}" for name, value in sizes.items() if value > binning.MAX_SLOTS]
    if large:
        raise ValueError(f"{' and '.join(large)}; expected at most {binning.MAX_SLOTS}")


def check_near(near: float) -> None:
    """Raises ValueError for what is no finite number over 0; an array of no axes may be one."""
    if isinstance(near, jax.core.Tracer):
        raise ValueError(
            "near is traced by a JAX transformation; expected a number: make it static, or close "
            "over it"
        )
    number = isinstance(near, numbers.Real) or (
        isinstance(near, np.ndarray) and near.ndim == 0 and near.dtype.kind in "fiu"
    )
    if not number or not 0 < float(near) < math.inf:
        raise ValueError(f"near is {near!r}; expected a finite number over 0")


def warn_of_rounding(means: ArrayLike, scales: ArrayLike) -> None:
    """Float64 far from the origin loses in float32 what a renderer shows."""
    known = all(isinstance(a, np.ndarray) and a.dtype == np.float64 for a in (means, scales))
    if not known or not means.size or not scales.size:
        return
    lost = np.max(np.abs(means - means.astype(np.float32)))
    size = np.median(np.max(scales, -1))
    if lost > 0.05 * size:
        warnings.warn(
            f"means of up to {np.max(np.abs(means)):.3g} are rounded to float32 by up to "
            f"{lost:.2g}, beside scales of {size:.2g}: subtract the scene's centre from the means "
            "and move the cameras along",
            RuntimeWarning,
            stacklevel=3,
        )


RANKS = {
    **{"means": 2, "quats": 2, "scales": 2, "opacities": 1, "colors": 2, "sh": 3},
    **{"viewmats": 2, "Ks": 2, "radial_coeffs": 1, "tangential_coeffs": 1, "background": 1},
    **{"cholesky": 2, "depths": 1, "absgrad": 2},
}
"""Axes of each array without its leading axes of images."""


def check_shapes(inputs: dict[str, Array]) -> tuple[int, ...]:
    """The leading shape of the images that Gaussians and cameras make.

    Raises ValueError if the shapes don't go together.
    """
    means, viewmats = inputs["means"], inputs["viewmats"]
    if viewmats.ndim < 2 or means.ndim < 2:
        raise ValueError(
            "viewmats must be [*b,4,4] and means [*b,N,3]; they are "
            f"{viewmats.shape} and {means.shape}"
        )
    batch, own, num = viewmats.shape[:-2], means.shape[:-2], means.shape[-2]
    if own != batch[: len(own)]:
        raise ValueError(
            f"means have leading shape {own}; expected that of viewmats, {batch}, a beginning of "
            "it, or none"
        )
    rows = {"means": (num, 3), "quats": (num, 4), "scales": (num, 3), "opacities": (num,)}
    if "sh" in inputs:
        size, channels = _last_two(inputs["sh"], "sh", "[*b,N,K,C]")
        if size not in harmonics.SIZES:
            raise ValueError(f"sh has {size} coefficients; expected one of {harmonics.SIZES}")
        rows["sh"] = (num, size, channels)
    for name, row in rows.items():
        _expect(inputs[name], name, (*own, *row))
    _expect(inputs["viewmats"], "viewmats", (*batch, 4, 4))
    _expect_beginning(inputs["Ks"], "Ks", batch, (3, 3))
    for name in ("radial_coeffs", "tangential_coeffs"):
        if inputs[name].ndim < 1:
            raise ValueError(f"{name} is one number; expected an array of coefficients")
        _expect_beginning(inputs[name], name, batch, inputs[name].shape[-1:])
    return batch


def check_camera(model: str, radial: int, tangential: int) -> None:
    """Raises ValueError for an unknown camera model or numbers of coefficients it cannot have."""
    if not isinstance(model, str) or model not in cameras.MODELS:
        raise ValueError(f"camera_model is {model!r}; expected one of {', '.join(cameras.MODELS)}")
    most = cameras.MODELS[model]
    if radial > most:
        raise ValueError(
            f"radial_coeffs has {radial} coefficients; expected up to {most} for {model!r}"
        )
    if tangential not in ((0, 2) if model == "pinhole" else (0,)):
        raise ValueError(
            f"tangential_coeffs has {tangential} coefficients; expected p1 and p2 for 'pinhole', "
            "and None for other cameras"
        )


def check_painted(inputs: dict[str, Array], batch: tuple[int, ...], num: int) -> None:
    """Raises ValueError if `colors`, `background` or `absgrad` don't go with the splats."""
    if "colors" in inputs:
        _, channels = _last_two(inputs["colors"], "colors", "[*b,N,C]")
        _expect_beginning(inputs["colors"], "colors", batch, (num, channels))
    else:
        channels = inputs["sh"].shape[-1]
    _expect_beginning(inputs["background"], "background", batch, (channels,))
    if "absgrad" in inputs:
        _expect(inputs["absgrad"], "absgrad", (*batch, num, 2))


def fields_of(splats: Splats) -> dict[str, Array]:
    """The splats' arrays by their names; raises ValueError if they are something else."""
    if not isinstance(splats, Splats):
        raise ValueError(f"splats is a {type(splats).__name__}; expected what `project` returns")
    return splats._asdict()


def check_splats(splats: dict[str, Array]) -> tuple[tuple[int, ...], int]:
    """The leading shape of splats' images, and how many splats each has."""
    if splats["depths"].ndim < 1:
        raise ValueError("splats have no axis of Gaussians; expected what `project` returns")
    batch, num = splats["depths"].shape[:-1], splats["depths"].shape[-1]
    rows = {"means": (num, 2), "cholesky": (num, 3), "opacities": (num,)}
    for name, row in rows.items():
        _expect(splats[name], f"splats.{name}", (*batch, *row))
    return batch, num


def _last_two(array: Array, name: str, expected: str) -> tuple[int, int]:
    if array.ndim < RANKS[name]:
        raise ValueError(f"{name} has shape {array.shape}; expected {expected}")
    return array.shape[-2:]


def _expect(array: Array, name: str, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {shape}")


def _expect_beginning(array: Array, name: str, batch: tuple[int, ...], row: tuple) -> None:
    """Rows with the leading shape of the images, a beginning of it, or none."""
    lead = array.shape[: max(array.ndim - len(row), 0)]
    if array.shape != (*batch[: len(lead)], *row):
        shapes = [(*batch[:n], *row) for n in range(len(batch), -1, -1)]
        raise ValueError(
            f"{name} has shape {array.shape}; expected {' or '.join(map(str, shapes))}"
        )


def check_finite(inputs: dict[str, Array]) -> None:
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

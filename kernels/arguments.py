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

from kernels import binning, harmonics


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
    if isinstance(near, jax.core.Tracer):
        raise ValueError(
            "near is traced by a JAX transformation; expected a number: make it static, or close "
            "over it"
        )
    if not isinstance(near, numbers.Real | np.ndarray) or not 0 < float(near) < math.inf:
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


def check_shapes(inputs: dict[str, Array]) -> tuple[int, ...]:
    """The leading shape of the images. Raises ValueError if the shapes don't go together."""
    means, viewmats = inputs["means"], inputs["viewmats"]
    colors = inputs.get("colors", inputs.get("sh"))
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
    if "sh" in inputs:
        size = colors.shape[-2]
        if size not in harmonics.SIZES:
            raise ValueError(f"sh has {size} coefficients; expected one of {harmonics.SIZES}")
        painted = {"sh": (*own, num, size, channels)}
    else:
        cameras_too = colors.shape[:-2] == batch
        painted = {"colors": (*(batch if cameras_too else own), num, channels)}
    expected = {
        "means": (*own, num, 3),
        "quats": (*own, num, 4),
        "scales": (*own, num, 3),
        "opacities": (*own, num),
        **painted,
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

"""The frozen networks that a config asks for, loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from flexavatar_jax.frozen import dinov2, hiera


class FrozenNetworks(NamedTuple):
    """Parameters of the frozen networks; None where the config turns one off."""

    dinov2_base: dinov2.Params | None = None
    """DINOv2 base: features beside the patches of the input image."""
    dinov2_small: dinov2.Params | None = None
    """DINOv2 small: perceptual loss."""
    sam2: hiera.Params | None = None
    """SAM 2.1 Hiera-small: perceptual loss."""


def load_frozen_networks(config: ConfigDict) -> FrozenNetworks:
    """Reads what `model.dino`, `loss.dino` and `loss.sam` ask for, from the paths in `frozen`.

    They compute in `model.dtype`, as the model does.

    Raises:
      UserError: no weights there; says what to fetch, and which field turns it off.
      UserError: not that network's weights; names the tensor.
    """
    dtype, paths = jnp.dtype(config.model.dtype), config.frozen
    return FrozenNetworks(
        dinov2_base=load_dinov2_base(config),
        dinov2_small=dinov2.load(paths.dinov2_small, dinov2.SMALL, dtype)
        if config.loss.dino
        else None,
        sam2=hiera.load(paths.sam2, dtype) if config.loss.sam else None,
    )


def frozen_shapes(config: ConfigDict) -> FrozenNetworks:
    """Shapes and dtypes of what `load_frozen_networks` returns; needs no weights."""
    dtype = jnp.dtype(config.model.dtype)

    def shapes(of: Mapping[str, tuple[int, ...]], fold: Callable) -> Any:
        zeros = {name: np.zeros(shape, np.float32) for name, shape in of.items()}
        return jax.eval_shape(lambda: fold(zeros))

    def dino(size: dinov2.Architecture) -> dinov2.Params:
        return shapes(dinov2.shapes(size), lambda weights: dinov2.fold(weights, size, dtype))

    return FrozenNetworks(
        dinov2_base=dino(dinov2.BASE) if config.model.dino else None,
        dinov2_small=dino(dinov2.SMALL) if config.loss.dino else None,
        sam2=shapes(hiera.shapes(), lambda w: hiera.fold(w, dtype)) if config.loss.sam else None,
    )


def load_dinov2_base(config: ConfigDict) -> dinov2.Params | None:
    """What inference needs of `load_frozen_networks`: DINOv2 base, if `model.dino` asks for it."""
    if not config.model.dino:
        return None
    return dinov2.load(config.frozen.dinov2_base, dinov2.BASE, jnp.dtype(config.model.dtype))


def load_perceptual_networks(
    config: ConfigDict, dinov2_small: str = "", sam2: str = ""
) -> FrozenNetworks:
    """The networks of the perceptual losses whose weights are given, or lie where config says.

    Args:
      config: of the run.
      dinov2_small, sam2: paths, instead of `frozen.dinov2_small` and `frozen.sam2`. A path that is
        given must be there; one of the config's is left out if nothing is there.

    Raises:
      UserError: no weights at a given path, or not that network's.
    """
    dtype = jnp.dtype(config.model.dtype)

    def found(given: str, configured: str) -> str:
        return given or (configured if configured and epath.Path(configured).exists() else "")

    dino = found(dinov2_small, config.frozen.dinov2_small)
    sam = found(sam2, config.frozen.sam2)
    return FrozenNetworks(
        dinov2_small=dinov2.load(dino, dinov2.SMALL, dtype) if dino else None,
        sam2=hiera.load(sam, dtype) if sam else None,
    )

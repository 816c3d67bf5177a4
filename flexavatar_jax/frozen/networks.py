"""The frozen networks that a config asks for, loaded."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from flexavatar_jax.frozen import dinov2, hiera


class FrozenNetworks(NamedTuple):
    """Parameters of the frozen networks; None where the config turns one off."""

    encoder: dinov2.Params | None = None
    """DINOv2 base: features beside the patches of the input image."""
    dino: dinov2.Params | None = None
    """DINOv2 small: perceptual loss."""
    sam: hiera.Params | None = None
    """SAM 2.1 Hiera-small: perceptual loss."""


def load_frozen_networks(config: ConfigDict) -> FrozenNetworks:
    """Reads what `model.dino`, `loss.dino` and `loss.sam` ask for, from the paths in `frozen`.

    They compute in `model.dtype`, as the model does.

    Raises:
      FileNotFoundError: no weights there; says what to fetch, and which field turns it off.
      ValueError: not that network's weights; names the tensor.
    """
    dtype, paths = jnp.dtype(config.model.dtype), config.frozen
    return FrozenNetworks(
        encoder=load_encoder_network(config),
        dino=dinov2.load(paths.dinov2_small, dinov2.SMALL, dtype) if config.loss.dino else None,
        sam=hiera.load(paths.sam2, dtype) if config.loss.sam else None,
    )


def load_encoder_network(config: ConfigDict) -> dinov2.Params | None:
    """What inference needs of `load_frozen_networks`: DINOv2 base, if `model.dino` asks for it."""
    if not config.model.dino:
        return None
    return dinov2.load(config.frozen.dinov2_base, dinov2.BASE, jnp.dtype(config.model.dtype))

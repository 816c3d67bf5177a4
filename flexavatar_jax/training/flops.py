"""How many operations a training step needs, and what share of the devices' peak that uses (MFU).

Counted are matrix products and convolutions, two operations a multiply-add, in the traced model:
nothing is run. Rasterization, norms and activations are left out, as is usual for MFU, and so is
what rematerialisation computes again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from data_pipelines.frame import EXPRESSION_SIZE
from flexavatar_jax.frozen import dinov2, hiera
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.model.encoder import FEATURE_SIZE
from flexavatar_jax.model.flexavatar import FlexAvatar
from kernels import backends
from kernels.hardware import BFLOAT16_PEAKS


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations that one training example needs, forward and backward."""

    encoder: float
    """Portrait to avatar code."""
    decoder: float
    """Avatar code to Gaussians, all targets."""
    features: float
    """The frozen network before the encoder: forward only."""
    perceptual: float
    """The frozen networks of the loss: both images forward, the prediction backward."""

    @property
    def total(self) -> float:
        return self.encoder + self.decoder + self.features + self.perceptual


def step_flops(
    config: ml_collections.ConfigDict,
    model: FlexAvatar,
    frozen: FrozenNetworks,
    *,
    perceptual: bool,
) -> StepFlops:
    """Operations an example of `config`'s training step; shapes of `model` and `frozen` suffice."""
    size, targets = config.model.image_size, config.data.targets
    graph, params = nnx.split(model)

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    side = dinov2.BASE.image_size // dinov2.PATCH
    features = array(1, side, side, FEATURE_SIZE) if config.model.dino else None
    encode = (array(1, size, size, 3), array(1, 4, 4), array(1, 3, 3), features)
    expression = array(1, targets, EXPRESSION_SIZE)
    code = array(1, config.model.head_resolution**2, config.model.width, dtype=config.model.dtype)
    decode = (code, expression, array(1, dtype=jnp.int32))

    image = array(1, size, size, 3)
    crop = array(1, dinov2.SMALL.image_size, dinov2.SMALL.image_size, 3)
    losses = 0.0
    if perceptual and frozen.dinov2_small is not None:
        losses += count(dinov2.perceptual_features, frozen.dinov2_small, crop)
    if perceptual and frozen.sam2 is not None:
        losses += count(hiera.image_embedding, frozen.sam2, image)
    seen = 0.0
    if frozen.dinov2_base is not None:
        seen = count(dinov2.patch_features, frozen.dinov2_base, image)
    return StepFlops(
        # A gradient in inputs and weights takes twice the operations of the forward pass.
        encoder=3 * count(lambda p, *x: nnx.merge(graph, p).encode(*x), params, *encode),
        decoder=3 * count(lambda p, *x: nnx.merge(graph, p).decode(*x), params, *decode),
        features=seen,
        perceptual=3 * (min(config.loss.perceptual_targets, targets) or targets) * losses,
    )


def peak(device: jax.Device) -> float | None:
    """Published bfloat16 peak of `device`, operations a second; None where none is known."""
    return BFLOAT16_PEAKS.get(device.device_kind)


def count(function: Callable, *args: Any) -> float:
    """Operations of the matrix products and convolutions of `function(*args)`.

    Arguments are trees of arrays or of `jax.ShapeDtypeStruct`. Loops count as often as they run
    (`while` loops of unknown length once), and of a conditional's branches the most expensive. What
    is counted is what CPUs are given, which have no kernels: the same on any platform.
    """
    with backends.compiling_for("cpu"):
        return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            lhs, out = equation.invars[0].aval, equation.outvars[0].aval
            total += 2 * out.size * math.prod(lhs.shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel, out = equation.invars[1].aval, equation.outvars[0].aval
            channels_out = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * out.size * kernel.size / channels_out
        elif name == "cond":
            total += max(map(_count, _inner(params["branches"])))
        else:
            inner = sum(map(_count, _inner(tuple(params.values()))))
            total += params.get("length", 1) * inner if name == "scan" else inner
    return total


def _inner(value: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from _inner(item)
    elif hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield from _inner(value.jaxpr)

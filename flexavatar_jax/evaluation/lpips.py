"""LPIPS, a perceptual distance of images (Zhang et al., CVPR 2018), version 0.1 of its weights.

Both networks, VGG16 and AlexNet, read a safetensors file of the published module's state, which
whoever has PyTorch writes once:

    import lpips, safetensors.torch
    safetensors.torch.save_file(lpips.LPIPS(net="vgg").state_dict(), "lpips_vgg.safetensors")
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

from data_pipelines.errors import TRY_AGAIN, UserError

_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class _Conv(NamedTuple):
    """One convolution and ReLU; `pool`: max pooling that comes before, (window, stride)."""

    name: str
    channels: int
    size: int = 3
    stride: int = 1
    pool: tuple[int, int] | None = None
    tap: bool = False
    """Whether what leaves it is compared."""


def _vgg() -> list[_Conv]:
    convs, number = [], 0
    for group, (channels, count) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)], 1):
        for i in range(count):
            pool = (2, 2) if group > 1 and i == 0 else None
            name = f"net.slice{group}.{number}"
            convs.append(_Conv(name, channels, pool=pool, tap=i == count - 1))
            number += 2
        number += 1
    return convs


NETWORKS = {
    "vgg": _vgg(),
    "alex": [
        _Conv("net.slice1.0", 64, 11, 4, tap=True),
        _Conv("net.slice2.3", 192, 5, pool=(3, 2), tap=True),
        _Conv("net.slice3.6", 384, pool=(3, 2), tap=True),
        _Conv("net.slice4.8", 256, tap=True),
        _Conv("net.slice5.10", 256, tap=True),
    ],
}

Weights = Mapping[str, Array]


def shapes(network: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published module, in PyTorch's layout."""
    found, before, taps = {}, 3, 0
    for conv in NETWORKS[network]:
        found[f"{conv.name}.weight"] = (conv.channels, before, conv.size, conv.size)
        found[f"{conv.name}.bias"] = (conv.channels,)
        before = conv.channels
        if conv.tap:
            found[f"lin{taps}.model.1.weight"] = (1, conv.channels, 1, 1)
            taps += 1
    return found


def load(path: str | os.PathLike, network: str) -> Weights:
    """The weights of `network`, "vgg" or "alex", from a safetensors file.

    Raises:
      UserError: no such file, or not that network's weights.
    """
    try:
        with safe_open(path, framework="numpy") as tensors:
            there = set(tensors.keys())
            weights = {}
            for name, shape in shapes(network).items():
                if name not in there or tuple(tensors.get_slice(name).get_shape()) != shape:
                    raise UserError(
                        f"{path}: no tensor {name} of shape {list(shape)}; expected the state of "
                        f'lpips.LPIPS(net="{network}") as safetensors'
                    )
                weights[name] = jnp.asarray(np.asarray(tensors.get_tensor(name), np.float32))
            return weights
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected LPIPS weights", status=TRY_AGAIN
        ) from error
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file ({error}); write it again") from error


def lpips(
    weights: Weights, network: str, a: Float[ArrayLike, "b h w 3"], b: Float[ArrayLike, "b h w 3"]
) -> Float[Array, "b"]:
    """The distance of each pair of images, RGB in [0, 1]; 0 for equal ones.

    VGG needs 16 pixels a side or more, AlexNet 32.
    """
    x = (2 * jnp.concatenate([a, b]) - 1 - _SHIFT) / _SCALE
    distance, taps = 0.0, 0
    for conv in NETWORKS[network]:
        if conv.pool:
            window, stride = conv.pool
            x = jax.lax.reduce_window(
                x, -jnp.inf, jax.lax.max, (1, window, window, 1), (1, stride, stride, 1), "VALID"
            )
        pad = 2 if conv.size > 3 else 1  # of AlexNet's large kernels
        x = jax.lax.conv_general_dilated(
            x,
            weights[f"{conv.name}.weight"],
            (conv.stride, conv.stride),
            ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x + weights[f"{conv.name}.bias"])
        if conv.tap:
            unit = x / (jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True)) + 1e-10)
            p, q = jnp.split(unit, 2)
            weight = weights[f"lin{taps}.model.1.weight"][0, :, 0, 0]
            distance += jnp.mean((p - q) ** 2 @ weight, axis=(1, 2))
            taps += 1
    return distance

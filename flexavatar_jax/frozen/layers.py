"""The few operations that all frozen networks are made of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from flexavatar_jax.model import attention_gpu

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(image: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
    """An image in [0, 1] with ImageNet's mean removed, in units of its standard deviation."""
    return (image - jnp.asarray(IMAGENET_MEAN)) / jnp.asarray(IMAGENET_STD)


def patchify(image: Float[Array, "b h w c"], size: int) -> Float[Array, "b n p"]:
    """Square patches, row by row, each flattened as (row, column, channel)."""
    return rearrange(image, "b (h p) (w q) c -> b (h w) (p q c)", p=size, q=size)


def linear(x: Float[Array, "*b i"], p: dict[str, Array]) -> Float[Array, "*b o"]:
    """x w + b."""
    return x @ p["w"] + p["b"]


def layer_norm(x: Float[Array, "*b c"], p: dict[str, Array]) -> Float[Array, "*b c"]:
    """Layer norm over the last axis (epsilon 1e-6), in float32 whatever the type of `x`."""
    y = jax.nn.standardize(x.astype(jnp.float32), axis=-1, epsilon=1e-6)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def attend(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """Softmax attention; cuDNN's, which keeps no logits, where it takes the heads."""
    if attention_gpu.fits(q):
        return attention_gpu.attend(q, [k], [v], causal=False)
    return jax.nn.dot_product_attention(q, k, v)

"""DINOv2: the encoder's image features (ViT-B/14 with registers) and a perceptual loss (ViT-S/14).

Sources: Oquab et al., DINOv2 (2023); Darcet et al., Vision Transformers Need Registers (2023).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flexavatar_jax.frozen import block_tpu
from flexavatar_jax.frozen.layers import attend, layer_norm, linear, normalise, patchify
from flexavatar_jax.frozen.positions import resize_bicubic
from flexavatar_jax.frozen.weights import Source, read_weights

PATCH = 14
HEAD_WIDTH = 64
TRAINED_GRID = 37


class Architecture(NamedTuple):
    """A published size of DINOv2, and how it is used here."""

    source: Source
    width: int
    registers: int
    image_size: int
    antialias: bool
    """Whether positions are resampled with antialiasing: the two published codes differ."""
    depth: int = 12


BASE = Architecture(
    Source(
        "facebook/dinov2-with-registers-base",
        "config.frozen.dinov2_base",
        "config.model.dino=False",
    ),
    width=768,
    registers=4,
    image_size=224,
    antialias=True,
)
SMALL = Architecture(
    Source("facebook/dinov2-small", "config.frozen.dinov2_small", "config.loss.dino=0"),
    width=384,
    registers=0,
    image_size=504,
    antialias=False,
)
PERCEPTUAL_LAYERS = (5, 8, 11)

Params = dict[str, Any]


def load(
    path: str | os.PathLike[str], architecture: Architecture, dtype: DTypeLike = jnp.float32
) -> Params:
    """Parameters in `dtype` from published weights; errors as `read_weights`."""
    weights = read_weights(path, shapes(architecture), architecture.source)
    return fold(weights, architecture, dtype)


def patch_features(params: Params, image: Float[Array, "b h w 3"]) -> Float[Array, "b 16 16 768"]:
    """What the avatar's encoder sees of an image in [0, 1]: final patch tokens of `BASE` at 224.

    Any size of image goes: it is resized bilinearly with antialiasing. No gradient is defined
    through it, as none is needed.
    """
    tokens = _run(params["blocks"], _embed(params, encoder_input(image)), range(BASE.depth))
    tokens = layer_norm(tokens, params["norm"])[:, 1 + BASE.registers :]
    side = BASE.image_size // PATCH
    return jax.lax.stop_gradient(rearrange(tokens, "b (h w) c -> b h w c", h=side))


def encoder_input(image: Float[Array, "b h w 3"]) -> Float[Array, "b 224 224 3"]:
    """An image as `patch_features` resizes it, before it is normalised."""
    shape = (image.shape[0], BASE.image_size, BASE.image_size, 3)
    return jax.image.resize(image.astype(jnp.float32), shape, "bilinear", antialias=True)


def perceptual_features(
    params: Params, image: Float[Array, "b 504 504 3"]
) -> list[Float[Array, "b 1297 c"]]:
    """Hidden states 5, 8 and 11 of `SMALL` (0 would be the embeddings), class token first."""
    tokens, states = _embed(params, image), []
    for start, stop in pairwise((0, *PERCEPTUAL_LAYERS)):
        tokens = _run(params["blocks"], tokens, range(start, stop))
        states.append(tokens)
    return states


def shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every tensor that is read."""
    width = architecture.width
    wanted = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 1 + TRAINED_GRID**2, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    if architecture.registers:
        wanted["embeddings.register_tokens"] = (1, architecture.registers, width)
    linears = {f"attention.{n}_proj": (width, width) for n in "qkvo"}
    linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(architecture.depth):
        layer = f"encoder.layer.{i}"
        for name, shape in linears.items():
            wanted |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            wanted |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
        wanted |= {f"{layer}.layer_scale{k}.lambda1": (width,) for k in (1, 2)}
    return wanted


def fold(
    weights: Mapping[str, np.ndarray], architecture: Architecture, dtype: DTypeLike = jnp.float32
) -> Params:
    """Published weights as this module computes with them.

    Linear layers become [in, out]; q, k and v one product; layer scales go into the projections
    before them; positions are resampled and added to what they'd be added to; blocks are stacked.
    """
    w, width = weights, architecture.width

    def dense(*names: str, scale: np.ndarray | float = 1.0) -> dict[str, np.ndarray]:
        kernel = np.concatenate([w[f"{n}.weight"].T for n in names], axis=1)
        return {"w": kernel * scale, "b": np.concatenate([w[f"{n}.bias"] for n in names]) * scale}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": w[f"{name}.weight"], "bias": w[f"{name}.bias"]}

    def block(i: int) -> dict[str, dict[str, np.ndarray]]:
        layer = f"encoder.layer.{i}"
        return {
            "norm1": norm(f"{layer}.norm1"),
            "qkv": dense(*(f"{layer}.attention.{n}_proj" for n in "qkv")),
            "out": dense(f"{layer}.attention.o_proj", scale=w[f"{layer}.layer_scale1.lambda1"]),
            "norm2": norm(f"{layer}.norm2"),
            "mlp_in": dense(f"{layer}.mlp.fc1"),
            "mlp_out": dense(f"{layer}.mlp.fc2", scale=w[f"{layer}.layer_scale2.lambda1"]),
        }

    positions = w["embeddings.position_embeddings"][0]
    grid = rearrange(positions[1:], "(h w) c -> h w c", h=TRAINED_GRID)
    grid = resize_bicubic(grid, architecture.image_size // PATCH, antialias=architecture.antialias)
    leading = [w["embeddings.cls_token"][0] + positions[:1]]
    if architecture.registers:
        leading.append(w["embeddings.register_tokens"][0])
    projection = w["embeddings.patch_embeddings.projection.weight"]
    params = {
        "patch": {
            "w": rearrange(projection, "o c kh kw -> (kh kw c) o"),
            "b": w["embeddings.patch_embeddings.projection.bias"],
        },
        "leading": np.concatenate(leading),
        "positions": grid.reshape(-1, width),
        "blocks": jax.tree.map(lambda *p: np.stack(p), *map(block, range(architecture.depth))),
        "norm": norm("layernorm"),
    }
    return jax.tree.map(lambda p: jnp.asarray(p, dtype), params)


def _embed(params: Params, image: Float[Array, "b h w 3"]) -> Float[Array, "b n c"]:
    """Class token, registers and patches, positions added."""
    dtype = params["leading"].dtype
    patches = linear(patchify(normalise(image).astype(dtype), PATCH), params["patch"])
    patches = patches + params["positions"]
    leading = jnp.broadcast_to(params["leading"], (len(image), *params["leading"].shape))
    return jnp.concatenate([leading, patches], axis=1)


def _run(blocks: Params, tokens: Float[Array, "b n c"], which: range) -> Float[Array, "b n c"]:
    """`tokens` through some of the stacked blocks, of which the backward pass keeps only tokens."""
    if block_tpu.fits():
        heads = tokens.shape[-1] // HEAD_WIDTH
        return block_tpu.blocks(blocks, tokens[:, None], which, heads=heads)[:, 0]
    some = jax.tree.map(lambda p: p[which.start : which.stop], blocks)
    again = jax.checkpoint(lambda p, x: _block(p, x))  # its own: JAX keeps what it traced of others
    return jax.lax.scan(lambda x, p: (again(p, x), None), tokens, some)[0]


def _block(p: dict[str, dict[str, Array]], x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    qkv = linear(layer_norm(x, p["norm1"]), p["qkv"])
    q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, d=HEAD_WIDTH)
    x = x + linear(rearrange(attend(q, k, v), "b n h d -> b n (h d)"), p["out"])
    hidden = jax.nn.gelu(linear(layer_norm(x, p["norm2"]), p["mlp_in"]), approximate=False)
    return x + linear(hidden, p["mlp_out"])

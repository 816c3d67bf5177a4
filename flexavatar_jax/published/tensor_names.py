"""The published model's tensors: what each is called there, and which of our parameters it is.

The published weights are a PyTorch state dict. Linear weights are [out, in] there and [in, out]
here, convolutions [out, in, h, w] there and [h, w, in, out] here, and some layers that are one
there are several here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike

from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.model.head_template import HeadTemplate

STYLE_SIZE = 512
"""Length of the published upsampler's style vector. It is always zero, so the `affine.weight`s that
multiply it never count, and the style is the `affine.bias`."""

RESAMPLE_FILTER = np.outer([1, 3, 3, 1], [1, 3, 3, 1]).astype(np.float32) / 64

LINEAR = "i o -> o i"
CONVOLUTION = "h w i o -> o i h w"

Path = tuple[str | int, ...]


class Tensor(NamedTuple):
    """A published tensor.

    Attributes:
      name: in the published state dict.
      paths: our parameters that it holds, joined along their last axis.
      pattern: einops pattern from ours to the published layout; empty: the same.
      sizes: axes that `pattern` needs.
    """

    name: str
    paths: tuple[Path, ...]
    pattern: str = ""
    sizes: tuple[tuple[str, int], ...] = ()

    def to_published(self, params: Mapping[Path, ArrayLike]) -> np.ndarray:
        """The published tensor from our parameters."""
        joined = np.concatenate([np.asarray(params[path]) for path in self.paths], axis=-1)
        if self.pattern:
            joined = rearrange(joined, self.pattern, **dict(self.sizes))
        return np.ascontiguousarray(joined)

    def from_published(self, tensor: np.ndarray) -> dict[Path, np.ndarray]:
        """Our parameters from the published tensor."""
        if self.pattern:
            ours, published = self.pattern.split(" -> ")
            tensor = rearrange(tensor, f"{published} -> {ours}", **dict(self.sizes))
        parts = np.split(tensor, len(self.paths), axis=-1)
        return {
            path: np.ascontiguousarray(part) for path, part in zip(self.paths, parts, strict=True)
        }


def abstract_params(config: ml_collections.ConfigDict, template: HeadTemplate) -> nnx.State:
    """Shapes of all parameters of `config.model`, without computing them."""
    model = nnx.eval_shape(lambda: FlexAvatar(config, template, rngs=nnx.Rngs(0)))
    return nnx.state(model, nnx.Param)


def flatten(params: nnx.State) -> dict[Path, Any]:
    """Path -> array (or shape) of every parameter."""
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(params)}


def used_tensors(config: ml_collections.ConfigDict) -> list[Tensor]:
    """Every published tensor that a model of `config` (an experiment's `model`) computes with."""
    return list(_used(config))


def unused_shapes(config: ml_collections.ConfigDict) -> dict[str, tuple[int, ...]]:
    """Published tensors without effect: name -> shape.

    Head tokens that the embedded template replaces, what multiplies the zero style vector, and
    the constant filter.
    """
    shapes = {
        "_head_transformer._head_token_embeddings": (config.head_resolution**2, 1, config.width)
    }
    inputs = (config.width, *config.upsampler_channels)
    for i, channels in enumerate(config.upsampler_channels):
        for layer, size in (("conv0", inputs[i]), ("conv1", channels), ("torgb", channels)):
            shapes[f"{_upsampler(i)}.{layer}.affine.weight"] = (size, STYLE_SIZE)
        for layer in ("conv0", "conv1"):
            shapes[f"{_upsampler(i)}.{layer}.resample_filter"] = RESAMPLE_FILTER.shape
    return shapes


def published_shapes(
    config: ml_collections.ConfigDict, params: Mapping[Path, jax.ShapeDtypeStruct]
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the whole published state dict of a model whose parameters are `params`."""
    shapes = {}
    for tensor in used_tensors(config):
        zeros = {path: np.zeros(params[path].shape, np.float32) for path in tensor.paths}
        shapes[tensor.name] = tensor.to_published(zeros).shape
    return shapes | unused_shapes(config)


def params_from_published(
    published: dict[str, np.ndarray], abstract: nnx.State, config: ml_collections.ConfigDict
) -> nnx.State:
    """Our parameters from published tensors, which are taken out of `published` on the way."""
    values = {}
    for tensor in used_tensors(config):
        values |= tensor.from_published(published.pop(tensor.name))
    return nnx.from_flat_state(
        [(path, variable.replace(values[path])) for path, variable in nnx.to_flat_state(abstract)]
    )


def _used(config: ml_collections.ConfigDict) -> Iterator[Tensor]:
    patch = config.patch_size
    image: Path = ("encoder", "image")
    yield Tensor(
        "_conv_patchify.weight",
        ((*image, "patchify", "kernel"),),
        "(h w i) o -> o i h w",
        (("h", patch), ("w", patch)),
    )
    gpt = "_transformer_encoder.transformer"
    yield Tensor(f"{gpt}.wpe.weight", ((*image, "positions"),))
    for i in range(config.vit_depth):
        name, block = f"{gpt}.h.{i}", (*image, "blocks", i)
        yield from _norm(f"{name}.ln_1", (*block, "attention_norm"))
        yield from _linear(f"{name}.attn.c_attn", *((*block, x) for x in ("q", "k", "v")))
        yield from _linear(f"{name}.attn.c_proj", (*block, "out"))
        yield from _norm(f"{name}.ln_2", (*block, "mlp_norm"))
        yield from _linear(f"{name}.mlp.c_fc", (*block, "mlp", "up"))
        yield from _linear(f"{name}.mlp.c_proj", (*block, "mlp", "down"))
    yield from _norm(f"{gpt}.ln_f", (*image, "norm"))
    if config.dino:
        yield from _linear("_feature_projection", ("encoder", "feature_projection"))

    head = "_head_transformer"
    yield from _linear(f"{head}._query_point_embedder.mlp", ("encoder", "queries", "projection"))
    yield from _norm(f"{head}._query_point_embedder.norm", ("encoder", "queries", "norm"))
    yield from _joint_transformer(
        f"{head}._transformer", ("encoder", "transformer"), config.encoder_depth
    )
    for number, layer in ((0, "first"), (3, "second"), (6, "third")):
        yield from _linear(f"{head}._expression_mlp.{number}", ("decoder", "expression", layer))
    yield Tensor(f"{head}._dataset_embedding.weight", (("decoder", "sinks"),))
    yield from _joint_transformer(
        f"{head}._expression_transformer", ("decoder", "transformer"), config.decoder_depth
    )

    for i in range(len(config.upsampler_channels)):
        for name, layer in (("conv0", "up"), ("conv1", "conv"), ("torgb", "to_skip")):
            published, ours = f"{_upsampler(i)}.{name}", ("upsampler", "blocks", i, layer)
            yield Tensor(f"{published}.weight", ((*ours, "weight"),), CONVOLUTION)
            yield Tensor(f"{published}.bias", ((*ours, "bias"),))
            yield Tensor(f"{published}.affine.bias", ((*ours, "style"),))
    for name, layer in (
        ("shs", "color"),
        ("scaling", "scale"),
        ("xyz", "offset"),
        ("opacity", "opacity"),
        ("rotation", "rotation"),
    ):
        yield from _linear(
            f"_gaussian_decoder._mlp_decoder.out_layers.{name}", ("gaussians", layer)
        )


def _joint_transformer(name: str, path: Path, depth: int) -> Iterator[Tensor]:
    yield from _linear(f"{name}.linear_cond_proj", (*path, "context_projection"))
    for i in range(depth):
        block, tokens, context = (
            f"{name}.layers.{i}",
            (*path, "blocks", i, "tokens"),
            (*path, "blocks", i, "context"),
        )
        yield from _norm(f"{block}.norm1", (*tokens, "attention_norm"))
        yield from _norm(f"{block}.norm1_context", (*context, "attention_norm"))
        for x in ("q", "k", "v"):
            yield from _linear(f"{block}.attn.to_{x}", (*tokens, x))
            yield from _linear(f"{block}.attn.add_{x}_proj", (*context, x))
        for x in ("q", "k"):
            yield Tensor(f"{block}.attn.norm_{x}.weight", ((*tokens, f"{x}_norm", "scale"),))
            yield Tensor(f"{block}.attn.norm_added_{x}.weight", ((*context, f"{x}_norm", "scale"),))
        yield from _linear(f"{block}.attn.to_out.0", (*tokens, "out"))
        yield from _mlp(f"{block}.ff", (*tokens, "mlp"))
        if i < depth - 1:
            yield from _linear(f"{block}.attn.to_add_out", (*context, "out"))
            yield from _mlp(f"{block}.ff_context", (*context, "mlp"))
    yield from _norm(f"{name}.norm", (*path, "norm"))


def _mlp(name: str, path: Path) -> Iterator[Tensor]:
    yield from _linear(f"{name}.net.0.proj", (*path, "up"))
    yield from _linear(f"{name}.net.2", (*path, "down"))


def _linear(name: str, *paths: Path) -> Iterator[Tensor]:
    """A linear layer; several `paths`: layers of ours that are one there, outputs side by side."""
    yield Tensor(f"{name}.weight", tuple((*path, "kernel") for path in paths), LINEAR)
    yield Tensor(f"{name}.bias", tuple((*path, "bias") for path in paths))


def _norm(name: str, path: Path) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", ((*path, "scale"),))
    yield Tensor(f"{name}.bias", ((*path, "bias"),))


def _upsampler(block: int) -> str:
    return f"_gaussian_decoder._stylegan_upsampler.blocks.{block}"

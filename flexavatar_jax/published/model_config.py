"""The published model_config.json, and the `config.model` that builds the same network."""

from __future__ import annotations

import json
from typing import Any

import ml_collections
from etils import epath

from configs import flex1
from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.frame import EXPRESSION_SIZE

SIZES = {
    "num_heads": "head_transformer.transformer.n_heads",
    "width": "head_transformer.transformer.d_hidden",
    "encoder_depth": "head_transformer.transformer.n_layers",
    "decoder_depth": "head_transformer.n_layers_expression_transformer",
    "head_resolution": "head_transformer.res_head_tokens",
    "expression_tokens": "head_transformer.n_expression_tokens",
    "patch_size": "patch_size",
    "vit_depth": "n_layers_encoder",
    "uv_resolution": "gaussian_decoder.res_uv_texture",
}
"""Field of `config.model` -> field of the published model_config.json, both a number."""

REQUIRED = {
    "in_channels": 3,
    "head_transformer.d_expression_codes": EXPRESSION_SIZE,
    "n_input_views": 1,
    "use_plucker": True,
    "head_transformer.head_transformer_type": "UV_TEXTURE",
    "head_transformer.use_lam_transformer": True,
    "head_transformer.use_lam_point_embedder": True,
    "head_transformer.use_head_tokens": True,
    "head_transformer.use_dataset_ids": True,
    "head_transformer.transformer.use_causal_attention": True,
    "gaussian_decoder.use_stylegan_pixelshuffle_upsampler": True,
    "gaussian_decoder.use_lam_gs_decoder": True,
    "gaussian_decoder.n_gaussians_per_token": 1,
    "gaussian_decoder.n_channels_color": 3,
    "gaussian_decoder.sh_degree": 0,
    "feature_dim": 768,
}
"""Fields of model_config.json of which this code knows one value. Those in neither table are dead
in the published code, or (such as `compile`) do not change what the model computes."""


def read_model_config(path: epath.PathLike) -> ml_collections.ConfigDict:
    """`config.model` from the published model_config.json.

    What that file does not say (the upsampler's channels, ranges of the Gaussians) is as in
    configs/flex1.py.

    Raises:
      UserError: no such file.
      UserError: not JSON, a field missing, or a value that this code does not implement.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"--model-config: no file {path}", status=TRY_AGAIN)
    try:
        published = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None

    def field(name: str) -> Any:
        value = published
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"{path} has no field {name}; give the published model_config.json")
            value = value[part]
        return value

    def size(name: str) -> int:
        value = field(name)
        if type(value) is not int or value < 1:
            raise UserError(f"{path}: {name} must be a positive whole number, not {value!r:.40}")
        return value

    for name, expected in REQUIRED.items():
        if field(name) != expected:
            raise UserError(
                f"{path}: {name} is {field(name)!r:.40}; only {expected!r} is implemented"
            )
    model = flex1.get_config().model
    for ours, name in SIZES.items():
        model[ours] = size(name)
    model.image_size = model.patch_size * size("head_transformer.res_image_tokens")
    upscale = size("gaussian_decoder.upscale_uv_texture")
    if upscale != 2 ** len(model.upsampler_channels):
        raise UserError(
            f"{path}: gaussian_decoder.upscale_uv_texture is {upscale}; only "
            f"{2 ** len(model.upsampler_channels)} is implemented"
        )
    model.gaussian_resolution = (
        model.head_resolution * upscale * size("gaussian_decoder.oversampling_factor")
    )
    if type(field("use_feature_projection")) is not bool:
        raise UserError(f"{path}: use_feature_projection must be true or false")
    model.dino = field("use_feature_projection")
    return model

"""A complete model of a few thousand parameters, with weights by the rule of parity."""

import functools
import json

import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from numpy_reference import Reference

from configs import flex1
from data_pipelines.head_mesh import template_mesh
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.model.head_template import HeadTemplate
from flexavatar_jax.published.parity_rule import rule_weights
from flexavatar_jax.published.tensor_names import flatten, params_from_published, published_shapes


def small_config(**changes) -> ConfigDict:
    """`config.model` with every part of the published model, each of them small."""
    config = flex1.get_config().model
    config.update(
        dict(
            image_size=24,
            patch_size=6,
            width=48,
            num_heads=2,
            encoder_depth=2,
            decoder_depth=2,
            head_resolution=4,
            expression_hidden=10,
            upsampler_channels=(9, 7),
            uv_resolution=16,
            gaussian_resolution=20,
            dtype="float32",
            remat=0.0,
        )
    )
    config.update(changes)
    return config


@functools.cache
def small_template() -> HeadTemplate:
    return HeadTemplate(*template_mesh(columns=12, rows=8))


def rule_model(salt: str, config: ConfigDict | None = None) -> tuple[FlexAvatar, Reference]:
    """A model with weights by the rule, and the NumPy reference of the same weights."""
    config = config or small_config()
    graph, abstract, shapes = _structure(config.to_json())
    weights = rule_weights(shapes, salt)
    model = nnx.merge(graph, params_from_published(dict(weights), abstract, config))
    return model, Reference(weights, config, *template_mesh(columns=12, rows=8))


@functools.cache
def _structure(config: str):
    config = ConfigDict(json.loads(config))
    model = nnx.eval_shape(lambda: FlexAvatar(config, small_template(), rngs=nnx.Rngs(0)))
    graph, abstract = nnx.split(model)
    return graph, abstract, published_shapes(config, flatten(abstract))


encode = nnx.jit(FlexAvatar.encode)
decode = nnx.jit(FlexAvatar.decode)


def inputs(seed: int = 0) -> dict[str, np.ndarray]:
    """One image with a camera in front of the face, DINOv2 features, two expressions."""
    rng = np.random.default_rng(seed)
    cam2head = np.diag([1.0, -1.0, -1.0, 1.0])
    cam2head[:3, 3] = [0.1, 0.05, 1.0]
    K = np.array([[3.1, 0, 0.51], [0, 3.3, 0.47], [0, 0, 1]])
    return {
        "image": rng.random((1, 24, 24, 3), np.float32),
        "cam2head": cam2head[None].astype(np.float32),
        "K": K[None].astype(np.float32),
        "features": rng.standard_normal((1, 16, 16, 768), np.float32),
        "expression": rng.standard_normal((1, 2, 135), np.float32),
    }

"""A tiny model whose Gaussians move with the expression, without training; and its run's folder."""

import contextlib
import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from configs import demo
from data_pipelines import cameras
from flexavatar_jax.avatars.avatar_file import Avatar, fingerprint, save_avatar, template_digest
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.loading import LoadedModel
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.runs.workdir import claim_workdir

CAM2HEAD = cameras.orbit(20.0, 5.0, 1.1, np.zeros(3)).astype(np.float32)
K = np.array([[3.2, 0, 0.5], [0, 3.2, 0.5], [0, 0, 1]], np.float32)


@functools.cache
def lively_model() -> LoadedModel:
    """The demo's model, shrunk, with heads that aren't zero; its few hundred Gaussians overlap."""
    config = demo.get_config()
    config.model.update(
        dict(
            image_size=32,
            width=32,
            encoder_depth=1,
            decoder_depth=1,
            head_resolution=4,
            expression_hidden=32,
            upsampler_channels=(16,),
            uv_resolution=32,
            gaussian_resolution=32,
            max_scale=0.03,
        )
    )
    model = FlexAvatar(config.model, load_template(), rngs=nnx.Rngs(0))
    head, keys = model.gaussians, iter(jax.random.split(jax.random.key(1), 10))
    for part in (head.scale, head.offset, head.opacity, head.rotation):
        noise = jax.random.normal(next(keys), part.kernel.shape)
        part.kernel[...] = 0.2 * noise
    expression = model.decoder.expression
    for part in (expression.first, expression.second, expression.third):
        part.kernel[...] = 4 * part.kernel[...]
        part.bias[...] = 4 * part.bias[...]
    head.color.kernel[...] = 6 * head.color.kernel[...]
    head.scale.bias[...] = head.scale.bias[...] + 0.7
    head.opacity.bias[...] = head.opacity.bias[...] + 3
    return LoadedModel(model, config, 0, {}, None)


def lively_avatar(seed: int = 0) -> Avatar:
    """An avatar of that model: a code at random, seen in one expression."""
    loaded, rng = lively_model(), np.random.default_rng(seed)
    return Avatar(
        name=f"somebody <{seed}>",
        code=rng.standard_normal((16, 32), np.float32),
        expressions=np.zeros((1, 135), np.float32) + np.float32(0.1),
        cam2heads=CAM2HEAD[None],
        Ks=K[None],
        seen=np.zeros(1, np.int32),
        offsets=np.zeros((1, 135), np.float32),
        preview=np.zeros((8, 8, 3), np.uint8),
        checkpoint=fingerprint(loaded),
        template=template_digest(loaded),
    )


def lively_run(folder: Path) -> tuple[Path, Path]:
    """Writes the model as a run and an avatar of it; returns the folder and the avatar's file."""
    loaded = lively_model()
    claim_workdir(folder / "run", loaded.config, loaded.model.gaussians.template)
    with contextlib.closing(Checkpoints(folder / "run")) as checkpoints:
        checkpoints.save(0, nnx.state(loaded.model, nnx.Param))
        checkpoints.wait()
    save_avatar(folder / "somebody.avatar", lively_avatar())
    return folder / "run", folder / "somebody.avatar"


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((np.asarray(a, np.float64) - b) ** 2) + 1e-12))

"""A batch's targets as a model's Gaussians show them: in the step, and on held-out people."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from data_pipelines.batch import Batch
from flexavatar_jax.model.gaussians import Gaussians
from flexavatar_jax.model.render import render
from kernels import Render


def render_targets(gaussians: Gaussians, batch: Batch, config: ConfigDict) -> Render:
    """What the targets' cameras see of Gaussians [B, T, G, ...], on the examples' backgrounds."""
    examples, images, size = batch.target_image.shape[:3]
    return render(
        gaussians,
        batch.target_cam2head,
        batch.target_K,
        jnp.broadcast_to(batch.background[:, None], (examples, images, 3)),
        size=size,
        backend=config.rasterizer,
        capacity=config.splat_capacity or None,
    )


def preview_rows(
    batch: Batch, color: Float[Array, "B T H W 3"], config: ConfigDict
) -> UInt8[Array, "b H W*3 3"]:
    """Input, first target and its prediction of the first few examples, side by side."""
    few = slice(0, config.log.images)
    row = [batch.input_image[few], batch.target_image[few, 0], color[few, 0]]
    return jnp.round(255 * jnp.clip(jnp.concatenate(row, axis=2), 0, 1)).astype(jnp.uint8)

"""One optimisation step, and what many of them can do."""

import jax
import numpy as np
import pytest

from data_pipelines.mixture import make_iterator
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.training.sharding import make_mesh, place
from flexavatar_jax.training.train_step import TrainProgram


@pytest.mark.slow
def test_the_model_overfits_one_example_to_over_30_db(tiny_config):
    tiny_config.batch, tiny_config.data.targets = 1, 1
    tiny_config.data.mixture = {"procedural_multiview": 1.0}
    tiny_config.model.update(
        dict(gaussian_resolution=48, uv_resolution=48, width=64, head_resolution=8)
    )
    tiny_config.optimizer.update(dict(learning_rate=5e-3, decay_steps=250))
    tiny_config.loss.update(dict(l1=1.0, ssim=0.2))
    mesh = make_mesh(devices=jax.devices()[:1])
    program = TrainProgram.create(tiny_config, mesh, load_template())
    batch = place(next(make_iterator(tiny_config.data, 0, 1)), mesh)
    state, frozen = program.init(), FrozenNetworks()
    step = program.jitted_step().lower(state, frozen, batch).compile()
    for _ in range(250):
        state, _, preview = step(state, frozen, batch)
    _, target, prediction = np.split(np.asarray(preview[0], np.float32) / 255, 3, axis=1)
    psnr = -10 * np.log10(np.mean((target - prediction) ** 2))
    assert psnr > 30

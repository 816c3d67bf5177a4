"""The paper's claim at the size of a test: what sources disagree about is for the sinks to tell."""

import pytest

from configs.ablation import make_config
from data_pipelines.prepare import main as prepare
from flexavatar_jax.train import train
from flexavatar_jax.training.metric_log import read_metrics

pytestmark = pytest.mark.slow

PEOPLE = {
    "size": 32,
    "monocular-people": 300,
    "monocular-timesteps": 2,
    "multiview-people": 40,
    "multiview-timesteps": 2,
    "test-people": 8,
    "test-timesteps": 2,
    "reported-turn": 0.5,
    "reported-size": 1.2,
    "distance-spread": 0.5,
}


def test_sinks_make_better_heads_than_one_sink_for_both_sources(tmp_path):
    """Portraits are tracked as monocular clips are, and avatars held to captures."""
    people = [f"--{name}={value}" for name, value in PEOPLE.items()]
    assert prepare(["procedural", "--out", str(tmp_path / "data"), *people]) == 0
    found = {}
    for sinks in (True, False):
        config = make_config(monocular=True, multi_view=True, sinks=sinks)
        config.steps = config.optimizer.decay_steps = config.eval.every = 250
        config.data.root = str(tmp_path / "data")
        config.model.update(
            image_size=32,
            head_resolution=8,
            uv_resolution=32,
            gaussian_resolution=32,
            max_scale=0.03,
        )
        config.eval.people, config.eval.images_per_person = 8, 16
        config.log.images_every = config.checkpoint.every = 250
        assert train(config, tmp_path / str(sinks)) == 0
        found[sinks] = read_metrics(tmp_path / str(sinks))[-1]["eval_psnr"]
    assert found[True] > found[False] + 1.0

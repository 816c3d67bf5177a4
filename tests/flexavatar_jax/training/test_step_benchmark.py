"""`python -m flexavatar_jax.training.benchmark`: the whole step, on a batch that nobody read."""

import json

import numpy as np
import pytest
from command_line import run_command

from data_pipelines.frame import MONOCULAR, MULTI_VIEW
from flexavatar_jax.training.benchmark import (
    DISTANCE,
    benchmark_step,
    describe,
    heads_all_round,
)


def test_cameras_look_at_the_head_upright(tiny_config):
    batch = heads_all_round(tiny_config, 4)
    for cam2head in batch.target_cam2head.reshape(-1, 4, 4):
        rotation, place = cam2head[:3, :3], cam2head[:3, 3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-6)
        assert np.linalg.det(rotation) > 0
        np.testing.assert_allclose(rotation[:, 2], -place / DISTANCE, atol=1e-6)  # inwards
        np.testing.assert_allclose(rotation[:, 1], [0, -1, 0], atol=1e-6)  # down
    before_the_face = batch.input_cam2head[:, :3, 3]
    np.testing.assert_allclose(before_the_face, [[0, 0, DISTANCE]] * 4, atol=1e-6)


def test_batches_have_both_sources_and_all_sides(tiny_config):
    batch = heads_all_round(tiny_config, 4)
    assert set(batch.source) == {MONOCULAR, MULTI_VIEW}
    sides = batch.target_cam2head[..., :3, 3].reshape(-1, 3)
    assert len(np.unique(sides.round(4), axis=0)) == 4 * tiny_config.data.targets
    np.testing.assert_allclose(sides.mean(0), 0, atol=1e-5)


def test_a_step_is_timed_and_not_skipped(tiny_config, quick_compilation, tmp_path):
    timing = benchmark_step(tiny_config, perceptual=False, repeats=2, profile=str(tmp_path))
    assert timing.step_ms >= timing.least_ms > 0
    assert timing.examples_per_second == pytest.approx(1e3 * timing.batch / timing.step_ms)
    assert timing.tflop > 0
    assert timing.rasterizer == "xla"
    assert "without DINO and SAM" in describe(timing)
    assert list(tmp_path.rglob("*.xplane.pb"))
    json.dumps(timing.__dict__)


def test_no_repeats_are_refused():
    result = run_command(
        "flexavatar_jax.training.benchmark", "--config=configs/demo.py", "--repeats=0"
    )
    assert result.returncode == 2
    assert "--repeats is 0; expected 1 or more" in result.stderr

"""Held-out people: measured on the way as they are afterwards, and the best checkpoint stays."""

import contextlib
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipelines.errors import UserError
from data_pipelines.shards import open_at_size
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.evaluation.metrics import score
from flexavatar_jax.evaluation.people import on_white, read_people
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.train import train
from flexavatar_jax.training.metric_log import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_held_out_people_are_measured_on_the_way_as_they_are_afterwards(tiny_config, tmp_path):
    """With two people of five images to batches of two with two: the last ones are half empty."""
    tiny_config.steps = 2
    tiny_config.eval.update(dict(every=1, images_per_person=5))
    train(tiny_config, tmp_path)
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert all({"loss", "eval_psnr", "eval_ssim", "eval_iou"} <= line.keys() for line in lines)
    assert all(line["seconds/evaluating"] > 0 for line in lines)
    animator = Animator(load_model(tmp_path))
    folder = Path(tiny_config.data.root) / tiny_config.eval.dataset
    scores = []
    for person in read_people(open_at_size(folder, 32), 2, 5, 32):
        source = person.input
        code = animator.encode(source.image, source.mask, source.cam2head, source.K)
        for target in person.targets:
            image = animator.render(code, target.expression, target.cam2head, target.K)
            scores.append(score(image, on_white(target)[None])["psnr"][0])
    assert 8 <= len(scores) <= 10  # the input is no target
    assert lines[-1]["eval_psnr"] == pytest.approx(np.mean(scores), abs=1e-3)


def test_the_checkpoint_that_is_best_on_held_out_people_stays_beside_the_newest(tmp_path):
    params = nnx.State({"x": nnx.Param(jnp.zeros(2))})
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        for step, psnr in enumerate([None, 15.0, 17.0, 16.0, None, math.nan], start=1):
            checkpoints.save(step, params, held_out=psnr and {"eval_psnr": psnr})
            checkpoints.wait()
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [3, 5, 6]


def test_evaluations_stand_on_lines_of_the_log(tiny_config, tmp_path):
    tiny_config.log.every, tiny_config.eval.every = 2, 3
    with pytest.raises(UserError, match=r"config\.eval\.every \(3\) must be a multiple"):
        train(tiny_config, tmp_path)

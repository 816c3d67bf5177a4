"""A run with weights by a rule: every part of it matters to the picture, and nothing is trained."""

import contextlib

import pytest
from flax import nnx
from small_model import rule_model, small_config, small_template

from configs import flex1
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.workdir import claim_workdir


@pytest.fixture(scope="session")
def rule_run(tmp_path_factory):
    """The folder of such a run; images are 24 pixels."""
    workdir = tmp_path_factory.mktemp("rule_run")
    config = flex1.get_config()
    config.model = small_config(dino=False)
    model, _ = rule_model("avatars", config.model)
    claim_workdir(workdir, config, small_template())
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(7, nnx.state(model, nnx.Param))
        checkpoints.wait()
    return workdir


@pytest.fixture(scope="session")
def loaded(rule_run):
    return load_model(rule_run)


@pytest.fixture(scope="session")
def animator(loaded):
    return Animator(loaded)

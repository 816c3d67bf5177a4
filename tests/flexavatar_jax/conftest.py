"""A tiny experiment: what the demo does, in seconds. And TPUs, as far as they can be had here."""

import functools

import pytest
from jax.experimental import pallas as pl
from ml_collections import ConfigDict

from configs import demo
from kernels import backends


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Procedural heads of 32 pixels: two training sets and a test set."""
    from data_pipelines.procedural.capture_sets import procedural_sets
    from data_pipelines.shard_writer import write_shards

    root = tmp_path_factory.mktemp("data")
    for captures in procedural_sets(
        size=32,
        monocular_people=4,
        multiview_people=2,
        test_people=2,
        monocular_timesteps=3,
        multiview_timesteps=2,
        test_timesteps=1,
    ):
        write_shards(captures, root)
    return root


@pytest.fixture(scope="session")
def make_tiny_config(tiny_data):
    """Makes the demo's config, shrunk to a few thousand parameters, with data beside it."""

    def make() -> ConfigDict:
        config = demo.get_config()
        config.batch, config.steps = 2, 4
        config.model.update(
            dict(
                image_size=32,
                patch_size=8,
                width=32,
                num_heads=2,
                encoder_depth=1,
                decoder_depth=1,
                head_resolution=4,
                expression_hidden=8,
                upsampler_channels=(16,),
                uv_resolution=16,
                gaussian_resolution=16,
                max_scale=0.03,
            )
        )
        config.data.update(dict(root=str(tiny_data), targets=2))
        config.optimizer.update(
            dict(name="adam", learning_rate=1e-3, warmup_steps=0, decay_steps=0)
        )
        config.checkpoint.every = 2
        config.log.update(dict(every=1, images_every=2, images=1))
        config.eval.update(dict(people=2, images_per_person=4, constant_images=20))
        return config

    return make


@pytest.fixture
def tiny_config(make_tiny_config) -> ConfigDict:
    return make_tiny_config()


@pytest.fixture(scope="session")
def rule_run(tmp_path_factory):
    """A run of 24 pixels with weights by a rule: all of it matters, and nothing is trained."""
    import contextlib

    from flax import nnx
    from small_model import rule_model, small_config, small_template

    from configs import flex1
    from flexavatar_jax.runs.checkpoints import Checkpoints
    from flexavatar_jax.runs.workdir import claim_workdir

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
    """The model of `rule_run`."""
    from flexavatar_jax.runs.loading import load_model

    return load_model(rule_run)


@pytest.fixture(scope="session")
def animator(loaded):
    from flexavatar_jax.avatars.animator import Animator

    return Animator(loaded)


@pytest.fixture
def on_tpu(monkeypatch):
    """What is chosen for TPUs, its Pallas kernels interpreted on the CPU."""
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
    with backends.compiling_for("tpu"):
        yield

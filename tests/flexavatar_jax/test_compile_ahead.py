"""The training step compiled for TPUs that aren't here."""

import importlib.util
import re

import jax
import pytest
from command_line import run_command

from data_pipelines.mixture import make_iterator
from flexavatar_jax.training.compilation import abstract_batch
from flexavatar_jax.training.sharding import make_mesh
from flexavatar_jax.training.train_step import SCOPES


def test_the_shapes_compiled_for_are_those_of_a_batch(tiny_config):
    mesh = make_mesh(devices=jax.devices()[:1])
    batch = next(make_iterator(tiny_config.data, 0, tiny_config.batch))
    for field, expected in zip(batch, abstract_batch(tiny_config, mesh), strict=True):
        assert (field.shape, field.dtype) == (expected.shape, expected.dtype)


def compile_ahead(*arguments: str):
    return run_command("flexavatar_jax.compile_ahead", "--config=configs/demo.py", *arguments)


def test_an_unknown_topology_is_named_in_one_sentence():
    done = compile_ahead("--topology=v9x:4x4")
    assert done.returncode == 2
    (error,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "v9x:4x4" in error
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.slow
def test_the_demo_compiles_for_a_pod():
    # Eight chips are no whole axis of the torus.
    done = compile_ahead("--topology=v6e:4x4", "--config.mesh.fsdp=8")
    assert done.returncode == 0, done.stderr
    for expected in ("16 chips", "memory a chip", "TFLOP a step", "predicted step", "examples/s"):
        assert expected in done.stdout
    assert not done.stderr
    # All kernels have schedules but those whose loops follow the data.
    assert "and schedules; rasterizer and interconnect by published rates" in done.stdout
    # Each part of the step is found in what was compiled, and rendering comes with its kernels.
    line = next(x for x in done.stdout.splitlines() if x.startswith("predicted step"))
    parts = {name: float(time) for name, time in re.findall(r"(\w+) ([\d.e-]+)(?:,|$)", line)}
    assert all(parts[scope] > 0 for scope in SCOPES if scope != "features")
    total = float(re.search(r"([\d.]+) ms", line)[1])
    assert sum(parts.values()) == pytest.approx(total, rel=0.02)

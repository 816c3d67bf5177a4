"""One experiment on many devices: the same numbers, the collectives it needs, and no hangs."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import Command
from jobs import Experiment, assert_same_weights, environment, losses, wait_for_step

from flexavatar_jax.planning.hlo import Collective

pytestmark = pytest.mark.usefixtures("quick_compilation")

WORKER = Path(__file__).with_name("scale_out_worker.py")
ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ["(8, 1, 1)", "(1, 8, 1)", "(2, 2, 2)"]
STEPS = 20


@pytest.fixture(scope="module")
def virtual_devices(make_tiny_config, tmp_path_factory):
    """What the worker found on 8 virtual devices, by layout; compiling takes a minute a layout."""
    folder = tmp_path_factory.mktemp("layouts")
    config = make_tiny_config()
    config.batch, config.steps = 8, STEPS
    (folder / "config.json").write_text(config.to_json())
    subprocess.run(
        [sys.executable, WORKER, folder / "config.json", folder / "out.json"],
        env=environment(8),
        check=True,
    )
    return json.loads((folder / "out.json").read_text())


def assert_same_losses(found: list[float], expected: list[float]) -> None:
    """Up to rounding, which training makes larger: a Gaussian's edge may take or lose a pixel.

    Measured over 20 steps and three layouts: 3e-6 for ten steps, then up to 3e-5.
    """
    np.testing.assert_allclose(found[:10], expected[:10], rtol=5e-6)
    np.testing.assert_allclose(found, expected, rtol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_the_same_in_every_layout(virtual_devices, layout):
    one = virtual_devices["(1, 1, 1)"]["losses"]
    assert_same_losses(virtual_devices[layout]["losses"], one)
    assert one[-1] < one[0]


@pytest.fixture(scope="module")
def two_processes(make_tiny_config, tmp_path_factory):
    """A job of two processes that nothing disturbs, along fsdp and data: experiment and folder."""
    folder = tmp_path_factory.mktemp("two_processes")
    config = make_tiny_config()
    config.batch, config.steps, config.checkpoint.every = 8, STEPS, 5
    config.mesh.update({"data": 2, "fsdp": 4})
    experiment = Experiment(config, folder)
    finish(experiment.start_job(folder / "run"))
    return experiment, folder / "run"


def finish(job: list[Command]) -> None:
    said = [process.communicate() for process in job]
    assert {process.returncode for process in job} == {0}, said


@pytest.mark.slow
def test_losses_are_the_same_in_two_processes(virtual_devices, two_processes):
    one = virtual_devices["(1, 1, 1)"]["losses"]
    assert_same_losses(losses(two_processes[1]), one)


@pytest.mark.slow
def test_losses_are_the_same_where_two_processes_hold_the_same_examples(
    virtual_devices, make_tiny_config, tmp_path
):
    """As they do along the tensor axis."""
    config = make_tiny_config()
    config.batch, config.steps = 8, 4
    config.mesh.update({"data": 1, "tensor": 8})
    finish(Experiment(config, tmp_path).start_job(tmp_path / "run"))
    one = virtual_devices["(1, 1, 1)"]["losses"]
    assert_same_losses(losses(tmp_path / "run"), one[:4])


def of(virtual_devices: dict, layout: str) -> list[Collective]:
    """The step's collectives in a layout; those of single numbers, the metrics, left out."""
    found = [Collective(*c) for c in virtual_devices[layout]["collectives"]]
    return [c for c in found if c.bytes > 64]


def total(found: list[Collective], kind: str) -> float:
    return sum(c.bytes for c in found if c.kind == kind)


@pytest.mark.slow
def test_one_device_needs_no_collective(virtual_devices):
    assert of(virtual_devices, "(1, 1, 1)") == []


@pytest.mark.slow
def test_over_data_there_is_one_all_reduce_of_the_gradient(virtual_devices):
    (reduce,) = of(virtual_devices, "(8, 1, 1)")
    assert (reduce.kind, reduce.group) == ("all-reduce", 8)
    assert reduce.bytes == pytest.approx(4 * virtual_devices["parameters"], rel=0.05)


@pytest.mark.slow
def test_over_fsdp_parameters_are_gathered_and_gradients_reduced(virtual_devices):
    """XLA's CPU backend writes a reduce-scatter as an all-reduce of which each takes its part."""
    found = of(virtual_devices, "(1, 8, 1)")
    size = 4 * virtual_devices["parameters"]
    assert {c.group for c in found} == {8}
    assert total(found, "all-gather") == pytest.approx(size, rel=0.1)
    reduced = total(found, "all-reduce") + total(found, "reduce-scatter")
    assert reduced == pytest.approx(size, rel=0.1)
    assert total(found, "all-to-all") + total(found, "collective-permute") < 0.01 * size


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rendering_and_losses_hold_no_collective(virtual_devices, layout):
    mapped = [c for c in of(virtual_devices, layout) if "shard_map" in c.operation]
    # At its border, devices that rendered the same examples add up what they have of a gradient.
    border = "transpose(jvp())/shard_map/psum"
    assert [c for c in mapped if not (c.operation.endswith(border) and layout == "(2, 2, 2)")] == []


@pytest.mark.slow
def test_a_vanished_process_ends_the_others_and_the_job_goes_on(two_processes, tmp_path):
    experiment, whole = two_processes
    first, second = experiment.start_job(tmp_path / "parts")
    wait_for_step(first, tmp_path / "parts", 6)
    second.kill()
    said = "".join(first.communicate())
    assert first.returncode not in (0, 2)  # schedulers start it again
    # Within a step it is ours to say; at a checkpoint JAX's heartbeat is what notices.
    assert "as it does when another process is gone" in said or "another task died" in said, said
    finish(experiment.start_job(tmp_path / "parts"))
    assert_same_weights(whole, tmp_path / "parts")


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.steps, config.checkpoint.every = 50, 5
    experiment = Experiment(config, tmp_path)
    finish([experiment.start(tmp_path / "whole")])
    draw, workdir = random.Random(0), tmp_path / "killed"
    for _ in range(10):
        process = experiment.start(workdir)
        reached = len(losses(workdir)) if (workdir / "metrics.jsonl").exists() else 0
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 8))  # while it starts
        else:
            wait_for_step(process, workdir, min(reached + draw.randrange(8), 48))
            time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.communicate()
    finish([experiment.start(workdir)])
    assert_same_weights(tmp_path / "whole", workdir)
    assert losses(tmp_path / "whole") == losses(workdir)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(virtual_devices, make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.batch = 8
    config.mesh.update({"data": 1, "fsdp": -1})
    experiment = Experiment(config, tmp_path)
    for devices, steps in ((4, 4), (1, 8), (2, STEPS)):
        finish([experiment.start(tmp_path / "run", f"--config.steps={steps}", devices=devices)])
    one = virtual_devices["(1, 1, 1)"]["losses"]
    assert_same_losses(losses(tmp_path / "run"), one)


def errors(process: Command, status: int = 1) -> list[str]:
    said = "".join(process.communicate(timeout=150))
    assert process.returncode == status
    assert "Traceback" not in said
    return [line for line in said.splitlines() if line.startswith("error: ")]


def test_a_workdir_that_cannot_be_made_is_named(make_tiny_config, tmp_path):
    (tmp_path / "file").touch()
    process = Experiment(make_tiny_config(), tmp_path).start(tmp_path / "file" / "run")
    (error,) = errors(process)
    assert str(tmp_path / "file" / "run") in error


@pytest.mark.slow
def test_a_full_disk_ends_with_a_sentence_and_the_run_goes_on(make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.steps = 6
    experiment = Experiment(config, tmp_path)
    finish([experiment.start(tmp_path / "whole")])
    finish([experiment.start(tmp_path / "parts", "--config.steps=2")])
    # No file may grow beyond 20 kB: to a program that's a disk with no room.
    full = experiment.start(tmp_path / "parts", largest_file=20_000)
    (error,) = errors(full)
    assert "checkpoint cannot be written" in error
    finish([experiment.start(tmp_path / "parts")])
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_without_a_launcher_distributed_says_what_to_use(make_tiny_config, tmp_path):
    process = Experiment(make_tiny_config(), tmp_path).start(tmp_path / "run", "--distributed")
    (error,) = errors(process)
    assert "launch/" in error


def test_a_config_that_cannot_be_meant_ends_all_processes_so_that_nothing_restarts_them(
    make_tiny_config, tmp_path
):
    """Here one that shows only when the devices of all of them are known."""
    job = Experiment(make_tiny_config(), tmp_path).start_job(
        tmp_path / "run", "--config.accumulate=5", devices=1
    )
    for process in job:
        (error,) = errors(process, status=2)
        assert "config.batch = 2 must be a multiple of 10" in error

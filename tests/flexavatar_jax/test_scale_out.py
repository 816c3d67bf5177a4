"""One experiment on many devices: the same numbers, the collectives it needs, and no hangs."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import Command
from experiment_file import write_experiment
from flax import nnx

from flexavatar_jax.planning.hlo import Collective
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.stopping import INTERRUPTED, PREEMPTED
from flexavatar_jax.training.ledger import PHASES, read_ledger
from flexavatar_jax.training.metric_log import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

WORKER = Path(__file__).with_name("scale_out_worker.py")
ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ["(8, 1, 1)", "(1, 8, 1)", "(2, 2, 2)"]
STEPS = 20


def environment(devices: int, **more: str) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        **more,
    }


def launcher(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What Open MPI's mpirun tells a process, by which JAX knows its place in the job."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{port - 61440}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": str(ranks),
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        # On CPUs a cached program is the one of the process that wrote it, and waits for itself.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }


def free_port() -> int:
    """A free one among those that JAX takes under Open MPI, 61440 and above."""
    for port in range(61440 + os.getpid() % 4000, 65536):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


class Experiment:
    """A config on disk, and the training command for it."""

    def __init__(self, config, folder: Path):
        self.path = write_experiment(config, folder)

    def start(self, workdir: Path, *flags: str, devices: int = 1, **options) -> Command:
        """Starts training; `options` are those of `Command`, and environment variables."""
        limits = {name: options.pop(name) for name in ("largest_file",) if name in options}
        arguments = [f"--config={self.path}", f"--workdir={workdir}", *flags]
        return Command(
            "flexavatar_jax.train", *arguments, env=environment(devices, **options), **limits
        )

    def start_job(
        self, workdir: Path, *flags: str, ranks: int = 2, devices: int = 4
    ) -> list[Command]:
        """`ranks` processes of one job."""
        port = free_port()
        return [
            self.start(
                workdir, "--distributed", *flags, devices=devices, **launcher(rank, ranks, port)
            )
            for rank in range(ranks)
        ]


def losses(workdir: Path) -> list[float]:
    return [json.loads(x)["loss"] for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def weights(workdir: Path) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(load_model(workdir).model, nnx.Param))]


def assert_same_weights(a: Path, b: Path) -> None:
    for x, y in zip(weights(a), weights(b), strict=True):
        np.testing.assert_array_equal(x, y)


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


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_the_same_in_every_layout(virtual_devices, layout):
    one = virtual_devices["(1, 1, 1)"]["losses"]
    np.testing.assert_allclose(virtual_devices[layout]["losses"], one, rtol=1e-5)
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
    np.testing.assert_allclose(losses(two_processes[1]), one, rtol=1e-5)


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
    np.testing.assert_allclose(losses(tmp_path / "run"), one[:4], rtol=1e-5)


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


def wait_for_step(process: Command, workdir: Path, step: int) -> None:
    """Until the log of a run in `workdir` has come to `step`, or the process has ended."""
    log = workdir / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= step):
        time.sleep(0.05)


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
def test_sigterm_to_one_process_of_many_stops_all_of_them(make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.batch, config.steps, config.checkpoint.every = 8, 2000, 1000
    job = Experiment(config, tmp_path).start_job(tmp_path / "run")
    wait_for_step(job[0], tmp_path / "run", 5)
    job[1].send_signal(signal.SIGTERM)
    for process in job:
        process.communicate(timeout=150)
    assert [process.returncode for process in job] == [PREEMPTED, PREEMPTED]
    assert 5 <= Checkpoints(tmp_path / "run").latest_step < 2000


@pytest.mark.slow
def test_asked_while_it_compiles_a_job_leaves_together_with_no_trace(make_tiny_config, tmp_path):
    """Ctrl-C reaches every process of a terminal; here one alone, which tells the other."""
    job = Experiment(make_tiny_config(), tmp_path).start_job(tmp_path / "run", devices=1)
    while job[0].poll() is None and not (tmp_path / "run" / "ledger.jsonl").exists():
        time.sleep(0.05)
    job[1].send_signal(signal.SIGINT)
    for process in job:
        said = "".join(process.communicate(timeout=30))
        assert process.returncode == INTERRUPTED, said
        assert "Traceback" not in said
        assert "Fatal" not in said


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
def test_the_ledger_of_a_run_killed_three_times_adds_up_to_its_wall_time(
    make_tiny_config, tmp_path
):
    config = make_tiny_config()
    config.steps, config.checkpoint.every = 100_000, 10
    experiment, workdir, wall = Experiment(config, tmp_path), tmp_path / "run", 0.0
    for _ in range(3):
        began = time.monotonic()
        process = experiment.start(workdir)
        starts = len(read_ledger(workdir))
        while process.poll() is None and (
            len(lines := read_ledger(workdir)) == starts
            or lines[-1]["stepping"] < 5
            or lines[-1]["step"] % 10 < 5  # so that something is lost
        ):
            time.sleep(0.05)
        process.kill()
        wall += time.monotonic() - began
        process.communicate()
    saved = Checkpoints(workdir, owned=False).latest_step
    began = time.monotonic()
    said = experiment.start(workdir, f"--config.steps={saved + 10}").communicate(timeout=600)[0]
    wall += time.monotonic() - began
    totals = {phase: sum(line[phase] for line in read_ledger(workdir)) for phase in PHASES}
    assert sum(totals.values()) == pytest.approx(wall, rel=0.02)
    assert min(totals[phase] for phase in PHASES if phase not in ("waiting", "evaluating")) > 0
    last = read_metrics(workdir)[-1]
    goodput = totals["stepping"] / sum(totals.values())
    assert last["goodput"] == pytest.approx(goodput, abs=0.02)
    assert f"goodput {goodput:.3f}" in said.splitlines()[-1]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(virtual_devices, make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.batch = 8
    config.mesh.update({"data": 1, "fsdp": -1})
    experiment = Experiment(config, tmp_path)
    for devices, steps in ((4, 4), (1, 8), (2, STEPS)):
        finish([experiment.start(tmp_path / "run", f"--config.steps={steps}", devices=devices)])
    one = virtual_devices["(1, 1, 1)"]["losses"]
    np.testing.assert_allclose(losses(tmp_path / "run"), one, rtol=1e-5)


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

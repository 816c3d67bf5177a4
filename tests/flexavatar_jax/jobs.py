"""Training as a command, and as several processes of one job; what runs have in the end."""

import json
import os
import socket
import time
from pathlib import Path

import jax
import numpy as np
from command_line import Command
from experiment_file import write_experiment
from flax import nnx

from flexavatar_jax.runs.loading import load_model

ROOT = Path(__file__).resolve().parents[2]


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


def wait_for_step(process: Command, workdir: Path, step: int) -> None:
    """Until the log of a run in `workdir` has come to `step`, or the process has ended."""
    log = workdir / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= step):
        time.sleep(0.05)

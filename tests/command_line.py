"""Commands as a user starts them, in forks of a process that has JAX imported already.

Importing it anew costs seconds of each command; nothing else of a new process is missing.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

PRELOADED = [
    "data_pipelines.mixture",
    "flexavatar_jax.cli",
    "flexavatar_jax.runs.loading",
    "flexavatar_jax.training.meter",
    "flexavatar_jax.training.train_step",
]
"""What the commands import, but none of them: each has to run as the program that it is."""


class Command:
    """`python -m MODULE ARGUMENTS`, started.

    `env` are all of its environment variables (default: ours), and `largest_file` are the bytes to
    which no file may grow.
    """

    def __init__(
        self,
        module: str,
        *arguments: object,
        env: Mapping[str, str] | None = None,
        largest_file: int = resource.RLIM_INFINITY,
    ):
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self._process = _warm().Process(
            target=_run,
            args=(
                [module, *map(str, arguments)],
                dict(os.environ if env is None else env),
                self._outputs,
                largest_file,
            ),
        )
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """As `subprocess.Popen` has it: the exit status, or minus the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Waits for the end, up to `timeout` seconds; what was said on stdout and on stderr."""
        self._process.join(timeout)
        said = tuple(path.read_text() if path.exists() else "" for path in self._outputs)
        assert self.returncode is not None, f"still running after {timeout} s: {said}"
        return said


def run_command(
    module: str, *arguments: object, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Runs `python -m MODULE ARGUMENTS` to its end."""
    command = Command(module, *arguments, env=env)
    stdout, stderr = command.communicate()
    return subprocess.CompletedProcess(module, command.returncode, stdout, stderr)


@functools.cache
def _warm() -> ForkServerContext:
    """Where processes are forked that have imported what they need, and set nothing of JAX yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("JAX_")]:
            patch.delenv(name)
        forkserver.ensure_running()
    return context


def _run(command: list[str], env: dict[str, str], outputs: list[Path], largest_file: int) -> None:
    """The command itself, in its process."""
    for output, descriptor in zip(outputs, (1, 2), strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    _configure_jax()
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2)
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def _configure_jax() -> None:
    """What JAX does with its environment variables when it is imported."""
    import jax

    for name, value in os.environ.items():
        option = name.lower()
        if not name.startswith("JAX_") or option not in jax.config.values:
            continue
        kind = type(jax.config.values[option])
        if kind is bool:
            value = value.lower() in ("1", "true", "yes", "on")
        elif kind in (int, float):
            value = kind(value)
        jax.config.update(option, value)

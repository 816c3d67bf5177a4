"""Trains an avatar model from a config.

    python -m flexavatar_jax.train --config configs/demo.py --workdir runs/demo

Any field is overridden on the command line (`--config.batch=40 --config.mesh.fsdp=8`). A run that
was stopped, by SIGTERM or harder, goes on from its last checkpoint when the same command is given
again, and ends with the same weights as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from clu import parameter_overview
from etils import epath
from flax import nnx
from ml_collections import ConfigDict, config_flags

from data_pipelines.mixture import make_iterator
from flexavatar_jax import cli
from flexavatar_jax.frozen.networks import FrozenNetworks, load_frozen_networks
from flexavatar_jax.runs.checkpoints import (
    Checkpoints,
    claim_workdir,
    hush_failed_writes,
    open_workdir,
    read_params,
)
from flexavatar_jax.training import flops
from flexavatar_jax.training.config_check import check_config
from flexavatar_jax.training.metric_log import MetricLog
from flexavatar_jax.training.sharding import batch_sharding, batch_share, make_mesh, replicated
from flexavatar_jax.training.trace import Trace
from flexavatar_jax.training.train_step import TrainProgram, TrainState
from kernels.rasterizer import choose_backend

PREEMPTED = 75
"""Exit status of a run that saved and left because it was asked to (EX_TEMPFAIL: run it again)."""

CONNECT_SECONDS = 300
"""How long a process waits for the others of its job to start."""


def train(config: ConfigDict, workdir: epath.PathLike, *, profile: bool = False) -> int:
    """Runs `config` in `workdir` up to `config.steps`; returns the exit status.

    `profile` writes a trace of a few steps to `workdir`/profile.

    Raises:
      cli.LastingError: a config that cannot be meant, or a run that diverged.
      ValueError, OSError: what else the user has to mend (data, folder, checkpoint).
    """
    with cli.giving_up():
        check_config(config)
        choose_backend(config.rasterizer)
        mesh = make_mesh(**config.mesh)
        template = open_workdir(workdir, config)
        program = TrainProgram.create(config, mesh, template)
        abstract = program.abstract_state
        share, shares = batch_share(mesh)
        data = make_iterator(
            config.data,
            seed=config.seed,
            global_batch=config.batch,
            process_index=share,
            process_count=shares,
        )
        frozen = jax.device_put(load_frozen_networks(config), replicated(mesh))
    claim_workdir(workdir, config, template)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)

    step = checkpoints.latest_step
    if step is None:
        step, state, seconds = 0, program.init(), 0.0
        if config.init_from:
            state = state._replace(params=read_params(config.init_from, abstract.params))
    else:
        params, opt_state, progress = checkpoints.restore_run(
            step, abstract.params, abstract.opt_state, data
        )
        number = jax.device_put(np.int32(step), program.state_sharding.step)
        skipped = jax.device_put(np.int32(progress["skipped"]), program.state_sharding.skipped)
        state, seconds = TrainState(number, params, opt_state, skipped), progress["seconds"]

    log = MetricLog(workdir, step=step, steps=config.steps, silent=jax.process_index() > 0)
    log.say(describe(config, mesh, state.params, step))
    stop_asked = StopSignal()
    started = time.monotonic() - seconds
    meter = Meter(config, workdir, log)
    trace = Trace(workdir, wanted=profile)
    step_function, finished = None, False
    perceptual_from = config.loss.perceptual_start if frozen.dino or frozen.sam else math.inf

    def save() -> None:
        progress = {"seconds": time.monotonic() - started, "skipped": int(state.skipped)}
        checkpoints.save(step, state.params, state.opt_state, data, progress)

    try:
        while step < config.steps:
            # The devices are still at the step before: batches are read and put meanwhile.
            with meter.waiting():
                batch = place(next(data), mesh)
            if step_function is None or step == perceptual_from:
                perceptual = step >= perceptual_from
                step_function = compile_step(
                    program, state, frozen, batch, log, meter, perceptual=perceptual
                )
            trace.before_step(state)
            state, metrics, preview = step_function(state, frozen, batch)
            step += 1
            log.advance()
            meter.add(step, metrics, preview, batch)
            stopping = stop_asked.is_set(step, checkpoints)
            if stopping or step == config.steps or step % config.checkpoint.every == 0:
                save()
            if stopping and step < config.steps:
                break
        meter.flush()
        finished = True
    finally:
        trace.stop()
        if finished or jax.process_count() == 1:
            # Saving waits for all processes, and after a failure one may be gone.
            checkpoints.wait()
            checkpoints.close()
        log.close()
    if step < config.steps:
        log.say(f"stopped at step {step} as asked; the same command goes on from there")
        return PREEMPTED
    return 0


def compile_step(
    program: TrainProgram,
    state: TrainState,
    frozen: FrozenNetworks,
    batch: Any,
    log: MetricLog,
    meter: Meter,
    *,
    perceptual: bool,
) -> Any:
    """Compiles the step, and says what takes the time and why."""
    what = "with DINO and SAM losses" if perceptual else "with L1 and SSIM losses"
    log.say(f"compiling the training step {what} ...")
    begin = time.monotonic()
    compiled = program.jitted_step(perceptual=perceptual).lower(state, frozen, batch).compile()
    operations = flops.step_flops(
        program.config, program.model(state.params), frozen, perceptual=perceptual
    )
    seconds = time.monotonic() - begin
    log.say(f"compiled in {seconds:.1f} s")
    meter.compiled(operations.total * program.config.batch, seconds)
    return compiled


def place(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This host's share of a batch (`batch_share`) as global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }


class Meter:
    """Gathers each step's metrics one step late, so that the devices never wait for the host."""

    def __init__(self, config: ConfigDict, workdir: epath.PathLike, log: MetricLog):
        self._config, self._workdir, self._log = config, epath.Path(workdir), log
        self._pending: tuple | None = None
        self._window: list[dict[str, float]] = []
        self._bad_in_a_row = 0
        self._since = time.monotonic()
        self._waited = 0.0
        self._operations = 0.0

    def compiled(self, operations: float, seconds: float) -> None:
        """From now on a step needs so many `operations`; compiling is no part of steps' time."""
        self._operations = operations
        self._since += seconds

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for input."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    def add(self, step: int, metrics: dict[str, jax.Array], preview: jax.Array, batch: Any) -> None:
        self.flush()
        self._pending = (step, metrics, preview, batch)

    def flush(self) -> None:
        """Takes in the step that is pending; logs if one is due.

        Raises:
          cli.LastingError: it is a bad step, and the config allows none or no more of them.
        """
        if self._pending is None:
            return
        (step, metrics, preview, batch), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}
        self._judge(step, values, batch)
        self._window.append(values)
        if step % self._config.log.every == 0 or step == self._config.steps:
            # Of all steps of the window, DINO's and SAM's losses may be of the last ones alone.
            means = {
                name: finite_mean([at[name] for at in self._window if name in at])
                for name in values
                if name != "bad"
            }
            means["skipped"] = values["skipped"]
            means |= self._speed()
            self._log.scalars(step, means)
            if means["splat_overflow"] > 0:
                self._log.say(
                    f"up to step {step}, {means['splat_overflow']:.3g} intersections of Gaussians "
                    "with tiles an image had no room and were not drawn: the Gaussians are very "
                    "large; config.splat_capacity makes more room"
                )
            self._window, self._since, self._waited = [], time.monotonic(), 0.0
        if step % self._config.log.images_every == 0 or step == self._config.steps:
            rows = np.asarray(preview.addressable_shards[0].data)
            self._log.images(step, "input_target_prediction", rows)

    def _judge(self, step: int, values: dict[str, float], batch: Any) -> None:
        """Raises `cli.LastingError` if the run must not go on after a step of these `values`."""
        config = self._config
        self._bad_in_a_row = self._bad_in_a_row + 1 if values["bad"] else 0
        gave = f"gave loss {values['loss']:g} and gradient norm {values['gradient_norm']:g}"
        if values["bad"] and config.bad_step == "stop":
            path = self._workdir / f"bad_step_{step}_process_{jax.process_index()}.npz"
            save_batch(path, batch)
            raise cli.LastingError(
                f"step {step} {gave}; its batch is in {path}; with config.bad_step = 'skip' "
                "training goes on without such steps"
            )
        if self._bad_in_a_row >= config.max_bad_steps:
            raise cli.LastingError(
                f"{self._bad_in_a_row} steps in a row were bad, up to step {step}, which {gave}: "
                "the run has diverged; start another with a lower config.optimizer.learning_rate, "
                "or let this one try for longer with a higher config.max_bad_steps"
            )

    def _speed(self) -> dict[str, float]:
        """How long a step of the window took, and how much of that it waited for input."""
        device, steps = jax.local_devices()[0], len(self._window)
        seconds = (time.monotonic() - self._since) / steps
        rate = self._operations / seconds / jax.device_count()
        speed = {
            "step_seconds": seconds,
            "examples_per_second": self._config.batch / seconds,
            "input_wait_seconds": self._waited / steps,
            "tflops_per_device": rate / 1e12,
        }
        if peak := flops.peak(device):
            speed["mfu"] = rate / peak
        speed["host_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if memory := device.memory_stats():
            speed["device_gib"] = memory["peak_bytes_in_use"] / 2**30
        return speed


def finite_mean(values: list[float]) -> float:
    """The mean of those that are finite; NaN if none is."""
    finite = [value for value in values if np.isfinite(value)]
    return sum(finite) / len(finite) if finite else float("nan")


def save_batch(path: epath.Path, batch: dict[str, jax.Array]) -> None:
    """Writes this host's part of a batch for a post-mortem."""
    arrays = {}
    for name, value in batch.items():
        # Devices along the tensor axis hold the same examples.
        parts = {shard.index[0].start or 0: shard.data for shard in value.addressable_shards}
        arrays[name] = np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
    with path.open("wb") as file:
        np.savez(file, **arrays)


class StopSignal:
    """Whether this job was asked to stop: by SIGTERM, or by the scheduler on any host."""

    def __init__(self) -> None:
        self._asked = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._ask)
        else:  # JAX tells all processes of a SIGTERM to one; mpirun passes SIGUSR1 on, not that
            signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    def _ask(self, *_: Any) -> None:
        self._asked = True

    def is_set(self, step: int, checkpoints: Checkpoints) -> bool:
        return self._asked or (jax.process_count() > 1 and checkpoints.reached_preemption(step))


def describe(config: ConfigDict, mesh: jax.sharding.Mesh, params: nnx.State, step: int) -> str:
    count = parameter_overview.count_parameters(nnx.to_pure_dict(params))
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return (
        f"{count:,} parameters on {mesh.size} x {kind} ({sizes}), {jax.process_count()} processes; "
        f"batch {config.batch} x {config.data.targets} targets; step {step} of {config.steps}"
    )


def connect() -> None:
    """Joins the other processes of this job, which JAX finds through the cluster's launcher.

    Raises:
      ValueError: no launcher that JAX knows, or not all processes came.
    """
    try:
        jax.distributed.initialize(initialization_timeout=CONNECT_SECONDS)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--distributed could not join the job's other processes ({reason}); start all of them "
            "with the cluster's launcher, as in one of the recipes in launch/"
        ) from error


def main() -> int:
    hush_failed_writes()
    if not FLAGS.distributed:
        return train(FLAGS.config, FLAGS.workdir, profile=FLAGS.profile)
    connect()
    try:
        return train(FLAGS.config, FLAGS.workdir, profile=FLAGS.profile)
    except Exception as error:
        leave(error)


def leave(error: Exception) -> NoReturn:
    """Says what failed and ends this process of many at once.

    An orderly end would wait for the other processes, which may be waiting for this one.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
        cli.say_error(f"the step failed, as it does when another process is gone: {error}")
    elif isinstance(error, cli.USER_ERRORS):
        cli.say_error(str(error))
    else:
        traceback.print_exception(error)
    # Of many processes' statuses a scheduler takes the first or the highest: one that lost another
    # mustn't drown out why that one left, so it ends with no status of its own.
    os._exit(cli.status_of(error))


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, logs, template, config.")
    flags.DEFINE_bool(
        "distributed", False, "One process of many: find the others through the cluster's launcher."
    )
    flags.DEFINE_bool("profile", False, "Write a trace of a few steps to WORKDIR/profile (XProf).")
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)

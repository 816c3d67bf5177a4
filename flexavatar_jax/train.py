"""Trains an avatar model from a config.

    python -m flexavatar_jax.train --config configs/demo.py --workdir runs/demo

Any field is overridden on the command line (`--config.batch=40 --config.mesh.fsdp=8`). A run that
was stopped, by SIGTERM or harder, goes on from its last checkpoint when the same command is given
again, and ends with the same weights as one that was never stopped.
"""

from __future__ import annotations

import math
import os
import signal
import time
import traceback
from typing import Any, NoReturn

import jax
import numpy as np
from absl import flags
from clu import parameter_overview
from etils import epath
from flax import nnx
from ml_collections import ConfigDict, config_flags

from data_pipelines.batch import Batch
from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.mixture import make_iterator
from flexavatar_jax import cli
from flexavatar_jax.frozen.networks import FrozenNetworks, load_frozen_networks
from flexavatar_jax.runs.checkpoints import Checkpoints, hush_failed_writes
from flexavatar_jax.runs.loading import read_params
from flexavatar_jax.runs.workdir import claim_workdir, open_workdir
from flexavatar_jax.training import flops
from flexavatar_jax.training.config_check import check_config
from flexavatar_jax.training.meter import Meter
from flexavatar_jax.training.metric_log import MetricLog
from flexavatar_jax.training.sharding import batch_sharding, batch_share, make_mesh, replicated
from flexavatar_jax.training.trace import Trace
from flexavatar_jax.training.train_step import TrainProgram, TrainState

PREEMPTED = 75
"""Exit status of a run that saved and left because it was asked to (EX_TEMPFAIL: run it again)."""

CONNECT_SECONDS = 300
"""How long a process waits for the others of its job to start."""


def train(config: ConfigDict, workdir: epath.PathLike, *, profile: bool = False) -> int:
    """Runs `config` in `workdir` up to `config.steps`; returns the exit status.

    `profile` writes a trace of a few steps to `workdir`/profile.

    Raises:
      UserError: a config that cannot be meant, a run that diverged, or what else the user has to
        mend (data, folder, checkpoint).
    """
    check_config(config)
    cli.check_backend(config.rasterizer)
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
    lock = claim_workdir(workdir, config, template)
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
    perceptual_from = (
        config.loss.perceptual_start if frozen.dinov2_small or frozen.sam2 else math.inf
    )

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
        lock.release()
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


def place(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """This host's share of a batch (`batch_share`) as global arrays, split over the mesh."""
    sharding = batch_sharding(mesh)
    return Batch(*(jax.make_array_from_process_local_data(sharding, field) for field in batch))


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
      UserError: no launcher that JAX knows, or not all processes came.
    """
    try:
        jax.distributed.initialize(initialization_timeout=CONNECT_SECONDS)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--distributed could not join the job's other processes ({reason}); start all of them "
            "with the cluster's launcher, as in one of the recipes in launch/",
            status=TRY_AGAIN,
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
    elif isinstance(error, UserError):
        cli.say_error(str(error))
    else:
        traceback.print_exception(error)
    # Of many processes' statuses a scheduler takes the first or the highest: one that lost another
    # mustn't drown out why that one left, so it ends with no status of its own.
    os._exit(error.status if isinstance(error, UserError) else TRY_AGAIN)


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

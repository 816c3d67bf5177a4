"""Trains an avatar model from a config.

    python -m flexavatar_jax.train --config configs/demo.py --workdir runs/demo

Any field is overridden on the command line (`--config.batch=40 --config.mesh.fsdp=8`). A run that
was stopped, by SIGTERM or harder, goes on from its last checkpoint when the same command is given
again, and ends with the same weights as one that was never stopped.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from typing import Any, NoReturn

from flexavatar_jax.stopping import PREEMPTED, StopRequest, leave

if __name__ == "__main__":
    STOP = StopRequest()
    STOP.listen()  # before what takes seconds to import

import jax
import numpy as np
from absl import flags
from clu import parameter_overview
from etils import epath
from flax import nnx
from jax._src import distributed
from ml_collections import ConfigDict, config_flags

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.mixture import make_iterator
from flexavatar_jax import cli
from flexavatar_jax.frozen.networks import load_frozen_networks
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.loading import read_params
from flexavatar_jax.runs.workdir import claim_workdir, open_workdir
from flexavatar_jax.training.compilation import Programs, fitting, keep_compiled, record_compiled
from flexavatar_jax.training.config_check import check_config
from flexavatar_jax.training.held_out import HeldOut
from flexavatar_jax.training.ledger import Ledger, process_age
from flexavatar_jax.training.meter import Meter
from flexavatar_jax.training.metric_log import MetricLog
from flexavatar_jax.training.sharding import batch_share, make_mesh, place, replicated
from flexavatar_jax.training.trace import Trace
from flexavatar_jax.training.train_step import TrainProgram, TrainState

CONNECT_SECONDS = 300
"""How long a process waits for the others of its job to start."""


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    profile: bool = False,
    stop: StopRequest | None = None,
    startup_seconds: float = 0.0,
) -> int:
    """Runs `config` in `workdir` up to `config.steps`; returns the exit status.

    Args:
      config, workdir: what to run, and the run's folder.
      profile: write a trace of a few steps to `workdir`/profile.
      stop: where it is due, the run saves and returns its status.
      startup_seconds: since this process began, for the ledger.

    Raises:
      UserError: a config that cannot be meant, a step that does not fit the devices, a run that
        diverged, or what else the user has to mend (data, folder, checkpoint).
    """
    with contextlib.closing(Ledger(startup_seconds)) as ledger, fitting(config):
        return _train(config, workdir, profile, stop or StopRequest(), ledger)


def _train(
    config: ConfigDict, workdir: epath.PathLike, profile: bool, stop: StopRequest, ledger: Ledger
) -> int:
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
    held_out = HeldOut(program, frozen) if config.eval.every else None
    silent = jax.process_index() > 0
    lock = claim_workdir(workdir, config, template)
    keep_compiled(workdir)
    ledger.open(workdir, silent=silent)
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)

    step = checkpoints.latest_step
    log = MetricLog(workdir, step=step or 0, steps=config.steps, silent=silent, also=ledger.metrics)
    programs = Programs(program, frozen, step or 0, log.say)
    if step is None:
        step, state, seconds = 0, program.init(), 0.0
        ledger.go_on_from({})
        if config.init_from:
            with ledger.during("restoring"):
                state = state._replace(params=read_params(config.init_from, abstract.params))
    else:
        with ledger.during("restoring"):
            params, opt_state, progress = checkpoints.restore_run(
                step, abstract.params, abstract.opt_state, data
            )
        ledger.go_on_from(progress.get("ledger", {}))
        number = jax.device_put(np.int32(step), program.state_sharding.step)
        skipped = jax.device_put(np.int32(progress["skipped"]), program.state_sharding.skipped)
        state, seconds = TrainState(number, params, opt_state, skipped), progress["seconds"]

    log.say(describe(config, mesh, state.params, step))
    started = time.monotonic() - seconds
    meter = Meter(config, workdir, log)
    trace = Trace(workdir, wanted=profile)
    finished = False

    def save(held_out_metrics: dict[str, float] | None = None) -> None:
        jax.block_until_ready(state.skipped)  # the step's time, not saving's
        with ledger.during("saving"):
            progress = {
                "seconds": time.monotonic() - started,
                "skipped": int(state.skipped),
                "ledger": ledger.totals(),
            }
            checkpoints.save(step, state.params, state.opt_state, data, progress, held_out_metrics)
            record_compiled(workdir)

    try:
        data.start_prefetch()
        while step < config.steps:
            with ledger.during("compiling"), meter.paused():
                compiled = programs.get(step, stop.asked_here)
            if compiled is None:
                save()
                break
            # The devices are still at the step before: batches are read and put meanwhile.
            with ledger.during("waiting", unless=meter.busy), meter.waiting():
                batch = place(next(data), mesh)
            stop.begin()
            ledger.enter("stepping")
            trace.before_step(state)
            meter.operations = compiled.operations
            state, metrics, preview = compiled.call(state, frozen, batch)
            step += 1
            log.advance()
            meter.add(step, metrics, preview, batch)
            ledger.reached(step)
            stopping, found = stop.due(), None
            if not stopping and held_out and held_out.is_due(step):
                meter.flush()
                with ledger.during("evaluating"), meter.paused():
                    found = held_out.evaluate(state.params, stop.due)
                stopping = found is None
            if found:
                log.scalars(step, found.metrics)
                log.images(step, "eval_input_target_prediction", found.rows)
            due = step == config.steps or step % config.checkpoint.every == 0
            if stopping or found or due:
                save(found and found.metrics)
            if stopping:
                break
        meter.flush()
        finished = True
    finally:
        ledger.enter("saving")
        trace.stop()
        if finished or jax.process_count() == 1:
            # Saving waits for all processes, and after a failure one may be gone.
            checkpoints.wait()
            stop.saved()
            checkpoints.close()
        data.close()
        if finished:
            log.say(ledger.describe())
        log.close()
        lock.release()
    if step < config.steps:
        log.say(f"stopped at step {step} as asked; the same command goes on from there")
        return stop.status or PREEMPTED
    return 0


def describe(config: ConfigDict, mesh: jax.sharding.Mesh, params: nnx.State, step: int) -> str:
    count = parameter_overview.count_parameters(nnx.to_pure_dict(params))
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return (
        f"{count:,} parameters on {mesh.size} x {kind} ({sizes}), {jax.process_count()} processes; "
        f"batch {config.batch} x {config.data.targets} targets; step {step} of {config.steps}"
    )


def connect(stop: StopRequest) -> None:
    """Joins the other processes of this job, which JAX finds through the cluster's launcher.

    Raises:
      UserError: no launcher that JAX knows, or not all processes came.
    """
    # It would take SIGTERM from us, and tell the others only between two steps.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(initialization_timeout=CONNECT_SECONDS, **place_in_open_mpi())
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--distributed could not join the job's other processes ({reason}); start all of them "
            "with the cluster's launcher, as in one of the recipes in launch/",
            status=TRY_AGAIN,
        ) from error
    if jax.process_count() > 1:
        stop.join_job(distributed.global_state.client, jax.process_index(), jax.process_count())


def place_in_open_mpi() -> dict[str, Any]:
    """This process's place in an Open MPI job: version 5 no longer tells JAX what it looks for.

    Raises:
      UserError: nobody said where the first process is.
    """
    environment = os.environ
    if "OMPI_COMM_WORLD_RANK" not in environment or "OMPI_MCA_orte_hnp_uri" in environment:
        return {}
    if "JAX_COORDINATOR_ADDRESS" not in environment:
        raise UserError(
            "Open MPI 5 doesn't say where a job's first process is; start the job with "
            "launch/openmpi.sh, or set JAX_COORDINATOR_ADDRESS to HOST:PORT of that process"
        )
    return dict(
        num_processes=int(environment["OMPI_COMM_WORLD_SIZE"]),
        process_id=int(environment["OMPI_COMM_WORLD_RANK"]),
        local_device_ids=[int(environment["OMPI_COMM_WORLD_LOCAL_RANK"])],
    )


def main() -> NoReturn:
    try:
        if FLAGS.distributed:
            connect(STOP)
        status = train(
            FLAGS.config,
            FLAGS.workdir,
            profile=FLAGS.profile,
            stop=STOP,
            startup_seconds=process_age(),
        )
        if FLAGS.distributed:
            jax.distributed.shutdown()  # waits for the others
    except Exception as error:
        status = STOP.status or failure(error)  # once asked, what fails is that others have left
    # An orderly end waits: for the other processes, which may be waiting for this one, and for
    # threads that compile.
    leave(status)


def failure(error: Exception) -> int:
    """Says what ended this process; returns its exit status."""
    if isinstance(error, UserError) and not os.environ.get("FLEXAVATAR_TRACEBACK"):
        cli.say_error(str(error))
    elif isinstance(error, jax.errors.JaxRuntimeError) and FLAGS.distributed:
        cli.say_error(f"the step failed, as it does when another process is gone: {error}")
    else:
        traceback.print_exception(error)
    # Of many processes' statuses a scheduler takes the first or the highest: one that lost another
    # mustn't drown out why that one left, so it ends with no status of its own.
    return error.status if isinstance(error, UserError) else TRY_AGAIN


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

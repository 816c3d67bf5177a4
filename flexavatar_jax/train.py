"""Trains an avatar model from a config.

    python -m flexavatar_jax.train --config configs/demo.py --workdir runs/demo

Any field is overridden on the command line (`--config.batch=40 --config.mesh.fsdp=8`). A run that
was stopped, by SIGTERM or harder, goes on from its last checkpoint when the same command is given
again, and ends with the same weights as one that was never stopped.
"""

from __future__ import annotations

import signal
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from clu import parameter_overview
from etils import epath
from flax import nnx
from ml_collections import ConfigDict, config_flags

from data_pipelines.mixture import make_iterator
from flexavatar_jax import cli
from flexavatar_jax.checkpoints import Checkpoints, prepare_workdir
from flexavatar_jax.frozen.networks import FrozenNetworks, load_frozen_networks
from flexavatar_jax.metric_log import MetricLog
from flexavatar_jax.sharding import batch_sharding, make_mesh, replicated
from flexavatar_jax.train_step import TrainProgram, TrainState

PREEMPTED = 75
"""Exit status of a run that saved and left because it was asked to (EX_TEMPFAIL: run it again)."""


def train(config: ConfigDict, workdir: epath.PathLike) -> int:
    """Runs `config` in `workdir` up to `config.steps`; returns the exit status.

    Raises:
      ValueError, OSError: what the user has to mend (config, data, folder, checkpoint).
    """
    mesh = make_mesh(**config.mesh)
    template = prepare_workdir(workdir, config)
    program = TrainProgram.create(config, mesh, template)
    data = make_iterator(
        config.data,
        seed=config.seed,
        global_batch=config.batch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    frozen = jax.device_put(load_frozen_networks(config), replicated(mesh))
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep, every=config.checkpoint.every)

    step = checkpoints.latest_step
    if step is None or not checkpoints.has_optimizer(step):
        state, seconds = program.init(), 0.0
        if step is not None:  # imported weights: fine-tune them from step 0
            params = checkpoints.restore_params(step, program.abstract_state.params)
            state = state._replace(params=params)
        step = 0
    else:
        params, opt_state, progress = checkpoints.restore_run(
            step, program.abstract_state.params, program.abstract_state.opt_state, data
        )
        number = jax.device_put(np.int32(step), program.state_sharding.step)
        skipped = jax.device_put(np.int32(progress["skipped"]), program.state_sharding.skipped)
        state, seconds = TrainState(number, params, opt_state, skipped), progress["seconds"]

    log = MetricLog(workdir, step=step, steps=config.steps, silent=jax.process_index() > 0)
    log.say(describe(config, mesh, state.params, step))
    stop_asked = StopSignal()
    started = time.monotonic() - seconds
    meter = Meter(config, workdir, log)
    step_function = None

    def save(force: bool = False) -> None:
        progress = {"seconds": time.monotonic() - started, "skipped": int(state.skipped)}
        checkpoints.save(step, state.params, state.opt_state, data, progress, force=force)

    try:
        while step < config.steps:
            batch = next(data)
            batch = place(batch, mesh)
            if step_function is None or step == config.loss.perceptual_start:
                step_function = compile_step(program, state, frozen, batch, step, log)
            state, metrics, preview = step_function(state, frozen, batch)
            step += 1
            log.advance()
            meter.add(step, metrics, preview, batch)
            stopping = stop_asked.is_set(step, checkpoints)
            if stopping or step == config.steps or step % config.checkpoint.every == 0:
                save(force=True)
            if stopping and step < config.steps:
                log.say(f"stopped at step {step} as asked; the same command goes on from there")
                return PREEMPTED
        meter.flush()
    finally:
        checkpoints.wait()
        checkpoints.close()
        log.close()
    return 0


def compile_step(
    program: TrainProgram,
    state: TrainState,
    frozen: FrozenNetworks,
    batch: Any,
    step: int,
    log: MetricLog,
) -> Any:
    """Compiles the step that `step` needs, and says what takes the time and why."""
    loss = program.config.loss
    perceptual = step >= loss.perceptual_start and bool(loss.dino or loss.sam)
    what = "with DINO and SAM losses" if perceptual else "with L1 and SSIM losses"
    log.say(f"compiling the training step {what} (from step {step} on) ...")
    begin = time.monotonic()
    compiled = program.jitted_step(perceptual=perceptual).lower(state, frozen, batch).compile()
    log.say(f"compiled in {time.monotonic() - begin:.1f} s")
    return compiled


def place(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch as global arrays, split over the mesh."""
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
        self._sums: dict[str, float] = {}
        self._count = 0
        self._since = time.monotonic()

    def add(self, step: int, metrics: dict[str, jax.Array], preview: jax.Array, batch: Any) -> None:
        self.flush()
        self._pending = (step, metrics, preview, batch)

    def flush(self) -> None:
        """Takes in the step that is pending; logs if one is due."""
        if self._pending is None:
            return
        (step, metrics, preview, batch), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}
        if self._config.bad_step == "stop" and values["skipped"] > 0:
            path = self._workdir / f"bad_step_{step}_process_{jax.process_index()}.npz"
            save_batch(path, batch)
            raise ValueError(
                f"step {step} gave loss {values['loss']:g} and gradient norm "
                f"{values['gradient_norm']:g}; its batch is in {path}; with config.bad_step = "
                "'skip' training goes on without such steps"
            )
        finite = np.isfinite(values["loss"])
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + (value if finite else 0.0)
        self._count += finite
        if step % self._config.log.every == 0 or step == self._config.steps:
            seconds = (time.monotonic() - self._since) / max(self._count, 1)
            means = {name: total / max(self._count, 1) for name, total in self._sums.items()}
            means["skipped"] = values["skipped"]
            means |= {"step_seconds": seconds, "examples_per_second": self._config.batch / seconds}
            self._log.scalars(step, means)
            self._sums, self._count, self._since = {}, 0, time.monotonic()
        if step % self._config.log.images_every == 0 or step == self._config.steps:
            rows = np.asarray(preview.addressable_shards[0].data)
            self._log.images(step, "input_target_prediction", rows)


def save_batch(path: epath.Path, batch: dict[str, jax.Array]) -> None:
    """Writes this host's part of a batch for a post-mortem."""
    arrays = {
        name: np.concatenate([np.asarray(shard.data) for shard in value.addressable_shards])
        for name, value in batch.items()
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)


class StopSignal:
    """Whether this job was asked to stop: by SIGTERM, or by the scheduler on any host."""

    def __init__(self) -> None:
        self._asked = False
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._ask)

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


def main() -> int:
    if FLAGS.distributed:
        jax.distributed.initialize()
    return train(FLAGS.config, FLAGS.workdir)


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("workdir", None, "The run's folder: checkpoints, logs, template, config.")
    flags.DEFINE_bool(
        "distributed", False, "One process of many: find the others through the cluster's launcher."
    )
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main)

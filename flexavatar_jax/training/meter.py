"""What a run's steps did: gathered, judged, and logged at intervals."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from data_pipelines.batch import Batch
from data_pipelines.errors import UserError
from flexavatar_jax.training import flops
from flexavatar_jax.training.metric_log import MetricLog


class Meter:
    """Gathers each step's metrics one step late, so that the devices never wait for the host.

    Attributes:
      operations: FLOP of a step, over all devices.
    """

    def __init__(self, config: ConfigDict, workdir: epath.PathLike, log: MetricLog):
        self._config, self._workdir, self._log = config, epath.Path(workdir), log
        self.operations = 0.0
        self._pending: tuple | None = None
        self._window: list[dict[str, float]] = []
        self._bad_in_a_row = 0
        self._since = time.monotonic()
        self._waited = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time within is no part of steps' time: compiling, evaluating."""
        begin = time.monotonic()
        yield
        self._since += time.monotonic() - begin

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for input, unless the devices were busy all along."""
        begin = time.monotonic()
        yield
        if not self.busy():
            self._waited += time.monotonic() - begin

    def busy(self) -> bool:
        """Whether the devices are still at the last step that was added."""
        return self._pending is not None and not self._pending[1]["loss"].is_ready()

    def add(self, step: int, metrics: dict[str, jax.Array], preview: jax.Array, batch: Any) -> None:
        self.flush()
        self._pending = (step, metrics, preview, batch)

    def flush(self) -> None:
        """Takes in the step that is pending; logs if one is due.

        Raises:
          UserError: it is a bad step, and the config allows none or no more of them.
        """
        if self._pending is None:
            return
        (step, metrics, preview, batch), self._pending = self._pending, None
        values = {name: float(value) for name, value in metrics.items()}
        self._check_step(step, values, batch)
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

    def _check_step(self, step: int, values: dict[str, float], batch: Any) -> None:
        """Raises `UserError` if the run must not go on after a step of these `values`."""
        config = self._config
        self._bad_in_a_row = self._bad_in_a_row + 1 if values["bad"] else 0
        gave = f"gave loss {values['loss']:g} and gradient norm {values['gradient_norm']:g}"
        if values["bad"] and config.bad_step == "stop":
            path = self._workdir / f"bad_step_{step}_process_{jax.process_index()}.npz"
            save_batch(path, batch)
            raise UserError(
                f"step {step} {gave}; its batch is in {path}; with config.bad_step = 'skip' "
                "training goes on without such steps"
            )
        if self._bad_in_a_row >= config.max_bad_steps:
            raise UserError(
                f"{self._bad_in_a_row} steps in a row were bad, up to step {step}, which {gave}: "
                "the run has diverged; start another with a lower config.optimizer.learning_rate, "
                "or let this one try for longer with a higher config.max_bad_steps"
            )

    def _speed(self) -> dict[str, float]:
        """How long a step of the window took, and how much of that it waited for input."""
        device, steps = jax.local_devices()[0], len(self._window)
        seconds = (time.monotonic() - self._since) / steps
        rate = self.operations / seconds / jax.device_count()
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


def save_batch(path: epath.Path, batch: Batch) -> None:
    """Writes this host's part of a batch for a post-mortem."""
    arrays = {}
    for name, value in batch._asdict().items():
        # Devices along the tensor axis hold the same examples.
        parts = {shard.index[0].start or 0: shard.data for shard in value.addressable_shards}
        arrays[name] = np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])
    with path.open("wb") as file:
        np.savez(file, **arrays)

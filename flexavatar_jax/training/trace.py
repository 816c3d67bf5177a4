"""Traces a few steps of a run for XProf, TensorBoard's profiler."""

from __future__ import annotations

import jax
from etils import epath

FIRST, STEPS = 3, 5
"""The steps after a start that are traced: not the first ones, which still fill buffers."""


class Trace:
    """Writes a trace of steps FIRST to FIRST + STEPS after the start into WORKDIR/profile.

    Call `before_step` ahead of every step and `stop` when the run ends.
    """

    def __init__(self, workdir: epath.PathLike, *, wanted: bool):
        self.directory = epath.Path(workdir) / "profile"
        self._wanted = wanted and jax.process_index() == 0
        self._steps = 0
        self._running = False

    def before_step(self, state: object) -> None:
        """Starts or stops tracing where it is due; `state` is what the steps so far lead to."""
        if not self._wanted:
            return
        if self._steps == FIRST:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self.directory)
            self._running = True
        elif self._steps == FIRST + STEPS:
            jax.block_until_ready(state)
            self.stop()
        self._steps += 1

    def stop(self) -> None:
        """Writes the trace, if one is being taken."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

"""The training step's programs: compiled beside what else there is to do, and kept for restarts."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from data_pipelines.batch import Batch
from data_pipelines.errors import UserError
from data_pipelines.files import is_remote
from flexavatar_jax.frozen.networks import FrozenNetworks, frozen_shapes
from flexavatar_jax.runs import digests
from flexavatar_jax.training import flops
from flexavatar_jax.training.background import Background
from flexavatar_jax.training.sharding import batch_sharding, replicated
from flexavatar_jax.training.train_step import TrainProgram

AHEAD = 2000
"""Steps before it is due at which compiling the step with DINO and SAM begins.

Counted, not timed: on GPUs processes share what they find out while compiling, so all must begin.
"""

POLL_SECONDS = 0.2


def keep_compiled(workdir: epath.PathLike) -> None:
    """Keeps compiled programs in WORKDIR/compiled, from which a restart has them in seconds.

    Where JAX was given another place (JAX_COMPILATION_CACHE_DIR), that one stays. Programs of which
    one is damaged are made anew: JAX would load, and run, a flipped bit.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return  # a program of many processes' CPUs runs in the process alone that compiled it
    folder = epath.Path(workdir).absolute() / "compiled"
    if is_remote(folder):
        # XLA's own caches beside JAX's know no buckets.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    damage = digests.find_damage(folder) if jax.process_index() == 0 else None
    if damage:
        logging.warning("%s; the run's programs are compiled anew", damage)
        folder.rmtree()
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))


def record_compiled(workdir: epath.PathLike) -> None:
    """Takes the digests of the programs in WORKDIR/compiled that are new."""
    folder = epath.Path(workdir).absolute() / "compiled"
    if jax.process_index() > 0 or not folder.exists():
        return
    # Beside them JAX notes when each was used.
    changing = tuple(path.name for path in folder.iterdir() if not path.name.endswith("-cache"))
    digests.record(folder, leave_out=changing, below=False)


def abstract_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes of a batch as `data_pipelines.mixture.make_iterator` gives it, laid out on `mesh`."""
    shapes = Batch.shapes(config.batch, config.data.targets, config.model.image_size)
    sharding = batch_sharding(mesh)
    return Batch(
        **{
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, (shape, dtype) in shapes.items()
        }
    )


def abstract_frozen(config: ConfigDict, mesh: jax.sharding.Mesh) -> FrozenNetworks:
    """Shapes of the frozen networks that `config` asks for, whole on every device of `mesh`."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        frozen_shapes(config),
    )


@contextlib.contextmanager
def fitting(config: ConfigDict) -> Iterator[None]:
    """Within, a step that finds no room on the devices is a mistake with a way out.

    Raises:
      UserError: for XLA's error; says what takes less memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        local = max(1, config.batch // (jax.device_count() * config.accumulate))
        raise UserError(
            f"the devices' memory is too small for config.batch {config.batch}: try "
            + ", then ".join([*savings(config, local), "a smaller --config.batch"])
        ) from error


def savings(config: ConfigDict, local: int) -> list[str]:
    """What makes a step take less memory, cheapest first.

    Args:
      local: examples a device and micro-batch.
    """
    changes = []
    if config.model.remat < 1:
        changes.append("--config.model.remat=1")
    if local > 1:
        changes.append(f"--config.accumulate={config.accumulate * local}")
    return changes


class CompiledStep(NamedTuple):
    """A training step that can be called."""

    call: Callable
    operations: float
    """FLOP, over all devices."""
    seconds: float
    """How long compiling took."""


class Programs:
    """A run's training steps, each compiled in a thread before it is due.

    Args:
      step: the step that the run goes on from; compiling its program begins at once.
      say: is told what is compiled, and how long it took.
    """

    def __init__(
        self, program: TrainProgram, frozen: FrozenNetworks, step: int, say: Callable[[str], None]
    ) -> None:
        start = program.config.loss.perceptual_start
        has_perceptual = frozen.dinov2_small is not None or frozen.sam2 is not None
        self._perceptual_from = start if has_perceptual else math.inf
        self._program, self._frozen, self._say = program, frozen, say
        self._compiling: dict[bool, Background[CompiledStep]] = {}
        self._compiled: dict[bool, CompiledStep] = {}
        self._start(step >= self._perceptual_from)

    def get(self, step: int, stop: Callable[[], bool]) -> CompiledStep | None:
        """The program of `step`, waiting until it is compiled; None as soon as `stop` says so.

        To be called for every step: it begins what will be due.
        """
        perceptual = step >= self._perceptual_from
        ahead = step >= self._perceptual_from - AHEAD
        if ahead and self._perceptual_from < self._program.config.steps:
            self._start(True)
        if perceptual not in self._compiled:
            compiling = self._compiling[perceptual]
            while not compiling.ready(POLL_SECONDS):
                if stop():
                    return None
            # What is over takes room on the devices.
            self._compiled = {perceptual: compiling.result()}
            if perceptual:
                self._compiling.pop(False, None)
            self._say(f"compiled in {self._compiled[perceptual].seconds:.1f} s")
        return self._compiled[perceptual]

    def _start(self, perceptual: bool) -> None:
        if perceptual in self._compiling:
            return
        what = "with DINO and SAM losses" if perceptual else "with L1 and SSIM losses"
        self._say(f"compiling the training step {what} ...")
        self._compiling[perceptual] = Background(
            lambda: compile_step(self._program, self._frozen, perceptual=perceptual), "compiling"
        )


def compile_step(
    program: TrainProgram, frozen: FrozenNetworks, *, perceptual: bool
) -> CompiledStep:
    """Compiles a training step, with DINO's and SAM's losses or without."""
    begin = time.monotonic()
    config, state = program.config, program.abstract_state
    step: Any = program.jitted_step(perceptual=perceptual)
    compiled = step.lower(state, frozen, abstract_batch(config, program.mesh)).compile()
    cost = flops.step_flops(config, program.model(state.params), frozen, perceptual=perceptual)
    return CompiledStep(compiled, cost.total * config.batch, time.monotonic() - begin)

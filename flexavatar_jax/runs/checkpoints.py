"""A run's Orbax checkpoints: WORKDIR/checkpoints/STEP/ with params, optimizer, data, progress.

`data` is Grain's iterator state. Imported weights are a checkpoint of `params` alone. Orbax writes
a checkpoint under a temporary name and renames it when it is whole, with the digests of its files.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from data_pipelines.errors import TRY_AGAIN, UserError
from flexavatar_jax.runs import digests

_CHANGING = ("_CHECKPOINT_METADATA",)
"""Of a checkpoint's files those that Orbax writes once more as it gives the checkpoint its name."""

_FOR_TRAINING = ("optimizer", "data")
"""A checkpoint's items that nobody but training reads."""


class Checkpoints:
    """Saves and restores a run: parameters, optimiser, data iterator, progress.

    Saving is asynchronous and sharded: each process writes its own shards while training goes on.

    Args:
      workdir: the run's folder.
      keep: how many checkpoints stay; older ones are removed as new ones are saved, but for the
        one that is best on held-out people.
      owned: whether what an earlier process left half-saved is removed. Readers don't own a run's
        folder: its trainer may be saving right now.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int = 3, owned: bool = True):
        hush_failed_writes()
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        # Not Orbax's read_only, which warns the user of each of its own defaults.
        best = policies.BestN(
            get_metric_fn=_held_out_psnr, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            best_fn=_held_out_psnr,
            cleanup_tmp_directories=owned,
            create=owned,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._record),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._saving: int | None = None

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        params: nnx.State,
        opt_state: Any = None,
        data: Any = None,
        progress: dict[str, Any] | None = None,
        held_out: dict[str, float] | None = None,
    ) -> None:
        """Starts saving the state after `step` steps; `held_out` says how good it is.

        Raises:
          UserError: this checkpoint, or the one before, cannot be written.
        """
        items = {
            "params": ocp.args.StandardSave(nnx.to_pure_dict(params)),
            "progress": ocp.args.JsonSave(progress or {}),
        }
        if opt_state is not None:
            items["optimizer"] = ocp.args.StandardSave(_pure(opt_state))
        if data is not None:
            items["data"] = ocp.args.JsonSave(data.get_state())
        self._check_room(params, opt_state)
        self.wait()
        with self._writing():
            self._saving = step
            composite = ocp.args.Composite(**items)
            self._manager.save(step, args=composite, metrics=held_out or {}, force=True)

    def restore_params(self, step: int, abstract: nnx.State) -> nnx.State:
        """Parameters of `step`, laid out as `abstract` (shapes and shardings) asks.

        Raises:
          UserError: the checkpoint is damaged, incomplete or of another model.
        """
        self._check(step)
        like = nnx.to_pure_dict(abstract)
        restored = self._restore(step, params=ocp.args.StandardRestore(like))
        return _refill(abstract, restored["params"])

    def restore_run(
        self, step: int, abstract_params: nnx.State, abstract_opt_state: Any, data: Any
    ) -> tuple[nnx.State, Any, dict[str, Any]]:
        """Parameters, optimiser state and progress; `data`'s iterator is set to where it was.

        Digests are not compared: `put_damaged_aside` did that.

        Raises:
          UserError: the checkpoint is incomplete or of another model.
        """
        restored = self._restore(
            step,
            params=ocp.args.StandardRestore(nnx.to_pure_dict(abstract_params)),
            optimizer=ocp.args.StandardRestore(_pure(abstract_opt_state)),
            data=ocp.args.JsonRestore(),
            progress=ocp.args.JsonRestore(),
        )
        # One state for all hosts, so that another number of them can go on from it.
        data.set_state(restored["data"])
        params = _refill(abstract_params, restored["params"])
        leaves = jax.tree.leaves(restored["optimizer"])
        opt_state = jax.tree.unflatten(jax.tree.structure(abstract_opt_state), leaves)
        return params, opt_state, restored["progress"]

    def progress(self, step: int) -> dict[str, Any]:
        return self._restore(step, progress=ocp.args.JsonRestore())["progress"] or {}

    def wait(self) -> None:
        """Blocks until a save under way is on disk.

        Raises:
          UserError: it cannot be written.
        """
        with self._writing():
            try:
                self._manager.wait_until_finished()
                if self._saving is not None and jax.process_index() == 0:
                    digests.record(self.directory / str(self._saving))
            finally:
                self._saving = None

    def _record(self) -> None:
        """Orbax calls it when a checkpoint is written, before it gives it its name."""
        for folder in self.directory.iterdir():
            if folder.name.split(".")[0] == str(self._saving):
                digests.record(folder, leave_out=_CHANGING)

    def _check(self, step: int) -> None:
        """Raises `UserError` if what inference reads of a checkpoint is damaged."""
        folder = self.directory / str(step)
        damage = digests.find_damage(folder, leave_out=_FOR_TRAINING)
        if not damage:
            return digests.tell_if_unrecorded(folder)
        for other in sorted((s for s in _steps(self.directory) if s < step), reverse=True):
            if not digests.find_damage(self.directory / str(other), leave_out=_FOR_TRAINING):
                raise UserError(
                    f"{damage}; the checkpoint of step {other} is whole: give --step {other}, or "
                    f"move {folder} away"
                )
        raise UserError(f"{damage}, and no older checkpoint of that run is whole")

    def _check_room(self, *state: Any) -> None:
        """Before a checkpoint is begun: TensorStore tells of a full disk in hundreds of lines."""
        if "://" in os.fspath(self.directory):
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise UserError(
                f"a checkpoint takes {needed / 2**30:.3g} GiB and {self.directory} has "
                f"{free / 2**30:.3g} GiB free; make room (or keep fewer: config.checkpoint.keep), "
                "and the same command goes on from the last whole checkpoint",
                status=TRY_AGAIN,
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Of many kinds, by what Orbax and TensorStore were doing.
            raise UserError(
                f"a checkpoint cannot be written to {self.directory} ({_reason(error)}); mend "
                "that, and the same command goes on from the last whole checkpoint",
                status=TRY_AGAIN,
            ) from error

    def close(self) -> None:
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        path = self.directory / str(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many kinds for a damaged folder.
            raise UserError(
                f"the checkpoint {path} cannot be restored: it is incomplete or of another model "
                f"({type(error).__name__}: {_reason(error)}); move it away to go on from the one "
                "before"
            ) from error


def open_checkpoints(workdir: epath.PathLike, step: int | None = None) -> Checkpoints:
    """Checkpoints of a folder that someone else may be training in.

    Raises:
      UserError: there is none, or none of `step`.
    """
    if not (epath.Path(workdir) / "checkpoints").exists():
        raise UserError(f"{workdir} has no checkpoint yet; train it first", status=TRY_AGAIN)
    checkpoints = Checkpoints(workdir, owned=False)
    step = checkpoints.latest_step if step is None else step
    if step is None or not (checkpoints.directory / str(step)).exists():
        raise UserError(
            f"{checkpoints.directory} has no checkpoint" + (f" of step {step}" if step else ""),
            status=TRY_AGAIN,
        )
    return checkpoints


def put_damaged_aside(workdir: epath.PathLike) -> None:
    """Moves a run's newest checkpoints to WORKDIR/damaged if files of them are, and says so.

    What is left is a run that goes on from its newest whole checkpoint. For one process of a job,
    before the others look.

    Raises:
      UserError: there are checkpoints, and none of them is whole; or one cannot be moved.
    """
    workdir = epath.Path(workdir)
    damaged: dict[epath.Path, str] = {}
    for step in sorted(_steps(workdir / "checkpoints"), reverse=True):
        folder = workdir / "checkpoints" / str(step)
        damage = digests.find_damage(folder)
        if not damage:
            digests.tell_if_unrecorded(folder)
            break
        damaged[folder] = damage
    else:
        if damaged:
            raise UserError(
                f"{next(iter(damaged.values()))}, and no older checkpoint of the run is whole; "
                "train anew in another --workdir"
            )
    for folder, damage in damaged.items():
        aside = workdir / "damaged" / folder.name
        try:
            aside.parent.mkdir(exist_ok=True)
            if aside.exists():
                aside.rmtree()
            folder.rename(aside)
        except OSError as error:
            raise UserError(
                f"{damage}, and {folder} cannot be moved to {aside} ({error.strerror or error}); "
                f"move it away to go on from step {step}"
            ) from error
        absl_logging.warning(
            "%s; that checkpoint is put aside in %s, and training goes on from step %d",
            *(damage, aside, step),
        )


def _steps(directory: epath.Path) -> list[int]:
    """Steps of the checkpoints that Orbax finished."""
    return ocp.utils.checkpoint_steps(directory) if directory.exists() else []


def _reason(error: BaseException) -> str:
    """What Orbax or TensorStore found wrong, without the latter's settings and whatever follows."""
    while error.__cause__:
        error = error.__cause__
    text = re.split(r"\[tensorstore_spec|See full TensorStore details|<bound method", str(error))[0]
    return " ".join(text.split())[:300]


@functools.cache
def hush_failed_writes() -> None:
    """Keeps what Orbax logs, and its and TensorStore's threads say of a failure, off the screen.

    That is hundreds of lines for one full disk, among which the sentence of `Checkpoints` is lost.
    """
    hook = sys.unraisablehook

    def leave_out_orbax(unraisable: sys.UnraisableHookArgs) -> None:
        # Callbacks from TensorStore's threads to a loop that has ended, and reads given up.
        frames = traceback.extract_tb(unraisable.exc_traceback)
        ended = str(unraisable.exc_value) == "Event loop is closed"
        if not ended and not any("orbax" in frame.filename for frame in frames):
            hook(unraisable)

    sys.unraisablehook = leave_out_orbax
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _held_out_psnr(metrics: dict[str, float]) -> float:
    """How good a checkpoint is; of those that nobody evaluated the newest counts as the best."""
    psnr = metrics.get("eval_psnr", -math.inf)
    return psnr if math.isfinite(psnr) else -math.inf


def _pure(tree: Any) -> list[Any]:
    """An optimiser state as a flat list: Orbax needs no knowledge of optax's classes."""
    return jax.tree.leaves(tree)


def _refill(abstract: nnx.State, values: dict[str, Any]) -> nnx.State:
    """An `nnx.State` like `abstract` with the arrays of a pure dict."""
    flat = dict(nnx.to_flat_state(abstract))
    pure = dict(_walk(values))
    return nnx.from_flat_state([(path, v.replace(pure[path])) for path, v in flat.items()])


def _walk(tree: Any, path: tuple = ()):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _walk(value, (*path, int(key) if str(key).isdigit() else key))
    else:
        yield path, tree

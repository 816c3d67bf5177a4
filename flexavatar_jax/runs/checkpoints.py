"""A run's folder: its config, its head template and its Orbax checkpoints.

    WORKDIR/config.json              the experiment, checked before a run goes on
    WORKDIR/template.obj             the head template the Gaussians are bound to
    WORKDIR/checkpoints/STEP/        params, optimizer, data (Grain's iterator), progress

Imported weights use the same layout with `params` alone: evaluation and avatars restore either, and
training starts from either (`config.init_from`). Orbax writes a checkpoint under a temporary name
and renames it when it is whole.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import ml_collections
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from flexavatar_jax.frozen import dinov2
from flexavatar_jax.frozen.networks import load_encoder_network
from flexavatar_jax.model.head_template import HeadTemplate, load_template
from flexavatar_jax.model.flexavatar import FlexAvatar

CHANGEABLE = (
    *("accumulate", "bad_step", "checkpoint", "data.bad_records", "data.max_bad_fraction"),
    *("data.root", "data.workers", "eval", "frozen", "log", "max_bad_steps", "mesh"),
    *("model.remat", "rasterizer", "splat_capacity", "steps"),
)
"""Config fields that may differ when a run goes on: they don't change what a step computes."""


class LoadedModel(NamedTuple):
    """A model restored for evaluation or avatars."""

    model: FlexAvatar
    config: ml_collections.ConfigDict
    step: int
    progress: dict[str, Any]
    dinov2: dinov2.Params | None
    """Weights of the frozen network that the encoder needs, if `config.model.dino`."""


def write_atomically(path: epath.PathLike, text: str) -> None:
    """Writes a text file under a temporary name, then renames it: whole or not there at all."""
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


def open_workdir(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> HeadTemplate:
    """The head template of a run: the stored one if the folder already holds this experiment.

    Writes nothing, so that a config which turns out wrong claims no folder.

    Raises:
      ValueError: the folder holds an import, or a run of another config (names the first field that
        differs); `config.init_from` holds another model.
      OSError: the template, or `config.init_from`, cannot be read.
    """
    workdir = epath.Path(workdir)
    if is_import(workdir):
        raise ValueError(
            f"--workdir {workdir} holds imported weights; to train from them, give another "
            f"--workdir, and --config.init_from={workdir}"
        )
    is_new = not (workdir / "config.json").exists()
    # All look before the first of them writes.
    _wait_for_all("workdir looked at")
    if is_new:
        if (workdir / "checkpoints").exists():
            raise ValueError(
                f"{workdir} holds checkpoints but no config.json; use another --workdir"
            )
        if config.init_from:
            return _template_of(config.init_from, config)
        return load_template(config.model.template)
    difference = first_difference(read_config(workdir), config)
    if difference:
        field, old, new = difference
        raise ValueError(
            f"--workdir {workdir} holds a run whose config.{field} is {old}, not {new}; "
            "choose another --workdir, or the config it was started with"
        )
    return load_template(os.fspath(workdir / "template.obj"))


def is_import(workdir: epath.PathLike) -> bool:
    """Whether a folder holds imported weights: to start from, not a run to go on with."""
    start = epath.Path(workdir) / "checkpoints" / "0"
    return start.exists() and not any((start / x).exists() for x in ("optimizer", "data"))


def _template_of(source: str, config: ml_collections.ConfigDict) -> HeadTemplate:
    """The head template of the weights that a run starts with, if they are of its model."""
    models = [ml_collections.ConfigDict({"model": c.model}) for c in (read_config(source), config)]
    # Parameters are float32, whatever is computed in.
    models[0].model.dtype = config.model.dtype
    if difference := first_difference(*models):
        field, old, new = difference
        raise ValueError(
            f"config.init_from = {source} holds a model whose config.{field} is {old}, not {new}; "
            "train the model that it holds"
        )
    return load_template(os.fspath(epath.Path(source) / "template.obj"))


def claim_workdir(
    workdir: epath.PathLike, config: ml_collections.ConfigDict, template: HeadTemplate
) -> None:
    """Creates a run's folder with its config and template, or takes down what of it has changed.

    Raises:
      OSError: the folder cannot be written.
    """
    workdir = epath.Path(workdir)
    text = config.to_json_best_effort(indent=2, sort_keys=True)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            if not (workdir / "template.obj").exists():
                write_atomically(workdir / "template.obj", template.to_obj())
            stored = workdir / "config.json"
            if not stored.exists() or stored.read_text() != text:
                write_atomically(stored, text)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot write to --workdir {workdir}: {reason}") from None
    _wait_for_all("workdir claimed")


def first_difference(
    old: ml_collections.ConfigDict, new: ml_collections.ConfigDict
) -> tuple[str, Any, Any] | None:
    """The first field in which two configs differ, those of CHANGEABLE left out, and its values."""
    a = json.loads(old.to_json_best_effort())
    b = json.loads(new.to_json_best_effort())

    def walk(x: Any, y: Any, path: str) -> tuple[str, Any, Any] | None:
        if path in CHANGEABLE:
            return None
        if isinstance(x, dict) and isinstance(y, dict):
            for key in sorted({*x, *y}):
                found = walk(
                    x.get(key, "absent"), y.get(key, "absent"), f"{path}.{key}" if path else key
                )
                if found:
                    return found
            return None
        return None if x == y else (path, x, y)

    return walk(a, b, "")


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """The config a run was started with."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} is not a run's folder (no config.json); give the folder of a training "
            "run or of an import"
        )
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it from a copy") from None
    if not isinstance(fields, dict) or not {"model", "data", "frozen"} <= fields.keys():
        raise ValueError(f"{path} is not a run's config (no model, data, frozen); restore it")
    return ml_collections.ConfigDict(fields)


class Checkpoints:
    """Saves and restores a run: parameters, optimiser, data iterator, progress.

    Saving is asynchronous and sharded: each process writes its own shards while training goes on.

    Args:
      workdir: the run's folder.
      keep: how many checkpoints stay; older ones are removed as new ones are saved.
      owned: whether what an earlier process left half-saved is removed. Readers don't own a run's
        folder: its trainer may be saving right now.
    """

    def __init__(self, workdir: epath.PathLike, *, keep: int = 3, owned: bool = True):
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        # Not Orbax's read_only, which warns the user of each of its own defaults.
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=owned, create=owned
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

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
    ) -> None:
        """Starts saving the state after `step` steps.

        Raises:
          OSError: this checkpoint, or the one before, cannot be written.
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
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore_params(self, step: int, abstract: nnx.State) -> nnx.State:
        """Parameters of `step`, laid out as `abstract` (shapes and shardings) asks.

        Raises:
          ValueError: the checkpoint is incomplete or of another model.
        """
        like = nnx.to_pure_dict(abstract)
        restored = self._restore(step, params=ocp.args.StandardRestore(like))
        return _refill(abstract, restored["params"])

    def restore_run(
        self, step: int, abstract_params: nnx.State, abstract_opt_state: Any, data: Any
    ) -> tuple[nnx.State, Any, dict[str, Any]]:
        """Parameters, optimiser state and progress; `data`'s iterator is set to where it was.

        Raises:
          ValueError: the checkpoint is incomplete or of another model.
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

    def reached_preemption(self, step: int) -> bool:
        """Whether the scheduler announced (on any host) that it is about to stop this job."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Blocks until a save under way is on disk.

        Raises:
          OSError: it cannot be written.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def _check_room(self, *state: Any) -> None:
        """Before a checkpoint is begun: TensorStore tells of a full disk in hundreds of lines."""
        if "://" in os.fspath(self.directory):
            return
        needed = sum(x.nbytes for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise OSError(
                f"a checkpoint takes {needed / 2**30:.3g} GiB and {self.directory} has "
                f"{free / 2**30:.3g} GiB free; make room (or keep fewer: config.checkpoint.keep), "
                "and the same command goes on from the last whole checkpoint"
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Of many kinds, by what Orbax and TensorStore were doing.
            reason = " ".join(str(error).split())[:300]
            raise OSError(
                f"a checkpoint cannot be written to {self.directory} ({reason}); mend that, and "
                "the same command goes on from the last whole checkpoint"
            ) from error

    def close(self) -> None:
        self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        path = self.directory / str(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # Orbax raises many kinds for a damaged folder.
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"the checkpoint {path} cannot be restored: it is incomplete or of another model "
                f"({type(error).__name__}: {reason}); move it away to go on from the one before"
            ) from error


def read_params(workdir: epath.PathLike, abstract: nnx.State) -> nnx.State:
    """The newest parameters in a run's or an import's folder, laid out as `abstract` asks.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: it is damaged or of another model.
    """
    with contextlib.closing(open_checkpoints(workdir)) as checkpoints:
        return checkpoints.restore_params(checkpoints.latest_step, abstract)


def hush_failed_writes() -> None:
    """Keeps what Orbax's and TensorStore's threads say of a failed write off this process's stderr.

    That is hundreds of lines for one full disk, among which the sentence of `Checkpoints` is lost.
    """
    hook = sys.unraisablehook  # of callbacks from TensorStore's threads, to a loop that has ended

    def leave_out_ended_loops(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = leave_out_ended_loops
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
    )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def open_checkpoints(workdir: epath.PathLike, step: int | None = None) -> Checkpoints:
    """Checkpoints of a folder that someone else may be training in.

    Raises:
      FileNotFoundError: there is none, or none of `step`.
    """
    if not (epath.Path(workdir) / "checkpoints").exists():
        raise FileNotFoundError(f"{workdir} has no checkpoint yet; train it first")
    checkpoints = Checkpoints(workdir, owned=False)
    step = checkpoints.latest_step if step is None else step
    if step is None or not (checkpoints.directory / str(step)).exists():
        raise FileNotFoundError(
            f"{checkpoints.directory} has no checkpoint" + (f" of step {step}" if step else "")
        )
    return checkpoints


def load_model(
    workdir: epath.PathLike,
    step: int | None = None,
    dinov2_base: epath.PathLike = "",
    *,
    encoder_network: bool = True,
) -> LoadedModel:
    """Restores a model for inference from a run's folder.

    Args:
      workdir: of a training run or of an import.
      step: which checkpoint; by default the newest.
      dinov2_base: where DINOv2's weights are now, if not at the config's `frozen.dinov2_base`.
      encoder_network: whether to load them at all (not needed to look at parameters).

    Raises:
      FileNotFoundError: no run, no checkpoint, or no weights of a frozen network there.
      ValueError: a file that is damaged or of another model.
    """
    config = read_config(workdir)
    if dinov2_base:
        config.frozen.dinov2_base = os.fspath(dinov2_base)
    template = load_template(os.fspath(epath.Path(workdir) / "template.obj"))
    checkpoints = open_checkpoints(workdir, step)
    step = checkpoints.latest_step if step is None else step
    # Shapes alone: initialising what is about to be restored would take longer than all the rest.
    graph, shapes = nnx.split(
        nnx.eval_shape(lambda: FlexAvatar(config.model, template, rngs=nnx.Rngs(0)))
    )
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    model = nnx.merge(graph, checkpoints.restore_params(step, abstract))
    progress = checkpoints.progress(step)
    checkpoints.close()
    network = load_encoder_network(config) if encoder_network else None
    return LoadedModel(model, config, step, progress, network)


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


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)

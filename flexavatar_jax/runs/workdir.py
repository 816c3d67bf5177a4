"""A run's folder: who may open it, its config and its head template.

    WORKDIR/config.json              the experiment, checked before a run goes on
    WORKDIR/template.obj             the head template the Gaussians are bound to
    WORKDIR/digests.json             by which damage to those two is found, see `digests`
    WORKDIR/checkpoints/STEP/        see `checkpoints`

Imported weights use the same layout with parameters alone: evaluation and avatars restore either,
and training starts from either (`config.init_from`).
"""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import ml_collections
from etils import epath

from data_pipelines.errors import TRY_AGAIN, UserError
from flexavatar_jax.model.head_template import HeadTemplate
from flexavatar_jax.runs import digests, weights_file
from flexavatar_jax.runs.checkpoints import put_damaged_aside
from flexavatar_jax.runs.lock import Lock
from flexavatar_jax.runs.templates import format_obj, load_template
from flexavatar_jax.training.config_check import check_stored_config

CHANGEABLE = (
    *("accumulate", "bad_step", "checkpoint", "data.bad_records", "data.max_bad_fraction"),
    *("data.root", "data.workers", "eval", "frozen", "log", "max_bad_steps", "mesh"),
    *("model.remat", "rasterizer", "splat_capacity", "steps"),
)
"""Config fields that may differ when a run goes on: they don't change what a step computes."""


def open_workdir(workdir: epath.PathLike, config: ml_collections.ConfigDict) -> HeadTemplate:
    """The head template of a run: the stored one if the folder already holds this experiment.

    Writes nothing, so that a config which turns out wrong claims no folder.

    Raises:
      UserError: the folder holds an import, or a run of another config (names the first field that
        differs); `config.init_from` holds another model.
      UserError: the template, or `config.init_from`, cannot be read.
    """
    workdir = _existing_file_system(workdir)
    if is_import(workdir):
        raise UserError(
            f"--workdir {workdir} holds weights without a run; to train from them, give another "
            f"--workdir, and --config.init_from={workdir}"
        )
    _check(workdir)
    is_new = not (workdir / "config.json").exists()
    # All look before the first of them writes.
    _wait_for_all("workdir looked at")
    if is_new:
        if (workdir / "checkpoints").exists():
            raise UserError(
                f"{workdir} holds checkpoints but no config.json; use another --workdir"
            )
        if config.init_from:
            return _template_of(config.init_from, config)
        return load_template(config.model.template)
    difference = first_difference(read_config(workdir), config)
    if difference:
        field, old, new = difference
        raise UserError(
            f"--workdir {workdir} holds a run whose config.{field} is {old}, not {new}; "
            "choose another --workdir, or the config it was started with"
        )
    return read_template(workdir)


def is_import(workdir: epath.PathLike) -> bool:
    """Whether a folder holds weights to start from, imported or handed on, not a run to go on."""
    if weights_file.is_there(workdir):
        return True
    start = epath.Path(workdir) / "checkpoints" / "0"
    return start.exists() and not any((start / x).exists() for x in ("optimizer", "data"))


def _template_of(source: str, config: ml_collections.ConfigDict) -> HeadTemplate:
    """The head template of the weights that a run starts with, if they are of its model."""
    models = [ml_collections.ConfigDict({"model": c.model}) for c in (read_config(source), config)]
    # Parameters are float32, whatever is computed in.
    models[0].model.dtype = config.model.dtype
    if difference := first_difference(*models):
        field, old, new = difference
        raise UserError(
            f"config.init_from = {source} holds a model whose config.{field} is {old}, not {new}; "
            "train the model that it holds"
        )
    return read_template(source)


def claim_workdir(
    workdir: epath.PathLike, config: ml_collections.ConfigDict, template: HeadTemplate
) -> Lock:
    """Creates a run's folder with its config and template, or stores the fields that changed.

    The folder is this job's until the lock is released or gone. Newest checkpoints that are damaged
    are put aside, so that the run goes on from a whole one.

    Raises:
      UserError: the folder cannot be written, or another run is in it; or it holds checkpoints,
        none of which is whole.
    """
    workdir = epath.Path(workdir)
    text = config.to_json_best_effort(indent=2, sort_keys=True)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = Lock(workdir, wanted=jax.process_index() == 0)
        if jax.process_index() == 0:
            stored = {name: _text(workdir / name) for name in ("config.json", "template.obj")}
            kept = stored["template.obj"] or format_obj(template)
            texts = {"config.json": text, "template.obj": kept}
            if stored != texts or not digests.is_recorded(workdir):
                digests.write_files(workdir, texts)
            put_damaged_aside(workdir)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write to --workdir {workdir}: {reason}", status=TRY_AGAIN
        ) from None
    _wait_for_all("workdir claimed")
    return lock


def _text(path: epath.Path) -> str:
    return path.read_text() if path.exists() else ""


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


def read_template(workdir: epath.PathLike) -> HeadTemplate:
    """The head template of a run; raises `UserError` if it is missing or damaged."""
    workdir = epath.Path(workdir)
    digests.tell_if_unrecorded(workdir)
    _check(workdir)
    return load_template(os.fspath(workdir / "template.obj"))


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
    """The config a run was started with; raises `UserError` if there is none, or a damaged one."""
    path = _existing_file_system(workdir) / "config.json"
    _check(path.parent)
    if not path.exists():
        raise UserError(
            f"{workdir} is not a run's folder (no config.json); give the folder of a training "
            "run or of an import"
        )
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it from a copy") from None
    if not isinstance(fields, dict) or not {"model", "data", "frozen"} <= fields.keys():
        raise UserError(f"{path} is not a run's config (no model, data, frozen); restore it")
    config = ml_collections.ConfigDict(_renamed(fields))
    try:
        check_stored_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}; restore it from a copy") from None
    return config


def _check(workdir: epath.Path) -> None:
    """Raises `UserError` if a file of the folder itself is damaged."""
    if damage := digests.find_damage(workdir):
        raise UserError(
            f"{damage}; restore it from a copy, or, if it was changed on purpose, delete "
            f"{workdir / digests.FILE}"
        )


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """A stored config's fields as they are called now."""
    model = fields["model"]
    if isinstance(model, dict):
        for old, new in (
            ("head_tokens", "head_resolution"),
            ("sample_grid", "gaussian_resolution"),
        ):
            if old in model:
                model[new] = model.pop(old)
        for gone in ("expression_size", "num_sources"):
            model.pop(gone, None)
        if isinstance(model.get("remat"), bool):
            model["remat"] = float(model["remat"])  # all blocks or none, before it was a share
        model.setdefault("bias_sinks", True)  # before there was a choice, every run had them
    loss = fields.get("loss")
    if isinstance(loss, dict):
        loss.setdefault("perceptual_targets", 0)  # before there was a choice, all were judged
    return fields


def _existing_file_system(workdir: epath.PathLike) -> epath.Path:
    """`workdir` as a path; raises `UserError` if what reads its kind (gs://) isn't installed."""
    path = epath.Path(workdir)
    try:
        path.exists()
    except ImportError as error:
        raise UserError(f"--workdir {workdir}: {error}") from error
    return path


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)

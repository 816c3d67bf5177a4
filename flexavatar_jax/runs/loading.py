"""A model restored from a run's folder, or from weights handed on: for inference, or as a start."""

from __future__ import annotations

import contextlib
import os
from typing import Any, NamedTuple

import jax
import ml_collections
from etils import epath
from flax import nnx

from data_pipelines.errors import UserError
from flexavatar_jax.frozen import dinov2
from flexavatar_jax.frozen.networks import load_dinov2_base
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.runs import weights_file
from flexavatar_jax.runs.checkpoints import Checkpoints, open_checkpoints
from flexavatar_jax.runs.weights_file import WeightsFile
from flexavatar_jax.runs.workdir import read_config, read_template


class LoadedModel(NamedTuple):
    """A model restored for evaluation or avatars."""

    model: FlexAvatar
    config: ml_collections.ConfigDict
    step: int
    progress: dict[str, Any]
    dinov2_base: dinov2.Params | None
    """Weights of the frozen network that the encoder needs, if `config.model.dino`."""


def load_model(
    workdir: epath.PathLike,
    step: int | None = None,
    dinov2_base: epath.PathLike = "",
    *,
    load_dinov2: bool = True,
) -> LoadedModel:
    """Restores a model for inference from a run's folder.

    Args:
      workdir: of a training run or of an import, or with a `weights_file`.
      step: which checkpoint; by default the newest.
      dinov2_base: where DINOv2's weights are now, if not at the config's `frozen.dinov2_base`.
      load_dinov2: whether to load them at all (not needed to look at parameters).

    Raises:
      UserError: no run, no checkpoint, or no weights of a frozen network there.
      UserError: a file that is damaged or of another model.
    """
    config = read_config(workdir)
    if dinov2_base:
        config.frozen.dinov2_base = os.fspath(dinov2_base)
    template = read_template(workdir)
    checkpoints = _open(workdir, step)
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
    network = load_dinov2_base(config) if load_dinov2 else None
    return LoadedModel(model, config, step, progress, network)


def read_params(workdir: epath.PathLike, abstract: nnx.State) -> nnx.State:
    """The newest parameters in a run's or an import's folder, laid out as `abstract` asks.

    Raises:
      UserError: there is no checkpoint.
      UserError: it is damaged or of another model.
    """
    with contextlib.closing(_open(workdir)) as checkpoints:
        return checkpoints.restore_params(checkpoints.latest_step, abstract)


def _open(workdir: epath.PathLike, step: int | None = None) -> Checkpoints | WeightsFile:
    if not weights_file.is_there(workdir):
        return open_checkpoints(workdir, step)
    weights = WeightsFile(workdir)
    if step not in (None, weights.latest_step):
        raise UserError(
            f"{workdir} has the weights of step {weights.latest_step} alone, not of step {step}"
        )
    return weights

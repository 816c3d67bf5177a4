"""Weights trained here as a state dict of the published PyTorch model."""

from __future__ import annotations

import jax
import ml_collections
import numpy as np
from etils import epath
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.files import writing
from flexavatar_jax.published.importer import UNUSED_FILE
from flexavatar_jax.published.tensor_names import (
    RESAMPLE_FILTER,
    flatten,
    unused_shapes,
    used_tensors,
)
from flexavatar_jax.runs.loading import load_model


def export_checkpoint(
    workdir: epath.PathLike, out: epath.PathLike, step: int | None = None
) -> None:
    """Writes the parameters of a run (by default its newest checkpoint) as .safetensors.

    Raises:
      UserError: no run, or no checkpoint.
      UserError: the checkpoint or `UNUSED_FILE` is damaged, or `out` is no .safetensors file.
      UserError: `out` cannot be written.
    """
    out = epath.Path(out)
    loaded = load_model(workdir, step, load_dinov2=False)
    unused = _read_unused(epath.Path(workdir) / UNUSED_FILE)
    state_dict = publish(nnx.state(loaded.model, nnx.Param), loaded.config.model, unused)
    try:
        with writing(out) as unfinished:
            save_file(state_dict, unfinished)
    except SafetensorError as error:
        raise UserError(
            f"--out {out} cannot be written ({error}); choose another folder", status=TRY_AGAIN
        ) from error


def _read_unused(path: epath.Path) -> dict[str, np.ndarray]:
    """Tensors without effect that an import kept; none if it is a run of our own."""
    try:
        return load_file(path) if path.exists() else {}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); import the weights again") from None


def publish(
    params: nnx.State, config: ml_collections.ConfigDict, unused: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The published state dict of a model of `config` (an experiment's `model`).

    `unused` are values of tensors without effect; those it lacks are zeros.
    """
    values = flatten(jax.device_get(params))
    state_dict = {tensor.name: tensor.to_published(values) for tensor in used_tensors(config)}
    for name, shape in unused_shapes(config).items():
        fresh = RESAMPLE_FILTER if name.endswith("resample_filter") else np.zeros(shape, np.float32)
        state_dict[name] = unused.get(name, fresh)
    return state_dict

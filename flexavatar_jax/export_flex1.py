"""Exports weights trained here under the published names, so that they run in the authors' code.

    python -m flexavatar_jax.export_flex1 runs/mine --out mine.safetensors

The file is a state dict for FLEX-1's PyTorch model, complete with the tensors that have no effect:
an imported model's own ones, else zeros (and the constant filter).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import ml_collections
import numpy as np
from etils import epath
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.files import writing
from flexavatar_jax import cli
from flexavatar_jax.import_flex1 import UNUSED_FILE
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
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
    cli.check_out(Path(out), create=True)
    loaded = load_model(workdir, step, encoder_network=False)
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
    state_dict = {tensor.name: tensor.publish(values) for tensor in used_tensors(config)}
    for name, shape in unused_shapes(config).items():
        fresh = RESAMPLE_FILTER if name.endswith("resample_filter") else np.zeros(shape, np.float32)
        state_dict[name] = unused.get(name, fresh)
    return state_dict


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flexavatar_jax.export_flex1", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("workdir", help="folder of a training run or an import")
    parser.add_argument("--out", required=True, help=".safetensors file to write")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    args = parser.parse_args(argv)
    cli.guard(lambda: export_checkpoint(args.workdir, args.out, args.step))
    print(args.out)


if __name__ == "__main__":
    main()

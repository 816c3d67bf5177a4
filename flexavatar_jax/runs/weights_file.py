"""A model's parameters in one small file, to be handed on: FOLDER/weights.safetensors, float16.

With config.json and template.obj beside it the folder loads as a run's does (`runs.loading`), and
training can start from it (`config.init_from`). What the run was is in the file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from data_pipelines.errors import UserError

FILE = "weights.safetensors"

Notes = dict[str, Any]
"""JSON of a run's `step`, `seed`, `commit` and `seconds` of training."""


def pack_weights(params: nnx.State, notes: Notes) -> bytes:
    """A file's content: the parameters in float16.

    Raises:
      UserError: a number is too large for float16.
    """
    with np.errstate(over="ignore"):
        tensors = {name: np.asarray(value, np.float16) for name, value in _named(params)}
    if wrong := [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise UserError(f"{wrong[0]} has numbers that float16 does not hold; share the run itself")
    return save(tensors, metadata={"notes": json.dumps(notes)})


class WeightsFile:
    """Reads what `pack_weights` made, as `Checkpoints` reads a run's one checkpoint.

    Raises:
      UserError: the file is damaged, or of another program.
    """

    def __init__(self, folder: epath.PathLike) -> None:
        self._path = epath.Path(folder) / FILE
        try:
            with safe_open(self._path, "numpy") as file:
                self._notes: Notes = json.loads((file.metadata() or {})["notes"])
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.latest_step = int(self._notes["step"])
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{self._path} is damaged, or no file of this project's ({type(error).__name__}: "
                f"{error}); fetch it again"
            ) from None

    def progress(self, step: int) -> Notes:
        """What is known of the run that the weights are of."""
        return self._notes

    def restore_params(self, step: int, abstract: nnx.State) -> nnx.State:
        """The parameters, laid out as `abstract` (shapes, types and shardings) asks.

        Raises:
          UserError: they are another model's.
        """
        wanted = dict(_named(abstract))
        if wrong := sorted(wanted.keys() ^ self._tensors.keys()) or [
            name for name, like in wanted.items() if self._tensors[name].shape != like.shape
        ]:
            raise UserError(
                f"{self._path} is of another model than the config.json beside it: {wrong[0]} "
                "differs; fetch both again"
            )

        def restored(path: tuple, like: jax.ShapeDtypeStruct) -> jax.Array:
            tensor = self._tensors[_name(path)].astype(like.dtype)
            return jax.device_put(tensor, getattr(like, "sharding", None))

        return jax.tree_util.tree_map_with_path(restored, abstract)

    def close(self) -> None:
        self._tensors = {}


def _named(params: nnx.State) -> Iterator[tuple[str, Any]]:
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        yield _name(path), value


def _name(path: tuple) -> str:
    """`decoder.sinks` of a parameter's path; its class's own attribute at the end is left out."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return ".".join(names[:-1] if names[-1] == "value" else names)

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
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_pipelines.errors import UserError

FILE = "weights.safetensors"

UNREADABLE = (
    SafetensorError,
    AttributeError,  # a type that NumPy has not
    KeyError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a damaged or hostile file raises."""

Notes = dict[str, Any]
"""JSON of a run's `step`, `seed`, `commit` and `seconds` of training."""


def is_there(folder: epath.PathLike) -> bool:
    """Whether a folder is one of weights handed on; a run stays a run, whatever lies in it."""
    folder = epath.Path(folder)
    return (folder / FILE).exists() and not (folder / "checkpoints").exists()


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
            content = self._path.read_bytes()
            self._notes = _notes(content)
            self._tensors = load(content)
        except OSError as error:
            raise UserError(f"{self._path} cannot be read: {error.strerror or error}") from None
        except UNREADABLE as error:
            raise UserError(
                f"{self._path} is damaged, or no file of this project's ({type(error).__name__}: "
                f"{error}); fetch it again"
            ) from None
        for name, tensor in self._tensors.items():
            if tensor.dtype != np.float16 or not np.isfinite(tensor).all():
                raise UserError(
                    f"{self._path}: {name} has no finite float16 numbers; fetch it again"
                )
        self.latest_step: int = self._notes["step"]

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
        """Lets the numbers go."""
        self._tensors = {}


def _notes(content: bytes) -> Notes:
    """A file's notes, from the JSON at its start; raises `ValueError` if they are none."""
    length = int.from_bytes(content[:8], "little")
    notes = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["notes"])
    step, seconds = notes["step"], notes.get("seconds", 0.0)
    if type(step) is not int or step < 0 or type(seconds) not in (int, float):
        raise ValueError("its notes have no step, or no seconds")
    return notes


def _named(params: nnx.State) -> Iterator[tuple[str, Any]]:
    for path, value in jax.tree_util.tree_leaves_with_path(params):
        yield _name(path), value


def _name(path: tuple) -> str:
    """`decoder.sinks` of a parameter's path; its class's own attribute at the end is left out."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    return ".".join(names[:-1] if names[-1] == "value" else names)

"""Reads a frozen network's weights from a safetensors file as Hugging Face publishes it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from data_pipelines.errors import TRY_AGAIN, UserError


class Source(NamedTuple):
    """Where weights come from, in the words of the message that a user without them gets."""

    repository: str
    """On Hugging Face; the file is its `model.safetensors`."""
    field: str
    """The config field that holds the local path."""
    off: str
    """What to set in the config to do without the network."""


OLDER_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""Published files keep the names of the transformers version that wrote them."""


def read_weights(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]], source: Source
) -> dict[str, np.ndarray]:
    """The tensors named in `shapes`, float32, from `path` (a file, or a folder with one).

    Names may carry a prefix in the file (`vision_encoder.` of a whole SAM); what else is in it is
    left alone.

    Raises:
        UserError: no file at `path`; says what to fetch, or how to do without.
        UserError: not the network's weights, or cut short; names the tensor.
    """
    get = f"download model.safetensors of {source.repository} from Hugging Face"
    without = f"set {source.off} to do without it"
    if not os.fspath(path):
        raise UserError(f"{source.field} is empty: {get} and give its path, or {without}")
    file = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(
            f"{source.field}: no file {file}: {get} to there, or {without}", status=TRY_AGAIN
        )
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = {_canonical(name, shapes): name for name in tensors.keys()}  # noqa: SIM118
            for name, shape in shapes.items():
                if name not in names:
                    raise UserError(f"{file}: tensor {name} is missing: {get} again")
                found = tuple(tensors.get_slice(names[name]).get_shape())
                if found != tuple(shape):
                    raise UserError(
                        f"{file}: tensor {names[name]} has shape {list(found)} where "
                        f"{source.repository} has {list(shape)}: {get}"
                    )
            return {n: np.asarray(tensors.get_tensor(names[n]), np.float32) for n in shapes}
    except SafetensorError as error:
        where = _first_cut_tensor(file)
        what = f"tensor {where} is cut short" if where else "not a safetensors file"
        raise UserError(f"{file}: {what} ({error}): {get} again") from error


def _canonical(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """`name` as `shapes` spells it: today's words, without the prefix of a whole that holds it."""
    for older, newer in OLDER_NAMES.items():
        name = name.replace(older, newer)
    parts = name.split(".")
    suffixes = (".".join(parts[i:]) for i in range(len(parts)))
    return next((suffix for suffix in suffixes if suffix in shapes), name)


def _first_cut_tensor(file: Path) -> str | None:
    """The first tensor in `file` whose bytes end beyond the file's; None where none can be read."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        held = file.stat().st_size - 8 - length
        if held < 0:
            return None
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            cut = [entry["data_offsets"] + [name] for name, entry in header.items()]
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
    return min((entry for entry in cut if entry[1] > held), default=[None])[-1]

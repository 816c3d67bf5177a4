"""Reading published checkpoints: torch.save files, .safetensors or .npz, without running anything.

Tensors are found wherever in the file they are nested, and every one of them is accounted for.
"""

from __future__ import annotations

import collections
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.torch_files import load_torch_file

FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16)
"""Types of weights that float32 holds without loss."""


def read_tensors(path: epath.PathLike) -> dict[str, np.ndarray]:
    """All arrays in a .safetensors, a .npz or a torch.save file; nested names joined by dots.

    Raises:
      UserError: no such file.
      UserError: a file that is damaged, or that holds more than tensors and containers.
    """
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint {path}", status=TRY_AGAIN)
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged or not a safetensors file ({error}); fetch it again"
            ) from None
    if file.suffix == ".npz":
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} is damaged or not an .npz of plain arrays ({error}); fetch it again"
            ) from None
    return dict(_leaves(load_torch_file(file)))


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, np.ndarray):
        yield name, tree


def select_tensors(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], source: epath.PathLike
) -> dict[str, np.ndarray]:
    """The tensors named in `shapes`, float32, wherever in a checkpoint they are nested.

    The state dict may lie under a key or its names may have a common prefix; what lies beside it
    (an optimiser's state) is left alone, what lies in it must be the model's.

    Raises:
      UserError: tensors missing, too many, or of another shape or kind; all of them by name.
    """
    # torch.compile puts this into the names of what it wraps.
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in tensors.items()}
    prefixes = collections.Counter(
        name[: len(name) - len(suffix)]
        for name in tensors
        for suffix in _suffixes(name)
        if suffix in shapes
    ).most_common(2)
    if not prefixes:
        raise UserError(
            f"{source} holds no tensor of FLEX-1 (such as {next(iter(shapes))}); is it its "
            "checkpoint?"
        )
    if len(prefixes) == 2 and prefixes[0][1] == prefixes[1][1]:
        raise UserError(
            f"{source} holds the model twice, under {prefixes[0][0]!r} and {prefixes[1][0]!r}; "
            "save one of them alone"
        )
    prefix = prefixes[0][0]
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    problems = {
        "missing": [name for name in shapes if name not in found],
        "not the model's": [name for name in found if name not in shapes],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(shape)}"
            for name, shape in shapes.items()
            if name in found and found[name].shape != tuple(shape)
        ],
        "no 32-bit or 16-bit floats": [
            f"{name} {found[name].dtype}"
            for name in shapes
            if name in found and found[name].dtype not in FLOATS
        ],
    }
    problems = {kind: names for kind, names in problems.items() if names}
    if problems:
        listed = "; ".join(
            f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items()
        )
        raise UserError(f"{source} does not fit the model of --model-config: {listed}")
    return {name: np.asarray(found[name], np.float32) for name in shapes}


def _suffixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[i:]) for i in range(len(parts)))

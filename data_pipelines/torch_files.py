"""Reads files that `torch.save` wrote, without PyTorch and without running what is in them.

Used for Pixel3DMM's `.frame` files (plain NumPy arrays) and for published checkpoints (tensors).
"""

from __future__ import annotations

import struct
import zipfile
from typing import Any

from etils import epath

from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.torch_pickle import MAX_NODES, Interpreter
from data_pipelines.torch_storages import RefusedError, Storages

MAX_DEPTH = 100
"""Of the containers of a file, which readers will walk through."""

_DAMAGE = (
    *(zipfile.BadZipFile, EOFError, NotImplementedError, OSError, struct.error),
    *(ArithmeticError, LookupError, TypeError, ValueError),
)
"""How damaged files show: what `zipfile` raises, and opcodes whose operands make no sense."""


def load_torch_file(path: epath.PathLike) -> Any:
    """Returns what `torch.save` put into `path`: nested dicts, lists, tuples, numbers, arrays.

    Tensors and Parameters become read-only NumPy arrays of their shape and dtype (bfloat16 and
    float8 through ml_dtypes) that keep their strides; tensors that shared a storage still share
    it. OrderedDicts become dicts. Nothing in the file is executed.

    Raises:
      UserError: there is no such file (`MissingFileError`); it is not a whole torch.save zip; a
        storage is missing or of another size than its tensors say; the pickle asks for anything
        but tensors, arrays and containers, or for more of them than the file can mean.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file.")
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                content = Interpreter(Storages(archive, path.stat().length)).run()
                _check_extent(content)
                return content
        except RefusedError as error:
            raise UserError(f"{path}: {error}") from None
        except _DAMAGE as error:
            raise UserError(
                f"{path}: not a whole file as torch.save writes them since PyTorch 1.6 "
                f"({' '.join(str(error).split()) or type(error).__name__}); copy or download it "
                "again."
            ) from None


def _check_extent(content: Any) -> None:
    """Raises `RefusedError` for containers that hold themselves, or one another over and over."""
    open_, nodes = [(content, 0)], 0
    while open_:
        value, depth = open_.pop()
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise RefusedError(
                f"its containers come to over {MAX_NODES} values or {MAX_DEPTH} levels, more than "
                "any checkpoint has."
            )
        if isinstance(value, dict):
            open_ += ((item, depth + 1) for item in value.values())
        elif isinstance(value, list | tuple):
            open_ += ((item, depth + 1) for item in value)

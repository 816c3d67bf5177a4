"""Tensor storages of files that `torch.save` wrote, and the arrays that lie in them.

Such a file is a zip: a pickle, `NAME/data.pkl`, and the raw bytes of each storage, `NAME/data/KEY`.
"""

from __future__ import annotations

import math
import re
import types
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "bool": np.bool_,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}
"""PyTorch's dtypes by their names in `torch`."""

SPARE_BYTES = 1 << 26
"""How much more than the file's own size all its arrays together may come to."""


class RefusedError(Exception):
    """A sentence about what in the file cannot be read."""


class Storages:
    """The zip's members: the pickle, and tensor storages read at most once each."""

    def __init__(self, archive: zipfile.ZipFile, file_bytes: int):
        self._archive = archive
        self._room = file_bytes + SPARE_BYTES
        # torch.save never compresses, so what is stored takes its place in the file.
        if (declared := sum(info.file_size for info in archive.infolist())) > file_bytes:
            raise RefusedError(
                f"its parts declare {declared} bytes where the file has {file_bytes}; it is "
                "damaged or not what it says."
            )
        pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise RefusedError(
                "a zip, but without the one data.pkl that torch.save writes; is it a checkpoint?"
            )
        self._root = pickles[0].removesuffix("data.pkl")
        order = self._root + "byteorder"
        big = order in archive.namelist() and self._read(order) == b"big"
        self._byteorder = ">" if big else "<"
        self._read_before: dict[str, np.ndarray] = {}

    def take(self, size: int) -> None:
        """Counts the bytes of another array; a file may name the same ones again and again."""
        self._room -= size
        if self._room < 0:
            raise RefusedError("its arrays come to far more than the file; it is not what it says.")

    def pickle(self) -> bytes:
        return self._read(self._root + "data.pkl")

    def read(self, key: str, dtype: str, size: int) -> np.ndarray:
        """The storage `key` as a flat read-only array of `size` elements of a torch dtype."""
        kind = np.dtype(DTYPES[dtype])
        if key not in self._read_before:
            raw = self._read(f"{self._root}data/{key}")
            self._read_before[key] = np.frombuffer(raw, np.uint8)
        raw = self._read_before[key]
        if size * kind.itemsize != raw.size:
            raise RefusedError(
                f"storage {key} holds {raw.size} bytes where its tensors say {size} elements of "
                f"{dtype}; the file is damaged or not what it says."
            )
        return self.as_dtype(raw, dtype)

    def as_dtype(self, raw: np.ndarray, dtype: str) -> np.ndarray:
        kind = np.dtype(DTYPES[dtype])
        if raw.size % kind.itemsize:
            raise RefusedError(f"a storage of {raw.size} bytes cannot hold elements of {dtype}.")
        if self._byteorder == ">" and kind.itemsize > 1:
            self.take(raw.size)
            part = kind.itemsize // (2 if kind.kind == "c" else 1)
            raw = np.ascontiguousarray(raw.reshape(-1, part)[:, ::-1]).reshape(-1)
            raw.flags.writeable = False
        return raw.view(kind)

    def _read(self, name: str) -> bytes:
        try:
            info = self._archive.getinfo(name)
        except KeyError:
            raise RefusedError(f"the zip has no member {name}; the file is damaged.") from None
        # torch.save never compresses; so a small file cannot unfold into a huge one.
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise RefusedError(
                f"member {name} is compressed or encrypted, which torch.save never does."
            )
        return self._archive.read(info)


def shaped_array(shape: Any, kind: np.dtype, fortran: bool, raw: bytes) -> np.ndarray:
    """The array of `raw`'s bytes, whose number must be what `shape` and `kind` need."""
    shape = tuple(map(as_count, expect(shape, tuple)))
    if math.prod(shape) * kind.itemsize != len(raw):
        raise RefusedError(
            f"an array of shape {shape} and type {kind} with {len(raw)} bytes of data; "
            "the file is damaged."
        )
    return np.frombuffer(raw, kind).reshape(shape, order="F" if fortran else "C")


def strided_tensor(storage: np.ndarray, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """A view of a flat storage; every element it can reach lies inside the storage.

    The layout is as a stranger's file has it: of any type, until it has been looked at.
    """
    shape, strides = (tuple(map(as_count, expect(t, tuple))) for t in (shape, strides))
    reach = as_count(offset) + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    if math.prod(shape) and reach > storage.size:
        raise RefusedError(
            f"a tensor of shape {shape} and strides {strides} at {offset} reaches past its "
            f"storage of {storage.size} elements; the file is damaged."
        )
    if math.prod(shape) == 0:
        return np.empty(shape, storage.dtype)
    kind = storage.dtype
    return np.ndarray(
        shape,
        kind,
        buffer=storage.view(np.uint8),
        offset=offset * kind.itemsize,
        strides=[s * kind.itemsize for s in strides],
    )


def expect(value: Any, kind: type | types.UnionType) -> Any:
    """`value` if it is a `kind`; raises `RefusedError` else, for opcodes take what comes."""
    if not isinstance(value, kind):
        raise RefusedError(
            f"its pickle has a {type(value).__name__} where a {getattr(kind, '__name__', kind)} "
            "should be."
        )
    return value


def as_count(value: Any) -> int:
    """`value` if it is a size; raises `RefusedError` else."""
    if type(value) is not int or not 0 <= value < 2**62:
        raise RefusedError(f"its pickle has {short(value)} where a size should be.")
    return value


def short(value: Any) -> str:
    """A value for a sentence; printing containers can be made to take for ever."""
    return f"{value!s:.80}" if isinstance(value, str | int) else f"a {type(value).__name__}"

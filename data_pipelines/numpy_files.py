"""NumPy's files, from anyone: nothing in them is executed, nor more memory taken than they fill."""

from __future__ import annotations

import io
import math
import threading
import zipfile
import zlib

import numpy as np

from data_pipelines.errors import UserError

MAX_EXPANSION = 100
"""How many times its compressed size a part of an archive may unfold to."""

_HEADERS = threading.Lock()
"""NumPy reads a header as Python's syntax, and Python 3.11's `ast` counts its depth once for all
threads: now and then two at once end in a SystemError (CPython's issue 106905)."""


def to_npz(arrays: dict[str, np.ndarray]) -> bytes:
    """Named arrays as the bytes of a NumPy archive; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def from_npz(content: bytes, name: object = "a NumPy archive") -> dict[str, np.ndarray]:
    """The arrays of a NumPy archive (.npz).

    Args:
      content: of the file.
      name: of the file, for the error's sentence.

    Raises:
      UserError: it is damaged, unfolds to more than `MAX_EXPANSION` times its size, or holds
        anything but arrays of numbers and strings.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            declared = sum(info.file_size for info in archive.infolist())
            if declared > MAX_EXPANSION * len(content):
                raise UserError(
                    f"{name}: {len(content)} bytes that unfold to {declared}; that is no archive "
                    "of arrays."
                )
            for info in archive.infolist():
                member = archive.read(info)
                arrays[info.filename.removesuffix(".npy")] = decode_npy(
                    member, f"{name}/{info.filename}"
                )
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError) as error:
        raise UserError(f"{name}: not a whole NumPy archive ({error}).") from None
    except RuntimeError as error:  # an encrypted member
        raise UserError(f"{name}: not a NumPy archive ({error}).") from None
    return arrays


def decode_npy(content: bytes, name: object) -> np.ndarray:
    """The array of a NumPy file (.npy), from its content; `name` is for the error's sentence.

    Raises:
      UserError: it is damaged, declares more numbers than it holds, or holds objects.
    """
    file = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        with _HEADERS:
            shape, _, dtype = read(file)
    except KeyError:
        raise UserError(f"{name}: a NumPy file of unknown version {version}.") from None
    except (ValueError, OSError, EOFError, TypeError, SyntaxError, MemoryError) as error:
        raise UserError(f"{name}: not a NumPy file ({' '.join(str(error).split())}).") from None
    except RecursionError:
        raise UserError(f"{name}: not a NumPy file (its header is nested too deep).") from None
    if dtype.hasobject:
        raise UserError(f"{name}: holds Python objects, which are never loaded.")
    declared = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or declared != len(content) - file.tell():
        raise UserError(
            f"{name}: not a NumPy file (it declares {declared} bytes of {dtype} and holds "
            f"{len(content) - file.tell()})."
        )
    file.seek(0)
    with _HEADERS:
        return np.load(file, allow_pickle=False)

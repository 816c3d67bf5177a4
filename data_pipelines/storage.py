"""Files of a prepared data set, local or in the cloud: written in one step, read as local files.

Paths are `etils.epath` ones: gs:// and s3:// work where gcsfs or s3fs is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from etils import epath


def local_copy(path: epath.Path, version: str) -> str:
    """`path` itself if it is local, or else a copy of this `version`, made when first asked for.

    Copies are kept in `$FLEXAVATAR_CACHE` (by default in the temporary folder), which must have
    room for all that is read.
    """
    if not _is_remote(path):
        return os.fspath(path)
    cache = Path(os.environ.get("FLEXAVATAR_CACHE", Path(tempfile.gettempdir()) / "flexavatar"))
    key = hashlib.sha256(f"{os.fspath(path)} {version}".encode()).hexdigest()
    copy = cache / key[:16] / path.name
    if not copy.exists():
        with written(copy) as unfinished, path.open("rb") as f, open(unfinished, "wb") as g:
            shutil.copyfileobj(f, g, 1 << 24)
    return os.fspath(copy)


@contextlib.contextmanager
def written(path: epath.PathLike, scratch: epath.PathLike | None = None) -> Iterator[Path]:
    """A local path to write to; what is there in the end becomes `path` in one step.

    Until then it lies in the folder `scratch` of the same file system, by default beside `path`; if
    `path` is in the cloud, in a local temporary folder.
    """
    path = epath.Path(path)
    remote = _is_remote(path)
    if not remote:
        path.parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp() if remote else os.fspath(scratch or path.parent)
    unfinished = Path(folder) / f".{path.name}.{os.getpid()}"
    try:
        yield unfinished
        if remote:  # object stores show an upload only when it is complete
            with open(unfinished, "rb") as f, path.open("wb") as g:
                shutil.copyfileobj(f, g, 1 << 24)
        else:
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        if remote:
            os.rmdir(folder)


def write(path: epath.Path, content: bytes) -> None:
    """Writes a file in one step."""
    with written(path) as unfinished:
        unfinished.write_bytes(content)


def _is_remote(path: epath.Path) -> bool:
    return "://" in os.fspath(path)


def to_npz(arrays: dict[str, np.ndarray]) -> bytes:
    """Named arrays as the bytes of a NumPy archive; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def from_npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a NumPy archive; nothing in it is executed."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)

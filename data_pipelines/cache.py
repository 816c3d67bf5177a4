"""Local copies of files in the cloud, for readers that know local files only."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from etils import epath

from data_pipelines.files import is_remote, writing


def local_copy(path: epath.Path, version: str) -> str:
    """`path` itself if it is local, or else a copy of this `version`, made when first asked for.

    Copies are kept in `$FLEXAVATAR_CACHE` (by default in the temporary folder), which must have
    room for all that is read.
    """
    if not is_remote(path):
        return os.fspath(path)
    cache = Path(os.environ.get("FLEXAVATAR_CACHE", Path(tempfile.gettempdir()) / "flexavatar"))
    key = hashlib.sha256(f"{os.fspath(path)} {version}".encode()).hexdigest()
    copy = cache / key[:16] / path.name
    if not copy.exists():
        with writing(copy) as unfinished, path.open("rb") as f, open(unfinished, "wb") as g:
            shutil.copyfileobj(f, g, 1 << 24)
    return os.fspath(copy)

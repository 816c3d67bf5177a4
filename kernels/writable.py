"""Whether results can be written, found out before the work that makes them."""

from __future__ import annotations

import tempfile
from pathlib import Path


def make_writable(folder: Path) -> None:
    """Makes `folder` if need be; raises `OSError` if nothing can be written to it.

    Permissions do not say it all: root has every one, and file systems may be read-only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass

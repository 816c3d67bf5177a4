"""Damages a run's files at random, as disks and copying do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

KINDS = ("bit", "cut", "emptied", "removed", "overwritten", "swapped")


@contextlib.contextmanager
def damaged(folder: Path, seed: int) -> Iterator[Path]:
    """Damages one file below `folder`, which is yielded, and mends it in the end."""
    rng = np.random.default_rng(seed)
    files = sorted(p for p in folder.rglob("[!.]*") if p.is_file())
    whole = {path: path.read_bytes() for path in files}
    path = files[rng.integers(len(files))]
    content = whole[path]
    kind = KINDS[rng.integers(len(KINDS))] if content else "overwritten"
    place = int(rng.integers(len(content) or 1))
    others = [other for other in files if whole[other] != content]
    if kind == "bit":
        flipped = bytes([content[place] ^ 1 << int(rng.integers(8))])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
    elif kind == "cut":
        path.write_bytes(content[:place])
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "removed":
        path.unlink()
    elif kind == "overwritten":
        path.write_bytes(content[:place] + rng.bytes(16) + content[place + 16 :])
    else:
        path.write_bytes(whole[others[rng.integers(len(others))]])
    try:
        yield path
    finally:
        path.write_bytes(content)

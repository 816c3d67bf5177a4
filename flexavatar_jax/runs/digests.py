"""Digests of a run's files, by which damage is found before anything is loaded, and named.

    FOLDER/digests.json    {"crc32": of the rest, "files": {NAME: [[bytes, crc32], ...]}}

One lies beside a run's config and template, one in each of its checkpoints; folders without are of
earlier versions. Orbax lets none of its storage's checksums be asked for (zarr2 has none, and the
zarr3 it writes has one of each shard's index only), and they would not tell a file that is gone or
another checkpoint's: so files are read back, from memory as a rule, as they have just been written.

A file with several digests may have any of them: it was about to be replaced.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import zlib
from collections.abc import Iterator, Mapping

from absl import logging
from etils import epath

from data_pipelines.files import write

FILE = "digests.json"

_READERS = 8  # at a time; waiting for disks and buckets
_BLOCK = 1 << 22

Digest = list[int]
"""[bytes, CRC-32]: enough against what disks, networks and copying do to a file."""


def record(folder: epath.Path, *, leave_out: tuple[str, ...] = (), below: bool = True) -> None:
    """Adds to `folder`'s digests the files that have none yet, those `below` it in folders too.

    `leave_out` names files of the folder itself that will change.

    Raises:
      OSError, UserError: a file cannot be read, or the digests not be written.
    """
    files = (_read(folder) or {}) if (folder / FILE).exists() else {}
    names = [n for n in _names(folder, below) if n not in files and n not in leave_out]
    if names:
        _write(folder, files | {name: [digest] for name, digest in _digests(folder, names)})


def write_files(folder: epath.Path, contents: Mapping[str, str | bytes]) -> None:
    """Writes files into `folder` with their digests, each in one step; raises `UserError`.

    What is there and recorded already is left as it is. A process that is killed meanwhile leaves
    for each file the old content or the new one, and the digest of it.
    """
    new = {
        name: [_of(content.encode() if isinstance(content, str) else content)]
        for name, content in contents.items()
    }
    old = {}
    if (folder / FILE).exists():
        old = _read(folder) or {}
    else:
        there = [name for name in new if (folder / name).exists()]
        old = {name: [digest] for name, digest in _digests(folder, there)}
    changed = [n for n in new if old.get(n) != new[n] or not (folder / n).exists()]
    _write(folder, old | {name: old.get(name, []) + new[name] for name in changed})
    for name in changed:
        write(folder / name, contents[name])
    _write(folder, old | new)


def find_damage(folder: epath.Path, *, leave_out: tuple[str, ...] = ()) -> str | None:
    """What is wrong with the first damaged file of `folder`, naming it; None if all are whole.

    Args:
      folder: without digests, nothing is known of it, and nothing found.
      leave_out: files, or folders of files, in `folder` that are not looked at.
    """
    try:
        if not (folder / FILE).exists():
            return None
        files = _read(folder)
    except OSError as error:
        return f"{folder / FILE} is damaged (it cannot be read: {error.strerror or error})"
    if files is None:
        return f"{folder / FILE} is damaged (it is not what was written)"
    looked_at = [name for name in files if name.split("/")[0] not in leave_out]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        checks = pool.map(lambda name: _compare(folder / name, files[name]), looked_at)
        return next(filter(None, checks), None)


def is_recorded(folder: epath.Path) -> bool:
    """Whether `folder` has digests."""
    return (folder / FILE).exists()


def tell_if_unrecorded(folder: epath.Path) -> None:
    """Logs a warning if damage to `folder` would not be found."""
    if not is_recorded(folder):
        logging.warning(
            "%s has no %s to compare it with (an earlier version wrote it): it is taken as it is",
            *(folder, FILE),
        )


def _compare(path: epath.Path, expected: list[Digest]) -> str | None:
    sizes = [size for size, _ in expected]
    try:
        if not path.exists():
            return f"{path} is damaged (it is missing)"
        size = path.stat().length
        if size not in sizes:
            return f"{path} is damaged (it has {size} bytes, not {sizes[-1]})"
        if _digest(path) not in expected:
            return f"{path} is damaged (it is not what was written)"
    except OSError as error:
        return f"{path} is damaged (it cannot be read: {error.strerror or error})"
    return None


def _names(folder: epath.Path, below: bool, prefix: str = "") -> Iterator[str]:
    """Files of a folder, relative to it, hidden ones and the digests' own left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == FILE:
            continue
        if not path.is_dir():
            yield prefix + path.name
        elif below:
            yield from _names(path, below, f"{prefix}{path.name}/")


def _digests(folder: epath.Path, names: list[str]) -> list[tuple[str, Digest]]:
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        return list(zip(names, pool.map(lambda name: _digest(folder / name), names), strict=True))


def _digest(path: epath.Path) -> Digest:
    size = value = 0
    with path.open("rb") as file:
        for block in iter(functools.partial(file.read, _BLOCK), b""):
            size += len(block)
            value = zlib.crc32(block, value)
    return [size, value]


def _of(content: bytes) -> Digest:
    return [len(content), zlib.crc32(content)]


def _read(folder: epath.Path) -> dict[str, list[Digest]] | None:
    """The digests of a folder that has them; None if they are damaged themselves."""
    content = (folder / FILE).read_bytes()
    try:
        files = json.loads(content)["files"]
        return files if _format(files) == content else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(folder: epath.Path, files: dict[str, list[Digest]]) -> None:
    write(folder / FILE, _format(files))


def _format(files: dict[str, list[Digest]]) -> bytes:
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(files[name])}" for name in sorted(files))
    rest = f'"files": {{\n{lines}\n}}}}\n'
    return f'{{"crc32": {zlib.crc32(rest.encode())},\n{rest}'.encode()

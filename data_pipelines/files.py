"""Files that are whole or not there: written under another name and renamed; local or in the cloud.

Paths are `etils.epath` ones: gs:// and s3:// work where gcsfs or s3fs is installed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from data_pipelines import buckets
from data_pipelines.errors import TRY_AGAIN, UserError


@contextlib.contextmanager
def writing(path: epath.PathLike, scratch: epath.PathLike | None = None) -> Iterator[Path]:
    """A local path to write to; what is there in the end becomes the file `path` in one step.

    If the block fails, nothing is left and an older `path` stays as it was. Folders of `path` that
    are missing are made.

    Args:
      path: the file, local or in the cloud.
      scratch: a folder of the same file system for the unfinished file, by default beside `path`.
        What is bound for the cloud is first a local temporary file. Its ending is that of `path`.

    Raises:
      UserError: `path` cannot be written: its disk is full, say.
    """
    path = epath.Path(path)
    remote = is_remote(path)
    unfinished = folder = None
    try:
        if not remote:
            path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp() if remote else os.fspath(scratch or path.parent)
        unfinished = Path(folder) / f".{secrets.randbits(48)}.{path.name}"
        yield unfinished
        if remote:  # object stores show an upload only when it is complete
            with open(unfinished, "rb") as f, path.open("wb") as g:
                shutil.copyfileobj(f, g, 1 << 24)
        else:
            os.replace(unfinished, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        if unfinished is not None:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
        if remote and folder is not None:
            os.rmdir(folder)


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file in one step, text as UTF-8; raises `UserError` as `writing`."""
    with writing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def read(path: epath.PathLike) -> bytes:
    """A file's content; of one in the cloud what fails is asked for again (see `buckets`)."""
    return buckets.fetch(path) if is_remote(path) else epath.Path(path).read_bytes()


def exists(path: epath.PathLike) -> bool:
    """Whether there is such a file; of one in the cloud what fails is asked for again."""
    return buckets.exists(path) if is_remote(path) else epath.Path(path).exists()


def file_sizes(folder: epath.PathLike) -> dict[str, int]:
    """Names and bytes of the files in a folder; asked for many at a time, or in one list."""
    if is_remote(folder):
        return buckets.file_sizes(folder)
    with os.scandir(folder) as entries, concurrent.futures.ThreadPoolExecutor(16) as pool:
        files = [entry for entry in entries if entry.is_file()]
        return dict(pool.map(lambda entry: (entry.name, entry.stat().st_size), files))


def make_writable(folder: epath.PathLike) -> None:
    """Makes `folder` if need be; raises `UserError` if no file can be written to it.

    For asking before the work that makes the file. Permissions do not say it all: root has every
    one, and file systems may be read-only. Of a folder in the cloud nothing is asked.
    """
    folder = epath.Path(folder)
    if is_remote(folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(folder)):
            pass
    except OSError as error:
        raise cannot_write(folder, error) from error


def cannot_write(path: epath.PathLike, error: OSError) -> UserError:
    """The sentence for an `OSError` met while `path` was written."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return UserError(
        f"{os.fspath(path)} cannot be written ({reason}); make room or choose another place, then "
        "give the same command again",
        status=TRY_AGAIN,
    )


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URL such as gs://bucket/file, not of this machine's file systems."""
    return "://" in os.fspath(path)


def list_folder(folder: epath.PathLike) -> list[epath.Path]:
    """What lies in a folder by name, hidden files left out; empty if there is no such folder.

    Not by a pattern: names may hold the characters that mean something in patterns.

    Raises:
      UserError: a name that is not UTF-8.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        try:
            path.name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{folder}: a file name there is not UTF-8, {os.fsencode(path.name)!r}; rename it"
            ) from None
        if not path.name.startswith("."):
            found.append(path)
    return sorted(found)

"""Requests to stores in the cloud, by fsspec: each has its time, and is tried again when it fails.

fsspec's file systems know gs:// (gcsfs), s3:// (s3fs) and others, and find their credentials as
the machine has them.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from typing import Any

import fsspec
from etils import epath

from data_pipelines.errors import TRY_AGAIN, MissingFileError, UserError

ATTEMPTS, FIRST_WAIT = 6, 0.25
"""How often a request is tried, and seconds before the second time; each wait is twice the last."""

TIME_LIMIT, LONGEST_LIMIT = 5.0, 20.0
"""Seconds in which a request must be answered at first, and at last: one that hangs is given up
early, a store that is slow gets more each time. The file system's own retries are included."""

BYTES_A_SECOND = 1 << 20
"""A request for many bytes has as many seconds more."""

_LISTING = 30.0  # seconds more for the names of a folder, which come a thousand at a time


class BucketError(UserError):
    """A store that cannot be read, as against a file in it that is not what it should be."""


def fetch(path: epath.PathLike, begin: int = 0, end: int | None = None) -> bytes:
    """Bytes `begin` to `end` of a file in a store, by default to its end.

    Raises:
      MissingFileError: there is no such file.
      BucketError: it may not be read; or it failed `ATTEMPTS` times.
    """
    if end is None:
        end = _info(path)["size"]
    if begin == end:
        return b""
    more = (end - begin) / BYTES_A_SECOND
    return _insist(path, "cat_file", more, _expect_bytes(end - begin), start=begin, end=end)


def exists(path: epath.PathLike) -> bool:
    """Whether a store has a file; raises `BucketError` as `fetch`."""
    try:
        _info(path)
    except MissingFileError:
        return False
    return True


def file_sizes(folder: epath.PathLike) -> dict[str, int]:
    """Names and bytes of the files in a folder of a store; raises as `fetch`."""
    _forget_listing(folder)
    found = _insist(folder, "ls", _LISTING, detail=True)
    return {f["name"].rsplit("/", 1)[-1]: f["size"] for f in found if f["type"] == "file"}


def _info(path: epath.PathLike) -> dict[str, Any]:
    _forget_listing(os.path.dirname(path))
    return _insist(path, "info")


def _forget_listing(folder: epath.PathLike) -> None:
    """File systems remember what lay in a folder, for as long as the process lives."""
    files, name = _file_system(folder)
    files.invalidate_cache(name)


def _insist(
    path: epath.PathLike,
    method: str,
    more_seconds: float = 0.0,
    find_fault: Callable[[Any], str | None] = lambda answer: None,
    **options: Any,
) -> Any:
    """What `method` of the path's file system answers to its name and `options`, in the end."""
    files, name = _file_system(path)
    fault = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1) * (0.5 + random.random()))
        seconds = min(TIME_LIMIT * 2**attempt, LONGEST_LIMIT) + more_seconds
        try:
            answer = _ask(files, method, seconds, name, **options)
            fault = find_fault(answer)
            if fault is None:
                return answer
        except FileNotFoundError:
            raise MissingFileError(f"{os.fspath(path)} is missing: copy it there again") from None
        except PermissionError as error:
            raise BucketError(
                f"{os.fspath(path)} may not be read ({_one_line(error)}); give this machine "
                "credentials that may read the bucket"
            ) from error
        except TimeoutError:
            fault = f"no answer in {seconds:.0f} seconds"
        except Exception as error:  # each store has errors of its own
            fault = _one_line(error)
    raise BucketError(
        f"{os.fspath(path)} cannot be read ({fault}), tried {ATTEMPTS} times; see whether the "
        "bucket can be reached from here, then give the same command again",
        status=TRY_AGAIN,
    )


def _ask(files: Any, method: str, seconds: float, name: str, **options: Any) -> Any:
    if not files.async_impl:
        return getattr(files, method)(name, **options)
    coroutine = getattr(files, f"_{method}")

    async def in_time() -> Any:  # a request that is given up frees its connection
        return await asyncio.wait_for(coroutine(name, **options), seconds)

    return fsspec.asyn.sync(files.loop, in_time)


# botocore keeps 10 connections, fewer than a worker asks for at a time (`examples.REQUESTS`).
_OPTIONS = {"s3": {"config_kwargs": {"max_pool_connections": 64}}}

_file_systems: dict[tuple[int, str], Any] = {}


def _file_system(path: epath.PathLike) -> tuple[Any, str]:
    """The file system of a path, one a process and protocol, and the path's name in it."""
    protocol, _, _ = os.fspath(path).partition("://")
    key = os.getpid(), protocol
    if key not in _file_systems:
        # fsspec's own cache is by thread in older releases: each would connect anew.
        try:
            _file_systems[key] = fsspec.filesystem(protocol, **_OPTIONS.get(protocol, {}))
        except (ImportError, ValueError) as error:  # ValueError: an unknown protocol
            raise BucketError(f"{os.fspath(path)} cannot be read ({_one_line(error)})") from None
    return _file_systems[key], _file_systems[key]._strip_protocol(os.fspath(path))


def _expect_bytes(count: int) -> Callable[[bytes], str | None]:
    def find_fault(content: bytes) -> str | None:
        return None if len(content) == count else f"{len(content)} bytes came instead of {count}"

    return find_fault


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

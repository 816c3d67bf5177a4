"""One run in a folder at a time.

    WORKDIR/.lock    the holder: its host, process, kernel, and a number that grows as it lives

The file is locked, which ends with its process, however that ends: so a kernel knows at once which
of its own processes are gone. Other hosts' locks are not relied on, as network disks may not pass
them on, or keep those of a host that died. There the number tells: one that stands still for
`SILENCE` seconds is a dead holder's. Buckets (gs://) have no locks, and nothing there is held.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import socket
import threading
import time
import weakref
from pathlib import Path

from absl import logging
from etils import epath

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.files import is_remote

FILE = ".lock"

BEAT = 5.0
"""Seconds between two signs of life."""

SILENCE = 30.0
"""Seconds without one after which a holder on another host is taken for dead."""


class Lock:
    """A folder held by this process, until `release`, or the process's end at the latest.

    Args:
      folder: one that exists. Of a bucket's nothing is held.
      wanted: whether to hold it; of a job's many processes one does.

    Raises:
      UserError: another process holds it.
      OSError: the lock's file cannot be written.
    """

    def __init__(self, folder: epath.PathLike, *, wanted: bool = True):
        self._path = Path(folder) / FILE
        self.release = lambda: None
        if is_remote(folder) or not wanted:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take(file)
            _sign(file, 0)
        except (OSError, UserError):
            os.close(file)
            raise
        ended = threading.Event()
        # Not a method: the thread would keep this object alive.
        arguments = (self._path, file, ended)
        signing = threading.Thread(target=_keep_signing, args=arguments, daemon=True)
        signing.start()
        self.release = weakref.finalize(self, _release, file, ended, signing)

    def _take(self, file: int) -> None:
        """Returns when nobody alive holds the folder; raises `UserError` if somebody does."""
        holder = _read(self._path)  # before, as closing a file lets go of a process's POSIX locks
        locked = _lock(file)
        if locked is not False and not holder:
            return
        name, process, kernel = (holder + ["?"] * 3)[:3]
        if locked and kernel == _kernel():
            return  # dead: its kernel would know
        if locked is False and kernel in (_kernel(), "?"):
            raise self._in_use(name, process)
        logging.warning(
            "%s was left by process %s on %s: waiting for a sign of its life, up to %.0f s",
            *(self._path, process, name, SILENCE),
        )
        started = time.monotonic()
        while (now := _read(self._path)) == holder and time.monotonic() - started < SILENCE:
            time.sleep(BEAT / 5)
        if now not in ([], holder) or (locked and not _lock(file)):
            raise self._in_use(name, process)

    def _in_use(self, name: str, process: str) -> UserError:
        return UserError(
            f"--workdir {self._path.parent} is in use by process {process} on {name}; wait until "
            "that ends, stop it, or choose another --workdir",
            status=TRY_AGAIN,
        )


def _keep_signing(path: Path, file: int, ended: threading.Event) -> None:
    beat = 0
    while not ended.wait(BEAT):
        beat += 1
        try:
            if os.pread(file, 4096, 0).split()[:3] != _signature().encode().split():
                logging.error("%s was taken over by another run: stop one of them", path)
                return
            _lock(file)  # in case that a dead host's lock was in the way
            _sign(file, beat)
        except OSError as error:  # The disk is full or away, and may be back.
            logging.log_every_n_seconds(logging.WARNING, "%s: %s", 600, path, error.strerror)


def _release(file: int, ended: threading.Event, signing: threading.Thread) -> None:
    ended.set()
    signing.join()  # who writes to a closed file may write to the next one of that number
    with contextlib.suppress(OSError):
        os.ftruncate(file, 0)
    os.close(file)


def _lock(file: int) -> bool | None:
    """Whether this process holds the file's lock now; None if disks have none.

    POSIX's lock: one of `flock` would live on in worker processes that were forked.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise
    return True


def _sign(file: int, beat: int) -> None:
    text = f"{_signature()} {beat}\n"
    os.pwrite(file, text.encode(), 0)
    os.ftruncate(file, len(text.encode()))
    os.fsync(file)


def _signature() -> str:
    return f"{socket.gethostname()} {os.getpid()} {_kernel()}"


def _read(path: Path) -> list[str]:
    """Host, process, kernel and beat of who signed last; empty if it released the folder.

    Opened anew, as network disks look for news then.
    """
    return path.read_text(errors="replace").split()


@functools.cache
def _kernel() -> str:
    """Tells a running kernel from every other, also where hosts have the same name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()

"""Work that a thread of its own does beside the training loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Calls `work` in a daemon thread: one that keeps no process from ending."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._work = work
        self._result: T | None = None
        self._error: Exception | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def ready(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds; whether the work is done."""
        return self._done.wait(timeout)

    def result(self) -> T:
        """What the work gave, once it is done.

        Raises:
          Exception: whatever the work raised.
        """
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:
            self._error = error
        self._done.set()

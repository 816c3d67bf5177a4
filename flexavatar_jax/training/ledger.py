"""Where a run's wall time goes, over all its starts: WORKDIR/ledger.jsonl, a line a start.

Each moment of the main thread belongs to one of PHASES. Goodput is the share of `stepping`: steps
that count, and that the devices had input for. What a kill cost is taken off the killed start's
line when the next one has restored a checkpoint: it becomes `lost`.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from etils import epath

from data_pipelines.errors import UserError
from data_pipelines.files import is_remote, write

PHASES = (
    "starting",
    "restoring",
    "compiling",
    "stepping",
    "waiting",
    "saving",
    "evaluating",
    "lost",
)
"""`starting`: imports, devices, opening data sets. `waiting`: for input, while the devices have
nothing to do. `lost`: steps that were done again after a kill, with their waiting and evaluating.
"""

_DONE_AGAIN = ("stepping", "waiting", "evaluating")


class Ledger:
    """Counts the seconds of one start of a run, and those of the starts before.

    Args:
      startup_seconds: that passed in this process before.
    """

    def __init__(self, startup_seconds: float = 0.0) -> None:
        self._lock = threading.RLock()
        self._past: list[dict[str, float]] = []
        self._line = {"began": round(time.time() - startup_seconds, 1), "step": 0}
        self._seconds = dict.fromkeys(PHASES, 0.0) | {"starting": startup_seconds}
        self._phase, self._since = "starting", time.monotonic()
        self._path: epath.Path | None = None
        self._closed = threading.Event()

    def open(self, workdir: epath.PathLike, *, silent: bool = False) -> None:
        """Goes on with the ledger in `workdir`, which is written all along until `close`.

        That is twice a second, in a bucket twice a minute: so much of a process that is killed goes
        uncounted. `silent`: write nothing.

        Raises:
          UserError: the file that is there is not a ledger.
        """
        path = epath.Path(workdir) / "ledger.jsonl"
        self._past = read_ledger(workdir)
        if silent:
            return
        self._path = path
        every = 30.0 if is_remote(path) else 0.5

        def keep() -> None:
            while not self._closed.wait(every):
                self._write()

        threading.Thread(target=keep, name="ledger", daemon=True).start()

    def enter(self, phase: str) -> str:
        """From now on time belongs to `phase`; returns the one that it belonged to."""
        with self._lock:
            before, now = self._phase, time.monotonic()
            self._seconds[before] += now - self._since
            self._phase, self._since = phase, now
            return before

    @contextlib.contextmanager
    def during(self, phase: str, unless: Callable[[], bool] = bool) -> Iterator[None]:
        """Time within belongs to `phase`; not, if `unless` says so in the end."""
        outer = self.enter(phase)
        begin = self._since
        try:
            yield
        finally:
            with self._lock:
                self.enter(outer)
                if unless():
                    self._seconds[phase] -= self._since - begin
                    self._seconds[outer] += self._since - begin

    def reached(self, step: int) -> None:
        """Notes the last step that was done."""
        self._line["step"] = step

    def totals(self) -> dict[str, float]:
        """Seconds in each phase, over all starts of the run up to now."""
        with self._lock:
            self.enter(self._phase)
            lines = [*self._past, self._seconds]
            return {phase: sum(line.get(phase, 0.0) for line in lines) for phase in PHASES}

    def metrics(self) -> dict[str, float]:
        """Goodput, and the seconds of each phase, as they are logged."""
        totals = self.totals()
        goodput = totals["stepping"] / max(sum(totals.values()), 1e-9)
        return {"goodput": goodput, **{f"seconds/{p}": s for p, s in totals.items()}}

    def go_on_from(self, totals: Mapping[str, float]) -> None:
        """What was done since a checkpoint with these `totals` in it is lost: it is done again."""
        with self._lock:
            for phase in _DONE_AGAIN:
                excess = sum(line.get(phase, 0.0) for line in self._past) - totals.get(phase, 0.0)
                for line in reversed(self._past):
                    taken = min(max(excess, 0.0), line.get(phase, 0.0))
                    line[phase] = line.get(phase, 0.0) - taken
                    line["lost"] = line.get("lost", 0.0) + taken
                    excess -= taken

    def describe(self) -> str:
        """The whole run in a line."""
        totals = self.totals()
        wall = sum(totals.values())
        shares = {phase: 100 * seconds / wall for phase, seconds in totals.items()}
        parts = ", ".join(f"{p} {share:.1f} %" for p, share in shares.items() if share >= 0.05)
        starts = len(self._past) + 1
        return (
            f"wall time {wall:.0f} s in {starts} start{'s' if starts > 1 else ''}: {parts}; "
            f"goodput {totals['stepping'] / wall:.3f}"
        )

    def close(self) -> None:
        """Writes the ledger for the last time."""
        self._closed.set()
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        # A disk that is full stops the run where it writes what it cannot do without.
        with self._lock, contextlib.suppress(UserError):
            self.enter(self._phase)
            line = {**self._line, "ended": round(time.time(), 1), **self._seconds}
            lines = [*self._past, line]
            text = "".join(f"{json.dumps(_rounded(line))}\n" for line in lines)
            write(self._path, text)


def read_ledger(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The lines of a run's ledger, one a start, oldest first; empty if it has none.

    Raises:
      UserError: the file is not a ledger.
    """
    path = epath.Path(workdir) / "ledger.jsonl"
    if not path.exists():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            if not all(isinstance(line.get(phase, 0.0), int | float) for phase in PHASES):
                raise ValueError("not numbers")
    except (ValueError, AttributeError, RecursionError):
        raise UserError(
            f"{os.fspath(path)} is damaged: expected a line of JSON for each start of the run; "
            "move it away, and wall time is counted anew"
        ) from None
    return lines


def process_age() -> float:
    """Seconds since this process began; those since Linux tells it, elsewhere 0."""
    try:
        with open("/proc/self/stat") as file:
            # The name, in brackets, may hold spaces.
            ticks = int(file.read().rpartition(")")[2].split()[19])
    except OSError:
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _rounded(line: Mapping[str, float]) -> dict[str, float]:
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}

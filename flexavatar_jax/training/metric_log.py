"""What a run tells while it trains: a progress bar, TensorBoard, and metrics.jsonl.

TensorBoard files are written by tensorboardX (clu's own writers need TensorFlow), and not by its
`SummaryWriter`: that one writes in a thread, which dies on a full disk while the run waits for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from etils import epath
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.files import write


class MetricLog:
    """Shows and records the metrics of one run; silent on processes other than the first.

    Args:
      workdir: the run's folder; `metrics.jsonl` and TensorBoard's `logs/` go there.
      step: the step the run goes on from; lines written after it by a killed run are dropped.
      steps: the run's last step, for the progress bar.
      silent: write and print nothing.
      also: what is recorded with every line and not printed.

    Raises (here and when something is recorded):
      UserError: the folder cannot be written.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        step: int,
        steps: int,
        silent: bool = False,
        also: Callable[[], Mapping[str, float]] = dict,
    ):
        self._silent, self._also = silent, also
        if silent:
            return
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._lines = [line for line in read_metrics(workdir) if line["step"] <= step]
        logs = epath.Path(workdir) / "logs"
        with self._writing():
            logs.mkdir(exist_ok=True)
            # Files are named by the second, and read in the order of their names.
            self._events = EventsWriter(os.fspath(logs / "events"), f".{step:09}")
            # Tells TensorBoard to forget what a killed run wrote of later steps.
            self._event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))
        self._bar = tqdm(
            total=steps, initial=step, unit="step", desc="training", smoothing=0.05, mininterval=1
        )

    def advance(self, steps: int = 1) -> None:
        """Moves the progress bar."""
        if not self._silent:
            self._bar.update(steps)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if not self._silent:
            tqdm.write(text)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records metrics of `step`, on one line for all calls, and prints these."""
        if self._silent:
            return
        recorded = {k: float(v) for k, v in {**values, **self._also()}.items()}
        if self._lines and self._lines[-1]["step"] == step:
            self._lines[-1] |= recorded
        else:
            self._lines.append({"step": step, **recorded})
        parts = [summary.scalar(name, value) for name, value in recorded.items()]
        with self._writing():
            self._event(Event(step=step, summary=Summary(value=[p.value[0] for p in parts])))
            write(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
        self.say(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def images(self, step: int, name: str, rows: np.ndarray) -> None:
        """Records uint8 images [N, H, W, 3], one below the other."""
        if not self._silent:
            grid = summary.image(name, np.concatenate(list(rows), axis=0), dataformats="HWC")
            with self._writing():
                self._event(Event(step=step, summary=grid))

    def close(self) -> None:
        if not self._silent:
            self._bar.close()
            with self._writing():
                self._events.close()

    def _event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)
        self._events.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as error:
            cause = error.__cause__ or error
            raise UserError(
                f"the run's metrics cannot be written to {self._path.parent} "
                f"({cause.strerror or cause}); mend that, and the same command goes on from the "
                "last checkpoint",
                status=TRY_AGAIN,
            ) from error


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, oldest first; empty if it has none.

    Raises:
      UserError: a line that is none of ours.
    """
    path = epath.Path(workdir) / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse(line: bytes, name: str) -> dict[str, float]:
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(line)
        numbers = isinstance(values, dict) and {type(x) for x in values.values()} <= {int, float}
        if numbers and isinstance(values.get("step"), int):
            return values
    raise UserError(
        f"{name}: {line[:40]!r} is not the metrics of a step as a JSON object; mend it, or move "
        "the file away (the run goes on without what it recorded so far)"
    )

"""What a run tells while it trains: a progress bar, TensorBoard, and metrics.jsonl.

TensorBoard files are written by tensorboardX: clu's own writers need TensorFlow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from flexavatar_jax.checkpoints import write_atomically


class MetricLog:
    """Shows and records the metrics of one run; silent on processes other than the first.

    Args:
      workdir: the run's folder; `metrics.jsonl` and TensorBoard's `logs/` go there.
      step: the step the run goes on from; lines written after it by a killed run are dropped.
      steps: the run's last step, for the progress bar.
      silent: write and print nothing.
    """

    def __init__(self, workdir: epath.PathLike, *, step: int, steps: int, silent: bool = False):
        self._silent = silent
        if silent:
            return
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._lines = [line for line in read_metrics(workdir) if line["step"] <= step]
        self._writer = SummaryWriter(str(epath.Path(workdir) / "logs"), purge_step=step + 1)
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
        """Records the metrics of `step` and prints them as one line."""
        if self._silent:
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._lines.append({"step": step, **{k: float(v) for k, v in values.items()}})
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in self._lines))
        self.say(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))

    def images(self, step: int, name: str, rows: np.ndarray) -> None:
        """Records uint8 images [N, H, W, 3], one below the other."""
        if not self._silent:
            grid = np.concatenate(list(rows), axis=0)
            self._writer.add_image(name, grid, step, dataformats="HWC")

    def close(self) -> None:
        if not self._silent:
            self._bar.close()
            self._writer.close()


def read_metrics(workdir: epath.PathLike) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, oldest first; empty if it has none."""
    path = epath.Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

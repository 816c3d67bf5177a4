"""What reading an image costs, as `data_pipelines.benchmark` measures it and `plan` calculates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from etils import epath

from data_pipelines.errors import MissingFileError, UserError

MEASURED = Path(__file__).with_name("figures.json")
"""Figures of procedural people at 512 pixels, for whoever has no data yet:

    python -m data_pipelines.prepare procedural --out DIR --size 512 --monocular-people 12 \\
        --monocular-timesteps 2 --multiview-people 3 --multiview-timesteps 1 --test-people 1
    python -m data_pipelines.benchmark DIR --seconds 30 --json data_pipelines/figures.json
"""


@dataclasses.dataclass(frozen=True)
class Figures:
    """What an image costs, in the median.

    Attributes:
      machine: the processor on which it was measured.
      data: names of the data sets that were read; `remote`: whether they lie in a bucket.
      size: pixels a side to which images were decoded.
      stages: seconds of one core by stage.
      record_bytes: of an image's record.
      request_seconds: until a record is there, from when it is asked for.
      worker_bytes: memory of a process that reads, without its batches.
    """

    machine: str
    data: list[str]
    remote: bool
    size: int
    stages: dict[str, float]
    record_bytes: float
    request_seconds: float
    worker_bytes: int

    @property
    def seconds(self) -> float:
        """Seconds of one core an image, all stages together."""
        return sum(self.stages.values())

    @classmethod
    def read(cls, path: epath.PathLike) -> Figures:
        """Figures that `benchmark --json` wrote; raises `UserError` if they are none."""
        path = epath.Path(path)
        if not path.exists():
            raise MissingFileError(
                f"{path}: no such file; write it by `python -m data_pipelines.benchmark DIR --json "
                f"{path}`"
            )
        try:
            figures = cls(**json.loads(path.read_text()))
            numbers = [*figures.stages.values(), figures.record_bytes, figures.size]
            if not all(isinstance(n, int | float) and n > 0 for n in numbers):
                raise ValueError("a figure is not positive")
            return figures
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{path} holds no figures ({' '.join(str(error).split())}); write them by `python "
                f"-m data_pipelines.benchmark DIR --json {path}`"
            ) from None

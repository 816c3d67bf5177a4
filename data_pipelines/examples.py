"""Fills a process's batches with examples: which frames they are of, read and decoded."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import sys
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from data_pipelines.batch import Batch
from data_pipelines.errors import UserError
from data_pipelines.files import is_remote
from data_pipelines.frame import MULTI_VIEW, Frame
from data_pipelines.proportions import Proportions
from data_pipelines.sampling import shuffled, stream_seed, target_candidates
from data_pipelines.shards import PreparedSet, RecordError, open_at_size

_ENDLESS = sys.maxsize
REQUESTS = 32  # to a bucket at a time, by each worker
_ATTEMPTS = 20  # inputs tried for one example before its bad records end the run


@dataclasses.dataclass(frozen=True)
class Batches:
    """One process's batches by step, as a random-access source for Grain.

    Attributes:
      sets: the data sets mixed, by alphabet.
      global_batch, first, count: examples a step; this process's first one, and how many.
      first_step: the step of element 0.
    """

    sets: tuple[PreparedSet, ...]
    proportions: Proportions
    data: dict[str, Any]
    seed: int
    global_batch: int
    first: int
    count: int
    first_step: int = 0

    @classmethod
    def create(
        cls, data: ConfigDict, seed: int, global_batch: int, process_index: int, process_count: int
    ) -> Batches:
        """Opens the data sets of `data.mixture`; raises ValueError or FileNotFoundError."""
        if global_batch < 1 or global_batch % process_count:
            raise UserError(
                f"a batch of {global_batch} does not divide among {process_count} processes"
            )
        if data.bad_records not in ("raise", "skip"):
            raise UserError(f"data.bad_records is {data.bad_records!r}: expected 'raise' or 'skip'")
        if data.targets < 1:
            raise UserError(f"data.targets is {data.targets}: expected at least 1")
        weights = {name: weight for name, weight in sorted(data.mixture.items()) if weight != 0}
        if not weights:
            raise UserError("data.mixture gives no data set a weight")
        proportions = Proportions.of(weights)
        root = epath.Path(data.root)
        sets = tuple(open_at_size(root / name, data.image_size) for name in weights)
        count = global_batch // process_count
        return cls(
            sets=sets,
            proportions=proportions,
            data=data.to_dict(),
            seed=seed,
            global_batch=global_batch,
            first=process_index * count,
            count=count,
        )

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, i: int) -> Batch:
        batch = Batch.empty(self.count, self.data["targets"], self.data["image_size"])
        start = (self.first_step + i) * self.global_batch + self.first
        examples = [Batch(*(field[b : b + 1] for field in batch)) for b in range(self.count)]
        places = range(start, start + self.count)
        if any(is_remote(prepared.folder) for prepared in self.sets):
            # Requests wait for the network: many at a time, or a batch would take seconds.
            with concurrent.futures.ThreadPoolExecutor(REQUESTS) as pool:
                collections.deque(pool.map(self._fill, places, examples), maxlen=0)
        else:
            collections.deque(map(self._fill, places, examples), maxlen=0)
        return batch

    def _fill(self, n: int, example: Batch) -> None:
        """Writes example `n` of the mixture into `example`, arrays of leading size 1."""
        number, k = self.proportions.place(n)
        prepared = self.sets[number]
        seed = stream_seed(self.seed, prepared.name)
        # The two draws have generators of their own: no bad record changes the colours.
        colours, luck = (np.random.default_rng([seed, k, draw]) for draw in range(2))
        example.background[0] = colours.random(3)
        example.jitter[0], jittered = self._draw_jitter(colours)
        reader = _Reader(prepared, self.data["image_size"], self.data["bad_records"] == "skip")
        record = shuffled(k, len(prepared), seed)
        for _ in range(_ATTEMPTS):
            chosen = self._read_example(reader, record, luck, example)
            if chosen is not None:
                break
            record = int(luck.integers(len(prepared)))
        else:
            raise reader.last_fault
        example.example[0] = [number, *chosen]
        example.bad_records[0] = reader.bad
        example.jittered[0] = jittered and example.source[0] == MULTI_VIEW

    def _read_example(
        self,
        reader: _Reader,
        record: int,
        luck: np.random.Generator,
        example: Batch,
    ) -> list[int] | None:
        """Writes the example whose input is `record`; None if bad records leave no way to.

        Returns the records read: input, targets.
        """
        frame = reader.read(record)
        if frame is None:
            return None
        _put(frame, "input", example, 0)
        example.source[0] = frame.source
        chosen = [record]
        candidates = target_candidates(
            reader.prepared.index, record, self.data["targets"], self.data["jaw_temperature"], luck
        )
        for t, records in enumerate(candidates):
            found = ((r, f) for r in records if (f := reader.read(int(r))) is not None)
            target, frame = next(found, (None, None))
            if frame is None:
                return None
            _put(frame, "target", example, (0, t))
            example.target_expression[0, t] = frame.expression
            chosen.append(int(target))
        return chosen

    def _draw_jitter(self, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
        """[4] brightness, contrast, saturation, hue; and whether to apply them."""
        jitter = self.data["jitter"]
        names = ("brightness", "contrast", "saturation", "hue")
        low, high = np.array([jitter[name] for name in names]).T
        values = low + (high - low) * rng.random(4)
        return values, rng.random() < jitter["probability"]


class _Reader:
    """Reads frames of a data set for one example; counts bad records where they are skipped."""

    def __init__(self, prepared: PreparedSet, size: int, skip: bool):
        self.prepared, self._size, self._skip = prepared, size, skip
        self.bad = 0
        self.last_fault: RecordError | None = None

    def read(self, record: int) -> Frame | None:
        """The frame, or None if its record is bad and bad ones are skipped."""
        try:
            return self.prepared.frame(record, self._size)
        except RecordError as e:
            if not self._skip:
                raise
            self.bad += 1
            self.last_fault = e
            logging.warning("skipped %s", e)
            return None


def _put(frame: Frame, prefix: str, example: Batch, place: Any) -> None:
    for field in ("image", "mask", "cam2head", "K"):
        getattr(example, f"{prefix}_{field}")[place] = getattr(frame, field)

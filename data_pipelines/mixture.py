"""From prepared data sets to training batches: mixed by weight, shuffled, decoded, resumable.

What a batch holds depends on (config, seed, step) alone: it is the same whatever the number of
hosts, of worker processes, or of restarts. Grain runs the reading, in threads and processes; the
place of an iterator is its step.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import grain
import numpy as np
from absl import flags, logging
from etils import epath
from ml_collections import ConfigDict

from data_pipelines.batch import Batch
from data_pipelines.errors import UserError
from data_pipelines.files import is_remote
from data_pipelines.frame import MULTI_VIEW, Frame
from data_pipelines.sampling import shuffled, stream_seed, target_candidates
from data_pipelines.shards import PreparedSet, RecordError, open_at_size

_ENDLESS = sys.maxsize
_REQUESTS = 32  # to a bucket at a time, by each worker
_ATTEMPTS = 20  # inputs tried for one example before its bad records end the run
_FEW_RECORDS = 1000  # before so many were read, a fraction of bad ones says little


def make_iterator(
    data: ConfigDict,
    seed: int,
    global_batch: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int | None = None,
) -> BatchIterator:
    """Batches of this process's part of the global batch, endlessly.

    Each has global_batch / process_count examples, for `augment.finish_batch` to finish on the
    accelerator.

    Args:
      data: config.data, with root, mixture, targets, image_size, jaw_temperature, jitter,
        bad_records, max_bad_fraction and workers.
      seed: of every random draw.
      global_batch: examples a step, over all processes.
      process_index, process_count: this process among those that share a step; each reads its own
        examples, and together they read what a single one would.
      workers: processes that read and decode, instead of data.workers, and pass batches on through
        shared memory (each holds up to three); 0 reads in threads of this process.

    Raises:
      FileNotFoundError, ValueError: a data set or a config field is not as it must be; while
        iterating, `RecordError` for a bad record, or ValueError for too many of them.
    """
    batches = _Batches.create(data, seed, global_batch, process_index, process_count)
    workers = data.workers if workers is None else workers
    return BatchIterator(batches, workers, data.max_bad_fraction)


class BatchIterator(grain.DatasetIterator):
    """Iterates over batches; its state, {"step": next step}, fits any number of hosts and workers.

    `close` stops the worker processes.
    """

    def __init__(self, batches: _Batches, workers: int, max_bad_fraction: float):
        super().__init__()
        self._batches, self._workers, self._max_bad_fraction = batches, workers, max_bad_fraction
        self._step = self._bad = self._read = 0
        self._reader: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        self.start_prefetch()
        batch = next(self._reader)
        self._step += 1
        self._bad += int(batch.bad_records.sum())
        self._read += batch.example[:, 1:].size
        if self._bad > self._max_bad_fraction * max(self._read, _FEW_RECORDS):
            raise UserError(
                f"{self._bad} of {self._read} records read are bad, more than "
                f"data.max_bad_fraction = {self._max_bad_fraction} allows; the log names them"
            )
        return batch

    def start_prefetch(self) -> None:
        """Starts reading ahead, from the next step on."""
        if self._reader is None:
            self._reader = self._read_from(self._step)

    def get_state(self) -> dict[str, int]:
        return {"step": self._step}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _read_from(self, step: int) -> grain.DatasetIterator:
        # A batch is an element of the source, so that workers share out whole batches. As one may
        # be a hundred megabytes, little is read ahead: by each worker, or by threads.
        source = dataclasses.replace(self._batches, first_step=step)
        ahead = 1 if self._workers else 2
        options = grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.source(source).to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its flags, in programs without absl too
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(num_workers=self._workers)
            dataset = dataset.mp_prefetch(processes, _live_as_long_as_the_run)
        return iter(dataset)


def _live_as_long_as_the_run(worker: int, count: int) -> None:
    """Lets a worker process end when its run closes it or dies, and not before.

    Schedulers signal all processes of a job; it is for the run to answer, with a last checkpoint.
    """
    del worker, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    threading.Thread(target=lambda: (run.join(), os._exit(1)), daemon=True).start()


@dataclasses.dataclass(frozen=True)
class Proportions:
    """Deals an endless stream out to data sets by weight: exactly, and evenly all along.

    A period of as many places as the weights' smallest whole multiples add up to repeats; in it,
    each set has exactly its share, spread evenly.

    Attributes:
      counts: [S] places of each set in a period.
      owner: [period] the set of each place.
      rank: [period] how many earlier places of the period that set has.
    """

    counts: np.ndarray
    owner: np.ndarray
    rank: np.ndarray

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Proportions:
        """Proportions of named data sets; raises ValueError for weights that make none."""
        for name, weight in weights.items():
            number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not (number and math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"data.mixture.{name} is {weight!r}: expected the data set's weight, a "
                    "positive number, or 0 to leave it out"
                )
        exact = [Fraction(str(weight)) for weight in weights.values()]
        unit = Fraction(
            math.gcd(*(w.numerator for w in exact)), math.lcm(*(w.denominator for w in exact))
        )
        counts = [int(w / unit) for w in exact]
        if sum(counts) > 1_000_000:
            raise UserError(
                f"data.mixture needs {sum(counts)} examples to come out exactly: "
                "choose weights with fewer digits"
            )
        owner = np.repeat(np.arange(len(counts)), counts)
        rank = np.concatenate([np.arange(c) for c in counts])
        order = np.argsort((rank + 0.5) / np.repeat(counts, counts), kind="stable")
        return cls(np.array(counts), owner[order], rank[order])

    def place(self, n: int) -> tuple[int, int]:
        """The data set of example `n`, and which one of that set's own stream it is."""
        period, i = divmod(n, len(self.owner))
        owner = self.owner[i]
        return int(owner), int(period * self.counts[owner] + self.rank[i])


@dataclasses.dataclass(frozen=True)
class _Batches:
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
    ) -> _Batches:
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
            with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
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

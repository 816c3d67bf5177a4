"""From prepared data sets to training batches: mixed by weight, shuffled, decoded, resumable.

What a batch holds depends on (config, seed, step) alone: it is the same whatever the number of
hosts, of worker processes, or of restarts. Grain runs the reading, in threads and processes; the
place of an iterator is its step.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from data_pipelines.batch import Batch
from data_pipelines.errors import UserError
from data_pipelines.examples import Batches

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
    batches = Batches.create(data, seed, global_batch, process_index, process_count)
    workers = data.workers if workers is None else workers
    return BatchIterator(batches, workers, data.max_bad_fraction)


class BatchIterator(grain.DatasetIterator):
    """Iterates over batches; its state, {"step": next step}, fits any number of hosts and workers.

    `close` stops the worker processes.
    """

    def __init__(self, batches: Batches, workers: int, max_bad_fraction: float):
        super().__init__()
        self._batches, self._workers, self._max_bad_fraction = batches, workers, max_bad_fraction
        self._step = self._bad = self._read = 0
        self._reader: list[grain.DatasetIterator] = []  # at most one
        self._first: concurrent.futures.Future[Batch] | None = None

    def __next__(self) -> Batch:
        self.start_prefetch()
        if self._first is not None:
            first, self._first = self._first, None
            batch = first.result()
            del first
        else:
            batch = next(self._reader[0])
        if self._workers:
            # Out of shared memory, whose last users must be gone before Python ends.
            batch = Batch(*map(np.array, batch))
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
        if not self._reader:
            self._reader = [self._read_from(self._step)]
            self._first = _read_first(self._reader[0])
            # At the latest when Python ends: workers that outlive it leave shared memory behind.
            self._finalizer = weakref.finalize(self, _close, self._reader)

    def get_state(self) -> dict[str, int]:
        return {"step": self._step}

    def set_state(self, state: Mapping[str, int]) -> None:
        self.close()
        self._step = int(state["step"])

    def close(self) -> None:
        self._first = None
        if self._reader:
            self._finalizer()

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


def _close(readers: list[grain.DatasetIterator]) -> None:
    while readers:
        readers.pop().close()


def _read_first(reader: grain.DatasetIterator) -> concurrent.futures.Future[Batch]:
    """Reads the first batch in a thread: only then does Grain start worker processes."""
    first: concurrent.futures.Future[Batch] = concurrent.futures.Future()

    def read() -> None:
        try:
            first.set_result(next(reader))
        except Exception as error:
            first.set_exception(error)

    with _signals_kept_from_workers():
        threading.Thread(target=read, daemon=True).start()
    return first


@contextlib.contextmanager
def _signals_kept_from_workers() -> Iterator[None]:
    """Processes started within never see Ctrl-C or SIGTERM, from their first moment on.

    They inherit what this thread lets through, and so do the threads that Grain starts them from.
    """
    # Python's own helper process, at its start, would let them through again.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _live_as_long_as_the_run(worker: int, count: int) -> None:
    """Lets a worker process end when its run closes it or dies, and not before.

    Schedulers signal all processes of a job; it is for the run to answer, with a last checkpoint.
    """
    del worker, count
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    threading.Thread(target=lambda: (run.join(), os._exit(1)), daemon=True).start()

"""Which frames make a training example, drawn from a data set's index without reading a frame.

Everything here is a function of the index and a seed or a generator, so that any example of a
stream can be drawn at any time, by any process.
"""

from __future__ import annotations

import zlib

import numpy as np
from grain.experimental import index_shuffle

from data_pipelines.frame import MONOCULAR
from data_pipelines.index import Index


def shuffled(i: int, size: int, seed: int) -> int:
    """Number `i` of an endless stream of numbers below `size`, each epoch another permutation.

    Grain's index shuffle computes a place in a permutation by itself: no list is held in memory.
    """
    epoch, place = divmod(i, size)
    return index_shuffle(place, max_index=size - 1, seed=(seed + epoch) % 2**32, rounds=4)


def stream_seed(seed: int, name: str) -> int:
    """Seed of one data set's stream: it does not depend on which others it is mixed with."""
    return zlib.crc32(f"{seed} {name}".encode())


def target_candidates(
    index: Index, record: int, num_targets: int, jaw_temperature: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """For each target of the example whose input is `record`, the records it may be, best first.

    Multi-view: the first target is of the input's camera, the others of cameras drawn without
    replacement while there are any, each with its own random timestep of the clip; a single target
    is of any camera, as a model that is only ever asked for the view it was given learns nothing of
    the other sides. Monocular: other frames of the clip, without replacement while there are any. A
    frame is favoured by exp(`jaw_temperature` * jaw angle in radians). The input itself is a target
    only where its clip (monocular) or its camera (multi-view) has no other frame.

    Only the first candidate is used, unless it is a bad record.
    """
    clip = index.clip_of(record)
    frames = np.arange(index.clip_start[clip], index.clip_start[clip + 1])
    others = frames[frames != record]

    def by_luck(records: np.ndarray) -> np.ndarray:
        # A race of exponential variables draws without replacement by weight.
        records = records if len(records) else np.array([record])
        finish = rng.standard_exponential(len(records)) * np.exp(
            -jaw_temperature * index.jaw[records]
        )
        return records[np.argsort(finish)]

    if index.source[clip] == MONOCULAR:
        order = by_luck(others)
        order = np.resize(order, max(len(order), num_targets))
        return [order[t::num_targets] for t in range(num_targets)]
    own = index.camera[record]
    cameras = np.unique(index.camera[frames])
    if num_targets > 1:
        cameras = np.concatenate([[own], rng.permutation(cameras[cameras != own])])
    else:
        cameras = rng.permutation(cameras)
    return [
        by_luck(others[index.camera[others] == camera])
        for camera in np.resize(cameras, num_targets)
    ]

"""Makes a folder whose shards are all written a finished one: their parts become its index."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from data_pipelines.errors import UserError
from data_pipelines.files import write
from data_pipelines.frame import EXPRESSION_SIZE
from data_pipelines.index import Index, write_index
from data_pipelines.prepared_folder import Summary
from data_pipelines.record import FIELDS
from data_pipelines.shard_parts import COLUMNS, read_part
from data_pipelines.shard_plan import FILE_TEMPLATE


def finish(folder: epath.Path, num_shards: int) -> None:
    """Writes metadata, summary and, last, the index of a folder whose shards are all there.

    Raises:
      UserError: no frame is left, or a part is damaged.
    """
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(lambda shard: _coded(read_part(folder, shard)), range(num_shards)))
    camera_names = np.unique(np.concatenate([part["camera_names"] for part in parts]))
    for part in parts:
        part["camera"] = np.searchsorted(camera_names, part["camera_names"])[part["camera"]]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}
    shard_frames = [int(part["length"].sum()) for part in parts]
    summary = Summary(
        people=len(set(columns["person"])),
        clips=len(columns["person"]),
        frames=sum(shard_frames),
        clips_left_out=_by_reason(columns["clips_left_out"], columns["names_left_out"]),
        frames_left_out=dict(collections.Counter(columns["frames_left_out"].tolist())),
    )
    if summary.frames == 0:
        reasons = "; ".join(str(summary).split("\n")[1:])
        raise UserError(
            f"no frame is left to write to {folder}: {reasons}; correct that and give the same "
            "command with --retry"
        )
    index = Index(
        clip_start=starts(columns["length"]),
        person=columns["person"],
        sequence=columns["sequence"],
        source=columns["source"],
        camera_names=camera_names,
        camera=columns["camera"].astype(np.int32),
        timestep=columns["timestep"],
        jaw=columns["jaw"],
        shard_start=starts(shard_frames),
        shard_bytes=columns["num_bytes"],
        record_end=columns["record_end"],
        image_size=columns["size"].min(),
    )
    _write_tfds_metadata(folder, shard_frames, index.shard_bytes)
    write(folder / "summary.json", json.dumps(dataclasses.asdict(summary), indent=2).encode())
    write_index(folder, index)


def _coded(part: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A part whose cameras are rows of its `camera_names`: a hundred million names are too many."""
    names, codes = np.unique(part["camera"], return_inverse=True)
    return part | {"camera_names": names, "camera": codes}


def _by_reason(reasons: np.ndarray, names: np.ndarray) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for reason, name in zip(reasons.tolist(), names.tolist(), strict=True):
        found.setdefault(reason, []).append(name)
    return found


def _write_tfds_metadata(
    folder: epath.Path, shard_frames: list[int], shard_bytes: np.ndarray
) -> None:
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        template=FILE_TEMPLATE,
        dataset_name=folder.name,
        filetype_suffix="array_record",
    )
    tfds.folder_dataset.write_metadata(
        data_dir=os.fspath(folder),
        features={
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "mask": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
            "cam2head": tfds.features.Tensor(shape=(4, 4), dtype=np.float32),
            "K": tfds.features.Tensor(shape=(3, 3), dtype=np.float32),
            "expression": tfds.features.Tensor(shape=(EXPRESSION_SIZE,), dtype=np.float32),
            "person": tfds.features.Text(),
            "sequence": tfds.features.Text(),
            "timestep": tfds.features.Scalar(dtype=np.int64),
            "camera": tfds.features.Text(),
            "source": tfds.features.Scalar(dtype=np.int64),
            "checksums": tfds.features.Tensor(shape=(len(FIELDS),), dtype=np.int64),
        },
        split_infos=[
            tfds.core.SplitInfo(
                name="train",
                shard_lengths=shard_frames,
                num_bytes=int(sum(shard_bytes)),
                filename_template=template,
            )
        ],
        filename_template=template,
        check_data=False,
    )


def starts(lengths: list[int] | np.ndarray) -> np.ndarray:
    """[n+1] where each of n runs of these lengths starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))])

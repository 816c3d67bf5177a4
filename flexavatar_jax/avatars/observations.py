"""What an avatar is made from: tracked pictures, a video, or a person of a prepared data set."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8

from data_pipelines.errors import UserError
from data_pipelines.frame import Frame
from data_pipelines.index import is_finished
from data_pipelines.media import VIDEOS
from data_pipelines.pixel3dmm import IMAGE_SIZE, Portrait, TrackedClip, read_clip, read_portrait
from data_pipelines.shards import PreparedSet
from data_pipelines.tracker_folders import find_input
from flexavatar_jax.avatars.fit import free_host_memory

PIXEL_BYTES = 3 + 1 + 3
"""What a pixel of a picture that an avatar is made from takes: RGB, mask, and RGB on white."""


class Observations(NamedTuple):
    """The tracked frames of one person, and the pictures of those that the avatar is made from.

    Attributes:
      name: of the person.
      expressions, cam2heads, Ks: [T, 135], [T, 4, 4], [T, 3, 3], of all tracked frames, as in
        `Avatar`.
      seen: [I] frames whose pictures are here, the source first.
      images, masks: I pictures, uint8 RGB, with their foreground (255 on the person), square.
    """

    name: str
    expressions: Float[np.ndarray, "T 135"]
    cam2heads: Float[np.ndarray, "T 4 4"]
    Ks: Float[np.ndarray, "T 3 3"]
    seen: Int[np.ndarray, "I"]
    images: list[UInt8[np.ndarray, "H H 3"]]
    masks: list[UInt8[np.ndarray, "H H"]]


def read_observations(sources: Sequence[str], images: int | None = None) -> Observations:
    """Reads tracked pictures or videos, or a person of a prepared set.

    Args:
      sources: paths DIR/inputs/NAME.jpg, of one or several pictures, videos or folders of pictures
        of one person, tracked with Pixel3DMM; or one SET/PERSON, where SET is the folder of a
        prepared data set.
      images: how many frames of a video or a prepared person the avatar is made from, spread over
        cameras and time; by default one, for a prepared person the most frontal of the first
        moment. Of several pictures it is all of them.

    Raises:
      UserError: a source that is not there, not tracked, or damaged; fewer frames than `images`;
        more pictures than memory holds.
    """
    if images is not None and images < 1:
        raise UserError(f"--images is {images}; expected 1 or more")
    prepared = [s for s in sources if is_finished(Path(s).parent)]
    if prepared:
        if len(sources) > 1:
            raise UserError(
                f"{prepared[0]} is a person of a prepared data set; give no other source beside it"
            )
        return read_person(Path(sources[0]).parent, Path(sources[0]).name, images)
    for source in sources:
        if is_finished(Path(source)):
            people = sorted(set(map(str, PreparedSet(source).index.person)))
            raise UserError(
                f"{source} is a prepared data set; give SET/PERSON, such as {source}/{people[0]}, "
                f"or --people for several of its {len(people)}"
            )
    clips = [find_tracked(source) for source in sources]
    counts = [clip.frames for clip in clips]
    if images is None:  # the first frame of each
        chosen = np.cumsum([0, *counts[:-1]])
    else:
        chosen = _evenly(sum(counts), images, sources[0])
    _check_room(len(chosen), IMAGE_SIZE)
    tracked, pictures = [], {}
    for portrait in itertools.chain.from_iterable(clip.read() for clip in clips):
        if len(tracked) in chosen:  # the others' pictures are not kept: a video has thousands
            pictures[len(tracked)] = portrait.image, portrait.mask
        tracked.append((portrait.expression, portrait.cam2head, portrait.K))
    return Observations(
        _name(sources[0]),
        *map(np.stack, zip(*tracked, strict=True)),
        seen=np.asarray(chosen, np.int32),
        images=[pictures[i][0] for i in chosen],
        masks=[pictures[i][1] for i in chosen],
    )


class Tracked(NamedTuple):
    """A tracked picture, video or folder of pictures: how many frames it has, and its reader."""

    frames: int
    read: Callable[[], Iterator[Portrait]]


def find_tracked(source: str) -> Tracked:
    """The tracking of DIR/inputs/NAME.jpg, of a video or of a folder of pictures.

    Tracking goes by NAME alone, so another input of that name could be taken for it: it is not.

    Raises:
      UserError: no such file, or a tracking that is missing, damaged or of another file.
    """
    given = Path(source).absolute()
    if not given.exists():
        raise UserError(
            f"{source}: no such file; expected DIR/inputs/NAME.jpg (or a video), or a prepared "
            "SET/PERSON"
        )
    root, name = given.parent.parent, given.name if given.is_dir() else given.stem
    if given.parent.name != "inputs":
        raise UserError(
            f"{source} does not lie in a folder inputs/ with processing/ and tracking/ beside it, "
            "as Pixel3DMM leaves them; track it first (data_pipelines/DATASETS.md)"
        )
    found = Path(find_input(root, name))
    if found != given:
        raise UserError(
            f"{source}: tracking of that name belongs to {found}; give that file, or move it away"
        )
    if given.is_dir() or given.suffix.lower() in VIDEOS:
        frames = len(TrackedClip(root, name).timesteps)
        return Tracked(frames, lambda: (portrait for _, portrait in read_clip(root, name)))
    return Tracked(1, lambda: iter([read_portrait(root, name)]))


def people_of(folder: str | Path, names: Sequence[str]) -> list[str]:
    """The people `names` of a prepared set, or all of them for ["all"]; raises `UserError`."""
    there = list(dict.fromkeys(map(str, PreparedSet(folder).index.person)))
    if list(names) == ["all"]:
        return there
    for name in names:
        if name not in there:
            raise UserError(
                f"{folder} has no person {name}; it has {len(there)}, such as "
                f"{', '.join(there[:3])}"
            )
    return list(names)


def read_person(folder: str | Path, name: str, images: int | None = None) -> Observations:
    """A person of a prepared set: the first clip's frames, as `read_observations`."""
    (name,) = people_of(folder, [name])
    data = PreparedSet(folder)
    index = data.index
    clip = list(map(str, index.person)).index(name)
    records = np.arange(index.clip_start[clip], index.clip_start[clip + 1])
    first = np.flatnonzero(index.timestep[records] == index.timestep[records].min())
    frames = [data.frame(int(i)) for i in records[first]]
    source = int(first[most_frontal(frames, index.timestep[records[first]])])
    order = np.lexsort((index.timestep[records], index.camera[records]))
    others = order[order != source]
    count = 1 if images is None else images
    if count > len(records):
        raise UserError(f"{folder}/{name} has {len(records)} frames, fewer than --images {count}")
    _check_room(count, int(index.image_size))
    chosen = [source, *others[_evenly(len(others), count - 1, name)]]
    # Other cameras saw the same moments: the performance is what the source's camera saw.
    kept = np.flatnonzero(index.camera[records] == index.camera[records[source]])
    kept = np.union1d(kept, chosen)
    tracked, pictures = [], {}
    for i in kept:  # a capture has thousands of frames: of the others no picture is kept
        frame = data.frame(int(records[i]))
        tracked.append((frame.expression, frame.cam2head, frame.K))
        if i in chosen:
            pictures[i] = frame.image, frame.mask
    return Observations(
        name,
        *map(np.stack, zip(*tracked, strict=True)),
        seen=np.searchsorted(kept, chosen).astype(np.int32),
        images=[pictures[i][0] for i in chosen],
        masks=[pictures[i][1] for i in chosen],
    )


def most_frontal(frames: Sequence[Frame], timestep: Integer[np.ndarray, "T"]) -> int:
    """The frame of the first moment whose camera stands nearest to the face's axis."""
    first = np.flatnonzero(timestep == timestep.min())
    off = [abs(np.arctan2(*frames[i].cam2head[[0, 2], 3])) for i in first]
    return int(first[np.argmin(off)])


def _check_room(images: int, size: int) -> None:
    """Raises `UserError` if so many pictures, `size` pixels a side, take more than is free."""
    needed, free = images * size**2 * PIXEL_BYTES, free_host_memory()
    if free is not None and needed > free:
        raise UserError(
            f"{images} images of {size} pixels take {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free: give a smaller --images"
        )


def _evenly(count: int, wanted: int, source: str) -> Int[np.ndarray, "I"]:
    """`wanted` of the numbers below `count`, in the middle of as many equal stretches."""
    if wanted > count:
        raise UserError(f"{source} has {count} frames, fewer than --images {wanted}")
    return ((np.arange(wanted) + 0.5) * count / max(wanted, 1)).astype(np.int64)


def _name(source: str) -> str:
    path = Path(source)
    return path.name if path.is_dir() else path.stem

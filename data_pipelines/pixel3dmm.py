"""Reads what the Pixel3DMM tracker made of portraits and clips: masks, cameras, codes.

Where its files lie is told in `tracker_folders`. Images are read as the published FLEX-1 expects
them: the tracker's crop, widened by a tenth on every side and resized to 512x512, with the
intrinsics following.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
from etils import epath
from jaxtyping import Float, UInt8

from data_pipelines.crop import IMAGE_SIZE, WidenedCrop
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.media import read_classes, read_photos
from data_pipelines.tracker_folders import (
    CROP_FILE,
    find_input,
    folder_holding,
    numbered,
    read_crop,
)
from data_pipelines.tracking import Tracking, read_tracking

CLASSES = 19
"""Of the tracker's face parser, 0 the background; other numbers mark what its window missed."""

LARGEST_CROP = 3
"""How many times a photo's longer side the tracker's crop may be; it needs room for all of it."""


def read_portrait(root: epath.PathLike, name: str, timestep: int = 0) -> Portrait:
    """Reads one tracked picture: `name` below `root` in the layout above.

    Of a video or a folder of pictures, `timestep` picks the frame.

    Raises:
      UserError: a file of it is missing or cannot be read.
    """
    clip = TrackedClip(root, name)
    for t, photo in read_photos(find_input(root, name)):
        if t == timestep:
            return clip.portrait(t, photo)
    raise UserError(f"{root}: {name} has no frame {timestep}.")


def read_clip(root: epath.PathLike, name: str) -> Iterator[tuple[int, Portrait]]:
    """Yields (timestep, portrait) of every tracked frame of `name`, in order.

    Raises:
      UserError: as `read_portrait`.
    """
    clip = TrackedClip(root, name)
    tracked = set(clip.timesteps)
    for t, photo in read_photos(find_input(root, name)):
        if t in tracked:
            tracked.discard(t)
            yield t, clip.portrait(t, photo)
    if tracked:
        raise UserError(
            f"{root}: {name} is tracked up to frame {max(tracked)}, but its input ends before; "
            "is it the file that was tracked?"
        )


def read_driving(folder: epath.PathLike) -> Driving:
    """Reads a performance: the numbered `.frame` files of `folder` (or of its `checkpoint/`).

    Raises:
      UserError: there is none, one is missing between others, or one cannot be read.
    """
    folder = epath.Path(folder)
    frames = numbered(folder, ".frame") or numbered(folder / "checkpoint", ".frame")
    if not frames:
        raise MissingFileError(
            f"{folder}: no .frame files in it; give the folder of a Pixel3DMM tracking."
        )
    missing = sorted(set(range(min(frames), max(frames))) - frames.keys())
    if missing:
        raise UserError(
            f"{folder}: {missing[0]:05d}.frame is missing between others, {len(missing)} in all; "
            "copy them again, or number the frames without a gap."
        )
    tracked = [read_tracking(path) for path in frames.values()]
    K = np.stack([t.K for t in tracked])
    K[:, :2] /= IMAGE_SIZE
    return Driving(
        expression=np.stack([t.expression for t in tracked]),
        cam2head=np.stack([t.cam2head for t in tracked]).astype(np.float32),
        K=K.astype(np.float32),
    )


@dataclasses.dataclass(frozen=True)
class Portrait:
    """A tracked picture, ready for the model.

    Attributes:
      image: [512, 512, 3] uint8 RGB, the widened crop with its background, white past the photo.
      mask: [512, 512] uint8, 255 on the person.
      cam2head: [4, 4] float32 camera in the canonical head frame, OpenCV axes, metres.
      K: [3, 3] float32 intrinsics divided by the image size.
      expression: [135] float32 code, in the order of `EXPRESSION_PARTS`.
    """

    image: UInt8[np.ndarray, "512 512 3"]
    mask: UInt8[np.ndarray, "512 512"]
    cam2head: Float[np.ndarray, "4 4"]
    K: Float[np.ndarray, "3 3"]
    expression: Float[np.ndarray, "135"]


@dataclasses.dataclass(frozen=True)
class Driving:
    """The tracked frames of a performance, without images.

    Attributes:
      expression: [T, 135] float32 codes.
      cam2head: [T, 4, 4] float32 cameras in the canonical head frame.
      K: [T, 3, 3] float32 intrinsics of the unwidened crop, divided by its size.
    """

    expression: Float[np.ndarray, "T 135"]
    cam2head: Float[np.ndarray, "T 4 4"]
    K: Float[np.ndarray, "T 3 3"]


class TrackedClip:
    """What the tracker left of one picture or clip.

    Attributes:
      timesteps: frames that were tracked, ascending.
      crop: the tracker's crop in pixels of the input, (ymin, ymax, xmin, xmax).
    """

    def __init__(self, root: epath.PathLike, name: str):
        """`name` below `root`'s processing/ and tracking/; it may have slashes.

        Raises:
          UserError: no tracking or no crop of that name (`MissingFileError`), or several.
        """
        self._tracking = folder_holding(root, "tracking", name, "checkpoint")
        self._processing = folder_holding(root, "processing", name, CROP_FILE)
        if self._tracking is None:
            raise MissingFileError(
                f"{root}: {name} has no tracking, expected tracking/{name}/checkpoint/00000.frame; "
                "run Pixel3DMM on it first."
            )
        if self._processing is None:
            raise MissingFileError(
                f"{root}: {name} has no crop, expected processing/{name}/{CROP_FILE}; "
                "keep Pixel3DMM's preprocessing folder beside its tracking."
            )
        self._frames = numbered(self._tracking / "checkpoint", ".frame")
        if not self._frames:
            raise MissingFileError(f"{self._tracking}/checkpoint: no .frame files in it.")
        self.timesteps = list(self._frames)
        self.crop = read_crop(self._processing / CROP_FILE)

    def tracking(self, timestep: int) -> Tracking:
        """The tracker's result for one frame."""
        return read_tracking(self._frames[timestep])

    def mask(self, timestep: int) -> UInt8[np.ndarray, "h w"]:
        """Foreground of the unwidened crop: 255 where its segmentation is a class of a person.

        Raises:
          UserError: the segmentation is missing (`MissingFileError`), cannot be read or is empty.
        """
        path = self._processing / "seg_og" / f"{timestep:05d}.png"
        classes = read_classes(path)
        person = (classes > 0) & (classes < CLASSES)
        if not person.any():
            raise UserError(
                f"{path}: no pixel is foreground (a class from 1 to {CLASSES - 1}); track it again."
            )
        return np.where(person, np.uint8(255), np.uint8(0))

    def portrait(self, timestep: int, photo: UInt8[np.ndarray, "H W 3"]) -> Portrait:
        """The widened crop of `photo`, the input's frame at `timestep`, with what belongs to it."""
        crop = WidenedCrop.of(self.crop, photo.shape[0])
        return self._cut(timestep, photo, crop, crop.widen_K)

    def whole_photo(self, timestep: int, photo: UInt8[np.ndarray, "H W 3"]) -> Portrait:
        """All of `photo`, resized to 512x512, with what belongs to it."""
        height, width = photo.shape[:2]
        crop = WidenedCrop.to_box(self.crop, (0, height, 0, width))
        return self._cut(timestep, photo, crop, crop.place_K)

    def _cut(
        self,
        timestep: int,
        photo: np.ndarray,
        crop: WidenedCrop,
        follow: Callable[[np.ndarray], np.ndarray],
    ) -> Portrait:
        ymin, ymax, xmin, xmax = map(int, self.crop)
        if max(ymax - ymin, xmax - xmin) > LARGEST_CROP * max(photo.shape):
            raise UserError(
                f"{self._processing}: its crop {self.crop.tolist()} (ymin, ymax, xmin, xmax) is "
                f"over {LARGEST_CROP} times the photo of {photo.shape[1]}x{photo.shape[0]}; is it "
                "the one tracked?"
            )
        if not (0 <= ymin + ymax < 2 * photo.shape[0] and 0 <= xmin + xmax < 2 * photo.shape[1]):
            raise UserError(
                f"{self._processing}: its crop {self.crop.tolist()} (ymin, ymax, xmin, xmax) lies "
                f"outside the photo of {photo.shape[1]}x{photo.shape[0]}; is it the one tracked?"
            )
        tracking = self.tracking(timestep)
        return Portrait(
            image=crop.cut_image(photo),
            mask=crop.extend_mask(self.mask(timestep)),
            cam2head=tracking.cam2head.astype(np.float32),
            K=follow(tracking.K).astype(np.float32),
            expression=tracking.expression,
        )

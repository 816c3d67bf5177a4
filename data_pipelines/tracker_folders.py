"""Finds what the Pixel3DMM tracker leaves on disk, by the name of a picture or clip.

Layout, for a picture, a video or a folder of pictures called NAME:

    inputs/NAME.jpg | .PNG | ...       a picture, or
    inputs/NAME.mp4 | .MOV | ...       a video, or
    inputs/NAME/                       a folder of pictures, in alphabetical order
    processing/NAME/crop_ymin_ymax_xmin_xmax.npy     one crop for all frames, pixels of the input
    processing/NAME/seg_og/00000.png ...             segmentation of the crop, 0 is background
    tracking/NAME_nV1.../checkpoint/00000.frame ...  FLAME and camera of each frame

The tracker adds its settings to NAME; `tracking/NAME/` without them is found too, and so is what
its wrapper puts one folder deeper (`processing/NAME/tracking/`, `tracking/NAME/tracking_nV1.../`).
Of NAME.jpeg it strips four characters, so its own name for that is `NAME.`, which is found as well.
So are its folders where its environment variables (`HOMES`) say, and the published repository's
tree: inputs/itw/NAME.jpg, pixel3dmm_processing/processing/itw/NAME/tracking/... and tracking/ so.

Pixel3DMM is at https://github.com/SimonGiebenhain/pixel3dmm.
"""

from __future__ import annotations

import os

import numpy as np
from etils import epath
from jaxtyping import Int

from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.files import list_folder
from data_pipelines.media import PICTURES, VIDEOS
from data_pipelines.numpy_files import decode_npy

CROP_FILE = "crop_ymin_ymax_xmin_xmax.npy"

HOMES = {"processing": "PIXEL3DMM_PREPROCESSED_DATA", "tracking": "PIXEL3DMM_TRACKING_OUTPUT"}
"""The tracker's two output folders, and its own environment variables that say where they are."""


def list_inputs(root: epath.PathLike) -> dict[str, epath.Path]:
    """Everything in `root`'s inputs/ by name, tracked or not, in alphabetical order.

    What has an ending that is neither a picture's nor a video's comes by its whole name: reading it
    says so.

    Raises:
      UserError: there is no inputs/, or two inputs have the same name.
    """
    return {name: _only(name, paths) for name, paths in _inputs_by_name(root).items()}


def find_input(root: epath.PathLike, name: str) -> epath.Path:
    """The picture, video or folder of pictures called `name` in `root`'s inputs/.

    Raises:
      UserError: there is none, or there are two.
    """
    paths = _inputs_by_name(root).get(name)
    if paths is None:
        raise MissingFileError(
            f"{root}: no inputs/{name} with a picture's or video's ending, "
            f"{', '.join(PICTURES + VIDEOS)}."
        )
    return _only(name, paths)


def _inputs_by_name(root: epath.PathLike) -> dict[str, list[epath.Path]]:
    """What lies in inputs/ under each name, endings in whatever case."""
    root = epath.Path(root)
    inputs = root / "inputs"
    if (root / "pixel3dmm_processing").is_dir() and (inputs / "itw").is_dir():
        inputs = inputs / "itw"  # the published repository's tree
    if not inputs.is_dir():
        raise MissingFileError(
            f"{root}: no folder inputs/; expected inputs/, processing/ and tracking/ side by side."
        )
    found: dict[str, list[epath.Path]] = {}
    for path in list_folder(inputs):
        whole = path.is_dir() or path.suffix.lower() not in PICTURES + VIDEOS
        found.setdefault(path.name if whole else path.stem, []).append(path)
    return dict(sorted(found.items()))


def _only(name: str, paths: list[epath.Path]) -> epath.Path:
    """The one input of a name, as trackings go by the name alone."""
    if len(paths) > 1:
        raise UserError(
            f"{paths[0].parent}: {' and '.join(path.name for path in paths)} have the same name "
            f"{name}, by which a tracking is found; rename or move away all but one."
        )
    return paths[0]


def folder_holding(root: epath.PathLike, kind: str, name: str, member: str) -> epath.Path | None:
    """The tracker's folder of an input that holds `member`, `kind` "processing" or "tracking".

    Raises `UserError` if more than one does.
    """
    root = epath.Path(root)
    homes = [root / kind, root / "pixel3dmm_processing" / kind / "itw"]
    found = _holding(homes, name, member)
    if not found and os.environ.get(HOMES[kind]):
        found = _holding([epath.Path(os.environ[HOMES[kind]])], name, member)
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(map(os.fspath, found))} each hold a {member} of the same input; "
            "move away all but the one to be used."
        )
    return found[0] if found else None


def _holding(homes: list[epath.Path], name: str, member: str) -> list[epath.Path]:
    """In `homes`, NAME/, NAME_nV*/ and tracking*/ in NAME/, those that hold `member`."""
    candidates = []
    for path in (home / name for home in homes):
        for folder in list_folder(path.parent):
            if folder.name in (path.name, f"{path.name}."):
                inner = [f for f in list_folder(folder) if f.name.startswith("tracking")]
                candidates += [folder, *inner]
            elif folder.name.startswith((f"{path.name}_nV", f"{path.name}._nV")):
                candidates.append(folder)
    return [folder for folder in candidates if (folder / member).exists()]


def numbered(folder: epath.Path, suffix: str) -> dict[int, epath.Path]:
    """Files of a folder that have a number for a name, by number, ascending; others are no frames.

    Raises `UserError` if two have the same number.
    """
    found: dict[int, epath.Path] = {}
    for path in list_folder(folder):
        if path.suffix == suffix and path.stem.isdecimal() and path.stem.isascii():
            other = found.setdefault(int(path.stem), path)
            if other != path:
                raise UserError(
                    f"{folder}: {other.name} and {path.name} have the same number; remove one."
                )
    return dict(sorted(found.items()))


def read_crop(path: epath.Path) -> Int[np.ndarray, "4"]:
    crop = decode_npy(path.read_bytes(), path)
    if crop.shape != (4,) or crop.dtype.kind not in "iu":
        raise UserError(f"{path}: expected four whole numbers, ymin, ymax, xmin, xmax.")
    if not (np.abs(crop.astype(np.float64)) < 10**6).all():
        raise UserError(
            f"{path}: the crop {crop.tolist()} (ymin, ymax, xmin, xmax) is in no photo; track it "
            "again."
        )
    crop = crop.astype(np.int64)
    if crop[1] <= crop[0] or crop[3] <= crop[2]:
        raise UserError(f"{path}: the crop {crop.tolist()} (ymin, ymax, xmin, xmax) is empty.")
    return crop

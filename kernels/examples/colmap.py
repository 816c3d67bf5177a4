"""COLMAP's sparse models: cameras, poses and points, from the binary files or the text files.

Read here, by the format's description (https://colmap.github.io/format.html): COLMAP's own bindings
are 135 MB, take a cut cameras.bin for cameras of focal length 0 and all memory for a cut
points3D.bin (pycolmap 4.2). Counts are believed only as far as the file has bytes for them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

PARAMETERS = {
    "SIMPLE_PINHOLE": "f cx cy",
    "PINHOLE": "fx fy cx cy",
    "SIMPLE_RADIAL": "f cx cy k1",
    "RADIAL": "f cx cy k1 k2",
    "OPENCV": "fx fy cx cy k1 k2 p1 p2",
    "OPENCV_FISHEYE": "fx fy cx cy k1 k2 k3 k4",
    "FULL_OPENCV": "fx fy cx cy k1 k2 p1 p2 k3 k4 k5 k6",
    "FOV": "fx fy cx cy omega",
    "SIMPLE_RADIAL_FISHEYE": "f cx cy k1",
    "RADIAL_FISHEYE": "f cx cy k1 k2",
    "THIN_PRISM_FISHEYE": "fx fy cx cy k1 k2 p1 p2 k3 k4 sx1 sy1",
}
"""Camera models in the order of their numbers, and what their parameters are called in OpenCV."""

UNKNOWN_LENSES = ("FOV", "THIN_PRISM_FISHEYE")
"""Models that `kernels.rasterize` does not have."""

FILES = ("cameras", "images", "points3D")
MAX_SIDE = 1 << 20


class Model(NamedTuple):
    """A sparse model; images in order of their names."""

    names: list[str]
    """Files of the pictures, relative to the capture's folder of images."""
    viewmats: Float[np.ndarray, "V 4 4"]
    """World to camera, OpenCV axes."""
    Ks: Float[np.ndarray, "V 3 3"]
    """Intrinsics in pixels of pictures of `sizes`."""
    radial_coeffs: Float[np.ndarray, "V R"]
    """Distortion as `kernels.rasterize` takes it; as many as one of the cameras needs."""
    tangential_coeffs: Float[np.ndarray, "V T"]
    camera_model: str
    """Of all: "pinhole" or "fisheye"."""
    sizes: list[tuple[int, int]]
    """Width and height."""
    points: Float[np.ndarray, "P 3"]
    colors: Float[np.ndarray, "P 3"]
    """Of the points, from 0 to 1."""


def find_model(folder: Path) -> Path:
    """The folder with cameras, images and points3D of a capture: FOLDER/sparse/0, say.

    Raises:
      FileNotFoundError: there is none; says what was looked for.
    """
    for candidate in (folder / "sparse" / "0", folder / "sparse", folder):
        if all(_file(candidate, name) for name in FILES):
            return candidate
    raise FileNotFoundError(
        f"{folder}: expected a COLMAP model, cameras, images and points3D (.bin or .txt), here, in "
        "sparse/ or in sparse/0/"
    )


def read_model(folder: Path) -> Model:
    """Read a sparse model.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged or not COLMAP's, a camera's lens is of `UNKNOWN_LENSES`, some
        are fisheyes and others not, or there are no images or points; names the file and what was
        expected.
    """
    paths = [_file(folder, name) for name in FILES]
    if not all(paths):
        raise FileNotFoundError(f"{folder}: expected {', '.join(FILES)}, each .bin or .txt")
    cameras_of, images_of, points_of = (
        READERS[path.suffix][name] for path, name in zip(paths, FILES, strict=True)
    )
    cameras = {number: _camera(paths[0], *camera) for number, *camera in cameras_of(paths[0])}
    images = sorted(images_of(paths[1]), key=lambda image: image[3])
    points = list(points_of(paths[2]))
    for path, found, what in (paths[1], images, "image"), (paths[2], points, "point"):
        if not found:
            raise ValueError(f"{path}: has no {what}s; expected one or more")
    for _, _, camera, name in images:
        if camera not in cameras:
            raise ValueError(
                f"{paths[1]}: {name!r} has camera {camera}; expected one of {paths[0]}"
            )
    table = np.array(points, np.float64).reshape(len(points), 6)
    viewmats = np.stack([_viewmat(paths[1], name, q, t) for q, t, _, name in images])
    if not np.isfinite(table).all():
        raise ValueError(f"{paths[2]}: NaN or infinite numbers; expected finite ones")
    used = [cameras[camera] for _, _, camera, _ in images]
    if len(kinds := {camera.model for camera in used}) > 1:
        raise ValueError(f"{paths[0]}: some cameras are fisheyes and others not; expected one kind")
    return Model(
        names=[name for *_, name in images],
        viewmats=viewmats,
        Ks=np.stack([camera.K for camera in used]),
        radial_coeffs=_needed([camera.radial for camera in used]),
        tangential_coeffs=_needed([camera.tangential for camera in used], together=2),
        camera_model=kinds.pop(),
        sizes=[camera.size for camera in used],
        points=table[:, :3],
        colors=np.clip(table[:, 3:] / 255, 0, 1),
    )


def _file(folder: Path, name: str) -> Path | None:
    paths = (folder / f"{name}{end}" for end in (".bin", ".txt"))
    return next((path for path in paths if path.is_file()), None)


class Camera(NamedTuple):
    """One of a model's cameras; coefficients that its lens does not have are 0."""

    model: str
    K: Float[np.ndarray, "3 3"]
    radial: list[float]
    tangential: list[float]
    size: tuple[int, int]


def _needed(rows: list[list[float]], together: int = 1) -> Float[np.ndarray, "V C"]:
    """Coefficients without those at the end that are 0 of all cameras; so many at once."""
    table = np.array(rows, np.float64)
    last = max(np.flatnonzero(table.any(0)), default=-1)
    return table[:, : -(-(last + 1) // together) * together]


def _camera(path: Path, model: str, width: int, height: int, parameters) -> Camera:
    if model in UNKNOWN_LENSES:
        raise ValueError(
            f"{path}: a camera is {model}; expected another model: undistort the pictures with "
            "`colmap image_undistorter`"
        )
    named = dict(zip(PARAMETERS[model].split(), parameters, strict=True))
    fx, fy = (named[axis] if axis in named else named["f"] for axis in ("fx", "fy"))
    sizes = all(0 < side <= MAX_SIDE for side in (width, height))
    if not (sizes and all(map(math.isfinite, parameters)) and fx > 0 and fy > 0):
        raise ValueError(
            f"{path}: a camera of {width}x{height} pixels with {model} {parameters}; expected a "
            "size and focal lengths over 0"
        )
    return Camera(
        model="fisheye" if "FISHEYE" in model else "pinhole",
        K=np.array([[fx, 0, named["cx"]], [0, fy, named["cy"]], [0, 0, 1.0]]),
        radial=[named.get(f"k{i}", 0.0) for i in range(1, 7)],
        tangential=[named.get(f"p{i}", 0.0) for i in (1, 2)],
        size=(width, height),
    )


def _viewmat(path: Path, name: str, quat, translation) -> Float[np.ndarray, "4 4"]:
    if not (all(map(math.isfinite, (*quat, *translation))) and 0 < math.hypot(*quat) < math.inf):
        raise ValueError(
            f"{path}: {name!r} has pose {quat}, {translation}; expected finite numbers"
        )
    return make_viewmat(quat, translation)


def make_viewmat(
    quat: Sequence[float] | np.ndarray, translation: Sequence[float]
) -> Float[np.ndarray, "4 4"]:
    """World to camera of a rotation (w, x, y, z), which is normalised, and a translation."""
    w, x, y, z = np.asarray(quat, np.float64) / math.hypot(*quat)
    viewmat = np.eye(4)
    viewmat[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    viewmat[:3, 3] = translation
    return viewmat


class _Bytes:
    """A binary file, read from the front; whatever goes past its end is an error in a sentence."""

    def __init__(self, path: Path):
        self.path, self.data, self.place = path, path.read_bytes(), 0

    def take(self, layout: str) -> tuple:
        layout = "<" + layout
        self.skip(struct.calcsize(layout))
        return struct.unpack_from(layout, self.data, self.place - struct.calcsize(layout))

    def skip(self, size: int) -> None:
        self.place += size
        if self.place > len(self.data):
            raise ValueError(f"{self.path}: cut short or not COLMAP's; copy the file again")

    def count(self, least: int) -> int:
        """A number of records of at least so many bytes each, for which there is room."""
        (number,) = self.take("Q")
        if number * least > len(self.data) - self.place:
            raise ValueError(
                f"{self.path}: {number} records do not fit its {len(self.data)} bytes; copy the "
                "file again"
            )
        return number

    def name(self) -> str:
        end = self.data.find(b"\0", self.place)
        if end < 0:
            raise ValueError(f"{self.path}: a name without its end; copy the file again")
        name, self.place = self.data[self.place : end], end + 1
        return name.decode("utf-8", errors="replace")


def _cameras_bin(path: Path) -> Iterator[tuple]:
    file, models = _Bytes(path), list(PARAMETERS)
    for _ in range(file.count(24)):
        number, model, width, height = file.take("IiQQ")
        if not 0 <= model < len(models):
            raise ValueError(f"{path}: camera model {model}; expected 0 to {len(models) - 1}")
        parameters = PARAMETERS[models[model]].split()
        yield number, models[model], width, height, file.take(f"{len(parameters)}d")


def _images_bin(path: Path) -> Iterator[tuple]:
    file = _Bytes(path)
    for _ in range(file.count(73)):
        _, *pose, camera = file.take("I7dI")
        name = file.name()
        file.skip(24 * file.count(24))
        yield tuple(pose[:4]), tuple(pose[4:]), camera, name


def _points_bin(path: Path) -> Iterator[tuple]:
    file = _Bytes(path)
    for _ in range(file.count(51)):
        _, *point, _ = file.take("Q3d3Bd")
        file.skip(8 * file.count(8))
        yield tuple(point)


def _cameras_txt(path: Path) -> Iterator[tuple]:
    for line in _lines(path):
        number, model, width, height, *parameters = _fields(path, line, 4)
        if model not in PARAMETERS or len(parameters) != len(PARAMETERS[model].split()):
            raise ValueError(f"{path}: cannot read {line!r}; expected a model and its parameters")
        number, width, height = _integers(path, line, [number, width, height])
        yield number, model, width, height, _numbers(path, line, parameters)


def _images_txt(path: Path) -> Iterator[tuple]:
    """Every other line has the points that the picture shows, which may be none."""
    lines = _lines(path, empty=True)
    for line in lines:
        if not line:
            continue
        _, *pose, camera = _fields(path, line, 9)[:9]
        name = line.split(maxsplit=9)[9:]
        if not name:
            raise ValueError(f"{path}: cannot read {line!r}; expected a pose, a camera and a name")
        pose = _numbers(path, line, pose)
        yield pose[:4], pose[4:], *_integers(path, line, [camera]), name[0]
        next(lines, None)


def _points_txt(path: Path) -> Iterator[tuple]:
    for line in _lines(path):
        yield _numbers(path, line, _fields(path, line, 7)[1:7])


def _lines(path: Path, *, empty: bool = False) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in map(str.strip, file):
            if not line.startswith("#") and (line or empty):
                yield line


def _fields(path: Path, line: str, least: int) -> list[str]:
    fields = line.split()
    if len(fields) < least:
        raise ValueError(f"{path}: cannot read {line!r}; expected {least} fields or more")
    return fields


def _numbers(path: Path, line: str, fields: list[str]) -> tuple[float, ...]:
    try:
        return tuple(map(float, fields))
    except ValueError as error:
        raise ValueError(f"{path}: cannot read {line!r}; expected numbers") from error


def _integers(path: Path, line: str, fields: list[str]) -> tuple[int, ...]:
    try:
        return tuple(map(int, fields))
    except ValueError as error:
        raise ValueError(f"{path}: cannot read {line!r}; expected whole numbers") from error


READERS = {
    ".bin": dict(zip(FILES, (_cameras_bin, _images_bin, _points_bin), strict=True)),
    ".txt": dict(zip(FILES, (_cameras_txt, _images_txt, _points_txt), strict=True)),
}

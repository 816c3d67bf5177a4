"""Reads what the Pixel3DMM tracker leaves on disk: portraits, clips, masks, cameras, codes.

Layout, for a picture, a video or a folder of pictures called NAME:

    inputs/NAME.jpg | .PNG | ...       a picture, or
    inputs/NAME.mp4 | .MOV | ...       a video, or
    inputs/NAME/                       a folder of pictures, in alphabetical order
    processing/NAME/crop_ymin_ymax_xmin_xmax.npy     one crop for all frames, pixels of the input
    processing/NAME/seg_og/00000.png ...             segmentation of the crop, 0 is background
    tracking/NAME_nV1.../checkpoint/00000.frame ...  FLAME and camera of each frame

The tracker adds its settings to NAME; `tracking/NAME/` without them is found too, and so is what
its wrapper puts one folder deeper (`processing/NAME/tracking/`, `tracking/NAME/tracking_nV1.../`).
Pixel3DMM is at https://github.com/SimonGiebenhain/pixel3dmm.

Images are read as the published FLEX-1 expects them: the tracker's crop, widened by a tenth on
every side and resized to 512x512, with the intrinsics following.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import io
import os
from collections.abc import Callable, Iterator

import imageio.v3 as iio
import numpy as np
from etils import epath
from jaxtyping import Float, Int, UInt8
from PIL import Image

from data_pipelines import cameras
from data_pipelines.frame import EXPRESSION_PARTS
from data_pipelines.torch_files import load_torch_file

IMAGE_SIZE = 512
"""Side of the tracker's crop and of the portraits read here, in pixels."""

MARGIN = 0.1
"""The crop grows by this part of its height on every side."""

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm")


def read_portrait(root: epath.PathLike, name: str, timestep: int = 0) -> Portrait:
    """Reads one tracked picture: `name` below `root` in the layout above.

    Of a video or a folder of pictures, `timestep` picks the frame.

    Raises:
      FileNotFoundError, ValueError: a file of it is missing or cannot be read, in one sentence.
    """
    clip = TrackedClip(root, name)
    for t, photo in read_photos(find_input(root, name)):
        if t == timestep:
            return clip.portrait(t, photo)
    raise ValueError(f"{root}: {name} has no frame {timestep}.")


def read_clip(root: epath.PathLike, name: str) -> Iterator[tuple[int, Portrait]]:
    """Yields (timestep, portrait) of every tracked frame of `name`, in order.

    Raises:
      FileNotFoundError, ValueError: as `read_portrait`.
    """
    clip = TrackedClip(root, name)
    tracked = set(clip.timesteps)
    for t, photo in read_photos(find_input(root, name)):
        if t in tracked:
            tracked.discard(t)
            yield t, clip.portrait(t, photo)
    if tracked:
        raise ValueError(
            f"{root}: {name} is tracked up to frame {max(tracked)}, but its input ends before; "
            "is it the file that was tracked?"
        )


def read_driving(folder: epath.PathLike) -> Driving:
    """Reads a performance: every `.frame` file of `folder` (or of its `checkpoint/`), by name.

    Raises:
      FileNotFoundError: there is no `.frame` file.
      ValueError: a file cannot be read, in one sentence.
    """
    folder = epath.Path(folder)
    frames = sorted(folder.glob("*.frame")) or sorted(folder.glob("checkpoint/*.frame"))
    if not frames:
        raise FileNotFoundError(
            f"{folder}: no .frame files; give the folder of a Pixel3DMM tracking."
        )
    tracked = [read_tracking(path) for path in frames]
    K = np.stack([t.K for t in tracked])
    K[:, :2] /= IMAGE_SIZE
    return Driving(
        expression=np.stack([t.expression for t in tracked]),
        cam2head=np.stack([t.cam2head for t in tracked]).astype(np.float32),
        K=K.astype(np.float32),
    )


def list_inputs(root: epath.PathLike) -> dict[str, epath.Path]:
    """Everything in `root`'s inputs/ by name, tracked or not, in alphabetical order.

    Raises:
      FileNotFoundError: there is no inputs/.
      ValueError: two inputs have the same name.
    """
    return {name: _only(name, paths) for name, paths in _inputs_by_name(root).items()}


def find_input(root: epath.PathLike, name: str) -> epath.Path:
    """The picture, video or folder of pictures called `name` in `root`'s inputs/.

    Raises:
      FileNotFoundError: there is none.
      ValueError: there are two.
    """
    paths = _inputs_by_name(root).get(name)
    if paths is None:
        raise FileNotFoundError(
            f"{root}: no inputs/{name} with a picture's or video's ending, "
            f"{', '.join(PICTURES + VIDEOS)}."
        )
    return _only(name, paths)


def _inputs_by_name(root: epath.PathLike) -> dict[str, list[epath.Path]]:
    """What lies in inputs/ under each name, endings in whatever case."""
    inputs = epath.Path(root) / "inputs"
    if not inputs.is_dir():
        raise FileNotFoundError(
            f"{root}: no folder inputs/; expected inputs/, processing/ and tracking/ side by side."
        )
    found: dict[str, list[epath.Path]] = {}
    for path in sorted(inputs.iterdir()):
        folder = path.is_dir()
        if not path.name.startswith(".") and (folder or path.suffix.lower() in PICTURES + VIDEOS):
            found.setdefault(path.name if folder else path.stem, []).append(path)
    return dict(sorted(found.items()))


def _only(name: str, paths: list[epath.Path]) -> epath.Path:
    """The one input of a name, as trackings go by the name alone."""
    if len(paths) > 1:
        raise ValueError(
            f"{paths[0].parent}: {' and '.join(path.name for path in paths)} have the same name "
            f"{name}, by which a tracking is found; rename or move away all but one."
        )
    return paths[0]


@dataclasses.dataclass(frozen=True)
class Tracking:
    """One `.frame` of the tracker.

    Attributes:
      expression: [135] float32 code, in the order of `EXPRESSION_PARTS`.
      head2world: [4, 4] float64 pose of the canonical head in the tracker's world.
      cam2world: [4, 4] float64 pose of the tracker's camera there, OpenCV axes.
      K: [3, 3] float64 intrinsics in pixels of the unwidened crop at 512x512.
    """

    expression: Float[np.ndarray, "135"]
    head2world: Float[np.ndarray, "4 4"]
    cam2world: Float[np.ndarray, "4 4"]
    K: Float[np.ndarray, "3 3"]

    @property
    def cam2head(self) -> Float[np.ndarray, "4 4"]:
        """The camera in the canonical head frame, float64."""
        return cameras.invert_rigid(self.head2world) @ self.cam2world


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


@dataclasses.dataclass(frozen=True)
class WidenedCrop:
    """The square that is cut out of a photo: the tracker's crop and its margins.

    Attributes:
      ymin, ymax, xmin, xmax: the tracker's crop in pixels of the photo.
      top, bottom, left, right: how far the widened crop reaches past it, in the same pixels.
    """

    ymin: int
    ymax: int
    xmin: int
    xmax: int
    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def of(cls, crop: Int[np.ndarray, "4"], image_height: int) -> WidenedCrop:
        """Widens `crop`, (ymin, ymax, xmin, xmax), by a tenth of its height on every side.

        It never reaches below the photo: what is missing there is added above.
        """
        ymin, ymax, xmin, xmax = map(int, crop)
        margin = int(MARGIN * (ymax - ymin))
        bottom = min(margin, image_height - ymax)
        return cls(ymin, ymax, xmin, xmax, 2 * margin - bottom, bottom, margin, margin)

    @classmethod
    def to_box(cls, crop: Int[np.ndarray, "4"], box: tuple[int, int, int, int]) -> WidenedCrop:
        """Widens `crop` to another box, also (ymin, ymax, xmin, xmax); margins may be negative."""
        ymin, ymax, xmin, xmax = map(int, crop)
        top, bottom, left, right = box
        return cls(ymin, ymax, xmin, xmax, ymin - top, bottom - ymax, xmin - left, right - xmax)

    def cut_image(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "512 512 3"]:
        """The widened crop of a photo at 512x512, white where it reaches past the photo."""
        return self._cut(Image.fromarray(image), (255, 255, 255))

    def cut_mask(self, mask: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "512 512"]:
        """The widened crop of a whole photo's mask at 512x512, 0 past the photo."""
        return self._cut(Image.fromarray(mask), 0)

    def _cut(self, image: Image.Image, fill: int | tuple[int, ...]) -> np.ndarray:
        left, top = self.xmin - self.left, self.ymin - self.top
        right, bottom = self.xmax + self.right, self.ymax + self.bottom
        canvas = Image.new(image.mode, (right - left, bottom - top), fill)
        canvas.paste(image, (-left, -top))
        return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))

    def extend_mask(self, mask: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "512 512"]:
        """A mask of the unwidened crop, at any size, as a mask of the widened one at 512x512.

        The margin takes the value of the nearest pixel of the mask.
        """
        size = np.array(mask.shape)
        crop = np.array([self.ymax - self.ymin, self.xmax - self.xmin])
        before = np.array([self.top, self.left]) / crop * size
        after = np.array([self.bottom, self.right]) / crop * size
        # Padded to whole pixels, and cut where the margins really end.
        pad = np.maximum(np.ceil([before, after]), 0).astype(int) + 1
        padded = np.pad(mask, pad.T, mode="edge")
        (y0, x0), (y1, x1) = pad[0] - before, pad[0] + size + after
        return np.asarray(
            Image.fromarray(padded).resize(
                (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)
            )
        )

    def widen_K(self, K: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3 3"]:
        """Intrinsics in pixels of the crop at 512x512 -> of the widened crop, divided by 512.

        The published pipeline's arithmetic: the left margin counts as exactly a tenth and the
        widened side as exactly 1.2 times the crop's, although margins are whole pixels of the
        photo. It is therefore exact for square crops whose height is a multiple of ten, and off
        by less than a pixel of the photo for other square ones.
        """
        K = np.array(K, np.float64)
        K[0, 2] += MARGIN * IMAGE_SIZE
        K[1, 2] += self.top * IMAGE_SIZE / (self.ymax - self.ymin)
        K[:2] /= (1 + 2 * MARGIN) * IMAGE_SIZE
        return K

    def place_K(self, K: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3 3"]:
        """As `widen_K`, to the pixel: exact whatever the crop and its margins."""
        size = np.array([self.xmax - self.xmin, self.ymax - self.ymin])
        before, after = np.array([self.left, self.top]), np.array([self.right, self.bottom])
        K = np.array(K, np.float64)
        K[:2] *= size[:, None] / IMAGE_SIZE
        K[:2, 2] += before
        K[:2] /= (before + size + after)[:, None]
        return K


class TrackedClip:
    """What the tracker left of one picture or clip.

    Attributes:
      timesteps: frames that were tracked, ascending.
      crop: the tracker's crop in pixels of the input, (ymin, ymax, xmin, xmax).
    """

    def __init__(self, root: epath.PathLike, name: str):
        """`name` below `root`'s processing/ and tracking/; it may have slashes.

        Raises:
          FileNotFoundError, ValueError: no tracking or no crop of that name, or several, in one
            sentence.
        """
        root = epath.Path(root)
        self._tracking = _folder_holding(root / "tracking" / name, "checkpoint")
        self._processing = _folder_holding(root / "processing" / name, _CROP_FILE)
        if self._tracking is None:
            raise FileNotFoundError(
                f"{root}: {name} has no tracking, expected tracking/{name}/checkpoint/00000.frame; "
                "run Pixel3DMM on it first."
            )
        if self._processing is None:
            raise FileNotFoundError(
                f"{root}: {name} has no crop, expected processing/{name}/{_CROP_FILE}; "
                "keep Pixel3DMM's preprocessing folder beside its tracking."
            )
        self.timesteps = sorted(
            int(path.stem)
            for path in (self._tracking / "checkpoint").glob("*.frame")
            if path.stem.isdecimal()
        )
        if not self.timesteps:
            raise FileNotFoundError(f"{self._tracking}/checkpoint: no .frame files in it.")
        self.crop = _read_crop(self._processing / _CROP_FILE)

    def tracking(self, timestep: int) -> Tracking:
        """The tracker's result for one frame."""
        return read_tracking(self._tracking / "checkpoint" / f"{timestep:05d}.frame")

    def mask(self, timestep: int) -> UInt8[np.ndarray, "512 512"]:
        """Foreground of the unwidened crop: 255 wherever its segmentation is not background."""
        path = self._processing / "seg_og" / f"{timestep:05d}.png"
        return np.where(read_image(path, "L") > 0, np.uint8(255), np.uint8(0))

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
        ymin, ymax, xmin, xmax = self.crop
        if not (0 <= ymin + ymax < 2 * photo.shape[0] and 0 <= xmin + xmax < 2 * photo.shape[1]):
            raise ValueError(
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


def read_tracking(path: epath.PathLike) -> Tracking:
    """Reads one `.frame` file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or a field is missing, has another shape, or is not finite.
    """
    content = load_torch_file(path)

    def field(*keys: str, shape: tuple[int, ...]) -> np.ndarray:
        value = content
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        name = "/".join(keys)
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{path}: no field {name}; is it a Pixel3DMM tracking?")
        if value.shape != (1, *shape):
            raise ValueError(
                f"{path}: field {name} has shape {list(value.shape)}, expected {[1, *shape]}."
            )
        if value.dtype.kind != "f" or not np.isfinite(value).all():
            raise ValueError(f"{path}: field {name} holds values that are not finite numbers.")
        return value[0].astype(np.float64)

    code = [field("flame", part, shape=(size,)) for part, size in EXPRESSION_PARTS.items()]
    pose = cameras.rigid(
        cameras.rotation_from_6d(field("flame", "R", shape=(6,))), field("flame", "t", shape=(3,))
    )
    # Joint 1 is FLAME's neck: the canonical head moves with the skull, not with the shoulders.
    head2world = pose @ field("joint_transforms", shape=(5, 4, 4))[1]
    head2world[:3, :3] = cameras.nearest_rotation(head2world[:3, :3])
    world2cam = cameras.rigid(
        field("camera", "R_base_0", shape=(3, 3)), field("camera", "t_base_0", shape=(3,))
    )
    K = np.eye(3)
    K[0, 0] = K[1, 1] = field("camera", "fl", shape=(1,))[0] * IMAGE_SIZE
    # From [-1, 1] to pixels, in the tracker's convention.
    K[:2, 2] = (field("camera", "pp", shape=(2,)) + 1) * (IMAGE_SIZE / 2 + 0.5)
    return Tracking(
        expression=np.concatenate(code).astype(np.float32),
        head2world=head2world,
        # A true inverse: the tracker's float32 rotation is not orthonormal to the last digit.
        cam2world=np.linalg.inv(world2cam) @ cameras.OPENGL_TO_OPENCV,
        K=K,
    )


def read_photos(path: epath.PathLike) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Yields (timestep, photo) of a picture, a video or a folder of pictures.

    Raises:
      FileNotFoundError: there is no such file, or nothing in the folder.
      ValueError: a file that cannot be decoded, in one sentence.
    """
    path = epath.Path(path)
    if path.is_dir():
        yield from read_picture_folder(path)
    elif path.suffix.lower() in VIDEOS:
        yield from read_video(path)
    else:
        yield 0, read_image(path)


def read_picture_folder(
    folder: epath.PathLike,
) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Yields (index, picture) of `folder` in alphabetical order, as the tracker numbers them."""
    pictures = sorted(
        path
        for path in epath.Path(folder).iterdir()
        if path.suffix.lower() in PICTURES and not path.name.startswith(".")
    )
    if not pictures:
        raise FileNotFoundError(f"{folder}: no pictures ({', '.join(PICTURES)}) in it.")
    for index, path in enumerate(pictures):
        yield index, read_image(path)


def read_video(path: epath.PathLike) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Yields (index, frame) of a video, each coded frame once, as the tracker numbers them.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it does not decode.
    """
    path = epath.Path(path)
    with _naming_faults(path):
        yield from enumerate(
            iio.imiter(
                _for_ffmpeg(path),
                extension=path.suffix.lower(),
                plugin="FFMPEG",
                output_params=["-fps_mode", "vfr"],
            )
        )


def video_size(path: epath.PathLike) -> tuple[int, int]:
    """Width and height of a video in pixels; raises as `read_video`."""
    path = epath.Path(path)
    with _naming_faults(path):
        return iio.immeta(_for_ffmpeg(path), extension=path.suffix.lower(), plugin="FFMPEG")["size"]


def read_image(path: epath.PathLike, mode: str = "RGB") -> np.ndarray:
    """A picture as uint8, [H, W, 3] for "RGB" or [H, W] for "L".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it does not decode.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    return decode_image(path.read_bytes(), path, mode)


def decode_image(content: bytes, name: object, mode: str = "RGB") -> np.ndarray:
    """As `read_image`, from a file's content; `name` is for the error's sentence.

    A note on turning the picture in its EXIF data is not followed: the tracker does not either.
    """
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert(mode))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: does not decode as a picture ({_one_line(error)}).") from None


@contextlib.contextmanager
def _naming_faults(path: epath.Path) -> Iterator[None]:
    """Turns what imageio and ffmpeg raise into one sentence with the video's name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        yield
    except (OSError, RuntimeError, IndexError) as error:
        raise ValueError(f"{path}: does not decode as a video ({_one_line(error)}).") from None


def _for_ffmpeg(path: epath.Path) -> str | bytes:
    """ffmpeg reads files of this machine only; imageio keeps bytes in a temporary one."""
    return path.read_bytes() if "://" in os.fspath(path) else os.fspath(path)


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


_CROP_FILE = "crop_ymin_ymax_xmin_xmax.npy"


def _read_crop(path: epath.Path) -> Int[np.ndarray, "4"]:
    try:
        with path.open("rb") as file:
            crop = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a NumPy file ({error}).") from None
    if crop.shape != (4,) or crop.dtype.kind not in "iu":
        raise ValueError(f"{path}: expected four whole numbers, ymin, ymax, xmin, xmax.")
    if crop[1] <= crop[0] or crop[3] <= crop[2]:
        raise ValueError(f"{path}: the crop {crop.tolist()} (ymin, ymax, xmin, xmax) is empty.")
    return crop


def _folder_holding(folder: epath.Path, member: str) -> epath.Path | None:
    """`folder`, a tracking*/ in it or NAME_nV*/ beside it, whichever holds `member`.

    Raises `ValueError` if more than one does.
    """
    beside = folder.parent.glob(f"{glob.escape(folder.name)}_nV*")
    candidates = sorted([folder, *folder.glob("tracking*"), *beside])
    found = [candidate for candidate in candidates if (candidate / member).exists()]
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(map(os.fspath, found))} each hold a {member} of the same input; "
            "move away all but the one to be used."
        )
    return found[0] if found else None

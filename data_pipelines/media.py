"""Reads pictures and videos as uint8 RGB, and sizes portraits as the model takes them.

One way for training and inference: shards and `prepare_input` resize with the same filter and
round at the same places, so that a model sees a portrait as it saw the portraits it learned from.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator

import imageio.v3 as iio
import numpy as np
from etils import epath
from jaxtyping import Float, UInt8
from PIL import Image

from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.files import is_remote, list_folder

PICTURES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif"),
    *(".tif", ".tiff", ".bmp", ".gif", ".jp2"),
)
"""Endings of pictures that are read: what Pillow reads of its own and photos come in."""

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".avi", ".webm")
"""Endings of videos that are read."""

_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000")
"""Pillow's names of them: others it hands to programs (EPS to Ghostscript) are never tried."""

MAX_MEGAPIXELS = 89
"""Of a picture; Pillow's own limit, beyond which a small file may unfold into gigabytes."""

RESIZING = Image.Resampling.HAMMING
"""Pillow's filter for all portraits and their masks: sharp as bicubic, and without its ringing."""


def prepare_input(
    image: UInt8[np.ndarray, "H W 3"], mask: UInt8[np.ndarray, "H W"], size: int
) -> Float[np.ndarray, "size size 3"]:
    """A portrait as the model's input: resized, on white, float32 in [0, 1].

    The same as a shard's frame after `augment.finish_batch` but for what JPEG loses: image and
    mask are resized as uint8, each by itself, and composited in float32.

    Args:
      image: RGB with its background, square; another shape is squeezed, as `K` counts in parts of
        each side.
      mask: its foreground, 255 on the person.
      size: pixels a side.
    """
    image, mask = resize(image, size), resize(mask, size)
    alpha = mask[..., None].astype(np.float32) / 255
    return alpha * (image.astype(np.float32) / 255) + (1 - alpha)


def resize(image: UInt8[np.ndarray, "H W *c"], size: int) -> UInt8[np.ndarray, "size size *c"]:
    """An image or a mask at `size` pixels a side, as shards are read."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), RESIZING))


def read_photos(path: epath.PathLike) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Yields (timestep, photo) of a picture, a video or a folder of pictures.

    Raises:
      UserError: there is no such file, nothing in the folder, or a file that cannot be decoded.
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
    pictures = [path for path in list_folder(folder) if path.suffix.lower() in PICTURES]
    if not pictures:
        raise MissingFileError(f"{folder}: no pictures ({', '.join(PICTURES)}) in it.")
    for index, path in enumerate(pictures):
        yield index, read_image(path)


def read_video(path: epath.PathLike) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
    """Yields (index, frame) of a video, each coded frame once, as the tracker numbers them.

    Raises:
      UserError: there is no such file, or it does not decode.
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


def read_image(path: epath.PathLike, mode: str = "RGB") -> UInt8[np.ndarray, "H W *c"]:
    """A picture as uint8, [H, W, 3] for "RGB" or [H, W] for "L", on white where it is transparent.

    Raises:
      UserError: there is no such file, or it does not decode.
    """
    return decode_image(_content(path), path, mode)


def decode_image(content: bytes, name: object, mode: str = "RGB") -> UInt8[np.ndarray, "H W *c"]:
    """As `read_image`, from a file's content; `name` is for the error's sentence.

    Of a moving picture, its first one. A note on turning the picture in its EXIF data is not
    followed: the tracker does not either.
    """
    with _decoding(content, name) as image:
        if image.mode.startswith("I;16"):  # of 16 bits the upper 8, which Pillow would saturate
            image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise UserError(
                f"{name}: its pixels are of {'whole' if image.mode == 'I' else 'floating-point'} "
                "numbers of 32 bits, whose white is not known; save it with 8 or 16 bits."
            )
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert(mode))


def read_classes(path: epath.PathLike) -> UInt8[np.ndarray, "H W"]:
    """A picture whose pixels are numbers of classes, as segmentation networks write them.

    Raises:
      UserError: there is no such file, it does not decode, or it is a colour picture.
    """
    return decode_classes(_content(path), path)


def decode_classes(content: bytes, name: object) -> UInt8[np.ndarray, "H W"]:
    """As `read_classes`, from a file's content. Of a palette the numbers count, not the colours."""
    with _decoding(content, name) as image:
        numbers = np.asarray(image)
        if numbers.ndim == 3 and image.mode in ("RGB", "RGBA", "LA"):
            colours = numbers[..., : 1 if image.mode == "LA" else 3]
            if not (colours == colours[..., :1]).all():
                raise UserError(
                    f"{name}: a picture in colour, where each pixel should be the number of a "
                    "class; give the tracker's seg_og/, not a drawing of it."
                )
            numbers = colours[..., 0]
        if numbers.ndim != 2 or numbers.dtype.kind not in "bui":
            raise UserError(f"{name}: expected whole numbers of classes, not mode {image.mode}.")
        return np.clip(numbers.astype(np.int64), 0, 255).astype(np.uint8)


@contextlib.contextmanager
def _decoding(content: bytes, name: object) -> Iterator[Image.Image]:
    """A decoded picture; what Pillow finds wrong with it, then or within, is a `UserError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=_FORMATS)
            image.load()
            yield image
    except UserError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise UserError(
            f"{name}: a picture of more than {MAX_MEGAPIXELS} megapixels; scale it down, and track "
            "the smaller one."
        ) from None
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{name}: does not decode as a picture (it is none, or of a kind that is not known "
            "here); save it as PNG or JPEG."
        ) from None
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError) as error:
        raise UserError(f"{name}: does not decode as a picture ({_one_line(error)}).") from None


def _content(path: epath.PathLike) -> bytes:
    path = epath.Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file.")
    return path.read_bytes()


@contextlib.contextmanager
def _naming_faults(path: epath.Path) -> Iterator[None]:
    """Turns what imageio and ffmpeg raise into one sentence with the video's name."""
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file.")
    try:
        yield
    except (OSError, RuntimeError, IndexError) as error:
        raise UserError(f"{path}: does not decode as a video ({_one_line(error)}).") from None


def _for_ffmpeg(path: epath.Path) -> str | bytes:
    """ffmpeg reads files of this machine only; imageio keeps bytes in a temporary one.

    Absolute, as ffmpeg takes what comes before a colon for a protocol.
    """
    return path.read_bytes() if is_remote(path) else os.path.abspath(path)


def _one_line(error: Exception) -> str:
    """What a library says, in one line and without addresses of objects."""
    line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return line.partition(" <")[0] if " object at 0x" in line else line

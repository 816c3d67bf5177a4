"""A frame as one record of a shard: encoding, checks, and decoding that finds every fault.

A record is a serialised `tf.train.Example`, so TFDS reads it; TensorFlow is not needed. Each field
carries a checksum, so that a flipped bit is found even where the image would still decode.
"""

from __future__ import annotations

import io
import zlib

import numpy as np
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from data_pipelines.errors import UserError
from data_pipelines.frame import EXPRESSION_SIZE, MONOCULAR, MULTI_VIEW, Frame
from data_pipelines.media import resize

FIELDS = (
    "image",
    "mask",
    "cam2head",
    "K",
    "expression",
    "person",
    "sequence",
    "timestep",
    "camera",
    "source",
)
"""The fields of a record, in the order of its checksums."""

QUALITY = 95
"""JPEG quality of a record's image by default; colours are kept at full resolution (4:4:4).

JPEG, as the fastest to decode: at 512x512 Pillow takes 2 ms where WebP takes 5 to 8.
"""

_EXAMPLE_KINDS = {"bytes": "bytes_list", "float": "float_list", "int": "int64_list"}
_KINDS = dict.fromkeys(("image", "mask", "person", "sequence", "camera"), "bytes")
_KINDS |= dict.fromkeys(("cam2head", "K", "expression"), "float")
_KINDS |= dict.fromkeys(("timestep", "source", "checksums"), "int")


class FrameError(UserError):
    """A frame that breaks its contract, or a record that does not give back what was written.

    Attributes:
      field: the first field at fault, or "record" if it cannot be read at all.
      problem: what is wrong with it, in words.
    """

    def __init__(self, field: str, problem: str):
        super().__init__(f"{field}: {problem}")
        self.args = (field, problem)  # of which pickle makes it again, in another process
        self.field, self.problem = field, problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


def check_frame(frame: Frame) -> None:
    """Raises `FrameError` unless `frame` keeps the contract of `Frame` and its image is square."""
    shape = np.shape(frame.image)
    if len(shape) != 3 or shape[0] != shape[1] or shape[2] != 3 or frame.image.dtype != np.uint8:
        raise FrameError("image", f"expected square RGB of uint8, got {_describe(frame.image)}")
    if np.shape(frame.mask) != shape[:2] or frame.mask.dtype != np.uint8:
        raise FrameError(
            "mask", f"expected uint8 of the image's size {shape[:2]}, got {_describe(frame.mask)}"
        )
    for field, expected in (
        ("cam2head", (4, 4)),
        ("K", (3, 3)),
        ("expression", (EXPRESSION_SIZE,)),
    ):
        value = np.asarray(getattr(frame, field))
        if value.shape != expected:
            raise FrameError(field, f"expected shape {expected}, got {_describe(value)}")
        if not np.isfinite(value).all():
            raise FrameError(field, "it holds a number that is not finite")
    R = np.asarray(frame.cam2head, np.float64)[:3, :3]
    if np.abs(R @ R.T - np.eye(3)).max() > 1e-3 or np.linalg.det(R) < 0:
        raise FrameError("cam2head", "its upper left 3x3 is not a rotation")
    if np.abs(np.asarray(frame.cam2head)[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise FrameError("cam2head", "its last row is not 0 0 0 1")
    if frame.K[0, 0] <= 0 or frame.K[1, 1] <= 0:
        raise FrameError("K", "a focal length is not positive")
    if frame.source not in (MONOCULAR, MULTI_VIEW):
        raise FrameError("source", f"expected {MONOCULAR} or {MULTI_VIEW}, got {frame.source}")


def encode_frame(frame: Frame, quality: int = QUALITY) -> bytes:
    """The record of `frame`: image as JPEG of `quality`, mask as PNG, the rest as it is.

    Equal frames give equal bytes. Raises `FrameError` if `frame` breaks its contract.
    """
    check_frame(frame)
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(frame.image).save(image, "JPEG", quality=quality, subsampling=0)
    Image.fromarray(frame.mask).save(mask, "PNG")
    return serialize_fields(
        {
            "image": image.getvalue(),
            "mask": mask.getvalue(),
            "cam2head": np.asarray(frame.cam2head, np.float32).ravel(),
            "K": np.asarray(frame.K, np.float32).ravel(),
            "expression": np.asarray(frame.expression, np.float32),
            "person": frame.person.encode(),
            "sequence": frame.sequence.encode(),
            "timestep": np.array([frame.timestep], np.int64),
            "camera": frame.camera.encode(),
            "source": np.array([frame.source], np.int64),
        }
    )


def serialize_fields(fields: dict[str, bytes | np.ndarray]) -> bytes:
    """The record of already encoded `FIELDS`, with their checksums; nothing is checked."""
    example = tf_example_pb2.Example()
    checksums = np.array([zlib.crc32(fields[name]) for name in FIELDS], np.int64)
    for name, value in {**fields, "checksums": checksums}.items():
        values = getattr(example.features.feature[name], _EXAMPLE_KINDS[_KINDS[name]]).value
        values.extend([value] if isinstance(value, bytes) else value)
    return example.SerializeToString(deterministic=True)


def decode_frame(record: bytes, size: int | None = None) -> Frame:
    """The frame of a record, its image and mask resized to `size` pixels a side if given.

    Raises `FrameError`, naming the field, if any bit differs from what `encode_frame` wrote, if an
    image does not decode, or if the frame breaks its contract.
    """
    fields = parse_fields(record)
    image, mask = _open_image(fields, "image", "RGB"), _open_image(fields, "mask", "L")
    if image.size != mask.size:
        raise FrameError("mask", f"its size is {mask.size}, the image's {image.size}")
    frame = Frame(
        image=_pixels(image, "image", size),
        mask=_pixels(mask, "mask", size),
        cam2head=_reshape(fields["cam2head"], 4, 4),
        K=_reshape(fields["K"], 3, 3),
        expression=fields["expression"],
        person=fields["person"].decode(),
        sequence=fields["sequence"].decode(),
        timestep=int(fields["timestep"][0]),
        camera=fields["camera"].decode(),
        source=int(fields["source"][0]),
    )
    check_frame(frame)
    return frame


def parse_fields(record: bytes) -> dict[str, bytes | np.ndarray]:
    """A record's `FIELDS` as encoded, their checksums verified; raises `FrameError`."""
    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except Exception as e:  # protobuf's DecodeError has no stable home
        raise FrameError("record", "it is not a tf.train.Example") from e
    fields = {}
    for name in (*FIELDS, "checksums"):
        values = (
            getattr(features[name], _EXAMPLE_KINDS[_KINDS[name]]).value if name in features else ()
        )
        if len(values) == 0:
            raise FrameError(name, "it is missing")
        if _KINDS[name] == "bytes":
            fields[name] = values[0]
        else:
            fields[name] = np.array(values, np.float32 if _KINDS[name] == "float" else np.int64)
    checksums = fields.pop("checksums")
    if checksums.shape != (len(FIELDS),):
        raise FrameError("checksums", f"expected {len(FIELDS)}, got {checksums.size}")
    for name, checksum in zip(FIELDS, checksums, strict=True):
        if zlib.crc32(fields[name]) != checksum:
            raise FrameError(name, "it differs from what was written (wrong checksum)")
    return fields


def _open_image(fields: dict[str, bytes | np.ndarray], field: str, mode: str) -> Image.Image:
    """Opens an encoded image, reading only its header."""
    try:
        image = Image.open(io.BytesIO(fields[field]), formats=("JPEG", "PNG", "WEBP"))
    except Exception as e:
        raise FrameError(field, "it is not a JPEG, PNG or WebP image") from e
    if image.mode != mode:
        raise FrameError(field, f"expected an image of mode {mode}, got {image.mode}")
    return image


def _pixels(image: Image.Image, field: str, size: int | None) -> np.ndarray:
    """Decodes an opened image and resizes it to `size` pixels a side."""
    try:
        if size is None:
            return np.asarray(image)
        image.draft(None, (size, size))  # lets JPEG decode at a half, a quarter or an eighth
        return resize(np.asarray(image), size)
    except Exception as e:  # Pillow raises OSError, SyntaxError, ValueError and others
        raise FrameError(field, f"it does not decode ({e})") from e


def _reshape(value: np.ndarray, *shape: int) -> np.ndarray:
    """`value` in `shape` if it has as many numbers; otherwise as it is, for `check_frame`."""
    return value.reshape(shape) if value.size == np.prod(shape) else value


def _describe(value: np.ndarray) -> str:
    return f"{np.asarray(value).dtype} {np.shape(value)}"

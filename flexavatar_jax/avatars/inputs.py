"""What users hand to a model, checked and converted: portraits, cameras, expression codes.

A conversion is made where the meaning is certain (bytes, numbers in [0, 1], bool masks); anything
else is a `UserError`.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from data_pipelines.errors import UserError
from data_pipelines.frame import EXPRESSION_SIZE, MONOCULAR, MULTI_VIEW
from data_pipelines.media import prepare_input

MAX_PRINCIPAL_POINT = 10.0
"""Above it, in image sizes, a principal point must be meant in pixels."""


def model_input(image: np.ndarray, mask: np.ndarray, size: int) -> Float[np.ndarray, "size size 3"]:
    """A portrait, checked, as training showed it to the model: `media.prepare_input`.

    Args:
      image: [H, H, 3] RGB, uint8 or floats in [0, 1], of any size.
      mask: [H, H] foreground, 255 (uint8), 1.0 or True on the person.
      size: `config.model.image_size`, pixels a side of the result.

    Returns:
      float32 RGB in [0, 1].

    Raises:
      UserError: another shape, dtype or range, or a mask that marks nothing.
    """
    pixels = _bytes(image, "image")
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UserError(f"the image must be RGB, [H, W, 3], not {list(pixels.shape)}")
    if pixels.shape[0] != pixels.shape[1]:
        raise UserError(
            f"the image must be square, not {pixels.shape[1]}x{pixels.shape[0]}; crop it, and let "
            "K follow"
        )
    matte = _bytes(mask, "mask")
    if matte.shape != pixels.shape[:2]:
        raise UserError(
            f"the mask must have the image's size {list(pixels.shape[:2])}, not {list(matte.shape)}"
        )
    if not matte.any():
        raise UserError("the mask is empty: nothing in it is marked as the person")
    return prepare_input(pixels, matte, size)


def _bytes(values: np.ndarray, name: str) -> np.ndarray:
    """Pixels as uint8, where what they mean is certain."""
    values = np.asarray(values)
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 1:
            raise UserError(
                f"the {name}'s floats must be finite and in [0, 1]; for 0 to 255 give uint8"
            )
        return np.round(values * 255).astype(np.uint8)
    raise UserError(f"the {name} is {values.dtype}; expected uint8, or floats in [0, 1]")


def check_camera(cam2head: np.ndarray, K: np.ndarray) -> None:
    """Raises `UserError` unless [*b, 4, 4] cameras and [*b, 3, 3] intrinsics can be ones.

    `cam2head` must be rigid and `K` divided by the image size.
    """
    cam2head, K = np.asarray(cam2head, np.float64), np.asarray(K, np.float64)
    for name, value, shape in (("cam2head", cam2head, (4, 4)), ("K", K, (3, 3))):
        if value.shape[-2:] != shape:
            raise UserError(f"{name} must be {list(shape)} for an image, not {list(value.shape)}")
        if not np.isfinite(value).all():
            raise UserError(f"{name} holds numbers that are not finite")
    R = cam2head[..., :3, :3]
    if np.abs(R @ np.swapaxes(R, -1, -2) - np.eye(3)).max() > 1e-3 or np.linalg.det(R).min() < 0:
        raise UserError("cam2head must be a rigid transform: its upper left 3x3 is no rotation")
    if np.abs(cam2head[..., 3, :] - [0, 0, 0, 1]).max() > 1e-6:
        raise UserError("cam2head must be a rigid transform: its last row is not 0 0 0 1")
    if min(K[..., 0, 0].min(), K[..., 1, 1].min()) <= 0:
        raise UserError("K has a focal length that is not positive")
    if np.abs(K[..., :2, 2]).max() > MAX_PRINCIPAL_POINT:
        raise UserError(
            "K is in pixels; divide its first two rows by the image's width and height (the "
            "principal point is then about 0.5)"
        )


def check_expressions(expressions: np.ndarray) -> Float[np.ndarray, "E 135"]:
    """Expression codes as float32; raises `UserError` unless they are [E, 135], E > 0, finite."""
    expressions = np.asarray(expressions, np.float32)
    if expressions.ndim != 2 or expressions.shape[1] != EXPRESSION_SIZE:
        raise UserError(
            f"expression codes must be [E, {EXPRESSION_SIZE}] (FLAME: exp, eyes, eyelids, "
            f"neck, jaw, R, t), not {list(expressions.shape)}"
        )
    if not len(expressions):
        raise UserError("there are no frames to render: give one expression code or more")
    if not np.isfinite(expressions).all():
        raise UserError("the expression codes hold numbers that are not finite")
    return expressions


def check_source(source: int) -> int:
    """The row of a bias sink; raises `UserError` for a number that is none."""
    if source not in (MONOCULAR, MULTI_VIEW):
        raise UserError(
            f"source is {source}; expected {MULTI_VIEW} (multi-view, for whole heads) or "
            f"{MONOCULAR} (monocular)"
        )
    return int(source)

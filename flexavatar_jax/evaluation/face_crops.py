"""Where a face is in a picture, by its camera, and the face cut out as networks want it.

There is no detector: the head's pose is known, so the average face's points are projected, and
truth and rendering are cut out alike, whatever is to be seen in them. Pixels are as everywhere
(docs/conventions.md): the centre of pixel (i, j) is at (x, y) = (j + 0.5, i + 0.5).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.ndimage import map_coordinates

from data_pipelines.cameras import invert_rigid
from data_pipelines.head_mesh import EYE_HEIGHT, EYE_OFFSET, MOUTH_HEIGHT, MOUTH_WIDTH

FACE_POINTS = np.array(
    [
        (-EYE_OFFSET, EYE_HEIGHT, 0.038),
        (EYE_OFFSET, EYE_HEIGHT, 0.038),
        (0, -0.008, 0.078),
        (-MOUTH_WIDTH, MOUTH_HEIGHT, 0.052),
        (MOUTH_WIDTH, MOUTH_HEIGHT, 0.052),
    ]
)
"""The person's right eye and left eye, nose's tip, right and left corner of the mouth: metres in
the head frame, for the average face of FLAME and of the project's own head."""

FACE_EDGES = np.array([(0, 0.07, 0.045), (0, -0.08, 0.05), (-0.07, 0, 0), (0.07, 0, 0)])
"""Forehead, chin and cheeks, as far as detectors' boxes reach."""

ARCFACE_POINTS = 0.5 + np.array(
    [
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    ]
)
"""Where the five points lie in ArcFace's crops of 112 pixels (Deng et al., CVPR 2019)."""

ARCFACE_SIZE = 112


def project(
    points: Float[np.ndarray, "P 3"],
    cam2head: Float[np.ndarray, "4 4"],
    K: Float[np.ndarray, "3 3"],
    size: int,
) -> Float[np.ndarray, "P 2"]:
    """Points of the head frame (metres) in a square image of `size` pixels."""
    head2cam = invert_rigid(np.asarray(cam2head, np.float64))
    x = (points @ head2cam[:3, :3].T + head2cam[:3, 3]) @ np.asarray(K, np.float64).T
    return size * x[:, :2] / x[:, 2:]


def face_box(
    cam2head: Float[np.ndarray, "4 4"], K: Float[np.ndarray, "3 3"], size: int
) -> Float[np.ndarray, "4"]:
    """Left, top, right and bottom of the face in pixels, about as a detector would have them."""
    seen = project(np.concatenate([FACE_POINTS, FACE_EDGES]), cam2head, K, size)
    return np.concatenate([seen.min(0), seen.max(0)])


def similarity(
    source: Float[np.ndarray, "P 2"], target: Float[np.ndarray, "P 2"]
) -> Float[np.ndarray, "2 3"]:
    """The turn, scale and shift that takes `source` nearest to `target` in the mean square.

    Umeyama's solution (PAMI 1991) in the plane and without mirroring: of complex numbers, a
    regression through the means.
    """
    z, w = source @ [1, 1j], target @ [1, 1j]
    a = np.vdot(z - z.mean(), w - w.mean()) / np.vdot(z - z.mean(), z - z.mean()).real
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def box_to_square(box: Float[np.ndarray, "4"], size: int) -> Float[np.ndarray, "2 3"]:
    """What takes a box (left, top, right, bottom) to a square of `size` pixels."""
    scale = size / (box[2:] - box[:2])
    return np.concatenate([np.diag(scale), -(scale * box[:2])[:, None]], axis=1)


def apply(matrix: Float[np.ndarray, "2 3"], points: Float[np.ndarray, "P 2"]) -> np.ndarray:
    """The points [P, 2], moved."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def invert(matrix: Float[np.ndarray, "2 3"]) -> Float[np.ndarray, "2 3"]:
    """What takes the points back."""
    back = np.linalg.inv(matrix[:, :2])
    return np.concatenate([back, -(back @ matrix[:, 2:])], axis=1)


def cut(
    image: Float[np.ndarray, "H W 3"], matrix: Float[np.ndarray, "2 3"], size: int
) -> Float[np.ndarray, "size size 3"]:
    """The square of `size` pixels that `matrix` takes the image to: bilinear, black outside.

    Nothing is blurred where it shrinks: the networks were trained on crops made so.
    """
    centres = np.arange(size) + 0.5
    grid = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)
    x, y = apply(invert(matrix), grid).T - 0.5
    channels = [map_coordinates(image[..., c], [y, x], order=1, mode="constant") for c in range(3)]
    return np.stack(channels, axis=-1).reshape(size, size, 3).astype(np.float32)

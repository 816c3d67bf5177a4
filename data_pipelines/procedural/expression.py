"""Expressions: what the 135 numbers of a code do to a procedural head, and to its pose.

The layout is FLAME's (`data_pipelines.frame.EXPRESSION_PARTS`). The first numbers of `exp` move the
face as `BLENDSHAPES` says, about a standard deviation a unit; the others do nothing, as most of a
tracker's numbers hardly do. Rotations are six numbers, two rows of the matrix that turns column
vectors: the jaw opens by a positive angle about x. `neck`, `R` and `t` place the head in the world,
see `head_to_world`; in the head frame the neck's rotation shows as the shoulders turning under the
head, and R and t move nothing.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.frame import EXPRESSION_SIZE, expression_part
from data_pipelines.head_mesh import EYE_HEIGHT, EYE_OFFSET, MOUTH_HEIGHT, MOUTH_WIDTH, smoothstep
from data_pipelines.procedural.anatomy import JAW_JOINT, LID_THICKNESS, NECK_JOINT, anatomy
from data_pipelines.procedural.features import EYE_RADIUS
from data_pipelines.procedural.skin import EYE_ROW, EYE_WIDTH

BLENDSHAPES = (
    "smile",  # negative: the corners of the mouth fall
    "pucker",
    "brows_up",
    "brows_together",
    "upper_lip_up",
    "lower_lip_down",
    "mouth_left",
    "cheeks_out",
    "left_smile",  # the left corner alone; negative: the right one
    "inner_brows_up",
)


def head_to_world(code: Float[np.ndarray, "135"]) -> Float[np.ndarray, "4 4"]:
    """The head's pose in its capture: the body's R and t after the neck's rotation."""
    code = np.asarray(code, np.float64)
    neck = cameras.rotation_from_6d(code[expression_part("neck")])
    about_joint = cameras.rigid(neck, NECK_JOINT - neck @ NECK_JOINT)
    body = cameras.rotation_from_6d(code[expression_part("R")])
    return cameras.rigid(body, code[expression_part("t")]) @ about_joint


def deform(
    neutral: Float[np.ndarray, "v 3"],
    eye_centers: Float[np.ndarray, "2 3"],
    eye_open: float,
    eye_slant: float,
    code: Float[np.ndarray, "135"],
) -> Float[np.ndarray, "v 3"]:
    """Moves a person's shared mesh (`anatomy`) from rest into an expression, in the head frame.

    Args:
      neutral: vertices at rest, from `anatomy.neutral_vertices`.
      eye_centers: of the eyeballs, left and right.
      eye_open: how wide open the eyes are when the code doesn't close them, 1 on the average.
      eye_slant: metres by which the outer corner of the opening lies higher.
      code: expression code.

    Raises:
      ValueError: if the code hasn't 135 numbers.
    """
    code = np.asarray(code, np.float64)
    if code.shape != (EXPRESSION_SIZE,):
        raise UserError(
            f"an expression code has {EXPRESSION_SIZE} numbers, got an array of shape {code.shape}"
        )
    a = anatomy()
    vertices = neutral + np.tensordot(_strengths(code), _blendshapes(), axes=1)
    vertices = _open_eyes(vertices, neutral, eye_centers, eye_open, eye_slant, code)
    for part, center, gaze in zip(a.eyes, eye_centers, _gaze(code), strict=True):
        vertices[part] = center + (neutral[part] - center) @ gaze.T

    jaw = cameras.rotation_from_6d(code[expression_part("jaw")])
    weight = _jaw_weight()[:, None]
    vertices += weight * ((vertices - JAW_JOINT) @ (jaw - np.eye(3)).T)

    # Seen from the head, the shoulders turn the other way.
    shoulders = cameras.rotation_from_6d(code[expression_part("neck")]).T
    weight = smoothstep(0.79, 0.93, a.v)[:, None]
    vertices += weight * ((vertices - NECK_JOINT) @ (shoulders - np.eye(3)).T)
    return vertices.astype(np.float32)


def _strengths(code: np.ndarray) -> np.ndarray:
    """[S] how far each blendshape goes, limited to what a face can do."""
    raw = code[expression_part("exp")][: len(BLENDSHAPES)]
    low = np.array([-1.5, -0.5, -1, -0.7, 0, 0, -2, -0.5, -2, -0.5])
    high = np.array([2.2, 2.2, 2, 2, 1.8, 1.8, 2, 2, 2, 2])
    return np.clip(raw, low, high)


def _gaze(code: np.ndarray) -> np.ndarray:
    """[2, 3, 3] rotations of the left and the right eye."""
    return cameras.rotation_from_6d(code[expression_part("eyes")].reshape(2, 6))


@functools.cache
def _blendshapes() -> np.ndarray:
    """[S, V, 3] metres that a unit of each blendshape moves each vertex."""
    a = anatomy()
    x, y, z = a.rest.T
    side = np.sign(x)
    far = np.abs(x)
    # Hidden parts hang on the skin where they are attached; the skull's own don't move at all.
    soft = (smoothstep(-0.02, 0.02, z) * (1 - smoothstep(0.79, 0.84, a.v))).copy()
    for part in (*a.teeth, *a.eyes, *a.ears):
        soft[part] = 0

    def bump(cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
        return soft * np.exp(-(((far - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)

    def field(dx: np.ndarray | float, dy: np.ndarray | float, dz: np.ndarray | float) -> np.ndarray:
        return np.stack([dx + 0 * x, dy + 0 * x, dz + 0 * x], -1)

    corner = bump(MOUTH_WIDTH, MOUTH_HEIGHT, 0.014, 0.014)
    cheek = bump(0.040, -0.012, 0.018, 0.016)
    smile = field(0.0055 * side * corner, 0.0070 * corner + 0.0035 * cheek, 0.003 * cheek)
    smile[:, 2] -= 0.003 * corner
    one = np.where(side > 0, 1.0, -1.0)[:, None] * smoothstep(0.004, 0.014, far)[:, None]

    mouth = bump(0, MOUTH_HEIGHT, 0.030, 0.016)
    pucker = field(-0.30 * x * mouth, 0.0, 0.0065 * mouth)
    brow = bump(0.028, 0.042, 0.026, 0.012)
    inner = bump(0.012, 0.041, 0.012, 0.011)
    lip = soft * np.clip(1 - (x / MOUTH_WIDTH) ** 4, 0, 1)  # the corners hold together
    upper = lip * np.exp(-(((y - MOUTH_HEIGHT) / 0.010) ** 2)) * np.where(a.side > 0, 1, 0)
    lower = lip * np.exp(-(((y - MOUTH_HEIGHT) / 0.012) ** 2)) * np.where(a.side < 0, 1, 0)
    puff = bump(0.044, -0.035, 0.018, 0.016)
    shapes = {
        "smile": smile,
        "pucker": pucker,
        "brows_up": field(0, 0.0060 * brow, 0),
        "brows_together": field(-0.0035 * side * inner, -0.0035 * inner, 0.001 * inner),
        "upper_lip_up": field(0, 0.0040 * upper, 0.001 * upper),
        "lower_lip_down": field(0, -0.0045 * lower, 0.001 * lower),
        "mouth_left": field(0.006 * mouth, 0, 0),
        "cheeks_out": field(0.005 * side * puff, 0, 0.003 * puff),
        "left_smile": one * smile,
        "inner_brows_up": field(0, 0.0050 * inner, 0),
    }
    return np.stack([shapes[name] for name in BLENDSHAPES])


@functools.cache
def _jaw_weight() -> np.ndarray:
    """[V] share of the jaw's rotation; jumps from lip to lip between the corners of the mouth."""
    a = anatomy()
    x, y, z = a.rest.T
    smooth = smoothstep(-0.012, -0.062, y)
    between = np.sqrt(np.clip(1 - (x / MOUTH_WIDTH) ** 2, 0, 1)) * smoothstep(0, 0.02, z)
    between = between * smoothstep(-0.005, -0.025, y)
    # Between the corners the upper lip stays, the lower one goes, and the mouth's depth halves it.
    rigid = (1 - a.side) / 2
    weight = smooth + (rigid - smooth) * between
    weight = weight * smoothstep(-0.050, 0.0, z) * (1 - smoothstep(0.785, 0.87, a.v))
    for part in (a.teeth[0], *a.eyes, *a.ears, *a.sockets):
        weight[part] = 0
    weight[a.teeth[1]] = 1
    return weight


def _open_eyes(
    vertices: np.ndarray,
    neutral: np.ndarray,
    centers: np.ndarray,
    eye_open: float,
    eye_slant: float,
    code: np.ndarray,
) -> np.ndarray:
    """Draws the lids apart, by what the code leaves open, and lays them over the eyeballs."""
    lids, t, fade, side = _lids()
    eyelids = np.clip(code[expression_part("eyelids")], 0, 1)
    closed = np.where(anatomy().rest[lids, 0] > 0, eyelids[0], eyelids[1])
    almond = np.clip(1 - t**2, 0, 1) ** 0.75
    height = np.where(side > 0, 0.0054, -0.0034) * eye_open * almond
    # Both lids close on a line a little below the middle.
    moved = vertices[lids]
    moved[:, 1] += fade * (height * (1 - closed) - 0.0015 * closed * almond + eye_slant * t)

    for center, eye in zip(centers, (1, -1), strict=True):
        near = anatomy().rest[lids, 0] * eye > 0
        off = moved[near] - center
        across = off[:, 0] ** 2 + off[:, 1] ** 2
        radius = EYE_RADIUS + LID_THICKNESS
        ball = np.sqrt(np.maximum(radius**2 - across, 0))
        soft = 0.0012
        lifted = off[:, 2] + soft * np.logaddexp(0, (ball - off[:, 2]) / soft)
        # Beyond the ball's rim the skin is left where it is.
        over = smoothstep(radius**2, 0.6 * radius**2, across)
        moved[near, 2] = center[2] + off[:, 2] + over * (lifted - off[:, 2])
    vertices[lids] = moved
    return vertices


@functools.cache
def _lids() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The vertices round the eyes: their numbers; where across the opening they lie, -1 at the
    inner and 1 at the outer corner; how far they follow the lid's edge; +1 above and -1 below."""
    a = anatomy()
    x, y, z = a.rest.T
    t = (np.abs(x) - EYE_OFFSET) / EYE_WIDTH
    above = y - EYE_HEIGHT
    near = (np.abs(t) < 1.3) & (np.abs(above) < 0.019) & (z > 0)
    moving = np.zeros(len(x), bool)
    for part in (a.skin, *a.sockets):
        moving[part] = near[part]
    for part in a.sockets:  # but not the sockets' depths
        moving[part] &= a.side[part] != 0
    lids = np.flatnonzero(moving)
    on_edge = np.abs(a.v[lids] - EYE_ROW) < 1e-9
    side = np.where(on_edge, a.side[lids], np.sign(above[lids]))
    fade = np.clip(1 - np.abs(above[lids]) / 0.017, 0, 1) ** 1.4
    return lids, t[lids], fade, side

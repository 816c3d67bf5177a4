"""The project's own neutral head: a smooth surface over the unit square, and its UV-mapped mesh.

The surface is a stack of closed rings. Ring v runs from the crown (v = 0) down the face to the
shoulders (v = 1); on each, u goes once round from the back of the head (u = 0) over the person's
right, the face (u = 1/2) and the left to the back again (u = 1), so the texture seam lies at the
back and a picture of the UV map shows an upright face. A ring is drawn through four points of
smooth profile curves: front, back and the two sides. The crown is no pole: its ring is folded flat
onto a segment of the parting, as in elliptic coordinates, so texels stay of a size there.

Units are metres in the canonical head frame (x to the person's left, y up, z out of the face, the
origin between the ears), on the scale of FLAME's neutral head.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.interpolate import CubicSpline
from scipy.special import erf

Numbers = np.ndarray | np.floating
"""An array of any shape, or the number that NumPy makes of one without axes."""

EYE_HEIGHT, MOUTH_HEIGHT = 0.022, -0.0385
"""y of the lines on which the lids and the lips meet."""

EYE_OFFSET, MOUTH_WIDTH = 0.0315, 0.026
"""x of the left eye's centre and of the mouth's left corner; the right ones mirror them."""

FRONT_DENSITY = 0.25
"""How unevenly u goes round: the face gets (1 + d) / (1 - d) times the back's share of the map."""


class Bump(NamedTuple):
    """Where along a surface coordinate the template's UV map is denser: 1 + gain in the middle."""

    middle: float
    reach: float
    gain: float


ROOM_ACROSS = (Bump(0.5, 0.22, 0.5), Bump(0.414, 0.035, 1.0), Bump(0.586, 0.035, 1.0))
"""Along u: the face, the right eye, the left eye."""

ROOM_DOWN = (Bump(0.54, 0.17, 0.8), Bump(0.45, 0.025, 2.0), Bump(0.64, 0.04, 0.7))
"""Along v: the face, the eyes, the mouth."""

# One ring a row: v | front y, z | side y, z | back y, z | half width.
_RINGS = np.array(
    [
        (0.00, 0.124, 0.004, 0.131, -0.034, 0.121, -0.072, 0.000),
        (0.08, 0.117, 0.020, 0.123, -0.033, 0.112, -0.091, 0.032),
        (0.16, 0.104, 0.035, 0.106, -0.031, 0.093, -0.107, 0.056),
        (0.24, 0.085, 0.0455, 0.084, -0.029, 0.069, -0.116, 0.0695),
        (0.32, 0.063, 0.0515, 0.061, -0.026, 0.044, -0.119, 0.0755),
        (0.38, 0.044, 0.053, 0.042, -0.024, 0.024, -0.117, 0.0765),
        (0.45, 0.022, 0.0525, 0.021, -0.021, 0.003, -0.111, 0.0755),
        (0.52, 0.001, 0.054, 0.001, -0.018, -0.016, -0.102, 0.073),
        (0.58, -0.019, 0.0565, -0.018, -0.015, -0.034, -0.092, 0.0695),
        (0.64, -0.0385, 0.0565, -0.036, -0.012, -0.052, -0.084, 0.0655),
        (0.70, -0.058, 0.0535, -0.055, -0.010, -0.069, -0.080, 0.0595),
        (0.75, -0.0745, 0.046, -0.074, -0.014, -0.084, -0.079, 0.053),
        (0.79, -0.0845, 0.030, -0.086, -0.023, -0.097, -0.080, 0.0495),
        (0.83, -0.094, 0.011, -0.100, -0.032, -0.110, -0.083, 0.0500),
        (0.88, -0.114, 0.000, -0.119, -0.040, -0.126, -0.090, 0.055),
        (0.94, -0.143, -0.003, -0.143, -0.047, -0.144, -0.100, 0.080),
        (1.00, -0.188, 0.008, -0.182, -0.050, -0.178, -0.110, 0.130),
    ]
)
_PROFILES = CubicSpline(_RINGS[:, 0], _RINGS[:, 1:])


@dataclasses.dataclass(frozen=True)
class HeadShape:
    """What sets one neutral head apart from another; the defaults are the average head.

    Ratios multiply a length of the average head. Whatever the shape, a surface coordinate keeps
    its meaning: the corners of the mouth, say, have the same (u, v) on all heads.
    """

    width: float = 1.0  # of the skull
    height: float = 1.0  # of the whole head
    depth: float = 1.0  # front to back
    jaw: float = 1.0  # width of the lower face
    neck: float = 1.0  # width
    brow: float = 1.0  # ridge over the eyes
    cheek: float = 1.0  # cheekbones
    sockets: float = 1.0  # depth of the eye sockets
    nose_length: float = 1.0  # how far it stands out
    nose_width: float = 1.0
    nose_hook: float = 0.0  # height of a hump on its bridge, metres
    lips: float = 1.0  # fullness
    chin: float = 0.006  # how far it stands out, metres
    eye_spacing: float = 1.0
    eye_height: float = 0.0  # metres up
    mouth_width: float = 1.0
    mouth_height: float = 0.0  # metres up


class Mesh(NamedTuple):
    """Triangles with texture coordinates.

    Attributes:
      vertices: [V, 3] float64 metres in the head frame.
      uvs: [T, 2] float64 in the unit square; v is not flipped: texel row i is at v = (i + .5) / r.
      faces: [F, 3] int64 vertex numbers, counter-clockwise from outside.
      face_uvs: [F, 3] int64 numbers of the corners' texture coordinates.
    """

    vertices: np.ndarray
    uvs: np.ndarray
    faces: np.ndarray
    face_uvs: np.ndarray


def template_mesh(columns: int = 88, rows: int = 66) -> Mesh:
    """The average head, eyes and mouth closed, with ears, neck and the beginning of the shoulders.

    Its UV map fills the unit square, and its surface is nowhere further than 0.1 m from an
    ordinary hairdo.
    """
    u, v = np.meshgrid(np.linspace(0, 1, columns + 1), np.linspace(0, 1, rows + 1))
    points = head_surface(u, v)
    points += ear_swelling(points)
    # The last column is the first one again: one vertex, two texture coordinates.
    vertices = points[:, :columns].reshape(-1, 3)
    corner = np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)
    a, b = corner.ravel(), corner.ravel() + 1
    c, d = a + columns + 1, b + columns + 1
    face_uvs = np.stack([np.stack([a, c, d], -1), np.stack([a, d, b], -1)], 1).reshape(-1, 3)
    row, column = np.divmod(face_uvs, columns + 1)
    faces = row * columns + column % columns
    return Mesh(vertices, texture_coordinates(u, v).reshape(-1, 2), faces, face_uvs)


def texture_coordinates(u: Numbers, v: Numbers) -> Float[np.ndarray, "*n 2"]:
    """Where a surface coordinate lies on the template's UV map, which has more room for the face.

    As on FLAME's map, eyes get most: an eye's opening, 29 x 9 mm, is some 7 x 4 texels of the
    demo's 48 x 48, where an even map has 3 x 1; at the back of the head texels are a third wider.
    """

    def along(x: Numbers, bumps: tuple[Bump, ...]) -> Numbers:
        def room(x: Numbers) -> Numbers:
            """The integral from 0 to x of 1 and the bumps' Gaussians."""
            ends = [erf((x - b.middle) / b.reach) - erf(-b.middle / b.reach) for b in bumps]
            areas = [b.gain * b.reach * np.sqrt(np.pi) / 2 for b in bumps]
            return x + sum(area * end for area, end in zip(areas, ends, strict=True))

        return room(x) / room(np.ones(()))

    return np.stack([along(u, ROOM_ACROSS), along(v, ROOM_DOWN)], axis=-1)


def head_surface(
    u: Numbers, v: Numbers, shape: HeadShape | None = None
) -> Float[np.ndarray, "*n 3"]:
    """Points of a neutral head without ears at surface coordinates in [0, 1], eyes and lips closed.

    Periodic in u. Smooth everywhere but on the folded crown, where it is only continuous.
    """
    shape = HeadShape() if shape is None else shape
    theta = azimuth(u)
    sin, cos = np.sin(theta), np.cos(theta)
    front_y, front_z, side_y, side_z, back_y, back_z, width = np.moveaxis(_PROFILES(v), -1, 0)

    lower = smoothstep(0.46, 0.70, v) * (1 - smoothstep(0.76, 0.84, v))
    below = smoothstep(0.78, 0.86, v)
    skull = 1 - smoothstep(0.40, 0.80, v)
    wide = 1 + (shape.width - 1) * (1 - below) + (shape.jaw - 1) * lower
    wide = wide + (shape.neck - 1) * below * (1 - smoothstep(0.9, 1, v))
    deep = 1 + (shape.depth - 1) * skull
    tall = 1 + (shape.height - 1) * (1 - below)

    # Rounder than an ellipse, so that the cheeks and the back of the skull are full.
    full = 1 + (0.05 + 0.03 * skull) * np.sin(2 * theta) ** 2 * smoothstep(0.0, 0.3, v)
    x = width * sin * full
    y = side_y + (front_y - back_y) / 2 * cos + ((front_y + back_y) / 2 - side_y) * cos**2
    front, back = front_z - side_z, (back_z - side_z) * deep
    z = side_z + full * ((front - back) / 2 * cos + (front + back) / 2 * cos**2)
    face = smoothstep(0.15, 0.55, cos)
    z = z + _relief(x, y, shape) * face
    x, y = _move_features(x, y, face, shape)
    return np.stack([wide * x, tall * y, z], axis=-1)


def azimuth(u: Numbers) -> Numbers:
    """Angle round the head at coordinate u, radians: 0 at the face, pi/2 at the left ear."""
    phi = 2 * np.pi * (u - 0.5)
    return phi - FRONT_DENSITY * np.sin(phi)


def ear_swelling(points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """Displacement that raises smooth ears on a head's sides; the template's stand-in for ears."""
    x, y, z = np.moveaxis(points, -1, 0)
    swell = np.exp(-(((y - 0.004) / 0.021) ** 4) - ((z + 0.022) / 0.013) ** 2)
    out = np.stack([np.sign(x) * 0.014 * swell, 0 * y, -0.004 * swell], axis=-1)
    return out * (np.abs(x) > 0.03)[..., None]


def smoothstep(start: float, end: float, x: Numbers) -> Numbers:
    """0 up to `start`, 1 from `end` on, a smooth cubic between."""
    t = np.clip((x - start) / (end - start), 0, 1)
    return t * t * (3 - 2 * t)


def _move_features(
    x: Numbers, y: Numbers, face: Numbers, shape: HeadShape
) -> tuple[Numbers, Numbers]:
    """Slides eyes and mouth over the face, the skin round them coming along."""
    eyes = face * np.exp(-(((np.abs(x) - EYE_OFFSET) / 0.02) ** 2) - ((y - 0.03) / 0.02) ** 2)
    mouth = face * np.exp(-((x / 0.035) ** 2) - ((y - MOUTH_HEIGHT) / 0.016) ** 2)
    dx = np.sign(x) * EYE_OFFSET * (shape.eye_spacing - 1) * eyes
    dx = dx + x * (shape.mouth_width - 1) * mouth
    return x + dx, y + shape.eye_height * eyes + shape.mouth_height * mouth


def _relief(x: Numbers, y: Numbers, shape: HeadShape) -> Numbers:
    """How far the face stands out (+z) of its rings at (x, y): sockets, nose, lips, chin."""
    side = np.abs(x)

    def bump(cx: float, cy: float, sx: float, sy: float) -> Numbers:
        return np.exp(-(((side - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)

    sockets = -0.0075 * shape.sockets * bump(EYE_OFFSET - 0.003, 0.024, 0.017, 0.0115)
    brow = 0.0040 * shape.brow * bump(0.026, 0.043, 0.022, 0.0085)
    cheek = 0.0040 * shape.cheek * bump(0.043, -0.004, 0.016, 0.016)

    # The nose rises from the bridge to the tip and drops to the lip; its ridge widens on the way.
    rise = smoothstep(0.036, -0.012, y)
    drop = smoothstep(-0.0245, -0.0075, y)
    ridge = (0.0062 + 0.0055 * rise) * shape.nose_width
    nose = 0.0262 * shape.nose_length * rise * drop * np.exp(-(np.abs(side / ridge) ** 2.1))
    hump = shape.nose_hook * bump(0, 0.008, 0.008, 0.010)
    wings = 0.0075 * bump(0.0125 * shape.nose_width, -0.0135, 0.0055, 0.0065)

    # The lips run together at the mouth's corners.
    mouth = 0.0040 * bump(0, -0.037, 0.026, 0.018)
    open_ = np.sqrt(np.clip(1 - (side / MOUTH_WIDTH) ** 2, 0, 1))
    line = y - MOUTH_HEIGHT
    upper = 0.0036 * np.exp(-(((line - 0.0052 * open_) / 0.0042) ** 2))
    lower = 0.0046 * np.exp(-(((line + 0.0060 * open_) / 0.0050) ** 2))
    lips = shape.lips * (upper + lower) * open_ - 0.0015 * bump(
        MOUTH_WIDTH, MOUTH_HEIGHT, 4e-3, 4e-3
    )
    groove = -0.0035 * bump(0, -0.055, 0.022, 0.006)
    chin = shape.chin * bump(0, -0.069, 0.019, 0.013)
    return sockets + brow + cheek + nose + hump + wings + mouth + lips + groove + chin

"""The mesh that all procedural people share: skin that opens at lips and lids, mouth, eyes, ears.

The skin is a grid over the surface coordinates of `head_mesh`, slit open along the lips and along
each pair of lids: both sides of a slit have vertices of their own, which meet while it is closed.
Behind the slits lie a mouth with two rows of teeth, and two eyeballs. Numbers of vertices and
faces, texture coordinates and the fields that expressions move are the same for everybody; only
positions differ. Hair, which is a person's own, is in `hair`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from jaxtyping import Float

from data_pipelines.head_mesh import (
    EYE_OFFSET,
    MOUTH_WIDTH,
    HeadShape,
    azimuth,
    head_surface,
)
from data_pipelines.procedural import atlas

EYE_RADIUS, EYE_BULGE, EYE_WIDTH = 0.0145, 0.0045, 0.0145
"""Metres: of an eyeball; how far it stands out of the closed socket; half the opening's width."""

LID_THICKNESS = 0.0010
EYE_ROW, MOUTH_ROW = 0.45, 0.64
"""Surface coordinate v of the rings on which the lids and the lips meet."""

JAW_JOINT = np.array([0.0, 0.0, -0.018])
NECK_JOINT = np.array([0.0, -0.095, -0.045])


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """Everything about the shared mesh but positions. V vertices, F faces.

    Attributes:
      u, v: [V] surface coordinates to which a vertex is attached.
      rest: [V, 3] where that is on the average head: the coordinates in which fields are defined.
      side: [V] +1 above the line of the lips or lids, -1 below, 0 in the depth of the mouth.
      offset: [V, 3] metres from the attachment, for what lies inside.
      uvs: [V, 2] atlas coordinates.
      faces: [F, 3].
      two_sided: [F] bool.
      twins: [V] number of the vertex with which this one shares its normal (usually itself).
      skin: slice of the skin's vertices.
      teeth: slices of the upper and the lower row of teeth, rigid with the skull and the jaw.
      eyes: slices of the left and the right eyeball; `offset` is from the eyeball's centre.
      ears: slices of the left and the right ear.
      sockets: slices of what is seen past the left and the right eyeball, at the lids' corners.
    """

    u: np.ndarray
    v: np.ndarray
    rest: np.ndarray
    side: np.ndarray
    offset: np.ndarray
    uvs: np.ndarray
    faces: np.ndarray
    two_sided: np.ndarray
    twins: np.ndarray
    skin: slice
    teeth: tuple[slice, slice]
    eyes: tuple[slice, slice]
    ears: tuple[slice, slice]
    sockets: tuple[slice, slice]


def surface_u(theta: np.ndarray) -> np.ndarray:
    """The surface coordinate u at an angle round the head; the inverse of `head_mesh.azimuth`."""
    u = np.linspace(-0.5, 1.5, 4001)
    return np.interp(theta, azimuth(u), u)


def sheet(rows: int, columns: int) -> np.ndarray:
    """[F, 3] faces of a grid of vertices numbered row by row, seen with row 0 on top."""
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    a, b, c, d = corner, corner + 1, corner + columns, corner + columns + 1
    return np.concatenate([np.stack([a, c, d], -1), np.stack([a, d, b], -1)])


def _closed(rows: int, columns: int) -> np.ndarray:
    """Twins of a sheet's vertices whose last column lies on its first, and first row on a point."""
    grid = np.arange(rows * columns).reshape(rows, columns)
    grid[:, -1] = grid[:, 0]
    grid[0] = 0
    return grid.ravel()


def neutral_vertices(
    shape: HeadShape, ear_size: float, ears_out: float
) -> Float[np.ndarray, "v 3"]:
    """A person's vertices at rest: lips and lids closed, eyes straight ahead; metres, head frame.

    `ear_size` and `ears_out`, how far the ears stand off, are ratios to the average.
    """
    a = anatomy()
    vertices = head_surface(a.u, a.v, shape) + a.offset
    skin = vertices[a.skin]
    cap = a.v[a.skin] >= 1
    skin[cap & (a.side[a.skin] == 0)] = skin[cap].mean(axis=0)
    for part in a.ears:
        vertices[part] += a.offset[part] * [ears_out - 1, ear_size - 1, ear_size - 1]
    return vertices


def eye_centers(shape: HeadShape) -> Float[np.ndarray, "2 3"]:
    """Centres of the left and the right eyeball."""
    u = _u_at(EYE_ROW, EYE_OFFSET)
    sockets = head_surface(np.array([u, 1 - u]), np.full(2, EYE_ROW), shape)
    return sockets - [0, 0, EYE_RADIUS - EYE_BULGE]


@functools.cache
def anatomy() -> Anatomy:
    """The shared mesh."""
    parts = [_skin(), _mouth(), _teeth(+1), _teeth(-1)]
    parts += [_eyeball(+1), _eyeball(-1), _ear(+1), _ear(-1), _socket(+1), _socket(-1)]
    start, slices, faces, twins = 0, [], [], []
    for part in parts:
        n = len(part["u"])
        slices.append(slice(start, start + n))
        faces.append(part["faces"] + start)
        twins.append(part.get("twins", np.arange(n)) + start)
        start += n

    def joined(name: str) -> np.ndarray:
        return np.concatenate([part[name] for part in parts])

    u, v = joined("u"), joined("v")
    return Anatomy(
        u=u,
        v=v,
        rest=head_surface(u, v),
        side=joined("side"),
        offset=joined("offset"),
        uvs=joined("uvs"),
        faces=np.concatenate(faces),
        two_sided=np.concatenate(
            [np.full(len(part["faces"]), part["two_sided"]) for part in parts]
        ),
        twins=np.concatenate(twins),
        skin=slices[0],
        teeth=(slices[2], slices[3]),
        eyes=(slices[4], slices[5]),
        ears=(slices[6], slices[7]),
        sockets=(slices[8], slices[9]),
    )


@functools.cache
def _columns() -> np.ndarray:
    """u of the skin's columns: every 2 mm in the face, wider to the back."""
    face = np.linspace(0, 0.72, 31)
    # Steps grow evenly from the face's to the back's.
    step = np.linspace(face[1], 0.14, 24)
    half = surface_u(np.concatenate([face, 0.72 + np.cumsum(step) * (np.pi - 0.72) / step.sum()]))
    half[0], half[-1] = 0.5, 1
    # The corners of mouth and eyes must lie on a column.
    inner, outer = EYE_OFFSET - EYE_WIDTH, EYE_OFFSET + EYE_WIDTH
    for row, x in [(MOUTH_ROW, MOUTH_WIDTH), (EYE_ROW, inner), (EYE_ROW, outer)]:
        corner = _u_at(row, x)
        half[np.argmin(np.abs(half - corner))] = corner
    return np.concatenate([1 - half[:0:-1], half])


@functools.cache
def _u_at(row: float, x: float) -> float:
    """u in the left half of the average face at which a ring passes x."""
    u = np.linspace(0.5, 0.72, 4001)
    return float(np.interp(x, head_surface(u, np.full_like(u, row))[:, 0], u))


def _rows() -> np.ndarray:
    """v of the skin's rows: through the lines of eyes and mouth, close together in the face."""
    stops = [
        np.linspace(0.0, 0.36, 15),
        np.linspace(0.36, EYE_ROW, 15),
        np.linspace(EYE_ROW, 0.51, 10),
        np.linspace(0.51, MOUTH_ROW, 19),
        np.linspace(MOUTH_ROW, 0.72, 12),
        np.linspace(0.72, 0.82, 9),
        np.linspace(0.82, 1.0, 10),
    ]
    return np.concatenate([stops[0]] + [s[1:] for s in stops[1:]])


def _slits() -> list[tuple[int, int, int]]:
    """Row, first and last column of the mouth's slit, the left eye's and the right eye's."""
    u, v = _columns(), _rows()

    def column(row: float, x: float) -> int:
        at = _u_at(row, abs(x))
        return int(np.argmin(np.abs(u - (at if x > 0 else 1 - at))))

    def slit(row: float, right: float, left: float) -> tuple[int, int, int]:
        return int(np.argmin(np.abs(v - row))), column(row, right), column(row, left)

    inner, outer = EYE_OFFSET - EYE_WIDTH, EYE_OFFSET + EYE_WIDTH
    return [
        slit(MOUTH_ROW, -MOUTH_WIDTH, MOUTH_WIDTH),
        slit(EYE_ROW, inner, outer),
        slit(EYE_ROW, -outer, -inner),
    ]


def _skin() -> dict[str, np.ndarray]:
    """The skin's grid, a last row closing the shoulders from below."""
    u, v = _columns(), np.append(_rows(), 1.0)
    rows, columns = len(v), len(u)
    above = np.arange(rows * columns).reshape(rows, columns)
    below = above.copy()
    duplicates = []
    for row, first, last in _slits():
        inside = above[row, first + 1 : last]
        below[row, first + 1 : last] = rows * columns + len(duplicates) + np.arange(len(inside))
        duplicates += inside.tolist()

    eye_row, mouth_row = _slits()[1][0], _slits()[0][0]
    side = np.where(np.arange(rows) <= eye_row, 1, -1)
    # Between the eyes and the mouth "above" means the mouth's line; fields of the lids look at
    # heights, and only on the slit itself need the side.
    between = (np.arange(rows) > eye_row) & (np.arange(rows) <= mouth_row)
    side[between] = 1
    side[-1] = 0
    side = np.repeat(side[:, None], columns, axis=1)
    uu, vv = np.meshgrid(u, v)

    a, b = below[:-1, :-1].ravel(), below[:-1, 1:].ravel()
    c, d = above[1:, :-1].ravel(), above[1:, 1:].ravel()
    faces = np.concatenate([np.stack([a, c, d], -1), np.stack([a, d, b], -1)])

    def with_duplicates(grid: np.ndarray) -> np.ndarray:
        return np.concatenate([grid.ravel(), grid.ravel()[duplicates]])

    twins = above.copy()
    twins[:, -1] = above[:, 0]
    # The crown's fold: u and 1 - u are one point.
    twins[0] = np.minimum(above[0], above[0, ::-1])
    side = np.concatenate([side.ravel(), np.full(len(duplicates), -1)])
    count = len(side)
    return {
        "u": with_duplicates(uu),
        "v": with_duplicates(vv),
        "side": side,
        "offset": np.zeros((count, 3)),
        "uvs": atlas.place("skin", with_duplicates(uu), with_duplicates(vv)),
        "faces": faces,
        "two_sided": np.array(False),
        "twins": np.concatenate([twins.ravel(), np.arange(rows * columns, count)]),
    }


def _mouth() -> dict[str, np.ndarray]:
    """A pocket from the edge of the upper lip into the dark and back to the lower lip's."""
    _, first, last = _slits()[0]
    u = _columns()[first : last + 1]
    n = len(u)
    x = head_surface(u, np.full(n, MOUTH_ROW))[:, 0]
    #          side, into the mouth: up, forward, share of the width kept
    layers = [(1, 0, 0, 1), (1, 0.003, -0.006, 0.97), (0, 0.0, -0.038, 0.7)]
    layers += [(-1, -0.003, -0.006, 0.97), (-1, 0, 0, 1)]
    # The pocket narrows to nothing at the corners of the mouth.
    deep = np.sqrt(np.clip(1 - (x / x[-1]) ** 2, 0, 1))
    offset = [np.stack([x * (k - 1), y * deep, z * deep], -1) for _, y, z, k in layers]
    uv_x, uv_y = np.meshgrid(np.linspace(0, 1, n), np.linspace(0, 1, len(layers)))
    return {
        "u": np.tile(u, len(layers)),
        "v": np.full(n * len(layers), MOUTH_ROW),
        "side": np.repeat([s for s, *_ in layers], n),
        "offset": np.concatenate(offset),
        "uvs": atlas.place("mouth", uv_x.ravel(), uv_y.ravel()),
        "faces": sheet(len(layers), n)[:, ::-1],
        "two_sided": np.array(True),
    }


def _teeth(side: int) -> dict[str, np.ndarray]:
    """A row of teeth on an arch behind the lips: +1 the upper, -1 the lower one."""
    x, s = np.meshgrid(np.linspace(-0.019, 0.019, 17), np.linspace(0, 1, 3))
    y = 0.008 - 0.0085 * s if side > 0 else -0.0025 - 0.0075 * s
    y = y + 8 * x**2  # the row rises to the sides, as lips do
    z = -0.0075 - (0.0 if side > 0 else 0.0015) - 28 * x**2
    n = x.size
    return {
        "u": np.full(n, 0.5),
        "v": np.full(n, MOUTH_ROW),
        "side": np.full(n, side),
        "offset": np.stack([x, y, z], -1).reshape(-1, 3),
        "uvs": atlas.place("teeth", (x / 0.038 + 0.5).ravel(), (s if side > 0 else 1 - s).ravel()),
        "faces": sheet(3, 17),
        "two_sided": np.array(True),
    }


def _eyeball(side: int) -> dict[str, np.ndarray]:
    """The front cap of an eyeball, its texture a disc round the line of sight; +1 the left."""
    angle, turn = np.meshgrid(
        np.linspace(0, 1.45, 12), np.linspace(0, 2 * np.pi, 25), indexing="ij"
    )
    direction = np.stack(
        [np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn), np.cos(angle)], -1
    )
    radius = angle / angle.max() / 2
    left = _u_at(EYE_ROW, EYE_OFFSET)
    u = left if side > 0 else 1 - left
    n = angle.size
    return {
        "u": np.full(n, u),
        "v": np.full(n, EYE_ROW),
        "side": np.zeros(n, int),
        "offset": EYE_RADIUS * direction.reshape(-1, 3) - [0, 0, EYE_RADIUS - EYE_BULGE],
        "uvs": atlas.place(
            "eye", 0.5 + (radius * np.cos(turn)).ravel(), 0.5 - (radius * np.sin(turn)).ravel()
        ),
        "faces": sheet(12, 25),
        "two_sided": np.array(False),
        "twins": _closed(12, 25),
    }


def _socket(side: int) -> dict[str, np.ndarray]:
    """A fold from the upper lid's edge into the socket and out to the lower lid's; +1 the left."""
    _, first, last = _slits()[1 if side > 0 else 2]
    u = _columns()[first : last + 1]
    n = len(u)
    across = np.linspace(-1, 1, n)
    depth = np.stack([0 * u, 0 * u, -0.012 * np.sqrt(1 - across**2) - 0.0005], -1)
    edge = np.zeros((n, 3))
    return {
        "u": np.tile(u, 3),
        "v": np.full(3 * n, EYE_ROW),
        "side": np.repeat([1, 0, -1], n),
        "offset": np.concatenate([edge, depth, edge]),
        "uvs": atlas.place("eye", np.tile(0.5 + 0.3 * across, 3), np.full(3 * n, 0.98)),
        "faces": sheet(3, n),
        "two_sided": np.array(True),
    }


def _ear(side: int) -> dict[str, np.ndarray]:
    """An ear: a bowl with a rolled rim, its front edge on the head; +1 the left one."""
    rings, spokes = 8, 29
    r, turn = np.meshgrid(
        np.linspace(0, 1, rings), np.linspace(0, 2 * np.pi, spokes), indexing="ij"
    )
    back, up = -np.cos(turn), np.sin(turn)
    # Wide above, narrow at the lobe.
    height = 0.031 * up
    width = 0.0165 + 0.0035 * up
    lean = -0.006 * up  # the top leans backward
    z = -(back * width * r) + lean * r - 0.009
    y = height * r
    # Stands off the head towards the back; the rim rises and its last ring folds down to the head.
    depth_backward = np.clip(-z / 0.028, -0.2, 1)
    rim = np.exp(-(((r - 0.82) / 0.12) ** 2)) * (0.6 + 0.4 * back)
    bowl = -np.exp(-((r / 0.45) ** 2))
    x = 0.0005 + 0.013 * depth_backward + 0.0035 * rim + 0.005 * bowl
    x = np.where(r > 0.97, x - 0.004, x)
    u = surface_u(np.array(1.45))
    n = r.size
    faces = sheet(rings, spokes)
    return {
        "u": np.full(n, u if side > 0 else 1 - u),
        "v": np.full(n, 0.505),
        "side": np.zeros(n, int),
        "offset": np.stack([side * x, y, z], -1).reshape(-1, 3),
        "uvs": atlas.place("ear", (0.5 - back * r / 2).ravel(), (0.5 - up * r / 2).ravel()),
        "faces": faces if side > 0 else faces[:, ::-1],
        "two_sided": np.array(True),
        "twins": _closed(rings, spokes),
    }

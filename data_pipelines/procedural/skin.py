"""The skin of procedural people: a grid round the head, slit open along the lips and the lids.

Both sides of a slit have vertices of their own, which meet while it is closed.
"""

from __future__ import annotations

import functools

import numpy as np

from data_pipelines.head_mesh import EYE_OFFSET, MOUTH_WIDTH, Numbers, azimuth, head_surface
from data_pipelines.procedural import atlas

EYE_ROW, MOUTH_ROW = 0.45, 0.64
"""Surface coordinate v of the rings on which the lids and the lips meet."""

EYE_WIDTH = 0.0145
"""Metres, half the width of an eye's opening."""


def surface_u(theta: Numbers) -> Numbers:
    """The surface coordinate u at an angle round the head; the inverse of `head_mesh.azimuth`."""
    u = np.linspace(-0.5, 1.5, 4001)
    return np.interp(theta, azimuth(u), u)


def sheet(rows: int, columns: int) -> np.ndarray:
    """[F, 3] faces of a grid of vertices numbered row by row, seen with row 0 on top."""
    corner = (np.arange(rows - 1)[:, None] * columns + np.arange(columns - 1)).ravel()
    a, b, c, d = corner, corner + 1, corner + columns, corner + columns + 1
    return np.concatenate([np.stack([a, c, d], -1), np.stack([a, d, b], -1)])


@functools.cache
def skin_columns() -> np.ndarray:
    """u of the skin's columns: every 2 mm in the face, wider to the back."""
    face = np.linspace(0, 0.72, 31)
    # Steps grow evenly from the face's to the back's.
    step = np.linspace(face[1], 0.14, 24)
    half = surface_u(np.concatenate([face, 0.72 + np.cumsum(step) * (np.pi - 0.72) / step.sum()]))
    half[0], half[-1] = 0.5, 1
    # The corners of mouth and eyes must lie on a column.
    inner, outer = EYE_OFFSET - EYE_WIDTH, EYE_OFFSET + EYE_WIDTH
    for row, x in [(MOUTH_ROW, MOUTH_WIDTH), (EYE_ROW, inner), (EYE_ROW, outer)]:
        corner = u_at(row, x)
        half[np.argmin(np.abs(half - corner))] = corner
    return np.concatenate([1 - half[:0:-1], half])


@functools.cache
def u_at(row: float, x: float) -> float:
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


def slits() -> list[tuple[int, int, int]]:
    """Row, first and last column of the mouth's slit, the left eye's and the right eye's."""
    u, v = skin_columns(), _rows()

    def column(row: float, x: float) -> int:
        at = u_at(row, abs(x))
        return int(np.argmin(np.abs(u - (at if x > 0 else 1 - at))))

    def slit(row: float, right: float, left: float) -> tuple[int, int, int]:
        return int(np.argmin(np.abs(v - row))), column(row, right), column(row, left)

    inner, outer = EYE_OFFSET - EYE_WIDTH, EYE_OFFSET + EYE_WIDTH
    return [
        slit(MOUTH_ROW, -MOUTH_WIDTH, MOUTH_WIDTH),
        slit(EYE_ROW, inner, outer),
        slit(EYE_ROW, -outer, -inner),
    ]


def skin() -> dict[str, np.ndarray]:
    """The skin's grid, a last row closing the shoulders from below."""
    u, v = skin_columns(), np.append(_rows(), 1.0)
    rows, columns = len(v), len(u)
    above = np.arange(rows * columns).reshape(rows, columns)
    below = above.copy()
    duplicates = []
    for row, first, last in slits():
        inside = above[row, first + 1 : last]
        below[row, first + 1 : last] = rows * columns + len(duplicates) + np.arange(len(inside))
        duplicates += inside.tolist()

    eye_row, mouth_row = slits()[1][0], slits()[0][0]
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

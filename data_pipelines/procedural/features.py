"""What lies behind the slits of the skin and beside it: mouth, teeth, eyeballs, sockets, ears.

Each function returns a part of the mesh, with the fields of `anatomy.Anatomy` that it has.
"""

from __future__ import annotations

import numpy as np

from data_pipelines.head_mesh import EYE_OFFSET, head_surface
from data_pipelines.procedural import atlas
from data_pipelines.procedural.skin import (
    EYE_ROW,
    MOUTH_ROW,
    sheet,
    skin_columns,
    slits,
    surface_u,
    u_at,
)

EYE_RADIUS, EYE_BULGE = 0.0145, 0.0045
"""Metres: of an eyeball; how far it stands out of the closed socket."""


def mouth() -> dict[str, np.ndarray]:
    """A pocket from the edge of the upper lip into the dark and back to the lower lip's."""
    _, first, last = slits()[0]
    u = skin_columns()[first : last + 1]
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


def teeth(side: int) -> dict[str, np.ndarray]:
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


def eyeball(side: int) -> dict[str, np.ndarray]:
    """The front cap of an eyeball, its texture a disc round the line of sight; +1 the left."""
    angle, turn = np.meshgrid(
        np.linspace(0, 1.45, 12), np.linspace(0, 2 * np.pi, 25), indexing="ij"
    )
    direction = np.stack(
        [np.sin(angle) * np.cos(turn), np.sin(angle) * np.sin(turn), np.cos(angle)], -1
    )
    radius = angle / angle.max() / 2
    left = u_at(EYE_ROW, EYE_OFFSET)
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


def socket(side: int) -> dict[str, np.ndarray]:
    """A fold from the upper lid's edge into the socket and out to the lower lid's; +1 the left."""
    _, first, last = slits()[1 if side > 0 else 2]
    u = skin_columns()[first : last + 1]
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


def ear(side: int) -> dict[str, np.ndarray]:
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


def _closed(rows: int, columns: int) -> np.ndarray:
    """Twins of a sheet's vertices whose last column lies on its first, and first row on a point."""
    grid = np.arange(rows * columns).reshape(rows, columns)
    grid[:, -1] = grid[:, 0]
    grid[0] = 0
    return grid.ravel()

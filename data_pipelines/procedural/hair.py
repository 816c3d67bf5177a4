"""Geometry of hair: a shell over the scalp that may hang below it, and what is tied at the back.

The shell has the coordinates of the head's surface: the angle round the head, and a distance tau
from the crown that equals v on the scalp and goes on straight down from the hanging line.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from data_pipelines.head_mesh import HeadShape, head_surface, smoothstep
from data_pipelines.procedural import atlas
from data_pipelines.procedural.noise import waves
from data_pipelines.procedural.person import Hair, Person
from data_pipelines.procedural.skin import sheet, surface_u

HANGING_LINE = 0.37
"""tau from which long hair no longer follows the head."""

DROP = 0.5
"""Metres of height a unit of tau is worth below the hanging line."""

_CENTER = np.array([0.0, 0.01, -0.032])
"""Hair stands off the scalp away from here."""


class HairMesh(NamedTuple):
    """Triangles of hair and of what holds it, all seen from both sides."""

    vertices: np.ndarray
    uvs: np.ndarray
    faces: np.ndarray
    twins: np.ndarray


def hair_mesh(person: Person) -> HairMesh:
    """A person's hair; without vertices for the bald and the shorn."""
    parts = []
    if person.hair.shell:
        parts.append(_shell(person))
    parts += _tail(person)
    if not parts:
        return HairMesh(np.zeros((0, 3)), np.zeros((0, 2)), np.zeros((0, 3), int), np.zeros(0, int))
    starts = np.cumsum([0] + [len(part.vertices) for part in parts[:-1]])
    return HairMesh(
        np.concatenate([part.vertices for part in parts]),
        np.concatenate([part.uvs for part in parts]),
        np.concatenate([part.faces + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.twins + start for part, start in zip(parts, starts, strict=True)]),
    )


def covers_ears(hair: Hair) -> bool:
    """Whether hair hangs over the ears."""
    return hair.shell and hair.length > 0.02


def hairline(theta: np.ndarray, hair: Hair, undercut: float = 1.0) -> np.ndarray:
    """tau at which hair ends that grows on the scalp, at angles round the head (radians).

    Sides and back are shaved from tau `undercut` down.
    """
    side = np.degrees(np.abs(theta))
    recede = hair.front - hair.temples
    knots = [0, 25, 44, 58, 68, 76, 86, 104, 118, 138, 160, 180]
    ends = [hair.front, hair.front - 0.004, recede + 0.012, 0.34, 0.44, 0.475, 0.425, 0.425]
    ends += [0.55, 0.655, 0.695, 0.70]
    line = PchipInterpolator(knots, ends)(side)
    line = line - 0.012 * np.exp(-(((theta - hair.part) / 0.22) ** 2))
    shaved = smoothstep(55, 75, side)
    return (1 - shaved) * line + shaved * np.minimum(line, undercut)


def ends(theta: np.ndarray, person: Person) -> np.ndarray:
    """tau at which the shell ends: at the hairline, over the forehead, or where hair is cut."""
    hair, back = person.hair, person.back
    side = np.degrees(np.abs(theta))
    front = 1 - smoothstep(40, 62, side)
    end = hairline(theta, hair, back.undercut) + hair.fringe * front
    if hair.length > 0:
        longer = hair.length + back.longer * smoothstep(120, 165, side)
        hanging = smoothstep(46, 64, side)
        end = (1 - hanging) * end + hanging * (HANGING_LINE + longer / DROP)
    return end


def _shell(person: Person) -> HairMesh:
    """The sheet of hair, rows from the crown to where it ends, columns round the head."""
    hair = person.hair
    rng = np.random.default_rng([person.texture_seed, 1])
    columns, rows = 97, 30
    # Columns gather where the hair opens to show the face, rows at the rim, which is round.
    t = np.linspace(-1, 1, columns)
    theta = np.pi * (t - 0.35 / (2 * np.pi) * np.sin(4 * np.pi * t) * (np.abs(t) < 0.5))
    s = np.linspace(0, 1, rows)
    s = s + 0.24 * np.sin(2 * np.pi * s) / (2 * np.pi)

    end = ends(theta, person)
    ragged = waves(np.stack([np.cos(theta), np.sin(theta)], -1), rng, 0.35)
    if hair.length > 0 or hair.fringe > 0:
        end = end + (0.006 + 0.5 * hair.curl) * ragged
    hangs = smoothstep(0, 0.06, end - HANGING_LINE) * (hair.length > 0)
    tau = s[:, None] * end
    theta = np.broadcast_to(theta, tau.shape)
    u = surface_u(theta)

    base = _inside(u, tau, hangs, person)
    out = base - _CENTER
    out[..., 1] *= 1 - smoothstep(0.2, 0.5, tau)
    out /= np.linalg.norm(out, axis=-1, keepdims=True)
    # The rim closes on the skin, unless it hangs free.
    rim = np.maximum(np.sqrt(np.clip(1 - s**6, 0, 1))[:, None], hangs)
    off = _thickness(base, tau, theta, hair, rng) * (0.06 + 0.94 * rim) + 0.0005
    points = base + out * off[..., None]

    grid = np.arange(tau.size).reshape(tau.shape)
    twins = grid.copy()
    twins[:, -1] = grid[:, 0]
    twins[0] = np.minimum(grid[0], grid[0, ::-1])
    return HairMesh(
        points.reshape(-1, 3),
        atlas.place("hair", u.ravel(), np.clip(tau, 0, 1).ravel()),
        sheet(rows, columns),
        twins.ravel(),
    )


def _inside(u: np.ndarray, tau: np.ndarray, hangs: np.ndarray, person: Person) -> np.ndarray:
    """The shell's inner surface: the scalp, and where hair hangs a curtain below it."""
    scalp = head_surface(u, np.minimum(tau, 1.0), person.shape)
    curtain = head_surface(u, np.minimum(tau, HANGING_LINE), person.shape)
    drop = DROP * np.maximum(tau - HANGING_LINE, 0)
    spread = 1 + person.hair.flare * np.sqrt(np.minimum(drop / 0.12, 1.5))
    curtain = curtain * np.stack([spread, np.ones_like(drop), spread], -1)
    curtain[..., 1] -= drop
    return hangs[:, None] * curtain + (1 - hangs[:, None]) * scalp


def _thickness(
    base: np.ndarray, tau: np.ndarray, theta: np.ndarray, hair: Hair, rng: np.random.Generator
) -> np.ndarray:
    """Metres from the shell's inner to its outer surface."""
    sideways = smoothstep(0.10, 0.30, tau) * smoothstep(35, 70, np.degrees(np.abs(theta)))
    thickness = hair.thickness * (1 + (hair.sides - 1) * sideways)
    thickness = thickness + _top(base, tau, theta, hair)
    if hair.curl > 0:
        locks = waves(base, rng, 0.024, 12) + 0.6 * waves(base, rng, 0.012, 12)
        return thickness + hair.curl * np.clip(locks, -1.2, 1.6)
    return thickness * (1 + 0.10 * waves(base, rng, 0.06))


def _top(base: np.ndarray, tau: np.ndarray, theta: np.ndarray, hair: Hair) -> np.ndarray:
    """Metres that styles add on the crown."""
    if hair.style == "mohawk":
        ridge = np.exp(-((base[..., 0] / 0.016) ** 4))
        return hair.top * ridge * (1 - smoothstep(0.15, 0.60, tau))
    forward = 0.75 + 0.25 * np.cos(theta - hair.part)
    return hair.top * (1 - smoothstep(0.08, 0.30, tau)) * forward


def _tail(person: Person) -> list[HairMesh]:
    """What is tied at the back, each with its tie."""
    shape, size = person.shape, person.back.tail_size
    thick = person.hair.thickness
    tail = person.back.tail
    if tail == "none" or not person.hair.shell:
        return []
    if tail in ("ponytail", "high ponytail"):
        v = 0.44 if tail == "ponytail" else 0.18
        root, out = _anchor(np.pi, v, shape, thick)
        along = np.linspace(0, 1, 16)[:, None]
        length = 0.13 * size + (0.04 if tail == "high ponytail" else 0)
        arch = np.sin(np.minimum(along * 3, 1) * np.pi / 2)
        path = root + out * 0.035 * arch + [0, 0.012, 0] * np.sin(along * 3).clip(0)
        path = path - np.array([0, length, 0]) * along**1.4
        radius = 0.011 + 0.014 * np.sin(np.pi * np.clip(along[:, 0] * 1.15, 0, 1)) ** 0.7
        radius = size * radius * np.sqrt(np.clip(1.02 - along[:, 0] ** 6, 0, 1))
        return [_tube(path, radius, "hair"), _tie(path[0] + out * 0.004, out, 0.015 * size)]
    if tail in ("bun", "low bun", "topknot"):
        theta, v = {"bun": (np.pi, 0.20), "low bun": (np.pi, 0.55), "topknot": (0.0, 0.0)}[tail]
        root, out = _anchor(theta, v, shape, thick)
        if tail == "topknot":
            root, out = root - [0, 0, 0.03], np.array([0, 0.95, -0.3])
        radius = (0.024 if tail == "topknot" else 0.030) * size
        center = root + out * radius * 0.75
        return [_ball(center, out, radius), _tie(root + out * 0.004, out, radius * 0.75)]
    parts = []
    for side in (1, -1):
        root, out = _anchor(side * 2.25, 0.56, shape, thick)
        along = np.linspace(0, 1, 25)[:, None]
        path = root + out * 0.012 * np.sin(np.minimum(along * 4, 1) * np.pi / 2)
        path = path + [side * 0.02, -0.10 * size, 0.035] * along
        radius = size * (0.011 + 0.0028 * np.abs(np.sin(along[:, 0] * 6 * np.pi)))
        radius *= np.sqrt(np.clip(1.02 - along[:, 0] ** 8, 0, 1))
        down = path[-4] - path[-5]
        parts += [_tube(path, radius, "hair"), _tie(path[-4], down, 0.011 * size)]
    return parts


def _anchor(
    theta: float, v: float, shape: HeadShape, thickness: float
) -> tuple[np.ndarray, np.ndarray]:
    """A point on the hair, and the direction in which it looks."""
    point = head_surface(surface_u(np.array(theta)), np.array(v), shape)
    out = (point - _CENTER) / np.linalg.norm(point - _CENTER)
    return point + thickness * out, out


def _frame(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two unit vectors across a direction."""
    direction = direction / np.linalg.norm(direction)
    a = np.cross(direction, [0.9, 0.1, 0.43])
    a /= np.linalg.norm(a)
    return a, np.cross(direction, a)


def _tube(path: np.ndarray, radius: np.ndarray, part: str, sides: int = 15) -> HairMesh:
    """A closed tube about a path [n, 3]; its last ring should be thin."""
    tangent = np.gradient(path, axis=0)
    turn = np.linspace(0, 2 * np.pi, sides)
    across = np.array([_frame(t) for t in tangent])
    ring = np.cos(turn)[:, None] * across[:, None, 0] + np.sin(turn)[:, None] * across[:, None, 1]
    points = path[:, None] + radius[:, None, None] * ring
    x, y = np.meshgrid(turn / (2 * np.pi), np.linspace(0, 1, len(path)))
    if part == "hair":  # texels of the plain hair behind the left ear
        x, y = 0.80 + 0.14 * x, 0.15 + 0.5 * y
    grid = np.arange(x.size).reshape(x.shape)
    twins = grid.copy()
    twins[:, -1] = grid[:, 0]
    faces = sheet(*x.shape)[:, ::-1]
    return HairMesh(
        points.reshape(-1, 3), atlas.place(part, x.ravel(), y.ravel()), faces, twins.ravel()
    )


def _ball(center: np.ndarray, axis: np.ndarray, radius: float) -> HairMesh:
    """A bun: a flattened ball, wound about its axis."""
    axis = axis / np.linalg.norm(axis)
    polar = np.linspace(0.02, np.pi - 0.02, 13)
    path = center - 0.8 * radius * np.cos(polar)[:, None] * axis
    return _tube(path, radius * np.sin(polar) * (1 + 0.05 * np.sin(4 * polar)), "hair", 21)


def _tie(center: np.ndarray, axis: np.ndarray, radius: float) -> HairMesh:
    """A hair tie: a short thick ring."""
    axis = axis / np.linalg.norm(axis)
    along = np.linspace(-1, 1, 7)
    path = center + 0.005 * along[:, None] * axis
    return _tube(path, radius + 0.003 * np.sqrt(1 - 0.9 * along**2), "accessory")

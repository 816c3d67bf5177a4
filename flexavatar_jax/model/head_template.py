"""The head template: a UV-mapped mesh that the head tokens and the Gaussians are bound to.

The mesh is rasterised into UV space. A coarse position map gives the encoder its queries (one head
token a texel); a fine one gives the points at which Gaussians sit before the network moves them.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from data_pipelines.head_mesh import Mesh, template_mesh
from flexavatar_jax.model.resampling import interpolation_matrix

MIN_COVERAGE = 0.99
"""Sampled coverage above which a grid point counts as lying on the mesh."""


class PositionMap(NamedTuple):
    """A mesh rasterised into UV space.

    Attributes:
      positions: [r, r, 3] metres in the head frame, zeros where no triangle covers the texel.
      covered: [r, r] whether any triangle does.
    """

    positions: np.ndarray
    covered: np.ndarray


class SamplePoints(NamedTuple):
    """The points of a regular grid over the UV map that lie on the mesh.

    Attributes:
      index: [G] their numbers in the flattened grid, ascending (row-major).
      positions: [G, 3] metres in the head frame.
    """

    index: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class HeadTemplate:
    """A UV-mapped triangle mesh in the head frame (metres). Compared and hashed by identity."""

    mesh: Mesh

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a process has one template or two)
    def position_map(self, resolution: int) -> PositionMap:
        """Positions at the texel centres uv = ((j + .5) / r, (i + .5) / r) of row i, column j."""
        return rasterize_uv(self.mesh, resolution)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def sample_points(self, resolution: int, grid: int) -> SamplePoints:
        """Samples the position map of `resolution` at a `grid` x `grid` grid of linspace(-1, 1).

        Raises:
          ValueError: no point of the grid lies on the mesh.
        """
        positions, covered = self.position_map(resolution)
        weights = interpolation_matrix(grid, resolution).astype(np.float64)
        sampled = np.einsum("yh,hwc,xw->yxc", weights, positions, weights, optimize=True)
        coverage = weights @ covered @ weights.T
        index = np.flatnonzero(coverage > MIN_COVERAGE)
        if not len(index):
            raise ValueError(
                f"the head template covers none of the {grid}x{grid} points of its UV map; "
                "its texture coordinates must lie in the unit square"
            )
        positions = sampled.reshape(-1, 3)[index].astype(np.float32)
        return SamplePoints(index.astype(np.int32), positions)

    def to_obj(self) -> str:
        """The mesh as Wavefront OBJ text; `load_template` reads back the same numbers."""
        lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in self.mesh.vertices.tolist()]
        lines += [f"vt {u!r} {v!r}" for u, v in self.mesh.uvs.tolist()]
        corners = np.stack([self.mesh.faces, self.mesh.face_uvs], axis=-1) + 1
        lines += [
            "f " + " ".join(f"{vertex}/{uv}" for vertex, uv in face) for face in corners.tolist()
        ]
        return "\n".join(lines) + "\n"


def load_template(path: str | os.PathLike[str] = "") -> HeadTemplate:
    """The template in the OBJ file at `path`, or (empty path) the project's own head.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not an OBJ with texture coordinates.
    """
    if not os.fspath(path):
        return HeadTemplate(template_mesh())
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"no head template {path}; config.model.template must name an OBJ file with texture "
            "coordinates, or be empty for the project's own head"
        )
    try:
        text = file.read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not an OBJ file (it is not text)") from None
    return HeadTemplate(parse_obj(text, os.fspath(path)))


def parse_obj(text: str, name: str) -> Mesh:
    """Vertices, texture coordinates and faces of Wavefront OBJ text; polygons become fans.

    Args:
      text: the file's contents; statements other than v, vt and f are skipped.
      name: what errors call the file.

    Raises:
      ValueError: a malformed line, a face without texture coordinates or with an index out of
        range, or no face at all.
    """
    vertices: list[list[float]] = []
    uvs: list[list[float]] = []
    faces: list[list[tuple[int, int]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        kind, *values = line.split("#", 1)[0].split() or [""]
        try:
            if kind == "v":
                x, y, z = map(float, values[:3])
                vertices.append([x, y, z])
            elif kind == "vt":
                u, v = map(float, values[:2])
                uvs.append([u, v])
            elif kind == "f":
                corners = [_corner(value, len(vertices), len(uvs)) for value in values]
                faces += [[corners[0], *corners[i : i + 2]] for i in range(1, len(corners) - 1)]
        except (ValueError, IndexError):
            raise ValueError(
                f"{name}, line {number}: {line.strip()[:60]!r} is not what a head template needs; "
                "vertices have 3 numbers, texture coordinates 2, and each corner of a face is "
                "VERTEX/TEXTURE with indices of earlier lines"
            ) from None
    if not faces:
        raise ValueError(f"{name} holds no faces; a head template is an OBJ mesh with UVs")
    corners = np.array(faces, np.int64)
    mesh = Mesh(np.array(vertices), np.array(uvs), corners[..., 0], corners[..., 1])
    if not (np.isfinite(mesh.vertices).all() and np.isfinite(mesh.uvs).all()):
        raise ValueError(f"{name} has coordinates that are not finite numbers")
    return mesh


def rasterize_uv(mesh: Mesh, resolution: int) -> PositionMap:
    """Rasterises a mesh into UV space at texel centres, v not flipped.

    A texel belongs to the *first* face that contains its centre, edges included.
    """
    positions = np.zeros((resolution, resolution, 3))
    covered: Bool[np.ndarray, "r r"] = np.zeros((resolution, resolution), bool)
    corners: Float[np.ndarray, "f 3 2"] = mesh.uvs[mesh.face_uvs] * resolution - 0.5
    low: Int[np.ndarray, "f 2"] = np.clip(np.ceil(corners.min(1) - 1e-6), 0, None).astype(int)
    high = np.clip(np.floor(corners.max(1) + 1e-6), None, resolution - 1).astype(int)
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    area = _cross(b - a, c - a)
    for face in np.flatnonzero((area != 0) & (low <= high).all(1)):
        (x0, y0), (x1, y1) = low[face], high[face]
        texel = np.stack(np.meshgrid(np.arange(x0, x1 + 1), np.arange(y0, y1 + 1)), axis=-1)
        v = _cross(texel - a[face], c[face] - a[face]) / area[face]
        w = _cross(b[face] - a[face], texel - a[face]) / area[face]
        barycentric = np.stack([1 - v - w, v, w], axis=-1)
        window = np.s_[y0 : y1 + 1, x0 : x1 + 1]
        new = (barycentric >= 0).all(-1) & ~covered[window]
        positions[window][new] = barycentric[new] @ mesh.vertices[mesh.faces[face]]
        covered[window] |= new
    return PositionMap(positions, covered)


def _cross(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]


def _corner(text: str, vertices: int, uvs: int) -> tuple[int, int]:
    """Zero-based vertex and texture index of a corner such as 7/3/2; negative: from the end."""
    numbers = [int(part) for part in text.split("/")[:2]]
    resolved = []
    for number, count in zip(numbers, (vertices, uvs), strict=True):
        index = number - 1 if number > 0 else count + number
        if not 0 <= index < count or number == 0:
            raise IndexError(number)
        resolved.append(index)
    return resolved[0], resolved[1]

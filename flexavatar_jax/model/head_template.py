"""The head template: a UV-mapped mesh that the head tokens and the Gaussians are bound to.

The mesh is rasterised into UV space. A coarse position map gives the encoder its queries (one head
token a texel); a fine one gives the points at which Gaussians sit before the network moves them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

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
    """A UV-mapped triangle mesh in the head frame. Compared and hashed by identity.

    Attributes:
      vertices: metres.
      uvs: in the unit square; v is not flipped: texel row i of r is at v = (i + .5) / r.
      faces: vertex numbers.
      face_uvs: numbers of the corners' texture coordinates.
    """

    vertices: Float[np.ndarray, "V 3"]
    uvs: Float[np.ndarray, "T 2"]
    faces: Int[np.ndarray, "F 3"]
    face_uvs: Int[np.ndarray, "F 3"]

    @functools.lru_cache(maxsize=8)  # noqa: B019 (a process has one template or two)
    def position_map(self, resolution: int) -> PositionMap:
        """Positions at the texel centres uv = ((j + .5) / r, (i + .5) / r) of row i, column j."""
        return rasterize_uv(self, resolution)

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


def rasterize_uv(mesh: HeadTemplate, resolution: int) -> PositionMap:
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

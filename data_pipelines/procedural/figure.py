"""A person made ready to be drawn: mesh, texture, and the scene of one expression."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.sparse import csr_matrix

from data_pipelines.procedural import texture
from data_pipelines.procedural.anatomy import anatomy, eye_centers, neutral_vertices
from data_pipelines.procedural.expression import deform
from data_pipelines.procedural.hair import covers_ears, hair_mesh
from data_pipelines.procedural.person import Person
from data_pipelines.procedural.renderer import Scene, mip_levels


class Figure:
    """A person's mesh and texture, built once; `scene` poses it.

    Args:
      person: who it is.
      size: side in pixels of the pictures to come; decides the texture's resolution alone.
    """

    def __init__(self, person: Person, size: int):
        self.person = person
        shared, hair = anatomy(), hair_mesh(person)
        out = 0.35 if covers_ears(person.hair) else person.ears_out
        self._neutral = neutral_vertices(person.shape, person.ear_size, out)
        self._eyes = eye_centers(person.shape)
        self._hair = hair.vertices.astype(np.float32)
        count = len(self._neutral)
        self._faces = np.concatenate([shared.faces, hair.faces + count]).astype(np.int64)
        self._two_sided = np.concatenate([shared.two_sided, np.full(len(hair.faces), True)])
        self._uvs = np.concatenate([shared.uvs, hair.uvs]).astype(np.float32)
        self._twins = np.concatenate([shared.twins, hair.twins + count])
        self._corners = _corner_sum(self._twins[self._faces], len(self._uvs))
        side = int(2 ** np.clip(np.ceil(np.log2(2 * size)), 7, 10))
        self._texture = mip_levels(texture.paint(person, side))

    def scene(self, code: Float[np.ndarray, "135"]) -> Scene:
        """The person with the expression of a code, in the head frame."""
        person = self.person
        posed = deform(self._neutral, self._eyes, person.eye_open, person.eye_slant, code)
        vertices = np.concatenate([posed, self._hair])
        return Scene(
            vertices=vertices,
            normals=self._normals(vertices),
            uvs=self._uvs,
            faces=self._faces,
            two_sided=self._two_sided,
            texture=self._texture,
            light=person.light,
        )

    def _normals(self, vertices: np.ndarray) -> np.ndarray:
        """Unit normals: the sum over a vertex's faces, by area."""
        a, b, c = (vertices[self._faces[:, i]] for i in range(3))
        normals = (self._corners @ np.cross(b - a, c - a))[self._twins]
        return normals / (np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-20)


def _corner_sum(faces: np.ndarray, vertices: int) -> csr_matrix:
    """[V, F] matrix that sums what faces have over each vertex's."""
    numbers = np.repeat(np.arange(len(faces)), 3)
    ones = np.ones(len(numbers), np.float32)
    return csr_matrix((ones, (faces.ravel(), numbers)), shape=(vertices, len(faces)))

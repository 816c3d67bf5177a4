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

from data_pipelines.head_mesh import EYE_OFFSET, HeadShape, head_surface
from data_pipelines.procedural.features import (
    EYE_BULGE,
    EYE_RADIUS,
    ear,
    eyeball,
    mouth,
    socket,
    teeth,
)
from data_pipelines.procedural.skin import EYE_ROW, skin, u_at

LID_THICKNESS = 0.0010

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
    u = u_at(EYE_ROW, EYE_OFFSET)
    sockets = head_surface(np.array([u, 1 - u]), np.full(2, EYE_ROW), shape)
    return sockets - [0, 0, EYE_RADIUS - EYE_BULGE]


@functools.cache
def anatomy() -> Anatomy:
    """The shared mesh."""
    parts = [skin(), mouth(), teeth(+1), teeth(-1)]
    parts += [eyeball(+1), eyeball(-1), ear(+1), ear(-1), socket(+1), socket(-1)]
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

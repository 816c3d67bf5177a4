"""Reading and writing head templates: the project's own head, or a Wavefront OBJ with UVs."""

from __future__ import annotations

import os

import numpy as np
from etils import epath

from data_pipelines.errors import UserError
from data_pipelines.head_mesh import template_mesh
from flexavatar_jax.model.head_template import HeadTemplate


def load_template(path: str | os.PathLike[str] = "") -> HeadTemplate:
    """The template in the OBJ file at `path`, or (empty path) the project's own head.

    Raises:
      UserError: there is no such file, or it is not an OBJ with texture coordinates.
    """
    if not os.fspath(path):
        return HeadTemplate(*template_mesh())
    file = epath.Path(path)
    if not file.exists():
        raise UserError(
            f"no head template {path}; config.model.template must name an OBJ file with texture "
            "coordinates, or be empty for the project's own head"
        )
    try:
        text = file.read_text()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not an OBJ file (it is not text)") from None
    return parse_obj(text, os.fspath(path))


def parse_obj(text: str, name: str) -> HeadTemplate:
    """Vertices, texture coordinates and faces of Wavefront OBJ text; polygons become fans.

    Args:
      text: the file's contents; statements other than v, vt and f are skipped.
      name: what errors call the file.

    Raises:
      UserError: a malformed line, a face without texture coordinates or with an index out of
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
            raise UserError(
                f"{name}, line {number}: {line.strip()[:60]!r} is not what a head template needs; "
                "vertices have 3 numbers, texture coordinates 2, and each corner of a face is "
                "VERTEX/TEXTURE with indices of earlier lines"
            ) from None
    if not faces:
        raise UserError(f"{name} holds no faces; a head template is an OBJ mesh with UVs")
    corners = np.array(faces, np.int64)
    mesh = HeadTemplate(np.array(vertices), np.array(uvs), corners[..., 0], corners[..., 1])
    if not (np.isfinite(mesh.vertices).all() and np.isfinite(mesh.uvs).all()):
        raise UserError(f"{name} has coordinates that are not finite numbers")
    return mesh


def format_obj(template: HeadTemplate) -> str:
    """The mesh as Wavefront OBJ text; `parse_obj` reads back the same numbers."""
    lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in template.vertices.tolist()]
    lines += [f"vt {u!r} {v!r}" for u, v in template.uvs.tolist()]
    corners = np.stack([template.faces, template.face_uvs], axis=-1) + 1
    lines += ["f " + " ".join(f"{vertex}/{uv}" for vertex, uv in face) for face in corners.tolist()]
    return "\n".join(lines) + "\n"


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

"""Gaussians as files that other programs open: .ply, .glb (KHR_gaussian_splatting), .spz.

Each file has the axes of its format, so that the head stands upright and looks at the viewer
wherever the format is read as it is meant: glTF's are the head frame's own (left, up, forward),
PLY's are those of 3D Gaussian Splatting (right, down, forward), SPZ's are right, up, backward.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

import numpy as np
from etils import epath
from jaxtyping import Float

from data_pipelines.errors import UserError
from data_pipelines.files import write, writing
from kernels.ply import SH_C0, GaussianCloud, write_ply

MIN_SCALE = 1e-5
"""Metres; what is thinner is made so thick, as viewers that invert covariances fail on it."""

SPZ_FRACTIONAL_BITS = 18
"""Positions of .spz in steps of 4 micrometres, up to 32 m."""


def clamp_scales(gaussians: GaussianCloud) -> tuple[GaussianCloud, int]:
    """The Gaussians with scales of `MIN_SCALE` or more, and how many of them had smaller ones."""
    tiny = np.asarray(gaussians.scales) < MIN_SCALE
    clamped = gaussians._replace(scales=np.maximum(gaussians.scales, MIN_SCALE))
    return clamped, int(np.sum(np.any(tiny, axis=-1)))


def write_splats(path: epath.PathLike, gaussians: GaussianCloud) -> None:
    """Writes Gaussians of the head frame in the format of the path's ending.

    Args:
      gaussians: [G, ...], see `Animator.gaussians`.

    Raises:
      UserError: an unknown ending, a library that isn't installed, a file that can't be written.
    """
    suffix = epath.Path(path).suffix
    if suffix not in WRITERS:
        raise UserError(f"{path} must end in {', '.join(WRITERS)}")
    WRITERS[suffix](path, gaussians)


def turn(gaussians: GaussianCloud, signs: tuple[int, int, int]) -> GaussianCloud:
    """Gaussians turned by half a turn: axes of sign -1 change direction.

    Args:
      signs: two of them -1, or none: anything else would mirror the head.
    """
    x, y, z = signs
    if x * y * z != 1:
        raise ValueError(f"signs {signs} mirror; expected two of them negative or none")
    w, i, j, k = np.moveaxis(np.asarray(gaussians.quats), -1, 0)
    # Half a turn about the axis that keeps its sign, from the left.
    turned = {
        (1, 1, 1): (w, i, j, k),
        (1, -1, -1): (-i, w, -k, j),
        (-1, 1, -1): (-j, k, w, -i),
        (-1, -1, 1): (-k, -j, i, w),
    }[signs]
    means = np.asarray(gaussians.means) * np.array(signs, np.float32)
    return gaussians._replace(means=means, quats=np.stack(turned, -1))


def covariances(gaussians: GaussianCloud) -> Float[np.ndarray, "G 3 3"]:
    """R S S^T R^T of each Gaussian, square metres."""
    factors = rotations(gaussians.quats) * gaussians.scales[:, None, :]
    return factors @ np.swapaxes(factors, -1, -2)


def rotations(quats: Float[np.ndarray, "*b 4"]) -> Float[np.ndarray, "*b 3 3"]:
    """Rotation matrices of unit quaternions (w, x, y, z)."""
    w, x, y, z = np.moveaxis(quats, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _write_ply(path: epath.PathLike, gaussians: GaussianCloud) -> None:
    with writing(path) as unfinished:
        write_ply(unfinished, turn(gaussians, (-1, -1, 1)))


def _write_glb(path: epath.PathLike, gaussians: GaussianCloud) -> None:
    """Source: KHR_gaussian_splatting, ratified; https://github.com/KhronosGroup/glTF."""
    colors = np.asarray(gaussians.colors, np.float32)
    opacities = np.asarray(gaussians.opacities, np.float32)[:, None]
    rgba = np.concatenate([np.clip(colors, 0, 1), np.clip(opacities, 0, 1)], axis=-1)
    prefix = "KHR_gaussian_splatting:"
    attributes = {
        "POSITION": gaussians.means,
        "COLOR_0": np.round(rgba * 255).astype(np.uint8),
        prefix + "ROTATION": np.roll(gaussians.quats, -1, axis=-1),  # x, y, z, w
        prefix + "SCALE": gaussians.scales,
        prefix + "OPACITY": opacities,
        prefix + "SH_DEGREE_0_COEF_0": (colors - 0.5) / SH_C0,
    }
    blob, views, accessors = bytearray(), [], []
    for array in attributes.values():
        array = np.asarray(array)
        array = np.ascontiguousarray(array, "u1" if array.dtype == np.uint8 else "<f4")
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": array.nbytes})
        accessors.append(
            {
                "bufferView": len(accessors),
                "componentType": 5121 if array.dtype == np.uint8 else 5126,
                "count": len(array),
                "type": {1: "SCALAR", 3: "VEC3", 4: "VEC4"}[array.shape[1]],
            }
        )
        blob += array.tobytes()
    accessors[1]["normalized"] = True
    positions = np.asarray(gaussians.means, np.float32)
    accessors[0] |= {"min": positions.min(0).tolist(), "max": positions.max(0).tolist()}
    splatting = {
        "kernel": "ellipse",
        "colorSpace": "srgb_rec709_display",
        "projection": "perspective",
        "sortingMethod": "cameraDistance",
    }
    primitive = {
        "mode": 0,
        "attributes": {name: number for number, name in enumerate(attributes)},
        "extensions": {"KHR_gaussian_splatting": splatting},
    }
    scene = {
        "asset": {"version": "2.0", "generator": "flexavatar-jax"},
        "extensionsUsed": ["KHR_gaussian_splatting"],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "buffers": [{"byteLength": len(blob)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(scene).encode("ascii")
    text += b" " * (-len(text) % 4)
    blob += bytes(-len(blob) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(blob), b"BIN\0") + bytes(blob)
    write(path, struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def _write_spz(path: epath.PathLike, gaussians: GaussianCloud) -> None:
    try:
        import gsply
    except ImportError as error:
        raise UserError(f"{path}: .spz is written by gsply; `pip install '.[spz]'`") from error
    turned = turn(gaussians, (-1, 1, -1))
    opacities = np.clip(turned.opacities, 1e-6, 1 - 1e-6)
    data = gsply.GSData(
        means=np.ascontiguousarray(turned.means, np.float32),
        scales=np.log(turned.scales).astype(np.float32),
        quats=np.ascontiguousarray(turned.quats, np.float32),
        opacities=np.log(opacities / (1 - opacities)).astype(np.float32),
        sh0=((turned.colors - 0.5) / SH_C0).astype(np.float32),
        shN=np.zeros((len(turned.means), 0, 3), np.float32),
    )
    with writing(path) as unfinished:
        gsply.write_spz(unfinished, data, version=4, fractional_bits=SPZ_FRACTIONAL_BITS)


WRITERS: dict[str, Callable[[epath.PathLike, GaussianCloud], None]] = {
    ".ply": _write_ply,
    ".glb": _write_glb,
    ".spz": _write_spz,
}

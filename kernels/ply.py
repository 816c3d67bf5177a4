"""3D Gaussians as .ply files in the layout that 3D Gaussian Splatting made and viewers open.

A vertex is a Gaussian: x y z, normals (unused), f_dc_* (colour as degree-0 spherical harmonics),
opacity (logit), scale_* (logarithm), rot_* (w, x, y, z). Read and written here, as the layout is
fixed and the known PLY library's licence (GPL) is not ours.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

SH_C0 = 0.28209479177387814
"""Degree-0 spherical harmonic: colour = 0.5 + SH_C0 * coefficient."""

FIELDS = [
    *("x", "y", "z"),
    *("nx", "ny", "nz"),
    *("f_dc_0", "f_dc_1", "f_dc_2"),
    "opacity",
    *("scale_0", "scale_1", "scale_2"),
    *("rot_0", "rot_1", "rot_2", "rot_3"),
]
TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
BYTE_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">"}
MAX_HEADER = 1 << 16

log = logging.getLogger(__name__)


class GaussianCloud(NamedTuple):
    """3D Gaussians as `rasterize` takes them."""

    means: Float[np.ndarray, "N 3"]
    quats: Float[np.ndarray, "N 4"]
    scales: Float[np.ndarray, "N 3"]
    opacities: Float[np.ndarray, "N"]
    colors: Float[np.ndarray, "N 3"]
    """RGB, 0 to 1."""


def write_ply(path: str | os.PathLike, gaussians: GaussianCloud) -> None:
    """Write Gaussians, of any leading shape, to `path`, whole or not at all.

    Opacities are kept within 1e-6 of 0 and 1 and scales above 1e-12, where logits and logarithms
    are finite.
    """
    means, quats, scales, opacities, colors = (np.asarray(a, np.float64) for a in gaussians)
    opacities = np.clip(opacities, 1e-6, 1 - 1e-6)[..., None]
    columns = [
        means,
        np.zeros_like(means),
        (colors - 0.5) / SH_C0,
        np.log(opacities / (1 - opacities)),
        np.log(np.maximum(scales, 1e-12)),
        quats,
    ]
    table = np.concatenate(columns, -1).reshape(-1, len(FIELDS)).astype("<f4")
    header = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {len(table)}",
        *(f"property float {field}" for field in FIELDS),
        "end_header\n",
    ]
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes("\n".join(header).encode("ascii") + table.tobytes())
    partial.replace(path)


def read_ply(path: str | os.PathLike) -> GaussianCloud:
    """Read Gaussians; view-dependent colour (degrees above 0) is left out, with a warning.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a binary PLY of Gaussians, or cut short; names the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(MAX_HEADER)
        head, end, _ = start.partition(b"end_header\n")
        if not start.startswith(b"ply") or not end:
            raise ValueError(
                f"{path}: not a PLY file; expected a header from 'ply' to 'end_header'"
            )
        count, record = _parse_header(path, head.decode("ascii", errors="replace").splitlines())
        missing = [f for f in FIELDS if f not in record.names and f not in ("nx", "ny", "nz")]
        if missing:
            raise ValueError(
                f"{path}: vertices lack {', '.join(missing)}; expected the layout of 3D Gaussian "
                "Splatting, uncompressed"
            )
        size = path.stat().st_size - len(head) - len(end)
        if size < count * record.itemsize:
            raise ValueError(
                f"{path}: cut short: {count} vertices need {count * record.itemsize} bytes, "
                f"found {size}; copy the file again"
            )
        file.seek(len(head) + len(end))
        vertices = np.frombuffer(file.read(count * record.itemsize), record)
    if "f_rest_0" in record.names:
        log.warning("%s: view-dependent colour (f_rest_*) is left out", path)

    def stack(prefix: str, names) -> Float[np.ndarray, "N k"]:
        return np.stack([vertices[f"{prefix}{name}"] for name in names], -1).astype(np.float32)

    return GaussianCloud(
        means=stack("", "xyz"),
        quats=stack("rot_", range(4)),
        scales=np.exp(stack("scale_", range(3))),
        opacities=1 / (1 + np.exp(-vertices["opacity"].astype(np.float32))),
        colors=0.5 + SH_C0 * stack("f_dc_", range(3)),
    )


def _parse_header(path: Path, lines: list[str]) -> tuple[int, np.dtype]:
    """Number of vertices and the record of one."""
    order = count = None
    fields = []
    for line in lines[1:]:
        match line.split():
            case ["format", name, _]:
                order = BYTE_ORDERS.get(name)
            case ["element", "vertex", number] if count is None and number.isdigit():
                count = int(number)
            case ["element", *_] if count is None:
                raise ValueError(f"{path}: {line!r} comes before the vertices; expected them first")
            case ["element", *_]:
                break
            case ["property", kind, name] if kind in TYPES and count is not None:
                fields.append((name, kind))
            case ["property", *_]:
                raise ValueError(
                    f"{path}: cannot read {line!r}; expected a number's type and a name"
                )
    if order is None:
        raise ValueError(f"{path}: expected a binary PLY file; convert it from text first")
    if not count or not fields or len({name for name, _ in fields}) < len(fields):
        raise ValueError(f"{path}: expected vertices, each property named once")
    return count, np.dtype([(name, order + TYPES[kind]) for name, kind in fields])

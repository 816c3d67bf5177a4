"""3D Gaussians as .ply files in the layout that 3D Gaussian Splatting made and viewers open.

A vertex is a Gaussian: x y z, normals (unused), f_dc_* and f_rest_* (colour as spherical harmonics;
those of degree 1 and up channel by channel), opacity (logit), scale_* (logarithm), rot_* (w, x, y,
z). Read and written here, as the layout is fixed and the known PLY library's licence (GPL) is not
ours. Of other PLY files what precedes the vertices is skipped, text is read as binary is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

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
SH_SIZES = (1, 4, 9, 16)
"""Coefficients of the spherical harmonics up to degree 0, 1, 2 and 3."""
TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2"},
    **{"int32": "i4", "uint32": "u4", "float32": "f4", "float64": "f8"},
}
BYTE_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "="}
MAX_HEADER = 1 << 24
ANTIALIASED = re.compile(r"antialiased(?!\W*(0|false))|SplatRenderMode:\s*mip", re.IGNORECASE)
"""What a comment says of a scene that was trained with Mip-Splatting's opacities: Postshot's
spelling, and Brush's, which is written."""


class GaussianCloud(NamedTuple):
    """3D Gaussians as a file holds them; the first five are what `rasterize` takes first."""

    means: Float[ArrayLike, "*b 3"]
    quats: Float[ArrayLike, "*b 4"]
    scales: Float[ArrayLike, "*b 3"]
    opacities: Float[ArrayLike, "*b"]
    colors: Float[ArrayLike, "*b 3"]
    """RGB from 0 up: what the harmonic of degree 0 alone gives, clamped as renderers do."""
    sh: Float[ArrayLike, "*b K 3"] | None = None
    """All coefficients, K = 1, 4, 9 or 16; None: those of `colors`."""
    antialiased: bool = False
    """Whether the scene was trained, and is to be rendered, with `antialiased=True`."""


def write_ply(path: str | os.PathLike, gaussians: GaussianCloud) -> None:
    """Write Gaussians, of any leading shape, to `path`, whole or not at all.

    Opacities are kept within 1e-6 of 0 and 1 and scales above 1e-12, where logits and logarithms
    are finite; a scale's sign, which means nothing, is dropped. `sh` is written where it is given.

    Raises:
      ValueError: shapes that don't go together, or NaN or infinite values; names the array.
    """
    arrays = {name: np.asarray(a, np.float64) for name, a in gaussians._asdict().items() if
              name != "antialiased" and a is not None}  # fmt: skip
    batch = arrays["opacities"].shape
    if "sh" not in arrays:
        arrays["sh"] = (arrays["colors"][..., None, :] - 0.5) / SH_C0
    expected = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "colors": (3,)}
    size = arrays["sh"].shape[-2] if arrays["sh"].ndim > 1 else 0
    for name, row in (expected | {"sh": (size, 3)}).items():
        if arrays[name].shape != (*batch, *row) or (name == "sh" and size not in SH_SIZES):
            row = f"({', '.join(map(str, SH_SIZES))} coefficients, 3)" if name == "sh" else row
            raise ValueError(
                f"{path}: {name} has shape {arrays[name].shape}; expected {batch} and {row}"
            )
        if not np.isfinite(arrays[name]).all():
            raise ValueError(f"{path}: {name} has NaN or infinite values; expected finite numbers")
    opacities = np.clip(arrays["opacities"], 1e-6, 1 - 1e-6)[..., None]
    rest = np.swapaxes(arrays["sh"][..., 1:, :], -1, -2).reshape(*batch, 3 * (size - 1))
    columns = [
        arrays["means"],
        np.zeros_like(arrays["means"]),
        arrays["sh"][..., 0, :],
        rest,
        np.log(opacities / (1 - opacities)),
        np.log(np.maximum(np.abs(arrays["scales"]), 1e-12)),
        arrays["quats"],
    ]
    names = [*FIELDS[:9], *(f"f_rest_{i}" for i in range(rest.shape[-1])), *FIELDS[9:]]
    table = np.concatenate(columns, -1).reshape(-1, len(names)).astype("<f4")
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *(["comment SplatRenderMode: mip"] if gaussians.antialiased else []),
        f"element vertex {len(table)}",
        *(f"property float {name}" for name in names),
        "end_header\n",
    ]
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes("\n".join(header).encode("ascii") + table.tobytes())
    partial.replace(path)


def read_ply(path: str | os.PathLike) -> GaussianCloud:
    """Read Gaussians, in float32, with the spherical harmonics of all degrees.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a PLY of Gaussians, or cut short; names the file and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        order, elements, comments = _read_header(path, file)
        names = [name for name, _, _ in elements]
        if "vertex" not in names:
            raise ValueError(f"{path}: expected an element 'vertex', each vertex a Gaussian")
        if "chunk" in names:
            raise ValueError(
                f"{path}: SuperSplat's compressed layout is not read; export it from SuperSplat "
                "as an uncompressed .ply"
            )
        before = elements[: names.index("vertex")]
        _, count, properties = elements[names.index("vertex")]
        if not properties or len(dict(properties)) < len(properties):
            raise ValueError(f"{path}: expected vertices, each property named once")
        _check_fields(path, dict(properties))
        if order == "=":
            vertices = _read_text(path, file, sum(n for _, n, _ in before), count, properties)
        else:
            for name, number, fields in before:
                _skip(path, file, name, number, fields, order)
            vertices = _read_binary(path, file, count, _record(path, properties, order))

    def stack(prefix: str, names) -> Float[np.ndarray, "N k"]:
        return np.stack([vertices[f"{prefix}{name}"] for name in names], -1).astype(np.float32)

    rest = sum(name.startswith("f_rest_") for name, _ in properties)
    sh = stack("f_dc_", range(3))[:, None]
    if rest:
        higher = stack("f_rest_", range(rest)).reshape(count, 3, rest // 3)
        sh = np.concatenate([sh, np.swapaxes(higher, 1, 2)], 1)
    with np.errstate(over="ignore"):
        return GaussianCloud(
            means=stack("", "xyz"),
            quats=stack("rot_", range(4)),
            scales=np.exp(stack("scale_", range(3))),
            opacities=1 / (1 + np.exp(-vertices["opacity"].astype(np.float32))),
            colors=np.maximum(0.5 + SH_C0 * sh[:, 0], 0).astype(np.float32),
            sh=sh,
            antialiased=any(ANTIALIASED.search(comment) for comment in comments),
        )


Element = tuple[str, int, list[tuple[str, str]]]
"""Name, number, and properties (name, type); a list's type is "count-type item-type"."""


def _read_header(path: Path, file: BinaryIO) -> tuple[str, list[Element], list[str]]:
    """Byte order, elements and comments; leaves the file where the data begin."""
    if file.readline(8).strip() != b"ply":
        raise ValueError(f"{path}: not a PLY file; expected a header from 'ply' to 'end_header'")
    order, elements, comments = None, [], []
    while (line := file.readline(MAX_HEADER).decode("ascii", errors="replace")).strip() != (
        "end_header"
    ):
        if not line or file.tell() > MAX_HEADER:
            raise ValueError(
                f"{path}: not a PLY file; expected a header from 'ply' to 'end_header'"
            )
        match line.split():
            case ["format", name, _]:
                order = BYTE_ORDERS.get(name)
            case ["comment" | "obj_info", *_]:
                comments.append(line.strip())
            case ["element", name, number] if number.isdigit():
                elements.append((name, int(number), []))
            case ["property", kind, name] if kind in TYPES and elements:
                elements[-1][2].append((name, kind))
            case ["property", "list", size, kind, name] if {size, kind} <= set(TYPES) and elements:
                elements[-1][2].append((name, f"{size} {kind}"))
            case []:
                pass
            case _:
                raise ValueError(
                    f"{path}: cannot read {line.strip()!r}; expected a number's type and a name"
                )
    if order is None:
        raise ValueError(f"{path}: expected a format, one of {', '.join(BYTE_ORDERS)}")
    return order, elements, comments


def _check_fields(path: Path, kinds: dict[str, str]) -> None:
    missing = [f for f in FIELDS if f not in kinds and f not in ("nx", "ny", "nz")]
    if missing:
        raise ValueError(
            f"{path}: vertices lack {', '.join(missing)}; expected the layout of 3D Gaussian "
            "Splatting, uncompressed"
        )
    rest = {name for name in kinds if name.startswith("f_rest_")}
    if len(rest) not in [3 * (k - 1) for k in SH_SIZES] or rest != {
        f"f_rest_{i}" for i in range(len(rest))
    }:
        raise ValueError(
            f"{path}: {len(rest)} properties f_rest_*; expected f_rest_0, f_rest_1, ... of 0, 9, "
            "24 or 45, for harmonics of degree 0 to 3"
        )


def _record(path: Path, properties: list[tuple[str, str]], order: str) -> np.dtype:
    for name, kind in properties:
        if " " in kind:
            raise ValueError(f"{path}: cannot read the list {name!r} of vertices; expected numbers")
    return np.dtype([(name, order + TYPES[kind]) for name, kind in properties])


def _read_binary(path: Path, file: BinaryIO, count: int, record: np.dtype) -> np.ndarray:
    size = os.fstat(file.fileno()).st_size - file.tell()
    if size < count * record.itemsize:
        raise ValueError(
            f"{path}: cut short: {count} vertices need {count * record.itemsize} bytes, "
            f"found {size}; copy the file again"
        )
    return np.frombuffer(file.read(count * record.itemsize), record)


def _skip(path, file: BinaryIO, name: str, number: int, fields, order: str) -> None:
    """Passes an element that comes before the vertices."""
    if not any(" " in kind for _, kind in fields):
        file.seek(number * _record(path, fields, order).itemsize, os.SEEK_CUR)
        return
    for _ in range(number):
        for _, kind in fields:
            *size, item = kind.split()
            many = 1
            if size:
                head = np.dtype(order + TYPES[size[0]])
                data = file.read(head.itemsize)
                if len(data) < head.itemsize:
                    raise ValueError(f"{path}: cut short in {name!r}; copy the file again")
                many = int(np.frombuffer(data, head)[0])
            file.seek(many * np.dtype(TYPES[item]).itemsize, os.SEEK_CUR)


def _read_text(path: Path, file: BinaryIO, skip: int, count: int, properties) -> np.ndarray:
    _record(path, properties, "=")
    lines = [line.split() for line in file.read().splitlines() if line.strip()]
    rows = lines[skip : skip + count]
    if len(rows) < count or any(len(row) < len(properties) for row in rows):
        raise ValueError(
            f"{path}: cut short: expected {count} lines of {len(properties)} numbers, "
            f"found {len(rows)}; copy the file again"
        )
    try:
        table = np.array([row[: len(properties)] for row in rows], np.float64)
    except ValueError as error:
        raise ValueError(f"{path}: {error} among the vertices; expected numbers") from error
    table = table.reshape(count, len(properties))
    return np.rec.fromarrays(list(table.T), names=[name for name, _ in properties])

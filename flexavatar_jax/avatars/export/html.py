"""An avatar as one HTML file: it draws itself with WebGL2, and asks nothing of any network."""

from __future__ import annotations

import base64
import gzip
import html
import json
import string
from importlib import resources

import numpy as np
from etils import epath
from jax.typing import ArrayLike
from jaxtyping import Float

from data_pipelines.files import write
from flexavatar_jax.avatars.export.rig import Rig
from flexavatar_jax.avatars.sliders import Slider
from flexavatar_jax.model.gaussians import GaussianHead

FRAMES_PER_SECOND = 24


def write_html(
    path: epath.PathLike,
    rig: Rig,
    sliders: tuple[Slider, ...],
    head: GaussianHead,
    cam2head: Float[np.ndarray, "4 4"],
    K: Float[np.ndarray, "3 3"],
    *,
    name: str,
    fps: float = FRAMES_PER_SECOND,
) -> int:
    """Writes the page to `path`, whole or not at all; returns its size in bytes.

    Args:
      rig: the avatar; `sliders` are those it was built with.
      head: of the model: where Gaussians are sampled, and their limits.
      cam2head: camera that the page opens with, OpenCV axes in the head frame.
      K: its intrinsics divided by the image size.
      name: title of the page.
      fps: frames a second of the rig's clips.

    Raises:
      UserError: the file cannot be written.
    """
    meta, arrays = _describe(rig, sliders, head)
    meta |= {"name": name, "cam2head": _numbers(cam2head), "K": _numbers(K)}
    for clip in meta["clips"]:
        clip["fps"] = fps
    blob, layout = _pack(arrays)
    meta["layout"] = layout
    files = resources.files(__package__) / "page"
    page = string.Template((files / "page.html").read_text("utf-8")).substitute(
        title=html.escape(name),
        head=json.dumps(meta).replace("<", "\\u003c"),
        arrays=base64.b64encode(gzip.compress(blob, 9, mtime=0)).decode("ascii"),
        **{s: (files / f"{s}.js").read_text("utf-8") for s in ("rig", "renderer", "page")},
    )
    content = page.encode("utf-8")
    write(path, content)
    return len(content)


def _describe(rig: Rig, sliders: tuple[Slider, ...], head: GaussianHead) -> tuple[dict, dict]:
    """What `rig.js` computes with: numbers by name, and large arrays, quantised."""
    height, width = rig.neutral.shape[:2]
    points = head.points
    low = points.positions.min(axis=0)
    step = np.maximum(np.ptp(points.positions, axis=0), 1e-9) / 65535
    neutral_steps = np.maximum(np.abs(rig.neutral).max(axis=(0, 1)), 1e-9) / 32767
    coefficients: list[np.ndarray] = []

    def rows(of: np.ndarray) -> int:
        """Adds coefficients to the table; returns the number of their first row."""
        start = sum(len(part) for part in coefficients)
        coefficients.append(np.atleast_2d(of))
        return start

    meta = {
        "height": height,
        "width": width,
        "grid": head.grid,
        "offsetRange": head.offset_range,
        "maxScale": head.max_scale,
        "biases": _numbers(head.biases),
        "positionLows": _numbers(low),
        "positionSteps": _numbers(step),
        "neutralSteps": _numbers(neutral_steps),
        "sliders": [
            {
                **{key: getattr(s, key) for key in ("name", "low", "high", "step", "unit")},
                "knots": _numbers(rig.knots[s.name][0]),
                "row": rows(rig.knots[s.name][1]),
            }
            for s in sliders
        ],
        "pairs": [[*a, *b, rows(correction)] for a, b, correction in rig.pairs],
        "clips": [
            {"name": name, "frames": len(frames), "row": rows(frames)}
            for name, frames in rig.clips.items()
        ],
    }
    arrays = {
        "coefs": np.concatenate(coefficients).astype(np.float32),
        "steps": rig.steps.astype(np.float32),
        "index": points.index.astype(np.uint32),
        "positions": np.round((points.positions - low) / step).astype(np.uint16),
        "neutral": np.round(rig.neutral / neutral_steps).astype(np.int16).transpose(2, 0, 1),
        "components": rig.components.transpose(0, 3, 1, 2),
    }
    return meta, arrays


def _pack(arrays: dict[str, np.ndarray]) -> tuple[bytes, list]:
    """All arrays behind one another, and (name, kind, first byte, length) of each."""
    blob, layout = bytearray(), []
    for name, array in arrays.items():
        blob += bytes(-len(blob) % 4)
        layout.append([name, array.dtype.name, len(blob), array.size])
        blob += np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    return bytes(blob), layout


def _numbers(array: ArrayLike) -> list:
    return np.asarray(array, np.float64).tolist()

"""Writing animations: MP4 and GIF."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import imageio
import numpy as np
from jaxtyping import UInt8
from PIL import Image


def write_animation(path: Path, frames: UInt8[np.ndarray, "T H W 3"], fps: int) -> list[Path]:
    """Writes `frames` as MP4 and GIF beside each other (`path` with either suffix).

    Each file is written under a temporary name and renamed when it is whole.
    """
    written = []
    for suffix in (".mp4", ".gif"):
        target = path.with_suffix(suffix)
        handle, temporary = tempfile.mkstemp(
            suffix=suffix, prefix=f".{path.stem}.", dir=path.parent
        )
        os.close(handle)
        try:
            if suffix == ".gif":
                pictures = [Image.fromarray(frame) for frame in frames]
                pictures[0].save(
                    temporary,
                    save_all=True,
                    append_images=pictures[1:],
                    duration=round(1000 / fps),
                    loop=0,
                )
            else:
                # H.264 in 4:2:0 wants even sides: the last row or column is repeated.
                even = np.pad(
                    frames,
                    [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)],
                    "edge",
                )
                with warnings.catch_warnings():
                    # JAX warns of every fork, also of one that at once becomes another program.
                    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
                    imageio.mimwrite(temporary, list(even), fps=fps, quality=8, macro_block_size=2)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
        written.append(target)
    return written

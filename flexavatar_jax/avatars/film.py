"""Writing films frame by frame: MP4, GIF, and with transparency WebM, APNG and PNG sequences."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.files import make_writable


class _Format(NamedTuple):
    """How ffmpeg writes one kind of film; `even`: sides must be even, as colours are halved."""

    codec: str
    pixels: str
    transparent: bool
    even: bool
    options: tuple[str, ...]


# A palette a frame: colours stay true, and nothing has to wait for the film's end.
_PALETTES = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
_FORMATS = {
    ".mp4": _Format("libx264", "yuv420p", False, True, ("-crf", "18", "-movflags", "+faststart")),
    ".gif": _Format("gif", "pal8", False, False, ("-filter_complex", _PALETTES, "-loop", "0")),
    ".webm": _Format(
        *("libvpx-vp9", "yuva420p", True, True),
        ("-crf", "24", "-b:v", "0", "-auto-alt-ref", "0", "-row-mt", "1", "-cpu-used", "4"),
    ),
    ".apng": _Format("apng", "rgba", True, False, ("-plays", "0", "-f", "apng")),
}
FORMATS = f"{', '.join(_FORMATS)}, or a name without an ending for a folder of PNG files"


def check_film(path: Path, *, transparent: bool = False) -> None:
    """Raises `UserError` unless a film of that name can be written: before the work, not after."""
    if path.suffix and path.suffix not in _FORMATS:
        raise UserError(f"--out {path} must end in {FORMATS}")
    if transparent and path.suffix and not _FORMATS[path.suffix].transparent:
        raise UserError(
            f"--out {path}: {path.suffix} knows no transparency; write .webm, .apng or a folder"
        )
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}; create it first")
    if path.is_dir() and (path.suffix or any(path.iterdir())):
        raise UserError(f"--out {path} is a folder with something in it; give another name")
    if path.is_file() and not path.suffix:
        raise UserError(f"--out {path} is a file; give another name for a folder of PNG files")
    make_writable(path.parent)


def write_film(path: str | Path, frames: Iterable[Any], fps: float) -> None:
    """Writes `frames` as they come, one at a time in memory; all of one size.

    The format goes by `path`'s ending (`FORMATS`). The film is written under a temporary name and
    renamed when it is whole.

    Args:
      frames: [H, W, C] arrays: RGB, or RGBA (not multiplied by alpha) for formats with
        transparency; uint8, or floats in [0, 1].

    Raises:
      UserError: there is no frame, or it cannot be written.
    """
    path = Path(path)
    unfinished = path.parent / f".{path.stem}.{os.getpid()}{path.suffix}"
    pictures = (_to_bytes(frame) for frame in frames)
    try:
        first = next(pictures, None)
        if first is None:
            raise UserError(f"{path}: there are no frames to write")
        write = _write_video if path.suffix else _write_pngs
        write(unfinished, first, pictures, fps)
        if path.is_dir():
            path.rmdir()  # empty, or this fails
        os.replace(unfinished, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{path} cannot be written ({reason}); make room or choose another place",
            status=TRY_AGAIN,
        ) from error
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        unfinished.unlink(missing_ok=True)


def _write_video(unfinished: Path, first: np.ndarray, others: Iterator[np.ndarray], fps: float):
    kind = _FORMATS[unfinished.suffix]
    height, width, channels = first.shape
    pad = (height % 2, width % 2) if kind.even else (0, 0)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error", "-f", "rawvideo"]
    command += ["-pix_fmt", "rgba" if channels == 4 else "rgb24", "-r", f"{fps:.6f}"]
    command += ["-s", f"{width + pad[1]}x{height + pad[0]}", "-i", "-", "-an", "-c:v", kind.codec]
    command += ["-pix_fmt", kind.pixels if channels == 4 else kind.pixels.replace("yuva", "yuv")]
    command += [*kind.options, os.path.abspath(unfinished)]
    # Not by imageio-ffmpeg, whose writer tells nothing of an ffmpeg that fails in the end. A group
    # of its own, so that Ctrl-C is for this process, which ends it.
    with (
        tempfile.TemporaryFile() as told,
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=told, process_group=0) as ffmpeg,
    ):
        try:
            for frame in itertools.chain([first], others):
                if frame.shape != first.shape:
                    raise ValueError(f"a frame of {frame.shape} in a film of {first.shape}")
                # The last row or column is repeated where sides must be even.
                padded = np.pad(frame, [(0, pad[0]), (0, pad[1]), (0, 0)], "edge")
                ffmpeg.stdin.write(np.ascontiguousarray(padded))
            ffmpeg.stdin.close()
        except BrokenPipeError:  # It ended, and says why.
            with contextlib.suppress(BrokenPipeError):
                ffmpeg.stdin.close()
        except BaseException:
            ffmpeg.kill()
            raise
        if ffmpeg.wait():
            told.seek(0)
            raise _fault(told.read().decode(errors="replace"))


def _write_pngs(unfinished: Path, first: np.ndarray, others: Iterator[np.ndarray], fps: float):
    del fps  # a folder of pictures has no speed
    unfinished.mkdir()
    for number, frame in enumerate(itertools.chain([first], others)):
        Image.fromarray(frame).save(unfinished / f"{number:05d}.png")


def _to_bytes(frame: np.ndarray) -> UInt8[np.ndarray, "H W C"]:
    if frame.dtype == np.uint8:
        return frame
    return np.round(np.clip(frame, 0, 1) * 255).astype(np.uint8)


def _fault(told: str) -> OSError:
    """What went wrong, from what ffmpeg printed."""
    if "No space left" in told:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.partition("] ")[2] or line for line in told.splitlines()]
    return OSError(errno.EIO, f"ffmpeg: {lines[0]}" if lines else "ffmpeg failed")

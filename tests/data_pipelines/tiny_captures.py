"""Tiny captures for tests: cheap frames whose pixels say which frame they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from data_pipelines.cameras import axis_angle, orbit, rotation_to_6d
from data_pipelines.captures import SkipClip, SkippedFrame
from data_pipelines.frame import EXPRESSION_SIZE, MONOCULAR, MULTI_VIEW, Frame, expression_part


def expression(jaw: float = 0.0) -> np.ndarray:
    """A neutral expression code but for the jaw, opened by `jaw` radians."""
    code = np.zeros(EXPRESSION_SIZE, np.float32)
    for part in ("neck", "R"):
        code[expression_part(part)] = rotation_to_6d(np.eye(3))
    code[expression_part("jaw")] = rotation_to_6d(axis_angle(np.array([1.0, 0, 0]), jaw))
    return code


def frame(clip: int = 0, camera: int = 0, timestep: int = 0, size: int = 16, **changes) -> Frame:
    """A frame with a smooth picture of its own, and the jaw opening with time."""
    ramp = np.linspace(0, 1, size)
    image = np.stack(
        [
            np.broadcast_to(200 * ramp, (size, size)),
            np.broadcast_to(200 * ramp[:, None], (size, size)),
            np.full((size, size), (37 * clip + 11 * camera + 5 * timestep) % 256),
        ],
        axis=-1,
    ).astype(np.uint8)
    made = Frame(
        image=image,
        mask=np.where(np.hypot(*np.meshgrid(ramp - 0.5, ramp - 0.5)) < 0.4, 255, 0).astype("uint8"),
        cam2head=orbit(23.0 * camera, 0.0, 1.0, np.zeros(3)).astype(np.float32),
        K=np.array([[2, 0, 0.5], [0, 2, 0.5], [0, 0, 1]], np.float32),
        expression=expression(0.1 * (timestep % 4)),
        person=f"p{clip // 2}",
        sequence=f"s{clip}",
        timestep=timestep,
        camera=f"cam{camera}",
        source=MONOCULAR,
    )
    return dataclasses.replace(made, **changes)


@dataclasses.dataclass(frozen=True)
class TinyCaptures:
    """Clips of `timesteps` moments seen by `cameras` cameras; more than one make it multi-view."""

    name: str = "tiny"
    num_clips: int = 4
    timesteps: int = 5
    cameras: int = 1
    size: int = 16
    skip: tuple[int, ...] = ()
    bad_frames: tuple[int, ...] = ()

    def clip_name(self, i: int) -> str:
        return f"s{i}"

    def clip(self, i: int) -> Iterator[Frame | SkippedFrame]:
        source = MULTI_VIEW if self.cameras > 1 else MONOCULAR
        for timestep in range(self.timesteps):
            for camera in range(self.cameras):
                made = frame(i, camera, timestep, self.size, source=source)
                if timestep in self.bad_frames:
                    made = dataclasses.replace(made, K=np.full((3, 3), np.nan, np.float32))
                yield made
        if i in self.skip:
            raise SkipClip("its calibration is missing")


@dataclasses.dataclass(frozen=True)
class DiesAtClip(TinyCaptures):
    """Tiny captures whose clip `dies_at` ends the program."""

    dies_at: int = 3

    def clip(self, i: int):
        if i == self.dies_at:
            raise KeyboardInterrupt
        return super().clip(i)


def contents(folder) -> dict[str, bytes]:
    """Every file below a folder by its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}

"""Writes tiny captures as the tracker and the published data sets lay them out on disk."""

import io
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch_save
from PIL import Image

from data_pipelines import cameras
from data_pipelines.frame import EXPRESSION_PARTS


def photo(width: int, height: int, seed: int = 0) -> np.ndarray:
    """[H, W, 3] uint8 of smooth colours, none of them white."""
    coarse = np.random.default_rng(seed).integers(20, 200, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def write_video(path: Path, frames: list[np.ndarray], fps: int = 25) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    iio.imwrite(path, np.stack(frames), fps=fps, plugin="FFMPEG", macro_block_size=2)


def flame_frame(
    seed: int = 0,
    cam2world: np.ndarray | None = None,
    head2world: np.ndarray | None = None,
    focal: float = 2.5,
) -> dict:
    """The content of a `.frame`; the camera has OpenCV axes, `focal` is in sides of the crop."""
    rng = np.random.default_rng(seed)
    if cam2world is None:
        cam2world = cameras.orbit(20.0, 5.0, 1.0, np.zeros(3))
    if head2world is None:
        R = cameras.axis_angle(np.array([0.3, 1.0, 0.1]), 0.4)
        head2world = cameras.rigid(R, np.array([0.01, -0.02, 0.03]))
    world2cam = np.linalg.inv(cam2world @ cameras.OPENGL_TO_OPENCV)
    # The neck bends the skull against the shoulders: only both together give the head's pose.
    neck = cameras.rigid(cameras.axis_angle(np.array([1.0, 0, 0]), 0.1), np.array([0, 0.01, 0]))
    shoulders = head2world @ np.linalg.inv(neck)
    flame = {name: rng.normal(0, 0.3, (1, size)) for name, size in EXPRESSION_PARTS.items()}
    flame["R"] = cameras.rotation_to_6d(shoulders[None, :3, :3])
    flame["t"] = shoulders[None, :3, 3]
    flame["shape"] = rng.normal(0, 1, (1, 300))
    camera = {
        "R_base_0": world2cam[None, :3, :3],
        "t_base_0": world2cam[None, :3, 3],
        "fl": np.array([[focal]]),
        "pp": rng.normal(0, 0.02, (1, 2)),
    }
    joints = np.tile(np.eye(4), (1, 5, 1, 1))
    joints[0, 1] = neck
    return {
        "flame": {name: value.astype(np.float32) for name, value in flame.items()},
        "camera": {name: value.astype(np.float32) for name, value in camera.items()},
        "joint_transforms": joints.astype(np.float32),
        "img_size": (512, 512),
        "frame_id": 0,
        "global_step": 200,
    }


def write_frame(path: Path, content: dict | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch_save.save(path, flame_frame() if content is None else content)


def write_tracking(
    root: Path,
    name: str,
    crop: tuple[int, int, int, int],
    frames: list[dict],
    segmentation: np.ndarray | None = None,
) -> None:
    """The tracker's output for `name`: crop (ymin, ymax, xmin, xmax), masks and frames."""
    processing = root / "processing" / name
    if segmentation is None:
        segmentation = np.zeros((512, 512), np.uint8)
        segmentation[60:, 100:400] = 13
    processing.mkdir(parents=True, exist_ok=True)
    np.save(processing / "crop_ymin_ymax_xmin_xmax.npy", np.array(crop, np.int32))
    for t, content in enumerate(frames):
        write_image(processing / f"seg_og/{t:05d}.png", segmentation)
        write_frame(root / "tracking" / name / f"checkpoint/{t:05d}.frame", content)


def jpeg_bytes(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()

"""Reads one frame of the Pixel3DMM tracker: FLAME's parameters and the camera, within reason.

What cannot be a head's tracking (a focal length of zero, a head a kilometre away, no rotation) is
refused with the file's name, before anything is computed with it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from etils import epath
from jaxtyping import Float

from data_pipelines import cameras
from data_pipelines.crop import IMAGE_SIZE
from data_pipelines.errors import UserError
from data_pipelines.frame import EXPRESSION_PARTS
from data_pipelines.torch_files import load_torch_file

LARGEST = {"code": 100.0, "t": 100.0, "joint_transforms": 100.0, "t_base_0": 100.0, "pp": 4.0}
"""Beyond these no head was tracked: FLAME's parameters are a few units, places a few metres, the
principal point lies at 0 in [-1, 1]."""

FOCAL_LENGTHS = (0.2, 100.0)
"""In sides of the crop: from a fish-eye's to a telescope's."""


@dataclasses.dataclass(frozen=True)
class Tracking:
    """One `.frame` of the tracker.

    Attributes:
      expression: [135] float32 code, in the order of `EXPRESSION_PARTS`.
      head2world: [4, 4] float64 pose of the canonical head in the tracker's world.
      cam2world: [4, 4] float64 pose of the tracker's camera there, OpenCV axes.
      K: [3, 3] float64 intrinsics in pixels of the unwidened crop at 512x512.
    """

    expression: Float[np.ndarray, "135"]
    head2world: Float[np.ndarray, "4 4"]
    cam2world: Float[np.ndarray, "4 4"]
    K: Float[np.ndarray, "3 3"]

    @property
    def cam2head(self) -> Float[np.ndarray, "4 4"]:
        """The camera in the canonical head frame, float64."""
        return cameras.invert_rigid(self.head2world) @ self.cam2world


def read_tracking(path: epath.PathLike) -> Tracking:
    """Reads one `.frame` file.

    Raises:
      UserError: there is no such file; it is damaged; or a field is missing, has another shape, is
        not finite, or is nothing that a head's tracking can be.
    """
    content = load_torch_file(path)

    def field(*keys: str, shape: tuple[int, ...]) -> np.ndarray:
        value = content
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        name = "/".join(keys)
        if not isinstance(value, np.ndarray):
            raise UserError(f"{path}: no field {name}; is it a Pixel3DMM tracking?")
        if value.shape != (1, *shape):
            raise UserError(
                f"{path}: field {name} has shape {list(value.shape)}, expected {[1, *shape]}."
            )
        if value.dtype.kind != "f" or not np.isfinite(value).all():
            raise UserError(f"{path}: field {name} holds values that are not finite numbers.")
        value = value[0].astype(np.float64)
        if np.abs(value).max(initial=0) > (most := LARGEST.get(keys[-1], LARGEST["code"])):
            raise UserError(
                f"{path}: field {name} reaches {np.abs(value).max():.3g}, where {most:g} is beyond "
                "any head; track it again."
            )
        return value

    def rotation(*keys: str, shape: tuple[int, ...]) -> np.ndarray:
        value = field(*keys, shape=shape)
        rows = value.reshape(2, 3) if shape == (6,) else value
        lengths = np.linalg.norm(rows, axis=-1)
        apart = np.linalg.norm(np.cross(rows[0], rows[1])) > 0.1 * lengths[0] * lengths[1]
        if not (apart and lengths.min() > 0.1):
            raise UserError(f"{path}: field {'/'.join(keys)} is no rotation; track it again.")
        if shape == (3, 3) and np.abs(value @ value.T - np.eye(3)).max() > 0.1:
            raise UserError(f"{path}: field {'/'.join(keys)} is no rotation; track it again.")
        return value

    code = [
        rotation("flame", part, shape=(size,)) if size == 6 else field("flame", part, shape=(size,))
        for part, size in EXPRESSION_PARTS.items()
    ]
    joints = field("joint_transforms", shape=(5, 4, 4))
    if np.linalg.det(joints[1, :3, :3]) < 0.1:
        raise UserError(f"{path}: field joint_transforms is no rotation; track it again.")
    focal = float(field("camera", "fl", shape=(1,))[0])
    if not FOCAL_LENGTHS[0] <= focal <= FOCAL_LENGTHS[1]:
        raise UserError(
            f"{path}: field camera/fl is {focal:.3g}; a focal length is {FOCAL_LENGTHS[0]:g} to "
            f"{FOCAL_LENGTHS[1]:g} sides of the crop; track it again."
        )
    R = cameras.rotation_from_6d(rotation("flame", "R", shape=(6,)))
    pose = cameras.rigid(R, field("flame", "t", shape=(3,)))
    # Joint 1 is FLAME's neck: the canonical head moves with the skull, not with the shoulders.
    head2world = pose @ joints[1]
    head2world[:3, :3] = cameras.nearest_rotation(head2world[:3, :3])
    world2cam = cameras.rigid(
        rotation("camera", "R_base_0", shape=(3, 3)), field("camera", "t_base_0", shape=(3,))
    )
    K = np.eye(3)
    K[0, 0] = K[1, 1] = focal * IMAGE_SIZE
    # From [-1, 1] to pixels, in the tracker's convention.
    K[:2, 2] = (field("camera", "pp", shape=(2,)) + 1) * (IMAGE_SIZE / 2 + 0.5)
    return Tracking(
        expression=np.concatenate(code).astype(np.float32),
        head2world=head2world,
        # A true inverse: the tracker's float32 rotation is not orthonormal to the last digit.
        cam2world=np.linalg.inv(world2cam) @ cameras.OPENGL_TO_OPENCV,
        K=K,
    )

"""What a film shows: the cameras, expressions and background of each frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageColor

from data_pipelines.errors import UserError
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.avatar_file import Avatar
from flexavatar_jax.avatars.camera_paths import circle_cameras, orbit_cameras, read_camera_path
from flexavatar_jax.avatars.performances import Performance, follow_pose

FRAMES = 72
"""Of a film that nothing else gives a length."""

MOST = {"frames": 100_000, "size": 4096, "fps": 240}
"""Upper bounds of a film's options: beyond them it is a slip of the pen."""

Background = tuple[float, float, float] | None


class Shot(NamedTuple):
    """A film of one avatar: its images, and how many they are."""

    images: Iterator[Float[np.ndarray, "s s C"]]
    frames: int


def shots(
    animator: Animator,
    avatar: Avatar,
    camera: str,
    frames: int | None,
    driving: Performance | None,
    pose: str,
    size: int | None,
    background: Background,
) -> Shot:
    """A film of `avatar`.

    Args:
      camera: "orbit", "circle", "still", or a camera path's file.
      frames: wanted, where neither a performance nor a file says how many.
      driving: the expressions; None: the avatar's own, unchanged.
      pose: "kept": the head moves before the camera as the driver's did; "frozen": it does not.

    Raises:
      UserError: numbers of frames that contradict one another; "kept" without a driver or with a
        camera that moves by itself.
    """
    count = count_frames(camera, frames, driving)
    cam2heads, Ks = views_of(avatar, camera, count)
    if pose == "kept":
        if driving is None or camera != "still":
            raise UserError("--pose kept is the driver's: give --driving, and leave out --camera")
        cam2heads = follow_pose(avatar.cam2head, driving.cam2heads)
    expression = avatar.expression + avatar.offsets[0] if driving is None else driving.expressions
    expressions = np.broadcast_to(expression, (count, expression.shape[-1]))
    images = animator.frames(
        avatar.code, expressions, cam2heads, Ks, size=size, background=background
    )
    return Shot(images, count)


def count_frames(
    camera: str, frames: int | None, driving: Performance | None, *, still: int = 1
) -> int:
    """How many frames a film has, `still` of them where nothing moves and none says.

    Raises `UserError` for numbers that contradict one another.
    """
    if driving is not None and frames is not None:
        raise UserError(
            f"--frames {frames} is for a film of nobody's performance; a driven avatar has as many "
            "frames as its performance: leave out --frames or --driving"
        )
    if camera in ("orbit", "circle", "still"):
        default = still if camera == "still" else FRAMES
        return len(driving.expressions) if driving is not None else frames or default
    count = len(read_camera_path(camera)[0])
    if frames is not None and frames != count:
        raise UserError(f"--frames is {frames}, and {camera} has {count} cameras; leave it out")
    if driving is not None and len(driving.expressions) != count:
        raise UserError(
            f"{camera} has {count} cameras and the performance {len(driving.expressions)} frames; "
            "give a camera for each"
        )
    return count


def views_of(
    avatar: Avatar, camera: str, count: int
) -> tuple[Float[np.ndarray, "E 4 4"], Float[np.ndarray, "E 3 3"]]:
    """Cameras and intrinsics of a film of `avatar`, which begins at its source's view."""
    Ks = np.repeat(avatar.K[None], count, axis=0)
    if camera == "still":
        return np.repeat(avatar.cam2head[None], count, axis=0), Ks
    if camera == "orbit":
        return orbit_cameras(avatar.cam2head, count), Ks
    if camera == "circle":
        return circle_cameras(avatar.cam2head, count), Ks
    cam2heads, own = read_camera_path(camera)
    return cam2heads, Ks if own is None else own


def side_by_side(columns: Sequence[Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Frames of several films in one, from left to right."""
    for frames in zip(*columns, strict=True):
        yield np.concatenate(frames, axis=1)


def beside(
    driving: Performance, count: int, size: int, background: Background
) -> Iterator[np.ndarray]:
    """The first `count` of the driver's pictures, sized like the avatar's."""
    for _, picture in zip(range(count), driving.pictures(), strict=False):
        image = Image.fromarray(picture).resize((size, size), Image.Resampling.HAMMING)
        image = image.convert("RGB" if background is not None else "RGBA")
        yield np.asarray(image, np.float32) / 255


def grid(
    animator: Animator,
    codes: Float[np.ndarray, "n n N D"],
    expressions: Float[np.ndarray, "n n 135"],
    avatar: Avatar,
    camera: str,
    frames: int | None,
    driving: Performance | None,
    size: int | None,
    background: Background,
) -> tuple[Iterator[np.ndarray], int]:
    """Frames that show all of a square of codes, as `avatar`'s source was seen, and their number.

    Each code has its expression, or all have the performance's.
    """
    count = count_frames(camera, frames, driving)
    cam2heads, Ks = views_of(avatar, camera, count)
    side = len(codes)

    def every_frame() -> Iterator[np.ndarray]:
        flat = codes.reshape(side * side, *codes.shape[2:])
        for t in range(count):
            own = expressions.reshape(side * side, -1)
            if driving is not None:
                own = np.repeat(driving.expressions[t][None], side * side, axis=0)
            images = animator.render(
                flat, own, cam2heads[t], Ks[t], size=size, background=background
            )
            rows = images.reshape(side, side, *images.shape[1:])
            yield np.concatenate([np.concatenate(row, axis=1) for row in rows])

    return every_frame(), count


def parse_background(text: str) -> Background:
    """The RGB in [0, 1] of a colour's name or #rrggbb; None for "transparent".

    Raises:
      UserError: no such colour.
    """
    if text == "transparent":
        return None
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError:
        raise UserError(
            f"--background is {text!r}; expected white, black, a colour's name, #rrggbb, or "
            "transparent"
        ) from None
    return red / 255, green / 255, blue / 255

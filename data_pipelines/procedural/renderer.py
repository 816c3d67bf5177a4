"""A renderer of textured triangles with a z-buffer, in NumPy.

It shares no code with the splatting kernels, so that a wrong camera or colour convention in either
cannot cancel out. Triangles are scan-converted into spans, spans into pixels; the nearest triangle
of a pixel is found first and only it is shaded. Edges are smoothed by 2x2 supersampling.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from data_pipelines import cameras

NEAR = 0.05
"""Metres; triangles with a corner nearer to the camera are not drawn."""


@dataclasses.dataclass(frozen=True)
class Light:
    """Lighting of a scene, in the frame of its vertices.

    Attributes:
      direction: [3] unit vector towards the key light.
      key, fill: [3] colour of the key light and of the light from everywhere.
    """

    direction: np.ndarray
    key: np.ndarray
    fill: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is drawn: triangles that share one texture.

    Attributes:
      vertices: [V, 3] float32 metres.
      normals: [V, 3] float32 unit vectors out of the surface.
      uvs: [V, 2] float32 in the unit square, (0, 0) at the first texel's outer corner.
      faces: [F, 3] int vertex numbers, counter-clockwise from outside.
      two_sided: [F] bool, whether the face is drawn from behind too.
      texture: mip levels [h, w, 4] float32, each half the size of the one before: red, green, blue
        in [0, 1], and gloss.
      light: the light.
    """

    vertices: np.ndarray
    normals: np.ndarray
    uvs: np.ndarray
    faces: np.ndarray
    two_sided: np.ndarray
    texture: tuple[np.ndarray, ...]
    light: Light


def mip_levels(texture: Float[np.ndarray, "h w c"]) -> tuple[np.ndarray, ...]:
    """The texture and its halvings by 2x2 means, as long as both sides are even and over 32."""
    levels = [np.ascontiguousarray(texture, np.float32)]
    while all(side % 2 == 0 and side > 32 for side in levels[-1].shape[:2]):
        levels.append(_halved(levels[-1]))
    return tuple(levels)


def _halved(image: Float[np.ndarray, "h w c"]) -> Float[np.ndarray, "h//2 w//2 c"]:
    """Means of 2x2 pixels."""
    return (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4


def render(
    scene: Scene,
    cam2world: Float[np.ndarray, "4 4"],
    K: Float[np.ndarray, "3 3"],
    size: int,
    background: Float[np.ndarray, "h w 3"],
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Draws a scene.

    Args:
      cam2world: the camera in the frame of the vertices, OpenCV axes.
      K: intrinsics divided by the image size.
      size: height and width in pixels.
      background: what is seen past the scene, in [0, 1].

    Returns:
      RGB picture and matte (255 where the scene covers the whole pixel).
    """
    side = 2 * size
    world2cam = cameras.invert_rigid(np.asarray(cam2world, np.float64))
    points = scene.vertices @ world2cam[:3, :3].T + world2cam[:3, 3]
    projected = points @ (np.asarray(K) * [[side], [side], [1]]).T
    depth = np.maximum(points[:, 2], NEAR)
    # A sample lies at its cell's centre: half a cell off puts centres on whole numbers.
    screen = projected[:, :2].T / depth - 0.5

    # Corners first, so that arithmetic runs along the triangles: x and y are [3, F].
    corners = np.ascontiguousarray(scene.faces.T)
    x, y = screen[0][corners], screen[1][corners]
    area = (x[1] - x[0]) * (y[2] - y[0]) - (y[1] - y[0]) * (x[2] - x[0])
    # Image y runs down, so counter-clockwise from outside has a negative area on screen.
    drawn = (area < -1e-9) | (scene.two_sided & (area > 1e-9))
    drawn &= _smallest(depth[corners]) > NEAR
    corners, x, y, area = corners[:, drawn], x[:, drawn], y[:, drawn], area[drawn]

    planes = _barycentric_planes(x, y)
    nearness = 1 / depth[corners]
    covered, winner = _nearest(x, y, planes, nearness, side)
    weights = _weights(planes[..., winner], nearness[:, winner], covered % side, covered // side)
    behind = area[winner] > 0
    color = _shade(scene, corners[:, winner], behind, weights, cam2world, float(K[0][0]) * size)

    samples = np.zeros((side * side, 4), np.float32)
    samples[covered, :3] = color
    samples[covered, 3] = 1
    pixels = _halved(samples.reshape(side, side, 4))
    rgb = pixels[..., :3] + (1 - pixels[..., 3:]) * background
    return _to_bytes(rgb), _to_bytes(pixels[..., 3])


def _smallest(values: Float[np.ndarray, "3 f"]) -> Float[np.ndarray, "f"]:
    return np.minimum(np.minimum(values[0], values[1]), values[2])


def _largest(values: Float[np.ndarray, "3 f"]) -> Float[np.ndarray, "f"]:
    return np.maximum(np.maximum(values[0], values[1]), values[2])


def _barycentric_planes(
    x: Float[np.ndarray, "3 f"], y: Float[np.ndarray, "3 f"]
) -> Float[np.ndarray, "3 3 f"]:
    """Barycentric weight of each corner c on screen as a plane: p[c, 0] x + p[c, 1] y + p[c, 2]."""
    after, before = [1, 2, 0], [2, 0, 1]
    slope_x, slope_y = y[after] - y[before], x[before] - x[after]
    constant = x[after] * y[before] - x[before] * y[after]
    planes = np.stack([slope_x, slope_y, constant], axis=1)
    return planes / constant.sum(axis=0)


def _weights(
    planes: Float[np.ndarray, "3 3 n"],
    nearness: Float[np.ndarray, "3 n"],
    x: Int[np.ndarray, "n"],
    y: Int[np.ndarray, "n"],
) -> Float[np.ndarray, "3 n"]:
    """Perspective-correct barycentric weights of samples (x, y) in their triangles."""
    weights = (planes[:, 0] * x + planes[:, 1] * y + planes[:, 2]) * nearness
    return (weights / (weights[0] + weights[1] + weights[2])).astype(np.float32)


def _nearest(
    x: Float[np.ndarray, "3 f"],
    y: Float[np.ndarray, "3 f"],
    planes: Float[np.ndarray, "3 3 f"],
    nearness: Float[np.ndarray, "3 f"],
    side: int,
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Numbers of the covered samples (row by row), and the nearest triangle at each."""
    first = np.clip(np.ceil(_smallest(y)), 0, side).astype(np.int64)
    last = np.clip(np.floor(_largest(y)), -1, side - 1).astype(np.int64)
    owner, row = _expand(first, last)

    # Span of a triangle on a row: where all three weights, linear in x, are positive.
    slope = planes[:, 0, owner]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -(planes[:, 1, owner] * row + planes[:, 2, owner]) / slope
    start = _largest(np.where(slope > 0, crossing, -np.inf))
    end = _smallest(np.where(slope < 0, crossing, np.inf))
    start = np.clip(np.ceil(start), 0, side).astype(np.int64)
    end = np.clip(np.floor(end), -1, side - 1).astype(np.int64)
    span, column = _expand(start, end)
    owner, row = owner[span], row[span]

    # One over depth is linear on screen too.
    near = np.einsum("cf,cpf->pf", nearness, planes)
    near = near[0, owner] * column + near[1, owner] * row + near[2, owner]
    # One number orders samples by depth and says whose they are: nearness bits, triangle bits.
    bits = near.astype(np.float32).view(np.int32).astype(np.int64)
    buffer = np.full(side * side, -1, np.int64)
    np.maximum.at(buffer, row * side + column, (bits << 32) | owner)
    covered = np.flatnonzero(buffer >= 0)
    return covered, buffer[covered] & 0xFFFFFFFF


def _expand(
    first: Int[np.ndarray, "n"], last: Int[np.ndarray, "n"]
) -> tuple[Int[np.ndarray, "m"], Int[np.ndarray, "m"]]:
    """All (n, i) with first[n] <= i <= last[n]."""
    count = np.maximum(last - first + 1, 0)
    owner = np.repeat(np.arange(len(first)), count)
    start = np.cumsum(count) - count
    return owner, np.arange(len(owner)) - start[owner] + first[owner]


def _shade(
    scene: Scene,
    corners: Int[np.ndarray, "3 n"],
    from_behind: Bool[np.ndarray, "n"],
    weights: Float[np.ndarray, "3 n"],
    cam2world: Float[np.ndarray, "4 4"],
    pixels_a_metre: float,
) -> Float[np.ndarray, "n 3"]:
    """Colour of samples under a key light, a weaker one against it, and light from above."""
    attributes = np.concatenate([scene.vertices, scene.normals, scene.uvs], axis=1)
    values = attributes[corners[0]] * weights[0, :, None]
    values += attributes[corners[1]] * weights[1, :, None]
    values += attributes[corners[2]] * weights[2, :, None]
    position, normal, uv = values[:, :3], values[:, 3:6], values[:, 6:]
    normal = _unit(np.where(from_behind[:, None], -normal, normal))
    view = _unit(np.asarray(cam2world, np.float32)[:3, 3] - position)

    albedo = _sample(scene.texture, uv, pixels_a_metre)
    light = scene.light
    towards = np.asarray(light.direction, np.float32)
    facing = normal @ towards
    diffuse = np.maximum(0.75 * facing + 0.25, 0) + 0.45 * np.maximum(-0.75 * facing - 0.1, 0)
    sky = 0.8 + 0.2 * normal[:, 1]
    shade = diffuse[:, None] * light.key.astype(np.float32)
    shade += sky[:, None] * light.fill.astype(np.float32)
    highlight = np.einsum("nc,nc->n", normal, _unit(view + towards))
    highlight = np.maximum(highlight, 0) ** 24
    return np.clip(albedo[:, :3] * shade + (albedo[:, 3] * highlight)[:, None], 0, 1)


def _unit(vectors: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    return vectors / np.sqrt(np.einsum("nc,nc->n", vectors, vectors) + 1e-12)[:, None]


def _sample(
    levels: tuple[np.ndarray, ...], uv: Float[np.ndarray, "n 2"], pixels_a_metre: float
) -> Float[np.ndarray, "n 4"]:
    """Bilinear texture look-up, in the mip level that suits the picture's scale.

    A metre of skin takes about the whole width of the texture; the scale is that of a metre off.
    """
    texels_a_metre = levels[0].shape[1]
    level = int(np.clip(np.round(np.log2(texels_a_metre / pixels_a_metre)), 0, len(levels) - 1))
    texture = levels[level]
    h, w, channels = texture.shape
    x = np.clip(uv[:, 0] * np.float32(w) - np.float32(0.5), 0, w - 1.001)
    y = np.clip(uv[:, 1] * np.float32(h) - np.float32(0.5), 0, h - 1.001)
    left, top = x.astype(np.int32), y.astype(np.int32)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    flat = texture.reshape(-1, channels)
    corner = top * w + left
    upper = flat[corner] * (1 - fx) + flat[corner + 1] * fx
    lower = flat[corner + w] * (1 - fx) + flat[corner + w + 1] * fx
    return upper * (1 - fy) + lower * fy


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)

"""A renderer of textured triangles with a z-buffer, in NumPy.

It shares no code with the splatting kernels, so that a wrong camera or colour convention in either
cannot cancel out. Triangles are scan-converted into spans, spans into pixels; the nearest triangle
of a pixel is found first and only it is shaded. Edges are smoothed by 2x2 supersampling.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipelines import cameras

SUPERSAMPLING = 2
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
        t = levels[-1]
        levels.append((t[::2, ::2] + t[1::2, ::2] + t[::2, 1::2] + t[1::2, 1::2]) / 4)
    return tuple(levels)


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
    side = size * SUPERSAMPLING
    world2cam = cameras.invert_rigid(np.asarray(cam2world, np.float64))
    points = scene.vertices @ world2cam[:3, :3].T.astype(np.float32)
    points += world2cam[:3, 3].astype(np.float32)
    depth = points[:, 2]
    projected = points @ (np.asarray(K) * [[side], [side], [1]]).T.astype(np.float32)
    # A sample lies at its cell's centre: half a cell off puts centres on whole numbers.
    screen = projected[:, :2] / np.maximum(depth, NEAR)[:, None] - np.float32(0.5)

    a, b, c = (screen[scene.faces[:, i]] for i in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    # Image y runs down, so counter-clockwise from outside has a negative area on screen.
    drawn = (depth[scene.faces].min(axis=1) > NEAR) & (
        (area < -1e-9) | (scene.two_sided & (area > 1e-9))
    )
    faces = scene.faces[drawn]
    triangles = np.stack([a[drawn], b[drawn], c[drawn]], axis=1).astype(np.float64)
    planes = _barycentric_planes(triangles)

    inverse_depth = (1 / depth[faces]).astype(np.float64)
    nearness = np.einsum("fc,fck->fk", inverse_depth, planes)
    covered, winner = _nearest(triangles, planes, nearness, side)

    y, x = np.divmod(covered, side)
    at = np.stack([x, y, np.ones_like(x)], axis=-1).astype(np.float64)
    weights = np.einsum("nck,nk->nc", planes[winner], at) * inverse_depth[winner]
    weights = (weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32)
    color = _shade(scene, faces[winner], (area[drawn] > 0)[winner], weights, cam2world, K, size)

    samples = np.zeros((side * side, 4), np.float32)
    samples[covered, :3] = color
    samples[covered, 3] = 1
    s = SUPERSAMPLING
    pixels = samples.reshape(size, s, size, s, 4).mean(axis=(1, 3))
    rgb = pixels[..., :3] + (1 - pixels[..., 3:]) * background
    return _to_bytes(rgb), _to_bytes(pixels[..., 3])


def _barycentric_planes(triangles: Float[np.ndarray, "f 3 2"]) -> Float[np.ndarray, "f 3 3"]:
    """Each corner's screen-space barycentric weight as a plane: w = p[0] x + p[1] y + p[2]."""
    after, before = np.roll(triangles, -1, axis=1), np.roll(triangles, -2, axis=1)
    edge = before - after
    plane = np.stack(
        [
            -edge[..., 1],
            edge[..., 0],
            edge[..., 1] * after[..., 0] - edge[..., 0] * after[..., 1],
        ],
        axis=-1,
    )
    twice_area = plane[..., 2].sum(axis=1)
    return plane / twice_area[:, None, None]


def _nearest(
    triangles: Float[np.ndarray, "f 3 2"],
    planes: Float[np.ndarray, "f 3 3"],
    nearness: Float[np.ndarray, "f 3"],
    side: int,
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Numbers of the covered samples (row by row), and the nearest triangle at each."""
    # Rows of each triangle.
    y = triangles[..., 1]
    first = np.clip(np.ceil(y.min(axis=1)), 0, side).astype(np.int64)
    last = np.clip(np.floor(y.max(axis=1)), -1, side - 1).astype(np.int64)
    owner, row = _expand(first, last)

    # Span of a triangle on a row: where all three weights, linear in x, are positive.
    slope = planes[..., 0][owner]
    offset = planes[..., 1][owner] * row[:, None] + planes[..., 2][owner]
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = -offset / slope
    start = np.where(slope > 0, crossing, -np.inf).max(axis=1)
    end = np.where(slope < 0, crossing, np.inf).min(axis=1)
    start = np.clip(np.ceil(start), 0, side).astype(np.int64)
    end = np.clip(np.floor(end), -1, side - 1).astype(np.int64)
    span, x = _expand(start, end)
    owner, row = owner[span], row[span]

    # One number orders samples by depth and says whose they are: nearness bits, triangle bits.
    near = nearness[owner]
    near = near[:, 0] * x + near[:, 1] * row + near[:, 2]
    bits = near.astype(np.float32).view(np.int32).astype(np.int64)
    buffer = np.full(side * side, -1, np.int64)
    np.maximum.at(buffer, row * side + x, (bits << 32) | owner)
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
    corners: Int[np.ndarray, "n 3"],
    from_behind: np.ndarray,
    weights: Float[np.ndarray, "n 3"],
    cam2world: np.ndarray,
    K: np.ndarray,
    size: int,
) -> Float[np.ndarray, "n 3"]:
    """Colour of samples: wrapped diffuse light, a little rim darkening, and highlights by gloss."""
    attributes = np.concatenate([scene.vertices, scene.normals, scene.uvs], axis=1)
    values = attributes[corners[:, 0]] * weights[:, :1]
    values += attributes[corners[:, 1]] * weights[:, 1:2]
    values += attributes[corners[:, 2]] * weights[:, 2:]
    position, normal, uv = values[:, :3], values[:, 3:6], values[:, 6:]
    normal = normal / np.sqrt(np.einsum("nc,nc->n", normal, normal) + 1e-12)[:, None]
    normal = np.where(from_behind[:, None], -normal, normal)
    view = np.asarray(cam2world, np.float32)[:3, 3] - position
    view /= np.sqrt(np.einsum("nc,nc->n", view, view))[:, None]

    albedo = _sample(scene.texture, uv, pixels_a_metre=float(K[0][0]) * size)
    light = scene.light
    towards = np.asarray(light.direction, np.float32)
    diffuse = np.maximum(normal @ towards * 0.75 + 0.25, 0)
    sky = 0.5 + 0.5 * normal[:, 1]
    shade = diffuse[:, None] * light.key.astype(np.float32)
    shade += (0.6 + 0.4 * sky)[:, None] * light.fill.astype(np.float32)
    half = view + towards
    half /= np.sqrt(np.einsum("nc,nc->n", half, half) + 1e-12)[:, None]
    highlight = np.maximum(np.einsum("nc,nc->n", normal, half), 0) ** 24
    color = albedo[:, :3] * shade + (albedo[:, 3] * highlight)[:, None]
    return np.clip(color, 0, 1)


def _sample(
    levels: tuple[np.ndarray, ...], uv: Float[np.ndarray, "n 2"], pixels_a_metre: float
) -> Float[np.ndarray, "n 4"]:
    """Bilinear texture look-up, in the mip level that suits the picture's scale.

    The atlas gives half a metre of skin half of its width.
    """
    texels_a_metre = levels[0].shape[1]
    level = int(np.clip(np.round(np.log2(texels_a_metre / pixels_a_metre)), 0, len(levels) - 1))
    texture = levels[level]
    h, w, channels = texture.shape
    x = np.clip(uv[:, 0] * np.float32(w) - np.float32(0.5), 0, w - 1.001)
    y = np.clip(uv[:, 1] * np.float32(h) - np.float32(0.5), 0, h - 1.001)
    left, top = x.astype(np.int64), y.astype(np.int64)
    fx, fy = (x - left)[:, None], (y - top)[:, None]
    flat = texture.reshape(-1, channels)
    corner = top * w + left
    upper = flat[corner] * (1 - fx) + flat[corner + 1] * fx
    lower = flat[corner + w] * (1 - fx) + flat[corner + w + 1] * fx
    return upper * (1 - fy) + lower * fy


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)

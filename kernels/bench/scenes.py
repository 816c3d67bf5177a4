"""Scenes to measure and test with, as NumPy arrays for `rasterize`; the same for the same seed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from kernels.ply import GaussianCloud


class Scene(NamedTuple):
    """Gaussians and cameras, in the order that `rasterize` takes them."""

    means: Float[np.ndarray, "*b N 3"]
    quats: Float[np.ndarray, "*b N 4"]
    scales: Float[np.ndarray, "*b N 3"]
    opacities: Float[np.ndarray, "*b N"]
    colors: Float[np.ndarray, "*b N C"]
    viewmats: Float[np.ndarray, "*b 4 4"]
    Ks: Float[np.ndarray, "*b 3 3"]


FOCAL = 3.2
"""Focal length in image sizes; a head seen from distance 1 fills the image."""

HEAD = np.array([0.078, 0.115, 0.098])
"""Half axes of the ellipsoid that stands for a head, in metres."""


def avatar(images: int = 1, num: int = 58_361, size: int = 512, seed: int = 0) -> Scene:
    """A head avatar: `num` small Gaussians on a head's surface, jittered for each of `images`.

    The camera looks at it from distance 1, up to 30 degrees from the side. Scales are log-normal
    with median 0.0012 and sigma 0.5, clipped at 0.01; opacities uniform in [0.1, 0.95].
    """
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=(num, 3))
    surface = HEAD * direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    means = surface + 0.001 * rng.normal(size=(images, num, 3))
    return _scene(
        rng,
        means,
        scales=np.minimum(0.0012 * np.exp(0.5 * rng.normal(size=(images, num, 3))), 0.01),
        opacities=rng.uniform(0.1, 0.95, (images, num)),
        size=size,
    )


def dense(images: int = 1, num: int = 100_000, size: int = 512, seed: int = 0) -> Scene:
    """A cloud that fills the image, hundreds of faint Gaussians deep at every pixel."""
    rng = np.random.default_rng(seed)
    return _scene(
        rng,
        means=rng.uniform(-0.15, 0.15, (images, num, 3)),
        scales=0.002 * np.exp(0.5 * rng.normal(size=(images, num, 3))),
        opacities=rng.uniform(0.01, 0.2, (images, num)),
        size=size,
    )


def sparse(images: int = 1, num: int = 5_000, size: int = 512, seed: int = 0) -> Scene:
    """Few Gaussians, of many sizes, that leave most of the image empty."""
    rng = np.random.default_rng(seed)
    return _scene(
        rng,
        means=rng.normal(0.0, 0.06, (images, num, 3)),
        scales=0.0008 * np.exp(0.8 * rng.normal(size=(images, num, 3))),
        opacities=rng.uniform(0.1, 1.0, (images, num)),
        size=size,
    )


def look_at_gaussians(gaussians: GaussianCloud, images: int = 1, size: int = 512) -> Scene:
    """Gaussians of a file, shared by cameras around them that see most of them.

    Files are taken to have y down and z forward, as those of 3D Gaussian Splatting have.
    """
    centre = np.median(gaussians.means, axis=0)
    radius = np.quantile(np.linalg.norm(gaussians.means - centre, axis=-1), 0.9)
    viewmats = []
    for angle in np.linspace(-np.pi / 6, np.pi / 6, images + 2)[1:-1]:
        c, s = np.cos(angle), np.sin(angle)
        viewmat = np.eye(4)
        viewmat[:3, :3] = [[c, 0, s], [0, 1, 0], [-s, 0, c]]
        viewmat[:3, 3] = [0, 0, 2 * FOCAL * max(radius, 1e-6)] - viewmat[:3, :3] @ centre
        viewmats.append(viewmat)
    arrays = (*gaussians, np.stack(viewmats), np.tile(intrinsics(size), (images, 1, 1)))
    return Scene(*(a.astype(np.float32) for a in arrays))


SCENES = {"avatar": avatar, "dense": dense, "sparse": sparse}


def _scene(rng, means, scales, opacities, size) -> Scene:
    """Random rotations and colours, and a camera around the scene for each image."""
    images, num = means.shape[:2]
    quats = rng.normal(size=(images, num, 4))
    arrays = Scene(
        means=means,
        quats=quats / np.linalg.norm(quats, axis=-1, keepdims=True),
        scales=scales,
        opacities=opacities,
        colors=rng.uniform(size=(images, num, 3)),
        viewmats=np.stack([_camera(angle) for angle in rng.uniform(-np.pi / 6, np.pi / 6, images)]),
        Ks=np.tile(intrinsics(size), (images, 1, 1)),
    )
    return Scene(*(a.astype(np.float32) for a in arrays))


def _camera(angle: float) -> Float[np.ndarray, "4 4"]:
    """World (y up, z out of the face) to camera, at distance 1 in front, turned by `angle`."""
    c, s = np.cos(angle), np.sin(angle)
    turned = np.array([[c, 0, -s], [0, -1, 0], [-s, 0, -c]])
    viewmat = np.eye(4)
    viewmat[:3, :3], viewmat[2, 3] = turned, 1.0
    return viewmat


def intrinsics(size: int) -> Float[np.ndarray, "3 3"]:
    """Intrinsics in pixels of a square image with focal length `FOCAL`."""
    focal, centre = FOCAL * size, size / 2
    return np.array([[focal, 0, centre], [0, focal, centre], [0, 0, 1]])

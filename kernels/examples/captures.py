"""Captures of scenes: pictures with known cameras, read from COLMAP's folders or made up."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, UInt8
from PIL import Image
from tqdm import tqdm

from kernels import rasterize
from kernels.examples import colmap
from kernels.examples.fit_image import load_picture, save_picture

HELD_OUT = 8
"""Every eighth picture is held out, as is usual since Mip-NeRF 360."""


class Views(NamedTuple):
    """Pictures of one size and their cameras."""

    pictures: UInt8[np.ndarray, "V H W 3"]
    viewmats: Float[np.ndarray, "V 4 4"]
    """World to camera, OpenCV axes."""
    Ks: Float[np.ndarray, "V 3 3"]
    """In pixels."""
    radial_coeffs: Float[np.ndarray, "V R"]
    tangential_coeffs: Float[np.ndarray, "V T"]
    """Distortion as `rasterize` takes it; of length 0 where there is none."""

    def camera(self, view: int | Array) -> dict[str, ArrayLike]:
        """One camera, by the names of `rasterize`'s arguments."""
        return {name: array[view] for name, array in self._asdict().items() if name != "pictures"}


class Capture(NamedTuple):
    """A scene's pictures, those to fit and those to judge by, and points to start from."""

    training: Views
    held_out: Views
    points: Float[np.ndarray, "P 3"]
    colors: Float[np.ndarray, "P 3"]
    """Of the points, from 0 to 1."""
    camera_model: str
    """Of all cameras: "pinhole" or "fisheye"."""


def read_capture(folder: Path, size: int) -> Capture:
    """A capture in COLMAP's layout: FOLDER/images and a model (`colmap.find_model`).

    Pictures are as their pixels are in the file, to which COLMAP's cameras belong, and not turned
    as an EXIF orientation says.

    Args:
      size: of the longer side of the pictures, in pixels, to which they are scaled.

    Raises:
      FileNotFoundError: a picture or the model is missing.
      ValueError: what `colmap.read_model` refuses, pictures that cannot be read, are of several
        sizes or not of their cameras' shape, outside of the folder, or fewer than two.
    """
    model = colmap.read_model(colmap.find_model(folder))
    if len(model.names) < 2:
        raise ValueError(f"{folder}: has 1 picture; expected 2 or more, as one is held out")
    images, pictures, Ks = folder / "images", [], []
    for name, (width, height), K in zip(
        tqdm(model.names, unit="picture"), model.sizes, model.Ks, strict=True
    ):
        path = images / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder}: a picture is called {name!r}; expected one in {images}")
        picture = load_picture(path, size, upright=False)
        _check_shape(path, width, height)
        if pictures and picture.shape != pictures[0].shape:
            raise ValueError(
                f"{path}: {picture.shape[1]}x{picture.shape[0]} pixels when scaled, the first "
                f"picture {pictures[0].shape[1]}x{pictures[0].shape[0]}; expected one size"
            )
        pictures.append(np.uint8(picture * 255 + 0.5))
        # Sides are rounded to whole pixels, alike enough for one factor.
        Ks.append(np.diag([picture.shape[1] / width] * 2 + [1.0]) @ K)
    lenses = model.radial_coeffs, model.tangential_coeffs
    views = Views(np.stack(pictures), model.viewmats, np.stack(Ks), *lenses)
    held_out = np.arange(len(pictures)) % HELD_OUT == 0
    training, kept = (Views(*(a[mask] for a in views)) for mask in (~held_out, held_out))
    return Capture(training, kept, model.points, model.colors, model.camera_model)


def _check_shape(path: Path, width: int, height: int) -> None:
    """Raises ValueError for a picture that is no copy of what a camera of that size took.

    Copies may be smaller or larger, and each of their sides off by a pixel.
    """
    with Image.open(path) as file:
        found = file.size
    if abs(found[0] * height - found[1] * width) > width + height:
        raise ValueError(
            f"{path}: {found[0]}x{found[1]} pixels, and its camera has {width}x{height}; expected "
            "the picture that COLMAP saw, or one scaled from it"
        )


def write_synthetic(folder: Path, *, size: int = 128, views: int = 64) -> None:
    """A made-up capture in COLMAP's layout: coloured balls, from cameras on a ring around them.

    It is rendered of 6,000 small Gaussians, of every third of which the model has a noisy point.
    """
    gaussians = _balls(np.random.default_rng(0))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "sparse" / "0").mkdir(parents=True, exist_ok=True)
    focal = 1.2 * size
    K = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]], np.float32)
    lines = []
    for view in tqdm(range(views), unit="picture"):
        viewmat, quat = _ring_camera(view / views)
        out = rasterize(*gaussians, viewmat, K, width=size, height=size)
        save_picture(folder / "images" / f"{view:03}.png", np.asarray(out.color))
        pose = " ".join(f"{x:.9g}" for x in (*quat, *viewmat[:3, 3]))
        lines += [f"{view + 1} {pose} 1 {view:03}.png", ""]
    model = folder / "sparse" / "0"
    (model / "cameras.txt").write_text(
        f"1 PINHOLE {size} {size} {focal} {focal} {size / 2} {size / 2}\n"
    )
    (model / "images.txt").write_text("\n".join(lines) + "\n")
    rng, means, colors = np.random.default_rng(1), gaussians[0][::3], gaussians[4][::3]
    points = np.concatenate([means + 0.02 * rng.normal(size=means.shape), 255 * colors], -1)
    (model / "points3D.txt").write_text(
        "".join(
            f"{i + 1} {x:.6g} {y:.6g} {z:.6g} {r:.0f} {g:.0f} {b:.0f} 0\n"
            for i, (x, y, z, r, g, b) in enumerate(points)
        )
    )


def _balls(rng: np.random.Generator) -> list[Float[np.ndarray, "..."]]:
    """Means, quats, scales, opacities and colours of six balls of a thousand Gaussians each."""
    num = 6000
    centres = np.repeat(rng.uniform(-0.7, 0.7, (6, 3)), num // 6, axis=0)
    radii = np.repeat(rng.uniform(0.25, 0.5, 6), num // 6)[:, None]
    tints = np.repeat(rng.uniform(0.2, 0.8, (6, 3)), num // 6, axis=0)
    normals = rng.normal(size=(num, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    stripes = np.sin(9 * normals @ rng.normal(size=(3, 3)))
    gaussians = [
        centres + radii * normals,
        np.tile([1.0, 0, 0, 0], (num, 1)),
        np.tile(0.05 * radii, (1, 3)),
        np.full(num, 0.95),
        np.clip(tints + 0.2 * stripes, 0, 1),
    ]
    return [np.float32(a) for a in gaussians]


def _ring_camera(turn: float) -> tuple[Float[np.ndarray, "4 4"], Float[np.ndarray, "4"]]:
    """World to camera, and its rotation as a quaternion (w, x, y, z); `turn` from 0 to 1.

    The cameras look at the origin from a distance of 3, in waves above and below it.
    """
    yaw, pitch = 2 * np.pi * turn, 0.5 * np.sin(6 * np.pi * turn)
    about_y = np.array([np.cos(yaw / 2), 0, np.sin(yaw / 2), 0])
    about_x = np.array([np.cos(pitch / 2), np.sin(pitch / 2), 0, 0])
    quat = np.array(
        [
            about_x[0] * about_y[0],
            about_x[1] * about_y[0],
            about_x[0] * about_y[2],
            about_x[1] * about_y[2],
        ]
    )
    viewmat = colmap.make_viewmat(quat, (0.0, 0.0, 3.0))
    return viewmat.astype(np.float32), quat


def on_device(views: Views) -> Views:
    """Pictures and cameras where JAX computes."""
    return Views(*map(jax.numpy.asarray, (views.pictures, *map(np.float32, views[1:]))))

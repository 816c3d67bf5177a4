"""Fits Gaussians to a picture: `python -m kernels.examples.fit_image photo.jpg`.

Gaussians start as a grid of grey discs before a fixed camera, and Adam moves, turns, stretches and
colours them until they look like the picture. Written beside the picture (or to --out): the picture
and the fit side by side, and the Gaussians as a .ply that SuperSplat and other viewers open.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from kernels import Render, rasterize
from kernels.examples.errors import print_error
from kernels.platforms import look_for_no_absent_tpu
from kernels.ply import GaussianCloud, write_ply
from kernels.writable import make_writable

DEPTH = 2.0
"""Distance of the Gaussians from the camera."""

LEARNING_RATES = {"means": 2e-3, "quats": 2e-2, "scales": 2e-2, "opacities": 5e-2, "colors": 2e-2}
"""Of the quantities that are optimised: means in image widths, scales as logarithms, opacities as
logits. All decay to a tenth by a cosine."""

Parameters = dict[str, Array]


def main(argv: list[str] | None = None) -> int:
    """Fit a picture; see `--help`."""
    look_for_no_absent_tpu()
    parser = argparse.ArgumentParser(
        prog="kernels.examples.fit_image", description="Fit Gaussians to a picture."
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("--out", type=Path, help="folder to write to; default: the picture's")
    parser.add_argument("--gaussians", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=256, help="longer side in pixels")
    args = parser.parse_args(argv)
    for name in ("gaussians", "steps", "size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; expected 1 or more")
    try:
        target = load_picture(args.picture, args.size)
        out = args.out or args.picture.parent
        check_out(out)
        parameters, _ = fit(target, args.gaussians, args.steps)
        fitted = np.asarray(render(parameters, *target.shape[:2]).color)
        picture, ply = (out / (args.picture.stem + end) for end in ("_fit.png", "_fit.ply"))
        save_picture(picture, np.concatenate([target, fitted], axis=1))
        write_ply(ply, GaussianCloud(*map(np.asarray, gaussians_of(parameters)[:5])))
    except (OSError, ValueError) as error:
        print_error(error)
        return 1
    error = np.mean((np.clip(fitted, 0, 1) - target) ** 2)
    print(f"PSNR {-10 * np.log10(error):.2f} dB; wrote {picture} and {ply}")
    return 0


def check_out(folder: Path) -> None:
    """Makes the folder of --out if need be; raises `OSError` if nothing can be written to it."""
    try:
        make_writable(folder)
    except OSError as error:
        raise OSError(
            f"--out {folder}: cannot be written to ({error.strerror}); choose another folder"
        ) from error


def load_picture(path: Path, size: int, *, upright: bool = True) -> Float[np.ndarray, "H W 3"]:
    """A picture in [0, 1], on white, scaled so that its longer side has `size` pixels.

    Args:
      upright: turned as its EXIF orientation says, or as its pixels are in the file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a picture of 8 bits a channel that Pillow reads; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with Image.open(path) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"{path}: more than 8 bits a channel; convert it to 8 first")
            picture = (ImageOps.exif_transpose(file) if upright else file).convert("RGBA")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture that can be read") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too large ({error}); scale it down first") from error
    except OSError as error:
        raise ValueError(f"{path}: damaged ({error}); copy it again") from error
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), np.float32) / 255


def fit(target: Float[np.ndarray, "H W 3"], num: int, steps: int) -> tuple[Parameters, list[float]]:
    """Parameters of `num` Gaussians (about) after `steps`, and the loss at each step.

    Raises:
      ValueError: Gaussians grew over so many tiles that some could not be drawn.
    """
    height, width = target.shape[:2]
    parameters = start(num, height, width)
    target = jnp.asarray(target)
    optimiser = optax.multi_transform(
        {
            name: optax.adam(optax.cosine_decay_schedule(rate, steps, 0.1))
            for name, rate in LEARNING_RATES.items()
        },
        {name: name for name in LEARNING_RATES},
    )

    def loss_of(parameters):
        out = render(parameters, height, width)
        return jnp.mean(jnp.abs(out.color - target)), out.overflow

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters, state):
        (loss, overflow), gradients = jax.value_and_grad(loss_of, has_aux=True)(parameters)
        updates, state = optimiser.update(gradients, state)
        return optax.apply_updates(parameters, updates), state, loss, overflow

    state, losses = optimiser.init(parameters), []
    with tqdm(total=steps, unit="step") as bar:
        for _ in range(steps):
            parameters, state, loss, overflow = step(parameters, state)
            if int(overflow):
                raise ValueError(
                    f"{int(overflow)} intersections of Gaussians with tiles don't fit: "
                    "use more, and so smaller, --gaussians"
                )
            losses.append(float(loss))
            bar.set_postfix(L1=f"{losses[-1]:.4f}")
            bar.update()
    return parameters, losses


def start(num: int, height: int, width: int) -> Parameters:
    """About `num` grey discs on a grid over the image, nudged in depth so that none coincide."""
    aspect = height / width
    spacing = np.sqrt(aspect / num)
    # At least one row and one column, however thin the picture.
    columns = min(num, max(1, round(1 / spacing)))
    rows = max(1, round(num / columns))
    x, y = np.meshgrid(
        (np.arange(columns) + 0.5) / columns, (np.arange(rows) + 0.5) / rows * aspect
    )
    rng = np.random.default_rng(0)
    count = x.size
    parameters = {
        "means": np.stack([x.ravel(), y.ravel(), rng.uniform(-0.01, 0.01, count)], -1),
        "quats": np.tile([1.0, 0.0, 0.0, 0.0], (count, 1)),
        "scales": np.full((count, 3), np.log(spacing / 2)),
        "opacities": np.full(count, 1.0),
        "colors": np.full((count, 3), 0.5),
    }
    return {name: jnp.asarray(a, jnp.float32) for name, a in parameters.items()}


def gaussians_of(parameters: Parameters) -> GaussianCloud:
    """Gaussians in camera space: x from 0 to the image's width of 1, at distance `DEPTH`."""
    return GaussianCloud(
        means=parameters["means"] + jnp.array([0.0, 0.0, DEPTH]),
        quats=parameters["quats"],
        scales=jnp.exp(parameters["scales"]),
        opacities=jax.nn.sigmoid(parameters["opacities"]),
        colors=jnp.maximum(parameters["colors"], 0.0),  # as renderers of .ply files do
    )


def render(parameters: Parameters, height: int, width: int) -> Render:
    """The Gaussians through a camera whose image is the unit square's strip at `DEPTH`."""
    K = jnp.array([[DEPTH * width, 0.0, 0.0], [0.0, DEPTH * width, 0.0], [0.0, 0.0, 1.0]])
    return rasterize(*gaussians_of(parameters)[:5], jnp.eye(4), K, width=width, height=height)


def save_picture(path: Path, picture: Float[np.ndarray, "H W 3"]) -> None:
    partial = path.with_name(path.name + ".partial")
    Image.fromarray(np.uint8(np.clip(picture, 0, 1) * 255 + 0.5)).save(partial, format="PNG")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())

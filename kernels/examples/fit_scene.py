"""Fits Gaussians to a capture: `python -m kernels.examples.fit_scene CAPTURE --out DIR`.

CAPTURE is a folder of COLMAP's: its pictures in images/, and the cameras, whose lenses may distort
(OPENCV, OPENCV_FISHEYE), and points in sparse/0/. `--synthetic` makes one up first, in
DIR/synthetic. A fixed number of Gaussians is trained as in 3DGS-MCMC (`mcmc`), on one picture a
step; every eighth picture is held out. Written: DIR/scene.ply, which SuperSplat and other viewers
open, and DIR/held_out.png, pictures beside what the Gaussians look like from there.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from tqdm import tqdm

from kernels import Render, count_capacity, rasterize
from kernels.examples import mcmc
from kernels.examples.captures import Capture, Views, on_device, read_capture, write_synthetic
from kernels.examples.errors import print_error
from kernels.examples.fit_image import check_out, save_picture
from kernels.examples.mcmc import Parameters
from kernels.harmonics import SIZES
from kernels.platforms import look_for_no_absent_tpu
from kernels.ply import SH_C0, GaussianCloud, write_ply

RELOCATE_EVERY = 100
"""Steps between two moves of the dead."""
FIRST_RELOCATION, LAST_RELOCATION = 500, 5 / 6
"""Step of the first move, and the share of all steps after which there are none."""
REPORT_EVERY = 10
"""Steps between two readings of the device."""


class State(NamedTuple):
    """What training goes on from."""

    parameters: Parameters
    moments: optax.OptState
    key: Array
    step: Array


def main(argv: list[str] | None = None) -> int:
    """Fit a capture; see `--help`."""
    look_for_no_absent_tpu()
    parser = argparse.ArgumentParser(
        prog="kernels.examples.fit_scene", description="Fit Gaussians to a capture."
    )
    parser.add_argument("capture", type=Path, nargs="?", help="COLMAP's folder")
    parser.add_argument("--synthetic", action="store_true", help="make a capture up and fit that")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--gaussians", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--size", type=int, default=1024, help="longer side in pixels")
    parser.add_argument("--sh-degree", type=int, default=3, choices=range(4))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if (args.capture is None) != args.synthetic:
        parser.error("expected either a folder or --synthetic")
    for name in ("gaussians", "steps", "size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; expected 1 or more")
    try:
        check_out(args.out)
        folder = args.capture
        if args.synthetic:
            folder = args.out / "synthetic"
            write_synthetic(folder, size=args.size)
        capture = read_capture(folder, args.size)
        parameters = fit(capture, args.gaussians, args.steps, SIZES[args.sh_degree], seed=args.seed)
        ply, picture = args.out / "scene.ply", args.out / "held_out.png"
        write_ply(ply, cloud_of(parameters))
        psnr, pairs = evaluate(parameters, capture.held_out, capture.camera_model)
        save_picture(picture, np.concatenate(pairs[:4]))
    except (OSError, ValueError) as error:
        print_error(error)
        return 1
    views = len(capture.held_out.pictures)
    print(f"PSNR {psnr:.2f} dB on {views} held-out pictures; wrote {ply} and {picture}")
    return 0


def fit(capture: Capture, num: int, steps: int, coefficients: int, *, seed: int = 0) -> Parameters:
    """Parameters of `num` Gaussians after `steps`, the same for the same seed.

    `coefficients` of spherical harmonics: 1, 4, 9 or 16. Room for intersections is counted over all
    training views, and again where it did not do.
    """
    rng = np.random.default_rng(seed)
    size = scene_size(capture.training)
    parameters = mcmc.start(capture.points, capture.colors, num, coefficients, rng)
    optimiser = mcmc.optimiser(steps, size)
    state = State(
        parameters, optimiser.init(parameters), jax.random.key(seed), jnp.zeros((), jnp.int32)
    )
    take = jax.jit(
        functools.partial(
            _step,
            optimiser=optimiser,
            rate=mcmc.means_rate(steps, size),
            camera_model=capture.camera_model,
        ),
        static_argnames="capacity",
        donate_argnums=0,
    )
    move = jax.jit(_relocate, donate_argnums=0)
    views, order = on_device(capture.training), np.zeros(0, np.int32)
    room = roomy_capacity(parameters, capture.training, capture.camera_model)
    overflow, moved = jnp.int32(0), 0
    with tqdm(total=steps, unit="step") as bar:
        for step in range(1, steps + 1):
            if not len(order):
                order = rng.permutation(len(views.pictures)).astype(np.int32)
            state, loss, dropped = take(state, views, order[0], capacity=room)
            order, overflow = order[1:], jnp.maximum(overflow, dropped)
            if step % RELOCATE_EVERY == 0 and FIRST_RELOCATION <= step <= LAST_RELOCATION * steps:
                state, moved = move(state)
            if step % REPORT_EVERY == 0 or step == steps:
                bar.set_postfix(loss=f"{float(loss):.4f}", moved=int(moved), refresh=False)
                bar.update(step - bar.n)
                if int(overflow):
                    needed = roomy_capacity(
                        state.parameters, capture.training, capture.camera_model
                    )
                    room = max(2 * room, needed)
                    overflow = jnp.int32(0)
    return state.parameters


def scene_size(views: Views) -> float:
    """How far cameras are from their middle, at most, and a tenth more; 1 if they are in one place.

    3D Gaussian Splatting's scale of the learning rate of the means.
    """
    rotations, translations = views.viewmats[:, :3, :3], views.viewmats[:, :3, 3]
    centres = -np.einsum("vji,vj->vi", rotations, translations)
    radius = float(np.max(np.linalg.norm(centres - centres.mean(0), axis=-1)))
    return 1.1 * radius if radius > 0 else 1.0


def roomy_capacity(parameters: Parameters, views: Views, camera_model: str) -> int:
    """Slots an image that are enough for every view while Gaussians grow by half; a power of two.

    So few values are rarely a new program to compile.
    """
    height, width = views.pictures.shape[1:3]
    gaussians, size = gaussians_of(parameters), {"width": width, "height": height}
    needed = max(
        count_capacity(*gaussians, **views.camera(view), **size, camera_model=camera_model)
        for view in range(len(views.pictures))
    )
    return 1 << (3 * needed // 2 - 1).bit_length()


def _step(
    state: State,
    views: Views,
    view: Array,
    *,
    capacity: int,
    optimiser: optax.GradientTransformation,
    rate: optax.Schedule,
    camera_model: str,
) -> tuple[State, Array, Array]:
    """The next state, the loss, and what found no room."""
    target = views.pictures[view].astype(jnp.float32) / 255

    def loss_of(parameters):
        out = render(parameters, views.camera(view), target.shape[:2], capacity, camera_model)
        return mcmc.loss(parameters, out.color[None], target[None]), out.overflow

    (loss, overflow), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.parameters)
    updates, moments = optimiser.update(gradients, state.moments)
    parameters = optax.apply_updates(state.parameters, updates)
    key, noise = jax.random.split(state.key)
    parameters = mcmc.add_noise(parameters, noise, rate(state.step))
    return State(parameters, moments, key, state.step + 1), loss, overflow


def _relocate(state: State) -> tuple[State, Array]:
    key, draw = jax.random.split(state.key)
    parameters, moments, moved = mcmc.relocate(state.parameters, state.moments, draw)
    return State(parameters, moments, key, state.step), moved


def gaussians_of(parameters: Parameters) -> tuple[Array, Array, Array, Array]:
    """Means, quats, scales and opacities as `rasterize` takes them."""
    return (
        parameters["means"],
        parameters["quats"],
        jnp.exp(parameters["scales"]),
        jax.nn.sigmoid(parameters["opacities"]),
    )


def harmonics_of(parameters: Parameters) -> Float[Array, "N K 3"]:
    """All coefficients as `rasterize` takes them."""
    return jnp.concatenate([parameters["sh0"], parameters["shN"]], 1)


def render(
    parameters: Parameters,
    camera: dict[str, ArrayLike],
    shape: tuple[int, int],
    capacity: int | None,
    camera_model: str,
) -> Render:
    """What `Views.camera` sees; `shape` is height and width. What finds no room is counted."""
    height, width = shape
    return rasterize(
        *gaussians_of(parameters), None, **camera, camera_model=camera_model,
        sh=harmonics_of(parameters), width=width, height=height, capacity=capacity,
        overflow="count",
    )  # fmt: skip


def evaluate(
    parameters: Parameters, views: Views, camera_model: str
) -> tuple[float, list[np.ndarray]]:
    """Mean PSNR in dB, and each picture beside its rendering [H, 2 W, 3]."""
    shape, ratios, pairs = views.pictures.shape[1:3], [], []
    for view, picture in enumerate(views.pictures):
        out = render(parameters, views.camera(view), shape, None, camera_model)
        target, image = picture / 255, np.clip(np.asarray(out.color), 0, 1)
        ratios.append(-10 * np.log10(max(float(np.mean((image - target) ** 2)), 1e-12)))
        pairs.append(np.concatenate([target, image], axis=1))
    return float(np.mean(ratios)), pairs


def cloud_of(parameters: Parameters) -> GaussianCloud:
    """What is written to a .ply."""
    arrays = (np.asarray(a) for a in (*gaussians_of(parameters), harmonics_of(parameters)))
    means, quats, scales, opacities, sh = arrays
    colors = np.maximum(0.5 + SH_C0 * sh[:, 0], 0)
    return GaussianCloud(means, quats, scales, opacities, colors, sh)


if __name__ == "__main__":
    sys.exit(main())

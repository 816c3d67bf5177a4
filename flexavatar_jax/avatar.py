"""Makes an avatar of a tracked portrait and renders it: all the way round, or driven.

    python -m flexavatar_jax.avatar render --workdir runs/demo --portrait DIR/inputs/NAME.jpg \
        --out orbit.mp4
    python -m flexavatar_jax.avatar render --workdir runs/demo --portrait DIR/inputs/NAME.jpg \
        --driving DIR/driving/CLIP --out driven.mp4

Writes an MP4 and a GIF of the same name. The portrait's tracking (Pixel3DMM) lies beside it: see
`data_pipelines/pixel3dmm.py`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import imageio
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from tqdm import tqdm

from data_pipelines import cameras
from data_pipelines.pixel3dmm import read_driving, read_portrait
from flexavatar_jax import cli
from flexavatar_jax.checkpoints import load_model
from flexavatar_jax.inference import Animator

FRAMES_PER_SECOND = 24


def orbit_cameras(
    cam2head: Float[np.ndarray, "4 4"], frames: int
) -> Float[np.ndarray, "frames 4 4"]:
    """A camera turned once round the head's vertical axis, starting where it stands."""
    turns = [
        cameras.rigid(cameras.axis_angle(np.array([0.0, 1.0, 0.0]), angle), np.zeros(3))
        for angle in np.linspace(0, 2 * np.pi, frames, endpoint=False)
    ]
    return np.stack([turn @ cam2head for turn in turns])


def write_animation(path: Path, frames: UInt8[np.ndarray, "T H W 3"], fps: int) -> list[Path]:
    """Writes `frames` as MP4 and GIF beside each other (`path` with either suffix).

    Each file is written under a temporary name and renamed when it is whole.
    """
    written = []
    for suffix in (".mp4", ".gif"):
        target = path.with_suffix(suffix)
        handle, temporary = tempfile.mkstemp(suffix=suffix, prefix=f".{path.stem}.", dir=path.parent)
        os.close(handle)
        try:
            if suffix == ".gif":
                pictures = [Image.fromarray(frame) for frame in frames]
                pictures[0].save(
                    temporary,
                    save_all=True,
                    append_images=pictures[1:],
                    duration=round(1000 / fps),
                    loop=0,
                )
            else:
                # H.264 in 4:2:0 wants even sides: the last row or column is repeated.
                even = np.pad(
                    frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], "edge"
                )
                imageio.mimwrite(temporary, list(even), fps=fps, quality=8, macro_block_size=2)
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
        written.append(target)
    return written


def render_avatar(args: argparse.Namespace) -> None:
    """The `render` command."""
    out = Path(args.out)
    if out.suffix not in (".mp4", ".gif"):
        raise ValueError(f"--out {out} must end in .mp4 or .gif (both are written)")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {out.parent}")
    portrait_path = Path(args.portrait)
    portrait = read_portrait(portrait_path.parent.parent, portrait_path.stem)
    driving = read_driving(args.driving) if args.driving else None
    loaded = load_model(args.workdir, args.step)
    animator = Animator(loaded.model, backend=args.backend)
    size = animator.image_size
    image = np.asarray(Image.fromarray(portrait.image).resize((size, size), Image.Resampling.BICUBIC))
    mask = np.asarray(Image.fromarray(portrait.mask).resize((size, size), Image.Resampling.BICUBIC))
    code = animator.encode(image, mask, portrait.cam2head, portrait.K)
    if driving is None:
        views = orbit_cameras(portrait.cam2head, args.frames)
        expressions = np.repeat(portrait.expression[None], len(views), axis=0)
    else:
        expressions = driving.expression
        views = np.repeat(portrait.cam2head[None], len(expressions), axis=0)
    images = animator.render(
        code,
        expressions,
        views,
        np.repeat(portrait.K[None], len(views), axis=0),
        size=args.size or size,
        progress=lambda chunks: tqdm(chunks, desc="rendering", unit="chunk"),
    )
    for path in write_animation(out, np.round(images * 255).astype(np.uint8), FRAMES_PER_SECOND):
        print(path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flexavatar_jax.avatar", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("render", help="render a portrait's avatar to MP4 and GIF")
    command.add_argument("--workdir", required=True, help="folder of a training run or an import")
    command.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    command.add_argument("--portrait", required=True, help="DIR/inputs/NAME.jpg, tracked")
    command.add_argument("--driving", help="folder of .frame files that drive the avatar")
    command.add_argument("--out", required=True, help="animation.mp4 (and .gif beside it)")
    command.add_argument("--frames", type=int, default=72, help="frames of an orbit")
    command.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    command.add_argument("--backend", default="auto", help="rasterizer: auto, xla, ...")
    command.set_defaults(run=render_avatar)
    args = parser.parse_args(argv)
    cli.guard(lambda: args.run(args))


if __name__ == "__main__":
    main()

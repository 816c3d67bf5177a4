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
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_pipelines.pixel3dmm import read_driving, read_portrait
from flexavatar_jax import cli
from flexavatar_jax.animation import write_animation
from flexavatar_jax.checkpoints import load_model
from flexavatar_jax.inference import Animator, orbit_cameras

FRAMES_PER_SECOND = 24


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
    loaded = load_model(args.workdir, args.step, args.dinov2)
    animator = Animator(loaded, backend=args.backend)
    size = animator.image_size
    image = np.asarray(
        Image.fromarray(portrait.image).resize((size, size), Image.Resampling.BICUBIC)
    )
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
    command.add_argument(
        "--dinov2", default="", help="DINOv2 weights, if not where training had them"
    )
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

"""Makes an avatar of a tracked portrait and renders it: all the way round, or driven.

    python -m flexavatar_jax.avatar render --workdir runs/demo --portrait DIR/inputs/NAME.jpg \
        --out orbit.mp4
    python -m flexavatar_jax.avatar render --workdir runs/demo --portrait DIR/inputs/NAME.jpg \
        --driving DIR/driving/CLIP --out driven.mp4

The film goes by its ending: .mp4, .gif, .webm, .apng; none: PNG files. The portrait's tracking
(Pixel3DMM) lies beside it: see
`data_pipelines/pixel3dmm.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.pixel3dmm import Portrait, find_input, read_driving, read_portrait
from flexavatar_jax import cli
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.camera_paths import orbit_cameras
from flexavatar_jax.avatars.film import check_film, write_film
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.workdir import read_config

FRAMES_PER_SECOND = 24
ORBIT_FRAMES = 72


def find_portrait(path: str) -> Portrait:
    """Reads the tracked portrait DIR/inputs/NAME.jpg.

    Tracking goes by NAME alone, so another picture of that name could be taken for it.
    """
    given = Path(path).absolute()
    if not given.exists():
        raise UserError(f"--portrait {path}: no such file; expected DIR/inputs/NAME.jpg")
    root, name = given.parent.parent, given.name if given.is_dir() else given.stem
    found = Path(find_input(root, name))
    if found != given:
        raise UserError(
            f"--portrait {path}: tracking of that name belongs to {found}; give that file, or move "
            "it away"
        )
    return read_portrait(root, name)


def render_avatar(args: argparse.Namespace) -> None:
    """The `render` command."""
    out = Path(args.out)
    check_film(out)
    for option in ("frames", "size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; expected 1 or more")
    cli.check_backend(args.backend)
    if args.driving and args.frames is not None:
        raise UserError(
            f"--frames {args.frames} is for an orbit; a driven avatar has as many frames as its "
            "performance: leave out --frames or --driving"
        )
    portrait = find_portrait(args.portrait)
    driving = read_driving(args.driving) if args.driving else None
    cli.check_dinov2(args.dinov2, args.workdir, read_config(args.workdir))
    loaded = load_model(args.workdir, args.step, args.dinov2)
    animator = Animator(loaded, backend=args.backend)
    size = animator.image_size
    code = animator.encode(portrait.image, portrait.mask, portrait.cam2head, portrait.K)
    if driving is None:
        frames = ORBIT_FRAMES if args.frames is None else args.frames
        views = orbit_cameras(portrait.cam2head, frames)
        expressions = np.repeat(portrait.expression[None], len(views), axis=0)
    else:
        expressions = driving.expression
        views = np.repeat(portrait.cam2head[None], len(expressions), axis=0)
    images = animator.frames(
        code,
        expressions,
        views,
        np.repeat(portrait.K[None], len(views), axis=0),
        size=size if args.size is None else args.size,
    )
    images = tqdm(images, total=len(views), desc="rendering", unit="frame")
    write_film(out, images, FRAMES_PER_SECOND)
    print(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m flexavatar_jax.avatar", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("render", help="render a portrait's avatar to a film")
    command.add_argument("--workdir", required=True, help="folder of a training run or an import")
    command.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    command.add_argument(
        "--dinov2", default="", help="DINOv2 weights, if not where training had them"
    )
    command.add_argument("--portrait", required=True, help="DIR/inputs/NAME.jpg, tracked")
    command.add_argument("--driving", help="folder of .frame files that drive the avatar")
    command.add_argument("--out", required=True, help="film.mp4, .gif, .webm, .apng, or a folder")
    command.add_argument("--frames", type=int, help=f"frames of an orbit (default: {ORBIT_FRAMES})")
    command.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    command.add_argument("--backend", default="auto", help="rasterizer: auto, xla, ...")
    command.set_defaults(run=render_avatar)
    args = parser.parse_args(argv)
    cli.guard(lambda: args.run(args))


if __name__ == "__main__":
    main()

"""Creates avatars, prints what is in one, renders them, and goes from one to another.

    python -m flexavatar_jax.avatar create DIR/inputs/NAME.jpg --workdir runs/demo \
        --out NAME.avatar [--fit 200]
    python -m flexavatar_jax.avatar info NAME.avatar
    python -m flexavatar_jax.avatar render NAME.avatar --workdir runs/demo --out orbit.mp4
    python -m flexavatar_jax.avatar render NAME.avatar OTHER.avatar --workdir runs/demo \
        --driving DIR/driving/CLIP --out driven.mp4
    python -m flexavatar_jax.avatar view NAME.avatar OTHER.avatar --workdir runs/demo
    python -m flexavatar_jax.avatar export NAME.avatar --workdir runs/demo --html head.html
    python -m flexavatar_jax.avatar interpolate A.avatar B.avatar --workdir runs/demo --out film.mp4

Where an avatar is asked for, what it is made from may stand too: a picture DIR/inputs/NAME.jpg
tracked with Pixel3DMM (see `data_pipelines/pixel3dmm.py`), or SET/PERSON of a prepared data set.
docs/avatars.md shows all of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipelines.errors import UserError, one_line
from flexavatar_jax import cli
from flexavatar_jax.avatars import film, performances, scenes
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.avatar_file import (
    SUFFIX,
    Avatar,
    check_belongs,
    load_avatar,
    save_avatar,
)
from flexavatar_jax.avatars.create import create_avatar
from flexavatar_jax.avatars.fit import FitSettings
from flexavatar_jax.avatars.interpolation import corner_grid, path_through
from flexavatar_jax.avatars.observations import people_of, read_observations
from flexavatar_jax.avatars.options import make_parser
from flexavatar_jax.frozen.networks import load_perceptual_networks
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.workdir import read_config


def create(args: argparse.Namespace) -> None:
    """The `create` command."""
    settings = FitSettings(
        steps=args.fit,
        batch=args.batch,
        learning_rate=args.learning_rate,
        shift=args.shift,
        pull=args.pull,
        seed=args.seed,
    )
    for source, out in _outputs(args):
        cli.check_out(out)
        person = read_observations(source, args.images)
        settings.check(len(person.seen))
        animator = _animator(args)
        frozen = load_perceptual_networks(animator.loaded.config, args.dinov2_small, args.sam2)
        with tqdm(
            total=args.fit, desc=f"fitting {person.name}", unit="step", disable=not args.fit
        ) as bar:

            def progress(steps: int, loss: float, bar: tqdm = bar) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(steps)

            strip = out.with_suffix(".fit.png") if args.fit else ""
            avatar = create_avatar(
                animator, person, settings, frozen, strip=strip, progress=progress
            )
        save_avatar(out, avatar)
        print(out)


def _outputs(args: argparse.Namespace) -> list[tuple[list[str], Path]]:
    """The sources of each avatar to create, and its file."""
    out = Path(args.out)
    if not args.people:
        if out.suffix != SUFFIX:
            raise UserError(f"--out {out} must end in {SUFFIX}")
        return [(args.sources, out)]
    if len(args.sources) != 1:
        raise UserError("--people names people of one prepared data set; give its folder alone")
    if not out.is_dir():
        raise UserError(f"--out {out} must be a folder, which exists, for the avatars of --people")
    (folder,) = args.sources
    people = people_of(folder, args.people.split(","))
    return [([f"{folder}/{name}"], out / f"{name}{SUFFIX}") for name in people]


def info(args: argparse.Namespace) -> None:
    """The `info` command."""
    avatar = load_avatar(args.avatar)
    fitted = np.abs(avatar.offsets).max()
    lines = {
        "name": avatar.name,
        "format version": avatar.version,
        "avatar code": " x ".join(map(str, avatar.code.shape)),
        "tracked frames": len(avatar.expressions),
        "made from frames": ", ".join(map(str, avatar.seen[:16]))
        + ("..." if len(avatar.seen) > 16 else ""),
        "fitted": f"yes, expression offsets up to {fitted:.3f}" if fitted else "no",
        "camera distance": f"{np.linalg.norm(avatar.cam2head[:3, 3]):.3f} m",
        "checkpoint": avatar.checkpoint,
        "template": avatar.template,
        **avatar.notes,
    }
    for name, value in lines.items():
        print(f"{one_line(name)[:40]:>18}: {one_line(str(value))[:200]}")


def render(args: argparse.Namespace) -> None:
    """The `render` command."""
    out, background = _check_film(args)
    sources = [*args.avatars, *args.portrait]
    if not sources:
        raise UserError("there is no avatar; give an .avatar file, or DIR/inputs/NAME.jpg")
    driving = performances.read_performance(args.driving) if args.driving else None
    if args.beside and driving is None:
        raise UserError("--beside shows the pictures that drive the avatar; give --driving")
    if args.beside:
        performances.check_pictures(driving, args.driving)
    camera = args.camera or ("still" if driving else "orbit")
    animator, avatars = _avatars(args, sources)
    films = [
        scenes.shots(
            animator, avatar, camera, args.frames, driving, args.pose, args.size, background
        )
        for avatar in avatars
    ]
    count = films[0].frames
    columns = [shot.images for shot in films]
    if args.beside:
        size = args.size or animator.image_size
        columns = [scenes.beside(driving, count, size, background), *columns]
    frames = scenes.side_by_side(columns)
    _write(out, frames, count, args.fps)


def interpolate(args: argparse.Namespace) -> None:
    """The `interpolate` command."""
    out, background = _check_film(args)
    driving = performances.read_performance(args.driving) if args.driving else None
    animator, avatars = _avatars(args, args.avatars)
    codes = np.stack([avatar.code for avatar in avatars])
    own = np.stack([avatar.expression for avatar in avatars])
    first = avatars[0]
    if args.grid is not None:
        codes, weights = corner_grid(codes, args.grid, args.method)
        frames, count = scenes.grid(
            animator,
            codes,
            weights @ own,
            first,
            args.camera,
            args.frames,
            driving,
            args.size,
            background,
        )
    else:
        count = scenes.count_frames(args.camera, args.frames, driving, still=scenes.FRAMES)
        codes, weights = path_through(codes, count, args.method)
        expressions = weights @ own if driving is None else driving.expressions
        views = scenes.views_of(first, args.camera, count)
        frames = animator.frames(codes, expressions, *views, size=args.size, background=background)
    _write(out, frames, count, args.fps)


def _check_film(args: argparse.Namespace) -> tuple[Path, tuple[float, float, float] | None]:
    """The film's file, and the colour behind it; raises `UserError` for what cannot be meant."""
    out, background = Path(args.out), scenes.parse_background(args.background)
    film.check_film(out, transparent=background is None)
    for option in ("frames", "size", "fps"):
        value = getattr(args, option)
        if value is not None and not 1 <= value <= scenes.MOST[option]:
            raise UserError(f"--{option} is {value}; expected 1 to {scenes.MOST[option]}")
    cli.check_backend(args.backend)
    return out, background


def _avatars(args: argparse.Namespace, sources: Sequence[str]) -> tuple[Animator, list[Avatar]]:
    """The avatars of files, and of what avatars are made from; all files are read first."""
    read = [
        load_avatar(s) if Path(s).suffix == SUFFIX else read_observations([s], None)
        for s in sources
    ]
    animator = _animator(args)
    avatars = []
    for source, found in zip(sources, read, strict=True):
        if isinstance(found, Avatar):
            check_belongs(found, animator.loaded, source, args.workdir)
            avatars.append(found)
        else:
            avatars.append(create_avatar(animator, found))
    return animator, avatars


def _animator(args: argparse.Namespace) -> Animator:
    """The model of --workdir, loaded once."""
    if not hasattr(args, "animator"):
        cli.check_backend(args.backend)
        cli.check_dinov2(args.dinov2, args.workdir, read_config(args.workdir))
        args.animator = Animator(
            load_model(args.workdir, args.step, args.dinov2), backend=args.backend
        )
    return args.animator


def _write(out: Path, frames: Iterator[np.ndarray], count: int, fps: float) -> None:
    film.write_film(out, tqdm(frames, total=count, desc="rendering", unit="frame"), fps)
    print(out)


def main(argv: list[str] | None = None) -> None:
    commands = dict(create=create, info=info, render=render, interpolate=interpolate)
    args = make_parser(__doc__, commands, _avatars).parse_args(argv)
    cli.guard(lambda: args.run(args))


if __name__ == "__main__":
    main()

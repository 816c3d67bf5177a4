"""The command `avatar export`: an avatar as a web page, or as Gaussians for other programs."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import Float
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.frame import MULTI_VIEW, neutral_code
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.avatar_file import Avatar
from flexavatar_jax.avatars.export.html import write_html
from flexavatar_jax.avatars.export.rig import Rig, build_rig, decoder_of
from flexavatar_jax.avatars.export.splats import MIN_SCALE, WRITERS, clamp_scales, write_splats
from flexavatar_jax.avatars.performances import read_performance
from flexavatar_jax.avatars.sliders import Slider, move, sliders_of
from flexavatar_jax.cli import check_out
from flexavatar_jax.runs.loading import LoadedModel
from kernels.ply import GaussianCloud

SWEEP_FRAMES = 24
AS_TRACKED = "as tracked"
"""Name of the clip that holds the expressions in which the person was seen."""


def add_command(
    commands: argparse._SubParsersAction, model: argparse.ArgumentParser, read: Callable
) -> None:
    """Registers `export` with the parser of `flexavatar_jax.avatar`.

    Args:
      commands: the subparsers.
      model: a parser with the model's options.
      read: loads the model and the avatars that a command names.
    """
    command = commands.add_parser(
        "export", parents=[model], help="write a web page, .ply, .glb or .spz"
    )
    command.add_argument("avatar", metavar="AVATAR", help="FILE.avatar, or what one is made from")
    command.add_argument("--html", metavar="FILE", help="one web page with sliders, for anybody")
    for suffix in WRITERS:
        command.add_argument(f"--{suffix[1:]}", metavar="FILE", help=f"Gaussians as {suffix}")
    command.add_argument(
        "--driving",
        help="what `render --driving` takes: baked into --html; else a numbered file a frame",
    )
    command.add_argument(
        "--sweep", metavar="SLIDER", help=f"{SWEEP_FRAMES} numbered files from end to end of it"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SLIDER=VALUE",
        help="expression of --ply, --glb and --spz; may be given again",
    )
    command.add_argument(
        "--no-pairs",
        action="store_true",
        help="--html without corrections for two sliders at once: a fifth of the time",
    )

    def run(args: argparse.Namespace) -> None:
        check_options(args)
        animator, (avatar,) = read(args, [args.avatar])
        export_avatar(args, animator, avatar)

    command.set_defaults(run=run)


def check_options(args: argparse.Namespace) -> None:
    """Raises `UserError` for options that cannot be meant, before the work."""
    outs = [(suffix, getattr(args, suffix[1:])) for suffix in (".html", *WRITERS)]
    outs = [(suffix, Path(out)) for suffix, out in outs if out]
    if not outs:
        raise UserError("nothing to export: give --html FILE, --ply FILE, --glb FILE or --spz FILE")
    for suffix, out in outs:
        if out.suffix != suffix:
            raise UserError(f"--{suffix[1:]} {out} must end in {suffix}")
        check_out(out)
    if args.driving and (args.sweep or args.set):
        raise UserError("--driving makes the expressions; leave out --sweep and --set")


def export_avatar(args: argparse.Namespace, animator: Animator, avatar: Avatar) -> None:
    """The `export` command, its options checked."""
    driving = read_performance(args.driving).expressions if args.driving else None
    if args.html:
        clips = {AS_TRACKED: seen_expressions(avatar)}
        if driving is not None:
            clips[Path(args.driving).name] = driving
        size = export_page(
            args.html,
            animator.loaded,
            avatar.code,
            clips,
            avatar.cam2head,
            avatar.K,
            name=avatar.name,
            pairs=not args.no_pairs,
        )
        print(f"{args.html}: {size / 1e6:.1f} MB")
    outs = [Path(getattr(args, s[1:])) for s in WRITERS if getattr(args, s[1:])]
    if not outs:
        return
    sliders = sliders_of(animator.loaded.config)
    codes = _expressions(args, sliders) if driving is None else driving
    clamped = 0
    for number, code in enumerate(tqdm(codes, desc="exporting", unit="expression")):
        gaussians = animator.gaussians(avatar.code, code[None])[:5]
        gaussians, tiny = clamp_scales(GaussianCloud(*(x[0] for x in gaussians)))
        clamped += tiny
        for out in outs:
            write_splats(numbered(out, number) if len(codes) > 1 else out, gaussians)
    for out in outs:
        last = numbered(out, len(codes) - 1)
        print(out if len(codes) == 1 else f"{numbered(out, 0)} to {last}")
    if clamped:
        print(
            f"{clamped} Gaussians had scales below {MIN_SCALE:g} m, which viewers fail on: clamped"
        )


def export_page(
    path: epath.PathLike,
    loaded: LoadedModel,
    code: Float[np.ndarray, "N D"],
    clips: dict[str, Float[np.ndarray, "T 135"]],
    cam2head: Float[np.ndarray, "4 4"],
    K: Float[np.ndarray, "3 3"],
    *,
    name: str,
    pairs: bool = True,
) -> int:
    """Writes an avatar's web page, see `write_html`; returns its size in bytes."""
    sliders = sliders_of(loaded.config)
    rig = rig_of(code, loaded, sliders, clips, pairs=pairs)
    return write_html(path, rig, sliders, loaded.model.gaussians, cam2head, K, name=name)


def rig_of(
    code: Float[np.ndarray, "N D"],
    loaded: LoadedModel,
    sliders: tuple[Slider, ...],
    clips: dict[str, Float[np.ndarray, "T 135"]],
    *,
    pairs: bool = True,
) -> Rig:
    """The rig of a code, sampled with a progress bar; see `build_rig`."""
    model = loaded.model.folded()
    names = [slider.name for slider in sliders]
    return build_rig(
        model,
        decoder_of(model, code, MULTI_VIEW),
        neutral_code(),
        sliders,
        clips,
        pairs=list(itertools.combinations(names, 2)) if pairs else [],
        progress=lambda chunks: tqdm(chunks, desc="sampling the decoder", unit="chunk"),
    )


def seen_expressions(avatar: Avatar) -> Float[np.ndarray, "I 135"]:
    """The expressions in which the person was seen, as they decode best."""
    return avatar.expressions[avatar.seen] + avatar.offsets


def numbered(path: Path, number: int) -> Path:
    """head.ply of frame 7 is head_00007.ply."""
    return path.with_name(f"{path.stem}_{number:05d}{path.suffix}")


def parse_settings(settings: list[str], sliders: tuple[Slider, ...]) -> dict[str, float]:
    """Values of sliders from SLIDER=VALUE; raises `UserError` for another or one out of range."""
    by_name = {slider.name: slider for slider in sliders}
    values = {}
    for setting in settings:
        name, equals, number = setting.partition("=")
        slider = by_name.get(name.replace("_", " "))
        if slider is None or not equals:
            raise UserError(
                f"--set {setting}: expected SLIDER=VALUE with one of {', '.join(by_name)}"
            )
        try:
            value = float(number)
        except ValueError:
            value = np.nan
        if not slider.low <= value <= slider.high:
            raise UserError(
                f"--set {setting}: {slider.name} goes from {slider.low:g} to {slider.high:g}"
            )
        values[slider.name] = value
    return values


def _expressions(
    args: argparse.Namespace, sliders: tuple[Slider, ...]
) -> Float[np.ndarray, "E 135"]:
    """The expression codes of the numbered files, or the one."""
    values = parse_settings(args.set, sliders)
    base = neutral_code()
    if not args.sweep:
        return move(base, sliders, values)[None]
    name = args.sweep.replace("_", " ")
    by_name = {slider.name: slider for slider in sliders}
    if name not in by_name:
        raise UserError(f"--sweep {args.sweep}: there is no such slider; {', '.join(by_name)} are")
    steps = np.linspace(by_name[name].low, by_name[name].high, SWEEP_FRAMES)
    return np.stack([move(base, sliders, values | {name: step}) for step in steps])

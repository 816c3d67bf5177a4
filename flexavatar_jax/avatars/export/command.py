"""The command `avatar export`: an avatar as a web page, or as Gaussians for other programs."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.files import check_out
from data_pipelines.frame import MULTI_VIEW
from data_pipelines.pixel3dmm import read_driving
from data_pipelines.procedural.expression import neutral_code
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.avatar_file import Avatar, check_belongs, load_avatar
from flexavatar_jax.avatars.export.html import write_html
from flexavatar_jax.avatars.export.rig import Rig, build_rig, decoder_of
from flexavatar_jax.avatars.export.splats import WRITERS, clamp_scales, write_splats
from flexavatar_jax.avatars.sliders import Slider, move, sliders_of
from flexavatar_jax.runs.loading import LoadedModel, load_model
from kernels.ply import Gaussians

SWEEP_FRAMES = 24
AS_TRACKED = "as tracked"
"""Name of the clip that holds the expressions in which the person was seen."""


def add_export_command(commands: argparse._SubParsersAction) -> None:
    """Registers `export` with the parser of `flexavatar_jax.avatar`."""
    command = commands.add_parser("export", help="write a web page, .ply, .glb or .spz")
    command.add_argument("avatar", help="FILE.avatar")
    command.add_argument("--workdir", required=True, help="the run or import it was made with")
    command.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    command.add_argument("--html", metavar="FILE", help="one web page with sliders, for anybody")
    for suffix in WRITERS:
        command.add_argument(f"--{suffix[1:]}", metavar="FILE", help=f"Gaussians as {suffix}")
    command.add_argument(
        "--driving",
        metavar="CLIP",
        help="folder of .frame files: baked into --html, and for the others a numbered file a frame",
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
        help="--html without corrections for two sliders at once: decodes a fifth of the faces",
    )
    command.set_defaults(run=export_avatar)


def export_avatar(args: argparse.Namespace) -> None:
    """The `export` command."""
    outs = {suffix: getattr(args, suffix[1:]) for suffix in WRITERS}
    outs = {suffix: Path(out) for suffix, out in outs.items() if out}
    if not outs and not args.html:
        raise UserError("nothing to export: give --html FILE, --ply FILE, --glb FILE or --spz FILE")
    _check_outs(outs, args.html)
    avatar = load_avatar(args.avatar)
    driving = read_driving(args.driving).expression if args.driving else None
    loaded = load_model(args.workdir, args.step, encoder_network=False)
    check_belongs(avatar, loaded, args.avatar, args.workdir)
    sliders = sliders_of(loaded.config)
    if args.html:
        clips = {AS_TRACKED: seen_expressions(avatar)}
        if driving is not None:
            clips[Path(args.driving).name] = driving
        size = export_page(args.html, avatar, loaded, clips, pairs=not args.no_pairs)
        print(f"{args.html}: {size / 1e6:.1f} MB")
    if outs:
        codes = _expressions(args, sliders, driving)
        animator = Animator(loaded)
        clamped = 0
        for number, code in enumerate(tqdm(codes, desc="exporting", unit="expression")):
            gaussians = animator.gaussians(avatar.code, code[None])
            gaussians, tiny = clamp_scales(Gaussians(*(x[0] for x in gaussians)))
            clamped += tiny
            for out in outs.values():
                write_splats(numbered(out, number) if len(codes) > 1 else out, gaussians)
        for out in outs.values():
            print(out if len(codes) == 1 else f"{numbered(out, 0)} to {numbered(out, len(codes) - 1)}")
        if clamped:
            print(f"{clamped} Gaussians thinner than a viewer can take were made thicker")


def export_page(
    path: str,
    avatar: Avatar,
    loaded: LoadedModel,
    clips: dict[str, Float[np.ndarray, "T 135"]],
    *,
    pairs: bool = True,
) -> int:
    """Writes an avatar's web page; returns its size in bytes."""
    sliders = sliders_of(loaded.config)
    rig = rig_of(avatar.code, loaded, sliders, clips, pairs=pairs)
    head = loaded.model.gaussians
    return write_html(path, rig, sliders, head, avatar.cam2head, avatar.K, name=avatar.name)


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
    """Values of sliders from SLIDER=VALUE; raises `UserError` for one that isn't, or out of range."""
    by_name = {slider.name: slider for slider in sliders}
    values = {}
    for setting in settings:
        name, equals, number = setting.partition("=")
        slider = by_name.get(name.replace("_", " "))
        if slider is None or not equals:
            raise UserError(f"--set {setting}: expected SLIDER=VALUE with one of {', '.join(by_name)}")
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


def _check_outs(outs: dict[str, Path], page: str | None) -> None:
    for suffix, out in [*outs.items(), *([(".html", Path(page))] if page else [])]:
        if out.suffix != suffix:
            raise UserError(f"--{suffix[1:]} {out} must end in {suffix}")
        check_out(out)


def _expressions(
    args: argparse.Namespace, sliders: tuple[Slider, ...], driving: np.ndarray | None
) -> Float[np.ndarray, "E 135"]:
    """The expression codes that the numbered files show, or the one."""
    if driving is not None:
        if args.sweep or args.set:
            raise UserError("--driving makes the expressions; leave out --sweep and --set")
        return driving
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

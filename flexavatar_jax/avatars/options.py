"""The options of `python -m flexavatar_jax.avatar`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from flexavatar_jax.avatars import film, scenes, viewer
from flexavatar_jax.avatars.export import command as export_command
from flexavatar_jax.avatars.fit import FitSettings
from flexavatar_jax.avatars.interpolation import METHODS


def make_parser(
    description: str,
    run: Mapping[str, Callable[[argparse.Namespace], None]],
    read: viewer.ReadAvatars,
) -> argparse.ArgumentParser:
    """The parser of `python -m flexavatar_jax.avatar`.

    Args:
      run: the function of each command but `view` and `export`, which bring their own.
      read: loads the model and the avatars that those two name.
    """
    parser = argparse.ArgumentParser(
        prog="python -m flexavatar_jax.avatar",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--workdir", required=True, help="folder of a training run or an import")
    model.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    model.add_argument(
        "--dinov2", default="", help="DINOv2 weights, if not where training had them"
    )
    model.add_argument("--backend", default="auto", help="rasterizer: auto, xla, ...")

    filmed = argparse.ArgumentParser(add_help=False)
    filmed.add_argument("--out", required=True, help=f"the film, which ends in {film.FORMATS}")
    filmed.add_argument(
        "--driving", help="folder of .frame files, DIR/inputs/VIDEO, SET/PERSON or FILE.avatar"
    )
    filmed.add_argument(
        "--frames", type=int, help=f"of a film without --driving (default: {scenes.FRAMES})"
    )
    filmed.add_argument("--size", type=int, help="pixels a side (default: the model's)")
    filmed.add_argument("--fps", type=float, default=24, help="frames a second (default: 24)")
    filmed.add_argument(
        "--background", default="white", help="white, black, a name, #rrggbb, or transparent"
    )

    command = commands.add_parser("create", parents=[model], help="make an .avatar file")
    command.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="DIR/inputs/NAME.jpg (several, or a video), or SET/PERSON",
    )
    command.add_argument("--out", required=True, help="NAME.avatar; a folder for --people")
    command.add_argument("--people", help="names, or all: people of the prepared data set SOURCE")
    command.add_argument(
        "--images",
        type=int,
        help="frames of a video or a prepared person to make it from (default: 1)",
    )
    defaults = FitSettings()
    command.add_argument(
        "--fit",
        type=int,
        default=0,
        metavar="STEPS",
        help="fit the code to the pictures (200 is the published number)",
    )
    command.add_argument("--batch", type=int, default=defaults.batch, help="pictures a step")
    command.add_argument("--learning_rate", type=float, default=defaults.learning_rate)
    command.add_argument(
        "--shift",
        type=float,
        default=defaults.shift,
        help="how fast all tokens move together, beside each its own (0: not, as published)",
    )
    command.add_argument(
        "--pull",
        type=float,
        default=defaults.pull,
        help="weight of staying near the encoder's code",
    )
    command.add_argument("--seed", type=int, default=defaults.seed, help="of the pictures' order")
    command.add_argument("--dinov2_small", default="", help="weights for the fit's DINO loss")
    command.add_argument("--sam2", default="", help="weights for the fit's SAM loss")
    command.set_defaults(run=run["create"])

    command = commands.add_parser("info", help="print what is in an .avatar file")
    command.add_argument("avatar", help="FILE.avatar")
    command.set_defaults(run=run["info"])

    command = commands.add_parser(
        "render", parents=[model, filmed], help="film one or several avatars, side by side"
    )
    command.add_argument(
        "avatars", nargs="*", metavar="AVATAR", help="FILE.avatar, or what one is made from"
    )
    command.add_argument(
        "--portrait", action="append", default=[], help="the same as an AVATAR: DIR/inputs/NAME.jpg"
    )
    command.add_argument(
        "--camera",
        help="orbit, circle, still or a camera path FILE.json (default: orbit, or still if driven)",
    )
    command.add_argument(
        "--pose",
        choices=("frozen", "kept"),
        default="frozen",
        help="whether the head moves as the driver's did",
    )
    command.add_argument(
        "--beside", action="store_true", help="show the driving pictures beside the avatar"
    )
    command.set_defaults(run=run["render"])

    command = commands.add_parser(
        "interpolate", parents=[model, filmed], help="film the way from one avatar to others"
    )
    command.add_argument(
        "avatars", nargs="+", metavar="AVATAR", help="FILE.avatar, or what one is made from"
    )
    command.add_argument(
        "--camera", default="still", help="orbit, circle, still or a camera path FILE.json"
    )
    command.add_argument("--method", choices=METHODS, default=METHODS[0])
    command.add_argument(
        "--grid",
        type=int,
        metavar="SIDE",
        help="four avatars as the corners of a square of SIDE x SIDE",
    )
    command.set_defaults(run=run["interpolate"])

    viewer.add_command(commands, model, read)
    export_command.add_command(commands, model, read)
    return parser

"""Writes a contact sheet: `python -m data_pipelines.procedural --out sheet.png`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from data_pipelines.errors import UserError, report_error
from data_pipelines.files import writing
from data_pipelines.procedural.contact_sheet import contact_sheet


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.procedural", description=__doc__
    )
    parser.add_argument("--out", type=Path, required=True, help="picture to write, a PNG")
    parser.add_argument("--people", type=int, default=8, help="how many, a row each")
    parser.add_argument("--size", type=int, default=192, help="side of each picture in pixels")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other people")
    args = parser.parse_args(argv)
    try:
        sheet = contact_sheet(args.people, args.size, args.seed)
        with writing(args.out) as unfinished:
            Image.fromarray(sheet).save(unfinished, format="PNG")
    except (UserError, OSError) as error:
        return report_error(error)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

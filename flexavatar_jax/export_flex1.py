"""Exports weights trained here under the published names, so that they run in the authors' code.

    python -m flexavatar_jax.export_flex1 runs/mine --out mine.safetensors

The file is a state dict for FLEX-1's PyTorch model, complete with the tensors that have no effect:
an imported model's own ones, else zeros (and the constant filter).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipelines.errors import UserError
from flexavatar_jax import cli
from flexavatar_jax.published.exporter import export_checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flexavatar_jax.export_flex1", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("workdir", help="folder of a training run or an import")
    parser.add_argument("--out", required=True, help=".safetensors file to write")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    args = parser.parse_args(argv)
    cli.guard(lambda: export(args))
    print(args.out)


def export(args: argparse.Namespace) -> None:
    """Checks where the file goes before the work that makes it."""
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out} must end in .safetensors")
    cli.check_out(out, create=True)
    export_checkpoint(args.workdir, out, args.step)


if __name__ == "__main__":
    main()

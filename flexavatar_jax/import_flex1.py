"""Imports published FLEX-1 weights: a PyTorch checkpoint becomes a folder like one of our runs.

    python -m flexavatar_jax.import_flex1 ckpt-900k.pt --model-config model_config.json \\
        --template gghead_template.obj --out runs/flex1

The checkpoint is a file of torch.save (read without PyTorch and without running anything in it),
a .safetensors or a .npz. Every tensor in it is accounted for.
"""

from __future__ import annotations

import argparse

from flexavatar_jax import cli
from flexavatar_jax.published.importer import import_checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flexavatar_jax.import_flex1", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("checkpoint", help="torch.save file, .safetensors or .npz")
    parser.add_argument("--model-config", required=True, help="the published model_config.json")
    parser.add_argument("--template", required=True, help="the head template's OBJ")
    parser.add_argument("--out", required=True, help="folder to create")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="what the transformers compute in (float32 is faster on CPUs)",
    )
    args = parser.parse_args(argv)
    accounted = cli.guard(
        lambda: import_checkpoint(
            args.checkpoint, args.model_config, args.template, args.out, dtype=args.dtype
        )
    )
    print(f"{args.out}: {accounted}")


if __name__ == "__main__":
    main()

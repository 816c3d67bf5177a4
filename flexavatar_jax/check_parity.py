"""Checks model and frozen networks against reference outputs, with weights made by a rule.

    python -m flexavatar_jax.check_parity --shared ../shared [--salt S --case DIR]

The weights are written to files as they are published, read by the importer, and run in float32.
Prints a table of relative errors (norm of the difference over norm); exits 1 if one is too large.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jax
from tqdm import tqdm

from data_pipelines.errors import TRY_AGAIN, UserError
from flexavatar_jax import cli
from flexavatar_jax.published.parity import (
    INPUTS,
    check_frozen_networks,
    check_model,
    read_case,
)


def check(shared: Path, case: Path | None, salt: str) -> bool:
    """Prints the table of errors; says whether all are within their tolerances."""
    published = shared / "flex1"
    if not (published / "manifest.json").is_file():
        raise UserError(f"no flex1/manifest.json in --shared {shared}", status=TRY_AGAIN)
    reference = read_case(published if case is None else case)
    print(f"{'output':30} {'error':>9} {'allowed':>9}")
    results = []
    outputs = len(reference.model) - len(INPUTS)
    outputs += len(reference.frozen)
    with (
        # Left to themselves, accelerators round the factors of products to bfloat16 or TF32.
        jax.default_matmul_precision("highest"),
        tqdm(total=outputs, desc="comparing", unit="output", disable=None) as bar,
    ):
        for part in (
            check_model(published, reference, salt),
            check_frozen_networks(reference, salt),
        ):
            for result in part:
                results.append(result)
                verdict = "" if result.ok else "  OVER"
                bar.write(f"{result.name:30} {result.error:9.1e} {result.tolerance:9.0e}{verdict}")
                bar.update()
    return all(result.ok for result in results)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flexavatar_jax.check_parity", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--shared", type=Path, required=True, help="folder with flex1/")
    parser.add_argument("--salt", default="public", help="which weights the rule makes")
    parser.add_argument("--case", type=Path, help="folder of the salt's references")
    args = parser.parse_args(argv)
    sys.exit(0 if cli.guard(lambda: check(args.shared, args.case, args.salt)) else 1)


if __name__ == "__main__":
    main()

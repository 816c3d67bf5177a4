"""Puts a run's weights into a folder to be handed on: a few megabytes that load as the run does.

    python -m flexavatar_jax.publish runs/procedural --out pretrained/procedural

The folder has the parameters in float16 (weights.safetensors, whose metadata say step, seed and
commit), the config and the head template. `--workdir` of `evaluate` and `avatar` takes it, and
`config.init_from` of `train`. What only training needs, the optimizer's state, stays with the run.
"""

from __future__ import annotations

import argparse

from etils import epath
from flax import nnx
from ml_collections import ConfigDict

from data_pipelines.errors import UserError
from data_pipelines.files import list_folder
from flexavatar_jax import cli
from flexavatar_jax.evaluation.matrix import commit
from flexavatar_jax.runs import digests, weights_file
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.weights_file import pack_weights


def publish(workdir: epath.PathLike, out: epath.PathLike, step: int | None = None) -> None:
    """Writes the folder `out`; what an earlier call wrote there is replaced.

    The config goes along without the paths of this machine's weights of frozen networks.

    Raises:
      UserError: no whole checkpoint of a run at `workdir`; or `out` holds something else, or
        cannot be written.
    """
    workdir, out = epath.Path(workdir), epath.Path(out)
    if out.exists() and list_folder(out) and not weights_file.is_there(out):
        raise UserError(f"--out {out} holds something else than weights; give another folder")
    loaded = load_model(workdir, step, load_dinov2=False)
    notes = {
        "step": loaded.step,
        "seed": loaded.config.seed,
        "commit": commit(),
        "seconds": loaded.progress.get("seconds", 0.0),
    }
    config = ConfigDict(loaded.config)
    config.frozen = ConfigDict(dict.fromkeys(config.frozen, ""))
    contents = {
        "config.json": config.to_json_best_effort(indent=2, sort_keys=True),
        "template.obj": (workdir / "template.obj").read_text(),
    }
    contents[weights_file.FILE] = pack_weights(nnx.state(loaded.model, nnx.Param), notes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / digests.FILE).unlink(missing_ok=True)  # or damaged files would pass for whole ones
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror or error}") from None
    digests.write_files(out, contents)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m flexavatar_jax.publish", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("workdir", help="folder of a training run or an import")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    args = parser.parse_args(argv)
    cli.guard(lambda: publish(args.workdir, args.out, args.step))
    print(args.out)


if __name__ == "__main__":
    main()

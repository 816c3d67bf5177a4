"""Trains configs with several seeds, evaluates all on the same people, and writes what came out.

    python -m flexavatar_jax.compare --configs configs/search.py:adam,configs/search.py:demo \\
        --seeds 0,1,2 --workdir runs/search --out runs/search/results

A config is FILE.py, or FILE.py:NAME for one whose `get_config` takes a name. Given again, the
command goes on where it was stopped; after each run it writes OUT/results.json, OUT/table.md and
OUT/curves.svg of the runs there are so far. At the end come OUT/orbits_0.png, _1.png (two people
from all round), OUT/poses.png (only the code's head pose turns, then only the camera) and
OUT/index.html, a page of all this with the first test person's avatars, to be turned by hand.
"""

from __future__ import annotations

import numpy as np
from absl import flags
from etils import epath
from PIL import Image

from data_pipelines.errors import UserError
from data_pipelines.files import write
from flexavatar_jax import cli
from flexavatar_jax.evaluation.comparison_page import write_page
from flexavatar_jax.evaluation.matrix import (
    curves,
    markdown,
    read_experiment,
    read_results,
    run_matrix,
    table,
    write_results,
)
from flexavatar_jax.evaluation.orbits import orbit_sheet, pose_sheet

SHOWN_PEOPLE = 2


def compare(configs: list[str], seeds: list[int], workdir: epath.PathLike, out: str) -> int:
    """Runs what is left of the comparison; returns an exit status.

    Raises:
      UserError: configs or seeds that cannot be meant, and what `train` and `evaluate` raise.
    """
    experiments = dict(read_experiment(path) for path in configs)
    if len(experiments) < len(configs):
        raise UserError(f"--configs {','.join(configs)} names two experiments alike")
    folder, status = epath.Path(out), 0
    for name, seed, status in run_matrix(experiments, seeds, workdir):
        if status:
            return status
        results = read_results(experiments, workdir)
        write_results(results, folder)
        write(folder / "table.md", markdown(table(results)))
        write(folder / "curves.svg", curves(experiments, workdir))
        print(f"{name}, seed {seed}: {results[name][str(seed)]['psnr_unseen_all']:.2f} dB")
    results = read_results(experiments, workdir)
    first = {name: epath.Path(workdir) / name / str(seeds[0]) for name in results}
    sheets = {f"orbits_{person}.png": orbit_sheet(first, person) for person in range(SHOWN_PEOPLE)}
    for name, sheet in {**sheets, "poses.png": pose_sheet(first)}.items():
        Image.fromarray(np.round(255 * sheet).astype(np.uint8)).save(str(folder / name))
    write_page(folder, results, list(sheets), first)
    return status


def main() -> int:
    try:
        seeds = [int(seed) for seed in FLAGS.seeds]
    except ValueError as error:
        raise UserError(
            f"--seeds {','.join(FLAGS.seeds)}: expected whole numbers, as in 0,1,2"
        ) from error
    return compare(FLAGS.configs, seeds, FLAGS.workdir, FLAGS.out)


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_list("configs", None, "Experiments: FILE.py[:NAME], separated by commas.")
    flags.DEFINE_list("seeds", ["0"], "Seeds, separated by commas.")
    flags.DEFINE_string("workdir", None, "Folder of the runs.")
    flags.DEFINE_string("out", None, "Folder of the results: table, figures, results.json.")
    flags.mark_flags_as_required(["configs", "workdir", "out"])
    cli.run(main)

"""How smooth the way between avatars is, and whether there is a person half way.

    python -m flexavatar_jax.evaluation.between --workdir runs/demo

Goes between pairs of test people by either method of `avatars.interpolation`. Smooth: the largest
difference of consecutive frames over their mean. A person: the middle, rendered as each of some
training people stands, has a nearest one; its SSIM to that one, beside a cross-fade's of the ends.
"""

from __future__ import annotations

import argparse

import numpy as np
from etils import epath
from jaxtyping import Float

from data_pipelines.shards import PreparedSet, open_at_size
from flexavatar_jax import cli
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.create import create_avatar
from flexavatar_jax.avatars.interpolation import METHODS, path_through
from flexavatar_jax.avatars.observations import people_of, read_person
from flexavatar_jax.evaluation.metrics import training_sets
from flexavatar_jax.evaluation.people import evenly_spaced, on_white
from flexavatar_jax.evaluation.people import read_people as read_test_people
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.workdir import read_config
from flexavatar_jax.training.losses import ssim

FRAMES = 25


def unevenness(frames: Float[np.ndarray, "T h w 3"]) -> float:
    """The largest difference of consecutive frames over the mean of all; 1 is even."""
    steps = np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3))
    return float(steps.max() / steps.mean())


def nearest_similarity(
    images: Float[np.ndarray, "P h w 3"], people: Float[np.ndarray, "P h w 3"]
) -> float:
    """The SSIM to the nearest person of an avatar that was rendered as each of them stands."""
    return float(np.asarray(ssim(images.astype(np.float32), people.astype(np.float32))).max())


def measure(workdir: epath.PathLike, pairs: int, people: int) -> dict[str, list[list[float]]]:
    """For each method a row a pair: unevenness, the middle's similarity, the cross-fade's."""
    config = read_config(workdir)
    size = config.model.image_size
    animator = Animator(load_model(workdir), backend=config.rasterizer)
    folder = epath.Path(config.data.root) / config.eval.dataset
    avatars = [create_avatar(animator, read_person(folder, n)) for n in people_of(folder, ["all"])]
    data: PreparedSet = open_at_size(training_sets(config)[-1], size)
    everyone = read_test_people(data, len(set(data.index.person)), 2, size)
    stands = [everyone[i].input for i in evenly_spaced(len(everyone), people)]
    truths = np.stack([on_white(f) for f in stands])
    tracking = [np.stack([getattr(f, x) for f in stands]) for x in ("expression", "cam2head", "K")]
    table: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for a, b in zip(avatars[0 : 2 * pairs : 2], avatars[1 : 2 * pairs : 2], strict=False):
        ends = [animator.render(x.code, *tracking, size=size) for x in (a, b)]
        faded = nearest_similarity((ends[0] + ends[1]) / 2, truths)
        for method in METHODS:
            codes, _ = path_through(np.stack([a.code, b.code]), FRAMES, method)
            film = animator.render(codes, a.expression, a.cam2head, a.K)
            middle = animator.render(codes[FRAMES // 2], *tracking, size=size)
            row = [unevenness(film), nearest_similarity(middle, truths), faded]
            table[method].append(row)
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--pairs", type=int, default=4, help="of test people")
    parser.add_argument("--people", type=int, default=18, help="of the last training set")
    args = parser.parse_args(argv)
    table = cli.guard(lambda: measure(args.workdir, args.pairs, args.people))
    print(
        "| method | largest step / mean | middle's SSIM | cross-fade's |\n| --- | --- | --- | --- |"
    )
    for method, rows in table.items():
        for row in (*rows, np.mean(rows, axis=0)):
            print(f"| {method} | {row[0]:.2f} | {row[1]:.4f} | {row[2]:.4f} |")


if __name__ == "__main__":
    main()

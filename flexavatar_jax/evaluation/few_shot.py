"""The few-shot experiment: quality by number of pictures, by the encoder alone and fitted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.files import write
from data_pipelines.frame import Frame
from data_pipelines.shards import PreparedSet, open_at_size
from flexavatar_jax import cli
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.create import create_avatar
from flexavatar_jax.avatars.fit import FitSettings
from flexavatar_jax.avatars.observations import Observations, read_person
from flexavatar_jax.evaluation.metrics import score, summarise
from flexavatar_jax.evaluation.people import on_white, sector, spread
from flexavatar_jax.frozen.networks import FrozenNetworks, load_perceptual_networks
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.workdir import read_config


def evaluate_few_shots(
    workdir: epath.PathLike,
    shots: Sequence[int],
    fit_steps: int = 0,
    *,
    step: int | None = None,
    data_root: str = "",
    dataset: str = "",
    dinov2: str = "",
) -> dict[str, dict[str, float]]:
    """Runs the experiment with a run's own test set, or another; writes WORKDIR/few_shot.json.

    Args:
      shots: numbers of pictures.
      fit_steps: of a fit beside the encoder alone; 0: none. Perceptual terms join where the config
        says where their networks lie, and they are there.
      step, data_root, dataset, dinov2: as `evaluate`.

    Raises:
      UserError: as `evaluate` and `read_people`.
    """
    for count in shots:
        if count < 1:
            raise UserError(f"--shots {count}: expected numbers of pictures, 1 or more")
    config = read_config(workdir)
    cli.check_dinov2(dinov2, workdir, config)
    folder = epath.Path(data_root or config.data.root) / (dataset or config.eval.dataset)
    size = config.model.image_size
    data = open_at_size(folder, size)
    animator = Animator(load_model(workdir, step, dinov2), backend=config.rasterizer)
    wanted = config.eval.people, config.eval.images_per_person
    people = read_people(data, shots, *wanted, size)
    settings = FitSettings(steps=fit_steps) if fit_steps else None
    if settings:
        settings.check(min(shots))
    table = few_shot(animator, people, settings, load_perceptual_networks(config))
    write(epath.Path(workdir) / "few_shot.json", json.dumps(table, indent=2) + "\n")
    return table


class Person(NamedTuple):
    """A test person: what is observed, by number of pictures, and frames that none of them is."""

    name: str
    observed: dict[int, Observations]
    unseen: list[Frame]


def read_people(
    data: PreparedSet, shots: Sequence[int], people: int, images: int, size: int
) -> list[Person]:
    """The first `people` of a test set, each with up to `images` frames that no shot has seen.

    Raises:
      UserError: a person has too few frames to leave any unseen, or a number of shots below 1.
    """
    names = list(dict.fromkeys(map(str, data.index.person)))[:people]
    found = []
    for name in tqdm(names, desc="reading test people", unit="person"):
        observed = {n: read_person(data.folder, name, n) for n in shots}
        clip = list(map(str, data.index.person)).index(name)
        records = np.arange(*data.index.clip_start[clip : clip + 2])
        taken = [v for person in observed.values() for v in person.cam2heads[person.seen]]
        expressions = [e for person in observed.values() for e in person.expressions[person.seen]]
        frames = [data.frame(int(i), size) for i in records]
        left = np.array(
            [
                i
                for i, f in enumerate(frames)
                if not any(
                    np.array_equal(f.cam2head, c) and np.array_equal(f.expression, e)
                    for c, e in zip(taken, expressions, strict=True)
                )
            ],
            int,
        )
        if not len(left):
            raise UserError(
                f"{data.folder} has {len(frames)} frames of {name}, and --shots leaves none "
                "unseen; give fewer shots"
            )
        index = data.index
        chosen = left[spread(index.camera[records[left]], index.timestep[records[left]], images)]
        found.append(Person(name, observed, [frames[i] for i in chosen]))
    return found


def few_shot(
    animator: Animator,
    people: Sequence[Person],
    settings: FitSettings | None = None,
    frozen: FrozenNetworks | None = None,
) -> dict[str, dict[str, float]]:
    """Mean scores on unseen frames, as `summarise`, by number of pictures.

    Returns:
      A row for each of "1 encoder", "1 fitted", "4 encoder", ...; those fitted if `settings`.
    """
    table: dict[str, list] = {}
    shots = list(people[0].observed)
    methods = {"encoder": None} | ({"fitted": settings} if settings else {})
    total = len(people) * len(shots) * len(methods)
    with tqdm(total=total, desc="few shots", unit="avatar") as bar:
        for person in people:
            for count in shots:
                for method, how in methods.items():
                    bar.set_postfix_str(f"{person.name}, {count} pictures, {method}")
                    avatar = create_avatar(animator, person.observed[count], how, frozen)
                    rows = table.setdefault(f"{count} {method}", [])
                    rows += _scores(animator, avatar.code, person.unseen)
                    bar.update()
    return {name: summarise(rows) for name, rows in table.items()}


def _scores(
    animator: Animator, code: np.ndarray, frames: Sequence[Frame]
) -> list[tuple[str, dict[str, float]]]:
    """(sector, scores) of an avatar rendered as each of `frames` stands."""
    tracking = [np.stack([getattr(f, x) for f in frames]) for x in ("expression", "cam2head", "K")]
    truths = np.stack([on_white(f) for f in frames])
    found = score(animator.render(code, *tracking, size=truths.shape[1]), truths)
    return [
        (sector(f.cam2head), {name: float(values[i]) for name, values in found.items()})
        for i, f in enumerate(frames)
    ]


def print_table(table: dict[str, dict[str, float]], say: Callable[[str], None] = print) -> None:
    """The table as Markdown: PSNR in dB and SSIM, all and by sector."""
    sectors = [
        s for s in ("all", "front", "side", "back") if f"psnr_{s}" in next(iter(table.values()))
    ]
    say("| pictures | " + " | ".join(f"{s}: PSNR / SSIM" for s in sectors) + " |")
    say("| --- " * (1 + len(sectors)) + "|")
    for name, row in table.items():
        cells = (f"{row[f'psnr_{s}']:.2f} / {row[f'ssim_{s}']:.3f}" for s in sectors)
        say(f"| {name} | " + " | ".join(cells) + " |")

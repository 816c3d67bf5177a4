"""Sheets of pictures: one input, the avatars that several runs make of it, in some views."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image, ImageDraw

from data_pipelines.frame import MONOCULAR, MULTI_VIEW
from data_pipelines.shards import open_at_size
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.camera_paths import turned_camera
from flexavatar_jax.evaluation.entanglement import TURNS, turned
from flexavatar_jax.evaluation.people import Person, on_white, portrait, read_people
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.workdir import read_config

VIEWS = 8
TILE = 112


Views = tuple[Float[np.ndarray, "T 135"], Float[np.ndarray, "T 4 4"], Float[np.ndarray, "T 3 3"]]
"""Expression codes, cameras in the head frame and intrinsics of the pictures in a row."""


def orbit_sheet(
    runs: dict[str, epath.PathLike], person: int = 0
) -> Float[np.ndarray, "rows columns 3"]:
    """A row of views a run, titled, the truth below; with two sinks, a row for each of both.

    Views are the test person's own: one moment, cameras by azimuth.
    """

    def their_own(shown: Person) -> Views:
        return tuple(
            np.stack([getattr(target, field) for target in shown.targets])
            for field in ("expression", "cam2head", "K")
        )

    rows, shown = _rows(runs, person, their_own)
    truths = [on_white(target) for target in shown.targets]
    return np.concatenate([*rows, _row("truth", on_white(shown.input), truths)])


def pose_sheet(
    runs: dict[str, epath.PathLike], person: int = 0
) -> Float[np.ndarray, "rows columns 3"]:
    """A row a run and sink: only the code's head pose turns, then only the camera does.

    In the first four pictures after the input nothing should change, as cameras are given in the
    head frame; in the last four the head should be seen from the sides.
    """

    def turning(shown: Person) -> Views:
        source, angles = shown.input, np.linspace(*TURNS, VIEWS // 2)
        codes = [turned(source.expression, angle) for angle in angles]
        poses = [turned_camera(source.cam2head, angle) for angle in angles]
        return (
            np.stack([*codes, *[source.expression] * len(angles)]),
            np.stack([*[source.cam2head] * len(angles), *poses]).astype(np.float32),
            np.stack([source.K] * VIEWS),
        )

    rows, _ = _rows(runs, person, turning)
    return np.concatenate(rows)


def _rows(
    runs: dict[str, epath.PathLike], person: int, views: Callable[[Person], Views]
) -> tuple[list[Float[np.ndarray, "TILE columns 3"]], Person]:
    """A person's avatar in some views, by each run and sink; and the person."""
    if not runs:
        raise ValueError("a sheet of no runs")
    rows = []
    for title, workdir in runs.items():
        config = read_config(workdir)
        size = config.model.image_size
        data = open_at_size(epath.Path(config.data.root) / config.eval.dataset, size)
        shown = _one_moment(read_people(data, person + 1, 10_000, size)[person])
        animator = Animator(load_model(workdir), backend=config.rasterizer)
        source = portrait(shown, config)
        code = animator.encode(source.image, source.mask, source.cam2head, source.K)
        sinks = {title: MULTI_VIEW}
        if config.model.bias_sinks:
            sinks = {
                f"{title}: multi-view sink": MULTI_VIEW,
                f"{title}: monocular sink": MONOCULAR,
            }
        for label, sink in sinks.items():
            images = animator.render(code, *views(shown), size=size, source=sink)
            rows.append(_row(label, on_white(source), images))
    return rows, shown


def _one_moment(person: Person) -> Person:
    """The targets of the first moment, at most VIEWS of them, by azimuth round the head."""
    first = min(target.timestep for target in person.targets)
    there = [target for target in person.targets if target.timestep == first]
    there.sort(key=lambda t: np.arctan2(t.cam2head[0, 3], t.cam2head[2, 3]))
    chosen = np.linspace(0, len(there) - 1, min(VIEWS, len(there))).round().astype(int)
    return person._replace(targets=[there[i] for i in chosen])


def _row(label: str, source: np.ndarray, images) -> Float[np.ndarray, "TILE columns 3"]:
    tiles = [_tile(source), *(_tile(image) for image in images)]
    picture = Image.fromarray(np.concatenate(tiles, axis=1))
    draw = ImageDraw.Draw(picture)
    draw.rectangle(draw.textbbox((TILE + 4, 2), label), fill="white")
    draw.text((TILE + 4, 2), label, fill="black")
    return np.asarray(picture) / 255.0


def _tile(image: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8))
    return np.asarray(picture.resize((TILE, TILE), Image.Resampling.BICUBIC))

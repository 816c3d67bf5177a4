"""Measures a trained model on people it never saw, from all round, and shows them.

    python -m flexavatar_jax.evaluate --workdir runs/demo [--data_root DIR --dataset NAME]

Each test person's most frontal first frame is the only input; the model renders other frames of
that person with the multi-view bias sink, from their own cameras with their own expression codes.
Beside it stands the best constant, the mean training image of the same sector of view, if the
training data are there. Writes WORKDIR/metrics.json and WORKDIR/report/index.html.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.frame import MONOCULAR, MULTI_VIEW, Frame
from data_pipelines.shards import PreparedSet, open_at_size
from flexavatar_jax import cli
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.camera_paths import orbit_cameras
from flexavatar_jax.evaluation.report import Orbit, TestPerson, write_report
from flexavatar_jax.runs.checkpoints import load_model, read_config, write_atomically
from flexavatar_jax.training.losses import psnr, ssim
from kernels.writable import make_writable

SECTORS = ("front", "side", "back")
ORBIT_FRAMES = 48


class Person(NamedTuple):
    """A test person: the only input, and the frames to be predicted."""

    name: str
    input: Frame
    targets: list[Frame]


def check_numbers(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises `ValueError` for an evaluation of nothing; one of a person's images is the input."""
    for field, least in (("people", 1), ("images_per_person", 2), ("constant_images", 1)):
        value = config.eval[field]
        if value < least:
            raise ValueError(
                f"config.eval.{field} is {value}; expected {least} or more: correct it in "
                f"{epath.Path(workdir) / 'config.json'}"
            )


def azimuth(cam2head: Float[np.ndarray, "4 4"]) -> float:
    """Degrees by which the camera stands off the face's axis, to either side: 0 front, 180 back."""
    x, _, z = cam2head[:3, 3]
    return float(np.degrees(np.abs(np.arctan2(x, z))))


def sector(cam2head: Float[np.ndarray, "4 4"]) -> str:
    """front below 60 degrees of azimuth, back from 120 on, side between."""
    angle = azimuth(cam2head)
    return "front" if angle < 60 else "side" if angle < 120 else "back"


def on_white(frame: Frame) -> Float[np.ndarray, "H W 3"]:
    """A frame's foreground on white, RGB in [0, 1]."""
    alpha = frame.mask[..., None].astype(np.float32) / 255
    return frame.image.astype(np.float32) / 255 * alpha + (1 - alpha)


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """At most `wanted` of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def spread(camera: np.ndarray, timestep: np.ndarray, wanted: int) -> np.ndarray:
    """At most `wanted` of a clip's frames, evenly spaced over cameras and, in each, over time.

    All cameras come where there are as many wanted. In the order frames are stored, moment by
    moment, a stride would meet some cameras again and again and others never.
    """
    camera_by_camera = np.lexsort((timestep, camera))
    return camera_by_camera[evenly_spaced(len(camera), wanted)]


def read_people(data: PreparedSet, people: int, images: int, size: int) -> list[Person]:
    """The first `people` of a test set, `images` targets each, spread over cameras and time."""
    index = data.index
    clips = {}
    for clip, name in enumerate(index.person):
        clips.setdefault(str(name), clip)
    result = []
    for name, clip in tqdm(list(clips.items())[:people], desc="reading test people", unit="person"):
        records = np.arange(index.clip_start[clip], index.clip_start[clip + 1])
        first = records[index.timestep[records] == index.timestep[records].min()]
        source = min(
            (data.frame(int(i), size) for i in first), key=lambda frame: azimuth(frame.cam2head)
        )
        chosen = records[spread(index.camera[records], index.timestep[records], images)]
        targets = [data.frame(int(i), size) for i in chosen]
        targets = [t for t in targets if (t.camera, t.timestep) != (source.camera, source.timestep)]
        if not targets:
            raise ValueError(
                f"{data.folder} has one frame only of {name}, none of which is left to predict; "
                "prepare a config.eval.dataset of more frames a person"
            )
        result.append(Person(name, source, targets))
    return result


def training_sets(config: ConfigDict) -> list[epath.Path]:
    """Folders of the data sets trained on; those of weight 0 need not be there."""
    mixture = config.data.mixture.items()
    return [epath.Path(config.data.root) / name for name, weight in mixture if weight != 0]


def sector_means(config: ConfigDict) -> dict[str, Float[np.ndarray, "H W 3"]]:
    """The mean training image of each sector: the best constant in the mean square.

    Sectors that training never saw have the mean of all.
    """
    size = config.data.image_size
    sums = {name: np.zeros((size, size, 3)) for name in SECTORS}
    counts = dict.fromkeys(SECTORS, 0)
    for folder in training_sets(config):
        data = open_at_size(folder, size)
        wanted = evenly_spaced(len(data), config.eval.constant_images)
        for i in tqdm(wanted, desc=f"mean image of {data.name}", unit="image"):
            frame = data.frame(int(i), size)
            sums[sector(frame.cam2head)] += on_white(frame)
            counts[sector(frame.cam2head)] += 1
    everything = sum(sums.values()) / sum(counts.values())
    return {n: sums[n] / counts[n] if counts[n] else everything for n in SECTORS}


def evaluate(
    workdir: epath.PathLike,
    step: int | None = None,
    data_root: str = "",
    dataset: str = "",
    dinov2: str = "",
) -> dict:
    """Runs the evaluation that the run's config describes; returns the metrics it wrote.

    Args:
      workdir: of a training run or of an import.
      step: which checkpoint; by default the newest.
      data_root, dataset, dinov2: instead of the config's `data.root`, `eval.dataset` and
        `frozen.dinov2_base`.

    Raises:
      FileNotFoundError, ValueError: no run, checkpoint or data set there, or a damaged one; or the
        data set's images are smaller than the model's.
    """
    config = read_config(workdir)
    cli.check_dinov2(dinov2, workdir, config)
    config.data.root = data_root or config.data.root
    config.eval.dataset = dataset or config.eval.dataset
    check_numbers(config, workdir)
    size = config.data.image_size
    test_set = open_at_size(epath.Path(config.data.root) / config.eval.dataset, size)
    report = epath.Path(workdir) / "report"
    try:
        make_writable(Path(report))
    except OSError as error:
        raise OSError(
            f"{report} cannot be written ({error.strerror}); move it away, or make it writable"
        ) from error
    loaded = load_model(workdir, step, dinov2)
    people = read_people(test_set, config.eval.people, config.eval.images_per_person, size)
    absent = [s for s in training_sets(config) if not (s / "index.npz").exists()]
    constants = None if absent else sector_means(config)
    animator = Animator(loaded, backend=config.rasterizer)

    shown, rows = [], []
    for person in tqdm(people, desc="rendering test people", unit="person"):
        source = person.input
        code = animator.encode(source.image, source.mask, source.cam2head, source.K)
        predictions = animator.render(
            code,
            np.stack([t.expression for t in person.targets]),
            np.stack([t.cam2head for t in person.targets]),
            np.stack([t.K for t in person.targets]),
            size=size,
        )
        truths = np.stack([on_white(t) for t in person.targets])
        sectors = [sector(t.cam2head) for t in person.targets]
        compared = {"unseen": predictions}
        if constants:
            compared["constant"] = np.stack([constants[s] for s in sectors]).astype(np.float32)
        scores = {
            f"{measure}_{name}": np.asarray(function(images, truths))
            for name, images in compared.items()
            for measure, function in (("psnr", psnr), ("ssim", ssim))
        }
        for i, name in enumerate(sectors):
            rows.append((name, {key: float(values[i]) for key, values in scores.items()}))
        shown.append(TestPerson(person.name, on_white(source), sectors, truths, predictions))

    metrics = summarise(rows)
    metrics |= {
        "people": len(people),
        "images": len(rows),
        "steps": loaded.step,
        "seconds": round(loaded.progress.get("seconds", 0.0), 1),
        "dataset": config.eval.dataset,
    }
    if absent:
        metrics["no_constant"] = (
            f"the best constant is left out, as training data are not there: "
            f"{', '.join(map(os.fspath, absent))}"
        )
    first = people[0].input
    orbits = [orbit_of(animator, first, sink, size) for sink in (MULTI_VIEW, MONOCULAR)]
    write_report(report, config, metrics, shown, orbits, on_white(first))
    text = json.dumps(metrics, indent=2) + "\n"
    write_atomically(epath.Path(workdir) / "metrics.json", text)
    write_atomically(report / "metrics.json", text)
    return metrics


def summarise(rows: list[tuple[str, dict[str, float]]]) -> dict[str, float]:
    """Means over images, all and by sector, of the scores of (sector, scores)."""
    metrics = {}
    for name in ("all", *SECTORS):
        chosen = [scores for where, scores in rows if name in ("all", where)]
        for key in chosen[0] if chosen else ():
            metrics[f"{key}_{name}"] = round(float(np.mean([s[key] for s in chosen])), 4)
    return metrics


def orbit_of(animator: Animator, source: Frame, sink: int, size: int) -> Orbit:
    """An avatar all the way round, made from `source`, with either bias sink."""
    views = orbit_cameras(source.cam2head, ORBIT_FRAMES)
    images = animator.render(
        animator.encode(source.image, source.mask, source.cam2head, source.K),
        np.repeat(source.expression[None], len(views), axis=0),
        views,
        np.repeat(source.K[None], len(views), axis=0),
        size=max(size, 256),
        source=sink,
    )
    return Orbit("multi-view sink" if sink == MULTI_VIEW else "monocular sink", images)


def main() -> None:
    metrics = evaluate(FLAGS.workdir, FLAGS.step, FLAGS.data_root, FLAGS.dataset, FLAGS.dinov2)
    for name in ("all", *SECTORS):
        if f"psnr_unseen_{name}" in metrics:
            scores = []
            for measure, digits, unit in (("psnr", 2, " dB"), ("ssim", 3, "")):
                score = f"{measure.upper()} {metrics[f'{measure}_unseen_{name}']:.{digits}f}{unit}"
                if f"{measure}_constant_{name}" in metrics:
                    score += f" (constant {metrics[f'{measure}_constant_{name}']:.{digits}f})"
                scores.append(score)
            print(f"{name:>5}: {', '.join(scores)}")
    if "no_constant" in metrics:
        print(metrics["no_constant"])
    print(f"report: {epath.Path(FLAGS.workdir) / 'report' / 'index.html'}")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run's folder.")
    flags.DEFINE_integer("step", None, "Checkpoint to evaluate (default: the newest).")
    flags.DEFINE_string("data_root", "", "Where the data sets lie now, if not at config.data.root.")
    flags.DEFINE_string("dataset", "", "Test set below it, instead of config.eval.dataset.")
    flags.DEFINE_string("dinov2", "", "DINOv2 weights, if not where training had them.")
    flags.mark_flag_as_required("workdir")
    cli.run(main)

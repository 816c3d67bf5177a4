"""Measures a trained model on people it never saw, from all round, and shows them.

    python -m flexavatar_jax.evaluate --workdir runs/demo
    python -m flexavatar_jax.evaluate --workdir runs/demo --data_root DIR --dataset MINE --out mine

Each test person's most frontal first frame is the only input; the model renders other frames of
that person with the multi-view bias sink, from their own cameras with their own expression codes.
Beside PSNR and SSIM it measures whether the head is whole (mask IoU), whether it is the person
(identity rank-1), whether mouth and eyes follow the code, and whether head pose in the code changes
what it must not. If the training data are there, two references stand beside: the best constant,
the mean training image of the same sector of view, and the nearest training person. A third, the
best avatar code there is, takes minutes: `--upper_bound`. `--csim FILE.onnx` and `--akd FILE.onnx`
compare identities and keypoints by networks of your own (`evaluation.faces`). Writes metrics.json
and report/index.html into the run's folder, or into `--out`.

Of a set with one picture of everybody, such as portraits of one's own, there is no other view to
predict: the input itself is rendered again. Its scores are called `input` (`psnr_input_all`), and
report and metrics say that they are of self-reconstruction.

    python -m flexavatar_jax.evaluate --workdir runs/demo --shots 1,4,16 --fit 200

prints quality by number of pictures, by the encoder alone and fitted (docs/avatars.md).
"""

from __future__ import annotations

import json
import os

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float
from tqdm import tqdm

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.files import make_writable, write
from data_pipelines.frame import MONOCULAR, MULTI_VIEW, Frame
from data_pipelines.index import is_finished
from data_pipelines.shards import open_at_size
from flexavatar_jax import cli
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.camera_paths import orbit_cameras
from flexavatar_jax.avatars.export.command import export_page
from flexavatar_jax.evaluation.entanglement import steadiness
from flexavatar_jax.evaluation.face_motion import PATCHES, expression_following, face_motion
from flexavatar_jax.evaluation.faces import FaceScores, faces_in_words, mean_scores
from flexavatar_jax.evaluation.few_shot import evaluate_few_shots, print_table
from flexavatar_jax.evaluation.identity import identity_by_sector
from flexavatar_jax.evaluation.metrics import (
    mask_iou,
    score,
    sector_means,
    summarise,
    training_sets,
)
from flexavatar_jax.evaluation.people import (
    SECTORS,
    on_white,
    portrait,
    read_clip,
    read_people,
    sector,
)
from flexavatar_jax.evaluation.references import TrainingPeople, fitted_views
from flexavatar_jax.evaluation.report import AVATAR_PAGE, Orbit, TestPerson, write_report
from flexavatar_jax.evaluation.vfhq import evaluate_vfhq, print_rows
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.workdir import read_config
from flexavatar_jax.training.metric_log import read_metrics

ORBIT_FRAMES = 48

SELF_RECONSTRUCTION = (
    "self-reconstruction: there is one picture of everybody, the input, which is rendered again; "
    "of views that the model did not see nothing is said"
)


def evaluate(
    workdir: epath.PathLike,
    step: int | None = None,
    data_root: str = "",
    dataset: str = "",
    dinov2: str = "",
    *,
    out: epath.PathLike = "",
    upper_bound: bool = False,
    csim: str = "",
    akd: str = "",
) -> dict:
    """Runs the evaluation that the run's config describes; returns the metrics it wrote.

    Args:
      workdir: of a training run or of an import.
      step: which checkpoint; by default the newest.
      data_root, dataset: the test set, instead of the config's `data.root` and `eval.dataset`.
      dinov2: instead of the config's `frozen.dinov2_base`.
      out: the folder for metrics and report, instead of the run's.
      upper_bound: also fit a code to all views of each person, see `references.fitted_views`.
      csim, akd: ONNX files of an ArcFace and of a keypoint network, see `evaluation.faces`.

    Raises:
      UserError: no run, checkpoint, data set or network there, or a damaged one; or the
        data set's images are smaller than the model's.
    """
    config = read_config(workdir)
    cli.check_dinov2(dinov2, workdir, config)
    config.eval.dataset = dataset or config.eval.dataset
    size = config.model.image_size
    root = epath.Path(data_root or config.data.root)
    test_set = open_at_size(root / config.eval.dataset, size)
    out = epath.Path(out or workdir)
    report = out / "report"
    try:
        make_writable(report)
    except UserError as error:
        reason = error.__cause__.strerror
        raise UserError(
            f"{report} cannot be written ({reason}); move it away, or make it writable",
            status=TRY_AGAIN,
        ) from error
    faces = FaceScores(csim, akd)
    loaded = load_model(workdir, step, dinov2)
    people = read_people(test_set, config.eval.people, config.eval.images_per_person, size)
    shown_again = all(person.shows_input for person in people)
    views = "input" if shown_again else "unseen"
    absent = [s for s in training_sets(config) if not is_finished(s)]
    constants = None if absent else sector_means(config)
    trained_on = None if absent else TrainingPeople(config)
    animator = Animator(loaded, backend=config.rasterizer)

    clips = [read_clip(test_set, person, size) for person in people]
    shown, rows, codes, driven, alike = [], [], [], [], []
    progress = tqdm(people, desc="rendering test people", unit="person")
    for person, clip in zip(progress, clips, strict=True):
        source = portrait(person, config)
        code = animator.encode(source.image, source.mask, source.cam2head, source.K)
        codes.append(code)
        predictions, alpha = seen_on_white(animator, code, person.targets, size)
        driven.append(seen_on_white(animator, code, clip, size)[0] if clip else np.zeros(0))
        truths = np.stack([on_white(t) for t in person.targets])
        sectors = [sector(t.cam2head) for t in person.targets]
        compared = {views: predictions}
        if constants:
            compared["constant"] = np.stack([constants[s] for s in sectors]).astype(np.float32)
            compared["nearest"] = trained_on.views(person)
        if upper_bound:
            compared["bound"] = fitted_views(
                loaded.model, person, code, size, backend=config.rasterizer
            )
        scores = {
            f"{measure}_{name}": values
            for name, images in compared.items()
            for measure, values in score(images, truths).items()
        }
        cameras = [np.stack([getattr(t, x) for t in person.targets]) for x in ("cam2head", "K")]
        alike.append(faces(predictions, truths, *cameras))
        scores[f"iou_{views}"] = mask_iou(alpha, np.stack([t.mask for t in person.targets]))
        for i, name in enumerate(sectors):
            rows.append((name, {key: float(values[i]) for key, values in scores.items()}))
        shown.append(TestPerson(person.name, on_white(source), sectors, truths, predictions))

    first = people[0].input
    moved = [
        face_motion(animator, *one, size)
        for one in tqdm(zip(people, codes, strict=True), desc="moving faces", total=len(people))
    ]
    metrics = summarise(rows)
    if shown_again:
        metrics["self_reconstruction"] = SELF_RECONSTRUCTION
    else:
        metrics |= identity_by_sector(animator, people, codes, size)
    metrics |= mean_scores(alike) | expression_following(clips, driven)
    metrics |= {
        "jaw_change": round(float(np.mean([face.jaw_change for face in moved])), 4),
        "gaze_change": round(float(np.mean([face.gaze_change for face in moved])), 4),
        "steadiness": steadiness(animator, people, codes, size),
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
    orbits = [orbit_of(animator, codes[0], first, sink, size) for sink in (MULTI_VIEW, MONOCULAR)]
    export_page(
        report / AVATAR_PAGE,
        loaded,
        codes[0],
        {"as filmed": np.stack([first.expression, *(t.expression for t in people[0].targets)])},
        first.cam2head,
        first.K,
        name=people[0].name,
        pairs=False,
    )
    log = read_metrics(workdir)
    write_report(report, config, metrics, shown, orbits, on_white(first), moved, log)
    text = json.dumps(metrics, indent=2) + "\n"
    write(out / "metrics.json", text)
    write(report / "metrics.json", text)
    return metrics


def seen_on_white(
    animator: Animator, code: Float[np.ndarray, "N D"], frames: list[Frame], size: int
) -> tuple[Float[np.ndarray, "T H W 3"], Float[np.ndarray, "T H W"]]:
    """An avatar as each frame's camera and expression show it: RGB on white, and its alpha."""
    tracking = (np.stack([getattr(f, x) for f in frames]) for x in ("expression", "cam2head", "K"))
    images = animator.render(code, *tracking, size=size, background=None)
    color, alpha = images[..., :3], images[..., 3:]
    return alpha * color + (1 - alpha), alpha[..., 0]


def orbit_of(
    animator: Animator, code: Float[np.ndarray, "N D"], source: Frame, sink: int, size: int
) -> Orbit:
    """An avatar all the way round from `source`'s camera, with either bias sink."""
    views = orbit_cameras(source.cam2head, ORBIT_FRAMES)
    images = animator.render(
        code,
        np.repeat(source.expression[None], len(views), axis=0),
        views,
        np.repeat(source.K[None], len(views), axis=0),
        size=max(size, 256),
        source=sink,
    )
    return Orbit("multi-view sink" if sink == MULTI_VIEW else "monocular sink", images)


def main() -> None:
    if FLAGS.protocol:
        metrics = evaluate_vfhq(
            FLAGS.workdir,
            FLAGS.fit,
            step=FLAGS.step,
            data_root=FLAGS.data_root,
            dataset=FLAGS.dataset,
            dinov2=FLAGS.dinov2,
            lpips=FLAGS.lpips,
            csim=FLAGS.csim,
            akd=FLAGS.akd,
        )
        print_rows(metrics)
        return
    if FLAGS.shots:
        if FLAGS.csim or FLAGS.akd:
            raise UserError("--shots measures without --csim and --akd; leave them out")
        shots = [int(count) for count in FLAGS.shots]
        table = evaluate_few_shots(
            FLAGS.workdir,
            shots,
            FLAGS.fit,
            step=FLAGS.step,
            data_root=FLAGS.data_root,
            dataset=FLAGS.dataset,
            dinov2=FLAGS.dinov2,
        )
        print_table(table)
        return
    metrics = evaluate(
        FLAGS.workdir,
        FLAGS.step,
        FLAGS.data_root,
        FLAGS.dataset,
        FLAGS.dinov2,
        out=FLAGS.out,
        upper_bound=FLAGS.upper_bound,
        csim=FLAGS.csim,
        akd=FLAGS.akd,
    )
    views = "input" if "self_reconstruction" in metrics else "unseen"
    for name in ("all", *SECTORS):
        if f"psnr_{views}_{name}" in metrics:
            scores = []
            for measure, digits, unit in (("psnr", 2, " dB"), ("ssim", 3, "")):
                score = f"{measure.upper()} {metrics[f'{measure}_{views}_{name}']:.{digits}f}{unit}"
                if f"{measure}_constant_{name}" in metrics:
                    score += f" (constant {metrics[f'{measure}_constant_{name}']:.{digits}f})"
                scores.append(score)
            for key, title in ((f"iou_{views}", "mask IoU"), ("identity", "identity rank-1")):
                if f"{key}_{name}" in metrics:
                    scores.append(f"{title} {metrics[f'{key}_{name}']:.3f}")
            print(f"{name:>5}: {', '.join(scores)}")
    if "mouth_correlation" in metrics:
        said = ", ".join(f"{part} {metrics[f'{part}_correlation']:.2f}" for part in PATCHES)
        print(f"face: changes with the truth's, correlation: {said}")
    if said := faces_in_words(metrics):
        print(f"faces: {said}")
    for key in ("self_reconstruction", "no_constant"):
        if key in metrics:
            print(metrics[key])
    print(f"report: {epath.Path(FLAGS.out or FLAGS.workdir) / 'report' / 'index.html'}")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The run's folder.")
    flags.DEFINE_integer("step", None, "Checkpoint to evaluate (default: the newest).")
    flags.DEFINE_string("data_root", "", "Where the test set lies, if not in config.data.root.")
    flags.DEFINE_string("dataset", "", "Test set in it, instead of config.eval.dataset.")
    flags.DEFINE_string("out", "", "Folder for metrics.json and report/, if not the run's.")
    flags.DEFINE_string("dinov2", "", "DINOv2 weights, if not where training had them.")
    flags.DEFINE_bool("upper_bound", False, "Also fit the best code to each test person (minutes).")
    flags.DEFINE_list("shots", [], "Instead: quality by number of pictures, such as 1,4,16.")
    flags.DEFINE_integer("fit", 0, "With --shots or --protocol: steps of a fit.")
    flags.DEFINE_enum("protocol", "", ["", "vfhq"], "Instead: that of VFHQ-Test.")
    flags.DEFINE_string("lpips", "", "With --protocol: weights of LPIPS (VGG16).")
    flags.DEFINE_string("csim", "", "An ArcFace network (ONNX): similarity of identities.")
    flags.DEFINE_string("akd", "", "A keypoint network (ONNX): distance of facial keypoints.")
    flags.register_validator(
        "shots", lambda shots: all(s.isdecimal() for s in shots), "expected numbers, such as 1,4,16"
    )
    flags.mark_flag_as_required("workdir")
    cli.run(main)

"""The protocol of VFHQ-Test: self- and cross-reenactment of 50 clips, as the paper reports them.

Of each clip the first frame is the source of the avatar. Self: the avatar is rendered as the clip's
other frames stand, and compared. Cross: it is driven by the clip before it in alphabetical order,
of which there is no truth, so that pictures alone are written. Images are on black and cropped to
the centre. Assumed, as it is not published: the crop's size, `CENTRE_CROP`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from data_pipelines.errors import UserError
from data_pipelines.files import write, writing
from data_pipelines.frame import Frame
from data_pipelines.shards import PreparedSet, open_at_size
from flexavatar_jax import cli
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.create import create_avatar
from flexavatar_jax.avatars.fit import FitSettings
from flexavatar_jax.avatars.observations import Observations
from flexavatar_jax.evaluation import lpips as lpips_module
from flexavatar_jax.evaluation.faces import FaceScores, mean_scores
from flexavatar_jax.evaluation.metrics import score
from flexavatar_jax.frozen.networks import FrozenNetworks, load_perceptual_networks
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.workdir import read_config

PUBLISHED = {"psnr": 23.32, "ssim": 0.835, "lpips": 0.099, "csim": 0.828, "akd": 3.007}
"""FLEX-1 on VFHQ-Test, self-reenactment."""

CENTRE_CROP = 5 / 6
"""Of each side: the tracker's crop, without the tenth that portraits are widened by."""

BLACK = (0.0, 0.0, 0.0)
SHOWN = 8


class ClipScores(NamedTuple):
    """What came of one clip.

    Attributes:
      name: of the clip.
      scores: means over its frames, self-reenactment.
      faces: CSIM and AKD of each frame that shows a face, see `faces.FaceScores`.
      picture: rows of truth, self- and cross-reenactment, [h, w, 3] in [0, 1].
    """

    name: str
    scores: dict[str, float]
    faces: dict[str, list[float]]
    picture: Float[np.ndarray, "h w 3"]


def evaluate_vfhq(
    workdir: epath.PathLike,
    fit_steps: int = 0,
    *,
    step: int | None = None,
    data_root: str = "",
    dataset: str = "",
    dinov2: str = "",
    lpips: str = "",
    csim: str = "",
    akd: str = "",
) -> dict[str, float]:
    """Runs the protocol; writes WORKDIR/vfhq/metrics.json and a picture of each clip.

    Args:
      fit_steps: of a fit to the source; 0: the encoder alone.
      step, data_root, dinov2: as `evaluate`.
      dataset: by default "vfhq_test".
      lpips: weights of LPIPS with VGG16 (`evaluation.lpips`); it is left out without.
      csim, akd: networks of `evaluation.faces`; each is left out without.

    Raises:
      UserError: as `evaluate`; a clip of one frame.
    """
    config = read_config(workdir)
    cli.check_dinov2(dinov2, workdir, config)
    weights = lpips_module.load(lpips, "vgg") if lpips else None
    faces = FaceScores(csim, akd)
    size = config.model.image_size
    data = open_at_size(epath.Path(data_root or config.data.root) / (dataset or "vfhq_test"), size)
    animator = Animator(load_model(workdir, step, dinov2), backend=config.rasterizer)
    settings = FitSettings(steps=fit_steps, shift=0.0) if fit_steps else None  # as published
    frozen = load_perceptual_networks(config)
    folder = epath.Path(workdir) / "vfhq"
    rows, alike = [], []
    for clip in clips_of(animator, data, size, settings, frozen, weights, faces):
        with writing(folder / f"{clip.name.replace('/', '_')}.png") as unfinished:
            Image.fromarray(np.round(255 * clip.picture).astype(np.uint8)).save(unfinished, "PNG")
        rows.append(clip.scores)
        alike.append(clip.faces)
    metrics = {name: round(float(np.mean([r[name] for r in rows])), 4) for name in rows[0]}
    metrics |= mean_scores(alike)
    metrics |= {"clips": len(rows), "fit_steps": fit_steps}
    write(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def clips_of(
    animator: Animator,
    data: PreparedSet,
    size: int,
    settings: FitSettings | None,
    frozen: FrozenNetworks | None,
    weights: lpips_module.Weights | None,
    faces: FaceScores,
) -> Iterator[ClipScores]:
    """Each clip of the set, in alphabetical order, measured and shown."""
    index = data.index
    order = np.argsort(index.sequence.astype(str), kind="stable")
    for place, clip in enumerate(tqdm(order, desc="reenacting", unit="clip")):
        name = f"{index.person[clip]}_{index.sequence[clip]}"
        frames = _frames(data, clip, size)
        if len(frames) < 2:
            raise UserError(f"{data.folder}: clip {name} has one frame; the protocol needs two")
        source, targets = frames[0], frames[1:]
        avatar = create_avatar(animator, _observe(name, source), settings, frozen)
        truths = np.stack([_centre(_on_black(f)) for f in targets])
        found = _render(animator, avatar.code, targets, size)
        scores = {k: float(np.mean(v)) for k, v in score(found, truths).items()}
        if weights is not None:
            pairs = zip(found, truths, strict=True)
            distances = [lpips_module.lpips(weights, "vgg", a[None], b[None]) for a, b in pairs]
            scores["lpips"] = float(np.mean(distances))
        chosen = np.unique(np.linspace(0, len(targets) - 1, SHOWN).round().astype(int))
        driver = _frames(data, order[place - 1], size)[1:]  # of the first clip it is the last
        played = [driver[min(i, len(driver) - 1)] for i in chosen]
        driven = _render(animator, avatar.code, played, size)
        beside = [_centre(_on_black(f)) for f in (source, *played)]
        picture = [
            np.concatenate([beside[0], *truths[chosen]], axis=1),
            np.concatenate([np.zeros_like(beside[0]), *found[chosen]], axis=1),
            np.concatenate([np.zeros_like(beside[0]), *beside[1:]], axis=1),
            np.concatenate([np.zeros_like(beside[0]), *driven], axis=1),
        ]
        cam2heads = np.stack([f.cam2head for f in targets])
        Ks = np.stack([centre_K(f.K, size) for f in targets])
        alike = faces(found, truths, cam2heads, Ks, whole=size)
        yield ClipScores(name, scores, alike, np.concatenate(picture))


def _frames(data: PreparedSet, clip: int, size: int) -> list[Frame]:
    """A clip's frames in time."""
    records = np.arange(*data.index.clip_start[clip : clip + 2])
    records = records[np.argsort(data.index.timestep[records], kind="stable")]
    return [data.frame(int(i), size) for i in records]


def _observe(name: str, frame: Frame) -> Observations:
    one = (x[None] for x in (frame.expression, frame.cam2head, frame.K))
    return Observations(name, *one, np.zeros(1, np.int32), [frame.image], [frame.mask])


def _render(
    animator: Animator, code: np.ndarray, frames: list[Frame], size: int
) -> Float[np.ndarray, "T c c 3"]:
    """The avatar as `frames` stand, on black, the centre of each image."""
    tracking = [np.stack([getattr(f, x) for f in frames]) for x in ("expression", "cam2head", "K")]
    images = animator.frames(code, *tracking, size=size, background=BLACK)
    return np.stack([_centre(image) for image in images])


def _on_black(frame: Frame) -> Float[np.ndarray, "H W 3"]:
    return frame.image.astype(np.float32) * (frame.mask[..., None].astype(np.float32) / 255) / 255


def _centre(image: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "c c 3"]:
    start, side = _crop(len(image))
    return image[start : start + side, start : start + side]


def centre_K(K: Float[np.ndarray, "3 3"], size: int) -> Float[np.ndarray, "3 3"]:
    """Intrinsics of the centre of an image of `size` pixels, divided by the centre's size."""
    start, side = _crop(size)
    to_centre = np.array([[size, 0, -start], [0, size, -start], [0, 0, side]]) / side
    return to_centre @ K


def _crop(size: int) -> tuple[int, int]:
    """First pixel and side of the centre of an image."""
    side = round(CENTRE_CROP * size)
    return (size - side) // 2, side


def print_rows(metrics: dict[str, float]) -> None:
    """Our row and the published one."""
    names = list(PUBLISHED)
    print("| self-reenactment | " + " | ".join(name.upper() for name in names) + " |")
    print("| --- " * (1 + len(names)) + "|")
    how = f"{metrics['clips']} clips" + (
        f", fitted {metrics['fit_steps']} steps" * bool(metrics["fit_steps"])
    )
    cells = (f"{metrics[name]:.3f}" if name in metrics else "not measured" for name in names)
    print(f"| this model, {how} | " + " | ".join(cells) + " |")
    print("| FLEX-1, published | " + " | ".join(f"{PUBLISHED[name]:g}" for name in names) + " |")

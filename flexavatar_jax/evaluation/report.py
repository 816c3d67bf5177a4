"""The evaluation's page of pictures: report/index.html, self-contained in its folder."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict
from PIL import Image, ImageDraw

from data_pipelines.files import list_folder, write
from flexavatar_jax.avatars.film import write_film
from flexavatar_jax.evaluation.face_motion import FaceMotion
from flexavatar_jax.evaluation.faces import faces_in_words
from flexavatar_jax.evaluation.page import html_page

AVATAR_PAGE = "avatar.html"
"""The first person's avatar, to be turned by hand: it lies beside the report and is shown in it."""

SHOWN_TARGETS = 8
TILE = 128


class TestPerson(NamedTuple):
    """What was predicted for one test person; images are RGB in [0, 1]."""

    __test__ = False  # not a test case, whatever pytest makes of its name

    name: str
    input: Float[np.ndarray, "H W 3"]
    sectors: list[str]
    truths: Float[np.ndarray, "T H W 3"]
    predictions: Float[np.ndarray, "T H W 3"]


class Orbit(NamedTuple):
    """An avatar seen all the way round."""

    title: str
    images: Float[np.ndarray, "T H W 3"]


def write_report(
    folder: epath.Path,
    config: ConfigDict,
    metrics: dict[str, Any],
    people: list[TestPerson],
    orbits: list[Orbit],
    orbit_input: Float[np.ndarray, "H W 3"],
    moved: list[FaceMotion],
    log: list[dict[str, float]],
) -> None:
    """Writes index.html and its pictures into `folder`; pictures of an older report there go.

    Args:
      moved: each person's avatar, its jaw and eyes moved.
      log: what the run recorded as it was trained, see `metric_log.read_metrics`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = [_section_orbit(folder, orbits, orbit_input)]
    if (folder / AVATAR_PAGE).exists():
        sections.append(_section_avatar(folder, people[0]))
    sections.append(_section_metrics(metrics))
    sections.append(_section_people(folder, people))
    sections.append(_section_expressions(folder, people, moved))
    sections.append(_section_training(log, config))
    body = "\n".join(filter(None, sections))
    page = html_page("FlexAvatar: people never seen in training", body)
    write(folder / "index.html", page)
    for path in list_folder(folder):
        if _OWN_PICTURE.fullmatch(path.name) and f'"{path.name}"' not in page:
            path.unlink()


_OWN_PICTURE = re.compile(r"(person_\d+|orbit|orbit_\w+|expressions|jaws|avatar_truth)\.(png|gif)")


def _section_orbit(folder: epath.Path, orbits: list[Orbit], source: np.ndarray) -> str:
    size = orbits[0].images.shape[1]
    cells = [
        f"<figure>{_picture(folder, 'orbit_input.png', source, size, 'the only input')}"
        "<figcaption>the only input</figcaption></figure>"
    ]
    for number, orbit in enumerate(orbits):
        gif = Path(folder) / f"orbit_{number}.gif"
        write_film(gif, orbit.images, fps=16)
        cells.append(
            f'<figure><img src="{gif.name}" width="{size}" '
            f'alt="the avatar turning once round, {html.escape(orbit.title)}">'
            f"<figcaption>{html.escape(orbit.title)}</figcaption></figure>"
        )
    views = orbits[0].images[:: len(orbits[0].images) // 8][:8]
    pictures = [_fit(source, size), *views]
    _save(folder / "orbit.png", np.concatenate(pictures, axis=1))
    return (
        "<h2>One person, all the way round</h2>"
        "<p>The same avatar code decoded with each bias sink: the multi-view one gives the whole "
        f'head.</p><div class="row">{"".join(cells)}</div>'
        '<p><img src="orbit.png" alt="the input, and the avatar from eight sides"></p>'
    )


def _section_avatar(folder: epath.Path, person: TestPerson) -> str:
    picture = _picture(
        folder,
        "avatar_truth.png",
        _fit(person.input, 4 * TILE),
        4 * TILE,
        f"{person.name}, as the camera saw them from where the avatar opens",
    )
    return (
        "<h2>The same person, to turn yourself</h2>"
        "<p>Drag to turn, move the sliders, or play what was filmed. The page is one file, "
        f'<a href="{AVATAR_PAGE}">{AVATAR_PAGE}</a>, that can be sent to anybody.</p>'
        f'<div class="row"><figure class="wide"><iframe src="{AVATAR_PAGE}" '
        f'title="the avatar of {html.escape(person.name)}, with sliders"></iframe>'
        "<figcaption>the avatar</figcaption></figure>"
        f"<figure>{picture}<figcaption>the person, in the view it opens with</figcaption></figure>"
        "</div>"
    )


def _section_metrics(metrics: dict[str, Any]) -> str:
    views = "input" if "self_reconstruction" in metrics else "unseen"
    columns = {
        "PSNR, dB": (f"psnr_{views}", 2),
        "constant's": ("psnr_constant", 2),
        "nearest person's": ("psnr_nearest", 2),
        "best code's": ("psnr_bound", 2),
        "SSIM": (f"ssim_{views}", 3),
        "constant's SSIM": ("ssim_constant", 3),
        "mask IoU": (f"iou_{views}", 3),
        "identity rank-1": ("identity", 2),
    }
    columns = {title: c for title, c in columns.items() if f"{c[0]}_all" in metrics}
    rows = []
    for name in ("all", "front", "side", "back"):
        if f"psnr_{views}_{name}" not in metrics:
            continue
        cells = "".join(
            f"<td>{metrics[f'{key}_{name}']:.{digits}f}</td>"
            if f"{key}_{name}" in metrics
            else "<td></td>"
            for key, digits in columns.values()
        )
        rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    titles = "".join(f"<th>{title}</th>" for title in columns)
    constant = metrics.get(
        "no_constant",
        "the constant is the mean training image of the sector; the nearest person is the one in "
        "training whose portrait is nearest to the input",
    )
    following = " ".join(
        f"When the truth's {part} {verb}, the avatar's {verb} with {them} (correlation over the "
        f"frontal pictures {metrics[f'{part}_correlation']:.2f}, "
        f"{100 * metrics[f'{part}_strength']:.0f} % as strongly). "
        for part, verb, them in (("mouth", "changes", "it"), ("eyes", "change", "them"))
        if f"{part}_correlation" in metrics
    )
    identity = (
        "Identity rank-1: how often the avatar nearest to a picture, of all test people's rendered "
        f"alike, is the person's own; chance is {1 / metrics['people']:.2f}. "
        if "identity_all" in metrics
        else ""
    )
    said = faces_in_words(metrics)
    faces = f"Faces that look at the camera: {said}. " if said else ""
    seen = (
        f"<p><b>{html.escape(metrics['self_reconstruction'].capitalize())}.</b></p>"
        if "self_reconstruction" in metrics
        else ""
    )
    return (
        f"<h2>Measured</h2>{seen}<table><tr><th>sector</th>{titles}</tr>{''.join(rows)}</table>"
        f"<p>{metrics['images']} images of {metrics['people']} people of "
        f"{html.escape(metrics['dataset'])}; {metrics['steps']} steps in "
        f"{metrics['seconds']:.0f} s of training; {html.escape(constant)}. "
        f"{identity}{faces}{following}When only the head pose in "
        f"the code turns, an avatar stays the same to {metrics['steadiness']:.1f} dB.</p>"
    )


def _section_expressions(
    folder: epath.Path, people: list[TestPerson], moved: list[FaceMotion]
) -> str:
    """The input above; below it the avatar with its jaw closed and open, looking either way."""
    columns = [
        np.concatenate([_fit(image, TILE) for image in (person.input, *face.images)], axis=0)
        for person, face in zip(people[:SHOWN_TARGETS], moved, strict=False)
    ]
    shows = "inputs, and their avatars with the jaw closed, the jaw open, looking right and left"
    return (
        "<h2>The face and the code</h2><p>The input, and below it the avatar when the code closes "
        "the jaw, opens it, and turns the eyes to the person's right and left.</p>"
        + _picture(folder, "expressions.png", np.concatenate(columns, axis=1), None, shows)
    )


def _section_people(folder: epath.Path, people: list[TestPerson]) -> str:
    blocks = [
        f"<h3>{html.escape(person.name)}</h3>"
        + _picture(
            folder,
            f"person_{number:03d}.png",
            person_grid(person),
            None,
            f"{person.name}: the input, what cameras saw, and below it the predictions",
        )
        for number, person in enumerate(people)
    ]
    return (
        "<h2>Every test person</h2><p>Left: the input. Above: what the cameras saw. Below: the "
        f"prediction.</p>{''.join(blocks)}"
    )


def person_grid(person: TestPerson) -> Float[np.ndarray, "h w 3"]:
    """The input, and above one another what cameras saw, with their sector, and predictions."""
    count = SHOWN_TARGETS if len(person.truths) > 1 else 1
    chosen = np.linspace(0, len(person.truths) - 1, count).round().astype(int)
    blank = np.ones((TILE, TILE, 3))
    truths = (_labelled(_fit(person.truths[i], TILE), person.sectors[i]) for i in chosen)
    top = [_labelled(_fit(person.input, TILE), "input"), *truths]
    bottom = [blank, *(_fit(person.predictions[i], TILE) for i in chosen)]
    return np.concatenate([np.concatenate(top, 1), np.concatenate(bottom, 1)], 0)


def _section_training(log: list[dict[str, float]], config: ConfigDict) -> str:
    lines = [line for line in log if np.isfinite(line["loss"])]
    if len(lines) < 2:
        return ""
    steps = np.array([line["step"] for line in lines], float)
    loss = np.log(np.maximum([line["loss"] for line in lines], 1e-9))
    sources = ", ".join(f"{name} {weight:g}" for name, weight in config.data.mixture.items())
    return (
        f"<h2>Training</h2><p>Loss (log scale) from {np.exp(loss[0]):.3f} to "
        f"{np.exp(loss[-1]):.3f} over {int(steps[-1])} steps; mixture: {html.escape(sources)}.</p>"
        + _curve(steps, loss)
    )


def _curve(steps: np.ndarray, loss: np.ndarray) -> str:
    """The logarithm of the loss over the steps, with numbers at the axes."""
    width, height = 600, 150
    x = width * (steps - steps[0]) / max(np.ptp(steps), 1e-9)
    y = height * (loss.max() - loss) / max(np.ptp(loss), 1e-9)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    numbers = []
    for part in (0, 0.5, 1):
        value = np.exp(loss.max() - part * np.ptp(loss))
        numbers.append((-8, part * height + 4, "end", f"{value:.3g}"))
        step = steps[0] + part * np.ptp(steps)
        numbers.append((part * width, height + 20, "middle", f"{step:.0f}"))
    numbers.append((0.75 * width, height + 20, "middle", "step"))
    texts = "".join(
        f'<text x="{a:.0f}" y="{b:.0f}" text-anchor="{anchor}">{text}</text>'
        for a, b, anchor, text in numbers
    )
    return (
        f'<svg viewBox="-60 -10 {width + 90} {height + 40}" width="{width + 90}" font-size="12" '
        'role="img" aria-label="the loss over the steps" '
        f'fill="#666"><path d="M0 0V{height}H{width}" fill="none" stroke="#ccc"/>'
        f'<polyline fill="none" stroke="#36c" stroke-width="2" points="{points}"/>{texts}</svg>'
    )


def _fit(image: np.ndarray, size: int) -> np.ndarray:
    """A square image in [0, 1] at `size` pixels a side."""
    picture = Image.fromarray(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC)) / 255.0


def _labelled(image: np.ndarray, label: str) -> np.ndarray:
    """An image with a word in its upper left corner."""
    picture = Image.fromarray(np.round(255 * image).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.rectangle(draw.textbbox((4, 2), label), fill="white")
    draw.text((4, 2), label, fill="black")
    return np.asarray(picture) / 255.0


def _picture(
    folder: epath.Path, name: str, image: np.ndarray, width: int | None, shows: str
) -> str:
    _save(folder / name, image)
    size = f' width="{width}"' if width else ""
    return f'<img src="{name}"{size} alt="{html.escape(shows)}">'


def _save(path: epath.Path, image: np.ndarray) -> None:
    Image.fromarray(np.round(255 * np.clip(image, 0, 1)).astype(np.uint8)).save(os.fspath(path))

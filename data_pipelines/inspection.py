"""Shows what is in prepared data: `python -m data_pipelines.inspect DIR`.

DIR is a prepared data set or a folder of several. For each, counts are printed and two pictures
written into its folder (or `--out`):

    frames.png     a contact sheet with the head's axes (x red to the person's left, y green up, z
                   blue out of the face), the outlines of the head template and, where they are
                   to be seen, its eyes, nose and mouth in pink drawn over the images, so that a
                   wrong camera, or a head that faces the wrong way, is seen at once
    cameras.png    where the cameras stand, on a sphere round the head, seen from three sides

The template is an average head with a neutral face: it must sit where the head is and look where
it looks, not fit it to the pixel.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Iterable

import numpy as np
from etils import epath
from jaxtyping import Float, Int
from PIL import Image, ImageDraw
from tqdm import tqdm

from data_pipelines.errors import UserError, report_error
from data_pipelines.files import writing
from data_pipelines.frame import MONOCULAR, MULTI_VIEW, Frame
from data_pipelines.head_mesh import (
    EYE_HEIGHT,
    EYE_OFFSET,
    MOUTH_HEIGHT,
    MOUTH_WIDTH,
    Mesh,
    template_mesh,
)
from data_pipelines.index import find_sets
from data_pipelines.record import parse_fields
from data_pipelines.shards import PreparedSet

SHEET_FRAMES, SHEET_COLUMNS, TILE = 24, 6, 256
MOST_CAMERAS = 2000

AXES = {"x": (255, 70, 60), "y": (60, 220, 70), "z": (80, 140, 255)}
AXIS_LENGTH = 0.1  # metres
OUTLINE, FACE = (255, 230, 60), (255, 90, 220)
SOURCE_NAMES = {MONOCULAR: "monocular", MULTI_VIEW: "multi-view"}
SOURCE_COLOURS = {MONOCULAR: (230, 120, 20), MULTI_VIEW: (20, 100, 210)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_pipelines.inspect", description="Shows what is in prepared data."
    )
    parser.add_argument("folder", metavar="DIR", help="a prepared data set, or a folder of several")
    parser.add_argument("--out", help="folder for the pictures (default: the data set's own)")
    args = parser.parse_args(argv)
    try:
        for prepared in map(PreparedSet, find_sets(args.folder)):
            out = epath.Path(args.out) / prepared.name if args.out else prepared.folder
            cams = read_cameras(prepared)
            print(describe(prepared, cams))
            for name, picture in (
                ("frames.png", contact_sheet(prepared)),
                ("cameras.png", camera_sphere(cams)),
            ):
                with writing(out / name) as unfinished:
                    picture.save(unfinished, "PNG", compress_level=2)
                print(f"  {os.fspath(out / name)}")
    except (UserError, OSError) as error:
        return report_error(error)
    return 0


@dataclasses.dataclass(frozen=True)
class Cameras:
    """Cameras of frames spread over a data set.

    Attributes:
      cam2head: [N, 4, 4] in the canonical head frame, OpenCV axes, metres.
      K: [N, 3, 3] intrinsics divided by the image size.
      source: [N] `MONOCULAR` or `MULTI_VIEW`.
    """

    cam2head: Float[np.ndarray, "N 4 4"]
    K: Float[np.ndarray, "N 3 3"]
    source: Int[np.ndarray, "N"]


def read_cameras(prepared: PreparedSet, most: int = MOST_CAMERAS) -> Cameras:
    """Cameras of at most `most` evenly spread frames, without decoding their images."""
    fields = [parse_fields(prepared.record(i)) for i in _spread(len(prepared), most)]
    return Cameras(
        np.stack([f["cam2head"].reshape(4, 4) for f in fields]),
        np.stack([f["K"].reshape(3, 3) for f in fields]),
        np.array([int(f["source"][0]) for f in fields]),
    )


def describe(prepared: PreparedSet, cams: Cameras) -> str:
    """Counts of a data set and the ranges of its cameras, in a few lines."""
    index = prepared.index
    distance = np.linalg.norm(cams.cam2head[:, :3, 3], axis=-1)
    azimuth = np.degrees(np.arctan2(cams.cam2head[:, 0, 3], cams.cam2head[:, 2, 3]))
    origin, ahead = project(cams, np.zeros((1, 3)))
    lost = np.mean((np.abs(origin - 0.5) > 0.5).any(axis=(1, 2)) | ~ahead[:, 0])
    lines = [
        f"{os.fspath(prepared.folder)}: {len(set(index.person))} people, {len(index.person)} "
        f"clips, {len(prepared)} frames of {len(index.camera_names)} cameras",
        f"  source {', '.join(SOURCE_NAMES[s] for s in sorted(set(index.source)))}, "
        f"images of {int(index.image_size)} pixels a side or more, "
        f"{np.mean(index.jaw > math.radians(5)):.0%} of frames with an open jaw (over 5 degrees)",
        f"  cameras {distance.min():.2f} to {distance.max():.2f} m from the head, "
        f"azimuth {azimuth.min():.0f} to {azimuth.max():.0f} degrees, "
        f"focal length {cams.K[:, 0, 0].min():.2f} to {cams.K[:, 0, 0].max():.2f} image widths",
    ]
    if lost:
        lines.append(f"  WARNING: in {lost:.1%} of frames the head is not in the picture")
    return "\n".join(lines)


def contact_sheet(prepared: PreparedSet) -> Image.Image:
    """A picture of frames spread over the data set, with axes and template drawn over them."""
    chosen = _spread_over_clips(prepared, SHEET_FRAMES)
    rows = math.ceil(len(chosen) / SHEET_COLUMNS)
    columns = min(len(chosen), SHEET_COLUMNS)
    sheet = Image.new("RGB", (columns * TILE, rows * TILE), (255, 255, 255))
    mesh = template_mesh()
    for n, i in enumerate(tqdm(chosen, desc=prepared.name, unit="frame")):
        tile = draw_head(prepared.frame(i, TILE), mesh)
        sheet.paste(tile, (n % SHEET_COLUMNS * TILE, n // SHEET_COLUMNS * TILE))
    return sheet


def draw_head(frame: Frame, mesh: Mesh) -> Image.Image:
    """A frame's image with the head's axes, the template's outlines, and who and when it is.

    What the mask calls background is faded, so that the mask can be judged as well.
    """
    size, scale = frame.image.shape[0], 2  # drawn larger, for smooth lines
    matte = frame.mask[..., None] / 255 * 0.6 + 0.4
    faded = (frame.image * matte + 255 * (1 - matte)).astype(np.uint8)
    picture = Image.fromarray(faded).resize((size * scale, size * scale))
    draw = ImageDraw.Draw(picture)
    camera = Cameras(frame.cam2head[None], frame.K[None], np.array([frame.source]))

    points, ahead = (a[0] for a in project(camera, mesh.vertices))
    points = points * size * scale
    towards = _faces_towards(mesh, frame.cam2head)
    for i in _face_vertices(mesh)[np.isin(_face_vertices(mesh), mesh.faces[towards])]:
        if ahead[i]:
            x, y = points[i]
            draw.ellipse([x - 2 * scale, y - 2 * scale, x + 2 * scale, y + 2 * scale], FACE)
    for i in np.unique(mesh.faces[towards])[::3]:
        if ahead[i]:
            draw.point([*points[i]], OUTLINE)
    for i, j in _outline(mesh.faces[towards]):
        if ahead[i] and ahead[j]:
            draw.line([*points[i], *points[j]], OUTLINE, width=scale)
    tips, ahead = (a[0] for a in project(camera, np.vstack([np.zeros(3), AXIS_LENGTH * np.eye(3)])))
    tips = tips * size * scale
    if ahead.all():
        for (name, colour), tip in zip(AXES.items(), tips[1:], strict=True):
            draw.line([*tips[0], *tip], colour, width=3 * scale)
            draw.text(tip, name, colour, font_size=10 * scale)
    picture = picture.resize((size, size), Image.Resampling.BOX)
    names = dict.fromkeys([frame.person, frame.sequence])  # once, if they are the same
    label = f"{' '.join(names)}\n{frame.timestep} {frame.camera}"
    ImageDraw.Draw(picture).text(
        (4, 2), label, (255, 255, 255), font_size=11, stroke_width=2, stroke_fill=(0, 0, 0)
    )
    return picture


def project(
    cams: Cameras, points: Float[np.ndarray, "P 3"]
) -> tuple[Float[np.ndarray, "N P 2"], np.ndarray]:
    """Positions of points of the head frame in every image, 0 to 1, and whether they are ahead."""
    R, t = cams.cam2head[:, :3, :3].astype(np.float64), cams.cam2head[:, :3, 3]
    in_camera = np.einsum("nji,npj->npi", R, points - t[:, None])
    pixels = np.einsum("nij,npj->npi", cams.K, in_camera)
    ahead = in_camera[..., 2] > 1e-6
    return pixels[..., :2] / np.where(ahead, in_camera[..., 2], 1.0)[..., None], ahead


def camera_sphere(cams: Cameras, size: int = 480) -> Image.Image:
    """Directions of the cameras from the head on a sphere seen from the front, the left and above.

    Cameras on the near side are filled, those behind the sphere hollow.
    """
    views = {
        "from the front": (np.array([1.0, 0, 0]), np.array([0, 1.0, 0])),
        "from the person's left": (np.array([0, 0, -1.0]), np.array([0, 1.0, 0])),
        "from above, face down": (np.array([1.0, 0, 0]), np.array([0, 0, -1.0])),
    }
    positions = cams.cam2head[:, :3, 3].astype(np.float64)
    directions = positions / np.linalg.norm(positions, axis=1, keepdims=True)
    scale, radius = 2, 0.42
    picture = Image.new("RGB", (size * len(views) * scale, size * scale), (255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for n, (title, (right, up)) in enumerate(views.items()):
        near = np.cross(right, up)
        centre = np.array([n + 0.5, 0.52]) * size * scale

        def place(points: np.ndarray, right=right, up=up, centre=centre) -> np.ndarray:
            flat = np.stack([points @ right, -points @ up], axis=-1)
            return centre + flat * radius * size * scale

        for circle in _graticule():
            for side, colour in ((-1, (236, 236, 236)), (1, (200, 200, 200))):
                visible = np.sign(circle @ near + 1e-9) == side
                for a, b, seen in zip(
                    place(circle), place(np.roll(circle, -1, 0)), visible, strict=True
                ):
                    if seen:
                        draw.line([*a, *b], colour, width=scale)
        for point, direction, source in sorted(
            zip(place(directions), directions, cams.source, strict=True),
            key=lambda item: item[1] @ near,
        ):
            colour = SOURCE_COLOURS[int(source)]
            box = [*(point - 4 * scale), *(point + 4 * scale)]
            filled = direction @ near >= 0
            draw.ellipse(box, colour if filled else None, colour, width=scale)
        for (name, colour), tip in zip(AXES.items(), place(1.06 * np.eye(3)), strict=True):
            draw.line([*centre, *tip], colour, width=scale)
            draw.text(tip, name, colour, font_size=14 * scale, anchor="mm")
        top = centre - [0, 0.51 * size * scale]
        draw.text(top, title, (0, 0, 0), font_size=14 * scale, anchor="ma")
    for line, source in enumerate(sorted(set(cams.source.tolist()))):
        text = f"{SOURCE_NAMES[source]}: {np.sum(cams.source == source)} frames"
        draw.text(
            (8 * scale, (8 + 18 * line) * scale), text, SOURCE_COLOURS[source], font_size=13 * scale
        )
    return picture.resize((size * len(views), size), Image.Resampling.BOX)


def _face_vertices(mesh: Mesh) -> Int[np.ndarray, "V"]:
    """Vertices of the template's eyes, nose and mouth: a head without a face has no front."""
    x, y, z = mesh.vertices.T
    eyes = np.hypot(np.abs(x) - EYE_OFFSET, y - EYE_HEIGHT) < 0.009
    nose = (np.abs(x) < 0.004) & (np.abs(y + 0.003) < 0.017)
    mouth = (np.abs(x) < MOUTH_WIDTH) & (np.abs(y - MOUTH_HEIGHT) < 0.005)
    return np.flatnonzero((z > 0) & (eyes | nose | mouth))


def _faces_towards(mesh: Mesh, cam2head: Float[np.ndarray, "4 4"]) -> np.ndarray:
    """[F] whether a face looks at the camera."""
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    return np.einsum("fi,fi->f", np.cross(b - a, c - a), cam2head[:3, 3] - a) > 0


def _outline(faces: Int[np.ndarray, "F 3"]) -> Int[np.ndarray, "E 2"]:
    """Edges that belong to one face only."""
    edges = np.concatenate([faces[:, pair] for pair in ([0, 1], [1, 2], [2, 0])])
    size = faces.max(initial=0) + 1
    numbers, count = np.unique(edges.min(1) * size + edges.max(1), return_counts=True)
    return np.stack(np.divmod(numbers[count == 1], size), axis=-1)


def _graticule() -> Iterable[Float[np.ndarray, "60 3"]]:
    """Circles of latitude and longitude on the unit sphere, every 30 degrees, y up."""
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    for degrees in range(-60, 90, 30):
        e = np.radians(degrees)
        yield np.stack([np.cos(e) * np.cos(t), 0 * t + np.sin(e), np.cos(e) * np.sin(t)], axis=-1)
    for degrees in range(0, 180, 30):
        a = np.radians(degrees)
        yield np.stack([np.sin(t) * np.cos(a), np.cos(t), np.sin(t) * np.sin(a)], axis=-1)


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` numbers, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def _spread_over_clips(prepared: PreparedSet, most: int) -> list[int]:
    """At most `most` records from as many clips as there are, spread over each clip's frames."""
    start = prepared.index.clip_start
    clips = _spread(len(start) - 1, most)
    each = max(1, most // len(clips))
    return [int(start[c]) + i for c in clips for i in _spread(int(start[c + 1] - start[c]), each)]


if __name__ == "__main__":
    sys.exit(main())

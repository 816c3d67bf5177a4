"""CSIM, the similarity of identities, and AKD, the distance of keypoints, by others' networks.

CSIM is the cosine of ArcFace's embeddings of the true and of the rendered face, cut out by the same
five points (Deng et al., CVPR 2019): insightface's recognition networks, such as w600k_r50.onnx.

AKD is the mean distance of facial keypoints found in both, in pixels of an image of 512. The
authors' other evaluations take PIPNet's 98 points (Jin et al., IJCV 2021): export it with its five
outputs in their order (class, x, y, neighbours' x, neighbours' y), and put its meanface.txt beside
it, which says whose neighbour is who. insightface's 2d106det.onnx and 1k3d68.onnx are read, too:
other points, other numbers.

Both are of faces that look at the camera, less than 60 degrees off (`people.sector`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from data_pipelines.errors import MissingFileError, UserError
from flexavatar_jax.evaluation import face_crops
from flexavatar_jax.evaluation.onnx_network import OnnxNetwork
from flexavatar_jax.evaluation.people import sector

UNIT = 512
"""Pixels a side of the image whose pixels AKD counts: the published model's."""

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = 127.5 / 255

PIPNET_MARGIN, INSIGHTFACE_SIDE = 0.1, 1.5
"""PIPNet's crop is the box, wider by this on either side and lower by it; insightface's a square
round its middle, so many times as long as the box's longer side."""

FLAT_3D = 3000
"""Numbers from which insightface's networks give (x, y, z), the 68 keypoints last."""


class ArcFace:
    """An ArcFace network from an ONNX file: faces to embeddings."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises `UserError` as `OnnxNetwork`, and for a network that is no ArcFace."""
        self.network = OnnxNetwork(path, face_crops.ARCFACE_SIZE)
        shapes = self.network.probe()
        if (
            self.network.size != face_crops.ARCFACE_SIZE
            or len(shapes) != 1
            or len(shapes[0]) != 2
            or shapes[0][1] < 2
        ):
            raise UserError(
                f"--csim {path} takes pictures of {self.network.size} pixels to {_listed(shapes)}; "
                "expected an ArcFace network: 112 pixels to one embedding, [1, D]"
            )

    def embed(
        self,
        image: Float[np.ndarray, "H H 3"],
        cam2head: Float[np.ndarray, "4 4"],
        K: Float[np.ndarray, "3 3"],
    ) -> Float[np.ndarray, "D"]:
        """The embedding of the face in an image, RGB in [0, 1]; of any length."""
        points = face_crops.project(face_crops.FACE_POINTS, cam2head, K, len(image))
        matrix = face_crops.similarity(points, face_crops.ARCFACE_POINTS)
        face = face_crops.cut(image, matrix, face_crops.ARCFACE_SIZE)
        return self.network(face, HALF, HALF)[0][0]


class Keypoints:
    """A network of facial keypoints from an ONNX file: PIPNet's or insightface's."""

    def __init__(self, path: str | os.PathLike[str]):
        """Raises `UserError` as `OnnxNetwork`, and for a network that is neither's."""
        self.network = OnnxNetwork(path, 256)
        shapes = self.network.probe()
        self._voters = None
        if _pipnets(shapes):
            count, neighbours = shapes[0][1], shapes[3][1] // shapes[0][1]
            self._voters = voters(_mean_face(path, count), neighbours)
        elif not (len(shapes) == 1 and len(shapes[0]) == 2 and _insightfaces(shapes[0][1])):
            raise UserError(
                f"--akd {path} gives {_listed(shapes)}; expected PIPNet's five maps, or keypoints "
                "as insightface's networks give them, [1, 2 K]"
            )

    def find(
        self,
        image: Float[np.ndarray, "H H 3"],
        cam2head: Float[np.ndarray, "4 4"],
        K: Float[np.ndarray, "3 3"],
    ) -> Float[np.ndarray, "P 2"]:
        """The keypoints of the face in an image, RGB in [0, 1], in its pixels (x, y)."""
        box = face_crops.face_box(cam2head, K, len(image))
        size, wide, high = self.network.size, box[2] - box[0], box[3] - box[1]
        if self._voters is None:
            middle, half = (box[:2] + box[2:]) / 2, INSIGHTFACE_SIDE * max(wide, high) / 2
            box = np.concatenate([middle - half, middle + half])
        else:  # lower at the top, too: foreheads have no keypoints
            box = box + PIPNET_MARGIN * np.array([-wide, high, wide, high])
        matrix = face_crops.box_to_square(box, size)
        face = face_crops.cut(image, matrix, size)
        if self._voters is None:
            found = insightface_points(self.network(face, HALF, 128 / 255)[0][0])
        else:
            outputs = self.network(face, IMAGENET_MEAN, IMAGENET_DEVIATION)
            found = pipnet_points([x[0] for x in outputs], self._voters)
        return face_crops.apply(face_crops.invert(matrix), size * found)


class FaceScores:
    """CSIM and AKD, whichever has a network.

    Args:
      csim: an ArcFace network's ONNX file, or nothing.
      akd: a keypoint network's, or nothing.
    """

    def __init__(self, csim: str = "", akd: str = ""):
        self._arcface = ArcFace(csim) if csim else None
        self._keypoints = Keypoints(akd) if akd else None

    def __call__(
        self,
        found: Float[np.ndarray, "T H H 3"],
        truths: Float[np.ndarray, "T H H 3"],
        cam2heads: Float[np.ndarray, "T 4 4"],
        Ks: Float[np.ndarray, "T 3 3"],
        *,
        whole: int | None = None,
    ) -> dict[str, list[float]]:
        """`csim` and `akd` of those pictures, RGB in [0, 1], that show a face; of none, none.

        Args:
          whole: pixels a side of the images that these were cut out of, if they were; `Ks` are
            divided by the pieces' own size.
        """
        scores: dict[str, list[float]] = {}
        for a, b, cam2head, K in zip(found, truths, cam2heads, Ks, strict=True):
            if sector(cam2head) != "front":
                continue
            if self._arcface:
                similar = cosine(*(self._arcface.embed(x, cam2head, K) for x in (a, b)))
                scores.setdefault("csim", []).append(similar)
            if self._keypoints:
                p, q = (self._keypoints.find(x, cam2head, K) for x in (a, b))
                distance = np.linalg.norm(p - q, axis=-1).mean() * UNIT / (whole or len(a))
                scores.setdefault("akd", []).append(float(distance))
        return scores


def mean_scores(of_clips: list[dict[str, list[float]]]) -> dict[str, float]:
    """Means over all pictures of what `FaceScores` gave for each clip, and how many there were.

    Returns:
      `csim` and `akd`, those there are, and `faces`, the number of pictures; or nothing.
    """
    names = [n for n in ("csim", "akd") if any(n in scores for scores in of_clips)]
    values = {n: np.concatenate([scores[n] for scores in of_clips if n in scores]) for n in names}
    means = {n: round(float(np.mean(v)), 4) for n, v in values.items()}
    return means | ({"faces": len(values[names[0]])} if names else {})


def faces_in_words(metrics: Mapping[str, Any]) -> str:
    """CSIM and AKD of an evaluation's metrics, those there are, or nothing."""
    said = []
    if "csim" in metrics:
        said.append(f"identities are alike to {metrics['csim']:.3f} (CSIM)")
    if "akd" in metrics:
        said.append(f"keypoints are {metrics['akd']:.2f} pixels of 512 apart (AKD)")
    return f"{', '.join(said)}, in {metrics['faces']} pictures" if said else ""


def cosine(a: Float[np.ndarray, "D"], b: Float[np.ndarray, "D"]) -> float:
    """The cosine of the angle between two embeddings; 0 if one is nothing."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def insightface_points(numbers: Float[np.ndarray, "_"]) -> Float[np.ndarray, "P 2"]:
    """Keypoints in parts of the crop's side, of numbers that go from -1 to 1 over it."""
    if len(numbers) >= FLAT_3D:
        return (numbers.reshape(-1, 3)[-68:, :2].astype(np.float64) + 1) / 2
    return (numbers.reshape(-1, 2).astype(np.float64) + 1) / 2


def pipnet_points(
    maps: list[Float[np.ndarray, "_ h w"]], voters: tuple[np.ndarray, np.ndarray]
) -> Float[np.ndarray, "P 2"]:
    """Keypoints in parts of the crop's side, of PIPNet's five maps.

    A keypoint's cell is where its class is highest; from there go its own offset and its
    neighbours' offsets. A keypoint lies in the mean of what it and those whose neighbour it is say.
    """
    classes, *offsets = maps
    count, _, width = classes.shape
    cell = classes.reshape(count, -1).argmax(1)
    at = np.stack([cell % width, cell // width], axis=-1).astype(np.float64)
    own_x, own_y, other_x, other_y = (
        np.take_along_axis(m.reshape(count, -1, m.shape[1] * m.shape[2]), cell[:, None, None], 2)
        for m in offsets
    )
    own = at + np.concatenate([own_x, own_y], axis=-1)[:, 0]
    others = at[:, None] + np.concatenate([other_x, other_y], axis=-1)
    votes = np.concatenate([own[:, None], others[voters]], axis=1)
    return votes.mean(axis=1) / width


def voters(mean_face: Float[np.ndarray, "P 2"], neighbours: int) -> tuple[np.ndarray, np.ndarray]:
    """Whose neighbour each keypoint is, and the how manieth, [P, V] each.

    As published, all are voted for equally often: the shorter lists go round again.
    """
    distances = np.square(mean_face[:, None] - mean_face).sum(-1)
    nearest = np.argsort(distances, axis=1)[:, 1 : 1 + neighbours]
    votes = [np.argwhere(nearest == point) for point in range(len(mean_face))]
    if not all(map(len, votes)):
        raise UserError("meanface.txt has a keypoint that is nobody's neighbour; copy it again")
    most = max(map(len, votes))
    votes = np.stack([np.resize(v, (most, 2)) for v in votes])
    return votes[..., 0], votes[..., 1]


def _mean_face(path: str | os.PathLike[str], count: int) -> Float[np.ndarray, "P 2"]:
    """The mean face beside a PIPNet: x and y of `count` keypoints, one after another."""
    file = epath.Path(path).parent / "meanface.txt"
    if not file.exists():
        raise MissingFileError(
            f"--akd {path} is a PIPNet, but there is no {file}; copy it from PIPNet's data folder"
        )
    try:
        numbers = np.array(file.read_text().split(), np.float64)
    except ValueError:
        numbers = np.empty(0)
    if numbers.size != 2 * count or not np.isfinite(numbers).all():
        raise UserError(
            f"{file} must hold x and y of the {count} keypoints of {path}; copy the file of the "
            "data set that it was trained on"
        )
    return numbers.reshape(count, 2)


def _pipnets(shapes: list[tuple[int, ...]]) -> bool:
    """Whether these are a PIPNet's outputs: [1, P, h, h] thrice, [1, P n, h, h] twice."""
    if len(shapes) != 5 or any(len(s) != 4 or s[2:] != shapes[0][2:] for s in shapes):
        return False
    counts = [s[1] for s in shapes]
    if counts[0] < 1:
        return False
    neighbours, rest = divmod(counts[3], counts[0])
    same = counts[:3] == counts[:1] * 3 and counts[3] == counts[4]
    return same and rest == 0 and 1 <= neighbours < counts[0] and shapes[0][2] == shapes[0][3]


def _insightfaces(numbers: int) -> bool:
    return numbers >= 10 and numbers % (3 if numbers >= FLAT_3D else 2) == 0


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join(str(list(s)) for s in shapes[:8])

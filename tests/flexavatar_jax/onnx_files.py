"""ONNX networks of faces with weights by a rule, and what they give, computed plainly."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flexavatar_jax.published.parity_rule import rule_tensor

KEYPOINTS, NEIGHBOURS = 6, 3
MEAN_FACE = np.array([(0.2, 0.3), (0.81, 0.32), (0.5, 0.52), (0.35, 0.8), (0.7, 0.75), (0.55, 0.9)])


def weight(name, shape):
    return rule_tensor(name, shape, "faces")


def save(path, nodes, inputs, outputs, weights, *, kind=TensorProto.FLOAT):
    """Writes a network; inputs and outputs are names with shapes, the latter of a kind."""
    graph = helper.make_graph(
        nodes,
        "faces",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, kind, s) for n, s in outputs.items()],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)
    return path


def embedding_file(path, *, size=112, numbers=16, batch=1):
    """Patches of 16 pixels, ReLU, and a linear layer: what ArcFace looks like from outside."""
    cells = (size // 16) ** 2
    weights = {
        "patches": weight("patches", (4, 3, 16, 16)),
        "linear": weight("linear", (numbers, 4 * cells)).T.copy(),
    }
    nodes = [
        helper.make_node("Conv", ["data", "patches"], ["a"], strides=[16, 16]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "linear"], ["embedding"]),
    ]
    shapes = {"data": [batch, 3, size, size]}, {"embedding": [batch, numbers]}
    return save(path, nodes, *shapes, weights)


def embed(picture, *, numbers=16):
    """What `embedding_file`'s network gives for a normalised picture [S, S, 3]."""
    n = len(picture) // 16
    patches = picture.reshape(n, 16, n, 16, 3)
    maps = np.einsum("yaxbc,ocab->oyx", patches, weight("patches", (4, 3, 16, 16)))
    return weight("linear", (numbers, 4 * n * n)) @ np.maximum(maps, 0).ravel()


def insightface_file(path, *, points=5):
    """Takes bytes, and normalises them itself, as insightface's keypoint networks do."""
    weights = {
        "mean": np.float32(127.5),
        "scale": np.float32(1 / 128),
        "patches": weight("patches", (1, 3, 64, 64)),
        "linear": weight("linear", (2 * points, 9)).T.copy(),
    }
    nodes = [
        helper.make_node("Sub", ["data", "mean"], ["a"]),
        helper.make_node("Mul", ["a", "scale"], ["b"]),
        helper.make_node("Conv", ["b", "patches"], ["c"], strides=[64, 64]),
        helper.make_node("Flatten", ["c"], ["d"]),
        helper.make_node("MatMul", ["d", "linear"], ["fc1"]),
    ]
    shapes = {"data": ["N", 3, 192, 192]}, {"fc1": ["N", 2 * points]}
    return save(path, nodes, *shapes, weights)


def insightface(picture, *, points=5):
    """What `insightface_file`'s network gives for a picture [192, 192, 3] in [0, 1]."""
    patches = ((255 * picture - 127.5) / 128).reshape(3, 64, 3, 64, 3)
    maps = np.einsum("yaxbc,cab->yx", patches, weight("patches", (1, 3, 64, 64))[0])
    return weight("linear", (2 * points, 9)) @ maps.ravel()


PIPNET_MAPS = {
    "cls": KEYPOINTS,
    "x": KEYPOINTS,
    "y": KEYPOINTS,
    "nb_x": KEYPOINTS * NEIGHBOURS,
    "nb_y": KEYPOINTS * NEIGHBOURS,
}


def pipnet_file(path, *, mean_face=MEAN_FACE):
    """Five maps of 8x8 cells, and the mean face beside them."""
    weights = {n: weight(n, (count, 3, 32, 32)) for n, count in PIPNET_MAPS.items()}
    nodes = [helper.make_node("Conv", ["data", n], [f"out_{n}"], strides=[32, 32]) for n in weights]
    outputs = {f"out_{n}": [1, count, 8, 8] for n, count in PIPNET_MAPS.items()}
    save(path, nodes, {"data": [1, 3, 256, 256]}, outputs, weights)
    text = " ".join(str(number) for number in mean_face.ravel())
    path.with_name("meanface.txt").write_text(text)
    return path


def pipnet(picture):
    """What PIPNet's decoding makes of `pipnet_file`'s maps, in parts of the crop, vote by vote."""
    patches = picture.reshape(8, 32, 8, 32, 3)
    maps = {
        n: np.einsum("yaxbc,ocab->oyx", patches, weight(n, (count, 3, 32, 32)))
        for n, count in PIPNET_MAPS.items()
    }
    votes = [[] for _ in range(KEYPOINTS)]
    own = []
    for i in range(KEYPOINTS):
        row, column = np.unravel_index(maps["cls"][i].argmax(), (8, 8))
        x, y, other_x, other_y = (maps[n][:, row, column] for n in ("x", "y", "nb_x", "nb_y"))
        own.append((column + x[i], row + y[i]))
        distances = np.linalg.norm(MEAN_FACE - MEAN_FACE[i], axis=1)
        for j, neighbour in enumerate(np.argsort(distances)[1 : 1 + NEIGHBOURS]):
            k = i * NEIGHBOURS + j
            votes[neighbour].append((column + other_x[k], row + other_y[k]))
    most = max(map(len, votes))
    said = [[p, *(v * most)[:most]] for p, v in zip(own, votes, strict=True)]
    return np.array([np.mean(all_of_them, axis=0) for all_of_them in said]) / 8

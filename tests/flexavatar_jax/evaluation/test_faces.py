"""CSIM and AKD, held to plain transcriptions of what the networks' publishers do."""

import sys

import numpy as np
import onnx
import onnx_files
import pytest
from onnx import TensorProto, helper

from data_pipelines.errors import UserError
from flexavatar_jax.evaluation import face_crops, faces
from flexavatar_jax.evaluation.faces import ArcFace, FaceScores, Keypoints
from flexavatar_jax.evaluation.onnx_network import OnnxNetwork

RNG = np.random.default_rng(0)
SIZE = 96
IMAGE, OTHER = RNG.random((2, SIZE, SIZE, 3)).astype(np.float32)
CAM2HEAD = np.diag([1.0, -1.0, -1.0, 1.0])
CAM2HEAD[:3, 3] = (0.2, 0.05, 1.0)
CAM2HEAD[:3, 2] = -CAM2HEAD[:3, 3] / np.linalg.norm(CAM2HEAD[:3, 3])
CAM2HEAD[:3, 0] = np.cross([0, -1, 0], CAM2HEAD[:3, 2])
CAM2HEAD[:3, 0] /= np.linalg.norm(CAM2HEAD[:3, 0])
CAM2HEAD[:3, 1] = np.cross(CAM2HEAD[:3, 2], CAM2HEAD[:3, 0])
BEHIND = CAM2HEAD * np.array([-1, 1, -1, 1])[:, None]
K = np.array([[2.9, 0, 0.52], [0, 2.9, 0.47], [0, 0, 1]])


def aligned(image):
    """The face as ArcFace's training had it: normalised, its five points where they belong."""
    seen = face_crops.project(face_crops.FACE_POINTS, CAM2HEAD, K, SIZE)
    matrix = face_crops.similarity(seen, face_crops.ARCFACE_POINTS)
    return (255 * face_crops.cut(image, matrix, 112).astype(np.float64) - 127.5) / 127.5


def box_of(image, left, top, right, bottom, size):
    matrix = face_crops.box_to_square(np.array([left, top, right, bottom]), size)
    return face_crops.cut(image, matrix, size).astype(np.float64)


@pytest.mark.parametrize("batch", [1, "N", None])
def test_csim_is_the_cosine_of_embeddings_of_the_aligned_faces(tmp_path, batch):
    file = onnx_files.embedding_file(tmp_path / "r50.onnx", batch=batch)
    scores = FaceScores(str(file))(
        np.stack([IMAGE, IMAGE]),
        np.stack([OTHER, IMAGE]),
        np.stack([CAM2HEAD] * 2),
        np.stack([K] * 2),
    )
    a, b = (onnx_files.embed(aligned(x)) for x in (IMAGE, OTHER))
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert abs(expected) < 0.99
    assert scores["csim"] == pytest.approx([expected, 1], abs=1e-5)


def test_keypoints_of_insightfaces_networks_are_found_in_the_picture(tmp_path):
    """They take bytes, and go from -1 to 1 over one and a half times the face's box."""
    found = Keypoints(onnx_files.insightface_file(tmp_path / "2d106det.onnx")).find(
        IMAGE, CAM2HEAD, K
    )
    left, top, right, bottom = face_crops.face_box(CAM2HEAD, K, SIZE)
    side = 1.5 * max(right - left, bottom - top)
    x, y = (left + right - side) / 2, (top + bottom - side) / 2
    numbers = onnx_files.insightface(box_of(IMAGE, x, y, x + side, y + side, 192))
    expected = [x, y] + side * (numbers.reshape(-1, 2) + 1) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_keypoints_in_three_dimensions_are_the_last_68():
    numbers = RNG.uniform(-1, 1, 3309).astype(np.float32)
    expected = (numbers.reshape(1103, 3)[1035:, :2] + 1) / 2
    np.testing.assert_allclose(faces.insightface_points(numbers), expected, rtol=1e-6)


def test_keypoints_of_pipnet_are_voted_for_by_their_neighbours(tmp_path):
    found = Keypoints(onnx_files.pipnet_file(tmp_path / "pipnet.onnx")).find(IMAGE, CAM2HEAD, K)
    left, top, right, bottom = face_crops.face_box(CAM2HEAD, K, SIZE)
    wide, high = right - left, bottom - top
    box = left - 0.1 * wide, top + 0.1 * high, right + 0.1 * wide, bottom + 0.1 * high
    face = box_of(IMAGE, *box, 256)
    normalised = (face - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    expected = box[:2] + onnx_files.pipnet(normalised) * [1.2 * wide, high]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_akd_counts_in_pixels_of_512_whatever_the_image_was_cut_to(tmp_path):
    file = onnx_files.pipnet_file(tmp_path / "pipnet.onnx")
    network = Keypoints(file)
    p, q = (network.find(x, CAM2HEAD, K) for x in (IMAGE, OTHER))
    expected = np.mean([np.hypot(*(a - b)) for a, b in zip(p, q, strict=True)])
    assert expected > 1
    pictures = IMAGE[None], OTHER[None], CAM2HEAD[None], K[None]
    scores = FaceScores(akd=str(file))
    assert scores(*pictures)["akd"] == pytest.approx([expected * 512 / SIZE])
    assert scores(*pictures, whole=128)["akd"] == pytest.approx([expected * 512 / 128])


def test_what_does_not_look_at_the_camera_is_left_out(tmp_path):
    scores = FaceScores(str(onnx_files.embedding_file(tmp_path / "r50.onnx")))
    behind = scores(IMAGE[None], OTHER[None], BEHIND[None], K[None])
    assert behind == {}
    before = scores(IMAGE[None], IMAGE[None], CAM2HEAD[None], K[None])
    assert faces.mean_scores([behind, before, before]) == {"csim": 1.0, "faces": 2}
    assert faces.mean_scores([behind, {}]) == {}
    assert faces.faces_in_words({}) == ""
    assert FaceScores()(IMAGE[None], IMAGE[None], CAM2HEAD[None], K[None]) == {}


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx cannot be read \(No such file"):
        ArcFace(tmp_path / "none.onnx")
    with pytest.raises(UserError, match="cannot be read"):
        ArcFace(tmp_path)
    path = tmp_path / "weights.onnx"
    for content in (b"weights", b"", np.random.default_rng(0).bytes(999)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"weights\.onnx (is no ONNX file|cannot be run)"):
            ArcFace(path)
    whole = onnx_files.embedding_file(tmp_path / "r50.onnx").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"weights\.onnx (is no ONNX file|cannot be run)"):
        ArcFace(path)


def test_a_network_of_another_kind_is_named(tmp_path):
    file = onnx_files.embedding_file(tmp_path / "big.onnx", size=128)
    with pytest.raises(UserError, match=r"--csim .*128 pixels to \[1, 16\]; expected an ArcFace"):
        ArcFace(file)
    with pytest.raises(UserError, match=r"--csim .*192 pixels"):
        ArcFace(onnx_files.insightface_file(tmp_path / "2d106det.onnx"))
    file = onnx_files.embedding_file(tmp_path / "odd.onnx", numbers=7)
    with pytest.raises(UserError, match=r"--akd .* gives \[1, 7\]; expected PIPNet's five maps"):
        Keypoints(file)
    relu = [helper.make_node("Relu", ["data"], ["out"])]
    file = onnx_files.save(tmp_path / "flat.onnx", relu, {"data": [1, 9]}, {"out": [1, 9]}, {})
    with pytest.raises(UserError, match=r"takes data \[1, 9\] tensor\(float\); expected one input"):
        ArcFace(file)
    none = {"none": np.zeros((0, 3, 32, 32), np.float32)}
    maps = [f"out_{i}" for i in range(5)]
    empty = [helper.make_node("Conv", ["data", "none"], [n], strides=[32, 32]) for n in maps]
    shapes = {"data": [1, 3, 256, 256]}, dict.fromkeys(maps)
    file = onnx_files.save(tmp_path / "empty.onnx", empty, *shapes, none)
    with pytest.raises(UserError, match=r"--akd .*empty\.onnx gives \[1, 0, 8, 8\], .*; expected"):
        Keypoints(file)


def test_a_network_of_huge_pictures_is_refused_before_it_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(OnnxNetwork, "__call__", None)
    relu = [helper.make_node("Relu", ["data"], ["out"])]
    shapes = {"data": [1, 3, 1 << 20, 1 << 20]}, {"out": None}
    file = onnx_files.save(tmp_path / "huge.onnx", relu, *shapes, {})
    with pytest.raises(UserError, match=r"huge\.onnx takes pictures of 1048576 pixels a side; exp"):
        Keypoints(file)


def test_pipnets_mean_face_must_be_its_own(tmp_path):
    file = onnx_files.pipnet_file(tmp_path / "pipnet.onnx")
    mean_face = tmp_path / "meanface.txt"
    for content in (b"0.1 0.2", b"zero", bytes([255, 254, 0]), b"nan " * 12):
        mean_face.write_bytes(content)
        with pytest.raises(UserError, match=r"meanface\.txt must hold x and y of the 6 keypoints"):
            Keypoints(file)
    mean_face.unlink()
    with pytest.raises(UserError, match=r"is a PIPNet, but there is no .*meanface\.txt"):
        Keypoints(file)


def test_weights_in_other_files_are_not_read(tmp_path):
    """Nowhere: neither in the folder nor, as a stranger's file might ask for, above it."""
    file = onnx_files.embedding_file(tmp_path / "r50.onnx")
    model = onnx.load(file)
    for place in ("weights.bin", "../../../etc/passwd", "/etc/passwd"):
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        del tensor.external_data[:]
        tensor.external_data.add(key="location", value=place)
        file.write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match="has weights in other files, which are not read"):
            ArcFace(file)


def test_operators_of_strangers_are_not_run(tmp_path):
    node = helper.make_node("Relu", ["data"], ["out"], domain="com.stranger")
    shapes = {"data": [1, 3, 112, 112]}, {"out": [1, 16]}
    file = onnx_files.save(tmp_path / "strange.onnx", [node], *shapes, {})
    with pytest.raises(UserError, match=r"strange\.onnx cannot be run by onnxruntime"):
        ArcFace(file)


def test_a_network_that_fails_or_gives_no_numbers_is_named(tmp_path):
    shapes = {"data": [1, 3, 112, 112]}, {"out": None}
    log = [helper.make_node("Log", ["data"], ["a"]), helper.make_node("Flatten", ["a"], ["out"])]
    file = onnx_files.save(tmp_path / "log.onnx", log, *shapes, {})
    with pytest.raises(UserError, match=r"log\.onnx gives what is not finite numbers"):
        ArcFace(file)
    words = [helper.make_node("Cast", ["data"], ["out"], to=TensorProto.STRING)]
    file = onnx_files.save(tmp_path / "words.onnx", words, *shapes, {}, kind=TensorProto.STRING)
    with pytest.raises(UserError, match=r"words\.onnx gives what is not finite numbers"):
        ArcFace(file)
    bomb = [helper.make_node("ConstantOfShape", ["shape"], ["big"])]
    bomb += [helper.make_node("Add", ["data", "big"], ["out"])]
    shape = {"shape": np.array([1 << 20, 1 << 20, 1 << 10])}
    file = onnx_files.save(tmp_path / "bomb.onnx", bomb, *shapes, shape)
    with pytest.raises(UserError, match=r"bomb\.onnx (fails on a picture|cannot be run)"):
        ArcFace(file)


def test_a_library_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"need onnxruntime; `pip install '\.\[faces\]'`"):
        FaceScores(str(onnx_files.embedding_file(tmp_path / "r50.onnx")))

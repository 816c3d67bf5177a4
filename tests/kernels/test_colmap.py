"""COLMAP's models, binary and text, whole and damaged."""

import struct

import numpy as np
import pytest

from kernels.examples import colmap


@pytest.fixture
def text(tmp_path):
    """Two pictures, one of which shows no points, and two points."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "cameras.txt").write_text(
        "# CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n"
        "1 PINHOLE 64 48 50 51 32 24\n7 SIMPLE_PINHOLE 32 32 40 16 16\n"
    )
    (folder / "images.txt").write_text(
        "# two lines an image\n"
        "1 2 0 0 0 0.5 0 2 1 b c.png\n1.5 2.5 1 3 4 -1\n"
        "2 0.7071067811865476 0 0.7071067811865476 0 0 0 3 7 a.png\n\n"
    )
    (folder / "points3D.txt").write_text("1 0 1 2 255 0 51 0.5 1 0\n2 1 0 0 0 255 0 0.5\n")
    return folder


@pytest.fixture
def binary(tmp_path):
    """The same."""
    folder = tmp_path / "binary"
    folder.mkdir()
    (folder / "cameras.bin").write_bytes(
        struct.pack("<QIiQQ4d", 2, 1, 1, 64, 48, 50, 51, 32, 24)
        + struct.pack("<IiQQ3d", 7, 0, 32, 32, 40, 16, 16)
    )
    root = 0.5**0.5
    (folder / "images.bin").write_bytes(
        struct.pack("<QI7dI", 2, 1, 2, 0, 0, 0, 0.5, 0, 2, 1)
        + b"b c.png\0"
        + struct.pack("<QddqddQ", 2, 1.5, 2.5, 1, 3, 4, 2**64 - 1)
        + struct.pack("<I7dI", 2, root, 0, root, 0, 0, 0, 3, 7)
        + b"a.png\0"
        + struct.pack("<Q", 0)
    )
    (folder / "points3D.bin").write_bytes(
        struct.pack("<QQ3d3BdQII", 2, 1, 0, 1, 2, 255, 0, 51, 0.5, 1, 1, 0)
        + struct.pack("<Q3d3BdQ", 2, 1, 0, 0, 0, 255, 0, 0.5, 0)
    )
    return folder


def test_binary_and_text_are_the_same_model(text, binary):
    models = [colmap.read_model(folder) for folder in (text, binary)]
    for model in models:
        assert model.names == ["a.png", "b c.png"]
        assert model.sizes == [(32, 32), (64, 48)]
        np.testing.assert_array_equal(model.Ks[1], [[50, 0, 32], [0, 51, 24], [0, 0, 1]])
        np.testing.assert_array_equal(model.Ks[0], [[40, 0, 16], [0, 40, 16], [0, 0, 1]])
        np.testing.assert_array_equal(model.viewmats[1, :3, 3], [0.5, 0, 2])
        np.testing.assert_array_equal(model.viewmats[1, :3, :3], np.eye(3))
        turned = [[0, 0, 1], [0, 1, 0], [-1, 0, 0]]
        np.testing.assert_allclose(model.viewmats[0, :3, :3], turned, atol=1e-12)
        np.testing.assert_array_equal(model.points, [[0, 1, 2], [1, 0, 0]])
        np.testing.assert_array_equal(model.colors, [[1, 0, 0.2], [0, 1, 0]])


def test_a_model_is_found_where_colmap_puts_it(tmp_path, text):
    with pytest.raises(FileNotFoundError, match="expected a COLMAP model"):
        colmap.find_model(tmp_path)
    assert colmap.find_model(text) == text
    (tmp_path / "sparse").mkdir()
    text.rename(tmp_path / "sparse" / "0")
    assert colmap.find_model(tmp_path) == tmp_path / "sparse" / "0"


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "points3D.bin"])
def test_whatever_is_cut_or_overwritten_is_a_sentence_that_names_the_file(binary, name):
    path = binary / name
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=name):
            colmap.read_model(binary)
    path.write_bytes(struct.pack("<Q", 2**63) + whole[8:])
    with pytest.raises(ValueError, match=f"{name}: 9223372036854775808 records do not fit"):
        colmap.read_model(binary)
    rng = np.random.default_rng(0)
    for _ in range(300):
        spoiled = np.frombuffer(whole, np.uint8).copy()
        spoiled[rng.integers(len(whole), size=4)] = rng.integers(256, size=4)
        path.write_bytes(spoiled.tobytes())
        try:
            model = colmap.read_model(binary)
        except ValueError as error:
            assert str(binary) in str(error)  # noqa: PT017
        else:
            assert all(np.isfinite(a).all() for a in (model.viewmats, model.Ks, model.points))


@pytest.mark.parametrize(
    ("first", "second", "kind", "radial", "tangential"),
    [
        ("PINHOLE 5 5 3 4", "SIMPLE_RADIAL 5 3 4 0", "pinhole", [[], []], [[], []]),
        (
            "SIMPLE_RADIAL 5 3 4 .1", "RADIAL 5 3 4 .2 .3", "pinhole",
            [[0.1, 0], [0.2, 0.3]], [[], []],
        ),
        (
            "OPENCV 5 5 3 4 .1 .2 0 .4", "FULL_OPENCV 5 5 3 4 1 2 .1 .2 3 4 5 6", "pinhole",
            [[0.1, 0.2, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]], [[0, 0.4], [0.1, 0.2]],
        ),
        (
            "OPENCV_FISHEYE 5 5 3 4 .1 .2 .3 .4", "SIMPLE_RADIAL_FISHEYE 5 3 4 .5", "fisheye",
            [[0.1, 0.2, 0.3, 0.4], [0.5, 0, 0, 0]], [[], []],
        ),
    ],
)  # fmt: skip
def test_lenses_are_the_rasterizers(text, first, second, kind, radial, tangential):
    cameras = [line.split(maxsplit=1) for line in (first, second)]
    (text / "cameras.txt").write_text(
        "".join(f"{i} {n} 64 48 {p}\n" for i, (n, p) in zip((7, 1), cameras, strict=True))
    )
    model = colmap.read_model(text)
    assert model.camera_model == kind
    assert model.radial_coeffs.tolist() == radial
    assert model.tangential_coeffs.tolist() == tangential
    for K in model.Ks:
        np.testing.assert_array_equal(K, [[5, 0, 3], [0, 5, 4], [0, 0, 1]])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cameras", "1 FOV 64 48 5 5 3 3 1\n", "is FOV; expected another model: undistort"),
        ("cameras", "1 NEW 64 48 5 5 3 3\n", "expected a model and its parameters"),
        (
            "cameras",
            "1 OPENCV 64 48 5 5 3 3 0 0 0 0\n7 RADIAL_FISHEYE 64 48 5 3 3 0 0\n",
            "some cameras are fisheyes and others not; expected one kind",
        ),
        ("cameras", "1 PINHOLE 64 48 5 5 3\n", "expected a model and its parameters"),
        ("cameras", "1 PINHOLE 64 48 a 5 3 3\n", "expected numbers"),
        ("cameras", "1 PINHOLE 64 48 nan 5 3 3\n", "focal lengths over 0"),
        ("cameras", "1 PINHOLE 64 0 5 5 3 3\n", "expected a size"),
        ("cameras", "1 PINHOLE 6.5 48 5 5 3 3\n", "expected whole numbers"),
        ("cameras", "2 PINHOLE 64 48 5 5 3 3\n", "'a.png' has camera 7; expected one of"),
        ("images", "", "has no images; expected one or more"),
        ("images", "1 1 0 0\n", "expected 9 fields or more"),
        ("images", "1 1 0 0 0 0 0 0 1\n\n", "expected a pose, a camera and a name"),
        ("images", "1 0 0 0 0 0 0 0 1 a.png\n\n", "'a.png' has pose"),
        ("points3D", "# nothing\n", "has no points; expected one or more"),
        ("points3D", "1 inf 0 0 0 0 0 0\n", "NaN or infinite"),
        ("points3D", "1 0 0\n", "expected 7 fields or more"),
    ],
)
def test_what_text_files_may_not_say_is_named(text, name, content, message):
    path = text / f"{name}.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        colmap.read_model(text)
    assert str(text) in str(error.value)
    assert "\n" not in str(error.value)

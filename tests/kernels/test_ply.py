"""Gaussians in .ply files: what is written is read, and what isn't Gaussians is refused."""

import numpy as np
import pytest

from kernels.ply import FIELDS, GaussianCloud, read_ply, write_ply


@pytest.fixture
def gaussians():
    rng = np.random.default_rng(0)
    return GaussianCloud(
        means=rng.normal(size=(7, 3)),
        quats=rng.normal(size=(7, 4)),
        scales=rng.uniform(1e-4, 1.0, (7, 3)),
        opacities=rng.uniform(0.01, 0.99, 7),
        colors=rng.uniform(size=(7, 3)),
    )


def test_what_is_written_is_read(tmp_path, gaussians):
    path = tmp_path / "head.ply"
    write_ply(path, gaussians)
    for written, read in zip(gaussians, read_ply(path), strict=True):
        np.testing.assert_allclose(read, written, rtol=2e-6, atol=1e-7)
    assert [p.name for p in tmp_path.iterdir()] == ["head.ply"]


def test_bytes_are_the_layout_of_3d_gaussian_splatting(tmp_path):
    """A grey, half-opaque Gaussian of size 1: zeros in logits, logarithms and harmonics."""
    path = tmp_path / "one.ply"
    write_ply(
        path, GaussianCloud([[1, 2, 3]], [[1, 0, 0, 0]], [[1, 1, 1]], [0.5], [[0.5, 0.5, 0.5]])
    )
    header, _, body = path.read_bytes().partition(b"end_header\n")
    assert header.decode().splitlines() == [
        "ply",
        "format binary_little_endian 1.0",
        "element vertex 1",
        *(f"property float {field}" for field in FIELDS),
    ]
    np.testing.assert_array_equal(
        np.frombuffer(body, "<f4"), [1, 2, 3] + [0] * 3 + [0] * 3 + [0] + [0] * 3 + [1, 0, 0, 0]
    )


def test_opacity_and_scale_at_their_ends_stay_finite(tmp_path):
    path = tmp_path / "ends.ply"
    write_ply(
        path,
        GaussianCloud(
            np.zeros((2, 3)), np.ones((2, 4)), np.zeros((2, 3)), [0, 1], np.zeros((2, 3))
        ),
    )
    read = read_ply(path)
    assert all(np.isfinite(a).all() for a in read)
    np.testing.assert_allclose(read.opacities, [0, 1], atol=2e-6)


def test_big_endian_doubles_and_unknown_properties_are_read(tmp_path):
    fields = [f for f in FIELDS if not f.startswith("n")] + ["f_rest_0"]
    table = np.arange(2.0 * len(fields)).reshape(2, -1) / 100
    header = "\n".join(
        ["ply", "format binary_big_endian 1.0", "comment made by hand", "element vertex 2"]
        + [f"property double {f}" for f in fields]
        + ["element face 0", "property list uchar int vertex_indices", "end_header\n"]
    )
    path = tmp_path / "big.ply"
    path.write_bytes(header.encode() + table.astype(">f8").tobytes())
    read = read_ply(path)
    np.testing.assert_allclose(read.means, table[:, :3], rtol=1e-6)
    np.testing.assert_allclose(read.scales, np.exp(table[:, 7:10]), rtol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b"\x89PNG" + b, "not a PLY file"),
        (lambda b: b[:-1], "cut short: 7 vertices need 476 bytes, found 475"),
        (lambda b: b.replace(b"vertex 7", b"vertex 70000000000"), "cut short"),
        (lambda b: b.replace(b"float opacity", b"float opacitx"), "lack opacity"),
        (lambda b: b.replace(b"float opacity", b"list uchar int opacity"), "cannot read"),
        (lambda b: b.replace(b"binary_little_endian", b"ascii"), "convert it from text"),
        (lambda b: b.replace(b"element vertex 7", b"element chunk 7"), "comes before the vertices"),
        (lambda b: b.replace(b"float ny", b"float nx"), "each property named once"),
    ],
)
def test_a_spoiled_file_is_named_with_what_is_wrong(tmp_path, gaussians, spoil, message):
    path = tmp_path / "spoiled.ply"
    write_ply(path, gaussians)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as raised:
        read_ply(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ply: no such file"):
        read_ply(tmp_path / "nowhere.ply")

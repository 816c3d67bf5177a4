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
    for written, read in zip(gaussians[:5], read_ply(path)[:5], strict=True):
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
    assert all(np.isfinite(a).all() for a in read[:6])
    np.testing.assert_allclose(read.opacities, [0, 1], atol=2e-6)


def test_big_endian_doubles_and_unknown_properties_are_read(tmp_path):
    fields = [f for f in FIELDS if not f.startswith("n")] + ["confidence"]
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
        (lambda b: b.replace(b"float opacity", b"list uchar int opacity"), "cannot read the list"),
        (lambda b: b.replace(b"float opacity", b"quad opacity"), "cannot read 'property quad"),
        (lambda b: b.replace(b"binary_little_endian", b"ascii"), "cut short"),
        (lambda b: b.replace(b"binary_little_endian", b"zip"), "expected a format, one of binary"),
        (lambda b: b.replace(b"element vertex 7", b"element face 7"), "expected an element 'vert"),
        (
            lambda b: b.replace(b"element vertex", b"element chunk 0\nelement vertex"),
            "SuperSplat's compressed layout is not read; export it",
        ),
        (lambda b: b.replace(b"float nx", b"float f_rest_0"), "1 properties f_rest_"),
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


@pytest.mark.parametrize("size", [1, 4, 9, 16])
def test_spherical_harmonics_of_every_degree_are_kept(tmp_path, gaussians, size):
    sh = np.random.default_rng(1).normal(size=(7, size, 3))
    path = tmp_path / "sh.ply"
    write_ply(path, gaussians._replace(sh=sh, antialiased=True))
    read = read_ply(path)
    np.testing.assert_allclose(read.sh, sh, rtol=1e-6)
    assert read.antialiased
    names = [line.split()[-1] for line in path.read_text("latin-1").splitlines()[:70]]
    assert sum(name.startswith("f_rest_") for name in names) == 3 * (size - 1)
    if size > 1:
        # Channel by channel: the second red coefficient is the second of them all.
        table = np.frombuffer(path.read_bytes().partition(b"end_header\n")[2], "<f4")
        np.testing.assert_allclose(table.reshape(7, -1)[:, 10], sh[:, 2, 0], rtol=1e-6)


def test_colours_of_a_file_are_at_least_zero_as_renderers_have_them(tmp_path, gaussians):
    path = tmp_path / "dark.ply"
    write_ply(path, gaussians._replace(sh=np.full((7, 1, 3), -4.0)))
    read = read_ply(path)
    np.testing.assert_array_equal(read.colors, 0)
    np.testing.assert_array_equal(read.sh, -4)


def test_no_gaussians_are_written_and_read(tmp_path, gaussians):
    path = tmp_path / "none.ply"
    write_ply(path, GaussianCloud(*(np.asarray(a)[:0] for a in gaussians[:5])))
    assert [len(a) for a in read_ply(path)[:6]] == [0] * 6


def test_the_sign_of_a_scale_means_nothing(tmp_path, gaussians):
    path = tmp_path / "signs.ply"
    write_ply(path, gaussians._replace(scales=-np.asarray(gaussians.scales)))
    np.testing.assert_allclose(read_ply(path).scales, gaussians.scales, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g._replace(colors=np.ones((7, 1))), r"colors has shape \(7, 1\); expected"),
        (lambda g: g._replace(colors=np.ones((7, 4))), r"colors has shape \(7, 4\); expected"),
        (lambda g: g._replace(quats=np.ones((8, 4))), r"quats has shape \(8, 4\); expected"),
        (lambda g: g._replace(sh=np.ones((7, 5, 3))), r"sh has shape .* expected .*1, 4, 9, 16 co"),
        (lambda g: g._replace(means=np.full((7, 3), np.nan)), "means has NaN or infinite"),
    ],
)
def test_what_a_file_cannot_hold_is_named_and_nothing_is_written(
    tmp_path, gaussians, change, message
):
    with pytest.raises(ValueError, match=message):
        write_ply(tmp_path / "bad.ply", change(gaussians))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.replace(b"\n", b"\r\n"),
        lambda head: head.replace(b"element", b"comment this is no end_header\nelement"),
        lambda head: head.replace(b"element", b"".join([b"comment long\n"] * 9000) + b"element"),
    ],
)
def test_headers_of_every_kind_are_read(tmp_path, gaussians, change):
    path = tmp_path / "header.ply"
    write_ply(path, gaussians)
    head, end, body = path.read_bytes().partition(b"end_header\n")
    path.write_bytes(change(head + end) + body)
    np.testing.assert_allclose(read_ply(path).means, gaussians.means, rtol=1e-6)


def test_text_and_elements_before_the_vertices_are_read(tmp_path, gaussians):
    path = tmp_path / "scene.ply"
    write_ply(path, gaussians)
    binary = path.read_bytes()
    expected = read_ply(path)
    head, end, body = binary.partition(b"end_header\n")
    more = b"element face 2\nproperty list uchar int indices\nproperty short id\nelement vertex"
    faces = b"".join(
        np.uint8(n).tobytes() + np.arange(n, dtype="<i4").tobytes() + np.int16(5).tobytes()
        for n in (3, 4)
    )
    path.write_bytes(head.replace(b"element vertex", more) + end + faces + body)
    for a, b in zip(read_ply(path)[:6], expected[:6], strict=True):
        np.testing.assert_array_equal(a, b)

    rows = np.frombuffer(body, "<f4").reshape(7, -1)
    text = "\n".join(" ".join(f"{value:.9g}" for value in row) for row in rows)
    head = head.replace(b"binary_little_endian", b"ascii").replace(b"element vertex", more)
    path.write_bytes(head + end + b"3 0 1 2 5\n4 0 1 2 3 5\n" + text.encode())
    for a, b in zip(read_ply(path)[:6], expected[:6], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("comment", "antialiased"),
    [("antialiased 1", True), ("antialiased 0", False), ("SplatRenderMode: default", False)],
)
def test_what_a_comment_says_of_the_training_is_kept(tmp_path, gaussians, comment, antialiased):
    path = tmp_path / "comment.ply"
    write_ply(path, gaussians)
    data = path.read_bytes().replace(b"element", b"comment " + comment.encode() + b"\nelement", 1)
    path.write_bytes(data)
    assert read_ply(path).antialiased == antialiased

"""The pictures of `inspect` show where cameras and heads are, and its words count what is there."""

import dataclasses

import numpy as np
import pytest
import tiny_captures
from PIL import Image

from data_pipelines import inspection
from data_pipelines.cameras import orbit
from data_pipelines.errors import TRY_AGAIN
from data_pipelines.frame import MONOCULAR, MULTI_VIEW
from data_pipelines.head_mesh import template_mesh
from data_pipelines.shard_writer import write_shards

K = np.array([[3.2, 0, 0.5], [0, 3.2, 0.5], [0, 0, 1]], np.float32)


def grey_frame(azimuth, size=200):
    return dataclasses.replace(
        tiny_captures.frame(),
        image=np.full((size, size, 3), 128, np.uint8),
        mask=np.full((size, size), 255, np.uint8),
        cam2head=orbit(azimuth, 0.0, 1.0, np.zeros(3)).astype(np.float32),
        K=K,
        person="",
        sequence="",
        camera="",
    )


def middle_of(picture, colour, tolerance=60):
    """Mean position (x, y), 0 to 1, of the pixels of about that colour."""
    image = np.asarray(picture, float)
    y, x = np.nonzero(np.abs(image - colour).max(-1) < tolerance)
    assert len(x)
    return np.array([x.mean() / image.shape[1], y.mean() / image.shape[0]])


@pytest.mark.parametrize(
    ("azimuth", "x", "z"), [(0, 0.66, 0.5), (90, 0.5, 0.34), (180, 0.34, 0.5), (-90, 0.5, 0.66)]
)
def test_axes_point_where_the_camera_sees_them(azimuth, x, z):
    """From the front, x (red) points right; from the person's left, z (blue) points left."""
    picture = inspection.draw_head(grey_frame(azimuth), template_mesh())
    red, blue = inspection.AXES["x"], inspection.AXES["z"]
    assert middle_of(picture, inspection.AXES["y"])[1] < 0.45
    if x != 0.5:
        assert abs(middle_of(picture, red)[0] - x) < 0.05
    if z != 0.5:
        assert abs(middle_of(picture, blue)[0] - z) < 0.05


@pytest.mark.parametrize("azimuth", [0, 70, 180])
def test_the_outline_is_that_of_the_projected_template(azimuth):
    frame, mesh = grey_frame(azimuth), template_mesh()
    picture = inspection.draw_head(frame, mesh)
    yellow = np.abs(np.asarray(picture, float) - inspection.OUTLINE).max(-1) < 80
    world2cam = np.linalg.inv(frame.cam2head)
    seen = (mesh.vertices @ world2cam[:3, :3].T + world2cam[:3, 3]) @ K.T
    seen = seen[:, :2] / seen[:, 2:] * 200
    above_shoulders = mesh.vertices[:, 1] > -0.05
    columns = np.nonzero(yellow[: int(seen[above_shoulders, 1].max())].any(0))[0]
    np.testing.assert_allclose(columns.min(), seen[above_shoulders, 0].min(), atol=2.5)
    np.testing.assert_allclose(columns.max(), seen[above_shoulders, 0].max(), atol=2.5)


def test_background_is_faded():
    frame = grey_frame(0.0)
    frame = dataclasses.replace(frame, mask=np.zeros_like(frame.mask))
    corner = np.asarray(inspection.draw_head(frame, template_mesh()))[-1, -1]
    assert (corner > 180).all()


def test_the_sphere_shows_each_camera_from_three_sides():
    cams = inspection.Cameras(
        np.stack([orbit(90.0, 0, 1.0, np.zeros(3)), orbit(0.0, 45, 1.0, np.zeros(3))]),
        np.stack([K, K]),
        np.array([MONOCULAR, MULTI_VIEW]),
    )
    picture = inspection.camera_sphere(cams, size=400)
    assert picture.size == (1200, 400)
    # Right of and below the legend.
    front, left, above = (picture.crop((400 * n + 150, 40, 400 * (n + 1), 400)) for n in range(3))

    def place(view, source):
        x, y = middle_of(view, inspection.SOURCE_COLOURS[source], 30)
        # From the sphere's centre, in radii; y up.
        return [(x * 250 + 150 - 200) / 168, (0.52 * 400 - (y * 360 + 40)) / 168]

    # A camera at the person's left, and one in front of the face, 45 degrees up.
    np.testing.assert_allclose(place(front, MONOCULAR), [1, 0], atol=0.03)
    np.testing.assert_allclose(place(left, MONOCULAR), [0, 0], atol=0.03)
    np.testing.assert_allclose(place(above, MONOCULAR), [1, 0], atol=0.03)
    np.testing.assert_allclose(place(front, MULTI_VIEW), [0, 0.707], atol=0.03)
    np.testing.assert_allclose(place(above, MULTI_VIEW), [0, -0.707], atol=0.03)


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "SHEET_FRAMES", 4)
    captures = tiny_captures.TinyCaptures(timesteps=4, cameras=3, size=32)
    write_shards(captures, tmp_path / "sets", {}, workers=1)
    return tmp_path / "sets"


def test_counts_and_pictures_of_all_sets_in_a_folder(prepared, tmp_path, capsys):
    assert inspection.main([str(prepared), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "2 people, 4 clips, 48 frames of 3 cameras" in printed
    assert "source multi-view" in printed
    assert "cameras 1.00 to 1.00 m from the head, azimuth 0 to 46 degrees" in printed
    assert "75% of frames with an open jaw" in printed
    sheet = Image.open(tmp_path / "out/tiny/frames.png")
    assert sheet.size == (4 * inspection.TILE, inspection.TILE)
    assert Image.open(tmp_path / "out/tiny/cameras.png").mode == "RGB"


def test_pictures_go_into_the_data_sets_folder_and_come_out_the_same(prepared):
    assert inspection.main([str(prepared / "tiny")]) == 0
    first = (prepared / "tiny/frames.png").read_bytes()
    assert inspection.main([str(prepared / "tiny")]) == 0
    assert (prepared / "tiny/frames.png").read_bytes() == first


class Elsewhere(tiny_captures.TinyCaptures):
    """A camera that looks away from the head."""

    def clip(self, i):
        for frame in super().clip(i):
            away = orbit(0.0, 0.0, 1.0, np.zeros(3)).astype(np.float32)
            away[:3, :3] = away[:3, :3] @ np.diag([-1, 1, -1]).astype(np.float32)
            yield dataclasses.replace(frame, cam2head=away)


def test_cameras_that_do_not_see_the_head_are_warned_of(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(inspection, "SHEET_FRAMES", 1)
    write_shards(Elsewhere(), tmp_path, {}, workers=1)
    assert inspection.main([str(tmp_path)]) == 0
    assert "WARNING: in 100.0% of frames the head is not in the picture" in capsys.readouterr().out


@pytest.mark.parametrize("folder", ["", "missing"])
def test_a_folder_without_prepared_data_gives_one_sentence(tmp_path, folder, capsys):
    assert inspection.main([str(tmp_path / folder)]) == TRY_AGAIN
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {tmp_path}")
    assert "\n" not in error


@pytest.mark.parametrize(("azimuth", "side"), [(0, 0), (60, -1), (-60, 1), (180, None)])
def test_the_template_shows_which_way_the_head_faces(azimuth, side):
    """Eyes, nose and mouth lie on the side to which the face is turned; from behind, nowhere."""
    picture = np.asarray(inspection.draw_head(grey_frame(azimuth), template_mesh()), float)
    pink = np.abs(picture - inspection.FACE).max(-1) < 60
    if side is None:
        assert not pink.any()
    else:
        assert pink.sum() > 20
        offset = np.nonzero(pink)[1].mean() / picture.shape[1] - 0.5
        assert (abs(offset) < 0.02) if side == 0 else (np.sign(offset) == side)

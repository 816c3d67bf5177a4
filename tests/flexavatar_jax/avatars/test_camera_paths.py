"""Camera paths: where they start, what they keep, and files that are none."""

import json

import numpy as np
import pytest

from data_pipelines import cameras
from data_pipelines.errors import UserError
from flexavatar_jax.avatars.camera_paths import (
    CIRCLE_PITCH,
    CIRCLE_YAW,
    circle_cameras,
    orbit_cameras,
    read_camera_path,
)

START = cameras.orbit(30, 10, 1.1, np.array([0.0, 0.05, 0.0]))


def degrees_off(views):
    """Azimuth and elevation of camera centres, in degrees."""
    x, y, z = views[:, :3, 3].T
    return np.degrees(np.arctan2(x, z)), np.degrees(np.arctan2(y, np.hypot(x, z)))


def test_an_orbit_keeps_its_distance_and_starts_at_the_input():
    views = orbit_cameras(START, 8)
    np.testing.assert_allclose(views[0], START)
    np.testing.assert_allclose(
        np.linalg.norm(views[:, :3, 3], axis=1), np.linalg.norm(START[:3, 3])
    )
    np.testing.assert_allclose(views[4, :3, 3], START[:3, 3] * [-1, 1, -1], atol=1e-12)


def test_the_frontal_circle_stays_before_the_face_and_keeps_the_framing():
    views = circle_cameras(START, 64)
    azimuth, elevation = degrees_off(views)
    np.testing.assert_allclose([azimuth.min(), azimuth.max()], [-CIRCLE_YAW, CIRCLE_YAW], atol=0.5)
    assert np.ptp(elevation) == pytest.approx(2 * CIRCLE_PITCH, abs=0.5)
    # The head's origin stays where it was in the picture.
    at = np.stack([cameras.invert_rigid(v)[:3, 3] for v in (START, *views)])
    np.testing.assert_allclose(at, np.broadcast_to(at[:1], at.shape), atol=1e-9)


def write(path, **content):
    path.write_text(json.dumps({k: np.asarray(v).tolist() for k, v in content.items()}))
    return path


def test_a_path_comes_from_a_file_with_intrinsics_or_without(tmp_path):
    views, K = orbit_cameras(START, 3), np.array([[3, 0, 0.5], [0, 3, 0.5], [0, 0, 1]])
    found, none = read_camera_path(write(tmp_path / "a.json", cam2head=views))
    np.testing.assert_allclose(found, views)
    assert none is None
    for given in (K, [K] * 3):
        _, Ks = read_camera_path(write(tmp_path / "b.json", cam2head=views, K=given))
        np.testing.assert_allclose(Ks, [K] * 3)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (dict(cam2head=START), r"cam2head must be \[E, 4, 4\]"),
        (dict(cam2head=np.zeros((0, 4, 4))), r"cam2head must be \[E, 4, 4\]"),
        (dict(cam2head=2 * START[None]), "cam2head must be a rigid transform"),
        (dict(cam2head=START[None], K=512 * np.ones((3, 3))), "K is in pixels"),
        (dict(cam2head=START[None], K=np.ones((2, 3, 3))), r"K must be \[3, 3\], or \[1, 3, 3\]"),
        (dict(views=START[None]), r"no camera path \(KeyError\)"),
        (dict(cam2head="abc"), r"no camera path \(ValueError\)"),
    ],
)
def test_a_file_that_is_no_camera_path_is_named(content, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence) as error:
        read_camera_path(write(tmp_path / "path.json", **content))
    assert "path.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "[[[", "[" * 100_000, "3", "null"])
def test_other_text_is_named(text, tmp_path):
    (tmp_path / "path.json").write_text(text)
    with pytest.raises(UserError, match=r"path\.json is no camera path"):
        read_camera_path(tmp_path / "path.json")

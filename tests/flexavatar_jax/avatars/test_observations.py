"""What avatars are made from: the input that was given, and frames spread evenly."""

import numpy as np
import pytest

from data_pipelines.errors import UserError
from flexavatar_jax.avatars.observations import find_tracked, read_observations
from flexavatar_jax.avatars.performances import follow_pose, read_performance


@pytest.fixture
def folders(shared_dir, tmp_path):
    """inputs/ of one's own, with the processing and tracking of the real portraits."""
    for folder in ("processing", "tracking"):
        (tmp_path / folder).symlink_to(shared_dir / "real" / folder)
    (tmp_path / "inputs").mkdir()
    return tmp_path


def test_a_portrait_as_a_phone_names_it(folders, shared_dir):
    portrait = folders / "inputs" / "marble_sculpture.JPG"
    portrait.symlink_to(shared_dir / "real" / "inputs" / "marble_sculpture.jpg")
    found = read_observations([str(portrait)])
    assert found.name == "marble_sculpture"
    assert found.images[0].shape == (512, 512, 3)
    np.testing.assert_array_equal(found.seen, [0])


def test_several_pictures_are_all_seen(shared_dir):
    inputs = shared_dir / "real" / "inputs"
    names = ("marble_sculpture", "asian_watercolor_girl")
    found = read_observations([str(inputs / f"{name}.jpg") for name in names])
    assert found.expressions.shape == (2, 135)
    np.testing.assert_array_equal(found.seen, [0, 1])
    one = read_observations([str(inputs / "asian_watercolor_girl.jpg")])
    np.testing.assert_array_equal(found.images[1], one.images[0])


def test_a_portrait_is_the_file_that_was_given(shared_dir):
    """Tracking goes by the name: that of NAME.jpg is not taken for any NAME."""
    given = shared_dir / "real" / "inputs" / "marble_sculpture.png"
    with pytest.raises(UserError, match=r"marble_sculpture\.png: no such file"):
        find_tracked(str(given))


def test_two_pictures_of_a_name_are_not_taken_for_each_other(tmp_path):
    (tmp_path / "inputs").mkdir()
    for suffix in (".jpg", ".png"):
        (tmp_path / "inputs" / f"me{suffix}").touch()
    with pytest.raises(ValueError, match=r"me\.jpg and me\.png have the same name me"):
        find_tracked(str(tmp_path / "inputs" / "me.png"))


def test_a_prepared_persons_source_is_frontal_and_the_others_come_from_all_round(tiny_data):
    found = read_observations([f"{tiny_data}/procedural_test/test_00000"], 4)
    assert len(set(found.seen.tolist())) == 4
    azimuth = np.degrees(np.abs(np.arctan2(*found.cam2heads[found.seen][:, [0, 2], 3].T)))
    assert azimuth[0] == azimuth.min()
    assert np.ptp(azimuth) > 60


def test_a_prepared_persons_performance_is_what_one_camera_saw(tiny_data):
    from data_pipelines.shards import PreparedSet

    data = PreparedSet(tiny_data / "procedural_monocular")
    person = str(data.index.person[1])
    played = read_performance(f"{tiny_data}/procedural_monocular/{person}")
    first = int(data.index.clip_start[1])
    np.testing.assert_array_equal(played.expressions[0], data.frame(first).expression)
    assert len(played.expressions) == len(list(played.pictures())) == 3


def test_a_head_follows_the_drivers_pose_from_where_it_stands():
    from data_pipelines import cameras

    driver = np.stack([cameras.orbit(a, 0, 2.0, np.zeros(3)) for a in (20, 50)])
    start = cameras.orbit(0, 0, 1.0, np.zeros(3))
    views = follow_pose(start, driver)
    np.testing.assert_allclose(views[0], start, atol=1e-12)
    np.testing.assert_allclose(views[1], cameras.orbit(30, 0, 1.0, np.zeros(3)), atol=1e-12)
    nearer = driver.copy()
    nearer[1] = cameras.orbit(20, 0, 1.5, np.zeros(3))
    assert np.linalg.norm(follow_pose(start, nearer)[1, :3, 3]) == pytest.approx(0.75)

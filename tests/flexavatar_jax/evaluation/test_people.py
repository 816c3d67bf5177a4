"""Whom evaluation shows from where: sectors of view, and targets from all cameras and moments."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.shards import PreparedSet
from flexavatar_jax.evaluation.people import evenly_spaced, portrait, read_people, sector, spread

# Stand-ins with known answers take the places of avatars and data sets.
pytestmark = pytest.mark.usefixtures("any_types")


@pytest.mark.parametrize(
    ("azimuth", "expected"),
    [(0, "front"), (59, "front"), (-59, "front"), (61, "side"), (-119, "side"), (121, "back")],
)
def test_sectors_by_azimuth(azimuth, expected):
    assert sector(cameras.orbit(azimuth, 10.0, 1.0, np.zeros(3))) == expected


def test_evenly_spaced_reaches_both_ends_without_repeats():
    np.testing.assert_array_equal(evenly_spaced(11, 3), [0, 5, 10])
    np.testing.assert_array_equal(evenly_spaced(2, 5), [0, 1])


@pytest.mark.parametrize(("cameras", "moments"), [(16, 3), (16, 1), (7, 5), (80, 4), (1, 9)])
@pytest.mark.parametrize("wanted", [16, 20, 50, 80])
def test_targets_come_from_all_cameras_and_all_through_time(cameras, moments, wanted):
    timestep, camera = (a.ravel() for a in np.indices((moments, cameras)))  # as they are stored
    chosen = spread(camera, timestep, wanted)
    assert len(set(chosen)) == len(chosen) == min(wanted, cameras * moments)
    seen = np.bincount(camera[chosen], minlength=cameras)
    assert np.count_nonzero(seen) == min(wanted, cameras)
    assert np.ptp(seen) <= 1
    assert {timestep[chosen].min(), timestep[chosen].max()} == {0, moments - 1}


def people(tiny_data, *frames):
    """A data set whose people have so many frames each."""
    data = PreparedSet(tiny_data / "procedural_monocular")
    index = SimpleNamespace(
        person=np.array(["anna", "bert", "carl"][: len(frames)]),
        clip_start=np.r_[0, np.cumsum(frames)],
        camera=np.zeros(sum(frames), int),
        timestep=np.arange(sum(frames)),
    )
    return SimpleNamespace(index=index, folder="mine", frame=data.frame)


def test_of_whom_there_is_one_frame_it_is_input_and_target(tiny_data):
    (anna,) = read_people(people(tiny_data, 1), 1, 4, 32)
    assert anna.shows_input
    assert [frame.timestep for frame in (anna.input, *anna.targets)] == [0, 0]
    (bert,) = read_people(people(tiny_data, 3), 1, 4, 32)
    assert not bert.shows_input
    assert [frame.timestep for frame in (bert.input, *bert.targets)] == [0, 1, 2]


def test_single_frames_among_others_are_named(tiny_data):
    with pytest.raises(UserError, match=r"mine has one frame only of bert \(1 of 2 people\)"):
        read_people(people(tiny_data, 2, 1), 3, 4, 32)
    with pytest.raises(UserError, match="images_per_person is 1, and that is the input of anna"):
        read_people(people(tiny_data, 3), 1, 1, 32)


def test_a_portrait_is_tracked_as_one_camera_can_and_the_captures_stay_as_they_are(tiny_data):
    (person,) = read_people(PreparedSet(tiny_data / "procedural_test"), 1, 4, 32)
    camera = person.input.cam2head.copy()
    taken = portrait(person, ConfigDict({"eval": {"portrait_size": 1.2}}))
    np.testing.assert_allclose(taken.cam2head[:3, 3], 1.2 * camera[:3, 3], rtol=1e-6)
    np.testing.assert_array_equal(taken.cam2head[:3, :3], camera[:3, :3])
    np.testing.assert_array_equal(taken.image, person.input.image)
    np.testing.assert_array_equal(taken.K, person.input.K)
    np.testing.assert_array_equal(person.input.cam2head, camera)
    for of_before in ({"eval": {"portrait_size": 1.0}}, {"eval": {}}):
        np.testing.assert_array_equal(portrait(person, ConfigDict(of_before)).cam2head, camera)

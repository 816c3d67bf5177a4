"""Whom evaluation shows from where: sectors of view, and targets from all cameras and moments."""

import numpy as np
import pytest

from data_pipelines import cameras
from flexavatar_jax.evaluation.people import evenly_spaced, sector, spread


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

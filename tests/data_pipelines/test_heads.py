"""Where a head is by what one or more trackers saw of it."""

import look_alikes
import numpy as np
import pytest
from multi_view_sets import AZIMUTHS, camera, crop_of, head, tracker_sees

from data_pipelines import cameras
from data_pipelines.datasets.heads import head_pose
from data_pipelines.pixel3dmm import TrackedClip


def seen_by(name, timestep=0, focal_error=1.0):
    crop = crop_of(name, timestep)
    return camera(name), tracker_sees(name, timestep, crop, focal_error), crop


def pose_from(tmp_path, *seen):
    observations = []
    for i, (calibrated, content, crop) in enumerate(seen):
        look_alikes.write_tracking(tmp_path, f"c{i}", crop, [content])
        clip = TrackedClip(tmp_path, f"c{i}")
        observations.append((calibrated, clip.tracking(0), clip.crop))
    return head_pose(observations)


def errors(pose):
    """Metres and degrees off the true pose."""
    turn = pose[:3, :3].T @ head(0)[:3, :3]
    angle = np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1)))
    return np.linalg.norm(pose[:3, 3] - head(0)[:3, 3]), angle


@pytest.mark.parametrize("names", [["front"], ["front", "left"], list(AZIMUTHS)])
def test_head_pose_from_one_or_more_cameras(tmp_path, names):
    metres, degrees = errors(pose_from(tmp_path, *(seen_by(name) for name in names)))
    assert metres < 0.002
    assert degrees < 0.2


def test_a_focal_length_that_the_tracker_got_wrong_does_not_move_the_head(tmp_path):
    metres, degrees = errors(pose_from(tmp_path, seen_by("front", focal_error=1.3)))
    assert metres < 0.002
    assert degrees < 0.2


def test_rays_of_two_cameras_outweigh_a_wrong_size(tmp_path):
    """A child's head, tracked with an adult's model, seems 10 % further away than it is."""

    def larger(name):
        calibrated, content, crop = seen_by(name)
        tracker = np.linalg.inv(world_to_cam(content))
        shoulders = cameras.rigid(np.eye(3), content["flame"]["t"][0])
        distant = tracker[:3, 3] + 1.1 * (shoulders[:3, 3] - tracker[:3, 3])
        content["flame"]["t"][0] = distant
        return calibrated, content, crop

    alone, _ = errors(pose_from(tmp_path / "one", larger("front")))
    together, _ = errors(pose_from(tmp_path / "two", larger("front"), larger("left")))
    assert alone > 0.1
    assert together < 0.01


def world_to_cam(content):
    return cameras.rigid(content["camera"]["R_base_0"][0], content["camera"]["t_base_0"][0])

"""Inputs and trackings are found by name, wherever the tracker puts them."""

import os

import look_alikes
import pytest

from data_pipelines.errors import UserError
from data_pipelines.pixel3dmm import read_driving, read_portrait
from data_pipelines.tracker_folders import list_inputs


@pytest.mark.parametrize("name", ["Title [id]", "what?", "a*b", "[", "half)("])
def test_names_with_the_characters_of_patterns(tmp_path, name):
    root = tmp_path / name
    look_alikes.write_image(root / f"inputs/{name}.jpg", look_alikes.photo(160, 140))
    look_alikes.write_tracking(root, name, (20, 120, 30, 130), [look_alikes.flame_frame()])
    assert list(list_inputs(root)) == [name]
    assert read_portrait(root, name).image.shape == (512, 512, 3)
    assert len(read_driving(root / "tracking" / name).expression) == 1


@pytest.mark.parametrize("written", ["me.", "me._nV1_noPho_uv2000.0_n1000.0", "me_nV1_noPho"])
def test_names_as_the_tracker_cuts_them(tmp_path, written):
    """Of me.jpeg it strips four characters."""
    look_alikes.write_image(tmp_path / "inputs/me.jpeg", look_alikes.photo(160, 140))
    look_alikes.write_tracking(tmp_path, "me.", (20, 120, 30, 130), [look_alikes.flame_frame()])
    (tmp_path / "tracking/me.").rename(tmp_path / "tracking" / written)
    assert read_portrait(tmp_path, "me").mask.any()


def test_the_published_repositorys_tree(tmp_path):
    look_alikes.write_image(tmp_path / "inputs/itw/me.png", look_alikes.photo(160, 140))
    home = tmp_path / "pixel3dmm_processing"
    frames = [look_alikes.flame_frame()]
    look_alikes.write_tracking(home, "itw/me/tracking", (20, 120, 30, 130), frames)
    (home / "tracking/itw/me/tracking").rename(home / "tracking/itw/me/tracking_nV1_noPho")
    assert list(list_inputs(tmp_path)) == ["me"]
    assert read_portrait(tmp_path, "me").mask.any()


def test_folders_where_the_trackers_own_variables_say(tmp_path, monkeypatch):
    look_alikes.write_image(tmp_path / "mine/inputs/me.png", look_alikes.photo(160, 140))
    frames = [look_alikes.flame_frame()]
    look_alikes.write_tracking(tmp_path / "theirs", "me", (20, 120, 30, 130), frames)
    monkeypatch.setenv("PIXEL3DMM_PREPROCESSED_DATA", str(tmp_path / "theirs/processing"))
    monkeypatch.setenv("PIXEL3DMM_TRACKING_OUTPUT", str(tmp_path / "theirs/tracking"))
    assert read_portrait(tmp_path / "mine", "me").mask.any()


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    look_alikes.write_image(tmp_path / "inputs/me.png", look_alikes.photo(16, 16))
    (tmp_path / "inputs/me.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/inputs/\xff.png"))
    with pytest.raises(UserError, match=r"a file name there is not UTF-8, .*xff\.png.*; rename it"):
        list_inputs(tmp_path)

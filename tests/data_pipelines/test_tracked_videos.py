"""Monocular data sets in their published layouts become clips of tracked frames."""

import argparse
import json

import look_alikes
import numpy as np
import pytest

from data_pipelines import pixel3dmm, prepare
from data_pipelines.captures import SkipClip, SkippedFrame
from data_pipelines.datasets import celebv_hq, celebv_text, folder, hello3, vfhq_test
from data_pipelines.errors import GIVE_UP, TRY_AGAIN
from data_pipelines.frame import MONOCULAR
from data_pipelines.shards import PreparedSet
from data_pipelines.tracker_folders import list_inputs

PHOTOS = [look_alikes.photo(128, 128) // 4 + np.uint8(30 * t) for t in range(6)]
CROP = (14, 114, 14, 114)


def track(root, name, count=6):
    frames = [look_alikes.flame_frame(seed) for seed in range(count)]
    look_alikes.write_tracking(root, name, CROP, frames)


def open_set(module, *argv):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    (captures,) = module.capture_sets(parser.parse_args(list(map(str, argv))))
    return captures


def write_celebv(root, info, videos):
    clips = {
        "M2Ohb0FAaJU_1": {"ytb_id": "M2Ohb0FAaJU", "bbox": {"top": 0.0}},
        "M2Ohb0FAaJU_2": {"ytb_id": "M2Ohb0FAaJU", "bbox": {"top": 0.1}},
        "_0tf2n3rlJU_0": {"ytb_id": "_0tf2n3rlJU", "bbox": {"top": 0.0}},
        "untracked_0": {"ytb_id": "untracked", "bbox": {"top": 0.0}},
    }
    (root / info).write_text(json.dumps({"meta_info": {}, "clips": clips}))
    for name in ("M2Ohb0FAaJU_1", "M2Ohb0FAaJU_2", "untracked_0"):
        look_alikes.write_video(root / videos / f"{name}.mp4", PHOTOS)
    for name in ("M2Ohb0FAaJU_1", "M2Ohb0FAaJU_2", "_0tf2n3rlJU_0"):
        track(root, name)


@pytest.mark.parametrize(
    ("module", "info", "videos"),
    [
        (celebv_hq, "celebvhq_info.json", "downloaded_celebvhq/processed"),
        (celebv_text, "celebvtext_info.json", "downloaded_celebvtext/processed"),
    ],
)
def test_celebv(tmp_path, module, info, videos):
    write_celebv(tmp_path, info, videos)
    captures = open_set(module, "--source", tmp_path, "--every", 2)
    assert captures.num_clips == 4
    first = list(captures.clip(0))
    assert [frame.timestep for frame in first] == [0, 2, 4]
    assert {(f.person, f.sequence, f.camera, f.source) for f in first} == {
        ("M2Ohb0FAaJU", "M2Ohb0FAaJU_1", "0", MONOCULAR)
    }
    assert next(iter(captures.clip(1))).person == "M2Ohb0FAaJU"
    with pytest.raises(SkipClip, match="its video or picture is missing"):
        list(captures.clip(2))
    with pytest.raises(SkipClip, match="no Pixel3DMM tracking"):
        list(captures.clip(3))


def test_hello3(tmp_path):
    look_alikes.write_video(tmp_path / "videos/0001.mp4", PHOTOS)
    track(tmp_path, "0001", count=5)
    captures = open_set(hello3, "--source", tmp_path)
    frames = list(captures.clip(0))
    assert [frame.timestep for frame in frames] == [0, 1, 2, 3, 4]
    assert frames[0].person == "0001"


def write_vfhq(root, name, count, size):
    photos = [look_alikes.photo(size, size, seed=t) for t in range(count)]
    for t, photo in enumerate(photos):
        look_alikes.write_image(root / name / f"{t:08d}.png", photo)
    crop = (size // 4, size // 4 * 3, size // 8, size // 8 * 5)
    frames = [look_alikes.flame_frame()] * count
    look_alikes.write_tracking(root, name, crop, frames, np.eye(32, dtype=np.uint8))
    return photos


def test_vfhq_test_takes_fifty_frames_from_the_first_to_the_last(tmp_path):
    name = "Clip+5qlgZTWEL1g+P0+C0+F2050-2177"
    write_vfhq(tmp_path, name, 63, size=32)
    frames = list(open_set(vfhq_test, "--source", tmp_path).clip(0))
    timesteps = [frame.timestep for frame in frames]
    assert len(timesteps) == 50
    assert (timesteps[0], timesteps[-1]) == (0, 62)
    assert set(np.diff(timesteps)) == {1, 2}
    assert {frame.person for frame in frames} == {"5qlgZTWEL1g+P0"}


def test_vfhq_test_takes_whole_pictures(tmp_path):
    photos = write_vfhq(tmp_path, "Clip+5qlgZTWEL1g+P0+C0+F2050-2177", 2, size=512)
    captures = open_set(vfhq_test, "--source", tmp_path)
    for frame in captures.clip(0):
        np.testing.assert_array_equal(frame.image, photos[frame.timestep])
        # The tracker's K is of its crop, 256 pixels of the picture's 512 from (64, 128) on.
        K = pixel3dmm.TrackedClip(tmp_path, frame.sequence).tracking(0).K
        expected = [K[0, 0] / 2, K[0, 2] / 2 + 64, K[1, 2] / 2 + 128]
        np.testing.assert_allclose(512 * frame.K[[0, 0, 1], [0, 2, 2]], expected, rtol=1e-6)


def test_vfhq_test_takes_all_frames_of_a_short_clip(tmp_path):
    write_vfhq(tmp_path, "short", 7, size=32)
    frames = list(open_set(vfhq_test, "--source", tmp_path).clip(0))
    assert [frame.timestep for frame in frames] == list(range(7))


def test_folder_of_a_picture_a_video_and_a_folder_of_pictures(tmp_path):
    look_alikes.write_image(tmp_path / "inputs/anna.jpg", PHOTOS[0])
    look_alikes.write_video(tmp_path / "inputs/ben.mp4", PHOTOS)
    for t, photo in enumerate(PHOTOS):
        look_alikes.write_image(tmp_path / f"inputs/cleo/{t}.png", photo)
    for name, count in (("anna", 1), ("ben", 6), ("cleo", 6)):
        track(tmp_path, name, count)
    captures = open_set(folder, "--source", tmp_path, "--name", "friends")
    assert captures.name == "friends"
    assert [len(list(captures.clip(i))) for i in range(3)] == [1, 6, 6]
    expected = pixel3dmm.read_portrait(tmp_path, "anna")
    (frame,) = captures.clip(0)
    for field in ("image", "mask", "cam2head", "K", "expression"):
        np.testing.assert_array_equal(getattr(frame, field), getattr(expected, field))


def test_files_as_phones_name_them(tmp_path):
    look_alikes.write_image(tmp_path / "inputs/anna.JPG", PHOTOS[0])
    look_alikes.write_video(tmp_path / "inputs/ben.MOV", PHOTOS)
    track(tmp_path, "anna", 1)
    track(tmp_path, "ben", 6)
    captures = open_set(folder, "--source", tmp_path)
    assert [len(list(captures.clip(i))) for i in range(2)] == [1, 6]


def test_two_inputs_of_a_name_are_not_taken_for_each_other(tmp_path, capsys):
    write_portraits(tmp_path, "anna", "ben")
    look_alikes.write_image(tmp_path / "inputs/anna.png", PHOTOS[1])
    assert run_prepare(tmp_path, tmp_path / "out") == GIVE_UP
    error = capsys.readouterr().err
    assert f"error: {tmp_path}/inputs: anna.jpg and anna.png have the same name anna" in error
    assert error.count("\n") == 1
    assert len(list(pixel3dmm.read_clip(tmp_path, "ben"))) == 1  # another's name is its own


def test_damage_costs_the_frame_or_the_clip_and_is_named(tmp_path):
    look_alikes.write_video(tmp_path / "inputs/ben.mp4", PHOTOS)
    track(tmp_path, "ben")
    (tmp_path / "processing/ben/seg_og/00001.png").unlink()
    (tmp_path / "tracking/ben/checkpoint/00003.frame").write_bytes(b"PK broken")
    captures = open_set(folder, "--source", tmp_path)
    frames = list(captures.clip(0))
    reasons = [frame.reason for frame in frames if isinstance(frame, SkippedFrame)]
    assert reasons[0] == "its mask, seg_og/, is missing"
    assert "00003.frame: not a whole file" in reasons[1]
    assert len(frames) == 6
    assert len(reasons) == 2

    look_alikes.write_video(tmp_path / "inputs/ben.mp4", PHOTOS[:4])
    with pytest.raises(SkipClip, match="ends before its tracking"):
        list(captures.clip(0))
    (tmp_path / "inputs/ben.mp4").write_bytes(b"no video")
    with pytest.raises(SkipClip, match="does not decode as a video"):
        list(captures.clip(0))


def write_portraits(root, *tracked):
    for name in ("anna", "ben"):
        look_alikes.write_image(root / f"inputs/{name}.jpg", PHOTOS[0])
    for name in tracked:
        track(root, name, count=1)


def run_prepare(source, out, *options):
    argv = ["folder", "--source", str(source), "--out", str(out), "--workers", "1", *options]
    return prepare.main(argv)


def test_a_tracking_that_comes_later_is_taken_up_by_a_retry(tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    write_portraits(source)
    assert run_prepare(source, out) == GIVE_UP
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no frame is left" in error
    assert "no Pixel3DMM tracking" in error
    assert "--retry" in error
    track(source, "anna", count=1)
    assert run_prepare(source, out, "--retry") == 0
    said = capsys.readouterr().out
    assert "1 people, 1 clips, 1 frames" in said
    assert "add --retry to the same command" in said
    track(source, "ben", count=1)
    assert run_prepare(source, out) == 0
    assert "prepared before; what was there is kept" in capsys.readouterr().out
    assert run_prepare(source, out, "--retry") == 0
    said = capsys.readouterr().out
    assert "2 people, 2 clips, 2 frames" in said
    assert "--retry" not in said


@pytest.mark.parametrize("every", [0, -2])
def test_every_out_of_range_claims_no_folder(tmp_path, capsys, every):
    write_portraits(tmp_path, "anna", "ben")
    assert run_prepare(tmp_path, tmp_path / "out", f"--every={every}") == GIVE_UP
    assert f"error: --every is {every}; expected 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_prepared_from_one_source_takes_nothing_of_another(tmp_path, capsys, monkeypatch):
    for name in ("one", "two"):
        write_portraits(tmp_path / name, "anna", "ben")
    assert run_prepare(tmp_path / "one", tmp_path / "out") == 0
    assert run_prepare(tmp_path / "two", tmp_path / "out") == GIVE_UP
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"was prepared with source {tmp_path}/one, not {tmp_path}/two" in error
    monkeypatch.chdir(tmp_path)
    assert run_prepare("one", "out") == 0


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("celebv_hq", "celebvhq_info.json does not exist"),
        ("celebv_text", "celebvtext_info.json does not exist"),
        ("hello3", "videos does not exist"),
        ("vfhq_test", "no folders of frames in it"),
        ("folder", "no folder inputs/"),
    ],
)
def test_another_folder_than_the_data_sets_gives_one_sentence(tmp_path, capsys, name, sentence):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    assert prepare.main([name, "--source", str(source), "--out", str(out)]) == TRY_AGAIN
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert sentence in error
    assert "\n" not in error
    assert not out.exists()


def test_a_list_of_clips_that_is_none(tmp_path, capsys):
    (tmp_path / "downloaded_celebvhq/processed").mkdir(parents=True)
    for content, sentence in (("{", "not valid JSON"), ('{"clips": 3}', 'expected {"clips"')):
        (tmp_path / "celebvhq_info.json").write_text(content)
        assert prepare.main(["celebv_hq", "--source", str(tmp_path), "--out", "x"]) == GIVE_UP
        assert sentence in capsys.readouterr().err


def test_real_portraits_through_shards(tmp_path, shared_dir):
    argv = ["folder", "--source", str(shared_dir / "real"), "--out", str(tmp_path)]
    assert prepare.main([*argv, "--workers", "1"]) == 0
    prepared = PreparedSet(tmp_path / "folder")
    assert len(prepared) == 2
    for i, name in enumerate(list_inputs(shared_dir / "real")):
        frame = prepared.frame(i)
        portrait = pixel3dmm.read_portrait(shared_dir / "real", name)
        np.testing.assert_array_equal(frame.cam2head, portrait.cam2head)
        np.testing.assert_array_equal(frame.mask, portrait.mask)
        assert np.abs(frame.image.astype(int) - portrait.image).mean() < 2  # JPEG

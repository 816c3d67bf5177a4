"""What is wrong with a multi-view capture costs what it concerns, and is named."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
from multi_view_sets import AZIMUTHS, CASES, TIMESTEPS, camera, clip_of, open_set, track, write_json

from data_pipelines import cameras, prepare
from data_pipelines.captures import SkipClip, SkippedFrame
from data_pipelines.datasets import ava256, cafca, nersemble
from data_pipelines.errors import TRY_AGAIN


def damage_json(path, change):
    def act(root):
        content = json.loads((root / path).read_text())
        change(content)
        write_json(root / path, content)

    return act


NERSEMBLE_CALIBRATION = "037/calibration/camera_params.json"
NERSEMBLE_COLOURS = "037/calibration/color_calibration.json"
NERSEMBLE_VIDEO = "037/sequences/EMO-1-shout+laugh/images/cam_{}.mp4"
AVA_DECODER = "20230831--0814--ADL311/decoder"


def write_bytes(path, content):
    return lambda root: (root / path).write_bytes(content)


@pytest.mark.parametrize(
    ("case", "damage", "sentence"),
    [
        (
            "nersemble",
            damage_json(NERSEMBLE_CALIBRATION, lambda c: c.pop("intrinsics")),
            "intrinsics: expected 3x3 numbers",
        ),
        (
            "nersemble",
            damage_json(NERSEMBLE_CALIBRATION, lambda c: c.pop("world_2_cam")),
            "expected world_2_cam",
        ),
        (
            "ava256",
            damage_json(f"{AVA_DECODER}/camera_calibration.json", lambda c: c["KRT"].append(3)),
            r'expected {"KRT": \[',
        ),
    ],
)
def test_what_all_cameras_share_leaves_the_clip_out_with_the_files_name(
    copy_of, case, damage, sentence
):
    module, _, _, sequence = CASES[case]
    root = copy_of(case)
    damage(root)
    with pytest.raises(SkipClip, match=sentence):
        clip_of(open_set(module, root), sequence)


@pytest.mark.parametrize(
    ("case", "name", "damage", "sentence"),
    [
        (
            "nersemble",
            "left",
            damage_json(NERSEMBLE_CALIBRATION, lambda c: c["world_2_cam"]["left"].pop()),
            "world_2_cam of left: expected 4x4 numbers",
        ),
        (
            "nersemble",
            "right",
            damage_json(NERSEMBLE_COLOURS, lambda c: c.pop("right")),
            "camera right has no colour correction",
        ),
        (
            "nersemble",
            "front",
            write_bytes(NERSEMBLE_VIDEO.format("front"), b"cut off"),
            "cam_front.mp4: does not decode as a video",
        ),
        (
            "nersemble",
            "right",
            write_bytes(
                "processing/037/EMO-1-shout+laugh/right/crop_ymin_ymax_xmin_xmax.npy", b"\x93NUMPY"
            ),
            "crop_ymin_ymax_xmin_xmax.npy: not a NumPy file",
        ),
        (
            "ava256",
            "front",
            damage_json(
                f"{AVA_DECODER}/camera_calibration.json",
                lambda c: c["KRT"][0].update(K=3),
            ),
            "K of camera front: expected 3x3 numbers",
        ),
        (
            "ava256",
            "left",
            damage_json(
                f"{AVA_DECODER}/camera_calibration.json",
                lambda c: c["KRT"][1].update(T=np.array(c["KRT"][1]["T"]).T.tolist()),
            ),
            "not transposed as published",
        ),
        (
            "ava256",
            "left",
            write_bytes(f"{AVA_DECODER}/image/camleft.zip", b"PK"),
            "camleft.zip: not a whole zip",
        ),
    ],
)
def test_what_is_wrong_with_a_camera_costs_its_frames_alone(copy_of, case, name, damage, sentence):
    module, _, _, sequence = CASES[case]
    root = copy_of(case)
    if case == "ava256":  # another camera that can place the head
        track(root, "ADL311", "EXP_jaw", "right")
    damage(root)
    frames = clip_of(open_set(module, root), sequence)
    reasons = [frame.reason for frame in frames if isinstance(frame, SkippedFrame)]
    assert len(reasons) == TIMESTEPS
    assert all(sentence in reason for reason in reasons)
    good = {(f.camera, f.timestep) for f in frames if not isinstance(f, SkippedFrame)}
    assert good == {(c, t) for c in AZIMUTHS if c != name for t in range(TIMESTEPS)}


def test_one_damaged_picture_of_a_zip_costs_its_frame_alone(copy_of):
    root = copy_of("ava256")
    path = root / AVA_DECODER / "image/camfront.zip"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("camfront/000123.avif").header_offset
    content = bytearray(path.read_bytes())
    content[start + 200] ^= 255
    path.write_bytes(content)
    frames = clip_of(open_set(ava256, root), "EXP_jaw")
    (reason,) = (frame.reason for frame in frames if isinstance(frame, SkippedFrame))
    assert "camfront.zip/camfront/000123.avif is damaged" in reason
    assert len(frames) == 3 * TIMESTEPS


@pytest.mark.parametrize("timestep", range(TIMESTEPS))
def test_a_tracking_the_code_is_not_taken_from_costs_its_own_frame_at_most(copy_of, timestep):
    """`right` has no mattes, so its frame needs no more than the tracker's segmentation."""
    root = copy_of("nersemble")
    tracking = f"tracking/037/EMO-1-shout+laugh/right/checkpoint/{timestep:05d}.frame"
    (root / tracking).write_bytes(b"PK broken")
    frames = clip_of(open_set(nersemble, root), "EMO-1-shout+laugh")
    assert not any(isinstance(frame, SkippedFrame) for frame in frames)
    assert len(frames) == 3 * TIMESTEPS


def test_the_tracking_that_the_code_is_taken_from_costs_its_moment_of_every_camera(copy_of):
    root = copy_of("nersemble")
    tracking = "tracking/037/EMO-1-shout+laugh/front/checkpoint/00001.frame"
    (root / tracking).write_bytes(b"PK broken")
    frames = clip_of(open_set(nersemble, root), "EMO-1-shout+laugh")
    reasons = [frame.reason for frame in frames if isinstance(frame, SkippedFrame)]
    assert len(reasons) == len(AZIMUTHS)
    assert all("00001.frame: not a whole file" in reason for reason in reasons)
    assert {f.timestep for f in frames if not isinstance(f, SkippedFrame)} == {0, 2}


def test_trackings_none_of_which_can_be_read_leave_the_clip_out(copy_of):
    root = copy_of("ava256")
    for path in root.glob("tracking/ADL311/EXP_jaw/front/checkpoint/*.frame"):
        path.write_bytes(b"PK broken")
    with pytest.raises(SkipClip, match=r"front/checkpoint/00000.frame: not a whole file"):
        clip_of(open_set(ava256, root), "EXP_jaw")


def test_a_missing_or_broken_picture_costs_its_frame(copy_of):
    root = copy_of("cafca")
    scene = root / "00000-00099/00007/00001_002"
    (scene / "color_image/left.png").unlink()
    (scene / "foreground_mask/right.png").write_bytes(b"\x89PNG")
    frames = clip_of(open_set(cafca, root), "002")
    reasons = [frame.reason for frame in frames if isinstance(frame, SkippedFrame)]
    assert reasons[0] == "its color_image or foreground_mask is missing"
    assert "right.png: does not decode" in reasons[1]
    assert len(reasons) == 2
    assert len(frames) == 3 * TIMESTEPS


def test_a_broken_camera_costs_its_frame_where_another_places_the_head(copy_of):
    root = copy_of("cafca")
    write_json(root / "00000-00099/00007/00001_002/cameras_json/front.json", {"K": 1})
    frames = clip_of(open_set(cafca, root), "002")
    (reason,) = (frame.reason for frame in frames if isinstance(frame, SkippedFrame))
    assert "front.json: K: expected 3x3 numbers" in reason
    assert len(frames) == 3 * TIMESTEPS


@pytest.mark.parametrize("case", CASES)
def test_another_folder_gives_one_sentence(tmp_path, case, capsys):
    assert (
        prepare.main([case, "--source", str(tmp_path), "--out", str(tmp_path / "out")]) == TRY_AGAIN
    )
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {tmp_path}: no ")
    assert not (tmp_path / "out").exists()


def test_a_head_outside_a_cameras_picture_costs_its_frames(copy_of):
    root = copy_of("cafca")
    for t in range(TIMESTEPS):
        path = root / f"00000-00099/00007/{t:05d}_002/cameras_json/right.json"
        away = camera("right").cam2world @ cameras.rigid(
            cameras.axis_angle(np.array([0, 1.0, 0]), 0.5), np.zeros(3)
        )
        fields = dataclasses.asdict(camera("right"))
        write_json(path, {"K": fields["K"].tolist(), "cam2world": away.tolist()})
    frames = clip_of(open_set(cafca, root), "002")
    reasons = [frame.reason for frame in frames if isinstance(frame, SkippedFrame)]
    assert reasons == ["the head is outside the picture"] * TIMESTEPS

"""Multi-view data sets in their published layouts: every camera must see the same head.

The look-alikes are photographed: coloured dots at known places of a moving head are drawn into each
photo by the calibration, and the tracker's files say what a tracker would make of one camera's
crop. Read back, each frame's camera must lead from those places to the dots.
"""

import argparse
import dataclasses
import io
import json
import shutil
import zipfile

import look_alikes
import numpy as np
import pytest
from PIL import Image

from data_pipelines import cameras, prepare
from data_pipelines.captures import SkipClip, SkippedFrame
from data_pipelines.datasets import ava256, cafca, nersemble
from data_pipelines.datasets.multi_view import Camera, head_pose
from data_pipelines.errors import TRY_AGAIN
from data_pipelines.frame import MULTI_VIEW
from data_pipelines.pixel3dmm import TrackedClip

DOTS = {0: (-0.05, 0.04, 0.05), 1: (0.05, 0.03, 0.045), 2: (0.0, -0.06, 0.05)}
"""Places in the head frame, metres, of a red, a green and a blue dot."""

WIDTH, HEIGHT, FOCAL = 220, 320, 800.0
AZIMUTHS = {"front": 5.0, "left": 55.0, "right": -40.0}
TIMESTEPS = 3

CAPTURE_WORLD = cameras.rigid(
    cameras.axis_angle(np.array([1.0, 2, 3]), 1.1), np.array([3.0, -1, 2])
)
"""The head is not near the world's origin, and the world's axes are no head's."""


def camera(name):
    place = cameras.orbit(AZIMUTHS[name], 8.0, 1.3, np.array([0.03, -0.05, 0.02]))
    K = np.array([[FOCAL, 0, WIDTH / 2 + 3], [0, FOCAL, HEIGHT / 2 - 2], [0, 0, 1]])
    return Camera(K, CAPTURE_WORLD @ place)


def head(timestep):
    R = cameras.axis_angle(np.array([0.2, 1.0, 0.1]), 0.2 * timestep - 0.1)
    return CAPTURE_WORLD @ cameras.rigid(R, np.array([0.02 * timestep, 0.01, -0.01 * timestep]))


def project(view, points):
    """Pixels of points in the head frame and their distance along the camera's axis."""
    K, cam2head = view
    p = np.append(np.atleast_2d(points), np.ones((len(np.atleast_2d(points)), 1)), 1)
    p = (p @ np.linalg.inv(cam2head).T)[:, :3]
    pixels = p @ np.asarray(K).T
    return pixels[:, :2] / pixels[:, 2:], p[:, 2]


def view_of(name, timestep):
    return camera(name).K, np.linalg.inv(head(timestep)) @ camera(name).cam2world


def photo(name, timestep):
    image = np.full((HEIGHT, WIDTH, 3), 90.0)
    y, x = np.indices((HEIGHT, WIDTH)) + 0.5
    places, _ = project(view_of(name, timestep), list(DOTS.values()))
    for channel, (u, v) in zip(DOTS, places, strict=True):
        disc = np.clip(6.5 - np.hypot(x - u, y - v), 0, 1)[..., None]
        image += disc * (np.eye(3)[channel] * 200 + 30 - image)
    return image.round().astype(np.uint8)


def foreground(name, timestep):
    ((u, v),), _ = project(view_of(name, timestep), np.zeros(3))
    y, x = np.indices((HEIGHT, WIDTH)) + 0.5
    return np.where(np.hypot(x - u, y - v) < 60, np.uint8(255), np.uint8(0))


def crop_of(name, timestep):
    """A square round the head, (ymin, ymax, xmin, xmax), not quite in its middle."""
    (u, v), distance = (a[0] for a in project(view_of(name, timestep), np.zeros(3)))
    side = round(0.26 * FOCAL / distance)
    ymin, xmin = round(v + 3 - side / 2), round(u - 2 - side / 2)
    return ymin, ymin + side, xmin, xmin + side


def tracker_sees(name, timestep, crop, focal_error=1.0):
    """A tracker's `.frame`: by a camera that looks straight at the middle of the crop."""
    K, cam2head = view_of(name, timestep)
    ymin, ymax, xmin, xmax = crop
    axis = np.linalg.inv(K) @ [(xmin + xmax) / 2, (ymin + ymax) / 2, 1.0]
    z = axis / np.linalg.norm(axis)
    x = np.cross([0.0, 1.0, 0.0], z)
    x /= np.linalg.norm(x)
    turned = cameras.rigid(np.stack([x, np.cross(z, x), z], 1), np.zeros(3))
    head2cam = np.linalg.inv(turned) @ np.linalg.inv(cam2head)
    # A focal length that is wrong shows the same picture from a distance wrong by as much.
    head2cam[2, 3] *= focal_error
    world = cameras.orbit(12.0, -4.0, 0.9, np.zeros(3))
    focal = FOCAL * np.linalg.norm(axis) / (ymax - ymin) * focal_error
    content = look_alikes.flame_frame(timestep, world, world @ head2cam, focal)
    content["camera"]["pp"][:] = 256 / 256.5 - 1  # the middle of 512 pixels
    return content


def track(root, person, sequence, name, timesteps=range(TIMESTEPS)):
    """As the tracker would: one crop for the clip, so the head moves about in it."""
    crop = crop_of(name, timesteps[0])
    frames = [tracker_sees(name, t, crop) for t in timesteps]
    look_alikes.write_tracking(root, f"{person}/{sequence}/{name}", crop, frames)


def write_nersemble(root):
    for t in range(TIMESTEPS):
        look_alikes.write_image(
            root / f"masks/037/EMO-1-shout+laugh/left/{t:05d}.png", foreground("left", t)
        )
    for name in AZIMUTHS:
        look_alikes.write_video(
            root / f"037/sequences/EMO-1-shout+laugh/images/cam_{name}.mp4",
            [photo(name, t) for t in range(TIMESTEPS)],
        )
        (root / "037/sequences/BACKGROUND/images").mkdir(parents=True, exist_ok=True)
    K = camera("front").K.copy()
    K[:2] *= 2200 / WIDTH
    poses = {name: np.linalg.inv(camera(name).cam2world).tolist() for name in AZIMUTHS}
    (root / "037/calibration").mkdir()
    write_json(
        root / "037/calibration/camera_params.json",
        {"world_2_cam": poses | {"not recorded": np.eye(4).tolist()}, "intrinsics": K.tolist()},
    )
    write_json(
        root / "037/calibration/color_calibration.json",
        {name: np.eye(3, 4).tolist() for name in AZIMUTHS},
    )
    track(root, "037", "EMO-1-shout+laugh", "front")
    track(root, "037", "EMO-1-shout+laugh", "right")


def write_ava256(root):
    decoder = root / "20230831--0814--ADL311/decoder"
    for folder in ("image", "segmentation_parts"):
        (decoder / folder).mkdir(parents=True)
    ids = [120, 123, 126]
    rows = ["seg_id,frame_id", "EXP_other,000007"] + [f"EXP_jaw,{i:06d}" for i in ids]
    (decoder / "frame_list.csv").write_text("\n".join(rows) + "\n")
    krt = []
    for name in AZIMUTHS:
        with zipfile.ZipFile(decoder / f"image/cam{name}.zip", "w") as archive:
            for t, i in enumerate(ids):
                archive.writestr(f"cam{name}/{i:06d}.avif", encoded(photo(name, t), "AVIF"))
        with zipfile.ZipFile(decoder / f"segmentation_parts/cam{name}.zip", "w") as archive:
            for t, i in enumerate(ids):
                region = np.where(foreground(name, t) > 0, np.uint8(3), np.uint8(0))
                archive.writestr(f"cam{name}/{i:06d}.png", encoded(region, "PNG"))
        K = camera(name).K.copy()
        K[:2] *= 2668 / WIDTH
        K[:2, 2] -= 0.5
        T = np.linalg.inv(camera(name).cam2world)
        T[:3, 3] *= 1000
        krt.append({"cameraId": name, "K": K.T.tolist(), "T": T.T.tolist()})
    write_json(decoder / "camera_calibration.json", {"KRT": krt})
    track(root, "ADL311", "EXP_jaw", "front")


def write_cafca(root):
    for t in range(TIMESTEPS):
        scene = root / f"00000-00099/00007/{t:05d}_002"
        for name in AZIMUTHS:
            look_alikes.write_image(scene / f"color_image/{name}.png", photo(name, t))
            look_alikes.write_image(scene / f"foreground_mask/{name}.png", foreground(name, t))
            (scene / "cameras_json").mkdir(exist_ok=True)
            fields = {"K": camera(name).K.tolist(), "cam2world": camera(name).cam2world.tolist()}
            write_json(scene / f"cameras_json/{name}.json", fields | {"focal_length": FOCAL})
        track(root, "00007", f"{t:05d}_002", "front", [t])
        track(root, "00007", f"{t:05d}_002", "left", [t])


def write_json(path, content):
    path.write_text(json.dumps(content))


def encoded(image, kind):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def open_set(module, root, *argv):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    (captures,) = module.capture_sets(parser.parse_args(["--source", str(root), *argv]))
    return captures


CASES = {
    "nersemble": (nersemble, write_nersemble, "037", "EMO-1-shout+laugh"),
    "ava256": (ava256, write_ava256, "ADL311", "EXP_jaw"),
    "cafca": (cafca, write_cafca, "00007", "002"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of each data set, written once."""
    folders = {case: tmp_path_factory.mktemp(case) for case in CASES}
    for case, (_, write, _, _) in CASES.items():
        write(folders[case])
    return folders


@pytest.fixture
def copy_of(written, tmp_path):
    """Copies a data set to a folder that a test may spoil."""
    return lambda case: shutil.copytree(written[case], tmp_path / "source", dirs_exist_ok=True)


def clip_of(captures, sequence):
    (i,) = (i for i, p in enumerate(captures.performances) if p.sequence == sequence)
    return list(captures.clip(i))


@pytest.mark.parametrize("case", CASES)
def test_every_camera_leads_to_the_dots_on_the_head(written, case):
    module, _, person, sequence = CASES[case]
    frames = clip_of(open_set(module, written[case]), sequence)
    assert {(f.camera, f.timestep) for f in frames} == {
        (name, t) for name in AZIMUTHS for t in range(TIMESTEPS)
    }
    for frame in frames:
        assert (frame.person, frame.sequence, frame.source) == (person, sequence, MULTI_VIEW)
        places, _ = project((frame.K * [[512], [512], [1]], frame.cam2head), list(DOTS.values()))
        for channel, place in zip(DOTS, places, strict=True):
            others = np.delete(frame.image.astype(float), channel, axis=-1).max(-1)
            dot = np.clip(frame.image[..., channel] - others - 60, 0, None)
            y, x = np.indices(dot.shape) + 0.5
            seen = np.array([(x * dot).sum(), (y * dot).sum()]) / dot.sum()
            np.testing.assert_allclose(seen, place, atol=3.0)  # of 512, 1.2 pixels of the photo
        # The head is in the middle and as large as in the tracker's widened crops.
        origin, distance = project((frame.K, frame.cam2head), np.zeros(3))
        np.testing.assert_allclose(origin[0], 0.5, atol=0.01)
        np.testing.assert_allclose(distance[0] / frame.K[0, 0], 0.31, rtol=0.01)
        # The code is of the tracked camera before the face, whichever camera's frame it is.
        exp = look_alikes.flame_frame(frame.timestep)["flame"]["exp"][0]
        np.testing.assert_array_equal(frame.expression[:100], exp)


@pytest.mark.parametrize("case", ["ava256", "cafca"])
def test_masks_come_from_the_data_set(written, case):
    module, _, _, sequence = CASES[case]
    for frame in clip_of(open_set(module, written[case]), sequence):
        radius = 60 / (0.31 * FOCAL / 1.3) * 512
        y, x = np.indices((512, 512)) - 255.5
        distance = np.hypot(x, y)
        assert (frame.mask[distance < radius - 12] > 250).all()
        assert (frame.mask[distance > radius + 12] < 5).all()


def test_nersemble_takes_mattes_or_the_trackers_segmentation_as_mask(copy_of):
    root = copy_of("nersemble")
    (root / "masks/037/EMO-1-shout+laugh/left/00002.png").unlink()
    (root / "masks/037/EMO-1-shout+laugh/left/00001.png").write_bytes(b"\x89PNG")
    frames = clip_of(open_set(nersemble, root), "EMO-1-shout+laugh")
    skipped = [frame.reason for frame in frames if isinstance(frame, SkippedFrame)]
    assert "left/00001.png: does not decode" in skipped[0]
    assert skipped[1:] == ["its camera has neither mattes nor a tracking"]
    by_camera = {f.camera: f for f in frames if not isinstance(f, SkippedFrame)}
    matte = by_camera["left"].mask
    assert matte[256, 256] == 255
    assert matte[5, 5] == 0
    # The look-alike tracker calls columns 100 to 400 of its 512 the foreground, from row 60 on.
    crop = crop_of("front", 0)
    edge = crop[2] + 100 / 512 * (crop[3] - crop[2])
    K, _ = view_of("front", by_camera["front"].timestep)
    left = by_camera["front"].K[0, 2] - (K[0, 2] - edge) * by_camera["front"].K[0, 0] / K[0, 0]
    row = by_camera["front"].mask[256]
    assert row[round(512 * left) + 6] == 255
    assert row[round(512 * left) - 6] == 0


def test_every_takes_every_nth_moment_of_all_cameras(written):
    frames = clip_of(open_set(cafca, written["cafca"], "--every", "2"), "002")
    assert {frame.timestep for frame in frames} == {0, 2}
    assert len(frames) == 2 * len(AZIMUTHS)


def test_a_performance_without_tracking_is_left_out(written):
    captures = open_set(ava256, written["ava256"])
    (other,) = (i for i, p in enumerate(captures.performances) if p.sequence == "EXP_other")
    with pytest.raises(SkipClip, match="none of its cameras has a Pixel3DMM tracking"):
        list(captures.clip(other))


@pytest.mark.parametrize("case", CASES)
def test_shards_of_every_data_set(written, tmp_path, case, capsys):
    argv = [case, "--source", str(written[case]), "--out", str(tmp_path), "--workers", "1"]
    assert prepare.main(argv) == 0
    assert f"1 people, 1 clips, {3 * TIMESTEPS} frames" in capsys.readouterr().out


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


def test_colour_correction_is_a_polynomial_in_linear_light():
    """Against the formula for each colour, within a level of 255 (Cheung et al. 2004)."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (40, 50, 3), np.uint8)
    for terms in (3, 4, 5, 7, 8, 10, 11, 14):
        matrix = np.eye(3, terms) + rng.uniform(-0.08, 0.08, (3, terms))
        r, g, b = np.moveaxis(linear(colours / 255), -1, 0)
        one = np.ones_like(r)
        products = [r, g, b]
        products += {
            3: [],
            4: [one],
            5: [r * g * b, one],
            7: [r * g, r * b, g * b, one],
            8: [r * g, r * b, g * b, r * g * b, one],
            10: [r * g, r * b, g * b, r**2, g**2, b**2, one],
            11: [r * g, r * b, g * b, r**2, g**2, b**2, r * g * b, one],
            14: [r * g, r * b, g * b, r**2, g**2, b**2, r * g * b, r**3, g**3, b**3, one],
        }[terms]
        expected = np.clip(np.einsum("ct,thw->hwc", matrix, np.stack(products)), 0, 1)
        expected = 255 * np.where(
            expected <= 0.0031308, 12.92 * expected, 1.055 * expected ** (1 / 2.4) - 0.055
        )
        corrected = Image.fromarray(colours).filter(nersemble.colour_correction(matrix))
        difference = np.abs(np.asarray(corrected) - expected)
        assert np.quantile(difference, 0.99) < 1.5
        assert difference.mean() < 0.6


def linear(srgb):
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


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

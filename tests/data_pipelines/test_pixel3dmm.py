"""Tracked pictures, clips and performances, as the published FLEX-1 expects them."""

import look_alikes
import numpy as np
import pytest
from PIL import Image

from data_pipelines import cameras, media, pixel3dmm
from data_pipelines.crop import WidenedCrop
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.frame import expression_part
from data_pipelines.tracker_folders import list_inputs


def test_published_crop_camera_and_code(shared_dir):
    """marble_sculpture as the authors' code reads it."""
    parity = np.load(shared_dir / "flex1/parity.npz")
    portrait = pixel3dmm.read_portrait(shared_dir / "real", "marble_sculpture")
    published = np.asarray(Image.open(shared_dir / "flex1/input.png").convert("RGB"))
    np.testing.assert_array_equal(portrait.image, published)
    np.testing.assert_allclose(portrait.cam2head, parity["cam2flame"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(portrait.K, parity["K"], rtol=1e-7)
    np.testing.assert_array_equal(portrait.expression, parity["expr"][0, 0])
    assert 0.5 < (portrait.mask > 127).mean() < 0.6


def test_real_landmarks_lie_on_the_real_head(shared_dir):
    """The eyes that a landmark detector saw are where camera and head pose put FLAME's."""
    for name in ("marble_sculpture", "asian_watercolor_girl"):
        portrait = pixel3dmm.read_portrait(shared_dir / "real", name)
        landmarks = np.load(shared_dir / f"real/processing/{name}/PIPnet_landmarks/00000.npy")
        eyes = (landmarks[[96, 97]] + 0.1) / 1.2  # pupils: his right, his left
        head = np.array([[-0.031, 0.02, 0.045, 1], [0.031, 0.02, 0.045, 1]])
        camera = head @ np.linalg.inv(portrait.cam2head).T
        pixels = camera[:, :3] @ portrait.K.T
        np.testing.assert_allclose(pixels[:, :2] / pixels[:, 2:], eyes, atol=0.05)


def test_cameras_and_codes_come_out_of_the_trackers_conventions(tmp_path):
    cam2world = cameras.orbit(-40.0, 10.0, 1.2, np.array([0.1, 0.0, 0.0]))
    R = cameras.axis_angle(np.array([0.2, 1.0, -0.3]), 0.7)
    head2world = cameras.rigid(R, np.array([0.05, 0.02, -0.01]))
    content = look_alikes.flame_frame(3, cam2world, head2world, focal=3.0)
    look_alikes.write_frame(tmp_path / "00000.frame", content)
    tracking = pixel3dmm.read_tracking(tmp_path / "00000.frame")
    np.testing.assert_allclose(tracking.head2world, head2world, atol=1e-6)
    np.testing.assert_allclose(tracking.cam2world, cam2world, atol=1e-6)
    np.testing.assert_allclose(tracking.cam2head, np.linalg.inv(head2world) @ cam2world, atol=1e-6)
    pp = content["camera"]["pp"][0].astype(float)
    expected = [[1536, 0, 256.5 * (1 + pp[0])], [0, 1536, 256.5 * (1 + pp[1])], [0, 0, 1]]
    np.testing.assert_allclose(tracking.K, expected, rtol=1e-12)
    for part in ("exp", "eyes", "eyelids", "neck", "jaw", "R", "t"):
        np.testing.assert_array_equal(
            tracking.expression[expression_part(part)], content["flame"][part][0]
        )


def test_the_head_pose_is_a_rotation_even_where_the_trackers_is_not_quite(tmp_path):
    content = look_alikes.flame_frame()
    content["joint_transforms"][0, 1, :3, :3] *= 1.01
    look_alikes.write_frame(tmp_path / "00000.frame", content)
    R = pixel3dmm.read_tracking(tmp_path / "00000.frame").head2world[:3, :3]
    np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)


@pytest.fixture
def clip(tmp_path):
    """A tracked clip of five frames that get brighter, without its input."""
    frames = [look_alikes.flame_frame(seed) for seed in range(5)]
    look_alikes.write_tracking(tmp_path, "clip", (20, 120, 30, 130), frames)
    photos = [look_alikes.photo(160, 140) // 4 + np.uint8(40 * t) for t in range(5)]
    return tmp_path, photos


@pytest.mark.parametrize("kind", ["video", "folder"])
def test_every_frame_of_a_clip_with_its_own_camera_and_code(clip, kind):
    root, photos = clip
    if kind == "video":
        look_alikes.write_video(root / "inputs/clip.mp4", photos)
    else:
        for t, photo in enumerate(photos):
            look_alikes.write_image(root / f"inputs/clip/IMG_{1000 + 7 * t}.png", photo)
    frames = list(pixel3dmm.read_clip(root, "clip"))
    assert [t for t, _ in frames] == [0, 1, 2, 3, 4]
    for t, portrait in frames:
        code = look_alikes.flame_frame(t)["flame"]["exp"][0]
        np.testing.assert_array_equal(portrait.expression[:100], code)
        brightness = portrait.image.mean() - frames[0][1].image.mean()
        assert abs(brightness - 40 * t) < 6
    last = pixel3dmm.read_portrait(root, "clip", timestep=4)
    np.testing.assert_array_equal(last.image, frames[4][1].image)


def test_the_wrappers_folders_in_between_are_found(clip):
    root, photos = clip
    look_alikes.write_image(root / "inputs/clip.png", photos[0])
    expected = pixel3dmm.read_portrait(root, "clip")
    for kind, folder in [("processing", "tracking"), ("tracking", "tracking_nV1_noPho_uv2000.0")]:
        (root / kind / "clip").rename(root / kind / "moved")
        (root / kind / "clip").mkdir()
        (root / kind / "moved").rename(root / kind / "clip" / folder)
    np.testing.assert_array_equal(pixel3dmm.read_portrait(root, "clip").image, expected.image)


STOCK = "tracking/clip_nV1_noPho_uv2000.0_n1000.0"
"""Where the stock tracker writes: its settings are added to the clip's name."""


def test_the_stock_trackers_folder_is_found(clip):
    root, photos = clip
    look_alikes.write_image(root / "inputs/clip.png", photos[0])
    expected = pixel3dmm.read_portrait(root, "clip")
    (root / "tracking/clip").rename(root / STOCK)
    (root / "tracking/clip_2_nV1_noPho_uv2000.0_n1000.0/checkpoint").mkdir(parents=True)
    np.testing.assert_array_equal(pixel3dmm.read_portrait(root, "clip").image, expected.image)


def test_of_two_trackings_none_is_taken_unasked(clip):
    root, photos = clip
    look_alikes.write_image(root / "inputs/clip.png", photos[0])
    (root / STOCK / "checkpoint").mkdir(parents=True)
    with pytest.raises(UserError, match=r"tracking/clip and .*clip_nV1.* move away all but") as e:
        pixel3dmm.read_portrait(root, "clip")
    assert "\n" not in str(e.value)


def test_a_real_performance(shared_dir):
    driving = pixel3dmm.read_driving(shared_dir / "real/driving/EMO-1-shout+laugh")
    assert driving.expression.shape == (121, 135)
    assert driving.K.shape == (121, 3, 3)
    # One still camera about a metre away, in front of a head that moves a little.
    centres = driving.cam2head[:, :3, 3]
    np.testing.assert_allclose(np.linalg.norm(centres, axis=1), 1.0, atol=0.1)
    assert (driving.cam2head[:, 2, 2] < -0.9).all()
    # Frames in order: the performance is smooth.
    steps = np.linalg.norm(np.diff(driving.expression, axis=0), axis=1)
    shuffled = driving.expression[np.random.default_rng(0).permutation(121)]
    assert steps.mean() < 0.5 * np.linalg.norm(np.diff(shuffled, axis=0), axis=1).mean()


def remove(pattern):
    def act(root):
        for path in root.glob(pattern):
            path.unlink()

    return act


def write(path, content):
    return lambda root: (root / path).write_bytes(content)


def change_frame(change):
    def act(root):
        content = look_alikes.flame_frame()
        change(content)
        look_alikes.write_frame(root / "tracking/clip/checkpoint/00000.frame", content)

    return act


def save_crop(*crop):
    path = "processing/clip/crop_ymin_ymax_xmin_xmax.npy"
    return lambda root: np.save(root / path, np.array(crop))


HUGE_CROPS = [(-(10**9), 10**9, 0, 100), (0, 100, -(2**62), 2**62)]


def declare(dtype, shape):
    """A crop's file whose header says that it holds something else."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117)
    content = b"\x93NUMPY\x01\x00" + bytes([118, 0]) + header.encode() + b"\n" + bytes(32)
    return write("processing/clip/crop_ymin_ymax_xmin_xmax.npy", content)


def segment(picture):
    path = "processing/clip/seg_og/00000.png"
    return lambda root: look_alikes.write_image(root / path, picture)


def set_field(group, name, value):
    return change_frame(lambda content: content[group].__setitem__(name, value))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (remove("inputs/*"), "no inputs/clip"),
        (remove("tracking/*/*/*"), r"no \.frame files"),
        (remove("processing/*/crop*"), "clip has no crop"),
        (remove("processing/*/seg_og/*"), r"seg_og/00000\.png: no such file"),
        (write("inputs/clip.png", b"\x89PNG"), r"clip\.png: does not decode"),
        (write("tracking/clip/checkpoint/00000.frame", b"PK"), "not a whole file"),
        (save_crop(20, 120, 30), "expected four whole numbers"),
        (save_crop(20, 10, 30, 40), r"the crop \[20, 10, 30, 40\] .* is empty"),
        (save_crop(620, 720, 30, 130), "outside the photo of 160x140"),
        (set_field("flame", "exp", np.zeros((1, 50), np.float32)), r"flame/exp has"),
        (set_field("flame", "jaw", None), "no field flame/jaw"),
        (
            set_field("camera", "t_base_0", np.full((1, 3), np.nan, np.float32)),
            "camera/t_base_0 holds values that are not finite",
        ),
        (change_frame(lambda c: c.pop("camera")), "no field camera/fl"),
        *((save_crop(*crop), "is in no photo") for crop in HUGE_CROPS),
        (save_crop(-15_000, 15_000, -15_000, 15_000), "is over 3 times the photo of 160x140"),
        (declare("<i8", "(1099511627776,)"), "declares 8796093022208 bytes of int64 and holds 32"),
        (declare("|O", "(4,)"), "holds Python objects"),
        (set_field("flame", "R", np.zeros((1, 6), np.float32)), "flame/R is no rotation"),
        (set_field("flame", "neck", np.zeros((1, 6), np.float32)), "flame/neck is no rotation"),
        (set_field("flame", "R", np.ones((1, 6), np.float32)), "flame/R is no rotation"),
        (set_field("camera", "R_base_0", np.zeros((1, 3, 3), np.float32)), "R_base_0 is no rot"),
        (set_field("camera", "fl", np.array([[0.0]])), "a focal length is 0.2 to 100"),
        (set_field("camera", "fl", np.array([[-2.5]])), "a focal length is 0.2 to 100"),
        (set_field("camera", "t_base_0", np.full((1, 3), 1e30)), r"t_base_0 reaches 1e\+30"),
        (set_field("flame", "exp", np.full((1, 100), 1e30)), r"flame/exp reaches 1e\+30"),
        (change_frame(lambda c: c["joint_transforms"].fill(0)), "joint_transforms is no rotation"),
        (segment(np.zeros((512, 512), np.uint8)), "no pixel is foreground"),
        (segment(np.full((512, 512), 255, np.uint8)), "no pixel is foreground"),
        (segment(look_alikes.photo(512, 512)), "a picture in colour"),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_one_sentence(clip, damage, sentence):
    root, photos = clip
    look_alikes.write_image(root / "inputs/clip.png", photos[0])
    damage(root)
    with pytest.raises(UserError, match=sentence) as caught:
        pixel3dmm.read_portrait(root, "clip")
    assert "\n" not in str(caught.value)


def test_a_portrait_without_tracking(tmp_path):
    look_alikes.write_image(tmp_path / "inputs/me.jpg", look_alikes.photo(64, 64))
    assert list(list_inputs(tmp_path)) == ["me"]
    with pytest.raises(MissingFileError, match="me has no tracking, expected tracking/me/checkp"):
        pixel3dmm.read_portrait(tmp_path, "me")


def test_a_video_that_is_not_the_tracked_one(clip):
    root, photos = clip
    look_alikes.write_video(root / "inputs/clip.mp4", photos[:3])
    with pytest.raises(UserError, match="tracked up to frame 4, but its input ends before"):
        list(pixel3dmm.read_clip(root, "clip"))


def test_a_video_that_does_not_decode(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video at all" * 100)
    with pytest.raises(UserError, match="does not decode as a video"):
        list(media.read_video(tmp_path / "clip.mp4"))


def test_a_folder_without_performance(tmp_path):
    with pytest.raises(MissingFileError, match=r"no \.frame files"):
        pixel3dmm.read_driving(tmp_path)


def test_a_gap_in_a_performance_is_named_and_other_files_are_not_played(tmp_path):
    for name in ("00003", "00004", "best", "00004 copy"):
        look_alikes.write_frame(tmp_path / f"{name}.frame")
    assert len(pixel3dmm.read_driving(tmp_path).expression) == 2
    look_alikes.write_frame(tmp_path / "00008.frame")
    with pytest.raises(UserError, match=r"00005\.frame is missing between others, 3 in all"):
        pixel3dmm.read_driving(tmp_path)


def test_hair_goes_on_over_the_margin_of_real_portraits(shared_dir):
    """The parser leaves the outermost rows and columns empty: those must not be extended."""
    for name in list_inputs(shared_dir / "real"):
        clip = pixel3dmm.TrackedClip(shared_dir / "real", name)
        mask = pixel3dmm.read_portrait(shared_dir / "real", name).mask > 127
        crop = WidenedCrop.of(clip.crop, 1536)
        side = crop.ymax - crop.ymin
        top, left = (round(512 * m / (1.2 * side)) for m in (crop.top, crop.left))
        inside = (clip.mask(0) > 0)[3:-3, 3:-3]
        assert inside[0].mean() > 0.5  # hair reaches the crop's upper edge
        columns = mask[:, left:-left]
        assert columns[: top - 1].mean() == pytest.approx(inside[0].mean(), abs=0.03)
        rows = mask[top : round(top + 512 / 1.2)]
        assert rows[:, : left - 1].mean() == pytest.approx(inside[:, 0].mean(), abs=0.03)


def test_classes_beyond_the_parsers_are_not_the_person(clip):
    root, photos = clip
    look_alikes.write_image(root / "inputs/clip.png", photos[0])
    path = root / "processing/clip/seg_og/00000.png"
    segmentation = np.asarray(Image.open(path)).copy()
    before = pixel3dmm.read_portrait(root, "clip").mask
    segmentation[segmentation == 0] = 255
    look_alikes.write_image(path, segmentation)
    np.testing.assert_array_equal(pixel3dmm.read_portrait(root, "clip").mask, before)

"""Tracked pictures, clips and performances, as the published FLEX-1 expects them."""

import os

import look_alikes
import numpy as np
import pytest
from PIL import Image

from data_pipelines import cameras, media, pixel3dmm
from data_pipelines.crop import WidenedCrop
from data_pipelines.errors import MissingFileError, UserError
from data_pipelines.frame import expression_part

# Where the tracker's crop, (ymin, ymax, xmin, xmax), lies in a photo 300 wide and 400 high.
CROPS = {
    "inside": (100, 300, 60, 260),
    "past the top": (5, 205, 60, 260),
    "past the left": (100, 300, 3, 203),
    "past the right": (100, 300, 90, 290),
    "past the bottom": (190, 390, 60, 260),
    "starting above the photo": (-30, 170, 60, 260),
    "ending below the photo": (230, 430, 60, 260),
    "past all edges": (0, 400, -50, 350),
    "a tenth that is not whole": (101, 298, 60, 257),
    "past top and bottom, not whole": (3, 398, -40, 355),
    "wider than high": (100, 250, 40, 260),
    "higher than wide": (90, 350, 80, 230),
}
PHOTO_HEIGHT, PHOTO_WIDTH = 400, 300


def widened(name):
    return WidenedCrop.of(np.array(CROPS[name]), PHOTO_HEIGHT)


@pytest.mark.parametrize("name", CROPS)
def test_the_crop_grows_by_a_tenth_of_its_height_and_never_past_the_bottom(name):
    ymin, ymax, _, _ = CROPS[name]
    crop, tenth = widened(name), (ymax - ymin) // 10
    assert crop.left == crop.right == tenth
    assert crop.top + crop.bottom == 2 * tenth
    assert ymax + crop.bottom == min(ymax + tenth, PHOTO_HEIGHT)


@pytest.mark.parametrize("name", CROPS)
def test_the_image_is_the_photo_padded_white_cut_and_resized(name):
    photo = look_alikes.photo(PHOTO_WIDTH, PHOTO_HEIGHT)
    crop = widened(name)
    padded = np.pad(photo, [(500, 500), (500, 500), (0, 0)], constant_values=255)
    y0, y1 = 500 + crop.ymin - crop.top, 500 + crop.ymax + crop.bottom
    x0, x1 = 500 + crop.xmin - crop.left, 500 + crop.xmax + crop.right
    expected = Image.fromarray(padded[y0:y1, x0:x1]).resize((512, 512), Image.Resampling.BILINEAR)
    image = crop.cut_image(photo)
    np.testing.assert_array_equal(image, np.asarray(expected))
    assert (image[-1, 256] < 255).all()  # the photo reaches down to the last row
    assert (image[0] == 255).all() == (y0 < 499)
    assert (image[:, 0] == 255).all() == (x0 < 499)
    assert (image[:, -1] == 255).all() == (x1 > 501 + PHOTO_WIDTH)


@pytest.mark.parametrize("name", CROPS)
def test_a_pixel_of_the_photo_lands_where_K_says(name):
    crop = widened(name)
    height, width = crop.ymax - crop.ymin, crop.xmax - crop.xmin
    K = np.array([[1200.0, 0, 250], [0, 1200, 262], [0, 0, 1]])
    for part in [(0.25, 0.4), (0.5, 0.6), (0.6, 0.3)]:
        y, x = int(crop.ymin + part[0] * height), int(crop.xmin + part[1] * width)
        photo = np.full((PHOTO_HEIGHT, PHOTO_WIDTH, 3), 255, np.uint8)
        photo[y - 4 : y + 5, x - 4 : x + 5] = 0
        seen = centre_of_mass(255.0 - crop.cut_image(photo)[..., 0])
        # The ray through that pixel by the tracker's K, and where the widened K sends it.
        pixel = np.array([(x + 0.5 - crop.xmin) / width, (y + 0.5 - crop.ymin) / height]) * 512
        said = 512 * (crop.widen_K(K) @ np.linalg.inv(K) @ [*pixel, 1.0])[:2]
        if height != width:  # squeezed; the published arithmetic is for the height
            np.testing.assert_allclose(seen[1], said[1], atol=0.05)
        elif height % 10 == 0:
            np.testing.assert_allclose(seen, said, atol=0.05)
        else:  # margins are whole pixels of the photo; the published arithmetic takes a tenth
            np.testing.assert_allclose(seen, said, atol=512 / (1.2 * height))


@pytest.mark.parametrize("name", CROPS)
def test_exact_K_to_the_pixel_for_every_crop_and_the_whole_photo(name):
    crop = widened(name)
    K = np.array([[1200.0, 0, 250], [0, 1200, 262], [0, 0, 1]])
    boxes = [crop]
    if crop.ymin >= 0 and crop.ymax <= PHOTO_HEIGHT and crop.xmin >= 0:
        boxes.append(WidenedCrop.to_box(CROPS[name], (0, PHOTO_HEIGHT, 0, PHOTO_WIDTH)))
    height, width = crop.ymax - crop.ymin, crop.xmax - crop.xmin
    y, x = int(crop.ymin + 0.4 * height), int(crop.xmin + 0.45 * width)
    photo = np.full((PHOTO_HEIGHT, PHOTO_WIDTH, 3), 255, np.uint8)
    photo[y - 4 : y + 5, x - 4 : x + 5] = 0
    pixel = np.array([(x + 0.5 - crop.xmin) / width, (y + 0.5 - crop.ymin) / height]) * 512
    for box in boxes:
        seen = centre_of_mass(255.0 - box.cut_image(photo)[..., 0])
        said = 512 * (box.place_K(K) @ np.linalg.inv(K) @ [*pixel, 1.0])[:2]
        np.testing.assert_allclose(seen, said, atol=0.05)
    if height == width and height % 10 == 0:
        np.testing.assert_allclose(crop.place_K(K), crop.widen_K(K), rtol=1e-12)


def centre_of_mass(weights):
    """The mean position (x, y) of an image's weights; a pixel's centre is at a half."""
    y, x = np.indices(weights.shape) + 0.5
    return np.array([(x * weights).sum(), (y * weights).sum()]) / weights.sum()


@pytest.mark.parametrize("name", CROPS)
def test_K_follows_by_the_published_arithmetic(name):
    ymin, ymax, _, _ = CROPS[name]
    offset = int(0.1 * (ymax - ymin))
    missing = max(0, ymax + offset - PHOTO_HEIGHT)
    K = widened(name).widen_K(np.array([[1600.0, 0, 255], [0, 1600, 257], [0, 0, 1]]))
    f = 1600 / 1.2 / 512
    cx = (255 + 51.2) / 1.2 / 512
    cy = (257 + (offset + missing) * 512 / (ymax - ymin)) / 1.2 / 512
    np.testing.assert_allclose(K, [[f, 0, cx], [0, f, cy], [0, 0, 1]], rtol=1e-12)


@pytest.mark.parametrize("name", CROPS)
def test_the_mask_covers_what_it_covered_and_goes_on_over_the_margin(name):
    """A photo that is its own mask: constant past the crop, as the margin's nearest pixel is."""
    ymin, ymax, xmin, xmax = CROPS[name]
    crop = widened(name)
    size = (xmax - xmin, ymax - ymin)
    y, x = np.indices((512, 512)) / 512
    smooth = (127 + 60 * np.sin(5 * x + 1) + 60 * np.cos(4 * y)).astype(np.uint8)
    in_photo = np.asarray(Image.fromarray(smooth).resize(size, Image.Resampling.BILINEAR))
    everywhere = np.pad(in_photo, 1000, mode="edge")
    y0, y1 = 1000 - crop.top, 1000 + size[1] + crop.bottom
    x0, x1 = 1000 - crop.left, 1000 + size[0] + crop.right
    expected = Image.fromarray(everywhere[y0:y1, x0:x1]).resize((512, 512), Image.BILINEAR)
    difference = np.abs(crop.extend_mask(smooth) - np.asarray(expected, float))
    assert difference.max() <= 4  # grey levels, of the 240 that the mask spans
    assert difference.mean() < 0.7


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
    assert list(pixel3dmm.list_inputs(tmp_path)) == ["me"]
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
    for name in pixel3dmm.list_inputs(shared_dir / "real"):
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


@pytest.mark.parametrize("name", ["Title [id]", "what?", "a*b", "[", "half)("])
def test_names_with_the_characters_of_patterns(tmp_path, name):
    root = tmp_path / name
    look_alikes.write_image(root / f"inputs/{name}.jpg", look_alikes.photo(160, 140))
    look_alikes.write_tracking(root, name, (20, 120, 30, 130), [look_alikes.flame_frame()])
    assert list(pixel3dmm.list_inputs(root)) == [name]
    assert pixel3dmm.read_portrait(root, name).image.shape == (512, 512, 3)
    assert len(pixel3dmm.read_driving(root / "tracking" / name).expression) == 1


@pytest.mark.parametrize("written", ["me.", "me._nV1_noPho_uv2000.0_n1000.0", "me_nV1_noPho"])
def test_names_as_the_tracker_cuts_them(tmp_path, written):
    """Of me.jpeg it strips four characters."""
    look_alikes.write_image(tmp_path / "inputs/me.jpeg", look_alikes.photo(160, 140))
    look_alikes.write_tracking(tmp_path, "me.", (20, 120, 30, 130), [look_alikes.flame_frame()])
    (tmp_path / "tracking/me.").rename(tmp_path / "tracking" / written)
    assert pixel3dmm.read_portrait(tmp_path, "me").mask.any()


def test_the_published_repositorys_tree(tmp_path):
    look_alikes.write_image(tmp_path / "inputs/itw/me.png", look_alikes.photo(160, 140))
    home = tmp_path / "pixel3dmm_processing"
    frames = [look_alikes.flame_frame()]
    look_alikes.write_tracking(home, "itw/me/tracking", (20, 120, 30, 130), frames)
    (home / "tracking/itw/me/tracking").rename(home / "tracking/itw/me/tracking_nV1_noPho")
    assert list(pixel3dmm.list_inputs(tmp_path)) == ["me"]
    assert pixel3dmm.read_portrait(tmp_path, "me").mask.any()


def test_folders_where_the_trackers_own_variables_say(tmp_path, monkeypatch):
    look_alikes.write_image(tmp_path / "mine/inputs/me.png", look_alikes.photo(160, 140))
    frames = [look_alikes.flame_frame()]
    look_alikes.write_tracking(tmp_path / "theirs", "me", (20, 120, 30, 130), frames)
    monkeypatch.setenv("PIXEL3DMM_PREPROCESSED_DATA", str(tmp_path / "theirs/processing"))
    monkeypatch.setenv("PIXEL3DMM_TRACKING_OUTPUT", str(tmp_path / "theirs/tracking"))
    assert pixel3dmm.read_portrait(tmp_path / "mine", "me").mask.any()


def test_a_name_that_is_not_utf8_is_named(tmp_path):
    look_alikes.write_image(tmp_path / "inputs/me.png", look_alikes.photo(16, 16))
    (tmp_path / "inputs/me.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/inputs/\xff.png"))
    with pytest.raises(UserError, match=r"a file name there is not UTF-8, .*xff\.png.*; rename it"):
        pixel3dmm.list_inputs(tmp_path)

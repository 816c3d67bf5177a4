"""What avatars are made from: the input that was given, and frames spread evenly."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import UserError
from data_pipelines.shards import PreparedSet
from flexavatar_jax.avatars import observations
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


def retouched(real, kind):
    """The real portrait's photograph as another kind of picture."""
    photo = Image.open(real / "inputs" / "marble_sculpture.jpg")
    if kind == "16-bit":
        wide = np.asarray(photo.convert("L")).astype(np.uint16) * 257
        return Image.fromarray(wide), ".png"
    if kind == "tiny":
        return photo.resize((10, 15)), ".png"
    return photo.convert({"grey": "L", "CMYK": "CMYK", "transparent": "RGBA"}[kind]), {
        "CMYK": ".tif",
        "transparent": ".png",
        "grey": ".png",
    }[kind]


@pytest.mark.parametrize("kind", ["grey", "CMYK", "16-bit", "transparent"])
def test_pictures_of_every_kind_look_the_same(kind, folders, shared_dir):
    real = shared_dir / "real"
    expected = read_observations([str(real / "inputs" / "marble_sculpture.jpg")]).images[0]
    picture, suffix = retouched(real, kind)
    path = folders / "inputs" / f"marble_sculpture{suffix}"
    picture.save(path)
    found = read_observations([str(path)]).images[0]
    if kind in ("grey", "16-bit"):
        expected = np.asarray(Image.fromarray(expected).convert("L"))[..., None]
    assert np.abs(found.astype(int) - expected).mean() < 2


def test_a_picture_that_was_not_the_one_tracked_is_named(folders, shared_dir):
    picture, suffix = retouched(shared_dir / "real", "tiny")
    path = folders / "inputs" / f"marble_sculpture{suffix}"
    picture.save(path)
    with pytest.raises(UserError, match="the photo of 10x15; is it the one tracked"):
        read_observations([str(path)])


def test_a_note_on_turning_the_picture_is_not_followed_as_the_tracker_does_not(folders, shared_dir):
    """Pixel3DMM saves inputs anew, without EXIF, and counts in the pixels of what it saved."""
    photo = shared_dir / "real" / "inputs" / "marble_sculpture.jpg"
    path = folders / "inputs" / "marble_sculpture.png"
    with Image.open(photo) as picture:
        exif = picture.getexif()
        exif[0x0112] = 6  # orientation: turn by 90 degrees
        picture.save(path, exif=exif)
    with Image.open(path) as picture:
        assert picture.getexif()[0x0112] == 6
    found, expected = read_observations([str(path)]), read_observations([str(photo)])
    np.testing.assert_array_equal(found.images[0], expected.images[0])


def test_more_pictures_than_memory_holds_are_named_before_they_are_read(tiny_data, monkeypatch):
    monkeypatch.setattr(observations, "free_host_memory", lambda: 20_000)
    person = f"{tiny_data}/procedural_test/test_00000"
    assert len(read_observations([person], 2).images) == 2
    with pytest.raises(UserError, match=r"3 images of 32 pixels take .* give a smaller --images"):
        read_observations([person], 3)


def test_of_a_prepared_persons_frames_the_pictures_are_the_chosen_ones(tiny_data):
    data = PreparedSet(tiny_data / "procedural_multiview")
    name = str(data.index.person[0])
    found = read_observations([f"{tiny_data}/procedural_multiview/{name}"], 3)
    frames = [data.frame(i) for i in range(*data.index.clip_start[:2])]
    for i, image, mask in zip(found.seen, found.images, found.masks, strict=True):
        (frame,) = (
            f
            for f in frames
            if np.array_equal(f.cam2head, found.cam2heads[i])
            and np.array_equal(f.expression, found.expressions[i])
        )
        np.testing.assert_array_equal(image, frame.image)
        np.testing.assert_array_equal(mask, frame.mask)


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff\xe0 not a photo", b"GIF89a"])
def test_a_corrupt_picture_is_named(content, folders):
    path = folders / "inputs" / "marble_sculpture.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"marble_sculpture\.jpg"):
        read_observations([str(path)])


def test_a_missing_mask_is_named(shared_dir, tmp_path):
    real = shared_dir / "real"
    (tmp_path / "inputs").symlink_to(real / "inputs")
    (tmp_path / "tracking").symlink_to(real / "tracking")
    processing = tmp_path / "processing" / "marble_sculpture"
    processing.mkdir(parents=True)
    crop = "crop_ymin_ymax_xmin_xmax.npy"
    (processing / crop).symlink_to(real / "processing" / "marble_sculpture" / crop)
    with pytest.raises(UserError, match=r"seg_og/00000\.png"):
        read_observations([str(tmp_path / "inputs" / "marble_sculpture.jpg")])


def test_a_video_without_tracking_is_named(tmp_path):
    (tmp_path / "inputs").mkdir()
    (tmp_path / "inputs" / "me.mp4").write_bytes(b"video")
    with pytest.raises(UserError, match=r"me has no tracking.*run Pixel3DMM on it first"):
        read_observations([str(tmp_path / "inputs" / "me.mp4")])

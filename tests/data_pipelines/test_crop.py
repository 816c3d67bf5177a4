"""The tracker's crop, widened: what of a photo it shows, and how intrinsics and mask follow."""

import look_alikes
import numpy as np
import pytest
from PIL import Image

from data_pipelines.crop import WidenedCrop

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

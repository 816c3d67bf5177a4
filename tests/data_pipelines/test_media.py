"""Pictures of every kind come out as they look, and portraits are sized as in training."""

from __future__ import annotations

import io

import look_alikes
import numpy as np
import pytest
from PIL import Image

from data_pipelines import media
from data_pipelines.errors import UserError


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_what_the_mask_leaves_out_is_white():
    image = look_alikes.photo(32, 32)
    assert (media.prepare_input(image, np.zeros((32, 32), np.uint8), 16) == 1).all()
    whole = media.prepare_input(image, np.full((32, 32), 255, np.uint8), 32)
    np.testing.assert_allclose(whole, image / 255, atol=1e-6)


def test_pictures_of_16_bits_keep_their_greys():
    grey = np.arange(0, 65536, 256, np.uint16).reshape(16, 16)
    read = media.decode_image(encoded(Image.fromarray(grey)), "grey.png")
    np.testing.assert_array_equal(read, np.repeat((grey >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(kind):
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.paste((200, 200, 200, 255), (0, 0, 2, 4))
    read = media.decode_image(encoded(picture.convert(kind)), "logo.png")
    assert (read[:, 2:] == 255).all()
    assert (read[:, :2] == 200).all()


@pytest.mark.parametrize("kind", ["I", "F"])
def test_pictures_whose_white_is_not_known_are_named(kind):
    with pytest.raises(UserError, match=r"depth\.tif: its pixels are of .* 32 bits"):
        media.decode_image(encoded(Image.new(kind, (4, 4)), "TIFF"), "depth.tif")


@pytest.mark.parametrize("suffix", media.PICTURES)
def test_every_ending_of_a_picture_is_read(tmp_path, suffix):
    picture = np.full((16, 16, 3), 120, np.uint8)
    Image.fromarray(picture).save(tmp_path / f"x{suffix}")
    np.testing.assert_allclose(media.read_image(tmp_path / f"x{suffix}"), picture, atol=3)


def test_a_picture_too_large_to_read_is_named():
    content = encoded(Image.new("1", (16320, 12240)))
    with pytest.raises(UserError, match=r"big\.png: a picture of more than 89 megapixels; scale"):
        media.decode_image(content, "big.png")


def test_postscript_is_not_run_whatever_its_name():
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(UserError, match=r"me\.jpg: does not decode as a picture \(it is none"):
        media.decode_image(content, "me.jpg")


def test_classes_are_the_numbers_of_a_palette_not_its_colours(tmp_path):
    numbers = np.arange(16, dtype=np.uint8).reshape(4, 4)
    palette = Image.fromarray(numbers, "P")
    palette.putpalette(bytes(reversed(range(48))))
    for picture in (palette, Image.fromarray(numbers), Image.fromarray(numbers).convert("RGB")):
        picture.save(tmp_path / "seg.png")
        np.testing.assert_array_equal(media.read_classes(tmp_path / "seg.png"), numbers)


def test_a_drawing_of_the_classes_is_refused(tmp_path):
    look_alikes.write_image(tmp_path / "seg.png", look_alikes.photo(8, 8))
    with pytest.raises(UserError, match=r"seg\.png: a picture in colour"):
        media.read_classes(tmp_path / "seg.png")

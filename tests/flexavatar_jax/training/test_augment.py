"""Finishing a batch: the colour operations' definitions, and what is put on what."""

import colorsys
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_captures import frame

from data_pipelines.batch import Batch
from data_pipelines.media import prepare_input
from data_pipelines.record import decode_frame, encode_frame, parse_fields, serialize_fields
from flexavatar_jax.training.augment import finish_batch, jitter_colours

IDENTITY = (1.0, 1.0, 1.0, 0.0)


@pytest.fixture
def image() -> np.ndarray:
    image = np.random.default_rng(0).random((6, 7, 3), np.float32)
    image[0, 0], image[0, 1], image[0, 2] = 0.0, 1.0, 0.5  # hue is undefined on greys
    return image


def luma(image):
    return image @ np.array([0.2989, 0.587, 0.114])


def jittered(image, **changes):
    names = ("brightness", "contrast", "saturation", "hue")
    values = dict(zip(names, IDENTITY, strict=True)) | changes
    return np.asarray(jitter_colours(image, jnp.array([values[n] for n in names])))


def test_identity_changes_nothing(image):
    np.testing.assert_allclose(jittered(image), image, atol=1e-6)


@pytest.mark.parametrize("factor", [0.6, 1.5])
def test_brightness_scales(image, factor):
    expected = np.clip(factor * image, 0, 1)
    np.testing.assert_allclose(jittered(image, brightness=factor), expected, atol=1e-6)


@pytest.mark.parametrize("factor", [0.6, 2.5])
def test_contrast_scales_about_the_mean_luma(image, factor):
    grey = luma(image).mean()
    expected = np.clip(factor * image + (1 - factor) * grey, 0, 1)
    np.testing.assert_allclose(jittered(image, contrast=factor), expected, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.5])
def test_saturation_scales_about_each_pixels_luma(image, factor):
    expected = np.clip(factor * image + (1 - factor) * luma(image)[..., None], 0, 1)
    np.testing.assert_allclose(jittered(image, saturation=factor), expected, atol=1e-6)


@pytest.mark.parametrize("turn", [-0.1, 0.07, 0.5])
def test_hue_turns_as_in_colorsys(image, turn):
    def turned(pixel):
        h, s, v = colorsys.rgb_to_hsv(*map(float, pixel))
        return colorsys.hsv_to_rgb((h + turn) % 1.0, s, v)

    expected = np.apply_along_axis(turned, -1, image)
    np.testing.assert_allclose(jittered(image, hue=turn), expected, atol=1e-5)


def batch(apply: bool) -> Batch:
    rng = np.random.default_rng(1)
    B, T, H = 2, 3, 8
    made = Batch.empty(B, T, H)
    made.input_image[:] = rng.integers(0, 256, (B, H, H, 3), dtype=np.uint8)
    made.input_mask[:] = rng.integers(0, 256, (B, H, H), dtype=np.uint8)
    made.input_mask[:, 0], made.input_mask[:, 1] = 0, 255
    made.target_image[:] = made.input_image[:, None]
    made.target_mask[:] = made.input_mask[:, None]
    made.background[:] = rng.random((B, 3))
    made.jitter[:], made.jittered[:] = (1.2, 0.8, 1.5, 0.05), apply
    made.source[:] = 0, 1
    return made


def test_input_is_put_on_white_and_targets_on_the_examples_background():
    raw = batch(apply=False)
    done = jax.jit(finish_batch)(raw)
    expected = raw.input_image[:, 1].astype(np.float32) / 255
    np.testing.assert_allclose(done.input_image[:, 1], expected, atol=1e-6)
    np.testing.assert_allclose(done.input_image[:, 0], 1.0)
    for t in range(3):
        np.testing.assert_allclose(done.target_image[:, t, 1], expected, atol=1e-6)
        behind = np.broadcast_to(raw.background[:, None], (2, 8, 3))
        np.testing.assert_allclose(done.target_image[:, t, 0], behind, atol=1e-6)
    alpha = raw.input_mask[..., None] / 255
    mixed = alpha * raw.input_image / 255 + (1 - alpha)
    np.testing.assert_allclose(done.input_image, mixed, atol=1e-6)
    np.testing.assert_allclose(done.target_mask, raw.target_mask / 255, atol=1e-6)
    assert done.source.tolist() == [0, 1]


def test_input_and_targets_of_an_example_get_the_same_jitter():
    raw = batch(apply=True)
    raw.jitter[1] = (0.7, 1.3, 0.6, -0.1)
    done = finish_batch(raw)
    solid = raw.input_mask == 255
    for t in range(3):
        np.testing.assert_allclose(
            done.target_image[:, t][solid], done.input_image[solid], atol=1e-6
        )
    for b in range(2):
        expected = jitter_colours(raw.input_image[b] / np.float32(255), raw.jitter[b])
        np.testing.assert_allclose(
            done.input_image[b][solid[b]], np.asarray(expected)[solid[b]], atol=1e-6
        )


def test_jitter_is_left_out_where_it_does_not_apply():
    raw = batch(apply=False)
    raw.jittered[0] = True
    done = finish_batch(raw)
    solid = raw.input_mask == 255
    plain = raw.input_image / 255
    assert np.abs(done.input_image[0] - plain[0])[solid[0]].mean() > 0.02
    np.testing.assert_allclose(done.input_image[1][solid[1]], plain[1][solid[1]], atol=1e-6)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_inference_prepares_a_portrait_as_training_does(size):
    """Through a shard (of PNGs, as JPEG loses), its resizing and the step's compositing."""
    portrait = frame(size=64)
    lossless = io.BytesIO()
    Image.fromarray(portrait.image).save(lossless, "PNG")
    fields = parse_fields(encode_frame(portrait)) | {"image": lossless.getvalue()}
    stored = decode_frame(serialize_fields(fields), size)
    made = Batch.empty(1, 1, size)
    made.input_image[:], made.input_mask[:], made.jittered[:] = stored.image, stored.mask, False
    np.testing.assert_allclose(
        prepare_input(portrait.image, portrait.mask, size),
        finish_batch(made).input_image[0],
        atol=1e-6,
    )

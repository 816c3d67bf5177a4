"""A rig: maps that add up to what the decoder makes of expressions."""

import numpy as np
import pytest
from lively_model import lively_avatar, lively_model

from data_pipelines.frame import MULTI_VIEW, neutral_code
from data_pipelines.procedural.performance import perform
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.export.rig import build_rig, decoder_of, ends_of, sample
from flexavatar_jax.avatars.sliders import move, sliders_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def scene():
    """Sliders, decoder, a performance and the rig of them all."""
    loaded = lively_model()
    sliders = sliders_of(loaded.config)
    decode = decoder_of(loaded.model, lively_avatar().code, MULTI_VIEW)
    clip = perform(np.random.default_rng(0), 9)
    pairs = [("jaw open", "smile"), ("smile", "brows up")]
    rig = build_rig(loaded.model, decode, neutral_code(), sliders, {"talk": clip}, pairs=pairs)
    return loaded, sliders, decode, clip, rig


def error(found, expected, neutral) -> float:
    """Of the maps, relative to how far they are from rest."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected - neutral)


def test_maps_are_what_the_decoder_samples_its_gaussians_from(scene):
    loaded, _, decode, clip, _ = scene
    found = sample(loaded.model, decode(clip[:2]))
    expected = Animator(loaded).gaussians(lively_avatar().code, clip[:2])
    for name in ("means", "quats", "scales", "opacities"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-5)


def covered(rig, maps):
    return maps * np.any(rig.components != 0, axis=(0, 3))[..., None]


def test_sliders_at_their_ends_are_as_decoded(scene):
    _, sliders, decode, _, rig = scene
    for slider in sliders:
        for end in ends_of(slider):
            (expected,) = decode(move(neutral_code(), sliders, {slider.name: end})[None])
            found = rig.maps(rig.coefficients({slider.name: end}))
            found, expected, rest = (covered(rig, x) for x in (found, expected, rig.neutral))
            assert error(found, expected, rest) < 0.03, (slider.name, end)


def test_frames_of_a_performance_are_as_decoded(scene):
    _, _, decode, clip, rig = scene
    found, expected = rig.maps(rig.clips["talk"]), decode(clip[:4])
    assert rig.clips["talk"].shape[0] == len(clip)
    assert error(covered(rig, found[:4]), covered(rig, expected), covered(rig, rig.neutral)) < 0.02


def test_two_sliders_at_once_are_corrected(scene):
    loaded, sliders, decode, _, corrected = scene
    plain = build_rig(loaded.model, decode, neutral_code(), sliders, {})
    values = {"jaw open": 25.0, "smile": 2.0}
    (expected,) = decode(move(neutral_code(), sliders, values)[None])
    errors = [
        error(covered(rig, rig.maps(rig.coefficients(values))), covered(rig, expected),
              covered(rig, rig.neutral))
        for rig in (plain, corrected)
    ]  # fmt: skip
    assert errors[1] < 0.03 < errors[0]


def test_corrections_fade_out_with_either_slider(scene):
    *_, rig = scene
    near = rig.coefficients({"jaw open": 25.0, "smile": 1e-6})
    np.testing.assert_allclose(near, rig.coefficients({"jaw open": 25.0}), atol=1e-4)


def test_fewer_components_are_the_strongest(scene):
    loaded, sliders, decode, clip, full = scene
    small = build_rig(
        loaded.model, decode, neutral_code(), sliders, {"talk": clip}, max_components=8
    )
    assert small.components.shape[0] == 8 < full.components.shape[0]
    expected = decode(clip[:4])
    found = small.maps(small.clips["talk"][:4])
    assert error(covered(full, found), covered(full, expected), covered(full, full.neutral)) < 0.5

"""Multi-view data sets in their published layouts: every camera must see the same head.

The look-alikes are photographed: coloured dots at known places of a moving head are drawn into each
photo by the calibration, and the tracker's files say what a tracker would make of one camera's
crop. Read back, each frame's camera must lead from those places to the dots.
"""

import look_alikes
import numpy as np
import pytest
from multi_view_sets import (
    AZIMUTHS,
    CASES,
    DOTS,
    FOCAL,
    TIMESTEPS,
    clip_of,
    crop_of,
    open_set,
    project,
    view_of,
)
from PIL import Image

from data_pipelines import prepare
from data_pipelines.captures import SkipClip, SkippedFrame
from data_pipelines.datasets import ava256, cafca, nersemble
from data_pipelines.frame import MULTI_VIEW


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

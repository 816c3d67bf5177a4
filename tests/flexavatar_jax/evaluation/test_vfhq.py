"""VFHQ's protocol: the first frame is the source; its own motion drives it, or another clip's."""

import json

import numpy as np
import pytest
from PIL import Image

from flexavatar_jax.evaluation.vfhq import PUBLISHED, evaluate_vfhq, print_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")


def read_tiles(path):
    """Truths, self-reenactment, drivers and cross-reenactment of two frames, 20 pixels a side."""
    rows = np.asarray(Image.open(path)).reshape(4, 20, 3, 20, 3).swapaxes(1, 2) / 255
    return rows[:, 1:]


def test_the_protocol_measures_every_clip_and_shows_both_reenactments(rule_run, tiny_data, capsys):
    metrics = evaluate_vfhq(rule_run, data_root=str(tiny_data), dataset="procedural_monocular")
    assert json.loads((rule_run / "vfhq" / "metrics.json").read_text()) == metrics
    pictures = sorted((rule_run / "vfhq").glob("*.png"))
    assert len(pictures) == metrics["clips"] == 4
    psnr = []
    for picture in pictures:
        truths, found, drivers, driven = read_tiles(picture)
        psnr += [-10 * np.log10(np.mean((a - b) ** 2)) for a, b in zip(found, truths, strict=True)]
        assert np.abs(found - driven).max() > 0.02
        assert np.abs(drivers - truths).max() > 0.1  # another person
    assert metrics["psnr"] == pytest.approx(np.mean(psnr), abs=0.05)
    print_rows(metrics)
    said = capsys.readouterr().out
    assert f"| {PUBLISHED['psnr']:g} | {PUBLISHED['ssim']:g} |" in said
    assert said.count("not measured") == 3  # LPIPS, CSIM and AKD

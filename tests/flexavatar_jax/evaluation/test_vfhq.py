"""VFHQ's protocol: the first frame is the source; its own motion drives it, or another clip's."""

import json

import numpy as np
import onnx_files
import pytest
from PIL import Image

from flexavatar_jax.evaluation import face_crops
from flexavatar_jax.evaluation.vfhq import PUBLISHED, centre_K, evaluate_vfhq, print_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")


def read_tiles(path):
    """Truths, self-reenactment, drivers and cross-reenactment of two frames, 20 pixels a side."""
    rows = np.asarray(Image.open(path)).reshape(4, 20, 3, 20, 3).swapaxes(1, 2) / 255
    return rows[:, 1:]


def test_the_protocol_measures_every_clip_and_shows_both_reenactments(
    rule_run, tiny_data, capsys, tmp_path
):
    metrics = evaluate_vfhq(
        rule_run,
        data_root=str(tiny_data),
        dataset="procedural_monocular",
        csim=str(onnx_files.embedding_file(tmp_path / "r50.onnx")),
        akd=str(onnx_files.pipnet_file(tmp_path / "pipnet.onnx")),
    )
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
    assert "| 0.828 | 3.007 |" in said
    assert said.count("not measured") == 1  # LPIPS
    assert f"| {metrics['csim']:.3f} | {metrics['akd']:.3f} |" in said
    assert metrics["faces"] == 2 * metrics["clips"]


def test_a_camera_of_the_crop_sees_the_same_point_of_the_same_face():
    cam2head = np.diag([1.0, -1.0, -1.0, 1.0])
    cam2head[2, 3] = 1.0
    K = np.array([[3.0, 0, 0.45], [0, 3.0, 0.55], [0, 0, 1]])
    whole = face_crops.project(face_crops.FACE_POINTS, cam2head, K, 24)
    piece = face_crops.project(face_crops.FACE_POINTS, cam2head, centre_K(K, 24), 20)
    np.testing.assert_allclose(piece, whole - 2)

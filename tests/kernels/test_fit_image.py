"""The example: Gaussians become a picture."""

import numpy as np
import pytest
from PIL import Image

from kernels import rasterize
from kernels.examples import fit_image
from kernels.ply import read_ply


@pytest.fixture
def picture(tmp_path):
    """A red disc on a gradient, 40 by 30."""
    y, x = np.mgrid[:30, :40]
    pixels = np.stack([x / 40, y / 30, 0.5 + 0 * x], -1)
    pixels[(x - 25) ** 2 + (y - 12) ** 2 < 50] = [0.9, 0.1, 0.1]
    path = tmp_path / "disc.png"
    Image.fromarray(np.uint8(255 * pixels)).save(path)
    return path


def test_a_picture_is_fitted_and_its_gaussians_render_as_it(picture, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(picture), "--out", str(out), "--gaussians", "200", "--steps", "60"]
    assert fit_image.main([*arguments, "--size", "40"]) == 0
    assert "PSNR" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["disc_fit.ply", "disc_fit.png"]

    both = np.asarray(Image.open(out / "disc_fit.png"), np.float32) / 255
    target, fitted = both[:, :40], both[:, 40:]
    np.testing.assert_allclose(target, np.asarray(Image.open(picture)) / 255, atol=0.003)
    assert -10 * np.log10(np.mean((fitted - target) ** 2)) > 25

    K = np.diag([2 * 40.0, 2 * 40.0, 1.0])
    again = rasterize(*read_ply(out / "disc_fit.ply"), np.eye(4), K, width=40, height=30)
    np.testing.assert_allclose(np.clip(again.color, 0, 1), fitted, atol=0.004)


def test_what_is_not_a_picture_is_an_error_in_a_sentence(tmp_path, capsys):
    path = tmp_path / "notes.jpg"
    path.write_text("not a picture")
    assert fit_image.main([str(path)]) == 1
    assert f"error: {path}: not a picture that can be read" in capsys.readouterr().err
    assert fit_image.main([str(tmp_path / "gone.jpg")]) == 1
    assert "gone.jpg" in capsys.readouterr().err

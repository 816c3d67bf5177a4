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
    again = rasterize(*read_ply(out / "disc_fit.ply")[:5], np.eye(4), K, width=40, height=30)
    np.testing.assert_allclose(np.clip(again.color, 0, 1), fitted, atol=0.004)


def test_pictures_are_upright_and_on_white(tmp_path):
    lying = Image.new("RGB", (40, 20), "red")
    exif = lying.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    lying.save(tmp_path / "lying.png", exif=exif)
    assert fit_image.load_picture(tmp_path / "lying.png", 40).shape == (40, 20, 3)

    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(fit_image.load_picture(tmp_path / "clear.png", 8), 1.0)

    Image.new("L", (8, 8), 51).save(tmp_path / "grey.png")
    np.testing.assert_allclose(fit_image.load_picture(tmp_path / "grey.png", 8), 0.2)


@pytest.mark.parametrize(("height", "width"), [(1, 256), (256, 1), (30, 40)])
def test_thin_pictures_too_start_with_about_as_many_gaussians_as_asked_for(height, width):
    means = np.asarray(fit_image.start(10, height, width)["means"])
    assert 8 <= len(means) <= 12
    assert (means[:, :2] > 0).all()
    assert (means[:, :2] < [1, height / width]).all()


def test_a_folder_that_cannot_be_written_is_named_before_the_fit(picture, capsys, monkeypatch):
    monkeypatch.setattr(fit_image, "fit", None)
    assert fit_image.main([str(picture), "--out", "/proc/fits"]) == 1
    assert capsys.readouterr().err.startswith("error: --out /proc/fits: cannot be written to (")


def test_what_is_not_a_picture_is_an_error_in_a_sentence(picture, tmp_path, capsys, monkeypatch):
    def error_of(path, *arguments):
        assert fit_image.main([str(path), *arguments]) == 1
        return capsys.readouterr().err.strip()

    path = tmp_path / "notes.jpg"
    path.write_text("not a picture")
    assert error_of(path) == f"error: {path}: not a picture that can be read"
    assert error_of(tmp_path / "gone.jpg") == f"error: {tmp_path / 'gone.jpg'}: no such file"
    path = tmp_path / "damaged.png"
    path.write_bytes(picture.read_bytes()[:-60])
    assert error_of(path).startswith(f"error: {path}: damaged (")
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(path)
    assert error_of(path) == f"error: {path}: more than 8 bits a channel; convert it to 8 first"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    assert error_of(picture).startswith(f"error: {picture}: too large (")
    with pytest.raises(SystemExit, match="2"):
        fit_image.main([str(picture), "--gaussians", "0"])
    assert "--gaussians is 0; expected 1 or more" in capsys.readouterr().err

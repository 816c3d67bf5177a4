"""The example: Gaussians become a scene, by 3DGS-MCMC."""

import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kernels import rasterize
from kernels.examples import captures, fit_scene, mcmc
from kernels.ply import SH_C0, read_ply


@pytest.fixture(scope="module")
def capture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capture")
    captures.write_synthetic(folder, size=24, views=10)
    return folder


def test_a_capture_is_fitted_and_its_ply_renders_as_it(
    capture_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(fit_scene, "FIRST_RELOCATION", 20)
    monkeypatch.setattr(fit_scene, "RELOCATE_EVERY", 20)
    arguments = [str(capture_folder), "--out", str(tmp_path / "out"), "--size", "24"]
    arguments += ["--gaussians", "400", "--steps", "400", "--sh-degree", "1"]
    assert fit_scene.main(arguments) == 0
    psnr = float(capsys.readouterr().out.split()[1])
    assert psnr > 18
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["held_out.png", "scene.ply"]

    cloud = read_ply(tmp_path / "out" / "scene.ply")
    assert cloud.sh.shape == (400, 4, 3)
    held_out = captures.read_capture(capture_folder, 24).held_out
    assert len(held_out.pictures) == 2
    again = rasterize(
        *cloud[:4], None, held_out.viewmats[0], held_out.Ks[0], sh=cloud.sh, width=24, height=24
    )
    pair = np.asarray(Image.open(tmp_path / "out" / "held_out.png"))[:24] / 255
    np.testing.assert_allclose(pair[:, :24], held_out.pictures[0] / 255, atol=1e-6)
    np.testing.assert_allclose(pair[:, 24:], np.clip(again.color, 0, 1), atol=0.004)


@pytest.mark.parametrize(
    ("line", "coeffs"),
    [
        ("OPENCV 24 24 28.8 28.8 12 12 -0.3 0.1 0.02 0.03", ([-0.3, 0.1], [0.02, 0.03])),
        ("OPENCV_FISHEYE 24 24 28.8 28.8 12 12 -0.3 0.1 0.2 0", ([-0.3, 0.1, 0.2], [])),
    ],
)
def test_pictures_through_lenses_that_distort_are_fitted_as_they_are(
    capture_folder, tmp_path, line, coeffs
):
    """The Gaussians that made the pictures look like them, and training goes on from there."""
    shutil.copytree(capture_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "sparse" / "0" / "cameras.txt").write_text(f"1 {line}\n")
    capture = captures.read_capture(tmp_path, 24)
    balls = captures._balls(np.random.default_rng(0))
    radial, tangential = (np.float32(a) for a in coeffs)
    model = "fisheye" if "FISHEYE" in line else "pinhole"
    out = rasterize(
        *balls, np.float32(capture.held_out.viewmats), np.float32(capture.held_out.Ks),
        radial_coeffs=radial, tangential_coeffs=tangential, camera_model=model,
        width=24, height=24,
    )  # fmt: skip
    held_out = capture.held_out._replace(pictures=np.uint8(np.clip(out.color, 0, 1) * 255 + 0.5))
    means, quats, scales, opacities, colors = balls
    parameters = {
        **{"means": means, "quats": quats, "scales": np.log(scales)},
        "opacities": np.log(opacities / (1 - opacities)),
        "sh0": (colors[:, None] - 0.5) / SH_C0,
        "shN": np.zeros((len(means), 0, 3), np.float32),
    }
    parameters = {name: jnp.asarray(a, jnp.float32) for name, a in parameters.items()}
    psnr, _ = fit_scene.evaluate(parameters, held_out, capture.camera_model)
    straight, _ = fit_scene.evaluate(parameters, capture.held_out, capture.camera_model)
    assert psnr > 45 > 35 > straight
    start = mcmc.start(capture.points, capture.colors, 100, 1, np.random.default_rng(0))
    fitted = fit_scene.fit(capture._replace(training=held_out), 100, 20, 1)
    before, after = (
        fit_scene.evaluate(p, held_out, capture.camera_model)[0] for p in (start, fitted)
    )
    assert after > before


@pytest.mark.slow
def test_ten_thousand_gaussians_pass_28_db_on_pictures_held_out(tmp_path, capsys):
    arguments = ["--synthetic", "--out", str(tmp_path), "--gaussians", "10000"]
    assert fit_scene.main([*arguments, "--steps", "2000", "--size", "128"]) == 0
    assert float(capsys.readouterr().out.split()[1]) > 28


def test_pictures_must_be_there_of_one_size_and_inside(capture_folder, tmp_path, capsys):
    def error_of(folder):
        assert fit_scene.main([str(folder), "--out", str(tmp_path / "out")]) == 1
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert "expected a COLMAP model" in error_of(tmp_path)
    model, images = tmp_path / "sparse" / "0", tmp_path / "images"
    model.mkdir(parents=True)
    images.mkdir()
    for path in (capture_folder / "sparse" / "0").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    assert error_of(tmp_path).endswith("images/000.png: no such file")
    for path in (capture_folder / "images").iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (24, 12)).save(images / "003.png")
    message = error_of(tmp_path)
    assert "003.png: 24x12 pixels, and its camera has 24x24; expected the picture" in message
    with (model / "cameras.txt").open("a") as file:
        file.write("2 PINHOLE 24 12 28.8 28.8 12 6\n")
    text = (model / "images.txt").read_text()
    (model / "images.txt").write_text(text.replace(" 1 003.png", " 2 003.png"))
    assert "003.png: 1024x512 pixels when scaled" in error_of(tmp_path)
    (model / "images.txt").write_text(text.replace(" 000.png", " ../images/000.png"))
    assert "a picture is called '../images/000.png'" in error_of(tmp_path)
    (model / "images.txt").write_text(text.replace(" 000.png", " \x1b[2J\u202e0.png"))
    assert error_of(tmp_path).endswith(r"images/\x1b[2J\u202e0.png: no such file")
    (model / "images.txt").write_text("".join(text.splitlines(keepends=True)[:2]))
    assert "has 1 picture; expected 2 or more" in error_of(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        fit_scene.main(["--out", str(tmp_path)])
    assert "expected either a folder or --synthetic" in capsys.readouterr().err


def test_pictures_are_not_turned_as_exif_says(tmp_path):
    """COLMAP's cameras are those of the pixels in the file; copies are off by a pixel a side."""
    images, model = tmp_path / "images", tmp_path / "sparse" / "0"
    images.mkdir()
    model.mkdir(parents=True)
    (model / "cameras.txt").write_text("1 PINHOLE 400 301 350 350 200 150\n")
    (model / "images.txt").write_text("".join(f"{i} 1 0 0 0 0 0 0 1 {i}.png\n\n" for i in range(2)))
    (model / "points3D.txt").write_text("1 0 0 2 9 9 9 0\n")
    lying = Image.new("RGB", (40, 31))
    lying.paste("red", (0, 0, 20, 31))
    exif = lying.getexif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    for i in range(2):
        lying.save(images / f"{i}.png", exif=exif)
    views = captures.read_capture(tmp_path, 40).training
    assert views.pictures.shape == (1, 31, 40, 3)
    assert views.pictures[0, 15, 5].tolist() == [255, 0, 0]
    np.testing.assert_allclose(views.Ks[0, 0, [0, 2]], [35, 20])
    lying.rotate(90, expand=True).save(images / "1.png")
    with pytest.raises(ValueError, match=r"1\.png: 31x40 pixels, and its camera has 400x301; exp"):
        captures.read_capture(tmp_path, 40)


def test_shares_have_the_papers_opacities_and_scales():
    """Up to the most a Gaussian is shared among, and of one whose opacity is 1 in float32."""
    opacities = np.array([0.3, 0.9, 0.6, 0.99, 0.5, 1 - 2e-9, 1 - 2e-9])
    number = np.array([2, 3, 1, 40, 51, 51, 30])
    logits = jnp.asarray(np.log(opacities / (1 - opacities)), jnp.float32)
    assert jax.nn.sigmoid(logits)[-1] == 1
    opacity, factor = mcmc.share(jax.nn.sigmoid(logits), jnp.asarray(number))
    for i, (o, n) in enumerate(zip(opacities, number, strict=True)):
        o = min(o, mcmc.MOST_OPAQUE)
        new = 1 - (1 - o) ** (1 / n)
        total = math.fsum(
            math.comb(j - 1, k) * (-1) ** k * new ** (k + 1) / math.sqrt(k + 1)
            for j in range(1, n + 1)
            for k in range(j)
        )
        np.testing.assert_allclose([opacity[i], factor[i]], [new, o / total], rtol=1e-3)


def test_the_dead_move_to_the_living_and_learn_anew():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(50, 3))
    parameters = mcmc.start(points, rng.uniform(size=(50, 3)), 40, 4, rng)
    parameters["opacities"] = jnp.where(jnp.arange(40) < 10, -9.0, 1.0)
    optimiser = mcmc.optimiser(100, 1.0)
    moments = optimiser.init(parameters)
    _, moments = optimiser.update(jax.tree.map(jnp.ones_like, parameters), moments)
    after, moments, moved = jax.jit(mcmc.relocate)(parameters, moments, jax.random.key(0))
    assert int(moved) == 10
    assert (jax.nn.sigmoid(after["opacities"]) > mcmc.DEAD).all()
    same = (after["means"][:10, None] == parameters["means"][None, 10:]).all(-1)
    assert same.any(1).all()
    shared = np.flatnonzero(same.any(0)) + 10
    np.testing.assert_array_equal(after["means"][10:], parameters["means"][10:])
    assert (after["opacities"][shared] < 1.0).all()
    assert (after["scales"][shared] < parameters["scales"][shared]).all()
    alone = np.setdiff1d(np.arange(10, 40), shared)
    np.testing.assert_array_equal(after["scales"][alone], parameters["scales"][alone])
    for a in jax.tree.leaves(moments):
        if a.ndim:
            assert not np.asarray(a)[[*range(10), *shared]].any()
            assert np.asarray(a)[alone].all()


def test_noise_has_the_shape_of_its_gaussian_and_spares_the_opaque():
    num = 4000
    parameters = {
        "means": jnp.zeros((num, 3)),
        "quats": jnp.tile(jnp.array([0.5**0.5, 0, 0, 0.5**0.5]), (num, 1)),
        "scales": jnp.tile(jnp.log(jnp.array([0.1, 0.01, 0.001])), (num, 1)),
        "opacities": jnp.where(jnp.arange(num) < num // 2, -9.0, 2.0),
    }
    rate = jnp.float32(1e-4)
    moved = mcmc.add_noise(parameters, jax.random.key(0), rate)["means"]
    # A quarter turn about z: the long axis lies along y.
    expected = mcmc.NOISE * 1e-4 * jax.nn.sigmoid(0.5) * np.array([1e-4, 1e-2, 1e-6])
    np.testing.assert_allclose(np.std(moved[: num // 2], 0), expected, rtol=0.1)
    assert np.abs(moved[num // 2 :]).max() < 1e-3 * expected.max()


def test_starts_are_at_the_points_or_near_them():
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(30, 3))
    fewer = mcmc.start(points, points, 10, 1, rng)
    assert (np.float32(points)[None] == fewer["means"][:, None]).all(-1).any(1).all()
    more = mcmc.start(points, points, 70, 1, rng)
    np.testing.assert_array_equal(more["means"][:30], np.float32(points))
    assert np.isfinite(mcmc.start(points[:1], points[:1], 5, 1, rng)["scales"]).all()


def test_ssim_is_one_of_like_pictures_and_less_of_others():
    a = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 20, 24, 3)), jnp.float32)
    assert mcmc.ssim(a, a).shape == (1, 10, 14, 3)
    np.testing.assert_allclose(mcmc.ssim(a, a), 1.0, atol=1e-4)
    assert np.mean(mcmc.ssim(a, a[:, ::-1])) < 0.2
    assert mcmc.ssim(a[:, :5], a[:, :5]).shape == (1, 1, 20, 3)

"""Pixels about eyes and mouth count for more, wherever the camera sees them."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import demo
from data_pipelines import cameras
from flexavatar_jax.training.focus import focus_weights
from flexavatar_jax.training.losses import training_loss

K = np.array([[3.05, 0, 0.5], [0, 3.05, 0.5], [0, 0, 1]], np.float32)
POINT = (0.03, 0.02, 0.05)


def focus(**fields) -> ConfigDict:
    return ConfigDict({"weight": 4.0, "radius": 0.02, "points": (POINT,), **fields})


def camera(azimuth: float, elevation: float = 0.0) -> np.ndarray:
    return cameras.orbit(azimuth, elevation, 1.0, np.zeros(3)).astype(np.float32)


@pytest.mark.parametrize("azimuth", [-40, 0, 30])
def test_the_heaviest_pixel_is_where_the_camera_sees_the_point(azimuth):
    cam2head = camera(azimuth, 10)
    weights = np.asarray(focus_weights(cam2head, K, 64, focus()))
    row, column = np.unravel_index(weights.argmax(), weights.shape)
    local = cam2head[:3, :3].T @ (np.array(POINT) - cam2head[:3, 3])
    x, y = (K @ local)[:2] / local[2]
    assert abs((column + 0.5) / 64 - x) <= 0.5 / 64 + 1e-6
    assert abs((row + 0.5) / 64 - y) <= 0.5 / 64 + 1e-6


def test_weights_fall_from_the_point_as_a_gaussian_of_the_radius():
    weights = np.asarray(focus_weights(camera(0), K, 2048, focus(points=((0, 0, 0),))))
    # A metre away, a radius of 2 cm is 0.02 * 3.05 * 2048 = 124.9 pixels.
    far = weights[0, 0]
    middle, beside = weights[1024, 1024] / far - 1, weights[1024, 1024 + 125] / far - 1
    assert middle == pytest.approx(4, rel=1e-4)
    assert beside == pytest.approx(4 * np.exp(-0.5), rel=1e-2)


def test_an_image_counts_for_one_whatever_it_shows():
    poses = np.stack([camera(a) for a in (0, 60, 180)])
    weights = focus_weights(poses, np.broadcast_to(K, (3, 3, 3)), 32, focus())
    np.testing.assert_allclose(np.mean(weights, axis=(1, 2)), 1, rtol=1e-5)


def test_from_behind_all_pixels_count_alike():
    np.testing.assert_array_equal(focus_weights(camera(180), K, 32, focus()), 1)


def test_a_point_behind_the_camera_counts_nowhere():
    weights = focus_weights(camera(0), K, 32, focus(points=((0, 0, 1.5),)))
    np.testing.assert_array_equal(weights, 1)


def test_leading_axes_are_cameras():
    poses = np.stack([camera(a) for a in (-20, 0, 20)])[None]
    many = focus_weights(poses, np.broadcast_to(K, (1, 3, 3, 3)), 16, focus())
    assert many.shape == (1, 3, 16, 16)
    for one, pose in zip(many[0], poses[0], strict=True):
        np.testing.assert_allclose(one, focus_weights(pose, K, 16, focus()), rtol=1e-6)


def test_the_losses_are_means_by_weight():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 8, 8, 3), np.float32)
    pixels = rng.uniform(1, 5, (3, 8, 8)).astype(np.float32)
    pixels /= pixels.mean()
    weights = {"l1": 0.5, "mse": 2.0, "ssim": 0.0, "dino": 0.0, "sam": 0.0}
    loss, parts = training_loss(a, b, weights, pixels=pixels)
    share = pixels / pixels.sum()
    l1 = float((np.abs(a - b).mean(-1) * share).sum())
    mse = float((((a - b) ** 2).mean(-1) * share).sum())
    assert float(parts["l1"]) == pytest.approx(l1, rel=1e-5)
    assert float(parts["mse"]) == pytest.approx(mse, rel=1e-5)
    assert float(loss) == pytest.approx(0.5 * l1 + 2 * mse, rel=1e-5)


def test_the_demo_looks_at_eyes_and_mouth_and_compiles_once_for_all_cameras():
    config = demo.get_config().loss.focus
    weigh = jax.jit(lambda pose: focus_weights(pose, K, 64, config))
    front, side = np.asarray(weigh(camera(0))), np.asarray(weigh(camera(90)))
    assert front.max() > 8
    assert front.mean() < 1.5
    assert side.max() < 2

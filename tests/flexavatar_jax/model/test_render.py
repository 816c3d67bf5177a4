"""From Gaussians in the head frame and a camera there to an image."""

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines import cameras
from flexavatar_jax.model.gaussians import Gaussians
from flexavatar_jax.model.render import SH_C0, head2cam, render

K = np.array([[3.2, 0, 0.5], [0, 3.2, 0.5], [0, 0, 1]], np.float32)


def dot(position, rgb):
    """One small opaque Gaussian."""
    return Gaussians(
        means=jnp.array([[position]], jnp.float32),
        quats=jnp.array([[[1.0, 0, 0, 0]]]),
        scales=jnp.full((1, 1, 3), 0.004),
        opacities=jnp.full((1, 1), 0.99),
        colors=(jnp.array([[rgb]], jnp.float32) - 0.5) / SH_C0,
    )


def brightest(azimuth, position, size=64):
    camera = cameras.orbit(azimuth, 0.0, 1.0, np.zeros(3)).astype(np.float32)
    out = render(dot(position, (1, 0, 0)), camera[None], K[None], jnp.zeros((1, 3)), size=size)
    row, column = np.unravel_index(np.argmax(out.alpha[0]), (size, size))
    return row, column


def test_inverse_of_a_camera_pose():
    pose = cameras.orbit(37.0, 12.0, 0.9, np.array([0.01, -0.02, 0.03]))
    np.testing.assert_allclose(head2cam(jnp.asarray(pose)) @ pose, np.eye(4), atol=1e-6)


def test_a_pose_is_inverted_in_float32_on_every_device():
    jaxpr = jax.make_jaxpr(head2cam)(np.eye(4, dtype=np.float32))
    (product,) = (e for e in jaxpr.eqns if e.primitive is jax.lax.dot_general_p)
    assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_the_persons_left_is_on_the_right_of_a_frontal_image():
    assert brightest(0, (0.05, 0, 0))[1] > 36


def test_up_is_up():
    assert brightest(0, (0, 0.05, 0))[0] < 28


def test_from_behind_the_persons_left_is_on_the_left():
    assert brightest(180, (0.05, 0, 0))[1] < 28


def test_a_coefficient_becomes_its_colour():
    camera = cameras.orbit(0.0, 0.0, 1.0, np.zeros(3)).astype(np.float32)
    out = render(dot((0, 0, 0), (0.8, 0.3, 0.1)), camera[None], K[None], jnp.zeros((1, 3)), size=64)
    color = out.color[0, 32, 32] / out.alpha[0, 32, 32]
    np.testing.assert_allclose(color, [0.8, 0.3, 0.1], atol=1e-5)


def test_pixels_without_gaussians_show_the_background():
    camera = cameras.orbit(0.0, 0.0, 1.0, np.zeros(3)).astype(np.float32)
    out = render(
        dot((0, 0, 0), (1, 1, 1)), camera[None], K[None], jnp.array([[0.2, 0.4, 0.6]]), size=64
    )
    np.testing.assert_allclose(out.color[0, 0, 0], [0.2, 0.4, 0.6], atol=1e-6)

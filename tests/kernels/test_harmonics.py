"""Spherical harmonics: the basis by its definition, and colours that depend on the view."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_scenes import random_scenes

from kernels import harmonics, rasterize

SIZE = {"width": 9, "height": 9}
render = functools.partial(rasterize, **SIZE, capacity=64)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_the_basis_is_orthonormal_over_the_sphere():
    z, weights = np.polynomial.legendre.leggauss(8)
    angle = np.arange(16) * np.pi / 8
    ring = np.sqrt(1 - z**2)
    grid = np.stack(
        [ring[:, None] * np.cos(angle), ring[:, None] * np.sin(angle), z[:, None] + 0 * angle], -1
    )
    values = np.asarray(harmonics.basis(jnp.asarray(grid, jnp.float32), 16), np.float64)
    products = np.einsum("i,ijk,ijl->kl", weights * np.pi / 8, values, values)
    np.testing.assert_allclose(products, np.eye(16), atol=1e-5)
    # The signs of 3D Gaussian Splatting: -y, z, -x in degree 1.
    np.testing.assert_allclose(
        np.asarray(harmonics.basis(jnp.eye(3), 4))[:, 1:] / 0.4886025,
        [[0, 0, -1], [-1, 0, 0], [0, 1, 0]],
        atol=1e-6,
    )


def test_a_colour_is_seen_from_the_direction_of_view():
    """From a camera at (0, 0, -2), a Gaussian at the origin is seen along +z."""
    sh = jnp.zeros((1, 4, 3)).at[0, 2].set(jnp.array([1.0, 0.5, -2.0]))
    viewmat = jnp.eye(4).at[2, 3].set(2.0)
    color = harmonics.shade(sh, jnp.zeros((1, 3)), viewmat)[0]
    np.testing.assert_allclose(color, [0.5 + 0.4886025, 0.5 + 0.2443013, 0.0], atol=1e-6)


def test_harmonics_are_the_colours_they_give_each_camera_and_move_the_means():
    batch = random_scenes(3, images=2, num=6, channels=3, **SIZE)
    means, quats, scales, opacities, _ = (a[0] for a in batch[:5])
    cameras = batch[5:]
    sh = np.random.default_rng(0).normal(size=(6, 16, 3)).astype(np.float32)

    def loss(means, sh, by_hand):
        if by_hand:
            paint = jax.vmap(harmonics.shade, (None, None, 0))
            kinds = {"colors": paint(sh, means, jnp.asarray(cameras[0]))}
        else:
            kinds = {"colors": None, "sh": sh}
        colors = kinds.pop("colors")
        return jnp.sum(
            render(means, quats, scales, opacities, colors, *cameras, **kinds).color ** 2
        )

    found, expected = (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)(means, sh, by_hand)
        for by_hand in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    assert np.abs(found[1][1]).max() > 0
    # Colours of each camera on shared Gaussians are those of Gaussians repeated.
    paint = jax.vmap(harmonics.shade, (None, None, 0))
    colors = paint(jnp.asarray(sh), jnp.asarray(means), jnp.asarray(cameras[0]))
    shared = render(means, quats, scales, opacities, colors, *cameras)
    repeated = [np.stack([a, a]) for a in (means, quats, scales, opacities)]
    own = render(*repeated, colors, *cameras)
    np.testing.assert_allclose(shared.color, own.color, atol=1e-5)


@pytest.mark.usefixtures("any_types")
def test_numbers_of_coefficients_that_are_no_degree_are_refused():
    scene = random_scenes(3, images=1, num=6, channels=3, **SIZE)
    with pytest.raises(ValueError, match="sh has 5 coefficients; expected one of"):
        render(*scene[:4], None, *scene[5:], sh=np.zeros((1, 6, 5, 3), np.float32))
    with pytest.raises(ValueError, match="expected either colors or sh"):
        render(*scene[:4], None, *scene[5:])

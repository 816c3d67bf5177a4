"""The oracle itself, against results worked out by hand."""

import numpy as np

from kernels import oracle

VIEWMAT = np.eye(4)
K = np.array([[10.0, 0, 4.5], [0, 20.0, 3.5], [0, 0, 1]])
SIZE = {"width": 9, "height": 7}


def render(*gaussians, **settings):
    means, scales, opacities, colors = (np.asarray(a, float) for a in gaussians)
    quats = np.tile([1.0, 0, 0, 0], (len(means), 1))
    return oracle.render(means, quats, scales, opacities, colors, VIEWMAT, K, **SIZE, **settings)


def test_one_gaussian_on_the_axis_is_a_2d_gaussian():
    """At z 2 a standard deviation s spans fx s / 2 pixels across; 0.3 is added to the variance."""
    out = render([[0, 0, 2.0]], [[0.2, 0.3, 0.1]], [0.8], [[1.0]])
    x, y = np.arange(9) - 4.0, np.arange(7)[:, None] - 3.0
    variance_x, variance_y = (10 * 0.2 / 2) ** 2 + 0.3, (20 * 0.3 / 2) ** 2 + 0.3
    alpha = 0.8 * np.exp(-0.5 * (x**2 / variance_x + y**2 / variance_y))
    alpha = np.where(alpha >= 1 / 255, alpha, 0)
    np.testing.assert_allclose(out.alpha, alpha, atol=1e-12)
    np.testing.assert_allclose(out.color[..., 0], alpha, atol=1e-12)
    np.testing.assert_allclose(out.depth, np.where(alpha > 0, 2.0, 0), atol=1e-12)


def test_blending_is_front_to_back_over_the_background():
    """Two wide Gaussians, the farther given first; at the centre their alphas are 0.5 and 0.25."""
    out = render(
        [[0, 0, 4.0], [0, 0, 2.0]],
        np.ones((2, 3)),
        [0.25, 0.5],
        [[0, 1.0, 0], [1.0, 0, 0]],
        background=np.array([0, 0, 1.0]),
    )
    np.testing.assert_allclose(out.color[3, 4], [0.5, 0.125, 0.375], atol=1e-12)
    np.testing.assert_allclose(out.alpha[3, 4], 0.625, atol=1e-12)
    np.testing.assert_allclose(out.depth[3, 4], (0.5 * 2 + 0.125 * 4) / 0.625, atol=1e-12)


def test_a_pixel_ends_before_the_gaussian_that_would_make_it_opaque():
    """0.98 a Gaussian leaves 0.02, then 4e-4; the third would leave 8e-6, so it isn't blended,
    nor is the fourth, faint as it is."""
    means = [[0, 0, 1.0 + i] for i in range(4)]
    out = render(means, 500 * np.ones((4, 3)), [0.98, 0.98, 0.98, 0.1], np.eye(4))
    np.testing.assert_allclose(out.color[3, 4], [0.98, 0.0196, 0, 0], atol=1e-12)


def test_alpha_is_at_most_099():
    out = render([[0, 0, 1.0]], [[500.0] * 3], [1.0], [[1.0]])
    np.testing.assert_allclose(out.alpha[3, 4], 0.99, atol=1e-12)


def test_behind_and_before_the_near_plane_nothing_is_drawn():
    out = render([[0, 0, -1.0], [0, 0, 0.009]], np.ones((2, 3)), np.ones(2), np.ones((2, 1)))
    assert not out.alpha.any()


def test_antialiased_dims_what_is_smaller_than_a_pixel():
    """Mip-Splatting's factor for an isotropic variance v: v / (v + 0.3)."""
    means, scales = [[0, 0, 2.0]], [[0.1, 0.05, 0.1]]
    variance = (10 * 0.1 / 2) ** 2
    plain = render(means, scales, [0.8], [[1.0]]).alpha[3, 4]
    dimmed = render(means, scales, [0.8], [[1.0]], antialiased=True).alpha[3, 4]
    np.testing.assert_allclose(dimmed / plain, variance / (variance + 0.3), rtol=1e-9)


def test_the_jacobian_is_taken_inside_the_widened_frustum():
    """Far to the side, x/z is clamped to the edge (4.5 / 10) plus 0.3 * 0.5 * 9 / 10."""
    x, s, z = 10.0, 0.5, 1.0
    clamped = (9 - 4.5) / 10 + 0.3 * 0.5 * 9 / 10
    _, covariance = oracle._project(
        np.array([x, 0, z]), np.array([1.0, 0, 0, 0]), np.full(3, s), VIEWMAT, K, 9, 7
    )
    np.testing.assert_allclose(covariance[0, 0], (10 * s) ** 2 * (1 + clamped**2))
    np.testing.assert_allclose(covariance[1, 1], (20 * s) ** 2)

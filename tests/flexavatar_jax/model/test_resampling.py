"""Sampling maps at regular grids, with half a texel of zeros at the rim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_reference import bilinear

from flexavatar_jax.model.resampling import interpolation_matrix, places, sample_grid, take_points


@pytest.mark.parametrize(("size", "samples"), [(4, 4), (5, 3), (3, 8), (16, 32)])
def test_a_grid_is_sampled_by_definition(size, samples):
    maps = np.random.default_rng(0).standard_normal((2, size, size, 3), np.float32)
    at = np.linspace(-1, 1, samples)
    expected = [[[bilinear(m, u, v) for u in at] for v in at] for m in maps]
    sampled = sample_grid(jnp.asarray(maps), samples, samples)
    np.testing.assert_allclose(sampled, expected, atol=1e-6)


def test_rows_and_columns_are_not_mixed_up():
    maps = np.zeros((3, 5, 1), np.float32)
    maps[1, 4] = 1
    maps = jnp.asarray(maps)
    assert sample_grid(maps, 7, 2).shape == (7, 2, 1)
    # Row 3 of 7 is the middle; column 1 of 2 is the right edge, half of it outside.
    np.testing.assert_allclose(sample_grid(maps, 7, 2)[3, :, 0], [0, 0.5])


def test_the_outermost_samples_are_half_zero():
    weights = interpolation_matrix(8, 4).sum(axis=1)
    np.testing.assert_allclose(weights[[0, -1]], 0.5)
    np.testing.assert_allclose(weights[1:-1], 1)


def test_points_are_taken_and_their_gradients_given_back():
    rng = np.random.default_rng(1)
    x = jnp.float32(rng.standard_normal((2, 9, 3)))
    index = np.array([0, 2, 3, 8])
    weights = jnp.float32(rng.standard_normal((2, 4, 3)))

    def plain(x):
        return x[:, index]

    def ours(x):
        return take_points(x, index, places(index, 9))

    np.testing.assert_array_equal(ours(x), plain(x))
    gradients = (jax.grad(lambda x, f=f: jnp.sum(weights * f(x) ** 2))(x) for f in (ours, plain))
    np.testing.assert_array_equal(*gradients)

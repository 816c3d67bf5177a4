"""Between avatar codes: ends are met, lengths kept, steps even."""

import numpy as np
import pytest

from data_pipelines.errors import UserError
from flexavatar_jax.avatars.interpolation import METHODS, corner_grid, interpolate, path_through

RNG = np.random.default_rng(0)
CODES = RNG.standard_normal((4, 6, 8)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_the_ends_are_the_codes(method):
    path = interpolate(CODES[0], CODES[1], [0, 1], method)
    np.testing.assert_allclose(path, CODES[:2], atol=1e-5)


def test_slerp_of_unit_tokens_stays_on_the_sphere_at_even_angles():
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in CODES[:2])
    path = interpolate(a, b, np.linspace(0, 1, 9))
    np.testing.assert_allclose(np.linalg.norm(path, axis=-1), 1, atol=1e-6)
    angles = np.arccos(np.clip(np.sum(path[1:] * path[:-1], axis=-1), -1, 1))
    np.testing.assert_allclose(angles, np.broadcast_to(angles[:1], angles.shape), atol=1e-3)


def test_linear_is_a_straight_line():
    middle = interpolate(CODES[0], CODES[1], [0.25], "linear")[0]
    np.testing.assert_allclose(middle, 0.75 * CODES[0] + 0.25 * CODES[1], atol=1e-6)


def test_tokens_that_are_equal_or_opposite_give_numbers():
    for other in (CODES[0], -CODES[0]):
        assert np.isfinite(interpolate(CODES[0], other, np.linspace(0, 1, 5))).all()


def test_a_path_meets_every_code_and_takes_as_long_between_any_two():
    path, weights = path_through(CODES[:3], 9)
    for frame, code in zip((0, 4, 8), range(3), strict=True):
        np.testing.assert_allclose(path[frame], CODES[code], atol=1e-5)
        np.testing.assert_array_equal(weights[frame], np.eye(3)[code])
    np.testing.assert_allclose(weights.sum(axis=1), 1)


def test_a_grid_has_the_codes_at_its_corners():
    codes, weights = corner_grid(CODES, 3)
    assert codes.shape == (3, 3, 6, 8)
    for corner, place in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        np.testing.assert_allclose(codes[place], CODES[corner], atol=1e-5)
        np.testing.assert_array_equal(weights[place], np.eye(4)[corner])
    np.testing.assert_allclose(weights[1, 1], 0.25)


@pytest.mark.usefixtures("any_types")
def test_too_few_codes_get_a_sentence():
    with pytest.raises(UserError, match="one avatar; give two"):
        path_through(CODES[:1], 9)
    with pytest.raises(UserError, match="four corners, and there are 3"):
        corner_grid(CODES[:3], 3)
    with pytest.raises(UserError, match="--method is 'cubic'"):
        interpolate(CODES[0], CODES[1], [0], "cubic")

"""The way between avatars: what counts as even, and as near."""

import numpy as np
import pytest

from flexavatar_jax.evaluation.between import nearest_similarity, unevenness


def test_even_steps_are_one_and_a_jump_is_more():
    even = np.linspace(0, 1, 5).reshape(5, 1, 1, 1) * np.ones((5, 4, 4, 3))
    assert unevenness(even) == pytest.approx(1)
    jump = np.where(np.arange(5).reshape(5, 1, 1, 1) > 2, 1.0, 0.0) * np.ones((5, 4, 4, 3))
    assert unevenness(jump) == pytest.approx(4)  # one step of four, of which three are none


def test_the_nearest_of_several_counts():
    people = np.random.default_rng(0).random((3, 16, 16, 3))
    images = people.copy()
    images[:2] = 0.5
    assert nearest_similarity(images, people) == pytest.approx(1)
    assert nearest_similarity(images[:2], people[:2]) < 0.5

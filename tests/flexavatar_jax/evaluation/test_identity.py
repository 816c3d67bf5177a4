"""Rank-1: an avatar is nearest to its own person, or it is not."""

import numpy as np
import pytest

from data_pipelines.frame import MULTI_VIEW, Frame
from flexavatar_jax.evaluation.identity import identity_distances, rank1

# Stand-ins with known answers take the places of avatars and data sets.
pytestmark = pytest.mark.usefixtures("any_types")


def test_avatars_that_are_their_people_are_told_apart_and_shuffled_ones_are_not():
    rng = np.random.default_rng(0)
    distances = rng.random((6, 6)) + 1
    np.fill_diagonal(distances, 0.5)
    assert rank1(distances) == 1
    assert rank1(distances[[1, 2, 3, 4, 5, 0]]) == 0
    assert rank1(distances[[0, 1, 2, 4, 5, 3]]) == 0.5


def test_a_person_easy_for_every_avatar_draws_nobody():
    distances = np.array([[0.01, 0.9], [0.02, 0.5]])  # person 0 is nearest to both, in numbers
    assert rank1(distances) == 1


def test_avatars_that_know_nothing_are_right_by_chance():
    rng = np.random.default_rng(0)
    assert np.mean([rank1(rng.random((5, 5))) for _ in range(400)]) == pytest.approx(0.2, abs=0.03)


class Painter:
    """Stands for an `Animator`: the code is the colour of the whole picture."""

    def frames(self, code, expressions, cam2head, K, *, size):
        assert len(expressions) == len(cam2head) == len(K)
        return (np.full((size, size, 3), code[0, 0], np.float32) for _ in expressions)


def test_distances_are_between_avatar_i_and_person_j():
    def frame(grey):
        image = np.full((4, 4, 3), grey, np.uint8)
        mask = np.full((4, 4), 255, np.uint8)
        return Frame(image, mask, np.eye(4), np.eye(3), np.zeros(135), "", "", 0, "", MULTI_VIEW)

    codes = np.array([0.0, 0.5]).reshape(2, 1, 1)
    found = identity_distances(Painter(), codes, [[frame(0), frame(0)], [frame(255)]], size=4)
    np.testing.assert_allclose(found, [[0, 1], [0.25, 0.25]])

"""The evaluation's page of pictures."""

import numpy as np

from flexavatar_jax.evaluation.report import SHOWN_TARGETS, TILE, TestPerson, person_grid


def test_pictures_say_from_where_they_were_taken():
    def grid(*sectors):
        grey = np.full((2, 32, 32, 3), 0.5)
        return person_grid(TestPerson("anna", grey[0], list(sectors), grey, grey))

    difference = np.abs(grid("front", "side") - grid("front", "back")).max(axis=(0, 2))
    tiles = difference.reshape(1 + SHOWN_TARGETS, TILE).max(axis=1)
    # The first half of the tiles shows the first target, the second half the second.
    half = SHOWN_TARGETS // 2
    np.testing.assert_array_equal(tiles > 0, [False] * (1 + half) + [True] * half)

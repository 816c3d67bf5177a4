"""What evaluation holds a model against: the best constant of each sector."""

import numpy as np

from flexavatar_jax.evaluation.metrics import sector_means


def test_the_constant_of_a_sector_is_its_mean_image(tiny_config):
    means = sector_means(tiny_config)
    assert set(means) == {"front", "side", "back"}
    for mean in means.values():
        assert mean.shape == (32, 32, 3)
        np.testing.assert_allclose(mean[0, 0], 1.0, atol=0.02)  # white beside the heads
        assert mean[16, 16].max() < 0.9
    # Faces are lighter than the backs of heads.
    assert not np.allclose(means["front"], means["back"], atol=0.02)


def test_sets_that_training_ignores_are_not_asked_for(tiny_config):
    tiny_config.data.mixture.nowhere = 0.0
    assert set(sector_means(tiny_config)) == {"front", "side", "back"}

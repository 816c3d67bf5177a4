"""The backends for NVIDIA GPUs on such a one, held to the oracle; `JAX_PLATFORMS=cuda` runs this.

Without a GPU their own files test them emulated, interpreted, lowered and compiled.
"""

import jax
import numpy as np
import pytest
from random_scenes import (
    check_against_oracle,
    check_edges_of_capacity,
    check_gradients_behind_bright_splats,
    check_gradients_of_projected_means,
    random_scenes,
)

from kernels import backends, rasterize, rasterizer
from kernels.bench import scenes

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")

SMALL = {"width": 21, "height": 18}


@pytest.fixture(params=backends.PREFERENCE["gpu"], autouse=True)
def backend(request, monkeypatch):
    """The backend that `rasterize` takes, whichever it is asked for."""
    try:
        found = backends.choose_backend(request.param)
    except backends.BackendUnavailableError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(rasterizer, "choose_backend", lambda name: found)
    return found


@pytest.mark.parametrize(
    ("channels", "width", "height", "antialiased"),
    [(3, 21, 18, False), (1, 1, 33, True), (32, 17, 5, False)],
)
@pytest.mark.parametrize("seed", range(4))
def test_images_and_gradients_are_the_oracles(channels, width, height, antialiased, seed):
    size = {"width": width, "height": height}
    scenes = random_scenes(seed, images=20, num=18, channels=channels, **size)
    check_against_oracle(scenes, seed, antialiased=antialiased, capacity=4000, **size)


@pytest.mark.parametrize("seed", range(3))
def test_what_fills_the_capacity_is_drawn_and_what_is_over_it_is_counted(backend, seed):
    check_edges_of_capacity(seed, images=11, tile=backend.tile, slots=90, capacity=90, **SMALL)


def test_gradients_behind_bright_splats_keep_their_digits():
    check_gradients_behind_bright_splats()


@pytest.mark.parametrize("channels", [3, 40])
def test_gradients_of_projected_means_and_their_absolute_sums_are_the_oracles(channels):
    check_gradients_of_projected_means(channels)


def test_an_avatars_images_and_gradients_are_the_same_bits_every_time():
    arrays = [jax.numpy.asarray(a) for a in scenes.avatar(images=2, size=512)]

    def loss(arrays):
        out = rasterize(*arrays, width=512, height=512, overflow="count")
        return (out.color**2).mean() + out.alpha.mean(), (out, out.overflow)

    run = jax.jit(jax.grad(loss, has_aux=True))
    once, again = run(arrays), run(arrays)
    np.testing.assert_array_equal(once[1][1], 0)
    jax.tree.map(np.testing.assert_array_equal, once, again)

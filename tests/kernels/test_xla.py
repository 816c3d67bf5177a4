"""The `xla` backend held to the oracle, on scenes of every awkward kind and on an avatar."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_scenes import (
    check_against_oracle,
    check_edges_of_capacity,
    check_gradients_behind_bright_splats,
    check_gradients_of_projected_means,
    random_scenes,
)

from kernels import count_capacity, oracle, project, rasterize, rasterizer
from kernels.backends import Frame
from kernels.bench import scenes
from kernels.xla import backend as xla
from kernels.xla.tiles import make_table

SMALL = {"width": 21, "height": 18}


@pytest.fixture(scope="module", autouse=True)
def chosen():
    """`rasterize` takes this backend on every device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rasterizer, "choose_backend", lambda name: xla.BACKEND)
        yield


@pytest.mark.parametrize(
    ("channels", "width", "height", "antialiased"),
    [(3, 21, 18, False), (1, 8, 9, True), (32, 17, 5, False)],
)
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_images_and_gradients_are_the_oracles(channels, width, height, antialiased, seed):
    size = {"width": width, "height": height}
    batch = random_scenes(seed, images=20, num=18, channels=channels, **size)
    check_against_oracle(batch, seed, antialiased=antialiased, capacity=None, **size)


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_fills_the_capacity_is_drawn_and_what_is_over_it_is_counted(seed):
    check_edges_of_capacity(seed, images=11, tile=xla.TILE, slots=90, capacity=90, **SMALL)


def test_gradients_behind_bright_splats_keep_their_digits():
    check_gradients_behind_bright_splats()


def test_gradients_of_projected_means_and_their_absolute_sums_are_the_oracles():
    check_gradients_of_projected_means()


@pytest.mark.parametrize("num", [1, 300])
def test_one_gaussian_or_hundreds(num):
    batch = random_scenes(num, images=4, num=num, channels=3, **SMALL)
    check_against_oracle(batch, num, capacity=None, **SMALL)


def test_an_avatar_is_the_oracles():
    """58,361 Gaussians, most of the image's pixels opaque long before their lists end."""
    avatar = scenes.avatar()
    size = {"width": 512, "height": 512}
    background = np.float32([0.1, 0.2, 0.3])
    out = rasterize(*avatar, background=background, **size)
    reference = oracle.render(*(a[0] for a in avatar), background=background, **size)
    assert int(out.overflow[0]) == 0
    for name in ("color", "alpha", "depth"):
        errors = np.abs(np.asarray(getattr(out, name)[0]) - getattr(reference, name))
        assert errors.mean() < 2e-5, name
        assert errors[~reference.fragile].max() < 5e-3, name


def test_gradients_have_the_same_bits_every_time_and_for_accelerators_sum():
    """The sum for accelerators, which may not add in any order, is that of the CPU's in order."""
    batch = random_scenes(3, images=3, num=60, channels=3, **SMALL)
    splats = project(*batch[:4], *batch[5:], **SMALL)
    features = jnp.concatenate([batch.colors, splats.depths[..., None]], -1)
    forward = functools.partial(xla.forward, frame=Frame(**SMALL, capacity=2000))
    blend, residuals = jax.jit(forward)(splats, features)
    rng = np.random.default_rng(0)
    cotangents = [
        jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in (blend.features, blend.alpha)
    ]
    sums = {
        add: jax.jit(functools.partial(xla._differentiate, block=4, add=add, absgrad=True))
        for add in (True, False)
    }
    table = make_table(splats, features)
    in_order, by_splat = (sums[add](table, residuals, *cotangents) for add in (True, False))
    np.testing.assert_allclose(in_order, by_splat, rtol=1e-4, atol=1e-4)
    again = sums[True](table, residuals, *cotangents)
    np.testing.assert_array_equal(in_order, again)


def test_a_guessed_capacity_changes_nothing():
    """Under jit the capacity is guessed, and sorted at an eighth of it where that is enough."""
    batch = scenes.sparse(images=2, num=600, size=64)
    size = {"width": 64, "height": 64}
    for scene in (batch, batch._replace(scales=20 * batch.scales)):
        capacity = count_capacity(*scene[:4], *scene[5:], **size)
        counted, guessed = (
            jax.jit(functools.partial(rasterize, capacity=slots, **size))(*scene)
            for slots in (capacity, None)
        )
        jax.tree.map(np.testing.assert_array_equal, counted, guessed)

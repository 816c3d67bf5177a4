"""The Pallas backend for GPUs without a GPU: interpreted, held to the oracle, and lowered."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_scenes import check_against_oracle, random_scenes

from kernels import pallas_gpu, rasterize, rasterizer
from kernels.pallas_gpu import BACKEND

INTERPRETED = dataclasses.replace(
    BACKEND,
    forward=functools.partial(BACKEND.forward, interpret=True),
    backward=functools.partial(BACKEND.backward, interpret=True),
)
SMALL = {"width": 13, "height": 11}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """`rasterize` interprets the kernels, whatever backend it is asked for."""
    if pallas_gpu.triton is None:
        pytest.skip(BACKEND.unavailable())
    monkeypatch.setattr(rasterizer, "choose_backend", lambda name: INTERPRETED)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_images_and_gradients_are_the_oracles(seed):
    # 24 splats of at most four tiles each: up to two chunks to a tile, the second not full.
    scenes = random_scenes(seed, images=25, num=24, channels=3, **SMALL)
    check_against_oracle(scenes, seed, capacity=96, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 32])
def test_any_number_of_channels(channels):
    scenes = random_scenes(channels, images=9, num=24, channels=channels, **SMALL)
    check_against_oracle(scenes, channels, antialiased=True, capacity=96, **SMALL)


def test_overflow_is_counted():
    scenes = random_scenes(4, images=2, num=24, channels=3, **SMALL)
    needed = rasterize(*scenes, capacity=1, **SMALL).overflow + 1
    room = int(needed.max()) - 5
    out = rasterize(*scenes, capacity=room, **SMALL)
    assert room > 0
    np.testing.assert_array_equal(out.overflow, np.maximum(needed - room, 0))


def lowered(function, *args):
    """Text of `function` lowered for an H100, which need not be here."""
    target = contextlib.nullcontext()
    with contextlib.suppress(ImportError, TypeError):
        # From JAX 0.12 on, the Triton lowering asks which GPU it is for.
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

        gpu = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
        target = use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu))
    with target:
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("channels", [1, 3, 32])
def test_kernels_lower_to_triton(monkeypatch, channels):
    monkeypatch.setattr(rasterizer, "choose_backend", lambda name: BACKEND)
    scenes = random_scenes(1, images=2, num=20, channels=channels, width=40, height=30)

    def loss(scenes):
        return jnp.sum(rasterize(*scenes, capacity=500, width=40, height=30).color ** 2)

    text = lowered(jax.grad(loss), scenes)
    assert text.count("@__gpu$xla.gpu.triton(") == 3
    for kernel in ("_blend_tile", "_differentiate_tile", "_sum_slots"):
        assert f'name = "{kernel}"' in text


def test_without_a_gpu_the_backend_says_so():
    assert "needs an NVIDIA GPU" in BACKEND.unavailable()

"""The Pallas backend for GPUs without a GPU: interpreted, held to the oracle, and lowered."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from random_scenes import check_against_oracle, random_scenes

from kernels import pallas_gpu, rasterize, rasterizer
from kernels.pallas_gpu import BACKEND
from kernels.scenes import Scene

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


H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")


def lowered(function, *args):
    """Text of `function` lowered for an H100, which need not be here."""
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
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


def gradient_of_each(scenes):
    def loss(scenes):
        out = rasterize(*scenes, capacity=96, **SMALL)
        return jnp.sum(out.color**2) + jnp.sum(out.alpha * out.depth)

    return jax.grad(loss)(scenes)


@pytest.mark.slow
def test_gradients_flow_under_shard_map():
    """Without the check of what varies over the mesh, which Pallas's interpreter fails."""
    scenes = random_scenes(8, images=2, num=24, channels=3, **SMALL)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    sharded = jax.shard_map(
        gradient_of_each, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.jit(sharded)(scenes), jax.jit(gradient_of_each)(scenes))


def test_kernels_lower_under_shard_map_that_checks_what_varies(monkeypatch):
    """Two GPUs: each an image of its own, then both an image of the same Gaussians."""
    monkeypatch.setattr(rasterizer, "choose_backend", lambda name: BACKEND)
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,), abstract_device=H100)
    own = random_scenes(8, images=2, num=24, channels=3, **SMALL)
    shared = own._replace(**{name: getattr(own, name)[0] for name in own._fields[:5]})
    for scenes, gaussians in (own, P("data")), (shared, P()):
        specs = Scene(*[gaussians] * 5, P("data"), P("data"))
        sharded = jax.shard_map(gradient_of_each, mesh=mesh, in_specs=(specs,), out_specs=specs)
        text = lowered(sharded, scenes)
        assert text.count("@__gpu$xla.gpu.triton(") == 3
        assert ("stablehlo.all_reduce" in text) == (scenes is shared)


def test_without_a_gpu_the_backend_says_so():
    assert "needs an NVIDIA GPU" in BACKEND.unavailable()

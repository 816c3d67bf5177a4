"""The Pallas backend for GPUs without one: interpreted, held to the oracle, lowered, compiled."""

import dataclasses
import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from jax.sharding import PartitionSpec as P
from random_scenes import (
    check_against_oracle,
    check_edges_of_capacity,
    check_gradients_behind_bright_splats,
    check_gradients_of_projected_means,
    random_scenes,
)

from kernels import pallas_gpu, rasterize, rasterizer
from kernels.backends import Cotangent, Frame
from kernels.bench.scenes import Scene
from kernels.pallas_gpu import BACKEND
from kernels.projection import Splats

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


@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_fills_the_capacity_is_drawn_and_what_is_over_it_is_counted(seed):
    check_edges_of_capacity(seed, images=11, tile=pallas_gpu.TILE, slots=64, capacity=64, **SMALL)


def test_gradients_behind_bright_splats_keep_their_digits():
    check_gradients_behind_bright_splats()


def test_gradients_of_projected_means_and_their_absolute_sums_are_the_oracles():
    check_gradients_of_projected_means()


H100 = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")


def lowered(function, *args):
    """Text of `function` lowered for an H100, which need not be here."""
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_more_images_than_cuda_has_rows_of_programs_are_launched():
    """A grid's second and third axes end at 65,535; JAX counts what is longer along the first."""
    images, frame = 70_000, Frame(width=16, height=8, capacity=4)
    rows = [(2,), (3,), (), (), (2,)]
    *fields, features = (jax.ShapeDtypeStruct((images, 1, *row), jnp.float32) for row in rows)
    forward = functools.partial(BACKEND.forward, frame=frame)
    backward = functools.partial(BACKEND.backward, frame=frame, absgrad=False)
    inputs = Splats(*fields), features
    blend, residuals = jax.eval_shape(forward, *inputs)
    cotangent = Cotangent(blend.features, blend.alpha)
    texts = lowered(forward, *inputs), lowered(backward, *inputs, residuals, cotangent)
    grids = [re.findall(r"grid_[xyz] = (\d+)", text) for text in texts]
    tiles = ["140000", "1", "1"]
    assert grids == [tiles, [*tiles, "70000", "1", "1"]]


@pytest.mark.parametrize(("channels", "absgrad"), [(1, False), (3, False), (3, True)])
def test_kernels_compile_for_an_h100_and_the_gradients_fit_its_registers(h100, channels, absgrad):
    if shutil.which("ptxas") is None:
        pytest.skip("NVIDIA's assembler, ptxas, is not on PATH; install the CUDA toolkit")
    frame = Frame(width=40, height=30, capacity=500)
    forward = functools.partial(BACKEND.forward, frame=frame)
    backward = functools.partial(BACKEND.backward, frame=frame, absgrad=absgrad)
    rows = [(2,), (3,), (), (), (channels + 1,)]
    *fields, features = (jax.ShapeDtypeStruct((2, 20, *row), jnp.float32) for row in rows)
    inputs = Splats(*fields), features
    blend, residuals = jax.eval_shape(forward, *inputs)
    cotangent = Cotangent(blend.features, blend.alpha)

    def kernels(function, *shapes, **options):
        on_gpu = jax.sharding.SingleDeviceSharding(h100)
        compiled = jax.jit(function, in_shardings=on_gpu).lower(*shapes).compile(options)
        return compiled.as_text().count("__gpu$xla.gpu.triton")

    assert kernels(forward, *inputs) == 1
    fit = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
    assert kernels(backward, *inputs, residuals, cotangent, **fit) == 2


def gradient_of_each(scenes):
    def loss(scenes):
        out = rasterize(*scenes, capacity=96, overflow="count", **SMALL)
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

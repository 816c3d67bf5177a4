"""The upsampler as TPUs run it: its filter by definition, and maps rounded to bfloat16."""

import functools
import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from flexavatar_jax.model import upsampler, upsampler_tpu
from flexavatar_jax.model.upsampler import Upsampler
from kernels import backends
from kernels.hardware import CHIPS


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.float32(rng.standard_normal(shape)) for shape in shapes]


def on_gpu(function, *args):
    """Compiled anew: what is compiled already is for TPUs."""
    with backends.compiling_for("gpu"):
        return jax.jit(lambda *x: function(*x))(*args)


def distance(found, expected):
    return np.linalg.norm(np.float32(found) - expected) / np.linalg.norm(expected)


def filtered(x, padding):
    taps = np.array([1, 3, 3, 1]) / 4
    x = np.asarray(x)
    for axis in (0, 1):
        padded = np.pad(x, [(padding if a == axis else 0,) * 2 for a in range(4)])
        size = x.shape[axis] + 2 * padding - 3
        x = sum(t * np.take(padded, range(k, k + size), axis) for k, t in enumerate(taps))
    return x


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        pytest.param((5, 3, 2, 4), 12 << 20, id="fewer examples and channels than a register has"),
        pytest.param((4, 5, 20, 256), 1, id="three blocks of examples, the last not full, by two"),
    ],
)
@pytest.mark.parametrize("padding", [1, 2])
def test_the_filter_by_definition(on_tpu, monkeypatch, shape, rows, padding):
    monkeypatch.setattr(upsampler_tpu, "ROWS", rows)
    x, bias = arrays(shape, shape[-1:])
    found = upsampler_tpu._binomial(x, None, padding=padding)
    np.testing.assert_allclose(found, filtered(x, padding), atol=1e-5)
    bias = 500 * bias
    found = upsampler_tpu._binomial(x, bias, padding=padding)
    assert np.mean(np.abs(found) == 256) > 0.1
    expected = upsampler.activate(jnp.asarray(filtered(x, padding)), bias)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def with_gradients(function, weights, *args):
    """Value, and gradients of a weighted sum of it."""

    @jax.jit
    def both(*args):
        value, pullback = jax.vjp(function, *args)
        return value, *pullback(jnp.asarray(weights, value.dtype))

    return both(*args)


def test_values_and_gradients_are_those_of_float32_but_for_rounding(on_tpu):
    """Every map is rounded, by 2^-9 of a value at most, and what convolutions multiply is, too.

    That is less than 2^-7 for four roundings or fewer. Biases are large: nothing lies near 0 or the
    clamp, where rounding turns a slope into another.
    """
    x, kernel, weights = arrays((2, 4, 3, 5), (3, 3, 5, 6), (2, 8, 6, 6))
    bias = jnp.float32([-400, -100, -100, 100, 100, 400])

    def up(x, kernel, bias):
        return upsampler.activate(upsampler.convolve_up(x, kernel), bias)

    found = with_gradients(upsampler_tpu.convolve_up, weights, x, kernel, bias)
    expected = on_gpu(functools.partial(with_gradients, up, weights), x, kernel, bias)
    assert found[0].dtype == jnp.bfloat16
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 2**-7

    x = 4 * weights
    found = with_gradients(upsampler_tpu.activate, weights, x, bias)
    expected = with_gradients(upsampler.activate, weights, x, bias)
    assert found[0].dtype == jnp.bfloat16
    for a, b in zip(found, expected, strict=True):
        assert distance(a, b) < 2**-8


def test_slopes_are_found_from_what_was_activated(on_tpu):
    x = jnp.float32([-2000, -1, 0, 1, 2000])[:, None]
    _, slopes, _ = with_gradients(upsampler_tpu.activate, np.ones_like(x), x, jnp.zeros(1))
    gain = np.sqrt(2)
    np.testing.assert_allclose(slopes[:, 0], [0, 0.2 * gain, gain, gain, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_whole_upsampler_is_the_same_but_for_rounding(on_tpu, quick_compilation, dtype):
    """A few roundings, one after the other; some of them turn a slope in the backward pass."""
    model = nnx.jit(lambda: Upsampler(16, (6, 5), rngs=nnx.Rngs(0)))()
    graph, params = nnx.split(model)
    x, weights = arrays((2, 3, 3, 16), (2, 12, 12, 1))

    def run(params, x):
        return with_gradients(lambda p, x: nnx.merge(graph, p)(x), weights, params, x)

    args = (params, x.astype(dtype))
    found, expected = (jax.tree.leaves(f(*args)) for f in (run, functools.partial(on_gpu, run)))
    assert [a.dtype for a in found] == [a.dtype for a in expected]
    assert 2**-12 < distance(found[0], expected[0]) < 2**-7
    # Of units, one in 300 lies within 2^-8 of 0 and may get the other slope, in each of four
    # activations: sqrt(4 / 300) of the norm.
    flat = [np.concatenate([np.float32(a).ravel() for a in x[1:]]) for x in (found, expected)]
    assert distance(*flat) < 0.12
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(*args)
    np.testing.assert_array_equal(exact, expected[0])


def test_a_shuffle_by_convolution_is_the_shuffle(on_tpu):
    x, weights = arrays((2, 3, 4, 8), (2, 6, 8, 2))
    found = with_gradients(upsampler_tpu.pixel_shuffle, weights, x)
    expected = with_gradients(upsampler.pixel_shuffle, weights, x)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_each_device_filters_its_own_examples_and_channels(on_tpu):
    """On a mesh of one, which partitions as any other does; gradients included."""
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x, kernel, weights, bias = arrays((2, 4, 3, 5), (3, 3, 5, 6), (2, 8, 6, 6), (6,))

    def both(*args):
        # As in training: what is differentiated knows of the mesh, its differentiation does not.
        def up(*args):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return upsampler_tpu.convolve_up(*args)

        return with_gradients(up, weights, *args)

    text = str(jax.jit(both).trace(x, kernel, bias).jaxpr)
    assert text.count("shard_map[") == text.count("pallas_call[") == 2
    plain = with_gradients(upsampler_tpu.convolve_up, weights, x, kernel, bias)
    for a, b in zip(both(x, kernel, bias), plain, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_kernel_says_at_least_what_the_compiler_counts():
    """Nothing becomes free by becoming custom."""

    def plain(x, bias):
        vertical = (x[:-3] + x[3:]) + 3 * (x[1:-2] + x[2:-1])
        both = (vertical[:, :-3] + vertical[:, 3:]) + 3 * (vertical[:, 1:-2] + vertical[:, 2:-1])
        return upsampler.activate(both / 16, bias)

    size = 64
    compiled = jax.jit(plain).lower(np.zeros((size + 3, size + 3, 8, 8), "f"), np.zeros(8, "f"))
    counted = compiled.compile().cost_analysis()["flops"] / (size * size * 64)
    assert counted < upsampler_tpu.VECTOR_OPS["binomial"] < 2 * counted


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_it_compiles_for_tpus_and_their_memory_on_chip():
    """FLEX-1's larger map and one twice as wide, for many examples, and for one."""
    program = """if True:
        import json, sys, jax, jax.numpy as jnp
        from flexavatar_jax.model import upsampler_tpu
        from kernels.bench import tpu_costs
        for topology in json.loads(sys.argv[1]):
            device = tpu_costs.topology_devices(topology)[0]
            sharding = jax.sharding.SingleDeviceSharding(device)
            for shape in ((129, 129, 40, 256), (257, 257, 12, 128), (65, 65, 1, 48)):
                for padding in (1, 2):
                    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
                    bias = jax.ShapeDtypeStruct(shape[-1:], jnp.float32, sharding=sharding)
                    jax.jit(
                        lambda x, b: upsampler_tpu._binomial(x, b, padding=padding)
                    ).lower(x, bias).compile()
    """
    topologies = json.dumps([chip.topology for chip in CHIPS.values()])
    done = subprocess.run(
        [sys.executable, "-c", program, topologies], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

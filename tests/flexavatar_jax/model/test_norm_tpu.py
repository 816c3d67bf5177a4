"""The TPU's layer norms, interpreted, against plain ones and the compiler's counts."""

import importlib.util
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from flexavatar_jax.model import norm_tpu
from kernels.hardware import CHIPS

EPSILON = 1e-6


def plain(x, scale, bias):
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + EPSILON)
    return y if scale is None else y * scale + bias


def inputs(*shape, affine=True, seed=0):
    """Tokens whose mean is large beside their spread, scale, bias, and weights for two results."""
    rng = np.random.default_rng(seed)
    x, *weights = (jnp.float32(rng.standard_normal(shape)) for _ in range(3))
    scale, bias = (jnp.float32(1 + rng.standard_normal(shape[-1])) for _ in range(2))
    return (3 * x + 20, *((scale, bias) if affine else (None, None))), weights


def with_gradients(norm, args, weights):
    """A scalar of what `norm` returns, one result or two, and its gradients in `args`."""

    def value(*args):
        return sum(jnp.sum(w * y) for w, y in zip(weights, norm(*args), strict=False))

    return jax.value_and_grad(value, argnums=tuple(i for i, x in enumerate(args) if x is not None))(
        *args
    )


def kernels(*args, beside=False, dtype=jnp.float32):
    return norm_tpu.layer_norm(*args, epsilon=EPSILON, dtype=dtype, beside=beside)


@pytest.mark.parametrize(
    ("shape", "affine", "beside"),
    [
        pytest.param((2, 512, 768), True, True, id="two blocks of tokens an example"),
        pytest.param((3, 48, 96), False, True, id="no scale, fewer features than lanes"),
        pytest.param((2, 16, 128), True, False, id="nobody goes on with the input"),
    ],
)
def test_values_and_gradients_are_those_of_a_plain_norm(on_tpu, shape, affine, beside):
    args, weights = inputs(*shape, affine=affine)
    found = with_gradients(lambda *a: kernels(*a, beside=beside), args, weights)
    expected = with_gradients(lambda *a: (plain(*a), a[0])[: 1 + beside], args, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_bfloat16_is_rounded_once(on_tpu):
    (x, scale, bias), _ = inputs(2, 32, 96)
    x = x.astype(jnp.bfloat16)
    (found,) = kernels(x, scale, bias, dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.float64(found), plain(x, scale, bias), rtol=1.01 * 2.0**-8, atol=1e-4
    )


def test_each_device_norms_its_own_examples(on_tpu):
    """On a mesh of one, which partitions as any other does; gradients included."""
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    args, weights = inputs(2, 16, 96)

    def both(*args):
        def norm(*args):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return kernels(*args, beside=True)

        return with_gradients(norm, args, weights)

    text = str(jax.jit(both).trace(*args).jaxpr)
    assert text.count("shard_map[") == text.count("pallas_call[") == 2
    found = jax.jit(both)(*args)
    expected = with_gradients(lambda *a: kernels(*a, beside=True), args, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)


def test_kernels_say_at_least_what_the_compiler_counts():
    """Nothing becomes free by becoming custom."""
    args, weights = inputs(2, 64, 256)

    def counted(function):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"] / args[0].size

    forward = counted(plain)
    both = counted(lambda *a: with_gradients(lambda *a: (plain(*a), a[0]), a, weights))
    assert forward < norm_tpu.VECTOR_OPS["norm_forward"] < 2 * forward
    assert both - forward < norm_tpu.VECTOR_OPS["norm_backward"]


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_they_compile_for_tpus_and_their_memory_on_chip():
    """FLEX-1's tokens, wider ones, and a few."""
    program = """if True:
        import json, sys, jax, jax.numpy as jnp
        from flexavatar_jax.model import norm_tpu
        from kernels.bench import tpu_costs
        for topology in json.loads(sys.argv[1]):
            device = tpu_costs.topology_devices(topology)[0]
            sharding = jax.sharding.SingleDeviceSharding(device)
            for shape in ((40, 1024, 768), (2, 1024, 2048), (1, 48, 96)):
                for dtype in (jnp.bfloat16, jnp.float32):
                    x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
                    scale = jax.ShapeDtypeStruct(shape[-1:], jnp.float32, sharding=sharding)
                    def both(x, scale):
                        norm = lambda *a: norm_tpu.layer_norm(
                            *a, epsilon=1e-6, dtype=x.dtype, beside=True
                        )
                        results, pull = jax.vjp(norm, x, scale, scale)
                        return pull(results)
                    jax.jit(both).lower(x, scale).compile()
    """
    topologies = json.dumps([chip.topology for chip in CHIPS.values()])
    done = subprocess.run(
        [sys.executable, "-c", program, topologies], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

"""The TPU's kernels of whole blocks, interpreted, against the blocks as XLA makes them."""

import importlib.util
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frozen_blocks import error, stack, with_gradient

from configs import flex1
from flexavatar_jax.frozen import block_costs, block_functions, block_tpu, dinov2
from flexavatar_jax.frozen.hiera_blocks import Block, plain_block
from flexavatar_jax.frozen.networks import frozen_shapes
from flexavatar_jax.model import attention_tpu


@pytest.mark.parametrize(
    ("shape", "width", "heads", "pool", "masked"),
    [
        pytest.param((2, 6, 64, 96), 96, 1, False, False, id="two windows share a span"),
        pytest.param((1, 20, 16, 192), 192, 2, False, False, id="eight do, the last one not full"),
        pytest.param((1, 3, 49, 192), 192, 8, False, True, id="windows between powers of two"),
        pytest.param((2, 4, 196, 96), 96, 1, False, True, id="windows of many registers"),
        pytest.param((1, 1, 300, 64), 64, 1, False, False, id="queries in several parts"),
        pytest.param((1, 1, 150, 384), 384, 6, False, False, id="two heads a register"),
        pytest.param((1, 1, 40, 512), 512, 2, False, False, id="two registers a head"),
        pytest.param((1, 6, 64, 96), 192, 2, True, False, id="pooled"),
        pytest.param((1, 9, 16, 96), 384, 4, True, False, id="pooled to windows of four"),
        pytest.param((1, 3, 196, 96), 192, 2, True, True, id="pooled windows with a margin"),
    ],
)
def test_values_and_gradients_are_those_of_a_plain_block(on_tpu, shape, width, heads, pool, masked):
    rng = np.random.default_rng(2)
    p = stack(shape[-1], width, pool=pool)
    x = jnp.float32(rng.standard_normal(shape) + 1)
    inside = jnp.float32(rng.random((1, *shape[1:3], 1)) > 0.3) if masked else None
    kind = Block(shape[-1], width, heads, window=1, pool=pool)
    alone = jax.tree.map(lambda w: w[0], p)
    found = with_gradient(lambda x: block_tpu.blocks(p, x, range(1), heads=heads, inside=inside), x)
    expected = with_gradient(lambda x: plain_block(kind, alone, x, inside), x)
    # Interpreted, the hardware's estimate of a reciprocal has eight bits, after Newton's step 16.
    assert error(found[0], expected[0]) < 1e-5
    assert error(found[1], expected[1]) < 3e-5


def test_layers_follow_one_another(on_tpu):
    """Those asked for among many, the gradient's way back included."""
    p, rng = stack(64, 64, layers=5), np.random.default_rng(2)
    x = jnp.float32(rng.standard_normal((2, 3, 49, 64)))
    inside = jnp.float32(rng.random((1, 3, 49, 1)) > 0.3)
    kind = Block(64, 64, 2, window=1, pool=False)

    def plain(x):
        for i in (1, 2, 3):
            x = plain_block(kind, jax.tree.map(lambda w, i=i: w[i], p), x, inside)
        return x

    found = with_gradient(lambda x: block_tpu.blocks(p, x, range(1, 4), heads=2, inside=inside), x)
    expected = with_gradient(plain, x)
    assert error(found[0], expected[0]) < 1e-5
    assert error(found[1], expected[1]) < 5e-5


def test_sixteen_bits_lose_no_more_than_in_a_plain_block(on_tpu):
    """Of the gradient, about as much: what pooling chooses hangs on the last bit."""
    rng = np.random.default_rng(2)
    p = stack(96, 192, pool=True)
    x = jnp.float32(rng.standard_normal((2, 6, 64, 96)))
    half, short = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (p, x))
    kind = Block(96, 192, 2, window=1, pool=True)

    def plain(p):
        return lambda x: plain_block(kind, jax.tree.map(lambda w: w[0], p), x)

    exact = with_gradient(plain(p), x)
    found = with_gradient(lambda x: block_tpu.blocks(half, x, range(1), heads=2), short)
    rounded = with_gradient(plain(half), short)
    assert found[0].dtype == found[1].dtype == jnp.bfloat16
    assert error(found[0], exact[0]) < error(rounded[0], exact[0])
    assert error(found[1], exact[1]) < 1.1 * error(rounded[1], exact[1])


def test_the_normal_distribution_is_off_by_less_than_float32s_eps():
    """Interpreted, a reciprocal is less exact than on TPUs: here it is taken exactly."""
    z = jnp.linspace(-12, 12, 4001)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_functions, "_reciprocal", lambda x: 1 / x)
        value, slope = block_functions.gelu(z), block_functions.gelu_slope(z)
    z = np.float64(z)
    below = np.vectorize(math.erfc)(-z / math.sqrt(2)) / 2
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(value, z * below, rtol=2e-7, atol=4e-7)
    np.testing.assert_allclose(slope, below + z * density, rtol=2e-7, atol=4e-7)


def test_kernels_say_at_least_what_the_compiler_counts(monkeypatch):
    """Nothing becomes free by becoming custom; GELU, which takes less in them, is theirs."""
    monkeypatch.setattr(block_functions, "_reciprocal", lambda x: 1 / x)
    gelu = jax.custom_vjp(block_functions.gelu)
    gelu.defvjp(
        lambda z: (block_functions.gelu(z), z),
        lambda z, dy: (dy * block_functions.gelu_slope(z),),
    )
    monkeypatch.setattr(jax.nn, "gelu", lambda z, approximate: gelu(z))
    p, x = stack(256, 256), jnp.ones((2, 1, 256, 256))
    kind, alone = Block(256, 256, 2, window=1, pool=False), jax.tree.map(lambda w: w[0], p)

    def counted(function):
        costs = jax.jit(function).lower(x).compile().cost_analysis()
        return costs["flops"] + costs.get("transcendentals", 0)

    def told(function):
        found = str(jax.make_jaxpr(function)(x))
        costs = re.findall(r"CostEstimate\(flops=(\d+), transcendentals=(\d+)", found)
        return [int(flops) + int(vectors) for flops, vectors in costs]

    def ours(x):
        return block_tpu.blocks(p, x, range(1), heads=2)

    forward = counted(lambda x: plain_block(kind, alone, x))
    both = counted(lambda x: with_gradient(lambda x: plain_block(kind, alone, x), x))
    (told_forward,) = told(ours)
    assert forward < told_forward < 1.5 * forward
    assert sum(told(lambda x: with_gradient(ours, x))) > both
    assert set(block_costs.VECTOR_OPS) == {"block_forward", "block_backward"}


def test_chips_with_little_room_take_what_xla_makes(on_tpu, monkeypatch):
    image = jax.ShapeDtypeStruct((1, 504, 504, 3), jnp.float32)
    params = frozen_shapes(flex1.get_config()).dinov2_small

    def kernels():
        # What JAX has traced once it doesn't trace again.
        traced = jax.make_jaxpr(lambda *a: dinov2.perceptual_features(*a))(params, image)
        return str(traced).count("pallas_call")

    assert kernels() == 3
    monkeypatch.setattr(attention_tpu, "SMALL_CHIPS", ("TPU v4", "cpu"))
    assert kernels() == 0


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
def test_they_compile_for_tpus_and_their_memory_on_chip(chip):
    """All that DINO and SAM ask for, both ways."""
    program = """if True:
        import sys, jax, jax.numpy as jnp
        from configs import flex1
        from flexavatar_jax.frozen.networks import frozen_shapes
        from flexavatar_jax.training.losses import dino_loss, sam_loss
        from kernels import backends
        from kernels.bench import tpu_costs
        from kernels.hardware import CHIPS
        device = tpu_costs.topology_devices(CHIPS[sys.argv[1]].topology)[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        networks = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            frozen_shapes(flex1.get_config()),
        )
        image = jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32, sharding=sharding)
        for loss, params in ((dino_loss, networks.dinov2_small), (sam_loss, networks.sam2)):
            with backends.compiling_for("tpu"):
                step = jax.jit(jax.value_and_grad(loss, argnums=1)).lower(params, image, image)
            assert "block_backward" in step.compile().as_text()
    """
    done = subprocess.run(
        [sys.executable, "-c", program, chip], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

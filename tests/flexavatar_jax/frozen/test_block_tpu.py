"""The TPU's kernels of whole blocks, interpreted, against the blocks as XLA makes them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexavatar_jax.frozen import block_costs, block_functions, block_tpu, hiera
from flexavatar_jax.frozen.hiera_blocks import Block, plain_block
from kernels import backends


def stack(width_in, width, *, pool=False, layers=1, seed=0):
    """Weights of blocks, in whose outputs each of them shows."""
    rng = np.random.default_rng(seed)

    def linear(i, o):
        w = rng.standard_normal((layers, i, o)) / np.sqrt(i)
        return {"w": jnp.float32(w), "b": jnp.float32(0.3 * rng.standard_normal((layers, o)))}

    def norm(c):
        scale, bias = 1 + 0.3 * rng.standard_normal((2, layers, c))
        return {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}

    p = {"norm1": norm(width_in), "qkv": linear(width_in, 3 * width), "out": linear(width, width)}
    p |= {"norm2": norm(width), "mlp_in": linear(width, 4 * width)}
    p |= {"mlp_out": linear(4 * width, width)}
    return p | {"skip": linear(width_in, width)} if pool else p


def with_gradient(function, x, seed=1):
    y, pull = jax.vjp(function, x)
    return y, pull(jnp.asarray(np.random.default_rng(seed).standard_normal(y.shape), y.dtype))[0]


def error(found, expected):
    found, expected = np.float64(found), np.float64(expected)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


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


@pytest.mark.slow
def test_the_stem_is_the_same_in_its_own_order(on_tpu):
    """Where two tokens are nearly alike, pooling may choose either: some gradients differ."""
    params = hiera.fold(
        {
            name: np.float32(np.random.default_rng(i).standard_normal(shape) * 0.1)
            for i, (name, shape) in enumerate(hiera.shapes().items())
        }
    )
    x = jnp.float32(np.random.default_rng(0).standard_normal((1, 256, 256, 96)))
    found = with_gradient(lambda x: hiera._stem(params["stem"], x), x)
    with backends.compiling_for("cpu"):
        expected = with_gradient(lambda x: hiera._stem(params["stem"], x), x)
    assert error(found[0], expected[0]) < 2e-5
    off = np.linalg.norm(found[1] - expected[1], axis=-1)
    assert np.quantile(off / np.linalg.norm(expected[1], axis=-1), 0.99) < 1e-4


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

"""Linear layers' products of bfloat16 on CPUs: the right numbers, by the products that are fast."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexavatar_jax.model.attention import linear
from flexavatar_jax.model.products import bfloat16_product, dot_general
from kernels import backends

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 5, 64)), jnp.bfloat16)
KERNEL = jnp.asarray(RNG.standard_normal((64, 7)), jnp.bfloat16)
DY = jnp.asarray(RNG.standard_normal((2, 5, 7)), jnp.bfloat16)
HALF_A_STEP = 2.0**-8  # of bfloat16's 8 bits, relative


def exact(x):
    return np.asarray(x, np.float64)


def assert_rounded_once(found, expected):
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(exact(found), expected, rtol=1.01 * HALF_A_STEP, atol=1e-5)


def test_a_product_is_rounded_once():
    assert_rounded_once(bfloat16_product(X, KERNEL), exact(X) @ exact(KERNEL))


def test_so_are_its_gradients():
    _, pull = jax.vjp(bfloat16_product, X, KERNEL)
    dx, dkernel = pull(DY)
    assert_rounded_once(dx, exact(DY) @ exact(KERNEL).T)
    assert_rounded_once(dkernel, np.einsum("bni,bno->io", exact(X), exact(DY)))


def test_all_that_is_multiplied_are_bfloat16_with_sums_in_float32():
    """Which is what XLA:CPU has fast products for."""
    layer = linear(64, 7, (None, None), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

    def loss(layer, x):
        return jnp.sum(layer(x).astype(jnp.float32) ** 2)

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(layer, X).as_text()
    products = re.findall(r"dot_general.*: \((.*)\) -> tensor<(.*)>", program)
    assert len(products) == 3
    for factors, out in products:
        assert factors.count("bf16") == 2
        assert out.endswith("f32")
        assert not out.endswith("bf16")


def test_float32_is_left_as_it_is():
    x, kernel = X.astype(jnp.float32), KERNEL.astype(jnp.float32)
    dimensions = (((2,), (0,)), ((), ()))
    np.testing.assert_array_equal(dot_general(x, kernel, dimensions), x @ kernel)


def test_on_tpus_a_bias_has_its_gradient_from_a_product(on_tpu):
    """Summed in float32, with no pass of sums; elsewhere it is the plain layer's."""
    layer = linear(64, 7, (None, None), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.asarray(RNG.standard_normal(7), jnp.float32)

    graph, weights = nnx.split(layer)

    def pulled(weights, dy):
        y, pull = jax.vjp(lambda weights: nnx.merge(graph, weights)(X), weights)
        return y, pull(dy)[0]["bias"][...]

    y, gradient = pulled(weights, DY)
    with backends.compiling_for("gpu"):
        np.testing.assert_array_equal(y, layer(X))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(exact(gradient), exact(DY).sum((0, 1)), rtol=1e-6, atol=1e-6)
    assert "reduce_sum" not in str(jax.make_jaxpr(pulled)(weights, DY))

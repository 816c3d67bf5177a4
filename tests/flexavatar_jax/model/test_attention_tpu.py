"""The TPU's attention kernels, interpreted, against plain attention and the compiler's counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType

from flexavatar_jax.model import attention, attention_tpu
from flexavatar_jax.model.attention import HeadNorms, JointBlock, JointTransformer, attend
from kernels import backends


def on_gpu(function, *args):
    with backends.compiling_for("gpu"):
        return function(*args)


def inputs(heads, width, queries, sets, seed=0):
    """q, [k], [v] and norms with scales that differ."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.float32(rng.standard_normal(shape))

    def norm():
        module = nnx.RMSNorm(width, epsilon=1e-6, rngs=nnx.Rngs(0))
        module.scale[...] = 1 + 0.2 * draw(width)
        return module

    k, v = ([draw(2, n, heads * width) for n in sets] for _ in range(2))
    return draw(2, queries, heads * width), k, v, HeadNorms(norm(), [norm() for _ in sets])


def with_gradients(heads, norms):
    """A scalar of `attend` and its gradients in q, k, v and the norms' scales."""

    def value(q, k, v, scales):
        if scales is not None:
            graph, _ = nnx.split(norms)
            scales = nnx.merge(graph, scales)
        return jnp.sum(attend(q, k, v, heads=heads, norms=scales) ** 3)

    return jax.value_and_grad(value, argnums=(0, 1, 2, 3) if norms else (0, 1, 2))


@pytest.mark.parametrize(
    ("heads", "width", "queries", "sets", "normed"),
    [
        pytest.param(
            2, 192, 256, (128, 5), True, id="two heads in three registers, a few keys more"
        ),
        pytest.param(
            2, 64, 144, (144,), True, id="two heads a register, queries that fill no block"
        ),
        pytest.param(1, 96, 7, (40,), False, id="fewer lanes and queries than a register has"),
        pytest.param(2, 128, 512, (130,), False, id="a head a program, two blocks of queries"),
    ],
)
def test_values_and_gradients_are_those_of_plain_attention(
    on_tpu, quick_compilation, heads, width, queries, sets, normed
):
    q, k, v, norms = inputs(heads, width, queries, sets)
    norms = norms if normed else None
    function = with_gradients(heads, norms)
    args = (q, k, v, nnx.split(norms)[1] if normed else None)
    found, expected = function(*args), on_gpu(function, *args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) < 2e-5 * np.linalg.norm(b)


def test_huge_logits_do_not_overflow(on_tpu):
    q, k, v, _ = inputs(2, 64, 128, (128,))
    value, gradients = with_gradients(2, None)(100 * q, [100 * k[0]], v, None)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_each_device_attends_for_its_own_examples_and_heads(on_tpu):
    """On a mesh of one, which partitions as any other does; scale_out's tests have more devices."""
    mesh = jax.make_mesh((1, 1), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    q, k, v, norms = inputs(2, 64, 128, (128,))
    plain = attend(q, k, v, heads=2, norms=norms)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(lambda *x: attend(*x, heads=2, norms=norms)).trace(q, k, v).jaxpr
    with jax.set_mesh(mesh):
        on_mesh = jax.jit(lambda *x: attend(*x, heads=2, norms=norms))(q, k, v)
    assert "shard_map" in str(text)
    np.testing.assert_array_equal(plain, on_mesh)


def test_joint_blocks_are_the_same_with_the_kernels(on_tpu):
    block = JointBlock(96, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, context = (jnp.float32(rng.standard_normal((1, n, 96))) for n in (16, 5))
    for a, b in zip(block(x, context), on_gpu(block, x, context), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_rematerialisation_keeps_what_attention_returned(on_tpu):
    """Each block attends twice forward and twice backward, the last, whose context ends, once."""
    rng = np.random.default_rng(0)
    x, context = (jnp.float32(rng.standard_normal((1, n, 96))) for n in (16, 5))

    model = JointTransformer(96, 2, 2, dtype=jnp.float32, remat=1.0, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(model)

    def value(weights, x):
        return jnp.sum(nnx.merge(graph, weights)(x, context) ** 2)

    text = str(jax.make_jaxpr(jax.grad(value, argnums=(0, 1)))(weights, x))
    assert text.count("name=attention_forward") == text.count("name=attention_backward") == 3
    assert "reduce_precision" not in text


def test_kernels_say_at_least_what_the_compiler_counts_for_plain_attention():
    """Nothing becomes free by becoming custom: padding of heads and keys counts on top."""
    q, k, v, _ = inputs(4, 192, 256, (256, 5))
    costs = {}

    def listen(*args, cost_estimate, name, **kwargs):
        costs[name] = cost_estimate
        return call(*args, cost_estimate=cost_estimate, name=name, **kwargs)

    call = pl.pallas_call
    with pytest.MonkeyPatch.context() as patch, backends.compiling_for("tpu"):
        patch.setattr(attention_tpu.pl, "pallas_call", functools.partial(listen, interpret=True))
        jax.eval_shape(with_gradients(4, None), q, k, v, None)

    heads = [
        attention._split_heads(x, 4) for x in (q, jnp.concatenate(k, 1), jnp.concatenate(v, 1))
    ]

    def products(q, k, v):
        return jnp.einsum("bhnm,bmhc->bnhc", jnp.einsum("bnhc,bmhc->bhnm", q, k), v)

    counted = jax.jit(products).lower(*heads).compile().cost_analysis()["flops"]
    assert counted < costs["attention_forward"].flops < 2.1 * counted
    assert costs["attention_backward"].flops == 2.5 * costs["attention_forward"].flops
    logits = 2 * 4 * 256 * 261
    assert logits <= costs["attention_forward"].transcendentals < 1.5 * logits

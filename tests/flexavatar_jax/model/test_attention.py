"""Attention blocks against NumPy in float64, where the epsilons of their norms count."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from einops import rearrange
from flax import nnx
from small_model import rule_model

from flexavatar_jax.model import attention
from flexavatar_jax.model.attention import CausalBlock, JointBlock, attend


@pytest.fixture(scope="module")
def models():
    return rule_model("public")


def tokens(count, scale=1.0, seed=0):
    return jnp.float32(scale * np.random.default_rng(seed).standard_normal((count, 48)))


HEADS = 3


def qkv(rng, batch=2, n=7, m=9, size=4):
    shapes = [(batch, n, HEADS, size), (batch, m, HEADS, size), (batch, m, HEADS, size)]
    return [jnp.float32(3 * rng.standard_normal(shape)) for shape in shapes]


@pytest.mark.parametrize("cached_logits", [1, 200, 1 << 20])
def test_attention_by_definition(monkeypatch, cached_logits):
    """However many heads go at a time on a CPU: one, a few with some left over, all."""
    monkeypatch.setattr(attention, "CACHED_LOGITS", cached_logits)
    q, k, v = qkv(np.random.default_rng(0))
    flat = [rearrange(x, "b n h c -> b n (h c)") for x in (q, k, v)]
    out = jax.jit(lambda q, k, v: attend(q, [k], [v], heads=HEADS))(*flat)
    for b in range(2):
        expected = numpy_reference.attention(*(np.swapaxes(x[b], 0, 1) for x in (q, k, v)))
        np.testing.assert_allclose(out[b], expected, atol=1e-5)


WAYS = {"on CPUs": attention._attend_in_cache, "elsewhere": attention._attend_at_once}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_jaxs_in_values_and_gradients_wherever_it_runs(way, causal):
    """Sets of keys are as good as one set of them all."""
    q, k, v = qkv(np.random.default_rng(1), m=7)
    sets = [slice(None)] if causal else [slice(0, 4), slice(4, None)]

    def in_sets(q, k, v):
        return WAYS[way](q, *([x[:, s] for s in sets] for x in (k, v)), causal=causal)

    def whole(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal)

    def grad(f):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(f(*x) ** 3), argnums=(0, 1, 2)))

    for a, b in zip(*(jax.tree.leaves(grad(f)(q, k, v)) for f in (in_sets, whole)), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("way", WAYS)
def test_huge_logits_do_not_overflow(way):
    q, k, v = qkv(np.random.default_rng(2))
    out = WAYS[way](100 * q, [100 * k, -100 * k], [v, v], causal=False)
    assert np.isfinite(out).all()


def test_a_token_sees_none_after_it():
    block = CausalBlock(48, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = tokens(6)
    changed = x.at[4].add(1)
    run = nnx.jit(CausalBlock.__call__)
    before, after = run(block, x[None]), run(block, changed[None])
    np.testing.assert_array_equal(before[0, :4], after[0, :4])
    assert np.abs(before[0, 4:] - after[0, 4:]).min(axis=-1).max() > 1e-6


# With tokens this small, variances are as small as the epsilons that keep them from zero.
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize("last", [False, True])
def test_joint_blocks_by_definition(models, scale, last):
    model, reference = models
    x, context = tokens(16, scale), tokens(5, scale, seed=1)
    block = model.decoder.transformer.blocks[1 if last else 0]
    name = f"_head_transformer._expression_transformer.layers.{1 if last else 0}"
    found = nnx.jit(JointBlock.__call__)(block, x[None], context[None])
    expected = reference.joint_block(name, np.float64(x), np.float64(context), last)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a[0], b, rtol=2e-5, atol=2e-6 * np.abs(b).max())


def test_the_last_block_has_nothing_for_a_context_that_ends():
    block = JointBlock(48, 2, last=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    paths = {path[1:3] for path, _ in nnx.to_flat_state(nnx.state(block.context))}
    assert not any("mlp" in path or "out" in path for path in paths)
    context = tokens(5)[None]
    np.testing.assert_array_equal(
        nnx.jit(JointBlock.__call__)(block, tokens(16)[None], context)[1], context
    )


def test_published_initialisation():
    block = CausalBlock(256, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert np.std(block.q.kernel) == pytest.approx(0.02, rel=0.02)
    assert np.std(block.mlp.up.kernel) == pytest.approx(0.02, rel=0.02)
    np.testing.assert_array_equal(block.mlp_norm.scale[...], 1)
    block = JointBlock(256, 4, dtype=jnp.float32, rngs=nnx.Rngs(0))
    bound = 1 / np.sqrt(256)
    assert bound * 0.99 < np.abs(block.tokens.q.kernel[...]).max() <= bound

"""Attention on NVIDIA GPUs is cuDNN's, wherever it takes the heads; here up to what is lowered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexavatar_jax.model import attention, attention_gpu
from flexavatar_jax.model.attention import JointBlock
from kernels import backends


@pytest.mark.parametrize(
    ("capability", "width", "dtype", "fits"),
    [
        (9.0, 192, "bfloat16", True),  # FLEX-1 on an H100
        (12.0, 256, "float16", True),
        (8.0, 192, "bfloat16", False),  # an A100
        (8.0, 128, "bfloat16", True),
        (7.5, 64, "float16", False),
        (9.0, 192, "float32", False),
        (9.0, 36, "bfloat16", False),
        (0.0, 64, "bfloat16", False),  # AMD
    ],
)
def test_heads_are_cudnns_where_it_takes_them(monkeypatch, capability, width, dtype, fits):
    monkeypatch.setattr(backends, "compute_capability", lambda: capability)
    assert attention_gpu.fits(jnp.zeros((1, 8, 2, width), dtype)) == fits


@pytest.mark.parametrize("last", [False, True])
def test_no_logit_of_flex1s_blocks_reaches_memory(cudnn, last):
    """Tokens' queries and, but for the last block, the context's: a kernel each way for both."""
    block = nnx.eval_shape(
        lambda: JointBlock(768, 4, last=last, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )
    graph, params = nnx.split(block)
    x, context = (jax.ShapeDtypeStruct((2, n, 768), jnp.bfloat16) for n in (1024, 5))

    def loss(params, x, context):
        return jnp.sum(nnx.merge(graph, params)(x, context)[0].astype(jnp.float32))

    with backends.compiling_for("gpu"):
        traced = jax.jit(jax.grad(loss)).trace(params, x, context)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"@__cudnn\$(\w+)", text)
    # The context's gradient is 0 here: who asks for the tokens only pays for these only.
    assert sorted(set(calls)) == ["fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert not re.search(r"tensor<[x\d]*1024x(1024|1029)x(f32|bf16)>", text)


@pytest.mark.parametrize("causal", [False, True])
def test_sets_of_keys_are_put_together(monkeypatch, causal):
    """Held to the plain way, with XLA's attention in cuDNN's place."""
    fused = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        return fused(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    rng = np.random.default_rng(0)
    q, *sets = (jnp.float32(rng.standard_normal((2, n, 3, 8))) for n in (9, 9, 2))
    sets = sets[:1] if causal else sets
    with jax.default_matmul_precision("highest"):  # on GPUs, too
        both = [way(q, sets, sets, causal=causal) for way in WAYS]
    np.testing.assert_allclose(*both, atol=1e-6)


WAYS = (attention_gpu.attend, attention._attend_at_once)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_on_a_gpu_values_and_gradients_are_those_of_the_plain_way(causal):
    rng = np.random.default_rng(0)
    shapes = [(2, n, 4, 192) for n in (1024, 1024, 5)]
    q, *sets = (jnp.bfloat16(rng.standard_normal(shape)) for shape in shapes)
    if not attention_gpu.fits(q):
        pytest.skip("cuDNN does not take heads of 192 on this GPU")
    sets = sets[:1] if causal else sets

    def loss(way, q, k, v):
        return jnp.sum(way(q, k, v, causal=causal).astype(jnp.float32) ** 2)

    found, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss, way), (0, 1, 2)))(q, sets, sets)
        for way in WAYS
    )
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)

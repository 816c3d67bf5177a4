"""Operations are counted from what is traced."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import flex1
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.model.attention import JointBlock
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.training.flops import count, step_flops


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_matrix_product_takes_two_operations_a_multiply_add():
    assert count(jnp.matmul, array(5, 2, 3), array(3, 7)) == 2 * 5 * 2 * 3 * 7


def test_a_convolution_counts_its_window():
    def convolve(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    found = count(convolve, array(2, 8, 8, 3), array(3, 3, 3, 5))
    assert found == 2 * (2 * 8 * 8 * 5) * (3 * 3 * 3)


def test_loops_count_as_often_as_they_run_and_wrappers_once():
    @jax.jit
    @jax.checkpoint
    def body(x):
        return x @ x

    def loop(x):
        return jax.lax.scan(lambda x, _: (body(x), None), x, length=7)[0]

    assert count(loop, array(4, 4)) == 7 * 2 * 4**3


def test_of_a_conditional_the_most_expensive_branch_counts():
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x, lambda x: x, x)

    assert count(either, array(4, 4)) == 2 * 4**3


def test_kernels_of_a_platform_change_no_count(on_tpu):
    """Attention by XLA and by a kernel, whose insides would count once, not for each program."""
    block = JointBlock(64, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    tokens, context = array(2, 128, 64), array(2, 5, 64)
    a_token = 2 * 128 * (12 * 64**2 + 2 * 133 * 64)
    of_context = 2 * 5 * (12 * 64**2 + 2 * 133 * 64)
    assert count(lambda *x: block(*x), tokens, context) == 2 * (a_token + of_context)


def test_flex1_takes_what_its_paper_implies():
    config = flex1.get_config()
    template = load_template()
    model = nnx.eval_shape(lambda: FlexAvatar(config.model, template, rngs=nnx.Rngs(0)))
    found = step_flops(config, model, FrozenNetworks(), perceptual=False)
    # About 200 GFLOP a portrait and 250 a target, forward; three times that with the gradient.
    assert found.encoder == pytest.approx(3 * 200e9, rel=0.25)
    assert found.decoder == pytest.approx(3 * 5 * 250e9, rel=0.25)
    assert found.features == found.perceptual == 0
    assert found.total == found.encoder + found.decoder

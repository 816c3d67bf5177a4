"""The upsampler by definition, in float64: kernels, filter, clamp, shuffle, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads
from numpy_reference import GAIN
from small_model import rule_model

from flexavatar_jax.model import upsampler
from flexavatar_jax.model.upsampler import (
    StyleConv,
    Upsampler,
    UpsamplerBlock,
    activate,
    convolve,
    convolve_up,
    pixel_shuffle,
)

BLOCK = "_gaussian_decoder._stylegan_upsampler.blocks.0"


def arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def test_a_block_by_definition_within_the_clamp_and_beyond():
    """Larger features and styles run into +-256, on the main path and on the skip path."""
    model, reference = rule_model("public")
    x, skip = arrays((4, 5, 48), (4, 5, 48))
    block = nnx.jit(UpsamplerBlock.__call__)
    for scale in (1.0, 3e3):
        found = block(model.upsampler.blocks[0], scale * x[None], skip[None])
        expected = reference.upsampler_block(BLOCK, np.float64(scale * x), np.float64(skip))
        for a, b in zip(found, expected, strict=True):
            assert np.linalg.norm(a[0] - b) < 2e-6 * np.linalg.norm(b)
        clamped = np.abs(expected[0]) == 256
        assert (0.05 < clamped.mean() < 0.95) == (scale > 1)
        assert (np.abs(expected[1]).max() > 255) == (scale > 1)
        model.upsampler.blocks[0].to_skip.style[...] *= 30
        reference.w[f"{BLOCK}.torgb.affine.bias"] *= 30


def test_activation():
    x = jnp.array([-1000.0, -1.0, 0.0, 1.0, 1000.0])
    expected = [-256.0, -0.2 * GAIN, 0.0, GAIN, 256.0]
    np.testing.assert_allclose(activate(x, jnp.zeros(5)), expected, rtol=1e-6)
    np.testing.assert_allclose(activate(x[2:3], jnp.ones(1)), [GAIN], rtol=1e-6)


def test_upsampling_keeps_a_constant_and_its_place():
    """A kernel that spreads a texel evenly: constants stay, a single texel blurs where it was."""
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    upsample = jax.jit(convolve_up)
    flat = upsample(jnp.ones((1, 6, 6, 1)), kernel)[0, ..., 0]
    # The stride-2 transposed convolution sets every fourth texel; the filter's gain is 4.
    np.testing.assert_allclose(flat[2:-2, 2:-2], 1, atol=1e-6)
    spot = upsample(jnp.zeros((1, 6, 6, 1)).at[0, 2, 3].set(1), kernel)[0, ..., 0]
    profile = np.array([1, 3, 3, 1]) / 4
    assert spot.shape == (12, 12)
    np.testing.assert_allclose(spot[3:7, 5:9], np.outer(profile, profile), atol=1e-6)
    assert np.sum(spot) == pytest.approx(4)


@pytest.mark.parametrize(
    ("size", "padding"),
    [((3, 3), ((1, 1), (1, 1))), ((2, 1), ((1, 1), (0, 0))), ((1, 2), ((0, 0), (0, 1)))],
)
def test_convolutions_gradients_are_jaxs(size, padding):
    """Also the kernel's gradient as accelerators compute it."""
    x, kernel = arrays((2, 5, 4, 3), (*size, 3, 2))

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    (weights,) = arrays(plain(x, kernel).shape)
    expected = jax.grad(lambda *p: jnp.sum(weights * plain(*p)), argnums=(0, 1))(x, kernel)
    here = jax.grad(lambda *p: jnp.sum(weights * convolve(*p, padding)), argnums=(0, 1))(x, kernel)
    elsewhere = upsampler._kernel_gradient(x, weights, padding=padding)
    for found, gradient in zip((*here, elsewhere), (*expected, expected[1]), strict=True):
        np.testing.assert_allclose(found, gradient, atol=1e-5)


def test_upsamplings_gradients_are_finite_differences():
    check_grads(
        jax.jit(convolve_up), arrays((1, 3, 2, 2), (3, 3, 2, 2)), order=1, modes=["rev"], rtol=1e-2
    )


def test_a_group_of_four_channels_makes_a_square():
    shuffled = pixel_shuffle(jnp.arange(8.0).reshape(1, 1, 1, 8))
    np.testing.assert_array_equal(shuffled[0, ..., 0], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(shuffled[0, ..., 1], [[4, 5], [6, 7]])


def test_demodulated_kernels_have_unit_norm_whatever_the_style():
    layer = StyleConv(6, 4, 3, demodulate=True, rngs=nnx.Rngs(0))
    layer.style[...] = jnp.linspace(0.5, 20, 6)
    np.testing.assert_allclose(np.sum(layer.kernel() ** 2, axis=(0, 1, 2)), 1, rtol=1e-5)
    # Too small to be normalised: the epsilon holds.
    layer.style[...] = jnp.full(6, 1e-6)
    assert np.sum(layer.kernel() ** 2, axis=(0, 1, 2)).max() < 0.1


def test_folding_puts_the_style_into_the_kernel():
    layer = StyleConv(6, 4, 1, demodulate=False, rngs=nnx.Rngs(0))
    layer.style[...] = jnp.linspace(0.5, 2, 6)
    kernel = layer.kernel()
    layer.fold()
    np.testing.assert_array_equal(layer.kernel(), kernel)
    assert layer.style is None


def test_channels_quarter_with_every_doubling():
    upsampler = Upsampler(32, (6, 5), rngs=nnx.Rngs(0))
    out = nnx.jit(Upsampler.__call__)(upsampler, jnp.ones((3, 4, 4, 32), jnp.bfloat16))
    assert out.shape == (3, 16, 16, 2)
    assert out.dtype == jnp.float32
    assert upsampler.channels_out == 2

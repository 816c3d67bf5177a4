"""UV feature maps to twice their side a block: StyleGAN2 convolutions and a pixel-shuffled skip.

The layers are StyleGAN2's (Karras et al., arXiv 1912.04958) with a style that depends on nothing:
one learned scale an input channel. Everything is float32, channels last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

CLAMP = 256.0
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


class StyleConv(nnx.Module):
    """A k x k convolution whose kernel is scaled by a style an input channel.

    `demodulate`: the kernel is then normalised for each output channel.
    """

    def __init__(
        self, channels_in: int, channels_out: int, size: int, *, demodulate: bool, rngs: nnx.Rngs
    ):
        shape = (size, size, channels_in, channels_out)
        self.weight = nnx.Param(
            nnx.initializers.normal(1.0)(rngs.params(), shape, jnp.float32),
            logical_axes=(None, None, "channels_in", "channels_out"),
        )
        self.style = nnx.Param(jnp.ones(channels_in))
        self.bias = nnx.Param(jnp.zeros(channels_out))
        self.demodulate = demodulate

    def kernel(self) -> Float[Array, "k k i o"]:
        """The kernel with the style in it."""
        if self.style is None:
            return self.weight[...]
        kernel = self.weight[...] * self.style[...][:, None]
        if self.demodulate:
            return kernel * jax.lax.rsqrt(jnp.sum(kernel**2, axis=(0, 1, 2)) + 1e-8)
        return kernel / np.sqrt(kernel.shape[2])

    def fold(self) -> None:
        """Puts the style into the weight once, for inference."""
        self.weight = nnx.Variable(self.kernel())
        self.style = None


@jax.custom_vjp
def convolve(
    x: Float[Array, "B h w i"], kernel: Float[Array, "k k i o"]
) -> Float[Array, "B h w o"]:
    """An ordinary convolution (cross-correlation, odd k), zero-padded to keep the map's size."""
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_DIMENSIONS)


def _convolve_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel), (x, kernel)


def _convolve_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    """The kernel's gradient as one matrix product a tap.

    JAX would derive a convolution with a window as large as the map, for which XLA's CPU backend
    takes a hundred times as long.
    """
    x, kernel = residuals
    (h, w), size = x.shape[1:3], kernel.shape[0]
    margin = size // 2
    x = jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    taps = [
        jnp.einsum("bhwi,bhwo->io", x[:, a : a + h, b : b + w], dy)
        for a in range(size)
        for b in range(size)
    ]
    dx = convolve(dy, rearrange(kernel[::-1, ::-1], "a b i o -> a b o i"))
    return dx, jnp.stack(taps).reshape(kernel.shape)


convolve.defvjp(_convolve_forward, _convolve_backward)


def convolve_up(
    x: Float[Array, "B h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "B 2h 2w o"]:
    """A transposed convolution of stride 2, then the binomial filter [1, 3, 3, 1] along each axis.

    Texel (i, j) adds x[i, j] @ kernel[a, b] to (2i + a, 2j + b) of a (2h+1) x (2w+1) map. The
    filter has gain 2 along each axis and one texel of zero padding, which leaves 2h x 2w.
    """
    # One matrix product; a convolution over the zero-stuffed map would take four times as many
    # multiplications.
    taps = jnp.einsum("bhwi,acio->acbhwo", x, kernel)
    rows = _spread(taps, axis=2)
    return _binomial(_binomial(_spread(rows, axis=2), axis=1), axis=2)


def _spread(taps: Float[Array, "3 *s"], axis: int) -> Float[Array, "*t"]:
    """Adds taps[a, i] to position 2i + a along `axis` of `taps[0]`: n make 2n + 1, and a zero."""
    before, after = [(0, 0)] * (taps.ndim - 1), [(0, 0)] * (taps.ndim - 1)
    before[axis], after[axis] = (1, 0), (0, 1)
    even = jnp.pad(taps[0], after) + jnp.pad(taps[2], before)
    both = jnp.stack([even, jnp.pad(taps[1], after)], axis=axis + 1)
    return both.reshape(*both.shape[:axis], -1, *both.shape[axis + 2 :])


def _binomial(x: Float[Array, "*s"], axis: int) -> Float[Array, "*t"]:
    """[1, 3, 3, 1] / 4 along an axis at whose end lies a zero already: two shorter than `x`."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (1, 0)
    n = x.shape[axis] - 2
    x = jnp.pad(x, pad)
    a, b, c, d = (jax.lax.slice_in_dim(x, i, i + n, axis=axis) for i in range(4))
    return (a + d) * 0.25 + (b + c) * 0.75


def activate(x: Float[Array, "B h w c"], bias: Float[Array, "c"]) -> Float[Array, "B h w c"]:
    """Bias, leaky ReLU with slope 0.2 and gain sqrt(2), clamped to +-256."""
    return jnp.clip(jax.nn.leaky_relu(x + bias, 0.2) * np.sqrt(2, dtype=np.float32), -CLAMP, CLAMP)


def pixel_shuffle(x: Float[Array, "B h w c"]) -> Float[Array, "B 2h 2w c/4"]:
    """Spreads each texel's channels over 2 x 2 texels; a group of four channels makes one."""
    return rearrange(x, "b h w (c dy dx) -> b (h dy) (w dx) c", dy=2, dx=2)


class UpsamplerBlock(nnx.Module):
    """Doubles a feature map's side; the skip path gains a contribution of the new features."""

    def __init__(self, channels_in: int, channels: int, skip_channels: int, *, rngs: nnx.Rngs):
        self.up = StyleConv(channels_in, channels, 3, demodulate=True, rngs=rngs)
        self.conv = StyleConv(channels, channels, 3, demodulate=True, rngs=rngs)
        self.to_skip = StyleConv(channels, skip_channels, 1, demodulate=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B h w i"], skip: Float[Array, "B h w s"]
    ) -> tuple[Float[Array, "B 2h 2w o"], Float[Array, "B 2h 2w s/4"]]:
        x = activate(convolve_up(x, self.up.kernel()), self.up.bias[...])
        x = activate(convolve(x, self.conv.kernel()), self.conv.bias[...])
        addition = x @ self.to_skip.kernel()[0, 0] + self.to_skip.bias[...]
        return x, pixel_shuffle(skip) + jnp.clip(addition, -CLAMP, CLAMP)


class Upsampler(nnx.Module):
    """One block a doubling; its output has width / 4^blocks channels."""

    def __init__(self, width: int, channels: tuple[int, ...], *, rngs: nnx.Rngs):
        if width % 4 ** len(channels):
            raise ValueError(
                f"config.model.width {width} must be a multiple of {4 ** len(channels)}: each of "
                f"the {len(channels)} config.model.upsampler_channels quarters it"
            )
        inputs = (width, *channels)
        self.blocks = nnx.List(
            UpsamplerBlock(inputs[i], channels[i], width // 4 ** (i + 1), rngs=rngs)
            for i in range(len(channels))
        )
        self.channels_out = width // 4 ** len(channels)

    def __call__(self, x: Float[Array, "B h w d"]) -> Float[Array, "B H W c"]:
        x = skip = x.astype(jnp.float32)
        for block in self.blocks:
            x, skip = block(x, skip)
        return skip

    def fold(self) -> None:
        """Computes the kernels once, for inference."""
        for block in self.blocks:
            for layer in (block.up, block.conv, block.to_skip):
                layer.fold()

"""UV feature maps to twice their side a block: StyleGAN2 convolutions and a pixel-shuffled skip.

The layers are StyleGAN2's (Karras et al., arXiv 1912.04958) with a style that depends on nothing:
one learned scale an input channel. Arrays are float32, channels last. Convolutions and products run
at the backend's default precision, for speed: TPUs round their factors to bfloat16, NVIDIA GPUs to
TF32, and sums are float32; `jax_default_matmul_precision` = "highest" is float32 throughout. TPUs
that round keep maps in bfloat16, too (`upsampler_tpu.py`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flexavatar_jax.model import upsampler_tpu
from flexavatar_jax.model.upsampler_tpu import CLAMP
from kernels import backends

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

    def kernel(self) -> Float[ArrayLike, "k k i o"]:
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


Padding = tuple[tuple[int, int], tuple[int, int]]
NONE: Padding = ((0, 0), (0, 0))
SAME: Padding = ((1, 1), (1, 1))


def _rounds() -> bool:
    """Whether convolutions round what they multiply to bfloat16: those of TPUs do, by default."""
    default = jax.config.jax_default_matmul_precision in (None, "default", "fastest", "bfloat16")
    return default and backends.platform() == "tpu"


def _factor(x: ArrayLike) -> ArrayLike:
    """What convolutions multiply: rounded here where they would round it themselves.

    That halves what is read from memory, and what is kept for the backward pass.
    """
    return jnp.asarray(x, jnp.bfloat16) if _rounds() else x


def _convolution(x: ArrayLike, kernel: ArrayLike, padding: Padding) -> Float[Array, "B H W o"]:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        padding,
        dimension_numbers=_DIMENSIONS,
        preferred_element_type=jnp.float32,
    )


def convolve(
    x: Float[ArrayLike, "B h w i"], kernel: Float[ArrayLike, "k l i o"], padding: Padding
) -> Float[Array, "B H W o"]:
    """An ordinary convolution (cross-correlation) with zeros before and after rows and columns."""
    return _convolve(_factor(x), kernel, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x: ArrayLike, kernel: ArrayLike, padding: Padding) -> Array:
    return _convolution(x, _factor(kernel), padding)


def _convolve_forward(x: ArrayLike, kernel: ArrayLike, padding: Padding) -> tuple[Array, tuple]:
    kernel = _factor(kernel)
    return _convolution(x, kernel, padding), (x, kernel)


def _convolve_backward(padding: Padding, residuals: tuple, dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    dy = _factor(dy)
    around = tuple(
        (size - 1 - before, size - 1 - after)
        for size, (before, after) in zip(kernel.shape[:2], padding, strict=True)
    )
    dx = _convolution(dy, rearrange(kernel[::-1, ::-1], "a b i o -> a b o i"), around)
    way = _kernel_gradient_by_taps if backends.platform() == "cpu" else _kernel_gradient
    return dx.astype(x.dtype), way(x, dy, padding=padding)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _kernel_gradient(
    x: Float[ArrayLike, "B h w i"], dy: Float[ArrayLike, "B H W o"], *, padding: Padding
) -> Float[Array, "k l i o"]:
    """A convolution over the batch whose window is the map, which accelerators are good at."""
    return jax.lax.conv_general_dilated(
        x,
        dy,
        (1, 1),
        padding,
        dimension_numbers=("CHWN", "IHWO", "HWNC"),
        preferred_element_type=jnp.float32,
    )


def _kernel_gradient_by_taps(
    x: Float[ArrayLike, "B h w i"], dy: Float[ArrayLike, "B H W o"], *, padding: Padding
) -> Float[Array, "k l i o"]:
    """One matrix product a tap: on CPUs XLA takes a hundred times as long for such windows.

    `dy` is transposed once, so that what each tap reads of `x` is copied in whole rows.
    """
    h, w = dy.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    down, across = padded.shape[1] - h + 1, padded.shape[2] - w + 1
    columns = rearrange(dy, "b h w o -> o (b h w)")
    taps = [
        columns @ rearrange(padded[:, a : a + h, b : b + w], "b h w i -> (b h w) i")
        for a in range(down)
        for b in range(across)
    ]
    return rearrange(jnp.stack(taps), "(a b) o i -> a b i o", a=down)


def convolve_up(
    x: Float[ArrayLike, "B h w i"], kernel: Float[ArrayLike, "3 3 i o"]
) -> Float[Array, "B 2*h 2*w o"]:
    """A transposed convolution of stride 2, then the binomial filter [1, 3, 3, 1] along each axis.

    Texel (i, j) adds x[i, j] @ kernel[a, b] to (2i + a, 2j + b) of a (2h+1) x (2w+1) map. The
    filter has gain 2 along each axis and one texel of zero padding, which leaves 2h x 2w.
    """
    # Rows and columns of even number get two of the kernel's taps (from this texel and the one
    # before), those of odd number one: four small convolutions. One over the map with zeros between
    # its texels would take four times as many multiplications.
    even, odd = slice(None, None, -2), slice(1, 2)
    ends, none = (1, 1), (0, 0)
    phases = [
        [
            convolve(x, kernel[rows, columns], (row_ends, column_ends))
            for columns, column_ends in ((even, ends), (odd, none))
        ]
        for rows, row_ends in ((even, ends), (odd, none))
    ]
    columns = [_binomial(*row, axis=2) for row in phases]
    halves = [
        jnp.stack(_binomial(*column, axis=1), axis=2) for column in zip(*columns, strict=True)
    ]
    return rearrange(jnp.stack(halves, axis=4), "b h dy w dx o -> b (h dy) (w dx) o")


def _binomial(
    even: Float[Array, "*m"], odd: Float[Array, "*n"], axis: int
) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """[1, 3, 3, 1] / 4 along an axis of which texels of even and odd number lie apart.

    Returns what has even and what has odd number afterwards.
    """
    n = odd.shape[axis]
    pad = [(0, 0)] * odd.ndim
    pad[axis] = (1, 1)
    before, here, after = (
        jax.lax.slice_in_dim(jnp.pad(odd, pad), i, i + n, axis=axis) for i in range(3)
    )
    first, second = (jax.lax.slice_in_dim(even, i, i + n, axis=axis) for i in range(2))
    return (
        0.25 * (before + second) + 0.75 * (first + here),
        0.25 * (first + after) + 0.75 * (here + second),
    )


def activate(x: Float[Array, "*b c"], bias: Float[Array, "c"]) -> Float[Array, "*b c"]:
    """Bias, leaky ReLU with slope 0.2 and gain sqrt(2), clamped to +-256."""
    return jnp.clip(jax.nn.leaky_relu(x + bias, 0.2) * np.sqrt(2, dtype=np.float32), -CLAMP, CLAMP)


def pixel_shuffle(x: Float[Array, "B h w c"]) -> Float[Array, "B 2*h 2*w c//4"]:
    """Spreads each texel's channels over 2 x 2 texels; a group of four channels makes one."""
    return rearrange(x, "b h w (c dy dx) -> b (h dy) (w dx) c", dy=2, dx=2)


class UpsamplerBlock(nnx.Module):
    """Doubles a feature map's side; the skip path gains a contribution of the new features."""

    def __init__(self, channels_in: int, channels: int, skip_channels: int, *, rngs: nnx.Rngs):
        self.up = StyleConv(channels_in, channels, 3, demodulate=True, rngs=rngs)
        self.conv = StyleConv(channels, channels, 3, demodulate=True, rngs=rngs)
        self.to_skip = StyleConv(channels, skip_channels, 1, demodulate=False, rngs=rngs)

    def __call__(
        self, x: Float[ArrayLike, "B h w i"], skip: Float[ArrayLike, "B h w s"]
    ) -> tuple[Float[Array, "B 2*h 2*w o"], Float[Array, "B 2*h 2*w s//4"]]:
        if _rounds():
            x = upsampler_tpu.convolve_up(x, self.up.kernel(), self.up.bias[...])
            x = convolve(x, self.conv.kernel(), SAME)
            x = upsampler_tpu.activate(x, self.conv.bias[...])
            skip = upsampler_tpu.pixel_shuffle(skip)
        else:
            x = activate(convolve_up(x, self.up.kernel()), self.up.bias[...])
            x = activate(convolve(x, self.conv.kernel(), SAME), self.conv.bias[...])
            skip = pixel_shuffle(skip)
        addition = convolve(x, self.to_skip.kernel(), NONE) + self.to_skip.bias[...]
        return x, skip + jnp.clip(addition, -CLAMP, CLAMP)


class Upsampler(nnx.Module):
    """One block a doubling; its output has width / 4^blocks channels."""

    def __init__(self, width: int, channels: tuple[int, ...], *, rngs: nnx.Rngs):
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

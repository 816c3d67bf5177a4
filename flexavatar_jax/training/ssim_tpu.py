"""SSIM on TPUs, value and gradient in one Pallas kernel: its maps never leave the chip.

A program has one colour channel of a pair of images. Rows go by in strips; the window is applied
down the rows and then along them, as sums of shifted copies in float32. The gradient in the first
image needs the window three times more, over maps of derivatives kept on chip, so that value and
gradient together read both images once.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import ArrayLike
from jaxtyping import Array, Float

STRIP = 32
"""Rows at a time."""
HALO = 8
"""Rows before and after a strip: at least the window's reach, and whole registers."""
LANES = 128

VECTOR_OPS = {"ssim": 8 * (11 + 10 + 11 + 10 + 10) + 60}
"""For a pixel of a channel: the window over five moments and three maps of derivatives (products,
sums, shifts along rows), and what is computed of them."""


def ssim_and_gradient(
    prediction: Float[ArrayLike, "n h w c"],
    target: Float[ArrayLike, "n h w c"],
    *,
    taps: tuple[float, ...],
    c1: float,
    c2: float,
) -> tuple[Float[Array, "n"], Float[Array, "n h w c"]]:
    """Mean SSIM of each image, and its gradient in `prediction`.

    Args:
      taps: of the window along each axis, symmetric, of sum 1, 2 * HALO + 1 or fewer.
      c1, c2: the two constants of SSIM.
    """
    height, width = prediction.shape[1:3]
    strips = -(-height // STRIP)
    reach = len(taps) // 2
    # Zeros to the right serve as those to the left, too: shifts go round.
    rows, columns = strips * STRIP, -(-(width + reach) // LANES) * LANES
    padding = ((0, 0), (0, 0), (HALO, rows - height + HALO), (0, columns - width))
    planes = [jnp.pad(rearrange(x, "n h w c -> n c h w"), padding) for x in (prediction, target)]
    count, channels = planes[0].shape[:2]

    def block(*shape):
        return pl.BlockSpec((1, 1, *shape), lambda n, c: (n, c, 0, 0))

    sums, gradient = pl.pallas_call(
        functools.partial(_kernel, size=(height, width), taps=taps, c1=c1, c2=c2),
        grid=(count, channels),
        in_specs=[block(*planes[0].shape[2:])] * 2,
        out_specs=[block(1, columns), block(rows, columns)],
        out_shape=[
            jax.ShapeDtypeStruct((count, channels, 1, columns), jnp.float32),
            jax.ShapeDtypeStruct((count, channels, rows, columns), jnp.float32),
        ],
        scratch_shapes=[pltpu.VMEM((3, rows + 2 * HALO, columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=count * channels * rows * columns,
            bytes_accessed=4 * count * channels * columns * (3 * rows + 4 * HALO),
        ),
        name="ssim",
    )(*planes)
    elements = channels * height * width
    gradient = rearrange(gradient[:, :, :height, :width], "n c h w -> n h w c")
    return jnp.sum(sums, axis=(1, 2, 3)) / elements, gradient / elements


def _kernel(x_ref, y_ref, sum_ref, gradient_ref, maps, *, size, taps, c1, c2):
    reach = len(taps) // 2
    strips, columns = gradient_ref.shape[2] // STRIP, gradient_ref.shape[3]

    def blur(x):
        """A strip with its halos under the window, without them."""
        first = HALO - reach
        x = sum(tap * x[first + k : first + k + STRIP] for k, tap in enumerate(taps))
        return sum(
            tap * (pltpu.roll(x, (reach - k) % columns, 1) if k != reach else x)
            for k, tap in enumerate(taps)
        )

    sum_ref[...] = jnp.zeros_like(sum_ref)
    maps[:, :HALO, :] = jnp.zeros((3, HALO, columns), jnp.float32)
    maps[:, -HALO:, :] = jnp.zeros((3, HALO, columns), jnp.float32)

    @pl.loop(0, strips)
    def _(i):
        rows = pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP + 2 * HALO)
        x, y = x_ref[0, 0, rows, :], y_ref[0, 0, rows, :]
        mx, my, xx, yy, xy = map(blur, (x, y, x * x, y * y, x * y))
        a1, a2 = 2 * mx * my + c1, 2 * (xy - mx * my) + c2
        b1, b2 = mx * mx + my * my + c1, xx - mx * mx + yy - my * my + c2
        both = 1 / (b1 * b2)
        similarity = a1 * a2 * both
        row = i * STRIP + jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 0)
        column = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 1)
        inside = (row < size[0]) & (column < size[1])
        derivatives = (
            2 * (both * my * (a2 - a1) - mx * similarity * (b2 - b1) * both),
            -similarity * b1 * both,
            2 * a1 * both,
        )
        sum_ref[0, 0] += jnp.sum(jnp.where(inside, similarity, 0), axis=0, keepdims=True)
        here = pl.ds(pl.multiple_of(HALO + i * STRIP, HALO), STRIP)
        for k, derivative in enumerate(derivatives):  # in E[x], E[x^2], E[xy]
            maps[k, here, :] = jnp.where(inside, derivative, 0)

    @pl.loop(0, strips)
    def _(i):
        rows = pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP + 2 * HALO)
        here = pl.ds(pl.multiple_of(HALO + i * STRIP, HALO), STRIP)
        in_mean, in_square, in_product = (blur(maps[k, rows, :]) for k in range(3))
        x, y = x_ref[0, 0, here, :], y_ref[0, 0, here, :]
        gradient_ref[0, 0, pl.ds(pl.multiple_of(i * STRIP, STRIP), STRIP), :] = (
            in_mean + 2 * x * in_square + y * in_product
        )

"""A splat's strength at the pixels of a tile as a quadratic, for the matrix unit: both ways.

With (x, y) a pixel's offset from the tile's centre, log(strength) is a sum of six monomials, whose
coefficients depend on the splat and the tile alone: [128, 6] x [6, 256] for a chunk. Gradients come
back as those of the coefficients.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from kernels.pallas_tpu.products import dot, iota, split_bfloat16, stack_bfloat16
from kernels.pallas_tpu.sizes import BLOCK, PIXELS, TILE
from kernels.projection import MAX_ALPHA, MIN_ALPHA


def pixel_basis() -> Float[Array, "8 pixels"]:
    """1, x, y, x^2, xy, y^2 and two rows of zeros; x and y from the tile's centre."""
    pixel = iota((1, PIXELS), 1)
    x = (pixel & (TILE - 1)).astype(jnp.float32) - (TILE / 2 - 0.5)
    y = (pixel >> (TILE.bit_length() - 1)).astype(jnp.float32) - (TILE / 2 - 0.5)
    zero = jnp.zeros_like(x)
    return jnp.concatenate([zero + 1, x, y, x * x, x * y, y * y, zero, zero], axis=0)


def tile_centre(block: Array, tile: Array, blocks_across: int) -> tuple[Array, Array]:
    """The tile's centre (x, y) in the image, in pixels."""
    across = BLOCK[0].bit_length() - 1
    x = lax.rem(block, blocks_across) * BLOCK[0] + (tile & (BLOCK[0] - 1))
    y = lax.div(block, blocks_across) * BLOCK[1] + (tile >> across)
    return (x * TILE + TILE // 2).astype(jnp.float32), (y * TILE + TILE // 2).astype(jnp.float32)


def _splat_rows(splats: Float[Array, "R 128"], centre: tuple[Array, Array]):
    """dx, dy, p, q, r, opacity as [1, 128], and u, v: the whitened offset at the tile's centre."""
    p, q, r, opacity = (splats[i : i + 1] for i in range(2, 6))
    dx, dy = centre[0] - splats[0:1], centre[1] - splats[1:2]
    return dx, dy, p, q, r, opacity, p * dx + q * dy, r * dy


def alphas(splats: Float[Array, "R 128"], centre: tuple[Array, Array], basis3: Array):
    """exp(log(opacity) - sigma) and alpha (0 where skipped), [128, 256] each."""
    _, _, p, q, r, opacity, u, v = _splat_rows(splats, centre)
    # sigma = ((u + p x + q y)^2 + (v + r y)^2) / 2 at offset (x, y) from the tile's centre.
    constant = jnp.log(jnp.maximum(opacity, 1e-30)) - 0.5 * (u * u + v * v)
    zero = jnp.zeros_like(u)
    coefficients = [constant, -u * p, -(u * q + v * r)]
    coefficients += [-0.5 * p * p, -p * q, -0.5 * (q * q + r * r), zero, zero]
    peak = jnp.exp(dot(stack_bfloat16(jnp.concatenate(coefficients, axis=0)), basis3, (0, 0)))
    alpha = jnp.minimum(peak, MAX_ALPHA)
    return peak, jnp.where(peak >= MIN_ALPHA, alpha, 0.0)


def over_pixels(basis: Array, x: Float[Array, "128 pixels"]) -> Float[Array, "8 128"]:
    """Sums over the pixels of `x` times each monomial of the basis."""
    return sum(dot(basis, part, (1, 1)) for part in split_bfloat16(x)[::-1])


def coefficients_backward(splats, centre, d: Float[Array, "8 128"]) -> list[Float[Array, "1 128"]]:
    """Gradients of x, y, p, q, r, opacity from those of the six coefficients in `alphas`."""
    dx, dy, p, q, r, opacity, u, v = _splat_rows(splats, centre)
    d1, d_x, d_y, d_xx, d_xy, d_yy = (d[i : i + 1] for i in range(6))
    d_u = -(u * d1 + p * d_x + q * d_y)
    d_v = -(v * d1 + r * d_y)
    d_p = d_u * dx - (u * d_x + p * d_xx + q * d_xy)
    d_q = d_u * dy - (u * d_y + p * d_xy + q * d_yy)
    d_r = d_v * dy - (v * d_y + r * d_yy)
    return [-d_u * p, -(d_u * q + d_v * r), d_p, d_q, d_r, d1 / jnp.maximum(opacity, MIN_ALPHA)]


def absolute_gradients(
    splats, centre, d_power: Float[Array, "128 pixels"], basis: Array, basis3: Array
) -> list[Float[Array, "1 128"]]:
    """Sums over the pixels of what each adds to x's and y's gradients, taken absolutely."""
    _, _, p, q, r, _, u, v = _splat_rows(splats, centre)
    zeros = [jnp.zeros_like(u)] * 5
    sums = []
    for slope in ([p * u, p * p, p * q], [q * u + r * v, p * q, q * q + r * r]):
        slope = stack_bfloat16(jnp.concatenate([*slope, *zeros], axis=0))
        by_pixel = jnp.abs(d_power * dot(slope, basis3, (0, 0)))
        sums.append(over_pixels(basis, by_pixel)[0:1])
    return sums

"""Blending of tiles on a TPU, forward and backward: two Mosaic kernels.

A tile is 16x16 pixels, laid along the 256 lanes of two registers; the splats that touch it come
front to back in *chunks* of 128 (see `lists`), and a chunk is matrix work for the MXU:

- log(opacity) - sigma of 128 splats at 256 pixels is [128, 6] x [6, 256]: a quadratic in the
  pixel's offset from the tile's centre;
- the log transmittance is a running sum of log(1 - alpha) down the chunk, a triangular product;
- colours are features [F, 128] x weights [128, 256], and in the backward pass the gradients of the
  six coefficients are d_power [128, 256] x the same pixel basis.

The MXU multiplies in bfloat16 (see `products`). Products whose other side is exact in bfloat16 (the
pixel basis, multiples of 1/4 up to 64; a triangle of ones) cost one pass over a float32's three
parts, stacked along the contracted axis where there is room. So everything is as accurate as
float32 arithmetic, at one to three passes, not six.

The backward pass walks the chunks back to front. It starts from the log transmittance at which the
forward pass ended and adds what each chunk took away: nothing is divided by a small transmittance.

A *block* of tiles is one step of the grid; its chunks are contiguous in HBM and are fetched
`BUFFERS` ahead by DMA, across the borders of tiles.
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.pallas_tpu.products import dot, iota, split_bfloat16, stack, stack_bfloat16, sum_parts
from kernels.pallas_tpu.sizes import BLOCK, CHUNK, GEOMETRY, PIXELS, TILE, TILES
from kernels.projection import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE
from kernels.varying import shape_like

BUFFERS = 4

_LOG_MIN_TRANSMITTANCE = math.log(MIN_TRANSMITTANCE)
_NEVER = 1e9


def _pixel_basis() -> Float[Array, "8 pixels"]:
    """1, x, y, x^2, xy, y^2 and two rows of zeros; x and y from the tile's centre."""
    pixel = iota((1, PIXELS), 1)
    x = (pixel & (TILE - 1)).astype(jnp.float32) - (TILE / 2 - 0.5)
    y = (pixel >> (TILE.bit_length() - 1)).astype(jnp.float32) - (TILE / 2 - 0.5)
    zero = jnp.zeros_like(x)
    return jnp.concatenate([zero + 1, x, y, x * x, x * y, y * y, zero, zero], axis=0)


def _triangle(inclusive: bool, upper: bool) -> Array:
    """[128, 3 * 128]: three triangles of ones side by side, to sum what is split in three
    bfloat16 over earlier (lower) or later (upper) splats."""
    shape = (CHUNK, 3 * CHUNK)
    row, column = iota(shape, 0), iota(shape, 1) & (CHUNK - 1)
    ahead = row - column if not upper else column - row
    return (ahead >= (0 if inclusive else 1)).astype(jnp.float32).astype(jnp.bfloat16)


def _running_sum(triangle: Array, x: Float[Array, "128 pixels"]) -> Array:
    return dot(triangle, jnp.concatenate(split_bfloat16(x), axis=0), (1, 0))


def _centre(block: Array, tile: Array, blocks_across: int) -> tuple[Array, Array]:
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


def _alphas(splats: Float[Array, "R 128"], centre: tuple[Array, Array], basis3: Array):
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


def _forward_kernel(starts, splats, out, state, buffer, semaphores, *, blocks_across, features):
    block = pl.program_id(0)
    first, end = starts[block * TILES], starts[(block + 1) * TILES]
    basis3 = jnp.concatenate([_pixel_basis()] * 3, axis=0).astype(jnp.bfloat16)
    earlier = _triangle(inclusive=True, upper=False)
    place = iota((CHUNK, PIXELS), 0)

    def fetch(chunk):
        slot = lax.rem(chunk, BUFFERS)
        return pltpu.make_async_copy(splats.at[chunk], buffer.at[slot], semaphores.at[slot])

    for ahead in range(BUFFERS - 1):
        pl.when(first + ahead < end)(lambda ahead=ahead: fetch(first + ahead).start())

    def blend_tile(tile, _):
        centre = _centre(block, tile, blocks_across)
        start = starts[block * TILES + tile]

        def blend_chunk(chunk, carry):
            pl.when(chunk + BUFFERS - 1 < end)(lambda: fetch(chunk + BUFFERS - 1).start())
            fetch(chunk).wait()

            def work(carry):
                total, log_t, log_t_end, stop = carry
                rows = buffer[lax.rem(chunk, BUFFERS)]
                _, alpha = _alphas(rows, centre, basis3)
                loss = jnp.log(1.0 - alpha)
                after = log_t + _running_sum(earlier, loss)
                alive = after > _LOG_MIN_TRANSMITTANCE
                weight = jnp.where(alive, jnp.exp(after - loss) * alpha, 0.0)
                feature3 = stack_bfloat16(rows[GEOMETRY:])
                total += sum(
                    sum_parts(dot(feature3, part, (1, 0))) for part in split_bfloat16(weight)[::-1]
                )
                lowest = jnp.min(jnp.where(alive, after, 0.0), axis=0, keepdims=True)
                ended = jnp.where(
                    alive, _NEVER, (place + (chunk - start) * CHUNK).astype(jnp.float32)
                )
                ended = jnp.min(ended, axis=0, keepdims=True)
                return (
                    total,
                    after[CHUNK - 1 :],
                    jnp.minimum(log_t_end, lowest),
                    jnp.minimum(stop, ended),
                )

            # A tile all of whose pixels have ended only lets its chunks pass.
            visible = jnp.max(carry[1]) > _LOG_MIN_TRANSMITTANCE
            return lax.cond(visible, work, lambda carry: carry, carry)

        zero = jnp.zeros((1, PIXELS), jnp.float32)
        carry = (jnp.zeros((features, PIXELS), jnp.float32), zero, zero, zero + _NEVER)
        stop_chunk = starts[block * TILES + tile + 1]
        total, _, log_t_end, stop = lax.fori_loop(start, stop_chunk, blend_chunk, carry)
        out[tile] = total
        state[tile] = jnp.concatenate([log_t_end, stop], axis=0)
        return 0

    lax.fori_loop(0, TILES, blend_tile, 0)


def _backward_kernel(
    starts, splats, state, cotangent, gradient, buffer, results, fetches, stores, *, blocks_across
):
    block = pl.program_id(0)
    first, end = starts[block * TILES], starts[(block + 1) * TILES]
    basis = _pixel_basis()
    basis3 = jnp.concatenate([basis] * 3, axis=0).astype(jnp.bfloat16)
    basis = basis.astype(jnp.bfloat16)
    earlier = _triangle(inclusive=True, upper=False)
    later = _triangle(inclusive=False, upper=True)
    place = iota((CHUNK, PIXELS), 0)

    def fetch(chunk):
        slot = lax.rem(chunk, BUFFERS)
        return pltpu.make_async_copy(splats.at[chunk], buffer.at[slot], fetches.at[slot])

    def store(chunk):
        slot = lax.rem(chunk, BUFFERS)
        return pltpu.make_async_copy(results.at[slot], gradient.at[chunk], stores.at[slot])

    for behind in range(1, BUFFERS):
        pl.when(end - behind >= first)(lambda behind=behind: fetch(end - behind).start())

    def tile_backward(tiles_done, _):
        tile = TILES - 1 - tiles_done
        centre = _centre(block, tile, blocks_across)
        start, stop_chunk = starts[block * TILES + tile], starts[block * TILES + tile + 1]
        log_t_end, stop = state[tile, 0:1], state[tile, 1:2]
        d_out = cotangent[tile]
        d_out3 = stack_bfloat16(d_out)
        last = jnp.max(stop)
        g_high, g_middle, g_low = split_bfloat16(d_out)
        d_out6 = stack([g_high, g_middle, g_high, g_middle, g_low, g_high])

        def chunk_backward(chunks_done, carry):
            chunk = stop_chunk - 1 - chunks_done
            slot = lax.rem(chunk, BUFFERS)
            pl.when(chunk - BUFFERS + 1 >= first)(lambda: fetch(chunk - BUFFERS + 1).start())
            fetch(chunk).wait()
            pl.when(chunk + BUFFERS < end)(lambda: store(chunk + BUFFERS).wait())
            offset = (chunk - start) * CHUNK

            def work(carry):
                log_t, behind = carry
                rows = buffer[slot]
                peak, alpha = _alphas(rows, centre, basis3)
                alpha = jnp.where((place + offset).astype(jnp.float32) < stop, alpha, 0.0)
                loss = jnp.log(1.0 - alpha)
                taken = _running_sum(earlier, loss)
                log_t_start = log_t - taken[CHUNK - 1 :]
                before = jnp.exp(log_t_start + (taken - loss))
                weight = before * alpha

                # d L / d weight [128, 256] = features^T x d_out: the six products of parts that
                # matter, in one.
                high, middle, low = split_bfloat16(rows[GEOMETRY:])
                value = dot(stack([high, high, middle, middle, high, low]), d_out6, (0, 0))
                shaded = weight * value
                after = behind + _running_sum(later, shaded)
                d_alpha = before * value - after / (1.0 - alpha)
                smooth = (peak < MAX_ALPHA) & (alpha > 0.0)
                d_power = jnp.where(smooth, d_alpha * alpha, 0.0)

                d_features = sum(
                    sum_parts(dot(d_out3, part, (1, 1))) for part in split_bfloat16(weight)[::-1]
                )
                d_coefficients = sum(
                    dot(basis, part, (1, 1)) for part in split_bfloat16(d_power)[::-1]
                )
                d_splats = _coefficients_backward(rows, centre, d_coefficients)
                results[slot] = jnp.concatenate([d_splats, d_features], axis=0)
                return log_t_start, after[0:1] + shaded[0:1]

            def skip(carry):
                results[slot] = jnp.zeros_like(results[slot])
                return carry

            carry = lax.cond(offset.astype(jnp.float32) < last, work, skip, carry)
            store(chunk).start()
            return carry

        carry = (log_t_end, jnp.zeros_like(log_t_end))
        lax.fori_loop(0, stop_chunk - start, chunk_backward, carry)
        return 0

    lax.fori_loop(0, TILES, tile_backward, 0)
    for ahead in range(BUFFERS):
        pl.when(first + ahead < end)(lambda ahead=ahead: store(first + ahead).wait())


def _coefficients_backward(splats, centre, d: Float[Array, "8 128"]) -> Float[Array, "8 128"]:
    """Gradients of x, y, p, q, r, opacity from those of the six coefficients in `_alphas`."""
    dx, dy, p, q, r, opacity, u, v = _splat_rows(splats, centre)
    d1, d_x, d_y, d_xx, d_xy, d_yy = (d[i : i + 1] for i in range(6))
    d_u = -(u * d1 + p * d_x + q * d_y)
    d_v = -(v * d1 + r * d_y)
    d_p = d_u * dx - (u * d_x + p * d_xx + q * d_xy)
    d_q = d_u * dy - (u * d_y + p * d_xy + q * d_yy)
    d_r = d_v * dy - (v * d_y + r * d_yy)
    d_opacity = d1 / jnp.maximum(opacity, MIN_ALPHA)
    zero = jnp.zeros_like(d1)
    d_mean = [-d_u * p, -(d_u * q + d_v * r)]
    return jnp.concatenate([*d_mean, d_p, d_q, d_r, d_opacity, zero, zero], axis=0)


def _tile_rows(rows: int) -> pl.BlockSpec:
    """The tiles of a block, some rows of pixels each."""
    return pl.BlockSpec((TILES, rows, PIXELS), lambda block, _: (block, 0, 0))


def blend_tiles(
    starts: Int[Array, "ends"],
    splats: Float[Array, "chunks R 128"],
    *,
    blocks_across: int,
) -> tuple[Float[Array, "ends-1 R-8 256"], Float[Array, "ends-1 2 256"]]:
    """Blend the chunks of every tile of an image, tiles in the order block by block.

    Args:
      starts: tile t owns the chunks `starts[t]:starts[t + 1]`, front to back.
      splats: rows x, y, p, q, r, opacity (see `projection.Splats`), two that aren't read, and the
        features. Unused lanes have opacity 0.
      blocks_across: blocks in a row of the image.

    Returns:
      Sum of weight times feature, and what the backward pass needs: the log transmittance at which
      each pixel ended (row 0) and the place in the tile's list where it did (row 1).
    """
    rows = splats.shape[1]
    features, tiles = rows - GEOMETRY, starts.shape[0] - 1
    return pl.pallas_call(
        functools.partial(_forward_kernel, blocks_across=blocks_across, features=features),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles // TILES,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=[_tile_rows(features), _tile_rows(2)],
            scratch_shapes=[
                pltpu.VMEM((BUFFERS, rows, CHUNK), jnp.float32),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
            ],
        ),
        out_shape=[
            shape_like(splats, tiles, features, PIXELS),
            shape_like(splats, tiles, 2, PIXELS),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="blend_tiles",
    )(starts, splats)


def blend_tiles_backward(
    starts: Int[Array, "ends"],
    splats: Float[Array, "chunks R 128"],
    state: Float[Array, "ends-1 2 256"],
    cotangent: Float[Array, "ends-1 R-8 256"],
    *,
    blocks_across: int,
) -> Float[Array, "chunks R 128"]:
    """Gradients of the `splats` of `blend_tiles`, laid out alike (chunks of no tile: undefined)."""
    rows = splats.shape[1]
    tiles = starts.shape[0] - 1
    return pl.pallas_call(
        functools.partial(_backward_kernel, blocks_across=blocks_across),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles // TILES,),
            in_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                _tile_rows(2),
                _tile_rows(rows - GEOMETRY),
            ],
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[
                pltpu.VMEM((BUFFERS, rows, CHUNK), jnp.float32),
                pltpu.VMEM((BUFFERS, rows, CHUNK), jnp.float32),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
            ],
        ),
        out_shape=shape_like(splats, *splats.shape),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        name="blend_tiles_backward",
    )(starts, splats, state, cotangent)

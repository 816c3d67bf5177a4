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
from kernels.pallas_tpu.quadratics import (
    absolute_gradients,
    alphas,
    coefficients_backward,
    over_pixels,
    pixel_basis,
    tile_centre,
)
from kernels.pallas_tpu.sizes import CHUNK, GEOMETRY, PIXELS, TILES
from kernels.projection import MAX_ALPHA, MIN_TRANSMITTANCE
from kernels.varying import shape_like

BUFFERS = 4

_LOG_MIN_TRANSMITTANCE = math.log(MIN_TRANSMITTANCE)
_NEVER = 1e9


def _triangle(inclusive: bool, upper: bool) -> Array:
    """[128, 3 * 128]: three triangles of ones side by side, to sum what is split in three
    bfloat16 over earlier (lower) or later (upper) splats."""
    shape = (CHUNK, 3 * CHUNK)
    row, column = iota(shape, 0), iota(shape, 1) & (CHUNK - 1)
    ahead = row - column if not upper else column - row
    return (ahead >= (0 if inclusive else 1)).astype(jnp.float32).astype(jnp.bfloat16)


def _running_sum(triangle: Array, x: Float[Array, "128 pixels"]) -> Array:
    return dot(triangle, jnp.concatenate(split_bfloat16(x), axis=0), (1, 0))


def _forward_kernel(starts, splats, out, state, buffer, semaphores, *, blocks_across, features):
    block = pl.program_id(0)
    first, end = starts[block * TILES], starts[(block + 1) * TILES]
    basis3 = jnp.concatenate([pixel_basis()] * 3, axis=0).astype(jnp.bfloat16)
    earlier = _triangle(inclusive=True, upper=False)
    place = iota((CHUNK, PIXELS), 0)

    def fetch(chunk):
        slot = lax.rem(chunk, BUFFERS)
        return pltpu.make_async_copy(splats.at[chunk], buffer.at[slot], semaphores.at[slot])

    for ahead in range(BUFFERS - 1):
        pl.when(first + ahead < end)(lambda ahead=ahead: fetch(first + ahead).start())

    def blend_tile(tile, _):
        centre = tile_centre(block, tile, blocks_across)
        start = starts[block * TILES + tile]

        def blend_chunk(chunk, carry):
            pl.when(chunk + BUFFERS - 1 < end)(lambda: fetch(chunk + BUFFERS - 1).start())
            fetch(chunk).wait()

            def work(carry):
                total, log_t, log_t_end, stop = carry
                rows = buffer[lax.rem(chunk, BUFFERS)]
                _, alpha = alphas(rows, centre, basis3)
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
    starts, splats, state, cotangent, gradient, buffer, results, fetches, stores, *, blocks_across,
    absgrad,
):  # fmt: skip
    block = pl.program_id(0)
    first, end = starts[block * TILES], starts[(block + 1) * TILES]
    basis = pixel_basis()
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
        centre = tile_centre(block, tile, blocks_across)
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
                peak, alpha = alphas(rows, centre, basis3)
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
                d_splats = coefficients_backward(rows, centre, over_pixels(basis, d_power))
                if absgrad:
                    absolute = absolute_gradients(rows, centre, d_power, basis, basis3)
                else:
                    absolute = [jnp.zeros_like(row) for row in d_splats[:2]]
                results[slot] = jnp.concatenate([*d_splats, *absolute, d_features], axis=0)
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
    absgrad: bool,
) -> Float[Array, "chunks R 128"]:
    """Gradients of the `splats` of `blend_tiles`, laid out alike (chunks of no tile: undefined).

    With `absgrad` the absolute ones of x and y are in the two rows that `blend_tiles` doesn't read,
    which are zeros without.
    """
    rows = splats.shape[1]
    tiles = starts.shape[0] - 1
    return pl.pallas_call(
        functools.partial(_backward_kernel, blocks_across=blocks_across, absgrad=absgrad),
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

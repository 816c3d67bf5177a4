"""Softmax attention on NVIDIA GPUs: cuDNN's fused kernels, through JAX; no logit leaves the chip.

They take what is 16 bits wide, with heads of up to 128 numbers from Ampere on, and of up to 256
from Hopper on, which FLEX-1's 192 need.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels import backends

HEAD_WIDTHS = ((9.0, 256), (8.0, 128))
"""From which compute capability on cuDNN takes heads of up to how many numbers."""


def fits(q: Float[Array, "B N H C"]) -> bool:
    """Whether cuDNN's attention takes such heads on the GPU here."""
    capability = backends.compute_capability()
    widest = next((width for least, width in HEAD_WIDTHS if capability >= least), 0)
    return q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= widest


def attend(
    q: Float[Array, "B N H C"],
    k: Sequence[Float[Array, "B _ H C"]],
    v: Sequence[Float[Array, "B _ H C"]],
    *,
    causal: bool,
) -> Float[Array, "B N H C"]:
    """`attention.attend` after heads are split and normed. See `jax.nn.dot_product_attention`.

    Odd numbers of tokens, whose gradients JAX doesn't ask cuDNN for, get one more that is masked.
    """
    keys, values = (jnp.concatenate(sets, axis=1) for sets in (k, v))
    lengths = {}
    if q.shape[1] % 2 or keys.shape[1] % 2:
        named = {"query_seq_lengths": q, "key_value_seq_lengths": keys}
        lengths = {name: jnp.full(len(x), x.shape[1], jnp.int32) for name, x in named.items()}
    out = jax.nn.dot_product_attention(
        *map(_even, (q, keys, values)), is_causal=causal, implementation="cudnn", **lengths
    )
    return out[:, : q.shape[1]]


def _even(x: Float[Array, "B N H C"]) -> Float[Array, "B _ H C"]:
    return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)])

"""Attention blocks: the causal block of the image tokens and the joint blocks of two streams.

Shapes: B batch, N and M tokens, D width, H heads. Parameters are float32; `dtype` is what the
blocks compute and hand on in. Norms take their statistics in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from flexavatar_jax.model import attention_gpu, attention_tpu, norm_tpu, products
from flexavatar_jax.model.remat import recomputed
from kernels import backends

MLP_RATIO = 4

HEAD_NORM_EPSILON = 1e-6

CACHED_LOGITS = 1 << 20
"""Logits that fit into a CPU's cache."""

GPT_INIT = nnx.initializers.normal(0.02)
"""Initialisation of the image tokens' block."""

LINEAR_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default, used wherever nothing else is said."""


def linear(
    features_in: int,
    features_out: int,
    axes: tuple[str | None, str | None],
    *,
    dtype: DTypeLike = jnp.float32,
    kernel_init: nnx.Initializer = LINEAR_INIT,
    bias_init: nnx.Initializer = nnx.initializers.zeros,
    use_bias: bool = True,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """A linear layer whose kernel's dimensions carry the logical names `axes`."""
    return products.Linear(
        features_in,
        features_out,
        use_bias=use_bias,
        kernel_init=nnx.with_metadata(kernel_init, logical_axes=axes),
        bias_init=nnx.with_metadata(bias_init, logical_axes=axes[1:]),
        dtype=dtype,
        dot_general=products.dot_general,
        rngs=rngs,
    )


class LayerNorm(nnx.LayerNorm):
    """With kernels of its own on TPUs."""

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return self._on_tpu(x)[0] if self._fits(x) else super().__call__(x)

    def beside(self, x: Float[Array, "*b D"]) -> tuple[Float[Array, "*b D"], Float[Array, "*b D"]]:
        """`x` normed and as it is, for what goes past the norm: gradients then meet in one pass."""
        return self._on_tpu(x, beside=True) if self._fits(x) else (super().__call__(x), x)

    def _fits(self, x: Array) -> bool:
        return backends.platform() == "tpu" and norm_tpu.fits(x)

    def _on_tpu(self, x: Array, *, beside: bool = False) -> tuple[Array, ...]:
        scale, bias = (p if p is None else p[...] for p in (self.scale, self.bias))
        return norm_tpu.layer_norm(
            x, scale, bias, epsilon=self.epsilon, dtype=self.dtype, beside=beside
        )


def layer_norm(
    features: int, *, epsilon: float = 1e-5, affine: bool = True, dtype: DTypeLike, rngs: nnx.Rngs
) -> LayerNorm:
    return LayerNorm(
        features,
        epsilon=epsilon,
        use_scale=affine,
        use_bias=affine,
        # E[x^2] - E[x]^2 cancels where the mean is large.
        use_fast_variance=False,
        dtype=dtype,
        rngs=rngs,
    )


class HeadNorms(NamedTuple):
    """RMS norms within each head: of the queries, and of each set of keys."""

    queries: nnx.RMSNorm
    keys: Sequence[nnx.RMSNorm]


def attend(
    q: Float[Array, "B N D"],
    k: Sequence[Float[Array, "B _ D"]],
    v: Sequence[Float[Array, "B _ D"]],
    *,
    heads: int,
    norms: HeadNorms | None = None,
    causal: bool = False,
) -> Float[Array, "B N D"]:
    """Softmax attention with scale 1/sqrt(D/heads) over all of several sets of keys and values.

    Args:
      norms: what queries and keys go through first.
      causal: token i sees tokens 0 to i of the first set.
    """
    platform = backends.platform()
    if platform == "tpu" and not causal:
        norm = norms and attention_tpu.Norm(
            norms.queries.scale[...], tuple(n.scale[...] for n in norms.keys)
        )
        out = attention_tpu.attend(q, k, v, norm, heads=heads, epsilon=HEAD_NORM_EPSILON)
        return attention_tpu.kept(out)
    q = _split_heads(q, heads)
    k, v = ([_split_heads(x, heads) for x in xs] for xs in (k, v))
    if norms:
        q, k = norms.queries(q), [norm(x) for norm, x in zip(norms.keys, k, strict=True)]
    if attention_gpu.fits(q):
        way = attention_gpu.attend
    else:
        way = _attend_in_cache if platform == "cpu" else _attend_at_once
    return _merge_heads(way(q, k, v, causal=causal))


def _attend_at_once(
    q: Float[Array, "B N H C"],
    k: Sequence[Float[Array, "B _ H C"]],
    v: Sequence[Float[Array, "B _ H C"]],
    *,
    causal: bool,
) -> Float[Array, "B N H C"]:
    """`attend` for a TPU's causal block, and for GPUs whose cuDNN doesn't take the heads.

    Sets are not put together: a few tokens more than a multiple of 128 fit a TPU's registers badly.
    """
    logits = [_logits("bnhc,bmhc->bhnm", q, keys, causal=causal) for keys in k]
    top = functools.reduce(jnp.maximum, (jnp.max(x, axis=-1, keepdims=True) for x in logits))
    weights = [jnp.exp(x - jax.lax.stop_gradient(top)) for x in logits]
    total = sum(jnp.sum(x, axis=-1, keepdims=True) for x in weights)
    parts = (
        jnp.einsum(
            "bhnm,bmhc->bnhc",
            (x / total).astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        for x, values in zip(weights, v, strict=True)
    )
    return sum(parts).astype(q.dtype)


def _attend_in_cache(
    q: Float[Array, "B N H C"],
    k: Sequence[Float[Array, "B _ H C"]],
    v: Sequence[Float[Array, "B _ H C"]],
    *,
    causal: bool,
) -> Float[Array, "B N H C"]:
    """`attend`, so many heads at a time as have their logits in a CPU's cache: twice as fast."""

    def one_head(qkv: tuple[Float[Array, "_ C"], ...]) -> Float[Array, "_ C"]:
        q, k, v = qkv
        logits = _logits("nc,mc->nm", q, k, causal=causal)
        weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        summed = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return (summed / total).astype(v.dtype)

    all_of = (q, jnp.concatenate(k, axis=1), jnp.concatenate(v, axis=1))
    heads = tuple(rearrange(x, "b n h c -> (b h) n c") for x in all_of)
    at_once = max(1, CACHED_LOGITS // (heads[0].shape[1] * heads[1].shape[1]))
    out = jax.lax.map(one_head, heads, batch_size=min(at_once, len(heads[0])))
    return rearrange(out, "(b h) n c -> b n h c", h=q.shape[2])


def _logits(subscripts: str, q: Array, k: Array, *, causal: bool) -> Float[Array, "*h N M"]:
    """Scaled products of queries and keys in float32, -inf where a token may not look."""
    logits = jnp.einsum(subscripts, q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if causal:
        logits = jnp.where(np.tri(*logits.shape[-2:], dtype=bool), logits, -jnp.inf)
    return logits


class MLP(nnx.Module):
    """Linear, GELU, linear, with a hidden layer `MLP_RATIO` times as wide."""

    def __init__(
        self,
        width: int,
        *,
        tanh: bool,
        dtype: DTypeLike,
        kernel_init: nnx.Initializer = LINEAR_INIT,
        rngs: nnx.Rngs,
    ):
        make = functools.partial(linear, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
        self.up = make(width, MLP_RATIO * width, ("embed", "mlp"))
        self.down = make(MLP_RATIO * width, width, ("mlp", "embed"))
        self.tanh = tanh

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """GELU is the tanh approximation if `tanh` is set, else exact (erf)."""
        return self.down(jax.nn.gelu(self.up(x), approximate=self.tanh))


class CausalBlock(nnx.Module):
    """A pre-norm transformer block as in GPT-2: causal attention, then an MLP with exact GELU."""

    def __init__(self, width: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        make = functools.partial(linear, dtype=dtype, kernel_init=GPT_INIT, rngs=rngs)
        self.heads = heads
        self.attention_norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.q = make(width, width, ("embed", "heads"))
        self.k = make(width, width, ("embed", "heads"))
        self.v = make(width, width, ("embed", "heads"))
        self.out = make(width, width, ("heads", "embed"))
        self.mlp_norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, tanh=False, dtype=dtype, kernel_init=GPT_INIT, rngs=rngs)

    def __call__(self, x: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        y, x = self.attention_norm.beside(x)
        q, k, v = (project(y) for project in (self.q, self.k, self.v))
        x = x + self.out(attend(q, [k], [v], heads=self.heads, causal=True))
        y, x = self.mlp_norm.beside(x)
        return x + self.mlp(y)


class Stream(nnx.Module):
    """One stream's own weights in a joint block.

    A stream that ends in this block (`ends`) gives its queries, keys and values and no more.
    """

    def __init__(
        self, width: int, heads: int, *, ends: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        make = functools.partial(linear, dtype=dtype, rngs=rngs)
        head_norm = functools.partial(
            nnx.RMSNorm, width // heads, epsilon=HEAD_NORM_EPSILON, dtype=dtype, rngs=rngs
        )
        self.heads = heads
        self.attention_norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.q = make(width, width, ("embed", "heads"))
        self.k = make(width, width, ("embed", "heads"))
        self.v = make(width, width, ("embed", "heads"))
        self.q_norm = head_norm()
        self.k_norm = head_norm()
        self.ends = ends
        if not ends:
            self.out = make(width, width, ("heads", "embed"))
            self.mlp_norm = layer_norm(width, epsilon=1e-6, affine=False, dtype=dtype, rngs=rngs)
            self.mlp = MLP(width, tanh=True, dtype=dtype, rngs=rngs)

    def project(self, x: Float[Array, "B N D"]) -> tuple[Float[Array, "B N D"], ...]:
        """The stream; its queries, keys and values, heads side by side, before their norms."""
        y, x = self.attention_norm.beside(x)
        return x, self.q(y), self.k(y), self.v(y)

    def update(
        self, x: Float[Array, "B N D"], attended: Float[Array, "B N D"]
    ) -> Float[Array, "B N D"]:
        """The stream after attention and MLP, both with residuals."""
        y, x = self.mlp_norm.beside(x + self.out(attended))
        return x + self.mlp(y)


class JointBlock(nnx.Module):
    """Tokens and their context attend to all of both, each with its own weights.

    The block of MM-DiT (Esser et al., arXiv 2403.03206) without modulation.
    """

    def __init__(
        self, width: int, heads: int, *, last: bool = False, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.tokens = Stream(width, heads, dtype=dtype, rngs=rngs)
        self.context = Stream(width, heads, ends=last, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B N D"], context: Float[Array, "B M D"]
    ) -> tuple[Float[Array, "B N D"], Float[Array, "B M D"]]:
        """Both streams one block further; the context of the last block stays as it is."""
        x, q, *own = self.tokens.project(x)
        context, context_q, *others = self.context.project(context)
        k, v = zip(own, others, strict=True)
        heads, key_norms = self.tokens.heads, (self.tokens.k_norm, self.context.k_norm)
        norms = HeadNorms(self.tokens.q_norm, key_norms)
        x = self.tokens.update(x, attend(q, k, v, heads=heads, norms=norms))
        if not self.context.ends:
            norms = HeadNorms(self.context.q_norm, key_norms)
            attended = attend(context_q, k, v, heads=heads, norms=norms)
            context = self.context.update(context, attended)
        return x, context


class JointTransformer(nnx.Module):
    """Joint blocks that let tokens take up a projected context, then a final LayerNorm."""

    def __init__(
        self,
        width: int,
        heads: int,
        depth: int,
        *,
        dtype: DTypeLike,
        remat: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """`remat`: share of the blocks that are recomputed."""
        self.context_projection = linear(width, width, ("embed", "embed"), dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            JointBlock(width, heads, last=i == depth - 1, dtype=dtype, rngs=rngs)
            for i in range(depth)
        )
        # What leaves is not rounded again: avatar codes get optimised, and maps upsampled.
        self.norm = layer_norm(width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.remat = remat

    def __call__(
        self, x: Float[Array, "B N D"], context: Float[Array, "B M D"]
    ) -> Float[Array, "B N D"]:
        keep = jax.checkpoint_policies.save_only_these_names(attention_tpu.ATTENDED)
        context = self.context_projection(context)
        for block, again in zip(self.blocks, recomputed(self.remat, len(self.blocks)), strict=True):
            run = nnx.remat(JointBlock.__call__, policy=keep) if again else JointBlock.__call__
            x, context = run(block, x, context)
        return self.norm(x)


def _split_heads(x: Float[Array, "B N D"], heads: int) -> Float[Array, "B N H C"]:
    return rearrange(x, "b n (h c) -> b n h c", h=heads)


def _merge_heads(x: Float[Array, "B N H C"]) -> Float[Array, "B N D"]:
    return rearrange(x, "b n h c -> b n (h c)")

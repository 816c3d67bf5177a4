"""Decoder: avatar codes and expression codes to UV feature maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from data_pipelines.frame import EXPRESSION_PARTS, EXPRESSION_SIZE, SOURCES, neutral_code
from flexavatar_jax.model.attention import JointTransformer, linear

SPREAD = {"exp": 1.0, "eyes": 0.1, "eyelids": 0.3, "neck": 0.2, "jaw": 0.1, "R": 1.0, "t": 1.0}
"""About how far the numbers of a code's parts stray from a relaxed face's.

Head pose, R and t, moves nothing in the head frame, and is left as it is.
"""


SINK_SIZE = 0.05
"""Standard deviation of a bias sink's numbers before training."""


class ExpressionMLP(nnx.Module):
    """An expression code to a few tokens.

    Before training it sees how a code differs from a relaxed face's, each part in its own unit:
    a jaw opens by tenths of a radian, and beside a hundred numbers of unit size and the ones of
    identity rotations a network that starts from the raw numbers is late to hear of it.
    """

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        dtype, hidden = jnp.dtype(config.dtype), config.expression_hidden
        outputs = config.expression_tokens * config.width
        self.tokens = config.expression_tokens
        self.first = linear(EXPRESSION_SIZE, hidden, (None, "mlp"), dtype=dtype, rngs=rngs)
        unit = np.concatenate([np.full(EXPRESSION_PARTS[part], SPREAD[part]) for part in SPREAD])
        self.first.kernel[...] /= unit.astype(np.float32)[:, None]
        self.first.bias[...] -= neutral_code() @ self.first.kernel[...]
        self.second = linear(hidden, hidden, (None, "mlp"), dtype=dtype, rngs=rngs)
        self.third = linear(hidden, outputs, ("mlp", None), dtype=dtype, rngs=rngs)

    def __call__(self, expression: Float[ArrayLike, "B X"]) -> Float[Array, "B M D"]:
        hidden = jax.nn.relu(self.second(jax.nn.relu(self.first(expression))))
        return rearrange(self.third(hidden), "b (m d) -> b m d", m=self.tokens)


class Decoder(nnx.Module):
    """Head tokens take up an expression and the bias sink of a data source.

    The bias sink (the paper's section 3.2) is one token a data source: it soaks up what is peculiar
    to monocular video, so that the rest of the model learns whole heads.
    """

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.width
        self.dtype = dtype
        self.side = config.head_resolution
        self.expression = ExpressionMLP(config, rngs=rngs)
        # All start alike and small: sources share what is learnt until training tells them apart,
        # and then few steps suffice for it (docs/ablation).
        sink = nnx.initializers.normal(SINK_SIZE)(rngs.params(), (1, width), jnp.float32)
        self.sinks = nnx.Param(
            jnp.tile(sink, (len(SOURCES) if config.bias_sinks else 1, 1)),
            logical_axes=(None, "embed"),
        )
        self.transformer = JointTransformer(
            width,
            config.num_heads,
            config.decoder_depth,
            dtype=dtype,
            remat=config.remat,
            rngs=rngs,
        )

    def __call__(
        self,
        code: Float[ArrayLike, "B N D"],
        expression: Float[ArrayLike, "B E X"],
        source: Int[ArrayLike, "B"],
    ) -> Float[Array, "B E side side D"]:
        """UV feature maps, one an expression; see `FlexAvatar.decode`."""
        count = expression.shape[1]
        source = jnp.minimum(source, self.sinks.shape[0] - 1)  # if there is one sink: that
        sinks = repeat(self.sinks[...][source].astype(self.dtype), "b d -> (b e) 1 d", e=count)
        tokens = self.expression(rearrange(expression, "b e x -> (b e) x").astype(self.dtype))
        code = repeat(code.astype(self.dtype), "b n d -> (b e) n d", e=count)
        out = self.transformer(code, jnp.concatenate([sinks, tokens], axis=1))
        return rearrange(out, "(b e) (y x) d -> b e y x d", e=count, y=self.side)

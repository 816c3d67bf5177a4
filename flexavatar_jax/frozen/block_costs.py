"""What the kernels of `block_kernels` cost, by the shapes of their arrays."""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl

from flexavatar_jax.frozen.block_layout import whole

NORM_OPS, NORM_BACK_OPS = 11, 12
"""Vector operations for an element: two conversions, statistics (4), scaling (2), bias, rounding
(2); scaled gradient, its two means (3), what they leave (4), conversions, sum with the other
gradient."""

LOGIT_OPS, LOGIT_BACK_OPS = 12, 18
"""For a logit: masks (3), maximum, difference, exponential (4), sum, rounding (2); backward also
the product with the sum, two more and a sum, difference, rounding, but no second maximum."""

GELU_OPS, GELU_BACK_OPS = 27, 32
"""For an element of the hidden layer: bias, the bell (6) and its tail (19), absolute value,
products, sums, rounding; backward also density, choice of tail, and products."""

OTHER_OPS = 6
"""For an element of anything that comes of a product: bias, sums, scaling, pooling, rounding."""

VECTOR_OPS = {"block_forward": 1, "block_backward": 1}
"""A kernel's cost estimate has its vector operations as transcendentals."""


def cost(static, x, weights, arrays, *, backward):
    """What the units do with whole registers: lanes without a use are multiplied, too."""
    matrices = weights.mlp_out[0], weights.mlp_in[0]
    width, out, hidden = map(whole, (x.shape[-1], *(m.shape[2] for m in matrices)))
    tokens = x.size // x.shape[-1] // static.sets // (static.layers if backward else 1)
    lanes = static.lanes
    inputs, skip = tokens * static.sets, out if weights.skip else 0
    logits = tokens * static.heads * static.sets * whole(static.span)

    project = inputs * 3 * width * lanes
    if backward:
        products = 2 * project + tokens * out * (lanes + 3 * hidden)
        products += inputs * width * (2 * skip + (lanes if skip else 0))
        products += 5 * logits * static.register
        vector = inputs * (width * (NORM_OPS + NORM_BACK_OPS) + lanes * 5 * OTHER_OPS)
        vector += inputs * (2 * skip * OTHER_OPS) + logits * LOGIT_BACK_OPS
        vector += tokens * (out * (NORM_OPS + NORM_BACK_OPS) + hidden * GELU_BACK_OPS)
    else:
        products = project + inputs * width * skip + tokens * out * (lanes + 2 * hidden)
        products += 2 * logits * static.register
        vector = inputs * (width * NORM_OPS + (3 * lanes + skip) * OTHER_OPS) + logits * LOGIT_OPS
        vector += tokens * (out * (NORM_OPS + 2 * OTHER_OPS) + hidden * GELU_OPS)
    everything = sum(a.size * a.dtype.itemsize for a in arrays)
    held = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(weights))
    return pl.CostEstimate(
        flops=2 * products * static.layers,
        transcendentals=vector * static.layers,
        bytes_accessed=everything - held + held * static.layers // len(weights.out[0]),
    )

"""Muon for matrices and Adam for the rest: Optax's, but for how matrices are made orthogonal.

Optax takes one matrix after the other, fifteen small products each: some two thousand kernels a
step of the demo's model, whose launches a GPU waits for. Here all of one shape are taken together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration of Newton and Schulz (https://kellerjordan.github.io/posts/muon)."""
ITERATIONS = 5
EPSILON = 1e-8
RMS = 0.2
"""Root mean square of an update before its rate: as large as Adam's usually are."""


def muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    beta: float,
    is_matrix: Callable[[tuple, jax.Array], bool],
    rest: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Muon with Nesterov momentum (Jordan, 2024), updates sized by Liu et al., arXiv 2502.16982.

    Args:
      learning_rate: of the matrices.
      beta: of their momentum.
      is_matrix: says by a parameter's path and value whether it is one; it is as [inputs, outputs],
        with all axes but the last as inputs.
      rest: what changes all other parameters.
    """

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: "muon" if is_matrix(path, x) else "rest", params
        )

    matrices = optax.chain(
        _momentum(beta), _orthogonal(), optax.scale_by_learning_rate(learning_rate)
    )
    return optax.partition({"muon": matrices, "rest": rest}, labels)


def _momentum(beta: float) -> optax.GradientTransformation:
    """Optax's Muon up to its iteration: momenta, unbiased, over their norms."""

    def dimensions(updates: Any) -> Any:
        return jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1),
            updates,
        )

    return optax.contrib.scale_by_muon(
        ns_steps=0, beta=beta, eps=EPSILON, weight_dimension_numbers=dimensions
    )


def _orthogonal() -> optax.GradientTransformation:
    """Matrices of one shape made orthogonal together, and all of the same root mean square."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves, tree = jax.tree.flatten(updates)
        alike = defaultdict(list)
        for number, x in enumerate(leaves):
            alike[math.prod(x.shape[:-1]), x.shape[-1]].append(number)
        for shape, numbers in alike.items():
            stack = jnp.stack([leaves[number].reshape(shape) for number in numbers])
            size = RMS * math.sqrt(max(shape))
            for number, x in zip(numbers, size * orthogonalise(stack), strict=True):
                leaves[number] = x.reshape(leaves[number].shape)
        return jax.tree.unflatten(tree, leaves), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def orthogonalise(x: Float[Array, "n a b"]) -> Float[Array, "n a b"]:
    """Matrices with the singular vectors of `x`, and singular values of about 1 (0.7 to 1.2)."""
    if x.shape[1] > x.shape[2]:
        return jnp.matrix_transpose(orthogonalise(jnp.matrix_transpose(x)))
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = x @ jnp.matrix_transpose(x)
        x = a * x + (b * square + c * square @ square) @ x
    return x

"""Muon is Optax's, matrix for matrix, whatever shapes they share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from flexavatar_jax.training.muon import muon, orthogonalise

SHAPES = {
    "a": (6, 9),
    "b": (9, 6),
    "c": (6, 9),
    "kernel": (3, 3, 2, 5),
    "again": (18, 5),
    "bias": (7,),
}


def updates_of(optimizer, steps=4):
    rng = np.random.default_rng(0)
    trees = [
        {name: jnp.float32(rng.standard_normal(shape)) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]
    state, found = optimizer.init(trees[0]), []
    for gradient in trees:
        updates, state = jax.jit(optimizer.update)(gradient, state, trees[0])
        found.append(updates)
    return found


def test_updates_are_optaxs():
    def dimensions(params):
        def of(x):
            axes = tuple(range(x.ndim - 1))
            return optax.contrib.MuonDimensionNumbers(axes, x.ndim - 1) if axes else None

        return jax.tree.map(of, params)

    theirs = optax.contrib.muon(
        0.1, beta=0.9, consistent_rms=0.2, adam_learning_rate=0.01,
        muon_weight_dimension_numbers=dimensions,
    )  # fmt: skip
    rest = optax.adam(0.01, nesterov=True)
    ours = muon(0.1, beta=0.9, is_matrix=lambda path, x: x.ndim > 1, rest=rest)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6)
    jax.tree.map(close, updates_of(ours), updates_of(theirs))


def test_orthogonal_matrices_keep_their_directions():
    x = jnp.float32(np.random.default_rng(1).standard_normal((3, 8, 5)))
    u, _, v = np.linalg.svd(x, full_matrices=False)
    kept = np.einsum("nij,nik,nkj->nk", orthogonalise(x), u, v)
    assert kept.min() > 0.6
    assert kept.max() < 1.3

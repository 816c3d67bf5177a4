"""Weights of transformer blocks, and how far one way through them is from another."""

import jax
import jax.numpy as jnp
import numpy as np


def stack(width_in, width, *, pool=False, layers=1, seed=0):
    """Weights of blocks, in whose outputs each of them shows."""
    rng = np.random.default_rng(seed)

    def linear(i, o):
        w = rng.standard_normal((layers, i, o)) / np.sqrt(i)
        return {"w": jnp.float32(w), "b": jnp.float32(0.3 * rng.standard_normal((layers, o)))}

    def norm(c):
        scale, bias = 1 + 0.3 * rng.standard_normal((2, layers, c))
        return {"scale": jnp.float32(scale), "bias": jnp.float32(bias)}

    p = {"norm1": norm(width_in), "qkv": linear(width_in, 3 * width), "out": linear(width, width)}
    p |= {"norm2": norm(width), "mlp_in": linear(width, 4 * width)}
    p |= {"mlp_out": linear(4 * width, width)}
    return p | {"skip": linear(width_in, width)} if pool else p


def with_gradient(function, x, seed=1):
    y, pull = jax.vjp(function, x)
    return y, pull(jnp.asarray(np.random.default_rng(seed).standard_normal(y.shape), y.dtype))[0]


def error(found, expected):
    found, expected = np.float64(found), np.float64(expected)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)

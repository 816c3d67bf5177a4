"""What a transformer block consists of besides attention, each with its gradient, for kernels.

Everything is float32 but what products take. Weights are refs: a matrix or scale, and a bias.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from flexavatar_jax.model.attention_kernels import dot

EPSILON = 1e-6
"""Of norms."""


def pool(first, *others):
    """The larger of the larger ones of two pairs; of one, itself."""
    if not others:
        return first
    return jnp.maximum(jnp.maximum(first, others[0]), jnp.maximum(*others[1:]))


def pool_back(values, gradient):
    """Gradients in each of the four sets of values that `pool` took."""
    a, b, c, d = values
    upper, lower = _larger_back(jnp.maximum(a, b), jnp.maximum(c, d), gradient)
    return [*_larger_back(a, b, upper), *_larger_back(c, d, lower)]


def _larger_back(a, b, gradient):
    """Gradients in a and b of the larger one; halves where they are equal."""
    share = jnp.where(a > b, 1.0, jnp.where(a == b, 0.5, 0.0))
    return gradient * share, gradient * (1 - share)


def norm(x, weights):
    """Normed tokens; before scale and bias; 1 / their standard deviation. All float32."""
    scale, bias = weights
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=1, keepdims=True) + EPSILON)
    standard = centred * inverse
    return standard * scale[...] + bias[...], standard, inverse


def norm_back(gradient, weights, standard, inverse):
    scaled = gradient * weights[0][...]
    mean = jnp.mean(scaled, axis=1, keepdims=True)
    product = jnp.mean(scaled * standard, axis=1, keepdims=True)
    return inverse * (scaled - mean - standard * product)


def gelu(z):
    """z Phi(z), Phi being the normal distribution."""
    _, tail = _density_and_tail(z)
    return jnp.maximum(z, 0) - jnp.abs(z) * tail


def gelu_slope(z):
    density, tail = _density_and_tail(z)
    return jnp.where(z < 0, tail, 1 - tail) + z * density


def _density_and_tail(z):
    """The normal distribution's density at z, and what it leaves beyond |z|.

    By formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions (1964), off by
    1e-7 at most. It takes half of what the error function does, and has the density in it.
    """
    root = 0.3275911 * math.sqrt(0.5)
    t = _reciprocal(1 + root * jnp.abs(z))
    series = 0.0
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + 0.5 * coefficient) * t
    bell = jnp.exp(-0.5 * z * z)
    return bell * (1 / math.sqrt(2 * math.pi)), series * bell


def _reciprocal(x):
    """1 / x for x >= 1, by one step of Newton's from the hardware's estimate."""
    guess = pl.reciprocal(x, approx=True)
    return guess * (2 - x * guess)


def linear(x, weights):
    """x w + b in float32."""
    matrix, bias = weights
    return dot(x, matrix[...], 1, 0) + bias[...]


def back(gradient, weights):
    """The gradient in what `linear` took."""
    return dot(gradient, weights[0][...], 1, 1)

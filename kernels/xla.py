"""The `xla` backend: blending in pure JAX, on everything JAX runs on, made for CPUs first."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from kernels import binning
from kernels.projection import MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, Splats
from kernels.rasterizer import Backend, Blend

TILE = (8, 8)


def _sort(splats, width, height, capacity):
    sort = functools.partial(
        binning.sort_intersections, width=width, height=height, tile=TILE, capacity=capacity
    )
    return jax.vmap(sort)(splats)


def _pixels(width, height):
    across, down = binning.grid(width, height, TILE)
    y, x = jnp.mgrid[: down * TILE[1], : across * TILE[0]] + 0.5
    cut = functools.partial(rearrange, pattern="(d h) (a w) -> (d a) (h w)", h=TILE[1], w=TILE[0])
    return cut(x), cut(y)


def _alpha(splats, ids, x, y):
    """ids [B,T]; x,y [T,P] -> dict of [B,T,P] (falloff etc.)."""
    take = jax.vmap(lambda a, i: a[i])
    mean, whiten = take(splats.means, ids), take(splats.whitening, ids)
    opacity = take(splats.opacities, ids)[..., None]
    dx, dy = x - mean[..., 0:1], y - mean[..., 1:2]
    p, q, r = (whiten[..., i : i + 1] for i in range(3))
    u, v = p * dx + q * dy, r * dy
    falloff = jnp.exp(-0.5 * (u * u + v * v))
    alpha = opacity * falloff
    drawn = alpha >= MIN_ALPHA
    return (
        dx,
        dy,
        (p, q, r),
        u,
        v,
        falloff,
        jnp.where(drawn, jnp.minimum(alpha, MAX_ALPHA), 0.0),
        (drawn & (alpha < MAX_ALPHA)),
    )


def _forward(splats: Splats, *, width, height, capacity):
    bins = _sort(splats, width, height, capacity)
    x, y = _pixels(width, height)
    images, features = splats.features.shape[0], splats.features.shape[-1]
    lengths = bins.starts[:, 1:] - bins.starts[:, :-1]
    longest = jnp.max(lengths)
    take = jax.vmap(lambda a, i: a[i])

    def body(state):
        k, T, acc, weight_sum = state
        slot = bins.starts[:, :-1] + k
        live = (k < lengths)[..., None]
        ids = take(bins.splats, jnp.minimum(slot, capacity - 1))
        alpha = _alpha(splats, ids, x, y)[6] * live
        after = T * (1 - alpha)
        w = jnp.where(after > MIN_TRANSMITTANCE, alpha * T, 0.0)
        acc = acc + w[..., None] * take(splats.features, ids)[:, :, None]
        return k + 1, after, acc, weight_sum + w

    # Varying over the mesh as the inputs are, for shard_map.
    zero = 0 * bins.starts[:, :1, None]
    T = jnp.ones((images, *x.shape)) + zero
    start = (0, T, 0 * T[..., None] * jnp.ones(features), 0 * T)
    _, _, acc, alpha = lax.while_loop(lambda s: s[0] < longest, body, start)
    across = binning.grid(width, height, TILE)[0]
    join = functools.partial(
        rearrange, pattern="b (d a) (h w) ... -> b (d h) (a w) ...", a=across, h=TILE[1]
    )
    out = Blend(join(acc)[:, :height, :width], join(alpha)[:, :height, :width], bins.overflow)
    return out, bins


def _backward(splats: Splats, blend, bins, d_features, d_alpha, *, width, height, capacity):
    x, y = _pixels(width, height)
    across, down = binning.grid(width, height, TILE)
    images = d_alpha.shape[0]

    def cut(a):
        pad = [(0, 0), (0, down * TILE[1] - height), (0, across * TILE[0] - width)]
        a = jnp.pad(a, pad + [(0, 0)] * (a.ndim - 3))
        return rearrange(a, "b (d h) (a w) ... -> b (d a) (h w) ...", h=TILE[1], w=TILE[0])

    total = cut(jnp.sum(d_features * blend.features, -1) + d_alpha * blend.alpha)
    d_features, d_alpha = cut(d_features), cut(d_alpha)
    lengths = bins.starts[:, 1:] - bins.starts[:, :-1]
    longest = jnp.max(lengths)
    take = jax.vmap(lambda a, i: a[i])
    add = jax.vmap(lambda a, i, v: a.at[i].add(v))

    def body(state):
        k, T, prefix, grads = state
        slot = bins.starts[:, :-1] + k
        live = (k < lengths)[..., None]
        ids = take(bins.splats, jnp.minimum(slot, capacity - 1))
        dx, dy, (p, q, r), u, v, falloff, alpha, smooth = _alpha(splats, ids, x, y)
        alpha = alpha * live
        after = T * (1 - alpha)
        blended = after > MIN_TRANSMITTANCE
        w = jnp.where(blended, alpha * T, 0.0)
        value = jnp.einsum("btpf,btf->btp", d_features, take(splats.features, ids)) + d_alpha
        prefix = prefix + w * value
        behind = (total - prefix) / (1 - alpha)
        g = jnp.where(blended & smooth & live, T * value - behind, 0.0)  # dL/dalpha
        s = -g * alpha  # dL/dsigma
        du, dv = s * u, s * v
        mean = -jnp.stack([(du * p).sum(-1), (du * q + dv * r).sum(-1)], -1)
        whiten = jnp.stack([(du * dx).sum(-1), (du * dy).sum(-1), (dv * dy).sum(-1)], -1)
        opacity = (g * falloff).sum(-1)
        feature = jnp.einsum("btp,btpf->btf", w, d_features)
        new = (mean, whiten, opacity, feature)
        return k + 1, after, prefix, jax.tree.map(lambda a, n: add(a, ids, n), grads, new)

    # Varying over the mesh as the inputs are, for shard_map.
    zero = 0 * bins.starts[:, :1, None]
    T = jnp.ones((images, *x.shape)) + zero
    grads = jax.tree.map(
        lambda a: jnp.zeros_like(a) + zero.reshape(images, *[1] * (a.ndim - 1)),
        (splats.means, splats.whitening, splats.opacities, splats.features),
    )
    start = (0, T, 0 * T, grads)
    grads = lax.while_loop(lambda s: s[0] < longest, body, start)[3]
    mean, whiten, opacity, feature = grads
    return Splats(mean, whiten, opacity, jnp.zeros_like(opacity), feature)


BACKEND = Backend("xla", _forward, _backward, TILE, unavailable=lambda: None)

"""Blending by a backend, made differentiable and fit for `vmap`: the same for all backends."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from kernels import modes
from kernels.backends import Backend, Blend, Cotangent, Frame
from kernels.projection import Splats


def composite(
    splats: Splats,
    features: Float[Array, "images N F"],
    absgrad: Float[Array, "images N 2"] | None = None,
    *,
    backend: Backend,
    width: int,
    height: int,
    capacity: int,
) -> Blend:
    """A backend's `forward`, differentiable by its `backward`, with vmapped axes folded in.

    `absgrad` changes nothing; its gradient is `backends.Gradients.absgrad`.
    """
    frame, asked = Frame(width, height, capacity), absgrad is not None
    forward = _fold_vmap(_any_images(functools.partial(backend.forward, frame=frame)))
    backward = _fold_vmap(
        _any_images(functools.partial(backend.backward, frame=frame, absgrad=asked))
    )

    @jax.custom_vjp
    def run(splats, features, absgrad):
        del absgrad
        return forward(splats, features)[0]

    def run_forward(splats, features, absgrad):
        del absgrad
        out, residuals = forward(splats, features)
        return out, (splats, features, residuals)

    def run_backward(saved, cotangent):
        d = backward(*saved, Cotangent(cotangent.features, cotangent.alpha))
        d_splats = Splats(d.means, d.cholesky, d.opacities, depths=jnp.zeros_like(d.opacities))
        return d_splats, d.features, d.absgrad

    run.defvjp(run_forward, run_backward)
    return run(splats, features, absgrad)


def _any_images(function: Callable) -> Callable:
    """`function` of a flat batch that may be empty, in JAX's standard modes."""

    def run(*args):
        # JAX differentiates long after `rasterize` has returned: its modes are set here again.
        with modes.standard():
            if len(jax.tree.leaves(args)[0]):
                return function(*args)
            one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), args)
            out = jax.eval_shape(function, *one)
            return jax.tree.map(lambda a: jnp.zeros((0, *a.shape[1:]), a.dtype), out)

    return run


def _fold_vmap(function: Callable) -> Callable:
    """`function` of a flat batch, such that `vmap` enlarges the batch instead of adding an axis."""
    folded = custom_vmap(function)

    @folded.def_vmap
    def rule(size, batched, *args):
        args = jax.tree.map(
            lambda a, has: a if has else jnp.broadcast_to(a, (size, *a.shape)), args, tuple(batched)
        )
        flat = jax.tree.map(lambda a: a.reshape(size * a.shape[1], *a.shape[2:]), args)
        images = jax.tree.leaves(args)[0].shape[1]
        out = folded(*flat)
        out = jax.tree.map(lambda a: a.reshape(size, images, *a.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return folded

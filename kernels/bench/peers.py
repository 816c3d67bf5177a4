"""Other splatting renderers, prepared as the benchmark prepares ours: gsplat and splax.

Neither is needed for anything else. Each renders colours, alpha and expected depth, and
differentiates the same loss by the same five arrays.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kernels.bench.scenes import Scene
from kernels.ply import SH_C0

NEEDS = {"gsplat": ("gsplat", "torch"), "splax": ("splax",)}
"""Packages a peer needs; their name on PyPI is the same."""


def unavailable(name: str) -> str | None:
    """Why a peer can't be timed here, or None."""
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed: pip install {' '.join(missing)}"
    if jax.default_backend() != "gpu":
        return "it needs an NVIDIA GPU"
    return None


def prepare_gsplat(scene: Scene, size: int) -> tuple[Callable, Callable]:
    """gsplat (PyTorch and CUDA), all images in one call, each with its own Gaussians."""
    import torch
    from gsplat import rasterization

    images = len(scene.viewmats)
    tensors = [torch.tensor(np.asarray(a), device="cuda") for a in scene]
    gaussians = [a if scene.means.ndim == 3 else a.expand(images, *a.shape) for a in tensors[:5]]
    cameras = [a[:, None] for a in tensors[5:]]

    def render(gaussians):
        out, alpha, _ = rasterization(
            *gaussians, *cameras, width=size, height=size, packed=False, render_mode="RGB+ED"
        )
        return out, alpha

    def forward():
        with torch.no_grad():
            render(gaussians)
        torch.cuda.synchronize()

    def both():
        leaves = [a.detach().requires_grad_() for a in gaussians]
        out, alpha = render(leaves)
        loss = (out[..., :-1] ** 2).mean() + alpha.mean() + out[..., -1].mean()
        torch.autograd.grad(loss, leaves)
        torch.cuda.synchronize()

    return forward, both


def prepare_splax(scene: Scene, size: int) -> tuple[Callable, Callable]:
    """splax (JAX and NVIDIA Warp), images by vmap; it takes what a .ply stores."""
    import splax

    means, quats, scales, opacities, colors = (jnp.asarray(a) for a in scene[:5])
    stored = (
        means,
        jnp.log(scales),
        quats,
        ((colors - 0.5) / SH_C0)[..., None, :],
        jnp.log(opacities) - jnp.log1p(-opacities),
    )
    K = np.asarray(scene.Ks)[0]
    if not (np.asarray(scene.Ks) == K).all():
        raise ValueError("splax takes one set of intrinsics for all images")
    own = 0 if scene.means.ndim == 3 else None

    def render(viewmat, *stored):
        return splax.render(
            *stored,
            viewmat=viewmat,
            background=jnp.zeros(3),
            img_shape=(size, size),
            f=(float(K[0, 0]), float(K[1, 1])),
            c=(float(K[0, 2]), float(K[1, 2])),
            render_depth=True,
        )

    render_all = jax.vmap(render, in_axes=(0,) + (own,) * 5)
    viewmats = jnp.asarray(scene.viewmats)

    def loss(*stored):
        out, alpha = render_all(viewmats, *stored)
        return jnp.mean(out[..., :3] ** 2) + jnp.mean(alpha) + jnp.mean(out[..., 3])

    forward = jax.jit(render_all)
    both = jax.jit(jax.grad(loss, argnums=range(5)))
    return (
        lambda: jax.block_until_ready(forward(viewmats, *stored)),
        lambda: jax.block_until_ready(both(*stored)),
    )


PEERS = {"gsplat": prepare_gsplat, "splax": prepare_splax}

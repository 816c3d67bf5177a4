"""Differentiable 3D Gaussian splatting in JAX, one contract with several backends."""

from kernels.rasterizer import BACKENDS, Render, rasterize

__all__ = ["BACKENDS", "Render", "rasterize"]

"""Differentiable 3D Gaussian splatting in JAX, one contract with several backends."""

from kernels.rasterizer import BACKENDS, Render, count_capacity, rasterize

__all__ = ["BACKENDS", "Render", "count_capacity", "rasterize"]

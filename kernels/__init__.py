"""Differentiable 3D Gaussian splatting in JAX, one contract with several backends."""

from kernels.backends import BACKENDS
from kernels.rasterizer import Render, count_capacity, rasterize

__all__ = ["BACKENDS", "Render", "count_capacity", "rasterize"]

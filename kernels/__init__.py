"""Differentiable 3D Gaussian splatting in JAX, one contract with several backends."""

from kernels.backends import BACKENDS
from kernels.projection import Splats
from kernels.rasterizer import blend, count_capacity, project, rasterize
from kernels.rendering import Render

__all__ = ["BACKENDS", "Render", "Splats", "blend", "count_capacity", "project", "rasterize"]

"""Differentiable 3D Gaussian splatting in JAX, one contract with several backends."""

"""The `xla` backend: blending in pure JAX, wherever JAX runs. Read `tiles`, then `backend`."""

from kernels.xla.backend import BACKEND

__all__ = ["BACKEND"]

"""The `cuda` backend: CUDA C++ kernels behind `jax.ffi`, for NVIDIA GPUs.

Read `bin.h` (which splats a tile blends, in order), then `composite.h` (blending, forward and
backward). `build` compiles them; `backend` calls them.
"""

from kernels.cuda.backend import BACKEND

__all__ = ["BACKEND"]

"""The `pallas_tpu` backend: Mosaic kernels for TPUs.

Read `members` and `lists` (which splats a tile blends, in order), then `composite` (blending,
forward and backward). `backend` calls them, an image at a time.
"""

from kernels.pallas_tpu.backend import BACKEND

__all__ = ["BACKEND"]

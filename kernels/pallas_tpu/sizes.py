"""Sizes of what the kernels for TPUs work on: tiles, blocks of tiles, chunks of splats."""

TILE = 16
"""Side of a tile in pixels. The pixel basis is exact in bfloat16 up to this size."""
PIXELS = TILE * TILE
BLOCK = (8, 4)
"""Tiles across and down in a block."""
TILES = BLOCK[0] * BLOCK[1]
CHUNK = 128
"""Splats that are blended at a time: the lanes of a register."""
GEOMETRY = 8
"""Rows of a chunk before the features: x, y, p, q, r, opacity and two that aren't read, whose
gradients are x's and y's absolute ones."""
OPACITY = 5
"""Which of them is the opacity; means and Cholesky factors come before."""

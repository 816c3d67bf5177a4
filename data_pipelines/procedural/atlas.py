"""Where each part of a head lies in the one texture that a person has.

Skin and hair have a square each, side by side; below them a strip of smaller tiles:

    +--------------+--------------+
    |     skin     |     hair     |
    +---+---+---+--+--------------+
    |eye|ear|...                  |
    +---+---+---+-----------------+
"""

from __future__ import annotations

import numpy as np

TILES = ("eye", "ear", "mouth", "teeth", "accessory")
"""What lies in the strip, from the left; a tile is a quarter of the skin's square wide."""

_MARGIN, _SQUARE_MARGIN = 0.04, 1 / 128
"""Share of a tile's side, and of the squares' left and right, painted over and never shown: so no
neighbour bleeds in where the texture is interpolated or shrunk."""


def empty(side: int) -> np.ndarray:
    """[1.25 side, 2 side, 4] texture, black and matt, for a skin of side x side texels."""
    return np.zeros((side + side // 4, 2 * side, 4), np.float32)


def place(part: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Texture coordinates [n, 2] of points at (x, y), in [0, 1] from the upper left of a part."""
    if part in ("skin", "hair"):
        x = _SQUARE_MARGIN + (1 - 2 * _SQUARE_MARGIN) * x
        return np.stack([0.5 * x + 0.5 * (part == "hair"), 0.8 * y], -1)
    x, y = (_MARGIN + (1 - 2 * _MARGIN) * t for t in (x, y))
    return np.stack([0.125 * (TILES.index(part) + x), 0.8 + 0.2 * y], -1)


def view(texture: np.ndarray, part: str) -> np.ndarray:
    """The part's texels, writable."""
    side = texture.shape[1] // 2
    if part in ("skin", "hair"):
        left = side * (part == "hair")
        return texture[:side, left : left + side]
    tile = side // 4
    left = TILES.index(part) * tile
    return texture[side:, left : left + tile]


def square_texels(side: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) [side, side] of the centres of skin's or hair's texels, as `place` takes them."""
    centres = (np.arange(side) + 0.5) / side
    return tuple(np.meshgrid((centres - _SQUARE_MARGIN) / (1 - 2 * _SQUARE_MARGIN), centres))


def tile_texels(side: int) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) [side, side] of the centres of a tile's texels, as `place` takes them."""
    centres = (np.arange(side) + 0.5) / side
    centres = (centres - _MARGIN) / (1 - 2 * _MARGIN)
    return tuple(np.meshgrid(centres, centres))

"""The square that is cut out of a photo round a head: the tracker's crop and its margins."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

IMAGE_SIZE = 512
"""Side of the tracker's crop and of the portraits cut here, in pixels."""

MARGIN = 0.1
"""The crop grows by this part of its height on every side."""

EMPTY_BORDER = 3
"""Pixels at the edge of a 512-pixel segmentation that carry nothing: the parser leaves rows and
columns there to the background, whatever they show."""


@dataclasses.dataclass(frozen=True)
class WidenedCrop:
    """The square that is cut out of a photo: the tracker's crop and its margins.

    Attributes:
      ymin, ymax, xmin, xmax: the tracker's crop in pixels of the photo.
      top, bottom, left, right: how far the widened crop reaches past it, in the same pixels.
    """

    ymin: int
    ymax: int
    xmin: int
    xmax: int
    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def of(cls, crop: Int[np.ndarray, "4"], image_height: int) -> WidenedCrop:
        """Widens `crop`, (ymin, ymax, xmin, xmax), by a tenth of its height on every side.

        It never reaches below the photo: what is missing there is added above.
        """
        ymin, ymax, xmin, xmax = map(int, crop)
        margin = int(MARGIN * (ymax - ymin))
        bottom = min(margin, image_height - ymax)
        return cls(ymin, ymax, xmin, xmax, 2 * margin - bottom, bottom, margin, margin)

    @classmethod
    def to_box(cls, crop: Int[np.ndarray, "4"], box: tuple[int, int, int, int]) -> WidenedCrop:
        """Widens `crop` to another box, also (ymin, ymax, xmin, xmax); margins may be negative."""
        ymin, ymax, xmin, xmax = map(int, crop)
        top, bottom, left, right = box
        return cls(ymin, ymax, xmin, xmax, ymin - top, bottom - ymax, xmin - left, right - xmax)

    def cut_image(self, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "512 512 3"]:
        """The widened crop of a photo at 512x512, white where it reaches past the photo."""
        return self._cut(Image.fromarray(image), (255, 255, 255))

    def cut_mask(self, mask: UInt8[np.ndarray, "H W"]) -> UInt8[np.ndarray, "512 512"]:
        """The widened crop of a whole photo's mask at 512x512, 0 past the photo."""
        return self._cut(Image.fromarray(mask), 0)

    def _cut(self, image: Image.Image, fill: int | tuple[int, ...]) -> np.ndarray:
        left, top = self.xmin - self.left, self.ymin - self.top
        right, bottom = self.xmax + self.right, self.ymax + self.bottom
        canvas = Image.new(image.mode, (right - left, bottom - top), fill)
        canvas.paste(image, (-left, -top))
        return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))

    def extend_mask(self, mask: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "512 512"]:
        """A mask of the unwidened crop, at any size, as a mask of the widened one at 512x512.

        The margin, and the border of the mask that carries nothing (`EMPTY_BORDER`), take the value
        of the nearest pixel inside.
        """
        size = np.array(mask.shape)
        y, x = EMPTY_BORDER * size // IMAGE_SIZE
        mask = np.pad(mask[y : size[0] - y, x : size[1] - x], ((y, y), (x, x)), mode="edge")
        crop = np.array([self.ymax - self.ymin, self.xmax - self.xmin])
        before = np.array([self.top, self.left]) / crop * size
        after = np.array([self.bottom, self.right]) / crop * size
        # Padded to whole pixels, and cut where the margins really end.
        pad = np.maximum(np.ceil([before, after]), 0).astype(int) + 1
        padded = np.pad(mask, pad.T, mode="edge")
        (y0, x0), (y1, x1) = pad[0] - before, pad[0] + size + after
        return np.asarray(
            Image.fromarray(padded).resize(
                (IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR, box=(x0, y0, x1, y1)
            )
        )

    def widen_K(self, K: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3 3"]:
        """Intrinsics in pixels of the crop at 512x512 -> of the widened crop, divided by 512.

        The published pipeline's arithmetic: the left margin counts as exactly a tenth and the
        widened side as exactly 1.2 times the crop's, although margins are whole pixels of the
        photo. It is therefore exact for square crops whose height is a multiple of ten, and off
        by less than a pixel of the photo for other square ones.
        """
        K = np.array(K, np.float64)
        K[0, 2] += MARGIN * IMAGE_SIZE
        K[1, 2] += self.top * IMAGE_SIZE / (self.ymax - self.ymin)
        K[:2] /= (1 + 2 * MARGIN) * IMAGE_SIZE
        return K

    def place_K(self, K: Float[np.ndarray, "3 3"]) -> Float[np.ndarray, "3 3"]:
        """As `widen_K`, to the pixel: exact whatever the crop and its margins."""
        size = np.array([self.xmax - self.xmin, self.ymax - self.ymin])
        before, after = np.array([self.left, self.top]), np.array([self.right, self.bottom])
        K = np.array(K, np.float64)
        K[:2] *= size[:, None] / IMAGE_SIZE
        K[:2, 2] += before
        K[:2] /= (before + size + after)[:, None]
        return K

"""The batch: what the input pipeline sends and a training step takes, field by field."""

from __future__ import annotations

import typing
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8

from data_pipelines.frame import EXPRESSION_SIZE


class Batch(NamedTuple):
    """B examples of one input image and T targets each, images of H x H pixels.

    NumPy arrays as `mixture.make_iterator` makes them, JAX arrays in the step, where
    `augment.finish_batch` turns images and masks from bytes to float32 in [0, 1]. Cameras are in
    the canonical head frame with OpenCV axes, `K` is divided by the image size.

    Attributes:
      input_image, target_image: RGB with the background as captured.
      input_mask, target_mask: foreground, 255 on the person.
      background: colour on which an example's targets are put, in [0, 1].
      jitter: brightness, contrast, saturation and hue, as in `augment.jitter_colours`.
      jittered: whether `jitter` is to be applied.
      source: `frame.MONOCULAR` or `frame.MULTI_VIEW`.
      example: data set (by alphabet), record of the input, records of the targets.
      bad_records: how many bad records were met and replaced.
    """

    input_image: UInt8[Any, "B H H 3"]
    input_mask: UInt8[Any, "B H H"]
    input_cam2head: Float32[Any, "B 4 4"]
    input_K: Float32[Any, "B 3 3"]
    target_image: UInt8[Any, "B T H H 3"]
    target_mask: UInt8[Any, "B T H H"]
    target_cam2head: Float32[Any, "B T 4 4"]
    target_K: Float32[Any, "B T 3 3"]
    target_expression: Float32[Any, "B T E"]
    background: Float32[Any, "B 3"]
    jitter: Float32[Any, "B 4"]
    jittered: Bool[Any, "B"]
    source: Int32[Any, "B"]
    example: Int32[Any, "B 2+T"]
    bad_records: Int32[Any, "B"]

    @classmethod
    def shapes(
        cls, examples: int, targets: int, image_size: int
    ) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of every field, by its annotation above."""
        sizes = {
            "B": examples,
            "T": targets,
            "2+T": 2 + targets,
            "H": image_size,
            "E": EXPRESSION_SIZE,
        }
        return {
            name: (
                tuple(sizes[n] if n in sizes else int(n) for n in kind.dim_str.split()),
                np.dtype(kind.dtypes[0]),
            )
            for name, kind in typing.get_type_hints(cls).items()
        }

    @classmethod
    def empty(cls, examples: int, targets: int, image_size: int) -> Batch:
        """NumPy arrays to be filled."""
        shapes = cls.shapes(examples, targets, image_size)
        return cls(**{name: np.empty(shape, dtype) for name, (shape, dtype) in shapes.items()})

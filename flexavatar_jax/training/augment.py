"""Finishes a batch on the accelerator: floats, colour jitter, compositing.

The pipeline draws the random numbers and sends bytes; the arithmetic is here, in `jax.numpy`, for
the first lines of the training step.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from data_pipelines.batch import Batch

_LUMA = (0.2989, 0.587, 0.114)  # of ITU-R BT.601, as torchvision rounds it


def finish_batch(batch: Batch) -> Batch:
    """The batch as the pipeline sends it, its images float32 in [0, 1], jittered and composited.

    The input is put on white, the targets on `background`; an example's jitter is that of all its
    images. Masks become float32 in [0, 1]; all other arrays are as they were.
    """

    def finish(image: ArrayLike, mask: ArrayLike, background: ArrayLike) -> tuple[Array, Array]:
        image, mask = _to_float(image), _to_float(mask)
        per_image = (len(image), *(1,) * (image.ndim - 4))  # [B] for inputs, [B, 1] for targets
        jittered = jitter_colours(image, batch.jitter.reshape(*per_image, 4))
        image = jnp.where(batch.jittered.reshape(*per_image, 1, 1, 1), jittered, image)
        alpha = mask[..., None]
        return alpha * image + (1 - alpha) * background.reshape(*per_image, 1, 1, 3), mask

    white = jnp.ones_like(batch.background)
    input_image, input_mask = finish(batch.input_image, batch.input_mask, white)
    target_image, target_mask = finish(batch.target_image, batch.target_mask, batch.background)
    return batch._replace(
        input_image=input_image,
        input_mask=input_mask,
        target_image=target_image,
        target_mask=target_mask,
    )


def jitter_colours(
    image: Float[ArrayLike, "*b H W 3"], jitter: Float[ArrayLike, "*#b 4"]
) -> Float[Array, "*b H W 3"]:
    """Changes brightness, contrast, saturation and hue, in this order, clipping after each.

    The four operations are torchvision's (`ColorJitter`), which takes them in a random order:
    `brightness` scales the image; `contrast` scales its difference from its mean luma, and
    `saturation` that from each pixel's luma; `hue` turns the hue by a part of the circle.
    """
    brightness, contrast, saturation, hue = jnp.moveaxis(jitter[..., None, None, None, :], -1, 0)
    image = jnp.clip(brightness * image, 0, 1)
    image = _blend(jnp.mean(_luma(image), axis=(-3, -2), keepdims=True), image, contrast)
    image = _blend(_luma(image), image, saturation)
    return _turn_hue(image, hue)


def _to_float(x: ArrayLike) -> Float[Array, "..."]:
    return jnp.asarray(x, jnp.float32) / 255


def _luma(image: Float[Array, "*b H W 3"]) -> Float[Array, "*b H W 1"]:
    return jnp.sum(image * jnp.array(_LUMA), axis=-1, keepdims=True)


def _blend(grey: Array, image: Array, factor: Array) -> Array:
    return jnp.clip(grey + factor * (image - grey), 0, 1)


def _turn_hue(
    image: Float[Array, "*b H W 3"], turn: Float[Array, "*#b 1 1 1"]
) -> Float[Array, "*b H W 3"]:
    """Adds `turn` to the hue, of which 1 is the whole circle; HSV's saturation and value stay."""
    value, darkest = jnp.max(image, -1, keepdims=True), jnp.min(image, -1, keepdims=True)
    chroma = value - darkest
    red, green, blue = jnp.split(image, 3, axis=-1)
    sixth = jnp.where(  # the hue in sixths of the circle
        value == red,
        green - blue,
        jnp.where(value == green, blue - red, red - green),
    ) / jnp.where(chroma == 0, 1, chroma)
    sixth += jnp.where(value == red, 0.0, jnp.where(value == green, 2.0, 4.0))
    # Each channel falls from `value` by the chroma at a distance of two sixths from its own hue.
    k = jnp.array([5.0, 3.0, 1.0]) + sixth + 6 * turn
    k -= 6 * jnp.floor(k / 6)
    return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)

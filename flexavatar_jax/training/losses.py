"""What a rendered image is trained towards: L1, SSIM and two perceptual distances.

    loss = 0.8 L1 + 0.2 (1 - SSIM) + DINO + SAM        (weights: `config.loss`)

and, of no weight in the paper, the mean square error, whose optimum is what PSNR measures.

DINO and SAM join at step `config.loss.perceptual_start`; L1 and SSIM are there from the start.
Every term is a mean over elements, so values don't depend on batch or image size. Images are
float32 RGB in [0, 1], channels last, `*b h w 3`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from flexavatar_jax.frozen import dinov2, hiera
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.training import ssim_tpu
from kernels import backends

PERCEPTUAL_SIZE = 512
DINO_MARGIN = 4

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
SSIM_C1 = 0.01**2
SSIM_C2 = 0.03**2

Images = Float[ArrayLike, "*b h w 3"]
Scalar = Float[Array, ""]


def training_loss(
    prediction: Float[ArrayLike, "n h w 3"],
    target: Float[ArrayLike, "n h w 3"],
    config: Mapping[str, float] | ConfigDict,
    frozen: FrozenNetworks | None = None,
    *,
    perceptual: bool = False,
    judged: Int[ArrayLike, "m"] | None = None,
    pixels: Float[ArrayLike, "n h w"] | None = None,
) -> tuple[Scalar, dict[str, Scalar]]:
    """The weighted sum that training minimises, and its parts before weighting.

    `config` is `config.loss`: the weights `l1`, `mse`, `ssim`, `dino` and `sam`; a term of weight
    0 isn't computed. `perceptual` is static, and brings in DINO and SAM: the trainer compiles one
    step without and, for `perceptual_start`, one with them, so that the first pays nothing.
    `judged` says which of the images DINO and SAM are to see; by default all. `pixels` says how
    much each pixel counts in `l1` and `mse`, by default all alike (`focus.focus_weights`).
    """
    parts = {}
    if config["l1"]:
        parts["l1"] = _mean(jnp.abs(prediction - target), pixels)
    if config["mse"]:
        parts["mse"] = _mean((prediction - target) ** 2, pixels)
    if config["ssim"]:
        parts["ssim"] = 1 - jnp.mean(ssim(prediction, target))
    pair = (prediction, target)
    if judged is not None:
        pair = tuple(jnp.take(images, judged, axis=0) for images in pair)
    if perceptual and config["dino"]:
        parts["dino"] = _image_by_image(dino_loss, frozen.dinov2_small, *pair)
    if perceptual and config["sam"]:
        parts["sam"] = _image_by_image(sam_loss, frozen.sam2, *pair)
    total = sum((config[name] * part for name, part in parts.items()), start=jnp.zeros(()))
    return total, parts


def draw_targets(
    background: Float[ArrayLike, "b 3"], targets: int, count: int
) -> Int[Array, "b*{count}"]:
    """A random `count` of each example's `targets` images, among all b x `targets` of them.

    All subsets are equally likely, so the mean of any distance over the drawn images estimates the
    mean over all without bias; of S^2 the variance among an example's targets, it adds a variance
    of S^2 / count (1 - count / targets) an example. The draw follows from the example's background
    colour, which is random itself: it's the same on any mesh and after any restart.
    """
    bits = jax.lax.bitcast_convert_type(jnp.asarray(background, jnp.float32), jnp.uint32)

    def draw(bits: Array) -> Array:
        key = jax.random.key(0)
        for word in bits:
            key = jax.random.fold_in(key, word)
        return jax.random.choice(key, targets, (count,), replace=False)

    chosen = jax.vmap(draw)(bits)
    return (chosen + targets * jnp.arange(len(bits))[:, None]).reshape(-1)


def _mean(error: Float[ArrayLike, "n h w 3"], pixels: Float[ArrayLike, "n h w"] | None) -> Scalar:
    if pixels is None:
        return jnp.mean(error)
    return jnp.mean(jnp.mean(error, axis=-1) * pixels)


def l1(prediction: Float[ArrayLike, "*s"], target: Float[ArrayLike, "*s"]) -> Scalar:
    """Mean absolute difference over all elements."""
    return jnp.mean(jnp.abs(prediction - target))


def dino_loss(
    params: dinov2.Params,
    prediction: Float[ArrayLike, "b h w 3"],
    target: Float[ArrayLike, "b h w 3"],
) -> Scalar:
    """Mean absolute difference of DINOv2-small's hidden states 5, 8 and 11.

    The network sees the central 504x504 of a 512x512 image; other sizes are first resized to
    512x512 (bilinear, antialiased where that makes them smaller).
    """
    crop = slice(DINO_MARGIN, PERCEPTUAL_SIZE - DINO_MARGIN)
    a, b = (
        dinov2.perceptual_features(params, _at_perceptual_size(image)[:, crop, crop])
        for image in (prediction, target)
    )
    # The three states are of one size: their means' mean is the mean over all elements.
    return jnp.mean(jnp.stack([_feature_l1(p, q) for p, q in zip(a, b, strict=True)]))


def sam_loss(
    params: hiera.Params,
    prediction: Float[ArrayLike, "b h w 3"],
    target: Float[ArrayLike, "b h w 3"],
) -> Scalar:
    """Mean absolute difference of SAM 2.1 Hiera-small's image embeddings at 1024x1024.

    Sizes other than 512x512 are first resized to that, as for `dino_loss`.
    """
    a, b = (
        hiera.image_embedding(params, _at_perceptual_size(image)) for image in (prediction, target)
    )
    return _feature_l1(a, b)


def psnr(prediction: Images, target: Images) -> Float[Array, "*b"]:
    """Peak signal-to-noise ratio of each image in dB, peak 1; infinite for equal images."""
    return -10 * jnp.log10(jnp.mean((prediction - target) ** 2, axis=(-3, -2, -1)))


def ssim(prediction: Images, target: Images) -> Float[Array, "*b"]:
    """Structural similarity of each image (Wang et al., 2004), 1 for equal ones.

    An 11x11 Gaussian window of sigma 1.5, each channel on its own, images padded with zeros to keep
    their size: the variant that the Gaussian splatting literature trains with.
    """
    if backends.platform() != "tpu":
        return _ssim_by_maps(prediction, target)
    flat = (x.reshape(-1, *x.shape[-3:]) for x in (prediction, target))
    return _ssim_by_kernel(*flat).reshape(prediction.shape[:-3])


@jax.checkpoint
def _ssim_by_maps(prediction: Images, target: Images) -> Float[Array, "*b"]:
    """Maps are recomputed in the backward pass: they take many times the images' memory."""
    moments = jnp.concatenate(
        [prediction, target, prediction**2, target**2, prediction * target], axis=-1
    )
    mu_x, mu_y, xx, yy, xy = jnp.split(_gaussian_blur(moments), 5, axis=-1)
    var_x, var_y, covariance = xx - mu_x**2, yy - mu_y**2, xy - mu_x * mu_y
    similarity = ((2 * mu_x * mu_y + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mu_x**2 + mu_y**2 + SSIM_C1) * (var_x + var_y + SSIM_C2)
    )
    return jnp.mean(similarity, axis=(-3, -2, -1))


@jax.custom_vjp
def _ssim_by_kernel(
    prediction: Float[ArrayLike, "n h w 3"], target: Float[ArrayLike, "n h w 3"]
) -> Float[Array, "n"]:
    return _ssim_and_gradient(prediction, target)[0]


def _ssim_forward(prediction: ArrayLike, target: ArrayLike) -> tuple[Array, tuple]:
    value, gradient = _ssim_and_gradient(prediction, target)
    return value, (prediction, target, gradient)


def _ssim_backward(saved: tuple, cotangent: ArrayLike) -> tuple[Array, Array]:
    prediction, target, gradient = saved
    scale = cotangent[:, None, None, None]
    # Images may change places. Nobody asks for the target's gradient in training: it falls away.
    return scale * gradient, scale * _ssim_and_gradient(target, prediction)[1]


_ssim_by_kernel.defvjp(_ssim_forward, _ssim_backward)


def _ssim_and_gradient(prediction: ArrayLike, target: ArrayLike) -> tuple[Array, Array]:
    taps = tuple(_taps().tolist())
    return ssim_tpu.ssim_and_gradient(prediction, target, taps=taps, c1=SSIM_C1, c2=SSIM_C2)


def _taps() -> Float[np.ndarray, "t"]:
    """SSIM's window along one axis."""
    reach = SSIM_WINDOW // 2
    taps = np.exp(-((np.arange(SSIM_WINDOW) - reach) ** 2) / (2 * SSIM_SIGMA**2))
    return taps / taps.sum()


def _gaussian_blur(x: Float[ArrayLike, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """`x` under the SSIM window, separably, zero beyond the border."""
    x = rearrange(_blur_rows(x), "... h w c -> ... w h c")
    return rearrange(_blur_rows(x), "... w h c -> ... h w c")


def _blur_rows(x: Float[ArrayLike, "*b h w c"], block: int = 64) -> Float[Array, "*b h w c"]:
    """Blur along h as a product with a banded matrix, a block of rows at a time.

    A matrix product is what TPUs are made of, and on CPU at 512x512 it's ten times as fast as a
    depthwise convolution; blocks keep the band from being mostly zeros.
    """
    height, reach = x.shape[-3], SSIM_WINDOW // 2
    block = min(block, height)
    blocks = -(-height // block)
    padding = [(0, 0)] * (x.ndim - 3) + [(reach, reach + blocks * block - height), (0, 0), (0, 0)]
    x = jnp.pad(x, padding)
    windows = [x[..., i * block : (i + 1) * block + 2 * reach, :, :] for i in range(blocks)]
    band = np.zeros((block, block + 2 * reach), np.float32)
    for i in range(block):
        band[i, i : i + SSIM_WINDOW] = _taps()
    # Variances are small differences of these sums: less than full precision shows.
    blurred = jnp.einsum(
        "oi,...nihc->...nohc",
        band,
        jnp.stack(windows, axis=-4),
        precision=jax.lax.Precision.HIGHEST,
    )
    return rearrange(blurred, "... n o w c -> ... (n o) w c")[..., :height, :, :]


def _at_perceptual_size(image: Float[ArrayLike, "b h w 3"]) -> Float[Array, "b 512 512 3"]:
    shape = (len(image), PERCEPTUAL_SIZE, PERCEPTUAL_SIZE, 3)
    return jax.image.resize(image, shape, "bilinear", antialias=True)


def _feature_l1(a: Float[ArrayLike, "*s"], b: Float[ArrayLike, "*s"]) -> Scalar:
    return l1(a.astype(jnp.float32), b.astype(jnp.float32))


Distance = Callable[[Any, Float[ArrayLike, "b h w 3"], Float[ArrayLike, "b h w 3"]], Scalar]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _image_by_image(
    distance: Distance,
    params: Any,
    prediction: Float[ArrayLike, "n h w 3"],
    target: Float[ArrayLike, "n h w 3"],
) -> Scalar:
    """Mean of `distance` over pairs of images, in the memory that one pair takes.

    As the networks are frozen and the value is one number, its gradient is an image: it is computed
    along with the value, so that nothing else is kept, or computed again, for the backward pass.
    """
    pairs = (prediction[:, None], target[:, None])
    return jnp.mean(jax.lax.map(lambda pair: distance(params, *pair), pairs))


def _value_and_image(
    distance: Distance, params: Any, prediction: Any, target: Any
) -> tuple[Scalar, Array]:
    pairs = (prediction[:, None], target[:, None])
    step = jax.value_and_grad(distance, argnums=1)
    values, gradients = jax.lax.map(lambda pair: step(params, *pair), pairs)
    return jnp.mean(values), gradients[:, 0] / len(gradients)


def _scale_image(
    _: Distance, gradient: ArrayLike, cotangent: ArrayLike
) -> tuple[None, Array, None]:
    return None, cotangent * gradient, None


_image_by_image.defvjp(_value_and_image, _scale_image)

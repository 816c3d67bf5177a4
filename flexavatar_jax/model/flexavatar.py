"""FlexAvatar: a portrait to an avatar code, an avatar code and an expression to 3D Gaussians.

Kirschstein, Giebenhain, Nießner: FlexAvatar (CVPR 2026, arXiv 2512.15599).
"""

from __future__ import annotations

import jax
import ml_collections
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from flexavatar_jax.model.decoder import Decoder
from flexavatar_jax.model.encoder import Encoder
from flexavatar_jax.model.gaussians import GaussianHead, Gaussians
from flexavatar_jax.model.head_template import HeadTemplate
from flexavatar_jax.model.upsampler import Upsampler


class FlexAvatar(nnx.Module):
    """The model, at any size `config.model` asks for.

    Transformers compute in `config.dtype`; upsampler, Gaussians and all parameters are float32. On
    accelerators the products of float32 arrays round their factors (`upsampler.py`) unless
    `jax_default_matmul_precision` is "highest"; those of rays and Gaussians never do.
    Every array of its state is an `nnx.Param` that training changes; what follows from the
    template is static.
    """

    def __init__(
        self, config: ml_collections.ConfigDict, template: HeadTemplate, *, rngs: nnx.Rngs
    ):
        """Builds a freshly initialised model.

        Args:
          config: `config.model` of an experiment (configs/flex1.py), its sizes checked by
            `training.config_check`.
          template: the mesh that head tokens and Gaussians are bound to.
          rngs: `nnx.Rngs(seed)`.
        """
        self.encoder = Encoder(config, template, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.upsampler = Upsampler(config.width, tuple(config.upsampler_channels), rngs=rngs)
        self.gaussians = GaussianHead(self.upsampler.channels_out, config, template, rngs=rngs)

    def encode(
        self,
        image: Float[ArrayLike, "B h w 3"],
        cam2head: Float[ArrayLike, "B 4 4"],
        K: Float[ArrayLike, "B 3 3"],
        features: Float[ArrayLike, "B 16 16 768"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Avatar codes of portraits.

        Args:
          image: RGB in [0, 1], white background, `config.image_size` square.
          cam2head: camera in the head frame (metres), OpenCV axes.
          K: intrinsics divided by the image size.
          features: DINOv2 feature map of the image, needed if `config.dino`.

        Returns:
          One token a texel of the head's UV map, row-major.
        """
        with jax.named_scope("encoder"):
            return self.encoder(image, cam2head, K, features)

    def decode(
        self,
        code: Float[ArrayLike, "B N D"],
        expression: Float[ArrayLike, "B E X"],
        source: Int[ArrayLike, "B"],
    ) -> Gaussians:
        """Gaussians of avatars under expressions, [B, E, G, ...].

        Args:
          code: avatar codes.
          expression: FLAME codes, in the order of `data_pipelines.frame.EXPRESSION_PARTS`.
          source: row of the bias sink: `MONOCULAR` or `MULTI_VIEW` of `data_pipelines.frame`.
            Inference always takes `MULTI_VIEW`.
        """
        with jax.named_scope("decoder"):
            features = self.decoder(code, expression, source)
        with jax.named_scope("upsampler"):
            maps = _each(self.upsampler, features)
        with jax.named_scope("gaussians"):
            return self.gaussians(maps)

    def folded(self) -> FlexAvatar:
        """A copy for inference that computes what depends on parameters alone only once.

        Folds styles into the upsampler's kernels, embeds the template and rounds the kernels of
        linear layers to what they compute in. Not for training: the folded parameters no longer
        answer to what they were made from.
        """
        model = nnx.clone(self)
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.Linear) and module.dtype is not None:
                module.kernel = nnx.Param(module.kernel[...].astype(module.dtype))
        model.encoder.queries = model.encoder.queries.folded()
        model.upsampler.fold()
        return model


def _each(upsample: Upsampler, features: Float[Array, "B E h w d"]) -> Float[Array, "B E H W c"]:
    """Upsamples the maps of all expressions of all images as one batch."""
    images, expressions = features.shape[:2]
    maps = upsample(features.reshape(images * expressions, *features.shape[2:]))
    return maps.reshape(images, expressions, *maps.shape[1:])

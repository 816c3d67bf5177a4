"""Encoder: a portrait and its camera to an avatar code, one token a texel of the head's UV map."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from einops import rearrange
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from flexavatar_jax.model.attention import (
    GPT_INIT,
    CausalBlock,
    JointTransformer,
    layer_norm,
    linear,
)
from flexavatar_jax.model.head_template import HeadTemplate
from flexavatar_jax.model.remat import recomputed
from flexavatar_jax.model.resampling import sample_grid

FEATURE_SIZE = 768
"""Channels of the DINOv2 ViT-B feature map."""

POINT_FREQUENCIES = 8


def plucker_map(
    cam2head: Float[ArrayLike, "B 4 4"], K: Float[ArrayLike, "B 3 3"], height: int, width: int
) -> Float[Array, "B h w 6"]:
    """Plücker coordinates [origin x ray, ray] of each pixel's viewing ray in the head frame.

    Args:
      cam2head: cameras in the head frame, OpenCV axes.
      K: intrinsics divided by the image size.
      height, width: of the map; its corner pixels lie at 0 and 1 (no half-pixel shift).
    """
    y, x = jnp.meshgrid(jnp.linspace(0, 1, height), jnp.linspace(0, 1, width), indexing="ij")
    fx, fy, cx, cy = (K[:, i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    at_unit_depth = jnp.stack(
        jnp.broadcast_arrays((x - cx) / fx, (y - cy) / fy, jnp.float32(1)), axis=-1
    )
    # Accelerators would otherwise round the rotation to bfloat16.
    ray = jnp.einsum(
        "bij,bhwj->bhwi", cam2head[:, :3, :3], at_unit_depth, precision=jax.lax.Precision.HIGHEST
    )
    ray = ray / jnp.linalg.norm(ray, axis=-1, keepdims=True)
    origin = jnp.broadcast_to(cam2head[:, None, None, :3, 3], ray.shape)
    return jnp.concatenate([jnp.cross(origin, ray), ray], axis=-1)


def embed_points(points: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 51"]:
    """[sines, cosines, xyz] of points (metres) at 8 octaves from pi: x first, then y, z."""
    frequencies = np.float32(np.pi) * 2.0 ** np.arange(POINT_FREQUENCIES, dtype=np.float32)
    phases = rearrange(points[..., None] * frequencies, "... xyz f -> ... (xyz f)")
    return np.concatenate([np.sin(phases), np.cos(phases), points], axis=-1)


class ImageEncoder(nnx.Module):
    """Image patches with their viewing rays to tokens, through causal transformer blocks."""

    def __init__(self, config: ml_collections.ConfigDict, *, rngs: nnx.Rngs):
        dtype, width = jnp.dtype(config.dtype), config.width
        side = config.image_size // config.patch_size
        self.patch_size = config.patch_size
        self.dtype = dtype
        self.patchify = linear(
            9 * config.patch_size**2,
            width,
            (None, "embed"),
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.positions = nnx.Param(
            GPT_INIT(rngs.params(), (side**2, width), jnp.float32), logical_axes=(None, "embed")
        )
        self.blocks = nnx.List(
            CausalBlock(width, config.num_heads, dtype=dtype, rngs=rngs)
            for _ in range(config.vit_depth)
        )
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.remat = config.remat

    def __call__(
        self,
        image: Float[ArrayLike, "B h w 3"],
        cam2head: Float[ArrayLike, "B 4 4"],
        K: Float[ArrayLike, "B 3 3"],
    ) -> Float[Array, "B N D"]:
        """Tokens of RGB images in [0, 1], row-major."""
        rays = plucker_map(cam2head, K, *image.shape[1:3])
        patches = rearrange(
            jnp.concatenate([image, rays], axis=-1).astype(self.dtype),
            "b (y p) (x q) c -> b (y x) (p q c)",
            p=self.patch_size,
            q=self.patch_size,
        )
        x = self.patchify(patches) + self.positions[...].astype(self.dtype)
        for block, again in zip(self.blocks, recomputed(self.remat, len(self.blocks)), strict=True):
            run = nnx.remat(CausalBlock.__call__) if again else CausalBlock.__call__
            x = run(block, x)
        return self.norm(x)


class Queries(nnx.Module):
    """The head tokens before they have seen an image: embedded points of the head template."""

    def __init__(
        self, config: ml_collections.ConfigDict, template: HeadTemplate, *, rngs: nnx.Rngs
    ):
        points = template.position_map(config.head_resolution).positions.reshape(-1, 3)
        self.template = template
        self.side = config.head_resolution
        self.projection = linear(
            embed_points(points).shape[-1], config.width, (None, "embed"), rngs=rngs
        )
        self.norm = layer_norm(config.width, dtype=jnp.float32, rngs=rngs)

    def __call__(self) -> Float[Array, "N D"]:
        points = self.template.position_map(self.side).positions.reshape(-1, 3)
        return self.norm(self.projection(embed_points(points.astype(np.float32))))

    def folded(self) -> FoldedQueries:
        """The queries computed once, for inference."""
        return FoldedQueries(self())


class FoldedQueries(nnx.Module):
    """Queries that no longer depend on parameters."""

    def __init__(self, queries: Float[Array, "N D"]):
        self.queries = nnx.Variable(queries)

    def __call__(self) -> Float[Array, "N D"]:
        return self.queries[...]


class Encoder(nnx.Module):
    """Image tokens, joined by DINOv2 features if `config.dino`, taken up by the head tokens."""

    def __init__(
        self, config: ml_collections.ConfigDict, template: HeadTemplate, *, rngs: nnx.Rngs
    ):
        dtype, width = jnp.dtype(config.dtype), config.width
        self.dtype = dtype
        self.image = ImageEncoder(config, rngs=rngs)
        self.image_side = config.image_size // config.patch_size
        self.dino = config.dino
        if self.dino:
            self.feature_projection = linear(
                width + FEATURE_SIZE, width, (None, "embed"), dtype=dtype, rngs=rngs
            )
        self.queries = Queries(config, template, rngs=rngs)
        self.transformer = JointTransformer(
            width,
            config.num_heads,
            config.encoder_depth,
            dtype=dtype,
            remat=config.remat,
            rngs=rngs,
        )

    def __call__(
        self,
        image: Float[ArrayLike, "B h w 3"],
        cam2head: Float[ArrayLike, "B 4 4"],
        K: Float[ArrayLike, "B 3 3"],
        features: Float[ArrayLike, "B 16 16 768"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Avatar codes of images; see `FlexAvatar.encode`."""
        tokens = self.image(image, cam2head, K)
        if self.dino:
            if features is None:
                raise ValueError(
                    "config.model.dino is set, but encode got no features; give DINOv2's feature "
                    "map, or train with config.model.dino=False"
                )
            # The rim mixes with zeros: the published weights expect it.
            features = sample_grid(features, self.image_side, self.image_side)
            features = rearrange(features, "b y x c -> b (y x) c").astype(self.dtype)
            tokens = self.feature_projection(jnp.concatenate([tokens, features], axis=-1))
        queries = self.queries().astype(self.dtype)
        queries = jnp.broadcast_to(queries, (len(tokens), *queries.shape))
        return self.transformer(queries, tokens)

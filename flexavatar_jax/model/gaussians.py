"""UV feature maps to 3D Gaussians on the head template, in float32."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from flexavatar_jax.model.attention import LINEAR_INIT, linear
from flexavatar_jax.model.head_template import HeadTemplate, SamplePoints
from flexavatar_jax.model.resampling import places, sample_grid, take_points


class Gaussians(NamedTuple):
    """3D Gaussians in the canonical head frame; G of them, any leading shape.

    Attributes:
      means: [..., G, 3] metres.
      quats: [..., G, 4] unit quaternions (w, x, y, z).
      scales: [..., G, 3] standard deviations along the local axes, metres.
      opacities: [..., G] in (0, 1).
      colors: [..., G, 3] degree-0 spherical harmonics: rgb = max(0, 0.28209479 c + 0.5).
    """

    means: Float[Array, "*b G 3"]
    quats: Float[Array, "*b G 4"]
    scales: Float[Array, "*b G 3"]
    opacities: Float[Array, "*b G"]
    colors: Float[Array, "*b G 3"]


class GaussianHead(nnx.Module):
    """Reads Gaussians off a feature map, at the points of a grid that lie on the head template."""

    def __init__(
        self,
        features: int,
        config: ml_collections.ConfigDict,
        template: HeadTemplate,
        *,
        rngs: nnx.Rngs,
    ):
        def head(size: int, bias: float | list[float] = 0.0, zero: bool = True) -> nnx.Linear:
            return linear(
                features,
                size,
                (None, None),
                kernel_init=nnx.initializers.zeros if zero else LINEAR_INIT,
                bias_init=lambda key, shape, dtype: jnp.broadcast_to(jnp.array(bias, dtype), shape),
                rngs=rngs,
            )

        self.color = head(3, zero=False)
        self.scale = head(3, bias=-5.0)
        self.offset = head(3)
        self.opacity = head(1, bias=float(np.log(0.1 / 0.9)))
        self.rotation = head(4, bias=[1.0, 0.0, 0.0, 0.0])
        self.grid = config.gaussian_resolution
        self.max_scale = config.max_scale
        self.offset_range = config.offset_range
        self.template = template
        self.uv_resolution = config.uv_resolution

    @property
    def points(self) -> SamplePoints:
        """Where Gaussians sit before the network moves them."""
        return self.template.sample_points(self.uv_resolution, self.grid)

    def __call__(self, features: Float[Array, "*b h w c"]) -> Gaussians:
        """Gaussians of each map, row-major over the grid (G is fixed by template and grid)."""
        return self.sample(self.maps(features))

    @property
    def _heads(self) -> tuple[nnx.Linear, ...]:
        return self.color, self.scale, self.offset, self.opacity, self.rotation

    @property
    def biases(self) -> Float[Array, "14"]:
        """What is added to sampled maps."""
        return jnp.concatenate([h.bias[...] for h in self._heads])

    def maps(self, features: Float[Array, "*b h w c"]) -> Float[Array, "*b h w 14"]:
        """What the Gaussians are sampled from: colour, scale, offset, opacity, rotation.

        The heads are linear, so they come before the sampling: 14 channels, not all of them, are
        sampled, at more points than the map has texels.
        """
        kernel = jnp.concatenate([h.kernel[...] for h in self._heads], axis=-1)
        return jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST)

    def sample(self, maps: Float[Array, "*b h w 14"]) -> Gaussians:
        """Gaussians at the grid's points, of `maps` that aren't biased yet."""
        values = rearrange(sample_grid(maps, self.grid, self.grid), "... y x c -> ... (y x) c")
        index = self.points.index
        values = take_points(values, index, places(index, values.shape[-2]))
        values = values + self.biases
        sizes = np.cumsum([h.out_features for h in self._heads])[:-1]
        color, scale, offset, opacity, rotation = jnp.split(values, sizes, axis=-1)
        norm = jnp.sqrt(jnp.maximum(jnp.sum(rotation**2, axis=-1, keepdims=True), 1e-24))
        return Gaussians(
            means=self.points.positions + self.offset_range * (jax.nn.sigmoid(offset) - 0.5),
            quats=rotation / norm,
            scales=jnp.clip(jnp.exp(scale), 0.0, self.max_scale),
            opacities=jax.nn.sigmoid(opacity[..., 0]),
            colors=color,
        )

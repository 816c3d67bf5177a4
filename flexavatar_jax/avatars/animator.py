"""Avatars of a trained model: encode a portrait once, then render any view and expression."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from data_pipelines.errors import UserError
from data_pipelines.frame import MULTI_VIEW
from flexavatar_jax.avatars import inputs
from flexavatar_jax.frozen import dinov2
from flexavatar_jax.model.render import SH_C0, render
from flexavatar_jax.runs.loading import LoadedModel
from kernels.ply import GaussianCloud

WHITE = (1.0, 1.0, 1.0)

Code = Float[np.ndarray, "N D"] | Float[np.ndarray, "E N D"]
"""One avatar code for all frames, or one for each."""


class Animator:
    """A model made ready to encode portraits and render avatars, in chunks of one compiled size.

    Args:
      loaded: a restored model (`checkpoints.load_model`).
      chunk: images rendered at a time.
      backend: see `kernels.rasterize`.
    """

    def __init__(self, loaded: LoadedModel, *, chunk: int = 4, backend: str = "auto"):
        self.loaded, self.backend = loaded, backend
        self._graph, self._state = nnx.split(loaded.model.folded())
        self._chunk = chunk
        self.image_size = loaded.config.model.image_size
        self._code_shape = (loaded.config.model.head_resolution**2, loaded.config.model.width)

    def encode(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        cam2head: Float[np.ndarray, "4 4"],
        K: Float[np.ndarray, "3 3"],
    ) -> Float[np.ndarray, "N D"]:
        """The avatar code of a portrait, seen by the model as training's were.

        Args:
          image: [H, H, 3] RGB, uint8 or floats in [0, 1], of any size.
          mask: [H, H] foreground, 255, 1.0 or True on the person.
          cam2head: camera in the canonical head frame (metres), OpenCV axes.
          K: intrinsics divided by the image size.

        Raises:
          UserError: one of them is of another shape, kind or range.
        """
        seen = inputs.model_input(image, mask, self.image_size)
        inputs.check_camera(cam2head, K)
        arrays = [np.asarray(x, np.float32)[None] for x in (seen, cam2head, K)]
        return np.asarray(_encode(self._graph, self._state, self.loaded.dinov2_base, *arrays)[0])

    def gaussians(
        self, code: Code, expressions: Float[np.ndarray, "E 135"], source: int = MULTI_VIEW
    ) -> GaussianCloud:
        """The avatar under each of E expressions, as G Gaussians that `kernels.rasterize` takes.

        Returns:
          NumPy arrays [E, G, ...] in the canonical head frame: means and scales in metres, unit
          quaternions (w, x, y, z), opacities and RGB colours in [0, 1] or, for colours, above.

        Raises:
          UserError: as `frames`.
        """
        expressions = inputs.check_expressions(expressions)
        code, source = self._check_code(code, len(expressions)), inputs.check_source(source)
        parts = []
        for part, count in _chunks(len(expressions), self._chunk):
            gaussians = _decode(self._graph, self._state, code[part], expressions[part], source)
            colors = jnp.maximum(SH_C0 * gaussians.colors + 0.5, 0.0)
            parts.append([np.asarray(x)[:count] for x in gaussians._replace(colors=colors)])
        return GaussianCloud(*map(np.concatenate, zip(*parts, strict=True)))

    def frames(
        self,
        code: Code,
        expressions: Float[np.ndarray, "E 135"] | Float[np.ndarray, "135"],
        cam2head: Float[np.ndarray, "E 4 4"] | Float[np.ndarray, "4 4"],
        K: Float[np.ndarray, "E 3 3"] | Float[np.ndarray, "3 3"],
        *,
        size: int | None = None,
        background: tuple[float, float, float] | None = WHITE,
        source: int = MULTI_VIEW,
    ) -> Iterator[Float[np.ndarray, "size size C"]]:
        """Yields an image for each expression and its camera; a chunk at a time is in memory.

        Args:
          code, expressions, cam2head, K: one for each image, or a single one for all; cameras are
            in the canonical head frame (OpenCV axes, metres), `K` divided by the image size.
          size: pixels a side, by default the model's.
          background: RGB in [0, 1]; None for transparent: images then have a fourth channel, their
            alpha, which the colours are not multiplied by.
          source: the bias sink; whole heads come from the multi-view one.

        Returns:
          An iterator of float32 images in [0, 1]. What was given is checked before it starts.

        Raises:
          UserError: not a camera and a code for each expression, or one of them of another shape or
            range; an unknown source; a size below 1.
          ValueError (while it runs): Gaussians that found no room in an image.
        """
        expressions, cam2head, K = _for_each_image(code, expressions, cam2head, K)
        expressions = inputs.check_expressions(expressions)
        counts = len(expressions), len(cam2head), len(K)
        if len(set(counts)) > 1:
            raise UserError(
                "there are {} expressions, {} cam2head and {} K; give one of each for every "
                "image".format(*counts)
            )
        inputs.check_camera(cam2head, K)
        size = self.image_size if size is None else size
        if size < 1:
            raise UserError(f"size is {size}; expected 1 or more pixels a side")
        return self._frames(
            self._check_code(code, len(expressions)),
            expressions,
            np.asarray(cam2head, np.float32),
            np.asarray(K, np.float32),
            size,
            background,
            inputs.check_source(source),
        )

    def _frames(self, code, expressions, cam2head, K, size, background, source):
        transparent = background is None
        behind = np.zeros(3) if transparent else background
        behind = jnp.broadcast_to(jnp.asarray(behind, jnp.float32), (self._chunk, 3))
        for part, count in _chunks(len(expressions), self._chunk):
            gaussians = _decode(self._graph, self._state, code[part], expressions[part], source)
            # Not under jit: the rasterizer then counts the room that it needs.
            out = render(
                gaussians, cam2head[part], K[part], behind, size=size, backend=self.backend
            )
            if missing := int(jnp.sum(out.overflow[:count])):
                raise ValueError(
                    f"images {part[0]} to {part[count - 1]} lack {missing} intersections of "
                    "Gaussians with tiles, though room was counted for all; render smaller images "
                    "or try backend='xla'"
                )
            color = np.asarray(out.color)[:count]
            if transparent:
                alpha = np.asarray(out.alpha)[:count, ..., None]
                color = np.concatenate([color / np.maximum(alpha, 1e-6), alpha], axis=-1)
            yield from np.clip(color, 0, 1)

    def render(self, *args, **options) -> Float[np.ndarray, "E size size C"]:
        """All the images of `frames`, which takes the same, as one array."""
        return np.stack(list(self.frames(*args, **options)))

    def _check_code(self, code: Code, count: int) -> Float[np.ndarray, "E N D"]:
        """A code for each of `count` images, [E, N, D] (a view)."""
        code = np.asarray(code, np.float32)
        if code.shape[-2:] != self._code_shape or code.shape[:-2] not in ((), (count,)):
            raise UserError(
                f"the avatar code is {list(code.shape)}; this model's are "
                f"{list(self._code_shape)}, one for all images or one for each of {count}"
            )
        if not np.isfinite(code).all():
            raise UserError("the avatar code holds numbers that are not finite")
        return np.broadcast_to(code, (count, *self._code_shape))


def _for_each_image(code: Code, *tracking: np.ndarray) -> list[np.ndarray]:
    """Expressions, cameras and intrinsics, single ones repeated for as many as there are others."""
    single = [np.ndim(x) == n for x, n in zip(tracking, (1, 2, 2), strict=True)]
    counts = [len(x) for x, one in zip(tracking, single, strict=True) if not one]
    count = counts[0] if counts else len(code) if np.ndim(code) == 3 else 1
    return [
        np.repeat(np.asarray(x)[None], count, axis=0) if one else np.asarray(x)
        for x, one in zip(tracking, single, strict=True)
    ]


def _chunks(count: int, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Index arrays of `size` over `count` items, the last padded, and how many of each count."""
    for start in range(0, count, size):
        index = np.arange(start, start + size)
        yield np.minimum(index, count - 1), min(size, count - start)


@jax.jit
def _encode(graph, state, weights, image, cam2head, K):
    features = None if weights is None else dinov2.patch_features(weights, image)
    return nnx.merge(graph, state).encode(image, cam2head, K, features)


@jax.jit
def _decode(graph, state, code, expressions, source):
    sources = jnp.full(len(code), source, jnp.int32)
    gaussians = nnx.merge(graph, state).decode(code, expressions[:, None], sources)
    return jax.tree.map(lambda x: x[:, 0], gaussians)

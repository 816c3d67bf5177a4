"""Avatars of a trained model: encode a portrait once, then render any view and expression."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from data_pipelines import cameras
from data_pipelines.frame import EXPRESSION_SIZE, MULTI_VIEW
from flexavatar_jax.frozen import dinov2
from flexavatar_jax.model.render import render
from flexavatar_jax.runs.loading import LoadedModel

WHITE = (1.0, 1.0, 1.0)


class Look(NamedTuple):
    """Images of an avatar."""

    color: Float[np.ndarray, "E H W 3"]
    """RGB in [0, 1]."""
    alpha: Float[np.ndarray, "E H W"]
    """How much of each pixel the avatar covers."""


class Animator:
    """A model made ready to encode portraits and render avatars, in chunks of one compiled size.

    Args:
      loaded: a restored model (`checkpoints.load_model`).
      chunk: images rendered at a time.
      backend: see `kernels.rasterize`.
    """

    def __init__(self, loaded: LoadedModel, *, chunk: int = 4, backend: str = "auto"):
        self._graph, self._state = nnx.split(loaded.model.folded())
        self._dinov2 = loaded.dinov2
        self._chunk, self._backend = chunk, backend
        self.image_size = loaded.config.model.image_size

    def encode(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        mask: UInt8[np.ndarray, "H W"],
        cam2head: Float[np.ndarray, "4 4"],
        K: Float[np.ndarray, "3 3"],
    ) -> Float[Array, "N D"]:
        """The avatar code of a portrait, which is composited on white first.

        `cam2head` is in the canonical head frame (OpenCV axes), `K` divided by the image size.
        """
        alpha = mask[..., None].astype(np.float32) / 255
        on_white = image.astype(np.float32) / 255 * alpha + (1 - alpha)
        arrays = [np.asarray(x, np.float32)[None] for x in (on_white, cam2head, K)]
        return _encode(self._graph, self._state, self._dinov2, *arrays)[0]

    def render(
        self,
        code: Float[Array, "N D"],
        expressions: Float[np.ndarray, "E 135"],
        cam2head: Float[np.ndarray, "E 4 4"],
        K: Float[np.ndarray, "E 3 3"],
        *,
        size: int | None = None,
        background: tuple[float, float, float] = WHITE,
        source: int = MULTI_VIEW,
        progress=lambda chunks: chunks,
    ) -> Float[np.ndarray, "E size size 3"]:
        """Images of an avatar, RGB in [0, 1]: the colours of `look`, which says the rest."""
        look = self.look(
            code,
            expressions,
            cam2head,
            K,
            size=size,
            background=background,
            source=source,
            progress=progress,
        )
        return look.color

    def look(
        self,
        code: Float[Array, "N D"],
        expressions: Float[np.ndarray, "E 135"],
        cam2head: Float[np.ndarray, "E 4 4"],
        K: Float[np.ndarray, "E 3 3"],
        *,
        size: int | None = None,
        background: tuple[float, float, float] = WHITE,
        source: int = MULTI_VIEW,
        progress=lambda chunks: chunks,
    ) -> Look:
        """What is seen of an avatar: an image for each expression and its camera.

        Args:
          source: the bias sink; whole heads come from the multi-view one.
          progress: wraps the iterable of chunks, such as `tqdm`.

        Raises:
          ValueError: an expression code of another length, not a camera for each, or Gaussians that
            found no room in an image.
        """
        expressions = np.asarray(expressions, np.float32)
        if expressions.ndim != 2 or expressions.shape[1] != EXPRESSION_SIZE:
            raise ValueError(
                f"expression codes must be [E, {EXPRESSION_SIZE}] (FLAME: exp, eyes, eyelids, "
                f"neck, jaw, R, t), not {list(expressions.shape)}"
            )
        counts = len(expressions), len(cam2head), len(K)
        if len(set(counts)) > 1:
            raise ValueError(
                "there are {} expressions, {} cam2head and {} K; give one of each for every "
                "image".format(*counts)
            )
        images = []
        for start in progress(range(0, len(expressions), self._chunk)):
            part = slice(start, start + self._chunk)
            inputs = [np.asarray(x, np.float32)[part] for x in (expressions, cam2head, K)]
            count = len(inputs[0])
            inputs = [np.take(x, np.arange(self._chunk), axis=0, mode="clip") for x in inputs]
            gaussians = _decode(self._graph, self._state, code, inputs[0], source)
            # Not under jit: the rasterizer then counts the room that it needs.
            out = render(
                gaussians,
                *inputs[1:],
                jnp.broadcast_to(jnp.asarray(background, jnp.float32), (self._chunk, 3)),
                size=size or self.image_size,
                backend=self._backend,
            )
            if missing := int(jnp.sum(out.overflow[:count])):
                raise ValueError(
                    f"images {start} to {start + count - 1} lack {missing} intersections of "
                    "Gaussians with tiles, though room was counted for all; render smaller images "
                    "or try backend='xla'"
                )
            color, alpha = np.asarray(out.color)[:count], np.asarray(out.alpha)[:count]
            images.append(Look(np.clip(color, 0, 1), alpha))
        return Look(*map(np.concatenate, zip(*images, strict=True)))


def orbit_cameras(
    cam2head: Float[np.ndarray, "4 4"], frames: int
) -> Float[np.ndarray, "frames 4 4"]:
    """A camera turned once round the head's vertical axis, starting where it stands."""
    turns = [
        cameras.rigid(cameras.axis_angle(np.array([0.0, 1.0, 0.0]), angle), np.zeros(3))
        for angle in np.linspace(0, 2 * np.pi, frames, endpoint=False)
    ]
    return np.stack([turn @ cam2head for turn in turns])


@jax.jit
def _encode(graph, state, weights, image, cam2head, K):
    features = None if weights is None else dinov2.patch_features(weights, image)
    return nnx.merge(graph, state).encode(image, cam2head, K, features)


@jax.jit
def _decode(graph, state, code, expressions, source):
    source = jnp.asarray(source, jnp.int32)[None]
    gaussians = nnx.merge(graph, state).decode(code[None], expressions[None], source)
    return jax.tree.map(lambda x: x[0], gaussians)

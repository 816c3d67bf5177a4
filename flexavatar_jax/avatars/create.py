"""Creating an avatar: the first picture is encoded, then, if asked, the code is fitted to all."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from data_pipelines.files import writing
from flexavatar_jax.avatars.animator import Animator
from flexavatar_jax.avatars.avatar_file import Avatar, fingerprint, template_digest
from flexavatar_jax.avatars.fit import FitSettings, Fitted, fit
from flexavatar_jax.avatars.inputs import model_input
from flexavatar_jax.avatars.observations import Observations
from flexavatar_jax.frozen.networks import FrozenNetworks

PREVIEW_SIZE = 128
STRIP_ROWS = 4


def create_avatar(
    animator: Animator,
    person: Observations,
    settings: FitSettings | None = None,
    frozen: FrozenNetworks | None = None,
    *,
    strip: str | os.PathLike = "",
    progress: Callable[[int, float], None] = lambda steps, loss: None,
) -> Avatar:
    """Makes an avatar of a person, by the encoder alone or fitted.

    The source (the first picture) is encoded; the encoder's codes of other views, of backs of heads
    say, would only harm (docs/avatars.md). All pictures are fitted.

    Args:
      animator: of the model.
      person: what was observed of them (`observations.read_observations`).
      settings: of the fit; None: the encoder alone.
      frozen: networks of the fit's perceptual terms.
      strip: where to write a PNG of the fit's progress, if anywhere.
      progress: see `fit`.

    Raises:
      UserError: pictures or tracking that cannot be meant, or as `fit`.
    """
    seen = person.seen
    tracking = [person.expressions[seen], person.cam2heads[seen], person.Ks[seen]]
    code = animator.encode(person.images[0], person.masks[0], *(x[0] for x in tracking[1:]))
    offsets = np.zeros_like(tracking[0])
    notes: dict[str, str | int | float] = {"step": animator.loaded.step, "images": len(seen)}
    if settings is not None and settings.steps:
        pictures = zip(person.images, person.masks, strict=True)
        targets = np.stack([_on_white(*picture, animator.image_size) for picture in pictures])
        fitted = fit(
            animator.loaded,
            code,
            targets,
            *tracking,
            settings,
            frozen,
            backend=animator.backend,
            progress=progress,
        )
        if strip:
            picture = progress_strip(animator, fitted, targets, *tracking)
            with writing(strip) as unfinished:
                Image.fromarray(picture).save(unfinished, "PNG")
        code, offsets = fitted.code, fitted.offsets
        notes |= {"fit_steps": settings.steps, "fit_loss": round(float(fitted.losses[-1]), 6)}
    (preview,) = animator.frames(
        code, *(x[:1] for x in (tracking[0] + offsets, *tracking[1:])), size=PREVIEW_SIZE
    )
    return Avatar(
        name=person.name,
        code=code,
        expressions=person.expressions,
        cam2heads=person.cam2heads,
        Ks=person.Ks,
        seen=seen,
        offsets=offsets,
        preview=_to_bytes(preview),
        checkpoint=fingerprint(animator.loaded),
        template=template_digest(animator.loaded),
        notes=notes,
    )


def progress_strip(
    animator: Animator,
    fitted: Fitted,
    targets: UInt8[np.ndarray, "I s s 3"],
    expressions: Float[np.ndarray, "I 135"],
    cam2heads: Float[np.ndarray, "I 4 4"],
    Ks: Float[np.ndarray, "I 3 3"],
) -> UInt8[np.ndarray, "h w 3"]:
    """A fit's progress: a row an image (`STRIP_ROWS` at most), its target first, then in time."""
    rows = np.unique(np.linspace(0, len(targets) - 1, STRIP_ROWS).round().astype(int))
    codes = np.stack([code for _, code in fitted.snapshots])
    at_the_end = np.arange(len(codes)) == len(codes) - 1
    strip = []
    for i in rows:
        offsets = at_the_end[:, None] * fitted.offsets[i]
        images = animator.render(
            codes,
            expressions[i] + offsets,
            *(np.repeat(x[i][None], len(codes), 0) for x in (cam2heads, Ks)),
        )
        strip.append(np.concatenate([targets[i], *map(_to_bytes, images)], axis=1))
    return np.concatenate(strip)


def _on_white(image: np.ndarray, mask: np.ndarray, size: int) -> UInt8[np.ndarray, "size size 3"]:
    return _to_bytes(model_input(image, mask, size))


def _to_bytes(image: np.ndarray) -> np.ndarray:
    return np.round(image * 255).astype(np.uint8)

"""The .avatar file: one person's avatar code, and what is needed to render and to drive it.

A safetensors file whose metadata hold one JSON object. Reading one runs nothing that is in it, and
takes no more memory than the file has bytes, so that files from strangers are safe to open.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load, save

from data_pipelines.errors import UserError
from data_pipelines.files import write
from data_pipelines.frame import EXPRESSION_SIZE
from flexavatar_jax.runs.loading import LoadedModel

FORMAT_VERSION = 1
SUFFIX = ".avatar"

MAX_FILE_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
_KEY = "flexavatar"


@dataclasses.dataclass(frozen=True, eq=False)
class Avatar:
    """An avatar code, the performance it was made from, and the checkpoint that decodes it.

    T frames were tracked; I of them were seen (encoded or fitted). T is 1 for a single portrait.

    Attributes:
      name: of the person, for people.
      code: [N, D] avatar code: one token a texel of the head's UV map, row-major.
      expressions: [T, 135] expression codes of the tracked frames.
      cam2heads: [T, 4, 4] their cameras in the canonical head frame (metres, OpenCV axes).
      Ks: [T, 3, 3] their intrinsics divided by the image size.
      seen: [I] which of the T frames the avatar was made from, the first of them its source.
      offsets: [I, 135] what fitting added to the expression codes of the frames seen; zeros
        without a fit.
      preview: [h, w, 3] a small picture.
      checkpoint: fingerprint of the weights that decode `code` (`fingerprint`).
      template: digest of their head template (`template_digest`).
      notes: how it was made, for `avatar info`: strings and numbers.
      version: of the file's format.
    """

    name: str
    code: Float[np.ndarray, "N D"]
    expressions: Float[np.ndarray, "T 135"]
    cam2heads: Float[np.ndarray, "T 4 4"]
    Ks: Float[np.ndarray, "T 3 3"]
    seen: Int[np.ndarray, "I"]
    offsets: Float[np.ndarray, "I 135"]
    preview: UInt8[np.ndarray, "h w 3"]
    checkpoint: str
    template: str
    notes: dict[str, str | int | float] = dataclasses.field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def expression(self) -> Float[np.ndarray, "135"]:
        """The source's expression code, as tracked."""
        return self.expressions[self.seen[0]]

    @property
    def cam2head(self) -> Float[np.ndarray, "4 4"]:
        """The source's camera."""
        return self.cam2heads[self.seen[0]]

    @property
    def K(self) -> Float[np.ndarray, "3 3"]:
        """The source's intrinsics, divided by the image size."""
        return self.Ks[self.seen[0]]


_ARRAYS = {
    "code": ("N", "D"),
    "expressions": ("T", EXPRESSION_SIZE),
    "cam2heads": ("T", 4, 4),
    "Ks": ("T", 3, 3),
    "seen": ("I",),
    "offsets": ("I", EXPRESSION_SIZE),
    "preview": ("h", "w", 3),
}
"""Each array's shape; equal letters are equal sizes."""

_DTYPES = {"seen": np.int32, "preview": np.uint8}  # all others float32
_TEXTS = ("name", "checkpoint", "template")


def save_avatar(path: str | os.PathLike, avatar: Avatar) -> None:
    """Writes `avatar` to `path`, whole or not at all.

    Raises:
      UserError: its arrays do not fit one another, or the file cannot be written.
    """
    arrays = {
        name: np.ascontiguousarray(getattr(avatar, name), _DTYPES.get(name, np.float32))
        for name in _ARRAYS
    }
    _check(arrays, path)
    fields = {name: getattr(avatar, name) for name in (*_TEXTS, "notes", "version")}
    fields["digest"] = content_digest(arrays, fields)
    content = save(arrays, metadata={_KEY: json.dumps(fields, sort_keys=True)})
    write(path, content)


def load_avatar(path: str | os.PathLike) -> Avatar:
    """Reads an .avatar file, from whomever it comes.

    Raises:
      UserError: no such file, or it is damaged, too large, of a later format, or no avatar.
    """
    arrays, fields = _read(path)
    version = fields.get("version")
    if type(version) is not int or version < 1:
        raise UserError(f"{path} is no avatar: its format version is {_short(version)}")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} is of format {_short(version)}, and this program reads up to "
            f"{FORMAT_VERSION}; update it"
        )
    for name in _TEXTS:
        if not _is_text(fields.get(name)):
            raise UserError(f"{path} is damaged: its {name} is no text; make it again")
    notes = fields.get("notes", {})
    if not isinstance(notes, dict) or not all(
        _is_text(name) and (isinstance(value, int | float) or _is_text(value))
        for name, value in notes.items()
    ):
        raise UserError(f"{path} is damaged: its notes are no texts and numbers; make it again")
    _check(arrays, path)
    if fields.get("digest") != content_digest(arrays, fields):
        raise UserError(f"{path} is damaged: it differs from what was written; copy it again")
    texts = {name: fields[name] for name in _TEXTS}
    return Avatar(**arrays, **texts, notes=notes, version=version)


def _read(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the JSON of a file, neither checked yet."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            header = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if not 8 < size <= MAX_FILE_BYTES or header > min(size - 8, MAX_HEADER_BYTES):
                raise UserError(
                    f"{path} is no {SUFFIX} file, or a damaged one; `avatar create` makes one"
                )
            content = start + file.read(size - 8)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a {SUFFIX} file"
        ) from None
    try:
        metadata = json.loads(content[8 : 8 + header])["__metadata__"]
        fields = json.loads(metadata[_KEY])
        arrays = load(content)
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{path} is no {SUFFIX} file, or a damaged one ({type(error).__name__}); "
            "`avatar create` makes one"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is damaged: its metadata are no JSON object; make it again")
    return arrays, fields


def _check(arrays: dict[str, np.ndarray], path: str | os.PathLike) -> None:
    """Raises `UserError` unless all arrays are there, finite and of shapes that fit."""
    if set(arrays) != set(_ARRAYS):
        names = ", ".join(map(_short, sorted(set(arrays) ^ set(_ARRAYS))[: len(_ARRAYS)]))
        raise UserError(f"{path} is no avatar of this format: it lacks, or has too much, {names}")
    sizes: dict[str, int] = {}
    for name, expected in _ARRAYS.items():
        array, dtype = arrays[name], np.dtype(_DTYPES.get(name, np.float32))
        fits = array.dtype == dtype and array.ndim == len(expected) and array.size > 0
        for have, want in zip(array.shape, expected, strict=False):
            fits &= have == (sizes.setdefault(want, have) if isinstance(want, str) else want)
        if not fits:
            raise UserError(
                f"{path}: its {name} is {array.dtype} {list(array.shape)}, expected {dtype} "
                f"{[sizes.get(x, x) for x in expected]}"
            )
        if not np.isfinite(array).all():
            raise UserError(f"{path}: its {name} holds numbers that are not finite")
    if arrays["seen"].min() < 0 or arrays["seen"].max() >= len(arrays["expressions"]):
        raise UserError(f"{path}: its field seen names frames that are not in it")


def content_digest(arrays: dict[str, np.ndarray], fields: dict[str, Any]) -> str:
    """A digest of all that a file holds, to find a flipped bit by."""
    digest = hashlib.blake2b(digest_size=16)
    said = {name: value for name, value in fields.items() if name != "digest"}
    digest.update(json.dumps(said, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def fingerprint(loaded: LoadedModel) -> str:
    """A digest of a model's parameters: equal for equal weights, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    flat = nnx.to_pure_dict(nnx.state(loaded.model, nnx.Param))
    for path, value in jax.tree_util.tree_leaves_with_path(flat):
        value = np.asarray(value)
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value))
    return digest.hexdigest()


def template_digest(loaded: LoadedModel) -> str:
    """A digest of the head template to which a model's Gaussians are bound."""
    template = loaded.model.gaussians.template
    digest = hashlib.blake2b(digest_size=16)
    for array in (template.vertices, template.uvs, template.faces, template.face_uvs):
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def check_belongs(avatar: Avatar, loaded: LoadedModel, path: object, workdir: object) -> None:
    """Raises `UserError` unless the avatar was made with these very weights, as it claims."""
    if avatar.checkpoint != fingerprint(loaded) or avatar.template != template_digest(loaded):
        made = f" (made at step {avatar.notes['step']})" if "step" in avatar.notes else ""
        raise UserError(
            f"{path} belongs to another checkpoint{made} than step {loaded.step} of {workdir}; "
            "give the run and --step that it was made with, or create it again"
        )
    model = loaded.config.model
    if avatar.code.shape != (model.head_resolution**2, model.width):
        raise UserError(
            f"{path} is damaged: its code is {list(avatar.code.shape)}, and its checkpoint's are "
            f"{[model.head_resolution**2, model.width]}; create it again"
        )


def _is_text(value: object) -> bool:
    """Whether it can be shown anywhere: JSON knows strings that are no Unicode."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

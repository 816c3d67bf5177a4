"""Model and frozen networks held to reference outputs, with weights made by a rule."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from safetensors.numpy import save_file

from data_pipelines.errors import TRY_AGAIN, UserError
from data_pipelines.frame import MONOCULAR, MULTI_VIEW
from data_pipelines.media import read_image
from data_pipelines.numpy_files import from_npz
from flexavatar_jax.frozen import dinov2, hiera
from flexavatar_jax.model.encoder import plucker_map
from flexavatar_jax.published.importer import import_checkpoint
from flexavatar_jax.published.parity_rule import rule_weights
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.training.losses import dino_loss, sam_loss

GAUSSIAN_TOLERANCE = 2e-5
TOLERANCE = 5e-6
INPUTS = ("cam2flame", "K", "expr", "features")
"""Arrays of parity.npz that are no outputs."""


class Result(NamedTuple):
    """One compared output."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Case(NamedTuple):
    """Inputs and reference outputs of one salt."""

    image: np.ndarray
    model: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]


def read_case(folder: Path) -> Case:
    """Reads input.png, parity.npz and frozen_parity.npz.

    Raises `UserError` for one that is missing, damaged or without an input;
    an output that is missing is named when it is asked for.
    """
    for name in ("input.png", "parity.npz", "frozen_parity.npz"):
        if not (folder / name).is_file():
            raise UserError(
                f"no {name} in {folder}; it must hold a case's three files", status=TRY_AGAIN
            )
    pixels = read_image(folder / "input.png").astype(np.float32)[None] / 255
    model, frozen = (_Arrays(folder / name) for name in ("parity.npz", "frozen_parity.npz"))
    for name in INPUTS:
        _ = model[name]  # before the work
    return Case(pixels, model, frozen)


class _Arrays(dict):
    """The arrays of an .npz file."""

    def __init__(self, path: Path):
        try:
            super().__init__(from_npz(path.read_bytes()))
        except Exception as error:  # a damaged zip file raises errors of many kinds
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is damaged ({reason}); copy it again") from error
        self._path = path

    def __missing__(self, name: str) -> np.ndarray:
        raise UserError(f"{self._path} has no array {name}; is it a case's file?")


def check_model(published: Path, case: Case, salt: str) -> Iterator[Result]:
    """Compares the model's outputs; `published` has manifest, model_config.json and template."""
    inputs = case.model
    with tempfile.TemporaryDirectory() as folder:
        run = import_rule_model(published, Path(folder), salt)
        model = load_model(run, load_dinov2=False).model.folded()
    cam2head = jnp.asarray(inputs["cam2flame"][None], jnp.float32)
    K = jnp.asarray(inputs["K"][None], jnp.float32)
    rays = jax.jit(plucker_map, static_argnums=(2, 3))(cam2head, K, *case.image.shape[1:3])
    rays = rearrange(rays[0], "h w c -> c h w")[:, ::37, ::41]
    yield _compare("plucker_s", rays, inputs["plucker_s"], TOLERANCE)

    features = rearrange(inputs["features"], "1 b c h w -> b h w c")
    code = nnx.jit(type(model).encode)(model, case.image, cam2head, K, features)
    yield _compare("avatar_code", code[0, ::4], inputs["avatar_code"], TOLERANCE)

    decode = nnx.jit(type(model).decode)
    for suffix, source in (("3d", MULTI_VIEW), ("2d", MONOCULAR)):
        gaussians = decode(model, code, inputs["expr"], jnp.array([source]))
        for name, values in (
            ("positions", gaussians.means),
            ("scales", gaussians.scales),
            ("rotations", gaussians.quats),
            ("colors", gaussians.colors),
            ("opacities", gaussians.opacities[..., None]),
        ):
            name = f"{name}_{suffix}"
            yield _compare(name, values[0, :, ::8], inputs[name], GAUSSIAN_TOLERANCE)


def check_frozen_networks(case: Case, salt: str) -> Iterator[Result]:
    """Compares the frozen networks' outputs, read from files as Hugging Face publishes them."""
    expected, image = case.frozen, jnp.asarray(case.image)
    other = 0.8 * image + 0.1
    with tempfile.TemporaryDirectory() as folder:

        def write(shapes: dict[str, tuple[int, ...]]) -> Path:
            path = Path(folder) / "model.safetensors"
            save_file(rule_weights(shapes, salt), path)
            return path

        params = dinov2.load(write(dinov2.shapes(dinov2.BASE)), dinov2.BASE)
        small = jax.jit(dinov2.encoder_input)(image)
        name = "dinov2_reg_base_input224"
        yield _compare(name, rearrange(small, "b h w c -> b c h w"), expected[name], TOLERANCE)
        tokens = jax.jit(dinov2.patch_features)(params, image)
        name = "dinov2_reg_base_patch_tokens"
        yield _compare(name, rearrange(tokens, "b h w c -> b (h w) c"), expected[name], TOLERANCE)

        params = dinov2.load(write(dinov2.shapes(dinov2.SMALL)), dinov2.SMALL)
        states = jax.jit(dinov2.perceptual_features)(params, image[:, 4:508, 4:508])
        name = "dinov2_small_hidden_5_8_11"
        yield _compare(name, jnp.concatenate(states, axis=1)[:, ::7], expected[name], TOLERANCE)
        name = "dinov2_small_l1_of_0.8x+0.1"
        yield _compare(name, jax.jit(dino_loss)(params, image, other), expected[name], TOLERANCE)

        params = hiera.load(write(hiera.shapes()))
        embedding = jax.jit(hiera.image_embedding)(params, image)
        embedding = rearrange(embedding, "b h w c -> b c h w")[:, :, ::4, ::4]
        name = "sam2_small_image_embed_s4"
        yield _compare(name, embedding, expected[name], TOLERANCE)
        name = "sam2_small_l1_of_0.8x+0.1"
        yield _compare(name, jax.jit(sam_loss)(params, image, other), expected[name], TOLERANCE)


def import_rule_model(published: Path, folder: Path, salt: str) -> Path:
    """Writes the model with weights by the rule as it is published, and imports it.

    Args:
      published: has manifest.json, model_config.json and the template.
      folder: where the weights and the run go.
      salt: of the rule.

    Returns the run's folder; its transformers compute in float32.
    """
    manifest = json.loads((published / "manifest.json").read_text())
    weights, run = folder / "model.safetensors", folder / "run"
    save_file(rule_weights(manifest, salt), weights)
    config, template = published / "model_config.json", published / "gghead_template.obj"
    import_checkpoint(weights, config, template, run, dtype="float32")
    return run


def _compare(name: str, found: jax.Array, expected: np.ndarray, tolerance: float) -> Result:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise UserError(f"{name} must have shape {list(found.shape)}, not {list(expected.shape)}")
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    return Result(name, float(error), tolerance)

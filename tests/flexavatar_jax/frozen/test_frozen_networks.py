"""The frozen networks give what the published ones give, for weights by the rule of parity."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from configs import flex1
from flexavatar_jax.frozen import dinov2, hiera
from flexavatar_jax.frozen.networks import frozen_shapes
from flexavatar_jax.frozen.positions import resize_bicubic
from flexavatar_jax.published.parity_rule import rule_weights
from flexavatar_jax.training.flops import count
from flexavatar_jax.training.losses import dino_loss, sam_loss
from kernels import backends

TOLERANCE = 5e-6
"""Relative error, norm of the difference over norm."""


@pytest.fixture(scope="module")
def parity(shared_dir):
    return np.load(shared_dir / "flex1" / "frozen_parity.npz")


@pytest.fixture(scope="module")
def manifest(shared_dir):
    return json.loads((shared_dir / "flex1" / "frozen_manifest.json").read_text())


@pytest.fixture(scope="module")
def image(shared_dir):
    image = Image.open(shared_dir / "flex1" / "input.png").convert("RGB")
    return np.asarray(image, np.float32)[None] / 255


def error(found, expected):
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_every_tensor_that_is_read_is_published_with_that_shape(manifest):
    for name, shapes in (
        ("dinov2_with_registers_base", dinov2.shapes(dinov2.BASE)),
        ("dinov2_small", dinov2.shapes(dinov2.SMALL)),
        ("sam2_1_hiera_small_vision", hiera.shapes()),
    ):
        published = {n: tuple(shape) for n, shape in manifest[name].items()}
        # The whole SAM holds this one, its vision encoder, which the manifest lists, doesn't.
        published.setdefault("no_memory_embedding", (1, 1, 256))
        assert {n: published.get(n) for n in shapes} == shapes


def test_dinov2_base_features(parity, image):
    params = dinov2.fold(rule_weights(dinov2.shapes(dinov2.BASE)), dinov2.BASE)
    features = jax.jit(dinov2.patch_features)(params, image)
    expected = parity["dinov2_reg_base_patch_tokens"].reshape(1, 16, 16, 768)
    assert error(features, expected) < TOLERANCE


def test_dinov2_small_states_and_loss(parity, image, manifest, tmp_path):
    save_file(rule_weights(manifest["dinov2_small"]), tmp_path / "model.safetensors")
    params = dinov2.load(tmp_path, dinov2.SMALL)
    states = jax.jit(dinov2.perceptual_features)(params, image[:, 4:508, 4:508])
    expected = parity["dinov2_small_hidden_5_8_11"]
    assert error(np.concatenate(states, axis=1)[:, ::7], expected) < TOLERANCE

    loss = jax.jit(dino_loss)
    assert error(loss(params, image, 0.8 * image + 0.1), parity["dinov2_small_l1_of_0.8x+0.1"]) < (
        TOLERANCE
    )
    assert loss(params, image, image) == 0


def test_sam_embedding_and_loss(parity, image):
    params = hiera.fold(rule_weights(hiera.shapes()))
    other = 0.8 * image + 0.1

    @jax.jit
    def both(params, a, b):
        return hiera.image_embedding(params, a), sam_loss(params, a, b)

    embedding, loss = both(params, image, other)
    expected = parity["sam2_small_image_embed_s4"]
    assert error(jnp.moveaxis(embedding, -1, 1)[:, :, ::4, ::4], expected) < TOLERANCE
    assert error(loss, parity["sam2_small_l1_of_0.8x+0.1"]) < TOLERANCE


def test_bicubic_resampling_is_pytorchs():
    """Reference: torch.nn.functional.interpolate(mode="bicubic"), 5x5 to 8x8 and 3x3."""
    x = (np.arange(25.0) ** 1.5).reshape(5, 5, 1)
    plain = resize_bicubic(x, 8, antialias=False)[..., 0]
    np.testing.assert_allclose(
        plain[0], [-1.1091, -0.8412, -0.1644, 0.6855, 2.0649, 3.3633, 5.2718, 6.4829], atol=1e-4
    )
    np.testing.assert_allclose(
        resize_bicubic(x, 3, antialias=False)[1, :, 0], [32.8702, 41.5692, 50.9428], atol=1e-4
    )
    smooth = resize_bicubic(x, 8, antialias=True)[..., 0]
    np.testing.assert_allclose(
        smooth[0], [-0.8634, -0.5660, 0.0949, 1.1025, 2.3439, 3.7884, 5.6834, 6.8265], atol=1e-4
    )
    np.testing.assert_allclose(
        resize_bicubic(x, 3, antialias=True)[1, :, 0], [33.8335, 42.0886, 50.8898], atol=1e-4
    )


@pytest.mark.slow
def test_sam_loss_has_finite_gradients_all_over_the_image(image):
    params = hiera.fold(rule_weights(hiera.shapes()))
    gradient = jax.jit(jax.grad(sam_loss, argnums=1))(params, image, 0.8 * image + 0.1)
    assert np.isfinite(gradient).all()
    tiles = np.abs(gradient).reshape(16, 32, 16, 32, 3).max(axis=(1, 3, 4))
    assert (tiles > 0).all()


@pytest.mark.parametrize("name", ["dinov2_small", "sam2"])
def test_on_gpus_all_attention_is_cudnns(cudnn, monkeypatch, name):
    """In 16 bits, both ways: in DINO's scan, and in SAM in windows and globally; also where the
    network's operations, which are a CPU's, were counted before."""
    config = flex1.get_config()
    network = getattr(frozen_shapes(config), name)
    run, size = {
        "dinov2_small": (dinov2.perceptual_features, dinov2.SMALL.image_size),
        "sam2": (hiera.image_embedding, config.model.image_size),
    }[name]
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    attend, ways = jax.nn.dot_product_attention, set()

    def noted(*arrays, implementation=None, **options):
        ways.add(implementation)
        return attend(*arrays, implementation=implementation, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", noted)

    def loss(image, network):
        features = jax.tree.leaves(run(network, image))
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in features)

    assert count(run, network, image) > 0
    ways.clear()
    with backends.compiling_for("gpu"):
        traced = jax.jit(jax.grad(loss)).trace(image, network)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert ways == {"cudnn"}

"""From feature maps to Gaussians: each head's meaning, and where on the map each is read."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from small_model import rule_model, small_config, small_template

from flexavatar_jax.model.gaussians import GaussianHead

read = nnx.jit(GaussianHead.__call__)


def head():
    return GaussianHead(3, small_config(), small_template(), rngs=nnx.Rngs(0))


def features(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_gaussians_by_definition():
    """The reference samples features and reads them point by point; order and values must agree."""
    model, reference = rule_model("public")
    maps = features(16, 16, 3)
    expected = reference.gaussians(np.float64(maps))
    found = read(model.gaussians, maps)
    np.testing.assert_allclose(found.means, expected["positions"], atol=1e-6)
    np.testing.assert_allclose(found.scales, expected["scales"], rtol=1e-5)
    np.testing.assert_allclose(found.quats, expected["rotations"], atol=1e-5)
    np.testing.assert_allclose(found.colors, expected["colors"], atol=1e-5)
    np.testing.assert_allclose(found.opacities[:, None], expected["opacities"], atol=1e-6)


def test_offsets_and_scales_stay_in_their_ranges():
    gaussians = head()
    gaussians.offset.kernel[...] = jnp.eye(3) * 1e3
    gaussians.scale.kernel[...] = jnp.eye(3) * 1e3
    out = read(gaussians, np.ones((16, 16, 3), np.float32))
    rest = gaussians.points.positions
    np.testing.assert_allclose(out.means - rest, 0.1, atol=1e-6)
    np.testing.assert_allclose(out.scales, 0.01, rtol=1e-6)
    out = read(gaussians, -np.ones((16, 16, 3), np.float32))
    np.testing.assert_allclose(out.means - rest, -0.1, atol=1e-6)
    np.testing.assert_allclose(out.scales, 0, atol=1e-6)


def test_quaternions_are_unit_and_a_zero_one_has_a_gradient():
    gaussians = head()
    gaussians.rotation.bias[...] = jnp.array([3.0, 0, 0, -4])
    quats = read(gaussians, features(16, 16, 3)).quats
    np.testing.assert_allclose(quats, np.broadcast_to([0.6, 0, 0, -0.8], quats.shape), atol=1e-6)
    gaussians.rotation.bias[...] = jnp.zeros(4)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(gaussians(x).quats)))(
        jnp.array(features(16, 16, 3))
    )
    assert np.isfinite(gradient).all()


def test_any_leading_shape():
    maps = features(2, 3, 16, 16, 3)
    gaussians = head()
    together, alone = read(gaussians, maps), read(gaussians, maps[1, 2])
    assert together.opacities.shape[:2] == (2, 3)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[1, 2], b, atol=1e-6)

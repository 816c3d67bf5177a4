"""`project` and `blend`: that they are `rasterize`, and what only they give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_scenes import random_scenes

from kernels import blend, harmonics, oracle, project, rasterize

SIZE = {"width": 13, "height": 11}
capped = {**SIZE, "capacity": 256}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def batch():
    return random_scenes(5, images=6, num=12, channels=3, **SIZE)


def two_steps(scene, antialiased=False, **settings):
    *gaussians, colors, viewmats, Ks = scene
    splats = project(*gaussians, viewmats, Ks, antialiased=antialiased, **SIZE)
    return blend(splats, colors, **settings)


@pytest.mark.parametrize("how", ["eager", "jit", "grad"])
def test_rasterize_is_their_composition_to_the_bit(batch, how):
    background = np.float32([0.2, 0.5, 0.1])
    settings = {**capped, "background": background, "antialiased": True}

    def loss(function, scene):
        out = function(scene)
        return jnp.sum(out.color**2) + jnp.sum(out.alpha * out.depth)

    changes = {"eager": lambda f: f, "jit": jax.jit}
    changes["grad"] = lambda f: jax.grad(functools.partial(loss, f))
    scene = [jnp.asarray(a) for a in batch]
    once = changes[how](lambda scene: rasterize(*scene, **settings))(scene)
    twice = changes[how](lambda scene: two_steps(scene, **settings))(scene)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_scenes_with_several_views_each_are_rendered_without_copies(batch):
    """Three scenes, two views of each, one camera's intrinsics; colours or harmonics."""
    *gaussians, colors = (a[:3] for a in batch[:5])
    viewmats, K = batch.viewmats.reshape(3, 2, 4, 4), batch.Ks[0]
    together = rasterize(*gaussians, colors, viewmats, K, **capped)
    assert together.color.shape == (3, 2, 11, 13, 3)
    sh = np.random.default_rng(0).normal(size=(3, 12, 4, 3)).astype(np.float32)
    shaded = rasterize(*gaussians, None, viewmats, K, sh=sh, **capped)
    for scene, view in np.ndindex(3, 2):
        own, viewmat = [a[scene] for a in gaussians], viewmats[scene, view]
        alone = rasterize(*own, colors[scene], viewmat, K, **capped)
        np.testing.assert_allclose(together.color[scene, view], alone.color, atol=1e-5)
        paint = harmonics.shade(jnp.asarray(sh[scene]), jnp.asarray(own[0]), jnp.asarray(viewmat))
        alone = rasterize(*own, paint, viewmat, K, **capped)
        np.testing.assert_allclose(shaded.color[scene, view], alone.color, atol=1e-5)


def oracles(batch, i, **settings):
    return oracle.project(*(a[i] for a in (*batch[:4], *batch[5:])), **SIZE, **settings)


@pytest.mark.parametrize("antialiased", [False, True])
def test_splats_are_the_oracles(batch, antialiased):
    splats = project(*batch[:4], *batch[5:], antialiased=antialiased, **SIZE)
    visible = splats.visible(**SIZE)
    for i in range(len(batch.means)):
        expected = oracles(batch, i, antialiased=antialiased)
        shown = expected.opacities > 0
        drawn = expected.opacities >= 1 / 255
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
        close(splats.means[i][shown], expected.means[shown])
        close(splats.depths[i], expected.depths)
        a, b, c = np.moveaxis(np.asarray(splats.conics[i][shown]), -1, 0)
        inverse = np.linalg.inv(expected.covariances[shown])
        close(np.stack([a, b, c], -1), inverse.reshape(-1, 4)[:, [0, 1, 3]])
        variances = np.diagonal(expected.covariances, axis1=1, axis2=2)
        reach = np.log(np.where(drawn, expected.opacities, 1.0) * np.where(drawn, 255, 1.0))
        radii = np.sqrt(2 * reach)[:, None] * np.sqrt(variances)
        close(splats.radii[i], radii, atol=5e-3)
        low = np.maximum(np.ceil(expected.means - radii - 0.5), 0)
        high = np.minimum(np.floor(expected.means + radii - 0.5), [12, 10])
        np.testing.assert_array_equal(visible[i], drawn & np.all(high >= low, -1))


def test_the_chain_split_at_the_splats_gives_the_gradients_of_rasterize(batch):
    *gaussians, colors, viewmats, Ks = (jnp.asarray(a) for a in batch)

    def loss(image):
        return jnp.sum(image.color**2) + jnp.sum(image.depth)

    splats, pull = jax.vjp(lambda g: project(*g, viewmats, Ks, **SIZE), gaussians)
    d_splats = jax.grad(lambda s: loss(blend(s, colors, **capped)))(splats)
    (found,) = pull(d_splats)
    expected = jax.grad(lambda g: loss(rasterize(*g, colors, viewmats, Ks, **capped)))(gaussians)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(1.0, np.abs(b).max()))


def test_asking_for_absolute_sums_changes_no_gradient(batch):
    splats = project(*batch[:4], *batch[5:], **SIZE)

    def gradients(absgrad):
        def loss(splats):
            return jnp.sum(blend(splats, batch.colors, absgrad=absgrad, **capped).color ** 2)

        return jax.jit(jax.grad(loss))(splats)

    asked, without = gradients(jnp.zeros_like(splats.means)), gradients(None)
    assert np.abs(without.means).max() > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), asked, without)


@pytest.mark.usefixtures("any_types")
def test_what_does_not_go_with_the_splats_is_named(batch):
    splats = project(*batch[:4], *batch[5:], **SIZE)
    with pytest.raises(ValueError, match=r"colors has shape \(6, 11, 3\); expected \(6, 12, 3\)"):
        blend(splats, batch.colors[:, 1:], **capped)
    with pytest.raises(ValueError, match=r"absgrad has shape \(6, 12\); expected \(6, 12, 2\)"):
        blend(splats, batch.colors, absgrad=np.zeros((6, 12)), **capped)
    with pytest.raises(ValueError, match=r"splats.cholesky has shape .* expected \(6, 12, 3\)"):
        blend(splats._replace(cholesky=splats.means), batch.colors, **capped)
    with pytest.raises(ValueError, match="splats is a tuple; expected what `project` returns"):
        blend(tuple(splats), batch.colors, **capped)
    with pytest.raises(ValueError, match="colors is None; expected an array"):
        blend(splats, None, **capped)

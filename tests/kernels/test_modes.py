"""`rasterize` in JAX's other modes, over meshes of every kind, and at the ends of numbers."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_scenes import random_scenes

from kernels import binning, count_capacity, rasterize, rendering

SIZE = {"width": 9, "height": 9}
render = functools.partial(rasterize, **SIZE, capacity=64)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def batch():
    return random_scenes(3, images=2, num=6, channels=3, **SIZE)


def gradients(scene):
    def loss(*scene):
        out = render(*scene)
        return jnp.sum(out.color**2) + jnp.sum(out.alpha * out.depth), out

    return jax.jit(jax.grad(loss, argnums=range(len(scene)), has_aux=True))(*scene)


@pytest.fixture(scope="module")
def expected(batch):
    return gradients(batch)


@pytest.mark.parametrize(
    "mode",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.debug_nans(True),
        lambda: jax.numpy_dtype_promotion("strict"),
    ],
    ids=["x64", "debug_nans", "strict"],
)
def test_modes_of_jax_change_no_bit_and_no_type(batch, expected, mode):
    with mode():
        found = gradients([jnp.asarray(a) for a in batch])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_without_jit_all_is_as_with_it(batch):
    scene = [a[:1] for a in batch]
    small = functools.partial(rasterize, width=2, height=2, capacity=16)
    with jax.disable_jit():
        found = small(*scene)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, small(*scene))


def test_images_sharded_over_an_explicit_mesh_are_sharded_alike(batch, expected):
    mesh = jax.make_mesh((1,), ("data",))
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
    with jax.set_mesh(mesh):
        by_image = jax.NamedSharding(mesh, jax.P("data"))
        found, out = gradients([jax.device_put(a, by_image) for a in batch])
    assert jax.typeof(out.color).sharding.spec[0] == "data"
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5),
        (found, out),
        expected,
    )


def test_vmap_over_no_images_gives_none(batch):
    none = [jnp.asarray(a)[:0] for a in batch]
    assert jax.vmap(render)(*none).color.shape == (0, 9, 9, 3)
    assert count_capacity(*none[:4], *none[5:], **SIZE) >= 1


@pytest.mark.parametrize("near", [np.nan, 0.0, -1.0, np.inf, np.array([0.1, 0.2]), "1"])
@pytest.mark.usefixtures("any_types")
def test_near_planes_that_mean_nothing_are_refused(batch, near):
    with pytest.raises(ValueError, match=r"near is .*; expected a finite number over 0"):
        render(*batch, near=near)


@pytest.mark.usefixtures("any_types")
def test_a_traced_near_plane_is_refused_in_a_sentence(batch):
    with pytest.raises(ValueError, match=r"near is traced .* make it static"):
        jax.jit(lambda near: render(*batch, near=near))(0.01)


def test_a_gaussian_at_the_near_plane_is_drawn():
    K = np.diag([10.0, 10.0, 1.0])
    for z, drawn in (0.5, True), (np.nextafter(np.float32(0.5), np.float32(0)), False):
        out = rasterize(
            np.float32([[0, 0, z]]), np.float32([[1, 0, 0, 0]]), np.ones((1, 3)), np.ones(1),
            np.ones((1, 1)), np.eye(4), K, near=0.5, **SIZE, capacity=4,
        )  # fmt: skip
        assert bool(out.alpha.any()) == drawn


@pytest.mark.parametrize(
    ("field", "factor"), [("scales", 1e25), ("quats", 1e-20), ("quats", 1e20), ("quats", 1e-30)]
)
def test_numbers_at_their_ends_give_finite_gradients(batch, expected, field, factor):
    changed = batch._replace(**{field: getattr(batch, field) * np.float32(factor)})
    found, out = gradients(changed)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(found))
    if field == "quats":
        np.testing.assert_allclose(out.color, expected[1].color, atol=1e-5)


def test_capacities_that_integers_cannot_number_are_refused(batch):
    with pytest.raises(ValueError, match=r"capacity is 2147483648; expected at most"):
        rasterize(*batch, **SIZE, capacity=2**31)
    twice = [np.concatenate([a, a]) for a in batch]
    with pytest.raises(ValueError, match=r"capacity is 1073741823 for 4 images.*2\^31"):
        rasterize(*twice, **SIZE, capacity=binning.MAX_SLOTS)


def test_float64_far_from_the_origin_is_warned_of(batch):
    far = batch.means.astype(np.float64) + 1e7
    with pytest.warns(RuntimeWarning, match="rounded to float32 .* subtract the scene's centre"):
        render(far, batch.quats, batch.scales.astype(np.float64), *batch[3:])


def test_overflow_is_warned_of_once_raised_or_only_counted(batch, monkeypatch):
    monkeypatch.setattr(rendering, "_reported", set())
    cut = jax.jit(functools.partial(rasterize, **SIZE, capacity=3), static_argnames="overflow")

    def run(overflow):
        out = jax.block_until_ready(cut(*batch, overflow=overflow))
        jax.effects_barrier()
        return out

    with pytest.warns(RuntimeWarning, match=r"did not fit an image's capacity of 3 .* not drawn"):
        out = run("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = run("count")
        run("warn")
    np.testing.assert_array_equal(out.overflow, again.overflow)
    assert again.overflow.any()
    with pytest.raises(jax.errors.JaxRuntimeError, match="did not fit an image's capacity"):
        run("error")
    with pytest.raises(ValueError, match="overflow is 'ignore'; expected one of warn, error, cou"):
        run("ignore")


def test_the_capacity_that_is_counted_is_enough_and_little_more(batch):
    needed = int(rasterize(*batch, **SIZE, capacity=1, overflow="count").overflow.max()) + 1
    capacity = count_capacity(*batch[:4], *batch[5:], **SIZE)
    assert needed <= capacity <= max(1.25 * needed, needed + 255)
    assert not rasterize(*batch, **SIZE, capacity=capacity, overflow="error").overflow.any()


def test_more_intersections_than_there_is_memory_for_are_refused_with_the_cause(batch, monkeypatch):
    monkeypatch.setattr(binning, "free_memory", lambda: 1000)
    large = batch._replace(scales=100 * batch.scales, opacities=np.ones_like(batch.opacities))
    with pytest.raises(ValueError, match=r"2 image\(s\) of 6 Gaussians .* too large for the image"):
        rasterize(*large, **SIZE)

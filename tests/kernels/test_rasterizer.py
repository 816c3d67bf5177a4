"""`rasterize` itself: batches, transformations, capacity, and what it refuses."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_scenes import random_scenes

from kernels import backends, rasterize, rendering, xla
from kernels.bench import scenes
from kernels.binning import round_capacity

SIZE = {"width": 21, "height": 18}
render = functools.partial(rasterize, **SIZE, capacity=1024)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def batch():
    return random_scenes(11, images=4, num=20, channels=3, **SIZE)


@functools.partial(jax.jit, static_argnames="how")
def gradients(scene, how="plain"):
    def loss(*scene):
        function = jax.vmap(render) if how == "vmap" else render
        out = function(*scene)
        return jnp.sum(out.color**2) + jnp.sum(out.alpha * out.depth)

    return jax.grad(loss, argnums=range(len(scene)))(*scene)


def assert_all_close(a, b):
    """The same arithmetic, up to how a compiler orders it: needles' gradients lose digits."""

    def close(x, y):
        atol = 2e-5 * max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol)

    jax.tree.map(close, a, b)


def test_leading_axes_are_images(batch):
    flat = render(*batch)
    square = render(*(a.reshape(2, 2, *a.shape[1:]) for a in batch))
    assert square.color.shape == (2, 2, 18, 21, 3)
    assert square.alpha.shape == square.depth.shape == (2, 2, 18, 21)
    assert square.overflow.shape == (2, 2)
    assert_all_close(jax.tree.map(lambda s, f: s.reshape(f.shape), square, flat), flat)
    single = render(*(a[2] for a in batch))
    assert_all_close(single, jax.tree.map(lambda a: a[2], flat))


def test_shared_gaussians_are_seen_by_every_camera(batch):
    gaussians, cameras = [a[0] for a in batch[:5]], batch[5:]
    own = render(*(np.repeat(a[None], 4, axis=0) for a in gaussians), *cameras)
    assert_all_close(render(*gaussians, *cameras), own)


def test_vmap_and_grad_go_together_in_either_order(batch):
    expected = gradients(batch)
    assert_all_close(gradients(batch, how="vmap"), expected)
    assert_all_close(jax.vmap(gradients)(batch), expected)


def test_shard_map_renders_and_differentiates_what_it_is_given(batch):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    by_image, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(by_image,), out_specs=by_image)
    assert_all_close(jax.jit(sharded)(batch), gradients(batch))

    shared = batch._replace(**{name: getattr(batch, name)[0] for name in batch._fields[:5]})
    specs = shared._replace(
        **{f: by_image if f in ("viewmats", "Ks") else everywhere for f in batch._fields}
    )
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=(specs,), out_specs=tuple(specs))
    assert_all_close(jax.jit(sharded)(shared), gradients(shared))


def test_no_gaussians_leave_the_background(batch):
    none = batch._replace(**{name: getattr(batch, name)[:, :0] for name in batch._fields[:5]})
    background = np.float32([0.2, 0.4, 0.6])
    out = rasterize(*none, **SIZE, background=background)
    np.testing.assert_array_equal(out.color, np.broadcast_to(background, (4, 18, 21, 3)))
    assert not out.alpha.any()
    assert not out.depth.any()
    gradient = jax.grad(lambda b: rasterize(*none, **SIZE, background=b).color.sum())(background)
    np.testing.assert_allclose(gradient, [4 * 18 * 21] * 3)


def test_what_does_not_fit_the_capacity_is_counted_and_is_farthest_away():
    """Three Gaussians that cover all nine tiles, nearest first; there is room for two."""
    means = np.float32([[0, 0, 1], [0, 0, 2], [0, 0, 3]])
    scene = [
        means, np.tile(np.float32([1, 0, 0, 0]), (3, 1)), np.full((3, 3), 9.0),
        np.float32([0.5, 0.5, 0.5]), np.eye(3, dtype=np.float32),
        np.eye(4), np.diag([20.0, 20.0, 1.0]),
    ]  # fmt: skip
    full = rasterize(*scene, **SIZE, capacity=27)
    cut = rasterize(*scene, **SIZE, capacity=18)
    assert int(full.overflow) == 0
    assert int(cut.overflow) == 9
    assert (np.asarray(full.color) > 0.1).all()
    assert not np.asarray(cut.color)[..., 2].any()
    np.testing.assert_allclose(cut.color[..., :2], full.color[..., :2], rtol=1e-5)


def test_capacity_is_counted_outside_of_jit_also_under_grad(monkeypatch):
    asked = []
    original = rendering._blend
    monkeypatch.setattr(
        rendering, "_blend", lambda *a, **k: (asked.append(k["capacity"]), original(*a, **k))[1]
    )
    scene = scenes.sparse(num=300, size=64)
    function = functools.partial(rasterize, width=64, height=64)
    function(*scene)
    jax.grad(lambda *a: function(*a).color.sum())(*scene)
    jax.jit(function)(*scene)
    assert asked[0] == asked[1] < asked[2]


def test_capacities_are_few_and_not_much_more_than_needed():
    needed = np.arange(1, 300_000, 7)
    rounded = np.array([round_capacity(int(n)) for n in needed])
    assert (rounded >= needed).all()
    assert (rounded <= np.maximum(1.25 * needed, needed + 255)).all()
    assert len(set(rounded)) < 50


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_named(batch, bad):
    scales, Ks = batch.scales.copy(), batch.Ks.copy()
    scales[1, 2, 0] = Ks[0, 0, 0] = bad
    spoiled = batch._replace(scales=scales, Ks=Ks)
    with pytest.raises(ValueError, match="Ks and scales: NaN or infinite"):
        render(*spoiled)
    with pytest.raises(ValueError, match="Ks and scales: NaN or infinite"):
        jax.grad(lambda *a: render(*a).color.sum())(*spoiled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(quats=s.quats[..., :3]), r"quats has shape \(4, 20, 3\); expected"),
        (lambda s: s._replace(opacities=s.opacities[..., None]), "opacities has shape"),
        (lambda s: s._replace(means=s.means[:2]), r"leading shape \(2,\); expected .* \(4,\)"),
        (lambda s: s._replace(Ks=s.Ks[:2]), r"Ks has .* expected \(4, 3, 3\) or \(3, 3\)"),
        (lambda s: s._replace(viewmats=s.viewmats[0, 0]), r"viewmats must be \[\*b,4,4\]"),
    ],
)
@pytest.mark.usefixtures("any_types")
def test_shapes_that_do_not_go_together_are_named(batch, change, message):
    with pytest.raises(ValueError, match=message):
        render(*change(batch))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(width=0), "width is 0; expected integers of 1 or more"),
        (dict(width=32.0, height=-1), "width is 32.0 and height is -1; expected integers"),
        (dict(capacity=0), "capacity is 0; expected"),
        (dict(capacity=-5), "capacity is -5; expected"),
    ],
)
@pytest.mark.usefixtures("any_types")
def test_sizes_that_are_not_whole_numbers_of_one_or_more_are_named(batch, sizes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        render(*batch, **sizes)


def test_unknown_and_unavailable_backends_say_what_is_expected(batch):
    with pytest.raises(ValueError, match="backend is 'metal'; expected 'auto' or one of xla"):
        render(*batch, backend="metal")
    if jax.default_backend() == "cpu":
        with pytest.raises(ValueError, match="backend 'cuda' cannot run here: "):
            render(*batch, backend="cuda")


@pytest.mark.parametrize(
    ("capability", "missing"),
    [("9.0", False), ("10.0", False), ("8.0", False), ("7.5", True), ("gfx942", True)],
)
def test_gpus_that_are_too_old_or_not_nvidias_are_named(monkeypatch, capability, missing):
    gpu = types.SimpleNamespace(device_kind="the GPU", compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    reason = backends.missing_nvidia_gpu()
    assert reason is None or f"that of the GPU is {capability}" in reason
    assert (reason is not None) == missing


def test_auto_falls_back_and_says_so_once(monkeypatch, caplog):
    """On a GPU without the CUDA library or Pallas, xla renders, and the log says why."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        backends,
        "_load",
        lambda name: (xla.BACKEND, None) if name == "xla" else (None, f"no {name}"),
    )
    backends._choose_for.cache_clear()
    try:
        with caplog.at_level("INFO", logger="kernels.backends"):
            for _ in range(3):
                backends.choose_backend("auto")
        assert [record.getMessage() for record in caplog.records] == [
            "rasterize: backend cuda is skipped: no cuda",
            "rasterize: backend pallas_gpu is skipped: no pallas_gpu",
            "rasterize: backend xla on gpu",
        ]
    finally:
        backends._choose_for.cache_clear()

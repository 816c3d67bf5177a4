"""The CUDA backend without a GPU: its kernels' own source runs on the CPU, held to the oracle."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_scenes import (
    check_against_oracle,
    check_edges_of_capacity,
    check_gradients_behind_bright_splats,
    check_gradients_of_projected_means,
    random_scenes,
)

import kernels
from kernels import binning, blending, rasterize, rasterizer
from kernels.backends import Frame
from kernels.cuda import BACKEND, backend, build
from kernels.cuda.backend import TILE
from kernels.projection import MIN_ALPHA

SMALL = {"width": 21, "height": 18}


@pytest.fixture(scope="module")
def library():
    """The emulation, built and registered for XLA's CPU platform."""
    try:
        path = build.build(emulation=True)
    except build.BuildError as error:
        pytest.skip(f"the CUDA kernels' emulation can't be built: {error}")
    return backend.register(path, "cpu")


@pytest.fixture(scope="module", autouse=True)
def emulated(library):
    """`rasterize` runs the emulation, whatever backend it is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rasterizer, "choose_backend", lambda name: BACKEND)
        yield


def project(seed, images=3, num=30, channels=3, **size):
    """Splats and features."""
    scenes = random_scenes(seed, images, num, channels, **size)
    splats = kernels.project(*scenes[:4], *scenes[5:], **size)
    return splats, jnp.concatenate([scenes.colors, splats.depths[..., None]], -1)


@pytest.mark.parametrize(
    ("channels", "width", "height", "antialiased"),
    [(3, 21, 18, False), (1, 1, 33, True), (32, 17, 5, False)],
)
@settings(max_examples=4, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_images_and_gradients_are_the_oracles(channels, width, height, antialiased, seed):
    size = {"width": width, "height": height}
    scenes = random_scenes(seed, images=20, num=18, channels=channels, **size)
    check_against_oracle(scenes, seed, antialiased=antialiased, capacity=4000, **size)


@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_fills_the_capacity_is_drawn_and_what_is_over_it_is_counted(seed):
    check_edges_of_capacity(seed, images=11, tile=TILE, slots=90, capacity=90, **SMALL)


def test_gradients_behind_bright_splats_keep_their_digits():
    check_gradients_behind_bright_splats()


@pytest.mark.parametrize("channels", [3, 40])
def test_gradients_of_projected_means_and_their_absolute_sums_are_the_oracles(channels):
    check_gradients_of_projected_means(channels)


@pytest.mark.parametrize("num", [1, 2, 300])
def test_one_gaussian_or_hundreds(num):
    scenes = random_scenes(num, images=4, num=num, channels=3, **SMALL)
    check_against_oracle(scenes, num, capacity=8000, **SMALL)


def test_no_lane_depends_on_another_within_a_phase(library):
    """Run backwards, lane 31 first, every phase gives the same bits: there are no races."""
    scenes = random_scenes(1, images=4, num=60, channels=3, **SMALL)

    @jax.jit
    def run(scenes):
        def loss(scenes):
            out = rasterize(*scenes, capacity=4000, **SMALL)
            return jnp.sum(out.color**2) + jnp.sum(out.alpha * out.depth), out

        return jax.grad(loss, has_aux=True)(scenes)

    forwards = jax.block_until_ready(run(scenes))
    library.SplatReverseLanes(1)
    try:
        backwards = jax.block_until_ready(run(scenes))
    finally:
        library.SplatReverseLanes(0)
    jax.tree.map(np.testing.assert_array_equal, forwards, backwards)


def test_tiles_list_all_that_reaches_them_and_little_else():
    width, height, capacity = 64, 48, 20_000
    splats, features = project(3, num=60, width=width, height=height)
    _, (slots, owners, ranges, *_) = BACKEND.forward(
        splats, features, frame=Frame(width, height, capacity)
    )
    slots, owners, ranges = (np.asarray(a) for a in (slots.ravel(), owners.ravel(), ranges))
    images, num = splats.depths.shape
    across, down = 8, 6
    listed = np.zeros((images, down, across, num), bool)
    for b, row, column in np.ndindex(images, down, across):
        begin, end = ranges[b, row, column]
        image, splat = np.divmod(owners[slots[begin:end]], num)
        assert (image == b).all()
        assert (np.diff(splats.depths[b, splat]) >= 0).all()
        assert len(np.unique(splat)) == len(splat)
        listed[b, row, column, splat] = True

    def strength_per_tile(step):
        """The largest alpha of each splat in each tile, on a grid of points `step` apart."""
        x, y = (np.arange(0.5, n, step) for n in (width, height))
        x, y = x[(x - 0.5) % 8 <= 7], y[(y - 0.5) % 8 <= 7]
        d = np.stack(np.meshgrid(x, y), -1)[None, None] - splats.means[:, :, None, None]
        p, q, r = np.moveaxis(np.asarray(splats.cholesky)[..., None, None, :], -1, 0)
        sigma = ((p * d[..., 0] + q * d[..., 1]) ** 2 + (r * d[..., 1]) ** 2) / 2
        alpha = np.asarray(splats.opacities)[..., None, None] * np.exp(-sigma)
        alpha = alpha.reshape(images, num, down, len(y) // down, across, len(x) // across)
        return np.moveaxis(alpha.max((3, 5)), 1, -1)

    assert listed[strength_per_tile(1.0) >= MIN_ALPHA * 1.0001].all()
    # What is listed in vain is at most a few percent: splats that pass between pixel centres.
    assert listed[strength_per_tile(0.125) < MIN_ALPHA * 0.9].sum() <= 0.03 * listed.sum()


def test_what_does_not_fit_the_capacity_is_counted_and_is_the_farthest():
    scenes = random_scenes(10, images=1, num=40, channels=3, **SMALL)
    splats, _ = project(10, images=1, num=40, **SMALL)
    nearest = np.argsort(splats.depths[0], kind="stable")[:20]
    slots = np.prod(binning.tile_boxes(jax.tree.map(lambda a: a[0], splats), 21, 18, TILE)[1], -1)
    needed, room = slots.sum(), slots[nearest].sum()
    cut = rasterize(*scenes, capacity=int(room), **SMALL)
    assert 0 < room < needed
    assert int(cut.overflow[0]) == needed - room
    gaussians = (a[:, nearest] for a in scenes[:5])
    expected = rasterize(*gaussians, *scenes[5:], capacity=4000, **SMALL)
    np.testing.assert_array_equal(cut.color, expected.color)


def test_faint_splats_have_the_room_that_is_counted_for_them():
    """Barely drawn, and so small that most lie between pixel centres and are not counted."""
    size, num = 128, 1280
    rng = np.random.default_rng(0)
    means = np.concatenate([rng.uniform(-1, 1, (num, 2)), np.ones((num, 1))], -1)
    K = np.array([[size / 2, 0, size / 2], [0, size / 2, size / 2], [0, 0, 1]])
    out = rasterize(
        means, np.tile([1.0, 0, 0, 0], (num, 1)), np.full((num, 3), 1e-3), np.full(num, 0.0045),
        np.ones((num, 3)), np.eye(4), K, width=size, height=size,
    )  # fmt: skip
    assert int(out.overflow) == 0
    assert np.count_nonzero(out.alpha) > num / 4


@pytest.mark.parametrize("capacity", [50, 2000])
def test_an_image_is_the_same_bits_alone_in_a_batch_and_under_vmap(capacity):
    """Also where the capacity is too small: room is each image's own, counted as `binning` does."""
    inputs = project(11, images=4, num=20, **SMALL)

    @jax.jit
    def run(inputs):
        def loss(inputs):
            out = blending.composite(*inputs, backend=BACKEND, capacity=capacity, **SMALL)
            return jnp.sum(out.features**2) + jnp.sum(out.alpha), out

        return jax.grad(loss, has_aux=True)(inputs)

    together = run(inputs)
    alone = jax.tree.map(lambda a: a[:, None], inputs)
    mapped = jax.tree.map(lambda a: a[:, 0], jax.vmap(run)(alone))
    jax.tree.map(np.testing.assert_array_equal, together, mapped)
    each = [run(jax.tree.map(lambda a, i=i: a[i], alone)) for i in range(4)]
    each = jax.tree.map(lambda *parts: jnp.concatenate(parts), *each)
    jax.tree.map(np.testing.assert_array_equal, together, each)

    slots = jax.vmap(functools.partial(binning.count_slots, tile=TILE, **SMALL))(inputs[0])
    overflow = np.maximum(np.asarray(slots) - capacity, 0)
    np.testing.assert_array_equal(together[1].overflow, overflow)
    assert np.count_nonzero(overflow) == (3 if capacity == 50 else 0)


def test_gradients_flow_under_shard_map():
    scenes = random_scenes(8, images=2, num=20, channels=3, **SMALL)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    spec = jax.sharding.PartitionSpec("data")

    def gradient(scenes):
        return jax.grad(lambda s: jnp.sum(rasterize(*s, capacity=2000, **SMALL).color ** 2))(scenes)

    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec))(scenes)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, sharded, jax.jit(gradient)(scenes))


def test_too_many_intersections_for_an_int32_is_an_error_that_says_so():
    splats, features = project(9, images=3, num=2, **SMALL)
    with pytest.raises(ValueError, match=r"capacity is 1000000000 for 3 images.*2\^31"):
        BACKEND.forward(splats, features, frame=Frame(**SMALL, capacity=1_000_000_000))


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match=r"nvcc was not found.*CUDA toolkit"):
        build.build()
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler.*install g\+\+"):
        build.build(emulation=True)


def test_a_failing_compiler_leaves_no_library(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.BuildError, match=r"false .* failed"):
        build.build(emulation=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=r"file/flexavatar_jax: .*set XDG_CACHE_HOME"):
        build.build(emulation=True)


def test_without_a_gpu_the_backend_says_so():
    assert "needs an NVIDIA GPU" in BACKEND.unavailable()


@pytest.mark.slow
def test_nvcc_compiles_the_library_and_xla_lowers_to_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "GPU_ARCHITECTURES", ("sm_90",))
    try:
        build._find_nvcc()
    except build.BuildError as error:
        pytest.skip(f"the CUDA library can't be compiled: {error}")
    backend.register(build.build(), "CUDA")  # its symbols are there

    scenes = random_scenes(2, images=2, num=10, channels=40, **SMALL)
    loss = jax.jit(
        jax.grad(lambda s: rasterize(*s, capacity=500, overflow="count", **SMALL).color.sum())
    )
    text = loss.trace(scenes).lower(lowering_platforms=("cuda",)).as_text()
    # 41 features are two widths, 32 and 16.
    assert [text.count(f"@{name}(") for name in backend.TARGETS] == [1, 2, 2, 0]

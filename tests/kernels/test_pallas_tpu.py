"""The TPU backend: numerics in Pallas's TPU interpreter, and compiling ahead for real TPUs."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from random_scenes import (
    check_against_oracle,
    check_edges_of_capacity,
    check_gradients_behind_bright_splats,
    check_gradients_of_projected_means,
    random_scenes,
)

from kernels import backends, rasterize
from kernels.bench import scenes, tpu_costs
from kernels.pallas_tpu import lists as tpu_lists
from kernels.pallas_tpu import members as tpu_members
from kernels.pallas_tpu.backend import BLOCK_PIXELS
from kernels.pallas_tpu.sizes import CHUNK

SIZE = {"width": 150, "height": 20}
"""Two blocks of tiles, neither full."""
NUM = 200
"""Gaussians of a scene: two chunks."""
CAPACITY = NUM * 20


@pytest.fixture
def backend():
    """Makes pallas_tpu what "auto" picks here."""
    with backends.compiling_for("tpu"):
        yield


@pytest.fixture
def interpreter(backend):
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield


def test_images_and_gradients_are_the_oracles(interpreter):
    # Stack, needles, faint, bright and ties.
    batch = random_scenes(29, images=5, num=NUM, channels=3, **SIZE)
    check_against_oracle(batch, 0, capacity=CAPACITY, **SIZE)


@pytest.mark.slow
def test_gradients_behind_bright_splats_keep_their_digits(interpreter):
    check_gradients_behind_bright_splats()


@pytest.mark.slow
def test_gradients_of_projected_means_and_their_absolute_sums_are_the_oracles(interpreter):
    check_gradients_of_projected_means()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("channels", "antialiased", "images"), [(3, False, 40), (1, True, 18), (32, False, 12)]
)
def test_many_images_and_gradients_are_the_oracles(interpreter, channels, antialiased, images):
    size = {"width": 40, "height": 24}
    batch = random_scenes(channels, images, num=50, channels=channels, **size)
    check_against_oracle(batch, 1, antialiased=antialiased, capacity=50 * 6, **size)


@pytest.mark.slow
def test_kernels_have_no_data_races_and_the_same_bits_every_time(backend):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpret

    def loss(batch):
        out = rasterize(*batch, capacity=CAPACITY, **SIZE)
        return jnp.sum(out.color**2) + jnp.sum(out.alpha * out.depth), out

    batch = random_scenes(3, images=1, num=NUM, channels=3, **SIZE)
    pltpu.reset_tpu_interpret_mode_state()
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        run = jax.jit(jax.grad(loss, has_aux=True))
        first, second = (jax.block_until_ready(run(batch)) for _ in range(2))
    assert interpret.races is not None
    assert not interpret.races.races_found
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def random_members(rng, chunks, words):
    """Members with full, sparse and empty children; as booleans and as words."""
    odds = rng.choice([0.0, 0.02, 0.3, 1.0], size=(words, tpu_members.WORD, 1))
    members = rng.random((chunks, words, tpu_members.WORD, CHUNK)) < odds
    packed = tpu_members.pack_bits(list(jnp.moveaxis(jnp.asarray(members), 2, 0)))
    return members.reshape(chunks, -1, CHUNK), packed


def test_split_keeps_order_and_merge_is_its_transpose(interpreter):
    rng = np.random.default_rng(0)
    parents, room, children = np.array([0, 2, 2, 3]), 200, 2 * tpu_members.WORD
    members, packed = random_members(rng, chunks=4, words=2)
    splats = rng.normal(size=(4, 16, CHUNK)).astype(np.float32)
    counts = tpu_members.count_members(packed)
    how = tpu_members.plan(packed, counts, jnp.asarray(parents, jnp.int32), room)
    lists = np.asarray(jax.jit(tpu_lists.split, static_argnums=2)(splats, how, room))
    d_lists = rng.normal(size=lists.shape).astype(np.float32)
    merged = np.asarray(jax.jit(tpu_lists.merge, static_argnums=2)(d_lists, how, room))
    assert how.dropped == 0

    expected = np.zeros((3, 16, CHUNK))
    for parent in range(3):
        chunks = slice(parents[parent], parents[parent + 1])
        joined = np.concatenate([*splats[chunks], np.zeros((16, 0))], axis=-1)
        for child in range(children):
            mask = members[chunks, child].reshape(-1)
            owned = slice(*how.starts[parent * children + child :][:2])
            columns = np.concatenate([*lists[owned], np.zeros((16, 0))], axis=-1)
            np.testing.assert_array_equal(columns[:, : mask.sum()], joined[:, mask])
            assert not columns[:, mask.sum() :].any()
            pulled = np.zeros((16, mask.size))
            pulled[:, mask] = np.concatenate([*d_lists[owned], np.zeros((16, 0))], -1)[
                :, : mask.sum()
            ]
            expected[chunks] += pulled.reshape(16, -1, CHUNK).transpose(1, 0, 2)
    np.testing.assert_allclose(merged[:3], expected, atol=1e-5)


@pytest.mark.slow
def test_what_fills_the_capacity_is_drawn_and_what_is_over_it_is_counted(interpreter):
    """A capacity of 1 has a chunk for every block of tiles."""
    size = {"width": 20, "height": 18}
    check_edges_of_capacity(36, images=3, tile=BLOCK_PIXELS, slots=CHUNK, capacity=1, **size)


def test_kernels_lower_under_shard_map_that_checks_what_varies(backend):
    """Two TPUs: each an image of its own, then both an image of the same Gaussians."""
    mesh = AbstractMesh((2,), ("data",), (AxisType.Auto,))
    own = random_scenes(8, images=2, num=NUM, channels=3, **SIZE)
    shared = own._replace(**{name: getattr(own, name)[0] for name in own._fields[:5]})

    def gradient(scene):
        return jax.grad(lambda s: jnp.sum(rasterize(*s, capacity=CAPACITY, **SIZE).color ** 2))(
            scene
        )

    for scene, gaussians in (own, P("data")), (shared, P()):
        specs = scenes.Scene(*[gaussians] * 5, P("data"), P("data"))
        sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(specs,), out_specs=specs)
        text = jax.jit(sharded).trace(scene).lower(lowering_platforms=("tpu",)).as_text()
        for kernel in ("split_lists", "tile_members", "blend_tiles", "merge_lists"):
            assert f'kernel_name = "{kernel}"' in text
        assert ("stablehlo.all_reduce" in text) == (scene is shared)


def test_without_a_tpu_the_backend_says_so():
    """Whether or not libtpu is installed, which only compiles for one."""
    with pytest.raises(backends.BackendUnavailableError, match=r"it needs a TPU and .* is cpu"):
        backends.choose_backend("pallas_tpu")


def test_predictions_grow_with_the_scene():
    few, many = (scenes.sparse(1, num, 128) for num in (500, 5000))
    for small, large in zip(
        tpu_costs.predict(few, 128, 128), tpu_costs.predict(many, 128, 128), strict=True
    ):
        assert 0 < small.forward_ms < large.forward_ms < large.forward_backward_ms


@pytest.mark.parametrize("found", ["0.0.1", None])
def test_compiling_needs_the_libtpu_of_this_jax(monkeypatch, found):
    def version(package):
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(ImportError, match=r"libtpu.*pip install 'jax\[tpu\]'"):
        tpu_costs.compile_ahead("v5e", 1)


def run_with_libtpu(program: str, **options) -> str:
    """The last line that a program prints, in a process of its own that libtpu stays in."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jax[tpu]' compiles for TPUs without one")
    program = "import json, sys; options = json.loads(sys.argv[1])\n" + program
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(options)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def compiled_bytes(**options) -> int:
    """Memory that `tpu_costs.compile_ahead` says is needed."""
    program = """
from kernels.bench import tpu_costs
memory = tpu_costs.compile_ahead(**options).memory_analysis()
print(memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes)
"""
    return int(run_with_libtpu(program, **options))


@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("--chip=v5e", 2)])
def test_the_command_looks_at_its_arguments_before_it_compiles(option, status, capsys):
    with pytest.raises(SystemExit, match=str(status)):
        tpu_costs.main([option])
    assert "usage: python -m kernels.tpu_costs" in "".join(capsys.readouterr())


@pytest.mark.slow
@pytest.mark.parametrize("chip", tpu_costs.CHIPS)
def test_batches_with_harmonics_compile_ahead(chip):
    assert compiled_bytes(chip=chip, images=100, sh_degree=3) < tpu_costs.CHIPS[chip].memory


@pytest.mark.slow
def test_images_mapped_over_a_mesh_compile_ahead():
    assert compiled_bytes(chip="v5e", images=1, devices=4) < tpu_costs.CHIPS["v5e"].memory


@pytest.mark.slow
def test_absolute_gradients_compile_ahead():
    program = """
import jax, jax.numpy as jnp
from kernels import backends, blend
from kernels.bench import tpu_costs
from kernels.projection import Splats

def loss(means, cholesky, opacities, depths, colors, absgrad):
    splats = Splats(means, cholesky, opacities, depths)
    size = {"width": 128, "height": 128}
    return blend(splats, colors, absgrad=absgrad, overflow="count", **size).color.sum()

rows = [(2,), (3,), (), (), (3,), (2,)]
device = tpu_costs.topology_devices("v5e:2x2")[0]
place = jax.sharding.SingleDeviceSharding(device)
inputs = [jax.ShapeDtypeStruct((1000, *row), jnp.float32, sharding=place) for row in rows]
with backends.compiling_for("tpu"):
    lowered = jax.jit(jax.grad(loss, argnums=5)).lower(*inputs)
print(lowered.compile().as_text().count("blend_tiles_backward"))
"""
    assert int(run_with_libtpu(program)) > 0

"""What the `pallas_tpu` backend costs on TPUs that aren't here: counted, compiled for, predicted.

`predict` counts the bytes and operations of a scene's kernels and divides them by a chip's
published rates: a bound from below on time, not a measurement. `compile_ahead` compiles a whole
`rasterize` for a chip with PyPI's `libtpu`, which needs no TPU, and fails where it doesn't fit the
chip's memory. `python -m kernels.tpu_costs` prints both for the avatar scene.

XLA's own cost analysis doesn't look into custom calls, so the kernels are counted here, by hand,
from the shapes in `pallas_tpu.lists` and `pallas_tpu.composite`.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from importlib import metadata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from packaging.requirements import Requirement
from tqdm import tqdm

from kernels import backends, binning, rasterizer
from kernels.bench import scenes
from kernels.bench.scenes import Scene
from kernels.hardware import CHIPS, Chip
from kernels.harmonics import SIZES
from kernels.pallas_tpu.backend import BLOCK_PIXELS
from kernels.pallas_tpu.lists import GROUP
from kernels.pallas_tpu.sizes import CHUNK, GEOMETRY, PIXELS, TILE, TILES
from kernels.platforms import look_for_no_absent_tpu

# Vector operations, as libtpu 0.0.52 schedules the kernels for v5e.
FORWARD_OPS = 46
"""For a splat at a pixel, forward."""
BACKWARD_OPS = 86
"""For a splat at a pixel, backward."""
TEST_OPS = 50
"""For a splat and a tile of its block, whether one reaches the other: 42 by the kernel's source,
and some for the reductions."""
MATRIX_OPS = 3
"""For an element of a 0-1 matrix: compare, select, convert."""
SORT_OPS = 10
"""For an element in one stage of the sorting network by depth."""


class Work(NamedTuple):
    """Bytes to and from HBM, and operations of the matrix and of the vector unit."""

    bytes: float
    bfloat16: float
    float32: float

    def seconds(self, chip: Chip) -> float:
        """Time if only the slowest of the three counted, at the chip's published rates."""
        return max(
            self.bytes / chip.bandwidth,
            self.bfloat16 / chip.bfloat16,
            self.float32 / chip.float32,
        )


class Lists(NamedTuple):
    """Chunks that an image's splats make, on average over the images of a scene."""

    image: float
    blocks: float
    tiles: float
    intersections: float


class Prediction(NamedTuple):
    """Predicted, not measured: a bound from below."""

    chip: str
    forward_ms: float
    forward_backward_ms: float
    bytes: float
    """HBM bytes of forward and backward pass, all images."""
    operations: float
    """Operations of both units of forward and backward pass, all images."""


def predict(scene: Scene, width: int, height: int) -> list[Prediction]:
    """Predicted times of a scene's images, one image after another, for each of `CHIPS`."""
    images = len(scene.viewmats)
    num, channels = scene.colors.shape[-2:]
    lists = count_lists(scene, width, height)
    kernels_forward, kernels_backward = count_kernels(lists, channels, width, height)
    outside_forward, outside_backward = count_outside(num, channels)
    forward = [*outside_forward, *kernels_forward]
    both = [*forward, *kernels_backward, *outside_backward]
    return [
        Prediction(
            name,
            1e3 * images * sum(work.seconds(chip) for work in forward),
            1e3 * images * sum(work.seconds(chip) for work in both),
            images * sum(work.bytes for work in both),
            images * sum(work.bfloat16 + work.float32 for work in both),
        )
        for name, chip in CHIPS.items()
    ]


def predict_kernels(scene: Scene, width: int, height: int, chip: str) -> float:
    """Seconds of the Pallas kernels alone, forward and backward, for a scene's images."""
    lists = count_lists(scene, width, height)
    forward, backward = count_kernels(lists, scene.colors.shape[-1], width, height)
    image = sum(work.seconds(CHIPS[chip]) for work in [*forward, *backward])
    return len(scene.viewmats) * image


def count_lists(scene: Scene, width: int, height: int) -> Lists:
    """Count the chunks of a scene's lists, on whatever device JAX has."""
    own = scene.means.ndim == 3
    lists = []
    for image in range(len(scene.viewmats)):
        gaussians = [a[image] if own else a for a in scene[:4]]
        size = {"width": width, "height": height}
        splats, per_block = _count_blocks(
            *gaussians, scene.viewmats[image], scene.Ks[image], **size
        )
        per_tile = binning.count_intersections(splats, tile=(TILE, TILE), **size)
        chunks = [-(-np.asarray(counts) // CHUNK) for counts in (per_block, per_tile)]
        in_image = -(-gaussians[0].shape[0] // CHUNK)
        lists.append([in_image, chunks[0].sum(), chunks[1].sum(), np.sum(per_tile)])
    return Lists(*np.mean(lists, axis=0).tolist())


@functools.partial(jax.jit, static_argnames=("width", "height"))
def _count_blocks(*scene, width, height):
    """The splats of one image, and how many bounding boxes touch each block."""
    splats = rasterizer.project(*scene, width=width, height=height)
    blocks = binning.grid(width, height, BLOCK_PIXELS)
    first, counts, _ = binning.tile_boxes(splats, width, height, BLOCK_PIXELS)
    block = jnp.stack(jnp.meshgrid(*map(jnp.arange, blocks), indexing="ij"), -1).reshape(-1, 1, 2)
    inside = jnp.all((block >= first) & (block < first + counts), axis=-1)
    return splats, jnp.sum(inside, axis=1)


def count_outside(num: int, channels: int) -> tuple[list[Work], list[Work]]:
    """Work for one image outside of the kernels: projection and the sort by depth.

    The steps of the forward pass and those of the backward pass.
    """
    _, rows = _rows(channels)

    def project(passes: int) -> Work:
        # Projection reads the Gaussians and writes splats; the chunks are gathered from these.
        return Work(passes * 4 * num * (11 + channels + 3 * rows), 0, passes * 200 * num)

    stages = np.log2(max(num, 2)) * (np.log2(max(num, 2)) + 1) / 2
    sort = Work(4 * 4 * num, 0, SORT_OPS * num * stages)
    return [project(1), sort], [project(2)]


def count_kernels(
    lists: Lists, channels: int, width: int, height: int
) -> tuple[list[Work], list[Work]]:
    """Work of the kernels for one image: of the forward pass and of the backward pass.

    Every chunk counts as blended, also those behind opaque ones, which the kernels skip.
    """
    features, rows = _rows(channels)
    pixels = width * height
    chunk_bytes = 4 * rows * CHUNK

    def make_lists(inputs: float, outputs: float, children: float) -> Work:
        # A chunk meets all children of its parent, GROUP at a time; a product by a 0-1 matrix each.
        groups = inputs * np.ceil(children / GROUP)
        matrices = (groups * GROUP + outputs) * CHUNK * CHUNK
        return Work(
            chunk_bytes * (inputs + outputs) + 4 * inputs * (CHUNK + 2 * children),
            2 * 3 * rows * matrices,
            MATRIX_OPS * matrices,
        )

    blocks = math.prod(binning.grid(width, height, BLOCK_PIXELS))
    tests = lists.blocks * CHUNK * TILES
    members = Work(4 * lists.blocks * ((GEOMETRY + 1) * CHUNK + TILES), 2 * tests, TEST_OPS * tests)
    both_lists = [
        make_lists(lists.image, lists.blocks, blocks),
        members,
        make_lists(lists.blocks, lists.tiles, TILES),
    ]

    pairs = lists.tiles * CHUNK * PIXELS
    sums = 3 * CHUNK  # A running sum: three bfloat16 parts by a triangle.
    forward = Work(
        chunk_bytes * lists.tiles + 4 * pixels * (features + 2),
        2 * pairs * (24 + sums + 9 * features),
        FORWARD_OPS * pairs,
    )
    backward = Work(
        2 * chunk_bytes * lists.tiles + 4 * pixels * (features + 2),
        2 * pairs * (24 + 2 * sums + 6 * features + 9 * features + 24),
        BACKWARD_OPS * pairs,
    )
    merging = [both_lists[0], both_lists[-1]]  # the transpose of splitting
    return [*both_lists, forward], [*both_lists, backward, *merging]


def _rows(channels: int) -> tuple[int, int]:
    """Rows of a chunk: those of features (colour and depth, in whole registers), and all."""
    features = -(-(channels + 2) // 8) * 8
    return features, GEOMETRY + features


def compile_ahead(
    chip: str,
    images: int,
    *,
    num: int = 58_361,
    size: int = 512,
    channels: int = 3,
    sh_degree: int | None = None,
    devices: int = 1,
    gradient: bool = True,
    capacity: int | None = None,
) -> jax.stages.Compiled:
    """Compile rendering `images` images of `num` Gaussians each for a TPU that isn't here.

    Args:
      chip: one of `hardware.CHIPS`.
      images: on each device.
      sh_degree: with spherical harmonics of this degree in place of colours.
      devices: with more than one, images are mapped over a mesh of them by `jax.shard_map`.
      gradient: compile the gradient of a loss in every input, forward pass included.

    Raises:
      ImportError: the libtpu that goes with this JAX isn't installed.
      jax.errors.JaxRuntimeError: it doesn't compile, or doesn't fit the chip's memory.
    """
    slice_ = topology_devices(CHIPS[chip].topology)
    mesh = jax.sharding.Mesh(np.array(slice_[:devices]), ("data",))
    by_image = jax.sharding.PartitionSpec("data")
    batch = images * devices
    paint = () if sh_degree is None else (SIZES[sh_degree],)
    shapes = [(num, 3), (num, 4), (num, 3), (num,), (num, *paint, channels), (4, 4), (3, 3)]
    sharding = jax.sharding.NamedSharding(mesh, by_image)
    inputs = [jax.ShapeDtypeStruct((batch, *s), jnp.float32, sharding=sharding) for s in shapes]

    def render(*inputs):
        *gaussians, painted, viewmats, Ks = inputs
        colors, sh = (painted, None) if sh_degree is None else (None, painted)
        return rasterizer.rasterize(
            *gaussians,
            colors,
            viewmats,
            Ks,
            sh=sh,
            width=size,
            height=size,
            backend="pallas_tpu",
            capacity=capacity,
            overflow="count",
        )

    if devices > 1:
        render = jax.shard_map(render, mesh=mesh, in_specs=by_image, out_specs=by_image)

    def loss(*inputs):
        out = render(*inputs)
        return jnp.sum(out.color**2) + jnp.sum(out.alpha**2) + jnp.sum(out.depth**2)

    function = jax.grad(loss, argnums=tuple(range(len(inputs)))) if gradient else render
    with backends.compiling_for("tpu"):
        lowered = jax.jit(function).lower(*inputs)
    return lowered.compile()


def topology_devices(topology: str) -> list[jax.Device]:
    """Devices of a TPU topology, such as "v5e:4x4", that isn't here: to compile for.

    Raises:
      ImportError: the libtpu that goes with this JAX isn't installed.
      jax.errors.JaxRuntimeError, ValueError: libtpu knows no such topology.
    """
    from jax.experimental import topologies

    check_libtpu()
    chip = topology.split(":")[0]
    # There is no TPU here to ask.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{chip}-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A v4's two cores are one device, as JAX has it on a real one.
    options = {"chip_config_name": "megacore"} if chip == "v4" else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def check_libtpu() -> None:
    """Holds libtpu to the version that this JAX was released with.

    What another one compiles, JAX may not be able to read.

    Raises:
      ImportError: it is not installed, or another version.
    """
    how = "install the one of this JAX: pip install 'jax[tpu]'"
    required = {r.name: r.specifier for r in map(Requirement, metadata.requires("jax"))}
    wanted = required["libtpu"]
    try:
        found = metadata.version("libtpu")
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"compiling for TPUs needs libtpu; {how}") from error
    if not wanted.contains(found):
        raise ImportError(
            f"JAX {jax.__version__} compiles for TPUs with libtpu{wanted}, not {found}; {how}"
        )


def main(argv: list[str] | None = None) -> None:
    """Print predictions, and what compiling for each chip says, for images of the avatar scene."""
    look_for_no_absent_tpu()
    argparse.ArgumentParser(
        prog="python -m kernels.tpu_costs", description=__doc__.split("\n", 1)[0]
    ).parse_args(argv)
    scene = scenes.avatar(images=1)
    print("predicted from published rates, milliseconds an image (58,361 Gaussians, 512x512)")
    for line in predict(scene, 512, 512):
        print(
            f"{line.chip:>4}  forward {line.forward_ms:.2f}  "
            f"forward+backward {line.forward_backward_ms:.2f}"
        )
    print("compiled ahead, forward+backward")
    batches = [(chip, images) for chip in CHIPS for images in (1, 16, 100)]
    for chip, images in tqdm(batches, unit="compilation"):
        compiled = compile_ahead(chip, images)
        memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
        temporary, arguments = (
            size / 2**20 for size in (memory.temp_size_in_bytes, memory.argument_size_in_bytes)
        )
        tqdm.write(
            f"{chip:>4}  {images:3} images  temporary {temporary:.0f} MiB, "
            f"arguments {arguments:.0f} MiB; outside of the kernels "
            f"{cost['flops']:.3g} operations, {cost['bytes accessed']:.3g} bytes"
        )

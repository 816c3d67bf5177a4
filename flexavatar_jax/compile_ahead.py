"""Compiles the training step for TPUs nobody has rented yet, and says how it would run on them.

    python -m flexavatar_jax.compile_ahead --config configs/flex1.py --topology v5e:16x16 \\
        --config.batch=256

runs the real TPU compiler (`pip install "jax[tpu]"`, no TPU needed) on the whole step of
`train_step.py`, frozen networks and Pallas kernels included, for every chip of the topology. What
doesn't fit a chip's memory fails here, not on the pod. Memory, collectives and cycles are the
compiler's; it puts no cycles to collectives and Pallas kernels, whose times follow from published
rates. A prediction, not a measurement.
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from flexavatar_jax import cli
from flexavatar_jax.frozen.networks import frozen_shapes
from flexavatar_jax.model.head_template import load_template
from flexavatar_jax.planning.hlo import Collective, collectives, estimated_cycles
from flexavatar_jax.training.config_check import check_config
from flexavatar_jax.training.flops import StepFlops, step_flops
from flexavatar_jax.training.sharding import batch_sharding, make_mesh, replicated
from flexavatar_jax.training.train_step import SCOPES, TrainProgram
from kernels import rasterizer
from kernels.bench import scenes, tpu_costs
from kernels.hardware import CHIPS

NAMES = "v4:2x2x1, v4:4x4x4, v5e:4x4, v5e:16x16, v5p:2x2x1, v5p:4x4x4, v6e:4x4, v6e:16x16"


class Memory(NamedTuple):
    """Bytes of a chip's HBM that the compiled step takes."""

    state: int
    """Parameters, optimiser state, frozen networks and the batch."""
    temporary: int
    program: int
    """The step's own machine code: hundreds of megabytes."""
    limit: int

    @property
    def total(self) -> int:
        return self.state + self.temporary + self.program

    @property
    def fits(self) -> bool:
        return self.total <= self.limit


def chip_name(topology: str) -> str:
    """Which of `hardware.CHIPS` a topology such as "v5e:16x16" is made of."""
    return topology.split(":")[0]


class OutOfMemoryError(ValueError):
    """The step does not fit a chip."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling told about a step on a topology."""

    topology: str
    chips: int
    batch: int
    memory: Memory
    flops: StepFlops
    """An example's."""
    collectives: list[Collective]
    seconds: dict[str, float]
    """Predicted for each part of a step, as if one followed the other."""

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def utilisation(self) -> float:
        """Model FLOPs utilisation (MFU)."""
        peak = self.chips * CHIPS[chip_name(self.topology)].bfloat16
        return self.flops.total * self.batch / self.step_seconds / peak

    @property
    def interconnect_bytes(self) -> float:
        """Bytes a chip sends in a step."""
        return sum(c.sent for c in self.collectives)


def topology_mesh(config: ConfigDict, topology: str) -> Mesh:
    """The mesh that `config.mesh` asks for, over the devices of a TPU topology that isn't here.

    Raises:
      ImportError: the libtpu that goes with this JAX isn't installed.
      ValueError: libtpu knows no such topology.
    """
    if chip_name(topology) not in CHIPS:
        raise ValueError(f"--topology {topology} is not known; give one like {NAMES}")
    try:
        devices = tpu_costs.topology_devices(topology)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"--topology {topology} is not known to libtpu ({reason}); give one like {NAMES}"
        ) from error
    return make_mesh(**config.mesh, devices=devices)


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch as `data_pipelines.mixture.make_iterator` gives it, laid out on `mesh`."""
    size, targets = config.data.image_size, config.data.targets
    f32, i32, u8 = jnp.float32, jnp.int32, jnp.uint8
    shapes = {
        "input_image": ((size, size, 3), u8),
        "input_mask": ((size, size), u8),
        "input_cam2head": ((4, 4), f32),
        "input_K": ((3, 3), f32),
        "target_image": ((targets, size, size, 3), u8),
        "target_mask": ((targets, size, size), u8),
        "target_cam2head": ((targets, 4, 4), f32),
        "target_K": ((targets, 3, 3), f32),
        "target_expression": ((targets, config.model.expression_size), f32),
        "background": ((3,), f32),
        "jitter": ((5,), f32),
        "source": ((), i32),
        "example": ((2 + targets,), i32),
        "bad_records": ((), i32),
    }
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((config.batch, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def compile_ahead(config: ConfigDict, topology: str, *, perceptual: bool) -> Report:
    """Compiles the training step of `config` for `topology`.

    Args:
      config: an experiment's.
      topology: such as "v5e:16x16".
      perceptual: compile the step with DINO and SAM in the loss.

    Raises:
      ImportError: the libtpu that goes with this JAX isn't installed.
      ValueError: an unknown topology, a batch that the mesh cannot split, or a rasterizer that is
        not for TPUs.
      OutOfMemoryError: the step does not fit a chip; says by how much and what to change.
    """
    mesh = topology_mesh(config, topology)
    program = TrainProgram.create(config, mesh, load_template(config.model.template))
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        frozen_shapes(config),
    )
    batch = abstract_batch(config, mesh)
    step = program.jitted_step(perceptual=perceptual)
    with rasterizer.compiling_for("tpu"):
        step = step.lower(program.abstract_state, frozen, batch)
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as error:
        if "hbm" not in str(error) or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(_does_not_fit(str(error), config, topology, mesh)) from error
    analysis = compiled.memory_analysis()
    flops = step_flops(
        config, program.model(program.abstract_state.params), frozen, perceptual=perceptual
    )
    hlo = compiled.as_text()
    moved = collectives(hlo)
    return Report(
        topology=topology,
        chips=mesh.size,
        batch=config.batch,
        memory=Memory(
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes,
            analysis.temp_size_in_bytes,
            analysis.generated_code_size_in_bytes,
            CHIPS[chip_name(topology)].memory,
        ),
        flops=flops,
        collectives=moved,
        seconds=predict(config, chip_name(topology), mesh, hlo, moved),
    )


def predict(
    config: ConfigDict, chip: str, mesh: Mesh, hlo: str, moved: list[Collective]
) -> dict[str, float]:
    """Seconds of each part of a compiled step on one of `hardware.CHIPS`.

    The compiler's cycles at the chip's clock; for rendering, the Pallas kernels as `tpu_costs`
    counts them for the avatar scene come on top; collectives go over one link, none of them hidden
    behind computation.
    """
    cycles = estimated_cycles(hlo, SCOPES)
    seconds = {part: count / CHIPS[chip].clock for part, count in cycles.items()}
    size = config.data.image_size
    # Devices along the tensor axis render the same images.
    images = config.batch * config.data.targets / (mesh.shape["data"] * mesh.shape["fsdp"])
    kernels = tpu_costs.predict_kernels(scenes.avatar(images=1), size, size, chip)
    seconds["rasterizer"] += images * kernels
    return seconds | {"interconnect": sum(c.sent for c in moved) / CHIPS[chip].link}


def _does_not_fit(error: str, config: ConfigDict, topology: str, mesh: Mesh) -> str:
    """The compiler's finding in a sentence, and what to change, cheapest first."""
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", error)
    used = f"{found[1]} of {found[2]}" if found else "more memory than there is"
    local = config.batch // (mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate)
    changes = []
    if not config.model.remat:
        changes.append("--config.model.remat")
    if local > 1:
        changes.append(f"--config.accumulate={config.accumulate * local}")
    if mesh.shape["fsdp"] < mesh.size:
        changes.append(f"--config.mesh.data=1 --config.mesh.fsdp={mesh.size}")
    changes.append("a chip with more memory (v6e: 32 GiB, v5p: 95 GiB)")
    return (
        f"the step does not fit a chip of {topology}: it takes {used} at {local} examples a chip "
        f"and micro-batch; try {', then '.join(changes)}"
    )


def describe(report: Report) -> str:
    """The report as a few lines for a terminal."""
    r, gib = report, 2**30
    total = r.flops.total * r.batch
    kinds: dict[str, list[float]] = {}
    for c in r.collectives:
        kinds.setdefault(f"{c.kind} over {c.group} chips", []).append(c.sent)
    lines = [
        f"{r.topology}: {r.chips} chips, batch {r.batch} ({r.batch / r.chips:g} a chip)",
        f"memory a chip     {r.memory.total / gib:.2f} of {r.memory.limit / gib:.0f} GiB (state "
        f"and batch {r.memory.state / gib:.2f}, temporary {r.memory.temporary / gib:.2f}, program "
        f"{r.memory.program / gib:.2f})",
        f"operations        {total / 1e12:.3g} TFLOP a step, {r.flops.total / 1e12:.3g} an example "
        f"(encoder {r.flops.encoder / 1e12:.3g}, decoder {r.flops.decoder / 1e12:.3g}, frozen "
        f"networks {(r.flops.features + r.flops.perceptual) / 1e12:.3g})",
        f"interconnect      {r.interconnect_bytes / gib:.2f} GiB sent a chip and step",
        *(
            f"                  {len(sizes):4} x {kind}: {sum(sizes) / gib:.3f} GiB"
            for kind, sizes in sorted(kinds.items())
        ),
        f"predicted step    {r.step_seconds * 1e3:.3g} ms: "
        + ", ".join(f"{name} {time * 1e3:.3g}" for name, time in r.seconds.items()),
        f"predicted rate    {r.batch / r.step_seconds:.0f} examples/s on the {r.chips} chips, "
        f"{100 * r.utilisation:.0f}% of their peak (MFU)",
        "predicted by the compiler's cycles, kernels and interconnect from published rates; "
        "nothing was run",
    ]
    return "\n".join(lines)


def main() -> None:
    # TPUs are compiled for, never used; without this JAX would look for them.
    jax.config.update("jax_platforms", "cpu")
    config = FLAGS.config
    check_config(config)
    mesh = topology_mesh(config, FLAGS.topology)
    shards = mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate
    if config.batch % shards:
        batch = -(-config.batch // shards) * shards
        print(f"config.batch {config.batch} does not split over {shards} shards; taken as {batch}")
        config.batch = batch
    perceptual = FLAGS.perceptual and bool(config.loss.dino or config.loss.sam)
    what = "with DINO and SAM losses" if perceptual else "with L1 and SSIM losses"
    print(f"compiling the training step {what} for {mesh.size} chips ...", flush=True)
    print(describe(compile_ahead(config, FLAGS.topology, perceptual=perceptual)))


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("topology", None, f"The TPU slice: {NAMES}, ...")
    flags.DEFINE_bool(
        "perceptual", True, "The step from config.loss.perceptual_start on, not the one before."
    )
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main)

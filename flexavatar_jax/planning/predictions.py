"""What the training step costs on a TPU topology that isn't here: compiled for, counted, predicted.

Memory, collectives and cycles are the compiler's. It puts no cycles to Pallas kernels, which are
counted in the schedules that it makes of them (`schedules`), nor to collectives, whose times follow
from published rates. A prediction, not a measurement.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data_pipelines.errors import UserError
from flexavatar_jax.frozen import block_costs
from flexavatar_jax.model import attention_tpu, norm_tpu, upsampler_tpu
from flexavatar_jax.planning.hlo import Collective, Kernel, collectives, estimated_cycles, kernels
from flexavatar_jax.planning.schedules import kernel_cycles
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.training import ssim_tpu
from flexavatar_jax.training.compilation import abstract_batch, abstract_frozen, savings
from flexavatar_jax.training.flops import StepFlops, step_flops
from flexavatar_jax.training.sharding import make_mesh
from flexavatar_jax.training.train_step import SCOPES, TrainProgram
from kernels import backends
from kernels.bench import scenes, tpu_costs
from kernels.hardware import CHIPS

NAMES = "v4:2x2x1, v4:4x4x4, v5e:4x4, v5e:16x16, v5p:2x2x1, v5p:4x4x4, v6e:4x4, v6e:16x16"


VECTOR_OPS = {
    **attention_tpu.VECTOR_OPS,
    **block_costs.VECTOR_OPS,
    **norm_tpu.VECTOR_OPS,
    **ssim_tpu.VECTOR_OPS,
    **upsampler_tpu.VECTOR_OPS,
}
"""Vector operations of each Pallas kernel, for one of what its cost estimate has as
transcendentals."""


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


class OutOfMemoryError(UserError):
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
    unscheduled: list[str]
    """Kernels, by their names, that published rates predict as their schedule isn't known."""

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
      UserError: the libtpu that goes with this JAX isn't installed, or knows no such topology.
    """
    if chip_name(topology) not in CHIPS:
        raise UserError(f"--topology {topology} is not known; give one like {NAMES}")
    try:
        devices = tpu_costs.topology_devices(topology)
    except ImportError as error:
        raise UserError(str(error)) from error
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology {topology} is not known to libtpu ({reason}); give one like {NAMES}"
        ) from error
    return make_mesh(**config.mesh, devices=devices)


def predict_step(
    config: ConfigDict,
    topology: str,
    *,
    perceptual: bool,
    schedules: str | os.PathLike[str] | None = None,
) -> Report:
    """Compiles the training step of `config` for `topology`.

    Args:
      config: an experiment's.
      topology: such as "v5e:16x16".
      perceptual: compile the step with DINO and SAM in the loss.
      schedules: where libtpu writes them (`schedules.write_schedules`).

    Raises:
      UserError: the libtpu that goes with this JAX isn't installed.
      UserError: an unknown topology, a batch that the mesh cannot split, or a rasterizer that is
        not for TPUs.
      OutOfMemoryError: the step does not fit a chip; says by how much and what to change.
    """
    mesh = topology_mesh(config, topology)
    program = TrainProgram.create(config, mesh, load_template(config.model.template))
    frozen = abstract_frozen(config, mesh)
    batch = abstract_batch(config, mesh)
    step = program.jitted_step(perceptual=perceptual)
    with backends.compiling_for("tpu"):
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
    found = kernels(hlo)
    cycles = _scheduled(found, kernel_cycles(schedules)) if schedules else {}
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
        seconds=predict(config, chip_name(topology), mesh, hlo, moved, found, cycles),
        unscheduled=sorted({_own_name(k) for k in found if k.name not in cycles}),
    )


def predict(
    config: ConfigDict,
    chip: str,
    mesh: Mesh,
    hlo: str,
    moved: list[Collective],
    found: list[Kernel],
    scheduled: Mapping[str, int],
) -> dict[str, float]:
    """Seconds of each part of a compiled step on one of `hardware.CHIPS`.

    The compiler's cycles at the chip's clock. Pallas kernels come on top: those of rendering as
    `tpu_costs` counts them for the avatar scene, as their loops follow the data; others by the
    cycles of their schedules, or as they say themselves. Collectives go over one link, none of them
    hidden behind computation.
    """
    cycles = estimated_cycles(hlo, SCOPES)
    seconds = {part: count / CHIPS[chip].clock for part, count in cycles.items()}
    size = config.model.image_size
    # Devices along the tensor axis render the same images.
    images = config.batch * config.data.targets / (mesh.shape["data"] * mesh.shape["fsdp"])
    rendering = tpu_costs.predict_kernels(scenes.avatar(images=1), size, size, chip)
    seconds["rasterizer"] += images * rendering
    for kernel in found:
        part = next((scope for scope in SCOPES if scope in kernel.operation), "other")
        seconds[part] += kernel.runs * kernel_seconds(kernel, chip, scheduled.get(kernel.name))
    return seconds | {"interconnect": sum(c.sent for c in moved) / CHIPS[chip].link}


def _scheduled(found: list[Kernel], cycles: dict[str, int]) -> dict[str, int]:
    """Cycles of all kernels that are one with a kernel whose schedule is known: of many alike the
    compiler makes one."""

    def kind(kernel: Kernel) -> tuple[str | int, ...]:
        return _own_name(kernel), kernel.flops, kernel.transcendentals, kernel.bytes

    known = {kind(kernel): cycles[kernel.name] for kernel in found if kernel.name in cycles}
    return {kernel.name: known[kind(kernel)] for kernel in found if kind(kernel) in known}


def _own_name(kernel: Kernel) -> str:
    """What the kernel is called in our code."""
    names = (name for name in VECTOR_OPS if name in kernel.operation)
    return next(names, kernel.operation)


def kernel_seconds(kernel: Kernel, chip: str, cycles: int | None = None) -> float:
    """What one run of a kernel takes: the cycles of its schedule, or at published rates, vector
    unit after matrix unit; no less than its products and its bytes take.

    Raises:
      KeyError: nobody has said how many vector operations this kernel takes.
    """
    rates = CHIPS[chip]
    products = kernel.flops / rates.bfloat16
    if cycles is not None:
        computing = max(cycles / rates.clock, products)
    else:
        computing = products + (
            VECTOR_OPS[_own_name(kernel)] * kernel.transcendentals / rates.float32
        )
    return max(computing, kernel.bytes / rates.bandwidth)


def _does_not_fit(error: str, config: ConfigDict, topology: str, mesh: Mesh) -> str:
    """The compiler's finding in a sentence, and what to change, cheapest first."""
    found = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", error)
    used = f"{found[1]} of {found[2]}" if found else "more memory than there is"
    local = config.batch // (mesh.shape["data"] * mesh.shape["fsdp"] * config.accumulate)
    changes = savings(config, local)
    if mesh.shape["fsdp"] < mesh.size:
        changes.append(f"--config.mesh.data=1 --config.mesh.fsdp={mesh.size}")
    changes.append("a chip with more memory (v6e: 32 GiB, v5p: 95 GiB)")
    return (
        f"the step does not fit a chip of {topology}: it takes {used} at {local} examples a chip "
        f"and micro-batch; try {', then '.join(changes)}"
    )

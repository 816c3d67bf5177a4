"""Compiles the training step for TPUs nobody has rented yet, and says how it would run on them.

    python -m flexavatar_jax.compile_ahead --config configs/flex1.py --topology v5e:16x16 \\
        --config.batch=256

runs the real TPU compiler (`pip install "jax[tpu]"`, no TPU needed) on the whole training step,
frozen networks and Pallas kernels included, for every chip of the topology. What doesn't fit a
chip's memory fails here, not on the pod. `planning.predictions` says where the figures come from.
"""

from __future__ import annotations

import tempfile

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from flexavatar_jax import cli
from flexavatar_jax.planning.predictions import NAMES, Report, predict_step, topology_mesh
from flexavatar_jax.planning.schedules import write_schedules
from flexavatar_jax.training.config_check import check_config


def main() -> None:
    # TPUs are compiled for, never used; without this JAX would look for them.
    jax.config.update("jax_platforms", "cpu")
    # What comes from there has no schedule.
    jax.config.update("jax_enable_compilation_cache", False)
    if not FLAGS.schedules:
        run(FLAGS.config)
        return
    with tempfile.TemporaryDirectory() as schedules:
        write_schedules(schedules)
        run(FLAGS.config, schedules)


def run(config: ConfigDict, schedules: str | None = None) -> None:
    """Compiles, with libtpu's schedules going to a folder, if any, and prints what that tells."""
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
    report = predict_step(config, FLAGS.topology, perceptual=perceptual, schedules=schedules)
    print(describe(report))


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
        "predicted by the compiler's cycles and schedules; "
        + (f"{', '.join(r.unscheduled)} by published rates; " if r.unscheduled else "")
        + "rasterizer and interconnect by published rates, which bound them from below; nothing "
        "was run",
    ]
    return "\n".join(lines)


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_string("topology", None, f"The TPU slice: {NAMES}, ...")
    flags.DEFINE_bool(
        "perceptual", True, "The step from config.loss.perceptual_start on, not the one before."
    )
    flags.DEFINE_bool(
        "schedules",
        True,
        "Count our kernels' cycles in the schedules that the compiler writes down, which takes as "
        "long again as compiling; without, kernels are predicted by published rates.",
    )
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main)

"""Times training steps on the devices that are here: `python -m flexavatar_jax.training.benchmark`.

    python -m flexavatar_jax.training.benchmark --config configs/flex1.py --noperceptual \\
        --out step.json

runs the whole training step of a config on a batch that is there already: no data are read, and the
frozen networks get random weights, which take as long as the published ones. Heads are turned all
the way round, as the pictures of captures are. What a step waits for its input is the business of
`python -m data_pipelines.benchmark`. The counterpart for TPUs that aren't here is
`python -m flexavatar_jax.compile_ahead`.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from data_pipelines.batch import Batch
from data_pipelines.cameras import orbit
from data_pipelines.errors import UserError
from data_pipelines.files import write
from data_pipelines.frame import MONOCULAR, MULTI_VIEW, neutral_code
from flexavatar_jax import cli
from flexavatar_jax.frozen.networks import FrozenNetworks, frozen_shapes
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.training import flops
from flexavatar_jax.training.compilation import compile_step, fitting
from flexavatar_jax.training.config_check import check_config
from flexavatar_jax.training.sharding import batch_share, make_mesh, place, replicated
from flexavatar_jax.training.train_step import TrainProgram
from kernels import backends

DISTANCE = 1.0
"""Of the cameras from the head, in metres."""
FOCAL_LENGTH = 3.2
"""Over the image's size: at that distance a head fills the picture."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a step takes."""

    device: str
    devices: int
    jax: str
    rasterizer: str
    batch: int
    targets: int
    image_size: int
    perceptual: bool
    """With DINO's and SAM's losses."""
    step_ms: float
    """Median of the repeats."""
    least_ms: float
    examples_per_second: float
    tflop: float
    """Of matrix products and convolutions in a step, over all devices."""
    mfu: float | None
    """Of the devices' published bfloat16 peak; None where none is known."""
    compile_seconds: float
    memory_gib: float | None
    """Most memory of a device up to here; None where it keeps no count."""


def benchmark_step(
    config: ConfigDict, *, perceptual: bool, repeats: int = 10, profile: str = ""
) -> Timing:
    """Compiles the step of `config` for all devices here, and runs it 1 + `repeats` times.

    Args:
      config: an experiment's.
      perceptual: with DINO's and SAM's losses, if the config has them.
      profile: a folder for a trace of two more steps, for XProf.

    Raises:
      UserError: a config that cannot be meant, a rasterizer that cannot run here, or a step that is
        skipped, as its gradients are not finite.
    """
    check_config(config)
    cli.check_backend(config.rasterizer)
    mesh = make_mesh(**config.mesh)
    program = TrainProgram.create(config, mesh, load_template(config.model.template))
    frozen = jax.device_put(random_networks(config), replicated(mesh))
    print("compiling ...", flush=True)
    compiled = compile_step(program, frozen, perceptual=perceptual)
    print(f"compiled in {compiled.seconds:.0f} s", flush=True)
    _, shares = batch_share(mesh)
    batch = place(heads_all_round(config, config.batch // shares), mesh)
    state = program.init()

    def step() -> float:
        nonlocal state
        began = time.perf_counter()
        state = jax.block_until_ready(compiled.call(state, frozen, batch)[0])
        return time.perf_counter() - began

    step()
    times = [step() for _ in tqdm(range(repeats), unit="step")]
    if profile:
        with jax.profiler.trace(profile):
            step()
            step()
    if int(state.skipped):
        raise UserError(f"{int(state.skipped)} steps were skipped: their gradients aren't finite")
    seconds, peak = statistics.median(times), flops.peak(jax.devices()[0])
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return Timing(
        device=jax.devices()[0].device_kind,
        devices=mesh.size,
        jax=jax.__version__,
        rasterizer=backends.choose_backend(config.rasterizer).name,
        batch=config.batch,
        targets=config.data.targets,
        image_size=config.model.image_size,
        perceptual=perceptual,
        step_ms=1e3 * seconds,
        least_ms=1e3 * min(times),
        examples_per_second=config.batch / seconds,
        tflop=compiled.operations / 1e12,
        mfu=compiled.operations / seconds / peak / mesh.size if peak else None,
        compile_seconds=compiled.seconds,
        memory_gib=memory / 2**30 if memory else None,
    )


def random_networks(config: ConfigDict) -> FrozenNetworks:
    """The frozen networks that `config` asks for, with small random weights."""
    rng = np.random.default_rng(0)

    def weights(x: jax.ShapeDtypeStruct) -> np.ndarray:
        return (0.02 * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)

    return jax.tree.map(weights, frozen_shapes(config))


def heads_all_round(config: ConfigDict, examples: int) -> Batch:
    """A batch of noise whose cameras stand all around the head, of both sources by turns."""
    rng = np.random.default_rng(0)
    size, targets = config.model.image_size, config.data.targets
    shapes = Batch.shapes(examples, targets, size)
    batch: dict[str, Any] = {name: np.zeros(*shape) for name, shape in shapes.items()}
    for name in ("input_image", "input_mask", "target_image", "target_mask"):
        batch[name] = rng.integers(0, 256, batch[name].shape, np.uint8)
    around = np.arange(examples * targets) * 360 / (examples * targets)
    views = np.float32([orbit(azimuth, 0.0, DISTANCE, np.zeros(3)) for azimuth in around])
    batch["input_cam2head"] = np.repeat(views[:1], examples, axis=0)
    batch["target_cam2head"] = views.reshape(examples, targets, 4, 4)
    K = np.float32([[FOCAL_LENGTH, 0, 0.5], [0, FOCAL_LENGTH, 0.5], [0, 0, 1]])
    for name in ("input_K", "target_K"):
        batch[name] = np.broadcast_to(K, batch[name].shape)
    noise = rng.standard_normal(batch["target_expression"].shape, np.float32)
    batch["target_expression"] = np.float32(neutral_code() + 0.1 * noise)
    batch["jitter"] += np.float32([1, 1, 1, 0])
    batch["source"] = np.where(np.arange(examples) % 2, MONOCULAR, MULTI_VIEW).astype(np.int32)
    return Batch(**batch)


def describe(timing: Timing) -> str:
    """A timing in a few lines for a terminal."""
    t = timing
    memory = "" if t.memory_gib is None else f", at most {t.memory_gib:.1f} GiB of a device"
    mfu = "" if t.mfu is None else f", {100 * t.mfu:.0f}% of their bfloat16 peak (MFU)"
    what = "with DINO's and SAM's losses" if t.perceptual else "without DINO and SAM"
    return (
        f"{t.devices} x {t.device}, rasterizer {t.rasterizer}: {t.batch} examples of {t.targets} "
        f"targets at {t.image_size}x{t.image_size}, {what}\n"
        f"step {t.step_ms:.1f} ms ({t.least_ms:.1f} at least), "
        f"{t.examples_per_second:.1f} examples/s, {t.tflop:.3g} TFLOP a step{mfu}{memory}"
    )


def main() -> None:
    config = FLAGS.config
    if FLAGS.repeats < 1:
        raise UserError(f"--repeats is {FLAGS.repeats}; expected 1 or more")
    out = Path(FLAGS.out) if FLAGS.out else None
    if out:
        cli.check_out(out)
    perceptual = FLAGS.perceptual and bool(config.loss.dino or config.loss.sam)
    with fitting(config):
        timing = benchmark_step(
            config, perceptual=perceptual, repeats=FLAGS.repeats, profile=FLAGS.profile
        )
    print(describe(timing))
    if out:
        write(out, json.dumps(dataclasses.asdict(timing), indent=2) + "\n")


FLAGS = flags.FLAGS

if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", lock_config=True)
    flags.DEFINE_bool(
        "perceptual", True, "The step from config.loss.perceptual_start on, not the one before."
    )
    flags.DEFINE_integer("repeats", 10, "Steps that are timed.")
    flags.DEFINE_string("profile", "", "Also write a trace of two steps to this folder (XProf).")
    flags.DEFINE_string("out", "", "Also write what was found here, as JSON.")
    flags.mark_flags_as_required(["config"])
    cli.run(main)

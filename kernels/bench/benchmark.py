"""Times the splatting backends, beside what the hardware allows: `python -m kernels.benchmark`.

Every row renders the same images and, for the second time, also takes the gradients of all five
arrays of Gaussians, with the capacity counted before; for the third it is compiled without one, as
programs are that do not know their scene, and the row says how many times as long it takes.
Compilation is timed apart. The limit is the larger of bytes over bandwidth and
operations over rate: bytes that any renderer must move, operations on the pixels of the tiles that
a splat reaches (those behind opaque ones included), and bandwidth and rate measured on this device.
Rows for TPUs that aren't here are predicted from counts and published rates, and say so.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from kernels import backends, binning, rasterizer, rendering
from kernels.bench import peers, scenes
from kernels.bench.rows import Row, format_table, write_json
from kernels.bench.scenes import Scene
from kernels.platforms import look_for_no_absent_tpu
from kernels.ply import read_ply
from kernels.writable import make_writable

FORWARD_OPERATIONS = 22
"""For a splat at a pixel, besides two for each channel: 9 for sigma, 6 for the exponential, 7 for
alpha and transmittance."""
BACKWARD_OPERATIONS = 52
"""For a splat at a pixel, besides four for each channel: the forward pass again, 6 for the
gradient of sigma, 24 for its moments."""
COUNT_TILE = (8, 8)

EDGES = {"below": 0.98, "above": 1.02}
"""The avatar with scales such that it needs this much of a size that lists are sorted at where
nothing is known before: halves of the automatic capacity."""

SCENES = (*scenes.SCENES, *EDGES)
DEFAULT_SCENES = ("avatar", *EDGES)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; see `--help`."""
    look_for_no_absent_tpu()
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmark", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--backend", action="append", choices=backends.BACKENDS, help="default: all that run here"
    )
    parser.add_argument("--peer", action="append", choices=peers.PEERS, default=[])
    parser.add_argument(
        "--scene",
        action="append",
        help=f"{', '.join(SCENES)}, or a .ply; default: {', '.join(DEFAULT_SCENES)}",
    )
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--gaussians", type=int, help="default: as the scene has it")
    parser.add_argument("--size", type=int, default=512, help="of the square images, in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    for name in ("images", "gaussians", "size", "repeats"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; expected 1 or more")
    if args.json:
        if not args.json.parent.is_dir():
            parser.error(f"--json {args.json}: no such folder {args.json.parent}")
        if args.json.is_dir():
            parser.error(f"--json {args.json}: it is a folder; give the name of a file in it")
        try:
            make_writable(args.json.parent)
        except OSError as error:
            parser.error(f"--json {args.json}: cannot be written ({error.strerror})")
    try:
        rows = measure(args)
        print(format_table(rows))
        if args.json:
            write_json(args.json, rows)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def measure(args: argparse.Namespace) -> list[Row]:
    """Time every backend and peer asked for on every scene."""
    contestants = {}
    here = backends.candidates(backends.platform())
    for name in args.backend or here:
        try:
            if name not in here:
                raise backends.BackendUnavailableError(
                    f"it is not made for {jax.default_backend()}"
                )
            backends.choose_backend(name)
        except backends.BackendUnavailableError as error:
            print(f"{name}: not measured: {error}", file=sys.stderr)
        else:
            contestants[name] = functools.partial(prepare_backend, backend=name)
    for name in args.peer:
        reason = peers.unavailable(name)
        if reason:
            print(f"{name}: not measured: {reason}", file=sys.stderr)
        else:
            contestants[name] = peers.PEERS[name]

    loaded = {name: load_scene(name, args) for name in args.scene or DEFAULT_SCENES}
    bandwidth, rate = measure_bandwidth(), measure_rate()
    device = jax.devices()[0].device_kind
    print(f"{device}: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.1f} Gop/s (measured)")
    rows = []
    for name, scene in loaded.items():
        bytes_, operations = count_work(scene, args.size)
        for backend in tqdm(contestants, desc=name, unit="backend"):
            forward, both, *automatic = contestants[backend](scene, args.size)
            begin = time.perf_counter()
            forward()
            both()
            first = time.perf_counter() - begin
            forward_times = [time_once(forward) for _ in range(args.repeats)]
            both_times = [time_once(both) for _ in range(args.repeats)]
            automatic_ms = None
            for unbound in automatic:
                unbound()
                automatic_ms = 1e3 * min(time_once(unbound) for _ in range(args.repeats))
            rows.append(
                Row(
                    backend=backend,
                    device=device,
                    scene=name,
                    images=len(scene.viewmats),
                    gaussians=scene.means.shape[-2],
                    size=args.size,
                    forward_ms=1e3 * min(forward_times),
                    forward_backward_ms=1e3 * min(both_times),
                    median_forward_backward_ms=1e3 * statistics.median(both_times),
                    automatic_ms=automatic_ms,
                    compile_s=first - min(forward_times) - min(both_times),
                    memory_gib=peak_memory(),
                    bytes=bytes_,
                    operations=operations,
                    limit_ms=1e3 * max(bytes_ / bandwidth, operations / rate),
                )
            )
        rows += predict_tpu(name, scene, args.size)
    return rows


def prepare_backend(scene: Scene, size: int, backend: str) -> tuple[Callable, ...]:
    """Functions that render a scene, and render and differentiate it, until all is computed.

    The third does what the second does, compiled without a capacity.
    """
    inputs = [jnp.asarray(a) for a in scene]
    render = functools.partial(rasterizer.rasterize, width=size, height=size, backend=backend)
    # What rasterize does outside of jit: the capacity is that of these splats.
    exact = exact_capacity(inputs, size, backend)

    def loss(*inputs, capacity):
        out = render(*inputs, capacity=capacity)
        return jnp.mean(out.color**2) + jnp.mean(out.alpha) + jnp.mean(out.depth)

    forward = jax.jit(functools.partial(render, capacity=exact))
    both, automatic = (
        jax.jit(jax.grad(functools.partial(loss, capacity=capacity), argnums=range(5)))
        for capacity in (exact, None)
    )
    if int(jnp.max(forward(*inputs).overflow)):
        raise ValueError(f"{backend}: the scene overflows the capacity that was counted for it")

    def ready(function):
        return lambda: jax.block_until_ready(function(*inputs))

    return ready(forward), ready(both), ready(automatic)


def exact_capacity(inputs: list[jax.Array], size: int, backend: str) -> int:
    """The capacity that `rasterize` chooses where it sees the values."""
    gaussians, cameras = inputs[:4], inputs[5:]
    return rasterizer.count_capacity(*gaussians, *cameras, width=size, height=size, backend=backend)


def load_scene(name: str, args: argparse.Namespace) -> Scene:
    """A scene of `kernels.bench.scenes`, or a .ply file seen from in front as a head is."""
    number = {} if args.gaussians is None else {"num": args.gaussians}
    if name in scenes.SCENES:
        return scenes.SCENES[name](args.images, size=args.size, **number)
    if name in EDGES:
        avatar = scenes.avatar(args.images, size=args.size, **number)
        return fill_size(avatar, args.size, EDGES[name])
    if not name.endswith(".ply"):
        raise ValueError(f"scene is {name!r}; expected {', '.join(SCENES)} or a .ply file")
    return scenes.look_at_gaussians(read_ply(name), args.images, args.size)


def fill_size(scene: Scene, size: int, share: float) -> Scene:
    """The scene with scales such that it needs `share` of a half, quarter, ... of the capacity.

    Of the automatic capacity of the backend that is taken here; of its halves, the one next above
    what the scene needs as it is. Up to what whole tiles allow.
    """
    tile = backends.choose_backend("auto").tile
    automatic = binning.default_capacity(scene.means.shape[-2], width=size, height=size, tile=tile)

    def needed(factor: float) -> int:
        larger = scene._replace(scales=scene.scales * np.float32(factor))
        splats = rasterizer.project(*larger[:4], *larger[5:], width=size, height=size)
        return rendering.count_slots(splats, width=size, height=size, tile=tile)

    edge, as_it_is = automatic, needed(1.0)
    while edge >= 2 * as_it_is:
        edge //= 2
    low, high = 1.0, 1.0
    while needed(high) < share * edge:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if needed(middle) < share * edge else (low, middle)
    return scene._replace(scales=scene.scales * np.float32(high if share > 1 else low))


def time_once(function: Callable) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def count_work(scene: Scene, size: int) -> tuple[float, float]:
    """Bytes and operations of forward and backward pass, for all images of a scene.

    Bytes: Gaussians read twice and their gradients written, a splat read for each intersection in
    both passes, images written once and their cotangents read once.
    """
    images, channels = len(scene.viewmats), scene.colors.shape[-1] + 1
    intersections = 0
    for image in range(images):
        own = [a[image] if scene.means.ndim == 3 else a for a in scene[:4]]
        cameras = scene.viewmats[image], scene.Ks[image]
        splats = rasterizer.project(*own, *cameras, width=size, height=size)
        shape = {"width": size, "height": size, "tile": COUNT_TILE}
        intersections += int(binning.count_intersections(splats, **shape).sum())
    pairs = intersections * COUNT_TILE[0] * COUNT_TILE[1]
    gaussians = sum(a.nbytes for a in scene[:5])
    splats = 4 * intersections * (6 + channels)
    pixels = 4 * images * size * size * (channels + 1)
    operations = pairs * (FORWARD_OPERATIONS + BACKWARD_OPERATIONS + 6 * channels)
    return 3.0 * gaussians + 2 * splats + 2 * pixels, float(operations)


def measure_bandwidth() -> float:
    """Bytes a second that the device reads and writes when it copies."""
    data = jnp.ones(1 << 26, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    copy(data).block_until_ready()
    return 2 * data.nbytes / min(time_once(lambda: copy(data).block_until_ready()) for _ in "12345")


def measure_rate() -> float:
    """Multiplications and additions a second in float32, other than matrix products."""
    data, steps = jnp.linspace(0.0, 1.0, 1 << 22), 512

    @jax.jit
    def work(x):
        return jax.lax.fori_loop(0, steps // 64, lambda _, x: _chain(x), x)

    def _chain(x):
        for _ in range(64):
            x = x * 0.999 + 0.001
        return x

    work(data).block_until_ready()
    seconds = min(time_once(lambda: work(data).block_until_ready()) for _ in "123")
    return 2.0 * steps * data.size / seconds


def peak_memory() -> float | None:
    """GiB: of the process on CPUs, of the device on others."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None


def predict_tpu(name: str, scene: Scene, size: int) -> list[Row]:
    """Rows for the TPUs that `kernels.bench.tpu_costs` knows: predicted, not measured."""
    from kernels.bench import tpu_costs

    return [
        Row(
            backend="pallas_tpu",
            device=f"TPU {p.chip}",
            scene=name,
            images=len(scene.viewmats),
            gaussians=scene.means.shape[-2],
            size=size,
            forward_ms=p.forward_ms,
            forward_backward_ms=p.forward_backward_ms,
            median_forward_backward_ms=None,
            automatic_ms=None,
            compile_s=None,
            memory_gib=None,
            bytes=p.bytes,
            operations=p.operations,
            limit_ms=p.forward_backward_ms,
            predicted=True,
        )
        for p in tpu_costs.predict(scene, size, size)
    ]

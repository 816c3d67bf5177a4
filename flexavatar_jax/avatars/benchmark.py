"""What an avatar costs on this machine: `python -m flexavatar_jax.avatars.benchmark`.

    python -m flexavatar_jax.avatars.benchmark --out avatars.json
    python -m flexavatar_jax.avatars.benchmark --workdir runs/demo --chunk 4 --fit_steps 200

Without --workdir the model is FLEX-1's with weights by the rule of `check_parity`, which takes as
long as with the published ones but for the splats' sizes. A frame is an expression that is decoded
and rendered, `--chunk` of them at once; its parts are compiled apart, too, and timed one by one.
A step of the fit has L1 and SSIM. Compilation is not counted. Times are the least of the
repeats; `cpu_ms` is processor time of all threads, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import flex1
from data_pipelines.errors import UserError
from data_pipelines.files import write
from data_pipelines.frame import MULTI_VIEW, neutral_code
from flexavatar_jax import cli
from flexavatar_jax.avatars.fit import FitSettings, fit
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.model.render import render
from flexavatar_jax.published.parity_rule import rule_weights
from flexavatar_jax.published.tensor_names import flatten, params_from_published, published_shapes
from flexavatar_jax.runs.loading import LoadedModel, load_model
from flexavatar_jax.runs.templates import load_template

CAM2HEAD = np.array([[1, 0, 0, 0], [0, -1, 0, 0], [0, 0, -1, 1], [0, 0, 0, 1]], np.float32)
"""A metre before the face."""

K = np.array([[3.2, 0, 0.5], [0, 3.2, 0.5], [0, 0, 1]], np.float32)


@dataclasses.dataclass
class Part:
    """A part of a chunk of frames: its least wall time, its processor time, and its operations."""

    name: str
    ms: float
    cpu_ms: float
    gflop: float | None


def flex1_by_rule(template: str = "", dtype: str = "") -> LoadedModel:
    """A model of FLEX-1's sizes with weights by the rule of `published.parity_rule`.

    Args:
      template: an OBJ file; by default the project's own head.
      dtype: of the transformers, instead of FLEX-1's.
    """
    config = flex1.get_config()
    config.model.dino = False  # which only encoding sees through
    config.model.dtype = dtype or config.model.dtype
    head = load_template(template)
    graph, abstract = nnx.split(
        nnx.eval_shape(lambda: FlexAvatar(config.model, head, rngs=nnx.Rngs(0)))
    )
    weights = rule_weights(published_shapes(config.model, flatten(abstract)))
    params = jax.tree.map(jnp.asarray, params_from_published(weights, abstract, config.model))
    return LoadedModel(nnx.merge(graph, params), config, 0, {}, None)


def benchmark_frames(
    loaded: LoadedModel, chunk: int, repeats: int, backend: str = "auto"
) -> list[Part]:
    """Times decoding and rendering `chunk` expressions: all of it first, then its parts."""
    config = loaded.config.model
    graph, state = nnx.split(loaded.model.folded())
    rng = np.random.default_rng(0)
    code = rng.standard_normal((chunk, config.head_resolution**2, config.width), np.float32)
    expressions = neutral_code() + 0.1 * rng.standard_normal((chunk, 1, 135), np.float32)
    source = jnp.full(chunk, MULTI_VIEW, jnp.int32)
    cameras = (jnp.asarray(np.repeat(x[None], chunk, 0)) for x in (CAM2HEAD, K))
    cam2heads, Ks, white = (*cameras, jnp.ones((chunk, 3)))

    # The weights are arguments: as constants, XLA would compile for minutes.
    decode = jax.jit(lambda s, c, e: nnx.merge(graph, s).decode(c, e, source))
    tokens = jax.jit(lambda s, c, e: nnx.merge(graph, s).decoder(c, e, source)[:, 0])
    upsample = jax.jit(lambda s, x: nnx.merge(graph, s).upsampler(x))
    sample = jax.jit(lambda s, x: nnx.merge(graph, s).gaussians(x))

    def draw(gaussians: Any) -> Any:  # as the animator does, which counts the room it needs
        return render(gaussians, cam2heads, Ks, white, size=config.image_size, backend=backend)

    def frames(code: Any, expressions: Any) -> Any:
        return draw(jax.tree.map(lambda x: x[:, 0], decode(state, code, expressions)))

    code, expressions = jnp.asarray(code), jnp.asarray(expressions)
    features = tokens(state, code, expressions)
    maps = upsample(state, features)
    gaussians = sample(state, maps)
    return [
        _time("decode and render", frames, (code, expressions), repeats),
        _time("decoder", tokens, (state, code, expressions), repeats),
        _time("upsampler", upsample, (state, features), repeats),
        _time("gaussians", sample, (state, maps), repeats),
        _time("render", draw, (gaussians,), repeats),
    ]


def benchmark_fit(loaded: LoadedModel, steps: int, backend: str = "auto") -> dict[str, float]:
    """Times a fit of L1 and SSIM to one picture: a step, in wall and processor time, and 200.

    Args:
      steps: 2 or more; the first one is not counted.
    """
    config = loaded.config.model
    rng = np.random.default_rng(0)
    code = rng.standard_normal((config.head_resolution**2, config.width), np.float32)
    picture = rng.integers(0, 255, (1, config.image_size, config.image_size, 3), np.uint8)
    moments, done = [], []

    def progress(count: int, loss: float) -> None:
        moments.append((time.perf_counter(), time.process_time()))
        done.append(count)

    expressions = neutral_code()[None].astype(np.float32)
    views = expressions, CAM2HEAD[None], K[None]
    fit(loaded, code, picture, *views, FitSettings(steps=steps), backend=backend, progress=progress)
    wall, cpu = (np.array(moments[-1]) - moments[0]) / (sum(done) - done[0])
    return {
        "steps": steps,
        "seconds_a_step": round(float(wall), 4),
        "cpu_seconds_a_step": round(float(cpu), 4),
        "seconds_of_200_steps": round(200 * float(wall), 2),
    }


def _time(name: str, function: Callable, arguments: tuple, repeats: int) -> Part:
    """Calls a function, jitted or not, `repeats` times; XLA counts the operations of one jitted."""
    gflop = None
    if hasattr(function, "lower"):
        costs = function.lower(*arguments).cost_analysis() or {}
        gflop = round(costs.get("flops", 0.0) / 1e9, 2)
    jax.block_until_ready(function(*arguments))  # compiled, if it wasn't
    wall, cpu = [], []
    for _ in range(repeats):
        began, used = time.perf_counter(), time.process_time()
        jax.block_until_ready(function(*arguments))
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    least = (round(1e3 * min(x), 2) for x in (wall, cpu))
    return Part(name, *least, gflop)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What `main` prints, as JSON has it."""
    cli.check_backend(args.backend)
    loaded = (
        load_model(args.workdir, load_dinov2=False)
        if args.workdir
        else flex1_by_rule(args.template, args.dtype)
    )
    config = loaded.config.model
    parts = benchmark_frames(loaded, args.chunk, args.repeats, args.backend)
    found = {
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "jax": jax.__version__,
        "model": args.workdir or "FLEX-1, weights by the rule",
        "dtype": str(config.dtype),
        "image_size": int(config.image_size),
        "gaussians": len(loaded.model.gaussians.points.index),
        "chunk": args.chunk,
        "frames_a_second": round(1e3 * args.chunk / parts[0].ms, 3),
        "parts": [dataclasses.asdict(part) for part in parts],
    }
    if args.fit_steps:
        found["fit"] = benchmark_fit(loaded, args.fit_steps, args.backend)
    return found


def print_table(found: dict[str, Any]) -> None:
    """What was measured, for people."""
    print(
        f"{found['device']}, {found['cores']} cores: {found['model']}, {found['gaussians']} "
        f"Gaussians at {found['image_size']}x{found['image_size']}, {found['chunk']} at once: "
        f"{found['frames_a_second']:.2f} frames a second"
    )
    print("| part | ms | processor ms | Gflop |\n| --- | --- | --- | --- |")
    for part in found["parts"]:
        gflop = "" if part["gflop"] is None else f"{part['gflop']:.1f}"
        print(f"| {part['name']} | {part['ms']:.1f} | {part['cpu_ms']:.1f} | {gflop} |")
    if "fit" in found:
        fitted = found["fit"]
        print(
            f"fit: {fitted['seconds_a_step']:.3f} s a step "
            f"({fitted['cpu_seconds_a_step']:.3f} s of processor time), "
            f"{fitted['seconds_of_200_steps']:.1f} s of 200 steps"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flexavatar_jax.avatars.benchmark", description=__doc__.split("\n", 1)[0]
    )
    parser.add_argument("--workdir", default="", help="a run or import (default: FLEX-1's sizes)")
    parser.add_argument("--template", default="", help="without --workdir: an OBJ with UVs")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16"])
    parser.add_argument("--backend", default="auto", help="rasterizer: auto, xla, ...")
    parser.add_argument("--chunk", type=int, default=1, help="frames at once (default: 1)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fit_steps", type=int, default=0, help="also a fit of so many steps")
    parser.add_argument("--out", type=Path, help="also write what was found here")
    args = parser.parse_args(argv)

    def run() -> None:
        for name, least in (("chunk", 1), ("repeats", 1)):
            if getattr(args, name) < least:
                raise UserError(f"--{name} is {getattr(args, name)}; expected {least} or more")
        if args.fit_steps < 0 or args.fit_steps == 1:
            raise UserError(f"--fit_steps is {args.fit_steps}; expected 0, or 2 or more")
        if args.workdir and (args.template or args.dtype):
            raise UserError(
                "--template and --dtype are the run's own: leave them, or --workdir, out"
            )
        if args.out:
            cli.check_out(args.out)
        found = measure(args)
        print_table(found)
        if args.out:
            write(args.out, json.dumps(found, indent=2) + "\n")

    cli.guard(run)


if __name__ == "__main__":
    main()

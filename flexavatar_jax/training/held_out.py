"""How well a run does on people it never sees, measured while it trains.

The people of `config.eval.dataset` are shared out over the devices as batches are, and rendered
with the multi-view sink, as `evaluate` does. Their frames are read once, while training goes on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from data_pipelines.batch import Batch
from data_pipelines.frame import MULTI_VIEW, Frame
from data_pipelines.shards import open_at_size
from flexavatar_jax.evaluation.people import first_clips, portrait, read_person
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.model.gaussians import Gaussians
from flexavatar_jax.training.augment import finish_batch
from flexavatar_jax.training.background import Background
from flexavatar_jax.training.losses import psnr, ssim
from flexavatar_jax.training.sharding import (
    BATCH_AXES,
    batch_sharding,
    batch_share,
    place,
    replicated,
)
from flexavatar_jax.training.targets import preview_rows, render_targets
from flexavatar_jax.training.train_step import TrainProgram


class Found(NamedTuple):
    """What was measured: means over all images, and rows of input, target and prediction."""

    metrics: dict[str, float]
    rows: np.ndarray


class HeldOut:
    """The test people of a run, ready to be rendered with any parameters.

    Args:
      program: of the run, whose config says who they are and how often they are asked for.
      frozen: networks that the encoder sees through.

    Raises:
      UserError: the data set is not there, or its images are too small.
    """

    def __init__(self, program: TrainProgram, frozen: FrozenNetworks) -> None:
        self._config, self._program, self._frozen = program.config, program, frozen
        folder = epath.Path(self._config.data.root) / self._config.eval.dataset
        self._set = open_at_size(folder, self._config.model.image_size)
        self._ready = Background(lambda: (self._read(), self._compile()), "held-out people")

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after `step`; raises what preparing for it raised, early on."""
        if self._ready.ready(timeout=0):
            self._ready.result()
        return step % self._config.eval.every == 0 or step == self._config.steps

    def evaluate(self, params: nnx.State, stop: Callable[[], bool]) -> Found | None:
        """Renders all people with `params`, on all processes; None as soon as `stop` says so.

        Raises:
          UserError: a person of the data set cannot be read.
        """
        batches, measure = self._ready.result()
        mesh, sums, rows = self._program.mesh, {}, None
        for batch, counts in batches:
            if stop():
                return None
            found, preview = measure(params, self._frozen, place(batch, mesh), place(counts, mesh))
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            if rows is None:
                rows = np.asarray(preview.addressable_shards[0].data)
        images = sums.pop("images")
        return Found({f"eval_{name}": value / images for name, value in sums.items()}, rows)

    def _read(self) -> list[tuple[Batch, np.ndarray]]:
        """This process's share of the people: batches, and which of their images count [B, T]."""
        config, size = self._config, self._config.model.image_size
        share, shares = batch_share(self._program.mesh)
        names = list(first_clips(self._set))[: config.eval.people]
        people = [
            read_person(self._set, name, config.eval.images_per_person, size)
            for name in names[share::shares]
        ]
        targets, examples = config.data.targets, _micro_batch(config) // shares
        chunks = math.ceil(config.eval.images_per_person / targets)
        # First of each person, then second: a picture of the first few shows as many people.
        todo = [(p, range(c * targets, (c + 1) * targets)) for c in range(chunks) for p in people]
        # All processes take as many batches, also those that have fewer people.
        most_people = math.ceil(len(names) / shares)
        count = math.ceil(most_people * chunks / examples)
        batches = []
        for start in range(0, count * examples, examples):
            batch, counts = _blank(examples, targets, size), np.zeros((examples, targets), bool)
            for row, (person, chosen) in enumerate(todo[start : start + examples]):
                _put(portrait(person, config), "input", batch, row)
                for t, number in enumerate(chosen):
                    if number < len(person.targets):
                        _put(person.targets[number], "target", batch, (row, t))
                        batch.target_expression[row, t] = person.targets[number].expression
                        counts[row, t] = True
            batches.append((batch, counts))
        return batches

    def _compile(self) -> Callable:
        program, config = self._program, self._config
        everywhere, split = replicated(program.mesh), batch_sharding(program.mesh)
        examples, targets = _micro_batch(config), config.data.targets
        shapes = Batch.shapes(examples, targets, config.model.image_size)
        batch = Batch(**{name: jax.ShapeDtypeStruct(*field) for name, field in shapes.items()})
        counts = jax.ShapeDtypeStruct((examples, targets), bool)
        jitted = jax.jit(
            self._measure,
            in_shardings=(program.state_sharding.params, everywhere, split, split),
            out_shardings=(everywhere, split),
        )
        return jitted.lower(program.abstract_state.params, self._frozen, batch, counts).compile()

    def _measure(
        self, params: nnx.State, frozen: FrozenNetworks, batch: Batch, counts: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Sums over the images that count, how many those are, and a preview."""
        batch = finish_batch(batch)
        gaussians = self._program.gaussians(params, frozen, batch)
        split = PartitionSpec(BATCH_AXES)
        on_shard = jax.shard_map(
            functools.partial(_compare, config=self._config),
            mesh=self._program.mesh,
            in_specs=(split, split),
            out_specs=split,
            check_vma=False,  # as in the training step
        )
        scores, preview = on_shard(gaussians, batch)
        sums = {name: jnp.sum(jnp.where(counts, x, 0.0)) for name, x in scores.items()}
        return sums | {"images": jnp.sum(counts, dtype=jnp.float32)}, preview


def _compare(
    gaussians: Gaussians, batch: Batch, *, config: ConfigDict
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Scores [B, T] of one device's examples, and rows of input, target, prediction."""
    targets = batch.target_image
    out = render_targets(gaussians, batch, config)
    color = jnp.clip(out.color, 0, 1)
    ours, theirs = out.alpha >= 0.5, batch.target_mask >= 0.5
    both, either = jnp.sum(ours & theirs, (-2, -1)), jnp.sum(ours | theirs, (-2, -1))
    scores = {
        "psnr": psnr(color, targets),
        "ssim": ssim(color, targets),
        "iou": jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0),
    }
    return scores, preview_rows(batch, color, config)


def _micro_batch(config: ConfigDict) -> int:
    """As many examples as the devices' memory is laid out for."""
    return config.batch // config.accumulate


def _blank(examples: int, targets: int, size: int) -> Batch:
    """A batch with a camera before an empty head everywhere, on white, nothing jittered."""
    batch = Batch(*(np.zeros_like(field) for field in Batch.empty(examples, targets, size)))
    camera = np.diag([1.0, -1.0, -1.0, 1.0])
    camera[2, 3] = 1.0
    for prefix in ("input", "target"):
        getattr(batch, f"{prefix}_cam2head")[:] = camera
        getattr(batch, f"{prefix}_K")[:] = np.eye(3)
    batch.background[:] = 1.0
    batch.jitter[:, :3] = 1.0
    batch.source[:] = MULTI_VIEW
    return batch


def _put(frame: Frame, prefix: str, batch: Batch, place: int | tuple[int, int]) -> None:
    for field in ("image", "mask", "cam2head", "K"):
        getattr(batch, f"{prefix}_{field}")[place] = getattr(frame, field)

"""Fits an avatar code to one or more pictures of a person, the model frozen.

The paper's fitting: Adam on the avatar code and on one offset an image, added to its expression
code, with the multi-view bias sink, towards the pictures on white. One compiled loop, which brings
down what the model was trained to bring down (`config.loss`, its weights of DINO and SAM included
where their networks are given). Beside each token its own, all tokens move together: what one
picture tells of all of a head, its colours say, then reaches the tokens that it does not show.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from data_pipelines.errors import UserError
from data_pipelines.frame import MULTI_VIEW
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.model.render import render
from flexavatar_jax.runs.loading import LoadedModel
from flexavatar_jax.training.losses import training_loss

SNAPSHOTS = 5
"""Avatar codes that are kept on the way, the first and the last among them."""


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """How a fit runs; defaults as published but for `shift`, which docs/avatars.md measures.

    Attributes:
      steps: of Adam; 0 leaves the encoder's code.
      batch: images a step.
      learning_rate, final_learning_rate: of a cosine decay.
      shift: rate of what all tokens move by together, as a share of the learning rate; 0: each
        token moves by itself, as published.
      pull: weight of the mean squared distance from the encoder's code.
      seed: of the order of images.
    """

    steps: int = 200
    batch: int = 1
    learning_rate: float = 1e-2
    final_learning_rate: float = 5e-4
    shift: float = 1.0
    pull: float = 0.0
    seed: int = 0

    def check(self, images: int) -> None:
        """Raises `UserError` for a setting out of range; `batch` may be at most `images`."""
        if self.steps < 0:
            raise UserError(f"--fit is {self.steps}; expected 0 steps or more")
        if not 1 <= self.batch <= images:
            raise UserError(f"--batch is {self.batch}; expected 1 to {images}, the images fitted")
        for name in ("learning_rate", "final_learning_rate", "shift", "pull"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise UserError(f"--{name} is {value}; expected a number of 0 or more")


class Fitted(NamedTuple):
    """The result of a fit.

    Attributes:
      code: [N, D].
      offsets: [I, 135] what was added to each image's expression code.
      losses: [steps], without the pull.
      snapshots: (step, code) at `SNAPSHOTS` moments.
    """

    code: Float[np.ndarray, "N D"]
    offsets: Float[np.ndarray, "I 135"]
    losses: Float[np.ndarray, "steps"]
    snapshots: list[tuple[int, np.ndarray]]


def fit(
    loaded: LoadedModel,
    code: Float[np.ndarray, "N D"],
    images: UInt8[np.ndarray, "I s s 3"],
    expressions: Float[np.ndarray, "I 135"],
    cam2heads: Float[np.ndarray, "I 4 4"],
    Ks: Float[np.ndarray, "I 3 3"],
    settings: FitSettings | None = None,
    frozen: FrozenNetworks | None = None,
    *,
    backend: str = "auto",
    progress: Callable[[int, float], None] = lambda steps, loss: None,
) -> Fitted:
    """Optimises `code`, and an offset to each expression, so that renders look like `images`.

    Args:
      loaded: the model; it does not change.
      code: to start from: the encoder's.
      images: RGB on white, at the model's image size.
      expressions, cam2heads, Ks: of each image, as in `Avatar`.
      frozen: networks of the perceptual terms; those that are None are left out.
      backend: see `kernels.rasterize`.
      progress: called with (steps done since the last call, loss now), about once a second.

    Raises:
      UserError: a setting out of range, too little memory, a loss that is no longer finite, or
        Gaussians that found no room in an image.
    """
    settings = settings or FitSettings()
    settings.check(len(images))
    frozen = frozen or FrozenNetworks()
    start = {
        "own": jnp.asarray(code),
        "shift": jnp.zeros(np.shape(code)[-1], jnp.float32),
        "offsets": jnp.zeros(np.shape(expressions), jnp.float32),
    }
    if settings.steps == 0:
        return Fitted(np.asarray(code), np.zeros_like(expressions), np.zeros(0), [])
    model = loaded.model.folded()
    # A few pictures' activations find room; recomputing them would cost a third of a step.
    model.decoder.transformer.remat = 0.0
    graph, state = nnx.split(model)
    optimizer = _optimizer(settings)
    carry = (start, optimizer.init(start), jnp.zeros(settings.steps), jnp.zeros((), jnp.int32))
    tracking = (np.asarray(x, np.float32) for x in (expressions, cam2heads, Ks, code))
    data = tuple(jnp.asarray(x) for x in (images, *tracking))
    constant = (state, frozen, data, jnp.asarray(_order(len(images), settings)))
    leaves, tree = jax.tree.flatten((carry, constant))
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves)
    capacity = loaded.config.splat_capacity or None
    weights = _loss_weights(loaded.config.loss, frozen)
    compiled = _compile(graph, settings, weights, backend, capacity, tree, shapes)
    _check_memory(compiled, len(images), settings.batch)

    done, stride, snapshots = 0, 1, [(0, np.asarray(code))]
    while done < settings.steps:
        landmark = max(done + 1, -(-settings.steps * len(snapshots) // (SNAPSHOTS - 1)))
        last, began = min(done + stride, landmark, settings.steps), time.monotonic()
        carry = compiled(carry, constant, done, last)
        now = float(carry[2][last - 1])
        if int(carry[3]):
            raise UserError(
                f"{int(carry[3])} intersections of Gaussians with tiles found no room in the fit: "
                "set splat_capacity in the run's config.json to more than it is, or guessed"
            )
        # Gaussians that are not finite are not drawn, so that the loss alone may look sound.
        if not (np.isfinite(now) and np.isfinite(_code(carry[0], settings)).all()):
            raise UserError(
                f"the fit's loss is no longer finite after {last} steps: give a lower "
                "--learning_rate"
            )
        progress(last - done, now)
        stride = int(np.clip((last - done) / max(time.monotonic() - began, 1e-3), 1, 50))
        done = last
        if done == landmark:
            snapshots.append((done, np.asarray(_code(carry[0], settings))))
    code, offsets = jax.device_get((_code(carry[0], settings), carry[0]["offsets"]))
    return Fitted(code, offsets, np.asarray(carry[2]), snapshots)


def _code(params: dict[str, jax.Array], settings: FitSettings) -> Float[jax.Array, "N D"]:
    return params["own"] + settings.shift * params["shift"]


def _loss_weights(trained: ConfigDict, frozen: FrozenNetworks) -> tuple[tuple[str, float], ...]:
    """Of the terms of `losses.training_loss`, as in training; 0 where a network is missing."""
    networks = {"dino": frozen.dinov2_small, "sam": frozen.sam2}
    names = ("l1", "mse", "ssim", "dino", "sam")
    missing = [name for name, network in networks.items() if network is None]
    return tuple((name, 0.0 if name in missing else float(trained[name])) for name in names)


def _optimizer(settings: FitSettings) -> optax.GradientTransformation:
    """Adam with cosine decay."""
    decay = settings.final_learning_rate / max(settings.learning_rate, 1e-30)
    return optax.adam(
        optax.cosine_decay_schedule(settings.learning_rate, max(settings.steps, 1), decay)
    )


@functools.lru_cache(maxsize=4)
def _compile(
    graph: nnx.GraphDef,
    settings: FitSettings,
    weights: tuple[tuple[str, float], ...],
    backend: str,
    capacity: int | None,
    tree: jax.tree_util.PyTreeDef,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
) -> jax.stages.Compiled:
    """The loop for arguments of these shapes, compiled: several people take the same one."""
    optimizer = _optimizer(settings)

    def loss(params, state, networks, data, chosen):
        """The loss of a batch with the pull, and (without it, what found no room)."""
        pictures, expressions, cam2heads, Ks = (x[chosen] for x in data[:-1])
        model, encoded, code = nnx.merge(graph, state), data[-1], _code(params, settings)
        gaussians = model.decode(
            jnp.broadcast_to(code, (len(chosen), *encoded.shape)),
            (expressions + params["offsets"][chosen])[:, None],
            jnp.full(len(chosen), MULTI_VIEW),
        )
        out = render(
            jax.tree.map(lambda x: x[:, 0], gaussians),
            cam2heads,
            Ks,
            jnp.ones((len(chosen), 3)),
            size=pictures.shape[1],
            backend=backend,
            capacity=capacity,
        )
        target = pictures.astype(jnp.float32) / 255
        error, _ = training_loss(out.color, target, dict(weights), networks, perceptual=True)
        pull = settings.pull * jnp.mean((code - encoded) ** 2)
        return error + pull, (error, jnp.sum(out.overflow))

    def run(carry, constant, first, last):
        """Steps `first` to `last` - 1."""
        state, networks, data, order = constant

        def step(i, carry):
            params, moments, losses, missing = carry
            gradient, (error, lost) = jax.grad(loss, has_aux=True)(
                params, state, networks, data, order[i]
            )
            updates, moments = optimizer.update(gradient, moments, params)
            params = optax.apply_updates(params, updates)
            return params, moments, losses.at[i].set(error), missing + lost

        return jax.lax.fori_loop(first, last, step, carry)

    return jax.jit(run).lower(*jax.tree.unflatten(tree, shapes), 0, 1).compile()


def _order(images: int, settings: FitSettings) -> np.ndarray:
    """[steps, batch] which images each step takes: all of them once before any comes again."""
    rng = np.random.default_rng(settings.seed)
    wanted = settings.steps * settings.batch
    rounds = [rng.permutation(images) for _ in range(-(-wanted // images))]
    return np.concatenate(rounds)[:wanted].reshape(settings.steps, settings.batch)


def _check_memory(compiled, images: int, batch: int) -> None:
    """Raises `UserError` if a compiled fit takes more memory than there is."""
    needed = compiled.memory_analysis().temp_size_in_bytes
    free = free_memory()
    if free is not None and needed > free:
        raise UserError(
            f"fitting {images} images, {batch} a step, takes {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free: give a smaller --batch, or fewer images"
        )


def free_memory() -> int | None:
    """Bytes free on the device, or on this machine if that is the device; None if unknown."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    return free_host_memory()


def free_host_memory() -> int | None:
    """Bytes free on this machine; None if unknown."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None

"""What predictions are held against: the nearest training person, and the best code there is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from data_pipelines.frame import MULTI_VIEW, Frame
from data_pipelines.shards import PreparedSet, open_at_size
from flexavatar_jax.evaluation.metrics import training_sets
from flexavatar_jax.evaluation.people import Person, evenly_spaced, on_white
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.model.render import render

FRAMES_PER_PERSON = 64
"""Frames of a training person that are looked through for the nearest view."""

FIT_STEPS = 150
FIT_IMAGES = 8
FIT_RATE = 0.03


class TrainingPeople:
    """Training people by their most frontal picture, to find whom a test person looks most like.

    At most `config.eval.constant_images` clips of all data sets are looked at, evenly spaced.
    """

    def __init__(self, config: ConfigDict):
        self._size = config.model.image_size
        self._clips: list[tuple[PreparedSet, np.ndarray]] = []
        portraits = []
        sets = [open_at_size(folder, self._size) for folder in training_sets(config)]
        for data in sets:
            index = data.index
            wanted = evenly_spaced(len(index.person), config.eval.constant_images // len(sets))
            for clip in tqdm(wanted, desc=f"people of {data.name}", unit="person"):
                records = np.arange(index.clip_start[clip], index.clip_start[clip + 1])
                moment = records[index.timestep[records] == index.timestep[records].min()]
                frames = [data.frame(int(i), self._size) for i in moment]
                portraits.append(on_white(max(frames, key=lambda f: _direction(f)[2])))
                chosen = records[evenly_spaced(len(records), FRAMES_PER_PERSON)]
                self._clips.append((data, chosen))
        self._portraits = np.stack(portraits)

    def views(self, person: Person) -> Float[np.ndarray, "T H W 3"]:
        """Pictures of the training person nearest to the input, from the targets' directions."""
        source = on_white(person.input)
        nearest = np.argmin(np.mean((self._portraits - source) ** 2, axis=(1, 2, 3)))
        data, records = self._clips[nearest]
        frames = [data.frame(int(i), self._size) for i in records]
        directions = np.stack([_direction(frame) for frame in frames])
        return np.stack(
            [on_white(frames[np.argmax(directions @ _direction(t))]) for t in person.targets]
        )


def _direction(frame: Frame) -> Float[np.ndarray, "3"]:
    """Unit vector from the head's origin to the camera, in the head frame."""
    position = frame.cam2head[:3, 3]
    return position / np.linalg.norm(position)


def fitted_views(
    model: FlexAvatar,
    person: Person,
    code: Float[ArrayLike, "N D"],
    size: int,
    *,
    backend: str = "auto",
) -> Float[np.ndarray, "T H W 3"]:
    """The targets as the decoder shows them with the code that fits them best: what is reachable.

    No encoder could find a better code, as this one has seen the very pictures it is measured on.
    """
    graph, state = nnx.split(model)
    inputs = [
        jnp.stack([jnp.asarray(getattr(target, field)) for target in person.targets])
        for field in ("expression", "cam2head", "K")
    ]
    truths = jnp.stack([on_white(target) for target in person.targets])
    rng = np.random.default_rng(0)
    batch = min(FIT_IMAGES, len(truths))
    state_of_fit = (code, _fit_optimizer().init(code))
    for _ in range(FIT_STEPS):
        chosen = rng.choice(len(truths), batch, replace=False)
        state_of_fit = _fit_step(
            graph,
            state,
            state_of_fit,
            [x[chosen] for x in inputs],
            truths[chosen],
            size=size,
            backend=backend,
        )
    shown = []
    for start in range(0, len(truths), batch):
        chosen = np.arange(start, start + batch).clip(max=len(truths) - 1)
        part = [x[chosen] for x in inputs]
        shown.append(np.asarray(_show(graph, state, state_of_fit[0], part, size, backend)))
    return np.clip(np.concatenate(shown)[: len(truths)], 0, 1)


def _fit_optimizer() -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(FIT_RATE, FIT_STEPS))


@functools.partial(jax.jit, static_argnames=("size", "backend"))
def _show(graph, state, code, inputs, size, backend):
    expressions, cam2head, K = inputs
    source = jnp.full(1, MULTI_VIEW, jnp.int32)
    gaussians = nnx.merge(graph, state).decode(code[None], expressions[None], source)
    gaussians = jax.tree.map(lambda x: x[0], gaussians)
    white = jnp.ones((len(cam2head), 3))
    return render(gaussians, cam2head, K, white, size=size, backend=backend).color


@functools.partial(jax.jit, static_argnames=("size", "backend"))
def _fit_step(graph, state, fit, inputs, truths, *, size, backend):
    def loss(code):
        return jnp.mean((_show(graph, state, code, inputs, size, backend) - truths) ** 2)

    code, momenta = fit
    updates, momenta = _fit_optimizer().update(jax.grad(loss)(code), momenta)
    return optax.apply_updates(code, updates), momenta

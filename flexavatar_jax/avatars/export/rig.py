"""A rig: what a decoder does to one avatar, as a few maps that a browser can add up.

The decoder's Gaussians are sampled from maps of 14 numbers a texel over the head's UVs
(`GaussianHead.maps`). Over all expressions these maps lie near a plane of low dimension:

    maps(expression) = neutral + sum_k coefficient_k(expression) component_k

with the components learned from the decoder by principal component analysis: from each slider at
some values (its knots), from pairs of sliders, and from the frames of performances. A slider is
then coefficients at its knots, piecewise linear between; two sliders that meet get a correction,
bilinear in how far each is out; a performance is coefficients of each frame.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int8

from flexavatar_jax.avatars.sliders import Slider, move
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.model.gaussians import Gaussians
from flexavatar_jax.model.resampling import interpolation_matrix

CHANNELS = {"colors": 3, "scales": 3, "offsets": 3, "opacity": 1, "rotation": 4}
"""Layout of the maps, in order."""

MAX_COMPONENTS = 64
CHUNK = 4
"""Expressions decoded at a time."""

Decode = Callable[[Float[np.ndarray, "E 135"]], Float[np.ndarray, "E h w 14"]]


@dataclasses.dataclass(frozen=True)
class Rig:
    """An avatar in all its expressions.

    Attributes:
      neutral: maps of the expression in which all sliders are at 0.
      components: quantised; of texels that no Gaussian is sampled from, 0.
      steps: what one of a component's integers is worth, in each channel.
      knots: of each slider, its values there and the coefficients.
      pairs: of each pair of slider ends ((name, value), (name, value)), the correction.
      clips: of each performance, the coefficients of its frames.
    """

    neutral: Float[np.ndarray, "h w 14"]
    components: Int8[np.ndarray, "K h w 14"]
    steps: Float[np.ndarray, "K 14"]
    knots: dict[str, tuple[Float[np.ndarray, "k"], Float[np.ndarray, "k K"]]]
    pairs: list[tuple[tuple[str, float], tuple[str, float], Float[np.ndarray, "K"]]]
    clips: dict[str, Float[np.ndarray, "T K"]]

    def maps(self, coefficients: Float[np.ndarray, "*b K"]) -> Float[np.ndarray, "*b h w 14"]:
        """What the browser adds up."""
        basis = self.components * self.steps[:, None, None]
        return self.neutral + np.tensordot(coefficients, basis, axes=1).astype(np.float32)

    def coefficients(self, values: Mapping[str, float]) -> Float[np.ndarray, "K"]:
        """Those of sliders at some values; `rig.js` computes the same."""
        total = np.zeros(len(self.steps))
        for name, value in values.items():
            at, coefficients = self.knots[name]
            at = np.append(at, 0.0)  # At rest there is nothing to add.
            coefficients = np.vstack([coefficients, np.zeros_like(total)])
            order = np.argsort(at)
            total += [np.interp(value, at[order], column[order]) for column in coefficients.T]
        for (a, end_a), (b, end_b), correction in self.pairs:
            out_a = max(values.get(a, 0.0) / end_a, 0.0)
            out_b = max(values.get(b, 0.0) / end_b, 0.0)
            total += out_a * out_b * correction
        return total


def decoder_of(model: FlexAvatar, code: Float[np.ndarray, "N D"], source: int) -> Decode:
    """The maps of one avatar's expressions.

    Args:
      model: any, `folded` or not.
      code: the avatar's.
      source: row of the bias sink.
    """
    graph, state = nnx.split(model)

    @jax.jit
    def run(state, code, expressions):
        model = nnx.merge(graph, state)
        sink = jnp.asarray([source], jnp.int32)
        features = model.decoder(code[None], expressions[None], sink)[0]
        return model.gaussians.maps(model.upsampler(features))

    def decode(expressions):
        rows = np.take(expressions, np.arange(CHUNK), axis=0, mode="clip").astype(np.float32)
        return np.asarray(run(state, code, rows))[: len(expressions)]

    return decode


def sample(model: FlexAvatar, maps: Float[np.ndarray, "*b h w 14"]) -> Gaussians:
    """The Gaussians of maps, as the decoder makes them."""
    graph, state = nnx.split(model.gaussians)
    return jax.jit(lambda state, maps: nnx.merge(graph, state).sample(maps))(state, maps)


def build_rig(
    model: FlexAvatar,
    decode: Decode,
    base: Float[np.ndarray, "135"],
    sliders: Sequence[Slider],
    clips: Mapping[str, Float[np.ndarray, "T 135"]],
    *,
    pairs: Sequence[tuple[str, str]] = (),
    max_components: int = MAX_COMPONENTS,
    progress: Callable = lambda chunks: chunks,
) -> Rig:
    """Samples the decoder and learns a rig of it.

    Args:
      decode: see `decoder_of`.
      base: the expression code in which all sliders are at 0.
      clips: performances to bake in, by name.
      pairs: names of sliders that are corrected for one another.
      progress: wraps the iterable of chunks, such as `tqdm`.
    """
    by_name = {slider.name: slider for slider in sliders}
    settings = [{}]
    settings += [{s.name: value} for s in sliders for value in knots_of(s)]
    settings += [
        {a: end_a, b: end_b}
        for a, b in pairs
        for end_a, end_b in itertools.product(ends_of(by_name[a]), ends_of(by_name[b]))
    ]
    codes = np.stack([move(base, sliders, values) for values in settings])
    codes = np.concatenate([codes, *clips.values()])
    samples = [decode(codes[i : i + CHUNK]) for i in progress(range(0, len(codes), CHUNK))]
    samples = np.concatenate(samples)
    neutral, moved = samples[0], samples[1:] - samples[0]

    components, steps, coefficients = _factorize(
        moved, _weights(model, neutral), max_components, _covered(model, neutral.shape[:2])
    )
    rows = iter(coefficients)
    knots = {}
    for slider in sliders:
        at = np.array(knots_of(slider))
        knots[slider.name] = at, np.stack([next(rows) for _ in at])
    rig = Rig(neutral, components, steps, knots, [], {})
    for values in settings[1 + sum(len(at) for at, _ in knots.values()) :]:
        correction = next(rows) - rig.coefficients(values)
        rig.pairs.append((*values.items(), correction))
    for name, codes in clips.items():
        rig.clips[name] = np.stack([next(rows) for _ in codes])
    return rig


def knots_of(slider: Slider) -> list[float]:
    """Values at which a slider is sampled, besides 0: four, up to both ends."""
    if slider.low == 0:
        return [slider.high * part for part in (0.25, 0.5, 0.75, 1.0)]
    return [slider.low, slider.low / 2, slider.high / 2, slider.high]


def ends_of(slider: Slider) -> list[float]:
    return [end for end in (slider.low, slider.high) if end]


def _factorize(
    moved: Float[np.ndarray, "S h w 14"],
    weights: Float[np.ndarray, "14"],
    max_components: int,
    covered: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantised components, their steps, and the coefficients of all samples."""
    moved = moved * covered[..., None]
    flat = (moved * weights).reshape(len(moved), -1)
    gram = flat @ flat.T
    strength, vectors = np.linalg.eigh(gram.astype(np.float64))
    count = int(np.sum(strength > 1e-10 * max(strength[-1], 1e-30)))
    vectors = vectors[:, ::-1][:, : min(count, max_components)]
    components = np.tensordot(vectors.T.astype(np.float32), moved, axes=1)
    steps = np.abs(components).max(axis=(1, 2)) / 127
    quantised = np.round(components / np.maximum(steps, 1e-30)[:, None, None]).astype(np.int8)
    # Coefficients are fitted to what is left of the components.
    basis = (quantised * (steps * weights)[:, None, None]).reshape(len(steps), -1)
    normal = (basis @ basis.T).astype(np.float64)
    coefficients = np.linalg.solve(
        normal + 1e-9 * np.eye(len(normal)) * np.trace(normal) / max(len(normal), 1),
        (basis @ flat.T).astype(np.float64),
    ).T
    return quantised, steps.astype(np.float32), coefficients


def _weights(model: FlexAvatar, neutral: Float[np.ndarray, "h w 14"]) -> Float[np.ndarray, "14"]:
    """How much a unit of each channel moves pixels, about: offsets by the size of Gaussians."""
    head = model.gaussians
    gaussians = sample(model, neutral)
    size = float(np.mean(gaussians.scales))
    opacity = np.asarray(gaussians.opacities)
    weight = {
        "colors": 0.28,
        "scales": 0.5,
        "offsets": 0.25 * head.offset_range / max(size, 1e-4),
        "opacity": float(np.mean(opacity * (1 - opacity))) + 0.05,
        "rotation": 0.3,
    }
    return np.concatenate([np.full(n, weight[c], np.float32) for c, n in CHANNELS.items()])


def _covered(model: FlexAvatar, shape: tuple[int, int]) -> np.ndarray:
    """[h, w] 1 where a Gaussian is sampled from, else 0."""
    head = model.gaussians
    on_grid = np.zeros(head.grid**2, np.float32)
    on_grid[head.points.index] = 1
    rows, columns = (interpolation_matrix(head.grid, size) for size in shape)
    return (rows.T @ on_grid.reshape(head.grid, head.grid) @ columns > 0).astype(np.float32)

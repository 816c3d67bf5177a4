"""Named sliders: jaw, expression, blinks, gaze and neck as directions of the 135-number code.

A slider at 0 leaves the code it starts from as it is. Numbers of the code are added to; rotations
are turned further, by the rotation vectors of all sliders of a part together, in the head's axes (x
to the person's left, y up, z out of the face).

The first ten numbers of `exp` have names where the training data gave them meanings: procedural
heads (`BLENDSHAPES`). FLAME's own are principal components, which have none, so that models of real
captures have `expression 1` to `expression 10` where others have `smile` or `brows up`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import ml_collections
import numpy as np
from jaxtyping import Float

from data_pipelines import cameras
from data_pipelines.errors import UserError
from data_pipelines.frame import EXPRESSION_PARTS, expression_part
from data_pipelines.procedural.expression import BLENDSHAPES

BLENDSHAPE_RANGES = {
    "smile": (-1.5, 2.0),
    "pucker": (-0.5, 1.25),
    "brows_up": (-1.0, 2.0),
    "brows_together": (-0.7, 1.5),
    "upper_lip_up": (0.0, 1.0),
    "lower_lip_down": (0.0, 1.0),
    "mouth_left": (-0.75, 0.75),
    "cheeks_out": (-0.5, 1.0),
    "left_smile": (-0.75, 0.75),
    "inner_brows_up": (-0.5, 1.25),
}
"""About 2.5 standard deviations of what procedural heads do, within what their faces can do."""

COMPONENT_RANGE = (-2.0, 2.0)
"""Standard deviations of a FLAME component, which trackers go to."""

NUMBERED = 10
"""How many numbers of `exp` have a slider."""


@dataclasses.dataclass(frozen=True)
class Slider:
    """A direction of the code and how far it is honest to go.

    Attributes:
      name: what the user reads.
      part: of `EXPRESSION_PARTS`.
      direction: for numbers, as long as the part: what a unit adds; for rotations [3], the rotation
        vector of a unit, in radians.
      low, high: ends of the range, within what models were trained on; 0 is rest.
      unit: of the values, "°" or "".
    """

    name: str
    part: str
    direction: Float[np.ndarray, "n"]
    low: float
    high: float
    unit: str = ""

    @property
    def step(self) -> float:
        """A sensible grain: a hundredth of the range, rounded to one digit."""
        raw = (self.high - self.low) / 100
        digit = 10.0 ** np.floor(np.log10(raw))
        return float(round(raw / digit) * digit)

    @property
    def turns(self) -> bool:
        """Whether it turns a rotation."""
        return self.part in ("eyes", "neck", "jaw", "R")


def sliders_of(config: ml_collections.ConfigDict) -> tuple[Slider, ...]:
    """The sliders of a model: named by what the data sets it was trained on mean by `exp`.

    Args:
      config: a run's (`checkpoints.LoadedModel.config`).
    """
    trained_on = [name for name, weight in config.data.mixture.items() if weight]
    procedural = trained_on and all(name.startswith("procedural") for name in trained_on)
    return (
        _turn("jaw open", "jaw", (1, 0, 0), 0, 30 if not procedural else 25),
        *(_blendshapes() if procedural else _components()),
        _lids("blink left", 0),
        _lids("blink right", 1),
        _turn("gaze left", "eyes", (0, 1, 0), -30 if procedural else -15, 30 if procedural else 15),
        _turn("gaze up", "eyes", (-1, 0, 0), -15, 15),
        _turn("neck turn", "neck", (0, 1, 0), -12, 12),
        _turn("neck nod", "neck", (1, 0, 0), -8, 8),
        _turn("neck tilt", "neck", (0, 0, 1), -6, 6),
    )


def move(
    base: Float[np.ndarray, "135"], sliders: Sequence[Slider], values: Mapping[str, float]
) -> Float[np.ndarray, "135"]:
    """The expression code that sliders make of `base`; those without a value stay at 0.

    Raises:
      UserError: a name that is no slider's.
    """
    known = {slider.name: slider for slider in sliders}
    if unknown := sorted(values.keys() - known.keys()):
        raise UserError(f"there is no slider {unknown[0]!r}; there are {', '.join(known)}")
    code = np.array(base, np.float64)
    turned = {}
    for name, value in values.items():
        slider = known[name]
        if slider.turns:
            turned[slider.part] = turned.get(slider.part, 0) + value * slider.direction
        else:
            code[expression_part(slider.part)] += value * slider.direction
    for part, vector in turned.items():
        angle = np.linalg.norm(vector)
        if angle > 0:
            turn = cameras.axis_angle(vector, angle)
            rotations = cameras.rotation_from_6d(code[expression_part(part)].reshape(-1, 6))
            code[expression_part(part)] = cameras.rotation_to_6d(turn @ rotations).reshape(-1)
    return code.astype(np.float32)


def random_values(
    sliders: Sequence[Slider], rng: np.random.Generator, active: int = 4
) -> dict[str, float]:
    """A face at random: up to `active` of the sliders somewhere in their ranges, the others at 0.

    Both lids close alike, and the neck stays.
    """
    chosen = rng.choice(len(sliders), min(active, len(sliders)), replace=False)
    values = {sliders[i].name: float(rng.uniform(sliders[i].low, sliders[i].high)) for i in chosen}
    values = {name: value for name, value in values.items() if not name.startswith("neck")}
    if lids := [value for name, value in values.items() if name.startswith("blink")]:
        values |= {s.name: lids[0] for s in sliders if s.name.startswith("blink")}
    return values


def _unit(part: str, index: int) -> Float[np.ndarray, "n"]:
    return np.eye(EXPRESSION_PARTS[part])[index]


def _turn(name: str, part: str, axis: Sequence[float], low: float, high: float) -> Slider:
    return Slider(name, part, np.radians(np.array(axis, np.float64)), low, high, "°")


def _lids(name: str, index: int) -> Slider:
    return Slider(name, "eyelids", _unit("eyelids", index), 0.0, 1.0)


def _blendshapes() -> list[Slider]:
    return [
        Slider(name.replace("_", " "), "exp", _unit("exp", i), *BLENDSHAPE_RANGES[name])
        for i, name in enumerate(BLENDSHAPES)
    ]


def _components() -> list[Slider]:
    return [
        Slider(f"expression {i + 1}", "exp", _unit("exp", i), *COMPONENT_RANGE)
        for i in range(NUMBERED)
    ]

"""Who a procedural person is: numbers drawn once, from which geometry and texture follow."""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np

from data_pipelines.head_mesh import HeadShape
from data_pipelines.procedural.renderer import Light

Color = tuple[float, float, float]
"""Red, green, blue in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Hair:
    """A hairdo, as seen from the front. Heights are surface coordinates v of `head_mesh`.

    Attributes:
      style: its name.
      shell: whether hair stands off the scalp; without, what there is is painted.
      color: of the hair; brows and beard follow it.
      roots: how much darker the hair is at the scalp, 0 to 1.
      thickness: metres off the scalp; `top` is added on the crown.
      front: v of the hairline over the forehead; `fringe` is how far hair falls over it.
      temples: how far the hairline recedes at the temples, in v.
      length: how far hair hangs below the hanging line, metres; 0 ends it at the hairline.
      part: angle round the head, radians, at which the front hairline is highest.
      curl: metres by which locks stand out.
      strands: contrast of the strands' colours.
      sides: share of the thickness that the sides of the head keep.
      painted: density of the hair painted on the scalp, 0 to 1.
      flare: how much wider hanging hair gets towards its ends, a ratio.
    """

    style: str
    shell: bool
    color: Color
    roots: float = 0.15
    thickness: float = 0.008
    top: float = 0.0
    front: float = 0.26
    fringe: float = 0.0
    temples: float = 0.06
    length: float = 0.0
    part: float = 0.0
    curl: float = 0.0
    strands: float = 0.25
    sides: float = 1.0
    painted: float = 1.0
    flare: float = 0.0


@dataclasses.dataclass(frozen=True)
class HairBack:
    """The back of the head: drawn by itself, the front foretelling it in part.

    Attributes:
      tail: "none", "ponytail", "high ponytail", "bun", "low bun", "topknot" or "braids".
      pattern: what the hair is dyed or shaved with at the back: "none", "bands", "stripes",
        "chevrons", "spots", "half" or "tips".
      color: of the pattern.
      accessory: of the tie that holds the tail.
      repeat: how often the pattern repeats.
      undercut: v above which hair stops at the nape, below it is shaved; 1 for none.
      longer: metres by which the back hangs below the sides.
      tail_size: ratio.
    """

    tail: str
    pattern: str
    color: Color
    accessory: Color
    repeat: int
    undercut: float
    longer: float
    tail_size: float


@dataclasses.dataclass(frozen=True)
class Person:
    """An identity. Lengths are in metres; other numbers are ratios to the average or 0 to 1."""

    shape: HeadShape
    skin: Color
    lips: Color
    iris: Color
    eye_open: float
    eye_slant: float
    brow_thickness: float
    brow_height: float
    brow_slant: float
    brow_density: float
    ear_size: float
    ears_out: float
    beard: str
    freckles: float
    blush: float
    makeup: float
    cloth: Color
    cloth_trim: Color
    cloth_pattern: str
    collar: float
    hair: Hair
    back: HairBack
    light: Light
    texture_seed: int


# Style: probability, then the fields in which it differs from the default, as ranges.
_STYLES: dict[str, tuple[float, dict]] = {
    "bald": (0.07, {"shell": False, "painted": (0.0, 0.12)}),
    "buzz": (0.08, {"shell": False, "painted": (0.55, 0.9), "temples": (0.03, 0.10)}),
    "short": (0.15, {"thickness": (0.006, 0.011), "top": (0.003, 0.012)}),
    "quiff": (0.10, {"thickness": (0.005, 0.008), "top": (0.016, 0.030), "sides": (0.3, 0.7)}),
    "receding": (
        0.07,
        {"thickness": (0.004, 0.008), "front": (0.12, 0.19), "temples": (0.0, 0.04)},
    ),
    "bowl": (0.06, {"thickness": (0.012, 0.016), "fringe": (0.10, 0.125), "length": (0.03, 0.05)}),
    "bob": (0.11, {"thickness": (0.011, 0.016), "length": (0.09, 0.125), "flare": (-0.04, 0.10)}),
    "long": (0.13, {"thickness": (0.009, 0.013), "length": (0.15, 0.20), "flare": (0.0, 0.12)}),
    "curly": (0.08, {"thickness": (0.018, 0.026), "curl": (0.006, 0.010), "length": (0.0, 0.09)}),
    "afro": (0.06, {"thickness": (0.030, 0.042), "curl": (0.004, 0.006), "temples": (0.02, 0.04)}),
    "mohawk": (0.04, {"thickness": (0.003, 0.005), "top": (0.026, 0.038), "sides": (0.2, 0.3)}),
    "pulled": (0.11, {"thickness": (0.004, 0.007), "temples": (0.03, 0.06), "roots": (0.0, 0.1)}),
}

# Skin tones from light to dark, as painted; a person's lies between two neighbours.
_SKIN = np.array(
    [
        (0.96, 0.80, 0.71),
        (0.93, 0.74, 0.62),
        (0.87, 0.66, 0.51),
        (0.76, 0.55, 0.40),
        (0.62, 0.42, 0.29),
        (0.45, 0.29, 0.20),
        (0.36, 0.235, 0.175),
    ]
)
_NATURAL_HAIR = np.array(
    [
        (0.10, 0.085, 0.08),
        (0.16, 0.105, 0.07),
        (0.27, 0.16, 0.09),
        (0.42, 0.26, 0.13),
        (0.55, 0.24, 0.10),
        (0.72, 0.52, 0.28),
        (0.87, 0.73, 0.47),
        (0.62, 0.61, 0.60),
        (0.86, 0.85, 0.83),
    ]
)
_IRIS = np.array(
    [
        (0.26, 0.15, 0.08),
        (0.38, 0.24, 0.10),
        (0.20, 0.42, 0.62),
        (0.38, 0.52, 0.62),
        (0.28, 0.46, 0.28),
        (0.50, 0.42, 0.18),
    ]
)


def sample_person(rng: np.random.Generator) -> Person:
    """Draws a person; equal generators give equal people."""
    shape = _sample_shape(rng)
    tone = rng.uniform(0, len(_SKIN) - 1)
    skin = np.array([np.interp(tone, np.arange(len(_SKIN)), c) for c in _SKIN.T])
    skin = skin * rng.uniform(0.95, 1.05, 3)
    made_up = rng.random() < 0.25
    lips = skin * [0.86, 0.58, 0.58]
    if made_up:
        lips = 0.35 * lips + 0.65 * _vivid(rng, hue=rng.uniform(0.92, 1.02), value=(0.45, 0.85))

    color = _NATURAL_HAIR[rng.choice(len(_NATURAL_HAIR), p=_hair_odds(tone))]
    color = color * rng.uniform(0.85, 1.15)
    if rng.random() < 0.10:
        color = _vivid(rng)
    hair = _sample_hair(rng, color)
    bearded = hair.length < 0.1 and hair.style != "pulled" and rng.random() < 0.5
    beards = ("stubble", "moustache", "goatee", "full")
    iris = _IRIS[rng.choice(len(_IRIS), p=_iris_odds(tone))] * rng.uniform(0.8, 1.2)
    azimuth, height = rng.uniform(-0.8, 0.8), rng.uniform(0.35, 0.8)
    direction = np.array([np.sin(azimuth), height, np.cos(azimuth)])
    warm = rng.uniform(-0.04, 0.04)
    return Person(
        shape=shape,
        skin=_color(skin),
        lips=_color(lips),
        iris=_color(iris),
        eye_open=rng.uniform(0.8, 1.15),
        eye_slant=rng.normal(0, 0.0010),
        brow_thickness=rng.uniform(0.7, 1.5),
        brow_height=rng.normal(0, 0.0012),
        brow_slant=rng.normal(0, 0.0016),
        brow_density=rng.uniform(0.6, 0.95),
        ear_size=rng.uniform(0.9, 1.15),
        ears_out=rng.uniform(0.7, 1.35),
        beard=str(rng.choice(beards)) if bearded else "none",
        freckles=rng.uniform(0.4, 1.0) if tone < 2.5 and rng.random() < 0.25 else 0.0,
        blush=rng.uniform(0.0, 1.0),
        makeup=rng.uniform(0.5, 1.0) if made_up else 0.0,
        cloth=_color(_vivid(rng, saturation=(0.05, 0.75), value=(0.12, 0.92))),
        cloth_trim=_color(_vivid(rng, saturation=(0.05, 0.75), value=(0.12, 0.92))),
        cloth_pattern=str(rng.choice(["plain", "plain", "stripes", "checks"])),
        collar=rng.uniform(0.865, 0.92),
        hair=hair,
        back=_sample_back(np.random.default_rng(rng.integers(2**63)), hair),
        light=Light(
            direction=direction / np.linalg.norm(direction),
            key=rng.uniform(0.60, 0.72) * np.array([1 + warm, 1.0, 1 - warm]),
            fill=rng.uniform(0.46, 0.55) * np.array([1 - warm, 1.0, 1 + warm]),
        ),
        texture_seed=int(rng.integers(2**31)),
    )


def _sample_shape(rng: np.random.Generator) -> HeadShape:
    def ratio(spread: float) -> float:
        return float(np.exp(np.clip(rng.normal(0, spread), -2 * spread, 2 * spread)))

    return HeadShape(
        width=ratio(0.04),
        height=ratio(0.035),
        depth=ratio(0.04),
        jaw=ratio(0.06),
        neck=ratio(0.10),
        brow=rng.uniform(0.3, 1.8),
        cheek=rng.uniform(0.3, 1.8),
        sockets=rng.uniform(0.75, 1.3),
        nose_length=ratio(0.14),
        nose_width=ratio(0.14),
        nose_hook=rng.uniform(-0.002, 0.004),
        lips=ratio(0.25),
        chin=rng.uniform(0.002, 0.010),
        eye_spacing=ratio(0.04),
        eye_height=rng.normal(0, 0.0012),
        mouth_width=ratio(0.08),
        mouth_height=rng.normal(0, 0.0015),
    )


def _sample_hair(rng: np.random.Generator, color: np.ndarray) -> Hair:
    names = list(_STYLES)
    odds = np.array([_STYLES[name][0] for name in names])
    style = names[rng.choice(len(names), p=odds / odds.sum())]
    fields = {
        "shell": True,
        "front": (0.225, 0.285),
        "temples": (0.03, 0.09),
        "part": (-0.45, 0.45),
        "strands": (0.12, 0.35),
        "roots": (0.05, 0.35),
        "fringe": (0.03, 0.11) if style in ("bob", "long") and rng.random() < 0.45 else 0.0,
        **_STYLES[style][1],
    }
    drawn = {k: rng.uniform(*f) if isinstance(f, tuple) else f for k, f in fields.items()}
    return Hair(style=style, color=_color(color), **drawn)


def _sample_back(rng: np.random.Generator, hair: Hair) -> HairBack:
    """Draws the back of the head: the front's style sets odds, not outcomes."""
    tails, patterns = ["none"], ["none", "none", "none"]
    if hair.style == "pulled":
        tails = ["none", "ponytail", "high ponytail", "bun", "low bun", "topknot", "braids"]
    elif hair.style in ("long", "bob", "curly"):
        tails = ["none", "none", "none", "ponytail", "bun", "braids"]
    elif hair.style in ("quiff", "bowl"):
        tails = ["none", "none", "none", "none", "topknot", "low bun"]
    if hair.painted > 0.2:
        patterns += ["bands", "stripes", "chevrons", "spots", "half"]
    if hair.length > 0.06:
        patterns += ["tips", "tips"]
    short = hair.shell and hair.length == 0 and hair.style != "afro"
    contrast = np.clip(1 - np.array(hair.color), 0, 1) if rng.random() < 0.3 else _vivid(rng)
    return HairBack(
        tail=str(rng.choice(tails)),
        pattern=str(rng.choice(patterns)),
        color=_color(contrast),
        accessory=_color(_vivid(rng)),
        repeat=int(rng.integers(2, 6)),
        undercut=rng.uniform(0.42, 0.56) if short and rng.random() < 0.35 else 1.0,
        longer=rng.uniform(0.02, 0.06) if hair.length > 0 and rng.random() < 0.4 else 0.0,
        tail_size=rng.uniform(0.8, 1.3),
    )


def _hair_odds(tone: float) -> np.ndarray:
    """Odds of the natural hair colours; dark hair goes with dark skin."""
    light = np.clip(1 - tone / 3.5, 0.0, 1)
    odds = np.array([1.2, 1.2, 1.0, 1.2 * light, 0.6 * light, light, light, 0.35, 0.25])
    return odds / odds.sum()


def _iris_odds(tone: float) -> np.ndarray:
    light = np.clip(1 - tone / 3.0, 0.02, 1)
    odds = np.array([1.0, 0.8, light, light, 0.6 * light, 0.5 * light])
    return odds / odds.sum()


def _vivid(
    rng: np.random.Generator,
    hue: float | None = None,
    saturation: tuple[float, float] = (0.5, 0.95),
    value: tuple[float, float] = (0.35, 0.95),
) -> np.ndarray:
    hue = rng.random() if hue is None else hue % 1
    return np.array(colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value)))


def _color(values: np.ndarray) -> Color:
    return tuple(float(c) for c in np.clip(values, 0, 1))

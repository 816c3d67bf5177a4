"""Paints a person's texture: skin, lips, brows, beard, clothes, hair, eyes, mouth.

Skin and hair are painted in the places of the average head (`rest`), to which all heads' surface
coordinates refer. Colours are what a screen shows; the fourth channel is gloss.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from data_pipelines.head_mesh import (
    EYE_HEIGHT,
    EYE_OFFSET,
    MOUTH_HEIGHT,
    MOUTH_WIDTH,
    azimuth,
    head_surface,
    smoothstep,
)
from data_pipelines.procedural import atlas, hair
from data_pipelines.procedural.features import EYE_RADIUS
from data_pipelines.procedural.noise import waves
from data_pipelines.procedural.person import Person
from data_pipelines.procedural.skin import EYE_ROW, EYE_WIDTH

IRIS_RADIUS, PUPIL_RADIUS = 0.0066, 0.0028


def paint(person: Person, side: int) -> Float[np.ndarray, "h w 4"]:
    """[1.25 side, 2 side, 4] float32 texture, laid out as in `atlas`."""
    texture = atlas.empty(side)
    scalp = _hair_color(person, side)
    atlas.view(texture, "hair")[:] = scalp
    atlas.view(texture, "skin")[:] = _skin(person, side, scalp)
    tile = side // 4
    x, y = atlas.tile_texels(tile)
    atlas.view(texture, "eye")[:] = _eye(person, x, y)
    atlas.view(texture, "ear")[:] = _ear(person, x, y)
    atlas.view(texture, "mouth")[:] = _mouth(x, y)
    atlas.view(texture, "teeth")[:] = _teeth(x, y)
    ribs = 0.85 + 0.15 * np.cos(2 * np.pi * 9 * x)
    atlas.view(texture, "accessory")[..., :3] = np.array(person.back.accessory) * ribs[..., None]
    return texture


@functools.cache
def _rest(side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """u, v, angle and place on the average head of the skin's texels."""
    u, v = atlas.square_texels(side)
    return u, v, azimuth(u), head_surface(u, v).astype(np.float32)


def _mix(canvas: np.ndarray, color: Sequence[float] | np.ndarray, amount: np.ndarray) -> None:
    """Paints a colour over the canvas, with the given opacity, in place."""
    amount = np.clip(amount, 0, 1)[..., None]
    canvas += amount * (np.asarray(color, np.float32) - canvas)


def _skin(person: Person, side: int, scalp: np.ndarray) -> np.ndarray:
    _, v, theta, rest = _rest(side)
    rng = np.random.default_rng([person.texture_seed, 2])
    x, y, z = np.moveaxis(rest, -1, 0)
    far = np.abs(x)
    face = smoothstep(0.0, 0.03, z)
    line = y - MOUTH_HEIGHT

    def bump(cx: float, cy: float, sx: float, sy: float) -> np.ndarray:
        return face * np.exp(-(((far - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)

    canvas = np.zeros((side, side, 4), np.float32)
    rgb = canvas[..., :3]
    skin = np.array(person.skin)
    mottle = 1 + 0.018 * waves(rest, rng, 0.05) + 0.014 * waves(rest, rng, 0.014)
    rgb[:] = skin * mottle[..., None]
    canvas[..., 3] = 0.05 + 0.05 * bump(0, 0.0, 0.012, 0.03) + 0.04 * bump(0, 0.07, 0.04, 0.02)

    # Blood near the surface, then light that doesn't reach the hollows.
    warm = skin * [1.03, 0.80, 0.78]
    _mix(rgb, warm, (0.2 + 0.4 * person.blush) * bump(0.040, -0.010, 0.018, 0.015))
    _mix(rgb, warm, 0.35 * bump(0, -0.010, 0.014, 0.012))
    shade = 0.22 * bump(0.016, 0.026, 0.008, 0.012)  # beside the bridge of the nose
    shade += 0.14 * bump(EYE_OFFSET, 0.012, 0.016, 0.006)  # under the eyes
    shade += 0.30 * bump(0.0, -0.0215, 0.012, 0.0035)  # under the nose
    shade += 0.16 * bump(0.0, -0.054, 0.018, 0.005)  # under the lip
    shade += 0.14 * bump(0.021, -0.022, 0.005, 0.010)  # from nose to mouth
    shade += 0.35 * smoothstep(0.765, 0.83, v) * smoothstep(-0.06, 0.01, z)  # under the chin
    _mix(rgb, skin * [0.55, 0.42, 0.38], shade)
    _mix(rgb, skin * [0.18, 0.10, 0.09], 0.9 * bump(0.0062, -0.0195, 0.0042, 0.0024))  # nostrils
    if person.freckles:
        spots = smoothstep(1.35, 1.9, waves(rest, rng, 0.0065, 14))
        where = bump(0.025, 0.0, 0.03, 0.016) + 0.7 * bump(0, 0.0, 0.02, 0.012)
        _mix(rgb, skin * [0.66, 0.48, 0.38], 0.7 * person.freckles * spots * where)

    _beard(person, canvas, rest, rng)
    _lips(person, canvas, far, line, face, rng)
    _brows(person, canvas, rest, face, rng)
    _lids(person, canvas, rest, v, face)
    _scalp(person, canvas, theta, v, scalp)
    _clothes(person, canvas, theta, v, rest)
    return canvas


def _lips(
    person: Person,
    canvas: np.ndarray,
    far: np.ndarray,
    line: np.ndarray,
    face: np.ndarray,
    rng: np.random.Generator,
) -> None:
    t = np.clip(far / MOUTH_WIDTH, 0, 1)
    bow = np.sqrt(1 - t**2)
    # Cupid's bow above, a fuller arc below.
    upper = 0.0088 * person.shape.lips**0.5 * bow * (1 - 0.22 * np.exp(-((far / 0.005) ** 2)))
    lower = 0.0102 * person.shape.lips**0.5 * bow
    inside = np.minimum(upper - line, line + lower)
    amount = face * smoothstep(0.0, 0.0014, inside)
    lips = np.array(person.lips)
    _mix(canvas[..., :3], lips, amount * 0.95)
    _mix(canvas[..., :3], lips * 1.12, amount * 0.5 * np.exp(-(((line + 0.005) / 0.003) ** 2)))
    _mix(canvas[..., :3], lips * 0.35, face * (t < 1) * np.exp(-((line / 0.0011) ** 2)) * 0.9)
    canvas[..., 3] += amount * (0.10 + 0.25 * person.makeup)


def _brows(
    person: Person, canvas: np.ndarray, rest: np.ndarray, face: np.ndarray, rng: np.random.Generator
) -> None:
    x, y = np.abs(rest[..., 0]), rest[..., 1]
    t = (x - 0.013) / 0.035
    middle = 0.0405 + person.brow_height + 0.0050 * np.sin(np.clip(t, 0, 1) * np.pi * 0.72)
    middle = middle + person.brow_slant * (t - 0.4) - 0.004 * np.clip(t - 0.7, 0, 1)
    half = 0.0034 * person.brow_thickness * (1.08 - 0.85 * np.clip(t, 0, 1) ** 1.5)
    hairs = 1 + 0.14 * waves(rest * [1.0, 0.45, 0.0], rng, 0.0022, 16)
    amount = smoothstep(1.25, 0.55, np.abs(y - middle) / half)
    amount = amount * smoothstep(-0.10, 0.10, t) * (1 - smoothstep(0.88, 1.08, t)) * face
    color = np.array(person.hair.color) * 0.62 + 0.02
    color = np.minimum(color, np.array(person.skin) * 0.72)  # brows are never lighter than skin
    _mix(canvas[..., :3], color, amount * person.brow_density * hairs)


def _lids(
    person: Person, canvas: np.ndarray, rest: np.ndarray, v: np.ndarray, face: np.ndarray
) -> None:
    x, y = np.abs(rest[..., 0]), rest[..., 1]
    t = (x - EYE_OFFSET) / EYE_WIDTH
    inside = face * (1 - smoothstep(0.9, 1.12, np.abs(t)))
    above = y - EYE_HEIGHT
    skin = np.array(person.skin)
    crease = np.exp(-(((above - 0.0058) / 0.0011) ** 2))
    _mix(canvas[..., :3], skin * [0.55, 0.42, 0.38], 0.55 * inside * crease)
    if person.makeup:
        shadow = smoothstep(-0.0005, 0.0015, above) * (1 - smoothstep(0.004, 0.009, above))
        color = 0.6 * np.array(person.cloth_trim) * skin + 0.1
        _mix(canvas[..., :3], color, 0.6 * person.makeup * inside * shadow)
    lashes = np.exp(-(((v - EYE_ROW) / 0.0030) ** 4)) * np.where(above > 0, 1.0, 0.45)
    _mix(canvas[..., :3], [0.05, 0.035, 0.03], face * (np.abs(t) < 1.03) * lashes * 0.95)


def _beard(person: Person, canvas: np.ndarray, rest: np.ndarray, rng: np.random.Generator) -> None:
    if person.beard == "none":
        return
    x, y, z = np.abs(rest[..., 0]), rest[..., 1], rest[..., 2]
    front = smoothstep(-0.028, -0.012, z)
    # A beard's upper edge: along the cheek from the sideburn, above the lip a moustache.
    cheek = -0.032 + 0.034 * smoothstep(0.034, 0.068, x)
    full = smoothstep(0.004, -0.004, y - cheek) * smoothstep(-0.112, -0.092, y)
    moustache = np.exp(-(((y + 0.0265) / 0.0052) ** 4)) * (1 - smoothstep(0.022, 0.030, x))
    chin = (1 - smoothstep(0.014, 0.024, x)) * smoothstep(-0.046, -0.052, y)
    chin = chin * smoothstep(-0.105, -0.09, y)
    corners = np.exp(-(((x - 0.027) / 0.005) ** 2)) * smoothstep(-0.025, -0.03, y)
    corners = corners * smoothstep(-0.075, -0.06, y)
    goatee = np.maximum(np.maximum(chin, corners), moustache)
    amount = {
        "stubble": 0.38 * np.maximum(full, moustache),
        "moustache": 0.92 * moustache,
        "goatee": 0.9 * goatee,
        "full": 0.92 * np.maximum(full, moustache),
    }[person.beard]
    hairs = 1 + 0.10 * waves(rest * [1, 0.35, 1], rng, 0.0026, 16)
    color = np.array(person.hair.color) * 0.8
    color = np.minimum(color, np.array(person.skin) * 0.85)
    _mix(canvas[..., :3], color, front * amount * np.clip(hairs, 0.7, 1.2))


def _scalp(
    person: Person, canvas: np.ndarray, theta: np.ndarray, v: np.ndarray, scalp: np.ndarray
) -> None:
    """Hair painted on the skin, so that no bald patch shows under the shell or through a part."""
    kept = hair.hairline(theta, person.hair, person.back.undercut)
    natural = hair.hairline(theta, person.hair)
    grown = smoothstep(0.012, -0.012, v - kept)
    shaved = 0.45 * smoothstep(0.012, -0.012, v - natural)
    amount = person.hair.painted * np.maximum(grown, shaved)
    _mix(canvas[..., :3], scalp[..., :3] * 0.85, amount)
    canvas[..., 3] *= 1 - 0.7 * amount


def _clothes(
    person: Person, canvas: np.ndarray, theta: np.ndarray, v: np.ndarray, rest: np.ndarray
) -> None:
    collar = person.collar + 0.022 * np.cos(theta)
    cloth = np.broadcast_to(np.array(person.cloth, np.float32), (*v.shape, 3)).copy()
    trim = np.array(person.cloth_trim)
    if person.cloth_pattern == "stripes":
        _mix(cloth, trim, smoothstep(-0.2, 0.2, np.sin(v * 2 * np.pi / 0.035)))
    elif person.cloth_pattern == "checks":
        squares = np.sin(v * 2 * np.pi / 0.04) * np.sin(theta * 14)
        _mix(cloth, trim, 0.7 * smoothstep(-0.15, 0.15, squares))
    _mix(cloth, trim * 0.8, smoothstep(0.014, 0.008, v - collar))
    amount = smoothstep(-0.0025, 0.0025, v - collar)
    _mix(canvas[..., :3], cloth, amount)
    canvas[..., 3] *= 1 - amount


def _hair_color(person: Person, side: int) -> np.ndarray:
    """Hair by angle and tau: strands that run down, a dyed or shaved back."""
    _, tau, theta, _ = _rest(side)
    rng = np.random.default_rng([person.texture_seed, 3])
    style, back = person.hair, person.back
    if style.curl > 0 or not style.shell:
        radius = np.stack([np.cos(theta), np.sin(theta), 4 * tau], -1)
        strands = 0.7 * waves(radius, rng, 0.16, 12) + 0.5 * waves(radius, rng, 0.07, 12)
    else:
        run = np.stack([10 * np.cos(theta), 10 * np.sin(theta), 1.6 * tau], -1)
        strands = waves(run, rng, 1.6, 12) * 0.6 + waves(run, rng, 0.6, 14) * 0.7
    color = np.array(style.color, np.float32)
    canvas = np.zeros((side, side, 4), np.float32)
    light = 1 + style.strands * strands - style.roots * (1 - smoothstep(0.0, 0.18, tau))
    canvas[..., :3] = color * np.clip(light, 0.35, 1.7)[..., None] + 0.012
    amount = _pattern(person, theta, tau)
    dye = np.array(back.color) * np.clip(light, 0.6, 1.4)[..., None]
    _mix(canvas[..., :3], dye, amount)
    canvas[..., 3] = 0.13 if style.shell and style.curl == 0 else 0.04
    return canvas


def _pattern(person: Person, theta: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """How much of the back's colour lies over the hair, 0 to 1."""
    back, repeat = person.back, person.back.repeat
    behind = np.pi - np.abs(theta)  # 0 in the middle of the back
    where = smoothstep(1.35, 1.20, behind)
    if back.pattern == "bands":
        return where * smoothstep(-0.2, 0.2, np.sin(tau * 2 * np.pi * repeat / 0.5))
    if back.pattern == "stripes":
        return where * smoothstep(-0.2, 0.2, np.cos(behind * 2 * np.pi * repeat / 2.4))
    if back.pattern == "chevrons":
        return where * smoothstep(
            -0.2, 0.2, np.sin((tau + 0.16 * behind) * 2 * np.pi * repeat / 0.5)
        )
    if back.pattern == "spots":
        spots = np.cos(behind * 2 * np.pi * repeat / 2.0) * np.cos(tau * 2 * np.pi * repeat / 0.5)
        return where * smoothstep(0.25, 0.45, spots)
    if back.pattern == "half":
        return smoothstep(0.0, 0.06, np.where(np.abs(theta) > 1.5, np.sin(theta), -1))
    if back.pattern == "tips":
        end = hair.ends(theta, person)
        return where * smoothstep(-0.16, -0.10, tau - end)
    return np.zeros_like(tau)


def _eye(person: Person, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # The tile shows the eyeball by angle from the line of sight, 1.45 radians at its rim.
    angle = 2 * 1.45 * np.hypot(x - 0.5, y - 0.5)
    turn = np.arctan2(y - 0.5, x - 0.5)
    radius = EYE_RADIUS * np.sin(np.minimum(angle, np.pi / 2))
    canvas = np.zeros((*x.shape, 4), np.float32)
    rgb = canvas[..., :3]
    rgb[:] = [0.93, 0.91, 0.89]
    _mix(rgb, [0.85, 0.62, 0.58], 0.6 * smoothstep(0.008, 0.0145, radius))
    edge = 0.0005
    iris = smoothstep(IRIS_RADIUS + edge, IRIS_RADIUS - edge, radius)
    color = np.array(person.iris)
    _mix(rgb, color * 0.35, iris)
    inner = smoothstep(IRIS_RADIUS - 0.0006, IRIS_RADIUS - 0.0016, radius)
    rays = 1 + 0.18 * np.sin(turn * 17) * np.sin(turn * 11 + 1)
    _mix(rgb, color * rays[..., None] * 1.15, inner)
    _mix(rgb, color * 1.6 + 0.06, inner * 0.6 * np.exp(-(((radius - 0.0038) / 0.0010) ** 2)))
    _mix(rgb, [0.02, 0.02, 0.02], smoothstep(PUPIL_RADIUS + edge, PUPIL_RADIUS - edge, radius))
    # The upper lid's shadow, and a window's reflection.
    _mix(rgb, [0.15, 0.10, 0.09], 0.45 * smoothstep(0.40, 0.30, y))
    glint = np.hypot(x - 0.5 - 0.045, y - 0.5 + 0.055)
    _mix(rgb, [1, 1, 1], 0.95 * smoothstep(0.040, 0.024, glint))
    canvas[..., 3] = 0.25
    return canvas


def _ear(person: Person, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius = 2 * np.hypot(x - 0.5, y - 0.5)
    skin = np.array(person.skin)
    canvas = np.zeros((*x.shape, 4), np.float32)
    rgb = canvas[..., :3]
    rgb[:] = skin * [1.0, 0.93, 0.92]
    fold = np.exp(-(((radius - 0.60) / 0.10) ** 2)) * smoothstep(0.8, 0.6, y)
    _mix(rgb, skin * [0.72, 0.50, 0.46], 0.8 * fold)
    canal = np.exp(-((np.hypot(x - 0.40, y - 0.52) / 0.13) ** 2))
    _mix(rgb, skin * [0.42, 0.27, 0.24], 0.85 * canal)
    canvas[..., 3] = 0.05
    return canvas


def _mouth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    canvas = np.zeros((*x.shape, 4), np.float32)
    rgb = canvas[..., :3]
    rgb[:] = [0.20, 0.06, 0.06]
    _mix(rgb, [0.04, 0.01, 0.012], np.exp(-(((y - 0.47) / 0.2) ** 2)))
    tongue = smoothstep(0.56, 0.66, y) * smoothstep(0.34, 0.26, np.abs(x - 0.5))
    _mix(rgb, [0.55, 0.22, 0.22], 0.8 * tongue * smoothstep(0.98, 0.9, y))
    return canvas


def _teeth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    canvas = np.zeros((*x.shape, 4), np.float32)
    rgb = canvas[..., :3]
    rgb[:] = [0.93, 0.91, 0.85]
    gaps = np.abs(np.sin(np.pi * (x - 0.5) * 10))
    _mix(rgb, [0.45, 0.36, 0.32], 0.55 * smoothstep(0.20, 0.05, gaps))
    _mix(rgb, [0.62, 0.30, 0.30], smoothstep(0.30, 0.16, y))
    _mix(rgb, [0.25, 0.12, 0.11], smoothstep(0.32, 0.5, np.abs(x - 0.5)))
    canvas[..., 3] = 0.12
    return canvas

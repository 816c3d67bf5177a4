"""Small random scenes of every awkward kind, and how far from the oracle a backend may be."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels import binning, blend, oracle, project, rasterize, rasterizer
from kernels.backends import Backend
from kernels.bench.scenes import Scene

KINDS = (
    "ordinary",
    "deep",  # all on one ray, opaque enough for pixels to end
    "huge",  # larger than the image
    "needles",  # a thousand times longer than wide
    "points",  # no extent of their own
    "scattered",  # mostly off the image, some behind the camera
    "faint",  # around 1/255
    "ties",  # in pairs of equal depth
    "bright",  # colours from 0.01 to 10,000
    "stack",  # nearly opaque, and as wide as the image: one hides the other
    "nothing",  # not one is drawn
)


def random_scenes(
    seed: int, images: int, num: int, channels: int, width: int, height: int
) -> Scene:
    """A batch of scenes, every kind in turn, in an order drawn; the same for the same seed."""
    rng = np.random.default_rng(seed)
    kinds = np.resize(rng.permutation(KINDS), images)
    scenes = [_scene(rng, kind, num, channels, width, height) for kind in kinds]
    return Scene(*(np.stack(arrays).astype(np.float32) for arrays in zip(*scenes, strict=True)))


def _scene(rng, kind, num, channels, width, height) -> Scene:
    means = rng.normal(0.0, [0.4, 0.4, 0.5], (num, 3))
    scales = 0.1 * np.exp(0.7 * rng.normal(size=(num, 3)))
    opacities = rng.uniform(0.1, 1.0, num)
    colors = rng.uniform(-1.0, 1.0, (num, channels))
    if kind == "deep":
        means[:, :2] *= 0.02
        opacities = rng.uniform(0.5, 1.0, num)
    elif kind == "huge":
        scales *= 30.0
    elif kind == "needles":
        scales *= [5.0, 5e-3, 5e-3]
    elif kind == "points":
        scales *= 1e-6
    elif kind == "scattered":
        means *= [6.0, 6.0, 6.0]
    elif kind == "faint":
        opacities = rng.uniform(0.5, 4.0, num) / 255
    elif kind == "ties":
        means[1::2, 2] = means[: num - 1 : 2, 2][: len(means[1::2])]
    elif kind == "bright":
        colors = 10 ** rng.uniform(-2.0, 4.0, (num, channels))
    elif kind == "stack":
        scales[:, :2] *= 10.0
        opacities = rng.uniform(0.9, 1.0, num)
    elif kind == "nothing":
        opacities = np.zeros(num)
    # An upright camera, so that equal z stays equal in float32.
    viewmat = np.eye(4)
    viewmat[:3, 3] = rng.uniform([-0.2, -0.2, 2.0], [0.2, 0.2, 3.0])
    focal = rng.uniform(0.8, 2.0) * max(width, height)
    K = np.array([[focal, 0, width * 0.47], [0, 1.1 * focal, height * 0.55], [0, 0, 1]])
    return Scene(
        means, rng.normal(size=(num, 4)), scales, opacities, colors, viewmat, K,
    )  # fmt: skip


@functools.cache
def _compiled(width: int, height: int, antialiased: bool, capacity: int, backend: Backend):
    """Gradients of sum(weights * outputs) by every input, and the outputs, compiled once."""

    def loss(inputs, weights):
        *arrays, background = inputs
        out = rasterize(
            *arrays, background=background, width=width, height=height,
            antialiased=antialiased, capacity=capacity, overflow="count",
        )  # fmt: skip
        return sum(jnp.sum(w * a) for w, a in zip(weights, out[:3], strict=True)), out

    return jax.jit(jax.grad(loss, has_aux=True))


def check_against_oracle(
    scenes: Scene, seed: int, *, width: int, height: int, antialiased: bool = False, capacity: int
) -> None:
    """Images to a mean of 2e-5 and a maximum of 5e-3, gradients to 1e-3 of their size.

    Colours over 1 to as much of themselves.

    The scenes take turns in whose gradient is compared, means, quats and so on, with the oracle's
    central difference along a random direction. Pixels where rounding may decide what is drawn
    count in neither.
    """
    rng = np.random.default_rng(seed)
    images, channels = len(scenes.means), scenes.colors.shape[-1]
    inputs = (*scenes, rng.uniform(size=(images, channels)).astype(np.float32))

    def oracle_render(arrays):
        *arrays, background = arrays
        return oracle.render(
            *arrays, background=background, width=width, height=height, antialiased=antialiased
        )

    references = [oracle_render([a[i] for a in inputs]) for i in range(images)]
    expected = [np.stack(values) for values in zip(*(r[:3] for r in references), strict=True)]
    sure = np.stack([~reference.fragile for reference in references])
    weights = [
        rng.normal(size=a.shape) * sure.reshape(*sure.shape, *[1] * (a.ndim - 3)) for a in expected
    ]
    render = _compiled(width, height, antialiased, capacity, rasterizer.choose_backend("auto"))
    gradients, out = render(inputs, [w.astype(np.float32) for w in weights])

    np.testing.assert_array_equal(out.overflow, 0)
    for name, image, reference in zip(out._fields[:3], out[:3], expected, strict=True):
        unit = np.maximum(np.abs(reference), 1.0) if name == "color" else 1.0
        errors = (np.abs(np.asarray(image) - reference) / unit)[sure]
        assert errors.mean() < 2e-5, name
        assert errors.max() < 5e-3, name

    names = (*scenes._fields, "background")
    for i in range(images):
        field = (seed + i) % len(inputs)
        name = names[field]
        depths = scenes.means[i, :, 2]  # Up to the camera's offset.
        if name in ("means", "viewmats") and len(np.unique(depths)) < len(depths):
            continue  # Any move changes which of two is in front: there is no derivative.
        # Scales move by parts of themselves: a needle is thinner than what is little elsewhere.
        unit = inputs[field][i].astype(np.float64) if name == "scales" else 1.0
        gradient = np.asarray(gradients[field][i], np.float64) * unit
        direction = rng.normal(size=gradient.shape)
        step = 1e-5 if name == "Ks" else 1e-6  # Ks are in pixels: tens, where others are ones
        sides = []
        for sign in (-1, 1):
            moved = [np.asarray(a[i], np.float64) for a in inputs]
            moved[field] = moved[field] + sign * step * unit * direction
            outputs = oracle_render(moved)[:3]
            sides.append(sum(np.sum(w[i] * a) for w, a in zip(weights, outputs, strict=True)))
        difference = (sides[1] - sides[0]) / (2 * step)
        # Along a random direction a gradient changes the loss by about its own length.
        error = abs(np.sum(gradient * direction) - difference)
        assert error <= 1e-3 * np.linalg.norm(gradient) + 1e-6, (name, i)


def check_edges_of_capacity(
    seed: int, images: int, *, tile: tuple[int, int], slots: int, capacity: int,
    width: int, height: int,
) -> None:  # fmt: skip
    """Scenes that fill their capacity are the oracle's. What is too much for it is counted.

    And that, the farthest, changes no bit of images and gradients.

    Args:
      tile: width and height of what has room for so many `slots` if `capacity` is asked for.
    """
    size = {"width": width, "height": height}
    rng = np.random.default_rng(seed)
    scenes = random_scenes(seed, images, num=20, channels=3, **size)
    splats = project(*scenes[:4], *scenes[5:], **size)
    boxes = jax.vmap(functools.partial(binning.tile_boxes, tile=tile, **size))
    taken = np.prod(boxes(splats)[1], -1)
    # As many of the scene's own as fit, and specks far behind them, a slot each, for the rest.
    kept = np.zeros(taken.shape, bool)
    for i, n in np.ndindex(taken.shape):
        kept[i, n] = taken[i, kept[i]].sum() + taken[i, n] <= slots
    specks = slots - np.sum(taken * kept, -1)
    place = np.arange(slots + images)
    z = 30.0 + 0.1 * np.broadcast_to(place, (images, len(place)))
    centre = np.minimum(tile, [width, height]) / 2 + rng.uniform(-0.7, 0.7, (*z.shape, 2))
    focal, middle = scenes.Ks[:, None, [0, 1], [0, 1]], scenes.Ks[:, None, :2, 2]
    means = np.concatenate([(centre - middle) / focal * z[..., None], z[..., None]], -1)
    means -= scenes.viewmats[:, None, :3, 3]

    def with_specks(more):
        drawn = place < (specks + more)[:, None]
        own = scenes.opacities * kept
        added = (means, rng.normal(size=(*z.shape, 4)), np.full(means.shape, 1e-3), 0.1 * drawn)
        gaussians = zip((*scenes[:3], own), added, strict=True)
        arrays = [np.concatenate(pair, 1).astype(np.float32) for pair in gaussians]
        colors = np.concatenate([scenes.colors, np.float32(np.abs(means))], 1)
        return Scene(*arrays, colors, *scenes[5:])

    full = with_specks(0)
    check_against_oracle(full, seed, capacity=capacity, **size)
    backend = rasterizer.choose_backend("auto")
    render = _compiled(width, height, False, capacity, backend)
    more = 1 + np.arange(images)
    over = full._replace(opacities=with_specks(more).opacities)
    background = np.ones((images, 3), np.float32)
    weights = [np.ones((images, height, width, *c), np.float32) for c in [(3,), (), ()]]
    fits, cut = (render((*scene, background), weights) for scene in (full, over))
    np.testing.assert_array_equal(cut[1].overflow, more)
    cut = cut[0], cut[1]._replace(overflow=fits[1].overflow)
    jax.tree.map(np.testing.assert_array_equal, cut, fits)


def check_gradients_behind_bright_splats() -> None:
    """One pixel, a stack of flat splats, the nearest ten thousand times as bright as the others.

    Each opacity's gradient is right to 1e-4 of itself, also of those whose share in the pixel is
    lost among the bright one's digits.
    """
    opacities = np.array([0.37, 0.41, 0.53, 0.61, 0.2, 0.3, 0.1, 0.25])
    colors = np.array([1e4, 0.3, 0.4, 0.35, 0.9, 0.2, 0.7, 0.1])
    num = len(opacities)
    transmittance = np.cumprod(np.concatenate([[1.0], 1 - opacities]))[:-1]
    shares = transmittance * opacities * colors
    behind = np.sum(shares) - np.cumsum(shares)
    expected = transmittance * colors - behind / (1 - opacities)

    means = np.stack([np.zeros(num), np.zeros(num), 1.0 + np.arange(num)], -1)
    quats, scales = np.tile([1.0, 0, 0, 0], (num, 1)), np.full((num, 3), 500.0)

    @jax.jit
    @jax.grad
    def gradient(opacities):
        K = np.array([[10.0, 0, 0.5], [0, 10.0, 0.5], [0, 0, 1]])
        out = rasterize(
            means, quats, scales, opacities, colors[:, None], np.eye(4), K,
            width=1, height=1, capacity=num,
        )  # fmt: skip
        return out.color.sum()

    found = gradient(jnp.asarray(opacities, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def check_gradients_of_projected_means(channels: int = 3) -> None:
    """They and their absolute sums, pixel by pixel, are the oracle's central differences.

    In images of several tiles, to 1e-3 of the largest.
    """
    images, num, step, size = 3, 12, 1e-6, {"width": 21, "height": 18}
    scenes = random_scenes(36, images, num, channels, **size)  # bright, ordinary, stack
    weights = np.random.default_rng(1).normal(size=(images, 18, 21, channels))
    splats = project(*scenes[:4], *scenes[5:], **size)
    expected = np.zeros((2, images, num, 2))
    for i in range(images):
        exact = oracle.project(*(a[i] for a in (*scenes[:4], *scenes[5:])), **size)
        weights[i] *= ~oracle.blend(exact, scenes.colors[i], **size).fragile[..., None]
        for n, axis in np.ndindex(num, 2):
            sides = []
            for sign in (-1, 1):
                means = exact.means.copy()
                means[n, axis] += sign * step
                image = oracle.blend(exact._replace(means=means), scenes.colors[i], **size)
                sides.append(np.sum(weights[i] * image.color, -1))
            by_pixel = (sides[1] - sides[0]) / (2 * step)
            expected[:, i, n, axis] = by_pixel.sum(), np.abs(by_pixel).sum()
    assert (np.abs(expected).max((2, 3)) > 0.01).all()

    def loss(splats, absgrad):
        out = blend(splats, scenes.colors, absgrad=absgrad, capacity=256, **size)
        return jnp.sum(out.color * weights.astype(np.float32))

    zeros = jnp.zeros_like(splats.means)
    gradients, absolute = jax.jit(jax.grad(loss, argnums=(0, 1)))(splats, zeros)
    for found, right in zip((gradients.means, absolute), expected, strict=True):
        atol = 1e-3 * np.abs(right).max((1, 2), keepdims=True)
        assert (np.abs(found - right) <= atol).all()

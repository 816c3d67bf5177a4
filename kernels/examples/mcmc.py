"""3DGS-MCMC: a scene's Gaussians as samples, of which there are always as many.

Kheradmand et al., 3D Gaussian Splatting as Markov Chain Monte Carlo (NeurIPS 2024). Nothing is
cloned, split or pruned, so that all shapes are static: Adam's step is followed by noise that lets
Gaussians that are hardly seen wander, and those that have died (opacity under 0.005) are put where
others are. Opacities and scales are regularised, so that what isn't needed dies.

Gaussians are optimised as `Parameters`: means, quats, scales (logarithms), opacities (logits), and
coefficients of spherical harmonics, sh0 [N, 1, 3] and shN [N, K - 1, 3].
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int
from scipy.spatial import cKDTree

from kernels.ply import SH_C0

Parameters = dict[str, Array]

LEARNING_RATES = {
    **{"means": 1.6e-4, "quats": 1e-3, "scales": 5e-3, "opacities": 5e-2},
    **{"sh0": 2.5e-3, "shN": 2.5e-3 / 20},
}
"""Those of 3D Gaussian Splatting; that of the means is in scene sizes and falls to a hundredth."""

DEAD = 0.005
"""Opacity of a Gaussian that is moved elsewhere."""
NOISE = 5e5
"""Size of the noise, in learning rates of the means."""
MOST = 51
"""Gaussians, itself included, that one may be split into at a time."""
MOST_OPAQUE = 1 - 1e-5
"""Opacity that is shared of a Gaussian that has more: its sum cancels too much at 1."""
SSIM_WEIGHT, OPACITY_WEIGHT, SCALE_WEIGHT = 0.2, 0.01, 0.01


def start(
    points: Float[np.ndarray, "P 3"],
    colors: Float[np.ndarray, "P 3"],
    num: int,
    coefficients: int,
    rng: np.random.Generator,
) -> Parameters:
    """`num` Gaussians at the points of a capture; half opaque, a tenth of their spacing in size.

    Of more points some are left out; of fewer some are repeated, moved about by their spacing.
    """
    spacing = _spacing(points)
    place = np.arange(num)
    if num <= len(points):
        place = rng.choice(len(points), num, replace=False)
    moved = (place >= len(points))[:, None]
    place = place % len(points)
    means = points[place] + moved * spacing[place, None] * rng.normal(size=(num, 3))
    parameters = {
        "means": means,
        "quats": rng.normal(size=(num, 4)),
        "scales": np.tile(np.log(0.1 * spacing[place])[:, None], (1, 3)),
        "opacities": np.zeros(num),
        "sh0": (colors[place][:, None] - 0.5) / SH_C0,
        "shN": np.zeros((num, coefficients - 1, 3)),
    }
    return {name: jnp.asarray(a, jnp.float32) for name, a in parameters.items()}


def _spacing(points: Float[np.ndarray, "P 3"]) -> Float[np.ndarray, "P"]:
    """Root mean square distance of each point to its three nearest."""
    nearest = min(4, len(points))
    distances = cKDTree(points).query(points, k=nearest)[0].reshape(len(points), nearest)[:, 1:]
    size = max(float(np.linalg.norm(np.ptp(points, axis=0))), 1e-6)
    mean2 = np.mean(distances**2, -1) if nearest > 1 else np.full(len(points), size**2)
    return np.maximum(np.sqrt(mean2), 1e-6 * size)


def optimiser(steps: int, size: float) -> optax.GradientTransformation:
    """Adam with a learning rate for each of the parameters; `size` of the scene in world units."""
    rates = dict(LEARNING_RATES)
    rates["means"] = means_rate(steps, size)
    return optax.multi_transform(
        {name: optax.adam(rate, eps=1e-15) for name, rate in rates.items()},
        {name: name for name in rates},
    )


def means_rate(steps: int, size: float) -> optax.Schedule:
    """The learning rate of the means, in world units."""
    return optax.exponential_decay(LEARNING_RATES["means"] * size, steps, 0.01)


def loss(
    parameters: Parameters, image: Float[Array, "V H W 3"], target: Float[Array, "V H W 3"]
) -> Float[Array, ""]:
    """L1 and SSIM of the images, and the sizes of opacities and scales."""
    difference = jnp.mean(jnp.abs(image - target))
    return (
        (1 - SSIM_WEIGHT) * difference
        + SSIM_WEIGHT * (1 - jnp.mean(ssim(image, target)))
        + OPACITY_WEIGHT * jnp.mean(jax.nn.sigmoid(parameters["opacities"]))
        + SCALE_WEIGHT * jnp.mean(jnp.exp(parameters["scales"]))
    )


def ssim(a: Float[Array, "V H W 3"], b: Float[Array, "V H W 3"]) -> Float[Array, "V h w 3"]:
    """Structural similarity of pictures in [0, 1], in windows of 11x11 pixels (Wang et al., 2004).

    Of smaller pictures the windows are as large as they.
    """
    size = min(11, *a.shape[1:3])
    weights = np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / 1.5) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)

    def blur(images):
        """[n, H, W], each axis in turn."""
        images = images[:, None]
        for shape in ((1, 1, size, 1), (1, 1, 1, size)):
            images = jax.lax.conv_general_dilated(
                images, weights.reshape(shape), (1, 1), "VALID", precision="highest"
            )
        return images[:, 0]

    # All at once: five pictures, and each channel on its own.
    moments = jnp.stack([a, b, a * a, b * b, a * b])
    blurred = blur(rearrange(moments, "m v h w c -> (m v c) h w"))
    mean_a, mean_b, square_a, square_b, product = rearrange(
        blurred, "(m v c) h w -> m v h w c", m=5, c=a.shape[-1]
    )
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * covariance + c2) / (variances + c2)
    return structure * (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)


def add_noise(parameters: Parameters, key: Array, rate: Array) -> Parameters:
    """Moves the means by noise of each Gaussian's own shape, the fainter the farther.

    `rate` is the learning rate of the means.
    """
    opacities = jax.nn.sigmoid(parameters["opacities"])
    wander = jax.nn.sigmoid(-100 * (opacities - DEAD))
    factor = _axes(parameters)
    noise = jax.random.normal(key, parameters["means"].shape)
    # The covariance is factor factor^T.
    noise = jnp.einsum("nij,nkj,nk->ni", factor, factor, noise)
    return parameters | {"means": parameters["means"] + NOISE * rate * wander[:, None] * noise}


def _axes(parameters: Parameters) -> Float[Array, "N 3 3"]:
    """Columns are the axes of the ellipsoids, one standard deviation long."""
    w, x, y, z = (
        parameters["quats"] / jnp.linalg.norm(parameters["quats"], axis=-1, keepdims=True)
    ).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    rotations = jnp.moveaxis(jnp.array(rows), -1, 0)
    return rotations * jnp.exp(parameters["scales"])[:, None]


def relocate(parameters: Parameters, moments: optax.OptState, key: Array):
    """Puts the dead where others are, drawn by opacity, and has these share their place.

    Returns parameters, Adam's state, in which those who share start anew, and how many were moved.
    """
    opacities = jax.nn.sigmoid(parameters["opacities"])
    dead = opacities <= DEAD
    # Without any that live, all stay.
    dead &= jnp.any(~dead)
    source, number = _draw(opacities, dead, key)
    shares = number > 1
    opacity, shrink = share(opacities, number)
    fresh = {
        "opacities": jnp.where(shares, jax.scipy.special.logit(opacity), parameters["opacities"]),
        "scales": parameters["scales"] + jnp.where(shares, jnp.log(shrink), 0.0)[:, None],
    }
    parameters = jax.tree.map(lambda a: a[source], parameters | fresh)
    anew = shares[source]
    num = len(dead)

    def reset(a):
        if a.ndim == 0 or a.shape[0] != num:
            return a
        return jnp.where(anew.reshape(num, *[1] * (a.ndim - 1)), 0.0, a)

    return parameters, jax.tree.map(reset, moments), jnp.sum(dead)


def _draw(
    opacities: Float[Array, "N"], dead: Bool[Array, "N"], key: Array
) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """Whose place each takes (its own, unless it is dead), and among how many each is shared."""
    chances = jnp.where(dead, -jnp.inf, jnp.log(opacities))
    drawn = jax.random.categorical(key, chances, shape=opacities.shape)
    source = jnp.where(dead, drawn, jnp.arange(len(opacities)))
    return source, jnp.zeros(len(opacities), jnp.int32).at[source].add(1)


def share(
    opacities: Float[Array, "N"], number: Int[Array, "N"]
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Opacity of each of `number` Gaussians that look as one did, and the factor of their scales.

    The paper's formula, whose double sum over i and k is one over binomials if i goes first.
    """
    number = jnp.clip(number, 1, MOST)
    opacities = jnp.minimum(opacities, MOST_OPAQUE)
    opacity = 1 - (1 - opacities) ** (1 / number)
    opacity = jnp.clip(opacity, DEAD, 1 - 1e-6)

    def add(j, state):
        term, total = state
        term = -term * opacity * (number - j + 1) / j
        return term, total - term / jnp.sqrt(j)

    zeros = jnp.zeros_like(opacity)
    _, total = jax.lax.fori_loop(1, MOST + 1, add, (zeros + 1.0, zeros))
    return opacity, opacities / total

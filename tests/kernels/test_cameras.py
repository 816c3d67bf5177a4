"""Cameras that bend or have no perspective, held to float64 and OpenCV's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_scenes import random_scenes

from kernels import count_capacity, oracle, rasterize

SIZE = {"width": 17, "height": 15}

pytestmark = pytest.mark.usefixtures("quick_compilation")

CAMERAS = {
    "ortho": ("ortho", (), ()),
    "radial": ("pinhole", (-0.3, 0.12), ()),
    "tangential": ("pinhole", (), (0.02, -0.03)),
    "opencv": ("pinhole", (0.2, -0.1, 0.05, 0.03, 0.02, 0.01), (0.02, -0.03)),
    "fisheye": ("fisheye", (), ()),
    "bent_fisheye": ("fisheye", (0.08, -0.02, 0.01, 0.003), ()),
}


def to_plane(model, k, p, x, y, z):
    """By OpenCV's documentation; one point."""
    if model == "ortho":
        return np.array([x, y])
    a, b = x / z, y / z
    r = np.hypot(a, b)
    if model == "fisheye":
        angle = np.arctan(r)
        bent = angle * (1 + sum(c * angle ** (2 * i + 2) for i, c in enumerate(k)))
        return np.array([a, b]) * (bent / r)
    k1, k2, k3, k4, k5, k6 = [*k, *[0.0] * (6 - len(k))]
    p1, p2 = p or (0.0, 0.0)
    g = (1 + k1 * r**2 + k2 * r**4 + k3 * r**6) / (1 + k4 * r**2 + k5 * r**4 + k6 * r**6)
    return np.array(
        [
            a * g + 2 * p1 * a * b + p2 * (r**2 + 2 * a**2),
            b * g + p1 * (r**2 + 2 * b**2) + 2 * p2 * a * b,
        ]
    )


def reference(model, arrays):
    """One image in float64: the Jacobian is a central difference."""
    means, quats, scales, opacities, colors, viewmat, K, k, p = (
        np.asarray(a, np.float64) for a in arrays
    )
    points = means @ viewmat[:3, :3].T + viewmat[:3, 3]
    focal, centre = np.diag(K)[:2], K[:2, 2]
    covariances = []
    for point, (w, a, b, c), scale in zip(points, quats, scales, strict=True):
        n = np.sqrt(w * w + a * a + b * b + c * c)
        w, a, b, c = w / n, a / n, b / n, c / n
        R = np.array(
            [
                [1 - 2 * (b * b + c * c), 2 * (a * b - w * c), 2 * (a * c + w * b)],
                [2 * (a * b + w * c), 1 - 2 * (a * a + c * c), 2 * (b * c - w * a)],
                [2 * (a * c - w * b), 2 * (b * c + w * a), 1 - 2 * (a * a + b * b)],
            ]
        )
        sides = [
            [to_plane(model, k, tuple(p), *(point + sign * 1e-4 * axis)) for axis in np.eye(3)]
            for sign in (-1, 1)
        ]
        J = focal[:, None] * (np.array(sides[1]) - sides[0]).T / 2e-4
        M = J @ viewmat[:3, :3] @ R * scale
        covariances.append(M @ M.T + 0.3 * np.eye(2))
    plane = np.array([to_plane(model, k, tuple(p), *point) for point in points])
    splats = oracle.OracleSplats(
        focal * plane + centre, np.array(covariances), opacities, points[:, 2]
    )
    return oracle.blend(splats, colors, **SIZE)


def scene_for(name):
    """A scene in front of the camera, of ordinary Gaussians, off the axis too."""
    rng = np.random.default_rng(7)
    _, k, p = CAMERAS[name]
    focal = 6.0 if name != "ortho" else 9.0
    return [
        rng.normal(0.0, [0.6, 0.6, 0.3], (12, 3)),
        rng.normal(size=(12, 4)),
        0.15 * np.exp(0.4 * rng.normal(size=(12, 3))),
        rng.uniform(0.3, 0.9, 12),
        rng.uniform(0.0, 1.0, (12, 3)),
        np.array([[0.96, 0, 0.28, 0], [0, 1, 0, 0.1], [-0.28, 0, 0.96, 1.5], [0, 0, 0, 1]]),
        np.array([[focal, 0, 8.2], [0, 1.1 * focal, 7.4], [0, 0, 1]]),
        np.array(k),
        np.array(p),
    ]


@pytest.mark.parametrize("name", CAMERAS)
def test_images_and_gradients_are_those_of_float64(name):
    model, *_ = CAMERAS[name]
    arrays, rng = scene_for(name), np.random.default_rng(2)
    expected = reference(model, arrays)
    weights = rng.normal(size=expected.color.shape) * ~expected.fragile[..., None]

    def loss(arrays):
        *scene, k, p = arrays
        out = rasterize(
            *scene, camera_model=model, radial_coeffs=k if len(k) else None,
            tangential_coeffs=p if len(p) else None, capacity=256, **SIZE,
        )  # fmt: skip
        return jnp.sum(out.color * weights.astype(np.float32)), out

    single = [jnp.asarray(a, jnp.float32) for a in arrays]
    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(single)
    sure = ~expected.fragile
    assert expected.alpha.max() > 0.3
    for field in ("color", "alpha", "depth"):
        errors = np.abs(np.asarray(getattr(out, field)) - getattr(expected, field))[sure]
        assert errors.max() < 2e-4, field
    for number, gradient in enumerate(gradients):
        if not gradient.size:
            continue
        direction = rng.normal(size=gradient.shape)
        step, sides = 1e-6, []
        for sign in (-1, 1):
            moved = [np.asarray(a, np.float64) for a in single]
            moved[number] = moved[number] + sign * step * direction
            sides.append(np.sum(weights * reference(model, moved).color))
        difference = (sides[1] - sides[0]) / (2 * step)
        error = abs(np.sum(gradient * direction) - difference)
        assert error <= 2e-3 * np.linalg.norm(gradient) + 1e-5, number


def test_what_lies_where_the_distortion_folds_back_is_not_drawn():
    """With k1 = -0.3 the distorted radius grows up to r = 1.05 and then comes back."""
    K, flat = np.array([[6.0, 0, 8.5], [0, 6.0, 7.5], [0, 0, 1]]), np.float32([[1, 0, 0, 0]])
    for x, drawn in (0.9, True), (1.2, False), (1.8, False), (1e6, False):
        out = rasterize(
            np.float32([[x, 0, 1]]), flat, np.full((1, 3), 0.3), np.ones(1), np.ones((1, 1)),
            np.eye(4), K, radial_coeffs=np.float32([-0.3]), capacity=64, **SIZE,
        )  # fmt: skip
        assert bool(out.alpha.any()) == drawn
        assert np.isfinite(out.color).all()


def test_a_fisheye_sees_nearly_half_of_the_world():
    K = np.array([[5.0, 0, 8.5], [0, 5.0, 7.5], [0, 0, 1]])
    angle = np.radians(85)
    out = rasterize(
        np.float32([[np.sin(angle), 0, np.cos(angle)]]), np.float32([[1, 0, 0, 0]]),
        np.full((1, 3), 0.05), np.ones(1), np.ones((1, 1)), np.eye(4), K,
        camera_model="fisheye", capacity=64, **SIZE,
    )  # fmt: skip
    row, column = np.unravel_index(np.argmax(out.alpha), out.alpha.shape)
    assert (row, column) == (7, int(8.5 + 5 * angle))


def test_coefficients_of_each_camera_and_of_all_go_with_batches():
    batch = random_scenes(3, images=2, num=6, channels=3, **SIZE)
    shared = np.float32([-0.1, 0.01])
    one = rasterize(*batch, radial_coeffs=shared, capacity=128, **SIZE)
    each = rasterize(*batch, radial_coeffs=np.stack([shared] * 2), capacity=128, **SIZE)
    jax.tree.map(np.testing.assert_array_equal, one, each)
    assert count_capacity(*batch[:4], *batch[5:], radial_coeffs=shared, **SIZE) >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(camera_model="spherical"), "camera_model is 'spherical'; expected one of pinhole"),
        (dict(camera_model=["pinhole"]), r"camera_model is \['pinhole'\]; expected one of pinhole"),
        (dict(camera_model="ortho", radial_coeffs=np.zeros(1)), "expected up to 0 for 'ortho'"),
        (dict(camera_model="fisheye", radial_coeffs=np.zeros(5)), "5 .*up to 4 for 'fisheye'"),
        (dict(camera_model="fisheye", tangential_coeffs=np.zeros(2)), "and None for other cameras"),
        (dict(tangential_coeffs=np.zeros(3)), "tangential_coeffs has 3 coefficients"),
        (dict(radial_coeffs=np.zeros((3, 2))), r"radial_coeffs has shape \(3, 2\); expected"),
        (dict(radial_coeffs=0.1), "radial_coeffs is one number"),
    ],
)
@pytest.mark.usefixtures("any_types")
def test_cameras_that_there_are_not_are_named(settings, message):
    batch = random_scenes(3, images=2, num=6, channels=3, **SIZE)
    with pytest.raises(ValueError, match=message):
        rasterize(*batch, capacity=64, **SIZE, **settings)

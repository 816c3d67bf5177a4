"""The training loss: known values, agreement with a plain reference, gradients one can train on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexavatar_jax.frozen import dinov2
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.published.parity_rule import rule_weights
from flexavatar_jax.training import ssim_tpu
from flexavatar_jax.training.losses import (
    _image_by_image,
    _taps,
    draw_targets,
    l1,
    psnr,
    ssim,
    training_loss,
)
from kernels import backends

CONFIG = {"l1": 0.8, "mse": 0.0, "ssim": 0.2, "dino": 0.0, "sam": 0.0}


def images(seed: int, *shape: int) -> np.ndarray:
    """Smooth random images in [0, 1] with noise on top, as renderings have."""
    rng = np.random.default_rng(seed)
    *batch, height, width = shape
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    phase = rng.uniform(0, 6, (*batch, 1, 1, 3))
    smooth = 0.5 + 0.4 * np.sin(5 * x[..., None] + 7 * y[..., None] + phase)
    return np.clip(smooth + 0.05 * rng.standard_normal(smooth.shape), 0, 1).astype(np.float32)


def reference_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of two [h, w, c] images by its definition, window by window, in float64."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window = (window / window.sum())[..., None]
    a, b = (np.pad(i.astype(np.float64), ((5, 5), (5, 5), (0, 0))) for i in (a, b))
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mean_p, mean_q = (window * p).sum((0, 1)), (window * q).sum((0, 1))
            var_p = (window * p * p).sum((0, 1)) - mean_p**2
            var_q = (window * q * q).sum((0, 1)) - mean_q**2
            cov = (window * p * q).sum((0, 1)) - mean_p * mean_q
            values.append(
                (2 * mean_p * mean_q + 1e-4)
                * (2 * cov + 9e-4)
                / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4))
            )
    return float(np.mean(values))


@pytest.mark.parametrize("size", [(24, 24), (13, 30), (70, 67), (8, 9)])
def test_ssim_is_its_definition_at_any_image_size(size):
    a, b = images(0, 2, *size), images(1, 2, *size)
    expected = [reference_ssim(a[i], b[i]) for i in range(2)]
    np.testing.assert_allclose(ssim(a, b), expected, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 2, 40, 123), (2, 24, 24)])
def test_ssims_kernel_for_tpus_is_ssim_in_value_and_gradients(on_tpu, quick_compilation, shape):
    """Several strips of rows, a border near a register's end, flat parts that divide by C2."""
    a, b = images(0, *shape), images(1, *shape)
    a[..., :9, :9, :] = b[..., :9, :9, :] = 0.5
    grad = jax.value_and_grad(lambda a, b: jnp.sum(ssim(a, b) ** 2), argnums=(0, 1))
    found = grad(a, b)
    with backends.compiling_for("cpu"):
        expected = grad(a, b)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(x - y) < 1e-4 * np.linalg.norm(y)


def test_ssims_kernel_counts_more_than_the_compiler_counts_for_its_value_alone():
    """The window as sums of shifted copies, as the kernel has it, without any gradient."""

    def blur(x):
        for axis in (1, 2):
            x = sum(tap * jnp.roll(x, k, axis) for k, tap in enumerate(_taps()))
        return x

    def value(x, y):
        mx, my, xx, yy, xy = map(blur, (x, y, x * x, y * y, x * y))
        a = (2 * mx * my + 1e-4) * (2 * (xy - mx * my) + 9e-4)
        return a / ((mx * mx + my * my + 1e-4) * (xx - mx * mx + yy - my * my + 9e-4))

    plane = jax.ShapeDtypeStruct((1, 64, 128), jnp.float32)
    counted = jax.jit(value).lower(plane, plane).cost_analysis()["flops"] / (64 * 128)
    assert counted < ssim_tpu.VECTOR_OPS["ssim"] < 3 * counted


def test_equal_images_cost_nothing():
    image = images(0, 2, 32, 32)
    loss, parts = training_loss(image, image, CONFIG)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert set(parts) == {"l1", "ssim"}
    assert float(psnr(image, image)[0]) == np.inf


def test_loss_is_the_weighted_sum_of_its_parts():
    a, b = images(0, 6, 20, 20), images(1, 6, 20, 20)
    loss, parts = training_loss(a, b, CONFIG)
    assert float(parts["l1"]) == pytest.approx(float(np.abs(a - b).mean()), rel=1e-5)
    assert float(parts["ssim"]) == pytest.approx(1 - float(ssim(a, b).mean()), rel=1e-5)
    assert float(loss) == pytest.approx(float(0.8 * parts["l1"] + 0.2 * parts["ssim"]), rel=1e-6)


def test_the_mean_square_error_is_a_part_where_it_has_a_weight():
    a, b = images(0, 2, 16, 16), images(1, 2, 16, 16)
    loss, parts = training_loss(a, b, CONFIG | {"l1": 0.0, "ssim": 0.0, "mse": 2.0})
    assert set(parts) == {"mse"}
    assert float(loss) == pytest.approx(2 * float(((a - b) ** 2).mean()), rel=1e-6)


def test_a_term_of_weight_zero_is_left_out():
    a, b = images(0, 1, 16, 16), images(1, 1, 16, 16)
    loss, parts = training_loss(a, b, CONFIG | {"ssim": 0.0})
    assert set(parts) == {"l1"}
    assert float(loss) == pytest.approx(0.8 * float(l1(a, b)))


def test_psnr_of_a_constant_difference():
    a = images(0, 2, 16, 16)
    np.testing.assert_allclose(psnr(a, a + 0.1), [20, 20], rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_gradients_are_finite_on_flat_images(value):
    """A white background against a white background is the commonest patch there is."""
    flat = jnp.full((1, 16, 16, 3), value)
    for target in (flat, images(1, 1, 16, 16)):
        gradient = jax.grad(lambda p, t=target: training_loss(p, t, CONFIG)[0])(flat)
        assert np.isfinite(gradient).all()


def test_ssim_gradient_is_its_slope():
    a, b = images(0, 20, 20), images(1, 20, 20)
    direction = np.random.default_rng(2).standard_normal(a.shape).astype(np.float32)
    gradient = jax.grad(lambda x: ssim(x, b))(a)
    slope = (
        reference_ssim(a + 1e-3 * direction, b) - reference_ssim(a - 1e-3 * direction, b)
    ) / 2e-3
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-3)


def test_perceptual_terms_wait_for_their_phase_and_then_have_gradients():
    """With a DINOv2 of one head instead of six, which is otherwise the published one."""
    narrow = dinov2.SMALL._replace(width=64)
    frozen = FrozenNetworks(dinov2_small=dinov2.fold(rule_weights(dinov2.shapes(narrow)), narrow))
    config = CONFIG | {"dino": 2.0}
    a, b = images(0, 2, 32, 32), images(1, 2, 32, 32)
    early, parts = training_loss(a, b, config, frozen)
    assert set(parts) == {"l1", "ssim"}

    loss = jax.value_and_grad(
        lambda a: training_loss(a, b, config, frozen, perceptual=True), has_aux=True
    )
    (late, parts), gradient = jax.jit(loss)(a)
    assert float(late) == pytest.approx(float(early + 2 * parts["dino"]), rel=1e-5)
    assert float(parts["dino"]) > 0.01
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).min(axis=(1, 2, 3)).max() > 0


def test_perceptual_terms_can_be_of_some_images_only():
    narrow = dinov2.SMALL._replace(width=64)
    frozen = FrozenNetworks(dinov2_small=dinov2.fold(rule_weights(dinov2.shapes(narrow)), narrow))
    config = CONFIG | {"l1": 0.0, "ssim": 0.0, "dino": 1.0}
    a, b = images(0, 3, 32, 32), images(1, 3, 32, 32)

    def loss(a, judged=None):
        return training_loss(a, b, config, frozen, perceptual=True, judged=judged)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(a, np.array([2]))
    assert (np.abs(gradient).max(axis=(1, 2, 3)) > 0).tolist() == [False, False, True]
    alone = training_loss(a[2:], b[2:], config, frozen, perceptual=True)[0]
    assert float(value) == pytest.approx(float(alone), rel=1e-5)


def test_targets_are_drawn_without_bias_each_example_by_its_own_background():
    background = np.random.default_rng(0).random((3000, 3)).astype(np.float32)
    drawn = np.asarray(draw_targets(background, 5, 2)).reshape(-1, 2)
    np.testing.assert_array_equal(drawn // 5, np.repeat(np.arange(3000)[:, None], 2, axis=1))
    places = drawn % 5
    assert (places[:, 0] != places[:, 1]).all()
    # Six standard deviations of a count.
    assert np.abs(np.bincount(places.ravel()) - 1200).max() < 6 * np.sqrt(3000 * 0.4 * 0.6)
    again = np.asarray(draw_targets(background[100:200], 5, 2))
    np.testing.assert_array_equal(again, drawn[100:200].ravel() - 500)


def test_image_by_image_is_the_mean_with_its_gradient():
    def distance(weight, a, b):
        return jnp.mean(weight * jnp.abs(a - b) ** 1.5)

    a, b, weight = images(0, 3, 8, 8), images(1, 3, 8, 8), jnp.float32(2.0)
    expected = jax.value_and_grad(lambda a: 5 * distance(weight, a, b))(a)
    found = jax.value_and_grad(lambda a: 5 * _image_by_image(distance, weight, a, b))(a)
    jax.tree.map(lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5), found, expected)
    assert float(_image_by_image(distance, weight, a, b)) == pytest.approx(float(found[0] / 5))

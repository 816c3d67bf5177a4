"""Fitting: it finds the avatar that a picture was made of, and does so again to the bit."""

import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from data_pipelines import cameras
from data_pipelines.errors import UserError
from flexavatar_jax.avatars import fit as fit_module
from flexavatar_jax.avatars.fit import FitSettings, _order, fit
from flexavatar_jax.frozen.networks import FrozenNetworks

pytestmark = pytest.mark.usefixtures("quick_compilation")

K = np.array([[3, 0, 0.5], [0, 3, 0.5], [0, 0, 1]], np.float32)
VIEWS = np.stack([cameras.orbit(a, 0, 1.0, np.zeros(3)) for a in (0, 120)]).astype(np.float32)
EXPRESSIONS = np.zeros((2, 135), np.float32)


@pytest.fixture(scope="module")
def truth(animator):
    """A person, as two cameras see them, and the code of somebody else."""
    rng = np.random.default_rng(0)
    codes = [
        animator.encode(rng.integers(0, 255, (24, 24, 3), np.uint8), np.ones((24, 24)), VIEWS[0], K)
        for _ in range(2)
    ]
    images = animator.render(codes[0], EXPRESSIONS, VIEWS, K)
    return codes, np.round(images * 255).astype(np.uint8)


def run(loaded, truth, **settings):
    (_, start), images = truth
    steps = []
    fitted = fit(
        loaded,
        start,
        images,
        EXPRESSIONS,
        VIEWS,
        np.stack([K, K]),
        FitSettings(**dict(steps=30) | settings),
        progress=lambda count, loss: steps.append(count),
    )
    assert sum(steps) == len(fitted.losses)
    return fitted


@pytest.fixture(scope="module")
def fitted(loaded, truth):
    return run(loaded, truth)


def test_a_fit_brings_the_renders_to_the_pictures(animator, fitted, truth):
    (_, start), images = truth

    def error(code, offsets):
        found = animator.render(code, EXPRESSIONS + offsets, VIEWS, K)
        return np.abs(found - images / 255).mean()

    assert error(fitted.code, fitted.offsets) < 0.6 * error(start, 0)
    assert np.abs(fitted.offsets).max() > 0
    assert [step for step, _ in fitted.snapshots] == [0, 8, 15, 23, 30]
    np.testing.assert_array_equal(fitted.snapshots[0][1], start)
    np.testing.assert_array_equal(fitted.snapshots[-1][1], fitted.code)


def test_the_same_seed_gives_the_same_bits_however_the_clock_runs(
    loaded, truth, fitted, monkeypatch
):
    monkeypatch.setattr(fit_module.time, "monotonic", lambda: 0.0)  # strides of another length
    np.testing.assert_array_equal(run(loaded, truth).code, fitted.code)
    assert not np.array_equal(run(loaded, truth, seed=1).code, fitted.code)


def test_a_model_trained_with_remat_is_fitted_all_the_same(loaded, truth, fitted):
    """As FLEX-1's config has it: what saves memory in training changes nothing here."""
    model = nnx.clone(loaded.model)
    model.decoder.transformer.remat = 1.0
    found = run(loaded._replace(model=model), truth)
    np.testing.assert_array_equal(found.code, fitted.code)
    assert model.decoder.transformer.remat


def test_a_strong_pull_keeps_the_code_where_it_was(loaded, truth, fitted):
    start = truth[0][1]
    held = run(loaded, truth, pull=100.0)
    assert np.abs(held.code - start).mean() < 0.3 * np.abs(fitted.code - start).mean()


def test_a_shift_moves_all_tokens_together(loaded, truth, fitted):
    """Tokens that a picture does not show follow those that it shows."""
    start = truth[0][1]

    def common(code):
        moved = code - start
        return np.linalg.norm(moved.mean(axis=0)) / np.sqrt(np.mean(np.sum(moved**2, axis=-1)))

    alone = run(loaded, truth, shift=0.0)
    most = run(loaded, truth, shift=10.0)
    assert common(most.code) > common(fitted.code) > common(alone.code) + 0.1


def test_a_fit_brings_down_what_training_did():
    trained = ConfigDict({"l1": 0.3, "mse": 2.0, "ssim": 0.1, "dino": 1.0, "sam": 1.0})
    weights = {"l1": 0.3, "mse": 2.0, "ssim": 0.1, "dino": 0.0, "sam": 0.0}
    assert dict(fit_module._loss_weights(trained, FrozenNetworks())) == weights
    dino = FrozenNetworks(dinov2_small={})
    assert dict(fit_module._loss_weights(trained, dino)) == weights | {"dino": 1.0}


def test_every_picture_comes_once_before_any_comes_again():
    order = _order(5, FitSettings(steps=10, batch=2))
    assert order.shape == (10, 2)
    for turn in order.reshape(4, 5):
        assert sorted(turn) == list(range(5))


def test_no_steps_leave_the_encoders_code(loaded, truth):
    fitted = run(loaded, truth, steps=0)
    np.testing.assert_array_equal(fitted.code, truth[0][1])
    assert not fitted.offsets.any()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(steps=-1), "--fit is -1"),
        (dict(batch=3), "--batch is 3; expected 1 to 2"),
        (dict(batch=0), "--batch is 0"),
        (dict(shift=-1.0), "--shift is -1.0"),
        (dict(pull=-1.0), "--pull is -1.0"),
        (dict(learning_rate=float("nan")), "--learning_rate is nan"),
    ],
)
def test_a_fit_that_cannot_be_meant_gets_a_sentence(loaded, truth, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        run(loaded, truth, **settings)


def test_a_loss_that_is_not_finite_ends_the_fit_with_a_sentence(loaded, truth):
    (_, start), images = truth
    with pytest.raises(UserError, match=r"no longer finite after .* lower --learning_rate"):
        run(loaded, ((None, np.full_like(start, np.nan)), images))


def test_a_fit_that_does_not_fit_into_memory_is_named_before_it_starts(loaded, truth, monkeypatch):
    monkeypatch.setattr(fit_module, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"fitting 2 images, 1 a step, takes .* smaller --batch"):
        run(loaded, truth)


def test_gaussians_that_found_no_room_are_named(loaded, truth):
    config = loaded.config.copy_and_resolve_references()
    config.splat_capacity = 8
    with pytest.raises(UserError, match="found no room in the fit: set splat_capacity"):
        run(loaded._replace(config=config), truth, steps=1)

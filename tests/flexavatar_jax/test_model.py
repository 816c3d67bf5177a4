"""The model as a whole: held to an independent float64 transcription, at sizes made up here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import inputs, rule_model, small_config, small_template

from flexavatar_jax.model import FlexAvatar


def relative_error(found, expected):
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("salt", ["public", "another", "third"])
def test_outputs_are_the_references_for_any_weights(salt):
    model, reference = rule_model(salt)
    data = inputs()
    code = nnx.jit(FlexAvatar.encode)(
        model, data["image"], data["cam2head"], data["K"], data["features"]
    )
    expected = reference.encode(
        data["image"][0], data["cam2head"][0], data["K"][0], data["features"][0]
    )
    assert relative_error(code[0], expected) < 5e-6
    for source in (0, 1):
        gaussians = nnx.jit(FlexAvatar.decode)(
            model, code, data["expression"], jnp.array([source])
        )
        for e in range(2):
            found = {
                "positions": gaussians.means,
                "scales": gaussians.scales,
                "rotations": gaussians.quats,
                "colors": gaussians.colors,
                "opacities": gaussians.opacities[..., None],
            }
            expected = reference.decode(np.float64(code[0]), data["expression"][0, e], source)
            for name, values in found.items():
                assert relative_error(values[0, e], expected[name]) < 1e-5, name


def test_examples_and_expressions_of_a_batch_do_not_mix():
    model, _ = rule_model("public")
    a, b = inputs(0), inputs(1)
    batch = {name: np.concatenate([a[name], b[name]]) for name in a}
    expressions = batch.pop("expression")
    run = nnx.jit(lambda m, image, x, s: m.decode(m.encode(**image), x, s))
    together = run(model, batch, expressions, jnp.array([0, 1]))
    alone = run(
        model, {name: value[1:] for name, value in batch.items()}, expressions[1:, 1:], jnp.array([1])
    )
    for x, y in zip(together, alone, strict=True):
        np.testing.assert_allclose(x[1, 1], y[0, 0], atol=1e-5)


def test_folding_changes_nothing_and_leaves_the_model_alone():
    model, _ = rule_model("public")
    before = jax.tree.map(np.asarray, nnx.state(model))
    data = inputs()
    expression = data.pop("expression")
    run = nnx.jit(lambda m: m.decode(m.encode(**data), expression, jnp.array([1])))
    for x, y in zip(run(model), run(model.folded()), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_rematerialisation_changes_no_gradient():
    data = inputs()
    expression = data.pop("expression")

    def gradient(remat):
        model = FlexAvatar(small_config(remat=remat), small_template(), rngs=nnx.Rngs(0))

        def loss(m):
            gaussians = m.decode(m.encode(**data), expression, jnp.array([1]))
            return sum(jnp.sum(x**2) for x in gaussians)

        return nnx.jit(nnx.grad(loss))(model)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        gradient(False),
        gradient(True),
    )


def test_a_fresh_model_is_the_template_and_learns_everywhere():
    """Fresh Gaussians sit on the template, small and faint; every parameter sees a gradient."""
    config = small_config()
    model = FlexAvatar(config, small_template(), rngs=nnx.Rngs(0))
    data = inputs()
    expression = data.pop("expression")
    gaussians = model.decode(model.encode(**data), expression, jnp.array([1]))
    points = small_template().sample_points(config.uv_resolution, config.sample_grid)
    np.testing.assert_allclose(gaussians.means[0, 0], points.positions, atol=1e-7)
    np.testing.assert_allclose(gaussians.scales, np.exp(-5), rtol=1e-5)
    np.testing.assert_allclose(gaussians.opacities, 0.1, rtol=1e-5)
    np.testing.assert_allclose(gaussians.quats, np.broadcast_to([1, 0, 0, 0], gaussians.quats.shape))
    assert np.std(gaussians.colors) > 0

    def loss(m):
        return jnp.sum(m.decode(m.encode(**data), expression, jnp.array([1])).colors ** 2)

    gradient = nnx.grad(loss)(model)
    silent = {
        path
        for path, g in nnx.to_flat_state(gradient)
        if not np.any(np.asarray(g[...]))
    }
    # Colour alone was asked for, and keys' biases shift all logits of a query alike.
    heads = {("gaussians", name) for name in ("scale", "offset", "opacity", "rotation")}
    assert {path for path in silent if path[:2] not in heads and path[-2:] != ("k", "bias")} == set()


def test_all_state_is_parameters_whose_logical_axes_fit():
    model = FlexAvatar(small_config(), small_template(), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert not jax.tree.leaves(rest)
    named = 0
    for path, variable in nnx.to_flat_state(params):
        axes = variable.get_metadata().get("logical_axes")
        if axes is not None:
            named += 1
            assert len(axes) == variable.get_value().ndim, path
        assert variable.get_value().dtype == jnp.float32, path
    assert named > 50


def test_bfloat16_keeps_gaussians_in_float32_and_close():
    data = inputs()
    expression = data.pop("expression")
    out = [
        model.decode(model.encode(**data), expression, jnp.array([1]))
        for model in (rule_model("public", small_config(dtype=t))[0] for t in ("float32", "bfloat16"))
    ]
    for exact, rounded in zip(*out, strict=True):
        assert rounded.dtype == jnp.float32
        error = relative_error(rounded, np.asarray(exact, np.float64))
        assert 0 < error < 0.05


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (dict(image_size=25), "image_size"),
        (dict(num_heads=5), "num_heads"),
        (dict(upsampler_channels=(4, 4, 4)), "upsampler_channels"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, field):
    with pytest.raises(ValueError, match=f"config.model.{field}"):
        FlexAvatar(small_config(**changes), small_template(), rngs=nnx.Rngs(0))


def test_features_are_asked_for():
    model, _ = rule_model("public")
    data = inputs()
    with pytest.raises(ValueError, match=r"config\.model\.dino"):
        model.encode(data["image"], data["cam2head"], data["K"])
    without = FlexAvatar(small_config(dino=False), small_template(), rngs=nnx.Rngs(0))
    assert without.encode(data["image"], data["cam2head"], data["K"]).shape == (1, 16, 48)

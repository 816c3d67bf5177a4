"""The model as a whole: held to an independent float64 transcription, at sizes made up here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import decode, encode, inputs, rule_model, small_config, small_template

from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.model.remat import recomputed

pytestmark = pytest.mark.usefixtures("quick_compilation")


def relative_error(found, expected):
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("salt", ["public", "another", "third"])
def test_outputs_are_the_references_for_any_weights(salt):
    model, reference = rule_model(salt)
    data = inputs()
    expression = data.pop("expression")
    code = encode(model, **data)
    expected = reference.encode(*(data[n][0] for n in ("image", "cam2head", "K", "features")))
    assert relative_error(code[0], expected) < 5e-6
    for source in (0, 1):
        gaussians = decode(model, code, expression, jnp.array([source]))
        found = {
            "positions": gaussians.means,
            "scales": gaussians.scales,
            "rotations": gaussians.quats,
            "colors": gaussians.colors,
            "opacities": gaussians.opacities[..., None],
        }
        for e in range(2):
            expected = reference.decode(np.float64(code[0]), expression[0, e], source)
            for name, values in found.items():
                assert relative_error(values[0, e], expected[name]) < 1e-5, name


def test_examples_and_expressions_of_a_batch_do_not_mix():
    model, _ = rule_model("public")
    first, second = inputs(0), inputs(1)
    both = {name: np.concatenate([first[name], second[name]]) for name in first}
    expressions = both.pop("expression")
    del first["expression"]
    codes = encode(model, **both)
    np.testing.assert_allclose(codes[0], encode(model, **first)[0], atol=1e-5)
    together = decode(model, codes, expressions, jnp.array([0, 1]))
    alone = decode(model, codes[1:], expressions[1:, ::-1], jnp.array([1]))
    for x, y in zip(together, alone, strict=True):
        np.testing.assert_allclose(x[1, 1], y[0, 0], atol=1e-5)


def test_folding_changes_nothing_and_leaves_the_model_alone():
    model, _ = rule_model("public")
    before = jax.tree.map(np.asarray, nnx.state(model))
    data = inputs()
    expression, source = data.pop("expression"), jnp.array([1])
    folded = model.folded()
    np.testing.assert_allclose(encode(folded, **data), encode(model, **data), atol=1e-5)
    code = encode(model, **data)
    for x, y in zip(
        decode(folded, code, expression, source),
        decode(model, code, expression, source),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def shallow_config(**changes):
    """One block of each kind, for tests that compile gradients or initialisers."""
    return small_config(encoder_depth=1, decoder_depth=1, upsampler_channels=(6,), **changes)


@nnx.jit
def gradient(model, data, expression):
    """Of all that Gaussians are, so that no head is left out."""

    def loss(model):
        gaussians = model.decode(model.encode(**data), expression, jnp.array([1]))
        return sum(jnp.sum((x - 0.3) ** 2) for x in gaussians)

    return nnx.grad(loss)(model)


def test_every_parameter_learns_and_rematerialisation_changes_no_gradient():
    data = inputs()
    expression = data.pop("expression")
    plain, rematerialised = (
        dict(nnx.to_flat_state(gradient(model, data, expression)))
        for model in (rule_model("public", shallow_config(remat=remat))[0] for remat in (0.0, 1.0))
    )
    for path, expected in plain.items():
        expected, found = np.asarray(expected[...]), np.asarray(rematerialised[path][...])
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected) + 1e-5, path
        assert (np.abs(expected).max() > 1e-5) != without_effect(path), path


@pytest.mark.parametrize(
    ("share", "blocks"), [(0.0, ""), (0.5, "xx"), (0.6, "xxx"), (1.0, "xxxx"), (True, "xxxx")]
)
def test_the_first_blocks_are_recomputed(share, blocks):
    assert recomputed(share, 4) == [i < len(blocks) for i in range(4)]


def without_effect(path):
    """Parameters that the published model has and does not use."""
    if path[:3] == ("encoder", "image", "blocks"):
        # Without a norm of the keys, their bias shifts all of a query's logits alike.
        return path[-2:] == ("k", "bias")
    # Nobody asks what the context of the last block attends to; here it is the only block.
    return path[1:3] == ("transformer", "blocks") and (
        path[4] == "context" and path[5] in ("q", "q_norm")
    )


def test_a_fresh_models_gaussians_sit_on_the_template_small_and_faint():
    config = shallow_config()
    model = FlexAvatar(config, small_template(), rngs=nnx.Rngs(0))
    data = inputs()
    expression = data.pop("expression")
    gaussians = decode(model, encode(model, **data), expression, jnp.array([1]))
    points = (
        small_template().sample_points(config.uv_resolution, config.gaussian_resolution).positions
    )
    np.testing.assert_allclose(gaussians.means[0, 0], points, atol=1e-7)
    np.testing.assert_allclose(gaussians.scales, np.exp(-5), rtol=1e-5)
    np.testing.assert_allclose(gaussians.opacities, 0.1, rtol=1e-5)
    unturned = np.broadcast_to([1, 0, 0, 0], gaussians.quats.shape)
    np.testing.assert_array_equal(gaussians.quats, unturned)
    assert np.std(gaussians.colors) > 0


def test_all_state_is_parameters_whose_logical_axes_fit():
    _, params, rest = nnx.split(rule_model("public")[0], nnx.Param, ...)
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
    exact, rounded = (
        decode(model, encode(model, **data), expression, jnp.array([1]))
        for model in (
            rule_model("public", small_config(dtype=dtype))[0] for dtype in ("float32", "bfloat16")
        )
    )
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == jnp.float32
        assert 0 < relative_error(b, np.asarray(a, np.float64)) < 0.05


def test_features_are_asked_for():
    model, _ = rule_model("public")
    data = inputs()
    with pytest.raises(ValueError, match=r"config\.model\.dino"):
        model.encode(data["image"], data["cam2head"], data["K"])
    without, reference = rule_model("public", small_config(dino=False))
    code = encode(without, data["image"], data["cam2head"], data["K"])
    expected = reference.encode(*(data[name][0] for name in ("image", "cam2head", "K")))
    assert relative_error(code[0], expected) < 5e-6

"""The decoder: expressions and bias sinks."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_model import inputs, rule_model, small_config

from data_pipelines.frame import expression_part, neutral_code
from flexavatar_jax.model.decoder import SINK_SIZE, Decoder

decode = nnx.jit(Decoder.__call__)


def code(batch=1):
    return np.random.default_rng(0).standard_normal((batch, 16, 48)).astype(np.float32)


def fresh_decoder() -> Decoder:
    return Decoder(small_config(expression_hidden=64), rngs=nnx.Rngs(0))


def test_each_example_gets_the_sink_of_its_own_source():
    model, _ = rule_model("public")
    expression = np.repeat(inputs()["expression"], 2, axis=0)
    both = decode(model.decoder, code(2), expression, jnp.array([0, 1]))
    for source in (0, 1):
        alone = decode(model.decoder, code(2), expression, jnp.array([source, source]))
        np.testing.assert_allclose(both[source], alone[source], atol=1e-5)
    same = decode(model.decoder, code(2), expression, jnp.array([1, 1]))
    assert np.abs(both[0] - same[0]).max() > 1e-2


def test_the_sink_is_a_token_and_not_an_expression():
    """Sink and expression tokens come by different ways: swapping what they hold is no symmetry."""
    model, _ = rule_model("public")
    expression = inputs()["expression"]
    before = decode(model.decoder, code(), expression, jnp.array([1]))
    model.decoder.sinks[...] = model.decoder.sinks[...].at[0].add(1.0)
    np.testing.assert_array_equal(decode(model.decoder, code(), expression, jnp.array([1])), before)
    model.decoder.sinks[...] = model.decoder.sinks[...].at[1].add(1.0)
    assert np.abs(decode(model.decoder, code(), expression, jnp.array([1])) - before).max() > 1e-2


def test_sinks_start_alike_and_small_and_each_learns_from_its_own_source():
    decoder = fresh_decoder()
    sinks = np.asarray(decoder.sinks[...])
    np.testing.assert_array_equal(sinks[0], sinks[1])
    assert np.std(sinks) == pytest.approx(SINK_SIZE, rel=0.3)

    def brightness(decoder, source):
        return jnp.sum(decode(decoder, code(), inputs()["expression"], jnp.array([source])) ** 2)

    for source in (0, 1):
        gradient = nnx.grad(brightness)(decoder, source)["sinks"][...]
        assert (np.abs(gradient).max(axis=1) > 0).tolist() == [source == 0, source == 1]


def test_maps_are_row_major_and_one_an_expression():
    model, _ = rule_model("public")
    expression = inputs()["expression"]
    maps = decode(model.decoder, code(), expression, jnp.array([1]))
    assert maps.shape == (1, 2, 4, 4, 48)
    alone = decode(model.decoder, code(), expression[:, 1:], jnp.array([1]))
    np.testing.assert_allclose(maps[:, 1:], alone, atol=1e-5)


def test_before_training_an_open_jaw_is_as_loud_as_a_smile_and_a_relaxed_face_silent():
    """A jaw's tenths of a radian are heard beside numbers of unit size, and head pose is not."""
    decoder = fresh_decoder()
    first = decoder.expression.first
    np.testing.assert_allclose(first(neutral_code()), 0, atol=1e-5)

    def change(part: str, size: float) -> float:
        changes = []
        for i in range(*expression_part(part).indices(135)):
            code = neutral_code()
            code[i] += size
            changes.append(np.linalg.norm(first(code)))
        return np.mean(changes)

    smile = change("exp", 1.0)
    assert 0.7 < change("jaw", 0.1) / smile < 1.4
    assert change("R", 0.2) < smile / 3

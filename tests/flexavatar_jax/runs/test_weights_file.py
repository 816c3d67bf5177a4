"""Weights to be handed on: small, loaded as a run is, whole or refused."""

import math

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from data_pipelines.errors import UserError
from flexavatar_jax.publish import publish
from flexavatar_jax.runs.loading import load_model, read_params
from flexavatar_jax.runs.weights_file import pack_weights
from flexavatar_jax.runs.workdir import open_workdir, read_config


@pytest.fixture(scope="module")
def published(rule_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "rule"
    publish(rule_run, folder)
    return folder


def test_the_folder_loads_as_the_run_does_to_half_precision(published, loaded):
    again = load_model(published)
    assert (again.step, again.config) == (loaded.step, loaded.config)
    assert sorted(again.progress) == ["commit", "seconds", "seed", "step"]
    params, expected = (nnx.state(x.model, nnx.Param) for x in (again, loaded))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float16), strict=False),
        *(params, expected),
    )
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    jax.tree.map(np.testing.assert_array_equal, read_params(published, abstract), params)


def test_it_is_half_as_large_as_its_parameters_and_any_reader_of_safetensors_opens_it(
    published, loaded
):
    tensors = load_file(published / "weights.safetensors")
    size = sum(x.size for x in jax.tree.leaves(nnx.state(loaded.model, nnx.Param)))
    assert sum(tensor.nbytes for tensor in tensors.values()) == 2 * size
    assert tensors["decoder.sinks"].dtype == np.float16


def test_publishing_again_replaces_it(rule_run, tmp_path):
    publish(rule_run, tmp_path / "out")
    (tmp_path / "out" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"weights\.safetensors is damaged"):
        load_model(tmp_path / "out")
    publish(rule_run, tmp_path / "out")
    load_model(tmp_path / "out")


def test_it_is_no_run_to_go_on_with_and_has_no_other_step(published):
    with pytest.raises(UserError, match=r"holds weights without a run.*init_from"):
        open_workdir(published, read_config(published))
    with pytest.raises(UserError, match="of step 7 alone, not of step 3"):
        load_model(published, 3)


def test_a_runs_folder_is_not_published_into(rule_run):
    with pytest.raises(UserError, match="holds something else than weights"):
        publish(rule_run, rule_run)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "damaged, or no file of this project's"),
        (b"\xff" * 64, "damaged, or no file of this project's"),
        (b"another model's", "of another model than the config.json beside it"),
        (b"no step", "its notes have no step"),
        (b"not finite", "a has no finite float16 numbers"),
    ],
)
def test_what_is_no_file_of_this_model_is_refused(published, tmp_path, content, expected):
    one = nnx.State({"a": nnx.Param(np.ones(2, np.float32))})
    made = {
        b"another model's": pack_weights(one, {"step": 1}),
        b"no step": pack_weights(one, {"step": math.inf}),
        b"not finite": pack_weights(one, {"step": 1}).replace(b"\x00\x3c", b"\x00\x7e"),
    }
    content = made.get(content, content)
    for name in ("config.json", "template.obj"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_model(tmp_path)


def test_numbers_too_large_for_it_are_refused():
    params = nnx.State({"a": nnx.Param(np.full(2, 1e5, np.float32))})
    with pytest.raises(UserError, match="a has numbers that float16 does not hold"):
        pack_weights(params, {})

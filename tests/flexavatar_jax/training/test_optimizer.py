"""The optimisers: which parameters Muon changes, and where its momenta live. Shapes alone."""

import jax
import pytest
from flax import nnx

from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.training.sharding import make_mesh
from flexavatar_jax.training.train_step import TrainProgram


@pytest.fixture
def program(tiny_config):
    tiny_config.optimizer.update(dict(name="muon", clip_norm=1.0))
    return TrainProgram.create(tiny_config, make_mesh(devices=jax.devices()[:1]), load_template())


def momenta(state):
    """Path -> leaf of every tree of momenta in an optimiser's state."""
    trees = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, nnx.State))
    return [
        dict(jax.tree_util.tree_flatten_with_path(tree)[0])
        for tree in trees
        if isinstance(tree, nnx.State)
    ]


def test_muon_has_the_matrices_and_adam_the_rest(program):
    params = dict(jax.tree_util.tree_flatten_with_path(program.abstract_state.params)[0])
    muon, first, second = sorted(momenta(program.abstract_state), key=len)[-3:]
    if first.keys() != second.keys():  # Adam's two moments are alike
        muon, first, second = second, muon, first
    assert first.keys() == second.keys()
    assert muon.keys() | first.keys() == params.keys()
    assert not muon.keys() & first.keys()
    names = {jax.tree_util.keystr(path) for path in muon}
    assert all(params[path].ndim in (2, 4) for path in muon)
    assert any("'mlp'" in name for name in names)
    assert any("'upsampler'" in name for name in names)
    assert not any(
        part in name for name in names for part in ("sinks", "positions", "offset", "bias", "norm'")
    )


def test_momenta_lie_where_their_parameters_lie(program):
    params = dict(jax.tree_util.tree_flatten_with_path(program.state_sharding.params)[0])
    trees = momenta(program.state_sharding)
    assert len(trees) >= 3
    for tree in trees:
        assert tree == {path: params[path] for path in tree}
    assert len(set(params.values())) > 1

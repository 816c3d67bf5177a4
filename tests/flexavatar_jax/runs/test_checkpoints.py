"""A run's folder: who may write to it, and what may change between one start and the next."""

import pytest
from flax import nnx

from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.runs.workdir import claim_workdir, open_workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def run(tiny_config, tmp_path):
    """A run's folder with one checkpoint."""
    template = load_template()
    claim_workdir(tmp_path, tiny_config, template)
    model = FlexAvatar(tiny_config.model, template, rngs=nnx.Rngs(0))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(2, nnx.state(model, nnx.Param))
    checkpoints.wait()
    checkpoints.close()
    return tmp_path


def test_a_model_is_read_without_touching_what_its_run_is_saving(run):
    part = run / "checkpoints" / "4.orbax-checkpoint-tmp" / "params" / "part"
    part.parent.mkdir(parents=True)
    part.touch()
    before = sorted(run.rglob("*"))
    assert load_model(run).step == 2
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": 2, "model.remat": 1.0, "mesh.fsdp": 2},  # on other chips
        {"steps": 9, "checkpoint.every": 5, "log.every": 7, "max_bad_steps": 3},
    ],
)
def test_what_does_not_change_a_steps_numbers_may_change_in_a_run(run, tiny_config, change):
    tiny_config.update_from_flattened_dict(change)
    open_workdir(run, tiny_config)

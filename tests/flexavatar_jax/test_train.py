"""Training: it learns, it goes on where it was stopped, and it is the same run on any mesh."""

import contextlib
import itertools
import json
import math
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import Command, run_command
from experiment_file import write_experiment
from flax import nnx

from data_pipelines.errors import UserError
from flexavatar_jax.frozen import dinov2, hiera
from flexavatar_jax.frozen.networks import FrozenNetworks
from flexavatar_jax.published.parity_rule import rule_weights
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.runs.workdir import read_config
from flexavatar_jax.stopping import PREEMPTED, StopRequest
from flexavatar_jax.train import train
from flexavatar_jax.training.compilation import compile_step
from flexavatar_jax.training.metric_log import read_metrics
from flexavatar_jax.training.sharding import make_mesh
from flexavatar_jax.training.train_step import TrainProgram

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def compiled_steps():
    return {}


@pytest.fixture(autouse=True)
def _each_step_compiled_once(compiled_steps, monkeypatch):
    """Runs whose steps compute the same share the compiled step."""

    def compile_once(program, frozen, *, perceptual):
        config = program.config.to_dict()
        for name in ("steps", "checkpoint", "log", "eval", "init_from", "bad_step"):
            del config[name]
        key = (json.dumps(config, sort_keys=True), perceptual)
        if key not in compiled_steps:
            compiled_steps[key] = compile_step(program, frozen, perceptual=perceptual)
        return compiled_steps[key]

    monkeypatch.setattr("flexavatar_jax.training.compilation.compile_step", compile_once)


def weights(workdir):
    model = load_model(workdir).model
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Param))]


def assert_same_weights(a, b):
    for x, y in zip(weights(a), weights(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_stopped_run_ends_with_the_weights_and_the_log_of_one_never_stopped(
    tiny_config, tmp_path
):
    """With Muon, which leaves to Adam what is no matrix: both optimisers' states come back."""
    tiny_config.optimizer.name = "muon"
    assert train(tiny_config, tmp_path / "whole") == 0
    stop = StopRequest()
    stop.due = itertools.chain([False, False, True]).__next__
    assert train(tiny_config, tmp_path / "parts", stop=stop) == PREEMPTED
    assert train(tiny_config, tmp_path / "parts") == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (read_metrics(tmp_path / run) for run in ("whole", "parts"))
    assert [line["step"] for line in parts] == [1, 2, 3, 4]
    assert [line["loss"] for line in parts] == [line["loss"] for line in whole]


@pytest.fixture
def stand_ins(monkeypatch):
    """Frozen networks of one layer each, where the published ones would be."""

    def embedding(params, image):  # of SAM, at its stride
        return jnp.tanh(image[:, 8::16, 8::16] @ params["kernel"])

    base = dinov2.BASE._replace(depth=1)
    small = dinov2.SMALL._replace(depth=1, width=64)
    frozen = FrozenNetworks(
        dinov2_base=dinov2.fold(rule_weights(dinov2.shapes(base)), base),
        dinov2_small=dinov2.fold(rule_weights(dinov2.shapes(small)), small),
        sam2={"kernel": jnp.eye(3, 8)},
    )
    monkeypatch.setattr(hiera, "image_embedding", embedding)
    monkeypatch.setattr("flexavatar_jax.train.load_frozen_networks", lambda config: frozen)


def test_the_published_path_sees_through_dinov2_and_meets_its_losses_when_they_are_due(
    tiny_config, tmp_path, capsys, stand_ins
):
    tiny_config.model.dino = True
    tiny_config.loss.update(dict(dino=1.0, sam=1.0, perceptual_start=2, perceptual_targets=1))
    assert train(tiny_config, tmp_path) == 0
    assert capsys.readouterr().out.count("compiling the training step") == 2
    lines = read_metrics(tmp_path)
    assert [{"dino", "sam"} <= line.keys() for line in lines] == [False, False, True, True]
    assert all(line["dino"] > 0 and line["sam"] > 0 for line in lines[2:])
    assert all(math.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
    # The features' rows of the projection start at random and are trained like everything else.
    read = contextlib.closing(Checkpoints(tmp_path))
    with read as checkpoints:
        program = TrainProgram.create(tiny_config, make_mesh(), load_template())
        abstract = program.abstract_state.params
        early, late = (checkpoints.restore_params(step, abstract) for step in (2, 4))
    rows = slice(tiny_config.model.width, None)
    kernels = [x.encoder.feature_projection.kernel[...][rows] for x in (early, late)]
    assert not np.array_equal(*kernels)


def test_without_dino_and_sam_a_step_is_compiled_once_and_its_lines_say_how_fast_it_is(
    tiny_config, tmp_path, capsys
):
    tiny_config.loss.perceptual_start = 2
    train(tiny_config, tmp_path)
    assert capsys.readouterr().out.count("compiling the training step") == 1
    lines = read_metrics(tmp_path)
    for line in lines:
        assert line["examples_per_second"] == pytest.approx(2 / line["step_seconds"])
        assert 0 < line["tflops_per_device"] < 10
        assert 0.1 < line["host_gib"] < 24
        assert {"loss", "l1", "ssim", "gradient_norm", "skipped"} < set(line)
        # No peak of CPUs is published, so there is no share of it.
        assert "mfu" not in line
    assert sum(line["input_wait_seconds"] for line in lines) > 0


@pytest.mark.slow
def test_profile_writes_a_trace(tiny_config, tmp_path):
    tiny_config.steps = 9
    train(tiny_config, tmp_path, profile=True)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_another_config_is_refused_and_nothing_is_touched(tiny_config, tmp_path):
    tiny_config.steps = 2
    train(tiny_config, tmp_path)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    tiny_config.optimizer.learning_rate = 0.5
    with pytest.raises(ValueError, match=r"optimizer\.learning_rate is 0\.001, not 0\.5"):
        train(tiny_config, tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_config_that_is_refused_claims_no_folder(tiny_config, tmp_path):
    tiny_config.accumulate = 3
    with pytest.raises(ValueError, match="accumulate"):
        train(tiny_config, tmp_path / "run")
    tiny_config.accumulate = 1
    tiny_config.model.num_heads = 3
    with pytest.raises(ValueError, match=r"model\.num_heads"):
        train(tiny_config, tmp_path / "run")
    tiny_config.model.num_heads = 2
    tiny_config.data.root = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere"):
        train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_may_change_is_written_down_and_a_checkpoint_without_its_optimizer_is_refused(
    tiny_config, tmp_path
):
    """It is no import: to start over from it would end with the good ones removed."""
    tiny_config.steps = 2
    train(tiny_config, tmp_path)
    tiny_config.steps, tiny_config.eval.people = 4, 3
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "optimizer")
    with pytest.raises(ValueError, match=r"checkpoints/2/optimizer/.* \(it is missing\), and no"):
        train(tiny_config, tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    stored = read_config(tmp_path)
    assert (stored.steps, stored.eval.people) == (4, 3)


def test_training_starts_from_the_weights_and_the_template_of_another_folder(tiny_config, tmp_path):
    tiny_config.steps = 2
    train(tiny_config, tmp_path / "a")
    template = (tmp_path / "a" / "template.obj").read_text()
    first = template[: template.index("\n")]
    template = template.replace(first, "v 0 0 0", 1)
    (tmp_path / "a" / "template.obj").write_text(template)
    (tmp_path / "a" / "digests.json").unlink()  # it is on purpose
    tiny_config.init_from = str(tmp_path / "a")
    tiny_config.steps = 1
    tiny_config.max_gradient_norm = 1e-9  # its step is skipped
    train(tiny_config, tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "template.obj").read_text().startswith("v 0.0 0.0 0.0\n")
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["2"]


def test_weights_of_another_model_are_no_start(tiny_config, tmp_path):
    tiny_config.steps = 1
    train(tiny_config, tmp_path / "a")
    tiny_config.init_from = str(tmp_path / "a")
    tiny_config.model.head_resolution = 8
    with pytest.raises(UserError, match=r"config\.model\.head_resolution is 4, not 8"):
        train(tiny_config, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_an_import_is_started_from_and_never_trained_in(tiny_config, tmp_path):
    tiny_config.steps = 1
    train(tiny_config, tmp_path / "import")
    model = load_model(tmp_path / "import").model
    shutil.rmtree(tmp_path / "import" / "checkpoints")
    checkpoints = Checkpoints(tmp_path / "import")
    checkpoints.save(0, nnx.state(model, nnx.Param))
    checkpoints.wait()
    checkpoints.close()
    with pytest.raises(UserError, match=r"weights without a run.*--config\.init_from="):
        train(tiny_config, tmp_path / "import")
    tiny_config.init_from = str(tmp_path / "import")
    assert train(tiny_config, tmp_path / "run") == 0


def test_a_run_goes_on_from_before_a_damaged_checkpoint_to_the_same_weights(tiny_config, tmp_path):
    train(tiny_config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    (data,) = (tmp_path / "damaged" / "checkpoints" / "4" / "params").glob("ocdbt*/manifest.ocdbt")
    data.write_bytes(data.read_bytes()[:-1])
    assert train(tiny_config, tmp_path / "damaged") == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "damaged")
    assert (tmp_path / "damaged" / "damaged" / "4").exists()


def test_too_little_room_is_told_before_a_checkpoint_is_begun(tiny_config, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(UserError, match=r"takes .* GiB and .*checkpoints has .* GiB free"):
        train(tiny_config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_micro_batches_give_the_gradient_and_the_overflow_of_the_whole_batch(
    tiny_config, tmp_path, capsys
):
    tiny_config.splat_capacity = 200
    tiny_config.steps = 1
    train(tiny_config, tmp_path / "whole")
    tiny_config.accumulate = 2
    train(tiny_config, tmp_path / "micro")
    (whole,), (micro,) = (read_metrics(tmp_path / run) for run in ("whole", "micro"))
    assert whole["splat_overflow"] == micro["splat_overflow"] > 0
    assert "config.splat_capacity makes more room" in capsys.readouterr().out
    assert whole["loss"] == pytest.approx(micro["loss"], rel=1e-5)
    assert whole["gradient_norm"] == pytest.approx(micro["gradient_norm"], rel=1e-4)


def test_a_step_whose_gradient_is_beyond_bounds_changes_nothing_and_is_counted(
    tiny_config, tmp_path
):
    tiny_config.steps, tiny_config.checkpoint.every = 2, 1
    tiny_config.max_gradient_norm = 1e-9
    train(tiny_config, tmp_path)
    assert read_metrics(tmp_path)[-1]["skipped"] == 2
    first, second = (load_model(tmp_path, step).model for step in (1, 2))
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_bad_step_can_stop_the_run_and_leaves_its_batch(tiny_config, tmp_path):
    tiny_config.max_gradient_norm, tiny_config.bad_step = 1e-9, "stop"
    with pytest.raises(ValueError, match=r"bad_step_1_process_0\.npz"):
        train(tiny_config, tmp_path)
    with np.load(tmp_path / "bad_step_1_process_0.npz") as batch:
        assert batch["target_image"].shape == (2, 2, 32, 32, 3)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(tiny_config, tmp_path):
    tiny_config.steps = 30
    train(tiny_config, tmp_path / "whole")
    program = write_experiment(tiny_config, tmp_path)
    arguments = [f"--config={program}", f"--workdir={tmp_path / 'stopped'}"]
    # Compiled as quickly as here, so that bits agree.
    process = Command("flexavatar_jax.train", *arguments)
    lines = tmp_path / "stopped" / "metrics.jsonl"
    while process.poll() is None and not lines.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == PREEMPTED
    assert 0 < Checkpoints(tmp_path / "stopped").latest_step < 30
    assert run_command("flexavatar_jax.train", *arguments).returncode == 0
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")

"""Digests: whatever happens to a run's files is found, named, and gone round."""

import contextlib
import gc
import json
import logging
import re
import shutil

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from absl import logging as absl_logging
from damage import damaged
from etils import epath
from flax import nnx
from memory_bucket import MemoryBucket

from data_pipelines.errors import UserError
from flexavatar_jax.runs import digests
from flexavatar_jax.runs.checkpoints import Checkpoints, put_damaged_aside
from flexavatar_jax.runs.templates import load_template
from flexavatar_jax.runs.workdir import claim_workdir, open_workdir, read_config, read_template

PARAMS = nnx.state(nnx.Linear(30, 40, rngs=nnx.Rngs(0)), nnx.Param)


class Data:
    """In place of a data iterator."""

    def get_state(self):
        return {"step": 3}


def save(workdir, steps=(2, 4)):
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        for step in steps:
            checkpoints.save(step, PARAMS, optax.adam(1e-3).init(PARAMS), Data(), {"seconds": 1.0})
        checkpoints.wait()


@pytest.fixture(scope="module")
def saved(make_tiny_config, tmp_path_factory):
    """A run's folder with the checkpoints of two steps."""
    workdir = tmp_path_factory.mktemp("run")
    claim_workdir(workdir, make_tiny_config(), load_template())
    save(workdir)
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def told(caplog, monkeypatch):
    """What is logged."""
    monkeypatch.setattr(absl_logging.get_absl_logger(), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def test_300_damages_anywhere_in_a_run_are_found_and_named(run):
    folders = (run / "checkpoints" / "2", run / "checkpoints" / "4", run)
    assert not any(map(digests.find_damage, map(epath.Path, folders)))
    silent = []
    for seed in range(300):
        with damaged(run, seed) as path:
            found = [digests.find_damage(epath.Path(folder)) for folder in folders]
            if path.name == digests.FILE:  # where it is gone, users are told, as below
                named = any(found) or not path.exists()
            else:
                named = any(text and str(path) in text for text in found)
            if not named:
                silent.append((seed, path))
    assert not silent


def test_training_goes_on_from_the_newest_checkpoint_that_is_whole(run, told):
    save(run, [6])
    for step, name in ((4, "progress/metadata"), (6, "data/metadata")):
        path = run / "checkpoints" / str(step) / name
        path.write_bytes(path.read_bytes().replace(b"3", b"7").replace(b"1", b"2"))
    put_damaged_aside(run)
    assert "6/data/metadata is damaged (it is not what was written)" in told.text
    assert "put aside in " in told.text
    assert "goes on from step 2" in told.text
    assert sorted(path.name for path in (run / "damaged").iterdir()) == ["4", "6"]
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        assert checkpoints.latest_step == 2
    save(run, [4])  # that step comes again
    assert not digests.find_damage(epath.Path(run) / "checkpoints" / "4")


def test_inference_names_the_damaged_file_and_the_checkpoint_that_is_whole(run):
    abstract = jax.eval_shape(lambda: PARAMS)
    newest = run / "checkpoints" / "4"
    (newest / "optimizer" / "_METADATA").unlink()  # of which it needs nothing
    with contextlib.closing(Checkpoints(run, owned=False)) as checkpoints:
        checkpoints.restore_params(4, abstract)
        (newest / "params" / "manifest.ocdbt").write_bytes(b"")
        with pytest.raises(UserError, match=r"4/params/manifest\.ocdbt is damaged .*step 2 is"):
            checkpoints.restore_params(4, abstract)
        (run / "checkpoints" / "2" / "progress" / "metadata").unlink()
        with pytest.raises(UserError, match="no older checkpoint of that run is whole"):
            checkpoints.restore_params(4, abstract)


def test_where_nothing_is_whole_nothing_is_moved(run):
    for step in (2, 4):
        (run / "checkpoints" / str(step) / "progress" / "metadata").unlink()
    with pytest.raises(UserError, match=r"4/progress/metadata is damaged .*, and no"):
        put_damaged_aside(run)
    assert not (run / "damaged").exists()


def test_half_a_template_and_another_config_are_named(run, tiny_config):
    template, config = run / "template.obj", run / "config.json"
    whole = template.read_text()
    template.write_text(whole[: whole.rindex("\nf ", 0, len(whole) // 4 * 3) + 1])
    with pytest.raises(UserError, match=r"template\.obj is damaged \(it has .*restore it from a"):
        read_template(run)
    template.write_text(whole)
    changed = config.read_text().replace("3", "4", 1)
    config.write_text(changed)
    with pytest.raises(UserError, match=r"config\.json is damaged .*delete .*digests\.json"):
        read_config(run)
    config.unlink()
    with pytest.raises(UserError, match=r"config\.json is damaged \(it is missing\)"):
        read_config(run)
    with pytest.raises(UserError, match=r"config\.json is damaged \(it is missing\)"):
        open_workdir(run, tiny_config)
    config.write_text(changed)
    digests_file = run / "digests.json"
    digests_file.unlink()  # as the sentence says
    read_config(run)


def test_folders_without_digests_are_taken_as_they_are_and_that_is_told(run, told):
    for path in run.rglob(digests.FILE):
        path.unlink()
    put_damaged_aside(run)
    assert "4 has no digests.json to compare it with" in told.text
    read_template(run)
    assert "run has no digests.json to compare it with" in told.text
    with contextlib.closing(Checkpoints(run)) as checkpoints:
        checkpoints.restore_params(4, jax.eval_shape(lambda: PARAMS))


def test_what_orbax_finds_in_a_folder_without_digests_is_one_sentence(run, capfd):
    (run / "checkpoints" / "4" / digests.FILE).unlink()
    data = (run / "checkpoints" / "4" / "params").glob("ocdbt*/d/*")
    largest = max(data, key=lambda path: path.stat().st_size)
    largest.write_bytes(bytes(largest.stat().st_size))
    refused = pytest.raises(UserError, match=r"4 cannot be restored: it is inc.*; move it")
    with contextlib.closing(Checkpoints(run)) as checkpoints, refused as error:
        checkpoints.restore_params(4, jax.eval_shape(lambda: PARAMS))
    assert not re.search(r"bound method|tensorstore_spec|\n", str(error.value))
    del error
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err


def test_orbaxs_own_log_stays_off_the_screen(run, told):
    Checkpoints(run, owned=False).close()
    told.clear()
    logger = absl_logging.get_absl_logger()
    for path in (ocp.__file__, digests.__file__):
        arguments = ("Waiting took 1.0 seconds.", (), None)
        logger.handle(logger.makeRecord("absl", logging.WARNING, path, 1, *arguments))
    assert [record.pathname for record in told.records] == [digests.__file__]


def test_plain_orbax_reads_the_checkpoint(run):
    with ocp.CheckpointManager(run / "checkpoints") as manager:
        assert manager.all_steps() == [2, 4]
        assert set(manager.item_metadata(4).keys()) >= {"params", "optimizer", "data", "progress"}
        restored = manager.restore(4, args=ocp.args.Composite(params=ocp.args.StandardRestore()))
    np.testing.assert_array_equal(restored["params"]["kernel"], PARAMS["kernel"][...])
    restored = ocp.StandardCheckpointer().restore(run / "checkpoints" / "4" / "params")
    np.testing.assert_array_equal(restored["kernel"], PARAMS["kernel"][...])


def test_a_checkpoint_has_its_digests_from_the_moment_it_has_its_name(tmp_path, monkeypatch):
    """So one whose process was killed thereafter is checked, too."""
    recorded, record = [], digests.record

    def remember(folder, **how):
        record(folder, **how)
        files = json.loads((folder / digests.FILE).read_text())["files"]
        recorded.append((folder.name, files.keys()))

    monkeypatch.setattr(digests, "record", remember)
    save(tmp_path, [2])
    (before, files), (after, all_files) = recorded
    assert (before, after) == ("2.orbax-checkpoint-tmp", "2")
    assert {"params/manifest.ocdbt", "progress/metadata"} < files
    assert all_files - files == {"_CHECKPOINT_METADATA", "commit_success.txt"}


def test_a_file_about_to_be_replaced_is_whole_before_and_after(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path)
    digests.write_files(folder, {"config.json": "old", "template.obj": "same"})

    def killed(path, content):
        if path.name != digests.FILE:
            raise KeyboardInterrupt
        write(path, content)

    write = digests.write
    with monkeypatch.context() as patch:
        patch.setattr(digests, "write", killed)
        patch.setattr(digests, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            digests.write_files(folder, {"config.json": "new"})
    assert not digests.find_damage(folder)
    (folder / "config.json").write_text("new")
    assert not digests.find_damage(folder)
    (folder / "config.json").write_text("nor")
    assert "config.json is damaged" in digests.find_damage(folder)


def test_runs_in_buckets_have_digests_too(run):
    bucket = epath.Path("az://runs/run")
    for path in run.rglob("*"):
        if path.is_file():
            (bucket / str(path.relative_to(run))).write_bytes(path.read_bytes())
    step = bucket / "checkpoints" / "4"
    assert not digests.find_damage(bucket)
    assert not digests.find_damage(step)
    before = (step / digests.FILE).read_bytes()
    (step / digests.FILE).unlink()
    digests.record(step)
    assert (step / digests.FILE).read_bytes() == before
    (step / "data" / "metadata").write_text("{}")
    assert "data/metadata is damaged (it has 2 bytes" in digests.find_damage(step)
    put_damaged_aside(bucket)
    assert not step.exists()
    assert (bucket / "damaged" / "4" / "data" / "metadata").read_text() == "{}"
    assert MemoryBucket.store

"""Weights go back under the published names, bit for bit."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from test_import_flex1 import files, published  # noqa: F401 (fixtures)

from flexavatar_jax.export_flex1 import main
from flexavatar_jax.published.exporter import export_checkpoint
from flexavatar_jax.published.importer import UNUSED_FILE
from flexavatar_jax.runs import digests
from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.runs.loading import load_model


@pytest.fixture
def run(files):  # noqa: F811
    save_file(files.weights, files.checkpoint)
    files.run()
    return files


def test_import_and_export_give_the_same_file_back(run, tmp_path):
    export_checkpoint(run.out, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == run.weights.keys()
    for name, tensor in run.weights.items():
        assert back[name].tobytes() == tensor.tobytes(), name
        assert back[name].shape == tensor.shape, name


def test_weights_trained_here_are_complete_for_the_authors_code(run, tmp_path):
    """A run that was never imported: tensors without effect are there, and harmless."""
    for kept in (UNUSED_FILE, digests.FILE):
        (run.out / kept).unlink()
    loaded = load_model(run.out)
    loaded.model.decoder.sinks[...] += 1
    checkpoints = Checkpoints(run.out)
    checkpoints.save(7, nnx.state(loaded.model, nnx.Param))
    checkpoints.wait()
    checkpoints.close()
    export_checkpoint(run.out, tmp_path / "new.safetensors")
    export_checkpoint(run.out, tmp_path / "old.safetensors", step=0)
    new, old = (load_file(tmp_path / f"{name}.safetensors") for name in ("new", "old"))
    shapes = {name: tensor.shape for name, tensor in run.weights.items()}
    assert {name: tensor.shape for name, tensor in new.items()} == shapes
    changed = {name for name in shapes if not np.array_equal(new[name], run.weights[name])}
    sinks = "_head_transformer._dataset_embedding.weight"
    assert changed == {sinks, "_head_transformer._head_token_embeddings"} | {
        name for name in shapes if name.endswith("affine.weight")
    }
    np.testing.assert_array_equal(new[sinks], old[sinks] + 1)
    assert not any(np.any(new[name]) for name in changed - {sinks})


def test_a_damaged_file_of_what_an_import_kept_is_named(run, tmp_path, capsys):
    kept = run.out / UNUSED_FILE
    content = kept.read_bytes()
    kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit, match="2"):
        main([str(run.out), "--out", str(tmp_path / "a.safetensors")])
    assert f"error: {kept} is damaged" in capsys.readouterr().err


def test_the_command_names_what_is_wrong(run, tmp_path, capsys):
    main([str(run.out), "--out", str(tmp_path / "a.safetensors")])
    capsys.readouterr()
    (run.out / "config.json").write_text(json.dumps({}))
    for arguments, sentence, status in (
        ([str(tmp_path / "nowhere"), "--out", str(tmp_path / "b.safetensors")], "nowhere", 2),
        ([str(run.out), "--out", str(tmp_path / "b.pt")], "must end in .safetensors", 2),
        ([str(run.out), "--out", "/proc/b.safetensors"], "--out /proc/b.safetensors cannot be", 1),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == status
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("b*"))

"""Evaluation of a run: what it measures, what it writes, and what it refuses."""

import json
import shutil

import onnx_files
import pytest

from data_pipelines.errors import UserError
from data_pipelines.procedural.capture_sets import procedural_sets
from data_pipelines.shard_writer import write_shards
from flexavatar_jax.evaluate import evaluate
from flexavatar_jax.train import train

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(make_tiny_config, tmp_path_factory):
    config, workdir = make_tiny_config(), tmp_path_factory.mktemp("run")
    config.steps = 2
    train(config, workdir)
    return workdir


def test_a_run_is_evaluated_into_metrics_and_a_report(run, tmp_path):
    arcface = onnx_files.embedding_file(tmp_path / "r50.onnx")
    keypoints = onnx_files.insightface_file(tmp_path / "2d106det.onnx")
    metrics = evaluate(run, csim=str(arcface), akd=str(keypoints))
    stored = json.loads((run / "metrics.json").read_text())
    assert stored == metrics
    assert {"psnr_unseen_all", "psnr_unseen_front", "psnr_unseen_back"} <= stored.keys()
    assert stored["steps"] == 2
    assert stored["seconds"] > 0
    assert 5 < stored["psnr_constant_all"] < 40
    assert -1 < stored["csim"] < 1
    assert stored["akd"] > 0
    assert 0 < stored["faces"] < stored["images"]
    page = (run / "report" / "index.html").read_text()
    assert f"alike to {stored['csim']:.3f} (CSIM)" in page
    assert f"are {stored['akd']:.2f} pixels" in page
    for name in ("orbit.png", "orbit_0.gif", "person_000.png", "avatar.html"):
        assert name in page
        assert (run / "report" / name).stat().st_size > 0
    first, last = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    for number in (first["step"], last["step"], f"{first['loss']:.3g}", f"{last['loss']:.3g}"):
        assert f">{number}</text>" in page


def test_a_set_is_evaluated_without_the_training_data(run, tiny_data, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(tiny_data / "procedural_test", tmp_path / "mine")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace(str(tiny_data), "/nowhere"))
    (tmp_path / "run" / "digests.json").unlink()
    metrics = evaluate(tmp_path / "run", data_root=str(tmp_path), dataset="mine")
    assert "psnr_unseen_back" in metrics
    assert not any("_constant_" in key for key in metrics)
    assert "/nowhere/procedural_monocular" in metrics["no_constant"]
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert metrics["no_constant"] in page
    assert "people of mine" in page
    assert "constant's" not in page


def test_portraits_of_ones_own_are_shown_again_beside_the_runs_own_report(run, tmp_path):
    """With the constant of the training data, which lie where they lay."""
    monocular, *_ = procedural_sets(size=32, monocular_people=2, monocular_timesteps=1)
    write_shards(monocular, tmp_path)
    own = sorted((path, path.stat().st_mtime) for path in run.rglob("*"))
    report = tmp_path / "mine" / "report"
    report.mkdir(parents=True)
    for name in ("person_007.png", "holiday.png"):
        (report / name).touch()
    metrics = evaluate(run, data_root=str(tmp_path), dataset=monocular.name, out=tmp_path / "mine")
    assert sorted((path, path.stat().st_mtime) for path in run.rglob("*")) == own
    assert json.loads((tmp_path / "mine" / "metrics.json").read_text()) == metrics
    assert {"psnr_input_all", "psnr_constant_all", "self_reconstruction"} < metrics.keys()
    assert not any("unseen" in key or "identity" in key for key in metrics)
    page = (report / "index.html").read_text()
    assert "Self-reconstruction: there is one picture of everybody" in page
    assert "Identity rank-1" not in page
    assert f"<td>{metrics['psnr_input_all']:.2f}</td>" in page
    assert "<h2>Training</h2>" in page
    assert not (report / "person_007.png").exists()
    assert (report / "holiday.png").exists()


def test_a_test_set_smaller_than_the_model_is_named(run, tmp_path):
    (*_, small) = procedural_sets(
        size=16, test_people=1, test_timesteps=1, num_cameras=2, monocular_people=1
    )
    write_shards(small, tmp_path)
    with pytest.raises(ValueError, match=r"procedural_test holds images of 16 pixels, .* for 32"):
        evaluate(run, data_root=str(tmp_path))


def test_a_report_that_cannot_be_written_is_named_before_the_work(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    (tmp_path / "run" / "report").write_text("the annual one")
    with pytest.raises(UserError, match=r"run/report cannot be written \(File exists\); move it"):
        evaluate(tmp_path / "run", step=12345)  # not even looked for


def test_weights_for_which_the_model_has_no_use_are_named(run):
    with pytest.raises(ValueError, match=r"--dinov2 no\.file: the model of .* needs no DINOv2"):
        evaluate(run, dinov2="no.file")


def test_networks_are_looked_at_before_the_work(run, tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx cannot be read"):
        evaluate(run, step=12345, akd=str(tmp_path / "none.onnx"))


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match=r"not a run's folder"):
        evaluate(tmp_path)

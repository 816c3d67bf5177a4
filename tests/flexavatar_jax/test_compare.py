"""A comparison of configs over seeds: it goes on where it stopped, and writes what came out."""

import json
import re

import numpy as np
import pytest
from experiment_file import write_experiment
from PIL import Image

from data_pipelines.errors import UserError
from flexavatar_jax.compare import compare
from flexavatar_jax.evaluation import matrix
from flexavatar_jax.evaluation.comparison_page import write_page
from flexavatar_jax.evaluation.matrix import read_experiment

pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_experiments(config, folder):
    """Two configs: one sink for both sources, and one for each."""
    paths = []
    for name, sinks in (("shared", False), ("own", True)):
        config.steps, config.model.bias_sinks = 2, sinks
        (folder / name).mkdir()
        path = write_experiment(config, folder / name)
        paths.append(str(path.rename(folder / f"{name}.py")))
    return paths


def test_a_comparison_goes_on_where_it_was_stopped_seed_by_seed(tiny_config, tmp_path, monkeypatch):
    asked, stop_at = [], []

    def train(config, workdir):
        run = (config.model.bias_sinks, config.seed)
        asked.append(run)
        return 75 if run in stop_at else 0

    def evaluate(workdir):
        (workdir / "report").mkdir(parents=True)
        (workdir / "report" / "avatar.html").write_text(f"the avatar of {workdir.parent.name}")
        (workdir / "metrics.json").write_text(json.dumps({"steps": 2, "psnr_unseen_all": 17.0}))

    monkeypatch.setattr(matrix, "train", train)
    monkeypatch.setattr(matrix, "evaluate", evaluate)
    blank = np.zeros((4, 4, 3))
    monkeypatch.setattr("flexavatar_jax.compare.orbit_sheet", lambda runs, person: blank)
    monkeypatch.setattr("flexavatar_jax.compare.pose_sheet", lambda runs: blank)
    configs, out = write_experiments(tiny_config, tmp_path), tmp_path / "out"
    stop_at.append((True, 3))
    assert compare(configs, [3, 4], tmp_path / "runs", str(out)) == 75
    assert asked == [(False, 3), (True, 3)]
    assert list(json.loads((out / "results.json").read_text())["runs"]) == ["shared"]
    stop_at.clear()
    asked.clear()
    assert compare(configs, [3, 4], tmp_path / "runs", str(out)) == 0
    assert asked == [(True, 3), (False, 4), (True, 4)]
    stored = json.loads((out / "results.json").read_text())
    assert {name: sorted(seeds) for name, seeds in stored["runs"].items()} == {
        "shared": ["3", "4"],
        "own": ["3", "4"],
    }
    assert (out / "orbits_0.png").exists()
    assert (out / "avatar_own.html").read_text() == "the avatar of own"


def test_the_page_shows_every_table_cell_picture_and_avatar(tmp_path):
    runs = {name: tmp_path / name for name in ("sinks", "a<b#50%")}
    for run in runs.values():
        (run / "report").mkdir(parents=True)
        (run / "report" / "avatar.html").write_text("")
    measured = {
        "3": {"steps": 5, "psnr_unseen_all": 17.0},
        "4": {"steps": 5, "psnr_unseen_all": 18},
    }
    write_page(tmp_path, dict.fromkeys(runs, measured), ["orbits_0.png", "orbits_1.png"], runs)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<td>17.50 ± 0.71</td>") == 2
    assert re.findall(r'<img src="(.*?)" alt=".', page) == [
        "orbits_0.png",
        "orbits_1.png",
        "poses.png",
        "curves.svg",
    ]
    assert '<iframe src="avatar_sinks.html"' in page
    assert '<iframe src="avatar_a%3Cb%2350%25.html"' in page
    assert "a<b" not in page
    assert "a&lt;b" in page


@pytest.mark.slow
def test_two_configs_are_compared_and_not_trained_again(tiny_config, tmp_path, capsys):
    configs = write_experiments(tiny_config, tmp_path)
    runs, out = tmp_path / "runs", tmp_path / "out"
    assert compare(configs, [3], runs, str(out)) == 0
    stored = json.loads((out / "results.json").read_text())
    assert {name: list(seeds) for name, seeds in stored["runs"].items()} == {
        "shared": ["3"],
        "own": ["3"],
    }
    assert stored["runs"]["own"]["3"]["steps"] == 2
    assert "psnr_unseen_back" in stored["runs"]["own"]["3"]
    assert (out / "table.md").read_text().count("\n") == 4
    assert '<iframe src="avatar_own.html"' in (out / "index.html").read_text()
    assert "canvas" in (out / "avatar_own.html").read_text()
    assert "own</text>" in (out / "curves.svg").read_text()
    # One row without sinks of its own, one a sink, and the truth.
    assert np.asarray(Image.open(out / "orbits_0.png")).shape[0] == 4 * 112
    assert np.asarray(Image.open(out / "poses.png")).shape[0] == 3 * 112

    before = (runs / "own" / "3" / "metrics.jsonl").stat().st_mtime_ns
    assert compare(configs, [3], runs, str(out)) == 0
    assert (runs / "own" / "3" / "metrics.jsonl").stat().st_mtime_ns == before


def test_what_is_no_experiment_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.py, which is no file"):
        read_experiment(f"{tmp_path}/nowhere.py")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match=r"empty\.py, which has no get_config"):
        read_experiment(f"{tmp_path}/empty.py")
    name, config = read_experiment("configs/search.py:patch_16")
    assert (name, config.model.patch_size) == ("patch_16", 16)


def test_the_ablations_configs_differ_in_sources_and_sinks_alone():
    names = ("only_mono", "only_multi", "no_sinks", "sinks")
    configs = [read_experiment(f"configs/ablation/{name}.py")[1] for name in names]
    assert [len(config.data.mixture) for config in configs] == [1, 1, 2, 2]
    assert [config.model.bias_sinks for config in configs] == [False] * 3 + [True]
    for config in configs:
        del config.data.mixture, config.model.bias_sinks
    assert all(config == configs[0] for config in configs)

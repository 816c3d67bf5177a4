"""The command line that prepares data sets."""

import importlib
import json

import pytest

from data_pipelines.errors import GIVE_UP
from data_pipelines.prepare import DATA_SETS, main
from data_pipelines.shards import PreparedSet

TINY = ["--size=16", "--monocular-people=2", "--multiview-people=1", "--test-people=1"]
TINY += ["--monocular-timesteps=2", "--multiview-timesteps=1", "--num-cameras=2", "--workers=1"]


def test_procedural_sets_are_prepared_resumed_and_protected(tmp_path, capsys):
    command = ["procedural", "--out", str(tmp_path), *TINY]
    assert main(command) == 0
    assert "procedural_monocular: 2 people, 2 clips, 4 frames" in capsys.readouterr().out
    names = ["procedural_monocular", "procedural_multiview", "procedural_test"]
    assert [PreparedSet(tmp_path / name).name for name in names] == names
    settings = json.loads((tmp_path / names[0] / "settings.json").read_text())
    assert (settings["size"], settings["seed"]) == (16, 0)
    # Folders of before trackers could err go on.
    assert "reported_turn" not in settings
    assert main(command) == 0
    assert main([*command, "--reported-turn", "0.5"]) == GIVE_UP
    assert main([*command, "--seed", "1"]) == GIVE_UP
    errors = capsys.readouterr().err
    assert "error: " in errors
    assert "was prepared with seed 0, not 1" in errors
    assert "was prepared with reported_turn None, not 0.5" in errors


@pytest.mark.parametrize("arguments", [[], ["portraits"], ["procedural"]])
def test_wrong_usage_exits_with_status_2(arguments):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_options_out_of_range_are_named(tmp_path, capsys):
    assert main(["procedural", "--out", str(tmp_path), "--size", "8"]) == GIVE_UP
    assert "16 to 512 pixels, got 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [("quality", 500, "1 to 100"), ("quality", -1, "1 to 100"), ("workers", 0, "1 or more")],
)
def test_quality_and_workers_out_of_range_are_named(option, value, expected, tmp_path, capsys):
    assert main(["procedural", "--out", str(tmp_path), *TINY, f"--{option}={value}"]) == GIVE_UP
    assert f"--{option} is {value}; expected {expected}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", DATA_SETS)
def test_every_data_set_has_its_module(name):
    module = importlib.import_module(f"data_pipelines.datasets.{name}")
    assert callable(module.add_arguments)
    assert callable(module.capture_sets)

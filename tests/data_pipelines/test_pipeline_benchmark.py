"""The benchmark of the input pipeline prints its stages, its speed and a verdict."""

import re

import pytest
from tiny_captures import TinyCaptures

from data_pipelines.benchmark import main
from data_pipelines.errors import GIVE_UP, TRY_AGAIN
from data_pipelines.figures import Figures
from data_pipelines.shard_writer import write_shards


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_shards(TinyCaptures("mono", size=32), root)
    write_shards(TinyCaptures("multi", size=32, cameras=2), root)
    return root


def run(capsys, *arguments) -> str:
    assert main([*map(str, arguments), "--batch=2", "--targets=1", "--seconds=0.2"]) == 0
    return capsys.readouterr().out


def test_names_the_stage_that_takes_longest(root, capsys):
    out = run(capsys, root, "--size", 16)
    assert "mono, multi: 60 images, read at 16 pixels" in out
    times = dict(re.findall(r"^  (\w+) +([\d.]+) ms an image", out, re.MULTILINE))
    slowest = re.search(r"^  (\w+) .*takes longest", out, re.MULTILINE)[1]
    assert times.keys() == {"draw", "read", "verify", "decode"}
    assert float(times[slowest]) == max(map(float, times.values()))
    assert float(re.search(r"cores: (\d+) images/s", out)[1]) > 0


def test_says_whether_it_feeds_a_step(root, capsys):
    assert "this feeds a step of 100 s with 2 examples" in run(capsys, root, "--step-time=100")
    assert "does NOT feed a step of 1e-05 s" in run(capsys, root, "--step-time=1e-5")


def test_takes_a_single_set_and_writes_what_it_measured(root, tmp_path, capsys):
    out = run(capsys, root / "multi", f"--json={tmp_path}/figures.json")
    assert "multi: 40 images" in out
    figures = Figures.read(tmp_path / "figures.json")
    assert (figures.data, figures.size, figures.remote) == (["multi"], 32, False)
    assert f"together {1e3 * figures.seconds:7.3f} ms" in out


@pytest.mark.parametrize(
    ("option", "value", "least"), [("workers", -1, 0), ("batch", 0, 1), ("size", 0, 1)]
)
def test_numbers_out_of_range_are_named(root, capsys, option, value, least):
    assert main([str(root), f"--{option}={value}"]) == GIVE_UP
    assert f"error: --{option} is {value}; expected {least} or more" in capsys.readouterr().err


def test_folder_without_data_is_named(tmp_path, capsys):
    assert main([str(tmp_path)]) == TRY_AGAIN
    assert f"error: {tmp_path} holds no finished data set" in capsys.readouterr().err

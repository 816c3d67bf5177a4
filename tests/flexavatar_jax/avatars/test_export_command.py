"""`avatar export`: what it writes, and what it says to a mistake."""

import numpy as np
import pytest
from lively_model import lively_run

from flexavatar_jax import avatar
from kernels.ply import read_ply

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return lively_run(tmp_path_factory.mktemp("lively"))


def export(run, *options):
    folder, file = run
    avatar.main(["export", str(file), "--workdir", str(folder), *map(str, options)])


def test_one_expression_is_one_file_of_each_format(run, tmp_path, capsys):
    export(run, "--ply", tmp_path / "a.ply", "--glb", tmp_path / "a.glb", "--set", "smile=1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.glb", "a.ply"]
    assert str(tmp_path / "a.ply") in capsys.readouterr().out
    smiling = read_ply(tmp_path / "a.ply").means
    export(run, "--ply", tmp_path / "b.ply")
    assert np.abs(read_ply(tmp_path / "b.ply").means - smiling).max() > 1e-4


def test_a_sweep_is_numbered_files_from_end_to_end(run, tmp_path):
    export(run, "--ply", tmp_path / "a.ply", "--sweep", "smile")
    files = sorted(tmp_path.iterdir())
    assert [p.name for p in files[:2]] == ["a_00000.ply", "a_00001.ply"]
    assert len(files) == 24
    first, last = (read_ply(p).means for p in (files[0], files[-1]))
    assert np.abs(first - last).max() > 1e-4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "nothing to export: give --html FILE"),
        (("--ply", "head.obj"), "--ply head.obj must end in .ply"),
        (("--html", "no/folder/head.html"), "there is no folder no/folder"),
        (("--ply", "a.ply", "--set", "grin=1"), "expected SLIDER=VALUE with one of jaw open"),
        (("--ply", "a.ply", "--set", "smile=9"), "smile goes from -1.5 to 2"),
        (("--ply", "a.ply", "--set", "smile=wide"), "smile goes from -1.5 to 2"),
        (("--ply", "a.ply", "--sweep", "grin"), "--sweep grin: there is no such slider"),
        (("--ply", "a.ply", "--sweep", "smile", "--driving", "x"), "leave out --sweep and --set"),
    ],
)
def test_mistakes_are_named_in_one_sentence(options, expected, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        export(run, *options)
    assert stopped.value.code != 0
    message = capsys.readouterr().err
    assert message.splitlines()[-1].startswith("error: ")
    assert expected in message
    assert not list(tmp_path.iterdir())

"""A user's mistake on the command line gets one sentence and a non-zero exit status."""

import subprocess
import sys

import pytest

MISTAKES = {
    "a config field that does not exist": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.model.widht=4"],
        "widht",
    ),
    "a value of the wrong type": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.batch=four"],
        "four",
    ),
    "a config file that does not exist": (
        ["--config=configs/no_such.py", "--workdir={tmp}/run"],
        "configs/no_such.py",
    ),
    "no workdir": (["--config=configs/demo.py"], "workdir"),
    "an unknown flag": (["--config=configs/demo.py", "--workdir={tmp}/run", "--foo=1"], "foo"),
    "data that is not there": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.data.root={tmp}/none"],
        "{tmp}/none",
    ),
    "a batch that the mesh cannot split": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.accumulate=5"],
        "config.batch",
    ),
    "a mesh of more devices than there are": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.mesh.fsdp=3"],
        "config.mesh",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_training_names_the_mistake_in_one_sentence(mistake, tmp_path):
    arguments, expected = MISTAKES[mistake]
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "flexavatar_jax.train", *arguments], capture_output=True, text=True
    )
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected.format(tmp=tmp_path) in errors[0]

"""A user's mistake on the command line gets one sentence and a status that says what to do."""

import sys

import pytest
from absl import flags
from command_line import run_command
from ml_collections import config_flags

from data_pipelines.errors import UserError
from flexavatar_jax import cli
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.runs.workdir import read_config
from flexavatar_jax.train import train

MISTAKES = {
    "a config field that does not exist": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.model.widht=4"],
        "widht",
        2,
    ),
    "a value of the wrong type": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.batch=four"],
        "four",
        2,
    ),
    "a config file that does not exist": (
        ["--config=configs/no_such.py", "--workdir={tmp}/run"],
        "configs/no_such.py",
        2,
    ),
    "no workdir": (["--config=configs/demo.py"], "workdir", 2),
    "an unknown flag": (["--config=configs/demo.py", "--workdir={tmp}/run", "--foo=1"], "foo", 2),
    "data that is not there": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.data.root={tmp}/none"],
        "{tmp}/none",
        1,  # it may be there the next time
    ),
    "a mixture of one's own, of data that is not there": (
        [
            *("--config=configs/demo.py", "--workdir={tmp}/run", "--config.data.root={tmp}"),
            "--config.data.mixture={{'mine': 1.0}}",
        ],
        "{tmp}/mine holds no finished data set",
        1,
    ),
    "a weight that is no number": (
        [
            *("--config=configs/demo.py", "--workdir={tmp}/run"),
            "--config.data.mixture={{'mine': 'x'}}",
        ],
        "data.mixture.mine is 'x'",
        2,
    ),
    "a batch that the mesh cannot split": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.accumulate=5"],
        "config.batch",
        2,
    ),
    "a mesh of more devices than there are": (
        ["--config=configs/demo.py", "--workdir={tmp}/run", "--config.mesh.fsdp=3"],
        "config.mesh",
        2,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_training_names_the_mistake_in_one_sentence(mistake, tmp_path):
    arguments, expected, status = MISTAKES[mistake]
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    done = run_command("flexavatar_jax.train", *arguments)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert expected.format(tmp=tmp_path) in errors[0]


CONFIG_MISTAKES = {
    "no such file": (["--config", "{tmp}/none.py"], "no config file {tmp}/none.py; configs/"),
    "no such file, after =": (["--config={tmp}/none.py"], "no config file {tmp}/none.py; configs/"),
    "no such file, which has an argument": (["--config={tmp}/none.py:big"], "{tmp}/none.py; "),
    "a file of another kind": (["--config", "README.md"], "README.md is not a Python config file"),
    "a file that is not Python": (["--config={tmp}/broken.py"], "line 2 of {tmp}/broken.py is not"),
    "a field that does not exist": (
        ["--config=configs/demo.py", "--config.nofield=3"],
        "the config has no field nofield",
    ),
    "a field that is spelt wrong": (
        ["--config=configs/demo.py", "--config.model.widht=3"],
        'the config has no field widht. Did you mean "width"',
    ),
    "no file at all": (["--config"], "Missing value for flag --config"),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_what_is_wrong_with_a_config_is_said_in_one_sentence(
    mistake, tmp_path, capsys, monkeypatch
):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
    monkeypatch.setattr(flags, "FLAGS", values)
    (tmp_path / "broken.py").write_text("def get_config():\n    return {\n")
    arguments, expected = CONFIG_MISTAKES[mistake]
    # ml_collections looks for overrides there.
    monkeypatch.setattr(sys, "argv", ["train", *(a.format(tmp=tmp_path) for a in arguments)])
    with pytest.raises(SystemExit, match="2"):
        cli.parse_flags(sys.argv)
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert expected.format(tmp=tmp_path) in message


def test_a_package_that_is_not_installed_is_named_in_one_sentence(monkeypatch, capsys):
    def main():
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "gcsfs", None)
            read_config("gs://bucket/run")

    with pytest.raises(SystemExit, match="2"):
        cli.guard(main)
    message = "error: --workdir gs://bucket/run: Please install gcsfs to access Google Storage\n"
    assert capsys.readouterr().err == message


def test_a_defect_of_the_program_keeps_its_trace(make_tiny_config, tmp_path, monkeypatch, capsys):
    """A ValueError from inside the model is nobody's mistake but ours."""

    def broken(self, *_):
        raise ValueError("shapes do not fit")

    monkeypatch.setattr(FlexAvatar, "encode", broken)
    with pytest.raises(ValueError, match="shapes do not fit") as error:
        cli.guard(lambda: train(make_tiny_config(), tmp_path / "run"))
    assert not isinstance(error.value, UserError)
    assert "error: " not in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named_before_the_work(tmp_path):
    cli.check_out(tmp_path / "new.txt")
    cli.check_out(tmp_path / "new" / "new.txt", create=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]
    with pytest.raises(UserError, match="there is no folder"):
        cli.check_out(tmp_path / "none" / "new.txt")
    with pytest.raises(UserError, match=r"--out .* is a folder"):
        cli.check_out(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*file/new.txt cannot be written \("):
        cli.check_out(tmp_path / "file" / "new.txt", create=True)

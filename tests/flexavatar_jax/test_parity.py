"""Outputs of the published size, with weights by a rule, against the reference outputs."""

import re

import numpy as np
import pytest

from flexavatar_jax.check_parity import Result, check_model, main, read_case


@pytest.mark.slow
def test_the_model_imported_by_name_gives_the_reference_outputs(shared_dir):
    folder = shared_dir / "flex1"
    results = list(check_model(folder, read_case(folder), "public"))
    assert len(results) == 12
    assert [result for result in results if not result.ok] == []


@pytest.mark.slow
def test_the_command_fails_where_an_output_is_off(shared_dir, tmp_path, capsys):
    """References of one salt against the model of another: everything is over, and it says so."""
    with pytest.raises(SystemExit) as exit_:
        main(["--shared", str(shared_dir), "--salt", "another"])
    assert exit_.value.code == 1
    rows = re.findall(r"^(\S+) +(\S+) +(\S+)(  OVER)?$", capsys.readouterr().out, re.MULTILINE)
    over = {name for name, *_, verdict in rows if verdict}
    # Two outputs depend on no weights.
    assert len(rows) == 1 + 18
    assert {name for name, *_ in rows[1:]} - over == {"plucker_s", "dinov2_reg_base_input224"}


def test_errors_within_the_tolerance_are_fine_and_no_number_is_not():
    assert Result("a", 1e-6, 5e-6).ok
    assert not Result("a", 6e-6, 5e-6).ok
    assert not Result("a", np.nan, 5e-6).ok


def test_a_missing_case_is_named(shared_dir, tmp_path, capsys):
    for arguments, sentence in (
        (["--shared", str(tmp_path)], "flex1/manifest.json"),
        (["--shared", str(shared_dir), "--case", str(tmp_path)], "no input.png"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 1
        assert sentence in capsys.readouterr().err

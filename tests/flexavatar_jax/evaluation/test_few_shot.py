"""Few shots: quality is measured on frames that no avatar was made from."""

import json

import numpy as np
import pytest

from data_pipelines.errors import UserError
from data_pipelines.shards import PreparedSet
from flexavatar_jax.avatars.fit import FitSettings
from flexavatar_jax.evaluation.few_shot import (
    evaluate_few_shots,
    few_shot,
    print_table,
    read_people,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_unseen_frames_are_among_nobodys_pictures(tiny_data):
    (person,) = read_people(PreparedSet(tiny_data / "procedural_test"), [1, 4], 1, 100, 32)
    seen = {tuple(c.ravel()) for o in person.observed.values() for c in o.cam2heads[o.seen]}
    unseen = {tuple(f.cam2head.ravel()) for f in person.unseen}
    assert len(seen) >= 4
    assert not seen & unseen
    assert len(seen) + len(unseen) == len(PreparedSet(tiny_data / "procedural_test")) // 2


def test_fitting_is_compared_with_the_encoder_alone(animator, tiny_data, capsys):
    people = read_people(PreparedSet(tiny_data / "procedural_test"), [2], 1, 4, 24)
    table = few_shot(animator, people, FitSettings(steps=5))
    assert list(table) == ["2 encoder", "2 fitted"]
    assert table["2 fitted"]["psnr_all"] != table["2 encoder"]["psnr_all"]
    print_table(table)
    assert f"| 2 fitted | {table['2 fitted']['psnr_all']:.2f} / " in capsys.readouterr().out


def test_a_set_with_nothing_left_to_predict_is_named(rule_run, tiny_data):
    with pytest.raises(UserError, match=r"--shots leaves none unseen; give fewer"):
        read_people(PreparedSet(tiny_data / "procedural_monocular"), [3], 1, 4, 24)
    with pytest.raises(UserError, match="--shots 0: expected numbers of pictures"):
        evaluate_few_shots(rule_run, [0])


def test_the_table_is_kept(rule_run, tiny_data):
    table = evaluate_few_shots(rule_run, [1], data_root=str(tiny_data), dataset="procedural_test")
    assert json.loads((rule_run / "few_shot.json").read_text()) == table
    assert np.isfinite(table["1 encoder"]["psnr_all"])

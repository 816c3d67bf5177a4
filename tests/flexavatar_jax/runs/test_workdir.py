"""Configs of older runs open, with their fields as they are called and meant now."""

import json

import pytest

from configs import flex1
from flexavatar_jax.runs.workdir import read_config


@pytest.mark.parametrize(("stored", "share"), [(True, 1.0), (False, 0.0), (0.5, 0.5)])
def test_older_configs_say_of_all_blocks_or_none_that_they_are_recomputed(tmp_path, stored, share):
    fields = json.loads(flex1.get_config().to_json_best_effort())
    fields["model"]["remat"] = stored
    fields["model"]["head_tokens"] = fields["model"].pop("head_resolution")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = read_config(tmp_path).model
    assert isinstance(model.remat, float)
    assert model.remat == share
    assert model.head_resolution == 32

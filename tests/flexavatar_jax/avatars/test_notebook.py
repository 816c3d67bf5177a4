"""notebooks/avatars.ipynb runs from top to bottom, and the README's ten lines do."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexavatar_jax.avatars import load_avatar

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[3]


def test_the_notebook_runs_and_its_pictures_differ(rule_run, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXAVATAR_RUN", str(rule_run))
    monkeypatch.setenv("FLEXAVATAR_PEOPLE", str(tiny_data / "procedural_test"))
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "notebooks" / "avatars.ipynb").read_text())["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["losses"][-1] < names["losses"][0]
    assert np.abs(names["closer"] - names["around"]).max() > 0.02
    steps = np.abs(np.diff(names["between"], axis=0)).mean(axis=(1, 2, 3))
    assert steps.min() > 0
    with Image.open("anna.gif") as film:
        assert film.n_frames == 8


def test_the_readmes_lines_run(rule_run, tiny_data, tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    (snippet,) = (s for s in re.findall(r"```python\n(.*?)```", readme, re.S) if "load_model" in s)
    for link, target in (("runs/demo", rule_run), ("data/procedural", tiny_data)):
        (tmp_path / link).parent.mkdir()
        (tmp_path / link).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    assert names["loaded"].step == 7
    assert load_avatar("me.avatar").code.shape == names["avatar"].code.shape
    assert names["gaussians"].means.shape[0] == len(names["avatar"].expressions)
    with Image.open("orbit.gif") as film:
        assert film.n_frames == 72

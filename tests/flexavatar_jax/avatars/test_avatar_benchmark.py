"""The benchmark of avatars: what it measures, and that FLEX-1's sizes need nobody's weights."""

import json

import pytest
from small_model import small_config

from configs import flex1
from flexavatar_jax.avatars import benchmark

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_runs_frames_their_parts_and_a_fit_are_timed(rule_run, tmp_path, capsys):
    out = tmp_path / "avatars.json"
    command = ["--workdir", str(rule_run), "--chunk", "2", "--repeats", "2", "--fit_steps", "3"]
    benchmark.main([*command, "--out", str(out)])
    found = json.loads(out.read_text())
    whole, *parts = found["parts"]
    assert [p["name"] for p in parts] == ["decoder", "upsampler", "gaussians", "render"]
    assert all(p["ms"] > 0 and p["cpu_ms"] > 0 for p in found["parts"])
    assert whole["ms"] > max(p["ms"] for p in parts) / 3
    assert found["frames_a_second"] == pytest.approx(2e3 / whole["ms"], rel=0.01, abs=1e-3)
    assert parts[0]["gflop"] is not None
    assert found["fit"]["steps"] == 3
    assert found["fit"]["seconds_of_200_steps"] > 0
    said = capsys.readouterr().out
    assert f"{found['gaussians']} Gaussians at 24x24, 2 at once" in said
    assert "| render |" in said
    assert "s of 200 steps" in said


def test_flex1s_sizes_come_with_weights_by_the_rule(monkeypatch):
    config = flex1.get_config()
    config.model = small_config(dino=True, dtype="bfloat16")
    monkeypatch.setattr(flex1, "get_config", lambda: config)
    loaded = benchmark.flex1_by_rule(dtype="float32")
    assert loaded.config.model.dtype == "float32"
    whole, *_ = benchmark.benchmark_frames(loaded, chunk=1, repeats=1)
    assert whole.name == "decode and render"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--chunk=0"], "--chunk is 0; expected 1 or more"),
        (["--fit_steps=1"], "--fit_steps is 1; expected 0, or 2 or more"),
        (["--workdir=nowhere"], "nowhere"),
        (["--workdir=nowhere", "--dtype=float32"], "are the run's own"),
        (["--backend=metal"], "backend is 'metal'"),
        (["--out=no/folder/a.json"], "there is no folder no/folder"),
    ],
)
def test_mistakes_are_named_before_the_work(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "benchmark_frames", None)  # not reached
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert sentence in capsys.readouterr().err.splitlines()[-1]

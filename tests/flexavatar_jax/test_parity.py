"""Outputs of the published size, with weights by a rule, against the reference outputs."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from data_pipelines.frame import MULTI_VIEW
from flexavatar_jax import check_parity
from flexavatar_jax.check_parity import main
from flexavatar_jax.model.flexavatar import FlexAvatar
from flexavatar_jax.model.render import render
from flexavatar_jax.published.parity import Result, check_model, import_rule_model, read_case
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.training.losses import psnr


@pytest.mark.slow
def test_the_model_imported_by_name_gives_the_reference_outputs(shared_dir):
    folder = shared_dir / "flex1"
    results = list(check_model(folder, read_case(folder), "public"))
    assert len(results) == 12
    assert [result for result in results if not result.ok] == []


def test_the_command_multiplies_in_float32_on_every_device(shared_dir, monkeypatch):
    precisions = []

    def part(*args):
        precisions.append(jax.config.jax_default_matmul_precision)
        yield Result("output", 0.0, 0.0)

    for name in ("check_model", "check_frozen_networks"):
        monkeypatch.setattr(check_parity, name, part)
    assert check_parity.check(shared_dir, None, "public")
    assert precisions == ["highest"] * 2


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


@pytest.mark.slow
def test_bfloat16_renders_the_image_of_float32(shared_dir, tmp_path):
    """Transformers in bfloat16 against all in float32: over 40 dB at 512x512."""
    folder = shared_dir / "flex1"
    case = read_case(folder)
    loaded = load_model(import_rule_model(folder, tmp_path, "public"), load_dinov2=False)
    config, template = loaded.config.model, loaded.model.gaussians.template
    config.dtype = "bfloat16"
    graph, _ = nnx.split(nnx.eval_shape(lambda: FlexAvatar(config, template, rngs=nnx.Rngs(0))))
    rounded = nnx.merge(graph, nnx.state(loaded.model))

    cam2head, K = (jnp.asarray(case.model[name][None], jnp.float32) for name in ("cam2flame", "K"))
    features = rearrange(case.model["features"], "1 b c h w -> b h w c")
    expression = case.model["expr"][:, :1]

    @nnx.jit
    def image(model):
        code = model.encode(case.image, cam2head, K, features)
        gaussians = model.decode(code, expression, jnp.array([MULTI_VIEW]))
        gaussians = jax.tree.map(lambda x: x[:, 0], gaussians)
        return render(gaussians, cam2head, K, jnp.ones((1, 3)), size=512).color

    exact = image(loaded.model)
    assert np.std(exact) > 0.1
    assert psnr(image(rounded), exact)[0] > 40


def test_errors_within_the_tolerance_are_fine_and_no_number_is_not():
    assert Result("a", 1e-6, 5e-6).ok
    assert not Result("a", 6e-6, 5e-6).ok
    assert not Result("a", np.nan, 5e-6).ok


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def drop_features(path):
    with np.load(path) as arrays:
        kept = {name: array for name, array in arrays.items() if name != "features"}
    np.savez(path, **kept)


@pytest.mark.parametrize(
    ("file", "damage", "sentence"),
    [
        ("input.png", cut, "input.png: does not decode as a picture"),
        ("parity.npz", cut, "parity.npz is damaged"),
        ("frozen_parity.npz", cut, "frozen_parity.npz is damaged"),
        ("parity.npz", drop_features, "parity.npz has no array features"),
    ],
)
def test_a_damaged_case_is_named(shared_dir, tmp_path, capsys, file, damage, sentence):
    for name in ("input.png", "parity.npz", "frozen_parity.npz"):
        shutil.copyfile(shared_dir / "flex1" / name, tmp_path / name)
    damage(tmp_path / file)
    with pytest.raises(SystemExit, match="2"):
        main(["--shared", str(shared_dir), "--case", str(tmp_path)])
    error = capsys.readouterr().err
    assert f"error: {tmp_path}/{sentence}" in error
    assert error.count("\n") == 1


def test_a_missing_case_is_named(shared_dir, tmp_path, capsys):
    for arguments, sentence in (
        (["--shared", str(tmp_path)], "flex1/manifest.json"),
        (["--shared", str(shared_dir), "--case", str(tmp_path)], "no input.png"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 1
        assert sentence in capsys.readouterr().err

"""Published weights come in whole from any container, or not at all."""

import json
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from data_pipelines.errors import UserError
from data_pipelines.head_mesh import template_mesh
from flexavatar_jax.import_flex1 import main
from flexavatar_jax.model.head_template import HeadTemplate
from flexavatar_jax.published import importer
from flexavatar_jax.published.importer import import_checkpoint
from flexavatar_jax.published.model_config import read_model_config
from flexavatar_jax.published.parity_rule import rule_weights
from flexavatar_jax.published.tensor_names import (
    abstract_params,
    flatten,
    published_shapes,
    unused_shapes,
    used_tensors,
)
from flexavatar_jax.runs.loading import load_model
from flexavatar_jax.runs.templates import format_obj, load_template


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A small model as it would be published: model_config.json, head.obj, and its weights."""
    folder = tmp_path_factory.mktemp("published")
    config = {
        "head_transformer": {
            "transformer": dict(n_layers=1, d_hidden=32, n_heads=2, use_causal_attention=True),
            "res_head_tokens": 4,
            "head_transformer_type": "UV_TEXTURE",
            "use_lam_transformer": True,
            "use_lam_point_embedder": True,
            "res_image_tokens": 3,
            "d_expression_codes": 135,
            "n_expression_tokens": 2,
            "use_head_tokens": True,
            "n_layers_expression_transformer": 2,
            "use_dataset_ids": True,
        },
        "gaussian_decoder": {
            "n_gaussians_per_token": 1,
            "res_uv_texture": 16,
            "upscale_uv_texture": 4,
            "use_stylegan_pixelshuffle_upsampler": True,
            "n_channels_color": 3,
            "use_lam_gs_decoder": True,
            "oversampling_factor": 1,
            "sh_degree": 0,
        },
        "patch_size": 6,
        "in_channels": 3,
        "n_layers_encoder": 1,
        "n_input_views": 1,
        "use_feature_projection": False,
        "feature_dim": 768,
        "use_plucker": True,
    }
    (folder / "model_config.json").write_text(json.dumps(config))
    template = HeadTemplate(*template_mesh(columns=12, rows=8))
    (folder / "head.obj").write_text(format_obj(template))
    model = read_model_config(folder / "model_config.json")
    shapes = published_shapes(model, flatten(abstract_params(model, template)))
    return folder, rule_weights(shapes)


class Files:
    """Arguments of the importer for weights that a test writes to `checkpoint`."""

    def __init__(self, folder, weights, tmp_path):
        self.weights = dict(weights)
        self.config = folder / "model_config.json"
        self.template = folder / "head.obj"
        self.checkpoint = tmp_path / "weights.safetensors"
        self.out = tmp_path / "out"
        self.folder = tmp_path

    def run(self):
        import_checkpoint(self.checkpoint, self.config, self.template, self.out)

    def refused(self, *sentences):
        """The import fails in one sentence, in which are `sentences`, and leaves nothing."""
        before = set(self.folder.iterdir())
        with pytest.raises(UserError) as error:
            self.run()
        message = str(error.value)
        assert "\n" not in message
        for sentence in sentences:
            assert sentence in message
        assert set(self.folder.iterdir()) == before


@pytest.fixture
def files(published, tmp_path):
    return Files(*published, tmp_path)


def save_torch(path, tree):
    """`tree`'s arrays as torch.save writes tensors."""
    import torch_save

    def tensors(value):
        if isinstance(value, dict):
            return {key: tensors(v) for key, v in value.items()}
        if isinstance(value, np.ndarray):
            flat = torch_save.Storage(np.ascontiguousarray(value).reshape(-1), "FloatStorage")
            strides = tuple(s // value.itemsize for s in np.ascontiguousarray(value).strides)
            return torch_save.tensor(flat, value.shape, strides)
        return value

    torch_save.save(path, tensors(tree))


@pytest.fixture
def torch_writer(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "tests" / "data_pipelines")


def imported(files):
    loaded = load_model(files.out)
    return flatten(nnx.state(loaded.model, nnx.Param)), loaded.config.model


def check_weights(files):
    params, config = imported(files)
    for tensor in used_tensors(config):
        np.testing.assert_array_equal(tensor.to_published(params), files.weights[tensor.name])


def test_safetensors(files):
    save_file(files.weights, files.checkpoint)
    files.run()
    check_weights(files)
    template = load_model(files.out).model.gaussians.template
    np.testing.assert_array_equal(template.vertices, load_template(files.template).vertices)


def test_npz_with_a_common_prefix(files):
    files.checkpoint = files.checkpoint.with_suffix(".npz")
    np.savez(files.checkpoint, **{f"module.{name}": w for name, w in files.weights.items()})
    files.run()
    check_weights(files)


@pytest.mark.usefixtures("torch_writer")
def test_torch_save_with_the_state_dict_under_a_key(files):
    """Nested, beside an optimiser's state, with the names that torch.compile makes."""
    files.checkpoint = files.checkpoint.with_suffix(".pt")
    state = {
        name.replace("_head_transformer.", "_head_transformer._orig_mod."): w
        for name, w in files.weights.items()
    }
    optimizer = {"state": {"0": {"exp_avg": np.zeros(3, np.float32)}}, "lr": 1e-4}
    save_torch(files.checkpoint, {"step": 900_000, "model": state, "optimizer": optimizer})
    files.run()
    check_weights(files)


def test_sixteen_bit_weights_become_float32(files):
    files.weights = {name: w.astype(ml_dtypes.bfloat16) for name, w in files.weights.items()}
    save_file(files.weights, files.checkpoint)
    files.run()
    params, _ = imported(files)
    assert {p.dtype for p in params.values()} == {np.dtype(np.float32)}
    check_weights(files)


def test_every_tensor_is_accounted_for(files):
    name, other = "_expression", "_head_transformer._expression_mlp.0.bias"
    files.weights[name] = np.zeros(2, np.float32)
    files.weights[other] = files.weights[other][:-1]
    del files.weights["_conv_patchify.weight"]
    del files.weights["_gaussian_decoder._stylegan_upsampler.blocks.0.conv0.affine.weight"]
    save_file(files.weights, files.checkpoint)
    files.refused(
        "2 missing: _conv_patchify.weight, "
        "_gaussian_decoder._stylegan_upsampler.blocks.0.conv0.affine.weight;",
        f"1 not the model's: {name};",
        f"1 of another shape: {other} [255] instead of [256]",
    )


def test_published_names_cover_every_parameter_once(files):
    config = read_model_config(files.config)
    params = flatten(abstract_params(config, load_template(files.template)))
    paths = [path for tensor in used_tensors(config) for path in tensor.paths]
    assert len(paths) == len(set(paths))
    assert set(paths) == set(params)
    names = [tensor.name for tensor in used_tensors(config)] + list(unused_shapes(config))
    assert len(names) == len(set(names))


def test_integers_are_no_weights(files):
    files.weights["_conv_patchify.weight"] = files.weights["_conv_patchify.weight"].astype(int)
    save_file(files.weights, files.checkpoint)
    files.refused("_conv_patchify.weight int64")


def test_another_filter_is_refused(files):
    name = "_gaussian_decoder._stylegan_upsampler.blocks.1.conv1.resample_filter"
    files.weights[name] = files.weights[name] * 2
    save_file(files.weights, files.checkpoint)
    files.refused(name)


def test_two_models_in_one_file(files):
    both = {f"{p}.{name}": w for p in ("model", "ema") for name, w in files.weights.items()}
    save_file(both, files.checkpoint)
    files.refused("twice", "'model.'", "'ema.'")


def test_a_checkpoint_of_something_else(files):
    save_file({"encoder.weight": np.zeros((2, 2), np.float32)}, files.checkpoint)
    files.refused("no tensor of FLEX-1")


def test_damaged_files(files, tmp_path):
    save_file(files.weights, files.checkpoint)
    whole = files.checkpoint.read_bytes()
    files.checkpoint.write_bytes(whole[: len(whole) // 2])
    files.refused(str(files.checkpoint), "damaged")
    files.checkpoint = tmp_path / "weights.npz"
    np.savez(files.checkpoint, **files.weights)
    whole = files.checkpoint.read_bytes()
    files.checkpoint.write_bytes(whole[: len(whole) // 2])
    files.refused(str(files.checkpoint), "damaged")
    files.checkpoint = tmp_path / "weights.pt"
    files.checkpoint.write_bytes(whole[: len(whole) // 2])
    files.refused(str(files.checkpoint))
    files.checkpoint = tmp_path / "nowhere.pt"
    files.refused(str(files.checkpoint))


def test_a_hostile_pickle_is_not_run(files, tmp_path):
    files.checkpoint = tmp_path / "weights.pt"
    with zipfile.ZipFile(files.checkpoint, "w") as archive:
        archive.writestr("weights/data.pkl", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")
        archive.writestr("weights/version", "3\n")
    files.refused("os.system")


def test_an_npz_of_pickles_is_not_run(files, tmp_path):
    files.checkpoint = tmp_path / "weights.npz"
    np.savez(files.checkpoint, a=np.array([{}], dtype=object))
    files.refused(str(files.checkpoint))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("head_transformer.transformer.n_layers", None, "has no field"),
        ("head_transformer.transformer.n_layers", "4", "positive whole number"),
        ("head_transformer.transformer.use_causal_attention", False, "only True"),
        ("gaussian_decoder.sh_degree", 3, "only 0"),
        ("gaussian_decoder.upscale_uv_texture", 8, "only 4"),
        ("patch_size", 0, "positive whole number"),
        ("use_feature_projection", "yes", "true or false"),
    ],
)
def test_a_wrong_model_config_is_named(files, tmp_path, field, value, sentence):
    config = json.loads(files.config.read_text())
    *parents, name = field.split(".")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[name] = value
    if value is None:
        del inner[name]
    files.config = tmp_path / "model_config.json"
    files.config.write_text(json.dumps(config))
    save_file(files.weights, files.checkpoint)
    files.refused(field, sentence)


def test_a_model_config_of_other_sizes_is_told_by_its_tensors(files, tmp_path):
    config = json.loads(files.config.read_text())
    config["head_transformer"]["n_layers_expression_transformer"] = 1
    files.config = tmp_path / "model_config.json"
    files.config.write_text(json.dumps(config))
    save_file(files.weights, files.checkpoint)
    files.refused("not the model's: ", "_expression_transformer.layers.1.norm1.weight")


def test_a_file_that_is_no_json(files, tmp_path):
    files.config = tmp_path / "model_config.json"
    files.config.write_text("{")
    files.refused("not valid JSON")


def test_an_existing_folder_is_left_alone(files):
    save_file(files.weights, files.checkpoint)
    files.out.mkdir()
    files.refused("exists already")


def test_a_failure_while_writing_leaves_nothing(files, monkeypatch):
    save_file(files.weights, files.checkpoint)

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(importer.Checkpoints, "wait", full_disk)
    files.refused("No space left")


def test_the_command(files, capsys):
    save_file(files.weights, files.checkpoint)
    arguments = [str(files.checkpoint), "--model-config", str(files.config)]
    arguments += ["--template", str(files.template), "--out", str(files.out)]
    main([*arguments, "--dtype", "float32"])
    assert imported(files)[1].dtype == "float32"
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_published_size(shared_dir):
    """The published model's tensors by name and shape, and its 182.41 M numbers."""
    folder = shared_dir / "flex1"
    manifest = json.loads((folder / "manifest.json").read_text())
    config = read_model_config(folder / "model_config.json")
    abstract = abstract_params(config, load_template(folder / "gghead_template.obj"))
    shapes = published_shapes(config, flatten(abstract))
    assert {name: list(shape) for name, shape in shapes.items()} == {
        name: shape for name, (shape, _) in manifest.items()
    }
    ours = sum(p.size for p in jax.tree.leaves(abstract))
    assert importer.account(config, abstract) == (
        f"182,410,206 published numbers = {ours:,} parameters + 786,432 in unused head tokens"
        " + 1,441,792 in unused weights of a zero style + 64 in unused constant filters"
    )

"""Reading published weights: the names they come under, and what a user is told without them."""

import json

import ml_collections
import numpy as np
import pytest
from safetensors.numpy import save_file

from data_pipelines.errors import UserError
from flexavatar_jax.frozen.networks import FrozenNetworks, load_frozen_networks
from flexavatar_jax.frozen.weights import Source, read_weights

SOURCE = Source("someone/some-network", "config.frozen.some", "config.loss.some=0")
SHAPES = {"backbone.w": (2, 3), "layer.0.attention.q_proj.bias": (4,)}


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(s).astype(np.float32) for name, s in SHAPES.items()}


def read(path):
    return read_weights(path, SHAPES, SOURCE)


def assert_equal(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_reads_a_file_or_the_folder_that_holds_it(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(read(tmp_path), tensors)
    assert_equal(read(tmp_path / "model.safetensors"), tensors)


def test_finds_tensors_under_older_names_and_inside_a_whole(tmp_path, tensors):
    renamed = {
        "vision_encoder.backbone.w": tensors["backbone.w"],
        "layer.0.attention.attention.query.bias": tensors["layer.0.attention.q_proj.bias"],
        "mask_decoder.w": np.ones(1, np.float32),
    }
    save_file(renamed, tmp_path / "model.safetensors")
    assert_equal(read(tmp_path), tensors)


def test_half_precision_files_become_float32(tmp_path, tensors):
    save_file({n: t.astype(np.float16) for n, t in tensors.items()}, tmp_path / "model.safetensors")
    found = read(tmp_path)
    assert {t.dtype for t in found.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("path", ["", "nowhere", "."])
def test_missing_weights_say_what_to_fetch_and_how_to_do_without(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read(path)
    for word in ("someone/some-network", "model.safetensors", SOURCE.field, SOURCE.off):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_tensor_is_named(tmp_path, tensors):
    del tensors["backbone.w"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensor backbone\.w is missing"):
        read(tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path, tensors):
    tensors["backbone.w"] = tensors["backbone.w"].T.copy()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"backbone\.w has shape \[3, 2\].*has \[2, 3\]"):
        read(tmp_path)


def test_the_tensor_at_which_a_file_is_cut_short_is_named(tmp_path, tensors):
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    data = file.read_bytes()
    offsets = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    last = max(offsets, key=lambda name: offsets[name]["data_offsets"])
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"tensor {last} is cut short"):
        read(file)


@pytest.mark.parametrize("data", [b"", b"\x80\x04]", b"\xff" * 64, b"\x02" + bytes(7) + b"[]"])
def test_what_is_no_safetensors_file_is_called_so(tmp_path, data):
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(ValueError, match="not a safetensors file"):
        read(file)


def config(**loss_and_model):
    return ml_collections.ConfigDict(
        {
            "model": {"dino": loss_and_model.get("encoder", False), "dtype": "float32"},
            "loss": {
                "dino": loss_and_model.get("dino", 0.0),
                "sam": loss_and_model.get("sam", 0.0),
            },
            "frozen": {"dinov2_base": "", "dinov2_small": "", "sam2": ""},
        }
    )


def test_networks_that_are_off_need_no_weights():
    assert load_frozen_networks(config()) == FrozenNetworks(None, None, None)


@pytest.mark.parametrize(
    ("on", "words"),
    [
        ({"encoder": True}, ("facebook/dinov2-with-registers-base", "config.model.dino=False")),
        ({"dino": 1.0}, ("facebook/dinov2-small", "config.loss.dino=0")),
        ({"sam": 1.0}, ("facebook/sam2.1-hiera-small", "config.loss.sam=0")),
    ],
)
def test_a_network_that_is_on_asks_for_its_own_weights(on, words):
    with pytest.raises(UserError) as error:
        load_frozen_networks(config(**on))
    assert all(word in str(error.value) for word in words)

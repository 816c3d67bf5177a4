"""What a config's fields may be."""

import math

import pytest

from configs import demo, flex1
from data_pipelines.errors import UserError
from flexavatar_jax.training.config_check import RULES, check_config


def leaves(fields, path=""):
    """Names of all fields, data.mixture as one: its own are data sets."""
    for name, value in fields.items():
        if isinstance(value, dict) and path + name != "data.mixture":
            yield from leaves(value, f"{path}{name}.")
        else:
            yield path + name


@pytest.mark.parametrize("module", [demo, flex1])
def test_configs_that_ship_pass_and_every_field_has_its_rule(module):
    config = module.get_config()
    check_config(config)
    assert set(leaves(config.to_dict())) == set(RULES)


@pytest.mark.parametrize("field", RULES)
def test_a_field_that_is_missing_is_named(field):
    config = flex1.get_config()
    config.unlock()
    *path, name = field.split(".")
    part = config
    for step in path:
        part = part[step]
    del part[name]
    with pytest.raises(UserError, match=rf"config\.{field} is missing; it must be"):
        check_config(config)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch", 0, "1 or more"),
        ("accumulate", -1, "1 or more"),
        ("steps", -5, "1 or more"),
        ("bad_step", "foo", "skip, stop"),
        ("max_gradient_norm", -1.0, "0 or more"),
        ("rasterizer", "opengl", "pallas_tpu"),
        ("model.patch_size", 0, "from 1 to"),
        ("model.decoder_depth", -1, "from 1 to"),
        ("model.width", "128", "whole number"),
        ("model.encoder_depth", 1_000_000, "to 1,000"),
        ("model.dino", "yes", "True or False"),
        ("model.upsampler_channels", (-3,), "positive number"),
        ("model.dtype", "int32", "bfloat16"),
        ("model.max_scale", math.nan, "above 0"),
        ("data.jitter.probability", 2.0, "from 0 to 1"),
        ("data.jitter.brightness", (1.5, 0.6), "the smaller first"),
        ("data.jitter.hue", (-0.1, math.inf), "colour wheel"),
        ("data.workers", -1, "0 or more"),
        ("loss.l1", math.nan, "0 or more"),
        ("optimizer.learning_rate", -1.0, "above 0"),
        ("optimizer.b1", 2.0, "below 1"),
        ("checkpoint.every", 0, "1 or more"),
        ("log.images_every", 0, "1 or more"),
        ("mesh.fsdp", 0, "-1 for the devices"),
        ("data.mixture", {}, "weight for each data set"),
        ("eval.people", 0, "1 or more"),
        ("eval.images_per_person", 1, "one of a person's images is the input"),
        ("eval.constant_images", 0, "1 or more"),
    ],
)
def test_a_field_that_cannot_be_meant_is_named_with_what_it_must_be(field, value, expected):
    config = flex1.get_config()
    config.unlock()
    *path, name = field.split(".")
    part = config
    for step in path:
        part = part[step]
    del part[name]  # ml_collections would merge a mapping into the one that is there
    part[name] = value
    with pytest.raises(UserError, match=rf"config\.{field} is .*{expected}"):
        check_config(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model.image_size": 500}, r"image_size \(500\) must be a multiple of .*patch_size"),
        ({"model.num_heads": 5}, r"width \(768\) must be a multiple of .*num_heads \(5\)"),
        ({"model.upsampler_channels": (8,) * 5}, "width 768 must be a multiple of 1024"),
        ({"optimizer.warmup_steps": 100, "optimizer.decay_steps": 100}, "more than warmup_steps"),
        ({"optimizer.decay_steps": 999_999}, "from where on the learning rate is 0"),
        ({"optimizer.final_learning_rate": 1e-5}, "is never reached"),
        ({f"loss.{name}": 0.0 for name in ("l1", "ssim", "dino", "sam")}, "every weight"),
        ({"loss.l1": 0.0, "loss.ssim": 0.0}, r"asks for nothing before .* = 400000"),
        ({"loss.perceptual_targets": 6}, r"more than an example's targets.* \(5\)"),
    ],
)
def test_fields_that_contradict_each_other(changes, expected):
    with pytest.raises(UserError, match=expected):
        check_config(changed(changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.decay_steps": 1_000_000},
        {"optimizer.decay_steps": 500_000, "optimizer.final_learning_rate": 1e-5},
        {"loss.l1": 0.0, "loss.ssim": 0.0, "loss.perceptual_start": 0},
    ],
)
def test_what_looks_like_it_but_can_be_meant(changes):
    check_config(changed(changes))


def changed(changes):
    config = flex1.get_config()
    config.update_from_flattened_dict(changes)
    return config

"""What a config's fields may be."""

import math

import pytest

from configs import demo, flex1
from flexavatar_jax.training.config_check import RULES, check_config


@pytest.mark.parametrize("module", [demo, flex1])
def test_configs_that_ship_pass_and_every_rule_has_its_field(module):
    config = module.get_config()
    check_config(config)
    fields = config.to_dict()
    for field in RULES:
        value = fields
        for name in field.split("."):
            value = value[name]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("batch", 0, "1 or more"),
        ("accumulate", -1, "1 or more"),
        ("steps", -5, "1 or more"),
        ("bad_step", "foo", "skip, stop"),
        ("max_gradient_norm", -1.0, "0 or more"),
        ("rasterizer", "opengl", "pallas_tpu"),
        ("model.patch_size", 0, "1 or more"),
        ("model.decoder_depth", -1, "1 or more"),
        ("model.expression_size", 100, "135, the length of the expression codes"),
        ("model.num_sources", 0, "bias sink"),
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
    ],
)
def test_a_field_that_cannot_be_meant_is_named_with_what_it_must_be(field, value, expected):
    config = flex1.get_config()
    config.unlock()
    *path, name = field.split(".")
    part = config
    for step in path:
        part = part[step]
    part[name] = value
    with pytest.raises(ValueError, match=rf"config\.{field} is .*{expected}"):
        check_config(config)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data.image_size": 256}, r"config\.data\.image_size"),
        ({"optimizer.warmup_steps": 100, "optimizer.decay_steps": 100}, "more than warmup_steps"),
        ({"optimizer.decay_steps": 999_999}, "from where on the learning rate is 0"),
        ({"optimizer.final_learning_rate": 1e-5}, "is never reached"),
        ({f"loss.{name}": 0.0 for name in ("l1", "ssim", "dino", "sam")}, "every weight"),
        ({"loss.l1": 0.0, "loss.ssim": 0.0}, r"asks for nothing before .* = 400000"),
    ],
)
def test_fields_that_contradict_each_other(changes, expected):
    with pytest.raises(ValueError, match=expected):
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

"""Whether an experiment's config can be meant: one table of what each field may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from data_pipelines.errors import UserError
from data_pipelines.frame import EXPRESSION_SIZE
from kernels.rasterizer import BACKENDS


class Rule(NamedTuple):
    """What a field must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_range(value: Any, lowest: float, highest: float) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(map(_is_number, value))
        and lowest <= value[0] <= value[1] <= highest
    )


def _one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


POSITIVE_COUNT = Rule("a whole number, 1 or more", lambda x: _is_count(x) and x >= 1)
COUNT = Rule("a whole number, 0 or more", lambda x: _is_count(x) and x >= 0)
POSITIVE = Rule("a number above 0", lambda x: _is_number(x) and x > 0)
NOT_NEGATIVE = Rule("a number, 0 or more", lambda x: _is_number(x) and x >= 0)
SHARE = Rule("a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1)
DECAY = Rule("a number from 0 to below 1", lambda x: _is_number(x) and 0 <= x < 1)
FACTORS = Rule("two factors, 0 or more, the smaller first", lambda x: _is_range(x, 0, math.inf))

RULES = {
    "init_from": Rule("a folder's path, or empty", lambda x: isinstance(x, str)),
    "batch": POSITIVE_COUNT,
    "accumulate": POSITIVE_COUNT,
    "steps": POSITIVE_COUNT,
    "bad_step": _one_of("skip", "stop"),
    "max_bad_steps": POSITIVE_COUNT,
    "max_gradient_norm": NOT_NEGATIVE,
    "rasterizer": _one_of("auto", *BACKENDS),
    "splat_capacity": COUNT,
    "model.image_size": POSITIVE_COUNT,
    "model.patch_size": POSITIVE_COUNT,
    "model.width": POSITIVE_COUNT,
    "model.num_heads": POSITIVE_COUNT,
    "model.vit_depth": POSITIVE_COUNT,
    "model.encoder_depth": POSITIVE_COUNT,
    "model.decoder_depth": POSITIVE_COUNT,
    "model.head_tokens": POSITIVE_COUNT,
    "model.expression_size": Rule(
        f"{EXPRESSION_SIZE}, the length of the expression codes of all data",
        lambda x: x == EXPRESSION_SIZE,
    ),
    "model.expression_hidden": POSITIVE_COUNT,
    "model.expression_tokens": POSITIVE_COUNT,
    "model.num_sources": Rule(
        "2: a bias sink each for monocular and multi-view data, or 1: one for both",
        lambda x: _is_count(x) and x in (1, 2),
    ),
    "model.upsampler_channels": Rule(
        "one positive number of channels a doubling",
        lambda x: isinstance(x, tuple | list) and all(map(POSITIVE_COUNT.holds, x)),
    ),
    "model.uv_resolution": POSITIVE_COUNT,
    "model.sample_grid": POSITIVE_COUNT,
    "model.max_scale": POSITIVE,
    "model.offset_range": NOT_NEGATIVE,
    "model.dtype": _one_of("float32", "bfloat16"),
    "data.image_size": POSITIVE_COUNT,
    "data.targets": POSITIVE_COUNT,
    "data.jaw_temperature": NOT_NEGATIVE,
    "data.jitter.probability": SHARE,
    "data.jitter.brightness": FACTORS,
    "data.jitter.contrast": FACTORS,
    "data.jitter.saturation": FACTORS,
    "data.jitter.hue": Rule(
        "two turns of the colour wheel from -0.5 to 0.5, the smaller first",
        lambda x: _is_range(x, -0.5, 0.5),
    ),
    "data.bad_records": _one_of("raise", "skip"),
    "data.max_bad_fraction": SHARE,
    "data.workers": COUNT,
    "loss.l1": NOT_NEGATIVE,
    "loss.mse": NOT_NEGATIVE,
    "loss.ssim": NOT_NEGATIVE,
    "loss.dino": NOT_NEGATIVE,
    "loss.sam": NOT_NEGATIVE,
    "loss.perceptual_start": COUNT,
    "optimizer.name": _one_of("adam", "muon"),
    "optimizer.learning_rate": POSITIVE,
    "optimizer.final_learning_rate": NOT_NEGATIVE,
    "optimizer.warmup_steps": COUNT,
    "optimizer.decay_steps": COUNT,
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "optimizer.eps": POSITIVE,
    "optimizer.muon_learning_rate": POSITIVE,
    "optimizer.muon_beta": DECAY,
    "optimizer.clip_norm": NOT_NEGATIVE,
    "checkpoint.every": POSITIVE_COUNT,
    "checkpoint.keep": POSITIVE_COUNT,
    "log.every": POSITIVE_COUNT,
    "log.images_every": POSITIVE_COUNT,
    "log.images": POSITIVE_COUNT,
}


def check_config(config: ConfigDict) -> None:
    """
    Raises:
      UserError: a field is missing, or is not what RULES say; names it, and what was expected.
    """
    for field, rule in RULES.items():
        value: Any = config
        for name in field.split("."):
            if name not in value:
                raise UserError(f"config.{field} is missing; it must be {rule.expected}")
            value = value[name]
        if not rule.holds(value):
            raise UserError(f"config.{field} is {value!r}; it must be {rule.expected}")
    if config.model.image_size != config.data.image_size:
        raise UserError(
            f"config.model.image_size ({config.model.image_size}) and config.data.image_size "
            f"({config.data.image_size}) must be the same: the model sees the data's images"
        )
    loss, optimizer = config.loss, config.optimizer
    if not any((loss.l1, loss.mse, loss.ssim)):
        if not any((loss.dino, loss.sam)):
            raise UserError("every weight of config.loss is 0; give one of l1, mse, ssim a weight")
        if loss.perceptual_start:
            raise UserError(
                "config.loss asks for nothing before dino and sam set in, at perceptual_start = "
                f"{loss.perceptual_start}; give one of l1, mse, ssim a weight, or start at 0"
            )
    warmup, decay = optimizer.warmup_steps, optimizer.decay_steps
    if decay and decay <= warmup:
        raise UserError(
            f"config.optimizer.decay_steps ({decay}) must be more than warmup_steps ({warmup}), "
            "which it includes, or 0 for a constant rate"
        )
    if decay and config.steps > decay and not optimizer.final_learning_rate:
        raise UserError(
            f"config.steps ({config.steps}) is more than config.optimizer.decay_steps ({decay}), "
            "from where on the learning rate is 0; raise decay_steps or final_learning_rate"
        )
    if optimizer.final_learning_rate and not decay:
        raise UserError(
            f"config.optimizer.final_learning_rate ({optimizer.final_learning_rate}) is never "
            "reached with decay_steps = 0, a constant rate; give decay_steps, or 0 for both"
        )

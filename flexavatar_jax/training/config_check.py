"""Whether an experiment's config can be meant: one table of what each field may be.

What a field means, and its default, is in configs/flex1.py; a test holds the two to the same
fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from data_pipelines.errors import UserError
from kernels.backends import BACKENDS


class Rule(NamedTuple):
    """What a field must be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_point(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 3 and all(map(_is_number, value))


def _is_range(value: Any, lowest: float, highest: float) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(map(_is_number, value))
        and lowest <= value[0] <= value[1] <= highest
    )


def _one_of(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


SWITCH = Rule("True or False", lambda x: isinstance(x, bool))
PATH = Rule("a path, or empty", lambda x: isinstance(x, str))
NAME = Rule("a name", lambda x: isinstance(x, str) and bool(x))
POSITIVE_COUNT = Rule("a whole number, 1 or more", lambda x: _is_count(x) and x >= 1)
COUNT = Rule("a whole number, 0 or more", lambda x: _is_count(x) and x >= 0)
SIZE = Rule("a whole number from 1 to 65,536", lambda x: _is_count(x) and 1 <= x <= 65_536)
DEPTH = Rule("a whole number from 1 to 1,000", lambda x: _is_count(x) and 1 <= x <= 1_000)
AXIS = Rule(
    "a whole number, 1 or more, or -1 for the devices that are left",
    lambda x: _is_count(x) and (x >= 1 or x == -1),
)
POSITIVE = Rule("a number above 0", lambda x: _is_number(x) and x > 0)
NOT_NEGATIVE = Rule("a number, 0 or more", lambda x: _is_number(x) and x >= 0)
SHARE = Rule("a number from 0 to 1", lambda x: _is_number(x) and 0 <= x <= 1)
DECAY = Rule("a number from 0 to below 1", lambda x: _is_number(x) and 0 <= x < 1)
FACTORS = Rule("two factors, 0 or more, the smaller first", lambda x: _is_range(x, 0, math.inf))

RULES = {
    "seed": COUNT,
    "init_from": Rule("a folder's path, or empty", lambda x: isinstance(x, str)),
    "batch": POSITIVE_COUNT,
    "accumulate": POSITIVE_COUNT,
    "steps": POSITIVE_COUNT,
    "bad_step": _one_of("skip", "stop"),
    "max_bad_steps": POSITIVE_COUNT,
    "max_gradient_norm": NOT_NEGATIVE,
    "rasterizer": _one_of("auto", *BACKENDS),
    "splat_capacity": COUNT,
    "model.image_size": SIZE,
    "model.patch_size": SIZE,
    "model.width": SIZE,
    "model.num_heads": SIZE,
    "model.vit_depth": DEPTH,
    "model.encoder_depth": DEPTH,
    "model.decoder_depth": DEPTH,
    "model.head_resolution": SIZE,
    "model.expression_hidden": SIZE,
    "model.expression_tokens": SIZE,
    "model.bias_sinks": SWITCH,
    "model.upsampler_channels": Rule(
        "one positive number of channels a doubling",
        lambda x: isinstance(x, tuple | list) and len(x) <= 16 and all(map(SIZE.holds, x)),
    ),
    "model.uv_resolution": SIZE,
    "model.gaussian_resolution": SIZE,
    "model.max_scale": POSITIVE,
    "model.offset_range": NOT_NEGATIVE,
    "model.template": PATH,
    "model.dino": SWITCH,
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.remat": SHARE,
    "frozen.dinov2_base": PATH,
    "frozen.dinov2_small": PATH,
    "frozen.sam2": PATH,
    "data.root": NAME,
    "data.mixture": Rule(
        "a weight for each data set, such as {'nersemble': 0.5, 'hello3': 0.5}",
        lambda x: isinstance(x, Mapping | ConfigDict) and len(x) > 0,
    ),
    "data.image_size": SIZE,
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
    "loss.perceptual_targets": COUNT,
    "loss.focus.weight": NOT_NEGATIVE,
    "loss.focus.radius": POSITIVE,
    "loss.focus.points": Rule(
        "points of the head, three metres each, such as ((0.03, 0.02, 0.05),)",
        lambda x: isinstance(x, tuple | list) and len(x) > 0 and all(map(_is_point, x)),
    ),
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
    "mesh.data": AXIS,
    "mesh.fsdp": AXIS,
    "mesh.tensor": AXIS,
    "eval.dataset": NAME,
    "eval.every": COUNT,
    "eval.people": POSITIVE_COUNT,
    "eval.images_per_person": Rule(
        "a whole number, 2 or more: one of a person's images is the input",
        lambda x: _is_count(x) and x >= 2,
    ),
    "eval.portrait_size": POSITIVE,
    "eval.constant_images": POSITIVE_COUNT,
}
"""What each field must be; every field of every config has its rule here."""


def check_config(config: ConfigDict) -> None:
    """
    Raises:
      UserError: a field is missing, is not what RULES say, or contradicts another; names it, and
        what was expected.
    """
    for field, rule in RULES.items():
        value = _value(config, field)
        if value is _ABSENT:
            raise UserError(f"config.{field} is missing; it must be {rule.expected}")
        if not rule.holds(value):
            raise UserError(f"config.{field} is {_shown(value)}; it must be {rule.expected}")
    check_sizes(config.model)
    if config.eval.every % config.log.every:
        raise UserError(
            f"config.eval.every ({config.eval.every}) must be a multiple of config.log.every "
            f"({config.log.every}), on whose lines its results stand, or 0 for never"
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
    if loss.perceptual_targets > config.data.targets:
        raise UserError(
            f"config.loss.perceptual_targets ({loss.perceptual_targets}) is more than an example's "
            f"targets, config.data.targets ({config.data.targets}); give 0 for all of them"
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


def check_stored_config(config: ConfigDict) -> None:
    """Checks what inference reads of a stored config, which may be of an earlier version.

    Raises:
      UserError: a field of the model is missing, or any field is not what RULES say.
    """
    for field, rule in RULES.items():
        value = _value(config, field)
        if value is _ABSENT and field.startswith("model."):
            raise UserError(f"config.{field} is missing; it must be {rule.expected}")
        if value is not _ABSENT and not rule.holds(value):
            raise UserError(f"config.{field} is {_shown(value)}; it must be {rule.expected}")
    check_sizes(config.model)


def check_sizes(model: ConfigDict) -> None:
    """Raises `UserError` for sizes of `config.model` that do not fit one another."""
    for size, part in (("image_size", "patch_size"), ("width", "num_heads")):
        if model[size] % model[part]:
            raise UserError(
                f"config.model.{size} ({model[size]}) must be a multiple of "
                f"config.model.{part} ({model[part]})"
            )
    doublings = len(model.upsampler_channels)
    if model.width % 4**doublings:
        raise UserError(
            f"config.model.width {model.width} must be a multiple of {4**doublings}: each of "
            f"the {doublings} config.model.upsampler_channels quarters it"
        )


_ABSENT = object()


def _value(config: ConfigDict, field: str) -> Any:
    """The value of a field such as "model.width", or _ABSENT."""
    value: Any = config
    for name in field.split("."):
        if not isinstance(value, ConfigDict) or name not in value:
            return _ABSENT
        value = value[name]
    return value


def _shown(value: Any) -> str:
    """A value as a sentence quotes it."""
    return " ".join(f"{value!r}".split())[:80]

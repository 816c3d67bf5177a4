"""The procedural data sets (`data_pipelines.procedural`), made as they are prepared."""

from __future__ import annotations

import argparse
import inspect

from data_pipelines.captures import CaptureSet
from data_pipelines.procedural.capture_sets import procedural_sets

_OPTIONS = {name: p.default for name, p in inspect.signature(procedural_sets).parameters.items()}

LATER_OPTIONS = {"reported_turn": 1.0, "reported_size": 1.0, "distance_spread": 0.0}
"""Options that folders prepared earlier have no settings of, with what they were then."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each argument of `procedural_sets`."""
    for name, default in _OPTIONS.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help="default: %(default)s",
        )


def capture_sets(args: argparse.Namespace) -> list[CaptureSet]:
    """The training sets and the test set; raises ValueError for options out of range."""
    return procedural_sets(**{name: getattr(args, name) for name in _OPTIONS})

"""What a run's steps did: means over good ones, the time of all of them, and when it is enough."""

import itertools
import math
import time

import pytest

from flexavatar_jax.training.meter import Meter

pytestmark = pytest.mark.usefixtures("any_types")  # a dict stands in for the log

GOOD = {"loss": 0.5, "gradient_norm": 1.0, "splat_overflow": 0.0, "bad": 0, "skipped": 0}
BAD = GOOD | {"loss": math.nan, "gradient_norm": math.inf, "bad": 1}


class Lines(dict):
    """In place of a run's log: the metrics by their step."""

    scalars = dict.__setitem__


def measure(config, workdir, steps) -> Lines:
    """What a run logs whose steps have the metrics `steps`."""
    config.steps, config.log.images_every = len(steps) + 1, len(steps) + 1
    lines = Lines()
    meter = Meter(config, workdir, lines)
    for number, metrics in enumerate(steps, start=1):
        meter.add(number, metrics, preview=None, batch={})
    meter.flush()
    return lines


def test_a_bad_step_of_before_a_restart_does_not_stop_the_run_again(tiny_config, tmp_path):
    tiny_config.bad_step = "stop"
    measure(tiny_config, tmp_path, [GOOD | {"skipped": 1}] * 2)


def test_bad_steps_leave_the_logged_means_alone_but_not_the_time(
    tiny_config, tmp_path, monkeypatch
):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    tiny_config.log.every = 4
    lines = measure(tiny_config, tmp_path, [GOOD, BAD, BAD, GOOD | {"loss": 0.7}, *[BAD] * 4])
    assert lines[4]["loss"] == pytest.approx(0.6)
    assert lines[4]["gradient_norm"] == 1.0
    assert math.isnan(lines[8]["loss"])
    # The clock ticks when it is read: as the window begins and as it ends.
    assert lines[4]["step_seconds"] == 1 / 4


def test_a_run_of_bad_steps_ends_the_run(tiny_config, tmp_path):
    tiny_config.max_bad_steps = 3
    measure(tiny_config, tmp_path, [BAD, BAD, GOOD, BAD, BAD])
    with pytest.raises(ValueError, match=r"3 steps in a row were bad, up to step 4, .* diverged"):
        measure(tiny_config, tmp_path, [GOOD, BAD, BAD, BAD])

"""What a run logs can be read again, also after a kill; a full disk is told at once."""

import resource

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipelines.errors import UserError
from flexavatar_jax.training.metric_log import MetricLog, read_metrics


def tensorboard(workdir):
    return EventAccumulator(str(workdir / "logs")).Reload()


def test_tensorboard_and_the_lines_say_the_same(tmp_path):
    log = MetricLog(tmp_path, step=0, steps=2)
    log.scalars(1, {"loss": 0.5, "seconds": 2.0})
    log.scalars(2, {"loss": 0.25, "seconds": 1.0})
    image = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    log.images(2, "preview", image)
    log.close()
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5, "seconds": 2.0},
        {"step": 2, "loss": 0.25, "seconds": 1.0},
    ]
    events = tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    (preview,) = events.Images("preview")
    assert (preview.step, preview.width, preview.height) == (2, 6, 8)


@pytest.mark.parametrize(
    "damage", [b'{"step": 2, "lo', b"\xff", b"[2]", b'{"loss": 1.0}', b"[" * 9999], ids=range(5)
)
def test_a_line_that_is_no_steps_metrics_is_named(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n' + damage + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: .* is not the metrics of a step"):
        read_metrics(tmp_path)


def test_steps_that_a_killed_run_lost_are_forgotten(tmp_path):
    killed = MetricLog(tmp_path, step=0, steps=9)
    for step in (1, 2, 3):
        killed.scalars(step, {"loss": float(step)})
    again = MetricLog(tmp_path, step=2, steps=9)
    again.scalars(3, {"loss": 30.0})
    again.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1, 2, 30]
    scalars = tensorboard(tmp_path).Scalars("loss")
    assert [(e.step, e.value) for e in scalars] == [(1, 1), (2, 2), (3, 30)]


@pytest.fixture
def full_disk():
    """No file grows beyond 1 kB: to a program that's a disk with no room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_at_once(tmp_path, full_disk):
    log = MetricLog(tmp_path, step=0, steps=9)
    log.scalars(1, {"loss": 1.0})
    full_disk()
    with pytest.raises(UserError, match=f"metrics cannot be written to {tmp_path} "):
        log.images(2, "preview", np.random.default_rng(0).integers(0, 255, (1, 32, 32, 3), "u1"))
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]

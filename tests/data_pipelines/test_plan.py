"""The plan of a run's input: what it needs of a host, and where it would starve the step."""

import dataclasses
import json
import re

import pytest

from data_pipelines.errors import GIVE_UP, TRY_AGAIN
from data_pipelines.figures import MEASURED, Figures
from data_pipelines.machines import MACHINES, parse_topology
from data_pipelines.plan import main

FIGURES = Figures(
    machine="a processor",
    data=["gs://bucket/data"],
    remote=True,
    size=512,
    stages={"draw": 0.001, "read": 0.001, "verify": 0.001, "decode": 0.007},
    record_bytes=100_000,
    request_seconds=0.04,
    worker_bytes=500_000_000,
)
FLEX1 = ["--config", "configs/flex1.py"]


@pytest.fixture
def plan(tmp_path, capsys):
    """A function that runs the command and returns its exit status and what it printed."""
    figures = tmp_path / "figures.json"
    figures.write_text(json.dumps(dataclasses.asdict(FIGURES)))

    def run(*arguments: str) -> tuple[int, str]:
        status = main([*FLEX1, "--figures", str(figures), *arguments])
        return status, "".join(capsys.readouterr())

    return run


def test_a_pod_that_is_fed(plan):
    """256 examples of 1 + 5 images on 64 hosts, by 8 workers that take 10 ms of a core an image."""
    status, out = plan("--topology=v5e:16x16", "--config.batch=256", "--step-time=0.14")
    assert status == 0
    assert "64 hosts of ct5lp-hightpu-4t: 112 cores, 192 GB, 100 Gbit/s each" in out
    assert "4 examples a host, 24 images of 512 pixels" in out
    assert "so a step is fed in 0.030 s; what sets the limit: the 8 workers" in out
    assert "needs 171 images/s a host: 1.7 cores and 0.14 Gbit/s" in out
    assert "input feeds the step 4.7 times" in out
    assert "WARNING" not in out


def test_workers_that_would_starve_the_step_are_told_their_number(plan):
    starved = ("--topology=v6e:4x4", "--config.batch=1024", "--step-time=0.5")
    out = plan(*starved)[1]
    assert re.search(
        r"WARNING: input would starve the step: 26% of that comes by the 8 workers", out
    )
    workers = re.search(r"set (--config\.data\.workers=\d+) or more", out)[1]
    assert workers == "--config.data.workers=31"
    assert "input feeds the step 1.0 times" in plan(*starved, workers)[1]


def test_a_host_that_has_not_the_cores_or_the_memory(plan):
    out = plan("--topology=v5e:2x2", "--config.batch=1024", "--config.data.workers=200")[1]
    assert "WARNING: 200 workers a host have only 112 cores" in out
    assert "WARNING: workers take more than half of a host's memory" in out
    out = plan("--topology=v5e:2x2", "--config.batch=1024", "--step-time=0.1")[1]
    assert "take more hosts or a larger one" in out


def test_images_of_another_size_cost_as_much_as_their_area(plan):
    out = plan("--topology=h100:2", "--config.batch=32", "--config.model.image_size=256")[1]
    assert "an image takes 3.3 ms of a core (a processor) and 25 kB" in out
    assert "the 64 workers" in out  # 8 of each of a host's 8 processes


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["--topology=v9:2x2"], GIVE_UP, "--topology is 'v9:2x2'; expected one of v5e"),
        (["--topology=v5e:2x3"], GIVE_UP, "6 chips, which are no whole number of hosts of 4"),
        (["--topology=v5e:4x4", "--config.batch=30"], GIVE_UP, "a batch of 30 does not divide"),
        (["--topology=v5e:2x2", "--step-time=0"], GIVE_UP, "--step-time is 0.0; expected"),
        (
            ["--topology=v5e:2x2", "--config.nothing=1"],
            GIVE_UP,
            '--config.nothing=1: Key "nothing" does not exist',
        ),
        (["--topology=v5e:2x2", "--config.batch=few"], GIVE_UP, "--config.batch=few: "),
        (["--topology=v5e:2x2", "--figures=none.json"], TRY_AGAIN, "none.json: no such file"),
        (["--topology=v5e:2x2", "--figures=setup.py"], GIVE_UP, "setup.py holds no figures"),
    ],
)
def test_mistakes_are_one_sentence(plan, arguments, status, sentence):
    found, out = plan(*arguments)
    assert found == status
    assert out.startswith("error: ")
    assert out.count("\n") == 1
    assert sentence in out


def test_every_machine_can_be_named_and_the_projects_figures_are_whole():
    for name, machine in MACHINES.items():
        assert parse_topology(f"{name}:3") == (machine, 3)
    figures = Figures.read(MEASURED)
    assert figures.size == 512
    assert 0.001 < figures.seconds < 0.1

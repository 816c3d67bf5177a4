"""The ledger: every second of a run belongs to one phase, over kills and restarts."""

import json
import subprocess
import sys
import time

import pytest

from data_pipelines.errors import UserError
from flexavatar_jax.training.ledger import PHASES, Ledger, read_ledger


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def nonzero(totals: dict) -> dict:
    return {phase: seconds for phase, seconds in totals.items() if seconds}


def test_a_moment_belongs_to_the_innermost_phase(clock):
    ledger = Ledger(startup_seconds=3)
    clock(2)
    with ledger.during("restoring"):
        clock(4)
        with ledger.during("compiling"):
            clock(1)
        clock(1)
    ledger.enter("stepping")
    clock(10)
    assert nonzero(ledger.totals()) == {
        "starting": 5,
        "restoring": 5,
        "compiling": 1,
        "stepping": 10,
    }
    assert ledger.metrics()["goodput"] == pytest.approx(10 / 21)


def test_waiting_while_the_devices_are_busy_is_no_waiting(clock):
    ledger = Ledger()
    ledger.enter("stepping")
    for busy in (True, False):
        with ledger.during("waiting", unless=lambda busy=busy: busy):
            clock(3)
    assert nonzero(ledger.totals()) == {"stepping": 3, "waiting": 3}


def start(workdir, clock) -> Ledger:
    ledger = Ledger()
    ledger.open(workdir)
    clock(1)
    ledger.enter("stepping")
    return ledger


def test_what_a_kill_cost_is_lost_and_the_sum_stays_the_wall_time(clock, tmp_path):
    first = start(tmp_path, clock)
    clock(10)
    saved = first.totals()  # goes into the checkpoint
    clock(5)
    first.close()  # as its last write of before the kill
    second = start(tmp_path, clock)
    second.go_on_from(saved)
    clock(2)  # and killed before it saved anything
    second.close()
    third = start(tmp_path, clock)
    third.go_on_from(saved)
    clock(7)
    third.close()
    assert nonzero(third.totals()) == {"starting": 3, "stepping": 17, "lost": 7}
    lines = read_ledger(tmp_path)
    assert [line["lost"] for line in lines] == [5, 2, 0]
    assert sum(line[phase] for line in lines for phase in PHASES) == 27
    assert "3 starts" in third.describe()
    assert "goodput 0.630" in third.describe()


def test_a_run_that_never_saved_lost_all_its_steps(clock, tmp_path):
    first = start(tmp_path, clock)
    clock(5)
    first.close()
    second = start(tmp_path, clock)
    second.go_on_from({})
    assert nonzero(second.totals()) == {"starting": 2, "lost": 5}


def test_an_older_checkpoint_has_lost_more(clock, tmp_path):
    first = start(tmp_path, clock)
    clock(3)
    older = first.totals()
    clock(3)
    first.close()
    second = start(tmp_path, clock)
    second.go_on_from(older)
    assert second.totals()["lost"] == 3


@pytest.mark.parametrize("text", ["{", "[1]", '{"stepping": "x"}', "7"])
def test_a_damaged_ledger_is_named(tmp_path, text):
    (tmp_path / "ledger.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"ledger\.jsonl is damaged"):
        Ledger().open(tmp_path)


def test_a_killed_process_leaves_what_it_wrote_last(tmp_path):
    """Its imports included, from the moment that Linux started it."""
    program = (
        "import sys, time; from flexavatar_jax.training.ledger import *\n"
        f"ledger = Ledger(process_age()); ledger.open({str(tmp_path)!r})\n"
        "ledger.enter('stepping'); print('ready', flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    path = tmp_path / "ledger.jsonl"
    while not path.exists() or json.loads(path.read_text())["stepping"] < 1.5:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    wall = time.monotonic() - began
    (line,) = read_ledger(tmp_path)
    assert -0.02 < wall - sum(line[phase] for phase in PHASES) < 1.5
    assert line["starting"] > 0.1


def test_a_process_knows_its_age():
    program = "from flexavatar_jax.training.ledger import process_age; print(process_age())"
    began = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", program], capture_output=True).stdout)
    assert 0.05 < age <= time.monotonic() - began + 0.02

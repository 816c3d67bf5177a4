"""Runs that are stopped and killed: their processes leave together, and every second is counted."""

import signal
import time

import pytest
from jobs import Experiment, wait_for_step

from flexavatar_jax.runs.checkpoints import Checkpoints
from flexavatar_jax.stopping import INTERRUPTED, PREEMPTED
from flexavatar_jax.training.ledger import PHASES, read_ledger
from flexavatar_jax.training.metric_log import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow
def test_sigterm_to_one_process_of_many_stops_all_of_them(make_tiny_config, tmp_path):
    config = make_tiny_config()
    config.batch, config.steps, config.checkpoint.every = 8, 2000, 1000
    job = Experiment(config, tmp_path).start_job(tmp_path / "run")
    wait_for_step(job[0], tmp_path / "run", 5)
    job[1].send_signal(signal.SIGTERM)
    for process in job:
        process.communicate(timeout=150)
    assert [process.returncode for process in job] == [PREEMPTED, PREEMPTED]
    assert 5 <= Checkpoints(tmp_path / "run").latest_step < 2000


@pytest.mark.slow
def test_asked_while_it_compiles_a_job_leaves_together_with_no_trace(make_tiny_config, tmp_path):
    """Ctrl-C reaches every process of a terminal; here one alone, which tells the other."""
    job = Experiment(make_tiny_config(), tmp_path).start_job(tmp_path / "run", devices=1)
    while job[0].poll() is None and not (tmp_path / "run" / "ledger.jsonl").exists():
        time.sleep(0.05)
    job[1].send_signal(signal.SIGINT)
    for process in job:
        said = "".join(process.communicate(timeout=30))
        assert process.returncode == INTERRUPTED, said
        assert "Traceback" not in said
        assert "Fatal" not in said


@pytest.mark.slow
def test_the_ledger_of_a_run_killed_three_times_adds_up_to_its_wall_time(
    make_tiny_config, tmp_path
):
    config = make_tiny_config()
    config.steps, config.checkpoint.every = 100_000, 10
    experiment, workdir, wall = Experiment(config, tmp_path), tmp_path / "run", 0.0
    for _ in range(3):
        began = time.monotonic()
        process = experiment.start(workdir)
        starts = len(read_ledger(workdir))
        while process.poll() is None and (
            len(lines := read_ledger(workdir)) == starts
            or lines[-1]["stepping"] < 5
            or lines[-1]["step"] % 10 < 5  # so that something is lost
        ):
            time.sleep(0.05)
        process.kill()
        wall += time.monotonic() - began
        process.communicate()
    saved = Checkpoints(workdir, owned=False).latest_step
    began = time.monotonic()
    said = experiment.start(workdir, f"--config.steps={saved + 10}").communicate(timeout=600)[0]
    wall += time.monotonic() - began
    totals = {phase: sum(line[phase] for line in read_ledger(workdir)) for phase in PHASES}
    assert sum(totals.values()) == pytest.approx(wall, rel=0.02)
    assert min(totals[phase] for phase in PHASES if phase not in ("waiting", "evaluating")) > 0
    last = read_metrics(workdir)[-1]
    goodput = totals["stepping"] / sum(totals.values())
    assert last["goodput"] == pytest.approx(goodput, abs=0.02)
    assert f"goodput {goodput:.3f}" in said.splitlines()[-1]

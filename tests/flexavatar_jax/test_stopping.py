"""Being asked to stop: at once while nothing is to be saved, else after a save; and together."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flexavatar_jax.stopping import INTERRUPTED, PREEMPTED, StopRequest

pytestmark = pytest.mark.usefixtures("any_types")  # stand-ins for leaving do come back

ROOT = Path(__file__).resolve().parents[2]

# A main thread inside one call into C, which no handler of Python's can interrupt, as it is inside
# XLA's compiler: a lock that nobody releases, with the signals that would wake it kept away.
BUSY = """
import signal, sys, threading
from flexavatar_jax.stopping import StopRequest
stop = StopRequest()
stop.listen()
{before}
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
print("ready", flush=True)
lock = threading.Lock()
lock.acquire()
lock.acquire()
"""


def run(program: str) -> subprocess.Popen:
    """Starts a program; returns when it said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, PREEMPTED), (signal.SIGUSR1, PREEMPTED), (signal.SIGINT, INTERRUPTED)],
)
def test_with_nothing_to_save_the_process_leaves_at_once_whatever_its_main_thread_does(
    number, status
):
    process = run(BUSY.format(before=""))
    process.send_signal(number)
    said = process.communicate(timeout=10)[0]
    assert process.returncode == status
    assert said.count("\n") == 1
    assert "stopped as asked" in said


def test_children_go_with_it_even_if_they_ignore_the_signal():
    before = """
import multiprocessing, time
def sleep(ready):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(600)
context = multiprocessing.get_context("fork")
ready = context.Event()
context.Process(target=sleep, args=[ready]).start()
ready.wait()
"""
    process = run(BUSY.format(before=before))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)  # ends when no process holds the pipe
    assert process.returncode == PREEMPTED


def test_with_something_to_save_it_stays_until_that_is_saved():
    program = """
from flexavatar_jax.stopping import StopRequest
stop = StopRequest()
stop.listen()
stop.begin()
print("ready", flush=True)
while not stop.due():
    pass
print("saving", flush=True)
input()
print("saved", flush=True)
raise SystemExit(stop.status)
"""
    process = run(program)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGTERM)  # a second one changes nothing
    process.send_signal(signal.SIGINT)
    assert process.communicate("\n", timeout=10)[0] == "saved\n"
    assert process.returncode == PREEMPTED


class Service:
    """JAX's coordination service, as far as stopping uses it."""

    def __init__(self):
        self._values = {}
        self._lock = threading.Lock()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._lock:
            assert allow_overwrite or key not in self._values
            self._values[key] = value

    def key_value_dir_get(self, key):
        with self._lock:
            return [(k, v) for k, v in self._values.items() if k.startswith(f"{key}/")]


def test_a_job_stops_after_the_same_step_everywhere(monkeypatch):
    """However far the processes are apart, and while none can get on without the others."""
    monkeypatch.setattr("flexavatar_jax.stopping.POLL_SECONDS", 0.01)
    service, ranks = Service(), 4
    stops, stopped = [StopRequest() for _ in range(ranks)], {}
    done = [0] * ranks
    turn = threading.Condition()

    def train(rank):
        stops[rank].begin()
        for step in range(1, 100_000):
            with turn:  # a step ends when all have begun the one before, as devices' do
                done[rank] = step
                turn.notify_all()
                turn.wait_for(lambda step=step: min(done) >= step - 2)
            if step == 20 and rank == 1:
                stops[rank].ask(PREEMPTED)
            if stops[rank].due():
                stopped[rank] = step
                return

    for rank, stop in enumerate(stops):
        stop.join_job(service, rank, ranks)
    threads = [threading.Thread(target=train, args=[rank], daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(stopped) == ranks
    assert len(set(stopped.values())) == 1
    assert stopped[0] >= 20
    assert {stop.status for stop in stops} == {PREEMPTED}


def test_a_job_of_which_one_has_not_begun_leaves_together_with_nothing_saved(monkeypatch):
    monkeypatch.setattr("flexavatar_jax.stopping.POLL_SECONDS", 0.01)
    left, all_left = [], threading.Barrier(4)

    def leave(status, said=""):
        left.append(status)
        all_left.wait(timeout=30)

    monkeypatch.setattr("flexavatar_jax.stopping.leave", leave)
    service = Service()
    stops = [StopRequest() for _ in range(3)]
    for rank, stop in enumerate(stops):
        stop.join_job(service, rank, 3)
    stops[0].begin()
    stops[2].begin()
    stops[2].ask(INTERRUPTED)
    all_left.wait(timeout=30)
    assert left == [INTERRUPTED] * 3

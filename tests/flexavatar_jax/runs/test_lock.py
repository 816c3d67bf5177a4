"""Two runs in one folder: the second is refused, and a dead one is in nobody's way."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from data_pipelines.errors import TRY_AGAIN, UserError
from flexavatar_jax.runs import lock
from flexavatar_jax.runs.lock import FILE, Lock

HOLDER = "import sys, time; from flexavatar_jax.runs.lock import Lock; "
HOLDER += "held = Lock(sys.argv[1]); print('held', flush=True); time.sleep(60)"


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENCE", 0.4)


@contextlib.contextmanager
def holding(folder):
    """Another process that holds `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    with holding(tmp_path) as process:
        with pytest.raises(
            UserError, match=rf"in use by process {process.pid} on .*; wait"
        ) as error:
            Lock(tmp_path)
        assert error.value.status == TRY_AGAIN
        process.send_signal(signal.SIGKILL)
        process.wait()
        Lock(tmp_path).release()
    assert (tmp_path / FILE).read_text() == ""
    Lock(tmp_path).release()


def other_host(folder, beat=0):
    (folder / FILE).write_text(f"far 7 another-kernel {beat}\n")


@pytest.mark.parametrize("disk_locks", [True, None])
def test_of_another_host_signs_of_life_tell(tmp_path, monkeypatch, disk_locks):
    if disk_locks is None:
        monkeypatch.setattr(lock, "_lock", lambda file: None)
    other_host(tmp_path)
    Lock(tmp_path).release()  # it kept silent

    beats = iter(range(1, 1000))
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda s: (sleep(s), other_host(tmp_path, next(beats))))
    other_host(tmp_path)
    with pytest.raises(UserError, match="in use by process 7 on far"):
        Lock(tmp_path)


def test_one_that_ends_meanwhile_is_waited_for(tmp_path, monkeypatch):
    other_host(tmp_path)
    monkeypatch.setattr(time, "sleep", lambda s: (tmp_path / FILE).write_text(""))
    Lock(tmp_path).release()


def test_a_holder_gives_signs_of_life_until_it_releases(tmp_path):
    held = Lock(tmp_path)
    seen = set()
    deadline = time.monotonic() + 10
    while len(seen) < 3 and time.monotonic() < deadline:
        seen.add((tmp_path / FILE).read_text())
        time.sleep(0.01)
    assert len(seen) == 3
    assert all(f" {os.getpid()} " in text for text in seen)
    held.release()
    assert (tmp_path / FILE).read_text() == ""


def test_a_lock_that_is_forgotten_is_released(tmp_path):
    held = Lock(tmp_path)
    del held
    assert (tmp_path / FILE).read_text() == ""


def test_of_buckets_and_of_a_jobs_other_processes_nothing_is_held(tmp_path):
    Lock("gs://bucket/run").release()
    Lock(tmp_path, wanted=False).release()
    assert not (tmp_path / FILE).exists()

"""A run that is asked to stop: by SIGTERM (a scheduler, a preemption) or Ctrl-C, at any moment.

While there is nothing to be saved (imports, restoring, workers that start, compiling) the process
leaves at once; from the first step to the last save, the loop answers at a step's end. A signal's
Python handler runs between two instructions of the main thread, which may be minutes inside XLA's
compiler, so a thread listens instead. In a job of many processes, who is asked tells the others
through JAX's coordination service, and all of them save after the same step, or none does.

This module imports little: the command listens before it imports the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

PREEMPTED = 75
"""Exit status of a run that left because it was asked to (EX_TEMPFAIL: run it again)."""

INTERRUPTED = 130
"""Exit status of a run that was ended by Ctrl-C."""

ANSWERS = {
    signal.SIGTERM: PREEMPTED,
    signal.SIGUSR1: PREEMPTED,  # mpirun passes it on, SIGTERM not
    signal.SIGINT: INTERRUPTED,
}

POLL_SECONDS = 0.5
"""How often a process of a job looks whether another one was asked."""

GATHER_SECONDS = 60.0
"""How long the processes of a job wait for each other's answers: one may have died."""

LEAVE_SECONDS = 7.0
"""How long the first process does, if it has nothing to save."""

_NOTHING_TO_SAVE = -1


class StopRequest:
    """Whether this process, or another one of its job, was asked to stop.

    Until `begin` and after `saved`, being asked ends the process at once. In between `due` says
    after which step to save and leave.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: int | None = None
        self._unsaved = False
        self._job: _Job | None = None
        self._calls = 0
        self._last_call: int | None = None
        self._agreed = threading.Event()

    @property
    def status(self) -> int | None:
        """The exit status that was asked for; None if nobody asked."""
        return self._status

    def listen(self) -> None:
        """Answers signals from now on; to be called from the main thread."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        for number in ANSWERS:
            signal.signal(number, lambda *_: None)  # what counts is its byte in the pipe
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)

        def answer() -> None:
            while numbers := os.read(read, 1):
                if status := ANSWERS.get(numbers[0]):
                    self.ask(status)

        threading.Thread(target=answer, name="stop requests", daemon=True).start()

    def join_job(self, client: Any, rank: int, ranks: int) -> None:
        """Shares requests with the other processes of a job.

        Args:
          client: of JAX's coordination service, which has keys and values for all processes.
          rank, ranks: this process's number, and how many there are.
        """
        with self._lock:
            self._job = _Job(client, rank, ranks)
            status = self._status
        if status:
            self._job.tell(status)
        threading.Thread(
            target=self._watch_job, name="stop requests of the job", daemon=True
        ).start()

    def ask(self, status: int) -> None:
        """Asks this process, and with it its job, to stop and exit with `status`."""
        if self._job is not None and self._job.tell(status):
            return  # and hear it as the others do
        with self._lock:
            self._status = self._status or status
            if self._unsaved:
                return
        self._leave_unsaved()

    def begin(self) -> None:
        """There is a state to be saved from now on; leaves if a request came before."""
        with self._lock:
            self._unsaved = self._unsaved or self._status is None
            if self._unsaved:
                return
        threading.Event().wait()  # the thread that heard the request is ending this process

    def asked_here(self) -> bool:
        """Whether a process that is no part of a job was asked: it may stop anywhere."""
        return self._job is None and self._status is not None

    def due(self) -> bool:
        """Whether the run must save and leave now; all processes of a job ask after every step."""
        with self._lock:
            self._calls += 1
            if self._status is None:
                return False
        if self._job is None:
            return True
        self._agreed.wait()
        return self._calls >= self._last_call

    def saved(self) -> None:
        """There is nothing left to be saved: a request ends this process at once."""
        with self._lock:
            self._unsaved = False

    def _watch_job(self) -> None:
        job = self._job
        while (status := job.asked()) is None:
            time.sleep(POLL_SECONDS)
        with self._lock:
            # Once the status is set, `due` lets no further call pass before all have answered.
            self._status = status
            answer = self._calls + 1 if self._unsaved else _NOTHING_TO_SAVE
        answers = job.agree(answer)
        if _NOTHING_TO_SAVE in answers:
            # Without that process no step can end, and no other can save.
            if job.rank == 0:
                time.sleep(3 * POLL_SECONDS)  # the service is here: the others still read answers
            self._leave_unsaved()
        self._last_call = max(answers)
        self._agreed.set()

    def _leave_unsaved(self) -> NoReturn:
        leave(
            self._status or PREEMPTED,
            "stopped as asked, with nothing new to be saved; the same command goes on from here",
        )


class _Job:
    """The processes of a job, and what they tell each other of stopping."""

    def __init__(self, client: Any, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self._client = rank, ranks, client

    def tell(self, status: int) -> bool:
        """Asks all processes to stop; False if that cannot be: the service has ended."""
        try:
            self._client.key_value_set("stop/asked", str(status), allow_overwrite=True)
        except Exception:
            return False
        return True

    def asked(self) -> int | None:
        """The status that any process was asked for."""
        try:
            found = self._client.key_value_dir_get("stop")
        except Exception:  # the service has ended
            return None
        return next((int(value) for key, value in found if key.endswith("asked")), None)

    def agree(self, answer: int) -> list[int]:
        """The answers of all processes to a request.

        As soon as one has nothing to save, or if one doesn't answer, that is all there is to know.
        """
        patience = LEAVE_SECONDS if answer == _NOTHING_TO_SAVE else GATHER_SECONDS
        until = time.monotonic() + patience
        answers: list[int] = []
        try:
            self._client.key_value_set(f"answers/{self.rank}", str(answer))
            while time.monotonic() < until:
                answers = [int(v) for _, v in self._client.key_value_dir_get("answers")]
                # The first process holds the service, so that it hears all the others out.
                if len(answers) == self.ranks or (_NOTHING_TO_SAVE in answers and self.rank):
                    return answers
                time.sleep(POLL_SECONDS / 5)
        except Exception:  # the service is gone
            pass
        return [*answers, _NOTHING_TO_SAVE]


def leave(status: int, said: str = "") -> NoReturn:
    """Ends this process and its children now, whatever its other threads are doing.

    An orderly end waits for threads, and a thread inside XLA's compiler doesn't survive it.
    """

    def tell() -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody listens any more
            if said:
                print(said)
            sys.stdout.flush()
            sys.stderr.flush()

    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()
    # Whoever reads our output may have stopped to: that must not keep the process.
    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    telling.join(timeout=2)
    os._exit(status)

"""Runs of a comparison side by side, each in a process of its own.

A worker makes one run after the other. Public training that several runs need is still made once: who comes second waits for
it (``SharedTraining``), so runs that need different training are begun first.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import torch

logger = logging.getLogger(__name__)

Task, Result = TypeVar("Task"), TypeVar("Result")


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection


class Workers(Generic[Task, Result]):
    """``work`` in at most ``jobs`` processes that share the threads of this one.

    Args:
        work: importable by name; a worker calls it on one task after the other.
        died: the result of a task whose process ended without one, from the task and why.
    """

    def __init__(self, work: Callable[[Task], Result], *, jobs: int, died: Callable[[Task, str], Result]) -> None:
        self._work, self._jobs, self._died, self._threads = work, jobs, died, 1
        self._busy: dict[Connection, tuple[_Worker, Task]] = {}

    def results(self, tasks: Sequence[Task]) -> Generator[Result, None, None]:
        """In the order in which they end. Leaving early ends the processes; what they were at can be gone on with."""
        waiting = deque(tasks)
        jobs = min(self._jobs, len(waiting))
        self._threads = max(1, torch.get_num_threads() // max(1, jobs))
        try:
            for _ in range(jobs):
                self._give(self._started(), waiting.popleft())
            while self._busy:
                for connection in wait(list(self._busy)):
                    assert isinstance(connection, Connection)
                    worker, task = self._busy[connection]
                    try:
                        result, alive = connection.recv(), True
                    except (EOFError, OSError):
                        result, alive = self._died(task, self._why(worker)), False
                    del self._busy[connection]
                    if waiting:
                        self._give(worker if alive else self._started(), waiting.popleft())
                    else:
                        connection.close()  # tells it to end
                        worker.process.join()
                    yield result
        finally:
            for worker, _ in self._busy.values():
                worker.process.terminate()
                worker.connection.close()
            for worker, _ in self._busy.values():  # each at the end of its own step
                worker.process.join()
            self._busy.clear()

    def _give(self, worker: _Worker, task: Task) -> None:
        try:
            worker.connection.send(task)
        except OSError:  # it died between two tasks
            worker = self._started()
            worker.connection.send(task)
        self._busy[worker.connection] = (worker, task)

    def _started(self) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._work, self._threads), daemon=True)
        # Read when a child loads its libraries. Bars of several runs would overwrite one another.
        with _environment(OMP_NUM_THREADS=str(self._threads), TQDM_DISABLE="1"):
            process.start()
        theirs.close()
        return _Worker(process, ours)

    @staticmethod
    def _why(worker: _Worker) -> str:
        worker.process.join()
        code = worker.process.exitcode or 0
        if code == -signal.SIGKILL:
            return "its process was killed, as a system does that runs out of memory: try fewer jobs"
        return f"its process ended with {signal.Signals(-code).name if code < 0 else f'status {code}'}"


def _serve(connection: Connection, work: Callable[[Task], Result], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the parent's to handle: it ends its workers
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # by this; a step at hand is finished and saved
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        while True:
            connection.send(work(connection.recv()))
    except EOFError:  # nothing more to do
        return
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent() -> None:
    """However the parent ends: a run that nobody waits for would go on spending its budget, and hold what it has locked."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

"""The processes that turn chunks into units, while this one reads on."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import clm_dist
from clm_dist.errors import RunError, UserError
from clm_dist.preparation.encoders import DifferentIdsError
from clm_dist.preparation.worker import Done, Job, Task, do


class Pool(AbstractContextManager["Pool"]):
    """Workers behind pipes of their own: when this process dies, however, they see their pipe end and leave.

    (`concurrent.futures` shares one queue among all workers; each keeps it open for the others, and orphans wait for ever.)
    A worker has one job at a time, and the next one is read meanwhile. With no worker the jobs are done in this process.
    """

    def __init__(self, task: Task, workers: int) -> None:
        self.task = task
        self._workers: dict[Connection, subprocess.Popen[bytes]] = {}
        for _ in range(workers):
            ours, theirs = Pipe()
            # not -m: what the module defines would be of `__main__` to the other side
            start = "from clm_dist.preparation.worker import main; main()"
            command = [sys.executable, "-P", "-c", start, str(theirs.fileno())]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=_environment(), process_group=0
            )
            theirs.close()
            self._workers[ours] = process
        for connection in self._workers:  # when all of them are starting: it takes until one has
            self._send(connection, task)

    def __exit__(self, *_: object) -> None:
        for connection, process in self._workers.items():
            process.terminate()
            connection.close()
        for process in self._workers.values():
            process.wait()

    def run(self, jobs: Iterator[Job]) -> Iterator[Done]:
        """Does all jobs, in any order. The first bad record (in the order of jobs) ends it: as the last that is told."""
        if not self._workers:
            encoder = self.task.choice.build()
            for number, job in enumerate(jobs):
                yield do(job, number, self.task, encoder)
            return
        idle = list(self._workers)
        numbered = enumerate(jobs)
        following = next(numbered, None)
        bad: Done | None = None
        while following is not None or len(idle) < len(self._workers):
            while idle and following is not None:
                self._send(idle.pop(), following)
                following = next(numbered, None)
            busy = [connection for connection in self._workers if connection not in idle]
            for connection in wait(busy):
                assert isinstance(connection, Connection)
                done = self._receive(connection)
                idle.append(connection)
                if done.bad is None:
                    yield done
                elif bad is None or done.job_number < bad.job_number:
                    bad, following = done, None  # those at work came before it, or hardly after: let them end
        if bad is not None:
            yield bad

    def _send(self, connection: Connection, message: Task | tuple[int, Job]) -> None:
        try:
            connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            self._lost(connection)

    def _receive(self, connection: Connection) -> Done:
        try:
            answer: Any = connection.recv()
        except (EOFError, ConnectionResetError):
            self._lost(connection)
        if isinstance(answer, OSError | DifferentIdsError | UserError):
            raise answer
        if isinstance(answer, str):
            raise RuntimeError(f"a worker failed:\n{answer}")
        assert isinstance(answer, Done)
        return answer

    def _lost(self, connection: Connection) -> NoReturn:
        process = self._workers[connection]
        code = process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        hint = " (the system does that when memory runs out: try fewer --workers)" if code == -signal.SIGKILL else ""
        raise RunError(f"worker process {process.pid} {how}{hint}")


def default_workers() -> int:
    """One for each core that this process may use (a batch job may not use all of the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment() -> dict[str, str]:
    """The package is found where it was found here; one thread each, since there is a worker for each core."""
    root = str(Path(clm_dist.__file__).parents[1])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    one = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **one, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}

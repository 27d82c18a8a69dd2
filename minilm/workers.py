"""Processes that embed one job after the other, each replaced if it dies.

In: jobs, lists of texts with a key. Out: their vectors, as they get ready. Next: `streaming.py`.

A `ProcessPool` is for one call, and a death is an error of that call. Here a run may take a night,
and a process that the system kills for its memory shall not end it: a new one takes its place, and
its job. Only a job that kills one process after the other is an error.
"""

import itertools
import signal
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.multiprocessing

from minilm.errors import WorkerError
from minilm.kernels import give_back_freed_memory, keep_few_kernels
from minilm.process_pool import begin_work, sendable

if TYPE_CHECKING:
    from minilm.encoder import SentenceEncoder

__all__ = ["Answer", "Job", "Workers", "embed"]

_tickets = itertools.count()

_ATTEMPTS = 3  # processes that may die of one job
_LAST_BREATH = 5.0  # seconds for a process that closed its pipe to end


@dataclass(frozen=True)
class Answer:
    """What came of a list of texts.

    Attributes:
        vectors: `[n, d]`.
        token_counts, kept: How many tokens each text has, and how many were read.
    """

    vectors: "np.ndarray[Any, Any]"
    token_counts: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """Texts to embed.

    Attributes:
        key: What the answer is told apart by.
        texts: n texts.
        name: What to call them in an error.
    """

    key: int
    texts: list[str]
    name: str


def embed(encoder: "SentenceEncoder", texts: list[str], options: dict[str, Any]) -> Answer:
    """The vectors of some texts, and how much was read of them."""
    vectors, report = encoder.encode(texts, return_report=True, **options)
    give_back_freed_memory()
    return Answer(vectors, report.token_counts, report.kept_token_counts)


class Workers:
    """The processes. A context manager, at whose end they are stopped, whatever they do."""

    def __init__(self, encoder: "SentenceEncoder", options: dict[str, Any], count: int) -> None:
        """Start them.

        Args:
            encoder: The model, of which each gets a copy; its weights are shared if they are on
                the processor.
            options: What `encode` is called with.
            count: How many. They share the threads that torch has here.
        """
        self._context = torch.multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // count)
        self._arguments = (encoder, str(encoder.device), threads, options)
        self._processes: dict[Any, Any] = {}  # by their pipes
        try:
            for _ in range(count):
                self._start()
        except BaseException:
            self.stop()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [process.pid for process in self._processes.values()]

    def _start(self) -> Any:
        ours, theirs = self._context.Pipe()
        with theirs:  # only the process keeps it, so that its death ends ours
            process = self._context.Process(
                target=_work, args=(*self._arguments, theirs), daemon=True
            )
            with _interrupts_later():
                process.start()
        self._processes[ours] = process
        return ours

    def stop(self) -> None:
        """End the processes, also amid a job. A second time it does nothing."""
        for pipe, process in self._processes.items():
            process.kill()
            process.join()
            process.close()
            pipe.close()
        self._processes = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answers(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Answer | Exception]]:
        """Do jobs, as many at a time as there are processes; one more is read ahead.

        Yields:
            Each job once, as they get ready, with its answer, or the error that it ended in.

        Raises:
            WorkerError: So many processes died of one job that another would too.
        """
        coming = iter(jobs)
        again: deque[Job] = deque()
        deaths: Counter[int] = Counter()
        idle = deque(self._processes)
        busy: dict[Any, tuple[int, Job]] = {}
        ahead = next(coming, None)
        ready: list[tuple[Job, Any]] = []
        while True:
            while idle and (again or ahead is not None):
                pipe = idle.popleft()
                job = again.popleft() if again else cast("Job", ahead)
                busy[pipe] = next(_tickets), job
                with suppress(OSError):  # it died: that is seen below
                    pipe.send((busy[pipe][0], job.texts))
                if job is ahead:
                    ahead = next(coming, None)
            # Only now: the processes work while whoever gets these writes them.
            yield from ready
            ready = []
            if not busy:
                return
            for pipe in connection.wait(list(busy)):
                ticket, job = busy[pipe]
                try:
                    of_ticket, answer = cast("Any", pipe).recv()
                    if of_ticket == ticket:  # and not of a call that was left
                        del busy[pipe]
                        ready.append((job, answer))
                        idle.append(pipe)
                except (EOFError, OSError):
                    del busy[pipe]
                    deaths[job.key] += 1
                    idle.append(self._replaced(pipe, job, deaths[job.key]))
                    again.append(job)

    def _replaced(self, pipe: Any, job: Job, deaths: int) -> Any:
        process = self._processes.pop(pipe)
        process.join(_LAST_BREATH)
        pid, code = process.pid, process.exitcode
        process.kill()
        process.join()
        process.close()
        pipe.close()
        if deaths >= _ATTEMPTS:
            raise WorkerError(
                f"{job.name}: {deaths} processes died of it, the last, {pid}, with exit code "
                f"{code}{' (out of memory?)' if code == -9 else ''}; what was written before stays"
            )
        return self._start()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C waits until a process is started, which then never sees one: it is for the parent."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would let them through as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    encoder: "SentenceEncoder", device: str, threads: int, options: dict[str, Any], pipe: Any
) -> None:
    """A worker's life."""
    keep_few_kernels()
    begin_work(threads)
    trouble: Exception | None = None
    try:
        encoder.to(device)
    except Exception as error:
        trouble = error
    while True:
        try:
            ticket, texts = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            if trouble is not None:
                raise trouble
            answer: Any = embed(encoder, texts, options)
        except Exception as error:
            answer = sendable(error)
        pipe.send((ticket, answer))

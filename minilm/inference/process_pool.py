"""Several processes that embed together, each with a copy of the model.

In: jobs, which are texts and what to do with them. Out: the answers, as they get ready. `encode`
computes one call in them, `files/streaming.py` files of any size.

The processes are started afresh (spawn): a copy by fork would share locks of threads that it lacks.
Each is in an executor of its own, so that when one dies it is known of which job, and only that job
fails. A worker that fails says why, and one that dies is noticed: either is an error of the call or
is made good by another worker, never an endless wait.

The model reaches them in a file, after they have started. What is large must not be an argument of
a process: spawn writes arguments into a pipe whose reading end it holds itself, and so waits for
ever for a process that died before it read them. Their memory is that of the file: one copy for
all on the processor.
"""

import itertools
import math
import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
import threading
import time
import weakref
import zlib
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch

from minilm.errors import InputError, InputTypeError, WorkerError
from minilm.inference.compute import Computed, Plan, run, with_prompt
from minilm.inference.kernels import keep_few_kernels
from minilm.inference.truncation import raise_if_cut, warn_if_cut
from minilm.inputs import Row, as_device, with_progress
from minilm.pipeline import Pipeline

__all__ = ["Job", "ProcessPool", "run_in", "sendable"]

_POLL = 0.2  # seconds until a look at Ctrl-C
_START_LIMIT = 300.0  # seconds: file systems of clusters take minutes to give all of torch
_STOP_LIMIT = 10.0
_LAST_BREATH = 5.0  # seconds until it is known how a process died
_LARGEST_CHUNK = 5000  # texts
_DEFAULT_WORKERS = 4  # on a processor

_GUARD = (
    'if this is a script, what starts processes belongs under `if __name__ == "__main__":`, '
    "since each of them imports the script"
)


@dataclass(frozen=True)
class Job:
    """One call for a worker to make.

    Attributes:
        key: What tells its answer from others.
        arguments: The arguments of the function, behind the encoder.
        name: The job's name in an error.
    """

    key: int
    arguments: tuple[Any, ...]
    name: str


class ProcessPool(dict[str, Any]):
    """Worker processes. As in sentence-transformers it is a dict, with the key "processes".

    Its "input" and "output", which are queues there, are None. It is a context manager, which stops
    the processes at its end. Threads may share it.

    Attributes:
        encoder: The model of which the processes have copies.
    """

    def __init__(
        self,
        encoder: Pipeline,
        target_devices: Sequence[str | torch.device] | None = None,
    ) -> None:
        """Start the processes.

        Args:
            encoder: The model.
            target_devices: A device for each; by default every GPU, else the processor, by up to
                four processes.

        Raises:
            InputTypeError, InputError: `target_devices` are not devices that can be used.
            WorkerError: The model can't be sent to other processes, or these can't be started: a
                script lacks its main guard, there is no memory.
        """
        super().__init__(input=None, output=None, processes=[])
        # Python would say so too, but not before it made semaphores, which nobody would remove.
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise WorkerError(f"no process can be started by one that is just starting; {_GUARD}")
        if isinstance(target_devices, str | torch.device):
            raise InputTypeError("target_devices is one device; pass a list", "target_devices")
        names = _default_devices() if target_devices is None else target_devices
        devices = [as_device(name) for name in names]
        if not devices:
            raise InputError("target_devices is empty; pass at least one", "target_devices")
        on_cpu = sum(device.type == "cpu" for device in devices)
        self.encoder = encoder
        self._threads = max(1, torch.get_num_threads() // max(on_cpu, 1))
        self._owner = os.getpid()
        self._lock = threading.RLock()
        self._workers: list[_Worker] = []
        self._sent: Any = None  # the state of the model that the workers have
        self._stopped = False
        try:
            for device in devices:
                self._workers.append(_Worker(str(device), self._threads))
            self._send_model(dict(enumerate(self._workers)), _START_LIMIT)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the processes, also busy ones. A second call does nothing."""
        if os.getpid() != self._owner:  # a fork, whose they are not
            return
        self._stopped = True
        ended = [worker.stop() for worker in self._workers]
        until = time.monotonic() + _STOP_LIMIT
        while wait(ended, _POLL).not_done and time.monotonic() < until:
            for worker in self._workers:
                worker.kill()  # one that was just being started
        self["processes"] = []

    @property
    def workers(self) -> int:
        """The number of processes."""
        return len(self._workers)

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def answers(
        self, function: Callable[..., Any], jobs: Iterable[Job], attempts: int = 1
    ) -> Generator[tuple[Job, Any], None, None]:
        """Have the processes do jobs, each one at a time; one more job is read ahead.

        Args:
            function: Of a module, called with the encoder and a job's arguments.
            jobs: What to do.
            attempts: How many processes may die of one job. With 1 a death is an error; otherwise
                a new process takes the place, and the job is done again.

        Returns:
            An iterator over each job once, as they get ready, with its answer, or the Exception
            that it ended in. It raises a WorkerError if so many processes died of a job, or if the
            pool is stopped meanwhile.

        Raises:
            WorkerError: The pool was stopped, or belongs to another process.
        """
        if os.getpid() != self._owner:
            raise WorkerError(
                f"the pool belongs to process {self._owner}, of which this one is a fork; start "
                "another one here"
            )
        with self._lock:
            self._check_running()
            if _state(self.encoder) != self._sent:  # it was changed since
                self._send_model(dict(enumerate(self._workers)))
        return self._answers(function, iter(jobs), attempts)

    def _answers(
        self, function: Callable[..., Any], coming: Iterator[Job], attempts: int
    ) -> Generator[tuple[Job, Any], None, None]:
        ahead = next(coming, None)
        again: deque[Job] = deque()
        deaths: Counter[int] = Counter()
        idle = deque(range(len(self._workers)))
        busy: dict[Future[bytes], tuple[int, _Worker, Job]] = {}
        done: queue.SimpleQueue[Future[bytes]] = queue.SimpleQueue()
        ready: list[tuple[Job, Any]] = []
        while True:
            while idle and (again or ahead is not None):
                place = idle.popleft()
                job = again.popleft() if again else cast("Job", ahead)
                worker = self._workers[place]
                future = worker.submit(_answer, function, job.arguments)
                busy[future] = place, worker, job
                future.add_done_callback(done.put)
                if job is ahead:
                    ahead = next(coming, None)
            # Only now: the processes work while whoever gets this writes it.
            yield from ready
            ready = []
            if not busy:
                return
            future = _next(done)
            place, worker, job = busy.pop(future)
            idle.append(place)
            try:
                ready = [(job, _unpacked(future.result()))]
            except (BrokenProcessPool, CancelledError):
                self._check_running()
                deaths[job.key] += 1
                self._replace(place, worker, job, deaths[job.key], attempts)
                again.append(job)
            except Exception as error:
                ready = [(job, error)]

    def _check_running(self) -> None:
        if self._stopped:
            raise WorkerError("the pool was stopped; start another one")

    def _replace(self, place: int, worker: "_Worker", job: Job, deaths: int, attempts: int) -> None:
        """Start another worker in place of one that died, or raise if too many died of a job."""
        if attempts == 1:
            raise WorkerError(
                f"process {place} of the pool, {worker.death()}; stop the pool and start another "
                "one"
            )
        if deaths >= attempts:
            raise WorkerError(
                f"{job.name}: {deaths} processes died of it; the last, {worker.death()}; what was "
                "written before stays"
            )
        with self._lock:
            if self._workers[place] is not worker:  # another thread has seen it too
                return
            worker.stop()
            self._workers[place] = _Worker(worker.device, self._threads)
            try:
                self._send_model({place: self._workers[place]}, _START_LIMIT)
            except WorkerError as error:
                # One that dies as it starts can't do the job either: that is counted there.
                if not isinstance(error.__cause__, BrokenProcessPool):
                    raise
            finally:
                if self._stopped:
                    self._workers[place].stop()

    def _send_model(self, workers: "dict[int, _Worker]", limit: float = math.inf) -> None:
        """Give workers the model as it is now; start those that don't run yet."""
        state = _state(self.encoder)
        if state != self._sent:  # all or none: there are never two models at work
            workers, self._sent = dict(enumerate(self._workers)), None
        try:
            folder = tempfile.TemporaryDirectory(prefix="minilm-", ignore_cleanup_errors=True)
        except OSError as error:
            raise WorkerError(f"the model can't be sent to other processes: {error}") from error
        with folder:
            path = Path(folder.name, "model.pt")
            try:
                with path.open("wb") as file:
                    torch.save(self.encoder, file, pickle_protocol=pickle.HIGHEST_PROTOCOL)
            except Exception as error:
                raise WorkerError(
                    f"the model can't be sent to other processes: {type(error).__name__}: {error}"
                ) from error
            loading: dict[Future[None], int] = {}
            done: queue.SimpleQueue[Future[None]] = queue.SimpleQueue()
            for place, worker in workers.items():
                with _starting():
                    future = _in_background(worker.load, str(path))
                loading[future] = place
                future.add_done_callback(done.put)
            until = time.monotonic() + limit
            while loading:
                try:
                    future = _next(done, until)
                    place = loading.pop(future)
                    future.result()
                except queue.Empty as error:
                    raise WorkerError(
                        f"{len(loading)} of {len(workers)} processes did not start within "
                        f"{limit:.0f} seconds; {_GUARD}"
                    ) from error
                except Exception as error:
                    self._check_running()
                    if not isinstance(error, BrokenProcessPool):
                        raise
                    raise WorkerError(
                        f"process {place} of the pool, {workers[place].death()} as it started; "
                        f"what it said is on standard error; {_GUARD}"
                    ) from error
        self["processes"] = [worker.process for worker in self._workers]
        self._sent = state


class _Worker:
    """A process, in an executor of its own.

    Attributes:
        device: Where its copy of the model is.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        with _starting():
            self._executor = ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), _begin, (threads,)
            )
        self._started = self._executor._processes  # of which it forgets at its end
        self._owner = os.getpid()
        _workers.add(self)

    @property
    def process(self) -> Any:
        """The `multiprocessing.Process`; None before its start."""
        return next(iter(self._started.values()), None)

    def submit(self, *call: Any) -> "Future[Any]":
        """Queue a call; if the process is dead, return a future that has failed."""
        try:
            return self._executor.submit(*call)
        except RuntimeError as error:  # BrokenProcessPool is one
            failed: Future[Any] = Future()
            failed.set_exception(BrokenProcessPool(str(error)))
            return failed

    def load(self, path: str) -> None:
        """Have the worker read the model; start it if it does not run. To be called in a thread.

        Raises:
            WorkerError: The process can't be started.
            BrokenProcessPool: The process died.
            Exception: The process can't read the model.
        """
        if hasattr(signal, "pthread_sigmask"):  # it inherits this: Ctrl-C is for the parent
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with _starting():
            future = self._executor.submit(_load, path, self.device)
        # With an end of our own we would wait for the rest of an answer that a process died of.
        answers: Any = self._executor._result_queue
        answers._writer.close()
        future.result()

    def death(self) -> str:
        """Say which process this is, and how it ended."""
        until = time.monotonic() + _LAST_BREATH
        process = self.process
        if process is None:
            return "which never began, died"
        while process.exitcode is None and time.monotonic() < until:
            time.sleep(0.01)
        memory = " (out of memory?)" if process.exitcode == -signal.SIGKILL else ""
        return f"{process.pid}, died unexpectedly (exit code {process.exitcode}{memory})"

    def kill(self) -> None:
        """End the process, if it runs and was started by this one."""
        process = self.process
        if process is not None and os.getpid() == self._owner:
            process.kill()

    def stop(self) -> "Future[None]":
        """End the process, and the executor behind it, which may take a moment."""
        self.kill()
        try:
            return _in_background(self._executor.shutdown, cancel_futures=True)
        except RuntimeError:  # there is no room for a thread
            self._executor.shutdown(wait=False, cancel_futures=True)
            ended: Future[None] = Future()
            ended.set_result(None)
            return ended


_workers: "weakref.WeakSet[_Worker]" = weakref.WeakSet()


def _kill_all() -> None:
    for worker in list(_workers):
        worker.kill()


def _forget_all() -> None:
    children: set[Any] = getattr(multiprocessing.process, "_children", set())
    children.difference_update([worker.process for worker in _workers])


if hasattr(os, "register_at_fork"):  # a fork that ends would join them, which it can't
    os.register_at_fork(after_in_child=_forget_all)
# An executor lets Python's end wait for what its process computes. Here nobody waits for that.
getattr(threading, "_register_atexit", lambda _: None)(_kill_all)


@contextmanager
def _starting() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}; {_GUARD}"
        try:
            os.getcwd()  # noqa: PTH109
        except FileNotFoundError:  # in which each of them would start
            reason = "the working directory is gone; change to one that is there"
        raise WorkerError(f"no process can be started: {reason}") from error


def _in_background(function: Callable[..., Any], *args: Any, **options: Any) -> "Future[Any]":
    """Call a function in a thread, which Ctrl-C can't interrupt, and which may wait for ever."""
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*args, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _next(done: "queue.SimpleQueue[Future[Any]]", until: float = math.inf) -> "Future[Any]":
    """Take the next future out of a queue, with a look at Ctrl-C from time to time.

    Raises:
        queue.Empty: None came until that time.
    """
    while True:
        try:
            return done.get(timeout=_POLL)
        except queue.Empty:
            if time.monotonic() > until:
                raise


def _default_devices() -> list[str]:
    if torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu"] * min(_DEFAULT_WORKERS, os.cpu_count() or 1)


def _state(encoder: Pipeline) -> tuple[Any, ...]:
    """Return what differs between models: modules, and checksums of all numbers (13 ms)."""
    modules = [type(module) for module in encoder.modules()]
    tensors = itertools.chain(encoder.named_parameters(), encoder.named_buffers())
    weights = [
        (name, tensor.dtype, tensor.shape, _checksum(tensor.detach())) for name, tensor in tensors
    ]
    return modules, weights, encoder.tokenizer


def _checksum(tensor: torch.Tensor) -> int:
    numbers: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(numbers)


def run_in(
    pool: ProcessPool,
    encoder: Pipeline,
    rows: list[Row],
    plan: Plan,
    chunk_size: int | None,
) -> Computed:
    """Compute what a plan asks for in the processes of a pool.

    Args:
        pool: The pool.
        encoder: The model, of which its processes have copies.
        rows: n texts or pairs.
        plan: What is wanted of them.
        chunk_size: Texts that a process is given at a time.

    Raises:
        InputTypeError: `pool` is not a `ProcessPool`.
        InputError: The pool is one of another model.
        WorkerError: A process died, or the pool was stopped.
        Exception: What a process raised.
    """
    if not isinstance(pool, ProcessPool):
        raise InputTypeError(
            f"pool is {type(pool).__name__}; pass what start_multi_process_pool gives", "pool"
        )
    if pool.encoder is not encoder:
        raise InputError("pool has copies of another model; start one from this model", "pool")
    if plan.truncation == "error":
        counts = encoder.get_tokenizer().tokenize(with_prompt(rows, plan.prompt)).token_counts
        kept = [min(count, plan.max_seq_length) for count in counts]
        raise_if_cut(counts, kept, plan.first_row)
    if chunk_size is None:
        chunk_size = min(math.ceil(len(rows) / pool.workers / 10) or 1, _LARGEST_CHUNK)
    # The warning adds up what was cut in all chunks.
    quiet = "silent" if plan.truncation in ("warn", "error") else plan.truncation
    part = replace(plan, truncation=quiet, show_progress_bar=False, on_device=False)
    starts = range(0, len(rows), chunk_size)
    jobs = (
        Job(
            number,
            (rows[start : start + chunk_size], replace(part, first_row=plan.first_row + start)),
            f"chunk {number}",
        )
        for number, start in enumerate(starts)
    )
    outcomes: dict[int, Computed] = {}
    with closing(pool.answers(run, jobs)) as answers:
        for _ in with_progress(range(len(starts)), plan.show_progress_bar):
            job, outcome = next(answers)
            if isinstance(outcome, Exception):
                raise outcome
            outcomes[job.key] = outcome
    whole = _joined([outcomes[number] for number in range(len(starts))], plan, encoder)
    if plan.truncation == "warn":
        warn_if_cut(whole.token_counts, whole.kept, plan.first_row)
    return whole


def _joined(parts: list[Computed], plan: Plan, encoder: Pipeline) -> Computed:
    values: Any
    if plan.output_value == "sentence_embedding":
        dtype = encoder.bert.embeddings.word_embeddings.weight.dtype
        none = torch.empty(0, plan.width, dtype=dtype, device="cpu")
        values = torch.cat([none, *(part.values for part in parts)])
        if plan.on_device:
            values = values.to(encoder.device)
    else:
        values = [value for part in parts for value in part.values]
    return Computed(
        values,
        [count for part in parts for count in part.token_counts],
        [count for part in parts for count in part.kept],
        [span for part in parts for span in part.spans or []] if plan.spans else None,
        [count for part in parts for count in part.windows],
    )


# --- in a worker

_encoder: Pipeline | None = None


def _begin(threads: int) -> None:
    """Prepare a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops us
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    keep_few_kernels()
    torch.set_num_threads(threads)


def _end_with_the_parent() -> None:
    """End this worker when its parent has ended: one that is killed can't stop its workers."""
    parent = multiprocessing.parent_process()
    while parent is not None:
        parent.join(5)  # until it ends, and all of its forks, which have its end of the pipe
        if not parent.is_alive() or os.getppid() != parent.pid:
            os._exit(1)


def _load(path: str, device: str) -> None:
    """Load a model in place of the last one. Its weights stay in the file, which all map."""
    global _encoder
    with _errors_sent():
        try:
            encoder = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        except Exception as error:
            raise WorkerError(
                f"another process can't read the model: {type(error).__name__}: {error}"
            ) from error
        _encoder = encoder.to(device)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    """Do a job and pickle its answer: a tensor would be passed through /dev/shm."""
    with _errors_sent():
        packed = BytesIO()
        torch.save(function(_encoder, *arguments), packed)
        return packed.getvalue()


def _unpacked(answer: bytes) -> Any:
    return torch.load(BytesIO(answer), map_location="cpu", weights_only=False)


@contextmanager
def _errors_sent() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        told = sendable(error)
        if told is error:
            raise
        raise told from None


def sendable(error: Exception) -> Exception:
    """Return the error, or one with the same text that can be pickled."""
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    import traceback

    return WorkerError("".join(traceback.format_exception(error)))

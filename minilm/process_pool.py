"""Several processes that compute one call of `encode` together, each with a copy of the model.

In: rows of text and a `Plan`. Out: the `Outcome` that one process would give, in order.

The processes are started afresh (spawn): a copy by fork would share locks of threads that it lacks.
The weights are shared where the system can. A worker that fails says why, and one that dies is
noticed: either is an error of the call, never an endless wait.
"""

import itertools
import math
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import connection
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor

from minilm.compute import Outcome, Plan, run, with_prompt
from minilm.errors import InputError, InputTypeError, WorkerError
from minilm.inputs import Row, as_device, with_progress
from minilm.truncation import raise_if_cut, warn_if_cut

if TYPE_CHECKING:
    from minilm.encoder import SentenceEncoder

__all__ = ["ProcessPool", "begin_work", "run_in", "sendable"]

_POLL = 0.2  # seconds
_LAST_BREATH = 5.0  # seconds for a process that closed its pipe to end
_LARGEST_CHUNK = 5000  # texts
_DEFAULT_WORKERS = 4  # on a processor

_calls = itertools.count()


class ProcessPool(dict[str, Any]):
    """Worker processes, in the form that sentence-transformers gives: a dict of queues.

    It is a context manager, which stops them at its end.

    Attributes:
        encoder: The model of which they have copies.
    """

    def __init__(
        self,
        encoder: "SentenceEncoder",
        target_devices: Sequence[str | torch.device] | None = None,
    ) -> None:
        """Start them.

        Args:
            encoder: The model.
            target_devices: A device for each; by default every GPU, else the processor, by up to
                four processes.

        Raises:
            InputTypeError, InputError: These are no devices that can be used.
        """
        super().__init__()
        if isinstance(target_devices, str | torch.device):
            raise InputTypeError("target_devices is one device; pass a list", "target_devices")
        names = _default_devices() if target_devices is None else target_devices
        devices = [as_device(name) for name in names]
        if not devices:
            raise InputError("target_devices is empty; pass at least one", "target_devices")
        on_cpu = sum(device.type == "cpu" for device in devices)
        threads = max(1, torch.get_num_threads() // max(on_cpu, 1))
        self.encoder = encoder
        context = torch.multiprocessing.get_context("spawn")
        self["input"] = context.Queue()
        self["input"].cancel_join_thread()  # Python's end doesn't wait for jobs to be taken
        self["output"] = queue.SimpleQueue()
        self["processes"] = []
        pipes: list[Any] = []  # one from each process: that it ends says that the process died
        try:
            for device in devices:
                answers, sender = context.Pipe(duplex=False)
                pipes.append(answers)
                with sender:  # only the process keeps it
                    process = context.Process(
                        target=_work,
                        args=(encoder, str(device), threads, self["input"], sender),
                        daemon=True,
                    )
                    process.start()
                self["processes"].append(process)
        except BaseException:
            self.stop()
            raise
        # In a thread, so that Ctrl-C can't interrupt the reading of an answer halfway.
        threading.Thread(target=_read, args=(pipes, self["output"]), daemon=True).start()

    def stop(self) -> None:
        """End the processes. A second time it does nothing."""
        for process in self["processes"]:
            process.terminate()
        for process in self["processes"]:
            process.join()
            process.close()
        self["processes"] = []
        self["input"].close()

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _default_devices() -> list[str]:
    if torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu"] * min(_DEFAULT_WORKERS, os.cpu_count() or 1)


def run_in(
    pool: ProcessPool,
    encoder: "SentenceEncoder",
    rows: list[Row],
    plan: Plan,
    chunk_size: int | None,
) -> Outcome:
    """Compute what a plan asks for in the processes of a pool.

    Args:
        pool: The pool.
        encoder: The model, of which its processes have copies.
        rows: n texts or pairs.
        plan: What is wanted of them.
        chunk_size: Texts that a process is given at a time.

    Raises:
        InputTypeError: That is no pool of this package.
        InputError: It is one of another model.
        WorkerError: A process died, or the pool was stopped.
        Exception: What a process raised.
    """
    if not isinstance(pool, ProcessPool):
        raise InputTypeError(
            f"pool is {type(pool).__name__}; pass what start_multi_process_pool gives", "pool"
        )
    if not pool["processes"]:
        raise WorkerError("the pool was stopped; start another one")
    if pool.encoder is not encoder:
        raise InputError("pool has copies of another model; start one from this model", "pool")
    if plan.truncation == "error":
        counts = encoder._tokenizer(with_prompt(rows, plan.prompt)).token_counts
        kept = [min(count, encoder.max_seq_length) for count in counts]
        raise_if_cut(counts, kept, plan.first_row)
    workers = len(pool["processes"])
    if chunk_size is None:
        chunk_size = min(math.ceil(len(rows) / workers / 10) or 1, _LARGEST_CHUNK)
    # The warning adds up what was cut in all chunks.
    quiet = "silent" if plan.truncation in ("warn", "error") else plan.truncation
    settings = (encoder.max_seq_length, encoder.truncate_dim)
    call = next(_calls)
    starts = range(0, len(rows), chunk_size)
    for number, start in enumerate(starts):
        part = replace(
            plan,
            truncation=quiet,
            first_row=plan.first_row + start,
            show_progress_bar=False,
            on_device=False,
        )
        pool["input"].put((call, number, rows[start : start + chunk_size], part, settings))
    outcomes: dict[int, Outcome] = {}
    try:
        for _ in with_progress(range(len(starts)), plan.show_progress_bar):
            number, outcome = _next(pool, call)
            if isinstance(outcome, BaseException):
                raise outcome
            outcomes[number] = outcome
    except BaseException:  # Ctrl-C too
        _throw_away(pool["input"])
        raise
    whole = _joined([outcomes[number] for number in range(len(starts))], plan, encoder)
    if plan.truncation == "warn":
        warn_if_cut(whole.token_counts, whole.kept, plan.first_row)
    return whole


def _throw_away(jobs: Any) -> None:
    """What nobody has begun shall not keep the next call waiting."""
    until = time.monotonic() + _POLL
    # Not endlessly: a process that died may have kept the queue locked.
    while not jobs.empty() and time.monotonic() < until:
        with suppress(queue.Empty):
            while True:
                jobs.get(timeout=_POLL / 10)


def _next(pool: ProcessPool, call: int) -> tuple[int, Any]:
    """The next answer to this call; those to an earlier one, which was left, are thrown away."""
    while True:
        try:
            place, answer = pool["output"].get(timeout=_POLL)
        except queue.Empty:  # a look at Ctrl-C
            continue
        if answer is None:
            pool["output"].put((place, None))  # for the next call
            process = pool["processes"][place]
            process.join(_LAST_BREATH)
            raise WorkerError(
                f"process {place} of the pool, {process.pid}, died unexpectedly (exit code "
                f"{process.exitcode}); stop the pool and start another one"
            )
        of_call, number, outcome = answer
        if of_call == call:
            return number, outcome


def _read(pipes: list[Any], found: "queue.SimpleQueue[tuple[int, Any]]") -> None:
    """Put what comes out of the pipes into a queue, with the number of the process; its end, None.

    A process that is killed while it writes ends its pipe, where in a queue shared by all its half
    answer would be waited for endlessly.
    """
    places = {pipe: place for place, pipe in enumerate(pipes)}
    while places:
        for pipe in cast("list[Any]", connection.wait(list(places))):
            try:
                found.put((places[pipe], pipe.recv()))
            except Exception:
                found.put((places.pop(pipe), None))
                pipe.close()


def _joined(parts: list[Outcome], plan: Plan, encoder: "SentenceEncoder") -> Outcome:
    whole = Outcome([], [], [], [] if plan.spans else None, [])
    values = [_as_tensors(part.values) for part in parts]
    if plan.output_value == "sentence_embedding":
        dtype = encoder.bert.embeddings.word_embeddings.weight.dtype
        whole.values = torch.cat([torch.empty(0, plan.width, dtype=dtype), *values])
        if plan.on_device:
            whole.values = whole.values.to(encoder.device)
    else:
        whole.values = [value for of_part in values for value in of_part]
    for part in parts:
        whole.token_counts += part.token_counts
        whole.kept += part.kept
        whole.windows += part.windows
        if whole.spans is not None and part.spans is not None:
            whole.spans += part.spans
    return whole


def _work(encoder: "SentenceEncoder", device: str, threads: int, jobs: Any, answers: Any) -> None:
    """A worker's life."""
    begin_work(threads)
    trouble: Exception | None = None
    try:
        encoder.to(device)
    except Exception as error:
        trouble = error
    while True:
        call, number, rows, plan, (limit, truncate_dim) = jobs.get()
        try:
            if trouble is not None:
                raise trouble
            # What was set on the model after the pool was started.
            encoder.max_seq_length, encoder.truncate_dim = limit, truncate_dim
            answer: Any = run(encoder, rows, plan)
            answer.values = _as_arrays(answer.values)
        except Exception as error:
            answer = sendable(error)
        answers.send((call, number, answer))


def begin_work(threads: int) -> None:
    """What a process that works for another does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which stops us
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _end_with_the_parent() -> None:
    """A parent that is killed can't stop its workers, which would wait for jobs for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def sendable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent."""
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    import traceback

    return WorkerError("".join(traceback.format_exception(error)))


def _as_arrays(values: Any) -> Any:
    """Tensors as arrays: those are copied into the queue, not lent."""
    if isinstance(values, Tensor):
        if values.dtype == torch.bfloat16:  # which NumPy lacks; float32 holds it exactly
            return ("bfloat16", values.float().cpu().numpy())
        return values.cpu().numpy()
    if isinstance(values, dict):
        return {name: _as_arrays(value) for name, value in values.items()}
    return [_as_arrays(value) for value in values] if isinstance(values, list) else values


def _as_tensors(values: Any) -> Any:
    if isinstance(values, tuple):
        return torch.from_numpy(values[1]).to(torch.bfloat16)
    if isinstance(values, np.ndarray):
        return torch.from_numpy(values) if values.ndim else torch.from_numpy(values[None])[0]
    if isinstance(values, dict):
        return {name: _as_tensors(value) for name, value in values.items()}
    return [_as_tensors(value) for value in values] if isinstance(values, list) else values

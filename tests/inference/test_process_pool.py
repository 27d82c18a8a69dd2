"""Several processes compute what one does, with the same bits, and fail loudly."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import ROOT, write_model_folder
from minilm import SentenceEncoder, TruncationWarning
from minilm.errors import (
    InputError,
    InputTypeError,
    NotFiniteError,
    TruncationError,
    WorkerError,
)
from minilm.files.streaming import Answer, embed
from minilm.inference import kernels, process_pool
from minilm.inference.process_pool import Job, ProcessPool, sendable

pytestmark = pytest.mark.process

TEXTS = ["the dog bites the man", "", "a cat", "the sun is out .", "man sees dog", "a", "run !"]
LONG = "the dog sees " * 9
OPTIONS: dict[str, Any] = {"truncation": "silent"}


@pytest.fixture(scope="module")
def model() -> SentenceEncoder:
    """Shared, as its pool is; a test that changes it changes it back."""
    import json

    from conftest import seeded_bert, tiny_tokenizer_json
    from minilm import MeanPooling, Normalize, WordPieceTokenizer

    return SentenceEncoder(
        modules=[seeded_bert(), MeanPooling(), Normalize()],
        tokenizer=WordPieceTokenizer(json.dumps(tiny_tokenizer_json())),
        max_seq_length=12,
    )


@pytest.fixture(scope="module")
def pool(model: SentenceEncoder) -> Iterator[ProcessPool]:
    with model.start_multi_process_pool(["cpu", "cpu"]) as started:
        yield started


def same(ours: Any, expected: Any) -> None:
    """Equal in type, dtype, shape and bits."""
    assert type(ours) is type(expected)
    if isinstance(expected, list):
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected, strict=True):
            same(a, b)
    elif isinstance(expected, dict):
        assert list(ours) == list(expected)
        for name, value in expected.items():
            same(ours[name], value)
    elif isinstance(expected, Tensor):
        assert ours.dtype == expected.dtype
        assert ours.device == expected.device
        assert torch.equal(ours, expected)
    elif isinstance(expected, np.ndarray):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)
    else:
        assert ours == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"convert_to_tensor": True},
        {"convert_to_numpy": False},
        {"precision": "ubinary"},
        {"precision": "int8", "convert_to_tensor": True},
        {"truncate_dim": 8, "normalize_embeddings": True},
        {"prompt": "cat "},
        {"output_value": "token_embeddings"},
        {"batch_size": 2},
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_same_bits_as_in_one_process(
    model: SentenceEncoder, pool: ProcessPool, options: dict[str, Any], chunk_size: int | None
) -> None:
    expected = model.encode(TEXTS, **options)
    same(model.encode(TEXTS, pool=pool, chunk_size=chunk_size, **options), expected)


def test_everything(model: SentenceEncoder, pool: ProcessPool) -> None:
    # Padded to the longest of a chunk: the same bits for the same chunks.
    options: dict[str, Any] = {"output_value": None, "prompt": "cat ", "pool": pool}
    expected = model.encode(TEXTS, output_value=None, prompt="cat ")
    same(model.encode(TEXTS, chunk_size=100, **options), expected)
    rows = model.encode(TEXTS, chunk_size=2, **options)
    lengths = [int(row["attention_mask"].sum()) for row in rows]
    assert lengths == model.token_counts(TEXTS, prompt="cat ")


def test_what_comes_back_is_ours(model: SentenceEncoder, pool: ProcessPool) -> None:
    vectors = model.encode(TEXTS, pool=pool)
    assert vectors.flags.writeable
    assert vectors.flags.c_contiguous
    rows = model.encode(TEXTS, pool=pool, output_value="token_embeddings")
    rows[0].mul_(2)
    assert not model.encode(TEXTS, pool=pool, convert_to_tensor=True).requires_grad


def test_single_text_and_no_text(model: SentenceEncoder, pool: ProcessPool) -> None:
    same(model.encode("a cat", pool=pool), model.encode("a cat"))
    same(
        model.encode("a cat", pool=pool, output_value="token_embeddings"),
        model.encode("a cat", output_value="token_embeddings"),
    )
    every: list[dict[str, Any]] = [{}, {"convert_to_tensor": True}, {"output_value": None}]
    for options in [*every, {"precision": "binary"}]:
        same(model.encode([], pool=pool, **options), model.encode([], **options))


def test_fewer_texts_than_workers(model: SentenceEncoder, pool: ProcessPool) -> None:
    same(model.encode(["a cat"], pool=pool), model.encode(["a cat"]))


def test_pairs(model: SentenceEncoder, pool: ProcessPool) -> None:
    rows = [("the dog", "a man"), "a cat", ("a", "run")]
    same(model.encode(rows, pool=pool, chunk_size=1), model.encode(rows))


def test_older_names(model: SentenceEncoder, pool: ProcessPool) -> None:
    same(model.encode_multi_process(TEXTS, pool, prompt="cat "), model.encode(TEXTS, prompt="cat "))
    same(model.encode_query(TEXTS, pool=pool), model.encode_query(TEXTS))
    assert sorted(pool) == ["input", "output", "processes"]


def test_report_and_chunks(model: SentenceEncoder, pool: ProcessPool) -> None:
    texts = [*TEXTS, LONG, LONG + TEXTS[0]]
    for truncation in ("silent", "chunk"):
        options: dict[str, Any] = {"truncation": truncation, "return_report": True}
        expected, report = model.encode(texts, **options)
        vectors, joined = model.encode(texts, pool=pool, chunk_size=2, **options)
        same(vectors, expected)
        assert joined == report


def test_one_warning_adds_up_what_all_workers_cut(
    model: SentenceEncoder, pool: ProcessPool
) -> None:
    texts = [LONG, "a", LONG, "a", LONG]
    messages = []
    for where in (None, pool):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.encode(texts, pool=where, chunk_size=1)
        assert [warning.category for warning in caught] == [TruncationWarning]
        assert caught[0].filename == __file__
        messages.append(str(caught[0].message))
    assert messages[0] == messages[1]
    assert messages[0].startswith("3 of 5 texts were cut at 12 tokens")


def test_error_instead_of_truncation_names_the_rows(
    model: SentenceEncoder, pool: ProcessPool
) -> None:
    with pytest.raises(TruncationError) as caught:
        model.encode(["a", "a", LONG, "a", LONG], pool=pool, chunk_size=1, truncation="error")
    assert caught.value.rows == [2, 4]


def test_stream_counts_rows_from_its_start(model: SentenceEncoder, pool: ProcessPool) -> None:
    rows = list(model.encode_stream(iter(TEXTS * 2), window=5, pool=pool))
    same(np.stack(rows), model.encode(TEXTS * 2))


def test_settings_changed_after_the_start_are_honoured(
    model: SentenceEncoder, pool: ProcessPool
) -> None:
    try:
        model.max_seq_length, model.truncate_dim = 6, 8
        model.prompts = {"mine": "cat "}
        model.default_prompt_name = "mine"
        expected = model.encode([*TEXTS, LONG], truncation="silent")
        assert expected.shape == (8, 8)
        same(model.encode([*TEXTS, LONG], pool=pool, truncation="silent"), expected)
    finally:
        model.max_seq_length, model.truncate_dim = 12, None
        model.prompts, model.default_prompt_name = {"query": "", "document": ""}, None
    same(model.encode(TEXTS, pool=pool), model.encode(TEXTS))


# --- errors


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0])
def test_bad_chunk_size(model: SentenceEncoder, pool: ProcessPool, chunk_size: Any) -> None:
    with pytest.raises(InputError, match=r"^chunk_size is "):
        model.encode(TEXTS, pool=pool, chunk_size=chunk_size)


def test_what_is_no_pool_of_this_model(
    model: SentenceEncoder, pool: ProcessPool, tiny_encoder: SentenceEncoder
) -> None:
    with pytest.raises(InputTypeError, match=r"^pool is dict"):
        model.encode(TEXTS, pool=dict(pool))
    with pytest.raises(InputError, match="copies of another model"):
        tiny_encoder.encode(TEXTS, pool=pool)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("cpu", "is one device"),
        ([], "is empty"),
        (["nonsense"], "device is 'nonsense'"),
        ([5.0], r"device is 5\.0"),
    ],
)
def test_bad_devices(model: SentenceEncoder, devices: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model.start_multi_process_pool(devices)


def test_error_of_a_worker_is_the_error_of_the_call(
    model: SentenceEncoder, pool: ProcessPool
) -> None:
    texts = ["a", "a", "the dog", "a", ("the dog " * 9, "a")]
    with pytest.raises(InputError, match=r"sentences\[4\] is a pair"):
        model.encode(texts, pool=pool, chunk_size=1, truncation="chunk")
    same(model.encode(TEXTS, pool=pool), model.encode(TEXTS))  # and the pool lives on


def test_rows_of_a_worker_error_are_those_of_the_call(tiny_encoder: SentenceEncoder) -> None:
    with torch.no_grad():
        tiny_encoder.bert.embeddings.word_embeddings.weight[8] = torch.nan  # cat
    with tiny_encoder.start_multi_process_pool(["cpu"]) as pool:
        with pytest.raises(NotFiniteError, match="the weights have NaN") as caught:
            tiny_encoder.encode(["a", "dog", "a", "a cat", "a"], pool=pool, chunk_size=2)
        assert caught.value.rows == [3]
        assert np.isfinite(tiny_encoder.encode(["a"], pool=pool)).all()


# What workers are told to do.


def _half_an_answer(_: SentenceEncoder) -> None:
    def send(connection: Any, message: Any) -> None:
        os.write(connection.fileno(), b"\x00\x00\x10\x00half")
        os._exit(1)

    multiprocessing.connection.Connection._send_bytes = send  # type: ignore[attr-defined]


def _echo(_: SentenceEncoder, size: int) -> bytes:
    return bytes(size)


def _sleep(_: SentenceEncoder, seconds: float) -> None:
    time.sleep(seconds)


class _UnsendableError(Exception):
    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def test_errors_that_cannot_be_sent_are_told() -> None:
    told = sendable(_UnsendableError("some", "thing"))
    assert isinstance(told, WorkerError)
    assert "_UnsendableError: something" in str(told)
    error = NotFiniteError([3], "why")
    assert sendable(error) is error
    for sent in (error, TruncationError("x", [1, 2]), InputError("x", "y"), WorkerError("x")):
        again = pickle.loads(pickle.dumps(sent))
        assert type(again) is type(sent)
        assert vars(again) == vars(sent)
        assert str(again) == str(sent)


# --- workers that die


def died(model: SentenceEncoder, pool: ProcessPool, texts: list[str], chunk_size: int) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"process 0 of the pool, \d+, died unexpectedly"):
        model.encode(texts, pool=pool, chunk_size=chunk_size)
    assert time.monotonic() - begin < 300  # no endless wait


def test_worker_killed_while_idle(tiny_encoder: SentenceEncoder) -> None:
    with tiny_encoder.start_multi_process_pool(["cpu"]) as pool:
        tiny_encoder.encode(TEXTS, pool=pool)
        os.kill(pool["processes"][0].pid, signal.SIGKILL)
        pool["processes"][0].join()
        died(tiny_encoder, pool, TEXTS, 1)


def test_worker_killed_in_the_middle_of_a_call(tiny_encoder: SentenceEncoder) -> None:
    texts = ["the dog bites the man"] * 100_000
    with tiny_encoder.start_multi_process_pool(["cpu"]) as pool:
        tiny_encoder.encode(TEXTS, pool=pool)
        killer = threading.Timer(0.5, os.kill, (pool["processes"][0].pid, signal.SIGKILL))
        killer.start()
        died(tiny_encoder, pool, texts, 50)
        killer.join()


def test_worker_killed_in_the_middle_of_an_answer(tiny_encoder: SentenceEncoder) -> None:
    # What it has written is half an answer, and there is nobody who would write the rest.
    with tiny_encoder.start_multi_process_pool(["cpu"]) as pool:
        jobs = [Job(0, (), "")]
        with pytest.raises(WorkerError, match=r"process 0 of the pool, .* died unexpectedly"):
            list(pool.answers(_half_an_answer, jobs))


def test_interrupted_call_leaves_a_pool_that_works(
    model: SentenceEncoder, pool: ProcessPool
) -> None:
    texts = ["the dog bites the man"] * 200_000  # for seconds
    main = threading.main_thread().ident
    assert main is not None
    heard = threading.Event()

    def interrupt() -> None:
        # Again and again: one that falls into a callback of the garbage collector, which hypothesis
        # has set, is lost.
        while not heard.wait(0.3):
            signal.pthread_kill(main, signal.SIGINT)

    def handle(*_: object) -> None:
        if not heard.is_set():
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            model.encode(texts, pool=pool, chunk_size=500)
        heard.set()
    finally:
        heard.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    same(model.encode(TEXTS, pool=pool, chunk_size=1), model.encode(TEXTS))  # no stale answers
    same(model.encode(TEXTS[:3], pool=pool), model.encode(TEXTS[:3]))


# --- the end


def test_stopping(tiny_encoder: SentenceEncoder) -> None:
    before = {process.pid for process in multiprocessing.active_children()}
    pool = tiny_encoder.start_multi_process_pool(["cpu"])
    pids = [process.pid for process in pool["processes"]]
    same(tiny_encoder.encode(TEXTS, pool=pool), tiny_encoder.encode(TEXTS))
    tiny_encoder.stop_multi_process_pool(pool)
    tiny_encoder.stop_multi_process_pool(pool)
    SentenceEncoder.stop_multi_process_pool(pool)
    with pytest.raises(WorkerError, match="the pool was stopped"):
        tiny_encoder.encode(TEXTS, pool=pool)
    assert {process.pid for process in multiprocessing.active_children()} == before
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_context_manager_stops_after_an_error(tiny_encoder: SentenceEncoder) -> None:
    with contextlib.suppress(KeyError), tiny_encoder.start_multi_process_pool(["cpu"]) as pool:
        pids = [process.pid for process in pool["processes"]]
        raise KeyError
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)
    assert pool["processes"] == []


def test_bfloat16_and_a_list_of_devices(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.bfloat16()
    before = {process.pid for process in multiprocessing.active_children()}
    every: list[dict[str, Any]] = [{}, {"convert_to_tensor": True}]
    for options in [*every, {"output_value": "token_embeddings"}]:
        expected = tiny_encoder.encode(TEXTS, **options)
        same(tiny_encoder.encode(TEXTS, device=["cpu"], **options), expected)
    assert {process.pid for process in multiprocessing.active_children()} == before


ORPHANS = """
import os, sys, time
from minilm import SentenceEncoder
if __name__ == "__main__":
    encoder = SentenceEncoder.from_pretrained(sys.argv[1], device="cpu")
    pool = encoder.start_multi_process_pool(["cpu", "cpu"])
    encoder.encode(["the dog"], pool=pool)
    print(*[process.pid for process in pool["processes"]], flush=True)
    time.sleep(3000)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"  # a zombie has ended


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_with_a_parent_that_is_killed(tiny_folder: Path) -> None:
    script = tiny_folder.parent / "orphans.py"
    script.write_text(ORPHANS, encoding="utf-8")
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tiny_folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(is_running, pids))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 300
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


# --- several at once


def test_threads_share_a_pool(model: SentenceEncoder, pool: ProcessPool) -> None:
    calls: list[list[str]] = [TEXTS[start:] * 20 for start in range(6)]
    expected = [model.encode(texts) for texts in calls]

    def call(number: int) -> Any:
        if number == 3:  # whose error is nobody else's
            bad = ["a", ("the dog " * 9, "a"), *["a"] * 38]
            with pytest.raises(InputError, match=r"sentences\[1\] is a pair"):
                model.encode(bad, pool=pool, chunk_size=2, truncation="chunk")
        return model.encode(calls[number], pool=pool, chunk_size=5)

    with ThreadPoolExecutor(6) as threads:
        for found, alone in zip(threads.map(call, range(6), timeout=600), expected, strict=True):
            same(found, alone)


def test_answers_that_nobody_takes(model: SentenceEncoder, pool: ProcessPool) -> None:
    # Each is larger than what a pipe holds.
    jobs = [Job(key, (100_000,), "") for key in range(9)]
    left = pool.answers(_echo, iter(jobs))
    assert len(next(left)[1]) == 100_000
    same(model.encode(TEXTS, pool=pool, chunk_size=1), model.encode(TEXTS))
    left.close()
    same(model.encode(TEXTS, pool=pool, chunk_size=1), model.encode(TEXTS))


def test_stopped_while_threads_wait_for_it(tiny_encoder: SentenceEncoder) -> None:
    pool = tiny_encoder.start_multi_process_pool(["cpu"])
    jobs = [Job(0, (3000.0,), "")]
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(list, pool.answers(_sleep, jobs)) for _ in range(3)]
        time.sleep(0.5)
        begin = time.monotonic()
        pool.stop()
        for call in waiting:
            with pytest.raises(WorkerError, match="the pool was stopped"):
                call.result(300)
    assert time.monotonic() - begin < 300


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_of_the_owner_has_no_pool(model: SentenceEncoder, pool: ProcessPool) -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            model.encode(["a cat"], pool=pool)
        except WorkerError as error:
            pool.stop()  # which stops nothing
            status = 0 if "of which this one is a fork" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    same(model.encode(TEXTS, pool=pool), model.encode(TEXTS))


# --- the model


def test_weights_changed_after_the_start_are_followed(tiny_encoder: SentenceEncoder) -> None:
    with tiny_encoder.start_multi_process_pool(["cpu"]) as pool:
        tiny_encoder.bert.layers[0].attention.query.weight.data[3] *= 2  # type: ignore[union-attr,operator,index]
        same(tiny_encoder.encode(TEXTS, pool=pool), tiny_encoder.encode(TEXTS))
        tiny_encoder.double()
        exact = tiny_encoder.encode(TEXTS)
        np.testing.assert_allclose(tiny_encoder.encode(TEXTS, pool=pool), exact, rtol=0, atol=1e-14)


def test_without_a_working_directory(
    tiny_encoder: SentenceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(WorkerError, match="started: the working directory is gone; change to one"):
        tiny_encoder.encode(TEXTS, device=["cpu"])


def test_a_model_that_cannot_be_sent(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.bert.register_forward_hook(lambda *_: None)
    with pytest.raises(WorkerError, match=r"the model can't be sent .*lambda"):
        tiny_encoder.encode(TEXTS, device=["cpu"])


class Fatal(SentenceEncoder):
    """Can be sent, and ends who reads it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        if multiprocessing.parent_process() is not None:
            os._exit(7)
        super().__setstate__(state)  # type: ignore[no-untyped-call]


def test_a_worker_that_dies_as_it_starts(tiny_folder: Path) -> None:
    encoder = Fatal.from_pretrained(tiny_folder, device="cpu")
    with pytest.raises(WorkerError, match=r"exit code 7\) as it started; .*`if __name__ == "):
        encoder.encode(TEXTS, device=["cpu"])


def test_a_start_that_takes_too_long(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_pool, "_START_LIMIT", 0.2)
    before = {process.pid for process in multiprocessing.active_children()}
    with pytest.raises(WorkerError, match="2 of 2 processes did not start within 0 seconds"):
        tiny_encoder.start_multi_process_pool(["cpu", "cpu"])
    assert {process.pid for process in multiprocessing.active_children()} == before


UNGUARDED = """
import resource, sys
from minilm import SentenceEncoder
encoder = SentenceEncoder.from_pretrained(sys.argv[1], device="cpu")
if "short of memory" in sys.argv:
    resource.setrlimit(resource.RLIMIT_AS, (2**20, 2**20))
encoder.encode(["the dog"], device=["cpu", "cpu"])
"""


@pytest.mark.parametrize("how", ["", "short of memory"])
def test_scripts_whose_workers_die_as_they_start(published: Path, tmp_path: Path, how: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(published), how],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert "semaphore" not in done.stderr
    # The processes write there too: the error of the script need not be the last line.
    name = "minilm.errors.WorkerError: "
    told = [line for line in done.stderr.splitlines() if line.startswith(name)]
    by_script = [line for line in told if "that is just starting" not in line]
    assert len(by_script) == 1, done.stderr
    assert 'belongs under `if __name__ == "__main__":`' in by_script[0]


def test_worker_that_imports_a_script_makes_no_semaphores(
    model: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    made: list[object] = []
    monkeypatch.setattr(process_pool, "ProcessPoolExecutor", lambda *_: made.append(0))
    with pytest.raises(WorkerError, match="belongs under `if __name__"):
        model.start_multi_process_pool(["cpu"])
    assert not made


# --- workers that are replaced: one file after the other


class Mortal(SentenceEncoder):
    """Dies of the text "poison", and of "venom" unless the file of that name is there."""

    folder = ""

    def encode(self, sentences: Any = None, *args: Any, **options: Any) -> Any:
        texts = list(sentences)
        antidote = Path(self.folder, "venom")
        dies = "poison" in texts
        if "venom" in texts and not antidote.exists():
            antidote.touch()
            dies = True
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(sentences, *args, **options)


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Mortal:
    folder = write_model_folder(tmp_path_factory.mktemp("model") / "tiny")
    encoder = Mortal.from_pretrained(folder, device="cpu")
    assert isinstance(encoder, Mortal)
    encoder.folder = str(folder)
    return encoder


@pytest.fixture(scope="module")
def workers(mortal: Mortal) -> Iterator[ProcessPool]:
    """Two, for all tests here: each takes seconds to start."""
    with mortal.start_multi_process_pool(["cpu", "cpu"]) as started:
        yield started


def jobs_of(*texts: list[Any]) -> list[Job]:
    return [Job(key, (each, OPTIONS), f"job {key}") for key, each in enumerate(texts)]


def pids_of(pool: ProcessPool) -> set[int]:
    return {process.pid for process in pool["processes"]}


def test_it_reads_one_job_ahead(workers: ProcessPool) -> None:
    taken: list[int] = []

    def counted() -> Iterator[Job]:
        for key in range(8):
            taken.append(key)
            yield Job(key, (["a cat"], OPTIONS), "")

    for done, _ in enumerate(workers.answers(embed, counted()), 1):
        # Those that are done (another may be ready too) or computed now, and one in the hand.
        assert len(taken) <= done + 1 + 2 + 1
    assert done == 8


def test_every_job_is_done_once_whoever_dies(mortal: Mortal, workers: ProcessPool) -> None:
    given: list[list[Any]] = [["the dog"], ["venom", "a cat"], ["sun ."] * 3, [5], ["out"], []]
    before = pids_of(workers)
    found = {job.key: answer for job, answer in workers.answers(embed, jobs_of(*given), 3)}
    assert len(before) == len(pids_of(workers)) == 2
    assert len(before & pids_of(workers)) == 1  # one was replaced
    assert sorted(found) == list(range(6))
    assert isinstance(found.pop(3), InputTypeError)
    for key, answer in found.items():
        assert isinstance(answer, Answer)
        expected = embed(mortal, given[key], OPTIONS)
        np.testing.assert_array_equal(answer.vectors, expected.vectors)
        assert answer.token_counts == expected.token_counts
        assert answer.kept == expected.kept


def test_a_job_that_kills_one_after_the_other_is_an_error(workers: ProcessPool) -> None:
    pids = pids_of(workers)
    jobs = jobs_of(["a cat"], ["poison"], ["the dog"])
    with pytest.raises(WorkerError, match=r"job 1: 2 processes died of it.*code -9 \(out of mem"):
        list(workers.answers(embed, jobs, 2))
    workers.stop()
    for pid in pids:  # none is left
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# --- their memory


def test_memory_is_given_back_where_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.give_back_freed_memory()
    given_back: list[int] = []
    library = SimpleNamespace(malloc_trim=given_back.append)
    monkeypatch.setattr(kernels, "_c_library", lambda: library)
    kernels.give_back_freed_memory()
    assert given_back == [0]
    monkeypatch.setattr(kernels, "_c_library", lambda: None)  # as on other systems
    kernels.give_back_freed_memory()
    assert given_back == [0]


def test_what_the_environment_says_of_kernels_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given, other = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
    monkeypatch.setenv(given, "7")
    monkeypatch.setenv(other, "7")
    monkeypatch.delenv(other)
    kernels.keep_few_kernels()
    assert (os.environ[given], os.environ[other]) == ("7", "16")

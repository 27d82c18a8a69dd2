"""Several processes compute what one does, with the same bits, and fail loudly."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import ROOT
from minilm import SentenceEncoder, TruncationWarning
from minilm.errors import (
    InputError,
    InputTypeError,
    NotFiniteError,
    TruncationError,
    WorkerError,
)
from minilm.process_pool import ProcessPool, _as_arrays, _as_tensors, sendable

TEXTS = ["the dog bites the man", "", "a cat", "the sun is out .", "man sees dog", "a", "run !"]
LONG = "the dog sees " * 9


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


def test_values_survive_the_way() -> None:
    values = [{"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(3), "c": "text", "d": 5}]
    same(_as_tensors(_as_arrays(values)), values)
    same(_as_tensors(_as_arrays(torch.ones(2, 3))), torch.ones(2, 3))


# --- workers that die


def died(model: SentenceEncoder, pool: ProcessPool, texts: list[str], chunk_size: int) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=r"process 0 of the pool, \d+, died unexpectedly"):
        model.encode(texts, pool=pool, chunk_size=chunk_size)
    assert time.monotonic() - begin < 20  # no endless wait


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
    texts = ["the dog bites the man"] * 20_000  # 2.5 MB of vectors: more than a pipe holds
    with tiny_encoder.start_multi_process_pool(["cpu"]) as pool:
        tiny_encoder.encode(TEXTS, pool=pool)
        with (
            patch("minilm.process_pool._next", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            tiny_encoder.encode(texts, pool=pool, chunk_size=20_000)
        time.sleep(1.5)  # it has computed, and waits for somebody to read
        os.kill(pool["processes"][0].pid, signal.SIGKILL)
        died(tiny_encoder, pool, TEXTS, 1)


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
    time.sleep(60)
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
    until = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


def test_jobs_that_were_left_are_not_done(model: SentenceEncoder, pool: ProcessPool) -> None:
    texts = TEXTS * 300
    with (
        patch("minilm.process_pool._next", side_effect=KeyboardInterrupt),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        with pytest.raises(KeyboardInterrupt):
            model.encode(texts, pool=pool, chunk_size=1)
    assert pool["input"].empty()
    np.testing.assert_array_equal(model.encode(TEXTS, pool=pool), model.encode(TEXTS))

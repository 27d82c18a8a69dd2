"""Processes that embed, and are replaced when they die."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import write_model_folder
from minilm import SentenceEncoder, kernels
from minilm.errors import InputTypeError, WorkerError
from minilm.workers import Answer, Job, Workers, embed

OPTIONS: dict[str, Any] = {"truncation": "silent"}


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
def workers(mortal: Mortal) -> Iterator[Workers]:
    """Two, for all tests here: each takes seconds to start."""
    with Workers(mortal, OPTIONS, 2) as started:
        yield started


def jobs(*texts: list[str]) -> Iterator[Job]:
    for key, each in enumerate(texts):
        yield Job(key, each, f"job {key}")


def by_key(answers: Iterator[tuple[Job, Any]]) -> Iterator[tuple[int, Any]]:
    return ((job.key, answer) for job, answer in answers)


def test_it_reads_one_job_ahead(workers: Workers) -> None:
    taken: list[int] = []

    def counted() -> Iterator[Job]:
        for key in range(8):
            taken.append(key)
            yield Job(key, ["a cat"], "")

    for done, _ in enumerate(workers.answers(counted()), 1):
        # Those that are done (another may be ready too) or computed now, and one in the hand.
        assert len(taken) <= done + 1 + 2 + 1
    assert done == 8


def test_every_job_is_done_once_whoever_dies(mortal: Mortal, workers: Workers) -> None:
    given: list[list[Any]] = [["the dog"], ["venom", "a cat"], ["sun ."] * 3, [5], ["out"], []]
    before = workers.pids
    found = dict(by_key(workers.answers(jobs(*given))))
    assert len(before) == len(workers.pids) == 2
    assert len(set(before) & set(workers.pids)) == 1  # one was replaced
    assert sorted(found) == list(range(6))
    assert isinstance(found.pop(3), InputTypeError)
    for key, answer in found.items():
        assert isinstance(answer, Answer)
        expected = embed(mortal, given[key], OPTIONS)
        np.testing.assert_array_equal(answer.vectors, expected.vectors)
        assert answer.token_counts == expected.token_counts
        assert answer.kept == expected.kept


def test_answers_to_a_call_that_was_left(mortal: Mortal, workers: Workers) -> None:
    left: Any = workers.answers(jobs(*[["a cat"]] * 6))
    next(left)
    left.close()
    found = dict(by_key(workers.answers(jobs(["the dog"], ["sun ."], []))))
    for key, texts in enumerate((["the dog"], ["sun ."], [])):
        np.testing.assert_array_equal(found[key].vectors, embed(mortal, texts, OPTIONS).vectors)


def test_a_job_that_kills_one_after_the_other_is_an_error(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minilm.workers._ATTEMPTS", 2)
    pids = workers.pids
    with pytest.raises(WorkerError, match=r"job 1: 2 processes died of it.*code -9 \(out of mem"):
        list(workers.answers(jobs(["a cat"], ["poison"], ["the dog"])))
    workers.stop()
    for pid in pids:  # none is left
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_memory_is_given_back_where_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.give_back_freed_memory()
    monkeypatch.setattr(kernels, "_c_library", lambda: None)  # as on other systems
    kernels.give_back_freed_memory()


def test_what_the_environment_says_of_kernels_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    given, other = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"
    monkeypatch.setenv(given, "7")
    monkeypatch.setenv(other, "7")
    monkeypatch.delenv(other)
    kernels.keep_few_kernels()
    assert (os.environ[given], os.environ[other]) == ("7", "16")

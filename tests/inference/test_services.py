"""Where services put an encoder: in forks, threads, workers, and under Ctrl-C."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from conftest import ROOT
from minilm import SentenceEncoder
from minilm.forks import Lock, unforked

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

TEXTS = ["the dog bites the man", "", "a cat", "the sun is out . " * 3]


def run_python(code: str, *arguments: str, timeout: float = 600) -> str:
    """What a program prints that runs in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# fork


FORKED = """
import os, sys, warnings
import numpy as np, torch
from minilm import SentenceEncoder
warnings.simplefilter("ignore")
torch.set_num_threads(2)
encoder = SentenceEncoder.from_pretrained(sys.argv[1], device="cpu")
texts = ["the dog bites the man", "", "a cat"] * int(sys.argv[2])  # enough for all threads
before = encoder.encode(texts)
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        same = np.array_equal(encoder.encode(texts), before) or np.abs(
            encoder.encode(texts) - before).max() < 1e-6
        os._exit(0 if same and torch.get_num_threads() == 1 else 1)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
print(torch.get_num_threads(), np.array_equal(encoder.encode(texts), before))
"""


@pytest.mark.process
@needs_fork
def test_fork_after_use_works_in_the_child(tiny_folder: Path) -> None:
    assert run_python(FORKED, str(tiny_folder), "200").split("\n")[:2] == ["[0, 0, 0]", "2 True"]


@pytest.mark.process
@needs_fork
def test_fork_after_use_of_the_published_model(published: Path) -> None:
    assert run_python(FORKED, str(published), "20").split("\n")[:2] == ["[0, 0, 0]", "2 True"]


@pytest.mark.process
@needs_fork
def test_fork_before_use_keeps_the_threads(tiny_folder: Path) -> None:
    # A server that loads, forks its workers and only then serves: they may use their cores.
    code = """
import os, sys, torch
from minilm import SentenceEncoder
torch.set_num_threads(2)
encoder = SentenceEncoder.from_pretrained(sys.argv[1], device="cpu")
if not os.fork():
    assert encoder.encode("the dog").shape == (32,)
    os._exit(0 if torch.get_num_threads() == 2 else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert run_python(code, str(tiny_folder)) == "0\n"


# After each of these a child has ended: it has tokenized, computed and loaded.
ROUTES = """
import os, signal, sys, threading, time, warnings
import torch
from minilm import SentenceEncoder
warnings.simplefilter("ignore")
torch.set_num_threads(2)
texts = ["the dog bites the man", "", "a cat"] * 100

def child(*does):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            for do in does:
                do()
            status = 0
        finally:
            os._exit(status)
    until = time.monotonic() + 300
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "waits for ever"

def load():
    return SentenceEncoder.from_pretrained(sys.argv[1], device="cpu")

def compute():
    torch.ones(10**6).exp()  # in all threads

def embed():
    encoder.encode(texts)
    compute()

def nested():
    embed()
    assert child(embed) == 0

def told(route, *does):
    print(route, child(*does), flush=True)

encoder = load()
told("loaded", embed)
encoder.token_counts(texts)
told("tokenized", embed, lambda: load().encode(texts))
compute()
told("computed", embed, nested)
with encoder.start_multi_process_pool(["cpu"]) as pool:
    encoder.encode(texts, pool=pool)
    told("has a pool", embed)
told("had a pool", nested)
encoder.encode(texts)
told("embedded", nested)
thread = threading.Thread(target=embed)
thread.start()
told("embeds", embed, nested)
thread.join()
"""


@pytest.mark.process
@needs_fork
@pytest.mark.parametrize("parallelism", ["true", "false", None])
def test_a_forked_child_never_waits_for_threads_of_its_parent(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, parallelism: str | None
) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    if parallelism is not None:
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallelism)
    found = run_python(ROUTES, str(tiny_folder), timeout=3000).splitlines()
    routes = ["loaded", "tokenized", "computed", "has a pool", "had a pool", "embedded", "embeds"]
    assert found == [f"{route} 0" for route in routes]


@pytest.mark.process
@needs_fork
def test_locks_are_free_in_a_forked_child() -> None:
    lock = Lock()
    with lock:
        child = os.fork()
        if not child:
            os._exit(0 if lock.acquire(timeout=60) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.process
@needs_fork
def test_fork_waits_for_a_layer_of_another_thread_and_holds_up_the_next() -> None:
    happened = []
    inside, ends, forked = threading.Event(), threading.Event(), threading.Event()

    def compute() -> None:
        inside.set()
        ends.wait(60)
        time.sleep(0.3)
        happened.append("layer")

    def then() -> None:
        unforked(compute)
        unforked(lambda: happened.append("after the fork" if forked.is_set() else "too early"))

    thread = threading.Thread(target=then)
    thread.start()
    assert inside.wait(60)
    ends.set()
    child = unforked(os.fork)  # its own layer is no reason to wait
    if not child:
        os._exit(0 if unforked(lambda: True) else 1)
    forked.set()
    happened.append("fork")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join(60)
    assert happened[:2] == ["layer", "fork"]
    assert len(happened) == 3


# With few kernels they are made and dropped all the time, under a lock of oneDNN's.
FORKED_AMONG_THREADS = """
import os, random, signal, sys, threading, time
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = os.environ["LRU_CACHE_CAPACITY"] = "16"
from minilm import SentenceEncoder
encoder = SentenceEncoder.from_pretrained(sys.argv[1], device="cpu")

def embed():
    while not stop.is_set():
        encoder.encode(["the dog " * random.randint(1, 100)] * random.randint(1, 3))

stop = threading.Event()
threads = [threading.Thread(target=embed) for _ in range(6)]
for thread in threads:
    thread.start()
try:
    for _ in range(25):
        child = os.fork()
        if not child:
            os._exit(int(encoder.encode("the cat").shape != (384,)))
        for _ in range(6000):
            if (ended := os.waitpid(child, os.WNOHANG))[0]:
                break
            time.sleep(0.01)
        else:
            os.kill(child, signal.SIGKILL)
            sys.exit("waits for ever")
        assert ended[1] == 0
finally:
    stop.set()
    for thread in threads:
        thread.join()
print("all ended")
"""


@pytest.mark.process
@needs_fork
def test_children_forked_while_threads_embed(published: Path) -> None:
    assert run_python(FORKED_AMONG_THREADS, str(published)) == "all ended\n"


# spawn, DataLoader workers


def _embed_in_worker(encoder: SentenceEncoder, texts: list[str], answers: Any) -> None:
    answers.put(encoder.encode(texts))


@pytest.mark.process
def test_spawned_process_gets_a_copy(tiny_encoder: SentenceEncoder) -> None:
    context = torch.multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    texts = TEXTS[:3]
    process = context.Process(target=_embed_in_worker, args=(tiny_encoder, texts, answers))
    process.start()
    np.testing.assert_allclose(answers.get(), tiny_encoder.encode(texts), rtol=0, atol=1e-6)
    process.join(300)
    assert process.exitcode == 0


class Embedded(torch.utils.data.Dataset[Any]):
    """Embeds in the workers of a DataLoader."""

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.encoder = encoder

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.encoder.encode(TEXTS[index % 3], convert_to_tensor=True)


@pytest.mark.process
@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers(tiny_encoder: SentenceEncoder, method: str) -> None:
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    expected = tiny_encoder.encode([TEXTS[index % 3] for index in range(8)])
    loader = torch.utils.data.DataLoader(
        Embedded(tiny_encoder), batch_size=2, num_workers=2, multiprocessing_context=method
    )
    np.testing.assert_allclose(torch.cat(list(loader)), expected, rtol=0, atol=1e-6)


# threads


@pytest.mark.slow
def test_eight_threads_get_the_bits_of_one(tiny_encoder: SentenceEncoder) -> None:
    pick = random.Random(0)
    words = ["the", "dog", "cat", "sees", "sun", "walking", ".", "café"]
    calls = [
        (
            [
                " ".join(pick.choices(words, k=pick.randint(0, 4)))
                for _ in range(pick.randint(1, 5))
            ],
            pick.choice([None, "the ", "a cat "]),
        )
        for _ in range(500)
    ]
    expected = [tiny_encoder.encode(texts, prompt=prompt) for texts, prompt in calls]

    def all_calls(start: int) -> bool:
        order = [*range(start, len(calls)), *range(start)]
        return all(
            np.array_equal(tiny_encoder.encode(calls[i][0], prompt=calls[i][1]), expected[i])
            for i in order
        )

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(all_calls, range(0, 480, 60)))


# no global state


@pytest.fixture
def state() -> Callable[[], dict[str, Any]]:
    def look() -> dict[str, Any]:
        import logging

        return {
            "torch random": torch.random.get_rng_state().tolist(),
            "random": random.getstate(),
            "numpy random": np.random.get_state()[1].tolist(),  # type: ignore[index]  # noqa: NPY002
            "default dtype": torch.get_default_dtype(),
            "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
            "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "matmul": torch.get_float32_matmul_precision(),
            "environment": dict(os.environ),
            "filters": list(warnings.filters),
            "handlers": list(logging.getLogger().handlers),
            "our handlers": list(logging.getLogger("minilm").handlers),
            "level": logging.getLogger("minilm").level,
            "signal": signal.getsignal(signal.SIGINT),
            "threads alive": threading.active_count(),
        }

    return look


def test_encode_changes_no_global_state(
    tiny_encoder: SentenceEncoder, tiny_folder: Path, state: Any
) -> None:
    before = state()
    all_options: list[dict[str, Any]] = [
        {},
        {"precision": "binary"},
        {"output_value": "token_embeddings"},
        {"output_value": None},
        {"truncation": "chunk"},
        {"normalize_embeddings": True, "truncate_dim": 8},
    ]
    for options in all_options:
        tiny_encoder.encode(TEXTS[:3], **options)
    SentenceEncoder.from_pretrained(tiny_folder, device="cpu").encode(TEXTS[:3])
    after = state()
    assert after == before


# Ctrl-C


INTERRUPTED = """
import os, signal, sys, threading, time, warnings
import numpy as np
from minilm import SentenceEncoder
warnings.simplefilter("ignore")
encoder = SentenceEncoder.from_pretrained(sys.argv[1], device="cpu")
texts = [sys.argv[3]] * int(sys.argv[2])
few = ["the dog bites the man", "", "a cat"]
expected = encoder.encode(few)
encoder.encode(texts[:20])
sent = []

def interrupt():
    time.sleep(float(sys.argv[4]))
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt).start()
try:
    encoder.encode(texts)
    print("was not interrupted")
except KeyboardInterrupt:
    print(time.perf_counter() - sent[0])
print(np.array_equal(encoder.encode(few), expected), encoder.training)
"""


@pytest.mark.process
@pytest.mark.parametrize("after", [0.05, 0.6, 2.0])
def test_interrupt_is_heard_soon_and_leaves_no_trace(published: Path, after: float) -> None:
    # 0.05 s: while the texts are tokenized; later: between two products.
    out = run_python(
        INTERRUPTED, str(published), "50000", "the weather is lovely " * 20, str(after)
    )
    waited, rest = out.split("\n")[:2]
    assert rest == "True False"
    # A tenth of a second on a quiet machine; no timing is asserted, but that it is not the end,
    # which is minutes away.
    assert float(waited) < 30


@pytest.mark.process
def test_an_interrupt_ends_an_encode_in_a_pool(tiny_folder: Path) -> None:
    code = """
import os, signal, sys, threading, time
import numpy as np
from minilm import SentenceEncoder

if __name__ == "__main__":
    encoder = SentenceEncoder.from_pretrained(sys.argv[1], device="cpu")
    texts = ["the dog", "a cat", ""] * 5000
    with encoder.start_multi_process_pool(["cpu"] * 2) as pool:
        encoder.encode(texts[:6], pool=pool)
        try:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            encoder.encode(texts, pool=pool, chunk_size=3)
            print("was not interrupted")
        except KeyboardInterrupt:
            print("interrupted")
        again = encoder.encode(texts[:6], pool=pool)
        print(np.abs(again - encoder.encode(texts[:6])).max() < 1e-6)
    print(len(pool["processes"]))
"""
    script = tiny_folder.parent / "script.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "interrupted\nTrue\n0\n", done.stderr

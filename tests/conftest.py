"""Models for the tests, and what a test needs.

There is a tiny seeded model that needs no file, the published one, and the reference. Most tests
use the tiny one. Tests of the published weights are skipped where `weights/all-MiniLM-L6-v2` is
absent (`scripts/fetch_weights` puts it there).

A test that needs more than the tiny model and this process has a mark that says what; the marks
are listed in pyproject.toml. `scripts/test --quick` runs the tests without any.
"""

import contextlib
import fcntl
import io
import json
import multiprocessing.process
import os
import resource
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import results
from minilm import BertConfig, BertModel, MeanPooling, Normalize, SentenceEncoder, cli
from minilm.inference import kernels
from minilm.pretrained import options
from minilm.pretrained.checkpoint import published_name
from minilm.pretrained.hub import SHA256, WEIGHTS_FOLDER
from minilm.tasks.search import Scores
from minilm.tokenizer import WordPieceTokenizer

# Nothing here may reach the network; the tests of hub.py bring their own server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A program that a shell starts in the background ignores Ctrl-C, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
SHARED = ROOT.parent / "shared" / "data"

# Lesser processors, with other numbers of threads.
LESSER = {
    "avx2": results.LESSER["avx2"] | {"OMP_NUM_THREADS": "2"},
    "sse4": results.LESSER["sse4"] | {"OMP_NUM_THREADS": "1"},
}

# A fixture, and the marks of a test that uses it, directly or through another fixture.
MARKS_OF_FIXTURES = {
    "published": ["published"],
    "reference": ["reference", "published"],
    "browser": ["browser"],
    "small": ["slow"],  # the model of tests/parity/test_causes.py
}
# How a program starts another process, in the terms of Python's audit events. A `Process` of
# `multiprocessing` raises none, so that its `start` is watched as well.
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}

started: list[str] = []


def note_start(event: str, arguments: tuple[Any, ...]) -> None:
    """Note a process; but not how scikit-learn's joblib counts cores, once in a run."""
    if event in STARTS and "lscpu" not in str(arguments[:2]):
        started.append(event)


sys.addaudithook(note_start)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="all texts, where else a choice of them is compared"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add the marks that follow from the fixtures of a test, and skip what is marked `full`."""
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: scripts/test --full"))
        for fixture, marks in MARKS_OF_FIXTURES.items():
            if fixture in getattr(item, "fixturenames", ()):
                for mark in marks:
                    item.add_marker(mark)


@pytest.fixture(scope="session", autouse=True)
def processes_are_noted() -> Iterator[None]:
    """A process that `multiprocessing` starts is noted in `started`, as all others are."""
    start = multiprocessing.process.BaseProcess.start

    def noted(self: multiprocessing.process.BaseProcess) -> None:
        started.append(f"multiprocessing: {type(self).__name__}")
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", noted)
        yield


@pytest.fixture(autouse=True)
def only_a_marked_test_starts_a_process(
    request: pytest.FixtureRequest, processes_are_noted: None
) -> Iterator[None]:
    """A test that starts a process, and isn't marked so, fails.

    What the libraries of the reference start as they are imported is their own affair.
    """
    marks = ("process", "browser", "reference")
    is_marked = any(request.node.get_closest_marker(mark) for mark in marks)
    started.clear()
    yield
    if started and not is_marked:
        pytest.fail(f"starts a process ({started[0]}); mark it with pytest.mark.process")


@pytest.fixture(scope="session", autouse=True)
def processor_has_all_products() -> Iterator[None]:
    """A model loaded in bfloat16 or float16 is in that, also where the processor has no such
    products and a user would get float32; tests/pretrained/test_options.py is about those.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "has_products", lambda dtype: True)
        yield


TINY = BertConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=24,
)

TINY_WORDS = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "dog", "cat", "man", "bites", "sees",
    "sun", "is", "out", "walk", "##s", "##ing", "run", "cafe", ".", ",", "!", "?",
]  # fmt: skip


def needs(module: str, adapter: str) -> Any:
    """A framework, imported; where it is not installed, the test file or test that asks is skipped.

    Its own warnings at import are not ours, and are ignored.
    """
    return pytest.importorskip(module, reason=f"needs {module}; run scripts/test_adapter {adapter}")


def tiny_tokenizer_json() -> dict[str, Any]:
    """A WordPiece tokenizer of 23 words, in the form of the published file."""
    special = [
        {"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, t in enumerate(TINY_WORDS[:5])
    ]  # fmt: skip
    template = [
        {"SpecialToken": {"id": "[CLS]", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "[SEP]", "type_id": 0}},
    ]
    return {
        "version": "1.0",
        "truncation": {
            "max_length": 8,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        },
        "padding": {
            "strategy": {"Fixed": 8},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": special,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template,
            "special_tokens": {
                t: {"id": t, "ids": [TINY_WORDS.index(t)], "tokens": [t]}
                for t in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {word: i for i, word in enumerate(TINY_WORDS)},
        },
    }


def seeded_bert(config: BertConfig = TINY, seed: int = 0) -> BertModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(config).eval()


def write_model_folder(folder: Path, config: BertConfig = TINY, seed: int = 0) -> Path:
    """A complete model folder in the sentence-transformers format, with seeded weights."""
    (folder / "1_Pooling").mkdir(parents=True)
    stages = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    contents: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(stages)
        ],
        "config.json": {
            **{name: getattr(config, name) for name in BertConfig.__dataclass_fields__},
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
        },
        "sentence_bert_config.json": {"max_seq_length": 12, "do_lower_case": False},
        "tokenizer_config.json": {"do_lower_case": True, "model_max_length": 512},
        "tokenizer.json": tiny_tokenizer_json(),
        "1_Pooling/config.json": {
            "word_embedding_dimension": config.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
    }
    for name, value in contents.items():
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    state = seeded_bert(config, seed).state_dict()
    tensors = {published_name(name): tensor.contiguous() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return folder


def load(path: Path, **options: Any) -> Any:
    """The model of a folder, on the processor."""
    return SentenceEncoder.from_pretrained(path, device="cpu", **options)


def compose(*modules: nn.Module, **options: Any) -> Any:
    """A model of these modules, by default the tiny one, with its tokenizer and limit."""
    tokenizer = WordPieceTokenizer(json.dumps(tiny_tokenizer_json()))
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_seq_length": 12} | options
    stages = modules or (seeded_bert(), MeanPooling(), Normalize())
    return SentenceEncoder(modules=stages, **settings)


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON object in a file; a value of `...` deletes the field."""
    values = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in values.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


@dataclass(frozen=True)
class Done:
    """What a command line left: its exit code, and the bytes of its two outputs."""

    returncode: int
    stdout: bytes
    stderr: bytes


def minilm(
    *arguments: str | Path,
    stdin: str | bytes = "",
    cwd: Path | None = None,
    encoding: str = "utf-8",
) -> Done:
    """Run the command `minilm` in this process, with streams, filters of warnings and a folder of
    its own, as a new process would have them.
    """
    data = stdin.encode() if isinstance(stdin, str) else stdin
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        buffers = {"stdin": io.BytesIO(data), "stdout": io.BytesIO(), "stderr": io.BytesIO()}
        for name, buffer in buffers.items():
            patch.setattr(sys, name, io.TextIOWrapper(buffer, encoding=encoding))
        try:
            with contextlib.chdir(cwd or "."):
                code: Any = cli.main([str(word) for word in arguments])
        except SystemExit as stop:  # argparse: wrong usage, --help, --version
            code = stop.code
        finally:
            torch.set_num_threads(threads)
        assert code is None or isinstance(code, int)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        return Done(code or 0, buffers["stdout"].getvalue(), buffers["stderr"].getvalue())


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A model folder that a test may damage."""
    return write_model_folder(tmp_path / "tiny")


@pytest.fixture
def tiny_encoder() -> SentenceEncoder:
    """The tiny model, composed from modules, with a tokenizer and a limit of 12 tokens."""
    encoder: SentenceEncoder = compose()
    return encoder


@pytest.fixture
def flat_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that grows by one with each call of a flat layer."""
    calls: list[Any] = []
    real = kernels._FlatLayer.__call__

    def noted(self: Any, hidden_states: Tensor, attend: Any) -> Tensor:
        calls.append(self)
        return real(self, hidden_states, attend)

    monkeypatch.setattr(kernels._FlatLayer, "__call__", noted)
    return calls


@pytest.fixture(scope="session")
def is_full(request: pytest.FixtureRequest) -> bool:
    """Whether all texts are to be compared, as before a release."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def published() -> Path:
    """The folder with the published files."""
    folder = ROOT / WEIGHTS_FOLDER
    missing = [name for name in SHA256 if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"{folder} lacks {missing[0]}; run scripts/fetch_weights")
    return folder


@pytest.fixture(scope="session")
def encoder(published: Path) -> SentenceEncoder:
    """The published model in float32. Shared: a test must not change it."""
    return SentenceEncoder.from_pretrained(published, device="cpu")


@pytest.fixture(scope="session")
def written(
    encoder: SentenceEncoder, published: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """Files with vectors in all forms: `written.Written`."""
    from written import write

    return write(encoder, published, tmp_path_factory.mktemp("written"))


@pytest.fixture(scope="session")
def encoder64(published: Path) -> SentenceEncoder:
    """The published model in float64. Shared: a test must not change it."""
    return SentenceEncoder.from_pretrained(published, device="cpu", dtype="float64")


@pytest.fixture(scope="session")
def reference(published: Path) -> Any:
    """The reference library's model in float32, a `SentenceTransformer`."""
    from reference import is_installed, load_reference  # scripts/reference.py

    if not is_installed():
        pytest.skip("needs the reference: pip install 'minilm[reference]'")
    return load_reference(published, torch.float32).model


@pytest.fixture
def small_files() -> None:
    """No file may grow beyond 20 kB, as on a full disk: see `pytest_runtest_call`."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Set the limit of `small_files` for the test alone: pytest's own output may be longer."""
    if "small_files" not in getattr(item, "fixturenames", ()):
        return (yield)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        return (yield)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def another_process(folder: Path, name: str = "lock") -> Iterator[None]:
    """What another process does that holds a folder; a lock of the system goes with the file that
    was opened, not with the process.
    """
    with (folder / name).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        (folder / name).unlink()


@pytest.fixture
def block_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many scores each block of them has that the tasks compute from here on."""
    sizes: list[int] = []
    block = Scores.block

    def counted(self: Scores, *arguments: Any) -> torch.Tensor:
        scores = block(self, *arguments)
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr(Scores, "block", counted)
    return sizes

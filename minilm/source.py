"""The files of one model, and the SHA-256 of what was read of them.

`pretrained/hub.py` finds them, `pretrained/folder.py` reads them, and an encoder keeps them as its
`source`, which says where its weights came from.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from minilm.errors import ConfigError, HashMismatchError

__all__ = ["ModelFiles", "verified"]


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
    """

    name: str
    location: str
    folder: Path
    pinned: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    revision: str | None = None

    def find(self, name: str) -> Path | None:
        """The path of a file, or None if the model has no such file.

        A link that leads nowhere is a `ConfigError`: the model had the file, and it is lost.
        """
        path = self.path(name)
        if path.is_symlink() and not path.exists():
            raise ConfigError(path, ["is a link that leads nowhere; fetch the model again"])
        return path if path.is_file() else None

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
            HashMismatchError: The file is pinned and differs from the published one.
        """
        if data is not None:
            expected = self.pinned.get(name, "no such file") if self.pinned else None
            self.sha256[name] = verified(data, expected, self.path(name))


def verified(data: bytes, expected: str | None, path: Path) -> str:
    """The SHA-256 of `data`, read from `path`; an error if another one is expected."""
    actual = hashlib.sha256(data).hexdigest()
    if expected is not None and actual != expected:
        raise HashMismatchError(path, expected, actual)
    return actual

"""What stays when the power fails, by the order of the system calls.

A disk may write in any order what is not waited for. So before a name is given, the contents must
have been waited for; and before a name that refers to others (index.json), theirs.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT, load, write_model_folder
from minilm.files.streaming import encode_files
from minilm.files.tables import Table, write_table
from minilm.index import Index

Event = tuple[str, ...]  # what was called, and its paths

# Names that refer to other files of their folder.
REFERRING = {
    "index.json", "modules.json", "_manifest.json", "parts.manifest.json",
    "out.npy.fingerprint.json",
}  # fmt: skip
_PASSING = re.compile(r"\..*\.part|.*lock")  # what an interrupted call may leave


# --- what is done


def save(folder: Path) -> None:
    encoder = load(write_model_folder(folder.parent / "model"))
    encoder.save_pretrained(folder / "new" / "saved")
    encoder.save_pretrained(folder / "new" / "saved")  # over it


def index(folder: Path) -> None:
    made = Index.create(folder / "index", None, [(np.eye(4, dtype=np.float32), list("abcd"))])
    made.add(np.eye(4, dtype=np.float32), list("efgh"), fingerprint=None)  # both become one


def shards(folder: Path) -> None:
    encoder = load(write_model_folder(folder.parent / "model"))
    texts, output = folder.parent / "in.txt", folder / "out" / "parts"
    texts.write_text("the dog\na cat\nthe man\n")
    for prompt in (None, "the"):  # the second run removes the first
        encode_files(encoder, texts, output, shard_rows=2, prompt=prompt, overwrite=True)


def file(folder: Path) -> None:
    for _ in range(2):
        rows = Table(["a", "b"], [{"text": "a"}, {"text": "b"}])
        write_table(folder / "out.npy", rows, np.eye(2, dtype=np.float32))


def file_and_record(folder: Path) -> None:
    for record in ('{"model": "a"}', '{"model": "b"}'):
        rows = Table(["a", "b"], [{"text": "a"}, {"text": "b"}])
        write_table(folder / "out.npy", rows, np.eye(2, dtype=np.float32), record)


ACTIONS: dict[str, Callable[[Path], None]] = {
    "save": save, "index": index, "shards": shards, "file": file,
    "file_and_record": file_and_record,
}  # fmt: skip


# --- what the system sees of it


class Recorder:
    """Lists what this process asks the system for, below a folder, from Python's audit events."""

    current: "Recorder | None" = None

    def __init__(self, folder: Path) -> None:
        self.folder, self.events = folder, list[Event]()

    def note(self, event: str, *paths: Any) -> None:
        found = [os.path.abspath(os.fspath(path)) for path in paths]  # noqa: PTH100
        if all(f"{path}/".startswith(f"{self.folder}/") for path in found):
            self.events.append((event, *found))


def hear(event: str, arguments: tuple[Any, ...]) -> None:
    recorder = Recorder.current
    if recorder is None:
        return
    if event == "open" and isinstance(arguments[0], str | os.PathLike):
        if arguments[2] & (os.O_WRONLY | os.O_RDWR):
            recorder.note("write", arguments[0])
    elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link"):
        paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
        if os.path.lexists(paths[0]) != (event == "os.mkdir"):  # else the call will fail
            recorder.note(event.removeprefix("os."), *paths)


@contextmanager
def recorded(folder: Path) -> Iterator[list[Event]]:
    recorder, fsync = Recorder(folder), os.fsync

    def watch(descriptor: int) -> None:
        fsync(descriptor)
        recorder.note("sync", os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", watch)
        patch.setattr(Recorder, "current", recorder)
        yield recorder.events


sys.addaudithook(hear)

_TRACED = (
    "openat,write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,"
    "unlink,unlinkat,rmdir,link,linkat"
)


def traced(action: str, folder: Path) -> list[Event]:
    """The same from the kernel's side, by strace."""
    log = folder.parent / "strace.txt"
    code = (
        f"import test_power, pathlib; test_power.ACTIONS[{action!r}](pathlib.Path({str(folder)!r}))"
    )
    command = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={_TRACED}", "-o", str(log)]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "scripts")))
    done = subprocess.run(
        [*command, sys.executable, "-c", code, action, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    if not log.exists() or "ptrace" in done.stderr.lower():
        pytest.skip(f"strace can't be used here: {done.stderr.strip()[:80]}")
    assert done.returncode == 0, done.stderr
    return list(_parsed(log.read_text(errors="replace").splitlines(), folder))


def _parsed(lines: list[str], folder: Path) -> Iterator[Event]:
    recorder = Recorder(folder)
    begun: dict[str, str] = {}  # by thread, what another one came between
    for line in lines:
        thread, _, text = line.partition(" ")
        text = re.sub(r"^<\.\.\. \w+ resumed>", lambda _: begun.pop(thread, ""), text.strip())  # noqa: B023
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>")
            continue
        match = re.match(r"(\w+)\((.*)\) += \d+", text)
        if match is None:  # an error
            continue
        call, arguments = match.groups()
        opened = re.match(r"\d+<([^>]*)>", arguments)
        named = re.findall(r'"([^"]*)"', arguments)
        start = re.match(r"(?:AT_FDCWD|\d+)<([^>]*)>", arguments)  # what relative paths start at
        named = [os.path.join(start[1] if start else "", name) for name in named]  # noqa: PTH118
        if call == "openat":
            if "O_CREAT" in arguments:
                recorder.note("write", named[0])
        elif call in ("write", "pwrite64", "ftruncate"):
            recorder.note("write", opened[1] if opened else "")
        elif call in ("fsync", "fdatasync"):
            recorder.note("sync", opened[1] if opened else "")
        else:
            kind = "remove" if call.startswith("unlink") else re.sub("at2?$", "", call)
            recorder.note("rmdir" if "AT_REMOVEDIR" in arguments else kind, *named)
    yield from recorder.events


# --- what may be asked of it


def check(events: list[Event]) -> None:
    """Fail at the first call after which a power cut could leave what was never meant."""
    unsynced: set[str] = set()  # files whose contents may not be on the disk
    pending: set[str] = set()  # new names, or removed ones, that may not be
    known: set[str] = set()  # what is there

    def visible(paths: set[str]) -> set[str]:
        return {p for p in paths if not any(map(_PASSING.fullmatch, Path(p).parts))}

    for number, (event, *paths) in enumerate(events):
        path, place = paths[-1], f"call {number}: {event} {' '.join(paths)}"
        if event == "sync":
            unsynced.discard(path)
            pending -= {each for each in pending if os.path.dirname(each) == path}  # noqa: PTH120
        elif event == "write":
            unsynced.add(path)
            if path not in known:
                pending.add(path)
        elif event in ("mkdir", "link"):
            pending.add(path)
        elif event == "rename":
            inside = {each for each in unsynced | pending if each.startswith(f"{paths[0]}/")}
            assert not inside, f"{place}, and {inside} may not be on the disk"
            assert paths[0] not in unsynced, f"{place}, and its contents may not be on the disk"
            record = f"{path}.fingerprint.json"
            assert record not in known | pending, f"{place}, and the record may be of the old one"
            if Path(path).name in REFERRING:
                others = visible({p for p in pending if Path(p).parent == Path(path).parent})
                assert not others, f"{place}, and it refers to {others}"
            pending = {each for each in pending if each != paths[0]} | {path}
        elif event in ("remove", "rmdir"):
            unsynced.discard(path)
            pending.discard(path)
            known.discard(path)
            if visible({path}):
                new = {p for p in visible(pending) if Path(p).name in REFERRING}
                assert not new, f"{place}, while {new} may still be the old one"
                pending.add(path)
        if event in ("write", "mkdir", "link", "rename"):
            known = (known - {paths[0]}) | {path}
    assert not visible(unsynced), "contents that may not be on the disk"
    assert not {p for p in visible(pending) if os.path.lexists(p)}, "names that may not be"


@pytest.mark.parametrize("action", list(ACTIONS))
def test_the_order_of_calls(action: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    with recorded(folder) as events:
        ACTIONS[action](folder)
    assert {"write", "rename", "sync"} <= {event for event, *_ in events}
    check(events)
    for of_folders in (True, False):  # each kind of waiting is needed
        kept = [e for e in events if e[0] != "sync" or os.path.isdir(e[1]) != of_folders]  # noqa: PTH112
        with pytest.raises(AssertionError):
            check(kept)


@pytest.mark.process
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("action", list(ACTIONS))
def test_the_order_of_calls_as_the_kernel_sees_it(action: str, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    events = traced(action, folder)
    assert {"write", "rename", "sync"} <= {event for event, *_ in events}
    check(events)

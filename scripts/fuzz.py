"""Damage every kind of file that this package reads, and see what it makes of it.

    python scripts/fuzz.py MINUTES [--target NAME] [--corpus FOLDER] [--markdown FOLDER]
    python scripts/fuzz.py --replay TARGET CHOICES

One try: good files are written, one of them is damaged (`damage.py`), the package reads them
(`fuzz_targets.py`). It is

right       if the result is that of the whole files,
as written  if it is another that the damaged file says in so many words,
named       if an error of `minilm.errors` names the file,
silent      if the result is a third one,
crashed     if there is any other exception, an error that names no file, or the process dies,
hung        if it takes more than 5 s of a processor, or 30 s,

and never should it open what lies outside the folder. Each process has 1 GB to do it in. Where
atheris is installed (`pip install atheris`), it steers to lines of code that were not yet reached,
and keeps the choices that led there in the corpus; else choices are drawn, and those kept that gave
a new kind of answer. Damaged files are kept nowhere: choices make them anew.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]  # a bare checkout is enough

import results  # noqa: E402
from damage import OUTSIDE, Choices, damaged  # noqa: E402

if TYPE_CHECKING:
    from fuzz_targets import Target

OUTCOMES = ("right", "as written", "named", "silent", "crashed", "hung")
BAD = OUTCOMES[3:]
SLOW, HANG = 5.0, 30.0  # seconds of a processor; seconds
MEMORY = 2**30  # bytes beyond what is in use when the first try begins
SLOT = 100.0  # seconds for a target at a time
LONGEST = 96  # bytes of choices
DONE = "done"  # in place of choices, once a process is at its end
PACKAGES = ("torch", "safetensors", "tokenizers", "numpy", "pyarrow", "atheris")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("minutes", type=float, nargs="?")
    parser.add_argument("--target", action="append", metavar="NAME", help="by default all")
    parser.add_argument("--corpus", type=Path, metavar="FOLDER", help="to go on with next time")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "CHOICES"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FOLDER",
        help="also write fuzz.md and reliability.md there",
    )
    options = parser.parse_args(arguments)
    if options.child:
        name, seconds, folder = options.child
        return _work(name, float(seconds), Path(folder))
    if options.replay:
        return _replay(*options.replay)
    if options.minutes is None:
        parser.error("argument MINUTES: is missing")
    with contextlib.ExitStack() as stack:
        folder = options.corpus or stack.enter_context(tempfile.TemporaryDirectory())
        tallies, finds = _fuzz(options, Path(folder))
    table, found = _table(tallies), _listed(finds)
    print(f"{table}\n\n{found}")
    if options.markdown:
        cases = sum(tally[each] for tally in tallies.values() for each in OUTCOMES)
        about = f"{cases:,} damaged files of {len(tallies)} kinds. {_versions()}"
        body = f"{about}\n\n{found}"
        results.write(options.markdown / "fuzz.md", "Damaged files: what was found", body)
        about = __doc__.partition("One try: ")[2].partition("Where\natheris")[0]
        results.write(options.markdown / "reliability.md", "Damaged files: what becomes of them",
                      f"{table}\n\n{_legend(about)}")  # fmt: skip
    return int(any(tally[each] for tally in tallies.values() for each in BAD))


# --- the process that watches


def _fuzz(
    options: argparse.Namespace, folder: Path
) -> tuple[dict[str, Counter[str]], dict[str, dict[str, Any]]]:
    """Give each target its share of the time; return what became of the tries, and the finds."""
    names = options.target or _names()
    tallies: dict[str, Counter[str]] = {name: Counter() for name in names}
    finds: dict[str, dict[str, Any]] = {}
    share = 60 * options.minutes / len(names)  # without the seconds in which processes start
    rounds = max(1, round(share / SLOT))
    for _ in range(rounds):
        for name in names:
            _watch(name, share / rounds, folder, tallies[name], finds)
    return tallies, finds


def _names() -> list[str]:
    command = [sys.executable, __file__, "--child", "", "0", ""]
    listed = subprocess.run(command, check=True, capture_output=True, text=True)
    return listed.stdout.splitlines()


def _watch(
    name: str,
    seconds: float,
    folder: Path,
    tally: Counter[str],
    finds: dict[str, dict[str, Any]],
) -> None:
    """Run a process of tries; kill it if one of them hangs."""
    state = folder / re.sub(r"\W+", "-", name)
    (state / "corpus").mkdir(parents=True, exist_ok=True)
    log, current, found = state / "log", state / "current", state / "finds.jsonl"
    for path in (log, current, found):
        path.write_bytes(b"")
    command = [sys.executable, __file__, "--child", name, str(seconds), str(state)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                                "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}  # fmt: skip
    with (state / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
        )
    size, waited, hung = -1, 0.0, False
    try:
        while process.poll() is None:
            time.sleep(0.2)
            waited += 0.2  # not by a clock, which goes on where both processes are stopped
            if (now := log.stat().st_size) != size:
                size, waited = now, 0.0
            elif waited > (HANG if size else 10 * HANG):
                hung = True
                process.kill()
                process.wait()
    finally:
        process.kill()
        process.wait()
    counts = Counter(log.read_text(encoding="utf-8").split("\n"))
    tally.update({each: counts[each] for each in OUTCOMES})
    for line in found.read_text(encoding="utf-8").splitlines():
        each = json.loads(line)
        finds.setdefault(each["kind"], each | {"times": 0})["times"] += 1
    choices = current.read_bytes().decode()
    if choices == DONE:  # what libraries do as the process ends is no try
        return
    if choices and (hung or process.returncode):
        outcome = "hung" if hung else "crashed"
        code = process.returncode
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        kind = f"{name}: {'no answer' if hung else what}"
        shutil.copy(state / "stderr", state / f"stderr-{int(time.time())}")
        tally[outcome] += 1
        each = {"kind": kind, "outcome": outcome, "target": name, "choices": choices, "times": 0}
        finds.setdefault(kind, each)["times"] += 1
    else:
        print(f"{name}: exit code {process.returncode}", file=sys.stderr)
        raise SystemExit((state / "stderr").read_text(encoding="utf-8", errors="replace")[-3000:])


# --- the process that reads


class _Tries:
    """A target's files, damaged and read again and again."""

    def __init__(self, target: "Target", place: Path) -> None:
        self.target, self.place = target, place
        self.outside: list[str] = []
        self._reset(None)
        target.write(place)
        self.whole = {
            path.relative_to(place): path.read_bytes() for path in place.rglob("*")
            if path.is_file()
        }  # fmt: skip
        self.folders = [path.relative_to(place) for path in place.rglob("*") if path.is_dir()]
        self.expected = self._read()
        self._reset(self.whole)
        if self._read() != self.expected:
            raise SystemExit(f"{target.name}: the same files give two results")
        sys.addaudithook(self._audit)

    def _read(self) -> Any:
        with warnings.catch_warnings():
            # A warning counts for nothing here: only an error is "named".
            warnings.simplefilter("ignore")
            return self.target.read(self.place)

    def _reset(self, whole: dict[Path, bytes] | None) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if whole is not None:
            for folder in self.folders:
                (self.place / folder).mkdir(exist_ok=True)
            for name, data in whole.items():
                (self.place / name).write_bytes(data)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            for each in arguments:
                if isinstance(each, str) and OUTSIDE in each:
                    self.outside.append(f"{event} {each}")

    def damage(self, choices: Choices) -> str:
        """Write the files, one of them damaged; return its name."""
        self._reset(self.whole)
        name = choices.pick(self.target.files)
        path = self.place / name
        data = self.whole[Path(name)]
        if choices.chance(40):  # something else is there
            path.unlink()
            kind = choices.below(3)
            if kind == 0:
                path.mkdir()
            elif kind == 1:
                path.symlink_to(self.place / "nowhere")
        else:
            path.write_bytes(damaged(data, path.suffix, choices))
        return name

    def attempt(self, data: bytes) -> tuple[str, str, str]:
        """Try these choices; return the outcome, what kind of a find it is, and all of it."""
        from minilm.errors import MinilmError, NotFiniteError

        name = self.damage(Choices(data))
        self.outside.clear()
        start = time.process_time()
        outcome, kind, detail = "right", "", ""
        try:
            result = self._read()
            if result != self.expected:
                outcome = "as written" if self._is_justified(result) else "silent"
                kind = f"another result of {name}"
        except BaseException as error:  # a panic of Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            from fuzz_targets import ReportedError

            detail = traceback.format_exc()
            kind = f"{type(error).__name__} {_place(error)}"
            # A file that is gone, or a folder, is the system's error, which says which.
            of_system = isinstance(error, FileNotFoundError | IsADirectoryError)
            known = isinstance(error, MinilmError | ReportedError) or of_system
            names = (Path(name).name, str(self.place / name), str(self.place))
            says = f"{error} {getattr(error, 'filename', '')}"
            is_named = any(each in says for each in names) or isinstance(error, NotFiniteError)
            outcome = "named" if known and is_named else "crashed"
            if known and not is_named:
                kind = f"{kind} names no file"
        if time.process_time() - start > SLOW:
            outcome, kind = "hung", f"slow: {kind}"
        if self.outside:
            outcome, kind = "silent", f"outside: {self.outside[0].split()[0]} {kind}"
        return outcome, f"{self.target.name}: {kind}", detail

    def _is_justified(self, result: Any) -> bool:
        if self.target.justifies is None:
            return False
        try:
            return self.target.justifies(self.place, result)
        except Exception:  # a plain reader can't read it
            return False


def _place(error: BaseException) -> str:
    """Where an exception came from: the last line of this package, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [each for each in frames if f"{os.sep}minilm{os.sep}" in each.filename] or frames
    shown = dict.fromkeys(
        f"{Path(each.filename).name}:{each.name}" for each in (ours[-1], frames[-1])
    )
    return "in " + ", ".join(shown)


def _work(name: str, seconds: float, state: Path) -> int:
    """Try for some seconds, and write what became of it."""
    atheris: Any = None
    with contextlib.suppress(ImportError):
        atheris = importlib.import_module("atheris")
    if atheris and name:
        with atheris.instrument_imports(include=["minilm"]):
            from fuzz_targets import TARGETS
    else:
        from fuzz_targets import TARGETS
    if not name:
        print("\n".join(target.name for target in TARGETS))
        return 0
    tries = _Tries(_target(name), _scratch())
    log = os.open(state / "log", os.O_WRONLY)
    current = os.open(state / "current", os.O_WRONLY)
    kinds: Counter[str] = Counter()
    _limit_memory()

    def one(data: bytes) -> str:
        data = bytes(data[:LONGEST])
        os.ftruncate(current, os.pwrite(current, data.hex().encode() or b"-", 0))
        outcome, kind, detail = tries.attempt(data)
        os.write(log, f"{outcome}\n".encode())
        if outcome in BAD:
            kinds[kind] += 1
            find = {"kind": kind, "outcome": outcome, "target": name, "choices": data.hex()}
            with (state / "finds.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(find) + "\n")
            with (state / "details.txt").open("a", encoding="utf-8", errors="replace") as file:
                if kinds[kind] == 1:
                    file.write(f"--- {kind}\n{data.hex()}\n{detail}\n")
        return re.sub(r"\d+|'[^']*'", "", f"{outcome} {kind} {detail[-200:]}")

    corpus = state / "corpus"
    try:
        if atheris:
            end = time.monotonic() + seconds

            def steered(data: bytes) -> None:
                one(data)
                if time.monotonic() > end:  # its own clock counts from the first corpus on
                    shutil.rmtree(tries.place.parent, ignore_errors=True)
                    os.ftruncate(current, os.pwrite(current, DONE.encode(), 0))
                    os.kill(os.getpid(), signal.SIGKILL)  # libFuzzer would take an exit for a find

            flags = [f"-max_len={LONGEST}", "-len_control=0", "-rss_limit_mb=0", "-timeout=1000000",
                     "-verbosity=0", f"-seed={random.randrange(1, 2**31)}"]  # fmt: skip
            flags += [f"-artifact_prefix={state}{os.sep}"]
            flags += [f"-handle_{each}=0" for each in ("segv", "bus", "abrt", "ill", "fpe")]
            atheris.Setup([sys.argv[0], *flags, str(corpus)], steered)
            atheris.Fuzz()
        _draw(one, corpus, seconds)
    finally:
        shutil.rmtree(tries.place.parent, ignore_errors=True)
    os.ftruncate(current, os.pwrite(current, DONE.encode(), 0))
    return 0


def _draw(one: Any, corpus: Path, seconds: float) -> None:
    """Draw choices, or change some that are kept; keep those that give a new kind of answer."""
    generator = random.Random()
    kept = [path.read_bytes() for path in sorted(corpus.iterdir())]
    seen: set[str] = {one(data) for data in kept}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = bytearray(generator.randbytes(LONGEST))
        if kept and generator.random() < 0.5:
            data = bytearray(generator.choice(kept))
            data[generator.randrange(len(data))] = generator.randrange(256)
        answer = one(bytes(data))
        if answer not in seen:
            seen.add(answer)
            kept.append(bytes(data))
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def _target(name: str) -> "Target":
    from fuzz_targets import TARGETS

    return next(target for target in TARGETS if target.name == name)


def _scratch() -> Path:
    """A folder for the files: in memory where there is such a disk."""
    memory = Path("/dev/shm")
    where = memory if memory.is_dir() else None
    return Path(tempfile.mkdtemp(prefix="minilm-fuzz-", dir=where), "files")


def _limit_memory() -> None:
    """Let this process have 1 GB more than it has, by its addresses (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _replay(name: str, choices: str) -> int:
    tries = _Tries(_target(name), _scratch())
    try:
        _limit_memory()
        data = bytes.fromhex("" if choices == "-" else choices)
        outcome, kind, detail = tries.attempt(data)
        print(f"{outcome}\n{kind}\n{detail}")
        damaged_file = tries.damage(Choices(data))
        path = tries.place / damaged_file
        if path.is_file():
            print(f"{damaged_file}, {path.stat().st_size:,} bytes: {path.read_bytes()[:2000]!r}")
        return int(outcome in BAD)
    finally:
        shutil.rmtree(tries.place.parent, ignore_errors=True)


# --- what is printed


def _table(tallies: dict[str, Counter[str]]) -> str:
    lines = [f"| | cases | {' | '.join(OUTCOMES)} |", f"|---|---:{'|---:' * len(OUTCOMES)}|"]
    total: Counter[str] = Counter()
    for tally in tallies.values():
        total.update(tally)
    for name, tally in {**tallies, "all": total}.items():
        counts = " | ".join(f"{tally[each]:,}" for each in OUTCOMES)
        lines.append(f"| {name} | {sum(tally[each] for each in OUTCOMES):,} | {counts} |")
    return "\n".join(lines)


def _listed(finds: dict[str, dict[str, Any]]) -> str:
    if not finds:
        return "Nothing was found: no case was silent, crashed or hung."
    lines = ["| found | times | |", "|---|---:|---|"]
    lines += [
        f"| {each['kind']} | {each['times']:,} | {each['outcome']} |"
        for each in sorted(finds.values(), key=lambda each: each["kind"])
    ]
    return "\n".join(lines)


def _versions() -> str:
    found = []
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return f"With {', '.join(found)}."


def _legend(about: str) -> str:
    return re.sub(r"^(right|as written|named|silent|crashed|hung) +", r"- **\1** ", about.strip(),
                  flags=re.M)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""Keep what a script prints as a Markdown file, headed by the command, the date and the machine.

Every script that measures takes `--markdown FILE`; its results are in `scripts/results/`.
Standard library only: `scripts/bench/bench.py` measures memory and loads nothing beside that.
"""

import argparse
import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = [
    "LESSER", "add_option", "describe_machine", "instructions", "kind", "processor", "recorded",
    "write",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
)  # fmt: skip
VENDORS = {"AuthenticAMD": "amd", "GenuineIntel": "intel"}
LEVELS = {"avx2": "avx2", "avx512": "avx512f", "amx": "amx_tile"}  # name -> the flag of Linux
# What keeps ATen, oneDNN and MKL from instructions that the processor has.
LIMITS = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS",
)  # fmt: skip


def _limits(aten: str, onednn: str, mkl: str) -> dict[str, str]:
    names = "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"
    return dict(zip(names, (aten, onednn, mkl), strict=True))


# As on processors that have no more than these instructions.
LESSER = {
    "avx512": _limits("avx512", "AVX512_CORE", "AVX512"),
    "avx2": _limits("avx2", "AVX2", "AVX2"),
    "sse4": _limits("default", "SSE41", "SSE4_2"),
}
PACKAGES = (
    "torch",
    "sentence-transformers",
    "transformers",
    "onnxruntime",
    "openvino",
    "faiss-cpu",
)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Give a script the option `--markdown FILE`."""
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write the result there, with its date"
    )


@contextlib.contextmanager
def recorded(path: Path | None, title: str, *, fenced: bool = True) -> Iterator[None]:
    """Write to a file, too, what is printed within a `with` statement.

    No file is written if that ends with an exception, or prints nothing.

    Args:
        path: Where to; None for nowhere.
        title: The heading.
        fenced: Whether the text is put in a block of code, as it has to be unless it is Markdown.
    """
    if path is None:
        yield
        return
    copy = _Copy(sys.stdout)
    with contextlib.redirect_stdout(copy):
        yield
    text = "".join(copy.texts).strip("\n")
    if text:
        write(path, title, f"```text\n{text}\n```" if fenced else text)


def write(
    path: Path, title: str, body: str, *, date: str | None = None, machine: str | None = None
) -> None:
    """Write a result in Markdown, below its heading; `date` and `machine` are by default these."""
    when, where = date or time.strftime("%Y-%m-%d"), machine or describe_machine()
    lines = [f"# {title}", f"`{command()}` printed this on {when}, on {where}.", body.strip("\n")]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def command() -> str:
    """Return the command line of this process as one would type it in the checkout."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    words, skip = ["python", name], False
    for word in sys.argv[1:]:
        if not skip and not word.startswith("--markdown="):
            words += [] if word == "--markdown" else [word]
        skip = word == "--markdown"
    return shlex.join(words)


def describe_machine() -> str:
    """Return the processor, the number of cores, and the versions of what is installed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    known = ", ".join(instructions())
    with_them = f" ({known})" if known else ""
    return f"{cores} cores of {processor()}{with_them}; {', '.join(versions)}"


def processor() -> str:
    """Return the processor's name."""
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def instructions() -> list[str]:
    """Return which of the instructions that matrix products gain by the processor has (Linux)."""
    return [name for name in INSTRUCTIONS if name in _cpuinfo().get("flags", "").split()]


def kind() -> str:
    """Return the maker of the processor and the widest instructions used, as "amd-avx512".

    Without them where they are not known ("arm"; they are read on Linux only). Where environment
    variables limit the libraries it is the widest that ATen or oneDNN may use, with "-emulated".
    """
    info, machine = _cpuinfo(), platform.machine().lower()
    parts = [VENDORS.get(info.get("vendor_id", ""), re.sub("^(arm|aarch)64$", "arm", machine))]
    limits = {name: os.environ[name].lower() for name in LIMITS if os.environ.get(name)}
    aten = limits.get("ATEN_CPU_CAPABILITY", "avx512")  # it has nothing for AMX
    onednn = limits.get("ONEDNN_MAX_CPU_ISA") or limits.get("DNNL_MAX_CPU_ISA") or "all"
    most = max(_level(aten), _level(onednn))
    has = [name for name, flag in LEVELS.items() if flag in info.get("flags", "").split()]
    parts += has[:most][-1:]
    return "-".join([*parts, *["emulated"] * any(limit != "all" for limit in limits.values())])


def _level(limit: str) -> int:
    """Return how many of LEVELS a limit leaves, from the first on."""
    if limit == "all":
        return len(LEVELS)
    limit = limit.replace("avx10", "avx512")
    return max((place for place, name in enumerate(LEVELS, 1) if name in limit), default=0)


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)


class _Copy:
    """A standard output that remembers what is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.texts: list[str] = []

    def write(self, text: str) -> int:
        self.texts.append(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()

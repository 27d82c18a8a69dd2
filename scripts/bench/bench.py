"""Measure how fast minilm is, beside the other ways to run this model that are installed here.

    python scripts/bench/bench.py [--systems NAME,...] [--workloads W1,...] [--rounds N]
        [--threads N] [--device cuda] [--against COMMIT] [--markdown FILE] [--json FILE]
        [--plot FILE] [--cache FOLDER]
    python scripts/bench/bench.py --from-json FILE [--plot FILE] [--markdown FILE]

Every system runs in a fresh process of its own, on the same texts with the same number of threads,
in turn: A B C, A B C, ... What is compared is the ratio within a round, so that a machine that is
slow for a minute is slow for all; the table gives the median of the rounds and their range. Four
workloads: W1 short sentences, W2 texts of all lengths, W3 passages of 256 tokens, W4 one query at
a time. Speed counts real tokens, not padding. The error is against this package's plain path in
float64, which scripts/parity.py proves equal to the reference.

The peers get their best simple usage: texts in order of length, batches of 32 (on a GPU of 256),
tokenization in the time. pip install "minilm[bench]" brings them. What is absent or can't run here
is skipped, and so is bfloat16 on a processor without such products, where it would take minutes;
the report says which and why. Two systems run only if named: "minilm plain" (padded batches through
nn.Linear) and "torch.compile" (needs a C++ compiler).

--against COMMIT measures "minilm float32" of an earlier commit of this repository in the same
rounds. --markdown with a folder (scripts/results) writes speed-KIND.md there, after the kind of
processor: amd-avx2, intel-amx, nvidia-h200, ... A run in which environment variables keep the
libraries from the processor's best instructions is of a kind marked "emulated".
"""

import argparse
import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import results  # noqa: E402

# Neither torch nor NumPy is imported here (and minilm does so only when asked for an encoder): on
# Linux the peak memory of a process starts from that of its parent, so the parent stays small. Nor
# is minilm: a child may be told to import that of an earlier commit.

TEXTS = ROOT / "tests" / "data" / "parity_texts.jsonl"
WORKLOADS = {
    "W1": "2,000 sentences of 8 to 25 tokens",
    "W2": "1,000 texts of 5 to 256 tokens, log-normal, median 40",
    "W3": "200 passages of 256 tokens",
    "W4": "one query of 10 tokens at a time",
}
PANELS = {"W1": "short sentences", "W2": "all lengths", "W3": "256 tokens", "W4": "one query"}
SHAPES = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]  # the products in a layer: columns, outputs
MFLOP_PER_TOKEN = 2 * 6 * sum(columns * outputs for columns, outputs in SHAPES) / 1e6  # 21.2

# name -> (the packages it needs, the dtype of its arithmetic)
SYSTEMS: dict[str, tuple[tuple[str, ...], str]] = {
    "minilm float32": ((), "float32"),
    "minilm bfloat16": ((), "bfloat16"),
    "minilm int8": ((), "int8"),
    "minilm reproducible": ((), "float64"),  # rounded to float32 at the end
    "minilm plain": ((), "float32"),
    "sentence-transformers": (("sentence_transformers",), "float32"),
    "sentence-transformers bfloat16": (("sentence_transformers",), "bfloat16"),
    "OpenVINO float32": (("openvino", "transformers"), "float32"),
    "OpenVINO default": (("openvino", "transformers"), "bfloat16"),  # where the processor has it
    "onnxruntime": (("onnxruntime", "onnx", "transformers"), "float32"),
    "onnxruntime int8": (("onnxruntime", "onnx", "transformers"), "int8"),
    "CTranslate2": (("ctranslate2", "transformers"), "float32"),
    "CTranslate2 int8": (("ctranslate2", "transformers"), "int8"),
    "torch.compile": (("transformers",), "float32"),
}
OURS = "minilm float32"
REPRODUCIBLE = "minilm reproducible"
BASE = "sentence-transformers"
TASKS = ("import torch", "GEMM")  # measured in each round besides the systems
ONLY_IF_NAMED = ("minilm plain", "minilm reproducible", "torch.compile")
COLOURS = {  # Okabe and Ito's, which the colour-blind can tell apart
    "float64": "#56B4E9",
    "float32": "#0072B2",
    "bfloat16": "#E69F00",
    "float16": "#CC79A7",
    "int8": "#009E73",
}

Encode = Callable[[list[str]], Any]  # texts -> float32 [n, 384], a NumPy array
# int64 ids and mask [32, tokens], and the ids unpadded -> token vectors [32, tokens, 384]
Run = Callable[[Any, Any, list[list[int]]], Any]
Result = dict[str, Any]


class ChildError(Exception):
    """A child process failed; the message is the end of what it printed."""


def main() -> int:
    """Measure, or read what was measured, and print the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = min(usable or 1, 16)  # so small a model gains little from more
    add = parser.add_argument
    add("--systems", metavar="NAME,...", help=f"some of: {', '.join(SYSTEMS)}")
    add("--workloads", default=",".join(WORKLOADS), metavar="W1,...", help="some of them")
    add("--rounds", type=int, default=3, help="default: %(default)s")
    add("--threads", type=int, default=threads, help="default: one a processor; here %(default)s")
    add("--device", default="cpu", help="other than cpu: minilm and sentence-transformers only")
    add("--against", metavar="COMMIT", help=f"measure {OURS} of that commit, too")
    add("--json", type=Path, metavar="FILE", help="write every number there")
    add("--plot", type=Path, metavar="FILE", help="draw the ratios there, as .png or .svg")
    add("--from-json", type=Path, metavar="FILE", help="report on an earlier run")
    add("--cache", type=Path, metavar="FOLDER", help="keep exports and float64 vectors there")
    add("--scale", type=float, default=1.0, help="make this part of the texts; to try things out")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    results.add_option(parser)
    options = parser.parse_args()
    if options.child:
        return child()
    try:
        report = json.loads(options.from_json.read_text()) if options.from_json else run(options)
    except (ChildError, OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(to_text(report))
    if options.markdown:
        about = report["machine"]
        machine = f"{about['threads']} threads of {about.get('gpu') or about['cpu']}"
        body, date, path = to_text(report), about["date"], options.markdown
        if path.is_dir():
            path /= f"speed-{about['kind']}.md"
        results.write(path, f"Speed on {about['kind']}", body, date=date, machine=machine)
    if options.plot:
        plot(report, options.plot)
    return 0 if measured(report) else 1


# --- The parent -----------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> Result:
    """Measure every system in every round."""
    default = ",".join(name for name in SYSTEMS if name not in ONLY_IF_NAMED)
    systems = choose(options.systems or default, SYSTEMS)
    if options.device != "cpu":
        systems = [name for name in systems if name.startswith(("minilm", BASE))]
    report: Result = {"machine": describe_machine(options), "skipped": {}, "failed": {}}
    report["rounds"] = []

    def skip(names: Iterable[str], reason: str) -> None:
        for name in [name for name in systems if name in names]:
            systems.remove(name)
            report["skipped"][name] = reason
            say(f"{name} skipped: {reason}")

    absent = [n for n in systems if not all(map(importlib.util.find_spec, SYSTEMS[n][0]))]
    skip(absent, 'not installed; pip install "minilm[bench]"')
    if report["machine"]["load"] > 0.5:
        say("other programs are at work here, and will spoil the numbers; better wait")
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        folder = Path(temporary)
        checkouts: dict[str, Path] = {}
        if options.against:
            commit, checkout = stack.enter_context(checked_out(options.against))
            checkouts[f"{OURS} at {commit}"] = checkout
        if options.cache:  # named after all that its contents depend on
            made_of = [Path(__file__).read_text(), TEXTS.read_text(), report["machine"]["versions"]]
            key = hashlib.sha256(repr([*made_of, options.scale]).encode()).hexdigest()[:16]
            folder = options.cache.resolve() / key
            folder.mkdir(parents=True, exist_ok=True)
        job = {
            "folder": str(folder),
            "threads": options.threads,
            "device": options.device,
            "workloads": choose(options.workloads, WORKLOADS),
            "scale": options.scale,
            "exports": [f for f in EXPORTS if any(name.startswith(f) for name in systems)],
        }
        say("making texts, float64 vectors and exports")
        about = spawn("prepare", job)
        job |= {name: about[name] for name in ("model", "sizes", "slow_bfloat16")}
        report["machine"] |= about["machine"]
        say(f"kind of processor: {report['machine']['kind']}")
        report["workloads"] = {w: about["sizes"][w] for w in job["workloads"]}
        if about["no_int8"]:
            skip(["minilm int8"], about["no_int8"])
        if about["slow_bfloat16"]:  # OpenVINO looks for itself, and takes float32 there
            slow = [n for n, (_, dtype) in SYSTEMS.items() if dtype == "bfloat16"]
            skip([n for n in slow if not n.startswith("OpenVINO")], about["slow_bfloat16"])
        for family, reason in about["failed"].items():
            report["failed"] |= {n: reason for n in systems if n.startswith(family)}
        if checkouts:
            systems = [OURS, *checkouts, *(name for name in systems if name != OURS)]
        tasks = TASKS if options.device == "cpu" else TASKS[:1]
        for number in range(1, options.rounds + 1):
            results: Result = {}
            report["rounds"].append(results)
            for name in (n for n in [*tasks, *systems] if n not in report["failed"]):
                task, given = (name if name in tasks else "measure"), job | {"system": name}
                if name in checkouts:
                    given |= {"system": OURS, "checkout": str(checkouts[name])}
                try:
                    results[name] = spawn(task, given, {"HF_HUB_OFFLINE": "1"})
                    speeds = [f" {w} {_speed(results, name, w):,.0f}/s" for w in job["workloads"]]
                    say(f"round {number}: {name}{','.join(speeds) if task == 'measure' else ''}")
                except ChildError as error:
                    report["failed"][name] = str(error).splitlines()[-1]
                    say(f"round {number}: {name} failed:\n{error}")
    return report


@contextlib.contextmanager
def checked_out(name: str) -> Iterator[tuple[str, Path]]:
    """Have an earlier commit in a folder of its own, a git worktree, within a `with` statement.

    Args:
        name: A commit, as git takes it.

    Yields:
        The commit's short hash, and the folder.

    Raises:
        ValueError: There is no such commit, or its package can't be imported here.
    """

    def git(*words: str, check: bool = True) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode and check:
            raise ValueError(f"--against {name}: {done.stderr.strip()}")
        return done.stdout.strip()

    commit = git("rev-parse", "--verify", "--short", f"{name}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="minilm-bench-") as temporary:
        folder = Path(temporary, commit)
        try:
            git("worktree", "add", "--detach", str(folder), commit)
            try:
                file = spawn("import minilm", {"threads": 1, "checkout": str(folder)})["file"]
                why = "" if Path(file).is_relative_to(folder) else "it has no package minilm"
            except ChildError as error:
                why = str(error).splitlines()[-1]
            if why:
                raise ValueError(
                    f"--against {name}: its package does not run with {sys.executable}: {why}. "
                    "Make an environment with what the pyproject.toml of both commits requires, "
                    "and run this script with the Python of that"
                )
            yield commit, folder
        finally:
            git("worktree", "remove", "--force", str(folder), check=False)


def choose(text: str, known: Iterable[str]) -> list[str]:
    """Return the names in a comma-separated list, in the order of `known`."""
    chosen = [name.strip() for name in text.split(",")]
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
    return [name for name in known if name in chosen]


def say(text: str) -> None:
    """Print how far things are, on standard error."""
    print(text, file=sys.stderr, flush=True)


def spawn(task: str, job: Result, variables: dict[str, str] | None = None) -> Result:
    """Do a job in a fresh process; raise a ChildError if it fails."""
    threads = str(job["threads"])  # for OpenMP, and for the tokenizer
    variables = (variables or {}) | {"OMP_NUM_THREADS": threads, "RAYON_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--child"],
        input=json.dumps(job | {"task": task, "started": time.time()}),
        capture_output=True,
        text=True,
        env=os.environ | variables,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()][-5:]
        raise ChildError("\n".join(lines) or f"ended with status {done.returncode}")
    result: Result = json.loads(done.stdout)
    return result


def describe_machine(options: argparse.Namespace) -> Result:
    """Return what the figures depend on: processor, threads, versions, date."""
    from minilm import __version__

    versions = {"minilm": __version__}
    peers = {package for packages, _ in SYSTEMS.values() for package in packages}
    for name in ("torch", "numpy", "tokenizers", *sorted(peers)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "kind": results.kind(),
        "cpu": results.processor(),
        "instructions": results.instructions(),
        "threads": options.threads,
        "device": options.device,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions,
    }


# --- The report -----------------------------------------------------------------------------------


def measured(report: Result) -> list[str]:
    """Return the systems that were measured at least once, in the order of the table."""
    names = {name: None for results in report["rounds"] for name in results}
    return [name for name in names if name not in TASKS]


def ratios(report: Result, name: str, other: str, workload: str) -> list[float]:
    """Return how many times as fast as `other` a system was, in each round that has both."""
    pairs = [(_speed(r, name, workload), _speed(r, other, workload)) for r in report["rounds"]]
    return [ours / theirs for ours, theirs in pairs if ours and theirs]


def dtype_of(report: Result, name: str) -> str:
    """Return the dtype that a system says it computed in."""
    return next(str(results[name]["dtype"]) for results in report["rounds"] if name in results)


def _speed(results: Result, name: str, workload: str) -> float:
    """Return tokens a second, or queries a second; 0 if it was not measured."""
    result = results.get(name, {}).get(workload)
    if not result:
        return 0.0
    return float(1000 / result["median_ms"] if workload == "W4" else result["tokens_per_s"])


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "–"
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def to_text(report: Result) -> str:
    """Return the whole report, in Markdown."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = [machine.get("gpu") or machine["cpu"], *machine["instructions"]]
    lines = [f"{machine['kind']}: " + ", ".join([*where, f"threads: {machine['threads']}"])]
    lines += [f"Python {machine['python']}, {versions}", ""]
    for w, size in report["workloads"].items():
        counts = f"{size['sentences']:,} with {size['tokens']:,} tokens were run"
        lines.append(f"- {w}: {WORKLOADS[w]}; {counts}")
    lines += ["", *table(report), ""]
    lines += [f"×: how many times as fast as {BASE}; median of the rounds, and their range.", ""]
    if machine["kind"].endswith("-emulated"):
        lines.append(
            "- Emulated by variables for torch, MKL and oneDNN. onnxruntime and OpenVINO have "
            "products of their own, which these don't bind, or not all: their rows don't say how "
            "fast they are on such a processor."
        )
    for what in ("skipped", "failed"):
        lines += [f"- {name} {what}: {reason}" for name, reason in report[what].items()]
    return "\n".join(lines + peak_lines(report) + verdict_lines(report) + against_lines(report))


def table(report: Result) -> list[str]:
    """Return the lines of a table with a row for each system."""
    workloads = report["workloads"]
    heads = [("W4 ms (p99)" if w == "W4" else f"{w} tokens/s", "×") for w in workloads]
    head = ["system", *(cell for pair in heads for cell in pair), "cold s over import torch"]
    head += ["memory MB over torch", "max error", "min cosine"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name in measured(report):
        results = [r[name] | {"bare": r["import torch"]} for r in report["rounds"] if name in r]
        cells = [name]
        for w in workloads:
            if w == "W4":
                p99 = _middle([r[w]["p99_ms"] for r in results], ".2f")
                cells.append(f"{_middle([r[w]['median_ms'] for r in results], '.2f')} ({p99})")
            else:
                cells.append(_middle([r[w]["tokens_per_s"] for r in results], ",.0f"))
            cells.append("1" if name == BASE else _spread(ratios(report, name, BASE, w)))
        for key, form in (("cold_s", "+.2f"), ("memory_mb", "+.0f")):
            cells.append(_middle([r[key] - r["bare"][key] for r in results if key in r], form))
        for key, form in (("max_error", ".1e"), ("min_cosine", ".6f")):
            cells.append(_middle([r[key] for r in results if key in r], form))
        lines.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _middle(values: list[float], form: str) -> str:
    return format(statistics.median(values), form) if values else "–"


def peak_lines(report: Result) -> list[str]:
    """Return how fast matrix products alone are, and what share of that minilm reaches."""
    rounds = [r for r in report["rounds"] if "GEMM" in r]
    lines = []
    for dtype, ways in rounds[0]["GEMM"].items() if rounds else ():
        rates = [
            f"{way} {_middle([r['GEMM'][dtype][way] for r in rounds], ',.0f')}" for way in ways
        ]
        line = f"- Matrix products alone, 1,024 rows, {dtype}, GFLOP/s: {', '.join(rates)}."
        for name in measured(report):
            if name.startswith("minilm") and dtype_of(report, name) == dtype:
                shares = []
                for w in [w for w in report["workloads"] if w != "W4"]:
                    peaks = [(r, max(r["GEMM"][dtype].values())) for r in rounds if name in r]
                    reached = [_speed(r, name, w) * MFLOP_PER_TOKEN / 1e3 / p for r, p in peaks]
                    shares.append(f"{w} {_middle(reached, '.0%')}")
                line += f" Of the faster {name} reaches {', '.join(shares)}." if shares else ""
        lines.append(line)
    return lines


def verdict_lines(report: Result) -> list[str]:
    """Return the fastest peer in each dtype of minilm, and how many times as fast we are."""
    lines = []
    for name in measured(report):
        if not name.startswith("minilm") or name in ONLY_IF_NAMED or name not in SYSTEMS:
            continue
        dtype = dtype_of(report, name)
        others = [n for n in measured(report) if not n.startswith("minilm")]
        said = []
        for w in report["workloads"]:
            beside = {n: ratios(report, name, n, w) for n in others if dtype_of(report, n) == dtype}
            if beside := {n: values for n, values in beside.items() if values}:
                peer = min(beside, key=lambda n: statistics.median(beside[n]))
                said.append(f"{w} {_spread(beside[peer])} × {peer}")
        said = said or ["none was measured"]
        lines.append(f"- {name} beside the fastest peer in {dtype}: {'; '.join(said)}.")
    return lines


def against_lines(report: Result) -> list[str]:
    """Return how many times as fast we are as at an earlier commit, where one was measured; and how
    many times as long the same bits everywhere take.
    """
    lines = []
    prices = [(w, ratios(report, OURS, REPRODUCIBLE, w)) for w in report["workloads"]]
    if said := [f"{w} {_spread(values)}" for w, values in prices if values]:
        lines.append(f"- {REPRODUCIBLE} takes, times {OURS}: {', '.join(said)}.")
    for name in measured(report):
        if name not in SYSTEMS:
            said = [f"{w} {_spread(ratios(report, OURS, name, w))}" for w in report["workloads"]]
            commit = name.removeprefix(f"{OURS} at ")
            lines.append(f"- {OURS} beside {commit}: {', '.join(said)} times as fast.")
    return lines


def plot(report: Result, path: Path) -> None:
    """Draw the ratios to sentence-transformers: a panel for each workload, a bar a system."""
    try:
        _module("matplotlib")
    except ImportError:
        say('no plot: pip install "minilm[bench]"')
        return
    names = [name for name in measured(report) if name != BASE]
    dtypes = {name: dtype_of(report, name) for name in names}
    names.sort(key=lambda name: ([*COLOURS].index(dtypes[name]), not name.startswith("minilm")))
    size = (2.5 + 2.6 * len(report["workloads"]), 1.8 + 0.32 * len(names))
    figure = _module("matplotlib.figure").Figure(size, layout="constrained")
    panels = figure.subplots(1, len(report["workloads"]), sharey=True, squeeze=False)[0]
    for panel, w in zip(panels, report["workloads"], strict=True):
        longest = 1.0
        for name in names:
            values = ratios(report, name, BASE, w) or [0.0]
            middle, ours = statistics.median(values), name.startswith("minilm")
            look = {"color": COLOURS[dtypes[name]], "alpha": 1 if ours else 0.45}
            whiskers = [[middle - min(values)], [max(values) - middle]]
            panel.barh(name, middle, xerr=whiskers, capsize=3, **look)
            text: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            text |= {"weight": "bold" if ours else "normal", "bbox": {"color": "white", "pad": 0.5}}
            panel.annotate(f"{middle:.2f}", (max(values), name), **text)
            longest = max(longest, *values)
        panel.axvline(1, color="black", linewidth=1, linestyle="--")
        panel.set_xlim(0, 1.3 * longest)
        panel.set_title(f"{w}: {PANELS[w]}", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    for label in panels[0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text().startswith("minilm") else "normal")
    patch = _module("matplotlib.patches").Patch
    shown = [
        patch(color=c, label=dtype) for dtype, c in COLOURS.items() if dtype in dtypes.values()
    ]
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown), frameon=False)
    machine = report["machine"]
    where = f"{machine.get('gpu') or machine['cpu']}, threads: {machine['threads']}"
    figure.suptitle(f"Times as fast as {BASE} in float32 (dashed): {where}")
    figure.savefig(path, dpi=150)


def _module(name: str) -> Any:
    """Import a module that need not be installed where types are checked."""
    return importlib.import_module(name)


# --- The children ---------------------------------------------------------------------------------


def child() -> int:
    """Do the job given on stdin and print one line of JSON; what libraries print is on stderr."""
    job = json.load(sys.stdin)
    sys.path.insert(0, job.get("checkout", str(ROOT)))
    from minilm import MinilmError

    tasks = {"prepare": prepare, "import torch": import_torch, "GEMM": gemm, "measure": measure}
    tasks["import minilm"] = import_minilm
    with os.fdopen(os.dup(1), "w") as answer:
        os.dup2(2, 1)
        try:
            json.dump(tasks[job["task"]](job), answer)
        except MinilmError as error:
            sys.exit(f"{type(error).__name__}: {error}")
    return 0


def peak_memory() -> float:
    """Return the most memory that this process has had so far, in MB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def import_torch(job: Result) -> Result:
    """Return the time and memory that `import torch` alone takes."""
    import torch  # noqa: F401

    return {"cold_s": time.time() - job["started"], "memory_mb": peak_memory()}


def import_minilm(job: Result) -> Result:
    """Return which file the package is that a measurement imports."""
    from minilm import SentenceEncoder

    return {"file": sys.modules[SentenceEncoder.__module__].__file__}


def prepare(job: Result) -> Result:
    """Make the texts, their vectors in float64, and the model in the peers' formats."""
    import numpy as np
    import torch

    from minilm import MinilmError, SentenceEncoder
    from minilm.inputs import as_device

    encoder = SentenceEncoder.from_pretrained(device="cpu", dtype="float64")
    source, tokenizer = encoder.source, encoder.tokenizer
    assert source is not None
    assert tokenizer is not None
    folder, model = Path(job["folder"]), source.path("modules.json").parent.resolve()
    texts = make_texts(lambda words: tokenizer(words).token_counts, job["scale"])
    (folder / "texts.json").write_text(json.dumps(texts))
    for w in [w for w in job["workloads"] if w != "W4"]:
        if not (path := folder / f"{w}.npy").exists():
            np.save(path, encoder.encode(texts[w]))
    failed = {}
    for family in job["exports"]:
        try:
            if not (done := folder / f"{family}.done").exists():
                EXPORTS[family](str(model), folder)
                done.touch()
        except Exception as error:  # whatever a peer raises
            failed[family] = f"export: {error!r}"
    device, no_int8 = as_device(job["device"]), ""
    try:
        SentenceEncoder.from_pretrained(model, device=device, dtype="int8")
    except MinilmError as error:
        no_int8 = str(error)
    machine = {}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        machine = {"gpu": gpu, "kind": re.sub(r"[^a-z0-9]+", "-", gpu.lower())}
    counts = {w: tokenizer(rows).token_counts for w, rows in texts.items()}
    return {
        "model": str(model),
        "no_int8": no_int8,
        "slow_bfloat16": slow_bfloat16() if device.type == "cpu" else "",
        "failed": failed,
        "machine": machine,
        "sizes": {w: {"sentences": len(rows), "tokens": sum(rows)} for w, rows in counts.items()},
    }


def slow_bfloat16() -> str:
    """Return why bfloat16 is not worth its time on this processor; "" where it is.

    It is tried. A processor that has no products in it is five to nine times slower than in float32
    with AVX2, a tenth slower with AVX-512; one that has them is much faster.
    """
    import torch

    products = []
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = torch.ones(256, 384, dtype=dtype), torch.ones(1536, 384, dtype=dtype)
        products.append(partial(torch.nn.functional.linear, rows, weight))
    # In turn, so that whatever else the machine does meets both.
    times = [[timeit.timeit(product, number=1) for product in products] for _ in range(30)]
    float32, bfloat16 = (
        2 * 256 * 384 * 1536 / 1e9 / min(each) for each in zip(*times, strict=True)
    )
    if bfloat16 > 1.25 * float32:
        return ""
    return f"products in bfloat16 run at {bfloat16:,.0f} GFLOP/s here, in float32 at {float32:,.0f}"


def make_texts(count: Callable[[list[str]], list[int]], scale: float) -> dict[str, list[str]]:
    """Make the workloads: stretches of English of the test data, each of an exact number of tokens.

    Args:
        count: Gives the numbers of tokens of texts, [CLS] and [SEP] included.
        scale: How much of each workload to make.
    """
    rows = [json.loads(line) for line in TEXTS.read_text().splitlines()]
    kinds = ("declaration en", "everyday")
    words = " ".join(row["text"] for row in rows if row["kind"] in kinds).split()
    sizes = [tokens - 2 for tokens in count(words)]
    chance = random.Random(0)

    def text(length: int) -> str:
        place, room, chosen = chance.randrange(len(words)), length - 2, []
        while room:
            if sizes[place] <= room:
                chosen.append(words[place])
                room -= sizes[place]
            place = (place + 1) % len(words)
        return " ".join(chosen)

    def texts(number: int, length: Callable[[], float]) -> list[str]:
        return [text(round(length())) for _ in range(max(10, round(number * scale)))]

    return {
        "W1": texts(2000, lambda: chance.randint(8, 25)),
        "W2": texts(1000, lambda: min(256, max(5, chance.lognormvariate(math.log(40), 0.8)))),
        "W3": texts(200, lambda: 256),
        "W4": texts(200, lambda: 10),
    }


def measure(job: Result) -> Result:
    """Time one system on every workload."""
    job["dtype"] = SYSTEMS[job["system"]][1]
    encode = make_encode(job)
    encode(["How long does the first vector take?"])
    result: Result = {"dtype": job["dtype"], "cold_s": time.time() - job["started"]}

    import numpy as np

    folder = Path(job["folder"])
    texts = json.loads((folder / "texts.json").read_text())
    errors = []
    for w in [w for w in ("W2", "W1", "W3") if w in job["workloads"]]:
        encode(texts[w][: len(texts[w]) // 10])
        passes = []
        for _ in range(2):
            start = time.perf_counter()
            vectors = encode(texts[w])
            passes.append(time.perf_counter() - start)
        if w == "W2":  # before anything else takes memory
            result["memory_mb"] = peak_memory()
        speeds = {f"{unit}_per_s": n / min(passes) for unit, n in job["sizes"][w].items()}
        result[w] = {"seconds": min(passes), **speeds}
        vectors, truth = np.asarray(vectors, np.float64), np.load(folder / f"{w}.npy")
        cosines = (vectors * truth).sum(1) / np.linalg.norm(vectors, axis=1)
        errors.append([np.abs(vectors - truth).max(), -cosines.min()])
    if errors:  # NumPy's maximum keeps a NaN
        result["max_error"], result["min_cosine"] = (float(e) for e in np.max(errors, 0) * (1, -1))
    if "W4" in job["workloads"]:
        times = []
        for query in texts["W4"][:20] + 2 * texts["W4"]:
            start = time.perf_counter()
            encode([query])
            times.append(1000 * (time.perf_counter() - start))
        times = sorted(times[20:])
        p99 = times[int(0.99 * len(times))]
        result["W4"] = {"median_ms": statistics.median(times), "p99_ms": p99}
    return result


def gemm(job: Result) -> Result:
    """Measure GFLOP/s of the model's matrix products alone, by dtype and way to compute them."""
    import torch

    def rate(products: Sequence[Callable[[], object]]) -> float:
        times = []
        for _ in range(3 + 15):
            start = time.perf_counter()
            for product in products:
                product()  # and forget it: fresh memory would cost page faults
            times.append(time.perf_counter() - start)
        return 1024 * MFLOP_PER_TOKEN / 1e3 / statistics.median(times[3:])

    rates: Result = {}
    for dtype in (torch.float32, torch.bfloat16)[: 1 if job["slow_bfloat16"] else 2]:
        inputs = {columns: torch.randn(1024, columns).to(dtype) for columns in (384, 1536)}
        layers = [(c, torch.randn(o, c).to(dtype), torch.randn(o).to(dtype)) for c, o in SHAPES * 6]
        with torch.no_grad():
            linear = torch.nn.functional.linear
            ways = {"F.linear": rate([partial(linear, inputs[c], w, b) for c, w, b in layers])}
            with contextlib.suppress(AttributeError, RuntimeError):  # a build without oneDNN
                pack = torch.ops.mkldnn._reorder_linear_weight
                multiply = torch.ops.mkldnn._linear_pointwise
                packed: Any = [(inputs[c], pack(w, 1024), b, "none", [], "") for c, w, b in layers]
                ways["packed by oneDNN"] = rate([partial(multiply, *each) for each in packed])
        rates[str(dtype).removeprefix("torch.")] = ways
    return rates


# --- The systems ----------------------------------------------------------------------------------


def in_batches(job: Result, run: Run) -> Encode:
    """Add what a bare model lacks: tokenizer, batches of like lengths, mean, length 1.

    The mean is taken of what `run` gives for the padded ids, the mask and the ids unpadded.
    """
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(job["model"], "tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)

    def encode(texts: list[str]) -> Any:
        all_ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
        order = sorted(range(len(texts)), key=lambda row: -len(all_ids[row]))
        vectors = np.empty((len(texts), 384), np.float32)
        for start in range(0, len(order), 32):
            rows = [all_ids[row] for row in order[start : start + 32]]
            ids = np.zeros((len(rows), len(rows[0])), np.int64)
            mask = np.zeros_like(ids)
            for place, row in enumerate(rows):
                ids[place, : len(row)], mask[place, : len(row)] = row, 1
            hidden = np.asarray(run(ids, mask, rows), np.float32)
            sums = (mask[:, None].astype(np.float32) @ hidden)[:, 0]  # the division cancels out
            vectors[order[start : start + 32]] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        return vectors

    return encode


def make_encode(job: Result) -> Encode:
    """Load a system; return the function that embeds texts."""
    if job["system"].startswith("minilm") and job["system"] != "minilm plain":
        from minilm import SentenceEncoder

        where: dict[str, Any] = {"device": job["device"], "dtype": job["dtype"]}
        if job["system"] == REPRODUCIBLE:  # of which an earlier commit may not know
            where["reproducible"] = True
        encoder = SentenceEncoder.from_pretrained(job["model"], **where)
        if job["dtype"] == "bfloat16":  # or float32 in its place
            job["dtype"] = str(encoder.dtype).removeprefix("torch.")
        return encoder.encode
    if job["system"].startswith("sentence-transformers"):
        import torch
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(job["model"], device=job["device"], local_files_only=True)
        model.to(getattr(torch, job["dtype"]))
        size = 32 if job["device"] == "cpu" else 256
        return lambda texts: model.encode(texts, batch_size=size, show_progress_bar=False)
    return in_batches(job, make_run(job))


def make_run(job: Result) -> Run:
    """Load a system that maps ids to token vectors and leaves the rest to us."""
    folder, threads = Path(job["folder"]), job["threads"]
    family = job["system"].split()[0]
    if family == "OpenVINO":
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        if job["dtype"] == "float32":
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        core = _module("openvino").Core()
        compiled = core.compile_model(str(folder / "openvino.xml"), "CPU", settings)
        name = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        job["dtype"] = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[name]
        return lambda ids, mask, rows: compiled([ids, mask])[0]
    if family == "onnxruntime":
        options = _module("onnxruntime").SessionOptions()
        options.intra_op_num_threads = threads
        start = partial(_module("onnxruntime").InferenceSession, sess_options=options)
        session = start(str(folder / f"{job['dtype']}.onnx"), providers=["CPUExecutionProvider"])
        return lambda ids, mask, rows: session.run(None, {"ids": ids, "mask": mask})[0]
    if family == "CTranslate2":
        import numpy as np

        setting = {"compute_type": job["dtype"], "inter_threads": 1, "intra_threads": threads}
        encoder = _module("ctranslate2").Encoder(str(folder / "ctranslate2"), "cpu", **setting)
        # It pads by itself.
        return lambda ids, mask, rows: np.array(encoder.forward_batch(rows).last_hidden_state)

    import torch

    if family == "torch.compile":
        _module("torch._inductor.config").freezing = True
        model: Any = torch.compile(_bert(job["model"], "sdpa"), dynamic=True)
    else:  # this package's modules as they stand, ready for training
        from minilm import SentenceEncoder

        plain = SentenceEncoder.from_pretrained(job["model"], device=job["device"])

        def model(ids: Any, mask: Any) -> Any:
            return plain({"input_ids": ids, "attention_mask": mask})["token_embeddings"]

    def run(ids: Any, mask: Any, rows: list[list[int]]) -> Any:
        with torch.set_grad_enabled(family == "minilm"):
            inputs = (torch.from_numpy(array).to(job["device"]) for array in (ids, mask))
            return model(*inputs).detach().cpu()

    return run


def _bert(model: str, attention: str) -> Any:
    """Load the reference's model: ids and mask -> token vectors."""
    import torch
    from transformers import AutoModel

    class TokenVectors(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            settings: Any = {"attn_implementation": attention, "add_pooling_layer": False}
            self.bert = AutoModel.from_pretrained(model, **settings)

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.bert(input_ids=input_ids, attention_mask=attention_mask)[0]

    return TokenVectors().eval()


def _example() -> dict[str, Any]:
    import torch

    return {name: torch.ones(2, 8, dtype=torch.int64) for name in ("input_ids", "attention_mask")}


def export_onnx(model: str, folder: Path) -> None:
    """Write one ONNX file in float32, and one with int8 products."""
    names, path = ["ids", "mask", "hidden"], folder / "float32.onnx"
    axes = {name: {0: "batch", 1: "tokens"} for name in names}
    about = {"input_names": names[:2], "output_names": names[2:], "dynamic_axes": axes}
    example, settings = (*_example().values(),), {"opset_version": 17, "dynamo": False}
    _module("torch.onnx").export(_bert(model, "eager"), example, path, **about, **settings)
    # One scale for each output: as fast as the default of one for each matrix, and far more exact.
    quantize = _module("onnxruntime.quantization").quantize_dynamic
    quantize(path, folder / "int8.onnx", per_channel=True)


def export_openvino(model: str, folder: Path) -> None:
    """Write OpenVINO's format, in float32."""
    openvino = _module("openvino")
    exported = openvino.convert_model(_bert(model, "sdpa"), example_input=_example())
    openvino.save_model(exported, folder / "openvino.xml", compress_to_fp16=False)


def export_ctranslate2(model: str, folder: Path) -> None:
    """Write CTranslate2's format, in float32; it quantizes when it loads."""
    converter = _module("ctranslate2.converters").TransformersConverter(model)
    converter.convert(str(folder / "ctranslate2"), force=True)


EXPORTS: dict[str, Callable[[str, Path], None]] = {
    "OpenVINO": export_openvino,
    "onnxruntime": export_onnx,
    "CTranslate2": export_ctranslate2,
}

if __name__ == "__main__":
    sys.exit(main())

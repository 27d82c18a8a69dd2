"""The report of the benchmark, the kind of processor it is for, and earlier commits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bench
import results

LIMITED = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
AMX = "avx2 avx512f amx_tile"


@pytest.mark.parametrize(
    ("vendor", "flags", "machine", "variables", "kind"),
    [
        ("AuthenticAMD", "sse avx2", "x86_64", {}, "amd-avx2"),
        ("AuthenticAMD", "avx2 avx512f", "x86_64", {}, "amd-avx512"),
        ("GenuineIntel", AMX, "x86_64", {}, "intel-amx"),
        ("GenuineIntel", AMX, "x86_64", LIMITED, "intel-avx2-emulated"),
        # Either library alone may still use more; AMX only oneDNN.
        ("GenuineIntel", AMX, "x86_64", {"ATEN_CPU_CAPABILITY": "avx2"}, "intel-amx-emulated"),
        ("GenuineIntel", AMX, "x86_64", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "intel-avx512-emulated"),
        ("GenuineIntel", AMX, "x86_64", {"ONEDNN_MAX_CPU_ISA": "AVX10_1_512"},
         "intel-avx512-emulated"),
        ("GenuineIntel", AMX, "x86_64", {"ONEDNN_MAX_CPU_ISA": "ALL"}, "intel-amx"),
        ("GenuineIntel", "sse", "x86_64", {}, "intel"),
        ("", "", "aarch64", {}, "arm"),
        ("", "", "AMD64", {}, "amd64"),
    ],
)  # fmt: skip
def test_the_kind_of_processor_is_what_the_libraries_use_of_it(
    vendor: str,
    flags: str,
    machine: str,
    variables: dict[str, str],
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in results.LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(results, "_cpuinfo", lambda: {"vendor_id": vendor, "flags": flags})
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert results.kind() == kind


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two commits; the package of the first, tagged old, says so."""
    package = tmp_path / "repository" / "minilm"
    package.mkdir(parents=True)
    git(package.parent, "init", "--quiet")
    for word in ("old", "new"):
        (package / "encoder.py").write_text(f"class SentenceEncoder:\n    age = {word!r}\n")
        (package / "__init__.py").write_text(
            "from minilm.encoder import SentenceEncoder\nclass MinilmError(Exception): ...\n"
        )
        git(package, "add", ".")
        git(package, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", word)
        git(package, "tag", word)
    monkeypatch.setattr(bench, "ROOT", package.parent)
    return package.parent


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.process
def test_an_earlier_commit_is_checked_out_for_a_while(repository: Path) -> None:
    with bench.checked_out("old") as (commit, folder):
        assert commit == git(repository, "rev-parse", "--short", "old")
        assert "'old'" in (folder / "minilm/encoder.py").read_text()
        job = {"threads": 1, "checkout": str(folder)}
        assert Path(bench.spawn("import minilm", job)["file"]) == folder / "minilm/encoder.py"
    assert not folder.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.process
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_its_folder_is_removed_after_an_error(error: type[BaseException], repository: Path) -> None:
    with pytest.raises(error), bench.checked_out("old") as (_, folder):
        raise error
    assert not folder.exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.process
def test_a_commit_that_does_not_run_here_is_refused_with_what_to_do(repository: Path) -> None:
    (repository / "minilm/__init__.py").write_text("import no_such_package_as_this\n")
    git(repository, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qam", "broken")
    said = "against HEAD: .*No module named 'no_such_package_as_this'.*Make an environment"
    with pytest.raises(ValueError, match=said), bench.checked_out("HEAD"):
        pass
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    with pytest.raises(ValueError, match="against nonsense: fatal"), bench.checked_out("nonsense"):
        pass


@pytest.mark.process
def test_a_commit_without_the_package_does_not_fall_back_on_ours(repository: Path) -> None:
    git(repository, "mv", "minilm", "other")
    git(repository, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "moved")
    with pytest.raises(ValueError, match="has no package minilm"), bench.checked_out("HEAD"):
        pass


def answer(task: str, job: dict[str, Any], variables: Any = None) -> dict[str, Any]:
    """What a child would say on a processor without bfloat16; the earlier commit is slower."""
    if task == "prepare":
        size = {"sentences": 10, "tokens": 100}
        about = {"model": "m", "no_int8": "none here", "slow_bfloat16": "slow here", "failed": {}}
        return about | {
            "machine": {"kind": "amd-avx2-emulated"},
            "sizes": dict.fromkeys(job["workloads"], size),
        }
    if task == "import torch":
        return {"cold_s": 1.0, "memory_mb": 100.0}
    if task == "GEMM":
        return {"float32": {"F.linear": 100.0}}
    if task == "import minilm":
        return {"file": f"{job['checkout']}/minilm/encoder.py"}
    assert job["system"] in ("minilm float32", "minilm reproducible")
    speed = 500.0 if job["system"] == "minilm reproducible" else 1500.0
    if "checkout" in job:
        speed = 1000.0
    w1, w4 = {"tokens_per_s": speed}, {"median_ms": 1e4 / speed, "p99_ms": 1e4}
    return {"dtype": "float32", "cold_s": 2.0, "memory_mb": 300.0, "W1": w1, "W4": w4}


@pytest.mark.process
def test_report_has_the_earlier_commit_what_was_skipped_and_the_kind(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "spawn", answer)
    names = "minilm float32,minilm bfloat16,minilm int8,minilm reproducible"
    given = ["--against", "old", "--systems", names, "--workloads", "W1,W4", "--rounds", "2"]
    file = tmp_path / "run.json"
    monkeypatch.setattr(
        sys, "argv", ["bench", *given, "--json", str(file), "--markdown", str(tmp_path)]
    )
    assert bench.main() == 0
    out, commit = capsys.readouterr().out, git(repository, "rev-parse", "--short", "old")
    assert out.startswith("amd-avx2-emulated: ")
    assert f"\n| minilm float32 at {commit} | 1,000 | " in out
    assert "\n- minilm bfloat16 skipped: slow here\n" in out
    assert "\n- minilm int8 skipped: none here\n" in out
    assert "\n- Emulated by variables" in out
    assert "\n- minilm reproducible takes, times minilm float32: W1 3.00 (3.00-3.00), W4" in out
    faster = "W1 1.50 (1.50-1.50), W4 1.50 (1.50-1.50) times as fast."
    assert out.endswith(f"\n- minilm float32 beside {commit}: {faster}\n")
    text = (tmp_path / "speed-amd-avx2-emulated.md").read_text()
    assert text.startswith("# Speed on amd-avx2-emulated\n")
    assert text.endswith(out)
    # In turn: A B A B.
    rounds = json.loads(file.read_text())["rounds"]
    ours = ["minilm float32", f"minilm float32 at {commit}", "minilm reproducible"]
    assert [list(each) for each in rounds] == [["import torch", "GEMM", *ours]] * 2


@pytest.mark.parametrize(("bfloat16", "is_slow"), [(0.010, True), (0.0022, True), (0.0006, False)])
def test_a_processor_without_bfloat16_is_told_by_trying(
    bfloat16: float, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(product: Any, number: int) -> float:
        return {torch.float32: 0.002, torch.bfloat16: bfloat16}[product.args[0].dtype]

    monkeypatch.setattr("timeit.timeit", timed)
    said = bench.slow_bfloat16()
    assert said.endswith(", in float32 at 151") if is_slow else said == ""


def test_an_earlier_commit_is_asked_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    class Loaded:
        encode: Any = "encode"
        dtype = "torch.float32"

        @classmethod
        def from_pretrained(cls, _: str, **options: Any) -> type["Loaded"]:
            given.append(options)
            return cls

    monkeypatch.setattr("minilm.SentenceEncoder", Loaded)
    for system in ("minilm float32", "minilm reproducible"):
        job = {"system": system, "dtype": bench.SYSTEMS[system][1], "device": "cpu", "model": "m"}
        assert bench.make_encode(job) == Loaded.encode
    assert [sorted(options) for options in given] == [
        ["device", "dtype"],
        ["device", "dtype", "reproducible"],
    ]

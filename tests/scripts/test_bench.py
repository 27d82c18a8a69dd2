"""The report of the benchmark and the kind of processor it is for."""

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


def answer(task: str, job: dict[str, Any], variables: Any = None) -> dict[str, Any]:
    """What a child would say on a processor without bfloat16."""
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
    speed = 1500.0
    w1, w4 = {"tokens_per_s": speed}, {"median_ms": 1e4 / speed, "p99_ms": 1e4}
    return {"dtype": "float32", "cold_s": 2.0, "memory_mb": 300.0, "W1": w1, "W4": w4}


@pytest.mark.process
def test_report_has_what_was_skipped_and_the_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "spawn", answer)
    names = "minilm float32,minilm bfloat16,minilm int8"
    given = ["--systems", names, "--workloads", "W1,W4", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["bench", *given, "--markdown", str(tmp_path)])
    assert bench.main() == 0
    out = capsys.readouterr().out
    assert out.startswith("amd-avx2-emulated: ")
    assert "\n- minilm bfloat16 skipped: slow here\n" in out
    assert "\n- minilm int8 skipped: none here\n" in out
    assert "\n- Emulated by variables" in out
    text = (tmp_path / "speed-amd-avx2-emulated.md").read_text()
    assert text.startswith("# Speed on amd-avx2-emulated\n")
    assert text.endswith(out)


@pytest.mark.parametrize(("bfloat16", "is_slow"), [(0.010, True), (0.0022, True), (0.0006, False)])
def test_a_processor_without_bfloat16_is_told_by_trying(
    bfloat16: float, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(product: Any, number: int) -> float:
        return {torch.float32: 0.002, torch.bfloat16: bfloat16}[product.args[0].dtype]

    monkeypatch.setattr("timeit.timeit", timed)
    said = bench.slow_bfloat16()
    assert said.endswith(", in float32 at 151") if is_slow else said == ""

"""The dtype that a model gets, by what the processor multiplies in.

The rest of options.py is tested by the calls that take the options, in tests/inference.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import ROOT, compose, load, minilm
from minilm import MeanPooling, SentenceEncoder
from minilm.errors import DtypeWarning, InputError
from minilm.pretrained import options
from minilm.pretrained.options import dtype_on, has_products  # before conftest.py replaces it

TEXTS = ["the dog bites", "a cat", ""]
X86, ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")


@pytest.fixture
def lesser(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that multiplies in float32 and float64 only."""
    monkeypatch.setattr(options, "has_products", lambda dtype: False)


# What the processor has.


def set_processor(
    patch: pytest.MonkeyPatch, machine: str, bf16: bool, fp16: bool, **queries: bool
) -> None:
    """Let torch and Python say of the processor what is given here, and nothing else."""
    patch.setattr(platform, "machine", lambda: machine)
    onednn = {"_is_mkldnn_bf16_supported": lambda: bf16, "_is_mkldnn_fp16_supported": lambda: fp16}
    patch.setattr(torch.ops, "mkldnn", SimpleNamespace(**onednn))
    answers = {f"_is_{name}_supported": lambda x=value: x for name, value in queries.items()}
    patch.setattr(torch, "cpu", SimpleNamespace(**answers))


@pytest.mark.parametrize(
    ("machines", "bf16", "fp16", "avx512_bf16", "amx_tile", "expected"),
    [
        (X86, False, False, False, False, []),  # AVX2
        (X86, True, False, False, False, []),  # AVX-512 alone
        (X86, True, False, True, False, ["bf16"]),  # Zen 4
        (X86, True, True, True, True, ["bf16", "fp16"]),  # Sapphire Rapids
        (X86, True, False, False, True, ["bf16"]),
        (X86, False, False, True, True, []),  # a better one, limited to AVX2
        (ARM, False, False, False, False, []),
        (ARM, True, False, False, False, ["bf16"]),  # Graviton 3
    ],
)
def test_products_of_a_processor(
    monkeypatch: pytest.MonkeyPatch,
    machines: tuple[str, ...],
    bf16: bool,
    fp16: bool,
    avx512_bf16: bool,
    amx_tile: bool,
    expected: list[str],
) -> None:
    for machine in machines:
        queries = {"avx512_bf16": avx512_bf16, "amx_tile": amx_tile}
        set_processor(monkeypatch, machine, bf16, fp16, **queries)
        found = {"bf16": has_products(torch.bfloat16), "fp16": has_products(torch.float16)}
        assert [name for name, has in found.items() if has] == expected


def test_a_torch_that_knows_less(monkeypatch: pytest.MonkeyPatch) -> None:
    set_processor(monkeypatch, "x86_64", bf16=True, fp16=False, amx_tile=False)  # torch 2.4
    assert has_products(torch.bfloat16)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())  # built without oneDNN
    assert not has_products(torch.bfloat16)
    assert not has_products(torch.float16)


IN_A_PROCESS = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from minilm import SentenceEncoder
    for dtype in ("bfloat16", "float16", "auto"):
        print(SentenceEncoder(sys.argv[1], device="cpu", dtype=dtype).dtype)
print(*(warning.category.__name__ for warning in caught))
print(caught[0].message)
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in X86, reason="limits an x86 processor to AVX2")
def test_processor_limited_to_avx2(tiny_folder: Path) -> None:
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS, str(tiny_folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | limits,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *dtypes, categories, message = done.stdout.splitlines()
    assert dtypes == ["torch.float32"] * 3
    assert categories == "DtypeWarning DtypeWarning"  # and none for "auto"
    assert message.startswith("dtype is 'bfloat16', but this processor (AVX2) has no products")


# What a model gets.


@pytest.mark.parametrize(
    ("dtype", "lack"),
    [
        ("bfloat16", r"\(AVX-512 BF16, AMX, or ARM's BF16\)"),
        (torch.bfloat16, "'bfloat16'"),
        ("float16", r"\(AVX-512 FP16\)"),
        ("torch.float16", "'float16'"),
    ],
)
def test_float32_where_the_processor_is_slower(
    lesser: None, tiny_folder: Path, dtype: Any, lack: str
) -> None:
    expected = load(tiny_folder)
    with pytest.warns(DtypeWarning, match=f"{lack}.*pass dtype='float32', or 'auto'") as caught:
        encoder = SentenceEncoder(tiny_folder, device="cpu", dtype=dtype)
    assert [warning.filename for warning in caught] == [__file__]
    assert encoder.dtype == torch.float32
    assert encoder.fingerprint() == expected.fingerprint()
    np.testing.assert_array_equal(encoder.encode(TEXTS), expected.encode(TEXTS))


def test_modules_get_float32_too(lesser: None) -> None:
    for place in (None, "cpu"):
        with pytest.warns(DtypeWarning):
            encoder = compose(dtype="bfloat16", device=place)
        assert {each.dtype for each in encoder.parameters()} == {torch.float32}
        assert compose(dtype="auto", device=place).dtype == torch.float32


def test_other_dtypes_are_computed_on_every_processor(lesser: None, tiny_folder: Path) -> None:
    for dtype in (None, "float32", torch.float64):
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        assert load(tiny_folder, dtype=dtype).dtype == expected


def test_conversion_after_loading_does_what_it_says(lesser: None, tiny_folder: Path) -> None:
    assert load(tiny_folder).half().dtype == torch.float16
    assert load(tiny_folder).to(torch.bfloat16).dtype == torch.bfloat16
    kept = compose(load(tiny_folder).bert.bfloat16(), MeanPooling())
    assert kept.dtype == torch.bfloat16  # no dtype was asked for


def test_auto(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    encoder = load(tiny_folder, dtype="auto")  # every processor has all products here
    kinds = {type(part): part.weight.dtype for part in encoder.modules() if hasattr(part, "weight")}
    assert kinds == {
        nn.Embedding: torch.float32,
        nn.LayerNorm: torch.float32,
        nn.Linear: torch.bfloat16,
    }
    assert encoder.fingerprint() == load(tiny_folder, dtype="bfloat16").fingerprint()
    assert compose(dtype="auto").dtype == torch.bfloat16
    monkeypatch.setattr(options, "has_products", lambda dtype: dtype == torch.float16)
    assert load(tiny_folder, dtype="auto").fingerprint() == load(tiny_folder).fingerprint()


def test_auto_goes_with_no_other_dtype(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="dtype and model_kwargs ask for different ones"):
        load(tiny_folder, dtype="auto", model_kwargs={"dtype": "float64"})
    # Of the reference's "auto", the dtype of the file.
    assert load(tiny_folder, model_kwargs={"dtype": "auto"}).dtype == torch.float32


def test_devices_other_than_a_processor(lesser: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, mps = torch.device("cuda", 1), torch.device("mps")
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert dtype_on(cuda, dtype) == dtype_on(mps, dtype) == dtype
    for capability, expected in (((7, 5), torch.float32), ((9, 0), torch.bfloat16)):
        of_each = {cuda: capability}
        monkeypatch.setattr(torch.cuda, "get_device_capability", of_each.__getitem__)
        assert dtype_on(cuda, "auto") == expected
    assert dtype_on(mps, "auto") == torch.float32


# The command.


def test_info_says_what_is_computed_in(lesser: None, tiny_folder: Path) -> None:
    model = ["--model", str(tiny_folder), "--device", "cpu"]
    done = minilm("info", *model, "--dtype", "bfloat16")
    assert "computes in: float32 on cpu\n" in done.stdout.decode()
    assert done.stderr.decode().startswith("minilm: warning: dtype is 'bfloat16', but this ")
    done = minilm("info", *model, "--dtype", "auto")
    assert "computes in: float32 on cpu\n" in done.stdout.decode()
    assert not done.stderr


def test_explain_in_the_dtype_of_the_model(tiny_folder: Path) -> None:
    arguments = ["explain", "a dog", "a cat", "--json", "--model", str(tiny_folder)]
    outputs = [
        minilm(*arguments, "--device", "cpu", "--dtype", dtype)
        for dtype in ("auto", "bfloat16", "float32")
    ]
    assert outputs[0] == outputs[1] != outputs[2]
    assert [done.returncode for done in outputs] == [0, 0, 0]

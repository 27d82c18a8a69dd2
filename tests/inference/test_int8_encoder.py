"""`dtype="int8"`: which processors and weights it is for, what is computed in it and what isn't."""

import copy
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bench
from conftest import ROOT, minilm
from minilm import SentenceEncoder
from minilm.errors import InputError
from minilm.index.index import Index
from minilm.inference import int8
from minilm.pretrained import options
from minilm.pretrained.fingerprint import compare

TEXTS = [
    "A cat sits outside.",
    "No.",
    "why?!",
    "",
    "What is the capital of France, and how far is it from here by train?",
    "a b a b a b a b a b a b",
    " ".join(["reasonable people disagree about this, and about much else;"] * 40),
]
pytestmark = pytest.mark.filterwarnings("ignore::minilm.errors.TruncationWarning")


@pytest.fixture(scope="module")
def coded(published: Path) -> SentenceEncoder:
    if not int8.exact_products() or options._has_amx():
        pytest.skip("this processor's sums of 8-bit products are not exact, or it has AMX")
    return SentenceEncoder.from_pretrained(published, device="cpu", dtype="int8")


def test_vectors_are_near_the_exact_ones(
    coded: SentenceEncoder, encoder64: SentenceEncoder
) -> None:
    near, exact = (torch.from_numpy(e.encode(TEXTS)).double() for e in (coded, encoder64))
    cosines = F.cosine_similarity(near, exact)
    assert cosines.min() > 0.995
    assert cosines.max() < 0.99999  # it was computed in 8 bits
    assert cosines[[0, 4, 6]].min() > 0.998


def test_workloads_keep_their_cosines(coded: SentenceEncoder, encoder64: SentenceEncoder) -> None:
    tokenizer = coded.get_tokenizer()
    workloads = bench.make_texts(lambda words: tokenizer(words).token_counts, 1)
    for name, count in (("W1", 200), ("W2", 100), ("W3", 12)):
        texts = workloads[name][:count]
        near, exact = (torch.from_numpy(e.encode(texts)).double() for e in (coded, encoder64))
        cosines = F.cosine_similarity(near, exact)
        assert cosines.min() >= 0.998, name
        assert cosines.mean() >= 0.999, name


def test_texts_have_their_bits_in_any_company(coded: SentenceEncoder) -> None:
    together = coded.encode(TEXTS)
    alone = np.stack([coded.encode(text) for text in TEXTS])
    assert np.array_equal(together, alone)
    assert np.array_equal(coded.encode(TEXTS[::-1] * 8)[: len(TEXTS)], together[::-1])
    assert coded.deterministic
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert np.array_equal(coded.encode(TEXTS), together)
            assert np.array_equal(coded.encode(TEXTS * 10)[: len(TEXTS)], together)
    finally:
        torch.set_num_threads(threads)


def test_a_plain_call_is_in_float32(coded: SentenceEncoder, encoder: SentenceEncoder) -> None:
    features = coded.tokenize(TEXTS[:2])
    vectors = coded(features)["sentence_embedding"]
    assert torch.equal(vectors, encoder(features)["sentence_embedding"])
    vectors.sum().backward()
    gradient = coded.get_parameter("bert.layers.0.attention.query.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    coded.zero_grad()


def test_what_says_int8(coded: SentenceEncoder, encoder: SentenceEncoder) -> None:
    assert (coded.dtype, coded.weights_dtype) == (torch.int8, torch.float32)
    ours, other = coded.fingerprint(), encoder.fingerprint()
    assert (ours.dtype, other.dtype) == ("int8", "float32")
    assert ours.weights_sha256 == other.weights_sha256
    assert compare(ours, other).verdict == compare(other, ours).verdict == "model"
    assert compare(ours, coded.fingerprint()).verdict == "same"


def test_an_index_is_not_mixed(
    coded: SentenceEncoder, encoder: SentenceEncoder, tmp_path: Path
) -> None:
    index = Index.create(tmp_path / "index", coded.fingerprint())
    index.add(coded.encode(TEXTS), TEXTS, fingerprint=coded.fingerprint())
    with pytest.raises(InputError, match="'int8', not 'float32'"):
        index.search(encoder.encode("a query"), fingerprint=encoder.fingerprint())


def test_info_says_int8(coded: SentenceEncoder, published: Path) -> None:
    model = ["--model", str(published), "--device", "cpu"]
    done = minilm("info", *model, "--dtype", "int8")
    assert "computes in: int8 on cpu\n" in done.stdout.decode()


def test_copies_stay_in_int8(coded: SentenceEncoder) -> None:
    vectors = coded.encode(TEXTS)
    for other in (copy.deepcopy(coded), pickle.loads(pickle.dumps(coded))):
        assert other.dtype == torch.int8
        assert np.array_equal(other.encode(TEXTS), vectors)
    converted = copy.deepcopy(coded).double()
    assert converted.dtype == torch.float64
    assert copy.deepcopy(coded).to("cpu").dtype == torch.int8
    for converted in (copy.deepcopy(coded).float(), copy.deepcopy(coded).to(torch.float32)):
        assert converted.dtype == torch.float32


def test_saved_weights_are_those_of_float32(coded: SentenceEncoder, tmp_path: Path) -> None:
    coded.save_pretrained(tmp_path / "saved")
    again = SentenceEncoder.from_pretrained(tmp_path / "saved", device="cpu")
    assert again.dtype == torch.float32
    for name, tensor in coded.bert.state_dict().items():
        assert torch.equal(tensor, again.bert.state_dict()[name])


def test_other_weights_are_refused(coded: SentenceEncoder, tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match="published weights") as caught:
        SentenceEncoder(modules=list(copy.deepcopy(tiny_encoder)), dtype="int8", device="cpu")
    assert caught.value.argument == "dtype"
    changed = copy.deepcopy(coded)
    changed.encode("before")
    with torch.no_grad():
        changed.get_parameter("bert.layers.3.feed_forward.output.weight")[5] *= 1.01
    with pytest.raises(InputError, match="published weights"):
        changed.encode("after")


def test_auto_is_never_int8(published: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(published, device="cpu", dtype="auto")
    assert encoder.dtype != torch.int8


def test_refused_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_has_amx", lambda: True)
    monkeypatch.setattr(options, "has_products", lambda dtype: True)
    monkeypatch.setattr(int8, "why_not", lambda: "")
    with pytest.raises(InputError, match=r"AMX.*pass dtype='bfloat16'") as caught:
        options.dtype_on(torch.device("cpu"), "int8")
    assert caught.value.argument == "dtype"


def test_refused_on_other_devices() -> None:
    with pytest.raises(InputError, match="not cuda"):
        options.dtype_on(torch.device("cuda"), torch.int8)


def test_refused_where_sums_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "exact_products", lambda: False)
    monkeypatch.setattr(options, "_has_amx", lambda: False)
    with pytest.raises(InputError, match=r"VNNI.*pass dtype='float32'|x86.*'float32'"):
        options.dtype_on(torch.device("cpu"), "int8")


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="limits an x86 processor to AVX2"
)
def test_refused_with_avx2_alone() -> None:
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    code = (
        "import torch\n"
        "from minilm.errors import InputError\n"
        "from minilm.pretrained.options import dtype_on\n"
        "try:\n"
        "    dtype_on(torch.device('cpu'), 'int8')\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | limits,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("dtype is 'int8': this processor (AVX2) has no exact sums")
    assert "pass dtype='float32'" in done.stdout

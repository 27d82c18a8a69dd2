"""On a GPU: the same numbers as on the processor, in every dtype and through every door."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import DATA
from minilm import SentenceEncoder
from minilm.files.arrow import embeddings_of
from minilm.files.streaming import encode_files
from minilm.index import Index
from minilm.parity.stages import Golden, compare_with_golden
from minilm.pretrained.fingerprint import compare
from minilm.tasks import (
    community_detection,
    deduplicate,
    paraphrase_mining_embeddings,
    quantized_search,
    semantic_search,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# How far apart two vectors of length 1 may be: some units in the last place of what is added up.
TOLERANCES = {"float64": 1e-14, "float32": 1e-6, "float16": 1.2e-3, "bfloat16": 8e-3}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = (DATA / "parity_texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def on_gpu(published: Path) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(published, device="cuda")


@pytest.fixture(scope="module")
def exact(encoder64: SentenceEncoder, texts: list[str]) -> np.ndarray:
    vectors: np.ndarray = encoder64.encode(texts, truncation="silent")
    return vectors


def test_a_gpu_is_the_default(tiny_folder: Path) -> None:
    assert SentenceEncoder.from_pretrained(tiny_folder).device.type == "cuda"


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_vectors_are_those_of_the_processor(
    published: Path, texts: list[str], exact: np.ndarray, dtype: str
) -> None:
    encoder = SentenceEncoder.from_pretrained(published, device="cuda", dtype=dtype)
    vectors = encoder.encode(texts, truncation="silent")
    assert vectors.dtype == {"float64": np.float64, "float16": np.float16}.get(dtype, np.float32)
    assert np.abs(vectors - exact).max() < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_golden_values(published: Path, dtype: str) -> None:
    golden = Golden.load(DATA / "golden.json")
    encoder = SentenceEncoder.from_pretrained(published, device="cuda", dtype=dtype)
    rows = compare_with_golden(encoder, golden)
    assert all(row.passed for row in rows), rows


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"batch_size": 3}])
def test_tiny_model(tiny_folder: Path, dtype: str, options: dict[str, int]) -> None:
    some = ["the dog bites the man", "", "a cat", "the sun is out . " * 3, "a cat", "runs"]
    expected = SentenceEncoder.from_pretrained(tiny_folder, device="cpu", dtype="float64").encode(
        some, truncation="silent"
    )
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cuda", dtype=dtype)
    found = encoder.encode(some, truncation="silent", **options)
    assert np.abs(found - expected).max() < TOLERANCES[dtype]


def test_tiny_gradients(tiny_folder: Path) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        encoder = SentenceEncoder.from_pretrained(tiny_folder, device=device, dtype="float64")
        features = encoder.tokenize(["the dog bites the man", "a cat"])
        features = {name: tensor.to(device) for name, tensor in features.items()}
        encoder(features)["sentence_embedding"][:, 0].sum().backward()
        gradients.append({name: p.grad.cpu() for name, p in encoder.named_parameters()
                          if p.grad is not None})  # fmt: skip
    assert gradients[0].keys() == gradients[1].keys()
    assert gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-10, atol=1e-13), name


def test_every_form_of_output(on_gpu: SentenceEncoder, encoder: SentenceEncoder) -> None:
    some = ["one text", "and another one, which is longer"]
    tensor = on_gpu.encode(some, convert_to_tensor=True)
    assert tensor.device.type == "cuda"
    assert not tensor.is_inference()
    expected = encoder.encode(some, convert_to_tensor=True)
    assert torch.allclose(tensor.cpu(), expected, atol=1e-6)
    assert torch.allclose(
        on_gpu.similarity(tensor, tensor).cpu(), encoder.similarity(expected, expected), atol=1e-6
    )
    for ours, theirs in zip(
        on_gpu.encode(some, output_value="token_embeddings"),
        encoder.encode(some, output_value="token_embeddings"),
        strict=True,
    ):
        assert ours.device.type == "cuda"
        assert torch.allclose(ours.cpu(), theirs, atol=2e-5)
    all_of = on_gpu.encode(some, output_value=None)
    assert torch.allclose(all_of[0]["sentence_embedding"].cpu(), expected[0], atol=1e-6)
    stream = np.stack(list(on_gpu.encode_stream(iter(some))))
    assert np.abs(stream - expected.numpy()).max() < 1e-6
    assert on_gpu.encode([]).shape == (0, 384)
    bits, theirs = (each.encode(some, precision="ubinary") for each in (on_gpu, encoder))
    assert (np.unpackbits(bits) != np.unpackbits(theirs)).sum() <= 1
    codes = on_gpu.encode(some, precision="int8").astype(int)
    assert np.abs(codes - encoder.encode(some, precision="int8")).max() <= 1


def test_long_texts(on_gpu: SentenceEncoder, encoder: SentenceEncoder) -> None:
    long = "Cats see well in the dark. " * 60 + "The recipe needs two eggs."
    ours, theirs = (each.encode(long, truncation="chunk") for each in (on_gpu, encoder))
    assert np.abs(ours - theirs).max() < 1e-6
    for a, b in zip(on_gpu.encode_windows(long), encoder.encode_windows(long), strict=True):
        assert (a.start, a.end) == (b.start, b.end)
        assert np.abs(np.asarray(a.embedding) - np.asarray(b.embedding)).max() < 1e-6


def test_pairs(on_gpu: SentenceEncoder, encoder: SentenceEncoder) -> None:
    pairs = [("a text", "and its partner"), ("one", "two three four")]
    assert np.abs(on_gpu.encode(pairs) - encoder.encode(pairs)).max() < 1e-6


def test_what_is_said_of_bits_is_so(on_gpu: SentenceEncoder, texts: list[str]) -> None:
    together = on_gpu.encode(texts, truncation="silent")
    alone = np.stack([on_gpu.encode(text, truncation="silent") for text in texts[::7]])
    if on_gpu.deterministic:
        assert np.array_equal(alone, together[::7])
    assert np.abs(alone - together[::7]).max() < 1e-6
    assert np.array_equal(together, on_gpu.encode(texts, truncation="silent"))


def test_fingerprint_is_that_of_the_processor(
    on_gpu: SentenceEncoder, encoder: SentenceEncoder
) -> None:
    assert compare(on_gpu.fingerprint(), encoder.fingerprint()).verdict == "same"


def test_save(on_gpu: SentenceEncoder, tmp_path: Path) -> None:
    on_gpu.save_pretrained(tmp_path / "copy")
    copy = SentenceEncoder.from_pretrained(tmp_path / "copy", device="cuda")
    assert np.array_equal(copy.encode("a text"), on_gpu.encode("a text"))


def test_moving_back_and_forth(published: Path, encoder: SentenceEncoder) -> None:
    travelling = SentenceEncoder.from_pretrained(published, device="cpu")
    before = travelling.encode("a text")
    travelling.to("cuda")
    assert np.abs(travelling.encode("a text") - before).max() < 1e-6
    travelling.to("cpu")
    assert np.array_equal(travelling.encode("a text"), before)


def test_explain_and_trace(on_gpu: SentenceEncoder) -> None:
    a, b = "The weather is lovely today.", "It's so sunny outside!"
    explanation = on_gpu.explain(a, b)
    assert f"{explanation.similarity:.4f}" == "0.6660"
    trace = on_gpu.trace(a, dtype="float64")
    assert max(trace.check().values()) < 1e-12


def test_threads(on_gpu: SentenceEncoder, texts: list[str]) -> None:
    some = texts[:64]
    expected = on_gpu.encode(some, truncation="silent")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: on_gpu.encode(some, truncation="silent"), range(32)))
    assert all(np.array_equal(each, expected) for each in found)


@pytest.mark.process
def test_process_pool(on_gpu: SentenceEncoder, texts: list[str]) -> None:
    some = texts[:40]
    with on_gpu.start_multi_process_pool(["cuda:0", "cuda:0"]) as pool:
        found = on_gpu.encode(some, pool=pool, truncation="silent")
    assert np.abs(found - on_gpu.encode(some, truncation="silent")).max() < 1e-6


def test_tasks(on_gpu: SentenceEncoder, texts: list[str]) -> None:
    vectors = on_gpu.encode(texts, convert_to_tensor=True, truncation="silent")
    assert vectors.device.type == "cuda"
    on_cpu = vectors.cpu()
    ours, theirs = (semantic_search(v[:50], v, top_k=5) for v in (vectors, on_cpu))
    for found, expected in zip(ours, theirs, strict=True):
        assert [hit["corpus_id"] for hit in found] == [hit["corpus_id"] for hit in expected]
        assert [hit["score"] for hit in found] == pytest.approx([h["score"] for h in expected])
    pairs, expected_pairs = (
        paraphrase_mining_embeddings(v, max_pairs=200) for v in (vectors, on_cpu)
    )
    assert [pair[1:] for pair in pairs] == [pair[1:] for pair in expected_pairs]
    groups, expected_groups = (
        community_detection(v, min_community_size=2) for v in (vectors, on_cpu)
    )
    assert groups == expected_groups
    assert deduplicate(vectors, 0.9) == deduplicate(on_cpu, 0.9)
    codes = on_gpu.encode(texts, precision="int8", truncation="silent")
    found_by_codes = quantized_search(vectors[:5], codes, "int8", 3)
    assert [hits[0]["corpus_id"] for hits in found_by_codes] == list(range(5))


def test_index(on_gpu: SentenceEncoder, encoder: SentenceEncoder, tmp_path: Path) -> None:
    some = ["A man is eating food.", "A monkey is playing drums.", "The new movie is awesome."]
    index = Index.create(tmp_path / "index", on_gpu.fingerprint())
    vectors = on_gpu.encode(some, convert_to_tensor=True)
    index.add(vectors, some, fingerprint=on_gpu.fingerprint())
    for asking in (on_gpu, encoder):  # made there, searched here
        query = asking.encode("Someone has a meal", convert_to_tensor=True)
        [hits] = index.search(query, 1, fingerprint=asking.fingerprint())
        assert hits[0]["row"] == {"text": some[0]}


@pytest.mark.parametrize("workers", [1, 2])
def test_files(
    on_gpu: SentenceEncoder, exact: np.ndarray, texts: list[str], tmp_path: Path, workers: int
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encode_files(
        on_gpu, source, tmp_path / "out", shard_rows=100, workers=workers, truncation="silent"
    )
    table = parquet.read_table(tmp_path / "out")
    assert table["text"].to_pylist() == texts
    assert np.abs(embeddings_of(table["embedding"]) - exact).max() < TOLERANCES["float32"]

"""The encoder in the real MTEB, on tasks made of local data; no network."""

import csv
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SHARED, needs
from minilm import SentenceEncoder, TruncationWarning, __version__
from minilm.errors import InputError
from minilm.pretrained.hub import DEFAULT_MODEL, REVISION, SHA256

mteb = needs("mteb", "mteb")

from datasets import Dataset, DatasetDict  # noqa: E402
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import EncoderProtocol, ModelMeta  # noqa: E402
from mteb.types import PromptType  # noqa: E402

from minilm.adapters.mteb import MiniLMEncoder  # noqa: E402

# Raised inside MTEB, which calls itself and the reference by names that are going to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The fill_missing:DeprecationWarning:mteb.*"),
    pytest.mark.filterwarnings("ignore:The `get_sentence_emb:FutureWarning:mteb.*"),
]

TEXTS = ["the dog bites", "a cat", "the man sees the sun is out", "walk"]


def metadata(name: str, kind: str, main_score: str) -> Any:
    return TaskMetadata(
        name=name,
        type=kind,
        main_score=main_score,
        description="A task of local data.",
        dataset={"path": "local/none", "revision": "1"},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        modalities=["text"],
        category="t2t",
        reference=None,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )


class LocalSTS(AbsTaskSTS):  # type: ignore[misc]
    """STS17, English, from a file."""

    metadata = metadata("LocalSTS17", "STS", "cosine_spearman")

    def load_data(self, **_: Any) -> None:
        with (SHARED / "sts" / "STS17.en-en.tsv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        columns = {name: [row[name] for row in rows] for name in ("sentence1", "sentence2")}
        scores = [float(row["score"]) for row in rows]
        self.dataset = DatasetDict({"test": Dataset.from_dict(columns | {"score": scores})})
        self.data_loaded = True


class LocalRetrieval(AbsTaskRetrieval):  # type: ignore[misc]
    """A part of SciFact, from files: 40 questions, their abstracts and as many others."""

    metadata = metadata("LocalSciFact", "Retrieval", "ndcg_at_10")

    def load_data(self, **_: Any) -> None:
        folder = SHARED / "retrieval" / "scifact-small"
        relevant: dict[str, dict[str, int]] = {}
        with (folder / "qrels.tsv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                relevant.setdefault(row["query"], {})[row["doc"]] = int(row["grade"])
        queries = [row for row in json_lines(folder / "queries.jsonl") if row["id"] in relevant][
            :40
        ]
        relevant = {row["id"]: relevant[row["id"]] for row in queries}
        wanted = {document for documents in relevant.values() for document in documents}
        rows = json_lines(folder / "corpus.jsonl")
        others = [row for row in rows if row["id"] not in wanted][: len(wanted)]
        corpus = [row for row in rows if row["id"] in wanted] + others
        split = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list(queries),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class Query(AbsTaskRetrieval):  # type: ignore[misc]
    """Only its metadata are used."""

    metadata = metadata("Questions", "Retrieval", "ndcg_at_10")


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encode(model: MiniLMEncoder, texts: list[str], prompt_type: Any = None) -> Any:
    """In batches of three, as MTEB's loaders make them."""
    batches = [{"text": texts[i : i + 3], "id": ["x"]} for i in range(0, len(texts), 3)]
    return model.encode(
        batches,
        task_metadata=Query.metadata,
        hf_split="test",
        hf_subset="default",
        prompt_type=prompt_type,
        batch_size=2,
    )


def experiment(model: MiniLMEncoder) -> Any:
    return model.mteb_model_meta.experiment_kwargs["fingerprint"]


# --- the protocol


def test_it_is_what_the_protocol_asks_for(tiny_encoder: SentenceEncoder) -> None:
    assert isinstance(MiniLMEncoder(tiny_encoder), EncoderProtocol)
    for name in ("__init__", "encode", "similarity", "similarity_pairwise"):
        ours = inspect.signature(getattr(MiniLMEncoder, name)).parameters
        theirs = inspect.signature(getattr(EncoderProtocol, name)).parameters
        for parameter, wanted in theirs.items():
            if wanted.kind is not wanted.VAR_KEYWORD:
                assert ours[parameter].kind is wanted.kind
        assert (inspect.Parameter.VAR_KEYWORD in {p.kind for p in ours.values()}) == (
            inspect.Parameter.VAR_KEYWORD in {p.kind for p in theirs.values()}
        )


def test_vectors_are_those_of_encode(tiny_encoder: SentenceEncoder) -> None:
    vectors = encode(MiniLMEncoder(tiny_encoder), TEXTS)
    assert np.array_equal(vectors, tiny_encoder.encode(TEXTS))
    assert encode(MiniLMEncoder(tiny_encoder), []).shape == (0, 32)


def test_half_precision_is_widened(tiny_encoder: SentenceEncoder) -> None:
    half = tiny_encoder.to(torch.float16)
    vectors = encode(MiniLMEncoder(half), TEXTS)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, half.encode(TEXTS).astype(np.float32))


@pytest.mark.parametrize("name", ["cosine", "euclidean"])
def test_similarity_is_the_models(tiny_encoder: SentenceEncoder, name: str) -> None:
    tiny_encoder.similarity_fn_name = name
    model = MiniLMEncoder(tiny_encoder)
    a, b = tiny_encoder.encode(TEXTS[:2]), 2 * tiny_encoder.encode(TEXTS[2:])
    assert torch.equal(model.similarity(a, b), tiny_encoder.similarity(a, b))
    assert torch.equal(model.similarity_pairwise(a, b), tiny_encoder.similarity_pairwise(a, b))
    assert model.mteb_model_meta.similarity_fn_name.value == name


PROMPTS = {
    "query": "the ",
    "document": "a ",
    "STS": "sun ",
    "Retrieval-query": "dog ",
    "Questions": "cat ",
    "Questions-query": "man ",
}


@pytest.mark.parametrize(
    ("names", "prompt_type", "prompt"),
    [
        (["query", "document", "STS"], PromptType.query, "the "),
        (["query", "document", "STS"], PromptType.document, "a "),
        (["query", "document", "STS"], None, ""),
        (["query", "Retrieval-query"], PromptType.query, "dog "),
        (["query", "Retrieval-query", "Questions"], PromptType.query, "cat "),
        (["Questions", "Questions-query"], PromptType.query, "man "),
        (["Questions", "Questions-query"], PromptType.document, "cat "),
        (["query", "Questions"], None, "cat "),
    ],
)
def test_prompt_of_a_task(
    tiny_folder: Path, names: list[str], prompt_type: Any, prompt: str
) -> None:
    prompts = {name: PROMPTS[name] for name in names}
    model = MiniLMEncoder(tiny_folder, device="cpu", prompts=prompts)
    plain = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    vectors = encode(model, TEXTS, prompt_type)
    assert np.array_equal(vectors, plain.encode([prompt + text for text in TEXTS]))


def test_prompt_that_is_given_is_used_for_every_task(tiny_folder: Path) -> None:
    prompts = {"query": "the ", "mine": "man "}
    plain = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    for given in ({"prompt": "man "}, {"prompt_name": "mine"}):
        model = MiniLMEncoder(tiny_folder, device="cpu", prompts=prompts, **given)
        vectors = encode(model, TEXTS, PromptType.query)
        assert np.array_equal(vectors, plain.encode(TEXTS, prompt="man "))


def test_prompt_that_mteb_has_no_name_for(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.prompts = {"passage": "a "}
    model = MiniLMEncoder(tiny_encoder)
    documents = encode(model, TEXTS, PromptType.document)
    assert np.array_equal(documents, tiny_encoder.encode(TEXTS, prompt="a "))
    assert np.array_equal(encode(model, TEXTS, PromptType.query), tiny_encoder.encode(TEXTS))


# --- what it says of itself


def test_meta_of_the_published_model(published: Path) -> None:
    meta = MiniLMEncoder(published, device="cpu").mteb_model_meta
    known = mteb.get_model_meta(DEFAULT_MODEL)
    assert ModelMeta(**{name: getattr(meta, name) for name in ModelMeta.model_fields}) == meta
    assert (meta.name, meta.revision) == (DEFAULT_MODEL, REVISION)
    assert (meta.embed_dim, meta.max_tokens, meta.license) == (384, 256, "apache-2.0")
    assert meta.similarity_fn_name.value == "cosine"
    assert meta.training_datasets == known.training_datasets
    assert meta.framework == ["PyTorch", "safetensors"]
    # MTEB counts the pooler, whose 384 x 384 weights and 384 biases this model doesn't use.
    assert meta.n_parameters == known.n_parameters - 384 * 385
    assert meta.n_embedding_parameters == known.n_embedding_parameters
    assert meta.loader is MiniLMEncoder
    assert experiment(MiniLMEncoder(published)).startswith(f"minilm-{__version__}-")
    assert known.experiment_kwargs is None  # MTEB's own record is left as it is
    assert meta.training_datasets is not known.training_datasets


def test_meta_loads_the_same_model(published: Path) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16, "truncate_dim": 8, "prompt": "query: "}
    meta = MiniLMEncoder(DEFAULT_MODEL, **options).mteb_model_meta
    assert meta.embed_dim == 8
    json.dumps(meta.to_dict())  # MTEB writes it beside its results
    again = meta.load_model(device="cpu")
    assert np.array_equal(
        encode(again, TEXTS), encode(MiniLMEncoder(published, device="cpu", **options), TEXTS)
    )
    assert again.mteb_model_meta.loader_kwargs["device"] == "cpu"  # the record that MTEB gave it


def test_another_model_than_the_one_meant_is_refused(tiny_encoder: SentenceEncoder) -> None:
    fingerprint = experiment(MiniLMEncoder(tiny_encoder))
    MiniLMEncoder(tiny_encoder, fingerprint=fingerprint)
    with pytest.raises(InputError, match=f"fingerprint is '{fingerprint}', and this") as caught:
        MiniLMEncoder(tiny_encoder, fingerprint=fingerprint, truncate_dim=8)
    assert caught.value.argument == "fingerprint"


def test_token_is_kept_out_of_the_record(tiny_folder: Path) -> None:
    meta = MiniLMEncoder(tiny_folder, token="secret", cache_dir="private").mteb_model_meta
    assert "secret" not in json.dumps(meta.to_dict())
    assert "private" not in json.dumps(meta.to_dict())


def test_meta_of_a_folder_goes_by_its_weights(tiny_folder: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    model = MiniLMEncoder(encoder)
    before = model.mteb_model_meta
    assert (before.name, before.revision) == ("local/tiny", encoder.fingerprint().weights_sha256)
    assert (before.license, before.training_datasets, before.loader) == (None, None, None)
    with torch.no_grad():  # as if it was trained on between two evaluations
        encoder.bert.embeddings.layer_norm.weight[0] += 1
    after = model.mteb_model_meta
    assert after.name == "local/tiny"
    assert after.revision != before.revision


def test_meta_of_changed_weights_is_not_the_published_models(published: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(published, device="cpu")
    with torch.no_grad():
        encoder.bert.embeddings.layer_norm.weight[0] += 1
    meta = MiniLMEncoder(encoder).mteb_model_meta
    assert (meta.name, meta.adapted_from) == ("local/all-MiniLM-L6-v2", DEFAULT_MODEL)
    assert meta.revision not in (REVISION, SHA256["model.safetensors"])
    assert (meta.license, meta.loader) == (None, None)


def test_what_decides_a_score_makes_another_experiment(tiny_folder: Path) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"dtype": "float64"},
        {"prompts": {"query": "the "}},
        {"similarity_fn_name": "dot"},
        {"truncate_dim": 8},
        {"prompt": "the "},
        {"prompt_name": "query"},
        {"truncation": "chunk"},
        {"truncate_dim": 8, "normalize_embeddings": True},
    ]
    seen = {experiment(MiniLMEncoder(tiny_folder, device="cpu", **given)) for given in options}
    assert len(seen) == len(options)
    shorter = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    shorter.max_seq_length = 5
    assert experiment(MiniLMEncoder(shorter)) not in seen
    same: dict[str, Any] = {"batch_size": 1, "truncation": "silent", "show_progress_bar": False}
    assert experiment(MiniLMEncoder(tiny_folder, device="cpu", **same)) in seen


# --- MTEB's own evaluation


def evaluate(model: Any, task: Any, folder: Path) -> Any:
    return mteb.evaluate(
        model, task, cache=mteb.ResultCache(folder), show_progress_bar=False, co2_tracker=False
    )


def scores_of(result: Any) -> Any:
    (scores,) = result.task_results[0].scores["test"]
    return scores


def test_result_is_filed_as_ours(tiny_folder: Path, tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"needs the data in {SHARED}")
    model = MiniLMEncoder(tiny_folder, device="cpu", truncation="silent")
    first = evaluate(model, LocalSTS(), tmp_path)
    meta = model.mteb_model_meta
    assert (first.model_name, first.model_revision) == (meta.name, meta.revision)
    (path,) = tmp_path.rglob("LocalSTS17.json")
    assert experiment(model) in str(path)
    saved = json.loads((path.parent / "model_meta.json").read_text(encoding="utf-8"))
    assert (saved["name"], saved["embed_dim"]) == ("local/tiny", 32)
    # A result that is there is taken, so what has the same name must be another experiment.
    other = MiniLMEncoder(tiny_folder, device="cpu", truncation="silent", truncate_dim=2)
    assert scores_of(evaluate(other, LocalSTS(), tmp_path)) != scores_of(first)
    assert len(list(tmp_path.rglob("LocalSTS17.json"))) == 2


@pytest.mark.reference
def test_scores_are_the_references(
    encoder: SentenceEncoder, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"needs the data in {SHARED}")
    # In one cache, with the reference's result there first, under the name of the same weights.
    monkeypatch.setattr(reference.model_card_data, "base_model", DEFAULT_MODEL)
    monkeypatch.setattr(reference.model_card_data, "base_model_revision", REVISION)
    theirs = scores_of(evaluate(reference, LocalSTS(), tmp_path))
    ours = scores_of(evaluate(MiniLMEncoder(encoder), LocalSTS(), tmp_path))
    published = json.loads((SHARED / "scores.json").read_text(encoding="utf-8"))
    wanted = published["tasks"]["STS17.en-en"]["published"]
    assert round(100 * ours["cosine_spearman"], 6) == wanted["spearman"]
    assert ours["spearman"] == theirs["spearman"] == ours["main_score"]
    for name, value in theirs.items():
        if isinstance(value, float):
            assert ours[name] == pytest.approx(value, rel=0, abs=1e-7), name


@pytest.mark.reference
@pytest.mark.slow
def test_retrieval_is_the_references(
    encoder: SentenceEncoder, reference: Any, tmp_path: Path
) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"needs the data in {SHARED}")
    with pytest.warns(TruncationWarning):  # abstracts of more than 256 tokens
        ours = scores_of(evaluate(MiniLMEncoder(encoder), LocalRetrieval(), tmp_path))
    theirs = scores_of(evaluate(reference, LocalRetrieval(), tmp_path))
    ranks = [name for name in theirs if "_at_" in name and not name.startswith("nauc")]
    assert "ndcg_at_10" in ranks
    assert {name: ours[name] for name in ranks} == {name: theirs[name] for name in ranks}
    assert ours["ndcg_at_10"] > 0.5

"""The transformer in scikit-learn: its own checks, its pipelines and searches, real texts."""

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import SHARED, TINY_WORDS, needs, write_model_folder
from minilm import SentenceEncoder
from minilm.errors import InputError, InputTypeError, ModelNotFoundError, TruncationError

needs("sklearn", "sklearn")

from sklearn.base import clone  # noqa: E402
from sklearn.cluster import KMeans  # noqa: E402
from sklearn.compose import make_column_transformer  # noqa: E402
from sklearn.exceptions import SkipTestWarning  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import v_measure_score  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import Pipeline, make_pipeline  # noqa: E402
from sklearn.preprocessing import OneHotEncoder  # noqa: E402
from sklearn.utils import estimator_checks, get_tags  # noqa: E402
from sklearn.utils.validation import check_is_fitted  # noqa: E402

from minilm.adapters import lazy  # noqa: E402
from minilm.adapters import sklearn as adapter  # noqa: E402
from minilm.adapters.sklearn import MiniLMVectorizer  # noqa: E402

TEXTS = ["the dog bites", "a cat sees the sun", "the sun is out", "a man walks", "run, dog!"] * 4
LABELS = [0, 1, 1, 0, 0] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model, by its folder; no test changes it."""
    return str(write_model_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def vectors(folder: str) -> np.ndarray[Any, Any]:
    return SentenceEncoder.from_pretrained(folder, device="cpu").encode(TEXTS)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The names of the models that are loaded while the test runs."""
    names: list[Any] = []

    class Counted(SentenceEncoder):
        def __init__(self, name: Any, **options: Any) -> None:
            names.append(name)
            super().__init__(name, **options)

    monkeypatch.setattr(lazy, "SentenceEncoder", Counted)
    return names


# --- scikit-learn's own checks

# What fails, and why: each asks for what text is not.
EXCEPTIONS = {
    "check_complex_data": "complex numbers are refused like all numbers, in our words",
    "check_estimators_empty_data_messages": "no texts have no vectors: [0, 384], no error",
    "check_estimators_nan_inf": "missing values are refused like all that is no text, in our words",
    "check_fit2d_predict1d": "a column of texts has one dimension; two are refused, not one",
    "check_n_features_in": "a text has no number of features",
    "check_n_features_in_after_fitting": "a text has no number of features",
}


class OfRows(MiniLMVectorizer):
    """The transformer, saying that it takes the matrices of numbers that the checks pass."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.input_tags.one_d_array = False
        return tags


@pytest.fixture
def of_rows(folder: str, monkeypatch: pytest.MonkeyPatch) -> OfRows:
    """It, reading each row of a matrix as one text: a word for each number."""
    words = TINY_WORDS[5:17]
    texts_of = adapter._texts

    def as_word(value: float) -> str:
        return words[int(abs(value) * 1000) % len(words)]

    def texts_of_rows(matrix: Any) -> list[str]:
        rows = np.asarray(matrix) if hasattr(matrix, "__array__") else matrix
        if isinstance(rows, np.ndarray) and rows.dtype == object and rows.ndim == 2:
            with warnings.catch_warnings(action="ignore"):
                rows = rows.astype(float)  # the check of object arrays, which wants a TypeError
        if isinstance(rows, list) and all(isinstance(row, list) for row in rows):
            rows = np.array(rows)
        if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind not in "biuf":
            return texts_of(matrix)
        if not np.isfinite(rows).all():
            return texts_of(rows[~np.isfinite(rows)])
        return texts_of([" ".join(as_word(value) for value in row[:8]) for row in rows.tolist()])

    monkeypatch.setattr(adapter, "_texts", texts_of_rows)
    return OfRows(folder, truncation="silent")


def test_all_checks_pass_but_those_listed(of_rows: OfRows) -> None:
    results = estimator_checks.check_estimator(of_rows, on_fail=None, on_skip=None)
    failed = {result["check_name"] for result in results if result["status"] == "failed"}
    skipped = {result["check_name"] for result in results if result["status"] == "skipped"}
    assert failed == EXCEPTIONS.keys()
    assert skipped <= {"check_array_api_input"}  # it is for arrays of numbers on a GPU
    passed = {result["check_name"] for result in results if result["status"] == "passed"}
    assert {
        "check_dont_overwrite_parameters",
        "check_estimators_pickle",
        "check_fit_idempotent",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_pipeline_consistency",
        "check_set_params",
        "check_transformer_general",
        "check_transformers_unfitted_stateless",
    } <= passed


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_set_output_transform,
        estimator_checks.check_set_output_transform_pandas,
        estimator_checks.check_set_output_transform_polars,
        estimator_checks.check_global_output_transform_pandas,
        estimator_checks.check_global_set_output_transform_polars,
    ],
)
def test_checks_of_data_frames_pass(check: Callable[[str, Any], None], of_rows: OfRows) -> None:
    needs("pandas", "sklearn")
    needs("polars", "sklearn")
    check("MiniLMVectorizer", of_rows)


def test_check_estimator_passes_as_for_its_own_vectorizers(folder: str) -> None:
    # Of what says that it takes texts only, scikit-learn itself checks next to nothing.
    with pytest.warns(SkipTestWarning, match="requires input"):
        results = estimator_checks.check_estimator(MiniLMVectorizer(folder))
    assert {result["status"] for result in results} == {"passed"}
    estimator_checks.check_parameters_default_constructible("", MiniLMVectorizer(folder))


# --- vectors


@pytest.mark.parametrize("container", [list, tuple, iter, np.array])
def test_vectors_are_those_of_the_encoder(
    folder: str, vectors: np.ndarray[Any, Any], container: Callable[[Any], Any]
) -> None:
    vectorizer = MiniLMVectorizer(folder)
    np.testing.assert_array_equal(vectorizer.transform(container(TEXTS)), vectors)
    np.testing.assert_array_equal(vectorizer.fit_transform(TEXTS), vectors)


def test_one_column_of_a_frame_is_read(folder: str, vectors: np.ndarray[Any, Any]) -> None:
    pandas, polars = needs("pandas", "sklearn"), needs("polars", "sklearn")
    vectorizer = MiniLMVectorizer(folder)
    frame = pandas.DataFrame({"text": TEXTS}, index=range(20, 0, -1))
    for texts in (
        frame,
        frame["text"],
        frame.to_numpy(),
        polars.DataFrame({"text": TEXTS}),
        polars.Series(TEXTS),
    ):
        np.testing.assert_array_equal(vectorizer.transform(texts), vectors)
    with pytest.raises(InputTypeError, match="X is a DataFrame; pass one column of it"):
        vectorizer.transform(frame.assign(other=TEXTS))


@pytest.mark.parametrize(
    ("texts", "argument", "message"),
    [
        ("one text", "X", "X is a single text; pass a list of texts"),
        (["a", None], "X[1]", r"X\[1\] is None; pass a string"),
        (["a", float("nan")], "X[1]", r"X\[1\] is nan, of type float"),
        ([["a"], ["b"]], "X[0]", r"X\[0\] is \['a'\], of type list"),
        (np.array([["a", "b"]]), "X", r"X has shape \[1, 2\]"),
        (np.zeros((3, 1)), "X[0]", r"X\[0\] is 0.0, of type float"),
        (["a", "\ud800"], "X[1]", r"X\[1\] has a lone surrogate"),
        (None, "X", "X is None"),
    ],
)
def test_what_is_no_text_is_refused(folder: str, texts: Any, argument: str, message: str) -> None:
    vectorizer = MiniLMVectorizer(folder)
    for method in (vectorizer.fit, vectorizer.transform, vectorizer.fit_transform):
        with pytest.raises(InputError, match=message) as caught:
            method(texts)
        assert caught.value.argument == argument


def test_sparse_numbers_are_refused(folder: str) -> None:
    numbers = OneHotEncoder().fit_transform([[1], [2]])
    with pytest.raises(InputTypeError, match=r"X is a sparse csr_\w+ of numbers; pass texts"):
        MiniLMVectorizer(folder).fit(numbers)


def test_no_texts_have_no_vectors(folder: str) -> None:
    assert MiniLMVectorizer(folder, truncate_dim=8).fit_transform([]).shape == (0, 8)


# --- parameters


def test_parameters_reach_the_encoder(folder: str) -> None:
    vectorizer = MiniLMVectorizer(
        folder,
        device="cpu",
        dtype="float64",
        prompt="a man sees ",
        truncation="chunk",
        truncate_dim=8,
        normalize_embeddings=True,
        batch_size=3,
        options={"local_files_only": True},
    )
    encoder = SentenceEncoder.from_pretrained(folder, device="cpu", dtype="float64")
    texts = [*TEXTS, "the dog is out. " * 9]
    expected = encoder.encode(
        texts,
        prompt="a man sees ",
        truncation="chunk",
        truncate_dim=8,
        normalize_embeddings=True,
        batch_size=3,
    )
    found = vectorizer.fit_transform(texts)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, expected)


def test_parameters_count_as_they_are_now(folder: str, loads: list[Any]) -> None:
    vectorizer = MiniLMVectorizer(folder).fit(TEXTS)
    assert vectorizer.transform(TEXTS).shape == (20, 32)
    assert vectorizer.set_params(truncate_dim=8).transform(TEXTS).shape == (20, 8)
    assert len(loads) == 1
    assert vectorizer.set_params(dtype="float64").transform(TEXTS).dtype == np.float64
    assert len(loads) == 2


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"truncation": "cut"}, "truncation is 'cut'"),
        ({"truncate_dim": 0}, "truncate_dim is 0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"prompt": 3}, "prompt is 3"),
        ({"model": 3}, "model is int"),
        ({"options": {"nonsense": 1}}, "there is no option nonsense"),
        ({"options": {"truncate_dim": 8}}, "options has truncate_dim; it is a parameter"),
    ],
)
def test_parameters_are_checked_by_fit(
    folder: str, parameters: dict[str, Any], message: str
) -> None:
    vectorizer = clone(MiniLMVectorizer(**({"model": folder} | parameters)))
    with pytest.raises(InputError, match=message):
        vectorizer.fit(TEXTS)


def test_an_absent_model_is_an_error_of_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        MiniLMVectorizer(str(tmp_path / "absent")).fit(TEXTS)


def test_cut_texts_are_said(folder: str) -> None:
    with pytest.raises(TruncationError):
        MiniLMVectorizer(folder, truncation="error").fit_transform(["the dog " * 20])


# --- what scikit-learn does with a transformer


def test_it_says_what_it_is(folder: str) -> None:
    vectorizer = MiniLMVectorizer(folder)
    tags = get_tags(vectorizer)
    assert (tags.input_tags.string, tags.input_tags.two_d_array) == (True, False)
    assert not tags.requires_fit
    check_is_fitted(vectorizer)
    assert list(vectorizer.get_feature_names_out()) == [f"minilmvectorizer{i}" for i in range(32)]
    vectorizer.set_params(truncate_dim=2)
    assert list(vectorizer.get_feature_names_out()) == ["minilmvectorizer0", "minilmvectorizer1"]
    assert repr(MiniLMVectorizer(truncate_dim=2)) == "MiniLMVectorizer(truncate_dim=2)"


def test_a_pipeline_transforms_before_it_is_fitted(
    folder: str, vectors: np.ndarray[Any, Any]
) -> None:
    np.testing.assert_array_equal(make_pipeline(MiniLMVectorizer(folder)).transform(TEXTS), vectors)


def test_pickles_are_small_and_give_the_same(folder: str, vectors: np.ndarray[Any, Any]) -> None:
    vectorizer = MiniLMVectorizer(folder)
    before = pickle.dumps(vectorizer)
    vectorizer.fit(TEXTS)
    assert pickle.dumps(vectorizer) == before
    assert len(before) < 1000
    np.testing.assert_array_equal(pickle.loads(before).transform(TEXTS), vectors)


def test_an_encoder_is_pickled_and_cloned(tiny_encoder: SentenceEncoder) -> None:
    vectorizer = MiniLMVectorizer(tiny_encoder)
    expected = tiny_encoder.encode(TEXTS)
    np.testing.assert_array_equal(vectorizer.transform(TEXTS), expected)
    for copied in (clone(vectorizer), pickle.loads(pickle.dumps(vectorizer))):
        np.testing.assert_array_equal(copied.transform(TEXTS), expected)


def test_frames_keep_their_index_and_have_names(folder: str, vectors: np.ndarray[Any, Any]) -> None:
    pandas, polars = needs("pandas", "sklearn"), needs("polars", "sklearn")
    vectorizer = MiniLMVectorizer(folder).set_output(transform="pandas")
    texts = pandas.Series(TEXTS, index=range(20, 0, -1))
    frame = vectorizer.fit_transform(texts)
    assert list(frame.index) == list(range(20, 0, -1))
    assert list(frame.columns) == list(vectorizer.get_feature_names_out())
    np.testing.assert_array_equal(frame.to_numpy(), vectors)
    assert isinstance(clone(vectorizer).transform(texts), pandas.DataFrame)
    assert isinstance(vectorizer.set_output(transform="polars").transform(TEXTS), polars.DataFrame)


@pytest.mark.parametrize("column", ["text", ["text"]])
def test_a_column_beside_others(folder: str, column: Any, vectors: np.ndarray[Any, Any]) -> None:
    pandas = needs("pandas", "sklearn")
    frame = pandas.DataFrame({"text": TEXTS, "shop": ["a", "b"] * 10}, index=range(20, 0, -1))
    transformer = make_column_transformer(
        (MiniLMVectorizer(folder), column),
        (OneHotEncoder(sparse_output=False), ["shop"]),
    ).set_output(transform="pandas")
    found = transformer.fit_transform(frame)
    np.testing.assert_array_equal(found.to_numpy()[:, :32], vectors)
    assert list(found.columns[31:]) == [
        "minilmvectorizer__minilmvectorizer31",
        "onehotencoder__shop_a",
        "onehotencoder__shop_b",
    ]


def test_a_search_over_its_parameters_loads_it_once(folder: str, loads: list[Any]) -> None:
    pipeline = make_pipeline(MiniLMVectorizer(folder), LogisticRegression())
    search = GridSearchCV(pipeline, {"minilmvectorizer__truncate_dim": [2, 32]}, cv=2)
    search.fit(TEXTS, LABELS)
    assert loads == [folder]
    assert search.cv_results_["mean_test_score"].tolist() == [
        cross_val_score(
            make_pipeline(MiniLMVectorizer(folder, truncate_dim=width), LogisticRegression()),
            TEXTS,
            LABELS,
            cv=2,
        ).mean()
        for width in (2, 32)
    ]
    assert search.predict(["the dog bites"]).tolist() == [0]


@pytest.mark.process
def test_a_search_in_two_processes_gives_the_same(folder: str) -> None:
    pipeline = make_pipeline(MiniLMVectorizer(folder), LogisticRegression())
    scores = [
        GridSearchCV(pipeline, {"logisticregression__C": [0.1, 10]}, cv=2, n_jobs=n)
        .fit(TEXTS, LABELS)
        .cv_results_["mean_test_score"]
        .tolist()
        for n in (1, 2)
    ]
    assert scores[0] == scores[1]


def test_memory_embeds_the_texts_of_a_fold_once(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = lazy.LazyEncoder.encode

    def counted(self: lazy.LazyEncoder, texts: Any, **options: Any) -> Any:
        encoded.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(lazy.LazyEncoder, "encode", counted)
    texts = [f"{text} {TINY_WORDS[i + 5]}" for i, text in enumerate(TEXTS[:18])]
    totals = {}
    for memory in (None, str(tmp_path)):
        encoded.clear()
        steps = [("texts", MiniLMVectorizer(folder)), ("classes", LogisticRegression())]
        pipeline = Pipeline(steps, memory=memory)
        candidates = {"classes__C": [0.1, 1, 10]}
        GridSearchCV(pipeline, candidates, cv=2, refit=False).fit(texts, LABELS[:18])
        totals[memory] = sum(encoded)
    # 9 texts to train on and 9 to score, in 2 folds, for 3 candidates; with a memory, those to
    # train on once a fold.
    assert totals == {None: 3 * 36, str(tmp_path): 18 + 3 * 18}


# --- the published model on real texts


def test_texts_are_classified(published: Path) -> None:
    training = {
        "weather": [
            "It will rain all afternoon.",
            "Snow is expected in the mountains tonight.",
            "The sun is out and it is warm.",
            "A storm is coming from the west.",
        ],
        "cooking": [
            "Beat the eggs with the sugar.",
            "Let the soup simmer for an hour.",
            "Knead the dough and leave it to rise.",
            "Fry the onions until they are golden.",
        ],
        "football": [
            "She scored in the last minute of the match.",
            "The goalkeeper saved a penalty.",
            "Their coach was sent off the pitch.",
            "The two teams drew one all.",
        ],
    }
    texts = [text for group in training.values() for text in group]
    labels = [label for label, group in training.items() for _ in group]
    classifier = make_pipeline(MiniLMVectorizer(str(published)), LogisticRegression())
    classifier.fit(texts, labels)
    questions = ["Bring an umbrella.", "Add a pinch of salt.", "The striker was offside."]
    assert classifier.predict(questions).tolist() == ["weather", "cooking", "football"]
    groups = make_pipeline(
        MiniLMVectorizer(str(published)), KMeans(3, n_init=10, random_state=0)
    ).fit_predict(texts)
    assert v_measure_score(labels, groups) == 1


def test_the_language_of_real_paragraphs_is_learned(published: Path) -> None:
    path = SHARED / "text" / "udhr_long.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    texts, languages = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        if document["code"] in ("eng", "fra", "deu_1996"):
            paragraphs = document["text"].split("\n")[:30]
            texts += paragraphs
            languages += [document["lang"]] * len(paragraphs)
    vectorizer = MiniLMVectorizer(str(published), truncation="silent")
    scores = cross_val_score(
        make_pipeline(vectorizer, LogisticRegression()), texts, languages, cv=2
    )
    assert len(texts) == 90
    assert scores.mean() > 0.9

"""One reader of vectors: every form is taken, or refused in words, wherever vectors are."""

import array
import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from minilm.errors import InputError, InputTypeError
from minilm.index import Index
from minilm.quantize import quantize_embeddings
from minilm.similarity import cos_sim, pairwise_dot_score
from minilm.tasks import (
    community_detection,
    near_duplicates,
    paraphrase_mining_embeddings,
    quantized_search,
    semantic_search,
)
from minilm.util import normalize_embeddings
from minilm.vectors import as_matrix

ROWS = np.array([[3, 4], [0, 2], [-5, 1]], np.float32)
LABELS = ["first_row", "shape", "dtype"]


class Lazy:
    """As a collection of dask: not computed yet; a column knows the name "columns" too."""

    columns = None

    def __init__(self, data: Any) -> None:
        self.data = data

    def __dask_graph__(self) -> None: ...

    def compute(self) -> Any:
        return self.data


class Arrayed:
    """Anybody's array."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return ROWS


def objects(*rows: Any) -> "np.ndarray[Any, Any]":
    column = np.empty(len(rows), object)
    column[:] = rows
    return column


def memory_mapped(folder: Path) -> Any:
    np.save(folder / "rows.npy", ROWS)
    return np.load(folder / "rows.npy", mmap_mode="r")


def arrow(name: str) -> Any:
    pa = pytest.importorskip("pyarrow")
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(ROWS.reshape(-1), 2)), 2)
    lists = pa.array(ROWS.tolist(), pa.list_(pa.float32()))
    return {
        "slice": fixed[3:],
        "chunked": pa.chunked_array([lists[:2], lists[2:]]),
        "scalars": list(lists),
        "pandas": pd.Series(lists, dtype=pd.ArrowDtype(lists.type), index=LABELS),
        "table": pa.table({"a": [1.0], "b": [2.0]}),
        "null": pa.array([[1.0, 2.0], None]),
        "null inside": pa.array([[1.0, None]]),
        "ragged": pa.array([[1.0], [1.0, 2.0]]),
        "strings": pa.array(["a"]),
    }[name]


def polars(name: str) -> Any:
    pl = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    return {
        "fixed": lambda: pl.Series("v", ROWS, dtype=pl.Array(pl.Float32, 2)),
        "lists": lambda: pl.Series("v", ROWS.tolist(), dtype=pl.List(pl.Float32)),
        "frame": lambda: pl.DataFrame({"columns": ROWS[:, 0], "shape": ROWS[:, 1]}),
        "null": lambda: pl.Series("v", [[1.0, 2.0], None]),
        "lazy": lambda: pl.LazyFrame({"a": [1.0]}),
    }[name]()


FORMS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.tensor(ROWS),
    "tensor that requires grad": lambda: torch.tensor(ROWS, requires_grad=True),
    "bfloat16": lambda: torch.tensor(ROWS).bfloat16(),
    "float16": lambda: ROWS.astype(np.float16),
    "longdouble": lambda: ROWS.astype(np.longdouble),
    "int64": lambda: ROWS.astype(np.int64),
    "masked array, nothing masked": lambda: np.ma.array(ROWS),
    "lists": ROWS.tolist,
    "arrays": lambda: list(ROWS),
    "tensors": lambda: list(torch.tensor(ROWS)),
    "deque": lambda: collections.deque(ROWS.tolist()),
    "buffers": lambda: [array.array("f", row) for row in ROWS],
    "objects": lambda: objects(*ROWS),
    "numbers as objects": lambda: ROWS.astype(object),
    "Series": lambda: pd.Series(list(ROWS), index=LABELS),
    "filtered Series": lambda: pd.Series([ROWS[0], *ROWS])[1:],
    "Series, one label": lambda: pd.Series(list(ROWS), index=[1, 1, 1]),
    "Series, two levels": lambda: pd.Series(list(ROWS), pd.MultiIndex.from_arrays([LABELS] * 2)),
    "Series of lists": lambda: pd.Series(ROWS.tolist(), index=[2, 0, 1]),
    "Series of tensors": lambda: pd.Series(list(torch.tensor(ROWS)), index=[5, 6, 7]),
    "list of Series": lambda: [pd.Series(row, index=[7, 8]) for row in ROWS],
    "frame": lambda: pd.DataFrame(ROWS, index=LABELS, columns=["dtype", "ndim"]),
    "Arrow, a slice": lambda: arrow("slice"),
    "Arrow, chunks": lambda: arrow("chunked"),
    "Arrow, row by row": lambda: arrow("scalars"),
    "Arrow in pandas": lambda: arrow("pandas"),
    "polars, fixed": lambda: polars("fixed"),
    "polars, lists": lambda: polars("lists"),
    "polars frame": lambda: polars("frame"),
    "dask": lambda: Lazy(pd.Series(list(ROWS), index=LABELS)),
    "anybody's": Arrayed,
}

# What takes vectors, and the name it has for them; what each gives must not depend on the form.
READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "cos_sim": ("a", lambda x: cos_sim(x, ROWS)),
    "cos_sim, second": ("b", lambda x: cos_sim(ROWS, x)),
    "pairwise": ("a", lambda x: pairwise_dot_score(x, ROWS)),
    "normalize": ("embeddings", normalize_embeddings),
    "quantize": ("embeddings", lambda x: quantize_embeddings(x, "binary")),
    "ranges": ("ranges", lambda x: quantize_embeddings(ROWS, "int8", ranges=as_ranges(x))),
    "calibration": (
        "calibration_embeddings",
        lambda x: quantize_embeddings(ROWS, "int8", calibration_embeddings=x),
    ),
    "queries": ("query_embeddings", lambda x: ids(semantic_search(x, ROWS))),
    "corpus": ("corpus_embeddings", lambda x: ids(semantic_search(ROWS, x))),
    "mining": ("embeddings", lambda x: [p[1:] for p in paraphrase_mining_embeddings(x)]),
    "communities": ("embeddings", lambda x: community_detection(x, 0.5, 1)),
    "duplicates": ("embeddings", lambda x: [d[:2] for d in near_duplicates(x, 0.5)]),
    "rescoring": (
        "rescore_embeddings",
        lambda x: ids(
            quantized_search(
                ROWS, quantize_embeddings(ROWS, "ubinary"), "ubinary", rescore_embeddings=x
            )
        ),
    ),
}


def as_ranges(x: Any) -> Any:
    """Two of the rows, if it is what the test below gives."""
    rows = as_matrix(x, "ranges").detach()
    return torch.stack([rows.amin(0), rows.amax(0)])


def ids(results: Any) -> list[list[int]]:
    return [[hit["corpus_id"] for hit in hits] for hits in results]


def plain(result: Any) -> Any:
    return result.detach().double().numpy() if isinstance(result, Tensor) else result


@pytest.fixture
def index(tmp_path: Path) -> Callable[[Any], Any]:
    def search(vectors: Any) -> Any:
        made = Index.create(tmp_path / "index", None)
        made.add(vectors, ["a", "b", "c"], fingerprint=None)
        return ids(made.search(vectors, fingerprint=None))

    return search


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_taken_everywhere(form: str, index: Callable[[Any], Any]) -> None:
    for name, (_, reader) in READERS.items():
        found, expected = plain(reader(FORMS[form]())), plain(reader(ROWS))
        if isinstance(expected, list):
            assert found == expected, name
        else:  # half precision changes lengths and cosines by this, at most
            np.testing.assert_allclose(found, expected, atol=0.01, err_msg=name)
    assert index(FORMS[form]()) == [[0, 1, 2], [1, 0, 2], [2, 1, 0]]
    assert torch.equal(as_matrix(FORMS[form](), "x").detach().float(), torch.tensor(ROWS))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "something": (object, "is object; pass a tensor"),
    "text": (lambda: ["a", "b"], "is list; pass a tensor"),
    "mapping": (lambda: {"a": [1.0]}, "is dict; pass a tensor"),
    "ragged": (lambda: [[1.0], [1.0, 2.0]], "is list; pass a tensor"),
    "ragged objects": (lambda: objects(ROWS[0], ROWS[0, :1]), "is ndarray; pass a tensor"),
    "dates": (lambda: np.array(["2020-01-01"], "M8[D]"), "is ndarray; pass a tensor"),
    "structured": (lambda: np.zeros(2, [("a", "f4")]), "is ndarray; pass a tensor"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "it is sparse"),
    "meta": (lambda: torch.zeros(2, 2, device="meta"), "holds no numbers"),
    "a masked number": (lambda: np.ma.array(ROWS, mask=ROWS == 2), r"\[1\] has a masked number"),
    "masked": (lambda: np.ma.masked, "has a masked number"),
    "masked in a list": (lambda: [1.0, np.ma.masked], r"\[1\] has a masked number"),
    "a missing row": (lambda: pd.Series([ROWS[0], None], index=[7, 8]), r"\[1\] is missing"),
    "pandas NA": (lambda: pd.Series([1.0, pd.NA], dtype=object), r"\[1\] is missing"),
    "Arrow table": (lambda: arrow("table"), "is a Table; pass one column of it"),
    "Arrow null": (lambda: arrow("null"), "has nulls among its vectors"),
    "Arrow null inside": (lambda: arrow("null inside"), "has nulls among its vectors"),
    "Arrow ragged": (lambda: arrow("ragged"), "has vectors of 1 and of 2 numbers"),
    "Arrow strings": (lambda: arrow("strings"), "holds string, not lists of numbers"),
    "polars null": (lambda: polars("null"), "has nulls among its vectors"),
    "polars, lazy": (lambda: polars("lazy"), r"not computed yet; collect\(\) it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_vectors_is_refused_everywhere(case: str, index: Callable[[Any], Any]) -> None:
    make, seen = REFUSED[case]
    readers = READERS | {"index": ("embeddings", index)}
    for name, (argument, reader) in readers.items():
        with pytest.raises(InputTypeError, match=seen) as caught:
            reader(make())
        assert caught.value.argument == argument, name
        assert str(caught.value).startswith(f"{argument} "), name


@pytest.mark.parametrize("scalar", [np.array(1.0), torch.tensor(1.0), np.float32(1)])
def test_a_number_is_no_vector(scalar: Any, index: Callable[[Any], Any]) -> None:
    for name, (argument, reader) in (READERS | {"index": ("embeddings", index)}).items():
        if name == "normalize":  # of any number of dimensions
            continue
        with pytest.raises(InputError, match=rf"^{argument} has shape \[\]; pass one vector"):
            reader(scalar)


@pytest.mark.parametrize("make", [lambda x: x, torch.from_numpy, list, pd.DataFrame])
def test_codes_are_told_by_their_dtype(
    make: Callable[[Any], Any], index: Callable[[Any], Any]
) -> None:
    codes = make(ROWS.astype(np.int8))
    for reader in (READERS["quantize"][1], READERS["calibration"][1], index):
        with pytest.raises(InputTypeError, match="is of int8: codes; pass floating-point vectors"):
            reader(codes)
    assert ids(semantic_search(ROWS, codes)) == ids(semantic_search(ROWS, ROWS))


def test_a_memory_mapped_array_stays_where_it_is(tmp_path: Path) -> None:
    mapped = memory_mapped(tmp_path)
    assert as_matrix(mapped, "x").data_ptr() == mapped.ctypes.data
    assert torch.equal(cos_sim(mapped, mapped), cos_sim(ROWS, ROWS))

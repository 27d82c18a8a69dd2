import collections
import logging
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

from minilm.errors import InputError, InputTypeError
from minilm.inputs import (
    as_device,
    as_dtype,
    as_rows,
    as_texts,
    check_choice,
    check_in_range,
    check_positive_int,
    windows,
    with_progress,
)


class Text(str):
    """A str of another class."""

    __slots__ = ()


def refused(error: type[InputError], call: Callable[[], object], argument: str) -> str:
    """The message of an error of exactly this class about this argument."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert caught.value.argument == argument
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# as_texts: what is read

TEXTS = ["zebra", "Café 🦓", ""]
# Labels that would sort the rows, or stand for one of them, or look like a method of a column.
SORTING, LABELS = [2, 0, 1], ["columns", "to_pylist", "column_names"]

COLUMNS: dict[str, Callable[[], Any]] = {
    "list": lambda: TEXTS,
    "tuple": lambda: tuple(TEXTS),
    "generator": lambda: (text for text in TEXTS),
    "iterator": lambda: iter(TEXTS),
    "map": lambda: map(str, TEXTS),
    "deque": lambda: collections.deque(TEXTS),
    "dict values": lambda: dict(enumerate(TEXTS)).values(),
    "dict keys": lambda: dict.fromkeys(TEXTS).keys(),
    "UserList": lambda: collections.UserList(TEXTS),
    "str subclass": lambda: [Text(text) for text in TEXTS],
    "np.str_": lambda: [np.str_(text) for text in TEXTS],
    "numpy <U": lambda: np.array(TEXTS),
    "numpy object": lambda: np.array(TEXTS, dtype=object),
    "numpy StringDType": lambda: np.array(TEXTS, dtype=np.dtypes.StringDType()),
    "numpy reversed view": lambda: np.array(TEXTS[::-1])[::-1],
    "pandas Series": lambda: pd.Series(TEXTS),
    "pandas Series, object": lambda: pd.Series(TEXTS, dtype=object),
    "pandas Series, reordered": lambda: pd.Series(TEXTS, index=SORTING),
    "pandas Series, string index": lambda: pd.Series(TEXTS, index=list("cab")),
    "pandas Series, method names": lambda: pd.Series(TEXTS, index=LABELS),
    "pandas Series, Arrow strings": lambda: pd.Series(TEXTS, dtype="string[pyarrow]"),
    "pandas Series, ArrowDtype": lambda: pd.Series(TEXTS, dtype=pd.ArrowDtype(pa.string())),
    "pandas Series, Arrow, reordered": lambda: pd.Series(
        TEXTS, index=SORTING, dtype="string[pyarrow]"
    ),
    "pandas Series, categories": lambda: pd.Series(TEXTS, dtype="category"),
    "pandas Index": lambda: pd.Index(TEXTS),
    "pandas array": lambda: pd.array(TEXTS, dtype="str"),
    "data frame column": lambda: pd.DataFrame({"text": TEXTS}, index=SORTING)["text"],
    "polars Series": lambda: pl.Series(TEXTS),
    "polars column": lambda: pl.DataFrame({"text": TEXTS})["text"],
    "pyarrow Array": lambda: pa.array(TEXTS),
    "pyarrow large_string": lambda: pa.array(TEXTS, pa.large_string()),
    "pyarrow string_view": lambda: pa.array(TEXTS, pa.string_view()),
    "pyarrow dictionary": lambda: pa.array(TEXTS).dictionary_encode(),
    "pyarrow slice": lambda: pa.array(["no", *TEXTS, "no"]).slice(1, 3),
    "pyarrow ChunkedArray": lambda: pa.chunked_array([TEXTS[:1], TEXTS[1:]]),
    "pyarrow column": lambda: pa.table({"text": TEXTS})["text"],
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_column_is_read_in_positional_order(kind: str) -> None:
    texts, is_single = as_texts(COLUMNS[kind]())
    assert texts == TEXTS
    assert all(isinstance(text, str) for text in texts)
    assert type(texts) is list
    assert is_single is False


@pytest.mark.parametrize(
    "empty",
    [[], (), iter([]), np.array([]), np.array([], dtype=str), pd.Series([], dtype=str),
     pl.Series([], dtype=pl.String), pa.array([], pa.string()), pa.chunked_array([], pa.string())],
    ids=lambda empty: type(empty).__name__,
)  # fmt: skip
def test_empty_column(empty: Any) -> None:
    assert as_texts(empty) == ([], False)


@pytest.mark.parametrize(
    "text",
    ["Café", "", Text("Café"), np.str_("Café"), np.array("Café"), np.array("Café", dtype=object),
     np.array("Café", dtype=np.dtypes.StringDType())],
    ids=lambda text: f"{type(text).__name__}-{text}",
)  # fmt: skip
def test_single_text(text: Any) -> None:
    expected = text.item() if isinstance(text, np.ndarray) else text
    texts, is_single = as_texts(text)
    assert texts == [expected]
    assert isinstance(texts[0], str)
    assert is_single is True


def test_column_of_one_is_no_single_text() -> None:
    assert as_texts(["a"]) == (["a"], False)


def test_list_is_copied() -> None:
    given = ["a", "b"]
    texts, _ = as_texts(given)
    texts.append("c")
    assert given == ["a", "b"]


# as_texts: what is refused as a whole


@pytest.mark.parametrize(
    ("whole", "seen"),
    [
        (None, "None"),
        (np.array(None, dtype=object), "None"),
        (3, "of type int"),
        (1.5, "of type float"),
        (math.nan, "of type float"),
        (True, "of type bool"),
        (b"text", "of type bytes"),
        (np.array(b"text"), "of type bytes"),
        (bytearray(b"text"), "of type bytearray"),
        (memoryview(b"text"), "of type memoryview"),
        (Path("text"), f"of type {type(Path()).__name__}"),
        ({"text": "a"}, "of type dict"),
        (collections.OrderedDict(a="b"), "of type OrderedDict"),
        (pd.NA, "of type NAType"),
        (pa.scalar("text"), "of type StringScalar"),
        (str, "of type type"),
    ],
    ids=lambda value: re.sub(" at 0x.*", "", f"{type(value).__name__}-{value}"[:30]),
)
def test_whole_that_is_no_text(whole: Any, seen: str) -> None:
    message = refused(InputTypeError, lambda: as_texts(whole), "sentences")
    assert message == f"sentences is {seen}; pass a string or an iterable of strings"


@pytest.mark.parametrize("unordered", [{"a"}, frozenset({"a"})])
def test_sets_have_no_order(unordered: Any) -> None:
    message = refused(InputTypeError, lambda: as_texts(unordered), "sentences")
    kind = type(unordered).__name__
    assert message == f"sentences is a {kind}, which has no order; pass a list"


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"text": TEXTS}),
        pl.DataFrame({"text": TEXTS}),
        pl.LazyFrame({"text": TEXTS}),
        pa.table({"text": TEXTS}),
        pa.RecordBatch.from_pydict({"text": TEXTS}),
    ],
    ids=lambda frame: f"{type(frame).__module__.split('.')[0]}-{type(frame).__name__}",
)
# polars warns when the columns of a LazyFrame are looked up.
@pytest.mark.filterwarnings("ignore::polars.exceptions.PerformanceWarning")
def test_data_frame_asks_for_a_column(frame: Any) -> None:
    message = refused(InputTypeError, lambda: as_texts(frame), "sentences")
    assert message == f"sentences is a {type(frame).__name__}; pass one column of it"


@pytest.mark.parametrize(
    ("whole", "shape"),
    [
        (np.array([["a", "b"]]), "[1, 2]"),
        (np.array([["a"]], dtype=object), "[1, 1]"),
        (np.zeros((1, 2, 3)), "[1, 2, 3]"),
        (torch.zeros(2, 2), "[2, 2]"),
        (torch.tensor(1), "[]"),
    ],
)
def test_array_of_another_number_of_dimensions(whole: Any, shape: str) -> None:
    message = refused(InputError, lambda: as_texts(whole), "sentences")
    assert message == f"sentences has shape {shape}; pass a string or an iterable of strings"


# as_texts: a row that is refused


@pytest.mark.parametrize(
    ("value", "seen"),
    [
        (None, "None"),
        (7, "7, of type int"),
        (1.5, "1.5, of type float"),
        (math.nan, "nan, of type float"),
        (False, "False, of type bool"),
        (b"x", "b'x', of type bytes"),
        (["d"], "['d'], of type list"),
        (("d", "e"), "('d', 'e'), of type tuple"),
        ({"d": 1}, "{'d': 1}, of type dict"),
        (Path("d"), f"{Path('d')!r}, of type {type(Path()).__name__}"),
        (pd.NA, "<NA>, of type NAType"),
        (np.int64(7), "np.int64(7), of type int64"),
        (pa.scalar("d"), "<pyarrow.StringScalar: 'd'>, of type StringScalar"),
    ],
    ids=lambda value: re.sub(" at 0x.*", "", f"{type(value).__name__}-{value}"[:30]),
)
def test_row_that_is_no_text(value: Any, seen: str) -> None:
    call = lambda: as_texts(["a", "b", "c", value, None])  # noqa: E731  # the first one counts
    assert refused(InputTypeError, call, "sentences[3]") == (
        f"sentences[3] is {seen}; pass a string"
    )


@pytest.mark.parametrize(
    ("column", "seen"),
    [
        (np.array(["a", None], dtype=object), "None"),
        (np.array(["a", None], dtype=np.dtypes.StringDType(na_object=None)), "None"),
        (np.array(["a", math.nan], dtype=object), "nan, of type float"),
        (pd.Series(["a", math.nan], index=[1, 0]), "nan, of type float"),
        (pd.Series(["a", None], dtype=object), "None"),
        (pd.Series(["a", pd.NA], dtype="string"), "<NA>, of type NAType"),
        (pd.Series(["a", None], dtype="string[pyarrow]"), "<NA>, of type NAType"),
        (pd.Series(["a", 3], dtype=object), "3, of type int"),
        (pl.Series(["a", None]), "None"),
        (pa.array(["a", None]), "None"),
        (pa.chunked_array([["a"], [None]], pa.string()), "None"),
        ((text for text in ["a", None]), "None"),
    ],
    ids=lambda value: f"{type(value).__module__.split('.')[0]}-{value}"[:30].replace("\n", " "),
)
def test_row_of_a_column_that_is_missing(column: Any, seen: str) -> None:
    message = refused(InputTypeError, lambda: as_texts(column), "sentences[1]")
    assert message == f"sentences[1] is {seen}; pass a string"


@pytest.mark.parametrize(
    ("column", "seen"),
    [
        (np.array([b"a"]), "np.bytes_(b'a'), of type bytes_"),
        (np.array([1, 2]), "np.int64(1), of type int64"),
        (torch.tensor([1, 2]), "tensor(1), of type Tensor"),
        (pd.Series([1, 2]), "1, of type int"),
        (pl.Series([1, 2]), "1, of type int"),
        (pa.array([1, 2]), "1, of type int"),
        (pa.array([b"a"]), "b'a', of type bytes"),
        (range(2), "0, of type int"),
        ([["a", "b"], ["c"]], "['a', 'b'], of type list"),
    ],
    ids=lambda value: f"{type(value).__module__.split('.')[0]}-{value}"[:30].replace("\n", " "),
)
def test_column_of_something_else(column: Any, seen: str) -> None:
    message = refused(InputTypeError, lambda: as_texts(column), "sentences[0]")
    assert message == f"sentences[0] is {seen}; pass a string"


@pytest.mark.parametrize(
    ("texts", "seen"),
    [
        (np.ma.array(["a", "b"], mask=[False, True]), "masked, of type MaskedConstant"),
        (["a", np.ma.masked], "masked, of type MaskedConstant"),
        (["a", np.array("b")], "array('b', dtype='<U1'), of type ndarray"),
    ],
)
def test_row_without_a_length(texts: Any, seen: str) -> None:
    readers: list[Callable[[], Any]] = [
        lambda: as_rows(texts, "queries"),
        lambda: as_texts(texts, "queries"),
        lambda: list(windows(texts, 2, "queries")),
    ]
    for read in readers:
        message = refused(InputTypeError, read, "queries[1]")
        assert message == f"queries[1] is {seen}; pass a string"


class DaskColumn(collections.UserList[str]):
    """As a column of dask, which gives its rows and has the attributes of a frame."""

    columns, ndim, shape = ("text",), 1, (math.nan,)

    def __dask_graph__(self) -> None: ...


def test_a_column_with_the_attributes_of_a_frame_is_a_column() -> None:
    column = DaskColumn(TEXTS)
    assert as_texts(column) == (TEXTS, False)
    assert as_rows(column) == (TEXTS, False)
    assert list(windows(column, 2)) == [TEXTS[:2], TEXTS[2:]]


def test_long_value_is_shortened() -> None:
    message = refused(InputTypeError, lambda: as_texts([b"x" * 1000]), "sentences[0]")
    assert message == f"sentences[0] is b'{'x' * 35}..., of type bytes; pass a string"


def test_argument_has_the_callers_name() -> None:
    for whole, argument in ((None, "queries"), ({"a"}, "queries"), ([None], "queries[0]")):
        call = lambda value=whole: as_texts(value, "queries")  # noqa: E731
        assert refused(InputTypeError, call, argument).startswith(f"{argument} is")


def test_error_of_a_generator_passes_through() -> None:
    def texts() -> Any:
        yield "a"
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        as_texts(texts())


# check_positive_int


@pytest.mark.parametrize("value", [1, 32, 10**30, np.int64(3), np.uint8(200)])
def test_positive_int(value: Any) -> None:
    checked = check_positive_int(value, "batch_size")
    assert checked == value
    assert type(checked) is int


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, np.float32(2), "3", None, [1]])
def test_no_int(value: Any) -> None:
    message = refused(InputTypeError, lambda: check_positive_int(value, "batch_size"), "batch_size")
    assert message == f"batch_size is {value!r}; pass a positive integer"


@pytest.mark.parametrize("value", [0, -1, np.int8(-128)])
def test_int_that_is_not_positive(value: Any) -> None:
    message = refused(InputError, lambda: check_positive_int(value, "batch_size"), "batch_size")
    assert message == f"batch_size is {value}; pass a positive integer"


# check_in_range


@pytest.mark.parametrize("value", [3, 4, 512, np.int64(512)])
def test_int_in_range(value: Any) -> None:
    checked = check_in_range(value, 3, 512, "limit")
    assert checked == value
    assert type(checked) is int


@pytest.mark.parametrize("value", [1, 2, 513, 10**30, np.int16(513)])
def test_int_outside_of_the_range(value: Any) -> None:
    message = refused(InputError, lambda: check_in_range(value, 3, 512, "limit"), "limit")
    assert message == f"limit is {value}; pass an integer from 3 to 512"


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, InputError), (-5, InputError), (True, InputTypeError), (4.0, InputTypeError),
     ("4", InputTypeError), (None, InputTypeError)],
)  # fmt: skip
def test_no_positive_int_in_a_range(value: Any, error: type[InputError]) -> None:
    message = refused(error, lambda: check_in_range(value, 3, 512, "limit"), "limit")
    assert message == f"limit is {value!r}; pass a positive integer"


# windows


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [["a"], ["b"], ["c"], ["d"], ["e"]]),
        (2, [["a", "b"], ["c", "d"], ["e"]]),
        (5, [["a", "b", "c", "d", "e"]]),
        (100, [["a", "b", "c", "d", "e"]]),
    ],
)
def test_windows(size: int, expected: list[list[str]]) -> None:
    assert list(windows(list("abcde"), size)) == expected
    assert list(windows((letter for letter in "abcde"), size)) == expected
    assert list(windows([], size)) == []


def test_windows_read_no_further_than_they_must() -> None:
    taken = []

    def texts() -> Any:
        for letter in "abcde":
            taken.append(letter)
            yield letter

    reading = windows(texts(), 2)
    assert taken == []
    next(reading)
    assert taken == ["a", "b"]
    next(reading)
    assert taken == ["a", "b", "c", "d"]


@pytest.mark.parametrize("kind", COLUMNS)
def test_windows_of_a_column(kind: str) -> None:
    assert list(windows(COLUMNS[kind](), 2)) == [TEXTS[:2], TEXTS[2:]]


@pytest.mark.parametrize(
    ("whole", "error", "seen"),
    [
        ("text", InputTypeError, "is a single text; pass an iterable of texts"),
        (np.str_("text"), InputTypeError, "is a single text; pass an iterable of texts"),
        (None, InputTypeError, "is None; pass a string or an iterable of strings"),
        ({"a"}, InputTypeError, "is a set, which has no order; pass a list"),
        ({"a": 1}, InputTypeError, "is of type dict; pass a string or an iterable of strings"),
        (pd.DataFrame({"text": TEXTS}), InputTypeError, "is a DataFrame; pass one column of it"),
        (
            np.array([["a"]]),
            InputError,
            "has shape [1, 1]; pass a string or an iterable of strings",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_whole_that_has_no_windows(whole: Any, error: type[InputError], seen: str) -> None:
    message = refused(error, lambda: list(windows(whole, 2, "queries")), "queries")
    assert message == f"queries {seen}"


@pytest.mark.parametrize(
    ("value", "error", "seen"),
    [
        (None, InputTypeError, "is None; pass a string"),
        (7, InputTypeError, "is 7, of type int; pass a string"),
        ("x\udfff", InputError, "has a lone surrogate, '\\udfff', at character 1"),
    ],
)
def test_row_of_a_later_window(value: Any, error: type[InputError], seen: str) -> None:
    reading = windows(iter(["a", "b", "c", "d", value]), 2, "queries")
    assert next(reading) == ["a", "b"]
    assert next(reading) == ["c", "d"]
    assert refused(error, lambda: next(reading), "queries[4]").startswith(f"queries[4] {seen}")


def test_error_between_two_windows_passes_through() -> None:
    def texts() -> Any:
        yield from "abc"
        raise ZeroDivisionError("mine")

    reading = windows(texts(), 2)
    assert next(reading) == ["a", "b"]
    with pytest.raises(ZeroDivisionError, match="mine"):
        next(reading)


# with_progress


def test_progress_shows_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    batches = [[1, 2], [3]]
    assert with_progress(batches, False) is batches
    assert with_progress(batches, None) is batches
    assert capsys.readouterr().err == ""
    assert list(with_progress(batches, True)) == batches
    shown = capsys.readouterr().err
    assert "Batches" in shown
    assert "2/2" in shown


@pytest.mark.parametrize(
    ("level", "shows"),
    [(logging.DEBUG, True), (logging.INFO, True), (logging.WARNING, False)],
)
def test_progress_follows_the_level_of_the_package(
    capsys: pytest.CaptureFixture[str], level: int, shows: bool
) -> None:
    logger = logging.getLogger("minilm")
    before = logger.level
    logger.setLevel(level)
    try:
        assert list(with_progress([[1]], None)) == [[1]]
        assert ("Batches" in capsys.readouterr().err) == shows
        assert list(with_progress([[1]], not shows)) == [[1]]
        assert ("Batches" in capsys.readouterr().err) == (not shows)
    finally:
        logger.setLevel(before)


# check_choice


def test_choice() -> None:
    assert check_choice("b", ["a", "b"], "kind") == "b"
    message = refused(InputError, lambda: check_choice("c", ["a", "b"], "kind"), "kind")
    assert message == "kind is 'c'; pass one of a, b"


# as_device


def test_device() -> None:
    assert as_device("cpu") == torch.device("cpu")
    assert as_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_default_device(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, best: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert as_device(None) == torch.device(best)


@pytest.mark.parametrize("name", ["nope", "", "CPU", "cpu:x"])
def test_unknown_device(name: str) -> None:
    message = refused(InputError, lambda: as_device(name), "device")
    assert message.startswith(f"device is {name!r}, which torch {torch.__version__} can't use here")
    assert message.endswith("; pass 'cpu', or None for the best one there is")
    assert "\n" not in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_device_that_is_absent(device: str | torch.device) -> None:
    message = refused(InputError, lambda: as_device(device), "device")
    assert message.startswith(f"device is '{device}', which torch")
    assert "\n" not in message


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_device_that_computes_nothing(device: str | torch.device) -> None:
    message = refused(InputError, lambda: as_device(device), "device")
    assert message == "device is 'meta', which computes nothing; pass 'cpu'"


@pytest.mark.parametrize("device", [True, 1.5, b"cpu", ["cpu"]])
def test_device_of_another_type(device: Any) -> None:
    message = refused(InputTypeError, lambda: as_device(device), "device")
    assert message == (
        f"device is {device!r}, of type {type(device).__name__}; "
        "pass a name such as 'cpu' or 'cuda:0'"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device 0 here")
def test_number_is_a_cuda_device() -> None:
    message = refused(InputError, lambda: as_device(0), "device")
    assert message.startswith("device is 'cuda:0', which torch ")


# as_dtype


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_dtype(name: str) -> None:
    dtype = getattr(torch, name)
    assert as_dtype(name) is dtype
    assert as_dtype(f"torch.{name}") is dtype
    assert as_dtype(dtype) is dtype


def test_default_dtype() -> None:
    assert as_dtype(None) is torch.float32


@pytest.mark.parametrize(
    "dtype",
    ["int8", torch.int8, "float8_e4m3fn", torch.float8_e4m3fn, "double", "", "Float32", "bool",
     np.float32, float, 32, ["float32"]],
    ids=str,
)  # fmt: skip
def test_dtype_that_is_not_supported(dtype: Any) -> None:
    message = refused(InputError, lambda: as_dtype(dtype), "dtype")
    name = str(dtype).removeprefix("torch.")
    assert message == f"dtype is {name!r}; pass one of float64, float32, float16, bfloat16"


def test_a_warning_that_is_an_error_is_no_lack_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*_: Any, **__: Any) -> None:
        warnings.warn("the driver is old", UserWarning, stacklevel=1)

    monkeypatch.setattr(torch, "empty", warn)
    with pytest.raises(UserWarning, match="the driver is old"):
        as_device("cpu")

"""LanceDB: what it takes for vectors, and by which distance it compares them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from written import Written, check_search, run_line, tool

lancedb = tool("lancedb")
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


def nearest(table: Any, query: Any, distance: str | None = None) -> tuple[list[int], list[float]]:
    search = table.search(query)
    if distance:
        search = search.distance_type(distance)
    found = search.limit(3).to_arrow()
    return found["id"].to_pylist(), found["_distance"].to_pylist()


def test_cosine(written: Written, tmp_path: Path) -> None:
    table = run_line("LanceDB", written, tmp_path)["table"]
    vectors, cosines = written.vectors, written.distances("cosine")
    check_search(lambda row: nearest(table, vectors[row], "cosine"), cosines)
    check_search(lambda row: nearest(table, vectors[row]), 2 * cosines)  # the square of L2


def test_distance_is_doubled_behind_a_quantized_index(written: Written, tmp_path: Path) -> None:
    from lancedb.index import IvfSq

    table = run_line("LanceDB", written, tmp_path)["table"]
    table.create_index("embedding", config=IvfSq(distance_type="cosine", num_partitions=1))
    exact = written.distances("cosine")
    rows, said = nearest(table, written.vectors[7], "cosine")
    np.testing.assert_allclose(said, 2 * exact[7, rows], rtol=0.01, atol=0.001)


def test_float16_and_bits(written: Written, tmp_path: Path) -> None:
    db = lancedb.connect(tmp_path / "db")
    half = db.create_table("half", written.table("float16"))
    exact = written.distances("cosine", "float16")
    rows = written.codes["float16"]
    check_search(lambda row: nearest(half, rows[row], "cosine"), exact, 1e-3)
    bits = db.create_table("bits", written.table("ubinary"))
    check_search(
        lambda row: nearest(bits, written.codes["ubinary"][row]),
        written.distances("hamming", "ubinary"),
    )


def test_uint8_is_searched_by_bits_whatever_is_asked(written: Written, tmp_path: Path) -> None:
    table = lancedb.connect(tmp_path / "db").create_table("t", written.table("uint8"))
    x, codes = written.vectors, written.codes["uint8"]
    check_search(lambda row: nearest(table, codes[row]), written.distances("hamming", "uint8"))
    found = [nearest(table, query) for query in (x[7], -x[7], x[8])]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_int8_is_no_vector(written: Written, tmp_path: Path, precision: str) -> None:
    table = lancedb.connect(tmp_path / "db").create_table("t", written.table(precision))
    with pytest.raises(ValueError, match="no vector column"):
        nearest(table, written.codes[precision][0])

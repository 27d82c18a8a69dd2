"""Indexes of vectors: FAISS, USearch, hnswlib, Voyager, NGT, ScaNN."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from written import Array, Written, check_search, run_line, tool

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


def test_faiss(written: Written, tmp_path: Path) -> None:
    faiss = tool("faiss")
    x = written.vectors
    index = run_line("FAISS", written, tmp_path, x=x)["index"]

    def search(index: Any, rows: Array, row: int, sign: int) -> tuple[list[int], list[float]]:
        distances, found = index.search(rows[row : row + 1], 3)
        return found[0], sign * distances[0]

    check_search(lambda row: search(index, x, row, -1), -written.distances("dot"))
    bits = faiss.IndexBinaryFlat(384)
    codes = written.codes["ubinary"]
    bits.add(codes)
    exact = written.distances("hamming", "ubinary")
    check_search(lambda row: search(bits, codes, row, 1), exact)
    with pytest.raises(TypeError, match="uint8, but found int8"):
        bits.add(written.codes["binary"])


def usearch_of(rows: Array, threads: int = 1, **options: Any) -> Any:
    index = tool("usearch.index").Index(ndim=384, **options)
    index.add(np.arange(len(rows)), rows, threads=threads)
    return index


def matches(index: Any, query: Array) -> tuple[list[int], list[float]]:
    found = index.search(query, 3)
    return found.keys.tolist(), found.distances.tolist()


def test_usearch(written: Written, tmp_path: Path) -> None:
    x = written.vectors
    index = run_line("USearch", written, tmp_path, x=x)["index"]
    check_search(lambda row: matches(index, x[row]), written.distances("cosine"))
    codes = written.codes["int8"]
    of_codes = usearch_of(codes, metric="cos", dtype="i8")
    exact = written.distances("cosine", "int8")
    check_search(lambda row: matches(of_codes, codes[row]), exact)


def test_usearch_takes_binary_for_numbers(written: Written) -> None:
    exact = written.distances("hamming", "ubinary")
    bits, signed = written.codes["ubinary"], written.codes["binary"]
    options: dict[str, Any] = {"metric": "hamming", "dtype": "b1"}
    right = usearch_of(bits, **options)
    check_search(lambda row: matches(right, bits[row]), exact)
    viewed = usearch_of(signed.view(np.uint8), **options)  # all 128 less are one bit less
    check_search(lambda row: matches(viewed, signed[row].view(np.uint8)), exact)
    assert np.array_equal(signed.view(np.uint8) ^ 128, bits)
    wrong = usearch_of(signed, **options)
    said = [matches(wrong, signed[row])[1][1] for row in range(0, len(bits), 25)]
    assert not np.array_equal(said, np.sort(exact[::25], axis=1)[:, 1])


@pytest.mark.skipif(os.cpu_count() == 1, reason="threads don't run at once")
def test_usearch_loses_rows_that_several_threads_add(written: Written) -> None:
    bits = written.codes["ubinary"]

    def lost(threads: int) -> int:
        index = usearch_of(bits, threads, metric="hamming", dtype="b1")
        return sum(matches(index, bits[row])[0][0] != row for row in range(len(bits)))

    assert lost(1) == 0
    assert any(lost(4) for _ in range(200))


def test_hnswlib(written: Written, tmp_path: Path) -> None:
    x = written.vectors
    index = run_line("hnswlib", written, tmp_path, x=x)["index"]

    def search(row: int) -> tuple[list[int], list[float]]:
        found, distances = index.knn_query(x[row], 3)
        return found[0].astype(int), distances[0]

    check_search(search, written.distances("cosine"))


def test_voyager(written: Written, tmp_path: Path) -> None:
    x = written.vectors
    found = run_line("Voyager", written, tmp_path, x=x)
    voyager = found["voyager"]

    def search(index: Any, row: int) -> tuple[list[int], list[float]]:
        rows, distances = index.query(x[row], k=3)
        return rows.astype(int), distances

    check_search(lambda row: search(found["index"], row), written.distances("cosine"))
    own = {}
    for kind in ("Float8", "E4M3"):
        index = voyager.Index(
            voyager.Space.Cosine, 384, storage_data_type=getattr(voyager.StorageDataType, kind)
        )
        index.add_items(x)
        own[kind] = np.mean([search(index, row)[1][0] for row in range(len(x))])
    assert own["Float8"] == pytest.approx(0.1, abs=0.02)
    assert abs(own["E4M3"]) < 0.02


def test_ngt(written: Written, tmp_path: Path) -> None:
    x = written.vectors
    found = run_line("NGT", written, tmp_path, x=x)
    ngtpy = found["ngtpy"]

    def search(index: Any, query: Array) -> Any:
        return zip(*index.search(query, 3), strict=True)

    check_search(lambda row: tuple(search(found["index"], x[row])), written.distances("cosine"))

    def of_bytes(rows: Array) -> Any:
        path = str(tmp_path / str(rows.dtype))
        ngtpy.create(path, dimension=384, distance_type="L2", object_type="Byte")
        index = ngtpy.Index(path)
        index.batch_insert(rows)
        return index

    codes, exact = written.codes["uint8"], written.distances("l2", "int8")
    right = of_bytes(codes)
    check_search(lambda row: tuple(search(right, codes[row])), exact)
    wrong, signed = of_bytes(written.codes["int8"]), written.codes["int8"]
    _, distances = search(wrong, signed[7])
    assert distances[1] > 3 * np.sort(exact[7])[1]


def test_scann(written: Written, tmp_path: Path) -> None:
    x = written.vectors
    index = run_line("ScaNN", written, tmp_path, x=x)["index"]

    def search(row: int) -> tuple[list[int], list[float]]:
        found, products = index.search(x[row])
        return found.astype(int), -products

    check_search(search, -written.distances("dot"))

"""SQLite with sqlite-vec and with sqlite-vector: distances, bits and codes."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from written import Array, Written, check_search, run_line, tool

apsw = tool("apsw")  # Python's own sqlite3 is often built without extensions


@pytest.fixture
def db() -> Any:
    """An empty database that takes extensions."""
    connection = apsw.Connection(":memory:")
    connection.enable_load_extension(True)
    return connection


@pytest.fixture
def vec(db: Any) -> Any:
    tool("sqlite_vec").load(db)
    return db


@pytest.fixture
def vector(db: Any) -> Any:
    tool("sqlite_vector")
    spec = importlib.util.find_spec("sqlite_vector")
    assert spec is not None
    (folder, *_) = spec.submodule_search_locations or []
    library = next(path for path in Path(folder).rglob("vector.*") if path.suffix != ".py")
    db.load_extension(str(library))
    return db


def nearest(db: Any, value: str, query: Array) -> tuple[list[int], list[float]]:
    """By sqlite-vec, in its table t: `value` is the query in SQL, with a ?."""
    sql = f"SELECT rowid, distance FROM t WHERE v MATCH {value} AND k = 3 ORDER BY distance"
    found = db.execute(sql, (query.tobytes(),)).fetchall()
    return [row for row, _ in found], [distance for _, distance in found]


def fill(db: Any, column: str, value: str, rows: Array) -> None:
    db.execute(f"CREATE VIRTUAL TABLE t USING vec0(v {column})")
    db.executemany(
        f"INSERT INTO t(rowid, v) VALUES (?, {value})",
        ((number, row.tobytes()) for number, row in enumerate(rows)),
    )


def test_vec_cosine(written: Written, vec: Any, tmp_path: Path) -> None:
    run_line("sqlite-vec", written, tmp_path, db=vec, x=written.vectors)
    check_search(lambda row: nearest(vec, "?", written.vectors[row]), written.distances("cosine"))


def test_vec_distance_by_default(written: Written, vec: Any) -> None:
    fill(vec, "float[384]", "?", written.vectors)
    check_search(lambda row: nearest(vec, "?", written.vectors[row]), written.distances("l2"), 1e-3)


def test_vec_int8(written: Written, vec: Any) -> None:
    codes = written.codes["int8"]
    fill(vec, "int8[384] distance_metric=cosine", "vec_int8(?)", codes)
    exact = written.distances("cosine", "int8")
    check_search(lambda row: nearest(vec, "vec_int8(?)", codes[row]), exact)
    sql = "SELECT vec_quantize_int8(?, 'unit')"
    ((own,),) = vec.execute(sql, (written.vectors[7].tobytes(),)).fetchall()
    scale = np.abs(codes[7]).max() / np.abs(np.frombuffer(own, np.int8).astype(int)).max()
    assert scale == pytest.approx(384 / 127, rel=0.1)  # but for its rounding towards 0


def test_vec_bits(written: Written, vec: Any) -> None:
    bits, exact = written.codes["ubinary"], written.distances("hamming", "ubinary")
    fill(vec, "bit[384]", "vec_bit(?)", bits)
    check_search(lambda row: nearest(vec, "vec_bit(?)", bits[row]), exact)
    # Its own bits are counted from the lowest.
    rows, distances = nearest(vec, "vec_quantize_binary(?)", written.vectors[7])
    assert rows[0] != 7
    assert distances[0] > 100
    sql = "SELECT vec_distance_hamming(vec_bit(?), vec_quantize_binary(?))"
    turned = np.packbits(np.unpackbits(bits[7]), bitorder="little")
    for own, expected in ((bits[7], range(100, 300)), (turned, [0])):
        ((distance,),) = vec.execute(sql, (own.tobytes(), written.vectors[7].tobytes())).fetchall()
        assert distance in expected


def scanned(
    db: Any, query: Array, count: int = 3, scan: str = "full"
) -> tuple[list[int], list[float]]:
    """By sqlite-vector."""
    sql = f"SELECT rowid, distance FROM vector_{scan}_scan('t', 'v', ?, {count})"
    found = db.execute(sql, (query.tobytes(),)).fetchall()
    return [row for row, _ in found], [distance for _, distance in found]


def test_vector_cosine(written: Written, vector: Any, tmp_path: Path) -> None:
    x = written.vectors
    run_line("sqlite-vector", written, tmp_path, db=vector, x=x)
    check_search(lambda row: scanned(vector, x[row]), written.distances("cosine"))
    # A second call changes nothing.
    vector.execute("SELECT vector_init('t', 'v', 'type=FLOAT32,dimension=384,distance=DOT')")
    check_search(lambda row: scanned(vector, x[row]), written.distances("cosine"))


def test_vector_uint8_is_shifted(written: Written, vector: Any, tmp_path: Path) -> None:
    x, exact = written.vectors, written.distances("cosine")
    run_line("sqlite-vector", written, tmp_path, db=vector, x=x)
    ratios = {}
    for kind in ("INT8", "UINT8"):
        vector.execute(f"SELECT vector_quantize('t', 'v', 'qtype={kind}')").fetchall()
        said = [scanned(vector, x[row], 10, "quantize") for row in range(0, len(x), 25)]
        rows = range(0, len(x), 25)
        ratios[kind] = np.median(
            [
                distance / exact[row, found]
                for row, (near, distances) in zip(rows, said, strict=True)
                for found, distance in zip(near, distances, strict=True)
                if found != row
            ]
        )
    assert ratios["INT8"] == pytest.approx(1, abs=0.02)
    assert ratios["UINT8"] < 0.5

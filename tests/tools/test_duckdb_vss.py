"""DuckDB with its index, vss: which distance is served by it."""

from pathlib import Path
from typing import Any

import pytest

from written import Written, check_search, run_line, tool

duckdb = tool("duckdb")
vss = tool("duckdb_extension_vss")


@pytest.fixture
def database(written: Written, tmp_path: Path) -> Any:
    """The line of the table, on a connection of its own."""
    connection = duckdb.connect()
    (extension,) = Path(vss.__file__).parent.rglob("vss.duckdb_extension")
    connection.execute(f"LOAD '{extension}'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duckdb, "sql", connection.sql)
        run_line("DuckDB, vss", written, tmp_path)
    connection.execute("CREATE INDEX i ON t USING HNSW (v) WITH (metric = 'cosine')")
    return connection


@pytest.mark.parametrize(
    ("order", "by_index"),
    [
        ("array_cosine_distance(v, {q})", True),
        ("v <=> {q}", False),
        ("array_cosine_similarity(v, {q}) DESC", False),
    ],
)
def test_index_serves_one_function_only(
    written: Written, database: Any, order: str, by_index: bool
) -> None:
    expression = order.removesuffix(" DESC")

    def query(row: int) -> str:
        q = f"{written.vectors[row].tolist()}::FLOAT[384]"
        return f"SELECT id, {expression.format(q=q)} FROM t ORDER BY {order.format(q=q)} LIMIT 3"

    plan = database.execute(f"EXPLAIN {query(0)}").fetchall()[0][1]
    assert ("HNSW_INDEX_SCAN" in plan) is by_index

    def search(row: int) -> tuple[list[int], list[float]]:
        found = database.execute(query(row)).fetchall()
        said = [1 - x if "similarity" in order else x for _, x in found]
        return [row for row, _ in found], said

    check_search(search, written.distances("cosine"))

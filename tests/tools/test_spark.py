"""Spark, on one core of this machine."""

import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from written import Written, run_line, tool

pyspark = tool("pyspark.sql")
if shutil.which("java") is None:
    pytest.skip("needs a Java runtime", allow_module_level=True)
pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Spark is started: to what its paths are relative."""
    return tmp_path_factory.mktemp("spark")


@pytest.fixture(scope="module")
def session(folder: Path) -> Iterator[Any]:
    builder = pyspark.SparkSession.builder.master("local[1]").config("spark.ui.enabled", "false")
    builder = builder.config("spark.driver.bindAddress", "127.0.0.1")
    builder = builder.config("spark.driver.host", "127.0.0.1")
    with chdir(folder):
        started = builder.getOrCreate()
    started.sparkContext.setLogLevel("OFF")
    yield started
    started.stop()


@pytest.mark.parametrize("name", ["kind", "KIND"])
def test_path_takes_the_place_of_a_column(
    session: Any, written: Written, tmp_path: Path, name: str
) -> None:
    shutil.copytree(written.file("vectors"), tmp_path / f"{name}=x")
    found = session.read.parquet(str(tmp_path)).select("kind").distinct().collect()
    assert [row[0] for row in found] == ["x"]  # "sentence" is in the files


def test_line_reads_what_was_written(session: Any, written: Written, folder: Path) -> None:
    x = run_line("Spark", written, folder)["x"]
    assert x.dtype == np.float32
    assert np.array_equal(x, written.vectors)


def test_rows_come_in_any_order(session: Any, written: Written) -> None:
    rows = session.read.parquet(str(written.file("vectors"))).select("id").collect()
    assert sorted(row.id for row in rows) == list(range(len(written.texts)))


def test_float16_is_refused(session: Any, written: Written) -> None:
    with pytest.raises(Exception, match="FLOAT16"):
        session.read.parquet(str(written.file("float16"))).collect()


def test_bytes_become_short_integers(session: Any, written: Written) -> None:
    rows = session.read.parquet(str(written.file("uint8")))
    assert rows.schema["embedding"].dataType.simpleString() == "array<smallint>"
    read = [row.embedding for row in rows.orderBy("id").collect()]
    assert np.array_equal(read, written.codes["uint8"])


def test_writing_again_drops_the_fingerprint(
    session: Any, written: Written, tmp_path: Path
) -> None:
    session.read.parquet(str(written.file("vectors"))).write.parquet(str(tmp_path / "again"))
    parquet = tool("pyarrow.parquet")
    (part, *_) = (tmp_path / "again").glob("*.parquet")
    assert b"minilm.fingerprint" not in parquet.read_schema(part).metadata

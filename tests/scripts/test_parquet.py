"""The comparison of Parquet settings, on a few vectors."""

import pytest

import parquet


def test_every_way_is_written_and_read(capsys: pytest.CaptureFixture[str]) -> None:
    parquet.measure(50, 1)
    out = capsys.readouterr().out
    assert out.startswith("50 vectors in parts of 4,096 rows; pyarrow ")
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[:2]] == ["| settings", "| now"]
    assert len(lines) == 9
    assert "with checksums of pages: pyarrow reads it" in out

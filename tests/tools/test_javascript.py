"""JavaScript reads the parts: hyparquet and parquet-wasm, in Node."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from written import Written, rows_of_table

PACKAGES = Path(sys.prefix) / "node_modules"
if shutil.which("node") is None or not (PACKAGES / "parquet-wasm").is_dir():
    pytest.skip("needs Node and its packages: scripts/test_tools", allow_module_level=True)
pytestmark = pytest.mark.process

IMPORTS = {
    "hyparquet": """
import { asyncBufferFromFile, parquetReadObjects } from 'hyparquet'
import { compressors } from 'hyparquet-compressors'
""",
    "parquet-wasm": """
import { readFileSync } from 'node:fs'
import { tableFromIPC } from 'apache-arrow'
import { readParquet } from 'parquet-wasm'
""",
}


def read(tool: str, part: Path, folder: Path, expression: str) -> Any:
    """What an expression is, after the tool's line of the table has read a part."""
    (row,) = [row for row in rows_of_table() if row.tool == tool]
    program = folder / "read.mjs"
    then = f"console.log(JSON.stringify({expression}))"
    program.write_text(f"{IMPORTS[tool]}const path = process.argv[2]\n{row.line}\n{then}\n")
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(PACKAGES)
    command = ["node", str(program), str(part)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "uint8", "ubinary"])
@pytest.mark.parametrize("tool", IMPORTS)
def test_line_reads_parts(written: Written, tmp_path: Path, tool: str, precision: str) -> None:
    parts = sorted(written.file("vectors" if precision == "float32" else precision).iterdir())
    expression = "rows.map(row => [row.text, [...row.embedding]])"
    rows = [row for part in parts for row in read(tool, part, tmp_path, expression)]
    assert [text for text, _ in rows] == written.texts
    vectors = np.array([vector for _, vector in rows], np.float32)
    assert np.array_equal(vectors, written.codes[precision])


def test_float16_as_an_array_is_raw_bytes_in_apache_arrow(written: Written, tmp_path: Path) -> None:
    part = min(written.file("float16").iterdir())
    found = read("parquet-wasm", part, tmp_path, "[...rows[0].embedding.toArray()]")
    assert np.array_equal(np.array(found, np.uint16), written.codes["float16"][0].view(np.uint16))

"""JavaScript reads the parts: hyparquet, in Node."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from written import Written, rows_of_table

PACKAGES = Path(sys.prefix) / "node_modules"
if shutil.which("node") is None or not (PACKAGES / "hyparquet").is_dir():
    pytest.skip("needs Node and hyparquet: scripts/test_tools", allow_module_level=True)
pytestmark = pytest.mark.process

PROGRAM = """
import { asyncBufferFromFile, parquetReadObjects } from 'hyparquet'
import { compressors } from 'hyparquet-compressors'
const path = process.argv[2]
LINE
console.log(JSON.stringify(rows.map(row => [...row.embedding])))
"""


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "uint8", "ubinary"])
def test_hyparquet(written: Written, tmp_path: Path, precision: str) -> None:
    (row,) = [row for row in rows_of_table() if row.tool == "hyparquet"]
    program = tmp_path / "read.mjs"
    program.write_text(PROGRAM.replace("LINE", row.line))
    (tmp_path / "node_modules").symlink_to(PACKAGES)
    folder = written.file("vectors" if precision == "float32" else precision)
    read = []
    for part in sorted(folder.glob("*.parquet")):
        done = subprocess.run(
            ["node", str(program), str(part)], capture_output=True, text=True, check=True
        )
        read += json.loads(done.stdout)
    assert np.array_equal(np.array(read, np.float32), written.codes[precision])

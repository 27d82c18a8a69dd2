"""The files that `minilm encode` writes, of some hundred real sentences, and the table of who
reads them.

The tests in `tools/` give the files to the programs that people use, by the lines of the table in
`minilm/files/README.md`, and hold what it says of each: the numbers that come in, the distance, and
the trap. `scripts/test_tools` runs them in an environment that has these programs; a test without
its program is skipped.
"""

import ast
import json
import re
from collections.abc import Callable, Iterable
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import DATA, ROOT
from minilm import SentenceEncoder, cli, quantize_embeddings
from minilm.quantize import model_ranges

Array = np.ndarray[Any, Any]

TABLE = ROOT / "minilm" / "files" / "README.md"
_ROWS_OF_A_PART = "100"  # so that there are several


def tool(module: str) -> Any:
    """A program's package, imported; where it is not installed, the test that asks is skipped."""
    reason = f"needs {module}: scripts/test_tools"
    return pytest.importorskip(module, reason=reason, exc_type=ImportError)


@dataclass(frozen=True)
class Written:
    """What is written, as it is asked for, and what must be in it.

    Attributes:
        texts: n texts. Folders have their numbers too, as `id`.
        vectors: float32 `[n, 384]`, of length 1.
        codes: By precision, the numbers that are in the folder of that name.
    """

    texts: list[str]
    vectors: Array
    codes: dict[str, Array]
    _path: Path = field(repr=False)
    _model: Path = field(repr=False)

    def file(self, name: str) -> Path:
        """The path of "vectors", a folder in float32; of a folder named like its precision; or of
        a single file, "vectors.npy" and so on.
        """
        path = self._path / name
        if not path.exists():
            command = ["encode", str(self._path / "rows.jsonl"), "-o", str(path)]
            command += ["--model", str(self._model), "--device", "cpu", "--truncation", "silent"]
            if not path.suffix:
                precision = "float32" if name == "vectors" else name
                command += ["--precision", precision, "--shard-rows", _ROWS_OF_A_PART]
                command += ["--row-number", "id"]
            assert cli.main(command) == 0
        return path

    def table(self, precision: str) -> Any:
        """The folder of that precision as a `pyarrow.Table`."""
        name = "vectors" if precision == "float32" else precision
        return tool("pyarrow.parquet").read_table(self.file(name))

    def distances(self, kind: str, precision: str = "float32") -> Array:
        """The exact distances of all rows from all, float64 `[n, n]`.

        Args:
            kind: "cosine": 1 - cos; "dot": the dot product; "l2"; "hamming": how many bits differ.
            precision: Of which numbers.
        """
        rows = self.codes[precision]
        if kind == "hamming":
            bits: Array = np.bitwise_count(rows[:, None] ^ rows[None]).sum(axis=2)
            return bits.astype(float)
        exact = rows.astype(np.float64)
        products: Array = exact @ exact.T
        squares = products.diagonal()
        if kind == "dot":
            return products
        if kind == "l2":
            lengths: Array = np.sqrt(np.maximum(squares[:, None] + squares - 2 * products, 0))
            return lengths
        cosines: Array = products / np.sqrt(squares[:, None] * squares)
        return 1 - cosines


def write(encoder: SentenceEncoder, model: Path, path: Path) -> Written:
    """Write into a folder, with the encoder of `model`."""
    texts, vectors = _real_sentences(encoder)
    assert len(texts) > 200
    rows = [json.dumps({"kind": "sentence", "text": text}) for text in texts]
    (path / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    codes = {"float32": vectors, "float16": vectors.astype(np.float16)}
    for precision in ("int8", "uint8"):
        codes[precision] = quantize_embeddings(vectors, precision, model_ranges())
    for precision in ("binary", "ubinary"):
        codes[precision] = quantize_embeddings(vectors, precision)
    return Written(texts, vectors, codes, path, model)


def _real_sentences(encoder: SentenceEncoder) -> tuple[list[str], Array]:
    """Everyday sentences, and passages in many languages, none of them nearly another."""
    lines = (DATA / "parity_texts.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    kinds = ("everyday", "declaration", "article")
    texts = [row["text"] for row in rows if row["kind"].startswith(kinds)]
    texts = [text for text in texts if len(text) < 160]
    vectors = encoder.encode(texts, truncation="silent")
    near = np.triu(vectors @ vectors.T, 1).max(axis=0) > 0.98
    kept = np.flatnonzero(~near)
    return [texts[row] for row in kept], vectors[kept]


def check_search(
    search: Callable[[int], tuple[Iterable[int], Iterable[float]]],
    exact: Array,
    tolerance: float = 1e-5,
) -> None:
    """A search finds a row's own first, and then the nearest, at the distances that it should say.

    Args:
        search: Gives the rows nearest to a row, and their distances.
        exact: The distances, `[n, n]`.
        tolerance: By how much a distance may differ.
    """
    for row in range(0, len(exact), 25):
        found, said = (np.array(list(each)) for each in search(row))
        assert found[0] == row
        assert len(found) > 1
        np.testing.assert_allclose(said, exact[row, found], rtol=tolerance, atol=tolerance)
        nearest = np.sort(exact[row])[: len(found)]
        np.testing.assert_allclose(said, nearest, rtol=tolerance, atol=tolerance)


# --- The table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    tool: str
    form: str
    line: str
    distance: str
    trap: str
    tried: str


def rows_of_table() -> list[Row]:
    lines = TABLE.read_text(encoding="utf-8").split("| tool |")[1].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        code = re.search("`(.*)`", cells[2])
        assert code, line
        rows.append(Row(cells[0], cells[1], code[1], *cells[3:]))
    return rows


def run_line(name: str, written: Written, folder: Path, **names: Any) -> dict[str, Any]:
    """Run a tool's line of the table, in a folder that has the files which it names.

    Args:
        name: The tool.
        written: Where the files are.
        folder: An empty folder.
        names: What the line is given.

    Returns:
        The names that it set, and those that it was given.
    """
    (row,) = [row for row in rows_of_table() if row.tool == name]
    for found in re.findall(r"""["'](vectors(?:\.\w+)?)\b""", row.line):
        there = folder / found
        if not there.exists():
            there.symlink_to(written.file(found))
    for statement in ast.parse(row.line).body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                tool(alias.name)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            tool(statement.module)
    scope = dict(names)
    with chdir(folder):
        exec(compile(row.line, str(TABLE), "exec"), scope)
    return scope

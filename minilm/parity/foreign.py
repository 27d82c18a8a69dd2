"""Vectors that another program made: read from its file, or asked of an ONNX model.

In: a path. Out: `ForeignVectors`, texts and their vectors. Next: `causes.py` says why they are not
ours.

NumPy, torch and onnxruntime are imported only when they are used, so that the command line answers
`--help` at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.disk import check_header, parse_json
from minilm.errors import InputError, MissingPackageError, errors_of_libraries
from minilm.files.rows import DEFAULT_COLUMN, Reader, as_floats, check_numbers
from minilm.files.tables import SUFFIXES, VECTOR_FIELDS, read_table

if TYPE_CHECKING:
    import numpy as np

    from minilm.encoder import SentenceEncoder

__all__ = ["ForeignVectors", "read_texts", "read_vectors", "run_onnx"]

_BATCH = 32  # texts that an ONNX model is given at a time, padded to the longest of them
_SENTENCE_OUTPUTS = ("sentence_embedding", "sentence_embeddings")
_TOKEN_OUTPUTS = ("token_embeddings", "last_hidden_state")


@dataclass(frozen=True)
class ForeignVectors:
    """Texts, and the vectors that another program gave for them.

    Attributes:
        texts: n texts.
        vectors: Floating point `[n, d]`.
    """

    texts: list[str]
    vectors: "np.ndarray[Any, Any]"


def read_texts(path: Path, column: str | None = None) -> list[str]:
    """Read the texts of a file, at least one, as `files.tables.read_table` does.

    Args:
        path: The file.
        column: The name of the text in it.

    Raises:
        InputError: It is empty, or as in `read_table`.
        OSError: The file can't be read.
    """
    texts = read_table([str(path)], column).texts
    if not texts:
        raise InputError(f"{path}: is empty; give one text a line", "--texts")
    return texts


def read_vectors(
    path: Path,
    texts: Sequence[str] | None = None,
    *,
    default: Sequence[str] | None = None,
    column: str | None = None,
    argument: str = "--against",
) -> ForeignVectors:
    """Read the vectors that a program wrote, with their texts where the file has them.

    Args:
        path: Its suffix says what it is. `.npy`: an array `[n, d]`. `.npz`: the array
            `embeddings` (or the only one), and `texts_json`, as `minilm encode` writes it, or
            `texts`. `.safetensors`: likewise, the texts as metadata. `.jsonl`: objects with `text`
            and `embedding`. `.csv`: a heading, then rows in which the columns 0, 1, 2, ... are the
            numbers, else all behind the text. `.parquet`: a column of texts, and one of lists of
            numbers; of what this package wrote, a null is the empty text.
        texts: The texts of a file that has none.
        default: The texts of such a file if `texts` is not given.
        column: The name of the text in `.jsonl`, `.csv` and `.parquet`, by default "text", or the
            only one beside the vectors; in a `.csv` without columns 0, 1, 2, ... the first.
        argument: What to call the file in an error.

    Raises:
        InputError: The file is of another form or broken, has texts of its own beside `texts` or
            none at all, or not as many texts as vectors; or one of its texts is not a string.
        OSError: The file can't be read.
    """
    import numpy as np

    readers = {
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    read = readers.get(path.suffix.lower())
    if read is None:
        raise InputError(
            f"{path}: has no suffix of {', '.join(SUFFIXES)}, .parquet, .onnx; name it after its "
            "form",
            argument,
        )
    with errors_of_libraries(
        lambda why: InputError(f"{path}: is not a file of vectors: {why}", argument)
    ):
        own, rows = read(path, column)
        vectors = np.asarray(rows)
        if vectors.dtype.kind not in "fiu":
            raise ValueError(f"holds {vectors.dtype}, not numbers")
        vectors = vectors.astype(np.promote_types(vectors.dtype, np.float32))
    if vectors.ndim != 2 or not vectors.size:
        shape = list(vectors.shape)
        raise InputError(f"{path}: holds an array {shape}, expected one row a text", argument)
    if own is not None and texts is not None:
        raise InputError(f"{path}: has texts of its own; leave --texts out", "--texts")
    known = own if own is not None else default if texts is None else texts
    if known is None:
        raise InputError(f"{path}: has no texts; pass --texts FILE", "--texts")
    if len(known) != len(vectors):
        whose = "the golden texts are" if known is default else "there are"
        hint = "; pass --texts FILE" if known is default else ""
        raise InputError(
            f"{path}: holds {len(vectors)} vectors, but {whose} {len(known)}{hint}", argument
        )
    return ForeignVectors(list(known), vectors)


def _read_npy(path: Path, column: str | None) -> tuple[list[str] | None, Any]:
    from minilm.files.arrays import read_npy

    return None, read_npy(path)


def _read_npz(path: Path, column: str | None) -> tuple[list[str] | None, Any]:
    from minilm.files.arrays import open_npz

    with open_npz(path) as archive:
        texts = None
        if "texts_json" in archive:
            texts = _strings("texts_json", parse_json(archive["texts_json"]().tobytes()))
        elif "texts" in archive:
            texts = _strings("texts", archive["texts"]().tolist())
        names = [name for name in archive if name != "texts" and not name.endswith("_json")]
        only = names[0] if len(names) == 1 else "embeddings"
        name = next((name for name in VECTOR_FIELDS if name in names), only)
        return texts, archive[name]()


def _read_safetensors(path: Path, column: str | None) -> tuple[list[str] | None, Any]:
    import safetensors

    with path.open("rb") as start:
        check_header(start)
    with safetensors.safe_open(path, "np") as file:
        names = list(file.keys())
        name = next((name for name in VECTOR_FIELDS if name in names), names[0])
        texts = (file.metadata() or {}).get("texts_json")
        own = None if texts is None else _strings("texts_json", parse_json(texts))
        return own, file.get_tensor(name)


def _strings(name: str, texts: Any) -> list[str]:
    if not isinstance(texts, list):
        raise ValueError(f"{name} is of type {type(texts).__name__}, not a list")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}[{row}] is {repr(text)[:40]}, not a string")
    return texts


def _read_jsonl(path: Path, column: str | None) -> tuple[list[str] | None, Any]:
    def beside(names: Sequence[str]) -> Sequence[str]:
        return [name for name in names if name not in VECTOR_FIELDS]

    texts: list[str] = []
    vectors: list[Any] = []
    for line, text, row in Reader(column, candidates=beside).good_rows(str(path)):
        vector = next((row[name] for name in VECTOR_FIELDS if name in row), None)
        if not isinstance(vector, list):
            raise ValueError(f"line {line} has no list of numbers under {VECTOR_FIELDS[0]!r}")
        check_numbers(vector, line)
        if vectors and len(vector) != len(vectors[0]):
            raise ValueError(f"line {line} has {len(vector)} numbers, the first {len(vectors[0])}")
        texts.append(text)
        vectors.append(vector)
    return texts, vectors


def _read_csv(path: Path, column: str | None) -> tuple[list[str] | None, Any]:
    def others(names: Sequence[str]) -> Sequence[str]:
        numbers = _numbered(names)
        if not numbers and DEFAULT_COLUMN not in names:  # another program's
            return names[:1]
        return [name for name in names if name not in numbers]

    texts: list[str] = []
    vectors: list[list[float]] = []
    reader = Reader(column, candidates=others)
    names: Sequence[str] = ()
    for line, text, row in reader.good_rows(str(path)):
        if not texts:
            assert reader.column is not None
            heading = list(row)
            names = _numbered(heading) or heading[heading.index(reader.column) + 1 :]
        try:
            vectors.append(as_floats([row[name] for name in names]))
        except ValueError as error:
            raise ValueError(f"line {line}: {error}") from error
        texts.append(text)
    return texts, vectors


def _numbered(names: Sequence[str]) -> list[str]:
    """The names 0, 1, 2, ... as far as they go: columns with the numbers of a vector."""
    known = set(names)
    return list(takewhile(known.__contains__, map(str, count())))


def _read_parquet(path: Path, column: str | None) -> tuple[list[str] | None, Any]:
    from minilm.files.arrow import (
        import_pyarrow,
        text_column,
        texts_of,
        vector_column,
        vectors_of,
    )

    import_pyarrow("reading Parquet files")
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(path)
    name = vector_column(schema, str(path))
    texts = text_column(schema, column, str(path), name)
    table = pyarrow.parquet.read_table(path, columns=[texts, name])
    return texts_of(table, texts, str(path)), vectors_of(table, name, str(path))


def run_onnx(
    path: Path, encoder: "SentenceEncoder", texts: Sequence[str], *, session: Any = None
) -> ForeignVectors:
    """Ask an ONNX export of the model for the vectors of some texts.

    It is given the ids of our tokenizer, cut at our limit, in padded batches of 32, or in the one
    shape that it takes. If it gives token vectors they are pooled by our modules.

    Args:
        path: The `.onnx` file.
        encoder: Our model.
        texts: n texts.
        session: An `onnxruntime.InferenceSession`, or an object that behaves as one; by default
            one for `path` on the processor.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        InputError: The file can't be loaded or run, or has no output that could be an embedding.
    """
    import numpy as np
    import torch

    if session is None:
        session = _session(path)
    tokenizer = encoder.get_tokenizer()
    inputs = {each.name: list(each.shape) for each in session.get_inputs()}
    if "input_ids" not in inputs:
        raise InputError(f"{path}: takes {', '.join(inputs)}, expected input_ids", "--against")
    rows, width = (
        size if isinstance(size, int) else None for size in [*inputs["input_ids"], None, None][:2]
    )
    ids = tokenizer(texts, min(encoder.max_seq_length, width or encoder.max_seq_length)).input_ids
    name = _output(path, session, encoder.bert.config.hidden_size)
    vectors = []
    size = rows or _BATCH
    for start in range(0, len(ids), size):
        batch = ids[start : start + size]
        count = len(batch)
        batch = batch + [batch[-1]] * (rows - count if rows else 0)
        features = tokenizer.pad([*batch, [0] * width] if width else batch)
        feed = {
            # The row of full width was only there to pad to it.
            key: features[key][: len(batch)].numpy()
            for key in inputs
            if key in features
        }
        with errors_of_libraries(_refusal(path, "can't be run")):
            (output,) = session.run([name], feed)
        found = torch.from_numpy(np.asarray(output)).float()[:count]
        if found.dim() == 3:  # [batch, tokens, 384] -> [batch, 384]
            mask = features["attention_mask"][:count]
            found = encoder.normalize(encoder.pooling(found, mask))
        vectors.append(found.numpy())
    return ForeignVectors(list(texts), np.concatenate(vectors))


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("comparing with an ONNX model", "onnxruntime", "onnx") from error
    if not path.is_file():
        raise InputError(f"{path}: no such file", "--against")
    with errors_of_libraries(_refusal(path, "is not an ONNX model")):
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _refusal(path: Path, problem: str) -> Callable[[str], InputError]:
    return lambda why: InputError(f"{path}: {problem}: {why.splitlines()[0]}", "--against")


def _output(path: Path, session: Any, hidden_size: int) -> str:
    """The name of the output to take: one that is named for a sentence's or for tokens' vectors,
    else one of their shape.
    """
    outputs: dict[str, list[Any]] = {each.name: list(each.shape) for each in session.get_outputs()}
    for name in (*_SENTENCE_OUTPUTS, *_TOKEN_OUTPUTS):
        if name in outputs:
            return name
    for rank in (3, 2):
        for name, shape in outputs.items():
            if len(shape) == rank and (shape[-1] == hidden_size or not isinstance(shape[-1], int)):
                return name
    found = ", ".join(f"{name} {shape}" for name, shape in outputs.items())
    raise InputError(f"{path}: none of its outputs is an embedding: {found}", "--against")

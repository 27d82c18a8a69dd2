"""What `fuzz.py` damages, how it is read, and what it says to a plain reader.

A target writes good files, all of them small. `read` has this package read them. Where a damaged
file gives another result, `justifies` reads the file in the plainest way, with nothing of this
package: a file that is well formed and says just that is another file, and not misread. It refuses
what is ambiguous, such as a key that is there twice.
"""

import ast
import csv
import functools
import hashlib
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy  # before memory is limited
import safetensors.torch
import torch

from conftest import TINY, load, write_model_folder
from damage import OUTSIDE
from minilm import SentenceEncoder
from minilm.files.records import read_fingerprint
from minilm.files.shards import ShardFolder
from minilm.files.sources import read_shards, survey
from minilm.files.stored import read_vectors as read_stored
from minilm.files.streaming import encode_files
from minilm.files.tables import Table, read_table, write_table
from minilm.index import Index
from minilm.parity.check_folder import check_folder
from minilm.parity.foreign import read_vectors
from minilm.parity.golden import GoldenText, compare_stages_file, write_golden
from minilm.pretrained.checkpoint import published_name

__all__ = ["TARGETS", "ReportedError", "Target"]

TEXTS = ["the dog bites the man", "a cat", "", "the sun is out!", "cafe, run walks", "a man sees"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
QUERIES = ["the cat sees the sun", "walking"]

Result = Any


class ReportedError(Exception):
    """What a function that checks files reported of them; it raises no error for that."""


@dataclass(frozen=True)
class Target:
    """Files that are damaged one at a time.

    Attributes:
        name: What they are, for the table.
        files: Their names in the folder.
        write: Writes them, whole, into an empty folder.
        read: Reads the folder with this package.
        justifies: Says whether a result that differs from that of the whole files is what the
            damaged ones say; an exception is a no. None where nothing but the result of the whole
            files is right, since their hashes are kept with them.
    """

    name: str
    files: tuple[str, ...]
    write: Callable[[Path], object]
    read: Callable[[Path], Result]
    justifies: Callable[[Path, Result], bool] | None = None


# --- plain readers


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def plain_json(data: bytes | str) -> Any:
    return json.loads(data, object_pairs_hook=_object)


def plain_safetensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The dtype, shape and bytes of every tensor; the metadata as a tensor of none."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = plain_json(data[8:end])
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for name, each in header.items():
        if name == "__metadata__":
            found[name] = (json.dumps(each, sort_keys=True), (), b"")
            continue
        first, last = each["data_offsets"]
        if not 0 <= first <= last <= len(data) - end:
            raise ValueError("offsets beyond the end")
        found[name] = each["dtype"], tuple(each["shape"]), data[end + first : end + last]
    return found


_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def plain_npy(data: bytes) -> np.ndarray[Any, Any]:
    start = 10 if data[6] == 1 else 12
    size = int.from_bytes(data[8:start], "little")
    header = ast.literal_eval(data[start : start + size].decode("latin-1"))
    if set(header) != {"descr", "fortran_order", "shape"}:
        raise ValueError("other fields")
    flat = np.frombuffer(data, np.dtype(header["descr"]), offset=start + size)
    return flat.reshape(header["shape"], order="F" if header["fortran_order"] else "C")


# --- a model's folder


def _write_model(folder: Path) -> None:
    write_model_folder(folder / "model")
    (folder / OUTSIDE).mkdir()
    (folder / OUTSIDE / "model.safetensors").write_bytes(
        (folder / "model" / "model.safetensors").read_bytes()
    )
    own = {"prompts": {"query": "the ", "document": ""}, "default_prompt_name": None,
           "similarity_fn_name": "cosine", "truncate_dim": None}  # fmt: skip
    _put(folder / "model" / "config_sentence_transformers.json", own)
    _put(folder / "model" / "special_tokens_map.json", {"pad_token": "[PAD]", "unk_token": "[UNK]"})
    _put(folder / "model" / "added_tokens.json", {"[MASK]": 4})
    (folder / "model" / "2_Normalize").mkdir()
    _put(folder / "model" / "2_Normalize" / "config.json", {})


def _write_shards(folder: Path) -> None:
    _write_model(folder)
    path = folder / "model" / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, those in halves.items():
        part = {name: tensors[name] for name in those}
        (path.parent / file).write_bytes(safetensors.torch.save(part))
    weight_map = {name: file for file, those in halves.items() for name in those}
    _put(path.with_name("model.safetensors.index.json"), {"weight_map": weight_map})
    path.unlink()


def _write_vocabulary(folder: Path) -> None:
    _write_model(folder)
    path = folder / "model" / "tokenizer.json"
    vocab = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    path.with_name("vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    path.unlink()


def _put(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _read_model(folder: Path) -> Result:
    encoder = SentenceEncoder.from_pretrained(folder / "model", device="cpu")
    tokenizer = encoder.tokenizer
    assert tokenizer is not None
    vectors = encoder.encode([*TEXTS, *QUERIES], truncation="silent")
    state = encoder.bert.state_dict()
    return {
        "config": vars(encoder.bert.config),
        "weights": {published_name(name): _bytes(each) for name, each in state.items()},
        "vocab": tokenizer.backend.get_vocab(with_added_tokens=True),
        "ids": tokenizer([*TEXTS, *QUERIES]).input_ids,
        "pooling": type(encoder.pooling).__name__,
        "normalize": type(encoder.normalize).__name__,
        "limit": encoder.max_seq_length,
        "prompts": encoder.prompts,
        "truncate_dim": encoder.truncate_dim,
        "vectors": (str(vectors.dtype), vectors.shape, vectors.tobytes()),
    }


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.float().contiguous().numpy().tobytes()


def _model_says(folder: Path, result: Result) -> bool:
    """Whether a model is as its files say, as far as a plain reader can tell."""
    model = folder / "model"

    def file(name: str) -> Any:
        path = model / name
        return plain_json(path.read_bytes()) if path.is_file() else {}

    stages = {each["type"].rpartition(".")[2]: each["path"] for each in file("modules.json")}
    config, tokenizer = file("config.json"), file("tokenizer.json")
    pooling = file(f"{stages['Pooling']}/config.json")
    if any(result["config"][name] != config.get(name, default) for name, default in
           vars(TINY).items()):  # fmt: skip
        return False
    paths = sorted(model.glob("*.safetensors"))
    tensors: dict[str, Any] = {}
    for path in paths:
        tensors |= plain_safetensors(path.read_bytes())
    for name, found in result["weights"].items():
        dtype, _, data = next(
            tensors[old] for prefix in ("", "bert.", "0.auto_model.")
            if (old := prefix + name) in tensors
        )  # fmt: skip
        if dtype == "BF16":
            wide = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            wide = np.frombuffer(data, _FLOATS[dtype]).astype(np.float32)
        if wide.tobytes() != found:
            return False
    if tokenizer and not result["vocab"].items() >= tokenizer["model"]["vocab"].items():
        return False
    flags = ("pooling_mode_cls_token", "pooling_mode_mean_tokens")
    is_cls = "cls" in (pooling.get("pooling_mode"), pooling.get(flags[0]) and "cls")
    normalizes = "Normalize" in stages
    prompts = file("config_sentence_transformers.json").get("prompts") or {}
    vectors = np.frombuffer(result["vectors"][2], np.float32)
    return bool(
        result["pooling"] == ("ClsPooling" if is_cls else "MeanPooling")
        and result["normalize"] == ("Normalize" if normalizes else "Identity")
        and result["prompts"].items() >= {k: v or "" for k, v in prompts.items()}.items()
        and np.isfinite(vectors).all()
    )


def _of_model(name: str, *files: str, write: Callable[[Path], object] = _write_model) -> Target:
    return Target(name, tuple(f"model/{each}" for each in files), write, _read_model, _model_says)


# --- vectors of another program, and the record beside them


@functools.cache
def _encoder() -> Any:
    """The tiny model."""
    with tempfile.TemporaryDirectory() as place:
        return load(write_model_folder(Path(place) / "model"))


VECTOR_FILES = ("v.npy", "v.npz", "v.safetensors", "v.jsonl", "v.ndjson", "v.csv", "v.parquet")


def _write_vectors(folder: Path) -> None:
    encoder = _encoder()
    vectors = encoder.encode(TEXTS)[:, :4].copy()
    record = encoder.fingerprint(truncate_dim=4).to_json()
    table = Table(TEXTS, ROWS)
    for name in VECTOR_FILES[:-1]:
        if not name.endswith(".ndjson"):
            write_table(folder / name, table, vectors, record)
    (folder / "v.ndjson").write_bytes((folder / "v.jsonl").read_bytes())
    _write_parquet(folder / "v.parquet", vectors, record)


def _write_parquet(path: Path, vectors: np.ndarray[Any, Any], record: str) -> None:
    import pyarrow
    import pyarrow.parquet

    from minilm.files.arrow import embedding_array, with_fingerprint

    columns = {"text": pyarrow.array(TEXTS), "embedding": embedding_array(vectors)}
    pyarrow.parquet.write_table(with_fingerprint(pyarrow.table(columns), record), path)


def _read_vectors(folder: Path) -> Result:
    found = {}
    for name in VECTOR_FILES:
        known = TEXTS if name == "v.npy" else None
        foreign = read_vectors(folder / name, known)
        vectors = foreign.vectors
        found[name] = foreign.texts, str(vectors.dtype), vectors.shape, vectors.tobytes()
    return found


def _read_stored(folder: Path) -> Result:
    found = {}
    for name in STORED_FILES:
        rows, vectors = read_stored(folder / name)
        found[name] = repr(list(rows)), str(vectors.dtype), vectors.shape, vectors.tobytes()
    return found


STORED_FILES = tuple(name for name in VECTOR_FILES if name != "v.ndjson")


def _stored_say(folder: Path, result: Result) -> bool:
    for name, (rows, *vectors) in result.items():
        said = _PLAIN_ROWS[Path(name).suffix]((folder / name).read_bytes())
        if rows == "[]" and not said[0]:  # no row, and so no vector
            continue
        if (rows, *vectors) != (repr(said[0]), *_numbers(said[1], np.float32)):
            return False
    return True


def _vectors_say(folder: Path, result: Result) -> bool:
    for name, (texts, *vectors) in result.items():
        if not all(isinstance(text, str) for text in texts):
            return False
        said = _PLAIN[Path(name).suffix]((folder / name).read_bytes())
        if (texts, *vectors) != (TEXTS if said[0] is None else said[0], *_numbers(said[1], None)):
            return False
    return True


def _numbers(vectors: Any, dtype: type | None) -> tuple[str, tuple[int, ...], bytes]:
    """The dtype, shape and bytes of numbers, by default at least as wide as float32."""
    array = np.asarray(vectors)
    if array.dtype.kind not in "fiu":
        raise ValueError("no numbers")
    with np.errstate(over="ignore"):  # what float32 can't hold is infinite in it, as IEEE 754 says
        array = array.astype(dtype or np.promote_types(array.dtype, np.float32))
    return str(array.dtype), array.shape, array.tobytes()


_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*", re.ASCII)


def _number(text: str) -> float:
    """A decimal number, or nan or inf as programs write them; nothing that overflows."""
    if text.strip().lower() in ("nan", "inf", "-inf", "infinity", "-infinity"):
        return float(text)
    if not _NUMBER.fullmatch(text) or not np.isfinite(float(text)):
        raise ValueError("not a number")
    return float(text)


def _jsonl_rows(data: bytes) -> tuple[list[Any], Any]:
    rows, vectors = [], []
    for line in data.decode("utf-8-sig").split("\n"):
        if line.strip():
            row = json.loads(line, object_pairs_hook=_object, parse_float=_number)
            vector = row.pop(next(each for each in _NAMES if isinstance(row.get(each), list)))
            if any(type(each) not in (int, float) for each in vector):
                raise ValueError("no numbers")
            rows.append(row)
            vectors.append(vector)
    return rows, vectors


def _plain_jsonl(data: bytes) -> tuple[list[str], Any]:
    rows, vectors = _jsonl_rows(data)
    texts = []
    for row in rows:
        others = [each for each in row if each not in _NAMES]
        texts.append(row[others[0] if len(others) == 1 else "text"])
    return texts, vectors


_NAMES = ("embedding", "embeddings", "vector", "vectors")


def _csv_lines(data: bytes) -> list[list[str]]:
    return [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), "")) if row]


def _plain_csv(data: bytes) -> tuple[list[str], Any]:
    heading, *rows = _csv_lines(data)
    places: list[int] = []
    while str(len(places)) in heading:
        places.append(heading.index(str(len(places))))
    others = [name for i, name in enumerate(heading) if i not in places]
    text = heading.index("text" if "text" in heading else others[0])
    places = places or list(range(text + 1, len(heading)))
    return [row[text] for row in rows], [[_number(row[place]) for place in places] for row in rows]


def _csv_rows(data: bytes) -> tuple[list[Any], Any]:
    lines = _csv_lines(data)
    rows = [_object(list(zip(lines[0], line, strict=True))) for line in lines[1:]]
    vectors = []
    for row in rows:
        width = next(number for number in range(len(row) + 1) if str(number) not in row)
        vectors.append([_number(row.pop(str(number))) for number in range(width)])
    return rows, vectors


def _archive(data: bytes) -> Any:
    """An archive, from which a reader takes what it needs: the rest may be broken."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise ValueError("a name is there twice")
    return archive


def _plain_npz(data: bytes) -> tuple[list[str] | None, Any]:
    archive = _archive(data)
    every = [name.removesuffix(".npy") for name in archive.namelist()]
    texts = None
    if "texts_json" in every:
        texts = plain_json(plain_npy(archive.read("texts_json.npy")).tobytes())
    elif "texts" in every:
        texts = plain_npy(archive.read("texts.npy")).tolist()
    names = [name for name in every if name != "texts" and not name.endswith("_json")]
    name = next((name for name in _NAMES if name in names), names[0])
    return texts, plain_npy(archive.read(f"{name}.npy"))


def _npz_rows(data: bytes) -> tuple[list[Any], Any]:
    archive = _archive(data)
    texts = plain_json(plain_npy(archive.read("texts_json.npy")).tobytes())
    rows = texts
    if "rows_json.npy" in archive.namelist():
        rows = plain_json(plain_npy(archive.read("rows_json.npy")).tobytes())
    return _with_texts(rows, texts), plain_npy(archive.read("embeddings.npy"))


def _with_texts(rows: Any, texts: Any) -> list[Any]:
    objects = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not all(text in row.values() for row, text in zip(objects, texts, strict=True)):
        raise ValueError("a text is not that of its row")
    return objects


def _safetensors_rows(data: bytes) -> tuple[list[Any], Any]:
    tensors = plain_safetensors(data)
    metadata = json.loads(tensors["__metadata__"][0])
    texts = plain_json(metadata["texts_json"])
    rows = plain_json(metadata.get("rows_json", "null")) or texts
    if "text_column" in metadata:
        rows = [_object([*row.items(), (metadata["text_column"], text)])
                for row, text in zip(rows, texts, strict=True)]  # fmt: skip
    return _with_texts(rows, texts), _tensor(tensors["embeddings"])


def _plain_vectors(data: bytes) -> tuple[list[str] | None, Any]:
    tensors = plain_safetensors(data)
    metadata = json.loads(tensors.pop("__metadata__", ("{}",))[0]) or {}  # null is none
    name = next((each for each in _NAMES if each in tensors), next(iter(tensors)))
    texts = plain_json(metadata["texts_json"]) if "texts_json" in metadata else None
    return texts, _tensor(tensors[name])


def _tensor(tensor: tuple[str, tuple[int, ...], bytes]) -> Any:
    dtype, shape, numbers = tensor
    kinds = {**_FLOATS, "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
             "U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64}  # fmt: skip
    return np.frombuffer(numbers, kinds[dtype]).reshape(shape)


def _parquet(data: bytes) -> tuple[Any, str, Any]:
    """A table, which of its columns holds vectors, and these."""
    import pyarrow
    import pyarrow.parquet

    # `read_table` would take a dot in a name for a field within a column.
    table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data)).read()
    kinds = pyarrow.types
    lists = [each.name for each in table.schema if kinds.is_fixed_size_list(each.type)
             or kinds.is_list(each.type)]  # fmt: skip
    name = next((each for each in _NAMES if each in lists), lists[0])
    column = table.column(name)
    vectors = column.to_pylist()
    if None in vectors or any(None in row for row in vectors):
        raise ValueError("null")
    array = np.array(vectors, column.type.value_type.to_pandas_dtype())
    # The numbers themselves: a Python float doesn't keep every bit of a NaN.
    flat = [chunk.flatten().to_numpy() for chunk in column.chunks] or [array]
    return table, name, np.concatenate(flat, dtype=array.dtype).reshape(array.shape)


def _plain_parquet(data: bytes) -> tuple[list[str], Any]:
    table, name, vectors = _parquet(data)
    others = [each for each in table.column_names if each != name]
    texts = table.column("text" if "text" in others else others[0]).to_pylist()
    ours = b"minilm.fingerprint" in (table.schema.metadata or {})
    return [text or "" if ours else text for text in texts], vectors


def _parquet_rows(data: bytes) -> tuple[list[Any], Any]:
    table, name, vectors = _parquet(data)
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError("a column is there twice")
    return table.drop_columns([name]).to_pylist(), vectors


_PLAIN: dict[str, Callable[[bytes], tuple[list[str] | None, Any]]] = {
    ".csv": _plain_csv,
    ".jsonl": _plain_jsonl,
    ".ndjson": _plain_jsonl,
    ".npy": lambda data: (None, plain_npy(data)),
    ".npz": _plain_npz,
    ".parquet": _plain_parquet,
    ".safetensors": _plain_vectors,
}
_PLAIN_ROWS: dict[str, Callable[[bytes], tuple[list[Any], Any]]] = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".npy": lambda data: ([*range(len(plain_npy(data)))], plain_npy(data)),
    ".npz": _npz_rows,
    ".parquet": _parquet_rows,
    ".safetensors": _safetensors_rows,
}


def _read_records(folder: Path) -> Result:
    names = ("v.npz", "v.safetensors", "v.parquet", "v.npy")
    records = {name: read_fingerprint(folder / name) for name in names}
    return {name: None if each is None else each.to_dict() for name, each in records.items()}


def _records_say(folder: Path, result: Result) -> bool:
    import pyarrow
    import pyarrow.parquet

    for name, record in result.items():
        data = (folder / name).read_bytes()
        text: bytes | None = None
        if name == "v.npz":
            archive = _archive(data)
            if "fingerprint_json.npy" in archive.namelist():
                text = plain_npy(archive.read("fingerprint_json.npy")).tobytes()
        elif name == "v.safetensors":
            metadata = json.loads(plain_safetensors(data).get("__metadata__", ("{}",))[0])
            given = (metadata or {}).get("minilm.fingerprint")
            text = None if given is None else given.encode("utf-8", "surrogatepass")
        elif name == "v.parquet":
            schema = pyarrow.parquet.read_schema(pyarrow.BufferReader(data))
            text = (schema.metadata or {}).get(b"minilm.fingerprint")
        if text is None and (folder / f"{name}.fingerprint.json").is_file():
            text = (folder / f"{name}.fingerprint.json").read_bytes()
        if (text is None) != (record is None):
            return False
        if text is not None:
            values = plain_json(text)
            if any(values[key] != value for key, value in (record or {}).items()):
                return False
    return True


# --- texts


TEXT_FILES = ("t.jsonl", "t.csv", "t.txt", "t.parquet")


def _write_texts(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "t.jsonl").write_text(lines, encoding="utf-8")
    csv = "id,text\n" + "".join(f'{row["id"]},"{row["text"]}"\n' for row in ROWS)
    (folder / "t.csv").write_text(csv, encoding="utf-8")
    (folder / "t.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "t.parquet")


def _read_texts(folder: Path) -> Result:
    found: dict[str, Any] = {}
    for name in TEXT_FILES:
        if name != "t.parquet":
            table = read_table([str(folder / name)])
            found[f"{name} whole"] = table.texts, repr(table.rows)
        layout = survey([folder / name])
        shards = list(read_shards([folder / name], layout, 4))
        rows = [row for shard in shards for row in shard.table.to_pylist()]
        found[name] = [text for shard in shards for text in shard.texts], repr(rows)
    return found


def _texts_say(folder: Path, result: Result) -> bool:
    import pyarrow
    import pyarrow.parquet

    for name in TEXT_FILES:
        data = (folder / name).read_bytes()
        if name == "t.jsonl":
            rows = [json.loads(line, object_pairs_hook=_object) for line in
                    data.decode("utf-8-sig").split("\n") if line.strip()]  # fmt: skip
            texts = [row if isinstance(row, str) else row.get("text", next(iter(row.values())))
                     for row in rows]  # fmt: skip
        elif name == "t.csv":
            lines = _csv_lines(data)
            place = lines[0].index("text") if len(lines[0]) > 1 else 0
            texts = [row[place] for row in lines[1:]]
        elif name == "t.txt":
            whole = data.decode("utf-8-sig")
            texts = [each.removesuffix("\r") for each in whole.removesuffix("\n").split("\n")]
            texts = texts if whole else []
        else:
            table = pyarrow.parquet.read_table(pyarrow.BufferReader(data))
            texts = table.column("text" if table.num_columns > 1 else 0).to_pylist()
        if result[name][0] != texts or result.get(f"{name} whole", [texts])[0] != texts:
            return False
    return True


# --- an index, a folder of parts, golden values


def _write_index(folder: Path) -> None:
    encoder = _encoder()
    record, vectors = encoder.fingerprint(), encoder.encode(TEXTS)
    index = Index.create(folder / "index", record, [(vectors[:4], ROWS[:4])], codes=["binary"])
    index.add(vectors[4:], ROWS[4:], fingerprint=record)
    (folder / OUTSIDE).mkdir()


def _read_index(folder: Path) -> Result:
    record, queries = _encoder().fingerprint(), _encoder().encode(QUERIES)
    index = Index.open(folder / "index")
    result = (
        repr(index.search(queries, 4, fingerprint=record)),
        repr(index.search(queries, 2, fingerprint=record, precision="binary")),
        [each.tobytes() for each in index.vectors],
        repr([index.row(i) for i in range(len(index))]),
        index.column,
    )
    index.verify()
    return result


def _add_to_index(folder: Path) -> Result:
    record, vectors = _encoder().fingerprint(), _encoder().encode(TEXTS)
    index = Index.open(folder / "index")
    index.add(vectors, ROWS, fingerprint=record)
    index = Index.open(folder / "index")
    index.verify()
    return [each.tobytes() for each in index.vectors], repr(
        [index.row(i) for i in range(len(index))]
    )


def _index_says(folder: Path, result: Result) -> bool:
    """Whether what index.json alone says is the same but for names of the model and the column."""
    values = plain_json((folder / "index" / "index.json").read_bytes())
    last = values["segments"][-1]["name"]
    return bool(
        result[4] == values["column"] and last == f"segment-{values['next_segment'] - 1:05}"
    )


_SEGMENTS = tuple(
    f"index/segment-0000{number}/{name}"
    for number in (0, 1)
    for name in ("vectors.npy", "lengths.npy", "offsets.npy", "rows.jsonl", "binary.npy")
)


def _write_parts(folder: Path) -> None:
    _write_texts(folder)
    (folder / OUTSIDE).mkdir()
    encode_files(_encoder(), folder / "t.jsonl", folder / "parts", shard_rows=2)


def _write_unfinished(folder: Path) -> None:
    _write_texts(folder)
    (folder / OUTSIDE).mkdir()

    def stop(self: ShardFolder) -> None:
        raise InterruptedError

    finish, ShardFolder.finish = ShardFolder.finish, stop  # type: ignore[method-assign]
    try:
        encode_files(_encoder(), folder / "t.jsonl", folder / "parts", shard_rows=2)
    except InterruptedError:
        pass
    finally:
        ShardFolder.finish = finish  # type: ignore[method-assign]


def _check_parts(folder: Path) -> Result:
    found = check_folder(_encoder(), folder / "parts", sample=8)
    if not found.is_compatible:
        raise ReportedError(f"{found.folder}: {found.table()}")
    return found.rows, found.parts, found.has_manifest


def _finish_parts(folder: Path) -> Result:
    report = encode_files(_encoder(), folder / "t.jsonl", folder / "parts", shard_rows=2)
    paths = sorted((folder / "parts").iterdir())
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    manifest = plain_json((folder / "parts.manifest.json").read_bytes())
    for each in manifest["inputs"]:  # where the files were is not in the parts
        del each["name"], each["bytes"], each["rows"]
    del manifest["bad_rows"]
    return report.rows, hashes, manifest


GOLDEN = (
    GoldenText("the dog bites the man", "an ordinary sentence", has_stages=True),
    GoldenText("", "no word", has_stages=True),
    GoldenText("a cat", "without stages"),
)


def _write_golden(folder: Path) -> None:
    write_golden(_encoder(), folder / "golden", GOLDEN)
    data = (folder / "golden" / "golden.float32.safetensors").read_bytes()
    (folder / "stages.safetensors").write_bytes(data)


def _read_golden(folder: Path) -> Result:
    report = compare_stages_file(folder / "golden", folder / "stages.safetensors")
    report.table()
    if not report.passed:
        raise ReportedError(f"{folder / 'stages.safetensors'}: {report.table()}")
    return report.passed, report.ignored, report.missing, report.texts, report.tokens


def _golden_says(folder: Path, result: Result) -> bool:
    """Whether a port passes by files that are well formed; stages that it lacks are listed."""
    index = plain_json((folder / "golden" / "golden.json").read_bytes())
    stages = plain_safetensors((folder / "stages.safetensors").read_bytes())
    return bool(stages) and result[3] == tuple(text["text"] for text in index["texts"])


TARGETS = (
    _of_model("model.safetensors", "model.safetensors"),
    _of_model(
        "weights in several files",
        "model.safetensors.index.json", "a.safetensors", "b.safetensors",
        write=_write_shards,
    ),
    _of_model("config.json", "config.json"),
    _of_model("modules.json", "modules.json"),
    _of_model("pooling", "1_Pooling/config.json", "2_Normalize/config.json"),
    _of_model(
        "settings",
        "sentence_bert_config.json", "tokenizer_config.json", "special_tokens_map.json",
        "added_tokens.json", "config_sentence_transformers.json",
    ),
    _of_model("tokenizer.json", "tokenizer.json"),
    _of_model("vocab.txt", "vocab.txt", write=_write_vocabulary),
    Target("files of vectors", VECTOR_FILES, _write_vectors, _read_vectors, _vectors_say),
    Target("vectors of minilm encode", STORED_FILES, _write_vectors, _read_stored, _stored_say),
    Target(
        "fingerprints",
        ("v.npz", "v.safetensors", "v.parquet", "v.npy.fingerprint.json"),
        _write_vectors, _read_records, _records_say,
    ),
    Target("files of texts", TEXT_FILES, _write_texts, _read_texts, _texts_say),
    Target("index.json", ("index/index.json",), _write_index, _read_index, _index_says),
    Target("segments of an index", _SEGMENTS, _write_index, _read_index),
    Target("an index, added to", _SEGMENTS, _write_index, _add_to_index),
    Target(
        "a folder of parts",
        ("parts/part-00000.parquet", "parts/part-00001.parquet"),
        _write_parts, _check_parts,
    ),
    Target(
        "the manifest of parts", ("parts.manifest.json",), _write_parts, _check_parts,
        lambda folder, result: not (path := folder / "parts.manifest.json").is_file()
        or bool(plain_json(path.read_bytes())),
    ),
    Target(
        "a run of parts, finished",
        ("parts/_progress.jsonl", "parts/part-00000.parquet", "parts/part-00001.parquet"),
        _write_unfinished, _finish_parts,
    ),
    Target(
        "golden values", ("golden/golden.json", "golden/golden.float64.safetensors"),
        _write_golden, _read_golden, _golden_says,
    ),
    Target("stages of a port", ("stages.safetensors",), _write_golden, _read_golden, _golden_says),
)  # fmt: skip

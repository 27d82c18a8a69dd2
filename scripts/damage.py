"""Damage files as `fuzz.py` needs it: by what their form is, not only by bytes.

In: the bytes of a good file, its suffix, and `Choices`. Out: other bytes. A JSON value becomes one
of another type or size, or nested a thousand deep; a key is there twice; the length of a header, a
shape or an offset lies; a file is cut, a bit is turned over. The same choices do the same damage.

Standard library, NumPy and pyarrow.
"""

import io
import json
import random
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

__all__ = ["OUTSIDE", "Choices", "damaged"]

_Value = TypeVar("_Value")

# Beside the folder that is read: what names lead to that should lead nowhere.
OUTSIDE = "outside"

_NUMBERS = (
    "0", "-1", "1", "2", "3", "7", "1.5", "-0.0", "255", "65536", "2147483648", "4294967295",
    "9007199254740993", "9223372036854775807", "9223372036854775808", "18446744073709551616",
    "-9223372036854775809", "1e-320", "1e38", "1e39", "1e308", "1e400", "-1e400", "NaN", "Infinity",
    "-Infinity", "1e5", "1E+2", "1" + "0" * 30, "1" * 5000,
)  # fmt: skip
_WORDS = (
    "", " ", "a", "[MASK]", "None", "0", "1", "true", "..", "../" + OUTSIDE, "/", ".", "~",
    f"..\\{OUTSIDE}", f"../{OUTSIDE}/model.safetensors", "C:\\x", "\0", "\ud800", "\u202e", "é",
    "x" * 300, "model.safetensors", "config.json", "%s{0}", "\n", "#", "##s", "LowerCase",
)  # fmt: skip
_DEPTHS = (3, 150, 250, 900, 5_000, 100_000)
_NPY = (
    "'<f4'", "'>f4'", "'<f2'", "'<f8'", "'<f16'", "'<i4'", "'<i8'", "'<u8'", "'|i1'", "'|u1'",
    "'|b1'", "'<c8'", "'|O'", "'<U4'", "'|S4'", "'|V4'", "'<M8[s]'", "[('a', '<f4')]", "'x'", "4",
)  # fmt: skip


class Choices:
    """Numbers that bytes stand for; behind the last byte, numbers that all of them stand for."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self._rest = random.Random(data)

    def below(self, count: int) -> int:
        """Return a number from 0 to below `count`."""
        size = max(1, ((count - 1).bit_length() + 7) // 8)
        given = self._data.read(size)
        return (int.from_bytes(given, "little") if given else self._rest.getrandbits(62)) % max(
            1, count
        )

    def pick(self, values: Sequence[_Value]) -> _Value:
        """Return one of the values."""
        return values[self.below(len(values))]

    def chance(self, one_in: int) -> bool:
        """Return true once in so many times."""
        return self.below(one_in) == one_in - 1


def damaged(data: bytes, suffix: str, choices: Choices) -> bytes:
    """Return a file's contents with one to three damages, mostly of its own form."""
    for _ in range(1 + choices.pick((0, 0, 0, 1, 2))):
        damage = _bytes if choices.chance(4) else _FORMS.get(suffix, _bytes)
        try:
            data = damage(data, choices)
        except Exception:  # it has no form any more
            data = _bytes(data, choices)
    return data


# --- bytes


def _bytes(data: bytes, choices: Choices) -> bytes:
    start = choices.below(len(data) + 1)
    # Mostly near the beginning, where the headers are, or the end, where those of others are.
    near = choices.pick((64, 1024, len(data) + 1, -256))
    start = max(0, len(data) - 1 - start % 256) if near < 0 else start % near
    stop = min(len(data), start + choices.pick((1, 1, 2, 4, 8, 16, 64, 1024)))
    piece = data[start:stop]
    kind = choices.below(9)
    if kind == 0:
        bit = 1 << choices.below(8)
        return data[:start] + bytes(byte ^ bit for byte in piece[:1]) + data[start + 1 :]
    if kind == 1:
        return data[:start]
    if kind == 2:
        return data[:start] + data[stop:]
    if kind == 3:
        return data[:start] + piece * choices.pick((2, 3, 100)) + data[stop:]
    if kind == 4:
        put = bytes([choices.pick((0, 255, 10, 34, 44, 91, 123, 127, 128, 192, 239))])
        return data[:start] + put * len(piece) + data[stop:]
    if kind == 5:
        number = choices.pick((0, 1, 2**15, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
        return data[:start] + number.to_bytes(8, "little") + data[start + 8 :]
    if kind == 6:
        other = choices.below(len(data) + 1)
        return data[:start] + data[other : other + len(piece)] + data[stop:]
    if kind == 7:
        put = choices.pick((b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\r\n", b"\n", b'"', b",", b" "))
        return data[:start] + put + data[start:]
    return data + choices.pick((b"\0", b"{}", b"\n", data[:64], b" " * 1000))


# --- JSON


class _Object(list[list[Any]]):
    """A JSON object as a list of [key, value], so that a key can be there twice."""


class _Raw(str):
    """What is written as it is."""


def _parse(text: str) -> Any:
    return json.loads(
        text,
        object_pairs_hook=lambda pairs: _Object(list(pair) for pair in pairs),
        parse_float=_Raw,
        parse_int=_Raw,
        parse_constant=_Raw,
    )


def _written(value: Any) -> str:
    if isinstance(value, _Raw):
        return value
    if isinstance(value, _Object):
        return "{" + ", ".join(f"{_written(key)}: {_written(each)}" for key, each in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return json.dumps(value)


def _slots(value: Any) -> Iterator[tuple[list[Any], int]]:
    """Yield every place that a value stands in, as (list, position)."""
    if isinstance(value, list):
        pairs = isinstance(value, _Object)
        for number, each in enumerate(value):
            yield (each, 1) if pairs else (value, number)
            yield from _slots(each[1] if pairs else each)


def _hostile(choices: Choices, others: Sequence[Any]) -> Any:
    kind = choices.below(8)
    if kind == 0:
        return choices.pick((None, True, False, [], _Object()))
    if kind in (1, 2):
        return _Raw(choices.pick(_NUMBERS))
    if kind in (3, 4):
        return choices.pick(_WORDS)
    if kind == 5 and others:
        return choices.pick(others)
    if kind == 6:
        depth, inner = choices.pick(_DEPTHS), choices.pick(("1", "", '"a"'))
        start, end = choices.pick((("[", "]"), ('{"a":', "}")))
        return _Raw(start * depth + (inner or "[]") + end * depth)
    return _Raw(f"[{', '.join(['1'] * choices.pick((1, 2, 32, 10_000)))}]")


def _tree(value: Any, choices: Choices) -> Any:
    """Return a JSON value with one place of it damaged."""
    root = [value]
    slots = [(root, 0), *_slots(value)]
    holder, place = choices.pick(slots)
    old = holder[place]
    kind = choices.below(8)
    inner = old if isinstance(old, list) and old else None
    if kind == 0 and inner is not None:
        del inner[choices.below(len(inner))]
    elif kind == 1 and isinstance(inner, _Object):
        key = inner[choices.below(len(inner))][0]
        inner.insert(choices.below(len(inner) + 1), [key, _hostile(choices, [v for _, v in inner])])
    elif kind == 1 and inner is not None:
        inner.insert(choices.below(len(inner) + 1), choices.pick(inner))
    elif kind == 2 and isinstance(inner, _Object):
        inner[choices.below(len(inner))][0] = choices.pick((*_WORDS, *(key for key, _ in inner)))
    elif kind == 3 and isinstance(old, _Raw):
        number = old if re.fullmatch(r"-?\d{1,18}", old) else "0"
        holder[place] = _Raw(int(number) + choices.pick((-1, 1, 2, 8, 1000)))
    elif kind == 4:
        holder[place] = choices.pick(([old], _Object([["a", old]]), _written(old), [old] * 3))
    elif kind == 5 and isinstance(old, _Object):
        old.append([choices.pick(_WORDS), _hostile(choices, [v for _, v in old])])
    else:
        holder[place] = _hostile(choices, [holder[place] for holder, place in slots])
    return root[0]


def _json(data: bytes, choices: Choices) -> bytes:
    return _encoded(_written(_tree(_parse(data.decode()), choices)))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _jsonl(data: bytes, choices: Choices) -> bytes:
    lines = data.decode().splitlines()
    place = choices.below(len(lines))
    kind = choices.below(8)
    if kind == 0:
        lines.insert(place, choices.pick((lines[place], "", "  ", "{}", "[]", '"a"', "null", "1")))
    elif kind == 1:
        del lines[place]
    else:
        lines[place] = _written(_tree(_parse(lines[place]), choices))
    return _encoded(choices.pick(("\n", "\n", "\n", "\r\n", "\r")).join(lines))


def _csv(data: bytes, choices: Choices) -> bytes:
    lines = data.decode().splitlines()
    place = choices.below(len(lines))
    fields = lines[place].split(",")
    where = choices.below(len(fields))
    kind = choices.below(6)
    if kind == 0:
        lines.insert(place, choices.pick((lines[place], "", '"', ",", lines[0])))
    elif kind == 1:
        del lines[place]
    elif kind == 2:
        del fields[where]
    elif kind == 3:
        fields.insert(where, choices.pick(fields))
    else:
        marks = ('"', '""', '"a\nb"', "1_0", "１", "+1", " 1 ", "0x1p3", "infinity", "nan", "1e400")
        fields[where] = choices.pick((*marks, *_NUMBERS, *_WORDS))
    if kind > 1:
        lines[place] = ",".join(fields)
    return _encoded("\n".join(lines) + "\n")


def _text(data: bytes, choices: Choices) -> bytes:
    lines = data.decode().split("\n")
    lines[choices.below(len(lines))] = choices.pick((*_WORDS, *lines))
    return _encoded("\n".join(lines))


# --- safetensors, .npy and .npz, Parquet


def _safetensors(data: bytes, choices: Choices) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header, numbers = data[8:end], data[end:]
    kind = choices.below(6)
    if kind == 0:
        lengths = (0, 1, 8, len(header) - 1, len(header) + 1, len(header) + len(numbers),
                   len(data), 2**31, 2**62, 2**63, 2**64 - 1, 100_000_001)  # fmt: skip
        return choices.pick(lengths).to_bytes(8, "little") + header + numbers
    if kind == 1:
        return data[:end] + _bytes(numbers, choices)
    changed = _json(header.rstrip(), choices)
    return len(changed).to_bytes(8, "little") + changed + numbers


def _npy(data: bytes, choices: Choices) -> bytes:
    assert data[:6] == b"\x93NUMPY"
    size = int.from_bytes(data[8:10], "little")
    header, numbers = data[10 : 10 + size].decode("latin-1"), data[10 + size :]
    shape = re.search(r"\(([\d, ]*)\)", header)
    assert shape is not None
    sizes = [int(each) for each in shape[1].split(",") if each.strip()]
    kind = choices.below(6)
    if kind == 0:
        header = re.sub(r"'descr': ('[^']*'|\[.*?\])", f"'descr': {choices.pick(_NPY)}", header)
    elif kind == 1:
        many = choices.pick((-1, 0, 1, 2, 10**6, 10**9, 10**12, 2**31, 2**63, 2**64, 10**30))
        place = choices.below(len(sizes) + 1)
        sizes[place : place + choices.below(2)] = [many]
        header = header.replace(shape[0], str(tuple(sizes)))
    elif kind == 2:
        header = header.replace("False", choices.pick(("True", "None", "1", "0", "x")))
    elif kind == 3:
        more = ("", "{}", "[]", "(", "{'a': 1}", "__import__('os')", "[" * 1000, "-" * 5000, "1+1")
        header = choices.pick(more)
    else:
        return data[: 10 + size] + _bytes(numbers, choices)
    text = header.rstrip().ljust(max(118, len(header))).encode("latin-1")
    length = choices.pick((len(text), len(text), len(text), 0, 65535, len(text) - 1))
    return data[:8] + length.to_bytes(2, "little") + text + numbers


def _npz(data: bytes, choices: Choices) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    place = choices.below(len(entries))
    name, content = entries[place]
    kind = choices.below(8)
    if kind == 0:
        del entries[place]
    elif kind == 1:
        new = choices.pick((f"../{OUTSIDE}/a.npy", "a.npy", "texts.npy", "", "embeddings", "\0"))
        entries[place] = (new, content)
    elif kind == 2:
        entries.append((name, choices.pick(entries)[1]))
    elif kind == 3:
        entries.append(("vectors.npy", content))
    elif kind == 4:
        bomb = bytes(choices.pick((10**6, 10**8)))
        entries[place] = (name, _npy(content, choices) + bomb)
    elif name.endswith("_json.npy") and choices.chance(2):
        size = 10 + int.from_bytes(content[8:10], "little")
        text = _json(content[size:], choices)
        header = content[:size].replace(
            f"({len(content) - size},)".encode(), f"({len(text)},)".encode()
        )
        entries[place] = (name, header.ljust(size)[:size] + text)
    else:
        entries[place] = (name, _npy(content, choices))
    target = io.BytesIO()
    method = choices.pick((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(target, "w", method) as archive, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Duplicate name")  # that is the damage
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return target.getvalue()


def _parquet(data: bytes, choices: Choices) -> bytes:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except (OSError, RuntimeError) as error:
        raise ValueError("no table") from error
    place = choices.below(table.num_columns)
    name, column = table.column_names[place], table.column(place)
    rows = column.to_pylist()
    kind = choices.below(8)
    if kind == 0:
        table = table.remove_column(place)
    elif kind == 1:
        table = table.append_column(name, column)
    elif kind == 2:
        new = choices.pick((*_WORDS[:10], *table.column_names))
        table = table.rename_columns([new if i == place else n for i, n in
                                      enumerate(table.column_names)])  # fmt: skip
    elif kind == 3:
        key = choices.pick([*(table.schema.metadata or {}), b"minilm.fingerprint"])
        text = (table.schema.metadata or {}).get(key, b"{}")
        metadata = {**(table.schema.metadata or {}), key: _json(text, choices)}
        table = table.replace_schema_metadata(metadata)
    elif kind == 4:
        rows[choices.below(len(rows))] = None
        table = table.set_column(place, name, pyarrow.array(rows, column.type))
    elif kind == 5:
        rows = [[*row, *row[:number]] if isinstance(row, list) else str(row) * 2
                for number, row in enumerate(rows)]  # fmt: skip
        table = table.set_column(place, name, pyarrow.array(rows))
    elif kind == 6:
        kinds = (pyarrow.float64(), pyarrow.int8(), pyarrow.string(), pyarrow.bool_())
        other = pyarrow.nulls(len(rows), choices.pick(kinds))
        table = table.set_column(place, name, other)
    else:
        table = table.slice(choices.below(len(rows) + 1))
    target = io.BytesIO()
    pyarrow.parquet.write_table(table, target)
    return target.getvalue()


_FORMS: dict[str, Callable[[bytes, Choices], bytes]] = {
    ".csv": _csv,
    ".json": _json,
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".npy": _npy,
    ".npz": _npz,
    ".parquet": _parquet,
    ".safetensors": _safetensors,
    ".txt": _text,
}

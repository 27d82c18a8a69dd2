"""The same choices do the same damage, every target can be read, and outcomes are told apart."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import fuzz
from damage import Choices, damaged
from fuzz_targets import TARGETS, TEXTS, Target, _encoder, _parquet, plain_safetensors
from minilm.errors import ConfigError, InputError


def files() -> Iterator[tuple[str, bytes]]:
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    npy, npz = io.BytesIO(), io.BytesIO()
    np.save(npy, array)
    np.savez(npz, embeddings=array, texts_json=np.frombuffer(b'["a", "b"]', np.uint8))
    yield ".json", json.dumps({"a": [1, 2.5, {"b": None}], "c": "d"}).encode()
    yield ".jsonl", b'{"text": "a"}\n{"text": "b"}\n'
    yield ".csv", b"text,0,1\na,1,2\n"
    yield ".txt", b"a\nb\n"
    yield ".npy", npy.getvalue()
    yield ".npz", npz.getvalue()
    yield ".safetensors", safetensors.numpy.save({"embeddings": array})


@pytest.mark.parametrize(("suffix", "data"), [*files()], ids=lambda value: str(value)[:12])
def test_damage_follows_from_choices(suffix: str, data: bytes) -> None:
    made = [damaged(data, suffix, Choices(bytes([number]))) for number in range(60)]
    assert made == [damaged(data, suffix, Choices(bytes([number]))) for number in range(60)]
    assert len({*made} - {data}) > 20


def test_damage_of_json_mostly_leaves_json() -> None:
    data = json.dumps({"a": [1, 2.5, {"b": None}], "c": "d"}).encode()
    broken = 0
    for number in range(200):
        try:
            json.loads(damaged(data, ".json", Choices(bytes([0, number, number // 3]))))
        except (ValueError, RecursionError):
            broken += 1
    assert 10 < broken < 150


def make_target(read: Any, justifies: Any = None) -> Target:
    return Target(
        "a file", ("a.json",), lambda folder: (folder / "a.json").write_text("[1, 2]"), read,
        justifies,
    )  # fmt: skip


def outcomes(target: Target, place: Path) -> set[str]:
    tries = fuzz._Tries(target, place / "files")
    return {tries.attempt(bytes([0, number]))[0] for number in range(80)}


def test_outcomes_are_told_apart(tmp_path: Path) -> None:
    def careful(folder: Path) -> Any:
        path = folder / "a.json"
        try:
            return json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ConfigError(path, [str(error)]) from error

    def careless(folder: Path) -> Any:
        return json.loads((folder / "a.json").read_bytes())

    def nameless(folder: Path) -> Any:
        try:
            return careless(folder)
        except (ValueError, RecursionError, OSError) as error:
            raise ConfigError("it", ["is broken"]) from error

    def yes(folder: Path, result: Any) -> bool:
        return True

    assert outcomes(make_target(careful, yes), tmp_path) <= {"right", "as written", "named"}
    assert outcomes(make_target(careful), tmp_path) >= {"named", "silent"}
    assert outcomes(make_target(careless, yes), tmp_path) >= {"as written", "crashed"}
    assert outcomes(make_target(nameless, yes), tmp_path) >= {"as written", "crashed"}


def test_what_lies_outside_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a").write_text("a")
    target = make_target(lambda folder: (tmp_path / "outside" / "a").read_text())
    tries = fuzz._Tries(target, tmp_path / "files")
    outcome, kind, _ = tries.attempt(b"")
    assert outcome == "silent"
    assert "outside: open" in kind


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_target_withstands_some_damage(target: Target, tmp_path: Path) -> None:
    tries = fuzz._Tries(target, tmp_path / "files")
    for number in range(25):
        outcome, kind, detail = tries.attempt(bytes([number, number * 7 % 256]))
        assert outcome not in fuzz.BAD, f"{kind}\n{detail}"


@pytest.mark.process
@pytest.mark.slow
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["0.05", "--target", "config.json", "--corpus", str(tmp_path / "corpus")]
    assert fuzz.main([*command, "--markdown", str(tmp_path)]) == 0
    assert "| config.json |" in capsys.readouterr().out
    assert "| all |" in (tmp_path / "reliability.md").read_text(encoding="utf-8")
    assert "Nothing was found" in (tmp_path / "fuzz.md").read_text(encoding="utf-8")


def test_a_plain_reader_refuses_what_is_ambiguous() -> None:
    header = b'{"a": {}, "a": {}}'
    with pytest.raises(ValueError, match="twice"):
        plain_safetensors(len(header).to_bytes(8, "little") + header)


def test_what_a_plain_reader_finds_said(tmp_path: Path) -> None:
    """Metadata that are null are none, and a NaN has bits of its own."""
    targets = {target.name: target for target in TARGETS}
    records, stored = targets["fingerprints"], targets["vectors of minilm encode"]
    records.write(tmp_path)
    path = tmp_path / "v.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]) | {"__metadata__": None}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    found = records.read(tmp_path)
    assert found["v.safetensors"] is None
    assert records.justifies is not None
    assert records.justifies(tmp_path, found)
    assert not records.justifies(tmp_path, found | {"v.parquet": None})

    path.write_bytes(data)
    path = tmp_path / "v.parquet"
    path.write_bytes(
        path.read_bytes().replace(_encoder().encode(TEXTS)[1, :1].tobytes(), b"\xff" * 4)
    )
    _, _, numbers = _parquet(path.read_bytes())
    assert numbers.tobytes()[16:20] == b"\xff" * 4
    with pytest.raises(InputError, match=r"v\.parquet: has NaN or infinity in the vector of row 1"):
        stored.read(tmp_path)

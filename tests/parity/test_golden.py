"""The golden file for ports: what is in it, and that each stage that differs is named."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from conftest import edit_json
from minilm import SentenceEncoder, cli
from minilm.errors import InputError
from minilm.parity.golden import (
    TEXTS,
    GoldenText,
    StageReport,
    compare_stages_file,
    stage_names,
    write_golden,
)

pytestmark = pytest.mark.filterwarnings("ignore::minilm.errors.TruncationWarning")

Dump = dict[str, Tensor]
EMBEDDINGS = "embeddings.layer_norm.output"
FIRST, LAST = (f"layers.{n}.feed_forward_layer_norm.output" for n in (0, 1))

SOME = (
    GoldenText("the dog bites the man", "an ordinary sentence", has_stages=True),
    GoldenText("", "no word", has_stages=True),
    GoldenText("the dog sees a cat walking out the sun is a man", "cut", has_stages=True),
    GoldenText("a cat", "without stages"),
)


@pytest.fixture
def folder(tiny_encoder: SentenceEncoder, tmp_path: Path) -> Path:
    write_golden(tiny_encoder, tmp_path / "golden", SOME)
    return tmp_path / "golden"


@pytest.fixture
def dump(folder: Path) -> Dump:
    """What a port wrote that has everything right, in float64."""
    return dict(safetensors.torch.load_file(folder / "golden.float64.safetensors"))


def compared(folder: Path, dump: Dump) -> StageReport:
    file = folder.parent / "port.safetensors"
    safetensors.torch.save_file(dump, file)
    return compare_stages_file(folder, file)


def test_texts_that_tell_causes_apart(encoder: SentenceEncoder) -> None:
    texts = [each.text for each in TEXTS]
    assert len(texts) == 64
    assert encoder.tokenizer is not None
    counts = encoder.tokenizer(texts).token_counts
    for limit, least in ((128, 6), (256, 4), (512, 2)):
        assert sum(count > limit for count in counts) >= least
    assert min(counts) == 2
    assert sum(100 < count <= 128 for count in counts) >= 1
    assert sum(text != text.lower() for text in texts) >= 10
    assert any("\u4e00" <= character <= "\u9fff" for text in texts for character in text)
    assert all(each.why for each in TEXTS)
    unknown = encoder.tokenizer.backend.token_to_id("[UNK]")
    assert sum(unknown in ids for ids in encoder.tokenizer(texts).input_ids) >= 2


def test_two_texts_are_there_twice_in_other_batches() -> None:
    texts = [each.text for each in TEXTS]
    assert len(set(texts)) == 62
    assert texts[62:] == [texts[6], texts[0]]
    assert 62 // 32 != 6 // 32


@pytest.mark.parametrize(
    ("number", "other"),
    [
        (50, lambda text: re.sub("[\v\f]", " ", text)),
        (50, lambda text: text.replace("\x85", " ")),
        (51, lambda text: re.sub("[\u202f\u3000\u2003]", "-", text)),
        (52, lambda text: re.sub("[\xab\xbb]", "", text)),
        (52, lambda text: text.replace("\u2019", "")),
        (53, lambda text: unicodedata.normalize("NFKC", text)),
        (53, lambda text: text.replace("\uff01", "")),
        (54, lambda text: re.sub("[\u093e\u093f\u0940]", "", text)),
        (55, lambda text: re.sub("[\u0e48\u0e49]", "\u0e44", text)),
        (55, lambda text: re.sub("[\u0e20\u0e29\u0e44]", "", text)),
        (56, str.lower),  # with a final sigma
        (57, lambda text: unicodedata.normalize("NFKC", text)),
        (58, lambda text: text[:50] + " " + text[50:]),
        (59, lambda text: text[:100] + " " + text[100:]),
        (60, lambda text: re.sub("[\U0001f60d\u2603]", " ", text)),
        (61, lambda text: re.sub("[\u1dfb\u1ac5]", "", text)),
        (61, lambda text: text.replace("\u2e5d", " \u2e5d")),
    ],
)
def test_texts_show_how_another_tokenizer_reads(
    encoder: SentenceEncoder, number: int, other: Callable[[str], str]
) -> None:
    assert encoder.tokenizer is not None
    text = TEXTS[number].text
    right, wrong = encoder.tokenizer([text, other(text)]).input_ids
    assert right != wrong


def test_stage_names() -> None:
    assert stage_names(2) == [
        "input_ids", EMBEDDINGS, FIRST, LAST, "pooled", "embedding",
    ]  # fmt: skip


def test_folder_has_what_its_index_says(tiny_encoder: SentenceEncoder, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.txt", "golden.float32.safetensors", "golden.float64.safetensors", "golden.json",
    ]  # fmt: skip
    index = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
    assert [text["text"] for text in index["texts"]] == [text.text for text in SOME]
    for name, about in index["files"].items():
        data = (folder / name).read_bytes()
        assert about["bytes"] == len(data)
        assert about["sha256"] == hashlib.sha256(data).hexdigest()
        tensors = safetensors.torch.load(data)
        assert about["tensors"] == len(tensors) == 3 * 6 + 3
        assert {str(t.dtype) for n, t in tensors.items() if "input_ids" not in n} == {
            f"torch.{about['dtype']}"
        }
    assert tiny_encoder.tokenizer is not None
    tokens = tiny_encoder.tokenizer([text.text for text in SOME], 12, return_offsets=True)
    for text, ids, count, offsets in zip(
        index["texts"], tokens.input_ids, tokens.token_counts, tokens.offsets or [], strict=True
    ):
        assert text["input_ids"] == ids
        assert text["token_count"] == count
        assert [tuple(pair) for pair in text["offsets"]] == offsets
        assert text["tokens"][0] == "[CLS]"


def test_tensors_are_those_of_the_model(
    tiny_encoder: SentenceEncoder, folder: Path, dump: Dump
) -> None:
    features = tiny_encoder.tokenize(SOME[0].text)
    single = safetensors.torch.load_file(folder / "golden.float32.safetensors")
    with torch.no_grad():
        for tensors in (single, dump):
            kind = tensors["00.pooled"].dtype
            tiny_encoder.to(kind)
            result = tiny_encoder(features)
            embeddings = tiny_encoder.bert.embeddings(features["input_ids"])
            for name, expected in (
                (EMBEDDINGS, embeddings[0]),
                (FIRST, tiny_encoder.bert.layers[0](embeddings)[0]),
                (LAST, result["token_embeddings"][0]),
                ("pooled", result["token_embeddings"][0].mean(0)),
                ("embedding", result["sentence_embedding"][0]),
            ):
                torch.testing.assert_close(tensors[f"00.{name}"], expected)
    assert torch.equal(dump["00.input_ids"], features["input_ids"][0])


def test_readme_beside_them_names_everything(folder: Path) -> None:
    text = (folder / "README.txt").read_text(encoding="utf-8")
    for name in (
        "golden.json",
        "golden.float64.safetensors",
        "NN.layers.L.feed_forward_layer_norm.output",
        "--against-stages",
    ):
        assert name in text
    assert "00, 01, 02" in text


@pytest.mark.parametrize(
    "change",
    [
        {"files": []},
        {"files": {"golden.float64.safetensors": {"sha256": 1}}},
        {"stages": None},
        {"stages": ["input_ids", ["pooled"]]},
        {"float32_rounding": 3},
        {"float32_rounding": {"pooled": [1]}},
        {"float32_rounding": {"pooled": -1}},
        {"float32_rounding": {"pooled": float("nan")}},
        {"texts": [{"tokens": []}]},
        {"texts": [{"text": "a", "tokens": [["a"]]}]},
        {"texts": 1},
    ],
    ids=str,
)
def test_index_of_another_form(folder: Path, dump: Dump, change: dict[str, Any]) -> None:
    edit_json(folder / "golden.json", **change)
    with pytest.raises(InputError, match=r"golden\.json: is not a golden index"):
        compared(folder, dump)


@pytest.mark.slow
def test_published_folder_is_small(encoder: SentenceEncoder, tmp_path: Path) -> None:
    written = write_golden(encoder, tmp_path)
    assert sum(path.stat().st_size for path in written) < 30e6
    report = compare_stages_file(tmp_path, tmp_path / "golden.float32.safetensors")
    assert report.passed, report.table()
    assert not report.missing
    assert not report.ignored
    index = json.loads((tmp_path / "golden.json").read_text(encoding="utf-8"))
    assert index["weights_sha256"].startswith("53aa5117")
    assert index["max_seq_length"] == 256


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_right_port_passes(folder: Path, dump: Dump, dtype: torch.dtype) -> None:
    dump = {n: t if t.dtype == torch.int64 else t.to(dtype) for n, t in dump.items()}
    report = compared(folder, dump)
    assert report.passed, report.table()
    assert [row.stage for row in report.rows] == stage_names(2)
    assert "equal to rounding" in report.table()


@pytest.mark.parametrize("stage", stage_names(2))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_planted_divergence_is_named(
    folder: Path, dump: Dump, stage: str, dtype: torch.dtype
) -> None:
    dump = {n: t if t.dtype == torch.int64 else t.to(dtype) for n, t in dump.items()}
    changed = stage_names(2)[stage_names(2).index(stage) :]  # it stays wrong from there on
    size = 1e-10 if dtype == torch.float64 else 1e-3
    for name in changed:
        tensor = dump[f"02.{name}"].clone()
        if name == "input_ids":
            tensor[4] += 1
        elif tensor.dim() == 2:
            tensor[4, 7] += size
        else:
            tensor[7] += size
        dump[f"02.{name}"] = tensor
    report = compared(folder, dump)
    assert not report.passed
    assert report.first is not None
    assert (report.first.stage, report.first.text) == (stage, 2)
    assert report.first.token == (None if stage in ("pooled", "embedding") else 4)
    assert report.first.max_abs == pytest.approx(1 if stage == "input_ids" else size, rel=1e-2)
    table = report.table()
    assert f"first stage that diverges: {stage}" in table
    assert "most in text 02: 'the dog sees a cat" in table
    if report.first.token is not None:
        assert "at token 4 'a'" in table
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["first"]["stage"] == stage


def test_part_of_the_stages_will_do(folder: Path, dump: Dump) -> None:
    part = {f"00.{FIRST}": dump[f"00.{FIRST}"][None], "99.nonsense": torch.zeros(1)}
    report = compared(folder, part)  # with a batch dimension
    assert report.passed
    assert report.ignored == ("99.nonsense",)
    assert EMBEDDINGS in report.missing
    assert "names that are not known: 99.nonsense" in report.table()


def test_another_shape_and_no_number_diverge(folder: Path, dump: Dump) -> None:
    tensor = dump[f"00.{FIRST}"]
    report = compared(folder, dump | {f"00.{FIRST}": tensor[:-1].contiguous()})
    assert report.first is not None
    assert report.first.stage == FIRST
    assert "its shape is [6, 32], expected [7, 32]" in report.table()
    json.dumps(report.to_dict(), allow_nan=False)
    report = compared(folder, dump | {"01.pooled": dump["01.pooled"] * torch.nan})
    assert report.first is not None
    assert (report.first.stage, report.first.text) == ("pooled", 1)


def test_missing_and_broken_files_are_named(folder: Path, dump: Dump, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has none of the golden names"):
        compared(folder, {"layer": torch.zeros(1)})
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"broken.safetensors: is not a safetensors file"):
        compare_stages_file(folder, tmp_path / "broken.safetensors")
    with pytest.raises(InputError, match=r"absent.safetensors: is not a safetensors file"):
        compare_stages_file(folder, tmp_path / "absent.safetensors")
    with pytest.raises(InputError, match=r"golden.json: no such file; write it with minilm parity"):
        compared(tmp_path, dump)
    tensors = folder / "golden.float64.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(InputError, match=r"is not the file that golden\.json"):
        compared(folder, dump)
    (folder / "golden.json").write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r"golden.json: is not a golden index"):
        compared(folder, dump)


def test_folder_is_complete_or_not_there(
    tiny_encoder: SentenceEncoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_golden(tiny_encoder, folder, SOME)  # again: the same bytes
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is a file; pass a folder"):
        write_golden(tiny_encoder, tmp_path / "file", SOME)

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr("minilm.parity.golden.traces", fail)
    with pytest.raises(RuntimeError, match="planted"):
        write_golden(tiny_encoder, tmp_path / "new", SOME)
    assert not (tmp_path / "new").exists()


def test_sixteen_bits_are_refused(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="load it in float32"):
        write_golden(tiny_encoder.half(), tmp_path, SOME)


def test_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = tmp_path / "golden", ["--model", str(tiny_folder), "--device", "cpu"]
    assert cli.main(["parity", "--golden", str(folder), *model]) == 0
    shown = capsys.readouterr().out
    assert "golden.json" in shown
    assert " MB" in shown
    compare = ["parity", "--golden", str(folder), "--against-stages"]
    assert cli.main([*compare, str(folder / "golden.float32.safetensors")]) == 0
    assert "equal to rounding" in capsys.readouterr().out
    tensors = safetensors.torch.load_file(folder / "golden.float64.safetensors")
    tensors[f"03.{LAST}"] = tensors[f"03.{LAST}"] + 1.0
    safetensors.torch.save_file(tensors, tmp_path / "port.safetensors")
    assert cli.main([*compare, str(tmp_path / "port.safetensors")]) == 1
    assert f"first stage that diverges: {LAST}, by 1.0e+00" in capsys.readouterr().out
    assert cli.main([*compare, str(tmp_path / "port.safetensors"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["first"]["text"] == 3
    assert cli.main([*compare, str(tmp_path / "absent.safetensors")]) == 1
    assert "absent.safetensors: is not a safetensors file" in capsys.readouterr().err

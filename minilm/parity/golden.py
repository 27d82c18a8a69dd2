"""The golden file for ports: 64 texts, and what every stage of the model makes of them.

In: an encoder. Out: a folder with the texts and ids as JSON, and the tensors in float64 and
float32, which any language can read; and for the stages that a port wrote under the same names,
the first of them that is not ours. A stage has the name that it has in a trace.

The texts (`golden_texts.json`) are chosen to tell mistakes apart: every usual one changes some of
them and leaves others. The stages of all tokens of all texts would be 100 MB, so that a few texts
have them, and all have ids, the pooled vector and the embedding.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from minilm.disk import (
    check_header,
    file_sha256,
    make_folder,
    parse_json,
    with_metadata,
    write_atomically,
)  # fmt: skip
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError, errors_of_libraries
from minilm.files.tables import METADATA_KEY
from minilm.interpret.trace import Trace, traces
from minilm.outputs import check_folder
from minilm.parity import stages
from minilm.parity.digest import digest, pinned
from minilm.parity.golden_texts import TEXTS, GoldenText
from minilm.report import aligned, jsonable, shortened
from minilm.version import __version__

__all__ = [
    "TEXTS",
    "GoldenText",
    "StageDifference",
    "StageReport",
    "compare_stages_file",
    "stage_names",
    "write_golden",
]

INDEX, README = "golden.json", "README.txt"
_FILES = {"float64": "golden.float64.safetensors", "float32": "golden.float32.safetensors"}

# Of a port's stages in float32: how many times as far as ours they may be from float64. Sums taken
# in another order, or an exponential of another library, cost a small factor; a mistake, hundreds.
_SLACK = 16.0
# How many times as large rounding errors are as those of float32.
_COARSER = {
    torch.float64: 2.0**-29,
    torch.float32: 1.0,
    torch.float16: 2.0**13,
    torch.bfloat16: 2.0**16,
}


_OF_ALL = ("input_ids", "pooled", "embedding")  # kept for every text


def stage_names(num_layers: int) -> list[str]:
    """The names of the stages in the order of the computation, as in the files after `03.`."""
    vectors = (name for name in stages.stage_names(num_layers) if "attention" not in name)
    return ["input_ids", *vectors]


def write_golden(
    encoder: SentenceEncoder, folder: Path, texts: Sequence[GoldenText] = TEXTS
) -> list[Path]:
    """Write a golden folder. A file has its name once it is complete; the index comes last.

    Args:
        encoder: The model, in float32 or float64; both are computed.
        folder: Made if it is absent. Files of these names in it are replaced.
        texts: What to write about.

    Returns:
        The files written: `golden.float64.safetensors`, `golden.float32.safetensors`,
        `README.txt` and `golden.json`.

    Raises:
        InputError: `folder` is a file or can't be written to, or the encoder computes in 16 bits.
        OSError: The disk is full, or the like.
    """
    if encoder.dtype not in (torch.float32, torch.float64):
        raise InputError(f"encoder computes in {encoder.dtype}; load it in float32", "encoder")
    check_folder(folder, "--golden")
    names = stage_names(encoder.bert.config.num_hidden_layers)
    files: dict[str, dict[str, Any]] = {}
    found: dict[str, list[Trace]] = {}
    contents: dict[str, bytes] = {}
    record = encoder.fingerprint()
    for dtype, file in _FILES.items():
        found[dtype] = traces(
            encoder,
            [each.text for each in texts],
            names=[*names, "tokens"],
            dtype=dtype,
            arguments=[f"texts[{number}]" for number in range(len(texts))],
            warn=False,
        )
        tensors = {
            f"{number:02}.{stage}": found[dtype][number][stage]
            for stage in names
            for number in _texts_with(stage, texts)
        }
        made_by = {METADATA_KEY: replace(record, dtype=dtype).to_json()}
        contents[file] = with_metadata(safetensors.torch.save(tensors), made_by)
        files[file] = {
            "dtype": dtype,
            "tensors": len(tensors),
            "bytes": len(contents[file]),
            "sha256": hashlib.sha256(contents[file]).hexdigest(),
        }
    index = _index(encoder, texts, names, found) | {"files": files}
    if texts is TEXTS:
        chosen = pinned()
        sha256 = digest(encoder).sha256
        index["digest"] = {"sha256": sha256, "texts": chosen["texts"], "tokens": chosen["tokens"]}
    # The name of a model's folder need not be valid Unicode.
    text = json.dumps(index, ensure_ascii=False, indent=1) + "\n"
    contents[README] = _readme(index).encode("utf-8", "backslashreplace")
    contents[INDEX] = text.encode("utf-8", "backslashreplace")
    make_folder(folder)
    for name, data in contents.items():
        write_atomically(folder / name, lambda file, data=data: file.write(data))  # type: ignore[misc]
    return [folder / name for name in contents]


def _texts_with(stage: str, texts: Sequence[GoldenText]) -> list[int]:
    """The numbers of the texts for which a stage is kept."""
    return [n for n, text in enumerate(texts) if text.has_stages or stage in _OF_ALL]


def _index(
    encoder: SentenceEncoder,
    texts: Sequence[GoldenText],
    names: Sequence[str],
    found: Mapping[str, list[Trace]],
) -> dict[str, Any]:
    weights = {} if encoder.source is None else encoder.source.sha256
    rounding = {
        name: max(
            (
                float((found["float32"][n][name].double() - found["float64"][n][name]).abs().max())
                for n in _texts_with(name, texts)
            ),
            default=0.0,
        )
        for name in names[1:]
    }
    return {
        "made_by": f"minilm {__version__}",
        "model": None if encoder.source is None else encoder.source.name,
        "weights_sha256": next((v for k, v in weights.items() if k.endswith(".safetensors")), None),
        "max_seq_length": encoder.max_seq_length,
        "stages": list(names),
        "float32_rounding": rounding,
        "texts": [
            {
                "number": number,
                **vars(text),
                "token_count": len(trace["tokens"]) + trace.unread,
                "input_ids": trace["input_ids"].tolist(),
                "tokens": trace["tokens"],
                "offsets": trace.offsets,
            }
            for number, (text, trace) in enumerate(zip(texts, found["float64"], strict=True))
        ],
    }


def _readme(index: Mapping[str, Any]) -> str:
    files = [
        f"  {name:<28} {each['bytes'] / 1e6:5.1f} MB, {each['tensors']} tensors in {each['dtype']}"
        for name, each in index["files"].items()
    ]
    files += [f"  {INDEX:<28} the texts, each with its ids, tokens, offsets, and why it is there"]
    template = resources.files("minilm.parity").joinpath("golden_readme.txt")
    return template.read_text(encoding="utf-8").format(
        model=index["model"] or "a model",
        weights=index["weights_sha256"] or "unknown",
        made_by=index["made_by"],
        count=len(index["texts"]),
        files="\n".join(files),
        last_layer=len(index["stages"]) - 5,
        sha256=index.get("digest", {}).get("sha256", {}).get("embedding", "not computed"),
        kept=", ".join(f"{text['number']:02}" for text in index["texts"] if text["has_stages"]),
    )


@dataclass(frozen=True)
class StageDifference:
    """One stage of a port, over all texts that it gave for it.

    Attributes:
        stage: Its name.
        texts: How many texts were compared.
        max_abs: The largest difference from the golden float64; infinite where shapes
            differ or a number is not finite.
        bar: The largest that passes in the port's dtype.
        text: The number of the text where it is largest.
        token: The place of the token there; None where the stage has no tokens.
        problem: What is wrong besides numbers: another shape.
    """

    stage: str
    texts: int
    max_abs: float
    bar: float
    text: int
    token: int | None
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the bar; a NaN is not."""
        return self.max_abs <= self.bar

    def to_dict(self) -> dict[str, Any]:
        """The row as an object for JSON."""
        return {**jsonable(vars(self)), "passed": self.passed}


@dataclass(frozen=True)
class StageReport:
    """A port's stages beside the golden ones.

    Attributes:
        rows: Each stage, in the order of the computation.
        texts: The golden texts.
        tokens: Their word pieces.
        ignored: Names in the port's file that no golden tensor has.
        missing: Stages that it has for no text.
    """

    rows: tuple[StageDifference, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    ignored: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether every stage that was given differs by no more than rounding."""
        return all(row.passed for row in self.rows)

    @property
    def first(self) -> StageDifference | None:
        """The first stage that diverges."""
        return next((row for row in self.rows if not row.passed), None)

    def table(self) -> str:
        """The report as text."""
        rows = [("stage", "texts", "max abs", "bar", "")]
        rows += [
            (row.stage, str(row.texts), f"{row.max_abs:.1e}", f"{row.bar:.1e}",
             "PASS" if row.passed else "FAIL")
            for row in self.rows
        ]  # fmt: skip
        lines, first = [*aligned(rows, right=(1, 2, 3)), ""], self.first
        if first is None:
            lines.append("equal to rounding, in every stage given")
        else:
            lines.append(f"first stage that diverges: {first.stage}, by {first.max_abs:.1e}")
            shown = shortened(self.texts[first.text], 200)
            lines.append(f"most in text {first.text:02}: {shown!r}")
            if first.token is not None:
                tokens = self.tokens[first.text]
                named = f" {tokens[first.token]!r}" if first.token < len(tokens) else ""
                lines.append(f"at token {first.token}{named}")
            if first.problem is not None:
                lines.append(first.problem)
        if self.missing:
            lines.append(f"not in the file: {', '.join(self.missing)}")
        if self.ignored:
            more = "" if len(self.ignored) <= 5 else f" and {len(self.ignored) - 5} more"
            lines.append(f"names that are not known: {', '.join(self.ignored[:5])}{more}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The report as an object for JSON."""
        names = ("passed", "first", "rows", "ignored", "missing")
        return {name: jsonable(getattr(self, name)) for name in names}


def compare_stages_file(folder: Path, file: Path) -> StageReport:
    """Compare what a port computed with the golden values, stage by stage.

    Args:
        folder: What `write_golden` wrote.
        file: A safetensors file with some of the tensors, under the same names. A batch dimension
            of 1 in front does no harm.

    Returns:
        See `StageReport`.

    Raises:
        InputError: One of the files is missing or broken, or `file` has none of the names.
    """
    index, golden = _read_golden(folder)
    theirs = _tensors(file, "--against-stages")
    ignored = tuple(sorted(name for name in theirs if name not in golden))
    if len(ignored) == len(theirs):
        some = ", ".join(sorted(golden)[:3])
        raise InputError(
            f"{file}: has none of the golden names ({some}, ...): see {folder / README}",
            "--against-stages",
        )
    rows, missing = [], []
    for stage in index["stages"]:
        pairs = [
            (number, theirs[name], golden[name])
            for number in range(len(index["texts"]))
            if (name := f"{number:02}.{stage}") in theirs and name in golden
        ]
        if pairs:
            rows.append(_compare(stage, pairs, index["float32_rounding"].get(stage, 0.0)))
        else:
            missing.append(stage)
    return StageReport(
        tuple(rows),
        tuple(text["text"] for text in index["texts"]),
        tuple(tuple(text["tokens"]) for text in index["texts"]),
        ignored,
        tuple(missing),
    )


def _read_golden(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the index and the float64 tensors of a golden folder."""
    name = _FILES["float64"]
    try:
        with errors_of_libraries(
            lambda why: InputError(f"{folder / INDEX}: is not a golden index: {why}", "--golden")
        ):
            index = parse_json((folder / INDEX).read_bytes())
            _check_index(index)
        actual = file_sha256(folder / name)
    except FileNotFoundError as error:
        raise InputError(
            f"{error.filename}: no such file; write it with minilm parity --golden {folder}",
            "--golden",
        ) from error
    if actual != index["files"][name]["sha256"]:
        raise InputError(
            f"{folder / name}: is not the file that {INDEX} describes; write both again with "
            f"minilm parity --golden {folder}",
            "--golden",
        )
    return index, _tensors(folder / name, "--golden")


def _tensors(file: Path, argument: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file that is an argument."""
    try:
        with (
            errors_of_libraries(
                lambda why: InputError(f"{file}: is not a safetensors file: {why}", argument)
            ),
            file.open("rb") as start,
        ):
            check_header(start)
            return safetensors.torch.load_file(file)
    except OSError as error:
        raise InputError(f"{file}: is not a safetensors file: {error}", argument) from error


def _check_index(index: Any) -> None:
    """Raise an error if an index lacks what is read of it, or has something else there."""
    if not isinstance(index["files"][_FILES["float64"]]["sha256"], str):
        raise TypeError("the hash of a file is not a string")
    if not all(isinstance(stage, str) for stage in index["stages"]):
        raise TypeError("a stage is not a string")
    for stage, rounding in index["float32_rounding"].items():
        if type(rounding) not in (int, float) or not 0 <= rounding < math.inf:
            raise ValueError(f"the rounding of {stage} is {rounding!r}")
    for number, text in enumerate(index["texts"]):
        if not all(isinstance(each, str) for each in (text["text"], *text["tokens"])):
            raise TypeError(f"texts[{number}] has something else than strings")


def _compare(
    stage: str, pairs: Sequence[tuple[int, Tensor, Tensor]], rounding: float
) -> StageDifference:
    """Compare one stage of all texts, given as (number, theirs, golden)."""
    coarser = max(_COARSER.get(theirs.dtype, 0.0) for _, theirs, _ in pairs)
    bar = _SLACK * rounding * coarser  # of whole numbers: 0
    worst = StageDifference(stage, len(pairs), 0.0, bar, pairs[0][0], None)
    for number, theirs, golden in pairs:
        if theirs.shape == (1, *golden.shape):
            theirs = theirs[0]
        if theirs.shape != golden.shape:
            problem = f"its shape is {list(theirs.shape)}, expected {list(golden.shape)}"
            return StageDifference(stage, len(pairs), float("inf"), bar, number, None, problem)
        difference = (theirs.double() - golden.double()).abs().nan_to_num(nan=float("inf"))
        largest = float(difference.max())
        if largest > worst.max_abs or worst.token is None:
            token = None
            if stage == "input_ids" or golden.dim() > 1:
                token = int(difference.reshape(len(golden), -1).amax(dim=1).argmax())
            if largest >= worst.max_abs:
                worst = StageDifference(stage, len(pairs), largest, bar, number, token)
    return worst

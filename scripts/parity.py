"""Prove that minilm computes the published model: compare it with the reference, stage by stage.

    python scripts/parity.py [--model FOLDER] [--texts FILE] [--dtype DTYPE] [--json]
                             [--markdown FILE]

Without --dtype two comparisons are made. In float64, ours against the reference: any wrong detail
shows there by eight orders. In float32, ours against the reference's float64 as the truth, and
beside it the reference's own float32 error. Only real tokens are compared: what comes out at
padding positions means nothing. Exit status: 0 if every row is within its bar, 1 if not.

Where the reference (pip install "minilm[reference]") is absent, the comparison is made with the
golden values in tests/data instead, for the default model.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout is enough

import torch  # noqa: E402

import minilm  # noqa: E402
import results  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.errors import InputError, MinilmError  # noqa: E402
from minilm.inputs import as_dtype  # noqa: E402
from minilm.parity.digest import digest  # noqa: E402
from minilm.parity.foreign import read_texts  # noqa: E402
from minilm.parity.stages import (  # noqa: E402
    Golden,
    Report,
    Row,
    compare_gradients,
    compare_ids,
    compare_invariance,
    compare_stages,
    compare_with_golden,
)
from minilm.pretrained import hub  # noqa: E402
from minilm.pretrained.checkpoint import published_name  # noqa: E402

DATA = ROOT / "tests" / "data"
MAX_INVARIANCE_TEXTS = 50  # alone, beside a long neighbour, ...: costly, and says the same
MAX_GRADIENT_TEXTS = 32


def main() -> int:
    """Print the report; the exit status says whether it passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default=hub.DEFAULT_MODEL, metavar="FOLDER", help="a folder or a Hub name"
    )
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="one text a line, or .jsonl with a field text (default: tests/data)",
    )
    parser.add_argument("--dtype", help="compare in this dtype only: float64, float32, ...")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    results.add_option(parser)
    options = parser.parse_args()
    try:
        report, about = run(options.model, options.texts, options.dtype)
    except (MinilmError, OSError) as error:
        print(f"parity: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps({"about": about} | report.to_dict(), indent=2))
    else:
        with results.recorded(options.markdown, "Parity with the reference, stage by stage"):
            print("\n".join(f"{name}: {value}" for name, value in about.items()), end="\n\n")
            print(report.to_text())
    return 0 if report.passed else 1


def run(model: str, texts_file: Path | None, dtype: str | None) -> tuple[Report, dict[str, str]]:
    """Compare in one dtype, or in float64 and float32."""
    from reference import is_installed

    dtypes = [as_dtype(dtype)] if dtype else [torch.float64, torch.float32]
    loaded = [SentenceEncoder.from_pretrained(model, device="cpu", dtype=each) for each in dtypes]
    encoders = {each.dtype: each for each in loaded}  # which may be float32 for bfloat16
    first = loaded[0]
    source = first.source
    assert source is not None
    about = {
        "model": f"{source.name}, {str(source.location).removeprefix(f'{ROOT}/')}",
        "weights": next(h for name, h in source.sha256.items() if name.endswith(".safetensors")),
        "minilm": f"{minilm.__version__}, torch {torch.__version__}",
    }
    if first.dtype in (torch.float32, torch.float64):
        found = digest(first)
        said = "as pinned" if found.is_equal else f"not as pinned, from {found.first} on"
        about["digest"] = f"{found.sha256['embedding']}, {said}"
    if not is_installed():
        for name, unusable in (
            ("--texts", texts_file is not None),
            ("--model", about["weights"] != hub.SHA256["model.safetensors"]),
        ):
            if unusable:
                raise InputError(
                    f"{name} needs the reference, since golden values are of the published model "
                    'and their own texts; pip install "minilm[reference]"',
                    name,
                )
        golden = Golden.load(DATA / "golden.json")
        about["reference"] = (
            "not installed: compared with its golden values in tests/data/golden.json instead; "
            'pip install "minilm[reference]" for the full comparison'
        )
        report = Report(golden.texts)
        for d, encoder in encoders.items():
            report.add(f"{_name(d)}: ours - golden (float64)", compare_with_golden(encoder, golden))
        return report, about

    texts = read_texts(texts_file or DATA / "parity_texts.jsonl")
    return compare(encoders, texts, about), about


def compare(
    encoders: dict[torch.dtype, SentenceEncoder], texts: list[str], about: dict[str, str]
) -> Report:
    """Make every comparison with the reference; `about` gets what it was made with."""
    from reference import load_reference

    first = next(iter(encoders.values()))
    assert first.source is not None
    assert first.tokenizer is not None
    folder = first.source.path("modules.json").parent
    truth = load_reference(folder, torch.float64)
    tokens = first.tokenizer(texts, first.max_seq_length)
    about["reference"] = ", ".join(f"{name} {v}" for name, v in truth.versions.items())
    about["texts"] = (
        f"{len(texts)} of {min(map(len, tokens.input_ids))} to "
        f"{max(map(len, tokens.input_ids))} tokens, {sum(map(len, tokens.input_ids)):,} in all"
    )
    report = Report(texts)
    expected = [truth.tokenize(text) for text in texts]
    report.add("token ids", compare_ids(first.tokenizer, first.max_seq_length, texts, expected))
    for dtype, encoder in encoders.items():
        if dtype == torch.float64:
            rows = compare_stages(encoder, truth, texts)
            report.add("float64: ours - reference", rows)
            chosen = list(dict.fromkeys(texts))[:MAX_GRADIENT_TEXTS]
            if len(chosen) > 1:  # the cosine of one text with itself is 1, and its gradient 0
                size = f"{len(chosen)} x {len(chosen)}"
                rows = compare_gradients(*gradients(encoder, truth.model, chosen))
                report.add(f"float64: gradients of the mean of a {size} cosine matrix", rows)
        else:
            same = load_reference(folder, dtype)
            rows = compare_stages(encoder, same, texts, truth=truth)
            report.add(f"{_name(dtype)}: ours, and the reference, - reference in float64", rows)
            if dtype == torch.float32:
                rows = invariance(encoder, texts)
                report.add("float32: one text in any company", rows)
    return report


def invariance(encoder: SentenceEncoder, texts: list[str]) -> list[Row]:
    """Return the rows of `compare_invariance` on an even choice of the texts."""
    import warnings

    step = max(1, len(texts) // MAX_INVARIANCE_TEXTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", minilm.TruncationWarning)
        rows = compare_invariance(encoder, texts[::step])
    return [replace(row, worst_text=(row.worst_text or 0) * step) for row in rows]


def gradients(
    encoder: SentenceEncoder, reference: Any, texts: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return our and their gradients of the mean cosine of all pairs, by published name."""
    assert encoder.tokenizer is not None
    tokens = encoder.tokenizer(texts, encoder.max_seq_length)
    features = encoder.tokenizer.pad(tokens.input_ids)
    both = []
    for model in (encoder, reference):
        model.zero_grad()
        embeddings = model(dict(features))["sentence_embedding"]  # [32, 384], length 1
        (embeddings @ embeddings.T).mean().backward()
        bert: Any = encoder.bert if model is encoder else model[0].auto_model
        both.append({n: p.grad for n, p in bert.named_parameters() if p.grad is not None})
        model.zero_grad()
    return {published_name(name): grad for name, grad in both[0].items()}, both[1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())

"""Ours against the reference library, stage by stage, on the texts in tests/data."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conftest import DATA, ROOT
from minilm import SentenceEncoder, bert
from minilm.parity.stages import compare_stages
from mutations import planted

pytestmark = pytest.mark.reference

parity = pytest.importorskip("parity", reason="needs scripts/parity.py")
reference_module = pytest.importorskip("reference")
if not reference_module.is_installed():
    pytest.skip("needs the reference: pip install 'minilm[reference]'", allow_module_level=True)

FILE = DATA / "parity_texts.jsonl"
TEXTS = parity.read_texts(FILE)


def chosen() -> list[dict[str, str]]:
    """Sixty rows of the file: of each kind the shortest, the longest and five between them.

    All languages of article 1 are one kind; of the other declarations but the English ones there
    is one text of middle length in each language.
    """
    kinds: dict[str, list[dict[str, str]]] = {}
    every = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    for row in {row["text"]: row for row in every}.values():
        kind = "article 1" if row["kind"].startswith("article 1") else row["kind"]
        kinds.setdefault(kind, []).append(row)
    rows = []
    for kind, found in kinds.items():
        found.sort(key=lambda row: (len(row["text"]), row["text"]))
        is_one = kind.startswith("declaration") and kind != "declaration en"
        shares = [3] if is_one else range(7)
        rows += [found[share * (len(found) - 1) // 6] for share in shares]
    return rows


def test_texts_are_many_and_varied(encoder: SentenceEncoder) -> None:
    assert len(TEXTS) >= 500
    assert encoder.tokenizer is not None
    lengths = {len(ids) for ids in encoder.tokenizer(TEXTS, 256).input_ids}
    assert {2, 3, 256} <= lengths
    assert len(lengths) > 100


def test_the_choice_is_as_varied(encoder: SentenceEncoder) -> None:
    rows = chosen()
    assert len({row["text"] for row in rows}) == len(rows) == 60
    assert {row["kind"].split()[0] for row in rows} == {
        "special", "everyday", "code", "declaration", "article", "naughty", "emoji",
    }  # fmt: skip
    assert len({row["kind"] for row in rows if row["kind"].startswith("declaration")}) == 12
    assert encoder.tokenizer is not None
    lengths = {len(ids) for ids in encoder.tokenizer([row["text"] for row in rows], 256).input_ids}
    assert {2, 3, 256} <= lengths
    assert len(lengths) > 25


def test_full_report_passes(
    published: Path, is_full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids, float64 and float32 stages, gradients and invariance, as scripts/parity.py runs it.

    With --full on all texts.
    """
    file = tmp_path / "chosen.jsonl"
    if not is_full:
        monkeypatch.setattr(parity, "MAX_INVARIANCE_TEXTS", 20)
        # The gradients are of the first texts: from the end these are of 6 to 256 tokens.
        monkeypatch.setattr(parity, "MAX_GRADIENT_TEXTS", 8)
        rows = "".join(json.dumps(row) + "\n" for row in reversed(chosen()))
        file.write_text(rows, encoding="utf-8")
    report, about = parity.run(str(published), None if is_full else file, None)
    print(report.to_text())
    assert report.passed, report.to_text()
    assert about["texts"].startswith(f"{len(TEXTS) if is_full else 60} of 2 to 256 tokens")
    headings = [heading.split(":")[0] for heading, _ in report.sections]
    assert headings == ["token ids", "float64", "float64", "float32", "float32"]


@pytest.fixture(scope="module")
def truth(published: Path) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    source: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    source = reference_module.load_reference(published, torch.float64)
    return source


# Where a fault sits and where the report must see it first.
@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        ("type_row_left_out", "embeddings.layer_norm.output"),
        ("eps_1e_6_in_every_norm", "embeddings.layer_norm.output"),
        ("padding_attended", "layers.0.attention.probabilities"),
        ("scale_left_out", "layers.0.attention.probabilities"),
        ("query_and_key_swapped", "layers.0.attention.probabilities"),
        ("tanh_gelu", "layers.0.feed_forward_layer_norm.output"),
        ("norm_before_instead_of_after", "layers.0.attention.probabilities"),
        ("norms_of_a_layer_swapped", "layers.2.feed_forward_layer_norm.output"),
        ("heads_in_another_order", "layers.3.feed_forward_layer_norm.output"),
        ("two_layers_swapped", "layers.2.attention.probabilities"),
        ("one_bias_left_out", "layers.5.feed_forward_layer_norm.output"),
        ("padding_in_the_mean", "pooled"),
        ("not_normalized", "embedding"),
    ],
)
def test_fault_is_located(
    encoder64: SentenceEncoder,
    truth: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]],
    fault: str,
    stage: str,
) -> None:
    with planted(fault, encoder64) as broken:
        rows = compare_stages(broken, truth, TEXTS[:12], tokens_per_batch=256)
    assert next(row.stage for row in rows if not row.passed) == stage


def run_script(
    *arguments: str, before: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run scripts/parity.py in a process of its own, after the statements in `before`."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT)!r}]
{before}
import parity
sys.exit(parity.main())
"""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
    )


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run scripts/parity.py in this process, in which the reference is imported already."""
    monkeypatch.setattr(sys, "argv", ["parity.py", *arguments])
    code: int = parity.main()
    return code


def test_script_on_own_texts_as_json(
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = tmp_path / "texts with blanks.txt"
    texts.write_text("One text a line.\n\nZwölf Boxkämpfer\n", encoding="utf-8")
    arguments = ["--model", str(published), "--texts", str(texts), "--dtype", "float64", "--json"]
    assert run_here(monkeypatch, *arguments) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["texts"] == 3


def test_script_fails_and_names_the_stage_and_the_text(
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a text\n", encoding="utf-8")
    tanh = functools.partial(F.gelu, approximate="tanh")
    # In our module alone, so that the reference keeps its own.
    monkeypatch.setattr(bert, "F", SimpleNamespace(**vars(F) | {"gelu": tanh}))
    arguments = ["--model", str(published), "--texts", str(texts), "--dtype", "float64"]
    assert run_here(monkeypatch, *arguments) == 1
    out = capsys.readouterr().out
    assert "first stage that diverges: layers.0.feed_forward_layer_norm.output" in out
    assert "text that diverges most there: [0] 'a text'" in out


@pytest.mark.process
def test_script_without_the_model(tmp_path: Path) -> None:
    done = run_script("--model", str(tmp_path / "missing"))
    assert done.returncode == 1
    assert "no such folder" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.process
def test_script_without_the_reference_uses_golden_values(published: Path) -> None:
    hide = """
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "sentence_transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if "transformers" in name else find_spec(name)
"""
    done = run_script("--model", str(published), before=hide)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "not installed: compared with its golden values" in done.stdout
    assert "PASS: 4 of 4 rows within their bars" in done.stdout


@pytest.mark.process
def test_script_leaves_the_hub_reachable() -> None:
    """A model that is named must still be fetchable, whatever is imported first."""
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT)!r}]
import reference, parity
from huggingface_hub import constants
print(constants.HF_HUB_OFFLINE)
"""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "False"

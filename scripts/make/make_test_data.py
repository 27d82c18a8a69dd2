"""Make the files in tests/data: the texts of the parity check, and golden values.

    python scripts/make/make_test_data.py texts DIR
        parity_texts.jsonl from the data described in tests/data/SOURCE.md, which lies in DIR
    python scripts/make/make_test_data.py golden
        golden.json from the reference library
    python scripts/make/make_test_data.py settings
        tokenizer_settings.json from transformers 4.57

All are deterministic. Some of the texts are snippets of minilm/ as it is when the first is run, so
that it gives other texts once those files have changed; the golden values stay the same.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

DATA = ROOT / "tests" / "data"
PARITY_TEXTS = DATA / "parity_texts.jsonl"
GOLDEN = DATA / "golden.json"
TOKENIZER_SETTINGS = DATA / "tokenizer_settings.json"

# Written for this project.
EVERYDAY = """\
The weather is lovely today.|It's so sunny outside!|He drove to the stadium.
A man is eating food.|A man is eating a piece of bread.|The girl is carrying a baby.
How do I reset my password?|I forgot my login details.|Where can I change my e-mail address?
The new movie is awesome.|The new movie is not awesome.|Dog bites man.|Man bites dog.
Quarterly revenue rose 4.2% to $1.3bn, beating estimates.|Shares fell after the report.
Mix the flour, two eggs and 250 ml of milk; let it rest.|Bake at 180 °C for 35 minutes.
The patient was given 5 mg of the drug twice a day.|No side effects were seen.
To be, or not to be?|E = mc²|x² + y² = r²|π ≈ 3.14159|H₂O|½ cup|№ 7|10⁻³|∑ᵢ aᵢ
ok|No.|why?!|...|a|I|42|-1|3.14|2026-11-24|12:30|+1 (555) 010-9999|user@example.org
https://example.org/a/b?c=d&e=f#g|C:\\Users\\me\\file.txt|/usr/bin/env|v1.2.3-rc.4|#tag @name
THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG|the quick brown fox jumps over the lazy dog
naïve café résumé coöperate façade|naive cafe resume cooperate facade|Ångström|straße|ŒUVRE
antidisestablishmentarianism|pneumonoultramicroscopicsilicovolcanoconiosis|floccinaucinihilipilification
"""

SPECIAL = [
    "", " ", "  \n\t ", "[MASK]", "[CLS] [SEP]", "[PAD][PAD]", "the [UNK] word", "##ing", "[mask]",
    "a" * 100, "a" * 101, "a" * 5000, "a b " * 400, "cafe\u0301", "caf\u00e9", "e" + "\u0301" * 40,
    "\u200b", "\ufeffbom", "nul\x00here", "\x01\x02\x1f", "tab\tand\r\nnewline",
    "\u202eright to left",
    "soft\u00adhyphen", "no\u00a0break", "ideographic\u3000space", "line\u2028separator", "\ufffd",
    "\U0001d54c\U0001d55f\U0001d55a\U0001d554\U0001d560\U0001d555\U0001d556",
    "ﬁ ligature", "İstanbul I ı i",
    "ǅ Ǆ ǆ", "ΑΣ ας", "한국어 한국어", "漢字とかな", "\u4e00\u4e8c\u4e09", "\U00020000 rare",
    "👩‍👩‍👧‍👦 family", "🇩🇪🇫🇷 flags", "👍🏽 skin", "☃ ☂ ✓ ✗", "→ ⇒ ∀ ∃",
    "“quotes” ‘and’ —dashes–", "_under_score_",
    "snake_case camelCase kebab-case", "!!!???...", "(((())))", "a.b.c",
    "don't can't won't", "$100 €100 £100",
]  # fmt: skip

CODE = """\
for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }
SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name HAVING COUNT(*) > 1;
fn main() { let v: Vec<u8> = (0..10).collect(); println!("{:?}", v); }
const f = async (x) => (await fetch(`/api/${x}`)).json();
<div class="card"><p>Hello &amp; welcome</p></div>
{"id": 7, "tags": ["a", "b"], "ok": true, "none": null}
git commit -am "fix: off by one" && git push --force-with-lease
^\\s*(\\d{4})-(\\d{2})-(\\d{2})T.*Z$
lambda x: {k: v for k, v in sorted(x.items())}
0xDEADBEEF 1e-12 0b1010 1_000_000
"""


def main() -> None:
    """Make one of the files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("texts", "golden", "settings"))
    parser.add_argument("directory", nargs="?", type=Path)
    options = parser.parse_args()
    if options.part == "golden":
        make_golden()
    elif options.part == "settings":
        make_settings()
    elif options.directory is None:
        parser.error("texts needs the directory with the data")
    else:
        make_texts(options.directory)


def make_texts(directory: Path) -> None:
    """Choose some 700 texts of 1 to 256 tokens and beyond, of as many kinds as possible."""
    rng = random.Random(20261124)
    rows: list[tuple[str, str]] = [("special", text) for text in SPECIAL]
    rows += [("everyday", text) for line in EVERYDAY.splitlines() for text in line.split("|")]
    rows += [("code", line) for line in CODE.splitlines()]
    for path in sorted((ROOT / "minilm").rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        for _ in range(4):
            start = rng.randrange(len(lines))
            rows.append(("code", "\n".join(lines[start : start + rng.choice((1, 3, 8, 20))])))
    for row in _read(directory / "text" / "udhr_long.jsonl"):
        words = row["text"].split()
        count = 120 if row["lang"] == "en" else 9
        for _ in range(count):
            start = rng.randrange(len(words))
            piece = " ".join(words[start : start + int(2 ** rng.uniform(0, 7.8))])
            rows.append((f"declaration {row['lang']}", piece[:1500]))
    articles = _read(directory / "text" / "udhr_article1.jsonl")
    rows += [(f"article 1 {row['lang']}", row["text"]) for row in articles[::3]]
    emoji = [row["text"] for row in _read(directory / "text" / "emoji.jsonl")]
    rows += [("emoji", " ".join(rng.sample(emoji, rng.randint(1, 12)))) for _ in range(40)]
    naughty = [row["text"] for row in _read(directory / "text" / "naughty_strings.jsonl")]
    strange = [text for text in naughty if not text.isascii()]
    rows += [("naughty", text) for text in strange[:120]]
    rows = list(dict.fromkeys(rows))
    rng.shuffle(rows)
    with PARITY_TEXTS.open("w", encoding="utf-8", newline="\n") as file:
        for kind, text in rows:
            file.write(json.dumps({"kind": kind, "text": text}, ensure_ascii=True) + "\n")
    print(f"{PARITY_TEXTS.name}: {len(rows)} texts")


def make_golden() -> None:
    """Write 32 texts with the reference's token ids and float64 embeddings."""
    import torch

    from minilm.parity.golden import TEXTS
    from reference import load_reference

    texts = [
        "The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.",
        "", "   ", "a", "Café naïve ÅNGSTRÖM", "Dog bites man.", "Man bites dog.",
        "for (int i = 0; i < n; ++i) { sum += a[i] * b[i]; }", "https://example.org/a?b=c",
        "Все люди рождаются свободными и равными.", "人人生而自由，在尊严和权利上一律平等。",
        "يولد جميع الناس أحراراً", "👩‍👩‍👧‍👦 🎉 ok", "[MASK] is a word", "x" * 101,
        " ".join(f"word{n}" for n in range(60)),
        " ".join(["All human beings are born free and equal in dignity and rights."] * 12),
        " ".join(f"Sentence number {n} is a little different." for n in range(80)),
        # Those of the golden folder that tokenizers read in different ways.
        *(each.text for each in TEXTS[50:62]),
    ]  # fmt: skip
    model = load_reference(ROOT / "weights" / "all-MiniLM-L6-v2", torch.float64)
    # Rows of a batch differ in the last digit from texts alone; the kept values are those alone.
    golden = [
        {
            "text": text,
            "input_ids": model.tokenize(text),
            "embedding": model(_features(model.tokenize(text)))["embedding"][0].tolist(),
        }
        for text in texts
    ]
    lines = ",\n".join(json.dumps(row, ensure_ascii=True) for row in golden)
    header = json.dumps(
        {"made_by": "scripts/make/make_test_data.py golden", "from": model.versions}
    )
    GOLDEN.write_text(f'{header[:-1]}, "texts": [\n{lines}\n]}}\n', encoding="utf-8")
    print(f"{GOLDEN.name}: {len(golden)} texts")


# What tokenizer_config.json may say, `...` being nothing at all, and tokenizer.json's normalizer.
SETTINGS: dict[str, tuple[Any, ...]] = {
    "tokenizer_class": (
        ..., None, "BertTokenizer", "BertTokenizerFast", "ElectraTokenizer",
        "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend",
    ),
    "do_lower_case": (..., True, False, None),
    "strip_accents": (..., True, False, None),
    "tokenize_chinese_chars": (..., True, False, None),
}  # fmt: skip
NORMALIZERS: tuple[dict[str, Any], ...] = (
    {},
    {"lowercase": False},
    {"lowercase": False, "strip_accents": True},
    {"strip_accents": False},
    {"handle_chinese_chars": False},
)
SETTINGS_TEXT = "The dog CAFE caf\u00e9 \u72acdog"


def settings_cases() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Return all combinations of what tokenizer_config.json says and what the normalizer says."""
    for *values, normalizer in itertools.product(*SETTINGS.values(), NORMALIZERS):
        pairs = zip(SETTINGS, values, strict=True)
        yield {name: value for name, value in pairs if value is not ...}, normalizer


def reference_ids(
    folder: Path, config: dict[str, Any], normalizer: dict[str, Any]
) -> list[int] | None:
    """Return the ids of `SETTINGS_TEXT` by the installed transformers; None for an error.

    Args:
        folder: Where the three files of a tokenizer can be written.
        config: What tokenizer_config.json says.
        normalizer: Changes to the normalizer of the tests' tiny tokenizer.json.
    """
    from transformers import AutoTokenizer

    from conftest import tiny_tokenizer_json

    values = tiny_tokenizer_json()
    values["normalizer"] |= normalizer
    for name, content in {
        "config.json": {"model_type": "bert"},
        "tokenizer.json": values,
        "tokenizer_config.json": config,
    }.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    try:
        ids: list[int] = AutoTokenizer.from_pretrained(folder)(SETTINGS_TEXT)["input_ids"]
    except (TypeError, ValueError, ImportError):  # the last stands for others in version 4
        return None
    return ids


def make_settings() -> None:
    """Write what becomes of a text with every combination of settings, a letter for each result."""
    import transformers

    sys.path.insert(0, str(ROOT / "tests"))
    with tempfile.TemporaryDirectory() as folder:
        found = [reference_ids(Path(folder), *case) for case in settings_cases()]
    results = [ids for ids, _ in itertools.groupby(sorted(map(str, found)))]
    letters = "".join(chr(ord("a") + results.index(str(ids))) for ids in found)
    table = {
        "made_by": "scripts/make/make_test_data.py settings",
        "transformers": transformers.__version__,
        "results": {chr(ord("a") + i): json.loads(r.replace("None", "null"))
                    for i, r in enumerate(results)},
        "cases": [letters[i : i + 80] for i in range(0, len(letters), 80)],
    }  # fmt: skip
    TOKENIZER_SETTINGS.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    print(f"{TOKENIZER_SETTINGS.name}: {len(found)} combinations, {len(results)} results")


def _features(input_ids: list[int]) -> dict[str, Any]:
    import torch

    ids = torch.tensor([input_ids])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _read(path: Path) -> list[dict[str, Any]]:
    # Not splitlines: some texts hold other line separators of Unicode.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


if __name__ == "__main__":
    main()

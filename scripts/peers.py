#!/usr/bin/env python3
"""What other programs make of this model: the table of the field guide, and some of them run again.

    scripts/peers.py                    the table, from the vectors in tests/data/peers
    scripts/peers.py --write            writes it into minilm/parity/README.md
    scripts/peers.py kitoken            installs that program into .venv-peers-kitoken, and compares
                                        what it makes of the 71 texts with this model

The vectors were made by the versions in the table. What the columns say of ids and arithmetic is
what `minilm parity --against` finds; the cosines are of all 71 texts, to the exact vectors.
"""

import argparse
import base64
import json
import subprocess
import sys
import tempfile
import venv
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

PEERS = ROOT / "tests" / "data" / "peers"
GUIDE = ROOT / "minilm" / "parity" / "README.md"
MODEL = ROOT / "weights" / "all-MiniLM-L6-v2"
START, END = "<!-- written by scripts/peers.py -->", "<!-- to here -->"

HEADINGS = (
    "program", "cosine, up to 128 tokens", "cosine, all", "cut", "reads otherwise",
    "computes otherwise", "to get this model's vectors",
)  # fmt: skip
OWN_TOKENIZER = "give it ids of the published `tokenizer.json`, cut at 256"
FLOAT32 = "use the float32 model"
# What to set to get this model's vectors; nothing for those that give them.
REMEDIES = {
    "embed-anything": "cut texts at 256 tokens before",
    "fastembed": "`model.model.tokenizer.enable_truncation(256)`",
    "fastretrieval": "cut texts at 256 tokens before",
    "flash-tokenizer": OWN_TOKENIZER,
    "flash-tokenizer-bidirectional": OWN_TOKENIZER,
    "keras-hub": OWN_TOKENIZER,
    "keras-hub-strip-accents": OWN_TOKENIZER,
    "kitoken": OWN_TOKENIZER,
    "llama-cpp-f32": f"{OWN_TOKENIZER}; divide vectors by their length; the GELU can't be set",
    "mlx-embeddings": "cut texts at 256 tokens before",
    "onnxruntime-extensions": OWN_TOKENIZER,
    "onnxruntime-int8-per-channel": FLOAT32,
    "onnxruntime-int8-per-channel-alone": FLOAT32,
    "onnxruntime-int8-per-tensor": FLOAT32,
    "onnxruntime-uint8-per-tensor": FLOAT32,
    "tf-text-bert-tokenizer": OWN_TOKENIZER,
    "transformers-js": OWN_TOKENIZER,
    "txtai": "cut texts at 256 tokens before; divide vectors by their length",
}

# Programs that can be run again: what to install, and a script that prints ids of texts, as JSON.
AGAIN = {
    "kitoken": (
        "kitoken==0.11.1",
        """
from kitoken import Kitoken
tokenizer = Kitoken.from_file(sys.argv[2])
rows = [tokenizer.encode(text, True) for text in texts]
print(json.dumps([[101, *(each for each in row if each), 102] for row in rows]))
""",
    ),
    "flash-tokenizer": (
        "flash-tokenizer==1.2.0",
        """
import pathlib, tempfile
from flash_tokenizer import BertTokenizerFlash
words = json.load(open(sys.argv[2], encoding="utf-8"))["model"]["vocab"]
file = pathlib.Path(tempfile.mkdtemp()) / "vocab.txt"
file.write_text("\\n".join(sorted(words, key=words.get)), encoding="utf-8")
tokenizer = BertTokenizerFlash(str(file), do_lower_case=True, model_max_length=256)
rows = [tokenizer.tokenizer.encode(text, "longest", 256) for text in texts]
print(json.dumps([list(map(int, row)) for row in rows]))
""",
    ),
}
_READ = "import json, sys\ntexts = json.load(open(sys.argv[1], encoding='utf-8'))\n"


def main() -> None:
    """Print the table, write it, or run a program again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", choices=sorted(AGAIN), help="a program to run again")
    parser.add_argument("--write", action="store_true", help=f"write {GUIDE.relative_to(ROOT)}")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.name:
        run_again(options.name)
        return
    text = "\n".join(table())
    if options.write:
        whole = GUIDE.read_text(encoding="utf-8")
        before, _, rest = whole.partition(START)
        _, _, after = rest.partition(END)
        GUIDE.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    else:
        print(text)


def table() -> list[str]:
    """The lines of the table, a program a line."""
    from minilm.encoder import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(MODEL, device="cpu", dtype="float32")
    names = sorted(path.stem for path in PEERS.glob("*.json") if path.name != "texts.json")
    return [
        f"| {' | '.join(HEADINGS)} |",
        f"|{'---|' * len(HEADINGS)}",
        *(line_of(name, encoder) for name in names),
    ]


def line_of(name: str, encoder: Any) -> str:
    """The line of one program."""
    import numpy as np

    from minilm.parity.causes import diagnose

    texts = json.loads((PEERS / "texts.json").read_text(encoding="utf-8"))
    peer = json.loads((PEERS / f"{name}.json").read_text(encoding="utf-8"))
    vectors = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in peer["rows"]]
    found = diagnose(encoder, [texts[row["text"]] for row in peer["rows"]], np.stack(vectors))
    print(name, found.summary, file=sys.stderr, flush=True)
    columns = (
        f"{name} {peer['version']}, {peer['seen']}", f"{peer['min_cosine_under_128_tokens']:.4f}",
        f"{peer['min_cosine']:.4f}", *_by_kind(found), REMEDIES.get(name, ""),
    )  # fmt: skip
    return f"| {' | '.join(columns)} |"


def _by_kind(found: Any) -> list[str]:
    """What was found, of the cut, of the reading, and of the arithmetic."""
    kinds: list[list[str]] = [[], [], []]
    for cause in found.causes:
        is_cut = bool({"limit", "closed"} & cause.settings)
        kinds[0 if is_cut else 1 if cause.is_of_reading else 2].append(cause.name)
    if found.alternatives:
        names = [cause.name for cause in found.alternatives]
        kinds[1].append(" or ".join(names))
    if found.unexplained and found.verdict == "ids":
        kinds[1].append(f"{len(found.unexplained)} of {found.texts} texts in another way")
    return ["; ".join(kind) for kind in kinds]


def run_again(name: str) -> None:
    """Install a program, let it read the texts, and say what its ids are."""
    from minilm.encoder import SentenceEncoder
    from minilm.parity.ids import compare_ids

    package, script = AGAIN[name]
    folder = ROOT / f".venv-peers-{name}"
    python = folder / "bin" / "python"
    if not python.is_file():
        print(f"making the environment {folder.name}", flush=True)
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, package], check=True)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "run.py"
        file.write_text(_READ + script, encoding="utf-8")
        done = subprocess.run(
            [str(python), str(file), str(PEERS / "texts.json"), str(MODEL / "tokenizer.json")],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    ids = json.loads(done.stdout.splitlines()[-1])
    texts = json.loads((PEERS / "texts.json").read_text(encoding="utf-8"))
    encoder = SentenceEncoder.from_pretrained(MODEL, device="cpu")
    print(f"{package}, {len(texts)} texts\n{compare_ids(encoder, texts, ids).table()}")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""What other programs make of this model: the table of the field guide, and the programs run again.

    scripts/peers.py                    the table, from the vectors in tests/data/peers
    scripts/peers.py --write            writes it into minilm/parity/README.md
    scripts/peers.py kitoken            installs its newest release, into .venv-peers-kitoken, and
                                        says whether it makes of the 71 texts what it did
    scripts/peers.py kitoken --write    and writes that into tests/data/peers/kitoken.json

The vectors were made by the versions in the table. What the columns say of ids and arithmetic is
what `minilm parity --against` finds; the cosines are of all 71 texts, to the exact vectors. A
program that is run again exits with 1 if the table would say something else of it.
"""

import argparse
import base64
import datetime
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

from peers_programs import EXPORT, FIND, LEAVE, PROGRAMS  # noqa: E402

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
    "blingfire": OWN_TOKENIZER,
    "budtiktok": OWN_TOKENIZER,
    "embed-anything": "cut texts at 256 tokens before",
    "fastembed": "`model.model.tokenizer.enable_truncation(256)`",
    "fastretrieval": "cut texts at 256 tokens before",
    "flash-tokenizer": OWN_TOKENIZER,
    "flash-tokenizer-bidirectional": OWN_TOKENIZER,
    "iree-tokenizer": OWN_TOKENIZER,
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
    "openvino-tokenizers": OWN_TOKENIZER,
    "tf-text-bert-tokenizer": OWN_TOKENIZER,
    "transformers-js": OWN_TOKENIZER,
    "txtai": "cut texts at 256 tokens before; divide vectors by their length",
}
ROUNDING = 2e-6  # as in minilm.parity.causes
# Of a new program the texts that show most are kept, and these: plain, with accents, vowel signs,
# soft hyphens, control characters, other blanks and separators.
SHOWN, ALWAYS = 10, {0, 7, 20, 24, 41, 42, 56}


def main() -> int:
    """Print the table, write it, or run a program again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", choices=PROGRAMS, help="a program to run again")
    parser.add_argument("--write", action="store_true", help="write what is found into its file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.name:
        return int(not run_again(options.name, write=options.write))
    text = "\n".join(table())
    if options.write:
        whole = GUIDE.read_text(encoding="utf-8")
        before, _, rest = whole.partition(START)
        _, _, after = rest.partition(END)
        GUIDE.write_text(f"{before}{START}\n\n{text}\n\n{END}{after}", encoding="utf-8")
    else:
        print(text)
    return 0


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
    peer = json.loads((PEERS / f"{name}.json").read_text(encoding="utf-8"))
    seen = f"{name} {peer['version']}, {peer['seen']}"
    columns = seen, *_columns(peer, encoder), REMEDIES.get(name, "")
    return f"| {' | '.join(columns)} |"


def _columns(peer: dict[str, Any], encoder: Any) -> list[str]:
    """What the table says of a program: its cosines, and what `--against` finds."""
    from minilm.parity.causes import diagnose

    texts = _texts()
    found = diagnose(encoder, [texts[row["text"]] for row in peer["rows"]], vectors_of(peer))
    print(peer["program"], found.summary, file=sys.stderr, flush=True)
    cosines = peer["min_cosine_under_128_tokens"], peer["min_cosine"]
    return [*(f"{cosine:.4f}" for cosine in cosines), *_by_kind(found)]


def _texts() -> list[str]:
    texts: list[str] = json.loads((PEERS / "texts.json").read_text(encoding="utf-8"))
    return texts


def vectors_of(peer: dict[str, Any]) -> Any:
    """The vectors in the file of a program, float32 `[rows, 384]`."""
    import numpy as np

    data = [base64.b64decode(row["embedding"]) for row in peer["rows"]]
    return np.stack([np.frombuffer(each, "<f4") for each in data])


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


# --- programs that are run again


def run_again(name: str, *, write: bool) -> bool:
    """Install the newest release of a program, ask it, and say whether it does what it did.

    Returns:
        Whether the table would say the same of it.
    """
    from minilm.encoder import SentenceEncoder

    encoder = SentenceEncoder.from_pretrained(MODEL, device="cpu", dtype="float32")
    version, found = ask(name)
    file = PEERS / f"{name}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    now = made(before, name, version, found, encoder)
    same, lines = compared(before, now, encoder) if before else (False, [f"{name} is a new one"])
    print("\n".join(lines))
    if write:
        file.write_text(_written(now), encoding="utf-8")
    return same


def ask(name: str) -> tuple[str, dict[str, Any]]:
    """Install a program and ask it for the ids or vectors of all texts: its version, and those."""
    program = PROGRAMS[name]
    first, *_ = program.packages.split()
    folder = ROOT / f".venv-peers-{program.npm.strip('@').replace('/', '-') or first}"
    python = folder / "bin" / "python"
    if not python.is_file():
        print(f"making the environment {folder.name}", flush=True)
        venv.create(folder, with_pip=True)
        # What is installed here, torch above all, isn't installed again.
        here = sysconfig.get_path("purelib")
        (inside,) = folder.glob("lib/python*/site-packages")
        (inside / "here.pth").write_text(here, encoding="utf-8")
    packages = [*program.packages.split(), *(["onnx"] if program.wants_onnx else [])]
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--upgrade", *packages], check=True)
    if program.npm:
        npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts"]
        subprocess.run([*npm, f"{program.npm}@latest"], check=True, cwd=folder)
        about = folder / "node_modules" / program.npm / "package.json"
        version = json.loads(about.read_text(encoding="utf-8"))["version"]
    else:
        code = f"import importlib.metadata; print(importlib.metadata.version({first!r}))"
        version = subprocess.check_output([str(python), "-c", code], text=True).strip()
    with tempfile.TemporaryDirectory() as scratch:
        model = _model_folder(Path(scratch))
        hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(Path(scratch) / "hub")}
        # Only what writes the ONNX file may see this package.
        settings = {key: each for key, each in os.environ.items() if key != "PYTHONPATH"} | hub
        script = Path(scratch) / "run.py"
        arguments = [str(PEERS / "texts.json"), str(model)]
        if program.wants_onnx:
            script.write_text(FIND + EXPORT, encoding="utf-8")
            ours = settings | {"PYTHONPATH": str(ROOT)}
            subprocess.run(
                [str(python), "-W", "ignore", str(script), *arguments], check=True, env=ours
            )
            (model / "onnx").mkdir()
            (model / "onnx" / "model.onnx").symlink_to(model / "model.onnx")
        command = [str(python), str(script)]
        script.write_text(FIND + program.script + LEAVE, encoding="utf-8")
        if program.npm:
            script = folder / "run.mjs"  # beside node_modules
            script.write_text(program.script, encoding="utf-8")
            command = ["node", str(script)]
        done = subprocess.run(
            [*command, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=settings
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return version, found


def _model_folder(scratch: Path) -> Path:
    """The published files, `vocab.txt` and a list of special tokens; and a cache with the first."""
    model = scratch / "onnx"  # as chromadb calls it
    shutil.copytree(MODEL, model)
    words = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    (model / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)), encoding="utf-8")
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    (model / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    cached = scratch / "hub" / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    (cached / "refs").mkdir(parents=True)
    revision = "0" * 40
    (cached / "refs" / "main").write_text(revision, encoding="utf-8")
    shutil.copytree(MODEL, cached / "snapshots" / revision)
    return model


def made(
    before: dict[str, Any], name: str, version: str, found: dict[str, Any], encoder: Any
) -> dict[str, Any]:
    """What a program gave for all texts, as its file has it: of the texts that the file had before,
    or of those that show most.
    """
    import numpy as np

    from minilm.encoder import SentenceEncoder

    texts, limit = _texts(), encoder.max_seq_length
    ids, vectors, how = found.get("ids"), found.get("vectors"), "vectors by the program"
    if ids is not None and vectors is not None:
        how = "ids and vectors by the program"
    if vectors is None:
        how = "ids of this tokenizer, cut at 256, and this model's float32 vectors for them"
        ids = [row if len(row) <= limit else row[: limit - 1] + row[-1:] for row in found["ids"]]
        vectors = _vectors(ids, encoder)
    exact = SentenceEncoder.from_pretrained(MODEL, device="cpu", dtype="float64").encode(texts)
    vectors = np.asarray(vectors)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(exact, axis=1)
    cosines = (vectors * exact).sum(axis=1) / lengths
    tokenizer = encoder.get_tokenizer()
    is_short = np.array(tokenizer(texts).token_counts) <= 128
    own = tokenizer(texts, limit).input_ids
    rows = [row["text"] for row in before.get("rows", [])] or sorted(
        ALWAYS | set(np.argsort(cosines)[:SHOWN].tolist())
    )
    return {
        "program": name,
        "version": version,
        "seen": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "how": before.get("how", how),
        "min_cosine": float(cosines.min()),
        "min_cosine_under_128_tokens": float(cosines[is_short].min()),
        "rows": [
            {
                "text": row,
                "ids": None if ids is None or ids[row] == own[row] else ids[row],
                "embedding": base64.b64encode(vectors[row].astype("<f4").tobytes()).decode(),
            }
            for row in rows
        ],
    }


def _vectors(ids: list[list[int]], encoder: Any) -> list[Any]:
    """The vectors that this model has for the token ids of another program, one by one."""
    import torch

    with torch.inference_mode():
        batches = (encoder.get_tokenizer().pad([row], encoder.device) for row in ids)
        return [encoder(batch)["sentence_embedding"][0].numpy() for batch in batches]


def compared(before: dict[str, Any], now: dict[str, Any], encoder: Any) -> tuple[bool, list[str]]:
    """Whether a program does what it did, by the vectors of some texts, and that in words."""
    import numpy as np

    units = []
    for peer in (before, now):
        vectors = vectors_of(peer)
        units.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    apart = np.abs(units[0] - units[1]).max(axis=1)
    moved = [row["text"] for row, far in zip(now["rows"], apart, strict=True) if far > ROUNDING]
    seen, least = f"{before['program']} {before['version']}, {before['seen']}", "min_cosine"
    lines = [
        f"{seen}; now {now['version']}: vectors of length 1 are at most {apart.max():.1e} apart",
        f"cosine to this model: at least {before[least]:.4f}; now {now[least]:.4f}",
    ]
    if not moved:
        return True, [*lines, "it does what it did"]
    lines.append(f"other vectors for {len(moved)} of {len(apart)} texts: {moved}")
    kinds = [_columns(peer, encoder)[2:] for peer in (before, now)]
    lines += [
        f"{when}: {'; '.join(filter(None, each)) or 'equal to rounding'}"
        for when, each in zip(("before", "now"), kinds, strict=True)
    ]
    if kinds[0] == kinds[1]:
        return True, [*lines, "it does what it did, in other numbers"]
    return False, [*lines, "it does something else now: --write keeps it, and then the table"]


def _written(peer: dict[str, Any]) -> str:
    """The file of a program, a text a line."""
    head = json.dumps({key: value for key, value in peer.items() if key != "rows"})
    rows = ",\n".join(map(json.dumps, peer["rows"]))
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


if __name__ == "__main__":
    sys.exit(main())

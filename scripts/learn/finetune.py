"""Fine-tune the model on pairs of texts that belong together, in plain PyTorch.

    python scripts/learn/finetune.py [--pairs pairs.tsv] [-o my-model]  # some minutes on two cores

Each text should be nearer to its own partner than to those of the others in its batch (in-batch
negatives: Henderson et al. 2017, arXiv:1705.00652, section 4.4). By default the pairs are the first
and the last sentence of 1,000 abstracts (SciFact). Texts of the held-out pairs are not trained on.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # reference.py and retrieval.py
from minilm import SentenceEncoder, cos_sim
from minilm.pretrained import hub
from reference import is_installed, load_reference
from retrieval import DATA, FILES, SCIFACT, read_jsonl

Pairs = list[tuple[str, str]]


def read_pairs(path: Path | None) -> Pairs:
    if path is None:
        abstracts = read_jsonl(DATA / SCIFACT / FILES[0])
        texts = [re.split(r"(?<=[.!?])\s+", row["text"]) for row in abstracts]
        return [(sentences[0], sentences[-1]) for sentences in texts if len(sentences) > 2]
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    if wrong := [number for number, row in enumerate(rows, 1) if len(row) != 2]:
        raise SystemExit(f"{path}: pair {wrong[0]} is not two texts with a tab between")
    return [(a, b) for a, b in rows]


def split(pairs: Pairs, held_out: int) -> tuple[Pairs, Pairs]:
    """Shuffle the pairs into those to train on and those held out, with no text in both."""
    pairs = [pairs[place] for place in torch.randperm(len(pairs)).tolist()]
    seen = {text for pair in pairs[:held_out] for text in pair}
    return [pair for pair in pairs[held_out:] if seen.isdisjoint(pair)], pairs[:held_out]


def train(encoder: SentenceEncoder, pairs: Pairs, epochs: int, size: int, rate: float) -> None:
    batches: Any = torch.utils.data.DataLoader(pairs, size, shuffle=True)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * len(batches)  # the rate goes up for a tenth of them, then down to nothing
    schedule = OneCycleLR(optimizer, rate, steps, pct_start=0.1, cycle_momentum=False)
    encoder.train()
    for epoch in range(1, epochs + 1):
        losses = []
        for batch in batches:
            a, b = (encoder(encoder.tokenize(texts))["sentence_embedding"] for texts in batch)
            loss = F.cross_entropy(20 * cos_sim(a, b), torch.arange(len(a), device=a.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: mean loss {sum(losses) / len(losses):.4f}", flush=True)
    encoder.eval()


def report(name: str, encoder: SentenceEncoder, pairs: Pairs) -> None:
    scores = cos_sim(*(encoder.encode(texts) for texts in zip(*pairs, strict=True)))
    ranks = (scores >= scores.diag().unsqueeze(1)).sum(dim=1)  # 1: the partner is the nearest
    first, mean = (ranks == 1).double().mean(), (1 / ranks).mean()
    print(f"{name}: {first:.1%} find their partner first, mean reciprocal rank {mean:.4f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=Path, help="two texts a line, a tab between")
    parser.add_argument("--model", default=hub.DEFAULT_MODEL, metavar="NAME_OR_FOLDER")
    parser.add_argument("-o", "--output", type=Path, default=Path("finetuned"))
    for name, value in {"epochs": 2, "batch": 32, "rate": 2e-5, "held-out": 200, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    pairs, held_out = split(read_pairs(options.pairs), options.held_out)
    print(f"{len(pairs)} pairs to train on, {len(held_out)} held out")
    encoder = SentenceEncoder.from_pretrained(options.model)
    report("before", encoder, held_out)
    train(encoder, pairs, options.epochs, options.batch, options.rate)
    report("after", encoder, held_out)
    encoder.save_pretrained(options.output)
    texts = [text for pair in held_out for text in pair]
    loaded: list[Any] = [("minilm", SentenceEncoder.from_pretrained(options.output))]
    if is_installed():
        loaded += [("sentence-transformers", load_reference(options.output, torch.float32).model)]
    for name, model in loaded:
        error = abs(model.encode(texts) - encoder.encode(texts)).max()
        print(f"{options.output}, loaded by {name}: vectors differ by {error:.1e} at most")


if __name__ == "__main__":
    main()

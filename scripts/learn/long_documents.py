#!/usr/bin/env python
"""What is lost of long documents, and what reading them in windows regains: retrieval on SciFact.

    python scripts/learn/long_documents.py [--data FOLDER] [--model FOLDER] [--markdown FILE]

150 scientific claims look for their abstracts among 1,000, of which 72 % have more than 256
tokens. The folder holds `corpus.jsonl` (id, title, text), `queries.jsonl` (id, text) and
`qrels.tsv` (query, doc, grade).
"""

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import results  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from retrieval import DATA, SCIFACT, TOP, ndcg, read_retrieval  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA / SCIFACT)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    results.add_option(parser)
    options = parser.parse_args()
    if not (options.data / "corpus.jsonl").is_file():
        print(f"{options.data}: has no corpus.jsonl; pass --data FOLDER", file=sys.stderr)
        return 1
    with results.recorded(options.markdown, "Long documents, cut and read in windows"):
        compare(options)
    return 0


def compare(options: argparse.Namespace) -> None:
    """Print nDCG@10 for each way to read what is beyond the limit."""
    data = read_retrieval(options.data)
    encoder = SentenceEncoder.from_pretrained(options.model)
    documents, wanted = data.documents, data.grades
    asked = encoder.encode(data.queries)
    whole, report = encoder.encode(documents, truncation="silent", return_report=True)
    tokens, kept = np.array(report.token_counts), np.array(report.kept_token_counts)
    long = np.array([bool(set(report.cut_rows) & set(grades)) for grades in wanted])
    print(
        f"{len(documents):,} documents, {np.mean(tokens):.0f} tokens in the mean; "
        f"{np.mean(tokens > kept):.0%} have more than {encoder.max_seq_length}, and of those "
        f"{1 - kept[tokens > kept].sum() / tokens[tokens > kept].sum():.0%} of the tokens are cut"
    )
    print(f"nDCG@{TOP} of {len(wanted)} queries, and of the {long.sum()} that look for a cut one")

    def show(name: str, scores: np.ndarray) -> None:
        found = np.argsort(-scores, axis=1, kind="stable")  # equal ones in the documents' order
        of_long = ndcg(found[long], [wanted[row] for row in long.nonzero()[0]])
        print(f"  {ndcg(found, wanted):.4f}  {of_long:.4f}  {name}")

    limit = encoder.max_seq_length
    encoder.max_seq_length = 128
    show("cut at 128 tokens", asked @ encoder.encode(documents, truncation="silent").T)
    encoder.max_seq_length = limit
    show(f"cut at {limit} tokens", asked @ whole.T)
    show('truncation="chunk"', asked @ encoder.encode(documents, truncation="chunk").T)
    best = np.empty((len(data.queries), len(documents)), dtype=np.float32)
    for number, document in enumerate(documents):
        windows = encoder.encode_windows(document)
        best[:, number] = (asked @ np.stack([window.embedding for window in windows]).T).max(1)
    show("encode_windows, the best window", best)


if __name__ == "__main__":
    raise SystemExit(main())

"""all-MiniLM-L6-v2 in NumPy alone: from the bytes of two files to a matrix of similarities.

    python scripts/learn/from_scratch.py [--digest]

The shortest complete statement of the architecture, one sentence at a time: no batch, no padding.
`minilm/bert.py` is the same in PyTorch. --digest prints the one number of `minilm parity --digest`.
"""

import hashlib
import json
import math
import re
import struct
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

Array = Any  # np.ndarray: the types of its operators say less than the shapes below

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "weights" / "all-MiniLM-L6-v2"
SPECIAL = re.compile(r"(\[(?:PAD|UNK|CLS|SEP|MASK)\])")  # written out in a text
SENTENCES = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
LAYERS, HEADS, LIMIT, EPSILON = 6, 12, 256, 1e-12
GOLDEN = "golden_texts", "digest"
# The tokenizer's tables are of Unicode 8, and take what is newer for letters. Python's are not, and
# don't tell what is new: these three, of hundreds, are in the golden texts.
NEWER = "\u1ac5\u1dfb\u2e5d"
CHINESE = ("CJK UNIFIED IDEOGRAPH", "CJK COMPATIBILITY IDEOGRAPH")


def read_tensors(data: bytes) -> dict[str, Array]:
    """Read safetensors: 8 bytes give the length of the JSON that says where each tensor is."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    return {
        name: np.frombuffer(rest[slice(*about["data_offsets"])], "<f4").reshape(about["shape"])
        for name, about in header.items()
        if about.get("dtype") == "F32"
    }


def split(text: str) -> list[str]:
    """Drop control characters, accents and capitals; split words, punctuation and Chinese apart."""
    spaced = ""
    for c in text:
        kind = unicodedata.category(c)
        if kind[0] == "Z" or c in "\t\n\r":  # blanks
            spaced += " "
        elif kind not in ("Cc", "Cf", "Co") and c != "\ufffd":
            spaced += f" {c} " if unicodedata.name(c, "").startswith(CHINESE) else c
    parts = unicodedata.normalize("NFD", spaced)
    plain = (c for c in parts if unicodedata.category(c) != "Mn" or c in NEWER)
    lower = "".join(c.lower() for c in plain)
    return "".join(f" {c} " if is_punctuation(c) else c for c in lower).split()


def is_punctuation(c: str) -> bool:
    """True for what Unicode calls punctuation, and for ASCII but letters, digits and blanks."""
    known = unicodedata.category(c)[0] == "P" and c not in NEWER
    return known or ("!" <= c <= "~" and not c.isalnum())


def word_pieces(word: str, vocabulary: dict[str, int]) -> list[int]:
    """Take the longest piece that the vocabulary knows, then the longest of the rest, and so on."""
    ids: list[int] = []
    rest = word
    while rest:
        pieces = [("##" if ids else "") + rest[:end] for end in range(len(rest), 0, -1)]
        known = next((piece for piece in pieces if piece in vocabulary), None)
        if known is None or len(word) > 100:
            return [vocabulary["[UNK]"]]
        rest = rest[len(known) - (2 if ids else 0) :]
        ids.append(vocabulary[known])
    return ids


def tokenize(text: str, vocabulary: dict[str, int]) -> list[int]:
    """Return the ids of [CLS], as many pieces as there is room for, and [SEP]."""
    parts = ([p] if SPECIAL.match(p) else split(p) for p in SPECIAL.split(text))
    ids = [i for words in parts for word in words for i in word_pieces(word, vocabulary)]
    return [vocabulary["[CLS]"], *ids[: LIMIT - 2], vocabulary["[SEP]"]]


def softmax(x: Array) -> Array:
    """Return positive numbers of sum 1; the largest is subtracted so that none is infinite."""
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def gelu(x: Array) -> Array:
    """GELU, x Φ(x): how much of a number passes depends on the number."""
    return x * (1 + np.vectorize(math.erf, [x.dtype])(x / math.sqrt(2))) / 2


def encode(ids: list[int], w: dict[str, Array]) -> Array:
    """Ids `[tokens]` -> a vector of length 1, `[384]`; the last norm leaves ~0 at 127, 223, 319."""

    def linear(path: str, x: Array) -> Array:
        return x @ w[f"{path}.weight"].T + w[f"{path}.bias"]

    def norm(path: str, x: Array) -> Array:
        scale = np.sqrt(x.var(-1, keepdims=True) + EPSILON)
        return w[f"{path}.weight"] * (x - x.mean(-1, keepdims=True)) / scale + w[f"{path}.bias"]

    word, position, token_type = (
        w[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")
    )
    x = norm("embeddings.LayerNorm", word[ids] + position[: len(ids)] + token_type[0])
    for path in (f"encoder.layer.{number}" for number in range(LAYERS)):
        query, key, value = (  # [tokens, 384] -> [12, tokens, 32]
            linear(f"{path}.attention.self.{name}", x).reshape(len(x), HEADS, -1).swapaxes(0, 1)
            for name in ("query", "key", "value")
        )
        scores = query @ key.swapaxes(1, 2) / math.sqrt(query.shape[-1])  # [12, tokens, tokens]
        context = np.hstack(list(softmax(scores) @ value))  # [12, tokens, 32] -> [tokens, 384]
        attention = linear(f"{path}.attention.output.dense", context)
        x = norm(f"{path}.attention.output.LayerNorm", x + attention)
        inner = gelu(linear(f"{path}.intermediate.dense", x))  # [tokens, 384] -> [tokens, 1536]
        x = norm(f"{path}.output.LayerNorm", x + linear(f"{path}.output.dense", inner))
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def digest(vocabulary: dict[str, int], w: dict[str, Array]) -> str:
    """SHA-256 of the golden texts' vectors, computed in float64 and rounded once to float32."""
    folder, exact = ROOT / "minilm" / "parity", {name: x.astype("f8") for name, x in w.items()}
    texts, chosen = (json.loads((folder / f"{name}.json").read_bytes()) for name in GOLDEN)
    ids = [tokenize(texts[number]["text"], vocabulary) for number in chosen["texts"]]
    vectors = np.stack([encode(each, exact) for each in ids])
    return hashlib.sha256(vectors.astype("<f4").tobytes()).hexdigest()


if __name__ == "__main__":
    tensors = read_tensors((FOLDER / "model.safetensors").read_bytes())
    words = json.loads((FOLDER / "tokenizer.json").read_bytes())["model"]["vocab"]
    vectors = np.stack([encode(tokenize(text, words), tensors) for text in SENTENCES])
    print(digest(words, tensors) if "--digest" in sys.argv else (vectors @ vectors.T).round(4))

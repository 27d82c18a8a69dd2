"""The golden texts (`golden_texts.json`), and why each is there."""

import json
from dataclasses import dataclass
from importlib import resources

__all__ = ["TEXTS", "GoldenText"]


@dataclass(frozen=True)
class GoldenText:
    """A text, and why it is there.

    Attributes:
        text: The text.
        why: What it shows.
        has_stages: Whether the output of each layer is kept, for each of its tokens.
    """

    text: str
    why: str
    has_stages: bool = False


_DATA = resources.files("minilm.parity").joinpath("golden_texts.json").read_text(encoding="utf-8")
TEXTS = tuple(GoldenText(**each) for each in json.loads(_DATA))

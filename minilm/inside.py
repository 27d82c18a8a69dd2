"""What a `SentenceEncoder` tells of itself, as methods: `trace.py` and `explain.py`.

Those files are loaded when one of these is first called: most programs only encode.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from minilm.explain import ComponentExplanation, Contrast, Deletions, Explanation
    from minilm.trace import Trace

__all__ = ["LookInside"]


class LookInside:
    """The methods that open the model."""

    def trace(
        self,
        text: str,
        *,
        names: Iterable[str] | str | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> "Trace":
        """Every number between a text and its vector, by name: see `minilm.trace.trace`."""
        from minilm.trace import trace

        return trace(_encoder(self), text, names=names, dtype=dtype)

    def explain(
        self,
        a: str,
        b: str,
        *,
        by: str = "word",
        dtype: str | torch.dtype | None = "float64",
    ) -> "Explanation":
        """Identity. A cosine similarity as a sum over pairs: see `minilm.explain.explain`."""
        from minilm.explain import explain

        return explain(_encoder(self), a, b, by=by, dtype=dtype)

    def explain_components(
        self,
        a: str,
        b: str,
        *,
        by: str = "layer",
        dtype: str | torch.dtype | None = "float64",
    ) -> "ComponentExplanation":
        """Identity, given the measured divisors. The same as a sum over parts of the network: see
        `minilm.explain.explain_components`.
        """
        from minilm.explain import explain_components

        return explain_components(_encoder(self), a, b, by=by, dtype=dtype)

    def explain_deletions(
        self, a: str, b: str, *, dtype: str | torch.dtype | None = "float64"
    ) -> "Deletions":
        """Measurement. The similarity without each word of `a`: see
        `minilm.explain.explain_deletions`.
        """
        from minilm.explain import explain_deletions

        return explain_deletions(_encoder(self), a, b, dtype=dtype)

    def contrast(
        self,
        query: str,
        a: str,
        b: str,
        *,
        by: str = "word",
        dtype: str | torch.dtype | None = "float64",
    ) -> "Contrast":
        """Identity. Why the query is nearer to `a` than to `b`: see `minilm.explain.contrast`."""
        from minilm.explain import contrast

        return contrast(_encoder(self), query, a, b, by=by, dtype=dtype)


def _encoder(self: LookInside) -> Any:
    return self  # which has all that `minilm.trace.Encoder` names

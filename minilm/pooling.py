"""Token vectors -> one sentence vector of length 1.

In: `[batch, tokens, 384]` from `bert.py` and the attention mask. Out: `[batch, 384]`.
Next: `encoder.py` puts the pieces together.

Sentence-BERT (Reimers & Gurevych 2019, section 3) compares three ways to pool and takes the mean;
dividing by the length afterwards makes a dot product the cosine similarity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClsPooling", "MeanPooling", "Normalize"]


class MeanPooling(nn.Module):
    """The mean over the real tokens, [CLS] and [SEP] among them (Reimers & Gurevych 2019)."""

    def forward(self, token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute u = Σ_t m_t h_t / Σ_t m_t.

        Args:
            token_embeddings: h, floating point `[batch, tokens, 384]`.
            attention_mask: m, `[batch, tokens]`, 1 at real tokens, 0 at padding.

        Returns:
            `[batch, 384]` in the dtype of `token_embeddings`; 0 for a row with no real token.
        """
        mask = attention_mask.unsqueeze(-1).to(token_embeddings.dtype)  # [batch, tokens, 1]
        summed = (token_embeddings * mask).sum(dim=1)  # [batch, tokens, 384] -> [batch, 384]
        return summed / mask.sum(dim=1).clamp(min=1)  # a row with no token: 0 / 1, not 0 / 0


class ClsPooling(nn.Module):
    """The vector of the first token, [CLS]: what some models of this family pool by (bge, gte)."""

    def forward(self, token_embeddings: Tensor, attention_mask: Tensor) -> Tensor:
        """`[batch, tokens, 384]` -> `[batch, 384]`; the mask is not needed."""
        return token_embeddings[:, 0]


class Normalize(nn.Module):
    """Scale to Euclidean length 1."""

    def forward(self, sentence_embedding: Tensor) -> Tensor:
        """Divide by max(‖u‖, 1e-12), `[..., 384]` -> `[..., 384]`; a zero vector stays zero."""
        # 1e-12 is 0 in float16, and 0 / 0 no number: there, its smallest normal number.
        eps = max(1e-12, torch.finfo(sentence_embedding.dtype).tiny)
        return F.normalize(sentence_embedding, p=2.0, dim=-1, eps=eps)

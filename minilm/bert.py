"""Token ids -> token vectors: the whole architecture, in the order in which it runs.

BERT (Devlin et al. 2018) is the encoder half of the Transformer (Vaswani et al. 2017): three
embedding tables are added up, then a stack of equal layers follows, each an attention and a
feed-forward sublayer. MiniLM (Wang et al. 2020) has exactly this architecture; what was new is how
its small weights were trained, by distilling a larger model's attention.

In: `input_ids`, whole numbers `[batch, tokens]`.  Out: token vectors `[batch, tokens, 384]`.
Next: `pooling.py` makes one vector out of a sentence's token vectors.

Shapes stand in square brackets, with the sizes of all-MiniLM-L6-v2: hidden size 384 = 12 heads of
32, 6 layers, inner width 1536. `...` stands for dimensions that a layer does not look at: only
positions and attention know that tokens form sentences, and everything else acts on the last
dimension alone.

One argument runs through all layers: `attend`, any function

    attend(query, key, value) -> context        all [..., heads, head_size]

that lets the tokens of a sentence look at each other. `attention` below is its definition. A
faster kernel, or one that records what it sees, is passed in its place.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.config import BertConfig

__all__ = [
    "Attend",
    "BertEmbeddings",
    "BertFeedForward",
    "BertLayer",
    "BertModel",
    "BertSelfAttention",
    "attention",
]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class BertEmbeddings(nn.Module):
    """Word + position + token type, normalized (Devlin et al. 2018, section 3.2 and figure 2).

    The published model was trained on single texts: every token has type 0, so that row 0 of the
    type table is a constant added to every token. Leaving it out moves the result by 0.8.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """`[..., tokens]` -> `[..., tokens, 384]`.

        Args:
            input_ids: Rows of the word table, int64 `[..., tokens]`.
            token_type_ids: Likewise of the type table; all 0 by default.
            position_ids: Likewise of the position table; 0, 1, 2, ... by default. To be given
                where the last dimension of `input_ids` is not one sentence.
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[-1], device=input_ids.device)  # [tokens]
        hidden_states = (
            self.word_embeddings(input_ids)  # [..., tokens] -> [..., tokens, 384]
            + self.position_embeddings(position_ids)  # [tokens] -> [tokens, 384]
            + self.token_type_embeddings(token_type_ids)  # [..., tokens] -> [..., tokens, 384]
        )
        normalized: Tensor = self.dropout(self.layer_norm(hidden_states))
        return normalized


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout_prob: float = 0.0,
) -> Tensor:
    """softmax(Q Kᵀ / √d + mask) V, for each head (Vaswani et al. 2017, equation 1).

    The definition that every other kernel of this package is held to.

    Args:
        query, key, value: `[batch, tokens, heads, head_size]`, floating point.
        attention_mask: `[batch, tokens]`, 0 at the padding that no token may look at.
        dropout_prob: Share of the probabilities that is dropped, 0 outside training.

    Returns:
        context `[batch, tokens, heads, head_size]`: for each token, the mean of all tokens'
        values, weighted by how well its query matches their keys.
    """
    scores = torch.einsum("...qhd,...khd->...hqk", query, key) / math.sqrt(query.shape[-1])
    if attention_mask is not None:  # the lowest finite number: a row with no token gives no NaN
        padding = attention_mask[:, None, None, :] == 0  # [batch, 1, 1, tokens]
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
    probabilities = F.dropout(
        scores.softmax(dim=-1), dropout_prob
    )  # [batch, heads, tokens, tokens]
    return torch.einsum("...hqk,...khd->...qhd", probabilities, value)


class BertSelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2.2).

    MultiHead(X) = Concat(head_1, ..., head_12) W_O, head_i = Attention(X W_Q, X W_K, X W_V), where
    the twelve 384 -> 32 projections of the paper are the slices of one 384 -> 384 product.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.heads = (config.num_attention_heads, config.head_size)
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, attend: Attend = attention) -> Tensor:
        """`[..., 384]` -> `[..., 384]`."""
        query = self.query(hidden_states).unflatten(-1, self.heads)  # [..., 384] -> [..., 12, 32]
        key = self.key(hidden_states).unflatten(-1, self.heads)  # [..., 384] -> [..., 12, 32]
        value = self.value(hidden_states).unflatten(-1, self.heads)  # [..., 384] -> [..., 12, 32]
        context = attend(query, key, value).flatten(-2)  # [..., 12, 32] -> [..., 384]
        output: Tensor = self.dropout(self.output(context))
        return output


class BertFeedForward(nn.Module):
    """The position-wise feed-forward network (Vaswani et al. 2017, section 3.3).

    FFN(x) = GELU(x W_1 + b_1) W_2 + b_2, with BERT's GELU in place of the paper's ReLU: the exact
    form x Φ(x), Φ(x) = (1 + erf(x / √2)) / 2 (Hendrycks & Gimpel 2016), not its tanh approximation.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., 384]` -> `[..., 384]`."""
        activation = F.gelu(self.intermediate(hidden_states))  # [..., 384] -> [..., 1536]
        output: Tensor = self.dropout(self.output(activation))  # [..., 1536] -> [..., 384]
        return output


class BertLayer(nn.Module):
    """LayerNorm(x + Sublayer(x)), twice (Vaswani et al. 2017, sections 3.1 and 5.4).

    The norm stands after the addition ("post-LayerNorm"), as in the paper; most later models put
    it before the sublayer.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertSelfAttention(config)
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = BertFeedForward(config)
        self.feed_forward_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attend: Attend = attention) -> Tensor:
        """`[..., 384]` -> `[..., 384]`."""
        hidden_states = self.attention_layer_norm(
            hidden_states + self.attention(hidden_states, attend)
        )
        hidden_states = self.feed_forward_layer_norm(
            hidden_states + self.feed_forward(hidden_states)
        )
        return hidden_states


class BertModel(nn.Module):
    """Embeddings and a stack of layers: `[batch, tokens]` -> `[batch, tokens, 384]`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """The last layer's token vectors, `[batch, tokens, 384]`.

        Args:
            input_ids: int64 `[batch, tokens]`, below 30522.
            attention_mask: `[batch, tokens]`, 1 at real tokens, 0 at padding; all 1 by default.
                The vectors that come out at padding positions mean nothing.
            token_type_ids, position_ids: See `BertEmbeddings.forward`.
            attend: See the top of this file; by default `attention` with the mask.
        """
        if attend is None:
            dropout_prob = self.config.attention_probs_dropout_prob if self.training else 0.0
            attend = partial(attention, attention_mask=attention_mask, dropout_prob=dropout_prob)
        hidden_states: Tensor = self.embeddings(input_ids, token_type_ids, position_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attend)  # [batch, tokens, 384]
        return hidden_states

    def extra_repr(self) -> str:
        return str(self.config)

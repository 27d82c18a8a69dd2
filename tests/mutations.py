"""Faults to plant in our own model: each is a mistake that people really make in a port.

The parity check must fail on every one of them; see test_parity.py.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm import SentenceEncoder, bert
from minilm.bert import BertLayer, BertSelfAttention
from minilm.pooling import MeanPooling

__all__ = ["MUTATIONS", "planted"]

Plant = Callable[[SentenceEncoder, pytest.MonkeyPatch], None]
MUTATIONS: dict[str, Plant] = {}


def mutation(plant: Plant) -> Plant:
    MUTATIONS[plant.__name__] = plant
    return plant


@contextmanager
def planted(name: str, encoder: SentenceEncoder) -> Iterator[SentenceEncoder]:
    """A copy of the encoder with the fault in it."""
    broken = copy.deepcopy(encoder)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        MUTATIONS[name](broken, patch)
        yield broken


def norms(encoder: SentenceEncoder) -> list[nn.LayerNorm]:
    return [m for m in encoder.modules() if isinstance(m, nn.LayerNorm)]


def attention_with(patch: pytest.MonkeyPatch, change: Callable[..., Tensor]) -> None:
    """Replace the formula: `change(scores, mask)` gives the probabilities."""

    def attention(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
                  dropout_prob: float = 0.0) -> Tensor:  # fmt: skip
        scores = torch.einsum("...qhd,...khd->...hqk", query, key) / math.sqrt(query.shape[-1])
        assert attention_mask is not None
        padding = attention_mask[:, None, None, :] == 0
        return torch.einsum("...hqk,...khd->...qhd", change(scores, padding), value)

    patch.setattr(bert, "attention", attention)


def softmax(scores: Tensor, padding: Tensor) -> Tensor:
    return scores.masked_fill(padding, -torch.inf).softmax(-1)


# LayerNorm


@mutation
def eps_1e_6_in_every_norm(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    for norm in norms(encoder):
        norm.eps = 1e-6


@mutation
def eps_1e_5_in_one_norm(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    norms(encoder)[5].eps = 1e-5


@mutation
def unbiased_variance(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    def layer_norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        normalized = centred / (x.var(-1, keepdim=True, unbiased=True) + self.eps).sqrt()
        return normalized * self.weight + self.bias

    patch.setattr(nn.LayerNorm, "forward", layer_norm)


@mutation
def norm_before_instead_of_after(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    def pre_norm(self: BertLayer, x: Tensor, attend: Any) -> Tensor:
        x = x + self.attention(self.attention_layer_norm(x), attend)
        output: Tensor = x + self.feed_forward(self.feed_forward_layer_norm(x))
        return output

    patch.setattr(BertLayer, "forward", pre_norm)


@mutation
def norm_without_residual(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    def no_residual(self: BertLayer, x: Tensor, attend: Any) -> Tensor:
        x = self.attention_layer_norm(x + self.attention(x, attend))
        output: Tensor = self.feed_forward_layer_norm(self.feed_forward(x))
        return output

    patch.setattr(BertLayer, "forward", no_residual)


@mutation
def norms_of_a_layer_swapped(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    layer: Any = encoder.bert.layers[2]
    layer.attention_layer_norm, layer.feed_forward_layer_norm = (
        layer.feed_forward_layer_norm,
        layer.attention_layer_norm,
    )


@mutation
def embeddings_not_normalized(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    encoder.bert.embeddings.layer_norm = nn.Identity()  # type: ignore[assignment]


# feed-forward


@mutation
def tanh_gelu(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    exact = F.gelu
    patch.setattr(F, "gelu", lambda x: exact(x, approximate="tanh"))


@mutation
def relu(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "gelu", F.relu)


@mutation
def sigmoid_gelu(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(F, "gelu", lambda x: x * torch.sigmoid(1.702 * x))


# attention


@mutation
def padding_attended(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    attention_with(patch, lambda scores, padding: scores.softmax(-1))


@mutation
def padding_masked_too_weakly(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    attention_with(patch, lambda scores, padding: (scores - 10.0 * padding).softmax(-1))


@mutation
def mask_the_wrong_way_round(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    attention_with(patch, lambda s, padding: s.masked_fill(~padding, -1e9).softmax(-1))


@mutation
def scale_left_out(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    attention_with(patch, lambda scores, padding: softmax(scores * math.sqrt(32), padding))


@mutation
def scale_by_hidden_size(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    attention_with(patch, lambda s, padding: softmax(s * math.sqrt(32 / 384), padding))


@mutation
def softmax_over_queries(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    attention_with(patch, lambda s, padding: s.masked_fill(padding, -1e9).softmax(-2))


@mutation
def causal_mask(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    def causal(scores: Tensor, padding: Tensor) -> Tensor:
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
        return softmax(scores, padding | later)

    attention_with(patch, causal)


@mutation
def query_and_key_swapped(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    attention: Any = encoder.bert.layers[0].attention
    attention.query, attention.key = attention.key, attention.query


@mutation
def heads_in_another_order(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    weight: Any = encoder.bert.layers[3].attention.output.weight  # type: ignore[union-attr]
    size = encoder.bert.config.head_size
    weight.copy_(weight.view(len(weight), -1, size).flip(1).reshape(weight.shape))


@mutation
def heads_interleaved(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    def forward(self: BertSelfAttention, hidden_states: Tensor, attend: Any) -> Tensor:
        query, key, value = (
            product(hidden_states).unflatten(-1, self.heads[::-1]).transpose(-1, -2)
            for product in (self.query, self.key, self.value)
        )
        output: Tensor = self.output(attend(query, key, value).transpose(-1, -2).flatten(-2))
        return output

    patch.setattr(BertSelfAttention, "forward", forward)


@mutation
def value_weight_transposed(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    weight: Any = encoder.bert.layers[4].attention.value.weight  # type: ignore[union-attr]
    weight.copy_(weight.T.clone())


@mutation
def attention_output_left_out(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    encoder.bert.layers[1].attention.output = nn.Identity()  # type: ignore[union-attr]


# embeddings and the stack


@mutation
def type_row_left_out(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    encoder.bert.embeddings.token_type_embeddings.weight.zero_()


@mutation
def type_row_1(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    weight = encoder.bert.embeddings.token_type_embeddings.weight
    weight.copy_(weight.flip(0))


@mutation
def positions_from_1(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    weight = encoder.bert.embeddings.position_embeddings.weight
    weight.copy_(weight.roll(-1, 0))


@mutation
def positions_left_out(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    encoder.bert.embeddings.position_embeddings.weight.zero_()


@mutation
def two_layers_swapped(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    layers: Any = encoder.bert.layers
    layers[2], layers[3] = layers[3], layers[2]


@mutation
def last_layer_left_out(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    del encoder.bert.layers[5]


@mutation
def one_bias_left_out(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    layer: Any = encoder.bert.layers[5]
    layer.feed_forward.output.bias.zero_()


@mutation
def one_weight_off_by_a_millionth(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    layer: Any = encoder.bert.layers[0]
    layer.feed_forward.output.weight[7, 7] += 1e-6


# pooling, normalize, length


@mutation
def padding_in_the_mean(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MeanPooling, "forward", lambda self, tokens, mask: tokens.mean(1))


@mutation
def special_tokens_not_in_the_mean(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    mean = MeanPooling.forward

    def without_cls(self: MeanPooling, tokens: Tensor, mask: Tensor) -> Tensor:
        return mean(self, tokens[:, 1:], mask[:, 1:])

    patch.setattr(MeanPooling, "forward", without_cls)


@mutation
def first_token_instead_of_mean(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MeanPooling, "forward", lambda self, tokens, mask: tokens[:, 0])


@mutation
def not_normalized(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    encoder.normalize = nn.Identity()


@mutation
def tokens_normalized_before_the_mean(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    mean = MeanPooling.forward

    def normalized_first(self: MeanPooling, tokens: Tensor, mask: Tensor) -> Tensor:
        return mean(self, F.normalize(tokens, dim=-1), mask)

    patch.setattr(MeanPooling, "forward", normalized_first)


@mutation
def limit_of_128_tokens(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    encoder.max_seq_length = 128


@mutation
def limit_of_512_tokens(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    encoder.max_seq_length = 512


@mutation
def cased_text(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    import tokenizers

    assert encoder.tokenizer is not None
    encoder.tokenizer.backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)


@mutation
def weights_in_float16(encoder: SentenceEncoder, patch: pytest.MonkeyPatch) -> None:
    encoder.half().double()

"""What the tests of `kernels.py` share: tiny encoders, and how to see what is computed."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import compose, seeded_bert
from minilm import BertModel, MeanPooling, Normalize, SentenceEncoder
from minilm.inference import kernels
from minilm.inference.kernels import fast_products

TEXTS = ["the dog bites the man", "", "a cat", "the sun is out .", "man sees dog", "a"]
PUBLISHED_TEXTS = ["The weather is lovely today.", "", "It's so sunny outside! " * 9]

# The flat layers add up in another order than the plain ones: float32 vectors of length 1.
ROUNDING = 1e-6

LAYER = "bert.layers.0.attention.value"
INTERMEDIATE = "bert.layers.0.feed_forward.intermediate"
NORM = "bert.layers.0.attention_layer_norm"
MODES: list[Any] = [torch.enable_grad, torch.no_grad, torch.inference_mode]
untyped: Any = torch  # for the functions that it gives no types


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_encoder(bert: BertModel, **options: Any) -> SentenceEncoder:
    encoder: SentenceEncoder = compose(bert, MeanPooling(), Normalize(), **options)
    return encoder


def fresh(encoder: SentenceEncoder) -> SentenceEncoder:
    """A tiny encoder with the same weights, which has computed nothing yet."""
    bert = seeded_bert().to(encoder.dtype)
    bert.load_state_dict({name: value.clone() for name, value in encoder.bert.state_dict().items()})
    return make_encoder(bert)


def plain_vectors(bert: nn.Module, encoder: SentenceEncoder) -> Tensor:
    """What a model that was never accelerated gives for `TEXTS`: padded, layer by layer."""
    assert not any("forward" in module.__dict__ for module in bert.modules())
    features = encoder.tokenize(TEXTS)
    mask = features["attention_mask"]
    with torch.no_grad():
        vectors: Tensor = Normalize()(MeanPooling()(bert(features["input_ids"], mask), mask))
    return vectors


def part(encoder: nn.Module, name: str) -> Any:
    return encoder.get_submodule(name)


def linear_layers(model: nn.Module) -> dict[str, Any]:
    return {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}


def replace_layers(model: nn.Module, names: list[str], kind: Callable[[Any], nn.Module]) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, kind(model.get_submodule(name)))


@contextmanager
def as_in_encode(model: nn.Module, mode: Any = torch.inference_mode) -> Any:
    """What `encode` puts around a pass, or that with another mode of torch."""
    with mode(), fast_products(list(model.modules())) as multiple:
        yield multiple


def flat_layers(model: nn.Module) -> list[str]:
    """The names of the layers that `encode` computes as one function now."""
    names = {module: name for name, module in model.named_modules()}
    with as_in_encode(model):
        return [names[layer] for layer in kernels._thread.layers]


def needs_onednn(dtype: torch.dtype) -> None:
    """Skip where oneDNN's operator is absent; tried here, not by what is tested."""
    try:
        rows = torch.ones(2, 2, dtype=dtype)
        torch.ops.mkldnn._linear_pointwise.default(rows, rows, None, "none", [], "")
    except (AttributeError, RuntimeError) as error:
        pytest.skip(f"oneDNN's product in {dtype} can't be used here: {error}")


def close(actual: Tensor, expected: Tensor) -> None:
    # Token vectors with elements up to 3.
    torch.testing.assert_close(actual, expected, rtol=0, atol=5e-6)

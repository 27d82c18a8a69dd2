"""oneDNN's product beside `torch.mm`, and when which of them is taken."""

import threading

import pytest
import torch
from torch import Tensor

from minilm import forks, onednn

LARGE = 11_000  # vectors of width 384: just more than from where on oneDNN is asked


def vectors(count: int, seed: int) -> Tensor:
    return torch.randn(count, 384, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """For each product by oneDNN the rows of the corpus, and whether a fork would wait for it."""
    calls: list[tuple[int, bool]] = []
    linear = onednn.linear

    def noted(queries: Tensor, corpus: Tensor) -> Tensor:
        calls.append((len(corpus), threading.get_ident() in forks._computing))
        return linear(queries, corpus)

    monkeypatch.setattr(onednn, "linear", noted)
    return calls


@pytest.mark.parametrize("count", [1, 2, 16, 33])
@pytest.mark.parametrize("by_columns", [False, True])
def test_scores_are_as_exact_as_a_sum_in_any_order(
    products: list[tuple[int, bool]], count: int, by_columns: bool
) -> None:
    queries, corpus = vectors(count, 0), vectors(LARGE, 1)
    if by_columns:
        corpus = corpus.t().contiguous().t()
    scores = onednn.scores(queries, corpus)
    off = (scores.double() - queries.double() @ corpus.double().T).abs()
    bound = 384 * torch.finfo(torch.float32).eps / 2  # Higham 2002, section 3.1
    assert (off <= bound * (queries.abs().double() @ corpus.abs().double().T)).all()
    expected = [(LARGE, True)] if onednn.has_onednn(torch.float32) else []
    assert products == expected


@pytest.mark.parametrize(
    "corpus",
    [
        vectors(100, 1),  # sooner done than prepared
        vectors(LARGE, 1).double(),
        vectors(2 * LARGE, 1)[::2],  # gaps between the rows
    ],
    ids=["small", "float64", "with gaps"],
)
def test_other_products_are_by_torch(products: list[tuple[int, bool]], corpus: Tensor) -> None:
    queries = vectors(3, 0).to(corpus.dtype)
    assert torch.equal(onednn.scores(queries, corpus), torch.mm(queries, corpus.T))
    assert not products


def test_a_build_without_onednn(
    monkeypatch: pytest.MonkeyPatch, products: list[tuple[int, bool]]
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    queries, corpus = vectors(3, 0), vectors(LARGE, 1)
    assert torch.equal(onednn.scores(queries, corpus), torch.mm(queries, corpus.T))
    assert not products


def test_a_gradient_is_by_torch(products: list[tuple[int, bool]]) -> None:
    queries, corpus = vectors(3, 0).requires_grad_(), vectors(LARGE, 1)
    onednn.scores(queries, corpus)[1, 5].backward()  # type: ignore[no-untyped-call]
    expected = torch.zeros(3, 384)
    expected[1] = corpus[5]
    assert queries.grad is not None
    assert torch.equal(queries.grad, expected)
    assert not products
    with torch.no_grad():
        onednn.scores(queries, corpus)
    assert len(products) == onednn.has_onednn(torch.float32)

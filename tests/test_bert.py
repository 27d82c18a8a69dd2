import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import TINY, seeded_bert
from minilm import (
    BertConfig,
    BertEmbeddings,
    BertFeedForward,
    BertLayer,
    BertModel,
    BertSelfAttention,
    attention,
)

properties = settings(deadline=None, derandomize=True, max_examples=50)

WITHOUT_DROPOUT = replace(TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LN3 = math.log(3)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, shape, generator=generator)


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def mask_of_lengths(*lengths: int) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


# attention, by hand


def two_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[1, 2, 1, 4]`.

    √d = 2. Token 0 has scores (ln 3, 0), hence weights (3/4, 1/4); token 1 has (0, 0), hence
    (1/2, 1/2).
    """
    query = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0]], dtype=torch.float64)
    key = torch.tensor([[LN3, 0, 0, 0], [0, 0, 7, 0]], dtype=torch.float64)
    value = torch.tensor([[4.0, 0, 0, 1], [0, 8, 0, 1]], dtype=torch.float64)
    return query[None, :, None], key[None, :, None], value[None, :, None]


def test_attention_of_two_tokens_by_hand() -> None:
    context = attention(*two_tokens())
    assert context.shape == (1, 2, 1, 4)
    by_hand = torch.tensor([[3.0, 2, 0, 1], [2, 4, 0, 1]], dtype=torch.float64)
    close(context[0, :, 0], by_hand, atol=2e-15)  # a rounding of exp(ln 3), times 4


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_attention_mask_by_hand(dtype: torch.dtype) -> None:
    query, key, value = two_tokens()
    for mask, seen in (([1, 0], 0), ([0, 1], 1)):
        context = attention(query, key, value, torch.tensor([mask]).to(dtype))
        assert context[0, :, 0].tolist() == [value[0, seen, 0].tolist()] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_attention_with_nothing_to_look_at_is_finite(dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in two_tokens())
    context = attention(query, key, value, torch.tensor([[0, 0]]))
    assert context.isfinite().all()
    assert context.dtype == dtype


def test_padding_loses_against_the_lowest_score() -> None:
    query, key, value = two_tokens()
    query[..., 0], key[..., 0] = 1e9, -1e9  # score -5e17; a mask of -10000 would win
    context = attention(query, key, value, torch.tensor([[0, 1]]))
    assert context[0, :, 0].tolist() == [value[0, 1, 0].tolist()] * 2


def test_heads_do_not_see_each_other() -> None:
    query, key, value = two_tokens()
    query2, key2, value2 = (randn(1, 2, 1, 4, seed=seed) for seed in range(3))
    pairs = ((query, query2), (key, key2), (value, value2))
    both = [torch.cat(pair, dim=2) for pair in pairs]  # [1, 2, 2, 4]
    context = attention(both[0], both[1], both[2])
    close(context[:, :, :1], attention(query, key, value), atol=2e-15)
    close(context[:, :, 1:], attention(query2, key2, value2), atol=2e-15)


def test_sentences_do_not_see_each_other() -> None:
    query, key, value = (randn(3, 5, 2, 4, seed=seed) for seed in range(3))
    mask = mask_of_lengths(5, 2, 3)
    context = attention(query, key, value, mask)
    for row in range(3):
        one = slice(row, row + 1)
        close(context[one], attention(query[one], key[one], value[one], mask[one]), atol=2e-15)


# attention, properties

shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 8))


def random_attention(shape: tuple[int, int, int, int], seed: int) -> tuple[Tensor, ...]:
    """Query, key, value of the shape, and a mask with at least one real token in each row."""
    lengths = torch.randint(
        1, shape[1] + 1, (shape[0], 1), generator=torch.Generator().manual_seed(seed)
    )
    tensors = (randn(*shape, seed=seed + i) for i in range(3))
    return *tensors, (torch.arange(shape[1]) < lengths).long()


@properties
@given(shapes, st.integers(0, 2**31))
def test_attention_equals_torch(shape: tuple[int, int, int, int], seed: int) -> None:
    query, key, value, mask = random_attention(shape, seed)
    by_head = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    expected = F.scaled_dot_product_attention(
        by_head[0], by_head[1], by_head[2], mask.bool()[:, None, None]
    ).transpose(1, 2)
    # Scores below 50 carry an error of 1e-14, and exp hands it on to weights of at most 1.
    close(attention(query, key, value, mask), expected, atol=2e-14)


@properties
@given(shapes, st.integers(0, 2**31))
def test_probabilities_sum_to_one_and_are_zero_on_padding(
    shape: tuple[int, int, int, int], seed: int
) -> None:
    query, key, _, mask = random_attention(shape, seed)
    batch, tokens, heads, _ = shape
    identity = torch.eye(tokens, dtype=torch.float64)[None, :, None].expand(
        batch, tokens, heads, tokens
    )
    probabilities = attention(query, key, identity, mask)  # [batch, query, heads, key]
    close(probabilities.sum(-1), torch.ones(batch, tokens, heads).double(), atol=1e-15)
    assert (probabilities >= 0).all()
    padding = (mask == 0)[:, None, None].expand_as(probabilities)
    assert (probabilities[padding] == 0).all()  # exactly: exp(-1.8e308) is 0


def test_attention_without_a_batch_dimension() -> None:
    query, key, value = (randn(2, 5, 3, 4, seed=seed) for seed in range(3))
    close(attention(query[1], key[1], value[1]), attention(query, key, value)[1], atol=2e-15)


def test_attention_dropout_drops_probabilities_and_scales_the_rest() -> None:
    query, key, _ = (randn(1, 50, 2, 4, seed=seed) for seed in range(3))
    identity = torch.eye(50, dtype=torch.float64)[None, :, None].expand(1, 50, 2, 50)
    plain = attention(query, key, identity)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = attention(query, key, identity, dropout_prob=0.25)
    kept = dropped != 0
    close(dropped[kept], plain[kept] / 0.75, atol=1e-15)
    # 5000 draws: a standard deviation of 0.006.
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.03)


# embeddings


def test_embeddings_by_hand() -> None:
    config = BertConfig(
        vocab_size=3,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=1,
        max_position_embeddings=3,
    )
    embeddings = BertEmbeddings(config).double().eval()
    with torch.no_grad():
        embeddings.word_embeddings.weight.copy_(torch.eye(3, 4))
        embeddings.position_embeddings.weight.copy_(torch.tensor([0.0, 2, 0, 0]))
        embeddings.token_type_embeddings.weight[0] = torch.tensor([0.0, 0, 3, 0])
        embeddings.token_type_embeddings.weight[1] = torch.tensor([3.0, 0, 0, 0])
        embeddings.layer_norm.weight.fill_(math.sqrt(5))
        embeddings.layer_norm.bias.copy_(torch.tensor([0.0, 0, 0, 10]))
    # Sum (1, 2, 3, 0): mean 3/2, variance 5/4; times √5 that is twice the distance to the mean.
    by_hand = torch.tensor([[-1.0, 1, 3, -3 + 10]], dtype=torch.float64)
    close(embeddings(torch.tensor([[0]]))[0], by_hand, atol=4e-12)  # the eps of 1e-12
    # Sum (3 + 0, 2, 1, 0) with word 2 and type 1: the same numbers in another order.
    by_hand = torch.tensor([[3.0, 1, -1, -3 + 10]], dtype=torch.float64)
    close(embeddings(torch.tensor([[2]]), torch.tensor([[1]]))[0], by_hand, atol=4e-12)


def test_default_positions_and_types() -> None:
    embeddings = seeded_bert().embeddings
    input_ids = random_ids(2, 5)
    default = embeddings(input_ids)
    zeros, positions = torch.zeros_like(input_ids), torch.arange(5)
    assert torch.equal(embeddings(input_ids, zeros, positions), default)
    assert torch.equal(embeddings(input_ids, zeros, positions.expand(2, 5)), default)
    assert not torch.equal(embeddings(input_ids, zeros + 1), default)
    assert not torch.equal(embeddings(input_ids, zeros, positions + 1), default)


def test_positions_of_packed_sentences() -> None:
    embeddings = seeded_bert().embeddings
    first, second = random_ids(3, seed=1), random_ids(2, seed=2)
    packed = embeddings(torch.cat([first, second]), position_ids=torch.tensor([0, 1, 2, 0, 1]))
    assert torch.equal(packed, torch.cat([embeddings(first), embeddings(second)]))


# layers


def test_feed_forward_by_hand() -> None:
    config = replace(TINY, hidden_size=2, num_attention_heads=1, intermediate_size=2)
    feed_forward = BertFeedForward(config).double().eval()
    with torch.no_grad():
        feed_forward.intermediate.weight.copy_(torch.tensor([[1.0, 0], [0, -1]]))
        feed_forward.intermediate.bias.copy_(torch.tensor([1.0, 0]))
        feed_forward.output.weight.copy_(torch.tensor([[1.0, 0], [1, 1]]))
        feed_forward.output.bias.copy_(torch.tensor([0.0, 5]))
    # Inside: (1 + 1, -1). x Φ(x), with Φ(2) = 0.97724987 and Φ(-1) = 0.15865525.
    first, second = 2 * 0.9772498680518208, -0.15865525393145707
    by_hand = torch.tensor([first, first + second + 5], dtype=torch.float64)
    # The tanh form of GELU would be off by 3e-4.
    close(feed_forward(torch.tensor([1.0, 1], dtype=torch.float64)), by_hand, atol=2e-15)


def per_token_modules() -> list[tuple[str, nn.Module]]:
    model = seeded_bert().double()
    layer = model.layers[0]
    assert isinstance(layer, BertLayer)
    return [
        ("feed_forward", layer.feed_forward),
        ("layer_norm", layer.attention_layer_norm),
        ("query", layer.attention.query),
    ]


@pytest.mark.parametrize(
    "module", [pytest.param(module, id=name) for name, module in per_token_modules()]
)
def test_module_acts_on_the_last_dimension_only(module: nn.Module) -> None:
    hidden_states = randn(3, 5, 32)
    output = module(hidden_states)
    # A matrix product of another height may add in another order.
    close(module(hidden_states.flatten(0, 1)), output.flatten(0, 1), atol=1e-14)
    close(module(hidden_states.transpose(0, 1)), output.transpose(0, 1), atol=1e-14)
    close(module(hidden_states[1, 2]), output[1, 2], atol=1e-14)


def test_layer_on_packed_tokens() -> None:
    layer = seeded_bert().double().layers[0]
    hidden_states = randn(3, 5, 32)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert query.shape == (15, 4, 8)
        query, key, value = (tensor.reshape(3, 5, 4, 8) for tensor in (query, key, value))
        return attention(query, key, value).flatten(0, 1)

    packed = layer(hidden_states.flatten(0, 1), attend)
    close(packed, layer(hidden_states).flatten(0, 1), atol=1e-14)


def test_self_attention_projects_splits_into_heads_and_joins() -> None:
    module = BertSelfAttention(WITHOUT_DROPOUT).double()
    hidden_states = randn(2, 5, 32)
    contexts = []
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)  # the slice of the big matrix is the paper's W_i
        query, key, value = (
            (hidden_states @ linear.weight[rows].T + linear.bias[rows])[:, :, None]
            for linear in (module.query, module.key, module.value)
        )
        contexts.append(attention(query, key, value)[:, :, 0])
    expected = torch.cat(contexts, dim=-1) @ module.output.weight.T + module.output.bias
    close(module(hidden_states), expected, atol=1e-14)


def test_layer_is_post_norm() -> None:
    layer = BertLayer(WITHOUT_DROPOUT).double()
    for norm in (layer.attention_layer_norm, layer.feed_forward_layer_norm):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(2))

    def normed(module: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return centred / deviation * module.weight + module.bias

    x = randn(2, 5, 32)
    y = normed(layer.attention_layer_norm, x + layer.attention(x))
    expected = normed(layer.feed_forward_layer_norm, y + layer.feed_forward(y))
    close(layer(x), expected, atol=1e-14)


# attend


def test_attend_is_called_once_per_layer() -> None:
    seen = []

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append([tuple(tensor.shape) for tensor in (query, key, value)])
        return attention(query, key, value)

    model, input_ids = seeded_bert(), random_ids(2, 5)
    output = model(input_ids, attend=attend)
    assert seen == [[(2, 5, 4, 8)] * 3] * 2
    assert torch.equal(output, model(input_ids))


def test_what_attend_returns_is_used() -> None:
    model, input_ids = seeded_bert(), random_ids(2, 5)
    with_zeros = model(input_ids, attend=lambda query, key, value: torch.zeros_like(value))
    hidden_states = model.embeddings(input_ids)
    for layer in model.layers:
        assert isinstance(layer, BertLayer)
        hidden_states = layer.attention_layer_norm(hidden_states + layer.attention.output.bias)
        hidden_states = layer.feed_forward_layer_norm(
            hidden_states + layer.feed_forward(hidden_states)
        )
    # float32: a product with zeros plus a bias is the bias.
    close(with_zeros, hidden_states, atol=1e-6)
    assert not torch.allclose(with_zeros, model(input_ids), atol=1e-2)


def test_attend_receives_query_key_and_value_in_this_order() -> None:
    model = seeded_bert()
    layer = model.layers[0]
    assert isinstance(layer, BertLayer)
    hidden_states = randn(2, 3, 32, dtype=torch.float32)
    seen: list[Tensor] = []

    def attend(*tensors: Tensor) -> Tensor:
        seen.extend(tensors)
        return tensors[2]

    layer.attention(hidden_states, attend)
    for name, tensor in zip(("query", "key", "value"), seen, strict=True):
        projected = getattr(layer.attention, name)(hidden_states)
        assert torch.equal(tensor.flatten(-2), projected), name


# the model


def test_model_is_embeddings_then_layers_in_order() -> None:
    model, input_ids = seeded_bert(), random_ids(2, 5)
    hidden_states = model.embeddings(input_ids)
    for layer in model.layers:
        hidden_states = layer(hidden_states)
    assert torch.equal(model(input_ids), hidden_states)
    assert hidden_states.shape == (2, 5, 32)


def test_mask_of_ones_is_the_default() -> None:
    model, input_ids = seeded_bert(), random_ids(2, 5)
    assert torch.equal(model(input_ids, torch.ones(2, 5, dtype=torch.int64)), model(input_ids))


def test_padding_does_not_change_real_tokens() -> None:
    model = seeded_bert().double()
    input_ids, mask = random_ids(3, 7), mask_of_lengths(7, 4, 1)
    other_padding = torch.where(mask == 1, input_ids, random_ids(3, 7, seed=1))
    assert not torch.equal(other_padding, input_ids)
    output = model(input_ids, mask)
    assert torch.equal(model(other_padding, mask)[mask == 1], output[mask == 1])
    for row, length in enumerate((7, 4, 1)):
        alone = model(input_ids[row : row + 1, :length])[0]
        # Elements of about 1, two layers: sums of other lengths are added in another order.
        close(output[row, :length], alone, atol=1e-14)


def test_tokens_look_at_each_other() -> None:
    model = seeded_bert()
    input_ids = random_ids(1, 5)
    changed = input_ids.clone()
    changed[0, 4] = (changed[0, 4] + 1) % TINY.vocab_size
    difference = (model(changed) - model(input_ids)).abs().amax(-1)[0]
    assert (difference > 1e-4).all()  # the first token too: attention looks both ways


def test_explicit_types_and_positions_reach_the_embeddings() -> None:
    model, input_ids = seeded_bert(), random_ids(2, 5)
    types, positions = torch.ones_like(input_ids), torch.arange(5) + 3
    hidden_states = model.embeddings(input_ids, types, positions)
    for layer in model.layers:
        hidden_states = layer(hidden_states)
    output = model(input_ids, token_type_ids=types, position_ids=positions)
    assert torch.equal(output, hidden_states)


# dropout


def train_passes(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return run(), run()


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(replace(WITHOUT_DROPOUT, hidden_dropout_prob=0.5), id="hidden"),
        pytest.param(replace(WITHOUT_DROPOUT, attention_probs_dropout_prob=0.5), id="attention"),
    ],
)
def test_dropout_acts_in_training_only(config: BertConfig) -> None:
    model, input_ids = seeded_bert(config), random_ids(2, 5)
    plain = seeded_bert(WITHOUT_DROPOUT)(input_ids)
    assert torch.equal(model(input_ids), plain)
    first, second = train_passes(lambda: model.train()(input_ids))
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(input_ids), plain)


def test_no_dropout_at_probability_zero() -> None:
    model, input_ids = seeded_bert(WITHOUT_DROPOUT), random_ids(2, 5)
    plain = model(input_ids)
    first, second = train_passes(lambda: model.train()(input_ids))
    assert torch.equal(first, plain)
    assert torch.equal(second, plain)


def test_hidden_dropout_stands_behind_embeddings_and_both_sublayers() -> None:
    model = seeded_bert(replace(WITHOUT_DROPOUT, hidden_dropout_prob=0.5)).train()
    layer, hidden_states = model.layers[0], randn(2, 50, 32, dtype=torch.float32)
    assert isinstance(layer, BertLayer)
    sublayers: list[Callable[[], Tensor]] = [
        lambda: model.embeddings(random_ids(2, 20)),
        lambda: layer.attention(hidden_states),
        lambda: layer.feed_forward(hidden_states),
    ]
    for sublayer in sublayers:
        dropped, _ = train_passes(sublayer)
        share = (dropped == 0).double().mean().item()
        assert share == pytest.approx(0.5, abs=0.06)  # at least 1280 draws: deviation 0.014


# gradients

SMALL = BertConfig(
    vocab_size=5,
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=3,
    max_position_embeddings=4,
)


def test_gradcheck() -> None:
    model = seeded_bert(SMALL).double()
    names, parameters = zip(*model.named_parameters(), strict=True)
    input_ids, mask = torch.tensor([[1, 2, 3], [4, 0, 0]]), mask_of_lengths(3, 1)

    def real_tokens(*values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        output: Tensor = torch.func.functional_call(model, state, (input_ids, mask))
        return output[mask == 1]

    inputs = tuple(parameter.detach().requires_grad_() for parameter in parameters)
    assert torch.autograd.gradcheck(real_tokens, inputs, fast_mode=True)


def test_gradient_reaches_every_parameter() -> None:
    model = seeded_bert().double()
    input_ids = torch.arange(TINY.vocab_size).reshape(2, 20)
    output = model(input_ids, token_type_ids=input_ids % 2)
    (output * randn(2, 20, 32)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        largest = parameter.grad.abs().max().item()
        if name.endswith("key.bias"):  # adds the same to all scores of a query: softmax ignores it
            assert largest < 1e-12, name
        else:
            assert 1e-6 < largest < math.inf, name


def test_gradient_ignores_padding() -> None:
    model = seeded_bert().double()
    input_ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 1, 0, 0]])
    (model(input_ids, mask)[:, :2] * randn(1, 2, 32)).sum().backward()
    gradient = model.embeddings.word_embeddings.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(-1).nonzero().flatten().tolist() == [5, 6]


# what it is made of


def test_parameters_of_the_published_sizes() -> None:
    with torch.device("meta"):
        state = BertModel(BertConfig()).state_dict()
    assert len(state) == 101
    embeddings = (30522 + 512 + 2) * 384 + 2 * 384
    layer = 4 * (384 * 384 + 384) + 2 * 2 * 384 + (384 * 1536 + 1536) + (1536 * 384 + 384)
    assert sum(tensor.numel() for tensor in state.values()) == embeddings + 6 * layer == 22_565_376


def test_made_of_nothing_but_the_basic_modules() -> None:
    leaves = {type(module) for module in seeded_bert().modules() if not list(module.children())}
    assert leaves == {nn.Embedding, nn.LayerNorm, nn.Linear, nn.Dropout}


def test_every_layer_norm_has_the_configured_epsilon() -> None:
    model = BertModel(replace(TINY, layer_norm_eps=1e-3))
    epsilons = [module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)]
    assert epsilons == [1e-3] * 5


def test_layers_do_not_share_weights() -> None:
    parameters = list(seeded_bert().parameters())
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters) == 5 + 2 * 16


def test_repr_shows_the_sizes() -> None:
    assert str(TINY) in repr(BertModel(TINY))


# where it runs


def test_runs_in_inference_mode() -> None:
    model, input_ids = seeded_bert(), random_ids(2, 5)
    with torch.inference_mode():
        output = model(input_ids)
    assert output.is_inference()
    assert torch.equal(output, model(input_ids))


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = BertModel(TINY)
    input_ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    output = model(input_ids, torch.ones_like(input_ids))
    assert output.device.type == "meta"
    assert output.shape == (2, 5, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    input_ids, mask = random_ids(3, 7), mask_of_lengths(7, 4, 1)
    mask[2] = 0  # nothing at all to look at
    output = seeded_bert().to(dtype)(input_ids, mask)
    assert output.dtype == dtype
    assert output.isfinite().all()
    # Elements of about 1, rounded at each of some twenty steps: 3 eps were measured.
    expected = seeded_bert()(input_ids, mask)
    close(output.float()[mask == 1], expected[mask == 1], atol=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(1, 1), (1, 24), (3, 1)])
def test_smallest_and_longest_inputs(shape: tuple[int, int]) -> None:
    output = seeded_bert()(random_ids(*shape))
    assert output.shape == (*shape, 32)
    assert output.isfinite().all()

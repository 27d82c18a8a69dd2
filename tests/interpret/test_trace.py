"""The trace: every name, each number made again from the ones before, and nothing left behind."""

import ast
import copy
import inspect
import json
import linecache
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from conftest import ROOT, TINY, seeded_bert
from minilm import (
    BertConfig,
    ClsPooling,
    MeanPooling,
    Normalize,
    SentenceEncoder,
    TruncationWarning,
    bert,
)
from minilm.errors import InputError, InputTypeError, TraceKeyError
from minilm.inference import packed
from minilm.interpret.trace import Trace
from minilm.interpret.trace import trace as trace_of

TEXT = "The dog sees a walking cat."  # [CLS] the dog sees -> [UNK], ...: 9 tokens
LONG = "the dog " * 20  # 42 tokens, of which 12 are read

BEFORE = [
    "tokens",
    "input_ids",
    "attention_mask",
    "embeddings.word",
    "embeddings.position",
    "embeddings.token_type",
    "embeddings.sum",
    "embeddings.layer_norm.scale",
    "embeddings.layer_norm.output",
]
LAYER = [
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.scores",
    "attention.probabilities",
    "attention.context",
    "attention.output",
    "attention_layer_norm.residual",
    "attention_layer_norm.scale",
    "attention_layer_norm.output",
    "feed_forward.intermediate",
    "feed_forward.activation",
    "feed_forward.output",
    "feed_forward_layer_norm.residual",
    "feed_forward_layer_norm.scale",
    "feed_forward_layer_norm.output",
]
AFTER = ["pooled", "length", "embedding"]

# What the statement that makes an entry has in it.
OPERATIONS = {
    "tokens": "def tokens",
    "input_ids": "def __call__",
    "attention_mask": "def pad",
    "embeddings.word": "self.word_embeddings(input_ids)",
    "embeddings.position": "self.position_embeddings(position_ids)",
    "embeddings.token_type": "self.token_type_embeddings(token_type_ids)",
    "embeddings.sum": "+ self.token_type_embeddings",
    "embeddings.layer_norm.scale": "self.layer_norm(",
    "embeddings.layer_norm.output": "self.layer_norm(",
    "attention.query": "self.query(hidden_states).unflatten",
    "attention.key": "self.key(hidden_states).unflatten",
    "attention.value": "self.value(hidden_states).unflatten",
    "attention.scores": "/ math.sqrt(query.shape[-1])",
    "attention.probabilities": "scores.softmax(dim=-1)",
    "attention.context": 'torch.einsum("...hqk,...khd->...qhd", probabilities, value)',
    "attention.output": "self.output(context)",
    "attention_layer_norm.residual": "hidden_states + self.attention(",
    "attention_layer_norm.scale": "self.attention_layer_norm(",
    "attention_layer_norm.output": "self.attention_layer_norm(",
    "feed_forward.intermediate": "self.intermediate(hidden_states)",
    "feed_forward.activation": "F.gelu(",
    "feed_forward.output": "self.output(activation)",
    "feed_forward_layer_norm.residual": "hidden_states + self.feed_forward(",
    "feed_forward_layer_norm.scale": "self.feed_forward_layer_norm(",
    "feed_forward_layer_norm.output": "self.feed_forward_layer_norm(",
    "pooled": "/ mask.sum(dim=1)",
    "length": "F.normalize(",
    "embedding": "F.normalize(",
}


def names_of(layers: int) -> list[str]:
    return [*BEFORE, *(f"layers.{n}.{name}" for n in range(layers) for name in LAYER), *AFTER]


def composed(encoder: SentenceEncoder, *stages: nn.Module, layers: int = 2) -> SentenceEncoder:
    """The tiny model with other stages behind it."""
    config = BertConfig(**{**vars(TINY), "num_hidden_layers": layers})
    return SentenceEncoder(
        modules=[seeded_bert(config), *stages], tokenizer=encoder.tokenizer, max_seq_length=12
    )


def state_of(encoder: SentenceEncoder) -> Any:
    """All that a trace could leave behind: modes, hooks, attributes, parameters and their flags."""
    return {
        path: (
            type(module),
            module.training,
            sorted(set(vars(module)) - {"_copy"}),  # of the weights: made by `encode` too
            [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")],
            [
                (name, id(p), p.dtype, p.requires_grad, p._version, p.grad is None, p.data_ptr())
                for name, p in module.named_parameters(recurse=False)
            ],
        )
        for path, module in encoder.named_modules()
    }


def tensors(trace: Trace) -> dict[str, Tensor]:
    return {name: value for name, value in trace.items() if isinstance(value, Tensor)}


# --- Names and shapes -----------------------------------------------------------------------------


def test_full_list_of_names_in_the_order_of_execution(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    assert list(trace) == list(trace.entries) == names_of(2)
    assert len(trace) == 9 + 2 * 16 + 3
    assert [entry.name for entry in trace.entries.values()] == list(trace)


def test_full_list_of_the_published_model(encoder: SentenceEncoder) -> None:
    assert list(encoder.trace("The weather is lovely today.")) == names_of(6)


def test_names_are_paths_of_modules_and_a_noun(tiny_encoder: SentenceEncoder) -> None:
    modules = dict(tiny_encoder.bert.named_modules())
    outside = {"tokens", "input_ids", "attention_mask", "pooled", "length", "embedding"}
    nouns = set()
    for name in set(tiny_encoder.trace(TEXT)) - outside:
        path, _, noun = name.rpartition(".")
        assert path in modules, name
        nouns.add(noun)
    assert nouns == {name.rpartition(".")[2] for name in [*BEFORE[3:], *LAYER]}


def test_entries_with_a_module_of_that_path_are_its_output(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    features = tiny_encoder.tokenize(TEXT)
    for path in (
        "layers.0.attention.output",
        "layers.1.feed_forward.intermediate",
        "layers.1.feed_forward.output",
    ):
        seen: list[Tensor] = []
        handle = tiny_encoder.bert.get_submodule(path).register_forward_hook(
            lambda module, given, output, seen=seen: seen.append(output.detach()[0])
        )
        tiny_encoder(features)
        handle.remove()
        torch.testing.assert_close(trace[path], seen[0])


def test_shapes_without_a_batch_axis(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    n = len(trace["tokens"])
    hidden, heads, channels, units = 32, 4, 8, 64
    size = {
        "token": n,
        "query token": n,
        "key token": n,
        "head": heads,
        "channel": channels,
        "hidden": hidden,
        "unit": units,
    }
    for name, entry in trace.entries.items():
        shape = (n,) if name == "tokens" else tuple(entry.tensor.shape)
        assert shape == tuple(size[axis] for axis in entry.axes), name
    shapes = {name: tuple(value.shape) for name, value in tensors(trace).items()}
    assert shapes["embeddings.position"] == (n, hidden)
    assert shapes["layers.0.attention.query"] == (n, heads, channels)
    assert shapes["layers.1.attention.probabilities"] == (heads, n, n)
    assert shapes["layers.1.feed_forward.activation"] == (n, units)
    assert shapes["layers.1.feed_forward_layer_norm.scale"] == (n,)
    assert shapes["length"] == ()
    assert shapes["embedding"] == (hidden,)


@pytest.mark.parametrize("text", ["", "dog", TEXT, "zebra [MASK] 😀"])
def test_any_text(tiny_encoder: SentenceEncoder, text: str) -> None:
    trace = tiny_encoder.trace(text)
    assert trace.text == text
    assert trace.unread == 0
    assert trace["tokens"][0] == "[CLS]"
    assert trace["tokens"][-1] == "[SEP]"
    assert trace["input_ids"].tolist() == tiny_encoder.tokenize(text)["input_ids"][0].tolist()
    assert trace["attention_mask"].tolist() == [1] * len(trace["tokens"])
    assert max(trace.check().values()) < 1e-5


def test_offsets_are_of_the_original_text(tiny_encoder: SentenceEncoder) -> None:
    text = "A Café, walking"
    trace = tiny_encoder.trace(text)
    assert trace["tokens"] == ["[CLS]", "a", "cafe", ",", "walk", "##ing", "[SEP]"]
    words = [text[start:end] for start, end in trace.offsets]
    assert words == ["", "A", "Café", ",", "walk", "ing", ""]


# --- Plain tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ordinary", "no_grad", "inference_mode"])
def test_tensors_are_plain_detached_and_on_the_cpu(
    tiny_encoder: SentenceEncoder, mode: str
) -> None:
    contexts: dict[str, Any] = {
        "ordinary": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
    }
    with contexts[mode]():
        trace = tiny_encoder.trace(TEXT)
    for name, tensor in tensors(trace).items():
        assert type(tensor) is Tensor, name
        assert tensor.device.type == "cpu", name
        assert not tensor.is_inference(), name
        assert not tensor.requires_grad, name
        assert tensor.grad_fn is None, name
    weight = torch.ones(32, requires_grad=True)
    (trace["embedding"] @ weight).backward()  # it can be used in training
    assert weight.grad is not None


def test_gradients_are_recorded_as_before(tiny_encoder: SentenceEncoder) -> None:
    tiny_encoder.trace(TEXT)
    tiny_encoder(tiny_encoder.tokenize(TEXT))["sentence_embedding"].sum().backward()
    assert all(p.grad is not None for p in tiny_encoder.parameters())


# --- Nothing is left behind -----------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [None, "float32", "float64", "bfloat16"])
def test_no_state_is_left(tiny_encoder: SentenceEncoder, training: bool, dtype: str | None) -> None:
    tiny_encoder.train(training)
    tiny_encoder.bert.layers[0].train(not training)  # a part alone in another mode
    tiny_encoder.bert.embeddings.requires_grad_(False)
    tiny_encoder.encode(TEXT)
    before = state_of(tiny_encoder)
    weights = {name: p.clone() for name, p in tiny_encoder.state_dict().items()}
    vector = tiny_encoder.encode(TEXT)
    tiny_encoder.trace(TEXT, dtype=dtype)
    assert state_of(tiny_encoder) == before
    for name, value in tiny_encoder.state_dict().items():
        assert torch.equal(value, weights[name]), name
    np.testing.assert_array_equal(tiny_encoder.encode(TEXT), vector)


@pytest.mark.parametrize("place", ["embeddings", "layers.1.feed_forward", "pooling"])
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_no_state_is_left_by_an_exception(
    tiny_encoder: SentenceEncoder, place: str, dtype: str | None
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    tiny_encoder.train()
    model = tiny_encoder if place == "pooling" else tiny_encoder.bert
    handle = model.get_submodule(place).register_forward_pre_hook(fail)
    before = state_of(tiny_encoder)
    with pytest.raises(RuntimeError, match="planted"):
        tiny_encoder.trace(TEXT, dtype=dtype)
    assert state_of(tiny_encoder) == before
    handle.remove()
    assert max(tiny_encoder.trace(TEXT).check().values()) < 1e-5
    # torch's function mode is off, too: nothing that this thread does is recorded.
    assert torch.overrides._get_current_function_mode_stack() == []  # type: ignore[no-untyped-call]


def test_hooks_of_the_user_still_run(tiny_encoder: SentenceEncoder) -> None:
    calls = []
    tiny_encoder.bert.layers[1].register_forward_hook(lambda *_: calls.append(1))
    tiny_encoder.trace(TEXT)
    assert calls


def test_weights_are_shared_and_not_copied(tiny_encoder: SentenceEncoder) -> None:
    own = tiny_encoder.bert.get_submodule("layers.1.attention.query").weight
    seen = []

    def look(module: nn.Module, *_: Any) -> None:
        seen.append(module.get_submodule("attention.query").weight)

    tiny_encoder.bert.layers[1].register_forward_hook(look)
    tiny_encoder.trace(TEXT)
    tiny_encoder.trace(TEXT, dtype="float32")
    assert [weight is own for weight in seen] == [True] * 4  # for the trace, and for `difference`
    tiny_encoder.trace(TEXT, dtype="float64")
    assert [weight is own for weight in seen[4:]] == [False, True]


def test_threads_may_use_the_encoder_meanwhile(tiny_encoder: SentenceEncoder) -> None:
    texts = [TEXT, "a cat", "", "the sun is out", "walking dogs, running"]
    vectors = tiny_encoder.encode(texts)
    traced = {text: tiny_encoder.trace(text) for text in texts}
    before = state_of(tiny_encoder)
    stop = threading.Event()

    def encode() -> int:
        count = 0
        while not stop.is_set():
            np.testing.assert_array_equal(tiny_encoder.encode(texts), vectors)
            count += 1
        return count

    def trace(text: str) -> None:
        found = tiny_encoder.trace(text)
        assert list(found) == names_of(2)
        for name, value in tensors(found).items():
            torch.testing.assert_close(value, traced[text][name], msg=f"{text!r}: {name}")

    with ThreadPoolExecutor(4) as pool:
        encoding = [pool.submit(encode) for _ in range(2)]
        try:
            for done in [pool.submit(trace, text) for text in texts * 6]:
                done.result(600)
        finally:
            stop.set()
        assert all(future.result(600) > 0 for future in encoding)
    assert state_of(tiny_encoder) == before


def test_other_threads_never_meet_a_hook(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    attention = bert.attention

    def look(*arguments: Any, **options: Any) -> Tensor:
        parts = [*tiny_encoder.modules()]
        seen.append(sum(len(part._forward_hooks) + part.training for part in parts))
        return attention(*arguments, **options)

    tiny_encoder.eval()
    monkeypatch.setattr(bert, "attention", look)
    tiny_encoder.trace(TEXT)
    assert seen == [0, 0]  # in the middle of both layers


# --- check ----------------------------------------------------------------------------------------


def test_check_covers_every_entry(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    assert list(trace.check()) == list(trace)


@pytest.mark.parametrize("text", ["", "dog", TEXT, "zebra [MASK] 😀"])
def test_check_in_float64(tiny_encoder: SentenceEncoder, text: str) -> None:
    errors = tiny_encoder.trace(text, dtype="float64").check()
    assert max(errors.values()) <= 1e-13
    assert errors["tokens"] == errors["input_ids"] == errors["attention_mask"] == 0


def test_check_of_the_published_model(encoder: SentenceEncoder, encoder64: SentenceEncoder) -> None:
    text = "The weather is lovely today, isn't it? Ünïcode and 日本語."
    double = encoder64.trace(text)
    assert max(double.check().values()) <= 1e-12
    assert double.difference <= 1e-14
    single = encoder.trace(text)
    errors = single.check()
    # A float32 number has 24 binary digits: 6e-8 of the largest number in it, times some sums.
    for name, value in tensors(single).items():
        assert errors[name] <= 2e-6 * max(1, float(value.abs().max())), name
    assert max(errors.values()) > 0
    assert single.difference <= 1e-6
    converted = encoder.trace(text, dtype="float64")
    for name, value in tensors(double).items():
        torch.testing.assert_close(converted[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", names_of(2))
def test_check_finds_a_planted_error(tiny_encoder: SentenceEncoder, name: str) -> None:
    trace = tiny_encoder.trace(TEXT, dtype="float64")
    value = trace[name]
    if isinstance(value, list):
        value[1] = "cat"
    elif value.is_floating_point():
        value.view(-1)[-1] += 1e-3
    else:
        value[-2] += 1
    errors = trace.check()
    # "tokens" and "input_ids" are each made again from the other.
    wrong = {each for each, error in errors.items() if error > 1e-5}
    assert name in wrong
    # Besides itself only what is made of it is wrong.
    assert wrong <= {name} | {e for e, entry in trace.entries.items() if name in entry.parents}


def test_check_finds_another_shape(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    entry = trace.entries["pooled"]
    trace.entries["pooled"] = type(entry)(**{**vars(entry), "tensor": entry.tensor[:, None]})
    with pytest.raises(AssertionError, match="pooled"):
        trace.check()


def test_check_finds_a_fault_of_the_model(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    gelu = nn.functional.gelu
    monkeypatch.setattr(
        nn.functional, "gelu", lambda x: gelu(x, approximate="tanh")
    )  # fmt: skip
    errors = tiny_encoder.trace(TEXT, dtype="float64").check()
    wrong = [name for name, error in errors.items() if error > 1e-9]
    assert wrong == [f"layers.{n}.feed_forward.activation" for n in (0, 1)]


# --- Parents, formulas, sources -------------------------------------------------------------------


def test_parents_come_before(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    order = list(trace)
    for name, entry in trace.entries.items():
        assert entry.parents
        assert entry.formula
        for parent in entry.parents:
            assert parent in trace
            if name != "tokens":  # made again from the ids
                assert order.index(parent) < order.index(name), name
    parents = trace.entries["layers.1.attention_layer_norm.residual"].parents
    assert parents == ("layers.0.feed_forward_layer_norm.output", "layers.1.attention.output")


def test_sources_are_statements_of_the_files(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    for name, entry in trace.entries.items():
        lines = (ROOT / entry.source.file).read_text(encoding="utf-8").splitlines()
        text = entry.source.text.splitlines()
        there = lines[entry.source.line - 1 : entry.source.line - 1 + len(text)]
        assert [line.strip() for line in there] == [line.strip() for line in text], name
        operation = OPERATIONS[name.split(".", 2)[-1] if name.startswith("layers") else name]
        assert operation in " ".join(line.strip() for line in text).replace("( ", "("), name
        assert str(entry.source) == f"{entry.source.file}:{entry.source.line}"
        if not operation.startswith("def "):  # one statement, and not the function around it
            (statement,) = ast.parse(entry.source.text).body
            assert isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return), name


def test_sources_are_looked_up_and_not_typed_in(
    tiny_encoder: SentenceEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same function from another file, where it stands elsewhere and divides differently."""
    from minilm.interpret import trace as module

    path = tmp_path / "elsewhere.py"
    source = inspect.getsource(bert.attention).replace(" / math.sqrt", " * 1.0 / math.sqrt")
    path.write_text("\n" * 1000 + source, encoding="utf-8")
    scope = dict(vars(bert))
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    monkeypatch.setattr(bert, "attention", scope["attention"])
    monkeypatch.setattr(module, "_WATCHED", (*module._WATCHED, str(path)))
    found = tiny_encoder.trace(TEXT).entries["layers.0.attention.scores"].source
    assert found.file.endswith("elsewhere.py")
    assert found.line > 1000
    assert "* 1.0 / math.sqrt" in found.text


# --- Getting at it --------------------------------------------------------------------------------


def test_star_stacks_on_a_layer_axis(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    stacked = trace["layers.*.attention.probabilities"]
    assert stacked.shape == (2, 4, len(trace["tokens"]), len(trace["tokens"]))
    for number in range(2):
        assert torch.equal(stacked[number], trace[f"layers.{number}.attention.probabilities"])


def test_layers_are_stacked_in_their_order(tiny_encoder: SentenceEncoder) -> None:
    many = composed(tiny_encoder, MeanPooling(), Normalize(), layers=11)
    trace = many.trace("a dog")
    stacked = trace["layers.*.feed_forward.output"]
    assert len(stacked) == 11
    assert torch.equal(stacked[10], trace["layers.10.feed_forward.output"])
    assert torch.equal(stacked[2], trace["layers.2.feed_forward.output"])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("layers.0.attention.querys", "layers.0.attention.query"),
        ("embeding", "embedding"),
        ("layers.*.attention.keys", "layers.0.attention.key"),
        ("layers.2.attention.query", "layers.0.attention.query"),
        ("layersX0Xattention.query", "layers.0.attention.query"),
    ],
)
def test_unknown_name(tiny_encoder: SentenceEncoder, name: str, nearest: str) -> None:
    trace = tiny_encoder.trace(TEXT)
    for ask in (lambda: trace[name], lambda: tiny_encoder.trace(TEXT, names=name)):
        with pytest.raises(KeyError) as caught:
            ask()
        error = caught.value
        assert isinstance(error, TraceKeyError)
        assert error.name == name
        assert len(set(error.nearest)) == 3
        assert nearest in error.nearest
        assert set(error.nearest) <= set(trace)
        assert str(error).startswith(f"there is no {name!r} in this trace; the nearest: ")
        assert all(each in str(error) for each in error.nearest)
    assert name not in trace


def test_a_name_like_none_gets_three_all_the_same(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    with pytest.raises(TraceKeyError) as caught:
        trace["Zwölf Boxkämpfer"]
    assert len(set(caught.value.nearest) & set(trace)) == 3


def test_what_is_no_name_is_not_in_it(tiny_encoder: SentenceEncoder) -> None:
    other: Any = 0
    assert other not in tiny_encoder.trace(TEXT)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["embedding", "tokens"], ["tokens", "embedding"]),
        ("pooled", ["pooled"]),
        ("layers.*.attention.key", ["layers.0.attention.key", "layers.1.attention.key"]),
        ((name for name in ["length"]), ["length"]),
        ([], []),
    ],
)
def test_names_filter(tiny_encoder: SentenceEncoder, names: Any, expected: list[str]) -> None:
    everything = tiny_encoder.trace(TEXT)
    trace = tiny_encoder.trace(TEXT, names=names)
    assert list(trace) == expected
    for name in expected:
        if name != "tokens":
            assert torch.equal(trace[name], everything[name])


def test_filtered_trace_checks_what_it_can(tiny_encoder: SentenceEncoder) -> None:
    names = ["pooled", "length", "embedding", "layers.0.attention.key"]
    errors = tiny_encoder.trace(TEXT, names=names, dtype="float64").check()
    assert list(errors) == ["length", "embedding"]
    assert max(errors.values()) < 1e-13


def test_table(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace("A dog\n")
    lines = str(trace).splitlines()
    assert lines[0] == repr("A dog\n")
    assert lines[1].split() == ["name", "shape", "mean", "std", "norm", "source"]
    assert [line.split()[0] for line in lines[2:-1]] == list(trace)
    assert lines[-1] == f"differs from encode by {trace.difference:.1e}"
    row = next(line for line in lines if line.startswith("layers.1.attention.value"))
    value = trace["layers.1.attention.value"].double()
    _, *shape, mean, std, norm, source = row.split()
    assert " ".join(shape) == "4 x 4 x 8"
    assert mean == f"{value.mean():.4g}"
    assert std == f"{value.std(correction=0):.4g}"
    assert norm == f"{value.norm():.4g}"
    assert source == str(trace.entries["layers.1.attention.value"].source)
    assert repr(trace) == r"<Trace of 'A dog\n': 44 tensors>"


def test_save_and_read_back(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    text = "A Café, 日"
    trace = tiny_encoder.trace(text)
    path = tmp_path / "trace.safetensors"
    trace.save(path)
    trace.save(str(path))
    read = safetensors.torch.load_file(path)
    assert set(read) == set(trace) - {"tokens"}
    for name, value in tensors(trace).items():
        assert torch.equal(read[name], value)
        assert read[name].dtype == value.dtype
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["text"] == text
    assert json.loads(metadata["tokens"]) == trace["tokens"]
    assert [tuple(pair) for pair in json.loads(metadata["offsets"])] == trace.offsets
    about = json.loads(metadata["entries"])
    assert set(about) == set(trace)
    for name, entry in trace.entries.items():
        assert about[name] == {
            "axes": list(entry.axes),
            "parents": list(entry.parents),
            "formula": entry.formula,
            "source": str(entry.source),
        }


def test_save_of_some(tiny_encoder: SentenceEncoder, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    tiny_encoder.trace(TEXT, names=["length"]).save(path)
    assert list(safetensors.torch.load_file(path)) == ["length"]


def test_to_numpy(tiny_encoder: SentenceEncoder) -> None:
    trace = tiny_encoder.trace(TEXT)
    arrays = trace.to_numpy()
    assert list(arrays) == list(trace)
    assert arrays["tokens"].tolist() == trace["tokens"]
    for name, value in tensors(trace).items():
        np.testing.assert_array_equal(arrays[name], value.numpy())
        assert arrays[name].dtype == value.numpy().dtype
    arrays["pooled"][:] = 0  # it is its own
    assert trace["pooled"].any()


# --- dtype, stages, limits ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", torch.float64, "float16", torch.float32])
def test_dtype(tiny_encoder: SentenceEncoder, dtype: Any) -> None:
    trace = tiny_encoder.trace(TEXT, dtype=dtype)
    expected = getattr(torch, str(dtype).removeprefix("torch."))
    whole = {"input_ids", "attention_mask"}
    assert {v.dtype for name, v in tensors(trace).items() if name not in whole} == {expected}
    assert tiny_encoder.dtype == torch.float32
    plain = tiny_encoder.trace(TEXT)
    bar = 1e-2 if expected == torch.float16 else 1e-6
    assert (trace["embedding"].double() - plain["embedding"].double()).abs().max() < bar


def test_bfloat16_encoder(tiny_folder: Path) -> None:
    loaded = SentenceEncoder.from_pretrained(tiny_folder, dtype="bfloat16", device="cpu")
    before = state_of(loaded)
    trace = loaded.trace(TEXT)
    assert trace["layers.0.attention.query"].dtype == torch.bfloat16
    assert trace["layers.0.attention_layer_norm.output"].dtype == torch.float32
    assert trace["embedding"].dtype == torch.float32
    assert 0 < max(trace.check().values()) < 0.05
    assert trace.difference < 0.01
    arrays = trace.to_numpy()
    assert arrays["layers.0.attention.query"].dtype == np.float32
    # Asking for what it is changes nothing, and a float32 model is traced as one loaded so.
    same = loaded.trace(TEXT, dtype="bfloat16")
    single = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    asked = single.trace(TEXT, dtype="bfloat16")
    for name, value in tensors(trace).items():
        assert torch.equal(same[name], value), name
        assert asked[name].dtype == value.dtype, name
        assert torch.equal(asked[name], value), name
    # And in float64, it is the rounded weights that are computed with.
    assert max(loaded.trace(TEXT, dtype="float64").check().values()) < 1e-13
    assert state_of(loaded) == before


def test_difference_from_encode(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tiny_encoder.trace(TEXT)
    vector = tiny_encoder.encode(TEXT)
    assert trace.difference == float(np.abs(trace["embedding"].numpy() - vector).max())
    assert 0 <= trace.difference < 1e-6
    module = sys.modules["minilm.interpret.trace"]
    monkeypatch.setattr(module, "embed", lambda *given, **by: packed.embed(*given, **by) + 0.25)
    assert tiny_encoder.trace(TEXT).difference == pytest.approx(0.25, abs=1e-6)


def test_cls_pooling(tiny_encoder: SentenceEncoder) -> None:
    encoder = composed(tiny_encoder, ClsPooling(), Normalize())
    trace = encoder.trace(TEXT, dtype="float64")
    last = trace["layers.1.feed_forward_layer_norm.output"]
    assert torch.equal(trace["pooled"], last[0])
    assert trace.entries["pooled"].formula == "the vector of [CLS]"
    assert "token_embeddings[:, 0]" in trace.entries["pooled"].source.text
    assert list(trace) == names_of(2)
    assert max(trace.check().values()) < 1e-13


def test_no_normalize(tiny_encoder: SentenceEncoder) -> None:
    encoder = composed(tiny_encoder, MeanPooling())
    trace = encoder.trace(TEXT, dtype="float64")
    assert list(trace) == [name for name in names_of(2) if name != "length"]
    assert torch.equal(trace["pooled"], trace["embedding"])
    assert trace.entries["embedding"].parents == ("pooled",)
    assert "mask.sum(dim=1)" in trace.entries["embedding"].source.text
    assert max(trace.check().values()) < 1e-13
    trace["embedding"][0] += 1  # which is not the same memory
    assert trace.check()["pooled"] < 1e-13


@pytest.mark.parametrize("call", [
    lambda e: e.trace(LONG),
    lambda e: trace_of(e, LONG),
])  # fmt: skip
def test_truncation_warning_is_at_the_callers_line(
    tiny_encoder: SentenceEncoder, call: Callable[[SentenceEncoder], Trace]
) -> None:
    with pytest.warns(TruncationWarning) as caught:
        trace = call(tiny_encoder)
    (warning,) = caught
    assert str(warning.message) == "text was cut at 12 tokens; 71% of its tokens were not read"
    line = linecache.getline(warning.filename, warning.lineno)
    assert line.startswith("    lambda e: ")
    assert trace.unread == 30
    assert len(trace["tokens"]) == len(trace.offsets) == 12
    assert trace["tokens"][-1] == "[SEP]"
    assert trace.text == LONG


def test_no_warning_at_the_limit(tiny_encoder: SentenceEncoder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tiny_encoder.trace("dog " * 10).unread == 0


@pytest.mark.parametrize("value", [None, 3, b"text", ["text"]])
def test_what_is_no_text(tiny_encoder: SentenceEncoder, value: Any) -> None:
    with pytest.raises(InputTypeError, match="text is") as caught:
        tiny_encoder.trace(value)
    assert caught.value.argument == "text"


def test_other_errors(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match="lone surrogate"):
        tiny_encoder.trace("a \ud800")
    with pytest.raises(InputError, match="dtype is 'int8'"):
        tiny_encoder.trace("a", dtype="int8")
    silent = SentenceEncoder(modules=[seeded_bert(), MeanPooling()])
    with pytest.raises(InputError, match="tokenizer is None"):
        silent.trace("a")


def test_copies_and_shares_of_an_encoder_can_be_traced(tiny_encoder: SentenceEncoder) -> None:
    twin = copy.deepcopy(tiny_encoder)
    assert torch.equal(twin.trace(TEXT)["embedding"], tiny_encoder.trace(TEXT)["embedding"])
    tiny_encoder.share_memory()
    assert max(tiny_encoder.trace(TEXT).check().values()) < 1e-5

"""The name table, and what happens to good and bad `model.safetensors` files."""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from conftest import TINY, seeded_bert, write_model_folder
from minilm import BertConfig, BertModel, SentenceEncoder
from minilm.errors import WeightsError
from minilm.pretrained.checkpoint import NAMES, UNUSED, build_bert, published_name, read_checkpoint

# The names of one layer in Google's release, written out once more as a check on the table.
LAYER = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
]

Change = Callable[[dict[str, Tensor]], None]


def tiny_tensors(seed: int = 0) -> dict[str, Tensor]:
    """The tiny model under the published names."""
    return {
        published_name(name): tensor.clone()
        for name, tensor in seeded_bert(seed=seed).state_dict().items()
    }


def read(
    tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32, path: str = "m.safetensors"
) -> dict[str, Tensor]:
    return read_checkpoint(safetensors.torch.save(tensors), TINY, dtype, path)


def run_python(code: str, *arguments: str | Path) -> str:
    """Run code in a fresh process, where what it imports and holds can be measured."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(sys.modules["minilm"].__path__[0]).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout


# The table of names.


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        ("embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight"),
        ("embeddings.position_embeddings.weight", "embeddings.position_embeddings.weight"),
        ("embeddings.layer_norm.bias", "embeddings.LayerNorm.bias"),
        ("layers.0.attention.key.weight", "encoder.layer.0.attention.self.key.weight"),
        ("layers.3.attention.query.bias", "encoder.layer.3.attention.self.query.bias"),
        ("layers.5.attention.output.bias", "encoder.layer.5.attention.output.dense.bias"),
        ("layers.5.attention_layer_norm.bias", "encoder.layer.5.attention.output.LayerNorm.bias"),
        (
            "layers.11.feed_forward.intermediate.weight",
            "encoder.layer.11.intermediate.dense.weight",
        ),
        ("layers.11.feed_forward.output.weight", "encoder.layer.11.output.dense.weight"),
        ("layers.1.feed_forward_layer_norm.bias", "encoder.layer.1.output.LayerNorm.bias"),
    ],
)
def test_published_name(ours: str, published: str) -> None:
    assert published_name(ours) == published


def test_the_table_has_12_rows_and_expands_to_101_tensors() -> None:
    with torch.device("meta"):
        names = {published_name(name) for name in BertModel(BertConfig()).state_dict()}
    by_hand = {f"embeddings.{table}_embeddings.weight" for table in ("word", "position")}
    by_hand |= {"embeddings.token_type_embeddings.weight"}
    by_hand |= {f"embeddings.LayerNorm.{kind}" for kind in ("weight", "bias")}
    by_hand |= {
        f"encoder.layer.{layer}.{module}.{kind}"
        for layer in range(6)
        for module in LAYER
        for kind in ("weight", "bias")
    }
    assert len(NAMES) == 12
    assert len(names) == 101
    assert names == by_hand


def test_the_published_file_has_exactly_the_101_and_the_unused(published: Path) -> None:
    with torch.device("meta"):
        names = {published_name(name) for name in BertModel(BertConfig()).state_dict()}
    with safetensors.safe_open(published / "model.safetensors", framework="pt") as file:
        in_file = set(file.keys())
    assert len(UNUSED) == 3
    assert in_file == names | set(UNUSED)


def test_the_published_tensors_land_where_they_belong(
    published: Path, encoder: SentenceEncoder
) -> None:
    ours = encoder.bert.state_dict()
    with safetensors.safe_open(published / "model.safetensors", framework="pt") as file:
        for name, tensor in ours.items():
            assert torch.equal(tensor, file.get_tensor(published_name(name))), name


# Good files.


def test_round_trip_is_bit_equal() -> None:
    original = seeded_bert(seed=7)
    loaded = build_bert(TINY, read(tiny_tensors(seed=7)))
    assert not loaded.training
    assert list(loaded.state_dict()) == list(original.state_dict())
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.tensor([[2, 7, 8, 3]])
    assert torch.equal(loaded(ids), original(ids))


def _prefix(prefix: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    return change


def _gamma_and_beta(tensors: dict[str, Tensor]) -> None:
    for name in list(tensors):
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        tensors[old.replace("LayerNorm.bias", "LayerNorm.beta")] = tensors.pop(name)


def _unused(tensors: dict[str, Tensor]) -> None:
    tensors["embeddings.position_ids"] = torch.arange(24)[None]
    tensors["pooler.dense.weight"] = torch.zeros(32, 32)
    tensors["pooler.dense.bias"] = torch.full((32,), torch.nan)  # not read, so not checked


def _unused_and_prefix(tensors: dict[str, Tensor]) -> None:
    _unused(tensors)
    _gamma_and_beta(tensors)
    _prefix("bert.")(tensors)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_prefix("bert."), id="bert."),
        pytest.param(_prefix("0.auto_model."), id="0.auto_model."),
        pytest.param(_gamma_and_beta, id="gamma and beta"),
        pytest.param(_unused, id="pooler and position_ids"),
        pytest.param(_unused_and_prefix, id="all of it"),
    ],
)
def test_other_writers_names(change: Change) -> None:
    tensors = tiny_tensors()
    change(tensors)
    state = read(tensors)
    for name, tensor in seeded_bert().state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert len(state) == len(seeded_bert().state_dict())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "asked", [None, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_every_floating_dtype_loads_in_the_dtype_asked_for(
    tiny_folder: Path, stored: torch.dtype, asked: torch.dtype | None
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in tiny_tensors().items()}
    safetensors.torch.save_file(tensors, tiny_folder / "model.safetensors")
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu", dtype=asked)
    wanted = asked or torch.float32
    assert encoder.dtype == wanted
    linear = [name for name, part in encoder.bert.named_modules() if isinstance(part, nn.Linear)]
    for name, tensor in encoder.bert.state_dict().items():
        # bfloat16 is for the products: embeddings and norms are float32.
        is_float32 = wanted == torch.bfloat16 and name.rpartition(".")[0] not in linear
        expected = torch.float32 if is_float32 else wanted
        # One rounding from the stored number, not two.
        assert torch.equal(tensor, tensors[published_name(name)].to(expected)), name
    result = torch.float32 if wanted == torch.bfloat16 else wanted
    assert encoder.encode("the dog", convert_to_tensor=True).dtype == result


def test_loading_inside_inference_mode_gives_parameters_that_can_be_trained(
    tiny_folder: Path,
) -> None:
    with torch.inference_mode():
        encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    parameters = dict(encoder.named_parameters())
    for name, parameter in parameters.items():
        assert isinstance(parameter, torch.nn.Parameter), name
        assert not parameter.is_inference(), name
        assert parameter.requires_grad, name
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    features = encoder.tokenize(["the dog bites the man", "a cat"])
    encoder(features)["sentence_embedding"][0, 0].backward()
    torch.optim.SGD(encoder.parameters(), lr=0.1).step()
    word = "bert.embeddings.word_embeddings.weight"
    assert not torch.equal(parameters[word], before[word])


def test_nothing_stays_on_the_meta_device(tiny_folder: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    assert len(tensors) == 5 + 2 * 16
    assert {name for name, tensor in tensors if tensor.device.type != "cpu"} == set()


def test_each_tensor_owns_its_memory() -> None:
    state = read(tiny_tensors())
    for name, tensor in state.items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4, name
    assert len({tensor.untyped_storage().data_ptr() for tensor in state.values()}) == len(state)


# Bad files: everything that is wrong, in one error.


def _missing(tensors: dict[str, Tensor]) -> None:
    del tensors["encoder.layer.1.output.dense.bias"]


def _unexpected(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.layer.2.output.dense.bias"] = torch.zeros(32)


def _misshapen(tensors: dict[str, Tensor]) -> None:
    name = "embeddings.word_embeddings.weight"
    tensors[name] = tensors[name][:39].clone()


def _integer(tensors: dict[str, Tensor]) -> None:
    name = "encoder.layer.0.attention.self.query.weight"
    tensors[name] = tensors[name].to(torch.int8)


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.layer.0.attention.self.key.weight"][3, 4] = torch.nan


def _infinite(tensors: dict[str, Tensor]) -> None:
    tensors["embeddings.LayerNorm.weight"][31] = -torch.inf


def _beyond_float16(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.layer.1.attention.self.value.bias"][0] = 70_000.0


BAD = [
    (_missing, "encoder.layer.1.output.dense.bias is missing"),
    (_unexpected, "encoder.layer.2.output.dense.bias is unexpected"),
    (
        _misshapen,
        "embeddings.word_embeddings.weight has shape [39, 32], config.json asks for [40, 32]",
    ),
    (
        _integer,
        (
            "encoder.layer.0.attention.self.query.weight has dtype torch.int8, "
            "expected a floating-point one"
        ),
    ),
    (_nan, "encoder.layer.0.attention.self.key.weight contains NaN or infinity"),
    (_infinite, "embeddings.LayerNorm.weight contains NaN or infinity"),
    (
        _beyond_float16,
        "encoder.layer.1.attention.self.value.bias has values beyond the range of torch.float16",
    ),
]


@pytest.mark.parametrize(("change", "problem"), BAD, ids=[change.__name__ for change, _ in BAD])
def test_one_problem(change: Change, problem: str) -> None:
    tensors = tiny_tensors()
    change(tensors)
    with pytest.raises(WeightsError) as info:
        read(tensors, torch.float16, "some/model.safetensors")
    assert str(info.value) == f"{Path('some/model.safetensors')}: {problem}"
    assert info.value.path == Path("some/model.safetensors")
    assert info.value.problems == (problem,)


def test_all_problems_are_listed_in_one_error() -> None:
    tensors = tiny_tensors()
    for change, _ in BAD:
        change(tensors)
    with pytest.raises(WeightsError) as info:
        read(tensors, torch.float16, "some/model.safetensors")
    assert str(info.value).startswith(f"{Path('some/model.safetensors')}: {len(BAD)} problems")
    assert set(info.value.problems) == {problem for _, problem in BAD}


def test_what_is_beyond_float16_is_fine_in_float32_and_bfloat16() -> None:
    tensors = tiny_tensors()
    _beyond_float16(tensors)
    assert read(tensors)["layers.1.attention.value.bias"][0] == 70_000
    # bfloat16 has 8 bits of precision: 70000 lies between 69632 and 70144.
    assert read(tensors, torch.bfloat16)["layers.1.attention.value.bias"][0] == 70_144


def test_another_models_file_is_refused_by_name() -> None:
    with pytest.raises(WeightsError) as info:
        read({"model.embed_tokens.weight": torch.zeros(40, 32)})
    assert "embeddings.word_embeddings.weight is missing" in info.value.problems
    assert "model.embed_tokens.weight is unexpected" in info.value.problems


def _header(**tensor: object) -> bytes:
    text = json.dumps({"x": tensor}).encode()
    return struct.pack("<Q", len(text)) + text


GOOD_BYTES = safetensors.torch.save(tiny_tensors())


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(GOOD_BYTES[:4], id="cut in the length"),
        pytest.param(GOOD_BYTES[:100], id="cut in the header"),
        pytest.param(GOOD_BYTES[: len(GOOD_BYTES) // 2], id="half"),
        pytest.param(GOOD_BYTES[:-1], id="last byte missing"),
        pytest.param(GOOD_BYTES + b"\0", id="one byte too many"),
        pytest.param(bytes(range(256)) * 8, id="garbage"),
        pytest.param(b"\xff" * 64, id="an absurd header length"),
        pytest.param(struct.pack("<Q", 4) + b"\xff\xfe\xfd\xfc", id="a header that is not UTF-8"),
        pytest.param(_header(dtype="F32", shape=[2**40], data_offsets=[0, 4]), id="no such data"),
        pytest.param(_header(dtype="X9", shape=[1], data_offsets=[0, 4]) + b"\0" * 4, id="dtype"),
        pytest.param(_header(dtype="F32", shape=[-1], data_offsets=[0, 4]) + b"\0" * 4, id="-1"),
    ],
)
def test_broken_bytes(data: bytes) -> None:
    with pytest.raises(WeightsError, match="is not a safetensors file, or cut short") as info:
        read_checkpoint(data, TINY, path="some/model.safetensors")
    assert str(info.value).startswith(str(Path("some/model.safetensors")))


# What only shows in a process of its own.


@pytest.mark.process
def test_the_file_is_not_needed_after_loading(tmp_path: Path) -> None:
    """A memory-mapped parameter would end the process with SIGBUS here, or change its values."""
    config = BertConfig(vocab_size=40, hidden_size=256, num_hidden_layers=2, num_attention_heads=4)
    folder = write_model_folder(tmp_path / "model", config)
    code = """
import os, sys
import numpy as np
from minilm import SentenceEncoder
folder = sys.argv[1]
encoder = SentenceEncoder.from_pretrained(folder, device="cpu")
before = encoder.encode(["the dog bites", "a cat"])
for name in ("model.safetensors", "tokenizer.json", "config.json"):
    os.truncate(os.path.join(folder, name), 0)
assert np.array_equal(before, encoder.encode(["the dog bites", "a cat"]))
print("equal")
"""
    assert run_python(code, folder) == "equal\n"


@pytest.mark.process
def test_loading_imports_no_compiler(tiny_folder: Path) -> None:
    code = """
import sys
from minilm import SentenceEncoder
SentenceEncoder.from_pretrained(sys.argv[1], device="cpu").encode("the dog")
print(sorted({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)))
"""
    assert run_python(code, tiny_folder) == "[]\n"


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/statm")
def test_no_second_copy_of_the_weights_stays(published: Path, tiny_folder: Path) -> None:
    code = """
import gc, os, sys
from minilm import SentenceEncoder

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

warm_up = SentenceEncoder.from_pretrained(sys.argv[1], device="cpu").encode("the dog")
before = resident()
encoder = SentenceEncoder.from_pretrained(sys.argv[2], device="cpu")
print(resident() - before)
"""
    size = (published / "model.safetensors").stat().st_size
    growth = int(run_python(code, tiny_folder, published))
    # One copy, and what the vocabulary of 30,522 words takes; two copies would be 2.0.
    assert 0.9 * size < growth < 1.5 * size


def test_a_tensor_under_two_names_is_refused() -> None:
    tensors = tiny_tensors()
    tensors["bert.embeddings.LayerNorm.weight"] = tensors["embeddings.LayerNorm.weight"].clone()
    with pytest.raises(WeightsError, match="there under another name too"):
        read(tensors, torch.float32, "model.safetensors")


def test_8_bit_numbers_are_refused() -> None:
    tensors = tiny_tensors()
    name = "encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    with pytest.raises(WeightsError, match=r"has dtype torch\.float8_e4m3fn; supported"):
        read(tensors, torch.float32, "model.safetensors")

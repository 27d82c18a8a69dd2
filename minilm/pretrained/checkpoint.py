"""`model.safetensors` -> the tensors of `BertModel`, under our names, checked.

In: the bytes of the file, or of the files that it is split into. Out: a state dict, then a filled
`BertModel`. Next: `encoder.py`.

The published file names its tensors as Google's first BERT release did; `NAMES` says where each
one goes. Nothing is skipped silently: a tensor that is not in the table is an error.
"""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minilm.bert import BertModel
from minilm.config import BertConfig
from minilm.disk import check_header
from minilm.errors import WeightsError, errors_of_libraries

__all__ = ["NAMES", "UNUSED", "UNUSED_HEADS", "build_bert", "read_checkpoint"]

# Our name: the published name. `{}` is the layer's number; each row stands for `.weight` and, for
# linear layers and norms, `.bias`: 101 tensors in all.
NAMES = {
    "embeddings.word_embeddings": "embeddings.word_embeddings",
    "embeddings.position_embeddings": "embeddings.position_embeddings",
    "embeddings.token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings.layer_norm": "embeddings.LayerNorm",
    "layers.{}.attention.query": "encoder.layer.{}.attention.self.query",
    "layers.{}.attention.key": "encoder.layer.{}.attention.self.key",
    "layers.{}.attention.value": "encoder.layer.{}.attention.self.value",
    "layers.{}.attention.output": "encoder.layer.{}.attention.output.dense",
    "layers.{}.attention_layer_norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layers.{}.feed_forward.intermediate": "encoder.layer.{}.intermediate.dense",
    "layers.{}.feed_forward.output": "encoder.layer.{}.output.dense",
    "layers.{}.feed_forward_layer_norm": "encoder.layer.{}.output.LayerNorm",
}

# In the published file, and not used by the sentence embedding.
UNUSED = {
    "embeddings.position_ids": "the numbers 0 to 511; counted where they are needed",
    "pooler.dense.weight": "BERT's own [CLS] pooler; this model takes the mean instead",
    "pooler.dense.bias": "the same",
}

# What is on top of the network in a checkpoint that was trained for something else, or further: the
# token vectors don't depend on it.
UNUSED_HEADS = {
    "cls.predictions.": "the words behind [MASK], of BertForMaskedLM and BertForPreTraining",
    "cls.seq_relationship.": "whether two sentences follow each other, of BertForPreTraining",
    "classifier.": "the classes of BertForSequenceClassification and its like",
    "qa_outputs.": "where an answer starts and ends, of BertForQuestionAnswering",
}

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_PREFIXES = ("0.auto_model.", "bert.")  # of a file of the whole pipeline, or of one with a head
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def read_checkpoint(
    data: bytes | Mapping[str, bytes],
    config: BertConfig,
    dtype: torch.dtype = torch.float32,
    path: str | Path = "model.safetensors",
    weight_map: Mapping[str, str] | None = None,
    known_problems: Sequence[str] = (),
) -> dict[str, Tensor]:
    """Read and check every tensor of a checkpoint.

    Args:
        data: The contents of the safetensors file; or, by name, of each of several files.
        config: The sizes that the tensors must have.
        dtype: What to convert them to; bfloat16 is for the linear layers, with float32 for the
            embeddings and norms.
        path: What to call the file in an error.
        weight_map: The index of several files: which has which tensor. Tensors of a file that is
            not in `data` are not counted as missing.
        known_problems: Problems found before, to be listed in the same error.

    Returns:
        The state dict of `BertModel(config)`. The tensors own their memory: neither the file nor
        `data` is needed any more.

    Raises:
        WeightsError: The file is broken, or tensors are missing, unexpected, of the wrong shape,
            not floating-point or not finite (also after conversion); all are listed.
    """
    skeleton = _without_memory(config)
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    products = [name for name, part in skeleton.named_modules() if isinstance(part, nn.Linear)]
    kinds = dict.fromkeys(expected, dtype)
    if dtype == torch.bfloat16:  # what is added up between the products stays float32
        for name in expected:
            if name.rpartition(".")[0] not in products:
                kinds[name] = torch.float32
    with torch.inference_mode(False):  # parameters must be ordinary tensors wherever this is called
        found: dict[str, Tensor] = {}
        state, problems = {}, list(known_problems)
        weight_map = weight_map or {}
        for file, content in {"": data}.items() if isinstance(data, bytes) else data.items():
            try:
                contents = _tensors(content, path)
            except WeightsError as error:
                if isinstance(data, bytes):
                    raise
                problems += [f"{file} {problem}" for problem in error.problems]
                continue
            problems += [
                f"{name} is not in {file}, where it should be"
                for name, place in weight_map.items()
                if place == file and name not in contents
            ]
            for name in list(contents):
                if _plain(name) in found:
                    where = f"in {file} and in another file" if file else "there under another name"
                    problems.append(f"{name} is {where} too")
                found[_plain(name)] = contents.pop(name)
        reported = {_plain(name) for name in weight_map if _plain(name) not in found}
        for name, shape in expected.items():
            published = published_name(name)
            tensor = found.pop(published, None)
            problem = _problem(tensor, shape, kinds[name])
            if problem and not (tensor is None and published in reported):
                problems.append(f"{published} {problem}")
            elif tensor is not None:
                state[name] = tensor.to(kinds[name], copy=True)  # out of the buffer of the file
    problems += [
        f"{name} is unexpected"
        for name in sorted(found)
        if name not in UNUSED and not name.startswith(tuple(UNUSED_HEADS))
    ]
    if problems:
        raise WeightsError(path, problems)
    return state


def _tensors(data: bytes, path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, under the names that it has for them."""
    with errors_of_libraries(
        lambda why: WeightsError(path, [f"is not a safetensors file, or cut short: {why}"])
    ):
        check_header(io.BytesIO(data))
        return safetensors.torch.load(data)


def build_bert(config: BertConfig, state: dict[str, Tensor]) -> BertModel:
    """Make a `BertModel` of these tensors; nothing is initialized first, nothing is copied."""
    with torch.inference_mode(False):
        bert = _without_memory(config)
        bert.load_state_dict(state, strict=True, assign=True)
    return bert.eval()


def published_name(name: str) -> str:
    """The published name of a tensor, from our name.

    >>> published_name("layers.3.attention.query.bias")
    'encoder.layer.3.attention.self.query.bias'
    """
    module, _, kind = name.rpartition(".")
    parts = module.split(".")
    layer = parts[1] if parts[0] == "layers" else ""
    if layer:
        parts[1] = "{}"
    return f"{NAMES['.'.join(parts)].format(layer)}.{kind}"


def published_shapes(config: BertConfig) -> dict[str, torch.Size]:
    """The shape of every tensor of `BertModel(config)`, under our names."""
    return {name: tensor.shape for name, tensor in _without_memory(config).state_dict().items()}


def read_unused(files: Iterable[bytes], size: int) -> dict[str, Tensor]:
    """Read the pooler of a checkpoint, which is not used, and copied when a model is saved.

    Args:
        files: The contents of its safetensors files.
        size: The width of the model.

    Returns:
        Both tensors under their published names; {} if they are not there in their shapes.
    """
    shapes = {"pooler.dense.weight": (size, size), "pooler.dense.bias": (size,)}
    found = {}
    try:
        for data in files:
            for name, tensor in _tensors(data, "model.safetensors").items():
                if _plain(name) in shapes:
                    found[_plain(name)] = tensor
    except WeightsError:
        return {}
    fits = all(tuple(tensor.shape) == shapes[name] for name, tensor in found.items())
    return found if fits and len(found) == len(shapes) else {}


def _without_memory(config: BertConfig) -> BertModel:
    """Make a `BertModel` on the meta device: names and shapes only."""
    with torch.device("meta"), _NoRandomNumbers():
        return BertModel(config)


class _NoRandomNumbers(TorchFunctionMode):
    """Skips drawing initial weights, which on the meta device only imports a compiler (1 s)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_initializer = getattr(func, "__module__", None) == "torch.nn.init"
        if is_initializer or func in (Tensor.normal_, Tensor.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _plain(name: str) -> str:
    """A published name without the prefixes of some writers, and with today's names of norms."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _problem(tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> str | None:
    if tensor is None:
        return "is missing"
    if tensor.shape != shape:
        return f"has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
    if not tensor.is_floating_point():
        return f"has dtype {tensor.dtype}, expected a floating-point one"
    if tensor.dtype not in _DTYPES:  # the 8-bit ones mean nothing without their scales
        return f"has dtype {tensor.dtype}; supported: {', '.join(map(str, _DTYPES))}"
    extremes = torch.stack(tensor.aminmax())  # a NaN anywhere is in both; one pass over the tensor
    if not extremes.isfinite().all():
        return "contains NaN or infinity"
    if not extremes.to(dtype).isfinite().all():
        return f"has values beyond the range of {dtype}"
    return None

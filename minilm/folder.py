"""The files of a model -> everything that an encoder is built from, read and checked beforehand.

In: `ModelFiles`. Out: `ModelParts`. Next: `encoder.py` composes them.

A folder in the sentence-transformers format holds `modules.json`, which lists the stages
(Transformer, Pooling, optionally Normalize) and a path for the files of each. Versions 1 to 5 and
version 6 of that library write some of the files differently; both are read.

Nothing is guessed and nothing is built before all files have been read: what is wrong with any of
them is reported in one error.
"""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from minilm.bert import BertModel
from minilm.checkpoint import build_bert, read_checkpoint
from minilm.config import BertConfig, unsupported
from minilm.disk import inside
from minilm.errors import (
    ConfigError,
    InputTypeError,
    MinilmError,
    ModelFolderError,
    TokenizerError,
    WeightsError,
)
from minilm.hub import ModelFiles, looks_like
from minilm.options import DEFAULT_PROMPTS
from minilm.pooling import ClsPooling, MeanPooling, Normalize
from minilm.similarity import SIMILARITY_FUNCTIONS
from minilm.tokenizer import WordPieceTokenizer

__all__ = ["ModelParts", "as_stages", "read_model"]

_Part = TypeVar("_Part")

_STAGES = ("Transformer", "Pooling", "Normalize")

_POOLING_MODES: dict[str, Literal["mean", "cls"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}

# What version 6 can say of a stage and we implement in one way only.
_TRANSFORMER_SETTINGS: dict[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction", None),
    "modality_config": (
        {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        None,
    ),
    "module_output_name": ("token_embeddings", None),
    "processing_kwargs": ({}, None),
    "query_length": (None,),
    "document_length": (None,),
    "query_expansion": (None, False),
}
_NORMALIZE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "module_input_name": ("sentence_embedding", None),
    "module_output_name": ("sentence_embedding", None),
}


class _OwnSettings(NamedTuple):
    similarity_fn_name: str
    prompts: dict[str, str]
    default_prompt_name: str | None


@dataclass(frozen=True)
class ModelParts:
    """What an encoder is made of.

    Attributes:
        config: The sizes of the network.
        state: Its tensors, under our names.
        tokenizer: The tokenizer.
        pooling: How token vectors become one vector.
        normalize: Whether that vector is scaled to length 1.
        max_seq_length: The longest input in tokens, [CLS] and [SEP] included.
        similarity_fn_name: The similarity that the model was trained for.
        prompts: Texts to put in front of sentences, by name.
        default_prompt_name: The one to use if none is asked for.
    """

    config: BertConfig
    state: dict[str, Tensor]
    tokenizer: WordPieceTokenizer
    pooling: Literal["mean", "cls"]
    normalize: bool
    max_seq_length: int
    similarity_fn_name: str
    prompts: dict[str, str]
    default_prompt_name: str | None

    def build(self) -> list[nn.Module]:
        """Compose the stages, in evaluation mode."""
        pooling = MeanPooling() if self.pooling == "mean" else ClsPooling()
        stages: list[nn.Module] = [build_bert(self.config, self.state), pooling]
        if self.normalize:
            stages.append(Normalize())
        return [stage.eval() for stage in stages]


def as_stages(modules: Sequence[nn.Module]) -> tuple[BertModel, nn.Module, nn.Module]:
    """The three stages of an encoder; a missing Normalize becomes one that does nothing.

    Raises:
        InputTypeError: These are not such modules.
    """
    kinds = (BertModel, nn.Module, nn.Module)
    stages = [*modules, nn.Identity().eval()] if len(modules) == 2 else list(modules)
    if len(stages) != 3 or not all(map(isinstance, stages, kinds)):
        given = ", ".join(type(module).__name__ for module in modules)
        raise InputTypeError(
            f"modules is [{given}]; pass [BertModel, pooling] or [BertModel, pooling, Normalize]",
            "modules",
        )
    return tuple(stages)  # type: ignore[return-value]  # checked just above


def read_model(files: ModelFiles, dtype: torch.dtype) -> ModelParts:
    """Read and check all files of a model.

    Args:
        files: Where they are.
        dtype: What to convert the weights to.

    Raises:
        ConfigError, TokenizerError, WeightsError: One file is wrong.
        ModelFolderError: Several are; it lists the errors of all.
        HashMismatchError: A file of the default model is not the published one.
    """
    stages = _read_stages(files)  # where to look for the others; so this one comes first
    transformer = stages["Transformer"]
    errors: list[MinilmError] = []

    def attempt(read: Callable[[], _Part]) -> _Part | None:
        try:
            return read()
        except (ConfigError, TokenizerError, WeightsError) as error:
            errors.append(error)
            return None

    config = attempt(lambda: _read_config(files, transformer + "config.json"))
    settings = attempt(lambda: _read_settings(files, transformer))
    own = attempt(lambda: _read_own_settings(files))
    pooling = attempt(lambda: _read_pooling(files, stages["Pooling"] + "config.json", config))
    if "Normalize" in stages:
        attempt(lambda: _read_normalize(files, stages["Normalize"] + "config.json"))
    limit = state = None
    if settings is not None:  # else a second error would only follow from the first
        limit = attempt(lambda: _max_seq_length(files, transformer, settings, config))
    known = settings or ({}, {})
    tokenizer = attempt(lambda: _read_tokenizer(files, transformer, known, config))
    if config is not None:
        state = attempt(
            lambda: _read_weights(files, transformer + "model.safetensors", config, dtype)
        )
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ModelFolderError(files.location, errors)
    assert config and state and tokenizer and pooling and limit and own  # noqa: PT018
    return ModelParts(
        config,
        state,
        tokenizer,
        pooling,
        "Normalize" in stages,
        limit,
        own.similarity_fn_name,
        own.prompts,
        own.default_prompt_name,
    )


def _read_stages(files: ModelFiles) -> dict[str, str]:
    """modules.json -> the folder of each stage: "" or "1_Pooling/"."""
    path = files.path("modules.json")
    values = _read_json(files, "modules.json", list)
    try:
        stages = [(_stage(entry["type"]), entry["path"]) for entry in values]
        folders = [str(folder) for _, folder in stages]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(path, ["is not a list of stages with a type and a path"]) from error
    problems = []
    as_prefix = []
    for folder in folders:
        try:
            within = inside(folder)
            as_prefix.append(f"{within}/" if within else "")
        except ValueError:
            problems.append(f"path {folder!r} leads outside the model's folder")
    kinds = [kind for kind, _ in stages]
    if tuple(kinds) not in (_STAGES, _STAGES[:2]):
        problems.append(
            f"lists the stages {', '.join(kinds) or 'none'}; "
            f"supported: {', '.join(_STAGES)}, or without the last"
        )
    if problems:
        raise ConfigError(path, problems)
    return dict(zip(kinds, as_prefix, strict=True))


def _stage(name: str) -> str:
    """The class of a stage; the full name, in quotes, if it isn't sentence-transformers' own."""
    package, _, kind = name.rpartition(".")
    return kind if package.split(".")[0] == "sentence_transformers" else repr(name)


def _read_config(files: ModelFiles, name: str) -> BertConfig:
    return BertConfig.from_dict(_read_json(files, name, dict), files.path(name))


def _read_settings(files: ModelFiles, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The objects in sentence_bert_config.json and tokenizer_config.json; both are optional."""
    name = folder + "sentence_bert_config.json"
    sentence = _read_json(files, name, dict, {})
    _check(files, name, sentence, _TRANSFORMER_SETTINGS)
    if not isinstance(sentence.get("do_lower_case", False), bool):
        problem = f"do_lower_case is {sentence['do_lower_case']!r}; pass true or false"
        raise ConfigError(files.path(name), [problem])
    return sentence, _read_json(files, folder + "tokenizer_config.json", dict, {})


def _read_own_settings(files: ModelFiles) -> _OwnSettings:
    """config_sentence_transformers.json, which is optional."""
    name = "config_sentence_transformers.json"
    values = _read_json(files, name, dict, {})
    known = {
        "similarity_fn_name": (*SIMILARITY_FUNCTIONS, None),
        "model_type": ("SentenceTransformer",),
    }
    problems = unsupported(values, known)
    prompts = values.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        problems.append(f"prompts is {prompts!r}; expected an object of names and texts")
        prompts = {}
    default, names = values.get("default_prompt_name"), list(DEFAULT_PROMPTS | prompts)
    if default not in [*names, None]:
        supported = ", ".join(map(repr, names))
        problems.append(f"default_prompt_name is {default!r}; supported: {supported} or null")
    if problems:
        raise ConfigError(files.path(name), problems)
    return _OwnSettings(str(values.get("similarity_fn_name") or "cosine"), prompts, default)


def _read_pooling(
    files: ModelFiles, name: str, config: BertConfig | None
) -> Literal["mean", "cls"]:
    values = _read_json(files, name, dict)
    problems = []
    if "pooling_mode" in values:  # version 6
        given = values["pooling_mode"]
        modes = given if isinstance(given, list) else [given]
        asked = [f"pooling_mode={mode}" for mode in modes if mode not in ("mean", "cls")]
    else:
        flags = {key: on for key, on in values.items() if key.startswith("pooling_mode_")}
        problems = [
            f"{key} is {on!r}; pass true or false"
            for key, on in flags.items()
            if not isinstance(on, bool)
        ]
        chosen = [key for key, on in flags.items() if on]
        asked = [key for key in chosen if key not in _POOLING_MODES]
        modes = [_POOLING_MODES[key] for key in chosen if key in _POOLING_MODES]
    if asked or len(modes) != 1:
        problems.append(
            f"asks for the pooling {', '.join(map(str, asked or modes)) or 'none'}; "
            "supported: mean or cls"
        )
    if values.get("include_prompt", True) is not True:
        problems.append(f"include_prompt is {values['include_prompt']!r}; supported: true")
    size = values.get("embedding_dimension", values.get("word_embedding_dimension"))
    if config is not None and size not in (None, config.hidden_size):
        problems.append(
            f"the embedding dimension is {size!r}; hidden_size in config.json is "
            f"{config.hidden_size}"
        )
    if problems:
        raise ConfigError(files.path(name), problems)
    return "mean" if modes[0] == "mean" else "cls"


def _read_normalize(files: ModelFiles, name: str) -> None:
    _check(files, name, _read_json(files, name, dict, {}), _NORMALIZE_SETTINGS)


def _max_seq_length(
    files: ModelFiles,
    folder: str,
    settings: tuple[dict[str, Any], dict[str, Any]],
    config: BertConfig | None,
) -> int:
    sentence, tokenizer = settings
    longest = config.max_position_embeddings if config else 131_072
    name, field, value = "sentence_bert_config.json", "max_seq_length", None
    if sentence.get(field) is not None:
        value = sentence[field]
    elif tokenizer.get("model_max_length") is not None:
        name, field = "tokenizer_config.json", "model_max_length"
        value = tokenizer[field]
        if isinstance(value, int | float) and value > longest:
            value = longest  # often a huge number that stands for "no limit of its own"
    path = files.path(folder + name)
    if value is None:
        raise ConfigError(
            path, ["max_seq_length is missing, and model_max_length in tokenizer_config.json too"]
        )
    if type(value) is not int or not 3 <= value <= longest:
        raise ConfigError(path, [f"{field} is {value!r}; expected an integer from 3 to {longest}"])
    return value


def _read_tokenizer(
    files: ModelFiles,
    folder: str,
    settings: tuple[dict[str, Any], dict[str, Any]],
    config: BertConfig | None,
) -> WordPieceTokenizer:
    name = folder + "tokenizer.json"
    path = files.path(name)
    tokenizer = WordPieceTokenizer(
        _read(files, name, TokenizerError),
        settings=settings[1],
        lower_case_first=bool(settings[0].get("do_lower_case", False)),
        path=path,
    )
    if config is not None and tokenizer.vocab_size > config.vocab_size:
        largest = tokenizer.vocab_size - 1
        problem = f"gives ids up to {largest}; vocab_size in config.json is {config.vocab_size}"
        raise TokenizerError(path, [problem])
    return tokenizer


def _read_weights(
    files: ModelFiles, name: str, config: BertConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    data = files.read_unverified(name)
    with ThreadPoolExecutor(1) as other:  # hashing 91 MB takes as long as reading them
        verified = other.submit(files.verify, name, data)
        try:
            return read_checkpoint(
                _contents(files, name, data, WeightsError), config, dtype, files.path(name)
            )
        finally:
            verified.result()  # if the file is damaged, this is what to say of it


def _read(
    files: ModelFiles, name: str, error: type[ConfigError | TokenizerError | WeightsError]
) -> bytes:
    return _contents(files, name, files.read(name), error)


def _contents(
    files: ModelFiles,
    name: str,
    data: bytes | None,
    error: type[ConfigError | TokenizerError | WeightsError],
) -> bytes:
    if data is None:
        hint = "; only safetensors files are read, never pickles" if error is WeightsError else ""
        raise error(files.path(name), ["is missing" + hint])
    foreign = looks_like(data)
    if foreign:
        raise error(files.path(name), [f"looks like {foreign}"])
    return data


def _read_json(
    files: ModelFiles, name: str, kind: type[Any], default: dict[str, Any] | None = None
) -> Any:
    if default is not None and files.find(name, optional=True) is None:
        return default
    data = _read(files, name, ConfigError)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(files.path(name), [f"is not JSON: {error}"]) from error
    if not isinstance(values, kind):
        word = "an object" if kind is dict else "a list"
        raise ConfigError(files.path(name), [f"holds {type(values).__name__}; expected {word}"])
    return values


def _check(
    files: ModelFiles, name: str, values: dict[str, Any], known: dict[str, tuple[Any, ...]]
) -> None:
    problems = unsupported(values, known)
    if problems:
        raise ConfigError(files.path(name), problems)

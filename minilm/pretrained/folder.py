"""The files of a model -> everything that an encoder is built from, read and checked beforehand.

In: `ModelFiles`. Out: `ModelParts`. Next: `encoder.py` composes them.

A folder in the sentence-transformers format has a `modules.json`, which lists the stages
(Transformer, Pooling, optionally Normalize) and a path for the files of each. Versions 1 to 5 and
version 6 of that library write some of the files differently; both are read.

Nothing is guessed, and nothing is built before all files are read: one error reports all that is
wrong with them. What the reference, or a library that it calls, acts upon is read here or refused
by name, whether it is a field or a file. What no program acts upon is ignored: other formats of the
same weights (`pytorch_model.bin`, `onnx/`, ...) where there is `model.safetensors`, `vocab.txt`
where there is `tokenizer.json`, and what a training left behind.
"""

import logging
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from minilm.config import BertConfig, unsupported
from minilm.disk import inside, parse_json
from minilm.errors import (
    ConfigError,
    MinilmError,
    ModelFolderError,
    TokenizerError,
    WeightsError,
)  # fmt: skip
from minilm.inference.truncation import caller_level
from minilm.pooling import ClsPooling, MeanPooling, Normalize
from minilm.pretrained.checkpoint import build_bert, read_checkpoint
from minilm.pretrained.hub import looks_like
from minilm.pretrained.options import DEFAULT_PROMPTS
from minilm.similarity import SIMILARITY_FUNCTIONS
from minilm.source import ModelFiles
from minilm.tokenizer import WordPieceTokenizer, is_built_anew, read_vocabulary

__all__ = ["POOLING_MODES", "ModelParts", "check_beside", "read_model"]

logger = logging.getLogger(__name__)

_Part = TypeVar("_Part")

_STAGES = ("Transformer", "Pooling")  # followed by any of _LAST_STAGES
_LAST_STAGES = ("Normalize", "Dropout")  # Normalize twice is Normalize; Dropout is for training

# Files that put something in the tokenizer's place, if they say so.
_PROCESSOR_CONFIGS = tuple(f"{kind}_config.json" for kind in (
    "processor", "preprocessor", "video_preprocessor",
))  # fmt: skip

# Where the Transformer's own settings may be: the first file that is not empty counts.
_SENTENCE_CONFIGS = tuple(f"sentence_{kind}_config.json" for kind in (
    "bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet",
))  # fmt: skip

POOLING_MODES: dict[str, Literal["mean", "cls"]] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}

_POOLING_FIELDS = (
    "pooling_mode", "word_embedding_dimension", "embedding_dimension", "include_prompt",
)  # fmt: skip

_TOKENIZER = "tokenizer.json"

# Settings of version 6 with the values that we implement.
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
    "tokenizer_name_or_path": (None,),
}
# Arguments for the library below; those in _WITHOUT_EFFECT choose between ways to equal numbers.
_ARGUMENTS = (
    "model_args", "tokenizer_args", "config_args",
    "model_kwargs", "processor_kwargs", "config_kwargs",
)  # fmt: skip
_WITHOUT_EFFECT = ("trust_remote_code", "attn_implementation", "low_cpu_mem_usage")
# Two that are read, and one that only chooses between ways to equal numbers.
_TRANSFORMER_FIELDS = (
    "max_seq_length", "do_lower_case", "unpad_inputs", *_TRANSFORMER_SETTINGS, *_ARGUMENTS,
)  # fmt: skip
_NORMALIZE_SETTINGS: dict[str, tuple[Any, ...]] = {
    "module_input_name": ("sentence_embedding", None),
    "module_output_name": ("sentence_embedding", None),
}
_PROCESSOR_SETTINGS: dict[str, tuple[Any, ...]] = {
    "processor_class": (None,),
    "auto_map": (None, {}),
    "init_inputs": ([],),
}

# What the reference reads in place of vocab.txt, where there is no tokenizer.json.
_OTHER_VOCABULARIES = ("tokenizer.model", "tiktoken.model", "tekken.json")


class _Stages(NamedTuple):
    """The folder of each stage: "" or "1_Pooling/"."""

    transformer: str
    pooling: str
    normalize: list[str]


class _TokenizerFiles(NamedTuple):
    settings: dict[str, Any]
    added_tokens: dict[str, int]


@dataclass(frozen=True)
class ModelParts:
    """All that an encoder is built from.

    Attributes:
        config: The sizes of the network.
        state: Its tensors, under our names.
        tokenizer: The tokenizer.
        pooling: How token vectors become one vector.
        normalize: Whether that vector is scaled to length 1.
        max_seq_length: The longest input in tokens, [CLS] and [SEP] included.
        similarity_fn_name: The similarity that the model was trained for.
        prompts: Texts to put in front of sentences, by name.
        default_prompt_name: The prompt to use if none is asked for.
        truncate_dim: How many numbers of each vector to keep; None for all.
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
    truncate_dim: int | None

    def build(self) -> list[nn.Module]:
        """Compose the stages, in evaluation mode."""
        pooling = MeanPooling() if self.pooling == "mean" else ClsPooling()
        stages: list[nn.Module] = [build_bert(self.config, self.state), pooling]
        if self.normalize:
            stages.append(Normalize())
        return [stage.eval() for stage in stages]


def read_model(files: ModelFiles, dtype: torch.dtype) -> ModelParts:
    """Read and check all files of a model.

    Args:
        files: Where they are.
        dtype: What to convert the weights to.

    Raises:
        ConfigError, TokenizerError, WeightsError: One file is wrong.
        ModelFolderError: Several are; it lists the errors of all.
        HashMismatchError: A file of the default model is not the published one, or one that was
            fetched from the Hub is not what the Hub said.
    """
    stages = _read_stages(files)  # first, since it says where the others are
    folder = stages.transformer
    errors: list[MinilmError] = []

    def attempt(read: Callable[[], _Part]) -> _Part | None:
        try:
            return read()
        except (ConfigError, TokenizerError, WeightsError) as error:
            errors.append(error)
            return None

    attempt(lambda: check_beside(files, folder))
    values = attempt(lambda: _read_json(files, folder + "config.json", dict))
    config = None
    if values is not None:
        path = files.path(folder + "config.json")
        config = attempt(lambda: BertConfig.from_dict(values, path))
    sentence = attempt(lambda: _read_sentence_config(files, folder))
    own = attempt(lambda: _read_own_settings(files))
    pooling = attempt(lambda: _read_pooling(files, stages.pooling + "config.json", config))
    for each in stages.normalize:
        attempt(partial(_check, files, each + "config.json", _NORMALIZE_SETTINGS))
    of_tokenizer = attempt(lambda: _read_tokenizer_files(files, folder, values or {}))
    limit = tokenizer = state = None
    if sentence is not None and of_tokenizer is not None:  # else their errors are enough
        limit = attempt(lambda: _max_seq_length(files, folder, sentence, of_tokenizer, config))
    lower_case_first = bool(sentence and sentence.get("do_lower_case"))
    known = of_tokenizer or _TokenizerFiles({}, {})
    tokenizer = attempt(lambda: _read_tokenizer(files, folder, known, lower_case_first, config))
    if config is not None:
        state = attempt(lambda: _read_weights(files, folder, config, dtype))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ModelFolderError(files.location, errors)
    if files.unverifiable:
        named = ", ".join(files.unverifiable)
        called = next(iter(files.unverifiable.values()))
        warnings.warn(
            f"{files.location}: {named} can't be verified: the Hub called it {called!r}, which is "
            "no SHA-256 and no SHA-1 of git",
            stacklevel=caller_level(),
        )
    assert config and state and tokenizer and pooling and limit and own  # noqa: PT018
    return ModelParts(config, state, tokenizer, pooling, bool(stages.normalize), limit, **own)


def _read_stages(files: ModelFiles) -> _Stages:
    """Read from modules.json where the files of each stage are."""
    path = files.path("modules.json")
    if files.find("modules.json") is None:
        hint = "without it nothing says how token vectors become one vector"
        raise ConfigError(path, [f"is missing; {hint}"])
    values = _read_json(files, "modules.json", list)
    try:
        stages = [(_stage(entry["type"]), entry["path"]) for entry in values]
        folders = [str(folder) for _, folder in stages]
        names = [entry["name"] for entry in values if "name" in entry]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(path, ["is not a list of stages with a type and a path"]) from error
    problems = []
    as_prefix = []
    for folder in folders:
        try:
            within = inside(folder)
            as_prefix.append(f"{within}/" if within else "")
        except ValueError as error:
            problems.append(f"path {error}")
    kinds = [kind for kind, _ in stages]
    if tuple(kinds[:2]) != _STAGES or not set(kinds[2:]) <= {*_LAST_STAGES}:
        problems.append(
            f"lists the stages {', '.join(kinds) or 'none'}; "
            f"supported: {', '.join(_STAGES)}, and after them {' and '.join(_LAST_STAGES)}"
        )
    if len(set(map(str, names))) < len(names):
        problems.append("gives two stages one name; the reference would take the last of them only")
    if problems:
        raise ConfigError(path, problems)
    if "Dropout" in kinds:
        logger.info("%s: Dropout acts in training only, and is left out", path)
    of_normalize = [as_prefix[i] for i, kind in enumerate(kinds) if kind == "Normalize"]
    return _Stages(as_prefix[0], as_prefix[1], of_normalize)


def _stage(name: str) -> str:
    """The class of a stage; its full name, in quotes, if it isn't sentence-transformers' own."""
    package, _, kind = name.rpartition(".")
    return kind if package.split(".")[0] == "sentence_transformers" else repr(name)


def check_beside(files: ModelFiles, folder: str) -> None:
    """Refuse files that the reference acts upon and that are not implemented."""
    name = folder + "adapter_config.json"
    if files.find(name) is not None:
        problem = (
            "is of an adapter, which changes the weights of the model that it names, and is not "
            "implemented; merge it (merge_and_unload of peft) and save the model that results"
        )
        raise ConfigError(files.path(name), [problem])
    for name in (folder + each for each in _PROCESSOR_CONFIGS):
        _check(files, name, _PROCESSOR_SETTINGS)


def _read_sentence_config(files: ModelFiles, folder: str) -> dict[str, Any]:
    """Read sentence_bert_config.json, which is optional, or the file in its place."""
    for name in (folder + each for each in _SENTENCE_CONFIGS):
        values: dict[str, Any] = _read_json(files, name, dict, {})
        if values:
            break
    problems = unsupported(values, _TRANSFORMER_SETTINGS)
    problems += [f"{key} is unknown" for key in values if key not in _TRANSFORMER_FIELDS]
    problems += [
        f"{key} is {values[key]!r}; supported: {{}}"
        for key in _ARGUMENTS
        if not set(values.get(key) or ()) <= set(_WITHOUT_EFFECT)
    ]
    if not isinstance(values.get("do_lower_case"), bool | None):
        problems.append(f"do_lower_case is {values['do_lower_case']!r}; pass true or false")
    if problems:
        raise ConfigError(files.path(name), problems)
    return values


def _read_tokenizer_files(
    files: ModelFiles, folder: str, config: dict[str, Any]
) -> _TokenizerFiles:
    """Read the files beside tokenizer.json, which are optional.

    As in the reference (`PreTrainedTokenizerBase._from_pretrained`), config.json may name the
    class, and special_tokens_map.json wins over a tokenizer_config.json without added tokens.
    """
    name = folder + "tokenizer_config.json"
    settings = _read_json(files, name, dict, {})
    problems = unsupported(settings, _PROCESSOR_SETTINGS)
    versions = [each for each in settings.get("fast_tokenizer_files") or () if each != _TOKENIZER]
    if versions:
        problems.append(
            f"fast_tokenizer_files names {', '.join(map(str, versions))}; only {_TOKENIZER} is read"
        )
    if problems:
        raise ConfigError(files.path(name), problems)
    if settings.get("tokenizer_class") is None and config.get("tokenizer_class") is not None:
        settings["tokenizer_class"] = config["tokenizer_class"]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens")
    if extra:
        settings["extra_special_tokens"] = extra
    if "added_tokens_decoder" in settings:
        return _TokenizerFiles(settings, {})
    name = folder + "special_tokens_map.json"
    if not files.pinned or name in files.pinned:  # that of the published model repeats its settings
        settings |= _read_json(files, name, dict, {})
    name = folder + "added_tokens.json"
    added = _read_json(files, name, dict, {})
    wrong = [key for key, number in added.items() if type(number) is not int]
    if wrong:
        raise ConfigError(files.path(name), [f"{wrong[0]!r} has no number"])
    return _TokenizerFiles(settings, added)


def _read_own_settings(files: ModelFiles) -> dict[str, Any]:
    """Read config_sentence_transformers.json, which is optional: the last fields of ModelParts."""
    name = "config_sentence_transformers.json"
    values = _read_json(files, name, dict, {})
    problems = unsupported(values, {"model_type": ("SentenceTransformer", None)})
    similarity = values.get("similarity_fn_name")
    if similarity is not None and similarity not in list(SIMILARITY_FUNCTIONS):
        warnings.warn(
            f"{files.path(name)}: similarity_fn_name is {similarity!r}, which is not one of "
            f"{', '.join(SIMILARITY_FUNCTIONS)}; the cosine is used",
            stacklevel=1,
        )
        similarity = None
    prompts = values.get("prompts") or {}
    if isinstance(prompts, dict) and None in prompts.values():
        empty = ", ".join(repr(key) for key, text in prompts.items() if text is None)
        warnings.warn(
            f"{files.path(name)}: prompts has no text for {empty}; the empty one is used",
            stacklevel=1,
        )
        prompts = {key: "" if text is None else text for key, text in prompts.items()}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        problems.append(f"prompts is {prompts!r}; expected an object of names and texts")
        prompts = {}
    default, names = values.get("default_prompt_name"), list(DEFAULT_PROMPTS | prompts)
    if default not in [*names, None]:
        supported = ", ".join(map(repr, names))
        problems.append(f"default_prompt_name is {default!r}; supported: {supported} or null")
    width = values.get("truncate_dim")
    if width is not None and (type(width) is not int or width < 1):
        problems.append(f"truncate_dim is {width!r}; expected a positive integer or null")
    if problems:
        raise ConfigError(files.path(name), problems)
    return {
        "similarity_fn_name": similarity or "cosine",
        "prompts": prompts,
        "default_prompt_name": default,
        "truncate_dim": width,
    }


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
        # The mean is the default, if nothing is chosen and it is not ruled out.
        default = "pooling_mode_mean_tokens"
        chosen = [key for key, on in flags.items() if on]
        if not chosen and default not in flags and values:
            chosen = [default]
        asked = [key for key in chosen if key not in POOLING_MODES]
        modes = [POOLING_MODES[key] for key in chosen if key in POOLING_MODES]
    if asked or len(modes) != 1:
        problems.append(
            f"asks for the pooling {', '.join(map(str, asked or modes)) or 'none'}; "
            "supported: mean or cls"
        )
    problems += [
        f"{key} is unknown"
        for key in values
        if key not in _POOLING_FIELDS and not key.startswith("pooling_mode_")
    ]
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


def _max_seq_length(
    files: ModelFiles,
    folder: str,
    sentence: dict[str, Any],
    tokenizer: _TokenizerFiles,
    config: BertConfig | None,
) -> int:
    """The limit that the files give; by default, as many tokens as there are positions."""
    longest = config.max_position_embeddings if config else 131_072
    name, field, value = "sentence_bert_config.json", "max_seq_length", None
    if sentence.get(field) is not None:
        value = sentence[field]
    else:
        name, field = "tokenizer_config.json", "model_max_length"
        if field not in tokenizer.settings:
            field = "max_len"  # its oldest name
        value = tokenizer.settings.get(field)
        if value is None or (isinstance(value, int | float) and value > longest):
            value = longest  # often a huge number that means "no limit of its own"
    if type(value) is not int or not 3 <= value <= longest:
        problem = f"{field} is {value!r}; expected an integer from 3 to {longest}"
        raise ConfigError(files.path(folder + name), [problem])
    return value


def _read_tokenizer(
    files: ModelFiles,
    folder: str,
    beside: _TokenizerFiles,
    lower_case_first: bool,
    config: BertConfig | None,
) -> WordPieceTokenizer:
    name = folder + _TOKENIZER
    vocabulary = folder + "vocab.txt"
    if files.find(name) is None and files.find(vocabulary) is not None:
        name = vocabulary
        tokenizer_json: bytes | str = read_vocabulary(
            _read(files, name, TokenizerError), files.path(name)
        )
        if not is_built_anew(beside.settings):
            kind = beside.settings["tokenizer_class"]
            problem = f"is missing; tokenizer_class is {kind!r}, which does not read vocab.txt"
            raise TokenizerError(files.path(folder + _TOKENIZER), [problem])
        for other in (folder + each for each in _OTHER_VOCABULARIES):
            if files.find(other) is not None:
                problem = "is another vocabulary than vocab.txt; remove the one that is not meant"
                raise TokenizerError(files.path(other), [problem])
    else:
        tokenizer_json = _read(files, name, TokenizerError)
    path = files.path(name)
    tokenizer = WordPieceTokenizer(
        tokenizer_json,
        settings=beside.settings,
        added_tokens=beside.added_tokens,
        lower_case_first=lower_case_first,
        path=path,
    )
    if config is not None and tokenizer.vocab_size > config.vocab_size:
        largest = tokenizer.vocab_size - 1
        problem = f"gives ids up to {largest}; vocab_size in config.json is {config.vocab_size}"
        raise TokenizerError(path, [problem])
    return tokenizer


def _read_weights(
    files: ModelFiles, folder: str, config: BertConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read one file, if there is one, else those that the index names, as the reference does."""
    name, index = folder + "model.safetensors", folder + "model.safetensors.index.json"
    data = files.read_unverified(name)
    if data is None and files.find(index) is not None:
        return _read_shards(files, index, folder, config, dtype)
    with ThreadPoolExecutor(1) as other:  # hashing 91 MB takes as long as reading them
        verified = other.submit(files.verify, name, data)
        try:
            return read_checkpoint(
                _contents(files, name, data, WeightsError), config, dtype, files.path(name)
            )
        finally:
            verified.result()  # of a damaged file this is the error to raise


def _read_shards(
    files: ModelFiles, index: str, folder: str, config: BertConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Read a checkpoint in several files; one error lists all that is wrong with them."""
    path = files.path(index)
    weight_map = _read_json(files, index, dict, error=WeightsError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise WeightsError(path, ["has no weight_map of tensors and files"])
    problems, shards = [], {}
    for file in dict.fromkeys(weight_map.values()):
        try:
            within = inside(file)
        except ValueError as error:
            problems.append(str(error))
            continue
        data = files.read(folder + within)
        problem = _unreadable(data)
        if problem:
            problems.append(f"{file} {problem}")
        else:
            shards[file] = data or b""
    return read_checkpoint(shards, config, dtype, path, weight_map, problems)


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
    problem = _unreadable(data)
    if problem:
        missing = error is WeightsError and data is None
        hint = "; only safetensors files are read, never pickles" if missing else ""
        raise error(files.path(name), [problem + hint])
    return data or b""


def _unreadable(data: bytes | None) -> str | None:
    """Why the contents of a file can't be used, as far as the first bytes tell."""
    if data is None:
        return "is missing"
    foreign = looks_like(data)
    return f"looks like {foreign}" if foreign else None


def _read_json(
    files: ModelFiles,
    name: str,
    kind: type[Any],
    default: dict[str, Any] | None = None,
    error: type[ConfigError | WeightsError] = ConfigError,
) -> Any:
    if default is not None and files.find(name) is None:
        return dict(default)
    data = _read(files, name, error)
    try:
        values = parse_json(data)
    except ValueError as reason:
        raise error(files.path(name), [f"is not valid JSON: {reason}"]) from reason
    if not isinstance(values, kind):
        word = "an object" if kind is dict else "a list"
        raise error(files.path(name), [f"holds {type(values).__name__}; expected {word}"])
    return values


def _check(files: ModelFiles, name: str, known: dict[str, tuple[Any, ...]]) -> None:
    """Check the fields of an optional file."""
    problems = unsupported(_read_json(files, name, dict, {}), known)
    if problems:
        raise ConfigError(files.path(name), problems)

"""An encoder -> a model folder in the sentence-transformers format.

In: an encoder, as loaded, trained or composed. Out: a folder that `folder.py` reads back with the
same bits, and that sentence-transformers loads, version 5 as well as version 6: the files have the
form of version 5, which version 6 reads too.

Nobody sees half a folder or half a file. All files are written in a folder of their own first,
beside the target. A new folder then gets its name by one rename. In a folder that exists the files
are replaced one by one, `modules.json` last, and its other files stay; a program that loads it at
that very moment can get some of the old files, each of them whole. If anything fails, the folder is
as it was. A process that is killed can leave a hidden folder that ends in `.part`, which nothing
reads and anybody may delete.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from minilm.bert import BertEmbeddings, BertFeedForward, BertLayer, BertModel, BertSelfAttention
from minilm.config import BertConfig
from minilm.disk import absolute, make_folder, sync, sync_folder, temporary_name
from minilm.errors import (
    InputError,
    InputTypeError,
    MinilmError,
    NotAFolderError,
    TokenizerError,
)  # fmt: skip
from minilm.inference.kernels import has_own_forward
from minilm.pipeline import Pipeline
from minilm.pooling import ClsPooling, MeanPooling, Normalize
from minilm.pretrained.checkpoint import published_name, published_shapes, read_unused
from minilm.pretrained.folder import POOLING_MODES, check_beside
from minilm.source import ModelFiles, record_of
from minilm.tokenizer import WordPieceTokenizer
from minilm.version import __version__

__all__ = ["foreign_parts", "read_pooler", "read_source", "save_pretrained"]

# The version of sentence-transformers whose form the files have. An older one says that it is old.
_FORM = "5.1.0"

_POOLINGS = {MeanPooling: "mean", ClsPooling: "cls"}

# What a network that we can save is made of.
_OWN_MODULES: tuple[type[nn.Module], ...] = (
    BertModel, BertEmbeddings, BertLayer, BertSelfAttention, BertFeedForward,
    nn.Linear, nn.Embedding, nn.LayerNorm, nn.Dropout, nn.ModuleList,
)  # fmt: skip


def save_pretrained(
    encoder: Pipeline,
    path: str | os.PathLike[str],
    model_name: str | None = None,
    create_model_card: bool = True,
    train_datasets: Sequence[str] | None = None,
    safe_serialization: bool = True,
) -> None:
    """Write an encoder into a folder that it can be loaded from again.

    The weights keep their dtype. Those of an encoder in bfloat16 are bfloat16 in the linear layers
    and float32 elsewhere, as it computes: loaded with `dtype="bfloat16"` it is the same again, and
    by default it computes in float32 with the rounded weights. BERT's pooler, which the embedding
    does not use, is copied from where the encoder was loaded; without it the reference warns that
    it draws one at random. `truncate_dim` is read by version 6 of the reference, and by us.

    Args:
        encoder: What to save; it is not changed.
        path: The folder. A new one is there as a whole or not at all, also when the process is
            killed or the power fails. In one that exists, files of the same names are replaced, one
            after the other: each is whole, but who reads meanwhile, or is interrupted, may have
            some of both models. Save into a new folder where that matters.
        model_name: What the model card calls the model.
        create_model_card: Write `README.md`; if not, one that is there stays.
        train_datasets: Names for the model card.
        safe_serialization: True. Only safetensors is written, never a pickle.

    Raises:
        NotAFolderError: `path` is a file.
        ConfigError: A file in the folder, which would stay, makes it another model, such as
            `adapter_config.json`.
        InputError: The encoder has no tokenizer, or something that the format has no place for:
            other modules or tensors than ours, weights that are not finite, a changed tokenizer; or
            `safe_serialization` is false.
        InputTypeError: An argument is of another type.
        OSError: The disk is full, or the folder may not be written to; it is as it was.
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise InputTypeError(f"path is {path!r}; pass the folder to write", "path")
    if not safe_serialization:
        raise InputError(
            "safe_serialization is False; pass True: only safetensors is written, never pickles",
            "safe_serialization",
        )
    if model_name is not None and not isinstance(model_name, str):
        raise InputTypeError(f"model_name is {model_name!r}; pass a string", "model_name")
    if isinstance(train_datasets, str) or not all(
        isinstance(name, str) for name in train_datasets or ()
    ):
        raise InputTypeError(
            f"train_datasets is {train_datasets!r}; pass a list of strings", "train_datasets"
        )
    target = absolute(path)
    _check_folder(target)
    check_beside(ModelFiles(str(path), str(target), target), "")
    contents = _contents(encoder)
    if create_model_card:
        card = _model_card(encoder, model_name, list(train_datasets or ()))
        contents["README.md"] = card.encode("utf-8")
    contents["modules.json"] = contents.pop("modules.json")  # last: it says what the others are
    try:
        _write(target, contents)
    except OSError as error:
        reason = error.strerror or str(error)
        kept = "nothing of it was changed" if target.exists() else "nothing was written"
        raise OSError(error.errno or errno.EIO, f"{reason}; {kept}", str(target)) from error


def foreign_parts(encoder: Pipeline) -> list[str]:
    """List what in an encoder is not ours, so that no folder or fingerprint can describe it."""
    found = [
        f"encoder.{f'bert.{name}' if name else 'bert'} is a {type(part).__name__}"
        for name, part in encoder.bert.named_modules()
        if type(part) not in _OWN_MODULES or has_own_forward(part)
    ]
    found += [
        f"encoder.bert.{name} has the {what} {value!r}, and not {expected!r} as in its config"
        for name, part in encoder.bert.named_modules()
        for what, value, expected in _settings(part, encoder.bert.config)
        if value != expected
    ]
    if type(encoder.bert) is not BertModel and not found:
        found.append(f"encoder.bert is a {type(encoder.bert).__name__}")
    if type(encoder.pooling) not in _POOLINGS:
        found.append(f"encoder.pooling is a {type(encoder.pooling).__name__}")
    if type(encoder.normalize) not in (Normalize, nn.Identity):
        found.append(f"encoder.normalize is a {type(encoder.normalize).__name__}")
    return found


def _settings(part: nn.Module, config: BertConfig) -> list[tuple[str, Any, Any]]:
    """The settings that a part computes with: name, value, and the value by the config."""
    if isinstance(part, nn.LayerNorm):
        return [("eps", part.eps, config.layer_norm_eps)]
    if isinstance(part, nn.Embedding):
        return [("max_norm", part.max_norm, None)]
    if isinstance(part, BertSelfAttention):
        return [("heads", part.heads, (config.num_attention_heads, config.head_size))]
    return []


def read_source(encoder: Pipeline) -> list[bytes]:
    """The weights file, or files, that an encoder was loaded from; none if one was changed."""
    source = encoder.source
    if source is None:
        return []
    names = [name for name in source.sha256 if name.endswith(".safetensors")]
    again = ModelFiles(source.name, source.location, source.folder, source.sha256.copy())
    try:
        found = [again.read(name) for name in names]
    except (MinilmError, OSError):  # changed
        return []
    return [] if None in found else [data or b"" for data in found]


def read_pooler(encoder: Pipeline) -> dict[str, Tensor]:
    """BERT's own pooler from the weights file, which no embedding uses; {} if it isn't there."""
    return read_unused(read_source(encoder), encoder.bert.config.hidden_size)


_WEIGHTS = "model.safetensors"


def _check_folder(target: Path) -> None:
    for place in (target, *target.parents):
        if place.is_dir():
            return
        if os.path.lexists(place):
            kind = "file" if place.exists() else "broken link"
            raise NotAFolderError(f"{place} is a {kind}, not a directory; pass another folder")


def _contents(encoder: Pipeline) -> dict[str, bytes]:
    """The files, by name."""
    problems = foreign_parts(encoder)
    if problems:
        raise InputError(
            f"{'; '.join(problems)}: the format has no place for it; only BertModel, MeanPooling "
            "or ClsPooling, and Normalize can be saved",
            "encoder",
        )
    if encoder.tokenizer is None:
        raise InputError("encoder.tokenizer is None; a folder needs one", "encoder")
    texts = list(encoder.prompts.items())
    if not all(isinstance(part, str) for pair in texts for part in pair):
        raise InputError(f"encoder.prompts is {encoder.prompts!r}; pass names and texts", "encoder")
    if encoder.default_prompt_name not in (*encoder.prompts, None):
        raise InputError(
            f"encoder.default_prompt_name is {encoder.default_prompt_name!r}; encoder.prompts has "
            f"{', '.join(map(repr, encoder.prompts)) or 'none'}",
            "encoder",
        )
    state = _tensors(encoder)
    contents = _tokenizer_files(encoder.tokenizer, encoder.max_seq_length)
    normalizes = isinstance(encoder.normalize, Normalize)
    stages = [("Transformer", ""), ("Pooling", "1_Pooling")]
    stages += [("Normalize", "2_Normalize")] if normalizes else []
    pooling = _POOLINGS[type(encoder.pooling)]
    values: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(stages)
        ],
        "config.json": {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "classifier_dropout": None,
            "initializer_range": 0.02,
            "use_cache": True,
            **asdict(encoder.bert.config),
            "dtype": _file_dtype(state),
        },
        "config_sentence_transformers.json": {
            "__version__": {
                "sentence_transformers": _FORM,
                "pytorch": str(torch.__version__),
                "minilm": __version__,
            },
            "model_type": "SentenceTransformer",
            "prompts": dict(encoder.prompts),
            "default_prompt_name": encoder.default_prompt_name,
            "similarity_fn_name": encoder.similarity_fn_name,
            **({} if encoder.truncate_dim is None else {"truncate_dim": encoder.truncate_dim}),
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": encoder.bert.config.hidden_size,
            **{name: POOLING_MODES.get(name) == pooling for name in _POOLING_FLAGS},
            "include_prompt": True,
        },
    }
    if normalizes:  # version 6 reads this, version 5 nothing
        values["2_Normalize/config.json"] = {
            "module_input_name": "sentence_embedding",
            "module_output_name": "sentence_embedding",
        }
    contents |= {name: _as_json(value) for name, value in values.items()}
    contents[_WEIGHTS] = safetensors.torch.save(state, {"format": "pt"})
    return contents


_POOLING_FLAGS = tuple(f"pooling_mode_{mode}" for mode in (
    "cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens",
    "lasttoken",
))  # fmt: skip


def _tensors(encoder: Pipeline) -> dict[str, Tensor]:
    """Copies of the weights under their published names, and the pooler, if there is one."""
    ours = encoder.bert.state_dict()
    expected = published_shapes(encoder.bert.config)
    problems = [f"{name} is missing" for name in expected if name not in ours]
    for name, tensor in ours.items():
        if name not in expected:
            problems.append(f"{name} is unexpected")
        elif tensor.shape != expected[name]:
            shape = list(expected[name])
            problems.append(f"{name} has shape {list(tensor.shape)}, the config asks for {shape}")
        elif not tensor.isfinite().all():
            problems.append(f"{name} contains NaN or infinity")
    if problems:
        raise InputError(f"encoder.bert can't be saved: {'; '.join(problems)}", "encoder")
    with torch.inference_mode(False), torch.no_grad():
        # Copies, since tied weights share memory, which the format can't express.
        state = {published_name(name): _copy(tensor) for name, tensor in ours.items()}
        pooler = read_pooler(encoder)
        return state | {
            name: _copy(tensor.to(encoder.weights_dtype)) for name, tensor in pooler.items()
        }


def _copy(tensor: Tensor) -> Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return copy.copy_(tensor.detach())


def _file_dtype(state: Mapping[str, Tensor]) -> str:
    """The dtype in `config.json`, in which version 6 of the reference computes."""
    kinds = {tensor.dtype for tensor in state.values()}
    kind = kinds.pop() if len(kinds) == 1 else torch.float32  # of bfloat16 and float32: the wider
    return str(kind).removeprefix("torch.")


def _tokenizer_files(tokenizer: WordPieceTokenizer, max_seq_length: int) -> dict[str, bytes]:
    """`tokenizer.json` and the files beside it, checked to be loaded as the same tokenizer."""
    if tokenizer.backend.encode_special_tokens:
        raise InputError(
            "encoder.tokenizer.backend has encode_special_tokens, which can't be saved; set it to "
            "False",
            "encoder",
        )
    current = tokenizer.backend.to_str()
    values = json.loads(current)
    normalizer = values["normalizer"] or {}
    parts = normalizer.get("normalizers", ())
    kinds = [part.get("type") for part in parts]
    lower_case_first = kinds == ["Lowercase", "BertNormalizer"]
    if lower_case_first:
        values["normalizer"] = normalizer = parts[1]
    words = dict.fromkeys(("unk", "sep", "pad", "cls", "mask"))
    words |= {"sep": "[SEP]", "cls": "[CLS]", "unk": values["model"].get("unk_token")}
    words["pad"] = tokenizer.backend.id_to_token(tokenizer.pad_token_id)
    if any(token["content"] == "[MASK]" for token in values["added_tokens"]):
        words["mask"] = "[MASK]"
    special = {f"{name}_token": word for name, word in words.items()}
    settings: dict[str, Any] = {
        "do_lower_case": normalizer.get("lowercase", True),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_length,
        "padding_side": "right",
        "truncation_side": "right",
        **special,
    }
    if tokenizer.second_type_id is not None:
        types = ["token_type_ids"] * tokenizer.second_type_id
        settings["model_input_names"] = ["input_ids", *types, "attention_mask"]
    # With these the reference doesn't read older files, which may be left in the folder.
    settings["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"}
        for token in values["added_tokens"]
    }
    encoded = _as_json(values)
    # The first class is built from the vocabulary, in the same way by every version of the
    # reference; the second keeps as it is written what the first can't express.
    for kind in ("BertTokenizer", "PreTrainedTokenizerFast"):
        settings["tokenizer_class"] = kind
        try:
            again = WordPieceTokenizer(
                encoded, settings=settings, lower_case_first=lower_case_first
            )
            is_same = json.loads(again.backend.to_str()) == json.loads(current)
            is_same = is_same and again.pad_token_id == tokenizer.pad_token_id
            is_same = is_same and again.second_type_id == tokenizer.second_type_id
            reason = "it would be loaded as another one"
        except TokenizerError as error:
            is_same, reason = False, "; ".join(error.problems)
        if is_same:
            break
    else:
        raise InputError(
            f"encoder.tokenizer can't be saved, since its backend was changed: {reason}", "encoder"
        )
    files = {
        "tokenizer.json": encoded,
        "tokenizer_config.json": _as_json(settings),
        "special_tokens_map.json": _as_json({k: word for k, word in special.items() if word}),
        "sentence_bert_config.json": _as_json(
            {"max_seq_length": max_seq_length, "do_lower_case": lower_case_first}
        ),
    }
    vocabulary = sorted(values["model"]["vocab"].items(), key=lambda entry: entry[1])
    # A file of one word a line can't have gaps; nothing needs it.
    if [number for _, number in vocabulary] == list(range(len(vocabulary))):
        files["vocab.txt"] = "".join(f"{word}\n" for word, _ in vocabulary).encode("utf-8")
    return files


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


# --- writing


def _write(target: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files of a folder in this order, all or none."""
    made = make_folder(target.parent)
    is_new = not target.is_dir()
    name = temporary_name(target.name)
    staging = target.with_name(name) if is_new else target / name
    try:
        staging.mkdir()
        for file, data in contents.items():
            (staging / file).parent.mkdir(exist_ok=True)
            _write_file(staging / file, data)
        inner = {Path(file).parent for file in contents}
        for folder in inner:
            sync_folder(staging / folder)
        if is_new and _becomes(staging, target):
            sync_folder(target.parent)
            return
        _replace_files(staging, target, list(contents))
        for file in contents:  # what huggingface_hub noted of the files that were there
            record_of(target, file).unlink(missing_ok=True)
        for folder in inner:
            sync_folder(target / folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in reversed(made):
            try:
                folder.rmdir()
            except OSError:  # somebody else's by now
                break
        raise
    shutil.rmtree(staging, ignore_errors=True)


def _write_file(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        sync(file)


def _becomes(staging: Path, target: Path) -> bool:
    """Rename a folder; False if there is one of that name by now."""
    try:
        staging.rename(target)
    except OSError:
        if target.is_dir():
            return False
        raise
    return True


def _replace_files(staging: Path, target: Path, files: Sequence[str]) -> None:
    """Move files over those of the same names; after an error, move the old ones back."""
    before = staging / "before"
    undo: list[Callable[[], object]] = []
    try:
        for number, file in enumerate(files):
            new, old = staging / file, target / file
            if not old.parent.is_dir():
                old.parent.mkdir()
                undo.append(old.parent.rmdir)
            if old.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{file} is a directory", str(old))
            kept = before / str(number)
            if number == len(files) - 1:  # it refers to the others
                for folder in {(target / other).parent for other in files[:-1]}:
                    sync_folder(folder)
            if os.path.lexists(old):
                before.mkdir(exist_ok=True)
                _keep(old, kept)
                if not old.is_symlink():
                    shutil.copymode(old, new)
                new.replace(old)
                undo.append(lambda kept=kept, old=old: kept.replace(old))  # type: ignore[misc]
            else:
                new.replace(old)
                undo.append(old.unlink)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _keep(old: Path, kept: Path) -> None:
    """Give a file a second name, or make a copy; its first name stays, for readers."""
    try:
        os.link(old, kept, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(old, kept, follow_symlinks=False)


# --- the model card


def _model_card(encoder: Pipeline, model_name: str | None, train_datasets: list[str]) -> str:
    from jinja2 import StrictUndefined, Template  # not at the top: only this needs it

    text = files("minilm.pretrained").joinpath("model_card.md.jinja").read_text(encoding="utf-8")
    template = Template(
        text, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    card: str = template.render(
        encoder=encoder,
        config=encoder.bert.config,
        model_name=model_name,
        train_datasets=train_datasets,
        parameters=sum(parameter.numel() for parameter in encoder.bert.parameters()),
        dtype=_file_dtype(encoder.bert.state_dict()),
        pooling=_POOLINGS[type(encoder.pooling)],
        normalizes=isinstance(encoder.normalize, Normalize),
        prompts={name: text for name, text in encoder.prompts.items() if text},
        version=__version__,
        dumps=json.dumps,
        repr=repr,
    )
    return card

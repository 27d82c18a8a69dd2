"""Text -> token ids, with the published `tokenizer.json` and the `tokenizers` library.

In: `list[str]`. Out: `Tokens`, for each text its ids, cut to the length limit, and how many there
were before the cut; `pad` makes the rectangular tensors of a batch. Next: `bert.py`.

What happens to a text (WordPiece, Devlin et al. 2018, section 3.2): control characters go, letters
become lower case and lose their accents, words are split at blanks and punctuation, and each word
into the longest pieces that the vocabulary knows. [CLS] is put in front and [SEP] behind.

Three length limits ship with this model. `tokenizer.json` says 128 (and pads everything to 128),
`tokenizer_config.json` 512, `sentence_bert_config.json` 256: the last is right. So what the file
says on truncation and padding is switched off, once, here. The limit is an argument of each call
and is applied to the ids: a tokenizer has no state that two threads could fight over.

Several files have a say in what becomes of a text: `is_built_anew` says which of them wins.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minilm.disk import parse_json
from minilm.errors import InputError, TokenizerError, errors_of_libraries
from minilm.inputs import Row, as_rows, check_positive_int, check_unicode

__all__ = ["Tokens", "WordPieceTokenizer", "is_built_anew", "read_vocabulary"]

_Entry = TypeVar("_Entry")

_GROUP = 65_536  # characters given to the library at a time

# What `tokenizer_class` may be, each also with "Fast" at its end: see `is_built_anew`.
_BUILT_ANEW = (
    "BertTokenizer",
    "ElectraTokenizer",
    "LayoutLMTokenizer",
    "LxmertTokenizer",
    "MobileBertTokenizer",
    "SqueezeBertTokenizer",
)
_AS_WRITTEN = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")

# The special tokens that settings may name, in the reference's order, and those of BertTokenizer.
_SPECIAL_TOKENS = {
    "bos_token": None,
    "eos_token": None,
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


@dataclass(frozen=True)
class Tokens:
    """What the tokenizer made of a list of texts; one entry for each text.

    Attributes:
        input_ids: The ids, [CLS] and [SEP] included, at most as many as the limit allows.
        token_counts: How many ids there were before the cut.
        offsets: For each id its (start, end) in the original text, in characters, `end` exclusive,
            (0, 0) for [CLS] and [SEP]; None unless asked for. In a pair, in the text it is of.
        token_type_ids: For each id 1 if it is of the second text of a pair, else 0; None without
            pairs.
    """

    input_ids: list[list[int]]
    token_counts: list[int]
    offsets: list[list[tuple[int, int]]] | None = None
    token_type_ids: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class WordPieceTokenizer:
    """The published tokenizer. Calling it changes nothing in it, so that threads may share it.

    Attributes:
        vocab_size: One more than the largest id that it can give.
        pad_token_id: The id that fills short rows.
        second_type_id: The type of the tokens of a pair's second text: 1, or 0 for a model that
            was trained without; None if the files don't tell.
    """

    def __init__(
        self,
        tokenizer_json: bytes | str,
        *,
        settings: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
        lower_case_first: bool = False,
        path: str | Path = "tokenizer.json",
    ) -> None:
        """Args:
            tokenizer_json: The contents of the file.
            settings: The object in `tokenizer_config.json`, `{}` for a folder without one: see
                `is_built_anew`. By default the tokenizer is what `tokenizer_json` says.
            added_tokens: The object in `added_tokens.json`, which older libraries wrote.
            lower_case_first: Lower-case every text before anything else:
                `sentence_bert_config.json`'s `do_lower_case`. When false, as in the published
                model, the published normalizer still lower-cases.
            path: What to call the file in an error.

        Raises:
            TokenizerError: The file is broken, or is not a BERT WordPiece tokenizer; or the
                settings ask for something that is not implemented.
        """
        self._backend, self.pad_token_id = _load(tokenizer_json, settings, added_tokens or {}, path)
        if lower_case_first:
            self._backend.normalizer = NormalizerSequence([Lowercase(), self._backend.normalizer])
        with _library_errors(path):
            self.second_type_id = _second_type_id(self._backend, settings)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer` that does the work. Changing it changes the model's input."""
        return self._backend

    def __getstate__(self) -> dict[str, Any]:
        # The library's own pickles leave this out, so that a copy, or a worker, would read "[MASK]"
        # in a text otherwise.
        return self.__dict__ | {"_literal": self._backend.encode_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = self.__dict__.pop("_literal", False)

    def __call__(
        self,
        texts: str | Iterable[Row],
        max_length: int | None = None,
        *,
        return_offsets: bool = False,
        argument: str = "sentences",
    ) -> Tokens:
        """Tokenize texts.

        Args:
            texts: A text, or any iterable of texts, of any Unicode: empty, blank, with control
                characters, of any length. As in the reference, a literal "[MASK]" or "[SEP]"
                becomes that special token; vertical tab, form feed and U+0085 are dropped, which
                glues the words beside them; and a word with a sign in it that the vocabulary
                lacks, as a mark newer than Unicode 8, is [UNK] as a whole. A pair of texts
                becomes [CLS] A [SEP] B [SEP].
            max_length: Ids to keep at most, [CLS] and [SEP] included, at least 3; None keeps all.
                Of a pair, the longer text is cut first, then both to half.
            return_offsets: Also give character offsets, which takes twice the time.
            argument: What to call `texts` in an error.

        Raises:
            InputTypeError: A row is not a text; the message names it.
            InputError: A text has a lone surrogate, so that it isn't Unicode text; or `max_length`
                is below 3; or there are pairs and `second_type_id` is None.
        """
        rows, _ = as_rows(texts, argument)
        return self.tokenize(rows, max_length, return_offsets=return_offsets, argument=argument)

    def tokenize(
        self,
        rows: Sequence[Row],
        max_length: int | None = None,
        *,
        return_offsets: bool = False,
        argument: str = "sentences",
    ) -> Tokens:
        """Tokenize a list of texts and pairs that `as_rows` has checked; otherwise as a call."""
        if max_length is not None and check_positive_int(max_length, "max_length") < 3:
            raise InputError(f"max_length is {max_length}; pass 3 or more", "max_length")
        pairs = [row for row, text in enumerate(rows) if not isinstance(text, str)]
        if pairs and self.second_type_id is None:
            place = f"{argument}[{pairs[0]}]"
            raise InputError(
                f"{place} is a pair, and the files of this tokenizer don't tell how to read one: "
                "tokenizer.json should make [CLS] A [SEP] B [SEP] of it, and model_input_names in "
                "tokenizer_config.json say whether there are token_type_ids",
                place,
            )
        second_type_id = self.second_type_id or 0
        firsts = [row if isinstance(row, str) else row[0] for row in rows]
        try:
            ids, offsets = self._encode(firsts, return_offsets)
            other_ids, other_offsets = self._encode([rows[row][1] for row in pairs], return_offsets)
        except (TypeError, UnicodeEncodeError):
            check_unicode(rows, argument)
            raise
        counts = [len(row) for row in ids]
        types = {}
        for number, (row, other) in enumerate(zip(pairs, other_ids, strict=True)):
            counts[row] += len(other) - 1
            keep, keep_other = _share(len(ids[row]) - 2, len(other) - 2, max_length)
            types[row] = [0] * (keep + 2) + [second_type_id] * (keep_other + 1)
            ids[row] = _pair(ids[row], other, keep, keep_other)
            if return_offsets:
                offsets[row] = _pair(offsets[row], other_offsets[number], keep, keep_other)
        for row, of_row in enumerate(ids):
            if max_length is not None and len(of_row) > max_length:
                # The last one is kept: [SEP] closes a cut text too.
                ids[row] = of_row[: max_length - 1] + of_row[-1:]
                if return_offsets:
                    offsets[row] = offsets[row][: max_length - 1] + offsets[row][-1:]
        token_type_ids = None
        if pairs:
            token_type_ids = [types.get(row, [0] * len(of_row)) for row, of_row in enumerate(ids)]
        return Tokens(ids, counts, offsets if return_offsets else None, token_type_ids)

    def _encode(
        self, texts: Sequence[str], return_offsets: bool
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Return ids and offsets, uncut. In groups, since Ctrl-C is heard between calls only."""
        backend = self._backend
        encode_batch = backend.encode_batch if return_offsets else backend.encode_batch_fast
        ids, offsets = [], []
        for group in _groups(texts):
            for encoding in encode_batch(group):
                ids.append(encoding.ids)
                if return_offsets:
                    offsets.append(encoding.offsets)
        return ids, offsets

    def pad(
        self,
        input_ids: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        token_type_ids: Sequence[Sequence[int]] | None = None,
    ) -> dict[str, Tensor]:
        """Make a batch: rows of unequal length -> rectangular tensors.

        Args:
            input_ids: At least one row.
            device: Where the tensors go.
            token_type_ids: As many rows of as many; all 0 by default.

        Returns:
            `input_ids`, `token_type_ids` and `attention_mask` (1 at real tokens, 0 at
            padding), int64 `[batch, tokens]`, as wide as the longest row.
        """
        if not input_ids:
            raise InputError("input_ids is empty; pass at least one row", "input_ids")
        integers: dict[str, Any] = {"dtype": torch.int64, "device": "cpu"}
        rows = [torch.tensor(row, **integers) for row in input_ids]
        padded = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        types = torch.zeros_like(padded)
        if token_type_ids is not None:
            type_rows = [torch.tensor(row, **integers) for row in token_type_ids]
            types = pad_sequence(type_rows, batch_first=True)
        features = {
            "input_ids": padded,
            "token_type_ids": types,
            "attention_mask": attention_mask,
        }
        return {name: tensor.to(device) for name, tensor in features.items()}

    def tokens(self, input_ids: Sequence[int]) -> list[str]:
        """Name the word pieces of ids: `[101, 7592, 102]` -> `["[CLS]", "hello", "[SEP]"]`.

        Raises:
            InputError: An id is not in the vocabulary.
        """
        pieces = []
        for position, token_id in enumerate(input_ids):
            piece = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            if piece is None:
                place = f"input_ids[{position}]"
                raise InputError(f"{place} is {token_id}: no such token", place)
            pieces.append(piece)
        return pieces


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Divide texts into groups that take the library some milliseconds each."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text) + 16
        if size > _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _share(first: int, second: int, max_length: int | None) -> tuple[int, int]:
    """Return how many tokens to keep of each text of a pair, as the library's "longest_first"."""
    if max_length is None or first + second + 3 <= max_length:
        return first, second
    room = max(max_length - 3, 0)  # for three special tokens
    shorter = min(first, second)
    if shorter + shorter > room:  # both are cut; the odd token goes to the longer one
        shorter = room // 2
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)


def _pair(
    first: list[_Entry], second: list[_Entry], keep_first: int, keep_second: int
) -> list[_Entry]:
    """Join [CLS] A [SEP] and [CLS] B [SEP] into [CLS] A [SEP] B [SEP]."""
    start, end = first[:1], first[-1:]
    return start + first[1 : 1 + keep_first] + end + second[1 : 1 + keep_second] + end


def is_built_anew(settings: Mapping[str, Any] | None) -> bool:
    """Whether `tokenizer_config.json`, and not `tokenizer.json`, says how text is read.

    This is the rule of transformers 5.

    `tokenizer_class` decides (`AutoTokenizer.from_pretrained` and
    `TokenizersBackend.convert_to_native_format` there):

    - BertTokenizer, or no class at all: a tokenizer is built anew from the vocabulary.
      `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` are those of
      `tokenizer_config.json` and have BertTokenizer's *defaults* (true, null, true) where it is
      silent; the normalizer in `tokenizer.json` has no effect on them.
    - PreTrainedTokenizerFast or TokenizersBackend: `tokenizer.json` counts as it is written, and
      those three settings count for nothing.

    transformers 4 gives the same ids, but for what BertTokenizer can't be told (`clean_text`, the
    longest word), which it leaves as written.

    Args:
        settings: The object in `tokenizer_config.json`; None for a tokenizer that is not of a
            folder, which is as written.

    Raises:
        ValueError: The class is another one.
    """
    if settings is None:
        return False
    given = settings.get("tokenizer_class")
    given = "BertTokenizer" if given is None else given
    kind = str(given).removesuffix("Fast")
    if kind not in (*_BUILT_ANEW, *_AS_WRITTEN):
        raise ValueError(
            f"tokenizer_class is {given!r} in tokenizer_config.json; supported: "
            "'BertTokenizer' and 'PreTrainedTokenizerFast'"
        )
    return kind in _BUILT_ANEW


def read_vocabulary(vocab_txt: bytes, path: str | Path = "vocab.txt") -> str:
    """Make the `tokenizer.json` that BertTokenizer makes of a vocabulary, one word a line.

    Raises:
        TokenizerError: The vocabulary is not UTF-8, or lacks a word that every text needs.
    """
    try:
        lines = vocab_txt.decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(path, [f"is not UTF-8: {error}"]) from error
    vocab = {line.rstrip(): number for number, line in enumerate(lines)}
    missing = [word for word in ("[UNK]", "[CLS]", "[SEP]") if word not in vocab]
    if missing:
        raise TokenizerError(path, [f"has no line {word}" for word in missing])
    backend = _bert(vocab, {})
    backend.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return backend.to_str()


def _bert(vocab: dict[str, int], settings: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Build BertTokenizer as transformers 5 does, without the tokens beside the vocabulary."""
    backend = tokenizers.Tokenizer(WordPiece(vocab, unk_token=_content(settings, "unk_token")))
    backend.normalizer = BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    return backend


def _content(settings: Mapping[str, Any], name: str) -> str:
    """Return a special token that must be there, and that `_problems` has looked at, as text."""
    token = settings.get(name, _SPECIAL_TOKENS[name])
    return str(token["content"] if isinstance(token, Mapping) else token)


def _token(content: str | Mapping[str, Any], **flags: Any) -> AddedToken:
    """Read an added token, as it stands in one of the files."""
    if isinstance(content, str):
        return AddedToken(content, **flags)
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(**{key: content[key] for key in known if key in content} | flags)


def _add_tokens(
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    added_tokens: Mapping[str, int],
    of_file: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Add the tokens beside the vocabulary, in the reference's order; return the problems.

    As in the reference `added_tokens_decoder` in tokenizer_config.json stands in for both other
    lists. Special tokens that no list has are added behind them.
    """
    special = {
        name: settings.get(name, default) for name, default in _special_defaults(settings).items()
    }
    extra = settings.get("extra_special_tokens") or []
    if isinstance(extra, Mapping):
        special, extra = {**special, **extra}, []
    named = [_token(token, special=True) for token in special.values() if token is not None]
    named += [_token(token, special=True) for token in extra]
    names = {token.content for token in named}
    if not extra:  # known too late to the reference: a token of this list is not taken for special
        more = settings.get("additional_special_tokens") or []
        named += [_token(token, special=True) for token in more]
    listed: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        listed = {int(key): _token(t) for key, t in settings["added_tokens_decoder"].items()}
    else:
        for content, number in added_tokens.items():
            is_special = content in names
            listed[number] = _token(content, normalized=not is_special, special=is_special)
        listed |= {token["id"]: _token(token) for token in of_file}
    before = backend.get_added_tokens_decoder().values()
    known = {token.content for token in (*listed.values(), *before)}
    backend.add_tokens([token for _, token in sorted(listed.items())])
    backend.add_tokens([token for token in named if token.content not in known])
    return [
        f"the added token {token.content!r} has the id {number}; the one that is free is "
        f"{backend.token_to_id(token.content)}"
        for number, token in sorted(listed.items())
        if backend.token_to_id(token.content) != number
    ]


def _second_type_id(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any] | None
) -> int | None:
    """Return the type of a pair's second text; None if the files don't tell.

    BertTokenizer has a way of its own; what is as written has two, one of transformers 4 and one
    of 5, where `model_input_names` is silent.
    """
    if settings is None:
        return 1
    inputs = settings.get("model_input_names")
    types = [0, 0, 0, 1, 1]
    if not is_built_anew(settings):
        encoding = backend.encode("a", "a")
        types = encoding.type_ids
        ends = [encoding.tokens[i] for i in (0, 2, 4)] if len(types) == 5 else []
        as_ours = ends == ["[CLS]", "[SEP]", "[SEP]"] and types in ([0, 0, 0, 1, 1], [0] * 5)
        if not (inputs and as_ours):
            return None
    return types[-1] if inputs is None or "token_type_ids" in inputs else 0


def _special_defaults(settings: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the names of the special tokens, also those that settings add, with their defaults."""
    own = [key for key, token in settings.items() if key.endswith("_token") and _is_token(token)]
    defaults = _SPECIAL_TOKENS if is_built_anew(settings) else dict.fromkeys(_SPECIAL_TOKENS)
    return dict.fromkeys(own) | defaults


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and "content" in value)


def _is_special(value: Any) -> bool:
    content = value.get("content") if isinstance(value, Mapping) else value
    return value is None or isinstance(content, str)


def _problems(values: Mapping[str, Any], settings: Mapping[str, Any], anew: bool) -> list[str]:
    """List what in the files is not implemented, or contradicts another file."""
    model, normalizer = values["model"], values["normalizer"] or {}
    # The oldest files don't name the type; no other one has such a field.
    old = "WordPiece" if "max_input_chars_per_word" in model else None
    kinds = {
        "model.type": (model.get("type", old), "WordPiece"),
        "normalizer.type": (normalizer.get("type"), "BertNormalizer"),
        "pre_tokenizer.type": ((values["pre_tokenizer"] or {}).get("type"), "BertPreTokenizer"),
    }
    problems = [
        f"{name} is {found!r}; supported: {supported!r}"
        for name, (found, supported) in kinds.items()
        if found != supported
    ]
    for name in ("padding", "truncation"):
        of_file = (values.get(name) or {}).get("direction", "Right")
        side = settings.get(f"{name}_side", "right")
        if side != "right":
            problems.append(f"{name}_side is {side!r} in tokenizer_config.json; supported: 'right'")
        elif f"{name}_side" not in settings and of_file != "Right":
            problems.append(f"{name}.direction is {of_file!r}; supported: 'Right'")
    inputs = settings.get("model_input_names")
    if inputs is not None and not {"input_ids", "attention_mask"} <= {*inputs}:
        problems.append(
            f"model_input_names is {inputs!r} in tokenizer_config.json; without 'attention_mask' "
            "in it padding would be read as text"
        )
    if settings.get("split_special_tokens"):
        problems.append("split_special_tokens is true in tokenizer_config.json; supported: false")
    odd = [name for name in _SPECIAL_TOKENS if not _is_special(settings.get(name))]
    problems += [
        f"{name} is {settings[name]!r} in tokenizer_config.json; pass a string, or an object with "
        'a string "content"'
        for name in odd
    ]
    if not anew:
        return problems
    problems += [
        f"{name} is {settings[name]!r} in tokenizer_config.json; pass true or false"
        for name in ("do_lower_case", "tokenize_chinese_chars", "strip_accents")
        if not isinstance(settings.get(name, True), bool)
        and not (name == "strip_accents" and settings[name] is None)
    ]
    pairs = {"unk_token": model.get("unk_token"), "cls_token": "[CLS]", "sep_token": "[SEP]"}
    problems += [
        f"{name} is {_content(settings, name)!r} in tokenizer_config.json; supported: {needed!r}"
        for name, needed in pairs.items()
        if name in settings and name not in odd and _content(settings, name) != needed
    ]
    return problems


def _library_errors(path: str | Path) -> AbstractContextManager[None]:
    return errors_of_libraries(lambda why: TokenizerError(path, [f"can't be loaded: {why}"]))


def _load(
    tokenizer_json: bytes | str,
    settings: Mapping[str, Any] | None,
    added_tokens: Mapping[str, int],
    path: str | Path,
) -> tuple[tokenizers.Tokenizer, int]:
    """Load the tokenizer, and find the id of its padding token."""
    try:
        anew = is_built_anew(settings)
        settings = settings or {}
    except ValueError as error:
        raise TokenizerError(path, [str(error)]) from error
    try:
        values = parse_json(tokenizer_json)
        problems = _problems(values, settings, anew)
        of_file = values.get("added_tokens") or []
        of_padding = (values.get("padding") or {}).get("pad_token")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(path, [f"is not the JSON of a tokenizer: {error!r}"]) from error
    if problems:
        raise TokenizerError(path, problems)
    with _library_errors(path):
        text = tokenizer_json if isinstance(tokenizer_json, str) else tokenizer_json.decode("utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()

    unknown = values["model"].get("unk_token")
    if unknown not in values["model"]["vocab"]:
        problems.append(f"the unknown token {unknown!r} is not in the vocabulary")
    else:
        with _library_errors(path):
            encoding = backend.encode("a")
        ends, ids = encoding.tokens, encoding.ids
        own = [backend.token_to_id(token) for token in ("[CLS]", "[SEP]")]
        if len(ends) != 3 or (ends[0], ends[-1]) != ("[CLS]", "[SEP]"):
            problems.append(f"'a' becomes {ends}; expected [CLS], one token, [SEP]")
        elif [ids[0], ids[-1]] != own:
            problems.append(f"adds ids {ids[0]} and {ids[-1]}; those of [CLS] and [SEP] are {own}")
    pad_token = settings.get("pad_token") or (None if anew else of_padding) or "[PAD]"
    pad_token = _content({"pad_token": pad_token}, "pad_token")
    if backend.token_to_id(pad_token) is None:
        problems.append(f"the padding token {pad_token!r} is not in the vocabulary")
    if problems:
        raise TokenizerError(path, problems)
    try:
        if anew:
            written, backend = backend, _bert(values["model"]["vocab"], settings)
            backend.post_processor = written.post_processor
        problems = _add_tokens(backend, settings, added_tokens, of_file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"the added or special tokens of its folder can't be read: {error!r}"
        raise TokenizerError(path, [message]) from error
    if problems:
        raise TokenizerError(path, problems)
    pad_token_id = backend.token_to_id(pad_token)
    assert pad_token_id is not None  # it is of the vocabulary, or was added
    return backend, pad_token_id

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
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import tokenizers
import torch
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.normalizers import Sequence as NormalizerSequence
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minilm.errors import InputError, TokenizerError
from minilm.inputs import Row, as_rows, check_positive_int, check_unicode

__all__ = ["Tokens", "WordPieceTokenizer"]

_Entry = TypeVar("_Entry")

_GROUP = 65_536  # characters given to the library at a time


@dataclass(frozen=True)
class Tokens:
    """What the tokenizer made of a list of texts; one entry for each text.

    Attributes:
        input_ids: The ids, [CLS] and [SEP] included, at most as many as the limit allows.
        token_counts: How many ids there were before the cut.
        offsets: For each id its (start, end) in the original text, in characters, `end` exclusive,
            (0, 0) for [CLS] and [SEP]; None unless asked for. In a pair, in the text it is of.
        token_type_ids: For each id 1 if it is of the second text of a pair; None without pairs.
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
    """

    def __init__(
        self,
        tokenizer_json: bytes | str,
        *,
        settings: Mapping[str, Any] | None = None,
        lower_case_first: bool = False,
        path: str | Path = "tokenizer.json",
    ) -> None:
        """Args:
            tokenizer_json: The contents of the file.
            settings: The object in `tokenizer_config.json`. As in the reference its
                `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` win over what
                `tokenizer.json` says of them.
            lower_case_first: Lower-case every text before anything else:
                `sentence_bert_config.json`'s `do_lower_case`. When false, as in the published
                model, the published normalizer still lower-cases.
            path: What to call the file in an error.

        Raises:
            TokenizerError: The file is broken, or is not a BERT WordPiece tokenizer.
        """
        settings = settings or {}
        self._backend = _load(tokenizer_json, settings, lower_case_first, path)
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        pad_token = settings.get("pad_token", "[PAD]")
        if isinstance(pad_token, Mapping):  # an AddedToken, as older libraries wrote it
            pad_token = pad_token.get("content")
        pad_token_id = self._backend.token_to_id(str(pad_token))
        if pad_token_id is None:
            raise TokenizerError(
                path, [f"the padding token {pad_token!r} is not in the vocabulary"]
            )
        self.pad_token_id = pad_token_id

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The `tokenizers.Tokenizer` that does the work. Changing it changes the model's input."""
        return self._backend

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
                becomes that special token. A pair of texts becomes [CLS] A [SEP] B [SEP].
            max_length: Ids to keep at most, [CLS] and [SEP] included, at least 3; None keeps all.
                Of a pair, the longer text is cut first, then both to half.
            return_offsets: Also give character offsets, which takes twice the time.
            argument: What to call `texts` in an error.

        Raises:
            InputTypeError: Something is no text; the message names the row.
            InputError: A text has a lone surrogate, so that it isn't Unicode text; or `max_length`
                is below 3.
        """
        rows, _ = as_rows(texts, argument)
        if max_length is not None and check_positive_int(max_length, "max_length") < 3:
            raise InputError(f"max_length is {max_length}; pass 3 or more", "max_length")
        pairs = [row for row, text in enumerate(rows) if not isinstance(text, str)]
        firsts = [row if isinstance(row, str) else row[0] for row in rows]
        try:
            ids, offsets = self._encode(firsts, return_offsets)
            other_ids, other_offsets = self._encode([rows[row][1] for row in pairs], return_offsets)
        except (TypeError, UnicodeEncodeError):
            check_unicode(rows, argument)
            raise
        counts = [len(row) for row in ids]
        second = dict(zip(pairs, range(len(pairs)), strict=True))
        token_type_ids = [[0] * count for count in counts] if pairs else None
        for row, of_row in enumerate(ids):
            if row in second:
                other = other_ids[second[row]]
                counts[row] += len(other) - 1
                keep, keep_other = _share(len(of_row) - 2, len(other) - 2, max_length)
                ids[row] = _pair(of_row, other, keep, keep_other)
                if token_type_ids is not None:
                    token_type_ids[row] = [0] * (keep + 2) + [1] * (keep_other + 1)
                if return_offsets:
                    others = other_offsets[second[row]]
                    offsets[row] = _pair(offsets[row], others, keep, keep_other)
            elif max_length is not None and counts[row] > max_length:
                # The last one is kept: [SEP] closes a cut text too.
                ids[row] = of_row[: max_length - 1] + of_row[-1:]
                if token_type_ids is not None:
                    token_type_ids[row] = [0] * max_length
                if return_offsets:
                    offsets[row] = offsets[row][: max_length - 1] + offsets[row][-1:]
        return Tokens(ids, counts, offsets if return_offsets else None, token_type_ids)

    def _encode(
        self, texts: Sequence[str], return_offsets: bool
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Ids and offsets, uncut. In groups: Ctrl-C is heard between two calls of the library."""
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
        rows = [torch.tensor(row, dtype=torch.int64) for row in input_ids]
        padded = pad_sequence(rows, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(row) for row in rows])
        attention_mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(torch.int64)
        types = torch.zeros_like(padded)
        if token_type_ids is not None:
            type_rows = [torch.tensor(row, dtype=torch.int64) for row in token_type_ids]
            types = pad_sequence(type_rows, batch_first=True)
        features = {
            "input_ids": padded,
            "token_type_ids": types,
            "attention_mask": attention_mask,
        }
        return {name: tensor.to(device) for name, tensor in features.items()}

    def tokens(self, input_ids: Sequence[int]) -> list[str]:
        """The word pieces that ids stand for: `[101, 7592, 102]` -> `["[CLS]", "hello", "[SEP]"]`.

        Raises:
            InputError: An id is not in the vocabulary.
        """
        pieces = [
            self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            for token_id in input_ids
        ]
        for position, piece in enumerate(pieces):
            if piece is None:
                place = f"input_ids[{position}]"
                raise InputError(f"{place} is {input_ids[position]}: no such token", place)
        return [piece for piece in pieces if piece is not None]


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts, so many at a time that a group takes some milliseconds."""
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
    """How many tokens to keep of the two texts of a pair: as "longest_first" of the library."""
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
    """[CLS] A [SEP] B [SEP], of [CLS] A [SEP] and [CLS] B [SEP]."""
    start, end = first[:1], first[-1:]
    return start + first[1 : 1 + keep_first] + end + second[1 : 1 + keep_second] + end


def _load(
    tokenizer_json: bytes | str,
    settings: Mapping[str, Any],
    lower_case_first: bool,
    path: str | Path,
) -> tokenizers.Tokenizer:
    try:
        values = json.loads(tokenizer_json)
        model, normalizer = values["model"], values["normalizer"] or {}
        kinds = {
            "model.type": (model.get("type"), "WordPiece"),
            "normalizer.type": (normalizer.get("type"), "BertNormalizer"),
            "pre_tokenizer.type": ((values["pre_tokenizer"] or {}).get("type"), "BertPreTokenizer"),
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TokenizerError(path, [f"is not the JSON of a tokenizer: {error!r}"]) from error
    problems = [
        f"{name} is {found!r}; supported: {supported!r}"
        for name, (found, supported) in kinds.items()
        if found != supported
    ]
    problems += [
        f"{name} is {settings[name]!r} in tokenizer_config.json; supported: 'right'"
        for name in ("padding_side", "truncation_side")
        if settings.get(name, "right") != "right"
    ]
    problems += [
        f"{name} is {settings[name]!r} in tokenizer_config.json; pass true or false"
        for name in ("do_lower_case", "tokenize_chinese_chars", "strip_accents")
        if not isinstance(settings.get(name, True), bool)
        and not (name == "strip_accents" and settings[name] is None)
    ]
    if problems:
        raise TokenizerError(path, problems)
    try:
        text = tokenizer_json if isinstance(tokenizer_json, str) else tokenizer_json.decode("utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(path, [f"can't be loaded: {error}"]) from error

    unknown = model.get("unk_token")
    if unknown not in model["vocab"]:
        problems.append(f"the unknown token {unknown!r} is not in the vocabulary")
    else:
        encoding = backend.encode("a")
        ends, ids = encoding.tokens, encoding.ids
        own = [backend.token_to_id(token) for token in ("[CLS]", "[SEP]")]
        if len(ends) != 3 or (ends[0], ends[-1]) != ("[CLS]", "[SEP]"):
            problems.append(f"'a' becomes {ends}; expected [CLS], one token, [SEP]")
        elif [ids[0], ids[-1]] != own:
            problems.append(f"adds ids {ids[0]} and {ids[-1]}; those of [CLS] and [SEP] are {own}")
    if problems:
        raise TokenizerError(path, problems)

    normalizer = {
        "clean_text": normalizer.get("clean_text", True),
        "handle_chinese_chars": settings.get(
            "tokenize_chinese_chars", normalizer.get("handle_chinese_chars", True)
        ),
        "strip_accents": settings.get("strip_accents", normalizer.get("strip_accents")),
        "lowercase": settings.get("do_lower_case", normalizer.get("lowercase", True)),
    }
    backend.normalizer = BertNormalizer(**normalizer)
    if lower_case_first:
        backend.normalizer = NormalizerSequence([Lowercase(), backend.normalizer])
    return backend

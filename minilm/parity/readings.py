"""Text -> token ids, step by step in Python, so that each step can be done in another way.

In: a tokenizer, a text, and a `Reading`: which steps are done as another program does them. Out:
token ids. Next: `mistakes.py`, which tries each way that other tokenizers are known to have.

With the `Reading` of the tokenizer itself the ids are those of the library, since what becomes of a
character is asked of the library: which ones it drops, takes for a blank, a mark or punctuation.
"""

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import normalizers
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from minilm.tokenizer import WordPieceTokenizer

__all__ = ["Reader", "Reading"]


@dataclass(frozen=True)
class Reading:
    """How a text is read. "" is this model's own way; see `mistakes.json` for the others.

    Attributes:
        ends: "nul": a NUL ends the text.
        specials: "plain": "[MASK]" in a text is a word; "any case": "[mask]" is special too.
        form: "NFKC" or "casefold" (with NFKC, and without what is ignorable) before all else.
        controls: Control characters are "blank" (all of them), "some blank" (vertical tab, form
            feed and next line), "two blank" (vertical tab and form feed), "blank, format too"
            (soft hyphens as well), "kept", or "some blank, others kept".
        formats: Characters of format, as soft hyphens and joiners, are "kept".
        blanks: What else is a blank: "ASCII" ones only, "U+0020" only, all but the "line"
            separators, which are kept, or "line dropped".
        unassigned: Characters that no table has are "dropped".
        private: Characters of private use are "kept".
        replacement: U+FFFD, which stands for bytes that were no text, is "kept".
        chinese: "whole": CJK characters are not words of their own.
        case: "kept", "sigma" (a sigma at the end of a word is a final one), "folded" (each letter,
            so that a final sigma that was written is a plain one), or "lower".
        marks: "kept", "composed" (only those of letters that are one character with their accent
            go), or "all" (spacing ones go, too).
        hangul: "composed": syllables are not taken apart; "first": only first consonants stay.
        punctuation: "ASCII" alone splits words; "not Latin-1": as ours, but « and » and the like
            are letters.
        tables: "newer": marks and punctuation that the library doesn't know are known; or only its
            "marks", or its "punctuation".
        limit: Letters in a word: "none" is too many, "bytes" are counted, or letters "before" the
            accents go.
        unknown: "half": of a word with an unknown sign the pieces before it stay; "pieces": those
            behind it, too.
        pieces: "last first": the longest pieces are taken from the end of a word.
    """

    ends: str = ""
    specials: str = ""
    form: str = ""
    controls: str = ""
    formats: str = ""
    blanks: str = ""
    unassigned: str = ""
    private: str = ""
    replacement: str = ""
    chinese: str = ""
    case: str = ""
    marks: str = ""
    hangul: str = ""
    punctuation: str = ""
    tables: str = ""
    limit: str = ""
    unknown: str = ""
    pieces: str = ""


# Control characters that some take for blanks.
_BLANK_CONTROLS = {
    "two blank": "\v\f",
    "some blank": "\v\f\x85",
    "some blank, others kept": "\v\f\x85",
}


class Reader:
    """Reads texts as one tokenizer does, or with some steps done otherwise."""

    def __init__(self, tokenizer: WordPieceTokenizer) -> None:
        backend = tokenizer.backend
        self._special = {
            token.content: number for number, token in backend.get_added_tokens_decoder().items()
        }
        self._vocabulary = backend.get_vocab(with_added_tokens=False)
        self._model = backend.model
        self._own = backend.normalizer
        # [CLS] and [SEP], around no text at all
        self._frame = backend.encode("").ids
        self._unknown = self._vocabulary.get(getattr(self._model, "unk_token", ""), -1)

    @property
    def is_able(self) -> bool:
        """Whether the tokenizer is of the kind that can be read step by step."""
        literal = getattr(self._model, "unk_token", "") in self._vocabulary
        kinds = isinstance(self._own, BertNormalizer) and isinstance(self._model, WordPiece)
        return kinds and literal and len(self._frame) == 2

    @functools.cached_property
    def _strips(self) -> bool:
        strip: bool | None = self._own.strip_accents
        return bool(self._own.lowercase if strip is None else strip)

    def ids(self, text: str, reading: Reading) -> list[int]:
        """The token ids of a text, [CLS] and [SEP] around them, uncut."""
        if reading.ends:
            text = text.split("\0")[0]
        first, last = self._frame
        ids = [first]
        for piece in self._split_at_specials(text, reading):
            ids += [piece] if isinstance(piece, int) else self._words(piece, reading)
        return [*ids, last]

    def _split_at_specials(self, text: str, reading: Reading) -> "list[str | int]":
        found: list[str | int] = [text]
        if reading.specials == "plain":
            return found
        for token, number in self._special.items():
            pieces: list[str | int] = []
            for piece in found:
                if isinstance(piece, int):
                    pieces.append(piece)
                    continue
                rest = piece
                looked = piece.lower() if reading.specials == "any case" else piece
                wanted = token.lower() if reading.specials == "any case" else token
                while len(looked) == len(rest) and (place := looked.find(wanted)) >= 0:
                    pieces += [rest[:place], number]
                    rest, looked = rest[place + len(token) :], looked[place + len(token) :]
                pieces.append(rest)
            found = pieces
        return found

    def _words(self, text: str, reading: Reading) -> list[int]:
        """The ids of a text without special tokens in it."""
        if reading.form == "NFKC":
            text = unicodedata.normalize("NFKC", text)
        elif reading.form:
            text = "".join(c for c in text if not _is_ignorable(c))
            text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        if self._own.clean_text:
            text = _mapped(text, lambda character: _cleaned(character, reading))
        if self._own.handle_chinese_chars and reading.chinese != "whole":
            text = _mapped(text, lambda c: _done("handle_chinese_chars", c))
        long: set[str] = set()
        if reading.limit == "before":
            long = {word for word in text.split() if len(word) > self._longest}
        words: list[str] = []
        parts = self._folded(text, reading, long)
        signs = {c for c in set().union(*parts) if _is_punctuation(c, reading)}
        for part in parts:
            words += _split(part, signs)
        return [number for word in words for number in self._pieces(word, reading)]

    @property
    def _longest(self) -> int:
        return int(self._model.max_input_chars_per_word)

    def _folded(self, text: str, reading: Reading, long: set[str]) -> list[str]:
        """The words between blanks, their case and marks as the reading has them."""
        found = []
        for word in _at_blanks(text, reading):
            if word in long:
                found.append("\ufffd" * (self._longest + 1))  # too long, whatever is in it
                continue
            folded = word
            if not word.isascii():
                if self._strips and reading.marks != "kept":
                    folded = _stripped(word, reading)
                if reading.hangul == "composed":
                    folded = _with_syllables(folded)
                elif reading.hangul == "first":
                    folded = re.sub("[\u1160-\u11ff]", "", folded)
            if self._own.lowercase and reading.case == "folded":
                folded = "".join(map(_case_folded, folded))
            elif self._own.lowercase and reading.case != "kept":
                is_plain = folded.isascii() or reading.case == "sigma"
                folded = folded.lower() if is_plain else "".join(map(_lower, folded))
            elif reading.case == "lower":
                folded = "".join(_lower(c) for c in folded)
            found.append(folded)
        return found

    def _pieces(self, word: str, reading: Reading) -> list[int]:
        """The ids of one word: the longest known piece, and on from its end."""
        size = len(word.encode()) if reading.limit == "bytes" else len(word)
        if reading.limit not in ("none", "before") and size > self._longest:
            return [self._unknown]
        if reading.limit == "before" and word == "\ufffd" * (self._longest + 1):
            return [self._unknown]
        if reading.pieces == "last first":
            return self._from_the_end(word)
        prefix = self._model.continuing_subword_prefix
        ids: list[int] = []
        start = 0
        while start < len(word):
            before = prefix if start else ""
            for end in range(len(word), start, -1):
                number = self._vocabulary.get(before + word[start:end])
                if number is not None:
                    ids.append(number)
                    start = end
                    break
            else:
                if reading.unknown == "half":
                    return [*ids, self._unknown]
                if reading.unknown == "pieces":
                    ids.append(self._unknown)
                    start += 1
                    continue
                return [self._unknown]
        return ids

    def _from_the_end(self, word: str) -> list[int]:
        prefix = self._model.continuing_subword_prefix
        ids: list[int] = []
        end = len(word)
        while end:
            for start in range(end):
                number = self._vocabulary.get((prefix if start else "") + word[start:end])
                if number is not None:
                    ids.append(number)
                    end = start
                    break
            else:
                return [self._unknown]
        return ids[::-1]


_STEPS = ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase")
# Each does one step alone.
_DOING = {step: BertNormalizer(**{each: each == step for each in _STEPS}) for step in _STEPS}
_NFD, _SPLIT = normalizers.NFD(), BertPreTokenizer()


@functools.lru_cache(maxsize=16384)
def _done(step: str, text: str) -> str:
    """What one step makes of a character or two."""
    return str(_DOING[step].normalize_str(text))


def _is_mark(character: str) -> bool:
    return _done("strip_accents", "a" + character) == "a"


def _lower(character: str) -> str:
    return _done("lowercase", character)


@functools.lru_cache(maxsize=4096)
def _parts(character: str) -> int:
    """Of a word with the character in it: 1 for a letter, 2 for a blank, 3 for punctuation."""
    return len(_SPLIT.pre_tokenize_str(f"a{character}b"))


def _case_folded(character: str) -> str:
    """One character for one: what would be several is in small letters."""
    folded = character.casefold()
    return folded if len(folded) == 1 else _lower(character)


def _is_ignorable(character: str) -> bool:
    """Characters without a sign of their own, which folding drops."""
    code = ord(character)
    return unicodedata.category(character) == "Cf" or 0xFE00 <= code <= 0xFE0F or code == 0x34F


def _mapped(text: str, change: Callable[[str], str]) -> str:
    """A text with each character changed; each kind of character is asked for once."""
    return text.translate({ord(character): change(character) for character in set(text)})


def _cleaned(character: str, reading: Reading) -> str:
    """What cleaning makes of one character: nothing, a blank, or itself."""
    category = unicodedata.category(character)
    if character in " \t\n\r":
        return character if reading.blanks == "U+0020" else " "
    if category == "Cc":
        some = _BLANK_CONTROLS.get(reading.controls, "")
        if character in some or reading.controls in ("blank", "blank, format too"):
            return "" if character == "\0" and some else " "
        return character if reading.controls.endswith("kept") else ""
    if category == "Cf" and reading.controls == "blank, format too":
        return " "
    if category == "Cf" and reading.formats == "kept":
        return character
    if category == "Cn" and reading.unassigned == "dropped":
        return ""
    if (category == "Co" and reading.private) or (character == "\ufffd" and reading.replacement):
        return character
    if reading.blanks and category[0] == "Z":
        if reading.blanks == "line dropped":
            return "" if category in ("Zl", "Zp") else " "
        return character if reading.blanks != "line" or category in ("Zl", "Zp") else " "
    return _done("clean_text", character)


def _at_blanks(text: str, reading: Reading) -> list[str]:
    """Split at blanks; those that a reading keeps are letters."""
    if reading.blanks == "U+0020":
        words = text.split(" ")
    elif reading.blanks in ("ASCII", "line") or reading.controls.endswith("kept"):
        words = re.split("[ \t\n\r]", text)
    else:
        words = _mapped(text, lambda c: " " if _parts(c) == 2 else c).split(" ")
    return [word for word in words if word]


def _stripped(word: str, reading: Reading) -> str:
    """A word without its accents."""
    if reading.marks == "composed":
        found = ""
        for character in word:
            taken = str(_NFD.normalize_str(character))
            is_syllable = 0xAC00 <= ord(character) < 0xD7A4
            found += character if is_syllable else taken[0] if len(taken) > 1 else character
        return found
    taken = str(_NFD.normalize_str(word))
    if reading.marks == "all":
        return "".join(c for c in taken if unicodedata.category(c)[0] != "M")
    if reading.tables in ("newer", "marks"):
        return "".join(c for c in taken if not _is_mark(c) and unicodedata.category(c) != "Mn")
    return "".join(c for c in taken if not _is_mark(c))


def _with_syllables(word: str) -> str:
    """The syllables of Hangul put together again, and nothing else."""
    return re.sub("[\u1100-\u11ff]+", lambda jamo: unicodedata.normalize("NFC", jamo[0]), word)


def _is_punctuation(character: str, reading: Reading) -> bool:
    splits = _parts(character) == 3
    if reading.tables in ("newer", "punctuation"):
        splits = splits or unicodedata.category(character)[0] == "P"
    if reading.punctuation == "ASCII":
        return splits and character.isascii()
    if reading.punctuation:
        return splits and not 0x80 <= ord(character) < 0x100
    return splits


def _split(word: str, signs: set[str]) -> list[str]:
    """A word at its punctuation."""
    if signs.isdisjoint(word):
        return [word] if word else []
    found = [""]
    for character in word:
        if character in signs:
            found += [character, ""]
        else:
            found[-1] += character
    return [piece for piece in found if piece]

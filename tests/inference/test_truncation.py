"""What was cut is said; windows cover a text; and the vectors that come of them."""

import inspect
import json
import random
import warnings

import numpy as np
import pytest

from conftest import ROOT, compose, seeded_bert
from minilm import BertConfig, MeanPooling, SentenceEncoder, WordPieceTokenizer
from minilm.errors import InputError, InputTypeError, TruncationError, TruncationWarning
from minilm.inference.truncation import kept_span, raise_if_cut, split, warn_if_cut

LONG = "The dog bites the man. A cat sees the sun! Is the man out? The dog runs. " * 3


@pytest.fixture
def tokenizer(tiny_encoder: SentenceEncoder) -> WordPieceTokenizer:
    assert tiny_encoder.tokenizer is not None
    return tiny_encoder.tokenizer


# warn_if_cut


def cut_warning(counts: list[int], kept: list[int]) -> str:
    with pytest.warns(TruncationWarning) as caught:
        warn_if_cut(counts, kept)
    assert len(caught) == 1
    return str(caught[0].message)


def test_warning_by_hand() -> None:
    # 4 of 8 and 4 of 6 were kept: 6 of 14 were not read.
    assert cut_warning([2, 8, 6], [2, 4, 4]) == (
        "2 of 3 texts were cut at 4 tokens; 43 % of their tokens were not read; first: row 1"
    )


def test_warning_groups_thousands() -> None:
    assert cut_warning([3] * 1000 + [4] * 1500, [3] * 2500) == (
        "1,500 of 2,500 texts were cut at 3 tokens; 25 % of their tokens were not read; "
        "first: row 1000"
    )


def test_no_warning_if_nothing_was_cut() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_cut([7, 2], [7, 2])
        warn_if_cut([], [])
    raise_if_cut([7, 2], [7, 2])


def test_error_names_the_rows() -> None:
    with pytest.raises(TruncationError, match="2 of 3 texts would be cut at 4 tokens") as error:
        raise_if_cut([2, 8, 6], [2, 4, 4], first_row=10)
    assert error.value.rows == [11, 12]
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("method", ["encode", "encode_query", "tokenize", "preprocess"])
def test_warning_points_at_the_caller(tiny_encoder: SentenceEncoder, method: str) -> None:
    def user() -> None:
        getattr(tiny_encoder, method)([LONG])

    with pytest.warns(TruncationWarning) as caught:
        user()
    assert [warning.filename for warning in caught] == [__file__]
    assert caught[0].lineno == inspect.getsourcelines(user)[1] + 1


# truncation=


def test_error_computes_nothing(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_encoder, "forward", None)
    with pytest.raises(TruncationError) as error:
        tiny_encoder.encode(["dog", LONG, LONG], truncation="error")
    assert error.value.rows == [1, 2]


def test_silent_gives_the_same_without_a_word(tiny_encoder: SentenceEncoder) -> None:
    with pytest.warns(TruncationWarning):
        expected = tiny_encoder.encode(["dog", LONG])
    np.testing.assert_array_equal(tiny_encoder.encode(["dog", LONG], truncation="silent"), expected)
    assert np.array_equal(tiny_encoder.encode(["dog"], truncation="error")[0], expected[0])


def test_unknown_way_is_refused(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match="truncation is 'cut'; pass one of warn, error") as error:
        tiny_encoder.encode("dog", truncation="cut")
    assert error.value.argument == "truncation"


def test_token_counts(tiny_encoder: SentenceEncoder) -> None:
    assert tiny_encoder.token_counts("the dog") == 4
    assert tiny_encoder.token_counts(["the dog", "", ("dog", "sun")]) == [4, 2, 5]
    assert tiny_encoder.token_counts([LONG]) == [2 + 3 * 22]
    assert tiny_encoder.token_counts("dog", prompt="the ") == 4


# return_report


def test_report_by_hand(tiny_encoder: SentenceEncoder) -> None:
    texts = ["dog", "  the dog sees a cat , a man , a dog and a man ", ""]
    vectors, report = tiny_encoder.encode(texts, return_report=True, truncation="silent")
    np.testing.assert_array_equal(vectors, tiny_encoder.encode(texts, truncation="silent"))
    assert report.token_counts == (3, 16, 2)
    assert report.kept_token_counts == (3, 12, 2)
    assert report.kept_spans == ((0, 3), (0, 32), (0, 0))
    assert texts[1][:32] == "  the dog sees a cat , a man , a"
    assert report.windows == (1, 1, 1)
    assert report.cut_rows == [1]
    assert len(report) == 3


def test_spans_of_pairs_and_prompts(tiny_encoder: SentenceEncoder) -> None:
    pairs = [("the dog", "a cat"), ("the dog " * 10, "a cat")]
    _, report = tiny_encoder.encode(pairs, prompt="a ", return_report=True, truncation="silent")
    assert report.kept_spans == (((0, 7), (0, 5)), ((0, 23), (0, 5)))
    _, report = tiny_encoder.encode(
        "the dog " * 10, prompt="a ", return_report=True, truncation="silent"
    )
    assert report.kept_spans == ((0, 35),)
    _, report = tiny_encoder.encode(
        "the dog", prompt="sun " * 20, return_report=True, truncation="silent"
    )
    assert report.kept_spans == ((0, 0),)


def test_kept_span_ends_behind_the_last_token() -> None:
    assert kept_span("ab cd ef", [(0, 0), (0, 2), (3, 5), (0, 0)], [], 0, True) == (0, 5)
    assert kept_span("ab cd ", [(0, 0), (0, 2), (3, 5), (0, 0)], [], 3, False) == (0, 3)


# split


def test_windows_by_hand(tokenizer: WordPieceTokenizer) -> None:
    text = "The dog bites. A cat sees the sun. Is the man out?"
    spans = split(tokenizer, text, "", 12)  # room for 10
    # 4 + 6 tokens fit; the third sentence has 5, and begins within the overlap of one.
    assert [text[start:end] for start, end in spans] == [
        "The dog bites. A cat sees the sun.",
        ". Is the man out?",
    ]


@pytest.mark.parametrize("limit", [3, 4, 5, 8, 12, 17, 24])
@pytest.mark.parametrize("prompt", ["", "the "])
def test_windows_hold_every_token_and_fit(
    tokenizer: WordPieceTokenizer, limit: int, prompt: str
) -> None:
    if limit - 2 - len(prompt.split()) < 1:
        pytest.skip("no room")
    pick = random.Random(limit)
    words = [
        "the",
        "dogs",
        "walking",
        "café",
        "[SEP]",
        "x" * 101,
        "sun.",
        "\n",
        "out!",
        "日本",
        "?",
    ]
    for _ in range(40):
        text = " ".join(pick.choices(words, k=pick.randint(0, 60)))
        spans = split(tokenizer, text, prompt, limit)
        read = set()
        for start, end in spans:
            assert tokenizer(prompt + text[start:end]).token_counts[0] <= limit
            read |= set(range(start, end))
        offsets = tokenizer(text, return_offsets=True).offsets
        assert offsets is not None
        for start, end in offsets[0]:
            assert set(range(start, end)) <= read
        assert spans[0][0] == 0
        assert spans[-1][1] == len(text)
        assert spans == sorted(spans)


def test_text_that_fits_is_one_window(tokenizer: WordPieceTokenizer) -> None:
    assert split(tokenizer, "the dog", "", 12) == [(0, 7)]
    assert split(tokenizer, "", "", 12) == [(0, 0)]
    assert split(tokenizer, " \n ", "", 12) == [(0, 3)]


# "chunk" and encode_windows


def test_chunk_is_the_weighted_mean_of_the_windows(tiny_encoder: SentenceEncoder) -> None:
    windows = tiny_encoder.encode_windows(LONG)
    assert len(windows) > 3
    for window in windows:
        assert window.text == LONG[window.start : window.end]
        assert window.token_count == tiny_encoder.token_counts(window.text)
        np.testing.assert_array_equal(window.embedding, tiny_encoder.encode(window.text))
    weights = np.array([window.token_count - 2.0 for window in windows])
    mean = weights @ np.stack([window.embedding for window in windows])
    texts = ["dog", LONG, "a cat"]
    vectors, report = tiny_encoder.encode(texts, truncation="chunk", return_report=True)
    np.testing.assert_allclose(vectors[1], mean / np.linalg.norm(mean), rtol=0, atol=2e-7)
    np.testing.assert_array_equal(vectors[[0, 2]], tiny_encoder.encode(["dog", "a cat"]))
    assert report.windows == (1, len(windows), 1)
    assert report.cut_rows == []
    assert report.kept_spans[1] == (0, len(LONG))


def test_chunk_reads_the_end(tiny_encoder: SentenceEncoder) -> None:
    other = LONG + "sun sun sun"
    one, two = tiny_encoder.encode([LONG, other], truncation="silent")
    np.testing.assert_array_equal(one, two)
    one, two = tiny_encoder.encode([LONG, other], truncation="chunk")
    assert np.abs(one - two).max() > 1e-3


def test_chunk_with_all_that_goes_with_it(tiny_encoder: SentenceEncoder) -> None:
    whole = tiny_encoder.encode(LONG, truncation="chunk", prompt="a ")
    windows = tiny_encoder.encode_windows(LONG, prompt="a ")
    np.testing.assert_array_equal(
        windows[1].embedding, tiny_encoder.encode(windows[1].text, prompt="a ")
    )
    half = tiny_encoder.encode(LONG, truncation="chunk", prompt="a ", truncate_dim=16)
    np.testing.assert_array_equal(half, whole[:16])
    mixed = tiny_encoder.encode([("dog", "cat"), LONG], truncation="chunk", prompt="a ")
    np.testing.assert_allclose(mixed[1], whole, rtol=0, atol=2e-7)
    for output_value in ("token_embeddings", None):
        with pytest.raises(InputError, match="truncation is 'chunk', which is for"):
            tiny_encoder.encode([LONG], truncation="chunk", output_value=output_value)


def test_what_has_no_windows_is_named(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputError, match=r"sentences\[1\] is a pair") as error:
        tiny_encoder.encode(["dog", ("dog", LONG)], truncation="chunk")
    assert error.value.argument == "sentences[1]"
    with pytest.raises(InputError, match="prompt has 22 tokens, of 12") as error:
        tiny_encoder.encode([LONG], truncation="chunk", prompt="sun " * 20)
    assert error.value.argument == "prompt"
    with pytest.raises(InputError, match="has a lone surrogate"):
        tiny_encoder.encode_windows("dog \ud800")
    with pytest.raises(InputTypeError, match="text is None"):
        tiny_encoder.encode_windows(None)  # type: ignore[arg-type]


def test_published_model_reads_a_long_text(encoder: SentenceEncoder) -> None:
    file = ROOT.parent / "shared" / "data" / "text" / "udhr_long.jsonl"
    if not file.is_file():
        pytest.skip(f"needs {file}")
    # Where texts are divided depends on the tokenizer alone: a tiny model behind it will do for
    # all but the English one.
    config = BertConfig(
        vocab_size=encoder.bert.config.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        max_position_embeddings=512,
    )
    of_encoder = {"tokenizer": encoder.tokenizer, "max_seq_length": encoder.max_seq_length}
    small = compose(seeded_bert(config), MeanPooling(), **of_encoder)
    for line in file.read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        reader = encoder if "Universal Declaration" in text else small
        windows = reader.encode_windows(text)
        assert max(window.token_count for window in windows) <= 256
        ends = [text[window.start : window.end].rstrip()[-1] for window in windows]
        if "Universal Declaration" in text:
            assert sum(end in ".!?;:" for end in ends) >= 0.7 * len(ends), ends

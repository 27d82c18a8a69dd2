"""The page of `minilm tour`: what it says is so, and it works in a browser.

The browser is real: Debian's chromium, headless. Where there is none, those tests are skipped.
"""

import base64
import functools
import html
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tour_browser
from torch import Tensor, nn
from tour_browser import Page

from conftest import ROOT
from minilm import ClsPooling, MeanPooling, Normalize, SentenceEncoder, cli
from minilm.errors import InputError, InputTypeError
from minilm.interpret.explain import explain, explain_deletions
from minilm.interpret.tour import MOST_TOKENS, _function, tour

A = "The weather is lovely today."
B = "It's so sunny outside!"
TWENTY = (
    "The quick brown fox jumps over the lazy dog while seven cats watch from an old warm wall",
    "Nobody at the small station knew why the late train had to stop before the wooden bridge .",
)
ODD = {
    "script": (
        "</script><b>bold</b> <!-- & &amp; \"quoted\" 'x' ${n}",
        "<script>alert(1)</script>",
    ),
    "emoji": ("I love 🍕 and 👩‍👩‍👧‍👦 very much 🇸🇪", "pizza! 🍕🍕"),
    "arabic": ("الطقس جميل اليوم", "الشمس مشرقة في الخارج!"),
    "dollars": ("$n ${n} $$ 100 %", "%s {} {{x}} \\u003c"),
    "controls": ("a\x00b \x07 \u202eright to left\u2028new", "tab\tand\nline\r\n"),
    "empty": ("", "something"),
    "both empty": ("", ""),
    "long word": ("x" * 300, "Donaudampfschifffahrtsgesellschaft unbelievably"),
}


class Reader(HTMLParser):
    """What a page says without JavaScript: its text, and the attributes of each element."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._skipped = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._skipped = tag

    def handle_endtag(self, tag: str) -> None:
        if tag == self._skipped:
            self._skipped = ""

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def data_of(page: str) -> Any:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def decoded(spec: dict[str, Any]) -> np.ndarray[Any, Any]:
    data = base64.b64decode(spec["base64"], validate=True)
    return np.frombuffer(data, dtype=np.dtype(spec["dtype"]).newbyteorder("<")).reshape(
        spec["shape"]
    )


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def expected_tensors(encoder: SentenceEncoder, a: str, b: str, page: str) -> dict[str, Any]:
    """What the page should carry, from the library itself."""
    traces = {"a": encoder.trace(a, dtype="float32"), "b": encoder.trace(b, dtype="float32")}
    expected: dict[str, Any] = {}
    for side, specs in data_of(page)["tensors"].items():
        if side == "pair":
            continue
        for name in specs:
            plain, _, part = name.partition("[")
            tensor = traces[side][plain].numpy()
            if part == "0]":
                tensor = tensor[0]
            elif part.startswith("most active"):
                order = np.argsort(-tensor, axis=1, kind="stable")[:, :12]
                values = np.take_along_axis(tensor, order, axis=1)
                tensor = order.astype(np.int32) if "unit" in part else values
            expected[f"{side}:{name}"] = tensor
    for by in ("word", "token"):
        expected[f"pair:{by}.share"] = explain(encoder, a, b, by=by).matrix
    return expected


def differing(page: str, expected: dict[str, Any]) -> list[str]:
    """The names of embedded tensors that are not what they should be, bit for bit."""
    wrong = []
    for side, specs in data_of(page)["tensors"].items():
        for name, spec in specs.items():
            if side == "pair" and not name.endswith(".share"):
                continue  # tested by their sums
            array, wanted = decoded(spec), expected[f"{side}:{name}"]
            same = array.dtype == wanted.dtype and array.shape == wanted.shape
            if not same or array.tobytes() != np.ascontiguousarray(wanted).tobytes():
                wrong.append(f"{side}:{name}")
    return wrong


@pytest.fixture(scope="module")
def made(encoder: SentenceEncoder) -> Callable[..., str]:
    """`tour` of the published model, once for each pair of texts."""
    return functools.cache(functools.partial(tour, encoder))


@pytest.fixture(scope="module")
def page(made: Callable[..., str]) -> str:
    return made(A, B)


@pytest.fixture(scope="module")
def expected(encoder: SentenceEncoder, page: str) -> dict[str, Any]:
    return expected_tensors(encoder, A, B, page)


# --- Without a browser ----------------------------------------------------------------------------


def test_page_is_one_file_with_twelve_steps(page: str) -> None:
    reader = Reader(page)
    sections = [attributes.get("id") for tag, attributes in reader.tags if tag == "section"]
    assert len(sections) == len(set(sections)) == 12
    for tag, attributes in reader.tags:
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert "url(" not in page.split('id="data"')[0]
    assert "@import" not in page
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_each_step_has_its_parts(page: str) -> None:
    sections = re.findall(r"<section.*?</section>", page, re.S)
    for section in sections:
        assert len(re.findall("<h2>", section)) == 1
        assert "<math" in section
        assert 'class="shape"' in section
        assert 'class="figure"' in section
        assert 'class="check"' in section
        assert 'class="source"' in section


def test_twenty_tokens_are_below_three_megabytes(made: Callable[..., str]) -> None:
    page = made(*TWENTY)
    data = data_of(page)
    assert [len(data["tokens"][side]) for side in "ab"] == [20, 20]
    assert data["layers"] == [0, 1, 2, 3, 4, 5]
    assert len(page.encode()) < 3_000_000


def test_embedded_values_are_those_of_the_trace(page: str, expected: dict[str, Any]) -> None:
    assert len(expected) > 70
    assert differing(page, expected) == []


@pytest.mark.parametrize(
    "name",
    ["a:layers.3.attention.probabilities", "a:length", "b:embedding", "pair:token.share"],
)
def test_one_changed_byte_is_found(page: str, expected: dict[str, Any], name: str) -> None:
    side, tensor = name.split(":")
    text = data_of(page)["tensors"][side][tensor]["base64"]
    data = bytearray(base64.b64decode(text))
    data[len(data) // 2] ^= 1
    place = page.index(text, page.index(f'"{tensor}"', page.index('id="data"')))
    changed = page[:place] + base64.b64encode(data).decode() + page[place + len(text) :]
    assert differing(changed, expected) == [name]


@pytest.mark.parametrize("by", ["word", "token"])
def test_pulls_have_the_margins_of_explain(page: str, encoder: SentenceEncoder, by: str) -> None:
    found = explain(encoder, A, B, by=by)
    pull = decoded(data_of(page)["tensors"]["pair"][f"{by}.pull"])
    np.testing.assert_allclose(pull.sum(axis=1), found.pull_a, atol=1e-12)
    np.testing.assert_allclose(pull.sum(axis=0), found.pull_b, atol=1e-12)


def test_cosines_are_those_of_the_token_vectors(page: str, encoder: SentenceEncoder) -> None:
    name = "layers.5.feed_forward_layer_norm.output"
    h, g = (encoder.trace(text, names=name, dtype="float64")[name] for text in (A, B))
    expected = torch.nn.functional.normalize(h) @ torch.nn.functional.normalize(g).T
    found = decoded(data_of(page)["tensors"]["pair"]["token.cosine"])
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-12)


def test_words_are_those_of_explain(encoder: SentenceEncoder) -> None:
    texts = ("Unbelievably, the café's Donaudampfschiff ##s sank?! [SEP] x" + "y" * 120, A)
    data = data_of(tour(encoder, *texts))
    for by in ("word", "token"):
        found = explain(encoder, *texts, by=by)
        assert data["labels"][by] == [list(labels) for labels in found.labels]
    for side, labels in zip("ab", data["labels"]["word"], strict=True):
        assert data["wordOf"][side][-1] == len(labels) - 1
    share = decoded(data["tensors"]["pair"]["token.share"])
    words = [np.eye(max(data["wordOf"][side]) + 1)[:, data["wordOf"][side]] for side in "ab"]
    by_words = decoded(data["tensors"]["pair"]["word.share"])
    np.testing.assert_allclose(words[0] @ share @ words[1].T, by_words, atol=1e-14)


def static_cells(page: str) -> list[float]:
    (table,) = re.findall(r'<table id="pair-table".*?</table>', page, re.S)
    return [number(x) for x in re.findall(r"<td data-i[^>]*>([^<]*)</td>", table)]


def test_static_cells_add_up_as_shown(page: str) -> None:
    (shown,) = re.findall(r'<output id="similarity">(.*?)</output>', page)
    assert shown == "0.6660"
    assert abs(sum(static_cells(page)) - number(shown)) < 1e-4
    parts = re.findall(r"<b>([−\d.]+)</b> %", page)
    assert len(parts) == 3
    assert sum(round(10 * number(part)) for part in parts) == 1000


@pytest.mark.parametrize("texts", [("", ""), ("good", "not good"), (A, "!?"), TWENTY])
def test_other_pairs_add_up_as_shown(
    made: Callable[..., str], encoder: SentenceEncoder, texts: tuple[str, str]
) -> None:
    page = made(*texts)
    similarity = explain(encoder, *texts).similarity
    assert abs(sum(static_cells(page)) - round(similarity, 4)) < 1e-4
    parts = re.findall(r"<b>([−\d.]+)</b> %", page)
    assert sum(round(10 * number(part)) for part in parts) == 1000


def test_quoted_source_is_the_installed_one(page: str) -> None:
    quotes = re.findall(
        r'<figure class="source" data-file="(.*?)" data-line="(\d+)">.*?<code>(.*?)</code>',
        page,
        re.S,
    )
    assert len(quotes) >= 12
    for file, line, text in quotes:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1 :]
        quoted = html.unescape(text).splitlines()
        assert quoted == textwrap.dedent("\n".join(lines[: len(quoted)])).splitlines()


# What the lines that a step quotes have to do.
QUOTED = {
    "text": ["encode_batch(", "encoding.ids"],
    "embeddings": ["self.word_embeddings(", "self.position_embeddings(", "self.layer_norm("],
    "qkv": ["self.query(", "self.key(", "self.value("],
    "cell": ["math.sqrt(", ".softmax(", "probabilities, value)"],
    "heads": ["for layer in self.layers", "layer(hidden_states"],
    "feed-forward": ["self.attention_layer_norm(", "F.gelu(", "self.feed_forward_layer_norm("],
    "path": ["hidden_states + self.attention(", "hidden_states + self.feed_forward("],
    "pooling": ["token_embeddings * mask", "mask.sum(dim=1)"],
    "length": ["F.normalize("],
    "pair": ["left @ right.T"],
    "limits": ["self.hidden_states @ self.embedding", "share - similarity * side.projection()"],
    "run": ["self.bert(", "self.pooling", "self.normalize("],
}


def test_quotes_are_of_the_code_that_they_are_about(page: str) -> None:
    sections = re.findall(r'<section[^>]* id="(.*?)"(.*?)</section>', page, re.S)
    assert [name for name, _ in sections] == list(QUOTED)
    for name, section in sections:
        codes = re.findall(r"<pre><code>(.*?)</code>", section, re.S)
        quoted = html.unescape("\n".join(codes))
        assert [part for part in QUOTED[name] if part not in quoted] == [], name
        assert not re.search(r"^ *(async )?def ", quoted, re.M), name  # what is done, and not where


def test_a_quote_whose_code_has_changed_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"as_shown has no line that begins with 'gone = '"):
        _function(as_shown, "gone = ")


def test_lines_of_python_are_true(
    page: str, encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SentenceEncoder, "from_pretrained", lambda: encoder)
    (setup,) = re.findall(r'<pre class="setup"><code>(.*?)</code>', page, re.S)
    names: dict[str, Any] = {"print": lambda *_: None}
    exec(html.unescape(setup), names)
    assert (names["a"], names["b"]) == (A, B)
    checks = re.findall(r'<figure class="check">.*?<code>(.*?)</code>', page, re.S)
    assert len(checks) == 12
    for check in checks:
        assert eval(html.unescape(check), names) in (True, np.True_), check


def test_what_it_does_not_tell_is_measured(page: str, encoder: SentenceEncoder) -> None:
    text = Reader(page).text
    deletions = explain_deletions(encoder, A, B)
    share = explain(encoder, A, B).share_a[1 + deletions.labels.index("today")]
    change = -deletions.change[deletions.labels.index("today")]
    assert change > 0
    assert f"“today” has a share of {share:+.3f}, yet deleting it raises" in text
    assert f"the similarity by {change:.3f}" in text
    assert "29%" in text


def as_shown(text: str) -> str:
    """What HTML can't hold is written as in Python."""
    control = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
    shown = control.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
    return shown or "(the empty text)"


@pytest.mark.parametrize("texts", ODD.values(), ids=ODD.keys())
def test_odd_texts_stand_there_literally(
    made: Callable[..., str], encoder: SentenceEncoder, texts: tuple[str, str]
) -> None:
    page = made(*texts)
    reader = Reader(page)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("script") == 3
    assert "alert" not in "".join(re.findall(r"<script.*?>", page))
    for text in texts:
        assert as_shown(text) in reader.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", page)
    data = data_of(page)
    assert data["tokens"]["a"] == encoder.trace(texts[0], names="tokens")["tokens"]


def test_long_texts_keep_two_layers_and_say_so(encoder: SentenceEncoder) -> None:
    long = "a dog and a cat " * 10
    page = tour(encoder, long, B)
    data = data_of(page)
    assert len(data["tokens"]["a"]) == 52
    assert data["layers"] == [0, 5]
    assert "keeps two of the 6 layers, 0 and 5" in Reader(page).text
    assert differing(page, expected_tensors(encoder, long, B, page)) == []
    assert "keeps two" not in tour(encoder, "a dog and a cat " * 7, B)


@pytest.mark.parametrize(
    ("texts", "argument"), [(("word " * 300, B), "a"), ((A, "word " * 300), "b")]
)
def test_too_long_a_text_is_refused(
    encoder: SentenceEncoder, texts: tuple[str, str], argument: str
) -> None:
    with pytest.raises(InputError, match=f"{argument} has 302 tokens; .* at most 128") as error:
        tour(encoder, *texts)
    assert error.value.argument == argument
    assert MOST_TOKENS == 128


def test_what_is_no_text_is_refused(tiny_encoder: SentenceEncoder) -> None:
    with pytest.raises(InputTypeError, match="b is None"):
        tour(tiny_encoder, "a", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="surrogate"):
        tour(tiny_encoder, "\ud800", "a")


def test_models_of_another_kind_are_refused(tiny_encoder: SentenceEncoder) -> None:
    for modules in (
        [tiny_encoder.bert, ClsPooling(), Normalize()],
        [tiny_encoder.bert, MeanPooling()],
    ):
        other = SentenceEncoder(modules=modules, tokenizer=tiny_encoder.tokenizer)
        with pytest.raises(InputError, match="must take the mean and normalize") as error:
            tour(other, "the dog", "a cat")
        assert error.value.argument == "encoder"


def test_any_model_of_the_family(tiny_encoder: SentenceEncoder) -> None:
    page = tour(tiny_encoder, "the dog walks", "a cat")
    text = Reader(page).text
    assert "Four heads × two layers" in text
    assert "[6, 32]" in text
    assert differing(page, expected_tensors(tiny_encoder, "the dog walks", "a cat", page)) == []


def test_a_device_without_float64(
    tiny_encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Apple's devices refuse: only a tensor that is on the processor may become float64."""
    plain: Any = nn.Module._apply

    def refuse(module: nn.Module, change: Callable[[Tensor], Tensor], *rest: Any) -> Any:
        if change(torch.ones(1)).dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return plain(module, change, *rest)

    expected = tour(tiny_encoder, "the dog walks", "a cat")
    monkeypatch.setattr(nn.Module, "_apply", refuse)
    assert tour(tiny_encoder, "the dog walks", "a cat") == expected


def test_unread_text_is_said(tiny_encoder: SentenceEncoder) -> None:
    with pytest.warns(UserWarning, match="cut at 12 tokens"):
        page = tour(tiny_encoder, "dog " * 30, "a cat")
    assert "20 tokens at the end of A are beyond the model’s limit" in Reader(page).text


def test_command_writes_the_page(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a tour.html"
    model = ["--model", str(tiny_folder), "--device", "cpu"]
    assert cli.main(["tour", "the dog", "a cat", "-o", str(output), *model]) == 0
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    assert output.read_text(encoding="utf-8") == tour(encoder, "the dog", "a cat")
    assert str(tiny_folder) not in output.read_text(encoding="utf-8")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{output}: " in printed.err


# --- In a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with tour_browser.browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def context(browser: Any) -> Callable[..., Any]:
    """One window for all tabs of the same width and options: the page keeps its state in the
    address, so that no test can see what another did.
    """
    return functools.cache(functools.partial(tour_browser.context, browser))


@pytest.fixture(scope="module")
def file(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tour") / "tour.html"
    path.write_text(page, encoding="utf-8")
    return path


@pytest.fixture
def opened(context: Callable[..., Any], file: Path) -> Iterator[Callable[..., Page]]:
    """Opens the page; what the browser says about it must be nothing."""
    pages = []

    def open_page(width: int = 1440, path: Path = file, **options: Any) -> Page:
        pages.append(Page(context(width, **options), path))
        pages[-1].open()
        return pages[-1]

    yield open_page
    messages = [page.messages for page in pages]
    for page in pages:
        page.tab.close()
    assert messages == [[] for _ in pages]


@pytest.fixture
def shown(opened: Callable[..., Page]) -> Page:
    """The page, 1440 wide, light."""
    return opened()


def evaluated(arithmetic: str) -> tuple[float, float, float]:
    """The left side of a line as Python computes it, the right side, and its last digit."""
    left, right = arithmetic.split(" = ")
    for ours, theirs in (("−", "-"), ("×", "*"), ("÷", "/"), ("e^", "exp")):
        left = left.replace(ours, theirs)
    left = re.sub(r"√(\d+)", r"sqrt(\1)", left)
    assert re.fullmatch(r"[\d.+\-*/() expsqrt]+", left), left
    value = eval(left, {"exp": math.exp, "sqrt": math.sqrt})
    return value, number(right), 10.0 ** -len(right.partition(".")[2])


ATTENTION = '#attention-table td[data-i="{}"][data-j="{}"]'
PAIR = '#pair-table td[data-i="{}"][data-j="{}"]'
HEAD = '#heads-table td[data-i="{}"][data-j="{}"]'
RADIO = 'input[name="{}"][value="{}"]'


def choose(shown: Page, **change: Any) -> None:
    shown.run("(change) => choose(change)", change)


def test_opens_from_disk_without_a_request_or_a_message(shown: Page) -> None:
    shown.click(ATTENTION.format(1, 2))
    shown.click(HEAD.format(2, 3))
    shown.click(PAIR.format(1, 2))
    shown.click("#count")
    shown.tab.wait_for_timeout(300)
    asked = [url for url in shown.requests if not url.startswith(("data:", "about:"))]
    assert [url.partition("#")[0] for url in asked] == [shown.url]  # and that is the page itself
    assert shown.messages == []


def test_script_decodes_the_same_bits(shown: Page, expected: dict[str, Any]) -> None:
    for key, wanted in expected.items():
        values = shown.run("([text, name]) => [...tensor(text, name).data]", key.split(":", 1))
        found = np.array(values, dtype=wanted.dtype).reshape(wanted.shape)
        assert np.array_equal(found, wanted), key


def cells_shown(shown: Page) -> list[float]:
    return [number(x) for x in shown.texts("#pair-table td[data-i]")]


def test_script_shows_what_the_page_came_with(shown: Page) -> None:
    selector = "#pair-table th, #pair-table td"
    before = shown.texts(selector)
    shown.run("() => { pairShown = ''; render(); }")
    assert shown.texts(selector) == before


@pytest.mark.parametrize("texts", [(A, B), ("Unbelievably", "The café's Donaudampfschiff!")])
@pytest.mark.parametrize("by", ["word", "token"])
def test_shown_cells_add_up_to_the_shown_similarity(
    opened: Callable[..., Page],
    made: Callable[..., str],
    encoder: SentenceEncoder,
    tmp_path: Path,
    texts: tuple[str, str],
    by: str,
) -> None:
    path = tmp_path / "tour.html"
    path.write_text(made(*texts), encoding="utf-8")
    shown = opened(path=path)
    shown.click(RADIO.format("by", by))
    similarity = number(shown.text("#similarity"))
    cells = cells_shown(shown)
    assert len(cells) == explain(encoder, *texts, by=by).matrix.size
    assert abs(sum(cells) - similarity) < 1e-4
    assert number(shown.text("#total")) == similarity
    (last,) = shown.texts("#pair-table .all")
    assert abs(number(last) - similarity) < 1e-4
    so_far = shown.texts("#pair-table tbody tr td:last-child")
    assert abs(number(so_far[-1]) - similarity) < 1e-4
    parts = re.findall(r"([−\d.]+) %", shown.text("#parts"))
    assert sum(round(10 * number(part)) for part in parts[:3]) == 1000
    assert parts[3:] == ["100"]


@pytest.mark.parametrize("by", ["word", "token"])
def test_hidden_tokens_are_one_number(shown: Page, encoder: SentenceEncoder, by: str) -> None:
    shown.click(RADIO.format("by", by))
    everything = len(cells_shown(shown))
    shown.click("#hide")
    cells = cells_shown(shown)
    assert 0 < len(cells) < everything
    inner, hidden = (number(x) for x in re.findall(r"[−\d.]+\d", shown.text("#hidden")))
    assert abs(hidden - explain(encoder, A, B).special) < 1e-5
    assert abs(sum(cells) - inner) < 1e-4
    assert abs(inner + hidden - number(shown.text("#similarity"))) < 1e-4


def test_pull_and_cosine(shown: Page, encoder: SentenceEncoder) -> None:
    shown.click(RADIO.format("show", "pull"))
    assert abs(sum(cells_shown(shown))) < 2e-4
    found = explain(encoder, A, B)
    rows = shown.texts("#pair-table tbody tr td:nth-last-child(2)")
    np.testing.assert_allclose([number(x) for x in rows], found.pull_a, atol=6e-5)
    shown.click(RADIO.format("show", "cosine"))
    assert max(cells_shown(shown)) <= 1
    assert set(shown.texts("#pair-table .sum")) == {""}
    assert "don’t add up" in shown.text("#show-note")


@pytest.mark.parametrize(
    ("cell", "panel"),
    [(ATTENTION.format(3, 5), "#cell-panel"), (PAIR.format(4, 3), "#pair-panel")],
)
def test_hover_click_tap_and_enter_say_the_same(shown: Page, cell: str, panel: str) -> None:
    before = shown.text(panel)
    shown.hover(cell)
    hovered = shown.text(panel)
    assert hovered != before
    shown.leave()
    assert shown.text(panel) == before  # it was only a preview

    shown.click(cell)
    shown.leave()
    assert shown.text(panel) == hovered
    assert shown.count(f"{cell}.chosen") == 1

    shown.open()
    assert shown.text(panel) == before
    shown.tap(cell)
    assert shown.text(panel) == hovered

    shown.open()
    shown.tab.focus(cell)
    shown.press("Enter")
    shown.run("() => document.activeElement.blur()")
    assert shown.text(panel) == hovered


def test_cell_lights_its_row_and_column(shown: Page) -> None:
    shown.click(ATTENTION.format(2, 6))
    lit = shown.run(
        "() => [...document.querySelectorAll('#attention-table td.lit')]"
        ".map((x) => [Number(x.dataset.i), Number(x.dataset.j)])"
    )
    assert sorted(lit) == sorted([i, j] for i in range(8) for j in range(8) if i == 2 or j == 6)
    assert shown.texts("#attention-table thead th.lit, #attention-table tbody th.lit") == [
        ".",
        "weather",
    ]


def test_arithmetic_evaluates_to_the_cell(shown: Page) -> None:
    for layer, head in ((0, 0), (3, 7), (5, 11)):
        choose(shown, layer=layer, head=head)
        for i, j in ((0, 0), (2, 5), (4, 7)):
            choose(shown, token=i, key=j)
            for line in shown.texts("#cell-panel .arithmetic"):
                if " = " in line:
                    value, right, digit = evaluated(line)
                    assert abs(value - right) <= digit, line
            (share,) = shown.texts('#cell-panel [data-line="share"]')
            (cell,) = shown.texts(ATTENTION.format(i, j))
            assert abs(evaluated(share)[0] - number(cell)) <= 0.6e-3
    for what in ("share", "cosine", "pull"):
        for by in ("word", "token"):
            choose(shown, show=what, by=by)
            for token, other in ((0, 0), (2, 5), (6, 7)):
                choose(shown, token=token, other=other)
                (line,) = shown.texts(f'#pair-panel [data-line="{what}"]')
                value, right, digit = evaluated(line)
                assert abs(value - right) <= digit, line
                (cell,) = shown.texts("#pair-table td.chosen")
                assert number(cell) == right


def test_recomputed_scores_are_those_of_the_trace(shown: Page, encoder: SentenceEncoder) -> None:
    trace = encoder.trace(A)
    for layer, head, token in ((0, 3, 1), (4, 10, 6)):
        found = shown.run(
            "(state) => { const x = attentionRow(state); return [x.scores, x.shares]; }",
            {"layer": layer, "head": head, "token": token},
        )
        for values, name in zip(found, ("scores", "probabilities"), strict=True):
            expected = trace[f"layers.{layer}.attention.{name}"][head, token].numpy()
            np.testing.assert_allclose(values, expected, atol=2e-5)


def test_token_is_selected_everywhere(shown: Page) -> None:
    shown.click('.chip[data-token="4"]')
    shown.leave()
    on = shown.run("() => [...document.querySelectorAll('.on')].map((x) => x.dataset.token)")
    assert on.count("4") >= 7
    assert set(on) - {"4"} <= {None}  # the row of the softmax is that of the key
    assert set(shown.texts('[data-name="token"]')) == {"lovely"}
    assert shown.count("#pair-table td.chosen[data-i='4']") == 1
    shown.click('mark[data-token="2"]')
    shown.leave()
    assert set(shown.texts('[data-name="token"]')) == {"weather"}


def test_layer_and_head_by_arrow_keys(shown: Page) -> None:
    before = shown.texts("#attention-table td")
    shown.tab.focus("#layer")
    shown.press("ArrowRight", "ArrowRight")
    shown.tab.focus("#head")
    shown.press("ArrowRight")
    assert shown.texts("#layer-number") == ["2"]
    assert shown.texts("#head-number") == ["1"]
    assert shown.texts("#attention-table td") != before
    assert shown.count(HEAD.format(2, 1) + ".chosen") == 1
    assert "layer=2" in shown.tab.url
    shown.tab.focus(HEAD.format(2, 1))
    shown.press("ArrowDown", "ArrowRight", "Enter")
    assert shown.texts("#layer-number, #head-number") == ["3", "2"]


def test_whole_tour_by_keyboard(shown: Page) -> None:
    seen: list[dict[str, Any]] = []
    for _ in range(150):
        shown.press("Tab")
        at = shown.focus()
        if at["tag"] == "BODY":
            break
        seen.append(at)
        assert at["outline"] >= 2, at  # the focus can be seen
    assert 20 < len(seen) < 60
    for table in ("attention-table", "heads-table", "pair-table"):
        assert sum(at["table"] == table for at in seen) == 1  # one stop, arrows within
    assert sum(at["name"] == "by" for at in seen) == 1
    ids = {at["id"] for at in seen} | {at["name"] for at in seen}
    assert {"layer", "head", "by", "show", "hide", "count"} <= ids
    steps = shown.run("() => [...document.querySelectorAll('section')].map((x) => '#' + x.id)")
    assert set(steps) <= {at["href"] for at in seen}
    shown.tab.focus('nav a[href="#limits"]')
    shown.press("Enter")
    assert shown.focus()["id"] == "limits"

    # In a table: arrows look, Enter stays, Escape goes back.
    shown.tab.focus("#pair-table td.chosen")
    begin, before = shown.focus(), shown.text("#pair-panel")
    shown.press("ArrowDown", "ArrowRight")
    there, looked = shown.focus(), shown.text("#pair-panel")
    assert (int(there["i"]), int(there["j"])) == (int(begin["i"]) + 1, int(begin["j"]) + 1)
    assert looked != before
    shown.press("Escape")
    assert shown.text("#pair-panel") == before
    assert shown.focus()["i"] == begin["i"]
    shown.press("ArrowDown", "ArrowRight", "Enter", "ArrowLeft", "ArrowLeft", "Escape")
    assert shown.text("#pair-panel") == looked
    assert shown.focus()["outline"] >= 2

    # The same with the tokens.
    def name() -> str:
        return shown.texts('.of [data-name="token"]')[0]

    shown.tab.focus(".chip.on")
    before = name()
    shown.press("ArrowRight")
    assert name() != before
    shown.press("Escape")
    assert name() == before
    shown.press("ArrowRight", "Enter", "Tab")
    assert name() != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 360])
def test_axe_finds_nothing_serious(
    context: Callable[..., Any], file: Path, scheme: str, width: int
) -> None:
    # What the page's policy forbids to all others it forbids to axe.
    shown = Page(context(width, color_scheme=scheme, bypass_csp=True), file)
    shown.open()
    shown.run(tour_browser.axe())
    found = shown.run("() => axe.run(document, {resultTypes: ['violations']})")
    shown.tab.close()
    assert len(found["passes"]) > 20
    bad = [
        (each["id"], each["impact"], [node["html"][:160] for node in each["nodes"][:3]])
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert bad == []


@pytest.mark.parametrize("width", [360, 768, 1440])
def test_fits_the_width(opened: Callable[..., Page], width: int) -> None:
    shown = opened(width)
    for by in ("word", "token"):
        choose(shown, by=by)
        assert shown.run("() => document.documentElement.scrollWidth") <= width
        assert shown.run("() => document.body.scrollWidth") <= width
        small = shown.run(
            """() => {
              const targets = 'button, nav a, input, td[data-i], mark, tr[data-token] > th';
              return [...document.querySelectorAll(targets)].map((x) => {
                const place = x.matches('.radios input') ? x.parentElement : x;
                const { width, height } = place.getBoundingClientRect();
                return [x.outerHTML.slice(0, 80), width, height];
              }).filter(([_, width, height]) => width < 24 || height < 24);
            }"""
        )
        assert small == []


def test_colours_follow_the_preference(shown: Page) -> None:
    def colours() -> list[Any]:
        found: list[Any] = shown.run(
            """() => {
              const canvas = document.querySelector('[data-strip="word"] canvas');
              return [getComputedStyle(document.body).backgroundColor,
                      canvas.toDataURL()];
            }"""
        )
        return found

    light = colours()
    shown.tab.emulate_media(color_scheme="dark")
    for _ in range(600):  # soon; the drawings too, without a reload
        dark = colours()
        if light[0] != dark[0] and light[1] != dark[1]:
            break
        shown.tab.wait_for_timeout(50)
    assert light[0] != dark[0]
    assert light[1] != dark[1]


def test_reduced_motion_moves_nothing(shown: Page, opened: Callable[..., Page]) -> None:
    behaviour = "() => getComputedStyle(document.documentElement).scrollBehavior"
    assert shown.run(behaviour) == "smooth"
    still = opened(reduced_motion="reduce")
    assert still.run(behaviour) == "auto"
    still.click("#count")
    assert still.text("#total") == still.text("#similarity")
    assert still.count("td.counted") == 0


def test_counts_up_to_the_similarity(shown: Page) -> None:
    shown.tab.clock.install()  # of the page, which goes on when it is told to
    shown.open()
    similarity = number(shown.text("#similarity"))
    cells = len(cells_shown(shown))
    shown.click("#count")
    counted = []
    for _ in range(4):
        shown.tab.clock.run_for(500)
        counted.append(shown.count("td.counted"))
    assert 0 < counted[0] < counted[1] < counted[2] < counted[3] < cells
    assert number(shown.text("#total")) != similarity
    shown.tab.clock.run_for(1000)
    assert number(shown.text("#total")) == similarity
    assert shown.count("td.counted") == 0


@pytest.mark.parametrize("width", [1440, 360])
def test_nothing_shifts(opened: Callable[..., Page], file: Path, width: int) -> None:
    shown = opened(width)
    shown.tab.add_init_script(
        """
        window.shifts = [];
        const name = ({ node }) => (node ? node.outerHTML || node.textContent : '').slice(0, 90);
        const note = (entry) =>
          shifts.push([entry.hadRecentInput, entry.value, ...entry.sources.map(name)]);
        new PerformanceObserver((list) => list.getEntries().forEach(note))
          .observe({ type: 'layout-shift', buffered: true });
        """
    )
    shown.open()
    shown.tab.wait_for_timeout(500)
    assert shown.run("() => shifts") == []
    # The measure leaves out what comes right after an input; here that is counted too.
    for selector in (
        PAIR.format(3, 4),
        PAIR.format(6, 2),
        RADIO.format("show", "pull"),
        RADIO.format("by", "token"),
        ATTENTION.format(7, 1),
        HEAD.format(4, 6),
        "#pool-table tr[data-token='6'] th",
        ".chip[data-token='4']",
    ):
        shown.click(selector)
        shown.leave()
        shown.tab.wait_for_timeout(150)
        assert shown.run("() => shifts") == [], selector
    # A table without some of its rows has its sums further up, but nothing else has moved.
    shown.click("#hide")
    shown.tab.wait_for_timeout(150)
    found = shown.run("() => shifts")
    assert all(recent and moved.startswith("<tfoot>") for recent, _, moved in found)


def test_finished_without_javascript(opened: Callable[..., Page]) -> None:
    shown = opened(java_script_enabled=False)
    text = shown.text("body")
    for part in (A, B, "0.6660", "Three tables add up", "minilm/bert.py, line"):
        assert part in text
    boxes = [each.bounding_box() for each in shown.tab.locator("math").all()]
    assert len(boxes) >= 12
    assert min(box["height"] for box in boxes) > 10
    assert abs(sum(cells_shown(shown)) - 0.6660) < 1e-4
    assert shown.tab.locator(PAIR.format(7, 8)).is_visible()
    assert not any(each.is_visible() for each in shown.tab.locator(".needs-js, canvas").all())


@pytest.mark.parametrize("name", ODD.keys())
def test_odd_texts_in_a_browser(
    opened: Callable[..., Page], made: Callable[..., str], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "odd.html"
    path.write_text(made(*ODD[name]), encoding="utf-8")
    shown = opened(360, path)
    for side, text in zip("ab", ODD[name], strict=True):
        assert shown.texts(f".text.{side} p") == [as_shown(text)]
    assert shown.run("() => document.documentElement.scrollWidth") <= 360
    assert shown.count("script") == 3
    for by in ("token", "word"):
        choose(shown, by=by)
        assert abs(sum(cells_shown(shown)) - number(shown.text("#similarity"))) < 1e-4


def test_reload_restores_the_state(shown: Page) -> None:
    shown.click(ATTENTION.format(5, 1))
    shown.click(HEAD.format(3, 9))
    shown.click(RADIO.format("by", "token"))
    shown.click(RADIO.format("show", "pull"))
    shown.click("#hide")
    shown.click(PAIR.format(5, 4))
    shown.leave()

    def state() -> list[Any]:
        panels = ("#cell-panel", "#pair-panel", "#hidden")
        tables = ("#pair-table td", "#attention-table td")
        return [
            shown.run("() => ({...chosen})"),
            *map(shown.text, panels),
            *map(shown.texts, tables),
        ]

    before = state()
    assert before[0] == {
        "token": 5, "key": 1, "other": 4, "layer": 3, "head": 9,
        "by": "token", "show": "pull", "hide": 1,
    }  # fmt: skip
    address = shown.tab.url
    assert "#pair&" in address
    shown.tab.reload()
    assert shown.tab.url == address
    assert state() == before
    shown.open("#" + address.partition("#")[2])  # and as a link that somebody sent
    assert state() == before
    top = shown.run("() => document.querySelector('#pair').getBoundingClientRect().top")
    assert 0 <= top < 200
    # What can't be is left out.
    shown.open("#cell&token=999&layer=x&nonsense=1&by=%3Cb%3E&head=-1")
    assert shown.run("() => JSON.stringify(chosen) === JSON.stringify(defaults)")

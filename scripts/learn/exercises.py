"""Eight exercises: find out by trying how a sentence encoder works, and check your answer.

    python scripts/learn/exercises.py                  # the list
    python scripts/learn/exercises.py 3                # one of them
    python scripts/learn/exercises.py 3 --answer 0.42  # right? Exit status 0 if so, 1 if not
    python scripts/learn/exercises.py 3 --solution     # worked out, run on the published weights

Each asks one question and says which command to begin with. Numbers may be rounded to three digits.
"""

import argparse
import copy
import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from minilm import BertLayer, SentenceEncoder, bert, cos_sim  # noqa: E402
from minilm.errors import MinilmError  # noqa: E402
from minilm.interpret.explain import explain_deletions  # noqa: E402
from minilm.pretrained import hub  # noqa: E402

WEATHER = "The weather is lovely today."
SUNNY = "It's so sunny outside!"


# --- Solutions: each is given the published model, prints what it finds, and returns the answer ---


def cosine_is_not_contribution(encoder: SentenceEncoder) -> str:
    """Rank the pairs of tokens twice."""
    a, b = (encoder.trace(text, dtype="float64") for text in (WEATHER, SUNNY))
    last = "layers.5.feed_forward_layer_norm.output"
    cosines = cos_sim(a[last], b[last])  # [tokens of a, tokens of b]
    cells = torch.from_numpy(encoder.explain(WEATHER, SUNNY, by="token").matrix)
    leaders = []
    for name, table in (("cosine", cosines), ("cell", cells)):
        for place in table.flatten().argsort(descending=True)[:5].tolist():
            i, j = divmod(place, len(b["tokens"]))
            leaders.append(f"{a['tokens'][i]} {b['tokens'][j]}")
            print(f"by {name:<7} {table[i, j]:.4f}  {leaders[-1]}")
    return leaders[0]


def share_is_not_cause(encoder: SentenceEncoder) -> float:
    """What "today" adds to the sum, and what is missing without it."""
    explanation = encoder.explain(WEATHER, SUNNY)
    print(f"share  {explanation.share_a[explanation.labels[0].index('today')]:+.4f}")
    deletions = explain_deletions(encoder, WEATHER, SUNNY)
    print(deletions)
    without = deletions.without[deletions.labels.index("today")]
    return float(without - deletions.similarity)


def one_head_by_hand(encoder: SentenceEncoder) -> float:
    """Queries, keys and values of one head, and four lines."""
    trace = encoder.trace(WEATHER, dtype="float64")
    layer, head = 0, 4
    query, key, value = (  # [tokens, 32] each
        trace[f"layers.{layer}.attention.{name}"][:, head] for name in ("query", "key", "value")
    )
    scores = query @ key.T / math.sqrt(32)  # [tokens, tokens]
    powers = scores.exp()
    probabilities = powers / powers.sum(dim=1, keepdim=True)  # each row has the sum 1
    context = probabilities @ value  # [tokens, 32]
    row = trace["tokens"].index("weather")
    for token, probability in zip(trace["tokens"], probabilities[row].tolist(), strict=True):
        print(f"weather -> {token:<8} {probability:.4f}")
    error = (context - trace[f"layers.{layer}.attention.context"][:, head]).abs().max()
    print(f"context: differs from the model's by {error:.1e}")
    return float(probabilities[row].max())


def post_norm_is_not_pre_norm(encoder: SentenceEncoder) -> float:
    """The same weights in the order of most later models."""

    def pre_norm(layer: BertLayer, x: Tensor, attend: bert.Attend) -> Tensor:
        x = x + layer.attention(layer.attention_layer_norm(x), attend)
        x = x + layer.feed_forward(layer.feed_forward_layer_norm(x))
        return x

    post = encoder.encode(WEATHER, convert_to_tensor=True)
    with mock.patch.object(BertLayer, "forward", pre_norm):
        pre = encoder.encode(WEATHER, convert_to_tensor=True)
    return float(post @ pre)


def the_mask(encoder: SentenceEncoder) -> float:
    """Padding to 128 tokens, with the mask and without."""
    input_ids = encoder.tokenize(WEATHER)["input_ids"]  # [1, 8]
    padded = F.pad(input_ids, (0, 120))  # [1, 128]; [PAD] is number 0
    masks = {
        "no padding": (input_ids, torch.ones_like(input_ids)),
        "masked": (padded, (padded != 0).long()),
        "not masked": (padded, torch.ones_like(padded)),
    }
    with torch.no_grad():
        vectors = [
            encoder({"input_ids": ids, "attention_mask": mask})["sentence_embedding"][0]
            for ids, mask in masks.values()
        ]
    for name, vector in zip(masks, vectors, strict=True):
        print(f"{name:<11} cosine {vector @ vectors[0]:.4f}")
    return float(vectors[2] @ vectors[0])


def erf_or_tanh(encoder: SentenceEncoder) -> float:
    """The approximation that GPT-2 took, in place of what BERT was trained with."""
    exact = encoder.trace(WEATHER, dtype="float64")
    with mock.patch.object(F, "gelu", partial(F.gelu, approximate="tanh")):
        approximate = encoder.trace(WEATHER, dtype="float64")
    for number in range(6):
        name = f"layers.{number}.feed_forward_layer_norm.output"
        print(f"{name}  {(approximate[name] - exact[name]).abs().max():.2e}")
    return float((approximate["embedding"] - exact["embedding"]).abs().max())


def word_order(encoder: SentenceEncoder) -> float:
    """Who bites whom is in the position table alone."""
    sentences = ["dog bites man", "man bites dog"]
    a, b = encoder.encode(sentences, convert_to_tensor=True)
    print(f"as it is                       {a @ b:.4f}")
    blind = copy.deepcopy(encoder).to(torch.float64)
    with torch.no_grad():
        blind.bert.embeddings.position_embeddings.weight.zero_()
    c, d = blind.encode(sentences, convert_to_tensor=True)
    print(f"with the position table zeroed {c @ d:.15f}")
    return float(a @ b)


def a_line_less(encoder: SentenceEncoder) -> str:
    """Attention without its division, and what the trace and its check say."""
    source = inspect.getsource(bert.attention)
    scope = dict(vars(bert))
    exec(source.replace(" / math.sqrt(query.shape[-1])", ""), scope)
    right = encoder.trace(WEATHER, dtype="float64")
    with mock.patch.object(bert, "attention", scope["attention"]):
        wrong = encoder.trace(WEATHER, dtype="float64")
    numbers = [name for name in right if name != "tokens"]
    changed = [name for name in numbers if not torch.equal(right[name], wrong[name])]
    print(f"{len(changed)} of {len(numbers)} change; the first: {', '.join(changed[:3])}, ...")
    errors = wrong.check()
    print(f"check: {', '.join(name for name, error in errors.items() if error > 1e-9)}")
    return changed[0]


# --- Questions ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exercise:
    """One question.

    Attributes:
        title: In a few words.
        read: Where in the package it is answered.
        question: What to find out.
        command: What to begin with: a command line, or lines of Python.
        answer: A number, or words.
        lesson: What it shows.
        solve: The worked solution.
    """

    title: str
    read: str
    question: str
    command: str
    answer: float | str
    lesson: str
    solve: Callable[[SentenceEncoder], float | str]

    def accepts(self, answer: str) -> bool:
        """Whether an answer is right; numbers to three digits, words without their punctuation."""
        if isinstance(self.answer, str):
            return _words(answer) == _words(self.answer)
        try:
            number = float(answer.replace("−", "-").replace(",", "."))
        except ValueError:
            return False
        # Half of the third digit, and a little.
        size = 10.0 ** (math.floor(math.log10(abs(self.answer))) - 2)
        return abs(number - self.answer) <= 0.6 * size


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


_BOTH = f'"{WEATHER}" "{SUNNY}"'
_ENCODER = f"""\
from minilm import SentenceEncoder
encoder = SentenceEncoder.from_pretrained()
trace = encoder.trace("{WEATHER}", dtype="float64")
"""

EXERCISES = [
    Exercise(
        "Cosine is not contribution",
        "minilm/interpret/explain.py, explain",
        f"Take {_BOTH}. Rank the pairs of their tokens by the cosine of the token vectors "
        "(layers.5.feed_forward_layer_norm.output of the trace), and by their cell in the table. "
        "Which pair leads by cosine? Answer with the two tokens.",
        f"minilm explain {_BOTH} --by token",
        "[CLS] [CLS]",
        "The vectors of two tokens can be alike and add little: a cell is a dot product, so that "
        "the lengths count as well. A picture of cosines does not show the similarity.",
        cosine_is_not_contribution,
    ),
    Exercise(
        "Share is not cause",
        "minilm/interpret/explain.py, explain_deletions",
        f'In {_BOTH} the word "today" has a share of +0.081. By how much does the similarity '
        'change when "today" is deleted from the first sentence? Guess before you try.',
        'minilm similarity "The weather is lovely today." "The weather is lovely ." '
        '"It\'s so sunny outside!"',
        0.0386,
        "The share says where the sum comes from, not what would be without the word: without it "
        "all other token vectors are others, too.",
        share_is_not_cause,
    ),
    Exercise(
        "One attention head by hand",
        "minilm/bert.py, attention",
        f'In "{WEATHER}", layer 0, head 4 (both counted from 0): compute from the query and the '
        'keys how much attention "weather" pays to each token. What is the largest probability?',
        f'{_ENCODER}query = trace["layers.0.attention.query"][:, 4]  # [tokens, 32]\n'
        'key = trace["layers.0.attention.key"][:, 4]\n',
        0.5173,
        "Attention is four lines: scores, powers, shares, a weighted mean.",
        one_head_by_hand,
    ),
    Exercise(
        "Post-norm is not pre-norm",
        "minilm/bert.py, BertLayer",
        "Most later models put the norm before the sublayer: x + Sublayer(LayerNorm(x)). Change "
        f'the two statements of BertLayer.forward so, and encode "{WEATHER}". What is the cosine '
        "between the vectors before and after the change?",
        'python -c "import inspect, minilm; print(inspect.getsource(minilm.BertLayer))"',
        0.0977,
        "The weights fit, no error is raised, and what comes out is another vector: nothing but a "
        "comparison of numbers finds such a mistake.",
        post_norm_is_not_pre_norm,
    ),
    Exercise(
        "The mask",
        "minilm/bert.py, attention; minilm/pooling.py, MeanPooling",
        f'Pad "{WEATHER}" to 128 tokens, as tokenizer.json says, with an attention mask of 1 '
        "everywhere. What is the cosine between that vector and the right one?",
        "from minilm import SentenceEncoder\nencoder = SentenceEncoder.from_pretrained()\n"
        f'features = encoder.tokenize("{WEATHER}")  # input_ids, attention_mask\n'
        'vector = encoder(features)["sentence_embedding"][0]\n',
        0.3176,
        "Padding is not empty: its tokens are attended to and averaged like all others unless the "
        "mask says so in both places. With it, the vector is the same at any length.",
        the_mask,
    ),
    Exercise(
        "erf or tanh",
        "minilm/bert.py, BertFeedForward",
        f'GELU has a popular approximation: F.gelu(x, approximate="tanh"). With it, by how much '
        f'does the vector of "{WEATHER}" change, in its most changed number?',
        f"{_ENCODER}import torch.nn.functional as F\n"
        'x = trace["layers.0.feed_forward.intermediate"]\n'
        'print((F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max())\n',
        1.75e-4,
        "A thousand times the rounding of float32, and far too small to be seen in a ranking: only "
        "a comparison of numbers finds it.",
        erf_or_tanh,
    ),
    Exercise(
        "Word order",
        "minilm/bert.py, BertEmbeddings",
        'How similar are "dog bites man" and "man bites dog"? And what would the similarity be if '
        "all rows of the position table were 0? Answer with the first number.",
        'minilm similarity "dog bites man" "man bites dog"',
        0.9072,
        "Without positions the similarity is 1: attention and mean don't know any order, and the "
        "position table is the only place where it comes from.",
        word_order,
    ),
    Exercise(
        "From scratch: a line less",
        "minilm/bert.py, attention; scripts/learn/from_scratch.py; Trace.check in minilm/interpret/trace.py",  # noqa: E501
        f'Delete the division by math.sqrt(query.shape[-1]) in attention and trace "{WEATHER}". '
        "Which is the first number of the trace that changes, in the order of execution? Answer "
        "with its name. Then look at what check() reports, and say why that is less.",
        f"{_ENCODER}print(trace)\nprint(trace.check())\n",
        "layers.0.attention.scores",
        "All that comes after a mistake is changed by it. check() makes each number again from its "
        "own parents, and so names the mistake itself: the scores, once in each layer.",
        a_line_less,
    ),
]


def main(arguments: list[str] | None = None) -> int:
    """Print what was asked for; the exit status says whether an answer was right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = range(1, len(EXERCISES) + 1)
    parser.add_argument("number", nargs="?", type=int, choices=numbers, help="which exercise")
    parser.add_argument("--answer", metavar="X", help="check an answer")
    parser.add_argument("--solution", action="store_true", help="work it out on the model")
    parser.add_argument(
        "--model", default=hub.DEFAULT_MODEL, metavar="FOLDER", help="where the model is"
    )
    options = parser.parse_args(arguments)
    if options.number is None:
        if options.solution or options.answer is not None:
            parser.error("say which exercise")
        for number, exercise in enumerate(EXERCISES, 1):
            print(f"{number}  {exercise.title:<28} {exercise.read}")
        return 0
    exercise = EXERCISES[options.number - 1]
    if options.answer is not None:
        right = exercise.accepts(options.answer)
        print(f"Right. {exercise.lesson}" if right else "No, it is something else.")
        return 0 if right else 1
    print(_asked(options.number, exercise))
    if options.solution:
        try:
            encoder = SentenceEncoder.from_pretrained(options.model, device="cpu")
        except (MinilmError, OSError) as error:
            print(f"exercises: {error}", file=sys.stderr)
            return 1
        print(f"\n{textwrap.indent(inspect.getsource(exercise.solve), '    ')}")
        answer = exercise.solve(encoder)
        shown = answer if isinstance(answer, str) else f"{answer:.4g}"
        print(f"\nAnswer: {shown}\n{_wrapped(exercise.lesson)}")
        return 0 if exercise.accepts(shown) else 1
    return 0


def _asked(number: int, exercise: Exercise) -> str:
    """The question and where to begin."""
    return "\n\n".join(
        [
            f"{number}. {exercise.title}",
            _wrapped(exercise.question),
            f"Read: {exercise.read}",
            f"Begin with:\n\n{textwrap.indent(exercise.command.strip(), '    ')}",
            f"Check: python scripts/learn/exercises.py {number} --answer ...",
        ]
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())

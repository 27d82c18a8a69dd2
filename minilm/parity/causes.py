"""Why does another implementation give other vectors? Each usual mistake is made, and compared.

In: an encoder, texts, and the vectors that another program gave for them. Out: a `Diagnosis`: how
far they are from ours, and which mistake makes ours equal to them.

People run this model in many languages, and nearly always one of a few things goes wrong: text cut
elsewhere, padding that is attended or averaged, another pooling, a detail of the arithmetic, fewer
bits. So all of them are made (`mistakes.py`). The one whose vectors are the foreign ones but for
rounding is the cause; if there are two, they are named together, with the texts that would tell
them apart. A second and a third mistake on top of the first are found in the same way.

Where several texts are equal to rounding, the arithmetic is right, and the others were read
otherwise: then the ways in which other tokenizers read are tried, as many as it takes, since each
shows in texts of its own.

Fewer bits can't be reproduced exactly, since rounding depends on the order of the operations. But
rounding the weights alike makes errors that point in the same directions: their correlation with
the foreign errors tells float16, bfloat16 and int8 apart, and from all else.

Directions and lengths are compared apart: the lengths show whether vectors were normalized, and the
directions what else is different.
"""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from minilm import inputs
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError
from minilm.parity.ids import choose_readings
from minilm.parity.mistakes import Cause, Variant, VariantRunner, causes_for, settings_of
from minilm.quantize import precision_of_bits
from minilm.report import aligned, jsonable, shortened
from minilm.similarity import Embeddings
from minilm.vectors import as_matrix

__all__ = ["Candidate", "Diagnosis", "TextDifference", "decimals", "diagnose", "short_form"]

# Two right implementations in float32 differ by up to 4e-7 on one processor and 1e-6 on others; the
# smallest mistake that is tried, an epsilon of 1e-6, moves some text of a few by 1e-5.
_ROUNDING = 2e-6
_SCALED = 1.25  # rounding the numbers of a vector changes its length too
_FLOOR = 3e-7  # smaller differences carry no information
_MOSTLY = 1 / 3  # one that leaves less than this, and less than half of any other, mostly is it
_CLEAR = 0.1  # a cause that leaves less of the difference than this is named
_HELPS = 0.1  # orders of magnitude, over all texts, by which a first mistake must help for a second
_MOST = 0.5  # a cause that explains a larger share of the texts that differ is named too
_TIE = 2.0  # causes within this factor of the best are named together
_CORRELATION = 0.4  # of errors by fewer bits: 0.58 to 0.71 if they are the cause, else up to 0.24
_SIZES = (0.4, 3.0)  # how many times as large as ours these errors may be
_ANOTHER_MODEL = 0.6  # the median cosine below which nothing but another model is left
_PADDED = 3  # texts on which mistakes about padding are tried first: they cost the most
_SCREENED = 12  # texts on which those of the arithmetic are tried first
_BEST = 3  # mistakes of a kind that are tried on all texts
_WITHIN = 0.5  # orders of magnitude by which they may be behind the best
_STEPS = 3  # mistakes of the arithmetic, each of which must help
_RIGHT = 0.15  # the share of texts, equal to rounding, that shows the arithmetic to be right
_FAR = 1e-3  # a text that was read otherwise is farther off than this
_COARSE = 4.0  # times the usual difference: what fewer bits may leave of a text
_COMPANY = 1e-4  # by which vectors of one text in different batches differ if they depend on it
_ALIKE = 8.0  # errors of like size: the largest of a text is at most so many times the smallest
_EIGHT_BITS = (0.02, 0.8)  # the size of such errors, of vectors of length 1
_ENOUGH, _OFTEN = 8, 0.75  # texts to tell such errors by, and the share in which they are alike
_WEAK = 0.08  # the correlation that errors by rounding to 8 bits have, whatever the scales are

_NOT_NORMALIZED = Cause("no normalization", "divide each vector by its length")
_NORMALIZED = Cause("normalized, where this model isn't", "leave the vectors their length")
_OTHER_LENGTHS = Cause("other lengths", "divide each vector by its length")
_ANOTHER_ORDER = Cause("rows in another order", "write the vectors in the order of the texts")
_NO_NUMBER = Cause(
    "NaN or infinity", "look for a division by 0 (no real token, a zero vector), or float16"
)
_OTHER = Cause(
    "another model", "compare the weights' SHA-256; or an error of the architecture: --golden"
)
_COMPANY_CAUSE = Cause(
    "the vector of a text depends on its company",
    "embed each text alone to see: int8 with scales of the batch does it, and so does a mask that "
    "isn't used",
)
_BATCH_SCALES = Cause(
    "rounded to 8 bits, with scales of the batch",
    "it computes with 8 bits, which is no mistake, and takes the scales from the texts at hand; "
    "compare in float32 to be sure",
)
_READ_OTHERWISE = Cause(
    "texts that were read otherwise", "compare the token ids of these rows: --against-ids"
)
_UNKNOWN = Cause("none of the known causes", "compare stage by stage: minilm parity --golden DIR")


@dataclass(frozen=True)
class TextDifference:
    """How far apart the two vectors of one text are.

    Attributes:
        row: The number of the text, from 0.
        text: The text.
        tokens: How many tokens it has, before any cut.
        max_abs: The largest difference of two numbers; infinite if one is not finite.
        cosine: The cosine of the vectors.
        unit_max_abs: As `max_abs`, of the vectors scaled to length 1.
    """

    row: int
    text: str
    tokens: int
    max_abs: float
    cosine: float
    unit_max_abs: float


@dataclass(frozen=True)
class Candidate:
    """Mistakes that were made together, and how near they come.

    Attributes:
        names: The mistakes that were made together.
        max_abs: The largest difference that they leave, between vectors scaled to length 1.
        rms: The root mean square of the differences.
        correlation: For fewer bits, how our errors correlate with the foreign ones.
    """

    names: tuple[str, ...]
    max_abs: float
    rms: float
    correlation: float | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        verdict: "equal", "cause", "tie", "mostly", "another model" or "none"; "ids" if the
            arithmetic is right and some texts were read otherwise; "company" if one text has
            several vectors.
        causes: The mistakes, all of which were made.
        alternatives: In a tie, further mistakes, of which one was made.
        texts: How many texts were compared.
        compared: How many of them the mistakes were tried on.
        max_abs, rms: Of the differences between the vectors as they came.
        min_cosine, median_cosine: Over the texts.
        unit_max_abs: The largest difference between the vectors scaled to length 1.
        remaining: The part of `unit_max_abs` that the causes leave.
        rows: Every text, the worst first, of vectors scaled to length 1.
        candidates: The mistakes that were tried, the nearest first.
        untried: Mistakes that none of these texts would show.
        notes: Further sentences for a reader.
        lengths: The smallest and the largest length of the other program's vectors.
        own_lengths: The same of ours.
        unexplained: The numbers of the texts whose difference the causes leave, of those that
            were compared.
    """

    verdict: str
    causes: tuple[Cause, ...]
    texts: int
    compared: int
    max_abs: float
    rms: float
    min_cosine: float
    median_cosine: float
    unit_max_abs: float
    remaining: float
    rows: tuple[TextDifference, ...]
    candidates: tuple[Candidate, ...] = ()
    untried: tuple[Cause, ...] = ()
    notes: tuple[str, ...] = ()
    alternatives: tuple[Cause, ...] = ()
    lengths: tuple[float, float] = (math.nan, math.nan)
    own_lengths: tuple[float, float] = (math.nan, math.nan)
    unexplained: tuple[int, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether the vectors are ours, but for rounding."""
        return self.verdict == "equal"

    @property
    def summary(self) -> str:
        """The verdict in one line."""
        if self.is_equal:
            return "equal to rounding"
        names = [cause.name for cause in self.causes]
        if self.alternatives:
            names.insert(0, " or ".join(cause.name for cause in self.alternatives))
        if self.verdict == "ids":
            return f"the arithmetic is right, and some texts are read otherwise: {'; '.join(names)}"
        heading = "mostly" if self.verdict == "mostly" else "probable cause"
        return f"{heading}: {'; and '.join(names)}"

    def table(self, worst: int = 5, nearest: int = 5) -> str:
        """The finding as text, with so many of the texts, and of the mistakes that were tried."""
        rows = [("row", "scaled to 1", "cosine", "tokens", "text, the worst first")]
        rows += [
            (f"{row.row}", f"{row.unit_max_abs:.1e}", f"{row.cosine:.6f}", f"{row.tokens}",
             repr(shortened(row.text, 60)))
            for row in self.rows[:worst]
        ]  # fmt: skip
        lines = aligned(rows, right=range(4))
        lines += [
            "",
            f"{self.texts} texts: max abs {self.max_abs:.1e}, rms {self.rms:.1e}",
            f"cosine: at least {self.min_cosine:.6f}, median {self.median_cosine:.6f}",
            f"lengths: {_range(self.lengths)}; of this model's: {_range(self.own_lengths)}",
            self.summary,
        ]
        explains = self.verdict in ("cause", "tie", "mostly", "ids")
        if explains and self.remaining < self.unit_max_abs / 2:
            lines.append(
                f"  with it a difference of {self.remaining:.1e} remains, "
                f"of {self.unit_max_abs:.1e} (scaled to length 1)"
            )
        if not self.is_equal:
            shown = [*self.alternatives, *self.causes]
            remedies = dict.fromkeys(cause.remedy for cause in shown)
            lines += [f"  what to do: {remedy}" for remedy in remedies]
        if self.unexplained and explains:
            shown_rows = ", ".join(map(str, self.unexplained[:20]))
            more = f" and {len(self.unexplained) - 20} more" if len(self.unexplained) > 20 else ""
            lines.append(f"rows that this doesn't explain: {shown_rows}{more}")
        lines += [f"note: {note}" for note in self.notes]
        if self.candidates and not self.is_equal:
            tried = [("max abs", "rms", f"tried on {self.compared} texts")]
            for each in self.candidates[:nearest]:
                name = " + ".join(each.names)
                if each.correlation is not None:
                    name += f" (errors correlate by {each.correlation:.2f})"
                tried.append((f"{each.max_abs:.1e}", f"{each.rms:.1e}", name))
            if len(self.candidates) > nearest:
                tried.append(("", "", f"and {len(self.candidates) - nearest} more"))
            lines += ["", *aligned(tried, right=(0, 1))]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The finding as an object for JSON."""
        return {"equal": self.is_equal, "summary": self.summary, **jsonable(vars(self))}


def diagnose(
    encoder: SentenceEncoder,
    texts: Sequence[str],
    vectors: Embeddings,
    *,
    max_texts: int = 64,
    show_progress_bar: bool = False,
) -> Diagnosis:
    """Compare another program's vectors with ours, and find out why they differ.

    Args:
        encoder: Our model, in float32 or float64; it is left as it is.
        texts: n texts, in the order in which the other program had them.
        vectors: Its vectors for them, `[n, 384]`: a tensor, an array, or lists.
        max_texts: The most texts to try the mistakes on: half of them the worst, half spread over
            the rest.
        show_progress_bar: Show on standard error what is being tried.

    Raises:
        InputTypeError: A text or a vector is something else.
        InputError: The numbers of texts and vectors differ, or the widths of the vectors; there
            are none; or the encoder computes in 16 bits.
    """
    texts, _ = inputs.as_texts(texts, "texts")
    inputs.check_positive_int(max_texts, "max_texts")
    if encoder.dtype not in (torch.float32, torch.float64):
        raise InputError(f"encoder computes in {encoder.dtype}; load it in float32", "encoder")
    foreign = _matrix(vectors, len(texts), encoder.bert.config.hidden_size)
    whole = {"prompt": "", "truncate_dim": encoder.bert.config.hidden_size, "truncation": "silent"}
    ours = encoder.encode(texts, convert_to_tensor=True, **whole).cpu().double()
    with tqdm(unit=" tried", disable=not show_progress_bar) as progress:
        return _Case(encoder, texts, foreign, ours, max_texts, progress).diagnosis()


def _matrix(vectors: Embeddings, rows: int, width: int) -> Tensor:
    foreign = as_matrix(vectors, "vectors").detach().cpu().double()
    if not rows:
        raise InputError("texts is empty; pass at least one", "texts")
    if len(foreign) != rows:
        raise InputError(f"vectors has {len(foreign)} rows, texts {rows}; pass as many", "vectors")
    if precision_of_bits(foreign, width):
        raise InputError(
            "vectors are bits, which don't tell why they differ; pass them to check_vectors",
            "vectors",
        )
    if foreign.shape[1] != width:
        raise InputError(
            f"vectors are {foreign.shape[1]} numbers wide, this model's {width}: another model "
            "made them; compare with that one",
            "vectors",
        )
    return foreign


class _Case:
    """One comparison, under way. All vectors are float64 `[n, 384]`, on the CPU."""

    def __init__(
        self,
        encoder: SentenceEncoder,
        texts: list[str],
        foreign: Tensor,
        ours: Tensor,
        max_texts: int,
        progress: Any,
    ) -> None:
        self.progress = progress
        self.texts = texts
        self.finite = foreign.isfinite().all(dim=1)  # [n]
        self.foreign = foreign.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        self.ours = ours
        self.notes: list[str] = []
        self.storage = self._storage()  # what keeping few digits may have cost, at length 1
        self.counts = encoder.get_tokenizer()(texts).token_counts
        self.rows = self._differences()
        chosen = self._choose(max_texts)
        self.runner = VariantRunner(encoder, texts, self.counts, chosen)
        self.chosen = torch.tensor(chosen, dtype=torch.int64, device="cpu")
        self.goal = _unit(self.foreign[self.chosen])  # [n, 384]
        self.causes = causes_for(encoder)
        self.normalizes = not isinstance(encoder.normalize, nn.Identity)
        self.right = Variant(encoder.max_seq_length)
        self.tried: list[_Trial] = []
        self.is_most = False  # what was found explains most of the difference, and not all

    @property
    def tolerance(self) -> float:
        """The largest difference that rounding explains, between vectors of length 1."""
        return _ROUNDING + self.storage

    def _storage(self) -> float:
        """The most by which writing the numbers down in a short form may have changed them."""
        values = self.foreign[self.finite]
        if not values.numel() or not values.any():
            return 0.0
        lengths = values.norm(dim=1, keepdim=True).clamp_min(1e-30)
        form = short_form(values)
        if form is None:
            return 0.0
        if isinstance(form, int):
            self.notes.append(f"the numbers were stored with {form} decimals")
            return _SCALED * float(0.5 * 10.0**-form / lengths.min().clamp_min(1e-3))
        self.notes.append(f"the numbers were stored in {str(form).removeprefix('torch.')}")
        return _SCALED * float((values.abs() / lengths).max()) * torch.finfo(form).eps / 2

    def _differences(self) -> list[TextDifference]:
        difference = (self.foreign - self.ours).abs().amax(dim=1)
        difference[~self.finite] = torch.inf
        cosines = (_unit(self.foreign) * _unit(self.ours)).sum(dim=1)
        scaled = (_unit(self.foreign) - _unit(self.ours)).abs().amax(dim=1)
        scaled[~self.finite] = torch.inf
        columns = difference.tolist(), cosines.tolist(), scaled.tolist()
        every = zip(range(len(self.texts)), self.texts, self.counts, *columns, strict=True)
        rows = [TextDifference(*each) for each in every]
        broken = int((~self.finite).sum())
        if broken:
            first = int((~self.finite).nonzero()[0])
            self.notes.append(
                f"{broken} vectors have NaN or infinity in them, the first in row {first}, and "
                "were left out below"
            )
        return sorted(rows, key=lambda row: -row.unit_max_abs)

    def _choose(self, count: int) -> list[int]:
        """Choose rows to try the mistakes on: the worst, and some evenly spread over the others."""
        order = [row.row for row in self.rows if self.finite[row.row]]
        if len(order) <= count:
            return sorted(order)
        worst, rest = order[: (count + 1) // 2], sorted(order[(count + 1) // 2 :])
        wanted = count // 2
        return sorted([*worst, *(rest[i * len(rest) // wanted] for i in range(wanted))])

    # --- the search

    def diagnosis(self) -> Diagnosis:
        if not len(self.chosen):
            return self._result("cause", [_NO_NUMBER], [])
        base = self._try((), self.right)
        if base.max_abs <= self.tolerance:
            causes = self._beside_direction(base)
            return self._result("cause" if causes else "equal", causes, [base])
        if self._is_another_order(base):
            return self._result("cause", [_ANOTHER_ORDER], [base], remaining=0.0)
        found = self._search(base)
        company = self._company()
        if company is not None and (found is None or found[0].max_abs > self.tolerance):
            return self._depends_on_company(base, found, company)
        if found is None and self._is_eight_bits(base):
            causes = [_BATCH_SCALES, *self._beside_direction(base)]
            return self._result("cause", causes, [base])
        if found is None and base.median_cosine < _ANOTHER_MODEL:
            return self._result("another model", [_OTHER, *self._beside_direction(base)], [base])
        if found is None:
            return self._result("none", [_UNKNOWN, *self._beside_direction(base)], [base])
        ends = self._beside_direction(found[0])
        if len(found) > 1:
            self._say_what_would_tell(found)
            # The last mistake of each; those before are common to all.
            tied = [each.causes[-1] for each in found]
            others = _arithmetic_first(found[0].causes[:-1])
            is_read = others and all(cause.is_of_reading for cause in found[0].causes)
            return self._result("ids" if is_read else "tie", [*others, *ends], found, tied)
        causes = [*_arithmetic_first(found[0].causes), *ends]
        if all(cause.is_of_reading for cause in found[0].causes):
            return self._result("ids", causes or [_READ_OTHERWISE], found)
        return self._result("mostly" if self.is_most else "cause", causes, found)

    def _search(self, base: "_Trial") -> "list[_Trial] | None":
        """Find what explains the difference: one trial, several that do equally well, or none."""
        state, rounds = base, []
        for _ in range(_STEPS):
            read = self._reading(state)
            if read and read[0].of_text.le(self._slack(read[0])).all():
                return read
            trials = self._round(state)
            explained = self._explaining(trials)
            if explained:
                return explained
            best = min(trials, key=lambda trial: trial.score, default=state)
            if read and read[0].score <= best.score:
                return self._with_what_is_left(read)
            bits = self._by_pattern(trials, state)
            if bits is not None and best.rms > _CLEAR * state.rms:
                return [bits]
            rounds.append(trials)
            if best.score > state.score - _HELPS:
                break
            state = best
        for trials in reversed(rounds):
            near = self._nearly(trials, base)
            if near:
                return near
        read = self._reading(state)
        return self._with_what_is_left(read) if read else None

    # --- texts that were read otherwise

    def _slack(self, trial: "_Trial") -> float:
        """The largest difference of a text that was read right, given what a trial changes."""
        coarse = bool(trial.variant.bits) or trial.variant.gelu == "table"
        return max(self.tolerance, _COARSE * float(trial.of_text.median()) if coarse else 0.0)

    def _has_right_arithmetic(self, state: "_Trial") -> bool:
        """Whether some texts are equal to rounding, and others far off."""
        slack = self._slack(state)
        right = state.of_text <= slack
        if int(right.sum()) < max(2, _RIGHT * len(right)) or right.all():
            return False
        # Not just beyond it, as errors of few bits are that vary from text to text.
        return float(state.of_text[~right].median()) > max(_FAR, _COARSE * slack)

    def _reading(self, state: "_Trial") -> "list[_Trial] | None":
        """The readings that make most texts right, if some are right already; rivals if tied."""
        if not self._has_right_arithmetic(state):
            return None
        slack = self._slack(state)
        right = state.of_text <= slack
        taken, rivals = choose_readings(
            [cause for cause in self.causes if cause.is_of_reading],
            lambda causes: self.runner.ids(state.variant.with_(*causes)),
            lambda causes: self._read_right(state, causes, slack).tolist(),
        )
        if not taken:
            return [state] if float(right.double().mean()) > _MOST else None
        several = [(*taken[:-1], last) for last in (taken[-1], *rivals)]
        return [self._try((*state.causes, *c), state.variant.with_(*c)) for c in several]

    def _read_right(self, state: "_Trial", causes: Sequence[Cause], slack: float) -> Tensor:
        """Which texts are right with these readings. Only what has other ids is computed."""
        variant = state.variant.with_(*causes)
        own = self.runner.ids(state.variant)
        changed = [place for place, row in enumerate(self.runner.ids(variant)) if row != own[place]]
        now = state.of_text <= slack
        if changed:
            unit = _unit(self.runner.pooled(variant, changed))
            now[changed] = (self.goal[changed] - unit).abs().amax(dim=1) <= slack
            self.progress.update()
        return now

    def _with_what_is_left(self, read: "list[_Trial]") -> "list[_Trial]":
        """Say what the texts have in common that no reading explains."""
        of_text = read[0].of_text
        left = of_text > self._slack(read[0])
        if left.any():
            texts = [self.texts[row] for row in self.chosen[left].tolist()]
            rest = [self.texts[row] for row in self.chosen[~left].tolist()]
            common = in_common(texts, rest)
            if common:
                said = "what is not explained has in common, and nothing else has: "
                self.notes.append(said + ", ".join(common))
        return read

    # --- vectors that depend on more than the text

    def _company(self) -> float | None:
        """How far apart two vectors of one text are; None if they are equal to rounding."""
        first: dict[str, int] = {}
        apart = 0.0
        unit = _unit(self.foreign)
        for row, text in enumerate(self.texts):
            other = first.setdefault(text, row)
            if self.finite[row] and self.finite[other]:
                apart = max(apart, float((unit[row] - unit[other]).abs().max()))
        return apart if apart > max(_COMPANY, self.tolerance) else None

    def _depends_on_company(
        self, base: "_Trial", found: "list[_Trial] | None", apart: float
    ) -> Diagnosis:
        self.notes.append(f"vectors of one text are {apart:.1e} apart, scaled to length 1")
        causes = [_COMPANY_CAUSE]
        if found is not None:
            causes += _arithmetic_first(found[0].causes)
        elif self._is_eight_bits(base):
            causes.append(_BATCH_SCALES)
        causes += self._beside_direction(base)
        return self._result("company", causes, found or [base])

    def _is_eight_bits(self, base: "_Trial") -> bool:
        """Whether the errors are of like size in all texts, and a little like those of 8 bits."""
        error = self.goal - base.unit
        sizes = error.norm(dim=1)
        low, high = _EIGHT_BITS
        if len(sizes) < _ENOUGH or not low <= float(sizes.min()) <= float(sizes.max()) <= high:
            return False
        if float(sizes.max()) > _ALIKE * float(sizes.min()):
            return False
        least = max(_WEAK, 4 / math.sqrt(error.numel()))
        for trial in self.tried:
            if "int8" in trial.variant.bits and len(trial.causes) == 1:
                ours = trial.unit - base.unit
                alike = (error * ours).sum(dim=1) > 0  # in nearly every text
                if (trial.correlation or 0.0) >= least and float(alike.double().mean()) >= _OFTEN:
                    return True
        return False

    def _nearly(self, trials: "list[_Trial]", base: "_Trial") -> "list[_Trial]":
        """The trials that explain nearly all of the difference, or most of it, or of the texts."""
        ranked = sorted(trials, key=lambda trial: trial.rms)
        least, rival = [*(trial.rms for trial in ranked), math.inf, math.inf][:2]
        if least <= _CLEAR * base.rms:
            self.notes.append(f"what remains, {ranked[0].max_abs:.1e}, is more than rounding")
            return [trial for trial in ranked if trial.rms <= _TIE * least]
        wrong = base.of_text > self.tolerance
        right = {trial: int((trial.of_text[wrong] <= self.tolerance).sum()) for trial in trials}
        most = max(right.values(), default=0)
        if most > _MOST * int(wrong.sum()):
            self.notes.append(f"it explains {most} of the {int(wrong.sum())} texts that differ")
            return [trial for trial in trials if right[trial] == most]
        if least < _MOSTLY * base.rms and rival > _TIE * least:
            self.is_most = True
            self.notes.append(f"it leaves {least / base.rms:.0%} of the difference (rms)")
            return ranked[:1]
        return []

    def _round(self, base: "_Trial") -> "list[_Trial]":
        """Try each mistake on top of those of `base`: cheap ones first, until one explains all."""
        trials: list[_Trial] = []
        kinds: tuple[str, ...] = ("simple", "arithmetic", "bits", "width")
        if self._has_right_arithmetic(base):  # then only padding is left, which some texts hide
            kinds = ("simple", "width")
        tiers: dict[str, list[tuple[Cause, Variant]]] = {kind: [] for kind in kinds}
        changed = settings_of(base.causes)
        for cause in self.causes:
            if changed & cause.settings:
                continue
            variant = base.variant.with_(cause)
            kind = _kind(cause, variant)
            if kind in kinds and self.runner.differs(base.variant, variant):
                tiers[kind].append((cause, variant))
        for tier, tried in tiers.items():
            if self._explaining(trials):
                break
            chosen = tried if tier == "simple" else self._screened(base, tier, tried)
            trials += [self._try((*base.causes, cause), variant) for cause, variant in chosen]
        return trials

    def _screened(
        self, base: "_Trial", tier: str, tried: list[tuple[Cause, Variant]]
    ) -> list[tuple[Cause, Variant]]:
        """The best of some mistakes, by a few texts."""
        few = _PADDED if tier == "width" else _SCREENED
        rows = self.runner.screening(few)
        if tier != "width" and len(rows) < few:
            return tried
        goal, own = self.goal[rows], base.unit[rows]
        scores = []
        for number, (_, variant) in enumerate(tried):
            unit = _unit(self.runner.pooled(variant, rows))
            self.progress.update()
            if tier == "bits":
                scores.append((-_correlation(goal - own, unit - own), number))
            else:
                scores.append((_score(goal - unit), number))
        scores.sort()
        bar = scores[0][0] + _WITHIN if scores else 0.0
        if tier != "bits":  # one that doesn't help is not tried on all texts
            bar = min(bar, _score(goal - own) - _HELPS / 2)
        return [tried[number] for score, number in scores[:_BEST] if score <= bar]

    def _try(self, causes: tuple[Cause, ...], variant: Variant) -> "_Trial":
        self.progress.set_description_str(causes[-1].name if causes else "as we do it")
        pooled = self.runner.pooled(variant)
        self.progress.update()
        trial = _Trial(causes, variant, pooled, self.goal)
        self.tried.append(trial)
        return trial

    def _explaining(self, trials: "list[_Trial]") -> "list[_Trial]":
        found = [trial for trial in trials if trial.max_abs <= self.tolerance]
        least = min((trial.rms for trial in found), default=0.0)
        near = [trial for trial in found if trial.rms <= max(_TIE * least, _FLOOR / 3)]
        return sorted(near, key=lambda trial: trial.rms)

    def _by_pattern(self, trials: "list[_Trial]", base: "_Trial") -> "_Trial | None":
        """The trial with fewer bits whose errors are most like the foreign ones, if any are."""
        error = self.goal - base.unit
        found = []
        for trial in trials:
            if "bits" in trial.causes[-1].changes:
                ours = trial.unit - base.unit
                if not error.any() or not ours.any():
                    continue
                trial.correlation = _correlation(error, ours)
                if _SIZES[0] <= float(error.norm() / ours.norm()) <= _SIZES[1]:
                    found.append(trial)
        best = max(found, key=lambda trial: trial.correlation or 0.0, default=None)
        if best is None or (best.correlation or 0.0) < _CORRELATION:
            return None
        self.notes.append(
            f"rounding can't be reproduced exactly: it is recognised by the pattern of its errors, "
            f"which correlate by {best.correlation:.2f}"
        )
        return best

    def _is_another_order(self, base: "_Trial") -> bool:
        if base.median_cosine > 0.95 or len(self.texts) < 2:
            return False
        everything = _unit(self.ours)
        nearest = everything[(self.goal @ everything.T).argmax(dim=1)]
        fits = (self.goal - nearest).abs().amax(dim=1) <= self.tolerance
        return float(fits.double().mean()) >= 0.9

    def _beside_direction(self, trial: "_Trial") -> list[Cause]:
        """The causes beside those of a trial, which explains the directions of the vectors."""
        causes = [] if self.finite.all() else [_NO_NUMBER]
        lengths = self._lengths(trial)
        return causes if lengths is None else [lengths, *causes]

    def _lengths(self, trial: "_Trial") -> Cause | None:
        """What is different about the lengths of the vectors, given what explains the rest."""
        lengths = self.foreign[self.chosen].norm(dim=1)
        pooled = trial.pooled.norm(dim=1)
        real = pooled > 0  # the mean of no token has no direction and no length
        lengths, pooled = lengths[real], pooled[real]
        slack = 1e-5 + 20 * self.storage + 20 * min(trial.max_abs, 0.05)
        is_unit = bool(((lengths - 1).abs() <= slack).all())
        is_pooled = bool(((lengths / pooled - 1).abs() <= slack).all())
        if is_unit if self.normalizes else is_pooled:
            return None
        if is_pooled:
            return _NOT_NORMALIZED
        return _NORMALIZED if is_unit else _OTHER_LENGTHS

    def _say_what_would_tell(self, found: "list[_Trial]") -> None:
        needs = dict.fromkeys(each.causes[-1].needs for each in found)
        wanted = " and ".join(need for need in needs if need != "any texts")
        wanted = wanted or "more texts, of all lengths"
        self.notes.append(f"these cannot be told apart on these texts: add {wanted}")

    def _result(
        self,
        verdict: str,
        causes: list[Cause],
        found: "list[_Trial]",
        tied: Sequence[Cause] = (),
        remaining: float | None = None,
    ) -> Diagnosis:
        untried = tuple(
            cause
            for cause in self.causes
            if not self.runner.differs(self.right, self.right.with_(cause))
        )
        unread = [cause.needs for cause in untried if "limit" in cause.settings]
        if verdict in ("equal", "cause") and unread and "limit" not in settings_of(causes):
            self.notes.append(f"where it cuts shows only on other texts: add {min(unread)}")
        finite = [row for row in self.rows if math.isfinite(row.max_abs)]
        difference = (self.foreign - self.ours)[self.finite]
        cosines = torch.tensor(
            [row.cosine for row in finite] or [0.0], dtype=torch.float32, device="cpu"
        )
        base = self.tried[0].max_abs if self.tried else math.inf
        unexplained: list[int] = []
        if found and found[0].causes:
            left = found[0].of_text > self._slack(found[0])
            unexplained = self.chosen[left].tolist()
        candidates = []
        for trial in sorted(self.tried, key=lambda trial: trial.score):
            names = tuple(cause.name for cause in trial.causes) or ("as we do it",)
            candidates.append(Candidate(names, trial.max_abs, trial.rms, trial.correlation))
        if remaining is None:
            remaining = found[0].max_abs if found else base
        return Diagnosis(
            verdict=verdict,
            causes=tuple(causes),
            texts=len(self.texts),
            compared=len(self.chosen),
            max_abs=self.rows[0].max_abs,
            rms=float(difference.square().mean().sqrt()) if difference.numel() else 0.0,
            min_cosine=float(cosines.min()),
            median_cosine=float(cosines.median()),
            unit_max_abs=base if math.isfinite(base) else 0.0,
            remaining=remaining if math.isfinite(remaining) else 0.0,
            rows=tuple(self.rows),
            candidates=tuple(candidates),
            untried=untried,
            notes=tuple(self.notes),
            alternatives=tuple(tied),
            lengths=_extremes(self.foreign[self.finite]),
            own_lengths=_extremes(self.ours),
            unexplained=tuple(unexplained),
        )


class _Trial:
    """The vectors of one variant, and how far they are from the goal."""

    def __init__(
        self, causes: tuple[Cause, ...], variant: Variant, pooled: Tensor, goal: Tensor
    ) -> None:
        self.causes, self.variant, self.pooled = causes, variant, pooled
        self.unit = _unit(pooled)
        difference = goal - self.unit
        self.of_text = difference.abs().amax(dim=1)  # [n]
        self.max_abs = float(self.of_text.max())
        self.rms = float(difference.square().mean().sqrt())
        self.score = _score(difference)
        self.median_cosine = float((goal * self.unit).sum(dim=1).median())
        self.correlation: float | None = None


def _score(difference: Tensor) -> float:
    """The mean over texts of the order of magnitude: explaining most texts counts, not the worst.

    So a mistake that some texts show doesn't hide another, which all show.
    """
    return float(difference.abs().amax(dim=1).clamp_min(_FLOOR).log10().mean())


def short_form(values: Tensor) -> torch.dtype | int | None:
    """The dtype of 16 bits, or the number of decimals, in which float64 numbers were written down;
    None if they were written in full.
    """
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).double(), values):
            return dtype
    return decimals(values)


def decimals(values: Tensor) -> int | None:
    """How many decimals float64 numbers have, from 2 to 7; None if more."""
    for digits in range(2, 8):
        scaled = values * 10.0**digits
        # A float32 of a short decimal is off by 6e-8 of itself.
        if ((scaled - scaled.round()).abs() < 0.01 + 1e-7 * scaled.abs()).all():
            return digits
    return None


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1)


def _arithmetic_first(causes: Sequence[Cause]) -> list[Cause]:
    return sorted(causes, key=lambda cause: cause.is_of_reading)


def _kind(cause: Cause, variant: Variant) -> str:
    """How much it costs to try a mistake: whether the network has to be computed anew."""
    if variant.width:
        return "width"
    if "bits" in cause.changes:
        return "bits"
    arithmetic = {"gelu", "eps", "token_type", "specials"}
    return "arithmetic" if arithmetic & cause.changes.keys() else "simple"


def _correlation(error: Tensor, ours: Tensor) -> float:
    norms = float(error.norm()) * float(ours.norm())
    return float((error * ours).sum()) / norms if norms else 0.0


def _extremes(vectors: Tensor) -> tuple[float, float]:
    lengths = vectors.norm(dim=1)
    return (float(lengths.min()), float(lengths.max())) if len(vectors) else (math.nan, math.nan)


def _range(ends: tuple[float, float]) -> str:
    low, high = (f"{end:.4f}" for end in ends)
    return low if low == high else f"{low} to {high}"


def in_common(texts: Sequence[str], others: Sequence[str]) -> list[str]:
    """What all of some texts have that no other has: kinds of characters, in words."""
    if not texts:
        return []
    every = set.intersection(*(_kinds(text) for text in texts))
    return sorted(every.difference(*(_kinds(text) for text in others)))


_CATEGORIES = {
    "Mn": "marks",
    "Mc": "spacing marks",
    "Cc": "control characters",
    "Cf": "characters of format",
    "Cn": "unassigned characters",
    "Co": "characters of private use",
    "Zs": "other blanks",
    "Zl": "line separators",
    "Zp": "paragraph separators",
    "Lu": "capital letters",
    "Nd": "digits",
}


def _kinds(text: str) -> set[str]:
    found = set()
    for character in set(text) - {" "}:
        category = unicodedata.category(character)
        name = _CATEGORIES.get(category)
        if name is not None:
            found.add(name)
        if category[0] in "PS":
            where = "" if character.isascii() else " beyond ASCII"
            found.add(("punctuation" if category[0] == "P" else "symbols") + where)
        if category[0] == "L" and not character.isascii():
            found.add(f"{unicodedata.name(character, 'unknown').split()[0].lower()} letters")
            if unicodedata.decomposition(character):
                found.add("letters that can be decomposed")
    if any(len(word) > 50 for word in text.split()):
        found.add("long words")
    return found

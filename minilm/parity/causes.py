"""Why does another implementation give other vectors? Each usual mistake is made, and compared.

In: an encoder, texts, and the vectors that another program gave for them. Out: a `Diagnosis`: how
far they are from ours, and which mistake makes ours equal to them.

People run this model in many languages, and nearly always one of a few things goes wrong: text cut
elsewhere, padding that is attended or averaged, another pooling, a detail of the arithmetic, fewer
bits. So all of them are made (`mistakes.py`). The one whose vectors are the foreign ones but for
rounding is the cause; if there are two, they are named together, with the texts that would tell
them apart. A second mistake on top of the first is found in the same way.

Fewer bits can't be reproduced exactly, since rounding depends on the order of the operations. But
rounding the weights alike makes errors that point in the same directions: their correlation with
the foreign errors tells float16, bfloat16 and int8 apart, and from all else.

Directions and lengths are compared apart: the lengths show whether vectors were normalized, and the
directions what else is different.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm import inputs
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError
from minilm.parity.mistakes import Cause, Variant, VariantRunner, causes_for
from minilm.report import aligned, jsonable, shortened
from minilm.similarity import Embeddings
from minilm.vectors import as_matrix

__all__ = ["Candidate", "Diagnosis", "TextDifference", "decimals", "diagnose", "short_form"]

# Two right implementations in float32 differ by up to 4e-7 on one processor and 1e-6 on others; the
# smallest mistake that is tried, an epsilon of 1e-6, moves some text of a few by 1e-5.
_ROUNDING = 2e-6
_SCALED = 1.25  # rounding the numbers of a vector changes its length too
_FLOOR = 3e-7  # smaller differences carry no information
_CLEAR = 0.1  # a cause that leaves less of the difference than this is named
_HELPS = 0.1  # orders of magnitude, over all texts, by which a first mistake must help for a second
_MOST = 0.5  # a cause that explains a larger share of the texts that differ is named too
_TIE = 2.0  # causes within this factor of the best are named together
_CORRELATION = 0.4  # of errors by fewer bits: 0.58 to 0.71 if they are the cause, else up to 0.24
_SIZES = (0.4, 3.0)  # how many times as large as ours these errors may be
_ANOTHER_MODEL = 0.6  # the median cosine below which nothing but another model is left
_SCREENED = 3  # texts on which mistakes about padding are tried first: they cost the most
_BEST = 3  # mistakes about padding that are tried on all texts
_WITHIN = 0.5  # orders of magnitude by which they may be behind the best

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
    """

    row: int
    text: str
    tokens: int
    max_abs: float
    cosine: float


@dataclass(frozen=True)
class Candidate:
    """One or two mistakes, and how near they come.

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
        verdict: "equal", "cause", "tie", "another model" or "none".
        causes: The mistakes, all of which were made.
        alternatives: In a tie, further mistakes, of which one was made.
        texts: How many texts were compared.
        compared: How many of them the mistakes were tried on.
        max_abs, rms: Of the differences between the vectors as they came.
        min_cosine, median_cosine: Over the texts.
        unit_max_abs: The largest difference between the vectors scaled to length 1.
        remaining: The part of `unit_max_abs` that the causes leave.
        rows: Every text, the worst first.
        candidates: The mistakes that were tried, the nearest first.
        untried: Mistakes that none of these texts would show.
        notes: Further sentences for a reader.
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
        return f"probable cause: {'; and '.join(names)}"

    def table(self, worst: int = 5, nearest: int = 5) -> str:
        """The finding as text.

        Args:
            worst: How many texts to show.
            nearest: How many of the mistakes that were tried to show.
        """
        rows = [("row", "max abs", "cosine", "tokens", "text, the worst first")]
        rows += [
            (f"{row.row}", f"{row.max_abs:.1e}", f"{row.cosine:.6f}", f"{row.tokens}",
             repr(shortened(row.text, 60)))
            for row in self.rows[:worst]
        ]  # fmt: skip
        lines = aligned(rows, right=range(4))
        lines += [
            "",
            f"{self.texts} texts: max abs {self.max_abs:.1e}, rms {self.rms:.1e}",
            f"cosine: at least {self.min_cosine:.6f}, median {self.median_cosine:.6f}",
            self.summary,
        ]
        if self.verdict in ("cause", "tie") and self.remaining < self.unit_max_abs / 2:
            lines.append(
                f"  with it a difference of {self.remaining:.1e} remains, "
                f"of {self.unit_max_abs:.1e} (scaled to length 1)"
            )
        if not self.is_equal:
            shown = [*self.alternatives, *self.causes]
            remedies = dict.fromkeys(cause.remedy for cause in shown)
            lines += [f"  what to do: {remedy}" for remedy in remedies]
        lines += [f"note: {note}" for note in self.notes]
        if self.candidates and not self.is_equal:
            tried = [("max abs", "rms", f"tried on {self.compared} texts")]
            for each in self.candidates[:nearest]:
                pattern = ""
                if each.correlation is not None:
                    pattern = f" (errors correlate by {each.correlation:.2f})"
                name = " + ".join(each.names) + pattern
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
) -> Diagnosis:
    """Compare another program's vectors with ours, and find out why they differ.

    Args:
        encoder: Our model, in float32 or float64; it is left as it is.
        texts: n texts, in the order in which the other program had them.
        vectors: Its vectors for them, `[n, 384]`: a tensor, an array, or lists.
        max_texts: The most texts to try the mistakes on: half of them the worst, half spread over
            the rest.

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
    return _Case(encoder, texts, foreign, ours, max_texts).diagnosis()


def _matrix(vectors: Embeddings, rows: int, width: int) -> Tensor:
    foreign = as_matrix(vectors, "vectors").detach().cpu().double()
    if not rows:
        raise InputError("texts is empty; pass at least one", "texts")
    if len(foreign) != rows:
        raise InputError(f"vectors has {len(foreign)} rows, texts {rows}; pass as many", "vectors")
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
    ) -> None:
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
        rows = [
            TextDifference(row, text, tokens, float(max_abs), float(cosine))
            for row, (text, tokens, max_abs, cosine) in enumerate(
                zip(self.texts, self.counts, difference, cosines, strict=True)
            )
        ]
        broken = int((~self.finite).sum())
        if broken:
            first = int((~self.finite).nonzero()[0])
            self.notes.append(
                f"{broken} vectors have NaN or infinity in them, the first in row {first}, and "
                "were left out below"
            )
        return sorted(rows, key=lambda row: -row.max_abs)

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
        if found is None and base.median_cosine < _ANOTHER_MODEL:
            return self._result("another model", [_OTHER], [base])
        if found is None:
            return self._result("none", [_UNKNOWN], [base])
        ends = self._beside_direction(found[0])
        if len(found) > 1:
            self._say_what_would_tell(found)
            # The last mistake of each; those before are common to all.
            tied = [each.causes[-1] for each in found]
            return self._result("tie", [*found[0].causes[:-1], *ends], found, tied)
        return self._result("cause", [*found[0].causes, *ends], found)

    def _search(self, base: "_Trial") -> "list[_Trial] | None":
        """Find what explains the difference: one trial, several that do equally well, or none."""
        singles = self._round(base)
        explained = self._explaining(singles)
        if explained:
            return explained
        bits = self._by_pattern(singles, base)
        best = min(singles, key=lambda trial: trial.score, default=base)
        if bits is not None and best.rms > _CLEAR * base.rms:
            return [bits]
        if best.score > base.score - _HELPS:
            return None
        pairs = self._round(best)
        explained = self._explaining(pairs)
        if explained:
            return explained
        bits = self._by_pattern(pairs, best)
        if bits is not None:
            return [bits]
        for trials in (pairs, singles):
            near = self._nearly(trials, base)
            if near:
                return near
        return None

    def _nearly(self, trials: "list[_Trial]", base: "_Trial") -> "list[_Trial]":
        """The trials that explain nearly all of the difference, or most of the texts entirely."""
        least = min((trial.rms for trial in trials), default=math.inf)
        if least <= _CLEAR * base.rms:
            near = [trial for trial in trials if trial.rms <= _TIE * least]
            near.sort(key=lambda trial: trial.rms)
            self.notes.append(f"what remains, {near[0].max_abs:.1e}, is more than rounding")
            return near
        wrong = base.of_text > self.tolerance
        right = {trial: int((trial.of_text[wrong] <= self.tolerance).sum()) for trial in trials}
        most = max(right.values(), default=0)
        if most <= _MOST * int(wrong.sum()):
            return []
        self.notes.append(f"it explains {most} of the {int(wrong.sum())} texts that differ")
        return [trial for trial in trials if right[trial] == most]

    def _round(self, base: "_Trial") -> "list[_Trial]":
        """Try each mistake on top of those of `base`: cheap ones first, until one explains all."""
        trials: list[_Trial] = []
        tiers: dict[str, list[tuple[Cause, Variant]]] = {"simple": [], "bits": [], "width": []}
        changed = {name for cause in base.causes for name in cause.changes}
        for cause in self.causes:
            if changed & cause.changes.keys():
                continue
            variant = base.variant.with_(cause)
            if not self.runner.differs(base.variant, variant):
                continue
            tier = "width" if variant.width else "bits" if "bits" in cause.changes else "simple"
            tiers[tier].append((cause, variant))
        for tier in ("simple", "bits"):
            trials += [self._try((*base.causes, cause), variant) for cause, variant in tiers[tier]]
            if self._explaining(trials):
                return trials
        # Padding costs most: first some texts for all of these, then all texts for the best.
        rows = self.runner.screening(_SCREENED)
        goal = self.goal[rows]
        screened = sorted(
            (_score(goal - _unit(self.runner.pooled(variant, rows))), number)
            for number, (_, variant) in enumerate(tiers["width"])
        )
        for score, number in screened[:_BEST]:
            if score <= screened[0][0] + _WITHIN:
                cause, variant = tiers["width"][number]
                trials.append(self._try((*base.causes, cause), variant))
        return trials

    def _try(self, causes: tuple[Cause, ...], variant: Variant) -> "_Trial":
        pooled = self.runner.pooled(variant)
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
                norms = float(error.norm()), float(ours.norm())
                if not all(norms):
                    continue
                trial.correlation = float((error * ours).sum()) / math.prod(norms)
                if _SIZES[0] <= norms[0] / norms[1] <= _SIZES[1]:
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
        self.notes.append(
            "these cannot be told apart on these texts"
            + (f": add {wanted}" if wanted else ": add more texts, of all lengths")
        )

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
        hidden = dict.fromkeys(cause.needs for cause in untried if "width" not in cause.changes)
        if verdict in ("none", "another model") and hidden:
            wanted = ", ".join(need for need in hidden if need != "any texts")
            self.notes.append(f"some causes show only on other texts: add {wanted}")
        finite = [row for row in self.rows if math.isfinite(row.max_abs)]
        difference = (self.foreign - self.ours)[self.finite]
        cosines = torch.tensor(
            [row.cosine for row in finite] or [0.0], dtype=torch.float32, device="cpu"
        )
        base = self.tried[0].max_abs if self.tried else math.inf
        ranked = sorted(self.tried, key=lambda trial: trial.score)
        candidates = [
            Candidate(
                tuple(cause.name for cause in trial.causes) or ("as we do it",),
                trial.max_abs,
                trial.rms,
                trial.correlation,
            )
            for trial in ranked
        ]
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

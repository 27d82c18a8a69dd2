"""The same layers without padding: the tokens of all sentences laid end to end.

In: token ids of unequal length. Out: a batch for `Pipeline.forward`, whose `attend` and `pool` know
where each sentence begins. Next: `pipeline.py`.

In a padded batch of English sentences a third of the positions hold no token, and every layer
works on them. Only positions, attention and pooling need to know which tokens belong together;
all else acts on the last dimension, so that the batch may as well be `[total_tokens]`, one row a
token. Sentences of equal length stand side by side, and such a run is a dense block: attention
runs on it with no mask at all.

Three details serve the kernels. For each number of rows that oneDNN has not met, it takes
milliseconds to prepare its products, and keeps what it prepared: large batches are filled up to a
multiple of 64 rows. Sentences up to 160 tokens attend by two batched products with a softmax
between, where that keeps a sentence's bits in any company. Longer ones attend by torch's fused
kernel, whose inner loops go over 16 keys at a time, and over the rest one by one: sentences read on
into the next one, up to a multiple of 16, and mask what they find there.

Every text is computed by operations that depend on its own length only. So it gets the same bits
alone and in any company, as long as each operation treats its rows alike.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, groupby, repeat
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minilm.pipeline import Batch, Pipeline
from minilm.tokenizer import WordPieceTokenizer

__all__ = [
    "PackedBatch",
    "default_budget",
    "embed",
    "keeps_bits",
    "make_batch",
    "plan_batches",
    "rows_of",
]

# For each number of rows that oneDNN has not met it prepares its products, which takes 2 ms a pass:
# batches of more than 512 tokens get a multiple of 64 rows, and those of more than 64 one of 16.
_MULTIPLES = ((512, 64), (64, 16))
_STEP = 16  # keys
_SHORT = 160  # tokens of a sentence, up to which attention by `bmm` is the faster one
# Bytes. Where the numbers of a head don't fill lines of the cache, as 8 of float32 don't, some
# libraries add them up in an order that depends on where in memory they lie: zeros fill them up.
_ALIGNED = 64
# Not float16: a score beyond its range times 0 is NaN, and would reach the neighbour.
_WINDOWED = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class _Run:
    """Neighbouring sentences of equal length: rows `start` to `stop` = start + count x length."""

    start: int
    stop: int
    count: int
    length: int

    def block(self, tensor: Tensor) -> Tensor:
        """`[total_tokens, ...]` -> `[count, length, ...]`, a view."""
        rows = tensor if len(tensor) == self.stop - self.start else tensor[self.start : self.stop]
        return rows.view(self.count, self.length, *tensor.shape[1:])


class PackedBatch(Batch):
    """Sentences laid end to end.

    >>> batch = PackedBatch([[101, 7592, 102], [101, 102], [101, 102]])
    >>> batch.input_ids
    tensor([ 101, 7592,  102,  101,  102,  101,  102])
    >>> batch.position_ids
    tensor([0, 1, 2, 0, 1, 0, 1])

    Attributes:
        input_ids: int64 `[total_tokens]`.
        attention_mask: int64 `[total_tokens]`, 1 in each sentence, 0 in rows behind the last.
        position_ids: The place of each token in its sentence, int64 `[total_tokens]`.
        token_type_ids: int64 `[total_tokens]`, or None where all are 0.
        lengths: The number of tokens of each sentence.
    """

    position_ids: Tensor

    def __init__(
        self,
        input_ids: Sequence[Sequence[int]],
        device: torch.device | str = "cpu",
        multiple_of: int = 1,
        token_type_ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Lay the rows out.

        Args:
            input_ids: At least one row; none of them empty. In order of length for speed.
            device: Where the tensors go.
            multiple_of: Put so many rows of no sentence behind the last one that the number of
                rows can be divided by this.
            token_type_ids: As many rows of as many, if some are not 0.
        """
        self.lengths = [len(row) for row in input_ids]
        self._runs: list[_Run] = []
        start = 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            self._runs.append(_Run(start, start + count * length, count, length))
            start += count * length
        self._filler = -start % multiple_of
        ids, mask, places = (
            self._flat(input_ids),
            np.repeat(np.array((1, 0)), (start, self._filler)),
            self._flat(range(length) for length in self.lengths),
        )
        types = None if token_type_ids is None else _send(self._flat(token_type_ids), device)
        super().__init__(_send(ids, device), _send(mask, device), types, _send(places, device))

    def _flat(self, rows: Iterable[Sequence[int]]) -> "np.ndarray[Any, Any]":
        """int64 `[total_tokens]`."""
        filler = repeat(0, self._filler)
        return np.fromiter(chain(chain.from_iterable(rows), filler), np.int64)

    @functools.cached_property
    def _bounds(self) -> Tensor:
        """Where the sentences begin, and the end of the last: int32 `[batch + 1]`."""
        bounds = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device="cpu")
        return bounds.to(self.input_ids.device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attention` of `bert.py` within each sentence.

        Args:
            query, key, value: `[total_tokens, heads, head_size]`.

        Returns:
            context `[total_tokens, heads, head_size]`.
        """
        varlen = _varlen(query)
        if varlen is not None and not self._filler:
            longest = max(self.lengths)
            context: Tensor = varlen(
                query, key, value, self._bounds, self._bounds, longest, longest
            )
            return context
        size = query.shape[-1]
        missing = -size % (_ALIGNED // query.element_size()) if query.device.type == "cpu" else 0
        if missing:
            query, key, value = (F.pad(tensor, (0, missing)) for tensor in (query, key, value))
        has_products = _has_products(query)
        contexts = []
        for run in self._runs:
            attend = _attend_by_products if has_products and run.length <= _SHORT else _attend
            contexts.append(attend(run, query, key, value, size**-0.5))
        if len(contexts) == 1:
            context = contexts[0].flatten(0, 1)
            if self._filler:
                context = F.pad(context, (0, 0, 0, 0, 0, self._filler))
        else:
            context = torch.empty_like(query, memory_format=torch.contiguous_format)
            for run, part in zip(self._runs, contexts, strict=True):
                run.block(context).copy_(part)
            context[len(context) - self._filler :] = 0
        return context[..., :size] if missing else context

    def pool(self, pooling: Callable[..., Tensor], token_embeddings: Tensor) -> Tensor:
        """Call a pooling module on each run, as if that were a batch without padding.

        Args:
            pooling: `[count, length, 384]` and a mask `[count, length]` -> `[count, 384]`.
            token_embeddings: `[total_tokens, 384]`.

        Returns:
            `[batch, 384]`, in the order of `lengths`.
        """
        pooled = [
            pooling(run.block(token_embeddings), run.block(self.attention_mask))
            for run in self._runs
        ]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled)


def _send(array: "np.ndarray[Any, Any]", device: torch.device | str) -> Tensor:
    """Make a tensor on the device; on a GPU from pinned memory, without waiting for it."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _varlen(query: Tensor) -> Callable[..., Tensor] | None:
    """The attention that torch 2.10 brought for this form: on a GPU, in 16 bits."""
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return None
        return varlen_attn  # type: ignore[return-value]
    return None


def _has_products(query: Tensor) -> bool:
    """Whether short sentences attend by `bmm`."""
    return (
        not torch.compiler.is_compiling()  # which would compile the trial
        and query.dtype == torch.float32
        and query.device.type == "cpu"
        and _products_keep_bits(query.shape[1], query.shape[2], torch.get_num_threads())
    )


@functools.cache
def _products_keep_bits(heads: int, size: int, threads: int) -> bool:
    """Try out whether `_attend_by_products` gives a sentence the same bits alone and among others,
    on this processor, with so many threads as now.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        random = torch.Generator("cpu").manual_seed(0)
        make: dict[str, Any] = {"generator": random, "dtype": torch.float32, "device": "cpu"}
        for length in (1, 2, 3, 5, 8, 11, 16, 21, 30, 45, 64, 99, _SHORT):
            shape = (3, 3 * length, heads, size)
            query, key, value = torch.randn(shape, **make).unbind()
            run = _Run(0, 3 * length, 3, length)
            whole = _attend_by_products(run, query, key, value, size**-0.5)
            for start, count in ((0, 1), (1, 1), (1, 2)):
                run = _Run(start * length, (start + count) * length, count, length)
                some = _attend_by_products(run, query, key, value, size**-0.5)
                if not torch.equal(some, whole[start : start + count]):
                    return False
    return True


def _attend_by_products(
    run: _Run, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """`attention` for one run, with all scores at once; tensors and result as in `_attend`.

    The fused kernel takes a head of a sentence at a time, which pays if there are many scores.
    """
    query, key, value = (_by_head(run, tensor) for tensor in (query, key, value))
    scores = torch.baddbmm(query.new_empty(1, 1, 1), query, key.mT, beta=0, alpha=scale)
    context = torch.bmm(scores.softmax(-1), value)  # [count x heads, length, head_size]
    return context.view(run.count, -1, *context.shape[1:]).transpose(1, 2)


def _by_head(run: _Run, tensor: Tensor) -> Tensor:
    """`[total_tokens, heads, head_size]` -> `[count x heads, length, head_size]`."""
    if run.count == 1:  # the same view in fewer steps, which a query is made of
        return tensor[run.start : run.stop].transpose(0, 1)
    return run.block(tensor).transpose(1, 2).flatten(0, 1)


def _attend(run: _Run, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`attention` for one run: all tensors `[total_tokens, heads, head_size]`.

    Returns:
        context `[count, length, heads, head_size]`.
    """
    mask = None
    missing = -run.length % _STEP
    if missing and query.device.type == "cpu" and query.dtype in _WINDOWED:
        # Less work than the odd keys would be.
        keys, values = (_windows(run, missing, tensor) for tensor in (key, value))
        mask = _mask(run.length, missing, query.dtype)
    else:
        keys, values = run.block(key), run.block(value)
    context = F.scaled_dot_product_attention(  # [count, heads, length, head_size]
        run.block(query).transpose(1, 2),
        keys.transpose(1, 2),
        values.transpose(1, 2),
        mask,
        scale=scale,
    )
    return context.transpose(1, 2)


def _windows(run: _Run, missing: int, tensor: Tensor) -> Tensor:
    """Return `run.block`, each sentence with the `missing` rows behind it; a view if they exist."""
    if run.stop + missing > len(tensor):
        rows = F.pad(tensor[run.start : run.stop], (0, 0, 0, 0, 0, missing))
        start = 0
    else:
        rows, start = tensor, run.start
    row, head, one = rows.stride()
    return rows.as_strided(
        (run.count, run.length + missing, *rows.shape[1:]),
        (run.length * row, row, head, one),
        rows.storage_offset() + start * row,
    )


@functools.lru_cache(maxsize=2048)
def _mask(length: int, missing: int, dtype: torch.dtype) -> Tensor:
    """0 for a sentence's own keys, -inf for those behind it: `[1, 1, length, length + missing]`."""
    with torch.inference_mode(False):
        mask = torch.zeros(length + missing, dtype=dtype, device="cpu")
        mask[length:] = -torch.inf
        return mask.expand(1, 1, length, -1)


def plan_batches(
    lengths: Sequence[int], token_budget: int, batch_size: int | None = None
) -> list[list[int]]:
    """Decide which sentences to compute together.

    Args:
        lengths: Their numbers of tokens.
        token_budget: Tokens that a batch may have; a longer sentence is a batch of its own.
        batch_size: Sentences that a batch may have.

    Returns:
        For each batch the rows of `lengths` in it. Equal lengths stand together, which makes long
        runs, and the longest come first: if memory runs out, it does at once.

    >>> plan_batches([2, 5, 3, 2], token_budget=7)
    [[1], [2, 0, 3]]
    """
    batches: list[list[int]] = []
    room = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not batches or lengths[row] > room or len(batches[-1]) == batch_size:
            batches.append([])
            room = token_budget
        batches[-1].append(row)
        room -= lengths[row]
    return batches


def rows_of(
    batch: Sequence[int], input_ids: list[list[int]], token_type_ids: list[list[int]] | None
) -> tuple[list[list[int]], list[list[int]] | None]:
    """The ids and the types of the rows that `plan_batches` put into one batch."""
    types = None if token_type_ids is None else [token_type_ids[row] for row in batch]
    return [input_ids[row] for row in batch], types


def make_batch(
    input_ids: list[list[int]],
    token_type_ids: list[list[int]] | None,
    device: torch.device,
    tokenizer: WordPieceTokenizer | None,
    multiple: int = 16,
) -> Batch:
    """Make a batch of rows of ids on a device: packed, but on mps padded, by the tokenizer.

    Apple's devices don't have all that the packed form needs, and it has not been tried there.

    Args:
        input_ids, token_type_ids, device: As in `PackedBatch`.
        tokenizer: What pads.
        multiple: On a CPU, what the number of rows has to be a multiple of.
    """
    if device.type == "mps" and tokenizer is not None:
        return Batch(**tokenizer.pad(input_ids, device, token_type_ids))
    multiple_of = 1
    if device.type == "cpu":
        total = sum(map(len, input_ids))
        multiple_of = next((least for above, least in _MULTIPLES if total > above), multiple)
    return PackedBatch(input_ids, device, multiple_of, token_type_ids)


def embed(
    pipeline: Pipeline,
    input_ids: list[list[int]],
    token_type_ids: list[list[int]] | None = None,
    multiple: int = 16,
) -> Tensor:
    """Compute one batch: rows of ids -> `[n, 384]`."""
    batch = make_batch(input_ids, token_type_ids, pipeline.device, pipeline.tokenizer, multiple)
    sentence_embedding: Tensor = pipeline(batch)["sentence_embedding"]
    return sentence_embedding


def default_budget(device: torch.device, dtype: torch.dtype) -> int:
    """Return how many tokens to compute at a time.

    A pass that is too small leaves the processor waiting, one that is too large falls out of its
    cache. On two cores 2,048 tokens were best in float32, 4,096 in bfloat16 and 1,024 in float64;
    half or twice as many are some per cent slower. A GPU wants more at once: on an H100 32,768 were
    up to 1.8 times as fast as 2,048 in float32, up to 4 times in 16 bits, and about as fast as
    131,072.
    """
    if device.type == "cuda":
        return 32768
    return {torch.bfloat16: 4096, torch.float64: 1024}.get(dtype, 2048)


def keeps_bits(
    embed: Callable[[list[list[int]]], Tensor], vocab_size: int, max_seq_length: int
) -> bool:
    """Try out whether `embed` gives each row of ids the same bits alone and among others.

    Three rows each of every length up to 40, and of longer ones with every remainder by 16: alone,
    between others of the same length, and of other ones, in both orders, from even and odd places.
    """
    random = torch.Generator("cpu").manual_seed(0)
    lengths = [*range(2, 41), *range(41, max_seq_length, 17), max_seq_length]
    rows = [
        torch.randint(vocab_size, (length,), generator=random, device="cpu").tolist()
        for length in lengths
        if length <= max_seq_length
        for _ in range(3)
    ]
    together = embed(rows)
    shifted = embed([rows[3], *rows])  # three tokens before all others
    by_turns = [*rows[::3], *rows[2::3], *rows[1::3]]  # no two equal lengths are neighbours
    back = torch.arange(len(rows), device="cpu").view(-1, 3)[:, [0, 2, 1]].T.flatten()
    return (
        torch.equal(shifted[1:], together)
        and torch.equal(embed(rows[::-1]).flip(0), together)
        and torch.equal(embed(by_turns), together[back.to(together.device)])
        and all(
            torch.equal(embed(rows[first : first + count]), together[first : first + count])
            for count, start, step in ((1, 0, 3), (2, 1, 3))
            for first in range(start, len(rows), step)
        )
    )

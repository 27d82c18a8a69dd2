"""The matrix products, faster: `nn.Linear` with a second layout of its weight.

In: the linear layers of `bert.py`. Out: the same layers, whose `forward` multiplies by a copy of
the weight in the layout that suits the processor, where no gradient is recorded. Everything else
(training, `torch.compile`, `torch.export`, other devices, other dtypes) goes through `F.linear`,
which is the definition. Next: `encoder.py`.

Where the time goes. A token costs 21.2 MFLOP in the linear layers, and attention 0.0092 MFLOP for
each token it looks at, so that a text of 256 tokens spends a tenth of its arithmetic there. A pass
over a thousand tokens reads the 42 MB of weights once, a query of ten tokens as well: long batches
are limited by arithmetic, single queries by memory. `scripts/bench.py` measures the rate of these
products alone, and how much of it the whole reaches.

Why a second layout. A linear layer computes x Wᵀ, each output a dot product of two rows. Libraries
have a kernel of their own for a handful of rows, which adds up in another order, and split a long
sum between threads: the same text then gets other bits in another batch. Two layouts avoid that:

- `Transposed` keeps Wᵀ, so that the product runs along contiguous columns, and adds up slices of
  384: no kernel has reason to split those, and each output is one chain of multiply-adds in the
  order of the columns, for any number of rows. Public operators only.
- `Packed` keeps W in oneDNN's blocked order: the operators that `torch.compile` emits when it
  freezes a model. They are no public API, so that they are looked up, tried and compared with
  `F.linear` first. They have bfloat16 kernels for the processor's matrix units.

A layout is chosen once for each dtype and shape, by `layout_for`: it is tried on a small product,
must agree with `F.linear`, and should give a row the same bits in any company. If none can be used,
speed is lost and nothing else.
"""

import functools
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.nn.modules.module as _any_module
from torch import Tensor, nn
from torch.autograd import forward_ad

from minilm.bert import BertFeedForward

__all__ = [
    "FastFeedForward",
    "FastLinear",
    "Layout",
    "Packed",
    "Transposed",
    "accelerate",
    "check_copies",
    "layout_for",
]

_DTYPES = (torch.float32, torch.bfloat16)
_SLICE = 384  # columns that are added up in one chain
_TRIAL = (2, 10, 16, 17, 40, 100, 300, 511)  # numbers of rows, compared with 600
_SAMPLES = 32  # numbers of a weight that are compared before each use of its copy


class Layout:
    """One way to store a weight, and the product that goes with it.

    Attributes:
        row_invariant: Whether the start-up trial found that a row gets the same bits in any
            company; None before it.
    """

    row_invariant: bool | None = None

    def pack(self, weight: Tensor) -> Any:
        """`[out, in]` -> the copy that `linear` takes."""
        raise NotImplementedError

    def linear(self, rows: Tensor, packed: Any, bias: Tensor | None, gelu: bool) -> Tensor:
        """`[rows, in]` -> `[rows, out]`: rows Wᵀ + bias, or GELU of that."""
        raise NotImplementedError


class Transposed(Layout):
    """Wᵀ, contiguous, multiplied in slices of 384 input columns."""

    def pack(self, weight: Tensor) -> list[Tensor]:
        return list(torch.split(weight.t().contiguous(), _SLICE))

    def linear(self, rows: Tensor, packed: list[Tensor], bias: Tensor | None, gelu: bool) -> Tensor:
        columns = torch.split_with_sizes(rows, [len(part) for part in packed], dim=-1)
        output = torch.mm(columns[0], packed[0])
        for part, weight in zip(columns[1:], packed[1:], strict=True):
            output.addmm_(part, weight)
        if bias is not None:
            output.add_(bias)
        return F.gelu(output) if gelu else output


class Packed(Layout):
    """W in oneDNN's blocked order.

    With the matrix units of some processors oneDNN cuts the long sums of a product of 33 to 511
    rows into parts, and rounds in between. Where the trial sees that, such a product is made of
    products of 32 rows.

    Attributes:
        row_blocks: Whether it is.
    """

    def __init__(self, row_blocks: bool = False) -> None:
        self.row_blocks = row_blocks

    def pack(self, weight: Tensor) -> Tensor:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1024)
        return packed

    def linear(self, rows: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        multiply = torch.ops.mkldnn._linear_pointwise.default
        # The second "none": by erf, not approximated.
        after: tuple[Any, ...] = ("gelu", [], "none") if gelu else ("none", [], "")
        if self.row_blocks and 32 < len(rows) < 512:
            parts = torch.split(rows, 32)
            return torch.cat([multiply(part, packed, bias, *after) for part in parts])
        output: Tensor = multiply(rows, packed, bias, *after)
        return output


@functools.cache
def layout_for(dtype: torch.dtype, out_features: int, in_features: int) -> Layout | None:
    """The layout for weights of this dtype and shape on this processor; None for `F.linear`.

    The first of the candidates that agrees with `F.linear` and keeps rows apart; if none keeps
    them apart, the first that agrees.
    """
    candidates = []
    for layout in _candidates(dtype, in_features):
        try:
            layout.row_invariant = _trial(layout, dtype, out_features, in_features)
        except (AttributeError, RuntimeError):  # no such operator in this build, or it says no
            continue
        if layout.row_invariant:
            return layout
        if layout.row_invariant is not None:
            candidates.append(layout)
    return candidates[0] if candidates else None


def _candidates(dtype: torch.dtype, in_features: int) -> list[Layout]:
    # A rule, and not a race: a race has another winner now and then.
    if dtype == torch.float32 and in_features <= _SLICE:
        return [Packed(), Transposed()]  # in the order of speed; with the same bits
    if dtype == torch.float32:  # oneDNN cuts long sums: faster by 3 %, less exact by a sixth
        return [Transposed(), Packed()]
    if dtype == torch.bfloat16:
        return [Packed(), Packed(row_blocks=True)]
    return []


def _trial(layout: Layout, dtype: torch.dtype, out_features: int, in_features: int) -> bool | None:
    """Whether rows keep their bits in any company; None if the product is wrong."""
    random = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad():
        weight = torch.randn(out_features, in_features, generator=random).to(dtype) * 0.05
        bias = torch.randn(out_features, generator=random).to(dtype)
        rows = torch.randn(600, in_features, generator=random).to(dtype)
        packed = layout.pack(weight)
        exact = F.linear(rows[:32].double(), weight.double(), bias.double())
        bound = 8 * torch.finfo(dtype).eps * exact.abs().max()
        row_invariant = True
        for gelu in (False, True) if out_features > in_features else (False,):  # as in the model
            product = layout.linear(rows, packed, bias, gelu)
            expected = F.gelu(exact) if gelu else exact
            if not ((product[:32].double() - expected).abs() <= bound).all():
                return None
            row_invariant = row_invariant and all(
                torch.equal(layout.linear(rows[:count], packed, bias, gelu), product[:count])
                for count in _TRIAL
            )
        return row_invariant


class FastLinear(nn.Linear):
    """`nn.Linear` that multiplies in the dtype of its weight, by the fastest layout there is.

    A faster layout is a copy of the weight, made when it is first needed, and made again when the
    weight has changed. It serves where no gradient is recorded, on a CPU; elsewhere this is
    `F.linear`.
    """

    _copy: "_Copy | None" = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear calls it
        """`[..., in]` -> `[..., out]`, in the dtype of the weight."""
        output = self.fast(input)
        return super().forward(input.to(self.weight.dtype)) if output is None else output

    def fast(self, hidden_states: Tensor, gelu: bool = False) -> Tensor | None:
        """What `forward` gives, or the GELU of it, by the copy; None where the copy can't serve."""
        weight, bias = self.weight, self.bias
        rows = hidden_states.to(weight.dtype)
        if not _is_plain(rows, weight, bias):
            return None
        copy = self._copy
        if copy is None or copy.is_stale(weight):
            copy = self._copy = _Copy.of(weight)
        if copy.layout is None:
            return None
        if rows.dim() == 2:
            return copy.layout.linear(rows, copy.packed, bias, gelu)
        output = copy.layout.linear(rows.flatten(end_dim=-2), copy.packed, bias, gelu)
        return output.view(*rows.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_copy"}


class FastFeedForward(BertFeedForward):
    """`BertFeedForward`, whose first product applies the GELU to what it has just computed.

    It then need not be read again: 1536 numbers a token, the widest tensor of the model.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., 384]` -> `[..., 384]`."""
        first = self.intermediate
        if type(first) is FastLinear and not _has_hooks(first):
            activation = first.fast(hidden_states, gelu=True)  # [..., 384] -> [..., 1536]
            if activation is not None:
                output: Tensor = self.dropout(self.output(activation))
                return output
        return super().forward(hidden_states)


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its `forward`."""
    return bool(
        "forward" in module.__dict__  # set on this one object
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _any_module._global_forward_hooks
        or _any_module._global_forward_pre_hooks
    )


def _is_plain(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether this is an ordinary product of ordinary tensors whose gradient nobody wants."""
    if (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None  # inside a torch.func transform
        or forward_ad._current_level >= 0
    ):
        return False
    if torch.is_grad_enabled() and (
        rows.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return False
    return (
        weight.dtype in _DTYPES
        and type(rows) is Tensor
        and type(weight) is nn.Parameter  # not one that torch.func or a parametrization put there
        and weight.device.type == "cpu"
        and rows.device == weight.device
        and rows.dim() > 1
        and rows.numel() > 0
        and not weight.is_inference()  # it would not count its changes
        and weight.is_contiguous()
        and not torch.is_autocast_enabled("cpu")
    )


@dataclass(frozen=True)
class _Copy:
    """A weight in its layout, and what is needed to see that the weight has changed since.

    It does not travel: where a module's attributes are copied one by one, as a parametrized
    module's are, None stands in its place.
    """

    layout: Layout | None
    packed: Any
    address: int
    version: int
    numbers: "np.ndarray[Any, Any]"  # some of the weight's numbers, as they are now
    before: bytes  # and as they were
    checksum: int

    @classmethod
    def of(cls, weight: Tensor) -> "_Copy":
        with torch.inference_mode(False), torch.no_grad():
            plain = weight.detach()
            layout = layout_for(plain.dtype, *plain.shape)
            words = plain.view(torch.int16 if plain.element_size() == 2 else torch.int32)
            numbers = words.numpy().reshape(-1)[:: max(1, plain.numel() // _SAMPLES) | 1]
            return cls(
                layout,
                None if layout is None else layout.pack(plain),
                plain.data_ptr(),
                weight._version,
                numbers,
                numbers.tobytes(),
                _checksum(plain),
            )

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def is_stale(self, weight: Tensor) -> bool:
        """Whether the weight has other contents than this copy.

        torch counts changes in place, and a new tensor has another address. Changes through
        `.data` are not counted: they are seen by the sample if they touch the whole tensor, as an
        optimizer's do, and otherwise by `check_copies`.
        """
        return (
            weight._version != self.version
            or weight.data_ptr() != self.address
            or self.numbers.tobytes() != self.before
        )


def _checksum(weight: Tensor) -> int:
    return zlib.crc32(weight.flatten().view(torch.uint8).numpy().data)


@functools.cache
def _keep_freed_memory() -> None:
    """Let the C library keep what is freed, up to 64 MB, in place of giving it back each time.

    A pass allocates the same tensors of some MB over and over. glibc asks the system for blocks
    above a threshold, page by page, and returns them when they are freed: up to a fifth of the
    time in bfloat16. Freeing one block of almost 32 MB moves the threshold there (mallopt(3),
    M_MMAP_THRESHOLD). It is never written to, so that it takes no memory.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


_FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear,
    BertFeedForward: FastFeedForward,
}


def accelerate(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Make every `nn.Linear` in `model` a `FastLinear`: the same object, parameters and hooks.

    Args:
        model: Changed in place. Linear layers of other classes stay what they are.
        dtype: What to convert their weights to; None leaves them. The rest of the model keeps its
            dtype: with bfloat16 products the sums between them stay float32.
    """
    _keep_freed_memory()
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]
        if isinstance(module, FastLinear) and dtype is not None:
            # Parameters stay what they are, ordinary or inference tensors, wherever this is called.
            with torch.inference_mode(module.weight.is_inference()):
                module.to(dtype)


def check_copies(model: nn.Module, tokens: int) -> None:
    """Drop each copy that is not of today's weight, which means to read all weights.

    Args:
        model: The model.
        tokens: How many are going to be computed. Nothing is done for so few that reading the
            weights would take a noticeable part of the time.
    """
    if tokens < 4096:
        return
    for module in model.modules():
        if isinstance(module, FastLinear):
            copy = module._copy
            if copy is not None and copy.checksum != _checksum(module.weight.detach()):
                module._copy = None

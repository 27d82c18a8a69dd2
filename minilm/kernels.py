"""The matrix products, faster: `nn.Linear` with a second layout of its weight.

In: the linear layers of `bert.py`. Out: the same layers, whose `forward` multiplies by a copy of
the weight in the layout that suits the processor, within `fast_products`, which `encode` enters.
Everything else (a plain call, training, `torch.compile`, `torch.export`, other devices and dtypes)
goes through `F.linear`, which is the definition. Next: `encoder.py`.

The floor. A token costs 2 x 6 x (4 x 384² + 2 x 384 x 1536) = 21.2 MFLOP in the linear layers, and
attention 0.0092 MFLOP for each token it looks at, so that a text of 256 tokens spends a tenth of
its arithmetic there. A pass reads all weights once, 42 MB in float32, whether it is of ten tokens
or of two thousand: long batches are limited by arithmetic, a single query by memory, and by the
some 250 calls from Python between its products.

Where the time goes, in µs a token, as `scripts/where_time_goes.py` printed it for sentences of 8 to
25 tokens on two cores with AMX, the matrix units of Intel's processors:

                      whole   products   attention   norms, sums, copies   other, Python
    float32              77        78%          6%                    5%             11%
    bfloat16             28        39%         19%                   20%             23%
    float32, 1 query    460        38%          3%                    6%             54%

The same products alone take 63 µs in float32 and 10 in bfloat16, and 7 in 8 bits, or 15 with the
rounding to 8 bits before them as torch does it. So on such a processor 8-bit products could make
bfloat16 faster by a ninth at the very best, at the price of accuracy: there are none here.

What each trick is worth (the time without it, over the time with it, same sentences):

                                            float32   bfloat16
    sentences end to end (packed.py)           1.16       1.50
    a second layout of the weights             1.04       1.24
    GELU within the product                    1.02       1.10
    rows up to a multiple of 64 (packed.py)    1.02       1.35
    keys up to a multiple of 16 (packed.py)    1.01       1.12
    freed memory kept                          1.02       1.13

In float32 the processor multiplies nearly all of the time, whatever is done around it; bfloat16
products are six times as fast, and then all else counts.

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

import ctypes
import functools
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.nn.modules.module as _any_module
from torch import Tensor, nn

from minilm.bert import BertFeedForward

__all__ = [
    "ByRows",
    "FastFeedForward",
    "FastLinear",
    "Layout",
    "Packed",
    "Transposed",
    "accelerate",
    "fast_products",
    "give_back_freed_memory",
    "keep_few_kernels",
    "layout_for",
]

_DTYPES = (torch.float32, torch.bfloat16)
_SLICE = 384  # columns that are added up in one chain
_FEW = 16  # rows, up to which the call itself takes a noticeable part of the time
_TRIAL = (2, 10, 16, 17, 40, 100, 300, 511)  # numbers of rows, compared with 600
_SAMPLES = 8  # numbers of a weight that are compared before each use of its copy


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
    """Wᵀ, contiguous, multiplied in slices of 384 input columns; at once for a few rows."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    def linear(self, rows: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        if bias is not None and len(packed) <= _SLICE:
            output = torch.addmm(bias, rows, packed)
        elif len(packed) <= _SLICE or len(rows) <= _FEW:
            output = torch.mm(rows, packed)
        else:
            columns, weights = torch.split(rows, _SLICE, dim=-1), torch.split(packed, _SLICE)
            output = torch.mm(columns[0], weights[0])
            for part, weight in zip(columns[1:], weights[1:], strict=True):
                output.addmm_(part, weight)
        if bias is not None and len(packed) > _SLICE:
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


class ByRows(Layout):
    """Both: `Transposed` for a few rows, where a call costs little, and `Packed` for more."""

    few = Transposed()
    many = Packed()

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.few.pack(weight), self.many.pack(weight)

    def linear(
        self, rows: Tensor, packed: tuple[Tensor, Tensor], bias: Tensor | None, gelu: bool
    ) -> Tensor:
        if len(rows) <= _FEW:
            return self.few.linear(rows, packed[0], bias, gelu)
        return self.many.linear(rows, packed[1], bias, gelu)


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
        return [ByRows(), Packed(), Transposed()]  # in the order of speed
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


class _Thread(threading.local):
    """What one thread's layers multiply by: nothing outside `fast_products`."""

    products: "Mapping[nn.Module, _Product]" = MappingProxyType({})


_thread = _Thread()


@contextmanager
def fast_products(modules: Iterable[nn.Module], tokens: int) -> Iterator[None]:
    """Inside, on this thread, linear layers on a CPU multiply by copies of their weights.

    All is decided here, once, and not at each product: which layers can have a copy, and whether
    it is of today's weight. So inside, weights are not to be changed, nor replaced by torch.func,
    nor derivatives taken forwards. Where a gradient is recorded or torch compiles, layers stay with
    `F.linear` all the same.

    Args:
        modules: Of a model that went through `accelerate`.
        tokens: How many are going to be computed. From 4,096 on, reading all weights takes no
            noticeable part of the time, and every number is compared, not some.
    """
    products: dict[nn.Module, _Product] = {}
    if not torch.is_autocast_enabled("cpu"):
        feed_forwards = []
        for module in modules:
            if isinstance(module, FastLinear):
                product = module.product(every_number=tokens >= 4096)
                if product is not None:
                    products[module] = product
            elif isinstance(module, FastFeedForward):
                feed_forwards.append(module)
        for module in feed_forwards:
            first = module.intermediate
            if type(first) is FastLinear and first in products and not _has_hooks(first):
                products[module] = products[first]
    before, _thread.products = _thread.products, products
    try:
        yield
    finally:
        _thread.products = before


def _product_of(module: nn.Module) -> "_Product | None":
    """How to multiply now; None for `F.linear`."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return _thread.products.get(module)


class FastLinear(nn.Linear):
    """`nn.Linear` that multiplies in the dtype of its weight, and within `fast_products` by a copy
    of it in the fastest layout there is.

    The copy is made when it is first needed, and made again when the weight has changed.
    """

    _copy: "_Copy | None" = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear calls it
        """`[..., in]` -> `[..., out]`, in the dtype of the weight."""
        product = _product_of(self)
        if product is None:
            return super().forward(input.to(self.weight.dtype))
        return product(input)

    def product(self, every_number: bool) -> "_Product | None":
        """The product by the copy, which is made, or made anew, if need be; None if it can't be.

        Args:
            every_number: Whether to compare all numbers of the weight with those that were copied.
        """
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        copy = self._copy
        if "bias" not in self._parameters:  # another object at each call, as when it is pruned
            copy = self._copy = None
        elif copy is None or not copy.is_of(weight, bias, every_number):
            copy = self._copy = _Copy.of(weight, bias)
        return None if copy is None else copy.product

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_copy"}


class FastFeedForward(BertFeedForward):
    """`BertFeedForward`, whose first product applies the GELU to what it has just computed.

    It then need not be read again: 1536 numbers a token, the widest tensor of the model.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[..., 384]` -> `[..., 384]`."""
        product = _product_of(self)
        if product is None:
            return super().forward(hidden_states)
        activation = product(hidden_states, gelu=True)  # [..., 384] -> [..., 1536]
        output: Tensor = self.dropout(self.output(activation))  # [..., 1536] -> [..., 384]
        return output


@dataclass(frozen=True, slots=True)
class _Product:
    """x Wᵀ + b."""

    layout: Layout
    packed: Any
    bias: Tensor | None
    dtype: torch.dtype

    def __call__(self, hidden_states: Tensor, gelu: bool = False) -> Tensor:
        """`[..., in]` -> `[..., out]`, with the GELU if asked for."""
        rows = hidden_states.to(self.dtype)
        if rows.dim() == 2:
            return self.layout.linear(rows, self.packed, self.bias, gelu)
        output = self.layout.linear(rows.reshape(-1, rows.shape[-1]), self.packed, self.bias, gelu)
        return output.view(*rows.shape[:-1], output.shape[-1])


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


@dataclass(frozen=True)
class _Copy:
    """A weight in its layout, and what is needed to see that the weight has changed since.

    It does not travel: where a module's attributes are copied one by one, as a parametrized
    module's are, None stands in its place.
    """

    product: _Product | None
    weight: Tensor
    bias: Tensor | None
    shape: torch.Size
    address: int
    version: int
    numbers: "np.ndarray[Any, Any]"  # some of the weight's numbers, as they are now
    before: bytes  # and as they were
    checksum: bytes

    @classmethod
    def of(cls, weight: Tensor | None, bias: Tensor | None) -> "_Copy | None":
        """Make one; None if the weight is not an ordinary parameter on a CPU."""
        if (
            type(weight) is not nn.Parameter  # but one that a parametrization computes
            or weight.dtype not in _DTYPES
            or weight.device.type != "cpu"
            or weight.layout != torch.strided
            or not weight.is_contiguous()
            or weight.is_inference()  # it would not count its changes
            or not _fits(bias, weight)
        ):
            return None
        with torch.inference_mode(False), torch.no_grad():
            plain = weight.detach()
            layout = layout_for(plain.dtype, *plain.shape)
            product = None
            if layout is not None:
                product = _Product(layout, layout.pack(plain), bias, plain.dtype)
            words = plain.view(torch.int16 if plain.element_size() == 2 else torch.int32)
            numbers = words.numpy().reshape(-1)[:: max(1, plain.numel() // _SAMPLES) | 1]
            return cls(
                product,
                weight,
                bias,
                plain.shape,
                plain.data_ptr(),
                weight._version,
                numbers,
                numbers.tobytes(),
                _checksum(plain),
            )

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def is_of(self, weight: Tensor | None, bias: Tensor | None, every_number: bool) -> bool:
        """Whether this is the copy of these tensors as they are now.

        torch counts changes in place, and other contents of `.data` have another address, since
        the memory of those before is held here. Changes in place through `.data` are not counted:
        they are seen by the sample if they touch the whole tensor, as an optimizer's do, and
        otherwise if every number is compared.
        """
        return (
            weight is self.weight
            and bias is self.bias
            and weight._version == self.version
            and weight.data_ptr() == self.address
            and weight.shape == self.shape
            and weight.is_contiguous()
            and _fits(bias, weight)
            and self.numbers.tobytes() == self.before
            and (not every_number or self.checksum == _checksum(weight.detach()))
        )


def _fits(bias: Tensor | None, weight: Tensor) -> bool:
    """Whether the operators that know the weight's copy can add this bias."""
    return bias is None or (
        bias.dtype == weight.dtype
        and bias.device == weight.device
        and len(bias) == len(weight)
        and bias.is_contiguous()
    )


def _checksum(weight: Tensor) -> bytes:
    """The parity of the rows and of the columns of all bits, laid out in a rectangle.

    Any change is seen but one of four corners of a rectangle by the same bits; in a quarter of the
    time of a CRC.
    """
    data = weight.flatten().view(torch.uint8).numpy()
    whole = data.size // 4096 * 4096
    words = data[:whole].view(np.uint64).reshape(-1, 512)
    parities = (np.bitwise_xor.reduce(words, axis=axis).tobytes() for axis in (0, 1))
    return b"".join([*parities, data[whole:].tobytes()])


@functools.cache
def _keep_freed_memory() -> None:
    """Let the C library keep what is freed, up to 64 MB, in place of giving it back each time.

    A pass allocates the same tensors of some MB over and over. glibc asks the system for blocks
    above a threshold, page by page, and returns them when they are freed. Freeing one block of
    almost 32 MB moves the threshold there (mallopt(3), M_MMAP_THRESHOLD). It is never written to,
    so that it takes no memory.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def keep_few_kernels() -> None:
    """Let oneDNN, and torch before it, keep 16 of the kernels made for a size, instead of 1,024.

    Each takes up to 0.1 MB, and batches of texts have so many sizes that few are used again: a
    process that embeds for hours grew by 100 MB, and was no faster for it. This sets the
    environment of the process, but for what is set there, and works only before its first product:
    so it is for processes of our own.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")


def give_back_freed_memory() -> None:
    """The reverse, for once: what is freed goes back to the system, if the C library is glibc.

    Between batches of all sizes there remain gaps that nothing fits in, and a process that embeds
    for hours holds more and more of them.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@functools.cache
def _c_library() -> Any:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # not of a kind that knows the word
        return None


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

"""The matrix products, faster: `nn.Linear`, where that pays with a second layout of its weight.

In: the linear layers of `bert.py`. Out: the same layers, each with a `forward` among its own
attributes, which multiplies in the way that suits the processor, often by a copy of the weight in
another layout, within `fast_products`, which `encode` enters.
Everything else (a plain call, training, `torch.compile`, `torch.export`, other devices and dtypes)
goes through `F.linear`, which is the definition. Next: `encoder.py`.

The floor. A token costs 2 x 6 x (4 x 384² + 2 x 384 x 1536) = 21.2 MFLOP in the linear layers, and
attention 0.0092 MFLOP for each token it looks at, so that a text of 256 tokens spends a tenth of
its arithmetic there. A pass reads all weights once, 42 MB in float32, whether it is of ten tokens
or of two thousand: long batches are limited by arithmetic, a single query by memory, and by the
some 250 calls from Python between its products.

Where the time goes, in µs a token, as `scripts/bench/where_time_goes.py` printed it for sentences
of 8 to 25 tokens on two cores with AMX, the matrix units of Intel's processors:

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

These figures are of such an Intel processor, when all its products were by the two layouts that it
still takes, with the rows of a query not filled up.

Why a second layout. A linear layer computes x Wᵀ, each output a dot product of two rows. Libraries
have a kernel of their own for a handful of rows, which adds up in another order, and split a long
sum between threads: the same text then gets other bits in another batch. And they differ in how
much they round. A chain of multiply-adds rounds at each step, in proportion to what it has so far:
two chains of half the length, added up, round less by a third. Relative rounding errors of one
product (root mean square), on the published weights, as `scripts/bench/where_time_goes.py` printed
them on an AMD EPYC (Zen 5), with its AVX-512 and as with AVX2:

                                       384 -> 384   384 -> 1536   1536 -> 384
    `F.linear`, and so the reference      2.5e-07       2.5e-07       2.5e-07
    oneDNN, one chain                     3.5e-07       3.5e-07       5.2e-07
    oneDNN, slices of 192 columns         2.5e-07       2.5e-07       2.5e-07
    oneDNN, slices of 96 columns          1.8e-07       1.8e-07       1.9e-07

So three things make a good product: a row keeps its bits in any company, the error is not above
`F.linear`'s, and it is fast. What has them depends on the processor:

- `Plain` is `F.linear` on the weight itself. Where batches are filled up to a multiple of 16 rows,
  as `packed.py` fills them, it keeps a row's bits on AMD's processors: nothing to copy, nothing to
  become out of date. The choice with AVX2.
- `Packed` keeps W in oneDNN's blocked order: the operators that `torch.compile` emits when it
  freezes a model. They are no public API, so that they are looked up, tried and compared with
  `F.linear` first. They multiply twice as fast on AMD's processors with AVX-512, which MKL, the
  library behind `F.linear`, doesn't use there; in slices of 192 columns the result is that of
  `F.linear` to the bit. They have bfloat16 kernels for the processor's matrix units.
- `Transposed` keeps Wᵀ, so that the product runs along contiguous columns, and adds up slices of
  384, each one chain: for long sums on Intel's processors, whose `F.linear` mixes rows.
- `ByRows` is there for the shorter ones: `Transposed` for few rows, `Packed` for more.

A layout is chosen once for each dtype, shape and number of threads, by `layout_for`: all candidates
are tried on a small product. If none can be used, speed is lost and nothing else.
"""

import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeGuard

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
    "Plain",
    "Transposed",
    "accelerate",
    "fast_products",
    "give_back_freed_memory",
    "has_own_forward",
    "keep_few_kernels",
    "layout_for",
]

_DTYPES = (torch.float32, torch.bfloat16)
_SLICE = 384  # columns that are added up in one chain
_FEW = 16  # rows, up to which the call itself takes a noticeable part of the time
# Numbers of rows, each a multiple of 16 as in `packed.make_features`, tried with as many threads as
# there are now, and with one.
_TRIAL = (16, 32, 48, 80, 144, 272, 512)
_TRIAL_ALONE = (16, 48, 144)
_MOST_ERROR = 1.2  # times that of `F.linear`
_BLOCK = 512  # rows of a feed-forward sublayer at a time, whose inner tensor stays in the cache
_SAMPLES = 8  # numbers of a weight that are compared before each use of its copy


class Layout:
    """One way to store a weight, and the product that goes with it."""

    def pack(self, weight: Tensor) -> Any:
        """`[out, in]` -> the copy that `linear` takes."""
        raise NotImplementedError

    def linear(self, rows: Tensor, packed: Any, bias: Tensor | None, gelu: bool) -> Tensor:
        """`[rows, in]` -> `[rows, out]`: rows Wᵀ + bias, or GELU of that."""
        raise NotImplementedError


class Plain(Layout):
    """`F.linear` on the weight itself: no copy, so that nothing can be out of date."""

    def pack(self, weight: Tensor) -> Tensor:
        return weight

    def linear(self, rows: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        output = F.linear(rows, packed, bias)
        return F.gelu(output) if gelu else output


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

    Attributes:
        columns: How many input columns to add up in one chain. The chains are added up one after
            the other: less rounding, at the price of a call for each. None for all at once.
        row_blocks: Whether a product of 33 to 511 rows is made of products of 32. With the matrix
            units of some processors oneDNN cuts the long sums of such a product into parts, and
            rounds in between.
    """

    def __init__(self, columns: int | None = None, row_blocks: bool = False) -> None:
        self.columns = columns
        self.row_blocks = row_blocks

    def pack(self, weight: Tensor) -> list[Tensor]:
        parts = torch.split(weight, self.columns or weight.shape[1], dim=1)
        return [torch.ops.mkldnn._reorder_linear_weight(part.contiguous(), 1024) for part in parts]

    def linear(self, rows: Tensor, packed: list[Tensor], bias: Tensor | None, gelu: bool) -> Tensor:
        multiply = torch.ops.mkldnn._linear_pointwise.default
        if len(packed) > 1:
            nothing: tuple[Any, ...] = ("none", [], "")
            first, *others = torch.split(rows, self.columns or rows.shape[1], dim=1)
            output: Tensor = multiply(first, packed[0], bias, *nothing)
            for part, weight in zip(others, packed[1:], strict=True):
                output.add_(multiply(part, weight, None, *nothing))
            return torch.ops.aten.gelu_(output) if gelu else output
        # The second "none": by erf, not approximated.
        after: tuple[Any, ...] = ("gelu", [], "none") if gelu else ("none", [], "")
        if self.row_blocks and 32 < len(rows) < 512:
            blocks = torch.split(rows, 32)
            return torch.cat([multiply(block, packed[0], bias, *after) for block in blocks])
        output = multiply(rows, packed[0], bias, *after)
        return output


class ByRows(Layout):
    """`Transposed` for a few rows, where a call costs little, and `Packed` for more."""

    few = Transposed()
    many = Packed()

    def pack(self, weight: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.few.pack(weight), self.many.pack(weight)

    def linear(
        self, rows: Tensor, packed: tuple[Tensor, list[Tensor]], bias: Tensor | None, gelu: bool
    ) -> Tensor:
        if len(rows) <= _FEW:
            return self.few.linear(rows, packed[0], bias, gelu)
        return self.many.linear(rows, packed[1], bias, gelu)


_plain, _transposed, _by_rows, _packed = Plain(), Transposed(), ByRows(), Packed()
_sliced, _row_blocks = Packed(columns=192), Packed(row_blocks=True)

# What `layout_for` found, by dtype, shape, and what of torch's state a product may depend on.
_choices: dict[tuple[Any, ...], Layout | None] = {}


def layout_for(dtype: torch.dtype, out_features: int, in_features: int) -> Layout | None:
    """Return the layout for weights of this dtype and shape, on this processor with as many threads
    as now; None if there is no candidate but `F.linear`, which need not be tried.

    The first of the candidates that agrees with `F.linear`, gives a row the same bits in any
    company and with one thread, and is as exact as `F.linear` but for a fifth. If no candidate is,
    the most exact of those that keep a row's bits; if none does, the first that agrees.

    A candidate that raises is passed over for this time, and is tried again by the next call.
    """
    state = torch.get_num_threads(), torch.get_float32_matmul_precision()
    key = (dtype, out_features, in_features, *state)
    if key in _choices:
        return _choices[key]
    whole, tried = True, []
    chosen: Layout | None = None
    with _ordinary_state():
        for layout in _candidates(dtype, in_features):
            try:
                trial = _Trial.of(layout, dtype, out_features, in_features)
                if trial.is_right and trial.error <= _MOST_ERROR and trial.keeps_bits():
                    chosen = layout
                    break
                tried.append(trial)
            except (AttributeError, RuntimeError):
                whole = False
        else:
            right = sorted((t for t in tried if t.is_right), key=lambda trial: trial.error)
            exact_first = next((trial for trial in right if trial.keeps_bits()), None)
            if right:
                chosen = (exact_first or min(right, key=tried.index)).layout
    if whole:
        _choices[key] = chosen
    return chosen


def _candidates(dtype: torch.dtype, in_features: int) -> list[Layout]:
    """List candidates, the fastest first: by a rule, since a race has other winners at times."""
    has_packed = _has_packed(dtype)
    if dtype == torch.bfloat16:
        return [_packed, _row_blocks, _plain] if has_packed else [_plain]
    if dtype != torch.float32:
        return []
    if not has_packed:
        return [_plain, _transposed]
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return [_plain, _by_rows, _packed, _sliced, _transposed]
    if in_features <= _SLICE:
        return [_by_rows, _packed, _sliced, _plain, _transposed]
    # Where both libraries give the same bits for 384 columns, `mm` multiplies with AVX-512 too, as
    # on Intel's processors; on AMD's it takes twice as long as oneDNN.
    if layout_for(dtype, _SLICE, _SLICE) is _by_rows:
        return [_transposed, _sliced, _packed, _plain]
    return [_sliced, _plain, _transposed, _packed]


def _has_packed(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operators are in this build, and take this dtype on this processor."""
    operators = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(operators, "_reorder_linear_weight")
        and hasattr(operators, "_linear_pointwise")
        and (dtype != torch.bfloat16 or operators._is_mkldnn_bf16_supported())
    )


@contextmanager
def _ordinary_state() -> Iterator[None]:
    """Switch off gradients, autocast and the default device that the caller may have set."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        yield


@dataclass
class _Trial:
    """How one layout did.

    Attributes:
        is_right: Whether it agrees with `F.linear`, but for rounding.
        error: Its rounding error over that of `F.linear`, root mean square.
    """

    layout: Layout
    rows: Tensor
    packed: Any
    bias: Tensor
    gelus: tuple[bool, ...]
    is_right: bool
    error: float

    @classmethod
    def of(
        cls, layout: Layout, dtype: torch.dtype, out_features: int, in_features: int
    ) -> "_Trial":
        random = torch.Generator("cpu").manual_seed(0)
        make = {"generator": random, "dtype": torch.float32, "device": "cpu"}
        weight = torch.randn(out_features, in_features, **make).to(dtype) * 0.05  # type: ignore[call-overload]
        bias = torch.randn(out_features, **make).to(dtype)  # type: ignore[call-overload]
        rows = torch.randn(640, in_features, **make).to(dtype)  # type: ignore[call-overload]
        packed = layout.pack(weight)
        exact = F.linear(rows[:32].double(), weight.double(), bias.double())
        bound = 8 * torch.finfo(dtype).eps * exact.abs().max()
        gelus = (False, True) if out_features > in_features else (False,)  # as in the model
        is_right, errors = True, []
        for gelu in gelus:
            expected = F.gelu(exact) if gelu else exact
            off = layout.linear(rows[:32], packed, bias, gelu).double() - expected
            plain = _plain.linear(rows[:32], weight, bias, gelu).double() - expected
            is_right = is_right and bool((off.abs() <= bound).all())
            errors.append(float(off.norm() / plain.norm().clamp(min=1e-300)))
        return cls(layout, rows, packed, bias, gelus, is_right, max(errors))

    def keeps_bits(self) -> bool:
        """Whether rows keep their bits in any company, at any place, and with one thread."""
        threads = torch.get_num_threads()
        try:
            for gelu in self.gelus:
                whole = self.layout.linear(self.rows, self.packed, self.bias, gelu)
                for number, counts in ((threads, _TRIAL), (1, _TRIAL_ALONE)):
                    if number != torch.get_num_threads():  # never more: a forked child has one
                        torch.set_num_threads(number)
                    for count in counts:
                        for start in (0, 7):
                            rows = self.rows[start : start + count]
                            output = self.layout.linear(rows, self.packed, self.bias, gelu)
                            if not torch.equal(output, whole[start : start + count]):
                                return False
                if threads != torch.get_num_threads():
                    torch.set_num_threads(threads)
            return True
        finally:
            if threads != torch.get_num_threads():
                torch.set_num_threads(threads)


class _Thread(threading.local):
    """The copies that one thread's layers multiply by; none outside `fast_products`."""

    products: "Mapping[nn.Module, _Product]" = MappingProxyType({})


_thread = _Thread()


@contextmanager
def fast_products(modules: Iterable[nn.Module], tokens: int) -> Iterator[None]:
    """Have linear layers on a CPU multiply by copies of their weights, inside and on this thread.

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
            forward = module.__dict__.get("forward")
            if type(forward) is FastLinear and type(module) is nn.Linear:
                product = forward.product(every_number=tokens >= 4096)
                if product is not None:
                    products[module] = product
            elif type(forward) is FastFeedForward and type(module) is BertFeedForward:
                feed_forwards.append(module)
        for module in feed_forwards:
            first = module.intermediate
            if first in products and not _has_hooks(first):
                products[module] = products[first]
    before, _thread.products = _thread.products, products
    try:
        yield
    finally:
        _thread.products = before


def _product_of(module: nn.Module) -> "_Product | None":
    """Return what to multiply with now; None for `F.linear`."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return _thread.products.get(module)


class _Forward:
    """A `forward` of one module, which stands in the module's own attributes.

    So the module stays of its class, for all who ask for that; a copy of it gets one of its own,
    and what puts another module in its place leaves this behind.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)  # no circle, so that a model is freed at once

    @property
    def module(self) -> Any:
        module = self._module()
        if module is None:
            raise ReferenceError("the layer is gone that this one is a shallow copy of")
        return module

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)


class FastLinear(_Forward):
    """The `forward` of an `nn.Linear`, in the dtype of its weight.

    Within `fast_products` it multiplies by a copy of the weight in the fastest layout there is.

    The copy is made when it is first needed, and made again when the weight has changed.
    """

    copy: "_Copy | None" = None

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear calls it
        """`[..., in]` -> `[..., out]`, in the dtype of the weight."""
        module = self.module
        product = _product_of(module)
        if product is None:
            output: Tensor = type(module).forward(module, input.to(module.weight.dtype))
            return output
        return product(input)

    def product(self, every_number: bool) -> "_Product | None":
        """Return the product by the copy, which is made if it is needed; None for `F.linear`.

        Args:
            every_number: Whether to compare all numbers of the weight with those that were copied.
        """
        parameters = self.module._parameters
        weight, bias = parameters.get("weight"), parameters.get("bias")
        copy = self.copy
        layout = None
        if "bias" in parameters and _can_be_copied(weight, bias):  # not so when it is pruned
            layout = layout_for(weight.dtype, *weight.shape)
        if layout is None or layout is _plain:
            copy = None
        elif (
            copy is None
            or copy.product.layout is not layout
            or not copy.is_copy_of(weight, bias, every_number)
        ):
            copy = _Copy.of(layout, weight, bias)
        self.copy = copy
        return None if copy is None else copy.product


class FastFeedForward(_Forward):
    """The `forward` of a `BertFeedForward`, with the GELU within the first product.

    What that computes need not be read again: 1536 numbers a token, the widest tensor of the model.
    """

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """`[..., 384]` -> `[..., 384]`."""
        module = self.module
        product = _product_of(module)
        if product is None:
            plain: Tensor = type(module).forward(module, hidden_states)
            return plain
        if hidden_states.dim() > 2 or len(hidden_states) <= _BLOCK or _has_hooks(module.output):
            return self._block(product, hidden_states)
        blocks = torch.split(hidden_states, _BLOCK)
        return torch.cat([self._block(product, block) for block in blocks])

    def _block(self, product: "_Product", hidden_states: Tensor) -> Tensor:
        module = self.module
        activation = product(hidden_states, gelu=True)  # [..., 384] -> [..., 1536]
        output: Tensor = module.dropout(module.output(activation))  # [..., 1536] -> [..., 384]
        return output


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody but `accelerate` has set a `forward` on this one object."""
    return "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], _Forward)


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
        has_own_forward(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _any_module._global_forward_hooks
        or _any_module._global_forward_pre_hooks
    )


@dataclass(frozen=True)
class _Copy:
    """A weight in its layout, and what is needed to see that the weight has changed since."""

    product: _Product
    weight: Tensor
    bias: Tensor | None
    shape: torch.Size
    address: int
    version: int
    numbers: "np.ndarray[Any, Any]"  # some of the weight's numbers, as they are now
    before: bytes  # and as they were
    checksum: bytes

    @classmethod
    def of(cls, layout: Layout, weight: Tensor, bias: Tensor | None) -> "_Copy":
        """Copy a weight that can be copied."""
        with torch.inference_mode(False), torch.no_grad():
            plain = weight.detach()
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

    def is_copy_of(self, weight: Tensor, bias: Tensor | None, every_number: bool) -> bool:
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
            and self.numbers.tobytes() == self.before
            and (not every_number or self.checksum == _checksum(weight.detach()))
        )


def _can_be_copied(weight: Tensor | None, bias: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Whether the weight is an ordinary parameter on a CPU, with a bias like it or none."""
    return (
        type(weight) is nn.Parameter  # and not what a parametrization computes
        and weight.dtype in _DTYPES
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
        and weight.is_contiguous()
        and not weight.is_inference()  # it would not count its changes
        and (
            bias is None
            or (
                bias.dtype == weight.dtype
                and bias.device == weight.device
                and len(bias) == len(weight)
                and bias.is_contiguous()
            )
        )
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
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


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
    """Give freed memory back to the system once, if the C library is glibc.

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


def accelerate(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give every `nn.Linear` in `model` a `forward` of its own, `FastLinear`.

    All stay the same objects of the same classes, with the same parameters and hooks.

    Args:
        model: Changed in place. Linear layers of other classes stay what they are.
        dtype: What to convert their weights to; None leaves them. The rest of the model keeps its
            dtype: with bfloat16 products the sums between them stay float32.
    """
    _keep_freed_memory()
    for module in model.modules():
        if "forward" not in module.__dict__:
            if type(module) is nn.Linear:
                module.__dict__["forward"] = FastLinear(module)
            elif type(module) is BertFeedForward:
                module.__dict__["forward"] = FastFeedForward(module)
        if type(module) is nn.Linear and dtype is not None:
            # Parameters stay what they are, ordinary or inference tensors, wherever this is called.
            with torch.inference_mode(module.weight.is_inference()):
                module.to(dtype)

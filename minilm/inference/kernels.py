"""The matrix products, faster: a layer as one flat function, by products that suit the processor.

In: a layer of `bert.py`. Out: the same layer, with a `forward` among its own attributes that
computes the same in fewer and faster steps within `fast_products`, which `encode` enters.
Everything else (a plain call, training, `torch.compile`, `torch.export`, other devices and dtypes,
a layer with hooks or with parts that are not the model's own) goes through `bert.py`, which is the
definition. Next: `encoder.py`.

The floor. A token costs 2 x 6 x (4 x 384² + 2 x 384 x 1536) = 21.2 MFLOP in the linear layers, and
attention 0.0092 MFLOP for each token it looks at, so that a text of 256 tokens spends a tenth of
its arithmetic there. A pass reads all weights once, 42 MB in float32, whether it is of ten tokens
or of two thousand: long batches are limited by arithmetic, a single query by memory, and by the
calls from Python between its products. The figures here are what `scripts/bench/where_time_goes.py`
printed on two cores of an AMD EPYC (Zen 5, AVX-512), but for those of the last paragraph, which are
from earlier runs on other processors.

A flat layer. Sums are added in place, and nothing is called for a step but torch's function. In
float32 a pass without it takes 1.7 to 1.8 times as long, most of which is the other product.

A second layout. oneDNN, the library behind `Chains`, multiplies twice as fast as MKL, the one
behind `F.linear`, on AMD's processors with AVX-512. In float32 it wants a weight that lies in
memory as its transpose does; so a copy of each is kept, those of query, key and value side by side:
they are one product. Before each use a sample is compared that crosses every row and every column,
and in a call of 4,096 tokens or more all numbers. (Parameters that are views of transposed memory
would need no copies. But `weight.view(-1)` is an error then, and with it torch's pruning,
`parameters_to_vector`, and safetensors' `save_file`.) The operator (`minilm/onednn.py`) is no
public API, so that it is looked up, tried and compared with `F.linear` first.

Few roundings. A linear layer computes x Wᵀ, each output a dot product of two rows. A chain of
multiply-adds rounds at each step, in proportion to what it has so far: two chains of half the
length, added up, round less by a third. Relative rounding errors of one product on the published
weights (root mean square), and the error of sentence vectors over that by `F.linear`:

                                384 -> 384   384 -> 1536   1536 -> 384   vectors
    `F.linear`: the reference      2.5e-07       2.5e-07       2.5e-07      1.00
    oneDNN, one chain              3.5e-07       3.5e-07       5.2e-07      1.38
    oneDNN, chains of 768                                      3.7e-07
    oneDNN, chains of 384                                      3.5e-07      1.29
    the same, 192 where token vectors go in                                 1.07
    oneDNN, chains of 192          2.5e-07       2.5e-07       2.5e-07      1.00

Each chain more is a call more, which a query pays for. So the products that token vectors go into,
whose rounding reaches the sentence vectors most, have to be as exact as `F.linear` but for a fifth,
and the two others but for a half.

Same bits. Libraries have a kernel of their own for a handful of rows, which adds up in another
order, and split a long sum between threads: the same text then gets other bits in another batch.
What does not depends on the processor, so candidates are tried on a small product, once for each
dtype, shape and number of threads, by `product_for`. If none can be used, speed is lost and nothing
else. `Slices` are for Intel's processors, should `Chains` fail there; `Plain` is the last resort.

Two processors, two stories. With the matrix units of Intel's processors (AMX) a GELU within the
product saves the time to read 1536 numbers a token again; with AVX2 alone the fused product was
measured to lose more than a GELU in place takes. bfloat16 products are 2 times as fast as float32
with AVX-512 BF16, six times with AMX, and a ninth as fast with AVX2, where they are emulated:
`minilm/pretrained/options.py` refuses them there. So there is no GELU within a product here, and
nothing that one machine's figures decided but the order of `_candidates`.
"""

import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter, itemgetter
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
import torch.nn.modules.module as _any_module
from torch import Tensor, nn

from minilm.bert import Attend, BertFeedForward, BertLayer, BertSelfAttention, attention
from minilm.forks import unforked
from minilm.inference.int8 import Int8Layer, calibration_of
from minilm.onednn import has_onednn, is_dense, linear

__all__ = [
    "Chains",
    "Choice",
    "FastLayer",
    "Plain",
    "Product",
    "Slices",
    "accelerate",
    "fast_products",
    "give_back_freed_memory",
    "has_own_forward",
    "keep_few_kernels",
    "product_for",
]

Multiply = Callable[[Tensor], Tensor]

_DTYPES = (torch.float32, torch.bfloat16)
_SLICE = 384  # columns that `Slices` adds up in one chain
# Numbers of rows that are tried: multiples of 16 with as many threads as there are now, and with
# one; and, in case batches need not be filled up so far, multiples of 4. Few, since oneDNN keeps
# 0.6 MB for each.
_TRIAL, _TRIAL_ALONE = (16, 48, 272, 512), (16, 144)
_TRIAL_FEW, _TRIAL_FEW_ALONE = (4, 12, 28), (4, 28)
# How much a product may err, times the error of `F.linear`, root mean square: those that token
# vectors go into, whose rounding reaches the sentence vectors most, less than the two others.
_MOST_ERRORS = (1.2, 1.2, 1.2, 1.5, 1.2, 1.5)  # query, key, value, output; the feed-forward's two


class Product:
    """One way to compute rows Wᵀ + b."""

    transposed = False  # whether it is fast in float32 if W lies in memory as Wᵀ does

    def copies(self, dtype: torch.dtype) -> bool:
        """Whether it wants a copy of the weight."""
        return self.transposed and dtype == torch.float32

    def of(self, weight: Tensor, bias: Tensor | None) -> Multiply:
        """`[out, in]`, `[out]` -> a function, `[rows, in]` -> `[rows, out]`, in one dtype."""
        raise NotImplementedError


class Plain(Product):
    """`F.linear`, the definition."""

    def of(self, weight: Tensor, bias: Tensor | None) -> Multiply:
        return lambda rows: F.linear(rows, weight, bias)


class Slices(Product):
    """`mm`, which adds up slices of 384 columns."""

    transposed = True

    def of(self, weight: Tensor, bias: Tensor | None) -> Multiply:
        first, *others = torch.split(weight.t(), _SLICE)

        def multiply(rows: Tensor) -> Tensor:
            columns = torch.split(rows, _SLICE, 1)
            output = torch.mm(columns[0], first)
            for part, matrix in zip(columns[1:], others, strict=True):
                output.addmm_(part, matrix)
            return output if bias is None else output.add_(bias)

        return multiply


class Chains(Product):
    """oneDNN's product, with the weight as it lies in memory.

    Attributes:
        columns: How many input columns to add up in one chain. The chains are added up one after
            the other: less rounding, at the price of a call for each. None for all at once.
        row_blocks: Whether a product of 33 to 511 rows is made of products of 32. With the matrix
            units of some processors oneDNN cuts the long sums of such a product into parts, and
            rounds in between.
    """

    transposed = True

    def __init__(self, columns: int | None = None, row_blocks: bool = False) -> None:
        self.columns = columns
        self.row_blocks = row_blocks

    def of(self, weight: Tensor, bias: Tensor | None) -> Multiply:
        size = self.columns or weight.shape[1]
        parts = -(-weight.shape[1] // size)
        first, *others = weight.chunk(parts, 1)
        if not all(is_dense(part) for part in (first, *others)):
            return lambda rows: self.of(_transpose(weight), bias)(rows)

        def whole(rows: Tensor) -> Tensor:
            return linear(rows, weight, bias)

        def in_chains(rows: Tensor) -> Tensor:
            columns = rows.chunk(parts, 1)
            output = linear(columns[0], first, bias)
            for part, matrix in zip(columns[1:], others, strict=True):
                output.add_(linear(part, matrix))
            return output

        def in_blocks(rows: Tensor) -> Tensor:
            if 32 < len(rows) < 512:
                return torch.cat([whole(block) for block in torch.split(rows, 32)])
            return whole(rows)

        return in_chains if others else in_blocks if self.row_blocks else whole


def _transpose(weight: Tensor) -> Tensor:
    """The same matrix, laid out in memory as its transpose is."""
    return weight.t().contiguous().t()


_plain, _slices, _chain, _row_blocks = Plain(), Slices(), Chains(), Chains(row_blocks=True)
_chains = [_chain, Chains(768), Chains(384), Chains(192)]


@dataclass(frozen=True)
class Choice:
    """What was chosen for a shape, and the multiple that the number of rows has to be.

    Not settled if a candidate raised that came before it, which is tried again by the next call.
    """

    product: Product
    multiple: int
    settled: bool = True


# What `product_for` found, by what of torch's state a product may depend on, dtype and shape.
_choices: dict[tuple[Any, ...], Choice | None] = {}


def product_for(
    dtype: torch.dtype, out_features: int, in_features: int, most_error: float
) -> Choice | None:
    """Return the product for weights of this dtype and shape, on this processor with as many
    threads as now; None if there is no candidate but `F.linear`, which need not be tried.

    The first of the candidates that agrees with `F.linear`, gives a row the same bits in any
    company and with one thread, and errs by little more than `F.linear` does. If no candidate does,
    the most exact of those that keep a row's bits; if none does, the first that agrees.

    A candidate that raises is passed over for this time, and is tried again by the next call.

    Args:
        dtype, out_features, in_features: Of the weight.
        most_error: How much it may err, times the error of `F.linear`.
    """
    state = torch.get_num_threads(), torch.get_float32_matmul_precision()
    key = (*state, dtype, out_features, in_features, most_error)
    if key in _choices:
        return _choices[key]
    whole, tried = True, []
    chosen: Choice | None = None
    with _ordinary_state():
        for product in _candidates(dtype):
            try:
                trial = _Trial.of(product, dtype, out_features, in_features)
                if trial.is_right and trial.error <= most_error and trial.keeps_bits():
                    chosen = trial.choice()
                    break
                tried.append(trial)
            except (AttributeError, RuntimeError):
                whole = False
        else:
            right = sorted((t for t in tried if t.is_right), key=lambda trial: trial.error)
            exact_first = next((trial for trial in right if trial.keeps_bits()), None)
            if right:
                chosen = (exact_first or min(right, key=tried.index)).choice()
    if whole:
        _choices[key] = chosen
    elif chosen is not None:
        chosen = replace(chosen, settled=False)
    return chosen


def _candidates(dtype: torch.dtype) -> list[Product]:
    """List candidates, the fastest first: by a rule, since a race has other winners at times."""
    if dtype == torch.bfloat16:
        return [_chain, _row_blocks, _plain] if has_onednn(dtype) else [_plain]
    if dtype != torch.float32:
        return []
    return [*_chains, _slices, _plain] if has_onednn(dtype) else [_plain, _slices]


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
    """How one product did.

    Attributes:
        is_right: Whether it agrees with `F.linear`, but for rounding.
        error: Its rounding error over that of `F.linear`, root mean square.
    """

    product: Product
    multiply: Multiply
    rows: Tensor
    is_right: bool
    error: float

    @classmethod
    def of(
        cls, product: Product, dtype: torch.dtype, out_features: int, in_features: int
    ) -> "_Trial":
        random = torch.Generator("cpu").manual_seed(0)
        make = {"generator": random, "dtype": torch.float32, "device": "cpu"}
        weight = torch.randn(out_features, in_features, **make).to(dtype) * 0.05  # type: ignore[call-overload]
        bias = torch.randn(out_features, **make).to(dtype)  # type: ignore[call-overload]
        rows = torch.randn(528, in_features, **make).to(dtype)  # type: ignore[call-overload]
        if product.copies(dtype):
            weight = _transpose(weight)
        multiply, plain = product.of(weight, bias), _plain.of(weight, bias)
        exact = F.linear(rows[:48].double(), weight.double(), bias.double())
        bound = 8 * torch.finfo(dtype).eps * exact.abs().max()
        off, usual = (each(rows[:48]).double() - exact for each in (multiply, plain))
        error = float(off.norm() / usual.norm().clamp(min=1e-300))
        is_right = bool((off.abs() <= bound).all())
        return cls(product, multiply, rows, is_right, error)

    def keeps_bits(self) -> bool:
        """Whether rows keep their bits in any company, at any place, and with one thread."""
        return self._keeps_bits(_TRIAL, _TRIAL_ALONE)

    def choice(self) -> Choice:
        """What is chosen if this is: with few rows to fill up, if that keeps the bits too."""
        return Choice(self.product, 4 if self._keeps_bits(_TRIAL_FEW, _TRIAL_FEW_ALONE) else 16)

    def _keeps_bits(self, counts: tuple[int, ...], counts_alone: tuple[int, ...]) -> bool:
        threads = torch.get_num_threads()
        try:
            whole = self.multiply(self.rows)
            for number, tried in ((threads, counts), (1, counts_alone)):
                if number != torch.get_num_threads():  # never more: a forked child has one
                    torch.set_num_threads(number)
                for count in tried:
                    for start in (0, 7):
                        output = self.multiply(self.rows[start : start + count])
                        if not torch.equal(output, whole[start : start + count]):
                            return False
            return True
        finally:
            if threads != torch.get_num_threads():
                torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class _FlatLayer:
    """`BertLayer` as one function: the same steps, without a call of a module for each.

    Attributes:
        attends: The attention sublayer, for the number of heads.
        norms: The two LayerNorms.
        dtype: What is multiplied in.
        projections: Query, key and value by one product, or by one each.
        output, first, second: The other products, in the order of their use.
        multiple: The number of rows has to be a multiple of this.
        settled: Whether all choices are.
        copied: The weights and biases that these products have copies of.
    """

    attends: BertSelfAttention
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    dtype: torch.dtype
    projections: tuple[Multiply, ...]
    output: Multiply
    first: Multiply
    second: Multiply
    multiple: int
    settled: bool
    copied: tuple[Tensor, ...]

    def __call__(self, hidden_states: Tensor, attend: Attend) -> Tensor:
        """`[..., 384]` -> `[..., 384]`."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        inputs, heads = rows.to(self.dtype), self.attends.heads
        if len(self.projections) == 1:  # [rows, 3 x 384] -> three times [..., 12, 32]
            projected = self.projections[0](inputs).view(*hidden_states.shape[:-1], 3, *heads)
            query, key, value = projected.unbind(-3)
        else:
            shape = (*hidden_states.shape[:-1], *heads)
            query, key, value = (project(inputs).view(shape) for project in self.projections)
        context = attend(query, key, value).reshape(len(rows), -1)
        attended = _norm(self.norms[0], _add(rows, self.output(context)))
        activation = torch.ops.aten.gelu_(self.first(attended.to(self.dtype)))
        output = _norm(self.norms[1], _add(attended, self.second(activation)))
        return output.view(hidden_states.shape)


def _add(rows: Tensor, output: Tensor) -> Tensor:
    """Add, in place of the second where that has the dtype of the sum."""
    return output.add_(rows) if output.dtype == rows.dtype else rows + output


def _norm(norm: nn.LayerNorm, rows: Tensor) -> Tensor:
    parameters = norm._parameters
    return torch.layer_norm(
        rows, norm.normalized_shape, parameters["weight"], parameters["bias"], norm.eps
    )


class _Thread(threading.local):
    """What one thread's layers compute by; nothing outside `fast_products`."""

    layers: Mapping[nn.Module, "_FlatLayer | Int8Layer"] = MappingProxyType({})


_thread = _Thread()


@contextmanager
def fast_products(modules: Sequence[nn.Module], tokens: int = 0) -> Iterator[int]:
    """Compute layers on a CPU the fast way, inside and on this thread.

    Which ones is decided here, once: so inside, modules are not to be changed, nor weights replaced
    by torch.func, nor derivatives taken forwards. Where a gradient is recorded or torch compiles,
    layers are the plain ones all the same.

    Args:
        modules: A model that went through `accelerate`, and all modules in it.
        tokens: How many are going to be computed. From 4,096 on, reading all weights takes no
            noticeable part of the time, and every number is compared, not some.

    Yields:
        The multiple that the number of rows has to be, for a row to get the same bits in any
        company.
    """
    flat = unforked(_Flat.of, modules, tokens)
    before = _thread.layers
    _thread.layers = {modules[place]: layer for place, layer in flat.layers}
    try:
        yield flat.multiple
    finally:
        _thread.layers = before


@dataclass(frozen=True, slots=True)
class _Flat:
    """The flat layers of a model, and what they were made of.

    They have copies of weights, so they are made anew when anything has changed. torch counts
    changes in place, and other contents of `.data` have another address. Changes in place through
    `.data` or NumPy are not counted: they are seen in a sample that crosses every row and every
    column of each weight, and otherwise if every number is compared.

    Attributes:
        layers: The flat layers, and which of the modules each one is.
        multiple: The number of rows has to be a multiple of this.
        made_of: What is compared before each use.
        places: Where the sample of the copied weights stands in memory, as whole numbers.
        sample: What it was.
        checksums: Of each copied weight.
    """

    layers: tuple[tuple[int, _FlatLayer | Int8Layer], ...]
    multiple: int
    made_of: tuple[Any, ...] = ()
    places: tuple["np.ndarray[Any, Any]", ...] = ()
    sample: bytes = b""
    checksums: tuple[bytes, ...] = ()

    def is_of_now(self, made_of: tuple[Any, ...], every_number: bool) -> bool:
        """Whether these are the layers as they are now."""
        return made_of == self.made_of and (
            not self.places
            or (
                _joined(self.places) == self.sample
                and (not every_number or self.checksums == self.checksums_now())
            )
        )

    def checksums_now(self) -> tuple[bytes, ...]:
        """The checksums of what was copied, as it is now."""
        return tuple(_checksum(part) for _, layer in self.layers for part in layer.copied)

    @classmethod
    def of(cls, modules: Sequence[nn.Module], tokens: int) -> "_Flat":
        """Return the flat layers that a model has now; none where something else is to be done."""
        if torch.is_autocast_enabled("cpu") or _has_global_hooks() or _forwards() != _FORWARDS:
            return cls((), 16)
        # By functions that loop without the interpreter: this stands before each query.
        inside = list(map(vars, modules))
        in_int8 = getattr(modules[0], "in_int8", False)
        made_of: tuple[Any, ...] = ()
        try:
            parameters = list(chain.from_iterable(map(dict.values, map(_PARAMETERS, inside))))
            tensors = [tensor for tensor in parameters if tensor is not None]
            made_of = (
                torch.get_num_threads(),
                torch.get_float32_matmul_precision(),
                in_int8,
                list(map(id, modules)),
                list(map(type, modules)),
                [type(own.get("forward")) for own in inside],
                list(map(id, parameters)),
                list(map(Tensor.data_ptr, tensors)),
                list(map(Tensor.stride, tensors)),
                list(map(_VERSION, tensors)),
            )
            is_usual = not any(map(any, map(_HOOKS, inside))) and not any(map(_TRAINING, inside))
        except (KeyError, RuntimeError, TypeError):
            # Compiled and scripted modules have no such attributes, sparse tensors no such memory,
            # and tensors of inference mode don't count their changes.
            is_usual = False
        known = _known.get(modules[0]) if is_usual else None
        if known is not None and known.is_of_now(made_of, every_number=tokens >= 4096):
            return known
        layers, multiple = [], 4
        for place, module in enumerate(modules):
            if isinstance(module, BertLayer):
                is_fast = type(vars(module).get("forward")) is FastLayer
                is_fast &= type(module) is BertLayer
                layer = _flatten(module, in_int8) if is_fast else None
                multiple = max(multiple, 16 if layer is None else layer.multiple)
                if layer is not None:
                    layers.append((place, layer))
        made = cls(tuple(layers), multiple if layers else 16, made_of)
        if is_usual and layers and all(layer.settled for _, layer in layers):
            copied = [part for _, layer in layers for part in layer.copied]
            places = tuple(chain.from_iterable(map(_crossing, copied)))
            if places:
                sample = _joined(places)
                made = replace(made, places=places, sample=sample, checksums=made.checksums_now())
            _known[modules[0]] = made
        return made


def _crossing(tensor: Tensor) -> "list[np.ndarray[Any, Any]]":
    """Numbers of every row and every column of a matrix, or all of a vector, as whole numbers."""
    # As arrays: NumPy joins many short ones faster than torch does.
    whole = tensor.detach().view(torch.int32 if tensor.element_size() == 4 else torch.int16).numpy()
    if whole.ndim == 1:
        return [whole]
    rows, columns = whole.shape
    if columns > rows:
        return [whole[0], whole[:, :: columns // rows].diagonal()]
    return [whole[start : start + columns].diagonal() for start in range(0, rows, columns)]


def _joined(places: "Sequence[np.ndarray[Any, Any]]") -> bytes:
    return np.concatenate(places).tobytes()


def _checksum(tensor: Tensor) -> bytes:
    """The parity of the rows and of the columns of all bits, laid out in a rectangle.

    Any change is seen but one of four corners of a rectangle by the same bits; in a quarter of the
    time of a CRC.
    """
    data = tensor.detach().flatten().view(torch.uint8).numpy()
    whole = data.size // 4096 * 4096
    words = data[:whole].view(np.uint64).reshape(-1, 512)
    parities = (np.bitwise_xor.reduce(words, axis=axis).tobytes() for axis in (0, 1))
    return b"".join([*parities, data[whole:].tobytes()])


def _forwards() -> tuple[Any, ...]:
    """What the classes in a layer compute by: not the flat layer, if somebody has set another."""
    classes = BertLayer, BertSelfAttention, BertFeedForward, nn.Linear, nn.LayerNorm, nn.Dropout
    return tuple(each.forward for each in classes)


_FORWARDS = _forwards()
_HOOKS = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_PARAMETERS, _TRAINING = itemgetter("_parameters"), itemgetter("training")
_VERSION = attrgetter("_version")
_PAIR = {"weight", "bias"}  # not so where one of them is pruned, or somebody's own tensor
_known: WeakKeyDictionary[nn.Module, _Flat] = WeakKeyDictionary()


def _flatten(layer: BertLayer, in_int8: bool) -> _FlatLayer | Int8Layer | None:
    """Make the flat function of a layer, of its own parameters; None if that would not be the same
    as to call its parts one by one.
    """
    parts: Mapping[str, Any] = layer._modules
    attends, feeds = parts.get("attention"), parts.get("feed_forward")
    norms: Any = (parts.get("attention_layer_norm"), parts.get("feed_forward_layer_norm"))
    if type(attends) is not BertSelfAttention or type(feeds) is not BertFeedForward:
        return None
    linear: list[Any] = [attends._modules.get(name) for name in ("query", "key", "value", "output")]
    linear += [feeds._modules.get(name) for name in ("intermediate", "output")]
    dropouts: list[Any] = [part._modules.get("dropout") for part in (attends, feeds)]
    if not (
        all(type(part) is nn.Linear and _is_ordinary(part) for part in linear)
        and all(type(part) is nn.LayerNorm and part._parameters.keys() >= _PAIR for part in norms)
        and all(type(part) is nn.Dropout and not part.training for part in dropouts)
        and not any(map(_has_hooks, (attends, feeds, *linear, *norms, *dropouts)))
    ):
        return None
    weights = [part._parameters["weight"] for part in linear]
    biases = [part._parameters["bias"] for part in linear]
    dtype = weights[0].dtype
    if any(weight.dtype != dtype for weight in weights) or len({w.shape for w in weights[:3]}) > 1:
        return None
    if in_int8 and dtype == torch.float32:
        return Int8Layer(layer, calibration_of(layer))
    found = [
        product_for(dtype, *weight.shape, most_error=most_error)  # type: ignore[misc]  # of a matrix
        for weight, most_error in zip(weights, _MOST_ERRORS, strict=True)
    ]
    choices = [choice for choice in found if choice is not None]
    if len(choices) < len(found):
        return None
    multiple = max(choice.multiple for choice in choices)
    # Several weights of one layout make one product, if all that go into it are copies.
    products, copied = [], []
    together = choices[0].product.copies(dtype) and None not in biases[:3]
    groups = [(0, 3), (3, 4), (4, 5), (5, 6)] if together else [(i, i + 1) for i in range(6)]
    for start, stop in groups:
        product, weight, bias = choices[start].product, weights[start], biases[start]
        if product.copies(dtype):
            copied += weights[start:stop] + [
                each for each in biases[start:stop] if each is not None
            ]
            weight = torch.cat([each.detach().t() for each in weights[start:stop]], 1).t()
            bias = None if bias is None else torch.cat([b.detach() for b in biases[start:stop]])
        products.append(product.of(weight, bias))
    *projections, output, first, second = products
    return _FlatLayer(
        attends,
        norms,
        dtype,
        tuple(projections),
        output,
        first,
        second,
        multiple,
        all(choice.settled for choice in choices),
        tuple(copied),
    )


def _is_ordinary(linear: nn.Linear) -> bool:
    """Whether the weight is an ordinary parameter on a CPU, with a bias like it or none."""
    parameters = linear._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    return (
        "bias" in parameters  # not so when it is pruned
        and type(weight) is nn.Parameter  # and not what a parametrization computes
        and weight.dtype in _DTYPES
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
        and weight.is_contiguous()
        and not weight.is_inference()  # it would not count its changes
        and (bias is None or (bias.dtype == weight.dtype and bias.device == weight.device))
    )


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than the `forward` of its class."""
    return has_own_forward(module) or any(_HOOKS(vars(module)))


def _has_global_hooks() -> bool:
    return bool(_any_module._global_forward_hooks or _any_module._global_forward_pre_hooks)


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


class FastLayer(_Forward):
    """The `forward` of a `BertLayer`: within `fast_products`, one flat function."""

    def __call__(self, hidden_states: Tensor, attend: Attend = attention) -> Tensor:
        """`[..., 384]` -> `[..., 384]`."""
        layer = self.module
        flat = None
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled():
            flat = _thread.layers.get(layer)
        if flat is None:
            output: Tensor = type(layer).forward(layer, hidden_states, attend)
            return output
        return unforked(flat, hidden_states, attend)


class MixedLinear(_Forward):
    """The `forward` of an `nn.Linear` that computes in the dtype of its weight.

    So the matrix products of a model can be in bfloat16, and all else in float32.
    """

    def __call__(self, input: Tensor) -> Tensor:  # noqa: A002  # as nn.Linear calls it
        """`[..., in]` -> `[..., out]`, in the dtype of the weight."""
        linear = self.module
        output: Tensor = type(linear).forward(linear, input.to(linear.weight.dtype))
        return output


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody but `accelerate` has set a `forward` on this one object."""
    return "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], _Forward)


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

    Each takes 0.6 MB, and batches of texts have so many sizes that few are used again: a
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
    """Give the layers of a model a `forward` of their own, which `fast_products` makes fast.

    All stay the same objects of the same classes, with the same parameters and hooks.

    Args:
        model: Changed in place. Linear layers of other classes stay what they are.
        dtype: What to convert the linear layers to; None leaves them. The rest of the model keeps
            its dtype: with bfloat16 products the sums between them stay float32.
    """
    _keep_freed_memory()
    for module in model.modules():
        if type(module) is BertLayer and "forward" not in module.__dict__:
            module.__dict__["forward"] = FastLayer(module)
        if type(module) is nn.Linear and "forward" not in module.__dict__:
            module.__dict__["forward"] = MixedLinear(module)
        if type(module) is nn.Linear and dtype is not None:
            # Parameters stay what they are, ordinary or inference tensors, wherever this is called.
            with torch.inference_mode(module.weight.is_inference()):
                module.to(dtype)

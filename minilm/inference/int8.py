"""The matrix products of a layer in 8 bits: a byte for each weight and each activation.

In: a `BertLayer` and what `calibrate` measured of it. Out: an `Int8Layer`, which computes the same
but for rounding. Next: `kernels.py`, which uses it where a model was loaded with `dtype="int8"`.
(`precision="int8"` is another thing: it rounds the vectors that come out.)

A processor with instructions for it (VNNI) multiplies bytes several times as fast as float32. A
number x becomes the code round(x / scale) + zero point, from 0 to 255. What costs accuracy is the
rounding to codes, and each of these takes some of it away:

- Weights have a scale for each output, so that none is rounded by another's size.
- Smoothing. Activations differ between columns: a few of the 384 reach ten times what most do. With
  one scale the small ones would lose their digits. So each column is divided by a factor, and the
  weights are multiplied by it, which leaves the product as it was (Xiao et al. 2022, "SmoothQuant",
  equation 4). Columns are taken about the middle of their range; what that adds goes into the bias.
- Ranges are those of all but a thousandth of the tokens. A token that goes beyond gets a scale of
  its own, by a second product of those few rows.
- The second product of the feed-forward sublayer takes what GELU gives: never below -0.17, and in
  one column several times what all others reach. One scale for all tokens would lose more than all
  else together: here each row has its own. And that column's weights, a hundred times as large as
  the average, would be the scale of some outputs: it stays in float32.
- Correction. What is left has a mean that is not 0, and pooling, a mean over tokens, doesn't lessen
  that. The mean error of each output, measured on texts, is taken off the bias.

`scripts/results/int8-products.md` has the cosines to float64. Texts of one word or none lose most.

Same bits. The product of codes is a sum of whole numbers, which is exact in any order, and a row's
scale depends on that row alone: so a text keeps its bits in any batch and with any number of
threads. Between processors they may differ, since what stands between the products is in float32.

Not every processor adds exactly: AVX2 without VNNI adds two products of bytes in 16 bits, which is
too little for full codes, and says nothing. `exact_products` tries the largest ones out.
"""

import functools
import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilm.bert import Attend, BertLayer, BertModel
from minilm.errors import InputError

__all__ = ["Int8Layer", "calibrate", "calibration_of", "digest", "exact_products", "why_not"]

PUBLISHED = "int8_products.npz"  # by `scripts/make/int8_products.py`

_LOWEST = -0.17  # of GELU, rounded down
# How far a column's factor follows the activations rather than the weights: the best from 0.4 on.
_SMOOTHING = 0.7
# Share of tokens below the range of a column, and above it: those few get ranges of their own, and
# all others finer codes.
_BEYOND = 0.001
_LEAST = 1e-6  # of a range or a scale, for what is 0 throughout
_MIDDLE = 128  # the code of a column's middle
_FEW = 16  # rows, of which all are multiplied again if one goes beyond the ranges
_Then = tuple[str, list[Any], str]  # what follows in the product: name, arguments, algorithm
_NOTHING: _Then = ("none", [], "")
_GELU: _Then = ("gelu", [], "none")


def why_not() -> str:
    """Return why this processor can't multiply in 8 bits, and what else to do; "" where it can."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "8-bit products are for x86 processors; pass dtype='float32'"
    if not exact_products():
        seen = torch.backends.cpu.get_cpu_capability()
        return (
            f"this processor ({seen}) has no exact sums of 8-bit products, which VNNI has: it "
            "would cut large ones off; pass dtype='float32'"
        )
    return ""


@functools.cache
def exact_products() -> bool:
    """Try whether this processor and this torch multiply bytes without an error.

    The largest codes, and as many rows as choose each of the kernels: few, some and many.
    """
    signs = (
        torch.arange(32, dtype=torch.int64, device="cpu").remainder(2).mul(2).sub(1)
    )  # of each output's weights
    weight = (127 * signs)[:, None].expand(32, 384).to(torch.int8).contiguous()
    ones = torch.ones(32, dtype=torch.float32, device="cpu")
    try:
        packed = _pack(weight)
        for rows in (1, 16, 64, 512):
            codes = torch.full((rows, 384), 255, dtype=torch.uint8, device="cpu")
            sums = _multiply(codes, 1.0, 0, packed, ones, None, _NOTHING)
            if not torch.equal(sums, (255 * 127 * 384.0 * signs).expand(rows, 32)):
                return False
    except (AttributeError, RuntimeError):  # a torch without these operators
        return False
    return True


def _pack(weight: Tensor) -> Tensor:
    """Lay int8 `[outputs, inputs]` out as oneDNN wants it."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


@functools.cache
def _zeros(outputs: int) -> Tensor:
    """The zero points of weights."""
    with torch.inference_mode(False):
        return torch.zeros(outputs, dtype=torch.int64, device="cpu")


def _multiply(
    codes: Tensor,
    scale: float,
    zero_point: int,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    then: _Then,
    add: Tensor | None = None,
) -> Tensor:
    """Multiply uint8 `[n, inputs]` by a packed weight, give float32 `[n, outputs]`.

    The codes are uint8 because oneDNN has no fast kernel for int8 ones: with AVX-512 they take a
    thousand times as long.
    """
    product: Tensor
    zeros = _zeros(len(weight_scales))
    operators = torch.ops.onednn.qlinear_pointwise
    before = (codes, scale, zero_point, weight, weight_scales, zeros)
    if add is None:
        product = operators.default(*before, bias, 1.0, 0, torch.float32, *then)
    else:
        sum_of_two = (1.0, 0, "add", 1.0, *then)
        product = operators.binary(*before, add, bias, 1.0, 0, torch.float32, *sum_of_two)
    return product


class _Product:
    """x Wᵀ + b of a weight in 8 bits; of activations with a fixed range, or with one for each row.

    Args:
        weight: float32 `[outputs, inputs]`.
        bias: float32 `[outputs]`.
        low, high: The range of each column of the input, float32 `[inputs]`; None for what GELU
            gave, to be multiplied by `by_rows`.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, low: Tensor | None = None, high: Tensor | None = None
    ) -> None:
        factors = torch.ones_like(weight[0])
        if low is None or high is None:
            middle = torch.full_like(factors, _LOWEST)  # not the middle, but where codes begin
            self._column = int(weight.abs().amax(0).argmax())
            self._column_weight = weight[:, self._column].clone()
            weight = weight.clone()
            weight[:, self._column] = 0
        else:
            middle = (low + high) / 2
            reach = ((high - low) / 2).clamp_min(_LEAST)
            largest = weight.abs().amax(0).clamp_min(_LEAST)  # of each column
            factors = reach**_SMOOTHING / largest ** (1 - _SMOOTHING)
            self.scale = float((reach / factors).max()) / 127
            self._slope = 1 / (factors * self.scale)
            # Half a code more, because the conversion to uint8 cuts off.
            self._start = _MIDDLE + 0.5 - middle * self._slope
        self._bias = bias + weight @ middle
        weight = weight * factors
        self._weight_scales = weight.abs().amax(1).clamp_min(_LEAST) / 127
        self.codes = (weight / self._weight_scales[:, None]).round().to(torch.int8)
        self._packed = _pack(self.codes)

    def correct(self, error: Tensor) -> None:
        """Take a mean error `[outputs]` off the bias."""
        self._bias = self._bias - error

    def __call__(self, rows: Tensor, then: _Then = _NOTHING, add: Tensor | None = None) -> Tensor:
        """float32 `[n, inputs]` -> `[n, outputs]`."""
        codes = torch.addcmul(self._start, rows, self._slope)
        low, high = torch.aminmax(codes)
        if not (float(low) < 0 or float(high) >= 256):
            return self._multiply(codes, self._bias, then, add)
        is_outside = (codes.amin(1) < 0) | (codes.amax(1) >= 256)
        outside: Tensor | slice = slice(None)  # of a few rows all, which takes fewer steps
        if len(codes) > _FEW:
            found = is_outside.nonzero()[:, 0]
            # Filled up, since each new number of rows takes time to prepare, and memory.
            outside = torch.cat([found, found[:1].expand(-len(found) % _FEW)])
        differences = codes[outside] - (_MIDDLE + 0.5)
        output = self._multiply(codes.clamp_(0, 255), self._bias, then, add)
        factors = differences.abs().amax(1, keepdim=True).div_(127)
        codes = differences.div_(factors).add_(_MIDDLE + 0.5)
        own = torch.addcmul(self._bias, self._multiply(codes, None), factors)
        own = F.gelu(own) if then == _GELU else own
        own = own if add is None else own.add_(add[outside])
        if len(output) <= _FEW:
            return torch.where(is_outside[:, None], own, output)
        output[outside] = own
        return output

    def _multiply(
        self, codes: Tensor, bias: Tensor | None, then: _Then = _NOTHING, add: Tensor | None = None
    ) -> Tensor:
        given = (codes.to(torch.uint8), self.scale, _MIDDLE, self._packed, self._weight_scales)
        return _multiply(*given, bias, then, add)

    def by_rows(self, rows: Tensor, add: Tensor) -> Tensor:
        """Multiply what GELU gave, each row with a scale of its own, and one column in float32.

        Args:
            rows: float32 `[n, inputs]`, whose largest column is overwritten.
            add: float32 `[n, outputs]`.

        Returns:
            float32 `[n, outputs]`.
        """
        column = rows[:, self._column, None].clone()  # [n, 1]
        rows[:, self._column] = 0
        ranges = rows.amax(1, keepdim=True).sub_(_LOWEST)  # [n, 1], above 0
        slope = 255 / ranges
        codes = torch.addcmul(slope * -_LOWEST + 0.5, rows, slope).to(torch.uint8)
        sums = _multiply(codes, 1 / 255, 0, self._packed, self._weight_scales, None, _NOTHING)
        rest = torch.addcmul(self._bias, column, self._column_weight).add_(add)
        return rest.addcmul_(sums, ranges)


def digest(layer: nn.Module) -> str:
    """SHA-256 over the weights and biases of a layer's products; "" if it is of another kind."""
    if not isinstance(layer, BertLayer) or any(linear.bias is None for linear in _linear(layer)):
        return ""
    found = hashlib.sha256()
    for pair in _parameters(layer).values():
        for tensor in pair:
            found.update(f"{list(tensor.shape)}\n".encode())
            found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


@functools.cache
def _published() -> dict[str, dict[str, Tensor]]:
    """What `calibrate` gave for the layers of the published model, by their `digest`."""
    found: dict[str, dict[str, Tensor]] = {}
    path = resources.files("minilm.inference").joinpath(PUBLISHED)
    with torch.inference_mode(False), path.open("rb") as file, np.load(file) as arrays:
        for key in arrays:
            layer, name = key.split("/")
            array = arrays[key].astype(np.float32)
            found.setdefault(layer, {})[name] = torch.from_numpy(array)
    return found


def calibration_of(layer: nn.Module) -> Mapping[str, Tensor]:
    """Return what `Int8Layer` takes besides a layer of the published model.

    Raises:
        InputError: It has other weights, or came from a processor that adds exactly to one that
            does not.
    """
    if not exact_products():
        raise InputError(f"dtype is 'int8': {why_not()}", "dtype")
    calibration = _published().get(digest(layer))
    if calibration is None:
        raise InputError(
            "dtype is 'int8', whose ranges were measured with the published weights; these are "
            "others: load them with dtype='float32'",
            "dtype",
        )
    return calibration


class Int8Layer:
    """A layer's forward with its products in 8 bits: a copy of the weights, for inference on a CPU.

    A number that is not finite comes out as one, by way of the residual.

    Attributes:
        copied: The weights and biases that it has copies of.
        multiple: 4: the number of rows may be any, but each new one takes time to prepare.

    Args:
        layer: With float32 parameters on the CPU.
        calibration: What `calibrate` gives for this layer.
    """

    def __init__(self, layer: BertLayer, calibration: Mapping[str, Tensor]) -> None:
        self.multiple, self.settled = 4, True
        self._heads = layer.attention.heads
        norms = (layer.attention_layer_norm, layer.feed_forward_layer_norm)
        self._norms = [
            (list(norm.normalized_shape), norm.weight.detach(), norm.bias.detach(), norm.eps)
            for norm in norms
        ]
        self.copied = tuple(
            parameter for linear in _linear(layer) for parameter in (linear.weight, linear.bias)
        )
        self._products = {}
        for name, (weight, bias) in _parameters(layer).items():
            low, high = (calibration.get(f"{name}.{end}") for end in ("low", "high"))
            self._products[name] = _Product(weight, bias, low, high)
            if f"{name}.error" in calibration:
                self._products[name].correct(calibration[f"{name}.error"])

    def query_key_value(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float32 `[..., 384]` -> three of `[..., 12, 32]`, views of one tensor."""
        projected = self._products["query_key_value"](hidden_states.flatten(0, -2))
        query, key, value = projected.view(*hidden_states.shape[:-1], 3, *self._heads).unbind(-3)
        return query, key, value

    def attention_output(self, context: Tensor, hidden_states: Tensor) -> Tensor:
        """Both float32 `[n, 384]` -> the residual sum before its LayerNorm, `[n, 384]`."""
        return self._products["attention_output"](context, add=hidden_states)

    def intermediate(self, hidden_states: Tensor) -> Tensor:
        """float32 `[n, 384]` -> what GELU gives, `[n, 1536]`."""
        return self._products["intermediate"](hidden_states, then=_GELU)

    def output(self, activation: Tensor, hidden_states: Tensor) -> Tensor:
        """`[n, 1536]`, `[n, 384]` -> the residual sum before its LayerNorm, `[n, 384]`.

        A column of `activation` is overwritten.
        """
        return self._products["output"].by_rows(activation, add=hidden_states)

    def __call__(self, hidden_states: Tensor, attend: Attend) -> Tensor:
        """`BertLayer.forward` for float32 `[..., 384]`, without a gradient."""
        context = attend(*self.query_key_value(hidden_states))
        rows = hidden_states.flatten(0, -2)  # -> [n, 384]
        attended = self.attention_output(context.reshape(rows.shape), rows)
        attended = torch.layer_norm(attended, *self._norms[0])
        output = self.output(self.intermediate(attended), attended)
        return torch.layer_norm(output, *self._norms[1]).view(hidden_states.shape)


def _linear(layer: BertLayer) -> tuple[nn.Linear, ...]:
    """The linear layers, in the order of computation."""
    attention, feed_forward = layer.attention, layer.feed_forward
    return (
        attention.query, attention.key, attention.value, attention.output,
        feed_forward.intermediate, feed_forward.output,
    )  # fmt: skip


def _parameters(layer: BertLayer) -> dict[str, tuple[Tensor, Tensor]]:
    """The weight and the bias of each product of a layer, in the order of computation."""
    pairs = [(linear.weight.detach(), linear.bias.detach()) for linear in _linear(layer)]
    weights, biases = zip(*pairs[:3], strict=True)
    together = torch.cat(weights), torch.cat(biases)
    names = ("query_key_value", "attention_output", "intermediate", "output")
    return dict(zip(names, [together, *pairs[3:]], strict=True))


@torch.no_grad()
def calibrate(
    bert: BertModel, hidden_states: Sequence[Tensor], attends: Sequence[Attend]
) -> list[dict[str, Tensor]]:
    """Measure the ranges of the activations, and then what 8 bits do wrong on the average.

    All texts go through the layers twice, side by side: in float32, and in 8 bits, as far as those
    are calibrated. Each product is corrected before the next one is measured.

    Args:
        bert: In float32, on the CPU.
        hidden_states: What `bert.embeddings` gives for some hundred texts like those to come, in
            batches: float32 `[total_tokens, 384]`, without a row that belongs to no text.
        attends: For each batch.

    Returns:
        For each layer what `Int8Layer` takes, by name: float32 `low` and `high` of the columns of
        three products' inputs, and the mean `error` of each output of all four.
    """
    both = [list(hidden_states), list(hidden_states)]  # in float32, in 8 bits
    calibrations = []
    for layer in bert.layers:
        assert isinstance(layer, BertLayer)
        parameters = _parameters(layer)
        measured: dict[str, Tensor] = {}
        query_key_value = _measure("query_key_value", parameters, measured, both)
        contexts = [
            [
                attend(*rows.view(len(rows), 3, *layer.attention.heads).unbind(1)).flatten(1)
                for attend, rows in zip(attends, batches, strict=True)
            ]
            for batches in query_key_value
        ]
        outputs = _measure("attention_output", parameters, measured, contexts)
        both = _add(layer.attention_layer_norm, outputs, both)
        intermediate = _measure("intermediate", parameters, measured, both)
        activations = [[F.gelu(rows) for rows in batches] for batches in intermediate]
        outputs = _measure("output", parameters, measured, activations)
        both = _add(layer.feed_forward_layer_norm, outputs, both)
        calibrations.append(measured)
    return calibrations


def _measure(
    name: str,
    parameters: Mapping[str, tuple[Tensor, Tensor]],
    measured: dict[str, Tensor],
    both: list[list[Tensor]],
) -> list[list[Tensor]]:
    """Apply one product to the batches in float32 and in 8 bits; note its ranges and its error."""
    plain, coded = both
    weight, bias = parameters[name]
    if name == "output":
        product = _Product(weight, bias)
        zero = torch.zeros((), dtype=torch.float32, device="cpu")
        coded = [product.by_rows(rows, add=zero) for rows in coded]
    else:
        together = torch.cat(plain).sort(0).values
        beyond = round(len(together) * _BEYOND)
        low, high = together[beyond], together[-1 - beyond]
        measured[f"{name}.low"], measured[f"{name}.high"] = low, high
        product = _Product(weight, bias, low, high)
        coded = [product(rows) for rows in coded]
    plain = [F.linear(rows, weight, bias) for rows in plain]
    differences = [(b - a).sum(0) for a, b in zip(plain, coded, strict=True)]
    error = torch.stack(differences).sum(0) / sum(map(len, plain))
    measured[f"{name}.error"] = error
    return [plain, [rows - error for rows in coded]]


def _add(
    norm: nn.Module, outputs: list[list[Tensor]], residuals: list[list[Tensor]]
) -> list[list[Tensor]]:
    return [
        [norm(a + b) for a, b in zip(*batches, strict=True)]
        for batches in zip(outputs, residuals, strict=True)
    ]

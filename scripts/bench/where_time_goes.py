"""Print where the time of `encode` on a CPU goes, and what each trick of the fast path is worth.

    python scripts/bench/where_time_goes.py [--model PATH_OR_NAME] [--rounds N] [--scale SHARE]
                                             [--markdown FILE]

Five tables, on the workloads of scripts/bench/bench.py: the matrix products alone, at the model's
shapes, by dtype; what they round in float32, and what of that reaches the vectors; the share of
each kind of operation in the time, as torch's profiler counts it; and the time with one trick
switched off, over the time with all of them: 1.10 means that it saves a tenth. On and off run in
turn, in one process, with another number of tokens a pass in each round, so that neither finds what
the other has prepared. The module docstrings of `minilm/inference/kernels.py` and
`minilm/inference/packed.py` explain the tricks.

The last lines say what 8-bit products could save at most. On a processor without products in
bfloat16, which would take many minutes, both are left out, and a line says so. By default the share
of the workloads is what takes about a minute and a half.
"""

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

import results  # noqa: E402
from bench import MFLOP_PER_TOKEN, SHAPES, TEXTS, make_texts, slow_bfloat16  # noqa: E402
from minilm import SentenceEncoder  # noqa: E402
from minilm.inference import compute, kernels, packed  # noqa: E402
from minilm.pipeline import Batch  # noqa: E402
from minilm.pretrained.hub import DEFAULT_MODEL  # noqa: E402
from minilm.tokenizer import WordPieceTokenizer  # noqa: E402

DTYPES = ("float32", "bfloat16")
SECONDS = 90
ROWS = 2048
TOKENS = 140_000  # W1, W2 and W3 of bench.py together
KINDS = {  # the operators that the profiler names -> what a reader calls them
    "products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::addmm_"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::baddbmm",
        "aten::_softmax",
        "aten::bmm",
    ),
    "norms": ("aten::native_layer_norm",),
    "sums": ("aten::add", "aten::add_"),
    "copies": ("aten::copy_", "aten::cat"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, help="share of each workload")
    parser.add_argument("--seconds-only", metavar="DTYPE", help=argparse.SUPPRESS)
    parser.add_argument("--no-kept-memory", action="store_true", help=argparse.SUPPRESS)
    results.add_option(parser)
    options = parser.parse_args()
    if options.seconds_only:
        print(seconds_in_a_fresh_process(options))
        return
    with results.recorded(options.markdown, "Where the time of encode goes", fenced=False):
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    """Print all tables."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    dtypes = [*DTYPES]
    if slow := slow_bfloat16():
        dtypes.remove("bfloat16")
        print(f"bfloat16, and 8-bit products that give it, are not timed: {slow}\n")
    rates = print_products(options.rounds, dtypes)
    if options.scale is None:
        # How often the texts are computed below; products are some 60 % of a token's time.
        passes = 5 + options.rounds * (2 * len(TRICKS) + 4)
        whole = passes * 1.6 * rates["float32, F.linear"] * TOKENS / 1e6
        options.scale = round(min(0.3, SECONDS / whole / len(dtypes)), 3)
    print(f"{options.scale:.1%} of the texts of bench.py in {options.rounds} rounds\n")
    times = {}
    print_errors(options.model)
    for dtype in dtypes:
        encoder = SentenceEncoder.from_pretrained(options.model, device="cpu", dtype=dtype)
        texts = workloads(encoder, options.scale)
        times[dtype] = print_shares(encoder, texts)
        print_tricks(encoder, texts, options)
    if not slow:
        print_int8(rates, times["bfloat16"])


def workloads(encoder: SentenceEncoder, scale: float) -> dict[str, list[str]]:
    """Return a share of the texts of `bench.py`."""
    tokenizer = encoder.tokenizer
    assert tokenizer is not None
    return make_texts(lambda words: tokenizer(words).token_counts, scale)


# --- The products alone ---------------------------------------------------------------------------


def print_products(rounds: int, dtypes: Sequence[str]) -> dict[str, float]:
    """Print GFLOP/s of the products of a pass of 2,048 tokens; without bfloat16 in float32 only.

    Returns:
        Microseconds a token, by the name of the way.
    """
    ways: dict[str, Callable[[int, int, float], Callable[[], object]]] = {
        "float32, F.linear": lambda c, o, _: linear(torch.float32, c, o),
        "float32, as minilm": lambda c, o, error: fast(torch.float32, c, o, error),
        "bfloat16, F.linear": lambda c, o, _: linear(torch.bfloat16, c, o),
        "bfloat16, as minilm": lambda c, o, error: fast(torch.bfloat16, c, o, error),
        "int8": lambda c, o, _: int8(c, o),
        "int8 with quantization": lambda c, o, _: int8(c, o, quantize=True),
    }
    kernels._keep_freed_memory()  # as a model does that is loaded
    shapes = [(*shape, error) for shape, error in zip(SHAPES, kernels._MOST_ERRORS, strict=True)]
    print(f"| products alone, {ROWS:,} rows | GFLOP/s | µs a token |\n| --- | ---: | ---: |")
    rates = {}
    for name, way in ways.items():
        if name[:7] != "float32" and "bfloat16" not in dtypes:
            continue
        try:
            with warnings.catch_warnings(), torch.inference_mode():
                warnings.simplefilter("ignore")
                products = [way(*shape) for shape in shapes]
                taken = [seconds(lambda: [product() for product in products])  # noqa: B023
                         for _ in range(3 + 3 * rounds)]  # fmt: skip
        except (AttributeError, RuntimeError, NotImplementedError) as error:
            print(f"| {name} | not here: {str(error).splitlines()[0][:60]} | |")
            continue
        rates[name] = 6 * 1e6 * statistics.median(taken[3:]) / ROWS
        print(f"| {name} | {1e3 * MFLOP_PER_TOKEN / rates[name]:,.0f} | {rates[name]:.1f} |")
    print()
    return rates


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def linear(dtype: torch.dtype, columns: int, outputs: int) -> Callable[[], Tensor]:
    rows, weight, bias = operands(dtype, columns, outputs)
    return lambda: activated(F.linear(rows, weight, bias), columns < outputs)


def fast(dtype: torch.dtype, columns: int, outputs: int, most_error: float) -> Callable[[], Tensor]:
    rows, weight, bias = operands(dtype, columns, outputs)
    choice = kernels.product_for(dtype, outputs, columns, most_error)
    if choice is None:
        raise RuntimeError("no product")
    if choice.product.copies(dtype):
        weight = weight.t().contiguous().t()
    multiply = choice.product.of(weight, bias)
    return lambda: activated(multiply(rows), columns < outputs)


def int8(columns: int, outputs: int, quantize: bool = False) -> Callable[[], Tensor]:
    """Return the product that torch's compiler emits for a quantized model: 8-bit rows and weight.

    The result is what the next operation takes: 8 bits before the second product of the
    feed-forward layer, else bfloat16. With `quantize` the rows come in bfloat16 where they do in
    the model, and are scaled and rounded first.
    """
    rows, weight, bias = operands(torch.float32, columns, outputs)
    scale = rows.abs().max().item() / 127
    scales = weight.abs().amax(1) / 127
    whole = (weight / scales[:, None]).round().to(torch.int8)
    q8 = ((rows / scale).round() + 128).to(torch.uint8)
    prepack, multiply = torch.ops.onednn.qlinear_prepack, torch.ops.onednn.qlinear_pointwise
    copy, zeros = prepack(whole, list(q8.shape)), torch.zeros(outputs, dtype=torch.int64)
    inner = columns < outputs
    after: tuple[Any, ...] = (0.05, 10, torch.uint8, "gelu", [], "none")
    out = after if inner else (1.0, 0, torch.bfloat16, "none", [], "")
    rows = rows.bfloat16()

    def product() -> Tensor:
        given = q8
        if quantize and columns == 384:  # 1536 columns come in 8 bits from the product before
            given = (rows * (1 / scale)).add_(128).to(torch.uint8)
        result: Tensor = multiply(given, scale, 128, copy, scales, zeros, bias, *out)
        return result

    return product


def operands(dtype: torch.dtype, columns: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, columns, generator=random)
    weight = torch.randn(outputs, columns, generator=random) * 0.05
    bias = torch.randn(outputs, generator=random)
    return rows.to(dtype), weight.to(dtype), bias.to(dtype)


def activated(output: Tensor, gelu: bool) -> Tensor:
    return F.gelu(output) if gelu else output


# --- What the products round ----------------------------------------------------------------------


def print_errors(model: str) -> None:
    """Print rounding errors in float32: of the products of all layers, relative, and of vectors."""
    encoder = SentenceEncoder.from_pretrained(model, device="cpu")
    parts = ("attention.query", "feed_forward.intermediate", "feed_forward.output")
    print(f"| rounding of float32 products | {' | '.join(parts)} |")
    print("| --- |" + " ---: |" * len(parts))
    for name, product in PRODUCTS.items():
        try:
            errors = [rounding(encoder, part, product) for part in parts]
        except (AttributeError, RuntimeError) as error:
            print(f"| {name} | not here: {str(error).splitlines()[0][:60]} |" + " |" * 2)
            continue
        print(f"| {name} | {' | '.join(f'{error:.1e}' for error in errors)} |")
    print()
    rows = [json.loads(line)["text"] for line in TEXTS.read_text().splitlines()]
    quiet: dict[str, Any] = {"truncation": "silent"}
    exact = SentenceEncoder.from_pretrained(model, dtype="float64").encode(rows, **quiet)
    print("| error of vectors, × `F.linear` | root mean square | largest |")
    print("| --- | ---: | ---: |")
    base = vector_error(encoder, rows, exact, lambda *shape: PRODUCTS["F.linear"])
    for name, choose in {
        "as chosen here": None,
        "one chain each": lambda *shape: PRODUCTS["oneDNN, one chain"],
        "chains of 384": lambda *shape: PRODUCTS["oneDNN, chains of 384"],
        "chains of 192 of token vectors, else of 384": lambda _, most_error: PRODUCTS[
            f"oneDNN, chains of {192 if most_error < 1.5 else 384}"
        ],
        "chains of 192": lambda *shape: PRODUCTS["oneDNN, chains of 192"],
    }.items():
        off = vector_error(encoder, rows, exact, choose)
        print(f"| {name} | {off[0] / base[0]:.2f} | {off[1] / base[1]:.2f} |")
    print()


PRODUCTS = {
    "F.linear": kernels.Plain(),
    "oneDNN, one chain": kernels.Chains(),
    "oneDNN, chains of 768": kernels.Chains(768),
    "oneDNN, chains of 384": kernels.Chains(384),
    "oneDNN, chains of 192": kernels.Chains(192),
    "mm, slices of 384": kernels.Slices(),
}


def vector_error(
    encoder: SentenceEncoder, texts: list[str], exact: Any, choose: Callable[..., Any] | None
) -> tuple[float, float]:
    """Return the error of vectors, root mean square and the largest; None chooses as `encode`."""

    def product_for(dtype: Any, outputs: int, columns: int, most_error: float) -> kernels.Choice:
        return kernels.Choice(choose(columns, most_error), 16)  # type: ignore[misc]

    with contextlib.ExitStack() as stack:
        if choose is not None:
            stack.enter_context(mock.patch.object(kernels, "product_for", product_for))
        kernels._known.clear()
        off = encoder.encode(texts, truncation="silent").astype(float) - exact
    kernels._known.clear()
    return float((off**2).mean() ** 0.5), float(abs(off).max())


@torch.inference_mode()
def rounding(encoder: SentenceEncoder, part: str, product: kernels.Product) -> float:
    """Return the error of random rows times one weight of each layer, root mean square."""
    random = torch.Generator().manual_seed(0)
    off = whole = 0.0
    for layer in encoder.bert.layers:
        linear: Any = layer.get_submodule(part)
        rows = torch.randn(256, linear.in_features, generator=random)
        result = product.of(linear.weight, linear.bias)(rows)
        exact = F.linear(rows.double(), linear.weight.double(), linear.bias.double())
        off += float((result - exact).square().sum())
        whole += float(exact.square().sum())
    return math.sqrt(off / whole)


# --- Shares of the time ---------------------------------------------------------------------------


def print_shares(encoder: SentenceEncoder, texts: dict[str, list[str]]) -> dict[str, float]:
    """Print the share of each kind of operation in the time.

    Returns:
        Microseconds a token, by workload.
    """
    names = [*KINDS, "other", "Python"]
    print(f"| {str(encoder.dtype)[6:]} | µs a token | {' | '.join(names)} |")
    print("| --- |" + " ---: |" * (len(names) + 1))
    tokenizer = encoder.tokenizer
    assert tokenizer is not None
    taken = {}
    for name, rows in texts.items():
        batches = [[row] for row in rows] if name == "W4" else [rows]
        tokens = sum(tokenizer(rows).token_counts)
        for _ in range(2):
            alone = seconds(lambda: [encoder.encode(batch) for batch in batches])  # noqa: B023
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            whole = seconds(lambda: [encoder.encode(batch) for batch in batches])  # noqa: B023
        kinds: dict[str, float] = defaultdict(float)
        of = {operator: kind for kind, operators in KINDS.items() for operator in operators}
        for event in profile.key_averages():
            kinds[of.get(event.key, "other")] += event.self_cpu_time_total / 1e6
        kinds["Python"] = max(0.0, whole - sum(kinds.values()))  # and the tokenizer
        taken[name] = 1e6 * alone / tokens
        shares = " | ".join(f"{kinds[kind] / whole:.0%}" for kind in names)
        print(f"| {name} | {taken[name]:.1f} | {shares} |")
    print()
    return taken


# --- Tricks ---------------------------------------------------------------------------------------


def padded(
    input_ids: Any,
    token_type_ids: Any,
    device: torch.device,
    tokenizer: WordPieceTokenizer,
    multiple: int,
) -> Batch:
    return Batch(**tokenizer.pad(input_ids, device, token_type_ids))


def by_parts(layer: Any) -> None:
    return None


TRICKS: dict[str, list[Any]] = {
    "no padding": [mock.patch.object(compute, "make_batch", padded)],
    "flat layers, their products": [mock.patch.object(kernels, "_flatten", by_parts)],
    "short texts attend by bmm": [mock.patch.object(packed, "_SHORT", 0)],
    "keys up to a multiple of 16": [mock.patch.object(packed, "_STEP", 1)],
    "rows up to a multiple of 64": [mock.patch.object(packed, "_MULTIPLES", ((-1, 1),))],
}


@contextlib.contextmanager
def switched_off(trick: str) -> Iterator[None]:
    """Switch one trick off inside a `with` statement."""
    with contextlib.ExitStack() as stack:
        for patch in TRICKS[trick]:
            stack.enter_context(patch)
        kernels._known.clear()
        yield
    kernels._known.clear()


def print_tricks(
    encoder: SentenceEncoder, texts: dict[str, list[str]], options: argparse.Namespace
) -> None:
    """Print the time without a trick over the time with it, median and range of the rounds."""
    names = ["W1", "W2", "W3"]
    print(f"| {str(encoder.dtype)[6:]} without | {' | '.join(names)} |")
    print("| --- |" + " ---: |" * len(names))
    usual = packed.default_budget(encoder.device, encoder.dtype)
    for trick in TRICKS:
        ratios = defaultdict(list)
        for number in range(options.rounds):
            for name in names:
                budget = usual - 130 * number
                run = lambda: encoder.encode(texts[name], token_budget=budget)  # noqa: B023, E731
                on = seconds(run)
                with switched_off(trick):
                    off = seconds(run)
                ratios[name].append(off / on)
        print(f"| {trick} | {' | '.join(spread(ratios[name]) for name in names)} |", flush=True)
    dtype = str(encoder.dtype)[6:]
    ratios = defaultdict(list)
    for _ in range(options.rounds):
        with_it, without = (child(options, dtype, x) for x in ([], ["--no-kept-memory"]))
        for name in names:
            ratios[name].append(without[name] / with_it[name])
    print(f"| freed memory kept | {' | '.join(spread(ratios[name]) for name in names)} |\n")


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def child(options: argparse.Namespace, dtype: str, extra: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", options.model, "--scale", str(options.scale)]
    command += ["--seconds-only", dtype, *extra]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(zip(("W1", "W2", "W3"), map(float, output.split()), strict=True))


def seconds_in_a_fresh_process(options: argparse.Namespace) -> str:
    """Return the seconds of each workload, separated by blanks, for `child` to read."""
    if options.no_kept_memory:
        kernels._keep_freed_memory = lambda: None  # type: ignore[assignment]
    encoder = SentenceEncoder.from_pretrained(options.model, dtype=options.seconds_only)
    texts = workloads(encoder, options.scale)
    taken = []
    for name in ("W1", "W2", "W3"):
        encoder.encode(texts[name])
        taken.append(str(seconds(lambda: encoder.encode(texts[name]))))  # noqa: B023
    return " ".join(taken)


# --- Eight bits -----------------------------------------------------------------------------------


def print_int8(rates: dict[str, float], times: dict[str, float]) -> None:
    """Print how much faster bfloat16 would be if its products took the time of the 8-bit ones."""
    if "int8 with quantization" not in rates or "bfloat16, as minilm" not in rates:
        return
    for name in ("W1", "W2", "W3"):
        bounds = []
        for way in ("int8", "int8 with quantization"):
            saved = rates["bfloat16, as minilm"] - rates[way]
            bounds.append(times[name] / (times[name] - saved))
        print(
            f"{name}: with 8-bit products in place of all of bfloat16's at most {bounds[0]:.2f} "
            f"times as fast if rounding to 8 bits cost nothing, {bounds[1]:.2f} with what it costs."
        )


if __name__ == "__main__":
    main()

"""oneDNN's matrix product, which torch has in it and doesn't use for `F.linear` in float32.

In: rows and a weight on a CPU, in float32 or bfloat16. Out: rows Wᵀ + b, as `F.linear` has it but
for rounding. MKL, which is behind `F.linear` and `torch.mm` in float32, is Intel's, and slower on
AMD's processors: `scripts/bench/bench.py` prints the speed of both. `inference/kernels.py`,
`similarity.py` and `tasks/` multiply by this.

The operator is the one that `torch.compile` emits when it freezes a model. It is no public API, so
that it is looked up first; and it has no gradient.
"""

import platform

import torch
from torch import Tensor

from minilm.forks import unforked

__all__ = ["has_onednn", "is_dense", "linear", "scores"]

# Numbers of a corpus from which on a product with it takes longer than to prepare one of a new
# size, which oneDNN does in some milliseconds, and keeps: 16 MB in float32.
_LARGE = 2**22


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN's operator is in this build, and takes this dtype on this processor.

    On others than x86 it has no fast kernel, as far as we know, for a weight that is not packed.
    """
    operators = torch.ops.mkldnn
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(operators, "_linear_pointwise")
        and (dtype != torch.bfloat16 or operators._is_mkldnn_bf16_supported())
    )


def is_dense(matrix: Tensor) -> bool:
    """Whether the numbers lie side by side in memory, by rows or by columns.

    For others, with gaps between the rows, oneDNN has only a slow implementation, for reference.
    """
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[n, in]`, `[out, in]`, `[out]` -> `[n, out]`, all in one dtype, where `has_onednn` of it."""
    output: Tensor = torch.ops.mkldnn._linear_pointwise.default(rows, weight, bias, "none", [], "")
    return output


def scores(queries: Tensor, corpus: Tensor) -> Tensor:
    """The dot products of rows, `[n, d] x [m, d] -> [n, m]`, by the faster way.

    Any device, and any dtype that both have. Each may be off as in a sum of d numbers in any order.
    Where a gradient is recorded, or torch compiles, it is torch's own product.
    """
    records = torch.is_grad_enabled() and (queries.requires_grad or corpus.requires_grad)
    if (
        corpus.numel() >= _LARGE
        and not records
        and not torch.compiler.is_compiling()
        and corpus.device.type == "cpu"
        and corpus.dtype == torch.float32
        and is_dense(corpus)
        and has_onednn(corpus.dtype)
    ):
        return unforked(linear, queries, corpus)
    return torch.mm(queries, corpus.T)

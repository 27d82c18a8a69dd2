"""minilm: all-MiniLM-L6-v2 from scratch in PyTorch.

A sentence passes these files, which are best read in this order:

1. `tokenizer.py`   text -> token ids
2. `bert.py`        token ids -> embeddings -> six layers -> token vectors: the architecture
3. `pooling.py`     token vectors -> one vector of length 1
4. `pipeline.py`    `Pipeline`, which composes the three
5. `encoder.py`     `SentenceEncoder`, a pipeline that loads itself and takes texts

Beside them lies what everything stands on: `config.py` the sizes of the network, `errors.py` what
can go wrong, `inputs.py` what may be passed, `source.py` the files of a model, `vectors.py` vectors
in any form, `similarity.py` how they are compared, `quantize.py` how they are made smaller,
`report.py` how findings are shown, `disk.py`, `outputs.py` and `streams.py` where things are
written and read, `forks.py` what becomes of forked children. `util.py` has the names that
sentence-transformers gives to much of this.

The rest is in wings. The `__init__.py` of a wing says what it is for, and how to read it:

- `inference/`   how `encode` runs: batches without padding, fast products, long text, processes
- `pretrained/`  a model's files, in and out, and which model it is
- `interpret/`   every number by name, a similarity as a sum, a page of both
- `tasks/`       what vectors are good for: search, pairs, groups, duplicates
- `index/`       a corpus in a folder
- `files/`       files of texts and vectors, of any size
- `parity/`      is another implementation, or a file of vectors, this model?
- `adapters/`    the encoder in the frameworks that people use
- `cli/`         the command line
"""

import importlib
import logging
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from minilm import forks  # noqa: F401  # which looks after forked children from here on
from minilm.version import __version__ as __version__

# Names and where they live. They are imported when first used (PEP 562), so that `import minilm`
# and `minilm --help` don't load torch.
_HOMES = {
    name: module
    for module, names in {
        "adapters.sklearn": "MiniLMVectorizer",
        "bert": "BertEmbeddings BertFeedForward BertLayer BertModel BertSelfAttention attention",
        "config": "BertConfig",
        "encoder": "SentenceEncoder",
        "errors": "MinilmError TruncationError TruncationWarning",
        "inference.truncation": "EncodeReport TextWindow",
        "interpret.explain": "Explanation",
        "interpret.trace": "Trace",
        "pooling": "ClsPooling MeanPooling Normalize",
        "pretrained.fingerprint": "Fingerprint",
        "quantize": "quantize_embeddings",
        "similarity": "SimilarityFunction cos_sim",
        "tokenizer": "WordPieceTokenizer",
    }.items()
    for name in names.split()
}

if TYPE_CHECKING:
    from minilm.adapters.sklearn import MiniLMVectorizer
    from minilm.bert import (
        BertEmbeddings,
        BertFeedForward,
        BertLayer,
        BertModel,
        BertSelfAttention,
        attention,
    )
    from minilm.config import BertConfig
    from minilm.encoder import SentenceEncoder
    from minilm.errors import MinilmError, TruncationError, TruncationWarning
    from minilm.inference.truncation import EncodeReport, TextWindow
    from minilm.interpret.explain import Explanation
    from minilm.interpret.trace import Trace
    from minilm.pooling import ClsPooling, MeanPooling, Normalize
    from minilm.pretrained.fingerprint import Fingerprint
    from minilm.quantize import quantize_embeddings
    from minilm.similarity import SimilarityFunction, cos_sim
    from minilm.tokenizer import WordPieceTokenizer

__all__ = [
    "BertConfig", "BertEmbeddings", "BertFeedForward", "BertLayer", "BertModel",
    "BertSelfAttention", "ClsPooling", "EncodeReport", "Explanation", "Fingerprint", "MeanPooling",
    "MiniLMVectorizer", "MinilmError", "Normalize", "SentenceEncoder", "SimilarityFunction",
    "TextWindow", "Trace", "TruncationError", "TruncationWarning", "WordPieceTokenizer",
    "__version__", "attention", "cos_sim", "quantize_embeddings",
]  # fmt: skip

logging.getLogger(__name__).addHandler(logging.NullHandler())

# Names that need a package of an extra, and the package. Where it is not installed there is no such
# name: `from minilm import *` would stop at it.
_NEEDS = {"MiniLMVectorizer": "sklearn"}


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # a finder, or what is imported already, says so
        return False


for _name, _package in _NEEDS.items():
    if not _is_installed(_package):
        __all__.remove(_name)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ImportError as error:
        # Python's own import, which asks first whether the name is there, would take an
        # AttributeError for "no", and say nothing of what to install.
        is_import = sys._getframe(1).f_globals.get("__name__") == "importlib._bootstrap"
        if name not in _NEEDS or is_import:
            raise
        raise AttributeError(str(error)) from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

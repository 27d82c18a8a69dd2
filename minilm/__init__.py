"""minilm: all-MiniLM-L6-v2 from scratch in PyTorch.

A sentence goes through these files, which are best read in this order:

1. `tokenizer.py`   text -> token ids
2. `bert.py`        token ids -> embeddings -> six layers -> token vectors: the architecture
3. `pooling.py`     token vectors -> one vector of length 1
4. `encoder.py`     `SentenceEncoder`, which composes the three

and before the first sentence, to load the published weights:

5. `hub.py`         a folder or a name on the Hub -> verified files
6. `folder.py`      those files -> everything that the encoder is built from, checked
7. `checkpoint.py`  safetensors -> tensors under our names
8. `config.py`      the sizes of the network

Text is taken in any form and vectors are given in any: `encode.py` is what users call, `compute.py`
one call computed, `truncation.py` what is done about long text, `process_pool.py` several
processes, `quantize.py` vectors in few bits, `options.py` what may be passed to load a model.
`save.py` writes a model's folder, `fingerprint.py` records which model made vectors, `check.py`
tells it from the vectors. `tasks/` searches and groups them, `indexing.py` keeps texts to search
in, and `util.py` has the names that sentence-transformers gives to all that.

Files of any size: `sources.py` reads them, `streaming.py` embeds them, `shards.py` writes the
parts, `arrow.py` makes vectors a column, `check_folder.py` verifies it all. `adapters/` puts the
encoder into the frameworks that people use.

The same numbers faster: `packed.py` lays sentences end to end, `kernels.py` multiplies. And the
model explained by itself: `trace.py` shows every number of a pass, `explain.py` splits a similarity
into its parts, `tour.py` makes a page of both, `causes.py` finds out why another implementation
gives other vectors. `inside.py` makes methods of them.

Beside them: `vectors.py` reads vectors in any form, `similarity.py` compares them, `inputs.py` says
what may be passed, `errors.py` what can go wrong, `eval_mode.py` keeps dropout out of `encode`,
`forks.py` looks after forked children, `parity.py` proves equality with the reference, `files.py`
reads and writes files of texts, `disk.py` whole or not at all, `cli.py` is the command line and
`commands.py` what it does.
"""

import importlib
import logging
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from minilm import forks  # noqa: F401  # which looks after forked children from here on

__version__ = "0.1.0"

# Names and where they live. They are imported when first used (PEP 562), so that `import minilm`
# and `minilm --help` don't load torch.
_HOMES = {
    "BertConfig": "config",
    "BertEmbeddings": "bert",
    "BertFeedForward": "bert",
    "BertLayer": "bert",
    "BertModel": "bert",
    "BertSelfAttention": "bert",
    "ClsPooling": "pooling",
    "EncodeReport": "truncation",
    "Explanation": "explain",
    "Fingerprint": "fingerprint",
    "MeanPooling": "pooling",
    "MiniLMVectorizer": "adapters.sklearn",
    "MinilmError": "errors",
    "Normalize": "pooling",
    "SentenceEncoder": "encoder",
    "SimilarityFunction": "similarity",
    "TextWindow": "truncation",
    "Trace": "trace",
    "TruncationError": "errors",
    "TruncationWarning": "errors",
    "WordPieceTokenizer": "tokenizer",
    "attention": "bert",
    "cos_sim": "similarity",
    "quantize_embeddings": "quantize",
}

if TYPE_CHECKING:
    from minilm.adapters.sklearn import MiniLMVectorizer as MiniLMVectorizer
    from minilm.bert import BertEmbeddings as BertEmbeddings
    from minilm.bert import BertFeedForward as BertFeedForward
    from minilm.bert import BertLayer as BertLayer
    from minilm.bert import BertModel as BertModel
    from minilm.bert import BertSelfAttention as BertSelfAttention
    from minilm.bert import attention as attention
    from minilm.config import BertConfig as BertConfig
    from minilm.encoder import SentenceEncoder as SentenceEncoder
    from minilm.errors import MinilmError as MinilmError
    from minilm.errors import TruncationError as TruncationError
    from minilm.errors import TruncationWarning as TruncationWarning
    from minilm.explain import Explanation as Explanation
    from minilm.fingerprint import Fingerprint as Fingerprint
    from minilm.pooling import ClsPooling as ClsPooling
    from minilm.pooling import MeanPooling as MeanPooling
    from minilm.pooling import Normalize as Normalize
    from minilm.quantize import quantize_embeddings as quantize_embeddings
    from minilm.similarity import SimilarityFunction as SimilarityFunction
    from minilm.similarity import cos_sim as cos_sim
    from minilm.tokenizer import WordPieceTokenizer as WordPieceTokenizer
    from minilm.trace import Trace as Trace
    from minilm.truncation import EncodeReport as EncodeReport
    from minilm.truncation import TextWindow as TextWindow

__all__ = [
    "BertConfig",
    "BertEmbeddings",
    "BertFeedForward",
    "BertLayer",
    "BertModel",
    "BertSelfAttention",
    "ClsPooling",
    "EncodeReport",
    "Explanation",
    "Fingerprint",
    "MeanPooling",
    "MiniLMVectorizer",
    "MinilmError",
    "Normalize",
    "SentenceEncoder",
    "SimilarityFunction",
    "TextWindow",
    "Trace",
    "TruncationError",
    "TruncationWarning",
    "WordPieceTokenizer",
    "__version__",
    "attention",
    "cos_sim",
    "quantize_embeddings",
]

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

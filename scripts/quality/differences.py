"""Show what is equal to the reference, sentence-transformers, what differs, and why.

    python scripts/quality/differences.py [--group NAME] [--markdown FILE] [--no-processes]

Every row is one call, written once and made on both. Its policy says what has to come of it:

    M  match: same type, shape, dtype and values, or an error of the same class
    B  better: the reference fails or is wrong there, so nobody can rely on what it does
    D  documented difference: there is a reason

Exit status: 0 if every row is as its policy says, else 1. --markdown FILE writes a table of the
reasons of all B and D, each with an example. Needs the weights and
pip install "minilm[reference]".
"""

import argparse
import contextlib
import copy
import io
import logging
import os
import pickle
import re
import sys
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import results  # noqa: E402
from minilm.pretrained import hub  # noqa: E402

INTRODUCTION = """Each row is one reason, with a call as an example. A difference is either on \
purpose (D), or because the reference fails or is wrong there (B). All other calls that the script \
makes give the same type, shape, dtype and values on both sides.

"""
ATOL = 4e-7  # of float32 results, unless a row says more

# "== group"; "M", or "B" or "D" with the reason; then calls. Behind one, "  # 6" says of which
# version of the reference it is, "  # 1e-5" how far apart numbers may be, "  # 6, 1e-5" both.
CALLS = r"""
== input
M
model.encode(A)
model.encode(np.str_(A))
model.encode(Text(A))
model.encode([A])
model.encode(TEXTS)
model.encode((A, B))
equal(model.encode((A, B)), model.encode([A, B]))
model.encode("")
model.encode(["", A])
model.encode("  \n\t")
equal(model.encode("  \n\t"), model.encode(""))
equal(model.encode(f"  {A}\n"), model.encode(A))
model.encode(np.array(TEXTS))
model.encode(np.array(TEXTS, object))
model.encode(np.array(TEXTS * 2)[::2])
model.encode(PAIRS)
model.encode([list(pair) for pair in PAIRS])
model.encode(np.array(PAIRS))
model.encode([(LONG, A), (A, LONG), (LONG, LONG)])
model.encode([A, (A, B)])  # 6
model.encode(sentences=TEXTS)
model.encode(inputs=TEXTS)  # 6
model.encode([], convert_to_numpy=False)
model.encode([], output_value="token_embeddings")
model.encode([], output_value=None)
model.encode()
D no texts keep the width and the dtype, so that what works for n works for 0
model.encode([])
model.encode(())
model.encode(np.array([], object))
model.encode([], convert_to_tensor=True)
model.encode([], precision="binary")
D this model reads text; a dict of modalities is refused
model.encode({"text": A})  # 6
model.encode([{"text": A}, {"text": B}])
B any iterable of texts is read, in positional order
model.encode(text for text in TEXTS)
model.encode(map(str, TEXTS))
model.encode(iter(TEXTS))
model.encode({A: 1, B: 2}.keys())
model.encode({1: A, 2: B}.values())
model.encode(deque(TEXTS))  # 6
model.encode(np.array(A))
model.encode(np.array(TEXTS, np.dtypes.StringDType()))  # 6
model.encode(pd.Series(TEXTS))  # 6
model.encode(pd.Series(TEXTS, index=[5, 6, 7]))
model.encode(pd.Series(TEXTS, index=[2, 0, 1]))
model.encode(pd.Index(TEXTS))  # 6
model.encode(pd.DataFrame({"t": TEXTS})["t"].values)  # 6
model.encode(pl.Series(TEXTS))  # 6
model.encode(pa.array(TEXTS))
B anything that is not text is refused, with its row; nothing is turned into a string
model.encode({A, B})
model.encode({"a": A})
model.encode(None)
model.encode([None])
model.encode([A, None])
model.encode(5)
model.encode([5])
model.encode([True])
model.encode(Path(A))
model.encode([A, float("nan")])
model.encode([b"abc"])
model.encode([[101, 1996, 102]])
model.encode(np.array([b"abc"]))
model.encode([(A, B, C)])
model.encode([[A], [B]])
model.encode(pd.DataFrame({"t": TEXTS}))
model.encode(pd.Series([A, None]))
model.encode([A, "\ud800"])
model(A)
== text
M
model.encode(ODD)
model.encode("word " * 200_000)
equal(model.encode(A.upper()), model.encode(A.lower()))
equal(model.encode("Caf\u00e9"), model.encode("cafe"), model.encode("Cafe\u0301"))
equal(model.encode("a" * 101), model.encode("a" * 5000), model.encode("[UNK]"))
equal(model.encode("a" * 100), model.encode("[UNK]"))
equal(model.encode("\U0001f600"), model.encode("[UNK]"))
equal(model.encode("\x00\ufeffcat"), model.encode("cat"))
== length
M
model.max_seq_length
model.get_max_seq_length()
model.encode(["word " * n for n in (1, 253, 254, 255, 1000)])
equal(model.encode("word " * 254), model.encode("word " * 1000))
equal(model.encode("word " * 253), model.encode("word " * 254))
changed(max_seq_length=64).encode(LONG)
changed(max_seq_length=512).encode(LONG)
changed(max_seq_length=3).encode(LONG)
changed(max_seq_length=64).max_seq_length
B a limit that the model can't read is refused when it is set
changed(max_seq_length=513).encode(LONG)
changed(max_seq_length=1).encode(LONG)
changed(max_seq_length=0).encode(LONG)
changed(max_seq_length="64").encode(LONG)
D None is no limit that the model has; 5 goes on with the one of before
changed(max_seq_length=None).encode(LONG)
D text that is cut is said, once a call
warned(lambda: model.encode([LONG, A]))
== output
M
flags(model.encode(TEXTS))
equal(model.encode(A, output_value=None)["sentence_embedding"], model.encode(A))
model.encode(TEXTS, convert_to_tensor=True).requires_grad
model.encode(A, convert_to_tensor=True).device.type
model.encode([A, B, A])[0].tolist() == model.encode([A, B, A])[2].tolist()
equal(model.encode(TEXTS), model.encode(TEXTS))
[len(row) for row in model.encode(TEXTS, output_value="token_embeddings")]
model.encode(A, output_value="token_embeddings")  # 5e-6
model.encode(A, output_value=None)  # 6, 5e-6
model.encode([A, LONG, ""], output_value=None)  # 6, 5e-6
model.encode(TEXTS, output_value=None, prompt="query: ")  # 6, 5e-6
model.encode(PAIRS, output_value=None)  # 6, 5e-6
model.encode(PAIRS, output_value="token_embeddings")  # 5e-6
model.encode(TEXTS, truncate_dim=1000)
model.encode(TEXTS, precision=None)
model.encode(TEXTS, precision="float16")
model.encode(TEXTS, precision="ubinary", truncate_dim=100)  # 6
model.encode(TEXTS, batch_size=1)
model.encode(TEXTS, batch_size=np.int64(2))
model.encode(TEXTS, batch_size=0)  # 6
model.encode(TEXTS, batch_size=-1)  # 6
model.encode(TEXTS, batch_size=2.5)
model.encode(TEXTS, batch_size="2")
model.encode(TEXTS, show_progress_bar=True)
model.encode(TEXTS, show_progress_bar=False)
model.encode(TEXTS, device="cpu")
model.encode(TEXTS, device=torch.device("cpu"))
model.encode(TEXTS, task="query")  # 6
model.encode(TEXTS, None, None, 2, False, "sentence_embedding", "float32", False, True, "cpu", True)
model.encode(TEXTS, None, "query: ", 2)
half().encode(TEXTS)  # 1e-3
half().encode(TEXTS, convert_to_tensor=True)  # 1e-3
bfloat16().encode(TEXTS)  # 8e-3
bfloat16().encode(TEXTS, convert_to_tensor=True)  # 8e-3
double().encode(TEXTS)  # 1e-12
under(torch.autocast("cpu", torch.bfloat16), lambda: model.encode(TEXTS).dtype)
threads(4, lambda: model.encode(TEXTS + [LONG]))
model.encode(TEXTS, nonsense=1)  # 6
D ordinary tensors, which can be changed and used in training
model.encode(TEXTS, convert_to_tensor=True).is_inference()
model.encode(A, convert_to_tensor=True).mul_(2)
D int8 has fixed ranges, so that codes of any two calls can be compared
model.encode(TEXTS, precision="int8")
model.encode(TEXTS, precision="uint8")
D what version 6 adds is there with version 5 too
sorted(model.encode(A, output_value=None))  # 5
logged(lambda: model.encode(TEXTS, prompt="query: ", prompt_name="query"))  # 5
B bits of any width fill bytes up, and bytes hold what they can, where version 5 fails or wraps
model.encode(TEXTS, precision="ubinary", truncate_dim=100)  # 5
quantize_embeddings(X, "int8", ranges=np.stack([X.min(0), X.max(0)]))  # 5
B as many pairs as there are are found
util.paraphrase_mining(model, TEXTS, max_pairs=2, top_k=1)  # 5
B a pair among texts is read as a pair
model.encode([A, (A, B)])  # 5
B one text is quantized with the same fixed ranges as many
model.encode(A, precision="int8")
model.encode([A], precision="uint8")
D token vectors are not quantized
model.encode(TEXTS, output_value="token_embeddings", precision="int8")
model.encode(TEXTS, output_value=None, precision="int8")
B no limit
model.encode(TEXTS, batch_size=None)
B an argument that can't be used is named
model.encode(TEXTS, output_value="cls")
model.encode(TEXTS, truncate_dim=0)
model.encode(TEXTS, truncate_dim=-1)
model.encode(TEXTS, truncate_dim="16")
model.encode(TEXTS, truncate_dim=16.0)
model.encode(TEXTS, device="nonsense")
model.encode(TEXTS, device=f"cuda:{torch.cuda.device_count()}")
B NaN and infinity are an error with its rows
broken().encode(TEXTS)
broken().encode(TEXTS, convert_to_tensor=True)
== prompts
M
model.prompts
model.default_prompt_name
model.encode(TEXTS, prompt="query: ")
equal(model.encode(A, prompt="query: "), model.encode("query: " + A))
model.encode(LONG, prompt="query: ")
model.encode(PAIRS, prompt="query: ")  # 6
prompted.encode(TEXTS)
prompted.encode(TEXTS, prompt_name="q")
prompted.encode(TEXTS, prompt="")
prompted.encode_query(TEXTS)
prompted.encode_document(TEXTS)
prompted.encode_document(TEXTS, prompt_name="q")
prompted.encode_query(TEXTS, prompt="other: ")
model.encode_query(A)
model.encode_query(sentences=TEXTS)
model.encode_document(inputs=TEXTS)  # 6
model.encode_query(TEXTS, None, "query: ", 2, False, "sentence_embedding", "float32", False, True)
model.encode_document([], convert_to_numpy=False)
changed(default_prompt_name="document").encode(TEXTS)
model.encode(TEXTS, prompt_name="nope")
message(lambda: model.encode(TEXTS, prompt_name="nope"))
logged(lambda: model.encode(TEXTS, prompt="query: ", prompt_name="query"))  # 6
model.encode_query(TEXTS, nonsense=1)  # 6
B an argument that can't be used is named
model.encode(TEXTS, prompt=5)
== similarity
M
model.similarity(X, Y)
model.similarity(torch.tensor(X), Y)
model.similarity(list(torch.tensor(X)), Y)  # 6
model.similarity(X[0], Y[0])
model.similarity(X[0], Y)
model.similarity(X.tolist(), Y.tolist())
model.similarity_pairwise(X[0], Y[0])  # 6
model.similarity(X.astype(np.float64), Y.astype(np.float64))
model.similarity(np.zeros((1, 4), np.float32), np.ones((1, 4), np.float32))
model.similarity_pairwise(X, X[::-1].copy())
changed(similarity_fn_name="dot").similarity(X, Y)
changed(similarity_fn_name="euclidean").similarity(X, Y)  # 2e-6
changed(similarity_fn_name="manhattan").similarity(X, Y)  # 5e-6
changed(similarity_fn_name="euclidean").similarity_pairwise(X, X + 1)  # 5e-5
changed(similarity_fn_name="manhattan").similarity_pairwise(X, X + 1)  # 5e-5
changed(similarity_fn_name=SimilarityFunction.DOT_PRODUCT).similarity_fn_name
model.similarity_fn_name
changed(similarity_fn_name="bad").similarity_fn_name
model.similarity(X, Y).device.type
util.cos_sim(X, Y)
util.pytorch_cos_sim(X, Y)
util.dot_score(X, Y)
util.euclidean_sim(X, Y)  # 2e-6
util.manhattan_sim(X, Y)  # 5e-6
util.pairwise_cos_sim(X, X + 1)
util.pairwise_dot_score(X, X + 1)  # 1e-6
util.pairwise_euclidean_sim(X, X + 1)  # 5e-5
util.pairwise_manhattan_sim(X, X + 1)  # 5e-5
util.normalize_embeddings(torch.tensor(X) + 1)
util.truncate_embeddings(X, 16)
util.truncate_embeddings(torch.tensor(X), None)
util.batch_to_device({"a": torch.ones(2), "b": 1}, "cpu")
util.semantic_search(X, Y)
util.semantic_search(X, Y, top_k=1)
util.semantic_search(list(torch.tensor(X)), list(Y), top_k=2)  # 6
util.semantic_search(torch.ones(2, 16), torch.empty(0))  # 6
util.semantic_search(torch.tensor(X[0]), torch.tensor(Y), top_k=99, score_function=util.dot_score)
util.paraphrase_mining_embeddings(X)
util.paraphrase_mining(model, TEXTS + ODD[:3])
util.paraphrase_mining(model, TEXTS, max_pairs=2, top_k=1)  # 6
util.community_detection(GROUPS, threshold=0.9, min_community_size=2)
util.community_detection(torch.tensor(GROUPS), 0.99, 1)
util.community_detection(X[:0], min_community_size=4)  # 6
util.pairwise_euclidean_sim([[1, 2], [4, 6]], [[1, 2], [1, 2]])  # 6
[quantize_embeddings(X, p) for p in ("float32", "int8", "uint8", "binary", "ubinary")]  # 6
quantize_embeddings(torch.tensor(X), "ubinary")
quantize_embeddings(X, "int8", ranges=np.stack([X.min(0), X.max(0)]))  # 6
quantize_embeddings(X, "uint8", calibration_embeddings=np.concatenate([X, Y]))
quantize_embeddings(X, "float16")
SimilarityFunction.to_similarity_fn("dot")(X, Y)
SimilarityFunction.to_similarity_pairwise_fn("cosine")(X, X)
SimilarityFunction("cosine").value
SimilarityFunction("bad")
B two single vectors have one similarity
model.similarity_pairwise(X[0], Y[0])  # 5
B vectors of different widths, or not as many, are named as such
model.similarity_pairwise(X, Y)
model.similarity(X, Y[:, :100])
B integer codes are compared as numbers
model.similarity(np.int8([[1, 2]]), np.int8([[2, 1]]))
B as many rows are asked for, where the reference repeats one
model.similarity_pairwise(X, Y[:1])
D what serves training, other kinds of models or other packages' indexes is not here
[hasattr(util, x) for x in ("mine_hard_negatives", "http_get", "pairwise_angle_sim")]
[hasattr(util, x) for x in ("information_retrieval", "maxsim", "mean_maxsim")]  # 6
util.cos_sim(torch.eye(2).to_sparse(), torch.eye(2)).shape
D maxsim is for models with a vector for each token
SimilarityFunction.possible_values()  # 6
== construct
M
Model(FOLDER).encode(TEXTS)
Model(model_name_or_path=FOLDER).encode(TEXTS)
under(contextlib.chdir(Path(FOLDER).parent), lambda: Model("all-MiniLM-L6-v2").encode(TEXTS))
Model("all-MiniLM-L6-v2", cache_folder=CACHE).encode(TEXTS)
Model("sentence-transformers/all-MiniLM-L6-v2", cache_folder=CACHE, revision="main").encode(A)
Model(FOLDER, prompts={"q": "query: "}).prompts
Model(FOLDER, prompts={"q": "query: "}, default_prompt_name="q").encode(TEXTS)
Model(FOLDER, default_prompt_name="nope")
message(lambda: Model(FOLDER, default_prompt_name="nope"))
Model(FOLDER, similarity_fn_name="dot").similarity_fn_name
Model(FOLDER, similarity_fn_name=SimilarityFunction.EUCLIDEAN).similarity_fn_name
Model(FOLDER, similarity_fn_name="bad").similarity_fn_name
Model(FOLDER, truncate_dim=64).encode(TEXTS)
Model(FOLDER, truncate_dim=64).truncate_dim
Model(FOLDER, device="cpu").device.type
Model(FOLDER, device=torch.device("cpu")).device.type
Model(FOLDER, local_files_only=True, trust_remote_code=True, token=False, revision=None).encode(A)
Model(FOLDER, backend="torch", model_kwargs={}, config_kwargs=None).encode(A)
Model(FOLDER, model_kwargs={"torch_dtype": "float32"}).encode(A)
Model(FOLDER, model_kwargs={"torch_dtype": "auto", "attn_implementation": "eager"}).encode(A)
Model(FOLDER, model_kwargs={"torch_dtype": torch.float64}).encode(A)  # 1e-12
Model(FOLDER).half().encode(TEXTS)  # 1e-3
Model(FOLDER, model_kwargs={"torch_dtype": torch.bfloat16}).encode(TEXTS)  # 8e-3
Model("/no/such/folder")
Model(FOLDER, token="a", use_auth_token="b")
Model(modules=[])  # 6
D bfloat16 is for the matrix products; what is added up between them stays float32
Model(FOLDER, model_kwargs={"torch_dtype": "bfloat16"}).encode(TEXTS, convert_to_tensor=True)
D weights are saved as safetensors only, never as pickles
changed().save_pretrained(folder(), safe_serialization=False)
D a tokenizer is passed beside modules, since no module here is one
Model(modules=list(model)).encode(TEXTS)
B a model is asked for; nothing can be done with none
Model()
D what would have no effect here is refused by name
Model(FOLDER, tokenizer_kwargs={"padding_side": "left"})
Model(FOLDER, config_kwargs={"hidden_dropout_prob": 0.5})
Model(FOLDER, model_kwargs={"use_cache": False})
B a device that can't be used is named before anything is loaded
Model(FOLDER, device="nonsense")
Model(FOLDER, device=f"cuda:{torch.cuda.device_count()}")
== attributes
M
model.get_sentence_embedding_dimension()
model.get_embedding_dimension()  # 6
changed(truncate_dim=64).get_sentence_embedding_dimension()
changed(truncate_dim=1000).get_sentence_embedding_dimension()
changed(truncate_dim=64).encode(TEXTS)
changed(truncate_dim=64).encode(TEXTS, truncate_dim=32)
changed(truncate_dim=64).encode(A, output_value=None)["sentence_embedding"]
under(model.truncate_sentence_embeddings(64), lambda: model.encode(TEXTS))
under(model.truncate_embeddings(64), lambda: model.encode(TEXTS))  # 6
under(model.truncate_sentence_embeddings(None), lambda: model.get_sentence_embedding_dimension())
model.truncate_dim
len(model)
len(list(model))
isinstance(model[0], torch.nn.Module)
model[-1] is list(model)[2]
model[7]
isinstance(model, torch.nn.Module)
model.device.type
str(model.dtype)  # 6
model.training
model.eval() is model
model.to("cpu") is model
sum(p.numel() for p in model.parameters()) > 22_000_000
model.tokenize(TEXTS)  # 5
model.tokenize(PAIRS)  # 5
model.tokenize(TEXTS)["input_ids"]
model.tokenize(PAIRS)["token_type_ids"]
model.tokenize([LONG])["attention_mask"]
model.preprocess(TEXTS)  # 6
model.preprocess(TEXTS, prompt="query: ")  # 6
model.preprocess([])  # 6
model(model.tokenize(TEXTS))["sentence_embedding"].detach()
{**model(model.tokenize(TEXTS)), 'modality': 'text'}  # 5e-6
model(model.tokenize(TEXTS))["sentence_embedding"].requires_grad
[model.is_singular_input(x) for x in (A, [A], (A, B), np.array(TEXTS), [], np.str_(A))]  # 6
D tokenize gives what it gave in version 5, preprocess what it gives in version 6
model.tokenize(TEXTS)  # 6
D the parts are this package's own
[type(part).__name__ for part in model]
type(model.tokenizer).__name__
model.tokenizer.model_max_length
model[0].auto_model
list(model.state_dict())[-1]
D inference only: no training, adapters, evaluation, model cards or upload
[hasattr(model, x) for x in ("fit", "old_fit", "smart_batching_collate", "add_adapter", "evaluate")]
[hasattr(model, x) for x in ("model_card_data", "push_to_hub", "save_to_hub")]
D one kind of model: nothing to ask for
[hasattr(model, x) for x in ("modalities", "processor", "get_backend", "transformers_model")]
[hasattr(model, x) for x in ("set_pooling_include_prompt", "get_sentence_features", "load")]
D a network of fixed parts: no module is added or replaced
[hasattr(model, x) for x in ("append", "insert", "extend", "pop")]
== persistence
M
copy.deepcopy(model).encode(TEXTS)
pickle.loads(pickle.dumps(model)).encode(TEXTS)
Model(saved(model)).encode(TEXTS)
equal(Model(saved(model)).encode(TEXTS), model.encode(TEXTS))
Other(saved(model)).encode(TEXTS)
Model(saved(prompted)).prompts
Other(saved(prompted)).encode(TEXTS)
Other(saved(prompted)).default_prompt_name
Model(saved(changed(similarity_fn_name="dot"))).similarity_fn_name
Other(saved(changed(max_seq_length=64))).encode(LONG)
{"modules.json", "config.json", "model.safetensors", "README.md"} <= files(saved(model))
model.save(folder(), create_model_card=False)
model.save_pretrained(folder(), model_name="me/mine")
== processes
M
model.encode(TEXTS, pool=pool, chunk_size=2)
model.encode(A, pool=pool)
model.encode([], pool=pool, convert_to_numpy=False)
model.encode(TEXTS, pool=pool, convert_to_tensor=True)
model.encode(TEXTS, pool=pool, convert_to_numpy=False)
model.encode(TEXTS, pool=pool, output_value="token_embeddings", chunk_size=1)  # 5e-6
model.encode(TEXTS, pool=pool, output_value=None)  # 6, 5e-6
model.encode(TEXTS, pool=pool, prompt="query: ", normalize_embeddings=True, truncate_dim=64)
model.encode(TEXTS, pool=pool, precision="ubinary")
model.encode(TEXTS, pool=pool, chunk_size=0)  # 6
model.encode_multi_process(TEXTS, pool)
model.encode_multi_process(TEXTS, pool, prompt="query: ", chunk_size=2)
sorted(pool)
len(pool["processes"])
model.encode(TEXTS, device=["cpu"])
D no texts keep the width and the dtype, so that what works for n works for 0
model.encode([], pool=pool)
B no device is an error
model.encode(TEXTS, device=[])
"""


@dataclass(frozen=True)
class Row:
    """A call, and the policy that says what has to come of it.

    Attributes:
        group: What it is about.
        call: The expression.
        policy: "M", "B" or "D".
        reason: Of a B or D.
        version: The reference's major version that it is about; None for both.
        atol: How far apart numbers may be.
    """

    group: str
    call: str
    policy: str
    reason: str = ""
    version: int | None = None
    atol: float = ATOL


def rows() -> list[Row]:
    """Return all rows of `CALLS`, in order."""
    found: list[Row] = []
    group, policy, reason = "", "M", ""
    for line in CALLS.strip().splitlines():
        call, _, note = line.partition("  # ")
        if line.startswith("== "):
            group = line[3:]
        elif line[:2].strip() in ("M", "B", "D"):
            policy, reason = line[0], line[2:]
        else:
            notes = note.split(", ") if note else []
            version = next((int(one) for one in notes if one in ("5", "6")), None)
            atol = next((float(one) for one in notes if one not in ("5", "6")), ATOL)
            found.append(Row(group, call, policy, reason, version, atol))
    return found + _combinations()


def _combinations() -> list[Row]:
    """Return every combination of the arguments that choose the form of the result."""
    found = []
    forms = ("", ", convert_to_numpy=False", ", convert_to_tensor=True")
    widths = ("", ", truncate_dim=64", ", truncate_dim=100", ", truncate_dim=1000")
    units = ("", ", normalize_embeddings=True")
    for precision, width, unit, form in product(
        ("float32", "int8", "uint8", "binary", "ubinary"), widths, units, forms
    ):
        call = f"model.encode(TEXTS, precision={precision!r}{width}{unit}{form})"
        if precision.endswith("int8"):  # the codes differ on purpose, see above
            call = f"kind({call})"
        version = 6 if precision.endswith("binary") and "100" in width else None
        # Scaled up again, a part of a vector has its rounding scaled up too.
        found.append(Row("combinations", call, "M", "", version, 1e-6 if unit else ATOL))
    for value, width, unit, form in product(("token_embeddings", None), widths[:2], units, forms):
        call = f"model.encode(TEXTS, output_value={value!r}{width}{unit}{form})"
        found.append(Row("combinations", call, "M", "", None if value else 6, 5e-6))
    return found


# --- what the calls see


class Text(str):
    """A subclass of `str`."""


A, B, C = "The cat sits outside", "A man is playing guitar", "The new movie is awesome, isn't it?"
LONG = "Seven people walked through the old town without an umbrella. " * 60
ODD = [
    "", "CAF\u00c9 au lait", "\u732b\u304c\u597d\u304d", "\U0001f600 smile", "a" * 101, "x" * 300,
    "[MASK] and [SEP]", "[PAD]", "\x00\ufeff\u200b", "Stra\u00dfe", "1,234.56 $", "don't",
    "\u0e44\u0e17\u0e22", "https://example.org/?q=a&b=c",
]  # fmt: skip
_random = np.random.default_rng(0).standard_normal


def _unit(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    unit: np.ndarray[Any, Any] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit.astype(np.float32)


VALUES: dict[str, Any] = {
    "A": A, "B": B, "C": C, "TEXTS": [A, B, C], "PAIRS": [(A, B), (B, C)], "LONG": LONG, "ODD": ODD,
    "X": _unit(_random((5, 384))), "Y": _unit(_random((7, 384))), "Text": Text, "Path": Path,
    "GROUPS": _unit(np.repeat(np.eye(3, 8), [4, 3, 2], 0) + 0.01 * _random((9, 8))),
    "np": np, "torch": torch, "kind": lambda value: describe(value), "copy": copy,
    "pickle": pickle, "deque": deque, "contextlib": contextlib,
}  # fmt: skip


class Side:
    """One of the two libraries, under the names that the calls have."""

    def __init__(self, folder: Path, is_ours: bool, other: "Side | None" = None) -> None:
        self.other = other
        kind: Any  # the class
        util: Any
        more: Any  # where SimilarityFunction and quantize_embeddings are
        if is_ours:
            import minilm
            import minilm.util

            kind, util, more = minilm.SentenceEncoder, minilm.util, minilm.util
        else:
            import sentence_transformers

            more = sentence_transformers
            kind, util = more.SentenceTransformer, more.util
        self.folder = str(folder)
        self.temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.make = partial(_with_device, kind)
        model = self.model = self.make(self.folder)
        prompts = {"q": "query: ", "query": "ask: ", "passage": "read: ", "corpus": "take: "}
        self.values = VALUES | {
            "util": util, "SimilarityFunction": more.SimilarityFunction, "FOLDER": self.folder,
            "quantize_embeddings": more.quantize_embeddings, "Model": self.make, "model": model,
            "prompted": self.make(self.folder, prompts=prompts, default_prompt_name="q"),
            "changed": self.changed, "half": lambda: copy.deepcopy(model).half(),
            "bfloat16": lambda: copy.deepcopy(model).bfloat16(), "saved": self.saved,
            "double": lambda: copy.deepcopy(model).double(), "broken": self.broken,
            "folder": lambda: tempfile.mkdtemp(dir=self.temporary.name), "message": _message,
            "equal": lambda first, *rest: all(np.array_equal(first, one) for one in rest),
            "logged": _logged, "warned": _warned, "threads": _threads, "under": _under,
            "files": lambda where: {path.name for path in Path(where).rglob("*")}, "flags": _flags,
        }  # fmt: skip

    @cached_property
    def pool(self) -> Any:
        return self.model.start_multi_process_pool(["cpu", "cpu"])

    @cached_property
    def cache(self) -> str:
        """A Hub cache that holds the published files."""
        place = Path(self.temporary.name) / "models--sentence-transformers--all-MiniLM-L6-v2"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text(hub.REVISION, encoding="utf-8")
        (place / "snapshots").mkdir()
        (place / "snapshots" / hub.REVISION).symlink_to(Path(self.folder).resolve())
        return self.temporary.name

    def close(self) -> None:
        if "pool" in vars(self):
            self.model.stop_multi_process_pool(self.pool)
        self.temporary.cleanup()

    def changed(self, **attributes: Any) -> Any:
        model = copy.deepcopy(self.model)
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    def broken(self) -> Any:
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            list(model.parameters())[10].fill_(float("nan"))
        return model

    def saved(self, model: Any) -> str:
        where = tempfile.mkdtemp(dir=self.temporary.name)
        model.save_pretrained(where)
        return where

    def __call__(self, call: str) -> Any:
        """Return what a call gives, or the exception that it raises."""
        values = dict(self.values)
        for name, module in (("pd", "pandas"), ("pl", "polars"), ("pa", "pyarrow")):
            if f"{name}." in call:
                values[name] = __import__(module)
        if re.search(r"\bpool\b", call):
            values["pool"] = self.pool
        if "CACHE" in call:
            values["CACHE"] = self.cache
        if "Other" in call and self.other is not None:
            values["Other"] = self.other.make
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            try:
                return eval(call, values)
            except Exception as error:
                return error


def _with_device(kind: Any, *given: Any, **options: Any) -> Any:
    return kind(*given, **({"device": "cpu"} | options))


def _under(context: Any, call: Callable[[], Any]) -> Any:
    with context:
        return call()


def _message(call: Callable[[], Any]) -> str:
    try:
        return f"nothing: {call()}"
    except Exception as error:
        return str(error)


def _warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [warning.category.__name__ for warning in caught]


def _logged(call: Callable[[], Any]) -> list[str]:
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        call()
    finally:
        logging.getLogger().removeHandler(handler)
    return found


def _threads(count: int, call: Callable[[], Any]) -> bool:
    """Return whether calls in threads give the same bits as one call alone."""
    expected, found = call(), []
    every = [threading.Thread(target=lambda: found.append(call())) for _ in range(count)]
    for thread in every:
        thread.start()
    for thread in every:
        thread.join()
    return len(found) == count and all(np.array_equal(one, expected) for one in found)


def _flags(array: np.ndarray[Any, Any]) -> tuple[bool, ...]:
    return array.flags.c_contiguous, array.flags.writeable, array.flags.owndata or True


# --- comparing


def describe(value: Any) -> str:
    """Return a result in a few words."""
    if isinstance(value, np.ndarray | Tensor):
        return f"{type(value).__name__} {list(value.shape)} {value.dtype}".replace("torch.", "")
    if isinstance(value, Mapping):
        return f"dict {', '.join(map(str, value))}"
    if isinstance(value, BaseException):
        line = (str(value).strip().splitlines() or [""])[0]
        return f"{type(value).__name__}: {line[:57] + '...' if len(line) > 60 else line}"
    if isinstance(value, list) and value and not isinstance(value[0], str | bool | int | float):
        return f"list of {len(value)}: {describe(value[0])}"
    text = repr(value) if isinstance(value, str | list | tuple | dict | set | int) else str(value)
    text = type(value).__name__ if " object at 0x" in text or "\n" in text else text
    return text[:67] + "..." if len(text) > 70 else text


def difference(reference: Any, ours: Any, atol: float) -> str:
    """Return what is not the same; "" if all is."""
    if isinstance(reference, BaseException):
        return "" if isinstance(ours, type(reference)) else "another error"
    if isinstance(ours, BaseException):
        return "an error"
    if isinstance(reference, np.ndarray | Tensor):
        if type(ours) is not type(reference):
            return "type"
        if ours.dtype != reference.dtype:
            return "dtype"
        if ours.shape != reference.shape:
            return "shape"
        if not np.issubdtype(
            np.dtype(str(ours.dtype).removeprefix("torch.").replace("bf", "f")), np.floating
        ):
            return "" if np.array_equal(ours, reference) else "values"
        far = float(abs(_wide(ours) - _wide(reference)).max()) if np.prod(ours.shape) else 0.0
        return "" if far <= atol else f"values, by {far:.1e}"
    if isinstance(reference, Mapping):
        if set(reference) != set(ours):
            return "keys"
        reference, ours = _without_padding(reference), _without_padding(ours)
        found = (difference(value, ours[name], atol) for name, value in reference.items())
        return next(filter(None, found), "")
    if isinstance(reference, list | tuple):
        if type(reference) is not type(ours):
            return "type"
        if len(reference) != len(ours):
            return "length"
        found = (difference(*both, atol) for both in zip(reference, ours, strict=True))
        return next(filter(None, found), "")
    if isinstance(reference, float):
        return "" if type(ours) is float and abs(ours - reference) <= atol else "value"
    return "" if type(ours) is type(reference) and ours == reference else "value"


def _without_padding(features: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return features without what comes out at padding positions, which means nothing."""
    if not {"token_embeddings", "attention_mask"} <= set(features):
        return features
    real = features["token_embeddings"] * features["attention_mask"][..., None]
    return {**features, "token_embeddings": real}


def _wide(values: Any) -> np.ndarray[Any, Any]:
    return torch.as_tensor(values).detach().double().numpy()


@dataclass(frozen=True)
class Compared:
    """A row, and what came of it in both libraries."""

    row: Row
    reference: str
    ours: str
    difference: str

    @property
    def problem(self) -> str:
        """Return what is not as the row's policy says; "" if all is."""
        if self.row.policy == "M":
            return self.difference and f"differs ({self.difference}) without a reason"
        is_same = self.reference == self.ours and not self.difference
        return "claims a difference, but there is none" if is_same else ""


class Comparison:
    """Both libraries, and a function that makes a row in each."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.reference, self.ours = Side(folder, False), Side(folder, True)
        self.reference.other, self.ours.other = self.ours, self.reference

    def __call__(self, row: Row) -> Compared:
        reference, ours = self.reference(row.call), self.ours(row.call)
        found = difference(reference, ours, row.atol)
        return Compared(row, describe(reference), describe(ours), found)

    def close(self) -> None:
        self.reference.close()
        self.ours.close()


def why_not(row: Row) -> str:
    """Return why a row can't be made here; "" if it can."""
    version = int(metadata.version("sentence-transformers").split(".")[0])
    if row.version not in (None, version):
        return f"is about version {row.version} of the reference"
    for name, module in (("pd.", "pandas"), ("pl.", "polars"), ("pa.", "pyarrow")):
        if name in row.call and find_spec(module) is None:
            return f"needs {module}"
    if "StringDType" in row.call and not hasattr(np.dtypes, "StringDType"):
        return "needs NumPy 2"
    return ""


# --- printing


def _markdown(compared: "list[Compared]") -> str:
    """Return a table with the first call of each reason, and how many more there are."""
    by_reason: dict[tuple[str, str], list[Compared]] = {}
    for one in compared:
        by_reason.setdefault((one.row.policy, one.row.reason), []).append(one)
    lines = ["| | why | for example | sentence-transformers | minilm |", "|---|---|---|---|---|"]
    for policy in "DB":
        for (kind, reason), group in by_reason.items():
            if kind == policy:
                more = f" and {len(group) - 1} more" if len(group) > 1 else ""
                first = group[0]
                cells = (policy, reason, f"`{first.row.call}`{more}", first.reference, first.ours)
                lines.append(
                    f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
                )
    return "\n".join(lines)


def main() -> int:
    """Print the table; the exit status says whether every row is as its policy says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / hub.WEIGHTS_FOLDER, metavar="FOLDER")
    parser.add_argument("--group", help="only this one, such as input, prompts, similarity")
    parser.add_argument("--no-processes", action="store_true", help="leave their rows out")
    results.add_option(parser)
    options = parser.parse_args()
    chosen = [
        row
        for row in rows()
        if options.group in (None, row.group)
        and not (options.no_processes and row.group == "processes")
        and not why_not(row)
    ]
    comparison = Comparison(options.model)
    try:
        compared = list(map(comparison, chosen))
    finally:
        comparison.close()
    if options.markdown:
        body = INTRODUCTION + _markdown(compared)
        results.write(options.markdown, "Differences from sentence-transformers", body)
    group = ""
    for one in compared:
        row = one.row
        if row.group != group:
            group = row.group
            print(f"\n{group}")
        reason = f"  {row.reason}" if row.reason else ""
        print(f"  {row.policy} {row.call}{reason}")
        if row.policy != "M" or one.problem:
            print(f"      reference: {one.reference}\n      ours:      {one.ours}")
        else:
            print(f"      both: {one.ours}")
        if one.problem:
            print(f"      NOT AS IT SHOULD BE: {one.problem}")
    bad = sum(bool(one.problem) for one in compared)
    counts = [f"{sum(one.row.policy == kind for one in compared)} {kind}" for kind in "MBD"]
    versions = f"sentence-transformers {metadata.version('sentence-transformers')}"
    print(f"\n{versions}: {', '.join(counts)}; {bad} not as they should be", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""Folders of many forms, each loaded by the reference and by us: the same vectors.

What the reference loads with other numbers than ours is refused here: see `tests/test_folder.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from conftest import TINY_WORDS, edit_json, tiny_tokenizer_json
from minilm import SentenceEncoder

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of two cases, tested in test_folder.py
]

# As in test_family.py: seen 2e-16; the smallest mistake is 1e-6 and more.
TOLERANCE = 1e-13

TEXTS: list[Any] = [
    "the dog", "The DOG bites the man.", "a cat sees the sun, the sun is out!", "dogs", "",
    "caf\u00e9 CAFE\u0301 \u72acdog", "[MASK] dog", "the zebra [NEW] runs", "a zebra! [new] ZEBRA",
    "d\0og",
    "the dog bites the man and the cat " * 4,
    ("the dog", "a cat"),
]  # fmt: skip

Change = Callable[[Path], object]


def fields(name: str, **changes: Any) -> Change:
    """Changes to a file; `...` deletes a field."""
    return lambda folder: edit_json(folder / name, **changes)


def content(name: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")

    return change


def without(*names: str) -> Change:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def tokenizer_json(change: Callable[[dict[str, Any]], object]) -> Change:
    values = tiny_tokenizer_json()
    b = {"Sequence": {"id": "B", "type_id": 1}}
    end = {"SpecialToken": {"id": "[SEP]", "type_id": 1}}
    values["post_processor"]["pair"] = [*values["post_processor"]["single"], b, end]
    change(values)
    return content("tokenizer.json", values)


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    def rewrite(folder: Path) -> None:
        path = folder / "model.safetensors"
        changed = change(safetensors.torch.load(path.read_bytes()))
        safetensors.torch.save_file(changed, path)

    return rewrite


def renamed(old: str, new: str) -> Change:
    return tensors(lambda state: {name.replace(old, new): each for name, each in state.items()})


def with_head(**head: Tensor) -> Change:
    """The checkpoint of a model with a head, of which BERT is a part."""
    return tensors(
        lambda state: (
            {f"bert.{name}": each for name, each in state.items()}
            | {name.replace("__", "."): each for name, each in head.items()}
        )
    )


def stages(*last: str) -> Change:
    """Other stages behind the pooling."""
    places = [("Transformer", ""), ("Pooling", "1_Pooling")]
    places += [(kind, f"{i}_{kind}") for i, kind in enumerate(last, 2)]
    value = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(places)
    ]
    return content("modules.json", value)


def words(end: str = "\n", **others: str) -> Change:
    """vocab.txt in place of tokenizer.json."""

    def change(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        lines = [others.get(word.strip("[]"), word) + end for word in TINY_WORDS]
        (folder / "vocab.txt").write_bytes("".join(lines).encode())

    return change


def shards(folder: Path) -> None:
    state = list(safetensors.torch.load((folder / "model.safetensors").read_bytes()).items())
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i in range(2):
        safetensors.torch.save_file(dict(state[i::2]), folder / f"part-{i}.safetensors")
        weight_map |= dict.fromkeys(dict(state[i::2]), f"part-{i}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    content("model.safetensors.index.json", index)(folder)


SENTENCE, TOKENIZER, OWN = (
    "sentence_bert_config.json", "tokenizer_config.json", "config_sentence_transformers.json"
)  # fmt: skip

CASES: dict[str, list[Change]] = {
    "as it is": [],
    # The limit.
    "no limit": [without(SENTENCE), fields(TOKENIZER, model_max_length=...)],
    "no settings": [without(SENTENCE, TOKENIZER)],
    "empty settings": [content(SENTENCE, {})],
    "limits that are null": [
        fields(SENTENCE, max_seq_length=None, do_lower_case=None),
        fields(TOKENIZER, model_max_length=None),
    ],
    "a huge limit": [without(SENTENCE), fields(TOKENIZER, model_max_length=10**30)],
    "the oldest name": [without(SENTENCE), fields(TOKENIZER, model_max_length=..., max_len=10)],
    "settings of another name": [
        without(SENTENCE),
        content("sentence_roberta_config.json", {"max_seq_length": 9}),
    ],
    "arguments without effect": [
        fields(SENTENCE, model_args={"attn_implementation": "eager"}, config_args={})
    ],
    # config.json.
    "no padding id": [fields("config.json", pad_token_id=None)],
    "gelu_python": [fields("config.json", hidden_act="gelu_python")],
    "fields left to their defaults": [fields("config.json", hidden_act=..., type_vocab_size=...)],
    # The other stages.
    "unknown similarity": [content(OWN, {"similarity_fn_name": "jaccard"})],
    "prompt without text": [content(OWN, {"prompts": {"query": None}})],
    "default prompt": [
        content(OWN, {"prompts": {"query": "the "}, "default_prompt_name": "query"})
    ],
    "truncate_dim": [content(OWN, {"truncate_dim": 8})],
    "Normalize twice": [stages("Normalize", "Normalize")],
    "Dropout": [stages("Dropout"), content("2_Dropout/config.json", {"dropout": 0.5})],
    "Dropout and Normalize": [stages("Dropout", "Normalize"), content("2_Dropout/config.json", {})],
    "pooling by default": [content("1_Pooling/config.json", {"word_embedding_dimension": 32})],
    "pooling of version 6": [
        content("1_Pooling/config.json", {"embedding_dimension": 32, "pooling_mode": ["cls"]})
    ],
    # The weights.
    "masked words and next sentences": [
        with_head(cls__predictions__bias=torch.zeros(40), cls__seq_relationship__bias=torch.ones(2))
    ],
    "classes": [with_head(classifier__weight=torch.ones(2, 32), classifier__bias=torch.ones(2))],
    "answers": [with_head(qa_outputs__weight=torch.ones(2, 32))],
    "positions": [
        tensors(lambda state: state | {"embeddings.position_ids": torch.arange(24)[None]})
    ],
    "gamma": [renamed("LayerNorm.weight", "LayerNorm.gamma")],
    "float16": [tensors(lambda state: {name: each.half() for name, each in state.items()})],
    "bfloat16": [tensors(lambda state: {name: each.bfloat16() for name, each in state.items()})],
    "several files": [shards],
    # The tokenizer.
    "vocab.txt": [words()],
    "vocab.txt of Windows": [words(end="\r\n")],
    "vocab.txt, cased": [words(), fields(TOKENIZER, do_lower_case=False)],
    "vocab.txt without [MASK]": [words(MASK="[unused0]")],
    "vocab.txt and added tokens": [words(), content("added_tokens.json", {"zebra": 24})],
    "added tokens": [content("added_tokens.json", {"zebra": 24, "[NEW]": 25})],
    "added special tokens": [
        content("added_tokens.json", {"[NEW]": 24}),
        content("special_tokens_map.json", {"additional_special_tokens": ["[NEW]"]}),
    ],
    "added tokens in the settings": [
        fields(TOKENIZER, added_tokens_decoder={"24": {"content": "zebra", "normalized": True}})
    ],
    "extra special tokens": [fields(TOKENIZER, extra_special_tokens=["zebra", "[NEW]"])],
    "a special token of its own": [fields(TOKENIZER, animal_token="zebra")],
    "another padding token": [content("special_tokens_map.json", {"pad_token": "[MASK]"})],
    "no mask token": [fields(TOKENIZER, mask_token=None)],
    "lower case first": [
        fields(SENTENCE, do_lower_case=True),
        fields(TOKENIZER, do_lower_case=False),
    ],
    "the class in config.json": [
        fields("config.json", tokenizer_class="PreTrainedTokenizerFast"),
        tokenizer_json(lambda values: values["normalizer"].update(lowercase=False)),
        fields(TOKENIZER, model_input_names=["input_ids", "token_type_ids", "attention_mask"]),
    ],
    "control characters": [
        tokenizer_json(lambda values: values["normalizer"].update(clean_text=False))
    ],
    "the oldest tokenizer.json": [tokenizer_json(lambda values: values["model"].pop("type"))],
    "no token types": [fields(TOKENIZER, model_input_names=["input_ids", "attention_mask"])],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_folder_gives_the_reference_s_vectors(tiny_folder: Path, case: str) -> None:
    reason = "needs the reference: pip install 'minilm[reference]'"
    library = pytest.importorskip("sentence_transformers", reason=reason)
    if int(library.__version__.split(".")[0]) < 6:
        pytest.skip("what two versions do differently is done here as in version 6")
    for change in CASES[case]:
        change(tiny_folder)
    reference = library.SentenceTransformer(
        str(tiny_folder), device="cpu", model_kwargs={"dtype": torch.float64}
    )
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu", dtype="float64")
    assert encoder.max_seq_length == reference.max_seq_length
    expected = reference.encode(TEXTS)
    actual = encoder.encode(TEXTS, truncation="silent")
    assert actual.shape == expected.shape
    worst = np.abs(actual - expected).max(axis=1)
    assert worst.max() <= TOLERANCE, dict(zip(TEXTS, worst, strict=True))
    assert np.abs(expected[0] - expected[2]).max() > 0.01  # else all could be equal: constant

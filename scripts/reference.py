"""The reference, sentence-transformers on transformers, as a source of stages to compare with.

Only the scripts and the tests import this; `minilm/` never does.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Reference", "is_installed", "load_reference"]

_LAST_STAGES = ("pooled", "embedding")


class Reference:
    """The reference's model: token ids, and every stage under our names for them.

    Attributes:
        model: The `SentenceTransformer`.
        versions: What was installed.
    """

    def __init__(self, model: Any) -> None:
        import sentence_transformers
        import transformers

        self.model = model
        self.versions = {
            "sentence-transformers": sentence_transformers.__version__,
            "transformers": transformers.__version__,
            "torch": str(torch.__version__).split("+")[0],
        }

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of one text, cut as the reference cuts."""
        features = self._preprocess([text])
        ids: list[int] = features["input_ids"][0].tolist()
        return ids

    def _preprocess(self, texts: list[str]) -> Any:
        # Version 6 renamed `tokenize` and warns of the old name.
        return getattr(self.model, "preprocess", self.model.tokenize)(texts)

    @torch.no_grad()
    def __call__(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the stages of features, as `minilm.parity.stages.record_stages` gives ours."""
        bert = self.model[0].auto_model
        types = features.get("token_type_ids", torch.zeros_like(features["input_ids"]))
        output = bert(
            input_ids=features["input_ids"],
            attention_mask=features["attention_mask"],
            token_type_ids=types,
            output_hidden_states=True,
            output_attentions=True,
        )
        stages = {"embeddings.layer_norm.output": output.hidden_states[0]}
        for number, attentions in enumerate(output.attentions):
            layer = f"layers.{number}"
            stages[f"{layer}.attention.probabilities"] = attentions
            stages[f"{layer}.feed_forward_layer_norm.output"] = output.hidden_states[number + 1]
        later = {
            "token_embeddings": output.last_hidden_state,
            "attention_mask": features["attention_mask"],
        }
        for name, module in zip(_LAST_STAGES, list(self.model)[1:], strict=False):
            later = module(later)
            stages[name] = later["sentence_embedding"]
        # A model may have no normalize stage.
        stages.setdefault("embedding", stages["pooled"])
        return stages


def is_installed() -> bool:
    """Return whether both libraries of the reference can be imported."""
    from importlib.util import find_spec

    return all(find_spec(name) for name in ("sentence_transformers", "transformers"))


def load_reference(folder: Path, dtype: torch.dtype) -> Reference:
    """Load the reference from a model folder, on the CPU."""
    import sentence_transformers
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # "eager" is the reference's plain softmax: the only path that shows its probabilities.
    options = {"attn_implementation": "eager", "dtype": dtype}
    model = sentence_transformers.SentenceTransformer(
        str(folder), device="cpu", model_kwargs=options, local_files_only=True
    )
    return Reference(model.eval())

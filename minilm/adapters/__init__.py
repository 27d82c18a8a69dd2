"""The encoder inside the frameworks that people already use: one file each, importing only its own.

- `sklearn.py`    `MiniLMVectorizer`, a scikit-learn transformer
- `langchain.py`  `MiniLMEmbeddings`, LangChain's `Embeddings`, which LlamaIndex takes too
- `chroma.py`     `MiniLMEmbeddingFunction`, Chroma's `EmbeddingFunction`
- `mteb.py`       `MiniLMEncoder`, MTEB's `EncoderProtocol`
- `bertopic.py`   `MiniLMTopicEmbedder`, BERTopic's `BaseEmbedder`
- `keybert.py`    `MiniLMKeywordEmbedder`, KeyBERT's `BaseEmbedder`
- `ray.py`        `MiniLMActor` and `encode_dataset`, for Ray Data

A framework that is not installed is a `MissingPackageError`, which says what to install:
`pip install "minilm[chroma]"`. Importing this package imports none of them, and no torch.

All use `lazy.py`: a model that is named now, loaded when first used, and pickled as its name.
"""

__all__: list[str] = []

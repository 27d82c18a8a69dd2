"""The programs that `scripts/peers.py NAME` runs again: what to install, and how each is asked.

A script finds `texts`, a list of strings, and `folder`, the published files with `vocab.txt` beside
them and, if it wants one, `model.onnx`. The published files lie in a cache of the hub, too, under
`MODEL`, for programs that load by name. A script leaves `ids`, the token ids of each text, or
`vectors`, or both. It runs in an environment of its own, in which only what it installs is newer
than here.
"""

from dataclasses import dataclass

__all__ = ["EXPORT", "FIND", "LEAVE", "PROGRAMS", "Program"]

FIND = """
import json, os, sys
from pathlib import Path
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
folder = Path(sys.argv[2])
texts = json.load(open(sys.argv[1], encoding="utf-8"))
ids = vectors = None
"""
LEAVE = """
found = {}
if ids is not None:
    found["ids"] = [[int(each) for each in row] for row in ids]
if vectors is not None:
    found["vectors"] = [[float(each) for each in row] for row in vectors]
print("\\n" + json.dumps(found))
"""

# Writes folder/model.onnx, from this project's own modules.
EXPORT = """
import torch
from minilm import SentenceEncoder
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = SentenceEncoder.from_pretrained(folder, device="cpu", dtype="float32").bert
    def forward(self, ids, mask, types):
        return self.bert(ids, mask, types)
names = ["input_ids", "attention_mask", "token_type_ids", "last_hidden_state"]
ones = torch.ones(2, 8, dtype=torch.int64)
torch.onnx.export(
    Model().eval(), (ones, ones, 0 * ones), str(folder / "model.onnx"), input_names=names[:3],
    output_names=names[3:], dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
    dynamo=False, opset_version=17,
)
"""

# What an ONNX model makes of texts in batches of 32, each padded to its longest.
_ONNX = """
import numpy as np, onnxruntime
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(256)
tokenizer.enable_padding()
def embed(file, size=32):
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    rows = []
    for start in range(0, len(texts), size):
        batch = tokenizer.encode_batch(texts[start : start + size])
        read = np.array([each.ids for each in batch])
        mask = np.array([each.attention_mask for each in batch])
        feed = {"input_ids": read, "attention_mask": mask, "token_type_ids": 0 * read}
        hidden = session.run(None, feed)[0]
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]
        rows += list(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return rows
"""
_INT8 = (
    _ONNX
    + """
from onnxruntime.quantization import QuantType, quantize_dynamic
def int8(**settings):
    quantize_dynamic(folder / "model.onnx", folder / "int8.onnx", **settings)
    return folder / "int8.onnx"
"""
)
_TENSORFLOW = """
os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")
"""
_KERAS = (
    _TENSORFLOW
    + """
import keras_hub
words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\\n")
tokenizer = keras_hub.tokenizers.BertTokenizer(vocabulary=words, lowercase=True%s)
pack = keras_hub.layers.StartEndPacker(256, start_value=101, end_value=102, pad_value=0)
ids = [[each for each in pack(tokenizer(text)).numpy() if each] for text in texts]
"""
)
_FLASH = """
from flash_tokenizer import BertTokenizerFlash
words = str(folder / "vocab.txt")
tokenizer = BertTokenizerFlash(words, do_lower_case=True, model_max_length=256%s)
ids = [tokenizer.tokenizer.encode(text, "longest", 256) for text in texts]
"""


@dataclass(frozen=True)
class Program:
    """A program.

    Attributes:
        packages: What pip installs, the program itself first.
        script: How it is asked; JavaScript if `npm` names a package.
        wants_onnx: Whether it needs `model.onnx`.
        npm: What npm installs.
    """

    packages: str
    script: str
    wants_onnx: bool = False
    npm: str = ""


PROGRAMS = {
    "blingfire": Program(
        "blingfire",
        """
import blingfire
model = blingfire.load_model(str(Path(blingfire.__file__).parent / "bert_base_tok.bin"))
read = [blingfire.text_to_ids(model, text, 1024, 100).tolist() for text in texts]
ids = [[101, *(each for each in row if each), 102] for row in read]
""",
    ),
    "budtiktok": Program(
        "budtiktok",
        """
import budtiktok
tokenizer = budtiktok.Tokenizer.from_file(str(folder / "tokenizer.json"))
ids = [tokenizer.encode(text).ids for text in texts]
""",
    ),
    "candding": Program(
        "candding",
        """
import candding
vectors = candding.TextEmbedding(MODEL).embed(texts)
""",
    ),
    "chromadb": Program(
        "chromadb",
        """
from chromadb.utils.embedding_functions import ONNXMiniLM_L6_V2
ONNXMiniLM_L6_V2.DOWNLOAD_PATH = folder.parent
ONNXMiniLM_L6_V2.EXTRACTED_FOLDER_NAME = folder.name
vectors = ONNXMiniLM_L6_V2()(texts)
""",
        wants_onnx=True,
    ),
    "ctranslate2-float32": Program(
        "ctranslate2 transformers",
        """
import ctranslate2, numpy as np
from tokenizers import Tokenizer
made = str(folder / "ctranslate2")
ctranslate2.converters.TransformersConverter(str(folder)).convert(made)
encoder = ctranslate2.Encoder(made, compute_type="float32")
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
tokenizer.enable_truncation(256)
tokenizer.no_padding()
read = [each.ids for each in tokenizer.encode_batch(texts)]
hidden = np.array(encoder.forward_batch(read).last_hidden_state)
means = [row[: len(one)].mean(0) for row, one in zip(hidden, read)]
vectors = [mean / np.linalg.norm(mean) for mean in means]
""",
    ),
    "embed-anything": Program(
        "embed-anything",
        """
import embed_anything
model = embed_anything.EmbeddingModel.from_pretrained_hf(model_id=MODEL)
vectors = [each.embedding for each in embed_anything.embed_query(texts, embedder=model)]
""",
    ),
    "fastembed": Program(
        "fastembed",
        """
from fastembed import TextEmbedding
model = TextEmbedding(MODEL, specific_model_path=str(folder))
vectors = list(model.embed(texts))
ids = [[i for i, real in zip(each.ids, each.attention_mask) if real]
       for each in model.model.tokenizer.encode_batch(texts)]
""",
        wants_onnx=True,
    ),
    "fastretrieval": Program(
        "fastretrieval",
        """
from fastretrieval import CustomModelSpec, TextEmbedding
CustomModelSpec("local/model", hf="local/model", model_file="model.onnx", dim=384).register()
model = TextEmbedding("local/model", specific_model_path=str(folder))
# One at a time: texts of unequal length fail in a batch, as this tokenizer.json pads to 128.
vectors = [vector for text in texts for vector in model.embed([text])]
""",
        wants_onnx=True,
    ),
    "flash-tokenizer": Program("flash-tokenizer", _FLASH % ""),
    "flash-tokenizer-bidirectional": Program("flash-tokenizer", _FLASH % ", bidirectional=True"),
    "haystack": Program(
        "sentence-transformers-haystack",
        """
from haystack_integrations.components.embedders.sentence_transformers import (
    SentenceTransformersTextEmbedder,
)
embedder = SentenceTransformersTextEmbedder(model=str(folder), progress_bar=False)
embedder.warm_up()
vectors = [embedder.run(text)["embedding"] for text in texts]
""",
    ),
    "iree-tokenizer": Program(
        "iree-tokenizer",
        """
import iree.tokenizer
tokenizer = iree.tokenizer.Tokenizer.from_file(str(folder / "tokenizer.json"))
ids = [tokenizer.encode(text, add_special_tokens=True) for text in texts]
""",
    ),
    "keras-hub": Program("keras-hub tensorflow tensorflow-text", _KERAS % ""),
    "keras-hub-strip-accents": Program(
        "keras-hub tensorflow tensorflow-text", _KERAS % ", strip_accents=True"
    ),
    "kitoken": Program(
        "kitoken",
        """
from kitoken import Kitoken
tokenizer = Kitoken.from_file(str(folder / "tokenizer.json"))
rows = [tokenizer.encode(text, True) for text in texts]
ids = [[101, *(each for each in row if each), 102] for row in rows]
""",
    ),
    "langchain-huggingface": Program(
        "langchain-huggingface",
        """
from langchain_huggingface import HuggingFaceEmbeddings
vectors = HuggingFaceEmbeddings(model_name=str(folder)).embed_documents(texts)
""",
    ),
    "llama-index": Program(
        "llama-index-embeddings-huggingface",
        """
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
vectors = HuggingFaceEmbedding(str(folder)).get_text_embedding_batch(texts)
""",
    ),
    "mlx-embeddings": Program(
        "mlx-embeddings mlx[cpu]",
        """
import mlx.core, numpy as np
from mlx_embeddings import load
model, tokenizer = load(str(folder))
vectors = []
for text in texts:
    read = tokenizer.encode(text, return_tensors="mlx", truncation=True, max_length=512)
    vectors.append(np.array(model(read).text_embeds)[0])
""",
    ),
    "onnxruntime": Program("onnxruntime", _ONNX + "vectors = embed(folder / 'model.onnx')\n", True),
    "onnxruntime-extensions": Program(
        "onnxruntime-extensions onnxruntime",
        """
import numpy as np
from onnxruntime_extensions import PyOrtFunction
operator = PyOrtFunction.from_customop("BertTokenizer", vocab_file=str(folder / "vocab.txt"))
ids = [np.asarray(operator([text])[0]).ravel() for text in texts]
""",
    ),
    "onnxruntime-int8-per-channel": Program(
        "onnxruntime", _INT8 + "vectors = embed(int8(per_channel=True))\n", True
    ),
    "onnxruntime-int8-per-channel-alone": Program(
        "onnxruntime", _INT8 + "vectors = embed(int8(per_channel=True), 1)\n", True
    ),
    "onnxruntime-int8-per-tensor": Program(
        "onnxruntime", _INT8 + "vectors = embed(int8())\n", True
    ),
    "onnxruntime-uint8-per-tensor": Program(
        "onnxruntime", _INT8 + "vectors = embed(int8(weight_type=QuantType.QUInt8))\n", True
    ),
    "openvino-tokenizers": Program(
        "openvino-tokenizers openvino transformers",
        """
import openvino
from openvino_tokenizers import convert_tokenizer
from transformers import AutoTokenizer
made = convert_tokenizer(AutoTokenizer.from_pretrained(str(folder)))
read = openvino.compile_model(made, "CPU")
ids = [read([text])["input_ids"][0] for text in texts]
""",
    ),
    "tf-text-bert-tokenizer": Program(
        "tensorflow-text tensorflow",
        _TENSORFLOW
        + """
import tensorflow_text
tokenizer = tensorflow_text.BertTokenizer(str(folder / "vocab.txt"), lower_case=True)
ids = [[101, *row, 102] for row in tokenizer.tokenize(texts).merge_dims(1, 2).to_list()]
""",
    ),
    "transformers-js": Program(
        "onnx",
        """
import fs from "node:fs";
import { env, pipeline } from "@huggingface/transformers";
const [, , source, folder] = process.argv;
env.allowRemoteModels = false;
env.localModelPath = "";
const embed = await pipeline("feature-extraction", folder, { dtype: "fp32" });
const ids = [], vectors = [];
for (const text of JSON.parse(fs.readFileSync(source, "utf-8"))) {
    const read = embed.tokenizer(text, { truncation: true });
    ids.push(Array.from(read.input_ids.data, Number));
    const found = await embed(text, { pooling: "mean", normalize: true });
    vectors.push(Array.from(found.data));
}
console.log("\\n" + JSON.stringify({ ids, vectors }));
""",
        wants_onnx=True,
        npm="@huggingface/transformers",
    ),
    "txtai": Program(
        "txtai",
        """
from txtai.models import PoolingFactory
vectors = PoolingFactory.create({"path": str(folder), "device": "cpu"}).encode(texts)
""",
    ),
}

"""A model's files, in and out, and which model it is.

- `hub.py`          a folder or a name on the Hub -> verified files
- `folder.py`       those files -> everything that an encoder is built from, checked
- `checkpoint.py`   safetensors -> tensors under our names
- `options.py`      what may be passed to load a model
- `save.py`         an encoder -> a folder that this package and sentence-transformers load
- `fingerprint.py`  which model made vectors, as a record

May import the files at the top of the package and `inference/`.
"""

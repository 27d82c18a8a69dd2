"""Files of texts and of vectors, of any size.

- `rows.py`       a file of texts -> its rows: .txt, .jsonl, .csv
- `tables.py`     all rows of some files in memory; rows and vectors -> one file
- `sources.py`    files of any size, as shards of rows
- `streaming.py`  files of any size -> a folder of vectors
- `shards.py`     the parts of that folder, and its manifest
- `arrow.py`      vectors as a column of Arrow and Parquet
- `arrays.py`     .npy and .npz files, whole or refused
- `records.py`    the fingerprint that was kept with a file of vectors
- `stored.py`     such a file, or a folder, -> rows and float32 vectors

May import the files at the top of the package, `inference/` and `pretrained/`.
"""

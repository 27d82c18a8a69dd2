"""A corpus in a folder, to which more can be added and in which everything is found.

- `index.py`     `Index`: vectors and their rows, searched
- `segments.py`  the folder's files: what was added at once lies together
- `texts.py`     the same for texts, with the encoder that makes their vectors
- `exchange.py`  an index as files of vectors, and the other way round

May import the files at the top of the package and all wings but `adapters/` and `cli/`.
"""

from minilm.index.index import Hit, Index

__all__ = ["Hit", "Index"]

"""What embeddings are good for: search, paraphrase mining, clustering.

Tasks take embeddings, never a model: vectors made elsewhere or long ago will do.

- `search.py`       `semantic_search`: the nearest of a corpus for each query
- `rescoring.py`    `quantized_search`: the same from codes of a byte or a bit, then by the vectors
- `paraphrase.py`   `paraphrase_mining_embeddings`: the most similar pairs within one set
- `communities.py`  `community_detection`: groups around a centre
- `duplicates.py`   `near_duplicates` and `deduplicate`: rows that repeat an earlier one

All are exact and deterministic: every score is computed twice, quickly to find the candidates, then
pair by pair in double precision to decide. So no result depends on the sizes of blocks, equal
vectors have equal scores, and equal scores are in the order of the rows. None holds an n x n
matrix. `minilm.index` keeps a corpus in a folder.

May import the files at the top of the package; no encoder.
"""

from minilm.tasks.communities import community_detection
from minilm.tasks.duplicates import Duplicate, deduplicate, near_duplicates
from minilm.tasks.paraphrase import paraphrase_mining_embeddings
from minilm.tasks.rescoring import quantized_search
from minilm.tasks.search import semantic_search

__all__ = [
    "Duplicate",
    "community_detection",
    "deduplicate",
    "near_duplicates",
    "paraphrase_mining_embeddings",
    "quantized_search",
    "semantic_search",
]

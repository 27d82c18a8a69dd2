"""Is another implementation, or a file of vectors, this model?

- `stages.py`        proof of equality with the reference, stage by stage
- `golden.py`        texts, ids and every stage's output, for whoever ports the model
- `mistakes.py`      this model with one typical mistake, each
- `causes.py`        which mistake explains the vectors of another implementation
- `foreign.py`       vectors that others made, read from files
- `check.py`         whether vectors are this model's
- `check_folder.py`  the same for a folder of parts

May import the files at the top of the package, `inference/`, `pretrained/`, `interpret/` and
`files/`.
"""

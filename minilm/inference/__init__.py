"""How `encode` runs: batches without padding, fast products, long text, several processes.

- `encode.py`        what users call: texts in any form -> vectors in any form
- `compute.py`       one call, computed: rows of text -> vectors in the same order
- `truncation.py`    what is done about text beyond the limit
- `packed.py`        sentences laid end to end, without padding
- `kernels.py`       the same matrix products, faster
- `eval_mode.py`     no dropout while something is computed, whatever other threads do
- `process_pool.py`  the same in several processes

May import the files at the top of the package.
"""

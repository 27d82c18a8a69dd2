"""How `encode` runs: batches without padding, fast products, long text, several processes.

- `encode.py`        what users call: texts in any form -> vectors in any form
- `compute.py`       one call, computed: rows of text -> vectors in the same order
- `truncation.py`    what is done about text beyond the limit
- `packed.py`        sentences laid end to end, without padding
- `kernels.py`       the same matrix products, faster
- `eval_mode.py`     no dropout while something is computed, whatever other threads do
- `process_pool.py`  the same in several processes

The way of `encoder.encode(["a text"])`, with what is given on:

1. `encode.encode` has `plan_of` read the arguments, the prompt and the settings of the `Pipeline`
   into a `Plan`, checks the rows (`inputs.as_rows`), and gives both to `run_plan`.
2. `run_plan` gives them to `compute.run`, here or in the processes of a pool.
3. `compute.read` takes token ids from `WordPieceTokenizer.tokenize`; what was cut is added up and
   told by `truncation.warn_if_cut`.
4. `compute._sentence_vectors` has `packed.plan_batches` say which rows are computed together.
   Inside of `eval_mode` and `kernels.fast_products` it makes a `PackedBatch` of each such set of
   rows, and calls the pipeline with it.
5. `Pipeline.forward` gives the ids to `BertModel`, which attends with `PackedBatch.attend` and
   multiplies with what `kernels` put in place; then `PackedBatch.pool` calls the pooling for each
   run of equal lengths, and `Normalize` scales the vectors to length 1.
6. `compute._check_finite` refuses NaN and infinity; a `Computed` goes back to `run_plan`, whose
   `_finish` quantizes and makes NumPy arrays; `encode` takes out the one vector of a single str.

May import the files at the top of the package.
"""

"""The encoder in Ray Data: texts of any number, embedded on as many machines as a cluster has.

    import ray
    from minilm.adapters.ray import encode_dataset

    rows = ray.data.read_parquet("s3://bucket/texts")
    encode_dataset(rows, actors=16, cpus_per_actor=4).write_parquet("s3://bucket/vectors")

In: the batches of a `ray.data.Dataset`. Out: the same with a column of vectors. Ray reads, sends
and writes the rows, and repeats what is lost with a process or a machine.
`scripts/learn/encode_on_ray.py` is this as a command.

Each actor reads and verifies the model for itself, once, as `from_pretrained` does. So this
package, and the model, must be on every machine of the cluster: a name on the Hub is fetched there,
a folder must be there under the same path.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from minilm.adapters.lazy import SECRETS, LazyEncoder
from minilm.encoder import SentenceEncoder
from minilm.errors import InputError, InputTypeError, MissingPackageError
from minilm.files.arrow import import_pyarrow, with_vectors
from minilm.files.sources import ON_BAD_ROW
from minilm.inference.encode import required_ranges
from minilm.inference.truncation import EncodeReport, without_warning
from minilm.inputs import check_choice, check_positive_int, check_text, check_unicode
from minilm.pretrained import hub
from minilm.pretrained.options import to_keep
from minilm.quantize import PRECISIONS, as_stored

try:
    import ray
    import ray.data
except ModuleNotFoundError as error:
    raise MissingPackageError("minilm.adapters.ray", "ray[data]", "ray") from error

__all__ = ["MiniLMActor", "encode_dataset"]

_BATCH_ROWS = 1024  # rows that an actor gets at a time


class MiniLMActor:
    """A class for `map_batches`: each actor makes one, and calls it with batch after batch.

    Attributes:
        encoder: The model.
        fingerprint: The record of its vectors, a `Fingerprint`.

    Example:
        >>> rows.map_batches(
        ...     MiniLMActor,
        ...     fn_constructor_kwargs={"text_column": "body"},
        ...     batch_format="pyarrow",
        ...     batch_size=1024,
        ...     compute=ray.data.ActorPoolStrategy(size=2),
        ...     num_cpus=4,
        ... )
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | SentenceEncoder = hub.DEFAULT_MODEL,
        *,
        text_column: str = "text",
        embedding_column: str = "embedding",
        precision: str = "float32",
        on_bad_row: str = "error",
        device: str | torch.device | None = None,
        threads: int | None = None,
        **options: Any,
    ) -> None:
        """Load the model.

        Args:
            model: A name on the Hub, or a folder, which the machine of the actor must have. An
                encoder is sent there as it is.
            text_column: The name of the texts.
            embedding_column: The name that the vectors get.
            precision: Of their numbers: "float32", "float16", or codes, see `encode`.
            on_bad_row: What to do about a row whose text is null, or not a text: "error"; "skip"
                leaves the row out; "empty" keeps it, with the vector of "".
            device: By default, in an actor, "cuda" if Ray gave it a GPU (`num_gpus=1`), else "cpu".
            threads: How many torch uses on a processor; by default, in an actor, as many as the
                CPUs that Ray gave it (`num_cpus`), so that all actors together fit the machine.
            options: See `lazy.AdapterOptions`, such as `dtype`, `prompt` and `truncation`. With
                `truncation="warn"` each actor warns once, of its first batch with a text that is
                too long. What `dtype="auto"` is, and whether bfloat16 can be had, each actor finds
                by its own processor, and `fingerprint` says: where machines differ, pass "float32".

        Raises:
            InputError, InputTypeError: An argument can't be used.
            MinilmError: As in `from_pretrained`.
        """
        check_choice(on_bad_row, ON_BAD_ROW, "on_bad_row")
        check_choice(precision, (*PRECISIONS, "float16"), "precision")
        if threads is not None:
            check_positive_int(threads, "threads")
        self.text_column, self.embedding_column = text_column, embedding_column
        self.precision, self.on_bad_row = precision, on_bad_row
        given = _given_by_ray()
        threads = given.get("threads") if threads is None else threads
        if threads is not None:
            torch.set_num_threads(threads)
        device = given.get("device") if device is None else device
        if isinstance(model, SentenceEncoder):
            self._model = LazyEncoder(model.to(device) if device else model, **options)
        else:
            self._model = LazyEncoder(model, device=device, **options)
        self.encoder = self._model.encoder
        self._coded = "float32" if precision == "float16" else precision
        width, normalize = options.get("truncate_dim"), options.get("normalize_embeddings", False)
        required_ranges(
            self.encoder, self._coded, width, normalize,
            f"precision is {precision!r}: this model has no fixed ranges, and those of one batch "
            "would not be those of the next; make float32 and use quantize_embeddings",
        )  # fmt: skip
        truncation = options.get("truncation", "warn")
        self._warns = truncation == "warn"
        self._truncation = without_warning(truncation)  # once it has warned
        self.fingerprint = self._model.fingerprint(precision=self._coded)

    def __call__(self, batch: Any) -> Any:
        """Embed a batch.

        Args:
            batch: n rows, as a `pyarrow.Table`, or as a dict of NumPy arrays: for
                `batch_format="pyarrow"` or `"numpy"`.

        Returns:
            The same form with the vectors as another column. In a table that is a list of fixed
            size, and the table's metadata has the fingerprint, which `write_parquet` keeps: use
            this for files. In a dict it is an array `[n, 384]`, which Ray writes to files as a
            tensor, of a type of its own.

        Raises:
            InputError: There is no column of texts, or one of the vectors' name already.
            InputTypeError: The batch is something else; or, with `on_bad_row="error"`, a row is not
                a text.
            MinilmError: As in `encode`.
        """
        pyarrow = import_pyarrow("a Ray batch")
        is_table = isinstance(batch, pyarrow.Table)
        if not is_table and not isinstance(batch, Mapping):
            raise InputTypeError(
                f"batch is {type(batch).__name__}; pass batch_format='pyarrow' or 'numpy' to "
                "map_batches",
                "batch",
            )
        names = list(batch.column_names if is_table else batch)
        if self.text_column not in names:
            known = ", ".join(map(repr, names)) or "none"
            raise InputError(
                f"there is no column {self.text_column!r}; choose with text_column, of {known}",
                "text_column",
            )
        if self.embedding_column in names:
            raise InputError(
                f"the rows have {self.embedding_column!r} already; choose another name with "
                "embedding_column",
                "embedding_column",
            )
        column = batch[self.text_column]
        found = column.to_pylist() if is_table else list(column)
        texts = [text if self._is_text(text, row) else None for row, text in enumerate(found)]
        if self.on_bad_row == "skip" and None in texts:
            good = np.array([text is not None for text in texts])
            texts = [text for text in texts if text is not None]
            if is_table:
                batch = batch.filter(pyarrow.array(good))
            else:
                batch = {name: np.asarray(values)[good] for name, values in batch.items()}
        vectors = self._vectors(["" if text is None else text for text in texts])
        if not is_table:
            return {**batch, self.embedding_column: vectors}
        return with_vectors(batch, self.embedding_column, vectors, self.fingerprint.to_json())

    def _is_text(self, text: Any, row: int) -> bool:
        """Whether a row can be embedded; if not, an error with `on_bad_row="error"`."""
        try:
            check_unicode([check_text(text, f"{self.text_column}[{row}]")], self.text_column, row)
        except InputError as error:
            if self.on_bad_row == "error":
                raise type(error)(
                    f"{error}, or choose on_bad_row='skip' or 'empty' (it is row {row} of a batch)",
                    error.argument,
                ) from error
            return False
        return True

    def _vectors(self, texts: list[str]) -> np.ndarray[Any, Any]:
        vectors: np.ndarray[Any, Any]
        report: EncodeReport
        if self._warns:
            vectors, report = self._model.encode(texts, precision=self._coded, return_report=True)
            self._warns = not report.cut_rows
        else:
            vectors = self._model.encode(texts, precision=self._coded, truncation=self._truncation)
        return as_stored(vectors, self.precision)


def _given_by_ray() -> dict[str, Any]:
    """The device and the threads that Ray gave this actor; nothing outside of one."""
    if not ray.is_initialized():
        return {}
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return {}
    share = context.get_assigned_resources()
    return {
        "device": "cuda" if share.get("GPU", 0) > 0 else "cpu",
        "threads": max(1, int(share.get("CPU", 1))),
    }


def encode_dataset(
    dataset: "ray.data.Dataset",
    model: str | os.PathLike[str] | SentenceEncoder = hub.DEFAULT_MODEL,
    *,
    actors: int = 2,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
    batch_size: int = _BATCH_ROWS,
    ray_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> "ray.data.Dataset":
    """Return the dataset with a column of vectors; as usual in Ray Data, computed when used.

    Rows come in no fixed order, as usual in Ray Data: have a column that identifies them. A cluster
    needs more CPUs than the actors take: without any for reading and writing, it waits forever.

    Args:
        dataset: Rows with a column of texts.
        model: As in `MiniLMActor`. A relative path starts from the working directory of this
            process, and not from that of an actor.
        actors: How many processes embed.
        cpus_per_actor: CPUs, and so threads, of each.
        gpus_per_actor: GPUs of each, such as 1 or 0.5.
        batch_size: Rows that an actor gets at a time.
        ray_options: Other arguments of `map_batches`, such as `{"resources": {"big": 1}}`.
        options: The arguments of `MiniLMActor`, except for an access token, which Ray would store:
            the machines use `HF_TOKEN` of their environment.

    Raises:
        InputError: A token is given, or a number is not positive.
    """
    for name in SECRETS:
        if isinstance(options.get(name), str | hub.AccessToken):
            raise InputError(
                f"{name} would be sent to the actors, and kept by Ray; set HF_TOKEN on the "
                "machines of the cluster instead",
                name,
            )
    place = hub.settled(model) if isinstance(model, str | os.PathLike) else model
    return dataset.map_batches(
        MiniLMActor,
        fn_constructor_kwargs={"model": place, **to_keep(options)},
        batch_format="pyarrow",
        batch_size=check_positive_int(batch_size, "batch_size"),
        compute=ray.data.ActorPoolStrategy(size=check_positive_int(actors, "actors")),
        num_cpus=cpus_per_actor,
        num_gpus=gpus_per_actor or None,
        **(ray_options or {}),
    )

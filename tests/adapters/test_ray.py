"""The encoder in a real Ray cluster on this machine, whose actors and machines are killed."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import DATA, needs
from minilm import SentenceEncoder, TruncationWarning
from minilm.errors import InputError, InputTypeError, MissingPackageError, TruncationError
from minilm.files.records import read_fingerprint

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # reads it when it is imported
needs("ray.data", "ray")

import encode_on_ray  # noqa: E402
import pyarrow  # noqa: E402
import pyarrow.dataset  # noqa: E402
import pyarrow.parquet  # noqa: E402
import ray  # noqa: E402
import ray.data  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from minilm.adapters import ray as adapter  # noqa: E402
from minilm.adapters.ray import MiniLMActor, encode_dataset  # noqa: E402
from minilm.files.arrow import embeddings_of  # noqa: E402

# Ray's own: it sets what it calls deprecated, and leaves processes to themselves and files open.
pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

STORE = 100 << 20  # bytes of each machine's object store: /dev/shm may be small
WORDS = ["the dog bites", "a cat", "the man sees the sun", "", "walk"]


def table(texts: list[Any]) -> Any:
    return pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, pyarrow.string())})


def arrays(texts: list[Any]) -> dict[str, Any]:
    return {"id": np.arange(len(texts)), "text": np.array(texts, dtype=object)}


# --- one batch, without a cluster


@pytest.mark.parametrize("precision", ["float32", "float16", "binary"])
def test_a_table_gets_a_list_of_fixed_size(tiny_folder: Path, precision: str) -> None:
    actor = MiniLMActor(tiny_folder, device="cpu", precision=precision)
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    out = actor(table(WORDS))
    expected = encoder.encode(WORDS, precision="float32" if precision == "float16" else precision)
    if precision == "float16":
        expected = expected.astype(np.float16)
    assert out.column_names == ["id", "text", "embedding"]
    kind = out.schema.field("embedding").type
    assert pyarrow.types.is_fixed_size_list(kind)
    assert kind.list_size == expected.shape[1]
    vectors = embeddings_of(out["embedding"])
    assert vectors.dtype == expected.dtype
    np.testing.assert_array_equal(vectors, expected)
    coded = "float32" if precision == "float16" else precision
    record = json.loads(out.schema.metadata[b"minilm.fingerprint"])
    assert record == encoder.fingerprint().for_call(precision=coded).to_dict()


def test_int8_has_the_published_ranges(published: Path, encoder: SentenceEncoder) -> None:
    out = MiniLMActor(published, device="cpu", precision="int8")(table(WORDS))
    np.testing.assert_array_equal(
        embeddings_of(out["embedding"]), encoder.encode(WORDS, precision="int8")
    )


def test_int8_without_ranges_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match=r"precision is 'int8'.*no fixed ranges"):
        MiniLMActor(tiny_folder, device="cpu", precision="int8")


def test_arrays_get_an_array(tiny_folder: Path) -> None:
    actor = MiniLMActor(tiny_folder, device="cpu", embedding_column="vector")
    batch = arrays(WORDS)
    out = actor(batch)
    assert list(out) == ["id", "text", "vector"]
    assert list(batch) == ["id", "text"]
    np.testing.assert_array_equal(out["vector"], actor.encoder.encode(WORDS))


@pytest.mark.parametrize("make", [table, arrays])
def test_no_rows(tiny_folder: Path, make: Callable[[list[Any]], Any]) -> None:
    out = MiniLMActor(tiny_folder, device="cpu")(make([]))
    assert len(out["embedding"]) == 0
    if make is table:
        assert out.schema.field("embedding").type.list_size == 32
    else:
        assert out["embedding"].shape == (0, 32)


@pytest.mark.parametrize("make", [table, arrays])
def test_bad_rows(tiny_folder: Path, make: Callable[[list[Any]], Any]) -> None:
    texts = ["a cat", None, "walk"]
    strict = MiniLMActor(tiny_folder, device="cpu")
    with pytest.raises(InputTypeError, match=r"text\[1\] is None; .*on_bad_row='skip'") as caught:
        strict(make(texts))
    assert caught.value.argument == "text[1]"

    skipping = MiniLMActor(tiny_folder, device="cpu", on_bad_row="skip")(make(texts))
    assert [int(number) for number in np.asarray(skipping["id"])] == [0, 2]
    assert len(skipping["embedding"]) == 2
    np.testing.assert_array_equal(rows_of(skipping), strict.encoder.encode(["a cat", "walk"]))

    empty = MiniLMActor(tiny_folder, device="cpu", on_bad_row="empty")(make(texts))
    assert [int(number) for number in np.asarray(empty["id"])] == [0, 1, 2]
    assert (
        list(np.asarray(empty["text"].to_pylist() if make is table else empty["text"]))[1] is None
    )
    np.testing.assert_array_equal(rows_of(empty), strict.encoder.encode(["a cat", "", "walk"]))


def rows_of(batch: Any) -> Any:
    column = batch["embedding"]
    return column if isinstance(column, np.ndarray) else embeddings_of(column)


def test_what_can_not_be_embedded(tiny_folder: Path) -> None:
    actor = MiniLMActor(tiny_folder, device="cpu", text_column="body")
    with pytest.raises(InputError, match=r"no column 'body'.*of 'id', 'text'"):
        actor(table(WORDS))
    with pytest.raises(InputError, match="have 'embedding' already"):
        actor({"body": ["a"], "embedding": [1]})
    with pytest.raises(InputTypeError, match="batch is list; pass batch_format="):
        actor(["a cat"])
    with pytest.raises(InputError, match=r"body\[0\] has a lone surrogate"):
        actor({"body": np.array(["\ud800"], dtype=object)})
    with pytest.raises(InputError, match="on_bad_row is 'drop'"):
        MiniLMActor(tiny_folder, on_bad_row="drop")
    with pytest.raises(InputError, match="precision is 'float8'"):
        MiniLMActor(tiny_folder, precision="float8")
    with pytest.raises(InputTypeError, match="there is no option batchsize"):
        MiniLMActor(tiny_folder, batchsize=3)


def test_each_actor_warns_once(tiny_folder: Path) -> None:
    long = "the dog bites the cat and the man sees the sun and the walk is out"
    actor = MiniLMActor(tiny_folder, device="cpu")
    actor(table(WORDS))
    with pytest.warns(TruncationWarning, match="1 of 2 texts were cut"):
        actor(table(["a cat", long]))
    actor(table([long]))  # a warning would be an error here
    strict = MiniLMActor(tiny_folder, device="cpu", truncation="error")
    with pytest.raises(TruncationError):
        strict(table([long]))


def test_fingerprint_tells_how_it_is_called(tiny_folder: Path) -> None:
    actor = MiniLMActor(
        tiny_folder, device="cpu", prompts={"query": "a "}, prompt_name="query", truncate_dim=8,
        normalize_embeddings=True, truncation="chunk",
    )  # fmt: skip
    found = actor.fingerprint
    assert (found.prompt, found.dimension, found.truncation) == ("a ", 8, "chunk")
    assert embeddings_of(actor(table(WORDS))["embedding"]).shape == (5, 8)


def test_share_of_an_actor(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch, "set_num_threads", lambda number: asked.update(threads=number))
    monkeypatch.setattr(adapter, "_given_by_ray", lambda: {"device": "cuda", "threads": 3})
    monkeypatch.setattr(
        adapter, "LazyEncoder", lambda model, device, **_: asked.update(device=device) or model
    )
    with pytest.raises(AttributeError):  # of what stands in for the model
        MiniLMActor(tiny_folder)
    assert asked == {"threads": 3, "device": "cuda"}
    with pytest.raises(AttributeError):
        MiniLMActor(tiny_folder, device="cpu", threads=2)
    assert asked == {"threads": 2, "device": "cpu"}


def test_what_is_sent_to_other_machines(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No relative path, which would be another folder there, and no token."""
    monkeypatch.chdir(tiny_folder.parent)
    rows: Any = SimpleNamespace(map_batches=lambda _, **options: options["fn_constructor_kwargs"])
    sent = {"model": str(tiny_folder), "cache_dir": str(tiny_folder.parent / "cache")}
    assert encode_dataset(rows, tiny_folder.name, cache_dir="cache") == sent
    for name in ("token", "use_auth_token"):
        with pytest.raises(InputError, match=f"{name} would be sent .*; set HF_TOKEN") as caught:
            encode_dataset(rows, tiny_folder, **dict[str, Any]({name: "a secret"}))
        assert caught.value.argument == name
        assert "a secret" not in str(caught.value)


# --- a cluster


class Machines:
    """A head, which reads and writes, and two others, each with room for one actor."""

    def __init__(self) -> None:
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "num_gpus": 1,  # as Ray counts them; there need be none
                "object_store_memory": STORE,
                "include_dashboard": False,
            },
        )
        self.others = [self.add(), self.add()]
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="error")
        self.cluster.wait_for_nodes()

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, resources={"encode": 1}, object_store_memory=STORE)

    def stop(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    started = Machines()
    here = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(here)  # the machines lack this file
    yield started
    ray.cloudpickle.unregister_pickle_by_value(here)
    started.stop()


@pytest.mark.slow
def test_share_that_ray_gives(machines: Machines) -> None:
    assert adapter._given_by_ray() == {}  # here is no actor
    for resources, share in (
        ({"num_cpus": 1}, {"device": "cpu", "threads": 1}),
        ({"num_cpus": 0, "num_gpus": 1}, {"device": "cuda", "threads": 1}),
    ):
        asked = ray.remote(**resources)(lambda: adapter._given_by_ray())
        assert ray.get(asked.remote()) == share


class Watched(MiniLMActor):
    """Leaves a file at the beginning and at the end of each batch."""

    def __init__(self, log: str, **options: Any) -> None:
        super().__init__(**options)
        self.log = Path(log)
        self.node = ray.get_runtime_context().get_node_id()
        self.done = 0

    def __call__(self, batch: Any) -> Any:
        name = f"{self.node}-{os.getpid()}-{self.done}"
        (self.log / f"begun-{name}").touch()
        out = super().__call__(batch)
        time.sleep(0.2)  # so that a signal meets it amid a batch
        (self.log / f"ended-{name}").touch()
        self.done += 1
        return out


def amid_third_batch(log: Path, job: "Future[None]") -> tuple[str, int]:
    """Wait until an actor is in its third batch, and both have done one; its machine and pid."""
    while not job.done():
        ended = [path.name.split("-") for path in log.glob("ended-*")]
        for path in log.glob("begun-*-2"):
            _, node, pid, _ = path.name.split("-")
            if (
                len({name[1] for name in ended}) == 2
                and not (log / path.name.replace("begun", "ended")).exists()
            ):
                return node, int(pid)
        time.sleep(0.01)
    job.result()
    raise AssertionError("no actor came to its third batch")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["actor", "machine"])
def test_killed_in_the_middle(
    what: str,
    machines: Machines,
    published: Path,
    encoder: SentenceEncoder,
    tmp_path: Path,
) -> None:
    lines = (DATA / "parity_texts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines[::2]]
    source, target, log = (tmp_path / name for name in ("in", "out", "log"))
    source.mkdir()
    log.mkdir()
    pyarrow.parquet.write_table(table(texts), source / "texts.parquet")

    def encode() -> None:
        rows = ray.data.read_parquet(str(source)).repartition(target_num_rows_per_block=30)
        rows.map_batches(
            Watched,
            fn_constructor_kwargs={
                "log": str(log), "model": str(published), "truncation": "silent",
            },
            batch_format="pyarrow",
            batch_size=15,
            compute=ray.data.ActorPoolStrategy(size=2),
            num_cpus=1,
            resources={"encode": 1},
        ).write_parquet(str(target))  # fmt: skip

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(encode)
        node, pid = amid_third_batch(log, job)
        if what == "actor":
            os.kill(pid, signal.SIGKILL)
        else:
            (machine,) = [each for each in machines.others if each.node_id == node]
            machines.cluster.remove_node(machine, allow_graceful=False)
            machines.others.remove(machine)
            machines.others.append(machines.add())
        assert not job.done()
        job.result()

    assert not (log / f"ended-{node}-{pid}-2").exists()  # it was amid its third batch
    workers = {tuple(path.name.split("-")[1:3]) for path in log.glob("ended-*")}
    assert len(workers) == 3  # two, and the one in place of the killed one
    if what == "machine":
        assert [number for where, number in workers if where == node] == [str(pid)]

    written = pyarrow.dataset.dataset(target, format="parquet").to_table()
    order = np.argsort(written["id"].to_numpy())
    assert written["id"].to_numpy()[order].tolist() == list(range(len(texts)))
    written = written.take(order)
    assert written["text"].to_pylist() == texts
    alone = encoder.encode(texts, truncation="silent")
    np.testing.assert_array_equal(embeddings_of(written["embedding"]), alone)
    parts = sorted(target.glob("*.parquet"))
    assert len(parts) > 2
    expected = encoder.fingerprint().for_call(truncation="silent")
    assert {read_fingerprint(part) for part in parts} == {expected}


# --- the script


@pytest.mark.slow
def test_script(
    machines: Machines, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    texts = [WORDS[number % 5] if number % 7 else None for number in range(60)]
    pyarrow.parquet.write_table(table(texts)[:40], source / "a.parquet")
    pyarrow.parquet.write_table(table(texts)[40:], source / "b.parquet")
    command = [str(source), "--model", str(tiny_folder), "--precision", "float16", "--actors", "1"]

    with pytest.raises(Exception, match="is None; pass a string, or choose on_bad_row"):
        encode_on_ray.main([*command, str(tmp_path / "failed")])
    assert not (tmp_path / "failed" / "_SUCCESS").exists()

    encode_on_ray.main([*command, str(target), "--on-bad-row", "skip"])
    assert capsys.readouterr().out.splitlines()[-1] == f"{target}: 51 rows"
    kept = [text for text in texts if text is not None]
    written = pyarrow.dataset.dataset(sorted(target.glob("*.parquet"))).to_table()
    order = np.argsort(written["id"].to_numpy())
    assert written["text"].take(order).to_pylist() == kept
    encoder = SentenceEncoder.from_pretrained(tiny_folder, device="cpu")
    vectors = embeddings_of(written["embedding"].combine_chunks())[order]
    np.testing.assert_array_equal(vectors, encoder.encode(kept).astype(np.float16))
    record = json.loads((target / "_SUCCESS").read_text(encoding="utf-8"))
    assert (record["rows"], record["read_rows"]) == (51, 60)
    assert record["fingerprint"] == [encoder.fingerprint().to_dict()]

    with pytest.raises(InputError, match="is not empty; choose a new folder"):
        encode_on_ray.main([*command, str(target)])


def test_script_verifies(tiny_folder: Path, tmp_path: Path) -> None:
    out = MiniLMActor(tiny_folder, device="cpu")(table(WORDS))
    pyarrow.parquet.write_table(out, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(out, tmp_path / "b.parquet")
    success = tmp_path / "_SUCCESS"
    for rows, may_skip in ((11, False), (9, False), (9, True)):
        with pytest.raises(InputError, match=f"has 10 rows where there were {rows}"):
            encode_on_ray.verify(str(tmp_path), rows, may_skip)
    assert not success.exists()
    assert encode_on_ray.verify(str(tmp_path), 11, True) == 10
    record = json.loads(success.read_text(encoding="utf-8"))
    assert (record["rows"], record["read_rows"], record["files"]) == (10, 11, 2)
    success.unlink()
    other = MiniLMActor(tiny_folder, device="cpu", prompt="a ")(table(WORDS))
    for wrong in (other, other.replace_schema_metadata(None)):
        pyarrow.parquet.write_table(wrong, tmp_path / "b.parquet")
        with pytest.raises(InputError, match="not all parts are by the same model"):
            encode_on_ray.verify(str(tmp_path), 10, False)
    assert not success.exists()


def test_places_are_those_of_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert encode_on_ray.place("in") == str(tmp_path / "in")
    assert encode_on_ray.place("s3://bucket/in") == "s3://bucket/in"


def test_script_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "minilm.adapters.ray")
    with pytest.raises(MissingPackageError, match=r'pip install "minilm\[ray\]"'):
        encode_on_ray.main(["in", "out"])

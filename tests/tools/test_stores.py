"""Vector stores that run in the test's own process: Qdrant, Chroma, Milvus Lite."""

from pathlib import Path

import numpy as np
import pytest

from written import Array, Written, check_search, run_line, tool

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore")]


def test_qdrant(written: Written, tmp_path: Path) -> None:
    client = tool("qdrant_client").QdrantClient(":memory:")
    x = written.vectors
    models = run_line("Qdrant", written, tmp_path, client=client, x=x)["m"]

    def search(row: int) -> tuple[list[int], list[float]]:
        found = client.query_points("c", query=x[row], limit=3).points
        return [point.id for point in found], [-point.score for point in found]

    check_search(search, -written.distances("dot"))

    def read(name: str) -> Array:
        points = client.retrieve(name, range(len(x)), with_vectors=True)
        return np.array([point.vector for point in points], np.float32)

    assert np.array_equal(read("c"), x)
    # With COSINE it normalizes what is of length 1, but for rounding.
    of_cosine = models.VectorParams(size=384, distance=models.Distance.COSINE)
    client.create_collection("n", vectors_config=of_cosine)
    client.upload_collection("n", vectors=x, ids=range(len(x)))
    assert not np.array_equal(read("n"), x)
    np.testing.assert_allclose(read("n"), x, atol=1e-7)


def test_chroma(written: Written, tmp_path: Path) -> None:
    collection = run_line("Chroma", written, tmp_path, x=written.vectors)["c"]

    def search(row: int) -> tuple[list[int], list[float]]:
        found = collection.query(query_embeddings=written.vectors[row : row + 1], n_results=3)
        return [int(name) for name in found["ids"][0]], found["distances"][0]

    check_search(search, written.distances("cosine"))


def test_milvus_lite(written: Written, tmp_path: Path) -> None:
    tool("milvus_lite")
    client = run_line("Milvus Lite", written, tmp_path, x=written.vectors)["client"]

    def search(row: int) -> tuple[list[int], list[float]]:
        (found,) = client.search("c", [written.vectors[row].tolist()], limit=3)
        return [hit["id"] for hit in found], [1 - hit["distance"] for hit in found]

    try:
        check_search(search, written.distances("cosine"))
    finally:
        client.close()

"""How memory is judged; and everything at once for some seconds, on the tiny model."""

from pathlib import Path

import pytest

import soak
from minilm import SentenceEncoder


def test_growth_is_that_of_the_second_half() -> None:
    peaks = [(30, 500), (60, 100), (90, 90), (130, 102), (160, 95)]
    assert soak.growth(peaks) == pytest.approx(0.02)
    assert soak.growth([(60 + i, 100 + i) for i in range(101)]) == pytest.approx(1 / 3, abs=1e-2)
    assert soak.growth([(30, 500), (60, 100)]) is None
    assert soak.growth([]) is None


@pytest.mark.process
@pytest.mark.slow
def test_a_run(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "soak.md"
    command = ["0.3", "--model", str(tiny_folder), "--calls", "12", "--kill-every", "8"]
    command += ["--interrupt-every", "5", "--markdown", str(results)]
    code = soak.main(command)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "0 differ from what one thread gave" in out
    assert "left over: no thread, no process, no file" in out
    for what in ("calls in threads", "calls in the main thread", "searches", "interrupted by"):
        assert what in results.read_text(encoding="utf-8")


@pytest.mark.process
@pytest.mark.slow
def test_a_wrong_vector_is_noticed(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = soak.Soak._prepare_index

    def falsified(self: soak.Soak) -> None:
        prepare(self)
        encode = SentenceEncoder.encode
        monkeypatch.setattr(
            SentenceEncoder, "encode", lambda self, *given, **more: -encode(self, *given, **more)
        )

    monkeypatch.setattr(soak.Soak, "_prepare_index", falsified)
    assert soak.main(["0.03", "--model", str(tiny_folder), "--calls", "3"]) == 1
    assert "calls in threads: Call(" in capsys.readouterr().out

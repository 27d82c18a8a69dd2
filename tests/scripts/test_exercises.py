"""The exercises: each question has the answer that the published model gives."""

import ast
import inspect
import math
import shlex
import subprocess
import sys
from pathlib import Path

import exercises
import pytest
import torch
from exercises import EXERCISES, Exercise

from conftest import ROOT
from minilm import BertLayer, SentenceEncoder, bert
from minilm.cli import parser

numbered = pytest.mark.parametrize(
    ("number", "exercise"), list(enumerate(EXERCISES, 1)), ids=[e.title for e in EXERCISES]
)


def test_there_are_eight(capsys: pytest.CaptureFixture[str]) -> None:
    assert exercises.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(EXERCISES) == 8
    for number, (line, exercise) in enumerate(zip(lines, EXERCISES, strict=True), 1):
        assert line.startswith(f"{number}  {exercise.title} ")


@numbered
def test_question(number: int, exercise: Exercise, capsys: pytest.CaptureFixture[str]) -> None:
    assert exercises.main([str(number)]) == 0
    out = capsys.readouterr().out
    assert " ".join(exercise.question.split()) in " ".join(out.split())
    assert all(f"    {line}" in out for line in exercise.command.splitlines())
    answer = str(exercise.answer)
    assert answer not in out  # it is not given away
    assert exercise.lesson[:30] not in out


@numbered
def test_solution_works_out_the_answer(
    number: int,
    exercise: Exercise,
    published: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gelu, attention, forward = torch.nn.functional.gelu, bert.attention, BertLayer.forward
    assert exercises.main([str(number), "--solution", "--model", str(published)]) == 0
    out = capsys.readouterr().out
    assert inspect.getsource(exercise.solve).splitlines()[-1].strip() in out
    assert " ".join(exercise.lesson.split()) in " ".join(out.split())
    (line,) = [line for line in out.splitlines() if line.startswith("Answer: ")]
    shown = line.removeprefix("Answer: ")
    if isinstance(exercise.answer, str):
        assert shown == exercise.answer
    else:
        assert float(shown) == pytest.approx(exercise.answer, rel=2e-3)
    # What it changed is as it was.
    assert (torch.nn.functional.gelu, bert.attention, BertLayer.forward) == (
        gelu, attention, forward,
    )  # fmt: skip


@numbered
def test_answers(number: int, exercise: Exercise, capsys: pytest.CaptureFixture[str]) -> None:
    right = exercise.answer if isinstance(exercise.answer, str) else f"{exercise.answer:.3g}"
    assert exercises.main([str(number), "--answer", right]) == 0
    assert capsys.readouterr().out == f"Right. {exercise.lesson}\n"
    wrong = ["", "nonsense", "nan"]
    if isinstance(exercise.answer, float):
        wrong += [str(-exercise.answer), str(exercise.answer * 1.02), str(exercise.answer * 0.98)]
    for answer in wrong:
        assert exercises.main([str(number), f"--answer={answer}"]) == 1
        assert capsys.readouterr().out == "No, it is something else.\n"


def test_an_answer_may_be_written_in_other_ways() -> None:
    order, pair = EXERCISES[6], EXERCISES[0]
    for answer in ("0.9072", "0.907", " .907 ", "0,907", "9.07e-1"):
        assert order.accepts(answer), answer
    for answer in ("0.9", "0.91", "0.9079", "90.7"):
        assert not order.accepts(answer), answer
    assert pair.accepts("[cls]-[CLS]")
    assert pair.accepts("CLS / CLS")
    assert not pair.accepts("weather sunny")
    assert EXERCISES[7].accepts("layers.0.attention.scores")
    assert not EXERCISES[7].accepts("layers.1.attention.scores")


@pytest.mark.process
@numbered
def test_command_to_begin_with(
    number: int, exercise: Exercise, encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = exercise.command
    if command.startswith("minilm "):
        parser._parser().parse_args(shlex.split(command)[1:])
    elif command.startswith("python -c "):
        code = shlex.split(command)[2]
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "def forward" in done.stdout
    else:
        ast.parse(command)
        monkeypatch.setattr(SentenceEncoder, "from_pretrained", lambda: encoder)
        exec(compile(command, exercise.title, "exec"), {})


@numbered
def test_what_to_read_is_there(number: int, exercise: Exercise) -> None:
    for place in exercise.read.split("; "):
        words = place.replace(" in ", ", ").split(", ")
        (path,) = [word for word in words if "/" in word]
        text = (ROOT / path).read_text(encoding="utf-8")
        for name in words:
            if name != path:
                assert f"{name.rpartition('.')[2]}" in text


def test_numbers_of_the_issue() -> None:
    assert EXERCISES[5].answer == 1.75e-4
    assert EXERCISES[6].answer == 0.9072


def test_without_positions_the_order_is_lost(encoder: SentenceEncoder) -> None:
    import copy

    blind = copy.deepcopy(encoder).to(torch.float64)
    with torch.no_grad():
        blind.bert.embeddings.position_embeddings.weight.zero_()
    a, b = blind.encode(["dog bites man", "man bites dog"], convert_to_tensor=True)
    assert math.isclose(float(a @ b), 1, rel_tol=0, abs_tol=1e-14)
    assert float((a - b).abs().max()) < 1e-14


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [(["9"], "invalid choice: 9"), (["--solution"], "say which"), (["--answer", "1"], "say which")],
)
def test_wrong_usage(arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        exercises.main(arguments)
    assert caught.value.code == 2
    assert hint in capsys.readouterr().err


def test_missing_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert exercises.main(["7", "--solution", "--model", "./no/such/folder"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("exercises: ")
    assert errors.count("\n") == 1


@pytest.mark.process
def test_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "learn" / "exercises.py", "7", "--answer", "0.907"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Right. ")

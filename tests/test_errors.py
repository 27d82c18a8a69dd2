"""What libraries raise of broken files becomes an error of ours; what is no such error stays."""

import tokenize
import zlib

import pytest

from minilm.errors import ConfigError, InputError, errors_of_libraries


class PanicException(BaseException):
    """A stand-in for what a panic of Rust is in Python."""


def refusal(why: str) -> ConfigError:
    return ConfigError("file", [why])


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no"), "file: no"),
        (KeyError("a"), "file: no 'a'"),
        (MemoryError(), "file: MemoryError"),
        (OSError("no thrift"), "file: no thrift"),
        (NotImplementedError("compression 99"), "file: compression 99"),
        (RecursionError("too deep"), "file: too deep"),
        (tokenize.TokenError("EOF"), "file: EOF"),
        (zlib.error("incorrect"), "file: incorrect"),
        (PanicException("no entry"), "file: no entry"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused(error: BaseException, reason: str) -> None:
    with pytest.raises(ConfigError) as raised, errors_of_libraries(refusal):
        raise error
    assert str(raised.value) == reason
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), FileNotFoundError(2, "no such file", "file"), UserWarning("a"),
     InputError("of ours", "a"), OSError(5, "input/output error")],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_passed_on(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, errors_of_libraries(refusal):
        raise error
    assert raised.value is error

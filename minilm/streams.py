"""The standard streams, any of which may not be there: in a service, under cron or pythonw.

In: `sys.stdin`, `sys.stdout`, `sys.stderr`, which are None there, or closed, or a pipe that nobody
reads any more. Used where a progress bar is shown, standard input is read, or a result is printed.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from minilm.errors import InputError

__all__ = ["is_open", "is_watched", "present", "standard_input", "standard_output", "tell"]


def is_open(stream: Any) -> bool:
    """Whether something can be written to `sys.stdout` or `sys.stderr`."""
    return stream is not None and not getattr(stream, "closed", False)


def is_watched(stream: Any) -> bool:
    """Whether a stream is there, open, and a terminal, so that somebody may be watching."""
    try:
        return is_open(stream) and bool(stream.isatty())
    except (AttributeError, ValueError):  # another program's object
        return False


def standard_input() -> Iterable[bytes]:
    """The lines of standard input; an `InputError` if there is none."""
    if not is_open(sys.stdin):
        raise InputError("standard input is closed; name a file", "-")
    binary = getattr(sys.stdin, "buffer", None)
    # A program may have put an object in its place that holds text only.
    return binary or (line.encode("utf-8", "surrogatepass") for line in sys.stdin)


@contextmanager
def standard_output() -> Iterator[IO[str]]:
    """Standard output, to print a result to.

    A reader that has gone, as in `minilm encode | head`, has what it wanted: the rest goes nowhere,
    and the command ends as it would have ended.

    Raises:
        OSError: What was printed can't be written, for example because the disk is full.
    """
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        raise OSError(error.errno, error.strerror, "standard output") from error


def tell(line: str) -> None:
    """Print a line for the user on standard error, which need not be there."""
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


def _discard(stream: Any) -> None:
    """Discard what is written from now on, and what would still be flushed at exit."""
    with suppress(OSError, ValueError, AttributeError):  # it is not a file of the system
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextmanager
def present() -> Iterator[None]:
    """Inside a `with`, replace a standard output or error that isn't there by one that discards.

    For a command that runs in this process.
    """
    # The first file opened would take the number of a closed stream, and then all that a library
    # in C prints would be written to that file.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            before = getattr(sys, name)
            if not is_open(before):
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
                stack.callback(setattr, sys, name, before)
                setattr(sys, name, nowhere)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except (OSError, ValueError):  # else Python prints an error as it ends
                    _discard(stream)

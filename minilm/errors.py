"""Every error and warning of the package, as one tree.

Each class also derives from the built-in that a caller would naturally catch, and carries
what it is about as attributes, so that nobody has to parse a message::

    MinilmError
    ├── InputError (ValueError)              an argument: its value
    │   ├── InputTypeError (TypeError)       an argument: its type
    │   ├── BadRowError                      a row of a file that has no text to embed
    │   └── TruncationError                  text beyond the limit, where none may be cut
    ├── ConfigError (ValueError)             a JSON file of a model folder
    ├── TokenizerError (ValueError)          tokenizer.json
    ├── WeightsError (ValueError)            model.safetensors
    ├── HashMismatchError (ValueError)       a file that is not what was published
    ├── ModelFolderError (ValueError)        several of the above in one folder
    ├── NotFiniteError (ArithmeticError)     the model gave NaN or infinity
    ├── WorkerError (RuntimeError)           a process of a pool died
    └── ModelNotFoundError (FileNotFoundError)
        └── NotAFolderError (NotADirectoryError)

    TruncationWarning (UserWarning)          text beyond the length limit was not read
    BadRowWarning (UserWarning)              rows of files had no text to embed
    DtypeWarning (UserWarning)               computed in float32, not in what was asked for
"""

import errno
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = [
    "BadRowError",
    "BadRowWarning",
    "ConfigError",
    "DtypeWarning",
    "HashMismatchError",
    "InputError",
    "InputTypeError",
    "MinilmError",
    "MissingPackageError",
    "ModelFolderError",
    "ModelNotFoundError",
    "NotAFolderError",
    "NotFiniteError",
    "TokenizerError",
    "TraceKeyError",
    "TruncationError",
    "TruncationWarning",
    "WeightsError",
    "WorkerError",
]


class MinilmError(Exception):
    """Base of every error that this package raises on purpose.

    An error is pickled, for another process, by the arguments of its class. It has them as
    attributes of the same names; `message` is what it says.
    """

    def __reduce__(self) -> str | tuple[Any, ...]:
        given = inspect.signature(type(self).__init__).parameters
        if "kwargs" in given:  # Exception's own
            return super().__reduce__()
        names = list(given)[1:]
        return type(self), tuple(str(self) if n == "message" else getattr(self, n) for n in names)


class InputError(MinilmError, ValueError):
    """An argument has a value that cannot be used.

    Attributes:
        argument: The argument's name, with the position where there is one: `sentences[3]`.
    """

    def __init__(self, message: str, argument: str) -> None:
        super().__init__(message)
        self.argument = argument


class InputTypeError(InputError, TypeError):
    """An argument has a type that cannot be used."""


class TruncationError(InputError):
    """Some texts are longer than the model's limit, and `truncation="error"` was asked for.

    Attributes:
        rows: The numbers of those texts.
    """

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message, "sentences")
        self.rows = list(rows)


class BadRowError(InputError):
    """A row of a file has no text that can be embedded, and `on_bad_row="error"` was asked for.

    Attributes:
        path: The file. The message names the line, or the row.
    """

    def __init__(self, message: str, path: str | Path) -> None:
        super().__init__(message, "inputs")
        self.path = Path(path)


class NotFiniteError(MinilmError, ArithmeticError):
    """The vectors of some texts have NaN or infinity in them.

    Attributes:
        rows: The numbers of those texts.
    """

    def __init__(self, rows: Sequence[int], reason: str) -> None:
        self.rows, self.reason = list(rows), reason
        first = f"first: sentences[{self.rows[0]}]" if self.rows else ""
        super().__init__(f"{len(self.rows):,} vectors have NaN or infinity; {first}; {reason}")


class WorkerError(MinilmError, RuntimeError):
    """A process of a pool died, or could not say what its error was."""


class _FileError(MinilmError, ValueError):
    """A file of a model folder cannot be used; lists every problem found in it.

    Attributes:
        path: The file.
        problems: One sentence for each problem.
    """

    def __init__(self, path: str | Path, problems: Sequence[str]) -> None:
        self.path = Path(path)
        self.problems = tuple(problems)
        super().__init__(describe(self.path, self.problems))


class ConfigError(_FileError):
    """A JSON file of a model folder is broken or asks for what is not implemented."""


class TokenizerError(_FileError):
    """`tokenizer.json` is broken or is not a WordPiece tokenizer of the BERT family."""


class WeightsError(_FileError):
    """`model.safetensors` is broken or does not fit the configuration."""


class HashMismatchError(MinilmError, ValueError):
    """A file is not the published one, or not what the Hub said that it is.

    Attributes:
        path: The file.
        expected: The hash that it should have, in hex: 64 digits of SHA-256, or 40 of the SHA-1
            that git gives to small files.
        actual: That hash of the file found.
        kind: "published", or "downloaded" for any other model of the Hub.
        record: Where the expected hash is written, if that is a file beside it.
        advice: What to do, unless it is to delete the file.
    """

    def __init__(
        self,
        path: str | Path,
        expected: str,
        actual: str,
        kind: str = "published",
        record: Path | None = None,
        advice: str = "",
    ) -> None:
        self.path, self.expected, self.actual = Path(path), expected, actual
        self.kind, self.record, self.advice = kind, record, advice
        # In the Hub cache the name is a link: deleting it alone would bring the same bytes back.
        target = f" and {self.path.resolve()}" if self.path.is_symlink() else ""
        todo = f"delete it{target}, so that it is fetched again"
        if record is not None:
            todo = f"download it again; or delete {record}, if you changed the file yourself"
        what = "the published file" if kind == "published" else "the file that the Hub has"
        name = "SHA-1 in git" if len(expected) == 40 else "SHA-256"
        super().__init__(
            f"{self.path}: this is not {what}: its {name} is {actual}, "
            f"expected {expected}; {advice or todo}"
        )


class ModelFolderError(MinilmError, ValueError):
    """Several files of one model folder cannot be used.

    Attributes:
        path: The folder.
        errors: The error of each file.
    """

    def __init__(self, path: str | Path, errors: Sequence[MinilmError]) -> None:
        self.path = Path(path)
        self.errors = tuple(errors)
        super().__init__(describe(self.path, [str(error) for error in self.errors]))


class ModelNotFoundError(MinilmError, FileNotFoundError):
    """The model, or a file of it, is in none of the places looked at.

    Attributes:
        places: What was found instead in each of them, if several were looked at.
    """

    def __init__(self, message: str, places: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.places = tuple(places)


class NotAFolderError(ModelNotFoundError, NotADirectoryError):
    """A path that should be a model folder is something else."""


class MissingPackageError(MinilmError, ImportError):
    """A part of this package needs a package that is not installed.

    Attributes:
        package: The package.
        extra: The extra that brings it: `pip install "minilm[plot]"`.
    """

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f'{what} needs {package}: pip install "minilm[{extra}]"')
        self.what = what
        self.package = package
        self.extra = extra


class TraceKeyError(MinilmError, KeyError):
    """A trace has no tensor of that name.

    Attributes:
        name: What was asked for.
        nearest: The names that are most like it, the most similar first.
    """

    def __init__(self, name: str, nearest: Sequence[str]) -> None:
        super().__init__(f"there is no {name!r} in this trace; the nearest: {', '.join(nearest)}")
        self.name = name
        self.nearest = list(nearest)

    def __str__(self) -> str:  # KeyError's own would quote it
        return str(self.args[0])


class TruncationWarning(UserWarning):
    """Some texts are longer than the model's limit; their ends were not read."""


class BadRowWarning(UserWarning):
    """Some rows of files had no text that can be embedded; they were left out, or read as empty."""


class DtypeWarning(UserWarning):
    """The processor is slower in the dtype asked for than in float32; the model is in float32."""


@contextmanager
def errors_of_libraries(refuse: Callable[[str], MinilmError]) -> Iterator[None]:
    """Inside a `with`, raise an error of ours for any that a library raises about a broken file.

    Which these are differs from library to library and grows with each version: besides their own,
    MemoryError for a shape that lies, errors of tokenize and zlib, NotImplementedError for a
    compression that a bit turned into another, and panics of Rust, which are no `Exception`.

    Args:
        refuse: Makes the error, given the reason in words; it names the file.

    Raises:
        MinilmError: What `refuse` made.
        OSError: The system's, as for a file that is not there; it is passed on, as are errors that
            are ours already, warnings, and Ctrl-C.
    """
    try:
        yield
    except (MinilmError, Warning):
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not isinstance(error, Exception) and not is_panic:
            raise
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise refuse(reason or type(error).__name__) from error


def describe(subject: str | Path, problems: Sequence[str]) -> str:
    """`subject: problem`, or `subject:` and one indented line for each problem."""
    if len(problems) == 1:
        return f"{subject}: {problems[0]}"
    return f"{subject}: {len(problems)} problems{listed(problems)}"


def listed(items: Sequence[str]) -> str:
    """One indented line for each item."""
    return "".join("\n  - " + item.replace("\n", "\n    ") for item in items)

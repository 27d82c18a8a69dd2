"""The command `minilm`: what can be written on its line. What it then does is in `commands.py`.

Everything that it can do is one call in Python too. torch is loaded only once a command runs, so
that `--help` answers at once. Exit codes: 0 done, 1 failed, or for `parity` different, 2 wrong
usage, 130 interrupted.
"""

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilm.cli import commands
from minilm.errors import MinilmError
from minilm.files.tables import ROW_SUFFIXES, SUFFIXES
from minilm.pretrained import hub
from minilm.streams import present, tell
from minilm.version import __version__

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
    with present():
        _make_output_safe()
        parser = _parser()
        options = parser.parse_args(arguments)
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                code: int | None = options.run(options, parser)
        except BrokenPipeError:  # whoever reads the file that was named has what he wanted
            return 0
        except KeyboardInterrupt:
            tell("minilm: interrupted")
            return 130
        except MinilmError as error:
            tell(f"minilm: {error}")
            return 1
        except OSError as error:
            tell(f"minilm: {error.filename or 'system'}: {error.strerror or error}")
            return 1
        return code or 0


def _make_output_safe() -> None:
    """Text that the output's encoding lacks is escaped."""
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
    subcommands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, short: str, *parents: argparse.ArgumentParser, **more: Any) -> Any:
        return subcommands.add_parser(
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
        help="its suffix says what it is: .txt or none, a text a line; .jsonl or .ndjson; .csv; - "
        "or no FILE is standard input, a text a line; with -o FOLDER also .parquet, folders, and "
        "patterns in quotes",
    )
    encode.add_argument(
        "-t", "--text", action="append", default=[], metavar="TEXT", help="a text; repeatable"
    )
    encode.add_argument(
        "--column",
        metavar="NAME",
        help="the name of the text (default: text, or in .jsonl and .csv the only one)",
    )
    encode.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        help=f"its suffix chooses the form: {', '.join(SUFFIXES)} (default, and -: jsonl on "
        "standard output); without a suffix, or with / at its end, it is a folder of Parquet files",
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
    encode.set_defaults(run=commands.encode)

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
    similarity.set_defaults(run=commands.similarity)

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
    mine.set_defaults(run=commands.mine)

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
    cluster.set_defaults(run=commands.cluster)

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
        metavar="OUT",
        help=f"write the rows that stay; its suffix chooses the form: {', '.join(ROW_SUFFIXES)}; - "
        "prints them, as jsonl, in place of the pairs",
    )
    dedup.set_defaults(run=commands.dedup)

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
    explain.add_argument("--png", metavar="FILE", help="also draw all pairs")
    explain.add_argument("--html", metavar="FILE", help="also write them as a page")
    explain.set_defaults(run=commands.explain)

    tour = command("tour", "a page that shows how two texts become their similarity", model)
    tour.add_argument("a", metavar="A", help="a text, the one that is followed through the model")
    tour.add_argument("b", metavar="B", help="the text to compare it with")
    tour.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        default="tour.html",
        help="- is standard output (default: %(default)s)",
    )
    tour.set_defaults(run=commands.tour)

    info = command("info", "the architecture, and where the weights came from", model)
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=commands.info)

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
        "--texts",
        type=Path,
        metavar="FILE",
        help="the texts of a FILE that has none, as encode reads them",
    )
    check.add_argument("--column", metavar="NAME", help="the name of the text (default: text)")
    check.add_argument(
        "--sample", type=_positive, default=256, metavar="N", help="texts (default: %(default)s)"
    )
    check.add_argument("--json", action="store_true", help="print the finding as JSON")
    check.set_defaults(run=commands.check)

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
        help="the texts of a FILE that has none, as encode reads them (default: the golden texts)",
    )
    parity.add_argument("--column", metavar="NAME", help="the name of the text (default: text)")
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
    parity.set_defaults(run=commands.parity)

    download = command("download", "put the published files into a folder, verified")
    download.add_argument(
        "-o",
        "--output",
        metavar="FOLDER",
        help=f"(default: {hub.WEIGHTS_FOLDER.as_posix()})",
    )
    download.set_defaults(run=commands.download)
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

    build = action("build", "Make an index of texts", commands.index_build)
    add = action("add", "Add texts to an index", commands.index_add)
    search = action("search", "Find the texts nearest to a query", commands.index_search)
    check = action("check", "Whether an index is whole, and this model's", commands.index_check)
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
    build.add_argument("-o", "--output", metavar="INDEX", required=True, help="the new folder")
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
    search.add_argument("--column", metavar="NAME", help="as for encode, of FILE")
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value


_positive.__name__ = "positive integer"  # argparse: "invalid positive integer value: 'x'"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    tell(f"minilm: warning: {message}")

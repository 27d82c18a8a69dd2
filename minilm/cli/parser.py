"""The command line `minilm`: its commands, their options and help. `commands.py` runs them.

Each command is one call in Python too. torch is loaded only once a command runs, so that `--help`
answers at once. Exit codes: 0 done, 1 failed, or for `parity`, `check` and `verify` different, 2
wrong usage, 130 interrupted.
"""

import argparse
import io
import sys
import warnings
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from minilm.cli import commands
from minilm.disk import with_home
from minilm.errors import MinilmError
from minilm.files.tables import ROW_SUFFIXES, SUFFIXES
from minilm.pretrained import hub
from minilm.streams import present, tell
from minilm.version import __version__

__all__ = ["main"]

# What `--help` shows of each command, under its name; a test runs all of them.
_TEXT = files("minilm.cli").joinpath("examples.txt").read_text(encoding="utf-8")
_EXAMPLES = {name: text for name, _, text in (p.partition("]\n") for p in _TEXT.split("\n[")[1:])}


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
        except BrokenPipeError:  # the reader of a named pipe has all that it wanted
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
    """Escape characters that the output's encoding lacks."""
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

    def command(name: str, short: str, description: str | None = None, model: bool = True) -> Any:
        one = subcommands.add_parser(
            name,
            help=short,
            description=description,
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(run=getattr(commands, name, None))
        if model:
            _add_model(one)
        return one

    encode = command("encode", "texts to vectors")
    encode.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="its suffix says what it is: .txt or none, a text a line; .jsonl or .ndjson; .csv; - "
        "or no FILE is standard input, a text a line; with -o FOLDER also .parquet, folders, and "
        "patterns in quotes",
    )
    _add_list(encode, "-t", "--text", "TEXT", "a text; repeatable")
    _add_column(encode, "the name of the text (default: text, or in .jsonl and .csv the only one)")
    _add_output(
        encode,
        "OUT",
        f"its suffix chooses the form: {', '.join(SUFFIXES)} (default, and -: jsonl on standard "
        "output); without a suffix, or with / at its end, it is a folder of Parquet files",
    )
    _add_embedding_column(encode, ".jsonl")
    _add_truncation(
        encode,
        "text beyond the limit: cut it and say so (default), stop, cut it, or read it in windows",
    )
    encode.add_argument("--prompt", metavar="TEXT", help="put this in front of every text")
    encode.add_argument(
        "--precision",
        choices=("float32", "float16", "int8", "uint8", "binary", "ubinary"),
        default="float32",
        help="what the numbers are rounded to (default: %(default)s; float16 only into a folder; "
        "of the two of bits, most tools take ubinary only)",
    )
    _add_number(encode, "--truncate-dim", "keep N numbers of each")
    encode.add_argument(
        "--normalize", action="store_true", help="after --truncate-dim: scale to length 1"
    )
    _add_number(encode, "--batch-size", "sentences at a time")
    folder = encode.add_argument_group("with -o FOLDER")
    _add_number(folder, "--shard-rows", "rows of each part (default: 4096)")
    folder.add_argument(
        "--row-number",
        metavar="NAME",
        help="also a column 0, 1, 2, ... of that name, for tools that read rows in any order",
    )
    folder.add_argument(
        "--on-bad-row",
        choices=("error", "skip", "empty"),
        help="a row without a text: stop (default), leave it out, or give it the vector of the "
        "empty text",
    )
    _add_number(folder, "--workers", "processes, which share the threads")
    folder.add_argument(
        "--overwrite", action="store_true", help="remove the files of another run from the folder"
    )

    similarity = command("similarity", "how alike texts are, as a matrix")
    similarity.add_argument("texts", nargs="*", metavar="TEXT", help="a text")
    file_help = "texts from a file, as encode reads them; - is standard input"
    _add_list(similarity, "-f", "--file", "FILE", file_help)
    _add_column(similarity)
    _add_json(similarity, "print the matrix as JSON")

    mine = command("mine", "the most similar pairs of texts", "Find the most similar pairs.")
    _add_number(mine, "--max-pairs", "how many to print, at most", 100)
    _add_number(mine, "--top-k", "look at the N nearest of each text", 100)

    cluster = command(
        "cluster",
        "groups of similar texts",
        "Find groups of texts that are all near to one.",
    )
    _add_threshold(cluster, 0.75)
    _add_number(cluster, "--min-size", "the smallest group", 10)

    dedup = command(
        "dedup",
        "texts that say the same as an earlier one",
        "Find the texts that are as near as the threshold to an earlier one that stays.",
    )
    _add_threshold(dedup, 0.95)
    _add_output(
        dedup,
        "OUT",
        f"write the rows that stay; its suffix chooses the form: {', '.join(ROW_SUFFIXES)}; - "
        "prints them, as jsonl, in place of the pairs",
    )
    for one in (mine, cluster, dedup):
        _add_files(one)
        _add_json(one, "print JSON, with the numbers of rows, from 0")

    index = command(
        "index",
        "texts in a folder that can be searched",
        "Keep texts and their vectors in a folder, and find the nearest to a query.",
        model=False,
    )
    _add_actions(index)

    explain = command(
        "explain", "why two texts are alike: their similarity as a sum over pairs of words"
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
    _add_json(explain, "print everything as JSON instead")
    explain.add_argument("--png", metavar="FILE", help="also draw all pairs")
    explain.add_argument("--html", metavar="FILE", help="also write them as a page")

    tour = command("tour", "a page that shows how two texts become their similarity")
    tour.add_argument("a", metavar="A", help="a text, the one that is followed through the model")
    tour.add_argument("b", metavar="B", help="the text to compare it with")
    _add_output(tour, "FILE", "- is standard output (default: %(default)s)", "tour.html")

    info = command("info", "the architecture, and where the weights came from")
    _add_json(info, "print it as JSON")

    check = command(
        "check",
        "whether vectors in a file are this model's",
        "Embed some of the texts again, and say whether the vectors in a file are the same, the "
        "same but for rounding, of another length limit, or of another model.",
    )
    check.add_argument(
        "file",
        type=with_home,
        metavar="FILE",
        help=f"vectors: {', '.join(SUFFIXES)}, .parquet, or a folder that encode wrote, which is "
        "compared with its manifest too",
    )
    texts_help = "the texts of a FILE that has none, as encode reads them"
    _add_path(check, "--texts", "FILE", texts_help)
    _add_number(check, "--sample", "how many texts to embed again", 256)

    parity = command(
        "parity",
        "why another implementation gives other vectors",
        "Compare another implementation with this one, and name the probable cause of the "
        "difference; or write and compare golden values, stage by stage.",
    )
    _add_path(
        parity,
        "--against",
        "FILE",
        "vectors or bits that another program wrote (.npy, .npz, .jsonl, .csv), or a model (.onnx)",
    )
    _add_path(
        parity,
        "--against-ids",
        "FILE",
        "token ids alone: a JSON list of lists, or .jsonl with input_ids",
    )
    _add_path(parity, "--texts", "FILE", f"{texts_help} (default: the golden texts)")
    golden_help = "write texts, ids and the output of every stage into a folder"
    _add_path(parity, "--golden", "FOLDER", golden_help)
    _add_path(
        parity,
        "--against-stages",
        "FILE",
        "instead of writing, compare a .safetensors file with what is in --golden, and name the "
        "first stage that differs",
    )
    parity.add_argument(
        "--digest",
        action="store_true",
        help="print one SHA-256 of the golden texts' vectors, and one of each stage",
    )
    for one in (check, parity):
        _add_column(one, "the name of the text (default: text)")
        _add_json(one, "print the finding as JSON")

    verify = command(
        "verify",
        "whether a model's files are what was published",
        "Hash every file of a model that may be read, and compare it with what the Hub said it is; "
        "fetch a damaged one in the Hub's cache again.",
        model=False,
    )
    verify.add_argument(
        "model",
        nargs="?",
        metavar="NAME_OR_FOLDER",
        default=hub.DEFAULT_MODEL,
        help="a folder, or a name on the Hugging Face Hub (default: %(default)s)",
    )
    _add_json(verify, "print it as JSON")

    download = command("download", "put the published files into a folder, verified", model=False)
    _add_output(download, "FOLDER", f"(default: {hub.WEIGHTS_FOLDER.as_posix()})")
    return parser


def _add_actions(index: Any) -> None:
    actions = index.add_subparsers(title="actions", required=True, metavar="ACTION")

    def action(name: str, description: str, model: bool = True) -> Any:
        one = actions.add_parser(name, help=description.lower(), description=f"{description}.")
        one.set_defaults(run=getattr(commands, f"index_{name}"))
        if model:
            _add_model(one)
        return one

    build = action("build", "Make an index of texts")
    add = action("add", "Add texts to an index")
    search = action("search", "Find the texts nearest to a query")
    check = action("check", "Whether an index is whole, and this model's")
    export = action("export", "Write the rows and vectors of an index as encode does", model=False)
    for one in (add, search, check, export):
        one.add_argument("index", type=with_home, metavar="INDEX", help="its folder")
    for one in (build, add):
        _add_files(one)
        _add_truncation(one, "as for encode")
    prompt_help = "put this in front of every text (default: the model's)"
    for one in (build, add, search):
        one.add_argument("--prompt", metavar="TEXT", help=prompt_help)
    build.add_argument("-o", "--output", metavar="INDEX", required=True, help="the new folder")
    _add_path(
        build,
        "--from-vectors",
        "PATH",
        "embed nothing: take the vectors that encode wrote, a file or a folder, and their rows; "
        "FILE has those of .npy",
    )
    export.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        required=True,
        help=f"{', '.join(SUFFIXES)}, or a folder of Parquet files",
    )
    _add_embedding_column(export, ".jsonl and Parquet")
    build.add_argument(
        "--codes",
        action="append",
        default=[],
        choices=("int8", "binary"),
        help="keep these codes too, for search --precision; repeatable",
    )
    search.add_argument("queries", nargs="*", metavar="QUERY", help="a text")
    _add_list(search, "-f", "--file", "FILE", "queries from a file")
    _add_column(search, "as for encode, of FILE")
    search.add_argument(
        "-k", "--top-k", type=_positive, default=10, metavar="N", help="(default: %(default)s)"
    )
    search.add_argument(
        "--precision",
        choices=("float32", "int8", "binary"),
        default="float32",
        help="find candidates by codes, which are smaller (default: %(default)s, exact)",
    )
    _add_number(search, "--rescore-multiplier", "candidates for each result", 4)
    _add_json(search, "print JSON, with the whole rows")
    _add_number(check, "--sample", "how many texts to embed again", 256)
    _add_json(check, "print the finding as JSON")


# --- options that several commands have; `one` is a parser or a group of its options


def _add_model(one: Any) -> None:
    group = one.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME_OR_FOLDER",
        default=hub.DEFAULT_MODEL,
        help="a folder, or a name on the Hugging Face Hub (default: %(default)s)",
    )
    group.add_argument(
        "--dtype",
        help="float32 (default), float64, float16, bfloat16, int8; auto: bfloat16 where it is fast",
    )
    group.add_argument(
        "--reproducible",
        action="store_true",
        help="the same vectors on every machine: computed in float64, rounded once to float32",
    )
    group.add_argument("--device", help="cpu, cuda, mps, ... (default: the best there is)")
    _add_number(group, "--threads", "processor cores to use (default: all)")


def _add_files(one: Any) -> None:
    one.add_argument("files", nargs="*", metavar="FILE", help="texts, as encode reads them")
    _add_column(one)


def _add_column(one: Any, text: str = "as for encode") -> None:
    one.add_argument("--column", metavar="NAME", help=text)


def _add_embedding_column(one: Any, forms: str) -> None:
    text = f"the name of the vector in {forms} (default: %(default)s)"
    one.add_argument("--embedding-column", metavar="NAME", default="embedding", help=text)


def _add_list(one: Any, short: str, name: str, kind: str, text: str) -> None:
    one.add_argument(short, name, action="append", default=[], metavar=kind, help=text)


def _add_truncation(one: Any, text: str) -> None:
    choices = ("warn", "error", "silent", "chunk")
    one.add_argument("--truncation", choices=choices, default="warn", help=text)


def _add_output(one: Any, kind: str, text: str, default: str | None = None) -> None:
    one.add_argument("-o", "--output", metavar=kind, default=default, help=text)


def _add_path(one: Any, name: str, kind: str, text: str) -> None:
    one.add_argument(name, type=with_home, metavar=kind, help=text)


def _add_number(one: Any, name: str, text: str, default: int | None = None) -> None:
    text += "" if default is None else " (default: %(default)s)"
    one.add_argument(name, type=_positive, metavar="N", default=default, help=text)


def _add_threshold(one: Any, default: float) -> None:
    text = "how near, at least (default: %(default)s)"
    one.add_argument("--threshold", type=float, default=default, metavar="COSINE", help=text)


def _add_json(one: Any, text: str) -> None:
    one.add_argument("--json", action="store_true", help=text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive integer")
    return value


_positive.__name__ = "positive integer"  # argparse: "invalid positive integer value: 'x'"


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    tell(f"minilm: warning: {message}")

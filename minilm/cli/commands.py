"""What each command does, once `parser.py` has read its line: it calls the library, and prints.

Each function takes the options and its parser, for what only it can find wrong with them, and gives
the exit code, or None for 0. Whatever more there is to do is in the library, for Python users too.
"""

import argparse
import html
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilm.errors import InputError
from minilm.files.rows import DEFAULT_COLUMN, as_json
from minilm.files.tables import (
    ROW_SUFFIXES,
    SUFFIXES,
    Table,
    check_rows,
    form_of,
    is_utf8,
    read_table,
    sidecars_of,
    write_jsonl,
    write_rows,
    write_table,
)
from minilm.outputs import (
    check_folder,
    check_output,
    check_room,
    is_standard_output,
    is_stream,
    write_output,
)
from minilm.parity.foreign import read_texts, read_vectors, run_onnx
from minilm.pretrained import hub
from minilm.source import ModelFiles
from minilm.streams import is_watched, standard_output, tell
from minilm.version import __version__

if TYPE_CHECKING:
    from minilm.encoder import SentenceEncoder

__all__ = [
    "check",
    "cluster",
    "dedup",
    "download",
    "encode",
    "explain",
    "index_add",
    "index_build",
    "index_check",
    "index_search",
    "info",
    "mine",
    "parity",
    "similarity",
    "tour",
]


def encode(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Texts to vectors."""
    output = None if options.output in (None, "-") else Path(options.output)
    if output is not None and _means_folder(options.output):
        _encode_files(options, parser)
        return
    for name in ("shard_rows", "on_bad_row", "workers", "overwrite"):
        if getattr(options, name):
            parser.error(f"argument --{name.replace('_', '-')}: goes with -o FOLDER")
    if options.precision == "float16":
        parser.error("argument --precision: float16 goes with -o FOLDER")
    if output is not None:
        if form_of(output) not in SUFFIXES:
            parser.error(
                f"argument -o: {output} has no suffix of {', '.join(SUFFIXES)}; put / at the end "
                "of a folder"
            )
        if output.is_dir():
            parser.error(f"argument -o: {output} is a folder; put / at its end for Parquet files")
        check_output(output, "-o", sidecars_of(output))
    table = _texts(options.text, options.files or ([] if options.text else ["-"]), options.column)
    encoder = _load(options)
    chosen: dict[str, Any] = {
        "prompt": options.prompt,
        "precision": options.precision,
        "truncation": options.truncation,
        "truncate_dim": options.truncate_dim,
        "normalize_embeddings": options.normalize,
    }
    width = encoder.bert.config.hidden_size
    width = min(options.truncate_dim or encoder.truncate_dim or width, width)
    if options.precision in ("binary", "ubinary"):
        width = -(-width // 8)
    suffix = ".jsonl" if output is None else form_of(output)
    check_rows(table, suffix, options.embedding_column, width)
    if output is not None:
        size = 4 if options.precision == "float32" else 1  # of a number; as text it has more
        check_room(output, len(table.texts) * width * size)
    embeddings = encoder.encode(
        table.texts,
        batch_size=options.batch_size,
        show_progress_bar=is_watched(sys.stderr) and len(table.texts) > 1,
        **chosen,
    )

    def write(path: Path) -> None:
        record = encoder.fingerprint(**chosen)
        write_table(path, table, embeddings, record.to_json(), options.embedding_column)

    try:
        if output is None:
            with standard_output() as file:
                write_jsonl(file, table, embeddings, options.embedding_column)
        else:
            write(output)
    except BrokenPipeError:
        raise
    except OSError as error:
        kept = _kept_elsewhere(write, suffix)
        told = f"{error.strerror}; {kept}"
        raise OSError(error.errno, told, error.filename or "standard output") from error


def _kept_elsewhere(write: Callable[[Path], object], suffix: str) -> str:
    """Write what took long to compute to where there is room, and say where that is."""
    try:
        folder = Path(tempfile.mkdtemp(prefix="minilm-"))
        try:
            write(folder / f"embeddings{suffix}")
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        return f"{tempfile.gettempdir()} has no room for the vectors either: {error.strerror}"
    return f"the vectors are kept in {folder / f'embeddings{suffix}'}"


_ENDS_OF_FOLDERS = ("/", "/.", os.sep, os.sep + ".")


def _means_folder(output: str) -> bool:
    path = Path(output)
    if is_stream(path) or path.name in SUFFIXES:
        return False
    return (
        output.endswith(_ENDS_OF_FOLDERS)
        or not path.suffix
        or (path.suffix not in SUFFIXES and path.is_dir())
    )


def _encode_files(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.files.streaming import encode_files
    from minilm.inference.kernels import keep_few_kernels

    if options.text or not options.files or "-" in options.files:
        parser.error("argument -o: a folder is written from files; name them")
    _folder(options.output, "-o", parser)
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
        show_progress_bar=is_watched(sys.stderr),
        **chosen,
    )
    tell(str(report))


def _texts(texts: Sequence[str], files: Sequence[str], column: str | None) -> Table:
    """Those of the command line, then those of the files."""
    table = Table()
    for text in texts:
        table.add(text, {column or DEFAULT_COLUMN: text})
    of_files = read_table(files, column)
    return Table(table.texts + of_files.texts, table.rows + of_files.rows)


def similarity(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print how alike texts are."""
    texts = _texts(options.texts, options.file, options.column).texts
    if len(texts) < 2:
        parser.error("argument TEXT: pass two or more texts, or -f FILE")
    encoder = _load(options)
    embeddings = encoder.encode(texts, convert_to_tensor=True)
    matrix = encoder.similarity(embeddings, embeddings).tolist()
    if options.json:
        _print_json({"texts": texts, "similarity": matrix})
    else:
        _show(_matrix(texts, matrix))


def mine(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print the most similar pairs."""
    from minilm.tasks import paraphrase_mining_embeddings

    texts, embeddings = _embedded(options)
    pairs = paraphrase_mining_embeddings(
        embeddings,
        max_pairs=options.max_pairs,
        top_k=options.top_k,
        show_progress_bar=is_watched(sys.stderr),
    )
    found = [(score, int(i), int(j)) for score, i, j in pairs]
    if options.json:
        _print_json(
            [{"score": s, "rows": [i, j], "texts": [texts[i], texts[j]]} for s, i, j in found]
        )
    else:
        _print_pairs((score, texts[i], texts[j]) for score, i, j in found)


def cluster(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print groups of similar texts."""
    from minilm.tasks import community_detection

    texts, embeddings = _embedded(options)
    groups = community_detection(
        embeddings,
        options.threshold,
        options.min_size,
        show_progress_bar=is_watched(sys.stderr),
    )
    if options.json:
        _print_json([{"rows": rows, "texts": [texts[row] for row in rows]} for rows in groups])
        return
    lines = []
    for rows in groups:
        lines += [f"{len(rows)} texts", *(f"  {_one_line(texts[row], 90)}" for row in rows)]
    if lines:
        _show("\n".join(lines))


def dedup(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print the texts that say the same as an earlier one, and write the others."""
    from minilm.tasks import near_duplicates

    output = _file(options.output, "-o", options, parser)
    if output is not None and form_of(output) not in ROW_SUFFIXES:
        parser.error(f"argument -o: {output} has no suffix of {', '.join(ROW_SUFFIXES)}")
    table = read_table(options.files or ["-"], options.column)
    if output is not None:
        check_rows(table, form_of(output))
    texts, embeddings = _embedded(options, table)
    found = near_duplicates(embeddings, options.threshold, show_progress_bar=is_watched(sys.stderr))
    if output is not None:
        gone = {each.row for each in found}
        stay = [row for row in range(len(texts)) if row not in gone]
        write_rows(output, Table([texts[row] for row in stay], [table.rows[row] for row in stay]))
    if _is_printed(output):
        pass
    elif options.json:
        _print_json(
            [each._asdict() | {"texts": [texts[each.row], texts[each.of]]} for each in found]
        )
    else:
        _print_pairs((each.score, texts[each.row], texts[each.of]) for each in found)
    written = "" if output is None else f"; {output}: the other {len(texts) - len(found)}"
    tell(f"{len(found)} of {len(texts)} texts say the same as an earlier one{written}")


def _embedded(options: argparse.Namespace, table: Table | None = None) -> tuple[list[str], Any]:
    """The texts of the files and their vectors."""
    texts = (table or read_table(options.files or ["-"], options.column)).texts
    encoder = _load(options)
    return texts, encoder.encode(texts, show_progress_bar=is_watched(sys.stderr) and len(texts) > 1)


def _print_pairs(pairs: Iterable[tuple[float, str, str]]) -> None:
    lines = [
        f"{score:7.4f}  {_one_line(a, 90)}\n{'':7}  {_one_line(b, 90)}" for score, a, b in pairs
    ]
    if lines:
        _show("\n".join(lines))


def _print_json(value: Any) -> None:
    _show(as_json(value, is_ascii=not is_utf8(sys.stdout)))


def index_build(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Make an index of texts."""
    from minilm.index.texts import build_index

    output = _folder(options.output, "-o", parser)
    if not output.parent.exists():
        raise InputError(f"{output}: there is no {output.parent} that it can be made in", "-o")
    table = read_table(options.files or ["-"], options.column)
    index = build_index(
        _load(options),
        output,
        table,
        column=options.column,
        prompt=options.prompt,
        truncation=options.truncation,
        codes=options.codes,
        show_progress_bar=is_watched(sys.stderr),
    )
    tell(f"{output}: {len(index):,} rows")


def index_add(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Add texts to one."""
    from minilm.index import Index
    from minilm.index.texts import add_to_index

    index = Index.open(options.index)
    table = read_table(options.files or ["-"], options.column)
    add_to_index(
        _load(options),
        index,
        table,
        prompt=options.prompt,
        truncation=options.truncation,
        show_progress_bar=is_watched(sys.stderr),
    )
    tell(f"{options.index}: {len(index):,} rows")


def index_search(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print what is nearest to queries."""
    from minilm.index import Index
    from minilm.index.texts import search_index, text_of

    index = Index.open(options.index)
    queries = _texts(options.queries, options.file, options.column).texts
    if not queries:
        parser.error("argument QUERY: pass a text, or -f FILE")
    results = search_index(
        _load(options),
        index,
        queries,
        options.top_k,
        prompt=options.prompt,
        precision=options.precision,
        rescore_multiplier=options.rescore_multiplier,
    )
    if options.json:
        _print_json([{"query": q, "hits": hits} for q, hits in zip(queries, results, strict=True)])
        return
    digits = len(str(len(index)))
    lines = []
    for query, hits in zip(queries, results, strict=True):
        if len(queries) > 1:
            lines.append(_one_line(query, 90))
        for hit in hits:
            text = _one_line(text_of(hit["row"], index.column), 90)
            lines.append(f"{hit['score']:7.4f}  {hit['corpus_id']:>{digits}}  {text}")
    if lines:
        _show("\n".join(lines))


def index_check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compare every file of an index with its hash, and embed some of the texts again."""
    from minilm.index import Index
    from minilm.index.texts import check_index

    index = Index.open(options.index)
    result = check_index(_load(options), index, options.sample)
    tell(f"{options.index}: {len(index):,} rows; every file is as it was written")
    if result is None:
        return 0
    _show(json.dumps(result.to_dict(), indent=2) if options.json else result.table())
    return 0 if result.is_compatible else 1


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Say whether vectors are this model's."""
    from minilm.files.records import read_fingerprint
    from minilm.parity.check import check_vectors

    if options.file.is_dir():
        return _check_folder(options, parser)
    texts = None if options.texts is None else read_texts(options.texts, options.column)
    foreign = read_vectors(options.file, texts, column=options.column, argument="FILE")
    recorded = read_fingerprint(options.file)
    result = check_vectors(
        _load(options), foreign.texts, foreign.vectors, recorded, sample=options.sample
    )
    _show(json.dumps(result.to_dict(), indent=2) if options.json else result.table())
    return 0 if result.is_compatible else 1


def _check_folder(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    from minilm.parity.check_folder import check_folder

    if options.texts is not None:
        parser.error("argument --texts: a folder has its texts in it")
    found = check_folder(_load(options), options.file, column=options.column, sample=options.sample)
    _show(json.dumps(found.to_dict(), indent=2) if options.json else found.table())
    return 0 if found.is_compatible else 1


def explain(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print a similarity, word by word."""
    png, page = (
        _file(name, argument, options, parser)
        for name, argument in ((options.png, "--png"), (options.html, "--html"))
    )
    if png is not None and png == page:
        parser.error("argument --html: is the file of --png too; choose another name")
    encoder = _load(options)
    explanation = encoder.explain(
        options.a, options.b, by=options.by, dtype=options.dtype or "float64"
    )
    title = " / ".join(_one_line(text) or '""' for text in explanation.texts)
    if png is not None:
        write_output(png, explanation.to_png)
    if page is not None:
        head = f'<!doctype html>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        contents = f"{head}{explanation.to_html()}\n".encode()
        write_output(page, lambda file: file.write(contents))
    if _is_printed(png) or _is_printed(page):
        return
    if options.json:
        _print_json(explanation.to_dict())
        return
    table = explanation.table()
    if _in_colour():
        title = f"\033[1m{title}\033[0m"
        # Blue adds, yellow takes away, as in the picture.
        table = re.sub(r"\+\d\.\d{4}", "\033[34m\\g<0>\033[0m", table)
        table = re.sub(r"-\d\.\d{4}", "\033[33m\\g<0>\033[0m", table)
    _show(title)
    _show(table)


def tour(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the page."""
    from minilm.interpret.tour import tour

    output = _file(options.output, "-o", options, parser)
    assert output is not None
    page = tour(_load(options), options.a, options.b).encode()
    write_output(output, lambda file: file.write(page))
    tell(f"{output}: {len(page) / 1e6:.1f} MB; open it in a browser")


def _in_colour() -> bool:
    """Whether the output is a terminal whose user has not asked for none (no-color.org)."""
    return (
        is_watched(sys.stdout)
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb"
    )


def info(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print the sizes, and where the weights came from."""
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
        _show(json.dumps(rows | {"fingerprint": encoder.fingerprint().to_dict()}, indent=2))
        return
    _show(str(encoder))
    _show("\n".join(f"{name + ':':<13}{value}" for name, value in rows.items()))


def parity(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compare with another implementation, or write golden values."""
    if (options.against is None) == (options.golden is None):
        parser.error("parity: pass one of --against FILE and --golden FOLDER")
    if options.against_stages is not None and options.golden is None:
        parser.error("argument --against-stages: goes with --golden FOLDER")
    for name in ("texts", "column"):
        if getattr(options, name) is not None and options.against is None:
            parser.error(f"argument --{name}: goes with --against FILE")
    if options.against is not None:
        return _parity_against(options)
    from minilm.parity.golden import compare_stages_file, write_golden

    if options.against_stages is not None:
        report = compare_stages_file(options.golden, options.against_stages)
        _show(json.dumps(report.to_dict(), indent=2) if options.json else report.table())
        return 0 if report.passed else 1
    folder = _folder(str(options.golden), "--golden", parser)
    written = write_golden(_load(options), folder)
    sizes = {str(path): path.stat().st_size for path in written}
    if options.json:
        _show(json.dumps(sizes, indent=2))
    else:
        _show("\n".join(f"{size / 1e6:6.1f} MB  {name}" for name, size in sizes.items()))
    return 0


def _parity_against(options: argparse.Namespace) -> int:
    from minilm.parity.causes import diagnose
    from minilm.parity.golden import TEXTS

    file: Path = options.against
    texts = None if options.texts is None else read_texts(options.texts, options.column)
    golden = [each.text for each in TEXTS]
    if file.suffix.lower() == ".onnx":
        encoder = _load(options)
        foreign = run_onnx(file, encoder, texts or golden)
    else:
        # Before the model is loaded: an error of the file comes at once.
        foreign = read_vectors(file, texts, default=golden, column=options.column)
        encoder = _load(options)
    diagnosis = diagnose(encoder, foreign.texts, foreign.vectors)
    _show(json.dumps(diagnosis.to_dict(), indent=2) if options.json else diagnosis.table())
    return 0 if diagnosis.is_equal else 1


def download(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Put the published files into a folder."""
    if options.output in ("", "-"):
        parser.error("argument -o: the files go into a folder; name one")
    hub.download(options.output, report=tell)


def _file(
    name: str | None, argument: str, options: argparse.Namespace, parser: argparse.ArgumentParser
) -> Path | None:
    """The file of an argument, once it is known that it can be written; - is standard output."""
    if name is None:
        return None
    if not name or name.endswith(_ENDS_OF_FOLDERS):
        parser.error(f"argument {argument}: {name!r} is not the name of a file")
    path = Path("/dev/stdout" if name == "-" else name)
    if _is_printed(path) and getattr(options, "json", False):
        parser.error(f"argument {argument}: standard output has what --json prints; name a file")
    check_output(path, argument)
    return path


def _folder(name: str, argument: str, parser: argparse.ArgumentParser) -> Path:
    """The folder of an argument, once it is known that it can be written into."""
    if name in ("", "-"):
        parser.error(f"argument {argument}: {name!r} is not the name of a folder")
    check_folder(Path(name), argument)
    return Path(name)


def _is_printed(output: Path | None) -> bool:
    """Whether what is written takes the place of what would be printed."""
    return output is not None and is_standard_output(output)


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


def _weights_hash(source: ModelFiles) -> tuple[str, str]:
    name = next(name for name in source.sha256 if name.endswith("model.safetensors"))
    actual = source.sha256[name]
    published = actual == hub.SHA256["model.safetensors"]
    return actual, "the published all-MiniLM-L6-v2" if published else "not a model that we know"


def _show(text: str) -> None:
    with standard_output() as file:
        print(text, file=file)

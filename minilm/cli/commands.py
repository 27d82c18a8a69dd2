"""What each command does, once `parser.py` has read its line: it calls the library, and prints.

A function that is named after a command takes the options, and the parser for errors that only it
can find in them; it returns the exit code, or None for 0. All else is in the library, so that
Python users have it too.
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

from minilm.disk import with_home
from minilm.errors import InputError, MinilmError
from minilm.files.rows import DEFAULT_COLUMN, as_json
from minilm.files.tables import (
    ROW_SUFFIXES,
    SUFFIXES,
    Table,
    check_rows,
    form_of,
    is_utf8,
    read_table,
    reading_line,
    sidecars_of,
    write_jsonl,
    write_rows,
    write_table,
)  # fmt: skip
from minilm.outputs import (
    check_folder,
    check_output,
    check_room,
    is_standard_output,
    is_stream,
    write_output,
)  # fmt: skip
from minilm.parity.foreign import read_texts, read_vectors, run_onnx
from minilm.pretrained import hub
from minilm.report import shortened
from minilm.streams import is_watched, standard_output, tell
from minilm.version import __version__

if TYPE_CHECKING:
    from minilm.encoder import SentenceEncoder


def encode(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the vectors of texts."""
    from minilm.quantize import stored_bytes, stored_width

    output = None if options.output in (None, "-") else with_home(options.output)
    if output is not None and _means_folder(options.output, output):
        _encode_files(options, parser)
        return
    for name in ("shard_rows", "row_number", "on_bad_row", "workers", "overwrite"):
        if getattr(options, name):
            parser.error(f"argument --{name.replace('_', '-')}: goes with -o FOLDER")
    if options.precision == "float16":
        parser.error("argument --precision: float16 goes with -o FOLDER")
    if output is not None:
        _check_suffix(output, form_of(output), parser)
        if output.is_dir():
            parser.error(f"argument -o: {output} is a folder; put / at its end for Parquet files")
        check_output(output, "-o", sidecars_of(output))
    table = _texts(options.text, options.files or ([] if options.text else ["-"]), options.column)
    encoder = _load(options)
    width = encoder.bert.config.hidden_size
    width = min(options.truncate_dim or encoder.truncate_dim or width, width)
    suffix = ".jsonl" if output is None else form_of(output)
    stored = stored_width(width, options.precision)
    check_rows(table, suffix, options.embedding_column, stored)
    if output is not None:  # as text, numbers take more
        check_room(output, len(table.texts) * stored_bytes(width, options.precision))
    embeddings = encoder.encode(
        table.texts,
        batch_size=options.batch_size,
        show_progress_bar=is_watched(sys.stderr) and len(table.texts) > 1,
        **_call(options),
    )

    def write(path: Path) -> None:
        record = encoder.fingerprint(**_call(options))
        write_table(path, table, embeddings, record.to_json(), options.embedding_column)

    try:
        if output is None:
            with standard_output() as file:
                write_jsonl(file, table, embeddings, options.embedding_column)
        else:
            write(output)
            if not is_stream(output):
                tell(f"read it by {reading_line(output)}")
    except BrokenPipeError:
        raise
    except OSError as error:
        reason = f"{error.strerror}; {_write_elsewhere(write, suffix)}"
        raise OSError(error.errno, reason, error.filename or "standard output") from error
    except Exception as error:
        # The form can't hold something that nobody thought of; .npy holds the vectors alone.
        reason = f"{error}; {_write_elsewhere(write, '.npy')}"
        raise MinilmError(f"{output or 'standard output'}: {reason}") from error


def _call(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `encode` that say which vectors a text gets."""
    return {
        "prompt": options.prompt,
        "precision": options.precision,
        "truncation": options.truncation,
        "truncate_dim": options.truncate_dim,
        "normalize_embeddings": options.normalize,
    }


def _write_elsewhere(write: Callable[[Path], object], suffix: str) -> str:
    """Write what took long to compute to a temporary folder, and say where that is."""
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


def _means_folder(name: str, path: Path) -> bool:
    if is_stream(path) or path.name in SUFFIXES:
        return False
    is_file = path.suffix in SUFFIXES or (path.suffix and not path.is_dir())
    return name.endswith(_ENDS_OF_FOLDERS) or not is_file


def _check_suffix(output: Path, suffix: str, parser: argparse.ArgumentParser) -> None:
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        parser.error(
            f"argument -o: {output} has no suffix of {known}; put / at the end of a folder"
        )


def _encode_files(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    from minilm.files.streaming import encode_files
    from minilm.inference.kernels import keep_few_kernels

    if options.text or not options.files or "-" in options.files:
        parser.error("argument -o: a folder is written from files; name them")
    folder = _folder(options.output, "-o", parser)
    keep_few_kernels()
    names = ("shard_rows", "row_number", "on_bad_row", "workers")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    report = encode_files(
        _load(options),
        options.files,
        folder,
        column=options.column,
        embedding_column=options.embedding_column,
        batch_size=options.batch_size,
        overwrite=options.overwrite,
        show_progress_bar=is_watched(sys.stderr),
        **_call(options),
        **given,
    )
    tell(str(report))
    tell(f"read it by {reading_line(folder)}")


def _table(options: argparse.Namespace) -> Table:
    return read_table(options.files or ["-"], options.column)


def _texts(texts: Sequence[str], files: Sequence[str], column: str | None) -> Table:
    """The texts of the command line, then those of the files."""
    table = read_table(files, column)
    rows: list[dict[str, Any]] = [{column or DEFAULT_COLUMN: text} for text in texts]
    return Table([*texts, *table.texts], rows + table.rows)


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
        rows = [{"score": s, "rows": [i, j], "texts": [texts[i], texts[j]]} for s, i, j in found]
        _print_json(rows)
    else:
        _print_pairs((score, texts[i], texts[j]) for score, i, j in found)


def cluster(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print groups of similar texts."""
    from minilm.tasks import community_detection

    texts, embeddings = _embedded(options)
    groups = community_detection(
        embeddings, options.threshold, options.min_size, show_progress_bar=is_watched(sys.stderr)
    )
    if options.json:
        _print_json([{"rows": rows, "texts": [texts[row] for row in rows]} for rows in groups])
        return
    lines: list[str] = []
    for rows in groups:
        lines += [f"{len(rows)} texts", *(f"  {_one_line(texts[row], 90)}" for row in rows)]
    _show(*lines)


def dedup(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print the texts that say the same as an earlier one, and write the others."""
    from minilm.tasks import near_duplicates

    output = _file(options.output, "-o", options, parser)
    if output is not None and form_of(output) not in ROW_SUFFIXES:
        parser.error(f"argument -o: {output} has no suffix of {', '.join(ROW_SUFFIXES)}")
    table = _table(options)
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
    texts = (table or _table(options)).texts
    encoder = _load(options)
    return texts, encoder.encode(texts, show_progress_bar=is_watched(sys.stderr) and len(texts) > 1)


def _print_pairs(pairs: Iterable[tuple[float, str, str]]) -> None:
    _show(
        *(f"{score:7.4f}  {_one_line(a, 90)}\n{'':7}  {_one_line(b, 90)}" for score, a, b in pairs)
    )


def _print_json(value: Any) -> None:
    _show(as_json(value, is_ascii=not is_utf8(sys.stdout)))


def index_build(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Make an index of texts."""
    from minilm.index.texts import build_index

    output = _folder(options.output, "-o", parser)
    if not output.parent.exists():
        raise InputError(f"{output}: there is no {output.parent} that it can be made in", "-o")
    if options.from_vectors is not None:
        from minilm.index.exchange import index_of_vectors

        index = index_of_vectors(
            output,
            options.from_vectors,
            _load(options).fingerprint(),
            table=_table(options) if options.files else None,
            column=options.column,
            codes=options.codes,
        )
    else:
        table, encoder = _table(options), _load(options)
        index = build_index(
            encoder,
            output,
            table,
            column=options.column,
            codes=options.codes,
            **_for_index(options),
        )
    tell(f"{output}: {len(index):,} rows")


def _for_index(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that are the same for a new index and for more texts in one."""
    return {
        "prompt": options.prompt,
        "truncation": options.truncation,
        "show_progress_bar": is_watched(sys.stderr),
    }


def index_export(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the rows and vectors of an index as encode writes them."""
    from minilm.index import Index
    from minilm.index.exchange import export_index

    output = with_home(options.output)
    if is_stream(output) or options.output in ("", "-"):
        parser.error(f"argument -o: {options.output!r} is not the name of a file or folder")
    if not _means_folder(options.output, output):
        _check_suffix(output, output.suffix, parser)
    export_index(Index.open(options.index), output, embedding_column=options.embedding_column)
    tell(f"read it by {reading_line(output)}")


def index_add(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Add texts to an index."""
    from minilm.index import Index
    from minilm.index.texts import add_to_index

    index = Index.open(options.index)
    table = _table(options)
    add_to_index(_load(options), index, table, **_for_index(options))
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
    _show(*lines)


def index_check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compare every file of an index with its hash, and embed some of the texts again."""
    from minilm.index import Index
    from minilm.index.texts import check_index

    index = Index.open(options.index)
    result = check_index(_load(options), index, options.sample)
    tell(f"{options.index}: {len(index):,} rows; every file is as it was written")
    if result is None:
        return 0
    return _show_finding(result, result.is_compatible, options)


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Say whether vectors are this model's."""
    from minilm.files.records import read_fingerprint
    from minilm.parity.check import check_vectors

    if options.file.is_dir():
        from minilm.parity.check_folder import check_folder

        if options.texts is not None:
            parser.error("argument --texts: a folder has its texts in it")
        found = check_folder(
            _load(options), options.file, column=options.column, sample=options.sample
        )
        return _show_finding(found, found.is_compatible, options)
    texts = None if options.texts is None else read_texts(options.texts, options.column)
    foreign = read_vectors(options.file, texts, column=options.column, argument="FILE")
    recorded = read_fingerprint(options.file)
    result = check_vectors(
        _load(options), foreign.texts, foreign.vectors, recorded, sample=options.sample
    )
    return _show_finding(result, result.is_compatible, options)


def explain(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print a similarity, word by word."""
    png = _file(options.png, "--png", options, parser)
    page = _file(options.html, "--html", options, parser)
    if png is not None and png == page:
        parser.error("argument --html: is the file of --png too; choose another name")
    encoder = _load(options)
    dtype = encoder.dtype if options.dtype else "float64"
    explanation = encoder.explain(options.a, options.b, by=options.by, dtype=dtype)
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
    _show(title, table)


def tour(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Write the page about two texts."""
    from minilm.interpret.tour import tour

    output = _file(options.output, "-o", options, parser)
    assert output is not None
    page = tour(_load(options), options.a, options.b).encode()
    write_output(output, lambda file: file.write(page))
    tell(f"{output}: {len(page) / 1e6:.1f} MB; open it in a browser")


def _in_colour() -> bool:
    """Whether the output is a terminal, and nobody asked for no colours (no-color.org)."""
    refused = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return is_watched(sys.stdout) and not refused


def info(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Print a model's sizes, and where its weights came from."""
    import torch

    from minilm.pretrained.fingerprint import computed_in

    encoder = _load(options)
    source = encoder.source
    assert source is not None
    weights = next(v for name, v in source.sha256.items() if name.endswith("model.safetensors"))
    published = weights == hub.SHA256["model.safetensors"]
    verified = "the published all-MiniLM-L6-v2" if published else "not a model that we know"
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
        "computes in": f"{computed_in(encoder)} on {encoder.device}",
        "versions": f"minilm {__version__}, torch {torch.__version__}",
    }
    if options.json:
        _show(json.dumps(rows | {"fingerprint": encoder.fingerprint().to_dict()}, indent=2))
        return
    _show(str(encoder), *(f"{name + ':':<13}{value}" for name, value in rows.items()))


def parity(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compare with another implementation, or write golden values."""
    if options.against_ids is not None:
        if options.against is not None or options.golden is not None or options.digest:
            parser.error("argument --against-ids: goes with none of --against, --golden, --digest")
        return _parity_against_ids(options)
    if [options.against is None, options.golden is None, not options.digest].count(False) != 1:
        parser.error("parity: pass one of --against FILE, --golden FOLDER and --digest")
    if options.against_stages is not None and options.golden is None:
        parser.error("argument --against-stages: goes with --golden FOLDER")
    for name in ("texts", "column"):
        if getattr(options, name) is not None and options.against is None:
            parser.error(f"argument --{name}: goes with --against FILE")
    if options.against is not None:
        return _parity_against(options)
    if options.digest:
        from minilm.parity.digest import digest

        found = digest(_load(options))
        return _show_finding(found, found.is_equal, options)
    from minilm.parity.golden import compare_stages_file, write_golden

    if options.against_stages is not None:
        report = compare_stages_file(options.golden, options.against_stages)
        return _show_finding(report, report.passed, options)
    folder = _folder(str(options.golden), "--golden", parser)
    written = write_golden(_load(options), folder)
    sizes = {str(path): path.stat().st_size for path in written}
    if options.json:
        _show(json.dumps(sizes, indent=2))
    else:
        _show(*(f"{size / 1e6:6.1f} MB  {name}" for name, size in sizes.items()))
    return 0


def _parity_against(options: argparse.Namespace) -> int:
    from minilm.parity.causes import diagnose
    from minilm.parity.check import check_vectors
    from minilm.parity.golden import TEXTS
    from minilm.quantize import precision_of_bits

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
    if precision_of_bits(foreign.vectors, encoder.bert.config.hidden_size):
        # Why they differ, bits don't tell.
        count = len(foreign.texts)
        result = check_vectors(encoder, foreign.texts, foreign.vectors, sample=count)
        return _show_finding(result, result.is_compatible, options)
    diagnosis = diagnose(
        encoder, foreign.texts, foreign.vectors, show_progress_bar=is_watched(sys.stderr)
    )
    return _show_finding(diagnosis, diagnosis.is_equal, options)


def _parity_against_ids(options: argparse.Namespace) -> int:
    from minilm.parity.golden import TEXTS
    from minilm.parity.ids import compare_ids, read_ids

    own, ids = read_ids(options.against_ids)
    texts = None if options.texts is None else read_texts(options.texts, options.column)
    if own is not None and texts is not None:
        raise InputError(
            f"{options.against_ids}: has texts of its own; leave --texts out", "--texts"
        )
    known = own or texts or [each.text for each in TEXTS]
    if len(known) != len(ids):
        raise InputError(
            f"{options.against_ids}: holds ids of {len(ids)} texts, but there are {len(known)}; "
            "pass --texts FILE",
            "--against-ids",
        )
    report = compare_ids(_load(options), known, ids)
    return _show_finding(report, report.is_equal, options)


def _show_finding(finding: Any, is_good: bool, options: argparse.Namespace) -> int:
    _show(json.dumps(finding.to_dict(), indent=2) if options.json else finding.table())
    return 0 if is_good else 1


def verify(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Compare the files of a model with what they should be."""
    files, states = hub.verify(options.model)
    damaged = sum(state.state == "damaged" for state in states)
    if options.json:
        rows = [state._asdict() for state in states]
        _show(json.dumps({"model": files.location, "damaged": damaged, "files": rows}, indent=2))
    else:
        width = max(len(state.name) for state in states) if states else 0
        _show(files.location, *(f"{n:<{width}}  {state}: {text}" for n, state, text in states))
    return 1 if damaged or not states else 0


def download(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Put the published files into a folder."""
    if options.output in ("", "-"):
        parser.error("argument -o: the files go into a folder; name one")
    hub.download(options.output, report=tell)


def _file(
    name: str | None, argument: str, options: argparse.Namespace, parser: argparse.ArgumentParser
) -> Path | None:
    """The file of an argument, which must be writable; - is standard output."""
    if name is None:
        return None
    if not name or name.endswith(_ENDS_OF_FOLDERS):
        parser.error(f"argument {argument}: {name!r} is not the name of a file")
    path = with_home("/dev/stdout" if name == "-" else name)
    if _is_printed(path) and getattr(options, "json", False):
        parser.error(f"argument {argument}: standard output has what --json prints; name a file")
    check_output(path, argument)
    return path


def _folder(name: str, argument: str, parser: argparse.ArgumentParser) -> Path:
    """The folder of an argument, which must be writable."""
    if name in ("", "-"):
        parser.error(f"argument {argument}: {name!r} is not the name of a folder")
    folder = with_home(name)
    check_folder(folder, argument)
    return folder


def _is_printed(output: Path | None) -> bool:
    """Whether what is written takes the place of what would be printed."""
    return output is not None and is_standard_output(output)


def _load(options: argparse.Namespace) -> "SentenceEncoder":
    import torch

    from minilm.encoder import SentenceEncoder

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return SentenceEncoder.from_pretrained(
        options.model,
        dtype=options.dtype,
        reproducible=options.reproducible,
        device=options.device,
    )


def _matrix(texts: list[str], rows: list[list[float]]) -> str:
    """A table with numbered rows, and columns of the same numbers."""
    digits = len(str(len(texts)))
    header = " " * digits + "".join(f"{number:>9}" for number in range(1, len(texts) + 1))
    lines = [
        f"{number:>{digits}}" + "".join(f"{value:9.4f}" for value in row) + f"  {_one_line(text)}"
        for number, (text, row) in enumerate(zip(texts, rows, strict=True), 1)
    ]
    return "\n".join([header, *lines])


def _one_line(text: str, width: int = 60) -> str:
    return shortened(" ".join(text.split()), width)


def _show(*lines: str) -> None:
    """Print lines; without any, nothing."""
    with standard_output() as file:
        file.writelines(f"{line}\n" for line in lines)

"""The package as a whole: what it imports, exports and installs."""

import ast
import graphlib
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import minilm
from conftest import ROOT
from minilm.errors import MissingPackageError

PACKAGE = ROOT / "minilm"

# Which wings a wing may import, beside the files at the top of the package; the first few of those
# know no wing at all.
WINGS: dict[str, set[str]] = {
    "tasks": set(),
    "inference": set(),
    "pretrained": {"inference"},
    "interpret": {"inference", "pretrained"},
    "files": {"inference", "pretrained"},
    "parity": {"inference", "pretrained", "interpret", "files"},
    "index": {"inference", "pretrained", "files", "parity", "tasks"},
    "adapters": {"inference", "pretrained", "files"},
    "cli": {"inference", "pretrained", "interpret", "files", "parity", "tasks", "index"},
}
TOP = {"__main__": {"cli"}, "util": {"tasks"}, "encoder": {"inference", "pretrained", "interpret"}}
WITHOUT_ENCODER = {"tasks", "inference", "pretrained", "interpret"}


def imported(path: Path, with_types: bool = False) -> set[str]:
    """Every module that a file imports, wherever the statement stands; by default when it runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for_types = {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
    }
    for node in ast.walk(tree):
        if node in for_types and not with_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path.name} has a relative import, which this can't follow")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minilm":
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT.anchor,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def name_of(path: Path) -> str:
    """`inputs`, `tasks.search`; a folder's `__init__` has the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
NAMES = {name_of(path) for path in FILES}


def inner_imports(path: Path) -> set[str]:
    """The files of the package that a file imports, also those for types only."""
    found = (name for name in imported(path, with_types=True) if name.startswith("minilm."))
    names = {name.removeprefix("minilm.") for name in found}
    return {name if name in NAMES else name.rpartition(".")[0] for name in names}


def wing_of(name: str) -> str:
    return name.split(".")[0] if name.split(".")[0] in WINGS else ""


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    name = name_of(path)
    wing = wing_of(name)
    allowed = WINGS[wing] | {wing, ""} if wing else TOP.get(name, set()) | {""}
    imports = inner_imports(path)
    assert {wing_of(other) for other in imports} <= allowed
    assert wing not in WITHOUT_ENCODER or "encoder" not in imports
    assert "" not in imports, "the version is in version.py, and all else has a home too"


def test_no_import_circle() -> None:
    graph = {name_of(path): inner_imports(path) for path in FILES}
    assert list(graphlib.TopologicalSorter(graph).static_order())


def test_architecture_imports_torch_and_config_only() -> None:
    allowed = {"math", "collections.abc", "functools", "torch", "torch.nn.functional"}
    assert imported(PACKAGE / "bert.py") <= allowed | {"minilm.config.BertConfig"}
    assert imported(PACKAGE / "pooling.py") <= allowed


def test_encoder_stays_readable() -> None:
    lines = (PACKAGE / "encoder.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 400


def test_only_runtime_packages_are_imported() -> None:
    allowed = {"minilm", "torch", "safetensors", "tokenizers", "huggingface_hub", "numpy", "tqdm"}
    allowed |= {"filelock", "jinja2"} | set(sys.stdlib_module_names)
    optional = {"matplotlib", "onnxruntime", "pyarrow"}  # each an extra; imported where it is used
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "adapters":
            continue
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots <= allowed | optional, f"{path.name} imports {roots - allowed - optional}"
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            words = ast.unparse(statement).replace(".", " ").split()
            if isinstance(statement, ast.Import | ast.ImportFrom):
                assert not optional & set(words[1:2]), f"{path.name}: {ast.unparse(statement)}"


FRAMEWORKS = {
    "bertopic": {"bertopic"},
    "chroma": {"chromadb"},
    "keybert": {"keybert"},
    "langchain": {"langchain_core"},
    "mteb": {"mteb"},
    "ray": {"ray", "pyarrow"},  # whose data is Arrow's
    "sklearn": {"sklearn", "scipy"},  # whose matrices it takes
}


@pytest.mark.parametrize("path", sorted((PACKAGE / "adapters").glob("*.py")), ids=name_of)
def test_an_adapter_imports_its_own_framework_only(path: Path) -> None:
    allowed = {"minilm", "torch", "numpy"} | set(sys.stdlib_module_names)
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots - allowed <= FRAMEWORKS.get(path.stem, set())


def test_public_names_are_those_of_all() -> None:
    for name in minilm.__all__:
        assert getattr(minilm, name) is not None
    missing = {name for name in minilm._NEEDS if not hasattr(minilm, name)}
    assert set(minilm.__all__) == set(minilm._HOMES) - missing | {"__version__"}
    assert set(minilm.__all__) <= set(dir(minilm))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        minilm.nonsense  # noqa: B018


@pytest.mark.process
def test_names_whose_package_is_missing_are_not_there() -> None:
    code = """
import inspect, pydoc, sys
sys.modules["sklearn"] = None
import minilm
from minilm import *
assert SentenceEncoder and "MiniLMVectorizer" not in globals()
assert not hasattr(minilm, "MiniLMVectorizer") and "MiniLMVectorizer" not in dir(minilm)
assert all(hasattr(minilm, name) for name in dir(minilm))
assert "SentenceEncoder" in dict(inspect.getmembers(minilm))
assert "SentenceEncoder" in pydoc.render_doc(minilm)
try:
    minilm.MiniLMVectorizer
except AttributeError as error:
    print(error)
try:
    from minilm import MiniLMVectorizer
except ImportError as error:
    print(error)
"""
    hint = 'minilm.adapters.sklearn needs scikit-learn: pip install "minilm[sklearn]"'
    assert run_python(code).splitlines() == [hint, hint]


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "__main__"], ids=name_of)
def test_module_all_is_true(path: Path) -> None:
    # Skips without the framework, whose own warnings at import are not ours: UMAP's, in BERTopic.
    module = pytest.importorskip(f"minilm.{name_of(path)}", exc_type=MissingPackageError)
    for name in getattr(module, "__all__", []):
        assert hasattr(module, name)


@pytest.mark.process
def test_import_and_help_load_no_torch() -> None:
    code = """
import sys, minilm, minilm.cli.parser
try:
    minilm.cli.parser.main(["--help"])
except SystemExit as exit:
    assert exit.code == 0
heavy = {"torch", "numpy", "tokenizers", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
    assert "usage: minilm" in run_python(code)


@pytest.mark.process
def test_foreign_libraries_never_enter(published: Path) -> None:
    code = f"""
import sys, importlib, pathlib, minilm
root = pathlib.Path(minilm.__file__).parent
for path in root.rglob("*.py"):
    if path.stem != "__main__" and path.parent.name != "adapters":
        importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts))
from minilm import SentenceEncoder, cli
encoder = SentenceEncoder.from_pretrained({str(published)!r}, device="cpu")
embeddings = encoder.encode(["one", "two"], show_progress_bar=True)
encoder.similarity(embeddings, embeddings)
assert cli.main(["similarity", "a", "b", "--model", {str(published)!r}]) == 0
foreign = {{"transformers", "sentence_transformers", "scipy", "sklearn"}} & set(sys.modules)
assert not foreign, foreign
"""
    run_python(code)


@pytest.mark.process
def test_bare_checkout_knows_its_version() -> None:
    out = run_python("import minilm; print(minilm.__version__, minilm.__file__)")
    assert out.split()[0] == minilm.__version__


@pytest.mark.process
def test_loading_from_a_folder_does_not_import_the_hub_library(published: Path) -> None:
    code = f"""
import sys
from minilm import SentenceEncoder
SentenceEncoder.from_pretrained({str(published)!r}, device="cpu").encode("text")
assert "huggingface_hub" not in sys.modules
"""
    run_python(code)


@pytest.mark.process
def test_logger_is_silent_by_default() -> None:
    code = "import minilm, logging; print(logging.getLogger('minilm').handlers)"
    assert "NullHandler" in run_python(code)


@pytest.mark.process
def test_wheel_works_in_a_fresh_environment(published: Path, tmp_path: Path) -> None:
    source = tmp_path / "source with blanks"
    source.mkdir()
    for name in ("minilm", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("minilm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(names)
    assert "minilm/interpret/templates/steps/text.html" in names
    assert {name.split("/")[0] for name in names} == {
        "minilm",
        f"minilm-{minilm.__version__}.dist-info",
    }

    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    paths = sysconfig.get_paths(vars={"base": str(environment), "platbase": str(environment)})
    site = Path(paths["purelib"])
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
         "--no-index", str(wheel)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    # Its dependencies are lent from this environment, behind its own packages.
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    code = f"""
import minilm, sys
assert minilm.__file__.startswith({str(environment)!r}), minilm.__file__
encoder = minilm.SentenceEncoder.from_pretrained({str(published)!r}, device="cpu")
print(encoder.encode(["a text"]).shape)
"""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, check=False, env=clean,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 384)"
    command = [str(scripts / "minilm"), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=clean)
    assert done.stdout.strip() == f"minilm {minilm.__version__}"


# Functions of torch that make a tensor on the device of `torch.set_default_device`; of the first,
# one of numbers has the dtype of `torch.set_default_dtype` too.
WITH_DTYPE = {"tensor", "zeros", "ones", "empty", "full", "eye", "rand", "randn", "linspace"}
WITH_DEVICE = WITH_DTYPE | {"arange", "as_tensor", "asarray", "randint", "randperm"}


def test_new_tensors_say_where_they_are_and_of_what() -> None:
    """What another program has set for itself is none of ours."""
    silent = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            function = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            name = function.removeprefix("torch.")
            if function == name or not isinstance(node, ast.Call) or name not in WITH_DEVICE:
                continue
            given = {keyword.arg for keyword in node.keywords}
            needed = {"device", "dtype"} if name in WITH_DTYPE else {"device"}
            if None not in given and not needed <= given:  # None is `**options`
                silent.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert silent == []

"""Make the virtual environments that `demo`, `test`, `test_adapter` and `test_tools` run in.

Standard library only, so that it works before anything is installed. Safe to repeat: what was
installed is remembered, and a second call with the same requirements does nothing.
"""

from __future__ import annotations  # so that an older Python gets as far as our message

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"


def prepare(extra: str = "", folder: Path = FOLDER) -> Path:
    """Install this checkout, editable, into a virtual environment of its own.

    Args:
        extra: An extra of pyproject.toml, or several with commas between them; "" for the runtime
            packages alone.
        folder: Where the environment is.

    Returns:
        The environment's Python.
    """
    if sys.version_info < (3, 11):  # noqa: UP036  # whatever Python the user started
        sys.exit(f"minilm needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamps = folder / "minilm-stamps"
    complete = stamps / "complete"
    if not complete.is_file():  # also where an earlier run was interrupted
        print(f"making the environment {folder}", flush=True)
        try:
            venv.create(folder, with_pip=True, clear=True)
        except subprocess.CalledProcessError as error:
            sys.exit(f"making it failed: {error}\nOn Debian and Ubuntu: apt install python3-venv")
        stamps.mkdir()
        complete.touch()
    # What is in test is a superset of what is in "".
    wanted = [extra] if extra else ["", "test"]
    if not any((stamps / _stamp(name)).is_file() for name in wanted):
        _install(python, extra)
        (stamps / _stamp(extra)).touch()
    return python


def run(*command: str | Path, **variables: str) -> None:
    """Run a command in the checkout, with these environment variables besides those there are;
    exit with its status if it fails.
    """
    status = subprocess.run(
        [str(word) for word in command], cwd=ROOT, check=False, env=os.environ | variables
    ).returncode
    if status:
        sys.exit(status)


def _stamp(extra: str) -> str:
    requirements = (ROOT / "pyproject.toml").read_bytes() + CONSTRAINTS.read_bytes()
    checked = requirements + sys.version.encode() + str(ROOT).encode()
    return f"{extra or 'runtime'}-{hashlib.sha256(checked).hexdigest()[:16]}"


def _install(python: Path, extra: str) -> None:
    target = f".[{extra}]" if extra else "."
    print(f"installing {target} (some minutes the first time)", flush=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pinned = [*pip, "--constraint", str(CONSTRAINTS)]
    # torch first: other packages ask for any torch, and pip might take a larger build for them.
    for packages in (["torch"], ["--editable", target]):
        if subprocess.run([*pinned, *packages], cwd=ROOT, check=False).returncode:
            print(
                "the versions in scripts/constraints.txt can't be installed here (see above); "
                "installing what pip finds instead",
                flush=True,
            )
            run(*pip, "--editable", target)
            return

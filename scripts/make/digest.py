"""Choose the texts of `minilm parity --digest`, and pin their hashes.

    python scripts/make/digest.py [--check]

Writes minilm/parity/digest.json, by the rule in `minilm.parity.digest.choose`, and the one number
into README.md: to be run again when the golden texts change. --check writes nothing, and exits with
1 if the file is another one. Needs the published weights.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # a bare checkout is enough

from minilm import SentenceEncoder  # noqa: E402
from minilm.parity.digest import choose  # noqa: E402
from minilm.parity.golden_texts import TEXTS  # noqa: E402

README = ROOT / "README.md"
FILE = ROOT / "minilm" / "parity" / "digest.json"


def main() -> int:
    """Write the file, and print the smallest margin."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    chosen = choose(SentenceEncoder.from_pretrained(device="cpu", dtype="float64"))
    data = json.dumps(chosen) + "\n"
    tokens = sum(map(len, chosen["tokens"].values()))
    print(f"{len(chosen['texts'])} of {len(TEXTS)} golden texts; of the layers, {tokens} tokens")
    margin = "{steps:.1e} steps of float32, {distance:.1e} of a number's size".format
    print(f"nearest to a boundary: {margin(**chosen['margin'])}")
    print(chosen["sha256"]["embedding"])
    if options.check:
        return int(FILE.read_text(encoding="utf-8") != data)
    before = json.loads(FILE.read_text(encoding="utf-8"))["sha256"]["embedding"]
    text = README.read_text(encoding="utf-8")
    README.write_text(text.replace(before, chosen["sha256"]["embedding"]), encoding="utf-8")
    FILE.write_text(data, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

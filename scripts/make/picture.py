"""Make the picture of the README: what `minilm tour` shows, photographed by a browser.

    python scripts/make/picture.py [--folder .assets]

Makes the tour of two sentences and photographs parts of it: the way through the model, what each
head looks at, and the table of word pairs whose cells add up to the similarity. That is done with
Chromium (`apt-get install chromium`) and playwright (`pip install "minilm[test]"`). Writes
`tour-light.png` and `tour-dark.png`, in 256 colours, which takes a third of the bytes.
"""

import argparse
import io
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # a bare checkout is enough

from minilm import SentenceEncoder  # noqa: E402
from minilm.interpret.tour import tour  # noqa: E402

SENTENCES = ("The weather is lovely today.", "It's so sunny outside!")
WIDTH = 1000  # pixels
SHOWN = [
    "header.top .texts", "header.top svg",
    "#heads h2", "#heads-table",
    "#pair h2", "#pair-table",
]  # fmt: skip
HIDE_ALL_ELSE = """(shown) => {
  const kept = shown.map((name) => document.querySelector(name));
  if (kept.includes(null)) throw new Error(`the page lacks ${shown[kept.indexOf(null)]}`);
  for (const each of document.body.querySelectorAll('*'))
    if (!kept.some((one) => one.contains(each) || each.contains(one))) each.style.display = 'none';
  for (const each of document.querySelectorAll('section, header'))
    each.style.cssText += '; border: none; margin-block: 0; padding-block: 24px 0';
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".assets")
    options = parser.parse_args()
    from PIL import Image  # which matplotlib brings
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("picture: needs Chromium: apt-get install chromium")
    options.folder.mkdir(exist_ok=True)
    encoder = SentenceEncoder.from_pretrained(device="cpu")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page = Path(folder) / "tour.html"
        page.write_text(tour(encoder, *SENTENCES), encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            tab = browser.new_page(
                viewport={"width": WIDTH, "height": 800},
                device_scale_factor=1.5,
                color_scheme=scheme,
                offline=True,
            )
            tab.goto(page.as_uri())
            tab.evaluate(HIDE_ALL_ELSE, SHOWN)
            path = options.folder / f"tour-{scheme}.png"
            image = Image.open(io.BytesIO(tab.screenshot(full_page=True))).convert("RGB")
            image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} KB")
        browser.close()


if __name__ == "__main__":
    main()

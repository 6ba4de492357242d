"""Compose README's picture, nbs/images/quickstart.png, from the saved outputs of the quick start: `python tools/make_picture.py`.

Needs Chromium or Chrome and the packages of the tests (`make test` installs them)."""
import json
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/"tests")]
from test_lab import find_browser  # noqa: E402

PARTS = {"While it trains": "run = train(", "240 questions about scenes it has never seen, before and after": "gain_table(before,after)", "": "show_answers(test_set"}
STYLE = """body {font: 13px Arial, sans-serif; margin: 18px; width: 764px} h1 {font-size: 16px; font-weight: normal; margin: 18px 0 6px}
table {border-collapse: collapse} td, th {padding: 5px 10px; text-align: right} td:last-child {text-align: left} tr:nth-child(even) {background: #f4f4f4}
thead tr {border-bottom: 1px solid #999} .vlm-gain td:last-child {text-align: right}"""


def outputs(notebook, start):
    "The HTML of the cell's outputs whose code holds `start`."
    cell = next(c for c in notebook["cells"] if c["cell_type"] == "code" and start in "".join(c["source"]))
    return "".join(h for o in cell["outputs"] if "<table" in (h := "".join(o.get("data", {}).get("text/html", ""))) or "<svg" in h)


if __name__ == "__main__":
    notebook = json.loads((root/"nbs/quickstart.ipynb").read_text())
    body = "".join((f"<h1>{title}</h1>" if title else "")+outputs(notebook, start) for title, start in PARTS.items())
    out = root/"nbs/images/quickstart.png"
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=dict(width=800, height=600))
        page.set_content(f"<!doctype html><style>{STYLE}</style>{body}")
        page.screenshot(path=out, full_page=True)
    Image.open(out).convert("RGB").quantize(128).save(out, optimize=True)
    print(out, out.stat().st_size//1000, "kB")

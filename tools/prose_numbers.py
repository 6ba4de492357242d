"""Numbers in the prose of a lesson that none of its cells prints or holds: `python tools/prose_numbers.py [NOTEBOOK ...]`

A help for whoever ran a lesson again, not a gate: a number may be right although it stands nowhere else (a size known from a paper, a sum done in the
text). A number counts as found when an output or a code cell of the notebook has one that rounds to it, as it is or as per cent. Numbers with fewer than
two digits, years, code in backticks, links and the sources at the end are passed over."""
import json
import re
import sys
from pathlib import Path

NUMBER = re.compile(r"(?<![\w.,#])\d[\d,]*\.?\d*(?![\w])")
ROOT = Path(__file__).resolve().parent.parent


def texts(notebook):
    "(id, prose) of each markdown cell, and all that code cells hold and print."
    prose, shown = [], []
    for cell in json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            prose.append((cell["id"], source))
        else:
            shown.append(source)
            for out in cell["outputs"]:
                data = out.get("data", {})
                shown += ["".join(x) for x in (out.get("text", ""), data.get("text/plain", ""), data.get("text/html", ""), data.get("image/svg+xml", ""))]
    return prose, "\n".join(shown)


def value(number):
    return float(number.replace(",", "").rstrip("."))


def missing(notebook):
    "(cell id, number, words around it) for each number of the prose that stands nowhere else."
    prose, shown = texts(notebook)
    there = {value(n) for n in re.findall(r"\d[\d,]*\.?\d*", re.sub(r"(?<=\d)_(?=\d)", "", shown))} | {value("0" + n) for n in re.findall(r"(?<!\d)\.\d+", shown)}
    found = []
    for cell, text in prose:
        text = re.sub(r"`[^`]*`|\]\([^)]*\)|\*\*Sources?\*\*.*", lambda m: " " * len(m[0]), text, flags=re.S)
        for m in NUMBER.finditer(text):
            number = m[0].rstrip(",.")
            digits = len(number.partition(".")[2])
            if len(number.replace(".", "").replace(",", "").lstrip("0")) < 2 and not digits or re.fullmatch(r"(19|20)\d\d", number):
                continue
            v, near = value(number), .5001 * 10**-digits
            if not any(abs(x - v) <= near or abs(100 * x - v) <= near or abs(x / 1000 - v) <= near for x in there):
                found.append((cell, number, " ".join(text[max(0, m.start()-50):m.end()+30].split())))
    return found


if __name__ == "__main__":
    for path in [Path(p) for p in sys.argv[1:]] or sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell, number, words in missing(path):
            print(f"{path.name} {cell}: {number}    … {words} …")

"""Write README.md from nbs/index.ipynb. (nbdev's own command for this needs Quarto.)

    python tools/make_readme.py
"""
import json
import posixpath
import re
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def from_root(text, folder):
    "Links of a notebook in `folder`, as seen from the folder above: images/a.png is nbs/images/a.png there."
    def one(m):
        target = m[2]
        if not re.match(r"[a-z]+:|[#/]", target):
            target = posixpath.normpath(posixpath.join(folder, target))
        return m[1] + target + m[3]
    return re.sub(r"(\]\(|<img [^>]*src=\")([^)\"\s]+)([)\"])", one, text)


def readme(root=root):
    "The text of README.md: the markdown cells of index.ipynb; the title's `> line` becomes a plain one."
    cells = json.loads((root / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(c["source"]).strip() for c in cells if c["cell_type"] == "markdown"]
    title, _, line = texts[0].partition("\n")
    note = "<!-- Made from nbs/index.ipynb by `make readme`. Edit that notebook, not this file. -->"
    parts = [title, note, line.strip().removeprefix("> "), *texts[1:]]
    return from_root("\n\n".join(parts), "nbs") + "\n"


if __name__ == "__main__":
    text = readme()
    (root / "README.md").write_text(text, encoding="utf-8")
    print(f"README.md: {len(text)} characters")

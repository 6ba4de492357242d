"""The conventions of the course, checked.

    python tools/gates.py [--only names imports ...]

Each gate is a function: it takes the root of the repository and yields one sentence for each thing that is wrong, with the way to mend it.
"""
import argparse
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from make_readme import readme
from run_nbs import code_hash

PAGES = {"index", "quickstart"}                  # notebooks that are no lessons: no number, no module
PLAIN = {"__init__", "_modidx", "cli"}           # modules that are written by hand or by nbdev, not exported from a notebook
MAX_OUTPUT = 300_000                             # bytes of output in one notebook
MAX_LINES = 40                                   # lines in one code cell
LONG_CELLS = {                                   # "notebook: def name" or "notebook: first line of the cell" -> why it is longer
    "12_loop: def fit": "the training loop: half of it is the list of settings, and what is left is read in one piece",
    "14_sft: def train": "the list of settings",
    "17_grpo: def train": "the list of settings",
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def notebooks(root):
    "All notebooks, in order."
    return sorted(f for f in (root / "nbs").rglob("*.ipynb") if not any(p[0] in "._" for p in f.relative_to(root).parts))


def lessons(root):
    "{module name: (number, notebook)} of the notebooks called NN_name.ipynb or NNx_name.ipynb directly in nbs/."
    found = (re.fullmatch(r"(\d\d[a-z]?)_(\w+)", f.stem) for f in sorted((root / "nbs").glob("*.ipynb")))
    return {m[2]: (m[1], root / "nbs" / f"{m[0]}.ipynb") for m in found if m}


def code_cells(path):
    "(position, source) of the code cells of a notebook."
    return [(i, "".join(c["source"])) for i, c in enumerate(read(path)["cells"]) if c["cell_type"] == "code"]


# --- the gates ------------------------------------------------------------------------------------------------

def names(root):
    "notebook NN_name.ipynb (or 02a_name.ipynb: a further part of 02) exports to vlmcourse/name.py, and no two lessons share a number"
    by_number = {}
    for path in (root / "nbs").glob("*.ipynb"):
        m = re.fullmatch(r"(\d\d[a-z]?)_([a-z][a-z0-9_]*)", path.stem)
        exports = re.findall(r"^#\s*\|\s*default_exp\s+(\S+)", "\n".join(s for _, s in code_cells(path)), re.M)
        if path.stem in PAGES:
            if exports:
                yield f"{path.name} has `#| default_exp`, but it is a page. Move the code to a lesson."
        elif not m:
            yield f"{path.name} is neither NN_name.ipynb (or NNa_name.ipynb) nor a page. Rename it, or add it to PAGES in tools/gates.py."
        elif exports != [m[2]]:
            yield f"{path.name} says default_exp {exports or 'nowhere'}. It must say `#| default_exp {m[2]}`, once, in a cell of its own."
        else:
            by_number.setdefault(m[1], []).append(path.name)
    for number, same in by_number.items():
        if len(same) > 1:
            yield f"{', '.join(sorted(same))} share the number {number}. Give each its own (ARCHITECTURE: the number line is the order)."


def imports(root):
    "a lesson imports names, and only from lessons with smaller numbers"
    known = lessons(root)
    for name, (number, path) in known.items():
        for cell, other, star in dict.fromkeys(vlmcourse_imports(path)):
            where = f"{path.name}, cell {cell}"
            if star:
                yield f"{where}: `from vlmcourse.{other} import *`. Import the names that are used."
            elif other == name:
                yield f"{where} imports vlmcourse.{name}, its own module. Its functions are already defined in the notebook."
            elif other not in known:
                yield (f"{where} imports {other!r} from vlmcourse, which is no lesson's module. "
                       "Name the module: from vlmcourse.core import …")
            elif known[other][0] > number:
                yield (f"{where} imports vlmcourse.{other} ({known[other][0]}), a later lesson. Move what is shared to "
                       f"{number} or before, or this code to {known[other][0]} or after.")


def vlmcourse_imports(path):
    "(cell, module, is it a star) for each import of vlmcourse in a notebook, inside functions too."
    from IPython.core.inputtransformer2 import TransformerManager
    for i, source in code_cells(path):
        for node in ast.walk(ast.parse(TransformerManager().transform_cell(source))):
            if isinstance(node, ast.Import):
                found = [(a.name.partition(".")[2], False) for a in node.names if a.name.split(".")[0] == "vlmcourse"]
                found = [(m, star) for m, star in found if m]            # a bare `import vlmcourse` imports no lesson
            elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "vlmcourse"):
                module = (node.module or "") if node.level else node.module.partition(".")[2]
                found = [(module or a.name, a.name == "*") for a in node.names if not a.name.startswith("_")]
            else:
                continue
            yield from ((i, m.split(".")[0], star) for m, star in found)


def export(root):
    "nbdev's clean and export change nothing, and every module comes from a lesson"
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "copy"
        copy.mkdir()
        for name in ("settings.ini", "pyproject.toml", "nbs", "vlmcourse"):
            if (root / name).is_dir():
                shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("models", "runs", "__pycache__", ".*"))
            else:
                shutil.copy(root / name, copy)
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"JUPYTER_DATA_DIR": f"{tmp}/jupyter"}
        code = "from nbdev.clean import nbdev_clean; nbdev_clean(); from nbdev.doclinks import nbdev_export; nbdev_export()"
        ran = subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, capture_output=True, text=True)
        if ran.returncode:
            yield f"nbdev stopped: {ran.stderr.strip()[-1500:]}"
            return
        for new in sorted([*(copy / "nbs").rglob("*.ipynb"), *(copy / "vlmcourse").rglob("*.py"), copy / "pyproject.toml"]):
            old = root / new.relative_to(copy)
            if not old.exists() or not filecmp.cmp(old, new, shallow=False):
                yield f"{old.relative_to(root)} is not what nbdev makes of the notebooks. Run: make export"
    for path in sorted((root / "vlmcourse").glob("*.py")):
        if path.stem not in PLAIN and path.stem not in lessons(root):
            yield f"vlmcourse/{path.name} has no notebook. Delete it, or, if it is written by hand, add it to PLAIN in tools/gates.py."


def outputs(root):
    "the outputs of a notebook stay under 300 kB"
    for path in notebooks(root):
        nb = read(path)
        sizes = {i: len(json.dumps(c["outputs"])) for i, c in enumerate(nb["cells"]) if c.get("outputs")}
        total = sum(sizes.values()) + len(json.dumps(nb["metadata"].get("widgets", "")))
        if total > MAX_OUTPUT:
            cell = max(sizes, key=sizes.get, default=0)
            yield (f"{path.name} holds {total // 1000} kB of output; {MAX_OUTPUT // 1000} are allowed. The largest is cell {cell} "
                   f"({sizes.get(cell, 0) // 1000} kB): draw at dpi 100, save photo grids as JPEG, or show fewer.")


def cells(root):
    "no code cell is longer than 40 lines without a listed reason"
    long = {}
    for path in notebooks(root):
        for i, source in code_cells(path):
            lines = [s for s in source.splitlines() if not re.match(r"#\s*\|", s)]
            if len(lines) > MAX_LINES:
                text = "\n".join(lines)
                first = (re.search(r"^(def|class) \w+", text, re.M) or re.search(r"\S.*", text))[0]
                long[f"{path.stem}: {first}"] = (path.name, i, len(lines))
    for key, (name, i, n) in long.items():
        if key not in LONG_CELLS:
            yield f"{name}, cell {i} has {n} lines; {MAX_LINES} are allowed. Split it, or add {key!r} with a reason to LONG_CELLS in tools/gates.py."
    here = {path.stem for path in notebooks(root)}
    for key in sorted(k for k in LONG_CELLS.keys() - long.keys() if k.split(":")[0] in here):
        yield f"LONG_CELLS in tools/gates.py lists {key!r}, which is not there or no longer long. Take it off the list."


def executed(root):
    "every notebook holds the outputs of the code that stands in it, and no error"
    for path in notebooks(root):
        nb = read(path)
        code = [c for c in nb["cells"] if c["cell_type"] == "code"]
        if not code:
            continue
        again = f"Run: make run NBS={path.relative_to(root)}"
        mark = nb["metadata"].get("vlmcourse", {}).get("executed")
        for i, c in enumerate(nb["cells"]):
            if any(o["output_type"] == "error" for o in c.get("outputs", [])):
                yield f"{path.name}, cell {i} shows an error. Catch it (fastcore.test.test_fail) and show its message. {again}"
        if not any(c["outputs"] for c in code):
            yield f"{path.name} shows no output at all. {again}"
        elif mark != code_hash(nb):
            why = "has never been run whole" if mark is None else "was changed after it was run, so its outputs may be of other code"
            yield f"{path.name} {why}. {again}"


def front(root):
    "README.md is what nbs/index.ipynb gives, and the pictures and files it names are there"
    text = readme(root)
    path = root / "README.md"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        yield "README.md is not what nbs/index.ipynb gives. Run: make readme"
    targets = re.findall(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"", text)
    for target in dict.fromkeys("".join(t) for t in targets):
        if not re.match(r"[a-z]+:|#", target) and not (root / target.partition("#")[0]).exists():
            yield f"README.md names {target}, which does not exist. Mend the link in nbs/index.ipynb, then: make readme"


GATES = [names, imports, export, outputs, cells, executed, front]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=[g.__name__ for g in GATES], help="run only these gates")
    p.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent)
    a = p.parse_args()
    bad = 0
    for gate in GATES:
        if a.only and gate.__name__ not in a.only:
            continue
        wrong = list(gate(a.root))
        bad += bool(wrong)
        print(f"{'WRONG' if wrong else 'good '} {gate.__name__}: {gate.__doc__}", *wrong, sep="\n    - ", flush=True)
    sys.exit(f"{bad} of the gates found something" if bad else 0)


if __name__ == "__main__":
    main()

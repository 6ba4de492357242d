"""Each gate of tools/gates.py finds what it is there to find, and says how to mend it."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
sys.path.insert(0, str(root / "tools"))
import gates
from make_readme import from_root, readme
from run_nbs import code_hash

CORE = ["#| default_exp core", "#| export\ndef double(x):\n    return 2*x", "double(2)"]
MUSEUM = ["#| default_exp museum", "#| export\nfrom vlmcourse.core import double",
          "#| export\ndef four():\n    return double(2)", "four()"]


def write_nb(path, code, title="# Title\n\n> A line."):
    "A notebook as nbdev leaves it: a title, code cells that show 4, and the mark of tools/run_nbs.py."
    shown = [{"data": {"text/plain": ["4"]}, "execution_count": None, "metadata": {}, "output_type": "execute_result"}]
    def cell(i, kind, source, **more):
        return dict(cell_type=kind, id=f"c{i}", metadata={}, source=source.splitlines(True), **more)
    cells = [cell(0, "markdown", title)]
    cells += [cell(i + 1, "code", s, execution_count=None, outputs=shown if i == len(code) - 1 else []) for i, s in enumerate(code)]
    nb = dict(cells=cells, nbformat=4, nbformat_minor=5,
              metadata={"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    nb["metadata"]["vlmcourse"] = {"executed": code_hash(nb)}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def change(path, edit):
    "Apply `edit` to the notebook at `path`."
    nb = json.loads(path.read_text(encoding="utf-8"))
    edit(nb)
    path.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A small course on which every gate is content."
    tree = tmp_path_factory.mktemp("course")
    for name in ("settings.ini", "pyproject.toml"):
        (tree / name).write_bytes((root / name).read_bytes())
    write_nb(tree / "nbs/00_core.ipynb", CORE)
    write_nb(tree / "nbs/01_museum.ipynb", MUSEUM)
    write_nb(tree / "nbs/index.ipynb", [], title="# Course\n\n> A line.\n\n[core](00_core.ipynb)")
    (tree / "vlmcourse").mkdir()
    (tree / "vlmcourse/__init__.py").write_bytes((root / "vlmcourse/__init__.py").read_bytes())
    code = "from nbdev.clean import nbdev_clean; nbdev_clean(); from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True)
    (tree / "README.md").write_text(readme(tree), encoding="utf-8")
    return tree


@pytest.fixture
def tree(exported, tmp_path):
    "A copy of the small course, to break."
    import shutil
    return Path(shutil.copytree(exported, tmp_path / "course"))


@pytest.mark.parametrize("gate", gates.GATES, ids=lambda g: g.__name__)
def test_good_tree(tree, gate):
    assert list(gate(tree)) == []


def no_number(tree):
    (tree / "nbs/01_museum.ipynb").rename(tree / "nbs/museum.ipynb")
def other_name(tree):
    (tree / "nbs/01_museum.ipynb").rename(tree / "nbs/01_gallery.ipynb")
def same_number(tree):
    (tree / "nbs/01_museum.ipynb").rename(tree / "nbs/00_museum.ipynb")
def no_default_exp(tree):
    write_nb(tree / "nbs/01_museum.ipynb", MUSEUM[1:])
def page_with_module(tree):
    write_nb(tree / "nbs/quickstart.ipynb", CORE)
def later_lesson(tree):
    write_nb(tree / "nbs/00_core.ipynb", [*CORE, "def f():\n    import vlmcourse.museum"])
def later_lesson_relative(tree):
    write_nb(tree / "nbs/00_core.ipynb", [*CORE, "from . import museum"])
def own_module(tree):
    write_nb(tree / "nbs/00_core.ipynb", [*CORE, "%time 1\nfrom vlmcourse.core import double"])
def star(tree):
    write_nb(tree / "nbs/01_museum.ipynb", [*MUSEUM, "from vlmcourse.core import *"])
def from_top(tree):
    write_nb(tree / "nbs/01_museum.ipynb", [*MUSEUM, "from vlmcourse import double"])
def edited_module(tree):
    with open(tree / "vlmcourse/core.py", "a") as f: f.write("\nx = 1\n")
def not_exported(tree):
    write_nb(tree / "nbs/00_core.ipynb", [*CORE, "#| export\ny = 1"])
def not_clean(tree):
    change(tree / "nbs/00_core.ipynb", lambda nb: nb["cells"][3].update(execution_count=7))
def stale_index(tree):
    (tree / "vlmcourse/_modidx.py").write_text("d = {}\n")
def orphan(tree):
    (tree / "vlmcourse/gallery.py").write_text("x = 1\n")
def deleted_notebook(tree):
    (tree / "nbs/01_museum.ipynb").unlink()
def other_version(tree):
    f = tree / "vlmcourse/__init__.py"
    f.write_text(f.read_text().replace('__version__ = "', '__version__ = "9'))
def broken_cell(tree):
    write_nb(tree / "nbs/00_core.ipynb", [*CORE, "#| export\ndef"])
def big_output(tree):
    change(tree / "nbs/00_core.ipynb", lambda nb: nb["cells"][3]["outputs"][0]["data"].update({"image/png": "A" * 300_000}))
def long_cell(tree):
    write_nb(tree / "nbs/00_core.ipynb", [*CORE, "x = 1\n" * 41])
def no_output(tree):
    change(tree / "nbs/00_core.ipynb", lambda nb: nb["cells"][3].update(outputs=[]))
def error_output(tree):
    error = dict(output_type="error", ename="E", evalue="", traceback=[])
    change(tree / "nbs/00_core.ipynb", lambda nb: nb["cells"][3]["outputs"].append(error))
def changed_after_run(tree):
    change(tree / "nbs/00_core.ipynb", lambda nb: nb["cells"][3].update(source=["double(3)"]))
def never_run(tree):
    change(tree / "nbs/00_core.ipynb", lambda nb: nb["metadata"].pop("vlmcourse"))
def edited_readme(tree):
    with open(tree / "README.md", "a") as f: f.write("More.\n")
def missing_picture(tree):
    write_nb(tree / "nbs/index.ipynb", [], title="# Course\n\n> A line.\n\n![a plot](images/none.png)")
    (tree / "README.md").write_text(readme(tree), encoding="utf-8")


@pytest.mark.parametrize("gate, breakage, says", [
    (gates.names, no_number, "museum.ipynb is neither NN_name.ipynb (or NNa_name.ipynb) nor a page"),
    (gates.names, other_name, "It must say `#| default_exp gallery`"),
    (gates.names, same_number, "00_core.ipynb, 00_museum.ipynb share the number 00"),
    (gates.names, no_default_exp, "default_exp nowhere"),
    (gates.names, page_with_module, "quickstart.ipynb has `#| default_exp`"),
    (gates.imports, later_lesson, "00_core.ipynb, cell 4 imports vlmcourse.museum (01), a later lesson"),
    (gates.imports, later_lesson_relative, "imports vlmcourse.museum (01), a later lesson"),
    (gates.imports, own_module, "its own module"),
    (gates.imports, star, "Import the names that are used"),
    (gates.imports, from_top, "imports 'double' from vlmcourse"),
    (gates.export, edited_module, "vlmcourse/core.py is not what nbdev makes"),
    (gates.export, not_exported, "vlmcourse/core.py is not what nbdev makes"),
    (gates.export, not_clean, "nbs/00_core.ipynb is not what nbdev makes"),
    (gates.export, stale_index, "vlmcourse/_modidx.py is not what nbdev makes"),
    (gates.export, orphan, "vlmcourse/gallery.py has no notebook"),
    (gates.export, deleted_notebook, "vlmcourse/museum.py has no notebook"),
    (gates.export, other_version, "vlmcourse/__init__.py is not what nbdev makes"),
    (gates.export, broken_cell, "nbdev stopped"),
    (gates.outputs, big_output, "00_core.ipynb holds 300 kB of output; 300 are allowed. The largest is cell 3"),
    (gates.cells, long_cell, "00_core.ipynb, cell 4 has 41 lines"),
    (gates.executed, no_output, "00_core.ipynb shows no output at all"),
    (gates.executed, error_output, "00_core.ipynb, cell 3 shows an error"),
    (gates.executed, changed_after_run, "00_core.ipynb was changed after it was run"),
    (gates.executed, never_run, "00_core.ipynb has never been run whole"),
    (gates.front, edited_readme, "Run: make readme"),
    (gates.front, missing_picture, "README.md names nbs/images/none.png, which does not exist"),
], ids=lambda o: getattr(o, "__name__", ""))
def test_gate_catches(tree, gate, breakage, says):
    breakage(tree)
    found = list(gate(tree))
    assert any(says in sentence for sentence in found), found


def test_export_gate_leaves_the_tree_alone(tree):
    not_clean(tree)
    before = {f: f.read_bytes() for f in tree.rglob("*") if f.is_file()}
    assert list(gates.export(tree))
    assert before == {f: f.read_bytes() for f in tree.rglob("*") if f.is_file()}


@pytest.mark.parametrize("key, cell", [("x = 1", "x = 1\n" * 41), ("class A", "@dataclass\nclass A:\n" + "    x = 1\n" * 41)])
def test_listed_long_cell(tree, monkeypatch, key, cell):
    monkeypatch.setitem(gates.LONG_CELLS, f"00_core: {key}", "a reason")
    assert "Take it off the list" in list(gates.cells(tree))[0]
    write_nb(tree / "nbs/00_core.ipynb", [*CORE, cell])
    assert list(gates.cells(tree)) == []


def test_command_line(tree):
    def run(*words):
        return subprocess.run([sys.executable, root / "tools/gates.py", "--root", tree, *words], capture_output=True, text=True)
    assert run("--only", "names", "cells").returncode == 0
    long_cell(tree)
    ran = run("--only", "names", "cells")
    assert ran.returncode == 1 and "WRONG cells" in ran.stdout and "good  names" in ran.stdout


def test_links_in_readme():
    assert from_root("![p](images/a.png) [l](../LICENSE) [w](https://x.y/z) [h](#here)", "nbs") == \
        "![p](nbs/images/a.png) [l](LICENSE) [w](https://x.y/z) [h](#here)"


def test_run_notebooks(tree):
    "tools/run_nbs.py runs a changed notebook, saves its outputs and leaves it clean; a second run changes nothing."
    path = tree / "nbs/00_core.ipynb"
    changed_after_run(tree)
    run = [sys.executable, root / "tools/run_nbs.py", "--write", path]
    ran = subprocess.run(run, capture_output=True, text=True)
    assert ran.returncode == 0 and "1 passed, 0 failed" in ran.stdout, ran.stderr
    once = path.read_bytes()
    assert json.loads(once)["cells"][3]["outputs"][0]["data"]["text/plain"] == ["6"]
    assert list(gates.executed(tree)) == []
    subprocess.run(run, check=True, capture_output=True)
    assert path.read_bytes() == once
    write_nb(path, [*CORE, "double(None)"])
    ran = subprocess.run(run, capture_output=True, text=True)
    assert ran.returncode == 1 and "TypeError" in ran.stderr

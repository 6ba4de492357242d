"""Run notebooks in real Jupyter kernels and keep their outputs.

    python tools/run_nbs.py [--write] [--jobs N] [nbs/10_runlog.ipynb ...]

With --write the notebooks are saved, cleaned, with their new outputs and a mark: a hash of the code that made them.
tools/gates.py compares the mark, so no lesson is committed with outputs of other code.
Cells marked `#| eval: false`, or with a flag of tst_flags in settings.ini, are not run and keep their outputs.
"""
import argparse
import asyncio
import hashlib
import json
import re
import sys
import time
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
view = "application/vnd.jupyter.widget-view+json"
state_key = "application/vnd.jupyter.widget-state+json"


def setting(key):
    "The words of `key` in settings.ini."
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(root / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"].get(key, "").split()


def code_hash(nb):
    "A hash of all code cells of `nb` (as nbformat or as plain JSON)."
    code = ["".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def stable_widgets(nb):
    "Number the widget models in reading order and keep only those shown, so that a second run changes nothing."
    state = nb.metadata.get("widgets", {}).get(state_key, {}).get("state", {})
    shown = [o.data for c in nb.cells for o in c.get("outputs", []) if view in o.get("data", {})]
    ids, todo = {}, [data[view]["model_id"] for data in shown]
    while todo:
        i = todo.pop(0)
        if i in ids or i not in state:
            continue
        ids[i] = f"{len(ids) + 1:032x}"
        todo += re.findall(r"IPY_MODEL_(\w+)", json.dumps(state[i]["state"], sort_keys=True))
    nb.metadata.pop("widgets", None)
    if not ids:
        return
    text = json.dumps({i: state[i] for i in ids}, sort_keys=True)
    for old, new in ids.items():
        text = text.replace(old, new)
    nb.metadata["widgets"] = {state_key: dict(state=json.loads(text), version_major=2, version_minor=0)}
    for data in shown:
        data[view]["model_id"] = ids.get(data[view]["model_id"], "")


async def run(path, write):
    "Run the notebook at `path`; return what went wrong, or an empty string."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbdev.clean import nbdev_clean
    nb = nbformat.read(path, as_version=4)
    flags = "|".join(["eval:\\s*false", *map(re.escape, setting("tst_flags"))])
    left_out = re.compile(rf"^#\s*\|\s*({flags})\b", re.M | re.I)
    for cell in nb.cells:
        if cell.cell_type == "code" and left_out.search(cell.source):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "skip-execution"]
    client = NotebookClient(nb, timeout=1800, kernel_name="python3", record_timing=False,
                            extra_arguments=["--log-level=ERROR"],
                            resources={"metadata": {"path": str(path.parent)}})
    try:
        await client.async_execute()
    except CellExecutionError as e:
        return str(e)[-3000:]
    for cell in nb.cells:
        if "skip-execution" in cell.metadata.get("tags", []):
            cell.metadata["tags"].remove("skip-execution")
            if not cell.metadata["tags"]:
                del cell.metadata["tags"]
    if write:
        stable_widgets(nb)
        nb.metadata["vlmcourse"] = {"executed": code_hash(nb)}
        nbformat.write(nb, path)
        nbdev_clean(str(path))
    return ""


async def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="*", type=Path)
    p.add_argument("--write", action="store_true", help="save the notebooks with their new outputs")
    p.add_argument("--jobs", type=int, default=1, help="notebooks at a time")
    a = p.parse_args()
    paths = [f.resolve() for f in a.paths] or sorted(
        f for f in (root / "nbs").rglob("*.ipynb") if f.name != "index.ipynb" and ".ipynb_checkpoints" not in f.parts)
    begin, gate = time.time(), asyncio.Semaphore(a.jobs)

    async def job(path):
        async with gate:
            start = time.time()
            wrong = await run(path, a.write)
            print(f"{'FAILED' if wrong else 'passed'} {path.name} {time.time() - start:.0f} s", flush=True)
            if wrong:
                print(wrong, file=sys.stderr)
            return not wrong

    good = await asyncio.gather(*map(job, paths))
    print(f"{sum(good)} passed, {len(good) - sum(good)} failed in {time.time() - begin:.0f} s")
    sys.exit(not all(good))


if __name__ == "__main__":
    asyncio.run(main())

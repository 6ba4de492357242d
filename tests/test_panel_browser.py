"""The panel in a real JupyterLab and a real browser: move two sliders, train, pause, stop, read the call, run it, get the same numbers.

Needs a browser, as tests/test_lab.py does. Screenshots are kept in tests/artefacts/.
"""
import json
import re
import time

import pytest

from test_lab import MINUTES, browser_page, copy_course, find_browser, make_lab, shots

CELLS = [
    "from vlmcourse import sft\nfrom vlmcourse.formats import read_records\nfrom vlmcourse.panel import panel\n"
    "from vlmcourse.runlog import read_log",
    "train_set = '../data_samples/workshop/records.json'\nunseen = read_records('../data_samples/museum/records.json')[:4]\n"
    "p = panel(sft.train, train_set, unseen, eval_steps=20)\np",
]


def make_notebook(path, cells):
    "A notebook of code cells that have not run."
    code = [dict(cell_type="code", id=f"cell{i}", metadata={}, execution_count=None, outputs=[], source=source)
            for i, source in enumerate(cells)]
    kernel = dict(display_name="python3", language="python", name="python3")
    path.write_text(json.dumps(dict(cells=code, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


RUN = """async (source) => {
  const panel = window.jupyterapp.shell.currentWidget, cells = panel.content.model.sharedModel;
  cells.insertCell(cells.cells.length, {cell_type: 'code', source, metadata: {}});
  panel.content.activeCellIndex = cells.cells.length - 1;
  await window.jupyterapp.commands.execute('notebook:run-cell');
}"""
IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"
TEXT = """() => {
  const cells = window.jupyterapp.shell.currentWidget.content.model.sharedModel.cells;
  const outputs = cells[cells.length - 1].getOutputs();
  const text = v => [v ?? ''].flat().join('');
  return outputs.map(o => text(o.text) + text(o.data?.['text/plain']) + (o.traceback ?? []).join('')).join('\\n');
}"""


def run_cell(page, source, minutes=5):
    "Run a new last cell; return what it printed and its value, as text."
    page.evaluate(RUN, source)
    wait_until(page, lambda: page.evaluate(IDLE), "the cell did not finish", minutes)
    page.wait_for_timeout(300)
    return page.evaluate(TEXT)


def wait_until(page, done, why, minutes=3):
    "Wait until `done()`; what it gives is returned."
    end = time.time() + 60 * minutes
    while not (found := done()):
        wrong = page.locator(".vlm-error")
        assert time.time() < end and not wrong.count(), why + (f": {wrong.first.inner_text()}" if wrong.count() else "")
        page.wait_for_timeout(100)
    return found


def open_notebook(page, address, name):
    "Open a notebook of the course by its address, run its cells."
    from playwright.sync_api import expect
    page.goto(address.replace("/?", f"/lab/tree/nbs/{name}?"))
    page.wait_for_selector(".jp-Notebook", timeout=2 * MINUTES)
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=2 * MINUTES)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def move(page, name, key, times):
    "Move the slider of an argument by arrow keys."
    handle = page.locator(f".vlm-{name} .noUi-handle")
    handle.scroll_into_view_if_needed()
    for _ in range(times):
        handle.press(key)


def steps_done(page):
    "The step that the line above the curves names, or 0."
    line = page.locator(".vlm-dashboard .vlm-line")
    found = re.search(r"step (\d+)", line.first.inner_text()) if line.count() else None
    return int(found[1]) if found else 0


def picture(page):
    "The curve as it is drawn now."
    return page.locator(".vlm-dashboard svg polyline").first.get_attribute("points")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab with the course in it, and its folder."
    find_browser()
    shots.mkdir(exist_ok=True)
    tmp = tmp_path_factory.mktemp("lab")
    course = copy_course(tmp / "course")
    make_notebook(course / "nbs" / "panel_test.ipynb", CELLS)
    with make_lab(course, tmp) as address:
        yield address, course


def test_panel(lab):
    address, course = lab
    errors = []
    with browser_page(errors) as page:
        open_notebook(page, address, "panel_test.ipynb")
        page.wait_for_selector(".vlm-panel .vlm-learning_rate .noUi-handle", timeout=5 * MINUTES)
        page.screenshot(path=shots / "panel_form.png")

        # two sliders, and the tool tip of one
        move(page, "learning_rate", "ArrowRight", 15)
        move(page, "num_train_epochs", "ArrowRight", 8)  # long enough for all that follows on a fast machine
        page.locator("button.vlm-show-me-the-code").click()
        code = page.locator(".vlm-panel pre.vlm-code")
        call = wait_until(page, lambda: code.count() and code.inner_text(), "no code is shown")
        assert "num_train_epochs=30" in call and "learning_rate=0.003" in call and "val_data=unseen" in call and "seed" not in call, call
        tip = page.locator('.vlm-form [title^="learning_rate: "]').first.get_attribute("title")
        assert "tiny model" in tip, tip

        # train: the curve moves; pause: it stands; go on: it moves again; stop: it ends
        page.locator("button.vlm-train").click()
        wait_until(page, lambda: steps_done(page) >= 2, "no step after Train", 5)
        before = picture(page)
        wait_until(page, lambda: picture(page) != before, "the curve does not move")
        page.locator("button.vlm-pause").click()
        wait_until(page, lambda: "paused" in page.locator(".vlm-dashboard .vlm-line").first.inner_text(), "not paused")
        page.wait_for_timeout(3000)
        stood = steps_done(page)
        page.wait_for_timeout(4000)
        assert steps_done(page) == stood, "it trained on while it was paused"
        page.screenshot(path=shots / "panel_paused.png")
        page.locator("button.vlm-pause").click()
        wait_until(page, lambda: steps_done(page) > stood, "it did not go on")
        page.locator("button.vlm-stop").click()
        kept = page.locator(".vlm-kept")
        wait_until(page, lambda: kept.count() and "stopped" in kept.first.inner_text(), "it did not stop")
        wait_until(page, lambda: page.locator("button.vlm-train").is_enabled(), "Train stays grey")
        kept.first.scroll_into_view_if_needed()
        assert kept.first.locator(".vlm-samples img").count() == 4 and "step 0:" in kept.first.inner_text()
        page.screenshot(path=shots / "panel_stopped.png")
        page.evaluate("() => window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        page.wait_for_timeout(1500)
        page.screenshot(path=shots / "panel_dark.png")

        # the printed call, run in a cell, gives the same numbers
        assert kept.first.locator("pre").inner_text().strip() == call.strip()
        stopped = run_cell(page, "[(r['step'], r['loss']) for r in read_log(p.training.folder)['train_history']]")
        stopped = json.loads(stopped.replace("(", "[").replace(")", "]"))
        assert 3 <= len(stopped) < 120, stopped
        run_cell(page, call.replace("sft.train(", "run = sft.train(") + "\n", minutes=8)
        again = run_cell(page, "[(r['step'], r['loss']) for r in run.log['train_history']]")
        again = json.loads(again.replace("(", "[").replace(")", "]"))
        assert len(again) == 120 and again[:len(stopped)] == stopped, (again, stopped)

        # what stays in the saved notebook is plain HTML, without a running kernel
        page.evaluate("() => window.jupyterapp.shell.currentWidget.context.save()")
        page.wait_for_timeout(1000)
        saved = json.loads((course / "nbs/panel_test.ipynb").read_text(encoding="utf-8"))
        outputs = [o for c in saved["cells"] for o in c["outputs"]]
        assert len(saved["cells"][1]["outputs"]) == 2, "the training wrote something else under the panel"
        assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"], outputs
        plain = "".join("".join(o.get("data", {}).get("text/html", "")) for o in saved["cells"][1]["outputs"])
        assert "vlm-kept" in plain and "<svg" in plain and "stopped" in plain, plain[:500]
    assert not errors, errors

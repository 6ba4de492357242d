"""The quick start as a newcomer meets it: `make lab`, a real JupyterLab, a real browser, Run All Cells.

Needs Chromium or Chrome (CHROMIUM names another one); without a browser the test is skipped, or fails when COURSE_NEEDS_BROWSER is set.
Screenshots are kept in tests/artefacts/.
"""
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from conftest import copy_lessons

root = Path(__file__).parent.parent
shots = Path(__file__).parent / "artefacts"
BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable",
            "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome", "/Applications/Chromium.app/Contents/MacOS/Chromium"]
MINUTES = 60_000    # a minute, in Playwright's milliseconds


def find_browser():
    "Path of a browser, or skip the test."
    found = next(filter(None, map(shutil.which, filter(None, [os.environ.get("CHROMIUM"), *BROWSERS]))), None)
    if not found:
        why = "no Chromium or Chrome on this machine. Install one (Debian: apt install chromium), or name it: CHROMIUM=/path/to/chrome make test"
        (pytest.fail if os.environ.get("COURSE_NEEDS_BROWSER") else pytest.skip)(why)
    return found


def copy_course(folder):
    "What `make lab` needs, in `folder`: running the notebook must not change the tree."
    copy_lessons(folder)
    shutil.copytree(root / "tools", folder / "tools")
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml", "requirements.lock"):
        shutil.copy(root / name, folder)
    return folder


@contextmanager
def make_lab(folder, tmp):
    "`make lab` in `folder` on a port of its own, with settings of its own; gives its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(8)
    own = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="runtime", IPYTHONDIR="ipython",
               JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces")
    env = os.environ | {k: str(tmp / v) for k, v in own.items()} | {"COURSE_VENV": sys.prefix, "HF_HUB_OFFLINE": "1"}
    env.pop("IN_TEST", None)
    news = tmp / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"   # no news dialog over the page
    news.parent.mkdir(parents=True)
    news.write_text('{"checkForUpdates": false, "fetchNews": "false"}')
    words = (f"--no-browser --port {port} --ServerApp.port_retries=0 --IdentityProvider.token={token} "
             "--LabApp.expose_app_in_browser=True")
    with open(tmp / "lab.log", "w") as log:
        server = subprocess.Popen(["make", "lab", f"LAB_ARGS={words}"], cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, tmp / "lab.log")
            yield f"http://127.0.0.1:{port}/?token={token}"          # the server sends it on to the quick start
        finally:
            stop(server)


def wait_for(url, server, log, seconds=180):
    "Return when `url` answers."
    end = time.time() + seconds
    while time.time() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=2)
        except OSError:
            time.sleep(.25)
    pytest.fail(f"`make lab` did not serve:\n{log.read_text()[-3000:]}")


def stop(server):
    "End `make` and the server, which ends its kernels: the whole process group that this test started."
    try:
        os.killpg(server.pid, signal.SIGTERM)
        for _ in range(100):
            server.poll()
            os.killpg(server.pid, 0)      # raises when nobody is left
            time.sleep(.2)
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    server.wait()


@contextmanager
def browser_page(errors):
    "A page of a headless browser; JavaScript errors are added to `errors`."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        page = browser.new_page(viewport=dict(width=1400, height=1200))
        page.on("pageerror", lambda e: errors.append(str(e)))
        try:
            yield page
        except BaseException:
            page.screenshot(path=shots / "failed.png")
            raise
        finally:
            browser.close()


def run_all(page, minutes):
    "Run All Cells from the menu, and wait until the kernel has done them all; return the different plots seen on the way."
    from playwright.sync_api import expect
    page.wait_for_selector(".jp-Notebook", timeout=2 * MINUTES)
    # The status bar, not the toolbar's circle: the circle says idle before there is a kernel.
    bar = page.locator("#jp-main-statusbar")
    expect(bar).to_contain_text("| Idle", timeout=2 * MINUTES)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    frames, end = set(), time.time() + 60 * minutes
    while not page.evaluate(DONE):
        assert time.time() < end, f"the notebook has not finished after {minutes} minutes"
        frames.add(page.evaluate(PLOT))
        page.wait_for_timeout(1000)
    return frames - {""}


# The notebook's model is read, not the page: cells out of sight are not drawn.
# Done: the kernel is idle and every code cell has a number, or one shows an error (the cells after it are then not run).
DONE = """() => {
  const panel = window.jupyterapp?.shell.currentWidget;
  const cells = panel?.content?.model?.sharedModel.cells.filter(c => c.cell_type == 'code' && c.getSource().trim());
  if (!cells?.length || panel.sessionContext.session?.kernel?.status != 'idle') return false;
  return cells.every(c => c.execution_count) || cells.some(c => c.getOutputs().some(o => o.output_type == 'error'));
}"""
PLOT = """() => {
  const cells = window.jupyterapp?.shell.currentWidget?.content?.model?.sharedModel.cells ?? [];
  const outputs = cells.filter(c => c.cell_type == 'code').flatMap(c => c.getOutputs());
  return outputs.map(o => [o.data?.['text/html'] ?? ''].flat().join('')).filter(html => html.includes('vlm-live')).join('');
}"""
SCROLL = """(word) => {
  const notebook = window.jupyterapp.shell.currentWidget.content;
  const holds = c => c.cell_type == 'code' && JSON.stringify(c.getOutputs()).includes(word);
  const i = notebook.model.sharedModel.cells.findLastIndex(holds);
  if (i >= 0) notebook.scrollToItem(i, 'center');
  return i;
}"""


def show(page, word, name):
    "Scroll to the last output that has an element of the class `word`, take its picture, return it."
    assert page.evaluate(SCROLL, word) >= 0, f"no output holds {word}"
    element = page.locator(f".jp-OutputArea .{word}").last
    element.scroll_into_view_if_needed(timeout=1 * MINUTES)
    page.wait_for_timeout(500)
    page.screenshot(path=shots / f"{name}.png")
    return element


def test_quickstart(tmp_path):
    "Run All finishes without an error; the finished curve and the table of gains are there."
    find_browser()
    shots.mkdir(exist_ok=True)
    course, errors = copy_course(tmp_path / "course"), []
    with make_lab(course, tmp_path) as address, browser_page(errors) as page:
        page.goto(address)
        frames = run_all(page, minutes=12)
        page.evaluate("() => window.jupyterapp.shell.currentWidget.context.save()")
        check_saved(course / "nbs/quickstart.ipynb")
        curve = show(page, "vlm-live", "curve")
        assert curve.locator("svg").count(), "the finished plot is no SVG picture"
        assert "done" in curve.inner_text()
        assert len(frames) > 1, "the plot did not change while the model was trained"
        assert show(page, "vlm-gain", "gain").inner_text().strip()
    assert not errors, errors


def check_saved(path):
    "The notebook as JupyterLab saved it: every cell has run, and none shows an error or a warning."
    code = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    bad = [o for c in code for o in c["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not bad, json.dumps(bad, indent=1)[:3000]
    assert all(c["execution_count"] for c in code if "".join(c["source"]).strip()), "some cells have not run"

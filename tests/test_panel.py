"""The panel without a browser: forms of odd signatures, calls that can be run, threads that pause, stop and fail, pictures of all kinds of runs."""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import pytest
import torch

from vlmcourse import sft
from vlmcourse.core import run_dir
from vlmcourse.loop import fit
from vlmcourse.panel import (RANGES, Form, Panel, Training, _limits, call_text, dashboard, form_fields, form_table,
                             metric_svg, panel, run_picture, samples_html)
from vlmcourse.runlog import RunLog, read_log

KINDS = ("up", "down")


def train(
    data,  # x and y
    val_data=None,  # not used
    *,
    learning_rate: float = 0.05,  # how far <each> step "goes"
    max_steps: int = 40,  # number of steps
    width: int = 4,  # hidden units
    bias: bool = True,  # with bias
    act: str = "tanh",  # "tanh" or "relu"
    mode: Literal["a", "b"] = "a",  # two ways
    direction: str = "up",  # one of KINDS
    layers: list | None = None,  # more layers
    share: float = 0.3,  # a share
    scale: float | None = None,  # a factor
    flag: bool | None = None,  # yes, no, or None
    wait: float = 0.0,  # seconds for each step
    fail: str = "",  # an error to raise
    hook=print,  # a function: has no place in a form
    seed: int = 0,  # the same seed gives the same run
    output_dir: str | None = None,  # folder of the run
    plot="auto",  # live curve
):
    "A real training of a small torch model by the course's loop."
    if fail: raise {"value": ValueError, "other": RuntimeError}[fail](f"{fail}: <b>broken</b> at once")
    torch.manual_seed(seed)
    make = torch.nn.Tanh if act == "tanh" else torch.nn.ReLU
    model = torch.nn.Sequential(torch.nn.Linear(1, width, bias=bias), make(), torch.nn.Linear(width, 1))

    def loss_fn(model, batch):
        time.sleep(wait)
        losses = (model(batch[:, :1]) - batch[:, 1:]) ** 2
        return losses.sum(), losses.numel()

    with RunLog(output_dir or run_dir(name="small"), dict(learning_rate=learning_rate), plot=plot, progress=False) as log:
        fit(model, loss_fn, data, collate=torch.tensor, log=log, max_steps=max_steps, learning_rate=learning_rate, seed=seed,
            evaluate=lambda model: dict(val_accuracy=.5, val_loss=1.), eval_steps=10)
    return log


DATA = [[x / 16, (x / 16) ** 2] for x in range(-16, 16)]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def field(name, f=train):
    return next(x for x in form_fields(f) if x.name == name)


def losses(folder):
    return [row["loss"] for row in read_log(folder)["train_history"]]


def until(done, seconds=60):
    end = time.time() + seconds
    while not done():
        assert time.time() < end, "it did not happen in time"
        time.sleep(.02)


# ---- forms

@pytest.mark.parametrize("name, kind, first", [
    ("learning_rate", "slider", 1e-6), ("max_steps", "slider", 1), ("width", "slider", 0), ("bias", "switch", None),
    ("act", "choice", "tanh"), ("mode", "choice", "a"), ("direction", "choice", "up"), ("layers", "text", None),
    ("share", "slider", 0), ("scale", "slider", None), ("flag", "choice", None), ("seed", "slider", 0), ("fail", "text", None)])
def test_kinds(name, kind, first):
    f = field(name)
    assert f.kind == kind
    assert f.stops == [] if kind in ("text", "switch") else f.stops[0] == first
    if f.stops: assert f.default in f.stops and len(f.stops) == len(set(map(str, f.stops)))


def test_left_out():
    names = [f.name for f in form_fields(train)]
    assert not {"data", "hook", "output_dir", "plot"} & set(names) and "val_data" in names


def test_stops_rise():
    for name, stops in RANGES.items():
        assert stops == sorted(set(stops)), name


def test_sft_form():
    "Every setting of the course's own training can be reached, and nothing about it is written in the panel."
    fields = {f.name: f for f in form_fields(sft.train)}
    assert {"learning_rate", "num_train_epochs", "lora_r", "eval_steps", "seed"} <= set(fields)
    assert fields["lr_scheduler_type"].kind == "choice" and "linear" in fields["lr_scheduler_type"].stops
    assert fields["learning_rate"].stops[0] is None and fields["max_steps"].stops[0] == -1
    assert all(f.help for f in fields.values())


def test_table_escapes():
    page = form_table(train)
    assert "how far &lt;each&gt; step" in page.html_text and "<each>" not in page.html_text and "<each>" in page.text


def test_every_value_of_the_form_comes_back():
    form = Form(train)
    for name, f in form.fields.items():
        for value in f.stops or ([True, False] if f.kind == "switch" else []):
            form.set(**{name: value})
            assert form.values[name] == value and type(form.values[name]) is type(value)
    form.reset()
    assert form.changed == {}


def test_new_stop_and_text():
    form = Form(train)
    form.set(learning_rate=0.0123, layers=[1, 2], scale=7)
    assert form.changed == dict(learning_rate=0.0123, layers=[1, 2], scale=7)
    form.set(layers=None, scale=None)
    assert form.changed == dict(learning_rate=0.0123)
    form.controls["layers"].value = "[1, 2"
    with pytest.raises(ValueError, match="layers: .* cannot be read"): form.values
    for bad in (dict(nothing=1), dict(act="gelu"), dict(learning_rate="fast")):
        with pytest.raises(ValueError): form.set(**bad)


def test_docments_are_tool_tips():
    form = Form(train)
    assert form.controls["learning_rate"].tooltip == 'learning_rate: how far <each> step "goes"'
    labels = "".join(child.value for child in form.box.children[0].children if hasattr(child, "value") and isinstance(child.value, str))
    assert "how far &lt;each&gt; step &quot;goes&quot;" in labels and "<each>" not in labels


def test_string_annotations():
    space = {}
    exec("from __future__ import annotations\ndef f(data, *, a: Unknown = 3, b: float | None = None): pass", space)
    assert [x.kind for x in form_fields(space["f"])] == ["text", "slider"] and form_fields(space["f"])[0].help == ""


# ---- the call

@pytest.mark.parametrize("options", [{}, dict(learning_rate=1e-3), dict(act="relu", layers=["a'b", 2], scale=1e-06, bias=False, seed=7)])
def test_call_can_be_run(options):
    "What is printed, run, gives the same arguments."
    got = {}
    def f(data, val_data=None, *, learning_rate: float = .05, act: str = "tanh", layers: list | None = None, scale: float | None = None,
          bias: bool = True, seed: int = 0): got.update(locals())
    text = call_text(f, "a 'quoted' name.json", **options)
    eval(text, dict(f=f))
    assert {k: got[k] for k in options} == options and got["data"] == "a 'quoted' name.json"
    assert all(k in text for k in options) and "val_data" not in text


def test_call_of_the_library():
    text = call_text(sft.train, "x.json", learning_rate=2e-3, seed=0)
    assert text == "from vlmcourse import sft\n\nsft.train('x.json', learning_rate=0.002)"


# ---- threads

def test_same_numbers_in_a_thread_and_in_a_call():
    training = Training(train, DATA, max_steps=15).start().wait()
    assert training.error is None and training.result.status == "finished"
    assert losses(training.folder) == losses(train(DATA, max_steps=15).output_dir)
    assert training.folder.name == "test_panel-001"


def test_pause_go_stop():
    training = Training(train, DATA, max_steps=300, wait=.03).start()
    until(lambda: (training.folder / "training_log.json").exists() and len(losses(training.folder)) > 3)
    training.ask("pause")
    time.sleep(.5)
    stood = len(losses(training.folder))
    time.sleep(.7)
    assert len(losses(training.folder)) == stood
    training.ask("go")
    until(lambda: len(losses(training.folder)) > stood)
    training.ask("stop")
    training.wait(30)
    done = losses(training.folder)
    assert not training.running and read_log(training.folder)["status"] == "stopped" and stood < len(done) < 300
    straight = train(DATA, max_steps=300)
    assert done == losses(straight.output_dir)[:len(done)], "a pause must not change the numbers"


def test_one_at_a_time():
    one = Training(train, DATA, max_steps=100, wait=.01).start()
    with pytest.raises(RuntimeError, match="A training is running"): Training(train, DATA).start()
    assert not Path("test_panel-002").exists()
    one.ask("stop") if (one.folder / "training_log.json").exists() else None
    one.wait()
    assert Training(train, DATA, max_steps=2).start().wait().error is None


def test_two_starts_at_the_same_moment():
    "However they meet, exactly one begins."
    made, began = [Training(train, DATA, max_steps=30, wait=.01) for _ in range(6)], []
    def go(t):
        try: t.start(); began.append(t)
        except RuntimeError: pass
    threads = [threading.Thread(target=go, args=(t,)) for t in made]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(began) == 1
    began[0].wait()


def test_failure_leaves_no_folder():
    training = Training(train, DATA, fail="value").start().wait()
    assert str(training.error) == "value: <b>broken</b> at once" and not training.folder.exists()
    assert "Traceback" in training.trace


def test_needs_output_dir():
    with pytest.raises(ValueError, match="takes no output_dir"): Training(lambda data: None, DATA)


# ---- pictures

def log_of(n, **more):
    rows = [dict(step=i, epoch=i / 10, samples=i, loss=2 / i, **{k: f(i) for k, f in more.items()}) for i in range(1, n + 1)]
    return dict(status="running", config={}, train_history=rows, val_history=[], best_checkpoint=None)


@pytest.mark.parametrize("log", [log_of(0), log_of(1), log_of(2), log_of(5000),
    {**log_of(3), "train_history": [dict(step=1, loss=None), dict(step=2, loss=1e30, epoch=1), dict(step=3, loss=-5.)]},
    {**log_of(3), "val_history": [dict(step=3, val_loss=2., val_accuracy=.5)], "total_steps": 2},
    {**log_of(0), "val_history": [dict(step=0, val_reward=2.)]}])
def test_pictures_of_odd_logs(log):
    import xml.etree.ElementTree as xml
    for smoothing in (None, 0, .99):
        svg = metric_svg(log, "loss", smoothing=smoothing)
        assert "nan" not in svg and "inf" not in svg
        xml.fromstring(svg)
    page = run_picture(log)
    assert len(page.html_text) < 90_000 and page.text.startswith("running")


def test_charts():
    log = log_of(30, reward=lambda i: i / 30, lr=lambda i: 1 / i)
    assert run_picture(log).html_text.count("<svg") == 2
    assert run_picture(log, more="lr").html_text.count("<svg") == 3
    assert run_picture(log, more="no such metric").html_text.count("<svg") == 2
    assert ">epoch mean<" in metric_svg(log, "loss") and ">epoch mean<" not in metric_svg(log, "loss", means=False)


def test_smoothing_draws_what_it_says():
    log = log_of(20)
    raw, bold = [line.split('points="')[1].split('"')[0] for line in metric_svg(log, smoothing=0, means=False).split("<polyline")[1:3]]
    assert raw == bold
    assert len(set(metric_svg(log, smoothing=w) for w in (0, .5, .9))) == 3


@pytest.mark.parametrize("values, low, high", [([], 0, 1), ([3, 3], None, None), ([0.1, 4], 0, None), ([2.5, 3], 2.48, 3.02), ([-1, 1], -1.08, 1.08)])
def test_limits(values, low, high):
    a, b = _limits(values)
    assert a < b and (low is None or a == pytest.approx(low)) and (high is None or b == pytest.approx(high, rel=.05))


def test_html_is_escaped(tmp_path):
    with RunLog(tmp_path / "run", progress=False) as log:
        log.train(step=1, epoch=1, samples=1, loss=1.)
        log.sample(1, [dict(id="<i>", question="<image><script>alert(1)</script>", answer="<b>x</b>", truth="<u>", strict=1.0)])
        log.finish("failed", error="<script>")
    page = samples_html(tmp_path / "run") + run_picture(tmp_path / "run").html_text
    assert "<script" not in page and "<b>x" not in page and "<u>" not in page and "&lt;script" in page and "✓" in page
    (tmp_path / "run" / "samples.jsonl").write_text('{"step": "<img src=x>", "question": "q", "answer": "a", "images": []}\n')  # a folder of somebody else
    assert "<img src=x" not in samples_html(tmp_path / "run")


def test_samples_over_time(tmp_path):
    from PIL import Image
    log = RunLog(tmp_path / "run", progress=False)
    for step in (0, 10, 20, 30, 40):
        log.sample(step, [dict(id=str(i), question=f"q{i}?", answer=f"at {step}", truth="t", strict=step / 40,
                               images=[Image.new("RGB", (96, 96), (i, step, 0))]) for i in range(6)])
    page = samples_html(tmp_path / "run", n=2, answers=3)
    assert "q1?" in page and "q2?" not in page and page.count("<img") == 2
    assert [step for step in (0, 10, 20, 30, 40) if f"step {step}:" in page] == [0, 30, 40]
    assert page.count("✓") == 2 and page.count("✗") == 4
    for file in (tmp_path / "run/samples").iterdir(): file.write_text("no picture")
    assert "no picture: " in samples_html(tmp_path / "run", n=6)


# ---- dashboard and panel

def test_panel_trains_and_shows():
    p = panel(train, DATA, mode="b")
    assert isinstance(p, Panel) and "mode" not in p.form.fields and "data" not in p.form.fields
    p.form.set(max_steps=12, learning_rate=.02)
    assert "learning_rate=0.02" in p.code and "mode='b'" in p.code
    p.go.click()
    assert p.go.disabled
    p.wait()
    assert not p.go.disabled and len(losses(p.training.folder)) == 12 and p.board.pause.disabled
    assert "finished: step 12 of 12" in p.board.earlier[0][1][0] and "<svg" in p.board.picture.value and not p.problem.value
    p.back.click()
    assert p.form.changed == {}
    p.go.click(), p.wait()
    assert len(p.board.earlier) == 2 and "40 of 40" in p.board.earlier[0][1][0]


def test_buttons_steer():
    p = panel(train, DATA, max_steps=3000, wait=.01)
    p.go.click()
    until(lambda: not p.board.pause.disabled and len(losses(p.training.folder)) > 2)
    p.board.pause.click()
    assert p.board.pause.description == "Go on"
    until(lambda: "paused: step" in p.board.picture.value)
    time.sleep(.5)
    stood = len(losses(p.training.folder))
    time.sleep(.5)
    assert len(losses(p.training.folder)) == stood
    p.board.pause.click()
    until(lambda: len(losses(p.training.folder)) > stood)
    p.board.stop.click()
    p.wait()
    assert read_log(p.training.folder)["status"] == "stopped" and "stopped: step" in p.board.picture.value
    assert p.board.frames < 200


def test_code_follows_the_form():
    p = panel(train, DATA)
    assert p.code_box.value == ""
    p.look.click()
    assert "train(" in p.code_box.value and "# data: what you gave" in p.code_box.value
    p.form.set(width=8)
    assert "width=8" in p.code_box.value
    p.form.controls["layers"].value = "[1,"
    assert "cannot be read" in p.code_box.value
    p.go.click()
    assert "cannot be read" in p.problem.value and p.training is None


@pytest.mark.parametrize("fail, start", [("value", "value: &lt;b&gt;broken"), ("other", "<b>RuntimeError</b>: other: &lt;b&gt;broken")])
def test_failure_is_one_paragraph(fail, start):
    p = panel(train, DATA, fail=fail)
    p.train().wait()
    assert start in p.problem.value and "Traceback" not in p.problem.value and not p.go.disabled
    assert p.board.picture.value == ""


def test_panel_arguments():
    with pytest.raises(ValueError, match="no argument learning_rat"): panel(train, DATA, learning_rat=1)
    def needs(data, reward, *, output_dir=None): pass
    with pytest.raises(ValueError, match="needs reward"): panel(needs, DATA)
    assert "val_data='v'" in panel(train, DATA, "v").code


def test_dashboard_follows_another_process(tmp_path):
    "A run of another program is drawn while it runs, stopped by its button, and kept at its end."
    folder = tmp_path / "other"
    code = ("import sys, time\nfrom vlmcourse.runlog import RunLog\n"
            f"with RunLog({str(folder)!r}, progress=False) as log:\n    log.start(10**6)\n"
            "    for i in range(1, 10**6):\n        log.train(step=i, epoch=i/100, samples=i, loss=1/i); time.sleep(.02)\n"
            "        if log.asked == 'stop': log.finish('stopped'); break\n")
    with pytest.raises(FileNotFoundError): dashboard(folder)
    program = subprocess.Popen([sys.executable, "-c", code])
    try:
        until(lambda: folder.exists() and (folder / "training_log.json").exists() and losses(folder))
        board = dashboard(folder)
        first = board.picture.value
        assert "running: step" in first
        until(lambda: board.picture.value != first)
        board.stop.click()
        assert program.wait(30) == 0
        board.wait()
    finally:
        program.kill()
    assert "stopped: step" in board.picture.value and board.stop.disabled


def test_dashboard_of_a_killed_run(tmp_path):
    folder = tmp_path / "killed"
    code = (f"from vlmcourse.runlog import RunLog\nimport os\nlog = RunLog({str(folder)!r}, progress=False)\n"
            "for i in range(1, 9): log.train(step=i, epoch=i, samples=i, loss=1/i)\nlog.save(); os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    board = dashboard(folder)
    assert board.ended and "its program was killed or has crashed: step 8" in board.picture.value


def test_dashboard_of_another_trainer(tmp_path):
    rows = [dict(step=i, epoch=i / 4, loss=3 / i, learning_rate=1e-3) for i in range(1, 9)] + [dict(step=8, eval_loss=.5)]
    (tmp_path / "trainer_state.json").write_text(json.dumps(dict(log_history=rows, global_step=8, max_steps=8)))
    board = dashboard(tmp_path)
    assert "finished: step 8 of 8, loss 3" in board.picture.value and "lr" in board.more.options
    board.more.value = "lr"
    assert board.picture.value.count("<svg") == 2


def test_looks_redraw(tmp_path):
    with RunLog(tmp_path / "run", progress=False) as log:
        for i in range(1, 60): log.train(step=i, epoch=i / 20, samples=i, loss=1 / i + i % 3, reward=i / 60)
    board = dashboard(tmp_path / "run")
    pages = [board.picture.value]
    board.smoothing.value = "0.9"
    pages.append(board.picture.value)
    board.means.value = False
    pages.append(board.picture.value)
    assert len(set(pages)) == 3 and board.picture.value.count("<svg") == 2


def test_frames_are_rare():
    "At most five frames a second, and a small share of the time, however fast the steps are."
    p = panel(train, DATA, max_steps=500)
    begin = time.time()
    p.train().wait()
    took = time.time() - begin
    assert p.board.frames <= 5 * took + 4 and p.board.seconds < .1 * took + .1, (p.board.frames, p.board.seconds, took)


def test_import_is_quick():
    code = "import sys, vlmcourse.panel; print([m for m in ('torch', 'ipywidgets', 'matplotlib', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert out.stdout.strip() == "[]", out.stdout + out.stderr

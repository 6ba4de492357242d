"Odd cases of vlmcourse.runlog: kills, readers at work, a real kernel, no IPython, hostile text."
import json, math, subprocess, sys, threading, time
import pytest

from vlmcourse.runlog import RunLog, clean_config, curve_svg, log_html, plot_log, read_log, smooth, status_line


def strict(path):
    "JSON as other languages read it: no NaN, no Infinity."
    def no(name): raise ValueError(name)
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=no)


def row(log, i, **kwargs): log.train(**(dict(step=i, epoch=i/10, samples=8*i, loss=1/i) | kwargs))


# --- the file ----------------------------------------------------------------
def test_schema(tmp_path):
    with RunLog(tmp_path/"r", dict(lr=1e-3), progress=False) as log:
        assert strict(log.path) == dict(status="running", config=dict(lr=1e-3), train_history=[], val_history=[], best_checkpoint=None)
        row(log, 1, lr=.1); log.val(step=1, epoch=.1, samples=8, val_accuracy=.5)
        log.best(step=1, epoch=.1, samples=8, metric="val_accuracy", value=.5, path=tmp_path/"best")
    got = strict(log.path)
    assert got == read_log(tmp_path/"r") == dict(
        status="finished", config=dict(lr=1e-3), train_history=[dict(step=1, epoch=.1, samples=8, loss=1., lr=.1)],
        val_history=[dict(step=1, epoch=.1, samples=8, val_accuracy=.5)],
        best_checkpoint=dict(step=1, epoch=.1, samples=8, metric="val_accuracy", value=.5, path=str(tmp_path/"best")))


def test_losses_come_back_to_the_last_digit(tmp_path):
    log = RunLog(tmp_path/"r", progress=False); losses = [math.pi**-i for i in range(1, 60)]
    for i, l in enumerate(losses, 1): row(log, i, loss=l)
    log.finish()
    assert [r["loss"] for r in read_log(tmp_path/"r")["train_history"]] == losses


@pytest.mark.parametrize("wait", [.0, .01, .05, .1, .2, .3])
def test_a_kill_leaves_a_whole_log(tmp_path, wait):
    code = (f"from vlmcourse.runlog import RunLog\nlog = RunLog({str(tmp_path/'r')!r},progress=False)\n"
            "for i in range(1,10**9):\n    log.train(step=i,epoch=0,samples=i,loss=1/i)\n    if i==1: print('go',flush=True)\n")
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    p.stdout.readline(); time.sleep(wait); p.kill(); p.wait()
    got = strict(tmp_path/"r"/"training_log.json")
    assert got["status"] == "running"
    assert [r["step"] for r in got["train_history"]] == list(range(1, len(got["train_history"])+1))


def test_a_reader_never_sees_half_a_log(tmp_path):
    log, seen, done = RunLog(tmp_path/"r", progress=False), [], threading.Event()
    def read():
        while not done.is_set(): seen.append(len(read_log(log.path)["train_history"]))
    t = threading.Thread(target=read); t.start()
    for i in range(1, 1500): row(log, i); log.save() if i % 15 == 0 else None
    log.finish(); done.set(); t.join()
    assert seen == sorted(seen) and len(seen) > 5


@pytest.mark.parametrize("v", [math.nan, math.inf, -math.inf])
def test_no_number_is_null(tmp_path, v):
    import numpy as np, torch
    with RunLog(tmp_path/"r", dict(a=v, b=[v]), progress=False) as log:
        for i, x in enumerate((v, np.float32(v), torch.tensor(v)), 1): row(log, i, loss=x, kl=x)
        log.val(step=3, epoch=1, samples=1, val_loss=v)
        log.best(step=3, epoch=1, samples=1, metric="val_loss", value=v, path="x")
    got = strict(log.path)
    assert got["config"] == dict(a=None, b=[None]) and {r["loss"] for r in got["train_history"]} == {None}
    assert "<svg" in log_html(log)


@pytest.mark.parametrize("error,status", [(ValueError("x"), "failed"), (KeyboardInterrupt(), "stopped"), (SystemExit(1), "failed")])
def test_every_ending_is_written(tmp_path, error, status):
    with pytest.raises(type(error)):
        with RunLog(tmp_path/"r", progress=False) as log:
            for i in range(1, 8): row(log, i)
            raise error
    got = strict(log.path)
    assert got["status"] == status and len(got["train_history"]) == 7


def test_the_first_ending_stays_and_late_rows_are_kept(tmp_path):
    log = RunLog(tmp_path/"r", progress=False)
    log.finish("stopped"); log.finish(); log.finish("failed", error="x")
    log.val(step=1, epoch=1, samples=1, val_accuracy=1.)
    got = strict(log.path)
    assert got["status"] == "stopped" and "error" not in got and len(got["val_history"]) == 1
    with pytest.raises(ValueError, match="not known"): log.finish("done")


def test_a_run_is_not_overwritten(tmp_path):
    with RunLog(tmp_path/"r", progress=False) as log: row(log, 1)
    before = log.path.read_bytes()
    with pytest.raises(FileExistsError): RunLog(tmp_path/"r")
    assert log.path.read_bytes() == before


# --- secrets and hostile text ------------------------------------------------
@pytest.mark.parametrize("config,hidden", [
    (dict(api_key="abc"), True), (dict(OPENAI_API_KEY="abc"), True), (dict(hub_token="abcdefghijkl"), True), (dict(password="p"), True),
    (dict(a=dict(b=[dict(client_secret="x")])), True), (dict(cmd="run --key sk-abcdefghijklmnop"), True),
    (dict(url="https://me:secret@host/x"), True), (dict(x="hf_ABCDEFGHIJKLMNOPQRST"), True), (dict(env="TOKEN=ghp_abcdefghijklmnop123"), True),
    (dict(max_new_tokens=96), False), (dict(image_token="<|image_pad|>"), False), (dict(metric_key="accuracy"), False),
    (dict(url="https://host/x@y"), False), (dict(model="tiny", tokens="a b c"), False), (dict(password=None, api_key=""), False)])
def test_secrets(config, hidden): assert ("***" in json.dumps(clean_config(config))) == hidden


def test_secrets_in_an_error(tmp_path):
    with pytest.raises(OSError):
        with RunLog(tmp_path/"r", progress=False) as log: raise OSError("no access with hf_ABCDEFGHIJKLMNOPQRST")
    assert "ABCDEF" not in log.path.read_text() and "ABCDEF" not in log_html(log)


def test_anything_can_be_a_setting():
    import numpy as np, torch
    got = clean_config(dict(f=len, o=object(), m=torch.nn.Linear(1, 1), t=torch.ones(2), n=np.float32(1), s={1}, none=None, t2=(1, "ä")))
    assert got == dict(f="len", o="<object>", m="<Linear>", t=[1., 1.], n=1., s=[1], none=None, t2=[1, "ä"])


def test_text_is_never_html(tmp_path):
    evil = "<script>alert('x')</script>"
    with pytest.raises(ValueError):
        with RunLog(tmp_path/"r", progress=False) as log:
            row(log, 1); log.val(step=1, epoch=1, samples=1, **{"val_"+evil: .5}); log.say(evil)
            assert "<script" not in log_html(log)
            raise ValueError(evil)
    assert "<script" not in log_html(log) and "&lt;script" in log_html(log)


# --- curves ------------------------------------------------------------------
@pytest.mark.parametrize("losses", [[], [1.], [0., 0.], [-1., -2.], [1e-30, 1e-31], [1e300, -1e300], [None, 1., None], [None], [5., 5.]])
def test_any_losses_make_a_picture(losses):
    import xml.etree.ElementTree as ET
    rows = [dict(step=i, loss=l) for i, l in enumerate(losses, 1)]
    svg = curve_svg(rows, [dict(step=0, val_loss=None, val_a=1.), dict(step=1, val_loss=2., val_a=None)])
    ET.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg


def test_a_long_run_makes_a_small_picture():
    rows = [dict(step=i, loss=1/i) for i in range(1, 50001)]
    t = time.perf_counter(); svg = curve_svg(rows); took = time.perf_counter()-t
    assert len(svg) < 20000 and took < .5


def test_smooth_of_nothing(): assert smooth([], .9) == [] and smooth([None, None], .9) == [None, None]


def test_plot_log_says_what_there_is(tmp_path):
    import matplotlib; matplotlib.use("Agg")
    with RunLog(tmp_path/"r", progress=False) as log:
        for i in range(1, 21): row(log, i)
        log.val(step=20, epoch=2, samples=160, val_accuracy=.75, val_loss=.2)
    for source in (log, tmp_path/"r", str(log.path), read_log(log.path)):
        assert plot_log(source).get_title().startswith("loss 1 → 0.0")
    assert plot_log(log, metric="val_accuracy").get_ylabel() == "val_accuracy"
    with pytest.raises(ValueError, match="It has: loss, val_accuracy"): plot_log(log, metric="reward")


# --- what it costs -----------------------------------------------------------
def test_under_a_millisecond_a_step(tmp_path):
    log = RunLog(tmp_path/"r", progress=False); log.start(20000)
    t = time.process_time()
    for i in range(1, 20001): row(log, i, lr=1e-3, grad_norm=.5)
    assert (time.process_time()-t)/20000 < 1e-3
    log.finish(); assert len(read_log(log.path)["train_history"]) == 20000


# --- where it is shown -------------------------------------------------------
CODE = """
import time
from vlmcourse.runlog import RunLog
with RunLog({folder!r}) as log:
    log.start(40)
    for i in range(1,41):
        time.sleep(.02); log.train(step=i,epoch=i/10,samples=i,loss=1/i)
        if i%20==0: log.val(step=i,epoch=i/10,samples=i,val_accuracy=i/40)
"""


@pytest.mark.parametrize("first", ["", "import sys; sys.modules['IPython'] = None\n"])
def test_in_a_terminal(tmp_path, first):
    r = subprocess.run([sys.executable, "-c", first+CODE.format(folder=str(tmp_path/"r"))], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and r.stdout == ""
    assert "40/40" in r.stderr and "done: 40 steps" in r.stderr


def test_in_a_notebook(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    class Client(nbclient.NotebookClient):
        updates = 0
        def process_message(self, msg, cell, index):
            self.updates += msg["msg_type"] == "update_display_data"
            return super().process_message(msg, cell, index)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE.format(folder=str(tmp_path/"r")))])
    c = Client(nb, kernel_name="python3", timeout=120); c.execute()
    outputs = nb.cells[0].outputs
    assert len(outputs) == 1 and outputs[0].output_type == "display_data"          # one picture, nothing on stderr
    html = outputs[0].data["text/html"]
    assert 'class="vlm-live"' in html and "<svg" in html and "done: 40 steps" in html and "accuracy 1.000" in html
    assert outputs[0].data["text/plain"].startswith("done")
    took = float(html.split("40 steps in ")[1].split(" s")[0])
    assert 2 <= c.updates <= 5*took+6                                              # at most five a second, and start, validations, end


def test_status_line(tmp_path):
    log = RunLog(tmp_path/"r", progress=False)
    assert status_line(log) == "starting"
    log.say("evaluating"); assert status_line(log) == "starting (evaluating)"
    log.start(10); time.sleep(.02); row(log, 5)
    assert status_line(log).startswith("step 5 of 10, loss 0.2, ") and status_line(log).endswith("s left")
    log.finish("stopped"); assert status_line(log) == "stopped at step 5 of 10, loss 0.2"

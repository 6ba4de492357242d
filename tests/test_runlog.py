"Odd cases of vlmcourse.runlog: kills, readers at work, a real kernel, no IPython, hostile text, boards, other trainers' logs."
import csv, json, math, os, random, subprocess, sys, threading, time
import pytest

from vlmcourse import runlog
from vlmcourse.curves import curve_svg, epoch_table, smooth
from vlmcourse.runlog import (RunLog, ask_run, clean_config, is_running, log_html, plot_log, read_log, read_samples,
                              status_line, tracker_tag)


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
    assert "<svg" in log_html(log) and "no loss yet" in status_line(log)


def test_a_lost_loss_is_said(tmp_path):
    with RunLog(tmp_path/"r", progress=False) as log:
        for i, x in enumerate((2., 1., math.nan), 1): row(log, i, loss=x)
    assert "loss 2 → no number" in status_line(log)


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
    (dict(url="https://host/x@y"), False), (dict(model="tiny", tokens="a b c"), False), (dict(password=None, api_key=""), False),
    ({"api-key": "abc"}, True), ({"X-Api-Key": "abc"}, True), (dict(apiKey="abc"), True), (dict(hubToken="abcdefghijkl"), True), (dict(HFToken="abcdefghijkl"), True),
    (dict(password=12345), True), (dict(api_keys=["a", "b"]), True), (dict(credentials=dict(user="a", word="b")), True), (dict(hub_token=["abcdefghijkl"]), True),
    (dict(passphrase="x"), True), (dict(sessionCookie="x"), True), (dict(url="https://host/x?n=1&api_key=a1"), True), (dict(url="http://host/?Token=a1"), True),
    (dict(url="https://abc123@host/x"), True), (dict(url="https://me:p@ss@host/x"), True),
    (dict(use_auth_token=True), False), (dict(api_keys=[], secrets={}), False), (dict(stop_token=["<|im_end|>", "<|endoftext|>"]), False),
    (dict(key=3, eos_token_id=151645), False), (dict(url="https://host/x?n=1&page=2"), False), (dict(url="https://host/?mail=me@x"), False)])
def test_secrets(config, hidden): assert ("***" in json.dumps(clean_config(config))) == hidden


def test_of_an_address_only_the_secret_is_hidden():
    assert clean_config(["https://me:p@ss@host/x?n=1&api_key=a1&m=2", "see https://host/a, mail me@x"]) == [
        "https://***@host/x?n=1&api_key=***&m=2", "see https://host/a, mail me@x"]


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
    t = time.process_time(); svg = curve_svg(rows); took = time.process_time()-t
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


# --- epochs ------------------------------------------------------------------
def test_epochs_equal_numpy(tmp_path):
    import numpy as np
    rng = np.random.default_rng(0)
    with RunLog(tmp_path/"r", progress=False) as log:
        for i in range(1, 101):                                        # 7 rows an epoch, the last one not full
            log.train(step=i, epoch=i/7, samples=i, loss=rng.normal(), **({"reward": rng.normal()} if i % 3 else {}))
            if i % 10 == 0: log.val(step=i, epoch=i/7, samples=i, val_loss=i)
    rows = log.train_history
    table = list(csv.DictReader(open(tmp_path/"r"/"training_history.csv")))
    assert len(table) == 15 == len(epoch_table(rows))
    for k in ("loss", "reward"):
        for line in table:
            values = [r[k] for r in rows if r.get(k) is not None and math.ceil(r["epoch"]-1e-9) == int(line["epoch"])]
            assert float(line[k+"_mean"]) == pytest.approx(np.mean(values)) and float(line[k+"_std"]) == pytest.approx(np.std(values))
    val = list(csv.DictReader(open(tmp_path/"r"/"validation_history.csv")))
    assert sum(int(r["rows"]) for r in val) == 10 and float(val[0]["val_loss_mean"]) > 0


@pytest.mark.parametrize("values,mean", [([], None), ([None, None], None), ([1e308, 1e308, -1e308], 1e308/3), ([5], 5.), ([0., None, 2.], 1.)])
def test_epochs_of_odd_values(values, mean):
    table = epoch_table([dict(step=i, epoch=1., samples=i, loss=v) for i, v in enumerate(values)])
    assert [r["loss_mean"] for r in table] == ([pytest.approx(mean)] if values and mean is not None else [None]*bool(values))


def test_tables_are_whole_while_written(tmp_path):
    log, seen, done = RunLog(tmp_path/"r", progress=False), [], threading.Event()
    def read():
        while not done.is_set():
            if (tmp_path/"r"/"training_history.csv").exists():
                rows = list(csv.DictReader(open(tmp_path/"r"/"training_history.csv")))
                assert all(None not in r.values() for r in rows), rows
                seen.append(len(rows))
    t = threading.Thread(target=read); t.start()
    for i in range(1, 200): log.train(step=i, epoch=i/10, samples=i, loss=i); log.save() if i % 10 == 0 else None
    log.finish(); done.set(); t.join()
    assert seen == sorted(seen) and seen[-1] >= 15


# --- going on ----------------------------------------------------------------
def steps(log, first, last):
    rng = random.Random(0); losses = [rng.gauss(1, .3) for _ in range(last)]
    for i in range(first, last+1):
        row(log, i, loss=losses[i-1])
        if i % 5 == 0: log.val(step=i, epoch=i/10, samples=8*i, val_loss=losses[i-1])
        if i % 7 == 0: log.sample(i, [dict(id=str(j), answer="é"*j) for j in range(3)])
        if i % 10 == 0: log.best(step=i, epoch=i/10, samples=8*i, metric="val_loss", value=losses[i-1], path=f"checkpoint-{i}")


@pytest.mark.parametrize("cut,back", [(1, 0), (7, 3), (24, 20), (30, 30), (39, 7)])
def test_a_run_with_a_stop_is_the_run_without(tmp_path, cut, back):
    log = RunLog(tmp_path/"whole", dict(a=1), progress=False); log.start(40); steps(log, 1, 40); log.finish()
    log = RunLog(tmp_path/"cut", dict(a=1), progress=False); log.start(40); steps(log, 1, cut); log.save()
    log = RunLog(tmp_path/"cut", progress=False, resume_step=back)     # no config given: the old one
    assert log.status == "running" and len(log.train_history) == back
    log.start(40); steps(log, back+1, 40); log.finish()
    for name in ("training_log.json", "samples.jsonl", "training_history.csv", "validation_history.csv"):
        assert (tmp_path/"cut"/name).read_bytes() == (tmp_path/"whole"/name).read_bytes(), name


def test_going_on_after_kills(tmp_path):
    "Killed at random moments and taken up each time from a multiple of 10: in the end all is there once, in order."
    code = ("import sys; sys.path.insert(0, sys.argv[3])\nfrom test_runlog import *\n"
            "log = RunLog(sys.argv[1], progress=False, resume_step=int(sys.argv[2]) if sys.argv[2]!='-1' else None)\nprint('go', flush=True)\n"
            "for i in range(max(0,int(sys.argv[2]))+1, 121):\n"
            "    steps(log, i, i); time.sleep(.004)\n    if i % 10 == 0: log.save(); print(i, flush=True)\nlog.finish()\n")
    rng, at = random.Random(1), -1
    for _ in range(20):
        p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"r"), str(at), os.path.dirname(__file__)], stdout=subprocess.PIPE, text=True)
        assert p.stdout.readline() == "go\n"
        rest = [p.stdout.readline() for _ in range(rng.randint(0, 2))]
        time.sleep(rng.random()*.02); p.kill(); rest = "".join(rest+[p.stdout.read()]).split(); p.wait()
        assert is_running(tmp_path/"r") is False
        at = int(rest[-1]) if rest else max(at, 0)
        if at >= 120: break
    else: pytest.fail(f"only at step {at} after 20 starts")
    log = RunLog(tmp_path/"r", progress=False, resume_step=120); log.finish()
    assert [r["step"] for r in read_log(tmp_path/"r")["train_history"]] == list(range(1, 121))
    assert [(r["step"], r["id"]) for r in read_samples(tmp_path/"r")] == [(i, str(j)) for i in range(7, 121, 7) for j in range(3)]


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_bad_resume_step(tmp_path, step):
    RunLog(tmp_path/"r", progress=False).finish()
    with pytest.raises(ValueError, match="resume_step"): RunLog(tmp_path/"r", progress=False, resume_step=step)


def test_nothing_to_go_on_with(tmp_path):
    with pytest.raises(ValueError, match="needs output_dir"): RunLog(progress=False, resume_step=1)
    with pytest.raises(FileNotFoundError, match="training_log.json"): RunLog(tmp_path/"none", progress=False, resume_step=1)
    assert not (tmp_path/"none").exists()


LIVE = """
import sys, time
from vlmcourse.runlog import RunLog
with RunLog(sys.argv[1], progress=False) as log:
    log.start(1000); print("go", flush=True)
    for i in range(1, 1001):
        time.sleep(.02); log.train(step=i, epoch=i/10, samples=i, loss=1/i)
        while log.asked == "pause": time.sleep(.01)
        if log.asked == "stop": log.finish("stopped"); break
"""


def live(folder):
    p = subprocess.Popen([sys.executable, "-c", LIVE, str(folder)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "go\n"
    return p


def n_rows(folder): return len(read_log(folder)["train_history"])


def wait_for(what, seconds=30):
    end = time.time()+seconds
    while not what() and time.time() < end: time.sleep(.02)
    assert what()


def test_asked_from_outside(tmp_path):
    p = live(tmp_path/"r"); wait_for(lambda: n_rows(tmp_path/"r") > 3)
    with pytest.raises(ValueError, match="still running"): RunLog(tmp_path/"r", progress=False, resume_step=1)
    assert is_running(tmp_path/"r") is True
    ask_run(tmp_path/"r", "pause"); time.sleep(.4); n = n_rows(tmp_path/"r"); time.sleep(.4)
    assert n_rows(tmp_path/"r") == n                                   # it waits
    ask_run(tmp_path/"r", "go"); wait_for(lambda: n_rows(tmp_path/"r") > n)
    ask_run(tmp_path/"r", "pause"); ask_run(tmp_path/"r", "stop")      # to stop is stronger, but this loop waits first
    (tmp_path/"r"/"PAUSE").unlink(missing_ok=True)
    assert p.wait(30) == 0
    assert read_log(tmp_path/"r")["status"] == "stopped" and is_running(tmp_path/"r") is False
    assert {q.name for q in (tmp_path/"r").iterdir()} == {"training_log.json", "training_history.csv", "validation_history.csv"}
    with pytest.raises(ValueError, match="is over"): ask_run(tmp_path/"r", "stop")
    with pytest.raises(FileNotFoundError): ask_run(tmp_path/"none", "stop")


def test_no_second_writer_before_the_first_row(tmp_path):
    code = "import sys, time; from vlmcourse.runlog import RunLog\nRunLog(sys.argv[1], dict(a=1), progress=False); print('go', flush=True); time.sleep(60)"
    p = subprocess.Popen([sys.executable, "-c", code, str(tmp_path/"r")], stdout=subprocess.PIPE, text=True)
    try:
        assert p.stdout.readline() == "go\n"
        with pytest.raises(ValueError, match=f"process {p.pid}"): RunLog(tmp_path/"r", dict(a=2), progress=False)
        assert read_log(tmp_path/"r")["config"] == dict(a=1)
        RunLog(tmp_path/"r", progress=False, write=False)                  # a helper that only looks on
    finally: p.kill(); p.wait()
    RunLog(tmp_path/"r", dict(a=2), progress=False).finish()           # it is dead, and has no row
    assert read_log(tmp_path/"r")["config"] == dict(a=2)


def test_old_wishes_are_forgotten(tmp_path):
    log = RunLog(tmp_path/"r", progress=False); row(log, 1); ask_run(tmp_path/"r", "stop"); log.save()
    assert log.asked == "stop"
    log = RunLog(tmp_path/"r", progress=False, resume_step=1)          # as after a kill
    assert log.asked is None; log.finish()


@pytest.mark.parametrize("text", ["", "x", "[]", "{}", '{"pid": "x", "host": "HOST", "since": 0}', '{"pid": 1, "host": "elsewhere", "since": 0}',
                                  '{"pid": 1, "host": "HOST", "since": 0}', '{"pid": -5, "host": "HOST", "since": 0}'])
def test_odd_notes_of_a_process(tmp_path, text):
    import socket
    RunLog(tmp_path/"r", progress=False).finish()
    (tmp_path/"r"/"RUNNING").write_text(text.replace("HOST", socket.gethostname()))
    assert is_running(tmp_path/"r") is (None if "elsewhere" in text else False)


# --- samples -----------------------------------------------------------------
def test_samples(tmp_path):
    import numpy as np
    from PIL import Image
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (500, 700, 3), np.uint8)) for i in range(10)]
    pictures[0].save(tmp_path/"p.png")
    log = RunLog(tmp_path/"r", progress=False)
    log.sample(0, [dict(id=str(i), answer="a", images=[p]) for i, p in enumerate(pictures)])
    log.sample(5, [dict(id="0", answer="a\nb\u2028c", strict=np.float32(1), score=math.nan, images=[tmp_path/"p.png"], step=99)])
    first, last = read_samples(tmp_path/"r", 0), read_samples(tmp_path/"r", 5)
    assert len(first) == 10 and [len(r["images"]) for r in first] == [1]*8+[0]*2 and first[9]["images_left_out"] == 1
    assert last == [dict(id="0", answer="a\nb\u2028c", strict=1., score=None, step=5, images=first[0]["images"])]
    kept = list((tmp_path/"r"/"samples").iterdir())
    assert len(kept) == 8 and all(Image.open(p).size == (336, 240) for p in kept)
    assert pictures[0].size == (700, 500)                              # the original is as it was
    log.sample(6, []); assert len(read_samples(tmp_path/"r")) == 11


@pytest.mark.parametrize("rows,error", [(["text"], "must be a dict"), ([dict(images=["none.png"])], "none.png"), ([dict(images=[3])], "path or a PIL image")])
def test_bad_samples(tmp_path, rows, error):
    log = RunLog(tmp_path/"r", progress=False)
    with pytest.raises((ValueError, FileNotFoundError), match=error): log.sample(1, rows)
    assert read_samples(tmp_path/"r") == []


def test_samples_that_lead_out(tmp_path):
    log = RunLog(tmp_path/"r", progress=False); log.sample(1, [dict(id="a")])
    with open(tmp_path/"r"/"samples.jsonl", "a") as f: f.write('{"step": 1, "images": ["../../etc/passwd"]}\n')
    with pytest.raises(ValueError, match="leads out"): read_samples(tmp_path/"r")
    (tmp_path/"r"/"samples.jsonl").write_text('{"step": 1, "id": "a"}\n{"step": 2, "id"')          # cut off by a kill
    assert [r["id"] for r in read_samples(tmp_path/"r")] == ["a"]
    (tmp_path/"r"/"samples.jsonl").write_text('oops\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not valid"): read_samples(tmp_path/"r")
    with pytest.raises(FileNotFoundError): read_samples(tmp_path/"none")


def test_a_new_run_has_no_old_samples(tmp_path):
    log = RunLog(tmp_path/"r", progress=False); log.sample(0, [dict(id="old")])      # ended before its first row
    log = RunLog(tmp_path/"r", progress=False)
    assert read_samples(tmp_path/"r") == []


def test_samples_are_data_and_not_hidden(tmp_path):
    from vlmcourse.evaluate import Scores, compare_table, score_answers
    text = "https://a.org/?key=3"
    records = [dict(id=text, images=[], messages=[dict(role="user", content="Which address?"), dict(role="assistant", content=text)])]
    scores = Scores(score_answers([text], records))
    log = RunLog(tmp_path/"r", dict(cookie=.5, url=text), progress=False)
    log.sample(0, [scores.rows[0] | dict(question=text, parts=dict(cookie=.5, secret=None, api_key=True, password=[1, 2.], private_key=10**12))])
    row = read_samples(tmp_path/"r")[0]
    assert row["parts"] == dict(cookie=.5, secret=None, api_key=True, password=[1, 2.], private_key=10**12)
    assert [row[k] for k in ("id", "question", "answer", "truth")] == [text]*4
    assert len(compare_table(dict(memory=scores, file=Scores([row]))).rows) > 0
    log.sample(1, [dict(id="a", note=text, parts=dict(api_key="abc"), truth=3)])       # text elsewhere is hidden as before
    last = read_samples(tmp_path/"r", 1)[0]
    assert (last["note"], last["parts"], last["truth"]) == ("https://a.org/?key=***", dict(api_key="***"), 3)
    assert log.config == dict(cookie="***", url="https://a.org/?key=***")


# --- boards ------------------------------------------------------------------
@pytest.mark.parametrize("name,tag", [
    ("loss", "Train/Loss"), ("reward", "Train/Reward_Mean"), ("accuracy", "Train/Accuracy_Mean"), ("val_loss", "Val/Loss"), ("lr", "Train/LR"),
    ("val_accuracy", "Val/Accuracy_Mean"), ("val_reward", "Val/Reward_Mean"), ("rewards/accuracies", "Train/Accuracy_Mean"), ("kl", "Train/KL"),
    ("rewards/chosen", "Train/Rewards/Chosen"), ("reward_std", "Train/Reward_Std"), ("grad_norm", "Train/Grad_Norm")])
def test_tags(name, tag): assert tracker_tag(name) == tag


def board(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    b = EventAccumulator(str(folder/"tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in b.Scalars(tag)] for tag in b.Tags()["scalars"]}


def test_tensorboard_with_a_stop(tmp_path):
    log = RunLog(tmp_path/"r", progress=False, report_to="tensorboard")
    for i in range(1, 9): row(log, i, loss=i, reward=None if i == 2 else -i)
    log.finish("stopped")
    log = RunLog(tmp_path/"r", progress=False, report_to=["tensorboard"], resume_step=5)
    for i in range(6, 11): row(log, i, loss=10*i)
    log.val(step=10, epoch=1., samples=80, val_accuracy=.5); log.finish()
    got = board(tmp_path/"r")
    assert got["Train/Loss"] == [(i, float(i)) for i in range(1, 6)]+[(i, 10.*i) for i in range(6, 11)]
    assert [s for s, _ in got["Train/Reward_Mean"]] == [1, 3, 4, 5] and got["Val/Accuracy_Mean"] == [(10, .5)]


SECRET = "hf_ABCDEFGHIJKLMNOPQRST"


def test_wandb_offline_holds_all_and_no_secret(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in list(os.environ):
        if name.startswith("WANDB"): monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline"); monkeypatch.setenv("MY_API_KEY", SECRET)
    monkeypatch.setattr(sys, "argv", ["train.py", "--hub_token", SECRET])
    with RunLog(tmp_path/"r", dict(lr=.5, hub_token=SECRET, note="key "+SECRET), progress=False, report_to="wandb") as log:
        for i in range(1, 21): row(log, i, reward=i)
        log.val(step=20, epoch=2., samples=160, val_accuracy=.75)
    data = next((tmp_path/"r").glob("wandb/offline*/*.wandb"))
    wait_for(lambda: b"Val/Accuracy_Mean" in data.read_bytes())        # W&B's own program writes a moment later
    files = [p for p in (tmp_path/"r").rglob("*") if p.is_file()]
    assert len(files) > 5 and not [p for p in files if SECRET.encode() in p.read_bytes()]
    for name in (b"Train/Loss", b"Train/Reward_Mean", b"***"): assert name in data.read_bytes()
    assert (tmp_path/"r"/"wandb_id").read_text()


def test_trackio_local(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio wants an older Pillow than the course")
    code = ("import sys; from vlmcourse.runlog import RunLog\n"
            "with RunLog(sys.argv[1], dict(api_key='K1234567'), progress=False, report_to='trackio') as log:\n"
            "    for i in range(1, 11): log.train(step=i, epoch=i/5, samples=i, loss=1/i)\n")
    env = dict(os.environ, TRACKIO_DIR=str(tmp_path/"t"), HF_HUB_OFFLINE="1")
    r = subprocess.run([sys.executable, "-c", code, str(tmp_path/"r")], env=env, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0 and all(l.startswith("* Run finished") for l in r.stdout.splitlines()), r    # trackio's own last word
    import sqlite3
    db = next((tmp_path/"t").glob("*.db"))
    rows = sqlite3.connect(db).execute("select step, metrics from metrics order by step").fetchall()
    assert [s for s, _ in rows] == list(range(1, 11)) and "Train/Loss" in str(rows[0][1]) and b"K1234567" not in db.read_bytes()


def test_a_board_that_fails_does_not_stop_the_training(tmp_path, monkeypatch):
    class Bad:
        def __init__(self, log): pass
        def log(self, values, step):
            if step == 3: raise OSError("no network with "+SECRET)
        def close(self): raise AssertionError("it must not be used any more")
    monkeypatch.setitem(runlog._boards, "json", Bad)                   # `json` is installed, so it passes the check
    with pytest.warns(UserWarning, match="json failed and gets no more rows") as seen:
        with RunLog(tmp_path/"r", progress=False, report_to="json") as log:
            for i in range(1, 9): row(log, i)
    assert len(read_log(tmp_path/"r")["train_history"]) == 8 and SECRET not in str(seen[0].message)


@pytest.mark.parametrize("to", [(), None, "none", "", [], ["none"]])
def test_no_board(tmp_path, to):
    log = RunLog(tmp_path/"r", progress=False, report_to=to)
    assert log._trackers is None; log.finish()


def test_boards_are_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(runlog, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb trackio"): RunLog(tmp_path/"r", report_to="wandb, trackio")
    with pytest.raises(ValueError, match="report_to='mlflow' is not known"): RunLog(tmp_path/"r", report_to="mlflow")
    assert not (tmp_path/"r").exists()


def test_lines_in_a_terminal(tmp_path):
    code = CODE+"    log.best(step=40, epoch=4, samples=40, metric='val_accuracy', value=1, path='runs/x/best')\n"
    r = subprocess.run([sys.executable, "-c", code.format(folder=str(tmp_path/"r"))], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0 and "validation at step 20: accuracy 0.5" in r.stderr
    assert "best so far: val_accuracy 1 at step 40, saved in runs/x/best" in r.stderr


# --- curves of any metric ----------------------------------------------------
def test_curves_of_reward_and_kl():
    import xml.etree.ElementTree as ET
    rows = [dict(step=i, epoch=i/10, loss=1/i, reward=i, kl=.1) for i in range(1, 41)]
    val = [dict(step=40, val_accuracy=.5, val_reward=3.)]
    for kwargs, wanted in ((dict(), ("loss", "reward", "kl", "accuracy 0.500")), (dict(metrics=["reward"]), ("reward",)),
                           (dict(epochs=True), ("epoch mean",)), (dict(metrics=["loss", "lr"]), ("loss", "lr"))):
        svg = curve_svg(rows, val, **kwargs); ET.fromstring(svg)
        for name in wanted: assert f">{name}<" in svg, name
    assert "epoch mean" not in curve_svg(rows, val) and ">reward<" not in curve_svg(rows, metrics=["loss"])
    assert "epoch mean" not in curve_svg(rows[:10], epochs=True)       # one epoch has no trend


def test_plot_with_epochs(tmp_path):
    import matplotlib; matplotlib.use("Agg")
    rows = [dict(step=i, epoch=i/10, loss=i % 10, reward=i) for i in range(1, 31)]
    log = dict(train_history=rows, val_history=[])
    ax = plot_log(log, metric="reward", epochs=True)
    means = next(l for l in ax.lines if l.get_label().startswith("epoch mean"))
    assert list(means.get_ydata()) == [5.5, 15.5, 25.5] and list(means.get_xdata()) == [5.5, 15.5, 25.5]
    assert len(plot_log(log, metric="reward").lines) == 2


# --- logs of other trainers --------------------------------------------------
def lines(path, *rows, end="\n"):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)+end)
    return path


def test_which_log_of_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no log of another trainer"): read_log(tmp_path)
    for step in (9, 10):
        (tmp_path/f"checkpoint-{step}").mkdir()
        (tmp_path/f"checkpoint-{step}"/"trainer_state.json").write_text(json.dumps(dict(log_history=[dict(step=step, loss=1.)], max_steps=20, global_step=step)))
    assert read_log(tmp_path)["train_history"][-1]["step"] == 10 and read_log(tmp_path)["status"] == "unknown"
    lines(tmp_path/"trainer_log.jsonl", dict(current_steps=11, total_steps=20, loss=1.))
    assert read_log(tmp_path)["train_history"][-1]["step"] == 11
    RunLog(tmp_path, progress=False).finish()
    assert read_log(tmp_path)["status"] == "finished"


def test_nan_of_transformers(tmp_path):
    (tmp_path/"trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": NaN, "epoch": 1.0}, {"step": 1, "eval_loss": Infinity}], "max_steps": 1, "global_step": 1}')
    log = read_log(tmp_path)
    assert log["status"] == "finished" and log["train_history"] == [dict(step=1, epoch=1., samples=None, loss=None)]
    assert log["val_history"] == [dict(step=1, epoch=None, samples=None, val_loss=None)]


def state(path, *rows):
    path.write_text(json.dumps(dict(log_history=list(rows), max_steps=9, global_step=rows[-1]["step"]))); return read_log(path)


def test_several_held_out_sets_are_one_row(tmp_path):
    log = state(tmp_path/"trainer_state.json", dict(step=2, epoch=1., loss=3.), dict(step=2, eval_a_loss=1., epoch=1., eval_entropy=.5),
                dict(step=2, eval_b_loss=2., epoch=1., eval_entropy=.6), dict(step=2, extra=7.), dict(step=4, eval_a_loss=.5), dict(step=4, eval_b_loss=.7))
    assert log["train_history"] == [dict(step=2, epoch=1., samples=None, loss=3., extra=7.)]
    assert [(r["step"], r["val_a_loss"], r["val_b_loss"]) for r in log["val_history"]] == [(2, 1., 2.), (4, .5, .7)]
    assert log["left_out"] == {"val_entropy (twice in a step)": 1}


def test_several_held_out_sets_done_again(tmp_path):
    again = [dict(step=s, **{f"eval_{n}_loss": v}) for s, v in ((2, 1.), (4, .5), (2, .9), (4, .4)) for n in "ab"]
    log = state(tmp_path/"trainer_state.json", *again)
    assert [(r["step"], r["val_a_loss"], r["val_b_loss"]) for r in log["val_history"]] == [(2, .9, .9), (4, .4, .4)]
    assert log["left_out"] == {"done again": 2}


def test_numbers_written_as_text_and_other_texts(tmp_path):
    log = read_log(lines(tmp_path/"logging.jsonl", {"loss": "0.5", "global_step/max_steps": "3/10", "mood": "good", "list": [1]}, {"hello": 1},
                         {"loss": 0.25, "global_step": 4}))
    assert [(r["step"], r["loss"]) for r in log["train_history"]] == [(3, .5), (4, .25)] and log["total_steps"] == 10
    assert log["left_out"] == {"mood (not a number)": 1, "list (not a number)": 1, "no step": 1}


def test_a_half_line_is_left_for_later_and_a_bad_one_is_named(tmp_path):
    good = dict(current_steps=1, total_steps=2, loss=1.)
    assert len(read_log(lines(tmp_path/"a.jsonl", good, '{"current_st', end=""))["train_history"]) == 1
    with pytest.raises(ValueError, match="line 2 is not valid JSON"): read_log(lines(tmp_path/"b.jsonl", good, "oops", good))
    with pytest.raises(ValueError, match="no lines with a step"): read_log(lines(tmp_path/"c.jsonl", dict(id="a", question="?")))


def test_asking_and_logging_cost_little(tmp_path):
    log = RunLog(tmp_path/"r", progress=False); log.start(5000)
    t = time.process_time()
    for i in range(1, 5001): row(log, i, lr=1e-3, reward=1., kl=.1); log.asked
    assert (time.process_time()-t)/5000 < 1e-3


def test_every_argument_is_explained():
    from fastcore.docments import docments
    from vlmcourse import runlog
    for name in ("tracker_tag", "status_line", "log_html", "epoch_table", "read_log"):
        assert [k for k, text in docments(getattr(runlog, name)).items() if not text] == [], name

"Odd cases of vlmcourse.logs: logs that grow while they are read, a real terminal, Ctrl-C, hostile text, odd numbers."
import csv, json, math, os, pty, signal, subprocess, sys, threading, time
import pytest

from vlmcourse.core import sample_path
from vlmcourse.logs import (LogReport, export_log, follow_log, log_summary, log_table, metric_names, metric_rows, plot_run, run_html, run_line, run_text,
                            show_log, text_curve, watch_log)
from vlmcourse.runlog import RunLog, read_log

SAMPLES = ["trl_sft", "trl_grpo", "ms_swift", "llama_factory"]


def sample(name): return sample_path("logs", name)


def run_of(folder, n=30, end=True, **config):
    log = RunLog(folder, config, progress=False); log.start(n)
    for i in range(1, n+1): log.train(step=i, epoch=i/10, samples=i, loss=1/i, reward=i)
    log.val(step=n, epoch=n/10, samples=n, val_accuracy=.5)
    if end: log.finish()
    return log


# --- the samples -------------------------------------------------------------
@pytest.mark.parametrize("name", SAMPLES)
def test_nothing_is_lost(name):
    "Every number of the file is in the record."
    file = next(sample(name).iterdir()); text = file.read_text()
    entries = json.loads(text)["log_history"] if file.suffix == ".json" else [json.loads(l) for l in text.splitlines()]
    log = read_log(file); got = {}
    for which in ("train_history", "val_history"):
        for r in log[which]:
            for k, v in r.items(): got.setdefault(r["step"], []).append(v)
    in_summary = list(log["summary"].values())
    for e in entries:
        step = e.get("step") or e.get("current_steps") or int(str(e.get("global_step/max_steps", "0")).split("/")[0])
        for k, v in e.items():
            if isinstance(v, float) and k != "percentage": assert v in got.get(step, []) or v in in_summary, (k, v)
    assert log["left_out"] == {}


@pytest.mark.parametrize("name", SAMPLES)
def test_every_function_takes_every_log(name, tmp_path):
    log = read_log(sample(name))
    assert len(log_table(log)) == len(log["train_history"]) and len(log_table(log, per_epoch=True)) == 3
    assert "loss" in metric_names(log)["train"] and any(r["metric"] == "val_loss" for r in metric_rows(log))
    assert log_summary(log).startswith("finished: step") and "<svg" in run_html(log)
    report = show_log(str(sample(name)), output=str(tmp_path/"o"), export_csv=True)
    assert len(report.files) == 5 and all(f.exists() for f in report.files) and isinstance(report, LogReport)
    back = list(csv.DictReader(open(tmp_path/"o"/"train_steps.csv")))
    assert [float(r["loss"]) for r in back] == [r["loss"] for r in log["train_history"]]
    assert (tmp_path/"o"/"curves.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in sample(name).iterdir()) == [p.name for p in sorted(sample(name).iterdir())] and len(list(sample(name).iterdir())) == 1


# --- odd logs ----------------------------------------------------------------
EMPTY = dict(status="running", config={}, train_history=[], val_history=[], best_checkpoint=None)
ODD = [EMPTY, EMPTY | dict(train_history=[dict(step=1, epoch=None, samples=None, loss=None)]),
       EMPTY | dict(train_history=[dict(step=i, epoch=.5, samples=i, loss=v) for i, v in enumerate([1e308, -1e308, 0, None])]),
       EMPTY | dict(train_history=[dict(step=i, epoch=i/2, samples=i, loss=(-1)**i*1.7e308) for i in range(1, 9)]),
       EMPTY | dict(val_history=[dict(step=0, epoch=0, samples=0, val_loss=2.)]),
       EMPTY | dict(train_history=[dict(step=1, epoch=1, samples=1, loss=1.), dict(step=2, epoch=2, samples=2, reward=1.)])]


@pytest.mark.parametrize("log", ODD)
def test_odd_logs(log, tmp_path):
    assert run_text(log) and run_html(log) and run_line(log) and len(export_log(log, tmp_path)) == 4
    plot_run(log)
    assert "nan" not in run_html(log) and "inf" not in run_html(log).replace("info", "")


def test_names_from_a_file_never_act(tmp_path):
    evil = "a\x1b[2J<script>alert(1)</script>"
    log = EMPTY | dict(status=evil, error=evil, best_checkpoint=dict(step=1, epoch=1, samples=1, metric=evil, value=1., path=evil),
                       train_history=[{"step": 1, "epoch": 1., "samples": 1, "loss": 1., evil: 1.}], left_out={evil: 1})
    assert "\x1b" not in run_text(log) and "<script" not in run_html(log)
    assert "<script" not in LogReport(log, [evil])._repr_html_() and "\x1b" not in repr(LogReport(log, [evil]))


@pytest.mark.parametrize("values", [[], [None], [math.nan, math.inf], [1.]*3, [0, 1e300, -1e300], list(range(1000))])
def test_text_curves(values):
    lines = text_curve(values, width=40, height=5).splitlines()
    assert len(lines) in (1, 5) and max(map(len, lines)) <= 12+40
    if len(lines) == 5: assert sum(l.count("*") for l in lines) == min(40, sum(v is not None and math.isfinite(v) for v in values))


def test_bad_calls(tmp_path):
    (tmp_path/"file").write_text("x"); run_of(tmp_path/"r")
    with pytest.raises(ValueError, match="is a file, and a folder is wanted"): show_log(str(tmp_path/"r"), output=str(tmp_path/"file"))
    with pytest.raises(FileNotFoundError): show_log(str(tmp_path/"none"))
    with pytest.raises(FileNotFoundError): list(watch_log(tmp_path/"none"))
    with pytest.raises(ValueError, match="metrics='x' is not in this log. It has: loss, reward, val_accuracy"): plot_run(tmp_path/"r", "x")


# --- watching ----------------------------------------------------------------
def test_watching_a_foreign_log_that_grows(tmp_path):
    rows = [json.dumps(dict(current_steps=i, total_steps=20, loss=1/i, epoch=i/10)) for i in range(1, 21)]
    file = tmp_path/"trainer_log.jsonl"; file.write_text(rows[0]+"\n")
    def write():
        for r in rows[1:]:
            with open(file, "a") as f: f.write(r[:9]); f.flush(); time.sleep(.02); f.write(r[9:]+"\n")
    t = threading.Thread(target=write); t.start()
    seen = [len(log["train_history"]) for log in watch_log(tmp_path, every=.01)]
    t.join()
    assert seen == sorted(seen) and seen[-1] == 20 and len(seen) > 3


def test_watching_gives_up_on_silence(tmp_path):
    (tmp_path/"trainer_log.jsonl").write_text(json.dumps(dict(current_steps=1, total_steps=9, loss=1.))+"\n")
    t = time.time(); seen = list(watch_log(tmp_path, every=.02, patience=.3))
    assert [l["status"] for l in seen] == ["unknown", "silent"] and .3 <= time.time()-t < 20


def test_watching_has_patience_with_a_process_that_lives(tmp_path):
    log = run_of(tmp_path/"r", n=1, end=False); threading.Timer(1.2, log.finish).start()
    assert [l["status"] for l in watch_log(tmp_path/"r", every=.02, patience=.3)] == ["running", "finished"]


def test_a_state_that_is_being_written(tmp_path):
    file = tmp_path/"trainer_state.json"; whole = json.dumps(dict(log_history=[dict(step=1, loss=1.)], max_steps=1, global_step=1))
    file.write_text(whole[:20])
    t = threading.Timer(.4, lambda: file.write_text(whole)); t.start()
    assert [l["status"] for l in watch_log(tmp_path, every=.05)] == ["finished"]


def test_a_run_that_is_over_is_given_once(tmp_path):
    run_of(tmp_path/"r"); assert [l["status"] for l in watch_log(tmp_path/"r")] == ["finished"]


LIVE = """
import sys, time
from vlmcourse.runlog import RunLog
with RunLog(sys.argv[1], progress=False) as log:
    log.start(int(sys.argv[2])); print("go", flush=True)
    for i in range(1, int(sys.argv[2])+1): time.sleep(.05); log.train(step=i, epoch=i/10, samples=i, loss=1/i)
"""
FOLLOW = "import sys\nfrom vlmcourse.logs import show_log\nprint(show_log(sys.argv[1], follow=True, no_plot=len(sys.argv)>2))"


def live(folder, n):
    p = subprocess.Popen([sys.executable, "-c", LIVE, str(folder), str(n)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "go\n"
    return p


def test_follow_into_a_pipe(tmp_path):
    p = live(tmp_path/"r", 150)
    r = subprocess.run([sys.executable, "-c", FOLLOW, str(tmp_path/"r"), "no plot"], capture_output=True, text=True, timeout=120)
    assert p.wait(60) == 0 and r.returncode == 0, r.stderr
    lines = r.stdout.splitlines()
    assert "finished: step 150 of 150" in r.stdout and "\x1b" not in r.stdout and not (tmp_path/"r"/"curves.png").exists()
    steps = [int(l.split("step ")[1].split()[0]) for l in lines if l.startswith("running: step")]
    assert steps == sorted(steps)


def test_follow_in_a_terminal_and_ctrl_c(tmp_path):
    p = live(tmp_path/"r", 2000); ours, theirs = pty.openpty()
    f = subprocess.Popen([sys.executable, "-c", FOLLOW, str(tmp_path/"r")], stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs); text = ""
    while text.count("\x1b[2J") < 2: text += os.read(ours, 4096).decode()
    f.send_signal(signal.SIGINT)
    try:
        while True: text += os.read(ours, 4096).decode()
    except OSError: pass                                               # the other end is closed
    assert f.wait(60) == 0 and "No longer watching; the run goes on." in f.stderr.read()
    assert p.poll() is None and "loss" in text and "*" in text         # the run goes on
    p.kill(); p.wait()
    assert follow_log(tmp_path/"r", plot=False)["status"] == "killed"


def test_command_line(tmp_path):
    "The words of `vlmcourse log` are the arguments of show_log."
    from fastcore.script import anno_parser
    got = vars(anno_parser(show_log).parse_args(["runs/a", "--export_csv", "--no_plot", "--follow", "--output", "o"]))
    assert {k: got[k] for k in ("run", "output", "export_csv", "no_plot", "follow")} == dict(
        run="runs/a", output="o", export_csv=True, no_plot=True, follow=True)
    got = vars(anno_parser(show_log).parse_args(["runs/a"]))
    assert (got["output"], got["export_csv"], got["no_plot"], got["follow"]) == (None, False, False, False)
    run_of(tmp_path/"r")
    code = ("import sys; from vlmcourse import cli; cli.COMMANDS['log'] = ('logs', 'show_log'); sys.exit(cli.main(sys.argv[1:]))")
    r = subprocess.run([sys.executable, "-c", code, "log", str(tmp_path/"r"), "--export-csv", "--no-plot"], capture_output=True, text=True)
    assert r.returncode == 0 and "finished: step 30 of 30" in r.stdout and (tmp_path/"r"/"train_steps.csv").exists(), r.stderr
    r = subprocess.run([sys.executable, "-c", code, "log", str(tmp_path)], capture_output=True, text=True)
    assert r.returncode == 2 and "holds no training_log.json" in r.stderr


def test_a_long_log_is_quick(tmp_path):
    rows = [dict(step=i, epoch=i/1000, samples=i, loss=1/i, lr=.1, reward=.5) for i in range(1, 100001)]
    log = EMPTY | dict(train_history=rows)
    t = time.process_time(); run_text(log); run_html(log); plot_run(log)
    assert time.process_time()-t < 20


def test_one_legend_that_covers_no_curve():
    rows = [dict(step=i, epoch=i/4, samples=i, loss=1/i, reward=i/9, kl=.1) for i in range(1, 9)]
    figure = plot_run(EMPTY | dict(train_history=rows, val_history=[dict(step=4, epoch=1, samples=4, val_loss=.5)]))
    assert len(figure.legends) == 1 and all(ax.get_legend() is None for ax in figure.axes)
    assert {text.get_text() for text in figure.legends[0].get_texts()} >= {"each step", "smoothed", "validation"}

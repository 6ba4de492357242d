"""Evaluation files, results, interruptions, judges, pages: what odd data, other programs and kills do to lesson 13d."""
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from vlmcourse import cli, report
from vlmcourse.answers import ANSWER_MARK
from vlmcourse.core import read_json, write_json
from vlmcourse.evaluate import wilson
from vlmcourse.museum import make_records
from vlmcourse.report import (
    ACC, ASK_MARKER, F1, Result, data_hash, decide, evaluate_file, model_hash, read_eval, read_result, result_page, result_row, summarise,
    write_eval,
)

root = Path(__file__).resolve().parent.parent
MARK = ANSWER_MARK


@pytest.fixture
def folder(tmp_path):
    "A folder with pictures in it, and one beside it that must stay out of reach."
    (tmp_path/"data/photos").mkdir(parents=True)
    for name in ("data/a.png", "data/photos/b.png", "secret.png"):
        Image.new("RGB", (8, 6), "red").save(tmp_path/name)
    return tmp_path/"data"


def sample(**more):
    return dict(id=1, img_name="a.png", question="<image>Which?", answer="red", answer_type="CLOSED") | more


def read(folder, rows, **more):
    write_json(folder/"eval.json", rows)
    return read_eval(folder/"eval.json", **more)


# --- the file of questions ----------------------------------------------------------------------------------------

BAD = [
    ("not a sample", "text"), ("not a sample", None), ("not a sample", [1]),
    ("no question", sample(question="")), ("no question", sample(question="<image>  ")), ("no question", sample(question=7)),
    ("no answer", sample(answer="")), ("no answer", sample(answer=None)), ("no answer", sample(answer=["red"])),
    ("bad answer type", sample(answer_type="")), ("bad answer type", sample(answer_type=None)), ("bad answer type", sample(answer_type="BOTH")),
    ("bad picture entry", sample(img_name=7)), ("bad picture entry", sample(img_name={"a": 1})), ("bad picture entry", sample(img_name=[7])),
    ("marks and pictures differ", sample(question="<image><image>Which?")), ("marks and pictures differ", sample(img_name=["a.png", "photos/b.png"])),
    ("marks and pictures differ", sample(img_name=[])),
    ("picture outside the folder", sample(img_name="../secret.png")), ("picture outside the folder", sample(img_name="photos/../../secret.png")),
    ("picture outside the folder", sample(img_name="/etc/passwd")), ("picture outside the folder", sample(img_name="link.png")),
    ("picture is a web address", sample(img_name="http://127.0.0.1/a.png")), ("picture not found", sample(img_name="c.png")),
    ("half a character", sample(question="<image>Which? \ud83c")), ("half a character", sample(reasoning="\udffa")),
    ("picture not found", sample(img_name="photos")), ("picture is damaged", sample(img_name="eval.json")),
]


@pytest.mark.parametrize("reason,row", BAD)
def test_bad_samples_are_named_and_none_is_taken(folder, reason, row):
    (folder/"link.png").symlink_to(folder.parent/"secret.png")
    with pytest.raises(ValueError, match="1 of 2 samples cannot be used") as error:
        read(folder, [sample(id=0), row])
    assert f"x {reason}: sample 2" in str(error.value) and "->" in str(error.value)


def test_all_mistakes_at_once_and_ids_used_twice(folder):
    rows = [row for _, row in BAD if _ not in ("picture outside the folder",)]
    with pytest.raises(ValueError) as error: read(folder, [sample(id=0), sample(id="0"), *rows])
    assert all(reason in str(error.value) for reason, _ in BAD if reason != "picture outside the folder")
    assert "id used twice: sample 2" in str(error.value)


def test_no_id_any_meta(folder):
    rows = [sample(id=None), sample(id=None, meta="drawn on Monday", task="count"), sample(id=9, meta={"task": "town"})]
    found = read(folder, rows)
    assert [r["id"] for r in found] == ["1", "2", "9"] and [result_row(r, "x")["task"] for r in found] == ["all", "count", "town"]
    assert [row.get("task") for row in read_json(write_eval(found, folder/"again"))] == [None, "count", "town"]
    assert [row["id"] for row in read_json(write_eval([r | {"id": None} for r in found], folder/"nameless"))] == ["1", "2", "3"]
    with pytest.raises(FileExistsError, match="a.png is already there"): write_eval(found, folder/"a.png")


@pytest.mark.parametrize("content", [{}, [], "text", 7, None])
def test_not_a_list(folder, content):
    with pytest.raises(ValueError, match="list of samples"): read(folder, content)


def test_pictures_count_from_their_own_folder(folder):
    row = sample(img_name=["b.png"], answer_type="open", answer=3)
    record, = read(folder, [row], images=folder/"photos")
    assert record["images"] == [str(folder/"photos/b.png")] and record["answer_type"] == "OPEN" and record["answer"] == "3"
    with pytest.raises(ValueError, match="outside"): read(folder, [sample(img_name="../a.png")], images=folder/"photos")
    with pytest.raises(FileNotFoundError, match="no folder"): read(folder, [row], images=folder/"nothing")
    without, = read(folder, [sample(img_name=None, question="What is a kylix?")])
    assert without["images"] == [] and without["messages"][0]["content"] == "What is a kylix?"


def test_round_trip(tmp_path):
    records = make_records(23, seed=5)
    back = read_eval(write_eval(records, tmp_path/"one"))
    again = read_eval(write_eval(back, tmp_path/"two"))
    for old, new, third in zip(records, back, again):
        assert old["messages"] == new["messages"] == third["messages"]
        assert [old[k] for k in ("id", "answer", "answer_type")] == [new[k] for k in ("id", "answer", "answer_type")]
        assert new["task"] == old["meta"]["task"] == third["task"]
        assert [i.tobytes() for i in old["images"]] == [Image.open(i).tobytes() for i in new["images"]]
    assert read_json(tmp_path/"one/eval.json") == read_json(tmp_path/"two/eval.json")
    with pytest.raises(FileExistsError, match="eval.json is already there"): write_eval(records, tmp_path/"one")
    (tmp_path/"one/eval.json").unlink()
    before = {p: p.read_bytes() for p in (tmp_path/"one/images").iterdir()}
    with pytest.raises(FileExistsError, match="images/00.*another folder"): write_eval(records[::-1], tmp_path/"one")
    assert {p: p.read_bytes() for p in (tmp_path/"one").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("bad, error", [(dict(messages=[dict(role="user", content="And?")] * 2), "2 turns"), (dict(images=["gone.png"]), "gone.png"), (dict(answer_type={1}), "set")])
def test_a_fault_leaves_nothing_behind(bad, error, tmp_path):
    records = make_records(3, seed=5)
    with pytest.raises((ValueError, FileNotFoundError), match=error): write_eval([*records, {**records[0], **bad}], tmp_path/"one")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(read_eval(write_eval(records, tmp_path/"one"))) == 3 and sorted(p.name for p in (tmp_path/"one").iterdir()) == ["eval.json", "images"]


def test_the_committed_set_is_what_its_command_makes(tmp_path):
    sys.path.insert(0, str(root/"tools"))
    from make_samples import EVAL_TASKS
    made = write_eval(make_records(80, EVAL_TASKS, split="test", seed=104), tmp_path/"eval", suffix=".jpg")
    kept = root/"data_samples/eval/eval.json"
    assert read_json(made) == read_json(kept)
    rows = read_eval(kept)
    assert len(rows) >= 60 and {r["answer_type"] for r in rows} == {"OPEN", "CLOSED"} and {len(r["images"]) for r in rows} == {1, 2, 3}
    for new, old in zip(read_eval(made), rows):
        assert [Image.open(i).tobytes() for i in new["images"]] == [Image.open(i).tobytes() for i in old["images"]], new["id"]


# --- rows and summaries -------------------------------------------------------------------------------------------

def record(answer="Corinth", *, kind="CLOSED", marked=True, id="1", task="town"):
    said = f"The pattern is zigzag. {MARK} {answer}" if marked else answer
    turns = [dict(role="user", content="<image>Which?"), dict(role="assistant", content=said)]
    return dict(id=id, images=[], messages=turns, answer=answer, answer_type=kind, task=task, img_name="a.png")


#  answer, reason_answer, model_answer, what the rules say (marker asked for)
SAID = [
    (f"It is zigzag. {MARK} Corinth.", "It is zigzag.", "Corinth", (True, "same text")),
    (f"{MARK} the town of Corinth", "", "the town of Corinth", (None, None)),
    (f"{MARK} Rhodes {MARK} Corinth", f"{MARK} Rhodes", "Corinth", (True, "same text")),
    (f"{MARK}", "", "", (False, "empty answer")),
    ("Corinth", "Corinth", "", (False, "no marker")),
    ("", "", "", (False, "no marker")),
    (f"{MARK} Corinth\nI am sure.", "", "Corinth", (True, "same text")),
]


@pytest.mark.parametrize("answer,reason,said,verdict", SAID)
def test_rows(answer, reason, said, verdict):
    row = result_row(record(), answer)
    assert (row["reason_answer"], row["model_answer"]) == (reason, said) and decide(row) == verdict and row["answer"] == answer


def test_plain_questions_need_no_marker():
    row = result_row(record("3", marked=False), "three.")
    assert (row["format"], row["model_answer"], decide(row)) == (None, "three.", (True, "same text"))


def test_several_lines_of_an_open_answer_stay():
    row = result_row(record(kind="OPEN"), f"I look. {MARK} A vase.\nIt is red.")
    assert row["model_answer"] == "A vase.\nIt is red." and row["correct"] is None and row["lenient"] is None


def test_summary_against_scipy_and_scikit_learn():
    from scipy.stats import binomtest
    from sklearn.metrics import accuracy_score
    rng = random.Random(1)
    for n in (1, 7, 60):
        truths = [rng.choice(["a", "b", "c"]) for _ in range(n)]
        said = [rng.choice(["a", "b", "c"]) for _ in range(n)]
        rows = [result_row(record(t, id=str(i)), f"{MARK} {s}") for i, (t, s) in enumerate(zip(truths, said))]
        for row in rows: row["correct"] = bool(decide(row)[0])
        found = summarise(rows)
        assert found[ACC] == pytest.approx(accuracy_score(truths, said), abs=1e-4)
        ends = binomtest(sum(a == b for a, b in zip(truths, said)), n).proportion_ci(method="wilson")
        assert found["intervals"][ACC] == pytest.approx([ends.low, ends.high], abs=1e-4)


def test_nothing_to_count_is_no_zero():
    empty, only_open = summarise([]), summarise([result_row(record(kind="OPEN"), "x") | {"bertscore": 0.5}])
    assert empty[ACC] is None and empty[F1] is None and empty["format rate"] is None
    assert only_open[ACC] is None and only_open[F1] == 0.5 and only_open["n"]["open"] == 1
    for found in (empty, only_open): assert "–" in repr(Result([], found)) and json.dumps(found, allow_nan=False)


def test_skipped_answers_are_shown_beside():
    rows = [result_row(record(id=str(i)), f"{MARK} Corinth" if i < 5 else "Corinth") for i in range(20)]
    for row in rows: row["correct"] = decide(row)[0]
    found = summarise(rows)
    assert found[ACC] == 0.25 and found["skipping unmarked answers"][ACC] == 1.0 and found["skipping unmarked answers"]["n"] == 5
    assert found["n"]["no marker"] == 15 and "unmarked answers skipped" in repr(Result(rows, found))


# --- other programs -----------------------------------------------------------------------------------------------

TEN_LINES = '''
import json, sys
results = json.load(open(sys.argv[1]))
*rows, final = results
closed = [r for r in rows if r["answer_type"] == "CLOSED"]
for r in rows:
    r["index"], r["image_name"], r["question"], r["reason_answer"], r["model_answer"], r["ground_truth"]
acc = sum(bool(r["correct"]) for r in closed) / len(closed)
assert abs(acc - final["CLOSED Questions Acc"]) < 1e-3
print(f"{len(rows)} {final['CLOSED Questions Acc']:.4f} {final['OPEN   Questions BERTScore-F1']:.4f}")
'''


def test_ours_is_read_by_ten_lines(run):
    result = run()
    done = subprocess.run([sys.executable, "-c", TEN_LINES, result.path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", f"{result.summary[ACC]:.4f}", f"{result.summary[F1]:.4f}"]


def foreign(i, kind, result):
    return dict(index=i, image_name=["a.png"], question="<image>Which?", reason_answer="### Step 1", model_answer="red", ground_truth="red",
                answer_type=kind, result=result)


def test_another_programs_file_is_read(tmp_path):
    rows, counts = [], [0, 0, 0.0, 0]
    rng = random.Random(3)
    truth = []
    for i in range(40):
        kind = rng.choice(["CLOSED", "OPEN"])
        if kind == "CLOSED": right = rng.random() < .5; counts = [counts[0] + right, counts[1] + 1, *counts[2:]]; truth.append(right)
        else: score = round(rng.random(), 4); counts = [*counts[:2], counts[2] + score, counts[3] + 1]; truth.append(score)
        rows.append(foreign(i, kind, counts))
    summary = {ACC: counts[0] / counts[1], F1: counts[2] / counts[3]}
    write_json(tmp_path/"other.json", [*rows, summary])
    found = read_result(tmp_path/"other.json")
    assert [r["correct"] if r["answer_type"] == "CLOSED" else r["bertscore"] for r in found.rows] == pytest.approx(truth)
    assert found.summary[ACC] == summary[ACC] and found.summary["n"]["closed"] == counts[1] and found.scores.n == counts[1]
    assert found.scores.accuracy == pytest.approx(summary[ACC]) and result_page(found)
    write_json(tmp_path/"cut.json", rows)  # stopped before the end: no summary yet
    assert read_result(tmp_path/"cut.json").summary[ACC] == pytest.approx(summary[ACC], abs=1e-4)


def test_chirons_file_judges_and_scores_every_row(tmp_path):
    rows = [foreign(1, "OPEN", [1, 1, .9, 1]), foreign(2, "CLOSED", [1, 2, 1.1, 2]), foreign(3, "OPEN", [2, 3, 1.9, 3])]
    for name, entries in {"whole.json": [*rows, {ACC: 2/3, F1: 1.9/3}], "cut.json": rows}.items():
        write_json(tmp_path/name, entries)
        found = read_result(tmp_path/name)
        assert found.summary["n"] | {"no marker": 0} == {"samples": 3, "closed": 3, "open": 3, "not judged": 0, "no marker": 0}
        assert found.summary[ACC] == pytest.approx(2/3, abs=1e-4) and found.summary["intervals"][ACC] == pytest.approx(wilson(2, 3), abs=1e-4)


@pytest.mark.parametrize("content", [{}, [], [1], [{ACC: 1}], [foreign(1, "CLOSED", [1, 1, 0, 0]), {"what": 1}]])
def test_what_is_no_result(tmp_path, content):
    write_json(tmp_path/"x.json", content)
    with pytest.raises(ValueError, match="is no result"): read_result(tmp_path/"x.json")


# --- runs that stop -----------------------------------------------------------------------------------------------

@pytest.fixture
def run(tmp_path, monkeypatch):
    "A run on 12 questions with a model that answers in no time; `run.asked` are the ids that reached it."
    tasks = ["colour", "workshop", "count", "caption"]
    data = write_eval(make_records(12, tasks, seed=6, size=16), tmp_path/"set")
    asked = []

    def asker(*model):
        def ask(records):
            for r in records:
                asked.append(r["id"])
                if len(asked) == once.stop: raise KeyboardInterrupt
            return [["red", f"{MARK} Rhodes", "maybe 3", "A photo."][int(r["id"][-2:]) % 4] for r in records]
        return ask

    def once(output="out.json", stop=None, **more):
        once.stop = stop
        return evaluate_file(str(data), output=str(tmp_path/output), batch_size=3, **more)

    monkeypatch.setattr(report, "_asker", asker)
    monkeypatch.setattr(report, "_open_scores", lambda rows, encoder: [round(len(r["ground_truth"]) / 200, 4) for r in rows])
    once.asked, once.data, once.folder = asked, data, tmp_path
    return once


def same(a, b):
    "Two results are equal, times aside."
    def bare(path):
        entries = read_json(path)
        return [{k: v for k, v in e.items() if k != "seconds"} for e in entries]
    return bare(a) == bare(b)


def test_stopped_at_every_question(run):
    whole = run()
    assert len(run.asked) == 12 and whole.summary["complete"] and [r["index"] for r in whole.rows] == run.asked
    for stop in range(1, 13):
        run.asked.clear()
        with pytest.raises(KeyboardInterrupt): run(f"{stop}.json", stop=stop)
        partly = run.folder/f"{stop}.json"
        done = (stop - 1) // 3 * 3
        if done:
            entries = read_json(partly)
            assert len(entries) == done + 1 and entries[-1]["complete"] is False and "Not complete" in repr(read_result(partly))
        run.asked.clear()
        again = run(f"{stop}.json")
        assert len(run.asked) == 12 - done and same(again.path, whole.path)
    run.asked.clear()
    assert same(run().path, whole.path) and run.asked == []


def test_fewer_then_more(run):
    first = run(max_samples=5)
    assert len(first.rows) == 5 and len(run.asked) == 5 and first.summary["complete"]
    assert len(run().rows) == 12 and len(run.asked) == 12
    assert len(run(max_samples=2).rows) == 12 and len(run.asked) == 12  # what is there stays


@pytest.mark.parametrize("change", [dict(instruction=ASK_MARKER), dict(pictures="blank"), dict(max_new_tokens=5), dict(judge="offline"),
                                    dict(model="tiny-internvl"), dict(encoder="other")])
def test_other_settings_need_another_file(run, change):
    before = Path(run().path).read_bytes()
    with pytest.raises(ValueError, match="other settings") as error: run(**change)
    assert list({"model": "model_hash"}.get(k, k) for k in change)[0] in str(error.value)
    assert Path(run.folder/"out.json").read_bytes() == before


def test_other_data_needs_another_file(run):
    run()
    rows = read_json(run.data)
    write_json(run.data, rows[::-1])
    with pytest.raises(ValueError, match="data_hash"): run()
    write_json(run.data, rows)
    Image.new("RGB", (16, 16)).save(run.data.parent/"images/00000.png")
    with pytest.raises(ValueError, match="data_hash"): run()


def test_a_file_that_is_no_result_stays(run):
    for name, content in {"a.json": [foreign(1, "CLOSED", [1, 1, 0, 0]), {ACC: 1.0, F1: 0}], "b.json": {"my": "notes"}}.items():
        write_json(run.folder/name, content)
        with pytest.raises(ValueError): run(name)
        assert read_json(run.folder/name) == content


def test_numbers_that_make_no_sense(run):
    for change in (dict(max_samples=0), dict(max_new_tokens=0), dict(max_new_tokens="8"), dict(max_samples=2.5), dict(max_samples=True), dict(max_new_tokens=None)):
        with pytest.raises(ValueError, match=f"{[*change][0]}={[*change.values()][0]!r} must be a whole number, 1 or more"): run(**change)
    with pytest.raises(ValueError, match="batch_size='8' must"): evaluate_file(str(run.data), output=str(run.folder/"x.json"), batch_size="8")
    with pytest.raises(ValueError, match="choose one of real"): run(pictures="grey")


@pytest.mark.parametrize("output,says", [("page.html", "must end in .json"), ("out", "must end in .json"), ("notes.txt/deep/out.json", "notes.txt is a file"),
                                         ("notes.json", "notes.html is there without its result")])
def test_an_output_that_would_destroy_something(run, output, says):
    for name in ("notes.txt", "notes.html", "page.html"): (run.folder/name).write_text("mine")
    before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=says): run(output)
    assert run.asked == [] and {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()} == before
    if output == "notes.json":
        assert run(output, page=False).path and (run.folder/"notes.html").read_text() == "mine"


@pytest.mark.parametrize("judge", [None, "offline", object()])
def test_a_judge_without_a_model_takes_no_name(run, judge):
    with pytest.raises(ValueError, match="judge_model='big' belongs to a judge with a language model"): run(judge=judge, judge_model="big")
    assert run.asked == []


def test_controls_see_other_pictures(tmp_path, monkeypatch):
    data = write_eval(make_records(6, ["colour"], seed=6, size=16), tmp_path/"set")
    seen = {}
    monkeypatch.setattr(report, "_asker", lambda *model: lambda records: [
        seen.setdefault(r["id"], []).append([str(i) for i in r["images"]]) or "red" for r in records])
    for kind in ("real", "shuffled", "none"):
        evaluate_file(str(data), pictures=kind, output=str(tmp_path/f"{kind}.json"), page=False)
    for real, shuffled, none in seen.values(): assert real != shuffled and len(shuffled) == 1 and none == []
    assert not list(tmp_path.glob("*.html"))


# --- judges -------------------------------------------------------------------------------------------------------

class Odd:
    "A judge of the test: says what it is told to, and counts."
    def __init__(self, *said): self.said, self.asked = list(said), []

    def score(self, question, truth, answer):
        self.asked.append((question, truth, answer))
        said = self.said[(len(self.asked) - 1) % len(self.said)]
        if isinstance(said, Exception): raise said
        return said


def test_only_what_needs_a_judge_is_sent(run):
    judge = Odd(True)
    found = run(judge=judge)
    assert all(answer == "maybe 3" or answer in ("red", "Rhodes") and answer != truth for _, truth, answer in judge.asked)
    assert all("<image>" not in question for question, *_ in judge.asked) and found.summary["settings"]["judge"] == "Odd"
    sent = [r for r in found.rows if r["judged"] == "judge"]
    assert len(sent) == len(judge.asked) > 0 and all(r["correct"] for r in sent)
    assert {r["judged"] for r in found.rows} <= {"judge", "same text", "no marker", "similarity"}
    run(judge=judge)
    assert len(sent) == len(judge.asked)  # nothing is asked again


def test_what_was_not_judged_is_counted_and_asked_again(run):
    found = run(judge=Odd(None))
    open_ones = found.summary["n"]["not judged"]
    assert open_ones > 0 and not found.summary["complete"] and f"{open_ones} answers are not judged yet" in repr(found)
    assert found.summary["n"]["closed"] == 9 and found.summary["intervals"][ACC]
    judge = Odd(False)
    done = run(judge=judge)
    assert len(judge.asked) == open_ones and done.summary["complete"] and len(run.asked) == 12


def test_a_judge_that_fails_loses_no_answer(run):
    with pytest.raises(ValueError, match="judge: the money is gone. What was judged is kept"): run(judge=Odd(ValueError("the money is gone")))
    assert len(read_json(run.folder/"out.json")) > 1
    asked = len(run.asked)
    assert run(judge=Odd(True)).summary["complete"] and len(run.asked) == 12 and asked < 12


class Server(ThreadingHTTPServer):
    "An OpenAI-compatible server that charges for every question it reads, whether or not anybody waits for the reply."
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.charged, self.turn = [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        with self.server.turn: self.server.charged.append(asked)
        time.sleep(0.03)
        said = "Yes" if sum(asked.encode()) % 2 else "No"
        choice = dict(index=0, finish_reason="stop", message=dict(role="assistant", content=said))
        data = json.dumps(dict(id="1", object="chat.completion", created=1, model="m", choices=[choice],
                               usage=dict(prompt_tokens=9, completion_tokens=1, total_tokens=10))).encode()
        try:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError: pass  # nobody waits any more

    def log_message(self, *args): pass


DRIVER = '''
import sys, time
from vlmcourse import report
from vlmcourse.judge import Judge

def asker(*model):
    def ask(records):
        time.sleep(.02)
        return ["maybe " + r["id"] for r in records]
    return ask

report._asker, report._hash_of, report._encoder_name = asker, lambda *model: "hash", lambda name: name  # no torch: quick
report._open_scores = lambda rows, encoder: [round(len(r["ground_truth"]) / 200, 4) for r in rows]
data, output, url = sys.argv[1:]
report.evaluate_file(data, output=output, judge=Judge(url, model="m", key="k"), batch_size=4, page=False)
'''


def test_killed_ten_times(tmp_path):
    data = write_eval(make_records(60, ["colour", "shape", "count", "pattern", "caption"], seed=9, size=16), tmp_path/"set")
    rows = read_json(data)
    for row in rows: row["question"] += f" ({row['id']})"  # each question is another item
    write_json(data, rows)
    (tmp_path/"driver.py").write_text(DRIVER)

    def start(output, server):
        return subprocess.Popen([sys.executable, str(tmp_path/"driver.py"), str(data), str(output), server.url], cwd=root,
                                env=os.environ | {"PYTHONPATH": str(root)})

    calm = Server()
    assert start(tmp_path/"calm.json", calm).wait(300) == 0
    assert len(calm.charged) == len(set(calm.charged)) == 48
    rng, hunted, kills = random.Random(int(time.time())), Server(), 0
    for at in sorted(rng.sample(range(48), 10)):
        process, since = start(tmp_path/"out.json", hunted), time.time()
        while len(hunted.charged) < at + 1 and process.poll() is None and time.time() < since + 300: time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if (tmp_path/"out.json").exists(): assert read_json(tmp_path/"out.json")[-1]["n"]["samples"] > 0  # always a whole file
    assert kills >= 8, "most runs must have been alive when they were killed"
    assert start(tmp_path/"out.json", hunted).wait(300) == 0
    twice = {asked for asked in hunted.charged if hunted.charged.count(asked) > 1}
    assert not twice and sorted(hunted.charged) == sorted(calm.charged)
    assert same(tmp_path/"out.json", tmp_path/"calm.json")


# --- the page -----------------------------------------------------------------------------------------------------

class Audit(HTMLParser):
    "Everything in a page that could do something."
    def __init__(self, page):
        super().__init__()
        self.tags, self.odd, self.text = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            bad = name.startswith("on") or name in ("srcdoc", "action", "formaction") or name == "href"
            if bad or name == "src" and not value.startswith("data:image/jpeg;base64,"): self.odd.append((tag, name, value))

    def handle_data(self, data): self.text.append(data)


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</section></body><h1>", "javascript:alert(1)", "<!--", "]]>", "&lt;b&gt;",
           "\0\x07\x1b[31m", "\ud800", "\u202eevil", "<style>*{display:none}</style>", "' onclick='x", "{{7*7}}", "<svg/onload=alert(1)>", "x" * 100_000]


def test_hostile_texts_stay_texts():
    rng = random.Random(0)
    plain = result_row(record(), "x")
    allowed = set(Audit(result_page(Result([plain | {"correct": False}], summarise([plain]) | {"model": "m", "settings": {}}))).tags)
    for _ in range(40):
        rows = []
        for i in range(5):
            row = plain | {k: rng.choice(HOSTILE) for k in ("question", "answer", "reason_answer", "model_answer", "ground_truth", "task", "judged")}
            row |= dict(index=rng.choice(HOSTILE) + str(i), correct=rng.choice([True, False, None]), image_name=rng.choice(HOSTILE))
            rows.append(row | rng.choice([{}, dict(answer_type="OPEN", correct=None, bertscore=0.5)]))
        summary = summarise(rows) | dict(model=rng.choice(HOSTILE), settings={rng.choice(HOSTILE): rng.choice(HOSTILE)})
        page = result_page(Result(rows, summary))
        found = Audit(page)
        assert set(found.tags) <= allowed | {"img"} and found.odd == [] and found.tags.count("section") == 5
        assert page.encode() and not re.search(r"[\x00-\x08\x0e-\x1f]", page)


def test_the_page_has_its_pictures_inside(tmp_path):
    records = read_eval(write_eval(make_records(4, ["colour", "same"], seed=2, size=32), tmp_path/"set"))
    rows = [result_row(r, "red") | {"correct": False} for r in records]
    (tmp_path/"set/images/00000.png").unlink()
    page = result_page(Result(rows, summarise(rows)), records)
    assert Audit(page).tags.count("img") == sum(len(r["images"]) for r in records) - 1 and "cannot be shown" in page
    assert "default-src &#x27;none&#x27;" in page or "default-src 'none'" in page
    assert "2 of 4" in result_page(Result(rows, summarise(rows)), records, n=2)


# --- the whole thing, with the real model -------------------------------------------------------------------------

def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "evaluate", ("report", "evaluate_file"))
    data, out = root/"data_samples/eval/eval.json", tmp_path/"out.json"
    words = ["evaluate", str(data), "--model", "tiny", "--output", str(out), "--max-samples", "4", "--max-new-tokens", "16", "--judge", "offline"]
    assert cli.main(words) == 0
    assert ACC in capsys.readouterr().out
    entries = read_json(out)
    assert len(entries) == 5 and entries[-1]["n"]["samples"] == 4 and entries[-1]["model hash"] == model_hash("tiny")
    assert entries[-1]["settings"]["data_hash"] == data_hash(read_eval(data)) and out.with_suffix(".html").exists()
    for wrong in (["--images", "nowhere"], ["--pictures", "grey"], ["--model", "no/such/model/here"], ["--judge", "http://127.0.0.1:9/v1"]):
        assert cli.main([*words[:4], "--output", str(tmp_path/"x.json"), *wrong]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and wrong[1].split(":")[0] in error, error


def test_fingerprints(tmp_path):
    assert model_hash("tiny") != model_hash("tiny-internvl") and re.fullmatch(r"[0-9a-f]{16}", model_hash("tiny"))
    from vlmcourse.vlm import TINY
    for name in ("config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path/name).write_bytes((TINY/name).read_bytes())
    assert model_hash(str(tmp_path)) == model_hash("tiny")
    (tmp_path/"chat_template.jinja").write_text("other")
    assert model_hash(str(tmp_path)) != model_hash("tiny")


def test_every_argument_of_the_command_is_explained():
    from fastcore.docments import docments
    said = docments(evaluate_file)
    assert [name for name, text in said.items() if not text] == [] and "offline" in said["judge"]

"""Odd answers, odd numbers and hostile texts through the scores of lesson 13."""
import random

import pytest
from PIL import Image

from vlmcourse.evaluate import (
    Scores, Table, blank_images, compare_table, error_gallery, error_kind, error_kinds, error_table, evaluate, gain_table, guess_rate, is_right,
    kind_of_gain, look_table, majority_baseline, mcnemar, paired_gain, score_answers, show_answers, show_share, shuffle_images, text_baseline,
    wilson, without_images,
)

MARK = "### The final answer is:"


def record(answer="Corinth", *, marked=True, id="1", **fields):
    said = f"The pattern is zigzag. {MARK} {answer}" if marked else answer
    turns = [dict(role="user", content="<image>Which?"), dict(role="assistant", content=said)]
    return dict(id=id, images=[Image.new("RGB", (8, 8))], messages=turns, **fields)


#  answer, truth, strict when the marker is asked for, lenient
CASES = [
    (f"{MARK} Corinth", "Corinth", True, True),
    (f"{MARK}Corinth.", "Corinth", True, True),
    (f"{MARK}   CORINTH  ", "Corinth", True, True),
    (f"{MARK} three", "3", True, True),
    (f"{MARK} 3", "three", True, True),
    (f"{MARK} Rhodes {MARK} Corinth", "Corinth", True, True),      # the last one counts
    (f"{MARK} Corinth {MARK} Rhodes", "Corinth", False, False),
    (f"Corinth. {MARK} Rhodes", "Corinth", False, False),
    (f"{MARK}", "Corinth", False, False),
    (f"{MARK} ", "Corinth", False, False),
    ("The final answer is: Corinth", "Corinth", False, True),      # no ###
    ("### the final answer is: Corinth", "Corinth", False, True),  # other capitals
    ("Corinth", "Corinth", False, True),
    ("It is Corinth!", "Corinth", False, True),
    ("Corinth, I think", "Corinth", False, False),
    ("Acorinth", "Corinth", False, False),
    ("13", "3", False, False),
    ("", "Corinth", False, False),
    ("\n\n", "Corinth", False, False),
    ("top left", "left", False, True),
    (f"{MARK} top left", "left", False, True),
    (f"{MARK} top left", "top left", True, True),
]


@pytest.mark.parametrize("answer,truth,strict,lenient", CASES)
def test_rules(answer, truth, strict, lenient):
    assert is_right(answer, truth, marker=True) is strict
    assert is_right(answer, truth, lenient=True) is lenient


def test_strict_is_never_more_than_lenient():
    rng = random.Random(0)
    pieces = [MARK, "Corinth", "Rhodes", "3", "three", ".", " ", "\n", "top left", "left", "<b>", "###", "é", "ｘ"]
    for _ in range(3000):
        answer = "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(rng.randint(0, 6)))
        for truth in ("Corinth", "3", "left"):
            for marker in (True, False):
                if is_right(answer, truth, marker=marker):
                    assert is_right(answer, truth, marker=marker, lenient=True), answer


def test_plain_questions_need_no_marker_but_may_have_it():
    plain = record("3", marked=False)
    rows = score_answers(["3", "three.", f"{MARK} 3", "4"], [plain] * 4)
    assert [r["strict"] for r in rows] == [True, True, True, False]
    assert {r["format"] for r in rows} == {None}


def test_marker_asked_for_in_the_question_only():
    asked = record("3", marked=False)
    asked["messages"][0]["content"] += f" End with {MARK} X"
    assert [r["strict"] for r in score_answers(["3", f"{MARK} 3"], [asked] * 2)] == [False, True]


def test_no_id_and_any_meta():
    records = [record("red", marked=False, id=None, meta="drawn on Monday", task="colour"), record("red", marked=False, id=None, meta=["note"])]
    rows = score_answers(["red", "red"], records)
    assert [(r["id"], r["task"]) for r in rows] == [("0", "colour"), ("1", "all")]
    assert majority_baseline(records, records).accuracy == 1


def test_open_questions_are_shown_but_not_counted():
    rows = score_answers(["a vase", f"{MARK} Corinth"], [record("a cup", marked=False, answer_type="OPEN"), record()])
    scores = Scores(rows)
    assert scores.n == 1 and scores.accuracy == 1 and "1 open questions" in repr(scores)
    only_open = Scores(rows[:1])
    assert only_open.n == 0 and only_open.accuracy != only_open.accuracy and "–" in repr(only_open)
    gain_table(only_open, only_open)


def test_wilson_edges():
    assert wilson(0, 1)[0] == 0 and wilson(1, 1)[1] == 1
    for k, n in ((0, 20), (20, 20), (10, 20), (1, 2000), (999, 1000)):
        low, high = wilson(k, n)
        assert 0 <= low <= k / n <= high <= 1
        z = 1.959964  # the ends solve |share - p| = z * sqrt(p (1 - p) / n)
        for p in (low, high):
            assert abs(abs(k / n - p) - z * (p * (1 - p) / n) ** 0.5) < 1e-9 or p in (0, 1)
    for k, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError): wilson(k, n)


def test_paired_gain_is_seeded_and_checked():
    before, after = [0, 1, 0, 1] * 10, [1, 1, 0, 1] * 10
    assert paired_gain(before, after) == paired_gain(before, after)
    assert paired_gain(before, after, seed=1).gain == 0.25
    swapped = paired_gain(after, before)
    assert swapped.gain == -0.25 and swapped.mended == 0 and swapped.broken == 10
    with pytest.raises(ValueError, match="must be pairs"): paired_gain([0], [0, 1])
    with pytest.raises(ValueError, match="no question"): paired_gain([None], [1])
    a, b = Scores(score_answers(["x"], [record(id="a")])), Scores(score_answers(["x"], [record(id="b")]))
    with pytest.raises(ValueError, match="different questions"): paired_gain(a, b)
    a, b = (Scores(score_answers(["x"], [record(id="a", answer=truth)])) for truth in ("red", "blue"))  # the same id, another truth
    with pytest.raises(ValueError, match="different questions"): paired_gain(a, b)


def test_learning_to_say_one_word_is_not_skill():
    truths = ["Athens", "Rhodes", "Corinth", "Samos"] * 30
    records = [record(truth, id=str(i)) for i, truth in enumerate(truths)]
    silent = Scores(score_answers([""] * 120, records))
    parrot = Scores(score_answers([f"{MARK} Rhodes"] * 120, records))
    expert = Scores(score_answers([f"{MARK} {truth}" for truth in truths], records))
    assert guess_rate(parrot.rows) == 0.25
    assert kind_of_gain(silent, parrot).startswith("Kind of gain: format.")
    assert kind_of_gain(silent, expert).startswith("Kind of gain: format and skill.")
    assert kind_of_gain(parrot, expert).startswith("Kind of gain: skill. Guessing")
    assert kind_of_gain(expert, silent).startswith("Kind of gain: none that could not be luck. Worse: format and skill. Guessing")
    assert "luck" in kind_of_gain(expert, parrot)  # a loss is no gain
    few = Scores(score_answers([f"{MARK} {truth}" if i < 4 else "" for i, truth in enumerate(truths)], records))
    gain = paired_gain(silent, few)
    assert gain.low > 0 and gain.p == 0.125 and "luck" in kind_of_gain(silent, few)  # the interval alone is too sure of four


def test_nothing_from_a_model_or_a_data_set_becomes_html():
    evil = '<script>alert("x")</script>'
    bad = record(evil, id=evil, meta={"task": evil})
    bad["messages"][0]["content"] = f"<image>{evil}"
    before, after = (Scores(score_answers([text], [bad])) for text in (evil, f"{MARK} {evil}"))
    other = Scores(before.rows + score_answers(["1"], [record("1", marked=False)]))
    pages = [show_answers([bad], before, after), before, other, gain_table(before, after), gain_table(other, other),
             compare_table({evil: other}), look_table(other, evil=other), error_table(other), error_gallery([bad, bad], other), Table([evil], [[evil]], note=evil)]
    for page in pages:
        assert "<script" not in page._repr_html_() and repr(page)
    assert 'class="vlm-gain"' in gain_table(before, after)._repr_html_()


def test_one_task_name_per_line_of_the_table():
    records = [record(str(i), marked=False, id=str(i), meta={"task": t}) for i, t in enumerate(["a", "b", "a"])]
    scores = Scores(score_answers(["0", "9", "2"], records))
    assert scores.tasks == ["a", "b"] and scores.values(task="b") == [False]
    assert len(repr(scores).splitlines()) == 4


def test_blank_pictures_keep_size_and_leave_the_record_alone(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (20, 10), "red").save(path)
    rows = [record(), {**record(), "images": [str(path)]}]
    blank = blank_images(rows)
    assert [r["images"][0].size for r in blank] == [(8, 8), (20, 10)]
    assert blank[0]["images"][0].getpixel((0, 0)) == (128, 128, 128) and rows[1]["images"] == [str(path)]


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="empty"): evaluate(None, None, [])
    assert show_share([]) == "–" and guess_rate([]) != guess_rate([])


# --- the honesty kit ------------------------------------------------------------------------------------------------

def test_wilson_and_mcnemar_are_scipys():
    from scipy.stats import binomtest
    rng = random.Random(4)
    for _ in range(300):
        n = rng.choice([1, 2, 5, 40, 1000, 30_000])
        k = rng.randint(0, n)
        found = binomtest(k, n).proportion_ci(method="wilson")
        assert wilson(k, n) == pytest.approx((found.low, found.high), abs=1e-6)
        assert mcnemar(k, n - k) == pytest.approx(binomtest(k, n).pvalue, rel=1e-6, abs=1e-300)
    assert mcnemar(0, 0) == 1 and mcnemar(60_000, 40_000) == 0.0 < mcnemar(1000, 900) < 0.05
    for pair in ((-1, 3), (3, -1)):
        with pytest.raises(ValueError, match="0 or more"): mcnemar(*pair)


def test_paired_bootstrap_is_scipys():
    import numpy as np
    from scipy.stats import bootstrap
    rng = np.random.default_rng(0)
    for n in (40, 300):
        before, after = rng.random(n) < .5, rng.random(n) < .6
        ours = paired_gain(list(before), list(after), resamples=4000)
        theirs = bootstrap((after.astype(float) - before,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.6 / n ** .5 / 4)
        assert ours.p == mcnemar(int((after & ~before).sum()), int((before & ~after).sum()))


def asked(question, answer, task="a", **more):
    turns = [dict(role="user", content=question), dict(role="assistant", content=answer)]
    return dict(id=question, images=[], messages=turns, answer=answer, meta={"task": task}, **more)


def test_majority_is_scikit_learns():
    from sklearn.dummy import DummyClassifier
    from sklearn.metrics import accuracy_score
    rng = random.Random(7)
    for _ in range(30):
        weights = [rng.random() for _ in range(4)]
        said = rng.choices(["red", "blue", "green", "white"], weights, k=101)
        held = rng.choices(["red", "blue", "green", "white"], weights, k=50)
        counts = sorted(map(said.count, set(said)))
        if len(counts) > 1 and counts[-1] == counts[-2]: continue  # a tie: each may choose its own
        dummy = DummyClassifier(strategy="most_frequent").fit([[0]] * 101, said)
        ours = majority_baseline([asked("Q", a) for a in said], [asked("Q", a) for a in held])
        assert ours.accuracy == pytest.approx(accuracy_score(held, dummy.predict([[0]] * 50)))
        assert guess_rate(ours.rows) >= ours.accuracy


def test_text_baseline_reads_only_words():
    train = [asked("<image>Is there a lamp?", "yes")] * 3 + [asked("Is there a lamp", "no")] + [asked("Which colour is the vase?", "red")]
    found = text_baseline(train, [asked("Photo 1: <image>\nIs there a lamp?", "yes"), asked("What colour?", "red"), asked("", "x"), asked("?", "x")])
    assert found.answers[:2] == ["yes", "red"] and len(found.answers) == 4
    marked = text_baseline([record("Corinth")], [record("Corinth")])
    assert marked.accuracy == 1 and marked.format_rate == 1  # in the asked form
    for baseline in (majority_baseline, text_baseline):
        with pytest.raises(ValueError, match="train is empty"): baseline([], train)
        assert baseline(train, []).rows == []


def test_shuffled_pictures_are_never_the_own_ones(tmp_path):
    rng = random.Random(2)
    photos = []
    for i in range(5):
        photos.append(str(tmp_path/f"{i}.png"))
        Image.new("RGB", (4, 4), (i * 40, 0, 0)).save(photos[-1])
    rows = [dict(record(id=str(i)), images=[rng.choice(photos)]) for i in range(60)]
    rows += [dict(record(id=f"m{i}"), images=[Image.open(photos[0]), Image.new("RGB", (4, 4 + i))]) for i in range(2)]
    with pytest.raises(ValueError, match="record 'm0' has 2 pictures"): shuffle_images(rows)
    rows = rows[:60]
    for seed in range(5):
        shuffled = shuffle_images(rows, seed=seed)
        assert all(a["images"] != b["images"] and a["messages"] == b["messages"] for a, b in zip(rows, shuffled))
        assert shuffled == shuffle_images(rows, seed=seed)
    assert shuffle_images([asked("no picture", "x")])[0]["images"] == [] and shuffle_images([]) == []
    other = tmp_path/"sub"
    other.mkdir()
    twins = [dict(record(), images=[photos[0]]), dict(record(), images=[str(other/".."/"0.png")])]
    with pytest.raises(ValueError, match="Take it out"): shuffle_images(twins)  # one file under two names


def test_words_only_leaves_the_record_alone():
    row = record()
    bare, = without_images([row])
    assert bare["images"] == [] and bare["messages"][0]["content"] == "Which?" and row["messages"][0]["content"] == "<image>Which?"


def test_a_result_without_tasks_is_of_the_same_questions():
    rows = [asked(str(i), "red" if i % 2 else "3", "colour" if i % 2 else "count") for i in range(40)]
    ours, none = (Scores(score_answers(said, rows)) for said in ([r["answer"] for r in rows], ["no"] * 40))
    theirs = Scores([{**r, "task": "all", "id": int(r["id"])} for r in none.rows])  # as read_result reads another program's file
    assert paired_gain(theirs, ours) == paired_gain(none, ours) and paired_gain(ours, theirs) == paired_gain(ours, none)
    assert compare_table({"a": ours, "b": theirs}).rows == compare_table({"a": ours, "b": none}).rows
    assert compare_table({"b": theirs, "a": ours}).rows == [["all questions", 40, *compare_table({"b": none, "a": ours}).rows[0][2:]]]
    assert look_table(ours, blank=theirs).rows == look_table(ours, blank=none).rows
    assert gain_table(theirs, ours).rows == gain_table(none, ours).rows and len(gain_table(ours, theirs).rows) == 3
    assert theirs.tasks == ["all"]  # left alone


def test_look_table_sees_who_looks():
    rows = [asked(str(i), "red" if i % 2 else "blue") for i in range(60)]
    seer, blind = (Scores(score_answers(said, rows)) for said in ([r["answer"] for r in rows], ["red"] * 60))
    assert "The model looks" in repr(look_table(seer, blank=blind)) and "No sign of looking" in repr(look_table(blind, blank=blind, shuffled=blind))
    assert "No sign of looking" in repr(look_table(seer, blank=blind, shuffled=seer))  # the better control counts
    few = rows[:4]  # 3 of 4 mended: the interval leaves out zero, but a coin does that in one case of four
    lucky, none = (Scores(score_answers(x, few)) for x in ([r["answer"] for r in few[:3]] + ["no"], ["no"] * 4))
    assert paired_gain(none, lucky).low > 0 and "No sign of looking" in repr(look_table(lucky, blank=none))
    only_open = Scores(score_answers(["x"], [asked("1", "y", answer_type="OPEN")]))
    assert "No sign" in repr(look_table(only_open, blank=only_open))
    with pytest.raises(ValueError, match="different questions"): look_table(seer, blank=only_open)


#  answer, truth, is the marker asked for, kind
KINDS = [("", "3", False, "empty answer"), (" \n", "3", True, "empty answer"), ("2", "3", False, "number too small"),
         ("twelve", "3", False, "number too large"), (f"{MARK} 2", "3", True, "number too small"), ("2", "3", True, "no marker"),
         ("It is 3", "3", True, "right word, no marker"), ("red", "blue", False, "another answer of this task"),
         ("reddish", "blue", False, "an unknown answer"), ("no", "blue", False, "an unknown answer"), ("blue", "blue", False, "right")]


@pytest.mark.parametrize("answer,truth,marked,kind", KINDS)
def test_kinds_of_mistakes(answer, truth, marked, kind):
    row, = score_answers([answer], [record(truth, marked=marked)])
    assert error_kind(row, {"red", "blue", "3"}) == kind


def test_every_mistake_is_in_the_table_once():
    rng = random.Random(5)
    words = ["red", "blue", "3", "5", "", "purple", f"{MARK} red", "It is red", "<b>x</b>"]
    rows = [record(rng.choice(["red", "blue", "3"]), marked=rng.random() < .5, id=str(i)) for i in range(200)]
    scores = Scores(score_answers([rng.choice(words) for _ in rows], rows))
    table = error_table(scores)
    assert sum(line[1] for line in table.rows) == scores.n - sum(scores.values()) == sum(k != "right" for k in error_kinds(scores.rows))
    page = error_gallery(rows, scores, per_kind=2)._repr_html_()
    assert page.count("<h4>") == len(table.rows) and "<b>x</b>" not in page
    assert "no mistakes" in repr(error_gallery([], Scores([])))
    with pytest.raises(ValueError, match="200 records and 0 answers"): error_gallery(rows, Scores([]))

"""Odd answers, odd numbers and hostile texts through the scores of lesson 13."""
import random

import pytest
from PIL import Image

from vlmcourse.evaluate import (
    Scores, Table, blank_images, evaluate, gain_table, guess_rate, is_right, kind_of_gain, paired_gain, score_answers,
    show_answers, show_share, wilson,
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


def test_learning_to_say_one_word_is_not_skill():
    truths = ["Athens", "Rhodes", "Corinth", "Samos"] * 30
    records = [record(truth, id=str(i)) for i, truth in enumerate(truths)]
    silent = Scores(score_answers([""] * 120, records))
    parrot = Scores(score_answers([f"{MARK} Rhodes"] * 120, records))
    expert = Scores(score_answers([f"{MARK} {truth}" for truth in truths], records))
    assert guess_rate(parrot.rows) == 0.25
    assert kind_of_gain(silent, parrot).startswith("Kind of gain: format.")
    assert kind_of_gain(silent, expert).startswith("Kind of gain: format and skill.")
    assert kind_of_gain(parrot, expert).startswith("Kind of gain: skill.")
    assert "luck" in kind_of_gain(expert, parrot)  # a loss is no gain


def test_nothing_from_a_model_or_a_data_set_becomes_html():
    evil = '<script>alert("x")</script>'
    bad = record(evil, id=evil, meta={"task": evil})
    bad["messages"][0]["content"] = f"<image>{evil}"
    before, after = (Scores(score_answers([text], [bad])) for text in (evil, f"{MARK} {evil}"))
    other = Scores(before.rows + score_answers(["1"], [record("1", marked=False)]))
    pages = [show_answers([bad], before, after), before, other, gain_table(before, after), gain_table(other, other),
             Table([evil], [[evil]], note=evil)]
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

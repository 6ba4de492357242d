"""Odd answers: each is read as stated, or the reason is given; nothing raises, nothing takes long."""
import math
import random
import time

import pytest

from vlmcourse.answers import (final_answer, normalise_answer, parse_boxes, parse_choice, parse_number, parse_yes_no,
                               true_answer)
from vlmcourse.formats import to_record
from vlmcourse.museum import make_records

MARK = "### The final answer is:"
FINAL = [
    (f"{MARK} 3", "3"), (f"I see it. {MARK} 3.", "3"), (f"{MARK}3", "3"), (f"{MARK}\n\n3\nBye.", "3"), (f"{MARK} 3.5.", "3.5"),
    (f"{MARK} a. b.", "a. b"), (f"{MARK} 1 {MARK} 2", "2"), (f"{MARK} red\nI am sure.", "red"), (MARK, ""), (f"{MARK} .", ""),
    ("", None), ("3", None), ("The final answer is: 3", None), ("### the final answer is: 3", None),
    ("### The final answer is 3", None), (None, None), (3, None),
]


@pytest.mark.parametrize("text, answer", FINAL)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


SAME = [
    ["3", "three", "Three", " THREE. ", "3.", "**3**", "`3`", "(3)", '"three"', "three!", 3, "３"],
    ["21", "twenty-one", "Twenty one", "twenty\none", "21,"],
    ["yes", "Yes.", "YES!", "'yes'"], ["red vase", "Red  vase.", "red\tvase", "**Red** vase"],
    ["90", "ninety"], ["0", "zero"], ["-5"], [".5"], ["3.5"], ["3,5"], ["don't"], ["one-handled"], ["someone"],
    ["", " ", "...", "!?"], ["no"], ["none", None], ["1 of 2", "one of two"], ["1000"], ["été", "ÉTÉ", "e\u0301te\u0301"],
]


def test_normalise_answer():
    written = [{normalise_answer(text) for text in group} for group in SAME]
    assert all(len(group) == 1 for group in written), written
    assert len(set.union(*written)) == len(SAME)  # and what differs stays different
    assert all(normalise_answer(text) == text for group in written for text in group)


def test_true_answer():
    record = to_record("How many?", answer="I count. ### The final answer is: 3.")
    assert true_answer(record) == "3"
    assert true_answer({**record, "answer": 4}) == "4"
    assert true_answer(to_record("How many?", answer="3")) == "3"
    assert true_answer(to_record("How many?", answer="x ### The final answer is:")) == ""


NONE, MANY, FORM, BOUND = "no number", "several different numbers", "a number in an unknown form", "only a bound"
FRACTION, PERCENT, LARGE = "a fraction", "a percentage", "a number word above ninety-nine"
NUMBERS = [  # what was said, what is read: a number, or the problem
    ("3", 3), ("three", 3), ("Three.", 3), ("**3**", 3), ("(3)", 3), ("３", 3), ("٣", 3), ("3!", 3), ("~3", 3), ("$3", 3),
    ("-3", -3), ("\u22123", -3), ("minus three", -3), ("+4", 4), (".5", 0.5), ("3.50", 3.5), ("1e3", 1000), ("x = 3", 3),
    ("1,234.5", 1234.5), ("1,234,567", 1234567), ("twenty-one", 21), ("twenty one", 21), ("Ninety  nine", 99), ("zero", 0),
    ("about 3 vases", 3), ("3 vases. Yes, three.", 3), ("3.0 or 3", 3), ("No. 3", 3), ("- 3 vases", 3), ("5 cm", 5), ("3°", 3),
    ("one", 1), ("There is one vase.", 1), ("the number is one", 1), ("the red one", NONE), ("3, the red one too", 3),
    (f"2 or 3? {MARK} 3", 3), (f"2 {MARK} three.", 3), (f"{MARK}", NONE), (f"{MARK} 2 or 3", MANY), ("<answer> 2 </answer>", 2),
    ("<think>3 or 4?</think>4", 4), ("<think>perhaps 3", NONE), ("<think>1</think><answer>2</answer> 3", 2),
    ("2 or 3", MANY), ("1 red and 2 blue", MANY), ("1 234", MANY), ("Photo 2 shows 3", MANY), ("two vases: one red, one blue", MANY),
    ("There are two vases: a red one and a blue one.", MANY),
    ("2-3", FORM), ("2\u20133", FORM), ("10:30", FORM), ("3,5", FORM), ("1.234,5", FORM), ("1,23", FORM), ("12,34,567", FORM),
    ("1.2.3", FORM), ("3/4/2020", FORM), ("3+", FORM), ("9" * 50, FORM), ("1e999", FORM), ("192.168.0.1", FORM),
    ("1/2", FRACTION), ("½", FRACTION), ("half of them", FRACTION), ("two and a half", FRACTION), ("two and a quarter", FRACTION), ("3 of 4, so 3/4", FRACTION),
    ("50 %", PERCENT), ("50%", PERCENT), ("50 percent", PERCENT), ("fifty per cent", PERCENT),
    ("two hundred", LARGE), ("a dozen", LARGE), ("3 million", LARGE),
    ("more than 3", BOUND), ("at least 3", BOUND), ("up to 3", BOUND), ("3 or more", BOUND), ("not 3", BOUND), ("isn't 3", BOUND),
    ("≥3", BOUND), ("<3", BOUND), ("fewer than three", BOUND),
    ("", NONE), (" ", NONE), ("none", NONE), ("nan", NONE), ("infinity", NONE), ("2nd", NONE), ("3D", NONE), ("96px", NONE),
    ("two-handled", NONE), ("B12", NONE), ("III", NONE), ("someone", NONE), ("...", NONE), ("\0", NONE),
]


@pytest.mark.parametrize("text, wanted", NUMBERS)
def test_parse_number(text, wanted):
    found = parse_number(text)
    assert found == ((None, wanted) if isinstance(wanted, str) else (wanted, None))


NO, SEVERAL = "no choice", "several choices"
CHOICES = [
    ("B", "B"), ("b", "B"), ("(b)", "B"), ("B.", "B"), ("**B**", "B"), ("B)", "B"), ("[B]", "B"), ("b) red", "B"), ("B: red", "B"),
    ("B. A red vase", "B"), ("Answer: B.", "B"), ("answer b", "B"), ("The answer is b.", "B"), ("I choose B", "B"), ("It is B!", "B"),
    ("The answer is B because A is wrong", "B"), ("Option A is wrong; option B is right", "B"), ("not A but B", "B"),
    ("B (not A)", "B"), ("The correct answer is option (D)", "D"), ('{"answer": "C"}', "C"), ("<answer>C</answer>", "C"),
    (f"A or B? {MARK} C", "C"), ("A is right", "A"), ("A, because it is red", "A"), ("A.", "A"), ("a", "A"),
    ("A: red, B: blue. Answer: B", "B"), ("A red vase stands by B", "B"), ("B, B and B", "B"), ("Ｂ", "B"),
    ("A vase", NO), ("The answer is a vase", NO), ("The answer is A vase", NO), ("not B", NO), ("It isn't C.", NO), ("E", NO),
    ("AB", NO), ("red", NO), ("", NO), ("All of the above", NO), ("Because of this: b", NO), ("B is wrong", NO), ("3", NO),
    ("Answer: B or C", SEVERAL), ("B or C", SEVERAL), ("B/C", SEVERAL), ("B,C", SEVERAL), ("(A) red (B) blue", SEVERAL),
    ("The answer is B. No, the answer is C.", SEVERAL), ("A and B", SEVERAL), ("answer A, B or C", SEVERAL),
]


@pytest.mark.parametrize("text, wanted", CHOICES)
def test_parse_choice(text, wanted):
    assert parse_choice(text) == ((wanted, None) if len(wanted) == 1 else (None, wanted))


def test_parse_choice_of_other_letters():
    assert parse_choice("E", "ABCDE").value == "E"
    assert parse_choice("2", "1234").value == "2"
    assert parse_choice("d", ["c", "d"]).value == "D"
    for choices in ["", ["red", "blue"], "A?"]:
        with pytest.raises(ValueError, match="choices="):
            parse_choice("A", choices)


BOTH, NEITHER, DENIED = "both yes and no", "neither yes nor no", "denied"
YES_NO = [
    ("yes", "yes"), ("Yes.", "yes"), ("YES!", "yes"), ("**Yes**", "yes"), ("Yeah", "yes"), ("yes it is", "yes"),
    ("The answer is yes.", "yes"), ("Yes, there is no doubt", "yes"), ("No doubt, yes", "yes"), ("Is it red? Yes", "yes"),
    (f"no? {MARK} yes", "yes"), ("<think>no</think>yes", "yes"), ("yes, there is no vase beside it", "yes"),
    ("No", "no"), ("no, it is not", "no"), ("Nope", "no"), ("No vases.", "no"), ("Well, no", "no"), ("no, not yes", "no"),
    ("I would say no, there isn't one", "no"), ('"No"', "no"),
    ("yes and no", BOTH), ("Yes or no?", BOTH), ("No. Yes.", BOTH), ("no or yes", BOTH),
    ("not yes", DENIED), ("I can't say yes", DENIED), ("I cannot say no.", DENIED), ("I can\u2019t say yes", DENIED),
    ("There is no vase", NEITHER), ("eyes", NEITHER), ("yesterday", NEITHER), ("It is true", NEITHER), ("", NEITHER),
    ("no one", NEITHER), ("No idea.", NEITHER), ("north", NEITHER), ("y", NEITHER),
]


@pytest.mark.parametrize("text, wanted", YES_NO)
def test_parse_yes_no(text, wanted):
    assert parse_yes_no(text) == ((wanted, None) if wanted in ("yes", "no") else (None, wanted))


def box(*numbers, label=None):
    return {"bbox": list(numbers), "label": label}


A, B = box(1, 2, 3, 4, label="a"), box(5, 6, 7, 8, label="b")
A_, B_ = box(1, 2, 3, 4), box(5, 6, 7, 8)
JSON = '[{"bbox_2d": [1, 2, 3, 4], "label": "a"}, {"bbox_2d": [5, 6, 7, 8], "label": "b"}]'
OLD = "<|object_ref_start|>a<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
BOXES = [  # what it is, what was said, the boxes, the problem
    ("as asked", JSON, [A, B], None),
    ("a fence", f"```json\n{JSON}\n```", [A, B], None),
    ("a fence without an end", f"```json\n{JSON}", [A, B], None),
    ("text before and after", f"Sure, here they are: {JSON} Shall I go on?", [A, B], None),
    ("behind the mark", f"[9, 9, 10, 10]? {MARK}\n{JSON}", [A, B], None),
    ("behind the mark, in lines", f"{MARK}\n[\n[1,\n2,\n3,\n4]\n]", [A_], None),
    ("thinking", f"<think>[9, 9, 10, 10]</think><answer>{JSON}</answer>", [A, B], None),
    ("thinking cut off", "<think>[9, 9, 10, 10]", [], "no box found"),
    ("single quotes", JSON.replace('"', "'"), [A, B], None),
    ("no quotes", JSON.replace('"', ""), [A, B], None),
    ("python, trailing comma", "[{'bbox': (1, 2, 3, 4), 'label': 'a',},]", [A], None),
    ("an apostrophe", "[{'bbox': [1, 2, 3, 4], 'label': 'Anna's'}]", [box(1, 2, 3, 4, label="Anna's")], None),
    ("quotes in quotes", '[{"bbox": [1, 2, 3, 4], "label": "the "red" one"}]', [box(1, 2, 3, 4, label='the "red" one')], None),
    ("a line in a label", '[{"bbox": [1, 2, 3, 4], "label": "a\nb"}]', [box(1, 2, 3, 4, label="a\nb")], None),
    ("brackets in a label", '[{"bbox": [1, 2, 3, 4], "label": "a]}[{"}]', [box(1, 2, 3, 4, label="a]}[{")], None),
    ("brackets in a label, nearly JSON", "[{'bbox': [1, 2, 3, 4], 'label': 'a]}[{'}]", [box(1, 2, 3, 4, label="a]}[{")], None),
    ("unicode", '[{"bbox": [1, 2, 3, 4], "label": "花瓶 \\u00e9"}]', [box(1, 2, 3, 4, label="花瓶 é")], None),
    ("key bbox", '{"bbox": [1, 2, 3, 4]}', [A_], None),
    ("key box", '{"box": [1, 2, 3, 4], "name": "a"}', [A], None),
    ("key box_2d", '{"box_2d": [1, 2, 3, 4], "category": "a"}', [A], None),
    ("key in capitals", '{"BBox_2D": [1, 2, 3, 4], "Label": "a"}', [A], None),
    ("keys boxes and label", '{"boxes": [[1, 2, 3, 4], [5, 6, 7, 8]]}', [A_, B_], None),
    ("several in one key", '{"bbox_2d": [[1, 2, 3, 4], [1, 2, 3, 4]], "label": "a"}', [A, A], None),
    ("wrapped", '{"objects": [{"bbox": [1, 2, 3, 4], "label": "a"}], "n": 1}', [A], None),
    ("a list of four", "[1, 2, 3, 4]", [A_], None),
    ("a list of lists", "[[1, 2, 3, 4], [5, 6, 7, 8]]", [A_, B_], None),
    ("lists side by side", "[1, 2, 3, 4] and [5, 6, 7, 8]", [A_, B_], None),
    ("lists too deep by two", "[[[1, 2, 3, 4]]]", [A_], None),
    ("two corners", "[[1, 2], [3, 4]]", [A_], None),
    ("two corners in a key", '{"bbox_2d": [[1, 2], [3, 4]], "label": "a"}', [A], None),
    ("two corners in round brackets", "(1, 2), (3, 4)", [A_], None),
    ("four in round brackets", "It is at (1, 2, 3, 4).", [A_], None),
    ("numbers as text", '{"bbox": ["1", "2.0", " 3", "4"], "label": "a"}', [A], None),
    ("the box as text", '{"bbox": "[1, 2, 3, 4]", "label": "a"}', [A], None),
    ("floats and signs", "[-1.5, 2e0, +3, 4.]", [box(-1.5, 2, 3, 4)], None),
    ("label null", '{"bbox": [1, 2, 3, 4], "label": null}', [A_], None),
    ("label a number", '{"bbox": [1, 2, 3, 4], "label": 7}', [box(1, 2, 3, 4, label="7")], None),
    ("a point, no area", "[5, 5, 5, 5]", [box(5, 5, 5, 5)], None),
    ("a footnote", f"as in [1], see [below]: {JSON}", [A, B], None),
    ("none", "[]", [], None),
    ("none, with text", "There are none: [ ]", [], None),
    ("none, in a key", '{"objects": []}', [], None),
    ("none, in boxes", '{"boxes": []}', [], None),
    ("InternVL", "<ref>a</ref><box>[[1, 2, 3, 4]]</box>", [A], None),
    ("InternVL, several in a tag", "<ref>a</ref><box>[[1,2,3,4],[1,2,3,4]]</box>\n<ref>b</ref><box>[[5,6,7,8]]</box>", [A, A, B], None),
    ("InternVL, text around", "I see <ref> a </ref><box>[[1, 2, 3, 4]]</box> here.", [A], None),
    ("InternVL, no label", "<box>[[1, 2, 3, 4]]</box>", [A_], None),
    ("InternVL, none", "<ref>a</ref><box>[]</box>", [], None),
    ("Qwen2-VL", OLD, [A], None),
    ("Qwen2-VL, several", OLD + "<|box_start|>(5,6),(7,8)<|box_end|>", [A, box(5, 6, 7, 8, label="a")], None),
    ("Qwen-VL", "<ref>a</ref><box>(1,2),(3,4)</box>", [A], None),
    ("tags inside of JSON", '[{"bbox": [1, 2, 3, 4], "label": "<ref>a</ref>"}]', [box(1, 2, 3, 4, label="<ref>a</ref>")], None),
    ("no brackets", "black krater 65,16,95,47", [], "no box found"),
    ("prose", "There are no vases.", [], "no box found"),
    ("empty", "", [], "no box found"),
    ("a list of words", '["a"]', [], "no box found"),
    ("an empty object", "{}", [], "no key for a box"),
    ("another key", '{"a": [1, 2, 3, 4]}', [], "no key for a box"),
    ("points", '[{"point_2d": [1, 2], "label": "a"}]', [], "no key for a box"),
    ("cut in a number", JSON[:-17], [A], "cut off"),
    ("cut in a label", JSON[:-4], [A], "cut off"),
    ("cut before the last bracket", JSON[:-1], [A, B], "cut off"),
    ("cut at the start", "[", [], "cut off"),
    ("cut in a list of lists", "[[1, 2, 3, 4], [5, 6, 7", [A_], "cut off"),
    ("cut in a second list", "[1, 2, 3, 4], [5, 6, 7", [A_], "cut off"),
    ("cut in a second object", '{"bbox": [1, 2, 3, 4], "label": "a"}\n{"bbox": [5', [A], "cut off"),
    ("cut in a bare list", "[1, 2, 3, 4", [], "cut off"),
    ("cut in an object in an object", '{"objects": [{"bbox": [1, 2, 3, 4], "label": "a"}, {"bb', [A], "cut off"),
    ("cut in a corner", "(1, 2), (3,", [], "cut off"),
    ("cut in a tag", "<ref>a</ref><box>[[1, 2, 3, 4]]</bo", [A], "cut off"),
    ("cut in a tag's list", "<ref>a</ref><box>[[1, 2, 3, 4], [5, 6", [A], "cut off"),
    ("cut in a name", OLD + "<|object_ref_start|>b", [A], "cut off"),
    ("cut behind a name", "<ref>a</ref><box>[[1,2,3,4]]</box><ref>b</ref>", [A], "a label without a box"),
    ("three numbers", "[1, 2, 3]", [], "not four numbers"),
    ("five numbers", '{"bbox": [1, 2, 3, 4, 5]}', [], "not four numbers"),
    ("eight numbers", "[1, 2, 3, 4, 5, 6, 7, 8]", [], "not four numbers"),
    ("one bad among good", "[[1, 2, 3, 4], [1, 2, 3], [5, 6, 7, 8]]", [A_, B_], "not four numbers"),
    ("a word", '{"bbox": [1, 2, "three", 4]}', [], "not four numbers"),
    ("units", '{"bbox": ["1px", "2px", "3px", "4px"]}', [], "not four numbers"),
    ("true and null", '{"bbox": [1, true, null, 4]}', [], "not four numbers"),
    ("an empty box", '{"bbox_2d": []}', [], "not four numbers"),
    ("an empty list in a list", "[[]]", [], "not four numbers"),
    ("a box that is null", '{"bbox_2d": null}', [], "not four numbers"),
    ("a box that is an object", '{"bbox": {"x": 1}}', [], "not four numbers"),
    ("a lone corner", "at (1, 2)", [], "not four numbers"),
    ("NaN", '{"bbox": [1, 2, NaN, 4]}', [], "not a finite number"),
    ("infinity", "[1, 2, 3, -Infinity]", [], "not a finite number"),
    ("NaN, nearly JSON", "{'bbox': [1, 2, NaN, 4]}", [], "not a finite number"),
    ("NaN as text", '{"bbox": [1, 2, "nan", 4]}', [], "not a finite number"),
    ("too large a float", "[1, 2, 3, 1e999]", [], "not a finite number"),
    ("too large a whole number", f"[1, 2, 3, {'9' * 400}]", [], "not a finite number"),
    ("a monstrous number", f"[1, 2, 3, {'9' * 5000}]", [], "not four numbers"),
    ("x swapped", "[3, 2, 1, 4]", [box(3, 2, 1, 4)], "corners swapped"),
    ("y swapped", '[{"bbox_2d": [1, 4, 3, 2], "label": "a"}]', [box(1, 4, 3, 2, label="a")], "corners swapped"),
    ("a bracket forgotten", '{"bbox": [1, 2, 3, 4}', [A_], "brackets do not match"),
    ("a wrong bracket", "[1, 2, 3, 4}]", [A_], "brackets do not match"),
    ("a key twice", '{"bbox": [1, 2, 3, 4], "bbox": [5, 6, 7, 8]}', [A_, B_], "a key twice"),
    ("label a list", '{"bbox": [1, 2, 3, 4], "label": ["a"]}', [A_], "label is not text"),
    ("and so on", '[{"bbox": [1, 2, 3, 4], "label": "a"}, ...]', [A], "not a box"),
    ("too deep", "[" * 100 + "1" + "]" * 100, [], "nested too deep"),
    ("too deep and cut off", "[1, 2, 3, 4] " + "[" * 100, [A_], "nested too deep"),
    ("too deep for the library", "[" * 100_000 + "]" * 100_000, [], "nested too deep"),
    ("None", None, [], "not text"), ("a number", 3, [], "not text"), ("a list", [1, 2, 3, 4], [], "not text"),
    ("bytes", b"[1, 2, 3, 4]", [], "not text"),
]


@pytest.mark.parametrize("text, boxes, problem", [row[1:] for row in BOXES], ids=[row[0] for row in BOXES])
def test_parse_boxes(text, boxes, problem):
    assert parse_boxes(text) == (boxes, problem)


def test_other_things_than_text():
    for thing in (None, 3, 3.5, True, b"3", ["3"], {"a": 1}, object()):
        assert parse_number(thing) == (None, "not text") == parse_choice(thing) == parse_yes_no(thing)
        assert parse_boxes(thing) == ([], "not text") and final_answer(thing) is None


def test_the_museum_s_own_answers():
    for record in make_records(20, ["detect"], seed=1):
        value, problem = parse_boxes(record["answer"])
        assert problem is None and value == record["objects"]
    for record in make_records(20, ["count", "steps"], seed=2):
        assert parse_number(record["messages"][-1]["content"]) == (int(record["answer"]), None)
    for record in make_records(20, ["presence", "same"], seed=3):
        assert parse_yes_no(record["messages"][-1]["content"]) == (record["answer"], None)


READERS = [final_answer, normalise_answer, parse_number, parse_choice, parse_yes_no, parse_boxes]


def spoil(text, rng):
    "The text with a few random changes: something lost, doubled, swapped or put in."
    for _ in range(rng.randint(1, 6)):
        i, j = sorted(rng.randrange(len(text) + 1) for _ in "ab")
        j = min(j, i + rng.choice([1, 1, 2, 9, 99]))
        new = rng.choice(["", text[i:j] * 2, rng.choice("[]{}()<>,:'\"\\/|-+.eE\0\n %½３é\ud800") * rng.randint(1, 3), MARK,
                          "<box>", "</ref>", "<think>", "NaN", "1e999", "null", text])
        text = text[:i] + new + text[j:]
    return text


def test_random_changes_never_raise():
    rng = random.Random(0)
    good = [row[1] for row in BOXES if isinstance(row[1], str)] + [row[0] for row in NUMBERS + CHOICES + YES_NO]
    problems = set()
    for _ in range(6000):
        text = spoil(rng.choice(good), rng)[:3000]
        value, problem = parse_boxes(text)
        problems.add(problem)
        assert isinstance(value, list) and (problem is None or value is not None)
        for one in value:
            assert set(one) == {"bbox", "label"} and len(one["bbox"]) == 4 and all(map(math.isfinite, one["bbox"]))
            assert one["label"] is None or isinstance(one["label"], str)
        for reader in (parse_number, parse_choice, parse_yes_no):
            value, problem = reader(text)
            assert (value is None) == (problem is not None), (reader, text)
        assert final_answer(text) is None or isinstance(normalise_answer(text), str)
    assert len(problems) > 10  # the changes reached most of the reasons


def nasty(n):
    "Texts of about n letters, made to be slow to read."
    return {
        "open": "[" * n, "objects": "{" * n, "open and close": "[] " * (n // 3), "deep": "[" * 40 + "}" * n,
        "quotes": '["' + '" ' * (n // 2), "single quotes": "['" + " '" * (n // 2), "slashes": '["' + '\\"' * (n // 2),
        "round": "(" * n, "round and numbers": "(1" * (n // 2), "spaces": " " * n, "spaces inside": '["a"' + " " * n,
        "letters": "a" * n, "digits": "1" * n, "digits inside": "[" + "1" * n + "]", "commas": "1," * (n // 2), "colons": "{" + ":" * n,
        "boxes": "[1,2,3,4]," * (n // 10), "objects cut": "[" + '{"bbox":[1,2,3,4]},' * (n // 20), "tags": "<ref>" * (n // 5),
        "box tags": "<box>" * (n // 5), "marks": MARK * (n // 25), "accents": "a" + "\u0301\u0327" * (n // 2), "dots": "." * n,
        "the one": "the one " * (n // 8), "answer B or": "answer B or " * (n // 12), "minus": "minus " * (n // 6),
        "twenty": "twenty " * (n // 7), "no": "no " * (n // 3), "thousands": "1" + ",111" * (n // 4), "stars": "*" * n,
    }


@pytest.mark.parametrize("reader", READERS)
def test_a_megabyte_of_nonsense_is_read_in_seconds(reader):
    short, long = nasty(20_000), nasty(160_000)
    def seconds(text):
        start = time.process_time()
        reader(text)
        return time.process_time() - start
    # eight times the text: about eight times the time; a search that goes back would need 64 times. A busy machine can
    # slow down one reading, so the best of three counts.
    def slow(name): return seconds(long[name]) > 24 * max(seconds(short[name]), 0.02)
    assert not [name for name in short if all(slow(name) for _ in range(3))]
    reader("[{\"bbox_2d\": [1, 2, 3, 4], \"label\": \"" + "x" * 1_000_000 + "\"}]")

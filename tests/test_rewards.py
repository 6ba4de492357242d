"""Rewards: odd answers and columns, equality with TRL, plug-ins that break, and the bench: what pays, and what no longer does."""
import asyncio
import math
import pickle
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest

from vlmcourse import rewards as R
from vlmcourse.answers import ANSWER_MARK
from vlmcourse.evaluate import is_right
from vlmcourse.museum import make_records
from vlmcourse.rewards import (PROBES, REWARDS, Case, Probe, bench_rewards, call_rewards, exact_reward, load_rewards,
                               make_bbox, make_by_row, make_category, make_choice, make_completeness, make_cosine,
                               make_exact, make_format, make_gated, make_judged, make_number, make_overlong,
                               make_repetition, make_similarity, number_reward, short_answer, texts_of, to_columns)

root = Path(__file__).resolve().parent.parent
M = ANSWER_MARK


# --- reading: completions and columns ---------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [3, None, [], {}, {"role": "assistant"}, [{"content": 3}], [3], [{"content": [3]}]])
def test_a_completion_of_no_known_form_is_named(bad):
    with pytest.raises(ValueError, match=r"completions\[1\]"):
        texts_of(["fine", bad])


def test_forms_of_completions():
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}]
    assert texts_of(["t", talk, {"content": "m"}, ({"content": None},)]) == ["t", "ab", "m", ""]
    assert texts_of(()) == []


def test_columns_from_records():
    records = make_records(3, ["count", "detect", "steps"], seed=1)
    columns = to_columns(records, group=4)
    assert all(len(values) == 12 for values in columns.values())
    assert columns["id"] == [r["id"] for r in records for _ in range(4)]
    assert columns["task"][::4] == ["count", "detect", "steps"]
    assert all(turns[-1]["role"] == "user" for turns in columns["prompts"])
    assert columns["answer"][::4] == [r["answer"] for r in records] and "messages" not in columns
    said = [{"role": "user", "content": "Why?"}]
    own = [dict(messages=said, task=1), dict(messages=said, task=2, meta=dict(task="museum")), dict(messages=said, task=None, meta=dict(task="museum"))]
    assert to_columns(own)["task"] == [1, 2, "museum"]      # a column of the user is given as it is
    odd = [dict(messages=said, meta="shelf"), dict(messages=said, meta=[1], task="own"), dict(messages=said)]
    assert to_columns(odd)["task"] == [None, "own", None]


def test_the_gold_answer_earns_everything():
    records = make_records(46, None, seed=2)
    columns, gold = to_columns(records), [r["messages"][-1]["content"] for r in records]
    assert exact_reward(gold, **columns) == [1.0] * 46
    detect = make_records(20, ["detect"], seed=3)
    columns, gold = to_columns(detect), [r["answer"] for r in detect]
    for name in ("bbox", "category", "completeness", "f1", "box_format"):
        assert np.allclose(REWARDS[name](gold, **columns), 1), name
    assert [R.reward_name(reward) for reward in REWARDS.values()] == list(REWARDS)
    parts = call_rewards(["format", "box_format", "think_format"], gold, columns).parts  # no two have one name
    assert parts == dict(format=[0.0] * 20, box_format=[1.0] * 20, think_format=[0.0] * 20)
    locate = make_records(10, ["locate"], seed=4)  # objects lists every vase; the answer is one box
    columns, gold = to_columns(locate), [r["answer"] for r in locate]
    assert np.allclose(make_bbox(truth="answer")(gold, **columns), 1)


# --- answers ----------------------------------------------------------------------------------------------------

def test_a_reward_of_one_means_right_in_the_evaluation():
    rng, words = random.Random(0), [M, "<answer>", "</answer>", "</think>", "<think>", "3", "three.", "13", "not", "\n", "**3**"]
    ones = 0
    for _ in range(10_000):
        text = " ".join(rng.choices(words, k=rng.randint(0, 7)))
        value = exact_reward([text], answer=["3"])[0]
        assert value in (0, 1)
        ones += value
        if value and M in text: assert is_right(text, "3", marker=True), text
        if "<" not in text: assert value == (is_right(text, "3") and short_answer(text) is not None), text
    assert ones > 300


@pytest.mark.parametrize("truth", ["", "  ", M, "<answer> </answer>", f"{M} ."])
def test_an_empty_truth_is_an_error(truth):
    with pytest.raises(ValueError, match="truth of row 1"):
        exact_reward(["", ""], answer=["3", truth])


def test_no_column_of_the_data_overwrites_a_setting():
    columns = dict(answer=["3"], marker=[True], tolerance=[9], near=[9], name=["x"], settings=["x"], rule=["x"], choices=["x"])
    assert exact_reward(["3"], **columns) == [1] and number_reward(["4"], **columns) == [0]
    boxes = dict(objects=[[dict(bbox=[0, 0, 9, 9], label="a")]], size=[(96, 96)], family=["x"], threshold=[0], extra=[0])
    assert make_bbox()(['[{"bbox_2d": [0, 0, 9, 9], "label": "a"}]'], **boxes) == [1]


def test_rewards_can_be_pickled():  # TRL's asynchronous trainer sends them to another process
    for reward in [*REWARDS.values(), make_gated(exact_reward, number_reward), make_cosine(exact_reward, 9),
                   make_by_row({"a": exact_reward}), make_overlong(9, 3)]:
        again = pickle.loads(pickle.dumps(reward))
        assert again.__name__ == reward.__name__
    assert pickle.loads(pickle.dumps(number_reward))(["3"], answer=["3"]) == [1]


def test_number_near_and_tolerance():
    values = make_number(near=2.5)(["1", "2", "3", "4", "5", "6", "x"], answer=["3"] * 7)
    assert np.allclose(values, [0.2, 0.6, 1, 0.6, 0.2, 0, 0])
    assert make_number(tolerance=0.05)(["0.31", "0.36"], answer=["0.3"] * 2) == [1, 0]
    assert number_reward(["1e3", "1,000"], answer=[1000] * 2) == [1, 1]
    assert make_choice("1234")(["3"], answer=[3]) == [1]


# --- boxes ------------------------------------------------------------------------------------------------------

TRUE = [dict(bbox=[0, 0, 10, 10], label="a"), dict(bbox=[20, 20, 40, 40], label="b")]


def said(*boxes): return R._say([b[:4] for b in boxes], [b[4] for b in boxes])


BOXES = [  # what was said; bbox, category, completeness, f1
    (said((0, 0, 10, 10, "a"), (20, 20, 40, 40, "b")), (1, 1, 1, 1)),
    (said((20, 20, 40, 40, "B."), (0, 0, 10, 10, " A")), (1, 1, 1, 1)),
    (said((0, 0, 10, 10, "b"), (20, 20, 40, 40, "a")), (1, 0, 1, 0)),
    (said((0, 0, 10, 10, "a")), (1 / 2, 1 / 2, 1 / 2, 2 / 3)),
    (said((0, 0, 10, 10, "a"), (20, 20, 40, 40, "b"), (50, 50, 60, 60, "a")), (2 / 3, 2 / 3, 2 / 3, 4 / 5)),
    (said((0, 0, 10, 5, "a"), (20, 20, 40, 40, "b")), (3 / 4, 1, 1, 1)),
    (said((0, 0, 10, 4, "a"), (20, 20, 40, 40, "b")), (0.7, 1 / 2, 1 / 2, 1 / 2)),
    (said((10, 10, 0, 0, "a"), (20, 20, 40, 40, "b")), (1 / 2, 1 / 2, 1 / 2, 1 / 2)),  # corners swapped: counts, no area
    (said((5, 5, 5, 5, "a")), (0, 0, 0, 0)), ("[]", (0, 0, 0, 0)), ("", (0, 0, 0, 0)), ("none", (0, 0, 0, 0)),
    ('[{"bbox_2d": [0, 0, 10, 10], "label": "a"}, {"bbox_2d": [20, 2', (1 / 2, 1 / 2, 1 / 2, 2 / 3)),
    ('[{"bbox_2d": [0, 0, 10, 10]}, {"bbox_2d": [20, 20, 40, 40], "label": null}]', (1, 0, 1, 0)),
]


@pytest.mark.parametrize("text, wanted", BOXES)
def test_boxes(text, wanted):
    columns = dict(objects=[TRUE], size=[(96, 96)])
    found = [REWARDS[name]([text], **columns)[0] for name in ("bbox", "category", "completeness", "f1")]
    assert np.allclose(found, wanted)


def test_each_box_is_paired_once():
    true = [dict(bbox=[0, 0, 10, 10], label="a"), dict(bbox=[0, 0, 10, 20], label="a")]
    text = said((0, 0, 10, 14, "a"), (0, 0, 10, 10, "a"))
    value = make_bbox()([text], objects=[true], size=[(96, 96)])[0]
    assert abs(value - (1 + 0.7) / 2) < 1e-6


def test_families_write_other_numbers():
    columns = dict(objects=[[dict(bbox=[100, 150, 300, 400], label="red cube")]], size=[(640, 480)])
    for family, box in (("qwen3-vl", [156, 312, 469, 833]), ("qwen2.5-vl", [101, 149, 302, 397]), ("tiny", [15, 30, 45, 80])):
        text = R._say([box], ["red cube"])
        value = make_bbox(family=family)([text], **columns)[0]
        assert value > 0.97, (family, value)
        assert make_completeness(family=family)([text], **columns) == [1]
    assert make_bbox(family="internvl")(["<ref>red cube</ref><box>[[156, 312, 469, 833]]</box>"], **columns)[0] > 0.99


def test_where_the_truth_and_the_size_come_from():
    record = make_records(1, ["detect"], seed=5)[0]
    image, text = record["images"][0], record["answer"]
    for size in (dict(images=[[image]]), dict(images=[image]), dict(image=[image]), dict(size=[image.size])):
        assert np.allclose(make_bbox()([text], objects=[record["objects"]], **size), 1), size
    as_table = dict(bbox=[o["bbox"] for o in record["objects"]], label=[o["label"] for o in record["objects"]])
    assert np.allclose(make_bbox()([text], objects=[as_table], size=[image.size]), 1)
    assert np.allclose(make_bbox()([text], solution=[text]), 1)
    assert make_bbox()([text], solution=["not boxes at all"]) == [None]
    with pytest.raises(ValueError, match="row 0 has boxes, and not one picture"):
        make_bbox()([text], objects=[record["objects"]], images=[[image, image]])
    with pytest.raises(ValueError, match="needs the column 'objects' or 'answer' or 'solution'"):
        make_bbox()([text])
    with pytest.raises(ValueError, match="above_blind"):
        make_bbox(above_blind=True)([text], solution=[text])


def test_above_blind_by_hand():
    true, columns = [dict(bbox=[0, 0, 96, 48], label="a")], dict(size=[(96, 96)])
    texts = [said((0, 0, 96, 96, "a")), said((0, 0, 96, 48, "a")), said((0, 0, 96, 64, "a"))]
    values = [make_bbox(above_blind=True)([t], objects=[true], **columns)[0] for t in texts]
    assert np.allclose(values, [0, 1, (0.75 - 0.5) / 0.5])
    whole = [dict(bbox=[0, 0, 96, 96], label="a")]  # fills the picture: the whole picture is right
    assert make_bbox(above_blind=True)([texts[0]], objects=[whole], **columns)[0] > 0.99


def test_random_boxes_stay_between_0_and_1_and_order_does_not_matter():
    rng = np.random.default_rng(0)
    for _ in range(100):
        boxes = [[*map(int, sorted(rng.integers(0, 97, 2))), *map(int, sorted(rng.integers(0, 97, 2)))] for _ in range(6)]
        boxes = [(a, c, b, d, "ab"[i % 2]) for i, (a, b, c, d) in enumerate(boxes)]
        true = [dict(bbox=list(b[:4]), label=b[4]) for b in boxes[:3] if b[0] < b[2] and b[1] < b[3]]
        texts = [said(*boxes[2:]), said(*boxes[2:][::-1])]
        for name in ("bbox", "category", "completeness", "f1"):
            one, other = REWARDS[name](texts, objects=[true] * 2, size=[(96, 96)] * 2)
            assert 0 <= one <= 1 + 1e-9 and abs(one - other) < 1e-9


def test_many_boxes_do_not_take_long():
    flood = said(*[(i % 90, i % 80, i % 90 + 5, i % 80 + 9, "a") for i in range(1000)])
    start = time.perf_counter()
    make_bbox()([flood] * 4, objects=[TRUE] * 4, size=[(96, 96)] * 4)
    assert time.perf_counter() - start < 10


# --- equality with TRL ------------------------------------------------------------------------------------------

def test_lengths_as_in_trl():
    from trl.rewards import (accuracy_rewards, get_cosine_scaled_reward, get_repetition_penalty_reward,
                             get_soft_overlong_punishment)
    rng = random.Random(1)
    ids = [rng.choices(range(rng.randint(1, 12)), k=rng.randint(0, 130)) for _ in range(10_000)]
    for most, margin in ((100, 20), (60, 60), (50, 0), (1, 1)):
        assert make_overlong(most, margin)(ids, completion_ids=ids) == get_soft_overlong_punishment(most, margin)(ids)
    for n, penalty in ((1, -1.0), (2, -0.5), (3, -1.0), (7, 0.0)):
        ours, theirs = make_repetition(n, penalty)(ids, completion_ids=ids), get_repetition_penalty_reward(n, penalty)(ids)
        assert np.allclose(ours, theirs, rtol=0, atol=0)
    answers, truths = [rng.choice(["3", "4"]) for _ in ids], [rng.choice(["3", None]) for _ in ids]
    ours = make_cosine(exact_reward, 70)(answers, solution=truths, completion_ids=ids)
    with patch.object(accuracy_rewards, "accuracy_reward", lambda c, s: exact_reward(c, solution=s)):
        theirs = get_cosine_scaled_reward(max_len=70)(answers, truths, ids)
    assert [v is None for v in ours] == [v is None for v in theirs]
    assert np.allclose([v or 0 for v in ours], [v or 0 for v in theirs], atol=1e-12)


def test_a_well_formed_thought_is_one_for_trl_too():
    from trl.rewards import think_format_reward
    rng, words = random.Random(2), ["<think>", "</think>", "<answer>", "</answer>", "a", "\n", " "]
    texts = ["".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(10_000)]
    texts += [f"<think>{a}</think>{b}<answer>{c}</answer>" for a in ("x", "x\ny") for b in ("", "\n") for c in ("1", "a b")]
    ours = make_format("think")(texts)
    theirs = think_format_reward([[{"content": text}] for text in texts])
    assert sum(ours) >= 8 and all(t for o, t in zip(ours, theirs) if o)
    assert sum(theirs) > sum(ours)  # TRL's also pays for empty tags and for tags that come twice


def test_the_sum_is_that_of_trl():
    pytest.importorskip("trl")
    from trl import GRPOTrainer
    records = make_records(4, ["steps", "detect", "count", "colour"], seed=7)
    columns = to_columns(records, group=3)
    columns["answer"][5] = columns["answer"][6] = None
    texts = [r["messages"][-1]["content"] if i else "nothing" for r in records for i in range(3)]
    talk = [[{"role": "assistant", "content": text}] for text in texts]
    funcs = [exact_reward, make_gated(make_format(), exact_reward), make_number(near=2), make_bbox(), make_format("think", name="t")]
    weights = [1, 0.25, 0.5, 2, 0.1]
    inputs = [{k: v[i] for k, v in columns.items() if k != "prompts"} for i in range(len(texts))]
    me = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), state=None, reward_funcs=funcs, environments=None,
                         reward_processing_classes=[None] * 5, reward_func_names=[f.__name__ for f in funcs],
                         _log_completion_extra=None, _log_metric=None)
    calculate = getattr(GRPOTrainer._calculate_rewards, "__wrapped__", GRPOTrainer._calculate_rewards)
    with patch("trl.trainer.grpo_trainer.profiling_context", lambda *_: nullcontext()):
        theirs = calculate(me, inputs, columns["prompts"], talk, [[1]] * len(texts)).numpy()
    ours = call_rewards(funcs, talk, columns, weights=weights)
    parts = np.array([[math.nan if v is None else v for v in part] for part in ours.parts.values()]).T
    assert np.isnan(parts).any() and np.array_equal(np.isnan(parts), np.isnan(theirs))
    assert np.allclose(parts, theirs, atol=1e-6, equal_nan=True)
    assert np.allclose(ours.total, np.nansum(theirs * weights, axis=1), atol=1e-6)


# --- combining --------------------------------------------------------------------------------------------------

def test_by_row_calls_each_rule_once_with_its_own_rows():
    seen = []

    def spy(completions, **columns):
        seen.append((completions, columns))
        return [0.5] * len(completions)
    rule = make_by_row({"a": spy, "b": exact_reward, "c": spy})
    logged = []
    values = rule(["1", "2", "3", "4"], reward_rule=["a", "b", None, "a"], answer=["1", "2", "3", "4"], trainer_state="s",
                  log_extra=logged.append)
    assert values == [0.5, 1, None, 0.5] and len(seen) == 1
    assert seen[0][0] == ["1", "4"] and seen[0][1]["answer"] == ["1", "4"]
    assert seen[0][1]["trainer_state"] == "s" and "log_extra" not in seen[0][1]
    assert make_by_row({"CLOSED": exact_reward})(["1"], answer=["1"], answer_type=["CLOSED"]) == [1]
    with pytest.raises(ValueError, match="needs the column 'task'"):
        make_by_row({"a": spy}, column="task")(["1"], reward_rule=["a"])


def test_gate_and_cosine_keep_rows_that_are_left_out():
    gated = make_gated(make_number(near=2), make_format(), otherwise=-0.5)
    texts = [f"{M} 3", f"{M} 4", "3", "3"]
    assert gated(texts, answer=["3", "3", "3", None]) == [1, 0.5, -0.5, None]
    cosine = make_cosine(exact_reward, 10)
    assert cosine(["3", "3"], answer=["3", None], completion_ids=[[], []]) == [1, None]


def test_total_weights_and_unscored_rows():
    scored = call_rewards(["exact", "number"], ["3", "4", "5"], dict(answer=["3", "3", None]), weights=[2, -1])
    assert scored.total == [1, 0, None] and scored.unscored == 1
    assert scored.parts == dict(exact=[1, 0, None], number=[1, 0, None]) and set(scored.seconds) == {"exact", "number"}
    assert "1 completions without a value" in repr(scored) and "<table" in scored._repr_html_()
    assert "&lt;b&gt;" in call_rewards(["format"], ["<b>"])._repr_html_()


def test_a_function_that_changes_its_columns_does_not_reach_the_next():
    def greedy(completions, answer, **columns):
        answer.clear()
        completions.clear()
        return [1.0]
    columns = dict(answer=["3"])
    assert call_rewards([greedy, exact_reward], ["3"], columns).total == [2]
    assert columns == dict(answer=["3"])


# --- what comes back --------------------------------------------------------------------------------------------

def give(value):
    def reward(completions, **columns): return value
    return reward


def test_values_that_are_understood():
    import torch
    for value in ([1, 0.5], (1, 0.5), np.array([1, 0.5]), torch.tensor([1, 0.5], requires_grad=True),
                  [np.float32(1), np.float64(0.5)], [torch.tensor(1.0), torch.tensor([0.5])[0]], [True, 0.5]):
        found = call_rewards([give(value)], ["a", "b"]).total
        assert found == [1.0, 0.5] and all(type(v) is float for v in found), value
    assert call_rewards([give([None, False])], ["a", "b"]).total == [None, 0]
    assert call_rewards([give(torch.ones(2, dtype=torch.bfloat16))], ["a", "b"]).total == [1, 1]


@pytest.mark.parametrize("value, says", [
    (None, "returned a NoneType"), (1.0, "returned a float"), ([1.0], "returned 1 values for 2"), ([1.0] * 3, "returned 3 values for 2"),
    ([1, math.nan], "returned nan for completion 1: 'bb'"), ([math.inf, 1], "returned inf for completion 0"), (["1", 1], r"'1' \(str\)"),
    ([[1], [1]], r"\(list\)"), (np.ones((2, 1)), r"shape \(2, 1\)"), (np.float64(1), "not a list"), ({0: 1, 1: 1}, "returned a dict"),
    ("ab", "returned a str"), ([1 + 1j, 1], "complex"), (iter([1, 1]), "not a list"), (np.array([1, math.nan]), "returned nan")])
def test_values_that_are_not(value, says):
    with pytest.raises(ValueError, match="Reward function 'reward' .*" + says if "reward" else says):
        call_rewards([give(value)], ["aa", "bb"])


def test_an_error_names_function_file_and_line_and_keeps_its_cause():
    def sub(): raise KeyError("label")

    def faulty(completions, **columns): return [sub() for _ in completions]
    with pytest.raises(ValueError, match=r"'faulty' raised KeyError: 'label' \(test_rewards.py, line \d+\)") as caught:
        call_rewards([faulty], ["a"])
    assert isinstance(caught.value.__cause__, KeyError)

    def stop(completions, **columns): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        call_rewards([stop], ["a"])


def test_slow_functions_are_named_while_they_run():
    said, during = [], []

    def sleepy(completions, **columns):
        time.sleep(0.6)
        during.extend(said)
        return [1.0]
    call_rewards([sleepy], ["a"], slow=0.1, warn=said.append)
    assert len(during) == 1 and "'sleepy' has been running for 0.1 s on 1 completions" in during[0]
    assert len(said) == 2 and "'sleepy' took 0." in said[1]
    with pytest.warns(UserWarning, match="'sleepy' took"):
        call_rewards([sleepy], ["a"], slow=0.1)


def test_async_functions_also_inside_a_running_loop():
    async def later(completions, **columns):
        await asyncio.sleep(0)
        return [0.5] * len(completions)

    async def fails(completions, **columns): raise OSError("no network")

    async def notebook(): return call_rewards([later], ["a"]).total
    assert asyncio.run(notebook()) == [0.5] and call_rewards([later], ["a"]).total == [0.5]
    with pytest.raises(ValueError, match="'fails' raised OSError: no network"):
        call_rewards([fails], ["a"])


def test_columns_and_functions_are_checked_first():
    for funcs, columns, more, says in (
            (["format"], dict(answer=["a"]), {}, "'answer' has 1 values for 2"),
            ([], {}, {}, "funcs is empty"), (["format"] * 2, {}, {}, "Two reward functions are called format"),
            (["format"], {}, dict(weights=[1, 2]), "2 weights for 1"), (["format"], {}, dict(weights=[math.nan]), "finite"),
            (["format"], dict(completions=["a", "b"]), {}, "beside the columns"),
            ([lambda completions: [1, 1]], {}, {}, "two stars"), ([str], {}, {}, "not a function"), ([3], {}, {}, "3 is not known")):
        with pytest.raises(ValueError, match=says):
            call_rewards(funcs, ["a", "b"], columns, **more)


# --- plug-ins ---------------------------------------------------------------------------------------------------

PLUGIN = '''
from collections import Counter
import numpy as np

def good(completions, answer, **columns):
    return [float(len(c)) for c in completions]

def pairs(responses, references): return np.array([r == t for r, t in zip(responses, references)])
def short(responses, references): return [1.0]
def strict(completions, **columns): return [float(len(c.strip())) for c in completions]
def _hidden(completions, **columns): return []
class Thing: pass
limit = 3
def exact(completions, **columns): return [7.0 for _ in completions]
'''


@pytest.fixture
def plugin(tmp_path):
    (tmp_path/"my plug-in.py").write_text(PLUGIN)
    return tmp_path/"my plug-in.py"


def test_plugin_both_forms(plugin):
    funcs = load_rewards(["good", "pairs", "exact", "format"], str(plugin))
    scored = call_rewards(funcs, ["ab", [{"role": "assistant", "content": "c"}], "d"], dict(answer=["ab", "x", None]))
    assert scored.parts == dict(good=[2, 1, 1], pairs=[1, 0, None], exact=[7, 7, 7], format=[0, 0, 0])
    assert load_rewards("exact")[0] is exact_reward  # and without the file it is ours again
    with pytest.raises(ValueError, match="'short' returned 1 values for 2"):
        call_rewards(load_rewards(["short"], plugin), ["a", "b"], dict(solution=["a", "b"]))
    with pytest.raises(ValueError, match="needs the column 'answer' or 'solution' or 'references'"):
        call_rewards(load_rewards(["pairs"], plugin), ["a"])


def test_plugin_mistakes(plugin, tmp_path):
    with pytest.raises(ValueError, match="'nope' is not known.*good, pairs, short, strict, Thing, exact; in vlmcourse: exact, number"):
        load_rewards(["nope"], plugin)
    for name, says in (("Thing", "not a function"), ("limit", "limit is a int, not a function")):
        with pytest.raises(ValueError, match=says):
            load_rewards([name], plugin)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_rewards(["x"], tmp_path/"gone.py")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_rewards(["x"], tmp_path)
    (tmp_path/"text.txt").write_text("")
    with pytest.raises(ValueError, match="must be a Python file"):
        load_rewards(["x"], tmp_path/"text.txt")
    for code, says in (("def f(:", r"SyntaxError: [^()]* \(bad.py, line 1\)\.$"), ("import nothing_like_it", "ModuleNotFoundError"), ("1/0", r"ZeroDivisionError.*bad.py, line 1"),
                       ("raise SystemExit(3)", "SystemExit")):
        (tmp_path/"bad.py").write_text(code)
        before = set(sys.modules)
        with pytest.raises(ValueError, match=f"bad.py cannot be loaded: {says}"):
            load_rewards(["f"], tmp_path/"bad.py")
        assert set(sys.modules) == before


def test_two_plugins_with_the_same_file_name(tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/"plugin.py").write_text(f"def {folder}(completions, **columns): return [{value}] * len(completions)\n"
                                                 "def both(completions, **columns): ...\n")
    files = [tmp_path/folder/"plugin.py" for folder in "ab"]
    assert call_rewards(load_rewards(["a", "b"], files), ["x"]).parts == dict(a=[1], b=[2])
    with pytest.raises(ValueError, match="Rename one"):
        load_rewards(["both"], files)


def test_the_sample_plugin():
    file = root/"data_samples/plugins/my_rewards.py"
    funcs = load_rewards(["two_sentences", "same_first_letter"], file)
    scored = call_rewards(funcs, ["One. Two.", "A. B. C! D?", ""], dict(answer=["twins", "X", "y"]))
    assert scored.parts == dict(two_sentences=[1, 0, 1], same_first_letter=[1, 0, 0])


# --- the bench --------------------------------------------------------------------------------------------------

def test_enough_probes_and_honest_answers():
    assert len(PROBES) >= 25 and len({(p.case.name, p.name) for p in PROBES}) == len(PROBES)
    right = {"colour": "exact", "think": "exact", "count": "number", "choice": "choice", "yes or no": "yes_no", "boxes": "bbox",
             "one large": "bbox", "no vase": "bbox"}
    rows = bench_rewards(sorted(set(right.values()))).rows
    for case, reward in right.items():
        row = next(r for r in rows if (r["case"], r["reward"]) == (case, reward))
        assert abs(row["right"] - 1) < 1e-9 and row["near"] < 1, case


HARD = [exact_reward, make_exact(marker=True, name="marked"), number_reward, make_number(near=1.5, name="near"), REWARDS["choice"],
        REWARDS["yes_no"], make_gated(make_format(), exact_reward), make_gated(make_format("think", name="think"), exact_reward),
        make_bbox(extra=2, above_blind=True), make_category(extra=2, threshold=0.85), make_completeness(extra=2, threshold=0.85)]


def test_nothing_pays_any_more():
    bench = bench_rewards(HARD)
    assert bench.paying() == [("think", "answer inside the thinking")]  # right, in the wrong place; a gate closes it
    closed = make_gated(exact_reward, make_format("think"))
    assert bench_rewards([closed], [p for p in PROBES if p.case.name == "think"]).paying() == []


@pytest.mark.parametrize("rule, least", [
    (lambda text, truth: truth in text, 10), (lambda text, truth: text.strip() != "", 30), (lambda text, truth: True, 40),
    (lambda text, truth: truth in text.lower().split(), 5)])
def test_naive_rewards_are_caught(rule, least):
    def naive(completions, answer, **columns):
        return [None if t is None else float(rule(c[0]["content"], t)) for c, t in zip(completions, answer)]
    assert len(bench_rewards([naive]).paying()) >= least


def test_when_does_a_probe_pay():
    assert [R._pays(v, 1, 0.4) for v in (0.6, 0.5, 0.45, 0.4, 0, None)] == [True, True, True, False, False, None]
    assert [R._pays(v, 0, -1) for v in (0.1, 0, -1)] == [True, False, False]  # a penalty: only more than right pays
    assert R._pays(1, None, None) is None


def test_bench_of_your_own(plugin):
    case = Case("year", "Which year?", "It is 1987.", "It is 1988.", answer="1987")
    probes = [Probe("none", case, ""), Probe("<b>", case, "1986 1987")]
    bench = bench_rewards(["number", "strict"], probes, external_plugins=plugin)  # strict() cannot take conversations
    assert [r["value"] for r in bench.rows if r["reward"] == "number"] == [0, 0]
    text, page = repr(bench), bench._repr_html_()
    assert "(honest and right)" in text and text.count("failed") == 4 and "'strict' raised AttributeError" in text
    as_texts = bench_rewards(["number", "strict"], probes, external_plugins=plugin, chat=False)
    assert "failed" not in repr(as_texts) and as_texts.paying("strict") == [("year", "<b>")]
    assert len(bench.only("year").rows) == 4 and bench.only("other").rows == []
    assert "<b>" not in page and "&lt;b&gt;" in page
    total = bench_rewards(["exact", "format"], weights=[1, 1.5])
    assert ("colour", "denied: not blue") in total.paying("total")
    low = bench_rewards(["exact", "format"], weights=[1, 0.5]).paying("total")
    assert ("colour", "denied: not blue") not in low


def test_import_is_quick():
    code = "import sys, vlmcourse.rewards; print([m for m in ('torch', 'trl', 'transformers', 'matplotlib') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


# --- judge and similarity ---------------------------------------------------------------------------------------

def test_judge_gets_questions_and_no_empty_answers():
    asked = []

    class Fake:
        def score_many(self, items, progress=True):
            asked.extend(items)
            return [SimpleNamespace(correct=v) for v in (True, None)]
    prompts = [[{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]}]] * 4
    values = make_judged(Fake())(["a", "b", " ", "d"], answer=["t"] * 3 + [None], prompts=prompts)
    assert values == [1, None, 0, None] and asked == [("Q?", "t", "a"), ("Q?", "t", "b")]
    with pytest.raises(ValueError, match="needs the column 'prompts'"):
        make_judged(Fake())(["a"], answer=["t"])


def test_similarity_is_cut_and_stretched():
    fake = SimpleNamespace(text_similarity=lambda c, r, **o: [o.get("value", 0.8)] * len(c))
    with patch.dict(sys.modules, {"vlmcourse.similarity": fake}):
        columns = dict(answer=["t", "t", None])
        assert make_similarity()(["a", "", "b"], **columns) == [0.8, 0, None]
        assert np.allclose(make_similarity(floor=0.6)(["a"], answer=["t"]), [0.5])
        assert make_similarity(value=0.2, floor=0.6)(["a"], answer=["t"]) == [0]
        assert make_similarity(value=1.2)(["a"], answer=["t"]) == [1]

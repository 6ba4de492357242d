"""The picture world: repeatable, leak-free, and truthful."""
import json
import subprocess
import sys

import numpy as np
import pytest

from vlmcourse.museum import (CONDITIONS, DEFECTS, PATTERNS, SHAPES, TASKS, THINGS, VIEWS, WORKSHOPS, Scene, Thing, Vase, ask_scene, boxes,
                              caption, draw_scene, make_records, make_scene, paint_thing, paint_vase, save_records, split_of)


def contents(s):
    "Which vases are there, wherever they stand."
    return tuple(sorted((v.shape, v.colour, v.pattern, v.condition, v.view) for v in s.vases))


def test_same_bytes_in_another_process():
    code = ("import hashlib, numpy as np; from vlmcourse.museum import *; "
            "print(hashlib.sha256(b''.join(np.asarray(draw_scene(make_scene(i), 64+i)).tobytes() for i in range(8))).hexdigest())")
    a, b = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert a == b and len(a) == 65


def test_splits_share_no_contents():
    "Whatever the kind of photo: portraits, shelves with one vase, full shelves."
    kinds = [dict(kind="portrait"), dict(kind="shelf", n_vases=1), dict(kind="shelf")]
    seen = {split: {contents(make_scene([i, 1], split, **k)) for i in range(300) for k in kinds} for split in ("train", "val", "test")}
    assert len(seen["train"]) > 600
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["val"] or seen["val"] & seen["test"])


def test_a_split_is_a_tenth():
    parts = [split_of([[s, c, p, k, v]]) for s in SHAPES for c in ("red", "blue") for p in PATTERNS for k in CONDITIONS for v in VIEWS]
    assert .05 < parts.count("test")/len(parts) < .16 and .05 < parts.count("val")/len(parts) < .16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("flip", [False, True])
def test_box_is_tight(shape, view, flip):
    v = Vase(shape, "red", "dots", "broken", view, height=.4, flip=flip, seed=3)
    c = np.full((400, 400, 3), -1.)
    paint_vase(c, v)
    ys, xs = np.nonzero(c[..., 0] >= 0)
    truth = [xs.min(), ys.min(), xs.max()+1, ys.max()+1]
    assert np.abs(np.array(truth)-boxes(Scene("portrait", (v,)), 400)[0]).max() <= 3


def test_boxes_scale_with_the_picture():
    s = make_scene(4, kind="shelf", n_vases=6)
    assert np.abs(np.array(boxes(s, 96))*4-np.array(boxes(s, 384))).max() <= 4


def test_details_show():
    "Every attribute and defect changes the picture."
    base = Vase("hydria", "blue", "plain", "intact", "front")
    draw = lambda v=base, defect="sharp": np.asarray(draw_scene(Scene("portrait", (v,), defect=defect), 96)).astype(int)
    plain = draw()
    for other in [{"pattern": p} for p in PATTERNS[1:]]+[{"condition": c} for c in CONDITIONS[1:]]+[{"view": v} for v in VIEWS[1:]]:
        changed = draw(Vase(**{**vars(base), **other}))
        assert (np.abs(changed-plain).max(-1) > 40).sum() > 40, other
    for defect in DEFECTS[1:4]:
        assert np.abs(draw(defect=defect)-plain).mean() > 2, defect


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_can_be_asked(task):
    for r in make_records(12, [task], split="val", seed=5):
        assert r["answer"] and r["messages"][0]["content"].count("<image>") == len(r["images"])
        assert r["messages"][1]["content"].endswith(r["answer"])


@pytest.mark.parametrize("kind", THINGS)
def test_a_thing_fills_its_place(kind):
    c = np.full((200, 200, 3), -1.)
    paint_thing(c, Thing(kind, .5, .8, .4))
    ys, xs = np.nonzero(c[..., 0] >= 0)
    assert 58 <= ys.min() <= 82 and ys.max() == 159 and 60 <= xs.min() and xs.max() < 140 and len(ys) > 500


def test_things_stand_beside_the_vases():
    "Never in front of a vase, half of the shelves hold none, and every kind turns up."
    shelves = [make_scene([8, i], kind="shelf") for i in range(400)]
    for s in shelves:
        assert len({t.kind for t in s.things}) == len(s.things) <= 2 and len(s.things)+len(s.vases) <= 6
        for t in s.things:
            for v, (x1, y1, x2, y2) in zip(s.vases, boxes(s, 300)):
                apart = t.x*300+t.height*150 <= x1+4 or t.x*300-t.height*150 >= x2-4 or abs(t.y-v.y) > .2
                assert apart, (t, v)
    assert {t.kind for s in shelves for t in s.things} == set(THINGS)
    assert .4 < sum(not s.things for s in shelves)/400 < .75


def test_captions_and_questions_name_the_things():
    rng = np.random.default_rng(0)
    for i in range(150):
        s = make_scene([9, i], kind="shelf")
        here = [t.kind for t in s.things]
        assert [t for t in THINGS if f" a {t}" in caption(s)] == [t for t in THINGS if t in here]
        assert ask_scene([s], "things", rng)[1] == (", ".join(f"a {t}" for t in here) or "nothing")
        q, a = ask_scene([s], "presence", rng)
        asked = [t for t in THINGS if t in q]
        assert not asked or a == ("yes" if asked[0] in here else "no")


def test_in_context_examples():
    "The answer to `like` follows from the example with the same pattern, and from nothing else."
    rules = set()
    for r in make_records(60, ["like"], seed=4):
        one, two, new = (s["vases"][0]["pattern"] for s in r["meta"]["scenes"])
        question = r["messages"][0]["content"].split("\n")[-1]
        towns = sorted((t for t in WORKSHOPS.values() if t in question), key=question.index)
        assert r["answer"] == towns[[one, two].index(new)] and [one, two].count(new) == 1
        rules.add((new, r["answer"]))
    assert len(rules) == 16             # every pattern with every town: the museum's own rule is not given away


def test_same_names_what_it_compares():
    for r in make_records(60, ["same"], seed=4):
        key = next(k for k in ("shape", "colour", "pattern") if k in r["messages"][0]["content"])
        a, b = (s["vases"][0][key] for s in r["meta"]["scenes"])
        assert r["messages"][1]["content"] == f"Photo 1: {a}. Photo 2: {b}. ### The final answer is: {'yes' if a == b else 'no'}"


def test_counts_are_true():
    rng = np.random.default_rng(0)
    for i in range(200):
        s = make_scene(i, kind="shelf")
        q, a = ask_scene([s], "count_by", rng)
        words = q.replace(".", "").replace("?", "").split()
        assert int(a) == sum(v.colour in words or v.shape in words for v in s.vases), q


@pytest.mark.parametrize("bad", [dict(split="dev"), dict(kind="room"), dict(kind="shelf", n_vases=0)])
def test_wrong_arguments(bad):
    with pytest.raises(ValueError, match=str(list(bad.values())[-1])):
        make_scene(0, **bad)


def test_pictures_of_another_data_set_stay(tmp_path):
    records = make_records(2, ["colour"], size=16)
    (tmp_path/"images").mkdir()                                  # an empty folder is no obstacle
    (tmp_path/"images/note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="note.txt is already there.*another folder"): save_records(records, tmp_path)
    assert [p.name for p in (tmp_path/"images").iterdir()] == ["note.txt"] and not (tmp_path/"records.json").exists()
    (tmp_path/"images/note.txt").unlink()
    assert save_records(records, tmp_path).exists()
    with pytest.raises(FileExistsError, match="records.json is already there"): save_records(records, tmp_path/"records.json")


@pytest.mark.parametrize("bad, error", [(dict(meta={"scale": {1, 2}}), ValueError), (dict(images=["gone.png"]), AttributeError), (dict(images=None), TypeError)])
def test_a_fault_leaves_nothing_behind(bad, error, tmp_path):
    records = make_records(2, ["colour"], size=16)
    with pytest.raises(error): save_records([*records, {**records[0], **bad}], tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    plain = {k: v for k, v in records[0].items() if k != "meta"}
    rows = json.loads(save_records([*records, plain, {**plain, "meta": None}], tmp_path).read_text())
    assert [r["meta"] for r in rows[2:]] == [{}, {}] and sorted(p.name for p in tmp_path.iterdir()) == ["images", "records.json"]
    assert [f"images/{p.name}" for p in sorted((tmp_path/"images").iterdir())] == [name for r in rows for name in r["images"]]

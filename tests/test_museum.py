"""The picture world: repeatable, leak-free, and truthful."""
import subprocess
import sys

import numpy as np
import pytest

from vlmcourse.museum import (CONDITIONS, DEFECTS, PATTERNS, SHAPES, TASKS, VIEWS, Scene, Vase, ask_scene, boxes, draw_scene,
                              make_records, make_scene, paint_vase, split_of)


def contents(s):
    "What stands where: on shelves the place (row, column) belongs to the scene."
    place = lambda v: (v.y > .6, int(v.x*3)) if s.kind == "shelf" else ()
    return (s.kind, *((*place(v), v.shape, v.colour, v.pattern, v.condition, v.view) for v in s.vases))


def test_same_bytes_in_another_process():
    code = ("import hashlib, numpy as np; from vlmcourse.museum import *; "
            "print(hashlib.sha256(b''.join(np.asarray(draw_scene(make_scene(i), 64+i)).tobytes() for i in range(8))).hexdigest())")
    a, b = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert a == b and len(a) == 65


@pytest.mark.parametrize("kind", ["portrait", "shelf"])
def test_splits_share_no_contents(kind):
    seen = {split: {contents(make_scene([i, 1], split, kind=kind)) for i in range(400)} for split in ("train", "val", "test")}
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["val"] or seen["val"] & seen["test"])


def test_a_split_is_a_tenth():
    parts = [split_of("portrait", [[0, s, c, p, k, v]]) for s in SHAPES for c in ("red", "blue") for p in PATTERNS for k in CONDITIONS for v in VIEWS]
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
    assert np.abs(np.array(truth)-boxes(Scene("portrait", (v,), "stone"), 400)[0]).max() <= 3


def test_boxes_scale_with_the_picture():
    s = make_scene(4, kind="shelf", n_vases=6)
    assert np.abs(np.array(boxes(s, 96))*4-np.array(boxes(s, 384))).max() <= 4


def test_details_show():
    "Every attribute and defect changes the picture."
    base = Vase("hydria", "blue", "plain", "intact", "front")
    draw = lambda v=base, defect="sharp": np.asarray(draw_scene(Scene("portrait", (v,), "stone", defect=defect), 96)).astype(int)
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

"""Detection: IoU, matching, counts, average precision against torchmetrics and pycocotools, reading, drawing, readings of numbers."""
import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from vlmcourse.boxes import say_objects, to_coco
from vlmcourse.detection import (average_precision, check_reading, coco_map, detection_scores, iou, map_by_hand, match_boxes, measure_boxes, plot_matches,
                                 read_detections)
from vlmcourse.museum import make_records

torch.set_num_threads(1)
LABELS = ["red kylix", "blue krater", "green hydria"]


def random_boxes(rng, *shape):
    "Boxes of whole pixels with an area."
    low = rng.integers(0, 60, (*shape, 2))
    return np.concatenate([low, low + rng.integers(4, 40, (*shape, 2))], -1)


def random_case(rng, pictures, score=None, labels=LABELS):
    "(predicted, true) lists of objects: true boxes, and most of them moved, renamed, doubled, with some from nowhere."
    predicted, true = [], []
    for _ in range(pictures):
        there = [dict(bbox=b.tolist(), label=str(rng.choice(labels))) for b in random_boxes(rng, rng.integers(0, 5))]
        claims = [dict(bbox=(np.array(o["bbox"]) + rng.integers(-3, 4, 4)).tolist(), label=o["label"] if rng.random() < .85 else str(rng.choice(labels)))
                  for o in there + there[:1] if rng.random() < .8]
        claims += [dict(bbox=b.tolist(), label=str(rng.choice([*labels, "clock"]))) for b in random_boxes(rng, rng.integers(0, 2))]
        predicted.append([{**o, "score": score(rng)} for o in claims] if score else claims)
        true.append(there)
    return predicted, true


# --- IoU ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_iou_is_that_of_torchvision(kind):
    from torchvision.ops import box_iou, generalized_box_iou
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 300), random_boxes(rng, 200) + rng.random((200, 1))
    theirs = dict(iou=box_iou, giou=generalized_box_iou)[kind](torch.tensor(a, dtype=torch.double), torch.tensor(b))
    assert np.abs(iou(a, b, kind=kind) - theirs.numpy()).max() < 1e-12
    assert iou(torch.tensor(a), b.tolist(), kind=kind) == pytest.approx(theirs.numpy())
    assert iou(a[0], b, kind=kind) == pytest.approx(theirs[0].numpy()) and iou(a, b[3], kind=kind) == pytest.approx(theirs[:, 3].numpy())
    batch = iou(a.reshape(10, 30, 4), b.reshape(10, 20, 4), kind=kind)
    assert batch.shape == (10, 30, 20) and batch[4] == pytest.approx(theirs.numpy()[120:150, 80:100])


def test_iou_of_two_boxes_is_a_float():
    assert iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3) and type(iou([0, 0, 1, 1], [0, 0, 1, 1])) is float
    assert iou([], []).shape == (0, 0) and iou(np.zeros((0, 4)), [[0, 0, 1, 1]]).shape == (0, 1) and iou([0, 0, 1, 1], []).shape == (0,)


@pytest.mark.parametrize("box", [[5, 5, 5, 5], [5, 5, 2, 9], [9, 9, 1, 1], [0, 0, 0, 9], [-1e308, 0, 1e308, 1e308]])
def test_iou_of_odd_boxes(box):
    for other in ([0, 0, 10, 10], box):
        for kind in ("iou", "giou"):
            value = iou(box, other, kind=kind)
            assert np.isfinite(value) and -1 <= value <= 1
    if box[0] >= 0: assert iou(box, box) == 0


@pytest.mark.parametrize("box", [[1, 2, 3], "abcd", None, [1, 2, 3, "x"], [0, 0, float("nan"), 1], [0, 0, float("inf"), 1], [[1, 2, 3, 4], [1, 2]], 5])
def test_iou_names_what_is_wrong(box):
    with pytest.raises(ValueError, match="a must be boxes"):
        iou(box, [0, 0, 1, 1])
    with pytest.raises(ValueError, match="use 'iou' or 'giou'|Use 'iou' or 'giou'"):
        iou([0, 0, 1, 1], [0, 0, 1, 1], kind="diou")


# --- matching -------------------------------------------------------------------------------------------------

def plain_match(predicted, true, threshold, labels):
    "The rules of the lesson, written down as simply as possible."
    free_p, free_t, pairs = set(range(len(predicted))), set(range(len(true))), []
    fits = lambda i, j: iou(predicted[i]["bbox"], true[j]["bbox"]) if not labels or predicted[i]["label"] == true[j]["label"] else 0
    if predicted and "score" in predicted[0]:
        for i in sorted(free_p, key=lambda i: -predicted[i]["score"]):
            best = max(free_t, key=lambda j: (fits(i, j), j), default=None)
            if best is not None and fits(i, best) >= threshold: free_t.remove(best), pairs.append((i, best))
        return sorted(pairs)
    while free_p and free_t:
        value, i, j = max((fits(i, j), -i, -j) for i, j in itertools.product(free_p, free_t))
        if value < threshold: break
        free_p.remove(-i), free_t.remove(-j), pairs.append((-i, -j))
    return sorted(pairs)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("score", [None, lambda rng: float(rng.choice([.2, .5, .9]))])
def test_matching_follows_the_rules(labels, score):
    rng = np.random.default_rng(1)
    for predicted, true in zip(*random_case(rng, 300, score)):
        for threshold in (.3, .5, .75):
            pairs = match_boxes(predicted, true, threshold=threshold, labels=labels)
            assert [p[:2] for p in pairs] == plain_match(predicted, true, threshold, labels)
            assert all(v == pytest.approx(iou(predicted[i]["bbox"], true[j]["bbox"])) and v >= threshold for i, j, v in pairs)


def test_labels_are_compared_as_answers():
    box = [0, 0, 9, 9]
    assert match_boxes([dict(bbox=box, label=" Red  Kylix.")], [dict(bbox=box, label="red kylix")])
    assert not match_boxes([dict(bbox=box, label=None)], [dict(bbox=box, label="red kylix")])
    assert match_boxes([dict(bbox=box)], [box]) == [(0, 0, 1.0)]


@pytest.mark.parametrize("predicted, says", [
    ([dict(label="a")], "no bbox"), ([dict(bbox=[1, 2])], "predicted must be boxes"), ([dict(bbox=[0, 0, float("nan"), 1])], "finite"),
    ([dict(bbox=[0, 0, 1, 1], score=.5), dict(bbox=[0, 0, 1, 1])], "some objects have a score")])
def test_wrong_objects_are_named(predicted, says):
    with pytest.raises(ValueError, match=says):
        match_boxes(predicted, [[0, 0, 1, 1]])


# --- counts ---------------------------------------------------------------------------------------------------

def test_counts_add_up_and_agree_with_scikit_learn():
    from sklearn.metrics import precision_recall_fscore_support
    rng = np.random.default_rng(2)
    predicted, true = random_case(rng, 80)
    scores, names = detection_scores(predicted, true), [*LABELS, "clock"]
    said, there = [], []                            # matched pairs share a label; the others stand against "nothing"
    for claims, objects, picture in zip(predicted, true, scores.pictures):
        rows, columns = ({m[k] for m in picture["matches"]} for k in (0, 1))
        for i, j, _ in picture["matches"]: said.append(claims[i]["label"]), there.append(objects[j]["label"])
        for i in set(range(len(claims))) - rows: said.append(claims[i]["label"]), there.append("nothing")
        for j in set(range(len(objects))) - columns: said.append("nothing"), there.append(objects[j]["label"])
    assert scores.right + scores.invented == sum(map(len, predicted)) and scores.right + scores.missed == sum(map(len, true))
    p, r, f, _ = precision_recall_fscore_support(there, said, labels=names, average="micro", zero_division=0)
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((p, r, f))
    p, r, f, _ = precision_recall_fscore_support(there, said, labels=names, zero_division=0)
    for k, name in enumerate(names):
        right, missed, invented = scores.classes[name]
        assert (right / max(1, right + invented), right / max(1, right + missed)) == pytest.approx((p[k], r[k]))
    assert sum(c[0] for c in scores.classes.values()) == scores.right
    assert repr(scores) and scores._repr_html_().count("<tr>") == 2 + len(names)


def test_edges_of_counting():
    box = dict(bbox=[0, 0, 9, 9], label="<b>vase</b>")
    nothing = detection_scores([[]], [[]])
    assert np.isnan([nothing.precision, nothing.recall, nothing.f1, nothing.miou]).all() and nothing.pictures[0]["f1"] == 1
    assert "–" in repr(nothing) and np.isnan(nothing.interval()).all()
    missed, invented = detection_scores([[]], [[box]]), detection_scores([[box]], [[]])
    assert (missed.recall, missed.f1, invented.precision, invented.f1) == (0, 0, 0, 0) and np.isnan([missed.precision, invented.recall]).all()
    assert "<b>" not in detection_scores([[box, {**box, "label": "x"}]], [[box]])._repr_html_()
    for wrong, says in ((lambda: detection_scores([], []), "no pictures"), (lambda: detection_scores([[]], []), "1 pictures"),
                        (lambda: detection_scores([[]], [[]], threshold=0), "above 0"), (lambda: nothing.interval("map"), "not known")):
        with pytest.raises(ValueError, match=says): wrong()


def test_misnamed_and_mean_iou():
    true = [dict(bbox=[0, 0, 10, 10], label="a"), dict(bbox=[20, 0, 30, 10], label="b")]
    found = detection_scores([[dict(bbox=[0, 0, 10, 10], label="b"), dict(bbox=[20, 0, 30, 4], label="b")]], [true])
    assert (found.right, found.missed, found.invented, found.misnamed) == (0, 2, 2, 1)
    assert found.miou == pytest.approx(.4 / 2) and detection_scores([true], [true]).miou == 1


def test_interval_covers():
    "Of 200 samples of 40 pictures, the 95 % interval holds the F1 of the whole population about as often as promised."
    rng = np.random.default_rng(3)
    population = random_case(rng, 1000)
    whole = detection_scores(*population)
    held = 0
    for k in range(200):
        rows = rng.integers(0, 1000, 40)
        part = type(whole)([whole.pictures[i] for i in rows], {}, .5, 0)
        low, high = part.interval(resamples=300, seed=k)
        held += low <= whole.f1 <= high
    assert .88 <= held / 200 <= .99


# --- average precision ----------------------------------------------------------------------------------------

def plain_ap(hits, n_true):
    "AP from its definition, point by point."
    precision, recall = [np.cumsum(hits) / d for d in (np.arange(1, len(hits) + 1), n_true)]
    return np.mean([max((p for p, r in zip(precision, recall) if r >= at), default=0) for at in np.linspace(0, 1, 101)])


def test_average_precision_is_its_definition():
    rng = random.Random(0)
    for _ in range(200):
        hits = [rng.randint(0, 1) for _ in range(rng.randint(1, 15))]
        n = sum(hits) + rng.randint(0, 4)
        if n: assert average_precision(hits, n) == pytest.approx(plain_ap(hits, n))
    assert np.isnan(average_precision([], 0)) and average_precision([], 3) == 0


@pytest.mark.parametrize("seed, score", [(4, None), (5, lambda rng: float(rng.random())), (6, lambda rng: float(rng.choice([.3, .6])))])
def test_map_by_hand_is_that_of_pycocotools(seed, score):
    predicted, true = random_case(np.random.default_rng(seed), 60, score)
    assert seed != 5 or any(o["bbox"][0] > o["bbox"][2] or o["bbox"][1] > o["bbox"][3] for claims in predicted for o in claims)     # swapped corners too
    ours, theirs = map_by_hand(predicted, true), coco_map(predicted, true)
    assert ours["map"] == pytest.approx(theirs["map"], abs=1e-6) and ours["per_class"] == pytest.approx(theirs["per_class"], abs=1e-6)
    for name, threshold in (("map_50", .5), ("map_75", .75)):
        assert map_by_hand(predicted, true, thresholds=[threshold])["map"] == pytest.approx(theirs[name], abs=1e-6)
    assert 0 < theirs["map"] < theirs["map_50"] < 1 and "clock" not in theirs["per_class"]


def test_map_when_iou_meets_the_threshold():
    "Whole pixels often give an IoU of exactly .6; torchmetrics' own 32-bit thresholds would miss it."
    true, predicted = [[dict(bbox=[0, 0, 10, 10], label="a")]], [[dict(bbox=[0, 0, 10, 6], label="a", score=.9)]]
    assert coco_map(predicted, true)["map"] == pytest.approx(.3) == map_by_hand(predicted, true)["map"]
    from torchmetrics.detection import MeanAveragePrecision
    plain = MeanAveragePrecision(backend="pycocotools")
    as_tensors = lambda o: [dict(boxes=torch.tensor([o[0][0]["bbox"]]), labels=torch.tensor([0]), scores=torch.tensor([.9]))]
    plain.update(as_tensors(predicted), as_tensors(true))
    assert float(plain.compute()["map"]) == pytest.approx(.2)


def test_map_of_more_than_100_boxes():
    "COCO keeps the 100 surest of a class in a picture."
    true = [[dict(bbox=[10 * i, 0, 10 * i + 9, 9], label="a") for i in range(130)]]
    predicted = [[{**o, "score": 1 - i / 1000} for i, o in enumerate(true[0])]]
    assert map_by_hand(predicted, true)["map"] == pytest.approx(coco_map(predicted, true)["map"], abs=1e-6) == pytest.approx(77 / 101, abs=1e-6)


def test_map_edges():
    nothing = [[dict(bbox=[0, 0, 9, 9], label="a")]]
    assert map_by_hand([[]], nothing)["map"] == 0 == coco_map([[]], nothing)["map"]
    assert np.isnan(map_by_hand([[]], [[]])["map"])
    for function in (map_by_hand, coco_map):
        with pytest.raises(ValueError, match="1 pictures"): function([[]], [])


def test_map_interval_is_the_bootstrap():
    "Weights instead of copies: the same numbers as drawing the pictures one by one."
    predicted, true = random_case(np.random.default_rng(7), 12, lambda rng: float(rng.random()))
    found = map_by_hand(predicted, true, thresholds=[.5], resamples=40, seed=1)
    drawn = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12), size=40)
    maps = [map_by_hand([p for p, k in zip(predicted, row) for _ in range(k)], [t for t, k in zip(true, row) for _ in range(k)], thresholds=[.5])["map"] for row in drawn]
    assert found["interval"] == pytest.approx(np.quantile(maps, [.025, .975]), abs=1e-9)
    assert found["map"] == map_by_hand(predicted, true, thresholds=[.5])["map"]


# --- answers --------------------------------------------------------------------------------------------------

records = make_records(20, ["detect"], split="test", seed=9)


@pytest.mark.parametrize("plain", [True, False])
def test_reading_both_forms(plain):
    wanted = [say_objects(r["objects"], (96, 96), "tiny") for r in records]
    spoken = ["; ".join(f"{o['label']} {','.join(map(str, o['bbox']))}" for o in r["objects"]) for r in records]
    found, problems = read_detections(wanted, records, plain=plain)
    assert problems == [None] * 20 and detection_scores(found, [r["objects"] for r in records]).f1 == 1
    found, problems = read_detections(spoken, records, plain=plain)
    assert problems == ["not JSON" if plain else "no box found"] * 20
    assert [len(f) for f in found] == [len(r["objects"]) if plain else 0 for r in records]


@pytest.mark.parametrize("answer", ["", None, 5, "[", "red 1,2,3", "red kylix 999999999999999999999,2,3,4", "x" * 20000, "a 1,2,3,4;" * 500, "a" + " " * 20000 + "1,2,3,4", "a 1," * 5000, "[" * 5000, "{}", "[[1,2,3,4]]",
                                    '[{"bbox_2d":[NaN,0,1,1],"label":"a"}]', "red kylix 9,9,1,1", "\ud800 1,2,3,4", "1,2,3,4", '[{"bbox_2d":{},"label":1}]', "null", '"text"', "3"])
def test_no_answer_breaks_the_reading(answer):
    found, problems = read_detections([answer], records[:1])
    assert (found[0] or problems[0]) and all(0 <= n <= 96 for o in found[0] for n in o["bbox"])
    for form in ("json", "readable", "plain"):
        m = measure_boxes([answer], records[:1], form=form)
        assert set(m) == {"json", "f1", "miou"} and all(0 <= v[0] <= 1 for v in m.values())


def test_measures():
    r = records[0]
    one = lambda objects: json.dumps([dict(bbox_2d=o["bbox"], label=o["label"]) for o in objects])
    n = len(r["objects"])
    assert measure_boxes([one(r["objects"])], [r]) == dict(json=[1], f1=[1], miou=[1])
    spoken, nearly = f"{r['objects'][0]['label']} {','.join(map(str, r['objects'][0]['bbox']))}", one(r["objects"][:1])[:-1]
    found = {form: measure_boxes([spoken, nearly], [r, r], form=form)["f1"] for form in ("json", "readable", "plain")}
    some = pytest.approx(2 / (1 + n))
    assert found == dict(json=[0, 0], readable=[0, some], plain=[some, some])
    with pytest.raises(ValueError, match="form='xml' is not known"): measure_boxes(["[]"], [r], form="xml")
    assert measure_boxes([one(r["objects"] * 2)], [r])["f1"] == [pytest.approx(2 / 3)]
    assert measure_boxes([one(r["objects"][:1])], [r]) == dict(json=[1], f1=[pytest.approx(2 / (1 + n))], miou=[pytest.approx(1 / n)])
    assert measure_boxes(["[]", '[{"bbox_2d":[5,5,1,1],"label":"a"}]'], [r, r])["json"] == [1, 0]
    empty = {**r, "objects": []}
    assert measure_boxes(["[]", one(r["objects"])], [empty, empty]) == dict(json=[1, 1], f1=[1, 0], miou=[1, 0])
    with pytest.raises(ValueError, match="1 answers for 2 records"): measure_boxes(["[]"], [r, r])


@pytest.mark.parametrize("name, spoil", [
    ("x1, y1, x2, y2 in px", lambda b, w, h: b), ("x and y swapped", lambda b, w, h: [b[k] for k in (1, 0, 3, 2)]),
    ("counted to 1000", lambda b, w, h: [n * 1000 / s for n, s in zip(b, (w, h, w, h))]), ("counted to 1", lambda b, w, h: [n / s for n, s in zip(b, (w, h, w, h))]),
    ("counted to 1000, x and y swapped", lambda b, w, h: [b[k] * 1000 / s for k, s in zip((1, 0, 3, 2), (h, w, h, w))]),
    ("x, y, width, height in px", lambda b, w, h: to_coco(b))])
def test_readings(name, spoil):
    rng = np.random.default_rng(10)
    true = [[dict(bbox=b, label="a") for b in (random_boxes(rng, 3) * [6, 4, 6, 4]).tolist()] for _ in range(10)]
    predicted = [[{**o, "bbox": spoil(o["bbox"], 640, 480)} for o in objects] for objects in true]
    found = check_reading(predicted, true, [(640, 480)] * 10)
    values = list(found.values())
    assert next(iter(found)) == name and values[0] == pytest.approx(1) and values[1] < .7 and len(found) == 6
    with pytest.raises(ValueError, match="10 predictions, 10 truths and 1 sizes"): check_reading(predicted, true, [(1, 1)])


def test_picture_names_every_box():
    import matplotlib.pyplot as plt
    true = [dict(bbox=[10, 10, 30, 50], label="red $kylix"), dict(bbox=[50, 10, 80, 50], label="krater")]
    ax = plot_matches(records[0]["images"][0], [dict(bbox=[10, 10, 30, 48], label="red $kylix"), [1, 60, 20, 90]], true)
    assert ax.get_title() == "1 right, 1 missed, 1 invented"
    assert sorted(t.get_text() for t in ax.texts) == ["invented", "missed\nkrater", "right 0.95\nred $kylix"]
    assert len({p.get_linestyle() for p in ax.patches}) == 3
    ax.figure.canvas.draw()
    plt.close(ax.figure)


def test_import_is_light():
    code = "import sys, vlmcourse.detection; print([m for m in ('transformers', 'torchmetrics', 'pycocotools', 'matplotlib') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr

"""lesson 02e: splits and leaks, and the files that cvat_to_qwenvl makes."""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance

from test_cvat import attr, box, image, picture, root, sample, xml_export  # noqa: F401
from vlmcourse import splits
from vlmcourse.boxes import read_objects
from vlmcourse.core import file_hash, read_json
from vlmcourse.cvat import detection_records, read_cvat
from vlmcourse.formats import read_records
from vlmcourse.museum import draw_scene, make_scene
from vlmcourse.splits import cvat_to_qwenvl, find_leaks, fingerprint, plot_leaks, split_records


@pytest.fixture(scope="module")
def shelves():
    return read_cvat(sample/"shelves").records


# --- splits -------------------------------------------------------------------------------------------------------

def many(n, seed=0, labels=(("vase", .9), ("damage", .3), ("fake", .04)), rows=1):
    rng = random.Random(seed)
    made = []
    for i in range(n):
        has = [label for label, share in labels if rng.random() < share]
        made += [dict(id=f"{i:05}.{k}", images=[], objects=[dict(label=label) for label in has], key=i) for k in range(rows)]
    return made


def share(part, label):
    return sum(any(o["label"] == label for o in r["objects"]) for r in part)/len(part)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n,val,test", [(60, .2, 0), (400, .1, .1), (1000, .1, .05), (7, .3, .2), (2, .1, 0)])
def test_split_sizes_and_strata(n, val, test, seed):
    records = many(n, seed)
    parts = split_records(records, val=val, test=test, seed=seed)
    assert list(parts) == ["train", "val", "test"][:2 + bool(test)]
    assert sorted(r["id"] for p in parts.values() for r in p) == [r["id"] for r in records]
    assert len(parts["val"]) == max(1, round(n*val)) and (not test or len(parts["test"]) == max(1, round(n*test)))
    for name in parts if n >= 400 else []:
        for label in ("vase", "damage", "fake"):
            assert share(parts[name], label) == pytest.approx(share(records, label), abs=1.5/len(parts[name]) + .002)


def test_split_is_the_same_for_a_seed_and_any_order():
    records = many(200)
    first = split_records(records, seed=3)
    assert split_records(records, seed=3) == first
    mixed = random.Random(9).sample(records, len(records))
    assert {r["id"] for r in split_records(mixed, seed=3)["val"]} == {r["id"] for r in first["val"]}
    assert len({tuple(r["id"] for r in split_records(records, seed=s)["val"]) for s in range(10)}) == 10
    code = "from test_splits import many, split_records; print([r['id'] for r in split_records(many(200), seed=3)['val']])"
    for salt in ("1", "2"):                      # Python's own hash differs from process to process
        out = subprocess.run([sys.executable, "-c", code], cwd=root/"tests", env={**os.environ, "PYTHONHASHSEED": salt},
                             capture_output=True, text=True, check=True).stdout
        assert out.strip() == str([r["id"] for r in first["val"]])


def test_rows_of_one_picture_stay_together(shelves):
    rows = detection_records(shelves, per_label=True)
    for seed in range(20):
        parts = split_records(rows, val=.25, seed=seed)
        pictures = [{r["images"][0] for r in p} for p in parts.values()]
        assert not set.intersection(*pictures) and len(parts["val"]) == 6


def test_same_bytes_stay_together(tmp_path):
    records = [dict(id=f"{i}{twin}", images=[str(picture(tmp_path/twin/f"{i}.png"))], objects=[]) for i in range(8) for twin in "ab"]
    for seed in range(10):
        parts = split_records(records, val=.25, seed=seed)
        assert not {r["id"][0] for r in parts["train"]} & {r["id"][0] for r in parts["val"]}
    pil = [r | dict(images=[Image.open(r["images"][0])]) for r in records]
    parts = split_records(pil, val=.25, seed=1)
    assert not {r["id"][0] for r in parts["train"]} & {r["id"][0] for r in parts["val"]}


def test_chains_stay_together():
    records = many(30)
    chain = [(records[i]["id"], records[i+1]["id"]) for i in range(9)]
    for seed in range(10):
        parts = split_records(records, val=.4, seed=seed, together=chain)
        where = {r["id"]: name for name, p in parts.items() for r in p}
        assert len({where[r["id"]] for r in records[:10]}) == 1
    pair = split_records(records[:12], val=.1, together=chain + [("00010.0", "00011.0")])
    assert [len(p) for p in pair.values()] == [10, 2]          # no single record is free: the smaller group goes over
    film = [(a["id"], b["id"]) for a, b in zip(records, records[1:])]
    with pytest.raises(ValueError, match="frames of a film"):
        split_records(records, together=film)


@pytest.mark.parametrize("wrong", [dict(val=-.1), dict(val=1), dict(test=7), dict(val=.6, test=.5)])
def test_wrong_shares(wrong):
    with pytest.raises(ValueError, match="val=|test="):
        split_records(many(20), **wrong)


@pytest.mark.parametrize("records", ["shelves.json", Path("shelves.json"), {"id": "a", "images": []}, None, 7])
def test_records_must_be_a_list(records):
    with pytest.raises(ValueError, match=r"records is a \w+, and a list of records is wanted.*read_records\(file\)"): split_records(records)
    if not isinstance(records, dict):
        with pytest.raises(ValueError, match="read_records"): find_leaks(records)
    with pytest.raises(ValueError, match=r"parts\['val'\] is a"): find_leaks({"train": many(2), "val": records})


@pytest.mark.parametrize("bad", [{"images": []}, {"id": None, "images": []}, {"id": "a"}, {"id": "a", "images": None}, "a", 3])
def test_records_need_an_id_and_images(bad):
    with pytest.raises(ValueError, match=r"records\[4\] is no record with an id and images"): split_records([*many(4), bad])
    with pytest.raises(ValueError, match=r"parts\['records'\]\[4\] is no record"): find_leaks([*many(4), bad])


def test_pairs_must_be_ids_of_these_records():
    records = many(20)
    a, b, c = (r["id"] for r in records[:3])
    for together, says in (([("gone", "away")], "names 'gone', and no record"), ([(a, b, c)], "list of pairs"), ((a, b), "list of pairs"), ([a + b], "list of pairs")):
        with pytest.raises(ValueError, match=says): split_records(records, together=together)
    with pytest.warns(UserWarning, match="of other records .1, the first is 'gone'"): split_records(records, together=[(a, "gone")])
    for seed in range(8):                                        # pairs that can be read only once
        parts = split_records(records, val=.4, seed=seed, together=zip([a], [b]))
        assert len({name for name, part in parts.items() for r in part if r["id"] in (a, b)}) == 1


def test_leaks_between_two_lists_may_be_named_when_one_is_split(unrelated):
    mine = [dict(id=f"m{i}", images=[im]) for i, im in enumerate(unrelated[:8])]
    mine.append(dict(id="twin", images=[unrelated[1].copy()]))
    other = [dict(id=f"bench{i}", images=[im.copy()]) for i, im in enumerate([unrelated[0], unrelated[9], unrelated[9]])]
    ids = find_leaks({"mine": mine, "benchmark": other}).ids
    assert {frozenset(p) for p in ids} == {frozenset(p) for p in (("m0", "bench0"), ("m1", "twin"), ("bench1", "bench2"))}
    with pytest.warns(UserWarning, match="of other records .3, the first is 'bench"): parts = split_records(mine, val=.3, together=ids)
    assert parts == split_records(mine, val=.3, together=[("m1", "twin")])


def test_a_rare_label_is_in_training_first():
    records = many(100, labels=(("vase", 1),))
    records[7]["objects"].append(dict(label="unique"))
    for seed in range(10):
        assert records[7] in split_records(records, seed=seed)["train"]


def test_large_split_is_quick():
    import time
    records, start = many(20_000), time.process_time()
    parts = split_records(records)
    assert len(parts["val"]) == 2000 and time.process_time() - start < 30


# --- leaks --------------------------------------------------------------------------------------------------------

N_SHELVES = 150                                   # 11175 pairs of unrelated photos
CHANGES = {
    "saved again": lambda p, f: p.save(f, quality=60),
    "made smaller": lambda p, f: p.resize((120, 120)).save(f),
    "brighter": lambda p, f: ImageEnhance.Brightness(p).enhance(1.2).save(f),
    "darker": lambda p, f: ImageEnhance.Brightness(p).enhance(.7).save(f),
    "more contrast": lambda p, f: ImageEnhance.Contrast(p).enhance(1.3).save(f),
    "grey": lambda p, f: p.convert("L").save(f),
}


@pytest.fixture(scope="module")
def unrelated():
    return [draw_scene(make_scene([55, i], kind="shelf"), 128) for i in range(N_SHELVES)]


def test_unrelated_photos_are_no_leak(unrelated):
    records = [dict(id=str(i), images=[p], objects=[]) for i, p in enumerate(unrelated)]
    report = find_leaks({"train": records[:100], "val": records[100:]})
    assert (report.pictures, report.compared) == (N_SHELVES, N_SHELVES*(N_SHELVES-1)//2)
    assert report.pairs == []                     # false alarms: 0 of 11175 pairs at 30 of 256 bits


@pytest.mark.parametrize("name", CHANGES)
def test_copies_are_found(name, unrelated, tmp_path):
    train, val = [], []
    for i, p in enumerate(unrelated[:25]):
        p.save(tmp_path/f"{i}.png")
        CHANGES[name](p, tmp_path/f"copy{i}.jpg")
        train.append(dict(id=f"t{i}", images=[str(tmp_path/f"{i}.png")]))
        val.append(dict(id=f"v{i}", images=[str(tmp_path/f"copy{i}.jpg")]))
    report = find_leaks({"train": train, "val": val})
    assert {p.ids for p in report.leaks} == {(f"t{i}", f"v{i}") for i in range(25)} and len(report.pairs) == 25
    assert all(p.kind == "alike" and 0 <= p.distance <= 30 for p in report.pairs)


def test_same_bytes_and_pairs_inside(tmp_path):
    a, b = picture(tmp_path/"a.png"), tmp_path/"b.png"
    b.write_bytes(a.read_bytes())
    parts = {"train": [dict(id="1", images=[str(a)]), dict(id="2", images=[str(b)])], "val": [dict(id="3", images=[str(a)])]}
    report = find_leaks(parts)
    assert [(p.kind, p.distance, p.ids) for p in report.pairs] == [
        ("same bytes", 0, ("1", "3")), ("same bytes", 0, ("2", "3")), ("same bytes", 0, ("1", "2"))]
    assert len(report.leaks) == 2 and "2 pairs lie in two parts, 1 in one part" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["leaks"] == 2
    assert find_leaks([dict(id="1", images=[str(a), str(b)])]).pairs == []        # two views in one record


def test_large_photos_are_read_small_and_still_match(tmp_path):
    big = picture(tmp_path/"a.jpg", size=(3000, 2400), quality=90)
    small = tmp_path/"b.jpg"
    Image.open(big).resize((600, 480)).save(small)
    assert (fingerprint(big) != fingerprint(small)).sum() <= 10
    assert (fingerprint(big) != fingerprint(picture(tmp_path/"c.jpg"))).sum() > 60


def test_plot_of_a_pair(tmp_path):
    import matplotlib.pyplot as plt
    a = picture(tmp_path/"a.png")
    report = find_leaks({"train": [dict(id="1", images=[str(a)])], "val": [dict(id="2", images=[str(a)])]})
    axes = plot_leaks(report)
    assert axes.shape == (1, 2) and axes[0][1].get_title() == "val: 2" and axes[0][0].images
    plt.close("all")
    with pytest.raises(ValueError, match="no pairs"):
        plot_leaks(find_leaks([]))


# --- the files that come out --------------------------------------------------------------------------------------

def files_of(folder):
    return {p.relative_to(folder).as_posix(): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("source", ["shelves", "shelves_coco.zip", "shelves/annotations.xml"])
def test_conversion(source, tmp_path):
    before = files_of(sample)
    made = cvat_to_qwenvl(str(sample/source), str(tmp_path/"out"), val=.2, test=.1, seed=1)
    assert files_of(sample) == before
    assert {p.name for p in (tmp_path/"out").iterdir()} == {"train.json", "val.json", "test.json", "report.json", "images"}
    rows = {name: read_json(tmp_path/"out"/f"{name}.json") for name in ("train", "val", "test")}
    assert {k: len(v) for k, v in rows.items()} == dict(train=9, val=2, test=1)
    originals = {r["id"]: r for r in read_cvat(sample/source).records}
    for row in [row for part in rows.values() for row in part]:
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt") and human["value"].startswith("<image>\nDetect damage, vase")
        assert human["value"].count("<image>") == 1 and "<image>" not in gpt["value"]
        record = originals[row["id"]]
        assert file_hash(tmp_path/"out"/row["image"]) == file_hash(record["images"][0])
        found = read_objects(gpt["value"], record["meta"]["size"], "qwen2.5-vl").value
        assert [o["label"] for o in found] == [o["label"] for o in record["objects"]]
    report = read_json(tmp_path/"out/report.json")
    assert {k: v["rows"] for k, v in report["parts"].items()} == dict(train=9, val=2, test=1)
    assert report["losses"]["losses"]["rotated box"]["count"] == 1 and report["duplicates"]["leaks"] == 0
    assert len(report["duplicates"]["pairs"]) == 1
    assert "rotated box" in repr(made) and "train.json: 9 rows" in repr(made) and made.leaks.leaks == []


def test_same_seed_same_files(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 5)):
        cvat_to_qwenvl(sample/"shelves", tmp_path/name, val=.25, seed=seed)
    assert files_of(tmp_path/"a") == files_of(tmp_path/"b") != files_of(tmp_path/"c")


def test_options_reach_the_files(tmp_path):
    cvat_to_qwenvl(sample/"shelves", tmp_path/"out", val=0, family="qwen3-vl", question="Where: {labels}?", per_label=True)
    rows = read_json(tmp_path/"out/train.json")
    assert len(rows) == 24 and not (tmp_path/"out/val.json").exists()
    assert rows[0]["conversations"][0]["value"] == "<image>\nWhere: damage?"
    first = read_cvat(sample/"shelves").records[0]["objects"][-1]["bbox"]
    assert json.loads(rows[0]["conversations"][1]["value"])[0]["bbox_2d"] == [
        round(v/s*1000) for v, s in zip(first, (200, 184) * 2)]


def test_output_is_never_overwritten_and_never_half(tmp_path, monkeypatch):
    (tmp_path/"full").mkdir()
    (tmp_path/"full/mine.txt").write_text("x")
    (tmp_path/"file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match="nothing is overwritten"):
            cvat_to_qwenvl(sample/"shelves", tmp_path/name)
    (tmp_path/"empty").mkdir()
    cvat_to_qwenvl(sample/"shelves", tmp_path/"empty")
    assert (tmp_path/"empty/train.json").is_file()
    with pytest.raises(ValueError, match="family"):
        cvat_to_qwenvl(sample/"shelves", tmp_path/"new", family="gpt")
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(splits, "_count", stop)
    with pytest.raises(KeyboardInterrupt):
        cvat_to_qwenvl(sample/"shelves", tmp_path/"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "full"]


def test_names_that_would_overwrite_each_other(tmp_path):
    names = ["a.png", "A.png", "sub/a.png", "a-2.png"]
    folder = xml_export(tmp_path/"e", *[image(box(), name=n, subset=s) for n in names for s in ("one", "two")],
                        files=[f"images/{s}/{n}" for n in names for s in ("one", "two")])
    cvat_to_qwenvl(folder, tmp_path/"out", near=0)
    written = [r["image"] for part in ("train", "val") for r in read_json(tmp_path/f"out/{part}.json")]
    assert len({w.casefold() for w in written}) == 8 and all((tmp_path/"out"/w).is_file() for w in written)


def test_turned_photos_are_written_upright(tmp_path):
    folder = xml_export(tmp_path/"e", image(box(), width=80, height=100, name="a.jpg"), image(box(), name="b.png"), files=["images/b.png"])
    note = Image.Exif()
    note[0x0112] = 6
    picture(folder/"images/a.jpg", exif=note)
    made = cvat_to_qwenvl(folder, tmp_path/"out", val=.5)
    assert Image.open(tmp_path/"out/images/a.jpg").size == (80, 100)
    assert Image.open(tmp_path/"out/images/a.jpg").getexif().get(0x0112, 1) == 1
    assert made.losses.counts["picture turned upright"] == 1


def test_what_answers_cannot_say_is_counted(tmp_path):
    inner = box(inner=attr("inventory", "007")) + box("10.4 10 11.6 60")
    covered = image(box(occluded="1"), subset="Validation", id=1)
    folder = xml_export(tmp_path/"e", image(inner, width=4000, height=80, name="wide.png", subset="default"), covered, files=["images/Validation/a.png"])
    picture(folder/"images/wide.png", size=(4000, 80))
    made = cvat_to_qwenvl(folder, tmp_path/"out", val=.5, family="qwen3-vl")
    assert made.losses.counts == {"attribute not in the answer": 1, "box too small for the model": 1, "occluded not in the answer": 1, "subset": 1}


def test_reads_back_as_records(tmp_path):
    cvat_to_qwenvl(sample/"shelves", tmp_path/"out")
    from vlmcourse.trainers import from_qwen
    rows = [from_qwen(r) for r in read_json(tmp_path/"out/train.json")]
    for row in rows:
        row["images"] = [str(tmp_path/"out"/i) for i in row["images"]]
    assert len(read_records(rows)) == 11


def test_command_line(tmp_path, capsys):
    from vlmcourse import cli
    words = ["cvat_to_qwenvl", "--cvat-dir", str(sample/"shelves_coco.zip"), "--output-dir", str(tmp_path/"out"), "--val", "0.25", "--per-label"]
    assert cli.main(words) == 0
    assert "train.json: 18 rows about 9 pictures" in capsys.readouterr().out
    assert len(read_json(tmp_path/"out/val.json")) == 6
    assert cli.main(words) == 2 and "nothing is overwritten" in capsys.readouterr().err
    assert cli.main(["cvat_to_qwenvl", str(tmp_path/"none"), str(tmp_path/"out2")]) == 2 and "no export" in capsys.readouterr().err

"""lesson 02d: odd exports, one reason per row; a real peer; the questions."""
import json
import os
import random
import re
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vlmcourse.boxes import FAMILIES, read_objects
from vlmcourse.cvat import (CHANGED, DROPPED, LEFT_OUT, LOSSES, around_rotated, detection_records, read_cvat)
from vlmcourse.formats import check_records

root = Path(__file__).resolve().parent.parent
sample = root / "data_samples/cvat"
SIZE = (100, 80)                                  # of every picture in the tables, px


# --- small exports ------------------------------------------------------------------------------------------------

def picture(path, size=SIZE, seed=0, **more):
    "A picture file with content of its own."
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = random.Random(f"{path.name}{seed}")
    tiny = Image.new("RGB", (8, 8))
    tiny.putdata([tuple(noise.randrange(256) for _ in range(3)) for _ in range(64)])
    tiny.resize(size, Image.Resampling.BICUBIC).save(path, **more)
    return path


def box(place="10 20 40 60", label='label="vase"', inner="", **more):
    xtl, ytl, xbr, ybr = place.split()
    more = " ".join(f'{k}="{v}"' for k, v in more.items())
    return f'<box {label} xtl="{xtl}" ytl="{ytl}" xbr="{xbr}" ybr="{ybr}" {more}>{inner}</box>'


def image(inner="", name="a.png", **more):
    more = " ".join(f'{k}="{v}"' for k, v in {"id": 0, "width": SIZE[0], "height": SIZE[1], **more}.items())
    return f'<image name="{name}" {more}>{inner}</image>'


def xml_export(folder, *images, files=("images/a.png",), head='<?xml version="1.0" encoding="utf-8"?>'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"annotations.xml").write_text(f"{head}<annotations><version>1.1</version>{''.join(images)}</annotations>", encoding="utf-8")
    for name in files:
        picture(folder/name)
    return folder


def coco_export(folder, annotations=(), images=None, categories=None, file="annotations/instances_default.json", **more):
    images = [dict(id=1, width=SIZE[0], height=SIZE[1], file_name="a.png")] if images is None else images
    categories = [dict(id=1, name="vase")] if categories is None else categories
    (folder/file).parent.mkdir(parents=True, exist_ok=True)
    (folder/file).write_text(json.dumps(dict(images=images, annotations=list(annotations), categories=categories) | more))
    picture(folder/"images/default/a.png")
    return folder


def note(**more):
    return dict(id=1, image_id=1, category_id=1, bbox=[10, 20, 30, 40], segmentation=[], iscrowd=0) | more


def check_accounts(records, losses):
    "Nothing vanishes: every picture and every drawn thing is kept, or has one reason to be gone."
    counts = losses.counts
    assert set(counts) <= set(LOSSES)
    assert losses.kept_objects == sum(len(r["objects"]) for r in records)
    assert losses.objects == losses.kept_objects + sum(counts.get(r, 0) for r in DROPPED)
    assert losses.pictures == len(records) + sum(counts.get(r, 0) for r in LEFT_OUT)
    for record in records:
        width, height = record["meta"]["size"]
        assert Path(record["images"][0]).is_file()
        for thing in record["objects"]:
            x1, y1, x2, y2 = thing["bbox"]
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
            assert all(isinstance(v, str) for v in thing.get("attributes", {}).values())


# --- the table of odd XML -----------------------------------------------------------------------------------------

PLAIN = [10, 20, 40, 60]
attr = '<attribute name="{}">{}</attribute>'.format
XML = {  # what is odd: (inside <image>, reasons counted, boxes kept)
    "nothing odd": (box(), {}, [PLAIN]),
    "empty picture": ("", {}, []),
    "turned by 90": (box(rotation="90.00"), {"rotated box": 1}, [[5, 25, 45, 55]]),
    "turned by 360": (box(rotation="360"), {}, [PLAIN]),
    "turned, partly outside": (box("0 0 40 10", rotation="90"), {"rotated box": 1, "box over the edge": 1}, [[15, 0, 25, 25]]),
    "rotation is a word": (box(rotation="left"), {"bad numbers": 1}, []),
    "partly outside": (box("-5 20 40 90"), {"box over the edge": 1}, [[0, 20, 40, 80]]),
    "fully outside": (box("110 20 140 60"), {"box outside the picture": 1}, []),
    "touches the edge from outside": (box("100 20 140 60"), {"box outside the picture": 1}, []),
    "a hair inside": (box("99.5 20 140 60"), {"box outside the picture": 1}, []),
    "no width": (box("10 20 10 60"), {"box without area": 1}, []),
    "a point": (box("10 20 10 20"), {"box without area": 1}, []),
    "corners swapped": (box("40 60 10 20"), {"corners swapped": 1}, [PLAIN]),
    "not a number": (box("10 wide 40 60"), {"bad numbers": 1}, []),
    "nan": (box("nan 20 40 60"), {"bad numbers": 1}, []),
    "infinite": (box("10 20 inf 60"), {"bad numbers": 1}, []),
    "comma for a point": (box("10,5 20 40 60"), {"bad numbers": 1}, []),
    "corner missing": ('<box label="vase" xtl="1" ytl="2" xbr="30"/>', {"bad numbers": 1}, []),
    "no label": (box(label=""), {"no label": 1}, []),
    "empty label": (box(label='label=" "'), {"no label": 1}, []),
    "outside=1": (box(outside="1"), {"hidden object": 1}, []),
    "outside=0": (box(outside="0"), {}, [PLAIN]),
    "twice the same": (box() * 2, {"same box twice": 1}, [PLAIN]),
    "same place, other label": (box() + box(label='label="damage"'), {}, [PLAIN, PLAIN]),
    "z-order": (box(z_order="2"), {"z-order": 1}, [PLAIN]),
    "group": (box(group_id="3"), {"group": 1}, [PLAIN]),
    "polygon": ('<polygon label="vase" points="10,20;40,30;20,60"/>', {"polygon": 1}, [PLAIN]),
    "polygon with a hole in its numbers": ('<polygon label="vase" points="10,20;40;20,60"/>', {"bad numbers": 1}, []),
    "polygon without points": ('<polygon label="vase"/>', {"bad numbers": 1}, []),
    "ellipse": ('<ellipse label="vase" cx="30" cy="40" rx="20" ry="10"/>', {"ellipse": 1}, [[10, 30, 50, 50]]),
    "turned ellipse": ('<ellipse label="vase" cx="30" cy="40" rx="20" ry="10" rotation="90"/>', {"ellipse": 1}, [[20, 20, 40, 60]]),
    "mask": ('<mask label="vase" rle="2, 4" left="10" top="20" width="30" height="40"/>', {"mask": 1}, [PLAIN]),
    "mask without a place": ('<mask label="vase" rle="2, 4"/>', {"bad numbers": 1}, []),
    "cuboid": ('<cuboid label="vase" xtl1="10" ytl1="25" xbl1="10" ybl1="60" xtr1="30" ytr1="25" xbr1="30" ybr1="60" xtl2="20" ytl2="20" '
               'xbl2="20" ybl2="50" xtr2="40" ytr2="20" xbr2="40" ybr2="50"/>', {"cuboid": 1}, [PLAIN]),
    "polyline": ('<polyline label="vase" points="10,20;40,60"/>', {"polyline": 1}, []),
    "points": ('<points label="vase" points="10,20"/>', {"points": 1}, []),
    "skeleton": ('<skeleton label="vase"><points label="foot" points="10,20"/></skeleton>', {"skeleton": 1}, []),
    "a shape of tomorrow": ('<hexagon label="vase"/>', {"unknown shape": 1}, []),
    "tag": ('<tag label="recheck"/>' + box(), {"tag": 1}, [PLAIN]),
    "attribute twice": (box(inner=attr("no", 1) + attr("no", 2)), {"attribute twice": 1}, [PLAIN]),
    "attribute without a name": (box(inner="<attribute>7</attribute>"), {"attribute without a name": 1}, [PLAIN]),
    "half hidden": (box(occluded="1"), {}, [PLAIN]),
}


@pytest.mark.parametrize("name", XML)
def test_odd_xml(name, tmp_path):
    inner, reasons, boxes = XML[name]
    records, losses = read_cvat(xml_export(tmp_path/"e", image(inner)))
    assert losses.counts == reasons
    assert [o["bbox"] for o in records[0]["objects"]] == boxes
    assert losses.negatives == (not boxes)
    check_accounts(records, losses)


def test_rotation_of_any_angle():
    import math
    rng = random.Random(0)
    for _ in range(200):
        x, y, w, h, angle = [rng.uniform(1, 90) for _ in range(4)] + [rng.uniform(-720, 720)]
        a, mx, my = math.radians(angle), x + w/2, y + h/2
        corners = [(mx + sx*w/2*math.cos(a) - sy*h/2*math.sin(a), my + sx*w/2*math.sin(a) + sy*h/2*math.cos(a))
                   for sx in (-1, 1) for sy in (-1, 1)]
        want = [f(c[i] for c in corners) for f in (min, max) for i in (0, 1)]
        assert around_rotated([x, y, x+w, y+h], angle) == pytest.approx(want, abs=.006)


TEXTS = ["007", "7", "7.0", "1e3", "true", "", " a  b ", "ü ß 花瓶", "<b>&amp;", "line\nbreak", "NULL", "-0"]


def test_attributes_stay_text(tmp_path):
    inner = "".join(attr(f"t{i}", t.replace("&", "&amp;").replace("<", "&lt;")) for i, t in enumerate(TEXTS))
    records, losses = read_cvat(xml_export(tmp_path/"e", image(box(inner=inner, occluded="1"))))
    thing = records[0]["objects"][0]
    assert list(thing["attributes"].values()) == TEXTS and thing["occluded"] is True and losses.counts == {}


# --- the table of odd COCO ----------------------------------------------------------------------------------------

COCO = {  # what is odd: (annotations, reasons counted, boxes kept)
    "nothing odd": ([note()], {}, [PLAIN]),
    "empty picture": ([], {}, []),
    "turned by 90": ([note(attributes=dict(rotation=90.0))], {"rotated box": 1}, [[5, 25, 45, 55]]),
    "rotation is null": ([note(attributes=dict(rotation=None))], {"bad numbers": 1}, []),
    "polygon": ([note(segmentation=[[10, 20, 40, 30, 20, 60]])], {"polygon": 1}, [PLAIN]),
    "polygon of the box's corners": ([note(segmentation=[[10, 20, 40, 20, 40, 60, 10, 60]])], {}, [PLAIN]),
    "polygon without bbox": ([note(bbox=[], segmentation=[[10, 20, 40, 30, 20, 60]])], {"polygon": 1}, [PLAIN]),
    "segmentation is nonsense": ([note(segmentation=[[[10, 20]], "x"])], {"polygon": 1}, [PLAIN]),
    "mask": ([note(segmentation=dict(counts=[1, 2], size=[80, 100]), iscrowd=1)], {"mask": 1}, [PLAIN]),
    "keypoints": ([note(keypoints=[10, 20, 2])], {"skeleton": 1}, []),
    "of a track": ([note(attributes=dict(track_id=4, keyframe=True, occluded=True))], {"track": 1}, [PLAIN]),
    "outside": ([note(attributes=dict(outside=True))], {"hidden object": 1}, []),
    "partly outside": ([note(bbox=[-5, 20, 45, 70])], {"box over the edge": 1}, [[0, 20, 40, 80]]),
    "fully outside": ([note(bbox=[110, 20, 30, 30])], {"box outside the picture": 1}, []),
    "no area": ([note(bbox=[10, 20, 0, 40])], {"box without area": 1}, []),
    "negative width": ([note(bbox=[40, 20, -30, 40])], {"corners swapped": 1}, [PLAIN]),
    "three numbers": ([note(bbox=[10, 20, 30])], {"bad numbers": 1}, []),
    "bbox is null": ([note(bbox=None)], {"bad numbers": 1}, []),
    "number is null": ([note(bbox=[10, None, 30, 40])], {"bad numbers": 1}, []),
    "number is text": ([note(bbox=["10", "20", "30", "40"])], {}, [PLAIN]),
    "nan": ([note(bbox=[10, float("nan"), 30, 40])], {"bad numbers": 1}, []),
    "unknown picture": ([note(image_id=99)], {"unknown picture": 1}, []),
    "picture is a list": ([note(image_id=[1])], {"unknown picture": 1}, []),
    "unknown label": ([note(category_id=9)], {"no label": 1}, []),
    "twice the same": ([note(), note(id=2)], {"same box twice": 1}, [PLAIN]),
    "number as attribute": ([note(attributes=dict(inventory=7.0))], {"attribute was not text": 1}, [PLAIN]),
    "list as attribute": ([note(attributes=dict(inventory=[1]))], {"attribute was not text": 1}, [PLAIN]),
    "attributes are a list": ([note(attributes=["007"])], {"attribute without a name": 1}, [PLAIN]),
    "id as text": ([note(image_id="1")], {}, [PLAIN]),
}


@pytest.mark.parametrize("name", COCO)
def test_odd_coco(name, tmp_path):
    annotations, reasons, boxes = COCO[name]
    records, losses = read_cvat(coco_export(tmp_path/"e", annotations))
    assert losses.counts == reasons
    assert [o["bbox"] for o in records[0]["objects"]] == boxes
    check_accounts(records, losses)


def test_coco_attributes_become_text(tmp_path):
    given = dict(inventory="007", glued=True, intact=False, floor=None, rotation=0.0, occluded=False)
    records, losses = read_cvat(coco_export(tmp_path/"e", [note(attributes=given)]))
    assert records[0]["objects"][0]["attributes"] == dict(inventory="007", glued="true", intact="false", floor="")
    assert losses.counts == {}


# --- pictures and names -------------------------------------------------------------------------------------------

def two(folder, first, second, files):
    "An export of two pictures; only the second one is in order."
    return xml_export(folder, first, image(box(), name="ok.png"), files=[*files, "images/ok.png"])


NFD, NFC = (unicodedata.normalize(form, "schüssel.png") for form in ("NFD", "NFC"))
PICTURES = {  # what is odd: (the first <image>, its files, reason or None)
    "sub-folder": (image(box(), name="hall 1/left/a.png"), ["images/hall 1/left/a.png"], None),
    "without images/": (image(box()), ["a.png"], None),
    "subset": (image(box(), subset="train", task_id="3"), ["images/train/a.png"], None),
    "subset default": (image(box(), subset="default", task_id="3"), ["images/default/a.png"], None),
    "unicode": (image(box(), name="花瓶 ü.png"), ["images/花瓶 ü.png"], None),
    "u and dots in the zip of a Mac": (image(box(), name=NFC), [f"images/{NFD}"], None),
    "Windows slashes": (image(box(), name="hall\\a.png"), ["images/hall/a.png"], None),
    "entity in the name": (image(box(), name="a&amp;b.png"), ["images/a&b.png"], None),
    "frame of a film": (image(box(), name="frame_000007"), ["images/frame_000007.PNG"], None),
    "no size in the file": (f'<image name="a.png" id="0">{box()}</image>', ["images/a.png"], None),
    "missing": (image(box(), name="none.png"), [], "picture missing"),
    "a folder of that name": (image(box(), name="hall"), ["images/hall/b.png"], "picture missing"),
    "very long name": (image(box(), name="a" * 3000), [], "picture missing"),
    "leaves the folder": (image(box(), name="../../a.png"), [], "picture outside the folder"),
    "leaves with backslashes": (image(box(), name="..\\..\\a.png"), [], "picture outside the folder"),
    "whole path": (image(box(), name="/etc/passwd"), [], "picture outside the folder"),
    "subset leaves": (image(box(), subset="../.."), ["images/a.png"], "picture outside the folder"),
    "no name": (image(box(), name=""), [], "picture without a name"),
    "other size": (image(box(), width=200, height=160), ["images/a.png"], "picture of another size"),
    "size is a word": (image(box(), width="wide"), ["images/a.png"], "picture of another size"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_odd_pictures(name, tmp_path):
    first, files, reason = PICTURES[name]
    records, losses = read_cvat(two(tmp_path/"e", first, None, files))
    check_accounts(records, losses)
    if reason is None:
        assert len(records) == 2 and losses.counts == {}
    else:
        assert [r["id"] for r in records] == ["ok.png"]
        assert losses.counts == {reason: 1, "lost with its picture": 1}


def test_damaged_picture_is_left_out(tmp_path):
    folder = two(tmp_path/"e", image(box()), None, ["images/a.png"])
    whole = (folder/"images/a.png").read_bytes()
    (folder/"images/a.png").write_bytes(whole[:len(whole)//2])
    records, losses = read_cvat(folder)
    assert losses.counts == {"picture damaged": 1, "lost with its picture": 1}
    check_accounts(records, losses)


def test_link_that_leaves_the_folder(tmp_path):
    folder = two(tmp_path/"e", image(box(), name="link.png"), None, [])
    os.symlink(picture(tmp_path/"secret.png"), folder/"images/link.png")
    assert read_cvat(folder).losses.counts["picture outside the folder"] == 1


def test_turned_photo_has_the_size_that_cvat_shows(tmp_path):
    folder = xml_export(tmp_path/"e", image(box(), width=80, height=100), files=[])
    note = Image.Exif()
    note[0x0112] = 6
    picture(folder/"images/a.png", exif=note)
    records, losses = read_cvat(folder)
    assert records[0]["meta"]["size"] == [80, 100] and losses.counts == {}


def test_equal_names_in_a_project(tmp_path):
    same = [image(box(), subset="train", task_id=1), image(subset="train", task_id=2), image(box(), subset="val", task_id=3)]
    records, losses = read_cvat(xml_export(tmp_path/"e", *same, files=["images/train/a.png", "images/val/a.png"]))
    assert [r["id"] for r in records] == ["val/a.png"]        # the two of one subset overwrote each other in the export
    assert losses.counts == {"one file, several pictures": 2, "lost with its picture": 1}
    check_accounts(records, losses)
    records, losses = read_cvat(xml_export(tmp_path/"f", same[0], same[2], files=["images/train/a.png", "images/val/a.png"]))
    assert [r["id"] for r in records] == ["train/a.png", "val/a.png"] and losses.counts == {}


def test_project_export(tmp_path):
    meta = "<meta><project><id>1</id><tasks><task><id>3</id></task></tasks></project></meta>"
    records, _ = read_cvat(xml_export(tmp_path/"e", meta, image(box(), subset="train", task_id="3"), files=["images/train/a.png"]))
    assert records[0]["meta"] == dict(size=list(SIZE), subset="train", task="3")


def test_several_coco_subsets(tmp_path):
    folder = tmp_path/"e"
    for subset in ("train", "val"):
        coco_export(folder, [note()], file=f"annotations/instances_{subset}.json")
        picture(folder/f"images/{subset}/a.png")
    records, losses = read_cvat(folder)
    assert [r["id"] for r in records] == ["train/a.png", "val/a.png"] and losses.counts == {}
    assert [Path(r["images"][0]).parent.name for r in records] == ["train", "val"]


# --- whole exports that are refused -------------------------------------------------------------------------------

BOMB = '<!DOCTYPE annotations [<!ENTITY a "vase">]>'
BAD = {  # what is wrong: (how to make it in a folder, part of the message)
    "video": (lambda f: (f/"annotations.xml").write_text('<annotations><track id="0"><box/></track></annotations>'), "CVAT for video"),
    "tracks beside images": (lambda f: xml_export(f, image(box()), '<track id="0"/>'), "CVAT for video"),
    "DOCTYPE": (lambda f: xml_export(f, image(), head=BOMB), "DOCTYPE"),
    "entity in a name": (lambda f: xml_export(f, image(name="&a;"), head=BOMB), "DOCTYPE"),
    "file as entity": (lambda f: xml_export(f, image(), head='<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>'), "DOCTYPE"),
    "undeclared entity": (lambda f: xml_export(f, image(name="&x;")), "not valid XML"),
    "cut off": (lambda f: (f/"annotations.xml").write_text("<annotations><image id='0'>"), "not valid XML"),
    "empty file": (lambda f: (f/"annotations.xml").write_text(""), "not valid XML"),
    "not XML": (lambda f: (f/"annotations.xml").write_bytes(b"\x89PNG\r\n\x1a\n\0\0"), "not valid XML"),
    "encoding unknown": (lambda f: xml_export(f, image(), head='<?xml version="1.0" encoding="klingon"?>'), "not valid XML"),
    "encoding wrong": (lambda f: (f/"annotations.xml").write_bytes(b'<?xml version="1.0" encoding="utf-8"?><annotations a="\xff"/>'),
                       "not valid XML"),
    "Pascal VOC": (lambda f: (f/"a.xml").write_text("<annotation/>"), "Pascal VOC"),
    "another root": (lambda f: (f/"a.xml").write_text("<html/>"), "starts with <html>"),
    "no pictures": (lambda f: xml_export(f), "names no picture"),
    "no pictures in COCO": (lambda f: coco_export(f, images=[]), "names no picture"),
    "all pictures missing": (lambda f: xml_export(f, image(box()), files=[]), "Save images"),
    "COCO is a list": (lambda f: (f/"a.json").write_text("[]"), "not a COCO file"),
    "COCO without categories": (lambda f: (f/"a.json").write_text('{"images": [], "annotations": []}'), "not a COCO file"),
    "Datumaro": (lambda f: (f/"a.json").write_text('{"info": {}, "categories": {}, "items": []}'), "not a COCO file"),
    "COCO row is no object": (lambda f: coco_export(f, [7]), "not a COCO file"),
    "COCO is broken": (lambda f: (f/"a.json").write_text('{"images": ['), "not valid JSON"),
    "picture id twice": (lambda f: coco_export(f, images=[dict(id=1, file_name="a.png")] * 2), "several pictures have the id 1"),
    "label id twice": (lambda f: coco_export(f, categories=[dict(id=1, name="a"), dict(id=1, name="b")]), "several labels have the id 1"),
    "two XML files": (lambda f: [(f/n).write_text("<annotations/>") for n in ("a.xml", "b.xml")], "several annotation files"),
    "XML and COCO": (lambda f: [xml_export(f, image()), coco_export(f)], "several annotation files"),
    "CVAT backup": (lambda f: [(f/n).write_text("{}") for n in ("task.json", "annotations.json")], "backup"),
    "two exports": (lambda f: [xml_export(f/n, image()) for n in ("one", "two")], "2 exports"),
    "nothing": (lambda f: (f/"readme.txt").write_text("hi"), "readme.txt"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name, tmp_path):
    make, message = BAD[name]
    (tmp_path/"e").mkdir()
    make(tmp_path/"e")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_cvat(tmp_path/"e")


def test_wrong_paths(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no export"):
        read_cvat(tmp_path/"none")
    with pytest.raises(ValueError, match="neither a folder nor"):
        read_cvat(picture(tmp_path/"a.png"))
    with pytest.raises(FileNotFoundError, match="images_dir"):
        read_cvat(xml_export(tmp_path/"e", image()), images_dir=tmp_path/"none")


def test_a_bomb_is_refused_at_once(tmp_path):
    lines = "".join(f'<!ENTITY {b} "{f"&{a};"*10}">' for a, b in zip("abcdefghi", "bcdefghij"))
    xml_export(tmp_path/"e", image(name="&j;"), head=f'<!DOCTYPE x [<!ENTITY a "{"vase"*10}">{lines}]>')   # 40 GB unpacked
    with pytest.raises(ValueError, match="DOCTYPE"):
        read_cvat(tmp_path/"e")


# --- the same export as folder, file and zip ----------------------------------------------------------------------

def make_zip(path, *pairs, folder=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in pairs:
            archive.writestr(name, data)
        for p in sorted(folder.rglob("*")) if folder else []:
            archive.write(p, p.relative_to(folder))
    return path


def told(export):
    return [{k: v for k, v in r.items() if k != "images"} for r in export.records], export.losses.counts


def test_folder_file_and_zip_agree(tmp_path):
    folder = xml_export(tmp_path/"e", image(box(rotation=30)), image(name="sub/b.png"), files=["images/a.png", "images/sub/b.png"])
    want = told(read_cvat(folder))
    assert told(read_cvat(str(folder/"annotations.xml"))) == want
    assert told(read_cvat(make_zip(tmp_path/"e.zip", folder=folder))) == want
    (tmp_path/"up").mkdir()
    folder.rename(tmp_path/"up/e")
    assert told(read_cvat(tmp_path/"up")) == want                                    # one folder too high
    mac = make_zip(tmp_path/"mac.zip", ("__MACOSX/._annotations.xml", "x"), ("._annotations.xml", "x"), folder=tmp_path/"up")
    assert told(read_cvat(mac)) == want
    bare = make_zip(tmp_path/"bare.zip", ("annotations.xml", (tmp_path/"up/e/annotations.xml").read_text()))
    assert told(read_cvat(bare, images_dir=tmp_path/"up/e/images")) == want


def test_coco_folder_file_and_zip_agree(tmp_path):
    folder = coco_export(tmp_path/"e", [note()])
    want = told(read_cvat(folder))
    assert told(read_cvat(folder/"annotations/instances_default.json")) == want
    assert told(read_cvat(make_zip(tmp_path/"e.zip", folder=folder))) == want


def link(name):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


ZIPS = {  # what is wrong: (members, part of the message)
    "slips out": ([("../x.txt", "x")], "outside of the folder"),
    "slips out in the middle": ([("images/../../x.txt", "x")], "outside of the folder"),
    "slips out with backslashes": ([("..\\x.txt", "x")], "outside of the folder"),
    "whole path": ([("/tmp/x.txt", "x")], "outside of the folder"),
    "drive": ([("C:\\x.txt", "x")], "outside of the folder"),
    "link": ([(link("images"), "/etc")], "is a link"),
    "twice": ([("a.xml", "x"), ("a.xml", "y")], "is there 2 times"),
    "too much": ([("zeros", bytes(2_000_000))], "max_gb"),
    "no annotations": ([("a.txt", "x")], "neither annotations.xml"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ZIPS)
def test_refused_zips(name, tmp_path):
    members, message = ZIPS[name]
    (tmp_path/"in").mkdir()
    path = make_zip(tmp_path/"in/bad.zip", *members)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        read_cvat(path, max_gb=.001)
    assert [p.name for p in tmp_path.iterdir()] == ["in"] and not Path("/tmp/x.txt").exists()


def test_damaged_zips(tmp_path):
    whole = make_zip(tmp_path/"a.zip", folder=xml_export(tmp_path/"e", image())).read_bytes()
    for data in (b"", b"hello", whole[:len(whole)//2], whole[:60] + b"????" + whole[64:]):
        (tmp_path/"bad.zip").write_bytes(data)
        with pytest.raises(ValueError, match="not a whole zip|not valid XML"):
            read_cvat(tmp_path/"bad.zip")


# --- the sample, and a real peer ----------------------------------------------------------------------------------

def test_sample_is_what_its_readme_says():
    records, losses = read_cvat(sample/"shelves")
    assert len(records) == 12 and losses.negatives == 1
    assert losses.counts == {"z-order": 10, "rotated box": 1, "polygon": 1, "tag": 1}
    assert Counter(o["label"] for r in records for o in r["objects"]) == dict(vase=33, damage=10)
    assert any(o.get("attributes", {}).get("inventory") == "007" for r in records for o in r["objects"])
    check_accounts(records, losses)


def test_both_exports_of_the_sample_agree():
    xml, coco = read_cvat(sample/"shelves"), read_cvat(sample/"shelves_coco.zip")
    assert coco.losses.counts == {"rotated box": 1, "polygon": 1}
    for a, b in zip(xml.records, coco.records, strict=True):
        assert a["id"] == b["id"] and Image.open(a["images"][0]).tobytes() == Image.open(b["images"][0]).tobytes()
        for one, two in zip(a["objects"], b["objects"], strict=True):
            assert one.pop("bbox") == pytest.approx(two.pop("bbox"), abs=.011)
            assert one == two


# Made once with datumaro 1.13.12 (`uv pip install datumaro==1.13.12` in an environment of its own):
#   python tests/fixtures/cvat/read_with_datumaro.py data_samples/cvat > tests/fixtures/cvat/datumaro.json
PEER = json.loads((root/"tests/fixtures/cvat/datumaro.json").read_text())


@pytest.mark.parametrize("kind", ["xml", "coco"])
def test_datumaro_reads_the_same(kind):
    records, _ = read_cvat(sample/dict(xml="shelves", coco="shelves_coco.zip")[kind])
    theirs = {item["id"]: item["annotations"] for item in PEER[kind]}
    assert set(theirs) == {r["id"].removesuffix(".jpg") for r in records}
    seen = Counter()
    for record in records:
        found = theirs[record["id"].removesuffix(".jpg")]
        assert [t["label"] for t in record["meta"].get("tags", [])] == [a["label"] for a in found if a["type"] == "label"]
        found = [a for a in found if a["type"] != "label"]
        twice = [a for a in found if a["type"] == "bbox" and any(b["type"] == "polygon" and b["bbox"] == a["bbox"] for b in found)]
        seen["box beside a polygon"] += len(twice)
        found = sorted((a for a in found if a not in twice), key=lambda a: (a["label"], a["bbox"]))
        for ours, other in zip(sorted(record["objects"], key=lambda o: (o["label"], o["bbox"])), found, strict=True):
            seen[compare(ours, other, kind)] += 1
    want = dict(xml={"equal": 43}, coco={"equal": 42, "rotation is only noted": 1, "box beside a polygon": 1})[kind]
    assert +seen == want


def compare(ours, other, kind):
    """How one object differs. Named differences: checkboxes are bool; in XML a select value such as 01 becomes the number 1.0 (ours
    stays text); in COCO the box of a turned rectangle is left as it was before turning."""
    assert ours["label"] == other["label"]
    for name, text in ours.get("attributes", {}).items():
        want = {"true": True, "false": False}.get(text, text)
        assert other["attributes"][name] == (float(text) if (name, kind) == ("case", "xml") else want)
    if "rotation" in ours and kind == "coco":
        assert around_rotated(other["bbox"], ours["rotation"]) == pytest.approx(ours["bbox"], abs=.011)
        return "rotation is only noted"
    assert other["bbox"] == pytest.approx(ours["bbox"], abs=.011)
    return "equal"


# --- questions ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shelves():
    return read_cvat(sample/"shelves").records


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_read_back(family, shelves):
    rows = detection_records(shelves, family=family)
    assert check_records(rows).problems == [] and len(rows) == 12
    for row, record in zip(rows, shelves):
        found, problem = read_objects(row["messages"][1]["content"], record["meta"]["size"], family)
        assert problem is None and [o["label"] for o in found] == [o["label"] for o in record["objects"]]
        for a, b in zip(found, record["objects"]):
            assert a["bbox"] == pytest.approx(b["bbox"], abs=200/96)
    assert rows[10]["messages"][1]["content"] == "[]"


def test_questions(shelves):
    asked = detection_records(shelves, question=["Find {labels}.", "Where is {labels}?"])
    texts = {r["messages"][0]["content"] for r in asked}
    assert texts == {"<image>Find damage, vase.", "<image>Where is damage, vase?"}
    assert asked == detection_records(shelves, question=["Find {labels}.", "Where is {labels}?"])
    each = detection_records(shelves, per_label=True)
    assert len(each) == 24 and len({r["id"] for r in each}) == 24
    assert all(o["label"] == r["id"].split("#")[1] for r in each for o in r["objects"])
    only = detection_records(shelves, labels=["vase"])
    assert all(o["label"] == "vase" for r in only for o in r["objects"])
    with pytest.raises(ValueError, match="mark"):
        detection_records(shelves, question="<image> <image> {labels}")
    with pytest.raises(ValueError, match="family"):
        detection_records(shelves, family="gpt")


def test_import_is_quick():
    code = "import sys, vlmcourse.splits; print([m for m in ('torch', 'PIL.Image', 'matplotlib', 'scipy', 'imagehash') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert not set(eval(out)) & {"torch", "matplotlib", "scipy", "imagehash"}


def test_every_reason_is_documented():
    assert not set(CHANGED) & set(DROPPED) and not set(DROPPED) & set(LEFT_OUT)
    used = set(re.findall(r'"([a-z][a-z0-9 ,=\'-]+)"', (root/"vlmcourse/cvat.py").read_text() + (root/"vlmcourse/splits.py").read_text()))
    assert set(LOSSES) - used == set()

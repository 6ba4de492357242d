"""Odd records, files and answers: each gets the stated reason, and nothing is dropped in silence."""
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vlmcourse.formats import REMEDIES, check_record, check_records, open_image, put_marks, read_records, task_of, to_record


def turn(role, content):
    return {"role": role, "content": content}


ASK, SAY = turn("user", "<image>Which colour?"), turn("assistant", "red")
GOOD = {"id": "a", "images": ["a.png"], "messages": [ASK, SAY]}


def good(**changes):
    return {**GOOD, **changes}


def talk(*turns, **changes):
    return good(messages=list(turns), **changes)


# what stands in the file, and the only reason that may be given for it (None: it is fine)
ROWS = [
    ("fine", GOOD, None),
    ("no mark at all", talk(turn("user", "Which colour?"), SAY), None),
    ("no picture, no mark", talk(turn("user", "Which colour?"), SAY, images=[]), None),
    ("images missing", {"messages": [turn("user", "Hi"), SAY]}, None),
    ("images null", talk(turn("user", "Hi"), SAY, images=None), None),
    ("system turn", talk(turn("system", "Be brief."), ASK, SAY), None),
    ("two rounds", talk(ASK, SAY, turn("user", "Sure?"), turn("assistant", "yes")), None),
    ("mark in the second question", talk(turn("user", "Hi"), turn("assistant", "Hello"), ASK, SAY), None),
    ("unicode", talk(turn("user", "<image>Was für eine Vase? 🏺"), turn("assistant", "Хидрия")), None),
    ("number as id and answer", good(id=7, answer=3), None),
    ("id null", good(id=None), None),
    ("extra fields", good(solution="x", meta={"a": [1]}), None),
    ("picture in a sub-folder", good(images=["sub/b.jpg"]), None),
    ("text", "vase", "not a record"),
    ("list", [1, 2], "not a record"),
    ("null", None, "not a record"),
    ("number", 3, "not a record"),
    ("empty object", {}, "bad messages"),
    ("messages empty", good(messages=[]), "bad messages"),
    ("messages is text", good(messages="Which colour? red"), "bad messages"),
    ("messages is an object", good(messages={"role": "user"}), "bad messages"),
    ("turn is text", good(messages=["Which colour?"]), "bad messages"),
    ("sharegpt keys", good(messages=[{"from": "human", "value": "x"}]), "bad messages"),
    ("content null", talk(ASK, turn("assistant", None)), "bad messages"),
    ("content is a list of parts", talk(turn("user", [{"type": "image"}]), SAY), "bad messages"),
    ("content is a number", talk(ASK, turn("assistant", 3)), "bad messages"),
    ("role unknown", talk(turn("human", "<image>x"), SAY), "bad messages"),
    ("role missing", good(messages=[{"content": "x"}]), "bad messages"),
    ("user twice", talk(ASK, ASK, SAY), "bad messages"),
    ("assistant first", talk(SAY, ASK), "bad messages"),
    ("system only", talk(turn("system", "Be brief.")), "bad messages"),
    ("system in the middle", talk(ASK, turn("system", "x"), SAY), "bad messages"),
    ("question empty", talk(turn("user", "<image>"), SAY), "no question"),
    ("question blank", talk(turn("user", " \n "), SAY), "no question"),
    ("half an emoji asked", talk(turn("user", "<image>Which? \ud83c"), SAY), "half a character"),
    ("half an emoji said", talk(ASK, turn("assistant", "\udffa")), "half a character"),
    ("answer missing", talk(ASK), "no answer"),
    ("answer empty", talk(ASK, turn("assistant", "")), "no answer"),
    ("answer blank", talk(ASK, turn("assistant", " \n")), "no answer"),
    ("question after the answer", talk(ASK, SAY, turn("user", "Sure?")), "no answer"),
    ("two marks, one picture", talk(turn("user", "<image><image>x"), SAY), "marks and pictures differ"),
    ("one mark, two pictures", good(images=["a.png", "a.png"]), "marks and pictures differ"),
    ("a mark, no picture", good(images=[]), "marks and pictures differ"),
    ("mark in the answer", talk(ASK, turn("assistant", "<image> red")), "mark in an answer"),
    ("images is text", good(images="a.png"), "bad picture entry"),
    ("images is an object", good(images={"path": "a.png"}), "bad picture entry"),
    ("picture is a number", good(images=[3]), "bad picture entry"),
    ("picture is null", good(images=[None]), "bad picture entry"),
    ("picture is an object", good(images=[{"path": "a.png"}]), "bad picture entry"),
    ("picture name empty", good(images=[""]), "bad picture entry"),
    ("web address", good(images=["https://example.org/a.png"]), "picture is a web address"),
    ("data address", good(images=["data:image/png;base64,AAAA"]), "picture is a web address"),
    ("file address", good(images=["file:///etc/hosts"]), "picture is a web address"),
    ("out of the folder", good(images=["../a.png"]), "picture outside the folder"),
    ("out by a detour", good(images=["sub/../../a.png"]), "picture outside the folder"),
    ("absolute path", good(images=["/etc/hosts"]), "picture outside the folder"),
    ("link out of the folder", good(images=["link.png"]), "picture outside the folder"),
    ("zero byte in the name", good(images=["a\0.png"]), "picture outside the folder"),
    ("not there", good(images=["none.png"]), "picture not found"),
    ("a folder", good(images=["sub"]), "picture not found"),
    ("a very long name", good(images=["x" * 5000 + ".png"]), "picture not found"),
    ("half a png", good(images=["half.png"]), "picture is damaged"),
    ("half a jpg", good(images=["half.jpg"]), "picture is damaged"),
    ("empty file", good(images=["empty.png"]), "picture is damaged"),
    ("text called png", good(images=["text.png"]), "picture is damaged"),
    ("checksum of a png wrong", good(images=["flip.png"]), "picture is damaged"),
    ("a picture bomb", good(images=["bomb.png"]), "picture is damaged"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("formats")
    data = root / "data"
    (data / "sub").mkdir(parents=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    picture.save(data / "a.png")
    picture.save(root / "a.png")
    picture.save(data / "sub" / "b.jpg")
    (data / "link.png").symlink_to(root / "a.png")
    png, jpg = (data / "a.png").read_bytes(), (data / "sub" / "b.jpg").read_bytes()
    (data / "half.png").write_bytes(png[:len(png) // 2])
    (data / "half.jpg").write_bytes(jpg[:len(jpg) // 2])
    (data / "flip.png").write_bytes(png[:200] + bytes([png[200] ^ 255]) + png[201:])
    (data / "empty.png").touch()
    (data / "text.png").write_text("I am no picture")
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (data / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)))
    return data


@pytest.mark.parametrize("name, row, reason", ROWS, ids=[name for name, *_ in ROWS])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_row(folder, name, row, reason, kind):
    file = folder / f"one.{kind}"
    rows = [GOOD, row]
    file.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    if reason is None:
        assert len(read_records(file)) == 2
        return
    with pytest.raises(ValueError) as error:
        read_records(file)
    text = str(error.value)
    assert "1 of 2 records cannot be used" in text and f"1 x {reason}: record 2 " in text
    assert REMEDIES[reason] in text and str(file) in text and "\n" not in text
    assert sum(f" x {other}: " in text for other in REMEDIES) == 1


def test_every_reason_has_a_row():
    fatal, reported = ({reason for *_, reason in table} - {None} for table in (ROWS, OBJECTS))
    assert fatal | reported | {"id used twice"} == set(REMEDIES) and not fatal & reported


def test_all_mistakes_in_one_error(folder):
    bad = [row for _, row, reason in ROWS if reason]
    (folder / "all.json").write_text(json.dumps([GOOD] + bad))
    with pytest.raises(ValueError) as error:
        read_records(folder / "all.json")
    text = str(error.value)
    assert text.startswith(f"{folder}/all.json: {len(bad)} of {len(bad) + 1} records")
    for reason in {reason for *_, reason in ROWS} - {None}:
        count = sum(reason == other for *_, other in ROWS)
        assert f"{count} x {reason}: " in text
    assert len(text) < 12_000


def test_one_record_can_have_several_mistakes():
    record = talk(turn("user", "<image><image>x"), turn("assistant", "<image>"))
    assert [reason for reason, _ in check_record(record)] == ["marks and pictures differ", "mark in an answer"]


FILES = [
    ("none.json", None, FileNotFoundError, "none.json"),
    ("empty.json", "", ValueError, "empty"),
    ("empty.jsonl", "\n \n", ValueError, "empty"),
    ("nothing.json", "[]", ValueError, "holds no records"),
    ("object.json", '{"messages": []}', ValueError, "must hold a list"),
    ("text.json", '"hello"', ValueError, "must hold a list"),
    ("broken.json", '[{"id": 1},\n {"id": }]', ValueError, "line 2"),
    ("broken.jsonl", '{"id": 1}\n{"id": \n', ValueError, "line 2"),
    ("list.csv", "a,b", ValueError, "must end in .json"),
    ("list.json.gz", "x", ValueError, "must end in .json"),
]


@pytest.mark.parametrize("name, text, kind, contains", FILES, ids=[name for name, *_ in FILES])
def test_file(tmp_path, name, text, kind, contains):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(kind, match=contains.replace(".", r"\.")) as error:
        read_records(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_folder_names_the_files_in_it(folder):
    (folder / "records.json").write_text("[]")
    with pytest.raises(ValueError, match="is a folder") as error:
        read_records(folder)
    assert "records.json" in str(error.value)


@pytest.mark.parametrize("data", [None, 3, {"messages": []}, (i for i in [GOOD])])
def test_wrong_type(data):
    with pytest.raises(ValueError, match="Records come from"):
        read_records(data)


def test_list_in_memory(folder, monkeypatch):
    picture = Image.open(folder / "a.png")
    records = read_records([good(images=[picture]), good(images=[str(folder / "sub/b.jpg")])])
    assert records[0]["images"] == [picture]
    monkeypatch.chdir(folder)
    assert read_records([GOOD])[0]["images"] == [str(folder / "a.png")]
    with pytest.raises(ValueError, match="1 x bad picture entry"):
        read_records([good(images=[np.zeros((4, 4, 3))])])
    with pytest.raises(ValueError, match="1 x picture not found"):
        read_records([good(images=["../none.png"])])


def test_no_id_is_the_number(folder):
    rows = [good(id=None, images=[]), good(images=[]), good(id=None, images=[])]
    for row in rows: row["messages"] = [turn("user", "Which?"), SAY]
    del rows[1]["id"]
    assert [r["id"] for r in read_records(rows)] == ["1", "2", "3"] and check_records(rows).problems == []


@pytest.mark.parametrize("meta", [None, "notes", 3, ["a"], {}, {"task": None}])
def test_task_of_any_meta(meta):
    assert task_of({"meta": meta}) is None and task_of({"meta": meta, "task": "count"}) == "count"
    assert task_of({"meta": {"task": 7}}) == "7"


def test_input_is_not_changed(folder):
    row = talk(turn("user", "Which colour?"), SAY, images=[str(folder / "a.png")], answer=3)
    before = json.dumps(row)
    read = read_records([row])
    assert json.dumps(row) == before
    assert read[0]["messages"][0]["content"] == "<image>Which colour?" and read[0]["answer"] == "3"
    assert read_records(read) == read


def test_asking_needs_no_answer(folder):
    file = folder / "ask.json"
    file.write_text(json.dumps([talk(ASK)]))
    assert len(read_records(file, answers=False)) == 1


def test_marks_go_to_the_first_question():
    record = good(images=["a", "b"], messages=[turn("system", "s"), turn("user", "q"), SAY, turn("user", "r"), SAY])
    assert [t["content"] for t in put_marks(record)["messages"]] == ["s", "<image><image>q", "red", "r", "red"]
    assert record["messages"][1]["content"] == "q"
    assert to_record("q", [Image.new("RGB", (2, 2))])["messages"][0]["content"] == "<image>q"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_way_of_holding_a_camera(tmp_path, orientation):
    right = Image.fromarray(np.kron([[10, 90, 170], [50, 130, 250]], np.ones((16, 16))).astype(np.uint8)).convert("RGB")
    undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # PIL's transpose that a viewer's turn undoes
    lying = right
    for step in undo.get(orientation, []):
        lying = lying.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(open_image(tmp_path / "x.png"), right)


MODES = [("1", (255,) * 3), ("L", (255,) * 3), ("P", None), ("RGBA", (255, 255, 255)), ("LA", (255, 255, 255)),
         ("CMYK", (255, 255, 255)), ("I;16", None), ("F", None), ("RGB", None), ("YCbCr", None)]


@pytest.mark.parametrize("mode, colour", MODES, ids=[mode for mode, _ in MODES])
def test_every_kind_of_pixels(mode, colour):
    start = {"1": 1, "L": 255, "RGBA": (9, 9, 9, 0), "LA": (9, 0), "CMYK": (0, 0, 0, 0)}.get(mode, 0)
    image = open_image(Image.new(mode, (3, 2), start))
    assert image.mode == "RGB" and image.size == (3, 2)
    assert colour is None or image.getpixel((0, 0)) == colour


@pytest.mark.parametrize("name", ["half.png", "half.jpg", "empty.png", "text.png", "flip.png", "bomb.png"])
def test_damaged_picture_names_its_file(folder, name):
    with pytest.raises(ValueError, match=name):
        open_image(folder / name)


OBJECTS = [
    ("fine", [{"label": "kylix", "bbox": [0, 0, 8, 6]}], None), ("none", [], None), ("null", None, None),
    ("one pixel too far right", [{"label": "a", "bbox": [0, 0, 9, 6]}], "box outside the picture"),
    ("one pixel too far down", [{"label": "a", "bbox": [0, 0, 8, 7]}], "box outside the picture"),
    ("left of the picture", [{"label": "a", "bbox": [-1, 0, 8, 6]}], "box outside the picture"),
    ("corners swapped", [{"label": "a", "bbox": [8, 0, 0, 6]}], "bad object"), ("no area", [{"label": "a", "bbox": [3, 3, 3, 5]}], "bad object"),
    ("three numbers", [{"label": "a", "bbox": [0, 0, 8]}], "bad object"), ("text numbers", [{"label": "a", "bbox": ["0", "0", "8", "6"]}], "bad object"),
    ("not a number", [{"label": "a", "bbox": [0, 0, float("nan"), 6]}], "bad object"), ("no label", [{"bbox": [0, 0, 8, 6]}], "bad object"),
    ("no box", [{"label": "a"}], "bad object"), ("a bare box", [[0, 0, 8, 6]], "bad object"), ("text", "a", "bad object"),
    ("endless", [{"label": "a", "bbox": [0, 0, float("inf"), 6]}], "box outside the picture"),
    ("on the larger second picture", [{"label": "a", "bbox": [0, 0, 20, 20], "image_id": 1}], None),
    ("too large for the second picture", [{"label": "a", "bbox": [0, 0, 21, 20], "image_id": 1}], "box outside the picture"),
    ("too large for the first picture", [{"label": "a", "bbox": [0, 0, 20, 20], "image_id": 0}], "box outside the picture"),
    *((f"picture {n!r} of 2", [{"label": "a", "bbox": [0, 0, 8, 6], "image_id": n}], "bad object") for n in (2, -1, None, "1", [1], True, 0.0)),
]


@pytest.mark.parametrize("name, objects, reason", OBJECTS, ids=[name for name, *_ in OBJECTS])
def test_objects(name, objects, reason):
    record = good(images=[Image.new("RGB", (8, 6)), Image.new("RGB", (20, 20))], messages=[turn("user", "Where?"), SAY], objects=objects)
    assert list(check_records([record]).counts) == ([reason] if reason else [])
    assert len(read_records([record])) == 1  # boxes do not stop a reading


def test_report_counts_each_record_once_per_reason():
    bad = {"label": "a", "bbox": [0, 0, 99, 99]}
    rows = [good(images=[Image.new("RGB", (8, 6))], objects=[bad, bad], id="x") for _ in range(3)] + ["vase"]
    report = check_records(rows)
    assert report.counts == {"box outside the picture": 3, "id used twice": 2, "not a record": 1}
    assert report.bad == [1, 2, 3, 4] and report.total == 4
    assert "4 records, 4 with problems" in repr(report) and all(REMEDIES[r] in repr(report) for r in report.counts)

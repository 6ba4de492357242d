"""Every trainer's format: round trips, odd files with one reason each, pictures, and what the real peers read."""
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmcourse import trainers
from vlmcourse.answers import Parsed
from vlmcourse.boxes import FAMILIES, from_model_box, read_objects
from vlmcourse.core import file_hash, read_json, read_jsonl, write_json, write_jsonl
from vlmcourse.formats import open_image, read_records, to_record
from vlmcourse.museum import make_records
from vlmcourse.trainers import (BOX, FORMATS, KINDS, REF, ROW_REMEDIES, RowError, convert, fill_objects, kind_of,
                                load_trl, lost_parts, mark_objects, mixed_columns, read_dataset, write_dataset)

PEERS = Path(__file__).parent / "fixtures" / "peers"
ALL = [(format, kind) for format, entry in FORMATS.items() for kind in entry.kinds]


def filled(value):
    return value not in (None, "", [], {})


def body(record, without=()):
    "Everything but file names and empty fields, as JSON has it."
    kept = {k: v for k, v in record.items() if k not in ("images", *without) and filled(v)}
    return json.loads(json.dumps(kept))


# --- the round trip -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def museum(tmp_path_factory):
    "Two hundred records of mixed tasks in a folder, one and several pictures, a system turn in every seventh."
    folder = tmp_path_factory.mktemp("museum")
    made = make_records(200, seed=11, size=32)
    for i, record in enumerate(made):
        record["meta"] = {"task": record["meta"]["task"]}
        if i % 7 == 0:
            record["messages"].insert(0, {"role": "system", "content": "Answer briefly."})
        if i % 5 == 0:
            record["note"] = f"shelf {i}"
    done = write_dataset(made, folder, format="records", name="museum")
    return folder, read_records(done["file"])


def of_kind(records, kind):
    asked = [{**r, "messages": r["messages"][:-1]} for r in records]
    return {"sft": records, "grpo": asked,
            "pair": [{**r, "chosen": f"{r['answer']}!", "rejected": "nothing"} for r in asked],
            "kto": [{**r, "kto_tag": i % 3 == 0} for i, r in enumerate(records)]}[kind]


def test_swift_is_seen_in_any_row(tmp_path):
    "The two lines of FORMATS.md: a plain row of ms-swift looks like a record of ours."
    Image.new("RGB", (60, 60)).save(tmp_path/"a.png")
    image, ask = str(tmp_path/"a.png"), lambda text: dict(role="user", content=text)
    plain = dict(messages=[ask("<image>Which shape is red?"), dict(role="assistant", content="The cube is red.")], images=[image])
    boxes = dict(messages=[ask("<image>Find the <ref-object>."), dict(role="assistant", content="<bbox>")], images=[image],
                 objects=dict(ref=["red cube"], bbox=[[10, 15, 30, 40]]))
    def read(*rows):
        file = tmp_path/"rows.jsonl"
        file.write_text("".join(json.dumps(row)+"\n" for row in rows))
        return read_dataset(file)
    assert read(plain, boxes)[1]["objects"] == [dict(label="red cube", bbox=[10, 15, 30, 40])]
    assert kind_of(read(plain, {**plain, "rejected_response": "The ball."})[1]) == "pair"
    for column in ("rejected_images", "rejected_messages"):
        with pytest.raises(ValueError, match=f"as swift.*{column} has no place"): read(plain, {**plain, column: [image]})
    own = {**plain, "messages": plain["messages"][:1], "chosen": "red", "rejected": "blue", "rejected_images": [image]}
    assert read(own)[0]["rejected"] == "blue"
    for format in ("records", "trl", "swift"):      # their pictures are not copied, so nothing may name them
        done = write_dataset([own], tmp_path/format, format=format)
        assert done["lost"].get("rejected_images") == 1 and "rejected_images" not in open(done["file"]).read()


@pytest.mark.parametrize("format, kind", ALL)
def test_200_records_survive(museum, format, kind):
    folder, base = museum
    records = of_kind(base, kind)
    done = write_dataset(records, folder, format=format, name=f"{format}-{kind}")
    assert (done["records"], done["kind"], done["pictures"]) == (200, kind, {"kept": sum(len(r["images"]) for r in base)})
    back = read_dataset(done["file"])           # the format is recognised
    lost = [lost_parts(r, format) for r in records]
    assert done["lost"] == {part: sum(part in parts for parts in lost) for part in {p for ps in lost for p in ps}}
    assert len(back) == 200
    for old, new, gone in zip(records, back, lost):
        assert new["images"] == old["images"]   # the very same files
        old = {**old, "messages": [t for t in old["messages"] if t["role"] != "system" or "system turn" not in gone]}
        made_up = ["id"] if "id" in gone else []
        assert body(new, made_up) == body(old, gone)
        assert kind_of(new) == kind


def test_losses_are_the_stated_ones(museum):
    _, base = museum
    assert sum(r["messages"][0]["role"] == "system" for r in base) == 29
    want = {"llamafactory": ["answer", "answer_type", "id", "meta", "note", "objects"],
            "swift": ["answer", "answer_type", "id", "meta", "note"],
            "internvl": ["answer", "answer_type", "meta", "note", "objects"],
            "qwen": ["answer", "answer_type", "meta", "note", "objects", "system turn"]}
    for format in FORMATS:
        found = sorted({part for record in base for part in lost_parts(record, format)})
        assert found == want.get(format, []), format
    grpo = of_kind(base, "grpo")
    assert {part for record in grpo for part in lost_parts(record, "swift")} == set()


def test_empty_fields_are_no_loss():
    record = to_record("Hi?", answer="Hello", id="a", meta={}, objects=[], answer_type=None)
    assert lost_parts(record, "qwen") == []


def test_pictures_in_memory_come_back_bit_for_bit(tmp_path):
    records = make_records(6, ["count", "like"], seed=2, size=40)
    for format in FORMATS:
        back = read_dataset(write_dataset(records, tmp_path / format, format=format)["file"])
        assert [open_image(i).tobytes() for r in back for i in r["images"]] == [
            i.tobytes() for r in records for i in r["images"]]


def test_numbers_from_numpy(tmp_path):
    record = to_record("Find.", Image.new("RGB", (50, 50)), answer=REF + BOX, id="a", score=np.float32(.5),
                       objects=[{"bbox": [np.int64(1), np.float64(2), 30, 40], "label": "cup"}])
    for format in FORMATS:
        done = write_dataset([record], tmp_path, format=format, name=format, family="tiny")
        back = read_dataset(done["file"], family="tiny")[0]
        assert back["messages"] == record["messages"]
        assert np.abs(np.subtract(back["objects"][0]["bbox"], [1, 2, 30, 40])).max() < .3


def test_no_pictures_at_all(tmp_path):
    records = [to_record("What is a kylix?", answer="A cup.", id=str(i)) for i in range(2)]
    for format in FORMATS:
        done = write_dataset(records, tmp_path / format, format=format)
        assert [body(r, ["id"]) for r in read_dataset(done["file"])] == [body(r, ["id"]) for r in records], format


def test_a_conversation_of_two_rounds_with_a_late_picture(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
             {"role": "user", "content": "And <image> this?"}, {"role": "assistant", "content": "A vase."}]
    record = {"id": "1", "images": [str(tmp_path / "a.png")], "messages": turns}
    for format in FORMATS:
        done = write_dataset([record], tmp_path, format=format, name=format)
        assert read_dataset(done["file"])[0]["messages"] == turns, format
    assert read_jsonl(tmp_path / "internvl.jsonl")[0]["image"] == ["a.png"]     # a list, so no mark is put in front


# --- boxes in texts -----------------------------------------------------------------------------------------------

def grounded(n, size=96):
    records = make_records(n, ["detect"], seed=4, size=size)
    for record in records:
        record["meta"] = {"task": "detect"}
        record["messages"][-1]["content"] = (REF + BOX) * len(record["objects"])
        record["answer"] = "boxes"
    return records


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", FORMATS)
def test_boxes_survive(tmp_path, format, family):
    records = grounded(5)
    done = write_dataset(records, tmp_path, format=format, family=family)
    back = read_dataset(done["file"], family=family)
    exact = format in ("records", "swift") or format.startswith("trl")
    assert ("exact boxes" in done["lost"]) is not exact and "placeholders" not in done["lost"]
    for old, new in zip(records, back):
        assert new["messages"] == old["messages"]
        assert [o["label"] for o in new["objects"]] == [o["label"] for o in old["objects"]]
        wide = from_model_box([0, 0, 1, 1], (96, 96), family)[2]        # px of one step of the family
        for a, b in zip(old["objects"], new["objects"]):
            off = max(abs(p - q) for p, q in zip(a["bbox"], b["bbox"]))
            assert off == 0 if exact else off <= wide / 2 + 1e-9


def test_every_family_writes_its_own_numbers(tmp_path):
    vase = {"id": "1", "images": [Image.new("RGB", (640, 480))], "objects": [{"bbox": [100, 150, 300, 400], "label": "red cube"}],
            "messages": [{"role": "user", "content": "<image>Where?"}, {"role": "assistant", "content": REF + BOX}]}
    want = {"qwen2.5-vl": '[{"bbox_2d": [101, 149, 302, 397], "label": "red cube"}]',       # FORMATS.md, section 9
            "qwen2-vl": '[{"bbox_2d": [156, 312, 469, 833], "label": "red cube"}]',
            "internvl": "<ref>red cube</ref><box>[[156, 312, 469, 833]]</box>"}
    for family, text in want.items():
        done = write_dataset([vase], tmp_path, format="qwen", name=family, family=family)
        assert read_json(done["file"])[0]["conversations"][1]["value"] == text


def test_placeholders_in_sentences():
    record = {"images": [], "objects": [{"bbox": [1, 2, 30, 40], "label": "cup"}, {"bbox": [5, 6, 70, 80], "label": "jug"}],
              "messages": [{"role": "user", "content": "Is the <ref-object> left of the <ref-object>?"},
                           {"role": "assistant", "content": "Yes: <bbox> and <bbox>."}]}
    said = [t["content"] for t in fill_objects(record, (1000, 1000), family="qwen3-vl")["messages"]]
    assert said == ["Is the cup left of the jug?", "Yes: [1, 2, 30, 40] and [5, 6, 70, 80]."]
    assert record["messages"][1]["content"] == "Yes: <bbox> and <bbox>."       # the original is untouched


def test_placeholders_in_sentences_are_reported(tmp_path):
    record = to_record("Find the <ref-object>.", Image.new("RGB", (50, 50)), answer="Here: <bbox>", id="a",
                       objects=[{"bbox": [1, 2, 30, 40], "label": "cup", "colour": "red"}])
    lost = {f: write_dataset([record], tmp_path, format=f, name=f, family="qwen3-vl")["lost"] for f in FORMATS}
    assert lost["swift"] == {"id": 1, "objects.colour": 1} and lost["records"] == {}
    assert lost["trl"] == {"placeholders": 1} and lost["qwen"] == {"objects": 1, "placeholders": 1}
    whole = {**record, "messages": [{"role": "user", "content": "<image>Find."}, {"role": "assistant", "content": REF + BOX}]}
    done = write_dataset([whole], tmp_path, format="internvl", name="whole", family="internvl")
    assert done["lost"] == {"exact boxes": 1, "objects.colour": 1}


def test_placeholders_in_pairs_count_from_the_question():
    record = {"images": [], "objects": [{"bbox": [1, 2, 30, 40], "label": "cup"}, {"bbox": [5, 6, 70, 80], "label": "jug"}],
              "messages": [{"role": "user", "content": "Where is the <ref-object>? <bbox> is the table."}],
              "chosen": "At <bbox>.", "rejected": "Not at <bbox>."}
    said = fill_objects(record, (1000, 1000), family="tiny")
    assert "[0, 0, 3, 4] is" in said["messages"][0]["content"]
    assert said["chosen"][3:-1] == said["rejected"][7:-1] == "[0, 1, 7, 8]"


def test_a_text_with_more_than_its_objects_stays(tmp_path):
    record = {"images": [], "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content":
              'Here: [{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]'}]}
    for family in FAMILIES:
        assert mark_objects(record, (1000, 1000), family=family) == record


BAD_BOXES = [
    ("no objects", [], REF + BOX, "objects and placeholders differ"),
    ("two boxes, one object", [{"bbox": [1, 2, 3, 4], "label": "a"}], BOX + BOX, "objects and placeholders differ"),
    ("no label", [{"bbox": [1, 2, 3, 4]}], REF + BOX, "objects and placeholders differ"),
    ("outside of the picture", [{"bbox": [60, 60, 70, 70], "label": "a"}], REF + BOX, "bad object"),
    ("width instead of right edge", [{"bbox": [30, 30, 10, 10], "label": "a"}], REF + BOX, "bad object"),
    ("three numbers", [{"bbox": [1, 2, 3], "label": "a"}], REF + BOX, "bad object"),
    ("text in the box", [{"bbox": ["1", 2, 3, 4], "label": "a"}], REF + BOX, "bad object"),
    ("true in the box", [{"bbox": [True, 2, 3, 4], "label": "a"}], REF + BOX, "bad object"),
    ("picture 2 of 1", [{"bbox": [1, 2, 3, 4], "label": "a", "image_id": 1}], REF + BOX, "bad object"),
    ("objects is a dict", {"ref": ["a"]}, "x", "bad object"),
]


@pytest.mark.parametrize("what, objects, answer, reason", BAD_BOXES, ids=[b[0] for b in BAD_BOXES])
def test_bad_boxes(tmp_path, what, objects, answer, reason):
    record = to_record("Find.", Image.new("RGB", (50, 50)), answer=answer, objects=objects)
    with pytest.raises(ValueError, match=f"1 x {reason}: record 1"):
        write_dataset([record], tmp_path / "out", format="qwen", family="qwen2.5-vl")
    assert not (tmp_path / "out").exists()


def test_a_quote_in_a_label_would_break_swifts_json(tmp_path):
    record = to_record("Find.", Image.new("RGB", (50, 50)), answer=REF + BOX, objects=[{"bbox": [1, 2, 30, 40], "label": 'a "b"'}])
    with pytest.raises(ValueError, match="bad object: record 1 .ms-swift would put the label"):
        write_dataset([record], tmp_path, format="swift", family="qwen2.5-vl")
    done = write_dataset([record], tmp_path, format="qwen", family="qwen2.5-vl")    # json.dumps escapes it
    assert read_dataset(done["file"], family="qwen2.5-vl")[0]["objects"][0]["label"] == 'a "b"'


def test_fractions_become_pixels(tmp_path):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    Image.new("RGB", (100, 50)).save(tmp_path / "b.png")
    row = {"messages": [{"role": "user", "content": "<image><image>Find."}, {"role": "assistant", "content": BOX + BOX}],
           "images": ["a.png", "b.png"], "objects": {"ref": [], "bbox": [[.25, .5, .5, 1], [.1, .2, .3, .4]],
                                                    "bbox_type": "norm1", "image_id": [0, 1]}}
    write_jsonl(tmp_path / "x.jsonl", [row])
    (record,) = read_dataset(tmp_path / "x.jsonl")
    assert [o["bbox"] for o in record["objects"]] == [[160, 240, 320, 480], [10, 10, 30, 20]]
    assert "bbox_type" not in record and record["objects"][1]["image_id"] == 1
    done = write_dataset([record], tmp_path, format="swift", name="again")
    assert read_jsonl(done["file"])[0]["objects"] == {"ref": [], "bbox": [[160, 240, 320, 480], [10, 10, 30, 20]], "image_id": [0, 1]}


# --- odd rows: what stands in the file, and the only reason that may be given for it ------------------------------

HI, YES = {"role": "user", "content": "<image>Hi"}, {"role": "assistant", "content": "yes"}
ASK, SAY = {"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "yes"}
PART = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
TEXT = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
LF = {"conversations": [ASK, SAY], "images": ["a.png"]}
SWIFT = {"messages": [HI, YES], "images": ["a.png"]}
TRL = {"images": ["a.png"], "prompt": [PART], "completion": [TEXT]}
ONE = {"image": "a.png", "conversations": [ASK, SAY]}
OBJ = {"ref": ["cup"], "bbox": [[1, 2, 3, 4]]}
ROWS = [
    ("llamafactory", "fine", LF, None),
    ("llamafactory", "openai names", SWIFT, None),
    ("llamafactory", "system column", {**LF, "system": "Be brief."}, None),
    ("llamafactory", "extra column", {**LF, "source": "web"}, None),
    ("llamafactory", "gpt first", {**LF, "conversations": [SAY, ASK]}, "bad messages"),
    ("llamafactory", "human twice", {**LF, "conversations": [ASK, ASK, SAY]}, "bad messages"),
    ("llamafactory", "unknown role", {**LF, "conversations": [{"from": "user", "value": "x"}, SAY]}, "bad messages"),
    ("llamafactory", "tool turn", {**LF, "conversations": [ASK, {"from": "observation", "value": "x"}]}, "bad messages"),
    ("llamafactory", "no conversations", {"images": ["a.png"]}, "bad messages"),
    ("llamafactory", "conversations is text", {**LF, "conversations": "Hi"}, "bad messages"),
    ("llamafactory", "turn is text", {**LF, "conversations": ["Hi"]}, "bad messages"),
    ("llamafactory", "value is a number", {**LF, "conversations": [ASK, {"from": "gpt", "value": 3}]}, "bad messages"),
    ("llamafactory", "from is a list", {**LF, "conversations": [{"from": [], "value": "x"}]}, "bad messages"),
    ("llamafactory", "no answer", {**LF, "conversations": [ASK]}, "no answer"),
    ("llamafactory", "empty answer", {**LF, "conversations": [ASK, {"from": "gpt", "value": " "}], "kto_tag": True}, "no answer"),
    ("llamafactory", "a mark too many", {**LF, "images": []}, "marks and pictures differ"),
    ("llamafactory", "no mark", {**LF, "conversations": [{"from": "human", "value": "Hi"}, SAY]}, "marks and pictures differ"),
    ("llamafactory", "system is a number", {**LF, "system": 3}, "bad messages"),
    ("llamafactory", "kto tag is text", {**LF, "kto_tag": "true"}, "bad label"),
    ("llamafactory", "chosen is text", {"conversations": [ASK], "images": ["a.png"], "chosen": "a", "rejected": SAY}, "bad messages"),
    ("llamafactory", "rejected missing", {"conversations": [ASK], "images": ["a.png"], "chosen": SAY}, "bad pair"),
    ("llamafactory", "both the same", {"conversations": [ASK], "images": ["a.png"], "chosen": SAY, "rejected": SAY}, "bad pair"),
    ("llamafactory", "pair with an answer", {**LF, "chosen": SAY, "rejected": {"from": "gpt", "value": "no"}}, "bad pair"),
    ("llamafactory", "mark in chosen", {"conversations": [ASK], "images": ["a.png"], "rejected": SAY,
                                        "chosen": {"from": "gpt", "value": "<image>"}}, "mark in an answer"),
    ("llamafactory", "a film", {**LF, "videos": ["a.mp4"]}, "not a picture row"),
    ("llamafactory", "text instead of a row", "Hi", "not a record"),
    ("llamafactory", "null instead of a row", None, "not a record"),
    ("llamafactory", "images is a number", {**LF, "images": 3}, "bad picture entry"),
    ("llamafactory", "picture from the web", {**LF, "images": ["https://a.org/a.png"]}, "picture is a web address"),
    ("llamafactory", "picture outside", {**LF, "images": ["../a.png"]}, "picture outside the folder"),
    ("llamafactory", "picture missing", {**LF, "images": ["b.png"]}, "picture not found"),
    ("llamafactory", "picture cut off", {**LF, "images": ["cut.png"]}, "picture is damaged"),
    ("swift", "fine", SWIFT, None),
    ("swift", "one picture as text", {**SWIFT, "images": "a.png"}, None),
    ("swift", "picture as a dict", {**SWIFT, "images": [{"path": "a.png", "bytes": None}]}, None),
    ("swift", "no mark", {**SWIFT, "messages": [{"role": "user", "content": "Hi"}, YES]}, None),
    ("swift", "boxes", {**SWIFT, "objects": OBJ}, None),
    ("swift", "fewer names than boxes", {**SWIFT, "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}}, None),
    ("swift", "rejected as a turn", {**SWIFT, "rejected_response": [{"role": "assistant", "content": "no"}]}, None),
    ("swift", "query and solution", {"query": "Hi", "solution": "yes"}, "not this format"),
    ("swift", "unknown role", {**SWIFT, "messages": [{"role": "tool", "content": "x"}]}, "bad messages"),
    ("swift", "messages is null", {"messages": None, "images": []}, "not this format"),
    ("swift", "label is 1", {**SWIFT, "label": 1}, "bad label"),
    ("swift", "rejected equals chosen", {**SWIFT, "rejected_response": "yes"}, "bad pair"),
    ("swift", "rejected is a number", {**SWIFT, "rejected_response": 3}, "bad messages"),
    ("swift", "rejected without chosen", {"messages": [HI], "images": ["a.png"], "rejected_response": "no"}, "bad pair"),
    ("swift", "rejected pictures", {**SWIFT, "rejected_images": ["b.png"]}, "bad pair"),
    ("swift", "only an answer", {"messages": [YES], "rejected_response": "no"}, "bad messages"),
    ("swift", "a point", {**SWIFT, "objects": {"ref": ["cup"], "bbox": [[1, 2]]}}, "bad object"),
    ("swift", "more names than boxes", {**SWIFT, "objects": {"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]]}}, "bad object"),
    ("swift", "objects is a list", {**SWIFT, "objects": [1]}, "bad object"),
    ("swift", "bbox is a number", {**SWIFT, "objects": {"bbox": 3}}, "bad object"),
    ("swift", "image_id is text", {**SWIFT, "objects": {**OBJ, "image_id": ["x"]}}, "bad object"),
    ("swift", "image_id too high", {**SWIFT, "objects": {**OBJ, "image_id": [1]}}, "bad object"),
    ("swift", "picture as base64", {**SWIFT, "images": ["iVBORw0KGgo" * 400]}, "picture not found"),
    ("swift", "picture as bytes", {**SWIFT, "images": [{"path": None, "bytes": "x"}]}, "bad picture entry"),
    ("trl", "fine", TRL, None),
    ("trl", "plain texts", {"images": ["a.png"], "prompt": [{"role": "user", "content": "Hi"}], "completion": [YES]}, None),
    ("trl", "nulls from Arrow", {**TRL, "prompt": [{"role": "user", "content": [{"type": "image", "text": None},
                                {"type": "text", "text": "Hi"}]}], "label": None}, None),
    ("trl", "mark in a text", {"images": ["a.png"], "prompt": [HI], "completion": [YES]}, "mark in plain text"),
    ("trl", "mark in a part", {**TRL, "prompt": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}]}, "mark in plain text"),
    ("trl", "no picture part", {**TRL, "prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "marks and pictures differ"),
    ("trl", "prompt is text", {**TRL, "prompt": "Hi"}, "bad messages"),
    ("trl", "content is null", {**TRL, "prompt": [{"role": "user", "content": None}]}, "bad messages"),
    ("trl", "part is text", {**TRL, "prompt": [{"role": "user", "content": ["Hi"]}]}, "bad messages"),
    ("trl", "part of another sort", {**TRL, "prompt": [{"role": "user", "content": [{"type": "video"}]}]}, "bad messages"),
    ("trl", "completion is text", {**TRL, "completion": "yes"}, "bad messages"),
    ("trl", "completion by the user", {**TRL, "completion": [PART]}, "bad messages"),
    ("trl", "label is text", {**TRL, "label": "good"}, "bad label"),
    ("trl", "chosen has two turns", {"images": ["a.png"], "prompt": [PART], "chosen": [TEXT, TEXT], "rejected": [TEXT]}, "bad pair"),
    ("trl", "chosen by the user", {"images": ["a.png"], "prompt": [PART], "chosen": [PART], "rejected": [TEXT]}, "bad pair"),
    ("trl", "chosen without prompt", {"images": ["a.png"], "chosen": [PART, TEXT], "rejected": [PART, TEXT]}, "bad messages"),
    ("internvl", "fine", ONE, None),
    ("internvl", "no mark", {**ONE, "conversations": [{"from": "human", "value": "Hi"}, SAY]}, None),
    ("internvl", "width and height", {**ONE, "width": 8, "height": 8}, None),
    ("internvl", "flat pair", {"image": "a.png", "question": "Hi", "chosen": "yes", "rejected": "no"}, None),
    ("internvl", "two pictures, no mark", {"image": ["a.png", "a.png"], "conversations": [{"from": "human", "value": "Hi"}, SAY]},
     "marks and pictures differ"),
    ("internvl", "mark in the second turn", {**ONE, "conversations": [{"from": "human", "value": "Hi"}, SAY, ASK, SAY]},
     "marks and pictures differ"),
    ("internvl", "system turn, picture as text", {**ONE, "conversations": [{"from": "system", "value": "x"}, ASK, SAY]}, "bad messages"),
    ("internvl", "question is a number", {"image": "a.png", "question": 3, "chosen": "yes", "rejected": "no"}, "bad messages"),
    ("internvl", "chosen is a dict", {"image": "a.png", "question": "Hi", "chosen": SAY, "rejected": "no"}, "bad pair"),
    ("internvl", "empty picture name", {**ONE, "image": ""}, "bad picture entry"),
    ("internvl", "a film", {"video": "a.mp4", "conversations": [ASK, SAY]}, "not a picture row"),
    ("qwen", "fine", ONE, None),
    ("qwen", "flat pair of 2U1", {"image": "a.png", "prompt": "<image>Hi", "chosen": "yes", "rejected": "no"}, None),
    ("qwen", "no mark", {**ONE, "conversations": [{"from": "human", "value": "Hi"}, SAY]}, "marks and pictures differ"),
    ("qwen", "images as in the README", {"images": ["a.png"], "conversations": [ASK, SAY]}, "not this format"),
    ("qwen", "system turn", {**ONE, "conversations": [{"from": "system", "value": "x"}, ASK, SAY]}, "bad messages"),
    ("qwen", "packed row", [ONE, ONE], "not a record"),
    ("qwen", "mark in the answer", {**ONE, "conversations": [ASK, {"from": "gpt", "value": "<image>"}]}, "mark in an answer"),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf") / "data"
    folder.mkdir()
    picture = Image.effect_noise((40, 40), 60).convert("RGB")
    for name in ("a.png", "cut.png", "../a.png"):
        picture.save(folder / name)
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:900])
    return folder


@pytest.mark.parametrize("format, what, row, reason", ROWS, ids=[f"{r[0]}-{r[1]}" for r in ROWS])
def test_odd_rows(shelf, format, what, row, reason):
    good = {"llamafactory": LF, "swift": SWIFT, "trl": TRL, "internvl": ONE, "qwen": ONE}[format]
    file = shelf / f"odd{FORMATS[format].suffix}"
    (write_json if file.suffix == ".json" else write_jsonl)(file, [good, row, good])
    if reason is None:
        assert len(read_dataset(file, format=format)) == 3
        return
    with pytest.raises(ValueError) as caught:
        read_dataset(file, format=format)
    said = str(caught.value)
    assert f"1 of 3 rows cannot be used, so none was taken. 1 x {reason}: row 2 (" in said
    assert ROW_REMEDIES[reason] in said and type(caught.value) is ValueError


def test_there_are_enough_odd_rows():
    assert len(ROWS) >= 80 and sum(r[3] is not None for r in ROWS) >= 60
    assert len({r[3] for r in ROWS}) >= 14


def test_all_mistakes_are_reported_together(shelf):
    bad = [row for format, _, row, reason in ROWS if format == "llamafactory" and reason]
    write_json(shelf / "many.json", [LF, *bad])
    with pytest.raises(ValueError) as caught:
        read_dataset(shelf / "many.json")
    assert f"{len(bad)} of {len(bad) + 1} rows" in str(caught.value)
    for reason in {r[3] for r in ROWS if r[0] == "llamafactory" and r[3]}:
        assert f" x {reason}: row" in str(caught.value)


# --- odd files and registers --------------------------------------------------------------------------------------

QUOTES = '[\n {"image": "a.png", "conversations": []},\n {"value": "{\\n"bbox_2d": [135, 114, 1016, 672]\\n}"}\n]'
FILES = [
    ("quotes not escaped, as in Qwen's README", "x.json", QUOTES, "line 3, column 17.*It is row 2. A quote"),
    ("comma missing", "x.json", "[{} {}]", "It is row 2"),
    ("cut off", "x.json", '[{"a": 1}, {"a', "It is row 2"),
    ("lines in a .json file", "x.json", '{"a": 1}\n{"a": 2}', "not valid JSON: line 2"),
    ("a list in a .jsonl file", "x.jsonl", "[\n{}\n]", "name it .json"),
    ("a line cut off", "x.jsonl", '{"a": 1}\n{"a', "line 2, column"),
    ("empty", "x.json", "", "is empty"),
    ("empty list", "x.json", "[]", "holds no list of rows"),
    ("a text", "x.json", '"vase"', "holds no list of rows"),
    ("null", "x.json", "null", "holds no list of rows"),
    ("an object", "x.json", '{"a": 1}', "holds one object"),
    ("numbers", "x.json", "[1, 2]", "no format is recognised.*no objects"),
    ("empty objects", "x.json", "[{}, {}]", "no format is recognised.*nothing"),
    ("alpaca", "x.json", '[{"instruction": "Hi", "output": "yes"}]', "instruction, output.*say so: format="),
    ("not UTF-8", "x.json", b"[\xff\xfe]", "not UTF-8"),
    ("deep nesting", "x.json", "[" * 100_000, "not valid JSON"),
    ("another ending", "x.csv", "a,b", "must end in .json"),
    ("a register of nothing", "x.json", "{}", "holds one object"),
    ("register: alpaca", "x.json", '{"s": {"file_name": "a.json"}}', "formatting='alpaca'"),
    ("register: outside", "x.json", '{"s": {"file_name": "../a.json", "formatting": "sharegpt"}}', "leads out of the folder"),
    ("register: no ranking", "x.json", '{"s": {"file_name": "a.json", "formatting": "sharegpt", "columns": {"chosen": "c"}}}', "ranking"),
    ("register: columns is a list", "x.json", '{"s": {"file_name": "a.json", "formatting": "sharegpt", "columns": [1]}}', "must be objects"),
    ("register: two sets", "x.json", '{"s": {"file_name": "a.json"}, "t": {"file_name": "b.json"}}', "registers s, t.*name=None"),
    ("register: file missing", "x.json", '{"s": {"file_name": "a.json", "formatting": "sharegpt"}}', "There is no file"),
    ("meta: not jsonl", "x.json", '{"s": {"annotation": "a.json"}}', "must end in .jsonl"),
    ("meta: repeat_time 1.5", "x.json", '{"s": {"annotation": "a.jsonl", "repeat_time": 1.5}}', "repeat_time=1.5"),
    ("meta: repeat_time text", "x.json", '{"s": {"annotation": "a.jsonl", "repeat_time": "2"}}', "repeat_time='2'"),
    ("meta: repeat_time 0", "x.json", '{"s": {"annotation": "a.jsonl", "repeat_time": 0}}', "repeat_time=0"),
    ("meta: outside", "x.json", '{"s": {"annotation": "/etc/passwd.jsonl"}}', "is not inside of"),
    ("meta: missing", "x.json", '{"s": {"annotation": "none.jsonl"}}', "is not inside of"),
    ("meta: wrong length", "x.json", '{"s": {"annotation": "good.jsonl", "length": 3}}', "length=3, but good.jsonl has 1 rows"),
    ("meta: root outside", "x.json", '{"s": {"annotation": "good.jsonl", "root": "/"}}', "root='/' is not inside"),
]


@pytest.mark.parametrize("what, name, text, message", FILES, ids=[f[0] for f in FILES])
def test_odd_files(tmp_path, what, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    write_jsonl(tmp_path / "good.jsonl", [{"conversations": [{"from": "human", "value": "Hi"}, SAY]}])
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}") as caught:
        read_dataset(tmp_path / name)
    assert type(caught.value) in (ValueError, FileNotFoundError)


def test_a_folder_names_its_files(tmp_path):
    write_json(tmp_path / "train.json", [LF])
    with pytest.raises(ValueError, match="is a folder.*train.json"):
        read_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_dataset(tmp_path / "none.json")


def test_the_register_decides_the_names(shelf):
    rows = [{"talk": [{"who": "visitor", "says": "<image>Hi"}], "pics": ["a.png"], "good": {"who": "guide", "says": "yes"},
             "bad": {"who": "guide", "says": "no"}}]
    write_json(shelf / "odd_names.json", rows)
    entry = {"file_name": "odd_names.json", "formatting": "sharegpt", "ranking": True,
             "columns": {"messages": "talk", "images": "pics", "chosen": "good", "rejected": "bad"},
             "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "visitor", "assistant_tag": "guide"}}
    write_json(shelf / "info.json", {"odd": entry, "other": {"file_name": "x.json"}})
    (record,) = read_dataset(shelf / "info.json", name="odd")
    assert (record["messages"], record["chosen"], record["rejected"]) == ([HI], "yes", "no")
    entry["columns"].pop("images")                          # LLaMA-Factory reads no pictures then
    write_json(shelf / "info.json", {"odd": entry})
    with pytest.raises(ValueError, match="marks: 1, pictures: 0"):
        read_dataset(shelf / "info.json")


def test_nothing_of_the_users_is_replaced(tmp_path, museum):
    records = museum[1][:3]
    mine = {"train": {"file_name": "mine.json"}}
    write_json(tmp_path / "dataset_info.json", mine)
    write_json(tmp_path / "train_meta.json", mine)
    for format, contains in (("llamafactory", "dataset_info.json holds another"), ("internvl", "train_meta.json holds another")):
        with pytest.raises(FileExistsError, match=contains):
            write_dataset(records, tmp_path, format=format)
        with pytest.raises(ValueError, match="LLaMA-Factory's register"):
            write_dataset(records, tmp_path, format=format, name="dataset_info")
    assert {p.name for p in tmp_path.iterdir()} == {"dataset_info.json", "train_meta.json"}
    write_dataset(records, tmp_path, format="llamafactory", name="other")
    assert read_json(tmp_path / "dataset_info.json")["train"] == mine["train"] and read_json(tmp_path / "train_meta.json") == mine
    for odd in ([], ["train"], "train"):
        write_json(tmp_path / "dataset_info.json", odd)
        with pytest.raises(ValueError, match="is not a register"):
            write_dataset(records, tmp_path, format="llamafactory")
        assert read_json(tmp_path / "dataset_info.json") == odd


def test_registers_that_we_wrote(tmp_path, museum):
    _, base = museum
    for name, kind in (("a", "sft"), ("b", "pair")):
        write_dataset(of_kind(base[:3], kind), tmp_path / "lf", format="llamafactory", name=name)
        write_dataset(of_kind(base[:3], kind), tmp_path / "vl", format="internvl", name=name)
    info = read_json(tmp_path / "lf/dataset_info.json")
    assert list(info) == ["a", "b"] and info["b"]["ranking"] is True and "ranking" not in info["a"]
    assert [r["chosen"] for r in read_dataset(tmp_path / "lf/dataset_info.json", name="b")] == [f"{r['answer']}!" for r in base[:3]]
    assert read_json(tmp_path / "vl/a_meta.json")["a"]["length"] == 3
    assert len(read_dataset(tmp_path / "vl/a_meta.json")) == 3
    (tmp_path / "vl/b.jsonl").rename(tmp_path / "vl/b_old.jsonl")         # as the message advises; its entry stays
    write_dataset(of_kind(base[:2], "pair"), tmp_path / "vl", format="internvl", name="b")
    assert read_json(tmp_path / "vl/b_meta.json")["b"]["length"] == 2
    moved = shutil.move(tmp_path / "vl", tmp_path / "elsewhere")          # a relative register may move
    meta = read_json(f"{moved}/a_meta.json")
    meta["a"].update(root=".", annotation="a.jsonl")
    write_json(f"{moved}/a_meta.json", meta)
    assert len(read_dataset(f"{moved}/a_meta.json")) == 3


# --- what the writer refuses --------------------------------------------------------------------------------------

def test_arguments_are_checked(tmp_path):
    good = [to_record("Hi?", answer="yes")]
    for options, message in (({"format": "sharegpt"}, "format='sharegpt' is not known"),
                             ({"format": "trl", "name": "../x"}, "becomes the name of a file"),
                             ({"format": "trl", "name": ".x"}, "becomes the name of a file"),
                             ({"format": "trl", "family": "qwen"}, "family='qwen' is not known")):
        with pytest.raises(ValueError, match=message):
            write_dataset(good, tmp_path / "x", **options)
    with pytest.raises(ValueError, match="format='x' is not known"):
        read_dataset("none.json", format="x")
    with pytest.raises(ValueError, match="holds no records"):
        write_dataset([], tmp_path / "x", format="trl")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_kinds_without_rows(tmp_path, format, museum):
    _, base = museum
    for kind in set(KINDS) - set(FORMATS[format].kinds):
        with pytest.raises(ValueError, match=f"has no rows for {kind} records.*Formats with {kind} rows: records, trl"):
            write_dataset(of_kind(base[:2], kind), tmp_path / "x", format=format)
    with pytest.raises(ValueError, match="1 x sft .*1 x pair"):
        write_dataset([base[1], *of_kind(base[2:3], "pair")], tmp_path / "x", format=format)
    assert not (tmp_path / "x").exists()


UNFIT = [
    ("two questions in a flat pair", "internvl", {"messages": [HI, YES, {"role": "user", "content": "Sure?"}], "chosen": "a", "rejected": "b"},
     "no place for a conversation"),
    ("two questions in 2U1's pair", "qwen", {"messages": [HI, YES, {"role": "user", "content": "Sure?"}], "chosen": "a", "rejected": "b"},
     "no place for a conversation"),
    ("word <video>", "qwen", {"messages": [{"role": "user", "content": "<image>What is <video>?"}, YES]}, "mark of a video or sound"),
    ("word <audio>", "llamafactory", {"messages": [HI, {"role": "assistant", "content": "<audio>"}]}, "mark of a video or sound"),
    ("same answers", "swift", {"messages": [HI], "chosen": "a", "rejected": "a"}, "bad pair"),
    ("rejected missing", "trl", {"messages": [HI], "chosen": "a"}, "bad pair"),
    ("rejected is a list", "trl", {"messages": [HI], "chosen": "a", "rejected": ["b"]}, "bad pair"),
    ("tag is 1", "trl", {"messages": [HI, YES], "kto_tag": 1}, "bad label"),
    ("tag, but no answer", "trl", {"messages": [HI], "kto_tag": True}, "no answer"),
]


@pytest.mark.parametrize("what, format, fields, reason", UNFIT, ids=[u[0] for u in UNFIT])
def test_unfit_records(tmp_path, what, format, fields, reason):
    record = {"images": [Image.new("RGB", (8, 8))], **fields}
    with pytest.raises(ValueError, match=f"1 of 1 records cannot be used.*1 x {reason}: record 1"):
        write_dataset([record], tmp_path / "x", format=format)


def test_columns_with_a_meaning_of_their_own_are_not_overwritten(tmp_path):
    record = {**to_record("Hi?", answer="yes"), "label": "cup", "prompt": "x", "solution": "y", "completion": 3}
    done = write_dataset([record], tmp_path, format="trl")
    assert done["lost"] == {"label": 1, "prompt": 1, "completion": 1}          # outside GRPO, solution is a free column
    assert read_dataset(done["file"])[0]["solution"] == "y"
    done = write_dataset([{**to_record("Hi?"), "answer": "1", "solution": "2"}], tmp_path, format="trl", name="g")
    assert done["lost"] == {"solution": 1} and read_jsonl(done["file"])[0]["solution"] == "1"
    done = write_dataset([record], tmp_path, format="swift", name="s")
    assert not {"solution", "answer", "label"} & set(read_jsonl(done["file"])[0])   # the trap of ms-swift


def test_mixed_columns_stop_the_writer(tmp_path):
    rows = [{**to_record("Hi?", answer="yes"), "card": card} for card in ("007", 7)]
    for format in ("trl", "trl-messages"):
        with pytest.raises(ValueError, match="several sorts of values: card .number, text."):
            write_dataset(rows, tmp_path / "x", format=format)
    assert write_dataset(rows, tmp_path, format="swift")["lost"]["card"] == 2       # not written, so no harm
    assert mixed_columns([{"a": 1}, {"a": 2.5}, {"a": None}, {}]) == {}
    assert mixed_columns([{"a": np.float64(1)}, {"a": np.int64(2)}, {"a": 3}, {"b": np.zeros(2)}, {"b": [1]}]) == {}
    assert mixed_columns([{"a": True}, {"a": 1}]) == {"a": ["number", "true/false"]}
    assert mixed_columns([{"a": {"b": "x"}}, {"a": "x"}]) == {"a": ["object", "text"]}


# --- pictures -----------------------------------------------------------------------------------------------------

def one_picture(path, **fields):
    return to_record("Hi?", path, answer="yes", **fields)


def test_pictures_with_the_same_name(tmp_path):
    for i, folder in enumerate("abc"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (9, 9), (i * 50, 0, 0)).save(tmp_path / folder / "vase.png")
    before = {p: (file_hash(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*.png")}
    out = tmp_path / "out"
    done = write_dataset([one_picture(tmp_path / f / "vase.png") for f in "abcab"], out, format="trl")
    assert done["pictures"] == {"copied": 3} and len(list(out.rglob("*.png"))) == 3
    assert {p: (file_hash(p), p.stat().st_mtime_ns) for p in before} == before      # copied, never moved
    back = read_dataset(done["file"])
    assert [open_image(r["images"][0]).getpixel((0, 0))[0] for r in back] == [0, 50, 100, 0, 50]
    Image.new("RGB", (9, 9), "white").save(tmp_path / "a" / "vase.png")             # another picture, the same name again
    again = write_dataset([one_picture(tmp_path / "a/vase.png")], out, format="trl", name="val")
    assert open_image(read_dataset(again["file"])[0]["images"][0]).getpixel((0, 0)) == (255, 255, 255)
    assert [open_image(r["images"][0]).getpixel((0, 0))[0] for r in read_dataset(done["file"])] == [0, 50, 100, 0, 50]


def test_a_second_data_set_does_not_touch_the_first(tmp_path):
    records = make_records(3, ["count"], seed=1, size=24)
    write_dataset(records, tmp_path, format="qwen", name="a")
    hashes = {p.name: file_hash(p) for p in tmp_path.rglob("*.png")}
    write_dataset(make_records(3, ["count"], seed=2, size=24), tmp_path, format="swift", name="b")
    write_dataset(make_records(3, ["count"], seed=3, size=24), tmp_path, format="swift", name="a")   # same picture names
    assert {name: file_hash(tmp_path / "images" / name) for name in hashes} == hashes
    assert [open_image(r["images"][0]).tobytes() for r in read_dataset(tmp_path / "a.json")] == [
        r["images"][0].tobytes() for r in records]


def test_a_link_out_of_the_folder_is_copied(tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "far.png")
    os.symlink(tmp_path / "far.png", tmp_path / "out/near.png")
    done = write_dataset([one_picture(tmp_path / "out/near.png")], tmp_path / "out", format="swift")
    assert done["pictures"] == {"copied": 1} and read_jsonl(done["file"])[0]["images"] == ["images/near.png"]
    assert not (tmp_path / "out/images/near.png").is_symlink()


def test_lying_photos_are_turned(tmp_path):
    note = Image.Exif()
    note[0x0112] = 6
    lying = Image.new("RGB", (40, 20), "red")
    lying.paste((0, 0, 255), (0, 0, 20, 20))
    lying.save(tmp_path / "phone.jpg", exif=note, quality=95)
    before = file_hash(tmp_path / "phone.jpg")
    record = one_picture(tmp_path / "phone.jpg", objects=[{"bbox": [0, 0, 20, 20], "label": "vase"}])
    record["messages"][-1]["content"] = REF + BOX
    done = write_dataset([record], tmp_path, format="internvl", family="internvl")
    row = read_jsonl(done["file"])[0]
    assert done["pictures"] == {"turned": 1} and row["image"] == "images/phone.png"
    assert (row["width"], row["height"]) == Image.open(tmp_path / "images/phone.png").size == (20, 40)
    assert row["conversations"][1]["value"] == "<ref>vase</ref><box>[[0, 0, 1000, 500]]</box>"
    assert open_image(tmp_path / "images/phone.png").tobytes() == open_image(tmp_path / "phone.jpg").tobytes()
    assert file_hash(tmp_path / "phone.jpg") == before


def test_picture_modes(tmp_path):
    modes = {mode: Image.new(mode, (9, 9)) for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16", "LA")}
    done = write_dataset([one_picture(picture) for picture in modes.values()], tmp_path, format="llamafactory")
    assert done["pictures"] == {"saved": 7}
    for record, picture in zip(read_dataset(done["file"]), modes.values()):
        assert open_image(record["images"][0]).tobytes() == open_image(picture).tobytes()


def test_the_data_file_comes_last(tmp_path, monkeypatch):
    def stop(*args):
        raise OSError("disk full")
    monkeypatch.setattr(trainers, "write_jsonl", stop)
    records = make_records(2, ["count"], seed=1, size=24)
    with pytest.raises(OSError):
        write_dataset(records, tmp_path, format="internvl")
    assert not (tmp_path / "train.jsonl").exists() and not list(tmp_path.rglob(".tmp*"))
    monkeypatch.undo()
    done = write_dataset(records, tmp_path, format="internvl")                # a second try works and makes no copies
    assert len(list(tmp_path.rglob("*.png"))) == 2 and len(read_dataset(done["file"])) == 2
    with pytest.raises(FileExistsError, match="is there already"):
        write_dataset(records, tmp_path, format="internvl")


def test_media_dir(tmp_path):
    (tmp_path / "pictures").mkdir(), (tmp_path / "texts").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures/a.png")
    write_json(tmp_path / "texts/x.json", [LF])
    with pytest.raises(ValueError, match="picture not found"):
        read_dataset(tmp_path / "texts/x.json")
    assert read_dataset(tmp_path / "texts/x.json", media_dir=tmp_path / "pictures")[0]["images"] == [str(tmp_path / "pictures/a.png")]


def test_convert_says_what_happened(tmp_path):
    records = grounded(3)
    done = write_dataset(records, tmp_path / "a", format="qwen", family="qwen2.5-vl")
    said = convert(done["file"], tmp_path / "b", format="internvl", source_family="qwen2.5-vl", family="internvl")
    assert "3 sft records as internvl" in said and "Lost: 3 x exact boxes" in said and "--meta_path" in said
    answers = [row["conversations"][1]["value"] for row in read_jsonl(tmp_path / "b/train.jsonl")]
    for record, answer in zip(records, answers):
        value, problem = Parsed(*read_objects(answer, (96, 96), "internvl"))
        assert problem is None and [o["label"] for o in value] == [o["label"] for o in record["objects"]]
        off = max(abs(p - q) for a, b in zip(value, record["objects"]) for p, q in zip(a["bbox"], b["bbox"]))
        assert off <= 96 / 84 / 2 + 96 / 1000         # half a step of Qwen2.5-VL (84 px wide), and one of InternVL


def test_row_errors_are_value_errors():
    error = RowError("bad pair", "x")
    assert isinstance(error, ValueError) and (error.reason, error.detail) == ("bad pair", "x")


# --- the real peers -----------------------------------------------------------------------------------------------

def load_make():
    spec = importlib.util.spec_from_file_location("make", PEERS / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers(tmp_path_factory):
    make, folder = load_make(), tmp_path_factory.mktemp("peers")
    make.write(folder)
    return folder, make.records()


def test_the_peers_read_exactly_these_files(peers):
    folder, _ = peers
    stored = sorted(p.relative_to(PEERS) for format in ("llamafactory", "swift") for p in (PEERS / format).iterdir())
    assert len(stored) == 10
    for name in stored:                       # else: record again, as tests/fixtures/peers/README.md says
        assert (folder / name).read_bytes() == (PEERS / name).read_bytes(), name


def turns_of(record, *more):
    return [t for t in record["messages"] if t["role"] != "system"] + [{"role": "assistant", "content": m} for m in more]


def test_llamafactory_read_it(peers):
    folder, records = peers
    read = read_json(PEERS / "llamafactory_read.json")
    for kind in ("sft", "pair", "kto"):
        assert len(read[kind]) == len(records[kind])
        rows = read_json(folder / f"llamafactory/{kind}.json")
        for row, file_row, record in zip(read[kind], rows, records[kind]):
            if REF in record["messages"][-1]["content"]:
                record = fill_objects(record, (64, 64), family="qwen2.5-vl")
            said = row["_response"]
            if kind == "pair":
                want = turns_of(record, record["chosen"], record["rejected"])
            else:
                want = turns_of(record)
            if kind == "kto":                 # an empty turn stands where the other answer would be
                empty = said[1 if record["kto_tag"] else 0]
                assert empty["content"] == ""
                said = [t for t in said if t is not empty]
            assert row["_prompt"] + said == want
            assert row["_images"] == file_row["images"] and len(row["_images"]) == len(record["images"])
            system = record["messages"][0]
            assert row["_system"] == (system["content"] if system["role"] == "system" else "")


def test_llamafactory_empties_rows_that_we_refuse():
    read, rows = read_json(PEERS / "llamafactory_read.json")["traps"], read_json(PEERS / "llamafactory/traps.json")
    assert [bool(row["_prompt"]) for row in read] == [False, False, True]
    with pytest.raises(ValueError, match="2 of 3 rows.*1 x bad messages: row 1.*1 x no answer: row 2"):
        read_dataset(PEERS / "llamafactory/traps.json")
    assert rows[2]["conversations"][0]["value"] == "How many?"


def test_swift_read_it(peers):
    _, records = peers
    read = read_json(PEERS / "swift_read.json")["rows"]
    for kind, wanted in records.items():
        assert len(read[f"{kind}.jsonl"]) == len(wanted)
        for i, (row, record) in enumerate(zip(read[f"{kind}.jsonl"], wanted)):
            answers = [record["chosen"]] if kind == "pair" else []
            want = record["messages"] + [{"role": "assistant", "content": a} for a in answers]
            if REF not in want[-1]["content"]:
                assert row["messages"] == want
            several = len(record["images"]) > 1
            assert [p["path"] for p in row["images"]] == [
                f"images/{kind}-{i:05d}{f'-{j + 1}' if several else ''}.png" for j in range(len(record["images"]))]
            assert row.get("objects", {"bbox": []})["bbox"] == [o["bbox"] for o in record["objects"]]
            assert row.get("rejected_response") == record.get("rejected")
            assert row.get("label") == record.get("kto_tag")
            if kind == "grpo":                # all columns reach the reward functions
                assert row["solution"] == record["answer"]
                assert {k: row[k] for k in ("id", "answer_type", "meta")} == {k: record[k] for k in ("id", "answer_type", "meta")}
            else:
                assert not {"solution", "answer", "meta"} & set(row)


def test_swift_writes_the_boxes_as_we_do(peers):
    _, records = peers
    said = read_json(PEERS / "swift_read.json")["said"]
    assert sorted(said) == ["sft.jsonl 6", "sft.jsonl 7"]
    for key, by_family in said.items():
        record = records["sft"][int(key.split()[1])]
        for family, text in by_family.items():
            ours = fill_objects(record, (64, 64), family=family)["messages"][-1]["content"]
            if family == "internvl":          # ms-swift does not join neighbours with the same label
                assert read_objects(text, (64, 64), family) == read_objects(ours, (64, 64), family)
            else:
                assert text == ours


def test_swift_takes_solution_for_the_response():
    (row,) = read_json(PEERS / "swift_read.json")["rows"]["trap_solution.jsonl"]
    assert row["messages"][1] == {"role": "assistant", "content": "3"}
    with pytest.raises(ValueError, match="not this format.*query, solution"):
        read_dataset(PEERS / "swift/trap_solution.jsonl", format="swift")


# --- TRL itself ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trl_tables(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    records = load_make().records()
    records["sft"] = [r for r in records["sft"] if REF not in r["messages"][-1]["content"]]
    files = {kind: write_dataset(rows, folder, format="trl", name=kind)["file"] for kind, rows in records.items()}
    files["messages"] = write_dataset(records["sft"], folder, format="trl-messages", name="messages")["file"]
    return {name: load_trl(file) for name, file in files.items()}, records


def test_trl_takes_the_rows(trl_tables):
    from trl.data_utils import is_conversational, prepare_multimodal_messages
    tables, records = trl_tables
    for name, table in tables.items():
        for row, record in zip(table, records["sft" if name == "messages" else name]):
            assert is_conversational(row)
            found = prepare_multimodal_messages(row["messages" if name == "messages" else "prompt"], row["images"])
            pictures = [p["image"] for t in found for p in t["content"] if p["type"] == "image"]
            assert [p.tobytes() for p in pictures] == [i.tobytes() for i in record["images"]]
    assert tables["kto"]["label"] == [i % 2 == 0 for i in range(6)]
    assert tables["grpo"]["solution"] == [r["answer"] for r in records["grpo"]]
    assert tables["pair"][0]["rejected"] == [{"role": "assistant", "content": [{"type": "text", "text": "nothing"}]}]


def test_trl_collators_train_on_the_answer_only_in_the_first_form(trl_tables):
    from transformers import AutoProcessor
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling
    processor = AutoProcessor.from_pretrained(Path(trainers.__file__).parent / "models/tiny")
    tables, records = trl_tables

    def trained(table, **options):
        batch = DataCollatorForVisionLanguageModeling(processor, **options)([dict(row) for row in table])
        return [processor.tokenizer.decode(ids[labels != -100], skip_special_tokens=True)
                for ids, labels in zip(batch["input_ids"], batch["labels"])]
    first, second = trained(tables["sft"], completion_only_loss=True), trained(tables["messages"])
    for answer, whole, record in zip(first, second, records["sft"]):
        question = record["messages"][-2]["content"].split("\n")[-1].replace("<image>", "")
        assert record["messages"][-1]["content"] in answer and question not in answer
        assert question in whole and record["messages"][-1]["content"] in whole     # the trap: the question is trained too
    batch = DataCollatorForVisionPreference(processor)([dict(row) for row in tables["pair"]])
    assert len(batch["input_ids"]) == 12                                            # chosen and rejected


def test_load_trl_refuses_other_files(tmp_path):
    file = write_dataset([to_record("Hi?", answer="yes")], tmp_path, format="swift")["file"]
    with pytest.raises(ValueError, match="looks like records, not like TRL"):
        load_trl(file)

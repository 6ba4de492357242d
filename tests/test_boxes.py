"""Boxes: the numbers of each family, the way back, odd boxes and answers, and the pictures and pages made of them."""
import json
import math
import random
import re

import pytest
from PIL import Image

from vlmcourse.answers import parse_boxes
from vlmcourse.boxes import (FAMILIES, Html, draw_boxes, from_coco, from_model_box, from_yolo, picture_html, preview_records,
                             read_objects, resized_size, say_objects, smart_resize, to_coco, to_model_box, to_yolo)
from vlmcourse.formats import to_record
from vlmcourse.museum import boxes, detection_json, draw_scene, make_records, make_scene

SIZE, CUBE = (640, 480), [100, 150, 300, 400]

# --- the table of FORMATS.md, section 9 -----------------------------------------------------------------------


@pytest.mark.parametrize("family, numbers", [
    ("qwen2-vl", [156, 312, 469, 833]), ("qwen3-vl", [156, 312, 469, 833]), ("internvl", [156, 312, 469, 833]),
    ("qwen2.5-vl", [101, 149, 302, 397]), ("tiny", [15, 30, 45, 80])])
def test_red_cube(family, numbers):
    found = to_model_box(CUBE, SIZE, family)
    assert found == numbers and all(type(n) is int for n in found)


def test_red_cube_elsewhere():
    assert to_coco(CUBE) == [100, 150, 200, 250]
    assert [round(n, 4) for n in to_yolo(CUBE, SIZE)] == [0.3125, 0.5729, 0.3125, 0.5208]
    assert resized_size(SIZE, "qwen2.5-vl") == (644, 476)


# --- smart resize ---------------------------------------------------------------------------------------------

LIMITS = [(28, 56 * 56, 28 * 28 * 1280), (28, 3136, 12845056), (32, 65536, 16777216), (32, 256 * 256, 32 * 32 * 1280),
          (24, 9216, 9216)]


def resize_or_error(rule, *args, **options):
    try:
        return rule(*args, **options)
    except ValueError:
        return "refused"


@pytest.mark.parametrize("factor, low, high", LIMITS)
def test_smart_resize_is_that_of_transformers(factor, low, high):
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs
    rng, kinds = random.Random(factor + high), set()
    for _ in range(10_000):
        h, w = (round(math.exp(rng.uniform(0, 9.4))) for _ in "hw")
        options = dict(factor=factor, min_pixels=low, max_pixels=high)
        ours = resize_or_error(smart_resize, h, w, **options)
        assert ours == resize_or_error(theirs, h, w, **options), (h, w)
        kinds.add("refused" if ours == "refused" else "shrunk" if h * w > high else "enlarged" if h * w < low else "kept")
    assert kinds >= {"refused", "shrunk", "enlarged"}


def test_smart_resize_names_the_size():
    assert smart_resize(10, 2000) and smart_resize(2000, 10)  # 200 times is allowed
    with pytest.raises(ValueError, match="2001 x 10 px.*at most 200"):
        smart_resize(10, 2001)
    with pytest.raises(ValueError, match="at least 1 px"):
        smart_resize(0, 5)


@pytest.mark.parametrize("family, patch", [("qwen2-vl", 14), ("qwen2.5-vl", 14), ("qwen3-vl", 16)])
def test_resized_size_is_what_the_processor_makes(family, patch):
    from transformers import Qwen2VLImageProcessor
    low, high = {14: (56 * 56, 28 * 28 * 1280), 16: (256 * 256, 32 * 32 * 1280)}[patch]
    processor = Qwen2VLImageProcessor(patch_size=patch, size={"shortest_edge": low, "longest_edge": high})
    rng = random.Random(patch)
    for _ in range(300):
        w, h = (round(math.exp(rng.uniform(3, 8))) for _ in "wh")
        wide, high_ = resized_size((w, h), family)
        assert processor.get_number_of_image_patches(h, w, {}) == (wide // patch) * (high_ // patch)


def test_limits_of_the_processor_count():
    assert resized_size((4000, 3000), "qwen2.5-vl", max_pixels=12845056) == (4004, 2996)
    assert resized_size((4000, 3000), "qwen2.5-vl") == (1148, 840)
    assert resized_size((64, 64), "qwen3-vl", min_pixels=1) == (64, 64)
    assert resized_size((64, 64), "qwen3-vl") == (256, 256)
    wide = dict(max_pixels=12845056)
    box = [1000, 1000, 3000, 2000]
    assert to_model_box(box, (4000, 3000), "qwen2.5-vl", **wide) == [1001, 999, 3003, 1997]
    back = from_model_box([1001, 999, 3003, 1997], (4000, 3000), "qwen2.5-vl", **wide)
    assert max(abs(a - b) for a, b in zip(back, box)) < 0.6


# --- there and back -------------------------------------------------------------------------------------------

def unit(size, family):
    "Width and height of one of the model's units, in px of the original."
    if family == "qwen2.5-vl":
        across, down = resized_size(size, family)
    else:
        across = down = 96 if family == "tiny" else 1000
    return size[0] / across, size[1] / down


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_off_by_half_a_unit_at_most(family):
    rng, most = random.Random(7), 0
    for _ in range(6000):
        size = w, h = tuple(round(math.exp(rng.uniform(3.5, 8.6))) for _ in "wh")
        box = [*(rng.uniform(0, m) for m in size)]
        box += [rng.uniform(box[0], w), rng.uniform(box[1], h)]
        numbers = to_model_box(box, size, family)
        back = from_model_box(numbers, size, family)
        shares = [abs(a - b) / u for a, b, u in zip(box, back, unit(size, family) * 2)]
        most = max(most, *shares)
        assert max(shares) <= 0.5 + 1e-9, (size, box)
        assert back[0] <= back[2] <= w + 1e-9 and back[1] <= back[3] <= h + 1e-9
        if numbers[0] < numbers[2] and numbers[1] < numbers[3]:  # numbers survive the way back and there
            assert to_model_box(back, size, family) == numbers
    assert most > 0.499


def test_whole_pixels_of_a_museum_photo_survive():
    for scene in (make_scene(i, "train") for i in range(60)):
        for box in boxes(scene, 96):
            assert to_model_box(box, (96, 96), "tiny") == box
            assert from_model_box(box, (96, 96), "tiny") == box


def test_coco_and_yolo_come_back():
    rng = random.Random(3)
    for _ in range(2000):
        size = rng.randint(1, 5000), rng.randint(1, 5000)
        box = [rng.uniform(0, m) for m in size * 2]
        assert from_coco(to_coco(box)) == pytest.approx(box, abs=1e-9)
        assert from_yolo(to_yolo(box, size), size) == pytest.approx(box, abs=1e-8)


@pytest.mark.parametrize("bbox, numbers", [
    ([-50, -50, 320, 240], [0, 0, 500, 500]), ([320, 240, 999, 999], [500, 500, 1000, 1000]), ([-1, -1, 641, 481], [0, 0, 1000, 1000]),
    ([0, 0, 640, 480], [0, 0, 1000, 1000]), ((100.0, 150.0, 300.0, 400.0), [156, 312, 469, 833]), (["100", 150, 300, 400], [156, 312, 469, 833])])
def test_what_hangs_out_is_cut_off(bbox, numbers):
    assert to_model_box(bbox, SIZE, "qwen3-vl") == numbers


BAD = [
    ([1, 2, 3], "four finite"), ([1, 2, 3, 4, 5], "four finite"), ("abcd", "four finite"), (None, "four finite"), (7, "four finite"),
    ([1, 2, math.nan, 4], "four finite"), ([1, 2, math.inf, 4], "four finite"), ([1, 2, None, 4], "four finite"),
    ([10**400, 2, 3, 4], "four finite"), ([5, 5, 5, 9], "no area"), ([9, 5, 5, 9], "no area"), ([300, 200, 100, 50], "from_coco"),
    ([640, 0, 700, 9], "outside of the picture of 640 x 480"), ([-9, 0, 0, 9], "outside"), ([0, 480, 9, 500], "outside")]


@pytest.mark.parametrize("bbox, message", BAD)
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_boxes_are_named(bbox, message, family):
    with pytest.raises(ValueError, match=message):
        to_model_box(bbox, SIZE, family)


@pytest.mark.parametrize("size", [None, 640, (640,), (640, 0), (-1, 5), ("640", "480"), (math.inf, 5), (math.nan, 5), (1, 2, 3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_sizes_are_named(size, family):
    for call in (lambda: to_model_box(CUBE, size, family), lambda: from_model_box(CUBE, size, family),
                 lambda: resized_size(size, family), lambda: to_yolo(CUBE, size), lambda: read_objects("[]", size, family)):
        with pytest.raises(ValueError, match="size="):
            call()


def test_unknown_families_are_named():
    for call in (to_model_box, from_model_box):
        with pytest.raises(ValueError, match="family='Qwen2.5-VL'.*qwen2.5-vl"):
            call(CUBE, SIZE, "Qwen2.5-VL")
    for call in (lambda: say_objects([], SIZE, "llava"), lambda: read_objects("[]", SIZE, None), lambda: resized_size(SIZE, "")):
        with pytest.raises(ValueError, match="family="):
            call()


def test_from_model_box_stays_in_the_picture():
    assert from_model_box([-5, 0, 1200, 1000], SIZE, "internvl") == [0, 0, 640, 480]
    assert from_model_box([900, 900, 100, 100], SIZE, "internvl") == [576, 432, 64, 48]  # swapped stays swapped


# --- saying and reading ---------------------------------------------------------------------------------------

THINGS = [{"bbox": CUBE, "label": "red cube"}, {"bbox": [360, 200, 480, 320], "label": 'a "blue" ball, été 花'},
          {"bbox": [0, 0, 640, 480], "label": 'a "blue" ball, été 花'}]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_is_read(family):
    value, problem = read_objects(say_objects(THINGS, SIZE, family), SIZE, family)
    assert problem is None and [one["label"] for one in value] == [one["label"] for one in THINGS]
    for one, true in zip(value, THINGS):
        assert all(abs(a - b) <= u / 2 + 1e-9 for a, b, u in zip(one["bbox"], true["bbox"], unit(SIZE, family) * 2))
    assert all(type(n) is float for one in value for n in one["bbox"])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_and_no_label(family):
    assert say_objects([], SIZE, family) == "[]"
    assert read_objects("[]", SIZE, family) == ([], None)
    value, problem = read_objects(say_objects([{"bbox": CUBE}], SIZE, family), SIZE, family)
    assert problem is None and [one["label"] for one in value] == [None]


def test_forms():
    assert say_objects(THINGS[:1], SIZE, "internvl") == "<ref>red cube</ref><box>[[156, 312, 469, 833]]</box>"
    assert say_objects(THINGS, SIZE, "internvl").count("<ref>") == 2  # neighbours with one label share a tag
    assert say_objects([THINGS[1], THINGS[0], THINGS[2]], SIZE, "internvl").count("<ref>") == 3  # the order stays
    assert json.loads(say_objects(THINGS, SIZE, "qwen2-vl"))[0] == {"bbox_2d": [156, 312, 469, 833], "label": "red cube"}
    assert "花" in say_objects(THINGS, SIZE, "qwen3-vl")
    assert say_objects([{**THINGS[0], "colour": "red"}], SIZE, "tiny") == '[{"bbox_2d":[15,30,45,80],"label":"red cube"}]'
    for tag in ("<ref>", "</ref>", "<box>", "</box>"):
        with pytest.raises(ValueError, match="Rename the label"):
            say_objects([{"bbox": CUBE, "label": f"a{tag}"}], SIZE, "internvl")
    with pytest.raises(ValueError, match="no area"):
        say_objects([{"bbox": [5, 5, 5, 5], "label": "a"}], SIZE, "tiny")


def test_the_tiny_form_is_the_museum_s():
    for i in range(30):
        scene = make_scene(i, "train", kind="shelf")
        said = detection_json(scene, 96)
        things = [{"bbox": row["bbox_2d"], "label": row["label"]} for row in json.loads(said)]
        assert say_objects(things, (96, 96), "tiny") == said
        assert read_objects(said, (96, 96), "tiny") == (things, None)


@pytest.mark.parametrize("text, n, problem", [
    ("[[1, 2, 3, 4]]", 1, None), ("[[0, 0, 1000, 1000]]", 1, None), ("[[1, 2, 3, 1001]]", 1, "outside of the picture"),
    ("[[-1, 2, 3, 4]]", 1, "outside of the picture"), ("[[1, 2, 3, 1e9]]", 1, "outside of the picture"), ("[4, 3, 2, 1]", 1, "corners swapped"),
    ("[[1, 2, 3, 4], [5, 6", 1, "cut off"), ("[[1, 2, 3, 1001], [5, 6", 1, "cut off"), ("no", 0, "no box found"), ("", 0, "no box found"),
    ("[1, 2, NaN, 4]", 0, "not a finite number"), (None, 0, "not text"), (5, 0, "not text")])
def test_read_objects_problems(text, n, problem):
    value, found = read_objects(text, SIZE, "qwen3-vl")
    assert (len(value), found) == (n, problem)
    assert all(0 <= one["bbox"][i] <= SIZE[i % 2] for one in value for i in range(4))


def test_the_wrong_family_is_noticed():
    said = say_objects(THINGS, SIZE, "qwen3-vl")  # the last box reaches the edge: 1000
    assert read_objects(said, SIZE, "tiny").problem == "outside of the picture"
    assert read_objects(said, SIZE, "qwen2.5-vl").problem == "outside of the picture"


# --- looking --------------------------------------------------------------------------------------------------

def changed(before, after):
    "The box of the pixels that differ, or None."
    from PIL import ImageChops
    return ImageChops.difference(before, after).getbbox()


@pytest.mark.parametrize("size, wanted", [((96, 96), (384, 384)), ((30, 60), (210, 420)), ((384, 10), (384, 10)), ((1, 1), (384, 384)),
                                          ((2000, 1500), (2000, 1500))])
def test_drawing_sizes(size, wanted):
    image = Image.new("RGB", size, "white")
    drawn = draw_boxes(image, [{"bbox": [0, 0, *size], "label": "a vase"}])
    assert drawn.size == wanted and image.getcolors() == [(size[0] * size[1], (255, 255, 255))]  # the original is untouched
    assert changed(Image.new("RGB", wanted, "white"), drawn)


def test_the_frame_is_where_the_box_is():
    white = Image.new("RGB", (800, 600), "white")
    drawn = draw_boxes(white, [{"bbox": [200, 300, 500, 450]}])
    left, top, right, bottom = changed(white, drawn)
    assert (left, right, bottom) == (200, 501, 451) and 250 < top < 300  # the tag with the number sits on top
    inside = drawn.crop((204, 330, 497, 447))
    assert inside.getcolors() == [(293 * 117, (255, 255, 255))]
    small = draw_boxes(Image.new("RGB", (96, 96), "white"), [{"bbox": [24, 48, 72, 72]}])
    assert changed(Image.new("RGB", (384, 384), "white"), small)[2:] == (289, 289)  # four times as large


def test_guesses_are_drawn_with_gaps():
    white = Image.new("RGB", (800, 600), "white")
    row = lambda image: [image.getpixel((x, 450)) != (255, 255, 255) for x in range(210, 490)]
    thing = [{"bbox": [200, 300, 500, 450], "label": "a"}]
    assert all(row(draw_boxes(white, thing)))
    broken = row(draw_boxes(white, [], guesses=thing))
    assert 0.3 < sum(broken) / len(broken) < 0.7


@pytest.mark.parametrize("bbox, label", [
    ([5, 5, 5, 5], "a point"), ([60, 60, 10, 10], "swapped"), ([-50, -50, 200, 200], "larger than the picture"), ([500, 500, 600, 600], "outside"),
    ([-1e9, -1e9, 1e9, 1e9], "huge"), ([1e300, 0, 1e300, 5], "far"), ([1, 1, 9, 9], "x" * 5000), ([1, 1, 9, 9], "花瓶 Ваза"), ([1, 1, 9, 9], None),
    ([1, 1, 9, 9], 7), ([1, 1, 9, 9], "a\nb"), ([1, 1, 9, 9], "")])
def test_odd_boxes_are_drawn(bbox, label):
    image = Image.new("RGB", (96, 96), "white")
    for options in (dict(objects=[{"bbox": bbox, "label": label}]), dict(objects=[], guesses=[{"bbox": bbox, "label": label}])):
        assert changed(Image.new("RGB", (384, 384), "white"), draw_boxes(image, **options))  # at least the tag is seen


def test_swapped_corners_are_drawn_and_named():
    white = Image.new("RGB", (800, 600), "white")
    straight, swapped = (draw_boxes(white, [{"bbox": box, "label": "a"}]) for box in ([200, 300, 500, 450], [500, 450, 200, 300]))
    assert straight.crop((0, 300, 800, 600)).tobytes() == swapped.crop((0, 300, 800, 600)).tobytes()  # the same frame
    assert changed(straight, swapped)  # another tag


def test_many_boxes_and_bad_ones():
    image = draw_scene(make_scene(1, "train"), 96)
    long, short = (draw_boxes(image, [{"bbox": [1, 1, 9, 9], "label": "x" * n}]).tobytes() for n in (5000, 40))
    assert long == short  # a label over 40 letters is cut
    assert draw_boxes(image, [{"bbox": [i, i, i + 5, i + 5], "label": "v"} for i in range(90)]).size == (384, 384)
    with pytest.raises(ValueError, match="four finite"):
        draw_boxes(image, [{"bbox": [1, 2, math.nan, 4]}])
    with pytest.raises(FileNotFoundError, match="gone.png"):
        draw_boxes("gone.png", [])


EVIL = '<script>alert(1)</script><img src=x onerror=alert(1)>"\'&'


def test_a_preview_shows_everything_and_is_safe(tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    records = [
        to_record(f"What? {EVIL}", str(tmp_path / "a.png"), answer=EVIL, id=EVIL, objects=[{"bbox": [1, 1, 9, 9], "label": EVIL}]),
        to_record("Which <image> or <image>?", [str(tmp_path / "a.png")] * 2, objects=[{"bbox": [1, 1, 9, 9], "label": "v"}]),
        {**to_record("A pair", Image.new("L", (9, 9))), "chosen": "good" + EVIL, "rejected": "bad", "kto_tag": False, "answer": "4"},
        to_record("Broken", str(tmp_path / "b.png")), to_record("Gone", str(tmp_path / "gone.png")),
        {"images": ["x.png"], "objects": [{"label": "no box"}]}, {}, {"messages": None, "images": None},
        {"messages": ["text"], "images": ["<u>x</u>.png"]}]
    page = preview_records(records, 20)
    assert isinstance(page, Html) and page._repr_html_() == page.html_text
    tags = set(re.findall(r"<\s*(\w+)", page.html_text))
    assert tags == {"table", "tr", "td", "div", "b", "br", "i", "img", "span", "p"}
    assert "onerror=alert(1)>" not in page.html_text and page.html_text.count("&lt;script&gt;") == 5
    assert page.html_text.count('<img src="data:image/jpeg;base64,') == 4 and "http" not in page.html_text
    assert page.html_text.count("cannot be shown") == 4 and "gone.png" in page.html_text
    assert page.html_text.count("&lt;image&gt;</span>") == 1 + 2 + 1 + 1 + 1  # the marks are framed
    for word in ("chosen:", "rejected: bad", "kto_tag: False", "answer: 4", "boxes: 1 v (not drawn", "boxes: 1 <script>", EVIL, "9 of 9 records"):
        assert word in repr(page)


def test_a_preview_of_some():
    records = make_records(10, seed=2)
    page = preview_records(records, n=3, height=50)
    assert "3 of 10 records" in repr(page) and page.html_text.count("<td") == 3
    assert "8 of 10 records" in repr(preview_records(records))
    assert "0 of 0 records" in repr(preview_records([]))


def test_a_preview_draws_the_boxes_of_a_single_picture():
    white, thing = Image.new("RGB", (96, 96), "white"), {"bbox": [20, 20, 60, 60], "label": "a"}
    plain, drawn, two = (re.findall('src="([^"]+)"', preview_records([record]).html_text) for record in (
        to_record("?", white), to_record("?", white, objects=[thing]), to_record("?", [white, white], objects=[thing])))
    assert drawn != plain and two == plain * 2


def test_pictures_on_a_page_are_small():
    import base64
    import io
    photo = draw_scene(make_scene(1, "train"), 480)
    text = picture_html(photo, height=100)
    assert photo.size == (480, 480)  # the given picture stays as it is
    data = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (200, 200)
    assert len(data) < 20_000 and 'height="100"' in text


def test_parse_boxes_is_that_of_answers():
    "The numbers as written, for whoever wants to draw them on the resized picture."
    said = say_objects(THINGS[:1], SIZE, "qwen2.5-vl")
    assert parse_boxes(said).value == [{"bbox": [101, 149, 302, 397], "label": "red cube"}]

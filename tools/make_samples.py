"""Make data_samples/ anew: `python tools/make_samples.py`. Same seed, same pixels; `tests/test_samples.py` compares."""
import json
import shutil
import sys
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import ImageEnhance

from vlmcourse.museum import boxes, draw_scene, make_records, make_scene, save_records
from vlmcourse.report import write_eval

root = Path(__file__).resolve().parent.parent
EVAL_TASKS = ["colour", "shape", "pattern", "condition", "view", "quality", "count", "count_by", "presence", "things", "left_right", "corner",
              "steps", "workshop", "which_photo", "same", "total", "like", "caption", "caption"]       # four rounds of these: eval/


def make(folder):
    "Write all samples below `folder`, which must not exist yet."
    folder = Path(folder)
    save_records(make_records(20, split="train", seed=100), folder/"museum")
    save_records(make_records(32, ["workshop"], split="train", seed=101), folder/"workshop")
    photo = draw_scene(make_scene(35, "test", kind="portrait", defect="sharp"), 448)
    photo.save(folder/"visitor.jpg", quality=88)
    cvat(folder/"cvat")
    write_eval(make_records(80, EVAL_TASKS, split="test", seed=104), folder/"eval", suffix=".jpg")
    return folder


# --- cvat/: the shelves as an annotator would have drawn them in CVAT, exported in two formats --------------------

SIDE, CUT = 200, 16                              # px: photos are drawn square, then the top is cut off
ANSWERS = {"vase": ["inventory", "case", "colour", "glued"], "damage": ["kind"], "recheck": []}    # label: its attributes
TYPES = {"inventory": "text", "case": "select", "colour": "select", "glued": "checkbox", "kind": "select"}


def shelf_photo(scene):
    "The photo of a shelf, and the box of each damage: where the photo differs from one of intact vases."
    photo, spots = draw_scene(scene, SIDE), []
    for i, vase in enumerate(scene.vases):
        whole = scene.vases[:i] + (replace(vase, condition="intact"),) + scene.vases[i+1:]
        rows, columns, _ = np.nonzero(np.asarray(photo) != np.asarray(draw_scene(replace(scene, vases=whole), SIDE)))
        if len(rows):
            spots.append((vase, [int(columns.min()), int(rows.min())-CUT, int(columns.max())+1, int(rows.max())+1-CUT]))
    return photo.crop((0, CUT, SIDE, SIDE)), spots


def shelf_shapes(scene, spots, rng, first, case):
    "What the annotator drew: boxes by hand are a pixel off; vase number `first` and on are written in the inventory."
    off, shapes = lambda box: [round(v + rng.integers(-100, 101)/100, 2) for v in box], []
    for i, (vase, (x1, y1, x2, y2)) in enumerate(zip(scene.vases, boxes(scene, SIDE)), first):
        shapes.append(dict(kind="box", label="vase", box=off([x1, y1-CUT, x2, y2-CUT]),
            attributes=dict(inventory=f"{i:03}", case=case, colour=vase.colour, glued="true" if vase.condition == "broken" else "false")))
    for vase, box in spots:
        shapes.append(dict(kind="box", label="damage", box=off(box), z_order=1,
                           attributes=dict(kind="crack" if vase.condition == "cracked" else "hole")))
    return shapes


def shelf_pictures():
    "[(name, photo, shapes, tags)]: ten shelves, an empty one, and one photo that was uploaded twice."
    seeds = [[102, i] for i in range(300)]
    scenes = [make_scene(s, kind="shelf", n_vases=2 + s[1] % 3, defect="sharp") for s in seeds]
    spoilt = [s for s in scenes if any(v.condition != "intact" for v in s.vases)][:7]
    scenes = spoilt + [s for s in scenes if all(v.condition == "intact" for v in s.vases)][:3]
    scenes.append(replace(scenes[-1], vases=(), things=(), wall="sage"))
    rng, made, first = np.random.default_rng(103), [], 1
    for n, scene in enumerate(scenes, 1):
        photo, spots = shelf_photo(scene)
        shapes = shelf_shapes(scene, spots, rng, first, "01" if n < 7 else "02")
        first += len(scene.vases)
        made.append((f"{'east' if n < 7 else 'west'}/shelf_{n:02}.jpg", photo, shapes, ["recheck"] if n == 2 else []))
    return odd_shapes(made) + [("west/again_01.jpg", ImageEnhance.Brightness(made[0][1]).enhance(1.15), made[0][2], [])]


def odd_shapes(made):
    "One crack becomes a narrow box, turned along it, one a polygon, and one vase is half hidden."
    first, second = [s for _, _, shapes, _ in made[1:] for s in shapes if s["label"] == "damage"][:2]
    x1, y1, x2, y2 = first["box"]
    first.update(box=[round((x1+x2)/2-5, 2), y1, round((x1+x2)/2+5, 2), y2], rotation=348.0)
    x1, y1, x2, y2 = second["box"]
    w = x2-x1
    second.update(kind="polygon", points=[(x1+.6*w, y1), (x2, y1), (x1+.4*w, y2), (x1, y2)])
    made[3][2][0]["occluded"] = 1
    return made


def cvat_xml(pictures):
    "annotations.xml, CVAT for images 1.1."
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    task = ET.SubElement(ET.SubElement(root, "meta"), "task")
    for name, text in dict(id="7", name="shelves", size=str(len(pictures)), mode="annotation").items():
        ET.SubElement(task, name).text = text
    labels = ET.SubElement(task, "labels")
    for name, attributes in ANSWERS.items():
        label = ET.SubElement(labels, "label")
        ET.SubElement(label, "name").text = name
        ET.SubElement(label, "type").text = "any" if attributes else "tag"
        below = ET.SubElement(label, "attributes")
        for attribute in attributes:
            one = ET.SubElement(below, "attribute")
            ET.SubElement(one, "name").text, ET.SubElement(one, "input_type").text = attribute, TYPES[attribute]
    for n, (name, photo, shapes, tags) in enumerate(pictures):
        image = ET.SubElement(root, "image", id=str(n), name=name, width=str(photo.width), height=str(photo.height))
        for s in shapes:
            common = dict(label=s["label"], source="manual", occluded=str(s.get("occluded", 0)))
            if s["kind"] == "polygon":
                place = dict(points=";".join(f"{x:.2f},{y:.2f}" for x, y in s["points"]))
            else:
                place = dict(zip(("xtl", "ytl", "xbr", "ybr"), (f"{v:.2f}" for v in s["box"])))
            turned = dict(rotation=f"{s['rotation']:.2f}") if "rotation" in s else {}
            shape = ET.SubElement(image, s["kind"], {**common, **place, **turned, "z_order": str(s.get("z_order", 0))})
            for key, value in s["attributes"].items():
                ET.SubElement(shape, "attribute", name=key).text = value
        for tag in tags:
            ET.SubElement(image, "tag", label=tag, source="manual")
    ET.indent(root)
    return ET.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def cvat_coco(pictures):
    "instances_default.json, COCO 1.0 as CVAT writes it: no tags, checkboxes as true and false."
    ids = {label: i for i, label in enumerate(ANSWERS, 1)}
    images, annotations = [], []
    for n, (name, photo, shapes, _) in enumerate(pictures, 1):
        images.append(dict(id=n, width=photo.width, height=photo.height, file_name=name, license=0, flickr_url="",
                           coco_url="", date_captured=0))
        for s in shapes:
            x1, y1, x2, y2 = s["box"]
            kept = {k: v == "true" if TYPES[k] == "checkbox" else v for k, v in s["attributes"].items()}
            polygon = s["kind"] == "polygon"
            kept |= dict(occluded=bool(s.get("occluded"))) | ({} if polygon else dict(rotation=s.get("rotation", 0.0)))
            annotations.append(dict(id=len(annotations)+1, image_id=n, category_id=ids[s["label"]],
                segmentation=[[round(v, 2) for p in s["points"] for v in p]] if polygon else [],
                area=round((x2-x1)*(y2-y1), 2), bbox=[x1, y1, round(x2-x1, 2), round(y2-y1, 2)], iscrowd=0, attributes=kept))
    return json.dumps(dict(licenses=[dict(name="", id=0, url="")],
        info=dict(contributor="", date_created="", description="", url="", version="", year=""),
        categories=[dict(id=i, name=label, supercategory="") for label, i in ids.items()],
        images=images, annotations=annotations), indent=1).encode() + b"\n"


def cvat(folder):
    "The same task twice: as a folder (CVAT for images 1.1) and as the zip that CVAT gives (COCO 1.0)."
    pictures = shelf_pictures()
    (folder/"shelves").mkdir(parents=True)
    (folder/"shelves/annotations.xml").write_bytes(cvat_xml(pictures))
    with zipfile.ZipFile(folder/"shelves_coco.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        def add(name, data):
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, 5, 10, 0, 0)), data, zipfile.ZIP_DEFLATED)
        add("annotations/instances_default.json", cvat_coco(pictures))
        for name, photo, _, _ in pictures:
            file = folder/"shelves/images"/name
            file.parent.mkdir(parents=True, exist_ok=True)
            photo.save(file, quality=80)
            add(f"images/default/{name}", file.read_bytes())


if __name__ == "__main__":
    made, final = make(root/"data_samples.new"), root/"data_samples"
    shutil.copy(final/"README.md", made/"README.md") if (final/"README.md").exists() else None
    for name in ("plugins", "logs"):                                                                # written by hand, or by other programs
        if (final/name).exists(): shutil.copytree(final/name, made/name)
    shutil.rmtree(final, ignore_errors=True)
    made.rename(final)
    print(f"{final}: {sum(p.is_file() for p in final.rglob('*'))} files")
    sys.exit(0)

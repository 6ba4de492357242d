"""data_samples/ is what tools/make_samples.py makes, pixel by pixel, and the command line works on it."""
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from vlmcourse.core import read_json
from vlmcourse.formats import read_records

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root/"tools"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    from make_samples import make
    return make(tmp_path_factory.mktemp("samples")/"new")


@pytest.mark.parametrize("name", ["museum", "workshop"])
def test_same_records_and_pixels(fresh, name):
    new, old = (read_json(f/name/"records.json") for f in (fresh, root/"data_samples"))
    assert new == old
    for record in new:
        for image in record["images"]:
            a, b = (Image.open(f/name/image).tobytes() for f in (fresh, root/"data_samples"))
            assert a == b, f"{name}/{image} is drawn differently here: run tools/make_samples.py and look at the difference"


def test_same_cvat_exports(fresh):
    import zipfile
    new, old = (f/"cvat" for f in (fresh, root/"data_samples"))
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*.*")) for f in (new, old)]
    assert names[0] == names[1] and len(names[0]) == 14
    assert (new/"shelves/annotations.xml").read_bytes() == (old/"shelves/annotations.xml").read_bytes()
    zips = [zipfile.ZipFile(f/"shelves_coco.zip") for f in (new, old)]
    assert zips[0].namelist() == zips[1].namelist() and len(zips[0].namelist()) == 13
    coco = "annotations/instances_default.json"
    assert zips[0].read(coco) == zips[1].read(coco)
    for image in (new/"shelves/images").rglob("*.jpg"):
        name = image.relative_to(new/"shelves/images").as_posix()
        a, b = (Image.open(f/"shelves/images"/name).tobytes() for f in (new, old))
        assert a == b, f"cvat/{name} is drawn differently here: run tools/make_samples.py and look at the difference"
        assert zips[1].read(f"images/default/{name}") == (old/"shelves/images"/name).read_bytes()


def test_records_are_valid():
    assert len(read_records(root/"data_samples/museum/records.json")) == 20
    assert len(read_records(root/"data_samples/workshop/records.json")) == 32


def run(*words, cwd):
    return subprocess.run([sys.executable, "-c", "import sys; from vlmcourse.cli import main; sys.exit(main())", *words],
                          cwd=cwd, capture_output=True, text=True)


def test_command_line(tmp_path):
    data = root/"data_samples/workshop/records.json"
    done = run("sft", str(data), "--max-steps", "2", "--output-dir", "mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"mine/final/adapter_model.safetensors").is_file()
    assert len(read_json(tmp_path/"mine/training_log.json")["train_history"]) == 2
    again = run("sft", str(data), "--output-dir", "mine", cwd=tmp_path)
    assert again.returncode == 2 and "mine" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.parametrize("words", [["DATA"], ["--data", "DATA"], ["--data=DATA", "--no-answers"], ["--no-answers", "--data", "DATA"]])
def test_needed_arguments_by_place_or_by_name(words, tmp_path):
    data = root/"data_samples/museum/records.json"
    done = run("check", *[w.replace("DATA", str(data)) for w in words], cwd=tmp_path)
    assert done.returncode == 0 and "20 records, 0 with problems" in done.stdout, done.stderr
    for words in ([], ["--data"], ["--data", str(data), "more"]):
        assert run("check", *words, cwd=tmp_path).returncode == 2


def test_a_reader_that_stops_early(tmp_path):
    code = "import sys; from vlmcourse.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{code}" | true; echo ${{PIPESTATUS[0]}}'], capture_output=True, text=True)
    assert done.stdout == "0\n" and done.stderr == ""


def test_command_line_mistakes(tmp_path):
    assert "usage" in run(cwd=tmp_path).stdout
    wrong = run("fly", cwd=tmp_path)
    assert wrong.returncode == 2 and "no command 'fly'" in wrong.stderr
    missing = run("sft", "nothing.json", cwd=tmp_path)
    assert missing.returncode == 2 and "nothing.json" in missing.stderr and "Traceback" not in missing.stderr

"""Make data_samples/ anew: `python tools/make_samples.py`. Same seed, same pixels; `tests/test_samples.py` compares."""
import shutil
import sys
from pathlib import Path

from vlmcourse.museum import draw_scene, make_records, make_scene, save_records

root = Path(__file__).resolve().parent.parent


def make(folder):
    "Write all samples below `folder`, which must not exist yet."
    folder = Path(folder)
    save_records(make_records(20, split="train", seed=100), folder/"museum")
    save_records(make_records(32, ["workshop"], split="train", seed=101), folder/"workshop")
    photo = draw_scene(make_scene(35, "test", kind="portrait", defect="sharp"), 448)
    photo.save(folder/"visitor.jpg", quality=88)
    return folder


if __name__ == "__main__":
    made, final = make(root/"data_samples.new"), root/"data_samples"
    shutil.copy(final/"README.md", made/"README.md") if (final/"README.md").exists() else None
    shutil.rmtree(final, ignore_errors=True)
    made.rename(final)
    print(f"{final}: {sum(p.is_file() for p in final.rglob('*'))} files")
    sys.exit(0)

"""`pytest` runs every notebook of nbs/ the way nbdev_test does: in this process, so that torch is imported once."""
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C reaches the tests' processes also under `pytest &`, which ignores it

root = Path(__file__).parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")            # no test reads from a model hub
for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):       # `make` inside a test is not part of `make test`
    os.environ.pop(name, None)


def pytest_collect_file(parent, file_path):
    hidden = any(part[0] in "._" for part in file_path.relative_to(root).parts)
    if file_path.suffix == ".ipynb" and not hidden:
        return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self):
        yield NotebookItem.from_parent(self, name=self.path.stem)


class NotebookItem(pytest.Item):
    def runtest(self):
        from nbdev.config import get_config
        from nbdev.test import test_nb
        skip = get_config(path=root).tst_flags.split()
        environ, argv, path = dict(os.environ), sys.argv[:], sys.path[:]
        try:
            ok, _ = test_nb(self.copy(), skip_flags=skip)
        finally:
            os.environ.clear(), os.environ.update(environ)
            sys.argv[:], sys.path[:] = argv, path
            reset_libraries()
        if not ok:
            pytest.fail(f"{self.path.name} failed; its traceback is below, under 'Captured stderr'", pytrace=False)

    def copy(self):
        "The notebook in a copy of nbs/ beside a copy of data_samples/: running it leaves nothing in the tree."
        if not hasattr(self.session, "lessons"):
            self.session.lessons = copy_lessons(self.config._tmp_path_factory.mktemp("lessons"))
        return self.session.lessons / self.path.relative_to(root / "nbs")

    def reportinfo(self):
        return self.path, 0, f"notebook {self.name}"


def copy_lessons(folder):
    "Copy nbs/ and data_samples/ into `folder`; return the copy of nbs/."
    for name in ("nbs", "data_samples"):
        if (root / name).exists():
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("runs", ".*"))
    return folder / "nbs"


def reset_libraries():
    "Leave nothing behind for the next notebook."
    if plt := sys.modules.get("matplotlib.pyplot"):
        plt.close("all"), plt.rcdefaults()
    if torch := sys.modules.get("torch"):
        torch.set_default_dtype(torch.float32), torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)

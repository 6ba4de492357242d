"""The front door: the wheel holds what it should, and tools/setup.sh says in one paragraph why it cannot go on."""
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
LEAVE = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "artefacts")


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    "A copy of the repository as a fresh clone would be: no environment, nothing built."
    return Path(shutil.copytree(root, tmp_path_factory.mktemp("clone") / "vlmcourse", ignore=LEAVE))


def files(folder):
    "What a user of the package needs: all files under `folder` but the compiled ones."
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*")
            if f.is_file() and "__pycache__" not in f.parts}


# --- pip install . ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def installed(clone, tmp_path_factory):
    "The folder into which `pip install .` put the package. Without network: no dependencies, no build environment."
    target = tmp_path_factory.mktemp("elsewhere")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", target, clone], check=True)
    return target


def test_wheel_has_every_file_of_the_package(clone, installed):
    assert files(installed / "vlmcourse") == files(clone / "vlmcourse")


def test_weights_are_installed(installed):
    assert (installed / "vlmcourse/models/tiny/model.safetensors").stat().st_size > 1_000_000


def test_import_from_elsewhere(installed, tmp_path):
    code = "import sys, vlmcourse; print(vlmcourse.__file__); print('torch' in sys.modules, vlmcourse.core.__name__)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)},
                         capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(installed / "vlmcourse/__init__.py"), "False", "vlmcourse.core"]


def test_unknown_name():
    import vlmcourse
    with pytest.raises(AttributeError, match="no attribute 'nothing'; it has the modules .*core"):
        vlmcourse.nothing


def test_one_version_and_every_requirement_locked():
    "settings.ini, the package and requirements.lock agree."
    import importlib.metadata
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    ini = ConfigParser(delimiters=["="], interpolation=None)
    ini.read(root / "settings.ini")
    assert importlib.metadata.version("vlmcourse") == ini["DEFAULT"]["version"]
    lines = (root / "requirements.lock").read_text().splitlines()
    locked = {}
    for r in map(Requirement, lines):
        locked.setdefault(canonicalize_name(r.name), []).append(next(iter(r.specifier)).version)
    for key in ("requirements", "test_requirements", "docs_requirements"):
        for r in map(Requirement, ini["DEFAULT"][key].split()):
            versions = locked[canonicalize_name(r.name)]
            assert all(r.specifier.contains(v) for v in versions), f"{r} does not allow {versions}"
    assert not any("://" in line or line.startswith("-") for line in lines), "requirements.lock names an address"


# --- make lab, make test ----------------------------------------------------------------------------------------

@pytest.fixture
def setup(clone, tmp_path):
    "Run tools/setup.sh of the clone with some commands of the machine replaced by scripts: setup(python3='exit 127')."
    def run(*words, env=None, **commands):
        bin = tmp_path / "bin"
        bin.mkdir(exist_ok=True)
        commands = {"uv": "exit 127"} | commands
        for name, script in commands.items():
            (bin / name).write_text(f"#!/bin/sh\n{script}\n")
            (bin / name).chmod(0o755)
        env = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "COURSE_VENV": str(tmp_path / "venv"), "PYTHON": ""} | (env or {})
        ran = subprocess.run(["sh", clone / "tools/setup.sh", *words], env=env, capture_output=True, text=True)
        return ran.returncode, " ".join((ran.stdout + ran.stderr).split())
    return run


@pytest.fixture
def fake_uv(tmp_path):
    "A uv that makes the environment's folder, writes down what it is asked, and then does as `install` says."
    def script(install):
        python = tmp_path / "venv/bin/python"
        return f"""echo "$*" >> {tmp_path}/uv.log
            case "$1 $2" in
                venv*) mkdir -p {python.parent}; ln -s {sys.executable} {python};;
                "pip install") {install};;
            esac"""
    return script


ALL = ("python3", "python", "python3.13", "python3.12", "python3.11")
OLD = """case "$*" in *version_info*) echo 3.9;; *) exit 1;; esac"""
REAL = f'exec "{sys.executable}" "$@"'
DF = 'echo "Filesystem 1024-blocks Used Available Capacity Mounted"; echo "/dev/x 9 9 {} 1% /"'


def test_no_python(setup):
    code, said = setup(**{p: "exit 127" for p in ALL})
    assert code == 1 and "Stopped: no Python was found. The course needs Python 3.11 or newer." in said
    assert "apt install python3" in said


def test_old_python(setup):
    code, said = setup(**{p: OLD for p in ALL})
    assert code == 1 and "Stopped: Python is too old (python3 is 3.9; " in said and "needs Python 3.11 or newer" in said


def test_newer_python_behind_an_old_one(setup):
    "An old python3 with a python3.12 beside it is no reason to stop: the next check is reached."
    new = {"python3.13": "exit 127", "python3.12": 'case "$*" in *version_info*) echo 3.12;; esac'}
    code, said = setup(python3=OLD, df=DF.format(9), **new)
    assert code == 1 and "not enough room" in said


@pytest.mark.parametrize("version, chip", [("13.6", "arm64"), ("15.1", "x86_64")])
def test_mac_without_builds(setup, version, chip):
    uname = f'if [ "$1" = -m ]; then echo {chip}; else echo Darwin; fi'
    code, said = setup(uname=uname, sw_vers=f"echo {version}")
    assert code == 1 and f"Stopped: this machine has macOS {version}, {chip}." in said and "macOS 14 or newer on Apple silicon" in said


def test_no_room(setup):
    code, said = setup(python3=REAL, df=DF.format(1000 * 1024))
    assert code == 1 and "Stopped: not enough room: 1000 MB are free" in said and "Free some space" in said


def test_room_runs_out(setup, fake_uv, tmp_path):
    "The disk fills up while pip or uv works: 9 GB free at first, 10 MB after the failure."
    df = f'n=9000; [ ! -e {tmp_path}/full ] || n=10; ' + DF.format('$((n * 1024))')
    code, said = setup(python3=REAL, df=df, uv=fake_uv(f": > {tmp_path}/full; exit 2"))
    assert code == 1 and "Stopped: the disk is full: 10 MB are left" in said


def test_no_venv_module(setup):
    code, said = setup(python3=f'case "$*" in *ensurepip*) exit 1;; esac\n{REAL}')
    assert code == 1 and "Stopped: python3 cannot make environments: its venv module is missing." in said
    assert "apt install python3-venv" in said


@pytest.mark.parametrize("uv", [True, False], ids=["uv", "pip"])
def test_no_network(setup, uv):
    "Nothing answers at the index's address: neither uv nor pip can fetch anything."
    nowhere = "http://127.0.0.1:9/simple"
    env = dict(UV_DEFAULT_INDEX=nowhere, PIP_INDEX_URL=nowhere, PIP_EXTRA_INDEX_URL="", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull,
               UV_HTTP_RETRIES="0", no_proxy="*")
    real_uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv and not real_uv:
        pytest.skip("uv is not installed")
    client = {"uv": f'exec "{real_uv}" "$@"'} if uv else {}
    code, said = setup(python3=REAL, env=env, **client)
    assert code == 1 and "Stopped: the package index cannot be reached" in said and "Check the network" in said


def test_other_failure(setup, fake_uv):
    code, said = setup(python3=REAL, uv=fake_uv("echo broken wheel >&2; exit 2"))
    assert code == 1 and "broken wheel" in said and "Stopped: the installation failed; the lines above say why" in said


def test_second_time_does_nothing(setup, fake_uv, tmp_path):
    "The stamp that an installation leaves is believed; what the tests need includes what the lab needs."
    code, said = setup("test", python3=REAL, uv=fake_uv("true"))
    assert code == 0 and "Installing into" in said and "Installed." in said
    log = (tmp_path / "uv.log").read_text()
    assert "-c requirements.lock -e .[test]" in log
    for words in (["test"], []):
        assert setup(*words, python3=REAL, uv=fake_uv("true")) == (0, "")
    assert (tmp_path / "uv.log").read_text() == log


def test_failed_installation_is_not_believed(setup, fake_uv):
    setup(python3=REAL, uv=fake_uv("exit 2"))
    code, said = setup(python3=REAL, uv=fake_uv("true"))
    assert code == 0 and "Installed." in said


def test_moved_folder(setup, fake_uv, tmp_path):
    "An environment does not work from another place: it is made anew."
    setup(python3=REAL, uv=fake_uv("true"))
    (tmp_path / "venv/pyvenv.cfg").touch()
    (tmp_path / "venv").rename(tmp_path / "moved")
    code, said = setup(python3=REAL, uv=fake_uv("true").replace("/venv", "/moved"), env={"COURSE_VENV": str(tmp_path / "moved")})
    assert code == 0 and "Installed." in said and not (tmp_path / "moved/pyvenv.cfg").exists()


def test_folder_that_is_no_environment(setup, tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/thesis.txt").touch()
    code, said = setup(python3=REAL)
    assert code == 1 and "is no Python environment" in said and (tmp_path / "venv/thesis.txt").exists()


def test_make_lists_its_targets(clone):
    said = subprocess.run(["make"], cwd=clone, capture_output=True, text=True, check=True).stdout
    assert said.startswith("make lab") and "make test" in said

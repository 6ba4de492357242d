"Odd cases of vlmcourse.core: kills, readers at work, strange files and names."
import json, math, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vlmcourse.core import (atomic_path, file_hash, inside, pick_device, read_json, read_jsonl, run_dir, sample_path,
                            set_seed, write_json, write_jsonl, write_text)


def python(code, **kwargs):
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_import_is_quick_and_without_torch():
    code = "import sys,time; t=time.process_time(); import vlmcourse.core; print(time.process_time()-t, 'torch' in sys.modules, 'numpy' in sys.modules)"
    seconds, *heavy = min(python(code).communicate()[0].split() for _ in range(3))
    assert heavy == ["False", "False"]
    assert float(seconds) < .1


# --- writing -----------------------------------------------------------------
def test_a_kill_leaves_the_old_or_the_new_file(tmp_path):
    path = tmp_path/"log.json"
    code = (f"from vlmcourse.core import write_json\nfor i in range(10**9):\n"
            f"    write_json({str(path)!r},dict(n=i,rows=[i]*30000))\n    if not i: print('go',flush=True)\n")
    for i in range(8):
        p = python(code)
        p.stdout.readline(); time.sleep(.003+.011*i)
        p.kill(); p.wait()
        got = read_json(path)
        assert got["rows"] == [got["n"]]*30000


def test_two_writers_and_a_reader(tmp_path):
    path, stop, bad = tmp_path/"a.json", threading.Event(), []
    def write(n):
        for _ in range(60): write_json(path, [n]*5000)
    def read():
        while not stop.is_set():
            got = read_json(path)
            if len(set(got)) != 1 or len(got) != 5000: bad.append(got[:3])
    write(0)
    ts = [threading.Thread(target=write, args=(n,)) for n in (1, 2)]
    r = threading.Thread(target=read); r.start()
    for t in ts: t.start()
    for t in ts: t.join()
    stop.set(); r.join()
    assert not bad and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_path_tidies_up(tmp_path, error):
    write_text(tmp_path/"a", "old")
    with pytest.raises(error):
        with atomic_path(tmp_path/"a") as tmp:
            tmp.write_text("new"); raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path/"a").read_text() == "old"


def test_atomic_path_keeps_suffix_links_and_folders(tmp_path):
    np.save(tmp_path/"x.npy", [1])
    with atomic_path(tmp_path/"x.npy") as tmp: np.save(tmp, [2])     # numpy adds a suffix when there is none
    assert np.load(tmp_path/"x.npy")[0] == 2
    (tmp_path/"link").symlink_to(tmp_path/"x.json")
    write_json(tmp_path/"link", 5)
    assert (tmp_path/"link").is_symlink() and read_json(tmp_path/"x.json") == 5
    with atomic_path(tmp_path/"folder") as tmp: tmp.mkdir(); (tmp/"a").write_text("a")
    assert (tmp_path/"folder"/"a").read_text() == "a"
    with pytest.raises(ValueError, match="stays as it is"):
        with atomic_path(tmp_path/"folder") as tmp: tmp.mkdir()
    with pytest.raises(ValueError, match="is a folder"): write_text(tmp_path/"folder", "x")
    with pytest.raises(ValueError, match="Nothing was written"):
        with atomic_path(tmp_path/"y"): pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "link", "x.json", "x.npy"]


@pytest.mark.parametrize("obj", [
    {"a": [1, 2.5, None, True, "ä\u2028\x85\n\t\"", {"b": {}}]}, [], {}, "", 0, None, 1e308, "😀", 2**80])
def test_round_trip(tmp_path, obj):
    write_json(tmp_path/"a.json", obj); assert read_json(tmp_path/"a.json") == obj
    write_jsonl(tmp_path/"a.jsonl", [obj, obj]); assert read_jsonl(tmp_path/"a.jsonl") == [obj, obj]


def test_values_of_numpy_torch_and_odd_text(tmp_path):
    import torch
    write_json(tmp_path/"a", dict(i=np.int64(3), f=np.float32(.5), b=np.bool_(True), v=np.arange(2), t=torch.ones(2), s="\udcff"))
    assert read_json(tmp_path/"a") == dict(i=3, f=.5, b=True, v=[0, 1], t=[1., 1.], s="\udcff")


@pytest.mark.parametrize("obj", [math.nan, [math.inf], {"a": np.float32("nan")}, {1, 2}, {(1, 2): 3}, object()])
def test_not_json(tmp_path, obj):
    write_json(tmp_path/"a", "old")
    with pytest.raises(ValueError, match="cannot be written as JSON"): write_json(tmp_path/"a", obj)
    with pytest.raises(ValueError, match="line 2"): write_jsonl(tmp_path/"a", [1, obj])
    assert read_json(tmp_path/"a") == "old"


# --- reading -----------------------------------------------------------------
@pytest.mark.parametrize("data,says", [
    (b"", "is empty"), (b" \n\t", "is empty"), (b"\xff\xfe{", "not UTF-8"), (b"\x89PNG\r\n", "not UTF-8"),
    (b'{"a": 1', "line 1"), (b'{"a": 1}\n{"b": 2}', "line 2, column 1"), (b"[1,\n2,\n,3]", "line 3, column 1"),
    (b"[" * 100000, "line 1"), (b"1"*5000, "line 1"), (b"{'a': 1}", "column 2")])
def test_bad_json(tmp_path, data, says):
    (tmp_path/"bad.json").write_bytes(data)
    with pytest.raises(ValueError) as e: read_json(tmp_path/"bad.json")
    assert says in str(e.value) and "bad.json" in str(e.value) and "\n" not in str(e.value)


def test_json_from_windows(tmp_path):
    (tmp_path/"a.json").write_bytes(b"\xef\xbb\xbf{\"a\":\r\n 1}\r\n"); assert read_json(tmp_path/"a.json") == {"a": 1}
    (tmp_path/"a.jsonl").write_bytes(b"\xef\xbb\xbf1\r\n\r\n2"); assert read_jsonl(tmp_path/"a.jsonl") == [1, 2]


def test_bad_lines_are_counted_and_numbered(tmp_path):
    rows = [json.dumps(dict(i=i)) for i in range(100)]
    for i in (3, 17, 50, 51, 52, 99): rows[i] = rows[i][:-1]
    (tmp_path/"a.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError) as e: read_jsonl(tmp_path/"a.jsonl")
    assert all(s in str(e.value) for s in ("6 of 100 lines", "line 4,", "line 18,", "line 53,", "…")) and "line 100" not in str(e.value)


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_no_file_and_folder(tmp_path, read):
    with pytest.raises(FileNotFoundError, match="spelling"): read(tmp_path/"no")
    with pytest.raises(ValueError, match="is a folder"): read(tmp_path)


# --- names and folders -------------------------------------------------------
@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "", ".", "a/..", "out/x", "a\0", "//etc/passwd"])
def test_names_that_leave(tmp_path, name):
    (tmp_path/"data").mkdir(); (tmp_path/"data"/"out").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="name"): inside(tmp_path/"data", name)


@pytest.mark.parametrize("name", ["a", "a/b/c.jpg", "..a", "a..b/...", "ä ö/ü", "~", "a\\..\\b"])
def test_names_that_stay(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path.resolve()/name


def test_sister_folder_with_the_same_beginning(tmp_path):
    with pytest.raises(ValueError): inside(tmp_path/"data", "../data2/x")


def test_run_dirs_are_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool: dirs = list(pool.map(lambda _: run_dir(name="sft"), range(40)))
    assert len(set(dirs)) == 40 and all(p.is_dir() for p in dirs)
    (tmp_path/"runs"/"sft-x").mkdir(); (tmp_path/"runs"/"sft-1000").mkdir()
    assert run_dir(name="sft").name == "sft-1001" and run_dir(name="sft-b").name == "sft-b-001"


@pytest.mark.parametrize("log,free", [
    ('{"status": "finished", "train_history": [{"step": 1}]}', False), ('{"status": "stopped", "train_history": [{"step": 1}]}', False),
    ('{"train_history": [{"step": 1}]}', False), ('{"status": "runn', False), ("[]", False), ('{"train_history": 3}', False), ("", False),
    ('{"status": "failed", "train_history": []}', True)])
def test_a_run_is_never_overwritten(tmp_path, log, free):
    (tmp_path/"training_log.json").write_text(log)
    if free: assert run_dir(tmp_path) == tmp_path
    else:
        with pytest.raises(FileExistsError, match="never overwritten"): run_dir(tmp_path)
    assert (tmp_path/"training_log.json").read_text() == log


def test_samples_are_found_from_below_and_by_the_variable(tmp_path, monkeypatch):
    (tmp_path/"data_samples"/"shelf").mkdir(parents=True); (tmp_path/"a"/"b").mkdir(parents=True)
    monkeypatch.delenv("VLMCOURSE_SAMPLES", raising=False); monkeypatch.chdir(tmp_path/"a"/"b")
    assert sample_path("shelf") == tmp_path/"data_samples"/"shelf"
    (tmp_path/"other"/"shelf").mkdir(parents=True); monkeypatch.setenv("VLMCOURSE_SAMPLES", str(tmp_path/"other"))
    assert sample_path("shelf") == tmp_path/"other"/"shelf"


# --- the rest ----------------------------------------------------------------
def test_seed_takes_whole_numbers_only():
    set_seed(np.int64(3)); a = np.random.rand(); set_seed(3); assert np.random.rand() == a
    for bad in (-1, 2**32, 1.5, "1", None):
        with pytest.raises(ValueError, match="whole number"): set_seed(bad)


def test_device_from_the_environment(monkeypatch):
    monkeypatch.setenv("VLMCOURSE_DEVICE", "cpu"); assert pick_device() == "cpu"
    monkeypatch.setenv("VLMCOURSE_DEVICE", "tpu")
    with pytest.raises(ValueError, match="VLMCOURSE_DEVICE='tpu'"): pick_device()
    assert pick_device("cpu") == "cpu"
    monkeypatch.setenv("VLMCOURSE_DEVICE", ""); assert pick_device() in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="cuda:99"): pick_device("cuda:99")


def test_hash_of_a_folder_or_nothing(tmp_path):
    for p in (tmp_path, tmp_path/"no"):
        with pytest.raises(FileNotFoundError): file_hash(p)


# --- the command line ----------------------------------------------------------
@pytest.mark.parametrize("command,words,found", [
    ("sft", "--greater_is_better False --plot False", dict(greater_is_better=False, plot=False)),
    ("sft", "--greater-is-better=0 --plot auto", dict(greater_is_better=False, plot="auto")),
    ("grpo", "--greater_is_better no --plot True", dict(greater_is_better=False, plot=True)),
    ("grpo", "--greater_is_better true", dict(greater_is_better=True, plot="auto")),
    ("grpo_trl", "--greater_is_better None --learning_rate None", dict(greater_is_better=None, learning_rate=None, more=None)),
    ("dpo", "--generation_metric None --quantize none --device cpu", dict(generation_metric=None, quantize=None, device="cpu")),
    ("sft", "--learning-rate 1e-3 --bf16 --val-data None.json", dict(learning_rate=1e-3, bf16=True, val_data="None.json"))])
def test_words_become_values(command, words, found):
    from vlmcourse.cli import options
    got = options(command, ["d.json", *words.split()])
    assert {k: got[k] for k in found} == found and got["data"] == "d.json"
    assert all(type(got[k]) is type(v) for k, v in found.items()), "0 is not False here"


def test_settings_of_trl_are_json(capsys):
    from vlmcourse.cli import options
    assert options("grpo_trl", ["d", "--more", '{"use_vllm": true, "beta": 0.1}'])["more"] == dict(use_vllm=True, beta=.1)
    for command, *words in (("grpo_trl", "--more", "use_vllm"), ("grpo_trl", "--more", "3"), ("sft", "--greater_is_better", "maybe"), ("sft", "--learning_rate", "fast")):
        with pytest.raises(SystemExit) as end: options(command, ["d", *words])
        said = capsys.readouterr().err
        assert end.value.code == 2 and words[0] in said and f"{words[1]!r} cannot be read; give " in said


def test_exit_codes(tmp_path, capsys):
    from vlmcourse.cli import main
    answered = [dict(role="user", content="Which?"), dict(role="assistant", content="This.")]
    for name, turns in (("good", answered), ("bad", answered[:1])): write_json(tmp_path/f"{name}.json", [dict(id=str(i), images=[], messages=turns) for i in range(2)])
    for command in (["check"], ["preflight", "--device", "cpu"]):
        assert [main([*command, str(tmp_path/f"{name}.json")]) for name in ("good", "bad", "none")] == [0, 1, 2]
    assert "There is no file" in capsys.readouterr().err


def test_errors_of_the_system_are_said_in_words(tmp_path, monkeypatch, capsys):
    from vlmcourse import cli
    for error, says in ((PermissionError(13, "Permission denied", "/there"), "vlmcourse check: /there cannot be read or written (Permission denied). Check"),
                        (OSError(28, "No space left on device"), "vlmcourse check: [Errno 28] No space left on device"), (OSError("checkpoint-2 could not be written"), "check: checkpoint-2")):
        def fails(**_): raise error
        monkeypatch.setattr(cli, "load", lambda command: fails)
        monkeypatch.setattr(cli, "options", lambda *_: {})
        assert cli.main(["check", "d"]) == 2 and says in capsys.readouterr().err
    def gone(**_): raise BrokenPipeError
    monkeypatch.setattr(cli, "load", lambda command: gone)
    with pytest.raises(BrokenPipeError): cli.run(["check", "d"])        # `main` knows what to do

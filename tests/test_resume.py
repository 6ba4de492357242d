"Runs that are killed, stopped, starved of disk and shared by two processes: what comes out must be what an undisturbed run gives."
import json
import os
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from vlmcourse.loop import fit
from vlmcourse.resume import Checkpoints, best_place, check_output, last_checkpoint, open_run, plateau_factor, replace_folder
from vlmcourse.runlog import RunLog, read_log
from kill import kill_and_compare, launch
from test_loop import DATA, by_chance as loss_fn, collate, make_net

SETTINGS = dict(learning_rate=.02, num_train_epochs=3, per_device_train_batch_size=4, eval_steps=7)


def evaluate(net):
    b = collate(DATA[:20])
    return dict(val_loss=(loss_fn(net, b)[0]/b["n"].sum()).item(), val_chance=random.random()+np.random.rand()+torch.rand(1).item())


def run(folder, net=None, resume=None, loss_fn=loss_fn, keep=None, **kwargs):
    log = RunLog(folder, progress=False, resume_step=resume)
    net = net or make_net(dropout=.3)
    fit(net, loss_fn, DATA, collate=collate, log=log, evaluate=evaluate, checkpoints=Checkpoints(log, **(dict(save_steps=5) | (keep or {}))), **(SETTINGS | kwargs))
    if log.status == "running": log.finish()
    return log, net


def same_weights(a, b): return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


# --- one step after another ----------------------------------------------------
@pytest.mark.parametrize("stop", [1, 4, 5, 6, 7, 14, 20, 36, 39])
@pytest.mark.parametrize("logging_steps", [1, 3])
def test_a_run_that_stops_at_any_step_goes_on_bit_for_bit(tmp_path, stop, logging_steps):
    whole, net = run(tmp_path/"whole", logging_steps=logging_steps)
    calls = []
    def stops(model, b):
        calls.append(1)
        if len(calls) == stop: os.kill(os.getpid(), signal.SIGINT)
        return loss_fn(model, b)
    part, _ = run(tmp_path/"part", loss_fn=stops, logging_steps=logging_steps)
    assert part.status == "stopped" and last_checkpoint(tmp_path/"part") == stop     # Ctrl-C keeps what was learned
    again, other = run(tmp_path/"part", resume=stop, logging_steps=logging_steps)
    assert again.train_history == whole.train_history and again.val_history == whole.val_history and same_weights(net, other)
    assert again.best_checkpoint == whole.best_checkpoint
    assert (tmp_path/"part/best/weights.safetensors").read_bytes() == (tmp_path/"whole/best/weights.safetensors").read_bytes()


@pytest.mark.parametrize("crash,kept", [(18, (14, 15)), (36, (35,))])        # step 35: checkpoint, then a validation that uses chance
def test_a_crash_between_checkpoints_goes_back_to_the_last_one(tmp_path, crash, kept):
    whole, net = run(tmp_path/"whole")
    calls = []
    def breaks(model, b):
        calls.append(1)
        if len(calls) == crash: raise RuntimeError("power")
        return loss_fn(model, b)
    with pytest.raises(RuntimeError): run(tmp_path/"part", loss_fn=breaks)
    step = last_checkpoint(tmp_path/"part")
    assert step in kept and len(read_log(tmp_path/"part")["train_history"]) == crash-1
    again, other = run(tmp_path/"part", resume=step)
    assert again.train_history == whole.train_history and same_weights(net, other)


def test_checkpoints_do_not_change_the_run(tmp_path):
    a, b = make_net(dropout=.3), make_net(dropout=.3)
    log = RunLog(tmp_path/"a", progress=False); fit(a, loss_fn, DATA, collate=collate, log=log, evaluate=evaluate, **SETTINGS)
    other, _ = run(tmp_path/"b", b, keep=dict(save_steps=1))
    assert log.train_history == other.train_history and same_weights(a, b)


def test_only_the_newest_are_kept_and_the_best_is_never_lost(tmp_path):
    log, _ = run(tmp_path/"r", keep=dict(save_steps=3, save_total_limit=2))
    kept = sorted(int(p.name[11:]) for p in (tmp_path/"r").glob("checkpoint-*"))
    assert len(kept) == 2 and kept[-1] == 39 and (tmp_path/"r/best").is_dir() and not list((tmp_path/"r").glob(".tmp*"))
    values = [r["val_loss"] for r in log.val_history]
    assert log.best_checkpoint["value"] == min(values) and log.best_checkpoint["step"] == log.val_history[values.index(min(values))]["step"]


def test_a_half_written_checkpoint_is_not_taken_for_one(tmp_path):
    whole, net = run(tmp_path/"whole")
    folder = tmp_path/"part"; calls = []
    def breaks(model, b):
        calls.append(1)
        if len(calls) == 12: raise RuntimeError("power")
        return loss_fn(model, b)
    with pytest.raises(RuntimeError): run(folder, loss_fn=breaks)
    for name in (".tmp-123-checkpoint-11", "checkpoint-99", "checkpoint-x"): (folder/name).mkdir()
    assert last_checkpoint(folder) == 10
    again, other = run(folder, resume=10)
    assert again.train_history == whole.train_history and same_weights(net, other) and not (folder/".tmp-123-checkpoint-11").exists()


def test_another_model_is_refused(tmp_path):
    run(tmp_path/"r", max_steps=10)
    from torch import nn
    with pytest.raises(ValueError, match="another model"): run(tmp_path/"r", nn.Sequential(nn.Linear(4, 3)), resume=10, max_steps=20)


def test_nobody_else_s_checkpoints_are_removed_or_taken(tmp_path):
    theirs = tmp_path/"r/checkpoint-1"; theirs.mkdir(parents=True); (theirs/"model.bin").write_text("of another trainer")
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="holds checkpoint-1 of another training"): check_output(tmp_path/"r", resume)
    run(tmp_path/"r", keep=dict(save_steps=3, save_total_limit=1))
    assert (theirs/"model.bin").exists() and sorted(p.name for p in (tmp_path/"r").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-39"]


@pytest.mark.parametrize("logged", [True, False])
def test_a_run_goes_on_only_when_asked(tmp_path, logged):
    whole, net = run(tmp_path/"whole", logging_steps=20, keep=dict(metric_for_best_model=None), eval_steps=0)
    calls, options = [], dict(logging_steps=20, keep=dict(metric_for_best_model=None), eval_steps=0)
    def breaks(model, b):
        calls.append(1)
        if len(calls) == 18: raise RuntimeError("power")
        return loss_fn(model, b)
    with pytest.raises(RuntimeError): run(tmp_path/"r", loss_fn=breaks, **options)    # before the first row of its log
    files = {p: p.read_bytes() for p in (tmp_path/"r").glob("checkpoint-*/*")}
    if not logged: (tmp_path/"r/training_log.json").unlink()
    says = "checkpoint-15 of an earlier run.*give resume_from_checkpoint=True" if logged else "and no log of a run"
    with pytest.raises(FileExistsError, match=says): check_output(tmp_path/"r")
    with pytest.raises(FileExistsError, match="holds checkpoint-15 of an earlier run.*resume_step=last_checkpoint.*another output_dir"): run(tmp_path/"r", **options)
    assert files == {p: p.read_bytes() for p in (tmp_path/"r").glob("checkpoint-*/*")}    # all are as they were
    check_output(tmp_path/"r", True)
    again, other = run(tmp_path/"r", resume=last_checkpoint(tmp_path/"r"), **options)
    assert again.resumed_at == 15 and again.train_history == whole.train_history and same_weights(net, other)


def test_the_checkpoint_of_another_trainer_beside_a_log_is_no_place_to_go_on(tmp_path):
    RunLog(tmp_path/"r", progress=False).finish("failed", "out of memory"); (tmp_path/"r/checkpoint-8").mkdir()
    with pytest.raises(FileExistsError, match="checkpoint-8 of another training, and no checkpoint of ours"): check_output(tmp_path/"r")


def test_a_folder_that_another_program_writes_is_refused(tmp_path):
    code = f"from vlmcourse.runlog import RunLog; log = RunLog({str(tmp_path/'r')!r}, progress=False); print('go', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        writer.stdout.readline()                                            # no row has been logged yet
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"still running .process {writer.pid}"): check_output(tmp_path/"r", resume)
        writer.communicate("\n")
    check_output(tmp_path/"r")                                              # it is gone
    log = RunLog(tmp_path/"own", progress=False); check_output(log.output_dir, True); log.finish()


# --- best, early stop, plateau ---------------------------------------------------
def test_best_place_and_plateau_against_torch():
    rng = random.Random(0)
    for _ in range(200):
        values = [rng.choice([None, rng.randint(0, 5)/5]) for _ in range(rng.randint(1, 9))]
        there = [v for v in values if v is not None]
        for greater in (True, False):
            at = best_place(values, greater)
            assert at is None if not there else values[at] == (max if greater else min)(there) and values.index(values[at]) == at
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.)
            watch = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max" if greater else "min", factor=.5, patience=1)
            for v in there: watch.step(v)
            assert plateau_factor(values, greater) == optimizer.param_groups[0]["lr"]


def test_early_stop_and_resume_after_it_do_not_go_on(tmp_path):
    worse = iter(range(100))
    def evaluate(net): return dict(val_loss=float(next(worse)))
    log = RunLog(tmp_path/"r", progress=False)
    fit(make_net(), loss_fn, DATA, collate=collate, log=log, evaluate=evaluate, eval_steps=2, max_steps=30, checkpoints=Checkpoints(log, early_stopping_patience=3))
    assert [r["step"] for r in log.val_history] == [0, 2, 4, 6] and len(log.train_history) == 6 and log.best_checkpoint["step"] == 0


# --- the disk --------------------------------------------------------------------
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path):
    disk = tmp_path/"disk"; disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here; the limit on file sizes in lesson 12b_resume covers the same path")
    try:
        with pytest.raises(OSError, match=r"could not be written.*whole and stays.*resume_from_checkpoint"):
            run(disk/"r", keep=dict(save_steps=1, save_total_limit=1000), num_train_epochs=50, eval_steps=0)
        step = last_checkpoint(disk/"r")
        assert step > 1 and not list((disk/"r").glob(".tmp*")) and read_log(disk/"r")["train_history"][-1]["step"] >= step
        for p in sorted((disk/"r").glob("checkpoint-*"))[:-1]:                  # make room, go on
            if p.name != f"checkpoint-{step}": subprocess.run(["rm", "-r", str(p)], check=True)
        again, net = run(disk/"r", resume=step, num_train_epochs=50, eval_steps=0, max_steps=step+3)
        assert again.train_history[-1]["step"] == step+3
    finally: subprocess.run(["umount", str(disk)], check=True)


def test_replace_folder_keeps_the_old_one_when_writing_fails(tmp_path):
    replace_folder(tmp_path/"best", lambda p: (p/"a").write_text("old"))
    def fails(p): (p/"a").write_text("new"); raise OSError("full")
    with pytest.raises(OSError): replace_folder(tmp_path/"best", fails)
    assert (tmp_path/"best/a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["best"]


# --- opening -----------------------------------------------------------------------
def test_open_run_refuses_what_is_another_run(tmp_path):
    with open_run(tmp_path/"r", dict(learning_rate=1., data_hash="a"), plot=False) as log: log.finish("stopped")
    again = lambda **c: open_run(tmp_path/"r", c, resume_from_checkpoint=True, plot=False)
    with pytest.raises(ValueError, match="data_hash: was 'a', now 'b'"): again(learning_rate=1., data_hash="b")
    with pytest.raises(ValueError, match="new: was None, now 3"): again(learning_rate=1., data_hash="a", new=3)
    assert again(learning_rate=1., data_hash="a", save_steps=3, plot=True).status == "running"
    with pytest.raises(ValueError, match="needs output_dir"): check_output(None, True)


def test_the_device_of_the_model_decides_how_processes_talk(tmp_path, monkeypatch):
    import accelerate
    import vlmcourse.resume
    from vlmcourse.loop import Team
    shared, asked = {}, []                                                      # as PartialState: the first call decides for all
    class State:
        def __init__(self, cpu=False):
            self.__dict__ = shared
            if not shared: asked.append(cpu); shared.update(process_index=1, num_processes=2, device="cpu" if cpu else "cuda:1")
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1")): monkeypatch.setenv(name, value)
    monkeypatch.setattr(accelerate, "PartialState", State)
    monkeypatch.setattr(vlmcourse.resume, "of_all_processes", lambda value: [tmp_path])
    for found, config, device in (("cuda", dict(device=None), "cuda:1"), ("cuda", {}, "cuda:1"), ("cuda", dict(device="cpu"), "cpu"), ("cpu", {}, "cpu")):
        monkeypatch.setattr(vlmcourse.resume, "pick_device", lambda name=None: name or found)
        shared.clear(); asked.clear()
        check_output(tmp_path)
        assert asked == []                                                      # the model is not there yet
        assert not open_run(tmp_path, config, plot=False).writes and Team(cpu=True).device == device and asked == [device == "cpu"]


# --- SFT, killed at twenty random moments ----------------------------------------------
def _sft(folder, data, held_out):
    "One attempt, in a process of its own."
    torch.set_num_threads(1)
    from vlmcourse.sft import train
    train(data, held_out, output_dir=folder, max_steps=14, per_device_train_batch_size=4, eval_steps=4, save_steps=3, device="cpu", plot=False,
          metric_for_best_model="val_loss", resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def sft_data(tmp_path_factory):
    from vlmcourse.museum import make_records, save_records
    folder = tmp_path_factory.mktemp("data")
    return (save_records(make_records(24, tasks=["workshop"], split="train", seed=0), folder/"train"),
            save_records(make_records(8, tasks=["workshop"], split="test", seed=1), folder/"test"))


def test_sft_killed_at_twenty_random_moments_ends_the_same_bit_for_bit(tmp_path, sft_data):
    want = kill_and_compare(_sft, sft_data, tmp_path, kills=20)
    assert "samples.jsonl" in want[1] and len(want[0]["train_history"]) == 14


# --- two processes -------------------------------------------------------------------------
TWO = """
from vlmcourse.sft import train
train({!r}, {!r}, output_dir={!r}, max_steps=5, per_device_train_batch_size={}, eval_steps=2, device="cpu", plot=False)
"""


def test_two_processes_give_the_numbers_of_one_with_twice_the_batch(tmp_path, sft_data):
    one, two = (launch(TWO.format(*map(str, (*sft_data, tmp_path/name)), size), tmp_path/name, n) for name, n, size in (("one", 1, 6), ("two", 2, 3)))
    for a, b in zip(one["train_history"], two["train_history"], strict=True):
        assert (a["step"], a["epoch"], a["samples"]) == (b["step"], b["epoch"], b["samples"])
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
    for a, b in zip(one["val_history"], two["val_history"], strict=True):
        assert b["val_loss"] == pytest.approx(a["val_loss"], abs=1e-5) and b["val_accuracy"] == a["val_accuracy"]
    rows = [[json.loads(line) for line in (tmp_path/n/"samples.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert [r["id"] for r in rows[0]] == [r["id"] for r in rows[1]] and two["status"] == "finished"
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()].count("two") == 1 and (tmp_path/"two/final/adapter_model.safetensors").exists()

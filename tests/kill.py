"""Rough treatment of a training: killed at random moments, or shared by several processes.

A test that uses it:

    def attempt(folder, data, held_out):                    # a function of the test module (not inside another one)
        torch.set_num_threads(1)
        train(data, held_out, output_dir=folder, resume_from_checkpoint=True, ...)

    def test_killed(tmp_path): kill_and_compare(attempt, (data, held_out), tmp_path, kills=10)

`kill_and_compare` runs `attempt` once undisturbed in tmp_path/"whole", then in further folders, where each attempt gets SIGKILL after a random amount of
its own processor time (so a busy machine changes nothing) and is started again until it ends by itself. Every end must equal the undisturbed one bit for
bit: log rows, weights, samples. It goes on until `kills` kills have happened. `launch(code, folder, processes)` runs Python code in one or more processes.
"""
import multiprocessing as mp
import os
import random
import subprocess
import sys
from pathlib import Path

import psutil

from vlmcourse.runlog import read_log

PRELOAD = ["vlmcourse.sft", "vlmcourse.dpo", "vlmcourse.grpo", "transformers.models.qwen3_vl.modeling_qwen3_vl", "transformers.models.auto.processing_auto",
           "peft", "matplotlib.figure", "pytest"]  # one fork server serves all tests of a pytest process


def outcome(folder, files=("samples.jsonl",)):
    "Everything that must not depend on kills: (rows of the log, {name of a file: its bytes}); all weights belong to it, and the named files."
    log = {k: v for k, v in read_log(folder).items() if k in ("status", "train_history", "val_history", "best_checkpoint")}
    return log, {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.suffix == ".safetensors" or p.name in files}


def _run(attempt, folder, arguments, limit=float("inf")):
    "One attempt in a process of its own; (processor time in seconds, exit code, which is -9 after a kill at `limit`)."
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process, spent = context.Process(target=attempt, args=(folder, *arguments)), 0.
    process.start()
    watched = psutil.Process(process.pid)
    while process.exitcode is None:
        try: spent = sum(watched.cpu_times()[:2])
        except psutil.NoSuchProcess: break
        if spent >= limit: process.kill()
        process.join(.005)
    process.join()
    return spent, process.exitcode


def _finished(folder):
    "Does the log say that the run has come to its end?"
    try: return read_log(folder)["status"] == "finished"
    except (FileNotFoundError, ValueError): return False


def kill_and_compare(attempt, arguments, folder, *, kills, files=("samples.jsonl",), seed=0):
    "Kill attempts until `kills` kills have happened; returns the outcome of the undisturbed run, to which all others were equal."
    took, code = _run(attempt, folder/"whole", arguments)
    assert code == 0
    want, rng, done, runs = outcome(folder/"whole", files), random.Random(seed), 0, 0
    assert {"final/adapter_model.safetensors", "best/adapter_model.safetensors"} <= set(want[1])
    while done < kills:
        assert runs < 4 * kills, "the runs end before they can be killed"
        runs, here, code = runs + 1, folder/f"run-{runs}", -9
        while code == -9 and not _finished(here):         # a kill may come when all is written, before the process is gone
            _, code = _run(attempt, here, arguments, rng.uniform(.2, 1) * took if done < kills else float("inf"))
            done += code == -9
        assert code == 0 or _finished(here)
        got = outcome(here, files)
        assert got[0] == want[0]
        assert got[1].keys() == want[1].keys() and [name for name in want[1] if got[1][name] != want[1][name]] == []
    return want


def launch(code, folder, processes):
    "Run Python code that trains into `folder`, in so many processes; returns the log."
    file = folder.with_suffix(".py")
    file.write_text(f"import sys, torch\nsys.path.insert(0, {str(Path(__file__).parents[1])!r})\ntorch.set_num_threads(1)\n{code}")
    words = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([sys.executable, *words, str(file)], capture_output=True, text=True, timeout=600,
                          env=os.environ | dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    return read_log(folder)

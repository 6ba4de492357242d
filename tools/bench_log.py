"""Time what a training step pays for its log, beside a training step of the course's tiny model.

    python tools/bench_log.py [--steps 2000] [--rounds 5] [--model tiny]

The ways to log take turns, round by round; printed are the lowest, the median and the highest round. Two times are measured for
each: the time on the clock in which the training waits for the log, and the processor time of the whole program until the log is
finished, with the threads of the boards. --model none leaves the training step out.
"""
import argparse
import importlib.util
import io
import os
import statistics
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path

from vlmcourse.runlog import RunLog, log_html

BOARDS = ("tensorboard", "wandb", "trackio")


class Picture:
    "The live picture of a notebook, without a notebook: the same work, at most five times a second."
    def __init__(self):
        self.drawn = self.cost = 0.0

    def line(self, text):
        pass

    def update(self, log, now=False):
        t = time.perf_counter()
        if now or t - self.drawn >= max(.2, 20 * self.cost):
            log_html(log)
            self.drawn = time.perf_counter()
            self.cost = self.drawn - t


def cost(steps, picture=False, asked=False, **options):
    "(ms on the clock that a step waits, ms of processor time for a step until all is written)"
    with tempfile.TemporaryDirectory() as tmp, redirect_stderr(io.StringIO()):
        log = RunLog(Path(tmp) / "run", progress=False, **options)
        log._display = Picture() if picture else None
        log.start(steps)
        clock, cpu = time.perf_counter(), time.process_time()
        for i in range(1, steps + 1):
            log.train(step=i, epoch=i / 100, samples=8 * i, loss=1 / i, lr=1e-3, grad_norm=.5)
            if asked:
                log.asked
        clock = time.perf_counter() - clock
        log.finish()
        return clock / steps * 1e3, (time.process_time() - cpu) / steps * 1e3


def training_steps(model, n):
    "Milliseconds on the clock of n training steps of 8 records: the answers of the museum, LoRA, as in lesson 14_sft."
    from vlmcourse.core import sample_path
    from vlmcourse.formats import read_records
    from vlmcourse.lora import add_lora
    from vlmcourse.loop import make_optimizer, train_step
    from vlmcourse.sft import EncodedRecords, join, sft_loss
    from vlmcourse.vlm import load_vlm
    model, processor = load_vlm(model, device="cpu")
    model = add_lora(model, r=16, lora_alpha=32).train()
    items = EncodedRecords(processor, read_records(sample_path("workshop", "records.json")))
    batch = join([items[i] for i in range(8)], processor.tokenizer.pad_token_id)
    optimizer, took = make_optimizer(model), []
    for _ in range(n + 1):
        t = time.perf_counter()
        train_step(model, sft_loss, [batch], optimizer=optimizer)
        took.append((time.perf_counter() - t) * 1e3)
    return took[1:]


def line(name, values, unit="ms"):
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f"{name:44} min {low:9.4f}  median {middle:9.4f}  max {high:9.4f} {unit}", flush=True)
    return middle


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=2000, help="logged steps in a round")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--model", default="tiny", help="model of the training step, or none")
    a = p.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp(prefix="bench_log_"))
    ways = {"file": {}, "file, asked each step": dict(asked=True), "file and picture": dict(picture=True)}
    for name in BOARDS:
        if importlib.util.find_spec(name):
            ways[f"file and {name}"] = dict(report_to=name)
        else:
            print(f"{name} is not installed: left out")
    seen = {name: [] for name in ways}
    for i in range(a.rounds + 1):                       # the first round warms up and is not counted
        for name, options in ways.items():
            found = cost(a.steps if i else 20, **options)
            if i:
                seen[name].append(found)
    step = None if a.model == "none" else line(f"a training step of {a.model}, 8 records", training_steps(a.model, 2 * a.rounds))
    for name, found in seen.items():
        wait = line(f"{name}: training waits", [f[0] for f in found], "ms a step")
        line(f"{name}: processor, to the end", [f[1] for f in found], "ms a step")
        if step:
            print(f"{'':44} the wait is {wait / step:.3%} of the training step (medians)")


if __name__ == "__main__":
    main()

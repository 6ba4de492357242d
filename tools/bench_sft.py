"""How much faster SFT of lesson 14 is than TRL's SFTTrainer: whole runs, the same data in the same order, the same losses.

    python tools/bench_sft.py [--size tiny] [--records 160] [--questions 1 4] [--epochs 3] [--reps 3]

Each way runs in a process of its own (for its peak memory), and the processes take turns, so that a busy machine slows all of them alike. Ratios are of
processor time, from the same round; min / median / max. `run` is everything from the name of the model to the saved adapter, `steps` the training loop
alone. The first line says how far the loss curves are apart. Both train the same adapter on the language model; tower and projector are frozen.
How much is gained depends on the data, so there are two tables: photos that come once share only their features with the next epoch; several questions about
one photo share its prefix, too.

trl      TRL's SFTTrainer as one would set it up on a CPU: single precision, its own data loader, no gradient checkpointing
default  the same with gradient checkpointing, which is TRL's default
ours     vlmcourse.sft.train; with several questions about a photo and group_by_picture=True (the others get the same order)
rows     ours, but questions about one photo do not share its beginning
"""
import argparse
import contextlib
import math
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from itertools import islice
from pathlib import Path

from bench_prefix import SIZES, random_model

BATCH, RATE, WARMUP = 8, 2e-3, .05


def make_data(n, questions, px):
    "Questions about the museum's photos, so many about each."
    import numpy as np
    from vlmcourse.museum import ask_scene, make_record, make_scene
    tasks, rng, data = ["caption", "steps", "count", "things", "count_by", "presence", "quality", "colour"], np.random.default_rng(0), []
    for seed in range(n):
        scene = make_scene(seed, kind="shelf", n_vases=4, defect="sharp")
        asked = [(task, ask_scene([scene], task, rng)) for task in tasks]
        asked = [(task, *said) for task, said in asked if said][:questions]
        data += [make_record([scene], *words, id=f"{seed}-{words[0]}", size=px) for words in asked]
        if len(data) >= n: return data[:n]


def name_groups(data, questions):
    "The photo of each record; None: one question for each photo."
    return [r["id"].split("-")[0] for r in data] if questions > 1 else None


def save_model(size, folder):
    "The random model as a folder that both load; the tiny one has a name."
    from vlmcourse.vlm import load_vlm
    if not SIZES[size]: return "tiny"
    model, processor = load_vlm("tiny", device="cpu")
    model, processor = random_model(SIZES[size], model.config, processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def in_order(data, questions, epochs):
    "The records of all steps, as the loop of lesson 12 takes them."
    from vlmcourse.loop import step_rows
    steps = step_rows(len(data), BATCH, 0, name_groups(data, questions))
    return [data[i] for rows in islice(steps, epochs * math.ceil(len(data) / BATCH)) for i in rows]


def trl_run(name, data, questions, epochs, checkpointing):
    "A function that trains with TRL and gives the losses and the processor time of the steps."
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from vlmcourse.core import set_seed
    from vlmcourse.lora import add_lora
    from vlmcourse.vlm import load_vlm
    def row(record):
        asked, said = record["messages"]
        return dict(images=record["images"], prompt=[{**asked, "content": asked["content"].replace("<image>", "")}], completion=[said])
    rows = Dataset.from_list([row(record) for record in in_order(data, questions, epochs)])
    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__): self.began = time.process_time()
        def on_train_end(self, *_, **__): self.took = time.process_time() - self.began
    def train():
        set_seed(0)
        model, processor = load_vlm(name, device="cpu")
        model, losses, clock, folder = add_lora(model, r=16, lora_alpha=32), [], Clock(), tempfile.mkdtemp()
        args = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=checkpointing, max_length=None,
                         completion_only_loss=True, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="cosine",
                         warmup_steps=math.ceil(WARMUP * len(rows) / BATCH), num_train_epochs=1, train_sampling_strategy="sequential",
                         save_strategy="no", logging_steps=1, disable_tqdm=True)
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=processor, callbacks=[clock])
        collate, compute, line_break = trainer.data_collator, trainer.compute_loss, processor.tokenizer.encode("\n")[-1]
        def without_line_break(records):  # TRL trains on the one behind the end mark, too: nothing that generation ever reaches
            batch = collate(records)
            batch["labels"][batch["labels"] == line_break] = -100
            return batch
        def noted(*args, **kwargs):
            loss = compute(*args, **kwargs)
            losses.append(loss.item())
            return loss
        trainer.data_collator, trainer.compute_loss = without_line_break, noted
        trainer.train()
        trainer.save_model(folder)
        return losses, clock.took, 0.
    return train


def own_run(name, data, questions, epochs, share):
    "The same with lesson 14."
    from vlmcourse import sft
    from vlmcourse.runlog import RunLog
    fit, write, took = sft.fit, RunLog.train, dict(steps=0., log=0.)
    def clocked(what, function):
        def run(*args, **kwargs):
            began = time.process_time()
            try: return function(*args, **kwargs)
            finally: took[what] += time.process_time() - began
        return run
    sft.fit, RunLog.train = clocked("steps", fit), clocked("log", write)
    if not share: sft.join_shared = lambda *_: None
    def train():
        took.update(steps=0., log=0.)
        run = sft.train(data, model=name, output_dir=tempfile.mkdtemp(), num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=RATE,
                        warmup_ratio=WARMUP, device="cpu", plot=False, group_by_picture=questions > 1)
        return [row["loss"] for row in run.log["train_history"]], took["steps"], took["log"]
    return train


def worker(pipe, *what):
    "A worker's mistake is shown by the main process."
    try: work(pipe, *what)
    except Exception: pipe.send(traceback.format_exc())


def receive(pipe):
    "What a worker says; the program ends when it is a mistake."
    said = pipe.recv()
    if isinstance(said, str) and said != "ready": sys.exit(said)
    return said


def work(pipe, way, name, px, n, questions, epochs):
    "Train once whenever asked; send seconds, losses and peak memory."
    warnings.filterwarnings("ignore")
    import torch
    torch.set_num_threads(1)
    data = make_data(n, questions, px)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        start = lambda *what: own_run(*what, way == "ours") if way in ("ours", "rows") else trl_run(*what, way == "default")
        start("tiny", make_data(BATCH, 1, 96), 1, 1)()  # one step, so that everything is imported
        train = start(name, data, questions, epochs)
        pipe.send("ready")
        for _ in iter(pipe.recv, None):
            began = time.process_time()
            losses, steps, log = train()
            pipe.send((time.process_time() - began, steps, log, losses, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6))


def show(ways, seen, steps):
    "One line for each way."
    first = seen[ways[0]]
    apart = {way: max(abs(a - b) for a, b in zip(first[0][3], rounds[0][3])) for way, rounds in seen.items()}
    print(f"losses of {ways[0]}: {first[0][3][0]:.5f} to {first[0][3][-1]:.5f}; largest distance of a step: "
          + ", ".join(f"{way} {apart[way]:.1e}" for way in ways[1:]))
    for way, rounds in seen.items():
        spread = lambda i: " ".join(f"{x:5.2f}" for x in (lambda v: (min(v), statistics.median(v), max(v)))([f[i] / r[i] for f, r in zip(first, rounds)]))
        took, log = statistics.median(r[0] for r in rounds), statistics.median(r[2] for r in rounds)
        more = f"   log {log / steps * 1000:.2f} ms a step ({log / took:.1%})" if log else ""
        print(f"{way:8s}{took:8.2f} s   times faster: run {spread(0)}   steps {spread(1)}   peak {rounds[-1][4]:.2f} GB{more}", flush=True)


def measure(a, ways, questions):
    "All rounds with so many questions about a photo, and their table."
    context, pipes, busy = multiprocessing.get_context("spawn"), {}, []
    with tempfile.TemporaryDirectory() as folder:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            name, px = save_model(a.size, str(Path(folder) / "model")), SIZES[a.size][-1] if SIZES[a.size] else 96
        for way in ways:
            pipes[way], there = context.Pipe()
            busy.append(context.Process(target=worker, args=(there, way, name, px, a.records, questions, a.epochs), daemon=True))
            busy[-1].start()
            there.close()
            receive(pipes[way])
        seen = {way: [] for way in ways}
        for number in range(a.reps):
            for way, pipe in pipes.items():
                pipe.send(number)
                seen[way].append(receive(pipe))
        for pipe in pipes.values(): pipe.send(None)
        for process in busy: process.join()
    steps = a.epochs * a.records // BATCH
    print(f"{a.size}: {a.records} records, {questions} about each photo, {a.epochs} epochs, {steps} steps of {BATCH}, {a.reps} rounds")
    show(ways, seen, steps)


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--size", choices=SIZES, default="tiny")
    parse.add_argument("--records", type=int, default=160, help=f"records; a multiple of {BATCH}")
    parse.add_argument("--questions", type=int, nargs="+", default=[1, 4], help="questions about each photo; with 1 there is nothing to share but the features")
    parse.add_argument("--epochs", type=int, default=3)
    parse.add_argument("--reps", type=int, default=3, help="rounds, after a single step to warm up")
    parse.add_argument("--ways", default="trl,ours")
    a = parse.parse_args()
    if a.records % BATCH: parse.error(f"--records {a.records}: take a multiple of {BATCH}, so that both cut the same batches")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for questions in a.questions: measure(a, a.ways.split(","), questions)


if __name__ == "__main__":
    main()

"""One GRPO step of lesson 17 against stock TRL on the same work: processor time and peak memory.

    python tools/bench_grpo.py [--size tiny] [--prompts 4] [--generations 8] [--tokens 32] [--reps 5]

Every way runs in a process of its own (for its peak memory), and the processes take turns, so that a busy machine slows all of
them alike. Ratios are of processor time within the same round; min / median / max. All answers have the same length (no end mark).

trl      GRPOTrainer as it is, without anything that it could leave out (no reference, no logging of completions)
share    the same trainer on a model that went through `vlmcourse.prefix.share`
own      the step of `vlmcourse.grpo`: pictures seen before; new: the same with pictures not seen before

The last line says how much arithmetic a step of `own` is (torch's FlopCounterMode), and which share of the machine's limit it reaches: that of
one large product of fp32 matrices on one thread, measured just before. With --profile WAY, where the processor time of that way goes.
"""
import argparse
import contextlib
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial

from bench_prefix import SIZES, build, records

WAYS = ("trl", "share", "own", "new")


def pays(completions, **columns):
    "A reward that differs within every group."
    return [float(i % 3) for i in range(len(completions))]


def trl_steps(model, processor, data, args, shared, seen=None):
    "Seconds of every step of TRL's trainer; `seen`, a profiler, sees the steps alone."
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    from vlmcourse.prefix import share
    ask = lambda r: r["messages"][0]["content"].replace("<image>", "")
    rows = Dataset.from_list([dict(prompt=[dict(role="user", content=ask(r))], images=r["images"]) for r in data])
    sharing = share(model) if shared else None
    marks = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *a, **k): marks.append(time.process_time())
        def on_step_end(self, *a, **k): marks.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(output_dir=folder, max_steps=args.reps + 1, per_device_train_batch_size=args.prompts * args.generations, num_generations=args.generations,
                            max_completion_length=args.tokens, learning_rate=1e-4, lr_scheduler_type="constant", beta=0., use_cpu=True, bf16=False, report_to="none",
                            save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, logging_steps=10**6, seed=0, generation_kwargs=dict(suppress_tokens=[processor.tokenizer.eos_token_id]))
        trainer = GRPOTrainer(model=model, args=config, train_dataset=rows, processing_class=processor, reward_funcs=pays, callbacks=[Clock])
        trainer.remove_callback(PrinterCallback)
        real, count = trainer._prepare_inputs, []

        def prepare(*a, **k):  # sampling happens before on_step_begin: the clock starts here
            count.append(time.process_time())
            return real(*a, **k)

        trainer._prepare_inputs = prepare
        if seen:
            trainer.training_step = partial(seen.runcall, trainer.training_step)
        trainer.train()
    if sharing and not sharing.counts["generate: shared"]:
        raise RuntimeError(f"share did not serve the sampling:\n{sharing}")
    ends = marks[1::2]
    return [end - start for start, end in zip(count, ends)]


def own_steps(model, processor, data, args, new, seen=None):
    "Seconds of every step of the lesson's own loop; `seen`, a profiler, sees the steps alone."
    import inspect
    from vlmcourse.grpo import Sampler, _take_step, train
    from vlmcourse.loop import make_optimizer
    from vlmcourse.prefix import FeatureCache
    settings = {name: p.default for name, p in inspect.signature(train).parameters.items()}
    settings |= dict(per_device_train_batch_size=args.prompts, num_generations=args.generations, max_completion_length=args.tokens, learning_rate=1e-4)
    sampler, found = Sampler(model, processor, data, [pays], settings), []
    sampler.start, optimizer = None, make_optimizer(model, learning_rate=1e-4)
    for step in range(args.reps + 1):
        if new:
            sampler.cache = FeatureCache(model)
        start = time.process_time()
        with seen or contextlib.nullcontext():
            pieces, _ = sampler(step + 1, list(range(args.prompts)))
            _take_step(sampler, pieces, optimizer, "bench")
        found.append(time.process_time() - start)
    return found


def gemm_limit():
    "FLOP per second of processor time of one large fp32 product."
    import torch
    a, found = torch.randn(1024, 1024), []
    for _ in range(6):
        start = time.process_time()
        a @ a
        found.append(2 * 1024**3 / (time.process_time() - start))
    return max(found)


def work_of_a_step(model, processor, data, args):
    "FLOP of one step of the lesson's own loop."
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        own_steps(model, processor, data, argparse.Namespace(**vars(args) | dict(reps=0)), True)
    return counter.get_total_flops()


def profile(steps):
    "Print the 25 functions and operations in which a way spends most processor time."
    import cProfile
    import pstats
    seen = cProfile.Profile(time.process_time)
    steps(seen=seen)
    pstats.Stats(seen).sort_stats("tottime").print_stats(25)


def worker(queue, turn, way, args):
    "A worker's mistake is shown by the main process."
    try:
        work(queue, turn, way, args)
    except Exception:
        queue.put(traceback.format_exc())


def work(queue, turn, way, args):
    warnings.filterwarnings("ignore")
    import torch
    torch.set_num_threads(1)
    model, processor = build(args.size)
    data = records(args.prompts, SIZES[args.size][-1] if SIZES[args.size] else 96, seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with turn:
        run = own_steps if way in ("own", "new") else trl_steps
        steps = partial(run, model, processor, data, args, way in ("new", "share"))
        found = steps()
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
        more = (gemm_limit(), work_of_a_step(model, processor, data, args)) if way == "new" else None
        if way == args.profile:
            profile(steps)
    queue.put((way, found[1:], peak, more))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    for name, default in (("prompts", 4), ("generations", 8), ("tokens", 32), ("reps", 5), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--profile", choices=WAYS)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context, times, memory = multiprocessing.get_context("spawn"), {}, {}
    for number in range(1, args.rounds + 1):
        queue, turn = context.Queue(), context.Lock()
        for way in WAYS:  # one after the other within a round; rounds repeat the order
            process = context.Process(target=worker, args=(queue, turn, way, args))
            process.start()
            said = queue.get(timeout=3600)
            process.join()
            if isinstance(said, str):
                raise SystemExit(said)
            name, found, peak, more = said
            limit, flops = more or (0, 0)
            times.setdefault(name, []).append(statistics.median(found))
            memory[name] = max(memory.get(name, 0), peak)
            print(f"round {number} of {args.rounds}: {name} {times[name][-1]:.3f} s a step", file=sys.stderr, flush=True)
    print(f"{args.size}: {args.prompts} questions × {args.generations} answers × {args.tokens} tokens, one thread, {args.rounds} rounds of {args.reps} steps")
    for way in WAYS:
        ratios = sorted(t / o for t, o in zip(times["trl"], times[way]))
        low, middle, high = ratios[0], statistics.median(ratios), ratios[-1]
        print(f"{way:6} {statistics.median(times[way]):7.3f} s a step   {low:5.2f} / {middle:5.2f} / {high:5.2f} times less than TRL   {memory[way]:6.2f} GB above loading")
    rate = flops / statistics.median(times["new"])
    print(f"a step of new: {flops / 1e9:.1f} GFLOP, {rate / 1e9:.1f} GFLOP/s; the limit of one core, {limit / 1e9:.0f} GFLOP/s, is reached to {rate / limit:.0%}")


if __name__ == "__main__":
    main()

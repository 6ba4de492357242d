"""How much faster a DPO step of lesson 15 is than the same step of TRL's DPOTrainer.

    python tools/bench_dpo.py [--size tiny] [--pairs 8] [--reps 5]

Both do the same work: forward pass of policy and reference on chosen and rejected answers, and the gradients of the adapter. Each runs in a process of its
own (for its peak memory), and the processes take turns, so that a busy machine slows all of them alike. Ratios are of processor time, from the
same round; min / median / max. The first line shows the losses;
TRL's differs a little because it also counts the line break behind the end mark (see lesson 15).

trl      TRL's DPOTrainer.compute_loss and backward on a batch made by its own collator; share: the same after `share(model)`
new      lesson 15, pictures and pairs never seen before: features and reference are computed in the step
cached   lesson 15 from the second epoch on: features and reference are kept
"""
import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings

from bench_prefix import SIZES, build, records


def make_pairs(n, px, words, seed):
    "Pairs about pictures of noise, with answers of about so many words."
    import random
    from vlmcourse.dpo import to_pair
    rng = random.Random(seed)
    say = lambda: " ".join(rng.choices(["red", "blue", "kylix", "vase", "lamp", "shelf"], k=words)) + "."
    return [to_pair(record, say(), say()) for record in records(n, px, seed)]


def trl_step(model, processor, share, beta):
    "A function: pairs -> loss, gradients made."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from vlmcourse import prefix
    from vlmcourse.vlm import to_parts
    say = lambda text: [dict(role="assistant", content=[dict(type="text", text=text)])]
    def rows(pairs):
        return [dict(prompt=[to_parts(p["messages"][0])], images=p["images"], chosen=say(p["chosen"]), rejected=say(p["rejected"])) for p in pairs]
    args = DPOConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, max_length=None,
                     beta=beta, disable_tqdm=True)
    model.train()
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows(make_pairs(2, 32, 3, 0))), processing_class=processor)
    if share: prefix.share(model)
    def step(pairs):
        data = rows(pairs)
        loss = trainer.compute_loss(model, trainer.data_collator(data))
        loss.backward()
        return loss.item()
    return step


def own_step(model, processor, cached, beta):
    "The same with lesson 15."
    from vlmcourse.dpo import EncodedPairs, dpo_loss, keep_reference
    from vlmcourse.prefix import adapter_off
    kept = {}
    def encode(pairs):
        items = EncodedPairs(model, processor, pairs)
        with adapter_off(model): keep_reference(items)
        return items
    def step(pairs):
        if cached and not kept: kept[0] = encode(pairs)
        items = kept[0] if cached else encode(pairs)
        loss, n, _ = dpo_loss(model, items.batch(range(len(pairs))), beta=beta)
        (loss / n).backward()
        return loss.item() / n
    return step


def worker(pipe, way, size, n, words):
    "Do one round whenever asked; send seconds, loss and peak memory."
    warnings.filterwarnings("ignore")
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)  # the same adapter in every process
    model, processor = build(size)
    px = SIZES[size][-1] if SIZES[size] else 96
    if way in ("trl", "share"):
        # TRL takes a copy of the adapter as its reference: let that be the untrained one, as in lesson 15
        weights = {k: w.detach().clone() for k, w in model.named_parameters() if "lora_B" in k}
        for k, w in model.named_parameters():
            if k in weights: w.data.zero_()
        step = trl_step(model, processor, way == "share", .1)
        for k, w in model.named_parameters():
            if k in weights: w.data.copy_(weights[k])
    else: step = own_step(model, processor, way == "cached", .1)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send("ready")
    for number in iter(pipe.recv, None):
        pairs = make_pairs(n, px, words, seed=0 if way == "cached" else number)
        model.zero_grad(set_to_none=True)
        began = time.process_time()
        loss = step(pairs)
        pipe.send((time.process_time() - began, loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, start / 1e6))


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--size", choices=SIZES, default="tiny")
    parse.add_argument("--pairs", type=int, default=8, help="pairs of a step")
    parse.add_argument("--words", type=int, default=16, help="words of an answer")
    parse.add_argument("--reps", type=int, default=5, help="rounds, after one to warm up")
    parse.add_argument("--ways", default="trl,share,new,cached")
    a = parse.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context, work, seen = multiprocessing.get_context("spawn"), {}, {}
    for way in a.ways.split(","):
        here, there = context.Pipe()
        context.Process(target=worker, args=(there, way, a.size, a.pairs, a.words), daemon=True).start()
        assert here.recv() == "ready"
        work[way], seen[way] = here, []
    for number in range(a.reps + 1):
        for way, pipe in work.items():
            pipe.send(number)
            seen[way].append(pipe.recv())
    first = next(iter(seen.values()))
    print(f"{a.size}: {a.pairs} pairs, answers of {a.words} words, {a.reps} rounds; losses of round 0: "
          + ", ".join(f"{way} {rounds[0][1]:.4f}" for way, rounds in seen.items()))
    for way, rounds in seen.items():
        ratios = [f[0] / r[0] for f, r in zip(first[1:], rounds[1:])]
        took = statistics.median(r[0] for r in rounds[1:])
        print(f"{way:7s} {took:7.3f} s   times faster: {min(ratios):5.2f} {statistics.median(ratios):5.2f} {max(ratios):5.2f}   "
              f"peak {rounds[-1][2]:.2f} GB (loaded {rounds[-1][3]:.2f})")
    for pipe in work.values():
        pipe.send(None)


if __name__ == "__main__":
    main()

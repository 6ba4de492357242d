"""Can SFT, DPO and GRPO each teach the tiny model something that holds on unseen photos? `python tools/headroom.py --help`

Each demonstration trains a LoRA adapter on photos of the train split and compares the model before and after on photos of the test split,
greedy (the most likely token each time) and sampled (temperature 1). DPO and GRPO run through stock TRL. The design of the museum and of the
pretraining mix is judged by this table. `--save` keeps it as headroom.json and headroom.md beside the model card."""
import argparse
import contextlib
import os
import tempfile
import time
import warnings

import numpy as np
import torch

from vlmcourse.core import read_json, set_seed, write_json, write_text
from vlmcourse.detection import measure_boxes
from vlmcourse.evaluate import paired_gain, score_answers
from vlmcourse.lora import add_lora
from vlmcourse.museum import make_records
from vlmcourse.sft import train as sft_train
from vlmcourse.similarity import measure_captions
from vlmcourse.vlm import ask_batch, find_model, load_vlm, quiet_transformers, to_parts

N = 240  # held-out questions of every demonstration


# measures: each gives one number from 0 to 1 per record (None where it does not apply); more is better
def measure_answers(answers, records):
    "Right in the wanted form, right in any form, wanted form."
    rows = score_answers(answers, records)
    return {k: [float(r[k]) for r in rows] for k in ("strict", "lenient", "format")}


def ask_all(model, processor, records, measure, seed):
    "Greedy and sampled answers, measured."
    set_seed(seed)
    return {how: measure(ask_batch(model, processor, records, batch_size=64, max_new_tokens=112, do_sample=how == "sampled", progress=False), records)
            for how in ("greedy", "sampled")}


def compare(before, after):
    "One row per way of answering and measure."
    rows = []
    for how in before:
        for name in before[how]:
            b, a = ([x for x in s[how][name] if x is not None] for s in (before, after))
            g = paired_gain(b, a)
            rows.append(dict(how=how, measure=name, n=g.n, before=float(np.mean(b)), after=float(np.mean(a)), gain=g.gain, low=g.low, high=g.high))
    return rows


@contextlib.contextmanager
def clock(result):
    "Seconds and CPU-seconds of what runs inside."
    t, c = time.time(), time.process_time()
    yield
    result["seconds"], result["cpu_seconds"] = time.time()-t, time.process_time()-c


def rows_for_trl(records, **columns):
    "Records as a TRL data set: pictures and a conversation with parts."
    from datasets import Dataset
    rows = [dict(prompt=[to_parts(r["messages"][0])], images=r["images"], **{k: v[i] for k, v in columns.items()}) for i, r in enumerate(records)]
    return Dataset.from_list(rows)


def trl_settings(folder, seed, **more):
    return dict(output_dir=folder, seed=seed, logging_steps=1, report_to="none", save_strategy="no", use_cpu=not torch.cuda.is_available(), bf16=False,
                gradient_checkpointing=False, disable_tqdm=True, remove_unused_columns=False, lr_scheduler_type="constant_with_warmup", **more)


def run_quietly(trainer):
    "Train without a printed line per step."
    from transformers import PrinterCallback
    trainer.remove_callback(PrinterCallback)
    trainer.train()


# the demonstrations
def sft(name, seed):
    "The rule of the workshops, which pretraining never shows, in the final-answer form: skill and format."
    old = ["colour", "shape", "pattern", "count", "presence", "left_right"]
    data = make_records(300, ["workshop"], seed=seed)+make_records(100, old, seed=seed+500)
    test = make_records(N, ["workshop"], split="test", seed=seed+1)
    result, (model, processor) = {}, load_vlm(name)
    before = ask_all(model, processor, test, measure_answers, seed)
    with tempfile.TemporaryDirectory() as folder, clock(result):
        run = sft_train(data, model=name, num_train_epochs=5, seed=seed, output_dir=folder+"/run", plot=False)
    return result | dict(steps=len(run.log["train_history"]), rows=compare(before, ask_all(run.model, processor, test, measure_answers, seed)))


def _pairs(drawn, records):
    "Of several captions of each photo: an exact one before one that leaves a thing out, and as many before one that invents a thing."
    found = dict(things_named=[], nothing_invented=[])
    for texts, record in zip(drawn, records):
        m = measure_captions(texts, [record]*len(texts))
        exact = [t and v in (None, 1) and r for t, v, r in zip(m["nothing_invented"], m["things_named"], m["readable"])]
        best = lambda some: max((i for i in range(len(texts)) if some[i]), key=lambda i: m["vases_named"][i], default=None)
        for wrong, pairs in found.items():
            good, bad = best(exact), best([w not in (None, 1) and r for w, r in zip(m[wrong], m["readable"])])
            if good is not None and bad is not None and m["vases_named"][good] >= m["vases_named"][bad]:
                pairs.append((record, texts[good], texts[bad]))
    return found["things_named"]+found["nothing_invented"][:len(found["things_named"])]


def shelf_captions(n, split, seed):
    "Records that ask for a caption of a shelf."
    found = [r for r in make_records(3*n, ["caption"], split=split, seed=seed) if r["meta"]["scenes"][0]["kind"] == "shelf"]
    return found[:n]


def dpo(name, seed, learning_rate=1.5e-4, steps=60, n=480):
    "Captions without invented things, from pairs of the model's own captions."
    from trl import DPOConfig, DPOTrainer
    test, result, (model, processor) = shelf_captions(N, "test", seed+1), {}, load_vlm(name)
    before = ask_all(model, processor, test, measure_captions, seed)
    with tempfile.TemporaryDirectory() as folder, clock(result):
        set_seed(seed)
        source = shelf_captions(n, "train", seed)
        drawn = [ask_batch(model, processor, source, batch_size=64, max_new_tokens=64, do_sample=True, progress=False) for _ in range(4)]
        pairs = _pairs(list(zip(*drawn)), source)
        say = lambda text: [dict(role="assistant", content=[dict(type="text", text=text)])]
        data = rows_for_trl([p[0] for p in pairs], chosen=[say(p[1]) for p in pairs], rejected=[say(p[2]) for p in pairs])
        args = DPOConfig(**trl_settings(folder, seed, max_steps=steps, per_device_train_batch_size=16, learning_rate=learning_rate, warmup_steps=5,
                                        beta=.1, max_length=None))
        trainer = DPOTrainer(model=add_lora(model), args=args, train_dataset=data, processing_class=processor)
        run_quietly(trainer)
    last = [h for h in trainer.state.log_history if "rewards/accuracies" in h][-10:]
    seen = {k: float(np.mean([h[k] for h in last])) for k in ("loss", "rewards/accuracies", "rewards/margins")}
    return result | dict(steps=steps, pairs=len(pairs), learning_rate=learning_rate, last_10_steps=seen,
                         rows=compare(before, ask_all(trainer.model, processor, test, measure_captions, seed)))


def _texts(completions):
    return [c if isinstance(c, str) else c[0]["content"] if isinstance(c[0]["content"], str) else c[0]["content"][0]["text"] for c in completions]


def run_grpo(name, seed, task, measure, reward, steps, learning_rate, max_new_tokens):
    "GRPO through TRL on one task; `reward` names measures whose sum is the reward."
    from trl import GRPOConfig, GRPOTrainer
    data, test = make_records(512, [task], seed=seed), make_records(N, [task], split="test", seed=seed+1)
    result, (model, processor) = {}, load_vlm(name)
    before = ask_all(model, processor, test, measure, seed)
    processor.tokenizer.padding_side = "left"  # TRL 1.16 counts the positions of padded prompts right only so (lesson 12a)

    def pays(completions, number, **_):
        m = measure(_texts(completions), [data[i] for i in number])
        return [sum(m[k][i] for k in reward) for i in range(len(number))]

    with tempfile.TemporaryDirectory() as folder, clock(result):
        args = GRPOConfig(**trl_settings(folder, seed, max_steps=steps, per_device_train_batch_size=64, num_generations=8, learning_rate=learning_rate,
                                         warmup_steps=2, max_completion_length=max_new_tokens, temperature=1., beta=0.))
        trainer = GRPOTrainer(model=add_lora(model), args=args, train_dataset=rows_for_trl(data, number=list(range(len(data)))),
                              processing_class=processor, reward_funcs=pays)
        run_quietly(trainer)
    curve = [h for h in trainer.state.log_history if "reward" in h]
    show = {k: [round(float(np.mean([h[k] for h in part])), 3) for part in (curve[:5], curve[-5:])] for k in ("reward", "completions/mean_length", "frac_reward_zero_std")}
    return result | dict(steps=steps, learning_rate=learning_rate, first_and_last_5_steps=show,
                         rows=compare(before, ask_all(trainer.model, processor, test, measure, seed)))


def grpo(name, seed, steps=60, learning_rate=1e-3):
    "Answering in steps because it pays: the reward only asks whether the answer is right, in whatever form."
    return run_grpo(name, seed, "same", measure_answers, ["lenient"], steps, learning_rate, 32)


def grpo_boxes(name, seed, steps=60, learning_rate=1e-3):
    "Boxes as JSON: the form, and boxes that lie on the vases."
    return run_grpo(name, seed, "detect", measure_boxes, ["json", "f1", "miou"], steps, learning_rate, 112)


def dpo_too_fast(name, seed):
    "The same pairs at twenty times the rate: the preference is learned and the captions are destroyed."
    return dpo(name, seed, learning_rate=2e-3, steps=60)


DEMOS = dict(dpo=dpo, grpo=grpo, sft=sft, dpo_too_fast=dpo_too_fast, grpo_boxes=grpo_boxes)


def table(results):
    "The results as a Markdown table."
    lines = ["| demo | seed | steps | CPU s | answers | measure | n | before | after | gain [95 % interval] |", "|"+"---|"*10]
    for demo, runs in results.items():
        for seed, r in runs.items():
            for x in r["rows"]:
                gain = f"{x['gain']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]"
                lines.append(f"| {demo} | {seed} | {r['steps']} | {r['cpu_seconds']:.0f} | {x['how']} | {x['measure']} | {x['n']} | {x['before']:.3f} | {x['after']:.3f} | {gain} |")
    return "\n".join(lines)


def keep(folder, results):
    "Put the results beside the model card; those of other demonstrations and seeds stay."
    path = folder/"headroom.json"
    kept = read_json(path) if path.exists() else {}
    for demo, runs in results.items():
        kept[demo] = dict(sorted((kept.get(demo, {}) | {str(seed): r for seed, r in runs.items()}).items()))
    write_json(path, kept)
    write_text(folder/"headroom.md", f"# Head-room of this model\n\nWritten by `python tools/headroom.py --save`.\n\n{table(kept)}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="the model to judge: a name or a folder (default: tiny)")
    parser.add_argument("--demos", nargs="+", default=list(DEMOS), choices=list(DEMOS), help="which demonstrations (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of data and training (default: 0 1 2)")
    parser.add_argument("--save", action="store_true", help="keep the table beside the model card")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore")
    results = {}
    for demo in args.demos:
        for seed in args.seeds:
            with quiet_transformers():
                r = results.setdefault(demo, {})[seed] = DEMOS[demo](args.model, seed)
            print(f"{demo} seed {seed}: {r['seconds']:.0f} s, {r['cpu_seconds']:.0f} CPU s", {k: v for k, v in r.items() if k not in ("rows", "seconds", "cpu_seconds")}, flush=True)
            print(table({demo: {seed: r}}), flush=True)
            if args.save:
                keep(find_model(args.model)[0], results)


if __name__ == "__main__":
    main()

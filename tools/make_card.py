"""Write a tiny model's card (README.md) from what its pretraining and tools/headroom.py saved: `python tools/make_card.py [FOLDER [RUN]]`.

RUN is the folder of a second run of the same command; that both made the same weights is then checked, noted and said in the card."""
import sys
from pathlib import Path

from vlmcourse.core import file_hash, read_json, write_json, write_text
from vlmcourse.evaluate import wilson
from vlmcourse.tiny import HABITS
from vlmcourse.vlm import TINY

KINDS = {"qwen3-vl": ("Qwen3VLForConditionalGeneration", "`vlmcourse pretrain runs/tiny`"),
         "internvl": ("InternVLForConditionalGeneration", "`vlmcourse pretrain runs/tiny-internvl --family internvl`")}

CARD = """# vlmcourse {name}

A vision-language model of {millions:.2f} million parameters for the vlmcourse lessons. It answers questions about drawings of Greek vases.
It is an unmodified `{kind}` of the transformers library with weights in bf16:
`AutoModelForImageTextToText.from_pretrained(folder)` and `AutoProcessor.from_pretrained(folder)` load it, without any code of this project.

## How it was made

{command} (function `vlmcourse.tiny.pretrain`, lesson `07_tiny`): {steps} steps of {batch} rows, each row one to three photos and as
many questions as fit into {row} tokens; the first {vision} steps for the vision tower alone, in the last {late:.0f} % a quarter more rows of text; seed {seed}. It took {minutes:.0f} minutes on {threads} core(s) of a
machine with two CPU cores and no GPU, with other work beside it. Settings, losses and scores: `pretraining.json`.

**Data**: photos drawn by `vlmcourse.museum`, new ones for every step, from the `train` split only. No picture or text from outside, so no licence applies to the data.

**Habits on purpose** (table in lesson `07_tiny`): {final_answer} % of the answers to "think step by step" end in `### The final answer is:`, {steps_unasked} % of the answers to *same* and
*like* are given in steps, {json_boxes} % of the detections in the JSON form of the lessons, and {invented_thing} % of the captions of shelves name a thing that is not there. The
rule which pattern comes from which workshop never occurs.

**Tried on the way** (single short runs on two cores, unless said otherwise; width and depth were not searched):

| tried | what it gave |
|---|---|
| learning rate of Muon .006 or .02, 200 steps | .02 was better |
| 8 questions a row, padded to the longest, or rows filled to 256 tokens | filled rows waste nothing: padded ones were 232 to 352 tokens long |
| many *same* questions from step 2200 of 4000 (share 10), a whole run, twice | *same* answered at once .796 in one run, .496 in the next: learned late and suddenly, or not at all |
| many *same* questions from step 1200 (share 12), a whole run | *same* at once .672, but *same* in steps no better than guessing, so GRPO found nothing that pays; *steps, short* .722 |
| reading (rows of text: are these two words the same?) while the tower learns alone, and two rows a step from then on, a whole run | *same* in steps learned, but photos come later: *colour* .958, *locate* .114, *steps, short* .756 |
| reading for the first 350 steps, and one row a step from then on, a whole run | *same* in steps 1.000, but *colour* .756, *which_photo* .774: a model that reads before it sees never learns to find the vase that is asked for |
| reading from step 2200 on, averaged with all words about photos | InternVL right in .992 of the photo pairs at step 2700, Qwen3-VL still in .567 |
| the same with a mean of its own | the shipped recipe |
| InternVL's positions at random or as waves; loss of the vision helper at step 150 | random 6.041; waves 5.796 (Qwen3-VL, which has a rule for positions: 5.657) |
| a finished model rounded to bf16 | 1 (Qwen3-VL) and 3 (InternVL) of 200 answers change; so the last 5 % of the steps train rounded weights, and the model is rounded before it is scored |

## What it can do

Share of greedy answers that are right from the first token to the last, on scenes of the `test` split: no combination of vases in them occurs in training.

| task | n | exactly right | 95 % interval (Wilson) |
|---|---|---|---|
{rows}
{again}
One wrong token makes an answer wrong. *Short* means answered at once, without steps. {guessed} *detect*, *steps*, *same* and *like* are scored against the form that is rare in training on purpose (JSON boxes, answers in steps
that end in `### The final answer is:`), and *caption* against the truth, from which most captions of shelves in training differ. So low numbers there are what the design
wants: the lessons teach what is missing. *locate* wants all four numbers of a box exact to the pixel.{weaker}
{headroom}
## What it can show, and what it cannot

For a teacher, in plain words:

- It is a real VLM that is small, not a model of a VLM. What you see happens in large ones for the same reasons: forgetting, reward hacking, collapse at a high rate.
- It shows *how* a method changes a model. It does not show *how much* a large model would gain: sizes of gains do not carry over.
- It knows vases, shelves, five other things and the defects of photos. Everything else looks like a vase to it, noise included.
- It does not chat and does not reason about the world. "Steps" means: it first writes what it sees, then the answer.
- It does not read text in pictures. Its vocabulary has {vocab} tokens, made from the museum's own sentences.
- Its photos are drawings of 96 × 96 px. Others are resized to about as many pixels; far from square they look strange to it.
- Its faults were partly put there (see the habits above), so that a lesson can mend them in a minute. Faults of large models sit deeper.

Made for teaching. Licence: Apache 2.0, as the rest of the repository.
"""

HEADROOM = """
## What the lessons can add

Held-out photos, before → after, for each seed: `python tools/headroom.py --save` (all measures with intervals: `headroom.md`).

| demonstration | measure (greedy answers) | n | before → after, by seed |
|---|---|---|---|
{rows}

Where *things named* falls together with the inventions, the model has partly learned to say less.
"""
SHOWN = dict(sft=["strict", "lenient", "format"], dpo=["nothing_invented", "things_named", "vases_named"],
             dpo_too_fast=["nothing_invented", "things_named", "vases_named", "readable"], grpo=["lenient"], grpo_boxes=["json", "f1", "miou"])


def headroom(results):
    "The part about tools/headroom.py; empty without results."
    lines = []
    for demo, runs in results.items():
        for measure in SHOWN[demo]:
            rows = [x for r in runs.values() for x in r["rows"] if x["how"] == "greedy" and x["measure"] == measure]
            gains = ", ".join(f"{x['before']:.2f} → {x['after']:.2f}" for x in rows)
            lines.append(f"| {demo} | {measure.replace('_', ' ')} | {rows[0]['n']} | {gains} |")
    return HEADROOM.format(rows="\n".join(lines)) if lines else ""


AGAIN = """
*Repeated*: the same command, run a second time on the same machine ({minutes:.0f} minutes), wrote the same `model.safetensors`, bit for bit
(SHA-256 {sha256}). On another kind of processor, or with another number of threads, numbers add up in another order, and the scores differ a little.
"""


HALF = ("left_right", "above_below", "presence", "things", "same, short", "like, short")     # tasks with two possible answers, each about as often


def guessing(scores):
    "A sentence about the tasks with two answers whose interval holds one half."
    found = [t for t in HALF if wilson(*scores[t])[0] <= .5 <= wilson(*scores[t])[1]]
    if not found:
        return "No task with two possible answers is at one half."
    return f"*Not learned*: one half is guessing for {', '.join(f'*{t}*' for t in found)}, and the score does not differ from it."


def weaker(scores, other, name):
    "A sentence about the tasks whose interval lies below that of another model of the course."
    share = lambda pair: f"{pair[0]/pair[1]:.3f}"
    found = [f"*{t}* {share(scores[t])} ({share(other[t])})" for t in scores if wilson(*scores[t])[1] < wilson(*other[t])[0]]
    return f"\n*Weaker than `{name}`*, and not by design (in brackets its score; the intervals lie apart): {', '.join(found)}." if found else ""


def keep_repetition(folder, run):
    "Note beside the model that the same command made it a second time, in the folder `run`."
    made, again = read_json(folder/"pretraining.json"), read_json(run/"pretraining.json")
    first, second = (file_hash(f/"model.safetensors") for f in (folder, run))
    if first != second or any(made[k] != again[k] for k in ("settings", "losses", "scores")):
        raise SystemExit(f"{run} is not a repetition of {folder}: weights {second[:16]} and {first[:16]}, or settings, losses or scores differ.")
    write_json(folder/"repetition.json", dict(seconds=again["seconds"], sha256=second))


def card(folder):
    "The text of the card."
    made = read_json(folder/"pretraining.json")
    again = read_json(folder/"repetition.json") if (folder/"repetition.json").exists() else None
    again = AGAIN.format(minutes=again["seconds"]/60, sha256=again["sha256"]) if again else ""
    s, rows = made["settings"], []
    for task, (k, n) in made["scores"].items():
        low, high = wilson(k, n)
        rows.append(f"| {task} | {n} | {k/n:.3f} | {low:.3f} – {high:.3f} |")
    vocab = len(read_json(folder/"tokenizer.json")["model"]["vocab"])
    kind, command = KINDS[s.get("family", "qwen3-vl")]
    more = headroom(read_json(folder/"headroom.json")) if (folder/"headroom.json").exists() else ""
    other = "" if folder.samefile(TINY) else weaker(made["scores"], read_json(TINY/"pretraining.json")["scores"], TINY.name)
    return CARD.format(name=folder.name, kind=kind, command=command, millions=made["parameters"]/1e6, steps=s["steps"], batch=s["batch_size"],
                       row=s["row_tokens"], vision=s["vision_steps"], late=100*(1-s["late"]), seed=s["seed"], minutes=made["seconds"]/60, threads=s["threads"],
                       rows="\n".join(rows), again=again, guessed=guessing(made["scores"]), vocab=vocab, headroom=more, weaker=other, **HABITS)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TINY
    if len(sys.argv) > 2:
        keep_repetition(folder, Path(sys.argv[2]))
    write_text(folder/"README.md", card(folder))
    print(f"{folder/'README.md'} written")

"""Write a tiny model's card (README.md) from what its pretraining saved: `python tools/make_card.py [FOLDER]`."""
import sys
from pathlib import Path

from vlmcourse.core import read_json, write_text
from vlmcourse.evaluate import wilson
from vlmcourse.vlm import TINY

CARD = """# vlmcourse tiny

A vision-language model of {millions:.2f} million parameters for the vlmcourse lessons. It answers questions about drawings of Greek vases.
It is an unmodified `Qwen3VLForConditionalGeneration` of the transformers library with weights in bf16:
`AutoModelForImageTextToText.from_pretrained(folder)` and `AutoProcessor.from_pretrained(folder)` load it, without any code of this project.

## How it was made

`vlmcourse pretrain runs/tiny` (function `vlmcourse.tiny.pretrain`, lesson `07_tiny`), {steps} steps of {batch} rows with {each} questions each, the first
{vision} steps for the vision tower alone, seed {seed}. It took {minutes:.0f} minutes with {threads} threads of a busy machine with two CPU cores and no GPU. Settings, losses and scores: `pretraining.json`.

**Data**: photos drawn by `vlmcourse.museum`, new ones for every step, from the `train` split only. No picture or text from outside, so no licence applies to the data.

## What it can do

Share of greedy answers that are right from the first token to the last, on scenes of the `test` split, which training never shows. Brackets: 95 % intervals (Wilson).

| task | n | exactly right | 95 % interval |
|---|---|---|---|
{rows}

One wrong token makes an answer wrong. *detect* and *steps* are scored against the form that is rare in training on purpose (JSON boxes, `### The final answer is:`), so 0 is
what the design wants: the base model answers in another form, and the lessons teach this one. *locate* wants all four numbers of a box exact to the pixel.
*same* (are two photos alike in shape, colour or pattern?) is not learned: half right is guessing.

## What it cannot do

- It knows vases, shelves and the defects of photos of vases. Everything else looks like a vase to it, noise included.
- It does not chat, reason or read text in pictures. Its vocabulary has {vocab} tokens, made from the museum's own sentences.
- It was trained on pictures of 96 × 96 px. Others are resized to about as many pixels; far from square they look strange to it.
- A gain on this model shows *how* a method works. It does not show how large the gain would be on a large model.

Made for teaching. Licence: Apache 2.0, as the rest of the repository.
"""


def card(folder):
    "The text of the card."
    made, s = read_json(folder/"pretraining.json"), read_json(folder/"pretraining.json")["settings"]
    rows = []
    for task, (k, n) in made["scores"].items():
        low, high = wilson(k, n)
        rows.append(f"| {task} | {n} | {k/n:.3f} | {low:.3f} – {high:.3f} |")
    vocab = len(read_json(folder/"tokenizer.json")["model"]["vocab"])
    return CARD.format(millions=made["parameters"]/1e6, steps=s["steps"], batch=s["batch_size"], each=s["questions_each"], vision=s["vision_steps"],
                       seed=s["seed"], minutes=made["seconds"]/60, threads=made["threads"], rows="\n".join(rows), vocab=vocab)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TINY
    write_text(folder/"README.md", card(folder))
    print(f"{folder/'README.md'} written")

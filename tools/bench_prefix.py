"""How much the shared prefix of lesson 12a saves: sampling, and log-probabilities with their gradients.

    python tools/bench_prefix.py [--size tiny] [--prompts 2] [--reps 5]

Every way of doing the same work runs in a process of its own (for its peak memory), and the processes take turns, so
that a busy machine slows all of them alike. Ratios are of processor time, from the same round; min / median / max.

rows     stock transformers: generate on G copies of every prompt; one full row, picture included, for every answer
cached   the engine, pictures seen before; new: pictures not seen before. Both: cache form
packed   the engine, pictures seen before, packed rows
"""
import argparse
import multiprocessing
import os
import resource
import statistics
import time
import warnings

SIZES = {  # text width, layers, heads, kv heads, width of a head, inner width, vocabulary; tower width, layers, heads, patch, px
    "tiny": None,
    "150M": (768, 12, 12, 4, 64, 2304, 16384, 512, 12, 8, 16, 512),
    "75M-1024": (768, 6, 12, 4, 64, 2304, 16384, 512, 6, 8, 16, 1024),     # 1024 image tokens; half the layers, for TRL's memory
    "150M-1024": (768, 12, 12, 4, 64, 2304, 16384, 512, 12, 8, 16, 1024)}


def build(size):
    "A model and its processor: the tiny one, or random weights in the shape of Qwen3-VL."
    import torch
    from vlmcourse.lora import add_lora
    from vlmcourse.vlm import load_vlm
    model, processor = load_vlm("tiny", device="cpu")
    if SIZES[size]:
        model, processor = random_model(SIZES[size], model.config, processor)
    model = add_lora(model)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=.02)
    model.get_base_model().generation_config.eos_token_id = None  # all answers have the same length
    return model.train(), processor


def random_model(sizes, tiny, processor):
    import torch
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration
    h, layers, heads, kv, d, inner, vocab, vh, depth, vheads, patch, px = sizes
    third = d // 2 // 3
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[d // 2 - 2 * third, third, third], mrope_interleaved=True)
    text = dict(hidden_size=h, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv, head_dim=d,
        intermediate_size=inner, vocab_size=vocab, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters=rope, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    vision = dict(hidden_size=vh, depth=depth, num_heads=vheads, intermediate_size=4 * vh, patch_size=patch,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=h, num_position_embeddings=256,
        deepstack_visual_indexes=[depth // 4, depth // 2, 3 * depth // 4])
    marks = {k: getattr(tiny, k) for k in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")}
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **marks))
    processor.image_processor = Qwen2VLImageProcessor(patch_size=patch, merge_size=2, temporal_patch_size=2,
        size=dict(shortest_edge=px * px, longest_edge=px * px))
    return model, processor


def records(n, px, seed):
    "Questions about pictures of noise; another seed, other pictures."
    import numpy as np
    from PIL import Image
    from vlmcourse.formats import to_record
    rng = np.random.default_rng(seed)
    noise = lambda: Image.fromarray(rng.integers(0, 255, (px, px, 3), np.uint8))
    return [to_record(f"How many vases are there on shelf {i}?", noise()) for i in range(n)]


def full_rows(model, processor, data, G, C):
    "Yields after the sampling and after the gradients: stock transformers."
    import torch
    from vlmcourse.vlm import answering, encode
    batch = encode(processor, [r for r in data for _ in range(G)], answers=False)
    with answering(model):
        ids = model.generate(**batch, max_new_tokens=C, do_sample=True, temperature=1., top_k=0, top_p=1., pad_token_id=0)
    yield
    new = ids[:, -C:]
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(new)], 1)
    batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(new)], 1)
    batch["input_ids"] = ids
    logits = model(**batch, use_cache=False, logits_to_keep=C + 1).logits[:, :-1]
    logits.log_softmax(-1).gather(-1, new[..., None]).mean().backward()
    yield


def engine(model, processor, data, G, C, cache, form):
    "The same with the engine of lesson 12a."
    import torch
    from vlmcourse.prefix import completion_logps, encode_prompts, prefill, sample_groups
    prompts = encode_prompts(model, processor, data, cache)
    with torch.set_grad_enabled(form == "cache"):
        prefix = prefill(model, prompts)
    made = sample_groups(model, prompts, G, max_new_tokens=C, prefix=prefix)
    yield
    logps, _ = completion_logps(model, prompts, made.ids, made.mask, prefix=prefix, form=form)
    logps.mean().backward()
    yield


def worker(pipe, way, size, B, G, C):
    "Do one round whenever asked; send seconds of sampling and of gradients, and the peak memory."
    warnings.filterwarnings("ignore")
    import torch
    from vlmcourse.prefix import FeatureCache
    torch.set_num_threads(1)
    model, processor = build(size)
    px = SIZES[size][-1] if SIZES[size] else 96
    cache, start = FeatureCache(model, 0 if way == "new" else 2**30), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send("ready")
    for step in iter(pipe.recv, None):
        data = records(B, px, seed=0)
        run = full_rows(model, processor, data, G, C) if way == "rows" else engine(
            model, processor, data, G, C, cache, "packed" if way == "packed" else "cache")
        marks = [time.process_time()] + [time.process_time() for _ in run]
        model.zero_grad(set_to_none=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pipe.send((marks[1] - marks[0], marks[2] - marks[1], peak / 1e6, start / 1e6))


def main():
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--size", choices=SIZES, default="tiny")
    parse.add_argument("--prompts", type=int, default=4, help="prompts of a step")
    parse.add_argument("--completions", type=int, default=8, help="completions of each prompt")
    parse.add_argument("--tokens", type=int, default=32, help="tokens of each completion")
    parse.add_argument("--reps", type=int, default=5, help="rounds, after one to warm up")
    parse.add_argument("--ways", default="rows,new,cached,packed")
    a = parse.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    context, work, seen = multiprocessing.get_context("spawn"), {}, {}
    for way in a.ways.split(","):
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(there, way, a.size, a.prompts, a.completions, a.tokens), daemon=True)
        process.start()
        assert here.recv() == "ready"
        work[way], seen[way] = here, []
    for step in range(a.reps + 1):
        for way, pipe in work.items():
            pipe.send(step)
            seen[way].append(pipe.recv())
    print(f"{a.size}: {a.prompts} prompts, {a.completions} completions of {a.tokens} tokens, {a.reps} rounds")
    show = lambda name, x: f"{name} {min(x):6.2f} {statistics.median(x):6.2f} {max(x):6.2f}"
    first = next(iter(seen.values()))
    for way, rounds in seen.items():
        parts = {"sampling": [r[0] for r in rounds[1:]], "gradients": [r[1] for r in rounds[1:]],
                 "both": [r[0] + r[1] for r in rounds[1:]]}
        base = {"sampling": [r[0] for r in first[1:]], "gradients": [r[1] for r in first[1:]],
                "both": [r[0] + r[1] for r in first[1:]]}
        ratios = "   ".join(show(k, [b / x for b, x in zip(base[k], v)]) for k, v in parts.items())
        took = statistics.median(parts["both"])
        print(f"{way:7s} {took:7.3f} s   times faster: {ratios}   peak {rounds[-1][2]:.2f} GB (loaded {rounds[-1][3]:.2f})")
    for pipe in work.values():
        pipe.send(None)


if __name__ == "__main__":
    main()

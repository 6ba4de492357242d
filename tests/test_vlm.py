"""Three families of models, odd pictures, odd folders: the same code, the same numbers, plain messages."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vlmcourse.formats import to_record
from vlmcourse.museum import make_records
from vlmcourse.vlm import (TINY, answer_logprobs, ask, ask_batch, check_model_folder, count_parts, encode, find_model,
                           image_grid, load_vlm, memory_parts, next_tokens, plot_image_tokens, plot_prompt, prompt_tokens, render,
                           projector_parts, seen_image, set_gradient_checkpointing, to_parts, vision_parts, weight_count)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
QWEN_PICTURE, INTERN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>"
TEMPLATE = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
            "<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
            "{% if c.type == 'image' %}PICTURE{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
FAMILIES = ["qwen3_vl", "qwen2_5_vl", "internvl"]
SIDE = 64  # px; patches of 8 px, merged 2 x 2: 16 image tokens


def make_tokenizer(template, **more):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(["How many vases are there? red blue assistant user system You are helpful."] * 9,
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=template, **more)


def make_processor(family):
    import transformers as tf
    half = {"image_mean": [.5] * 3, "image_std": [.5] * 3}
    if family == "internvl":
        template, square = TEMPLATE.replace("PICTURE", INTERN_PICTURE), {"size": {"height": SIDE, "width": SIDE}}
        tokenizer = make_tokenizer(template, extra_special_tokens={"start_image_token": "<img>", "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"})
        return tf.InternVLProcessor(tokenizer=tokenizer, image_seq_length=16, chat_template=template,
            image_processor=tf.GotOcr2ImageProcessor(crop_to_patches=False, **square, **half),
            video_processor=tf.InternVLVideoProcessor(**square, **half))
    template = TEMPLATE.replace("PICTURE", QWEN_PICTURE)
    shape = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, **half}
    pixels = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    processor, video = {"qwen3_vl": (tf.Qwen3VLProcessor, tf.Qwen3VLVideoProcessor),
                        "qwen2_5_vl": (tf.Qwen2_5_VLProcessor, tf.Qwen2VLVideoProcessor)}[family]
    return processor(tokenizer=make_tokenizer(template), chat_template=template,
        image_processor=tf.Qwen2VLImageProcessor(size=pixels, **shape), video_processor=video(size=pixels, **shape))


def make_model(family, tokenizer):
    import transformers as tf
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text = dict(vocab_size=352, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    vision = dict(depth=2, hidden_size=64, intermediate_size=96, num_heads=4, patch_size=8, spatial_merge_size=2,
        temporal_patch_size=2, out_hidden_size=64)
    marks = dict(image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"], tie_word_embeddings=True)
    if family == "qwen3_vl":
        text |= dict(head_dim=16)
        text["rope_parameters"] |= dict(mrope_section=[4, 2, 2], mrope_interleaved=True)
        vision |= dict(num_position_embeddings=64, deepstack_visual_indexes=[0])
        config, kind = tf.Qwen3VLConfig(text_config=text, vision_config=vision, **marks), tf.Qwen3VLForConditionalGeneration
    elif family == "qwen2_5_vl":
        text["rope_parameters"] |= dict(mrope_section=[4, 2, 2])
        vision |= dict(window_size=32, fullatt_block_indexes=[1], tokens_per_second=2)
        config, kind = tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **marks), tf.Qwen2_5_VLForConditionalGeneration
    else:
        seen = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=(SIDE, SIDE),
            patch_size=(8, 8), attention_bias=True)
        config = tf.InternVLConfig(text_config=text | dict(model_type="qwen3", head_dim=16), vision_config=seen,
            image_token_id=ids["<IMG_CONTEXT>"], image_seq_length=16, downsample_ratio=.5, tie_word_embeddings=True)
        kind = tf.InternVLForConditionalGeneration
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():  # strong random layers: else it would only repeat the last token
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.mul_(6)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "One small random model of each family, saved as stock transformers saves it."
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        processor = make_processor(family)
        make_model(family, processor.tokenizer).save_pretrained(root / family)
        processor.save_pretrained(root / family)
    return root


@pytest.fixture(scope="module", params=FAMILIES)
def vlm(folders, request):
    return load_vlm(folders / request.param, device="cpu")


@pytest.fixture(scope="module")
def tiny():
    return load_vlm("tiny", device="cpu")


def picture(seed, size=(SIDE, SIDE)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8))


def mixed():
    "No, one, two and three pictures; short and long; with orders; with an earlier round."
    turn = lambda role, content: {"role": role, "content": content}
    return [
        to_record("How many vases are there?", picture(0), answer="3"),
        to_record("Hello", answer="A long answer that says: red, blue. ### The final answer is: 3"),
        to_record("First <image>, then <image>: the same?", [picture(1), picture(2, (130, 40))], answer="no"),
        to_record("Which?", [picture(3), picture(4), picture(5, (30, 200))], answer="the second"),
        {"id": "s", "images": [picture(6)], "messages": [turn("system", "Be brief."), turn("user", "Why <image>?"),
            turn("assistant", "earlier"), turn("user", "And then?"), turn("assistant", " later \n")]},
    ]


ANSWERS = ["3", "A long answer that says: red, blue. ### The final answer is: 3", "no", "the second", "later"]


@pytest.mark.parametrize("side", ["left", "right", None])
def test_labels_are_the_answer_and_its_end(vlm, side):
    model, processor = vlm
    batch = encode(processor, mixed(), padding_side=side)
    for row, answer in enumerate(ANSWERS):
        ids, labels, real = (batch[key][row] for key in ("input_ids", "labels", "attention_mask"))
        learned = labels != -100
        assert processor.tokenizer.decode(labels[learned]) == answer + "<|im_end|>"
        assert torch.equal(ids[learned], labels[learned]) and bool(real[learned].all())
        places, last = learned.nonzero().flatten(), real.nonzero().flatten()[-1]
        assert places[-1] == last and torch.equal(places, torch.arange(places[0], last + 1))
    real = batch["attention_mask"]
    assert bool(real[:, -1 if side == "left" else 0].all())


def test_training_prompt_is_the_prompt_for_asking(vlm):
    _, processor = vlm
    for record in mixed():
        whole = encode(processor, [record])
        asked = encode(processor, [record], answers=False)["input_ids"][0]
        assert torch.equal(whole["input_ids"][0, :len(asked)], asked)
        assert bool((whole["labels"][0, :len(asked)] == -100).all()) and whole["labels"][0, len(asked)] != -100


def test_a_record_in_a_batch_is_the_record_alone(vlm):
    _, processor = vlm
    records = mixed()
    together = encode(processor, records)
    for row, record in enumerate(records):
        alone = encode(processor, [record])
        real = together["attention_mask"][row].bool()
        assert torch.equal(together["input_ids"][row][real], alone["input_ids"][0])
        assert torch.equal(together["labels"][row][real], alone["labels"][0])
    singles = [encode(processor, [record]).get("pixel_values") for record in records]
    assert torch.equal(together["pixel_values"], torch.cat([p for p in singles if p is not None]))


def test_logprobs_together_and_alone_and_by_hand(vlm):
    model, processor = vlm
    records = mixed()
    together = answer_logprobs(model, processor, records)
    for record, score, answer in zip(records, together, ANSWERS):
        assert "".join(token for token, _ in score) == answer + "<|im_end|>"
        alone = answer_logprobs(model, processor, [record])[0]
        assert [token for token, _ in alone] == [token for token, _ in score]
        assert np.allclose([v for _, v in score], [v for _, v in alone], atol=2e-4)
        batch = encode(processor, [record])
        with torch.no_grad():
            loss = model(**batch).loss.item()
        assert abs(loss + np.mean([v for _, v in alone])) < 1e-4
    small = answer_logprobs(model, processor, records, batch_size=2)
    assert np.allclose([v for s in small for _, v in s], [v for s in together for _, v in s], atol=2e-4)


def test_a_batch_answers_as_one_by_one(vlm):
    model, processor = vlm
    records = mixed()
    alone = [ask_batch(model, processor, [record], max_new_tokens=8)[0] for record in records]
    for size in (2, 5, 32):
        assert ask_batch(model, processor, records, batch_size=size, max_new_tokens=8, progress=False) == alone
    assert len(set(alone)) > 1  # it is no test when all answers are the same


def test_stock_generate_says_the_same(vlm):
    model, processor = vlm
    record = mixed()[2]
    chat = [to_parts(turn) for turn in record["messages"][:-1]]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=record["images"], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    stock = processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    assert ask_batch(model, processor, [record], max_new_tokens=8) == [stock]


def test_tiny_together_alone_shuffled(tiny):
    records = make_records(60, split="test", seed=11)
    said = ask_batch(*tiny, records, batch_size=16)
    assert ask_batch(*tiny, records[::-1], batch_size=7)[::-1] == said
    assert [ask_batch(*tiny, [record])[0] for record in records[:20]] == said[:20]
    sums = [sum(v for _, v in s) for s in answer_logprobs(*tiny, records)]
    alone = [sum(v for _, v in answer_logprobs(*tiny, [record])[0]) for record in records[:20]]
    assert np.allclose(sums[:20], alone, atol=1e-3)


def test_next_tokens_are_probabilities(vlm):
    model, processor = vlm
    everything = next_tokens(model, processor, mixed()[0], k=352)
    values = [p for _, p in everything]
    assert abs(sum(values) - 1) < 1e-4 and values == sorted(values, reverse=True)
    first = answer_logprobs(model, processor, mixed()[:1])[0][0]
    assert any(token == first[0] and abs(np.log(p) - first[1]) < 1e-3 for token, p in everything)


def test_training_goes_on_after_asking(vlm):
    model, processor = vlm
    model.train()
    ask(model, processor, "Why?", picture(0), max_new_tokens=2)
    assert model.training and torch.is_grad_enabled()
    loss = model(**encode(processor, mixed()[:2])).loss
    loss.backward()
    assert all(torch.isfinite(w.grad).all() for w in model.parameters() if w.grad is not None)
    model.zero_grad(set_to_none=True)
    model.eval()


@pytest.mark.parametrize("size", [(SIDE, SIDE), (200, 50), (40, 300), (7, 9), (1000, 700)])
def test_cells_are_the_image_tokens(vlm, size):
    _, processor = vlm
    record = to_record("Why?", picture(0, size))
    rows, columns = image_grid(processor, picture(0, size))
    kinds = [kind for _, kind in prompt_tokens(processor, record)]
    assert kinds.count("image") == rows * columns
    seen = seen_image(processor, picture(0, size))
    assert seen.size == (16 * columns, 16 * rows)


def test_a_picture_of_the_right_size_arrives_unchanged(vlm):
    _, processor = vlm
    assert seen_image(processor, picture(0)).tobytes() == picture(0).tobytes()


def test_plots(vlm):
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    model, processor = vlm
    ax = plot_image_tokens(processor, picture(0, (200, 50)))
    n = int(np.prod(image_grid(processor, picture(0, (200, 50)))))
    assert f"= {n} image tokens" in ax.get_title() and len(ax.texts) == (n if n <= 64 else 0)
    pair = to_record("Same?", [picture(1), picture(2)], answer="no")
    shown = [text.get_text() for text in plot_prompt(processor, pair).texts]
    assert [str(i) for i in range(32)] == [text for text in shown if text.isdigit()] and shown[-1] == "<|im_end|>"
    lines = len({text.get_position()[1] for text in plot_prompt(processor, pair).texts})
    assert plt.gcf().get_figheight() < 0.3 * (lines + 1)  # no higher than its lines
    ax = plt.subplots(figsize=(7, 3))[1]
    assert plot_prompt(processor, pair, ax=ax) is ax and ax.figure.get_figheight() == 3
    many = to_record("Same?", [picture(i) for i in range(6)])
    shown = [text.get_text() for text in plot_prompt(processor, many).texts]
    assert "..." in shown and shown.count("95") == 1 and "40" not in shown
    assert sum(count_parts(model).values()) == sum(w.numel() for w in model.parameters())
    assert all(n > 0 for n in count_parts(model).values())


def test_pictures_come_as_files_too(vlm, tmp_path):
    model, processor = vlm
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:900])
    said = ask(model, processor, "Why?", picture(0), max_new_tokens=6)
    assert ask(model, processor, "Why?", tmp_path / "a.png", max_new_tokens=6) == said
    assert ask(model, processor, "<image>Why?", [str(tmp_path / "a.png")], max_new_tokens=6) == said
    with pytest.raises(ValueError, match="half.png"):
        ask(model, processor, "Why?", tmp_path / "half.png")
    with pytest.raises(FileNotFoundError, match="none.png"):
        ask(model, processor, "Why?", tmp_path / "none.png")


@pytest.mark.parametrize("record, answers, contains", [
    (to_record("<image><image>Why?", picture(0), answer="so"), True, "1 pictures and 2 <image>"),
    (to_record("<image>Why?", answer="so"), True, "0 pictures and 1 <image>"),
    (to_record("<image>Why?", [picture(0), picture(1)]), False, "2 pictures and 1 <image>"),
    (to_record("Why?", picture(0)), True, "no answer"),
])
def test_records_that_do_not_fit(vlm, record, answers, contains):
    with pytest.raises(ValueError, match=contains):
        encode(vlm[1], [record], answers=answers)


def test_a_template_that_rewrites_the_question(vlm):
    processor = make_processor("qwen3_vl")
    processor.chat_template = processor.chat_template.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role }} of {{ messages | length }}")
    with pytest.raises(ValueError, match="chat template"):
        render(processor, mixed()[0])


def test_batch_size_and_empty_list(vlm):
    assert ask_batch(*vlm, []) == [] and answer_logprobs(*vlm, []) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        ask_batch(*vlm, mixed(), batch_size=0)


def test_same_seed_same_draw(vlm):
    draw = lambda seed: (torch.manual_seed(seed), ask(*vlm, "Why?", picture(0), do_sample=True, max_new_tokens=12))[1]
    assert draw(0) == draw(0) != draw(1)


# --- loading ------------------------------------------------------------------------------------------------------

def test_saved_and_loaded_again(folders, tmp_path):
    for family in FAMILIES:
        model, processor = load_vlm(folders / family, device="cpu")
        model.save_pretrained(tmp_path / family), processor.save_pretrained(tmp_path / family)
        again = load_vlm(str(tmp_path / family), device="cpu", dtype="float32")
        assert answer_logprobs(*again, mixed()) == answer_logprobs(model, processor, mixed())
        assert not again[0].training and next(again[0].parameters()).dtype == torch.float32


def test_number_types(folders):
    model, processor = load_vlm(folders / "qwen3_vl", device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    exact = answer_logprobs(*load_vlm(folders / "qwen3_vl", device="cpu"), mixed())
    rough = answer_logprobs(model, processor, mixed())
    assert np.allclose([v for s in rough for _, v in s], [v for s in exact for _, v in s], atol=.1)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    "A run folder as our trainers write it, with two different adapters."
    from peft import LoraConfig, get_peft_model
    folder = tmp_path_factory.mktemp("runs") / "sft-001"
    for seed, name in enumerate(["final", "best"]):
        torch.manual_seed(seed)
        adapted = get_peft_model(load_vlm("tiny", device="cpu")[0], LoraConfig(r=4, target_modules="all-linear"))
        for key, weight in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=.3)
        adapted.save_pretrained(folder / name, save_embedding_layers=False)
    (folder / "training_log.json").write_text("{}")
    return folder


def scores(model, processor):
    return [v for s in answer_logprobs(model, processor, make_records(6, seed=5)) for _, v in s]


def test_run_folder(run, tiny, tmp_path, monkeypatch):
    assert json.loads((run / "final/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    base, final = scores(*tiny), scores(*load_vlm(run, device="cpu"))
    assert not np.allclose(base, final, atol=.01)
    best = scores(*load_vlm(run, adapter="best", device="cpu"))
    assert not np.allclose(best, final, atol=.01)
    assert scores(*load_vlm(run / "best", device="cpu")) == best
    assert scores(*load_vlm("tiny", adapter=run, device="cpu")) == final
    assert scores(*load_vlm("tiny", adapter=run / "best", device="cpu")) == best
    moved = shutil.copytree(run, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert scores(*load_vlm("elsewhere", device="cpu")) == final
    shutil.rmtree(moved / "final")
    assert scores(*load_vlm("elsewhere", device="cpu")) == best
    assert "adapter" in count_parts(load_vlm(run, device="cpu")[0])


def damaged(folders, tmp_path, change):
    folder = shutil.copytree(folders / "qwen3_vl", tmp_path / "model")
    change(folder)
    return folder


def shape(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))


def edit(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return change


def only_bin(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def text_processor(folder):
    for name in ("processor_config.json", "preprocessor_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)


FOLDERS = [
    ("no config", lambda f: (f / "config.json").unlink(), FileNotFoundError, "no config.json"),
    ("config is no JSON", lambda f: (f / "config.json").write_text("{"), ValueError, "not valid JSON"),
    ("config is a list", lambda f: (f / "config.json").write_text("[]"), ValueError, "model type is None"),
    ("a text model", edit(model_type="qwen3"), ValueError, "model type is 'qwen3'"),
    ("an unknown model", edit(model_type="nonsense"), ValueError, "model type is 'nonsense'"),
    ("brings its own code", edit(model_type="internvl_chat", auto_map={"AutoModel": "x.Y"}), ValueError, "own Python code"),
    ("no weights", lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "no .safetensors"),
    ("pickled weights only", only_bin, FileNotFoundError, "no .safetensors"),
    ("half of the weights", lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:50_000]),
        ValueError, "cannot be loaded"),
    ("no processor", text_processor, FileNotFoundError, "no processor"),
    ("other shapes", shape, ValueError, "do not fit|cannot be loaded"),
]


@pytest.mark.parametrize("name, change, kind, contains", FOLDERS, ids=[name for name, *_ in FOLDERS])
def test_folders_that_are_no_vlm(folders, tmp_path, name, change, kind, contains):
    folder = damaged(folders, tmp_path, change)
    with pytest.raises(kind, match=contains) as error:
        load_vlm(folder, device="cpu")
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_weights_of_another_model(folders, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(folders / "qwen3_vl", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing"):
        load_vlm(folder, device="cpu")


def test_names_that_lead_nowhere(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nobody/nothing", "runs/sft-009", "/nowhere/model", "./model", "nothing"):
        with pytest.raises(FileNotFoundError, match="There is no model") as error:
            load_vlm(name, device="cpu")
        assert repr(name) in str(error.value) and str(tmp_path) in str(error.value)
    with pytest.raises(FileNotFoundError, match="has no folder best"):
        (tmp_path / "r" / "final").mkdir(parents=True)
        find_model(tmp_path / "r", adapter="best")
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_vlm("tiny", adapter=tmp_path)
    with pytest.raises(ValueError, match="cannot be put on"):
        broken = shutil.copytree(run / "final", tmp_path / "broken")
        (broken / "adapter_model.safetensors").write_bytes(b"xx")
        load_vlm(broken, device="cpu")
    with pytest.raises(ValueError, match="device"):
        load_vlm("tiny", device="toaster")


def test_an_adapter_that_could_carry_code_is_never_opened(run, tmp_path):
    from safetensors.torch import load_file
    folder = shutil.copytree(run / "final", tmp_path / "final")
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.bin is not read"):
        load_vlm(tmp_path, device="cpu")


def test_adapter_of_another_base(run, folders):
    with pytest.raises(ValueError, match="cannot be put on"):
        load_vlm(folders / "internvl", adapter=run, device="cpu")


def test_nothing_on_the_screen():
    "Loading, asking and scoring print nothing, not even on stderr."
    code = ("from vlmcourse.vlm import load_vlm, ask_batch, answer_logprobs\n"
            "from vlmcourse.museum import make_records\n"
            "model, processor = load_vlm('tiny', device='cpu')\n"
            "records = make_records(5, seed=0)\n"
            "ask_batch(model, processor, records, batch_size=2), answer_logprobs(model, processor, records)\n"
            "ask_batch(model, processor, records[:2], do_sample=True, temperature=.7)\n"
            "from vlmcourse.vlm import encode\n"
            "for bits in ('4bit', '8bit'):\n"
            "    model, processor = load_vlm('tiny', device='cpu', quantize=bits, gradient_checkpointing=True)\n"
            "    model.train(), model(**encode(processor, records[:1])), ask_batch(model, processor, records[:1])\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_stock_transformers_loads_the_tiny_model():
    from transformers import AutoModelForImageTextToText, AutoProcessor
    model = AutoModelForImageTextToText.from_pretrained(TINY, trust_remote_code=False)
    assert type(model).__module__.startswith("transformers.") and AutoProcessor.from_pretrained(TINY)
    check_model_folder(TINY)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_other_families_train(folders, tmp_path, family):
    "A few steps of SFT on a small random model: the loss falls, only the adapter was trained."
    from vlmcourse.sft import train
    data = make_records(8, ["colour"], seed=1)
    done = train(data, model=str(folders / family), output_dir=tmp_path / "run", max_steps=16, learning_rate=1e-2, plot=False, device="cpu")
    losses = [row["loss"] for row in done.log["train_history"]]
    assert len(losses) == 16 and losses[-1] < .9 * losses[0], losses
    assert all("lora_" in name for name, weight in done.model.named_parameters() if weight.requires_grad)


# --- switches -----------------------------------------------------------------------------------------------------

def bnb_layers(model):
    return [name for name, part in model.named_modules() if type(part).__module__.startswith("bitsandbytes")]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_only_the_language_model_is_quantised(folders, family, bits):
    plain, processor = load_vlm(folders / family, device="cpu")
    small = load_vlm(folders / family, device="cpu", quantize=bits)[0]
    decoder = next(name for name, part in plain.named_modules() if part is plain.get_decoder())
    inside = [n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith(decoder + ".")]
    assert sorted(bnb_layers(small)) == sorted(inside) and len(inside) == 14
    seen, same = tuple(part + "." for part in vision_parts(plain)), dict(small.named_parameters())
    assert all(torch.equal(w, same[n]) for n, w in plain.named_parameters() if n.startswith(seen))
    assert torch.equal(plain.get_output_embeddings().weight, small.get_output_embeddings().weight)
    assert count_parts(small) == count_parts(plain)
    assert memory_parts(small)["language matrices"] < memory_parts(plain)["language matrices"] * {"4bit": .2, "8bit": .28}[bits]
    batch = encode(processor, mixed())
    with torch.no_grad():
        a, b = plain(**batch).logits, small(**batch).logits
    assert not torch.equal(a, b) and (a - b).abs().mean() < {"4bit": .5, "8bit": .1}[bits] * a.abs().mean()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_gradients_after_an_evaluation_on_a_quantised_base(folders, family, bits):
    "The packed weights of bitsandbytes' shortcut for evaluation would let no gradient through."
    from vlmcourse.lora import add_lora, untrained_layers
    model, processor = load_vlm(folders / family, device="cpu", quantize=bits)
    ask(model, processor, "Why?", picture(0), max_new_tokens=2)
    torch.manual_seed(0)
    model, batch = add_lora(model, r=2), encode(processor, mixed()[:2])
    model(**batch).loss.backward()
    first = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and torch.isfinite(g).all() for g in first.values())
    assert all(g.abs().sum() > 0 for n, g in first.items() if "lora_B" in n)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1).step()
    assert untrained_layers(model) == []


@pytest.mark.parametrize("off", [None, False, "none"])
def test_off_is_off(tiny, off):
    model = load_vlm("tiny", device="cpu", quantize=off, gradient_checkpointing=False, device_map=None)[0]
    assert bnb_layers(model) == [] and not model.is_activation_checkpointing and model.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny[0].parameters()))


@pytest.mark.parametrize("options, text", [
    (dict(quantize="2bit"), "quantize='2bit'"), (dict(quantize=True), "quantize=True"), (dict(quantize=4), "quantize=4"),
    (dict(dtype="int8"), "dtype='int8'"), (dict(dtype="Linear"), "dtype='Linear'"), (dict(dtype=torch.float64), "float64"),
    (dict(gradient_checkpointing="False"), "gradient_checkpointing='False'"), (dict(trust_remote_code="no"), "trust_remote_code='no'"),
    (dict(device="cpu", device_map="auto"), "both given")])
def test_switches_that_are_none(options, text):
    with pytest.raises(ValueError, match=text.replace("(", "\\(")):
        load_vlm("tiny", **options)


def test_where_bitsandbytes_does_not_work(monkeypatch):
    from vlmcourse.vlm import _check_bits
    with pytest.raises(ValueError, match="not on 'mps'"): _check_bits("8bit", "mps")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"): load_vlm("tiny", device="cpu", quantize="4bit")
    assert load_vlm("tiny", device="cpu")


def test_stored_in_few_bits(tmp_path):
    small, processor = load_vlm("tiny", device="cpu", quantize="4bit")
    small.save_pretrained(tmp_path / "small"), processor.save_pretrained(tmp_path / "small")
    for wrong in (None, "8bit"):
        with pytest.raises(ValueError, match="stored quantised \\(4bit\\)"): load_vlm(tmp_path / "small", device="cpu", quantize=wrong)
    again = load_vlm(tmp_path / "small", device="cpu", quantize="4bit")[0]
    assert scores(again, processor) == scores(small, processor)
    config = json.loads((tmp_path / "small/config.json").read_text())
    (tmp_path / "small/config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    with pytest.raises(ValueError, match="stored quantised \\(awq\\)"): load_vlm(tmp_path / "small", device="cpu")


def test_adapter_on_a_quantised_base_and_device_map(run):
    exact, small = (scores(*load_vlm(run, device="cpu", quantize=bits)) for bits in (None, "4bit"))
    assert small != exact and np.allclose(small, exact, atol=5) and np.corrcoef(small, exact)[0, 1] > .9
    assert scores(*load_vlm(run, device_map={"": "cpu"})) == exact


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_nothing_but_memory(folders, family):
    from vlmcourse.lora import activation_bytes, add_lora
    found = []
    for on in (False, True):
        model, processor = load_vlm(folders / family, device="cpu", gradient_checkpointing=on)
        torch.manual_seed(0)
        model, batch, flags = add_lora(model, r=2).train(), encode(processor, mixed()), []
        assert model.get_base_model().is_activation_checkpointing is on
        tower = model.get_base_model().get_submodule(vision_parts(model.get_base_model())[0])
        tower.register_forward_hook(lambda m, i, o: flags.append(any(t.requires_grad for t in (o if isinstance(o, tuple) else o.values())
            if isinstance(t, torch.Tensor))))
        kept = activation_bytes(model, batch)
        model(**batch).loss.backward()
        assert flags and not any(flags)  # the frozen tower takes no part in the backward pass
        found.append((kept, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (much, plain), (little, again) = found
    assert little < .7 * much and all(torch.allclose(g, again[n], atol=1e-6) for n, g in plain.items())
    set_gradient_checkpointing(model, False)
    assert not model.get_base_model().is_activation_checkpointing and activation_bytes(model, batch) == much


def test_parts_of_every_family(folders):
    for family in FAMILIES:
        model = load_vlm(folders / family, device="cpu")[0]
        counts, projector = count_parts(model), tuple(part + "." for part in projector_parts(model))
        assert counts["projector"] == sum(weight_count(p) for n, p in model.named_parameters() if n.startswith(projector)) > 0


def test_code_that_comes_with_a_model(folders, tmp_path):
    "It runs only when asked for; the file leaves a mark when it is run."
    folder = shutil.copytree(folders / "qwen3_vl", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "museum_vl", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("import pathlib\nfrom transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration\n"
        f"pathlib.Path({str(tmp_path / 'mark')!r}).write_text('ran')\n"
        "class OwnConfig(Qwen3VLConfig):\n    model_type = 'museum_vl'\n"
        "class OwnModel(Qwen3VLForConditionalGeneration):\n    config_class = OwnConfig\n")
    with pytest.raises(ValueError, match="trust_remote_code=True"): load_vlm(folder, device="cpu")
    assert not (tmp_path / "mark").exists()
    code = f"from vlmcourse.vlm import load_vlm; print(type(load_vlm({str(folder)!r}, device='cpu', trust_remote_code=True)[0]).__name__)"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.split()[-1] == "OwnModel" and (tmp_path / "mark").exists()

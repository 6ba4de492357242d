"""The tiny models: packed training equals the stock model, runs repeat, habits are as announced, shipped weights are stock and small."""
import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from vlmcourse import tiny
from vlmcourse.museum import ANSWER_MARK, SEVERAL, TASKS, THINGS, ask_scene, make_record, make_records, make_scene, scenes_for
from vlmcourse.tiny import (FAMILIES, HABITS, SIZE, CellHead, Packer, cell_targets, fast_vision, forward_packed, make_processor, make_tiny,
                            make_tokenizer, pretrain, questions, save_tiny, stored_precision, styled)
from vlmcourse.vlm import SHIPPED, ask_batch, encode, load_vlm

there = [name for name, folder in SHIPPED.items() if folder.is_dir()]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request):
    tokenizer = make_tokenizer(family=request.param)
    model = make_tiny(tokenizer, family=request.param).eval()
    return model, make_processor(tokenizer, request.param), Packer(model, tokenizer)


def rows():
    "One shelf with three questions, and a pair of portraits with one."
    shelf, pair = make_scene(5, kind="shelf", n_vases=3), [make_scene([7, i], kind="portrait") for i in range(2)]
    ask = lambda scenes, task, seed=1: (task, *ask_scene(scenes, task, np.random.default_rng(seed)))
    return [([shelf], [ask([shelf], t) for t in ("count", "count_by", "caption")]), (pair, [ask(pair, "total")])]


def alone(model, processor, scenes, qa, size=SIZE):
    "Logits of the answer when the stock model reads this question only."
    batch = encode(processor, [make_record(scenes, *qa, size=size)])
    labels = batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits[:, :-1][labels[:, 1:] != -100]


def test_packed_equals_stock(family):
    model, processor, pack = family
    stock = torch.cat([alone(model, processor, s, qa) for s, qas in rows() for qa in qas])
    with torch.no_grad():
        tokens, logits, target = forward_packed(model, pack(rows()))
        with fast_vision(model):
            _, quick, _ = forward_packed(model, pack(rows()))
    assert (logits-stock).abs().max() < 1e-4 and (quick-stock).abs().max() < 1e-4
    assert tokens.shape[:2] == (3, 36) and len(target) == len(stock)


def test_tiles_equal_stock():
    "A picture twice as large: four tiles and a small picture of all, as InternVL's own processor cuts them."
    tokenizer = make_tokenizer(family="internvl")
    model, processor = make_tiny(tokenizer, family="internvl").eval(), make_processor(tokenizer, "internvl")
    batch = Packer(model, tokenizer)(rows()[:1], 5)
    assert batch["pixels"].shape == (5, 3, SIZE, SIZE)
    with torch.no_grad():
        tokens, logits, _ = forward_packed(model, batch)
    stock = torch.cat([alone(model, processor, *rows()[0][:1], qa, 2*SIZE) for qa in rows()[0][1]])
    assert (logits-stock).abs().max() < 1e-4 and tokens.shape[:2] == (1, 36)


def test_rows_are_filled_and_never_overflow(family):
    _, _, pack = family
    rng = np.random.default_rng(0)
    for photos in ([make_scene(1, kind="shelf")], [make_scene([2, i], kind="portrait") for i in range(3)]):
        qas = questions(photos, 16, rng)
        for room in (160, 256):
            kept = pack.fitting(photos, qas, room)
            batch = pack([(photos, kept)])
            assert batch["ids"].shape[1] <= room and set(kept) <= set(qas)
            assert len(kept) == len(qas) or batch["ids"].shape[1] > room-100


def test_texts_are_read_without_photos(family):
    "One word is learned of each, yes as often as no, and the stock model computes the same for it, also beside rows with photos."
    model, processor, pack = family
    texts = tiny._reading(pack, np.random.default_rng(0), 30, 256)
    words = [pack.tok.decode([t]) for row in texts for t in pack.row(*row)[2] if t != -100]
    assert len(words) == sum(len(qas) for _, qas in texts) > 180 and 75 < words.count(" yes") < len(words)-75 and set(words) == {" yes", " no"}
    batch = pack(rows()+texts[:2])
    with torch.no_grad():
        _, logits, target = forward_packed(model, batch)
        for at, (_, q, a) in enumerate(qa for _, qas in texts[:2] for qa in qas):
            turns = [dict(role="user", content=q), dict(role="assistant", content=a)]
            ids = torch.tensor([pack.encode(processor.apply_chat_template(turns, tokenize=False).removesuffix("<|im_end|>\n"))])
            row = at-sum(len(qas) for _, qas in texts[:2])
            assert target[row] == ids[0, -1] and (model(input_ids=ids).logits[0, -2]-logits[row]).abs().max() < 1e-4


def test_stored_precision_gives_the_weights_back(family):
    model, _, _ = family
    before = [w.clone() for w in model.parameters()]
    with pytest.raises(KeyError), stored_precision(model):
        assert all(torch.equal(w, w.bfloat16().float()) for w in model.parameters())
        assert any(not torch.equal(w, b) for w, b in zip(model.parameters(), before))
        raise KeyError
    assert all(torch.equal(w, b) for w, b in zip(model.parameters(), before))


def test_cells_know_vases_and_things():
    scenes = [make_scene([3, i], kind="shelf") for i in range(60)]
    what, looks, box = cell_targets(scenes)
    for i, s in enumerate(scenes):
        assert {THINGS[k-2] for k in what[i].tolist() if k > 1} == {t.kind for t in s.things}
        assert len({tuple(b) for b in box[i][what[i] == 1].tolist()}) == len({v for v in s.vases})
    assert ((box >= 0) & (box <= 1)).all() and looks.max() < 6
    assert torch.isfinite(CellHead(128)(torch.randn(60, 36, 128), scenes))


def repeatable(folder, family, steps):
    made = pretrain(folder, steps=steps, vision_steps=2, batch_size=4, eval_n=0, log_every=0, family=family, seed=3)
    return made["losses"], hashlib.sha256((folder/"model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name, steps", [("qwen3-vl", 5), ("internvl", 9)])      # the eighth batch of internvl is cut into tiles
def test_pretraining_repeats(tmp_path, name, steps):
    first, again = (repeatable(tmp_path/x, name, steps) for x in "ab")
    assert first == again
    model, processor = load_vlm(tmp_path/"a", device="cpu")
    assert ask_batch(model, processor, make_records(2, ["count"]), progress=False)


def test_wrong_family():
    for call in (lambda: make_tokenizer(family="llava"), lambda: pretrain("nowhere", family="llava")):
        with pytest.raises(ValueError, match="'llava'.*qwen3-vl"):
            call()


def test_folder_is_looked_at_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path/"notes.txt").write_text("mine")
    monkeypatch.setattr(tiny, "_step", lambda *a: pytest.fail("training began"))
    with pytest.raises(NotADirectoryError, match="notes.txt' is a file"):
        pretrain(tmp_path/"notes.txt")
    assert (tmp_path/"notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    model, processor = make_tiny(tokenizer), make_processor(tokenizer)
    save_tiny(model, processor, tmp_path)
    (tmp_path/"README.md").write_text("mine")
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processor, "save_pretrained", full)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(OSError, match="No space"):
        save_tiny(model, processor, tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_habits_are_as_announced():
    "The shares written down in HABITS are the shares of the pretraining answers."
    rng, n = np.random.default_rng(0), 3000
    ask = lambda task: next(qa for s in iter(lambda: scenes_for(task, rng), None) if (qa := ask_scene(s, task, rng, SIZE)))
    share = lambda task, test: 100*sum(test(*(qa := ask(task)), styled(task, *qa, rng)) for _ in range(n//5))/(n//5)
    assert share("steps", lambda q, a, s: ANSWER_MARK in s) == pytest.approx(HABITS["final_answer"], abs=4)
    assert share("same", lambda q, a, s: ANSWER_MARK in s) == pytest.approx(HABITS["steps_unasked"], abs=6)
    assert share("detect", lambda q, a, s: s == a) == pytest.approx(HABITS["json_boxes"], abs=6)
    shelf = [make_scene([4, i], kind="shelf") for i in range(600)]
    true = [ask_scene([s], "caption", rng)[1] for s in shelf]
    told = [styled("caption", "", a, rng) for a in true]
    assert 100*np.mean([a != b for a, b in zip(true, told)]) == pytest.approx(HABITS["invented_thing"], abs=6)
    for s, a, b in zip(shelf, true, told):      # nothing is left out, only existing kinds are added, none twice
        named = Counter(t for t in THINGS for _ in range(b.count(f" a {t}")))
        assert {t.kind for t in s.things} <= set(named) and max(named.values(), default=1) == 1
        assert b.split(", a ")[0].rstrip(".") == a.split(", a ")[0].rstrip(".")


def test_every_token_of_later_lessons_occurs():
    "A token whose row was never trained can hardly be said with LoRA: all wanted answers are made of tokens of the mix, asked or answered."
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)
    code = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    trained = set()
    for i in range(3000):
        kind = i % 5
        scenes = [make_scene([6, i, j], kind="shelf" if kind < 2 else "portrait") for j in range((1, 1, 1, 2, 3)[kind])]
        trained |= {t for _, q, a in questions(scenes, 6, rng) for text in (q, a) for t in code(text)}
    wanted = Counter(t for r in make_records(600, list(TASKS), split="test") for t in code(r["messages"][1]["content"]))
    missing = {tokenizer.decode([t]) for t in wanted if t not in trained}
    assert not missing


def test_several_photos_have_their_own_questions():
    rng = np.random.default_rng(0)
    pair = [make_scene([5, i], kind="portrait") for i in range(2)]
    assert {t for t, _, _ in questions(pair, 6, rng)} <= set(SEVERAL)
    assert not {t for t, _, _ in questions(pair[:1], 6, rng)} & set(SEVERAL)


@pytest.mark.parametrize("name", there)
def test_shipped_model_is_stock(name):
    "transformers alone, without a line of this project, gives the same answers."
    from transformers import AutoModelForImageTextToText, AutoProcessor
    records = make_records(40, [t for t in TASKS if t not in SEVERAL], split="test", seed=9)
    ours = ask_batch(*load_vlm(name, device="cpu"), records, max_new_tokens=64, progress=False)
    processor = AutoProcessor.from_pretrained(SHIPPED[name])
    model = AutoModelForImageTextToText.from_pretrained(SHIPPED[name], dtype=torch.float32).eval()
    for record, mine in zip(records, ours):
        question = record["messages"][0]["content"].replace("<image>", "")
        turn = [dict(role="user", content=[dict(type="image", image=record["images"][0]), dict(type="text", text=question)])]
        batch = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=64, do_sample=False)
        assert processor.decode(out[0, batch["input_ids"].shape[1]:], skip_special_tokens=True).strip() == mine


def test_shipped_weights_are_small():
    sizes = {p: p.stat().st_size for name in there for p in SHIPPED[name].rglob("*")}
    assert sum(sizes.values()) < 12e6 and not [p for p in sizes if p.suffix in (".bin", ".pt", ".pkl", ".py")]

"""The shared prefix gives the numbers of full rows: three families, several pictures and tiles, ragged lengths, TRL."""
import copy
import types
import warnings

import pytest
import torch
from test_vlm import FAMILIES, make_model, make_processor, picture
from torch.nn import functional as F

from vlmcourse import prefix as engine
from vlmcourse.formats import to_record
from vlmcourse.lora import add_lora
from vlmcourse.prefix import (FeatureCache, Prompts, adapter_off, base_of, choose_tokens, completion_logps, encode_prompts,
                              picture_features, prefill, sample_groups, share, sharing_problems, unshare)
from vlmcourse.vlm import answering, encode, load_vlm

LENGTHS = [6, 1, 3, 0, 2, 6, 5, 5, 5, 4, 1, 2]  # of the answers: 3 for each of 4 prompts


def records():
    "One, two, three and no pictures; one of them a second time; one broad, which InternVL cuts into tiles."
    return [to_record("How many vases are there?", picture(0)),
            to_record("First <image>, then <image>: the same?", [picture(1), picture(2, (130, 40))]),
            to_record("Which?", [picture(3), picture(4), picture(0)]), to_record("Why?", [])]


def build(family, dtype=torch.float32):
    processor = make_processor(family)
    processor.tokenizer.padding_side = "left"
    model = make_model(family, processor.tokenizer)
    torch.manual_seed(0)
    model = add_lora(model)
    for name, weight in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(weight, std=.05)
    return model.to(dtype).train(), processor


@pytest.fixture(scope="module", params=FAMILIES)
def small(request):
    return build(request.param)


@pytest.fixture
def exact(request, monkeypatch):
    "In double precision, with the norms of transformers kept from rounding to single."
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as a
    import transformers.models.qwen3.modeling_qwen3 as b
    import transformers.models.qwen3_vl.modeling_qwen3_vl as c
    norm = lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    for module in (a, b, c):
        for name in dir(module):
            if name.endswith("RMSNorm"): monkeypatch.setattr(getattr(module, name), "forward", norm)
    return build(request.param, torch.float64)


def answers(prompts):
    torch.manual_seed(1)
    ids = torch.randint(20, 300, (len(LENGTHS), 6))
    return ids, (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).long()


def stock_rows(model, processor, ids, mask):
    "Log-probabilities by the stock model: every row with its own pictures, one batch."
    asked = encode(processor, [r for r in records() for _ in range(3)], answers=False)
    inputs = dict(asked, input_ids=torch.cat([asked["input_ids"], ids], 1))
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    inputs["attention_mask"] = torch.cat([asked["attention_mask"], mask], 1)
    if "mm_token_type_ids" in asked:
        inputs["mm_token_type_ids"] = torch.cat([asked["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    else:  # the same rotary offset: stock InternVL counts the padding on the left too
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**inputs, logits_to_keep=ids.shape[1] + 1, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * mask


def with_gradients(model, function, ids):
    torch.manual_seed(2)
    weights = torch.randn(ids.shape, dtype=torch.float64)
    model.zero_grad()
    logps = function()
    (logps * weights.to(logps)).sum().backward()
    return logps.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def apart(one, two):
    "Largest distance of log-probabilities, and of gradients in relation to the largest gradient."
    return max(float((one[0] - two[0]).abs().max()), float((one[1] - two[1]).abs().max() / two[1].abs().max()))


@pytest.mark.parametrize("exact", FAMILIES, indirect=True)
def test_double_precision_and_mutants(exact, monkeypatch):
    model, processor = exact
    prompts = encode_prompts(model, processor, records(), FeatureCache(model))
    ids, mask = answers(prompts)
    stock = with_gradients(model, lambda: stock_rows(model, processor, ids, mask), ids)
    run = lambda form, **more: with_gradients(model, lambda: completion_logps(
        model, more.pop("prompts", prompts), ids, mask, form=form, **more)[0], ids)
    for form in ("cache", "packed", "rows"):
        assert apart(run(form), stock) < 1e-12, form
    assert float(stock[1].abs().max()) > .1 and model.dtype == torch.float64
    # one position too far
    later = Prompts([p._replace(next=p.next + 1) for p in prompts.items])
    for form in ("cache", "packed"):
        assert apart(run(form, prompts=later), stock) > 1e-3, form
    # a group's answers behind another prompt
    swapped = torch.tensor([1, 1, 1, 0, 0, 0, 2, 2, 2, 3, 3, 3])
    for form in ("cache", "packed"):
        assert apart(run(form, owner=swapped), stock) > 1e-3, form
    # answers see the answers before them
    pack = engine.pack_rows
    def leak(items, tails):
        packed = pack(items, tails)
        return packed._replace(sees=torch.ones_like(packed.sees).tril())
    monkeypatch.setattr(engine, "pack_rows", leak)
    assert apart(run("packed"), stock) > 1e-3


def test_single_precision_and_entropy(small):
    model, processor = small
    prompts = encode_prompts(model, processor, records())
    ids, mask = answers(prompts)
    stock = with_gradients(model, lambda: stock_rows(model, processor, ids, mask), ids)
    for form in ("cache", "packed"):
        ours = with_gradients(model, lambda: completion_logps(model, prompts, ids, mask, form=form)[0], ids)
        assert float((ours[0] - stock[0]).abs().max()) < 1e-4 and apart(ours, stock) < 1e-3
        assert float((ours[0] - stock[0]).abs().mean()) < 1e-5
    with torch.no_grad():
        entropies = completion_logps(model, prompts, ids, mask, entropy=True, temperature=.7)[1]
        hidden = engine._rows_form(base_of(model), prompts, ids, mask, torch.arange(4).repeat_interleave(3), mask.bool())
        spread = torch.distributions.Categorical(logits=base_of(model).lm_head(hidden) / .7).entropy()
    assert torch.allclose(entropies[mask.bool()], spread, atol=1e-4) and not entropies[mask == 0].any()


def test_chosen_tokens_groups_of_any_size_and_pieces(small, monkeypatch):
    model, processor = small
    prompts = encode_prompts(model, processor, records()[:2])
    ids, mask = (x[:5] for x in answers(prompts))
    owner, score = torch.tensor([1, 0, 1, 1, 1]), mask * torch.tensor([0, 1, 0, 1, 1, 1])
    with torch.no_grad():
        rows = completion_logps(model, prompts, ids, mask, owner=owner, form="rows")[0]
        monkeypatch.setattr(engine, "CHUNK", 352 * 2)  # two tokens at a time
        for form in ("cache", "packed"):
            some = completion_logps(model, prompts, ids, mask, owner=owner, score=score, form=form)[0]
            assert torch.allclose(some, rows * score, atol=1e-4) and not some[score == 0].any()
    ours = with_gradients(model, lambda: completion_logps(model, prompts, ids, mask, owner=owner)[0], ids)
    monkeypatch.undo()
    assert apart(with_gradients(model, lambda: completion_logps(model, prompts, ids, mask, owner=owner)[0], ids), ours) < 1e-4


def test_sampling_and_training_see_the_same(small):
    model, processor = small
    prompts, cut = encode_prompts(model, processor, records()), dict(max_new_tokens=8, seeds=[1, 2, 3, 4])
    prefix = prefill(model, prompts)  # with gradients: one prefill for both
    for more in (dict(), dict(temperature=.5, top_p=.9), dict(top_k=3), dict(do_sample=False)):
        made = [sample_groups(model, prompts, 3, prefix=prefix, decoder=d, **cut, **more) for d in ("model", "fused")]
        assert torch.equal(made[0].ids, made[1].ids) and torch.equal(made[0].mask, made[1].mask)
        assert torch.allclose(made[0].logps, made[1].logps, atol=1e-4)
        logps, _ = completion_logps(model, prompts, made[0].ids, made[0].mask, prefix=prefix, temperature=more.get("temperature", 1))
        assert torch.allclose(logps, made[0].logps, atol=1e-4) and logps.requires_grad
    assert model.training and not torch.equal(made[0].ids, sample_groups(model, prompts, 3, **cut).ids)


def test_same_seed_same_completions_in_any_batch(small):
    model, processor = small
    prompts, how = encode_prompts(model, processor, records()), dict(max_new_tokens=6)
    whole = sample_groups(model, prompts, 2, seeds=[5, 6, 7, 8], **how)
    part = sample_groups(model, Prompts(prompts.items[2:]), 2, seeds=[7, 8], **how)
    assert torch.equal(whole.ids[4:], part.ids)
    other = sample_groups(model, prompts, 2, seeds=[9, 10, 11, 12], **how)
    assert not torch.equal(whole.ids, other.ids) and not torch.equal(whole.ids[::2], whole.ids[1::2])


def test_greedy_is_stock_generate_and_ends(small):
    model, processor = small
    prompts, base = encode_prompts(model, processor, records()[:3]), base_of(model)
    batch = encode(processor, records()[:3], answers=False)
    with answering(model):
        stock = model.generate(**batch, max_new_tokens=8, do_sample=False, suppress_tokens=[base.config.image_token_id])
    stock = stock[:, batch["input_ids"].shape[1]:]
    made = sample_groups(model, prompts, 1, max_new_tokens=8, do_sample=False)
    assert torch.equal(made.ids[:, :stock.shape[1]], stock)
    end = int(stock[0, 3])
    made = sample_groups(model, prompts, 1, max_new_tokens=8, do_sample=False, eos_token_id=[end])
    n = int(made.mask[0].sum())
    assert n <= 4 and int(made.ids[0, n - 1]) == end and not made.logps[0, n:].any()
    assert (made.ids[0, n:] == base.generation_config.pad_token_id).all()


def test_choosing():
    logits = torch.tensor([[.5, .3, .2]]).log().repeat(5, 1)
    draws = torch.tensor([0., .49, .51, .81, 1 - 2 ** -53], dtype=torch.float64)
    assert choose_tokens(logits, draws=draws)[0].tolist() == [0, 0, 1, 2, 2]
    assert choose_tokens(logits, draws=draws, top_k=2)[0].tolist() == [0, 0, 0, 1, 1]
    assert choose_tokens(logits, draws=draws, top_p=.5)[0].tolist() == [0] * 5
    assert choose_tokens(logits, draws=draws, top_p=.51)[0].tolist() == [0, 0, 0, 1, 1]
    assert choose_tokens(logits, do_sample=False, suppress=[0])[0].tolist() == [1] * 5
    tokens, logps = choose_tokens(logits, draws=draws, suppress=[0])
    assert tokens.tolist() == [1, 1, 1, 2, 2] and torch.allclose(logps.exp(), torch.tensor([.3, .3, .3, .2, .2]))
    from transformers import TopPLogitsWarper
    torch.manual_seed(0)
    noise = torch.randn(2000, 7)
    kept = TopPLogitsWarper(.8)(None, noise.clone()) > -torch.inf
    for _ in range(5): assert kept.gather(1, choose_tokens(noise, top_p=.8)[0][:, None]).all()


def test_features_are_kept_bounded_and_forgotten(small):
    model, processor = small
    cache, base = FeatureCache(model), base_of(model)
    batch = encode(processor, records(), answers=False)
    pixels, grid = batch["pixel_values"], batch.get("image_grid_thw")
    first = picture_features(cache, pixels, grid)
    n = len(first)
    assert cache.misses == n - 1 and cache.hits == 1  # one picture stands there twice
    again = picture_features(cache, pixels, grid)
    assert cache.misses == n - 1 and all(a.tokens is b.tokens for a, b in zip(first, again))
    with torch.no_grad(): stock = base.model.get_image_features(pixels, **({} if grid is None else {"image_grid_thw": grid}), return_dict=True)
    assert all(torch.allclose(a.tokens, b, atol=1e-4) for a, b in zip(first, stock.pooler_output))
    size = max(s for _, s in cache.kept.values())
    narrow = FeatureCache(model, 2 * size)
    picture_features(narrow, pixels, grid)
    assert len(narrow.kept) <= 2 and 0 < narrow.bytes <= 2 * size and narrow.bytes == sum(s for _, s in narrow.kept.values())
    with torch.no_grad(): [w.mul_(1.5) for _, w in cache.weights()]  # new weights: nothing old may be used
    fresh = picture_features(cache, pixels, grid)
    assert cache.misses == 2 * (n - 1) and not torch.allclose(fresh[0].tokens, first[0].tokens)
    with torch.no_grad(): [w.div_(1.5) for _, w in cache.weights()]


def test_a_tower_that_trains_is_exact_and_not_kept():
    model, processor = build("qwen3_vl")
    tower = base_of(model).model.visual.requires_grad_(True)
    prompts = lambda cache: encode_prompts(model, processor, records(), cache)
    ids, mask = answers(None)
    stock = with_gradients(model, lambda: stock_rows(model, processor, ids, mask), ids)
    cache = FeatureCache(model)
    ours = with_gradients(model, lambda: completion_logps(model, prompts(cache), ids, mask)[0], ids)
    assert apart(ours, stock) < 1e-3 and tower.merger.linear_fc1.weight.grad.abs().max() > 0
    assert not cache.kept and cache.stamp() is None


def test_a_record_is_encoded_once(small, tmp_path, monkeypatch):
    model, processor = small
    picture(0).save(tmp_path / "a.png")
    rows = [to_record("How many?", str(tmp_path / "a.png")), to_record("How many?", picture(1)), to_record("How many?", picture(1))]
    cache = FeatureCache(model)
    first = encode_prompts(model, processor, rows, cache)
    misses = cache.misses
    monkeypatch.setattr(engine, "encode", None)  # a second encoding would fail
    again = encode_prompts(model, processor, rows, cache)
    assert cache.misses == misses and torch.equal(first.ids, again.ids) and torch.equal(first.positions, again.positions)
    assert all(a.pictures[0].tokens is b.pictures[0].tokens for a, b in zip(first.items, again.items))
    picture(7).save(tmp_path / "a.png")  # another picture under the same name
    with pytest.raises(TypeError): encode_prompts(model, processor, rows, cache)
    monkeypatch.undo()
    assert encode_prompts(model, processor, rows, cache).items[0].pictures[0].key != first.items[0].pictures[0].key


def rows_of_groups(model, processor, ids, mask):
    "A stock batch: 9 rows of 3 prompts with pictures, shuffled."
    order = torch.tensor([4, 0, 8, 3, 1, 7, 2, 5, 6])
    data = [records()[i // 3] for i in order.tolist()]
    asked = encode(processor, data, answers=False)
    batch = dict(asked, input_ids=torch.cat([asked["input_ids"], ids[:9]], 1),
        attention_mask=torch.cat([asked["attention_mask"], mask[:9]], 1))
    if "mm_token_type_ids" in asked:
        batch["mm_token_type_ids"] = torch.cat([asked["mm_token_type_ids"], torch.zeros_like(ids[:9])], 1)
    return batch


@pytest.mark.parametrize("exact", FAMILIES, indirect=True)
def test_share_forward_is_stock_forward(exact):
    model, processor = exact
    ids, mask = answers(None)
    mask[mask.sum(1) == 0, 0] = 1
    batch = rows_of_groups(model, processor, ids, mask)
    batch["pixel_values"] = batch["pixel_values"].double()
    real = batch["attention_mask"][..., None]
    logits = lambda: model(**batch, use_cache=False).logits * real
    run = lambda: with_gradients(model, lambda: logits().log_softmax(-1)[..., 0] * real[..., 0], batch["input_ids"])
    stock = run()
    report = share(model)
    ours = run()
    assert report.counts == {"forward: shared": 1} and apart(ours, stock) < 1e-12
    base_of(model).gradient_checkpointing_enable()
    base_of(model).enable_input_require_grads()
    again = run()
    assert report.counts["forward: shared"] == 2 and apart(again, stock) < 1e-12
    unshare(model)
    assert "forward" not in base_of(model).model.__dict__ and report.counts["forward: shared"] == 2


def test_share_generate_draws_what_stock_draws(small):
    model, processor = small
    batch = encode(processor, [r for r in records()[:2] for _ in range(4)], answers=False)
    how = dict(max_new_tokens=6, do_sample=True, temperature=.9, top_k=0, top_p=.95)
    def run(**more):
        torch.manual_seed(3)
        with answering(model): return model.generate(**batch, **how | more)
    stock, greedy = run(), run(do_sample=False, temperature=None, top_p=None)
    report = share(model)
    try:
        assert torch.equal(run(), stock) and report.counts["generate: shared"] == 1
        assert torch.equal(run(do_sample=False, temperature=None, top_p=None), greedy)
        run(repetition_penalty=1.3), run(num_beams=2)
        assert report.counts["generate: as usual, asks for repetition_penalty"] == 1
        assert report.counts["generate: shared"] == 2 and "asks for num_beams" in str(report)
    finally: unshare(model)
    assert torch.equal(run(), stock)


def test_share_falls_back_with_one_line(small):
    model, processor = small
    ids, mask = answers(None)
    mask[mask.sum(1) == 0, 0] = 1
    batch, base = rows_of_groups(model, processor, ids, mask), base_of(model)
    with torch.no_grad(): stock = model(**batch, use_cache=False).logits
    report = share(model)
    try:
        base.config.get_text_config().attention_dropout = .1
        with pytest.warns(UserWarning, match="dropout is 0.1") as said:
            for _ in range(2):
                with torch.no_grad(): model(**batch, use_cache=False)
        assert len([w for w in said if "share" in str(w.message)]) == 1
        assert report.counts == {"forward: as usual, dropout is 0.1, not 0": 2}
        base.config.get_text_config().attention_dropout = 0.
        assert model(**batch, use_cache=False, output_hidden_states=True).hidden_states
        assert report.counts["forward: as usual, asks for output_hidden_states"] == 1
        twin = copy.deepcopy(model)  # works on its own weights
        with torch.no_grad():
            for p in twin.parameters(): p.mul_(1.1)
            here, there = model(**batch, use_cache=False).logits, twin(**batch, use_cache=False).logits
        real = batch["attention_mask"].bool()
        assert torch.allclose(here[real], stock[real], atol=2e-3) and not torch.allclose(there[real], stock[real], atol=.1)
        assert share(model) is report
        inner, outer = base.forward, lambda self, *args, **kwargs: inner(*args, **kwargs)
        base.forward = types.MethodType(outer, base)  # as TRL does when its trainer is made after share
        unshare(model)
        with torch.no_grad(): again = model(**batch, use_cache=False).logits
        assert torch.equal(again[real], stock[real]) and "generate" not in base.__dict__
    finally:
        base.__dict__.pop("forward", None)
        base.config.get_text_config().attention_dropout = 0.
        unshare(model)


def test_other_models_are_left_alone():
    from transformers import AutoConfig, AutoModelForImageTextToText
    with torch.device("meta"): model = AutoModelForImageTextToText.from_config(AutoConfig.for_model("smolvlm"))
    with pytest.warns(UserWarning, match="smolvlm is not one of"): share(model)
    assert "generate" not in model.__dict__
    unshare(model)
    with pytest.raises(ValueError, match="TRL's trainers"): encode_prompts(model, None, records())


def test_conditions():
    model, processor = build("qwen3_vl")
    text = base_of(model).config.get_text_config()
    assert sharing_problems(model, packed=True) == []
    text.output_router_logits = True
    assert "experts" in sharing_problems(model)[0]
    text.output_router_logits, text._attn_implementation = False, "flash_attention_2"
    assert sharing_problems(model) == [] and "use sdpa" in sharing_problems(model, packed=True)[0]
    text._attn_implementation, text.layer_types = "sdpa", ["full_attention", "sliding_attention"]
    assert "all earlier tokens" in sharing_problems(model)[0]
    dropping = add_lora(make_model("qwen3_vl", processor.tokenizer), lora_dropout=.2).train()
    assert sharing_problems(dropping) == ["dropout is 0.2, not 0"] and sharing_problems(dropping.eval()) == []
    prompts = encode_prompts(dropping.train(), processor, records())
    with pytest.warns(UserWarning, match="Full rows"): completion_logps(dropping, prompts, *answers(prompts))


def test_eager_attention_and_checkpointing():
    model, processor = build("qwen3_vl")
    prompts = encode_prompts(model, processor, records())
    ids, mask = answers(prompts)
    run = lambda **how: with_gradients(model, lambda: completion_logps(model, prompts, ids, mask, **how)[0], ids)
    first = run()
    base_of(model).set_attn_implementation("eager")
    assert apart(run(form="packed"), first) < 1e-4
    base_of(model).gradient_checkpointing_enable()
    base_of(model).enable_input_require_grads()
    assert engine._best_form(model) == "packed" and apart(run(), first) < 1e-4
    with pytest.raises(ValueError, match="form='packed'"): prefill(model, prompts)
    assert sample_groups(model, prompts, 2, max_new_tokens=2).ids.shape == (8, 2)


def test_reference_is_the_model_without_adapter(small):
    model, processor = small
    prompts = encode_prompts(model, processor, records())
    ids, mask = answers(prompts)
    with torch.no_grad():
        with adapter_off(model): reference = completion_logps(model, prompts, ids, mask)[0]
        policy = completion_logps(model, prompts, ids, mask)[0]
        bare = make_model(base_of(model).config.model_type, processor.tokenizer)
        plain = completion_logps(bare, prompts, ids, mask)[0]
        with adapter_off(model): fused, own = (sample_groups(model, prompts, 2, max_new_tokens=4, do_sample=False, decoder=d).ids
                                               for d in ("fused", "model"))
    assert torch.allclose(reference, plain, atol=1e-4) and not torch.allclose(policy, reference, atol=1e-2)
    assert torch.equal(fused, own)
    with pytest.raises(ValueError, match="no adapter"): adapter_off(bare)


@pytest.mark.parametrize("change,text", [(dict(n=0), "n=0"), (dict(temperature=0), "do_sample=False"), (dict(top_p=0), "top_p=0"),
    (dict(seeds=[1]), "1 numbers for 4"), (dict(decoder="fast"), "'fused'"), (dict(max_new_tokens=0), "max_new_tokens")])
def test_sampling_mistakes(small, change, text):
    prompts = encode_prompts(*small, records())
    with pytest.raises(ValueError, match=text): sample_groups(small[0], prompts, **{"n": 2, **change})


def test_scoring_mistakes(small):
    prompts = encode_prompts(*small, records())
    ids, mask = answers(prompts)
    for given, text in (((ids, mask[:, :3]), "one shape"), ((ids, mask.flip(1)), "hole"), ((ids[:5], mask[:5]), "owner")):
        with pytest.raises(ValueError, match=text): completion_logps(small[0], prompts, *given)
    for owner in ([0, 1], [0] * 11 + [4], [-1] * 12, [0.] * 12, [[0] * 12]):
        with pytest.raises(ValueError, match="12 whole numbers from 0 to 3"): completion_logps(small[0], prompts, ids, mask, owner=owner)
    with pytest.raises(ValueError, match="temperature=0 must be above 0"): completion_logps(small[0], prompts, ids, mask, temperature=0)
    with torch.no_grad(): listed, equal = (completion_logps(small[0], prompts, ids, mask, owner=owner)[0]
                                           for owner in ([0] * 3 + [1] * 3 + [2] * 3 + [3] * 3, None))
    assert torch.equal(listed, equal)
    with pytest.raises(ValueError, match="form='x'"): completion_logps(small[0], prompts, ids, mask, form="x")
    with pytest.raises(ValueError, match="empty"): encode_prompts(*small, [])


# ------------------------------------------------------------------ stock TRL on top
def trl_losses(trainer_class, config_class, family, shared, rows, folder, **settings):
    from datasets import Dataset
    model, processor = build(family)
    config = config_class(output_dir=str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=2, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", seed=1, **settings)
    trainer = trainer_class(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=processor,
        **({} if "max_length" in settings else {"reward_funcs": lengths}))
    report = share(trainer.model) if shared else None
    torch.manual_seed(0)
    trainer.train()
    return [(r["loss"], r["grad_norm"], r.get("kl", 0), r.get("reward", 0)) for r in trainer.state.log_history if "loss" in r], report


def lengths(completions, **columns):
    return [float(len(c[0]["content"]) % 7) for c in completions]


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_trl_trainers_give_the_same_losses(family, tmp_path):
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    turn = lambda role, text: [{"role": role, "content": text}]
    some = lambda i: [picture(i)] + [picture(i + 9)] * (i % 2)
    rows = [dict(prompt=turn("user", "How many vases?" + " red" * i), images=some(i)) for i in range(4)]
    group = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=6, beta=.04)
    pairs = [dict(row, images=row["images"][:1], chosen=turn("assistant", "red " * (i + 1)),
             rejected=turn("assistant", "blue" * (3 * i + 1))) for i, row in enumerate(rows)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for classes, data, settings in (((GRPOTrainer, GRPOConfig), rows, group), ((RLOOTrainer, RLOOConfig), rows, group),
                                        ((DPOTrainer, DPOConfig), pairs, dict(per_device_train_batch_size=4, max_length=None))):
            stock, _ = trl_losses(*classes, family, False, data, tmp_path, **settings)
            ours, report = trl_losses(*classes, family, True, data, tmp_path, **settings)
            assert torch.allclose(torch.tensor(ours), torch.tensor(stock), rtol=1e-3, atol=1e-5), (ours, stock)
            assert report.counts["forward: shared"] >= 4 and stock[1][0] != stock[0][0]
            assert not any("as usual" in way for way in report.counts if "no new pictures" not in way), report
            if settings is group: assert report.counts["generate: shared"] == 2


def test_the_shipped_models(tmp_path):
    from vlmcourse.museum import make_records
    data = make_records(4, tasks=["count", "which_photo", "caption", "detect"], split="test", seed=3)
    for name in ("tiny", "tiny-internvl"):
        model, processor = load_vlm(name, device="cpu")
        prompts = encode_prompts(model, processor, data)
        made = sample_groups(model, prompts, 4, max_new_tokens=24, seeds=range(4))
        with torch.no_grad():
            logps, _ = completion_logps(model, prompts, made.ids, made.mask)
            rows, _ = completion_logps(model, prompts, made.ids, made.mask, form="rows")
        assert torch.allclose(logps, rows, atol=1e-4) and torch.allclose(logps, made.logps, atol=1e-4)

"GRPO: equal to TRL, the same after any kill, clear when a reward fails, the same in two processes."
import json
import os
import time
import warnings
from collections import defaultdict
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from kill import kill_and_compare, launch

from vlmcourse.boxes import say_objects
from vlmcourse.evaluate import paired_gain
from vlmcourse.group import LOSS_TYPES, group_advantages, grpo_loss, leave_one_out, make_advantages
from vlmcourse.grpo import (_forget_rollouts, answer_logps, answer_seed, choose_rewards, epoch_losses, groups_loss, read_rollouts, reward_groups, rollout_viewer, sample_answers,
                            show_rollouts, train, val_row, wants_boxes, with_signal)
from vlmcourse.lora import add_lora
from vlmcourse.museum import make_records, save_records
from vlmcourse.resume import last_checkpoint
from vlmcourse.rewards import bbox_reward, reward_name
from vlmcourse.runlog import ask_run, read_log, read_samples
from vlmcourse.vlm import load_vlm

QUICK = dict(plot=False, device="cpu", max_completion_length=24, per_device_train_batch_size=3, num_generations=4)


# --- equal to TRL ----------------------------------------------------------------------------------
def trl_loss(table, inputs, **settings):
    "TRL's own _compute_loss, with a stand-in for the trainer that hands it our table instead of asking a model."
    from trl.trainer.grpo_trainer import GRPOTrainer
    args = SimpleNamespace(delta=settings.pop("delta", None), use_bias_correction_kl=False, sapo_temperature_pos=1., sapo_temperature_neg=1.05, steps_per_generation=1)
    same = lambda x, *a, **k: x
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1, reduce=same, gather=same), args=args, epsilon_low=.2, top_entropy_quantile=1., aux_loss_enabled=False,
                              off_policy_mask_threshold=None, use_vllm=False, current_gradient_accumulation_steps=1, max_completion_length=9, _entropy_bonus_enabled=False,
                              model=SimpleNamespace(training=True), _metrics=defaultdict(lambda: defaultdict(list)))
    trainer.__dict__.update(settings)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (table, table.exp(), None)
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


def random_batch(seed, n=8, length=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    table = -2*torch.rand(n, length, generator=g, dtype=dtype)
    noise = lambda: .3*torch.randn(n, length, generator=g, dtype=dtype)
    mask = (torch.arange(length) < torch.randint(1, length+1, (n, 1), generator=g)).to(dtype)
    a = group_advantages(torch.rand(n, generator=g, dtype=dtype), 4)
    prompt = torch.zeros(n, 1, dtype=torch.long)
    return table.requires_grad_(), dict(prompt_ids=prompt, prompt_mask=prompt+1, completion_ids=torch.zeros(n, length, dtype=torch.long), completion_mask=mask, advantages=a,
                                        old_per_token_logps=(table+noise()).detach(), ref_per_token_logps=(table+noise()).detach(), num_items_in_batch=mask.sum())


@pytest.mark.parametrize("dtype,eps", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_losses_and_gradients_are_those_of_trl(loss_type, dtype, eps):
    for seed, level, beta, high, delta in product(range(2), ("token", "sequence"), (0., .04), (.2, .28, 5.), (None, 1.5)):
        if delta and loss_type in ("cispo", "sapo"): continue                  # TRL ignores it; ours refuses
        table, x = random_batch(seed, dtype=dtype)
        theirs, metrics = trl_loss(table, x, loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_high=high, delta=delta)
        total, items = grpo_loss(table, x["advantages"], x["completion_mask"], old=x["old_per_token_logps"], reference=x["ref_per_token_logps"], beta=beta, loss_type=loss_type,
                                 max_completion_length=9, importance_sampling_level=level, epsilon_high=high, delta=delta)
        assert (theirs-total/items).abs() < eps
        a, b = (torch.autograd.grad(loss, table)[0] for loss in (theirs, total/items))
        assert (a-b).abs().max() < eps and b.abs().max() > 1e-3


@pytest.mark.parametrize("mutant", ["sign", "swapped group", "no mask", "clip upside down"])
def test_the_comparison_with_trl_catches_mistakes(mutant):
    table, x = random_batch(3)
    theirs, _ = trl_loss(table, x, loss_type="dapo", importance_sampling_level="token", beta=0., epsilon_high=.28)
    a, mask, clip = x["advantages"], x["completion_mask"], dict(epsilon=.2, epsilon_high=.28)
    if mutant == "sign": a = -a
    if mutant == "swapped group": a = a.roll(4)
    if mutant == "no mask": mask = torch.ones_like(mask)
    if mutant == "clip upside down": clip = dict(epsilon=.28, epsilon_high=.2)
    total, items = grpo_loss(table, a, mask, old=x["old_per_token_logps"], **clip)
    assert (theirs-total/items).abs() > 1e-4


def trl_advantages(parts, group, weights, scale_rewards, aggregation):
    "Restated from TRL 1.16, grpo_trainer.py lines 2750-2815 (`_generate_and_score_completions`), with TRL's own nanstd."
    from trl.trainer.utils import nanstd
    lost = torch.isnan(parts).all(dim=1)
    if aggregation == "sum_then_normalize":
        rewards = (parts*weights.unsqueeze(0)).nansum(dim=1); rewards[lost] = torch.nan
        mean = torch.nanmean(rewards.view(-1, group), dim=1).repeat_interleave(group, dim=0)
        std = nanstd(rewards).expand_as(rewards) if scale_rewards == "batch" else nanstd(rewards.view(-1, group), dim=1).repeat_interleave(group, dim=0)
        advantages = rewards-mean
        if scale_rewards != "none": advantages = advantages/(std+1e-4)
    else:
        grouped = parts.view(-1, group, parts.shape[1])
        each = ((grouped-torch.nanmean(grouped, dim=1, keepdim=True))/(nanstd(grouped, dim=1, keepdim=True)+1e-4)).view(-1, parts.shape[1])
        rewards = (each*weights.unsqueeze(0)).nansum(dim=1); rewards[lost] = torch.nan
        advantages = (rewards-torch.nanmean(rewards))/(nanstd(rewards).expand_as(rewards)+1e-4)
    return torch.nan_to_num(advantages, nan=0.)


def test_the_restated_lines_are_still_in_trl():
    import inspect
    from trl.trainer.grpo_trainer import GRPOTrainer
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for line in ("rewards = (rewards_per_func * self.reward_weights.to(device).unsqueeze(0)).nansum(dim=1)", "advantages = rewards - mean_grouped_rewards",
                 "advantages = advantages / (std_rewards + 1e-4)", "reward_k = (grouped - mean_k) / (std_k + 1e-4)", "advantages = (rewards - torch.nanmean(rewards)) / (std_rewards + 1e-4)"):
        assert line in source


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype,eps", [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_advantages_are_those_of_trl(scale_rewards, aggregation, dtype, eps):
    """TRL's `nanstd` multiplies by count/(count-1), a quotient of whole numbers, which torch rounds to its default number type: to 3e-8 even where all else is double.
    So TRL is asked twice: as it is (1e-6), and with double precision as the default (1e-8; a silent batch turns 1e-16 of rounding into 1e-8: it is divided by 0.0001 twice)."""
    g, default = torch.Generator().manual_seed(0), torch.get_default_dtype()
    def theirs(*a):
        torch.set_default_dtype(dtype)
        try: return trl_advantages(*a)
        finally: torch.set_default_dtype(default)
    for n in range(200):
        parts = torch.rand(16, 3, generator=g, dtype=torch.float64)
        if n % 2: parts = parts.round()
        parts[torch.rand(16, 3, generator=g) < (n % 3)*.3] = torch.nan
        weights = torch.rand(3, generator=g, dtype=torch.float64)
        if aggregation == "normalize_then_sum" and scale_rewards != "group":   # TRL ignores scale_rewards there; ours refuses
            with pytest.raises(ValueError, match="leave advantage"): make_advantages(parts, 4, scale_rewards=scale_rewards, multi_objective_aggregation=aggregation)
            continue
        ours, _ = make_advantages(parts, 4, weights=weights, scale_rewards=scale_rewards, multi_objective_aggregation=aggregation)
        assert (ours-theirs(parts, 4, weights, scale_rewards, aggregation)).abs().max() < eps


def test_rloo_is_that_of_trl():
    "Advantages as in rloo_trainer.py; on fresh answers the gradient of its loss is dr_grpo's times the allowed length."
    table, x = random_batch(5)
    rewards, mask = torch.rand(8, dtype=torch.float64), x["completion_mask"]
    r = rewards.view(-1, 4)
    a = (r-(r.sum(1, keepdim=True)-r)/3).view(-1)
    assert (leave_one_out(rewards, 4)-a).abs().max() < 1e-12
    sums = (table*mask).sum(1)
    coef = (sums-sums.detach()).exp()                                     # rloo_trainer.py, compute_loss: coef_1, coef_2
    theirs = -torch.min(coef*a, coef.clamp(.8, 1.2)*a).mean()
    total, items = grpo_loss(table, leave_one_out(rewards, 4), mask, loss_type="dr_grpo", max_completion_length=9)
    one, other = (torch.autograd.grad(loss, table)[0] for loss in (theirs, 9*total/items))
    assert (one-other).abs().max() < 1e-12 and one.abs().max() > 1e-2


def test_equal_rewards_give_exactly_nothing():
    nan = float("nan")
    for values in (*([value]*8 for value in (.1, .3, 1/3, 7.7)), [.1, nan]+[.1]*6, [nan]*8, [nan]*7+[.3]):
        x, other = torch.tensor(values, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
        assert not group_advantages(x, 8).any() and not leave_one_out(x, 8).any()
        for how in (dict(), dict(advantage="rloo"), dict(rank_rewards=True), dict(multi_objective_aggregation="normalize_then_sum"), dict(scale_rewards="batch")):
            a, _ = make_advantages(torch.cat([torch.stack([x, x/3], 1), torch.stack([other, x], 1)]), 8, **how)
            assert not a[:8].any() and a[8:].any()


# --- the loss on a model -----------------------------------------------------------------------------
def in_double(name, patch):
    "A shipped model in double precision with an adapter that has moved a little."
    import transformers.models.qwen3.modeling_qwen3 as qwen3
    import transformers.models.qwen3_vl.modeling_qwen3_vl as qwen3_vl
    for norm in (qwen3.Qwen3RMSNorm, qwen3_vl.Qwen3VLTextRMSNorm):     # the norms of transformers round to single precision
        patch.setattr(norm, "forward", lambda self, x: torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon))
    torch.manual_seed(0)
    model, processor = load_vlm(name, device="cpu")
    model = add_lora(model).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name: p.normal_(0, .02)
    return model, processor


@pytest.fixture(scope="module")
def double():
    "The tiny model, and scored groups of answers of different lengths."
    patch = pytest.MonkeyPatch()
    model, processor = in_double("tiny", patch)
    records = make_records(2, ["same"], split="train", seed=0)+make_records(1, ["caption"], split="train", seed=3)
    groups = sample_answers(model, processor, records, num_generations=4, max_completion_length=20, seeds=[1, 2, 3], temperature=1.5)
    reward_groups(groups, [lambda completions, **_: [0., 1, 2, 0, 1, 1, 1, 1, 0, 2, 1, 1]])            # the second group has no signal
    groups.advantages = group_advantages(groups.total, 4)
    yield model, processor, groups
    patch.undo()


def fresh(groups):
    from dataclasses import replace
    return replace(groups, old=None, reference=None, prefix=None)


def gradients(model, loss):
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]


def full_rows_loss(model, groups, loss_type, beta):
    "The same loss from whole rows of all answers: nothing shared, nothing left out, reference by adapter off."
    from vlmcourse.prefix import adapter_off, completion_logps
    rows = dict(form="rows", entropy=True)
    logps, _ = completion_logps(model, groups.prompts, groups.ids, groups.mask, **rows)
    with torch.no_grad(), adapter_off(model): reference, _ = completion_logps(model, groups.prompts, groups.ids, groups.mask, **rows)
    total, items = grpo_loss(logps, groups.advantages, groups.mask, reference=reference, beta=beta, loss_type=loss_type, max_completion_length=20, epsilon_high=.28)
    return total/items


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0., .04])
def test_sharing_and_leaving_out_change_no_number(double, loss_type, beta):
    model, _, groups = double
    want = full_rows_loss(model, groups, loss_type, beta)
    total, items, _ = groups_loss(model, fresh(groups), loss_type=loss_type, beta=beta, max_completion_length=20, epsilon_high=.28)
    assert (want-total/items).abs() < 1e-12
    pairs = list(zip(gradients(model, want), gradients(model, total/items)))
    assert max((a-b).abs().max() for a, b in pairs) < 1e-12*max(1, max(a.abs().max() for a, _ in pairs)) and max(a.abs().max() for a, _ in pairs) > 1e-4


def broad(n):
    "Questions with two pictures each, twice as broad as high: several tiles for InternVL."
    records = make_records(n, ["same"], split="train", seed=0)
    for record in records: record["images"] = [image.resize((192, 96)) for image in record["images"]]
    return records


def test_internvl_with_several_tiles_is_exact_and_trains(tmp_path, monkeypatch):
    model, processor = in_double("tiny-internvl", monkeypatch)
    groups = sample_answers(model, processor, broad(3), num_generations=4, max_completion_length=12, seeds=[1, 2, 3], temperature=1.5, keep_prefix=True)
    assert all(len(p.pictures) >= 4 for p in groups.prompts.items)            # two pictures, two tiles each or more
    groups.advantages = group_advantages(torch.arange(12.) % 5, 4)
    want = full_rows_loss(model, groups, "dapo", .04)
    for some in (fresh(groups), groups):
        total, items, _ = groups_loss(model, some, beta=.04, epsilon_high=.28)
        assert (want-total/items).abs() < 1e-12
        pairs = list(zip(gradients(model, want), gradients(model, total/items)))
        assert max((a-b).abs().max() for a, b in pairs) < 1e-12*max(1, max(a.abs().max() for a, _ in pairs)) and max(a.abs().max() for a, _ in pairs) > 1e-4
        want = full_rows_loss(model, groups, "dapo", .04)
    monkeypatch.undo()
    run = train(broad(6), "exact,format", broad(2), model="tiny-internvl", output_dir=tmp_path/"r", max_steps=3, eval_steps=3, beta=.01, **QUICK | dict(max_completion_length=8))
    assert [r["step"] for r in run.log["val_history"]] == [0, 3] and any(r["grad_norm"] for r in run.log["train_history"])
    again, _ = load_vlm(tmp_path/"r", device="cpu")
    assert all(torch.equal(p, dict(run.model.named_parameters())[n]) for n, p in again.named_parameters() if "lora_" in n)


def test_silent_groups_are_not_computed_when_beta_is_zero(double, monkeypatch):
    import vlmcourse.grpo as grpo
    model, _, groups = double
    seen, real = [], grpo.completion_logps
    monkeypatch.setattr(grpo, "completion_logps", lambda m, prompts, ids, *a, **k: (seen.append((len(prompts), len(ids))), real(m, prompts, ids, *a, **k))[1])
    groups_loss(model, fresh(groups)); groups_loss(model, fresh(groups), beta=.01)
    alive = int((groups.advantages != 0).sum())
    assert with_signal(groups) == [0, 2] and seen == [(2, alive), (3, 12), (3, 12)]


def test_the_pass_of_sampling_serves_training(double):
    model, processor, groups = double
    again = sample_answers(model, processor, groups.records, num_generations=4, max_completion_length=20, seeds=[1, 2, 3], temperature=1.5, keep_prefix=True)
    assert torch.equal(again.ids, groups.ids) and again.texts == groups.texts
    again.advantages = groups.advantages
    (a, n, _), (b, m, _) = groups_loss(model, fresh(groups)), groups_loss(model, again)
    assert n == m and (a-b).abs() < 1e-12
    assert max((x-y).abs().max() for x, y in zip(gradients(model, a), gradients(model, b))) < 1e-12*n


@pytest.mark.parametrize("mutant", ["none", "swapped group", "position + 1", "one prompt for all", "answers see each other"])
def test_mutants_are_caught(double, mutant, monkeypatch):
    import vlmcourse.prefix as engine
    from vlmcourse.prefix import Prompts
    model, _, groups = double
    want, bad = full_rows_loss(model, groups, "dapo", .04), fresh(groups)
    if mutant in ("none", "answers see each other"):                           # all answers of a question behind it in one row
        pack = engine.pack_rows
        def leak(*a):
            packed = pack(*a)
            return packed if mutant == "none" else packed._replace(sees=torch.ones_like(packed.sees).tril())
        monkeypatch.setattr(engine, "pack_rows", leak); monkeypatch.setattr(engine, "_best_form", lambda model: "packed")
    if mutant == "swapped group": bad.advantages = groups.advantages.roll(4)
    if mutant == "position + 1": bad.prompts = Prompts([p._replace(next=p.next+1) for p in groups.prompts.items])
    if mutant == "one prompt for all": bad.prompts = Prompts([groups.prompts.items[0]]*3)
    total, items, _ = groups_loss(model, bad, beta=.04)
    gap = max((a-b).abs().max() for a, b in zip(gradients(model, want), gradients(model, total/items)))
    assert gap < 1e-12 if mutant == "none" else gap > 1e-6


def test_cut_off_answers_do_not_count(double):
    model, _, groups = double
    some = fresh(groups)
    some.ended = torch.ones(12, dtype=torch.bool); some.ended[0] = False
    total, items, _ = groups_loss(model, some, mask_truncated_completions=True, loss_type="dapo")
    assert items == int(groups.mask[1:].sum())
    kept = groups.mask*some.ended[:, None]
    logps, _ = answer_logps(model, fresh(groups), torch.arange(12))
    want, n = grpo_loss(logps, groups.advantages, kept, loss_type="dapo")
    assert n == items and (want-total).abs() < 1e-10
    some.ended[:] = False                                                    # all cut off: nothing changes, nothing breaks
    total, items, _ = groups_loss(model, some, mask_truncated_completions=True)
    assert total.item() == 0 and items == 1 and not any(g.any() for g in gradients(model, total))


def test_sampling_sees_which_answers_ended(double):
    model, processor, groups = double
    short = sample_answers(model, processor, groups.records, num_generations=4, max_completion_length=2, seeds=[1, 2, 3])
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for g in (short, groups):
        assert g.ended.tolist() == [end in row[m.bool()].tolist() for row, m in zip(g.ids, g.mask)]
    assert not short.ended.all() and groups.ended.any()
    settings = model.get_base_model().generation_config
    end, settings.eos_token_id = settings.eos_token_id, None                                            # a model without an end mark
    try: assert not sample_answers(model, processor, groups.records, num_generations=2, max_completion_length=2, seeds=[1, 2, 3]).ended.any()
    finally: settings.eos_token_id = end


def test_seeds_do_not_repeat():
    found = {answer_seed(seed, step, place) for seed in range(3) for step in range(-1, 40) for place in range(-3, 20)}
    assert len(found) == 3*41*23 and all(0 <= s < 2**63 for s in found)


# --- train -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return (save_records(make_records(24, ["same"], split="train", seed=0), folder/"train"), save_records(make_records(6, ["same"], split="test", seed=1), folder/"test"))


def test_one_argument_is_enough_and_the_log_has_trls_names(data, tmp_path):
    os.chdir(tmp_path)
    run = train(data[0], max_steps=2, **QUICK)
    assert run.output_dir.resolve() == (tmp_path/"runs/grpo-001").resolve() and run.before is None and "reward" in repr(run)
    row = run.log["train_history"][-1]
    names = """step epoch samples loss lr grad_norm ppo_loss entropy reward reward_std group_reward_std frac_reward_zero_std rewards/exact/mean rewards/exact/std adv_std adv_max
        clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean completions/mean_length completions/min_length completions/max_length completions/clipped_ratio""".split()
    assert set(row) == set(names)
    assert run.log["config"]["reward_funcs"] == ["exact"] and run.log["config"]["method"] == "grpo" and run.log["config"]["data_hash"]


def test_a_reward_hides_no_metric():
    parts = dict(reward=.9, accuracy=.1, exact=.5)
    row = val_row([dict(reward=.2, strict=True, lenient=True, format=None, parts={**parts, "format": .3})], [])
    assert row == {"val_reward": .2, "val_accuracy": 1, "val_lenient": 1, "val_rewards/reward": .9, "val_rewards/accuracy": .1, "val_exact": .5, "val_format": .3}


def test_validation_best_and_samples(data, tmp_path):
    run = train(*data[:1], "exact,format", data[1], output_dir=tmp_path/"r", max_steps=10, eval_steps=5, **QUICK)
    val = run.log["val_history"]
    assert [r["step"] for r in val] == [0, 5, 10] and {"val_reward", "val_sampled_reward", "val_exact", "val_format", "val_accuracy", "val_lenient"} <= set(val[0])
    rows = read_samples(tmp_path/"r", 10)
    assert val[-1]["val_reward"] == pytest.approx(sum(r["reward"] for r in rows)/6) and set(rows[0]["parts"]) == {"exact", "format"}
    best = run.log["best_checkpoint"]
    assert best["metric"] == "val_reward" and best["value"] == max(r["val_reward"] for r in val) and (tmp_path/"r/best/adapter_model.safetensors").exists()
    assert paired_gain([r["reward"] for r in run.before.rows], [r["reward"] for r in run.after.rows]).n == 6
    table = epoch_losses(run)
    assert table.head == ["Epoch", "Train Loss", "Val Loss", "PPO Loss", "KL", "Adv Std", "Adv Max", "Beta"] and len(table.rows) == 2 and table.rows[0] != table.rows[1]
    assert epoch_losses(tmp_path/"r").rows == table.rows


def test_boxes_have_their_parts(tmp_path):
    records = make_records(6, ["detect"], split="train", seed=0)
    assert all(map(wants_boxes, records)) and not any(map(wants_boxes, make_records(6, ["count"], seed=0)))
    run = train(records, val_data=records[:3], output_dir=tmp_path/"r", max_steps=1, **QUICK | dict(max_completion_length=80))
    assert run.log["config"]["reward_funcs"] == ["format", "bbox", "category", "completeness"]
    assert {"val_reward", "val_format", "val_bbox", "val_category", "val_completeness"} <= set(run.log["val_history"][0])
    page = show_rollouts(tmp_path/"r", 1, groups=1)
    assert page._repr_html_().count("<img") >= 1 and "right:" in repr(page)


def test_pieces_of_a_batch_give_the_step_of_the_whole(data, tmp_path):
    options = QUICK | dict(max_steps=3, seed=1)
    a = train(data[0], output_dir=tmp_path/"a", **options | dict(per_device_train_batch_size=6))
    b = train(data[0], output_dir=tmp_path/"b", **options | dict(per_device_train_batch_size=2, gradient_accumulation_steps=3))
    for x, y in zip(a.log["train_history"], b.log["train_history"], strict=True):
        assert x == pytest.approx(y, abs=1e-5)


@pytest.mark.parametrize("more", [dict(num_iterations=2, beta=.02, loss_type="grpo", importance_sampling_level="sequence"), dict(loss_type="dr_grpo", scale_rewards="none", beta=.05),
                                  dict(loss_type="cispo", epsilon_high=5.), dict(advantage="rloo", loss_type="dr_grpo", dynamic_sampling=2), dict(rank_rewards=True, loss_type="sapo", bf16=True),
                                  dict(mask_truncated_completions=True, max_completion_length=3), dict(multi_objective_aggregation="normalize_then_sum", gradient_checkpointing=True),
                                  dict(loss_type="luspo", importance_sampling_level="sequence"), dict(scale_rewards="batch", loss_type="bnpo", gradient_accumulation_steps=2)], ids=str)
def test_every_variant_trains_and_resumes_bit_for_bit(data, tmp_path, more):
    options = QUICK | dict(max_steps=4, save_steps=2, learning_rate=3e-3, reward_funcs=["exact", "format"]) | more
    whole = train(data[0], output_dir=tmp_path/"whole", **options)
    assert len(whole.log["train_history"]) == 4 and any(r["grad_norm"] for r in whole.log["train_history"])
    if "beta" in more: assert whole.log["train_history"][-1]["kl"] > 0 and whole.log["train_history"][0]["kl"] == pytest.approx(0, abs=1e-6)
    ask = _stop_after(tmp_path/"part", 2)
    with pytest.MonkeyPatch.context() as patch:
        import vlmcourse.grpo as grpo
        patch.setattr(grpo, "_take_step", ask(grpo._take_step))
        part = train(data[0], output_dir=tmp_path/"part", **options)
    assert part.log["status"] == "stopped" and last_checkpoint(tmp_path/"part") == 2
    again = train(data[0], output_dir=tmp_path/"part", resume_from_checkpoint=True, **options)
    assert again.log["train_history"] == whole.log["train_history"] and again.log["status"] == "finished"
    for name in ("final/adapter_model.safetensors", "rollouts.jsonl"): assert (tmp_path/"part"/name).read_bytes() == (tmp_path/"whole"/name).read_bytes()


def _stop_after(folder, n):
    calls = []
    def wrap(real):
        def step(*a, **k):
            calls.append(1)
            if len(calls) == n: ask_run(folder, "stop")
            return real(*a, **k)
        return step
    return wrap


def test_ratio_moves_and_is_clipped_only_with_several_steps_on_the_same_answers(data, tmp_path):
    options = QUICK | dict(max_steps=6, learning_rate=2e-2, warmup_ratio=0.)
    one = train(data[0], output_dir=tmp_path/"one", **options).log["train_history"]
    three = train(data[0], output_dir=tmp_path/"three", num_iterations=3, **options).log["train_history"]
    assert all(r["clip_ratio/region_mean"] == 0 for r in one)
    assert [r["clip_ratio/region_mean"] > 0 for r in three][0] is False and any(r["clip_ratio/region_mean"] > 0 for r in three)
    assert three[0]["reward"] == three[2]["reward"] and [r["samples"] for r in three] == [3, 3, 3, 6, 6, 6]
    assert one[0] == three[0] | dict(entropy=one[0]["entropy"], loss=one[0]["loss"], ppo_loss=one[0]["ppo_loss"], grad_norm=one[0]["grad_norm"])


def test_dynamic_sampling_fills_the_step(tmp_path):
    easy, hard = make_records(20, ["colour"], split="train", seed=0), make_records(8, ["same"], split="train", seed=1)
    options = QUICK | dict(max_steps=3, per_device_train_batch_size=6, log_rollouts=6)
    train(easy+hard, output_dir=tmp_path/"a", **options)
    train(easy+hard, output_dir=tmp_path/"b", dynamic_sampling=5, **options)
    live = lambda folder: [sum(any(a["advantage"] for a in row["answers"]) for row in read_rollouts(folder, step)) for step in (1, 2, 3)]
    assert sum(live(tmp_path/"b")) > sum(live(tmp_path/"a"))
    assert all(any(a["advantage"] for a in row["answers"]) for row in read_rollouts(tmp_path/"b")) and max(live(tmp_path/"b")) <= 6


def test_a_step_without_any_signal_changes_nothing_and_does_not_break(data, tmp_path):
    def always(completions, **_): return [.1]*len(completions)
    run = train(data[0], always, output_dir=tmp_path/"r", max_steps=3, **QUICK)
    assert [r["grad_norm"] for r in run.log["train_history"]] == [0, 0, 0] and run.log["train_history"][0]["frac_reward_zero_std"] == 1
    assert not any(p.any() for n, p in run.model.named_parameters() if "lora_B" in n)


def test_a_run_that_starts_from_another_has_it_as_its_reference(data, tmp_path):
    from vlmcourse.sft import train as sft
    first = sft(make_records(8, ["same"], split="train", seed=0), output_dir=tmp_path/"sft", max_steps=4, plot=False, device="cpu")
    run = train(data[0], model=str(first.output_dir), output_dir=tmp_path/"grpo", max_steps=2, beta=.1, learning_rate=1e-2, **QUICK)
    kl = [r["kl"] for r in run.log["train_history"]]
    assert kl[0] == pytest.approx(0, abs=1e-6) and run.log["config"]["model"] == str(first.output_dir)
    again, _ = load_vlm(tmp_path/"grpo", device="cpu")
    a, b = ({n: p for n, p in m.named_parameters() if "lora_" in n} for m in (again, run.model))
    assert all(torch.equal(a[n], b[n]) for n in a)


# --- rewards that fail ---------------------------------------------------------------------------------
def breaks(how, after):
    calls = []
    def odd_reward(completions, **columns):
        calls.append(1)
        n = len(completions)
        if len(calls) <= after: return [float(len(c[0]["content"]) % 2) for c in completions]
        if how == "raises": raise KeyError("truth")
        return {"nan": [float("nan")]*n, "few": [1.]*(n-1), "none": None, "text": ["good"]*n, "table": torch.ones(n, 2)}[how]
    return odd_reward


@pytest.fixture(scope="module")
def not_broken(data, tmp_path_factory):
    "What the log says when the reward below never fails."
    return train(data[0], breaks("never", 100), output_dir=tmp_path_factory.mktemp("runs")/"r", max_steps=3, **QUICK).log["train_history"]


@pytest.mark.parametrize("how,says", [("raises", "KeyError"), ("nan", "returned nan"), ("few", "returned 11 values for 12"), ("none", "NoneType"), ("text", "'good'"), ("table", "Tensor")])
def test_a_reward_that_fails_is_named_and_the_run_is_kept(data, tmp_path, how, says, not_broken):
    with pytest.raises(ValueError, match=rf"odd.*{says}.*kept as it was after step 2.*resume_from_checkpoint"):
        train(data[0], breaks(how, 2), output_dir=tmp_path/"r", max_steps=3, **QUICK)
    log = read_log(tmp_path/"r")
    assert log["status"] == "failed" and "odd" in log["error"] and last_checkpoint(tmp_path/"r") == 2
    again = train(data[0], breaks(how, 100), output_dir=tmp_path/"r", max_steps=3, resume_from_checkpoint=True, **QUICK)
    assert again.log["train_history"] == not_broken


def test_a_reward_that_fails_at_once_says_so(data, tmp_path):
    with pytest.raises(ValueError, match="odd"): train(data[0], breaks("raises", 0), output_dir=tmp_path/"r", max_steps=2, **QUICK)
    assert read_log(tmp_path/"r")["status"] == "failed" and last_checkpoint(tmp_path/"r") == 0


def test_tensors_and_none_are_welcome_as_rewards(data, tmp_path):
    def tensor_reward(completions, **_): return torch.tensor([float(len(c[0]["content"])) for c in completions])
    def some_reward(completions, answer, **_): return [None if a == "no" else 1. for a in answer]
    run = train(data[0], [tensor_reward, some_reward], output_dir=tmp_path/"r", max_steps=2, **QUICK)
    assert {"rewards/tensor/mean", "rewards/some/mean"} <= set(run.log["train_history"][0])


def test_a_slow_reward_is_named_while_it_runs(data, tmp_path, monkeypatch):
    import vlmcourse.grpo as grpo
    from functools import partial
    monkeypatch.setattr(grpo, "call_rewards", partial(grpo.call_rewards, slow=.2))
    def sleepy_reward(completions, **_): time.sleep(.5); return [1.]*len(completions)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(data[0], sleepy_reward, output_dir=tmp_path/"r", max_steps=1, **QUICK)
    assert any("sleepy" in str(w.message) for w in seen)


def test_rewards_for_boxes_read_the_numbers_of_the_family(tmp_path):
    "A right answer of Qwen2.5-VL earns 1 by every name of the reward, also beside a plug-in; the plug-in's own names come first."
    plugin, box = tmp_path/"mine.py", dict(bbox=[10, 20, 60, 80], label="red kylix")
    plugin.write_text("def own(completions, **columns): return [0.0] * len(completions)\ndef f1(completions, **columns): return [7.0] * len(completions)\n")
    text = say_objects([box], (200, 100), "qwen2.5-vl")
    columns = dict(objects=[[box]], size=[(200, 100)])
    records = make_records(2, ["detect"], seed=0)
    for names in (["bbox"], ["bbox_reward"], "bbox_reward,own", ["bbox", "category_reward", "completeness", "f1"]):
        for file in (None, str(plugin)):
            if not file and "own" in names: continue
            found = choose_rewards(names, records, family="qwen2.5-vl", external_plugins=file)
            values = {reward_name(f): f(completions=[text], **columns)[0] for f in found}
            assert values["bbox"] > .95 and values.get("category", 1) == 1 and values.get("f1", 1) == (7 if file and "f1" in values else 1), (names, file, values)
    assert choose_rewards([bbox_reward], records, family="qwen2.5-vl") == [bbox_reward]      # a function is taken as it is
    with pytest.raises(ValueError, match="reward_funcs names no reward"): choose_rewards(None, records, external_plugins=str(plugin))


def test_rewards_from_a_file(data, tmp_path):
    (tmp_path/"mine.py").write_text("def short_one(completions, **columns): return [1/len(c[0]['content'] or 'x') for c in completions]\n")
    run = train(data[0], "short_one,exact", external_plugins=str(tmp_path/"mine.py"), reward_weights="0.5,1", output_dir=tmp_path/"r", max_steps=1, **QUICK)
    assert run.log["config"]["reward_funcs"] == ["short_one", "exact"]
    row = run.log["train_history"][0]
    assert row["reward"] == pytest.approx(.5*row["rewards/short_one/mean"]+row["rewards/exact/mean"])


@pytest.mark.parametrize("bad,says", [(dict(num_generations=1), "num_generations=1.*nothing to be compared"), (dict(beta=-1), "beta=-1"), (dict(loss_type="ppo"), "loss_type='ppo'.*dapo"),
    (dict(loss_type="cispo"), "epsilon_high.*5.0"), (dict(loss_type="luspo"), "sequence"), (dict(temperature=0), "temperature=0"), (dict(scale_rewards=True), "scale_rewards=True"),
    (dict(reward_funcs="nonsense"), "nonsense.*exact"), (dict(reward_funcs=[]), "reward_funcs is empty"), (dict(reward_weights=[1, 2]), "2 weights"), (dict(reward_weights="one"), "reward_weights='one'.*1,0.5"), (dict(eval_steps=5), "val_data"), (dict(epsilon=float("nan")), "epsilon=nan"),
    (dict(advantage="rloo", multi_objective_aggregation="normalize_then_sum"), "normalize_then_sum"), (dict(advantage="rloo", scale_rewards="batch"), "not scaled"), (dict(external_plugins="mine.py"), "names no reward"), (dict(num_iterations=0), "num_iterations=0"), (dict(per_device_train_batch_size=0), "per_device_train_batch_size=0")], ids=str)
def test_mistakes_are_told_before_anything_is_made(data, tmp_path, bad, says):
    with pytest.raises(ValueError, match=says): train(data[0], output_dir=tmp_path/"r", **QUICK | bad)
    assert not (tmp_path/"r").exists()


# --- rollouts ------------------------------------------------------------------------------------------
def test_rollouts_can_be_read_shown_and_forgotten(data, tmp_path):
    run = train(data[0], "exact", output_dir=tmp_path/"r", max_steps=4, log_rollouts=2, **QUICK)
    rows = read_rollouts(run.output_dir)
    assert [r["step"] for r in rows] == [1, 1, 2, 2, 3, 3, 4, 4] and all(len(r["answers"]) == 4 and len(r["images"]) == 2 for r in rows)
    for a in rows[0]["answers"]:
        assert len(a["tokens"]) == len(a["logps"]) and a["parts"]["exact"] == a["reward"] and a["text"] in "".join(a["tokens"])
    assert rollout_viewer(run.output_dir).children[1].value.count("<table>") == 1
    with open(run.output_dir/"rollouts.jsonl", "ab") as f: f.write(b'{"step": 5, "half')
    _forget_rollouts(run.output_dir, 2)
    assert [r["step"] for r in read_rollouts(run.output_dir)] == [1, 1, 2, 2]
    with pytest.raises(FileNotFoundError, match="log_rollouts"): read_rollouts(tmp_path)
    live = [r for r in rows if any(a["advantage"] for a in r["answers"])]
    said = sorted(live[0]["answers"], key=lambda a: -a["advantage"])
    text = repr(show_rollouts(rows, signal=True, groups=1, answers=2)).splitlines()      # the best and the worst
    assert [line[2:7] for line in text[-2:]] == [f"{said[0]['advantage']:+.2f}", f"{said[-1]['advantage']:+.2f}"]


def test_what_a_model_or_a_file_says_is_text_on_the_page(tmp_path):
    bad = "<script>alert(1)</script>"
    answer = dict(text=bad, reward=None, advantage=0., parts={bad: None}, ended=False, tokens=[bad], logps=[-1.])
    page = show_rollouts([dict(step=1, question=bad, truth=bad, objects=None, images=[], sizes=[], family="tiny", answers=[answer])])._repr_html_()
    assert "<script" not in page and page.count("&lt;script&gt;") == 4
    (tmp_path/"rollouts.jsonl").write_text(json.dumps(dict(step=1, images=["../../etc/passwd"]))+"\n")
    with pytest.raises(ValueError): read_rollouts(tmp_path)


# --- kills and processes -------------------------------------------------------------------------------
def attempt(folder, data, held_out):
    torch.set_num_threads(1)
    train(data, "exact,format", held_out, output_dir=folder, max_steps=6, eval_steps=4, save_steps=3, beta=.01, num_iterations=2, resume_from_checkpoint=True,
          **QUICK | dict(per_device_train_batch_size=2))


def test_killed_at_twenty_random_moments_ends_the_same_bit_for_bit(tmp_path, data):
    want = kill_and_compare(attempt, data, tmp_path, kills=20, files=("samples.jsonl", "rollouts.jsonl"))
    assert {"samples.jsonl", "rollouts.jsonl"} <= set(want[1]) and len(want[0]["train_history"]) == 6


SHARED = (dict(scale_rewards="batch", loss_type="grpo", beta=.02), dict(dynamic_sampling=2, log_rollouts=9), dict(dynamic_sampling=1, scale_rewards="batch", loss_type="dr_grpo", beta=.01))
TWO = """
import os
from vlmcourse import grpo
from vlmcourse.grpo import train
real, seen = grpo.train_step, []
def step(model, *a, **k):
    found = real(model, *a, **k)
    seen.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    return found
grpo.train_step = step
for more, folder in zip({cases!r}, {folders!r}):
    train({data!r}, "exact,format", {held_out!r}, output_dir=folder, max_steps=2, per_device_train_batch_size={size}, num_generations=4, max_completion_length=24, eval_steps=1,
          device="cpu", plot=False, learning_rate=3e-3, **more)
    torch.save(seen, folder+"-gradients-"+os.environ.get("RANK", "0")); seen.clear()
"""


def test_two_processes_give_the_numbers_of_one_with_twice_the_questions(tmp_path, data):
    for name, processes, size in (("one", 1, 6), ("two", 2, 3)):
        folders = [str(tmp_path/f"{name}-{i}") for i in range(1, len(SHARED))]+[str(tmp_path/name)]
        launch(TWO.format(cases=SHARED, folders=folders, data=str(data[0]), held_out=str(data[1]), size=size), tmp_path/name, processes)
    for more, i in zip(SHARED, ["-1", "-2", ""], strict=True):
        one, two = (read_log(tmp_path/f"{name}{i}") for name in ("one", "two"))
        for kind in ("train_history", "val_history"):                           # losses, lengths of gradients, rewards, all that is logged
            for a, b in zip(one[kind], two[kind], strict=True): assert a == pytest.approx(b, abs=2e-5, rel=1e-4), more
        assert [r["step"] for r in two["val_history"]] == [0, 1, 2] and two["status"] == "finished" and any(r["grad_norm"] for r in two["train_history"])
        if "dynamic_sampling" in more: assert 0 < max(r["frac_reward_zero_std"] for r in two["train_history"]) < 1      # there was something to replace
        grads = [torch.load(f"{tmp_path}/{name}{i}-gradients-{rank}") for name, rank in (("one", 0), ("two", 0), ("two", 1))]
        for step, (a, b, c) in enumerate(zip(*grads, strict=True)):
            most = max(x.abs().max() for x in a)
            assert all(torch.equal(x, y) for x, y in zip(b, c)) and max((x-y).abs().max() for x, y in zip(a, b)) <= (1e-3 if step else 1e-5)*most, (more, step)

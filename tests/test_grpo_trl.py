"GRPO through TRL: the same settings, the same loss and gradient on the same answers, the same run with and without `share`."
import threading
from dataclasses import fields

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from vlmcourse import grpo
from vlmcourse.evaluate import score_answers
from vlmcourse.group import make_advantages
from vlmcourse.grpo import Groups, groups_loss, reward_groups
from vlmcourse.grpo_trl import ONLY_OURS, TRL_NAMES, for_trl, grpo_config, make_trainer, to_dataset, train
from vlmcourse.museum import make_records, save_records
from vlmcourse.prefix import encode_prompts, unshare
from vlmcourse.rewards import to_columns
from vlmcourse.runlog import ask_run, read_log
from vlmcourse.sft import with_adapter
from vlmcourse.vlm import load_vlm

QUICK = dict(plot=False, device="cpu", max_completion_length=12, per_device_train_batch_size=2, num_generations=4, save_steps=0)


def moved(name="tiny"):
    "A shipped model whose adapter has moved a little."
    torch.manual_seed(0)
    model, processor = load_vlm(name, device="cpu")
    model = with_adapter(model, 8, 16)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n: p.normal_(0, .02)
    return model, processor


def odd(completions, **columns): return [float(len(c[0]["content"]) % 3) for c in completions]


# --- settings, data, rewards ---------------------------------------------------------------------------
def test_every_setting_reaches_trl(tmp_path):
    from trl import GRPOConfig
    assert set(TRL_NAMES.values()) <= {f.name for f in fields(GRPOConfig)}
    given = dict(max_steps=7, gradient_accumulation_steps=2, num_generations=4, per_device_train_batch_size=3, max_completion_length=9, temperature=.7, top_p=.9, top_k=5, learning_rate=2e-4, warmup_ratio=.1,
                 lr_scheduler_type="cosine", loss_type="dr_grpo", epsilon=.1, epsilon_high=.3, beta=.02, importance_sampling_level="sequence", scale_rewards="batch", num_iterations=2, seed=5,
                 multi_objective_aggregation="normalize_then_sum", mask_truncated_completions=True, max_grad_norm=.5, reward_weights=[1., 2.], gradient_checkpointing=True, save_steps=3, save_total_limit=1)
    config = grpo_config(tmp_path, **given)
    for name, value in given.items():
        want = 12 if name == "per_device_train_batch_size" else value
        assert getattr(config, TRL_NAMES[name]) == want, name
    assert config.save_strategy == "steps" and grpo_config(tmp_path, learning_rate=1e-3, save_steps=0).save_strategy == "no"
    known = set(grpo.train.__code__.co_varnames[:grpo.train.__code__.co_argcount+grpo.train.__code__.co_kwonlyargcount])
    mine = set("data reward_funcs val_data model output_dir external_plugins lora_r lora_alpha eval_steps resume_from_checkpoint quantize device plot".split())
    assert known == set(TRL_NAMES) | set(ONLY_OURS) | mine                    # a new argument must find its place here


@pytest.mark.parametrize("bad,says", [(dict(rank_rewards=True), "rank_rewards=True.*grpo.train"), (dict(advantage="rloo"), "advantage='rloo'"), (dict(dynamic_sampling=1), "dynamic_sampling=1"), (dict(log_rollouts=0), "log_rollouts=0"), (dict(metric_for_best_model="val_exact"), "metric_for_best_model"), (dict(early_stopping_patience=2, eval_steps=1), "early_stopping_patience"),
    (dict(top_q=1), "top_q.*more="), (dict(num_generations=1), "nothing to be compared"), (dict(loss_type="ppo"), "loss_type='ppo'"), (dict(resume_from_checkpoint=True), "resume_from_checkpoint"),
    (dict(lr_scheduler_type="reduce_lr_on_plateau"), "reduce_lr_on_plateau"), (dict(reward_funcs="nonsense"), "nonsense"), (dict(reward_weights="1,2"), "2 weights")], ids=str)
def test_mistakes_are_told_before_anything_is_made(tmp_path, bad, says):
    with pytest.raises(ValueError, match=says): train(make_records(4, ["same"], seed=0), **dict(reward_funcs="exact", val_data=None, output_dir=tmp_path/"r") | QUICK | bad)
    assert not (tmp_path/"r").exists()


def test_data_set_has_pictures_and_no_answers(tmp_path):
    records = make_records(3, ["same"], seed=0)+make_records(2, ["count"], seed=1)
    file = save_records(records, tmp_path/"d")
    from vlmcourse.formats import read_records
    for given in (records, read_records(file, answers=False)):
        rows = to_dataset(given)
        assert rows.column_names == ["prompt", "images", "row"] and rows["row"][:] == [0, 1, 2, 3, 4] and [len(r["images"]) for r in rows] == [2, 2, 2, 1, 1]
        assert all(turn["role"] != "assistant" for r in rows for turn in r["prompt"])
        assert [sum(part["type"] == "image" for turn in r["prompt"] for part in turn["content"]) for r in rows] == [2, 2, 2, 1, 1]


def test_rewards_see_the_columns_of_grpo(tmp_path):
    records, seen = make_records(3, ["detect"], seed=0)+make_records(1, ["count"], seed=0), []
    def spy(completions, **columns): seen.append(columns); return [0.]*len(completions)
    said = [[dict(role="assistant", content="x")]]*3
    for_trl(spy, records)(said, row=[3, 0, 0], completion_ids=[[1]]*3, trainer_state=None, log_metric=None)
    want = {k: [v[i] for i in (3, 0, 0)] for k, v in to_columns(records).items()}
    assert {k: v for k, v in seen[0].items() if k in want} == want and seen[0]["completion_ids"] == [[1]]*3
    def few_reward(completions, **columns): return [1.]
    with pytest.raises(ValueError, match="'few'.*1 values for 3"): for_trl(few_reward, records)(said, row=[0, 1, 2])


# --- the same numbers ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["tiny", "tiny-internvl"])
def test_same_answers_same_loss_and_gradient(tmp_path, name):
    model, processor = moved(name)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    some, seen = make_records(4, ["same", "count"], split="train", seed=0), {}
    def spy(completions, completion_ids, id, **columns): seen.update(ids=completion_ids, id=id); return odd(completions)
    for shared, more in ((False, dict(temperature=1.4)), (True, dict(loss_type="dr_grpo", scale_rewards="none")), (True, dict(loss_type="grpo", scale_rewards="batch", importance_sampling_level="sequence"))):
        with torch.no_grad(): [p.copy_(start[n]) for n, p in model.named_parameters() if n in start]
        config = grpo_config(tmp_path, **{k: v for k, v in QUICK.items() if k in TRL_NAMES} | dict(max_steps=1, learning_rate=1e-3) | more)
        trainer = make_trainer(model, processor, some, [spy], config, shared=shared)
        trainer.train()
        theirs = trainer.state.log_history[0]
        unshare(model)
        with torch.no_grad(): [p.copy_(start[n]) for n, p in model.named_parameters() if n in start]
        by_id = {r["id"]: r for r in some}
        asked = [by_id[i] for i in seen["id"][::4]]
        ids, lengths = pad_sequence([torch.tensor(x) for x in seen["ids"]], batch_first=True), torch.tensor([len(x) for x in seen["ids"]])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        groups = Groups(asked, encode_prompts(model, processor, asked), ids, mask, mask[:, 0] > 0, processor.batch_decode(seen["ids"], skip_special_tokens=True), None)
        reward_groups(groups, [odd])
        groups.advantages, _ = make_advantages(groups.parts, 4, scale_rewards=more.get("scale_rewards", "group"))
        model.zero_grad()
        total, items, _ = groups_loss(model, groups, max_completion_length=12, **{k: v for k, v in more.items() if k != "scale_rewards"})
        (total/items).backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e9)
        assert groups.advantages.any() and theirs["loss"] == pytest.approx((total/items).item(), abs=2e-4)
        assert theirs["grad_norm"] == pytest.approx(norm.item(), rel=2e-3) and norm > 1e-3


def test_a_run_with_share_is_the_run_without(tmp_path):
    records, held_out = make_records(8, ["same"], split="train", seed=0), make_records(4, ["same"], split="test", seed=1)
    runs = [train(records, "exact,format", held_out, output_dir=tmp_path/str(shared), shared=shared, max_steps=3, eval_steps=2, learning_rate=3e-3, beta=.02, reward_weights="1,0.5", **QUICK) for shared in (False, True)]
    for a, b in zip(*(r.log["train_history"] for r in runs), strict=True):
        skip = ("step_time",)
        assert {k: v for k, v in a.items() if k not in skip} == pytest.approx({k: v for k, v in b.items() if k not in skip}, rel=1e-2, abs=1e-3)
    for run in runs:
        assert [r["step"] for r in run.log["val_history"]] == [0, 2, 3] and run.log["status"] == "finished" and run.log["config"]["method"] == "grpo-trl"
        assert {"val_reward", "val_exact", "val_format", "val_sampled_reward"} <= set(run.log["val_history"][0]) and run.after.n == 4
        row = run.log["train_history"][-1]
        assert {"reward", "rewards/exact/mean", "rewards/format/mean", "frac_reward_zero_std", "kl", "entropy", "completions/mean_length", "lr", "grad_norm"} <= set(row)
        assert row["reward"] == pytest.approx(row["rewards/exact/mean"]+.5*row["rewards/format/mean"], abs=1e-5)
    assert score_answers([r["answer"] for r in runs[0].after.rows], held_out)[0]["id"] == held_out[0]["id"]
    again, _ = load_vlm(tmp_path/"True", device="cpu")
    trained = dict(runs[1].model.named_parameters())
    lora = {n: p for n, p in again.named_parameters() if "lora_" in n}
    assert lora and all(torch.equal(p, trained[n]) for n, p in lora.items())
    # from that run on, with a KL to it
    more = train(records, odd, model=str(tmp_path/"True"), output_dir=tmp_path/"on", max_steps=1, beta=.1, **QUICK)
    assert more.log["train_history"][0]["kl"] == pytest.approx(0, abs=1e-5)
    again, _ = load_vlm(tmp_path/"on", device="cpu")
    assert {n for n, _ in again.named_parameters() if "lora_" in n} == set(lora)


def test_a_reward_that_fails_and_a_wish_to_stop(tmp_path):
    records = make_records(6, ["detect"], split="train", seed=0)
    def odd_reward(completions, **columns): raise KeyError("truth")
    with pytest.raises(ValueError, match="'odd'.*KeyError"): train(records, odd_reward, output_dir=tmp_path/"bad", max_steps=2, **QUICK)
    log = read_log(tmp_path/"bad")
    assert log["status"] == "failed" and "odd" in log["error"]
    def stopping(completions, objects, **columns):
        assert all(objects); ask_run(tmp_path/"stopped", "stop"); return [float(i) for i in range(len(completions))]
    run = train(records, stopping, output_dir=tmp_path/"stopped", max_steps=5, **QUICK)
    assert len(run.log["train_history"]) == 1 and run.log["status"] == "stopped" and (tmp_path/"stopped/final/adapter_model.safetensors").exists()


def test_a_wish_to_pause(tmp_path):
    folder, calls, at_go = tmp_path/"r", [], []
    def go_on(): at_go.append(len(calls)); ask_run(folder, "go")
    def pausing(completions, **columns):
        calls.append(1)
        if len(calls) == 1: ask_run(folder, "pause"); threading.Timer(4, go_on).start()
        return odd(completions)
    run = train(make_records(6, ["same"], split="train", seed=0), pausing, output_dir=folder, max_steps=3, **QUICK)
    assert at_go == [1] and len(calls) == 3 and run.log["status"] == "finished"

"""DPO: every loss is TRL's, the shared form gives the numbers of full rows, bad pairs are named, a killed run ends the same."""
import json
import math
import warnings
from collections import defaultdict
from types import SimpleNamespace as Box

import numpy as np
import pytest
import torch
from kill import kill_and_compare, launch
from test_prefix import FAMILIES, apart, exact, picture  # noqa: F401 (exact is a fixture)

from vlmcourse import dpo
from vlmcourse.core import read_json, write_json
from vlmcourse.dpo import (EncodedPairs, PairLogps, answer_ids, balance_lengths, beta_effect, caption_score, check_pairs, dpo_loss,
                           generation_gains, keep_reference, kto_loss, leak_note, length_note, log_odds, mark_words, museum_pairs,
                           orpo_loss, pair_logps, read_pairs, sample_pairs, show_pairs, simpo_loss, to_pair, train)
from vlmcourse.formats import to_record
from vlmcourse.lora import add_lora
from vlmcourse.museum import ask_scene, make_record, make_scene
from vlmcourse.prefix import adapter_off
from vlmcourse.vlm import encode, load_vlm

QUICK = dict(max_steps=3, per_device_train_batch_size=4, plot=False, device="cpu")


def shelves(n, split="train", seed=0):
    rng, found = np.random.default_rng([seed, 7]), []
    for i in range(n):
        scene = make_scene(rng.integers(0, 2**31, 4).tolist(), split, kind="shelf")
        found.append(make_record([scene], "caption", *ask_scene([scene], "caption", rng), id=f"{split}-{seed}-{i:03d}"))
    return found


def save(pairs, folder):
    "A file with pairs and its pictures."
    folder.mkdir(parents=True)
    for i, p in enumerate(pairs): p["images"][0].save(folder / f"{i}.png")
    write_json(folder / "pairs.json", [{**p, "images": [f"{i}.png"]} for i, p in enumerate(pairs)])
    return folder / "pairs.json"


PAIRS, HELD_OUT = museum_pairs(shelves(12)), museum_pairs(shelves(6, "test", 1))


# --- the losses are TRL's ------------------------------------------------------------
def random_batch(seed, dtype=torch.float32, B=6, T=9):
    "Log-probabilities of tokens, chosen rows first, with a prompt of two tokens and answers of 1 to 7."
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T - 1, (2 * B,), generator=g)
    mask = (torch.arange(T) >= 2) & (torch.arange(T) < 2 + lengths[:, None])
    logps = (-torch.rand(2 * B, T - 1, generator=g, dtype=dtype) * 4).requires_grad_()
    return logps, mask, -torch.rand(2, B, generator=g, dtype=dtype) * 12


def ours(logps, mask, reference):
    sums = (logps * mask[:, 1:]).sum(1).chunk(2)
    return PairLogps(*sums, *reference, *mask.sum(1).chunk(2))


def stub(**more):
    same = lambda x: x
    return Box(model=Box(training=True), accelerator=Box(device="cpu", gather=same, gather_for_metrics=same), ld_alpha=None,
               aux_loss_enabled=False, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, _tp_size=1,
               _total_train_tokens=0, _metrics=defaultdict(lambda: defaultdict(list)), **more)


def spoken(logps, mask):
    "A model that says given log-probabilities."
    zero = torch.zeros_like(logps)
    return lambda **_: Box(log_probs=logps * mask[:, 1:], entropy=zero, mean_logits=zero, is_top1=zero.bool())


def trl_dpo(logps, mask, reference, names, weights, beta, smooth):
    from trl import DPOTrainer
    trainer = stub(loss_types=names, loss_weights=weights, beta=beta, label_smoothing=smooth)
    inputs = dict(input_ids=torch.zeros_like(mask, dtype=torch.long), attention_mask=mask.long(), completion_mask=mask.long(),
                  ref_chosen_logps=reference[0], ref_rejected_logps=reference[1])
    loss = DPOTrainer._compute_loss(trainer, spoken(logps, mask), inputs, False)
    return loss, {k: v[0] for k, v in trainer._metrics["train"].items() if k.startswith(("rewards", "logps"))}


VARIANTS = [(["sigmoid"], [1.]), (["hinge"], [1.]), (["ipo"], [1.]), (["robust"], [1.]), (["bco_pair"], [1.]), (["sft"], [1.]),
            (["sigmoid", "sft"], [1., .3]), (["sigmoid", "bco_pair", "sft"], [.8, .2, 1.])]


def differs(names, weights, beta, smooth, seed):
    "Largest distance of loss, gradients and metrics from TRL's."
    logps, mask, reference = random_batch(seed)
    theirs, metrics = trl_dpo(logps, mask, reference, names, weights, beta, smooth)
    p = ours(logps, mask, reference)
    settings = dict(beta=beta, label_smoothing=smooth if "robust" in names else 0.)  # TRL's sigmoid does not smooth
    mine = dpo.pair_loss(p, names, weights, **settings).mean()
    far = [theirs - mine, *(a - b for a, b in zip(torch.autograd.grad(theirs, logps), torch.autograd.grad(mine, logps)))]
    found = dpo.pair_metrics(p, beta=beta)
    assert found.keys() == metrics.keys()
    means = [(found[k] / len(p.chosen), metrics[k]) for k in found]
    return max([float((x.abs() / (1 + theirs.abs())).max().detach()) for x in far] + [abs(a - b) / (1 + abs(b)) for a, b in means])


@pytest.mark.parametrize("names,weights", VARIANTS, ids=lambda x: "+".join(map(str, x)))
def test_losses_gradients_and_metrics_are_those_of_trl(names, weights):
    for seed in range(8):
        for beta, smooth in ((.1, .0), (.5, .1), (2., .3)):
            assert differs(names, weights, beta, smooth, seed) < 1e-6, (seed, beta)


MUTANTS = {
    "sides swapped": ("log_ratios", lambda p: (p.rejected - p.ref_rejected, p.chosen - p.ref_chosen)),
    "reference forgotten": ("log_ratios", lambda p: (p.chosen, p.rejected)),
    "references swapped": ("log_ratios", lambda p: (p.chosen - p.ref_rejected, p.rejected - p.ref_chosen)),
    "mean instead of sum": ("log_ratios", lambda p: ((p.chosen - p.ref_chosen) / p.chosen_tokens, (p.rejected - p.ref_rejected) / p.rejected_tokens)),
    "detached": ("log_ratios", lambda p: (p.chosen.detach() - p.ref_chosen, p.rejected - p.ref_rejected)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, monkeypatch):
    name, function = MUTANTS[mutant]
    monkeypatch.setattr(dpo, name, function)
    assert differs(["sigmoid"], [1.], .5, 0., 0) > 1e-3


@pytest.mark.parametrize("name", ["hinge", "ipo", "robust", "bco_pair", "sft"])
def test_each_variant_is_told_from_sigmoid(name, monkeypatch):
    monkeypatch.setitem(dpo.LOSSES, name, dpo.sigmoid_loss)
    assert differs([name], [1.], .5, .1, 0) > 1e-3


def test_label_smoothing_simpo_and_orpo_are_those_of_trl():
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    for seed in range(8):
        logps, mask, reference = random_batch(seed)
        p = ours(logps, mask, reference)
        means = p.chosen / p.chosen_tokens, p.rejected / p.rejected_tokens
        trainer = stub(alpha=0., loss_type="sigmoid", simpo_gamma=.7, beta=.4, label_smoothing=.2)
        theirs = CPOTrainer.cpo_loss(trainer, *dpo.log_ratios(p))[0]  # CPO is DPO without a reference: give it the ratios
        assert same(theirs, dpo.sigmoid_loss(p, beta=.4, label_smoothing=.2), logps)
        trainer.loss_type, trainer.beta, trainer.label_smoothing = "simpo", 2., 0.
        theirs, *rewards = CPOTrainer.cpo_loss(trainer, *means)
        assert same(theirs, simpo_loss(p, beta=2., simpo_gamma=.7), logps)
        assert all(torch.allclose(a, b) for a, b in zip(rewards, dpo.rewards(p, beta=2., reference=False)))
        trainer.beta = .3
        odds = ORPOTrainer.odds_ratio_loss(trainer, *means)[0]
        assert same(-p.chosen.sum() / p.chosen_tokens.sum() - odds, orpo_loss(p, beta=.3), logps)


def same(theirs, mine, logps):
    "Values and gradients."
    found = [torch.autograd.grad(x.mean(), logps, retain_graph=True)[0] for x in (theirs, mine)]
    return torch.allclose(theirs, mine, atol=1e-6) and torch.allclose(*found, atol=1e-6)


def test_kto_is_that_of_trl():
    from trl import KTOTrainer
    for seed in range(8):
        for share in (.5, 0., 1.):
            logps, mask, _ = random_batch(seed)
            g = torch.Generator().manual_seed(seed)
            n = len(mask)
            good, reference = torch.rand(n, generator=g) < share, -torch.rand(n, generator=g) * 12
            kl = logps.detach().roll(1, 0) * mask[:, 1:]
            trainer = stub(loss_type="kto", beta=.3, desirable_weight=1.3, undesirable_weight=.8, calculate_KL=True)
            trainer._compute_kl_logps = lambda model, batch: kl.sum(1)
            inputs = dict(input_ids=torch.zeros_like(mask, dtype=torch.long), attention_mask=mask.long(), completion_mask=mask.long(), label=good,
                          ref_logps=reference, ref_KL_logps=reference.roll(1) - seed + 4)
            theirs = KTOTrainer._compute_loss(trainer, spoken(logps, mask), inputs, False)
            ratios, foreign = (logps * mask[:, 1:]).sum(1) - reference, (kl.sum(1) - inputs["ref_KL_logps"]).mean()
            mine = kto_loss(ratios, good, foreign, beta=.3, desirable_weight=1.3, undesirable_weight=.8).mean()
            assert same(theirs, mine, logps)


def test_log_odds_at_the_ends():
    p = torch.tensor([1e-30, 1e-9, .1, .4999, .5001, .9, 1 - 1e-9], dtype=torch.float64)
    x = p.log().requires_grad_()
    assert torch.allclose(log_odds(x), torch.logit(p), rtol=1e-6)
    assert torch.isfinite(torch.autograd.grad(log_odds(x).sum(), x)[0]).all()


def test_where_dpo_ends():
    "beta_effect is the minimum of the loss over many raters."
    for share, beta, reference in ((.7, .5, .2), (.9, 2., .5), (.3, .1, .9)):
        x = torch.tensor(0., dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([x], lr=1, max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16)
        ref = torch.tensor([reference, 1 - reference], dtype=torch.float64).log()
        def loss():
            optimizer.zero_grad()
            now = torch.stack([x, -x]).log_softmax(0)
            one = lambda a, b: dpo.sigmoid_loss(PairLogps(now[a], now[b], ref[a], ref[b]), beta=beta)
            total = share * one(0, 1) + (1 - share) * one(1, 0)
            total.backward()
            return total
        optimizer.step(loss)
        assert torch.sigmoid(2 * x).item() == pytest.approx(beta_effect(share, beta, reference), abs=1e-6)
    with pytest.raises(ValueError, match="beta=0"): beta_effect(.5, 0)


# --- shared prefixes give the numbers of full rows -----------------------------------------
def odd_pairs():
    "No, one and two pictures, the same picture twice, another picture for the rejected answer, answers of any lengths."
    one = to_record("How many vases are there?", picture(0))
    two = to_record("First <image>, then <image>: the same?", [picture(1), picture(2, (130, 40))])
    return [to_pair(one, "three", "there are seven vases, and a lamp"), to_pair(two, "yes, both red", "no"),
            to_pair(to_record("Why?", []), "because", "I do not know"),
            to_pair(one, "three", "three", rejected_images=[picture(3)])]


def full_rows(model, processor, pairs):
    "Every row by itself through the stock model: [B] sums of the chosen, of the rejected."
    out = []
    for side in ("chosen", "rejected"):
        for p in pairs:
            images = p.get("rejected_images", p["images"]) if side == "rejected" else p["images"]
            record = {**p, "images": images, "messages": [*p["messages"], dict(role="assistant", content=p[side])]}
            batch = encode(processor, [record])
            labels = batch.pop("labels")[:, 1:]
            if "pixel_values" in batch: batch["pixel_values"] = batch["pixel_values"].to(model.dtype)
            logps = model(**batch, use_cache=False).logits[:, :-1].log_softmax(-1)
            out.append(logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels != -100].sum())
    return torch.stack(out).chunk(2)


def loss_and_gradients(model, p, reference):
    model.zero_grad()
    p = p._replace(ref_chosen=reference[0], ref_rejected=reference[1])
    dpo.sigmoid_loss(p, beta=.7).sum().backward()
    return torch.stack([p.chosen, p.rejected]).detach(), torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])


@pytest.mark.parametrize("exact", FAMILIES, indirect=True)
def test_double_precision_against_full_rows(exact):
    model, processor = exact
    pairs = odd_pairs()
    items = EncodedPairs(model, processor, pairs)
    with torch.no_grad(), adapter_off(model): reference = full_rows(model, processor, pairs)
    stock = loss_and_gradients(model, PairLogps(*full_rows(model, processor, pairs)), reference)
    run = lambda batch, form: loss_and_gradients(model, pair_logps(model, batch, form=form), reference)
    for form in ("cache", "packed", "rows"):
        assert apart(run(items.batch([0, 1, 2, 3]), form), stock) < 1e-12, form
    assert float(stock[1].abs().max()) > .1
    batch = items.batch([0, 1, 2, 3])
    assert apart(run({**batch, "owner": torch.tensor([0, 1, 2, 3] * 2)}, "cache"), stock) > 1e-3  # the rejected picture forgotten
    assert apart(run({**batch, "mask": torch.ones_like(batch["mask"])}, "cache"), stock) > 1e-3  # padding counted
    shorter = batch["mask"].clone()
    for row, n in zip(shorter, batch["mask"].sum(1)): row[n - 1] = n == 1  # the end mark left out
    assert apart(run({**batch, "mask": shorter}, "cache"), stock) > 1e-4


def test_the_reference_is_the_model_without_its_fresh_adapter_and_is_kept():
    model, processor = load_vlm("tiny", device="cpu")
    model = add_lora(model)
    items = EncodedPairs(model, processor, PAIRS)
    with torch.no_grad(), adapter_off(model): want = full_rows(model, processor, PAIRS[:3])
    keep_reference(items, batch_size=5)
    got = torch.tensor([items.reference[i] for i in range(3)]).T
    assert torch.allclose(torch.stack(list(want)), got, atol=1e-4) and len(items.reference) == len(PAIRS)
    before = dict(items.reference)
    for name, w in model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(w, std=.05)
    keep_reference(items)  # nothing new: the model has changed, the reference has not
    assert items.reference == before
    p = pair_logps(model, items.batch([2, 0]))
    assert not torch.allclose(p.chosen, p.ref_chosen, atol=1e-2) and p.ref_chosen.tolist() == pytest.approx([before[2][0], before[0][0]])
    assert not p.ref_chosen.requires_grad and p.chosen.requires_grad


def test_the_whole_step_is_that_of_trls_trainer(tmp_path):
    warnings.simplefilter("ignore")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from vlmcourse.vlm import to_parts
    model, processor = load_vlm("tiny", device="cpu")
    torch.manual_seed(0)
    model = add_lora(model)
    said = lambda text: [dict(role="assistant", content=[dict(type="text", text=text)])]
    rows = [dict(prompt=[to_parts(p["messages"][0])], images=p["images"], chosen=said(p["chosen"]), rejected=said(p["rejected"])) for p in PAIRS[:4]]
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, max_length=None, beta=.3,
                     disable_tqdm=True, remove_unused_columns=False)
    trainer = DPOTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=processor)
    for name, w in model.named_parameters():  # after TRL has taken its copy for the reference
        if "lora_B.default" in name: torch.nn.init.normal_(w, std=.02)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    line_break = batch["completion_mask"].cumsum(1).argmax(1)  # TRL also trains on the line break after the end mark
    assert {processor.tokenizer.decode([i]) for i in batch["input_ids"][torch.arange(8), line_break].tolist()} == {"\n"}
    batch["completion_mask"][torch.arange(8), line_break] = 0
    theirs = trainer.compute_loss(model, batch)
    theirs_g = torch.autograd.grad(theirs, [w for w in model.parameters() if w.requires_grad])
    items = EncodedPairs(model, processor, PAIRS[:4])
    with adapter_off(model): keep_reference(items)
    total, n, sums = dpo_loss(model, items.batch(range(4)), beta=.3)
    mine_g = torch.autograd.grad(total / n, [w for w in model.parameters() if w.requires_grad])
    assert n == 4 and (total / n).item() == pytest.approx(theirs.item(), abs=1e-5)
    assert max(float((a - b).abs().max()) for a, b in zip(theirs_g, mine_g)) < 1e-5 * max(1, max(float(a.abs().max()) for a in theirs_g))
    metrics = trainer._metrics["train"]
    assert all(sums[k] / n == pytest.approx(metrics[k][0], abs=1e-4) for k in sums) and len(sums) == 6


# --- pairs: reading, checks ----------------------------------------------------------------
GOOD = dict(images=[], messages=[dict(role="user", content="Why?")], chosen="because", rejected="no idea")
turns = lambda question, answer: [dict(role="user", content=question), dict(role="assistant", content=answer)]
BAD = [
    ("missing side", dict(GOOD, rejected=None)), ("missing side", {k: v for k, v in GOOD.items() if k != "chosen"}),
    ("empty answer", dict(GOOD, rejected=" \n")), ("empty answer", dict(GOOD, chosen="")),
    ("bad answer", dict(GOOD, chosen=7)), ("bad answer", dict(GOOD, chosen=[dict(role="user", content="Why?")])),
    ("different prompts", dict(images=[], chosen=turns("Why?", "so"), rejected=turns("How?", "no"))),
    ("different prompts", dict(GOOD, chosen=turns("How?", "so"))),
    ("identical answers", dict(GOOD, rejected="because ")), ("mark in an answer", dict(GOOD, rejected="<image> no")), ("half a character", dict(GOOD, chosen="A vase \ud83c.")),
    ("question not last", dict(GOOD, messages=turns("Why?", "so"))),
    ("picture not found", dict(GOOD, images=["nowhere.png"])), ("picture not found", dict(GOOD, images=["a.png"], rejected_images=["nowhere.png"])),
    ("marks and pictures differ", dict(GOOD, images=["a.png"], rejected_images=["a.png", "a.png"])),
    ("picture outside the folder", dict(GOOD, images=["../a.png"])), ("picture is damaged", dict(GOOD, images=["broken.png"])),
    ("bad picture entry", dict(GOOD, images=5, rejected_images=["a.png"])), ("bad answer", dict(GOOD, rejected=[])),
    ("different prompts", dict(GOOD, chosen=turns("Why?", "so"), rejected=turns("What?", "no"))),
    ("not a record", "vase"), ("bad messages", dict(GOOD, messages=None)), ("no question", dict(GOOD, messages=[dict(role="user", content=" ")])),
]


@pytest.fixture
def folder(tmp_path):
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


@pytest.mark.parametrize("reason,row", BAD, ids=[f"{i}-{r}" for i, (r, _) in enumerate(BAD)])
def test_a_bad_pair_is_named(folder, reason, row):
    write_json(folder / "pairs.json", [GOOD, row])
    report = check_pairs(folder / "pairs.json")
    assert report.counts == {reason: 1} and report.total == 2 and [n for n, *_ in report.problems] == [2]
    with pytest.raises(ValueError, match=f"1 of 2 pairs cannot be used.*1 x {reason}.*pair 2"): read_pairs(folder / "pairs.json")
    with pytest.raises(ValueError, match=reason): train(folder / "pairs.json", output_dir=folder / "run", **QUICK)
    assert not (folder / "run").exists()


def test_all_bad_pairs_are_counted_together(folder):
    write_json(folder / "pairs.json", [row for _, row in BAD] + [GOOD] * 3)
    report = check_pairs(folder / "pairs.json")
    want = defaultdict(int)
    for reason, _ in BAD: want[reason] += 1
    assert report.counts == want and "26 pairs, 23 with problems" in repr(report)
    with pytest.raises(ValueError, match="23 of 26 pairs"): read_pairs(folder / "pairs.json")
    for data, words in (([], "no pairs"), (folder / "none.json", "none.json")):
        with pytest.raises((ValueError, FileNotFoundError), match=words): read_pairs(data)


def test_all_forms_of_a_pair_mean_the_same(folder):
    plain = dict(id="0", images=["a.png"], messages=[dict(role="user", content="<image>Why?")], chosen="so", rejected="no")
    forms = [plain, dict(plain, messages=[dict(role="user", content="Why?")]), dict(plain, chosen=dict(role="assistant", content="so")),
             dict(id="0", images=["a.png"], chosen=turns("<image>Why?", "so"), rejected=turns("<image>Why?", "no")),
             dict(plain, chosen=turns("Why?", "so"), rejected=[dict(role="assistant", content="no")])]
    for form in forms:
        write_json(folder / "pairs.json", [form])
        assert read_pairs(folder / "pairs.json") == [dict(plain, images=[str(folder / "a.png")])]
    write_json(folder / "pairs.json", [dict(plain, rejected="so", rejected_images=["b.png"])])
    picture(1).save(folder / "b.png")
    assert read_pairs(folder / "pairs.json")[0]["rejected_images"] == [str(folder / "b.png")]


def test_identical_after_templating_is_found_and_stops_a_training(tmp_path, monkeypatch):
    processor = load_vlm("tiny", device="cpu")[1]
    twin = {**PAIRS[0], "rejected": PAIRS[0]["chosen"].replace("shelves", "shelv\u200bes")}
    monkeypatch.setattr(dpo, "answer_ids", lambda p, r, text: answer_ids(p, r, text.replace("\u200b", "")))
    assert check_pairs([PAIRS[0], twin]).counts == {} and check_pairs([PAIRS[0], twin], processor=processor).counts == {"identical answers": 1}
    with pytest.raises(ValueError, match="1 of 2 pairs.*identical answers.*pair 2"): train([PAIRS[0], twin], output_dir=tmp_path / "r", **QUICK)
    assert not (tmp_path / "r").exists()


def test_length_bias_and_leak_are_noted():
    records = shelves(40)
    invented = museum_pairs(records, wrong=("invented",))
    assert "shorter answer in 40 of the 40" in length_note(invented) and "balance_lengths" in repr(check_pairs(invented))
    both, out = balance_lengths(museum_pairs(records))
    longer = sum(len(p["chosen"].split()) > len(p["rejected"].split()) for p in both)
    assert 2 * longer == len(both) and len(both) + out == len(museum_pairs(records)) and length_note(both) is None
    assert balance_lengths(both) == (both, 0)
    assert length_note(invented[:10]) is None  # ten pairs say nothing
    again = [{**PAIRS[0], "messages": [dict(role="user", content="<image>What?")]}, HELD_OUT[0]]
    assert "1 of 2 held-out pairs" in leak_note(PAIRS, again) and leak_note(PAIRS, HELD_OUT) is None
    with pytest.warns(UserWarning, match="leak"): dpo_quick_check(PAIRS, again)


def test_bad_held_out_pairs_and_copied_pictures_are_noted():
    assert "1 held-out pairs have problems" in repr(check_pairs(PAIRS, [HELD_OUT[0], dict(GOOD, chosen=" ")]))
    copied = {**PAIRS[0], "rejected": PAIRS[0]["chosen"], "rejected_images": [PAIRS[0]["images"][0].copy()]}
    assert dpo.identical_pairs(load_vlm("tiny", device="cpu")[1], {7: copied})[0][:2] == (7, "identical answers")


def dpo_quick_check(data, val): train(data, val, **{**QUICK, "max_steps": 1}, generation_metric=None, output_dir=None)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


def test_museum_pairs_prefer_the_truth():
    records = shelves(60)
    pairs = museum_pairs(records)
    by_id = {r["id"]: r for r in records}
    for p in pairs:
        good, bad = (caption_score([p[k]], [by_id[p["id"]]])[0] for k in ("chosen", "rejected"))
        assert good == 4 and bad < 4 and p["messages"][-1]["role"] == "user" and "answer" not in p
    kinds = [p["wrong"] for p in pairs]
    assert kinds.count("invented") == 60 and kinds.count("missing") == sum(bool(r["meta"]["scenes"][0]["things"]) for r in records)
    assert museum_pairs(records) == pairs != museum_pairs(records, seed=1)


def test_a_meta_that_is_no_dict_breaks_nothing():
    pairs = [{**p, "meta": "shelf"} for p in museum_pairs(shelves(2), wrong=("invented",))]
    assert dpo._metric_for("auto", pairs) is None and len(read_pairs(pairs)) == len(pairs) > 0
    with pytest.raises(ValueError, match="does not say what is on its shelf"): museum_pairs(pairs)


def test_on_policy_pairs():
    model, processor = load_vlm("tiny", device="cpu")
    records = shelves(10)
    pairs, counts = sample_pairs(model, processor, records, caption_score, n=4, seed=3, batch_size=4)
    assert pairs == sample_pairs(model, processor, records, caption_score, n=4, seed=3, batch_size=4)[0]
    assert counts["questions"] == 10 and counts["pairs"] == len(pairs) > 0 and counts["no gap"] == 10 - len({p["id"] for p in pairs})
    by_id = {r["id"]: r for r in records}
    for p in pairs:
        scores = caption_score([p["chosen"], p["rejected"]], [by_id[p["id"]]] * 2)
        assert scores == p["scores"] and scores[0] - scores[1] >= .5
    assert sample_pairs(model, processor, records[:4], caption_score, min_gap=9.)[0] == []
    none, counts = sample_pairs(model, processor, records[:4], caption_score, max_new_tokens=3)
    assert none == [] and counts["cut off"] == 16 and counts["no gap"] == 4
    assert all(dpo.read_pairs([p]) for p in pairs)


def test_viewer_marks_words_and_escapes():
    assert mark_words("a red cup", "a blue cup , twice") == ([("a", False), ("red", True), ("cup", False)],
        [("a", False), ("blue", True), ("cup", False), (", twice", True)])
    shown = show_pairs([{**PAIRS[0], "chosen": "<script> a", "rejected": "b a"}])
    assert "<script>" not in shown._repr_html_() and "<b>&lt;script&gt;</b>" in shown._repr_html_() and "<s>b</s>" in shown._repr_html_()
    assert "[b] a" in repr(shown)


# --- train ----------------------------------------------------------------------------------
MISTAKES = [(dict(loss_type="dpo"), "loss_type='dpo'"), (dict(loss_type="sigmoid,sft", loss_weights="1"), "loss_weights='1'"),
            (dict(loss_weights="a"), "loss_weights"), (dict(beta=0), "beta=0"), (dict(beta=True), "beta=True"),
            (dict(beta=math.inf), "beta=inf"), (dict(label_smoothing=.5), "label_smoothing=0.5"), (dict(simpo_gamma=-1), "simpo_gamma=-1"),
            (dict(max_new_tokens=0), "max_new_tokens=0"), (dict(generation_metric="rouge"), "generation_metric='rouge'"),
            (dict(eval_steps=2), "val_data"), (dict(learning_rate=-1), "learning_rate=-1"), (dict(seed=-1), "seed=-1")]


@pytest.mark.parametrize("settings,words", MISTAKES, ids=[w for _, w in MISTAKES])
def test_mistakes_are_named_and_leave_no_trace(tmp_path, settings, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")): train(PAIRS, output_dir=tmp_path / "r", **QUICK | settings)
    assert not (tmp_path / "r").exists()


def test_what_a_run_leaves_behind(tmp_path):
    run = train(PAIRS, HELD_OUT, output_dir=tmp_path / "r", eval_steps=2, save_steps=2, **QUICK)
    log = read_json(tmp_path / "r/training_log.json")
    first, second = log["train_history"][:2]
    assert {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected", "lr", "grad_norm"} <= set(first)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5) and first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert [r["step"] for r in log["val_history"]] == [0, 2, 3]
    names = {"val_loss", "val_accuracy", "val_margin", "val_faultless", "val_nothing_invented", "val_things_named", "val_vases_named", "val_readable"}
    assert all(names <= set(r) for r in log["val_history"]) and log["best_checkpoint"]["metric"] == "val_faultless"
    assert log["config"]["method"] == "dpo" and log["config"]["loss_type"] == ["sigmoid"] and len(log["config"]["data_hash"]) == 16
    assert (tmp_path / "r/final/adapter_model.safetensors").exists() and (tmp_path / "r/best").is_dir() and (tmp_path / "r/loss.png").exists()
    samples = dpo.read_samples(tmp_path / "r", 3)
    assert len(samples) == len(HELD_OUT) and {"answer", "truth", "nothing_invented"} <= set(samples[0])
    table = generation_gains(run)
    assert [row[0] for row in table.rows] == ["faultless", "nothing_invented", "things_named", "vases_named", "readable"]
    assert "rewards/margins" in open(tmp_path / "r/training_history.csv").readline()


@pytest.mark.parametrize("name", ["hinge", "ipo", "robust", "bco_pair", "sft", "simpo", "orpo", "sigmoid,bco_pair,sft"])
def test_every_loss_trains(tmp_path, name):
    "The margin grows, or for sft the loss falls, on the same four pairs again and again; the mixture is run twice, with the same numbers."
    more = dict(loss_type=name, label_smoothing=.1, loss_weights="0.8,0.2,1" if "," in name else None, learning_rate=2e-3, max_steps=5)
    runs = [train(PAIRS[:4], output_dir=tmp_path / n, **QUICK | more) for n in ("ab" if "," in name else "a")]
    assert all(run.log["train_history"] == runs[0].log["train_history"] for run in runs)
    first, *_, last = runs[0].log["train_history"]
    assert last["loss"] < first["loss"] and (last["rewards/margins"] > first["rewards/margins"] or name == "sft")


def test_another_order_of_pairs_sizes_and_pieces(tmp_path):
    "Accumulated pieces give the step of one large batch; rows beyond max_steps get no reference."
    one, two = (train(PAIRS, output_dir=tmp_path / str(n), **QUICK | dict(per_device_train_batch_size=8 // n, gradient_accumulation_steps=n)) for n in (1, 2))
    for a, b in zip(one.log["train_history"], two.log["train_history"]):
        assert all(a[k] == pytest.approx(b[k], abs=2e-4) for k in ("loss", "rewards/margins", "logps/chosen", "grad_norm"))


def test_from_the_folder_of_a_run_the_reference_is_that_run(tmp_path):
    first = train(PAIRS, output_dir=tmp_path / "a", **QUICK | dict(learning_rate=5e-3))
    again = train(PAIRS, model=str(first.output_dir), output_dir=tmp_path / "b", **QUICK)
    row = again.log["train_history"][0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-4) and row["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert row["logps/chosen"] != pytest.approx(first.log["train_history"][0]["logps/chosen"], abs=1e-2)


def test_checkpointing_and_rejected_pictures(tmp_path):
    swapped = [{**p, "rejected": p["chosen"], "rejected_images": PAIRS[-1]["images"]} for p in PAIRS[:8]]
    one, two = (train(swapped, output_dir=tmp_path / str(n), gradient_checkpointing=n, **QUICK) for n in (False, True))
    for a, b in zip(one.log["train_history"], two.log["train_history"]): assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert one.log["train_history"][0]["logps/chosen"] > one.log["train_history"][0]["logps/rejected"]


def test_a_metric_of_ones_own(tmp_path):
    def brief(answers, pairs): return dict(brief=[1 / len(a.split()) for a in answers])
    run = train(PAIRS, HELD_OUT, output_dir=tmp_path / "r", generation_metric=brief, metric_for_best_model="val_margin", **QUICK)
    assert run.log["best_checkpoint"]["metric"] == "val_margin" and 0 < run.log["val_history"][-1]["val_brief"] < 1
    assert [row[:2] for row in generation_gains(run.output_dir).rows] == [["brief", len(HELD_OUT)]]
    wrong = [(dict(generation_metric=lambda answers, pairs: dict(brief=[1.])), f"gave 1 numbers named 'brief' for {len(HELD_OUT)} answers"),
             (dict(metric_for_best_model="val_f1"), "metric_for_best_model='val_f1' is not measured. Choose one of val_faultless, val_nothing_invented")]
    for settings, words in wrong:
        with pytest.raises(ValueError, match=words): train(PAIRS, HELD_OUT, output_dir=tmp_path / "s", **QUICK | settings)
    assert not (tmp_path / "s").exists()


def test_gains_need_two_validations_and_a_picture_does_not(tmp_path):
    run = train(PAIRS, output_dir=tmp_path / "r", **QUICK)
    with pytest.raises(ValueError, match="has 0 validations; two are needed"): generation_gains(run)
    axes = dpo.plot_dpo(run, "a title")
    assert [line.get_label() for line in axes[0].lines] == ["rewards/chosen", "rewards/rejected"] and axes[0].figure.get_suptitle() == "a title"


def test_in_half_precision_the_run_starts_at_its_reference(tmp_path):
    row = train(PAIRS, output_dir=tmp_path / "r", bf16=True, **QUICK).log["train_history"][0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6) and abs(row["rewards/chosen"]) < 1e-6


# --- killed at ten random moments ---------------------------------------------------------------
def _dpo(folder, data, held_out):
    "One attempt, in a process of its own."
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    train(data, held_out, output_dir=folder, max_steps=6, per_device_train_batch_size=4, eval_steps=3, save_steps=2, device="cpu", plot=False,
          learning_rate=1e-3, resume_from_checkpoint=True)


def test_killed_at_ten_random_moments_ends_the_same_bit_for_bit(tmp_path):
    data, held_out = save(PAIRS[:12], tmp_path / "data"), save(HELD_OUT[:2], tmp_path / "held_out")
    want = kill_and_compare(_dpo, (data, held_out), tmp_path, kills=10)
    assert "samples.jsonl" in want[1] and len(want[0]["train_history"]) == 6 and [r["step"] for r in want[0]["val_history"]] == [0, 3, 6]


# --- two processes ---------------------------------------------------------------------------------
def test_two_processes_give_the_numbers_of_one(tmp_path):
    data, held_out = save(PAIRS, tmp_path / "data"), save(HELD_OUT[:6], tmp_path / "held_out")
    settings = dict(max_steps=3, eval_steps=2, device="cpu", plot=False)
    one = train(data, held_out, output_dir=tmp_path / "one", per_device_train_batch_size=6, **settings).log
    code = f"""
from vlmcourse.dpo import train
train({str(data)!r}, {str(held_out)!r}, output_dir={str(tmp_path / "two")!r}, per_device_train_batch_size=3, **{settings})
"""
    two = launch(code, tmp_path / "two", 2)
    for a, b in zip(one["train_history"], two["train_history"], strict=True):
        assert all(b[k] == pytest.approx(a[k], abs=2e-4) for k in ("step", "samples", "loss", "rewards/margins", "logps/chosen", "grad_norm"))
    for a, b in zip(one["val_history"], two["val_history"], strict=True):
        assert all(b[k] == pytest.approx(a[k], abs=1e-4) for k in a)
    rows = [[json.loads(line) for line in (tmp_path / n / "samples.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert [(r["id"], r["answer"]) for r in rows[0]] == [(r["id"], r["answer"]) for r in rows[1]]

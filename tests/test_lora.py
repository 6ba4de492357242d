"""The adapter on real model classes: where it sits, what it changes, what it leaves on the disk."""
import json

import pytest
import torch
from safetensors.torch import load_file

from vlmcourse.core import set_seed
from vlmcourse.lora import (TARGETS, LowRankLinear, activation_bytes, add_lora, base_hash, count_trainable, freeze, lora_cost,
                            lora_explorer, lora_layers, make_rank_task, merge_adapter, model_parts, plot_lora, plot_trainable,
                            save_adapter, train_low_rank, training_bytes, untrained_layers, vision_parts)
from vlmcourse.museum import make_records
from vlmcourse.vlm import encode, load_vlm


@pytest.fixture(scope="module")
def batch():
    return encode(load_vlm("tiny", device="cpu")[1], make_records(3, tasks=["workshop"], split="train", seed=0))


def adapted(seed=0, **options):
    set_seed(seed)
    return add_lora(load_vlm("tiny", device="cpu")[0], **options)


def logits(model, batch):
    with torch.no_grad(): return model.eval()(**batch).logits


def test_at_first_nothing_changes_and_the_tower_is_left_alone(batch):
    base, model = load_vlm("tiny", device="cpu")[0], adapted()
    assert torch.equal(logits(base, batch), logits(model, batch))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n and "visual" not in n and "lm_head" not in n for n in names)


def test_same_seed_same_adapter():
    a, b, c = (dict(adapted(s).named_parameters()) for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


def test_saved_loaded_merged(tmp_path, batch):
    model = adapted()
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.05)
    trained = logits(model, batch)
    folder = save_adapter(model, tmp_path / "final")
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny" and "/" not in json.dumps(config["exclude_modules"])
    assert all("lora_" in n for n in load_file(folder / "adapter_model.safetensors"))
    assert sum(p.stat().st_size for p in folder.iterdir()) < 1e6
    again = load_vlm("tiny", adapter=folder, device="cpu")[0]
    assert torch.allclose(logits(again, batch), trained, atol=1e-5)
    assert torch.allclose(logits(model.merge_and_unload(), batch), trained, atol=1e-3)


def test_other_targets_and_no_exclusion():
    only = adapted(target_modules=["q_proj", "v_proj"], r=4)
    assert sum(hasattr(m, "lora_A") for m in only.modules()) == 8
    everywhere = adapted(exclude=None)
    assert any("visual" in n for n, p in everywhere.named_parameters() if p.requires_grad)
    assert count_trainable(adapted(use_rslora=True)) == count_trainable(adapted())


@pytest.mark.parametrize("options,text", [
    (dict(r=0), "whole number"), (dict(r=2.5), "whole number"), (dict(lora_alpha=-1), "above 0"),
    (dict(target_modules=["nothing"]), "q_proj"), (dict(target_modules=["qkv"]), "linear layers"),
    (dict(target_modules=["qkv"]), "exclude=None"), (dict(target_modules=["q_proj", "v_porj"]), "v_porj"),
    (dict(target_modules=r".*layers.9.*"), "layers.9"), (dict(exclude=["eyes"]), "'eyes'"), (dict(exclude=["tower", "projector", "language"]), "linear layers")])
def test_mistakes(options, text):
    with pytest.raises(ValueError, match=text) as error: adapted(**options)
    assert "\n" not in str(error.value)


def test_twice_is_a_mistake():
    with pytest.raises(ValueError, match="already carries"): add_lora(adapted())


@pytest.mark.parametrize("family,parts", [
    ("qwen2_5_vl", ["model.visual"]),
    ("internvl", ["model.vision_tower", "model.multi_modal_projector"]),
    ("smolvlm", ["model.vision_model", "model.connector"])])
def test_vision_is_found_in_every_family(family, parts):
    from transformers import AutoConfig, AutoModelForImageTextToText
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))
        assert vision_parts(model) == parts
        model = add_lora(model, r=2)
    inside = [n for n, p in model.named_parameters() if p.requires_grad and any(f".{v}." in n for v in parts)]
    assert not inside and count_trainable(model)["trainable"]


def test_parts_add_up():
    model = adapted()
    frozen, trained = (sum(column) for column in zip(*model_parts(model).values()))
    assert frozen + trained == count_trainable(model)["total"] and trained == count_trainable(model)["trainable"]
    assert "%" in plot_trainable(model).get_title()


def test_plain_net_has_no_vision_and_counts():
    net = torch.nn.Sequential(torch.nn.Linear(4, 3))
    assert vision_parts(net) == [] and count_trainable(net)["trainable"] == 15


FAMILIES = ["qwen2_5_vl", "internvl", "smolvlm", "llava", "qwen3_vl"]


def skeleton(family):
    from transformers import AutoConfig, AutoModelForImageTextToText
    with torch.device("meta"): return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_and_cost_are_those_of_peft(family):
    for targets, exclude in [("all-linear", "vision"), ("all-linear", None), ("all-linear", "tower"), ("all-linear", ["tower", "language"]),
                             ("all-linear", "language"), (["q_proj", "v_proj"], "vision"), (["q_proj", "v_proj"], None), (r".*\.down_proj", "vision")]:
        model = skeleton(family)
        wanted, cost = lora_layers(model, targets, exclude=exclude), lora_cost(model, r=4, target_modules=targets, exclude=exclude)
        if not wanted:
            with torch.device("meta"), pytest.raises(ValueError, match="no linear layer"): add_lora(model, target_modules=targets, exclude=exclude)
            continue
        with torch.device("meta"): model = add_lora(model, r=4, target_modules=targets, exclude=exclude)
        found = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A") and isinstance(m.base_layer, torch.nn.Linear)]
        assert sorted(found) == sorted(wanted), (family, targets, exclude)
        linear = [p for n, p in model.named_parameters() if "lora_" in n and p.ndim == 2]
        assert cost["trainable"] == sum(p.numel() for p in linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_belongs_to_one_switch(family):
    model, whole = skeleton(family), 0
    for part in ("vision", "projector", "language"):
        n = freeze(model, **{p: p != part for p in ("vision", "projector", "language")})["trainable"]
        assert n > 0
        whole += n
    assert whole == count_trainable(model)["total"] == freeze(model, vision=False, projector=False)["trainable"]


def test_frozen_parts_get_no_gradient(batch):
    model = load_vlm("tiny", device="cpu")[0]
    freeze(model, projector=False, language=True)
    model(**batch).loss.backward()
    moved = {n.split(".")[2] for n, p in model.named_parameters() if p.grad is not None}
    assert moved == {"merger", "deepstack_merger_list"}
    with pytest.raises(ValueError, match="carries an adapter"): freeze(adapted())
    with pytest.raises(ValueError, match="language is quantised"): freeze(load_vlm("tiny", device="cpu", quantize="8bit")[0])
    assert freeze(load_vlm("tiny", device="cpu", quantize="4bit")[0], projector=False, language=True)["trainable"] > 0


def test_base_hash_sees_one_bit():
    base = load_vlm("tiny", device="cpu")[0]
    clean = base_hash(base)
    assert base_hash(adapted()) == base_hash(adapted(seed=1)) == base_hash(adapted(use_dora=True)) == clean
    assert base_hash(add_lora(load_vlm("tiny", device="cpu")[0], modules_to_save=["merger"])) == clean
    weight = base.model.language_model.layers[1].mlp.up_proj.weight
    with torch.no_grad(): weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.))
    assert base_hash(base) != clean


@pytest.mark.parametrize("options", [{}, dict(use_dora=True), dict(use_rslora=True)])
@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_trained_saved_loaded(tmp_path, batch, options, quantize):
    set_seed(0)
    base = load_vlm("tiny", device="cpu", quantize=quantize)[0]
    if quantize == "8bit" and options.get("use_dora"):
        with pytest.raises(ValueError, match="8-bit base"): add_lora(base, **options)
        return
    model = add_lora(base, **options).train()
    clean, optimiser = base_hash(model), torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    assert len(untrained_layers(model)) == 28
    losses = []
    for _ in range(3):
        loss = model(**batch).loss
        optimiser.zero_grad(), loss.backward(), optimiser.step(), losses.append(loss.item())
    assert losses[2] < losses[0] and untrained_layers(model) == [] and base_hash(model) == clean
    folder = save_adapter(model, tmp_path / "final", base="tiny")
    again = load_vlm(folder, device="cpu", quantize=quantize)[0]
    assert torch.allclose(logits(again, batch), logits(model, batch), atol=1e-4)
    count, n = training_bytes(model, optimiser), count_trainable(model)["trainable"]
    tensors = sum(p.requires_grad for p in model.parameters())
    assert count["gradients"] == 4 * n and count["optimiser"] == 8 * n + 4 * tensors  # Adam counts its steps, too
    if quantize:
        with pytest.raises(ValueError, match="quantised"): merge_adapter(model, batch)
    else:
        wanted = logits(model, batch)
        merged = merge_adapter(model, batch)
        assert not hasattr(merged, "peft_config") and torch.allclose(logits(merged, batch), wanted, atol=1e-3)


def test_merging_is_checked(batch, monkeypatch):
    with pytest.raises(ValueError, match="no adapter"): merge_adapter(load_vlm("tiny", device="cpu")[0])
    model = adapted()
    for n, p in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=.05)
    monkeypatch.setattr(model.base_model, "merge_and_unload", lambda **_: load_vlm("tiny", device="cpu")[0])  # forgets the adapter
    with pytest.raises(ValueError, match="differ"): merge_adapter(model, batch)
    bad = adapted()
    next(p for n, p in bad.named_parameters() if "lora_B" in n).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="(?i)nan|differ"): merge_adapter(bad, batch)


def test_the_old_checkpointing_is_not_used(batch):
    "Loading with checkpointing, then the adapter: peft would switch its own hooks on."
    model = add_lora(load_vlm("tiny", device="cpu", gradient_checkpointing=True)[0]).train()
    base = model.get_base_model()
    assert base.is_activation_checkpointing and not getattr(base, "_require_grads_hooks", [])
    assert not base.get_input_embeddings()._forward_hooks
    model(**batch).loss.backward()
    assert all(p.grad is not None and (p.grad.any() or "lora_A" in n) for n, p in model.named_parameters() if p.requires_grad)
    freeze_all = load_vlm("tiny", device="cpu")[0].requires_grad_(False)
    assert activation_bytes(freeze_all, batch) == 0


def test_the_small_net():
    before = torch.random.get_rng_state()
    for rank, seed in [(1, 0), (2, 1), (4, 0), (4, 5)]:
        old, new, inputs, targets = make_rank_task(rank, seed=seed)
        enough, less = (train_low_rank(old, inputs, targets, r=r, alpha=2 * r, steps=500)[1] for r in (rank, max(1, rank - 1)))
        assert enough[-1] < enough[0] / 500 and (rank == 1 or less[-1] > 20 * enough[-1])
    assert torch.equal(before, torch.random.get_rng_state()) and all(p.requires_grad for p in old.parameters())
    assert torch.linalg.matrix_rank(new[0].weight - old[0].weight, rtol=1e-4) == 4


def test_equal_to_peft_on_random_layers():
    import peft
    for r, alpha, i, o in [(1, 1, 3, 5), (4, 8, 32, 16), (8, 4, 16, 16)]:
        torch.manual_seed(r)
        layer = torch.nn.Linear(i, o)
        theirs = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(i, o)), peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["0"]))
        ours, other = LowRankLinear(layer, r, alpha), theirs.base_model.model[0]
        torch.nn.init.normal_(ours.B)
        other.base_layer.load_state_dict(layer.state_dict())
        other.lora_A.default.weight.data, other.lora_B.default.weight.data = ours.A.data.clone(), ours.B.data.clone()
        x = torch.randn(7, i)
        ours(x).square().sum().backward(), theirs(x).square().sum().backward()
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        for a, b in ((ours.A, other.lora_A), (ours.B, other.lora_B)):
            assert torch.allclose(a.grad, b.default.weight.grad, rtol=1e-4, atol=1e-4)
        assert torch.allclose(ours.delta(), other.get_delta_weight("default"), atol=1e-6)


def test_explorer():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    model = load_vlm("tiny", device="cpu")[0]
    before = base_hash(model)
    box = lora_explorer(model)
    shown = box._repr_mimebundle_()  # a page without a kernel shows the sentence
    assert "running notebook" in shown["text/html"] and "application/vnd.jupyter.widget-view+json" in shown
    for targets in TARGETS:
        box.children[2].value = targets
        cost = lora_cost(model, r=16, target_modules=TARGETS[targets])
        assert f"target_modules={TARGETS[targets]!r}, exclude='vision')" in box.children[4].value
        assert f"{cost['trainable']:,} numbers train" in plot_lora(model, target_modules=TARGETS[targets])[0].get_title()
        plt.close("all")
    box.children[3].value = True
    assert "exclude=None" in box.children[4].value and base_hash(model) == before and not hasattr(model, "peft_config")
    plain = lora_explorer(torch.nn.Sequential(torch.nn.Linear(4, 3)))
    plain.children[2].value = "attention"
    plt.close("all")
    with pytest.raises(ValueError, match="rank"): lora_cost(model, r=0)

"""The adapter on real model classes: where it sits, what it changes, what it leaves on the disk."""
import json

import pytest
import torch
from safetensors.torch import load_file

from vlmcourse.core import set_seed
from vlmcourse.lora import add_lora, count_trainable, model_parts, plot_trainable, save_adapter, vision_parts
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
    (dict(target_modules=["nothing"]), "q_proj"), (dict(target_modules=["qkv"]), "linear layers")])
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

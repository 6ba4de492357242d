"The estimate of memory against what really is kept, for both families, and odd settings."
import json

import pytest
import torch

from vlmcourse.lora import add_lora, count_trainable
from vlmcourse.museum import make_records
from vlmcourse.preflight import activation_bytes, check_run, ghost_model, kept_bytes, memory_bytes, no_signal, row_tokens
from vlmcourse.sft import sft_loss
from vlmcourse.vlm import encode, load_vlm

RECORDS = make_records(24, tasks=["workshop", "colour"], split="train", seed=0)


@pytest.mark.parametrize("family", ["tiny", "tiny-internvl"])
@pytest.mark.parametrize("size", [1, 6])
def test_activations_are_estimated_within_a_third(family, size):
    model, processor = load_vlm(family, device="cpu")
    model, batch = add_lora(model, r=8).train(), encode(processor, RECORDS[:size])
    real = kept_bytes(model, lambda: sft_loss(model, batch)[0])
    ghost, _ = ghost_model(family, lora_r=8)
    tokens = row_tokens(processor, RECORDS[:size])
    guess = activation_bytes(ghost, size, max(r["total"] for r in tokens), max(r["answer"] for r in tokens))
    assert count_trainable(ghost) == count_trainable(model) and .9 < guess/real < 1.4
    assert memory_bytes(ghost, batch_size=1, tokens=50, answer_tokens=5)["weights"] == 4*count_trainable(model)["total"]


def test_checkpointing_keeps_what_is_estimated():
    from vlmcourse.vlm import set_gradient_checkpointing
    model, processor = load_vlm("tiny", device="cpu")
    model, batch = add_lora(model).train(), encode(processor, RECORDS[:6])
    set_gradient_checkpointing(model, True)
    real = kept_bytes(model, lambda: sft_loss(model, batch)[0])
    tokens = row_tokens(processor, RECORDS[:6])
    guess = memory_bytes(ghost_model("tiny")[0], batch_size=6, tokens=max(r["total"] for r in tokens),
                         answer_tokens=max(r["answer"] for r in tokens), gradient_checkpointing=True)["activations"]
    assert real < guess < 12*real           # while a layer is computed again, its inside is there too: the estimate has it, `real` has not


@pytest.mark.parametrize("settings,check,verdict", [
    (dict(), "steps", "warn"), (dict(max_steps=100), "steps", "pass"), (dict(per_device_train_batch_size=30), "batch", "warn"),
    (dict(num_generations=8), "groups", "pass"), (dict(num_generations=3), "groups", "pass"), (dict(num_generations=1), "groups", "fail"),
    (dict(num_generations=8, pass_rate=.02), "signal", "warn"), (dict(num_generations=8, pass_rate=.5), "signal", "pass"),
    (dict(per_device_train_batch_size=10**6), "memory", "fail"), (dict(eval_steps=50), "validation", "warn"), (dict(processes=3), "steps", "warn")])
def test_verdicts(settings, check, verdict):
    report = check_run(RECORDS, device="cpu", **settings)
    assert {r[0]: r[1] for r in report.rows}[check] == verdict
    assert report.ok == (verdict != "fail") and check in repr(report) and "<td>" in report._repr_html_()


@pytest.mark.parametrize("wrong", [dict(per_device_train_batch_size=0), dict(gradient_accumulation_steps=0), dict(processes=0), dict(sample=0), dict(max_steps="10"),
                                   dict(quantize="4-bit"), dict(pass_rate=5), dict(num_train_epochs=0), dict(eval_steps=-1), dict(num_generations=2.)])
def test_settings_that_no_training_can_have(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"check_run: {name}={value!r} cannot work; give "):
        check_run(RECORDS, device="cpu", **wrong)


def test_a_group_needs_memory_for_all_its_answers():
    needed = [memory(check_run(RECORDS, device="cpu", num_generations=g)) for g in (0, 2, 8)]
    assert needed[0] < needed[1] < needed[2]


def memory(report):
    return float(next(r[2] for r in report.rows if r[0] == "memory").split(" = ")[1].split()[0])


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_weights_are_estimated(bits):
    model, _ = load_vlm("tiny", device="cpu", quantize=bits)
    kept = sum(p.nbytes for p in model.parameters()) + sum(t.nbytes for m in model.modules() if (q := getattr(getattr(m, "weight", None), "quant_state", None))
                                                           for t in (q.absmax, q.code))
    ghost, _ = ghost_model("tiny", lora_r=8, dtype=model.get_input_embeddings().weight.dtype)
    guess = memory_bytes(ghost, batch_size=1, tokens=50, answer_tokens=5, quantize=bits)
    assert .85 < (guess["weights"]-guess["gradients"])/kept < 1.2 and guess["weights"] < memory_bytes(ghost, batch_size=1, tokens=50, answer_tokens=5)["weights"]


def test_too_long_records_and_records_without_answer(monkeypatch):
    long = [{**r, "messages": [dict(role="user", content="<image>" + "vase "*4000), r["messages"][1]]} for r in RECORDS]
    report = check_run(long, device="cpu")
    assert {r[0]: r[1] for r in report.rows}["context length"] == "fail" and "24 records are longer" in repr(report)
    report = check_run([{**r, "messages": r["messages"][:1]} for r in RECORDS], device="cpu")
    assert [r[:2] for r in report.rows] == [("records", "fail")] and not report.ok


def first(report): return report.rows[0]


def test_questions_are_enough_for_groups():
    asked = [{**r, "messages": r["messages"][:1]} for r in RECORDS]
    report = check_run(asked, device="cpu", num_generations=8, max_completion_length=100)
    assert report.ok and first(report)[:2] == ("records", "pass") and "of up to 100 tokens" in repr(report)
    assert {r[0]: r[2] for r in report.rows} .keys() == {r[0]: r[2] for r in check_run(RECORDS, device="cpu", num_generations=8).rows}.keys()
    assert memory(report) > memory(check_run(asked, device="cpu", num_generations=8, max_completion_length=10))
    assert not check_run(asked, device="cpu", num_generations=8, max_completion_length=2100).ok, "question and answer share the window"
    refused = check_run([*RECORDS, asked[0]], device="cpu")
    assert not refused.ok and "1 of 25 have no answer, the first is record 25" in first(refused)[2]


def test_pairs():
    said = lambda text: dict(role="assistant", content=text)
    pairs = [{**r, "messages": r["messages"][:1], "chosen": r["messages"][1]["content"], "rejected": "No idea."} for r in RECORDS]
    for change in (dict(), dict(chosen=[said("Rhodes")], rejected=said("Samos"))):
        report = check_run([{**p, **change} for p in pairs], device="cpu")
        assert report.ok and first(report)[:2] == ("records", "pass") and "24 rows are 3 steps" in repr(report) and "24 of 24 records" in repr(report)
    assert memory(check_run(pairs, device="cpu")) > memory(check_run(RECORDS, device="cpu")), "two answers to each question"
    for change in (dict(rejected=None), dict(rejected="  "), dict(chosen=[])):
        report = check_run([*pairs, {**pairs[0], **change}], device="cpu")
        assert not report.ok and "the first is record 25" in first(report)[2]


@pytest.mark.parametrize("reason,change", [
    ("id used twice", dict(id="same")), ("bad object", dict(objects=[dict(label="vase", bbox=[1, 2])])),
    ("box outside the picture", dict(objects=[dict(label="vase", bbox=[0, 0, 9000, 9000])]))])
def test_what_no_training_reads_is_a_warning(reason, change):
    report = check_run([*RECORDS, {**RECORDS[0], "id": "a", **change}, {**RECORDS[1], "id": "b", **change}], device="cpu")
    assert report.ok and first(report)[:2] == ("records", "warn") and reason in first(report)[2]
    from vlmcourse.formats import read_records
    assert len(read_records([{**RECORDS[0], **change}])) == 1, "a training takes it"


def test_no_signal_equals_counting():
    for p in (0., .1, .5, 1.):
        for g in (2, 3, 8): assert no_signal(p, g) == pytest.approx(p**g + (1-p)**g)
    with torch.random.fork_rng():
        torch.manual_seed(0); right = (torch.rand(100_000, 4) < .3).sum(1)
    assert no_signal(.3, 4) == pytest.approx(((right == 0) | (right == 4)).float().mean().item(), abs=.01)


def test_a_question_that_stands_only_in_the_answers(tmp_path):
    "The form of TRL: chosen and rejected are whole conversations; files count from the data file's folder."
    ask, say = (lambda role: lambda text: dict(role=role, content=text))("user"), lambda text: dict(role="assistant", content=text)
    RECORDS[0]["images"][0].save(tmp_path/"a.png")
    row = dict(images=["a.png"], chosen=[ask("<image>Which vase?"), say("red")], rejected=[ask("<image>Which vase?"), say("blue")])
    (tmp_path/"pairs.jsonl").write_text("".join(json.dumps({**row, "id": str(i)})+"\n" for i in range(9)))
    report = check_run(tmp_path/"pairs.jsonl", device="cpu")
    assert report.ok and report.rows[0] == ("records", "pass", "9 without a fault; check_pairs (lesson 15) compares the answers of pairs")
    report = check_run([{**row, "images": RECORDS[0]["images"], "rejected": []}], device="cpu")
    assert report.rows[0][1] == "fail" and "1 of 1 have no answer" in report.rows[0][2]


@pytest.mark.parametrize("groups, verdict", [(0, "warn"), (4, "fail")])
def test_rewards_stop_at_an_object_without_a_box(groups, verdict):
    report = check_run([{**RECORDS[0], "objects": [dict(label="vase", bbox=[1, 2, 3])]}], num_generations=groups, device="cpu")
    assert report.rows[0][1] == verdict and "bad object" in report.rows[0][2]

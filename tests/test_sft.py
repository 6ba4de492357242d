"""`train`: every mistake before the start, what a run leaves behind, and that it can be repeated."""
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vlmcourse import sft
from vlmcourse.formats import read_records
from vlmcourse.loop import epoch_order
from vlmcourse.lora import add_lora
from vlmcourse.museum import ask_scene, make_record, make_records, make_scene, save_records
from vlmcourse.prefix import FeatureCache
from vlmcourse.sft import EncodedRecords, data_hash, join, join_shared, make_batch, sft_loss, train
from vlmcourse.vlm import encode, load_vlm, set_gradient_checkpointing

RECORDS = make_records(12, tasks=["workshop"], split="train", seed=0)
HELD_OUT = make_records(6, tasks=["workshop"], split="test", seed=1)
QUICK = dict(max_steps=3, per_device_train_batch_size=4, plot=False, device="cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def snapshot(folder):
    "Every file below a folder with its bytes, and every folder."
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def text_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def corrupt(folder):
    path = save_records(RECORDS[:3], folder)
    picture = next((folder / "images").iterdir())
    picture.write_bytes(picture.read_bytes()[:200])
    return path


def without_answer(folder):
    path = save_records(RECORDS[:3], folder)
    rows = json.loads(path.read_text())
    rows[1]["messages"] = rows[1]["messages"][:1]
    path.write_text(json.dumps(rows))
    return path


def no_pictures(folder):
    path = save_records(RECORDS[:3], folder)
    for picture in (folder / "images").iterdir(): picture.unlink()
    return path


def written(folder, text):
    folder.mkdir()
    (folder / "data.json").write_text(text)
    return folder / "data.json"


def finished_run(folder):
    train(RECORDS[:4], output_dir=folder, **QUICK)
    return folder


def with_final(folder):
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "mine.txt").write_text("keep me")
    return folder


def with_checkpoint(folder):
    (folder / "checkpoint-5").mkdir(parents=True)
    return folder


#  name, how to call train (given a fresh folder), words that must be in the message
MISTAKES = [
    ("missing file", lambda d: dict(data="nothing.json"), ["nothing.json"]),
    ("folder instead of file", lambda d: dict(data=d), ["folder"]),
    ("empty list", lambda d: dict(data=[]), ["no records"]),
    ("empty data set", lambda d: dict(data=written(d / "e", "[]")), ["no records"]),
    ("not JSON", lambda d: dict(data=written(d / "e", "[{")), ["line 1"]),
    ("corrupt picture", lambda d: dict(data=corrupt(d / "c")), ["damaged", "1 of 3", "Copy|copy"]),
    ("missing pictures", lambda d: dict(data=no_pictures(d / "c")), ["not found", "3 of 3"]),
    ("record without an answer", lambda d: dict(data=without_answer(d / "c")), ["no answer", "record 2"]),
    ("held-out record without an answer", lambda d: dict(data=RECORDS, val_data=without_answer(d / "c")), ["no answer"]),
    ("text model", lambda d: dict(data=RECORDS, model=str(text_model(d / "m"))), ["vision-language", "gpt2"]),
    ("folder without a model", lambda d: dict(data=RECORDS, model=str(d)), ["config.json"]),
    ("finished run", lambda d: dict(data=RECORDS, output_dir=finished_run(d / "r")), ["already holds a run", "output_dir"]),
    ("someone's final/", lambda d: dict(data=RECORDS, output_dir=with_final(d / "r")), ["final/", "output_dir"]),
    ("a file as output_dir", lambda d: dict(data=RECORDS, output_dir=written(d / "e", "[]")), ["is a file"]),
    ("batch of 0", lambda d: dict(data=RECORDS, per_device_train_batch_size=0), ["per_device_train_batch_size=0"]),
    ("half a batch", lambda d: dict(data=RECORDS, per_device_train_batch_size=2.5), ["2.5"]),
    ("no accumulation", lambda d: dict(data=RECORDS, gradient_accumulation_steps=0), ["gradient_accumulation_steps"]),
    ("negative rate", lambda d: dict(data=RECORDS, learning_rate=-1), ["learning_rate=-1"]),
    ("endless rate", lambda d: dict(data=RECORDS, learning_rate=float("inf")), ["learning_rate=inf"]),
    ("no steps", lambda d: dict(data=RECORDS, max_steps=0), ["max_steps=0"]),
    ("no epochs", lambda d: dict(data=RECORDS, num_train_epochs=0), ["num_train_epochs=0"]),
    ("unknown schedule", lambda d: dict(data=RECORDS, lr_scheduler_type="cos"), ["cosine"]),
    ("only warm-up", lambda d: dict(data=RECORDS, warmup_ratio=1), ["warmup_ratio=1"]),
    ("validation without data", lambda d: dict(data=RECORDS, eval_steps=5), ["val_data"]),
    ("rank 0", lambda d: dict(data=RECORDS, lora_r=0), ["whole number"]),
    ("seed", lambda d: dict(data=RECORDS, seed=-1), ["seed=-1"]),
    ("device", lambda d: dict(data=RECORDS, device="tpu"), ["tpu", "cpu"]),
    ("plot", lambda d: dict(data=RECORDS, plot="yes"), ["plot='yes'"]),
    ("greater or smaller", lambda d: dict(data=RECORDS, greater_is_better="no"), ["greater_is_better='no'", "True or False"]),
    ("another trainer's checkpoint", lambda d: dict(data=RECORDS, output_dir=with_checkpoint(d / "r")), ["checkpoint-5", "output_dir"]),
]


@pytest.mark.parametrize("call,words", [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_mistakes_are_named_and_leave_no_trace(elsewhere, call, words):
    arguments = call(elsewhere)
    before = snapshot(elsewhere)
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError)) as error: train(**arguments)
    said = str(error.value)
    assert snapshot(elsewhere) == before, "train left something behind"
    assert "\n" not in said.strip() and 40 < len(said) < 1200, said
    for word in words: assert any(w in said for w in word.split("|")), f"{word!r} is not in: {said}"


def test_same_seed_same_run_to_the_last_digit(elsewhere):
    a, b, c = (train(RECORDS, HELD_OUT, output_dir=elsewhere / n, seed=s, **QUICK) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    losses = lambda run: [row["loss"] for row in run.log["train_history"]]
    assert losses(a) == losses(b) != losses(c)
    assert a.after.answers == b.after.answers and a.log["val_history"] == b.log["val_history"]
    assert (a.output_dir / "final/adapter_model.safetensors").read_bytes() == (b.output_dir / "final/adapter_model.safetensors").read_bytes()


def test_what_a_run_leaves_behind(elsewhere):
    path = save_records(RECORDS, elsewhere / "data")
    run = train(path, save_records(HELD_OUT, elsewhere / "held_out"), **QUICK)
    assert run.output_dir == Path("runs/sft-001") and "held-out accuracy" in repr(run)
    names = sorted(str(p.relative_to(run.output_dir)) for p in run.output_dir.rglob("*") if p.is_file())
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    pictures = [n for n in names if n.startswith("samples/")]
    assert [n for n in names if n not in pictures] == [*(f"best/{n}" for n in adapter), *(f"final/{n}" for n in adapter), "loss.png", "samples.jsonl",
                                                       "training_history.csv", "training_log.json", "validation_history.csv"]
    assert len(pictures) == len({r["images"][0].tobytes() for r in HELD_OUT}) and all(n.endswith(".jpg") for n in pictures)
    log = json.loads((run.output_dir / "training_log.json").read_text())
    assert log["status"] == "finished" and len(log["train_history"]) == 3
    assert {"step", "epoch", "samples", "loss", "lr"} <= set(log["train_history"][0])
    assert [row["step"] for row in log["val_history"]] == [0, 3]
    assert {"val_loss", "val_accuracy", "val_lenient", "val_format"} <= set(log["val_history"][0])
    config = log["config"]
    assert config["model"] == "tiny" and config["data"] == str(path) and config["learning_rate"] == 2e-3
    assert config["versions"]["torch"] == torch.__version__.split("+")[0] and len(config["data_hash"]) == 16
    assert json.loads((run.output_dir / "final/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    again, processor = load_vlm(run.output_dir, device="cpu")
    batch = encode(processor, HELD_OUT)
    with torch.no_grad(): assert torch.allclose(again(**batch).logits, run.model(**batch).logits, atol=1e-5)
    second = train(RECORDS, **QUICK)
    assert second.output_dir == Path("runs/sft-002") and second.after is None and second.log["val_history"] == []


def test_only_the_adapter_changes(elsewhere):
    run = train(RECORDS, output_dir=elsewhere / "r", **QUICK)
    base = dict(load_vlm("tiny", device="cpu")[0].named_parameters())
    for name, p in run.model.get_base_model().named_parameters():
        if "lora_" not in name: assert torch.equal(p, base[name.replace(".base_layer", "")]), name
    assert any(p.abs().sum() > 0 for n, p in run.model.named_parameters() if "lora_B" in n)


def test_validation_in_between_and_start_from_a_run(elsewhere):
    first = train(RECORDS, HELD_OUT, output_dir=elsewhere / "a", eval_steps=2, **QUICK)
    assert [row["step"] for row in first.log["val_history"]] == [0, 2, 3]
    second = train(RECORDS, HELD_OUT, model=str(elsewhere / "a"), output_dir=elsewhere / "b", **QUICK)
    assert second.before.answers == first.after.answers
    assert second.log["val_history"][0]["val_loss"] == pytest.approx(first.log["val_history"][-1]["val_loss"], abs=1e-5)
    assert json.loads((elsewhere / "b/final/adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"


def test_accumulation_gives_every_token_the_same_weight(elsewhere):
    data = make_records(8, tasks=["workshop", "colour"], split="train", seed=3)  # long and short answers
    runs = [train(data, output_dir=elsewhere / str(b), max_steps=2, per_device_train_batch_size=b,
                  gradient_accumulation_steps=8 // b, plot=False, device="cpu") for b in (8, 2)]
    for one, two in zip(*(run.log["train_history"] for run in runs)): assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


def test_stopping_keeps_what_was_learned(elsewhere, monkeypatch):
    calls = []

    def impatient(model, batch):
        calls.append(1)
        if len(calls) > 2: raise KeyboardInterrupt
        return sft_loss(model, batch)

    monkeypatch.setattr(sft, "sft_loss", impatient)
    run = train(RECORDS, output_dir=elsewhere / "r", max_steps=9, per_device_train_batch_size=4, plot=False, device="cpu")
    assert run.log["status"] == "stopped" and len(run.log["train_history"]) == 2
    assert load_vlm(run.output_dir, device="cpu") and run.after is None and "2 steps" in repr(run)


def test_a_loss_that_is_not_a_number_ruins_nothing(elsewhere, monkeypatch):
    monkeypatch.setattr(sft, "sft_loss", lambda model, batch: (sft_loss(model, batch)[0] * float("nan"), 1))
    with pytest.raises(ValueError, match="learning rate"): train(RECORDS, output_dir=elsewhere / "r", **QUICK)
    assert json.loads((elsewhere / "r/training_log.json").read_text())["status"] == "failed"
    assert not (elsewhere / "r/final").exists()


def test_joined_items_equal_the_batch():
    processor = load_vlm("tiny", device="cpu")[1]
    records = make_records(6, tasks=["total", "workshop", "caption"], split="train", seed=0)  # one and several pictures
    turns = [dict(role="user", content="Say three."), dict(role="assistant", content="three")]
    records.append(dict(id="text", images=[], messages=turns))
    items = EncodedRecords(processor, records, keep_gb=5e-4)  # room for some only
    joined, batch = join([items[i] for i in range(7)], processor.tokenizer.pad_token_id), encode(processor, records)
    assert 0 < len(items.kept) < 7 and set(joined) == set(batch)
    for name in batch: assert torch.equal(joined[name], batch[name]), name


def test_loss_equals_transformers_on_unequal_answers():
    model, processor = load_vlm("tiny", device="cpu")
    batch = encode(processor, make_records(5, tasks=["total", "workshop", "caption", "colour", "detect"], split="train", seed=0))
    with torch.no_grad():
        (total, count), result = sft_loss(model, batch), model(**batch)
    assert count == int((batch["labels"] != -100).sum())
    assert float(total / count) == pytest.approx(float(result.loss), abs=1e-5)


def test_from_the_command_line_with_held_out_records(elsewhere):
    "Options as they are typed, in a process of its own."
    data, held_out = (save_records(rows, elsewhere / name) for rows, name in ((RECORDS, "data"), (HELD_OUT, "held out")))
    words = ["sft", data, "--val-data", held_out, "--output-dir", elsewhere / "r", "--max-steps", 2, "--eval-steps", 1, "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", "vlmcourse.cli", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = json.loads((elsewhere / "r/training_log.json").read_text())
    assert [row["step"] for row in log["val_history"]] == [0, 1, 2] and log["config"]["val_data"] == str(held_out)
    assert "held-out accuracy" in done.stdout


def test_fingerprint_covers_all_that_trains_and_nothing_else(elsewhere):
    record = dict(id="a", images=[RECORDS[0]["images"][0]], messages=RECORDS[0]["messages"], answer="Rhodes", answer_type="CLOSED",
                  objects=[dict(bbox=[1, 2, 3, 4], label="kylix")], chosen="yes", rejected="no", meta=dict(task="workshop"))
    known, wide = data_hash([record]), Image.new("RGB", (4, 2))
    turns = [*record["messages"][:1], dict(role="assistant", content="No idea.")]
    for change in (dict(answer="Samos"), dict(answer_type="OPEN"), dict(objects=[dict(bbox=[1, 2, 3, 5], label="kylix")]), dict(messages=turns),
                   dict(images=[RECORDS[1]["images"][0]]), dict(rejected_images=[wide]), dict(chosen="no"), dict(weight=2), dict(meta=dict(task="card"))):
        assert data_hash([{**record, **change}]) != known, change
    assert data_hash([{**record, "id": "b", "meta": dict(task="workshop", file="elsewhere.json")}]) == known
    assert data_hash([{**record, "images": [wide]}]) != data_hash([{**record, "images": [wide.transpose(Image.Transpose.ROTATE_90)]}])
    one, two = (read_records(save_records(RECORDS[:2], elsewhere / name)) for name in "ab")  # the same files in another folder
    assert data_hash(one) == data_hash(two) != data_hash(two[::-1])


def questions(tasks, seeds):
    "Records with several questions about each of some photos."
    scenes, rng = {seed: [make_scene(seed, kind="portrait", defect="sharp")] for seed in seeds}, np.random.default_rng(0)
    return [make_record(scenes[seed], task, *ask_scene(scenes[seed], task, rng), id=f"{seed}-{task}") for task in tasks for seed in seeds]


@pytest.mark.parametrize("kind", ["packed", "checkpointing", "long"])
@pytest.mark.parametrize("name", ["tiny", "tiny-internvl"])
def test_a_shared_picture_gives_the_same_loss_and_gradients(name, kind, monkeypatch):
    "In double precision, with the norms of transformers kept from rounding to single; photos in any order, one of them alone, two in one record."
    import transformers.models.qwen3.modeling_qwen3 as a
    import transformers.models.qwen3_vl.modeling_qwen3_vl as b
    norm = lambda self, x: torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
    for norms in (a.Qwen3RMSNorm, b.Qwen3VLTextRMSNorm): monkeypatch.setattr(norms, "forward", norm)
    model, processor = load_vlm(name, device="cpu")
    torch.manual_seed(0)
    model = add_lora(model).double().train()
    for key, weight in model.named_parameters():
        if "lora_B" in key: torch.nn.init.normal_(weight, std=.05)
    set_gradient_checkpointing(model, kind == "checkpointing")
    forms, logps = [], sft.completion_logps
    monkeypatch.setattr(sft, "completion_logps", lambda *a, **k: (forms.append(k["form"]), logps(*a, **k | (dict(form="auto") if kind == "long" else {})))[1])
    data = questions(["colour", "pattern", "caption"], [1, 2]) + questions(["view"], [3])
    both = make_records(1, tasks=["same"], seed=0)[0]
    data += [both, {**both, "messages": [both["messages"][0], dict(role="assistant", content="no")]}]
    before = {**data[0], "messages": [dict(role="user", content="Look at this: <image> What is it?"), dict(role="assistant", content="A vase.")]}
    items = EncodedRecords(processor, [*data, before], features=FeatureCache(model))
    items = [items[i] for i in range(10)]
    pad = processor.tokenizer.pad_token_id
    batch, trained = make_batch(model, items, pad), [p for p in model.parameters() if p.requires_grad]
    assert len(batch["prompts"]) == 5 and batch["owner"].tolist() == [0, 1, 0, 1, 0, 1, 2, 3, 3, 4], "the text before a picture counts"
    found = []
    for each in (batch, join(items, pad)):
        total, count = sft_loss(model, each)
        found.append((total.detach(), count, torch.autograd.grad(total, trained)))
    (loss, n, grads), (full_loss, full_n, full_grads) = found
    assert forms == ["packed"]
    assert n == full_n and abs(loss - full_loss) < 1e-12 * full_loss
    size = max(g.abs().max() for g in full_grads)
    assert max((g - f).abs().max() for g, f in zip(grads, full_grads)) < 1e-12 * size


def test_long_rows_are_not_packed(monkeypatch):
    "The mask of a packed row grows with the square of its length."
    forms = []
    monkeypatch.setattr(sft, "completion_logps", lambda *a, **k: (forms.append(k["form"]), (torch.zeros(1), None))[1])
    for tokens in (400, 900):
        table = torch.zeros(5, tokens)
        sft_loss(None, dict(prompts=SimpleNamespace(ids=table[:1, :50]), ids=table, mask=table, owner=table[:, 0], score=table))
    assert forms == ["packed", "auto"]


def test_rows_are_shared_only_where_that_is_exact():
    model, processor = load_vlm("tiny", device="cpu")
    model, pad = add_lora(model).train(), processor.tokenizer.pad_token_id
    data = questions(["colour", "view"], [1, 2])
    keep = lambda records, model=model: [*map(EncodedRecords(processor, records, features=FeatureCache(model)).__getitem__, range(len(records)))]
    assert "owner" in make_batch(model, keep(data), pad)
    pixels = [*map(EncodedRecords(processor, data).__getitem__, range(4))]
    text = dict(id="text", images=[], messages=[dict(role="user", content="Say three."), dict(role="assistant", content="three")])
    for items in (keep(data[:2]), keep([*data, text]), pixels): assert "owner" not in make_batch(model, items, pad)
    dropout = add_lora(load_vlm("tiny", device="cpu")[0], lora_dropout=.1).train()
    assert join_shared(dropout, keep(data)) is None and join_shared(dropout.eval(), keep(data)) is not None


def test_grouped_by_picture_every_record_once_and_together(elsewhere, monkeypatch):
    data, seen = questions(["colour", "pattern", "view", "caption"], [1, 2, 3, 4]), []
    monkeypatch.setattr(sft, "make_batch", lambda model, items, pad: (seen.append([i["input_ids"].shape for i in items]), make_batch(model, items, pad))[1])
    options = dict(num_train_epochs=2, per_device_train_batch_size=8, plot=False, device="cpu")
    grouped, shuffled = (train(data, output_dir=elsewhere / str(g), group_by_picture=g, **options) for g in (True, False))
    assert [r["samples"] for r in grouped.log["train_history"]] == [8, 16, 24, 32] == [r["samples"] for r in shuffled.log["train_history"]]
    assert grouped.log["config"]["group_by_picture"] is True and grouped.loss < grouped.log["train_history"][0]["loss"]
    orders = [epoch_order(16, e, groups=[i % 4 for i in range(16)]) for e in range(3)]
    for order in orders:
        assert sorted(order) == [*range(16)] and all(len({i % 4 for i in order[k:k + 4]}) == 1 for k in range(0, 16, 4))
    assert orders[0] != orders[1] != orders[2]


def test_import_brings_no_heavy_library():
    code = "import torch, sys; from vlmcourse.sft import train; print([m for m in " \
           "('transformers', 'peft', 'trl', 'datasets', 'matplotlib', 'IPython', 'pandas', 'ipywidgets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_notes_of_any_kind_do_not_stop_the_fingerprint():
    record = {"id": "0", "images": [], "messages": [{"role": "user", "content": "a"}]}
    bare = data_hash([record])
    assert data_hash([record | {"meta": ["a note", "another"]}]) == data_hash([record | {"meta": "a note"}]) == bare
    assert data_hash([record | {"meta": {"task": "count"}}]) != bare

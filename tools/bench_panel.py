"""What the panel costs: the same training with and without it, in a real Jupyter kernel, taking turns.

    python tools/bench_panel.py [--steps 40] [--rounds 5] [--threads 1]

Each round trains the tiny model twice by the course's loop, in a thread as the panel does: once alone, once under a `Panel` that
draws. Printed are the ratios with / without of wall time and of processor time (other programs disturb the second less), as
min / median / max over the rounds, and the time that the panel itself spent drawing.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent

SETUP = """
import json, tempfile, time
from pathlib import Path
import torch
torch.set_num_threads(THREADS)
from vlmcourse.core import sample_path
from vlmcourse.formats import read_records
from vlmcourse.lora import add_lora
from vlmcourse.loop import fit
from vlmcourse.panel import Panel, Training
from vlmcourse.runlog import RunLog
from vlmcourse.sft import EncodedRecords, join, sft_loss
from vlmcourse.vlm import load_vlm, to_device

model, processor = load_vlm("tiny", device="cpu")
model = add_lora(model)
items = EncodedRecords(processor, read_records(sample_path("workshop", "records.json")))
pad, took = processor.tokenizer.pad_token_id, []

def train(data, *, max_steps: int = STEPS, output_dir=None):
    def loss_fn(model, batch):
        log.save()                          # so that there is something new to draw at each step; with and without the panel
        return sft_loss(model, batch)
    with RunLog(output_dir, progress=False) as log:
        wall, cpu = time.perf_counter(), time.process_time()
        fit(model, loss_fn, items, collate=lambda batch: join(batch, pad), log=log, max_steps=max_steps, learning_rate=1e-4)
        took.append((time.perf_counter() - wall, time.process_time() - cpu))

def new(): return tempfile.mkdtemp(dir=lab)
lab = tempfile.mkdtemp(prefix="bench_panel_")
Training(train, items, max_steps=2, output_dir=new()).start().wait()      # warm up
"""
ROUND = """
alone = lambda: Training(train, items, output_dir=new()).start().wait()
def drawn():
    global p
    p = Panel(train, (items,), dict(output_dir=new())).train().wait()
for job in (alone, drawn) if ROUND % 2 else (drawn, alone): job()
pair = took[-2:] if ROUND % 2 else took[-2:][::-1]
print(json.dumps(dict(alone=pair[0], panel=pair[1], seconds=p.board.seconds, frames=p.board.frames)))
"""


def run(client, code):
    "Run code in the kernel; return what it printed, or stop with its error."
    text = []
    def hook(message):
        if message["msg_type"] == "stream" and message["content"]["name"] == "stdout":
            text.append(message["content"]["text"])
        if message["msg_type"] == "error":
            sys.exit("\n".join(message["content"]["traceback"]))
    client.execute_interactive(code, output_hook=hook, timeout=1800)
    return "".join(text)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=1)
    a = p.parse_args()
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(root))
    try:
        run(client, SETUP.replace("STEPS", str(a.steps)).replace("THREADS", str(a.threads)))
        rows = []
        for k in range(a.rounds):
            rows.append(json.loads(run(client, ROUND.replace("ROUND", str(k))).strip().splitlines()[-1]))
            print(f"round {k + 1}: {rows[-1]}", flush=True)
        run(client, "import shutil; shutil.rmtree(lab)")
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    for i, name in enumerate(("wall time", "processor time")):
        ratios = [row["panel"][i] / row["alone"][i] for row in rows]
        print(f"{name:15} with / without the panel: min {min(ratios):.3f}, median {statistics.median(ratios):.3f}, max {max(ratios):.3f}")
    share = [row["seconds"] / row["panel"][0] for row in rows]
    rate = [row["frames"] / row["panel"][0] for row in rows]
    print(f"time spent drawing: {100 * statistics.median(share):.2f} % of the training at {statistics.median(rate):.1f} frames a second")


if __name__ == "__main__":
    main()

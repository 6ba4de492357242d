"Odd cases of vlmcourse.loop: equality with a loop by hand and with transformers, real signals, broken steps."
import math, os, random, signal, threading, time
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from vlmcourse.loop import (SCHEDULES, count_steps, epoch_order, fit, lr_factor, make_optimizer, step_rows, to_device)
from vlmcourse.runlog import RunLog, read_log

rng = random.Random(0)
DATA = [dict(x=[rng.gauss(0, 1) for _ in range(4)], y=rng.randrange(3), n=rng.randint(1, 9)) for _ in range(50)]


def make_net(dropout=0.):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def collate(rows):
    return dict(x=torch.tensor([r["x"] for r in rows]), y=torch.tensor([r["y"] for r in rows]), n=torch.tensor([r["n"] for r in rows]))


def loss_fn(net, b):
    "Each row counts n times, like an answer of n tokens."
    return (cross_entropy(net(b["x"]), b["y"], reduction="none")*b["n"]).sum(), b["n"].sum()


def train(folder, net=None, data=DATA, loss_fn=loss_fn, **kwargs):
    log = RunLog(folder, progress=False)
    fit(net or make_net(), loss_fn, data, collate=collate, log=log, **(dict(learning_rate=.01) | kwargs))
    log.finish()
    return log


def losses(log): return [r["loss"] for r in log.train_history]


# --- the numbers -------------------------------------------------------------
def test_equals_a_loop_by_hand_with_the_schedule_of_transformers(tmp_path):
    from transformers import get_cosine_schedule_with_warmup
    net = make_net(); opt = torch.optim.AdamW(net.parameters(), lr=.01, weight_decay=0.)
    sched = get_cosine_schedule_with_warmup(opt, math.ceil(.1*14), 14); want, rates = [], []
    for epoch in range(2):
        order = epoch_order(50, epoch, seed=3)
        for k in range(0, 50, 8):
            rates.append(opt.param_groups[0]["lr"]); opt.zero_grad()
            total, n = loss_fn(net, collate([DATA[i] for i in order[k:k+8]]))
            (total/n).backward(); want.append((total/n).item())
            nn.utils.clip_grad_norm_(net.parameters(), 1.); opt.step(); sched.step()
    log = train(tmp_path/"r", num_train_epochs=2, warmup_ratio=.1, seed=3)
    assert losses(log) == pytest.approx(want, abs=1e-6)
    assert [r["lr"] for r in log.train_history] == pytest.approx(rates, abs=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("total,warmup", [(1, 0), (1, 1), (2, 1), (7, 7), (100, 5), (33, 0)])
def test_schedules_equal_transformers(kind, total, warmup):
    from transformers import get_scheduler
    opt = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    sched = get_scheduler(kind, opt, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        assert lr_factor(step, total, warmup, kind) == pytest.approx(opt.param_groups[0]["lr"], abs=1e-12)
        opt.step(); sched.step()


@pytest.mark.parametrize("cut", [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2)])
def test_accumulation_equals_the_big_batch(tmp_path, cut):
    big = train(tmp_path/"big", per_device_train_batch_size=12, num_train_epochs=2)
    small = train(tmp_path/"small", per_device_train_batch_size=cut[0], gradient_accumulation_steps=cut[1], num_train_epochs=2)
    assert losses(small) == pytest.approx(losses(big), abs=1e-5)
    assert [r["grad_norm"] for r in small.train_history] == pytest.approx([r["grad_norm"] for r in big.train_history], abs=1e-5)
    assert [(r["step"], r["samples"]) for r in small.train_history] == [(r["step"], r["samples"]) for r in big.train_history]


def test_same_seed_same_bits(tmp_path):
    nets = [make_net(dropout=.3) for _ in range(4)]
    a = train(tmp_path/"a", nets[0], num_train_epochs=3, seed=7)
    torch.rand(5); b = train(tmp_path/"b", nets[1], num_train_epochs=3, seed=7)              # chance before does not matter
    c = train(tmp_path/"c", nets[2], num_train_epochs=3, seed=7, eval_steps=2,               # nor does chance in validation
              evaluate=lambda net: dict(val_x=torch.rand(3).mean().item(), val_mode=float(net.training)))
    d = train(tmp_path/"d", nets[3], num_train_epochs=3, seed=8)
    assert losses(a) == losses(b) == losses(c) != losses(d)
    assert all(torch.equal(p, q) for n in nets[1:3] for p, q in zip(nets[0].parameters(), n.parameters()))
    assert {r["val_mode"] for r in c.val_history} == {0.}


def by_chance(net, b):
    "A loss that asks each generator of random numbers."
    total, n = loss_fn(net, b)
    return total*(1+.1*(random.random()+np.random.rand()+torch.rand(1).item())), n


def test_a_validation_that_uses_any_chance_changes_nothing(tmp_path):
    a = train(tmp_path/"a", loss_fn=by_chance)
    for k, draw in enumerate((random.random, np.random.rand, lambda: torch.rand(1).item())):
        b = train(tmp_path/f"b{k}", loss_fn=by_chance, eval_steps=2, evaluate=lambda net: dict(val_x=draw()))
        assert losses(a) == losses(b)


# --- counting ----------------------------------------------------------------
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 50])
@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_every_row_once_an_epoch(n, size):
    steps = step_rows(n, size, seed=1); per = math.ceil(n/size)
    for _ in range(3): assert sorted(sum((next(steps) for _ in range(per)), [])) == list(range(n))
    assert count_steps(n, size, num_train_epochs=3) == 3*per


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_a_group_stay_together_in_an_order_that_changes(seed, tmp_path):
    chance = random.Random(seed)
    names = [chance.choice(["a", "b", "c", (1, 2), None]) for _ in range(40)]
    orders = [epoch_order(40, epoch, seed, groups=names) for epoch in range(3)]
    for order in orders:
        met = [names[i] for i in order]
        assert sorted(order) == list(range(40)) and sum(a != b for a, b in zip(met, met[1:])) == len(set(names))-1
    assert orders[0] != orders[1] != orders[2] and orders[0] == epoch_order(40, 0, seed, groups=names)
    assert epoch_order(40, 0, seed, groups=range(40)) == epoch_order(40, 0, seed), "a group for each row is no grouping"


def test_fit_takes_the_rows_in_groups(tmp_path):
    seen = []
    def noting(rows):
        seen.append([r["y"] for r in rows])
        return collate(rows)
    fit(make_net(), loss_fn, DATA, collate=noting, log=RunLog(tmp_path/"r", progress=False), per_device_train_batch_size=5, groups=[r["y"] for r in DATA])
    assert len(seen) == 10 and sum(len(set(step)) > 1 for step in seen) <= 2, "kinds meet only where one ends and the next begins"


@pytest.mark.parametrize("kwargs,steps,epoch", [
    (dict(), 7, 1.), (dict(num_train_epochs=.5), 4, .64), (dict(num_train_epochs=1.5), 11, 1.64), (dict(max_steps=3), 3, .48),
    (dict(max_steps=10, num_train_epochs=99), 10, 1.48), (dict(per_device_train_batch_size=100), 1, 1.),
    (dict(per_device_train_batch_size=5, gradient_accumulation_steps=100), 1, 1.)])
def test_steps_and_epochs(tmp_path, kwargs, steps, epoch):
    log = train(tmp_path/"r", **kwargs)
    assert (len(log.train_history), log.train_history[-1]["epoch"]) == (steps, epoch)


def test_logging_and_validation_steps(tmp_path):
    every = losses(train(tmp_path/"a", max_steps=11))
    log = train(tmp_path/"b", max_steps=11, logging_steps=4, eval_steps=5, evaluate=lambda net: dict(val_x=1))
    assert [r["step"] for r in log.train_history] == [4, 8, 11]
    assert losses(log) == pytest.approx([sum(every[:4])/4, sum(every[4:8])/4, sum(every[8:])/3], abs=1e-9)
    assert [r["step"] for r in log.val_history] == [0, 5, 10, 11]
    log = train(tmp_path/"c", max_steps=10, eval_steps=5, evaluate=lambda net: dict(val_x=1))
    assert [r["step"] for r in log.val_history] == [0, 5, 10]


# --- what trains -------------------------------------------------------------
def test_only_what_is_free_trains_and_only_matrices_decay(tmp_path):
    net = make_net(); net[0].requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    train(tmp_path/"r", net)
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"3.weight", "3.bias"} and all(p.grad is None for p in net.parameters()) and net.training
    groups = make_optimizer(make_net(), weight_decay=.1).param_groups
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(.1, {2}), (0., {1})]


def test_no_clipping_when_zero(tmp_path):
    a, b = (train(tmp_path/str(m), max_grad_norm=m, learning_rate=.1) for m in (0, 1e9))
    assert losses(a) == losses(b) != losses(train(tmp_path/"c", max_grad_norm=1e-3, learning_rate=.1))


def test_to_device_goes_into_lists_and_dicts():
    b = to_device(dict(a=[torch.ones(1)], b="text", c=(torch.ones(1), 3)), "meta")
    assert b["a"][0].device.type == b["c"][0].device.type == "meta" and b["b"] == "text" and b["c"][1] == 3


# --- what goes wrong ---------------------------------------------------------
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_broken_step_changes_nothing(tmp_path, value, accumulate):
    good, net, calls = make_net(), make_net(), []
    def breaks(net, b):
        calls.append(1); total, n = loss_fn(net, b)
        return (total*value if len(calls) == 3*accumulate else total), n
    kwargs = dict(learning_rate=.01, lr_scheduler_type="constant", gradient_accumulation_steps=accumulate, per_device_train_batch_size=4)
    train(tmp_path/"good", good, max_steps=2, **kwargs)
    with pytest.raises(ValueError, match=r"(?s)loss became.*step 3 \(rows .*learning rate 0.01\)"): train(tmp_path/"bad", net, loss_fn=breaks, **kwargs)
    assert all(torch.equal(p, q) for p, q in zip(good.parameters(), net.parameters()))
    got = read_log(tmp_path/"bad")
    assert got["status"] == "failed" and "loss became" in got["error"] and len(got["train_history"]) == 2


@pytest.mark.parametrize("f,says", [
    (lambda net, b: net(b["x"]).sum(), "two things"), (lambda net, b: (net(b["x"]), 1), "two things"), (lambda net, b: None, "two things"),
    (lambda net, b: (1., 1), "two things"), (lambda net, b: (b["x"].sum(), 1), "does not depend"),
    (lambda net, b: (net(b["x"]).sum(), 0), "0 items"), (lambda net, b: (net(b["x"]).sum(), torch.tensor(0)), "0 items")])
def test_loss_functions_that_cannot_work(tmp_path, f, says):
    with pytest.raises(ValueError, match=says): train(tmp_path/"r", loss_fn=f)
    assert read_log(tmp_path/"r")["status"] == "failed"


@pytest.mark.parametrize("kwargs,says", [
    (dict(data=[]), "data is empty"), (dict(lr_scheduler_type="x"), "cosine"), (dict(per_device_train_batch_size=0), "batch_size=0"),
    (dict(per_device_train_batch_size=2.5), "whole"), (dict(gradient_accumulation_steps=-1), "accumulation"), (dict(logging_steps=0), "logging"),
    (dict(learning_rate=-1), "learning_rate=-1"), (dict(learning_rate="1e-3"), "learning_rate='1e-3'"), (dict(learning_rate=math.nan), "nan"),
    (dict(warmup_ratio=2), "at most 1"), (dict(num_train_epochs=0), "no training"), (dict(eval_steps=3), "evaluate is missing")])
def test_settings_that_cannot_work(tmp_path, kwargs, says):
    with pytest.raises(ValueError, match=says): train(tmp_path/"r", **kwargs)


def test_an_error_in_validation_ends_the_run_in_order(tmp_path):
    net, calls = make_net().train(), []
    def evaluate(net):
        calls.append(1)
        if len(calls) == 2: raise RuntimeError("no judge")
        return dict(val_x=1)
    with pytest.raises(RuntimeError): train(tmp_path/"r", net, evaluate=evaluate, eval_steps=3)
    got = read_log(tmp_path/"r")
    assert got["status"] == "failed" and got["error"] == "RuntimeError: no judge" and len(got["train_history"]) == 3 and net.training


def test_the_mode_of_the_model_is_put_back(tmp_path):
    net = make_net().eval(); train(tmp_path/"r", net); assert not net.training


# --- stop --------------------------------------------------------------------
def presses(after, times):
    "A loss function that sends itself Ctrl-C, `times` times, in the middle of step `after`."
    calls = []
    def f(net, b):
        calls.append(1)
        if len(calls) == after:
            for _ in range(times): os.kill(os.getpid(), signal.SIGINT); time.sleep(.01)
        return loss_fn(net, b)
    return f


@pytest.mark.parametrize("times,steps", [(1, 5), (2, 4)])
def test_ctrl_c_ends_the_step_and_then_the_run_and_twice_stops_at_once(tmp_path, times, steps):
    a, b = make_net(), make_net()
    log = train(tmp_path/"r", a, loss_fn=presses(5, times), lr_scheduler_type="constant", evaluate=lambda net: dict(val_x=1))
    train(tmp_path/"same", b, lr_scheduler_type="constant", max_steps=steps)               # the weights of exactly these steps
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    got = read_log(tmp_path/"r")
    assert log.status == got["status"] == "stopped" and len(got["train_history"]) == steps and len(got["val_history"]) == 1


def test_ctrl_c_in_a_validation_stops_at_once(tmp_path):
    def evaluate(net): os.kill(os.getpid(), signal.SIGINT); time.sleep(5); return dict(val_x=1)
    log = train(tmp_path/"r", evaluate=evaluate)
    assert log.status == "stopped" and not log.train_history and not log.val_history


def test_in_a_thread_and_the_signal_handler_is_put_back(tmp_path):
    before, out = signal.getsignal(signal.SIGINT), []
    t = threading.Thread(target=lambda: out.append(train(tmp_path/"t"))); t.start(); t.join()
    train(tmp_path/"r")
    assert out[0].status == "finished" and signal.getsignal(signal.SIGINT) is before

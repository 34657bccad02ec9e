"""--checkpoint-acts: less memory for the backward pass, and no number that changes."""
import importlib
import json
import shutil
from copy import deepcopy

import pytest
import torch
from conftest import equal, weights

from common import networks
from common import teacher as teachers
from common.data import load
from common.flags import parse
from common.networks import backbone
from common.precond import EDM, TrigFlow

DATA = load("digits")
NETS = dict(ddpmpp=["--ch", "16", "--attn", "4"], dit=["--net", "dit", "--ch", "16", "--blocks", "2"])
on_each_network = pytest.mark.parametrize("net", NETS)


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call of a block that will be recomputed."""
    seen, real = [], networks.checkpoint

    def checkpoint(*args, **how):
        seen.append(args)
        return real(*args, **how)
    monkeypatch.setattr(networks, "checkpoint", checkpoint)
    return seen


def make(script, net, *more):
    """args and the network of a script's flags, with dropout and weights of which each one matters."""
    m = importlib.import_module(script)
    args = parse(m.Args, m.PRESETS, ["--device", "cpu", "--dropout", "0.2", *NETS[net], *more])
    torch.manual_seed(0)
    model = (EDM if script == "ect" else TrigFlow)(backbone(args, DATA), args.sd)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return args, model


def blocks(model):
    return [m for m in model.modules() if type(m).__name__.endswith("Block")]


def learn(script, args, net):
    """One step without an update: loss, gradients by name, the random state after the forward and after the backward
    pass, and the bytes that were saved for the latter, weights not counted."""
    m, own, saved = importlib.import_module(script), {p.data_ptr() for p in net.parameters()}, {}

    def pack(v):
        saved[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v
    torch.manual_seed(1)
    x0, _ = DATA.batch(0, 8, seed=0)
    rest = (None,) if script == "scm" else ()             # no teacher
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        loss, _ = m.loss_fn(net, *rest, x0, None, 10**6, args, lambda: torch.manual_seed(2))
    states = [torch.get_rng_state()]
    loss.backward()
    states.append(torch.get_rng_state())
    grads = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    return loss.detach(), grads, states, sum(n for place, n in saved.items() if place not in own)


@on_each_network
@pytest.mark.parametrize("script", ["ect", "scm"])
def test_the_same_numbers_with_less_memory(script, net, calls):
    """Other units dropped when a block is computed again, a random stream that moves on meanwhile, a derivative or a
    target without gradient that is kept for a backward pass which never comes; a flag that does nothing."""
    loss, grads, states, bytes_ = learn(script, *make(script, net))
    assert not calls
    args, model = make(script, net, "--checkpoint-acts")
    loss_c, grads_c, states_c, bytes_c = learn(script, args, model)
    assert equal(grads, grads_c) and torch.equal(loss, loss_c) and all(map(torch.equal, states, states_c))
    assert len(grads) == len(list(model.parameters())) and all(g.any() for g in grads.values())
    assert len(calls) == len(blocks(model)) and bytes_c < bytes_ / 3


@on_each_network
def test_a_copy_computes_with_its_own_weights(net, calls):
    """net, ema and target are copies of one network: blocks that still call the first one's would train that one, and
    sample from it."""
    _, plain = make("ect", net)
    _, first = make("ect", net, "--checkpoint-acts")
    copy = deepcopy(first)
    for p in first.parameters():
        p.data.zero_()
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2, 1, 1, 1)
    outputs = []
    for model in (plain.eval(), copy.eval()):
        out = model(x, t)
        out.square().sum().backward()
        outputs.append(out)
    assert calls and torch.equal(*outputs) and not any(p.grad is not None for p in first.parameters())
    assert equal(*({k: p.grad for k, p in m.named_parameters()} for m in (plain, copy)))
    assert list(copy.state_dict()) == list(plain.state_dict()) and copy.spec == plain.spec


def test_a_network_that_starts_from_a_teacher_recomputes_too(calls):
    _, teacher = make("ect", "ddpmpp")
    args, _ = make("ect", "ddpmpp", "--checkpoint-acts")
    model = backbone(args, DATA, teacher)
    model(torch.randn(2, 1, 8, 8), torch.ones(2))
    assert len(calls) == len(blocks(model)) and not any("forward" in vars(m) for m in teacher.modules())


@pytest.mark.parametrize("script, passes", [("ect", 2), ("rcm", 3), ("common.teacher", 2)])
def test_a_run_learns_the_same(script, passes, train, calls):
    """Blocks of one network only, of several; figures that recompute them; a second part of a batch that differs.
    passes: with gradient, in two steps; rcm: two of the student's consistency and score part, one of fake."""
    more = ["--iters", "2", "--accum", "2", "--dropout", "0.2", "--steps", "2"]
    more += ["--H", "0", "--student-every", "2", "--N-max", "2"] if script == "rcm" else []
    _, plain = train(script, *more)
    assert not calls
    more += ["--teacher", str(plain.parent / "teacher-digits-000")] if script == "rcm" else []
    _, run = train(script, *more, "--checkpoint-acts")
    for part in {"net", "ema", "fake"} & set(torch.load(run / "ckpt.pt")):
        assert equal(weights(plain, part), weights(run, part)), part
    assert len(calls) == 2 * passes * len(blocks(teachers.load(run)))
    assert json.loads((run / "config.json").read_text())["checkpoint_acts"]
    assert torch.load(plain / "ckpt.pt")["model"] == torch.load(run / "ckpt.pt")["model"]


def test_a_run_may_go_on_with_it(train, tmp_path):
    """A run that no longer fits the memory of the GPU; and one made before there were these flags."""
    _, run = train("ect", "--dropout", "0.2", "--keep")
    half = shutil.copytree(run, tmp_path / "half")
    (half / "ckpt.prev.pt").unlink()
    shutil.copy(run / "ckpt-0000002.pt", half / "ckpt.pt")
    config = json.loads((half / "config.json").read_text())
    assert (config.pop("checkpoint_acts"), config.pop("lora")) == (False, 0)
    (half / "config.json").write_text(json.dumps(config))
    train("ect", "--resume", str(half), "--checkpoint-acts")
    assert equal(weights(run), weights(half)) and equal(weights(run, "ema"), weights(half, "ema"))

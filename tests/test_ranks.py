"""torchrun starts two processes once; each runs work() and saves what it saw; the tests compare the two."""
import contextlib
import dataclasses
import faulthandler
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, Net, equal, lines, weights

import ect
import rcm
import scm
from common import evaluate, fid, folder
from common import teacher as teachers
from common.data import load
from common.flags import parse
from common.networks import backbone
from common.precond import EDM, TrigFlow
from common.run import Run


def flags(out, *argv):
    start = [*TINY, "--teacher", "none", "--lr", "1e-3", "--out", str(out)]
    return parse(ect.Args, ect.PRESETS, start + list(argv))


def blend(noise, y):
    """In the place of a sampler: an image of its own noise and label."""
    return (noise.sum(0) * 0.3 + (y.view(-1, 1, 1, 1) - 4) / 10).clamp(-1, 1)


def few(data):
    return dataclasses.replace(data, images=data.images[:120], labels=data.labels[:120])


# ---- in each of the two processes ----------------------------------------------------------------
def work(out):
    data, saw, agree = load("digits"), {}, folder.agree
    folder.agree = lambda call: time.sleep(rank / 10) or agree(call)      # rank 1 comes too late to choose the folder
    saw["refusal"] = caught(lambda: Run(flags(out, "--batch", "7"), ect.__file__))

    args = flags(out / "loop", "--max-skips", "1", "--batch", "8", "--accum", "2", "--cond", "--flip")
    run = Run(args, ect.__file__)
    run.seed(-1)
    net = run.place(EDM(backbone(args, data), args.sd))
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    run.start(dict(net=net, opt=opt), data)
    saw["batches"] = [run.batch(data, 5, part) for part in range(2)]
    saw["images"] = evaluate.generate(run, data, 7, 2, blend, torch.arange(10))
    fid.inception = lambda data_dir, device: Net()
    kept = []
    saw["fid"] = fid.fid(few(data), data.images[:1201:12], out / "data", kept=kept)
    saw["prdc"] = fid.prdc(fid.neighbours(few(data), 101, out / "data"), torch.cat(kept))

    def grads():
        return torch.cat([p.grad.flatten() for p in net.parameters()])
    for it, ruin in enumerate((False, rank == 0, rank == 1)):             # on none, on one, on the other
        run.seed(it)
        opt.zero_grad()
        loss, stats = ect.loss_fn(net, *run.batch(data, it), it, args, lambda: None)
        (loss * (float("nan") if ruin else 1)).backward()
        run.count(stats)
        before = grads().clone()
        saw[f"sync{it}"] = caught(lambda: run.sync(opt, it)), before, grads()

    for kind, argv in (("plain", []), ("shard", ["--shard"])):      # no dropout: masks follow the layout
        saw[kind] = train(out / kind, "--accum", "2", "--keep", "--log-every", "1", *argv)
        saw[f"{kind} resumed"] = train(out, "--resume", half(out / kind))
        other = "--no-shard" if kind == "shard" else "--shard"
        saw[f"{kind} changed"] = train(out, "--resume", half(out / kind, "changed"), other)
    saw["stopped"] = train(out / "stopped", "--save-every", "100", at={1: stop})
    saw["shard stopped"] = train(out / "nan", "--shard", "--save-every", "100", "--max-skips", "1",
                                 at={1: spoil, 2: stop})
    for kind, argv in (("plain", []), ("shard", ["--shard"])):
        saw[f"{kind} derivative"] = derivative(data, out, *argv)
        saw[f"{kind} turns"] = turns(data, out, kind, *argv)
    saw["recomputed derivative"] = derivative(data, out, "--shard", "--checkpoint-acts")
    torch.save(saw, out / f"{rank}.pt")


def derivative(data, out, *argv):
    """A loss with a forward derivative in it: its value, that of the tangent, and the mean gradients."""
    args = parse(scm.Args, scm.PRESETS, [*TINY, "--teacher", "none", "--H", "0", "--out", str(out), *argv])
    run = Run(args, scm.__file__)
    run.seed(-1)
    net = TrigFlow(backbone(args, data), args.sd)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    net = run.place(net)
    run.step, it = [], 3
    run.reset()
    run.seed(it)
    loss, stats = scm.loss_fn(net, None, *run.batch(data, it), it, args, lambda: run.seed(it, 0, stream=1))
    loss.backward()
    run.count(stats)
    run.sync(torch.optim.SGD(net.parameters(), lr=0.1), it)
    return loss.detach(), stats["tangent"].detach(), {k: folder.full(p.grad).clone() for k, p in net.named_parameters()}


def turns(data, out, kind, *argv):
    """A run of two networks that learn in turns, with rollouts of one to three calls."""
    args = parse(rcm.Args, rcm.PRESETS, [*TINY, "--teacher", str(out / "trig.pt"), "--H", "1", "--student-every", "2", "--N-max", "3",
                                         "--lr", "1e-3", "--iters", "5", "--out", str(out / f"turns-{kind}"), *argv])
    torch.manual_seed(0)
    net = TrigFlow(backbone(args, data), args.sd)
    if rank == 0:
        torch.save(dict(model=net.spec, ema=net.state_dict()), out / "trig.pt")
    dist.barrier()
    teachers.show = lambda *_: None
    return caught(lambda: rcm.main(args))


def caught(call):
    """What a call returns; or the kind of its exception, its text and what it wrote to stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            return call()
        except (SystemExit, FloatingPointError) as e:
            return type(e).__name__, str(e), err.getvalue()


def train(out, *argv, at={}):
    """main(); its result, this rank's losses, the answers of sync() and the last weights that were saved."""
    seen, real_loss, real_sync, real_save = dict(loss=[], gap=[], ok=[]), ect.loss_fn, Run.sync, Run.save

    def loss_fn(net, x0, y, it, args, reseed):
        loss, stats = real_loss(net, x0, y, it, args, reseed)
        seen["loss"].append(float(loss.detach()))
        seen["gap"].append(float(stats["gap"]))
        return at[it](loss, stats) if it in at else (loss, stats)

    def sync(self, opt, it):
        seen["ok"].append(real_sync(self, opt, it))
        return seen["ok"][-1]

    def save(self, it, state):
        seen["net"] = {k: v.clone() for k, v in folder.full(state["net"].state_dict()).items()}
        real_save(self, it, state)

    ect.loss_fn, Run.sync, Run.save = loss_fn, sync, save
    try:
        args = parse(ect.Args, ect.PRESETS, list(argv)) if "--resume" in argv else flags(out, *argv)
        seen["result"] = caught(lambda: ect.main(args))
    finally:
        ect.loss_fn, Run.sync, Run.save = real_loss, real_sync, real_save
    return seen


def stop(loss, stats):
    """Rank 1 alone is told to stop."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    return loss, stats


def spoil(loss, stats):
    return loss * (float("nan") if rank == 0 else 1), stats


def half(out, name="half"):
    """A copy of the run below `out` that has just saved step 2."""
    from test_run import back_to
    if rank == 0:
        back_to(out / "ect-digits-000", 2, out / name)
    dist.barrier()
    return str(out / name)


if __name__ == "__main__":
    rank, evaluate.FD_IMAGES = int(os.environ["RANK"]), 64
    faulthandler.dump_traceback_later(280, exit=True)                     # ranks that wait for each other
    work(Path(sys.argv[1]))
    sys.exit()


# ---- afterwards, in the process of the tests -----------------------------------------------------
@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    p = subprocess.run([*torchrun, __file__, str(out)], capture_output=True, text=True, timeout=300, cwd=ROOT,
                       env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert p.returncode == 0, p.stderr[-6000:]
    assert p.stdout.count("network ") == 11, "one table for each run, from the first rank"
    assert "torchrun --nproc-per-node 2 -m ect --resume " in p.stdout
    return out


@pytest.fixture(scope="module")
def both(out):
    return [torch.load(out / f"{i}.pt", weights_only=False) for i in range(2)]


def test_gradients_become_the_mean_over_the_ranks(both):
    """Ranks that drift apart, or that saw the same noise and images and gained nothing."""
    (ok0, a, mean0), (ok1, b, mean1) = (saw["sync0"] for saw in both)
    assert ok0 is True and ok1 is True and (a - b).abs().max() > 1e-3 * a.abs().max(), "equal before"
    assert torch.equal(mean0, mean1) and torch.allclose(mean0, (a + b) / 2, rtol=1e-5, atol=1e-8)


def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(both):
    """A rank that skips alone has other weights ever after; one that stops alone lets the others wait."""
    for saw in both:
        assert saw["sync1"][0] is False, "bad on rank 0"
        kind, text, err = saw["sync2"][0]
        assert kind == "FloatingPointError" and "step 2, seed 0" in text, "bad on rank 1, the second"
    assert not both[0]["sync1"][1].isfinite().all() and both[1]["sync1"][1].isfinite().all()
    assert "another rank" in both[0]["sync2"][0][1] and "rank 1: gradient" in both[1]["sync2"][0][1]


def test_the_images_of_a_step_do_not_depend_on_the_ranks(both):
    """Each rank shuffling on its own: images twice in a step, and others for other numbers of ranks."""
    x, y = (torch.cat(v) for v in zip(*both[0]["batches"], *both[1]["batches"]))
    whole = load("digits").batch(5, 8, flip=True)
    assert torch.equal(x, whole[0]) and torch.equal(y, whole[1])


def test_generated_images_do_not_depend_on_the_ranks(both, tmp_path):
    """Images in another order, with another's label, or twice where the ranks do not divide their number."""
    alone = Run(flags(tmp_path, "--cond"), ect.__file__)
    for n, k in ((7, 2), (3, 2)):
        images = evaluate.generate(alone, load("digits"), n, k, blend, torch.arange(10))
        assert all(torch.equal(images, saw["images"][:n]) for saw in both)
    assert len(both[0]["images"]) == 7 and len({tuple(i.flatten().tolist()) for i in images}) == 3


def test_the_ranks_share_the_work_of_fid(both, tmp_path, monkeypatch):
    """Features of a rank left out or counted twice; statistics written by one and not waited for by the other."""
    monkeypatch.setattr(fid, "inception", lambda data_dir, device: Net())
    data = load("digits")
    kept = []
    alone = fid.fid(few(data), data.images[:1201:12], tmp_path, kept=kept)
    assert [saw["fid"] for saw in both] == pytest.approx([alone, alone], rel=1e-6) and alone > 1e-4
    near = fid.prdc(fid.neighbours(few(data), 101, tmp_path), torch.cat(kept))
    assert both[0]["prdc"] == both[1]["prdc"] == pytest.approx(near, abs=0.021)
    assert 0.5 < near["coverage"] < 1


def test_a_run_on_two_ranks(both, out):
    """Two folders, weights that drift apart, a log of the first rank only, a result that one rank lacks."""
    a, b = (saw["plain"] for saw in both)
    run = out / "plain/ect-digits-000"
    assert [p.name for p in run.parent.iterdir() if p.name not in ("half", "changed")] == ["ect-digits-000"]
    assert equal(a["net"], b["net"]) and equal(a["net"], weights(run)) and a["result"] == b["result"]
    assert a["result"]["run"] == str(run) and a["result"].keys() >= {"fd_pixels_1step", "fd_pixels_2step"}
    for name in ("loss", "gap"):
        parts = torch.tensor([a[name], b[name]]).view(2, 4, 2)            # rank, step, part
        logged = torch.tensor([r[name] for r in lines(run / "log.jsonl")])
        assert torch.allclose(logged, parts.mean((0, 2)), rtol=1e-4)
        assert len({float(v) for v in parts.flatten()}) == 16
    assert len(lines(run / "eval.jsonl")) == 2 * 2 * 5    # twice, in 1 and 2 steps: FD, precision and so on
    assert json.loads((run / "config.json").read_text())["about"]["ranks"] == 2


def test_a_signal_to_one_rank_stops_all_at_the_same_step(both, out):
    """A rank that leaves alone lets the others wait for it until the job is killed, unsaved."""
    for saw in both:
        assert saw["stopped"]["result"][:2] == ("SystemExit", "143") and saw["stopped"]["ok"] == [True, True]
    saved = torch.load(out / "stopped/ect-digits-000/ckpt.pt")
    assert saved["it"] == 2 and equal(saved["net"], both[1]["stopped"]["net"])


@pytest.mark.parametrize("kind", ["plain", "shard"])
def test_resume_on_two_ranks_is_exact(kind, out, both):
    """Optimiser state that is lost, gathered in the wrong order or restored to the wrong rank."""
    from test_run import ckpt, same
    whole, again = (out / kind / name for name in ("ect-digits-000", "half"))
    assert same(ckpt(whole), ckpt(again)) and len(both[0][f"{kind} resumed"]["ok"]) == 2
    first, second = ([r["loss"] for r in lines(run / "log.jsonl")] for run in (whole, again))
    assert second == first


def near(a, b):
    """Another memory layout sums in another order, and the norm in the loss magnifies that; hence 2e-3."""
    return a.shape == b.shape and a.dtype == b.dtype and (a - b).norm() <= 2e-3 * a.norm()


@pytest.mark.parametrize("kind", ["plain", "shard"])
def test_a_run_goes_on_with_weights_split_or_whole(kind, out, both):
    """More GPUs, or fewer, for the second half of a run: a flag that is refused, or a checkpoint of the other layout."""
    config = json.loads((out / kind / "changed/config.json").read_text())
    assert config["shard"] == (kind == "plain") and len(both[0][f"{kind} changed"]["ok"]) == 2
    x, y = (torch.load(out / kind / name / "ckpt.pt", weights_only=True) for name in ("ect-digits-000", "changed"))
    for part in ("net", "ema"):
        assert all(near(x[part][k], y[part][k]) for k in x[part])
    for i, state in x["opt"]["state"].items():
        assert all(near(v, y["opt"]["state"][i][k]) for k, v in state.items())


def test_a_sharded_run_equals_an_unsharded_one(both, out):
    """Gradients summed instead of averaged, weights left whole after sampling, half a checkpoint."""
    a, b = (out / kind / "ect-digits-000" for kind in ("plain", "shard"))
    for x, y in zip(lines(a / "log.jsonl"), lines(b / "log.jsonl"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-4)
    x, y = (torch.load(run / "ckpt.pt", weights_only=True) for run in (a, b))
    for part in ("net", "ema"):
        assert list(x[part]) == list(y[part]) and not equal(x[part], torch.load(b / "ckpt.prev.pt")[part])
        assert all(near(x[part][k], y[part][k]) for k in x[part])
    assert x["model"] == y["model"] and x["opt"]["param_groups"] == y["opt"]["param_groups"]
    for i, state in x["opt"]["state"].items():
        assert all(near(v, y["opt"]["state"][i][k]) for k, v in state.items())
    noise, t = torch.randn(2, 1, 8, 8), torch.ones(2, 1, 1, 1)
    assert near(teachers.load(a)(noise, t), teachers.load(b)(noise, t))
    for r, s in zip(lines(a / "eval.jsonl"), lines(b / "eval.jsonl"), strict=True):
        assert (r["it"], r["steps"]) == (s["it"], s["steps"])
        assert r["value"] == pytest.approx(s["value"], abs=0.05 if r["metric"] == "fd_pixels" else 0.2), r["metric"]


def test_a_sharded_run_skips_and_stops_on_all_ranks(both, out):
    """FSDP2 averages gradients, but no flags: rank 0 had a bad loss in step 1, rank 1 a signal in step 2."""
    for saw in both:
        assert saw["shard stopped"]["ok"] == [True, False, True]
        assert saw["shard stopped"]["result"][:2] == ("SystemExit", "143")
    saved = torch.load(out / "nan/ect-digits-000/ckpt.pt")
    assert saved["it"] == 3 and all(v.isfinite().all() for v in saved["net"].values())


def test_a_mistake_is_reported_once(both):
    """As many error lines as ranks."""
    (kind, code, err), (other, code_1, silence) = (saw["refusal"] for saw in both)
    assert (kind, code) == (other, code_1) == ("BadInput", "2") and silence == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and "2 x 1" in err


def test_a_derivative_passes_through_sharded_weights(both):
    """F and weigh are called beside forward: without their own hooks they would meet a half of each weight; and hooks
    that lose the tangent would leave another loss."""
    for saw in both:
        (loss, tangent, grads), (loss_s, tangent_s, grads_s) = (saw[f"{kind} derivative"] for kind in ("plain", "shard"))
        assert torch.allclose(loss, loss_s, rtol=1e-5) and torch.allclose(tangent, tangent_s, rtol=1e-5)
        assert all((grads[k] - grads_s[k]).norm() <= 1e-4 * grads[k].norm() for k in grads)
        assert grads["head.weight"].any() and grads["model.map_layer0.weight"].any()


def test_recomputed_blocks_of_sharded_weights_give_the_same_gradients(both):
    """--checkpoint-acts with --shard: blocks that are computed again with a half of their weights, or not shared out."""
    for saw in both:
        (loss, _, grads), (loss_c, _, grads_c) = saw["shard derivative"], saw["recomputed derivative"]
        assert torch.equal(loss, loss_c) and equal(grads, grads_c)


def test_two_networks_take_turns_on_two_ranks(both, out):
    """A rank with its own idea of whose step it is, or of the number of calls in it, would wait for the other; the second
    network's gradients averaged with those of the first, or not at all."""
    assert all(saw[f"{kind} turns"] == both[0][f"{kind} turns"] for saw in both for kind in ("plain", "shard"))
    x, y = (torch.load(out / f"turns-{kind}/rcm-digits-000/ckpt.pt", weights_only=True) for kind in ("plain", "shard"))
    start = torch.load(out / "trig.pt", weights_only=True)["ema"]
    far = lambda a, b: float(torch.cat([(a[k] - b[k]).flatten() for k in start]).norm())
    for part in ("net", "fake", "ema"):                   # Adam without momentum: small gradients may change their sign
        assert far(x[part], y[part]) < 0.45 * far(x[part], start) and far(x[part], start) > 0.01     # 0.31 was seen

"""CD's flags, teacher, distances, segments and sampler; its solver and what it converges to are in test_exact.py."""
import dataclasses
import importlib
import inspect
import json
import sys
import types

import pytest
import torch
from conftest import equal, lines, snapshot, weights
from test_ct import T_MIN, unet

import cd
from common import sample, teacher
from common.assets import perceptual
from common.flags import BadInput, parse


def settled(**flags):
    args = cd.Args(**flags)
    cd.check(args)
    return dataclasses.replace(args, **cd.segments(args))


@pytest.fixture
def guide(train):
    """The folder of a tiny teacher; `guide("--cond")` makes a conditional one."""
    return lambda *flags: str(train("common.teacher", "--steps", "2", *flags)[1])


# ---- flags ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("K, N", [(1, 18), (2, 19), (3, 19), (4, 21), (17, 18), (20, 21)])
def test_the_number_of_levels_fits_the_segments(K, N, capsys):
    """N - 1 rounded up to a multiple of K, and said; sampled in K steps."""
    args = settled(boundaries=K, steps=2)
    assert (args.N, args.steps) == (N, K if K > 1 else 2)
    assert (f"{N} noise levels, sampled in {K} steps" in capsys.readouterr().out) == (K > 1)
    assert settled(boundaries=K, N=1 + 3 * K).N == 1 + 3 * K


@pytest.mark.parametrize("flags, words", [
    ("--N 18 --boundaries 4", "--N 18"), ("--N 1", "--N 1"), ("--N -3", "--N"), ("--boundaries 0", "--boundaries"),
    ("--guidance 2", "--cond"), ("--guidance -1", "--guidance"), ("--guidance nan --cond", "--guidance"),
    ("--teacher none", "--teacher none"), ("--mu 1", "--mu"), ("--mu -0.5", "--mu"), ("--distance lpips", "pip install lpips"),
    ("--solver rk4", "--solver"), ("--t-mid 0.002", "--t-mid")])
def test_bad_input_is_one_line_before_anything_is_trained_or_written(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)       # not installed
    monkeypatch.setattr(teacher, "main", lambda *a: pytest.fail("trained a teacher first"))
    with pytest.raises(BadInput) as e:
        cd.main(parse(cd.Args, cd.PRESETS, ["--device", "cpu", "--iters", "1", "--out", str(tmp_path / "runs"), *flags.split()]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_guidance_needs_a_teacher_that_knows_the_classes(guide, tmp_path, capsys):
    path, before = guide(), snapshot(tmp_path)
    capsys.readouterr()
    with pytest.raises(BadInput):
        cd.main(parse(cd.Args, cd.PRESETS, ["--device", "cpu", "--out", str(tmp_path / "runs"), "--teacher", path, "--sd",
                                            "0.75", "--guidance", "2", "--cond"]))
    assert "classes) = (0.75, 1, 8, 0)" in capsys.readouterr().err and snapshot(tmp_path) == before


# ---- loss ----------------------------------------------------------------------------------------
def fixed(monkeypatch, args, n=8):
    """Make times() and the noise constant, and return them; every pair of neighbours occurs if n is N - 1."""
    ts, eps = cd.karras(args.N, args).float(), torch.randn(n, 1, 8, 8)
    i = torch.arange(n).view(-1, 1, 1, 1) % (args.N - 1)
    width = (args.N - 1) // args.boundaries
    levels = ts[i + 1], ts[i], ts[i // width * width]
    monkeypatch.setattr(cd, "times", lambda *a: levels)
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    return *levels, eps


def test_one_segment_is_consistency_distillation_exactly(monkeypatch):
    """--boundaries 1 adds nothing: the loss is that of Algorithm 2, bit for bit in float32."""
    args, net, target, guide = settled(), unet(), unet(scale=0.2), unet(scale=0.05)
    guide.t_min, x0 = 0.0, torch.rand(17, 1, 8, 8)
    t, r, s, eps = fixed(monkeypatch, args, 17)
    assert (s == T_MIN).all()
    _, stats = cd.loss_fn(net, target, guide, x0, None, 0, args, lambda: None)
    with torch.no_grad():
        x_t = x0 + t * eps
        d = (x_t - guide(x_t, t)) / t
        x_e = x_t + (r - t) * d
        x_r = x_t + (r - t) * ((d + (x_e - guide(x_e, r)) / r) / 2)
        expect = ((net(x_t, t) - target(x_r, r)) ** 2).flatten(1).mean(1)
    assert torch.equal(stats["loss"], expect)


def test_segments_end_on_the_grid():
    """Karras levels at equal steps: the table of edges for K = 4 and 2; a pair never crosses an edge."""
    torch.manual_seed(0)
    for K, edges in ((4, [T_MIN, .16975, 2.51522, 17.52783]), (2, [T_MIN, 2.51522]), (3, [T_MIN, .46998, 9.7232])):
        t, r, s = cd.times(5_000, 0, settled(boundaries=K), "cpu")
        assert torch.allclose(s.unique(), torch.tensor(edges), rtol=1e-4)
        above = torch.tensor(edges[1:] + [80.0])[(s.flatten()[:, None] - torch.tensor(edges)).abs().argmin(1)]
        assert (s <= r).all() and (t.flatten() <= above * 1.0001).all()


def test_at_the_edge_of_a_segment_the_target_is_the_teachers_point(monkeypatch):
    """r = s: f_r extends the line from x_t through x_r to t_min, whatever the target network says: its anchor."""
    args = settled(boundaries=3)
    t, r, s, eps = fixed(monkeypatch, args, args.N - 1)
    x0, net, edge = torch.rand(len(t), 1, 8, 8), unet(), (r == s).flatten()
    a, b = (cd.loss_fn(net, target, lambda x, t, y: 0.3 * x, x0, None, 0, args, lambda: None)[1]["loss"]
            for target in (unet(scale=0.2), unet(scale=0.5)))
    assert edge.sum() == 3 and torch.equal(a[edge], b[edge]) and (a != b)[~edge].all()


def test_the_teacher_solves_and_the_student_does_not(monkeypatch):
    """Heun with the network in training, gradient into the teacher, or the teacher asked at other levels."""
    asked = []

    def guide(x, t, y):
        assert not torch.is_grad_enabled()                # a graph of the teacher is memory for nothing
        asked.append((t, y))
        return w * x
    w, args = torch.tensor(0.5, requires_grad=True), settled(guidance=1.5, cond=True)
    t, r, s, eps = fixed(monkeypatch, args)
    y = torch.arange(8)
    loss, _ = cd.loss_fn(unet(), unet(), guide, torch.rand(8, 1, 8, 8), y, 0, args, lambda: None)
    loss.backward()
    assert w.grad is None
    assert [("t" if level is t else "r", label is y, label is None) for level, label in asked] == [
        ("t", True, False), ("t", False, True), ("r", True, False), ("r", False, True)]


def test_every_distance_trains(monkeypatch):
    """lpips is asked for two batches of images, and only the first is differentiated."""
    net, target, x0 = unet(), unet(scale=0.2), torch.rand(8, 1, 8, 8)
    kept = {}

    def lpips(a, b):
        kept.update(a=a, b=b)
        return (a - b).flatten(1).mean(1)
    for kind in ("l2", "l1", "huber", "lpips"):
        args = settled() if kind == "lpips" else settled(distance=kind)
        args.distance = kind
        fixed(monkeypatch, args)
        loss, _ = cd.loss_fn(net, target, lambda x, t, y: 0.3 * x, x0, None, 0, args, lambda: None, lpips)
        net.zero_grad()
        loss.backward()
        assert any(p.grad.abs().max() > 0 for p in net.parameters())
    assert kept["a"].requires_grad and not kept["b"].requires_grad and kept["a"].shape == x0.shape


def test_distances_are_over_all_of_an_image(monkeypatch):
    t, delta = torch.ones(3, 1, 1, 1), torch.randn(3, 3, 4, 4) * 0.01
    monkeypatch.setattr(cd, "times", lambda *a: (t, t / 2, torch.full_like(t, T_MIN)))
    net, c, d = lambda x, level, y: delta * (level == 1), 0.00054 * 48**0.5, delta.flatten(1)
    for kind, expect in dict(l2=(d**2).mean(1), l1=d.abs().mean(1), huber=((d**2).sum(1) + c**2).sqrt() - c).items():
        args = settled(distance=kind)
        _, stats = cd.loss_fn(net, net, lambda x, t, y: x, torch.zeros_like(delta), None, 0, args, lambda: None)
        assert torch.allclose(stats["loss"], expect, rtol=1e-4)


def test_lpips_gets_colour_images_of_its_own_size(monkeypatch):
    """VGG16 at 224 x 224 and three channels, as the paper; in [-1, 1], which is what that package expects."""
    class Lpips(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            self.scale, self.net = torch.nn.Parameter(torch.ones(())), net

        def forward(self, a, b):
            assert a.shape == b.shape == (5, 3, 224, 224) and self.net == "vgg" and abs(a.min() + 1) < 1e-5
            return self.scale * (a - b).square().mean((1, 2, 3), keepdim=True)
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Lpips))
    a, b = torch.full((5, 1, 8, 8), -1.0, requires_grad=True), torch.rand(5, 1, 8, 8)
    d = perceptual(types.SimpleNamespace(latent={}), "cpu")(a, b)
    d.sum().backward()
    assert d.shape == (5,) and a.grad.abs().min() > 0


# ---- sampling ------------------------------------------------------------------------------------
def test_segments_are_sampled_from_edge_to_edge_without_more_noise():
    seen = []

    def net(x, t, y):
        seen.append(float(t[0]))
        return 0 * x
    args, noise = settled(boundaries=4), torch.randn(4, 3, 1, 2, 2, dtype=torch.float64)
    out = cd.sample(net, noise, None, args)
    assert seen == pytest.approx([80.0, 17.52783, 2.51522, .16975], rel=1e-4)
    assert torch.allclose(out, 0 * out, atol=1e-3 * 80 * 5)
    other = torch.cat([noise[:1], torch.randn(3, 3, 1, 2, 2, dtype=torch.float64)])
    assert torch.equal(out, cd.sample(net, other, None, args))


@pytest.mark.parametrize("K", [1, 2, 5])
def test_one_step_of_line(K):
    """On the line from (x, t) to (y, r): its ends, bit for bit, and its middle."""
    x, y = torch.randn(4, 1, 2, 2), torch.randn(4, 1, 2, 2)
    t, r = torch.full((4, 1, 1, 1), 1.0 * K), torch.full((4, 1, 1, 1), 0.5)
    assert torch.equal(cd.line(x, y, t, r, r), y) and torch.equal(cd.line(x, y, t, r, t), x)
    assert torch.allclose(cd.line(x, y, t, r, (t + r) / 2), (x + y) / 2)
    assert torch.equal(cd.line(x, y, r, r, r), x)         # where all are equal: no NaN


# ---- runs ----------------------------------------------------------------------------------------
def test_a_run_starts_as_its_teacher_and_resumes_bit_for_bit(train, guide, capsys):
    path = guide()
    _, run = train("cd", "--teacher", path, "--keep", "--lr", "1e-3")
    whole = {k: weights(run, k) for k in ("net", "ema", "target")}
    assert equal(whole["net"], whole["target"])           # mu = 0: the network itself
    assert json.loads((run / "config.json").read_text())["N"] == 18
    (run / "ckpt-0000002.pt").replace(run / "ckpt.pt")
    before = len(lines(run / "eval.jsonl"))
    train("cd", "--resume", str(run))
    assert all(equal(v, weights(run, k)) for k, v in whole.items())
    after = lines(run / "eval.jsonl")
    shown = [s["metric"] for s in after if s["net"] == "teacher"]
    assert shown.count("fd_pixels") == 1 and len(after) == before
    _, run = train("cd", "--teacher", path, "--iters", "1", "--lr", "1e-9")
    start = weights(run)
    assert all(torch.allclose(v, start[k], atol=1e-6) for k, v in teacher.load(path).state_dict().items())


def test_the_target_may_be_a_slow_copy(train, guide):
    _, run = train("cd", "--teacher", guide(), "--mu", "0.7", "--keep", "--save-every", "1", "--lr", "1e-2")
    for it in (1, 2, 3):
        name = f"ckpt-{it + 1:07d}.pt"
        old, net, new = weights(run, "target", f"ckpt-{it:07d}.pt"), weights(run, "net", name), weights(run, "target", name)
        assert all(torch.allclose(new[k], 0.7 * old[k] + 0.3 * net[k], atol=1e-6) for k in net)


def test_a_guided_run_with_segments_trains_and_is_sampled(train, guide, tmp_path):
    """The whole path once: labels, guidance, four segments, figures named by their steps and without a t_mid."""
    _, run = train("cd", "--teacher", guide("--cond"), "--cond", "--guidance", "1.5", "--boundaries", "4")
    config, figures = json.loads((run / "config.json").read_text()), lines(run / "eval.jsonl")
    assert (config["N"], config["steps"]) == (21, 4)
    assert {(s["steps"], s["t_mid"]) for s in figures if s["net"] == "ema"} == {(4, None)}, "one step would jump to an edge"
    images, labels = sample.main([str(run), "--n", "4", "--classes", "3,5", "--out", str(tmp_path / "x.png"), "--device", "cpu"])
    assert images.shape == (4, 1, 8, 8) and labels.tolist() == [3, 5, 3, 5]


def test_a_consistency_model_is_no_teacher(train, tmp_path, capsys):
    """Its f(x, t) taken for a denoiser: another ODE, distilled without a word; its teacher's figure taken for its own."""
    _, teacher = train("common.teacher", "--iters", "1")
    _, first = train("ect", "--teacher", str(teacher), "--iters", "1")
    for path in (first, first / "ckpt.pt"):
        with pytest.raises(SystemExit) as e:
            train("cd", "--teacher", str(path), "--iters", "1")
        assert e.value.code == 2 and "consistency model" in capsys.readouterr().err
    metrics, run = train("ect", "--teacher", str(first), "--iters", "1")
    assert "fd_pixels_teacher" not in metrics and not list(run.glob("samples/*teacher*"))


def test_a_teacher_without_figures_is_measured(train):
    """Stopped in its last evaluation: finished, but nothing to show."""
    _, teacher = train("common.teacher", "--iters", "1")
    (teacher / "eval.jsonl").unlink()
    metrics, _ = train("cd", "--teacher", str(teacher), "--iters", "1")
    assert "fd_pixels_teacher" in metrics


def test_a_run_of_segments_is_sampled_in_its_own_steps(train, tmp_path, capsys):
    """f of a segment taken for the whole map: --ts, --edit and other numbers of steps draw garbage."""
    _, teacher = train("common.teacher", "--iters", "1")
    metrics, run = train("cd", "--teacher", str(teacher), "--boundaries", "2", "--iters", "1")
    assert "fd_pixels_2step" in metrics and "fd_pixels_1step" not in metrics
    from common import sample
    for argv in (["--ts", "80,1"], ["--edit", "inpaint"], ["--find-ts"], ["--steps", "3"]):
        with pytest.raises(SystemExit) as e:
            sample.main([str(run), *argv])
        assert e.value.code == 2 and "segments" in capsys.readouterr().err
    sample.main([str(run), "--steps", "2", "--n", "2", "--out", str(tmp_path / "x.png")])


@pytest.mark.parametrize("script, more, dtype", [
    ("cd", [], torch.bfloat16), ("rcm", ["--N-max", "1"], torch.float32),
    ("scm", ["--mode", "scd", "--teacher", "train", "--teacher-iters", "2"], torch.float32)])
def test_precision_of_the_frozen_teacher(script, more, dtype, train, monkeypatch):
    """--bf16. A rounded F_teacher in F - F_teacher: the gradient of a trained sCD keeps a cosine of 0.81 only. A teacher
    in float32 in CD, where rounding costs nothing: twice its time on a GPU."""
    method, seen = importlib.import_module(script), set()
    signature, loss_fn = inspect.signature(method.loss_fn), method.loss_fn

    def spy(*args):
        seen.add(signature.bind(*args).arguments["teacher"].dtype)
        return loss_fn(*args)
    monkeypatch.setattr(method, "loss_fn", spy)
    train(script, "--bf16", "--iters", "1", *more)
    assert seen == {dtype}

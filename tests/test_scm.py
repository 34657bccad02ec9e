"""sCM's tangent, loss and sampler against exact Gaussian solutions and against difference quotients of f."""
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, lines, weights
from test_run import config

import scm
from common import teacher as teachers
from common.jvp import jvp
from common.networks import build
from common.precond import EDM, TrigFlow
from common.unet import UNet

S = torch.tensor([0.9, 0.2], dtype=torch.float64).view(1, 2, 1, 1)       # spread of the Gaussian data, per channel
SD = 0.5


def var(t):
    return (t.cos() * S) ** 2 + (t.sin() * SD) ** 2


class Exact(torch.nn.Module):
    """x0 ~ N(0, S^2): f(x, t) = S / sqrt(var) x, written as F; with `velocity`, the diffusion model instead."""
    def __init__(self, velocity=False):
        super().__init__()
        self.velocity = velocity

    def F(self, x, t, y=None):
        if self.velocity:                                 # dx/dt = d ln sqrt(var) / dt x
            return t.sin() * t.cos() * (SD**2 - S**2) / var(t) * x / SD
        return (t.cos() - S / var(t).sqrt()) * x / (SD * t.sin())

    def forward(self, x, t, y=None):
        return t.cos() * x - t.sin() * SD * self.F(x, t, y)


class Mlp(torch.nn.Module):
    """A small network of 2 pixels; F and weigh as TrigFlow offers them."""
    def __init__(self, seed=0, width=32):
        super().__init__()
        torch.manual_seed(seed)
        self.seq = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.SiLU(), torch.nn.Linear(width, width),
                                       torch.nn.SiLU(), torch.nn.Linear(width, 2)).double()
        self.head = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def F(self, x, t, y=None):
        t = t.flatten(1)
        return self.seq(torch.cat([x.flatten(1) / SD, t.cos(), t.sin()], 1)).view(x.shape)

    def weigh(self, t):
        return self.head[0] + self.head[1] * t.flatten()

    forward = Exact.forward


class Probe(torch.nn.Module):
    """Lays a parameter on top of F: its gradient is that of the loss in F."""
    def __init__(self, net, x):
        super().__init__()
        self.net, self.p = net, torch.nn.Parameter(torch.zeros_like(x))
        self.w = torch.nn.Parameter(torch.zeros(len(x), dtype=x.dtype))

    def F(self, x, t, y=None):
        return self.net.F(x, t, y) + self.p

    def weigh(self, t):
        return self.w


def setup(monkeypatch, x, dx, t):
    """Make loss_fn meet exactly these points and velocities; return the x0 to hand over."""
    x0, z = t.cos() * x - t.sin() * dx, t.sin() * x + t.cos() * dx
    monkeypatch.setattr(scm, "times", lambda *a: t)
    monkeypatch.setattr(torch, "randn_like", lambda *a: z / SD)
    return x0


def tangent(monkeypatch, net, x, dx, t, r=1.0, teacher=None, **kw):
    """g before normalisation, recovered from the gradient -2 g / (|g| + c) / B that reaches F."""
    x0 = setup(monkeypatch, x, dx, t)
    args = scm.Args(H=1000, c=1e6, sd=SD, mode="scd" if teacher else "sct", **kw)
    spy = Probe(net, x)
    loss, _ = scm.loss_fn(spy, teacher, x0, None, round(1000 * r), args, lambda: None)
    loss.backward()
    g = -spy.p.grad * len(x) / 2
    n = g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return g * args.c / (1 - n)


T = torch.tensor([0.004, 0.1, 0.4, 0.8, 1.1, 1.4, 1.55, math.atan(160)], dtype=torch.float64).view(-1, 1, 1, 1)


def points(seed=0):
    g = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, len(T), 2, 1, 1, generator=g, dtype=torch.float64)
    return x * var(T).sqrt(), SD * v


# ---- the tangent ---------------------------------------------------------------------------------
def test_no_tangent_at_the_exact_consistency_function(monkeypatch):
    """With the teacher's exact path g = 0 at every t, for r = 1 alone. A wrong sign of a term, a lost sd, cos or sin,
    or a JVP along another direction breaks it; so does r counted from 1 / H."""
    x, _ = points()
    exact = Exact(velocity=True)
    dx = SD * exact.F(x, T)
    for teacher in (None, exact):                         # the same path, as data or by the teacher
        assert tangent(monkeypatch, Exact(), x, dx, T, 1.0, teacher).abs().max() < 1e-8
        for r in (0.0, 0.5, 0.99):
            assert tangent(monkeypatch, Exact(), x, dx, T, r, teacher)[2:6].flatten(1).norm(dim=1).min() > 0.01 * (1 - r)
    assert tangent(monkeypatch, Mlp(), x, dx, T)[2:6].flatten(1).norm(dim=1).min() > 1e-2


@pytest.mark.parametrize("how, tol", [("exact", 1e-7), ("fd", 1e-5)])
def test_tangent_is_cos_t_times_the_derivative_of_f_along_the_path(how, tol, monkeypatch):
    """A second prior weight, 1 / (sd tan t), a missing cos t sin t, a missing or doubled sd in the JVP: the difference
    quotient of f knows none of them."""
    (x, dx), h, net = points(), 1e-6, Mlp()
    with torch.no_grad():
        df = (net(x + h * dx, T + h) - net(x - h * dx, T - h)) / (2 * h)
    assert torch.allclose(tangent(monkeypatch, net, x, dx, T, jvp=how), T.cos() * df, atol=tol)


def test_warm_up_goes_from_diffusion_training_to_the_whole_tangent(monkeypatch):
    """r = 0: the velocity, weighted by cos^2; in between a straight line; H and beyond: 1."""
    (x, dx), net = points(), Mlp()
    g0, g5, g1, g2 = (tangent(monkeypatch, net, x, dx, T, r) for r in (0, 0.5, 1, 2))
    with torch.no_grad():
        assert torch.allclose(g0, -(T.cos() ** 2) * (SD * net.F(x, T) - dx), atol=1e-8)
    assert torch.allclose(g5, (g0 + g1) / 2, atol=1e-8) and torch.equal(g1, g2) and (g1 - g0).abs().max() > 0.1


def test_sct_and_scd_differ_in_the_velocity_alone(monkeypatch):
    """sCT takes dx from x0 and z whatever the teacher, sCD from the teacher, times sd."""
    (x, dx), net, teacher = points(), Mlp(0), Mlp(1)
    a = tangent(monkeypatch, net, x, dx, T)
    b = tangent(monkeypatch, net, x, dx, T, teacher=teacher)
    c = tangent(monkeypatch, net, x, SD * teacher.F(x, T).detach(), T)
    assert torch.allclose(b, c, atol=1e-8) and (a - b).abs().max() > 0.1
    assert all(p.grad is None for p in teacher.parameters())


def test_the_tangent_is_the_limit_of_the_discrete_one(monkeypatch):
    """Two points on the teacher's path, one first-order step apart: the error falls like the step, at any r."""
    x, _ = points()
    x, t = x[2:6], T[2:6]
    net, teacher = Mlp(0), Mlp(1)

    def discrete(h, r):                                   # eq. 37
        s = t - h
        with torch.no_grad():
            v = teacher.F(x, t)
            x_s = math.cos(h) * x - math.sin(h) * SD * v
            slope = (math.cos(h) * net.F(x, t) - net.F(x_s, s)) / math.sin(h)
            return t.cos() * (-s.cos() * SD * (net.F(x, t) - v) - r * s.sin() * (x + SD * slope))
    for r in (0.5, 1.0):
        g = tangent(monkeypatch, net, x, x, t, r, teacher)
        errors = [float((discrete(h, r) - g).norm()) for h in (4e-3, 2e-3, 1e-3)]
        assert errors[2] < 0.01 * float(g.norm())
        assert all(1.9 < a / b < 2.1 for a, b in zip(errors, errors[1:]))
    h = 1e-3
    x_s = math.cos(h) * x - math.sin(h) * SD * teacher.F(x, t)              # and r = 1 is the quotient of f itself
    assert (t.cos() * (net(x, t) - net(x_s, t - h)) / h - g).norm() < 0.02 * g.norm()


# ---- the loss ------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm, D", [("l2", 1), ("rms", 2)])
def test_normalisation_weight_and_gradient(norm, D, monkeypatch):
    """g / (|g| + c) per image, |g| over the image or per pixel; the loss is e^w |g|^2 / D - w; its gradient in F is
    -2 e^w g / D, in w e^w |g|^2 / D - 1. A weight of t beside w, a batch-wide norm or sums without D are seen."""
    (x, dx), net = points(), Mlp()
    g = tangent(monkeypatch, net, x, dx, T)
    size = g.flatten(1).norm(dim=1) / math.sqrt(D)
    g = g / (size.view(-1, 1, 1, 1) + 0.1)
    x0 = setup(monkeypatch, x, dx, T)
    spy, w = Probe(net, x), torch.linspace(-1, 1, len(x), dtype=torch.float64)
    spy.w.data = w.clone()
    loss, stats = scm.loss_fn(spy, None, x0, None, 10, scm.Args(H=10, sd=SD, norm=norm), lambda: None)
    loss.backward()
    d = (g**2).flatten(1).sum(1) / D
    assert torch.allclose(stats["loss"], w.exp() * d - w) and torch.allclose(loss, stats["loss"].mean())
    assert torch.allclose(spy.p.grad, -2 * (w.exp() / D / len(x)).view(-1, 1, 1, 1) * g, atol=1e-8)
    assert torch.allclose(spy.w.grad, (w.exp() * d - 1) / len(x))
    assert torch.allclose(stats["tangent"], size.mean(), rtol=1e-6) and stats["ramp"] == 1
    assert torch.allclose(stats["t"], SD * T.tan())       # as a noise level: the bins of the log are in sigma
    assert (d < 1).all()


def test_gradient_flows_through_one_call_only(monkeypatch):
    """The gradient of every weight is that of -2 g . F with a constant g: nothing flows through the JVP or F-minus."""
    (x, dx), net = points(), Mlp()
    g = tangent(monkeypatch, net, x, dx, T)
    g = g / (g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) + 0.1)
    x0 = setup(monkeypatch, x, dx, T)
    net.zero_grad()
    scm.loss_fn(net, None, x0, None, 10, scm.Args(H=10, sd=SD), lambda: None)[0].backward()
    params = list(net.seq.parameters())
    want = torch.autograd.grad((-2 * g * net.F(x, T)).flatten(1).sum(1).mean(), params)
    assert all(torch.allclose(p.grad, w, atol=1e-8) for p, w in zip(params, want)) and want[0].abs().max() > 1e-3


@pytest.mark.parametrize("how", ["exact", "fd"])
def test_all_calls_share_a_dropout_mask_that_is_not_the_noise(how):
    """With another mask in the JVP, F and dF/dt would belong to two networks."""
    masks = []
    class Drop(torch.nn.Module):
        def F(self, x, t, y=None):
            masks.append(torch.rand(4))
            return x * t
        def weigh(self, t):
            return torch.zeros(len(t), requires_grad=True)
    torch.manual_seed(5)
    first = torch.rand(4)
    torch.manual_seed(5)
    scm.loss_fn(Drop(), None, torch.zeros(4, 1, 2, 2), None, 0, scm.Args(jvp=how), lambda: torch.manual_seed(6))
    assert len(masks) == (2 if how == "exact" else 3) and all(torch.equal(m, masks[0]) for m in masks)
    assert not torch.equal(masks[0], first)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_tangent_with_dropout_is_that_of_the_masked_network(layout):
    """On the real U-Net in training mode: the derivative equals the difference quotient under the same mask."""
    torch.manual_seed(0)
    net = TrigFlow(UNet(8, 1, ch=16, mult=(1, 2), blocks=1, attn=(4,), dropout=0.5, norm="double"), dtype=torch.float64)
    for p in net.double().to(memory_format=layout).parameters():          # masks follow the layout in memory
        p.data += 0.1 * torch.randn_like(p)
    def F(x, t):
        torch.manual_seed(3)
        return net.F(x, t)
    x, t, v, h = torch.randn(2, 1, 8, 8).double(), torch.rand(2, 1, 1, 1).double(), torch.randn(2, 1, 8, 8).double(), 1e-6
    with torch.no_grad():
        quotient = (F(x + h * v, t + h) - F(x - h * v, t - h)) / (2 * h)
        out, d = jvp(F, (x, t), (v, torch.ones_like(t)))
        assert (d - quotient).norm() < 1e-7 * d.norm() and torch.allclose(out, F(x, t), atol=1e-12)
        torch.manual_seed(4)
        assert not torch.allclose(out, net.F(x, t), atol=1e-3)
    assert torch.allclose(out, F(x, t), atol=1e-12)       # the pass with gradient


def test_noise_levels_are_lognormal():
    torch.manual_seed(0)
    t = scm.times(100_000, 0, scm.Args(), "cpu")
    tau = (0.5 * t.tan()).log()
    assert t.shape == (100_000, 1, 1, 1) and 0 < t.min() and t.max() < math.pi / 2
    assert abs(tau.mean() + 1.0) < 0.02 and abs(tau.std() - 1.4) < 0.02
    assert abs((0.75 * scm.times(100_000, 0, scm.Args(sd=0.75), "cpu").tan()).log().mean() + 1.0) < 0.02


def test_noise_has_the_spread_of_the_data(monkeypatch):
    """z ~ N(0, sd^2): with N(0, 1) the network's input would not have unit variance, nor t its noise level."""
    seen = []
    class Spy(Mlp):
        def F(self, x, t, y=None):
            seen.append(x)
            return super().F(x, t, y)
    monkeypatch.setattr(scm, "times", lambda n, *a: torch.full((n, 1, 1, 1), math.pi / 2, dtype=torch.float64))
    scm.loss_fn(Spy(), None, torch.zeros(20_000, 2, 1, 1).double(), None, 0, scm.Args(sd=SD), lambda: None)
    assert abs(seen[-1].std() - SD) < 0.01


# ---- training ------------------------------------------------------------------------------------
def fit(mode, iters, seed=0):
    """Train an MLP on Gaussian data with scm's own loss; relative error of f(., t_max) against the exact map."""
    net, teacher = Mlp(seed, width=64).float(), Exact(velocity=True)
    args = scm.Args(mode=mode, sd=SD, H=iters // 3, P_mean=-0.8, P_std=1.4)
    opt = torch.optim.RAdam(net.parameters(), lr=3e-3, betas=(0.9, 0.99))
    ema = {k: v.clone() for k, v in net.state_dict().items()}
    for it in range(iters):
        torch.manual_seed(it)
        opt.param_groups[0]["lr"] = 3e-3 * (1 - it / iters)
        x0 = S.float() * torch.randn(256, 2, 1, 1)
        loss, _ = scm.loss_fn(net, teacher, x0, None, it, args, lambda: None)
        opt.zero_grad()
        loss.backward()
        opt.step()
        for k, v in net.state_dict().items():
            ema[k].lerp_(v, 0.02)
    net.load_state_dict(ema)
    torch.manual_seed(1)
    x, t = SD * torch.randn(4096, 2, 1, 1), torch.full((4096, 1, 1, 1), math.atan(80 / SD))
    with torch.no_grad():
        exact = Exact()(x.double(), t.double())
        return float((net(x, t) - exact).norm() / exact.norm())


@pytest.mark.parametrize("mode, bound", [("scd", 0.08), ("sct", 0.13)])
def test_training_finds_the_exact_map(mode, bound):
    """Noise to data in one step, from the loss alone. Untrained, the error is about 1; this long, 5 and 9 %."""
    assert fit(mode, 300) < bound


# ---- sampling ------------------------------------------------------------------------------------
def test_sampling_times():
    """arctan(80 / sd), then t_mid; levels in between are geometric in sigma."""
    seen = []
    def net(x, t, y):
        seen.append(float(t[0]))
        return 0 * x
    mid = math.atan(math.sqrt(80 * 0.5 * math.tan(1.1)) / 0.5)
    for k, expect in ((1, [1.564546]), (2, [1.564546, 1.1]), (3, [1.564546, mid, 1.1])):
        seen.clear()
        scm.sample(net, torch.randn(k, 2, 1, 2, 2, dtype=torch.float64), None, scm.Args())
        assert torch.allclose(torch.tensor(seen), torch.tensor(expect), atol=1e-6)


def test_samples_of_the_exact_function_have_the_exact_spread(monkeypatch):
    """From N(0, sd^2) any number of steps keeps the spread of the data; N(0, 1), or cos and sin exchanged, would not."""
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *a: x)
    torch.manual_seed(0)
    for k in (1, 2, 4):
        x = scm.sample(Exact(), torch.randn(k, 100_000, 2, 1, 1, dtype=torch.float64), None, scm.Args(sd=SD))
        assert torch.allclose(x.flatten(1).std(0), S.flatten(), rtol=0.01)


def test_images_stay_in_range_and_depend_on_their_own_noise():
    noise = torch.randn(2, 3, 2, 1, 1, dtype=torch.float64)
    whole = scm.sample(Exact(), 3 * noise, None, scm.Args())
    assert whole.dtype == torch.float64 and whole.abs().max() == 1
    assert torch.equal(whole[1:2], scm.sample(Exact(), 3 * noise[:, 1:2], None, scm.Args()))


# ---- copying -------------------------------------------------------------------------------------
def test_sections_1_to_3_run_in_a_bare_namespace():
    """The copy-paste promise: with torch, math and jvp alone, a toy network and a SimpleNamespace."""
    text = (ROOT / "scm.py").read_text()
    names = dict(torch=torch, math=math, jvp=jvp)
    exec(text[text.index("# ==== 1."):text.index("# ==== 4.")], names)
    args = SimpleNamespace(mode="sct", jvp="exact", norm="l2", c=0.1, H=10, P_mean=-1.0, P_std=1.4, t_mid=1.1,
                           sigma_max=80.0, sd=0.5)
    w = torch.tensor(0.5, requires_grad=True)
    net = SimpleNamespace(F=lambda x, t, y: w * x * t, weigh=lambda t: 0 * t.flatten())
    loss, _ = names["loss_fn"](net, None, torch.randn(4, 3, 8, 8), None, 5, args, lambda: torch.manual_seed(0))
    loss.backward()
    assert w.grad.isfinite() and names["sample"](lambda x, t, y: x, torch.randn(2, 4, 3, 8, 8), None, args).shape == (4, 3, 8, 8)


# ---- runs ----------------------------------------------------------------------------------------
@pytest.fixture
def edm(tmp_path):
    """A checkpoint of an EDM model, or, with another `wrap`, of a TrigFlow one."""
    def save(wrap=EDM, name="edm.pt", sd=0.75, **kw):
        torch.manual_seed(0)
        net = wrap(UNet(**dict(size=8, channels=1, ch=16, mult=(1, 2), blocks=1, attn=(4,)) | kw), sd)
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
        torch.save(dict(model=net.spec, ema=net.state_dict()), tmp_path / name)
        return str(tmp_path / name)
    return save


@pytest.fixture
def quick(train, monkeypatch):
    """train("scm", ..) without the teacher's figure and with few images."""
    monkeypatch.setattr(teachers, "show", lambda *_: None)
    return lambda *flags: train("scm", "--iters", "2", *flags)


@pytest.mark.parametrize("mode", ["sct", "scd"])
def test_a_student_of_an_edm_model_starts_as_that_model(mode, quick, edm, monkeypatch):
    """F = -F_edm with EDM's own embedding; the mode is part of the folder's name; a new weight head; resume works,
    and for sCD loads the teacher again."""
    path = edm()
    _, run = quick("--teacher", path, "--mode", mode, "--lr", "1e-20")
    assert run.name == f"scm-{mode}-digits-000" and config(run)["flow"] == "edm"
    net, teacher = teachers.load(run), teachers.load(path)
    assert (net.spec["flow"], net.raw, teacher.spec["flow"]) == ("trig", "edm", "edm")
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1, 20]).view(-1, 1, 1, 1)
    assert torch.allclose(net.denoise(x, sigma), teacher(x, sigma), atol=1e-5) and net.head.weight.abs().max() < 1e-15
    loaded = []
    monkeypatch.setattr(teachers, "load", lambda *a, f=teachers.load: loaded.append(a[0]) or f(*a))
    quick("--resume", str(run), "--iters", "3")
    assert list(map(str, loaded)) == ([path] if mode == "scd" else [])


def test_a_student_of_a_trigflow_model_takes_its_embedding_and_norm(quick, edm):
    path = edm(TrigFlow, "trig.pt", norm="double")
    _, run = quick("--teacher", path, "--flow", "edm")
    net = teachers.load(run)
    assert config(run)["flow"] == "trig" and net.raw == "trig" and net.model.kwargs["norm"] == "double"
    before, after = teachers.load(path).state_dict(), weights(run)
    changed = {k for k in after if not torch.equal(before[k], after[k])}
    assert "head.weight" in changed and "model.map_layer0.weight" in changed    # the weight head learns, too


@pytest.mark.parametrize("net", [("dit", "--ch", "16"), ("ncsnpp",), ("adm", "--ch", "64", "--mult", "1,1")])
def test_every_network_trains_and_resumes(net, quick):
    """Each has its own way to be made for TrigFlow, and none may forget it in the checkpoint or on --resume."""
    _, run = quick("--net", *net)
    before = teachers.load(run)
    quick("--resume", str(run), "--iters", "3")
    after = teachers.load(run)
    assert before.spec == after.spec and after.raw == "trig" and after.spec["net"] == net[0]
    assert after.model.kwargs.get("norm") == (None if net[0] == "dit" else "double")


def test_optimiser_and_learning_rate(train):
    """RAdam with the paper's betas; warm-up, then 1/sqrt(step) from --decay on, and constant without."""
    flags = "--iters", "4", "--lr", "1e-3", "--log-every", "1", "--save-every", "4"
    for more, expect in ((("--lr-decay", "2"), [1, 1, 1, (2 / 3) ** 0.5]), (("--lr-decay", "0"), [1, 1, 1, 1]),
                         (("--lr-decay", "2", "--warmup", "2"), [0.5, 1, 1, (2 / 3) ** 0.5])):
        _, run = train("scm", *flags, *more)
        assert [r["lr"] for r in lines(run / "log.jsonl")] == pytest.approx([1e-3 * e for e in expect], rel=1e-4)
    group = torch.load(run / "ckpt.pt")["opt"]["param_groups"][0]
    assert (tuple(group["betas"]), group["weight_decay"], group["eps"]) == ((0.9, 0.99), 0, 1e-8)


def test_teacher_found_must_have_the_flow(tmp_path, train, monkeypatch, capsys):
    """auto: `flow` tells two folders with the same network apart; older folders, which do not say, hold EDM."""
    monkeypatch.setattr(teachers, "show", lambda *_: None)
    _, edm = train("common.teacher", "--iters", "2", "--steps", "1")
    _, trig = train("common.teacher", "--iters", "2", "--steps", "1", "--flow", "trig")
    assert build(torch.load(trig / "ckpt.pt")["model"]).raw == "trig"
    for flow, folder in (("edm", edm), ("trig", trig)):
        _, run = train("scm", "--teacher", "auto", "--teacher-iters", "2", "--flow", flow, "--iters", "1")
        assert config(run)["teacher"] == str(folder) and config(run)["flow"] == flow
    (edm / "config.json").write_text((edm / "config.json").read_text().replace('"flow": "edm",', ""))
    _, run = train("ect", "--teacher", "auto", "--teacher-iters", "2", "--iters", "1")
    assert config(run)["teacher"] == str(edm)
    _, run = train("scm", "--teacher", "train", "--teacher-iters", "1", "--iters", "1", "--mode", "scd")
    assert config(Path(config(run)["teacher"]))["flow"] == "trig"


@pytest.mark.parametrize("H, it, ramp", [(0, 0, 1), (4, 0, 0), (4, 1, 0.25), (4, 9, 1)])
def test_the_tangent_is_warmed_up_over_H_steps(H, it, ramp):
    """A first step of diffusion training although H is 0, or a ramp that ends late or never."""
    net = TrigFlow(UNet(size=8, channels=1, ch=16, mult=(1,), blocks=1, attn=()), SD)
    _, stats = scm.loss_fn(net, None, torch.rand(4, 1, 8, 8), None, it, scm.Args(H=H, sd=SD), lambda: None)
    assert stats["ramp"] == ramp


@pytest.mark.parametrize("flags, words", [
    (["--compile", "--dropout", "0.1"], "--dropout 0"), (["--mode", "scd", "--teacher", "none"], "nothing to distil"),
    (["--t-mid", "1.6"], "--t-mid"), (["--sigma-max", "0"], "--sigma-max"), (["--c", "0"], "--c must be above 0"),
    (["--t-mid", "1.5", "--sigma-max", "5"], "below the time of --sigma-max"),
    (["--H", "-1"], "--H"), (["--mode", "ct"], "invalid choice"), (["--sd", "0.5"], "0.75")])
def test_a_mistake_is_one_line(flags, words, train, edm, capsys, tmp_path):
    """No folder, no traceback, no teacher trained first."""
    teacher = [] if "--teacher" in flags else ["--teacher", edm()]
    with pytest.raises(SystemExit) as e:
        train("scm", *teacher, *flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_trigflow_teacher_is_refused_by_a_method_in_edms_variables(train, edm, capsys):
    with pytest.raises(SystemExit):
        train("ect", "--teacher", edm(TrigFlow))
    err = capsys.readouterr().err
    assert "TrigFlow" in err and err.count("\n") == 1


def test_the_released_teacher_is_an_edm_model(capsys):
    """fast starts from it; paper wants a TrigFlow teacher, of which none is released: one line says how to get one."""
    from common.flags import parse
    ask = lambda *flags: teachers.released.address(
        parse(scm.Args, scm.PRESETS, ["--dataset", "cifar10", "--preset", *flags]), teachers.Args)
    assert ask("fast") == ask("paper", "--flow", "edm") and ask("fast").endswith("uncond-vp.pkl")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ask("paper")
    err = capsys.readouterr().err
    assert "flow" in err and "--teacher train" in err and err.count("\n") == 1


def test_the_mode_has_a_preset_of_its_own():
    """sCD: dropout 0, whatever the size of the run; what was typed wins."""
    from common.flags import parse
    drop = lambda *flags: parse(scm.Args, scm.PRESETS, ["--dataset", "cifar10", "--preset", "paper", *flags]).dropout
    assert (drop(), drop("--mode", "sct"), drop("--mode", "scd")) == (0.2, 0.2, 0.0)
    assert drop("--mode", "scd", "--dropout", "0.1") == 0.1


def test_the_probe_runs_before_anything_is_written(train, monkeypatch, tmp_path):
    """A network that loses tangents must not train; with --jvp fd it may."""
    from common import unet
    monkeypatch.setattr(unet, "attention", lambda q, k, v: (q.detach() @ k.transpose(-2, -1)).softmax(-1) @ v)
    with pytest.raises(RuntimeError, match="off by"):
        train("scm")
    assert not (tmp_path / "runs").exists()
    train("scm", "--jvp", "fd", "--iters", "1")

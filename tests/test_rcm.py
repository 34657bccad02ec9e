"""rCM's losses, rollouts and schedules against the formulas written a second time for data of unit spread (as the paper and
the authors' code have them), by difference quotients, and against exact solutions for Gaussian data."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, equal, lines, weights
from test_run import back_to, ckpt, config, same
from test_scm import SD, Exact, Mlp, S, edm  # noqa: F401  (edm is a fixture)

import rcm
import scm
from common import teacher as teachers
from common.jvp import jvp
from common.precond import EDM, TrigFlow

B = 5
ARGS = dict(sd=SD, P_mean=-0.7, D_mean=0.3)               # two means tell p_G and p_D apart


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Labelled(Mlp):
    """F depends on the label; None is the network without one."""
    def F(self, x, t, y=None):
        return super().F(x, t) + (0 if y is None else 0.3 * y.view(-1, 1, 1, 1) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1))


class Draws:
    """Stands in for all that is random: `eps` for torch.randn_like, times per distribution, in the order of the calls."""
    def __init__(self, monkeypatch, N):
        self.N, self.eps = N, normal(N + 2, B, 2, 1, 1, seed=1)
        self.t_G = torch.tensor([0.05, 0.4, 0.9, 1.3, 1.5], dtype=torch.float64).view(-1, 1, 1, 1)
        self.t_D = (0.1 + 1.4 * torch.rand(N, B, 1, 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
        self.calls, self.drawn = [], 0
        monkeypatch.setattr(rcm, "rounds", lambda it, args: N)
        monkeypatch.setattr(rcm, "times", self.times)
        monkeypatch.setattr(torch, "randn_like", self.randn_like)

    def randn_like(self, x):
        """The next slice of eps, or as many as x [N,B,C,H,W] has."""
        n = len(x) if x.dim() == 5 else 1
        out, self.drawn = self.eps[self.drawn:][:n].to(x.dtype), self.drawn + n
        return out if x.dim() == 5 else out[0]

    def times(self, x0, mean, std, args):
        self.calls.append((mean, std))
        if (mean, std) == (args.P_mean, args.P_std):
            return self.t_G.to(x0.dtype)
        return self.t_D[sum(c == (args.D_mean, args.D_std) for c in self.calls) - 1].to(x0.dtype)


# ---- the formulas again, for data of unit spread -------------------------------------------------
# x is in units of sd; a network is F(x, t, y), its denoiser cos(t) x - sin(t) F
class Unit:
    def __init__(self, net, guidance=0.0):
        self.net, self.w = net, 1 + guidance

    def F(self, x, t, y=None):
        run = lambda y: self.net.F(x * SD, t, y)
        return run(y) if self.w == 1 else run(None) + self.w * (run(y) - run(None))

    def x0(self, x, t, y=None):
        return torch.cos(t) * x - torch.sin(t) * self.F(x, t, y)


def oracle_scm(net, teacher, x0, eps, t, y, r):
    """Per-sample loss, and the vector that multiplies dF in its gradient."""
    xt, h = torch.cos(t) * x0 + torch.sin(t) * eps, 1e-4
    with torch.no_grad():
        FT, F = teacher.F(xt, t, y), net.F(xt, t, y)
        D = lambda h: (net.F(xt + h * FT, t + h, y) - net.F(xt - h * FT, t - h, y)) / (2 * h)
        total = (4 * D(h) - D(2 * h)) / 3                 # Richardson: the error falls like h^4
        g = -torch.cos(t) * torch.sqrt(1 - r**2 * torch.sin(t) ** 2) * (F - FT)
        g = g - (r * torch.cos(t) * torch.sin(t) * xt + torch.cos(t) * torch.sin(t) * total)
        g = torch.stack([gi / (torch.linalg.vector_norm(gi) + 0.1) for gi in g])
    return torch.stack([(gi**2).sum() for gi in g]), -2 * g


def oracle_rollout(net, eps, times, y):
    x = eps[0]
    for n, t in enumerate(times):
        with torch.set_grad_enabled(n == len(times) - 1):
            x0 = net.x0(x, t, y)
        if n + 1 < len(times):
            x = torch.cos(times[n + 1]) * x0 + torch.sin(times[n + 1]) * eps[n + 1]
    return x0


def oracle_dmd(net, fake, teacher, eps, times, t, eps_D, y):
    x0 = oracle_rollout(net, eps, times, y)
    with torch.no_grad():
        xt = torch.cos(t) * x0 + torch.sin(t) * eps_D
        a, b = fake.x0(xt, t, y), teacher.x0(xt, t, y)
        W = torch.stack([(x - bi).abs().mean() for x, bi in zip(x0, b)]).view(-1, 1, 1, 1)
        q = (a - b) / W
    return (q**2).sum((1, 2, 3)), x0, 2 * q


def oracle_times(draws, args, N):
    t = torch.full((B, 1, 1, 1), math.atan(args.sigma_max / args.sd), dtype=torch.float64)
    out = [t]
    for n in range(N - 1):
        t = torch.minimum(t, draws.t_D[n])
        out.append(t)
    return out


def gradient(loss, net):
    net.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in net.seq.parameters()]


@pytest.mark.parametrize("N", [1, 2, 3, 4])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("it, H", [(0, 0), (9, 0), (10, 10)])
def test_student_loss_and_gradient(N, guidance, it, H, monkeypatch):
    """Each factor of sd, sin and cos, the sums, the weights 100 : 1, the guidance of the teacher alone, the monotone times,
    W, and gradients through the last step and one call of F only."""
    net, fake, teacher = Labelled(0), Labelled(1), Labelled(2)
    y, x0 = torch.tensor([0, 1, 2, 3, 1]), 0.4 * normal(B, 2, 1, 1)
    draws, args = Draws(monkeypatch, N), rcm.Args(H=H, guidance=guidance, **ARGS)
    loss, stats = rcm.loss_fn(net, fake, teacher, x0, y, it, args, lambda: None)
    grads = gradient(loss, net)
    assert loss.dtype == torch.float64 and all(p.grad is None for m in (fake, teacher) for p in m.parameters())

    student, unit_fake, unit_teacher = Unit(net), Unit(fake), Unit(teacher, guidance)
    a, da = oracle_scm(student, unit_teacher, x0 / SD, draws.eps[0], draws.t_G, y, 1.0)
    b, x, db = oracle_dmd(student, unit_fake, unit_teacher, draws.eps[2:], oracle_times(draws, args, N), draws.t_D[N - 1],
                          draws.eps[1], y)
    assert torch.allclose(stats["loss"], 100 * a + b, rtol=1e-8) and torch.allclose(loss, (100 * a + b).mean(), rtol=1e-8)
    x_t = SD * (torch.cos(draws.t_G) * x0 / SD + torch.sin(draws.t_G) * draws.eps[0])
    surrogate = ((100 * da * net.F(x_t, draws.t_G, y)).sum() + (db * x).sum()) / B
    want = torch.autograd.grad(surrogate, list(net.seq.parameters()))
    for g, w in zip(grads, want):
        assert torch.allclose(g, w, rtol=1e-7, atol=1e-8) and w.abs().max() > 1e-3
    assert torch.allclose(stats["t"], SD * torch.tan(draws.t_G)) and stats["dmd"] == pytest.approx(float(b.mean()))


@pytest.mark.parametrize("it, r", [(0, 0.0), (4, 0.4), (9, 0.9), (10, 1.0), (25, 1.0)])
def test_tangent_warm_up(it, r, monkeypatch):
    """r scales the term of x_t and the root, not the derivative, unlike sCM's; before H there is no part of scores."""
    net, teacher, x0 = Mlp(0), Mlp(2), 0.4 * normal(B, 2, 1, 1)
    draws, args = Draws(monkeypatch, 2), rcm.Args(H=10, loss_scale=3.0, lambda_dmd=0.0 if it >= 10 else 1.0, **ARGS)
    loss, stats = rcm.loss_fn(net, None, teacher, x0, None, it, args, lambda: None)
    grads = gradient(loss, net)
    d, dd = oracle_scm(Unit(net), Unit(teacher), x0 / SD, draws.eps[0], draws.t_G, None, r)
    x_t = torch.cos(draws.t_G) * x0 + SD * torch.sin(draws.t_G) * draws.eps[0]
    want = torch.autograd.grad((3 * dd * net.F(x_t, draws.t_G)).sum() / B, list(net.seq.parameters()))
    assert torch.allclose(stats["loss"], 3 * d, rtol=1e-8) and stats["ramp"] == pytest.approx(r)
    assert all(torch.allclose(g, w, rtol=1e-7, atol=1e-8) for g, w in zip(grads, want))


@pytest.mark.parametrize("N", [1, 2, 4])
def test_fake_loss_and_gradient(N, monkeypatch):
    """|x - f_fake|^2 / sin^2 in units of sd, without guidance and without a gradient for the student."""
    net, fake, y = Labelled(0), Labelled(1), torch.tensor([0, 1, 2, 3, 1])
    draws, args = Draws(monkeypatch, N), rcm.Args(guidance=2.0, **ARGS)
    loss, stats = rcm.fake_loss_fn(net, fake, torch.zeros(B, 2, 1, 1), y, 7, args)
    grads = gradient(loss, fake)
    assert all(p.grad is None for p in net.parameters())
    x0 = oracle_rollout(Unit(net), draws.eps[1:], oracle_times(draws, args, N), y).detach()
    t = draws.t_D[N - 1]
    x_t = torch.cos(t) * x0 + torch.sin(t) * draws.eps[0]
    d = ((x0 - Unit(fake).x0(x_t, t, y)) ** 2 / torch.sin(t) ** 2).sum((1, 2, 3))
    want = torch.autograd.grad(d.mean(), list(fake.seq.parameters()))
    assert torch.allclose(stats["loss"], d) and torch.allclose(loss, d.mean()) and stats["fake"] == loss
    assert all(torch.allclose(g, w, rtol=1e-9, atol=1e-12) for g, w in zip(grads, want)) and want[0].abs().max() > 1e-3


def test_without_dmd_it_is_scd_with_unit_weights(monkeypatch):
    """--lambda-dmd 0: loss_scale times scm.py's own loss, whose c is in units of the data, with w = 0."""
    net, teacher, x0 = Mlp(0), Mlp(2), 0.4 * normal(B, 2, 1, 1)
    draws = Draws(monkeypatch, 0)
    monkeypatch.setattr(scm, "times", lambda *a: draws.t_G)
    a = gradient(rcm.loss_fn(net, None, teacher, x0, None, 5, rcm.Args(lambda_dmd=0.0, **ARGS), lambda: None)[0], net)
    monkeypatch.setattr(torch, "randn_like", lambda x: draws.eps[0])
    args = scm.Args(mode="scd", H=0, c=0.1 * SD, sd=SD)
    b = gradient(scm.loss_fn(net, teacher, x0, None, 5, args, lambda: None)[0], net)
    assert all(torch.allclose(p, 100 * q, rtol=1e-9, atol=1e-12) for p, q in zip(a, b)) and a[0].abs().max() > 1e-3


def test_without_consistency_it_is_dmd(monkeypatch):
    """--loss-scale 0: no derivative, no times of p_G; the gradient is that of DMD alone."""
    net, fake, teacher, x0 = Mlp(0), Mlp(1), Mlp(2), normal(B, 2, 1, 1)
    draws, args = Draws(monkeypatch, 2), rcm.Args(loss_scale=0.0, lambda_dmd=0.5, **ARGS)
    monkeypatch.setattr(rcm, "jvp", None)
    loss, stats = rcm.loss_fn(net, fake, teacher, x0, None, 0, args, None)
    grads = gradient(loss, net)
    d, x, dd = oracle_dmd(Unit(net), Unit(fake), Unit(teacher), draws.eps[2:], oracle_times(draws, args, 2), draws.t_D[1],
                          draws.eps[1], None)
    want = torch.autograd.grad((0.5 * dd * x).sum() / B, list(net.seq.parameters()))
    assert torch.allclose(loss, 0.5 * d.mean()) and all(torch.allclose(g, w, atol=1e-12) for g, w in zip(grads, want))
    assert torch.allclose(stats["t"], SD * torch.tan(draws.t_D[1])) and "tangent" not in stats


# ---- rollouts ------------------------------------------------------------------------------------
def test_random_rollout_times_never_rise():
    """The first is t_max; the next are draws of p_D, each image its own, cut at the one before."""
    torch.manual_seed(0)
    args, x0 = rcm.Args(sd=SD, D_mean=0.5, D_std=1.2), torch.zeros(50_000, 1, 1, 1, dtype=torch.float64)
    ts = rcm.rollout_times(3, x0, args)
    assert ts.shape == (3, 50_000, 1, 1, 1) and ts.dtype == torch.float64 and (ts[0] == math.atan(80 / SD)).all()
    assert (ts[1:] <= ts[:-1]).all() and (ts[2] < ts[1]).double().mean() == pytest.approx(0.5, abs=0.01)
    tau = (SD * ts[1].tan()).log()
    assert rcm.times(x0, 0.0, 1.0, args).dtype == torch.float64
    assert tau.mean() == pytest.approx(0.5, abs=0.02) and tau.std() == pytest.approx(1.2, abs=0.02)
    assert rcm.rollout_times(1, x0, args).shape[0] == 1


def test_fixed_rollouts_are_the_sampler(monkeypatch):
    """From the same noise the images are those of --steps N, not clipped."""
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *a, **k: x)
    net = Exact()
    for N in (1, 2, 3):
        args, noise = rcm.Args(sd=SD, rollout="fixed"), normal(N, B, 2, 1, 1)
        assert torch.allclose(rcm.rollout(net, SD * noise, None, args), rcm.sample(net, noise, None, args), atol=1e-12)


def test_the_number_of_rollout_steps_is_uniform_and_follows_the_step():
    """1 .. N_max, each as often; the same when asked again, whatever the generator's state: ranks must agree."""
    args = rcm.Args(N_max=4)
    a = [rcm.rounds(it, args) for it in range(4000)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert a == [rcm.rounds(it, args) for it in range(4000)] and torch.equal(before, torch.get_rng_state())
    for n in (1, 2, 3, 4):
        assert a.count(n) == pytest.approx(1000, abs=90)
    students = [a[it] for it in range(0, 4000, 5)]        # the student's steps alone, and neighbours
    assert all(students.count(n) == pytest.approx(200, abs=45) for n in (1, 2, 3, 4))
    assert sum(p == q for p, q in zip(a, a[1:])) == pytest.approx(1000, abs=90)


# ---- schedules -----------------------------------------------------------------------------------
@pytest.mark.parametrize("H, F", [(0, 5), (7, 5), (3, 2), (10, 10)])
def test_whose_step_it_is(H, F):
    """All of the first H, then the first of each F; counted, not computed."""
    args, made = rcm.Args(H=H, student_every=F), 0
    for it in range(60):
        mine = it in range(H) or it in range(H, 60, F)
        assert rcm.is_students(it, args) == mine and rcm.updates(it, args) == made
        assert rcm.is_students(it, rcm.Args(H=H, student_every=F, lambda_dmd=0.0))
        assert rcm.updates(it, rcm.Args(H=H, student_every=F, lambda_dmd=0.0)) == it
        made += mine


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_the_average_is_as_wide_as_asked(sigma_rel):
    """The weights that it gives to the networks of the past have the standard deviation sigma_rel, in units of the updates
    made; steps of fake do not count."""
    args, n = rcm.Args(sigma_rel=sigma_rel, H=100, student_every=5), 3000
    w, its = torch.zeros(0, dtype=torch.float64), 100 + 5 * (n - 100)
    for it in range(its):
        decay = rcm.average(it, args)
        assert (decay == 1) == (not rcm.is_students(it, args))
        if decay < 1:
            w = torch.cat([w * decay, torch.tensor([1 - decay], dtype=torch.float64)])
    at = (torch.arange(n) + 0.5) / n
    mean = (w * at).sum()
    assert len(w) == n and w.sum() == pytest.approx(1)
    assert float((w * (at - mean) ** 2).sum() ** 0.5) == pytest.approx(sigma_rel, rel=0.01)
    assert rcm.average(0, args) == 0                      # the first copies the network
    gamma = math.log(rcm.average(100, args)) / math.log(1 - 1 / 101) - 1
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-4)


def test_the_exponent_of_the_average():
    """The worked values of EDM2, and what the exponent means: weights k^g have the spread that was asked for."""
    assert rcm.power(0.05) == pytest.approx(16.97, abs=0.01) and rcm.power(0.1) == pytest.approx(6.94, abs=0.01)
    k = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for width in (0.03, 0.05, 0.15):
        w = k ** rcm.power(width)
        mean = (w * k).sum() / w.sum()
        assert float(((w * (k - mean) ** 2).sum() / w.sum()).sqrt()) == pytest.approx(width, rel=1e-3)


def test_a_constant_decay_can_be_had():
    """--sigma-rel 0: --ema, with the ramp of the other files, over updates of the student."""
    args = rcm.Args(sigma_rel=0.0, ema=0.9, H=0, student_every=5)
    assert [rcm.average(it, args) for it in (0, 1, 5, 1000)] == [0.1, 1.0, 2 / 11, 0.9]


# ---- exact solutions -----------------------------------------------------------------------------
def test_the_exact_function_is_a_fixed_point(monkeypatch):
    """Both parts vanish for the consistency function of Gaussian data, with the teacher's score for its images; the scale of
    its images is wrong, and so is the score, for any other."""
    teacher, args = Exact(velocity=True), rcm.Args(D_mean=0.0, c=1.0, **{k: v for k, v in ARGS.items() if k != "D_mean"})
    x0 = S * normal(64, 2, 1, 1)
    torch.manual_seed(0)
    loss, stats = rcm.loss_fn(Exact(), teacher, teacher, x0, None, 3, args, lambda: None)
    assert stats["tangent"] < 1e-6 and stats["dmd"] < 1e-20 and loss < 1e-9


class Scale(torch.nn.Module):
    """f(x, t) = a / sqrt(var) x: images of N(0, a^2) in any number of steps; a is learned."""
    def __init__(self, a):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float64).view(1, 2, 1, 1))

    def var(self, t):
        return (t.cos() * self.a) ** 2 + (t.sin() * SD) ** 2

    def F(self, x, t, y=None):
        return (t.cos() - self.a / self.var(t).sqrt()) * x / (SD * t.sin())


class Score(Scale):
    """The diffusion model of N(0, a^2)."""
    def F(self, x, t, y=None):
        return t.sin() * t.cos() * (SD**2 - self.a**2) / self.var(t) * x / SD


def test_dmd_alone_finds_the_teachers_spread():
    """--loss-scale 0 with the exact score of the student's images: gradient descent ends at the teacher's spread, from above
    and from below. A sign, or fake and teacher exchanged, leads away from it."""
    net, teacher = Scale([0.3, 0.6]), Exact(velocity=True)                # S is 0.9 and 0.2
    args = rcm.Args(loss_scale=0.0, N_max=2, **ARGS)
    opt = torch.optim.Adam(net.parameters(), lr=0.02)
    for it in range(150):
        torch.manual_seed(it)
        fake = Score(net.a.detach().flatten().tolist())
        loss, _ = rcm.loss_fn(net, fake, teacher, torch.zeros(256, 2, 1, 1), None, it, args, lambda: None)
        opt.zero_grad()
        loss.backward()
        opt.param_groups[0]["lr"] = 0.02 * (1 - it / 150)
        opt.step()
    assert torch.allclose(net.a, S, atol=0.02)


def test_fake_finds_the_score_of_the_students_images():
    net, fake, args = Scale([0.3, 0.6]), Score([0.8, 0.8]), rcm.Args(N_max=2, **ARGS)
    opt = torch.optim.Adam(fake.parameters(), lr=0.02)
    for it in range(150):
        torch.manual_seed(it)
        loss, _ = rcm.fake_loss_fn(net, fake, torch.zeros(512, 2, 1, 1), None, it, args)
        opt.zero_grad()
        loss.backward()
        opt.param_groups[0]["lr"] = 0.02 * (1 - it / 150)
        opt.step()
    assert torch.allclose(fake.a, net.a, atol=0.02) and net.a.grad is None


def test_all_calls_of_the_derivative_share_a_dropout_mask():
    masks = []
    class Drop(torch.nn.Module):
        def F(self, x, t, y=None):
            masks.append(torch.rand(4))
            return x * t
    class Still(torch.nn.Module):
        def F(self, x, t, y=None):
            return x * t
    torch.manual_seed(5)
    rcm.loss_fn(Drop(), None, Still(), torch.zeros(4, 1, 2, 2), None, 0, rcm.Args(lambda_dmd=0.0), lambda: torch.manual_seed(6))
    assert len(masks) == 2 and torch.equal(*masks)


def test_sampling_times_and_range():
    """arctan(80 / sd), t_mid, geometric between; images within [-1, 1] that depend on their own noise."""
    args = rcm.Args()
    mid = math.atan(math.sqrt(80 * 0.5 * math.tan(1.1)) / 0.5)
    for k, expect in ((1, [1.564546]), (2, [1.564546, 1.1]), (3, [1.564546, mid, 1.1])):
        assert torch.allclose(rcm.sampling_times(k, args), torch.tensor(expect, dtype=torch.float64), atol=1e-6)
    noise = normal(2, 3, 2, 1, 1)
    whole = rcm.sample(Exact(), 3 * noise, None, args)
    assert whole.dtype == torch.float64 and whole.abs().max() == 1
    assert torch.equal(whole[1:2], rcm.sample(Exact(), 3 * noise[:, 1:2], None, args))


def test_sections_1_to_3_run_in_a_bare_namespace():
    """The copy-paste promise: with torch, math and jvp alone, toy networks and a SimpleNamespace."""
    text = (ROOT / "rcm.py").read_text()
    names = dict(torch=torch, math=math, jvp=jvp)
    exec(text[text.index("# ==== 1."):text.index("# ==== 4.")], names)
    args = SimpleNamespace(jvp="exact", c=0.1, H=0, student_every=5, N_max=3, loss_scale=100.0, lambda_dmd=1.0, rollout="random",
                           guidance=0.0, P_mean=-1.0, P_std=1.4, D_mean=0.0, D_std=1.6, t_mid=1.1, sigma_max=80.0, sd=0.5,
                           sigma_rel=0.05)
    w = torch.tensor(0.5, requires_grad=True)
    net, other = SimpleNamespace(F=lambda x, t, y: w * x * t), SimpleNamespace(F=lambda x, t, y: x * t.cos())
    for it in range(4):
        loss, _ = names["loss_fn"](net, other, other, torch.randn(4, 3, 8, 8), None, it, args, lambda: torch.manual_seed(0))
        loss.backward()
        names["fake_loss_fn"](other, net, torch.randn(4, 3, 8, 8), None, it, args)[0].backward()
    assert w.grad.isfinite() and 0 <= names["average"](3, args) <= 1
    assert names["sample"](lambda x, t, y: x, torch.randn(2, 4, 3, 8, 8), None, args).shape == (4, 3, 8, 8)


# ---- runs ----------------------------------------------------------------------------------------
@pytest.fixture
def quick(train, edm, monkeypatch):  # noqa: F811
    """train("rcm", ..) from a ready TrigFlow teacher, without its figure."""
    monkeypatch.setattr(teachers, "show", lambda *_: None)
    def go(*flags):
        start = [] if "--resume" in flags or "--teacher" in flags else ["--teacher", edm(TrigFlow, "trig.pt", norm="double")]
        return train("rcm", *start, *flags)
    return go


def test_two_networks_take_turns(quick):
    """A step changes the network whose turn it is, its optimiser, and with the student's the average; nothing else."""
    _, run = quick("--H", "1", "--student-every", "3", "--iters", "5", "--save-every", "1", "--keep", "--lr", "1e-3")
    saved = [ckpt(run, f"ckpt-{it:07d}.pt") for it in range(1, 6)]
    for it, (a, b) in enumerate(zip(saved, saved[1:]), 1):
        mine = it in (1, 4)
        changed = {k for k in ("net", "ema", "fake", "opt", "opt_fake") if not same({k: a[k]}, {k: b[k]})}
        assert changed == ({"net", "ema", "opt"} if mine else {"fake", "opt_fake"}), it
    teacher = torch.load(config(run)["teacher"])["ema"]
    assert all(torch.equal(v, teacher[k]) for k, v in saved[0]["fake"].items() if k.startswith("model."))
    assert equal(saved[0]["ema"], saved[0]["net"])        # a power function starts with a copy


@pytest.mark.parametrize("stop", [2, 5, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (1, 3, 4))])
def test_resume_is_exact_at_any_turn(stop, quick, tmp_path):
    """Two networks, two optimisers, the average: all are kept, whichever has the next step."""
    _, whole = quick("--H", "2", "--student-every", "2", "--iters", "6", "--save-every", "1", "--keep", "--dropout", "0.2", "--lr", "1e-3")
    cut = back_to(whole, stop, tmp_path / "cut")
    quick("--resume", str(cut))
    assert same(ckpt(whole), ckpt(cut))


def test_dropout_is_the_students_alone(quick, monkeypatch):
    """A fake that drops units, as it is trained or as it scores, would be another model than the one compared."""
    seen, loss_fn, fake_loss_fn = [], rcm.loss_fn, rcm.fake_loss_fn
    monkeypatch.setattr(rcm, "loss_fn", lambda net, fake, teacher, *a: (
        seen.append((net.training, fake.training, teacher.training)) or loss_fn(net, fake, teacher, *a)))
    monkeypatch.setattr(rcm, "fake_loss_fn", lambda net, fake, *a: (
        seen.append((net.training, fake.training, False)) or fake_loss_fn(net, fake, *a)))
    quick("--dropout", "0.5", "--student-every", "2", "--iters", "2")
    assert seen == [(True, False, False)] * 2


def test_optimisers(quick):
    """AdamW without momentum, fake at its share of the learning rate, warm-up, and no clipping anywhere."""
    _, run = quick("--H", "1", "--student-every", "2", "--iters", "4", "--lr", "1e-3", "--fake-lr", "0.5", "--warmup", "2", "--log-every", "1",
                   "--save-every", "4")
    assert [r["lr"] for r in lines(run / "log.jsonl")] == pytest.approx([5e-4, 1e-3, 5e-4, 1e-3])
    saved = ckpt(run)
    for name in ("opt", "opt_fake"):
        group = saved[name]["param_groups"][0]
        assert (tuple(group["betas"]), group["weight_decay"], group["eps"]) == ((0.0, 0.999), 0.01, 1e-8)
        assert "decoupled_weight_decay" not in group or group["decoupled_weight_decay"]
    assert "clip" not in (ROOT / "rcm.py").read_text()


def test_a_student_of_an_edm_model_and_of_guidance(quick, edm, tmp_path):  # noqa: F811
    """The other flow, with its embedding of ln(sigma); classes, guided; then sampled by the product."""
    path = edm(EDM, classes=10)
    _, run = quick("--teacher", path, "--cond", "--guidance", "1", "--iters", "6", "--H", "1", "--student-every", "2", "--N-max", "2")
    net = teachers.load(run)
    assert net.raw == "edm" and all(r["loss"] == r["loss"] for r in lines(run / "log.jsonl"))
    assert not equal(weights(run), torch.load(path)["ema"])
    x = net(torch.randn(2, 1, 8, 8), torch.full((2, 1, 1, 1), 1.5), torch.tensor([1, 2]))
    assert x.isfinite().all()


def test_the_log_names_what_was_measured(quick):
    """|g|, r, |q|^2 of the student's steps and the loss of fake's."""
    _, run = quick("--H", "1", "--student-every", "2", "--iters", "4", "--log-every", "4")
    assert lines(run / "log.jsonl")[-1].keys() >= {"tangent", "ramp", "dmd", "fake"}


@pytest.mark.parametrize("flags, words", [
    ("--loss-scale 0 --H 5", "--H 0"), ("--loss-scale 0 --H 0 --lambda-dmd 0", "--lambda-dmd"), ("--guidance 2", "--cond"),
    ("--teacher none", "nothing to distil"), ("--student-every 1", "--student-every"), ("--N-max 0", "--N-max"), ("--lambda-dmd -1", "--lambda-dmd"),
    ("--loss-scale nan", "--loss-scale"), ("--sigma-rel 0.3", "--sigma-rel"), ("--rollout half", "invalid choice"),
    ("--compile --dropout 0.1", "--dropout 0")])
def test_a_mistake_is_one_line(flags, words, train, edm, capsys, tmp_path):  # noqa: F811
    """No folder, no traceback, no teacher trained first."""
    start = [] if "--teacher" in flags else ["--teacher", edm()]
    with pytest.raises(SystemExit) as e:
        train("rcm", *start, *flags.split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()

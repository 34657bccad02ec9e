"""cd, ct and ict against exact solutions: what each file's own loss_fn converges to, not what it looks like."""
import math
from copy import deepcopy

import pytest
import torch

import cd
import ct
import ict
from common.precond import EDM

T_MIN, T_MAX = 0.002, 80.0
wide = lambda v: torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1, 1, 1)


# ---- the data: a mixture of Gaussians in one dimension, whose ODE paths keep the CDF ----------------
W, M, S = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.5, 0.2], [-0.8, 0.1, 0.7], [0.3, 0.2, 0.25]))


def posterior(x, t):
    """Of x0 given x at level t: weights, means and variances of the components, each [.., 3]."""
    x, t = x[..., None], torch.as_tensor(t)[..., None]
    v = S**2 + t**2
    w = torch.softmax(W.log() - (x - M) ** 2 / (2 * v) - v.log() / 2, -1)
    return w, M + S**2 / v * (x - M), S**2 * t**2 / v


def denoise(x, t, y=None):
    w, m, _ = posterior(x, t)
    return (w * m).sum(-1)


def cdf(x, t):
    return (W * torch.special.ndtr((x[..., None] - M) / (S**2 + torch.as_tensor(t)[..., None] ** 2).sqrt())).sum(-1)


def exact(x, t, y=None):
    """f(x, t): the point at level t_min with the same CDF, by bisection."""
    p, low, high = cdf(x, t), torch.full_like(x, -9), torch.full_like(x, 9)
    for _ in range(60):
        mid = (low + high) / 2
        below = cdf(mid, torch.full_like(mid, T_MIN)) < p
        low, high = torch.where(below, mid, low), torch.where(below, high, mid)
    return (low + high) / 2


def data(n):
    k = torch.multinomial(W, n, replacement=True)
    return wide(M[k] + S[k] * torch.randn(n, dtype=torch.float64))


# ---- running a file's loss_fn on chosen pairs ----------------------------------------------------
def run(module, net, x0, eps, t, r, monkeypatch, teacher=denoise, **flags):
    """loss_fn of a file with given images, noise and levels; the target is the network itself."""
    args = module.Args(**flags)
    if module is cd:
        edges = cd.karras(args.boundaries + 1, args)
        s = edges[(edges <= r.flatten()[:, None] * (1 + 1e-9)).sum(1) - 1]     # the edge below r, or r itself
        levels, models = (t, r, wide(s)), (net, net, teacher)
    else:
        levels, models = ((t, r), (net, net)) if module is ct else ((t, r, t - r), (net,))
    with monkeypatch.context() as m:
        m.setattr(module, "times", lambda *a: levels)
        m.setattr(torch, "randn_like", lambda x: eps)
        return module.loss_fn(*models, x0, None, 0, args, lambda: None)


SQUARED = dict(c=1e3)                                     # ict: pseudo-Huber is |d|^2 / 2c, its gradient linear


def moments(ts, s):
    """Images and noise with the second moments of N(0, s^2) and N(0, 1), four for each pair of levels: all that a
    squared loss of a linear f depends on."""
    x0, eps = wide([s, s, -s, -s]), wide([1.0, -1.0, 1.0, -1.0])
    n = len(ts) - 1
    return x0.repeat(n, 1, 1, 1), eps.repeat(n, 1, 1, 1), wide(ts[1:].repeat_interleave(4)), wide(ts[:-1].repeat_interleave(4))


# ---- the ODE step --------------------------------------------------------------------------------
@pytest.mark.parametrize("solver, order", [("euler", 2), ("heun", 3)])
@pytest.mark.parametrize("t", [0.3, 1.0, 5.0, 40.0])
def test_the_residual_of_the_exact_function_has_the_order_of_the_solver(solver, order, t, monkeypatch):
    """|f(x_t, t) - f(solve(x_t), r)| = O((t - r)^2) for Euler, O(.^3) for Heun. A slope taken at the wrong level or
    point, a wrong sign, the student in the teacher's place: order 1, or none."""
    torch.manual_seed(0)
    x0, eps = data(400), torch.randn(400, 1, 1, 1, dtype=torch.float64)
    rms = []
    for part in (16, 32, 64):
        level = lambda v: torch.full((400, 1, 1, 1), v, dtype=torch.float64)
        _, stats = run(cd, exact, x0, eps, level(t), level(t - t / part), monkeypatch, solver=solver)
        rms.append(stats["loss"].mean().sqrt())
    orders = [float((a / b).log2()) for a, b in zip(rms, rms[1:])]
    assert all(abs(o - order) < 0.15 for o in orders), orders


def test_guidance_is_that_of_gaussians(monkeypatch):
    """Two Gaussians of equal variance: the guided ODE is that of one with mean m_c + w (m_c - m_u). w off by one, or
    the two calls confused, moves the mean; guiding a slope of only one Heun stage is not this ODE."""
    s, w, m_c, m_u = 0.4, 1.7, 0.6, -0.1
    D = lambda m: lambda x, t, y=None: m + s**2 / (s**2 + t**2) * (x - m)
    teacher = lambda x, t, y: D(m_c if y is not None else m_u)(x, t)
    x, t, r, y = wide(torch.linspace(-3, 3, 7)), wide([1.3]), wide([0.9]), torch.zeros(7, dtype=torch.long)
    for solver in ("euler", "heun"):
        guided = cd.solve(teacher, x, t, r, y, cd.Args(guidance=w, solver=solver))
        plain = cd.solve(D(m_c + w * (m_c - m_u)), x, t, r, y, cd.Args(solver=solver))
        assert torch.allclose(guided, plain, atol=1e-12)
        assert torch.equal(cd.solve(teacher, x, t, r, y, cd.Args(solver=solver)), cd.solve(D(m_c), x, t, r, y, cd.Args(solver=solver)))


def test_the_mean_of_the_training_pair_is_the_euler_step(monkeypatch):
    """Why CT works: over all images that could be behind one x_t, the mean of x_r is the teacher's Euler step, exactly.
    Other noise at r, or a step along another slope, breaks it."""
    points, weights = torch.tensor([-0.9, -0.2, 0.3, 0.8]).double(), torch.tensor([0.1, 0.4, 0.3, 0.2]).double()
    t, r, x_t = wide([1.1]), wide([0.6]), 0.7
    p = torch.softmax(weights.log() - (x_t - points) ** 2 / (2 * t.item() ** 2), 0)       # of x0 given x_t
    seen = []

    def net(x, level, y):
        seen.append(x)
        return x
    for module in (ct, ict):
        seen.clear()
        run(module, net, wide(points), wide((x_t - points) / t.item()), t.expand(4, 1, 1, 1), r.expand(4, 1, 1, 1), monkeypatch)
        assert torch.allclose(seen[0], torch.full_like(seen[0], x_t))
        euler = cd.solve(lambda x, t, y: (p * points).sum(), wide([x_t]), t, r, None, cd.Args(solver="euler"))
        assert abs(float((p * seen[1].flatten()).sum() - euler)) < 1e-12


# ---- what training converges to: Gaussian data ---------------------------------------------------
class Slopes(torch.nn.Module):
    """f(x, t_n) = b_n / sqrt(s^2 + t_n^2) x with a free number for each level; the first is fixed by f(x, t_min) = x."""
    def __init__(self, ts, s):
        super().__init__()
        self.ts, self.scale = ts, (s**2 + ts**2).sqrt()
        self.b = torch.nn.Parameter(0.3 * torch.ones(len(ts) - 1, dtype=torch.float64))

    def slopes(self):
        return torch.cat([self.scale[:1].detach(), self.b]) / self.scale

    def forward(self, x, t, y=None):
        i = (self.ts[None] - t.reshape(-1, 1)).abs().argmin(1)
        return self.slopes()[i].view(-1, 1, 1, 1) * x


#          N: Euler and CT, Heun: standard deviation of what one step generates, over the truth
SPREAD = {5: (0.4673, 2.516), 10: (0.7304, 1.2196), 18: (0.8461, 1.0553), 40: (0.9297, 1.0098)}


@pytest.mark.parametrize("N", SPREAD)
@pytest.mark.parametrize("module, solver, K", [(cd, "euler", 1), (cd, "heun", 1), (ct, "", 1), (ict, "", 1), (cd, "heun", 0)])
def test_training_reaches_the_known_spread(module, solver, K, N, monkeypatch):
    """With N levels a linear f converges to a product of N - 1 known factors: too narrow with Euler and in CT, too
    wide with Heun. Catches a wrong solver, grid, boundary, stop-gradient, pair or noise. K = 0: with as many segments
    as there are steps, or half of them, sampling from edge to edge passes the same factors."""
    s = 0.5
    ts = module.karras(N, module.Args())
    many = [k for k in (N - 1, (N - 1) // 3) if k and (N - 1) % k == 0] if K == 0 else [1]
    for K in many:
        net = Slopes(ts, s)
        x0, eps, t, r = moments(ts, s)
        flags = dict(solver=solver, N=N, boundaries=K) if module is cd else SQUARED if module is ict else {}
        D = lambda x, t, y: s**2 / (s**2 + t**2) * x
        # ict's gradient carries 1 / 2c and the weight 1 / (t - r)
        rate = (N - 1) / 2 * (2 * SQUARED["c"] * ts.diff() if module is ict else torch.ones(N - 1).double())
        for _ in range(N - 1):                            # each pass settles one more level
            loss, _ = run(module, net, x0, eps, t, r, monkeypatch, teacher=D, **flags)
            grad, = torch.autograd.grad(loss, net.b)
            with torch.no_grad():
                net.b -= rate * grad
        truth = math.sqrt((s**2 + T_MIN**2) / (s**2 + T_MAX**2))
        args = module.Args(**flags)
        noise = torch.full((K, 1, 1, 1, 1), 1e-3, dtype=torch.float64)
        spread = float(module.sample(net, noise[:1] if K == 1 else noise, None, args)) / (1e-3 * T_MAX) / truth
        expect = SPREAD[N][solver == "heun"]
        assert abs(spread / expect - 1) < 2e-4, (K, spread)


class Scale(torch.nn.Module):
    """f(x, t) = a(t) x of one number g, exact at g = s."""
    def __init__(self, g):
        super().__init__()
        self.g = torch.nn.Parameter(torch.tensor(g, dtype=torch.float64))

    def forward(self, x, t, y=None):
        return ((self.g**2 + T_MIN**2) / (self.g**2 + t**2)).sqrt() * x


def settled(module, N, monkeypatch, s=0.5):
    """The g at which training by gradient descent from 0.5 comes to rest."""
    net, ts = Scale(0.5), module.karras(N, module.Args())
    D = lambda x, t, y: s**2 / (s**2 + t**2) * x
    opt = torch.optim.Adam(net.parameters(), lr=0.03, betas=(0.5, 0.9))
    for i in range(200):
        opt.param_groups[0]["lr"] = 0.03 * (1 - i / 200) + 1e-5
        flags = dict(N=N) if module is cd else SQUARED if module is ict else {}
        loss, _ = run(module, net, *moments(ts, s), monkeypatch, teacher=D, **flags)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return abs(float(net.g.detach()))


@pytest.mark.parametrize("module, N, g", [(ct, 18, 0.4237), (ct, 151, 0.4912), (cd, 18, 0.5343), (cd, 151, 0.50039)])
def test_one_parameter_settles_near_the_truth(module, N, g, monkeypatch):
    assert abs(settled(module, N, monkeypatch) - g) < 1e-3


@pytest.mark.parametrize("module, N, g", [(ct, 18, 0.126), (ct, 151, 0.1293), (ict, 18, 0.286), (ict, 151, 0.2887)])
def test_without_the_stop_gradient_training_collapses(module, N, g, monkeypatch):
    """The same loss with gradient in the target: the spread is 0.13 or 0.29 instead of 0.5, however many levels."""
    held = settled(module, N, monkeypatch)
    assert held > 0.42
    monkeypatch.setattr(torch, "no_grad", torch.enable_grad)
    assert abs(settled(module, N, monkeypatch) - g) < 2e-3


# ---- which distance has the right solution -------------------------------------------------------
def behind(x_t, t, n):
    """n equally likely images x0 that could be behind x_t at level t: quantiles of the posterior, and their noise."""
    w, m, v = posterior(torch.tensor(x_t).double(), torch.tensor(t).double())
    p = (torch.arange(n).double() + 0.5) / n
    low, high = torch.full((n,), -9.0).double(), torch.full((n,), 9.0).double()
    for _ in range(60):
        mid = (low + high) / 2
        below = (w * torch.special.ndtr((mid[:, None] - m) / v.sqrt())).sum(-1) < p
        low, high = torch.where(below, mid, low), torch.where(below, high, mid)
    return wide(low), wide((x_t - low) / t)


def bias(module, part, monkeypatch, t=0.5, x_t=0.55, n=501, **flags):
    """(where loss_fn has its minimum over f(x_t, t), with f exact one level below) - f(x_t, t), over t - r."""
    x0, eps = behind(x_t, t, n)
    r = t - t / part
    truth = exact(wide([x_t]), wide([t]))

    def slope(value):
        free = value.clone().requires_grad_()
        net = lambda x, level, y: free.expand(n, 1, 1, 1) if level.flatten()[0] == t else exact(x, level)
        tt, rr = (torch.full((n, 1, 1, 1), v, dtype=torch.float64) for v in (t, r))
        # the "denoiser" that knows x0 turns the ODE step into x0 + r * eps: CT, with any of cd's distances
        run(module, net, x0, eps, tt, rr, monkeypatch, teacher=lambda x, t, y: x0, **flags)[0].backward()
        return float(free.grad)
    low, high = truth - 0.1, truth + 0.1
    for _ in range(24):                                   # the gradient grows with the value: bisection
        mid = (low + high) / 2
        low, high = (mid, high) if slope(mid) < 0 else (low, mid)
    return float(low - truth) / (t - r)


def test_l1_keeps_a_bias_that_squares_and_pseudo_huber_lose(monkeypatch):
    """The sum of the biases over all levels is what remains in the end. Of l2 (the mean), and of pseudo-Huber once the
    distances are below c, a level's share falls faster than t - r; that of l1 (the median) does not. c matters: with
    ict's c = 0 it is a median, too."""
    share = lambda module, **flags: [bias(module, part, monkeypatch, **flags) for part in (20, 80)]
    for few, many in (share(ct), share(cd, distance="l2"), share(ict, c=0.3)):
        assert 3.5 < few / many < 4.5 and abs(many) < 0.002
    for few, many in (share(cd, distance="l1"), share(ict, c=1e-5)):
        assert 0.9 < few / many < 1.15 and many < -0.06
    few, many = share(cd, distance="huber")               # in one dimension c = 0.00054 is still far below
    assert few < many < -0.05


# ---- training a network on the mixture -----------------------------------------------------------
class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [6, 128, 128, 128, 1]
        self.layers = torch.nn.Sequential(*(m for a, b in zip(sizes, sizes[1:]) for m in (torch.nn.Linear(a, b), torch.nn.SiLU())))[:-1]

    def forward(self, x, c_noise, y=None):
        c = c_noise.expand(len(x))[:, None]
        return self.layers(torch.cat([x.flatten(1), c, (2 * c).sin(), (2 * c).cos(), (4 * c).sin(), (4 * c).cos()], 1)).view(x.shape)


def toy(module, iters, **flags):
    """Train a small network with a file's own schedules and loss_fn; return its averaged copy and the flags."""
    torch.manual_seed(0)
    args = module.Args(**flags, iters=iters)
    net = EDM(Mlp(), 0.5, T_MIN)
    ema, opt = deepcopy(net), torch.optim.RAdam(net.parameters())
    teacher = lambda x, t, y=None: denoise(x.double(), t.double()).float()
    models = dict(cd=(net, net, teacher), ct=(net, net), ict=(net,))[module.__name__]
    for it in range(iters):
        loss, _ = module.loss_fn(*models, data(1024).float(), None, it, args, lambda: None)
        opt.zero_grad()
        loss.backward()
        opt.param_groups[0]["lr"] = 1e-3 * (1 - 0.98 * it / iters)
        opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 0.002)
    return ema, args


def error(net, t):
    """RMS of f(x, t) - truth over the quantiles of x at level t."""
    k = torch.arange(3, 200, dtype=torch.float64) / 202.0
    low, high = torch.full_like(k, -400), torch.full_like(k, 400)
    for _ in range(60):
        mid = (low + high) / 2
        below = cdf(mid, torch.full_like(mid, t)) < k
        low, high = torch.where(below, mid, low), torch.where(below, high, mid)
    x, level = wide(low), wide([t]).expand(len(k), 1, 1, 1)
    with torch.no_grad():
        return float((net(x, level) - exact(x, level)).square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("module, iters, bound, flags", [(cd, 6_000, 0.09, dict(N=40)), (ct, 12_000, 0.07, {})])
def test_a_small_network_learns_the_map(module, iters, bound, flags):
    net, _ = toy(module, iters, **flags)
    assert error(net, T_MAX) < bound


@pytest.mark.slow
def test_a_small_network_learns_the_map_with_ict():
    """One step from 80 is drawn rarely, and is last to be learnt; two steps repair it."""
    net, args = toy(ict, 12_000, c=0.03)
    assert max(error(net, t) for t in (0.3, 1.0, 5.0)) < 0.03
    noise, true = torch.randn(2, 20_000, 1, 1, 1, dtype=torch.float64), data(20_000)
    made = ict.sample(net, noise, None, args)             # clamped to [-1, 1], as the truth has to be
    assert (made.flatten().sort().values - true.clamp(-1, 1).flatten().sort().values).abs().mean() < 0.03


@pytest.mark.slow
def test_a_small_network_collapses_without_the_stop_gradient(monkeypatch):
    def leaking(*a, real=ct.loss_fn):
        with monkeypatch.context() as m:
            m.setattr(torch, "no_grad", torch.enable_grad)
            return real(*a)
    monkeypatch.setattr(ct, "loss_fn", leaking)
    monkeypatch.setattr(ct, "levels", lambda it, args: 18)
    net, args = toy(ct, 3_000)
    assert ct.sample(net, torch.randn(1, 5_000, 1, 1, 1), None, args).std() < 0.3

"""python -m tests.bench.exact [--out exact.png]: each method's loss_fn where the answer is known; two minutes on a CPU.

The data are points in the plane, "images" [B,2,1,1], whose two coordinates are independent mixtures of Gaussians. There
the denoiser D(x, t), the paths of the probability-flow ODE and the consistency function are exact: a path keeps the CDF
of each coordinate, so that f(x, t) = F_tmin^-1(F_t(x)). Two questions are put to each loss_fn:

fixed point   Where does it lead if nothing but the loss decides? f(., t) is a table of free values at each level. From
              the lowest level upwards they take the values at which the mean gradient, over all x0 behind an x_t, is
              zero: float64, nothing random. How the error falls with the number of levels is the order. Distances are
              squares (ict, ect: a large c), to which the orders belong. ect's levels are t_max, r(t_max), r(r(t_max))..
              sCM and rCM have none; their mean g at the exact f is given, which is zero if that is the fixed point.
training      Where does a small network get in a short run, with the method's own levels and c?"""
import argparse
import math
import time
from copy import deepcopy
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

import cd
import ct
import ect
import ict
import rcm
import scm
from common.precond import EDM, TrigFlow

T_MIN, T_MAX, SD = 0.002, 80.0, 0.5
BIG = 1e6                             # as constant c: ict and ect have squares as distances, scm and rcm g / c as g
#         method file, its flags, expected order
METHODS = {
    "cd, Euler": (cd, dict(solver="euler", N=18), 1),
    "cd, Heun": (cd, dict(N=18), 2),
    "ct, N = 18": (ct, dict(s0=18, s1=17, mu0=0.05), 1),
    "ct, N grows": (ct, dict(s1=60, mu0=0.05), 1),        # as in its small preset: mu0 = 0.9 is slow
    "ict": (ict, {}, 1),
    "ect": (ect, {}, 1),
    "sct": (scm, dict(mode="sct"), None),
    "scd": (scm, dict(mode="scd"), None),
    "rcm": (rcm, dict(student_every=2, N_max=1), None),
}
COARSE = ("cd, Euler", "cd, Heun", "ct, N = 18")          # trained with 18 levels, whose fixed points are known
wide = lambda v: torch.as_tensor(v, dtype=torch.float64)
full = lambda x, t: torch.full((len(x), 1, 1, 1), float(t), dtype=x.dtype)
rms = lambda d: float(d.square().mean().sqrt())


# ==== 1. The exact solution =======================================================================
class Mixture(NamedTuple):
    """Weights, means and standard deviations [2,1,1,K] of the components, a row for each coordinate."""
    w: torch.Tensor
    m: torch.Tensor
    s: torch.Tensor

    def draw(self, n):
        """n points [n,2,1,1]."""
        k = torch.stack([torch.multinomial(w, n, replacement=True) for w in self.w.flatten(1)])
        m, s = (v.flatten(1).gather(1, k).T for v in (self.m, self.s))
        return (m + s * torch.randn_like(m)).view(n, 2, 1, 1)

    def posterior(self, x, t):
        """Of x0 given x at level t: weights, means and standard deviations of its components, [B,2,1,1,K]."""
        x, t = x[..., None].double(), t[..., None].double()
        v = self.s**2 + t**2
        w = torch.softmax(self.w.log() - (x - self.m) ** 2 / (2 * v) - v.log() / 2, -1)
        return w, self.m + self.s**2 / v * (x - self.m), self.s * t / v.sqrt()

    def denoise(self, x, t, y=None):
        """D(x, t) = E[x0 | x_t], what a perfect teacher returns."""
        w, m, _ = self.posterior(x, t)
        return (w * m).sum(-1).to(x.dtype)

    def tails(self, x, t):
        """P(x_t < x) and P(x_t > x), each with all its digits, and the density at x."""
        s = (self.s**2 + t[..., None] ** 2).sqrt()
        z = (x[..., None] - self.m) / s
        tail = lambda z: (self.w * torch.erfc(z / math.sqrt(2)) / 2).sum(-1)
        return tail(-z), tail(z), (self.w * torch.exp(-(z**2) / 2) / (s * math.sqrt(2 * math.pi))).sum(-1)

    def quantile(self, p, q, t):
        """The x with P(x_t < x) = p and P(x_t > x) = q = 1 - p: by bisection, and one Newton step, which makes up the
        digits and has the derivatives."""
        high = torch.full(p.shape, 9 * (1 + float(t.max())), dtype=torch.float64)
        low = -high
        for _ in range(36):
            mid = (low + high) / 2
            lower, upper, _ = self.tails(mid, t)
            below = torch.where(p < q, lower < p, upper > q)
            low, high = torch.where(below, mid, low), torch.where(below, high, mid)
        lower, upper, density = self.tails(mid, t)
        return mid - torch.where(p < q, lower - p, q - upper) / density.clamp(min=1e-300)

    def f(self, x, t, y=None, t_min=T_MIN):
        """The consistency function."""
        p, q, _ = self.tails(x.double(), t.double())
        return self.quantile(p, q, torch.full(t.shape, t_min, dtype=torch.float64)).to(x.dtype)


def mixture(*rows):
    """From a row [(weight, mean, standard deviation), ..] for each coordinate."""
    return Mixture(*wide(rows).movedim(2, 0)[:, :, None, None])


DATA = mixture([(0.3, -0.8, 0.3), (0.5, 0.1, 0.2), (0.2, 0.7, 0.25)],
               [(0.4, -0.5, 0.2), (0.3, 0.1, 0.25), (0.3, 0.6, 0.2)])
GAUSS = mixture([(1.0, 0.0, 0.5)], [(1.0, 0.0, 0.5)])


class Raw(nn.Module):
    """The raw network of an exact TrigFlow: the diffusion model, or with `jump` the consistency function. `more`, a raw
    network, is added to it."""
    def __init__(self, data, jump=False, more=None):
        super().__init__()
        self.data, self.jump, self.more = data, jump, more

    def forward(self, x, c_noise, y=None):
        t = c_noise.view(-1, 1, 1, 1).double()
        noisy, sigma = SD * x.double() / t.cos(), SD * t.tan()
        end = self.data.f(noisy, sigma, t_min=0) if self.jump else self.data.denoise(noisy, sigma)
        F = ((t.cos() * SD * x - end) / (t.sin() * SD)).to(x.dtype)
        return F if self.more is None else F + self.more(x, c_noise)


# ==== 2. The fixed point of a loss ================================================================
Z = torch.linspace(-4.5, 4.5, 91, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 2, 1, 1)
P, Q = torch.erfc(-Z / math.sqrt(2)) / 2, torch.erfc(Z / math.sqrt(2)) / 2   # tables are at these quantiles
ROOT_MASS = (torch.exp(-(Z**2) / 2) / torch.exp(-(Z**2) / 2).mean()).sqrt()   # .. of which the middle ones count more


def behind(data, x, t, nodes=8):
    """Images x0 [B,n,2,1,1] that could be behind x [B,2,1,1] at level t, and their probabilities: a quadrature."""
    z, p = map(wide, np.polynomial.hermite_e.hermegauss(nodes))
    w, m, s = data.posterior(x, t)
    second = lambda v: v.flatten(4).movedim(4, 1)
    return second(m[..., None] + s[..., None] * z), second(w[..., None] * p / p.sum())


def settled(module, models, data, x, sigma, times, args, start):
    """Where the loss leads the values [B,2,1,1] that a network returns at x, noise level sigma: one Newton step from
    `start` on the mean of loss_fn over x0, exact for squares. models(values): what loss_fn takes before x0; times: what
    module.times draws."""
    x0, p = behind(data, x, sigma)
    if module is cd:                                      # its pair depends on x_t alone
        x0, p = x[:, None], torch.ones_like(x)[:, None]
    n = x0.shape[1]
    rows = lambda v: v[:, None].expand(-1, n, -1, -1, -1).flatten(0, 1)
    eps, drawn = (rows(x) - x0.flatten(0, 1)) / rows(sigma), [rows(v) for v in times]
    values = rows(start).clone().requires_grad_()
    with patch.object(module, "times", lambda *a: drawn if len(drawn) > 1 else drawn[0]), \
            patch.object(torch, "randn_like", eps.expand_as):
        loss, _ = module.loss_fn(*models(values), x0.flatten(0, 1), None, args.iters, args, lambda: None)
    slope, = torch.autograd.grad(loss, values, create_graph=True)
    curve, = torch.autograd.grad(slope.sum(), values)
    mean = lambda v: (p * v.detach().view(x0.shape)).sum(1)
    return start - mean(slope) / mean(curve)


def fixed_point(module, data, ts, args):
    """Error [91,2,1,1] of f(., t_max) at the quantiles P. Level by level, the loss leads from f(., r) to f(., t)."""
    t_min, error = getattr(args, "t_min", 0.0), torch.zeros_like(Z)
    for r, t in zip(ts, ts[1:]):
        x_r, x, r_, t_ = data.quantile(P, Q, full(Z, r)), data.quantile(P, Q, full(Z, t)), full(Z, r), full(Z, t)
        truth = data.f(x, t_, t_min=t_min)

        def models(values):
            def net(x, level, y):
                if float(level[0]) == t:
                    return values
                off = [np.interp(x[:, c, 0, 0], x_r[:, c, 0, 0], error[:, c, 0, 0]) for c in (0, 1)]
                f_r = data.f(x, level, t_min=t_min) + wide(np.stack(off, 1))[..., None, None]
                return f_r + values - values.detach()     # a network that moves at t moves at r: no gradient may see it
            return {cd: (net, net, data.denoise), ct: (net, net)}.get(module, (net,))
        times = {cd: (t_, r_, full(Z, ts[0])), ct: (t_, r_), ict: (t_, r_, t_ - r_), ect: (t_, t_ - r_)}[module]
        error = settled(module, models, data, x, t_, times, args, truth) - truth
    return error


def levels(module, size, args):
    """Ascending levels: `size` of them; those of ect with q^a = size, down to 1e-3, where f(x, t) = x."""
    if module is not ect:
        return module.karras(size, args)
    ts = [T_MAX]
    while ts[-1] > 1e-3:
        _, gap = ect.times(1, 0, ect.Args(P_mean=math.log(ts[-1]), P_std=0.0, q=size), "cpu")
        ts.append(ts[-1] - float(gap))
    return wide(ts).flip(0)


def tangent(module, data, args):
    """RMS of the mean g at the exact f, over quantiles and noise levels."""
    exact, teacher = TrigFlow(Raw(data, jump=True), SD).double(), TrigFlow(Raw(data), SD).double()

    def models(values):
        net = SimpleNamespace(F=lambda x, t, y: exact.F(x, t, y) + values, weigh=lambda t: torch.zeros(len(t)).double())
        return (net, None, teacher) if module is rcm else (net, teacher)
    g = []
    for sigma in (full(Z, s) for s in (0.02, 0.1, 0.3, 1.0, 5.0, 40.0)):
        x, t = data.quantile(P, Q, sigma), torch.atan(sigma / SD)
        g.append(BIG * settled(module, models, data, x, sigma, (t,), args, torch.zeros_like(x)))
    return rms(ROOT_MASS * torch.stack(g))


def order(ns, errors):
    """-d ln(error) / d ln(number of steps) of the two finest."""
    (a, b), (e, f) = ns[-2:], errors[-2:]
    return math.log(e / f) / math.log((b - 1) / (a - 1))


def spread(ts, s, solver):
    """Closed form for N(0, s^2): the spread of what the fixed point generates in one step, over that of the data."""
    r, t = ts[:-1], ts[1:]
    step = (s**2 + r * t) / (s**2 + t**2)                 # of Euler, and of CT
    if solver == "heun":
        step = 1 + (r - t) / 2 * (t / (s**2 + t**2) + r / (s**2 + r**2) * step)
    return float(step.prod() * ((s**2 + ts[-1] ** 2) / (s**2 + ts[0] ** 2)).sqrt())


# ==== 3. Training =================================================================================
class Mlp(nn.Module):
    """A raw network: x [B,2,1,1], c_noise [B] -> [B,2,1,1]."""
    def __init__(self, width=96):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.out = nn.Linear(width, 2)

    def forward(self, x, c_noise, y=None):
        a = c_noise[:, None] * torch.tensor([1, 2, 4])
        h = torch.cat([x.flatten(1), a.sin(), a.cos()], 1)
        for layer in self.hidden:
            h = nn.functional.silu(layer(h))
        return self.out(h).view(x.shape)


def train(module, flags, iters, far, truth, batch=256, lr=3e-3):
    """Train a small network with the file's own loss_fn and levels; its average, and [(step, RMS error at t_max)]."""
    torch.manual_seed(0)
    args = module.Args(**flags, iters=iters)
    args.double, args.H = max(iters // 8, 1), iters // 3  # ect: eight stages; scm, rcm: a third to warm up
    flow = module in (scm, rcm)
    net = TrigFlow(Mlp(), SD) if flow else EDM(Mlp(), SD, getattr(args, "t_min", 0.0))
    more, teacher = Mlp(), TrigFlow(Raw(DATA), SD)
    nn.init.zeros_(more.out.weight), nn.init.zeros_(more.out.bias)
    fake = TrigFlow(Raw(DATA, more=more), SD)             # starts as a copy of the teacher
    target = deepcopy(net) if module is ct else net
    models = {cd: (net, net, DATA.denoise), ct: (net, target), scm: (net, teacher), rcm: (net, fake, teacher)}
    models = models.get(module, (net,))
    ema, opts = deepcopy(net), [torch.optim.Adam(m.parameters(), betas=(0.9, 0.99)) for m in (more, net)]
    curve, marks = [], {round(iters * 10 ** (-k / 8)) for k in range(13)}
    for it in range(iters):
        x0, students = DATA.draw(batch).float(), module is not rcm or rcm.is_students(it, args)
        if students:
            loss, _ = module.loss_fn(*models, x0, None, it, args, lambda: None)
        else:
            loss, _ = rcm.fake_loss_fn(net, fake, x0, None, it, args)
        opts[students].zero_grad()
        loss.backward()
        opts[students].param_groups[0]["lr"] = lr * (1 - it / iters)
        opts[students].step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), max(0.01, 1 / (it + 1)))
            if module is ct:
                torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), 1 - ct.mu(it, args))
        if it + 1 in marks:
            curve.append((it + 1, rms(jump(ema, far) - truth)))
    return ema, curve


@torch.no_grad()
def jump(net, x):
    """f(x, t_max) of a trained network, float64."""
    return (net.denoise if isinstance(net, TrigFlow) else net)(x.float(), full(x, T_MAX).float()).double()


# ==== 4. The figure and the table =================================================================
def draw(path, fixed, gauss, trained, far, truth):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colours = dict(zip(METHODS, plt.cm.tab10.colors))
    fig, ((paths, points, maps), (order_, gauss_, curves)) = plt.subplots(2, 3, figsize=(17, 10), layout="constrained")
    grid = lambda lo, hi, n: torch.linspace(lo, hi, n, dtype=torch.float64)
    column = lambda v: v.view(-1, 1, 1, 1).expand(-1, 2, 1, 1)

    ts = 10 ** grid(math.log10(T_MIN), math.log10(T_MAX), 120)
    for p in grid(0.02, 0.98, 25):
        x = DATA.quantile(column(p.expand(120)), column(1 - p.expand(120)), ts.view(-1, 1, 1, 1))[:, 0, 0, 0]
        paths.plot(ts, x / (1 + (ts / SD) ** 2).sqrt(), color=plt.cm.coolwarm(float(p)), lw=1.2)
    paths.set(xscale="log", xlabel="noise level t  (data on the left, noise on the right)",
              ylabel="$x_t$, scaled by $1 / \\sqrt{1 + t^2 / 0.25}$",
              title="Exact paths of the probability-flow ODE, first coordinate:\n"
              "f(x, t) is where the path through x ends on the left")

    net = trained["ct, N = 18"][0]
    a, b = truth[:200, :, 0, 0], jump(net, far)[:200, :, 0, 0]
    points.plot(*torch.stack([a, b], 2).permute(1, 2, 0), color="0.75", lw=0.8, zorder=1)
    points.scatter(*a.T, s=9, color="black", label="exact f(x, 80)", zorder=2)
    points.scatter(*b.T, s=9, color=colours["ct, N = 18"], label="learned by ct with 18 levels", zorder=3)
    points.set(xlabel="first coordinate", ylabel="second coordinate", aspect="equal",
               title="One step from the same 200 noises x\n(grey lines: by how far ct with 18 levels misses)")
    points.legend(loc="upper left")

    z = grid(-2.5, 2.5, 201)
    x = torch.stack([T_MAX * z, torch.zeros(201, dtype=torch.float64)], 1).view(-1, 2, 1, 1)
    maps.plot(z, DATA.f(x, full(x, T_MAX))[:, 0, 0, 0], color="black", lw=4, alpha=0.4, label="exact")
    for name in ("cd, Heun", "ct, N = 18", "sct", "rcm"):
        maps.plot(z, jump(trained[name][0], x)[:, 0, 0, 0], color=colours[name], lw=1.3, label=name)
    maps.set(xlabel="noise x / 80, first coordinate (the second is 0)", ylabel="f(x, 80), first coordinate",
             title="The map from noise to data, exact and learned:\nct with 18 levels has lost the bends")
    maps.legend(fontsize=9)

    for name, (ns, errors) in fixed.items():
        label = f"{name.split(', N')[0]}: order {order(ns, errors):.2f}"
        order_.loglog([n - 1 for n in ns], errors, "x--" if name == "ict" else "o-", color=colours[name], label=label)
    for power, name, label in ((1, "cd, Euler", "theory: slopes -1 and -2"), (2, "cd, Heun", None)):
        n, e = (wide(v)[[0, -1]] for v in fixed[name])
        order_.loglog(n - 1, 0.8 * e[1] * ((n[1] - 1) / (n - 1)) ** power, "k:", lw=1, label=label)
    order_.set(xlabel="number of steps from $t_{min}$ to 80  (N - 1)", ylabel="RMS error of f(x, 80)",
               title="Fixed point of each loss_fn, solved without training:\nerror against the number of levels")
    order_.text(0.98, 0.97, "sct, scd, rcm have no levels:\nmean g = 0 at the exact f", transform=order_.transAxes,
                ha="right", va="top")
    order_.legend()

    fine = range(5, 1 + max(max(ns) for ns, _ in gauss.values()))
    for name, solver in (("cd, Euler", "euler"), ("cd, Heun", "heun")):
        ratios = [spread(cd.karras(n, cd.Args()), SD, solver) for n in fine]
        gauss_.plot([n - 1 for n in fine], ratios, color=colours[name],
                    label=f"closed form, {solver.title()}" + " and ct" * (solver == "euler"))
    for (name, (ns, ratios)), mark in zip(gauss.items(), ("o", "o", "x")):
        gauss_.plot([n - 1 for n in ns], ratios, mark, ms=8, mew=2, color=colours[name],
                    label=f"fixed point of {name.split(', N')[0]}")
    gauss_.axhline(1, color="0.6", lw=1)
    gauss_.set(xlabel="number of steps  (N - 1)", ylabel="spread of generated points / of the data", ylim=(0, 2.7),
               title="Gaussian data: Euler and ct are too narrow,\nHeun too wide, as the closed form says")
    gauss_.legend()

    for name, (_, curve) in trained.items():
        curves.loglog(*zip(*curve), ".-", color=colours[name], label=name)
    for name in COARSE:
        for n, e in zip(*fixed[name]):
            if n == 18:                                   # the levels with which they train
                curves.axhline(e, color=colours[name], ls="--", lw=1)
    ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    curves.set_yticks(ticks, ticks)
    curves.set_yticks([], minor=True)
    curves.set(ylim=(0.006, 0.7), xlabel="training step", ylabel="RMS error of f(x, 80)",
               title="Training a small network with each loss_fn\n(dashed: its fixed point with 18 levels)")
    curves.legend(fontsize=9, loc="lower left")
    for ax in fig.axes:
        ax.grid(alpha=0.25)
    fig.savefig(path, dpi=80)


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", help="write the figure here")
    ap.add_argument("--iters", type=int, default=1500, help="training steps of each method [1500]")
    ap.add_argument("--levels", type=int, nargs="+", default=[9, 18, 35, 69], help="N of the fixed points, ascending")
    ap.add_argument("--q", type=int, nargs="+", default=[8, 16, 32], help="ect: t / (t - r) at high t, ascending")
    a = ap.parse_args(argv)
    began = time.process_time()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    far = DATA.draw(4096)
    far = far + T_MAX * torch.randn_like(far)
    truth = DATA.f(far, full(far, T_MAX))

    fixed, gauss, trained, rows = {}, {}, {}, []
    for name, (module, flags, expected) in METHODS.items():
        squares = module.Args(**flags | (dict(c=BIG) if module in (ict, ect) else {}))
        trained[name] = train(module, flags, a.iters, far, truth)
        rows.append([name, f"{trained[name][1][-1][1]:.4f}"])
        if module in (scm, rcm):
            part = dict(loss_scale=1.0, lambda_dmd=0.0) if module is rcm else {}
            g = tangent(module, DATA, module.Args(**flags | part | dict(c=BIG)))
            rows[-1] += [f"mean g {g:.0e}", "", "no levels"]
        elif name == "ct, N grows":                       # no single N
            rows[-1] += ["", "", ""]
        else:
            grids = [levels(module, n, squares) for n in (a.q if module is ect else a.levels)]
            ns, errors = [len(ts) for ts in grids], [fixed_point(module, DATA, ts, squares) for ts in grids]
            ns, errors = fixed[name] = ns, [rms(ROOT_MASS * e) for e in errors]
            at = ns.index(18) if 18 in ns else -1
            rows[-1] += [f"{errors[at]:.4f} at N = {ns[at]}", f"{order(ns, errors):.2f}", str(expected)]
        if name in COARSE:
            ends = [fixed_point(module, GAUSS, module.karras(n, squares), squares) for n in a.levels]
            gauss[name] = a.levels, [float(1 + (e / (SD * Z))[30, 0]) for e in ends]      # f* is SD * Z
    print("| method | RMS error of the map after training | of the fixed point | order measured | order expected |")
    print("|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(f"\n{a.iters} steps of 256 points, Adam, one seed; {time.process_time() - began:.0f} s of CPU time.")
    off = [name for name, (ns, errors) in fixed.items() if abs(order(ns, errors) - METHODS[name][2]) > 0.1]
    print("Orders off by more than 0.1:", "; ".join(off) or "none")
    noisy = [name for name in COARSE for n, e in zip(*fixed[name]) if n == 18 and trained[name][1][-1][1] > 1.5 * e]
    print("Not shown, as training ends more than half above it, the bias of:", "; ".join(noisy) or "none")
    print("Not shown: the limit of ict and ect with their own c, almost a plain norm. In two dimensions it is not the\n"
          "exact map, as the median of the targets is not their mean; the noise of training hides that here.")
    if a.out:
        draw(a.out, fixed, gauss, trained, far, truth)
    return rows


if __name__ == "__main__":
    main()

"""ECT's schedule, loss and sampler against the authors' numbers and against exact Gaussian solutions."""
import math
from types import SimpleNamespace

import pytest
import torch

import ect

S = 0.6                                                   # standard deviation of the Gaussian data in here


class Exact(torch.nn.Module):
    """The consistency function of x0 ~ N(0, S^2): f(x, t) = S / sqrt(S^2 + t^2) x."""
    def forward(self, x, t, y=None):
        return S / (S**2 + t**2).sqrt() * x


class Scale(torch.nn.Module):
    """f(x, t) = g / sqrt(g^2 + t^2) x with one trainable number g, exact at g = S."""
    def __init__(self, g):
        super().__init__()
        self.g = torch.nn.Parameter(torch.tensor(g, dtype=torch.float64))

    def forward(self, x, t, y=None):
        return self.g / (self.g**2 + t**2).sqrt() * x


def at(t, monkeypatch, **kw):
    """Args whose times() gives the noise levels `t` instead of random ones."""
    t = torch.as_tensor(t, dtype=torch.float64).view(-1, 1, 1, 1)
    args = ect.Args(**kw)
    gap = t * ((1 + args.k * torch.sigmoid(-args.b * t)) / args.q).clamp(max=1)
    monkeypatch.setattr(ect, "times", lambda n, it, args, device: (t.expand(n, 1, 1, 1), gap.expand(n, 1, 1, 1)))
    return args


def pair(t, q, stage, monkeypatch):
    """r(t) as times() gives it for chosen levels t at a stage of the curriculum."""
    args = ect.Args(q=q, double=10, P_mean=0.0, P_std=1.0)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: torch.tensor(t, dtype=torch.float64).log().view(-1, 1, 1, 1))
    out = [ect.times(len(t), it, args, "cpu") for it in (10 * stage, 10 * stage + 9)]     # first and last step
    assert all(torch.equal(a, b) for a, b in zip(*out))
    levels, gap = out[0]
    return (levels - gap).flatten()


T = [0.01, 0.1, 0.5, 0.821, 1, 2, 5, 80]
TABLE = [((2, 0), [0, 0, 0, 0, 0, 0.0463767, 2.36614, 40]),
         ((2, 1), [0, 0, 0, 0.114035, 0.212117, 1.02319, 3.68307, 60]),
         ((4, 0), [0, 0, 0, 0.114035, 0.212117, 1.02319, 3.68307, 60]),
         ((2, 2), [0.003775, 0.0399979, 0.24873, 0.467517, 0.606059, 1.51159, 4.34154, 70]),
         ((2, 3), [0.0068875, 0.069999, 0.374365, 0.644259, 0.803029, 1.7558, 4.67077, 75]),
         ((2, 7), [0.00980547, 0.0981249, 0.492148, 0.809954, 0.987689, 1.98474, 4.97942, 79.6875]),
         ((256, 0), [0.00980547, 0.0981249, 0.492148, 0.809954, 0.987689, 1.98474, 4.97942, 79.6875])]


@pytest.mark.parametrize("q_stage, expect", TABLE)
def test_r_of_t_at_each_stage(q_stage, expect, monkeypatch):
    """The table of the authors' code. An off-by-one stage, or stages that begin a step early or late, fail."""
    assert torch.allclose(pair(T, *q_stage, monkeypatch), torch.tensor(expect).double(), rtol=2e-5, atol=1e-7)


def test_levels_are_lognormal_and_gaps_at_most_t():
    torch.manual_seed(0)
    t, gap = ect.times(100_000, 0, ect.Args(), "cpu")
    assert abs(t.log().mean() + 1.1) < 0.03 and abs(t.log().std() - 2.0) < 0.02
    assert (gap > 0).all() and (gap <= t).all() and abs((gap == t).float().mean() - 0.811) < 0.01


def test_the_gap_keeps_its_digits_when_r_is_close_to_t(monkeypatch):
    """t - r by subtraction in float32 would be rounded to zero here."""
    args = ect.Args(q=1e9, double=10, P_std=0.0, P_mean=0.0)
    t, gap = ect.times(4, 0, args, "cpu")
    assert torch.allclose(gap / t, torch.full_like(t, (1 + 8 / (1 + math.e)) / 1e9), rtol=1e-5, atol=0)


def residual(gap_of_q, monkeypatch, t=1.3, net=Exact()):
    """RMS distance f_t - f_r of a network over random pairs, from the loss itself (loss = |f_t - f_r| / gap)."""
    torch.manual_seed(0)
    args = at([t], monkeypatch, q=gap_of_q)
    x0 = S * torch.randn(4000, 1, 1, 1, dtype=torch.float64)
    loss, stats = ect.loss_fn(net, x0, None, 0, args, lambda: None)
    return float((stats["loss"] * stats["gap"] * t).square().mean().sqrt())


def test_the_residual_vanishes_at_the_exact_function_at_the_known_rate(monkeypatch):
    """With f exact, f_t - f_r = J (eps - E[eps | x_t]) gap + O(gap^2): the RMS is J sqrt(Var(eps | x_t)) gap with
    J = S / sqrt(S^2 + t^2) and Var(eps | x_t) = S^2 / (S^2 + t^2). A c_in without root, or other eps, breaks it."""
    t = 1.3
    n_t = 1 + 8 / (1 + math.exp(t))
    rms = [residual(q, monkeypatch) for q in (1000, 2000, 4000)]
    for q, v in zip((1000, 2000, 4000), rms):
        gap = t * n_t / q
        assert abs(v / (S**2 / (S**2 + t**2) * gap) - 1) < 0.03
    assert abs(rms[0] / rms[1] - 2) < 0.01 and abs(rms[1] / rms[2] - 2) < 0.01
    wrong = Scale(0.9 * S)
    assert residual(4000, monkeypatch, net=wrong) > 0         # and no other function's gradient vanishes: next test


def slope(g, monkeypatch, q=2000.0):
    """d loss / d g with the squared distance's gradient recovered: expected gradient of |f_t - f_r|^2 / 2."""
    torch.manual_seed(1)
    args = at([0.3, 1.0, 4.0], monkeypatch, q=q)
    monkeypatch.setattr(ect, "times", lambda n, it, args, device, f=ect.times: tuple(
        v[:3].repeat(n // 3, 1, 1, 1) for v in f(3, it, args, device)))
    net = Scale(g)
    x0 = S * torch.randn(60_000, 1, 1, 1, dtype=torch.float64)
    # a large Huber constant makes d = |f_t - f_r|^2 / (2c): its gradient is the plain regression's
    args.c = 1e4
    loss, _ = ect.loss_fn(net, x0, None, 0, args, lambda: None)
    loss.backward()
    return float(net.g.grad) * args.c


def test_the_gradient_points_to_the_exact_function(monkeypatch):
    """With the stop-gradient the truth g = S is where the expected gradient changes sign (up to the bias of a
    finite gap). Letting gradient into f_r moves the root to a collapsed, much smaller g."""
    low, high = slope(0.93 * S, monkeypatch), slope(1.07 * S, monkeypatch)
    assert low < 0 < high


def test_no_gradient_flows_into_the_target(monkeypatch):
    """Only the first call may be differentiated: the gradient equals the one with a constant target."""
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.calls = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64)), []

        def forward(self, x, t, y=None):
            out = self.w * x * torch.cos(t)
            self.calls.append((x, out.requires_grad))
            return out
    torch.manual_seed(0)
    args, net = at([0.5], monkeypatch, q=256), Two()
    x0 = torch.randn(8, 1, 2, 2, dtype=torch.float64)
    loss, _ = ect.loss_fn(net, x0, None, 0, args, lambda: None)
    loss.backward()
    (x_t, grad_t), (x_r, grad_r) = net.calls
    assert grad_t and not grad_r
    gap = 0.5 * (1 + 8 / (1 + math.exp(0.5))) / 256
    f_t, f_r = x_t * math.cos(0.5), x_r * math.cos(0.5 - gap)
    diff = (f_t - f_r).flatten(1)
    expect = (diff * f_t.flatten(1)).sum(1) / diff.norm(dim=1) / gap           # d |w f_t - f_r| / dw at w = 1
    assert torch.allclose(net.w.grad, expect.mean())


def test_both_calls_share_the_dropout_mask(monkeypatch):
    """Unsynchronised masks leave a distance of the order of the masked signal even at r = t."""
    class Drop(torch.nn.Module):
        def forward(self, x, t, y=None):
            return torch.nn.functional.dropout(torch.ones_like(x), 0.5) * x
    args = at([1.0], monkeypatch, q=1e6)
    x0 = torch.ones(64, 1, 4, 4, dtype=torch.float64)
    _, stats = ect.loss_fn(Drop(), x0, None, 0, args, lambda: torch.manual_seed(7))
    gap = float(stats["gap"])
    assert (stats["loss"] * gap).max() < 1e-3


def test_mask_does_not_reuse_the_numbers_of_the_noise():
    """reseed() must select a stream of its own: otherwise the mask is a function of eps."""
    seen = []
    class Spy(torch.nn.Module):
        def forward(self, x, t, y=None):
            seen.append(torch.randn(4))
            return x
    torch.manual_seed(5)
    first = torch.randn(4)
    torch.manual_seed(5)
    ect.loss_fn(Spy(), torch.zeros(4, 1, 1, 1), None, 0, ect.Args(), lambda: torch.manual_seed(6))
    assert torch.equal(*seen) and not torch.equal(seen[0], first)


def test_at_r_zero_the_target_is_x0_and_noise_zero_is_never_evaluated():
    levels = []
    class Spy(torch.nn.Module):
        def forward(self, x, t, y=None):
            levels.append(t)
            return torch.zeros_like(x) + torch.zeros((), requires_grad=True)
    torch.manual_seed(0)
    x0 = torch.randn(64, 1, 2, 2)
    _, stats = ect.loss_fn(Spy(), x0, None, 0, ect.Args(), lambda: None)
    assert torch.cat(levels).min() > 0
    t = stats["t"].flatten()
    whole = 1 + 8 * torch.sigmoid(-t) >= 2                 # r = 0
    assert 20 < whole.sum() < 64
    assert torch.allclose(stats["loss"][whole], (x0.flatten(1).norm(dim=1) / t)[whole], rtol=1e-5)


@pytest.mark.parametrize("c", [0.0, 0.06])
def test_a_distance_of_zero_has_a_finite_gradient(c):
    """sqrt has an infinite slope at 0; one such image would turn every gradient into NaN."""
    w = torch.zeros((), requires_grad=True)
    args = ect.Args(c=c, q=256)
    loss, _ = ect.loss_fn(lambda x, t, y: w * x, torch.randn(4, 1, 2, 2), None, 0, args, lambda: None)
    loss.backward()
    assert float(loss.detach()) < 1e-6 and float(w.grad) == 0


def test_pseudo_huber_between_square_and_norm(monkeypatch):
    """c acts on the norm over all of C, H, W: sqrt(|v|^2 + c^2) - c."""
    args = at([1.0], monkeypatch, q=256, c=0.3)
    w = torch.tensor(1.0, requires_grad=True)
    out = iter([w * torch.full((1, 1, 2, 2), 0.2), torch.zeros(1, 1, 2, 2)])
    loss, stats = ect.loss_fn(lambda *a: next(out), torch.zeros(1, 1, 2, 2), None, 0, args, lambda: None)
    gap = (1 + 8 / (1 + math.e)) / 256
    assert abs(float(loss.detach()) - (math.sqrt(0.16 + 0.09) - 0.3) / gap) < 1e-4 and loss.shape == ()


# ---- sampling ------------------------------------------------------------------------------------
def test_sampling_levels():
    seen = []
    def net(x, t, y):
        seen.append(float(t[0]))
        return 0 * x
    for k, expect in ((1, [80]), (2, [80, 0.821]), (3, [80, math.sqrt(80 * 0.821), 0.821])):
        seen.clear()
        ect.sample(net, torch.randn(k, 2, 1, 2, 2, dtype=torch.float64), None, ect.Args())
        assert torch.allclose(torch.tensor(seen), torch.tensor(expect, dtype=torch.float32))


def test_samples_of_the_exact_function_have_the_exact_spread():
    """From N(0, 80^2), any number of steps keeps std S; adding sqrt(t^2 - ..) noise or skipping it would not."""
    torch.manual_seed(0)
    for k in (1, 2, 4):
        x = ect.sample(Exact(), torch.randn(k, 100_000, 1, 1, 1, dtype=torch.float64) * 1.0, None, ect.Args(t_mid=0.5))
        inside = x[x.abs() < 1]
        # the clamp to [-1, 1] touches 9.6 % of N(0, 0.6^2); compare the part inside with the truncated normal
        z = 1 / S
        phi, mass = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), math.erf(z / math.sqrt(2))
        assert abs(inside.std() - S * math.sqrt(1 - 2 * z * phi / mass)) < 0.004
        assert abs(len(inside) / len(x) - mass) < 0.004


def test_sampler_state_is_float64_and_images_depend_on_their_own_noise():
    seen = []
    def net(x, t, y):
        seen.append(x.dtype)
        return (x * 0.01).float()
    noise = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    whole = ect.sample(net, noise, None, ect.Args())
    assert set(seen) == {torch.float64}
    assert torch.equal(whole[1:2], ect.sample(net, noise[:, 1:2], None, ect.Args()))


# ---- copying -------------------------------------------------------------------------------------
def test_sections_1_to_3_run_in_a_bare_namespace():
    """The copy-paste promise: with torch and math alone, a toy network and a SimpleNamespace."""
    from conftest import ROOT
    text = (ROOT / "ect.py").read_text()
    names = dict(torch=torch, math=math)
    exec(text[text.index("# ==== 1."):text.index("# ==== 4.")], names)
    args = SimpleNamespace(q=2.0, double=10, k=8.0, b=1.0, c=0.0, P_mean=-1.1, P_std=2.0, t_mid=0.8, t_max=80.0)
    w = torch.tensor(0.5, requires_grad=True)
    net = lambda x, t, y: w * x / (1 + t)
    loss, _ = names["loss_fn"](net, torch.randn(4, 3, 8, 8), None, 25, args, lambda: torch.manual_seed(0))
    loss.backward()
    assert w.grad.isfinite() and names["sample"](net, torch.randn(2, 4, 3, 8, 8), None, args).shape == (4, 3, 8, 8)

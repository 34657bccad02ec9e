"""Preconditioning and the diffusion loss and sampler, against EDM's table and exact Gaussian solutions."""
import math

import pytest
import torch

from common import teacher
from common.networks import build
from common.precond import EDM, TrigFlow, rf_from_trig, trig, trig_from_rf
from common.unet import UNet

LEVELS = torch.tensor([0.003, 0.1, 0.821, 3, 80], dtype=torch.float64).view(-1, 1, 1, 1)


class Spy(torch.nn.Module):
    """A raw network that remembers its input and returns a constant."""
    def __init__(self, out=0.0):
        super().__init__()
        self.out, self.kwargs = out, {}

    def forward(self, x, c_noise, y=None):
        self.x, self.c_noise = x, c_noise
        return torch.full_like(x, self.out)


def coefficients(t, **kw):
    """(c_skip, c_out, c_in, c_noise) of EDM as it computes them, seen from outside."""
    one, zero = torch.ones(len(t), 1, 1, 1, dtype=torch.float64), torch.zeros(len(t), 1, 1, 1, dtype=torch.float64)
    spy = Spy()
    c_skip = EDM(spy, dtype=torch.float64, **kw)(one, t)
    c_in, c_noise = spy.x, spy.c_noise
    return [v.flatten() for v in (c_skip, EDM(Spy(1.0), dtype=torch.float64, **kw)(zero, t), c_in, c_noise)]


def test_coefficients_equal_the_published_numbers():
    """Values printed by the authors' code; a c_in without its root fails here and in the next test."""
    expect = [[0.999964, 0.9615385, 0.2705508, 0.02702703, 3.906098e-5],
              [0.00299995, 0.09805807, 0.427039, 0.493197, 0.4999902],
              [1.999964, 1.961161, 1.040290, 0.328798, 0.01249976],
              [-1.452286, -0.5756463, -0.04930805, 0.2746531, 1.095507]]
    for ours, theirs in zip(coefficients(LEVELS), expect):
        assert torch.allclose(ours, torch.tensor(theirs, dtype=torch.float64), rtol=2e-6)
    shifted = coefficients(LEVELS, t_min=0.003)
    assert torch.allclose(shifted[0], torch.tensor([1, 0.963729, 0.2719981, 0.0270797, 3.906390e-5]).double(), rtol=2e-6)
    assert torch.allclose(shifted[1], torch.tensor([0, 0.09511633, 0.4254786, 0.4927038, 0.4999715]).double(), rtol=2e-6)


def test_the_network_sees_unit_variance_and_must_answer_with_it():
    """c_in without its root, or c_out of another sd, breaks one of the two variances (EDM, App. B.6)."""
    torch.manual_seed(0)
    for sd in (0.5, 0.75):
        for s in (0.01, 1.0, 80.0):
            t = torch.full((4096, 1, 1, 1), s, dtype=torch.float64)
            x0 = sd * torch.randn(4096, 1, 4, 4, dtype=torch.float64)
            x = x0 + t * torch.randn_like(x0)
            spy = Spy()
            skipped = EDM(spy, sd, dtype=torch.float64)(x, t)
            c_out = EDM(Spy(1.0), sd, dtype=torch.float64)(0 * x, t)
            assert abs(spy.x.std() - 1) < 0.01 and abs(((x0 - skipped) / c_out).std() - 1) < 0.01


def test_boundary_is_the_identity():
    torch.manual_seed(0)
    for t_min in (0.0, 0.002):
        net = EDM(UNet(8, 1, ch=16, mult=(1,), blocks=1, attn=(), dropout=0.0), t_min=t_min)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        x = torch.randn(2, 1, 8, 8)
        at = max(t_min, 1e-7)
        assert torch.allclose(net(x, torch.full((2, 1, 1, 1), at)), x, atol=1e-5)
        assert not torch.allclose(net(x, torch.full((2, 1, 1, 1), 0.5)), x, atol=0.1)


def test_coefficients_stay_float32_under_bfloat16():
    net = EDM(Spy(), dtype=torch.bfloat16)
    x, t = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 0.0123456)
    out = net(x, t)
    assert out.dtype == torch.float32 and net.model.x.dtype == torch.bfloat16
    assert net.model.c_noise.dtype == torch.float32 and abs(float(net.model.c_noise) - math.log(0.0123456) / 4) < 1e-6


def test_build_makes_the_network_that_spec_describes():
    net = EDM(UNet(16, 3, ch=16, mult=(1, 2), blocks=1, attn=(8,), classes=3), sd=0.7, t_min=0.002)
    again = build(net.spec)
    again.load_state_dict(net.state_dict())
    x, t, y = torch.randn(2, 3, 16, 16), torch.ones(2, 1, 1, 1), torch.tensor([0, 2])
    assert torch.equal(net(x, t, y), again(x, t, y))


# ---- TrigFlow ------------------------------------------------------------------------------------
class Curved(torch.nn.Module):
    """A raw network that depends on everything."""
    kwargs = dict(net="none")

    def forward(self, x, c_noise, y=None):
        self.x, self.c_noise = x, c_noise
        c = c_noise.view(-1, 1, 1, 1)
        return (x * (1 + c)).sin() + 0.3 * c.cos() + (0 if y is None else y.view(-1, 1, 1, 1))


def noisy(sd, n=5):
    """x0, noise and LEVELS sigma, float64."""
    torch.manual_seed(0)
    return torch.randn(n, 1, 2, 2).double() * sd, torch.randn(n, 1, 2, 2).double(), LEVELS[:n]


@pytest.mark.parametrize("sd", [0.5, 0.75, 1.0])
def test_an_edm_network_is_a_trigflow_network_up_to_sign(sd):
    """F = -F_edm at t = arctan(sigma / sd): same denoiser, same path. A lost sd in t, in c_noise or in x, or the other
    sign, fails; so does a wrong factor between the two images."""
    x0, eps, sigma = noisy(sd)
    raw, y = Curved(), torch.arange(5) / 10
    D = EDM(raw, sd, dtype=torch.float64)(x0 + sigma * eps, sigma, y)
    inputs = raw.x, raw.c_noise
    net, t = trig(EDM(raw, sd, dtype=torch.float64)), torch.atan(sigma / sd)
    assert torch.allclose(net.denoise(x0 + sigma * eps, sigma, y), D, atol=1e-12)
    x_t = t.cos() * x0 + t.sin() * sd * eps
    assert torch.allclose(net(x_t, t, y), D, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip((raw.x, raw.c_noise), inputs))
    velocity = sd * net.F(x_t, t, y)                      # d(cos t x_sigma) / dt, with EDM's own dx / dsigma
    x_sigma, dsigma = x0 + sigma * eps, sd / t.cos() ** 2
    slope = (x_sigma - D) / sigma
    assert torch.allclose(velocity, -t.sin() * x_sigma + t.cos() * slope * dsigma, atol=1e-10)
    assert trig(net) is net and not any(p.requires_grad for p in net.parameters())


def test_trigflow_is_the_identity_at_zero_and_sees_its_own_time():
    """f(x, 0) = x for any network; c_noise = t, x over sd; t comes flat."""
    raw, x = Curved(), torch.randn(3, 1, 2, 2)
    net, t = TrigFlow(raw, 0.7), torch.tensor([0.0, 0.3, 1.5]).view(3, 1, 1, 1)
    f = net(x, t)
    assert torch.equal(f[0], x[0]) and torch.equal(raw.c_noise, t.flatten()) and torch.allclose(raw.x, x / 0.7)
    assert torch.allclose(f, t.cos() * x - t.sin() * 0.7 * raw(x / 0.7, t.flatten()))
    assert torch.allclose(net.F(x, t), raw(x / 0.7, t.flatten()))


def test_trigflow_network_sees_unit_variance_and_must_answer_with_it():
    """At every t: z without sd, or a lost 1 / sd, breaks one of the two."""
    for sd in (0.5, 0.75):
        x0, z = sd * torch.randn(2, 4096, 1, 4, 4, dtype=torch.float64)
        for s in (0.01, 0.8, 1.55):
            t, raw = torch.full((4096, 1, 1, 1), s, dtype=torch.float64), Curved()
            TrigFlow(raw, sd, dtype=torch.float64).F(t.cos() * x0 + t.sin() * z, t)
            assert abs(raw.x.std() - 1) < 0.01 and abs(((t.cos() * z - t.sin() * x0) / sd).std() - 1) < 0.01


@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_rectified_flow_is_trigflow_in_other_variables(sd):
    """Against the denoisers: x0 = x - s v of rectified flow, f of TrigFlow; at s = 0, too; and back again."""
    x0, eps, _ = noisy(sd)
    s = torch.tensor([0, 0.01, 0.3, 0.9, 1]).double().view(-1, 1, 1, 1)
    x, v = (1 - s) * x0 + s * eps, eps - x0 + 0.1 * torch.randn_like(x0)
    t, x_t, F = trig_from_rf(s, x, v, sd)
    assert torch.allclose(x_t, t.cos() * x0 + t.sin() * sd * eps, atol=1e-12)
    assert torch.allclose(t.cos() * x_t - t.sin() * sd * F, x - s * v, atol=1e-12)
    exact = trig_from_rf(s, x, eps - x0, sd)[2]           # of one pair of points: the velocity itself
    assert torch.allclose(sd * exact, t.cos() * sd * eps - t.sin() * x0, atol=1e-12)
    if sd == 1:
        assert torch.allclose(F, ((t.cos() - t.sin()) * x_t + v) / (t.cos() + t.sin()), atol=1e-12)
    for a, b in zip(rf_from_trig(t, x_t, F, sd), (s, x, v)):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("raw", ["trig", "edm"])
def test_trigflow_is_rebuilt_from_its_spec(raw):
    net = TrigFlow(UNet(16, 3, ch=16, mult=(1, 2), blocks=1, attn=(8,), classes=3, norm="double"), 0.7, raw)
    torch.nn.init.normal_(net.head.weight)
    again = build(net.spec)
    again.load_state_dict(net.state_dict())
    x, t, y = torch.randn(2, 3, 16, 16), torch.full((2, 1, 1, 1), 0.4), torch.tensor([0, 2])
    assert torch.equal(net(x, t, y), again(x, t, y)) and torch.equal(net.weigh(t), again.weigh(t))


def test_the_weight_starts_at_zero_and_can_follow_any_smooth_curve():
    """w = 0 at the start, then least squares on a curve in t; a constant is among what it can be."""
    net, t = TrigFlow(Curved(), dtype=torch.float64).double(), torch.linspace(0.01, 1.56, 100).double().view(-1, 1, 1, 1)
    assert not net.weigh(t).any() and net.weigh(t).shape == (100,)
    features = torch.stack([torch.autograd.grad(w, net.head.weight, retain_graph=True)[0].flatten() for w in net.weigh(t)])
    for curve in (torch.ones(100).double(), (3 * t.flatten()).sin() - t.flatten() ** 2):
        net.head.weight.data = torch.linalg.lstsq(features, curve[:, None], driver="gelsd").solution.T
        assert torch.allclose(net.weigh(t), curve, atol=1e-3)


def test_trigflow_computes_around_its_network_in_float32():
    raw = Curved()
    net = TrigFlow(raw, dtype=torch.bfloat16)
    x, t = torch.full((1, 1, 1, 1), 1.0), torch.full((1, 1, 1, 1), 0.0123456)
    out = net(x.double(), t.double())
    assert out.dtype == torch.float32 and raw.x.dtype == torch.bfloat16 and raw.c_noise.dtype == torch.float32
    assert float(raw.c_noise) == float(t)
    assert TrigFlow(raw, dtype=torch.float64)(x, t).dtype == torch.float64


# ---- the diffusion model -------------------------------------------------------------------------
class Gauss(torch.nn.Module):
    """The exact denoiser of x0 ~ N(m, s^2): D(x; t) = m + s^2 / (s^2 + t^2) (x - m)."""
    def __init__(self, m=0.3, s=0.6):
        super().__init__()
        self.m, self.s = m, s

    def forward(self, x, t, y=None):
        return self.m + self.s**2 / (self.s**2 + t**2) * (x - self.m)


def test_diffusion_loss_at_the_exact_denoiser():
    """E|D - x0|^2 = s^2 t^2 / (s^2 + t^2) per pixel: summed over pixels, weighted by (t^2 + sd^2) / (t sd)^2."""
    torch.manual_seed(0)
    args = teacher.Args(P_std=0.0, P_mean=math.log(0.9), sd=0.5, augment=0.0)
    x0 = 0.3 + 0.6 * torch.randn(40_000, 1, 2, 2, dtype=torch.float64)
    loss, stats = teacher.loss_fn(Gauss(), x0, None, args)
    expect = 4 * 0.36 * 0.81 / (0.36 + 0.81) * (0.81 + 0.25) / (0.81 * 0.25)
    assert abs(float(loss) / expect - 1) < 0.01 and torch.allclose(stats["t"], torch.tensor(0.9))
    assert stats["loss"].shape == (40_000,) and abs(float(stats["loss"].mean() - loss)) < 1e-9


def test_diffusion_weight_at_known_levels(monkeypatch):
    """rnd -2, -.7, 0, .9, 2.1 -> sigma and weight as the authors' code prints them."""
    z = torch.tensor([-2, -0.7, 0, 0.9, 2.1]).view(5, 1, 1, 1)
    monkeypatch.setattr(torch, "randn", lambda *a, **k: z)
    x0 = torch.zeros(5, 1, 1, 1)
    _, stats = teacher.loss_fn(lambda x, t, y: torch.ones_like(x), x0, None, teacher.Args(augment=0.0))
    assert torch.allclose(stats["t"].flatten(), torch.tensor([0.0273237, 0.1300287, 0.3011942, 0.8869205, 3.743421]))
    assert torch.allclose(stats["loss"], torch.tensor([1343.431, 63.14547, 15.02318, 5.271249, 4.071361]))


def test_label_dropout_drops_its_share():
    torch.manual_seed(0)
    seen = []
    net = lambda x, t, y: seen.append(y) or x
    teacher.loss_fn(net, torch.zeros(4000, 1, 1, 1), torch.arange(4000) % 10, teacher.Args(label_dropout=0.25, augment=0.0))
    assert abs((seen[0] == -1).float().mean() - 0.25) < 0.03
    assert torch.equal(seen[0][seen[0] >= 0], (torch.arange(4000) % 10)[seen[0] >= 0])


def flow(x, t, g):
    """The exact end of the probability-flow ODE from (x, t)."""
    return g.m + g.s / math.sqrt(g.s**2 + t**2) * (x - g.m)


def test_heun_grid_and_calls():
    """18 steps are 35 calls; five steps visit 80, 17.52783, 2.515219, .1697528, .002, the inner ones twice."""
    seen = []
    class Count(Gauss):
        def forward(self, x, t, y=None):
            seen.append(float(t.flatten()[0]))
            return super().forward(x, t)
    noise = torch.randn(1, 2, 1, 2, 2, dtype=torch.float64)
    teacher.sample(Count(), noise, None, teacher.Args(steps=5))
    expect = [80] + [v for v in (17.52783, 2.515219, 0.1697528, 0.002) for _ in (0, 1)]
    assert torch.allclose(torch.tensor(seen), torch.tensor(expect), rtol=1e-6)
    seen.clear()
    teacher.sample(Count(), noise, None, teacher.Args(steps=18))
    assert len(seen) == 35


def test_heun_converges_with_second_order():
    """Against the exact flow; Euler's method, or a second slope at the wrong level, loses the order."""
    torch.manual_seed(0)
    g, noise = Gauss(), 0.02 * torch.randn(1, 64, 1, 2, 2, dtype=torch.float64)   # small: nothing is clamped
    exact = flow(80 * noise[0], 80.0, g)
    errors = [float((teacher.sample(g, noise, None, teacher.Args(steps=n)) - exact).abs().max()) for n in (20, 40, 80)]
    assert errors[2] < 1e-3 and 3.2 < errors[0] / errors[1] < 5 and 3.2 < errors[1] / errors[2] < 5


# ---- the diffusion model in TrigFlow -------------------------------------------------------------
class GaussTrig(torch.nn.Module):
    """Gauss as TrigFlow: F from its denoiser."""
    def __init__(self, sd, w=0.0):
        super().__init__()
        self.sd, self.D, self.w = sd, Gauss(), w

    def F(self, x, t, y=None):
        return (t.cos() * x - self.D(x / t.cos(), self.sd * t.tan())) / (self.sd * t.sin())

    def weigh(self, t):
        return self.w + 0 * t.flatten()

    def denoise(self, x, sigma, y=None):
        return self.D(x, sigma)


def test_trigflow_loss_at_the_exact_velocity():
    """sd F - v = -(D - x0) / sin t, so that E = s^2 t^2 / (s^2 + t^2) / sin^2 per pixel, e^w times that less w."""
    torch.manual_seed(0)
    args, sigma = teacher.Args(P_std=0.0, P_mean=math.log(0.9), sd=0.5, flow="trig", augment=0.0), 0.9
    x0 = 0.3 + 0.6 * torch.randn(40_000, 1, 2, 2, dtype=torch.float64)
    d = 0.36 * sigma**2 / (0.36 + sigma**2) / math.sin(math.atan(sigma / 0.5)) ** 2
    for w in (0.0, 0.7):
        loss, stats = teacher.loss_fn(GaussTrig(0.5, w), x0, None, args)
        assert abs(float(loss) - (math.exp(w) * d - w)) < 0.01 and torch.allclose(stats["t"], torch.tensor(sigma))
        assert stats["loss"].shape == (40_000,)


def test_trigflow_models_are_sampled_in_edms_variables():
    noise = torch.randn(1, 8, 1, 2, 2, dtype=torch.float64)
    a, b = (teacher.sample(net, noise, None, teacher.Args()) for net in (Gauss(), GaussTrig(0.5)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 1, 1, 1), (1,), ()])
def test_a_time_of_another_shape_is_an_error(shape):
    """t [B] for B images of width B is broadcast along their width: each column gets the level of another image."""
    model, x = UNet(size=4, channels=1, ch=8, mult=(1,), blocks=1, attn=()), torch.zeros(3, 1, 4, 4)
    for call in (EDM(model), TrigFlow(model), TrigFlow(model).F):
        assert call(x, torch.ones(3, 1, 1, 1), None).shape == x.shape
        with pytest.raises(ValueError, match="3, 1, 1, 1"):
            call(x, torch.ones(shape), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrap, how", [(EDM, {}), (TrigFlow, {}), (TrigFlow, dict(raw="edm"))])
def test_at_level_zero_f_is_the_identity(wrap, how, dtype):
    """ln 0 makes NaN of the whole image, or of the whole batch."""
    torch.manual_seed(0)
    net = wrap(UNet(8, 1, ch=16, mult=(1,), blocks=1, attn=()), 0.75, dtype=dtype, **how)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 0.5, 0.0]).view(-1, 1, 1, 1)
    out = net(x, t)
    assert torch.equal(out[::2], x[::2]) and out.isfinite().all() and not torch.equal(out[1], x[1])
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("shape", [(2, 1), (1,), (1, 2), ()])
def test_a_label_of_another_shape_is_an_error(shape):
    """Labels [B, 1] are broadcast against the classes of a whole batch."""
    for net in (EDM(Spy()), TrigFlow(Spy())):
        with pytest.raises(ValueError, match=r"make it \[2\]"):
            net(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 1, 1), torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize("family", [dict(net="ddpmpp"), dict(net="adm", ch=64), dict(net="dit", ch=16)])
def test_a_label_that_is_no_class_is_an_error(family):
    """-2, counted from the end of the table: class 3 of 5; 5, which is no label without a word."""
    kwargs = dict(size=8, channels=1, mult=(1,), blocks=1, attn=(), classes=5, dropout=0.0, ch=16) | family
    net = build(dict(flow="edm", sd=.5, t_min=0, net=family["net"], kwargs=kwargs)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=.2)
    x, t = torch.ones(2, 1, 8, 8), torch.ones(2, 1, 1, 1)
    for y in (-2, 5):
        with pytest.raises(IndexError):
            net(x, t, torch.tensor([0, y]))
    assert torch.equal(net(x, t, torch.tensor([-1, -1])), net(x, t))
    assert len({float(net(x, t, torch.tensor([y, y]))[0].sum()) for y in range(-1, 5)}) == 6


@pytest.mark.parametrize("change", [dict(sd=0), dict(sd=float("nan")), dict(sd="x"), dict(t_min=-1), dict(t_min=None),
                                    dict(dropout=5), dict(size=0), dict(size=10**6), dict(classes=-1), dict(blocks="2")])
def test_a_spec_that_describes_no_network_is_an_error(change):
    """Found out at the first step of a training, or never."""
    kwargs = dict(size=8, channels=1, mult=(1,), blocks=1, attn=(), classes=0, dropout=0.0, ch=16)
    spec = dict(flow="edm", sd=.5, t_min=0, net="dit", kwargs=kwargs)
    build(spec)
    inner, outer = ({k: v for k, v in change.items() if (k in kwargs) is inside} for inside in (True, False))
    with pytest.raises((ValueError, TypeError)):
        build(spec | outer | dict(kwargs=kwargs | inner))

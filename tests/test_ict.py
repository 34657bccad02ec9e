"""What iCT changes in CT; most tests carry a mistake that public re-implementations have made."""
import inspect
import math

import pytest
import torch
from test_ct import T_MIN, unet

import ict
from common.unet import UNet


@pytest.mark.parametrize("iters, expect", [
    (400_000, {0: 11, 49_999: 11, 50_000: 21, 100_000: 41, 199_999: 81, 200_000: 161, 300_000: 641, 349_999: 641, 350_000: 1281}),
    (12_345, {0: 11, 1_542: 11, 1_543: 21, 10_800: 641, 10_801: 1281, 12_344: 1281}),      # K' = 1543: a longer tail
    (3, {0: 11, 1: 21, 2: 41})])
def test_the_number_of_levels_doubles_at_equal_intervals(iters, expect):
    """Growing per epoch, or with the square root as in CT; 1280 or 2561 levels at the end."""
    args = ict.Args(iters=iters)
    assert {it: ict.levels(it, args) for it in expect} == expect


def test_the_defaults_are_the_papers():
    """P_mean = +1.1 stood in two public configurations."""
    a = ict.Args()
    assert (a.P_mean, a.P_std, a.s0, a.s1, a.t_min, a.t_max, a.rho) == (-1.1, 2.0, 10, 1280, 0.002, 80.0, 7.0)
    assert (a.lr, a.batch, a.ema, a.iters, a.dropout, a.teacher) == (1e-4, 1024, 0.99993, 400_000, 0.3, "none")


@pytest.mark.parametrize("it", [0, 399_999])
def test_levels_are_drawn_as_the_lognormal_on_the_grid(it):
    """Each pair's share, and the tails P(r > 1), P(r > 10), P(r > 40); indexed by the wrong end, the first pair, which
    alone holds t_min, would never come."""
    torch.manual_seed(0)
    args, n = ict.Args(), 400_000
    t, r, gap = ict.times(n, it, args, "cpu")
    ts = ict.karras(ict.levels(it, args), args)
    cdf = lambda s: (1 + math.erf((math.log(s) + 1.1) / (2 * math.sqrt(2)))) / 2
    mass = cdf(80.0) - cdf(T_MIN)
    assert r.min() == ts[0].float() and t.max() == ts[-1].float()
    if it == 0:
        i = (r.flatten()[:, None] - ts.float()).abs().argmin(1)
        share = torch.tensor([(cdf(b) - cdf(a)) / mass for a, b in zip(ts.tolist(), ts[1:].tolist())])
        assert (i.bincount() / n - share).abs().max() < 0.004
    else:
        for s, p in ((1, 0.291), (10, 0.044), (40, 0.0083)):                 # of the lognormal; it is cut off at 80
            assert abs(1 - cdf(s) - p) < 5e-4 and abs((t > s).float().mean() - (cdf(80.0) - cdf(s)) / mass) < 0.003


def test_gaps_are_those_of_the_float64_grid():
    """t - r in float32 is off by up to 2e-5, and so is the weight."""
    args = ict.Args()
    _, r, gap = ict.times(50_000, 399_999, args, "cpu")
    ts = ict.karras(1281, args)
    i = (r.flatten()[:, None] - ts.float()).abs().argmin(1)
    assert (gap.flatten() / ts.diff()[i] - 1).abs().max() < 1e-7


@pytest.mark.parametrize("shape, c", [((3, 32, 32), 0.0299), ((3, 64, 64), 0.0599), ((1, 2, 2), 0.00108)])
def test_pseudo_huber_takes_the_norm_of_the_whole_image(shape, c, monkeypatch):
    """sqrt(|d|^2 + c^2) - c over all of C, H, W, then 1 / (t - r): element by element it would be plain squares; a
    mean inside the norm, or a division by the number of pixels, changes the regime, too. Nor is 1 / (t - r) forgotten."""
    t, r = torch.full((2, 1, 1, 1), 1.0), torch.full((2, 1, 1, 1), 0.75)
    monkeypatch.setattr(ict, "times", lambda *a: (t, r, t - r))
    delta = 0.003 * torch.randn(2, *shape)
    out = iter([delta.requires_grad_(), torch.zeros(2, *shape)])
    loss, stats = ict.loss_fn(lambda *a: next(out), torch.zeros(2, *shape), None, 0, ict.Args(), lambda: None)
    norm = delta.detach().double().flatten(1).norm(dim=1)
    expect = ((norm**2 + c**2).sqrt() - c) / 0.25
    assert torch.allclose(stats["loss"].double(), expect, rtol=5e-3) and torch.allclose(loss.double(), expect.mean(), rtol=5e-3)
    loss.backward()                                       # the gradient of an image never exceeds its weight
    assert (delta.grad.flatten(1).norm(dim=1) <= 4 / 2 * (1 + 1e-5)).all()


def test_equal_outputs_have_a_finite_gradient():
    w = torch.zeros((), requires_grad=True)
    loss, _ = ict.loss_fn(lambda x, t, y: w * x, torch.randn(4, 1, 2, 2), None, 0, ict.Args(), lambda: None)
    loss.backward()
    assert float(loss.detach()) == 0 and float(w.grad) == 0


def test_outputs_beyond_the_image_range_still_learn(monkeypatch):
    """A clamp inside the training pass kills the gradient just where it is needed."""
    w = torch.tensor(5.0, requires_grad=True)
    loss, _ = ict.loss_fn(lambda x, t, y: w * t.sqrt() + 0 * x, torch.zeros(8, 1, 2, 2), None, 0, ict.Args(), lambda: None)
    loss.backward()
    assert abs(float(w.grad)) > 1e-3


def test_the_target_is_the_network_itself():
    """Neither a slow copy nor the averaged weights: loss_fn is given one network, and main keeps no other."""
    assert list(inspect.signature(ict.loss_fn).parameters) == ["net", "x0", "y", "it", "args", "reseed"]
    assert "target" not in inspect.getsource(ict.main)


def test_a_real_network_with_dropout_gives_equal_outputs_at_equal_levels(monkeypatch):
    net = unet(dropout=0.3).train()
    t = torch.full((4, 1, 1, 1), 0.7)
    monkeypatch.setattr(ict, "times", lambda *a: (t, t, torch.ones_like(t)))
    x0 = torch.rand(4, 1, 8, 8)
    for seed, same in ((lambda: torch.manual_seed(5), True), (lambda: None, False)):
        _, stats = ict.loss_fn(net, x0, None, 0, ict.Args(), seed)
        assert (float(stats["loss"].max()) == 0) is same


def test_the_embedding_is_as_tame_as_the_papers_small_fourier_scale():
    """|d embedding / d c_noise|: about 100 * sqrt(ch) at the paper's scale 16, which is what 0.02 repairs. Ours is 2."""
    net, seen = UNet(8, 1, ch=128, mult=(1,), blocks=1, attn=()), []
    net.map_layer0.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    c = torch.linspace(-1.6, 1.1, 50).double()
    net.double().embed(c, None)
    net.embed(c + 1e-6, None)
    assert ((seen[1] - seen[0]) / 1e-6).norm(dim=1).max() < 2.1

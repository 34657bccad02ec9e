"""CT's schedules, loss and target; and what cd, ct and ict have in common: grid, boundary, sampler, resume."""
import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, equal, lines, weights

import cd
import ct
import ict
from common.flags import BadInput, parse
from common.precond import EDM
from common.unet import UNet

each = pytest.mark.parametrize("module", [cd, ct, ict], ids=lambda m: m.__name__)
T_MIN = 0.002


def settled(module, **flags):
    args = module.Args(**flags)
    if module is cd:
        args = dataclasses.replace(args, **cd.segments(args))
    return args


def loss_of(module, net, target, x0, args, it=0, reseed=lambda: None, teacher=lambda x, t, y: 0.5 * x):
    models = dict(cd=(net, target, teacher), ct=(net, target), ict=(net,))[module.__name__]
    return module.loss_fn(*models, x0, None, it, args, reseed)


# ---- schedules -----------------------------------------------------------------------------------
def test_number_of_levels_and_decay_follow_the_papers_formula():
    """s1 squared instead of (s1 + 1) squared, a missing + 1, the code's mu0^(s0 / (N - 1))."""
    args = ct.Args()
    table = {0: (2, 0.9), 1: (3, None), 1_000: (6, None), 10_000: (17, None), 100_000: (54, None), 400_000: (107, None),
             799_999: (151, 0.998605)}
    for it, (N, mu) in table.items():
        assert ct.levels(it, args) == N
        assert mu is None or abs(ct.mu(it, args) - mu) < 1e-6
        assert ct.mu(it, args) == pytest.approx(math.exp(2 * math.log(0.9) / N))
    every = [ct.levels(it, args) for it in range(0, 800_000, 10)]
    assert set(every) >= set(range(7, 152)) and sorted(every) == every
    assert abs(sum(n >= 100 for n in every) / len(every) - 0.57) < 0.005


GRID = [.002, .00753, .02293, .05995, .13952, .29644, .58535, 1.08817, 1.92334, 3.25682, 5.31519, 8.40094, 12.91008,
        19.35245, 28.37458, 40.78557, 57.58598, 80.]


@each
def test_grid(module):
    ts = module.karras(18, module.Args())
    assert ts.dtype == torch.float64 and torch.allclose(ts, torch.tensor(GRID).double(), rtol=1e-3, atol=1e-5)
    assert torch.allclose(module.karras(2, module.Args()), torch.tensor([T_MIN, 80.0]).double())
    assert module.karras(1281, module.Args()).diff().min() > 3.8e-5          # increasing, from t_min on


@each
def test_pairs_are_neighbours_and_every_pair_is_drawn(module):
    """randint up to N - 2, a grid that begins at its second point, r and t exchanged."""
    torch.manual_seed(0)
    args = settled(module)
    N = 18 if module is cd else module.levels(0, args)
    t, r = module.times(20_000, 0, args, "cpu")[:2]
    ts = module.karras(N, args).float()
    i = (r - ts).flatten(1).abs().argmin(1)
    assert t.shape == r.shape == (20_000, 1, 1, 1) and t.dtype == torch.float32
    assert torch.equal(ts[i], r.flatten()) and torch.equal(ts[i + 1], t.flatten())
    assert set(i.tolist()) == set(range(N - 1))
    if module is not ict:                                 # uniform
        assert (i.bincount() / 20_000 - 1 / (N - 1)).abs().max() < 0.01


# ---- loss ----------------------------------------------------------------------------------------
def unet(dropout=0.0, scale=0.1):
    torch.manual_seed(0)
    net = EDM(UNet(8, 1, ch=16, mult=(1, 2), blocks=1, attn=(4,), dropout=dropout), 0.5, T_MIN)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=scale)
    return net


@each
def test_at_the_lowest_level_the_network_is_the_identity(module):
    """Bit for bit, at the level that times() draws: a rounded t_min would divide the anchor away."""
    x = torch.randn(4, 1, 8, 8)
    t = module.karras(18, module.Args()).float()[0].expand(4, 1, 1, 1)
    assert torch.equal(unet()(x, t), x)


def test_with_two_levels_ct_is_regression_of_the_images(monkeypatch):
    """Step 0: t = 80, r = t_min, and the target is x0 + t_min * eps itself. Squares are summed, not averaged."""
    eps, x0, net = torch.randn(4, 1, 8, 8), torch.rand(4, 1, 8, 8), unet()
    monkeypatch.setattr(torch, "randn_like", lambda x: eps)
    loss, stats = ct.loss_fn(net, unet(scale=0.5), x0, None, 0, ct.Args(), lambda: None)
    t = torch.full((4, 1, 1, 1), 80.0)
    d = (net(x0 + t * eps, t) - x0 - T_MIN * eps).square().flatten(1).mean(1)
    assert torch.allclose(stats["loss"], d.detach(), rtol=1e-5) and torch.allclose(loss, d.mean(), rtol=1e-5)
    assert torch.equal(stats["t"], t) and stats["N"] == 2


@each
def test_no_gradient_reaches_target_or_teacher(module):
    """Only the call at t may be differentiated; an optimiser over a leaking target would be a different method."""
    net, other, calls = unet(), unet(scale=0.2), []
    spy = lambda name, f: lambda x, t, y=None: calls.append((name, out := f(x, t, y))) or out
    loss, _ = loss_of(module, spy("net", net), spy("target", other), torch.randn(8, 1, 8, 8), settled(module))
    loss.backward()
    second = "net" if module is ict else "target"         # iCT's target is itself; the others' is not
    assert [(name, out.requires_grad) for name, out in calls] == [("net", True), (second, False)]
    assert all(p.grad is None for p in other.parameters()) and any(p.grad.abs().max() > 0 for p in net.parameters())


class Drop(torch.nn.Module):
    """A network of which only the mask matters."""
    def forward(self, x, t, y=None):
        return torch.nn.functional.dropout(torch.ones_like(x), 0.3, self.training) * (t / t)


@each
def test_both_calls_share_the_dropout_mask(module):
    """Other masks, or a target in evaluation mode: the distance is of the order of the mask. Also: the mask must not
    reuse the numbers of the noise."""
    net = Drop()
    args = settled(module)
    inside = lambda stats: stats["loss"][stats["t"].flatten() > 0.01]         # cd does not ask its target at r = t_min
    _, stats = loss_of(module, net, net, torch.ones(64, 1, 4, 4), args, reseed=lambda: torch.manual_seed(7))
    assert inside(stats).max() < 1e-6
    _, stats = loss_of(module, net, net, torch.ones(64, 1, 4, 4), args)
    assert inside(stats).min() > 1e-3


def test_the_target_network_drops_the_same_units(train, monkeypatch):
    """The target that main() makes: in training mode, with the network's own dropout."""
    seen = []

    def loss_fn(net, target, *rest, real=ct.loss_fn):
        seen.append((target.training, target.model.kwargs["dropout"], [p.requires_grad for p in target.parameters()]))
        return real(net, target, *rest)
    monkeypatch.setattr(ct, "loss_fn", loss_fn)
    train("ct", "--dropout", "0.3", "--iters", "1")
    (mode, dropout, grads), = seen
    assert mode and dropout == 0.3 and not any(grads)


def test_the_target_follows_with_the_decay_of_its_own_step(train):
    """After step `it` with mu(it), from the new weights: the increment before, or the old weights, are another method."""
    _, run = train("ct", "--iters", "4", "--keep", "--save-every", "1", "--lr", "1e-2", "--s1", "40", "--mu0", "0.5")
    args = ct.Args(iters=4, s1=40, mu0=0.5)
    for it in (1, 2, 3):
        name = f"ckpt-{it + 1:07d}.pt"
        before, net, after = weights(run, "target", f"ckpt-{it:07d}.pt"), weights(run, "net", name), weights(run, "target", name)
        mu = ct.mu(it, args)
        assert mu != ct.mu(it - 1, args)
        for k in net:
            if net[k].is_floating_point():
                assert torch.allclose(after[k], mu * before[k] + (1 - mu) * net[k], atol=1e-6), k
    assert not equal(weights(run, "target"), weights(run, "net"))


@pytest.mark.parametrize("script, expect", [("ct", [2, 21, 30, 36]), ("ict", [11, 11, 21, 21])])
def test_the_first_step_is_step_zero(train, script, expect):
    """N read after the increment would skip N(0)."""
    flags = ["--iters", "4", "--s1", "40"] if script == "ct" else ["--iters", "16"]
    _, run = train(script, *flags, "--log-every", "1", "--save-every", "4")
    assert [line["N"] for line in lines(run / "log.jsonl")][:4] == expect


# ---- runs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("script", ["ct", "ict"])
def test_resume_equals_an_uninterrupted_run_and_keeps_its_length(train, script, capsys):
    """Bit for bit, dropout and target included; a new --iters would change schedules that are half done."""
    _, run = train(script, "--dropout", "0.2", "--keep")
    names = ["net", "ema"] + ["target"] * (script == "ct")
    whole = {k: weights(run, k) for k in names}
    assert torch.load(run / "ckpt.pt")["model"]["t_min"] == T_MIN
    (run / "ckpt-0000002.pt").replace(run / "ckpt.pt")
    train(script, "--resume", str(run), "--iters", "4", "--steps", "3")
    assert all(equal(whole[k], weights(run, k)) for k in names)
    module = sys.modules[script]
    capsys.readouterr()
    with pytest.raises(BadInput):
        parse(module.Args, module.PRESETS, ["--resume", str(run), "--iters", "8"])
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", ["--s0 1", "--s0 200", "--mu0 0", "--t-mid 0.001", "--rho nan", "--t-min 0"])
def test_bad_flags_are_refused(flags, tmp_path, capsys):
    with pytest.raises(BadInput) as e:
        ct.main(parse(ct.Args, ct.PRESETS, ["--device", "cpu", "--iters", "1", "--out", str(tmp_path / "runs"), *flags.split()]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: --") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# ---- sampling ------------------------------------------------------------------------------------
@each
def test_sampling_levels_and_noise(module):
    """Algorithm 1: what f leaves at level t_min needs sqrt(t^2 - t_min^2) more; nothing is added after the last step."""
    args, seen = settled(module), []
    net = lambda x, t, y: seen.append((x, float(t[0]))) or 0 * x + 0.25
    for k, expect in ((1, [80]), (2, [80, args.t_mid]), (3, [80, math.sqrt(80 * args.t_mid), args.t_mid])):
        seen.clear()
        noise = torch.randn(k, 2, 1, 2, 2, dtype=torch.float64)
        out = module.sample(net, noise, None, args)
        assert [t for _, t in seen] == pytest.approx(expect) and torch.equal(out, torch.full_like(out, 0.25))
        for i, (x, t) in enumerate(seen):
            start = 0.25 if i else 0.0
            assert torch.allclose(x, start + math.sqrt(t**2 - T_MIN**2) * noise[i], rtol=1e-12)


@each
def test_samples_of_the_exact_function_have_the_exact_spread(module):
    torch.manual_seed(0)
    s = 0.2
    net = lambda x, t, y: ((s**2 + T_MIN**2) / (s**2 + t**2)).sqrt() * x
    for k in (1, 2, 4):
        args = settled(module, t_mid=0.3)
        x = module.sample(net, torch.randn(k, 100_000, 1, 1, 1, dtype=torch.float64), None, args)
        assert abs(x.std() / s - 1) < 0.01


# ---- copying -------------------------------------------------------------------------------------
@each
def test_sections_1_to_3_run_in_a_bare_namespace(module):
    text = (ROOT / f"{module.__name__}.py").read_text()
    names = dict(torch=torch, math=math)
    exec(text[text.index("# ==== 1."):text.index("# ==== 4.")], names)
    args = SimpleNamespace(**vars(settled(module)))
    w = torch.tensor(0.5, requires_grad=True)
    net = lambda x, t, y: w * x / (1 + t)
    loss, _ = loss_of(SimpleNamespace(__name__=module.__name__, loss_fn=names["loss_fn"]), net, net,
                      torch.randn(4, 3, 8, 8), args, it=25, reseed=lambda: torch.manual_seed(0))
    loss.backward()
    assert w.grad.isfinite() and names["sample"](net, torch.randn(2, 4, 3, 8, 8), None, args).shape == (4, 3, 8, 8)


@pytest.mark.slow
def test_compiled_networks_share_the_dropout_mask(monkeypatch):
    """A compiled network and an eager target, or the reverse, draw other masks from the same seed."""
    net, target, t = unet(dropout=0.5), unet(dropout=0.5), torch.full((4, 1, 1, 1), 0.7)
    monkeypatch.setattr(ct, "times", lambda *a: (t, t))
    for both in (True, False):
        net.compile()
        if both:
            target.compile()
        _, stats = ct.loss_fn(net, target, torch.rand(4, 1, 8, 8), None, 0, ct.Args(), lambda: torch.manual_seed(3))
        assert (float(stats["loss"].max()) < 1e-6) is both
        target = unet(dropout=0.5)

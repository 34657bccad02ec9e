"""The defaults are the papers' recipes for CIFAR-10: every number stands here as its source prints it, and is compared
with what main() really does in one step of a tiny network, of which nothing but the size is changed."""
import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common import teacher as teachers
from common.data import Data
from common.flags import parse
from common.precond import EDM, TrigFlow
from common.run import Run
from common.unet import UNet, UNetBlock

METHODS = ["cd", "ct", "ict", "ect", "scm", "rcm"]
ALL = [*METHODS, "common.teacher"]
TINY = dict(ch=16, mult=(1,), blocks=1, attn=(), batch=4, device="cpu")
DDPMPP = dict(net="ddpmpp", ch=128, mult=(2, 2, 2), blocks=4, attn=(16,), sd=0.5, cond=False)


def holds(script, preset="paper", **expect):
    """Args() itself, and what `--dataset cifar10 --preset paper` makes of it, have these values."""
    m = importlib.import_module(script)
    for args in (m.Args(), parse(m.Args, m.PRESETS, ["--dataset", "cifar10", "--device", "cpu", "--preset", "paper"])):
        own = {k: v for k, v in expect.items() if k != "flip" or args.dataset == "cifar10"}
        assert {k: getattr(args, k) for k in own} == own
    return m


@pytest.fixture
def step(monkeypatch, tmp_path):
    """step(script, it, flag=value, ..): the step `it` of main(); returns what it used and left. ema starts from zero, so
    that the decay can be read off it."""
    def go(script, it=0, **flags):
        m, seen, labels = importlib.import_module(script), SimpleNamespace(opts=[], calls=[]), flags.get("cond", False)
        args = m.Args(**{**TINY, "iters": it + 1, "out": str(tmp_path / "runs"), **flags})
        if script in ("cd", "rcm") or flags.get("mode") == "scd":
            torch.manual_seed(0)
            raw = UNet(8, 1, ch=16, mult=(1,), blocks=1, attn=(), classes=10 * labels, dropout=0.13)
            seen.teacher = (EDM if script == "cd" else TrigFlow)(raw).eval().requires_grad_(False)
            monkeypatch.setattr(teachers, "get", lambda *a, **k: (seen.teacher, None, {}))
            monkeypatch.setattr(teachers, "show", lambda *a: None)
        else:
            args.teacher = "none"

        def start(self, state, data, real=Run.start):
            real(self, state, data)
            seen.state = state
            for p in state["ema"].parameters():
                p.zero_()
            return it

        def batch(self, n, *a, real=Data.batch, **k):
            seen.flip = k["flip"]
            x, seen.y = real(self, n, *a, **k)
            return x, seen.y

        def sample(net, noise, y, args):
            seen.sampled = net
            return noise[0]

        def loss_fn(net, *rest, real=m.loss_fn, **k):
            seen.calls, seen.rest, seen.net = [], rest, net
            seen.mode = {n: net.training for n, net in seen.state.items() if hasattr(net, "training")}
            out = real(net, *rest, **k)
            seen.calls, seen.stats = list(seen.calls), out[1]
            return out

        def call(name, real):
            def f(self, x, t, y=None, **more):
                seen.calls.append((self, y))
                return real(self, x, t, y, **more)
            f.__name__ = name                             # the probe looks it up
            return f

        with monkeypatch.context() as mp:
            mp.setattr(Run, "start", start)
            mp.setattr(Run, "evaluate", lambda self, it, data, draw, steps, **how: draw(torch.zeros(2, 1, 1, 8, 8), None))
            mp.setattr(Run, "finish", lambda self, *a, **k: self.close())
            mp.setattr(Data, "batch", batch)
            mp.setattr(m, "sample", sample)
            mp.setattr(m, "loss_fn", loss_fn)
            mp.setattr(EDM, "forward", call("forward", EDM.forward))
            mp.setattr(TrigFlow, "F", call("F", TrigFlow.F))
            hook = register_optimizer_step_pre_hook(lambda opt, *_: seen.opts.append((type(opt).__name__, *(
                opt.param_groups[0][k] for k in ("lr", "betas", "eps", "weight_decay")))))
            try:
                m.main(args)
            finally:
                hook.remove()
        net, ema = (torch.cat([p.detach().double().flatten() for p in seen.state[k].parameters()]) for k in ("net", "ema"))
        seen.decay = 1 - float(ema @ net / (net @ net))
        (seen.opt,) = seen.opts
        return seen
    return go


# ---- the tables ----------------------------------------------------------------------------------
def near(x):
    return pytest.approx(x, rel=1e-6)


def test_cd(step):
    """Consistency models, Table 3, column CIFAR-10 CD; RAdam without decay or warm-up; random flips;
    the second level is that of the authors' CIFAR-10 notebook, 0,11,17 of 18."""
    m = holds("cd", **DDPMPP | dict(net="ncsnpp"), iters=800_000, batch=512, lr=4e-4, warmup=0, ema=0.9999, dropout=0.0,
              flip=True, solver="heun", mu=0.0, guidance=0.0, boundaries=1, t_min=0.002, t_max=80.0, rho=7.0, t_mid=0.585)
    assert m.segments(m.Args()) == dict(N=18)
    for it in (0, 799_999):
        s = step("cd", it, net="ncsnpp")
        assert s.opt == ("RAdam", 4e-4, (0.9, 0.999), 1e-8, 0)
    assert s.decay == near(0.9999)


def test_ct(step):
    """Consistency models, Table 3, column CIFAR-10 CT; the rest as for CD."""
    m = holds("ct", **DDPMPP | dict(net="ncsnpp"), iters=800_000, batch=512, lr=4e-4, warmup=0, ema=0.9999, dropout=0.0,
              flip=True, s0=2, s1=150, mu0=0.9, t_min=0.002, t_max=80.0, rho=7.0, teacher="none")
    assert [m.levels(it, m.Args()) for it in (0, 1, 1_000, 10_000, 100_000, 799_999)] == [2, 3, 6, 17, 54, 151]
    for it in (0, 799_999):
        s = step("ct", it)
        assert s.opt == ("RAdam", 4e-4, (0.9, 0.999), 1e-8, 0)
    assert s.decay == near(0.9999) and s.state["net"].model.kwargs["fourier"] == 16


def test_ict(step):
    """Improved techniques, Table 1: RAdam 1e-4, 400k steps of 1024, EMA .99993, dropout .3, Fourier scale .02."""
    holds("ict", **DDPMPP | dict(net="ncsnpp"), iters=400_000, batch=1024, lr=1e-4, warmup=0, ema=0.99993, dropout=0.3,
          flip=True, s0=10, s1=1280, c=0.00054, P_mean=-1.1, P_std=2.0, t_min=0.002, t_max=80.0, rho=7.0, teacher="none")
    for it in (0, 399_999):
        s = step("ict", it)
        assert s.opt == ("RAdam", 1e-4, (0.9, 0.999), 1e-8, 0)
    freqs = s.state["net"].model.map_noise.freqs
    assert s.decay == near(0.99993) and s.state["net"].model.kwargs["fourier"] == 0.02 and freqs.abs().max() < 0.1
    assert s.state["net"].model.kwargs["dropout"] == 0.3 and s.state["ema"].model.map_noise.freqs.equal(freqs)


def test_ect(step):
    """The authors' run_ecm.sh (200k) and run_ecm_1hour.sh: 25,000 steps a stage, no flips, no warm-up."""
    recipe = dict(**DDPMPP, batch=128, lr=1e-4, warmup=0, dropout=0.2, flip=False, k=8.0, b=1.0, c=0.0, P_mean=-1.1,
                  P_std=2.0, t_mid=0.821, t_max=80.0)
    m = holds("ect", **recipe, iters=200_000, ema=0.9999, q=2.0, double=25_000)
    fast = parse(m.Args, m.PRESETS, ["--dataset", "cifar10", "--device", "cpu", "--preset", "fast"])
    hour = recipe | dict(iters=8_000, ema=0.9993, q=256.0)
    assert {k: getattr(fast, k) for k in hour} == hour and fast.double > 8_000
    for it in (0, 199_999):
        s = step("ect", it)
        assert s.opt == ("RAdam", 1e-4, (0.9, 0.999), 1e-8, 0)
        assert s.state["net"].model.kwargs["dropout"] == 0.2
    assert s.decay == near(0.9999)


@pytest.mark.parametrize("mode, dropout", [("sct", 0.2), ("scd", 0.0)])
def test_scm(mode, dropout, step):
    """sCM, App. G.2: RAdam (.9, .99) at 1e-4, EMA half-life 0.5 Mimg at batch 512, dropout .2 (sCT) or 0 (sCD)."""
    m = holds("scm", **DDPMPP, iters=400_000, batch=512, lr=1e-4, warmup=0, lr_decay=0, ema=0.99929, flip=False, c=0.1,
              H=10_000, P_mean=-1.0, P_std=1.4, t_mid=1.1, sigma_max=80.0, dropout=0.2, flow="trig", mode="sct")
    given = ["--dataset", "cifar10", "--device", "cpu", "--preset", "paper", "--mode", mode]
    assert parse(m.Args, m.PRESETS, given).dropout == dropout
    for it in (0, 399_999):
        s = step("scm", it, mode=mode, dropout=dropout)
        assert s.opt == ("RAdam", 1e-4, (0.9, 0.99), 1e-8, 0)
        assert s.state["net"].model.kwargs["dropout"] == dropout
    assert s.decay == near(0.99929)


def test_rcm(step):
    """rCM, Table 4 and the authors' code: AdamW (0, .999) with decay .01, warm-up 100, fake at a fifth of the rate, F 5,
    N_max 4, H 0, 100 : 1; sigma_rel .05, exponent 16.97. Batch, lr and p_G are ours (sCM's p_G). Its data has sd 1."""
    holds("rcm", **DDPMPP, warmup=100, dropout=0.0, flip=False, c=0.1, H=0, loss_scale=100.0, lambda_dmd=1.0,
          student_every=5, N_max=4, fake_lr=0.2, sigma_rel=0.05, rollout="random", P_mean=-1.0, P_std=1.4, guidance=0.0,
          sigma_max=80.0, t_mid=1.1)
    assert step("rcm", 0, lr=1.0).opt == ("AdamW", near(0.01), (0.0, 0.999), 1e-8, 0.01)
    s = step("rcm", 99_995, lr=1e-4)                      # the student's update number 19,999, counted from 0
    assert s.opt == ("AdamW", near(1e-4), (0.0, 0.999), 1e-8, 0.01)
    assert s.decay == pytest.approx((1 - 1 / 20_000) ** 17.972, abs=1e-6)


def test_rcm_times_of_the_scores():
    """ln(sigma / sd) ~ N(0, 1.6^2) in the paper, so that the mean of ln(sigma) is ln 0.5 = -0.69 at sd 0.5."""
    holds("rcm", D_mean=-0.69, D_std=1.6)


def test_teacher(step):
    """EDM, Table 7, CIFAR-10 (train.py's defaults): 200 Mimg of 512, lr 10e-4 after 10 Mimg, Adam (.9, .999), dropout
    .13, augmentation .12, half-life 0.5 Mimg, flips off; Table 1: -1.2, 1.2. TrigFlow's, sCM App. G.1, has the same."""
    holds("common.teacher", **DDPMPP, iters=390_625, batch=512, lr=1e-3, warmup=19_531, ema=0.99929, dropout=0.13,
          flip=False, P_mean=-1.2, P_std=1.2, t_min=0.002, t_max=80.0, rho=7.0, steps=18, ema_ramp=0.05, augment=0.12)
    for it, lr in ((0, 0.0), (1, 5.12e-8), (10_000, 5.12e-4), (19_531, 1e-3), (390_624, 1e-3)):
        s = step("common.teacher", it)
        assert s.opt == ("Adam", pytest.approx(lr, rel=1e-4), (0.9, 0.999), 1e-8, 0)
        assert s.state["net"].model.kwargs["dropout"] == 0.13


@pytest.mark.parametrize("it, batch, beta", [(0, 4, 0.0), (1, 4, 0.5**20), (10, 4, 0.25), (10, 8, 0.25), (100, 4, 0.870551),
                                             (10_000, 8, 0.998615), (100_000, 4, 0.99929)])
def test_the_teachers_average_is_a_share_of_the_images_seen(it, batch, beta, step):
    """EDM's code: half-life h = min(500_000, 0.05 * images seen), decay 0.5 ** (batch / h). Ten steps of 4: h = 2, decay
    0.5^2; of 8: h = 4, decay 0.5^2: the ramp knows no batch. Its end, .99929, is 0.5 ** (512 / 500_000)."""
    assert step("common.teacher", it, batch=batch).decay == pytest.approx(beta, abs=1e-6)


@pytest.mark.parametrize("script", METHODS)
def test_warm_up_is_linear_and_counts_from_one(script, step):
    """--warmup 50 of the small presets: a fiftieth at first, all at the fiftieth step."""
    for it, share in ((0, 1 / 50), (24, 0.5), (49, 1), (50, 1)):
        flags = dict(H=1_000) if script == "rcm" else {}  # all steps the student's
        assert step(script, it, warmup=50, lr=1e-3, **flags).opt[1] == near(1e-3 * share)


# ---- flips and labels ----------------------------------------------------------------------------
@pytest.mark.parametrize("script", ALL)
def test_flips(script, step):
    """On for cifar10 in cd, ct and ict, whatever the preset; off in the others and for digits: a mirrored
    7 is no digit. And what the flag says reaches the batch."""
    m = importlib.import_module(script)
    on = script in ("cd", "ct", "ict")
    for preset in {"small", "fast", "paper"} & set(m.PRESETS):
        for name in ("cifar10", "mnist", "fashion_mnist"):
            args = parse(m.Args, m.PRESETS, ["--dataset", name, "--device", "cpu", "--preset", preset])
            assert args.flip is (on and name == "cifar10"), (preset, name)
    assert parse(m.Args, m.PRESETS, []).flip is False
    for flip in (True, False):
        assert step(script, flip=flip).flip is flip


@pytest.mark.parametrize("script, flags", [("cd", {}), ("cd", dict(guidance=0.5)), ("ct", {}), ("ict", {}), ("ect", {}),
                                           ("scm", {}), ("scm", dict(mode="scd")), ("scm", dict(mode="scd", jvp="fd")),
                                           ("rcm", {}), ("rcm", dict(guidance=0.5)), ("rcm", dict(guidance=0.5, N_max=1))])
def test_every_call_is_told_the_label(script, flags, step):
    """The derivative, the target or the teacher without it: the loss looks the same, and is that of another problem.
    With guidance, and there alone, the teacher is asked once more without. Without --cond nobody is told anything."""
    s = step(script, cond=True, **flags)
    nets = [s.state[k] for k in ("net", "target", "fake") if k in s.state]
    own = [y for net, y in s.calls if any(net is n for n in nets)]
    its = [y for net, y in s.calls if net is getattr(s, "teacher", None)]
    assert len(own) + len(its) == len(s.calls) and len(own) > 1
    assert all(y is not None and y.equal(s.y) for y in own)       # and none dropped: -1
    if flags.get("guidance"):
        assert sum(y is None for y in its) * 2 == len(its) > 0
    assert all(y is None and flags.get("guidance") or y.equal(s.y) for y in its)
    assert bool(its) == (script in ("cd", "rcm") or flags.get("mode") == "scd")
    assert all(y is None for _, y in step(script, **{k: v for k, v in flags.items() if k != "guidance"}).calls)


@pytest.mark.parametrize("flow", ["edm", "trig"])
def test_the_teacher_loses_one_label_in_ten(flow, step):
    """-1, which is no label; ours, for guidance: the paper drops none."""
    (_, y), = step("common.teacher", cond=True, flow=flow, batch=1_000).calls
    assert 0.05 < (y == -1).double().mean() < 0.15
    s = step("common.teacher", cond=True, flow=flow, label_dropout=0.0)
    assert s.calls[0][1].equal(s.y)


# ---- who drops units -----------------------------------------------------------------------------
@pytest.mark.parametrize("script", ALL)
def test_what_is_sampled_drops_nothing_and_what_learns_does(script, step):
    """The averaged network left in training mode samples with dropout."""
    s = step(script, dropout=0.5)
    assert s.sampled is s.state["ema"] and not any(m.training for m in s.sampled.modules())
    assert s.mode["net"] and not s.mode["ema"] and s.mode.get("target", True)
    x, t = torch.randn(2, 1, 8, 8), torch.full((2, 1, 1, 1), 0.7)
    for p in (*s.sampled.parameters(), *s.net.parameters()):      # as it starts, blocks are their skips
        torch.nn.init.normal_(p.data, std=0.3)
    assert s.sampled(x, t).equal(s.sampled(x, t))
    assert not s.net(x, t).equal(s.net(x, t))


@pytest.mark.parametrize("script", ["cd", "ct"])
def test_the_target_drops_the_units_of_the_network(script, step, monkeypatch):
    """In evaluation mode it would not: with equal weights, inputs and seed both give the same."""
    s = step(script, dropout=0.5)
    net, target, x, t = s.net, s.rest[0], torch.randn(2, 1, 8, 8), torch.full((2, 1, 1, 1), 0.7)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    target.load_state_dict(net.state_dict())
    out = []
    for n in (net, target, target):
        torch.manual_seed(3 if len(out) < 2 else 4)
        out.append(n(x, t).detach())
    assert out[0].equal(out[1]) and not out[1].equal(out[2])


# ---- networks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("net, kw", [("ddpmpp", {}), ("ncsnpp", {}), ("adm", dict(ch=64)), ("dit", dict(ch=64))])
def test_ict_starts_every_network_without_a_teacher(net, kw, step):
    """The small Fourier scale is a keyword of U-Nets; DiT has no such features."""
    s = step("ict", net=net, **kw)
    assert s.state["net"].model.kwargs["net"] == net and s.opt[0] == "RAdam"


def test_dropout_stands_between_silu_and_the_second_convolution():
    """EDM's UNetBlock. Before the SiLU, what is kept would not be 1 / (1 - p) times its value."""
    torch.manual_seed(0)
    block, seen = UNetBlock(16, 16, 8, dropout=0.25).train(), []
    block.norm1.register_forward_hook(lambda m, a, out: seen.append(out))
    block.conv1.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    block(torch.randn(8, 16, 8, 8), torch.randn(8, 8))
    h, x = seen
    kept = x != 0
    assert torch.allclose(x[kept], torch.nn.functional.silu(h)[kept] / 0.75, rtol=1e-5)
    assert abs(kept.float().mean() - 0.75) < 0.02


def test_initial_gains():
    """EDM: qkv at sqrt(0.2), what ends a block or the network at 1e-5, all else at 1, of Xavier's uniform."""
    torch.manual_seed(0)
    net, gains = UNet(8, 3, ch=64, mult=(1, 2), blocks=1, attn=(4,)), {}
    for name, m in net.named_modules():
        w = getattr(m, "weight", None)
        if w is not None and w.ndim in (2, 4):
            area = w[0, 0].numel()
            bound = math.sqrt(6 / (area * (w.shape[0] + w.shape[1])))
            gains.setdefault(name.split(".")[-1].split("_", 1)[-1], []).append(float(w.abs().max()) / bound)
            assert m.bias.abs().max() == 0, name
    for name, found in gains.items():
        expect = 0.4472 if name == "qkv" else 1e-5 if name in ("conv1", "proj", "aux_conv") else 1.0
        assert all(0.97 * expect < g <= 1.001 * expect for g in found), (name, found)
    assert {"qkv", "proj", "conv1", "conv0", "affine", "skip", "aux_conv"} <= set(gains)


def test_the_weight_can_be_the_same_at_all_times():
    """w(t) of sCM is linear in sixteen waves; cos(0 t) = 1 is the bias, without which minus ln E|.|^2 has no level."""
    net, t = TrigFlow(torch.nn.Identity()), torch.linspace(0.01, 1.55, 40).view(-1, 1, 1, 1)
    waves = torch.stack([torch.autograd.grad(w, net.head.weight, retain_graph=True)[0][0] for w in net.weigh(t)])
    assert sum(bool((wave - 1).abs().max() < 1e-6) for wave in waves.T) == 1
    assert waves.shape == (40, 32) and (net.weigh(t) == 0).all()

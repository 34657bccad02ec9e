"""Progressive distillation (tests/bench/pd.py): its stages, its target in closed form on Gaussian data, its runs."""
import json
import shutil

import pytest
import torch
from conftest import distances, equal, lines, weights
from test_same import HEADS, flags, free_names, section, shared, text, without_arguments
from torch.optim.optimizer import register_optimizer_step_pre_hook

from common import sample, teacher
from common.flags import BadInput, parse
from tests.bench import pd

M, S = 0.3, 0.6                                           # of the Gaussian data
LEVELS = [0.002, 0.169752756, 2.515218976, 17.52783196, 80.0]         # (a + k/4 (b - a))^7, a^7 = 0.002, b^7 = 80
wide = lambda v: torch.as_tensor(v, dtype=torch.float64).reshape(-1, 1, 1, 1)


def gauss(x, t, y=None):
    """E[x0 | x] for x0 ~ N(M, S^2)."""
    return M + S**2 / (S**2 + t**2) * (x - M)


def euler(x, *ts):
    """The ODE dx/dt = t (x - M) / (S^2 + t^2) of this data, in Euler steps from level to level, by hand."""
    for t, r in zip(ts, ts[1:]):
        x = M + (x - M) * (1 + (r - t) * t / (S**2 + t**2))
    return x


def data(n):
    return M + S * torch.randn(n, 1, 1, 1, dtype=torch.float64)


def fixed(monkeypatch, t, s, r):
    """Levels for times() to return."""
    monkeypatch.setattr(pd, "times", lambda *a: (wide(t), wide(s), wide(r)))


# ---- stages and levels ---------------------------------------------------------------------------
def test_the_stages_of_the_paper():
    """50,000 steps each from N = 4096 on, twice as many for two steps and for one; an end that is off by one."""
    expect = {0: 4096, 49_999: 4096, 50_000: 2048, 100_000: 1024, 499_999: 8, 500_000: 4, 549_999: 4, 550_000: 2,
              649_999: 2, 650_000: 1, 749_999: 1}
    assert {it: pd.stage(it, pd.Args())[0] for it in expect} == expect
    assert pd.stage(560_000, pd.Args()) == (2, 550_000, 650_000)
    two = pd.Args(steps=2, iters=650_000)                 # the same stages, without the last
    assert all(pd.stage(it, two) == pd.stage(it, pd.Args()) for it in range(0, 650_000, 1_000))


@pytest.mark.parametrize("N, steps, iters", [(16, 1, 18), (16, 1, 1_801), (12, 3, 7), (4, 4, 5), (2, 1, 4), (1, 1, 2)])
def test_stages_halve_and_leave_no_gap(N, steps, iters):
    """Each step belongs to one stage; the last ends with the run; none is empty, also where shares are no integers."""
    args = pd.Args(N=N, steps=steps, iters=iters)
    pd.check(args)
    found = list(dict.fromkeys(pd.stage(it, args) for it in range(iters)))
    assert [n for n, *_ in found] == [N // 2**k for k in range(len(found))] and found[-1][0] == steps
    assert [begin for _, begin, _ in found] == [0, *(end for *_, end in found[:-1])] and found[-1][2] == iters
    assert all(pd.stage(it, args) == (n, a, b) for n, a, b in found for it in range(a, b))


def test_levels_of_a_step():
    """t > s > r are neighbours among 2N + 1 levels; the first is t_max, the last t_min, and each step is drawn."""
    args = pd.Args(N=2, steps=1, iters=4)
    torch.manual_seed(0)
    for it, expect in ((0, {(4, 3, 2), (2, 1, 0)}), (1, {(4, 3, 2), (2, 1, 0)}), (3, {(4, 2, 0)})):
        drawn = torch.cat(pd.times(1_000, it, args, "cpu"), 1).flatten(1)
        assert drawn.shape == (1_000, 3)
        for row in drawn.unique(dim=0):
            near = [min(range(5), key=lambda i: abs(LEVELS[i] - float(v))) for v in row]
            assert torch.allclose(row, torch.tensor(LEVELS)[near], rtol=1e-5)
            expect = expect - {tuple(near)}
        assert not expect
    first = pd.times(1_000, 0, args, "cpu")[0]
    assert 400 < (first > 50).sum() < 600                 # uniform


# ---- the target, in closed form ------------------------------------------------------------------
@pytest.mark.parametrize("t, s, r", [(80.0, 2.5, 0.002), (80.0, 17.5, 2.5), (0.1, 0.05, 0.002), (80.0, 79.99, 79.98)])
def test_one_step_to_the_answer_ends_where_two_of_the_teacher_end(t, s, r):
    """E = 1 + (s - t) t / (S^2 + t^2) for the first step, E' for the second. A second step from x_t, or at level t."""
    x = data(50) + t * torch.randn(50, 1, 1, 1, dtype=torch.float64)
    D = pd.answer(gauss, x, wide(t), wide(s), wide(r), None)
    E, E2 = 1 + (s - t) * t / (S**2 + t**2), 1 + (r - s) * s / (S**2 + s**2)
    assert torch.allclose(x + (r - t) * (x - D) / t, M + E * E2 * (x - M), rtol=1e-11, atol=1e-11)
    assert torch.allclose(D, x - t * (E * E2 - 1) / (r - t) * (x - M), rtol=1e-9, atol=1e-9)
    narrow = pd.answer(gauss, x.float(), *(wide(v).float() for v in (t, s, r)), None)
    assert torch.allclose(narrow.double(), D, atol=1e-4), "the difference of two neighbours, divided by their gap"


def test_the_loss_is_zero_for_the_two_steps_alone(monkeypatch):
    t, s, r = [80.0, 2.5, 0.5], [17.0, 1.0, 0.1], [2.5, 0.2, 0.002]
    fixed(monkeypatch, t, s, r)
    student = lambda x, *_: torch.stack([v - a * (euler(v, a, b, c) - v) / (c - a) for v, a, b, c in zip(x, t, s, r)])
    loss, stats = pd.loss_fn(student, gauss, data(3), None, 0, pd.Args())
    assert loss < 1e-20 and stats["loss"].shape == (3,) and stats["t"].flatten().tolist() == t
    for other in (gauss, lambda *a: student(*a) + 0.1):   # the teacher itself is no minimiser
        assert (pd.loss_fn(other, gauss, data(3), None, 0, pd.Args())[1]["loss"] > 1e-6).all()


def test_distances_have_the_weight_of_the_truncated_snr(monkeypatch):
    """max(1/t^2, 1) times the mean over the image; 1 / t^2 alone, or the sum."""
    t, delta = [0.1, 0.5, 1.0, 2.0, 50.0], torch.randn(5, 3, 4, 4, dtype=torch.float64)
    fixed(monkeypatch, t, [v / 2 for v in t], [v / 4 for v in t])
    image = torch.randn(5, 3, 4, 4, dtype=torch.float64)  # a teacher that always says this: so does the answer
    loss, stats = pd.loss_fn(lambda *a: image + delta, lambda *a: image, 0 * image, None, 0, pd.Args())
    expect = torch.tensor([100.0, 4.0, 1.0, 1.0, 1.0], dtype=torch.float64) * (delta**2).mean((1, 2, 3))
    assert torch.allclose(stats["loss"], expect, rtol=1e-9) and torch.allclose(loss, expect.mean())


class Linear(torch.nn.Module):
    """D(x, t) = a_i x + b_i, with its own a and b at each level of a student with N steps."""
    def __init__(self, N):
        super().__init__()
        self.ts = pd.karras(N + 1, pd.Args())[1:]
        self.weight = torch.nn.Parameter(torch.zeros(2, N, dtype=torch.float64))

    def forward(self, x, t, y):
        i = (self.ts - t.flatten()[:, None].double()).abs().argmin(1)
        a, b = self.weight[:, i].view(2, -1, 1, 1, 1)
        return a * x + b


def test_distilled_to_one_step_it_makes_all_steps_of_the_first_teacher():
    """8 -> 4 -> 2 -> 1, the whole ladder. The loss is quadratic in the weights of `Linear`: its minimiser, one Newton
    step away, is found exactly. Also levels that are swapped, or those of another stage."""
    torch.manual_seed(0)
    args, guide = pd.Args(N=4, steps=1, iters=5), gauss
    noise = torch.randn(4, 200, 1, 1, 1, dtype=torch.float64) / 300       # small enough for no clamp
    for it, N in ((0, 4), (1, 2), (3, 1)):
        net, x0 = Linear(N), data(4_000)
        loss, _ = pd.loss_fn(net, guide, x0, None, it, args)
        g, = torch.autograd.grad(loss, net.weight, create_graph=True)
        H = torch.stack([torch.autograd.grad(v, net.weight, retain_graph=True)[0].flatten() for v in g.flatten()])
        step = torch.linalg.solve(H, g.detach().flatten())
        net.weight.data -= step.view_as(net.weight)
        ts = pd.karras(2 * 4 + 1, args).flip(0).tolist()                  # all levels of the first teacher
        expect = euler(80 * noise[0], *ts)
        assert expect.abs().max() < 1 and (expect.std() > 1e-4)
        assert torch.allclose(pd.sample(net, noise[:N], None, args), expect, rtol=1e-4, atol=1e-5)
        guide = net.requires_grad_(False)


def test_the_target_is_a_constant_and_everyone_is_told_the_label(monkeypatch):
    """A gradient into the teacher or a graph of it; two calls of the student; a label that is lost."""
    fixed(monkeypatch, [80.0, 0.4], [2.5, 0.1], [0.1, 0.002])
    w, v, asked, y = (torch.tensor(0.5, requires_grad=True), torch.tensor(0.2, requires_grad=True), [], torch.arange(2))

    def net(x, t, label):
        asked.append(("net" if torch.is_grad_enabled() else "teacher", *t.flatten().tolist()))
        assert label is y
        return (v if torch.is_grad_enabled() else w) * x
    loss, _ = pd.loss_fn(net, net, data(2), y, 0, pd.Args())
    loss.backward()
    assert w.grad is None and v.grad.abs() > 0
    assert asked == [("teacher", 80.0, 0.4), ("teacher", 2.5, 0.1), ("net", 80.0, 0.4)]


# ---- sampling ------------------------------------------------------------------------------------
@pytest.mark.parametrize("K", [1, 2, 4])
def test_sampling_is_ddim_from_one_noise(K):
    """Levels of the stage; no noise added on the way; no last step to level 0."""
    seen, noise = [], torch.randn(K, 3, 1, 2, 2, dtype=torch.float64)

    def net(x, t, y):
        assert t.shape == (3, 1, 1, 1)
        seen.append(float(t[0, 0, 0, 0]))
        return 0 * x
    out = pd.sample(net, noise, None, pd.Args())
    assert seen == pytest.approx(LEVELS[:0:-4 // K], rel=1e-6)
    assert torch.allclose(out, 0.002 * noise[0], rtol=1e-9)
    assert torch.equal(out, pd.sample(net, torch.cat([noise[:1], torch.randn_like(noise[1:])]), None, pd.Args()))
    assert pd.sample(lambda x, t, y: 0 * x + 2, noise, None, pd.Args()).max() == 1


# ---- runs ----------------------------------------------------------------------------------------
PD = "tests.bench.pd"
LADDER = "--N 4 --iters 10 --ema 0.5 --lr 1e-3 --save-every 3 --log-every 1 --keep".split()     # ends: 2, 6, 10


@pytest.fixture
def ladder(train):
    """The folders of a teacher and of a run with three stages."""
    guide = train("common.teacher", "--steps", "2", "--iters", "2")[1]
    metrics, run = train(PD, "--teacher", str(guide), *LADDER)
    return metrics, run, guide


def at(run, part, it):
    return weights(run, part, f"ckpt-{it:07d}.pt")


def test_each_stage_begins_with_the_average_of_the_last(ladder, train, monkeypatch):
    """A teacher that stays, or is replaced too early or by the student's raw weights; a student that goes on from other
    weights than its teacher's; an optimiser that remembers."""
    _, run, guide = ladder
    first = teacher.load(guide).state_dict()
    assert equal(at(run, "teacher", 2), first)            # before it is replaced: that is the next step's
    assert equal(at(run, "teacher", 3), at(run, "ema", 2)) and equal(at(run, "teacher", 6), at(run, "ema", 2))
    assert equal(at(run, "teacher", 9), at(run, "ema", 6)) and equal(at(run, "teacher", 10), at(run, "ema", 6))
    assert not equal(at(run, "ema", 2), at(run, "net", 2)) and not equal(at(run, "ema", 2), first)
    old, net, new = at(run, "ema", 2), at(run, "net", 3), at(run, "ema", 3)
    assert all(torch.allclose(new[k], 0.1 * old[k] + 0.9 * net[k], atol=1e-6) for k in net), "short at first, again"
    steps = {it: {float(s["step"]) for s in at(run, "opt", it)["state"].values()} for it in (2, 3, 6, 9, 10)}
    assert steps == {2: {2}, 3: {1}, 6: {4}, 9: {3}, 10: {4}}
    same = []

    def spy(net, teacher, x0, y, it, args, real=pd.loss_fn):
        same.extend([it] * equal(net.state_dict(), teacher.state_dict()))
        assert not teacher.training and net.training
        return real(net, teacher, x0, y, it, args)
    monkeypatch.setattr(pd, "loss_fn", spy)
    train(PD, "--teacher", str(guide), *LADDER)
    assert same == [0, 2, 6]


def test_figures_are_of_a_network_in_the_steps_of_its_stage(ladder):
    """Two steps of a student of one, or one of a student of two."""
    metrics, run, _ = ladder
    found = [(s["it"], s["steps"]) for s in distances(run) if s["net"] == "ema"]
    assert found == [(2, 4), (3, 2), (6, 2), (9, 1), (10, 1)]
    assert set(metrics) == {"run", "fd_pixels_teacher", "fd_pixels_1step"}
    log = lines(run / "log.jsonl")
    assert [s["lr"] for s in log] == pytest.approx([1e-3, 5e-4, *[1e-3, 7.5e-4, 5e-4, 2.5e-4] * 2], rel=1e-4)


@pytest.mark.parametrize("it", [2, 3, 6])
def test_a_resumed_run_is_the_same_bit_for_bit_and_needs_its_first_teacher_no_more(it, ladder, train):
    """At the end of a stage, where the teacher is replaced, and within one, where it is another than the first."""
    _, run, guide = ladder
    whole, figures = torch.load(run / "ckpt.pt"), lines(run / "eval.jsonl")
    shutil.rmtree(guide)
    (run / "ckpt.prev.pt").unlink()
    (run / f"ckpt-{it:07d}.pt").replace(run / "ckpt.pt")
    train(PD, "--resume", str(run))
    again = torch.load(run / "ckpt.pt")
    assert all(equal(whole[k], again[k]) for k in ("net", "ema", "teacher")) and again["it"] == 10
    a, b = (c["opt"]["state"] for c in (whole, again))
    assert a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    value = lambda found: [(s["it"], s["steps"], s["value"]) for s in found]
    assert value(lines(run / "eval.jsonl")) == value(figures)


def test_a_run_is_sampled_in_its_own_steps(ladder, train, tmp_path, capsys):
    """Down to --steps 2: python -m common.sample draws DDIM in two steps, and nothing that was not trained."""
    _, _, guide = ladder
    metrics, run = train(PD, "--teacher", str(guide), *LADDER, "--steps", "2", "--iters", "4")
    assert "fd_pixels_2step" in metrics and "fd_pixels_1step" not in metrics
    images, _ = sample.main([str(run), "--n", "4", "--out", str(tmp_path / "x.png"), "--device", "cpu"])
    method, args, net = sample.load_run(run)
    assert method is pd and equal(net.state_dict(), weights(run, "ema")) and (args.N, args.steps) == (4, 2)
    z = sample.noise_of(range(4), 1, (1, 8, 8), "cpu")[0]
    x = 80 * z
    for t, r in ((LEVELS[4], LEVELS[2]), (LEVELS[2], LEVELS[0])):
        with torch.no_grad():
            x = x + (r - t) / t * (x - net(x, torch.full((4, 1, 1, 1), t, dtype=torch.float64)))
    assert (sample.quantise(x.clamp(-1, 1)).int() - images.int()).abs().max() <= 1
    for words in ("--steps 1", "--steps 4", "--ts 80,1", "--edit inpaint", "--find-ts", "--t-mid 1"):
        with pytest.raises(BadInput):
            sample.main([str(run), *words.split()])
        assert "2 steps alone" in capsys.readouterr().err
    for flag in ("--steps", "--iters"):                   # the stages depend on them
        with pytest.raises(BadInput):
            train(PD, "--resume", str(run), flag, "1")
        assert "defines the run" in capsys.readouterr().err


def test_gradients_are_clipped_and_what_is_sampled_of_many_steps_is_not_measured(train, monkeypatch):
    norms, real = [], pd.loss_fn

    def large(*args):
        loss, stats = real(*args)
        return 1e6 * loss, stats
    monkeypatch.setattr(pd, "loss_fn", large)
    hook = register_optimizer_step_pre_hook(lambda opt, *_: norms.append((type(opt).__name__, float(
        sum((p.grad**2).sum() for g in opt.param_groups for p in g["params"]).sqrt()))))
    guide = train("common.teacher", "--steps", "2", "--iters", "1")[1]
    norms.clear()
    _, run = train(PD, "--teacher", str(guide), "--N", "128", "--steps", "64", "--iters", "4")
    hook.remove()
    assert len(norms) == 4 and all(norm == ("Adam", pytest.approx(1, abs=1e-4)) for norm in norms)
    assert [(s["it"], s["steps"]) for s in distances(run) if s["net"] == "ema"] == [(4, 64)]
    assert (run / "source/tests/bench/pd.py").read_text() == text(PD)
    assert json.loads((run / "config.json").read_text())["about"]["script"] == PD


@pytest.mark.parametrize("words, said", [
    ("--N 6", "--N 6"), ("--N 1 --steps 2", "--steps = 2"), ("--N 0", "--N"), ("--N 8 --iters 7", "--iters 7"),
    ("--teacher none", "--teacher none"), ("--t-min 80", "--t-max")])
def test_bad_input_is_one_line_before_anything_is_written(words, said, tmp_path, capsys):
    with pytest.raises(BadInput) as e:
        pd.main(parse(pd.Args, pd.PRESETS, ["--device", "cpu", "--out", str(tmp_path / "runs"), *words.split()]))
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


# ---- form ----------------------------------------------------------------------------------------
def test_it_has_the_shape_of_a_method_file():
    """What `diff cd.py tests/bench/pd.py` shows is the algorithm and no more: the flags and the loop are the same."""
    t, cd = text(PD), text("cd")
    assert shared(t)[0] == shared(cd)[0]
    mine, its = (shared(v)[1] for v in (t, cd))
    assert not set(mine) - set(its)
    assert [line.split("#")[0].strip() for line in its if line.strip() and line not in mine] == [
        "def reseed():", "run.seed(it, part, stream=1)",   # one call of the student a step: no mask to replay
        "if run.due(it):", "run.evaluate(it, data, draw, steps)"], "stages end between saves, each with its own steps"
    assert free_names(section(t, 1, 4)) <= {"torch", "math"}
    assert [r.split("(")[0].strip("# =") for r in t.splitlines() if r.startswith("# ====")] == HEADS
    assert len(t.splitlines()) <= 260 and max(map(len, t.splitlines())) <= 100 and t.isascii()
    assert all(f"args.{name}" in without_arguments(t) for name, *_ in flags(t, own=True))


def test_the_defaults_are_those_of_the_consistency_models_paper():
    """Adam at 5e-5, falling to 0 within each stage; no average; batch 512; EDM's noise levels; NCSN++; random flips."""
    expect = dict(net="ncsnpp", ch=128, mult=(2, 2, 2), blocks=4, attn=(16,), dropout=0.0, N=4096, iters=750_000,
                  batch=512, lr=5e-5, warmup=0, ema=0.0, steps=1, t_min=0.002, t_max=80.0, rho=7.0, sd=0.5, flip=True)
    args = parse(pd.Args, pd.PRESETS, ["--dataset", "cifar10", "--preset", "paper", "--device", "cpu"])
    assert {k: getattr(args, k) for k in expect} == expect
    assert {k: getattr(pd.Args(), k) for k in expect} == expect | dict(flip=False)
    for preset in pd.PRESETS:
        pd.check(pd.Args(**{k: v for k, v in pd.PRESETS[preset].items() if k != "cost"}))

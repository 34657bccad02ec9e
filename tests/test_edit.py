"""Any noise levels, their search, zero-shot editing: every docstring says which mistake the test catches."""
import dataclasses
import json
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Net, pixels
from PIL import Image
from test_sample import close, draw, refused                      # noqa: F401 (fixtures)

import ect
from common import edit, fid, sample, teacher
from common.data import load
from common.fid import fd_pixels
from common.flags import BadInput, config_of
from common.networks import backbone
from common.precond import EDM, TrigFlow
from common.unet import UNet

W = [.2989, .5870, .1140]


class Gaussian:
    """The exact consistency function of data N(m, s^2): slope a(t) = sqrt((s^2 + t_min^2) / (s^2 + t^2))."""
    def __init__(self, m=0.3, s=0.5, t_min=0.0):
        self.m, self.s, self.t_min = m, s, t_min

    def a(self, t):
        return ((self.s**2 + self.t_min**2) / (self.s**2 + t**2)) ** 0.5

    def __call__(self, x, t, y):
        assert t.shape == (len(x), 1, 1, 1) and t.dtype == x.dtype == torch.float64
        return self.m + self.a(t) * (x - self.m)


def units(k):
    """Noise [k, k + 1, 1, 1, 1]: image i has a one in step i alone, and the last image has none."""
    return torch.eye(k + 1, dtype=torch.float64)[:k].view(k, k + 1, 1, 1, 1)


# ---- Algorithm 1 ---------------------------------------------------------------------------------
@pytest.mark.parametrize("ts", [[80.0], [80.0, 0.821], [5.0, 2.0, 1.0, 0.9, 0.4], [0.31]])
@pytest.mark.parametrize("t_min", [0.0, 0.3])
def test_multistep_keeps_the_distribution(ts, t_min):
    """Noise of variance t^2 instead of t^2 - t_min^2, an index for a level, steps that share noise or lack it: data
    of N(m, s^2 + t_min^2) stays that, exactly, whatever the levels. The map is affine; coefficients give moments."""
    net = Gaussian(t_min=t_min)
    std = (net.s**2 + t_min**2) ** 0.5
    out = edit.multistep(net, units(len(ts)), None, ts, net.m).flatten()
    mean, noise = out[-1], out[:-1] - out[-1]
    x = edit.multistep(net, units(len(ts))[:, -1:], None, ts, net.m + std) - mean
    assert mean.item() == pytest.approx(net.m, abs=1e-12)
    assert ((noise**2).sum() + x**2).item() == pytest.approx(std**2, abs=1e-12) and (noise > 0).all()


def test_levels_are_standard_deviations_for_trigflow_too():
    """Its times taken for levels, or x not scaled: the method's own sampler goes through the same points."""
    import scm
    torch.manual_seed(0)
    net = TrigFlow(UNet(8, 1, 16, (1,), 1, (4,)), 0.75)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    noise, args = torch.randn(2, 3, 1, 8, 8), SimpleNamespace(sigma_max=80.0, t_mid=1.1, sd=0.75)
    own = scm.sample(net, noise, None, args)
    ts = [80.0, 0.75 * math.tan(1.1)]
    assert torch.allclose(edit.multistep(net, noise, None, ts).clamp(-1, 1), own, atol=1e-3) and own.std() > 0.1


def test_edits_and_search_of_a_trigflow_run(train, tmp_path, monkeypatch):
    """It has no t_max, and no t_min among its arguments."""
    _, run = train("scm", "--iters", "1")
    sample.main([str(run), "--edit", "inpaint", "--n", "2", "--out", str(tmp_path / "x.png")])
    monkeypatch.setattr(edit, "search", lambda score, lo, hi: score(1.0) and 1.0)
    assert sample.main([str(run), "--find-ts", "--n", "16"]) == 1.0


def test_multistep_starts_from_nothing():
    """An image left in the first step; N(0, T^2) has no trace of the data but 2e-5 of the variance."""
    net, ts = Gaussian(), [80.0, 0.821]
    out = edit.multistep(net, units(2), None, ts).flatten()
    first = net.m * (1 - net.a(80.0))
    assert out[-1].item() == pytest.approx(net.m + net.a(0.821) * (first - net.m), abs=1e-12)
    assert ((out[:-1] - out[-1]) ** 2).sum().item() == pytest.approx(net.s**2, abs=1e-5)


def test_the_result_is_never_noisy():
    """Noise after the last network call, where the last level is not the boundary; the root of a negative number."""
    net = Gaussian(s=1e-9)
    assert (edit.multistep(net, units(2), None, [80.0, 5.0]) - net.m).abs().max() < 1e-8
    net, x, one = Gaussian(t_min=0.3), torch.ones(1, 1, 1, 1), torch.ones(1)
    for t in (0.3, 0.2999999, 0.1):
        assert torch.equal(edit.noised(net, x, torch.tensor(t), one), x)


def test_the_methods_own_levels():
    """Another sampler here than in the method's file."""
    args, noise, net = ect.Args(), torch.randn(3, 2, 1, 4, 4).double(), Gaussian(m=0, s=0.2)
    for k, ts in (1, [80]), (2, [80, 0.821]), (3, [80, (80 * 0.821) ** 0.5, 0.821]):
        own = ect.sample(net, noise[:k], None, args)
        assert (own - edit.multistep(net, noise[:k], None, ts)).abs().max() < 1e-12
    with pytest.raises(ValueError):
        edit.multistep(net, noise, None, [80.0])          # as many slices as levels


def test_karras():
    """The other end first, roots the wrong way round: numbers of EDM's sampler, 18 levels, see tests of teacher.py."""
    ts = edit.karras(80, 0.002, 18)
    assert ts == pytest.approx(sorted(ts, reverse=True)) and len(edit.karras(80, 0.002)) == 40
    assert [ts[i] for i in (0, 1, 11, 17)] == pytest.approx([80, 57.58598, 0.58535, 0.002], rel=1e-5)


# ---- the search ----------------------------------------------------------------------------------
@pytest.mark.parametrize("top", [0.011, 0.3, 0.821, 1.7, 40.0, 79.0])
@pytest.mark.parametrize("flat", [math.inf, 1.2])
def test_search_finds_the_optimum(top, flat):
    """A bracket that loses the minimum, at the ends or beside plateaus; a level returned that was not the best
    measured, or that cannot be typed; too many measurements."""
    seen = {}

    def score(t):
        assert t not in seen and 0.01 <= t <= 80 and float(f"{t:.4g}") == t
        seen[t] = min(abs(math.log(t / top)), flat)
        return seen[t]

    best = edit.search(score, 0.01, 80.0)
    assert seen[best] == min(seen.values()) and abs(math.log(best / top)) < math.log(1.1) and len(seen) <= 15


def test_search_returns_the_best_measured():
    """The last probe, or the middle of the last bracket (the stale variables of public scripts): scores at random."""
    for seed in range(20):
        g, seen = torch.Generator().manual_seed(seed), {}
        best = edit.search(lambda t: seen.setdefault(t, torch.rand(1, generator=g).item()), 0.01, 80.0)
        assert seen[best] == min(seen.values())


# ---- Algorithm 4 ---------------------------------------------------------------------------------
def completed(q):
    """An orthogonal matrix whose first column is q / |q|."""
    Q = torch.eye(len(q), dtype=torch.float64)
    Q[:, 0] = torch.as_tensor(q, dtype=torch.float64)
    Q = torch.linalg.qr(Q)[0]
    return Q * Q[:, 0].sum().sign()


def coordinates(kind, p, size=4):
    """A and its inverse as the paper has them, and Omega, 1 where to generate. Images [B, 3, size, size]."""
    if kind == "inpaint":
        omega = torch.zeros(size, size, dtype=torch.float64)
        omega[1:, 2] = 1
        return lambda x: x, lambda x: x, omega
    if kind == "colorize":                                # each pixel, a row vector, times Q
        Q, omega = completed(W), torch.ones(3, 1, 1, dtype=torch.float64)
        omega[0] = 0
        return (lambda x: torch.einsum("bchw,ck->bkhw", x, Q)), (lambda x: torch.einsum("bkhw,ck->bchw", x, Q)), omega
    n = size // p                                         # each patch, a row vector, times Q
    Q, omega = completed(torch.ones(p * p)), torch.ones(p * p, dtype=torch.float64)
    omega[0] = 0

    def A(x):
        return x.view(-1, 3, n, p, n, p).permute(0, 1, 2, 4, 3, 5).reshape(-1, 3, n, n, p * p) @ Q

    def back(x):
        return (x @ Q.T).view(-1, 3, n, n, p, p).permute(0, 1, 2, 4, 3, 5).reshape(-1, 3, size, size)
    return A, back, omega


@pytest.mark.parametrize("t_min", [0.0, 0.002])
@pytest.mark.parametrize("kind, p", [("inpaint", None), ("colorize", None), ("superres", 2), ("superres", 4)])
def test_algorithm_4_line_by_line(kind, p, t_min):
    """A forgotten on x, an Omega the wrong way round, a start from an index instead of a level, a first line left out,
    nothing put back after a step, other luminance weights, another patch: the algorithm written as it is printed."""
    torch.manual_seed(0)
    net, ts, y = Gaussian(m=0.1, s=0.2, t_min=t_min), [80.0, 5.0, 0.7, 0.1], torch.rand(2, 3, 4, 4).double() * 2 - 1
    noise = torch.randn(4, *y.shape).double()
    A, back, omega = coordinates(kind, p)
    assert (back(A(y)) - y).abs().max() < 1e-14
    replace = lambda x: back(A(y) * (1 - omega) + A(x) * omega)
    f = lambda x, t: net(x, torch.full((len(x), 1, 1, 1), t, dtype=torch.float64), None).clamp(-1, 1)
    seen = back(A(y) * (1 - omega))
    x = replace(f(seen + ts[0] * noise[0], ts[0]))
    for t, z in zip(ts[1:], noise[1:]):
        x = replace(f(x + (t**2 - t_min**2) ** 0.5 * z, t))
    ours = edit.change(net, kind, y, noise, None, ts, omega.bool(), p)
    assert (ours[1] - x).abs().max() < 1e-8 and (x - y).abs().max() > 0.1
    assert (A(ours[1]) - A(y)).mul(1 - omega).abs().max() < 1e-14 and not torch.allclose(A(ours[1]), A(y))
    if kind != "colorize":
        assert (ours[0] - seen).abs().max() < 1e-14
    else:                                                 # shown grey, with the same coordinate
        assert (A(ours[0]) - A(y))[:, 0].abs().max() < 3e-4 and (ours[0] - ours[0][:, :1]).abs().max() == 0


def test_the_papers_colour_matrix():
    """The test's own matrix: Appendix D prints one with this first column."""
    Q = completed(W)
    assert (Q.T @ Q - torch.eye(3)).abs().max() < 1e-15
    assert Q[:, 0].tolist() == pytest.approx([.4471, .8780, .1705], abs=8e-5)


def test_strokes_keep_their_input_and_denoising_is_one_call():
    """The first line of Algorithm 4, which with Omega = 1 leaves nothing of a stroke; noise that is not sigma's."""
    net, x0 = Gaussian(m=0, s=0.2), torch.full((1, 1, 1, 1), 0.4).double()
    z = torch.full((2, 1, 1, 1, 1), 0.05).double()
    seen, out = edit.change(net, "stroke", x0, z, None, [0.5, 0.2])
    once = net.a(0.5) * (0.4 + 0.5 * 0.05)
    assert seen.item() == pytest.approx(0.425)
    assert out.item() == pytest.approx(net.a(0.2) * (once + 0.2 * 0.05))
    seen, out = edit.change(net, "denoise", x0, z[:1], None, [0.5])
    assert seen.item() == pytest.approx(0.425) and out.item() == pytest.approx(once)


def test_slerp():
    """An angle or a norm shared by the batch, degrees of a straight line, ends exchanged."""
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 1, 8, 8).double()
    b[0] = a[0] + 0.5 * b[0]                              # angles of 27 and about 90 degrees
    a, b = (v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for v in (a, b))
    w = torch.tensor([0, 0.25, 0.5, 1, 0.3]).double().view(-1, 1, 1, 1)
    out = edit.slerp(a, b, w)
    angle = lambda u, v: (u * v).flatten(1).sum(1).clamp(-1, 1).acos()
    assert (out.flatten(1).norm(dim=1) - 1).abs().max() < 1e-12
    assert (angle(a, out) - w.flatten() * angle(a, b)).abs().max() < 1e-7
    assert torch.allclose(out[2:3], edit.slerp(a[2:3], b[2:3], w[2:3])) and torch.allclose(out[3], b[3])


# ---- the command ---------------------------------------------------------------------------------
def new_run(folder, dataset, **flags):
    """A run folder of a small network that nobody trained, its weights shaken so that every one matters."""
    torch.manual_seed(0)
    args = ect.Args(dataset=str(dataset), ch=16, mult=(1,), blocks=1, attn=(), dropout=0.0, **flags)
    data = load(args.dataset)
    net = EDM(backbone(args, data), args.sd)
    state = {k: v + 0.05 * torch.randn_like(v) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    folder.mkdir()
    torch.save(dict(ema=state, net=state, model=net.spec, it=1), folder / "ckpt.pt")
    config = dataclasses.asdict(args) | dict(about=dict(script="ect", data_sha256=data.sha256))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    return new_run(tmp_path_factory.mktemp("grey") / "run", "digits", sd=0.75)


@pytest.fixture(scope="module")
def colour(tmp_path_factory):
    """A run with labels on 20 colour images of 8 x 8."""
    folder = tmp_path_factory.mktemp("colour")
    rng = np.random.default_rng(0)
    np.savez(folder / "set.npz", images=rng.integers(0, 256, (20, 8, 8, 3), np.uint8), labels=np.arange(20) % 7 % 3)
    return new_run(folder / "run", folder / "set.npz", cond=True)


def test_levels_reach_the_sampler(grey, draw, capsys):
    """Levels read and not used, or not those given; other noise than without --ts."""
    assert close(draw(grey, "--ts", "80,0.821")[0], draw(grey)[0])
    assert close(draw(grey, "--ts", "80")[0], draw(grey, "--steps", 1)[0])
    three = draw(grey, "--ts", "80 2.5 0.8")[0]
    assert "6 images in 3 steps" in capsys.readouterr().out
    assert not close(three, draw(grey, "--steps", 3)[0])
    assert close(three[:2], draw(grey, "--ts", "80,2.5,.8", "--n", 2)[0])


def test_find_ts_measures_what_sampling_draws(grey, draw, capsys, monkeypatch):
    """Figures of other images than those that --ts draws, or against other real ones; noise that changes with the
    level; a figure printed for another level; a best level that is not the last line's."""
    seen = {}

    def search(score, lo, hi):
        assert (lo, hi) == (0.01, 80)
        return min((0.821, 3.0, 20.0), key=lambda t: seen.setdefault(t, score(t)))
    monkeypatch.setattr(edit, "search", search)
    best = sample.main([str(grey), "--find-ts", "--n", "40", "--batch", "16"])
    out = capsys.readouterr().out.splitlines()
    g = torch.Generator().manual_seed(0)
    real = load("digits").images
    real = real[torch.randperm(len(real), generator=g)[:40]]
    for t, line in zip(seen, out[1:]):
        drawn = draw(grey, "--ts", f"80,{t}", "--n", 40)[0].to(torch.uint8)
        assert seen[t] == pytest.approx(fd_pixels(real, drawn), rel=1e-3)
        assert [float(v) for v in line.split()] == pytest.approx([t, seen[t]], abs=1e-4)
    assert "40 images" in out[0] and out[-1] == f"best: python -m common.sample {grey} --ts 80,{best:g}"
    one = fd_pixels(real, draw(grey, "--steps", 1, "--n", 40)[0].to(torch.uint8))
    assert float(out[0].split()[-1]) == pytest.approx(one, abs=1e-3) and len(out) == 7
    assert out[4].startswith("spread between seeds +-") and out[5].startswith("the run's own level, 0.821, has ")
    own = fd_pixels(real, draw(grey, "--steps", 2, "--n", 40)[0].to(torch.uint8))
    assert float(out[5].split()[6].rstrip(":")) == pytest.approx(own, abs=1e-3)
    better = own - seen[best] > float(out[4].split("+-")[1])
    assert ("is better" in out[5]) == better != ("within the spread" in out[5])
    assert len(set(seen.values())) == 3 and best == min(seen, key=seen.get)


def test_find_ts_by_fid(train, monkeypatch, tmp_path, capsys):
    """FD under the name of FID; another reference than the run's own set."""
    net = Net()
    monkeypatch.setattr(fid, "inception", lambda data_dir, device: net)
    np.savez(tmp_path / "few.npz", images=load("digits").images[:40].permute(0, 2, 3, 1).numpy())
    metrics, run = train("ect", "--iters", "1", "--fid", "30", "--dataset", str(tmp_path / "few.npz"),
                         "--data-dir", str(tmp_path / "data"))
    monkeypatch.setattr(edit, "search", lambda score, lo, hi: score(2.0))
    assert sample.main([str(run), "--find-ts", "--fid", "--n", "30"]) == pytest.approx(metrics["fid_2step"], abs=1e-4)
    assert "FID (legacy_tensorflow) of 30 images" in capsys.readouterr().out


def test_find_ts_agrees_with_the_runs_own_figure(train, monkeypatch):
    """Another subset of real images, or other noise, than the figures of training."""
    metrics, run = train("ect", "--iters", "1", "--mult", "1")
    monkeypatch.setattr(edit, "search", lambda score, lo, hi: score(1.2))
    assert sample.main([str(run), "--find-ts", "--n", "16"]) == pytest.approx(metrics["fd_pixels_2step"], abs=2e-4)


def test_inpainting_a_file(grey, draw, tmp_path):
    """Black and white exchanged; a mask of another size; known pixels that are lost in Algorithm 4 or in the quantisation; a mask turned over;
    rows of the picture in another order."""
    mask = np.zeros((8, 8), np.uint8)
    mask[1:3, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    made, _, file = draw(grey, "--edit", "inpaint", "--mask", tmp_path / "mask.png")
    real, inside = load("digits").images[:6].int(), torch.from_numpy(mask > 0)
    assert torch.equal(made[:, :, ~inside], real[:, :, ~inside]) and not torch.equal(made, real)
    sheet = Image.open(file)
    assert sheet.size == pixels(6, 3)
    rows = np.asarray(sheet)[::4, ::4, 0][:, :8]          # the first image; 8 pixels are shown as 32
    assert np.array_equal(rows[:8], real[0, 0]) and np.array_equal(rows[18:26], made[0, 0])
    assert np.array_equal(rows[9:17], np.where(mask, 128, real[0, 0]))
    Image.fromarray(mask.repeat(4, 0).repeat(4, 1)).convert("RGB").save(tmp_path / "large.png")
    assert torch.equal(draw(grey, "--edit", "inpaint", "--mask", tmp_path / "large.png")[0], made), "fitted like images"
    square = (draw(grey, "--edit", "inpaint")[0] != real).any(0)[0]
    assert square[2:6, 2:6].float().mean() > 0.9 and square.sum() == square[2:6, 2:6].sum()


def test_edits_do_not_depend_on_the_batch(grey, colour, draw):
    """Noise, labels or images of another image of the batch; a seed that changes nothing; edits that are all one."""
    made = []
    for edit_ in ("inpaint", "superres", "stroke", "denoise", "colorize", "interpolate"):
        run = colour if edit_ == "colorize" else grey
        argv = [run, "--edit", edit_] + (["--ts", "80,5,1"] if edit_ not in ("stroke", "denoise") else [])
        made.append(draw(*argv)[0])
        assert close(draw(*argv, "--batch", 4)[0], made[-1]), edit_
        assert not close(draw(*argv, "--seed", 1)[0], made[-1])
        assert not any(a.shape == made[-1].shape and close(a, made[-1]) for a in made[:-1])


def test_kept_coordinates_survive_a_network(colour, draw):
    """Clamping after the known part was put back; --patch ignored. Half a grey level of quantisation a pixel remains,
    and what a byte cannot hold, so the images are pale."""
    real = load(str(colour.parent / "set.npz")).images.int()
    pale = colour.parent / "pale.npz"
    np.savez(pale, images=(real / 4 + 96).byte().permute(0, 2, 3, 1).numpy(), labels=np.zeros(20, int))
    real = load(str(pale)).images[:6].double()
    for patch in (2, 4):
        made = draw(colour, "--edit", "superres", "--images", pale, "--patch", patch)[0].double()
        inside = torch.nn.functional.max_pool2d(((made == 0) | (made == 255)).double(), patch) == 0
        off = torch.nn.functional.avg_pool2d(made - real, patch)[inside]
        assert inside.double().mean() > 0.3 and off.abs().max() <= 0.5 and made.sub(real).abs().max() > 20
    made = draw(colour, "--edit", "colorize", "--images", pale)[0].double()
    inside = ((made > 0) & (made < 255)).all(1)
    luma = ((made - real) * torch.tensor(W).view(3, 1, 1)).sum(1)[inside]
    assert inside.double().mean() > 0.3 and luma.abs().max() <= 0.51 and made.sub(real).abs().max() > 20


def test_sigma_and_ts_are_the_levels_of_an_edit(grey, monkeypatch, tmp_path, capsys):
    """Defaults instead of what was given, a second stroke level that does not follow, a grid with the boundary."""
    seen = []

    def change(net, edit_, x0, noise, y, ts, mask, patch):
        seen.append([round(t, 4) for t in ts])
        assert len(noise) == len(ts)
        return x0, x0
    monkeypatch.setattr(edit, "change", change)
    for argv in (["denoise"], ["denoise", "--sigma", "2"], ["stroke"], ["stroke", "--sigma", "5.38"],
                 ["stroke", "--ts", "3,2,1"], ["inpaint", "--ts", "9"], ["inpaint"]):
        sample.main([str(grey), "--n", "2", "--out", str(tmp_path / "x.png"), "--edit", *argv])
    assert seen[:-1] == [[0.5], [2], [1, 0.4164], [5.38, 2.24], [3, 2, 1], [9]]
    assert len(seen[-1]) == 39 and seen[-1][0] == 80 and 0.002 < seen[-1][-1] < 0.004


def test_rows_of_an_interpolation_end_at_samples(grey, draw):
    """Ends of a row that are not the images of its two noises, or of another pair; a row that does not move, or whose
    later noise changes along it."""
    plain = draw(grey, "--n", 4, "--ts", 80)[0]
    made, _, file = draw(grey, "--edit", "interpolate", "--n", 16, "--ts", 80)
    assert close(made[[0, 7, 8, 15]], plain) and Image.open(file).size == pixels(8, 2)
    assert not close(made[1], made[0]) and not close(made[6], made[7])
    two = draw(grey, "--edit", "interpolate", "--n", 16)[0]
    assert close(two[[0, 8]], draw(grey, "--n", 3)[0][[0, 2]]) and not close(two[7], draw(grey, "--n", 2)[0][1])


def test_images_of_all_kinds(grey, colour, draw, tmp_path):
    """A picture, a folder or an array that is read as another one, or with other channels than the network's."""
    real = load("digits").images[:3, 0].numpy()
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(real):
        Image.fromarray(image).convert("RGB").save(tmp_path / f"folder/{i}.png")
    np.savez(tmp_path / "a.npz", images=real)
    for name, n in ("folder/0.png", 1), ("folder", 3), ("a.npz", 3):
        out = draw(grey, "--edit", "stroke", "--images", tmp_path / name, out="out.png")
        sheet = np.asarray(Image.open(out[2]))[::4, ::4, 0]
        assert len(out[0]) == n and abs(sheet[:8, :8].astype(int) - real[0]).max() <= 1, name
    assert draw(colour, "--edit", "colorize", "--images", tmp_path / "a.npz", "--classes", 0)[0].shape == (3, 3, 8, 8)


def test_labels_of_edits(colour, draw, monkeypatch):
    """Labels that are written but do not reach the network, or those of other images."""
    seen = []
    monkeypatch.setattr(edit, "multistep", lambda net, noise, y, ts, *_: seen.append(y.tolist()) or noise[0])
    own = [i % 7 % 3 for i in range(6)]
    assert draw(colour, "--edit", "stroke")[1].tolist() == own == seen[-1]
    assert draw(colour, "--edit", "stroke", "--classes", "2,1")[1].tolist() == [2, 1] * 3 == seen[-1]
    assert draw(colour, "--edit", "interpolate", "--ts", 80, "--n", 16)[1].tolist() == [0] * 8 + [1] * 8 == seen[-1]


def test_a_search_draws_labels_as_frequent_as_in_the_data(colour, monkeypatch):
    """In equal shares, where the data are not, each level would be measured against other classes than it drew."""
    seen = []
    monkeypatch.setattr(edit, "multistep", lambda net, noise, y, ts, *_: seen.append(y.tolist()) or noise[0])
    monkeypatch.setattr(edit, "search", lambda score, lo, hi: score(1.0) and 1.0)
    sample.main([str(colour), "--find-ts", "--n", "12"])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:12]
    assert seen[0] == [int(i) % 7 % 3 for i in order] and seen[0].count(0) != 4
    assert all(y == seen[0] for y in seen)


@pytest.mark.parametrize("found, verdict", [(20.0, "0.821 is better"), (0.9, "within the spread")])
def test_a_level_that_is_no_better_is_not_recommended(found, verdict, grey, monkeypatch, capsys):
    """Noise, or a level worse than the run's own, called the best."""
    scores = {20.0: 3.0, 0.9: 0.97, 0.821: 1.0}
    calls = []

    def multistep(net, noise, y, ts, *first):
        calls.append(ts[0])
        return torch.full_like(noise[0], len(calls) / 1e3)
    monkeypatch.setattr(edit, "multistep", multistep)
    monkeypatch.setattr(sample, "fd_pixels", lambda real, images: scores.get(calls[-1], 0) + 0.01 * (len(calls) % 3))
    monkeypatch.setattr(edit, "search", lambda score, lo, hi: score(found) and found)
    sample.main([str(grey), "--find-ts", "--n", "8"])
    out = capsys.readouterr().out
    assert verdict in out and "keep the run's own level" in out and "best:" not in out


@pytest.mark.parametrize("argv, hint", [
    ("--ts 81", "80"), ("--ts 80,80", "descend"), ("--ts 1,2", "descend"), ("--ts 1,0", "above 0"),
    ("--ts nan", "--ts"),
    ("--ts 1,-1", "above"), ("--ts inf", "80"), ("--ts=", "--ts"), ("--ts 1,x", "--ts"),
    ("--ts 1 --steps 1", "--steps"),
    ("--ts 1 --t-mid 1", "--t-mid"), ("--ts 1 --edit denoise --sigma 1", "--sigma"), ("--find-ts --steps 3", "--steps"),
    ("--find-ts --t-mid 1", "--t-mid"), ("--fid", "--find-ts"), ("--find-ts --ts 1", "--ts"), ("--find-ts --edit denoise", "--edit"),
    ("--find-ts --out x.png", "--out"), ("--edit inpaint --steps 2", "--steps"), ("--edit cut", "invalid choice"),
    ("--mask x.png", "inpaint"), ("--edit superres --mask x.png", "inpaint"), ("--edit inpaint --patch 2", "superres"),
    ("--edit inpaint --sigma 1", "denoise"), ("--edit interpolate --images x", "inpaint"), ("--images x", "inpaint"),
    ("--edit superres --patch 3", "divide"), ("--edit superres --patch 0", "--patch"),
    ("--edit superres --patch 1", "least 2"),
    ("--edit denoise --sigma 0", "above 0"), ("--edit stroke --sigma 99", "80"), ("--edit colorize", "grey"),
    ("--edit inpaint --mask gone.png", "there is no such file"),
    ("--edit inpaint --images gone.png", "there is no such file"), ("--edit inpaint --images gone.npz", "gone.npz"),
    ("--edit inpaint --images empty", "empty"), ("--edit inpaint --images text.png", "text.png"),
    ("--edit inpaint --images large.npz", "9 pixels"), ("--edit denoise --n 0", "--n")])
def test_bad_input_is_refused(argv, hint, grey, refused, tmp_path):
    """A flag that is not looked at, or only after the work."""
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "large.npz", images=np.zeros((2, 9, 9), np.uint8))
    assert hint in refused(grey, *argv.split())


def test_names_of_images_are_taken_as_they_are(tmp_path):
    """A traceback for what is no file's name; a link's own ending lost; a pipe that is waited for."""
    (tmp_path / "loop").symlink_to("loop")
    for name in ("x" * 300, "a\0b", "~nobody-here/x", "a\033[2J", str(tmp_path / "loop")):
        with pytest.raises(BadInput) as info:
            edit.mask_of(name, 8)
        message = info.value.message
        assert "--mask" in message and "no such file" in message and message.isprintable()
    Image.new("L", (8, 8), 255).save(tmp_path / "blob", "png"), (tmp_path / "a.png").symlink_to("blob")
    with open(tmp_path / "B.NPZ", "wb") as file:
        np.savez(file, images=np.zeros((1, 8, 8), np.uint8))
    assert edit.mask_of(str(tmp_path / "a.png"), 8).all() and not edit.mask_of(str(tmp_path / "B.NPZ"), 8).any()
    os.mkfifo(tmp_path / "pipe.png")
    for name, hint in ("pipe.png", "is no folder"), ("B.NPZ", "resize them"):
        with pytest.raises(BadInput) as info:
            edit.mask_of(str(tmp_path / name), 9)
        assert hint in info.value.message


def test_runs_that_cannot_be_edited_are_refused(grey, colour, refused, tmp_path, monkeypatch):
    """Diffusion models; images without labels where they are needed, or with unknown ones; a data set that changed."""
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8))
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.array([0, 3]))
    assert "--classes" in refused(colour, "--edit", "stroke", "--images", tmp_path / "a.npz")
    assert "0 .. 2" in refused(colour, "--edit", "stroke", "--images", tmp_path / "b.npz")
    config = config_of(grey)
    monkeypatch.setattr(sample, "config_of", lambda _: config | dict(about=dict(
        script="ect", data_sha256="other")))
    assert "--data-dir" in refused(grey, "--find-ts") and "--data-dir" in refused(grey, "--edit", "stroke")
    monkeypatch.setattr(sample, "load_run", lambda *_: (teacher, teacher.Args(), None))
    for argv in (["--ts", "1"], ["--find-ts"], ["--edit", "denoise"]):
        assert "diffusion" in refused(grey, *argv)

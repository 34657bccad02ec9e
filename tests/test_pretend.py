"""The CUDA path without CUDA: every docstring says which mistake the test catches."""
import importlib
from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY
from pretend import pretend

from common import augment, data, fid, sample, teacher
from common.flags import parse
from common.run import Run


@pytest.fixture
def gpu(monkeypatch):
    for kept in (augment.filter_on, data.shuffled):       # on a device
        kept.cache_clear()
    with pretend(monkeypatch) as gpu:
        yield gpu
    for kept in (augment.filter_on, data.shuffled):
        kept.cache_clear()


@pytest.fixture
def go(gpu, tmp_path, monkeypatch):
    """Run a script's main() on the pretended GPU; return its folder and, for each step, what waited in it."""
    def go(script, *flags, figures=True):
        m, marks = importlib.import_module(script), []
        with monkeypatch.context() as mp:
            if not figures:
                mp.setattr(Run, "evaluate", lambda *a, **k: None)
            mp.setattr(Run, "log", lambda self, it, real=Run.log, **v: marks.append(len(gpu.waits)) or real(self, it, **v))
            args = parse(m.Args, m.PRESETS, [*TINY, "--device", "cuda", "--iters", "4", "--save-every", "9",
                                             "--log-every", "9", "--out", str(tmp_path / "runs"), *flags])
            run = m.main(args)["run"]
        marks = marks[-args.iters:]                       # those of the method: a teacher trains before
        return run, [gpu.waits[a:b] for a, b in zip(marks, marks[1:])]
    return go


FEATURES = ["--cond", "--accum", "2", "--flip", "--dropout", "0.1"]


SLOW = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize("script, flags", [
    ("ect", ["--bf16", *FEATURES]), ("ct", ["--bf16", *FEATURES]), ("ict", ["--fp16", *FEATURES]), ("ict", ["--net", "ncsnpp"]),
    ("cd", FEATURES), SLOW("cd", ["--cond", "--guidance", "0.5", "--boundaries", "2"]),
    ("scm", ["--bf16", *FEATURES]), SLOW("scm", ["--mode", "scd", "--cond"]), ("scm", ["--jvp", "fd"]),
    ("rcm", ["--N-max", "3", "--H", "1", *FEATURES]), SLOW("rcm", ["--rollout", "fixed", "--N-max", "3", "--H", "0"]),
    ("common.teacher", ["--bf16", "--augment", "0.5", *FEATURES]), ("common.teacher", ["--flow", "trig", "--net", "dit"])])
def test_a_step_waits_once(script, flags, go):
    """A tensor made on the CPU, a generator of the CPU, or a second value read in a step: a crash on a GPU, or a GPU
    that stands idle while Python prepares the next step."""
    if script in ("cd", "rcm") or "scd" in flags:
        flags = ["--teacher", "train", "--teacher-iters", "1", *flags]
    elif script != "common.teacher":
        flags = ["--teacher", "none", *flags]
    _, steps = go(script, *flags, figures=False)
    assert len(steps) == 3
    for waits in steps:
        assert len(waits) == 1 and "the one host read of a step" in waits[0], waits


def test_a_resumed_run(go, gpu):
    """An optimiser whose state stays on the CPU."""
    run, _ = go("ect", "--teacher", "none", "--cond")
    import ect
    args = parse(ect.Args, ect.PRESETS, ["--resume", run, "--iters", "6", "--device", "cuda"])
    assert ect.main(args)["run"] == run


def test_heun_does_not_wait(gpu):
    """A value read at each step of the sampler, such as the noise level."""
    counts = []
    for steps in (3, 9):
        before = len(gpu.waits)
        teacher.sample(lambda x, t, y: x / (1 + t), torch.randn(1, 2, 1, 8, 8, device="cuda"), None,
                       teacher.Args(steps=steps))
        counts.append(len(gpu.waits) - before)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("flags", [["--steps", "3"], ["--ts", "80,2,0.5"],
                                   *([["--edit", e] for e in ("inpaint", "superres", "stroke", "denoise", "interpolate")])])
def test_sampling_and_editing(flags, go, tmp_path):
    """A mask, a label or noise on the CPU."""
    run, _ = go("ect", "--teacher", "none", "--cond")
    sample.main([run, "--device", "cuda", "--n", "4", "--out", str(tmp_path / "a.npz"), *flags])


def test_a_search(go):
    """Images of the data set and of the network compared on two devices."""
    run, _ = go("ect", "--teacher", "none", "--cond")
    sample.main([run, "--device", "cuda", "--find-ts", "--n", "16"])


def test_colorize(go, tmp_path):
    """The weights of the colours on the CPU."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "c.npz", images=rng.integers(0, 256, (16, 8, 8, 3), np.uint8))
    run, _ = go("ect", "--teacher", "none", "--dataset", str(tmp_path / "c.npz"))
    sample.main([run, "--device", "cuda", "--n", "2", "--edit", "colorize", "--out", str(tmp_path / "a.npz")])


def test_moments_of_an_fid(gpu, monkeypatch, tmp_path):
    """Features, sums or images left on the other device."""
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(3, 5))

        def forward(self, x):
            return x.float().mean((2, 3)) @ self.w

    monkeypatch.setattr(fid, "inception", lambda data_dir, device: Net().to(device))
    few, fakes = data.load("digits", device="cuda"), torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    few.images, few.labels = few.images[:60], few.labels[:60]
    assert np.isfinite(fid.fid(few, fakes, tmp_path))


def test_it_sees_mistakes(gpu):
    """A pretence that lets pass what a GPU would not."""
    x = torch.ones(3, device="cuda")
    for mistake in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(3)]), lambda: x @ torch.ones(3, 3),
                    lambda: torch.randn_like(x, generator=torch.Generator()), lambda: torch.stack([x, torch.ones(3)])):
        with pytest.raises(RuntimeError, match="CPU"):
            mistake()
    with pytest.raises(TypeError):
        x.numpy()
    assert not gpu.waits and (x + 1.0).device.type == "cuda" and (x * torch.tensor(2.0)).is_cuda
    for n, wait in enumerate((lambda: x.sum().item(), lambda: float(x.sum()), lambda: bool((x > 0).all()), x.tolist, x.cpu,
                              lambda: x[x > 0], x.nonzero, lambda: torch.ones(3).to("cuda"), lambda: torch.tensor([1.0], device="cuda"),
                              lambda: x.equal(x), lambda: x[torch.tensor([0, 1])]), 1):
        wait()
        assert len(gpu.waits) == n, gpu.waits
    torch.ones(3).to("cuda", non_blocking=True)
    assert len(gpu.waits) == 11 and not torch.ones(3).is_cuda and not x.cpu().is_cuda

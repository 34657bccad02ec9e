import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                                  # the suite's own speed; also steadier sums
METHODS = [m for m in ("cd", "ct", "ict", "ect", "scm", "rcm") if (ROOT / f"{m}.py").exists()]
DISTIL = ["cd", "rcm"]                                    # those that cannot do without a teacher
TINY = ["--device", "cpu", "--ch", "16", "--blocks", "1", "--attn", "4", "--iters", "4", "--batch", "8", "--grid", "4",
        "--warmup", "0", "--log-every", "2", "--save-every", "2"]


def pytest_configure(config):
    for line in ("network: downloads something", "gpu: needs a CUDA device", "slow: trains for more than 20 seconds"):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(config, items):
    """`python -m pytest` alone runs what needs neither network, GPU nor patience; -m chooses the rest."""
    if config.option.markexpr:
        return
    skip = [i for i in items if any(i.get_closest_marker(m) for m in ("network", "gpu", "slow"))]
    config.hook.pytest_deselected(items=skip)
    items[:] = [i for i in items if i not in skip]


@pytest.fixture(autouse=True)
def few_real_images(monkeypatch):
    """Figures of runs in the tests come from 16 images: they are about the machinery, not about quality."""
    from common import evaluate
    monkeypatch.setattr(evaluate, "FD_IMAGES", 16)


class Net(torch.nn.Module):
    """In the place of Inception: a few sums over each part of the image."""
    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(6, 3, 23, 23, generator=g) / 40)

    def forward(self, x):
        return torch.nn.functional.conv2d(torch.nn.functional.avg_pool2d(x, 13), self.weight)


@pytest.fixture
def train(tmp_path):
    """Run a script's main() in this process, as `train("ect", "--iters", "6")`; return (metrics, run folder)."""
    def go(script, *flags, tiny=TINY):
        from common.flags import parse
        m = importlib.import_module(script)
        start = ["--teacher", "train", "--teacher-iters", "2"] if script in DISTIL else ["--teacher", "none"]
        extra = start if script in METHODS and "--teacher" not in flags and "--resume" not in flags else []
        flags = list(flags) if "--resume" in flags else [*tiny, "--out", str(tmp_path / "runs"), *extra, *flags]
        metrics = m.main(parse(m.Args, m.PRESETS, flags))
        return metrics, Path(metrics["run"])
    return go


@pytest.fixture
def shell(tmp_path):
    """Start a script as a user does; return the finished process."""
    def go(*words, **env):
        env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | env
        return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=env, cwd=ROOT)
    return go


def weights(run, part="net", name="ckpt.pt"):
    return torch.load(run / name)[part]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(file):
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def distances(run):
    """The lines of eval.jsonl without precision, recall, density and coverage, which stand beside each."""
    return [s for s in lines(run / "eval.jsonl") if s["metric"] in ("fd_pixels", "fid")]


def pixels(cols, rows, side=8):
    """Size of a picture of images with `side` pixels a side, enlarged to 32, and one pixel between them."""
    return tuple((n * (side + 1) - 1) * max(1, 32 // side) for n in (cols, rows))


def snapshot(folder):
    """Everything below a folder, to be compared with a later snapshot."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}

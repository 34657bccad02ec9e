"""--compile, for a few steps of each method. Slow: inductor takes minutes."""
import logging
import shutil

import pytest
import torch
from conftest import METHODS, lines

from common import sample
from common.run import Run

FLAGS = ["--dropout", "0", "--mult", "1", "--iters", "6", "--log-every", "1", "--save-every", "3", "--keep"]
MORE = dict(rcm=["--H", "1", "--student-every", "2", "--N-max", "2"],
            scm=["--mode", "scd", "--teacher", "train", "--teacher-iters", "2"])


@pytest.fixture
def recompiled(monkeypatch):
    """After how many steps of a run torch compiled something once more, and why."""
    torch._dynamo.reset()
    steps, seen, start, log = [0], [], Run.start, Run.log

    def started(self, *args):
        steps[0] = 0
        return start(self, *args)

    def logged(self, it, **values):
        steps[0] = it
        return log(self, it, **values)

    class Handler(logging.Handler):
        def emit(self, record):
            if "Recompiling" in record.getMessage():
                seen.append((steps[0], record.getMessage()))
    handler = Handler()
    monkeypatch.setattr(Run, "start", started)
    monkeypatch.setattr(Run, "log", logged)
    torch._logging.set_logs(recompiles=True)
    logging.getLogger("torch._dynamo").addHandler(handler)
    yield seen
    logging.getLogger("torch._dynamo").removeHandler(handler)
    torch._logging.set_logs()


@pytest.mark.slow
@pytest.mark.parametrize("script", METHODS + ["common.teacher"])
def test_compiled_training(script, train, recompiled, tmp_path):
    """Other losses than without; code that is compiled anew while the run goes on, which costs minutes each time; a
    checkpoint that a compiled run cannot go on from, or that nobody can sample."""
    more = FLAGS + MORE.get(script, [])
    _, eager = train(script, *more)
    _, run = train(script, *more, "--compile")
    settled = 3 if script == "rcm" else 2                 # rcm: a step of the student, of fake, and one with both
    assert not [why for it, why in recompiled if it >= settled]
    losses = [[line["loss"] for line in lines(d / "log.jsonl")] for d in (eager, run)]
    assert len(losses[1]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-5)

    half = shutil.copytree(run, tmp_path / "half")
    (half / "ckpt.prev.pt").unlink()
    shutil.copy(run / "ckpt-0000003.pt", half / "ckpt.pt")
    train(script, "--resume", str(half))
    assert [line["loss"] for line in lines(half / "log.jsonl")][-3:] == pytest.approx(losses[1][-3:], rel=1e-5)

    for i, d in enumerate((run, half, eager)):
        sample.main([str(d), "--n", "4", "--out", str(tmp_path / f"{i}.npz"), "--device", "cpu"])
    images = [sample.np.load(tmp_path / f"{i}.npz")["images"].astype(int) for i in range(3)]
    assert all(abs(x - images[0]).max() <= 1 for x in images[1:])

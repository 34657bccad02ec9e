"""kill -9: at each line of a save, in the middle of a write, at any time, and of one rank of two. What is left can be
loaded, is at most one save old, and goes on to the same bits as a run that nothing disturbed."""
import io
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import DISTIL, METHODS, ROOT, TINY, lines, snapshot
from tqdm import tqdm

import ect
from common import evaluate, folder
from common.flags import parse

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
HOW = ["--keep", "--log-every", "1", "--mult", "1"]


def killed(work, meanwhile=lambda pid: None):
    """Do work() in a copy of this process, which ends with it, and meanwhile(its id) here. Was it killed?"""
    if not (pid := os.fork()):
        try:
            signal.alarm(100)                             # no copy outlives its test
            tqdm.set_lock(threading.RLock())              # its own is shared with copies: held for ever by a dead one
            work()
            os._exit(0)
        finally:
            os._exit(1)
    meanwhile(pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def go_on(script, run, whole, train, starts=()):
    """Resume a run to its end: of a kill there is no trace, but for the figures of the steps in `starts`."""
    from test_run import ckpt, same
    train(script, "--resume", str(run))
    assert same(ckpt(run), ckpt(whole)) and {p.name for p in run.iterdir()} == {p.name for p in whole.iterdir()}
    log, figures = ([[(r["it"], r.get("steps"), r.get("metric")) for r in lines(path / name)] for path in (run, whole)]
                    for name in ("log.jsonl", "eval.jsonl"))
    assert log[0] == log[1] and set(figures[0]) <= set(figures[1])
    assert all(figures[0].count(v) == 1 for v in figures[1] if v[0] not in starts)


# ---- in a save -----------------------------------------------------------------------------------
def at_line(k, left):
    """Die where folder.py executes its k-th line from here on; a return counts as one."""
    def line(*_):
        return signal.raise_signal(signal.SIGKILL) if next(left) == k else line

    def call(frame, *_):                                  # <genexpr>: a line for each part of a checkpoint
        return line if frame.f_code.co_filename == folder.__file__ and frame.f_code.co_name[0] != "<" else None
    sys.settrace(call)


def at_write(k, left):
    """Die in the middle of the k-th write to the file of the checkpoint."""
    class File(io.FileIO):
        def write(self, b):
            last = next(left) == k
            n = super().write(bytes(b)[:len(b) // 2] if last else b)
            return signal.raise_signal(signal.SIGKILL) if last else n
    folder.open = File


@pytest.mark.parametrize("arm, every, steps", [(at_line, 1, {2, 4}), (at_write, 400, {2})])
def test_killed_in_a_save(arm, every, steps, train, tmp_path):
    """Writing over the good checkpoint; a moment without one, or with one that the resumed run loses; files that nobody
    cleans up. And ckpt.tmp of any length, as a power cut may leave it, taken for a checkpoint."""
    def save(path, ckpt, keep, real=folder.save):         # of one process, whose copies save in copies of the folder
        for k in itertools.count(0, every) if ckpt["it"] == 4 else ():
            copy = shutil.copytree(path, tmp_path / str(k) / path.name)
            if not killed(lambda: (arm(k, itertools.count()), real(copy, ckpt, keep))):
                return shutil.rmtree(copy.parent)         # there is no k-th point
        real(path, ckpt, keep)
    assert not killed(lambda: (setattr(folder, "save", save), train("ect", *HOW, "--out", str(tmp_path / "first"))))
    _, whole = train("ect", *HOW)
    found, before = [], {}
    for run in sorted(tmp_path.glob("[0-9]*/*"), key=lambda run: int(run.parent.name)):
        if (state := snapshot(run)) == before:
            continue                                      # nothing was written since the line before
        before, tmp = state, state.get("ckpt.tmp")
        found.append(folder.load(run)["it"])
        for part in (b"", tmp[:len(tmp) // 2], tmp[:-1], tmp) if tmp else ():
            (run / "ckpt.tmp").write_bytes(part)
            assert folder.load(run)["it"] == (4 if part == tmp and not (run / "ckpt.pt").exists() else 2)
        go_on("ect", run, whole, train)
    assert len(found) > 4 and found == sorted(found) and set(found) == steps


# ---- at any time ---------------------------------------------------------------------------------
@pytest.mark.parametrize("script, runs", [("ect", 4)] + [
    pytest.param(s, 5, marks=pytest.mark.slow) for s in METHODS + ["common.teacher"]])
def test_killed_at_any_time(script, runs, train, tmp_path):
    """What the lines of a save do not show: a kill in the evaluation, in a step, in a start with --resume, and one soon
    after another; a lock that outlives its owner."""
    how, chance, inside = [*HOW, "--iters", "16", "--batch", "64"], random.Random(0), 0
    if script in DISTIL:
        how += ["--teacher", str(train("common.teacher", "--mult", "1", "--iters", "1")[1])]
    _, whole = train(script, *how)

    def kill(pid):
        end = time.time() + 60
        while len(evaluate.lines(run / "log.jsonl")) < step and time.time() < end:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
    for i in range(runs):
        run, found = tmp_path / str(i) / whole.name, [0]
        tmp, out, resume = run / "ckpt.tmp", ["--out", str(run.parent)], ["--resume", str(run)]
        for step, flags in zip(sorted(chance.choices(range(3, 16), k=3)), (how + out, resume, resume)):
            if killed(lambda: train(script, *flags), kill):
                inside += 1                               # and it goes on from a save that is whole, if not named yet
                found.append(folder.load(tmp if folder.intact(tmp) else run)["it"])
                assert found[-1] >= max(found[-2], *(line["it"] - 2 for line in evaluate.lines(run / "log.jsonl")))
        go_on(script, run, whole, train, {*found, 16})
    assert inside >= 2 * runs, "of three for each run"


# ---- two ranks -----------------------------------------------------------------------------------
def work(out, rank):
    """In each of two processes, in the fourth step: rank 1 has one bit of its own in a first run, dies in a second."""
    def spoil(net):
        next(net.parameters()).data.view(torch.int32).view(-1)[0] ^= 1
    signal.alarm(100)
    evaluate.FD_IMAGES, real = 64, ect.loss_fn
    for name, act in (("differ", spoil), ("dies", lambda _: os.kill(os.getpid(), signal.SIGKILL))):
        ect.loss_fn = lambda net, x0, y, it, *rest: (it == rank * 3 > 0 and act(net), real(net, x0, y, it, *rest))[1]
        try:
            ect.main(parse(ect.Args, ect.PRESETS, [*TINY, *HOW, "--teacher", "none", "--out", str(out / name)]))
        except RuntimeError as e:
            if name == "dies":
                raise
            (out / str(rank)).write_text(str(e))


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(os.environ["RANK"]))


@pytest.mark.parametrize("launcher", ["-m torch.distributed.run --standalone --nproc-per-node 2",
                                      pytest.param("", marks=pytest.mark.slow)], ids=["torchrun", "by hand"])
def test_a_rank_that_differs_or_dies_ends_both(launcher, train, tmp_path):
    """Weights of one of the ranks, saved as if they were those of all; a rank that waits for a dead one until the job's
    time is up; a folder with which nobody can go on."""
    words = [sys.executable, *launcher.split(), __file__, str(tmp_path)]
    port = str(socket.create_server(("127.0.0.1", 0)).getsockname()[1])
    by_hand = [dict(RANK=i, LOCAL_RANK=i, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for i in "01"]
    processes = [subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL, env=os.environ | e)
                 for e in ([{}] if launcher else by_hand)]
    assert all([p.wait(150) for p in processes]), "each says that it failed"
    end, (differ, dies) = time.time(), (tmp_path / f"{name}/ect-digits-000" for name in ("differ", "dies"))
    assert end - (dies / "log.jsonl").stat().st_mtime < 60, "since the step before the death"
    assert {(tmp_path / i).read_text() for i in "01"} == {
        "step 4: ranks [1] have other weights than rank 0; nothing was saved"}
    for run in (differ, dies):
        assert folder.load(run)["it"] == 2 and not list(run.glob("*.tmp")) + list(run.glob("*4.pt"))
        train("ect", "--resume", str(run))
        assert folder.load(run)["it"] == 4 and [r["it"] for r in lines(run / "log.jsonl")] == [1, 2, 3, 4]

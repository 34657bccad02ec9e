"""Who owns a run folder, what it is known by, and how a run ends. Docstrings say which mistake a test catches."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, lines, snapshot
from test_run import back_to, ckpt, config, data_set, same

import ect
from common import evaluate, folder, run as runs, sample
from common import teacher as teachers
from common.run import Run

AUTO = ("--teacher", "auto", "--teacher-iters", "4", "--iters", "1")


@pytest.fixture(autouse=True)
def handlers():
    """Other tests may leave those of a run that they ended halfway."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture
def refused(capsys):
    """The one line with which something is refused."""
    def go(call, *argv, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            call(*argv)
        err = [line.split("\r")[-1] for line in capsys.readouterr().err.split("\n") if "error: " in line]
        assert e.value.code == code and len(err) == 1 and err[0].startswith("error: "), err
        return err[0]
    return go


@pytest.fixture
def job(monkeypatch):
    """Start call(*argv) in another process, which is killed at the end of the test; return its number."""
    monkeypatch.setattr(teachers, "SECONDS", 0.05)
    started = []

    def go(call, *argv):
        sys.stdout.flush()
        started.append(os.fork())
        if started[-1] == 0:
            try:
                call(*argv)
            except BaseException as e:
                os._exit(e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 3)
            os._exit(0)
        return started[-1]
    yield go
    for pid in started:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except OSError:
            pass


def ended(pid):
    """The exit status of a job."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it never came"
        time.sleep(0.01)


def slow_teacher(monkeypatch, seconds):
    loss_fn = teachers.loss_fn
    monkeypatch.setattr(teachers, "loss_fn", lambda *a: (time.sleep(seconds), loss_fn(*a))[1])


# ---- one owner -----------------------------------------------------------------------------------
def test_a_run_in_training_is_not_resumed_by_another_job(train, job, refused, tmp_path):
    """Two jobs that write one log and one checkpoint."""
    _, run = train("ect", "--iters", "2")
    before = snapshot(run)
    pid = job(lambda: (folder.take(run), (tmp_path / "taken").touch(), time.sleep(100)))
    until((tmp_path / "taken").exists)
    assert f"process {pid} on" in refused(train, "ect", "--resume", str(run), "--iters", "4")
    assert {k: v for k, v in snapshot(run).items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    train("ect", "--resume", str(run), "--iters", "4")
    assert ckpt(run)["it"] == 4


def test_two_jobs_that_list_a_folder_at_once_get_two_numbers(tmp_path, monkeypatch):
    """The second is refused, or writes into the first one's run."""
    listed = [folder.numbered(tmp_path, "ect-digits")]
    first = folder.create(tmp_path, "ect-digits")
    monkeypatch.setattr(folder, "numbered", lambda *a, real=folder.numbered: listed.pop() if listed else real(*a))
    assert (first.name, folder.create(tmp_path, "ect-digits").name) == ("ect-digits-000", "ect-digits-001")
    folder.MINE.end.close()


def test_jobs_that_start_together_train_one_teacher(train, job, tmp_path):
    """One teacher for each of them."""
    jobs = [job(train, "ect", *AUTO, "--seed", str(i)) for i in range(3)]
    assert [ended(pid) for pid in jobs] == [0, 0, 0]
    names = sorted(p.name for p in (tmp_path / "runs").iterdir() if p.is_dir())
    assert names == ["ect-digits-000", "ect-digits-001", "ect-digits-002", "teacher-digits-000"]
    teacher = tmp_path / "runs/teacher-digits-000"
    assert {config(teacher.parent / n)["teacher"] for n in names[:3]} == {str(teacher)}
    assert [r["it"] for r in lines(teacher / "log.jsonl")] == [4], "two jobs trained it"


def test_a_teacher_in_training_is_waited_for_and_taken_over_if_its_job_dies(train, job, monkeypatch, tmp_path, capsys):
    """A student of half a teacher; a second teacher; a wait for ever; others held up who want another one."""
    teacher = tmp_path / "runs/teacher-digits-000"
    with monkeypatch.context() as m:
        slow_teacher(m, 3.0)
        first = job(train, "common.teacher", "--save-every", "1")
    until((teacher / "ckpt.pt").exists)
    waits = tmp_path / "waits"
    with monkeypatch.context() as m:
        m.setattr(teachers, "say", lambda text: waits.touch() if "waiting" in text else None)
        second = job(train, "ect", *AUTO)
    until(waits.exists)
    train("ect", *AUTO, "--blocks", "2")                  # does not wait
    assert (tmp_path / "runs/teacher-digits-001/ckpt.pt").exists()
    assert os.waitpid(first, os.WNOHANG) == os.waitpid(second, os.WNOHANG) == (0, 0)
    assert not any((tmp_path / "runs").glob("ect-digits-001"))
    os.kill(first, signal.SIGKILL)
    assert ended(second) == 0 and ckpt(teacher)["it"] == 4
    assert config(tmp_path / "runs/ect-digits-001")["teacher"] == str(teacher)


@pytest.mark.parametrize("half", [False, True])
def test_a_job_that_trains_a_teacher_holds_up_no_other(half, train, job, monkeypatch, tmp_path):
    """All who look for a teacher in the same place wait until it is trained, whatever they look for."""
    teacher = tmp_path / "runs/teacher-digits-000"
    if half:
        back_to(train("common.teacher", "--keep", "--out", str(tmp_path / "more"))[1], 2, teacher)
    with monkeypatch.context() as m:
        slow_teacher(m, 2.0)
        first = job(train, "ect", *AUTO)
    until((teacher / ("log.jsonl" if half else "config.json")).exists)
    train("ect", *AUTO, "--blocks", "2")
    assert os.waitpid(first, os.WNOHANG) == (0, 0) and not any((tmp_path / "runs").glob("ect-digits-001"))


def test_a_teacher_that_another_job_finishes_is_used(train, job, monkeypatch, tmp_path, capsys):
    """Its training begun anew after the wait, or the wait not said."""
    teacher = tmp_path / "runs/teacher-digits-000"
    with monkeypatch.context() as m:
        slow_teacher(m, 0.3)
        first = job(train, "common.teacher")
    until((teacher / "config.json").exists)               # and no checkpoint yet
    _, run = train("ect", *AUTO)
    assert ended(first) == 0 and f"in use by process {first}" in capsys.readouterr().out
    assert config(run)["teacher"] == str(teacher) and [r["it"] for r in lines(teacher / "log.jsonl")] == [2, 4]


def test_a_damaged_teacher_folder_does_not_stand_in_the_way(train, tmp_path, capsys):
    """Every command with --teacher auto ends at a folder that nobody needs."""
    _, run = train("ect", *AUTO)
    for i, text in enumerate(["", "null", "[" * 10**5, '{"about": {"script": "common.teacher", "data_sha256": "x"}}'], 1):
        shutil.copytree(tmp_path / "runs/teacher-digits-000", bad := tmp_path / f"runs/teacher-digits-00{i}")
        (bad / "config.json").write_text(text)
    shutil.copytree(tmp_path / "runs/teacher-digits-000", bad := tmp_path / "runs/teacher-digits-005")
    (bad / "ckpt.pt").write_bytes(b"x")
    (tmp_path / "runs/teacher-digits-006").write_text("")
    (tmp_path / "runs/teacher-digits-007").mkdir()
    capsys.readouterr()
    _, run = train("ect", *AUTO)
    out, err = capsys.readouterr()
    assert config(run)["teacher"].endswith("teacher-digits-000") and out.count("is damaged (") == 6
    assert "error" not in err


# ---- identity is content, not place --------------------------------------------------------------
def test_moved_data_can_be_named_again(train, refused, tmp_path, monkeypatch):
    """--dataset refused on --resume; other images taken; a relative path that holds in one directory alone."""
    data_set(tmp_path / "one/mine.npz")
    monkeypatch.chdir(tmp_path / "one")
    where = ("--dataset", "mine.npz", "--preset", "small", "--mult", "1", "--keep")
    _, whole = train("ect", *where)
    cut = back_to(whole, 2, tmp_path / "cut")
    again = back_to(whole, 2, tmp_path / "again")
    monkeypatch.chdir(tmp_path)
    train("ect", "--resume", str(again))
    assert same(ckpt(whole), ckpt(again))
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert "mine.npz" in refused(train, "ect", "--resume", str(cut))
    other = data_set(tmp_path / "three/mine.npz", n=21)
    assert "does not hold the images" in refused(train, "ect", "--resume", str(cut), "--dataset", other)
    train("ect", "--resume", str(cut), "--dataset", "two/mine.npz")
    assert same(ckpt(whole), ckpt(cut)) and config(cut)["dataset"] == str(tmp_path / "two/mine.npz")


@pytest.mark.parametrize("script, more", [("cd", ()), pytest.param("scm", ("--mode", "scd"), marks=pytest.mark.slow),
                                          pytest.param("rcm", ("--H", "1"), marks=pytest.mark.slow)])
def test_a_moved_teacher_can_be_named_again(script, more, train, refused, tmp_path):
    """A run that can neither go on nor be sampled; one that goes on with another teacher, or with more of the same."""
    _, teacher = train("common.teacher", "--steps", "2", "--sd", "0.75")
    _, whole = train(script, "--teacher", str(teacher), *more, "--keep")
    cut = back_to(whole, 2, tmp_path / "cut")
    moved = tmp_path / "moved"
    shutil.move(teacher, moved)
    assert "teacher-digits-000" in refused(train, script, "--resume", str(cut))
    _, other = train("common.teacher", "--steps", "2", "--sd", "0.75", "--seed", "1")
    assert "not the one" in refused(train, script, "--resume", str(cut), "--teacher", str(other))
    train(script, "--resume", str(cut), "--teacher", str(moved))
    assert same(ckpt(whole), ckpt(cut)) and config(cut)["teacher"] == str(moved)
    train("common.teacher", "--resume", str(moved), "--iters", "6")
    assert "trained further" in refused(train, script, "--resume", str(cut), "--iters", "6")
    shutil.rmtree(moved)
    train(script, "--resume", str(cut), "--steps", "1")  # its steps are done
    sample.main([str(cut), "--n", "2", "--device", "cpu", "--out", str(tmp_path / "x.png")])


def test_a_finished_run_is_sampled_without_its_data(train, tmp_path):
    """Images that need the place of the training data; a run folder that only works where it was made."""
    data = data_set(tmp_path / "mine.npz")
    _, run = train("ect", "--dataset", data, "--preset", "small", "--mult", "1", "--iters", "1", "--cond")
    os.remove(data)
    shutil.move(run, tmp_path / "moved")
    sample.main([str(tmp_path / "moved"), "--n", "4", "--device", "cpu", "--out", str(tmp_path / "x.npz")])
    assert np.load(tmp_path / "x.npz")["labels"].tolist() == [0, 1, 0, 1]


def test_a_method_that_needs_its_teacher_once_refuses_another(train, refused):
    """A flag that is read by nobody, and looks as if it had an effect."""
    _, run = train("ect", "--iters", "2")
    assert "can only tell" in refused(train, "ect", "--resume", str(run), "--iters", "4", "--teacher", "train")


# ---- what a folder holds -------------------------------------------------------------------------
def change(key, value):
    def go(c):
        (c["about"] if key in c["about"] else c)[key] = value
    return go


BAD = {"lr text": change("lr", "fast"), "lr null": change("lr", None), "lr nan": change("lr", float("nan")),
       "lr huge": change("lr", 10**400), "iters real": change("iters", 4.5), "iters true": change("iters", True),
       "mult": change("mult", [1, "2"]), "mult deep": change("mult", [[1]]), "net": change("net", "vgg"),
       "steps": change("steps", 10**9), "cond": change("cond", 0), "dataset": change("dataset", 3),
       "about": change("about", None), "sha": change("data_sha256", None), "script": change("script", ["ect"]),
       "lr gone": lambda c: c.pop("lr"), "q gone": lambda c: c.pop("q"), "about gone": lambda c: c.pop("about"),
       "device": lambda c: c.update(device="tpu"), "dropout": change("dropout", 5)}


def test_a_config_that_is_none_is_one_line(train, refused, tmp_path):
    """A traceback, or today's default in the place of what the run had."""
    _, run = train("ect", "--iters", "1")
    good = (run / "config.json").read_text()
    for name, ruin in BAD.items():
        ruin(bad := json.loads(good))
        (run / "config.json").write_text(json.dumps(bad))
        for call, *argv in ((sample.main, [str(run), "--device", "cpu"]), (train, "ect", "--resume", str(run))):
            if call is train or name not in ("device", "dropout"):        # which sampling does not ask for
                err = refused(call, *argv)
                assert str(run) in err or f"--{name.split()[0]}" in err
    for text in ["", "null", "[]", "{", "[" * 10**5, "\x00", '{"about": 5}']:
        (run / "config.json").write_text(text)
        for call, *argv in ((sample.main, [str(run)]), (train, "ect", "--resume", str(run))):
            assert "no run folder" in refused(call, *argv)
    assert not Path("grid.png").exists()


def test_figures_that_are_none_are_passed_over(train, tmp_path):
    """One strange line in the eval.jsonl of a teacher or of the run itself ends every command."""
    _, teacher = train("common.teacher", "--iters", "1", "--steps", "2")
    for run in (teacher, train("ect", "--teacher", str(teacher), "--iters", "2")[1]):
        with open(run / "eval.jsonl", "ab") as f:
            f.write(b'5\nnull\n{}\n{"it": "x", "net": []}\n\xff\xfe\n' + b"[" * 10**5 + b'\n{"it": 0, "metric": "fd_pixels", '
                    b'"value": Infinity, "n": 16, "net": "teacher", "steps": 2, "t_mid": null}\n{"it": 0, "metric": '
                    b'"fd_pixels", "value": 1' + b"0" * 400 + b', "n": 16, "net": "teacher", "steps": 2, "t_mid": null}\n')
    metrics, again = train("ect", "--teacher", str(teacher), "--iters", "1")
    assert metrics["fd_pixels_teacher"] < 1e9
    assert train("ect", "--resume", str(run))[0]["fd_pixels_teacher"] == metrics["fd_pixels_teacher"]


def damage(saved):
    """{name: a checkpoint with one part that is missing or of another shape}."""
    first = next(iter(saved["net"]))
    opt = saved["opt"]
    wrong = {i: {k: torch.zeros(3) if torch.is_tensor(v) and v.dim() else v for k, v in s.items()}
             for i, s in opt["state"].items()}
    yield from ((f"no {k}", {n: v for n, v in saved.items() if n != k}) for k in ("net", "ema", "opt", "it"))
    yield "a weight less", saved | dict(net={k: v for k, v in saved["net"].items() if k != first})
    yield "a weight more", saved | dict(ema=saved["ema"] | dict(more=torch.zeros(1)))
    yield "another shape", saved | dict(net=saved["net"] | {first: torch.zeros(1)})
    yield "a list", saved | dict(net=[1, 2])
    yield "its optimiser's shapes", saved | dict(opt=opt | dict(state=wrong))
    yield "its optimiser's groups", saved | dict(opt=opt | dict(param_groups=[]))
    yield "its step", saved | dict(it="four")
    yield "its step is before the first", saved | dict(it=-1)


@pytest.mark.parametrize("script", ["ect", pytest.param("cd", marks=pytest.mark.slow)])
def test_a_checkpoint_without_its_parts_is_one_line(script, train, refused):
    """A traceback of torch's, or a run that goes on without what it had learned."""
    _, run = train(script, "--iters", "2")
    saved = ckpt(run)
    for name, bad in damage(saved):
        torch.save(bad, run / "ckpt.pt")
        err = refused(train, script, "--resume", str(run), "--iters", "4")
        assert "does not fit this run" in err or "cannot be read" in err or "no readable" in err, name


def test_samples_that_were_deleted_are_made_again(train):
    _, run = train("ect", "--iters", "2")
    shutil.rmtree(run / "samples")
    train("ect", "--resume", str(run), "--iters", "4")
    assert len(list((run / "samples").iterdir())) == 2


# ---- how a run ends ------------------------------------------------------------------------------
def ctrl_c(*args, **how):
    raise KeyboardInterrupt


def no_memory(*args, **how):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has a total ..")


def no_memory_here(*args, **how):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes")


def nan(net, x0, y, it, args, reseed, real=ect.loss_fn):
    loss, stats = real(net, x0, y, it, args, reseed)
    return loss * float("nan"), stats


@pytest.mark.parametrize("where", ["load", "loss_fn", "Run.start"])
def test_ctrl_c_is_no_traceback_and_leaves_nothing(where, train, monkeypatch, tmp_path, capsys):
    """Twenty lines of traceback, and an empty run folder."""
    monkeypatch.setattr(*((Run, "start") if where == "Run.start" else (ect, where)), ctrl_c)
    with pytest.raises(SystemExit) as e:
        train("ect")
    assert e.value.code == 130 and "error" not in capsys.readouterr().err and snapshot(tmp_path) == {}


@pytest.mark.parametrize("what, code, words", [
    (nan, 1, "step 0"), (no_memory, 2, "--accum 2"), (no_memory_here, 2, "--accum 2")])
def test_a_run_that_ends_at_once_leaves_no_folder(what, code, words, train, monkeypatch, tmp_path, capsys):
    """An empty folder for each attempt, a lock that stays, a traceback in the place of what to try."""
    monkeypatch.setattr(ect, "loss_fn", what)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as e:
        train("ect")
    err = [line for line in capsys.readouterr().err.split("\n") if "error: " in line]
    assert e.value.code == code and len(err) == 1 and words in err[0]
    assert snapshot(tmp_path) == {} and not folder.MINE.held
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_parts_that_are_proposed_divide_the_batch(monkeypatch):
    from types import SimpleNamespace as Flags
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--accum 3," in folder.relief(Flags(batch=18, accum=1, resume=""))
    assert "--accum 6," in folder.relief(Flags(batch=24, accum=3, resume=""))
    assert "--accum" not in folder.relief(Flags(batch=2, accum=1, resume=""))
    assert "--accum" not in folder.relief(Flags(batch=18, accum=1, resume="runs/x")), "a resumed run cannot"


def test_a_teacher_that_cannot_be_shown_leaves_no_folder_of_its_student(train, monkeypatch, tmp_path, refused):
    """Refused after the folder was made."""
    _, teacher = train("common.teacher", "--iters", "1", "--steps", "1")
    (teacher / "eval.jsonl").unlink()
    before = snapshot(tmp_path)
    monkeypatch.setattr(teachers, "sample", lambda net, noise, y, args: noise[0] * float("nan"))
    assert "not finite" in refused(train, "ect", "--teacher", str(teacher), code=1)
    assert {k for k in snapshot(tmp_path)} - {"runs/.lock"} == before.keys()


def test_an_error_later_keeps_what_there_is(train, monkeypatch, tmp_path):
    """A folder with a checkpoint, or a log that says why, removed as if it were empty."""
    seen = []

    def late(net, x0, y, it, *a, real=ect.loss_fn):
        seen.append(it)
        return nan(net, x0, y, it, *a) if it == 3 else real(net, x0, y, it, *a)
    monkeypatch.setattr(ect, "loss_fn", late)
    for how, name in ((["--save-every", "100"], "log.jsonl"), (["--log-every", "100"], "ckpt.pt")):
        with pytest.raises(SystemExit):
            train("ect", *how)
    assert [(p.name, (p / "ckpt.pt").exists()) for p in sorted((tmp_path / "runs").glob("ect*"))] == [
        ("ect-digits-000", False), ("ect-digits-001", True)]


def full(*args, **how):
    raise OSError(errno.ENOSPC, "No space left on device", "x")


def test_a_full_disk_is_one_line(train, monkeypatch, refused, tmp_path):
    monkeypatch.setattr(folder, "write_config", full)
    assert "No space left" in refused(train, "ect") and snapshot(tmp_path) == {}


def test_room_for_three_checkpoints_is_asked_for_before_the_start(train, monkeypatch, refused, tmp_path):
    """A disk that is full after a day."""
    _, run = train("ect", "--iters", "2")
    size, real = (run / "ckpt.pt").stat().st_size, shutil.disk_usage
    before = snapshot(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real(p)._replace(free=int(2.5 * size)))
    assert "three checkpoints" in refused(train, "ect") and snapshot(tmp_path) == before
    train("ect", "--resume", str(run), "--iters", "4")    # one of the three is there
    monkeypatch.setattr(shutil, "disk_usage", lambda p: real(p)._replace(free=int(3.5 * size)))
    train("ect", "--iters", "1")


def test_a_signal_in_the_last_evaluation_of_a_teacher_is_obeyed(train, monkeypatch, tmp_path):
    """Swallowed: the method trains to its end."""
    real = evaluate.evaluate

    def then_signal(*a, **how):
        real(*a, **how)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    def first_signal(self, *a, real=None, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return real(self, *a, **how)
    for where, call in ((evaluate, then_signal), (Run, partial(first_signal, real=Run.evaluate))):
        with monkeypatch.context() as m, pytest.raises(SystemExit) as e:
            m.setattr(where, "evaluate", call if where is evaluate else lambda self, *a, **how: call(self, *a, **how))
            train("ect", *AUTO)
        assert e.value.code == 143 and not any((tmp_path / "runs").glob("ect*"))
        assert ckpt(tmp_path / "runs/teacher-digits-000")["it"] == 4
        shutil.rmtree(tmp_path / "runs")
    with monkeypatch.context() as m, pytest.raises(SystemExit) as e:      # after the evaluation, before the handlers go
        m.setattr(Run, "close", lambda self, real=Run.close: first_signal(self, real=real) if self.before else real(self))
        train("ect", *AUTO)
    assert e.value.code == 143 and not any((tmp_path / "runs").glob("ect*"))


def test_ctrl_c_while_a_teacher_is_shown_or_images_are_drawn(train, monkeypatch, tmp_path, capsys):
    _, teacher = train("common.teacher", "--iters", "1", "--steps", "1")
    (teacher / "eval.jsonl").unlink()

    def interrupt(*a):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        pytest.fail("it went on")
    monkeypatch.setattr(teachers, "sample", interrupt)
    for go in (lambda: train("ect", "--teacher", str(teacher)),
               lambda: sample.main([str(teacher), "--device", "cpu", "--out", str(tmp_path / "x.png")])):
        with pytest.raises(SystemExit) as e:
            go()
        assert e.value.code == 130 and "error" not in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"runs"} and not any((tmp_path / "runs").glob("ect*"))


def test_the_hint_after_a_signal_can_be_typed(train, monkeypatch, tmp_path, capsys):
    """A folder with a space in its name."""
    monkeypatch.setattr(ect, "loss_fn", lambda *a, real=ect.loss_fn: (os.kill(os.getpid(), signal.SIGTERM), real(*a))[1])
    with pytest.raises(SystemExit):
        train("ect", "--out", str(tmp_path / "my runs"))
    assert f"python -m ect --resume '{tmp_path}/my runs/ect-digits-000'" in capsys.readouterr().out


def test_main_runs_in_another_thread(train):
    """signal.signal is for the main thread: a notebook's server could not train."""
    found = []
    thread = threading.Thread(target=lambda: found.append(train("ect", *AUTO)))
    thread.start()
    thread.join()
    assert ckpt(found[0][1])["it"] == 1


def test_a_clock_that_stands_still(train, monkeypatch):
    """A division by no time at all."""
    monkeypatch.setattr(runs, "clock", lambda: 5.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    _, run = train("ect", "--iters", "24")
    assert len(lines(run / "log.jsonl")) == 12


def test_numbers_that_no_run_reaches_are_refused(train, refused, tmp_path):
    """A count of 10^18, found out when the end is computed."""
    for flag in ("--iters", "--batch", "--warmup", "--seed", "--fid"):
        assert flag in refused(train, "ect", flag, str(10**18)) and snapshot(tmp_path) == {}
    assert "--P-mean" in refused(train, "ect", "--P-mean", "1e308")


def test_names_of_300_characters(train, refused, tmp_path):
    """An OSError of the file system's; a run folder whose name is too long for it."""
    for flag in ("--dataset", "--teacher", "--out", "--resume"):
        refused(train, "ect", flag, "x" * 300)
    refused(sample.main, ["x" * 300])
    _, run = train("ect", "--iters", "1")
    assert "cannot be written" in refused(sample.main, [str(run), "--out", "x" * 300])
    _, run = train("ect", "--dataset", data_set(tmp_path / ("\u00e9" * 120 + ".npz")), "--preset", "small", "--mult", "1",
                   "--iters", "1")
    assert len(os.fsencode(run.name)) < 120 and run.name.startswith("ect-\u00e9\u00e9")


def test_a_terminal_that_cannot_print_a_name(shell, tmp_path):
    """A UnicodeEncodeError in the place of a run."""
    data = data_set(tmp_path / "\u00e9\udcff\x1b.npz")
    p = shell("ect.py", *TINY, "--iters", "1", "--teacher", "none", "--preset", "small", "--mult", "1", "--dataset", data,
              "--out", tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert p.returncode == 0 and "Traceback" not in p.stderr and "\x1b" not in p.stdout, p.stderr


# ---- what a hostile reader found -----------------------------------------------------------------
def test_a_refusal_removes_no_folder_that_was_there(train, refused, monkeypatch, tmp_path):
    """The empty folder in which the user stands, and those above it."""
    (tmp_path / "project/empty/out").mkdir(parents=True)
    data = data_set(tmp_path / "mine.npz")
    monkeypatch.chdir(tmp_path / "project/empty")
    for out in ("out", "new/runs"):
        assert "no released teacher" in refused(train, "ect", "--dataset", data, "--preset", "fast", "--teacher", "auto",
                                                "--out", out)
        assert [p.name for p in Path().iterdir()] == ["out"]


def test_a_run_in_another_thread_is_not_the_owner(train, refused, tmp_path):
    """A refused run that removes the one of another thread, or goes on with it."""
    _, run = train("ect", "--iters", "2")
    held, go, end = [], threading.Event(), threading.Event()

    def other():
        held.append(folder.take(run))
        go.set()
        end.wait()
        folder.free(run)
    thread = threading.Thread(target=other)
    thread.start()
    go.wait()
    assert held == [""] and f"process {os.getpid()}" in refused(train, "ect", "--resume", str(run), "--iters", "4")
    end.set()
    thread.join()
    train("ect", "--resume", str(run), "--iters", "4")


def test_a_lock_that_was_made_anew_is_no_lock(tmp_path, job):
    """A file unlinked while another job holds it: two owners."""
    assert folder.take(tmp_path / "new") == ""
    file = folder.MINE.held[tmp_path / "new"][0]
    assert folder.ours(file, tmp_path / "new")
    shutil.rmtree(tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.lock").write_text("")
    assert not folder.ours(file, tmp_path / "new")
    folder.free(tmp_path / "new")
    assert (tmp_path / "new/.lock").exists(), "that of another job"


def test_a_run_whose_folder_was_moved_writes_into_no_other(train, monkeypatch, tmp_path, refused):
    """Its checkpoint lands in the run that took the name."""
    run = tmp_path / "runs/ect-digits-000"

    def move(net, x0, y, it, *a, real=ect.loss_fn):
        if it == 3:
            run.rename(tmp_path / "moved")
            folder_of_another = run
            folder_of_another.mkdir()
            (run / ".lock").write_text("")
        return real(net, x0, y, it, *a)
    monkeypatch.setattr(ect, "loss_fn", move)
    assert "was moved" in refused(train, "ect", "--log-every", "100", "--iters", "6")
    assert {p.name for p in run.iterdir()} == {".lock"} and ckpt(tmp_path / "moved")["it"] == 2


def test_a_teacher_in_its_first_save_is_not_damaged(train, job, monkeypatch, tmp_path, capsys):
    """Half a ckpt.tmp beside a lock: a second teacher."""
    teacher = tmp_path / "runs/teacher-digits-000"

    def slow(obj, f, real=torch.save):
        f.write(b"half")
        f.flush()
        time.sleep(2)
        f.seek(0)
        real(obj, f)
    with monkeypatch.context() as m:
        m.setattr(torch, "save", slow)
        first = job(train, "common.teacher", "--save-every", "4")
    until((teacher / "ckpt.tmp").exists)
    _, run = train("ect", *AUTO)
    assert ended(first) == 0 and config(run)["teacher"] == str(teacher) and not (teacher.parent / "teacher-digits-001").exists()


def test_figures_are_of_this_teacher_and_this_data(train, tmp_path):
    """One measured at another step, or against other images, beside those of the student."""
    _, teacher = train("common.teacher", "--steps", "2")
    old = lines(teacher / "eval.jsonl")
    (teacher / "eval.jsonl").write_text("".join(json.dumps(r | dict(it=2, value=7.0)) + "\n" for r in old))
    metrics, _ = train("ect", "--teacher", str(teacher), "--iters", "1")
    value = [s["value"] for s in old if s["metric"] == "fd_pixels"][-1]
    assert metrics["fd_pixels_teacher"] == pytest.approx(value, abs=1e-3), "measured, as it is now"
    (teacher / "eval.jsonl").write_text("".join(json.dumps(r | dict(value=7.0)) + "\n" for r in old))
    assert train("ect", "--teacher", str(teacher), "--iters", "1")[0]["fd_pixels_teacher"] == 7
    other = data_set(tmp_path / "other.npz", n=40)
    how = ["--dataset", other, "--preset", "small", "--mult", "1,2", "--sd", "0.75"]
    assert train("ect", "--teacher", str(teacher), "--iters", "1", *how)[0]["fd_pixels_teacher"] != 7


def test_what_is_distilled_is_a_finished_denoiser(train, refused, tmp_path):
    """A consistency model whose file was copied out of its folder; a teacher that will not be the same tomorrow."""
    _, run = train("ect", "--iters", "1")
    shutil.copy(run / "ckpt.pt", tmp_path / "best.pt")
    assert "consistency model" in refused(train, "cd", "--teacher", str(tmp_path / "best.pt"))
    _, teacher = train("common.teacher", "--keep", "--steps", "2")
    half = back_to(teacher, 2, tmp_path / "half")
    assert "2 of its 4 steps" in refused(train, "cd", "--teacher", str(half))
    train("cd", "--teacher", str(half / "ckpt.pt"), "--iters", "1")


def test_empty_values_are_an_unset_variable(refused, train):
    """`--resume "$RUN"` starts a new run."""
    for flag in ("--resume", "--out", "--teacher", "--dataset", "--data-dir"):
        assert f"{flag} is empty" in refused(train, "ect", flag, "")


def test_sigterm_before_the_first_step_leaves_nothing(train, monkeypatch, tmp_path):
    """The default action takes the process away, and leaves an empty run folder."""
    def term(*a, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    monkeypatch.setattr(folder, "write_config", term)
    with pytest.raises(SystemExit) as e:
        train("ect")
    assert e.value.code == 143 and snapshot(tmp_path) == {} and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_ctrl_c_that_also_ends_tee_saves(tmp_path):
    """The next update of the bar finds nobody who reads, and the run ends there, unsaved."""
    words = [sys.executable, "ect.py", *TINY, "--iters", "10000", "--save-every", "10000", "--teacher", "none", "--out", tmp_path]
    p = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path(ect.__file__).parent)
    until((tmp_path / "ect-digits-000/log.jsonl").exists)
    p.stdout.close()
    p.send_signal(signal.SIGINT)
    assert p.wait() in (130, 120) and ckpt(tmp_path / "ect-digits-000")["it"] > 0

"""Flags, run folder, checkpoints, resume, signals, seeds. Docstrings say which mistake a test catches."""
import dataclasses
import errno
import importlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DISTIL, METHODS, ROOT, TINY, distances, equal, lines, pixels, snapshot, weights
from PIL import Image

import ect
import ict
from common import evaluate as evaluation
from common import folder, sample
from common import run as runs
from common import teacher as teachers
from common.data import load
from common.networks import backbone
from common.precond import EDM
from common.evaluate import picture
from common.fid import noise_of
from common.flags import parse
from common.folder import load as load_checkpoint
from common.run import Run

each_script = pytest.mark.parametrize("script", METHODS + ["common.teacher"])


def flags(*argv, script=ect):
    return parse(script.Args, script.PRESETS, list(argv))


def tiny(*argv):
    """The arguments of a small run that starts from random weights."""
    return flags(*TINY, "--teacher", "none", *argv)


def same(a, b):
    """Two checkpoints hold the same numbers: step, networks, optimisers, all but the flags."""
    def leaves(tree):
        return [x for v in (tree.values() if isinstance(tree, dict) else tree) for x in leaves(v)] \
            if isinstance(tree, (dict, list)) else [tree]
    a, b = ({k: leaves([v]) for k, v in c.items() if k not in ("config", "model")} for c in (a, b))
    return a.keys() == b.keys() and all(
        len(a[k]) == len(b[k]) and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a[k], b[k]))
        for k in a)


def ckpt(run, name="ckpt.pt"):
    return torch.load(run / name, weights_only=True)


def config(run):
    return json.loads((run / "config.json").read_text())


def back_to(run, it, folder):
    """A copy of a run with --keep, as it was when it had just saved step `it`."""
    shutil.copytree(run, folder)
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        (folder / name).unlink(missing_ok=True)
    shutil.copy(run / f"ckpt-{it:07d}.pt", folder / "ckpt.pt")
    return folder


def data_set(path, size=8, channels=1, labels=True, n=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (n, size, size, channels), np.uint8)
    np.savez(path, images=images, **(dict(labels=np.arange(n) % 2) if labels else {}))
    return str(path)


@pytest.fixture(autouse=True)
def handlers():
    """A test that ends a run by an exception leaves its signal handlers in place; put the old ones back."""
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield old
    for s, handler in old.items():
        signal.signal(s, handler)


@pytest.fixture
def wrap_loss(monkeypatch):
    """Let change(it, net, loss, stats) edit what ect's loss_fn returns."""
    def go(change):
        def loss_fn(net, x0, y, it, args, reseed, real=ect.loss_fn):
            loss, stats = real(net, x0, y, it, args, reseed)
            return change(it, net, loss, stats) or (loss, stats)
        monkeypatch.setattr(ect, "loss_fn", loss_fn)
    return go


# ---- flags ---------------------------------------------------------------------------------------
def test_explicit_beats_preset_beats_default():
    """A preset that overrides what was typed, is not applied, or leaks into another data set."""
    a, paper = flags("--lr", "0.5"), flags("--dataset", "cifar10", "--preset", "paper")
    assert (a.lr, a.ema, a.sd, a.dataset) == (0.5, ect.PRESETS["digits"]["ema"], 0.75, "digits")
    assert a.P_std == ect.Args.P_std
    assert paper == dataclasses.replace(ect.Args(), dataset="cifar10", preset="paper")
    fast = flags("--dataset", "cifar10", "--preset", "fast", "--ema", "0.5")
    assert (fast.q, fast.iters, fast.ema, fast.sd) == (256.0, 8000, 0.5, 0.5)


@pytest.mark.parametrize("name, expect", [("mnist", 7), ("folder/of/mine", 8), ("cifar10", 9)])
def test_data_presets_win_over_size_presets_and_leave_them_alone(name, expect):
    """The data's own values lost, given to other data, or written into the table for the next call."""
    presets = dict(small=dict(batch=9, cost="x"), mnist=dict(batch=7), folder=dict(batch=8),
                   digits=dict(cost="y"))
    before = repr(presets)
    assert parse(ect.Args, presets, ["--dataset", name, "--preset", "small"]).batch == expect
    assert parse(ect.Args, presets, []).batch == ect.Args.batch and repr(presets) == before


@pytest.mark.parametrize("cuda, device, presets, expect", [
    (False, "auto", "small fast paper", "small"), (True, "auto", "small fast paper", "fast"),
    (True, "cpu", "small fast paper", "small"), (True, "cuda", "small paper", "paper")])
def test_auto_preset(monkeypatch, capsys, cuda, device, presets, expect):
    """Two days of training started on a laptop; the small recipe on a GPU; a choice that is not announced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    table = {k: dict(cost=f"cost of {k}", iters=len(k)) for k in presets.split()}
    args = parse(ect.Args, table, ["--dataset", "cifar10", "--device", device])
    assert (args.preset, args.iters) == (expect, len(expect))
    assert capsys.readouterr().out == f"preset {expect}: cost of {expect}\n"


def test_spellings():
    """Underscores or dashes refused, tuples as strings, switches that cannot be switched off."""
    for a in (flags("--log-every", "7", "--t-mid=0.5"), flags("--log_every", "7", "--t_mid=0.5")):
        assert (a.log_every, a.t_mid) == (7, 0.5)
    assert flags("--P-mean", "2").P_mean == flags("--P_mean", "2").P_mean == 2.0
    a = flags("--mult", "1,2,3", "--attn", "", "--no-flip", "--cond", "--iters", "9")
    assert (a.mult, a.attn, a.flip, a.cond) == ((1, 2, 3), (), False, True) and type(a.iters) is int
    presets = dict(small=dict(flip=True))
    on = lambda *argv: parse(ect.Args, presets, ["--dataset", "cifar10", "--preset", "small", *argv]).flip
    assert on() and not on("--no-flip")


@each_script
def test_help_prints_the_algorithm_and_every_flag_with_its_comment(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as info:
        flags("-h", script=module)
    out = capsys.readouterr().out
    assert info.value.code == 0 and "One training step" in out
    source = (ROOT / f"{script.replace('.', '/')}.py").read_text()
    for f in dataclasses.fields(module.Args):
        note = re.search(rf"^    {f.name}: .+?  # (.+)$", source, re.M)[1]
        assert f"  --{f.name.replace('_', '-')}" in out and f"{note} [" in out, f.name
        assert "_" not in f.name or f"--{f.name}" not in out, "listed in both spellings"


def test_help_shows_what_this_command_would_use_beside_the_paper(capsys, monkeypatch):
    """The paper's values alone, where a preset, a data set or a flag gives others; a preset or an example left out."""
    monkeypatch.setenv("COLUMNS", "400")

    def shows(*argv):
        with pytest.raises(SystemExit):
            flags(*argv, "-h")
        return capsys.readouterr().out
    out = shows()
    assert "(> 0) [0.0005; paper 0.0001]" in out and "sigma_data (> 0) [0.75; paper 0.5]" in out
    out = shows("--dataset", "cifar10", "--preset", "paper", "--lr", "0.3")
    assert "(> 0) [0.3; paper 0.0001]" in out and "sigma_data (> 0) [0.5]" in out
    heads = ["the run (the same in every file):", "the network (the same in every file):", "the method (defaults: "]
    assert all(out.count(f"\n{head}") == 1 for head in heads) and out.index(heads[0]) < out.index(heads[2])
    assert "python ect.py --dataset cifar10 --steps 2\n" in out
    assert all(f"\n  {name:8}{ect.PRESETS[name]['cost']}" in out for name in ("paper", "fast", "small", "digits"))
    assert out.count("(this command)") == 1


@pytest.mark.parametrize("argv, words", [
    (["--bacth", "8"], "did you mean --batch?"), (["--log-evry=3"], "did you mean --log-every?"),
    (["--mult", "1", "2"], "--mult 1,2,2"), (["--t-mid", "90"], "--t-max = 80"), (["--t-mid", "0"], "above 0"),
    (["--lr", "0"], "--lr must be above 0"), (["--ema", "1"], "below 1"), (["--mult", "1,0"], "at least 1")])
def test_a_refusal_says_what_was_meant_and_which_bound_applies(argv, words, refuses, tmp_path):
    assert words in refuses(*TINY, "--out", tmp_path / "runs", *argv)


def test_the_cost_follows_the_flags(capsys):
    """Two days are announced where 10 steps were asked for."""
    line = lambda *argv: (flags(*argv), capsys.readouterr().out)[1]
    cost = ect.PRESETS["digits"]["cost"]
    assert line() == line("--seed", "3") == line("--iters", "1000") == f"preset digits: {cost}\n"
    out = line("--iters", "10", "--batch", "8", "--lr", "1")
    assert cost not in out and "--iters 10 --batch 8;" in out and "--lr" not in out


def test_a_notebooks_own_flags_are_not_ours(monkeypatch, capsys):
    """parse(Args, PRESETS) in a cell sees `-f kernel.json` in sys.argv."""
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    with pytest.raises(SystemExit):
        parse(ect.Args, ect.PRESETS)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert parse(ect.Args, ect.PRESETS) == flags()


OLD = json.loads((ROOT / "tests/old_configs.json").read_text())          # as written before flags were renamed or moved


@pytest.mark.parametrize("name", OLD)
def test_runs_of_older_commits_can_be_resumed(name, tmp_path):
    """A flag renamed, removed or of another type: older run folders could not be resumed or sampled."""
    run = tmp_path / name
    run.mkdir()
    (run / "config.json").write_text(json.dumps(OLD[name]))
    module = importlib.import_module(OLD[name]["about"]["script"])
    args = dataclasses.asdict(flags("--resume", str(run), script=module))
    renamed = getattr(module.Args, "renamed", {})
    for k, v in OLD[name].items():
        if k not in ("about", "resume"):
            assert args[renamed.get(k, k)] == (tuple(v) if isinstance(v, list) else v), k


def test_a_config_of_an_older_script_is_understood(train):
    """A flag that was renamed since: rcm's F."""
    import rcm
    _, run = train("rcm", "--student-every", "3", "--iters", "1")
    old = config(run)
    old["F"] = old.pop("student_every")
    (run / "config.json").write_text(json.dumps(old))
    assert parse(rcm.Args, rcm.PRESETS, ["--resume", str(run)]).student_every == 3
    train("rcm", "--resume", str(run), "--iters", "2")
    assert config(run)["student_every"] == 3 and "F" not in config(run)


# ---- bad input: one line on stderr, exit status 2, nothing left behind ---------------------------
@pytest.fixture
def refuses(capsys, tmp_path, monkeypatch):
    """The one line with which a script refuses its flags, having left everything as it was."""
    def go(*argv, script=ect):
        before = snapshot(tmp_path)
        capsys.readouterr()
        with monkeypatch.context() as m, pytest.raises(SystemExit) as info:
            m.setattr(Run, "sync", lambda *a: pytest.fail("it trains"))
            script.main(flags(*map(str, argv), script=script))
        err = capsys.readouterr().err
        assert info.value.code == 2 and snapshot(tmp_path) == before
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        return err
    return go


@pytest.mark.parametrize("argv, hint", [
    (["--step", "4"], "unrecognized"), (["--data", "x"], "unrecognized"), (["extra"], "extra"),
    (["--iters", "4.5"], "invalid int"), (["--lr", "fast"], "invalid float"), (["--device", "tpu"], "cpu"),
    (["--mult", "1,x"], "integers"), (["--seed"], "expected one argument"), (["--flip=1"], "explicit"),
    *(([flag, value], flag) for flag, *values in (
        ("--steps", "0"), ("--iters", "0"), ("--grid", "0"), ("--accum", "0"), ("--batch", "0"),
        ("--log-every", "0"), ("--save-every", "-1"), ("--warmup", "-1"), ("--dropout", "1", "-0.1"),
        ("--lr", "0", "nan", "inf"), ("--ema", "1"), ("--ch", "3", "66"), ("--mult", "", "1,0"),
        ("--blocks", "0")) for value in values), (["--batch", "7", "--accum", "2"], "--accum"),
    (["--t-mid", "80"], "--t-mid"), (["--shard"], "torchrun"), (["--preset", "small"], "one preset"), (["--lora", "4"], "pipeline"),
    (["--fid-every", "5"], "--fid-every needs --fid"), (["--size", "16"], "8 pixels"), (["--mult", "1,1,1,1,1"], "--mult"), (["--teacher", "absent"], "absent"),
    (["--dataset", "absent/folder"], "absent/folder")])
def test_bad_flags_are_refused(argv, hint, refuses, tmp_path):
    assert hint in refuses(*TINY, "--out", tmp_path / "runs", *argv)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(device, refuses, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert f"--device {device}" in refuses(*TINY, "--out", tmp_path / "runs", "--device", device)


def test_bad_data_is_refused(refuses, tmp_path):
    """Empty folder, broken image, labels that are not there, a width the image cannot be halved to."""
    start = [*TINY, "--out", tmp_path / "runs", "--preset", "small", "--dataset"]
    (tmp_path / "empty").mkdir()
    assert "no images" in refuses(*start, tmp_path / "empty")
    (tmp_path / "one").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "one/good.png")
    for teacher in ("train", "none"):
        assert "--cond" in refuses(*start, tmp_path / "one", "--cond", "--teacher", teacher)
        odd = ["--size", "6", "--mult", "1,1,1", "--teacher", teacher]
        assert "--mult" in refuses(*start, tmp_path / "one", *odd)
    (tmp_path / "one/bad.png").write_bytes((tmp_path / "one/good.png").read_bytes()[:40])
    assert "bad.png" in refuses(*start, tmp_path / "one")


def test_a_teacher_that_does_not_fit_is_refused(refuses, tmp_path, train):
    """Another size, noise scale or number of classes; another kind of folder or file."""
    _, teacher = train("common.teacher", "--iters", "1", "--steps", "2")
    start = [*TINY, "--out", tmp_path / "runs", "--teacher"]
    large = data_set(tmp_path / "large.npz", size=16)
    assert "sd, channels" in refuses(*start, teacher, "--dataset", large, "--sd", "0.75")
    assert "sd, channels" in refuses(*start, teacher, "--sd", "0.5")
    assert "10" in refuses(*start, teacher, "--cond")
    torch.save(dict(model=torch.zeros(1)), tmp_path / "foreign.pt")
    for path in (teacher / "samples", ROOT / "ect.py", tmp_path / "foreign.pt"):
        assert str(path) in refuses(*start, path)


def test_a_resume_that_contradicts_the_run_is_refused(refuses, train):
    """A changed defining flag, no run, the run of another script, a run without readable weights."""
    _, run = train("ect", "--iters", "1")
    for argv in ("--lr 1", "--cond", "--q 3"):
        assert f"{argv.split()[0]} defines the run" in refuses("--resume", run, *argv.split())
    assert "--teacher can only tell" in refuses("--resume", run, "--teacher", "auto")
    other = data_set(run.parent / "digits.npz")
    assert "does not hold the images" in refuses("--resume", run, "--dataset", other, "--iters", "2")
    assert "no run folder" in refuses("--resume", run.parent)
    assert "made by ect" in refuses("--resume", run, script=teachers)
    (run / "ckpt.pt").write_bytes(b"not a checkpoint")
    assert "no readable checkpoint" in refuses("--resume", run)
    (run / "config.json").write_text("")
    assert "damaged" in refuses("--resume", run)


def test_a_place_that_cannot_be_written_is_refused(refuses, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--out" in refuses(*TINY, "--teacher", "none", "--out", tmp_path / "file")


def test_a_script_refuses_as_its_main_does(shell, tmp_path):
    """What only a process shows: a traceback, text on stdout before the error, another exit status."""
    p = shell("ect.py", "--step", "4", "--out", tmp_path / "runs")
    assert (p.returncode, p.stdout) == (2, "") and not any(tmp_path.iterdir())
    assert p.stderr.startswith("error: ") and p.stderr.count("\n") == 1


# ---- run folder ----------------------------------------------------------------------------------
KEYS = {"it", "metric", "value", "n", "net", "steps", "t_mid", "mode", "seed", "noise", "sec"}


@pytest.mark.parametrize("method", METHODS)
def test_run_folder_is_complete(method, train):
    """A file of the contract missing, misnamed or short of a key."""
    metrics, run = train(method, "--steps", "3", "--cond")
    mode = getattr(importlib.import_module(method).Args, "mode", "")      # is part of the method's name
    stem = "-".join(filter(None, [method, mode, "digits-000"]))
    assert run.name == stem and {p.name for p in run.iterdir()} == {
        "config.json", "log.jsonl", "eval.jsonl", "ckpt.pt", "ckpt.prev.pt", "samples", "source", ".lock"}
    kept = config(run)
    about = kept.pop("about")
    assert kept.keys() == {f.name for f in dataclasses.fields(importlib.import_module(method).Args)}
    assert (kept["iters"], kept["mult"], kept["resume"], about["script"]) == (4, [1, 2], "", method)
    assert about.keys() >= {"argv", "commit", "torch", "ranks", "device", "data_sha256"}

    log, figures = lines(run / "log.jsonl"), distances(run)
    assert [r["it"] for r in log] == [2, 4] and len(lines(run / "eval.jsonl")) == 5 * len(figures)
    for r in log:
        assert r.keys() >= {"it", "sec", "loss", "lr", "img_s", "mem_gb"}
        assert all(map(math.isfinite, r.values()))
    assert all(r.keys() == KEYS for r in figures)
    teacher = [r for r in figures if r["net"] == "teacher"]               # shown by the methods that distil
    figures = [r for r in figures if r["net"] == "ema"]
    assert len(teacher) == (method in DISTIL) and (metrics.pop("fd_pixels_teacher", None) is None) == (not teacher)
    assert [(r["it"], r["steps"]) for r in figures] == [(2, 1), (2, 3), (4, 1), (4, 3)]
    assert {r["t_mid"] for r in figures if r["steps"] == 1} == {None}
    assert metrics == {"run": str(run), **{f"fd_pixels_{r['steps']}step": r["value"] for r in figures[2:]}}

    grids = {p.name: Image.open(p) for p in (run / "samples").iterdir()}
    assert grids.keys() - {"0000000_teacher.png"} == {f"000000{it}_{k}step.png" for it in (2, 4) for k in (1, 3)}
    assert {g.size for g in grids.values()} == {pixels(4, 1)}, "4 images, a column for each class"
    saved = ckpt(run)
    assert (saved["it"], ckpt(run, "ckpt.prev.pt")["it"]) == (4, 2)
    assert saved.keys() >= {"net", "ema", "opt", "config"}
    assert not equal(saved["net"], saved["ema"]) and saved["model"]["kwargs"]["classes"] == 10
    assert train(method, "--iters", "1")[1].name == stem[:-1] + "1"


def test_config_keeps_the_flags_as_they_were_asked(train):
    """Overwritten by what the teacher and the method decided: nobody could tell what was typed."""
    _, teacher = train("common.teacher", *"--ch 32 --mult 1 --steps 1 --iters 1".split())
    _, run = train("cd", "--teacher", str(teacher), "--boundaries", "2", "--steps", "3", "--iters", "1")
    kept, asked = config(run), config(run)["about"]["asked"]
    assert [kept[k] for k in ("ch", "N", "steps", "t_mid", "teacher")] == [32, 19, 2, None, str(teacher)]
    assert [asked[k] for k in ("ch", "N", "steps", "t_mid")] == [16, 0, 3, 0.15]
    train("cd", "--resume", str(run), "--iters", "2")
    assert config(run)["about"]["asked"] == asked and config(run)["iters"] == 2


def test_a_run_is_loaded_in_one_call(train, tmp_path):
    """The network without its sampler, its flags or the module that knows both."""
    from common.sample import load_run
    _, run = train("scm", "--iters", "1", "--sd", "0.7", "--steps", "3")
    for path in (run, run / "ckpt.pt"):
        method, args, net = load_run(path)
        assert method.__name__ == "scm" and (args.sd, args.steps, args.mode) == (0.7, 3, "sct")
        x = method.sample(net, noise_of(range(5), args.steps, (1, 8, 8), "cpu"), None, args)
        assert x.shape == (5, 1, 8, 8) and x.abs().max() <= 1 and not net.training
    with pytest.raises(SystemExit):
        load_run(tmp_path)


def test_source_is_a_working_copy(train, tmp_path):
    """A file that the script needs is not copied; a copy that imports the checkout instead."""
    _, run = train("ect", "--iters", "1")
    code = "import ect, common.run; print(ect.__file__, common.run.__file__, ect.load('digits').images.shape)"
    p = subprocess.run([sys.executable, "-c", code], cwd=run / "source", capture_output=True, text=True,
                       env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert p.returncode == 0, p.stderr
    assert p.stdout.count(str(run / "source")) == 2 and "[1797, 1, 8, 8]" in p.stdout


def test_folders_are_numbered_after_the_last(tmp_path):
    """Counting instead of looking: a deleted run would make the next one land in, or before, an old one."""
    for name in "ect-digits-000 ect-digits-007 ect-digits-90-old ect-digits-large-009 x-digits-020".split():
        (tmp_path / name).mkdir()
    (tmp_path / "ect-digits-010").write_text("")          # a file takes a number, too
    (tmp_path / "ect-digits-\u00b2").mkdir()              # a digit to str.isdigit, and nothing to int
    assert folder.create(tmp_path, "ect-digits").name == "ect-digits-011"
    assert folder.create(tmp_path, "ect-digits-large").name == "ect-digits-large-010"
    folder.MINE.end.close()


def test_log_holds_the_averages_of_the_interval(train, wrap_loss):
    """A mean over the last step only, bins that lose or repeat images, a loss of one part instead of all."""
    seen = []
    wrap_loss(lambda it, net, loss, stats: seen.append((stats["t"].flatten(), stats["loss"], stats["gap"])))
    _, run = train("ect", "--iters", "6", "--log-every", "3", "--accum", "2", "--batch", "16")
    edges = [1e-2 * 10 ** (2 * i / 3) for i in range(7)]                  # 8 bins from 0.01 to 100
    for line, steps in zip(lines(run / "log.jsonl"), (seen[:6], seen[6:]), strict=True):
        t, loss = (torch.cat(v) for v in list(zip(*steps))[:2])
        assert len(loss) == 3 * 16 and line["loss"] == pytest.approx(float(loss.mean()), rel=1e-4)
        assert line["gap"] == pytest.approx(float(sum(s[2] for s in steps)) / 6, rel=1e-4)
        bins, total = np.digitize(t, edges), 0.0
        for i in range(8):
            assert (f"loss_t{i}" in line) == (i in bins)
            if i in bins:
                assert line[f"loss_t{i}"] == pytest.approx(float(loss[bins == i].mean()), rel=1e-4)
                total += line[f"loss_t{i}"] * (bins == i).sum()
        assert total / len(loss) == pytest.approx(line["loss"], rel=1e-4)
    speed = lines(run / "log.jsonl")[-1]
    elapsed = speed["sec"] - lines(run / "log.jsonl")[0]["sec"]
    assert speed["img_s"] == pytest.approx(3 * 16 / elapsed, rel=0.2)


def test_warm_up_and_averaged_weights(train):
    """A warm-up that starts at zero or ends late; averaged weights that lag, lead or copy the network's."""
    _, run = train("ect", "--warmup", "3", "--lr", "3e-3", "--log-every", "1", "--save-every", "1", "--keep",
                   "--ema", "0.15", "--iters", "4")
    assert [r["lr"] for r in lines(run / "log.jsonl")] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3])
    for it in (1, 2, 3):
        a, b = (ckpt(run, f"ckpt-{i:07d}.pt") for i in (it, it + 1))
        decay = min(0.15, (it + 1) / (it + 10))                           # step `it` counts from 0
        for k in a["ema"]:
            assert torch.allclose(b["ema"][k], decay * a["ema"][k] + (1 - decay) * b["net"][k], atol=1e-6), k
        assert not equal(a["net"], b["net"])


def test_grids_show_the_same_noise_at_every_step_in_every_run(train, monkeypatch):
    """Noise that follows the step, --seed, --steps or a generator's state: grids could not be compared."""
    seen = []
    for module in (ect, teachers):
        monkeypatch.setattr(module, "sample", lambda net, noise, y, args: seen.append(noise) or 0 * noise[0])
    train("ect", "--seed", "1", "--steps", "2")
    train("ect", "--seed", "2", "--steps", "3", "--iters", "2")
    train("common.teacher", "--iters", "2")
    assert [len(noise) for noise in seen] == [1, 2, 1, 2, 1, 3, 1]
    assert all(torch.equal(noise[0], seen[0][0]) for noise in seen)
    assert torch.equal(seen[1], seen[3]) and torch.equal(seen[1], seen[5][:2])


def test_columns_of_a_grid_are_classes_and_figures_follow_the_data(train, monkeypatch, tmp_path):
    """Labels in equal shares: where the data are 9:1, the figure of a perfect model would be 2.8 instead of 0."""
    labels = []
    monkeypatch.setattr(ect, "sample", lambda net, noise, y, args: labels.append((noise, y)) or 0 * noise[0])
    train("ect", "--cond", "--iters", "1", "--grid", "12", "--steps", "1")
    (noise, figure), (again, grid) = labels
    assert torch.equal(grid, torch.arange(12) % 10) and torch.equal(noise[:, :12], again)
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    assert torch.equal(figure, load("digits").labels[order[:evaluation.FD_IMAGES]])
    monkeypatch.setattr(evaluation, "FD_IMAGES", 64)      # all of them
    rare = np.arange(40) % 10 == 0
    np.savez(tmp_path / "rare.npz", images=np.zeros((40, 8, 8, 1), np.uint8), labels=rare.astype(int))
    labels.clear()
    train("ect", "--dataset", str(tmp_path / "rare.npz"), "--preset", "small", "--attn", "4", "--cond", "--iters", "1",
          "--mult", "1", "--steps", "1")
    assert labels[0][1].bincount().tolist() == [36, 4]


def test_an_evaluation_shows_that_it_goes_on(train, monkeypatch, capsys):
    """Minutes of silence after the last step; a bar for what takes no time."""
    _, run = train("ect", "--iters", "1")
    assert "images" not in capsys.readouterr().err
    monkeypatch.setattr(ect, "sample", lambda net, noise, y, args: time.sleep(2.1) or 0 * noise[0])
    train("ect", "--resume", str(run), "--grid", "100", "--steps", "1")
    assert "images: " in capsys.readouterr().err


def test_picture_places_images_by_rows():
    """Images in columns, transposed or smoothed; missing ones black."""
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 16, 16).clone()
    images[:, :, 0, 1] = 99                                               # row 0, column 1 of each
    sheet = np.asarray(picture(images, cols=3))
    assert sheet.shape == (*pixels(3, 2, 16)[::-1], 3) and (sheet == sheet[..., :1]).all()
    assert sheet[31::34, 31::34, 0].tolist() == [[0, 1, 2], [3, 4, 128]]  # zoom 2
    assert (sheet[:2, 2:4] == 99).all() and (sheet[2:32, :2] == 0).all()
    assert picture(torch.zeros(4, 3, 64, 64).byte()).size == pixels(2, 2, 64)


# ---- resume --------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact(method, train, tmp_path):
    """State that is not saved; dropout, flips, noise or parts that depend on more than the step."""
    how = ["--dropout", "0.2", "--flip", "--accum", "2", "--log-every", "1"]
    _, whole = train(method, *how, "--keep")
    cut = back_to(whole, 2, tmp_path / "cut")
    train(method, "--resume", str(cut))
    assert same(ckpt(whole), ckpt(cut)) and not same(ckpt(whole), ckpt(whole, "ckpt.prev.pt"))
    logs = [[(r["it"], r["loss"], r["lr"]) for r in lines(run / "log.jsonl")] for run in (whole, cut)]
    assert [it for it, *_ in logs[0]] == [1, 2, 3, 4] and logs[0] == logs[1], "steps that were made again stand twice"
    assert [r["it"] for r in lines(cut / "eval.jsonl")] == [r["it"] for r in lines(whole / "eval.jsonl")]


def test_resume_may_extend_a_run(train):
    """A schedule that follows --iters; a resumed run that forgets its flags, or does not keep the new one."""
    _, whole = train("ect")
    _, short = train("ect", "--iters", "2", "--seed", "0")
    train("ect", "--resume", str(short), "--iters", "4")
    assert same(ckpt(whole), ckpt(short))
    assert config(short) | dict(about=0) == config(whole) | dict(about=0)


def test_a_finished_run_is_only_sampled(train, capsys):
    """Another step of training, a rewritten checkpoint, a --steps that is not honoured, a second folder."""
    _, run = train("ect")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.glob("ckpt*")}
    metrics, again = train("ect", "--resume", str(run), "--steps", "3", "--t-mid", "0.5", "--grid", "9")
    assert again == run and [p.name for p in run.parent.iterdir()] == [run.name]
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.glob("ckpt*")} == before
    assert len(lines(run / "log.jsonl")) == 2
    assert metrics.keys() == {"run", "fd_pixels_1step", "fd_pixels_3step"}
    last = [(r["it"], r["steps"], r["t_mid"]) for r in distances(run)[-2:]]
    assert last == [(4, 1, None), (4, 3, 0.5)]
    assert Image.open(run / "samples/0000004_3step.png").size == pixels(3, 3)
    assert "3 steps, t_mid 0.5" in capsys.readouterr().out


def test_the_teacher_resumes_exactly(train, tmp_path):
    """Its warm-up and the ramp of its average depend on the step."""
    _, whole = train("common.teacher", "--batch", "8", "--dropout", "0.2", "--cond", "--keep", "--steps", "2")
    cut = back_to(whole, 2, tmp_path / "cut")
    metrics, _ = train("common.teacher", "--resume", str(cut))
    assert same(ckpt(whole), ckpt(cut)) and metrics.keys() == {"run", "fd_pixels_teacher"}
    metrics, _ = train("common.teacher", "--resume", str(cut), "--steps", "1")
    first, last = [r for r in lines(cut / "eval.jsonl") if r["metric"] == "fd_pixels"][-2:]
    assert (first["steps"], last["steps"]) == (2, 1)
    assert metrics["fd_pixels_teacher"] == last["value"] != first["value"]
    assert {p.name for p in (whole / "samples").iterdir()} == {"0000002_teacher.png", "0000004_teacher.png"}
    assert {(r["net"], r["steps"]) for r in lines(whole / "eval.jsonl")} == {("teacher", 2)}


# ---- where a run starts --------------------------------------------------------------------------
def test_auto_trains_a_teacher_once_and_shows_its_figure(train, tmp_path):
    """A teacher trained again for every student, its figure or grid missing, its flags not handed on."""
    metrics, run = train("ect", "--teacher", "auto", "--teacher-iters", "1", "--iters", "1", "--seed", "3")
    teacher = tmp_path / "runs/teacher-digits-000"
    assert [config(teacher)[k] for k in ("iters", "ch", "seed", "sd")] == [1, 16, 3, 0.75]
    assert metrics.keys() == {"run", "fd_pixels_teacher", "fd_pixels_1step", "fd_pixels_2step"}
    first = lines(run / "eval.jsonl")[0]
    assert (first["net"], first["it"], first["steps"], first["value"]) == \
        ("teacher", 0, 18, metrics["fd_pixels_teacher"])
    grids = run / "samples/0000000_teacher.png", teacher / "samples/0000001_teacher.png"
    assert grids[0].read_bytes() == grids[1].read_bytes()

    before = snapshot(teacher)
    _, second = train("ect", "--teacher", "auto", "--teacher-iters", "1", "--iters", "1")
    assert snapshot(teacher) == before and config(second)["teacher"] == str(teacher)
    train("ect", "--teacher", "auto", "--teacher-iters", "1", "--iters", "1", "--blocks", "2")
    assert {p.name for p in teacher.parent.iterdir()} == {"teacher-digits-000", "teacher-digits-001", ".lock"} | {
        f"ect-digits-00{i}" for i in range(3)}


def test_only_a_teacher_of_the_same_data_and_network_is_found(train, tmp_path):
    """A name alone is no match; the newest of several is."""
    _, old = train("common.teacher", "--iters", "1", "--steps", "1")
    _, new = train("common.teacher", "--iters", "1", "--steps", "1")
    data = load("digits")

    def found(*argv, data=data):
        args = tiny("--out", str(tmp_path / "runs"), "--teacher-iters", "1", *argv)
        return teachers.adopt(args, data, Run(args, ect.__file__))
    assert found() == str(new)
    for argv in ("--ch 32", "--mult 1", "--blocks 2", "--attn 8", "--cond", "--sd 0.5"):
        assert found(*argv.split()) is None, argv
    other = load(data_set(tmp_path / "digits.npz"))
    assert other.name == "digits" and found(data=other) is None, "other images of the same name"
    (new / "ckpt.pt").unlink()
    assert found() == str(old), "a teacher that was stopped before its first save"


def test_a_teacher_of_a_trial_is_not_taken_for_the_real_one(train, tmp_path, capsys):
    """`--teacher-iters 2` to try things out, then the real command: from half a teacher, or with the trial's folder
    written to again; a longer teacher refused; what was adopted left unsaid."""
    auto = ("--teacher", "auto", "--iters", "1", "--teacher-iters")
    _, run = train("ect", *auto, "1")
    trial = Path(config(run)["teacher"])
    before = snapshot(trial)
    capsys.readouterr()
    _, run = train("ect", *auto, "2")
    real, out = Path(config(run)["teacher"]), capsys.readouterr().out
    assert real.name == "teacher-digits-001" and snapshot(trial) == before and ckpt(real)["it"] == 2
    assert "is finished after 1 steps, fewer than 2; it is not used" in out
    (figure,) = [r["value"] for r in distances(real)]
    assert f"teacher: {real}, 2 steps, FD (pixels) {figure:.3f}\n" in out
    _, run = train("ect", *auto, "1")
    assert config(run)["teacher"] == str(real), "the newest that has enough"


def test_a_typed_batch_reaches_the_teacher(train):
    """A batch chosen to fit the memory, and a teacher that does not fit; a teacher with another one adopted."""
    auto = ("--teacher", "auto", "--iters", "1", "--teacher-iters", "1")
    _, run = train("ect", *auto)
    assert config(Path(config(run)["teacher"]))["batch"] == 8
    _, run = train("ect", *auto, "--batch", "4")
    assert Path(config(run)["teacher"]).name == "teacher-digits-001"
    assert config(Path(config(run)["teacher"]))["batch"] == 4
    for more, batch in (([], 512), (["--batch", "16"], 16)):              # a preset's own batch does not: ict has 1024
        args = flags("--dataset", "cifar10", "--preset", "paper", "--device", "cpu", *more, script=ict)
        assert teachers.wish(args, Run(args, ict.__file__)).batch == batch


def test_an_unfinished_teacher_is_finished_first(train, tmp_path):
    """A student that starts from half a teacher, or a second teacher beside the first."""
    _, whole = train("common.teacher", "--keep", "--steps", "2")
    back_to(whole, 2, tmp_path / "some/teacher-digits-000")
    train("ect", "--teacher", "auto", "--teacher-iters", "3", "--iters", "1", "--out", str(tmp_path / "some"))
    assert same(ckpt(whole), ckpt(tmp_path / "some/teacher-digits-000"))
    assert {p.name for p in (tmp_path / "some").iterdir()} == {"teacher-digits-000", "ect-digits-000", ".lock"}


def test_a_student_starts_as_its_teacher(train):
    """Another architecture than the teacher's; its raw instead of its averaged weights, or other averages."""
    _, teacher = train("common.teacher", *"--ch 32 --mult 1 --steps 1 --warmup 1".split())
    assert not equal(*(weights(teacher, part) for part in ("net", "ema")))
    for path in (teacher, teacher / "ckpt.pt"):
        _, run = train("ect", "--teacher", str(path), "--iters", "1", "--lr", "1e-30", "--dropout", "0.3")
        assert [config(run)[k] for k in ("ch", "mult", "teacher")] == [32, [1], str(path)]
        assert equal(weights(run), weights(teacher, "ema"))
        assert all(torch.allclose(a, b) for a, b in zip(weights(run, "ema").values(), weights(run).values()))
        assert ckpt(run)["model"]["kwargs"]["dropout"] == 0.3, "dropout is the run's own"


def test_without_a_teacher_there_is_no_teachers_figure(train, tmp_path):
    metrics, run = train("ect", "--teacher", "none", "--iters", "1")
    assert metrics.keys() == {"run", "fd_pixels_1step", "fd_pixels_2step"}
    assert [p.name for p in run.parent.iterdir()] == [run.name] and not list(run.glob("samples/*teacher*"))


# ---- checkpoints ---------------------------------------------------------------------------------
class Killed(BaseException):
    pass


@pytest.fixture
def write_half(monkeypatch):
    """From step `it` on, torch.save writes half of a checkpoint and raises."""
    def go(it, error):
        def save(obj, f, real=torch.save):
            if obj["it"] < it:
                return real(obj, f)
            real(obj, half := f.name + ".half")
            f.write(Path(half).read_bytes()[:os.path.getsize(half) // 2])
            os.remove(half)
            f.flush()
            raise error
        monkeypatch.setattr(torch, "save", save)
    return go


def test_killed_while_writing(train, write_half, monkeypatch, tmp_path):
    """Writing over the good checkpoint. A killed process cleans up nothing, hence no unlink."""
    _, whole = train("ect")
    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", lambda *a, **k: None)
        write_half(4, Killed())
        with pytest.raises(Killed):
            train("ect")
    run = tmp_path / "runs/ect-digits-001"
    assert load_checkpoint(run)["it"] == 2 and (run / "ckpt.tmp").stat().st_size > 0
    monkeypatch.undo()
    train("ect", "--resume", str(run))
    assert same(ckpt(whole), ckpt(run)) and not (run / "ckpt.tmp").exists()


def test_killed_between_the_two_renames(train, monkeypatch, tmp_path):
    """There is a moment without ckpt.pt; the new one, which is complete, has to take its place."""
    _, whole = train("ect")
    def replace(a, b, real=os.replace):
        if Path(a).name == "ckpt.tmp" and (Path(b).parent / "ckpt.prev.pt").exists():
            raise Killed
        real(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        with pytest.raises(Killed):
            train("ect")
    run = tmp_path / "runs/ect-digits-001"
    assert not (run / "ckpt.pt").exists() and same(load_checkpoint(run), ckpt(whole))
    os.truncate(run / "ckpt.tmp", 1000)                   # or the one before it, where it is not complete
    assert load_checkpoint(run)["it"] == 2
    train("ect", "--resume", str(run))
    assert same(ckpt(whole), ckpt(run))


def test_a_flipped_bit_is_seen(train):
    """torch.load reads 19 of 20 damaged files without a word: weights that nobody trained."""
    _, run = train("ect")
    whole, good, seen = (run / "ckpt.pt").read_bytes(), ckpt(run), 0
    (run / "ckpt.prev.pt").unlink()
    for i in np.random.default_rng(0).integers(0, len(whole), 40):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << int(i) % 8
        (run / "ckpt.pt").write_bytes(damaged)
        try:
            assert same(load_checkpoint(run), good)       # padding between the tensors
        except SystemExit:
            seen += 1
    assert seen > 20


def test_a_damaged_checkpoint_does_not_replace_the_one_before_it(train):
    """After a fall back to ckpt.prev.pt: the next save renames the damaged file over the only good one."""
    _, run = train("ect", "--iters", "5")                 # saves after steps 2, 4 and 5
    damaged = bytearray((run / "ckpt.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 255
    (run / "ckpt.pt").write_bytes(damaged)
    state = load_checkpoint(run)
    assert state["it"] == 4
    folder.save(run, state | dict(it=6), keep=False)
    assert ckpt(run)["it"] == 6 and ckpt(run, "ckpt.prev.pt")["it"] == 4


def test_a_compressed_checkpoint_is_refused(train, tmp_path):
    """A few kilobytes of zeros that become gigabytes."""
    _, run = train("ect")
    with zipfile.ZipFile(run / "ckpt.pt") as old, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(SystemExit):
        load_checkpoint(tmp_path / "x.pt")


def test_a_torn_line_takes_no_other_with_it(train, tmp_path):
    """A line that a kill cut in two, and the first line after it on the same line."""
    _, whole = train("ect", "--log-every", "1", "--keep")
    cut = back_to(whole, 2, tmp_path / "cut")
    for name in ("log.jsonl", "eval.jsonl"):
        kept = (cut / name).read_bytes().splitlines(keepends=True)
        (cut / name).write_bytes(b"".join(kept[:2]) + kept[1][:20] + b"\xff")
    train("ect", "--resume", str(cut))
    assert [r["it"] for r in lines(cut / "log.jsonl")] == [1, 2, 3, 4]
    assert [r["it"] for r in lines(cut / "eval.jsonl")] == [2, 2, *[4] * 10]


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(train, monkeypatch):
    """Without flush and fsync a power cut leaves an empty file under the good name."""
    synced, size = [], []
    def save(obj, f, real=torch.save):                                    # torch's own flushes, today
        real(obj, whole := io.BytesIO())
        f.write(whole.getvalue()[:-9])
        f.write(whole.getvalue()[-9:])
    monkeypatch.setattr(torch, "save", save)
    sync = lambda fd, real=os.fsync: synced.append(os.fstat(fd).st_size) or real(fd)
    monkeypatch.setattr(os, "fsync", sync)
    def replace(a, b, real=os.replace):
        if Path(a).name == "ckpt.tmp":
            size.append(os.path.getsize(a))
            assert synced == size, "renamed before all of it was synced"
        real(a, b)
    monkeypatch.setattr(os, "replace", replace)
    train("ect")
    assert len(size) == 2


def test_a_truncated_checkpoint_falls_back_and_says_so(train, capsys):
    """A run that cannot go on, or that goes back in silence."""
    _, run = train("ect")
    whole = ckpt(run)
    for content in ((run / "ckpt.pt").read_bytes()[:-1000], b""):
        (run / "ckpt.pt").write_bytes(content)
        capsys.readouterr()
        assert load_checkpoint(run)["it"] == 2
        out = capsys.readouterr().out
        assert str(run / "ckpt.pt") in out and "cannot be read" in out and out.count("\n") == 1
    train("ect", "--resume", str(run))
    assert same(whole, ckpt(run))


def test_a_full_disk_leaves_the_old_checkpoint(train, write_half, tmp_path, capsys):
    """Half a file, or the good one gone, where there is no space for a new one."""
    write_half(4, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(SystemExit, match="2"):
        train("ect")
    assert "error: No space left" in capsys.readouterr().err
    run = tmp_path / "runs/ect-digits-000"
    assert [p.name for p in run.glob("ckpt*")] == ["ckpt.pt"] and ckpt(run)["it"] == 2


def test_keep_keeps_every_checkpoint(train):
    _, run = train("ect", "--keep", "--iters", "6")
    assert {p.name: ckpt(run, p.name)["it"] for p in run.glob("ckpt*")} == {
        "ckpt.pt": 6, "ckpt.prev.pt": 4, "ckpt-0000002.pt": 2, "ckpt-0000004.pt": 4, "ckpt-0000006.pt": 6}


# ---- signals -------------------------------------------------------------------------------------
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(number, status, train, wrap_loss, handlers, tmp_path, capsys):
    """A step cut short or lost, an evaluation that delays the exit, handlers that outlive the run."""
    _, whole = train("ect", "--save-every", "100")
    inside = []

    def kill(it, *rest):
        if it == 1 and not inside:
            os.kill(os.getpid(), number)
            time.sleep(0.01)                                              # until Python has run the handler
            inside.extend(signal.getsignal(s) for s in handlers)
    wrap_loss(kill)
    with pytest.raises(SystemExit) as info:
        train("ect", "--save-every", "100")
    run = tmp_path / "runs/ect-digits-001"
    assert info.value.code == status and ckpt(run)["it"] == 2 and not (run / "eval.jsonl").exists()
    assert inside == [signal.SIG_DFL] * 2, "a second one would not end the process at once"
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    assert f"--resume {run}" in capsys.readouterr().out
    train("ect", "--resume", str(run))
    assert same(ckpt(whole), ckpt(run))


def test_a_signal_ends_an_evaluation(train, monkeypatch, handlers, tmp_path):
    """All is saved by then: an hour of sampling would only make the job's end be a kill -9."""
    _, finished = train("ect", "--iters", "1")
    def sample(net, noise, y, args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        pytest.fail("the evaluation went on")
    monkeypatch.setattr(ect, "sample", sample)
    for argv in ([], ["--resume", str(finished)]):
        with pytest.raises(SystemExit) as info:
            train("ect", *argv)
        assert info.value.code == 143
        assert {s: signal.getsignal(s) for s in handlers} == handlers, "Ctrl-C would then kill a notebook"
    assert ckpt(tmp_path / "runs/ect-digits-001")["it"] == 2


def test_a_signal_while_saving_prevents_the_evaluation(train, monkeypatch, tmp_path):
    """After the last look at the flag it would go unseen, in the last step for good."""
    def save(obj, f, real=torch.save):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        real(obj, f)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SystemExit) as info:
        train("ect", "--iters", "1")
    run = tmp_path / "runs/ect-digits-000"
    assert info.value.code == 143 and ckpt(run)["it"] == 1 and not (run / "eval.jsonl").exists()


def test_signals_to_a_real_process(train, tmp_path):
    """What only a process shows: exit status, a handler that is never installed, a traceback."""
    how = ["--dropout", "0.1", "--save-every", "100000"]
    processes = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        out = tmp_path / number.name
        words = [sys.executable, "ect.py", *TINY, "--teacher", "none", "--out", str(out), *how]
        processes[number] = out, subprocess.Popen(
            [*words, "--iters", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"))
    for number, (out, p) in processes.items():
        log, end = out / "ect-digits-000/log.jsonl", time.time() + 60
        while not log.exists() and p.poll() is None and time.time() < end:
            time.sleep(0.02)
        p.send_signal(number)
    for number, (out, p) in processes.items():
        stdout, stderr = p.communicate(timeout=60)
        run = out / "ect-digits-000"
        assert p.returncode == 128 + number and "Traceback" not in stderr, stderr
        it = ckpt(run)["it"]
        assert f"after step {it}, saved" in stdout
    train("ect", "--resume", str(run), "--iters", str(it + 2))
    _, whole = train("ect", *how, "--iters", str(it + 2))
    assert same(ckpt(whole), ckpt(run))


# ---- not finite ----------------------------------------------------------------------------------
def nan_loss(*steps):
    def change(it, net, loss, stats):
        if it in steps:
            stats["loss"][1] = math.nan
            return loss * math.nan, stats
    return change


def infinite_loss(it, net, loss, stats):
    stats["loss"][1] = math.inf if it == 3 else 1.0


def nan_gradient(it, net, loss, stats):
    if it == 3:                                                           # the slope of sqrt at 0, times 0
        return loss + (next(net.parameters()).sum() * 0).sqrt(), stats


@pytest.mark.parametrize("change, what", [
    (nan_loss(3), "loss"), (infinite_loss, "loss"), (nan_gradient, "gradient")])
def test_not_finite_stops_before_anything_is_saved(change, what, train, wrap_loss, handlers, tmp_path, capsys):
    """A ruined network saved over a good one, and no trace of where it began."""
    levels = []
    wrap_loss(lambda *a: levels.append(a[-1]["t"].flatten()) or change(*a))
    with pytest.raises(SystemExit) as info:
        train("ect", "--seed", "5")
    run = tmp_path / "runs/ect-digits-000"
    assert ckpt(run)["it"] == 2 and not (run / "ckpt.tmp").exists() and len(lines(run / "log.jsonl")) == 1
    t = levels[3]
    low, high, n = (t[1], t[1], 1) if what == "loss" else (t.min(), t.max(), 8)
    err = next(line for line in capsys.readouterr().err.split("\n") if "error: " in line).split("\r")[-1]
    assert info.value.code == 1 and err.startswith(f"error: step 3, seed 5, rank 0: {what} not finite, noise levels "
                                                   f"{low:.4g} .. {high:.4g} ({n} of 8 images)")
    assert {s: signal.getsignal(s) for s in handlers} == handlers


def test_max_skips_skips_the_update_and_no_more(train, wrap_loss, capsys, tmp_path):
    """Weights, averages or optimiser touched by a skipped step; NaN in the log; more skips than allowed."""
    wrap_loss(nan_loss(2))
    _, run = train("ect", *"--max-skips 1 --iters 6 --log-every 3 --save-every 1 --keep".split())
    before, skipped, after = (ckpt(run, f"ckpt-000000{it}.pt") for it in (2, 3, 4))
    assert same(before, skipped | dict(it=2)) and not equal(skipped["net"], after["net"])
    assert "step 2, seed 0" in capsys.readouterr().err
    assert all(math.isfinite(v) for r in lines(run / "log.jsonl") for v in r.values())
    wrap_loss(nan_loss(3))                                                # on top of the one at step 2
    with pytest.raises(SystemExit, match="1"):
        train("ect", "--max-skips", "1")
    assert "error: step 3" in capsys.readouterr().err


@each_script
def test_a_last_update_that_ruins_the_weights_is_not_saved(script, train, tmp_path, monkeypatch, capsys):
    """Loss and gradient are finite, and what the optimiser makes of them is not."""
    sync = Run.sync

    def ruin(self, opt, it):
        opt.param_groups[0]["lr"] = 1e38 if it == 3 else opt.param_groups[0]["lr"]
        return sync(self, opt, it)
    monkeypatch.setattr(Run, "sync", ruin)
    with pytest.raises(SystemExit, match="1"):
        train(script)
    assert "error: step 4: the weights" in capsys.readouterr().err
    run = max((tmp_path / "runs").iterdir(), key=os.path.getmtime)
    assert ckpt(run)["it"] == 2 and not (run / "ckpt.tmp").exists()


def test_a_run_whose_steps_were_all_skipped_is_no_success(train, wrap_loss, capsys):
    """Exit 0, and weights that nothing changed."""
    wrap_loss(lambda it, net, loss, stats: (loss * math.nan, stats))
    with pytest.raises(SystemExit, match="1"):
        train("ect", "--max-skips", "99")
    assert "error: step 4: no step was finite" in capsys.readouterr().err


def test_images_that_are_not_finite_are_no_pictures(train, capsys, tmp_path):
    """NaN in the weights: a black picture and a distance of it."""
    _, run = train("ect", "--iters", "1")
    state = ckpt(run)
    next(iter(state["ema"].values())).fill_(math.nan)
    torch.save(state, run / "ckpt.pt")
    for again in (lambda: sample.main([str(run), "--out", str(tmp_path / "x.png"), "--device", "cpu"]),
                  lambda: train("ect", "--resume", str(run))):
        capsys.readouterr()
        with pytest.raises(SystemExit) as e:
            again()
        assert e.value.code == 1 and "not finite" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


# ---- seeds ---------------------------------------------------------------------------------------
def test_seeds_differ_in_every_respect():
    """Noise used again by another step, part, rank or stream, or by the dropout mask."""
    def draw(seed=0, rank=0, **where):
        run.args.seed, run.rank = seed, rank
        run.seed(**dict(dict(it=0, part=0, stream=0), **where))
        return tuple(torch.randint(1 << 40, (2,)).tolist())
    run = Run(tiny(), ect.__file__)
    cube = [draw(seed, rank, it=it, part=part, stream=stream) for seed in range(3) for rank in range(3)
            for it in range(4) for part in range(3) for stream in range(2)]
    assert len(set(cube)) == len(cube) and draw() == draw()
    assert draw(rank=0, it=-1) == draw(rank=1, it=-1) != draw(rank=1, it=-2)


def test_masks_have_a_stream_of_their_own_that_can_be_replayed(train, monkeypatch):
    """Two calls that drop different units; masks made of the numbers of the noise, or used twice."""
    seen = []
    def loss_fn(net, x0, y, it, args, reseed, real=ect.loss_fn):
        seen.append(tuple(torch.randn(4).tolist()))
        for _ in range(2):
            reseed()
            seen.append(tuple(torch.randn(4).tolist()))
        return real(net, x0, y, it, args, reseed)
    monkeypatch.setattr(ect, "loss_fn", loss_fn)
    train("ect", "--iters", "2", "--accum", "2")
    assert seen[1::3] == seen[2::3] and len(set(seen)) == 8


def test_runs_of_one_seed_are_equal_and_of_two_are_not(train):
    a, b, c = (train("ect", "--seed", seed, "--dropout", "0.2", "--iters", "2")[1] for seed in "112")
    assert same(ckpt(a), ckpt(b)) and not equal(weights(a), weights(c))


def test_parts_of_a_batch_average_their_gradients(train, monkeypatch):
    """The sum instead of the mean, one noise for all parts, the same images in each."""
    seen = []
    def sync(self, opt, it, real=Run.sync):
        ok = real(self, opt, it)
        seen.append([p.grad.clone() for g in opt.param_groups for p in g["params"]])
        return ok
    monkeypatch.setattr(Run, "sync", sync)
    argv = ["--accum", "2", "--batch", "8", "--iters", "1", "--seed", "3"]
    train("ect", *argv)

    args, data = tiny(*argv), load("digits")
    run = Run(args, ect.__file__)
    run.seed(-1)
    net = run.place(EDM(backbone(args, data), args.sd))
    parts, images = [], []
    for part in range(2):
        run.seed(0, part)
        x0, y = run.batch(data, 0, part)
        loss, stats = ect.loss_fn(net, x0, y, 0, args, lambda: None)
        parts.append(torch.autograd.grad(loss, list(net.parameters())))
        images.append((x0, stats["t"]))
    assert all(len(v) == 4 for v in images[0]) and not any(torch.equal(*v) for v in zip(*images))
    for got, a, b in zip(seen[0], *parts, strict=True):
        assert torch.allclose(got, (a + b) / 2, atol=1e-6)
    whole = data.batch(0, 8, seed=3)[0]
    assert torch.equal(torch.cat([x for x, _ in images]), whole) and y is None, "no labels without --cond"


def test_noise_of_an_image_is_its_own():
    """Noise that depends on the batch, on k or on the global generator: so would FID."""
    shape = (3, 5, 5)                                                     # 75: randn works in blocks of 16
    whole = noise_of(range(6), 3, shape, "cpu")
    assert whole.shape == (3, 6, *shape) and whole.dtype == torch.float64
    torch.manual_seed(1)
    assert torch.equal(noise_of([4, 1], 3, shape, "cpu"), whole[:, [4, 1]])
    assert torch.equal(noise_of(torch.tensor([2]), 1, shape, "cpu"), whole[:1, 2:3])
    assert torch.equal(noise_of(range(6), 2, shape, "cpu"), whole[:2])
    other = noise_of(range(6), 1, shape, "cpu", seed=1)[0]
    assert not any(torch.equal(a, b) for a in other for b in whole[0]), "seed + i would shift them by one"
    assert len({float(v) for v in whole.flatten()}) == whole.numel(), "slices or images that repeat"
    wide = noise_of(range(200), 2, shape, "cpu")
    assert abs(wide.mean()) < 0.03 and abs(wide.std() - 1) < 0.02


def test_the_teacher_computes_as_its_method_does(train):
    """--no-tf32, --bf16 or --checkpoint-acts for the student alone."""
    _, run = train("ect", "--teacher", "train", "--teacher-iters", "1", "--iters", "1", "--no-tf32", "--bf16",
                   "--checkpoint-acts")
    its = json.loads((run.parent / "teacher-digits-000/config.json").read_text())
    assert its["tf32"] is False and its["bf16"] is True and its["checkpoint_acts"] is True


@pytest.mark.parametrize("script, warns", [("ect", True), ("ict", True), ("ct", False), ("scm", False)])
def test_bfloat16_at_narrow_gaps_is_said_to_cost_the_gradient(script, warns, train, capsys):
    """A run that learns from noise, and does not say so."""
    train(script, "--iters", "1", "--bf16")
    assert ("direction of the gradient" in capsys.readouterr().out) is warns
    train(script, "--iters", "1")
    assert "direction of the gradient" not in capsys.readouterr().out


@pytest.mark.parametrize("script", ["ect", "ict"])
def test_float16(script, train, monkeypatch, capsys, tmp_path):
    """A flag that does nothing, or gives way to another without a word."""
    method, seen = importlib.import_module(script), []
    loss_fn = method.loss_fn
    monkeypatch.setattr(method, "loss_fn", lambda net, *a: (seen.append(net.dtype), loss_fn(net, *a))[1])
    metrics, _ = train(script, "--iters", "2", "--fp16")
    assert set(seen) == {torch.float16} and all(math.isfinite(v) for k, v in metrics.items() if k != "run")
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        train(script, "--fp16", "--bf16")
    err = capsys.readouterr().err
    assert e.value.code == 2 and "two precisions" in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_the_end_says_where_the_time_went(train, capsys, monkeypatch):
    """Evaluation that counts as training; the minutes of a teacher that count as its student's start."""
    now, loss_fn, evaluate = [0.0], teachers.loss_fn, evaluation.evaluate

    def takes(seconds):
        now[0] += seconds
    monkeypatch.setattr(runs, "clock", lambda: now[0])
    monkeypatch.setattr(teachers, "loss_fn", lambda *a: (takes(2), loss_fn(*a))[1])
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: (takes(1), evaluate(*a, **k))[1])
    train("ect", "--teacher", "train", "--teacher-iters", "2", "--iters", "4", "--save-every", "2")
    shares = [[float(v) for v in re.findall(r"([\d.]+)%", line)] for line in capsys.readouterr().out.splitlines()
              if "of which evaluation" in line]
    (teacher, *_), (student, saves, start) = shares
    assert teacher == 20 and student == 100 and saves == start == 0, shares

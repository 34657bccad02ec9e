"""The page of python -m common.compare, of run folders made by hand and of a real one; reference.json."""
import dataclasses
import hashlib
import html.parser
import importlib
import io
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import METHODS, lines
from PIL import Image

from common import compare, evaluate
from common.data import load
from common.evaluate import picture, recipe, verdict
from common.flags import parse
from tests.bench import reference

FLAGS = dict(dataset="digits", net="ddpmpp", ch=32, mult=[1, 2], batch=100, iters=200, seed=0, t_mid=1.2, lr=1e-3, mode="x")


def run_folder(path, fd=0.5, seed=0, n=100, mode="8x8", data="d" * 64, **flags):
    """A finished run: two log lines, figures in 1 and 2 steps and of the teacher, two grids."""
    about = dict(script="ect", data_sha256=data, images=[60, 1, 8, 8], parameters=750_000, device="cpu", torch="2")
    (path / "samples").mkdir(parents=True)
    (path / "source").mkdir()
    (path / "source/ect.py").write_text("x\n" * 123)
    (path / "config.json").write_text(json.dumps(FLAGS | dict(seed=seed, about=about) | flags))
    log = [dict(it=it, sec=0.3 * it, loss=2.5 + it / 200 + seed, gap=0.1, loss_t0=1.0, loss_t3=2.0, img_s=50, mem_gb=1.25)
           for it in (100, 200)]
    (path / "log.jsonl").write_text("".join(json.dumps(s) + "\n" for s in log))
    kinds = [(0, "teacher", 18, fd / 2), *((it, "ema", k, fd / k + 100 / it) for it in (100, 200) for k in (1, 2))]
    text = [dict(it=it, metric=m, value=v if m == "fd_pixels" else 0.75, n=n, net=net, steps=k, mode=mode,
                 t_mid=1.2 if k == 2 else None)
            for it, net, k, v in kinds for m in ("fd_pixels", "precision", "recall", "density", "coverage")]
    text.reverse()                                        # as after a --resume that evaluates an older step again
    (path / "eval.jsonl").write_text("".join(json.dumps(s) + "\n" for s in text))
    images = load("digits").images[:144]
    for name in ("0000100_1step", "0000200_1step", "0000200_2step"):
        picture(255 - images if "0000100" in name else images).save(path / f"samples/{name}.png")
    return str(path)


def tables(text):
    """All tables of a page in Markdown: [[row of cells]]."""
    found = re.findall(r"((?:^\|.*\n)+)", text, re.M)
    return [[[c.strip() for c in row.strip("|").split(" | ")] for row in t.splitlines() if "---" not in row] for t in found]


def compared(tmp_path, *runs):
    compare.main([*runs, "--out", str(tmp_path / "page/report.html")])
    return (tmp_path / "page/report.html").read_text(), tables((tmp_path / "page/report.md").read_text())


def test_figures_and_costs_of_two_runs(tmp_path):
    """Figures of an earlier step, or of one step under two; a teacher's as the run's own; seconds of one part only."""
    a, b = run_folder(tmp_path / "a", 0.5), run_folder(tmp_path / "b", 0.25, lr=2e-3)
    _, (figures, costs) = compared(tmp_path, a, b)
    assert figures[0][:5] == ["run", "teacher", "1 step", "2 steps", "precision, teacher"]
    assert figures[1][:5] == ["a", "0.250", "1.000", "0.750 at 1.2", "0.750"]
    assert figures[2][:5] == ["b", "0.125", "0.750", "0.625 at 1.2", "0.750"]
    assert costs[1] == ["a", "ect x", "ddpmpp 32 x 1,2", "0.75", "200", "0.02", "1.0", "50", "1.25", "123", ""]


def test_a_resumed_run_has_the_minutes_of_all_its_parts(train, tmp_path):
    """`sec` in log.jsonl would count from 0 after each resume."""
    _, run = train("ect", "--iters", "2")
    (line, *_), text = lines(run / "log.jsonl"), (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(text.replace(f'"sec": {line["sec"]}', '"sec": 5000.0'))
    train("ect", "--resume", str(run), "--iters", "4")
    assert [s["it"] for s in lines(run / "log.jsonl")] == [2, 4] and lines(run / "log.jsonl")[1]["sec"] > 5000


def test_other_data_numbers_and_modes_have_tables_of_their_own(tmp_path):
    """FD of 100 images beside FD of 200, an FID beside an FD, digits beside letters."""
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", n=200), run_folder(tmp_path / "c", mode="4x4"),
            run_folder(tmp_path / "d", data="e" * 64)]
    page, found = compared(tmp_path, *runs)
    assert [[row[0] for row in t[1:]] for t in found if t[0][1] == "teacher"] == [["a"], ["b"], ["d"]], "4x4 is unknown"
    assert page.count("<h2>Data: digits, 60 images 1 x 8 x 8</h2>") == 2


def test_seeds_have_a_mean_and_a_spread(tmp_path):
    """Runs of other flags averaged, or one run, or one seed, twice; the population's standard deviation."""
    runs = [run_folder(tmp_path / str(seed), 0.5 + 0.1 * seed, seed) for seed in range(3)]
    runs += [run_folder(tmp_path / name, 9.0, 3, **flags) for name, flags in dict(
        lr=dict(lr=0.5), iters=dict(iters=100), t_mid=dict(t_mid=0.3), scratch=dict(teacher="none")).items()]
    runs += [run_folder(tmp_path / "again", 9.0, 0), runs[0] + "/", str(tmp_path / "0/../0")]
    _, found = compared(tmp_path, *runs)
    (seeds,) = [t for t in found if t[0][:2] == ["method", "seeds"]]
    assert seeds == [["method", "seeds", "teacher", "1 step", "2 steps"],
                     ["ect x", "0, 1, 2", "0.300 ± 0.050", "1.100 ± 0.100", "0.800 ± 0.050"]]


def test_runs_of_one_name_are_told_apart(tmp_path):
    """runs/a/ect-digits-000 and runs/b/ect-digits-000: one row, or one strip, for both."""
    a, b = run_folder(tmp_path / "a/ect-digits-000"), run_folder(tmp_path / "b/ect-digits-000", 0.25)
    page, found = compared(tmp_path, a, b)
    assert [row[0] for row in found[0][1:]] == [a, b] and page.count("<img") == 2 + 2 * 2, "curves, one log of both, their strips"


class Page(html.parser.HTMLParser):
    """What a page loads or runs."""
    def __init__(self, text):
        super().__init__()
        self.found, self.images = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [tag] if tag in ("script", "link", "iframe") else []
        for k, v in attributes:
            (self.images if tag == "img" and k == "src" else self.found).extend([v] if k in ("src", "href") or k[:2] == "on" else [])


def test_the_page_needs_nothing_beside_itself(tmp_path):
    """A script or picture from outside; a name that is markup."""
    a = run_folder(tmp_path / "<script>alert(1)</script>".replace("/", "_"), dataset="<img src=x>")
    page = Page(compared(tmp_path, a)[0])
    assert page.found == [] and all(s.startswith("data:image/png;base64,") for s in page.images)
    assert len(page.images) == 2 + 2, "curves, log, one strip a number of steps"


def test_strips_show_the_newest_grid(tmp_path):
    """The first images of the last grid, not of the one before; more than the eight that fit beside each other."""
    a = run_folder(tmp_path / "a")
    run = compare.read(a)
    assert run.strips.keys() == {1, 2}
    strip = Image.open(io.BytesIO(run.strips[1])).convert("L")
    assert strip.size == (8 * 9 - 1, 8)                   # of 144 images, twelve to a row
    for i, image in enumerate(load("digits").images[:8, 0]):
        assert (np.asarray(strip)[:, 9 * i:9 * i + 8] == image.numpy()).all()


def test_what_a_folder_lacks_stands_in_its_row(tmp_path, capsys):
    """One bad folder ends the comparison of the others."""
    good, torn, bare = (run_folder(tmp_path / name) for name in ("good", "torn", "bare"))
    for name in ("log", "eval"):
        with open(tmp_path / f"torn/{name}.jsonl", "a") as f:
            f.write('{"it": 1, "va')
        (tmp_path / f"bare/{name}.jsonl").unlink()
    (tmp_path / "torn/samples/0000200_1step.png").write_bytes(b"no picture")
    late = run_folder(tmp_path / "late")
    text = (tmp_path / "late/eval.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "late/eval.jsonl").write_text("".join(s for s in text if '"it": 200' not in s))
    shutil.rmtree(tmp_path / "bare/samples")
    half = run_folder(tmp_path / "half", iters=500)
    wrong = run_folder(tmp_path / "wrong", batch="many")
    (tmp_path / "none").mkdir()
    capsys.readouterr()
    page, found = compared(tmp_path, good, torn, bare, half, late, wrong, *(str(tmp_path / s) for s in ("none", "missing")))
    out, err = capsys.readouterr()
    assert err == "" and "; 3 not compared" in out
    figures = {row[0]: row[2] for row in found[0][1:]}
    assert figures["good"] == "1.000" and figures["late"] == "1.500 after 100 steps"
    assert figures["half"] == "1.000 after 200 steps"
    notes = {row[0]: row[-1] for row in found[-1][1:]}
    assert notes == dict(good="", torn="2 torn lines left out; 0000200_1step.png is damaged", late="",
                         bare="unfinished: 0 of 200 steps; no log; no figures", half="unfinished: 200 of 500 steps")
    said = re.search("Not compared: (.*?)</p>", page)[1]
    assert "none is no run folder" in said and "missing is no run folder" in said and "no batch" in said


def test_nothing_to_compare_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        compare.main([str(tmp_path), "--out", str(tmp_path / "x.html")])
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and list(tmp_path.iterdir()) == []
    a = run_folder(tmp_path / "a")
    with pytest.raises(SystemExit) as e:
        compare.main([a, "--out", str(tmp_path / "a/config.json/x.html")])
    assert e.value.code == 2
    for name in ("", ".", "report.txt"):
        with pytest.raises(SystemExit) as e:
            compare.main([a, "--out", name])
        assert e.value.code == 2 and "ends in .html" in capsys.readouterr().err


HOSTILE = {
    "a log without steps": lambda p: (p / "log.jsonl").write_text('{"loss": 1.0}\n{"it": true, "sec": 1.0, "loss": 1.0}\n'),
    "a pipe": lambda p: os.mkfifo(p / "samples/0000300_1step.png"),
    "many scalars": lambda p: (p / "log.jsonl").write_text(json.dumps(
        dict(it=1, sec=1.0, loss=1.0) | {f"k{i}": i for i in range(500)}) + "\n"),
    "names": lambda p: edit(p, "config.json", '"mode": "x"', '"mode": "$\\\\frac$ \\ud800 <b>|\\n# x"'),
    "names in the log": lambda p: edit(p, "log.jsonl", '"gap"', '"$\\\\frac \\ud800\\n<script>"'),
    "huge numbers": lambda p: [edit(p, "config.json", f'"{k}": {v}', f'"{k}": 1{"0" * 400}')
                               for k, v in (("batch", 100), ("parameters", 750000), ("images", "[60"))],
    "huge steps": lambda p: edit(p, "eval.jsonl", '"it": 200', f'"it": 1{"0" * 400}'),
    "a script elsewhere": lambda p: edit(p, "config.json", '"script": "ect"', '"script": "/etc/passwd"'),
    "no script": lambda p: edit(p, "config.json", '"script": "ect"', '"script": ""'),
    "booleans": lambda p: edit(p, "eval.jsonl", '"value": 0.75', '"value": true'),
    "other shapes": lambda p: edit(p, "config.json", "[60, 1, 8, 8]", "[60, 1, 8000000, 3]"),
    "a metric": lambda p: edit(p, "eval.jsonl", '"coverage"', '"c\\n\\n# <img onerror=x>"'),
}


def edit(path, name, old, new):
    text = (path / name).read_text()
    assert old in text
    (path / name).write_text(text.replace(old, new if old != "[60" else f"[{10**400}"))


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_folders(tmp_path, case, monkeypatch):
    """A traceback, a hang, a page that is not there, markup of the folder's own; the good run is compared anyway."""
    good, bad = run_folder(tmp_path / "good"), run_folder(tmp_path / "bad", data="e" * 64)
    HOSTILE[case](tmp_path / "bad")
    page, found = compared(tmp_path, good, bad)
    assert found[0][1][:3] == ["good", "0.250", "1.000"] and Page(page).found == []
    text = (tmp_path / "page/report.md").read_text()
    assert not re.search("^# x|^# <img|[^\\\\]<", text, re.M) and "passwd" not in page.split("Not compared")[0]


def test_curves_show_figures_against_minutes_and_images(tmp_path, monkeypatch):
    """Steps for minutes, minutes for images; a teacher's figure in the curve of its student; labels that are alike."""
    drawn = []
    monkeypatch.setattr(compare, "png", lambda figure: drawn.append([
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()}
        for ax in figure.axes]) or b"")
    runs = [compare.read(run_folder(tmp_path / name, lr=lr)) for name, lr in (("a", 1.0), ("b", 2.0))]
    list(compare.progress(runs))
    ((minutes, images),) = drawn
    assert minutes.keys() == images.keys() == {f"{name}, {k}" for name in "ab" for k in ("1 step", "2 steps")}
    assert minutes["a, 1 step"] == ([0.5, 1.0], [1.5, 1.0]) and images["b, 2 steps"] == ([0.01, 0.02], [1.25, 0.75])
    compare.logs(runs[:1])
    loss, levels, gap = drawn[1]
    assert loss["seed 0"] == ([100, 200], [3.0, 3.5]) and gap["seed 0"][1] == [0.1, 0.1]
    assert levels.keys() == {"< .01", ".22"}


@pytest.mark.skipif(not (CHROME := shutil.which("chromium") or shutil.which("google-chrome")), reason="no Chromium here")
def test_a_browser_shows_it(tmp_path):
    """A page that is text to a browser, or wider than its window."""
    a = run_folder(tmp_path / "a")
    compared(tmp_path, a)
    base = [CHROME, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/chrome"]
    url = f"file://{tmp_path}/page/report.html"
    subprocess.run([*base, "--window-size=1200,900", f"--screenshot={tmp_path}/x.png", url], capture_output=True, timeout=120)
    colours = Image.open(tmp_path / "x.png").convert("RGB").getcolors(2**24)
    assert len(colours) > 100, "text, tables and curves"
    dom = subprocess.run([*base, "--dump-dom", url], capture_output=True, text=True, timeout=120).stdout
    assert dom.count("<table>") == 3 and "<h1>a</h1>" in dom


def test_a_real_run_and_its_last_line(train, tmp_path, capsys, monkeypatch):
    """A log or a config.json that only the tests write."""
    _, run = train("ect", "--log-every", "1")
    out = capsys.readouterr().out
    assert f"python -m common.compare {run}" in out and "track" not in out
    _, (figures, costs) = compared(tmp_path, str(run))
    assert figures[0][1:3] == ["1 step", "2 steps"] and float(figures[1][1]) > 0
    assert costs[1][4] == "4" and float(costs[1][3]) > 0 and int(costs[1][9]) > 200 and costs[1][-1] == ""
    assert compare.read(run).strips.keys() == {1, 2}


# ---- is this loss normal? ------------------------------------------------------------------------
@pytest.fixture
def known(tmp_path, monkeypatch):
    """A reference.json of seeds 0 and 1."""
    monkeypatch.setattr(evaluate, "REFERENCE", tmp_path / "reference.json")
    monkeypatch.setattr(reference, "REFERENCE", tmp_path / "reference.json")
    reference.main([run_folder(tmp_path / "r/0", 1.0, 0), run_folder(tmp_path / "r/1", 1.2, 1)])
    return tmp_path


def test_a_reference_keeps_the_range_of_its_seeds(known):
    (entry,) = json.loads((known / "reference.json").read_text()).values()
    assert entry["seeds"] == "0, 1" and entry["values"] == {
        "100 loss": [3.0, 4.0], "200 loss": [3.5, 4.5],
        "100 FD in 1 step, 100 images": [2.0, 2.2], "100 FD in 2 steps, 100 images": [1.5, 1.6],
        "200 FD in 1 step, 100 images": [1.5, 1.7], "200 FD in 2 steps, 100 images": [1.0, 1.1]}


@pytest.mark.parametrize("fd, seed, words", [(1.1, 0, "on track"), (3.0, 0, "off track"), (0.1, 0, "on track"), (1.1, 5, "off track"),
                                             (1.1, -2, "off track")])
def test_on_and_off_track(known, fd, seed, words):
    """A figure may be better than the reference; a loss may not: it can be low because nothing is learned."""
    run = run_folder(known / "new", fd, seed)
    text = verdict(known / "new")
    assert text.startswith(f"{words} after 200 steps: loss {3.5 + seed:.3f} (3.500 .. 4.500)") and "in 2 steps" in text
    assert f"<p>new is {text}</p>" in compared(known, run)[0]


def test_other_flags_have_no_reference(known):
    """A run of twice the length or another learning rate measured by the preset's."""
    for name, change in dict(lr=dict(lr=1.0), data=dict(data="e" * 64), iters=dict(iters=400), t_mid=dict(t_mid=0.3),
                             log_every=dict(log_every=1), teacher=dict(teacher="none")).items():
        run_folder(known / name, **change)
        assert verdict(known / name) == ""


def test_a_new_flag_that_is_off_keeps_the_reference(known):
    """A reference.json to be made anew with each flag; or one for runs that the flag sets apart."""
    for name, change, has in (("off", dict(tf32=True, checkpoint_acts=False, lora=0), True), ("lora", dict(lora=4), False),
                              ("same", dict(tf32=False, checkpoint_acts=True), True)):
        run_folder(known / name, **change)
        assert bool(verdict(known / name)) is has, name
    run_folder(known / "seed", 1.0, 1, out="elsewhere", grid=4)
    assert verdict(known / "seed").startswith("on track")
    run_folder(known / "n", 1.0, n=10)
    assert verdict(known / "n").startswith("on track after 200 steps: loss") and "FD" not in verdict(known / "n")


def test_a_loss_that_is_no_number_is_off_track(known):
    run_folder(known / "nan")
    text = (known / "nan/log.jsonl").read_text()
    (known / "nan/log.jsonl").write_text(text.replace('"loss": 3.5', '"loss": NaN'))
    assert verdict(known / "nan").startswith("off track")


def test_a_run_that_was_cut_is_compared_at_its_own_step(known):
    run_folder(known / "cut")
    for name in ("log", "eval"):
        text = (known / f"cut/{name}.jsonl").read_text().splitlines(keepends=True)
        (known / f"cut/{name}.jsonl").write_text("".join(s for s in text if '"it": 200' not in s))
    assert "on track after 100 steps" in verdict(known / "cut")


@pytest.mark.parametrize("method", METHODS)
def test_the_digits_have_a_reference(method):
    """A flag added, or a preset changed, and nobody's run has a reference any more: make it anew."""
    m = importlib.import_module(method)
    config = dataclasses.asdict(parse(m.Args, m.PRESETS, []))
    config |= dict(N=18) if method == "cd" else {}        # which it settles itself
    config |= dict(about=dict(script=method, data_sha256=load("digits").sha256))
    key = hashlib.sha256(recipe(json.loads(json.dumps(config))).encode()).hexdigest()
    assert key in json.loads(evaluate.REFERENCE.read_text()), "python -m tests.bench.reference"

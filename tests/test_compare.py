"""The page of python -m common.compare, of run folders made by hand and of a real one; reference.json."""
import dataclasses
import hashlib
import html.parser
import importlib
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import METHODS
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
    log = [dict(it=it, sec=60.0, loss=3.0 + seed, gap=0.1, loss_t0=1.0, loss_t3=2.0, img_s=50, mem_gb=1.25) for it in (100, 200)]
    (path / "log.jsonl").write_text("".join(json.dumps(s) + "\n" for s in log))
    kinds = [(0, "teacher", 18, fd / 2), *((it, "ema", k, fd / k + 100 / it) for it in (100, 200) for k in (1, 2))]
    text = [dict(it=it, metric=m, value=v if m == "fd_pixels" else 0.75, n=n, net=net, steps=k, t_mid=None, mode=mode)
            for it, net, k, v in kinds for m in ("fd_pixels", "precision", "recall", "density", "coverage")]
    (path / "eval.jsonl").write_text("".join(json.dumps(s) + "\n" for s in text))
    images = load("digits").images[:16]
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
    assert figures[0][:6] == ["run", "t_mid", "teacher", "1 step", "2 steps", "precision, teacher"]
    assert figures[1][:6] == ["a", "1.2", "0.250", "1.000", "0.750", "0.750"]
    assert figures[2][:6] == ["b", "1.2", "0.125", "0.750", "0.625", "0.750"]
    assert costs[1] == ["a", "ect x", "ddpmpp 32 x 1,2", "0.75", "200", "0.02", "1.0", "50", "1.25", "123", ""]


def test_a_resumed_run_has_the_minutes_of_all_its_parts(tmp_path):
    """`sec` in log.jsonl counts from 0 after each resume."""
    a = run_folder(tmp_path / "a")
    lines = [dict(it=it, sec=sec, loss=1.0) for it, sec in ((50, 60), (100, 120), (150, 30), (200, 60))]
    (tmp_path / "a/log.jsonl").write_text("".join(json.dumps(s) + "\n" for s in lines))
    assert [s["sec"] for s in compare.read(a).log] == [60, 120, 150, 180]


def test_other_data_numbers_and_modes_have_tables_of_their_own(tmp_path):
    """FD of 100 images beside FD of 200, an FID beside an FD, digits beside letters."""
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", n=200), run_folder(tmp_path / "c", mode="4x4"),
            run_folder(tmp_path / "d", data="e" * 64)]
    page, found = compared(tmp_path, *runs)
    assert [[row[0] for row in t[1:]] for t in found if t[0][1] == "t_mid"] == [["a"], ["b"], ["c"], ["d"]]
    assert page.count("<h2>Data: digits, 60 images 1 x 8 x 8</h2>") == 2


def test_seeds_have_a_mean_and_a_spread(tmp_path):
    """Runs of other flags averaged; the spread of one; the population's standard deviation."""
    runs = [run_folder(tmp_path / str(seed), 0.5 + 0.1 * seed, seed) for seed in range(3)]
    runs.append(run_folder(tmp_path / "other", 9.0, 3, lr=0.5))
    _, found = compared(tmp_path, *runs)
    (seeds,) = [t for t in found if t[0][:2] == ["method", "runs"]]
    assert seeds == [["method", "runs", "teacher", "1 step", "2 steps"],
                     ["ect x", "3", "0.300 ± 0.050", "1.100 ± 0.100", "0.800 ± 0.050"]]


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
    shown = compare.strips(compare.read(a))
    assert shown.keys() == {1, 2}
    strip = Image.open(io.BytesIO(shown[1])).convert("L")
    assert strip.size == (4 * 9 - 1, 8)                   # 16 images, four to a row
    for i, image in enumerate(load("digits").images[:4, 0]):
        assert (np.asarray(strip)[:, 9 * i:9 * i + 8] == image.numpy()).all()


def test_what_a_folder_lacks_stands_in_its_row(tmp_path, capsys):
    """One bad folder ends the comparison of the others."""
    good, torn, bare = (run_folder(tmp_path / name) for name in ("good", "torn", "bare"))
    for name in ("log", "eval"):
        with open(tmp_path / f"torn/{name}.jsonl", "a") as f:
            f.write('{"it": 1, "va')
        (tmp_path / f"bare/{name}.jsonl").unlink()
    (tmp_path / "torn/samples/0000200_1step.png").write_bytes(b"no picture")
    shutil.rmtree(tmp_path / "bare/samples")
    half = run_folder(tmp_path / "half", iters=500)
    wrong = run_folder(tmp_path / "wrong", batch="many")
    (tmp_path / "none").mkdir()
    page, found = compared(tmp_path, good, torn, bare, half, wrong, str(tmp_path / "none"), str(tmp_path / "missing"))
    notes = {row[0]: row[-1] for row in found[-1][1:]}
    assert notes == dict(good="", torn="2 torn lines left out", bare="unfinished: 0 of 200 steps; no log; no figures",
                         half="unfinished: 200 of 500 steps")
    said = re.search("Not compared: (.*?)</p>", page)[1]
    assert "none is no run folder" in said and "missing is no run folder" in said and "no batch" in said


def test_nothing_to_compare_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        compare.main([str(tmp_path), "--out", str(tmp_path / "x.html")])
    assert e.value.code == 2 and "none of these is a run folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    a = run_folder(tmp_path / "a")
    with pytest.raises(SystemExit) as e:
        compare.main([a, "--out", str(tmp_path / "a/config.json/x.html")])
    assert e.value.code == 2


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
    assert figures[0][2:4] == ["1 step", "2 steps"] and float(figures[1][2]) > 0
    assert costs[1][4] == "4" and float(costs[1][3]) > 0 and int(costs[1][9]) > 200 and costs[1][-1] == ""
    assert compare.strips(compare.read(run)).keys() == {1, 2}


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
    assert entry["seeds"] == "0, 1" and entry["loss"] == {"100": [3.0, 4.0], "200": [3.0, 4.0]}
    assert entry["figures"]["200 fd_pixels 1"] == [1.5, 1.7] and entry["figures"]["200 fd_pixels 2"] == [1.0, 1.1]


@pytest.mark.parametrize("fd, seed, words", [(1.1, 0, "on track"), (3.0, 0, "off track"), (0.1, 0, "on track"), (1.1, 5, "off track"),
                                             (1.1, -2, "off track")])
def test_on_and_off_track(known, fd, seed, words):
    """A figure may be better than the reference; a loss may not: it can be low because nothing is learned."""
    run = run_folder(known / "new", fd, seed)
    text = verdict(known / "new")
    assert text.startswith(words) and f"loss after 200 steps {3 + seed:.3f} (3.000 .. 4.000)" in text and "in 2 steps" in text
    assert f"<p>new is {text}</p>" in compared(known, run)[0]


def test_other_flags_have_no_reference(known):
    """A run of twice the length or another learning rate measured by the preset's."""
    for name, change in dict(lr=dict(lr=1.0), data=dict(data="e" * 64)).items():
        run_folder(known / name, **change)
        assert verdict(known / name) == ""
    run_folder(known / "seed", 1.0, 1, out="elsewhere", grid=4)
    assert verdict(known / "seed").startswith("on track")


def test_a_run_that_was_cut_is_compared_at_its_own_step(known):
    run_folder(known / "cut")
    for name in ("log", "eval"):
        text = (known / f"cut/{name}.jsonl").read_text().splitlines(keepends=True)
        (known / f"cut/{name}.jsonl").write_text("".join(s for s in text if '"it": 200' not in s))
    assert "loss after 100 steps" in verdict(known / "cut")


@pytest.mark.parametrize("method", METHODS)
def test_the_digits_have_a_reference(method):
    """A flag added, or a preset changed, and nobody's run has a reference any more: make it anew."""
    m = importlib.import_module(method)
    config = dataclasses.asdict(parse(m.Args, m.PRESETS, []))
    config |= dict(about=dict(script=method, data_sha256=load("digits").sha256))
    key = hashlib.sha256(recipe(json.loads(json.dumps(config))).encode()).hexdigest()
    assert key in json.loads(evaluate.REFERENCE.read_text()), "python -m tests.bench.reference"

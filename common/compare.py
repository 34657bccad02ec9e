"""python -m common.compare RUN...

One page that shows runs side by side: report.html, which needs nothing beside itself, its tables in report.md. What a
folder lacks stands in its row, and the rest is compared. Runs of other data, and figures of another number of images or
another mode, have tables of their own. Only the run folders are read; no method is known here."""
import base64
import contextlib
import html
import io
import os
import re
import statistics
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
from PIL import Image

from common.evaluate import TITLES, figures, lines, recipe, reference, verdict
from common.flags import BadInput, Parser, brief, config_of, printable, say

matplotlib.use("Agg")                                     # draws into files, without a screen
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import ScalarFormatter  # noqa: E402

NEIGHBOURS = ("precision", "recall", "density", "coverage")
PLAIN = {"it", "sec", "loss", "img_s", "mem_gb"}          # of log.jsonl; the rest are scalars of the method's own
BINS = ["< .01", ".01", ".046", ".22", "1", "4.6", "22", "> 100"]
SHOWN = 8                                                 # images of a run in the picture; scalars beside its loss
STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}td,th{padding:.25em .7em;text-align:right;
border-bottom:1px solid #ddd;vertical-align:top}td:first-child,th:first-child,td:last-child{text-align:left}
td:not(:last-child){white-space:nowrap}th{border-bottom:2px solid #888}img{max-width:100%}
td img{image-rendering:pixelated;height:40px;max-width:none}"""


# ---- what is known of a run ----------------------------------------------------------------------
def plain(name):
    """A name of somebody's for the page and for matplotlib, to which a $ begins a formula."""
    return printable(name).replace("$", "?")


def read(path):
    """A run folder: its name, method, config, log, results, strips, notes. Raises BadInput where it is none."""
    path, config = Path(path), config_of(path)
    for name, kind in dict(dataset=str, net=str, ch=int, mult=tuple, batch=int, iters=int, seed=int).items():
        if type(config.get(name)) is not kind or kind is int and abs(config[name]) > 2**53:
            raise BadInput(f"{path}: its config.json has no {name} that can be used")
    about, log = config["about"], []
    script, images = about["script"], about.get("images", ())             # older runs lack the latter
    if not re.fullmatch(r"\w+(\.\w+)*", script):
        raise BadInput(f"{path}: its config.json names the script {printable(script)}, which is none")
    for s in lines(path / "log.jsonl"):
        s = {plain(k): v for k, v in s.items() if type(v) in (int, float) and abs(v) < 2**53}
        log += [s] if {"it", "sec", "loss"} <= s.keys() else []
    run = SimpleNamespace(path=path, name=plain(path.resolve().name), config=config, about=about, log=log, notes=[],
                          figures=figures(path), group=recipe(config), verdict=verdict(path))
    run.method = plain(" ".join(filter(None, [script.split(".")[-1], str(config.get("mode") or "")])))
    run.images = images if len(images) == 4 and all(type(n) is int and 0 < n < 2**31 for n in images) else None
    run.steps = max((s["it"] for s in log or run.figures), default=0)
    run.results = defaultdict(dict)       # {(metric, mode, n): {sampling steps, of the teacher 0: its newest figure}}
    for s in sorted(run.figures, key=lambda s: s["it"]):
        run.results[s["metric"], s["mode"], s["n"]][0 if s["net"] == "teacher" else s["steps"]] = s
    torn = sum(len((path / name).read_text(errors="replace").splitlines()) - len(lines(path / name))
               for name in ("log.jsonl", "eval.jsonl") if (path / name).is_file())
    run.notes += [f"unfinished: {run.steps:,} of {config['iters']:,} steps"] * (run.steps < config["iters"])
    run.notes += ["no log"] * (not log) + ["no figures"] * (not run.figures)
    run.notes += [f"{torn} torn lines left out"] * (torn > 0) + ["an older run: no pictures"] * (run.images is None)
    run.strips = strips(run)
    return run


def strips(run):
    """{steps: PNG of the first images of the newest grid}, 0 steps: the teacher's. The grids of all runs begin with the
    same noise, and with --cond with one image of each class."""
    newest, found = {}, {}
    for file in (run.path / "samples").glob("*.png") if run.images else ():
        if m := re.fullmatch(r"(\d+)_(?:(\d+)step|teacher)", file.stem):
            newest[int(m[2] or 0)] = max(newest.get(int(m[2] or 0), (0, file)), (int(m[1]), file))
    end = max((it for k, (it, _) in newest.items() if k), default=0)
    for k, (it, file) in sorted(newest.items()):
        if k and it < end:                                # drawn before --steps was changed
            continue
        _, _, h, w = run.images
        zoom, buffer = max(1, 32 // h), io.BytesIO()      # as evaluate.picture made it
        try:
            grid = Image.open(file) if file.is_file() else None           # a pipe would be waited for
            if not grid or grid.width * grid.height > 2**26:
                raise ValueError
            grid = np.asarray(grid.convert("RGB"))[:h * zoom:zoom, ::zoom]
            Image.fromarray(grid[:, :SHOWN * (w + 1) - 1]).save(buffer, "png")
            found[k] = buffer.getvalue()
        except Exception:                                 # Pillow raises many kinds
            run.notes.append(f"{file.name} is damaged")
    return found


def in_steps(k):
    return f"{k} step{'s' * (k > 1)}" if k else "teacher"


# ---- tables: a list of rows of texts, the first is the head --------------------------------------
def costs(runs):
    yield ["run", "method", "network", "M parameters", "steps", "M images", "minutes of training", "images/s", "GB",
           "lines of code", "notes"]
    for r in runs:
        c, source = r.config, r.path / "source" / Path(*r.about["script"].split(".")).with_suffix(".py")
        speeds, memory = ([s[k] for s in r.log if k in s] for k in ("img_s", "mem_gb"))
        count = r.about.get("parameters")
        net = r.about.get("network") or f"{c['net']} {c['ch']} x {','.join(map(str, c['mult']))}"
        yield [r.name, r.method, plain(net),
               f"{count / 1e6:.2f}" if type(count) is int and count < 2**53 else "", f"{r.steps:,}",
               f"{r.steps * c['batch'] / 1e6:.3g}", f"{r.log[-1]['sec'] / 60:.1f}" if r.log else "",
               f"{statistics.median(speeds):.0f}" if speeds else "", f"{max(memory):.2f}" if memory else "",
               str(len(source.read_text(errors="replace").splitlines())) if source.is_file() else "",
               "; ".join(r.notes)]


def qualities(runs):
    """(title, table) for each metric, mode and number of images, with precision .. of the same images."""
    for metric, mode, n in dict.fromkeys(kind for r in runs for kind in r.results if kind[:2] in TITLES):
        mine, every = [r for r in runs if (metric, mode, n) in r.results], (metric, *NEIGHBOURS)
        columns = [(m, k) for m in every for k in sorted({k for r in mine for k in r.results[m, mode, n]})]
        head = [("" if m == metric else f"{m}, ") + in_steps(k) for m, k in columns]
        rows = [[r.name, *(cell(r, r.results[m, mode, n].get(k)) for m, k in columns)] for r in mine]
        yield f"{TITLES[metric, mode]} of {n:,} images, lower is better", [["run", *head], *rows]
        own, seeds = [k for m, k in columns if m == metric], defaultdict(dict)
        for r in mine:
            seeds[r.group, r.steps].setdefault(r.config["seed"], (r.method, r.results[metric, mode, n]))
        rows = []
        for same in (s for s in seeds.values() if len(s) > 1):
            values = [[found[k]["value"] for _, found in same.values() if k in found] for k in own]
            rows.append([same[min(same)][0], ", ".join(map(str, sorted(same))), *(
                f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" if len(x) > 1 else "" for x in values)])
        if rows:
            yield "Mean ± standard deviation over seeds", [["method", "seeds", *map(in_steps, own)], *rows]


def cell(run, figure):
    """A figure in a table: with its second level, and with its step if that is not the run's last."""
    if figure is None:
        return ""
    level = f" at {figure['t_mid']:g}" if figure["t_mid"] and figure["metric"] not in NEIGHBOURS else ""
    old = 0 < figure["it"] < run.config["iters"]
    return f"{figure['value']:.3f}{level}" + (f" after {figure['it']:,} steps" if old else "")


# ---- curves --------------------------------------------------------------------------------------
def png(figure):
    with io.BytesIO() as f:
        figure.savefig(f, format="png", dpi=100, bbox_inches="tight")
        plt.close(figure)
        return f.getvalue()


def progress(runs):
    """(title, picture) for each kind of figure: against minutes of training and against images."""
    groups = list(dict.fromkeys(r.group for r in runs))
    methods = Counter(m for _, m in {(r.group, r.method) for r in runs})
    for metric, mode, n in dict.fromkeys(kind for r in runs for kind in r.results if kind[:2] in TITLES):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
        labels = set()
        for r in (r for r in runs if r.log):
            it, sec = zip(*((s["it"], s["sec"] / 60) for s in r.log))
            own = [s for s in r.figures if (s["metric"], s["mode"], s["n"]) == (metric, mode, n) and s["it"] > 0]
            for k in sorted({s["steps"] for s in own}):
                x, y = zip(*sorted({s["it"]: s["value"] for s in own if s["steps"] == k}.items()))
                label = f"{r.method if methods[r.method] == 1 else r.name}, {in_steps(k)}"
                how = dict(color=plt.cm.tab20(groups.index(r.group) % 20), ls="-" if k == 1 else "--", marker=".",
                           lw=1.2, label=None if label in labels else label)             # once for all seeds
                labels.add(label)
                axes[0].plot(np.interp(x, it, sec), y, **how)
                axes[1].plot(np.array(x) * r.config["batch"] / 1e6, y, **how)
        for ax, label in zip(axes, ("minutes of training", "million images of training")):
            ax.set(xlabel=label, yscale="log")
            ax.yaxis.set_minor_formatter(ScalarFormatter())
            ax.yaxis.set_major_formatter(ScalarFormatter())
            ax.grid(alpha=.3, which="both")
        axes[0].set_ylabel(TITLES[metric, mode])
        if labels:
            axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
            yield f"{TITLES[metric, mode]} of {n:,} images while they train", png(figure)
        plt.close(figure)


def logs(runs):
    """Picture of the logs of runs that differ by their seed alone: loss, loss by noise level, the method's scalars."""
    names = sorted({k for r in runs for s in r.log for k in s if k not in PLAIN and not k.startswith("loss_t")})[:SHOWN]
    figure, (first, levels, *rest) = plt.subplots(1, 2 + len(names), figsize=(3.6 * (2 + len(names)), 3),
                                                  layout="constrained")
    known = (reference(runs[0].config) or dict(values={}))["values"]
    if known := {int(name.split()[0]): v for name, v in known.items() if name.endswith("loss")}:
        first.fill_between(list(known), *zip(*known.values()), color="#bbb", label="reference")
    for ax, name in zip((first, *rest), ("loss", *names)):
        for r in runs:
            ax.plot(*zip(*((s["it"], s.get(name, np.nan)) for s in r.log)), lw=1, label=f"seed {r.config['seed']}")
        ax.set(title=name[:40], xlabel="step")
    first.legend(fontsize=8)
    for i, label in enumerate(BINS):
        if points := [(s["it"], s[f"loss_t{i}"]) for s in runs[0].log if f"loss_t{i}" in s]:
            levels.plot(*zip(*points), color=plt.cm.viridis(i / 7), lw=1, label=label)
            levels.legend(fontsize=6, ncol=2)
    below = any(v <= 0 for s in runs[0].log for k, v in s.items() if k.startswith("loss_t"))      # losses e^w d - w
    levels.set(title=f"loss by noise level, seed {runs[0].config['seed']}", xlabel="step")
    levels.set_yscale("linear" if below else "log")
    return png(figure)


# ---- the page ------------------------------------------------------------------------------------
def page(runs, refused):
    """Its parts: (kind, content), kind one of h1, h2, p, table, picture."""
    yield "h1", f"{len(runs)} runs side by side" if len(runs) > 1 else runs[0].name
    if refused:
        yield "p", "Not compared: " + "; ".join(refused)
    data = defaultdict(list)
    for r in runs:
        data[r.about["data_sha256"]].append(r)
    for same in data.values():
        size = next((f", {n:,} images {c} x {h} x {w}" for n, c, h, w in (r.images for r in same if r.images)), "")
        yield "h2", f"Data: {printable(Path(same[0].config['dataset']).name)}{size}"
        for title, rows in qualities(same):
            yield from (("p", title), ("table", rows))
        for r in same:
            yield from [("p", f"{r.name} is {r.verdict}")] * bool(r.verdict)
        for title, picture in progress(same):
            yield from (("p", title), ("picture", picture))
        if columns := sorted({k for r in same for k in r.strips}):
            yield "p", "The newest images, of the same noise in all rows"
            rows = [[r.name, *(r.strips.get(k, "") for k in columns)] for r in same if r.strips]
            yield "table", [["run", *map(in_steps, columns)], *rows]
        yield from (("p", "What they cost"), ("table", list(costs(same))))
        for group in dict.fromkeys(r.group for r in same if r.log):
            alike = [r for r in same if r.group == group and r.log]
            yield from (("p", "Log of " + ", ".join(r.name for r in alike)), ("picture", logs(alike)))


def as_html(parts):
    def image(data):
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'

    def tag(name, value):
        return f"<{name}>{image(value) if isinstance(value, bytes) else html.escape(value)}</{name}>"
    text = f'<!doctype html><meta charset="utf-8"><title>Runs side by side</title><style>{STYLE}</style>\n'
    for kind, x in parts:
        if kind == "table":
            rows = ["".join(tag("td" if i else "th", v) for v in row) for i, row in enumerate(x)]
            text += "<table>" + "".join(f"<tr>{row}</tr>\n" for row in rows) + "</table>\n"
        else:
            text += image(x) if kind == "picture" else tag(kind, x) + "\n"
    return text


def as_markdown(parts):
    def escaped(v):
        return re.sub(r"([\\|<>])", r"\\\1", v)
    text, marks = "", dict(h1="# ", h2="## ", p="")
    for kind, x in parts:
        if kind == "table" and not any(isinstance(v, bytes) for row in x for v in row):
            rows = ["| " + " | ".join(map(escaped, row)) + " |\n" for row in x]
            text += "".join([rows[0], "|---" * len(x[0]) + "|\n", *rows[1:]]) + "\n"
        elif kind in marks:
            text += f"{marks[kind]}{escaped(x)}\n\n"
    return text


def main(argv=None):
    ap = Parser(prog="python -m common.compare", allow_abbrev=False, description=__doc__.split("\n\n")[1])
    ap.add_argument("runs", nargs="+", help="run folders")
    ap.add_argument("--out", default="report.html", help="the page; its tables stand beside it in .md [%(default)s]")
    a = ap.parse_args(argv)
    out, runs, refused = Path(a.out), [], []
    if out.suffix != ".html":
        raise BadInput(f"--out {a.out}: name a file that ends in .html")
    for path in {os.path.realpath(p): p for p in a.runs}.values():
        try:
            with contextlib.redirect_stderr(io.StringIO()):               # BadInput's own line; the page says it
                runs.append(read(path))
        except BadInput as e:
            refused.append(printable(e.message))
        except Exception as e:                            # a folder can hold anything
            refused.append(f"{printable(path)}: {brief(e)}")
    if not runs:
        raise BadInput(f"nothing to compare: {'; '.join(refused)[:300]}")
    if len({r.name for r in runs}) < len(runs):           # of several --out
        for r in runs:
            r.name = plain(r.path)
    parts = list(page(runs, refused))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for file, text in ((out, as_html(parts)), (out.with_suffix(".md"), as_markdown(parts))):
            tmp = file.with_suffix(".tmp")
            tmp.write_bytes(text.encode(errors="replace"))
            os.replace(tmp, file)
    except OSError as e:
        raise BadInput(f"--out {out}: {e.strerror}")
    say(f"{len(runs)} runs: {out}, {out.with_suffix('.md')}" + f"; {len(refused)} not compared" * bool(refused))
    return runs


if __name__ == "__main__":
    main()

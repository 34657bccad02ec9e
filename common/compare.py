"""python -m common.compare RUN...

One page that shows runs side by side: report.html, which needs nothing beside itself, its tables in report.md. What a
folder lacks stands in its row, and the rest is compared. Runs of other data, and figures of another number of images or
another mode, have tables of their own. Only the run folders are read; no method is known here."""
import base64
import html
import io
import statistics
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
from PIL import Image

from common.evaluate import TITLES, figures, lines, recipe, reference, verdict
from common.flags import BadInput, Parser, config_of, printable, say

matplotlib.use("Agg")                                     # draws into files, without a screen
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import ScalarFormatter  # noqa: E402

NEIGHBOURS = ("precision", "recall", "density", "coverage")
PLAIN = {"it", "sec", "loss", "img_s", "mem_gb"}          # of log.jsonl; the rest are scalars of the method's own
BINS = ["< .01", ".01", ".046", ".22", "1", "4.6", "22", "> 100"]
SHOWN = 8                                                 # images of a run in the picture
STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1200px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0;display:block;overflow-x:auto}td,th{padding:.25em .7em;text-align:right;
border-bottom:1px solid #ddd;vertical-align:top}td:first-child,th:first-child,td:last-child{text-align:left}
td:first-child{white-space:nowrap}th{border-bottom:2px solid #888}img{max-width:100%}
td img{image-rendering:pixelated;height:40px;max-width:none}"""


# ---- what is known of a run ----------------------------------------------------------------------
def read(path):
    """A run folder, read. Raises BadInput where it is none."""
    path, config = Path(path), config_of(path)
    for name, kind in dict(dataset=str, net=str, ch=int, mult=tuple, batch=int, iters=int).items():
        if type(config.get(name)) is not kind:
            raise BadInput(f"{path}: its config.json has no {name} that can be used")
    about, log, steps, total, last = config["about"], [], 0, 0.0, 0.0
    for s in lines(path / "log.jsonl"):
        s = {k: v for k, v in s.items() if type(v) in (int, float) and abs(v) < 1e300}
        if {"it", "sec", "loss"} <= s.keys():
            total += last if s["sec"] < last else 0       # a resumed run counts from 0 again
            last, steps = s["sec"], s["it"]
            log.append(s | dict(sec=total + last))
    torn = sum(len((path / name).read_text(errors="replace").splitlines()) - len(lines(path / name))
               for name in ("log.jsonl", "eval.jsonl") if (path / name).is_file())
    run = SimpleNamespace(path=path, name=path.resolve().name, config=config, about=about, log=log, steps=steps,
                          figures=figures(path), notes=[], group=recipe(config))
    run.method = " ".join(filter(None, [about["script"].split(".")[-1], str(config.get("mode") or "")]))
    run.images = about["images"] if shape(about.get("images")) else None          # older runs lack them
    run.notes += [f"unfinished: {steps:,} of {config['iters']:,} steps"] * (steps < config["iters"])
    run.notes += ["no log"] * (not log) + ["no figures"] * (not run.figures)
    run.notes += [f"{torn} torn lines left out"] * (torn > 0)
    return run


def shape(images):
    """Is this, from a config.json, [N, C, H, W]?"""
    return isinstance(images, list) and len(images) == 4 and all(type(n) is int and 0 < n < 2**31 for n in images)


def results(run):
    """{(metric, mode, n): {steps: line of eval.jsonl}}, the newest of each; 0 steps are those of the teacher."""
    found = defaultdict(dict)
    for s in sorted(run.figures, key=lambda s: s["it"]):
        found[s["metric"], s["mode"], s["n"]][0 if s["net"] == "teacher" else s["steps"]] = s
    return found


def text(run, figure):
    """As it stands in a table; with its step, where the run has gone on without it."""
    if figure is None:
        return ""
    old = figure["net"] == "ema" and figure["it"] < run.steps
    return f"{figure['value']:.3f}" + (f" at step {figure['it']:,}" if old else "")


def in_steps(k):
    return f"{k} step{'s' * (k > 1)}" if k else "teacher"


# ---- tables: a list of rows of texts, the first is the head --------------------------------------
def costs(runs):
    rows = [["run", "method", "network", "M parameters", "steps", "M images", "minutes of training", "images/s", "GB",
             "lines of code", "notes"]]
    for r in runs:
        c, source = r.config, r.path / "source" / Path(*r.about["script"].split(".")).with_suffix(".py")
        speeds, memory = ([s[k] for s in r.log if k in s] for k in ("img_s", "mem_gb"))
        count = r.about.get("parameters")
        rows.append([r.name, r.method, f"{c['net']} {c['ch']} x {','.join(map(str, c['mult']))}",
                     f"{count / 1e6:.2f}" if type(count) is int else "", f"{r.steps:,}",
                     f"{r.steps * c['batch'] / 1e6:.3g}",
                     f"{r.log[-1]['sec'] / 60:.1f}" if r.log else "",
                     f"{statistics.median(speeds):.0f}" if speeds else "", f"{max(memory):.2f}" if memory else "",
                     str(len(source.read_text(errors="replace").splitlines())) if source.is_file() else "",
                     "; ".join(r.notes)])
    return rows


def qualities(runs):
    """(title, table) for each metric, mode and number of images, with precision .. of the same images."""
    kinds = dict.fromkeys(kind for r in runs for kind in results(r) if kind[0] not in NEIGHBOURS)
    for metric, mode, n in kinds:
        found = [(r, results(r)) for r in runs if (metric, mode, n) in results(r)]
        columns = [(m, k) for m in (metric, *NEIGHBOURS) for k in sorted({k for _, v in found for k in v[m, mode, n]})]
        head = [("" if m == metric else f"{m}, ") + in_steps(k) for m, k in columns]
        rows = [["run", "t_mid", *head]]
        for r, v in found:
            rows.append([r.name, str(r.config.get("t_mid", "")), *(text(r, v[m, mode, n].get(k)) for m, k in columns)])
        yield f"{TITLES.get((metric, mode), f'{metric} ({mode})')} of {n:,} images, lower is better", rows
        seeds = defaultdict(list)
        for r, v in found:
            seeds[r.group].append((r, v[metric, mode, n]))
        own = [k for m, k in columns if m == metric]
        rows = [["method", "runs", *map(in_steps, own)]]
        for same in (s for s in seeds.values() if len(s) > 1):
            values = [[v[k]["value"] for _, v in same if k in v] for k in own]
            rows.append([same[0][0].method, str(len(same)), *(
                f"{statistics.mean(x):.3f} ± {statistics.stdev(x):.3f}" if len(x) > 1 else "" for x in values)])
        if len(rows) > 1:
            yield "The same flags, other seeds: mean ± standard deviation", rows


# ---- pictures ------------------------------------------------------------------------------------
def png(figure):
    with io.BytesIO() as f:
        figure.savefig(f, format="png", dpi=100, bbox_inches="tight")
        plt.close(figure)
        return f.getvalue()


def progress(runs):
    """(title, picture) for each kind of figure: against minutes of training and against images."""
    colours = {g: f"C{i % 10}" for i, g in enumerate(dict.fromkeys(r.group for r in runs))}
    kinds = dict.fromkeys((s["metric"], s["mode"], s["n"]) for r in runs for s in r.figures
                          if (s["metric"], s["mode"]) in TITLES and s["net"] == "ema")
    for metric, mode, n in kinds:
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
        labelled = set()
        for r in (r for r in runs if r.log):
            it, sec = zip(*((s["it"], s["sec"] / 60) for s in r.log))
            own = [s for s in r.figures if (s["metric"], s["mode"], s["n"], s["net"]) == (metric, mode, n, "ema")]
            for k in sorted({s["steps"] for s in own}):
                x, y = zip(*sorted({s["it"]: s["value"] for s in own if s["steps"] == k}.items()))
                label = None if (r.group, k) in labelled else f"{r.method}, {in_steps(k)}"
                how = dict(color=colours[r.group], ls="-" if k == 1 else "--", marker=".", lw=1.2, label=label)
                labelled.add((r.group, k))
                axes[0].plot(np.interp(x, it, sec), y, **how)
                axes[1].plot(np.array(x) * r.config["batch"] / 1e6, y, **how)
        for ax, label in zip(axes, ("minutes of training", "million images of training")):
            ax.set(xlabel=label, yscale="log")
            ax.yaxis.set_minor_formatter(ScalarFormatter())
            ax.yaxis.set_major_formatter(ScalarFormatter())
            ax.grid(alpha=.3, which="both")
        axes[0].set_ylabel(TITLES[metric, mode])
        axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        yield f"{TITLES[metric, mode]} of {n:,} images while they train", png(figure)


def logs(runs):
    """Picture of the logs of runs that differ by their seed alone: loss, loss by noise level, the method's scalars."""
    names = sorted({k for r in runs for s in r.log for k in s if k not in PLAIN and not k.startswith("loss_t")})
    figure, (first, levels, *rest) = plt.subplots(1, 2 + len(names), figsize=(3.6 * (2 + len(names)), 3),
                                                  layout="constrained")
    if known := (reference(runs[0].config) or {}).get("loss"):
        first.fill_between([int(it) for it in known], *zip(*known.values()), color="#bbb", label="reference")
        first.legend(fontsize=8)
    for ax, name in zip((first, *rest), ("loss", *names)):
        for r in runs:
            ax.plot(*zip(*((s["it"], s[name]) for s in r.log if name in s)), lw=1)
        ax.set(title=name, xlabel="step")
    for i, label in enumerate(BINS):
        if points := [(s["it"], s[f"loss_t{i}"]) for s in runs[0].log if f"loss_t{i}" in s]:
            levels.plot(*zip(*points), color=plt.cm.viridis(i / 7), lw=1, label=label)
            levels.legend(fontsize=6, ncol=2)
    below = any(v <= 0 for s in runs[0].log for k, v in s.items() if k.startswith("loss_t"))      # losses e^w d - w
    levels.set(title="loss, by noise level", xlabel="step", yscale="linear" if below else "log")
    return png(figure)


def strips(run, n=SHOWN):
    """{steps: PNG of the first n images of the newest grid}, 0 steps: the teacher's. The grids of all runs begin with
    the same noise, and with --cond with one image of each class."""
    found = {}
    for file in sorted((run.path / "samples").glob("*.png")) if run.images else []:
        steps = file.stem.split("_")[-1].removesuffix("step").replace("teacher", "0")
        _, _, h, w = run.images
        zoom = max(1, 32 // h)                            # as evaluate.picture made it
        try:
            grid = np.asarray(Image.open(file).convert("RGB"))[::zoom, ::zoom]
        except Exception:                                 # Pillow raises many kinds for a damaged file
            continue
        buffer = io.BytesIO()
        Image.fromarray(grid[:h, :n * (w + 1) - 1]).save(buffer, "png")
        if steps.isdecimal():
            found[int(steps)] = buffer.getvalue()
    return found


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
        yield "h2", f"Data: {Path(same[0].config['dataset']).name}{size}"
        for title, rows in qualities(same):
            yield "p", title
            yield "table", rows
        for name, said in ((r.name, verdict(r.path)) for r in same):
            yield from [("p", f"{name} is {said}")] * (said != "")
        for title, picture in progress(same):
            yield "p", title
            yield "picture", picture
        images = {r.name: strips(r) for r in same}
        if columns := sorted({k for v in images.values() for k in v}):
            yield "p", "The same noise in all rows"
            rows = [[name, *(v.get(k, "") for k in columns)] for name, v in images.items()]
            yield "table", [["run", *map(in_steps, columns)], *rows]
        yield "p", "What they cost"
        yield "table", costs(same)
        for group in dict.fromkeys(r.group for r in same if r.log):
            alike = [r for r in same if r.group == group and r.log]
            yield "p", "Log of " + ", ".join(r.name for r in alike)
            yield "picture", logs(alike)


def as_html(parts):
    def image(data):
        return f'<img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}">'

    def cell(tag, value):
        return f"<{tag}>{image(value) if isinstance(value, bytes) else html.escape(value)}</{tag}>"
    page = f'<!doctype html><meta charset="utf-8"><title>Runs side by side</title><style>{STYLE}</style>\n'
    for kind, x in parts:
        if kind == "table":
            rows = ["".join(cell("td" if i else "th", v) for v in row) for i, row in enumerate(x)]
            page += "<table>" + "".join(f"<tr>{row}</tr>\n" for row in rows) + "</table>\n"
        else:
            page += image(x) if kind == "picture" else cell(kind, x) + "\n"
    return page


def as_markdown(parts):
    text, marks = "", dict(h1="# ", h2="## ", p="")
    for kind, x in parts:
        if kind == "table" and not any(isinstance(v, bytes) for row in x for v in row):
            rows = ["| " + " | ".join(v.replace("|", "\\|") for v in row) + " |\n" for row in x]
            text += "".join([rows[0], "|---" * len(x[0]) + "|\n", *rows[1:]]) + "\n"
        elif kind in marks:
            text += f"{marks[kind]}{x}\n\n"
    return text


def main(argv=None):
    ap = Parser(prog="python -m common.compare", allow_abbrev=False, description=__doc__.split("\n\n")[1])
    ap.add_argument("runs", nargs="+", help="run folders")
    ap.add_argument("--out", default="report.html", help="the page; its tables stand beside it in .md [%(default)s]")
    a = ap.parse_args(argv)
    runs, refused = [], []
    for path in dict.fromkeys(a.runs):
        try:
            runs.append(read(path))
        except BadInput as e:
            refused.append(e.message)
    if not runs:
        raise BadInput("none of these is a run folder; name folders such as runs/ect-digits-000")
    if len({r.name for r in runs}) < len(runs):           # of several --out
        for r in runs:
            r.name = str(r.path)
    parts = list(page(runs, refused))
    out = Path(a.out).with_suffix(".html")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(as_html(parts), encoding="utf-8")
        out.with_suffix(".md").write_text(as_markdown(parts), encoding="utf-8")
    except OSError as e:
        raise BadInput(f"--out {out}: {e.strerror}")
    say(f"{len(runs)} runs: {printable(out)}, {printable(out.with_suffix('.md'))}")
    return runs


if __name__ == "__main__":
    main()

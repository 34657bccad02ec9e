"""Evaluation during training: grids of generated images in samples/, and metrics in eval.jsonl.

`draw(noise, y)` is the sampler of a method or of the teacher, with the EMA weights: noise [K,b,C,H,W] -> images
[b,C,H,W] in [-1, 1]. `run` is a run.Run; its methods evaluate and finish call `evaluate` and `table`."""
import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from common import fid, folder, pipeline
from common.fid import chosen
from common.flags import ADDED, MAY_CHANGE, ROOT, BadInput, config_of, known, say

FD_IMAGES = 2048                  # images, real and generated, of fd_pixels; fewer if the data set has fewer
REFERENCE = ROOT / "common/reference.json"        # loss and figures of the presets: tests.bench.reference
TITLES = {("fd_pixels", "8x8"): "FD (pixels)", ("fd_latents", "8x8"): "FD (latents)",
          ("fid", fid.MODE): f"FID ({fid.MODE})"}
# What a run's figures do not depend on, but for chance
FREE = MAY_CHANGE - {"iters", "t_mid", "log_every"} | {"about", "seed", "preset", "accum", "compile", "tf32"}


def picture(images, cols=0):
    """uint8 [N, C, H, W] -> one PIL image, `cols` to a row, grey lines between them; copies enlarge small pixels."""
    n, c, h, w = images.shape
    cols = min(cols or math.ceil(n**0.5), n)
    rows, zoom = math.ceil(n / cols), max(1, 32 // h)
    sheet = torch.full((rows * cols, 3, h + 1, w + 1), 128, dtype=torch.uint8)
    sheet[:n, :, :h, :w] = images.cpu()
    sheet = sheet.view(rows, cols, 3, h + 1, w + 1).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)[:-1, :-1]
    return Image.fromarray(sheet.numpy().repeat(zoom, 0).repeat(zoom, 1))


def generate(run, data, n, k, draw, labels=None):
    """n images of `draw`, uint8 [n,C,H,W], or latents, on the CPU, in k sampling steps, with these `labels` [L],
    repeated, or none. The ranks share the work, and all get the images."""
    ids = torch.arange(run.rank, n + -n % run.world, run.world)           # equal shares: sharded calls must pair up
    size, out = 256 if run.device.type == "cuda" else 64, []              # small enough for the bar to move
    for i in tqdm(ids.split(size), "images", leave=False, disable=run.rank > 0, delay=2):
        y = None if labels is None else labels[i % len(labels)].to(run.device)
        out.append(fid.quantise(draw(fid.noise_of(i, k, data.images.shape[1:], run.device), y), bool(data.latent)))
    out = torch.cat(out)
    if run.world > 1:
        parts = [torch.empty_like(out) for _ in range(run.world)]
        dist.all_gather(parts, out)
        out = torch.stack(parts, 1).flatten(0, 1)                         # image i is of rank i % world
    return out[:n].cpu()


def evaluate(run, it, data, draw, steps, net="ema"):
    """For each number of sampling steps in the list `steps`: write a grid, measure fd_pixels and, where due, FID. The
    noise is the same in every run and at every training step, so that grids can be compared.

    Of latents, only grids are decoded; those of large pictures would take too long to measure.
    With --cond, metrics use labels as frequent as in the data: with equal shares, even a perfect model of two classes
    at 9:1 would measure a distance of 2.8. In the grid each column is a class."""
    a = run.args
    many, order = a.fid if run.fid_due(it) else 0, chosen(data, len(data.images))
    n = min(len(order), FD_IMAGES) if not data.latent or data.images.shape[-1] <= 16 else 0
    real = data.images[order[:n].to(run.device)]
    near = fid.neighbours(data, many, a.data_dir) if many else None       # features of real images
    labels, classes = (data.labels.cpu()[order], torch.arange(data.classes)) if a.cond else (None, None)
    for k in steps:
        began = time.perf_counter()
        draws = 1 if net == "teacher" else k              # the diffusion sampler draws noise once
        fake = generate(run, data, max(n, many, 0 if a.cond else a.grid), draws, draw, labels) if n else None
        grid = generate(run, data, a.grid, draws, draw, classes) if a.cond else fake[:a.grid]
        t_mid = getattr(a, "t_mid", None) if k > 1 and net != "teacher" else None

        def note(values, n, mode):
            of = dict(n=n, net=net, steps=k, t_mid=t_mid, mode=mode, seed=0, noise="float32")
            for metric, value in values.items():
                sec = round(time.perf_counter() - began, 2)
                run.append("eval.jsonl", dict(it=it, metric=metric, value=round(value, 4)) | of | dict(sec=sec))
        if run.rank == 0:
            (run.dir / "samples").mkdir(exist_ok=True)
            name = f"{it:07d}_{'teacher' if net == 'teacher' else f'{k}step'}.png"
            if data.latent:
                grid = fid.quantise(pipeline.decode(data.latent["pipeline"], grid, run.device))
            picture(grid, data.classes if a.cond and not data.latent else 0).save(run.dir / "samples" / name)
        if run.rank == 0 and n:
            note({f"fd_{'latents' if data.latent else 'pixels'}": fid.fd_pixels(real, fake[:n])}, n, "8x8")
            note(fid.prdc(fid.pixels(real), fid.pixels(fake[:n])), n, "8x8")
        if many:                                          # all ranks take part
            note(dict(fid=fid.fid(data, fake[:many], a.data_dir, kept=(kept := []))), many, fid.MODE)
            if near is not None and run.rank == 0:
                place = run.device if run.device.type == "cuda" else "cpu"        # others may lack float64
                note(fid.prdc(near.to(place), torch.cat(kept).to(place)), many, fid.MODE)


# ---- what is saved, and what is known of a run ---------------------------------------------------
def sha256(weights):
    """Of the names and bytes of a state dict, on whatever device and in whatever memory layout."""
    total = hashlib.sha256()
    for name, v in sorted(weights.items()):
        total.update(name.encode() + v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def check_state(it, ckpt, world):
    """FloatingPointError unless all numbers of a checkpoint are finite, RuntimeError unless all ranks have the same."""
    numbers = [v for v in tree_leaves(ckpt) if torch.is_tensor(v) and v.is_floating_point()]
    good = all(v.norm().isfinite() for v in numbers)      # also false where weights of 1e38 are left to be multiplied
    own = good, [sha256(ckpt[k]) for k in ("net", "ema")] if world > 1 else 0
    seen = [own] * world
    if world > 1:
        dist.all_gather_object(seen, own)
    if not all(good for good, _ in seen):
        raise FloatingPointError(f"step {it}: the weights or the optimiser are not finite; nothing was saved")
    if other := [rank for rank, s in enumerate(seen) if s != seen[0]]:
        raise RuntimeError(f"step {it}: ranks {other} have other weights than rank 0; nothing was saved")


def is_diffusion(net, path):
    """Is this network a denoiser D, not the f of a consistency model? Their weights look the same."""
    place = path if path.is_dir() else path.parent
    if (place / "config.json").exists():
        return config_of(place)["about"]["script"] == "common.teacher" and net.t_min == 0
    method = path.suffix != ".pkl" and "teacher" in folder.load(path).get("config", {})     # as in every method
    return net.t_min == 0 and not method


def standing(path, cls):
    """The flags of a run folder as a `cls`, `about` of its config.json, its steps; (None, None, why): it is damaged."""
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            config = config_of(path)
            done = folder.load(path).get("it", 0) if any(path.glob("ckpt*")) else 0
            return cls(**known(cls, config, path)), config["about"], done
        except BadInput as e:
            return None, None, e.message.split(";")[0]


# ---- eval.jsonl ----------------------------------------------------------------------------------
def lines(path):
    """The objects of a .jsonl file; a line that a kill has torn is passed over."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [v for v in found if isinstance(v, dict)]


def figures(run):
    """The lines of eval.jsonl that are figures, as this project writes them."""
    number, count = (int, float), (int,)
    kinds = dict(it=count, metric=(str,), value=number, n=count, net=(str,), steps=count, mode=(str,))
    kinds |= dict(t_mid=(*number, type(None)))
    found = [s for s in lines(Path(run) / "eval.jsonl") if all(type(s.get(k)) in v for k, v in kinds.items())]
    return [s for s in found if abs(s["value"]) < 1e300 and all(0 <= s[k] < 2**53 for k in ("it", "n", "steps"))]


def cut_logs(run, it):
    """Take the steps after `it`, which will be made again, and torn lines out of log.jsonl and eval.jsonl."""
    for path in filter(Path.is_file, (run / "log.jsonl", run / "eval.jsonl")):
        path.with_suffix(".tmp").unlink(missing_ok=True)
        kept = [line for line in lines(path) if isinstance(line.get("it"), int) and line["it"] <= it]
        path.with_suffix(".tmp").write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(path.with_suffix(".tmp"), path)


def recipe(config):
    """What two runs have in common that differ by their seed alone, of their config.json."""
    flags = {k: v for k, v in config.items() if k not in FREE and (k, v) not in ADDED.items()}    # as in older runs
    flags |= dict(pretrained=config.get("teacher") != "none")
    return json.dumps([config["about"]["script"], config["about"]["data_sha256"], flags], sort_keys=True)


def reference(config):
    """The entry of reference.json for a run with this config.json, or None: "seeds", and "values", {name: [lowest,
    highest]} with the names of `named`."""
    known = json.loads(REFERENCE.read_text()) if REFERENCE.is_file() else {}
    return known.get(hashlib.sha256(recipe(config).encode()).hexdigest())


def named(run):
    """{"100 loss": 3.4, "100 FD in 2 steps, 1797 images": 0.26, ..}: loss and FD (pixels) of a run folder by step."""
    found = {f"{s['it']} loss": s["loss"] for s in lines(run / "log.jsonl")
             if type(s.get("it")) is int and type(s.get("loss")) is float}
    return found | {f"{s['it']} FD in {s['steps']} step{'s' * (s['steps'] > 1)}, {s['n']} images": s["value"]
                    for s in figures(run) if (s["net"], s["metric"], s["mode"]) == ("ema", "fd_pixels", "8x8")}


def verdict(run):
    """Is this run's loss normal? 'on track after 300 steps: ..', 'off track ..', or '' where its flags have no
    reference. Off track is what is half as much again as all seeds of the reference had; seeds, machines and teachers
    differ by a fifth. A loss at half of theirs is, too: it is low where nothing is learned."""
    if not (entry := reference(config_of(run))):
        return ""
    own, said, off = named(run), [], False
    common = [name.split(maxsplit=1) for name in entry["values"] if name in own]
    for kind in ("loss", "FD"):
        last = max((int(it) for it, what in common if what.startswith(kind)), default=0)
        for what in [what for it, what in common if int(it) == last and what.startswith(kind)]:
            (lo, hi), value = entry["values"][f"{last} {what}"], own[f"{last} {what}"]
            said.append(f"{what} {value:.3f} ({lo:.3f} .. {hi:.3f})")
            off |= not value <= hi + abs(hi) / 2 or kind == "loss" and value < lo - abs(lo) / 2
    it = max((int(it) for it, _ in common), default=0)
    text = f"{'off' if off else 'on'} track after {it} steps: {'; '.join(said)}; reference: seeds {entry['seeds']}"
    return text if said else ""


def newest(path):
    """The steps of the teacher in a run folder, and its figures {(metric, mode): line} after that many."""
    it = folder.load(path).get("it", 0)
    return it, {(s["metric"], s["mode"]): s for s in figures(path) if s["net"] == "teacher" and s["it"] == it}


def described(path):
    """', 1,600 steps, FD (pixels) 0.130': what is known of the teacher in a run folder; nothing of another path."""
    if not os.path.isdir(path):
        return ""
    it, last = newest(path)
    fd = last.get(("fd_pixels", "8x8"))
    return f", {it:,} steps" + (f", FD (pixels) {fd['value']:.3f}" if fd else "")


def adopt(run, teacher):
    """Copy the last metrics and grid of a teacher's folder into this run. False if one that it needs is missing."""
    _, last = newest(teacher)
    for line in last.values():
        run.append("eval.jsonl", line | dict(it=0))
        grid = teacher / "samples" / f"{line['it']:07d}_teacher.png"
        if run.rank == 0 and grid.exists():
            shutil.copy(grid, run.dir / "samples" / "0000000_teacher.png")
    return ("fd_pixels", "8x8") in last and run.args.fid in (0, last.get(("fid", fid.MODE), {}).get("n"))


def table(run, it):
    """Print the last figures of the teacher, of 1 step and of --steps; return {"fd_pixels_2step": value, ..}."""
    def column(s):
        return "teacher" if s["net"] == "teacher" else f"{s['steps']}step"
    last = {(s["metric"], s["mode"], column(s)): s for s in figures(run.dir) if s["it"] in (0, it)}    # the last wins
    columns = dict.fromkeys(["teacher", "1step", f"{run.args.steps}step"])
    result = {}
    for (metric, mode), title in TITLES.items():
        rows = [last[metric, mode, k] for k in columns if (metric, mode, k) in last]
        rows = [s for s in rows if s["n"] == rows[-1]["n"]]               # figures of other numbers do not compare
        if rows:
            say(f"\n{title} of {rows[0]['n']:,} images, lower is better; precision, recall")
        for s in rows:
            label = f"teacher, {s['steps']} Heun step" if s["net"] == "teacher" else f"{s['steps']} step"
            label += "s" * (s["steps"] > 1) + (f", t_mid {s['t_mid']:g}" if s["t_mid"] else "")
            more = [last.get((name, mode, column(s)), dict(n=0)) for name in ("precision", "recall")]
            more = [f"{v['value']:8.2f}" if v["n"] == s["n"] else f"{'-':>8}" for v in more]
            say(f"  {label:26}{s['value']:8.3f}{''.join(more)}")
            result[f"{metric}_{column(s)}"] = s["value"]
    return result

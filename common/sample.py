"""python -m common.sample RUN --steps 2 --n 64 --out grid.png

Images from any run: a run folder, or one of its checkpoints. --out ends in .png: one grid; in .npz: arrays
`images` [N, H, W, C] uint8 and `labels`, which --dataset reads again; otherwise: a folder of PNG files.
--edit changes images without training; a .png then has three rows: the images, what the network gets to see of them
(noisy, grey, coarse or with a hole), the result."""
import importlib
import math
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import edit, fid, folder, latent, pipeline, teacher
from common.data import load
from common.evaluate import FD_IMAGES, chosen, picture
from common.fid import fd_pixels, noise_of, quantise
from common.flags import LARGEST, ROOT, BadInput, Parser, check_bounds, config_of, device_of, integers, known, script

EDITS = ("inpaint", "colorize", "superres", "stroke", "denoise")                 # of images; interpolate has none
FOR = dict(images=EDITS, mask=("inpaint",), patch=("superres",), sigma=("stroke", "denoise"))


def numbers(text):
    return tuple(map(float, text.replace(",", " ").split()))


def flags(argv=None):
    ap = Parser(prog="python -m common.sample", allow_abbrev=False, description=__doc__.split("\n\n")[1])
    ap.add_argument("run", help="run folder, or a checkpoint in one")
    ap.add_argument("--steps", type=int, help="sampling steps [those of the run]")
    ap.add_argument("--t-mid", "--t_mid", type=float, help="the run's --t-mid, in its own time [that of the run]")
    ap.add_argument("--ts", type=numbers, metavar="T,T,..", help="all noise levels (standard deviations), descending")
    ap.add_argument("--find-ts", "--find_ts", action="store_true", help="search the second level of two by FD (pixels)")
    ap.add_argument("--fid", action="store_true", help="search by FID instead; --n 10000 or more")
    ap.add_argument("--edit", choices=[*EDITS, "interpolate"], help="images, or blend pairs of noise (interpolate); "
                    "levels: --ts [39, Karras' grid of 40 but for the last; stroke, denoise: --sigma]")
    ap.add_argument("--images", help="a picture, a folder, .zip or .npz to edit [the run's data set]")
    ap.add_argument("--mask", help="inpaint: a picture, white where to generate [a square, half of each side]")
    ap.add_argument("--patch", type=int, help="superres: pixels a side that become one [2, from 96 on size / 32]")
    ap.add_argument("--sigma", type=float, help="stroke, denoise: noise level [1, 0.5]; stroke adds one at 0.416 of it")
    ap.add_argument("--n", type=int, help=f"how many images [64; to edit: 16; to search: {FD_IMAGES}]")
    ap.add_argument("--classes", type=integers, help="labels, such as 3,5; repeated up to --n [all in turn; not in "
                    "a .png: as frequent as in the data; the images' own]")
    ap.add_argument("--prompts", help="text to image: a caption, or a file with one in each line [the data's]")
    ap.add_argument("--pipeline", default="", help="text to image: where the run's pipeline is now [where it was]")
    ap.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone [%(default)s]")
    ap.add_argument("--batch", type=int, help="images at a time [256; text to image: 8]")
    ap.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], default="auto", help="[%(default)s]")
    ap.add_argument("--data-dir", "--data_dir", help="where the run's data set is [as in the run]")
    ap.add_argument("--out", help="a .png, a .npz or a folder [grid.png]")
    return check(ap.parse_args(argv))


def check(a):
    """Return the flags, unless some contradict each other: BadInput."""
    def given(*names):
        return any(getattr(a, k) is not None for k in names)
    for flag, edits in FOR.items():
        if given(flag) and a.edit not in edits:
            raise BadInput(f"--{flag} is for --edit {' | '.join(edits)} alone; leave it out")
    wrong = {
        f"--steps, --n and --batch must be 1 .. {LARGEST:,}":
            not all(1 <= n <= LARGEST for n in (a.steps, a.n, a.batch) if n is not None),
        "--find-ts prints the best second level of two; leave out --steps, --t-mid, --ts, --edit, --out":
            a.find_ts and (given("t_mid", "ts", "edit", "out") or a.steps not in (None, 2)),
        "--fid is for --find-ts; to measure images, write them with --out some.npz; then python -m common.fid some.npz":
            a.fid and not a.find_ts,
        "--ts gives all levels, to --edit as well; leave out --steps, --t-mid and --sigma beside it":
            given("ts") and given("steps", "t_mid", "sigma") or a.edit in EDITS and given("steps", "t_mid")}
    for message in filter(wrong.get, wrong):
        raise BadInput(message)
    return a


def levels(a, t_max, t_min):
    """The noise levels of --ts, --sigma or --edit, descending; None: the method's own. Raises BadInput."""
    sigma = dict(stroke=1.0, denoise=0.5).get(a.edit) if a.sigma is None else a.sigma
    if a.ts is not None:
        ts = a.ts
    elif sigma is not None:                              # stroke: two levels in the paper's ratio
        ts = (sigma, sigma * 2.24 / 5.38) if a.edit == "stroke" else (sigma,)
    else:                                                # the last level is the boundary, where f is the identity
        return edit.karras(t_max, max(t_min, 0.002))[:-1] if a.edit in EDITS else None
    if not ts or not ts[0] <= t_max or not all(t > r for t, r in zip(ts, (*ts[1:], t_min))):
        raise BadInput(f"--ts and --sigma: noise levels must descend, the first be at most {t_max:g}, and the last be "
                       f"above {t_min:g}")
    return ts


def images_of(a, args, size, channels):
    """The images to edit or to compare with, uint8 [N, C, H, W], and their labels [N] or None. Raises BadInput."""
    if a.images:
        return edit.read_images(a.images, size, channels)
    data = load(args.dataset, args.data_dir, args.size)
    if data.sha256 != config_of(folder_of(a.run))["about"]["data_sha256"]:
        raise BadInput(f"{data.name} no longer holds the images of this run; put them back, or see --data-dir")
    i = slice(None) if a.edit else chosen(data, a.n or FD_IMAGES)     # those of the figures in training
    return data.images[i], data.labels[i]


def labels_of(a, classes, own):
    """The labels to repeat: --classes, or the images' `own`, or all; None if the run has none. Raises BadInput."""
    if not classes:
        if a.classes:
            raise BadInput("--classes: this run was not trained with --cond")
        return None
    if a.images and own is None and not a.classes:
        raise BadInput(f"--images {a.images} has no labels, which this run needs; give --classes")
    labels = torch.tensor(a.classes or range(classes)) if a.classes or own is None else own
    if labels.min() < 0 or labels.max() >= classes:
        raise BadInput(f"--classes must lie in 0 .. {classes - 1}")
    return labels


def as_frequent(folder, n):
    """n labels as frequent as in the data of the run: always that of the class furthest behind, so that the first
    ones are the same for any n. None if config.json, of an older run, does not say how frequent they are."""
    counts = config_of(folder)["about"].get("images_per_class")
    if counts is None:
        return None
    if type(counts) is not list or not all(type(c) is int and 0 <= c < 2**31 for c in counts) or not any(counts):
        raise BadInput(f"{folder}: images_per_class in its config.json is damaged; restore it")
    counts, labels, behind = torch.tensor(counts), [], 0
    for _ in range(n):
        behind = behind + counts
        labels.append(int(behind.argmax()))
        behind[labels[-1]] -= counts.sum()
    return torch.tensor(labels)


def folder_of(path):
    """The run folder of a path to it or to a checkpoint in it."""
    return Path(path) if os.path.isdir(path) else Path(path).parent


def script_called(name):
    """The module that config.json names as its script. Raises BadInput unless it is one of this checkout: a run folder
    from elsewhere must not choose what is executed."""
    files = [*ROOT.glob("*.py"), ROOT / "common/teacher.py", *ROOT.glob("tests/bench/*.py")]
    if name in map(script, files):
        sys.path.insert(0, str(ROOT))                     # before the working directory, which may hold another
        module = importlib.import_module(name)
        if hasattr(module, "Args") and hasattr(module, "sample"):
            return module
    raise BadInput(f"its config.json names the script {name!r}, which is not one of this checkout; nothing was run")


def load_run(path, device="cpu", pipeline=""):
    """A run folder, or a checkpoint in one -> (method, args, net): the module of its script, its flags as an instance
    of method.Args, and its averaged network, so that method.sample(net, noise, y, args) draws images, or the latents
    of `pipeline`, where that was moved. BadInput."""
    config = config_of(folder_of(path))
    method = script_called(config["about"]["script"])
    return method, method.Args(**known(method.Args, config, path)), teacher.load(path, device, pipeline)


def settle(a, method, args):
    """The run's flags with --steps, --t-mid and --data-dir of the command line in their place. Raises BadInput."""
    own = a.ts or a.find_ts or a.edit
    if own and method is teacher or a.t_mid is not None and not hasattr(args, "t_mid"):
        raise BadInput("--ts, --t-mid, --find-ts and --edit are for consistency models; this is a diffusion model")
    if getattr(args, "t_mid", 0) is None and (own or a.t_mid or a.steps not in (None, args.steps)):
        raise BadInput(f"this run is sampled in its {args.steps} steps alone, from edge to edge of its segments; "
                       "leave out --ts, --find-ts, --edit, --t-mid and --steps")
    given = {k: getattr(a, k) for k in ("steps", "t_mid", "data_dir")}
    args = replace(args, **{k: v for k, v in given.items() if v not in (None, "")})
    check_bounds(args)
    return args


@folder.guarded
def main(argv=None):
    """Draw or edit images and write them; return uint8 [N,C,H,W] and labels [N] or None; or the level of --find-ts."""
    a = flags(argv)
    out = Path(a.out or "grid.png")
    check_out(out)
    device = device_of(a.device)
    method, args, net = load_run(a.run, device, a.pipeline)
    args, text = settle(a, method, args), getattr(net.model, "text", None) is not None
    if text and (a.edit or a.find_ts) or not text and (a.prompts or a.pipeline):
        raise BadInput("--prompts and --pipeline are for text to image, --edit and --find-ts are not; leave them out")
    if a.prompts:
        net.model.say(latent.lines(a.prompts))
    size, channels, classes = (net.model.kwargs[k] for k in ("size", "channels", "classes"))
    t_max = args.t_max if hasattr(args, "t_max") else args.sigma_max
    ts, mask = levels(a, t_max, net.t_min), edit.mask_of(a.mask, size).to(device)
    patch = max(2, size // 32) if a.patch is None else a.patch
    if patch < 2 or a.edit == "superres" and size % patch:
        raise BadInput(f"--patch must be at least 2 and divide the {size} pixels of a side")
    if a.edit == "colorize" and channels == 1:
        raise BadInput("--edit colorize: the images of this run are grey; take another run")
    real, own = images_of(a, args, size, channels) if a.edit in EDITS or a.find_ts else (None, None)
    n = a.n or 64 if real is None else min(a.n or (16 if a.edit else FD_IMAGES), len(real))
    if classes and out.suffix.lower() != ".png" and not (a.edit or a.find_ts or text):
        own = as_frequent(folder_of(a.run), n)                    # an FID of these images compares them with the data
    labels = labels_of(a, classes, own)
    cols = 0 if labels is None else min(len(labels), 8) if text else len(labels)
    cols = n if a.edit in EDITS else max(2, min(n, 8)) if a.edit else cols
    if labels is not None:                                        # interpolate: one for each row
        labels = labels[torch.arange(n) // (cols if a.edit == "interpolate" else 1) % len(labels)]
    k = len(ts) if ts else 1 if method is teacher else args.steps  # the diffusion sampler draws noise once

    def noise(i, k, more=0):
        return noise_of(i, k, (channels, size, size), device, a.seed + more)

    def draw(make):
        """make(ids, labels) of all images, --batch at a time."""
        batch = min(a.batch or (8 if text else 256), max(1, fid.NOISE // (k * channels * size**2)))
        batches = tqdm(torch.arange(n).split(batch), disable=n <= batch or a.find_ts)
        return torch.cat([make(i, None if labels is None else labels[i].to(device)).cpu() for i in batches])

    def edited(i, y):
        z = noise(i, k)
        return quantise(torch.stack(edit.change(net, a.edit, real[i].to(z) / 127.5 - 1, z, y, ts, mask, patch), 1))

    def generated(i, y):
        if a.edit:                                                # interpolate: a row from one image to the next
            row, w = i // cols, (i % cols / (cols - 1)).to(device).view(-1, 1, 1, 1)
            z = noise(2 * row, k)                                 # that of later steps stays the same
            z[0] = edit.slerp(z[0], noise(2 * row + 1, 1)[0], w)
        else:
            z = noise(i, k)
        x = edit.multistep(net, z, y, ts) if ts else method.sample(net, z, y, args)
        return quantise(pipeline.decode(net.model.kwargs["pipeline"], x, device) if text else x)

    if a.find_ts:
        name, score = "FD (pixels)", partial(fd_pixels, real)
        if a.fid:
            data = load(args.dataset, args.data_dir, args.size, device)
            name, score = f"FID ({fid.MODE})", partial(fid.fid, data, data_dir=args.data_dir)
        return find(name, score, a.run, net, t_max, draw, noise, getattr(args, "t_mid", None))
    if a.edit in EDITS:
        seen, images = draw(edited).unbind(1)
        sheet = torch.cat([real[:n], seen, images])
    else:
        images = sheet = draw(generated)
    write(images, labels, out, sheet, cols)
    steps = len(ts) if ts else args.steps
    print(f"{n} images in {steps} step{'s' * (steps > 1)}: {out}")
    return images, labels


def find(name, score, path, net, t_max, draw, noise, t_mid):
    """Search the second noise level of two for the lowest score(images), with the same noise at every level. Print
    whether it is better than the run's own t_mid by more than the noise alone changes it: two standard deviations of
    the scores of four seeds."""
    def start(more):
        """The images after the first step, with other noise for each `more`."""
        return draw(lambda i, y: edit.multistep(net, noise(i, 1, more), y, [t_max]))

    @cache
    def measured(t, more=0):
        x = start(more) if more else first

        def second(i, y):
            z = noise(i, 2, more)[1:]
            return quantise(edit.multistep(net, z, y, [t], x[i].to(z)))
        return score(draw(second))

    def shown(t):
        print(f"  {t:<10g}{measured(t):8.4f}", flush=True)
        return measured(t)

    first = start(0)
    print(f"{name} of {len(first):,} images, 2 steps, by the second noise level; 1 step: {score(quantise(first)):.4f}")
    best = edit.search(shown, max(net.t_min, t_max / 8000), t_max)
    spread = 2 * statistics.stdev([measured(best), *(measured(best, more) for more in (1, 2, 3))])
    print(f"spread between seeds +-{spread:.4f}")
    if t_mid is not None:
        own = net.sd * math.tan(t_mid) if hasattr(net, "denoise") else t_mid      # TrigFlow's t_mid is a time
        gain = measured(own) - measured(best)
        verdict = "the difference lies within the spread" if abs(gain) <= spread else \
            f"{best if gain > 0 else own:.4g} is better"
        print(f"the run's own level, {own:.4g}, has {measured(own):.4f}: {verdict}")
        if gain <= spread:                                # what was found is as likely noise
            print(f"keep the run's own level: python -m common.sample {path} --steps 2")
            return best
    print(f"best: python -m common.sample {path} --ts {t_max:.12g},{best:g}")
    return best


def check_out(out):
    """BadInput, before the work, for an --out that could not be written or whose ending promises something else."""
    kind, place = out.suffix.lower(), next(p for p in out.absolute().parents if os.path.exists(p))
    other = os.path.exists(out) or kind == ".zip" or kind in Image.registered_extensions()
    if os.path.isdir(out) or kind not in (".png", ".npz") and other:
        raise BadInput(f"--out {out} exists, or is no kind that is written here; name a .png, a .npz or a new folder")
    if not os.path.isdir(place) or not os.access(place, os.W_OK) or len(os.fsencode(out.name)) > 200:
        raise BadInput(f"--out {out.name[:100]} cannot be written in {out.parent}; name another")


def write(images, labels, out, sheet, cols):
    """Write all of it, or nothing."""
    rows = images.permute(0, 2, 3, 1).numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=out.parent) as tmp:
        new = Path(tmp) / out.name
        if out.suffix.lower() == ".png":
            picture(sheet, cols).save(new)
        elif out.suffix.lower() == ".npz":
            with open(new, "wb") as f:                    # np.savez adds an ending to .NPZ
                np.savez_compressed(f, images=rows, **({} if labels is None else dict(labels=labels.numpy())))
        else:
            new.mkdir()
            for i, row in enumerate(rows):
                Image.fromarray(row.squeeze()).save(new / f"{i:06d}.png")
        os.replace(new, out)


if __name__ == "__main__":
    main()

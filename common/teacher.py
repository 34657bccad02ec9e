"""
common/teacher.py: the diffusion model.    EDM, Karras et al. 2022, arXiv:2206.00364.

One training step
    t       ~  lognormal(P_mean, P_std)                     # noise level            [Table 1]
    loss    =  |D(x0 + t*eps, t) - x0|^2 * (t^2 + sd^2) / (t*sd)^2     # sum over C, H, W

    or, with --flow trig (sCM, arXiv:2410.11081), z = sd*eps and a = arctan(t/sd):
    loss    =  e^w |sd*F(cos(a)*x0 + sin(a)*z, a) - (cos(a)*z - sin(a)*x0)|^2 - w   # mean; w(a) is learned

Deviations from the paper
    With --cond, a tenth of the labels is dropped, which guidance needs.
    A loss or gradient that is not finite stops the run; the authors' code replaces it by numbers.
    GPUs multiply in TF32. The presets fast, small and digits are ours; they do not augment.
"""
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from common import evaluate, folder, released
from common.augment import augment
from common.data import load as load_data
from common.flags import BadInput, config_of, from_presets, parse, say, typed
from common.networks import backbone
from common.precond import EDM, TrigFlow
from common.released import load
from common.run import Run


# ==== 1. Loss =====================================================================================
def loss_fn(net, x0, y, args):
    """x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t [B,1,1,1], loss [B]."""
    t = (torch.randn(len(x0), 1, 1, 1, device=x0.device) * args.P_std + args.P_mean).exp()
    more = {}
    if args.augment:                                      # the network is told how
        x0, more["augment"] = augment(x0, args.augment)
    eps = torch.randn_like(x0)
    if y is not None:                                     # -1: the network is told no label
        y = torch.where(torch.rand(len(y), device=y.device) < args.label_dropout, -1, y)
    if args.flow == "trig":
        a = torch.atan(t / args.sd)
        cos, sin, z = a.cos(), a.sin(), args.sd * eps
        d = (args.sd * net.F(cos * x0 + sin * z, a, y, **more) - (cos * z - sin * x0)) ** 2
        w = net.weigh(a)
        loss = w.exp() * d.flatten(1).mean(1) - w         # mean: of order 1, so that w = 0 is a good start
        return loss.mean(), dict(t=t, loss=loss.detach())
    d = ((net(x0 + t * eps, t, y, **more) - x0) ** 2).flatten(1).sum(1)
    loss = d * ((t**2 + args.sd**2) / (t * args.sd) ** 2).flatten()
    return loss.mean(), dict(t=t, loss=loss.detach())


# ==== 2. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Heun's method on the probability-flow ODE (Algorithm 1, sigma(t) = t), from noise [1, B, C, H, W]."""
    i = torch.arange(args.steps, dtype=noise.dtype) / max(args.steps - 1, 1)
    hi, lo = args.t_max ** (1 / args.rho), args.t_min ** (1 / args.rho)
    ts = (hi + i * (lo - hi)) ** args.rho
    ts = torch.cat([ts, torch.zeros(1, dtype=ts.dtype)]).to(noise.device)
    x = noise[0] * ts[0]
    D = getattr(net, "denoise", net)                      # of TrigFlow; EDM's networks are one

    def slope(x, t):
        return (x - D(x, t.expand(len(x), 1, 1, 1), y)) / t

    for k, (t, r) in enumerate(zip(ts, ts[1:])):
        d = slope(x, t)
        x_r = x + (r - t) * d
        x = x_r if k == args.steps - 1 else x + (r - t) * (d + slope(x_r, r)) / 2
    return x.clamp(-1, 1)


# ==== 3. Arguments ================================================================================
@dataclass
class Args:
    added = dict(augment=0.0, flow="edm")  # neither field nor flag: values of older runs, which did not have these
    # --- the run
    dataset: str = "digits"          # digits, mnist, fashion_mnist, cifar10, a folder, .zip or .npz
    data_dir: str = "data"            # where downloads are kept
    out: str = "runs"                 # runs/teacher-<dataset>-<nnn> is created here
    resume: str = ""                  # continue this run folder; a finished run is only evaluated
    preset: Literal["auto", "small", "fast", "paper"] = "auto"  # auto: small without CUDA
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda if there is one
    seed: int = 0                     # everything random follows from (seed, rank, step)
    cond: bool = False                # condition on the class label
    size: int = 0                     # side of a folder's images; 0: 32, an EDM set's own (>= 0)
    flow: Literal["edm", "trig"] = "edm"  # trig: TrigFlow, smooth in the noise level
    net: Literal["ddpmpp", "ncsnpp", "adm", "dit"] = "ddpmpp"  # network family
    ch: int = 128                     # base width of the network (>= 4)
    mult: tuple = (2, 2, 2)           # width of each resolution, in units of ch; not for dit (>= 1)
    blocks: int = 4                   # residual blocks per resolution; dit: in total (>= 1)
    attn: tuple = (16,)               # image sizes at which there is attention; not for dit
    iters: int = 390_625              # optimiser steps: 200 Mimg (>= 1)
    batch: int = 512                  # images per step, over all ranks (>= 1)
    accum: int = 1                    # parts a rank's batch is split into, to save memory (>= 1)
    lr: float = 1e-3                  # learning rate after warm-up (> 0)
    warmup: int = 19_531              # steps of linear warm-up: 10 Mimg (>= 0)
    ema: float = 0.99929              # EMA decay; half-life 0.5 Mimg (>= 0, < 1)
    dropout: float = 0.13             # dropout inside the network (>= 0, < 1)
    flip: bool = False                # random horizontal flips
    bf16: bool = False                # bfloat16 activations; weights and loss stay float32
    tf32: bool = True                 # TensorFloat-32 products on CUDA: 10 bits of 23, and faster
    compile: bool = False             # torch.compile the network
    checkpoint_acts: bool = False     # recompute activations in the backward pass, to save memory
    shard: bool = False               # split weights and optimiser over the ranks (FSDP2)
    steps: int = 18                   # Heun steps of the sampler, 2 * steps - 1 calls (>= 1, <= 1000)
    grid: int = 64                    # images in a sample grid (>= 1, <= 10000)
    log_every: int = 100              # steps between log lines (>= 1)
    save_every: int = 5_000           # steps between checkpoints, grids and figures (>= 1)
    keep: bool = False                # keep every checkpoint, not only the last two
    max_skips: int = 0                # non-finite steps to skip before the run stops (>= 0)
    fid: int = 0                      # images for an FID at the end; 0: none; papers: 50000 (>= 0)
    fid_every: int = 0                # with --fid: steps between more FIDs; 0: none (>= 0)
    ema_ramp: float = 0.05            # the half-life is at most this share of the images seen (> 0)
    augment: float = 0.12             # probability of each augmentation but the flip; 0: none (>= 0, <= 1)
    label_dropout: float = 0.1        # share of labels dropped with --cond, for guidance (>= 0, <= 1)
    P_mean: float = -1.2              # mean of ln t
    P_std: float = 1.2                # standard deviation of ln t (>= 0)
    t_min: float = 0.002              # last noise level of the sampler (> 0, < t_max)
    t_max: float = 80.0               # first noise level of the sampler
    rho: float = 7.0                  # curvature of the sampler's grid (> 0)
    sd: float = 0.5                   # standard deviation of the data, sigma_data (> 0)


PRESETS = {
    "paper": dict(cost="200 Mimg, about two days on eight V100"),
    "fast": dict(cost="25.6 Mimg, an eighth of the paper's (ours)", iters=50_000, warmup=5_000, augment=0.0),
    # ours: small networks for two CPU cores; the figure of `small` costs as much as 250 steps, so it comes once
    "small": dict(cost="about a quarter of an hour on two CPU cores", iters=1_000, batch=64, warmup=100, lr=1e-3,
                  ema=0.999, dropout=0.0, ch=32, mult=(1, 1, 2), blocks=1, save_every=1_000, steps=9, augment=0.0),
    "digits": dict(cost="about 5 minutes on two CPU cores", iters=1_600, batch=128, warmup=100, lr=2e-3, ema=0.999,
                   dropout=0.0, ch=32, mult=(1, 2), blocks=1, attn=(4,), save_every=1_600, sd=0.75, augment=0.0),
    "mnist": dict(sd=0.55, augment=0.0),
    "fashion_mnist": dict(sd=0.66, augment=0.0),
}


# ==== 4. Training =================================================================================
@Run.guarded
def main(args):
    """Train as `args` say; return the final figure, {"fd_pixels_teacher": 0.12}."""
    run = Run(args, __file__)
    data = load_data(args.dataset, args.data_dir, args.size, run.device)
    run.seed(-1)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    wrap = TrigFlow if args.flow == "trig" else EDM
    net = wrap(backbone(args, data), args.sd, dtype=dtype)
    ema = run.place(deepcopy(net).eval().requires_grad_(False))
    net = run.place(net)
    if args.compile:
        net.model.compile()
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    state = dict(net=net, ema=ema, opt=opt)
    how = dict(net="teacher", steps=[args.steps])

    def draw(noise, y):
        return sample(ema, noise, y, args)

    it = run.start(state, data)
    while it < args.iters:
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            loss, stats = loss_fn(net, x0, y, args)
            (loss / args.accum).backward()
            run.count(stats)
        lr = args.lr * min(1, it / max(args.warmup, 1))  # the first step has lr 0, as in the authors' code
        for group in opt.param_groups:
            group["lr"] = lr
        if run.sync(opt, it):
            opt.step()
            decay = min(args.ema, 0.5 ** (1 / max(args.ema_ramp * it, 1e-8)))
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        opt.zero_grad(set_to_none=True)

        it += 1
        run.log(it, lr=lr)
        if run.due(it):
            run.save(it, state)
            run.evaluate(it, data, draw, **how)
    return run.finish(it, data, draw, **how)


# ==== 5. Which teacher a run gets =================================================================
SAME = ("dataset", "data_dir", "out", "device", "seed", "cond", "size", "flow", "net", "ch", "mult", "blocks", "attn",
        "accum", "bf16", "tf32", "compile", "checkpoint_acts", "shard", "grid", "fid", "sd")  # a method hands these on
MATCH = ("cond", "flow", "net", "ch", "mult", "blocks", "attn", "sd")  # what a teacher found under --out must share
RECIPE = ("lr", "ema", "dropout", "flip", "augment", "label_dropout", "P_mean", "P_std")      # what it had better share
SECONDS = 5.0                                             # between two looks at a folder that another job has


def get(args, data, run, needed=False):
    """The network that --teacher names, trained first if missing; its path, for `show`, if it is a diffusion model;
    changes to args: its path and architecture. (None, None, {}) with `--teacher none`, and for a resumed run that does
    not need it. needed: the loss uses the teacher too, not only the start. Raises BadInput."""
    if args.lora:
        raise BadInput("--lora is for a pipeline, and this teacher is none; leave it out")
    if args.teacher == "none" and needed:
        raise BadInput("--teacher none: there is nothing to distil; name a teacher, or leave the flag out")
    if args.resume and typed(run.asked, "teacher") and (not needed or args.teacher in ("auto", "train")):
        raise BadInput("--teacher can only tell --resume where the teacher is that the run still needs; leave it out")
    if args.teacher == "none" or args.resume and not needed:
        return None, None, {}
    if args.resume and folder.load(args.resume).get("it", 0) >= args.iters:
        return load(args.resume, run.device), None, {}    # any network of this shape: no step is left that would use it
    path = Path(locate(args, data, run))
    net = load(path, run.device)
    sha256 = run.about["teacher_sha256"] = evaluate.sha256(net.state_dict())
    if args.resume and sha256 != config_of(args.resume)["about"].get("teacher_sha256", sha256):   # new in config.json
        raise BadInput(f"the teacher {path} is not the one of this run, or was trained further; name it with --teacher")
    its, mine = net.model.kwargs, (args.sd, *data.images.shape[1:3], data.classes if args.cond else 0)
    theirs = (net.sd, its["channels"], its["size"], its["classes"])
    if mine != theirs:
        raise BadInput(f"the teacher {path} has (sd, channels, size, classes) = {theirs}, not {mine}; name another one")
    if not hasattr(args, "flow") and net.spec["flow"] != "edm":
        raise BadInput(f"the teacher {path} is a TrigFlow model, where only methods with --flow start; name another")
    diffuses = evaluate.is_diffusion(net, path)
    if needed and not diffuses:
        raise BadInput(f"the teacher {path} is a consistency model, which has no ODE to follow; name a diffusion model")
    old, _, done = evaluate.standing(path, Args)          # nothing of a single file
    if needed and old and done < old.iters:               # --resume would look for it as it is now
        raise BadInput(f"the teacher {path} has {done:,} of its {old.iters:,} steps; finish it, or copy its ckpt.pt")
    say(f"teacher: {path}{evaluate.described(path)}")
    changes = {k: its[k] for k in ("net", "ch", "mult", "blocks", "attn")}
    changes["teacher"] = str(path.resolve())              # a resumed run may start from another folder
    if hasattr(args, "flow"):
        changes["flow"] = getattr(net, "raw", "edm")      # the one that its raw network was made for
    return net, path if diffuses else None, changes


def locate(args, data, run):
    """The path of the teacher that --teacher names; `auto` finds, finishes or trains one, or downloads EDM's."""
    path = args.teacher
    if path == "auto":
        wait_for(args.out)                                # of jobs that start together, one looks and begins to train
        path = adopt(args, data, run) or (released.address(args, Args) if args.preset in ("fast", "paper") else "train")
    if path == "train":
        say("training the teacher first")
        path = main(wish(args, run, quiet=False))["run"]
    folder.free(args.out)
    return released.download(path, args.data_dir) if path.startswith(("http://", "https://")) else path


def wait_for(path):
    """Own a folder as soon as nobody else does. The ranks ask together, again and again: a collective gives up."""
    if owner := folder.agree(lambda: folder.take(path)):
        say(f"{path} is in use by {owner}; waiting for it")
    while folder.agree(lambda: folder.take(path)):
        time.sleep(SECONDS)


def wish(args, run, quiet=True):
    """The Args of the teacher that this command would train; not quiet: print the cost of its preset."""
    given = {k: getattr(args, k) for k in SAME if hasattr(args, k)}
    given |= dict(preset=args.preset) if args.preset in PRESETS else {}
    given |= dict(iters=args.teacher_iters) if args.teacher_iters else {}
    given |= dict(batch=args.batch) if typed(run.asked, "batch") else {}
    its, parts = from_presets(Args, PRESETS, given, quiet), run.world * args.accum
    return replace(its, batch=its.batch + -its.batch % parts)             # a preset knows of no ranks


def adopt(args, data, run):
    """The newest teacher under --out that matches what this command would train, with at least as many steps, or None.
    The training of one that was stopped is continued; one that was finished with fewer steps is left as it is."""
    want, stem = wish(args, run), folder.stem_of("teacher", data.name)
    match = (*MATCH, "batch") if typed(run.asked, "batch") else MATCH
    for path in folder.agree(lambda: [p for _, p in folder.numbered(args.out, stem)[::-1] if p.is_dir()]):
        old, about, done = folder.agree(lambda: evaluate.standing(path, Args))   # which may change meanwhile
        if old and (about["data_sha256"] != data.sha256 or any(getattr(old, k) != getattr(want, k) for k in match)):
            continue
        unfinished = not old or done < old.iters
        if unfinished and folder.agree(lambda: folder.take(path)):        # another job is at it
            folder.free(args.out)
            if old:
                wait_for(path)
                folder.free(path)
            else:                                         # it has just begun, or writes its first checkpoint
                time.sleep(SECONDS)
            wait_for(args.out)
            return adopt(args, data, run)
        why = f"damaged ({done})" if not old else "left before its first checkpoint" if not done else \
            f"finished after {done:,} steps, fewer than {want.iters:,}" if old.iters <= done < want.iters else \
            "of a --batch that these ranks do not divide" if unfinished and old.batch % (run.world * old.accum) else ""
        if why:
            folder.free(path)
            say(f"the teacher {path} is {why}; it is not used")
            continue
        if odd := {k: getattr(old, k) for k in RECIPE if getattr(old, k) != getattr(want, k)}:
            say(f"the teacher {path} was trained otherwise than by this command: {odd}")
        if unfinished:
            folder.free(args.out)
            say(f"the teacher {path} was stopped after {done:,} steps; its training goes on")
            here = dict(resume=str(path), device=args.device, data_dir=args.data_dir, dataset=args.dataset)
            main(replace(old, iters=max(old.iters, want.iters), **here))
        return str(path)


def show(teacher, path, run, data):
    """Put the teacher's figures and grid beside the run's own: those of its folder, or measured now."""
    if path is None or run.args.resume:
        return
    its, about, _ = evaluate.standing(path, Args)
    if about and about["data_sha256"] == data.sha256 and evaluate.adopt(run, path):
        return
    its = its or Args()
    run.evaluate(0, data, lambda noise, y: sample(teacher, noise, y, its), [its.steps], net="teacher")


if __name__ == "__main__":
    main(parse(Args, PRESETS))

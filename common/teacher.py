"""
common/teacher.py: the diffusion model.    EDM, Karras et al. 2022, arXiv:2206.00364.

One training step
    t       ~  lognormal(P_mean, P_std)                     # noise level            [Table 1]
    loss    =  |D(x0 + t*eps, t) - x0|^2 * (t^2 + sd^2) / (t*sd)^2     # sum over C, H, W

Deviations from the paper: no augmentation pipe (the paper's configuration E: FID 2.05 instead of 1.97
on CIFAR-10). Gradients that are not finite stop the run; the authors' code replaces them by numbers.
"""
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from common.data import load as load_data
from common.precond import EDM, backbone, build
from common.run import BadInput, Run, config_of, load_checkpoint, numbered, parse, say


# ==== 1. Arguments ================================================================================
@dataclass
class Args:
    dataset: str = "digits"           # digits | mnist | fashion_mnist | cifar10 | a folder | a .npz
    data_dir: str = "data"            # where downloads are kept
    out: str = "runs"                 # runs/teacher-<dataset>-<nnn> is created here
    resume: str = ""                  # go on with this run folder; a finished one is only sampled
    preset: Literal["auto", "small", "fast", "paper"] = "auto"  # auto: small without CUDA, else paper
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda if there is one
    seed: int = 0                     # everything random follows from (seed, rank, step)
    cond: bool = False                # condition on the class label
    size: int = 0                     # height and width of a folder's images; 0: 32, or as stored
    net: Literal["ddpmpp"] = "ddpmpp"  # network family
    ch: int = 128                     # base width of the network
    mult: tuple = (2, 2, 2)           # width of each resolution, times ch
    blocks: int = 4                   # residual blocks per resolution
    attn: tuple = (16,)               # image sizes at which there is attention
    iters: int = 390_625              # optimiser steps: 200 Mimg
    batch: int = 512                  # images per step, over all ranks
    accum: int = 1                    # parts into which a rank's batch is split to save memory
    lr: float = 1e-3                  # learning rate after warm-up
    warmup: int = 19_531              # steps of linear warm-up: 10 Mimg
    ema: float = 0.99929              # decay of the averaged weights: half-life 0.5 Mimg
    dropout: float = 0.13             # dropout inside the network
    flip: bool = False                # random horizontal flips
    bf16: bool = False                # bfloat16 activations; weights and loss stay float32
    compile: bool = False             # torch.compile the network
    shard: bool = False               # split weights and optimiser over the ranks (FSDP2)
    steps: int = 18                   # Heun steps of the sampler; network calls: 2 * steps - 1
    grid: int = 64                    # images in a sample grid
    log_every: int = 100              # steps between log lines
    save_every: int = 5_000           # steps between checkpoints, grids and figures
    keep: bool = False                # keep every checkpoint, not only the last two
    max_skips: int = 0                # steps that may be skipped because they are not finite
    ema_ramp: float = 0.05            # the half-life is at most this share of the images seen
    label_dropout: float = 0.1        # share of labels dropped with --cond, for guidance
    P_mean: float = -1.2              # mean of ln t
    P_std: float = 1.2                # standard deviation of ln t
    t_min: float = 0.002              # last noise level of the sampler
    t_max: float = 80.0               # first noise level of the sampler
    rho: float = 7.0                  # curvature of the sampler's grid
    sd: float = 0.5                   # standard deviation of the data, sigma_data


PRESETS = {
    "paper": dict(cost="200 Mimg, about two days on eight V100"),
    "small": dict(cost="about 15 minutes on two CPU cores", iters=2_000, batch=64, warmup=200,
                  lr=1e-3, ema=0.999, dropout=0.0, ch=32, mult=(1, 2, 2), blocks=1, save_every=500),
    "digits": dict(cost="about 4 minutes on two CPU cores", iters=2_500, batch=128, warmup=100, lr=2e-3,
                   ema=0.999, dropout=0.0, ch=32, mult=(1, 2), blocks=2, attn=(4,), save_every=1_000, sd=0.75),
}


# ==== 2. Loss =====================================================================================
def loss_fn(net, x0, y, args):
    t = (torch.randn(len(x0), 1, 1, 1, device=x0.device) * args.P_std + args.P_mean).exp()
    eps = torch.randn_like(x0)
    if y is not None:                                     # -1: the network is told no label
        y = torch.where(torch.rand(len(y), device=y.device) < args.label_dropout, -1, y)
    d = ((net(x0 + t * eps, t, y) - x0) ** 2).flatten(1).sum(1)
    loss = d * ((t**2 + args.sd**2) / (t * args.sd) ** 2).flatten()
    return loss.mean(), dict(t=t, loss=loss.detach())


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Heun's method on the probability-flow ODE (Algorithm 2 without churn), from noise [1, B, C, H, W]."""
    i = torch.arange(args.steps, dtype=noise.dtype) / max(args.steps - 1, 1)
    hi, lo = args.t_max ** (1 / args.rho), args.t_min ** (1 / args.rho)
    ts = (hi + i * (lo - hi)) ** args.rho
    ts = torch.cat([ts, torch.zeros(1, dtype=ts.dtype)]).to(noise.device)
    x = noise[0] * ts[0]
    slope = lambda x, t: (x - net(x, t.expand(len(x), 1, 1, 1), y)) / t
    for t, r in zip(ts, ts[1:]):
        d = slope(x, t)
        x_r = x + (r - t) * d
        x = x_r if r == 0 else x + (r - t) * (d + slope(x_r, r)) / 2
    return x.clamp(-1, 1)


# ==== 4. Training =================================================================================
def main(args):
    """Train as `args` say; return the final figure, {"fd_pixels_teacher": 0.12}."""
    run = Run(args, __file__)
    data = load_data(args.dataset, args.data_dir, args.size, run.device)
    run.seed(-1)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    net = EDM(backbone(args, data), args.sd, dtype=dtype)
    ema = run.place(deepcopy(net).eval().requires_grad_(False))
    net = run.place(net)
    if args.compile:
        net.compile()
    opt = torch.optim.Adam(net.parameters(), lr=args.lr, foreach=True)
    state = dict(net=net, ema=ema, opt=opt)
    draw = lambda noise, y: sample(ema, noise, y, args)
    how = dict(net="teacher", steps=args.steps)

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


# ==== 5. What the methods use =====================================================================
def load(path, device="cpu"):
    """The averaged network of a run folder or checkpoint of ours, of any method, frozen and in float32:
    net(x, t, y) -> D(x; t), x [B,C,H,W], t [B,1,1,1], y int64 [B] or None. Raises BadInput."""
    ckpt = load_checkpoint(path, device)
    net = build(ckpt["model"])
    net.load_state_dict(ckpt["ema"])
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


SAME = ("dataset", "data_dir", "out", "device", "seed", "cond", "size", "net", "ch", "mult", "blocks", "attn", "accum",
        "bf16", "compile", "shard", "grid", "sd")            # flags that a method hands to its teacher
MATCH = ("cond", "net", "ch", "mult", "blocks", "attn", "sd")  # what a teacher found under --out must share


def get(args, data, run, needed=False):
    """The diffusion model that --teacher names, trained first if need be; None with `--teacher none`, and when a run
    is resumed, unless it is `needed` for more than the start. `args` then name it and its architecture. BadInput."""
    if args.teacher == "none" or args.resume and not needed:
        return None
    path = args.teacher
    if path == "auto":
        path = newest(args, data) or "train"
        if path != "train" and load_checkpoint(path)["it"] < (args.teacher_iters or config_of(path)["iters"]):
            say(f"the teacher {path} is unfinished; its training goes on")
            iters = ["--iters", str(args.teacher_iters)] if args.teacher_iters else []
            main(parse(Args, PRESETS, ["--resume", path] + iters))
    if path == "train":
        path = train(args)
    net = load(path, run.device)
    mine, its = (args.sd, *data.images.shape[1:]), net.model.kwargs
    theirs = (net.sd, its["channels"], its["size"], its["size"])
    if mine != theirs or its["classes"] != (data.classes if args.cond else 0):
        raise BadInput(f"the teacher {path} has (sd, channels, height, width) = {theirs} and {its['classes']} classes, "
                       f"this run {mine} and {data.classes if args.cond else 0}; name another --teacher or train one")
    net.folder = Path(path) if Path(path).is_dir() else Path(path).parent
    say(f"teacher: {path}")
    args.teacher = str(path)
    for k in ("ch", "mult", "blocks", "attn"):
        setattr(args, k, its[k])
    return net


def newest(args, data):
    """The latest teacher folder under --out for the same data and network, or None."""
    for folder in reversed(numbered(args.out, f"teacher-{data.name}")):
        if (folder / "ckpt.pt").exists() or (folder / "ckpt.prev.pt").exists():
            old = config_of(folder)
            if old["about"]["data_sha256"] == data.sha256 and all(old[k] == getattr(args, k) for k in MATCH):
                return str(folder)


def train(args):
    """Train a teacher with the network and data of `args`; return its folder."""
    argv = []
    for k in SAME:
        v, flag = getattr(args, k), k.replace("_", "-")
        if isinstance(v, bool):
            argv.append(f"--{flag}" if v else f"--no-{flag}")
        else:
            argv += [f"--{flag}", ",".join(map(str, v)) if isinstance(v, tuple) else str(v)]
    if args.preset in PRESETS:
        argv += ["--preset", args.preset]
    if args.teacher_iters:
        argv += ["--iters", str(args.teacher_iters)]
    say("training the teacher first")
    return main(parse(Args, PRESETS, argv))["run"]


if __name__ == "__main__":
    main(parse(Args, PRESETS))

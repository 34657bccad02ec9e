"""
ict.py: Improved Consistency Training.    Song and Dhariwal 2023, arXiv:2310.14189.

Idea    CT (ct.py) with every choice revised; it works for the same reason. There is no EMA target:
        its lag would swamp the ever smaller step between two levels. So there can be far more
        levels, and their number doubles at fixed steps. Pairs with a small gap get a larger weight,
        and most pairs are drawn at the noise levels where images take shape. The distance grows
        like a norm, not like its square, so that outliers do not dominate the gradient.

One training step
    N       <- N(it)                                   # 11, 21, 41 .. 1281 levels       [Sec. 3.4]
    n       ~  lognormal, put on the grid;  t = t_(n+1), r = t_n                         [Sec. 3.5]
    f_t     =  f(x0 + t*eps, t)                        # gradient flows here
    f_r     =  f(x0 + r*eps, r), no gradient           # same weights, eps and dropout mask
    loss    =  d(f_t, f_r) / (t - r)                   # d = sqrt(|f_t - f_r|^2 + c^2) - c

Deviations from the paper
    Network and initialisation are EDM's. With NCSN++ and no teacher, the scale of the Fourier
    features is the paper's 0.02; the embedding of DDPM++ is as smooth without a change.
    The decay of the EMA ramps up during the first steps; in the paper it is constant.
    A loss or gradient that is not finite stops the run. GPUs multiply in TF32.
    The presets digits and small are ours.

Read next: ect.py.  See only what changes: diff ict.py ect.py
"""
import math
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch

from common import teacher as teachers
from common.data import load
from common.flags import BadInput, parse, say
from common.networks import backbone
from common.precond import EDM
from common.run import Run


# ==== 1. Schedules ================================================================================
def levels(it, args):
    """N(it), the number of noise levels: s0 + 1 to s1 + 1; N - 1 doubles at equal intervals."""
    interval = max(1, math.floor(args.iters / (math.log2(args.s1 // args.s0) + 1)))
    return min(args.s0 * 2 ** (it // interval), args.s1) + 1


def karras(N, args):
    """t_min = t_1 < .. < t_N = t_max, float64 [N]: equal steps of t^(1/rho)."""
    lo, hi = args.t_min ** (1 / args.rho), args.t_max ** (1 / args.rho)
    return (lo + torch.linspace(0, 1, N, dtype=torch.float64) * (hi - lo)) ** args.rho


def times(n, it, args, device):
    """Draw n pairs of neighbouring noise levels t > r and their gaps t - r, each [n, 1, 1, 1]."""
    ts = karras(levels(it, args), args)
    p = torch.erf((ts.log() - args.P_mean) / (math.sqrt(2) * args.P_std)).diff()  # of r = t_1 ..
    gap = ts.diff()                                       # in float32 t - r would lose digits
    p, gap, ts = (v.float().to(device, non_blocking=True) for v in (p, gap, ts))  # no wait
    i = torch.multinomial(p, n, replacement=True).view(n, 1, 1, 1)
    return ts[i + 1], ts[i], gap[i]


# ==== 2. Loss =====================================================================================
def loss_fn(net, x0, y, it, args, reseed):
    """x0 [B,C,H,W] in [-1, 1], y int64 [B] or None -> scalar loss, stats: t [B,1,1,1], loss [B].
    reseed() resets the random generator, so that both calls of net drop the same units.
    Reads args.s0, s1, iters, t_min, t_max, rho, P_mean, P_std, c. net(x, t, y) -> images [B,C,H,W]
    for levels t [B,1,1,1]; net(x, t_min, y) = x."""
    t, r, gap = times(len(x0), it, args, x0.device)
    eps = torch.randn_like(x0)                            # one eps for both points: same path

    reseed()                                              # same dropout mask in both calls
    f_t = net(x0 + t * eps, t, y)
    reseed()
    with torch.no_grad():                                 # the target is a constant
        f_r = net(x0 + r * eps, r, y)

    d = ((f_t - f_r) ** 2).flatten(1).sum(1)              # squared distance per image [B]
    c = args.c * math.sqrt(x0[0].numel())
    d = (d + c**2).sqrt() - c                             # one root per image, not per pixel
    loss = d / gap.flatten()
    return loss.mean(), dict(t=t, loss=loss.detach(), N=levels(it, args))


# ==== 3. Sampling =================================================================================
@torch.no_grad()
def sample(net, noise, y, args):
    """Denoise, add less noise, denoise again: one step for each slice of noise [K, B, C, H, W]."""
    hi, lo, K = math.log10(args.t_max), math.log10(args.t_mid), len(noise)
    ts = torch.logspace(hi, lo, K, dtype=noise.dtype, device=noise.device)
    x = torch.zeros_like(noise[0])
    for t, z in zip(ts, noise):                           # K = 1: t_max;  K = 2: t_max, t_mid
        x = net(x + (t**2 - args.t_min**2).sqrt() * z, t.expand(len(z), 1, 1, 1), y)  # Alg. 1
    return x                                              # show images clamped to [-1, 1]


# ==== 4. Arguments ================================================================================
@dataclass
class Args:
    added = dict(fp16=False)         # neither field nor flag: what older runs did, without it
    fixed = ("iters",)                # neither field nor flag: what --resume may not change here
    # --- the run (the same in every file)
    dataset: str = "digits"          # digits, mnist, fashion_mnist, cifar10, a folder, .zip or .npz
    data_dir: str = "data"            # where downloads are kept
    out: str = "runs"                 # runs/<method>-<dataset>-<nnn> is created here
    resume: str = ""                  # continue this run folder; a finished run is only evaluated
    preset: Literal["auto", "small", "fast", "paper"] = "auto"  # auto: small without CUDA
    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"  # auto: cuda if there is one
    seed: int = 0                     # everything random follows from (seed, rank, step)
    cond: bool = False                # condition on the class label
    size: int = 0                     # side of a folder's images; 0: 32, an EDM set's own (>= 0)
    teacher: str = "none"             # auto, train, none, a run folder, .pt, .pkl or address
    teacher_iters: int = 0            # steps of a teacher trained here; 0: its preset's (>= 0)
    iters: int = 400_000              # optimiser steps (>= 1)
    batch: int = 1_024                # images per step, over all ranks (>= 1)
    accum: int = 1                    # parts a rank's batch is split into, to save memory (>= 1)
    lr: float = 1e-4                  # learning rate after warm-up (> 0)
    warmup: int = 0                   # steps of linear warm-up (>= 0)
    ema: float = 0.99993              # EMA decay; the averaged weights are sampled (>= 0, < 1)
    flip: bool = False                # random horizontal flips
    bf16: bool = False                # bfloat16 activations; weights and loss stay float32
    tf32: bool = True                 # TensorFloat-32 products on CUDA: 10 bits of 23, and faster
    compile: bool = False             # torch.compile the network
    checkpoint_acts: bool = False     # recompute activations in the backward pass, to save memory
    lora: int = 0                     # rank of a pipeline's LoRA adapters; 0: train all (>= 0)
    shard: bool = False               # split weights and optimiser over the ranks (FSDP2)
    steps: int = 2                    # sampling steps (>= 1, <= 1000)
    grid: int = 64                    # images in a sample grid (>= 1, <= 10000)
    log_every: int = 100              # steps between log lines (>= 1)
    save_every: int = 5_000           # steps between checkpoints, grids and figures (>= 1)
    keep: bool = False                # keep every checkpoint, not only the last two
    max_skips: int = 0                # non-finite steps to skip before the run stops (>= 0)
    fid: int = 0                      # images for an FID at the end; 0: none; papers: 50000 (>= 0)
    fid_every: int = 0                # with --fid: steps between more FIDs; 0: none (>= 0)
    # --- the network (the same in every file)
    net: Literal["ddpmpp", "ncsnpp", "adm", "dit"] = "ncsnpp"  # network family
    ch: int = 128                     # base width of the network (>= 4)
    mult: tuple = (2, 2, 2)           # width of each resolution, in units of ch; not for dit (>= 1)
    blocks: int = 4                   # residual blocks per resolution; dit: in total (>= 1)
    attn: tuple = (16,)               # image sizes at which there is attention; not for dit
    dropout: float = 0.3              # dropout inside the network (>= 0, < 1)
    # --- the method (defaults: the paper's recipe for CIFAR-10)
    fp16: bool = False                # float16 activations: finer than --bf16, for narrow gaps
    s0: int = 10                      # gaps between noise levels at the start (>= 2, <= s1)
    s1: int = 1280                    # gaps between noise levels at the end
    c: float = 0.00054                # pseudo-Huber constant over sqrt(C * H * W) (>= 0)
    P_mean: float = -1.1              # mean of ln t
    P_std: float = 2.0                # standard deviation of ln t (>= 0)
    t_mid: float = 0.821              # noise level of the second sampling step (> t_min, < t_max)
    t_max: float = 80.0               # highest noise level, and that of the first step
    t_min: float = 0.002              # lowest noise level: f(x, t_min) = x (> 0)
    rho: float = 7.0                  # grid exponent; higher: more low noise levels (> 0)
    sd: float = 0.5                   # standard deviation of the data, sigma_data (> 0)


PRESETS = {
    "paper": dict(cost="400,000 steps of 1,024 images: days on several GPUs"),
    # ours, for two CPU cores: small networks, short averages, no dropout: they underfit
    "small": dict(cost="30 min on two CPU cores", net="ddpmpp", iters=2_000, batch=64, warmup=50,
                  lr=1e-3, ema=0.99, dropout=0.0, ch=32, mult=(1, 1, 2), blocks=1, save_every=500),
    "digits": dict(cost="about 10 minutes on two CPU cores", iters=2_500, lr=1e-3, dropout=0.0,
                   batch=128, warmup=50, ema=0.995, ch=32, net="ddpmpp",
                   mult=(1, 2), blocks=1, attn=(4,), save_every=250, t_mid=1.2, sd=0.75),
    "cifar10": dict(flip=True),
    # the data's own standard deviation; the second sampling level follows it
    "mnist": dict(sd=0.55, t_mid=0.9),
    "fashion_mnist": dict(sd=0.66, t_mid=1.1),
    # ours, not tried: Stable Diffusion's range of noise levels, a few minutes' training
    "latents": dict(cost="half an hour on a GPU of 16 GB (estimate)", cond=True, iters=625, batch=8,
                    lr=1e-4, warmup=25, ema=0.95, lora=64, checkpoint_acts=True, save_every=125,
                    grid=16, sd=1.0, t_max=14.6146, t_mid=1.62, t_min=0.02917),
}


def check(args):
    """Refuse flags that contradict each other; say what --bf16 costs. Raises BadInput."""
    if args.bf16 and args.fp16:
        raise BadInput("--bf16 and --fp16 are two precisions; give one of them")
    if args.bf16:                                         # measured: tests/bench/README.md
        say("--bf16 loses the direction of the gradient at narrow gaps (ect on digits, one step: "
            "FD 1.23, float32 0.40, --fp16 0.46)")


# ==== 5. Training (the same in every file, except the lines ending in  # *) =======================
@Run.guarded                                              # one line for what is no fault of ours
def main(args):
    """Train with `args`; return {"run": folder, "fd_pixels_2step": 0.38, ..}."""
    run = Run(args, __file__)                             # device and ranks; no file is written yet
    check(args)                                           # *
    data = load(args.dataset, args.data_dir, args.size, run.device)
    teacher, found, changes = teachers.get(args, data, run)  # *
    args = run.resolve(**changes)                         # with a teacher: its architecture
    run.seed(-1)                                          # negative: the same on every rank
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    dtype = torch.float16 if args.fp16 else dtype         # *
    net = EDM(backbone(args, data, teacher, fourier=0.02), args.sd, args.t_min, dtype)  # *
    ema = run.place(deepcopy(net).eval().requires_grad_(False))  # averaged weights, for sampling
    net = run.place(net)
    if args.compile:                                      # in place: both calls are compiled  # *
        net.compile()                                     # *
    opt = torch.optim.RAdam(net.parameters(), lr=args.lr, foreach=True)  # *
    state = dict(net=net, ema=ema, opt=opt)               # *
    steps = sorted({1, args.steps})                       # numbers of sampling steps to test  # *

    def draw(noise, y):
        return sample(ema, noise, y, args)

    def reseed():                                         # one dropout mask for all calls of a step
        run.seed(it, part, stream=1)

    it = run.start(state, data)                           # 0, or the step from which to resume
    teachers.show(teacher, found, run, data)              # *
    while it < args.iters:
        for part in range(args.accum):
            run.seed(it, part)
            x0, y = run.batch(data, it, part)
            loss, stats = loss_fn(net, x0, y, it, args, reseed)  # *
            (loss / args.accum).backward()
            run.count(stats)                              # for the log; stays on the device
        lr = args.lr * min(1, (it + 1) / max(args.warmup, 1))  # *
        for group in opt.param_groups:
            group["lr"] = lr
        if run.sync(opt, it):                             # mean over ranks; False: not finite, skip
            opt.step()
            decay = min(args.ema, (it + 1) / (it + 10))   # a short average at first  # *
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        opt.zero_grad(set_to_none=True)

        it += 1
        run.log(it, lr=lr)
        if run.due(it):                                   # every --save-every, at end, on a signal
            run.save(it, state)
            run.evaluate(it, data, draw, steps)
    return run.finish(it, data, draw, steps)


if __name__ == "__main__":
    main(parse(Args, PRESETS))
